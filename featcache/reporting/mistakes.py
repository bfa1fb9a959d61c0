"""The mistakes of a split as the page lists them: missed images, false alarms, wrong classes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from featcache.formatting import count
from featcache.reporting.facts import Positive, SplitFacts
from featcache.reporting.names import Names, short

MOST_MISTAKES = 100
"""Mistakes that are listed at a time."""

MOST_CELLS = 20
"""Classes of a confusion matrix that is shown."""

_MOST_OF_CELL = 20  # mistakes that a cell of the matrix can list though others are worse


def describe_mistakes(facts: SplitFacts, names: Names) -> dict[str, Any]:
    """Return what the template shows of the mistakes of a split, and of the other images shown."""
    missed, listed = _missed(facts, names), _listed(facts, names)
    return {
        "missed": missed,
        "missed_title": _missed_title(facts, missed),
        "mistakes": listed,
        **_heading(facts),
        "has_pictures": any(entry["picture"] is not None for entry in listed),
        "gallery": _gallery(facts, names, {entry["row"] for entry in listed}),
    }


def mistaken_rows(facts: SplitFacts) -> list[int]:
    """Return the rows of the mistakes that the page lists first."""
    if facts.positive is not None:
        missed, alarms = _wrong_side(facts, facts.positive)
        return (missed + alarms)[:MOST_MISTAKES]
    if not facts.rows.has_labels:
        return _wrong_rows(facts)[:MOST_MISTAKES]
    places = {path: row for row, path in enumerate(facts.rows.paths)}
    wrong = [places[wrong["path"]] for wrong in facts.rows.mistakes()[:MOST_MISTAKES]]
    return list(dict.fromkeys(wrong))


def _wrong_side(facts: SplitFacts, positive: Positive) -> tuple[list[int], list[int]]:
    """Return the rows that are missed, and the false alarms, each with the worst first."""
    known = facts.known(positive.column)
    is_yes, scores = facts.answers(positive.column)
    called = scores >= positive.threshold
    order = np.argsort(scores, kind="stable")
    missed = [int(known[i]) for i in order.tolist() if is_yes[i] and not called[i]]
    alarms = [int(known[i]) for i in order[::-1].tolist() if not is_yes[i] and called[i]]
    return missed, alarms


def _wrong_rows(facts: SplitFacts) -> list[int]:
    """Return the rows whose most probable class is not theirs, the surest first."""
    preds, probs = facts.rows.preds, facts.rows.probs
    rows: list[int] = np.flatnonzero(preds != facts.rows.targets).tolist()
    return sorted(rows, key=lambda row: (-probs[row, preds[row]], facts.rows.paths[row]))


def _missed(facts: SplitFacts, names: Names) -> list[str] | None:
    """Return the names of positive images that are missed; None where there are no such images."""
    if facts.positive is None or facts.rates is None or not facts.rates["recall"]["total"]:
        return None
    return [names.of(facts, row) for row in _wrong_side(facts, facts.positive)[0]]


def _missed_title(facts: SplitFacts, missed: list[str] | None) -> str:
    if facts.positive is None or missed is None or facts.rates is None:
        return ""
    total = facts.rates["recall"]["total"]
    return f"{len(missed):,} of {count(total, 'image')} of {short(facts.positive.name)}"


def _listed(facts: SplitFacts, names: Names) -> list[dict[str, Any]]:
    """Return the mistakes of the table, the worst first: those it shows, and others of a cell."""

    def entry(row: int, *cells: str, **more: Any) -> dict[str, Any]:
        return {
            "row": row, "cells": [names.of(facts, row), *cells], "is_more": False,
            "picture": names.picture(facts, row), **more,
        }  # fmt: skip

    if facts.positive is not None:
        missed, alarms = _wrong_side(facts, facts.positive)
        words = ["missed"] * len(missed) + ["false alarm"] * len(alarms)
        found = list(zip(missed + alarms, words, strict=True))[:MOST_MISTAKES]
        return [entry(row, word, *_of_row(facts, row, facts.positive)) for row, word in found]
    if facts.rows.has_labels:
        places = {path: row for row, path in enumerate(facts.rows.paths)}
        return [
            entry(places[wrong["path"]], short(wrong["class"]), "yes" if wrong["target"] else "no",
                  f"{wrong['prob']:.4f}")
            for wrong in facts.rows.mistakes()[:MOST_MISTAKES]
        ]  # fmt: skip
    preds, probs, targets = facts.rows.preds, facts.rows.probs, facts.rows.targets
    classes = [short(name) for name in facts.rows.classes]
    has_cells = facts.name == "valid" and len(classes) <= MOST_CELLS
    listed, of_cell = [], Counter[tuple[int, int]]()
    for place, row in enumerate(_wrong_rows(facts)):
        cell = int(targets[row]), int(preds[row])
        of_cell[cell] += 1
        is_more = place >= MOST_MISTAKES
        if is_more and not (has_cells and of_cell[cell] <= _MOST_OF_CELL):
            continue
        listed.append(
            entry(row, classes[cell[0]], classes[cell[1]], f"{probs[row, preds[row]]:.4f}",
                  pair=f"{cell[0]}-{cell[1]}", is_more=is_more)
        )  # fmt: skip
    return listed


def _of_row(facts: SplitFacts, row: int, positive: Positive) -> list[str]:
    """Return its class, the most probable one and the probability of the positive class."""
    prob = f"{facts.rows.probs[row, positive.column]:.4f}"
    if facts.rows.has_labels:
        return ["yes" if facts.rows.targets[row, positive.column] == 1 else "no", prob]
    classes = facts.rows.classes
    return [short(classes[facts.rows.targets[row]]), short(classes[facts.rows.preds[row]]), prob]


def _gallery(
    facts: SplitFacts, names: Names, mistaken: set[int]
) -> list[tuple[str, dict[str, Any], str]]:
    """Return name, picture and class of the images that are shown and not among the mistakes."""
    found = []
    for row in range(len(facts.rows.paths)):
        name, picture = names.of(facts, row), names.picture(facts, row)
        if picture is not None and row not in mistaken:
            found.append((name, picture, _target(facts, row)))
    return found


def _target(facts: SplitFacts, row: int) -> str:
    if not facts.rows.has_labels:
        return short(facts.rows.classes[facts.rows.targets[row]])
    answers = zip(facts.rows.classes, facts.rows.targets[row].tolist(), strict=True)
    return ", ".join(short(name) for name, answer in answers if answer == 1) or "none"


def _heading(facts: SplitFacts) -> dict[str, Any]:
    """Return title, column names and note of the table of mistakes."""
    positive = facts.positive
    if positive is not None:
        missed, alarms = map(len, _wrong_side(facts, positive))
        title = f"missed {missed:,}, false alarms {alarms:,}"
        name = short(positive.name)
        header = ["image", "decision", "is", "most probable", f"probability of {name}"]
        if facts.rows.has_labels:
            header = ["image", "decision", f"is {name}", f"probability of {name}"]
        note = f"Images of {name} that are missed come first, those with the lowest probability "
        note += "on top; then the false alarms, the surest on top."
        total = missed + alarms
    else:
        header = ["image", "is", "most probable", "its probability"]
        if facts.rows.has_labels:
            header = ["image", "label", "is", "probability of yes"]
        total = len(facts.rows.mistakes())
        title = count(total, "mistake")
        note = "The surest are on top."
    if total > MOST_MISTAKES:
        note += f" {MOST_MISTAKES} are listed at a time; featcache evaluate --csv has all."
    return {
        "mistakes_title": f"{title}; the worst first", "mistakes_header": header,
        "mistakes_note": note,
    }  # fmt: skip
