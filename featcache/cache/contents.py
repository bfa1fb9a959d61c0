"""Check that a container holds a cache: its small data sets, and how its arrays fit each other.

Reads: open containers, which anybody may have made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.container import Container
from featcache.data.folders import SPLITS
from featcache.errors import CacheError
from featcache.untrusted import find_fault, parse_json_object

TASKS = ("multiclass", "multilabel")


def damaged(container: Container, what: str, expected: object, found: object) -> CacheError:
    """Return the error for a part of a cache that is not what it should be."""
    return CacheError(
        f"cache, {what}", expected=expected, found=found, where=container.path,
        hint="The file is damaged or was not made by featcache: extract it again",
    )  # fmt: skip


def check_kinds(container: Container) -> None:
    """Refuse a file whose small data sets are not bytes or whole numbers of the right rank.

    Raises:
        CacheError: If so.
    """
    kinds = {"identity": ("S", 0), "provenance": ("S", 0), "task": ("S", 0), "classes": ("S", 1)}
    kinds |= {f"failures/{key}": ("S", 1) for key in ("paths", "splits", "reasons")}
    kinds |= {f"failures/{key}": ("i", 1) for key in ("targets", "image_bytes", "mtime_ns")}
    for name, (kind, rank) in kinds.items():
        entry = container.entry(name)
        if (entry.dtype.kind, len(entry.shape)) != (kind, rank):
            wanted = f"{'bytes' if kind == 'S' else 'whole numbers'} of rank {rank}"
            raise damaged(container, name, wanted, f"{entry.dtype.str} {entry.shape}")


def check_table(container: Container, task: str) -> None:
    """Refuse a file whose arrays, by the table alone, do not fit each other.

    Raises:
        CacheError: If so, or if there is no such task.
    """
    if task not in TASKS:
        raise damaged(container, "task", " or ".join(TASKS), task)
    num_classes = container.entry("classes").shape[0]
    splits = [s for s in SPLITS if f"splits/{s}/features" in container.arrays]
    if not splits:
        raise damaged(container, "splits", "at least one", "none")
    widths = set()
    for name in splits:
        prefix = f"splits/{name}/"
        features = container.arrays[prefix + "features"]
        if (
            features.dtype.kind != "f"
            or len(features.shape) not in {2, 3}
            or 0 in features.shape[1:]
        ):
            wanted_shape = "(N, D) or (N, V, D) floats"
            raise damaged(container, prefix + "features", wanted_shape, features.shape)
        widths.add(features.shape[-1])
        _check_columns(container, prefix, task, num_classes)
    if len(widths) > 1:
        raise damaged(container, "splits", "features of one width", sorted(widths))


def _check_columns(container: Container, prefix: str, task: str, num_classes: int) -> None:
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        "targets": ("<f4", (num_classes,)) if task == "multilabel" else ("<i8", ()),
        "image_sha256": ("|u1", (32,)), "image_bytes": ("<i8", ()), "mtime_ns": ("<i8", ()),
        "paths": ("S", ()),
    }  # fmt: skip
    if prefix + "groups" in container.arrays:
        wanted["groups"] = ("S", ())
    if prefix + "row_crc32" in container.arrays:
        wanted["row_crc32"] = ("<i8", ())
    num_rows = container.arrays[prefix + "features"].shape[0]
    for key, (dtype, tail) in wanted.items():
        entry = container.arrays.get(prefix + key)
        if (
            entry is None
            or entry.shape != (num_rows, *tail)
            or (entry.dtype.kind if dtype == "S" else entry.dtype.str) != dtype
        ):
            found = "none" if entry is None else f"{entry.dtype.str} {entry.shape}"
            wanted_shape = f"{dtype} {(num_rows, *tail)}"
            raise damaged(container, prefix + key, wanted_shape, found)


def check_classes(container: Container, classes: Sequence[str]) -> None:
    """Refuse classes that are not different names in UTF-8.

    Raises:
        CacheError: If so.
    """
    if len(set(classes)) != len(classes):
        raise damaged(container, "classes", "different names", "a name twice")
    for name in classes:
        if fault := find_fault(name, is_class=True):
            raise damaged(container, "classes", "names in UTF-8, without NUL", fault)


def check_targets(
    container: Container, split: str, targets: npt.NDArray[Any], num_classes: int
) -> None:
    """Refuse targets of a split that are no classes; (N, C) ones that are not 0, 1 or NaN.

    Raises:
        CacheError: If so.
    """
    wanted = found = ""
    if targets.ndim == 2:
        odd = targets[~((targets == 0) | (targets == 1) | np.isnan(targets))]
        wanted, found = "targets of 0, 1 and NaN", ", ".join(map(str, odd[:1].tolist()))
    elif len(targets) and (targets.min() < -1 or targets.max() >= num_classes):
        wanted = f"targets from -1 to {num_classes - 1}"
        found = f"{targets.min()} to {targets.max()}"
    if found:
        raise damaged(container, f"splits/{split}/targets", wanted, found)


def read_json(container: Container, name: str) -> dict[str, Any]:
    """Return the JSON object in a scalar data set.

    Raises:
        CacheError: If it is none, or holds what no JSON of a cache holds: see ``untrusted``.
    """
    try:
        return parse_json_object(bytes(container.read(name).item()))
    except (TypeError, ValueError) as error:  # TypeError: numbers
        raise damaged(container, name, "a JSON object", error) from error


def read_texts(container: Container, name: str) -> list[str]:
    """Return names or reasons; bytes that are not UTF-8 are surrogate-escaped.

    Raises:
        CacheError: If there is a NUL in one, which no file system, CSV or terminal can take.
    """
    texts = decode_texts(container.read(name).tolist())
    if any("\0" in text for text in texts):
        raise damaged(container, name, "texts without NUL", "one with")
    return texts


def decode_texts(values: Iterable[bytes]) -> list[str]:
    """Return bytes as strings; what is not UTF-8 is surrogate-escaped."""
    return [value.decode("utf-8", "surrogateescape") for value in values]
