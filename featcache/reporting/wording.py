"""What the page says of a split: figures with intervals, missed images, mistakes, subgroups.

All text is for people: names of strangers are made printable here, and escaped by the template.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from featcache.errors import printable
from featcache.evaluation.intervals import FEW_IMAGES
from featcache.evaluation.lines import units_text
from featcache.formatting import count, decimal, shorten
from featcache.reporting.charts import curves_of
from featcache.reporting.facts import Positive, SplitFacts
from featcache.reporting.svg import interval_bar

MOST_MISTAKES = 100
"""Mistakes that are listed at a time."""

_MOST_CARDS = 8
_MOST_OF_CELL = 20  # mistakes that a cell of the matrix can list though others are worse
_MOST_CELLS = 20  # classes of a matrix
_HEADS = {
    "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "roc_auc": "ROC AUC",
    "sensitivity": "sensitivity", "specificity": "specificity", "positive_roc_auc": "its ROC AUC",
}  # fmt: skip


@dataclass(frozen=True)
class Explained:
    """What in an image spoke for a class.

    Attributes:
        urls: ``data:`` URLs of its map, one for each backbone that has one.
        text: The same in words.
    """

    urls: list[str]
    text: str


@dataclass(frozen=True)
class Shown:
    """What is shown of images, by split and path.

    Attributes:
        pictures: ``data:`` URLs.
        maps: Maps of some of them.
        note: What the maps show, or why there are none.
    """

    pictures: Mapping[tuple[str, str], str] = field(default_factory=dict)
    maps: Mapping[tuple[str, str], Explained] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Names:
    """What images are called in the page, and what is shown of them.

    Attributes:
        has_paths: Whether by their paths; else by split and number.
        shown: Their pictures.
    """

    has_paths: bool
    shown: Shown = field(default_factory=Shown)

    def picture(self, facts: SplitFacts, row: int) -> dict[str, Any] | None:
        """Return number, picture and map of a row; None where there is no picture."""
        key = facts.split, facts.rows.paths[row]
        if key not in self.shown.pictures:
            return None
        explained = self.shown.maps.get(key, Explained([], ""))
        return {
            "row": row, "url": self.shown.pictures[key], "maps": explained.urls,
            "text": explained.text,
        }  # fmt: skip

    def of(self, facts: SplitFacts, row: int) -> str:
        """Return the name of a row of a split."""
        if self.has_paths:
            return printable(facts.rows.paths[row])
        return f"{facts.name} {row + 1}"


def short(name: str) -> str:
    """Return a class name that fits a heading."""
    return shorten(printable(name), 40)


def as_text(threshold: float) -> str:
    """Return a threshold as the page shows it."""
    return "above 1" if threshold > 1 else f"{threshold:.6g}"


def describe(facts: SplitFacts, names: Names) -> dict[str, Any]:
    """Return what the template shows of a split."""
    few = facts.intervals["few"]
    missed = _missed(facts, names)
    listed = _listed(facts, names)
    positive = facts.positive
    return {
        "name": facts.name,
        "source": facts.source,
        "count": count(len(facts.rows.targets), "image"),
        "is_one": len(facts.rows.targets) == 1,
        "freshness": facts.freshness,
        "in_short": _in_short(facts),
        "cards": _cards(facts),
        "resting": f"Intervals are two-sided, 95 %{units_text(facts.units)}."
        + (f" {count(facts.num_failed, 'image')} could not be read." if facts.num_failed else ""),
        "few": None if few is None else (
            f"Few images ({few['num_samples']:,} of {short(few['class'])}, below {FEW_IMAGES}): "
            "what is called a 95 % interval may hold in 88 % of cases."
        ),
        "missed": missed,
        "missed_title": _missed_title(facts, missed),
        "matrix": _matrix(facts),
        "classes": _classes(facts),
        "matrix_classes": [short(name) for name in facts.rows.classes],
        "charts": curves_of(facts),
        "by": _subgroups(facts),
        "gallery": _gallery(facts, names, listed),
        "has_pictures": any(entry["picture"] is not None for entry in listed),
        **_mistakes(facts, listed, positive),
    }  # fmt: skip


def _in_short(facts: SplitFacts) -> str:
    """Return how good it is in a sentence or two, without a word of statistics."""
    if facts.positive is not None and facts.rates is not None:
        name, at = short(facts.positive.name), as_text(facts.positive.threshold)
        recall, specificity = facts.rates["recall"], facts.rates["specificity"]
        text = f"Called {name} where its probability is at least {at}. "
        text += (
            f"Of {count(recall['total'], 'image')} of {name}, {recall['hits']:,} "
            f"{'is' if recall['hits'] == 1 else 'are'} found and "
            f"{recall['total'] - recall['hits']:,} missed. "
            if recall["total"] else f"There is no image of {name}. "
        )  # fmt: skip
        if not specificity["total"]:
            return text + "There is no other image."
        alarms = specificity["total"] - specificity["hits"]
        return text + (
            f"Of {count(specificity['total'], 'other image')}, {alarms:,} "
            f"{'is' if alarms == 1 else 'are'} called {name} by mistake."
        )
    if facts.rows.has_labels:
        size = int((~np.isnan(facts.rows.targets)).sum())
        right = round(facts.metrics["accuracy"] * size)
        return f"Of {size:,} answers, yes or no for each label of each image, {right:,} are right."
    size = len(facts.rows.targets)
    right = round(facts.metrics["accuracy"] * size)
    return f"The most probable class is the right one for {right:,} of {count(size, 'image')}."


def _cards(facts: SplitFacts) -> list[dict[str, Any]]:
    """Return the figures that stand first, each with its interval."""
    metrics, intervals, number = facts.metrics, facts.intervals, len(facts.rows.targets)
    cards = []
    if facts.positive is not None and facts.rates is not None:
        name = short(facts.positive.name)
        for key, label in (("recall", f"recall of {name}"), ("specificity", "specificity")):
            rate = facts.rates[key]
            value = rate["hits"] / rate["total"] if rate["total"] else None
            word = "found" if key == "recall" else "left alone"
            of = f"{rate['hits']:,} of {rate['total']:,} {word}"
            cards.append(_card(label, value, rate["interval"], of))
        cards.append(_card(f"ROC AUC of {name}", metrics["positive_roc_auc"],
                           intervals["positive_roc_auc"]))  # fmt: skip
    elif not facts.rows.has_labels and len(facts.rows.classes) == 2:
        cards.append(_card("ROC AUC", metrics["roc_auc"], intervals["roc_auc"]))
    size = int((~np.isnan(facts.rows.targets)).sum()) if facts.rows.has_labels else number
    of = f"{round(metrics['accuracy'] * size):,} of {size:,}"
    accuracy = "accuracy, most probable class"
    if facts.rows.has_labels:
        accuracy = "accuracy over known labels"
    cards.append(_card(accuracy, metrics["accuracy"], intervals["accuracy"], of))
    if not facts.rows.has_labels:
        balanced = metrics["balanced_accuracy"], intervals["balanced_accuracy"]
        cards.append(_card("balanced accuracy", *balanced, "mean recall of the classes"))
    if facts.positive is None:
        rows = list(metrics["per_class"].items())
        if len(rows) > _MOST_CARDS - len(cards):  # then those of the classes that are found worst
            rows.sort(key=lambda item: 2.0 if item[1]["recall"] is None else item[1]["recall"])
        for name, row in rows:
            if len(cards) == _MOST_CARDS:
                break
            total = row.get("num_samples", row.get("num_positive", 0))
            if row["recall"] is not None:
                of = f"{round(row['recall'] * total):,} of {total:,} found"
                interval = intervals["per_class"][name]["recall"]
                cards.append(_card(f"recall of {short(name)}", row["recall"], interval, of))
    return cards


def _card(
    label: str, value: float | None, interval: Sequence[float] | None, of: str = ""
) -> dict[str, Any]:
    has_bar = interval is not None and value is not None
    return {
        "label": label,
        "text": "undefined" if value is None else decimal(value),
        "interval": "" if interval is None else " to ".join(map(decimal, interval)),
        "bar": interval_bar(interval[0], interval[1], value) if has_bar else "",  # type: ignore[index, arg-type]  # has_bar
        "of": of,
    }


def _classes(facts: SplitFacts) -> list[list[str]]:
    """Return the recall of each class, a row of text each; none where the cards have them all."""
    per_class, intervals = facts.metrics["per_class"], facts.intervals["per_class"]
    if len(per_class) <= 2 and not facts.rows.has_labels:
        return []
    rows = []
    for name, row in per_class.items():
        total = row.get("num_samples", row.get("num_positive", 0))
        interval = intervals[name].get("recall")
        rows.append([short(name), f"{total:,}", _with_interval(row["recall"], interval)])
    return rows


def _with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "undefined"
    return decimal(value) + (f" ({' to '.join(map(decimal, interval))})" if interval else "")


def _wrong_side(facts: SplitFacts, positive: Positive) -> tuple[list[int], list[int]]:
    """Return the rows that are missed, and the false alarms, each with the worst first."""
    known = facts.known(positive.column)
    is_yes, scores = facts.answers(positive.column)
    called = scores >= positive.threshold
    order = np.argsort(scores, kind="stable")
    missed = [int(known[i]) for i in order.tolist() if is_yes[i] and not called[i]]
    alarms = [int(known[i]) for i in order[::-1].tolist() if not is_yes[i] and called[i]]
    return missed, alarms


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


def _matrix(facts: SplitFacts) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the confusion matrix of the most probable class, row by row; none of many classes."""
    cells = facts.metrics["confusion_matrix"]
    if cells is None or len(cells) > _MOST_CELLS:
        return []
    has_buttons = facts.positive is None and facts.name == "valid"
    return [
        (
            short(facts.rows.classes[target]),
            [
                {
                    "text": f"{number:,}", "is_right": target == pred,
                    "key": f"{target}-{pred}" if has_buttons and target != pred else "",
                }
                for pred, number in enumerate(row)
            ],
        )
        for target, row in enumerate(cells)
    ]  # fmt: skip


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
    has_cells = facts.name == "valid" and len(classes) <= _MOST_CELLS
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


def _wrong_rows(facts: SplitFacts) -> list[int]:
    """Return the rows whose most probable class is not theirs, the surest first."""
    preds, probs = facts.rows.preds, facts.rows.probs
    rows: list[int] = np.flatnonzero(preds != facts.rows.targets).tolist()
    return sorted(rows, key=lambda row: (-probs[row, preds[row]], facts.rows.paths[row]))


def _of_row(facts: SplitFacts, row: int, positive: Positive) -> list[str]:
    """Return its class, the most probable one and the probability of the positive class."""
    prob = f"{facts.rows.probs[row, positive.column]:.4f}"
    if facts.rows.has_labels:
        return ["yes" if facts.rows.targets[row, positive.column] == 1 else "no", prob]
    classes = facts.rows.classes
    return [short(classes[facts.rows.targets[row]]), short(classes[facts.rows.preds[row]]), prob]


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


def _gallery(
    facts: SplitFacts, names: Names, listed: list[dict[str, Any]]
) -> list[tuple[str, dict[str, Any], str]]:  # fmt: skip
    """Return name, picture and class of the images that are shown and not among the mistakes."""
    shown = {entry["row"] for entry in listed}
    found = []
    for row in range(len(facts.rows.paths)):
        name, picture = names.of(facts, row), names.picture(facts, row)
        if picture is not None and row not in shown:
            found.append((name, picture, _target(facts, row)))
    return found


def _target(facts: SplitFacts, row: int) -> str:
    if not facts.rows.has_labels:
        return short(facts.rows.classes[facts.rows.targets[row]])
    answers = zip(facts.rows.classes, facts.rows.targets[row].tolist(), strict=True)
    return ", ".join(short(name) for name, answer in answers if answer == 1) or "none"


def _mistakes(
    facts: SplitFacts, listed: list[dict[str, Any]], positive: Positive | None
) -> dict[str, Any]:
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
        "mistakes": listed, "mistakes_title": f"{title}; the worst first",
        "mistakes_header": header, "mistakes_note": note,
    }  # fmt: skip


def _subgroups(facts: SplitFacts) -> dict[str, Any] | None:
    if facts.by is None:
        return None
    parts = facts.by["subgroups"]
    names = list(parts[0]["figures"])
    rows = []
    for part in parts[:100]:
        cells = []
        for name in names:
            figure = part["figures"].get(name)
            if figure is None or figure["too_few"] or figure["value"] is None:
                cells.append("too few")
                continue
            interval = figure["interval"]
            limits = "" if interval is None else f" ({' to '.join(map(decimal, interval))})"
            cells.append(decimal(figure["value"]) + limits)
        value = "(none)" if part["value"] is None else short(str(part["value"]))
        rows.append([value, f"{int(part['num_samples']):,}", *cells])
    return {
        "column": short(str(facts.by["column"])),
        "least": facts.by["least_units"],
        "unit": facts.by["unit"],
        "note": ""
        if facts.positive is None
        else "Sensitivity and specificity are those of the "
        + ("answer above 0.5" if facts.rows.has_labels else "most probable class")
        + ", not of the threshold above.",
        "header": ["value", "images", *(_HEADS.get(name, short(name)) for name in names)],
        "rows": rows,
    }
