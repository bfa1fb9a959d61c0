"""A decision as lines of up to 80 columns: when it is made, and where it is measured."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from featcache.errors import printable
from featcache.formatting import count, decimal, percent, shorten

if TYPE_CHECKING:
    from featcache.evaluation.deciding.decision import DecideSummary

_ONE_SIDED = "one-sided 95 %"
_WIDTH = 80


def decision_lines(result: DecideSummary) -> Iterator[str]:
    """Yield the threshold, the point, the bound and what would be needed, each apart."""
    name = shorten(printable(result.positive), 30)
    yield f"{name} if its probability is >= {result.threshold:.6g}"
    wished = "specificity" if "specificity" in result.wish else "recall"
    units = result.unit + "s"
    again = "" if (result.num_repeats or 1) == 1 else f", repeat {result.repeat}"
    how = "given by you, measured" if "threshold" in result.wish else "chosen"
    number = count(result.num_units, result.unit)
    rows = "in valid" if result.on == "valid" else "out of fold"
    yield f"{how} on {number}{_of(wished, name)}, {rows}{again}"
    if again and "threshold" not in result.wish:
        yield f"  (each of {result.num_repeats} repeats has a threshold; this is the median one)"
    verb = "found" if wished == "recall" else "called negative"
    yield f"  here    {result.num_right:,} of {result.num_units:,} {units} {verb}"
    if result.bound > 0:
        yield f"  bound   {wished} {_bound_words(result)} ({_ONE_SIDED})"
        margin = " " * 10
        yield from textwrap.wrap(
            _basis_words(result), _WIDTH, initial_indent=margin, subsequent_indent=margin
        )
    else:
        yield f"  bound   none: no {result.unit} is {verb}"
    if result.num_needed is not None:
        needed = count(result.num_needed, result.unit)
        yield f"  needed  at least {needed}, if none is wrong, for {_wish(result)}"
    if result.group is not None:
        yield "per group, by its highest score (a group with a positive image is positive):"
        yield from _rate_lines(result.group)
        yield "per image (intervals allow for groups):"
        yield from _rate_lines(result.image)
        if result.unit == "group":
            yield "predict decides each image by itself: the figures per image apply to it. The"
            yield "bound per group is for groups with all their images."
    else:
        yield "per image:"
        yield from _rate_lines(result.image)
    yield from _unknown_lines(result)
    yield from _referred_lines(result.refer, result.threshold, result.refer_below)
    yield from _temperature_lines(result)
    if result.prevalence is not None:
        facts = result.prevalence
        yield f"at a prevalence of {facts['prevalence']:g}, per image:"
        for key in ("ppv", "npv"):
            yield f"  {key.upper():<11}  {_value_words(facts[key], facts[f'{key}_interval'])}"


def unmet_wish(result: DecideSummary) -> str:
    """Return a warning if the wish cannot be promised, else nothing."""
    if result.is_reached is not False:
        return ""
    return (
        f"{_wish(result)} cannot be promised: it needs "
        f"{count(result.num_needed or 0, result.unit)} without an error, and there are "
        f"{result.num_units:,}, which can promise {decimal(result.bound)} at most"
    )


def decided_lines(
    decisions: Mapping[str, Mapping[str, Any]] | None, *, has_labels: bool
) -> Iterator[str]:
    """Yield what the thresholds of a run do to the rows of an evaluation, beside the argmax.

    Args:
        decisions: What ``measure_decisions`` returned.
        has_labels: Whether a row has several labels, each of which is yes above 0.5.
    """
    usual = "above 0.5" if has_labels else "most probable class"
    for name, facts in (decisions or {}).items():
        shown = shorten(printable(name), 30)
        yield f"decision: {shown} if its probability is >= {facts['threshold']:.6g}"
        if facts["image"] is None:
            yield "  undefined, no such rows"
            continue
        yield f"  {'':<16}  {usual:<24}  decision"
        beside = [facts["argmax"], facts["image"]]
        for rate in ("recall", "specificity"):
            cells = [_brief_rate(rates[rate]) for rates in beside]
            yield f"  {rate:<16}  {cells[0]:<24}  {cells[1]}"
        cells = [percent(rates["share_positive"], 1) for rates in beside]
        yield f"  {'called positive':<16}  {cells[0]:<24}  {cells[1]}"
        cells = [f"{r['recall']['total'] - r['recall']['hits']:,}" for r in beside]
        yield f"  {'missed':<16}  {cells[0]:<24}  {cells[1]}"
        if facts["group"] is not None:
            recall = facts["group"]["recall"]
            found = f"{recall['hits']:,} of {count(recall['total'], 'group')}"
            yield f"  {found} {_of('recall', shown).strip()} found, by their highest score"
        ((wished, value),) = facts["wish"].items()
        yield f"  asked for: {wished} {value:g}; bound from {facts['on']}: {_promise(facts)}"
        yield from _referred_lines(facts["refer"], facts["threshold"], facts["refer_below"])
        if facts["log_loss"] is not None:
            before, after = facts["log_loss"], facts["calibrated_log_loss"]
            yield f"  log loss {before:.3f}, calibrated {after:.3f}"


def _brief_rate(rate: Mapping[str, Any]) -> str:
    if not rate["total"]:
        return "undefined"
    low, high = (decimal(end) for end in rate["interval"])
    return f"{decimal(rate['hits'] / rate['total'])} ({low} to {high})"


def _promise(facts: Mapping[str, Any]) -> str:
    if facts["bound"] == 0:
        return "none"
    label = {"guarantee": "guaranteed", "estimate": "an estimate"}
    words = label.get(facts["basis"], "no guarantee")
    return f"{decimal(facts['bound'])} per {facts['unit']}, {words}"


def _wish(result: DecideSummary) -> str:
    ((name, value),) = result.wish.items()
    return f"{name} {value:g}"


def _of(wished: str, name: str) -> str:
    return f" of {name}" if wished == "recall" else f" without {name}"


def _bound_words(result: DecideSummary) -> str:
    # Of a threshold that was given, featcache cannot tell whether these rows were looked at before.
    is_sure = result.basis == "guarantee" and "threshold" not in result.wish
    lead = "guaranteed to be at least" if is_sure else "at least"
    return f"{lead} {decimal(result.bound)}"


def _basis_words(result: DecideSummary) -> str:
    label = {"guarantee": "", "estimate": "estimate: "}
    return label.get(result.basis, f"{result.basis}: ") + result.reason


def _rate_lines(rates: dict[str, Any]) -> Iterator[str]:
    for name in ("recall", "specificity"):
        yield f"  {name:<11}  {_rate_words(rates[name])}"
    yield f"  called positive: {percent(rates['share_positive'], 1)}"


def _rate_words(rate: dict[str, Any]) -> str:
    if not rate["total"]:
        return "undefined, no such rows"
    low, high = (decimal(end) for end in rate["interval"])
    share = decimal(rate["hits"] / rate["total"])
    return f"{share:>6}, {rate['hits']:,} of {rate['total']:,}, 95 % interval {low} to {high}"


def _temperature_lines(result: DecideSummary) -> Iterator[str]:
    facts = result.calibration
    if result.temperature is None:
        yield f"no calibrated probabilities: {facts['reason']}"
        return
    before, after = facts["log_loss"], facts["log_loss_out_of_fold"]
    yield (
        f"temperature {result.temperature:.3g} calibrates the probabilities: "
        f"log loss from {before:.3f} to {after:.3f}"
    )


def _unknown_lines(result: DecideSummary) -> Iterator[str]:
    if result.num_without_group:
        images = count(result.num_without_group, "image")
        yield f"{images}, patients unknown: too optimistic if some share a patient"


def _referred_lines(
    facts: Mapping[str, Any] | None, lower: float, upper: float | None
) -> Iterator[str]:
    if facts is None or upper is None:
        return
    number = f"{count(facts['num_referred'], 'image')}, {percent(facts['share'], 1)}"
    yield f"  refer to a person from {lower:.6g} to below {upper:.6g}: {number}"
    yield "  the rest, per image:"
    for name in ("recall", "specificity"):
        yield f"    {name:<11}  {_rate_words(facts[name])}"


def _value_words(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None or interval is None:
        return "undefined"
    low, high = (decimal(end) for end in interval)
    return f"{decimal(value):>6}, 95 % interval {low} to {high}"
