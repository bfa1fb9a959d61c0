"""Where in images the evidence for and against their class lies: mean maps, and shares.

Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

MIDDLE = 0.6
"""Of each side of an image: what is called its middle."""
EXPECTED_OUTSIDE = 1 - MIDDLE**2
"""The share of the evidence outside the middle, were it spread evenly."""
MOST_IMAGES = 200
"""Of a class, whose maps are averaged."""
SIGNS = ("for", "against")

_LEAST_UNITS = 10  # fewer have no interval
_NUM_DRAWS = 2000

Plane = npt.NDArray[np.float64]
"""(H, W)"""


class ClassEvidence:
    """Sums the maps of images of one class.

    Args:
        name: The class.
        num_rows: Of the class; the images are all of them or a part.
    """

    def __init__(self, name: str, num_rows: int) -> None:
        self.name, self.num_rows = name, num_rows
        self.num_images = 0
        self._sums: list[Plane] = []
        self._per_unit: dict[Any, npt.NDArray[np.float64]] = {}

    def add(self, planes: Sequence[Plane], unit: Any) -> None:
        """Add an image.

        Args:
            planes: What each position adds to the log-odds of the class, for each backbone.
            unit: What it is one of, a patient as a rule.
        """
        self.num_images += 1
        self._sums = [*map(np.add, self._sums, planes)] if self._sums else [*planes]
        both = np.sum([_outside_and_all(plane) for plane in planes], axis=0)
        known = self._per_unit.get(unit)
        self._per_unit[unit] = both if known is None else known + both

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values.

        Returns:
            ``class``, ``num_rows``, ``num_images``; ``outside``, for ``for`` and ``against`` the
            ``share`` of what raises, and lowers, the log-odds of the class that lies outside the
            middle, with ``low`` and ``high`` of its 95 % interval (bootstrap of the units; None of
            fewer than 10), or None where there is nothing; and ``maps``, for each backbone the mean
            of what each position adds, H rows of W.
        """
        units = np.array([*self._per_unit.values()]).reshape(-1, 2, 2)
        return {
            "class": self.name, "num_rows": self.num_rows, "num_images": self.num_images,
            "outside": {sign: _share(units[:, number]) for number, sign in enumerate(SIGNS)},
            "maps": [(total / self.num_images).tolist() for total in self._sums],
        }  # fmt: skip


def choose_images(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return up to ``MOST_IMAGES`` of the rows of a class, drawn with a fixed seed, ascending."""
    if len(rows) <= MOST_IMAGES:
        return rows
    return np.sort(np.random.default_rng(0).choice(rows, MOST_IMAGES, replace=False))


def share_inside(plane: Plane) -> dict[str, float | None]:
    """Return which share of what speaks for, and against, lies in the middle of the image."""
    shares = dict[str, float | None]()
    for sign, (outside, total) in zip(SIGNS, _outside_and_all(plane), strict=True):
        shares[sign] = float(1 - outside / total) if total > 0 else None
    return shares


def _outside_and_all(plane: Plane) -> npt.NDArray[np.float64]:
    """Return (2, 2): of what speaks for, and against, how much lies outside, and how much is."""
    outside = 1 - np.multiply.outer(*map(_inside, plane.shape))
    signs = np.maximum(plane, 0), np.maximum(-plane, 0)
    return np.array([[(each * outside).sum(), each.sum()] for each in signs])


def _inside(length: int) -> npt.NDArray[np.float64]:
    """Return which share of each of so many cells lies in the middle."""
    edges = np.linspace(-1, 1, length + 1)
    return np.diff(np.clip(edges, -MIDDLE, MIDDLE)) / np.diff(edges)


def _share(units: npt.NDArray[np.float64]) -> dict[str, float | None] | None:
    """Return the share outside of all, and its interval, from both (U, 2) of each unit."""
    outside, total = units.sum(axis=0)
    if not total > 0:
        return None
    found: dict[str, float | None] = {"share": float(outside / total), "low": None, "high": None}
    if len(units) >= _LEAST_UNITS:
        even = np.full(len(units), 1 / len(units))
        drawn = np.random.default_rng(0).multinomial(len(units), even, _NUM_DRAWS) @ units
        shares = drawn[drawn[:, 1] > 0, 0] / drawn[drawn[:, 1] > 0, 1]
        found["low"], found["high"] = np.quantile(shares, (0.025, 0.975)).tolist()
    return found
