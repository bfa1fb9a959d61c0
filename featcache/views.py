"""Views: what the network is shown of an image file, decoded once for every recipe that asks.

View 0 is the plain image. A recipe's pixel rules decide its size; its view rules how many augmented
views follow. Augmentation is seeded by the image's content, so that neither order nor a resumed run
nor a new name changes a view.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featcache.images import PixelRules, fit, load


@dataclass(frozen=True)
class ViewRules:
    """How many views of an image, and how they are made: part of a cache's identity.

    Args:
        num_views: V, view 0 being the plain image.
        augmentation: Name of the augmentation of the others, None if there are none.
    """

    num_views: int = 1
    augmentation: str | None = None

    def for_split(self, name: str, splits: Iterable[str]) -> ViewRules:
        """Return the rules for the images of a split: these, or ``PLAIN`` if none train on it."""
        return self if name == "train" else PLAIN


PLAIN = ViewRules()
"""The plain image alone: what every split but ``train`` gets."""


def training_split(splits: Iterable[str]) -> str | None:
    """Return the split that heads are trained on: ``train``, or ``all`` where there is none."""
    present = set(splits)
    return next((name for name in ("train", "all") if name in present), None)


@dataclass(frozen=True)
class Rendering:
    """Views of one image, and whether a cut-off file was filled in to get them.

    Attributes:
        views: One array per recipe asked for: (V, S, S) if the image is grey, else (V, S, S, 3),
            uint8.
        truncated: The file was cut off.
    """

    views: tuple[npt.NDArray[np.uint8], ...]
    truncated: bool


def render(
    data: bytes, recipes: Sequence[tuple[PixelRules, ViewRules]], sha256: bytes
) -> Rendering:
    """Decode an image file once and make each recipe's views of it.

    Args:
        data: The file's bytes.
        recipes: Pixel and view rules, all with the same bit depth and treatment of cut-off files.
        sha256: Of the bytes; seeds the augmentation.

    Raises:
        DataError: If the bytes do not become an image; ``found`` says why.
    """
    picture = load(data, recipes[0][0])
    views = [fit(picture.pixels, rules)[None] for rules, _ in recipes]
    return Rendering(tuple(views), picture.truncated)
