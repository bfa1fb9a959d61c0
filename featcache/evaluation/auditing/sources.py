"""Can the source of an image be told within a class? If so, a head may learn sources for classes.

If every source has one class, no split of these data can tell a head that reads lungs from one that
reads sources: DeGrave, Janizek and Lee (2021), Nature Machine Intelligence 3.

Reads: a table (CSV). Writes: nothing.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from featcache.cache.table import Table
from featcache.data.tables import Extra
from featcache.errors import CacheError, ConfigError, printable
from featcache.evaluation.auditing.folds import (
    LEAST_PER_CLASS,
    NUM_FOLDS,
    FoldedRows,
    out_of_fold_probs,
)
from featcache.formatting import decimal, join_few, list_counts, shorten
from featcache.metrics.scores import paired_interval
from featcache.runtime import Say


def read_sources(
    table: str | Path, column: str, paths: list[str], say: Say, columns: Mapping[str, str] | None
) -> list[str]:
    """Return the source of each row of a cache, empty where the table does not say.

    Args:
        table: A CSV with the column ``path``, as ``select --table`` takes it.
        column: The header of the column that names sources.
        paths: Of the rows.
        say: Where lines for people go.
        columns: ``{"path": HEADER}`` where the path's column has another header.

    Raises:
        DataError: If the CSV cannot be read, or has no such column or path.
        ConfigError: If the column is empty for all rows.
    """
    lines = Table(Path(table), paths, say, columns=columns, extra=Extra(column, "--source"))
    found = [lines.find(path) for path in paths]
    sources = ["" if line is None else line["extra"] for line in found]
    if not any(sources):
        raise ConfigError("--source", expected="names of sources",
                          found=f"none in the column {column}", where=table)  # fmt: skip
    return sources


def measure_sources(folded: FoldedRows, sources: list[str], column: str) -> dict[str, Any]:
    """Return, for each class, how well a linear head tells the sources of its rows apart.

    Folds keep groups together, and are stratified by source. A source of fewer than 20 rows of a
    class is left out there.

    Args:
        folded: The labelled rows of train and valid.
        sources: Of all rows of the cache, empty where unknown.
        column: What named them.

    Returns:
        ``column``; ``reason`` (why nothing was measured, else None); ``verdict``: ``not separable
        by design`` where each class has one source of its own (or shares it), ``one source`` where
        all rows do, ``told``, ``not shown`` or ``too few``; and
        ``per_class``: ``sources`` (name -> rows), ``reason``, ``chance``, ``balanced_accuracy`` and
        ``low`` and ``high`` of its 95 % interval (None where all folds agree).
    """
    facts: dict[str, Any] = {"column": column, "reason": None, "verdict": None, "per_class": {}}
    if folded.fault is not None:
        return facts | {"reason": folded.fault}
    of_rows = np.array([sources[n] for n in folded.numbers.tolist()])
    for i, name in enumerate(folded.cache.classes):
        own = np.flatnonzero((folded.targets == i) & (of_rows != ""))
        facts["per_class"][name] = _tell_apart(folded, own, of_rows)
    found = facts["per_class"].values()
    if all(len(of_class["sources"]) < 2 for of_class in found):
        names = {name for of_class in found for name in of_class["sources"]}
        facts["verdict"] = "not separable by design" if len(names) > 1 else "one source"
    elif all(of_class["balanced_accuracy"] is None for of_class in found):
        facts["verdict"] = "too few"
    else:
        facts["verdict"] = "told" if any(map(is_told, found)) else "not shown"
    return facts


def is_told(of_class: dict[str, Any]) -> bool:
    """Whether sources are told apart better than by chance in a class."""
    accuracy, low = of_class["balanced_accuracy"], of_class["low"]
    return accuracy is not None and (accuracy if low is None else low) > of_class["chance"]


def _tell_apart(folded: FoldedRows, own: Any, of_rows: Any) -> dict[str, Any]:
    """Return the facts of one class, whose rows with a known source are ``own``."""
    counts = dict(sorted(Counter(of_rows[own].tolist()).items()))
    facts: dict[str, Any] = {"sources": counts, "reason": None, "chance": None,
                             "balanced_accuracy": None, "low": None, "high": None}  # fmt: skip
    names = [name for name, number in counts.items() if number >= LEAST_PER_CLASS]
    if len(counts) < 2:
        return facts | {"reason": "one source" if counts else "no known source"}
    if len(names) < 2:
        return facts | {"reason": f"fewer than two sources of {LEAST_PER_CLASS} rows"}
    rows = own[np.isin(of_rows[own], names)]
    targets = np.searchsorted(np.array(names), of_rows[rows])
    pool = folded.of_class(rows, targets, names)
    try:
        folds = pool.make_folds(NUM_FOLDS, 0)
    except CacheError:
        return facts | {"reason": f"a source has images in fewer than {NUM_FOLDS} groups"}
    preds = out_of_fold_probs(pool.plain, targets, folds).argmax(axis=1)
    scores = [
        float(np.mean([(preds[judged][targets[judged] == i] == i).mean()
                       for i in np.unique(targets[judged])]))
        for _, judged in folds
    ]  # fmt: skip
    ratio = float(np.mean([len(judged) / len(train) for train, judged in folds]))
    mean, low, high = paired_interval(scores, ratio)
    alike = low == high
    return facts | {
        "chance": 1 / len(names), "balanced_accuracy": mean, "low": None if alike else low,
        "high": None if alike else min(high, 1.0),
    }  # fmt: skip


def source_lines(facts: dict[str, Any]) -> Iterator[str]:
    """Yield lines of up to 80 columns."""
    if facts["reason"] is not None:
        text = f"sources: not measured, {facts['reason']}"
        yield from textwrap.wrap(text, 80, subsequent_indent="  ")
        return
    column = shorten(printable(facts["column"]), 20)
    yield f"sources ({column}): {SENTENCES[facts['verdict']]}"
    for name, of_class in facts["per_class"].items():
        listed = list_counts(of_class["sources"]) or "unknown"
        text = f"  {shorten(printable(name), 24)}: {listed}"
        yield from textwrap.wrap(text, 80, subsequent_indent="    ")
        if of_class["balanced_accuracy"] is not None:
            ends = of_class["low"], of_class["high"]
            how = "every fold alike" if None in ends else f"{ends[0]:.3f} to {ends[1]:.3f}"
            score = decimal(of_class["balanced_accuracy"])
            yield (f"    told apart with balanced accuracy {score} ({how}), "
                   f"chance {of_class['chance']:.2f}")  # fmt: skip
        elif len(of_class["sources"]) > 1:
            yield f"    too few: {of_class['reason']}"


SENTENCES = {
    "not separable by design": "not separable by design, a class has one source",
    "one source": "all rows have one",
    "told": "can be told apart within a class",
    "not shown": "no evidence that they can be told apart within a class",
    "too few": "too few rows to tell",
}


def told_classes(facts: dict[str, Any]) -> str:
    """Return the names of the classes whose sources can be told."""
    return join_few(name for name, of_class in facts["per_class"].items() if is_told(of_class))
