"""Write caches: prepared rows of an extraction, or features made elsewhere.

Writes: caches (see FORMAT.md), whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from featcache.cache.container import is_container
from featcache.cache.given_rows import (
    as_targets,
    check_identity,
    check_names,
    class_names,
    number_targets,
)
from featcache.cache.hdf5 import ArraySource, write_container
from featcache.cache.integrity import array_crc32, meaning_crc32, rows_crc32
from featcache.cache.reading import Cache, Failure, is_content, open_cache
from featcache.data.folders import SPLITS
from featcache.errors import CacheError, DataError
from featcache.files import Publish, canonical_json, make_folder, read_regular
from featcache.heartbeat import refuse_alive, signs_in
from featcache.locking import folder_lock, remove_lock
from featcache.outputs import Kind, Output
from featcache.renames import beside, is_temporary, remove_temporaries
from featcache.runtime import Say, log_line
from featcache.untrusted import parse_json

_BLOCK_ROWS = 1 << 14  # of columns that are made while they are written
CACHE = Kind("cache", "a new file", CacheError, is_container, switch="--rebuild")


class Column(Protocol):
    """An array, or what makes one of some rows when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all rows."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the array."""

    def __getitem__(self, rows: slice, /) -> npt.NDArray[Any]:
        """Return some rows."""


@dataclass(frozen=True)
class SplitRows:
    """The rows of one split to write, sorted by the bytes of their path.

    ``feature_blocks`` returns (n, D) or (n, V, D) arrays that together have ``shape``, so that a
    cache larger than memory can be written. Paths may be a column of bytes.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    feature_blocks: Callable[[], Iterable[npt.NDArray[Any]]]
    targets: npt.NDArray[Any]
    paths: Sequence[str] | Column
    groups: Sequence[str] | None
    image_sha256: Column
    image_bytes: Column
    mtime_ns: Column


def write_rows(
    path: Path, splits: Mapping[str, SplitRows], *, identity: Mapping[str, Any],
    provenance: Mapping[str, Any], classes: Sequence[str], task: str,
    failures: Sequence[Failure] = (), publish: Publish | None = None,
) -> Cache:  # fmt: skip
    """Write a cache from prepared rows, whole or not at all, and return it opened.

    ``publish`` gives the finished file its name: see ``files.atomic_writer``.

    Raises:
        CacheError: If the disk is full or the folder cannot be written.
    """
    identity_text = canonical_json(identity).encode()
    arrays = {
        "identity": np.array(identity_text),
        "provenance": np.array(canonical_json(provenance).encode()),
        "classes": _encode(classes),
        "task": np.array(task.encode()),
    }
    sources = [_checked(name, array) for name, array in arrays.items()]
    start = meaning_crc32(arrays["identity"], arrays["classes"], arrays["task"])
    for name in (s for s in SPLITS if s in splits):
        rows, prefix = splits[name], f"splits/{name}/"
        columns: dict[str, Column] = {
            "targets": rows.targets,
            "paths": _Texts(rows.paths) if isinstance(rows.paths, Sequence) else rows.paths,
            "image_sha256": rows.image_sha256,
            "image_bytes": rows.image_bytes,
            "mtime_ns": rows.mtime_ns,
        }
        if rows.groups is not None:
            columns["groups"] = _Texts(rows.groups)
        checksums = np.zeros(
            rows.shape[0], "<i8"
        )  # filled while features are written, before it is
        blocks = partial(_check_rows, rows.feature_blocks, columns, start, checksums)
        sources.append(ArraySource(prefix + "features", rows.shape, rows.dtype, blocks))
        columns = columns | {"row_crc32": checksums}
        sources += [_source(prefix + key, column) for key, column in columns.items()]
    failed = sorted(failures, key=lambda f: (SPLITS.index(f.split), os_bytes(f.path)))
    texts = {"paths": "path", "splits": "split", "reasons": "reason"}
    numbers = {"targets": "target", "image_bytes": "image_bytes", "mtime_ns": "mtime_ns"}
    for key, attribute in texts.items():
        values = _encode([getattr(f, attribute) for f in failed])
        sources.append(_checked(f"failures/{key}", values))
    for key, attribute in numbers.items():
        integers = np.array([getattr(f, attribute) for f in failed], dtype=np.int64)
        sources.append(_checked(f"failures/{key}", integers))
    content = [source.name for source in sources if is_content(source.name)]
    write_container(path, sources, hashlib.sha256(identity_text).hexdigest(), content, publish)
    return open_cache(path, verify=False)


def _checked(name: str, array: npt.NDArray[Any]) -> ArraySource:
    return ArraySource.of(name, array, array_crc32(array))


def _check_rows(
    feature_blocks: Callable[[], Iterable[npt.NDArray[Any]]],
    columns: Mapping[str, Column], start: int, checksums: npt.NDArray[np.int64],
) -> Iterator[npt.NDArray[Any]]:  # fmt: skip
    """Yield the blocks of features, and store the checksums of their rows."""
    position = 0
    for block in feature_blocks():
        rows = slice(position, position + len(block))
        checksums[rows] = rows_crc32(start, block, {k: v[rows] for k, v in columns.items()})
        position += len(block)
        yield block


def os_bytes(path: str) -> bytes:
    """Return the bytes of a path, by which rows are sorted."""
    return path.encode("utf-8", "surrogateescape")


def write_cache(
    path: str | Path, features: Any, targets: Any, paths: Any, *,
    classes: Sequence[str] | None = None, groups: Any = None,
    identity: Mapping[str, Any] | None = None, provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Cache:  # fmt: skip
    """Write features made elsewhere into a cache, whole or not at all.

    Args:
        path: The file to write.
        features: (N, D) or (N, V, D) float32 or float16, or a dict of such arrays by split
            (``train``, ``valid``, ``test``, ``all``). One array alone becomes the split ``all``.
            The first of V views is the plain image, which evaluation uses.
        targets: (N,) class names, None = unlabelled; or (N,) integers in [0, C), -1 = unlabelled;
            or (N, C) floats of 0, 1 and NaN = unknown for several labels a row; or a dict by split.
        paths: N different strings naming the rows, or a dict by split. Rows are sorted by them.
        classes: C class names. Without them, those that ``targets`` has, sorted.
        groups: N strings, say patients, or a dict by split; optional.
        identity: What decides the features' values. Runs refuse caches of another identity, so
            say which backbone, weights and preprocessing made them.
        provenance: How they were made; any facts that JSON can hold.
        overwrite: Replace a cache that is there. Other files are never replaced.

    Returns:
        The cache, opened.

    Raises:
        DataError: If arrays do not fit together, contain NaN or infinities, or are not what
            ``identity`` says.
        CacheError: If ``path`` is there and ``overwrite`` is not set or it is no cache, if another
            process is writing it, if the disk is full or the folder cannot be written.
    """
    kind = replace(CACHE, switch="overwrite=True", needs_folder=True)
    output = Output(path, "write_cache", kind, replace=overwrite)
    by_split = features if isinstance(features, Mapping) else {"all": features}

    def select_split(value: Any, split: str) -> Any:
        return value.get(split) if isinstance(value, Mapping) else value

    unknown = set(by_split) - set(SPLITS)
    if unknown or not by_split:
        raise DataError("splits", expected=" or ".join(SPLITS), found=sorted(unknown), where=path)
    for what, value in (("targets", targets), ("paths", paths), ("groups", groups)):
        if isinstance(value, Mapping) and set(value) - set(by_split):
            found = ", ".join(sorted(map(str, set(value) - set(by_split))))
            raise DataError(f"splits of {what}", expected=sorted(by_split), found=found)
        if isinstance(value, Mapping) and set(by_split) - set(value) and what == "targets":
            missing = ", ".join(sorted(set(by_split) - set(value)))
            raise DataError(f"{what} of split {missing}", expected="one per row", found="none")
    given = {split: as_targets(select_split(targets, split)) for split in by_split}
    names = class_names(given, classes)
    rows = {
        split: check_new_rows(
            split, np.asarray(array), number_targets(split, given[split], names),
            select_split(paths, split), groups=select_split(groups, split), num_classes=len(names),
        )
        for split, array in by_split.items()
    }  # fmt: skip
    kinds = {(r.shape[-1], r.dtype.name, r.targets.ndim) for r in rows.values()}
    if len(kinds) > 1:
        expected = "one D and dtype, and targets of one rank, in all splits"
        raise DataError("features", expected=expected, found=sorted(kinds))
    first = next(iter(rows.values()))
    facts: dict[str, Any] = dict(identity) if identity is not None else {"backbone": "unknown"}
    for what, value in (("identity", facts), ("provenance", provenance or {})):
        try:
            parse_json(canonical_json(value))  # as every reader will
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(what, expected="what JSON can hold", found=error) from error
    facts.setdefault("num_features", first.shape[-1])
    facts.setdefault("feature_dtype", first.dtype.name)
    check_identity(facts, first.shape, first.dtype)
    task = "multilabel" if first.targets.ndim == 2 else "multiclass"
    with writing_alone(output, may_discard=overwrite):
        return write_rows(
            output.target, rows, identity=facts, provenance=provenance or {}, classes=names,
            task=task, publish=output.publish,
        )  # fmt: skip


def check_new_rows(
    split: str, features: npt.NDArray[Any], targets: npt.NDArray[Any], paths: Any, *,
    groups: Any, num_classes: int,
) -> SplitRows:  # fmt: skip
    """Check one split's arrays against each other and sort them by path."""

    def wrong(what: str, expected: object, found: object) -> DataError:
        return DataError(f"{what} of split {split}", expected=expected, found=found)

    if (
        features.ndim not in {2, 3}
        or 0 in features.shape[1:]
        or features.dtype not in (np.float32, np.float16)
    ):
        found = f"{features.dtype} {features.shape}"
        raise wrong("features", "(N, D) or (N, V, D) float32 or float16", found)
    num_rows = len(features)
    names = [] if paths is None else [str(p) for p in paths]
    if len(names) != num_rows or len(set(names)) != num_rows:
        found = f"{len(names)} paths, {len(set(names))} different"
        raise wrong("paths", f"{num_rows} different paths", found)
    check_names(f"paths of split {split}", names)
    if groups is not None:
        check_names(f"groups of split {split}", list(dict.fromkeys(map(str, groups))))
    if groups is not None and len(groups) != num_rows:
        raise wrong("groups", f"{num_rows} groups", len(groups))
    if targets.ndim == 2 and targets.dtype.kind in "biuf":
        targets = targets.astype("<f4")
        known = targets[~np.isnan(targets)]
        if targets.shape != (num_rows, num_classes) or not np.isin(known, (0, 1)).all():
            odd = [float(v) for v in known if v not in (0, 1)][:1]
            found = f"{targets.shape}" + "".join(f" with {v}" for v in odd)
            raise wrong("targets", f"0, 1 or NaN, {(num_rows, num_classes)}", found)
    else:
        if targets.shape != (num_rows,) or targets.dtype.kind not in "iu":
            expected = f"{num_rows} integers or class names"
            raise wrong("targets", expected, f"{targets.dtype} {targets.shape}")
        if num_rows and not (targets.min() >= -1 and targets.max() < num_classes):
            found = f"{targets.min()} to {targets.max()}"
            raise wrong("targets", f"-1 to {num_classes - 1}", found)
        targets = targets.astype("<i8")
    if not np.isfinite(features).all():
        row = int(np.flatnonzero(~np.isfinite(features).reshape(num_rows, -1).all(axis=1))[0])
        raise wrong("features", "finite values", f"NaN or infinity in row {row}")
    order = sorted(range(num_rows), key=lambda i: os_bytes(names[i]))
    if order != [*range(num_rows)]:  # sorted already: no copy
        features = features[order]
    features = features.astype(features.dtype.newbyteorder("<"), copy=False)
    return SplitRows(
        features.shape, features.dtype, lambda: [features], targets[order],
        [names[i] for i in order], None if groups is None else [str(groups[i]) for i in order],
        np.zeros((num_rows, 32), np.uint8), np.zeros(num_rows, np.int64),
        np.zeros(num_rows, np.int64),
    )  # fmt: skip


class _Texts:
    """Strings as a column of fixed-width bytes; ``|S1`` if there are none or all are empty.

    They are encoded when they are written: a million paths take 35 MB, their list of bytes 80 more.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts, self.shape = texts, (len(texts),)
        width = max(map(len, map(os_bytes, texts)), default=0)
        self.dtype = np.dtype(f"S{max(width, 1)}")

    def __getitem__(self, rows: slice) -> npt.NDArray[Any]:
        part = self._texts[rows]
        return np.fromiter(map(os_bytes, part), self.dtype, len(part))


def _encode(texts: Sequence[str]) -> npt.NDArray[Any]:
    return _Texts(texts)[:]


def _source(name: str, column: Column) -> ArraySource:
    """Return the source of a column, which is made block by block if it is no array."""
    if isinstance(column, np.ndarray):
        return ArraySource.of(name, column)
    starts = range(0, column.shape[0], _BLOCK_ROWS)
    return ArraySource.by_blocks(
        name, column.shape, column.dtype, lambda: (column[i : i + _BLOCK_ROWS] for i in starts)
    )


_OWN_NAMES = (
    r"manifest\.json|probing(\.[0-9]+)?|whole|true|shard\.[0-9]+|plan\.json|part\.[0-9]+\.json|"
    r"alive\.[0-9]+(\.[0-9a-f]+)?"
)
"""Names of featcache's files in the folder of an unfinished cache, but for the lock."""
_MARK = b'"format":"featcache-partial"'
_MAX_MANIFEST_BYTES = 1 << 28


def partial_folder(cache: Path) -> Path:
    """Return the folder that a cache is built in."""
    return beside(cache, ".partial")


@contextlib.contextmanager
def cache_lock(cache: Path, say: Say = log_line) -> Iterator[None]:
    """Hold the lock of a cache's folder of unfinished work, in which no part is being made.

    The folder is ours if it has a lock file or a manifest of ours: see ``locking.folder_lock``.

    Args:
        cache: The cache.
        say: Called if it takes a while to tell whether a part is being made.

    Raises:
        CacheError: If another process writes the cache or a part of it.
    """
    folder, is_ours = partial_folder(cache), False
    with contextlib.suppress(OSError):
        is_ours = _MARK in read_regular(folder / "manifest.json", max_bytes=_MAX_MANIFEST_BYTES)
    with folder_lock(folder, f"cache {cache.name}", "(?!)" if is_ours else _OWN_NAMES):
        refuse_alive(signs_in(folder, cache.name), say)
        yield


@contextlib.contextmanager
def writing_alone(output: Output, *, may_discard: bool) -> Iterator[None]:
    """Hold the lock of a cache that is written in one go, and check the output again.

    Args:
        output: The cache.
        may_discard: Whether an unfinished extraction of that name may be thrown away.

    Raises:
        CacheError: If there is an unfinished extraction, another process is writing the cache, or
            it must not be replaced.
    """
    output.check()
    folder = partial_folder(output.target)
    make_folder(folder.parent)
    with cache_lock(output.target):
        unfinished = any((folder / name).exists() for name in ("manifest.json", "plan.json"))
        try:
            output.check()
            if unfinished and not may_discard:
                raise CacheError(
                    "cache", expected="a new file", found="an unfinished extraction of that name",
                    where=folder, hint=f"Finish it, or discard it with {output.kind.switch}",
                )  # fmt: skip
            remove_temporaries(output.target)
            yield
            unfinished = False  # of what was refused without ``may_discard``
        finally:
            if not unfinished:
                remove_partial(folder)


def remove_partial(folder: Path) -> None:
    """Remove featcache's files in the folder of an unfinished cache, the lock last, and the folder.

    Other files are kept, and then the folder too.
    """
    with contextlib.suppress(OSError):
        (folder / "manifest.json").unlink(missing_ok=True)
        # The plan of parts after all else: without it the next command would need a lock to tidy
        # up, and parts are for where there are none.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "plan.json"):
            if re.fullmatch(_OWN_NAMES, path.name) or is_temporary(path.name):
                path.unlink(missing_ok=True)
        remove_lock(folder)
