"""Rows of a cache as other tools keep them: one table, with featcache's own facts beside it.

All formats have the same columns. Of texts: ``path``, ``split``, ``target`` (the name of the class,
nothing where unlabelled), ``group``, ``image_sha256`` (64 hex digits). Of numbers: ``image_bytes``,
``mtime_ns``, and with several labels an image ``target_<class>`` (1, 0, NaN = unknown) in place of
``target``. Besides, ``features`` (N, D), and a JSON object ``featcache`` with the identity and what
else a cache holds.

Reads nothing. Writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import DataError
from featcache.formatting import in_bytes
from featcache.memory import available_memory

METADATA = "featcache"
"""Name of the JSON object with the identity."""

MAX_METADATA_BYTES = 1 << 26
TEXTS = ("path", "split", "target", "group", "image_sha256")
NUMBERS = ("image_bytes", "mtime_ns")
LABEL = "target_"
TEXT_BYTES = 64
"""Memory that a text takes besides its characters."""

_FEATURE = re.compile(r"f(0|[1-9][0-9]{0,6})")
_SHARE = 0.4  # of the free memory that a table may take: it stands there twice for a moment

Texts = Sequence[str | None]


@dataclass(frozen=True)
class RowTable:
    """The rows of a file.

    Attributes:
        features: (N, D) float32 or float16.
        texts: Column -> N texts, None or empty where there is none; ``path`` is always there.
        numbers: Column -> (N,) numbers.
        metadata: The JSON object ``featcache``, as text; None in files that others made.
    """

    features: npt.NDArray[Any]
    texts: Mapping[str, Texts]
    numbers: Mapping[str, npt.NDArray[Any]]
    metadata: str | None


def is_column(name: str) -> bool:
    """Whether a column of this name is read."""
    return name in TEXTS or name in NUMBERS or name.startswith(LABEL)


def list_feature_columns(names: Iterable[str], path: Path) -> list[str]:
    """Return those of the names that are ``f0`` to ``f<D-1>``, in this order.

    Raises:
        DataError: If one is missing.
    """
    found = sorted((name for name in names if _FEATURE.fullmatch(name)), key=lambda n: int(n[1:]))
    wanted = [f"f{i}" for i in range(len(found))]
    if found != wanted:
        missing = next(w for w, f in zip(wanted, found, strict=True) if w != f)
        raise wrong("columns", path, "f0, f1, f2 and so on", f"no {missing}")
    return found


def wrong(what: str, path: Path, expected: object, found: object, hint: str = "") -> DataError:
    """Return the error for a part of a file that is not what it should be."""
    return DataError(what, expected=expected, found=found, where=path, hint=hint)


def room() -> float:
    """Return how many bytes the table of a file may take."""
    return available_memory() * _SHARE


def require_room(what: str, num_bytes: int, most: float, path: Path) -> None:
    """Refuse what would not fit into memory, before it is read.

    Raises:
        DataError: If so.
    """
    if num_bytes > most:
        raise wrong(
            what, path, f"at most {in_bytes(most)}, as memory is", in_bytes(num_bytes),
            "Convert a part of it, or use a machine with more memory",
        )  # fmt: skip


def check_features(dtype: np.dtype[Any], shape: Sequence[int], path: Path) -> None:
    """Refuse features that no cache can hold as they are.

    Raises:
        DataError: If they are not (N, D) float32 or float16.
    """
    if len(shape) != 2 or shape[1] == 0 or dtype.newbyteorder("=") not in (np.float32, np.float16):
        raise wrong(
            "features", path, "(N, D) float32 or float16", f"{dtype.name} {tuple(shape)}",
            "Save them as float32 yourself: that may round",
        )  # fmt: skip
