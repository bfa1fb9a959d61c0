"""A small cache to sweep on, and a small search space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sample_rows import make_cache, rows_of

from featcache.cache.reading import Cache
from featcache.sweeps.sweeping import SweepSummary, sweep

SPACE = """
hidden = [[8], [4], []]
dropout = { low = 0.0, high = 0.7 }
learning_rate = { low = 1e-3, high = 3e-2, log = true }
optimizer = ["adam", "sgd"]
epochs = 4
"""


def small_cache(folder: Path) -> Cache:
    """Make ``c.h5``, and beside it ``s.toml``, a small space."""
    (folder / "s.toml").write_text(SPACE, "utf-8")
    splits = {"train": [0, 1] * 30, "valid": [0, 1] * 12, "test": [0, 1] * 5}
    return make_cache(
        folder / "c.h5", **{k: rows_of(k, v, width=16) for k, v in splits.items()}
    )  # fmt: skip


def sweep_small(folder: Path, name: str = "r", **options: Any) -> SweepSummary:
    """Sweep ``c.h5`` by ``s.toml``."""
    given = {"trials": 8, "space": folder / "s.toml", "repeats": 2, "device": "cpu"}
    return sweep(folder / "c.h5", folder / name, **(given | options))


def run_files(run: Path) -> dict[str, bytes]:
    """Every file whose bytes must be the same each time."""
    return {n: (run / n).read_bytes() for n in ("trials.csv", "sweep.json", "head.safetensors")}
