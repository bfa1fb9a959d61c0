"""Decide: choose the threshold of a positive class, and say what can be promised for it.

Reads: a run, and the cache it was trained on or the folder of a cross-validation.
Writes: ``RUN/decision.json``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import ConfigError, RunError, printable, warn_user
from featcache.evaluation.decision_file import REFER, decision_output, write_decision
from featcache.evaluation.decision_lines import decision_lines, unmet_wish
from featcache.evaluation.decision_rows import (
    ESTIMATE,
    GUARANTEE,
    ScoredRows,
    read_folds,
    read_valid,
)
from featcache.files import result_as_dict
from featcache.formatting import brief_repr, join_few
from featcache.heads.run import Run, load_run
from featcache.metrics.rates import lower_bound
from featcache.metrics.thresholds import (
    CONFIDENCE,
    Choice,
    Rate,
    check_wish,
    choose_for_recall,
    choose_for_specificity,
    measure_recall,
    measure_specificity,
    predictive_values,
    refer_below,
    unit_scores,
)
from featcache.runtime import Say, log_line

__all__ = ["ESTIMATE", "GUARANTEE", "DecideSummary", "decide"]


@dataclass(frozen=True)
class DecideSummary:
    """The threshold of a class, and what is known of it.

    Attributes:
        run: The run folder.
        positive: The class: called positive where its probability is >= ``threshold``.
        threshold: From 0 to 1.
        refer_below: Rows from ``threshold`` to below this one are referred; None without.
        wish: ``recall``, ``specificity`` or ``threshold`` -> the number that was asked for.
        on: ``valid`` or ``crossval``, where the rows are from.
        basis: What the bound is: ``guarantee``, ``estimate`` or
            ``cross-validated bound, not a guarantee``.
        reason: Why, in words.
        unit: ``group`` or ``image``: what the threshold was chosen by.
        num_without_group: Positive images of which no group is known.
        bound: One-sided exact 95 % lower bound of the wished rate, per unit.
        num_units: Units of the class that the wish is about.
        num_right: Of them, those on the right side.
        num_allowed: Units that may be on the wrong side, fixed by the number of units and the wish;
            None for a fixed threshold.
        is_reached: Whether the bound reaches the wish; None for a fixed threshold.
        num_needed: Units that would be needed with none on the wrong side; None likewise.
        image: Per image: ``recall`` and ``specificity``, each with ``hits``, ``total``, ``bound``
            (as of independent images) and ``interval`` (two-sided 95 %, respects groups), and
            ``share_positive``.
        group: Likewise per group, by its highest score; None without groups.
        refer: ``share``, ``num_referred`` and, among the other images, ``recall`` and
            ``specificity``; None without.
        prevalence: ``prevalence``, ``ppv`` and ``npv``; None without.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    run: Path
    positive: str
    threshold: float
    refer_below: float | None
    wish: dict[str, float]
    on: str
    basis: str
    reason: str
    unit: str
    num_without_group: int
    bound: float
    num_units: int
    num_right: int
    num_allowed: int | None
    is_reached: bool | None
    num_needed: int | None
    image: dict[str, Any]
    group: dict[str, Any] | None
    refer: dict[str, Any] | None
    prevalence: dict[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as JSON values."""
        return result_as_dict(self)


def decide(
    run: str | Path,
    *,
    positive: str,
    recall: float | None = None,
    specificity: float | None = None,
    threshold: float | None = None,
    on: str | Path = "valid",
    refer: float | None = None,
    prevalence: float | None = None,
    strict: bool = False,
    say: Say = log_line,
) -> DecideSummary:
    """Choose the threshold of a class and write it to ``RUN/decision.json``.

    ``evaluate`` and ``predict`` then show the decision beside the most probable class. The bound is
    called a guarantee only if the rows neither fitted the head nor chose anything of it.

    Args:
        run: The run folder.
        positive: The class that must not be missed. With several labels an image, each class may
            have a threshold: call once for each.
        recall: Wished share of the positive units that are found; units are groups, by their
            highest score, where there are groups.
        specificity: Or the wished share of the other units that are left alone.
        threshold: Or the threshold itself. One of these three.
        on: ``valid``, or the folder of ``crossval``. Never ``test``: it is to tell how good the
            threshold is.
        refer: Share of the images that may be referred: those just above the threshold.
        prevalence: Share of positives where it will be used: gives PPV and NPV there.
        strict: Write nothing and raise if the wish cannot be promised.
        say: Receives the lines for people.

    Raises:
        ConfigError: If an option is out of range, there is no wish or more than one, or the class
            is not there.
        CacheError: If the cache is damaged, or has no valid rows of the class.
        RunError: If the run or its cache is damaged or has changed, the cross-validation is of
            another head or cache, or ``strict`` and the wish cannot be promised.

    Example:
        >>> featcache.decide("run", positive="covid", recall=0.95).threshold  # doctest: +SKIP
    """
    wish = _only_wish(recall, specificity, threshold)
    for name, share in (("refer", refer), ("prevalence", prevalence)):
        if share is not None:
            check_wish(name, share)
    loaded = load_run(run)
    _check_class(loaded, positive, refer)
    output = decision_output(loaded)
    if str(on) == "test":
        raise ConfigError(
            "--on", expected="valid, or the folder of a cross-validation", found="test",
            hint="A threshold chosen on test could not be tested: evaluate does that",
        )  # fmt: skip
    rows = read_valid(loaded, positive) if str(on) == "valid" else read_folds(loaded, on, positive)
    summary = _choose(loaded, positive, wish, rows, refer, prevalence)
    warning = unmet_wish(summary)
    if strict and warning:
        raise RunError(
            f"--{next(iter(wish))}", expected=f"{summary.num_needed:,} or more {summary.unit}s",
            found=f"{summary.num_units:,}, which give {summary.bound:.3f}", where=rows.where,
            hint="Nothing was written: leave --strict out, or wish for less",
        )  # fmt: skip
    facts = summary.as_dict()
    del facts["run"]
    write_decision(output, loaded, facts)
    for line in decision_lines(summary):
        say(line)
    if warning:
        warn_user(warning)
    say(f"written to {printable(output.path.as_posix())}")
    return summary


def _only_wish(
    recall: float | None, specificity: float | None, threshold: float | None
) -> dict[str, float]:
    """Return the one wish that was given, checked."""
    given = {"recall": recall, "specificity": specificity, "threshold": threshold}
    wishes = {name: value for name, value in given.items() if value is not None}
    if len(wishes) != 1:
        found = " and ".join(f"--{name}" for name in wishes) or "none"
        raise ConfigError(
            "wish", expected="one of --recall, --specificity, --threshold", found=found
        )
    ((name, value),) = wishes.items()
    if name != "threshold":
        return {name: check_wish(name, value)}
    if not 0 <= value <= 1:
        raise ConfigError("--threshold", expected="from 0 to 1", found=value)
    return {name: float(value)}


def _check_class(run: Run, positive: str, refer: float | None) -> None:
    if positive not in run.classes:
        raise ConfigError("--positive", expected="one of " + join_few(run.classes), found=positive)
    if refer is not None and run.task == "multilabel":
        raise ConfigError("--refer", expected="one label an image", found="a multilabel run")
    if refer is not None and REFER in run.classes:
        raise ConfigError("--refer", expected=f"no class called {REFER}", found="one")


def _choose(  # noqa: PLR0917 (the parts of one question)
    run: Run, positive: str, wish: dict[str, float], rows: ScoredRows, refer: float | None,
    prevalence: float | None,
) -> DecideSummary:  # fmt: skip
    ((name, value),) = wish.items()
    scores, is_positive, groups = rows.scores, rows.is_positive, rows.groups
    choice: Choice | None = None
    if name == "recall":
        choice = choose_for_recall(scores, is_positive, value, groups)
    elif name == "specificity":
        choice = choose_for_specificity(scores, is_positive, value, groups)
    threshold = value if choice is None else choice.threshold
    image = _rates(scores, is_positive, threshold, groups)
    of_groups = None
    if groups is not None:
        of_units = unit_scores(scores, is_positive, groups)
        of_groups = _rates(*of_units, threshold, None)
    wished = (of_groups or image)["specificity" if name == "specificity" else "recall"]
    upper = None if refer is None else refer_below(scores, threshold, refer)
    return DecideSummary(
        run=run.path, positive=positive, threshold=threshold, refer_below=upper, wish=wish,
        on=rows.on, basis=rows.basis, reason=rows.reason,
        unit="image" if groups is None else "group",
        num_without_group=(
            int(is_positive.sum()) if groups is None
            else sum(not groups[row] for row in np.flatnonzero(is_positive).tolist())
        ),
        bound=(
            lower_bound(wished["hits"], wished["total"], CONFIDENCE) if choice is None
            else choice.bound
        ),
        num_units=wished["total"], num_right=wished["hits"],
        num_allowed=None if choice is None else choice.num_allowed,
        is_reached=None if choice is None else choice.is_reached,
        num_needed=None if choice is None else choice.num_needed,
        image=image, group=of_groups,
        refer=None if upper is None else _referred(rows, threshold, upper),
        prevalence=None if prevalence is None else _at_prevalence(image, prevalence),
    )  # fmt: skip


def _rates(
    scores: npt.NDArray[Any], is_positive: npt.NDArray[np.bool_], threshold: float,
    groups: list[str] | None,
) -> dict[str, Any]:  # fmt: skip
    return {
        "recall": _as_json(measure_recall(scores, is_positive, threshold, groups)),
        "specificity": _as_json(measure_specificity(scores, is_positive, threshold, groups)),
        "share_positive": float((scores >= threshold).mean()),
    }


def _referred(rows: ScoredRows, low: float, high: float) -> dict[str, Any]:
    """Return how many images are between two thresholds, and the rates among the others."""
    is_referred = (rows.scores >= low) & (rows.scores < high)
    groups = rows.groups
    if groups is not None:
        groups = [groups[row] for row in np.flatnonzero(~is_referred).tolist()]
    rest = rows.scores[~is_referred], rows.is_positive[~is_referred], high, groups
    return {
        "share": float(is_referred.mean()), "num_referred": int(is_referred.sum()),
        "recall": _as_json(measure_recall(*rest)),
        "specificity": _as_json(measure_specificity(*rest)),
    }  # fmt: skip


def _at_prevalence(image: dict[str, Any], prevalence: float) -> dict[str, Any]:
    recall, specificity = image["recall"], image["specificity"]
    ppv = npv = None
    if recall["total"] and specificity["total"]:
        rates = [rate["hits"] / rate["total"] for rate in (recall, specificity)]
        ppv, npv = predictive_values(rates[0], rates[1], prevalence)
    return {"prevalence": prevalence, "ppv": ppv, "npv": npv}


def _as_json(rate: Rate) -> dict[str, Any]:
    return result_as_dict(rate)
