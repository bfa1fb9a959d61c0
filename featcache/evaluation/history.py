"""``RUN/history.csv``: the figures of a head by epoch, of an ensemble's heads one after the other.

The file is for people, and nothing vouches for it: what is not a table of numbers counts as absent.

Reads: that file.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

from featcache.csv_files import plain_cell
from featcache.files import read_regular
from featcache.heads.run import Run

_MAX_BYTES = 1 << 28
_STEPS = ("epoch", "strength")
_WHICH = ("repeat", "fold")


@dataclass(frozen=True)
class History:
    """How the training of a head went.

    Attributes:
        member: Repeat and fold of the head in an ensemble; empty without one.
        step: What the rows are of: ``epoch`` or, of a linear probe, ``strength``.
        steps: Epochs from 1 or, of a linear probe, strengths of the penalty.
        columns: Name -> a number a row, of the columns that hold finite numbers only.
        best: Which row was kept, from 0; None where the run does not say.
    """

    member: dict[str, int]
    step: str
    steps: list[float]
    columns: dict[str, list[float]]
    best: int | None


def read_histories(run: Run) -> list[History]:
    """Return how each head of a run was trained; an empty list where the file is none."""
    table = read_table(run.path / "history.csv")
    if not table:
        return []
    step = next((name for name in _STEPS if name in table[0]), None)
    which = [name for name in _WHICH if run.members and name in table[0]]
    heads: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in table:
        heads.setdefault(tuple(row[name] for name in which), []).append(row)
    if step is None or len(heads) != run.num_members:
        return []
    histories = []
    try:
        for number, (key, rows) in enumerate(heads.items()):
            facts = run.members[number] if run.members else run.training
            columns = _number_columns(rows)
            best = facts.get("best_epoch")
            if facts.get("strength") in columns.get("strength", []):
                best = columns["strength"].index(facts["strength"]) + 1
            kept = best - 1 if isinstance(best, int) and 1 <= best <= len(rows) else None
            member = {name: int(value) for name, value in zip(which, key, strict=True)}
            steps = columns.pop(step)
            others = {name: values for name, values in columns.items() if name not in which}
            histories.append(History(member, step, steps, others, kept))
    except (KeyError, ValueError):
        return []
    return histories


def _number_columns(rows: list[dict[str, str]]) -> dict[str, list[float]]:
    columns = {}
    for name in rows[0]:
        try:
            values = [float(row[name]) for row in rows]
        except ValueError:
            continue
        if all(map(math.isfinite, values)):
            columns[name] = values
    return columns


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV of a run; none where it is not there, or damaged."""
    try:
        text = read_regular(path, max_bytes=_MAX_BYTES).decode()
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except (OSError, ValueError, csv.Error):
        return []
    if any(None in row or None in row.values() for row in rows):
        return []
    return [{plain_cell(name): value for name, value in row.items()} for row in rows]
