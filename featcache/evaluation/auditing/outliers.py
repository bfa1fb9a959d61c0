"""Outliers: the rows of each class that are farthest from the others of it.

Upside-down, inverted and lateral views float up, and wrong labels too. Which of them are faults, a
person must say: some row is always the farthest.

Reads nothing. Writes nothing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import numpy as np

from featcache.errors import printable
from featcache.evaluation.auditing.copies import AuditRows
from featcache.evaluation.auditing.folds import FoldedRows
from featcache.evaluation.nearest_rows import MOST_ROWS, find_nearest, sample_rows
from featcache.formatting import count, shorten

# The tenth: outliers of one kind come in bunches, and would be each other's nearest. Of 30 planted
# among 284 X-rays, 19 are among the 15 farthest of the two classes (benchmarks/results/audit.json);
# of others, measured once without a script that is kept, 23, and with the nearest row 15.
NUM_NEIGHBOURS = 10
_MOST_NAMED = 20  # of a class
_EXAMPLES, _MANY_CLASSES = 3, 4


def measure_outliers(folded: FoldedRows, rows: AuditRows) -> dict[str, Any]:
    """Return the rows of each class with the largest distance to the tenth nearest of the class.

    Distance is 1 less the cosine of the features; rows of one group do not count for each other.

    Args:
        folded: The labelled rows of train and valid.
        rows: All rows of the cache, for their names.

    Returns:
        ``reason`` (why nothing was measured, else None) and ``per_class``: ``num_rows``,
        ``num_compared_with`` (at most 4,096), ``median`` distance and ``farthest``: up to 20 of
        ``row`` and ``distance``.
    """
    if folded.fault is not None:
        return {"reason": folded.fault, "per_class": {}}
    per_class = {}
    for i, name in enumerate(folded.cache.classes):
        own = np.flatnonzero(folded.targets == i)
        if len(own) <= NUM_NEIGHBOURS:
            continue
        chosen = own[sample_rows(len(own))]
        directions, units = folded.directions, folded.units
        _, distances = find_nearest(
            directions[own], directions[chosen], NUM_NEIGHBOURS, units[own], units[chosen]
        )
        last = distances[:, -1]
        if not np.isfinite(last).all():  # a few large groups
            continue
        order = np.argsort(-last, kind="stable")[:_MOST_NAMED]
        per_class[name] = {
            "num_rows": len(own), "num_compared_with": len(chosen),
            "median": float(np.median(last)),
            "farthest": [
                {"row": rows.describe(int(folded.numbers[own[n]])), "distance": float(last[n])}
                for n in order.tolist()
            ],
        }  # fmt: skip
    reason = None if per_class else "too few rows of other groups in every class"
    return {"reason": reason, "per_class": per_class}


def outlier_lines(facts: dict[str, Any]) -> Iterator[str]:
    """Yield lines of up to 80 columns."""
    if facts["reason"] is not None:
        text = f"outliers: not measured, {facts['reason']}"
        yield from textwrap.wrap(text, 80, subsequent_indent="  ")
        return
    yield "outliers: farthest from the rest of their class, to check by eye"
    found = facts["per_class"]
    if len(found) <= _MANY_CLASSES:
        for name, of_class in found.items():
            shown, rows = shorten(printable(name), 30), count(of_class["num_rows"], "row")
            yield f"  {shown}, {rows}: median distance {of_class['median']:.3f}"
            yield from map(_row_line, of_class["farthest"][:_EXAMPLES])
    else:
        scaled = [
            (row["distance"] / max(of_class["median"], 1e-9), row)
            for of_class in found.values() for row in of_class["farthest"]
        ]  # fmt: skip
        scaled.sort(key=lambda pair: -pair[0])
        yield "  farthest for their class:"
        yield from (_row_line(row) for _, row in scaled[: 2 * _EXAMPLES])
    if any(of_class["num_compared_with"] < of_class["num_rows"] for of_class in found.values()):
        yield f"  large classes: compared with {MOST_ROWS:,} rows, drawn at random"


def _row_line(found: dict[str, Any]) -> str:
    row = found["row"]
    return f"    {found['distance']:.3f}  {row['split']}: {shorten(printable(row['path']), 58)}"
