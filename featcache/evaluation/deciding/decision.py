"""Decide: choose the threshold of a positive class, and say what can be promised for it.

Reads: a run, and the cache it was trained on or the folder of a cross-validation.
Writes: ``RUN/decision.json``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.cache.by_url import by_url
from featcache.errors import CacheError, ConfigError, RunError, printable, warn_user
from featcache.evaluation.deciding.decision_file import (
    REFER,
    decision_output,
    find_replaced,
    write_decision,
)
from featcache.evaluation.deciding.lines import decision_lines, unmet_wish
from featcache.evaluation.deciding.rates import (
    rates_beside_referred,
    rates_of_groups,
    rates_of_images,
)
from featcache.evaluation.deciding.scored_rows import GUARANTEE, ScoredRows, read_folds, read_valid
from featcache.files import result_as_dict
from featcache.formatting import brief_repr, count, join_few
from featcache.heads.run import Run, load_run
from featcache.metrics.rates import count_groups, lower_bound
from featcache.metrics.temperature import LEAST_POSITIVE, calibrate
from featcache.metrics.thresholds import (
    CONFIDENCE,
    Choice,
    check_wish,
    choose_for_recall,
    choose_for_specificity,
    predictive_value_intervals,
    predictive_values,
    refer_below,
)
from featcache.runtime import Say, log_line


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
        repeat: Of a cross-validation, the repeat whose scores were used, from 1; else None. Each
            repeat has a threshold, and the median one is taken; of two the one that keeps the wish
            more surely.
        num_repeats: Of the cross-validation; None of ``valid``.
        basis: What the bound is: ``guarantee``, ``estimate`` or
            ``cross-validated bound, not a guarantee``.
        reason: Why, in words.
        unit: ``group`` or ``image``: what the threshold was chosen by. An image without a group
            is a group of its own; where all of the class are, ``image``.
        num_without_group: Images of the class that the wish is about of which no group is known.
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
        prevalence: ``prevalence``, ``ppv`` and ``npv``, per image, and ``ppv_interval`` and
            ``npv_interval`` (two-sided 95 %, None where the value is); None without.
        temperature: Of the calibrated probabilities; None where they are left out. Threshold and
            probabilities above are without it.
        calibration: ``fitted`` (the temperature before it was judged), ``log_loss``,
            ``log_loss_out_of_fold``, all three None where too few are positive, and ``reason``.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    run: Path
    positive: str
    threshold: float
    refer_below: float | None
    wish: dict[str, float]
    on: str
    repeat: int | None
    num_repeats: int | None
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
    temperature: float | None
    calibration: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as JSON values."""
        return result_as_dict(self)


@by_url("on", adds_to="run")
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
    called a guarantee only if the rows neither fitted the head nor chose anything of it. Where
    there are 30 positive units, a temperature is fitted too, and kept if it lowers the log loss
    out of fold: ``predict`` then gives calibrated probabilities besides the others.

    Args:
        run: The run folder.
        positive: The class that must not be missed. With several labels an image, each class may
            have a threshold: call once for each.
        recall: Wished share of the positive units that are found; units are groups, by their
            highest score, where there are groups.
        specificity: Or the wished share of the other units that are left alone.
        threshold: Or the threshold itself. One of these three.
        on: ``valid``, or the folder of a ``crossval`` of the same cache and options. Never
            ``test``: it is to tell how good the threshold is.
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
            hint="A threshold chosen on test could not be tested there: evaluate does that",
        )  # fmt: skip
    is_valid = str(on) == "valid"
    repeats = read_valid(loaded, positive) if is_valid else read_folds(loaded, on, positive)
    rows, choice = _choose(wish, repeats)
    num_repeats = None if is_valid else len(repeats)
    summary = _summarise(loaded, positive, wish, rows, choice, num_repeats, refer, prevalence)
    warning = unmet_wish(summary)
    if strict and warning:
        raise RunError(
            f"--{next(iter(wish))}", expected=f"{summary.num_needed:,} or more {summary.unit}s",
            found=f"{summary.num_units:,}, which can promise {summary.bound:.3f}", where=rows.where,
            hint="Nothing was written: leave --strict out, or ask for less",
        )  # fmt: skip
    facts = summary.as_dict()
    del facts["run"]
    replaced = find_replaced(loaded, positive)
    write_decision(output, loaded, facts)
    for line in decision_lines(summary):
        say(line)
    if warning:
        warn_user(warning)
    say(f"written to {printable(output.path.as_posix())}")
    if replaced is not None:
        say(f"it replaces the threshold for {printable(replaced)}: a run has one")
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
            "options", expected="one of --recall, --specificity, --threshold", found=found
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


def _choose(wish: dict[str, float], repeats: list[ScoredRows]) -> tuple[ScoredRows, Choice | None]:
    """Return the repeat with the median threshold, and its choice; None for a fixed one.

    Raises:
        CacheError: If the wish is about rows that are not there.
    """
    ((name, value),) = wish.items()
    first = repeats[0]
    if name == "threshold":
        return first, None
    if name == "specificity" and first.is_positive.all():
        raise CacheError(
            "--specificity", expected="labelled rows of other classes", found="none",
            where=first.where, hint="Use --recall, or add images of other classes",
        )  # fmt: skip
    choose = choose_for_recall if name == "recall" else choose_for_specificity
    choices = [choose(rows.scores, rows.is_positive, value, rows.groups) for rows in repeats]
    order = sorted(range(len(repeats)), key=lambda i: choices[i].threshold)
    if name == "specificity":  # of two the one that keeps it
        order.reverse()
    middle = order[(len(order) - 1) // 2]
    return repeats[middle], choices[middle]


def _summarise(  # noqa: PLR0917 (the parts of one question)
    run: Run, positive: str, wish: dict[str, float], rows: ScoredRows, choice: Choice | None,
    num_repeats: int | None, refer: float | None, prevalence: float | None,
) -> DecideSummary:  # fmt: skip
    scored = rows.scores, rows.is_positive
    threshold = wish["threshold"] if choice is None else choice.threshold
    image = rates_of_images(*scored, threshold, rows.groups)
    group = rates_of_groups(*scored, threshold, rows.groups)
    wished = (group or image)["specificity" if "specificity" in wish else "recall"]
    upper = None if refer is None else refer_below(rows.scores, threshold, refer)
    reason = rows.reason
    if choice is None:
        bound = lower_bound(wished["hits"], wished["total"], CONFIDENCE)
        if rows.basis == GUARANTEE:
            reason += "; it holds only if you fixed the threshold before you looked at them"
    else:
        bound = choice.bound
    of_wish = np.flatnonzero(rows.is_positive != ("specificity" in wish)).tolist()
    num_lone = sum(map(rows.is_lone, of_wish))
    temperature, calibration = _calibrate(rows)
    return DecideSummary(
        run=run.path, positive=positive, threshold=threshold, refer_below=upper, wish=wish,
        on=rows.on, repeat=rows.repeat, num_repeats=num_repeats, basis=rows.basis, reason=reason,
        unit="group" if num_lone < len(of_wish) else "image", num_without_group=num_lone,
        bound=bound, num_units=wished["total"], num_right=wished["hits"],
        num_allowed=None if choice is None else choice.num_allowed,
        is_reached=None if choice is None else choice.is_reached,
        num_needed=None if choice is None else choice.num_needed,
        image=image, group=group,
        refer=(
            None if upper is None
            else rates_beside_referred(*scored, threshold, upper, rows.groups)
        ),
        prevalence=None if prevalence is None else _at_prevalence(image, prevalence),
        temperature=temperature, calibration=calibration,
    )  # fmt: skip


def _calibrate(rows: ScoredRows) -> tuple[float | None, dict[str, Any]]:
    """Return the temperature that is kept, and what was found."""
    positive = np.flatnonzero(rows.is_positive).tolist()
    number = len(positive)
    if rows.groups is not None:
        number = count_groups([rows.groups[row] for row in positive])
    unit = "image" if all(map(rows.is_lone, positive)) else "group"
    facts: dict[str, Any] = dict.fromkeys(("fitted", "log_loss", "log_loss_out_of_fold"))
    if number < LEAST_POSITIVE:
        units = count(number, f"positive {unit}")
        return None, facts | {"reason": f"{units}, fewer than the {LEAST_POSITIVE} needed"}
    found = calibrate(rows.probs, rows.targets, rows.groups)
    reason = "it lowers the log loss out of fold"
    if found.is_at_limit:
        reason = "too few rows are wrong to fit a temperature"
    elif not found.helps:
        reason = "it does not lower the log loss out of fold"
    facts = {
        "fitted": found.temperature, "log_loss": found.log_loss,
        "log_loss_out_of_fold": found.log_loss_out_of_fold, "reason": reason,
    }  # fmt: skip
    return found.temperature if found.helps else None, facts


def _at_prevalence(image: dict[str, Any], prevalence: float) -> dict[str, Any]:
    rates = image["recall"], image["specificity"]
    facts: dict[str, Any] = dict.fromkeys(("ppv", "ppv_interval", "npv", "npv_interval"))
    if all(rate["total"] for rate in rates):
        found, cleared = (rate["hits"] / rate["total"] for rate in rates)
        intervals = rates[0]["interval"], rates[1]["interval"]
        facts["ppv"], facts["npv"] = predictive_values(found, cleared, prevalence)
        facts["ppv_interval"], facts["npv_interval"] = predictive_value_intervals(
            found, cleared, intervals, prevalence
        )
    return {"prevalence": prevalence} | facts
