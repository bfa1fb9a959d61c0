"""Caches of several labels a row, and their figures a second time.

The forward pass is computed by NumPy, the rest by scikit-learn on the rows whose target is known.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics

from featcache.cache.reading import Cache
from featcache.cache.writing import write_cache
from featcache.cli import main as cli

CLASSES = ("edema", "a|b\\c", "mass", "=rare")
IDENTITY = {"backbone": "fake", "image_size": 32}
SMALL: dict[str, Any] = {"hidden": (8,), "epochs": 4, "device": "cpu", "learning_rate": 0.02}


def rows_of(seed: int, num_rows: int) -> tuple[Any, Any, list[str], list[str]]:
    """Features, targets (a fifth unknown, of every tenth row all), paths, groups of two rows."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num_rows, 10)).astype("<f4")
    chances = 1 / (1 + np.exp(-1.5 * features[:, :4] + [0, 0.5, 1, 2.4]))
    targets = (rng.random((num_rows, 4)) < chances).astype("<f4")
    targets[rng.random((num_rows, 4)) < 0.2] = np.nan
    targets[::10] = np.nan
    paths = [f"{seed}/{i:04d}.png" for i in range(num_rows)]
    return features, targets, paths, [f"p{seed}-{i // 2}" for i in range(num_rows)]


def make_cache(path: Path, sizes: dict[str, int] | None = None, **change: Any) -> Cache:
    sizes = sizes or {"train": 160, "valid": 80, "test": 90}
    parts = {name: rows_of(seed, n) for seed, (name, n) in enumerate(sizes.items())}
    columns = [{name: part[i] for name, part in parts.items()} for i in range(4)]
    given = dict(zip(("features", "targets", "paths", "groups"), columns, strict=True))
    options: dict[str, Any] = {"classes": CLASSES, "identity": IDENTITY} | given | change
    return write_cache(path, **options)


def probs_of(state: Any, features: Any) -> Any:
    """Sigmoid of a head of any hidden layers, by NumPy alone."""
    weights = {name: value.astype(np.float64) for name, value in state.items()}
    x, layer = features.astype("f8"), 0
    while True:
        x = (x - weights[f"{layer}.running_mean"]) / np.sqrt(weights[f"{layer}.running_var"] + 1e-5)
        x = x * weights[f"{layer}.weight"] + weights[f"{layer}.bias"]
        is_last = f"{layer + 1}.weight" not in weights
        linear = layer + (2 if is_last else 1)
        x = x @ weights[f"{linear}.weight"].T + weights[f"{linear}.bias"]
        if is_last:
            return 1 / (1 + np.exp(-x))
        x, layer = np.maximum(x, 0), layer + 3


def by_scikit_learn(targets: Any, probs: Any) -> dict[str, Any]:
    """The figures over the known targets, each class alone; the means where it has both answers."""
    per_class = {}
    for i, name in enumerate(CLASSES):
        known = [row for row in range(len(targets)) if targets[row, i] in (0, 1)]
        truth, prob = targets[known, i].astype(int), probs[known, i]
        if not known:
            figures = ("precision", "recall", "f1", "roc_auc", "average_precision")
            per_class[name] = dict.fromkeys(figures) | {
                "num_positive": 0, "num_negative": 0, "num_unknown": len(targets),
                "confusion_matrix": [[0, 0], [0, 0]],
            }  # fmt: skip
            continue
        called = (prob > 0.5).astype(int)
        per_class[name] = {
            "precision": metrics.precision_score(truth, called, zero_division=np.nan),
            "recall": metrics.recall_score(truth, called, zero_division=np.nan),
            "f1": metrics.f1_score(truth, called, zero_division=np.nan),
            "roc_auc": metrics.roc_auc_score(truth, prob) if len(set(truth)) == 2 else None,
            "average_precision": (
                metrics.average_precision_score(truth, prob) if len(set(truth)) == 2 else None
            ),
            "num_positive": int(truth.sum()), "num_negative": int((1 - truth).sum()),
            "num_unknown": len(targets) - len(known),
            "confusion_matrix": metrics.confusion_matrix(truth, called, labels=[0, 1]).tolist(),
        }  # fmt: skip
    known = ~np.isnan(targets)
    both = [row for row in per_class.values() if row["roc_auc"] is not None]
    return {
        "accuracy": metrics.accuracy_score(targets[known], (probs > 0.5)[known]),
        "roc_auc": np.mean([row["roc_auc"] for row in both]) if both else None,
        "average_precision": np.mean([row["average_precision"] for row in both]) if both else None,
        "f1": np.mean([row["f1"] for row in both]) if both else None,
        "loss": metrics.log_loss(targets[known], probs[known], labels=[0, 1]),
        "per_class": per_class,
    }  # fmt: skip


def assert_same_figures(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in ("accuracy", "roc_auc", "average_precision"):
        assert found[key] == pytest.approx(wanted[key], abs=1e-6)
    for name, row in wanted["per_class"].items():
        assert set(found["per_class"][name]) == set(row)
        for key, value in row.items():
            is_number = isinstance(value, float) and not np.isnan(value)
            expected = pytest.approx(value, abs=1e-6) if is_number else value
            if isinstance(value, float) and not is_number:
                expected = None
            assert found["per_class"][name][key] == expected


def known_rows(cache: Cache, split: str) -> tuple[Any, Any, list[str]]:
    part = cache.split(split)
    rows = [i for i in range(len(part)) if not np.isnan(part.targets[i]).all()]
    return part.features[rows], np.array(part.targets[rows]), [part.paths[i] for i in rows]


def call(*arguments: object) -> None:
    cli.cli.main([str(a) for a in arguments], standalone_mode=False)


SIZES = {"train": 60, "valid": 40, "test": 30}
