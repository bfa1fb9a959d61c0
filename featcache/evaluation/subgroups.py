"""The figures of an evaluation for each value of a column, such as sex, view or device.

Reads: a table (CSV) where one is named. Writes: nothing.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.cache_split import CacheSplit
from featcache.cache.table import Table, check_path_column
from featcache.data.tables import Extra
from featcache.errors import CacheError, ConfigError, printable
from featcache.evaluation.intervals import measure_intervals
from featcache.evaluation.lines import table_lines
from featcache.evaluation.predicted_rows import PredictedRows
from featcache.formatting import count, decimal, shorten
from featcache.heads.rows import RowNumbers
from featcache.metrics.rates import count_groups
from featcache.metrics.scores import compute_metrics
from featcache.runtime import Say

GROUP = "group"
"""``--by group`` without a table takes the groups of the cache."""

LEAST_UNITS = 10
"""A figure of fewer units is "too few": of 9 rows without a miss the 95 % interval of the rate
begins at 0.70. A unit is a group, or an image that has none; ``--by group`` without a table counts
images. A balanced accuracy needs so many of each class, an AUC of both sides."""

_MOST = 20
_MOST_SMALL = 5
"""Subgroups that get a line, and those of which every figure is too few that are named; all are in
the JSON."""

_HEADS = {
    "accuracy": "accuracy", "balanced_accuracy": "balanced acc.", "roc_auc": "roc auc",
    "sensitivity": "sensitivity", "specificity": "specificity", "positive_roc_auc": "its roc auc",
}  # fmt: skip

_Mask = npt.NDArray[np.bool_]


class Column:
    """A column whose values make subgroups.

    Args:
        by: Its header in the table; ``group`` without a table; None asks for no subgroups.
        table: The CSV, or None.
        columns: ``{"path": HEADER}`` where the path's header is another.

    Raises:
        ConfigError: If there is a table without a column, or a column without a table.
    """

    def __init__(
        self, by: str | None, table: str | Path | None, columns: Mapping[str, str] | None = None
    ) -> None:
        self._by, self._table, self._columns = by, table, columns
        if by is None and table is not None:
            raise ConfigError("--table", expected="--by with one of its columns", found="none")
        if by not in {None, GROUP} and table is None:
            expected = f"{GROUP}, or a column of a CSV named with --table"
            raise ConfigError("--by", expected=expected, found=by)
        check_path_column(columns, table)

    def measure(
        self, rows: PredictedRows, positive: str | None, split: CacheSplit, numbers: RowNumbers,
        say: Say,
    ) -> dict[str, Any] | None:  # fmt: skip
        """Return what ``measure_subgroups`` says, None where no subgroups are asked for.

        Args:
            rows: n rows with their predictions.
            positive: The class that is looked for, or None.
            split: The split they are of.
            numbers: Their numbers there.
            say: Receives a line on rows that the table does not name.

        Raises:
            CacheError: If the cache has no groups and is asked for them.
            DataError: If the table is none, has no such column, or names none of the split's
                images.
        """
        if self._by is None:
            return None
        values = self._read(self._by, split, numbers, say)
        if self._table is None:  # else each subgroup would be one unit
            rows = replace(rows, groups=[""] * len(rows.paths))
        return measure_subgroups(rows, self._by, values, positive)

    def _read(self, by: str, split: CacheSplit, numbers: RowNumbers, say: Say) -> list[str | None]:
        if self._table is None:
            if split.groups is None:
                raise CacheError("--by group", expected="groups in the cache", found="none",
                                 hint="Name a CSV with --table")  # fmt: skip
            return [split.groups[row] or None for row in numbers]
        extra = Extra(by, "--by")
        lines = Table(Path(self._table), split.paths, say, columns=self._columns, extra=extra)
        found = [lines.find(split.paths[row]) for row in numbers]
        if None in found:
            say(f"table: {found.count(None):,} of {count(len(found), 'image')} are not in it")
        return [None if line is None else line["extra"] or None for line in found]


def measure_subgroups(
    rows: PredictedRows, by: str, values: Sequence[str | None], positive: str | None
) -> dict[str, Any]:
    """Return the figures of each subgroup.

    Args:
        rows: n rows with their predictions.
        by: The column's name.
        values: n values of it, None for the rows that have none; they are the last subgroup.
        positive: The class that is looked for, or None.

    Returns:
        A JSON object: ``column``; ``least_units``: see ``LEAST_UNITS``; ``unit``: ``group`` or
        ``image``; ``subgroups``, sorted by value: ``value``, ``num_samples``, ``num_units``,
        ``num_positive`` (None without ``positive``) and ``figures``. These are ``accuracy`` and
        ``balanced_accuracy`` (not with several labels), with ``positive`` its ``sensitivity``,
        ``specificity`` and ``positive_roc_auc``, without and of two classes ``roc_auc``; each with
        ``value`` and ``interval`` (None where they are undefined, and where the subgroup has fewer
        than ``least_units``: it is not measured), ``num_units`` behind it and ``too_few``.
    """
    numbers: dict[str | None, list[int]] = {}
    for row, value in enumerate(values):
        numbers.setdefault(value, []).append(row)
    present = [_is_class(rows, name).any() for name in rows.classes]
    needed = [name for name, is_there in zip(rows.classes, present, strict=True) if is_there]
    return {
        "column": by,
        "least_units": LEAST_UNITS,
        "unit": "group" if any(rows.groups) else "image",
        "subgroups": [
            {"value": value, **_measure(_choose(rows, numbers[value]), needed, positive)}
            for value in sorted(numbers, key=_place)
        ],
    }


def subgroup_lines(facts: Mapping[str, Any] | None, positive: str | None) -> Iterator[str]:
    """Yield the figures of the subgroups, a line each.

    Args:
        facts: What ``measure_subgroups`` returned; of None there are no lines.
        positive: As given to it.
    """
    if facts is None:
        return
    units = f"{facts['least_units']} {facts['unit']}s"
    yield printable(
        f"by {facts['column']} (95 % intervals, each by itself; too few: below {units})"
    )
    parts: list[dict[str, Any]] = []
    small: list[dict[str, Any]] = []
    for part in facts["subgroups"]:
        is_small = all(figure["too_few"] for figure in part["figures"].values())
        (small if is_small else parts).append(part)
    if len(parts) > _MOST:
        largest = sorted(parts, key=lambda part: -part["num_samples"])[:_MOST]
        yield f"the {_MOST} largest of {len(parts):,}:"
        parts = [part for part in parts if part in largest]
    if parts:
        yield from _table_of(parts, positive)
    if small:
        listed = [f"{_name(part)} ({part['num_samples']:,})" for part in small[:_MOST_SMALL]]
        listed += ["..."] * (len(small) > _MOST_SMALL)
        text = f"too few images in {count(len(small), 'subgroup')}: {', '.join(listed)}"
        yield from textwrap.wrap(text, 80, subsequent_indent="  ")
    values = [part["value"] for part in facts["subgroups"] if part["value"] is not None]
    if len(small) > _MOST_SMALL and all(map(_is_number, values)):
        text = (
            f"{shorten(printable(facts['column']), 30)} has {len(values):,} different "
            "numbers: name a column of bins instead (such as 0-39, 40-59, 60+)"
        )
        yield from textwrap.wrap(text, 80, subsequent_indent="  ")


def _table_of(parts: Sequence[Mapping[str, Any]], positive: str | None) -> list[str]:
    names, counts = list(parts[0]["figures"]), {"images": "num_samples"}
    if positive is not None:
        names = [name for name in names if name not in {"accuracy", "balanced_accuracy"}]
        counts[shorten(printable(positive), 10)] = "num_positive"
    cells = [
        [f"{part[key]:,}" for key in counts.values()]
        + [_cell(part["figures"][name]) for name in names]
        for part in parts
    ]
    heads = [*counts, *(_HEADS[name] for name in names)]
    return table_lines("", heads, [_name(part) for part in parts], cells)


def _name(part: Mapping[str, Any]) -> str:
    return "(none)" if part["value"] is None else shorten(printable(part["value"]), 16)


def _cell(figure: Mapping[str, Any]) -> str:
    if figure["too_few"]:
        return "too few"
    interval = figure["interval"]
    limits = "" if interval is None else " {:.2f}-{:.2f}".format(*interval)
    return decimal(figure["value"], 2) + limits


def _place(value: str | None) -> tuple[bool, float, str]:
    """Return what subgroups are sorted by: numbers by size, then texts, then what has no value."""
    try:
        number = float(value or "")
    except ValueError:
        number = math.inf
    return value is None, math.inf if math.isnan(number) else number, value or ""


def _is_number(value: str) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def _choose(rows: PredictedRows, numbers: Sequence[int]) -> PredictedRows:
    return replace(
        rows, targets=rows.targets[numbers], probs=rows.probs[numbers],
        paths=[rows.paths[i] for i in numbers], groups=[rows.groups[i] for i in numbers],
    )  # fmt: skip


def _measure(rows: PredictedRows, needed: Sequence[str], positive: str | None) -> dict[str, Any]:
    """Return the counts and figures of the rows of a subgroup.

    Args:
        rows: Its rows.
        needed: Classes that there are in the whole evaluation.
        positive: The class that is looked for, or None.
    """
    everything = _count_units(rows, np.ones(len(rows.targets), bool))
    units = {"accuracy": everything}
    if not rows.has_labels:
        units["balanced_accuracy"] = min(
            _count_units(rows, _is_class(rows, name)) for name in needed
        )
        if positive is None and len(rows.classes) == 2:
            units["roc_auc"] = min(_count_units(rows, _is_class(rows, n)) for n in rows.classes)
    if positive is not None:
        units["sensitivity"] = _count_units(rows, _is_class(rows, positive))
        units["specificity"] = _count_units(rows, _is_other(rows, positive))
        units["positive_roc_auc"] = min(units["sensitivity"], units["specificity"])
    metrics, intervals = dict.fromkeys(units), dict.fromkeys(units)
    if everything >= LEAST_UNITS:  # of 20,000 small subgroups the rest takes a minute
        metrics |= compute_metrics(rows.targets, rows.probs, rows.classes, positive)
        intervals |= measure_intervals(rows, positive)
        if not units.get("balanced_accuracy"):
            metrics["balanced_accuracy"] = intervals["balanced_accuracy"] = None
    return {
        "num_samples": len(rows.targets),
        "num_units": everything,
        "num_positive": None if positive is None else int(_is_class(rows, positive).sum()),
        "figures": {
            name: {
                "value": metrics[name], "interval": intervals[name], "num_units": number,
                "too_few": metrics[name] is None or number < LEAST_UNITS,
            }
            for name, number in units.items()
        },
    }  # fmt: skip


def _is_class(rows: PredictedRows, name: str) -> _Mask:
    index = rows.classes.index(name)
    is_yes: _Mask = rows.targets[:, index] == 1 if rows.has_labels else rows.targets == index
    return is_yes


def _is_other(rows: PredictedRows, name: str) -> _Mask:
    index = rows.classes.index(name)
    is_no: _Mask = rows.targets[:, index] == 0 if rows.has_labels else rows.targets != index
    return is_no


def _count_units(rows: PredictedRows, which: _Mask) -> int:
    return count_groups([rows.groups[i] for i in np.flatnonzero(which).tolist()])
