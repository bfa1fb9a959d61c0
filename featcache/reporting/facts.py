"""Gather what a page about a run says: figures of valid and test, history, audit, provenance.

Reads: a run, and the caches it was trained on. Writes: nothing.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.reading import Cache
from featcache.cache.side_by_side import caches_of
from featcache.cache.verdict import read_verdict
from featcache.errors import ConfigError
from featcache.evaluation.deciding.decided_rows import measure_decisions
from featcache.evaluation.deciding.decision_file import Decisions, load_decisions
from featcache.evaluation.deciding.rates import known_groups, rates_of_images
from featcache.evaluation.intervals import measure_intervals
from featcache.evaluation.predicted_rows import PredictedRows, predict_rows
from featcache.evaluation.seen_rows import find_seen
from featcache.files import read_regular
from featcache.formatting import join_few
from featcache.heads.config import check_valid_fraction
from featcache.heads.rows import RowNumbers, choose_rows, find_labelled
from featcache.heads.run import Run
from featcache.heads.run_caches import is_own, open_own_caches
from featcache.metrics.calibration import measure_calibration
from featcache.metrics.scores import compute_metrics
from featcache.untrusted import parse_json_object

_MAX_BYTES = 1 << 26
_MAP_ROWS = 600  # points of the map that are drawn, each split's share

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Positive:
    """The class that is looked for, and the threshold from which on it is called.

    Attributes:
        name: The class.
        column: Its index.
        threshold: Called positive where its probability is >= it.
        rule: What ``decide`` wrote; None where it was not called for this class.
    """

    name: str
    column: int
    threshold: float
    rule: Mapping[str, Any] | None


@dataclass(frozen=True)
class SplitFacts:
    """The labelled rows of a split, with what a head makes of them.

    Attributes:
        name: ``valid`` or ``test``.
        split: The split of the cache that they are of.
        source: What the rows are, for people: ``split valid``, or the hold-out of the training.
        rows: n rows with their predictions.
        metrics: ``metrics.scores.compute_metrics``.
        intervals: Of them, ``measure_intervals``.
        calibration: ``measure_calibration``.
        is_fresh: Whether they neither fitted nor chose anything; None where that cannot be told.
        freshness: The same in words.
        num_failed: Images of the split that could not be read.
        positive: The class that is looked for, or None.
        decided: What its threshold does to them, ``measure_decisions``; None without ``decide``.
        by: Subgroups of the last ``evaluate --by`` on this split, or None.
    """

    name: str
    split: str
    source: str
    rows: PredictedRows
    metrics: dict[str, Any]
    intervals: dict[str, Any]
    calibration: dict[str, Any]
    is_fresh: bool | None
    freshness: str
    num_failed: int
    positive: Positive | None
    decided: dict[str, Any] | None
    by: dict[str, Any] | None

    def known(self, column: int) -> npt.NDArray[np.int64]:
        """Return the numbers of the rows where it is known whether they are of a class."""
        if self.rows.has_labels:
            return np.flatnonzero(~np.isnan(self.rows.targets[:, column]))
        return np.arange(len(self.rows.targets))

    def answers(self, column: int) -> tuple[npt.NDArray[np.bool_], _Floats]:
        """Return of these rows whether they are of the class, and its probability."""
        known, targets = self.known(column), self.rows.targets
        is_yes = targets[known, column] == 1 if self.rows.has_labels else targets[known] == column
        return is_yes, self.rows.probs[known, column]

    def groups(self, column: int) -> list[str] | None:
        """Return the groups of these rows, None where no row has one."""
        return known_groups([self.rows.groups[row] for row in self.known(column).tolist()])

    @cached_property
    def rates(self) -> dict[str, Any] | None:
        """Recall and specificity of the positive class at its threshold; None without one."""
        if self.positive is None:
            return None
        is_yes, scores = self.answers(self.positive.column)
        groups = self.groups(self.positive.column)
        return rates_of_images(scores, is_yes, self.positive.threshold, groups)

    @property
    def units(self) -> dict[str, Any]:
        """What the intervals rest on."""
        return {name: self.intervals[name] for name in ("num_groups", "num_ungrouped")}


@dataclass(frozen=True)
class FeatureMap:
    """Features of a cache on their first two principal components.

    Attributes:
        points: (n, 2).
        targets: n class names, empty for an unlabelled row or several labels.
        splits: n names.
        shares: Of the variance, for both axes.
        num_rows: Of the cache; the points are a part of them.
    """

    points: _Floats
    targets: list[str]
    splits: list[str]
    shares: tuple[float, float]
    num_rows: int


@dataclass(frozen=True)
class Facts:
    """All that a page about a run says.

    Attributes:
        run: The run.
        cache: What it was trained on.
        is_own_cache: Whether that is still what it was.
        positive: The class that is looked for, or None.
        valid: Figures of the rows that thresholds are chosen by; None where there are none.
        no_valid: Why there are none.
        test: Figures of split ``test``, or None.
        audits: A verdict for each cache, or None.
        history: ``history.csv``: its columns, None where it is not there or no table of numbers.
        trials: ``trials.csv``: its rows, or None.
        sweep: ``sweep.json``, or None.
        environment: ``environment.json``, empty where it is not there.
        feature_map: The map of the features.
    """

    run: Run
    cache: Cache
    is_own_cache: bool
    positive: Positive | None
    valid: SplitFacts | None
    no_valid: str
    test: SplitFacts | None
    audits: list[dict[str, Any] | None]
    history: dict[str, list[float]] | None
    trials: list[dict[str, str]] | None
    sweep: dict[str, Any] | None
    environment: dict[str, Any]
    feature_map: FeatureMap


def gather(run: Run, positive: str | None) -> Facts:
    """Return what a page about a run says.

    Args:
        run: The run.
        positive: The class that is looked for; None takes that of ``decide``, if there is one.

    Raises:
        RunError: If the run's cache is gone, or its decision is damaged.
        CacheError: If the cache is damaged.
        ConfigError: If ``positive`` is not a class.
    """
    decisions = load_decisions(run)
    looked_for = _positive(run, decisions, positive)
    cache = open_own_caches(run)
    valid, no_valid = _valid(run, cache, decisions, looked_for)
    test = None
    if "test" in cache.splits and len(rows := find_labelled(cache.split("test").targets)):
        test = _measure(run, cache, "test", "split test", rows, decisions, looked_for)
    return Facts(
        run=run, cache=cache, is_own_cache=is_own(run, cache), positive=looked_for,
        valid=valid, no_valid=no_valid, test=test,
        audits=[read_verdict(each) for each in caches_of(cache)],
        history=_history(run.path / "history.csv"),
        trials=_table(run.path / "trials.csv"),
        sweep=_json(run.path / "sweep.json"),
        environment=_json(run.path / "environment.json") or {},
        feature_map=_map(cache),
    )  # fmt: skip


def _positive(run: Run, decisions: Decisions | None, wanted: str | None) -> Positive | None:
    if wanted is not None and wanted not in run.classes:
        raise ConfigError("--positive", expected="one of " + join_few(run.classes), found=wanted)
    rules = {} if decisions is None else decisions.rules
    name = next(iter(rules), None) if wanted is None else wanted
    if name is None:
        return None
    rule = rules.get(name)
    threshold = 0.5 if rule is None else float(rule["threshold"])
    return Positive(name, run.classes.index(name), threshold, rule)


def _valid(
    run: Run, cache: Cache, decisions: Decisions | None, positive: Positive | None
) -> tuple[SplitFacts | None, str]:
    """Return the figures of ``valid``, or of the hold-out where the cache has no such split."""
    if run.members:
        return None, (
            "This run is the mean of several heads, and every row of valid trained some of them: "
            "no row is left to choose a threshold by. The folder of the cross-validation has one."
        )
    if "valid" in cache.splits:
        if len(rows := find_labelled(cache.split("valid").targets)):
            return _measure(run, cache, "valid", "split valid", rows, decisions, positive), ""
        return None, "Split valid has no labelled row."
    if not is_own(run, cache):
        return None, "The cache has no split valid, and has changed since the training."
    fraction = check_valid_fraction(run.training.get("valid_fraction"))
    part = choose_rows(cache, fraction, run.data_seed, lambda _: None)[1]
    source = "rows of train that were held out of the training"
    return _measure(run, cache, part.split.name, source, part.rows, decisions, positive), ""


def _measure(  # noqa: PLR0917 (what is measured, and by what)
    run: Run, cache: Cache, split: str, source: str, numbers: RowNumbers,
    decisions: Decisions | None, positive: Positive | None,
) -> SplitFacts:  # fmt: skip
    rows = predict_rows(run, cache, split, numbers, lambda _: None, average_views=False)
    name = None if positive is None else positive.name
    decided = measure_decisions(decisions, rows) or {}
    is_fresh, freshness = _freshness(run, cache, split, numbers)
    return SplitFacts(
        name="test" if split == "test" else "valid",
        split=split,
        source=source,
        rows=rows,
        metrics=compute_metrics(rows.targets, rows.probs, rows.classes, name),
        intervals=measure_intervals(rows, name),
        calibration=measure_calibration(rows.targets, rows.probs, rows.classes),
        is_fresh=is_fresh,
        freshness=freshness,
        num_failed=sum(failure.split == split for failure in cache.failures),
        positive=positive,
        decided=decided.get(name or ""),
        by=_subgroups(run, cache, split, name),
    )


def _freshness(
    run: Run, cache: Cache, split: str, numbers: RowNumbers
) -> tuple[bool | None, str]:  # fmt: skip
    seen = find_seen(run, cache, cache.split(split), numbers)
    if seen is None:
        return None, "It cannot be told whether the head has seen these images."
    trained, chosen, unclear = seen.counts
    if trained:
        return False, (
            f"The head was trained on {trained:,} of these images: these figures are too good."
        )
    if chosen:
        return False, (
            f"{chosen:,} of these images also chose the epoch of the head: these figures are a "
            "little too good."
        )
    if unclear:
        return None, f"Of {unclear:,} of these images it cannot be told whether the head saw them."
    return True, "The head was neither trained on these images nor chosen by them."


def _subgroups(run: Run, cache: Cache, split: str, positive: str | None) -> dict[str, Any] | None:
    """Return the subgroups that the last ``evaluate --by`` found, if they are of this cache."""
    facts = _json(run.path / "evaluation" / f"{split}.json") or {}
    by = facts.get("by")
    if facts.get("fingerprint") != cache.fingerprint or facts.get("positive") != positive:
        return None
    try:
        for part in by["subgroups"]:  # type: ignore[index]  # or TypeError
            for figure in part["figures"].values():
                _check_figure(figure)
            _ = part["value"], int(part["num_samples"])
        _ = str(by["column"]), str(by["unit"]), int(by["least_units"])  # type: ignore[index]
    except (TypeError, KeyError, ValueError, AttributeError):
        return None
    return by if isinstance(by, dict) and by["subgroups"] else None


def _check_figure(figure: Mapping[str, Any]) -> None:
    numbers = [figure["value"], *(figure["interval"] or ())]
    if not all(number is None or math.isfinite(number) for number in numbers):
        raise ValueError
    _ = bool(figure["too_few"])


def _json(path: Path) -> dict[str, Any] | None:
    """Return a JSON object that is for people, None where it is not there or is damaged."""
    try:
        return parse_json_object(read_regular(path, max_bytes=_MAX_BYTES))
    except (OSError, ValueError):
        return None


def _table(path: Path) -> list[dict[str, str]] | None:
    """Return the rows of a CSV, None where it is not there or is damaged."""
    try:
        text = read_regular(path, max_bytes=_MAX_BYTES).decode()
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except (OSError, ValueError, csv.Error):
        return None
    is_whole = all(None not in row and None not in row.values() for row in rows)
    return rows if rows and is_whole else None


def _history(path: Path) -> dict[str, list[float]] | None:
    """Return the columns of a history whose cells are all numbers."""
    rows = _table(path)
    if rows is None:
        return None
    columns: dict[str, list[float]] = {}
    for name in rows[0]:
        try:
            values = [float(row[name]) for row in rows]
        except ValueError:
            continue
        if all(map(math.isfinite, values)):
            columns[name] = values
    return columns or None


def _map(cache: Cache) -> FeatureMap:
    """Return the features on two axes: principal components, which are the same each time."""
    numbers = {
        name: np.unique(np.linspace(0, len(split) - 1, min(len(split), _MAP_ROWS)).astype(np.int64))
        for name, split in cache.splits.items() if len(split)
    }  # fmt: skip
    blocks, targets, splits = [], [], []
    for name, rows in numbers.items():
        split = cache.split(name)
        blocks.append(split.read_rows(rows).reshape(len(rows), -1).astype(np.float64))
        splits += [name] * len(rows)
        for target in split.targets[rows]:
            is_one = split.targets.ndim == 1 and target >= 0
            targets.append(cache.classes[int(target)] if is_one else "")
    features = np.concatenate(blocks)
    is_train = np.array([name in {"train", "all"} for name in splits])
    fitted = features[is_train] if is_train.any() else features
    centred = fitted - fitted.mean(axis=0)
    # Of the rows, as there are fewer of them than features or about as many.
    values, vectors = np.linalg.eigh(centred @ centred.T)
    axes = centred.T @ vectors[:, ::-1][:, :2]
    axes = np.pad(axes, ((0, 0), (0, 2 - axes.shape[1])))
    axes /= np.maximum(np.linalg.norm(axes, axis=0), np.finfo(np.float64).tiny)
    largest = np.abs(axes).argmax(axis=0)
    axes *= np.where(axes[largest, np.arange(2)] < 0, -1.0, 1.0)  # else the sign is by chance
    total = max(float(values.clip(0).sum()), np.finfo(np.float64).tiny)
    shares = [max(float(value), 0.0) / total for value in values[::-1][:2]] + [0.0]
    return FeatureMap(
        (features - fitted.mean(axis=0)) @ axes, targets, splits, (shares[0], shares[1]),
        sum(map(len, cache.splits.values())),
    )  # fmt: skip
