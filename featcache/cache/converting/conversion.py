"""Convert: a cache to a file that other tools read, and such a file to a cache.

Reads: caches, and files of rows that anybody may have made. Writes: either, whole or not at all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.by_url import by_url
from featcache.cache.cache_split import CacheSplit
from featcache.cache.container import is_container
from featcache.cache.converting.importing import FORMAT_VERSION, cache_of
from featcache.cache.converting.reading import (
    FORMATS,
    read_table_of_rows,
    require_package,
)
from featcache.cache.converting.rows import (
    LABEL,
    MAX_METADATA_BYTES,
    NUMBERS,
    RowTable,
    require_room,
    room,
)
from featcache.cache.provenance import check_alike
from featcache.cache.reading import Cache, open_cache
from featcache.cache.writing import CACHE, write_rows, writing_alone
from featcache.errors import ConfigError, DataError, printable
from featcache.files import (
    atomic_writer,
    canonical_json,
    disk_error,
    local_path,
    result_as_dict,
    sha256_file,
)
from featcache.formatting import brief_repr, count
from featcache.outputs import Kind, Output
from featcache.runtime import Say, environment_facts, log_line
from featcache.untrusted import why_no_file

STATED = "stated, not verified"
"""In ``provenance["identity"]`` of a cache whose features came from another file."""

_BLOCK_ROWS = 1024
_TABLE = Kind("file of rows", "a new file in an existing folder", needs_folder=True)


@dataclass(frozen=True)
class ConversionSummary:
    """What was converted.

    Attributes:
        source: The file that was read.
        output: The file that was written.
        format: Of the file that is no cache, its ending: ``npz``, say.
        num_rows: Rows of all splits.
        splits: Split -> its number of rows.
        classes: Class names.
        content_sha256: Of the cache.
        identity: ``as in the cache``, or ``stated, not verified``.
        is_unchanged: Whether the file holds what was converted to it once, by its
            ``content_sha256``; None where that is not known.
        seconds: How long it took.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    source: Path
    output: Path
    format: str
    num_rows: int
    splits: dict[str, int]
    classes: tuple[str, ...]
    content_sha256: str
    identity: str
    is_unchanged: bool | None
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return result_as_dict(self)


@by_url("source", makes="output")
def convert(
    source: str | Path, output: str | Path, *, backbone_name: str | None = None,
    rebuild: bool = False, say: Say = log_line,
) -> ConversionSummary:  # fmt: skip
    """Convert a cache to npz, safetensors, Parquet, h5ad or CSV, or such a file to a cache.

    A file has a row for each image: the columns and the JSON object ``featcache`` are described in
    FORMAT.md. Before it gets its name, it is read back and compared: what it could not hold is
    refused. Nothing is pickled, and no pickle is read. Rows are in memory while they are converted.

    Args:
        source: A cache; or a file of rows, known by its ending.
        output: A new file of rows, by its ending; or a cache.
        backbone_name: The network that made the features of a file that does not say so.
        rebuild: Replace a cache that is there. Other files are never replaced.
        say: Where lines for people go.

    Raises:
        ConfigError: If neither or both are caches, a name is needed or contradicts the file, or a
            package is not installed.
        CacheError: If the cache is not whole, or cannot be written.
        DataError: If the file is damaged or no such table, or the format cannot hold the cache.

    Example:
        >>> featcache.convert("covid.h5", "covid.parquet")  # doctest: +SKIP
        >>> featcache.convert("covid.parquet", "again.h5").is_unchanged  # doctest: +SKIP
        True
    """
    start = time.perf_counter()
    read, made = local_path(source, "IN"), local_path(output, "OUT")
    if found := why_no_file(read):
        raise ConfigError("IN", expected="a cache, or a file of rows", found=found, where=read)
    if is_container(read):
        if backbone_name is not None or rebuild:
            option = "--rebuild" if rebuild else "--backbone-name"
            raise ConfigError(option, expected="a file to make a cache of", found="a cache")
        summary = _export(read, made)
    elif made.suffix.lower() in FORMATS or read.suffix.lower() not in FORMATS:
        raise ConfigError(
            "IN", expected=f"a cache, or a file of {' '.join(FORMATS)}, and OUT the other",
            found=f"{read.name} and {made.name}",
        )  # fmt: skip
    else:
        summary = _import(read, made, backbone_name, rebuild=rebuild, say=say)
    summary = replace(summary, seconds=round(time.perf_counter() - start, 3))
    rows = ", ".join(f"{number:,} {name}" for name, number in summary.splits.items())
    say(
        f"{printable(summary.output.as_posix())}: {count(summary.num_rows, 'row')} ({rows}), "
        f"identity {summary.identity}, content sha256 {summary.content_sha256[:16]}..."
    )
    if summary.is_unchanged is False:
        say("its content is not what was converted to the file: rows or values were changed since")
    return summary


# -------------------------------------------------------------------------------------- to a file


def _export(source: Path, made: Path) -> ConversionSummary:
    ending = made.suffix.lower()
    if ending not in FORMATS:
        raise ConfigError(
            "OUT", expected=f"a name that ends in {' '.join(FORMATS)}", found=made.name
        )
    output = Output(made, "OUT", _TABLE, inputs=[source])
    output.check()
    require_package(FORMATS[ending])
    cache = open_cache(source)
    check_alike([cache])

    def publish(temporary: Path) -> None:
        try:
            _compare(cache, read_table_of_rows(temporary, ending), made)
        except DataError as error:  # do not name the temporary file
            raise DataError(
                error.what, expected=error.expected, found=error.found, where=source,
                hint=error.hint or "Convert to another format",
            ) from error  # fmt: skip
        output.publish(temporary)

    try:
        with atomic_writer(output.target, publish) as file:
            FORMATS[ending].write(_table_of(cache), file)  # not kept: it is read back next
    except OSError as error:
        raise disk_error(error, made, _feature_bytes(cache)) from error
    return _summarise(source, made, ending, cache, "as in the cache", is_unchanged=True)


def _summarise(
    source: Path, output: Path, ending: str, cache: Cache, identity: str, *,
    is_unchanged: bool | None,
) -> ConversionSummary:  # fmt: skip
    splits = {name: len(split) for name, split in cache.splits.items()}
    return ConversionSummary(
        source=source, output=output, format=ending[1:], num_rows=sum(splits.values()),
        splits=splits, classes=cache.classes, content_sha256=cache.content_sha256,
        identity=identity, is_unchanged=is_unchanged, seconds=0.0,
    )  # fmt: skip


def _table_of(cache: Cache) -> RowTable:
    """Return the rows of a cache as a table.

    Raises:
        DataError: If no file of rows can hold them.
    """
    splits = cache.splits

    def cannot(what: str, expected: str, found: object, hint: str = "") -> DataError:
        return DataError(what, expected=expected, found=found, where=cache.path, hint=hint)

    for name, split in splits.items():
        if split.num_views > 1:
            raise cannot(
                f"views of split {name}", "one of each row, as no format has more",
                split.num_views, "Use the arrays of featcache.open_cache, or extract without views",
            )  # fmt: skip
    num_rows = sum(map(len, splits.values()))
    if num_rows == 0:
        raise cannot("rows", "one or more", "none")
    if "" in cache.classes:
        raise cannot(
            "classes", "names, as an empty one means unlabelled", "an empty one",
            "Rename it: featcache select --rename",
        )  # fmt: skip
    require_room("features", _feature_bytes(cache), room(), cache.path)
    dtype = next(iter(splits.values())).dtype
    features, position = np.empty((num_rows, cache.num_features), dtype), 0
    for split in splits.values():
        for block in _blocks(split):
            features[position : position + len(block)] = block
            position += len(block)
    if not np.isfinite(features).all():
        raise cannot("features", "finite numbers", "NaN or infinity", "Extract it again")
    paths = [path for split in splits.values() for path in split.paths]
    groups = [group for s in splits.values() for group in s.groups or [""] * len(s)]
    shown = _show_names([*paths, *groups, *(f.path for f in cache.failures)], cache)
    texts: dict[str, Sequence[str | None]] = {
        "path": [shown.get(path, path) for path in paths],
        "split": [name for name, split in splits.items() for _ in range(len(split))],
    }
    numbers: dict[str, npt.NDArray[Any]] = {}
    targets = np.concatenate([split.targets for split in splits.values()])
    if cache.task == "multilabel":
        numbers |= {LABEL + name: targets[:, i].copy() for i, name in enumerate(cache.classes)}
    else:
        names: list[str | None] = [*cache.classes, None]  # the last is -1's
        texts["target"] = [names[target] for target in targets.tolist()]
    if any(split.groups is not None for split in splits.values()):
        texts["group"] = [shown.get(group, group) for group in groups]
    texts["image_sha256"] = [
        row.tobytes().hex() if row.any() else None
        for split in splits.values() for row in split.image_sha256
    ]  # fmt: skip
    numbers |= {
        key: np.concatenate([getattr(split, key) for split in splits.values()]) for key in NUMBERS
    }
    metadata = canonical_json(_facts_of(cache, shown))
    if len(metadata) > MAX_METADATA_BYTES:
        raise cannot("failures and provenance", "64 MB at most", f"{len(metadata):,} bytes")
    return RowTable(features, texts, numbers, metadata)


def _feature_bytes(cache: Cache) -> int:
    return sum(math.prod(s.shape) * s.dtype.itemsize for s in cache.splits.values())


def _blocks(split: CacheSplit) -> Iterator[npt.NDArray[Any]]:
    """Yield the features (n, D) of a split whose rows have one view."""
    for start in range(0, len(split), _BLOCK_ROWS):
        yield split.read_rows(np.arange(start, min(start + _BLOCK_ROWS, len(split))))


def _show_names(names: Sequence[str], cache: Cache) -> dict[str, str]:
    """Return of names that are not UTF-8 how they are written, which is no other name.

    Raises:
        DataError: If another name is written so already.
    """
    different = dict.fromkeys(names)
    shown = {
        name: name.encode("utf-8", "backslashreplace").decode()
        for name in different if any("\udc80" <= char <= "\udcff" for char in name)
    }  # fmt: skip
    for text in shown.values():
        if text in different:
            raise DataError(
                "paths and groups", expected="names in UTF-8, or that can be told from those",
                found=f"{text} twice", where=cache.path, hint="Rename one of them",
            )  # fmt: skip
    return shown


def _facts_of(cache: Cache, shown: Mapping[str, str]) -> dict[str, Any]:
    classes: list[str | None] = [*cache.classes, None]
    return {
        "format": "featcache-rows", "format_version": FORMAT_VERSION,
        "classes": list(cache.classes), "task": cache.task, "identity": cache.identity,
        "provenance": cache.provenance, "fingerprint": cache.fingerprint,
        "content_sha256": cache.content_sha256,
        "feature_dtype": next(iter(cache.splits.values())).dtype.name,
        "splits": {
            name: {"num_rows": len(split), "has_groups": split.groups is not None}
            for name, split in cache.splits.items()
        },
        "names": {text: name for name, text in shown.items()},
        "failures": [
            {
                "path": f.path, "split": f.split, "target": classes[f.target], "reason": f.reason,
                "image_bytes": f.image_bytes, "mtime_ns": f.mtime_ns,
            }
            for f in cache.failures
        ],
    }  # fmt: skip


def _compare(cache: Cache, table: RowTable, made: Path) -> None:
    """Refuse a file that does not give back the cache it was made of.

    Raises:
        DataError: If so, naming the first part that differs.
    """
    again = cache_of(table, made, None)

    def cannot(what: str) -> DataError:
        return DataError(
            what, expected="what the cache has, read back from the file", where=cache.path,
            found=f"something else: {made.suffix} cannot hold it",
            hint="Convert to another format",
        )  # fmt: skip

    if list(again.splits) != list(cache.splits):
        raise cannot("splits")
    for name, split in cache.splits.items():
        rows = again.splits[name]
        (features,) = rows.feature_blocks()
        parts = np.split(features, range(_BLOCK_ROWS, len(features), _BLOCK_ROWS))
        if features.shape != split.shape or not all(map(_same, parts, _blocks(split))):
            raise cannot(f"features of {name}")
        if list(rows.paths[:]) != split.paths:
            raise cannot(f"paths of {name}")
        if (None if rows.groups is None else list(rows.groups)) != split.groups:
            raise cannot(f"groups of {name}")
        arrays = {
            "targets": (rows.targets, split.targets),
            "image_sha256": (rows.image_sha256[:], split.image_sha256),
            "image_bytes": (rows.image_bytes[:], split.image_bytes),
            "mtime_ns": (rows.mtime_ns[:], split.mtime_ns),
        }
        for what, (one, other) in arrays.items():
            if not _same(one, other):
                raise cannot(f"{what} of {name}")
    for what, found, wanted in (
        ("identity", again.identity, cache.identity),
        ("classes", tuple(again.classes), cache.classes),
        ("task", again.task, cache.task),
        ("failures", sorted(map(repr, again.failures)), sorted(map(repr, cache.failures))),
    ):
        if found != wanted:
            raise cannot(what)


def _same(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and one.tobytes() == other.tobytes()


# ------------------------------------------------------------------------------------- to a cache


def _import(
    source: Path, made: Path, backbone_name: str | None, *, rebuild: bool, say: Say
) -> ConversionSummary:
    ending = source.suffix.lower()
    kind = replace(CACHE, needs_folder=True)
    output = Output(made, "OUT", kind, replace=rebuild, inputs=[source])
    output.check()
    new = cache_of(read_table_of_rows(source, ending), source, backbone_name)
    origin = {"path": source.as_posix(), "format": ending[1:], "sha256": sha256_file(source)}
    environment = environment_facts()
    provenance = {
        "date": environment["date"], "versions": environment["versions"], **new.provenance,
        "converted_from": origin, "identity": STATED,
    }  # fmt: skip
    with writing_alone(output, may_discard=rebuild):
        cache = write_rows(
            output.target, new.splits, identity=new.identity, provenance=provenance,
            classes=new.classes, task=new.task, failures=new.failures, publish=output.publish,
        )  # fmt: skip
    if new.content_sha256 is None:
        say(f"backbone {printable(new.identity['backbone'])}: as you name it; nothing says so")
    is_unchanged = (
        None if new.content_sha256 is None else new.content_sha256 == cache.content_sha256
    )
    return _summarise(source, made, ending, cache, STATED, is_unchanged=is_unchanged)
