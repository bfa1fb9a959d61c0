"""Select: rows of caches -> a new cache, without the images: join, re-split, relabel, leave out.

Reads: caches, and a table (CSV). Writes: ``NEW``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.by_url import by_url
from featcache.cache.merging import Row, gather
from featcache.cache.precisions import row_precisions, warn_of_precisions, with_row_precisions
from featcache.cache.provenance import check_alike, join_provenances, list_origins, warn_of_salts
from featcache.cache.reading import Cache, Failure, open_cache, warn_of_leaks
from featcache.cache.rearrangement import Rearrangement
from featcache.cache.resplitting import join_splits, name_groups, split_anew
from featcache.cache.writing import CACHE, SplitRows, write_rows, writing_alone
from featcache.data.dataset import UNLABELLED
from featcache.data.folders import SPLITS, training_split
from featcache.data.groups import GroupPattern
from featcache.data.splitting import name_fractions
from featcache.errors import CacheError, ConfigError, printable
from featcache.files import local_path, result_as_dict
from featcache.formatting import brief_repr, count, list_counts
from featcache.outputs import Output
from featcache.pixels.views import ViewRules
from featcache.runtime import Say, environment_facts, log_line
from featcache.untrusted import real_path

_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class SelectionSummary:
    """What a selection did.

    Attributes:
        cache: The new cache.
        num_images: Its rows.
        splits: Per split, rows per class (or ``unlabelled``).
        sources: Per cache: ``path``, ``num_images`` in it and ``num_taken`` of them.
        num_unnamed: Rows left out because the table does not name them.
        num_other_classes: Rows left out because their class is not wanted.
        num_merged: Rows that were the same image under the same path as another.
        names_without_row: Paths of the table that no cache has.
        num_failed: Images that could not be read, carried over.
        seconds: Wall time of the whole call.
        fingerprint: Of the caches' identity.
        content_sha256: Of the new cache's content.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    cache: Path
    num_images: int
    splits: dict[str, dict[str, int]]
    sources: tuple[dict[str, Any], ...]
    num_unnamed: int
    num_other_classes: int
    num_merged: int
    names_without_row: tuple[str, ...]
    num_failed: int
    seconds: float
    fingerprint: str
    content_sha256: str

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return result_as_dict(self)


@by_url("caches", makes="new")
def select(
    caches: str | Path | Sequence[str | Path],
    new: str | Path,
    *,
    table: str | Path | None = None,
    fractions: Sequence[float] | None = None,
    seed: int | None = None,
    group_by: str | None = None,
    group_by_path: str | None = None,
    classes: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
    prefix: bool = False,
    columns: Mapping[str, str] | None = None,
    ignore_columns: str | Sequence[str] = (),
    rebuild: bool = False,
    say: Say = log_line,
) -> SelectionSummary:
    """Make a cache of rows of other caches, without their images and without a backbone.

    Joins caches of one identity, re-splits and relabels by a table, splits anew by fractions, drops
    and renames classes. Rows are copied bit for bit. Extracting the images so arranged would give
    the same bits with the same engine; another one, as it may be chosen below 128 images, differs
    by 1e-6 (relative L2).

    Args:
        caches: One or more caches whose features were made alike.
        new: The cache to make.
        table: A CSV of ``path`` and, as far as wanted, ``target``, ``split``, ``group``. Rows that
            it does not name are left out; a column that is missing or empty changes nothing.
        fractions: Split anew: shares of train, valid and test in every class; 0 leaves a split out.
            It is the split that ``split`` would make of the images: groups, and images of the same
            bytes, stay together.
        seed: Seed of that split; 0 if None.
        group_by: Regular expression on the file name; its first group becomes the row's group.
            Without it rows keep their groups.
        group_by_path: Instead, one on the path below the class: see ``scan``.
        classes: Keep these classes only, and what is unlabelled.
        rename: Old -> new class name. Two classes of one new name become one.
        prefix: Set each cache's file name before its paths and groups: for caches that call
            different images, or different patients, alike.
        columns: Column of the table (path, target, split, group) -> its header.
        ignore_columns: Headers of the table that are not used.
        rebuild: Replace ``new`` if it is there.
        say: Where lines for people go.

    Raises:
        CacheError: If a cache is damaged, the caches do not fit each other, one path means two
            images, or the disk is full. Nothing is left half-written.
        DataError: If the table is none, or a split would lack a class, or a class has too few
            groups for every split.
        ConfigError: If an option has no meaning.

    Example:
        >>> featcache.select(["a.h5", "b.h5"], "both.h5", prefix=True)  # doctest: +SKIP
    """
    start = time.perf_counter()
    listed = [caches] if isinstance(caches, str | Path) else caches
    sources = [local_path(path, "CACHE") for path in listed]
    output = Output(new, "NEW", CACHE, replace=rebuild, inputs=[table])
    _check_names_of_caches(sources, output.target, prefix=prefix)
    pattern = GroupPattern.of(group_by, group_by_path)
    shares = None if fractions is None else name_fractions(fractions)
    if shares is None and seed is not None:
        raise ConfigError("--seed", expected="--fractions that it is the seed of", found="none")
    if table is None and (columns or ignore_columns):
        raise ConfigError("--columns", expected="a --table that has them", found="none")
    with writing_alone(output, may_discard=rebuild):
        opened = [open_cache(source) for source in sources]
        check_alike(opened)
        warn_of_precisions(opened)
        warn_of_salts(opened)
        chosen = Rearrangement(opened, prefix=prefix, say=say)
        if table is not None:
            named = chosen.apply_table(Path(table), columns=columns, ignore_columns=ignore_columns)
            if shares is not None and "split" in named:
                raise ConfigError(
                    "--fractions", expected="a --table without splits", found="a column split",
                    where=table, hint="Add --ignore-columns with the header of its splits",
                )  # fmt: skip
        if shares is not None:
            join_splits(chosen)
        chosen.choose_classes(rename or {}, classes, sources[0] if table is None else Path(table))
        if pattern is not None:
            name_groups(chosen, pattern)
        chosen.settle_rows()
        if shares is not None:
            split_anew(chosen, shares, seed or 0)
        written = _write(output, chosen)
    warn_of_leaks(written)
    return _summarise(output.path, written, chosen, start, say)


def _check_names_of_caches(sources: Sequence[Path], new: Path, *, prefix: bool) -> None:
    if not sources:
        raise ConfigError("CACHE", expected="one or more", found="none")
    if real_path(new) in map(real_path, sources):
        raise ConfigError(
            "NEW", expected="another file than the caches that are read", found=new,
            hint="Choose another name",
        )  # fmt: skip
    twice = [stem for stem, n in Counter(source.stem for source in sources).items() if n > 1]
    if prefix and twice:
        raise ConfigError(
            "--prefix", expected="caches of different file names", found=f"{twice[0]} twice",
            hint="Rename one of them",
        )  # fmt: skip


def _write(output: Output, chosen: Rearrangement) -> Cache:
    """Write the rows, whole or not at all, and return the cache opened."""
    by_split = {
        name: [row for row in chosen.rows if row.split == name]
        for name in SPLITS
        if any(row.split == name for row in chosen.rows)
    }
    return write_rows(
        output.target, {name: _split_rows(chosen, name, by_split) for name in by_split},
        identity=chosen.caches[0].identity, provenance=_provenance(chosen, by_split),
        classes=chosen.classes, task=chosen.caches[0].task, failures=_failures(chosen),
        publish=output.publish,
    )  # fmt: skip


def _split_rows(
    chosen: Rearrangement, name: str, by_split: Mapping[str, Sequence[Row]]
) -> SplitRows:
    rows = by_split[name]
    num_views = _num_views(chosen.caches, name, by_split)
    first = next(iter(chosen.caches[0].splits.values()))
    views = () if num_views == 1 else (num_views,)
    block_rows = max(1, _BLOCK_BYTES // (first.shape[-1] * first.dtype.itemsize * num_views))

    def blocks() -> Iterator[npt.NDArray[Any]]:
        for i in range(0, len(rows), block_rows):
            part = rows[i : i + block_rows]
            block = gather(
                chosen.caches, part,
                lambda _, split, n: split.read_rows(n, num_views),
            )  # fmt: skip
            finite = np.isfinite(block.reshape(len(part), -1)).all(axis=1)
            if not finite.all():
                row = part[int(finite.argmin())]
                raise CacheError(
                    f"features of {row.path}", expected="finite numbers", found="NaN or infinity",
                    where=chosen.caches[row.cache].path, hint="Extract it again",
                )  # fmt: skip
            yield block

    return SplitRows(
        (len(rows), *views, first.shape[-1]), first.dtype, blocks,
        targets=chosen.targets(rows), paths=[row.path for row in rows],
        groups=[str(row.group) for row in rows] if rows[0].group is not None else None,
        image_sha256=gather(chosen.caches, rows, lambda _, split, n: split.image_sha256[n]),
        image_bytes=gather(chosen.caches, rows, lambda _, split, n: split.image_bytes[n]),
        mtime_ns=gather(chosen.caches, rows, lambda _, split, n: split.mtime_ns[n]),
    )  # fmt: skip


def _num_views(caches: Sequence[Cache], name: str, by_split: Mapping[str, Sequence[Row]]) -> int:
    """Return V of a split: as ``extract`` would have it, further views being left out."""
    identity = caches[0].identity
    views = {(c, s): x.num_views for c, k in enumerate(caches) for s, x in k.splits.items()}
    of_rows = [views[row.cache, row.source] for row in by_split[name]]
    if "views" in identity:
        wanted = ViewRules.from_identity(identity).for_split(name, by_split).num_views
    else:  # features made elsewhere
        wanted = max(of_rows) if name == training_split(by_split) else min(of_rows)
    lacking = [row for row, v in zip(by_split[name], of_rows, strict=True) if v < wanted]
    if lacking:
        row = lacking[0]
        raise CacheError(
            f"views of split {name}", expected=f"{wanted} of each row",
            found=f"{views[row.cache, row.source]} of {len(lacking):,}, such as {row.path}",
            where=caches[row.cache].path,
            hint="Only images to train on have views: leave these out, or extract them anew",
        )  # fmt: skip
    return wanted


def _failures(chosen: Rearrangement) -> list[Failure]:
    """Return the failed images taken, once each, without those that another cache has read."""
    read = {row.path for row in chosen.rows}
    numbers = {name: i for i, name in enumerate(chosen.classes)}
    failures: dict[tuple[str, str], Failure] = {}
    for row in chosen.failed:
        if row.path not in read and (row.label is None or row.label in numbers):
            old = chosen.caches[row.cache].failures[row.number]
            target = UNLABELLED if row.label is None else numbers[row.label]
            failures.setdefault(
                (row.split, row.path),
                replace(old, path=row.path, split=row.split, target=target),
            )
    return list(failures.values())


def _provenance(chosen: Rearrangement, by_split: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    facts = environment_facts()  # of this process, which ran no network
    made = [row_precisions(cache) for cache in chosen.caches]
    precisions = {
        name: [made[row.cache][row.source][row.number] for row in rows]
        for name, rows in by_split.items()
    }
    truncated = [cache.provenance.get("truncated") or [] for cache in chosen.caches]
    known = [set(map(str, paths)) if isinstance(paths, list) else set() for paths in truncated]
    return {
        "date": facts["date"],
        "versions": facts["versions"],
        **with_row_precisions(join_provenances(chosen.caches), precisions),
        "truncated": [
            row.path
            for row in chosen.rows
            if row.path.removeprefix(chosen.prefixes[row.cache]) in known[row.cache]
        ],
        "selected_from": [
            {
                "path": cache.path.as_posix(), "payload_sha256": cache.payload_sha256,
                "content_sha256": cache.content_sha256, "fingerprint": cache.fingerprint,
                "num_taken": sum(row.cache == c for row in chosen.rows),
            }
            for c, cache in enumerate(chosen.caches)
        ],
        "origins": list_origins(chosen.caches),
    }  # fmt: skip


def _summarise(
    path: Path, written: Cache, chosen: Rearrangement, start: float, say: Say
) -> SelectionSummary:
    """Say and return what was done; ``start`` is when the call began."""
    counts: dict[str, dict[str, int]] = {}
    for name, split in written.splits.items():
        if chosen.is_multilabel:
            positive = (split.targets == 1).sum(axis=0).tolist()
            counts[name] = dict(zip(written.classes, positive, strict=True))
        else:
            labels = [*written.classes, "unlabelled"]
            found = sorted(Counter(split.targets.tolist()).items())
            counts[name] = {labels[target]: number for target, number in found}
        say(f"{name:>6}: {list_counts(counts[name])}")
    summary = SelectionSummary(
        cache=path, num_images=len(chosen.rows), splits=counts,
        sources=tuple(
            {
                "path": cache.path.as_posix(),
                "num_images": sum(len(split) for split in cache.splits.values()),
                "num_taken": sum(row.cache == c for row in chosen.rows),
            }
            for c, cache in enumerate(chosen.caches)
        ),
        num_unnamed=chosen.num_unnamed, num_other_classes=chosen.num_other_classes,
        num_merged=chosen.num_merged, names_without_row=tuple(chosen.names_without_row),
        num_failed=len(written.failures), seconds=round(time.perf_counter() - start, 3),
        fingerprint=written.fingerprint, content_sha256=written.content_sha256,
    )  # fmt: skip
    taken = ", ".join(
        f"{s['num_taken']:,} of {s['num_images']:,} of {printable(s['path'])}"
        for s in summary.sources
    )
    say(
        f"{printable(summary.cache.as_posix())}: {count(summary.num_images, 'image')} ({taken}) in "
        f"{summary.seconds:.1f} s."
    )
    return summary
