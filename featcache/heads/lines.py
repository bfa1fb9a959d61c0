"""What a training says: the rows there are, a line per epoch, the linear probe beside it.

Reads and writes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.reading import Cache
from featcache.errors import printable
from featcache.formatting import count, decimal, join_few, list_counts, shorten
from featcache.heads.config import LBFGS, TrainingConfig
from featcache.heads.rows import Part, Targets
from featcache.runtime import Say

_IMBALANCE = 5  # beyond 1:5 the loss of the rare class is easily drowned
_RECALLS_WIDTH = 36  # with what stands before and behind them: lines of up to 80 characters
_MANY_CLASSES = 20  # more do not get a line each


def say_counts(cache: Cache, parts: Sequence[Part], training: TrainingConfig, say: Say) -> None:
    """Say how many rows of each class each part has, and what is left out or lopsided."""
    counts = [_count_answers(part.targets, len(cache.classes)) for part in parts]
    heads = ("{}",) if cache.task == "multiclass" else ("{}: yes", "no", "unknown")
    names = ["class", *cache.classes, "(unlabelled, left out)", "total"]
    columns = [[shorten(printable(name), 40) for name in names]]
    for part, of_part in zip(parts, counts, strict=True):
        below = [f"{part.num_unlabelled:,}", f"{len(part.rows):,}"]
        for head, column in zip(heads, of_part.T.tolist(), strict=True):
            columns.append([head.format(part.name), *(f"{n:,}" for n in column), *below])
            below = ["", ""]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        [f"{cell:>{max(w, 7)}}" for cell, w in zip(line[1:], widths[1:], strict=True)]
        for line in zip(*columns, strict=True)
    ]
    if len(cache.classes) > _MANY_CLASSES:
        for part, of_part in zip(parts, counts, strict=True):
            found = dict(zip(cache.classes, of_part[:, 0].tolist(), strict=True))
            found |= {"unlabelled": part.num_unlabelled} if part.num_unlabelled else {}
            say(f"{part.name}: {list_counts(found)}")
    else:
        for i, (name, line) in enumerate(zip(columns[0], lines, strict=True)):
            if i != len(lines) - 2 or any(part.num_unlabelled for part in parts):
                say(f"{name:<{widths[0]}}  {'  '.join(line)}".rstrip())
    _say_failures(cache, say)
    num_views = parts[0].split.num_views
    if num_views > 1:
        how = printable(cache.identity.get("augmentation") or "of unknown making")
        used = "all count" if training.optimizer == LBFGS else "each epoch draws one of them"
        say(f"views: {num_views} of each training image ({how}), {used}")
    if "test" in cache.splits:
        say(f"test is not touched: {count(len(cache.splits['test']), 'row')}")
    if training.class_weights == "none":
        _say_imbalance(cache, counts[0], say)
    if training.optimizer == LBFGS:
        say("lbfgs: solved for, without dropout; strengths are of L2 on standardised features")


def _count_answers(targets: Targets, num_classes: int) -> npt.NDArray[np.int64]:
    """Return the rows of each class, (C, 1); for multilabel caches yes, no and unknown, (C, 3)."""
    if targets.ndim == 1:
        return np.bincount(targets, minlength=num_classes)[:, None]
    return np.stack([(targets == 1).sum(0), (targets == 0).sum(0), np.isnan(targets).sum(0)], 1)


def _say_imbalance(cache: Cache, counts: npt.NDArray[np.int64], say: Say) -> None:
    if cache.task == "multiclass":
        ratio = counts.max() / counts.min()
        found = f"the largest class of train is {ratio:.1f} times the smallest"
    else:
        answers = counts[:, :2]
        ratios = np.where(answers.all(1), answers.max(1) / answers.min(1).clip(min=1), 1)
        ratio, name = ratios.max(), printable(cache.classes[ratios.argmax()])
        found = f"in train one answer to {name} is {ratio:.1f} times as frequent as the other"
    if ratio > _IMBALANCE:
        say(f"hint: {found}; try --class-weights balanced")


def _say_failures(cache: Cache, say: Say) -> None:
    """Say how many images are missing, and of what: without those of a class a head is biased."""
    if not cache.failures:
        return
    counts: Counter[str] = Counter()
    for failure in cache.failures:
        known = 0 <= failure.target < len(cache.classes)
        counts[f"{failure.split}/{cache.classes[failure.target]}" if known else failure.split] += 1
    listed = join_few(f"{n:,} of {name}" for name, n in counts.most_common())
    failed = count(len(cache.failures), "failed image")
    say(f"not in this cache: {failed} ({listed}); see featcache info")


def epoch_lines(classes: Sequence[str], say: Say) -> Callable[[dict[str, Any]], None]:
    """Return a function that says a line for each row of the history.

    A line has the losses, the accuracy and the recall of each class on ``valid``. Where the classes
    do not fit side by side, it has the lowest recall and its class instead.
    """
    widths = [max(6, len(printable(name))) for name in classes]
    while sum(widths) + 2 * len(widths) > _RECALLS_WIDTH and max(widths) > 6:
        widths[widths.index(max(widths))] -= 1
    fits = sum(widths) + 2 * len(widths) <= _RECALLS_WIDTH
    lowest, is_first = float("inf"), True

    def line(row: dict[str, Any]) -> None:
        nonlocal lowest, is_first
        if is_first:
            is_first = False
            first = f"{'epoch':>5}" if "epoch" in row else f"{'strength':>8}"
            head = f"{first}  train loss  valid loss  accuracy  "
            names = (
                f"{shorten(printable(n), w):>{w}}" for n, w in zip(classes, widths, strict=True)
            )
            say(f"{'(* = lowest valid loss so far)':<{len(head)}}recall on valid")
            say(head + ("  ".join(names) if fits else "lowest of the classes"))
        recalls = [(row[f"valid_recall_{name}"], printable(name)) for name in classes]
        if not fits:
            recall, name = min((p for p in recalls if p[0] is not None), default=(None, ""))
            shown = "-" if recall is None else f"{decimal(recall)} {shorten(name, 28)}"
        else:
            shown = "  ".join(
                f"{'-' if recall is None else decimal(recall):>{w}}"
                for (recall, _), w in zip(recalls, widths, strict=True)
            )
        mark = "  *" if row["valid_loss"] < lowest else ""
        lowest = min(lowest, row["valid_loss"])
        number = f"{row['epoch']:>5}" if "epoch" in row else f"{row['strength']:.2e}"
        say(
            f"{number}  {row['train_loss']:>10.4f}  {row['valid_loss']:>10.4f}  "
            f"{decimal(row['valid_accuracy']):>8}  {shown}{mark}"
        )

    return line


def probe_line(probe: Mapping[str, Any]) -> str:
    """Return the line about a linear probe of the same rows: see ``fit.compare_linear_probe``."""
    figures = f"valid loss {probe['valid_loss']:.4f}, accuracy {decimal(probe['valid_accuracy'])}"
    return f"beside it, a linear probe: {figures} (strength {probe['strength']:.2g})"
