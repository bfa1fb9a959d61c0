"""Where in the images of each class the evidence lies: mean maps as figures of the page.

Reads: images, backbone weights. Writes: nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.deployment.classifier import Classifier
from featcache.deployment.explainer import Explainer
from featcache.deployment.occlusion import choose_side, sum_cells
from featcache.errors import DataError, printable
from featcache.evaluation.evidence import (
    EXPECTED_OUTSIDE,
    MIDDLE,
    MOST_IMAGES,
    SIGNS,
    ClassEvidence,
    choose_images,
)
from featcache.extraction.earlier import refuse_dark_colour
from featcache.formatting import count, percent, shorten
from featcache.heads.run import Run
from featcache.reporting.charts import Chart
from featcache.reporting.facts import Facts, SplitFacts
from featcache.reporting.pictures import FoundImages, Key
from featcache.runtime import Say

_MOST_CLASSES = 8  # whose maps are shown
_SIDE, _GAP = 280, 1  # of a map in the picture's own units
_FOR, _AGAINST = "#c2402a", "#2f6fb5"
_LEAST_SHARE = 0.25  # of the strongest cell's, to get a sign


@dataclass(frozen=True)
class EvidencePart:
    """What the page says of one split.

    Attributes:
        text: What is shown.
        charts: A map for each class and backbone.
    """

    text: str
    charts: list[Chart]


def measure_evidence(
    facts: Facts, classifier: Classifier, images: FoundImages, say: Say
) -> dict[str, EvidencePart]:
    """Return the mean maps of the classes in valid and test, by the name of the split.

    Empty, after a line that says why, where the backbone has no map.

    Args:
        facts: The run, and the rows.
        classifier: The run, with its backbones.
        images: Where the images are.
        say: Gets lines for people.

    Raises:
        DataError: If they are dark colour, as ``predict`` has it.
    """
    reader = _Reader(facts.run, classifier, images)
    splits = [split for split in (facts.valid, facts.test) if split is not None]
    say(f"evidence: the maps of up to {MOST_IMAGES} images of each class")
    found = {split.name: reader.measure(split) for split in splits}
    parts = {name: _part(name, classes, reader.names) for name, classes in found.items() if classes}
    if not parts:
        why = "no image was read, or no backbone's features are the mean over a map"
        say(f"no maps of the evidence: {why}")
    return parts


class _Reader:
    """Explains images of a run's rows."""

    def __init__(self, run: Run, classifier: Classifier, images: FoundImages) -> None:
        self._run, self._images = run, images
        self._backbones = [recipe.backbone.name for recipe in classifier.recipes]
        for recipe in classifier.recipes:
            refuse_dark_colour(recipe, images.dataset, run.path)
        self._explainer = Explainer(classifier)

    @property
    def names(self) -> list[str]:
        """Of the backbones that have maps."""
        pairs = zip(self._backbones, self._explainer.has_map, strict=True)
        return [name for name, has_map in pairs if has_map]

    def measure(self, split: SplitFacts) -> list[dict[str, Any]]:
        """Return the figures of each class of which an image was read."""
        found = []
        for column, name in enumerate(self._run.classes[:_MOST_CLASSES]):
            targets = split.rows.targets
            is_of = targets[:, column] == 1 if split.rows.has_labels else targets == column
            rows = np.flatnonzero(is_of)
            evidence = ClassEvidence(name, len(rows))
            for row in choose_images(rows).tolist():
                key = split.key(row)
                pixels = self._read(key)
                if pixels is None:
                    continue
                planes = self._explainer.locate(pixels, key[1], column).planes
                shown = [p for p, has in zip(planes, self._explainer.has_map, strict=True) if has]
                if not shown:
                    return []
                evidence.add(shown, split.rows.groups[row] or key[1])
            if evidence.num_images:
                found.append(evidence.as_dict())
        return found

    def _read(self, key: Key) -> list[npt.NDArray[np.uint8]] | None:
        """Return the pixels of an image, None where it is gone, changed or damaged."""
        images = self._images
        if key not in images.samples:
            return None
        try:
            data = images.dataset.read(images.samples[key])
            if images.is_same(key, hashlib.sha256(data).digest()):
                return self._explainer.read(data, images.dataset)
        except DataError:
            pass
        return None


def _part(
    name: str, classes: Sequence[Mapping[str, Any]], backbones: Sequence[str]
) -> EvidencePart:
    text = (
        "What each place of the network's last map adds, on average, to the log-odds of the class "
        f"that an image is of (+, red), or takes from them (\N{MINUS SIGN}, blue): the mean over "
        f"up to {MOST_IMAGES} images of each class, drawn with a fixed seed. The strongest place "
        f"of each map is the darkest. The dashed square is the middle, {MIDDLE:g} of each side: "
        "evidence outside it may be of how and where pictures were taken. A map shows what the "
        "network used, not where disease is."
    )
    charts = [
        _chart(f"evidence-{name}-{number}-{part}", found, part, backbones)
        for number, found in enumerate(classes) for part in range(len(backbones))
    ]  # fmt: skip
    return EvidencePart(text, charts)


def _chart(
    name: str, found: Mapping[str, Any], part: int, backbones: Sequence[str]
) -> Chart:  # fmt: skip
    plane = np.array(found["maps"][part])
    side = choose_side(min(plane.shape))
    if side < min(plane.shape):
        plane = sum_cells(plane, side)
    called = shorten(printable(found["class"]), 40)
    of_backbone = "" if len(backbones) == 1 else f", by {shorten(printable(backbones[part]), 40)}"
    images = count(found["num_images"], "image")
    if found["num_images"] < found["num_rows"]:
        images = f"{found['num_images']:,} of {count(found['num_rows'], 'image')}"
    shares = [
        f"of what speaks {sign} {called} {_share(found['outside'][sign])}"
        for sign in SIGNS if found["outside"][sign] is not None
    ]  # fmt: skip
    said = "; ".join(shares) or "nothing speaks for or against it"
    summary = (
        f"{said[0].upper()}{said[1:]}. Were it spread evenly, {percent(EXPECTED_OUTSIDE)} would."
    )
    rows = [
        [f"row {number}", *(f"{value:+.3g}" for value in row)]
        for number, row in enumerate(plane.tolist(), 1)
    ]
    header = ["from the top", *(f"column {number}" for number in range(1, plane.shape[1] + 1))]
    return Chart(
        name, f"{called}: {images}{of_backbone}", summary, _draw(name, plane, summary), header, rows
    )


def _share(share: Mapping[str, float | None]) -> str:
    low, high = share["low"], share["high"]
    interval = "" if low is None or high is None else f" (95 %: {low:.0%} to {high:.0%})"
    return f"{percent(share['share'] or 0.0)}{interval} lies outside the middle"


def _draw(name: str, plane: npt.NDArray[np.float64], summary: str) -> str:
    """Return a mean map as an SVG element: a square for each place, with its sign."""
    height, width = plane.shape
    across, down = _SIDE / width, _SIDE / height
    largest = float(np.abs(plane).max()) or 1.0
    cells, signs = [], []
    for (row, column), value in np.ndenumerate(plane):
        share = abs(value) / largest
        cells.append(
            f'<rect x="{column * across:.1f}" y="{row * down:.1f}" width="{across - _GAP:.1f}" '
            f'height="{down - _GAP:.1f}" fill="{_FOR if value > 0 else _AGAINST}" '
            f'fill-opacity="{share:.2f}"/>'
        )
        if share >= _LEAST_SHARE:
            sign = "+" if value > 0 else "\N{MINUS SIGN}"
            signs.append(
                f'<text x="{(column + 0.5) * across:.1f}" y="{(row + 0.5) * down + 4:.1f}" '
                f'class="mid name">{sign}</text>'
            )
    edge, inner = _SIDE * (1 - MIDDLE) / 2, _SIDE * MIDDLE
    middle = (
        f'<rect x="{edge:.1f}" y="{edge:.1f}" width="{inner:.1f}" height="{inner:.1f}" fill="none" '
        'class="faint"/>'
    )
    return (
        f'<svg viewBox="-1 -1 {_SIDE + 1} {_SIDE + 1}" role="img" aria-labelledby="{name}-summary">'
        f'<title id="{name}-summary">{escape(summary)}</title>'
        f"{''.join(cells)}{middle}{''.join(signs)}</svg>"
    )
