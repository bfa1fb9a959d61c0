"""Gather what a page about a run says: figures of valid and test, history, audit, provenance.

Reads: a run, and the caches it was trained on. Writes: nothing.
"""

from __future__ import annotations

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
from featcache.errors import ConfigError, RunError, printable
from featcache.evaluation.deciding.decided_rows import measure_decisions
from featcache.evaluation.deciding.decision_file import Decisions, load_decisions
from featcache.evaluation.deciding.rates import known_groups, rates_of_images
from featcache.evaluation.deciding.scored_rows import OWN_HEADS, read_fold_rows
from featcache.evaluation.history import History, read_histories, read_table
from featcache.evaluation.intervals import measure_intervals
from featcache.evaluation.predicted_rows import PredictedRows, predict_rows
from featcache.evaluation.seen_rows import find_seen
from featcache.files import optional_json_object
from featcache.formatting import count, join_few
from featcache.heads.config import check_valid_fraction
from featcache.heads.rows import RowNumbers, choose_rows, find_labelled
from featcache.heads.run import Run
from featcache.heads.run_caches import is_own, open_own_caches
from featcache.metrics.calibration import measure_calibration
from featcache.metrics.scores import compute_metrics
from featcache.reporting.feature_map import FeatureMap, map_features
from featcache.sweeps.crossval_files import FACTS_NAME, ROWS_NAME

_MAX_BYTES = 1 << 26

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
        name: ``valid`` or ``test``; rows that thresholds are chosen by are called ``valid``.
        title: What they are called for people: ``valid``, ``test`` or ``out of fold``.
        splits: Of each row, the split of the cache that it is of.
        source: What the rows are, for people: ``split valid``, or the hold-out of the training.
        rows: n rows with their predictions.
        metrics: ``metrics.scores.compute_metrics``.
        intervals: Of them, ``measure_intervals``.
        calibration: ``measure_calibration``.
        freshness: Whether they fitted or chose anything, in words.
        num_failed: Images of the split that could not be read.
        positive: The class that is looked for, or None.
        decided: What its threshold does to them, ``measure_decisions``; None without ``decide``.
        by: Subgroups of the last ``evaluate --by`` on this split, or None.
    """

    name: str
    title: str
    splits: list[str]
    source: str
    rows: PredictedRows
    metrics: dict[str, Any]
    intervals: dict[str, Any]
    calibration: dict[str, Any]
    freshness: str
    num_failed: int
    positive: Positive | None
    decided: dict[str, Any] | None
    by: dict[str, Any] | None

    @property
    def of(self) -> str:
        """What they are images of, for people: ``of valid``, or ``out of fold``."""
        return f"of {self.title}" if self.title == self.name else self.title

    def key(self, row: int) -> tuple[str, str]:
        """Return split and path of a row."""
        return self.splits[row], self.rows.paths[row]

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
class Facts:
    """All that a page about a run says.

    Attributes:
        run: The run.
        cache: What it was trained on.
        is_own_cache: Whether that is still what it was.
        positive: The class that is looked for, or None.
        valid: Figures of the rows that thresholds are chosen by; None where there are none.
        no_valid: Why there are none.
        folds: Of an ensemble, the folder of its cross-validation; None where it is not at hand.
        test: Figures of split ``test``, or None.
        audits: A verdict for each cache, or None.
        histories: How each head was trained, ``history.csv``; empty where there is no such table.
        trials: ``trials.csv``: its rows, or None.
        sweep: ``sweep.json``, empty where it is not there.
        environment: ``environment.json``, empty where it is not there.
        feature_map: The map of the features.
    """

    run: Run
    cache: Cache
    is_own_cache: bool
    positive: Positive | None
    valid: SplitFacts | None
    no_valid: str
    folds: Path | None
    test: SplitFacts | None
    audits: list[dict[str, Any] | None]
    histories: list[History]
    trials: list[dict[str, str]] | None
    sweep: dict[str, Any]
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
    folds: Path | None = None
    if run.members:
        valid, no_valid = _out_of_fold(run, cache, decisions, looked_for)
        folds = None if valid is None else folds_of(run)
    else:
        valid, no_valid = _valid(run, cache, decisions, looked_for)
    test = None
    if "test" in cache.splits and len(rows := find_labelled(cache.split("test").targets)):
        test = _measure(run, cache, "test", "split test", rows, decisions, looked_for)
    return Facts(
        run=run, cache=cache, is_own_cache=is_own(run, cache), positive=looked_for,
        valid=valid, no_valid=no_valid, folds=folds, test=test,
        audits=[read_verdict(each) for each in caches_of(cache)],
        histories=read_histories(run),
        trials=read_table(run.path / "trials.csv") or None,
        sweep=optional_json_object(run.path / "sweep.json", max_bytes=_MAX_BYTES),
        environment=optional_json_object(run.path / "environment.json", max_bytes=_MAX_BYTES),
        feature_map=map_features(cache),
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


def folds_of(run: Run) -> Path:
    """Return where the cross-validation of an ensemble is looked for: the folder above the run."""
    return run.path.resolve().parent


def _out_of_fold(
    run: Run, cache: Cache, decisions: Decisions | None, positive: Positive | None
) -> tuple[SplitFacts | None, str]:
    """Return the out-of-fold figures of an ensemble's cross-validation, or what is missing."""
    lead = (
        f"This run is the mean of {count(run.num_members, 'head')}, and every row of valid trained "
        "some of them. Figures by heads that had not seen the image are in the folder of the "
        "cross-validation, "
    )
    try:
        repeats, reason = read_fold_rows(run, folds_of(run))
    except RunError as error:
        return None, (
            f"{lead}which is not at hand: {FACTS_NAME} and {ROWS_NAME} of this run, in the folder "
            f"above it ({printable(error.expected)}; found: {printable(error.found)})."
        )
    if reason != OWN_HEADS:
        return None, f"{lead}but the one in the folder above this run is of other heads."
    rule = {} if positive is None or positive.rule is None else positive.rule
    number = rule.get("repeat") if rule.get("on") == "crossval" else None
    number = number if number in repeats else min(repeats)
    found = repeats[number]
    freshness = "Each was judged by one head, which had not seen it; this run is the mean of these "
    freshness += f"{run.num_members:,} heads."
    if len(repeats) > 1:
        which = "the one that the threshold was decided on" if rule.get("repeat") else "the first"
        freshness += f" Of {len(repeats):,} repeats, repeat {number} is shown: {which}."
    splits = set(found.splits)
    return _figures(
        found.rows, decisions, positive, name="valid", title="out of fold", splits=found.splits,
        source="out of fold, by heads that had not seen the image",
        freshness=freshness, by=None,
        num_failed=sum(failure.split in splits for failure in cache.failures),
    ), ""  # fmt: skip


def _measure(  # noqa: PLR0917 (what is measured, and by what)
    run: Run, cache: Cache, split: str, source: str, numbers: RowNumbers,
    decisions: Decisions | None, positive: Positive | None,
) -> SplitFacts:  # fmt: skip
    rows = predict_rows(run, cache, split, numbers, lambda _: None, average_views=False)
    name = "test" if split == "test" else "valid"
    return _figures(
        rows, decisions, positive, name=name, title=name, splits=[split] * len(rows.paths),
        source=source, freshness=_freshness(run, cache, split, numbers),
        num_failed=sum(failure.split == split for failure in cache.failures),
        by=_subgroups(run, cache, split, None if positive is None else positive.name),
    )  # fmt: skip


def _figures(
    rows: PredictedRows, decisions: Decisions | None, positive: Positive | None, **said: Any
) -> SplitFacts:
    """Return the figures of rows, beside what is said of them."""
    name = None if positive is None else positive.name
    decided = measure_decisions(decisions, rows) or {}
    return SplitFacts(
        rows=rows,
        metrics=compute_metrics(rows.targets, rows.probs, rows.classes, name),
        intervals=measure_intervals(rows, name),
        calibration=measure_calibration(rows.targets, rows.probs, rows.classes),
        positive=positive,
        decided=decided.get(name or ""),
        **said,
    )


def _freshness(run: Run, cache: Cache, split: str, numbers: RowNumbers) -> str:
    """Return in words whether the head has seen the images."""
    seen = find_seen(run, cache, cache.split(split), numbers)
    if seen is None:
        return "It cannot be told whether the head has seen these images."
    trained, chosen, unclear = seen.counts
    if trained:
        return f"The head was trained on {trained:,} of these images: these figures are too good."
    if chosen:
        return (
            f"{chosen:,} of these images also chose the epoch of the head: these figures are a "
            "little too good."
        )
    if unclear:
        return f"Of {unclear:,} of these images it cannot be told whether the head saw them."
    return "The head was neither trained on these images nor chosen by them."


def _subgroups(run: Run, cache: Cache, split: str, positive: str | None) -> dict[str, Any] | None:
    """Return the subgroups that the last ``evaluate --by`` found, if they are of this cache."""
    path = run.path / "evaluation" / f"{split}.json"
    facts = optional_json_object(path, max_bytes=_MAX_BYTES)
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
