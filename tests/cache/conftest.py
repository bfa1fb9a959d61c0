"""Fixtures: small caches, a selection that must be whole, and caches in stores."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_selections import IDENTITY
from sample_sides import write_side
from sample_stores import moto_bucket
from sample_urls import put

from featcache.cache.reading import Cache, Failure, open_cache
from featcache.cache.selection import SelectionSummary, select
from featcache.cache.writing import SplitRows, write_rows
from featcache.errors import COPIES


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Cache]:
    """Write a small cache whose images are told by a number each: ``make("a", "train/x/1")``."""

    def write(
        name: str, *rows: str, groups: Any = None, failures: Iterable[Failure] = (),
        provenance: dict[str, Any] | None = None, images: dict[str, int] | None = None,
        dtype: Any = "<f4", views: dict[str, int] | None = None,
    ) -> Cache:  # fmt: skip
        classes = sorted({row.split("/")[1] for row in rows} - {"?"})
        splits = {}
        for split_name in sorted({row.split("/")[0] for row in rows}):
            paths = sorted(row for row in rows if row.startswith(split_name + "/"))
            ids = [
                (images or {}).get(p, zlib.crc32((name + p).encode()) % 1_000_003) for p in paths
            ]
            features = (np.array([[i, i + 1, i + 2] for i in ids], "<f4") / 1024).astype(dtype)
            if views and split_name in views:
                steps = np.arange(views[split_name], dtype=dtype)[:, None]
                features = features[:, None] + steps / 8
            splits[split_name] = SplitRows(
                features.shape, features.dtype, lambda features=features: [features],
                np.array(
                    [classes.index(c) if (c := p.split("/")[1]) != "?" else -1 for p in paths],
                    np.int64,
                ),
                paths, groups and [groups[p] for p in paths],
                np.array([list(sha256(b"%d" % i).digest()) for i in ids], np.uint8),
                np.array(ids, np.int64), np.array(ids, np.int64),
            )  # fmt: skip
        return write_rows(
            tmp_path / f"{name}.h5", splits, identity=IDENTITY, provenance=provenance or {},
            classes=classes, task="multiclass", failures=list(failures),
        )  # fmt: skip

    return write


@pytest.fixture
def said() -> list[str]:
    """The lines that a verb was given to say: ``say=said.append``."""
    return []


@pytest.fixture
def whole(tmp_path: Path) -> Callable[..., Cache]:
    """Select into ``new.h5``; the result is whole, and nothing lies beside it."""

    def call(*caches: Cache, **options: Any) -> Cache:
        before = {p.name for p in tmp_path.iterdir()}
        summary = select([c.path for c in caches], tmp_path / "new.h5", **options)
        assert {p.name for p in tmp_path.iterdir()} == before | {"new.h5"}
        assert isinstance(summary, SelectionSummary)
        made = open_cache(tmp_path / "new.h5")
        assert summary.num_images == sum(map(len, made.splits.values()))
        assert summary.content_sha256 == made.content_sha256
        assert sum(s["num_taken"] for s in summary.sources) == summary.num_images
        assert made.fingerprint == caches[0].fingerprint
        return made

    return call


# ------------------------------------------------------------------------------- caches by URL


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_waiting: None) -> Path:
    """Where local copies lie."""
    monkeypatch.setenv("FEATCACHE_COPIES", str(tmp_path / "copies"))
    COPIES.clear()
    return tmp_path / "copies"


@pytest.fixture
def cache(memory: str, tmp_path: Path) -> str:
    """A cache in memory."""
    write_side(tmp_path / "made.h5", 3)
    return put(tmp_path / "made.h5", f"{memory}/c.h5")


@pytest.fixture(scope="module")
def bucket(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any]]:
    """A URL in moto's server, and a client of it."""
    with moto_bucket(request, "caches") as client:
        yield "s3://caches", client
