"""The figures of an evaluation as lines of up to 80 columns, however many classes there are."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from featcache.errors import printable
from featcache.evaluation.confusions import Confusion
from featcache.evaluation.deciding.lines import decided_lines
from featcache.evaluation.intervals import FEW_IMAGES
from featcache.formatting import count, decimal, shorten

if TYPE_CHECKING:
    from featcache.evaluation.evaluation import Evaluation

_WIDTH = 80
_MOST = 10
"""Mistakes, confused pairs, and of many classes the worst, that are listed."""

_MANY_CLASSES = 20
"""More than these do not get a line each."""


def evaluation_lines(result: Evaluation, confusions: Sequence[Confusion]) -> Iterator[str]:
    """Yield the figures, a table of classes, what is taken for what, the most confident mistakes.

    Args:
        result: The figures.
        confusions: How often which class is predicted as which, the most frequent first.
    """
    failed = f", {result.num_failed:,} more could not be read" if result.num_failed else ""
    views = f", mean of {result.num_views} views each" if result.num_views > 1 else ""
    yield f"{count(result.num_samples, 'image')} of {result.split}{views}{failed}"
    has_labels = result.task == "multilabel"
    intervals = result.intervals
    sizes = _sizes(result)
    accuracy = _shown(result.accuracy, intervals["accuracy"], sizes["accuracy"])
    yield f"  accuracy           {accuracy}"
    if not has_labels:
        balanced = _shown(result.balanced_accuracy, intervals["balanced_accuracy"])
        yield f"  balanced accuracy  {balanced}"
    area = _shown(result.roc_auc, intervals["roc_auc"])
    yield f"  roc auc            {area} (mean of the classes)"
    yield f"  average precision  {_shown(result.average_precision)} (mean of the classes)"
    facts = result.calibration
    yield (
        f"  calibration        log loss {decimal(facts['log_loss'])}, Brier score "
        f"{decimal(facts['brier'])}, ECE {decimal(facts['ece'])} ({facts['num_bins']} bins)"
    )
    if result.positive is not None:
        against = "" if has_labels else " against the rest"
        yield f"  positive class     {shorten(printable(result.positive), 42)}{against}"
        for name in ("sensitivity", "specificity"):
            yield f"  {name}        {_shown(result[name], intervals[name], sizes[name])}"
        its_area = _shown(result.positive_roc_auc, intervals["positive_roc_auc"])
        yield f"  its roc auc        {its_area}"
        yield f"  its avg. precision {_shown(result.positive_average_precision)}"
        yield f"  false negatives    {len(result.false_negatives or ()):,}"
    text = f'  (in brackets and in "recall 95 %": 95 % intervals{units_text(intervals)})'
    yield from textwrap.wrap(text, _WIDTH, subsequent_indent="  ")
    if (few := intervals["few"]) is not None:
        fewest = f"{few['num_samples']} of {shorten(printable(few['class']), 16)}"
        text = (
            f"few images ({fewest}): with fewer than {FEW_IMAGES} in a class, 95 % intervals may "
            "cover the true value in only 88 % of cases"
        )
        yield from textwrap.wrap(text, _WIDTH, subsequent_indent="  ")
    yield from _class_lines(result.classes, result.per_class, intervals["per_class"])
    if not has_labels:
        yield from _confusion_lines(result, confusions)
    yield from decided_lines(result.decision, has_labels=has_labels)
    yield from _mistake_lines(result.mistakes, has_labels=has_labels)


def _sizes(result: Evaluation) -> dict[str, int]:
    """Return how many rows, or labels, the rates are of."""
    if result.task != "multilabel":
        sizes = {"accuracy": result.num_samples}
        if result.positive is not None:
            number = result.per_class[result.positive]["num_samples"]
            sizes |= {"sensitivity": number, "specificity": result.num_samples - number}
        return sizes
    counts = {name: (row["num_positive"], row["num_negative"])
              for name, row in result.per_class.items()}  # fmt: skip
    sizes = {"accuracy": sum(yes + no for yes, no in counts.values())}
    if result.positive is not None:
        sizes |= zip(("sensitivity", "specificity"), counts[result.positive], strict=True)
    return sizes


def units_text(facts: Mapping[str, Any]) -> str:
    """Return what intervals rest on where that is not images alone: ``, of 30 groups``.

    Args:
        facts: ``num_groups``, None where there are none, and ``num_ungrouped`` of these.
    """
    if facts["num_groups"] is None:
        return ""
    alone = facts["num_ungrouped"]
    others = f" and {count(alone, 'image')} without one" if alone else ""
    return f", of {count(facts['num_groups'] - alone, 'group')}{others}"


def _shown(
    value: float | None, interval: Sequence[float] | None = None, size: int | None = None
) -> str:
    """Return a figure with its interval and, of a rate of so many rows, how many are right."""
    if value is None:
        return "undefined"
    limits = "" if interval is None else f" ({' to '.join(map(decimal, interval))})"
    return (
        decimal(value) + limits + ("" if size is None else f", {round(value * size):,} of {size:,}")
    )


def _class_lines(
    classes: Sequence[str], per_class: dict[str, Any], intervals: dict[str, Any]
) -> Iterator[str]:
    """Yield a line per class: how many images, and how well they were recognised."""
    columns = {"images": "num_samples"}
    if "num_positive" in per_class[classes[0]]:
        columns = {"yes": "num_positive", "no": "num_negative", "unknown": "num_unknown"}
    columns |= {"roc auc": "roc_auc", "avg prec": "average_precision"}
    columns |= {key: key for key in ("precision", "recall", "f1")}
    listed = list(classes)
    if len(classes) > _MANY_CLASSES:
        yield f"the {_MOST} of {len(classes):,} classes with the lowest f1:"
        known = [name for name in classes if per_class[name]["f1"] is not None]
        listed = sorted(known, key=lambda name: (per_class[name]["f1"], name))[:_MOST]
    rows = [[_cell(per_class[name][key]) for key in columns.values()] for name in listed]
    heads, place = [*columns], [*columns].index("recall") + 1
    heads.insert(place, "recall 95 %")
    for name, row in zip(listed, rows, strict=True):
        interval = intervals[name]["recall"]
        row.insert(place, "-" if interval is None else "{:.2f}-{:.2f}".format(*interval))
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    room = max(_WIDTH - sum(widths) - 2 * len(widths), 8)
    names = [shorten(printable(name), room) for name in listed]
    first = max(map(len, ["class", *names]))
    for name, cells in zip(["class", *names], [heads, *rows], strict=True):
        line = (f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        yield f"{name:<{first}}" + "".join(line)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if type(value) is int else decimal(value)


def _confusion_lines(result: Evaluation, confusions: Sequence[Confusion]) -> Iterator[str]:
    """Yield the confusion matrix if it fits, with the classes numbered if need be; else pairs."""
    matrix = result.confusion_matrix
    names = [printable(name) for name in result.classes]
    if matrix is not None:
        cells = [[f"{number:,}" for number in row] for row in matrix]
        for heads, firsts in (
            (names, names),
            ([str(i) for i in range(1, len(names) + 1)],
             [f"{i:>2} {shorten(name, 14)}" for i, name in enumerate(names, 1)]),
        ):  # fmt: skip
            lines = table_lines("target \\ pred", heads, firsts, cells)
            if max(map(len, lines)) <= _WIDTH:
                yield from lines
                return
    wrong = [pair for pair in confusions if pair.target != pair.pred]
    if not wrong:
        return
    yield "most confused classes:" if len(wrong) > _MOST else "confused classes:"
    totals = {name: row.get("num_samples") for name, row in result.per_class.items()}
    for pair in wrong[:_MOST]:
        target, pred = (shorten(printable(name), 26) for name in (pair.target, pair.pred))
        yield f"  {pair.number:,} of {totals[pair.target]:,} {target} taken for {pred}"


def table_lines(
    corner: str, heads: Sequence[str], firsts: Sequence[str], cells: Sequence[Sequence[str]]
) -> list[str]:
    """Return a table as lines, its columns aligned to the right.

    Args:
        corner: Head of the first column.
        heads: Heads of the others.
        firsts: Cells of the first column.
        cells: A row of cells for each.
    """
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    margin = max(map(len, [corner, *firsts]))
    gap = "  " if heads[0] != "1" else " "
    return [
        f"{first:<{margin}}"
        + "".join(f"{gap}{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        for first, row in zip([corner, *firsts], [heads, *cells], strict=True)
    ]


def _mistake_lines(mistakes: Sequence[dict[str, Any]], *, has_labels: bool) -> Iterator[str]:
    if not mistakes:
        return
    most = min(len(mistakes), _MOST)
    number = count(len(mistakes), "wrong label" if has_labels else "mistake")
    yield number + (f", the {most} most confident:" if len(mistakes) > most else ":")
    for row in mistakes[:most]:
        predicted, target = row.get("class", row["pred"]), row["target"]
        if has_labels:
            target = "yes" if row["target"] else "no"
        yield printable(f"  {decimal(row['prob']):>6} {predicted}, is {target}: {row['path']}")
