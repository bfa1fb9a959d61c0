"""The figures of a model card: the decision with its bound, and what was measured on test.

Reads and writes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from featcache.errors import printable
from featcache.formatting import count, decimal, percent

TO_FILL = "**TO FILL**"
NOT_EVALUATED = "not evaluated since it was made: `featcache evaluate RUN`, then export again"
_FIGURES = ("accuracy", "balanced_accuracy", "roc_auc", "average_precision")
_OF_PREDICTION = {"accuracy", "balanced_accuracy"}
"""Figures that a threshold changes; the others are of all thresholds."""

Facts = Mapping[str, Any]


def plain(value: object) -> str:
    """Return any text as one line that Markdown and HTML leave alone."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>&~$-])", r"\\\1", printable(value))


def _number(value: object) -> float | None:
    is_number = type(value) in {int, float} and np.isfinite(value)  # type: ignore[call-overload]
    return float(value) if is_number else None  # type: ignore[arg-type]


def usually(task: str) -> str:
    """Return by what an image is decided without a threshold."""
    return "a probability above 0.5" if task == "multilabel" else "the most probable class"


def usual(task: str) -> str:
    """Return the same in few words, for the head of a column."""
    return "above 0.5" if task == "multilabel" else "most probable class"


def rule_text(name: str, rule: Facts) -> str:
    """Return when an image is of a class: ``covid if >= 0.121652``."""
    return f"{name} if >= {rule['threshold']:.6g}"


def measured_decision(figures: Facts, name: str, rule: Facts) -> Facts | None:
    """Return what an evaluation says of the threshold of a class; None if it is of another one.

    Args:
        figures: ``evaluation/SPLIT.json``, which anyone may have edited.
        name: The class.
        rule: What ``decision.json`` says of it.
    """
    decisions = figures.get("decision")
    facts = decisions.get(name) if isinstance(decisions, dict) else None
    if not isinstance(facts, dict):
        return None
    if any(facts.get(key) != rule[key] for key in ("threshold", "refer_below")):
        return None
    try:
        [*_measured_lines(name, facts, "")]
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return facts


def yaml_metrics(figures: Facts, rules: Mapping[str, Facts], task: str) -> list[str]:
    """Return the metrics of Hugging Face's ``model-index``."""
    metrics = list[tuple[str, str | None, float]]()
    for name in _FIGURES:
        if (value := _number(figures.get(name))) is not None:
            said = f"{name}, {usual(task)}" if rules and name in _OF_PREDICTION else None
            metrics.append((name, said, value))
    for name, rule in rules.items():
        facts = measured_decision(figures, name, rule)
        for rate in ("recall", "specificity") if facts and facts["image"] else ():
            assert facts is not None
            if total := facts["image"][rate]["total"]:
                said = f"{rate} of the decision: {rule_text(name, rule)}"
                metrics.append((rate, said, facts["image"][rate]["hits"] / total))
    lines = []
    for kind, said, value in metrics:
        lines.append(f"          - type: {kind}")
        if said is not None:
            lines.append(f"            name: {json.dumps(printable(said), ensure_ascii=False)}")
        lines.append(f"            value: {value:.6f}")  # not repr: YAML takes 1e-05 for a text
    return lines


def decision_lines(rules: Mapping[str, Facts], task: str) -> Iterator[str]:
    """Yield the rule of each threshold, what was asked for, and what is promised.

    Args:
        rules: Class -> what ``decision.json`` says of its threshold; empty without one.
        task: ``multiclass`` or ``multilabel``.
    """
    if not rules:
        chosen = "each class above 0.5" if task == "multilabel" else "the most probable class"
        yield f"`predict.py` decides for {chosen}. No threshold was chosen (`featcache decide`)."
    for name, rule in rules.items():
        yield from _rule_lines(name, rule, task)


def _rule_lines(name: str, rule: Facts, task: str) -> Iterator[str]:
    low, high = rule["threshold"], rule["refer_below"]
    other = (
        "else not, whatever other classes have"
        if task == "multilabel"
        else ("else the most probable other class")
    )
    yield f"- Rule: **{plain(name)} if its probability is >= {low:.6g}**, {other}. The"
    yield "  probability is the one before any temperature."
    if high is not None:
        yield f"- From {low:.6g} to below {high:.6g} the decision is `refer`: to a person."
    ((wish, value),) = rule["wish"].items()
    on = "the split valid" if rule["on"] == "valid" else "the rows out of fold"
    how = "measured" if wish == "threshold" else "chosen"
    yield f"- Asked for: {wish} {value:g}; {how} on {on}."
    wished = "specificity" if wish == "specificity" else "recall"
    right, units = rule.get("num_right"), rule.get("num_units")
    said = f", {right} of {count(units, rule['unit'])}" if type(units) is int else ""
    bound = (
        f"{wished} of at least {decimal(rule['bound'])} per {rule['unit']}"
        if rule["bound"] > 0
        else "none"
    )
    basis = plain(rule["basis"]) + (", no guarantee" if rule["basis"] == "estimate" else "")
    yield f"- Bound: {bound} (one\\-sided 95 %{said}): **{basis}**: {plain(rule.get('reason'))}."
    if rule.get("is_reached") is False:
        needed = count(rule.get("num_needed") or 0, rule["unit"])
        yield (
            f"- **What was asked for cannot be promised**: that needs at least {needed} without "
            "an error."
        )
    if rule.get("num_without_group"):
        images = count(rule["num_without_group"], "image")
        yield f"- {images}, patients unknown: too optimistic if some share a patient."


def figure_lines(figures: Facts, rules: Mapping[str, Facts], task: str) -> Iterator[str]:
    """Yield tables of the run's evaluation, each figure with its 95 % interval."""
    if not figures:
        yield f"{TO_FILL}: `featcache evaluate RUN` was not called, or is of other features."
        return
    if not rules:
        yield from _usual_lines(figures)
        return
    for name, rule in rules.items():
        facts = measured_decision(figures, name, rule)
        if facts is None:
            yield f"{TO_FILL}: the decision ({plain(rule_text(name, rule))}) was {NOT_EVALUATED}."
            yield ""
        else:
            yield from _measured_lines(name, facts, usual(task))
    yield f"Without the decision, by {usually(task)}:"
    yield ""
    yield from _usual_lines(figures)


def _measured_lines(name: str, facts: Facts, beside: str) -> Iterator[str]:
    """Yield what a decision does to images, beside what it would be without a threshold."""
    shown = plain(name)
    yield f"By the decision of `predict.py` ({plain(rule_text(name, facts))}), per image:"
    yield ""
    if facts["image"] is None:
        yield "undefined, no such images"
        yield ""
        return
    yield f"| figure | decision | {beside} |"
    yield "| --- | ---: | ---: |"
    both = facts["image"], facts["argmax"]
    for rate, what in (("recall", f"sensitivity: recall of {shown}"), ("specificity",) * 2):
        yield f"| {what} | {' | '.join(_rate_text(rates[rate]) for rates in both)} |"
    called = " | ".join(percent(rates["share_positive"], 1) for rates in both)
    yield f"| called {shown} | {called} |"
    for rate, what in (("recall", f"{shown} missed"), ("specificity", f"others called {shown}")):
        wrong = " | ".join(f"{r[rate]['total'] - r[rate]['hits']:,}" for r in both)
        yield f"| {what} | {wrong} |"
    yield ""
    if (refer := facts["refer"]) is not None:
        yield (
            f"Referred to a person, and counted as called above: "
            f"{count(refer['num_referred'], 'image')}, {percent(refer['share'], 1)}. Of the rest "
            f"recall is {_rate_text(refer['recall'])}, specificity "
            f"{_rate_text(refer['specificity'])}."
        )
        yield ""


def _rate_text(rate: Facts) -> str:
    if not rate["total"]:
        return "undefined"
    low, high = (decimal(end) for end in rate["interval"])
    share = decimal(rate["hits"] / rate["total"])
    return f"{share} ({low} to {high}), {rate['hits']:,} of {rate['total']:,}"


def _usual_lines(figures: Facts) -> Iterator[str]:
    known = figures.get("intervals")
    intervals: Facts = known if isinstance(known, dict) else {}
    rows = [(name, figures.get(name), intervals.get(name)) for name in _FIGURES]
    of_class = figures.get("per_class")
    in_class = intervals.get("per_class")
    for name, facts in (of_class if isinstance(of_class, dict) else {}).items():
        if isinstance(facts, dict):
            each = in_class.get(name) if isinstance(in_class, dict) else None
            interval = each.get("recall") if isinstance(each, dict) else None
            what = f"recall of {name}, {facts.get('num_samples')} images"
            rows.append((what, facts.get("recall"), interval))
    yield "| figure | value | 95 % interval |"
    yield "| --- | ---: | --- |"
    for name, value, interval in rows:
        if (number := _number(value)) is None:
            continue
        ends = [_number(end) for end in interval] if isinstance(interval, list) else []
        said = " to ".join(f"{end:.3f}" for end in ends if end is not None) or "not known"
        yield f"| {plain(name)} | {number:.3f} | {said} |"


def interval_methods(figures: Facts, rules: Mapping[str, Facts]) -> str | None:
    """Return by which method each kind of interval was made, None if there are no intervals."""
    facts = figures.get("intervals")
    if not isinstance(facts, dict) or "method" not in facts:
        return None
    # Older files name the method of groups where each row is a group of its own.
    are_alone = facts.get("num_groups") in {None, figures.get("num_samples")}
    parts = [f"rates: {'Wilson' if are_alone else plain(facts['method'])}"]
    if isinstance(facts.get("balanced_accuracy"), list):
        parts.append("balanced accuracy: from the recalls' intervals, MOVER (Zou and Donner)")
    if any(isinstance(facts.get(key), list) for key in ("roc_auc", "positive_roc_auc")):
        how = "DeLong" if are_alone else "Obuchowski, Student's t of the groups"
        parts.append(f"ROC AUC: {how}, on the logit scale; near 0 and 1 at least Wilson's width")
    parts.append("average precision: none")
    if rules:
        parts.append("bound of the decision: exact, one\\-sided (Clopper and Pearson)")
    return f"Two\\-sided 95 % intervals. {'. '.join(part[0].upper() + part[1:] for part in parts)}"


def mistakes_text(figures: Facts, rules: Mapping[str, Facts], task: str) -> str | None:
    """Return how many images of test are wrong, by the decision and without it."""
    said: list[str] = []
    for name, rule in rules.items():
        facts = measured_decision(figures, name, rule)
        if facts is None:
            said.append(f"By the decision for {plain(name)}: {NOT_EVALUATED}")
        elif facts["image"] is not None:
            recall, others = facts["image"]["recall"], facts["image"]["specificity"]
            said.append(
                f"By the decision {recall['total'] - recall['hits']:,} of {recall['total']:,} "
                f"{plain(name)} missed, {others['total'] - others['hits']:,} of "
                f"{others['total']:,} others called {plain(name)}"
            )
    mistakes: Sequence[Any] | None = figures.get("mistakes")
    if isinstance(mistakes, list):
        number = count(len(mistakes), "wrong label" if task == "multilabel" else "wrong image")
        by = f"Without it (by {usually(task)}) " if rules else ""
        said.append(f"{by}{number} of test, listed in the run")
    return ". ".join(said) if said else None
