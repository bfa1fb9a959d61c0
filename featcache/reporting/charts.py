"""The figures of the page: each a plot with its title, its summary and the table behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import printable
from featcache.formatting import count, decimal, percent, shorten
from featcache.metrics.areas import roc_curve
from featcache.metrics.calibration import decision_curve, reliability_table
from featcache.reporting.facts import Positive, SplitFacts
from featcache.reporting.feature_map import FeatureMap
from featcache.reporting.svg import Axis, Dots, Line, Mark, Point, draw, legend_key

_MOST_CURVES = 6
_MOST_LISTED = 20  # rows of a table behind a figure

_Scores = npt.NDArray[np.float64]
_Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Chart:
    """A figure.

    Attributes:
        name: Unique in the page.
        title: One line.
        summary: What is seen, a sentence or two; stands below, and is read aloud.
        svg: The plot.
        header: Of the table behind it.
        rows: Of that table, text.
        legend: Key pictures (SVG) and their names.
    """

    name: str
    title: str
    summary: str
    svg: str
    header: list[str]
    rows: list[list[str]]
    legend: list[tuple[str, str]] = field(default_factory=list)


def curves_of(facts: SplitFacts) -> list[Chart]:
    """Return ROC, precision-recall, decision curve and reliability of a split, where defined."""
    columns = [facts.positive.column] if facts.positive else range(len(facts.rows.classes))
    curves = []
    for column in columns:
        is_yes, scores = facts.answers(column)
        if len(is_yes) and is_yes.any() and not is_yes.all():
            curves.append((column, is_yes, scores))
    charts = []
    if curves:
        charts += [_roc(facts, curves), _precision_recall(facts, curves)]
    if curves and facts.positive is not None:
        charts.append(_net_benefit(facts, facts.positive, *curves[0][1:]))
    return [*charts, *_reliability(facts)]


def _steps(is_yes: _Mask, scores: _Scores) -> tuple[_Scores, npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the distinct scores, falling, and how many yes and no are at or above each."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.diff(scores[order], append=-np.inf))
    found = np.cumsum(is_yes[order])[ends]
    return scores[order][ends], found, ends + 1 - found


def _roc(facts: SplitFacts, curves: Sequence[tuple[int, _Mask, _Scores]]) -> Chart:
    lines, rows, legend, marks = [Line([(0, 0), (1, 1)], is_faint=True)], [], [], list[Mark]()
    for number, (column, is_yes, scores) in enumerate(curves[:_MOST_CURVES]):
        limits, found, alarms = _steps(is_yes, scores)
        ys, xs = found / is_yes.sum(), alarms / (~is_yes).sum()
        corners = (part.tolist() for part in roc_curve(is_yes, scores))
        lines.append(Line(list(zip(*corners, strict=True)), number))
        name = _name(facts, column)
        legend.append((legend_key(number, is_line=True), name))
        rows += [
            [name, f"{limits[i]:.4f}", decimal(ys[i]), decimal(1 - xs[i])]
            for i in few_places(len(limits))
        ]
    if facts.positive is not None:
        marks.append(Mark(_at_threshold(facts), "chosen", f"{facts.name}-roc"))
    areas = [
        f"{_name(facts, column)} {_shown(_area(facts, column))}"
        for column, _, _ in curves[:_MOST_CURVES]
    ]
    interval = facts.intervals["positive_roc_auc" if facts.positive else "roc_auc"]
    limits_text = "" if interval is None else f" (95 %: {' to '.join(map(decimal, interval))})"
    summary = (
        f"Area under the curve: {', '.join(areas)}{limits_text}; 0.5 would be by chance, 1 perfect."
        + (" The diamond is the threshold in use." if marks else "")
    )
    name = f"{facts.name}-roc"
    svg = draw(
        Axis("false alarms, share of the others"), Axis("recall, share found"), lines,
        marks=marks, name=name, summary=summary,
    )  # fmt: skip
    header = ["class", "threshold", "recall", "specificity"]
    return Chart(name, "ROC curve", summary, svg, header, rows, legend if len(legend) > 1 else [])


def _precision_recall(facts: SplitFacts, curves: Sequence[tuple[int, _Mask, _Scores]]) -> Chart:
    lines, rows, legend, marks = list[Line](), [], [], list[Mark]()
    for number, (column, is_yes, scores) in enumerate(curves[:_MOST_CURVES]):
        limits, found, alarms = _steps(is_yes, scores)
        xs, ys = found / is_yes.sum(), found / (found + alarms)
        points = [(0.0, float(ys[0])), *zip(xs.tolist(), ys.tolist(), strict=True)]
        lines.append(Line(points, number))
        lines.append(Line([(0, is_yes.mean()), (1, is_yes.mean())], is_faint=True))
        name = _name(facts, column)
        legend.append((legend_key(number, is_line=True), name))
        rows += [
            [name, f"{limits[i]:.4f}", decimal(xs[i]), decimal(ys[i])]
            for i in few_places(len(limits))
        ]
    if facts.positive is not None and (precision := _precision_at(facts)) is not None:
        recall = _at_threshold(facts)[1]
        marks.append(Mark((recall, precision), "chosen", f"{facts.name}-pr"))
    key = "average_precision"
    per_class, classes = facts.metrics["per_class"], facts.rows.classes
    precisions = [
        f"{_name(facts, column)} {_shown(per_class[classes[column]][key])}"
        for column, _, _ in curves[:_MOST_CURVES]
    ]
    summary = (
        f"Average precision: {', '.join(precisions)}. The faint line is what calling everything "
        "positive gives."
    )
    name = f"{facts.name}-pr"
    svg = draw(
        Axis("recall, share found"), Axis("precision, share right"), lines, marks=marks, name=name,
        summary=summary,
    )  # fmt: skip
    header = ["class", "threshold", "recall", "precision"]
    return Chart(
        name, "Precision and recall", summary, svg, header, rows, legend if len(legend) > 1 else []
    )


def _net_benefit(
    facts: SplitFacts, positive: Positive, is_yes: _Mask, scores: _Scores
) -> Chart:  # fmt: skip
    curve = decision_curve(is_yes, scores, np.linspace(0, 0.99, 100).tolist())
    share = float(is_yes.mean())
    low = -0.25 * share
    of_all = [(row.threshold, row.treat_all) for row in curve if row.treat_all >= low]
    lines = [
        Line([(0, 0), (1, 0)], is_faint=True),
        Line(of_all, 1),
        Line([(row.threshold, row.net_benefit) for row in curve], 0),
    ]
    (benefit,) = decision_curve(is_yes, scores, [min(positive.threshold, 0.999999)])
    marks = [Mark((positive.threshold, benefit.net_benefit), "chosen", f"{facts.name}-benefit")]
    who = _name(facts, positive.column)
    summary = (
        "Net benefit: true positives less false alarms, these weighted by the odds of the "
        f"threshold, per image. At the threshold in use {benefit.net_benefit:.3f}; calling all "
        f"{who} gives {benefit.treat_all:.3f}, calling none 0. It means something where "
        f"{percent(share)} positives are what one will meet, and probabilities are calibrated."
    )
    name = f"{facts.name}-benefit"
    svg = draw(
        Axis("threshold"), Axis("net benefit", low, max(share * 1.1, 0.05)), lines, marks=marks,
        name=name, summary=summary,
    )  # fmt: skip
    rows = [
        [f"{row.threshold:.2f}", f"{row.net_benefit:.3f}", f"{row.treat_all:.3f}"]
        for row in curve[::5]
    ]
    legend = [
        (legend_key(0, is_line=True), "this head"), (legend_key(1, is_line=True), "call all"),
    ]  # fmt: skip
    header = ["threshold", "net benefit", "of calling all"]
    return Chart(name, "Decision curve", summary, svg, header, rows, legend)


def _reliability(facts: SplitFacts) -> list[Chart]:
    """Return how often rows are what they are given a probability for."""
    if facts.positive is not None:
        is_yes, probs = facts.answers(facts.positive.column)
        what, who = "probability", f"is {_name(facts, facts.positive.column)}"
    elif not facts.rows.has_labels:
        preds = facts.rows.preds
        is_yes = preds == facts.rows.targets
        probs = facts.rows.probs[np.arange(len(preds)), preds]
        what, who = "probability of the most probable class", "is right"
    else:
        return []
    if not len(is_yes):
        return []
    bins = [row for row in reliability_table(is_yes, probs) if row.num_samples]
    most = max(row.num_samples for row in bins)
    points: list[Point] = [(row.mean_prob or 0.0, row.share_of_yes or 0.0) for row in bins]
    sizes = [3 + 7 * (row.num_samples / most) ** 0.5 for row in bins]
    facts_ = facts.calibration
    summary = (
        f"How often an image {who}, by the probability it was given: on the diagonal that is as "
        f"often as was said. Larger dots are more images. Over all classes: log loss "
        f"{decimal(facts_['log_loss'])}, Brier score {decimal(facts_['brier'])}, calibration error "
        f"(ECE, {facts_['num_bins']} bins) {decimal(facts_['ece'])}."
    )
    name = f"{facts.name}-reliability"
    svg = draw(
        Axis(what), Axis(f"share that {who}"), [Line([(0, 0), (1, 1)], is_faint=True),
        Line(points, 0)], [Dots(points, 0, sizes=sizes)], name=name, summary=summary,
    )  # fmt: skip
    rows = [
        [f"{row.low:.1f} to {row.high:.1f}", f"{row.num_samples:,}",
         decimal(row.mean_prob or 0.0), decimal(row.share_of_yes or 0.0)]
        for row in bins
    ]  # fmt: skip
    header = ["probability", "images", "mean probability", f"share that {who}"]
    return [Chart(name, "Reliability", summary, svg, header, rows)]


def sweep_chart(trials: list[dict[str, str]] | None, metric: str) -> Chart | None:
    """Return the score of each trial of a sweep; None where there was none."""
    done = list[tuple[float, float, dict[str, str]]]()
    for trial in trials or []:
        try:
            done.append((float(trial["trial"]), float(trial["score"]), trial))
        except (KeyError, ValueError):
            continue  # not done
    if trials is None or len(done) < 2:
        return None
    scores = [score for _, score, _ in done]
    low, high = min(scores), max(scores)
    margin = (high - low) * 0.08 or 0.05
    usual = [(n, score) for n, score, _ in done if n == 0]
    others = [(n, score) for n, score, _ in done if n != 0]
    summary = (
        f"{count(len(trials), 'trial')}, {len(done):,} of them done, the others given up. Trial 0 "
        f"(square) is the default head. Scores from {low:.4g} to {high:.4g}; the best of many is "
        "too good by chance."
    )
    last = max(number for number, _, _ in done)
    svg = draw(
        Axis("trial", 0, max(last, 1)), Axis(shorten(metric, 40), low - margin, high + margin), [],
        [Dots(others, 0), Dots(usual, 1, sizes=[5.0] * len(usual))], name="sweep", summary=summary,
    )  # fmt: skip
    options = [
        name for name in done[0][2]
        if name in {"hidden", "dropout", "learning_rate", "weight_decay", "batch_size", "epochs"}
    ]  # fmt: skip
    order = sorted(done, key=lambda item: item[1], reverse=metric != "loss")
    rows = [
        [f"{number:.0f}", f"{score:.4f}", *(_short(trial[name]) for name in options)]
        for number, score, trial in order[:10]
    ]
    header = ["trial", "score", *(name.replace("_", " ") for name in options)]
    return Chart("sweep", "Trials of the sweep", summary, svg, header, rows)


def map_chart(facts: FeatureMap, classes: Sequence[str]) -> Chart | None:
    """Return the features on their two principal components; None of one row."""
    if len(facts.points) < 3:
        return None
    (left, bottom), (right, top) = facts.points.min(axis=0), facts.points.max(axis=0)
    if right - left <= 0 or top - bottom <= 0:
        return None
    across, up = 0.04 * (right - left), 0.04 * (top - bottom)
    kinds = [name for name in classes if name in facts.targets][: _MOST_CURVES - 1]
    clouds, legend = [], []
    targets = np.array(facts.targets, dtype=object)
    for number, name in enumerate([*kinds, None]):
        chosen = targets == name if name is not None else ~np.isin(facts.targets, kinds)
        points = [(float(a), float(b)) for a, b in facts.points[chosen]]
        if points:
            clouds.append(Dots(points, number))
            label = "others" if name is None else shorten(printable(name), 40)
            legend.append((legend_key(number, is_line=False), label))
    shares = [percent(share) for share in facts.shares]
    part = "" if len(facts.points) == facts.num_rows else f" {len(facts.points):,} of"
    summary = (
        f"Features of{part} {count(facts.num_rows, 'image')} on the first two principal "
        f"components of the training images, which hold {shares[0]} and {shares[1]} of their "
        "variance. The rest is not shown: what looks mixed here may be apart, and distances "
        "mislead."
    )
    svg = draw(
        Axis("first component", left - across, right + across),
        Axis("second component", bottom - up, top + up), [], clouds, name="map", summary=summary,
    )  # fmt: skip
    rows = []
    for name in [*kinds]:
        chosen = targets == name
        mean, spread = facts.points[chosen].mean(axis=0), facts.points[chosen].std(axis=0)
        rows.append([
            shorten(printable(name), 40), f"{int(chosen.sum()):,}",
            *(f"{m:.3g} ± {s:.2g}" for m, s in zip(mean, spread, strict=True)),
        ])  # fmt: skip
    header = ["class", "images shown", "first, mean ± sd", "second, mean ± sd"]
    return Chart("map", "Map of the features", summary, svg, header, rows, legend)


def _at_threshold(facts: SplitFacts) -> Point:
    """Return false alarm rate and recall at the threshold in use."""
    assert facts.positive is not None
    is_yes, scores = facts.answers(facts.positive.column)
    called = scores >= facts.positive.threshold
    return float(called[~is_yes].mean()), float(called[is_yes].mean())


def _precision_at(facts: SplitFacts) -> float | None:
    assert facts.positive is not None
    is_yes, scores = facts.answers(facts.positive.column)
    called = scores >= facts.positive.threshold
    return float(is_yes[called].mean()) if called.any() else None


def few_places(number: int) -> list[int]:
    """Return places in a list, evenly spread, with both ends."""
    places = np.linspace(0, number - 1, min(number, _MOST_LISTED)).round().tolist()
    return sorted({int(place) for place in places})


def _name(facts: SplitFacts, column: int) -> str:
    return shorten(printable(facts.rows.classes[column]), 40)


def _area(facts: SplitFacts, column: int) -> float | None:
    area: float | None = facts.metrics["per_class"][facts.rows.classes[column]]["roc_auc"]
    return area


def _shown(value: float | None) -> str:
    return "undefined" if value is None else decimal(value)


def _short(text: str) -> str:
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return shorten(printable(text), 40)
