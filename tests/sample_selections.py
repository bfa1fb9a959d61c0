"""Tables to select by, and a selection that must be refused."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from featcache.cache.reading import Cache
from featcache.cache.selection import select
from featcache.cache.writing import partial_folder

IDENTITY = {"backbone": "made elsewhere", "num_features": 3, "feature_dtype": "float32"}


def write_table(path: Path, rows: Iterable[Iterable[str]], header: str = "path") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return path


def refused(tmp_path: Path, error: type[Exception], *caches: Cache, **options: Any) -> str:
    """Return the message of a selection that fails and leaves nothing."""
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(error) as caught:
        select([c.path for c in caches], tmp_path / "new.h5", **options)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert not partial_folder(tmp_path / "new.h5").exists()
    return str(caught.value)
