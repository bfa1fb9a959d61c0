"""Audit: cache -> copies among its rows, and whether file facts tell the classes, before training.

Reads: a cache, no images. Writes: a CSV where one is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcache.cache.reading import open_cache
from featcache.errors import CacheError, ConfigError, printable
from featcache.evaluation.audit_copies import (
    COLUMNS,
    EXAMPLES,
    FLOOR,
    AuditRows,
    copies_csv,
    find_near,
    find_same,
    join_copies,
    summarise_sets,
)
from featcache.evaluation.audit_shortcuts import Shortcuts, measure_shortcuts
from featcache.files import csv_text, local_path, result_as_dict
from featcache.formatting import brief_repr, count, decimal, join_few, list_counts, shorten
from featcache.outputs import Kind, Output, write_output
from featcache.runtime import Say, log_line

PARTS = ("same", "near", "shortcuts")
_WIDTH = 80


def _is_own(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(100)
    return not start or start.startswith(csv_text(COLUMNS, []).encode())


_CSV = Kind(
    "CSV of featcache audit", "a new file in an existing folder, or one of the same columns",
    is_own=_is_own, may_stream=True, needs_folder=True,
)  # fmt: skip


@dataclass(frozen=True)
class Audit:
    """What an audit found. A part that was not asked for is None.

    ``same`` and ``near`` have ``num_sets`` and ``num_rows`` (of rows joined as copies), and
    ``across_splits``, ``label_conflicts`` and ``across_groups``, each with ``num_sets`` and up to
    five ``examples``: lists of rows with ``split``, ``path``, ``class`` and ``group``.

    Attributes:
        cache: The file.
        parts: Which of ``same``, ``near`` and ``shortcuts`` were looked at.
        splits: Rows per split.
        same: Rows of one image file; also ``num_unknown``, rows without an image's hash.
        near: Rows of different files whose features are more alike than those of different images;
            also ``num_pairs``, ``is_cut`` (there are more pairs), ``threshold`` and ``median`` of
            cosines (None below 20 different rows), ``floor``, and ``pairs``: the most alike five
            with ``similarity`` and ``rows``. Candidates: no image was read.
        shortcuts: Balanced accuracies of file facts beside those of a linear head on the same
            folds: see ``verdict`` and ``sentence``.
        num_leaks: Sets of copies, same and near, across splits or of classes that conflict.
        csv: The CSV that was written.
        fingerprint: Of the cache's identity.
        content_sha256: Of its content.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    cache: Path
    parts: tuple[str, ...]
    splits: dict[str, int]
    same: dict[str, Any] | None
    near: dict[str, Any] | None
    shortcuts: dict[str, Any] | None
    num_leaks: int
    csv: Path | None
    fingerprint: str
    content_sha256: str

    def as_dict(self) -> dict[str, Any]:
        """Return the findings as JSON values."""
        return result_as_dict(self)


def audit(
    cache: str | Path,
    *,
    only: str | Sequence[str] | None = None,
    csv: str | Path | None = None,
    strict: bool = False,
    say: Say = log_line,
) -> Audit:
    """Look for what would make a head look better than it is: copies, and shortcuts.

    Copies are looked for in all splits. Scores come from the labelled rows of train and valid (or
    of ``all``), never of test. No image is read.

    Args:
        cache: The cache.
        only: ``same``, ``near``, ``shortcuts``, or several; None for all.
        csv: A file that ``select --table`` takes: every row, copies in one group.
        strict: Raise an error, at the end, if there are copies across splits or of two classes.
        say: Where lines for people go.

    Raises:
        CacheError: If the cache is damaged or a feature is not finite; with ``strict``, if there
            are leaks.
        ConfigError: If ``only`` names no part, or ``csv`` cannot be written.

    Example:
        >>> featcache.audit("covid.h5", csv="copies.csv").num_leaks  # doctest: +SKIP
    """
    parts = _choose_parts(only)
    source = local_path(cache, "CACHE")
    if csv is not None and parts == ("shortcuts",):
        raise ConfigError("--csv", expected="copies to write: --only same,near", found="shortcuts")
    table = None if csv is None else Output(csv, "--csv", _CSV, inputs=[source])
    if table is not None:
        table.check()
    opened = open_cache(source)
    rows = AuditRows.of(opened)
    same = find_same(rows) if "same" in parts else []
    near = find_near(rows) if "near" in parts else None
    shortcuts = measure_shortcuts(opened, say) if "shortcuts" in parts else None
    copies = join_copies(rows, same, near)
    near_facts = None
    if near is not None:
        near_facts = summarise_sets(rows, join_copies(rows, [], near)) | {
            "num_pairs": len(near.pairs), "is_cut": near.is_cut, "threshold": near.threshold,
            "median": near.median, "floor": FLOOR,
            "pairs": [
                {"similarity": float(similarity), "rows": [rows.describe(int(n)) for n in pair]}
                for pair, similarity in zip(
                    near.pairs[:EXAMPLES], near.similarities[:EXAMPLES], strict=True
                )
            ],
        }  # fmt: skip
    found = Audit(
        cache=Path(cache), parts=parts,
        splits={name: len(split) for name, split in opened.splits.items()},
        same=None if "same" not in parts
        else summarise_sets(rows, same) | {"num_unknown": int((~rows.has_hash).sum())},
        near=near_facts, shortcuts=None if shortcuts is None else result_as_dict(shortcuts),
        num_leaks=sum(
            len({rows.splits[row] for row in copy}) > 1 or rows.disagree(copy) for copy in copies
        ),
        csv=None if csv is None else Path(csv),
        fingerprint=opened.fingerprint, content_sha256=opened.content_sha256,
    )  # fmt: skip
    if table is not None:
        write_output(table, copies_csv(rows, copies).encode())
    for line in audit_lines(found, shortcuts):
        say(line)
    error = leak_error(found)
    if strict and error is not None:
        raise error
    return found


def leak_error(found: Audit) -> CacheError | None:
    """Return the error of ``strict``, None where there are no leaks."""
    if not found.num_leaks:
        return None
    return CacheError(
        "--strict", expected="no copies across splits or of two classes",
        found=count(found.num_leaks, "set"), where=found.cache,
        hint="Look at them, write --csv, and make a cache of it with select --table",
    )  # fmt: skip


def _choose_parts(only: str | Sequence[str] | None) -> tuple[str, ...]:
    if only is None:
        return PARTS
    wanted = [*map(str.strip, only.split(","))] if isinstance(only, str) else [*map(str, only)]
    unknown = [name for name in wanted if name not in PARTS]
    if unknown or not wanted:
        raise ConfigError(
            "--only", expected="some of " + ", ".join(PARTS), found=join_few(unknown) or "none"
        )
    return tuple(name for name in PARTS if name in wanted)


# ----------------------------------------------------------------------------- text


def audit_lines(found: Audit, shortcuts: Shortcuts | None) -> Iterator[str]:
    """Yield one page of lines of up to 80 columns, the most important first."""
    place = shorten(printable(found.cache.as_posix()), 30)
    yield f"audit of {place}: {list_counts(found.splits)}"
    if "same" in found.parts or "near" in found.parts:
        what = "sets of copies across splits or of two classes"
        yield f"leaks: {found.num_leaks:,} {what}" if found.num_leaks else f"leaks: no {what}"
    if found.same is not None:
        if found.same["num_unknown"]:
            yield (f"hashes of images: {found.same['num_unknown']:,} rows have none, which are "
                   "not compared")  # fmt: skip
        yield from _set_lines("same file", found.same)
    if found.near is not None:
        near = found.near
        if near["threshold"] is None:
            yield "near copies: too few different rows to tell what is near"
        else:
            more = " or more" if near["is_cut"] else ""
            look = ", to be looked at" if near["num_pairs"] else ""
            yield f"near copies: {count(near['num_pairs'], 'pair')}{more}{look}"
            yield (f"  cosine from {near['threshold']:.3f} on; nearest neighbours have "
                   f"{near['median']:.3f} (median)")  # fmt: skip
            for pair in near["pairs"]:
                yield f"  {decimal(pair['similarity'])}"
                yield from (f"    {_row_text(row)}" for row in pair["rows"])
            yield from _set_lines("near", near, examples=False)
    if shortcuts is not None:
        yield from _shortcut_lines(shortcuts)
    if found.csv is not None:
        yield f"written to {printable(found.csv.as_posix())}: for select --table"


def _set_lines(name: str, facts: dict[str, Any], *, examples: bool = True) -> Iterator[str]:
    if not facts["num_sets"]:
        if examples:
            yield f"{name}: none"
        return
    rows = count(facts["num_rows"], "row")
    yield f"{name}: {count(facts['num_sets'], 'set')} of copies, {rows}"
    titles = {"across_splits": "across splits", "label_conflicts": "of classes that conflict",
              "across_groups": "across groups"}  # fmt: skip
    for key, title in titles.items():
        number = facts[key]["num_sets"]
        if number:
            yield f"  {title}: {number:,}"
        for example in facts[key]["examples"] if examples else []:
            yield f"    {_row_text(example[0])}"
            for row in example[1:2]:
                yield f"      = {_row_text(row)}"


def _row_text(row: dict[str, Any]) -> str:
    name = f", {shorten(printable(row['class']), 16)}" if row["class"] is not None else ""
    return f"{row['split']}: {shorten(printable(row['path']), 48)}{name}"


def _shortcut_lines(found: Shortcuts) -> Iterator[str]:
    yield f"shortcuts, {count(found.num_rows, 'row')} of {' and '.join(found.splits)}:"
    yield from _wrapped(found.sentence)
    if found.head is None:
        return
    yield f"  balanced accuracy, mean of {found.num_folds} folds    logistic    tree"
    yield f"  {'linear head on the features':<38}{decimal(found.head):>8}"
    for row in found.facts:
        yield f"  {row['fact']:<38}{decimal(row['logistic']):>8}{decimal(row['tree']):>8}"


def _wrapped(text: str) -> Iterator[str]:
    import textwrap

    yield from textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="  ")
