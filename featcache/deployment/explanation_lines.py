"""Explanations as lines for people."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from featcache.errors import printable
from featcache.formatting import count, percent, shorten

_LONGEST_NAME = 30
_WIDTH = 80
_NUM_SHOWN = 3
_NOT = "A map shows what the network used, not where disease is. Not for diagnosis."


def explanation_lines(facts: Mapping[str, Any], middle: float) -> Iterator[str]:
    """Yield the lines of one image.

    Args:
        facts: What ``Explanation.as_dict`` returns.
        middle: Side of the middle, as a share of the image's.
    """
    probs = dict(zip(facts["classes"], facts["probs"], strict=True))
    listed = ", ".join(f"{name_of(name)} {percent(probs[name], 1)}" for name in facts["preds"])
    decision = facts["decision"]
    decided = "" if decision is None else f"; decision: {_join(decision)}"
    unlike = "; unlike any training image" * bool(facts["unlike_training"])
    yield f"{printable(facts['path'])}: {listed or 'none'}{decided}{unlike}"
    against = "" if facts["against"] is None else f" against {name_of(facts['against'])}"
    yield from _wrapped(
        f"log-odds of {name_of(facts['positive'])}{against}: {facts['log_odds']:+.2f} "
        f"(at the training mean: {facts['baseline']:+.2f})"
    )
    for made in facts["maps"]:
        if len(facts["maps"]) > 1:
            yield f"  {shorten(printable(made['backbone']), _WIDTH - 3)}:"
        yield from _wrapped(_inside(made, middle))
        if made["map"] is None:
            yield "  its features are not the mean over a map: occlusion alone"
        elif made["rank_correlation"] is not None:
            verdict = "DISAGREE" if made["disagree"] else "agree"
            figure = f"rank correlation {made['rank_correlation']:.2f}"
            yield f"  map and occlusion {verdict}: {figure}"
    for near in facts["nearest"][:_NUM_SHOWN]:
        same = ", the image itself" * near["same"]
        yield (
            f"  near: {_join(near['classes'])}, distance {near['distance']:.3f}, "
            f"{printable(near['path'])} ({near['split']}{same})"
        )


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
    )


def _inside(made: Mapping[str, Any], middle: float) -> str:
    shares = [
        f"{percent(share)} of what speaks {sign}"
        for sign, share in made["share_inside"].items() if share is not None
    ]  # fmt: skip
    area = percent(middle * middle)
    return f"in the middle {area}: {', '.join(shares) or 'nothing'}"


def last_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines behind those of all images, from what ``ExplainSummary.as_dict`` returns."""
    for failure in facts["failures"]:
        yield f"failed: {printable(failure['path'])}: {printable(failure['reason'])}"
    explained = facts["explanations"]
    if any(one["baseline_of"] == "head" for one in explained):
        yield "The cache that the run was trained on is not at hand: no nearest images, and"
        yield "the mean is that of the head's first batch norm"
    number = len(explained)
    yield f"{count(number, 'picture')} and explanations.json: {printable(facts['folder'])}"
    yield _NOT


def name_of(name: str) -> str:
    """Return a class as text that can be printed, its middle cut out if it is long."""
    return shorten(printable(name), _LONGEST_NAME)


def _join(names: Any) -> str:
    listed = [names] if isinstance(names, str) else names
    return ", ".join(map(name_of, listed)) or "none"
