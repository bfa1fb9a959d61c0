"""A decision as lines of up to 80 columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from featcache.errors import printable
from featcache.formatting import count, decimal, percent, shorten

if TYPE_CHECKING:
    from featcache.evaluation.decision import DecideSummary

_ONE_SIDED = "one-sided 95 %"


def decision_lines(result: DecideSummary) -> Iterator[str]:
    """Yield the threshold, the point, the bound and what would be needed, each apart."""
    name = shorten(printable(result.positive), 30)
    yield f"{name} if its probability >= {result.threshold:.6g}"
    wished = "specificity" if "specificity" in result.wish else "recall"
    units = result.unit + "s"
    yield f"chosen on {count(result.num_units, result.unit)}{_of(wished, name)} of {result.on}"
    verb = "found" if wished == "recall" else "left alone"
    yield f"  point   {result.num_right:,} of {result.num_units:,} {units} {verb}"
    yield f"  bound   {wished} {_bound_words(result)} ({_ONE_SIDED})"
    yield f"          {result.basis}:"
    yield f"          {result.reason}"
    if result.num_needed is not None:
        needed = count(result.num_needed, result.unit)
        yield f"  needed  {needed} with none wrong, for {_wish(result)}"
    if result.group is not None:
        yield "per group, by its highest score (a group with a positive image is positive):"
        yield from _rate_lines(result.group)
        yield "per image (intervals respect groups):"
        yield from _rate_lines(result.image)
        yield "One image is decided alone: for it the figures per image apply. A group's"
        yield "bound is of groups with all their images."
    else:
        yield "per image:"
        yield from _rate_lines(result.image)
    yield from _unknown_lines(result)
    yield from _refer_lines(result)
    if result.prevalence is not None:
        facts = result.prevalence
        ppv, npv = (_shown(facts[key]) for key in ("ppv", "npv"))
        yield f"at a prevalence of {facts['prevalence']:g}: PPV {ppv}, NPV {npv} (per image)"


def unmet_wish(result: DecideSummary) -> str:
    """Return a warning if the wish cannot be promised, else nothing."""
    if result.is_reached is not False:
        return ""
    return (
        f"{_wish(result)} cannot be promised: it needs "
        f"{count(result.num_needed or 0, result.unit)} without a miss, and there are "
        f"{result.num_units:,}; the highest that can be is {decimal(result.bound)}"
    )


def _wish(result: DecideSummary) -> str:
    ((name, value),) = result.wish.items()
    return f"{name} {value:g}"


def _of(wished: str, name: str) -> str:
    return f" of {name}" if wished == "recall" else f" without {name}"


def _bound_words(result: DecideSummary) -> str:
    lead = {"guarantee": "guaranteed to be at least", "estimate": "estimate: at least"}
    return f"{lead.get(result.basis, 'at least')} {decimal(result.bound)}"


def _rate_lines(rates: dict[str, Any]) -> Iterator[str]:
    for name in ("recall", "specificity"):
        rate = rates[name]
        if rate["total"]:
            low, high = (decimal(end) for end in rate["interval"])
            share = decimal(rate["hits"] / rate["total"])
            numbers = f"{rate['hits']:,} of {rate['total']:,}"
            yield f"  {name:<11}  {share:>6}, {numbers}, 95 % interval {low} to {high}"
        else:
            yield f"  {name:<11}  undefined, no such rows"
    yield f"  called positive: {percent(rates['share_positive'], 1)}"


def _unknown_lines(result: DecideSummary) -> Iterator[str]:
    if result.num_without_group:
        images = count(result.num_without_group, "image")
        yield f"{images}, patients unknown: too optimistic if some share a patient"


def _refer_lines(result: DecideSummary) -> Iterator[str]:
    if result.refer is None or result.refer_below is None:
        return
    facts = result.refer
    yield f"refer if below {result.refer_below:.6g}: {count(facts['num_referred'], 'image')}"
    yield f"  that is {percent(facts['share'], 1)} of them; among the rest, per image:"
    for name in ("recall", "specificity"):
        rate = facts[name]
        if rate["total"]:
            low, high = (decimal(end) for end in rate["interval"])
            yield (
                f"  {name:<11}  {rate['hits']:,} of {rate['total']:,}, "
                f"95 % interval {low} to {high}"
            )


def _shown(value: float | None) -> str:
    return "undefined" if value is None else decimal(value)
