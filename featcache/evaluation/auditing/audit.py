"""Audit: cache -> copies, wrong labels, shortcuts, outliers and sources, before training.

A part is one call that returns facts (JSON values), and one function in ``lines`` that makes
lines of them.

Reads: a cache; its images, where they are given; a table of sources. Writes: a verdict beside the
cache, and a CSV where one is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featcache.cache.by_url import by_url
from featcache.cache.reading import Cache, open_cache
from featcache.cache.verdict import write_verdict
from featcache.csv_files import csv_text
from featcache.data.groups import GroupPattern
from featcache.data.sources import Data
from featcache.errors import CacheError, ConfigError, printable
from featcache.evaluation.auditing.copies import (
    COLUMNS,
    EXAMPLES,
    FLOOR,
    AuditRows,
    NearPairs,
    copies_csv,
    find_near,
    find_same,
    join_copies,
    summarise_sets,
)
from featcache.evaluation.auditing.folds import FoldedRows
from featcache.evaluation.auditing.labels import measure_labels
from featcache.evaluation.auditing.lines import audit_lines, explain, judge
from featcache.evaluation.auditing.options import (
    COPIES,
    check_network,
    check_shares,
    check_table,
    choose_parts,
    has_sources,
)
from featcache.evaluation.auditing.outliers import measure_outliers
from featcache.evaluation.auditing.pictures import confirm_near
from featcache.evaluation.auditing.shortcuts import measure_shortcuts
from featcache.evaluation.auditing.sources import measure_sources, read_sources
from featcache.files import local_path, result_as_dict
from featcache.formatting import count
from featcache.heads.rows import training_source
from featcache.outputs import Kind, Output, write_output
from featcache.runtime import Say, log_line
from featcache.untrusted import MAX_PIXELS

if TYPE_CHECKING:
    from featcache.backbones.backbone import Backbone
    from featcache.evaluation.auditing.images import AuditImages

_KEPT_FIRST = ("test", "valid", "train", "all")  # of copies, when the others are dropped


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
        parts: Which of ``PARTS`` were looked at.
        splits: Rows per split.
        same: Rows of one image file, with ``data`` of one picture (decoded pixels at full size);
            also ``num_unknown``, rows that are not compared as neither an image's hash nor its
            pixels are known, and ``num_by_pixels``, sets of different files (None without
            ``data``).
        near: Rows of different files whose features are more alike than those of different images;
            also ``num_pairs``, ``is_cut`` (there are more pairs), ``threshold`` and ``median`` of
            cosines (None below 20 different rows), ``floor``, and ``pairs``: the most alike five
            with ``similarity`` and ``rows``. Candidates, if no image was read. With ``data``,
            ``pictures`` has ``threshold``, ``num_compared`` and ``num_rejected``, and a pair also
            ``confirmed`` (its similarity is then the agreement of pictures), ``mirrored`` and
            ``inverted``.
        labels: Rows whose label looks wrong: see ``labels.measure_labels``.
        shortcuts: Balanced accuracies of file facts beside those of a linear head on the same
            folds: see ``verdict`` and ``sentence``.
        outliers: Rows far from the others of their class: see ``outliers.measure_outliers``.
        sources: Whether sources are told within a class: see ``sources.measure_sources``;
            None too where no column names them.
        images: With ``data``, ``num_read``, and ``missing``, ``changed`` and ``unreadable`` with
            ``num_rows`` and up to five ``paths``; None without.
        blackout: The head on images without, and with only, their centre: see
            ``blackout.Blackout``.
        evidence: Where in the images the evidence of a head lies: see ``class_evidence.Evidence``.
        num_leaks: Sets of copies, same and near, across splits or of classes that conflict.
        verdict: A paragraph for people.
        csv: The CSV that was written.
        fingerprint: Of the cache's identity.
        content_sha256: Of its content.
    """

    __module__ = "featcache"

    cache: Path
    parts: tuple[str, ...]
    splits: dict[str, int]
    same: dict[str, Any] | None
    near: dict[str, Any] | None
    labels: dict[str, Any] | None
    shortcuts: dict[str, Any] | None
    outliers: dict[str, Any] | None
    sources: dict[str, Any] | None
    images: dict[str, Any] | None
    blackout: dict[str, Any] | None
    evidence: dict[str, Any] | None
    num_leaks: int
    verdict: str
    csv: Path | None
    fingerprint: str
    content_sha256: str

    def __repr__(self) -> str:
        leaks = count(self.num_leaks, "leak")
        return f"Audit({printable(self.cache.name)}: {', '.join(self.parts)}; {leaks})"

    def as_dict(self) -> dict[str, Any]:
        """Return the findings as JSON values."""
        return result_as_dict(self)


@by_url(makes="csv", replaces=True)
@by_url(adds_to="cache", must_add=False)
def audit(
    cache: str | Path,
    *,
    only: str | Sequence[str] | None = None,
    group_by: str | None = None,
    group_by_path: str | None = None,
    table: str | Path | None = None,
    source: str | None = None,
    columns: Mapping[str, str] | None = None,
    csv: str | Path | None = None,
    copies: str = "group",
    strict: bool = False,
    data: Data | None = None,
    blackout: float | Sequence[float] | None = None,
    evidence: bool = False,
    weights: str | Path | None = None,
    backbone: Backbone | str | None = None,
    device: str = "auto",
    max_pixels: int = MAX_PIXELS,
    say: Say = log_line,
) -> Audit:
    """Look for what would make a head look better than it is: copies, shortcuts, wrong labels.

    Copies are looked for in all splits. Everything else is of the labelled rows of train and valid
    (or of ``all``), never of test. No image is read without ``data``. Where both ``same`` and
    ``near`` were looked at, the verdict is kept beside the cache for ``train`` and ``info``, unless
    an earlier audit of the same content looked at more.

    Args:
        cache: The cache.
        only: Some of ``PARTS``; None for all, ``sources`` where a column names them. A cache
            without rows to train on has copies only.
        group_by: A regular expression whose first group, in the file name, is the group of a row,
            in place of the cache's groups.
        group_by_path: The same, in the path below the class.
        table: A CSV with ``path`` and the column ``source``.
        source: The column of ``table`` that names where an image comes from.
        columns: ``{"path": HEADER}`` where the path's column in ``table`` has another header.
        csv: A file that ``select --table`` takes: every row, copies in one group.
        copies: ``group`` or ``drop``: leave all but one of the copies out of ``csv``, preferably
            that of test; and all of them where their classes conflict.
        strict: Raise an error, at the end, if there are copies across splits or of two classes.
        data: The images it was made of, as ``extract`` took them: copies are then found by their
            pixels and pictures too, and shortcuts by sizes, colours, brightness and borders.
        blackout: Shares of the width and height of what the network sees: the head is also judged
            on images whose centre of that size is black, and on the centre alone. Needs ``data``.
        evidence: Whether to measure which share of the evidence for and against each class lies
            outside the middle of its images. Needs ``data``.
        weights: For ``blackout`` and ``evidence``, the weights file that the cache was made with,
            where the library's own were not used.
        backbone: For both, as for ``verify``.
        device: Where both compute.
        max_pixels: Larger images count as unreadable.
        say: Where lines for people go.

    Raises:
        CacheError: If the cache is damaged or a feature is not finite; with ``strict``, if there
            are leaks.
        ConfigError: If ``only`` names no part, an option lacks the other that it needs, or ``csv``
            cannot be written.
        BackboneError: If ``blackout`` or ``evidence`` cannot build the backbone.
        DataError: If the table or ``data`` cannot be read.

    Example:
        >>> featcache.audit("covid.h5", csv="copies.csv").num_leaks  # doctest: +SKIP
    """
    parts = choose_parts(only)
    if not has_sources(table, source, columns) and "sources" in parts:
        if only is not None:
            raise ConfigError(
                "--only sources", expected="a column that names them: --table CSV --source COLUMN",
                found="none",
            )  # fmt: skip
        parts = tuple(part for part in parts if part != "sources")
    check_table(parts, csv, copies)
    shares = check_shares(blackout)
    check_network({"--blackout": bool(shares), "--evidence": evidence}, data, weights)
    place = local_path(cache, "CACHE")
    output = None if csv is None else Output(csv, "--csv", _CSV, inputs=[place, table])
    if output is not None:
        output.check()
    pattern = GroupPattern.of(group_by, group_by_path)
    opened = open_cache(place)
    if only is None:
        parts = _without_unlearnable(opened, parts, say)
    if pattern is not None:
        _regroup(opened, pattern, say)
    rows = AuditRows.of(opened)
    sources = read_sources(table, source, rows.paths, say, columns) if table and source else []
    recipe, images, files = None, None, rows.images
    if data is not None:
        # torch is imported for images only
        from featcache.evaluation.auditing.blackout import blackout_recipe, measure_blackout
        from featcache.evaluation.auditing.class_evidence import measure_evidence
        from featcache.evaluation.auditing.images import read_images, with_pixels

        if shares or evidence:  # built first: it may fail, and images may be many
            recipe = blackout_recipe(opened, weights, backbone, max_pixels)
        images = read_images(rows, data, max_pixels)
        rows = with_pixels(rows, images)
    same = find_same(rows) if "same" in parts else []
    near = find_near(rows) if "near" in parts else None
    if near is not None and images is not None:
        near = confirm_near(rows, images, near)
    sets = join_copies(rows, same, near)
    folded = FoldedRows(opened, say) if {*parts} - COPIES or recipe else None
    found = Audit(
        cache=Path(cache), parts=parts,
        splits={name: len(split) for name, split in opened.splits.items()},
        same=None if "same" not in parts
        else summarise_sets(rows, same) | _same_facts(rows, same, files, images),
        near=None if near is None else _near_facts(rows, near),
        labels=measure_labels(folded, rows) if folded and "labels" in parts else None,
        shortcuts=result_as_dict(measure_shortcuts(opened, say, folded, images))
        if folded and "shortcuts" in parts else None,
        outliers=measure_outliers(folded, rows) if folded and "outliers" in parts else None,
        sources=measure_sources(folded, sources, str(source))
        if folded and "sources" in parts else None,
        images=None if images is None else images.as_dict(rows),
        blackout=None if folded is None or images is None or recipe is None or not shares
        else result_as_dict(measure_blackout(folded, images, recipe, shares, device, say)),
        evidence=None if folded is None or images is None or recipe is None or not evidence
        else result_as_dict(measure_evidence(folded, images, recipe, device, say)),
        num_leaks=sum(_is_leak(rows, copy) for copy in sets), verdict="",
        csv=None if csv is None else Path(csv),
        fingerprint=opened.fingerprint, content_sha256=opened.content_sha256,
    )  # fmt: skip
    found = dataclasses.replace(found, verdict=judge(found))
    if output is not None:
        write_output(output, _table_of(rows, sets, copies).encode())
    for line in audit_lines(found):
        say(line)
    if {*parts} >= COPIES:
        write_verdict(
            opened, parts=parts, num_images=found.images["num_read"] if found.images else 0,
            num_leaks=found.num_leaks, verdict=found.verdict, findings=_findings(found, rows, sets),
            say=say,
        )  # fmt: skip
    error = leak_error(found)
    if strict and error is not None:
        raise error
    return found


def _findings(found: Audit, rows: AuditRows, sets: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Return the verdict for people who run no commands."""
    leaks = [copies for copies in sets if _is_leak(rows, copies)]
    torn = [
        copies for copies in sets
        if not _is_leak(rows, copies) and len({rows.groups[row] for row in copies}) > 1
    ]  # fmt: skip
    return explain(found, [*map(len, leaks)], [*map(len, torn)])


def leak_error(found: Audit) -> CacheError | None:
    """Return the error of ``strict``, None where there are no leaks."""
    if not found.num_leaks:
        return None
    return CacheError(
        "--strict", expected="no copies across splits or of two classes",
        found=count(found.num_leaks, "set"), where=found.cache,
        hint="Look at them, write --csv, and make a cache of it with select --table",
    )  # fmt: skip


def _is_leak(rows: AuditRows, copies: Sequence[int]) -> bool:
    return len({rows.splits[row] for row in copies}) > 1 or rows.disagree(copies)


def _without_unlearnable(cache: Cache, parts: tuple[str, ...], say: Say) -> tuple[str, ...]:
    """Return the parts that a cache has rows for: without rows to train on, copies alone."""
    try:
        training_source(cache)
    except CacheError:
        say("copies only: there is no split train or all for the other parts")
        return tuple(part for part in parts if part in COPIES)
    return parts


def _regroup(cache: Cache, pattern: GroupPattern, say: Say) -> None:
    """Set the groups of all rows by a pattern; if it matches none, they stay as they are."""
    paths = [path for split in cache.splits.values() for path in split.paths]
    names = [*cache.classes, ""]  # the last is -1's
    classes = [
        "" if cache.task == "multilabel" else names[target]
        for split in cache.splits.values() for target in split.targets.tolist()
    ]  # fmt: skip
    found = pattern.find(paths, classes)
    groups = [group or path for group, path in zip(found, paths, strict=True)]
    labels = [name or "unlabelled" for name in classes]
    pattern.count_matches(found, labels, len({*groups}), say)
    if any(found):
        for split in cache.splits.values():
            split.groups, groups = groups[: len(split)], groups[len(split) :]


def _same_facts(
    rows: AuditRows, same: Sequence[Sequence[int]], files: npt.NDArray[np.int64],
    images: AuditImages | None,
) -> dict[str, Any]:  # fmt: skip
    if images is None:
        return {"num_unknown": int((~rows.has_hash).sum()), "num_by_pixels": None}
    return {
        "num_unknown": int((~rows.has_hash & ~images.is_read).sum()),
        "num_by_pixels": sum(len({*files[list(found)].tolist()}) > 1 for found in same),
    }


def _near_facts(rows: AuditRows, near: NearPairs) -> dict[str, Any]:
    pairs = zip(near.pairs[:EXAMPLES], near.similarities[:EXAMPLES], strict=True)
    looked = near.pictures
    return summarise_sets(rows, join_copies(rows, [], near)) | {
        "num_pairs": len(near.pairs), "is_cut": near.is_cut, "threshold": near.threshold,
        "median": near.median, "floor": FLOOR,
        "pairs": [
            {"similarity": float(similarity), "rows": [rows.describe(int(n)) for n in pair]}
            | ({} if looked is None else looked.describe(number))
            for number, (pair, similarity) in enumerate(pairs)
        ],
        "pictures": None if looked is None else {
            "threshold": looked.threshold, "num_compared": looked.num_compared,
            "num_rejected": looked.num_rejected,
        },
    }  # fmt: skip


def _table_of(rows: AuditRows, sets: Sequence[Sequence[int]], copies: str) -> str:
    """Return the CSV for ``select --table``: copies in one group, or one row of each set."""
    if copies == "group":
        return copies_csv(rows, sets)
    dropped = {row for found in sets for row in found}
    for found in sets:
        if not rows.disagree(found):
            dropped.remove(min(found, key=lambda row: _KEPT_FIRST.index(rows.splits[row])))
    kept = [row for row in range(len(rows.paths)) if row not in dropped]
    numbers = np.array(kept, np.int64)
    left = dataclasses.replace(
        rows, splits=[rows.splits[row] for row in kept], paths=[rows.paths[row] for row in kept],
        groups=[rows.groups[row] for row in kept], targets=rows.targets[numbers],
        images=rows.images[numbers], has_hash=rows.has_hash[numbers],
    )  # fmt: skip
    return copies_csv(left, [])
