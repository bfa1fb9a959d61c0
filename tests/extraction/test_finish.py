"""The end of an extraction: what is known of a million images is written in little memory."""

from __future__ import annotations

import hashlib
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from featcache.cache import writing
from featcache.cache.reading import open_cache
from featcache.data.dataset import ImageDataset, Sample, Samples
from featcache.extraction.finish import _split_rows
from featcache.extraction.ledger import Ledger
from featcache.extraction.plan import Job


def test_a_million_images_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples, ledger and what is written take 190 bytes an image, blocks 80 more of so few."""
    number, width = 10_000, 8
    monkeypatch.setattr(writing, "_BLOCK_ROWS", 1000)
    vectors = SimpleNamespace(
        shape=(number, width), dtype=np.dtype("<f4"),
        take=lambda rows: np.repeat(rows[:, None], width, 1).astype("<f4"),
    )  # fmt: skip

    def write(num_images: int, name: str) -> None:
        made = (Sample(f"c/{n:08}.png", n % 2, "all", None, n, n) for n in range(num_images))
        dataset = ImageDataset(tmp_path, "classes", ("a", "b"), Samples(made))
        ledger = Ledger(dataset, {"all": 1})
        for first in range(0, num_images, 1000):
            rows = ((n, hashlib.sha256(b"%d" % n).digest(), False, 1)
                    for n in range(first, min(first + 1000, num_images)))  # fmt: skip
            ledger.take_shard(lambda: vectors, rows)  # type: ignore[arg-type,return-value]
        facts: dict[str, Any] = {
            "dataset": dataset, "ledger": ledger, "num_views": {"all": 1}, "dtype": vectors.dtype,
            "recipe": SimpleNamespace(backbone=SimpleNamespace(num_features=width)),
        }  # fmt: skip
        split = _split_rows(cast("Job", SimpleNamespace(**facts)), "all", *ledger.rows_of("all"))
        writing.write_rows(
            tmp_path / name, {"all": split}, identity={"backbone": "b"}, provenance={},
            classes=("a", "b"), task="multiclass",
        )  # fmt: skip

    write(100, "small.h5")  # what is made once for all
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        write(number, "c.h5")
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    rows = open_cache(tmp_path / "c.h5").splits["all"]
    assert rows.paths == [f"c/{n:08}.png" for n in range(number)]
    assert (rows.image_bytes == np.arange(number)).all()
    assert (rows.features[:, 0] == np.arange(number) % 1000).all()  # as 1,000 were one shard
    assert peak < 320 * number
