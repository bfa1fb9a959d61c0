"""The rows that a threshold is chosen by, with the scores of the positive class.

They are of ``valid``, or the out-of-fold rows of ``crossval``; and it is told whether they fitted
the head or chose anything of it.

Reads: the cache of a run, or the folder of a cross-validation. Writes: nothing.
"""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.csv_files import join_names, plain_cell
from featcache.errors import CacheError, RunError
from featcache.evaluation.deciding.rates import known_groups
from featcache.evaluation.predicted_rows import PredictedRows, labelled_rows, predict_rows
from featcache.evaluation.seen_rows import find_seen
from featcache.files import local_path
from featcache.heads.config import LBFGS, TrainingConfig, check_valid_fraction
from featcache.heads.rows import choose_rows
from featcache.heads.run import Run
from featcache.heads.run_caches import open_own_caches
from featcache.sweeps.crossval_files import damaged, read_crossval

GUARANTEE, ESTIMATE = "guarantee", "estimate"
OWN_HEADS = "each score is from one head, and this run is the mean of these heads"
CROSSVAL = "cross-validated bound, not a guarantee"


@dataclass(frozen=True)
class ScoredRows:
    """Rows with their probabilities, and what they may be used for.

    Attributes:
        probs: (n, C) probabilities. With several labels a row (n, 2): those of no and yes.
        targets: (n,) class indices, or with several labels 0 and 1.
        column: Of the positive class.
        paths: n paths.
        groups: n names, empty where a row has none; None where no row has one.
        on: ``valid`` or ``crossval``.
        basis: ``guarantee``, ``estimate`` or ``cross-validated bound, not a guarantee``.
        reason: Why, in words.
        where: The file they are of.
        repeat: Of a cross-validation, from 1; else None.
    """

    probs: npt.NDArray[np.float64]
    targets: npt.NDArray[np.int64]
    column: int
    paths: list[str]
    groups: list[str] | None
    on: str
    basis: str
    reason: str
    where: Path
    repeat: int | None = None

    @property
    def scores(self) -> npt.NDArray[np.float64]:
        """(n,) probabilities of the positive class."""
        return self.probs[:, self.column]

    @property
    def is_positive(self) -> npt.NDArray[np.bool_]:
        """(n,), whether a row is of the positive class."""
        positive: npt.NDArray[np.bool_] = self.targets == self.column
        return positive

    def is_lone(self, row: int) -> bool:
        """Return whether a row has no group but itself."""
        return is_lone("" if self.groups is None else self.groups[row], self.paths[row])


def is_lone(group: str, path: str) -> bool:
    """Return whether an image has no group but itself: none, or one that is named like its file.

    ``split`` names the group of an image that ``--group-by`` does not match by its path.
    """
    return not group or path == group or path.endswith("/" + group)


def read_valid(run: Run, positive: str) -> list[ScoredRows]:
    """Return the rows of ``valid``, or of the hold-out where the cache has no such split: one item.

    Raises:
        RunError: If the run's cache is gone or has changed, or the run is an ensemble, whose heads
            were trained on these rows.
        CacheError: If it is damaged, or has no labelled rows of the class in ``valid``.
    """
    if run.members:
        raise RunError(
            "--on", expected="the cross-validation's folder, as this run is the mean of its heads",
            found="valid, whose rows trained some of these heads", where=run.path,
            hint="Add --on FOLDER",
        )  # fmt: skip
    cache = open_own_caches(run, unchanged=True)
    if "valid" in cache.splits:
        split = cache.split("valid")
        numbers = labelled_rows(cache, "valid", lambda _: None)
    else:
        fraction = check_valid_fraction(run.training.get("valid_fraction"))
        part = choose_rows(cache, fraction, run.data_seed, lambda _: None)[1]
        split, numbers = part.split, part.rows
    seen = find_seen(run, cache, split, numbers)
    basis, reason = ESTIMATE, "it cannot be told whether the head has seen these rows"
    if seen is not None:
        trained, chosen, unclear = seen.counts
        if trained:
            reason = f"the head was trained on {trained:,} of these rows, so it is too good"
        elif chosen:
            reason = "the head's epoch was chosen on these rows"
        elif not unclear:
            basis, reason = GUARANTEE, "the head was neither trained nor chosen on these rows"
    rows = predict_rows(run, cache, split.name, numbers, lambda _: None, average_views=False)
    column = run.classes.index(positive)
    known, probs, targets = np.arange(len(rows.targets)), rows.probs, rows.targets
    if rows.has_labels:
        known = np.flatnonzero(~np.isnan(targets[:, column]))
        probs, targets = _of_one_label(probs[:, column]), targets[:, column] == 1
        column = 1
    paths = [rows.paths[row] for row in known.tolist()]
    groups = known_groups([rows.groups[row] for row in known.tolist()])
    found = ScoredRows(
        probs[known], targets[known].astype(np.int64), column, paths, groups, "valid", basis,
        reason, cache.path,
    )  # fmt: skip
    _require_positive(found, positive, "split valid")
    return [found]


def read_folds(run: Run, folder: str | Path, positive: str) -> list[ScoredRows]:
    """Return the out-of-fold rows of a cross-validation of the run's cache and options.

    Rows of ``test`` are left out.

    Returns:
        An item per repeat, of the same rows in the same order. They are not averaged: the mean of
        a row's probabilities is of several heads, so it spreads less than the scores of the run,
        and a threshold that is chosen by it is too high. See README.md of this folder.

    Raises:
        RunError: If the folder is no whole cross-validation, or is of another head, of other
            options or of another cache.
        CacheError: If it has no rows of the class.
    """
    place = local_path(folder, "--on")
    repeats, reason = read_fold_rows(run, place)
    column = run.classes.index(positive)
    found = []
    for number, of_repeat in repeats.items():
        rows = of_repeat.rows
        known, probs, targets = np.arange(len(rows.targets)), rows.probs, rows.targets
        if rows.has_labels:
            known = np.flatnonzero(~np.isnan(targets[:, column]))
            probs, targets = _of_one_label(probs[:, column]), targets[:, column] == 1
        found.append(ScoredRows(
            probs[known], targets[known].astype(np.int64), 1 if rows.has_labels else column,
            [rows.paths[row] for row in known.tolist()],
            known_groups([rows.groups[row] for row in known.tolist()]),
            "crossval", CROSSVAL, reason, place, number,
        ))  # fmt: skip
    _require_positive(found[0], positive, "cross-validation")
    return found


@dataclass(frozen=True)
class FoldRows:
    """The labelled rows of a repeat of a cross-validation, each with the scores of another head.

    Attributes:
        splits: n names of the splits that the rows are of.
        rows: The rows, with the probabilities that a head gives them which did not see them.
    """

    splits: list[str]
    rows: PredictedRows


def read_fold_rows(run: Run, folder: Path) -> tuple[dict[int, FoldRows], str]:
    """Return the out-of-fold rows of each repeat, from 1 on, and whose scores they are, in words.

    Rows of ``test`` are left out. Each repeat has the same rows in the same order.

    Raises:
        RunError: As ``read_folds``.
    """
    facts, data = read_crossval(folder)
    _require_same(run, facts, folder)
    reason = "the folds' heads made these scores, not this head (crossval --keep-ensemble helps)"
    if facts.get("ensemble_weights_sha256") == run.weights_sha256:
        reason = OWN_HEADS
    repeats = _parse(data, run, folder)
    found = {}
    for number, of_repeat in sorted(repeats.items()):
        probs = np.array(of_repeat.probs, np.float64).reshape(-1, len(run.classes))
        if not (np.isfinite(probs).all() and (probs >= 0).all() and (probs <= 1).all()):
            raise damaged(folder, "probabilities in predictions.csv", "others")
        if of_repeat.paths != repeats[min(repeats)].paths:
            raise damaged(folder, "the same rows in each repeat", f"others in repeat {number}")
        kind = np.float32 if run.task == "multilabel" else np.int64
        rows = PredictedRows(
            run.classes, [plain_cell(path) for _, path in of_repeat.paths], of_repeat.groups,
            np.array(of_repeat.targets, kind), probs,
        )  # fmt: skip
        found[number] = FoldRows([split for split, _ in of_repeat.paths], rows)
    if not found:
        raise damaged(folder, "rows in predictions.csv", "none")
    return found, reason


def _of_one_label(probs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.stack([1 - probs, probs], axis=1)


def _require_positive(rows: ScoredRows, positive: str, what: str) -> None:
    if not rows.is_positive.any():
        raise CacheError(
            what, expected=f"labelled rows of {positive}", found="none", where=rows.where,
            hint="Choose the threshold on out-of-fold rows: featcache crossval, then --on FOLDER",
        )  # fmt: skip


def _require_same(run: Run, facts: dict[str, Any], folder: Path) -> None:
    """Refuse a cross-validation of another cache, head or training."""
    training = facts["training"]
    hashes = [[cache.get("payload_sha256") for cache in of] for of in (facts["caches"], run.caches)]
    if hashes[0] != hashes[1]:
        found = "another cache"
    elif facts["head"] != run.head.as_json():
        found = "another head"
    elif facts["classes"] != [*run.classes]:
        found = "other classes"
    else:
        is_lbfgs = run.training.get("optimizer") == LBFGS
        options = TrainingConfig(optimizer=LBFGS if is_lbfgs else "adam").as_json()
        if training.get("batch_size") == "auto":  # a number in RUN
            options.pop("batch_size", None)
        wanted = options | run.training  # an older run does not name all
        keys = [key for key in options if training.get(key) != wanted[key]]
        found = f"another {keys[0]}, {str(training.get(keys[0]))[:100]}" if keys else ""
    if found:
        raise RunError(
            "cross-validation", expected="one of the run's cache, head and options", found=found,
            where=folder, hint="Call featcache crossval with the run's cache and options",
        )  # fmt: skip


@dataclass
class _Repeat:
    """The rows of a repeat in ``predictions.csv``, in their order."""

    paths: list[tuple[str, str]] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    targets: list[int | list[float]] = field(default_factory=list)
    probs: list[list[float]] = field(default_factory=list)


def _parse(data: bytes, run: Run, folder: Path) -> dict[int, _Repeat]:
    """Return the rows of each repeat."""
    has_labels = run.task == "multilabel"
    words = ("targets", "unknown", "preds") if has_labels else ("target", "pred")
    first = ["split", "fold", "repeat", "path", "group", *words]
    csv.field_size_limit(min(sys.maxsize, 1 << 30))
    found = dict[int, _Repeat]()
    try:
        table = csv.reader(io.StringIO(data.decode(), newline=""))
        header = next(table, [])
        if header[: len(first)] != first or len(header) != len(first) + len(run.classes):
            raise damaged(folder, "the columns of crossval in predictions.csv", "others")
        labels = [join_names([name]) for name in run.classes]
        for row in table:
            if row[0] == "test":
                continue
            targets = plain_cell(row[5])
            target: int | list[float]
            if has_labels:
                of_yes, unknown = _names(targets), _names(plain_cell(row[6]))
                target = [np.nan if n in unknown else float(n in of_yes) for n in labels]
            else:
                target = run.classes.index(targets)
            probs = [float(cell) for cell in row[len(first) :]]
            if len(probs) != len(run.classes):
                raise damaged(folder, "a probability of each class", f"{len(probs)} in a row")
            of_repeat = found.setdefault(int(row[2]), _Repeat())
            of_repeat.paths.append((row[0], row[3]))
            of_repeat.groups.append(plain_cell(row[4]))
            of_repeat.targets.append(target)
            of_repeat.probs.append(probs)
    except (ValueError, IndexError, csv.Error) as error:
        raise damaged(folder, "numbers and names in predictions.csv", error) from error
    return found


def _names(cell: str) -> list[str]:
    r"""Return the names of a cell that ``join_names`` made, as they stand in it: with ``\``."""
    names, escaped = [""], False
    for char in cell:
        if char == "|" and not escaped:
            names.append("")
        else:
            names[-1] += char
        escaped = char == "\\" and not escaped
    return names
