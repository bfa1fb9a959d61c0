"""The thresholds on valid: what the page shows of them, and what its script looks up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from featcache.formatting import decimal, percent
from featcache.metrics.rates import Interval, count_groups
from featcache.metrics.thresholds import predictive_value_intervals
from featcache.reporting.facts import Positive, SplitFacts
from featcache.reporting.mistakes import MOST_MISTAKES
from featcache.reporting.names import Names, as_text, short
from featcache.reporting.threshold_table import Step, threshold_table

_MOST_ROWS = 2500  # of each side that the script may list: the farthest on the wrong side
_RATES = {
    "recall": "recall (sensitivity)", "specificity": "specificity", "ppv": "PPV (precision)",
    "npv": "NPV",
}  # fmt: skip


def slider_of(
    facts: SplitFacts, positive: Positive, names: Names, command: str
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return what the template and the script need of the thresholds on valid.

    None where there are no rows of one of the two sides.
    """
    is_yes, scores = facts.answers(positive.column)
    if not len(is_yes) or not is_yes.any() or is_yes.all():
        return None
    groups = facts.groups(positive.column)
    steps, chosen = threshold_table(scores, is_yes, groups, positive.threshold)
    num_yes, num_no = int(is_yes.sum()), int((~is_yes).sum())
    true, false = steps[chosen].true_positives, steps[chosen].false_positives
    share = num_yes / (num_yes + num_no)
    for_page = {
        "chosen": chosen, "last": len(steps) - 1, "threshold_text": as_text(positive.threshold),
        "exact_text": f"{min(positive.threshold, 1.0)!r}",
        "chosen_text": f"{as_text(positive.threshold)}, "
        + ("as decided" if positive.rule else "the usual one"),
        "tp": f"{true:,}", "fn": f"{num_yes - true:,}", "fp": f"{false:,}",
        "tn": f"{num_no - false:,}", "rates": _rates(steps[chosen], num_yes, num_no),
        "share": percent(share), "prevalence": f"{100 * share:.3g}",
        "method": _method(facts, groups), "refer": _referral(positive), "command": command,
        "header": ["threshold", "found", "false alarms", "recall", "specificity"],
        "table": _table(steps, chosen, num_yes, num_no),
    }  # fmt: skip
    for_script = {
        "num_yes": num_yes, "num_no": num_no, "chosen": chosen, "most": MOST_MISTAKES,
        "classes": ["yes", "no"] if facts.rows.has_labels else [
            short(name) for name in facts.rows.classes
        ],
        "steps": [
            [step.threshold, step.true_positives, step.false_positives,
             *(None if i is None else [round(end, 8) for end in i]
               for i in (*step.intervals, *_at_half(step, num_yes, num_no)))]
            for step in steps
        ],
        "rows": _rows_for_script(facts, positive, names),
    }  # fmt: skip
    return for_page, for_script


def _rates(step: Step, num_yes: int, num_no: int) -> list[dict[str, Any]]:
    """Return the four rates at a threshold, each with its interval."""
    true, false = step.true_positives, step.false_positives
    pairs = (
        (true, num_yes), (num_no - false, num_no), (true, true + false),
        (num_no - false, num_no - false + num_yes - true),
    )  # fmt: skip
    return [
        {
            "key": key, "label": label, "value": hits / total if total else None,
            "text": decimal(hits / total) if total else "undefined",
            "interval": "" if interval is None else " to ".join(map(decimal, interval)),
            "of": f"{hits:,} of {total:,}",
        }
        for (key, label), (hits, total), interval in zip(
            _RATES.items(), pairs, step.intervals, strict=True
        )
    ]  # fmt: skip


def _table(steps: Sequence[Step], chosen: int, num_yes: int, num_no: int) -> list[list[str]]:
    """Return the rows of the table without a script: 25 thresholds, and the one in use."""
    shown = sorted({*np.linspace(0, len(steps) - 1, min(len(steps), 25)).astype(int), chosen})
    return [
        [
            as_text(steps[i].threshold) + (" (in use)" if i == chosen else ""),
            f"{steps[i].true_positives:,} of {num_yes:,}", f"{steps[i].false_positives:,}",
            *(_with_interval(*pair) for pair in (
                (steps[i].true_positives / num_yes, steps[i].intervals[0]),
                (1 - steps[i].false_positives / num_no, steps[i].intervals[1]),
            )),
        ]
        for i in map(int, shown)
    ]  # fmt: skip


def _referral(positive: Positive) -> str | None:
    """Return the sentence about images that are referred to a person, None if none are."""
    upper = (positive.rule or {}).get("refer_below")
    if upper is None:
        return None
    return (
        f"As decided, images from {as_text(positive.threshold)} to below {as_text(upper)} are "
        "referred to a person; here they count as called."
    )


def _at_half(step: Step, num_yes: int, num_no: int) -> tuple[Interval | None, Interval | None]:
    """Return the intervals of PPV and NPV where half of all are positive.

    For another share the script multiplies the odds of their ends.
    """
    of_recall, of_specificity = step.intervals[:2]
    assert of_recall is not None
    assert of_specificity is not None
    return predictive_value_intervals(
        step.true_positives / num_yes, 1 - step.false_positives / num_no,
        (of_recall, of_specificity), 0.5,
    )  # fmt: skip


def _with_interval(value: float, interval: Sequence[float] | None) -> str:
    return decimal(value) + (f" ({' to '.join(map(decimal, interval))})" if interval else "")


def _method(facts: SplitFacts, groups: list[str] | None) -> str:
    if groups is None:
        return "Intervals: Wilson."
    if count_groups(groups) == len(groups):
        return "Intervals: Wilson; every image is a group of its own."
    return f"Intervals: {facts.intervals['method']}."


def _rows_for_script(
    facts: SplitFacts, positive: Positive, names: Names
) -> list[list[Any]]:  # fmt: skip
    """Return name, whether positive, score, target, prediction, number of rows that may be listed.

    A prediction of -1 is none: with several labels the target alone is shown.
    """
    known = facts.known(positive.column)
    is_yes, scores = facts.answers(positive.column)
    order = np.argsort(scores, kind="stable")
    of_yes, of_no = order[is_yes[order]], order[~is_yes[order]][::-1]
    rows = []
    for place in [*of_yes[:_MOST_ROWS].tolist(), *of_no[:_MOST_ROWS].tolist()]:
        row = int(known[place])
        target, pred = int(not is_yes[place]), -1
        if not facts.rows.has_labels:
            target, pred = int(facts.rows.targets[row]), int(facts.rows.preds[row])
        name = names.of(facts, row)
        rows.append([name, int(is_yes[place]), float(scores[place]), target, pred, row])
    return rows
