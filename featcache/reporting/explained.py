"""Maps of mistakes, beside their pictures: what in them spoke for a class and against it.

Reads: images, the weights of the backbone. Writes: nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from featcache.deployment.classifier import Classifier
from featcache.deployment.explainer import Explainer, Explanation
from featcache.errors import FeatcacheError, printable
from featcache.extraction.earlier import refuse_dark_colour
from featcache.formatting import count
from featcache.reporting.names import Explained, short
from featcache.reporting.pictures import SIDE, FoundImages, Key, as_url
from featcache.runtime import Say

_FOR, _AGAINST = (178, 24, 43), (33, 102, 172)  # ends of ColorBrewer's RdBu
_STRONGEST = 0.6  # opacity of the strongest cell
_SIGNED = 0.25  # of the strongest cell: those above it bear a plus or a minus
_MOST_EXPLAINED = 10  # the worst of each split: each is seen some fifty times, covered elsewhere
_LONG_SECONDS = 10.0  # what takes longer is announced


@dataclass(frozen=True)
class Maps:
    """Explanations of images.

    Attributes:
        by_image: Those that could be made, by split and path.
        note: Why there are none, or what they show; for the page.
    """

    by_image: dict[Key, Explained]
    note: str


def explain_images(
    classifier: Classifier,
    images: FoundImages,
    wanted: Sequence[Key],
    positive: str | None,
    say: Say,
) -> Maps:
    """Return the maps of images; none, and why, where the network cannot be run.

    Args:
        classifier: The run, with its backbones.
        images: Where they are.
        wanted: Split and path of each, the worst first; so many of each split are explained.
        positive: The class to explain; None takes the most probable one of each image.
        say: Receives how long it takes, where that is long.
    """
    if not wanted:
        return Maps({}, "")
    made, splits = dict[Key, Explained](), dict.fromkeys(split for split, _ in wanted)
    wanted = [
        key for split in splits
        for key in [each for each in wanted if each[0] == split][:_MOST_EXPLAINED]
    ]  # fmt: skip
    try:
        explainer = Explainer(classifier, positive)
        for recipe in classifier.recipes:
            refuse_dark_colour(recipe, images.dataset, classifier.run.path)
        for number, key in enumerate(wanted):
            start = time.monotonic()
            pixels = explainer.read(images.samples[key], images.dataset)
            explanation = explainer.explain(pixels, key[1])
            made[key] = _as_explained(explanation, pixels)
            seconds, left = time.monotonic() - start, len(wanted) - number - 1
            # The first one chooses an engine as well: the second says what each of them costs.
            if number == 1 and seconds * left > _LONG_SECONDS:
                say(f"explaining {count(left, 'more image')}, about {seconds:.1f} s each")
    except FeatcacheError as error:
        why = " ".join(str(error).split())
        say(f"pictures without maps: {printable(why)}")
        return Maps({}, NO_MAPS)
    return Maps(made, _NOTE if made else "")


NO_MAPS = "The pictures have no maps, as the network could not be run here."
_NOTE = (
    f"Beside the pictures of the worst {_MOST_EXPLAINED} is what the network sees, with a map: red "
    "cells with + spoke for the class named below, blue ones with \N{MINUS SIGN} against it, and "
    "their sum is its log-odds less those of the mean training image. A map shows what the network "
    "used, not where disease is."
)


def _as_explained(
    explanation: Explanation, pixels: Sequence[npt.NDArray[np.uint8]]
) -> Explained:  # fmt: skip
    text = f"for {short(explanation.positive)}: log-odds {explanation.log_odds:+.2f}"
    if any(made["disagree"] for made in explanation.maps):
        text += "; map and occlusion DISAGREE: believe neither"
    urls = [
        as_url(_overlay(seen, np.array(made["map"])))
        for made, seen in zip(explanation.maps, pixels, strict=True)
        if made["map"] is not None
    ]
    if not urls:
        text += "; this network has no map"
    return Explained(urls, text)


def _overlay(pixels: npt.NDArray[np.uint8], plane: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    """Return a picture (SIDE, SIDE, 3) with the cells of a map on it, as they are, unsmoothed."""
    image = Image.fromarray(pixels).convert("L").resize((SIDE, SIDE)).convert("RGB")
    largest = float(np.abs(plane).max(initial=0)) or 1.0
    rows, columns = plane.shape
    layer = Image.new("RGBA", image.size)
    draw = ImageDraw.Draw(layer)
    for row, column in np.ndindex(rows, columns):
        share = float(plane[row, column]) / largest
        top, bottom = SIDE * row // rows, SIDE * (row + 1) // rows - 1
        left, right = SIDE * column // columns, SIDE * (column + 1) // columns - 1
        colour = (*(_FOR if share > 0 else _AGAINST), round(255 * _STRONGEST * abs(share)))
        draw.rectangle((left, top, right, bottom), fill=colour)
        arm = min(right - left, bottom - top) // 5
        if abs(share) >= _SIGNED and arm >= 1:
            x, y = (left + right) // 2, (top + bottom) // 2
            draw.line((x - arm, y, x + arm, y), fill="white", width=2)
            if share > 0:
                draw.line((x, y - arm, x, y + arm), fill="white", width=2)
    return np.asarray(Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB"))
