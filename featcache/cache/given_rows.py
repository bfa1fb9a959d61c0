"""Check what caches are made of that did not come from an extraction: names, targets, identity.

Reads and writes: nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import DataError, escaped
from featcache.formatting import join_few
from featcache.untrusted import find_fault

_MAX_NAME = 1000  # characters; python: backbones are named with options


def as_targets(targets: Any) -> npt.NDArray[Any]:
    """Return targets as an array; class names are its objects, and None where there is none."""
    array = np.asarray(targets)
    if array.ndim != 1 or array.dtype.kind not in "UO":
        return array
    if not hasattr(targets, "dtype"):  # NumPy would make names of 3 and of NaN in a list of names
        array = np.array([*targets, None], object)[:-1]
    names = np.array([None if _is_missing(value) else value for value in array.tolist()], object)
    if len(names) and all(type(value) is int for value in names):  # pandas' nullable integers
        return names.astype(np.int64)
    return names


def _is_missing(value: object) -> bool:
    """Return whether a value is None, NaN or pandas' NA."""
    is_nan = isinstance(value, float) and math.isnan(value)
    return value is None or is_nan or type(value).__name__ == "NAType"


def class_names(
    targets: Mapping[str, npt.NDArray[Any]], classes: Sequence[str] | None
) -> list[str]:
    """Return the names of the classes: those given, else those among the targets, sorted.

    Raises:
        DataError: If there are none: the targets are numbers; or a name that none can have.
    """
    if classes is None:
        if any(array.dtype.kind != "O" for array in targets.values()):
            raise DataError(
                "classes", expected="the names of the classes", found="none",
                hint="Pass classes=[...], or class names as targets",
            )  # fmt: skip
        classes = sorted(
            {v for array in targets.values() for v in array.flat if isinstance(v, str)}
        )
    names = [str(name) for name in classes]
    check_names("classes", names)
    return names


def number_targets(
    split: str, targets: npt.NDArray[Any], classes: Sequence[str]
) -> npt.NDArray[Any]:
    """Return class names as their numbers, -1 for None; other targets as they are."""
    if targets.dtype.kind != "O" or targets.ndim != 1:
        return targets
    numbers: dict[Any, int] = {name: i for i, name in enumerate(classes)} | {None: -1}
    for value in targets:
        if value is not None and not isinstance(value, str):
            found = f"{value!r:.60} among names"
        elif value not in numbers:
            found = repr(value)
        else:
            continue
        raise DataError(
            f"targets of split {split}", expected=f"names of classes: {join_few(classes)}",
            found=found,
        )  # fmt: skip
    return np.array([numbers[value] for value in targets], np.int64)


def check_names(what: str, names: Sequence[str]) -> None:
    """Refuse names that no cache can hold, and duplicates.

    Args:
        what: What they name: ``classes`` have to be UTF-8.
        names: The names.

    Raises:
        DataError: If there is such a name; see ``untrusted.find_fault``.
    """
    for name in names:
        if fault := find_fault(name, is_class=what == "classes"):
            raise DataError(what, expected="names in UTF-8, without NUL", found=fault)
    if len(set(names)) != len(names):
        raise DataError(what, expected="different names", found="a name twice")


def check_identity(
    identity: Mapping[str, Any], shape: Sequence[int], dtype: np.dtype[Any]
) -> None:  # fmt: skip
    """Refuse an identity that contradicts the features (N, D) or (N, V, D) that it is of.

    Raises:
        DataError: If so, or if its backbone has no name.
    """
    name = identity.get("backbone", "unknown")
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or name != escaped(name):
        raise DataError(
            "identity, backbone", expected=f"a name of at most {_MAX_NAME} characters",
            found=f"{name!r:.60}",
        )  # fmt: skip
    actual = {
        "num_features": shape[-1], "feature_dtype": dtype.name,
        "views": 1 if len(shape) == 2 else shape[1],
    }  # fmt: skip
    for key, value in actual.items():
        stated = identity.get(key, value)
        if type(stated) is not type(value) or stated != value:
            raise DataError(
                f"identity, {key}", expected=f"{value}, as the features have",
                found=f"{stated!r:.60}",
            )  # fmt: skip
