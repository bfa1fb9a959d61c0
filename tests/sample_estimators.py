"""Small estimators and their rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from featcache import HeadClassifier

SMALL: dict[str, Any] = {
    "hidden_layer_sizes": (8,), "max_epochs": 4, "learning_rate": 0.02, "device": "cpu",
    "random_state": 0,
}  # fmt: skip
NAMES = np.array(["covid", "normal", "viral"])


def small(**change: Any) -> HeadClassifier:
    return HeadClassifier(**(SMALL | change))


def blobs(
    num_rows: int = 70, num_classes: int = 2, dtype: str = "f4", seed: int = 0
) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    targets = np.arange(num_rows) % num_classes
    features = rng.normal(size=(num_rows, 12)).astype(dtype)
    features[np.arange(num_rows), targets] += 3
    return features, targets


def same(one: HeadClassifier, two: HeadClassifier) -> bool:
    states = one.head_.state_dict(), two.head_.state_dict()
    assert states[0].keys() == states[1].keys()
    return all(np.array_equal(value, states[1][name]) for name, value in states[0].items())
