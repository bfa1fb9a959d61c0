"""What the page says of a split: in short, figures with intervals, classes, subgroups.

All text is for people, and escaped by the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from featcache.evaluation.intervals import FEW_IMAGES
from featcache.evaluation.lines import units_text
from featcache.formatting import count, decimal
from featcache.reporting.charts import curves_of
from featcache.reporting.facts import Positive, SplitFacts
from featcache.reporting.mistakes import MOST_CELLS, describe_mistakes
from featcache.reporting.names import Names, as_text, short
from featcache.reporting.svg import interval_bar

_MOST_CARDS = 8
_HEADS = {
    "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "roc_auc": "ROC AUC",
    "sensitivity": "sensitivity", "specificity": "specificity", "positive_roc_auc": "its ROC AUC",
}  # fmt: skip


def describe(facts: SplitFacts, names: Names) -> dict[str, Any]:
    """Return what the template shows of a split."""
    few = facts.intervals["few"]
    return {
        "name": facts.name,
        "on": f"on {facts.title}" if facts.title == facts.name else facts.title,
        "of": f"of {facts.title}" if facts.title == facts.name else f"({facts.title})",
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
        "matrix": _matrix(facts),
        "classes": _classes(facts),
        "matrix_classes": [short(name) for name in facts.rows.classes],
        "charts": curves_of(facts),
        "by": _subgroups(facts),
        **describe_mistakes(facts, names),
    }  # fmt: skip


def _in_short(facts: SplitFacts) -> str:
    """Return how good it is in a sentence or two, without a word of statistics."""
    if facts.positive is not None and facts.rates is not None:
        return say_rates(facts.positive, facts.rates)
    if facts.rows.has_labels:
        size = int((~np.isnan(facts.rows.targets)).sum())
        right = round(facts.metrics["accuracy"] * size)
        return f"Of {size:,} answers, yes or no for each label of each image, {right:,} are right."
    size = len(facts.rows.targets)
    right = round(facts.metrics["accuracy"] * size)
    return f"The most probable class is the right one for {right:,} of {count(size, 'image')}."


def say_rates(positive: Positive, rates: Mapping[str, Any]) -> str:
    """Return how many images are found, missed and called by mistake, in a sentence or two."""
    name, at = short(positive.name), as_text(positive.threshold)
    recall, specificity = rates["recall"], rates["specificity"]
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


def rate_card(label: str, rate: Mapping[str, Any], word: str) -> dict[str, Any]:
    """Return the card of a rate that ``rates_of_images`` measured."""
    value = rate["hits"] / rate["total"] if rate["total"] else None
    return _card(label, value, rate["interval"], f"{rate['hits']:,} of {rate['total']:,} {word}")


def _cards(facts: SplitFacts) -> list[dict[str, Any]]:
    """Return the figures that stand first, each with its interval."""
    metrics, intervals, number = facts.metrics, facts.intervals, len(facts.rows.targets)
    cards = []
    if facts.positive is not None and facts.rates is not None:
        name = short(facts.positive.name)
        for key, label in (("recall", f"recall of {name}"), ("specificity", "specificity")):
            word = "found" if key == "recall" else "left alone"
            cards.append(rate_card(label, facts.rates[key], word))
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


def _matrix(facts: SplitFacts) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the confusion matrix of the most probable class, row by row; none of many classes."""
    cells = facts.metrics["confusion_matrix"]
    if cells is None or len(cells) > MOST_CELLS:
        return []
    has_buttons = facts.positive is None and facts.name == "valid"
    return [
        (
            short(facts.rows.classes[target]),
            [
                {
                    "text": f"{number:,}", "is_right": target == pred,
                    "key": f"{target}-{pred}" if has_buttons and target != pred and number else "",
                }
                for pred, number in enumerate(row)
            ],
        )
        for target, row in enumerate(cells)
    ]  # fmt: skip


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
