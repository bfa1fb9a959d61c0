"""The cache that a table of rows makes: what it states is kept, all of it is checked.

Reads nothing. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.contents import TASKS
from featcache.cache.converting.rows import LABEL, METADATA, NUMBERS, RowTable, wrong
from featcache.cache.given_rows import check_identity, check_names
from featcache.cache.reading import Failure
from featcache.cache.writing import SplitRows, check_new_rows, os_bytes
from featcache.data.folders import SPLITS
from featcache.errors import ConfigError, DataError
from featcache.formatting import join_few
from featcache.untrusted import parse_json_object

FORMAT_VERSION = 1
_HEX_DIGITS = 64


@dataclass(frozen=True)
class NewCache:
    """What is to be written: see ``writing.write_rows``."""

    splits: dict[str, SplitRows]
    identity: dict[str, Any]
    provenance: dict[str, Any]
    classes: list[str]
    task: str
    failures: list[Failure]
    content_sha256: str | None


def cache_of(table: RowTable, path: Path, backbone_name: str | None) -> NewCache:
    """Return the cache that a table makes; all of it is checked.

    Raises:
        DataError: If it makes none, or is not what its identity says.
        ConfigError: If nobody names the backbone, or two name different ones.
    """
    facts = _Facts.of(table.metadata, path)
    identity, provenance = facts.identity, facts.provenance
    if backbone_name is not None and identity.get("backbone", backbone_name) != backbone_name:
        raise ConfigError(
            "--backbone-name", expected=f"{identity['backbone']}, which the file states",
            found=backbone_name, where=path, hint="Leave it out",
        )  # fmt: skip
    if "backbone" not in identity and not backbone_name:
        raise ConfigError(
            "--backbone-name", expected="the network that made the features", where=path,
            found="none, and the file does not name it",
        )  # fmt: skip
    num_features = table.features.shape[1]
    features = _as_dtype(table.features, facts.feature_dtype, path)
    identity = {
        "backbone": backbone_name, "num_features": num_features,
        "feature_dtype": features.dtype.name,
    } | identity  # fmt: skip
    check_identity(identity, features.shape, features.dtype)
    texts = {
        name: [facts.names.get(text or "", text or "") for text in column]
        for name, column in table.texts.items()
        if name in {"path", "group"}
    }
    if "" in texts["path"]:
        raise wrong("column path", path, "a name in each row", "none")
    splits = _split_of_rows(table, path)
    classes, targets = _targets(table, facts, path)
    names = [s for s in SPLITS if s in set(splits) or facts.num_rows.get(s) == 0]
    rows: dict[str, SplitRows] = {}
    for name in names:
        chosen = [i for i, split in enumerate(splits) if split == name]
        chosen.sort(key=lambda i: os_bytes(texts["path"][i]))
        groups = [texts["group"][i] for i in chosen] if "group" in texts else None
        if groups is None or not (any(groups) or facts.has_groups.get(name)):
            groups = [] if facts.has_groups.get(name) and not chosen else None
        new = check_new_rows(
            name, _take(features, chosen), targets[chosen], [texts["path"][i] for i in chosen],
            groups=groups, num_classes=len(classes),
        )  # fmt: skip
        rows[name] = replace(new, **_image_columns(table, chosen, path))
    return NewCache(
        rows, identity, provenance, classes, "multilabel" if targets.ndim == 2 else "multiclass",
        facts.failures(classes, path), facts.content_sha256,
    )  # fmt: skip


def _take(features: npt.NDArray[Any], rows: Sequence[int]) -> npt.NDArray[Any]:
    """Return rows (n, D): a view where they follow each other, as in files that convert wrote."""
    first = rows[0] if rows else 0
    is_run = list(rows) == [*range(first, first + len(rows))]
    return features[first : first + len(rows)] if is_run else features[list(rows)]


def _as_dtype(features: npt.NDArray[Any], wanted: str | None, path: Path) -> npt.NDArray[Any]:
    """Return features as they were before a format without float16 took them."""
    native = features.astype(features.dtype.newbyteorder("="), copy=False)
    if wanted is None or native.dtype.name == wanted:
        return native
    with np.errstate(over="ignore"):
        narrow = native.astype(wanted)
    if not np.array_equal(narrow.astype(native.dtype), native):
        raise wrong("features", path, f"{wanted}, as its identity says", "numbers between those")
    return narrow


def _split_of_rows(table: RowTable, path: Path) -> list[str]:
    splits = [text or "all" for text in table.texts.get("split", [None] * len(table.features))]
    if odd := set(splits) - set(SPLITS):
        raise wrong("column split", path, " or ".join(SPLITS), join_few(sorted(odd)))
    return splits


def _targets(table: RowTable, facts: _Facts, path: Path) -> tuple[list[str], npt.NDArray[Any]]:
    """Return the names of the classes and the targets (N,), or (N, C) of several labels."""
    labels = [name.removeprefix(LABEL) for name in table.numbers if name.startswith(LABEL)]
    names = [name for name in table.texts.get("target", []) if name]
    if labels and names:
        raise wrong("columns", path, "target, or target_CLASS for each class", "both")
    classes = (labels or sorted(set(names))) if facts.classes is None else facts.classes
    is_multilabel = bool(labels) or facts.task == "multilabel"
    odd = (set(labels) ^ set(classes)) if is_multilabel else (set(names) - set(classes))
    if odd:
        raise wrong("classes", path, join_few(classes) or "none", join_few(sorted(odd)))
    check_names("classes", classes)
    if "" in classes:
        raise wrong("classes", path, "names", "an empty one")
    num_rows = len(table.features)
    if is_multilabel:
        targets = np.empty((num_rows, len(classes)), "<f4")
        for i, name in enumerate(classes):
            known = table.numbers[LABEL + name].astype("<f4")
            targets[:, i] = np.where(np.isnan(known), np.float32(np.nan), known)
        return classes, targets
    numbers: dict[str | None, int] = {name: i for i, name in enumerate(classes)}
    column = table.texts.get("target", [None] * num_rows)
    return classes, np.array([numbers[name] if name else -1 for name in column], np.int64)


def _image_columns(table: RowTable, chosen: Sequence[int], path: Path) -> dict[str, Any]:
    hashes = np.zeros((len(chosen), 32), np.uint8)
    if "image_sha256" in table.texts:
        column = table.texts["image_sha256"]
        for row, i in enumerate(chosen):
            text = column[i] or "0" * _HEX_DIGITS
            try:
                if len(text) != _HEX_DIGITS:
                    raise ValueError("another length")
                hashes[row] = np.frombuffer(bytes.fromhex(text), np.uint8)
            except ValueError as error:
                raise wrong("column image_sha256", path, "64 hex digits", text[:80]) from error
    columns: dict[str, Any] = {"image_sha256": hashes}
    for name in NUMBERS:
        numbers = table.numbers.get(name, np.zeros(len(table.features), np.int64))
        if numbers.dtype.kind not in "iu" or (len(numbers) and int(numbers.max()) >= 1 << 63):
            raise wrong(f"column {name}", path, "whole numbers of 64 bits", numbers.dtype.name)
        if name == "image_bytes" and len(numbers) and numbers.min() < 0:
            raise wrong(f"column {name}", path, "sizes of files", int(numbers.min()))
        columns[name] = numbers[chosen].astype(np.int64)
    return columns


_KINDS = {
    "classes": list, "task": str, "identity": dict, "provenance": dict, "feature_dtype": str,
    "splits": dict, "names": dict, "failures": list, "content_sha256": str,
}  # fmt: skip


def _is_split(told: Any) -> bool:
    return (
        isinstance(told, dict) and type(told.get("num_rows")) is int
        and type(told.get("has_groups")) is bool
    )  # fmt: skip


@dataclass(frozen=True)
class _Facts:
    """What the JSON object of a file says; nothing in a file that others made."""

    classes: list[str] | None
    task: str | None
    identity: dict[str, Any]
    provenance: dict[str, Any]
    feature_dtype: str | None
    num_rows: dict[str, int]
    has_groups: dict[str, bool]
    names: dict[str, str]
    failed: list[dict[str, Any]]
    content_sha256: str | None

    @classmethod
    def of(cls, text: str | None, path: Path) -> _Facts:
        """Return what the JSON object says.

        Raises:
            DataError: If it is none, or of a newer version.
        """
        if text is None:
            return cls(None, None, {}, {}, None, {}, {}, {}, [], None)

        def odd(found: object) -> DataError:
            return wrong(f"JSON object {METADATA}", path, "what featcache convert writes", found)

        try:
            told = parse_json_object(text)
        except ValueError as error:
            raise odd(error) from error
        if told.get("format_version") != FORMAT_VERSION:
            raise odd(f"format_version {told.get('format_version')!r:.20}")
        for key, kind in _KINDS.items():
            if not isinstance(told.get(key), kind):
                raise odd(f"{key} that is no {kind.__name__}")
        classes, splits, names = told["classes"], told["splits"], told["names"]
        if not all(isinstance(text, str) for text in (*classes, *names.values())):
            raise odd("classes or names that are no texts")
        if set(splits) - set(SPLITS) or not all(map(_is_split, splits.values())):
            raise odd("splits that no cache has")
        if told["task"] not in TASKS:
            raise odd(f"the task {told['task']!r:.20}")
        if told["feature_dtype"] not in {"float32", "float16"}:
            raise odd(f"feature_dtype {told['feature_dtype']!r:.20}")
        return cls(
            classes, told["task"], told["identity"], told["provenance"], told["feature_dtype"],
            {name: split["num_rows"] for name, split in splits.items()},
            {name: split["has_groups"] for name, split in splits.items()},
            names, told["failures"], told["content_sha256"],
        )  # fmt: skip

    def failures(self, classes: Sequence[str], path: Path) -> list[Failure]:
        """Return the failed images.

        Raises:
            DataError: If one is not what a cache can hold.
        """
        numbers: dict[Any, int] = {name: i for i, name in enumerate(classes)} | {None: -1}
        found: list[Failure] = []
        for told in self.failed:
            try:
                failure = Failure(
                    told["path"], told["split"], numbers[told["target"]], told["reason"],
                    told["image_bytes"], told["mtime_ns"],
                )  # fmt: skip
            except (KeyError, TypeError) as error:
                raise wrong("failures", path, "those of a cache", f"none of {error}") from error
            integers = (failure.image_bytes, failure.mtime_ns)
            texts = (failure.path, failure.reason)
            if (
                failure.split not in SPLITS or not all(isinstance(t, str) for t in texts)
                or not all(type(n) is int and abs(n) < 1 << 63 for n in integers)
            ):  # fmt: skip
                raise wrong("failures", path, "those of a cache", f"{told!r:.80}")
            found.append(failure)
        return found
