"""The search space of a sweep: which options of ``train`` vary, and between what.

A TOML file has a line per option, named as in ``featcache train`` with ``_`` for ``-``::

    hidden = [[512, 128], [256], []]                        # a list: one of these
    learning_rate = { low = 1e-5, high = 1e-2, log = true } # a range; log: evenly by its logarithm
    dropout = { low = 0.0, high = 0.6, num = 4 }            # num: values of a range in a grid (3)
    epochs = 20                                             # one value: the same in every trial

What the file does not name stays as it is in ``train``.

Reads: a TOML file. Writes: nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.errors import ConfigError
from featcache.files import read_regular
from featcache.heads.config import LBFGS, USED_BY_LBFGS, TrainingConfig, auto_batch_size
from featcache.heads.head import HeadConfig

Params = dict[str, Any]
"""Options of ``train`` by name; what is missing has its default."""

_HEAD = ("hidden", "dropout")
_WHOLE = ("batch_size", "epochs", "patience", "warmup")
_RANGED = ("dropout", "learning_rate", "weight_decay", "label_smoothing", *_WHOLE)
_RANGE_KEYS = {"low", "high", "log", "num"}
_MAX_BYTES = 1 << 20
_MAX_POINTS = 1 << 20

DEFAULTS: Params = {
    **{f.name: f.default for f in dataclasses.fields(HeadConfig) if f.name in _HEAD},
    **{f.name: f.default for f in dataclasses.fields(TrainingConfig)},
}
"""Every option that can be searched, with the default of ``train``."""


@dataclass(frozen=True)
class Dimension:
    """An option that varies.

    Attributes:
        name: The option.
        choices: Its values, or empty for a range.
        low: The least value of a range.
        high: The greatest.
        log: Whether the range is even by its logarithm.
        num: Values of the range in a grid.
    """

    name: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    num: int = 3

    @property
    def is_whole(self) -> bool:
        """Whether the values of a range are whole numbers."""
        return self.name in _WHOLE

    def at(self, share: float) -> Any:
        """Return the value at ``share`` of the way, from 0 to 1."""
        if self.choices:
            return self.choices[min(int(share * len(self.choices)), len(self.choices) - 1)]
        value = min(max(self._interpolate(self.high, share), self.low), self.high)
        return round(value) if self.is_whole else value

    def draw(self, share: float) -> Any:
        """Return a random value, given ``share``, drawn evenly from [0, 1)."""
        if self.choices or not self.is_whole:
            return self.at(share)
        # Rounding would give the two ends half the chance of the numbers between them.
        value = math.floor(self._interpolate(self.high + 1, share))
        return int(min(max(value, self.low), self.high))

    def _interpolate(self, high: float, share: float) -> float:
        if self.log:
            low = math.log(self.low)
            return math.exp(low + share * (math.log(high) - low))
        return self.low + share * (high - self.low)

    def grid(self) -> list[Any]:
        """Return the values of a grid, each once."""
        if self.choices:
            return list(self.choices)
        shares = [i / (self.num - 1) for i in range(self.num)]
        return list(dict.fromkeys(self.at(share) for share in shares))

    def as_json(self) -> Any:
        """Return it as a space file would have it."""
        if self.choices:
            return [list(c) if isinstance(c, tuple) else c for c in self.choices]
        return {"low": self.low, "high": self.high, "log": self.log, "num": self.num}


@dataclass(frozen=True)
class Space:
    """What a sweep searches.

    Attributes:
        dimensions: The options that vary.
        fixed: Options that have one value in every trial but the default's.
    """

    dimensions: tuple[Dimension, ...]
    fixed: Params = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return it as a space file would have it."""
        fixed = {k: [list(v)] if isinstance(v, tuple) else v for k, v in self.fixed.items()}
        return fixed | {d.name: d.as_json() for d in self.dimensions}

    def draw(self, seed: int, number: int) -> Params:
        """Return the options of trial ``number``, drawn at random."""
        shares = np.random.default_rng([seed, number]).random(len(self.dimensions))
        values = zip(self.dimensions, shares.tolist(), strict=True)
        return self.fixed | {dimension.name: dimension.draw(share) for dimension, share in values}

    def num_points(self) -> int:
        """Return how many points its grid has."""
        return math.prod(len(dimension.grid()) for dimension in self.dimensions)

    def grid(self) -> list[Params]:
        """Return every point of its grid, the last dimension varying fastest."""
        names = [dimension.name for dimension in self.dimensions]
        points = itertools.product(*(dimension.grid() for dimension in self.dimensions))
        return [self.fixed | dict(zip(names, point, strict=True)) for point in points]


def default_space(num_rows: int) -> Space:
    """Return the space that is searched unless told otherwise.

    Args:
        num_rows: Training rows: batch sizes go from half of ``auto`` to four times as many.
    """
    batch_size = auto_batch_size(num_rows)
    return Space(
        (
            Dimension("hidden", ((512, 128), (512,), (256, 64), (128,), ())),
            Dimension("dropout", low=0.0, high=0.7),
            Dimension("learning_rate", low=5e-5, high=1e-2, log=True),
            Dimension("weight_decay", low=1e-6, high=1e-1, log=True),
            Dimension("optimizer", ("adam", "adamw")),
            Dimension("schedule", ("constant", "cosine")),
            Dimension("batch_size", tuple(batch_size * k // 2 for k in (1, 2, 4, 8))),
            Dimension("class_weights", ("none", "balanced")),
            Dimension("label_smoothing", (0.0, 0.05, 0.1)),
        )
    )


def read_space(file: Path) -> Space:
    """Read a space from a TOML file.

    Raises:
        ConfigError: If it cannot be read, names an option that there is not, gives one a value
            that it cannot have, or leaves nothing to search.
    """
    try:
        found = tomllib.loads(read_regular(file, max_bytes=_MAX_BYTES).decode())
    except OSError as error:
        raise ConfigError(
            "--space", expected="a TOML file", found=error.strerror or error, where=file
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError("--space", expected="TOML", found=error, where=file) from error
    dimensions, fixed = [], {}
    for name, value in found.items():
        if name not in DEFAULTS:
            known = ", ".join(DEFAULTS)
            raise ConfigError("space", expected=f"options out of {known}", found=name, where=file)
        dimension = _read_dimension(name, value, file)
        if len(dimension.grid()) == 1:
            fixed[name] = dimension.grid()[0]
        else:
            dimensions.append(dimension)
    if not dimensions:
        found_text = "one value each" if fixed else "an empty file"
        raise ConfigError(
            "space", expected="an option of several values", found=found_text, where=file
        )
    _check_together(dimensions, fixed, file)
    dimensions.sort(key=lambda dimension: list(DEFAULTS).index(dimension.name))
    return Space(tuple(dimensions), fixed)


def build_configs(
    params: Mapping[str, Any], num_features: int, num_classes: int
) -> tuple[HeadConfig, TrainingConfig]:
    """Return the head and the training that options come to.

    Raises:
        ConfigError: If a value has no meaning.
    """
    head = {name: value for name, value in params.items() if name in _HEAD}
    training = {name: value for name, value in params.items() if name not in _HEAD}
    return HeadConfig(num_features, num_classes, **head), TrainingConfig(**training)


def params_from_json(params: Mapping[str, Any]) -> Params:
    """Return options that went through JSON, which has no tuples and may lose the order."""
    known = {name: params[name] for name in DEFAULTS if name in params}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}


def _check_together(dimensions: Sequence[Dimension], fixed: Params, file: Path) -> None:
    """Refuse options of which some trial could not have both."""
    of = {dimension.name: dimension for dimension in dimensions}

    def ends(name: str) -> list[Any]:
        return of[name].grid() if name in of else [fixed.get(name, DEFAULTS[name])]

    if LBFGS in ends("optimizer"):
        if ends("hidden") != [()]:
            wanted, found = "[[]] with optimizer lbfgs", ends("hidden")
            raise ConfigError("hidden in the space", expected=wanted, found=found, where=file)
        unused = [n for n in (*of, *fixed) if n not in {"hidden", *USED_BY_LBFGS}]
        if unused:
            wanted = "no option that lbfgs, one of the optimizers, has no use for"
            raise ConfigError("space", expected=wanted, found=", ".join(unused), where=file)
    most, epochs = max(ends("warmup")), min(ends("epochs"))
    if most >= epochs:
        wanted = f"fewer than the {epochs} epochs of some trial"
        raise ConfigError("warmup in the space", expected=wanted, found=most, where=file)


def _read_dimension(name: str, value: Any, file: Path) -> Dimension:
    if isinstance(value, dict):
        return _read_range(name, value, file)
    choices = value if isinstance(value, list) else [value]
    if name == "hidden":
        if not isinstance(value, list) or not all(isinstance(c, list) for c in value):
            wanted = "a list of lists, such as [[512, 128], [256], []]"
            raise ConfigError("hidden in the space", expected=wanted, found=value, where=file)
        choices = [tuple(choice) for choice in value]
    for choice in choices:
        _check_value(name, choice, file)
    unique = tuple(dict.fromkeys(choices))
    if not unique or len(unique) < len(choices):
        wanted = "values, each once"
        raise ConfigError(f"{name} in the space", expected=wanted, found=value, where=file)
    return Dimension(name, unique)


def _read_range(name: str, value: dict[str, Any], file: Path) -> Dimension:
    what = f"{name} in the space"
    if name not in _RANGED:
        raise ConfigError(what, expected="a list of its values", found="a range", where=file)
    low, high, log, num = (value.get(key) for key in ("low", "high", "log", "num"))
    log, num = False if log is None else log, 3 if num is None else num
    numbers = (int,) if name in _WHOLE else (int, float)
    if not set(value) <= _RANGE_KEYS or any(type(x) not in numbers for x in (low, high)):
        kind = "whole numbers" if name in _WHOLE else "numbers"
        wanted = f"low and high, {kind}, and if need be log and num"
        raise ConfigError(what, expected=wanted, found=value, where=file)
    if type(log) is not bool or type(num) is not int or not 2 <= num <= _MAX_POINTS:
        wanted = "log = true or false, num a whole number from 2"
        raise ConfigError(what, expected=wanted, found=value, where=file)
    for end in (low, high):
        _check_value(name, end, file)
    assert isinstance(low, int | float)
    assert isinstance(high, int | float)
    if not low < high or (log and low <= 0):
        wanted = "low below high" + (", both above 0 for log" if log else "")
        raise ConfigError(what, expected=wanted, found=value, where=file)
    return Dimension(name, low=low, high=high, log=log, num=num)


def _check_value(name: str, value: Any, file: Path) -> None:
    """Refuse what ``train`` would refuse, by its name in the file."""
    try:
        hash(value)
        build_configs({name: value}, 1, 2)
    except ConfigError as error:
        raise ConfigError(
            f"{name} in the space", expected=error.expected, found=error.found, where=file
        ) from error
    except TypeError as error:  # a list or a table where a value should be
        raise ConfigError(
            f"{name} in the space", expected="single values", found=value, where=file
        ) from error
