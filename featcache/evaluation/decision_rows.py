"""The rows that a threshold is chosen by, with the scores of the positive class.

They are of ``valid``, or the out-of-fold rows of ``crossval``; and it is told whether they fitted
the head or chose anything of it.

Reads: the cache of a run, or the folder of a cross-validation. Writes: nothing.
"""

from __future__ import annotations

import csv
import hashlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.reading import Cache, open_cache
from featcache.errors import CacheError, RunError
from featcache.evaluation.predicted_rows import labelled_rows, predict_rows
from featcache.evaluation.seen_rows import find_seen
from featcache.files import join_names, json_sha256, local_path, plain_cell, read_regular
from featcache.heads.config import check_valid_fraction
from featcache.heads.rows import choose_rows
from featcache.heads.run import Run, cache_path, require_own_cache
from featcache.untrusted import parse_json_object, reading_hint, why_no_file

GUARANTEE, ESTIMATE = "guarantee", "estimate"
CROSSVAL = "cross-validated bound, not a guarantee"

_MAX_BYTES = 1 << 31
_AGAIN = "Make it with featcache crossval"


@dataclass(frozen=True)
class ScoredRows:
    """Rows with the probability of the positive class.

    Attributes:
        scores: (n,) probabilities.
        is_positive: (n,)
        groups: n names, empty where a row has none; None where no row has one.
        on: ``valid`` or ``crossval``.
        basis: ``guarantee``, ``estimate`` or ``cross-validated bound, not a guarantee``.
        reason: Why, in words.
        where: The file they are of.
    """

    scores: npt.NDArray[np.float64]
    is_positive: npt.NDArray[np.bool_]
    groups: list[str] | None
    on: str
    basis: str
    reason: str
    where: Path


def read_valid(run: Run, positive: str) -> ScoredRows:
    """Return the rows of ``valid``, or of the hold-out where the cache has no such split.

    Raises:
        RunError: If the run's cache is gone or has changed.
        CacheError: If it is damaged, or has no labelled rows of the class in ``valid``.
    """
    cache = _open_unchanged(run)
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
            reason = f"the head was trained on {trained:,} of these rows: too good"
        elif chosen:
            reason = "these rows also chose the head's epoch"
        elif not unclear:
            basis, reason = GUARANTEE, "these rows neither fitted nor chose anything"
    rows = predict_rows(run, cache, split.name, numbers, lambda _: None, average_views=False)
    column = run.classes.index(positive)
    targets = rows.targets
    known = np.ones(len(targets), bool)
    if rows.has_labels:
        known, targets = ~np.isnan(targets[:, column]), targets[:, column] == 1
    else:
        targets = targets == column
    groups = [rows.groups[row] for row in np.flatnonzero(known).tolist()]
    return _require_positive(
        ScoredRows(
            rows.probs[known, column], targets[known], groups if any(groups) else None, "valid",
            basis, reason, cache.path,
        ),
        positive, "split valid",
    )  # fmt: skip


def read_folds(run: Run, folder: str | Path, positive: str) -> ScoredRows:
    """Return the out-of-fold rows of a cross-validation of the run's cache and options.

    Of several repeats the first: its scores are, as those of the run, of one head each. Rows of
    ``test`` are left out.

    Raises:
        RunError: If the folder is no whole cross-validation, or is of another head, of other
            options or of another cache.
        CacheError: If it has no rows of the class.
    """
    place = local_path(folder, "--on")
    facts = _read_facts(place)
    _require_same(run, facts, place)
    data = _read(place, "predictions.csv")
    if hashlib.sha256(data).hexdigest() != facts.get("predictions_sha256"):
        raise _damaged(place, "the sha256 that crossval.json names", "another predictions.csv")
    scores, is_positive, groups = _parse(data, run, positive, place)
    rows = ScoredRows(
        np.array(scores, np.float64), np.array(is_positive, bool), groups if any(groups) else None,
        "crossval", CROSSVAL, "the scores are of the heads of the folds, not of this one", place,
    )  # fmt: skip
    return _require_positive(rows, positive, "cross-validation")


def _open_unchanged(run: Run) -> Cache:
    path = cache_path(run)
    if found := why_no_file(path):
        raise RunError(
            "the run's cache", expected="the cache it was trained on", found=found, where=path,
            hint="Put it back, or train again",
        )  # fmt: skip
    cache = open_cache(path)
    require_own_cache(run, cache.identity, path)
    if cache.payload_sha256 != run.cache.get("payload_sha256"):
        raise RunError(
            "the run's cache", expected="the one it was trained on", found="one that has changed",
            where=path, hint="Train again on it",
        )  # fmt: skip
    return cache


def _require_positive(rows: ScoredRows, positive: str, what: str) -> ScoredRows:
    if not rows.is_positive.any():
        raise CacheError(
            what, expected=f"labelled rows of {positive}", found="none", where=rows.where,
            hint="Choose the threshold by out-of-fold rows: featcache crossval, then --on FOLDER",
        )  # fmt: skip
    return rows


def _read(folder: Path, name: str) -> bytes:
    try:
        return read_regular(folder / name, max_bytes=_MAX_BYTES)
    except OSError as error:
        raise RunError(
            "--on", expected=f"valid, or a folder with {name}", found=error.strerror, where=folder,
            hint=reading_hint(error, _AGAIN),
        ) from error  # fmt: skip


def _read_facts(folder: Path) -> dict[str, Any]:
    try:
        facts = parse_json_object(_read(folder, "crossval.json"))
        digest = json_sha256(facts, without="sha256")
    except ValueError as error:
        raise _damaged(folder, "a JSON object in crossval.json", error) from error
    if facts.get("format") != "featcache-crossval":
        raise _damaged(folder, "format featcache-crossval", "another")
    if facts.get("format_version") != 1:
        raise _damaged(folder, "format version 1", facts.get("format_version"))
    if digest != facts.get("sha256"):
        raise _damaged(folder, "its own sha256", "another")
    return facts


def _require_same(run: Run, facts: dict[str, Any], folder: Path) -> None:
    """Refuse a cross-validation of another cache, head or training."""
    cache, training = facts.get("cache"), facts.get("training")
    cache = cache if isinstance(cache, dict) else {}
    training = training if isinstance(training, dict) else {"training": None}
    if cache.get("payload_sha256") != run.cache.get("payload_sha256"):
        found = "another cache"
    elif facts.get("head") != run.head.as_json():
        found = "another head"
    elif facts.get("classes") != [*run.classes]:
        found = "other classes"
    else:
        auto = {"batch_size"} if training.get("batch_size") == "auto" else set()  # a number in RUN
        keys = [k for k, v in training.items() if run.training.get(k) != v and k not in auto]
        found = f"another {keys[0]}, {training[keys[0]]}" if keys else ""
    if found:
        raise RunError(
            "cross-validation", expected="one of the run's cache, head and options", found=found,
            where=folder, hint="Call featcache crossval with the run's cache and options",
        )  # fmt: skip


def _parse(
    data: bytes, run: Run, positive: str, folder: Path
) -> tuple[list[float], list[bool], list[str]]:
    """Return score, whether it is positive, and group of the rows of the first repeat."""
    has_labels = run.task == "multilabel"
    words = ("targets", "unknown", "preds") if has_labels else ("target", "pred")
    first = ["split", "fold", "repeat", "path", "group", *words]
    csv.field_size_limit(min(sys.maxsize, 1 << 30))
    scores, is_positive, groups = list[float](), list[bool](), list[str]()
    try:
        table = csv.reader(io.StringIO(data.decode(), newline=""))
        header = next(table, [])
        if header[: len(first)] != first or len(header) != len(first) + len(run.classes):
            raise _damaged(folder, "the columns of crossval in predictions.csv", "others")
        column, name = len(first) + run.classes.index(positive), join_names([positive])
        for row in table:
            if row[0] == "test" or row[2] != "1":
                continue
            if has_labels:
                if name in _names(plain_cell(row[6])):
                    continue
                is_positive.append(name in _names(plain_cell(row[5])))
            else:
                is_positive.append(plain_cell(row[5]) == positive)
            groups.append(plain_cell(row[4]))
            scores.append(float(row[column]))
    except (ValueError, IndexError, csv.Error) as error:
        raise _damaged(folder, "numbers and names in predictions.csv", error) from error
    if not np.isfinite(scores).all() or any(not 0 <= score <= 1 for score in scores):
        raise _damaged(folder, "probabilities in predictions.csv", "others")
    return scores, is_positive, groups


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


def _damaged(folder: Path, expected: str, found: object) -> RunError:
    return RunError(
        "cross-validation", expected=expected, found=found, where=folder,
        hint="It is damaged or was edited: make it again with featcache crossval",
    )  # fmt: skip
