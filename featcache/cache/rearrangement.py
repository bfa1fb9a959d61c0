"""Choose the rows of caches for a new cache, with their new split, class and group.

Reads: open caches and a table (CSV). Writes: nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.given_rows import check_names
from featcache.cache.merging import Row, check_pairs, collect_rows, gather, merge_same_images
from featcache.cache.reading import Cache
from featcache.cache.table import Table
from featcache.cache.writing import os_bytes
from featcache.data.dataset import UNLABELLED
from featcache.data.folders import SPLITS, agree_on_classes
from featcache.errors import CacheError, ConfigError, printable, warn_user
from featcache.formatting import count, join_few
from featcache.runtime import Say

_NUM_SHOWN = 5


class Rearrangement:
    """The rows chosen from some caches, with their new splits, classes and groups.

    Call ``apply_table`` if there is a table, then ``choose_classes``, then ``settle_rows``.

    Args:
        caches: Caches that fit together (see module ``provenance``).
        prefix: Put each cache's file name in front of its paths and groups.
        say: Called with lines for the user.
    """

    def __init__(self, caches: Sequence[Cache], *, prefix: bool, say: Say) -> None:
        self.caches, self.say = caches, say
        self.prefixes = [f"{cache.path.stem}/" if prefix else "" for cache in caches]
        self.rows, self.failed = collect_rows(caches, self.prefixes)
        self.classes: tuple[str, ...] = ()
        self.num_unnamed = self.num_other_classes = self.num_merged = 0
        self.names_without_row: list[str] = []
        self._names: list[list[str]] = []  # classes of each cache, after renaming

    @property
    def is_multilabel(self) -> bool:
        """Whether the caches have several labels per row."""
        return self.caches[0].task == "multilabel"

    def apply_table(self, file: Path, **columns: Any) -> set[str]:
        """Keep the rows that the table names, with its columns; say which do not match.

        Returns:
            Which of target, split and group the table has.

        Raises:
            DataError: If it is not a table, or names none of the rows.
            ConfigError: If it has targets, but the caches have several labels per row.
        """
        known = [row.path for row in (*self.rows, *self.failed)]
        table = Table(file, known, self.say, **columns)
        if self.is_multilabel and "target" in table.columns:
            raise ConfigError(
                "--table", expected="no targets for caches of several labels per image",
                found="a column target", where=file, hint="Leave the column out",
            )  # fmt: skip
        taken = list(_arrange(self.rows, table))
        self.num_unnamed = len(self.rows) - len(taken)
        if self.num_unnamed:
            example = next(row.path for row in self.rows if table.find(row.path) is None)
            self.say(
                f"left out: {count(self.num_unnamed, 'row')} that the table does not name, such as "
                f"{printable(example)}"
            )
        self.names_without_row = table.without_row
        if table.without_row:
            shown = ", ".join(map(printable, table.without_row[:_NUM_SHOWN]))
            number = len(table.without_row)
            more = ", ..." if number > _NUM_SHOWN else ""
            warn_user(f"{count(number, 'path')} of the table without a row: {shown}{more}")
        self.rows, self.failed = taken, list(_arrange(self.failed, table))
        return table.columns

    def choose_classes(
        self, rename: Mapping[str, str], wanted: Sequence[str] | None, where: Path
    ) -> None:
        """Rename classes and keep the wanted ones.

        Args:
            rename: Old -> new name.
            wanted: New names; None for all.
            where: Only for messages.

        Raises:
            ConfigError: If a name is not a class.
            DataError: If a split would lack a class, or two names differ only by case or blanks.
            CacheError: If no row is left.
        """
        self._rename(rename)
        present = {row.label for row in self.rows if row.label is not None}
        if self.is_multilabel:
            present = {name for names in self._names for name in names}
        if wanted is not None:
            unknown = [name for name in wanted if name not in present]
            if unknown or not wanted:
                raise ConfigError(
                    "--classes", expected="some of " + join_few(sorted(present)),
                    found=join_few(unknown) or "none",
                )  # fmt: skip
            present &= set(wanted)
        kept = [row for row in self.rows if row.label is None or row.label in present]
        self.num_other_classes, self.rows = len(self.rows) - len(kept), kept
        if not self.rows:
            raise CacheError("selection", expected="at least one row", found="none", where=where)
        labels: dict[str, set[str]] = {}
        for row in self.rows:
            if row.label is not None:
                labels.setdefault(row.split, set()).add(row.label)
        self.classes = agree_on_classes({"all": present} if self.is_multilabel else labels, where)
        check_names("classes", self.classes)
        if {cache.classes for cache in self.caches} != {self.classes}:
            for cache in self.caches:
                self.say(f"classes of {printable(cache.path.as_posix())}: {_listed(cache.classes)}")
            self.say(f"classes now: {_listed(self.classes)}")

    def _rename(self, names: Mapping[str, str]) -> None:
        known = {row.label for row in self.rows if row.label is not None}
        known |= {name for cache in self.caches for name in cache.classes}
        for old, new in names.items():
            if old not in known or not new:
                raise ConfigError(
                    "--rename", expected="OLD=NEW, OLD one of " + join_few(sorted(known)),
                    found=f"{old}={new}",
                )  # fmt: skip
        self.rows, self.failed = _rename_rows(self.rows, names), _rename_rows(self.failed, names)
        self._names = [[names.get(n, n) for n in cache.classes] for cache in self.caches]

    def settle_rows(self) -> None:
        """Merge rows of the same image, complete the groups, and sort the rows.

        Raises:
            CacheError: If two images have one path, or caches disagree about an image.
        """
        self.rows, pairs = merge_same_images(self.caches, self.rows, self._have_equal_labels)
        self.num_merged = len(pairs)
        if pairs:
            check_pairs(self.caches, pairs)
            self.say(f"kept once: {count(len(pairs), 'row')}, the same image under the same path")
        num_without = sum(row.group is None for row in self.rows)
        if 0 < num_without < len(self.rows):
            self.rows = [row._replace(group=row.group or row.path) for row in self.rows]
            self.say(f"groups: {count(num_without, 'row')} without one, each a group of its own")
        check_names("groups", list({row.group or "" for row in self.rows}))
        _say_shared_groups(self.rows, self.say)
        if not self.is_multilabel:
            _warn_of_contradictions(self.caches, self.rows)
        self.sort_rows()
        if {row.split for row in self.rows} > {"all"}:
            warn_user(
                "some rows are in split all, others in train, valid or test; heads are trained on "
                "train alone; name the rows' splits in a --table of path,split"
            )

    def sort_rows(self) -> None:
        """Sort the rows by split, and by the bytes of their path."""
        self.rows.sort(key=lambda row: (SPLITS.index(row.split), os_bytes(row.path)))

    def _have_equal_labels(self, a: Row, b: Row) -> bool:
        if self.is_multilabel:
            return np.array_equal(self.targets([a]), self.targets([b]), equal_nan=True)
        return a.label == b.label

    def targets(self, rows: Sequence[Row]) -> npt.NDArray[Any]:
        """Return the targets of some rows: (n,) integers, or (n, C) floats for ``multilabel``."""
        if self.is_multilabel:
            return gather(
                self.caches, rows,
                lambda c, split, n: _merge_labels(split.targets[n], self._names[c], self.classes),
            )  # fmt: skip
        numbers: dict[str | None, int] = {name: i for i, name in enumerate(self.classes)}
        return np.array([numbers.get(row.label, UNLABELLED) for row in rows], np.int64)


def _listed(classes: Sequence[str]) -> str:
    return join_few(classes) or "none"


def _arrange(rows: Iterable[Row], table: Table) -> Iterator[Row]:
    """Yield the rows that a table names, with the table's split, target and group."""
    for row in rows:
        line = table.find(row.path)
        if line is not None:
            yield Row(
                *row[:4],
                split=(line["split"] or "all") if "split" in table.columns else row.split,
                label=(line["target"] or None) if "target" in table.columns else row.label,
                group=(line["group"] or row.path) if "group" in table.columns else row.group,
            )


def _rename_rows(rows: Iterable[Row], names: Mapping[str, str]) -> list[Row]:
    new: dict[str | None, str] = dict(names.items())
    return [row._replace(label=new[row.label]) if row.label in new else row for row in rows]


def _merge_labels(
    targets: npt.NDArray[Any], sources: Sequence[str], classes: Sequence[str]
) -> npt.NDArray[np.float32]:
    """Return ``multilabel`` targets (N, C) for other classes; NaN where they are not known.

    Args:
        targets: (N, S) of 0, 1 and NaN.
        sources: S class names after renaming, which may have made some equal. The merged target
            is 1 if any is 1, else unknown if any is unknown, else 0.
        classes: C class names.
    """
    merged = np.full((len(targets), len(classes)), np.nan, np.dtype("<f4"))
    for column, name in enumerate(classes):
        part = targets[:, [i for i, source in enumerate(sources) if source == name]]
        if part.shape[1]:
            merged[:, column] = np.where((part == 1).any(axis=1), 1, part.max(axis=1))
    return merged


def _warn_of_contradictions(caches: Sequence[Cache], rows: Sequence[Row]) -> None:
    """Warn of images that have two classes, under different paths."""
    hashes = gather(caches, rows, lambda _, split, n: split.image_sha256[n])
    first: dict[bytes, Row] = {}
    torn: dict[bytes, str] = {}
    for row, digest in zip(rows, map(bytes, hashes), strict=True):
        if not any(digest) or row.label is None:
            continue
        other = first.setdefault(digest, row)
        if row.label != other.label:
            torn.setdefault(digest, f"{other.path} = {row.path}")
    if torn:
        example = printable(next(iter(torn.values())))
        warn_user(
            f"two classes for the same bytes: {count(len(torn), 'image')}, for example {example}"
        )


def _say_shared_groups(rows: Sequence[Row], say: Say) -> None:
    """Say which groups have rows in several caches: they are treated as one group."""
    owner: dict[str, int] = {}
    shared = {
        row.group: None
        for row in rows
        if row.group is not None and owner.setdefault(row.group, row.cache) != row.cache
    }
    if shared:
        example = printable(next(iter(shared)))
        say(f"groups: {len(shared):,} in several caches, such as {example}; each is one group")
