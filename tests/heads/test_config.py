"""Options of heads and trainings: NumPy's numbers are as good as Python's."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from featcache.errors import ConfigError
from featcache.heads.config import (
    OPTIMIZERS,
    HeadJob,
    TrainingConfig,
    check_seed,
    check_valid_fraction,
)
from featcache.heads.head import HeadConfig
from featcache.heads.optimizer import step_settings


def test_numpy_scalars_become_pythons() -> None:
    training = TrainingConfig(
        learning_rate=np.float32(0.5), weight_decay=np.float64(0), optimizer=np.str_("sgd"),
        batch_size=np.int32(8), epochs=np.int64(3), patience=np.array(2),
        label_smoothing=np.float16(0.25), warmup=np.uint8(1),
    )  # fmt: skip
    assert training == TrainingConfig(
        learning_rate=0.5, optimizer="sgd", batch_size=8, epochs=3, patience=2,
        label_smoothing=0.25, warmup=1,
    )  # fmt: skip
    head = HeadConfig(np.int64(5), np.int8(2), hidden=np.array([4, 3]), dropout=np.float32(0.5))
    assert head == HeadConfig(5, 2, hidden=(4, 3), dropout=0.5)
    job = HeadJob(head, training, np.int64(7))
    json.dumps([training.as_json(), head.as_json(), job.seed])
    assert type(check_seed("--seed", np.uint32(9))) is int
    assert type(check_valid_fraction(np.float32(0.25))) is float


@pytest.mark.parametrize("weights", [[1, 0.5], (np.float32(1), 0.5), np.array([1, 0.5], "f4")])
def test_class_weights_may_be_any_list(weights: Any) -> None:
    training = TrainingConfig(class_weights=weights)
    assert training.class_weights == (1.0, 0.5)
    assert json.loads(json.dumps(training.as_json()))["class_weights"] == [1.0, 0.5]


def test_booleans_stay_refused() -> None:
    for value in (True, np.True_):
        with pytest.raises(ConfigError, match="--seed"):
            check_seed("--seed", value)
        with pytest.raises(ConfigError, match="--valid-fraction"):
            check_valid_fraction(value)
        with pytest.raises(ConfigError, match="--hidden"):
            HeadConfig(5, 2, hidden=(value,))
        with pytest.raises(ConfigError, match="--dropout"):
            HeadConfig(5, 2, dropout=value)


def test_an_optimizer_without_a_step_is_refused_where_steps_are_made() -> None:
    """Whoever adds a name to the list of optimizers must add its step too."""
    for name in OPTIMIZERS:
        assert step_settings(name, 1, 0.1, 0.0, np.float32).shape == (8,)
    with pytest.raises(ValueError, match="rmsprop"):
        step_settings("rmsprop", 1, 0.1, 0.0, np.float32)
