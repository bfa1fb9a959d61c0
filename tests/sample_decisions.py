"""A run that left ``valid`` alone, a cross-validation of its options, and files to be spoilt."""

from __future__ import annotations

import csv
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sample_rows import edited, make_cache, rows_of

from featcache.errors import FeatcacheWarning
from featcache.evaluation.deciding.decision import DecideSummary, decide
from featcache.files import json_sha256
from featcache.heads.training import train
from featcache.sweeps.crossval import crossval

SMALL: dict[str, Any] = {"hidden": (8,), "epochs": 3, "device": "cpu", "learning_rate": 0.02}


def make_work(folder: Path) -> Path:
    """Write ``c.h5`` with groups of two images, a run that left valid alone, and two crossvals."""
    rows = {}
    for name, number in (("train", 240), ("valid", 160), ("test", 90)):
        part = rows_of(name, np.arange(number) // 2 % 2, width=16)
        noisy = next(iter(part.feature_blocks())) + np.random.default_rng(1).normal(
            size=(number, 16)
        ).astype("f4")
        groups = [f"{name}{i // 2}" for i in range(number)]
        groups[::12] = part.paths[::12]  # as split names those that it has no name for
        rows[name] = edited(part, groups=groups, features=noisy)
    make_cache(folder / "c.h5", **rows)
    train(folder / "c.h5", folder / "run", valid_fraction=0.2, **SMALL)
    train(folder / "c.h5", folder / "chosen", **SMALL)
    crossval(folder / "c.h5", folder / "folds", folds=2, repeats=3, **SMALL)
    return folder


def decide_quietly(run: Path, **options: Any) -> DecideSummary:
    """Decide without a line, and without the warning that a wish cannot be promised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FeatcacheWarning)
        return decide(run, **({"positive": "covid", "say": lambda _: None} | options))


def copy_run(work: Path, folder: Path, name: str = "run") -> Path:
    """Copy the cache and a run, so that it may be spoilt."""
    shutil.copy(work / "c.h5", folder)
    return Path(shutil.copytree(work / name, folder / name))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def rewrite_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the facts of a JSON file that bears its own hash, and give it the right hash again."""
    facts = json.loads(path.read_text("utf-8"))
    change(facts)
    facts["sha256"] = json_sha256(facts, without="sha256")
    path.write_text(json.dumps(facts), "utf-8")
