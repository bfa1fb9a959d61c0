"""Evaluate: measure the head of a run on the rows of a cache.

Reads: a run, a cache. Writes: ``RUN/evaluation/``, ``RUN/loss_curves.png``, and a CSV where asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from featcache.cache.by_url import by_url
from featcache.cache.side_by_side import Caches, list_caches
from featcache.errors import ConfigError, printable
from featcache.evaluation.comparison import OtherRun, comparison_lines
from featcache.evaluation.deciding.decided_rows import measure_decisions
from featcache.evaluation.deciding.decision_file import load_decisions
from featcache.evaluation.figure_files import FigureFiles
from featcache.evaluation.intervals import measure_intervals
from featcache.evaluation.lines import evaluation_lines
from featcache.evaluation.predicted_rows import CSV, labelled_rows, predict_rows
from featcache.evaluation.seen_rows import find_seen, leave_out_seen, warn_of_seen
from featcache.evaluation.subgroups import Column, subgroup_lines
from featcache.files import readable_json, result_as_dict
from featcache.formatting import brief_repr, join_few
from featcache.heads.run import load_run
from featcache.heads.run_caches import cache_paths, open_other_caches, open_own_caches
from featcache.heads.run_caches import is_own as is_own_cache
from featcache.metrics.calibration import measure_calibration
from featcache.metrics.scores import MAX_MATRIX_CLASSES, compute_metrics
from featcache.outputs import Output, write_outputs
from featcache.runtime import Say, log_line


@dataclass(frozen=True)
class Evaluation:
    """How good a head is on the labelled rows of a split. Also read by key: ``e["accuracy"]``.

    Attributes:
        split: The split.
        task: ``multiclass``, or ``multilabel``: several labels an image.
        num_samples: Labelled rows measured.
        classes: C class names.
        accuracy: Share of right predictions; with several labels, over the known targets.
        balanced_accuracy: Mean recall of the classes that have rows; None with several labels.
        roc_auc: Macro mean over the classes, each against the rest, whatever ``positive`` is; None
            where it is undefined.
        average_precision: Likewise.
        per_class: Class -> its figures, see ``metrics.scores.compute_metrics``.
        confusion_matrix: (C, C) counts, rows = target; None with several labels, or above 100
            classes.
        confusion_matrix_file: Above 100 classes, the CSV in the run with the cells that are not 0
            (``target, pred, num_samples``); None where nothing is kept in the run.
        positive: The class that is looked for, against the rest; the next five are None without.
        sensitivity: Its recall.
        specificity: The share of the rows of all other classes that are predicted as one of them.
        positive_roc_auc: Its ROC AUC, as in ``per_class``.
        positive_average_precision: Likewise.
        false_negatives: Paths of rows of the positive class that were predicted otherwise.
        mistakes: ``path, target, pred, prob`` of the wrong rows, the most confident first. With
            several labels ``path, class, target, pred, prob`` of each wrong label, ``prob`` being
            that of the class.
        num_failed: Images of the split that could not be read, and so were not measured.
        num_trained_on: Labelled rows of the split that the head was trained on, in this split or as
            an identical image in another; None where nothing tells. Like the next two counted
            before any is left out.
        num_chosen_by: Labelled rows that its epoch was chosen by.
        num_unclear: Labelled rows of which it cannot be told: they have the path of such a row, but
            other features, and there is no hash of one of the images.
        unseen: Whether these rows were left out.
        intervals: Two-sided 95 % intervals ``[low, high]``, None where undefined:
            ``accuracy`` and ``balanced_accuracy`` (None with several labels), ``sensitivity``,
            ``specificity``, ``per_class`` {class: {recall}}, ``roc_auc`` (of two classes; else
            None), ``positive_roc_auc``; with ``confidence``, ``method`` (that was used for rates:
            Wilson's where no two rows share a group; for areas see ``metrics.areas.auc_interval``,
            for balanced accuracy ``metrics.rates.mean_rate_interval``), ``num_groups`` (rows
            without a group count as one each), ``num_ungrouped`` of these (both None where there
            are no groups), and ``few``: ``class`` and ``num_samples`` of the smallest class, where
            these are below 100 and no two of one group, else None.
        calibration: ``brier``, ``log_loss``, ``ece`` and ``num_bins``, see
            ``metrics.calibration.measure_calibration``.
        decision: Class -> what its threshold does to these rows, see ``measure_decisions``; None
            where ``decide`` was not called. All other figures are of the most probable class.
        by: The figures of each subgroup, see ``subgroups.measure_subgroups``; None where none are
            asked for.
        against: A second run on the same rows, see ``comparison.compare_rows``; or None.
        num_views: Views of a row whose probabilities were averaged; 1 is view 0 alone.
        fingerprint: Of the cache's identity.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    split: str
    task: str
    num_samples: int
    classes: tuple[str, ...]
    accuracy: float
    balanced_accuracy: float | None
    roc_auc: float | None
    average_precision: float | None
    per_class: dict[str, dict[str, Any]]
    confusion_matrix: list[list[int]] | None
    confusion_matrix_file: str | None
    positive: str | None
    sensitivity: float | None
    specificity: float | None
    positive_roc_auc: float | None
    positive_average_precision: float | None
    false_negatives: list[str] | None
    mistakes: list[dict[str, Any]]
    num_failed: int
    num_trained_on: int | None
    num_chosen_by: int | None
    num_unclear: int | None
    unseen: bool
    intervals: dict[str, Any]
    calibration: dict[str, Any]
    decision: dict[str, dict[str, Any]] | None
    by: dict[str, Any] | None
    against: dict[str, Any] | None
    num_views: int
    fingerprint: str

    def __getitem__(self, key: str) -> Any:
        """Return a figure by its name in the JSON file."""
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the figures, as a dict does."""
        return iter(self.keys())

    def keys(self) -> tuple[str, ...]:
        """Return the names of the figures."""
        return tuple(field.name for field in fields(self))

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values: what ``RUN/evaluation/SPLIT.json`` holds."""
        return result_as_dict(self)


@by_url(makes="csv", replaces=True)
@by_url("cache", "against", adds_to="run", must_add=False)
def evaluate(
    run: str | Path,
    *,
    cache: Caches | None = None,
    split: str = "test",
    positive: str | None = None,
    csv: str | Path | None = None,
    average_views: bool = False,
    unseen: bool = False,
    by: str | None = None,
    table: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    against: str | Path | None = None,
    say: Say = log_line,
) -> Evaluation:
    """Measure the head of a run on the labelled rows of a split.

    Rows that the head was trained on, or that its epoch was chosen by, are warned of: they are
    found by their images' hashes, in any cache, where there are none by their features. Rows with
    several views are predicted by view 0, the plain image. The figures of the run's own
    cache are also written to ``RUN/evaluation/SPLIT.json``, with pictures of the confusion matrix,
    the ROC curves and the reliability and, above 100 classes, the matrix's cells as a CSV. The
    losses by epoch are drawn as ``RUN/loss_curves.png``, unless that is there.

    Args:
        run: The run folder.
        cache: The cache to take the split from; None takes the one the run was trained on, which
            must still be the same. Classes of another cache are matched by name; it may have some
            of them only. Of a run of several caches, as many, in any order.
        split: ``test`` unless told otherwise.
        positive: The class that is looked for, against all others; never guessed. It gives
            sensitivity, specificity, its ROC AUC and average precision, and its false negatives.
        csv: A file for path, group, target, prediction and probabilities of every labelled row.
            With several labels, targets, unknown and predictions are names joined by ``|``. With a
            threshold there is a column ``decision`` after the prediction.
        average_views: Predict a row by the mean of its views' probabilities.
        unseen: Leave out the rows that the head has seen, and those of which it cannot be told;
            with ``against`` also those that its head has seen.
        by: Measure each subgroup too: a column of ``table``, or ``group`` without one.
        table: A CSV with the columns ``path`` and ``by``; rows that it does not name are a subgroup
            of their own.
        columns: ``{"path": HEADER}`` where the path's column has another header.
        against: A second run of the same classes, which is measured on the same rows: on the same
            cache, or on its own if that has the same images.
        say: Receives the lines for people.

    Raises:
        RunError: If the run is damaged, its cache is gone or changed, features or classes are not
            those it was trained on, or ``decision.json`` is damaged or of another head.
        CacheError: If the cache is damaged, lacks the split or has no labelled rows in it; with
            ``unseen``, no such rows that the head has not seen.
        ConfigError: If ``positive`` is not a class, ``csv`` cannot be written, there are no views
            to average, or ``by``, ``table`` and ``columns`` do not go together.
        DataError: If the table is none, or lacks the column or all the images.

    Example:
        >>> featcache.evaluate("run", positive="covid").sensitivity  # doctest: +SKIP
    """
    loaded = load_run(run)
    _check_positive(positive, loaded.classes)
    decisions = load_decisions(loaded)
    column = Column(by, table, columns)
    other = None if against is None else OtherRun(against, loaded, positive)
    inputs = [*([] if cache is None else list_caches(cache)), *cache_paths(loaded), table]
    tables = [Output(csv, "--csv", CSV, inputs=inputs)] if csv else []
    for output in tables:
        output.check()
    opened = open_own_caches(loaded) if cache is None else open_other_caches(loaded, cache)
    is_own = cache is None or is_own_cache(loaded, opened)
    figures = FigureFiles(loaded, split) if is_own else None
    labelled = labelled_rows(opened, split, say)
    seen = find_seen(loaded, opened, opened.split(split), labelled)
    if unseen:
        labelled = leave_out_seen(labelled, seen, opened, split, say)
    if other is not None:
        labelled = other.find_rows(
            opened, opened.split(split), labelled, open_own_caches, unseen=unseen, say=say
        )
    rows = predict_rows(loaded, opened, split, labelled, say, average_views=average_views)
    if not unseen:
        hint = "these figures are too good. Leave such rows out with --unseen"
        warn_of_seen(seen, split, hint)
    counts = (None, None, None) if seen is None else seen.counts
    confusions = rows.confusions()
    in_file = is_own and len(loaded.classes) > MAX_MATRIX_CLASSES and confusions is not None
    result = Evaluation(
        split=split,
        task=loaded.task,
        num_samples=len(rows.targets),
        classes=loaded.classes,
        **compute_metrics(rows.targets, rows.probs, loaded.classes, positive),
        confusion_matrix_file=f"evaluation/{split}_confusion.csv" if in_file else None,
        false_negatives=rows.false_negatives(positive),
        mistakes=rows.mistakes(),
        num_failed=sum(failure.split == split for failure in opened.failures),
        num_trained_on=counts[0],
        num_chosen_by=counts[1],
        num_unclear=counts[2],
        unseen=unseen,
        intervals=measure_intervals(rows, positive),
        calibration=measure_calibration(rows.targets, rows.probs, loaded.classes),
        decision=measure_decisions(decisions, rows),
        by=column.measure(rows, positive, opened.split(split), labelled, say),
        against=None
        if other is None
        else other.compare(rows, positive, say, average_views=average_views),
        num_views=opened.split(split).num_views if average_views else 1,
        fingerprint=opened.fingerprint,
    )
    decided = None if decisions is None else decisions.apply(rows.probs)
    files = {output: rows.as_csv(decided).encode() for output in tables}
    for line in (
        *evaluation_lines(result, confusions or []),
        *subgroup_lines(result.by, positive),
        *comparison_lines(result.against),
    ):
        say(line)
    if figures is not None:
        figures.write(
            readable_json(result.as_dict()).encode(), rows, accuracy=result.accuracy,
            confusions=confusions, decisions=decisions, positive=positive, has_cells=in_file,
            others=files, say=say,
        )  # fmt: skip
    else:
        if files:
            write_outputs(files)
        say("not kept in the run: another cache's figures would pass for its own")
    for output in files:
        say(f"written to {printable(output.path)}")
    return result


def _check_positive(positive: str | None, classes: Sequence[str]) -> None:
    if positive is not None and positive not in classes:
        raise ConfigError("--positive", expected="one of " + join_few(classes), found=positive)
