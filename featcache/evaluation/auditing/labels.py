"""Labels that look wrong: confident learning on out-of-fold probabilities, and neighbours' labels.

Confident learning: Northcutt, Jiang and Chuang (2021), Confident Learning: Estimating Uncertainty
in Dataset Labels, JAIR 70. Nothing is deleted or changed: a person decides.

Reads nothing. Writes nothing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import printable
from featcache.evaluation.auditing.copies import AuditRows
from featcache.evaluation.auditing.folds import FoldedRows
from featcache.evaluation.nearest_rows import find_nearest, sample_rows
from featcache.formatting import count, decimal, shorten

NUM_NEIGHBOURS = 10
_MOST_ROWS = 1000  # that are named; a text shows five
_EXAMPLES = 5

Probs = npt.NDArray[np.float64]
Targets = npt.NDArray[np.int64]


def measure_labels(folded: FoldedRows, rows: AuditRows) -> dict[str, Any]:
    """Return the labelled rows of train and valid whose label looks wrong, the worst first.

    Args:
        folded: The rows in folds.
        rows: All rows of the cache, for their names.

    Returns:
        ``num_rows``, ``reason`` (why nothing was measured, else None), ``num_suspicious`` and
        ``suspicious``: of up to 1,000 rows ``row``, ``given`` and ``suggested`` class, ``probs`` of
        these two, and ``neighbours``: how many of the nearest ten rows of other groups have the
        given and the suggested class.
    """
    facts: dict[str, Any] = {"num_rows": folded.num_rows, "reason": None, "num_suspicious": 0,
                             "suspicious": []}  # fmt: skip
    if isinstance(folded.folds, str):
        return facts | {"reason": folded.folds}
    targets, probs, classes = folded.targets, folded.probs, folded.cache.classes
    neighbours = neighbour_labels(folded)
    suggested, order = rank_labels(probs, targets, neighbours)
    suspicious = order[: int((suggested != targets).sum())]
    named = []
    for row in suspicious[:_MOST_ROWS].tolist():
        pair = int(targets[row]), int(suggested[row])
        named.append({
            "row": rows.describe(int(folded.numbers[row])),
            "given": classes[pair[0]], "suggested": classes[pair[1]],
            "probs": [float(probs[row, i]) for i in pair],
            "neighbours": [int((neighbours[row] == i).sum()) for i in pair],
        })  # fmt: skip
    return facts | {"num_suspicious": len(suspicious), "suspicious": named}


def suggest_labels(probs: Probs, targets: Targets) -> Targets:
    """Return a class for each row (N,): the most probable other one where its own looks wrong.

    A row counts for a class if its probability is at least the mean probability that rows of that
    label have of it: the class's threshold, so that a class of which the head is never sure is
    judged by its own measure. Of several such classes the most probable counts. The counts of given
    and counted classes, scaled to the rows of each label, say how many labels of each kind are
    wrong; so many rows of that label look wrong, those with the largest difference of the two
    probabilities (the paper's pruning by noise rate). Left out are rows whose own class is the most
    probable of all, as in cleanlab.

    Args:
        probs: (N, C) out of fold.
        targets: (N,) indices; each class has rows.
    """
    num_classes, numbers = probs.shape[1], np.arange(len(targets))
    thresholds = np.array([probs[targets == c, c].mean() for c in range(num_classes)])
    is_counted = probs >= thresholds
    counted = np.where(is_counted, probs, -1.0).argmax(axis=1)
    suggested = targets.copy()
    for given in range(num_classes):
        own = np.flatnonzero(targets == given)
        counts = np.bincount(counted[own[is_counted[own].any(axis=1)]], minlength=num_classes)
        scaled = np.rint(counts * len(own) / max(counts.sum(), 1)).astype(np.int64)
        for other in np.flatnonzero(scaled).tolist():
            if other != given:
                margins = probs[own, given] - probs[own, other]
                wrong = own[np.argsort(margins, kind="stable")[: scaled[other]]]
                suggested[wrong] = -1
    rivals = probs.copy()
    rivals[numbers, targets] = -1
    looks_wrong = (suggested == -1) & (probs.argmax(axis=1) != targets)
    return np.where(looks_wrong, rivals.argmax(axis=1), targets)


def rank_labels(
    probs: Probs, targets: Targets, neighbours: npt.NDArray[np.int64]
) -> tuple[Targets, npt.NDArray[np.int64]]:
    """Return suggested classes (N,), and all rows (N,) in the order in which to look at them.

    First come rows with another suggested class. Among these and among the others the order is by
    the given class's probability less that of its best rival, plus what the neighbours say of the
    two: their share with the given class, where both classes are equally frequent.

    Args:
        probs: (N, C) out of fold.
        targets: (N,) indices.
        neighbours: (N, k) classes of each row's nearest rows, -1 for none.
    """
    suggested, numbers = suggest_labels(probs, targets), np.arange(len(targets))
    rivals = probs.copy()
    rivals[numbers, targets] = -1
    rival = rivals.argmax(axis=1)
    sizes = np.bincount(targets, minlength=probs.shape[1])
    given, other = (
        ((neighbours == side[:, None]).sum(axis=1) + 0.5) / sizes[side] for side in (targets, rival)
    )
    score = probs[numbers, targets] - probs[numbers, rival] + given / (given + other)
    return suggested, np.lexsort((score, suggested == targets))


def neighbour_labels(folded: FoldedRows) -> npt.NDArray[np.int64]:
    """Return the classes (N, k) of each row's nearest rows of other groups, -1 for none."""
    chosen = sample_rows(folded.num_rows)
    nearest, distances = find_nearest(
        folded.directions, folded.directions[chosen], NUM_NEIGHBOURS, folded.units,
        folded.units[chosen],
    )  # fmt: skip
    classes: npt.NDArray[np.int64] = folded.targets[chosen][nearest]
    return np.where(np.isfinite(distances), classes, -1)


def label_lines(facts: dict[str, Any]) -> Iterator[str]:
    """Yield lines of up to 80 columns."""
    if facts["reason"] is not None:
        text = f"labels: not measured, {facts['reason']}"
        yield from textwrap.wrap(text, 80, subsequent_indent="  ")
        return
    number, rows = facts["num_suspicious"], count(facts["num_rows"], "row")
    if not number:
        yield f"labels: none of {rows} looks wrong"
        return
    yield f"labels: {number:,} of {rows} look wrong, to check by eye"
    for found in facts["suspicious"][:_EXAMPLES]:
        given, other = (shorten(printable(found[key]), 16) for key in ("given", "suggested"))
        row = found["row"]
        yield f"    {row['split']}: {shorten(printable(row['path']), 66)}"
        text = (
            f"      {given}, but looks like {other} ({decimal(found['probs'][1], 2)}), as do "
            f"{found['neighbours'][1]} of {NUM_NEIGHBOURS} neighbours"
        )
        yield from textwrap.wrap(text, 80, subsequent_indent="        ")
