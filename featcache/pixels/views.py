"""Views: what the network is shown of an image file, decoded once for every recipe that asks.

View 0 is the plain image. A recipe's pixel rules decide its size; its view rules how many augmented
views follow. Only images to train on have those; everything else is seen as it is.

A view is drawn from the image's content, the augmentation's name and the view's number alone:
neither order nor a resumed run, a new file name or other workers change it, and more views leave
the first ones as they are. A distribution never changes under its name: a changed one is a new
name, since the name is what a cache's identity records.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from featcache.data.folders import training_split
from featcache.errors import ConfigError
from featcache.pixels.images import PixelRules, fit, load
from featcache.pixels.resampling import warp

MAX_VIEWS = 64

_NUM_DRAWS = 32  # numbers a view may use; a fixed count, so that adding a use moves no other
_CROP_AREA, _CROP_ASPECT, _CROP_ATTEMPTS = 0.6, 4 / 3, 10
_DEGREES, _SHIFT, _ZOOM, _JITTER = 7.0, 0.05, 0.1, 0.1
_MARGIN = 0.12  # of the side; the farthest that a corner comes from is 0.11 outside
_GRID = 1 << 16

_Pixels: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
_Draws: TypeAlias = npt.NDArray[np.float64]
_Augmentation: TypeAlias = Callable[["_Shown", Sequence[_Draws]], Iterable[_Pixels]]


@dataclass(frozen=True)
class ViewRules:
    """How many views of an image, and how they are made: part of a cache's identity.

    Args:
        num_views: V, view 0 being the plain image.
        augmentation: Name of the augmentation of the others, None if there are none.

    Raises:
        ConfigError: If a value has no meaning, or the two do not belong together.
    """

    num_views: int = 1
    augmentation: str | None = None

    def __post_init__(self) -> None:
        count, name = self.num_views, self.augmentation
        names = ", ".join(AUGMENTATIONS)
        if type(count) is not int or not 1 <= count <= MAX_VIEWS:
            raise ConfigError("--views", expected=f"1 to {MAX_VIEWS}", found=repr(count))
        if name is not None and name not in AUGMENTATIONS:
            raise ConfigError("--augment", expected=f"one of {names}", found=repr(name))
        if name is None and count > 1:
            raise ConfigError(
                "--augment", expected=f"one of {names}, to make {count - 1} of {count} views with",
                found="none", hint="Name one, or leave --views out",
            )  # fmt: skip
        if name is not None and count == 1:
            raise ConfigError(
                "--views", expected=f"2 or more with --augment {name}", found="1, the plain image",
                hint="Say how many with --views, or leave --augment out",
            )  # fmt: skip
        if name == "flip" and count != 2:
            raise ConfigError(
                "--views", expected="2 with --augment flip: the image and its mirror image",
                found=count, hint="Use --views 2, or another --augment",
            )  # fmt: skip

    def as_identity(self) -> dict[str, Any]:
        """Return the rules as JSON values, under the identity's names."""
        return {"views": self.num_views, "augmentation": self.augmentation}

    @classmethod
    def from_identity(cls, identity: Mapping[str, Any]) -> ViewRules:
        """Return the rules of an identity (other keys in it are left alone).

        Raises:
            ConfigError: If a value is one this version does not know.
        """
        return cls(identity.get("views", 1), identity.get("augmentation"))

    def for_split(self, name: str, splits: Iterable[str]) -> ViewRules:
        """Return the rules for the images of a split: these, or ``PLAIN`` if none train on it.

        Args:
            name: The split.
            splits: All splits of its data set.
        """
        return self if name == training_split(splits) else PLAIN


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
    views = [_make_views(picture.pixels, rules, wanted, sha256) for rules, wanted in recipes]
    return Rendering(tuple(views), picture.truncated)


def _make_views(picture: _Pixels, rules: PixelRules, wanted: ViewRules, sha256: bytes) -> _Pixels:
    """Return views (V, S, S) or (V, S, S, 3) of a picture (H, W) or (H, W, 3)."""
    plain = fit(picture, rules)
    if wanted.augmentation is None:
        return plain[None]
    augment = AUGMENTATIONS[wanted.augmentation]
    draws = [_draw(wanted.augmentation, i, sha256) for i in range(1, wanted.num_views)]
    return np.stack([plain, *augment(_Shown(picture, rules, plain), draws)])


def _draw(name: str, view: int, sha256: bytes) -> _Draws:
    """Return numbers (32,) in [0, 1) for one view of one image.

    From a hash and not from a generator of NumPy's, whose distributions may change (NEP 19).
    """
    text = f"featcache view {view} {name} ".encode() + sha256
    words = np.frombuffer(hashlib.shake_256(text).digest(8 * _NUM_DRAWS), "<u8")
    draws: _Draws = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return draws


# -------------------------------------------------------------------------------- augmentations


@dataclass(frozen=True)
class _Shown:
    """What views are made of: a picture (H, W) or (H, W, 3), how it is fitted, and view 0."""

    picture: _Pixels
    rules: PixelRules
    plain: _Pixels


def _flip(shown: _Shown, draws: Sequence[_Draws]) -> Iterable[_Pixels]:
    """View 1 is the mirror image: a view drawn in training is flipped with p = 0.5.

    Two views are all there are, so nothing is left to chance here.
    """
    return [shown.plain[:, ::-1] for _ in draws]


def _crop(shown: _Shown, draws: Sequence[_Draws]) -> Iterable[_Pixels]:
    """A random resized crop of 60 to 100 % of the picture, flipped with p = 0.5.

    torchvision's ``RandomResizedCrop``: the area's share is uniform, the logarithm of the aspect
    uniform between those of 3/4 and 4/3, the place uniform, ten attempts, else the whole picture.
    Two things differ: torchvision's areas start at 8 %, which would often miss the lungs; and the
    aspect is relative to the picture's own, so that ``squash`` distorts a crop as it distorts
    view 0. The crop goes through the recipe's own pixel rules.
    """
    for draw in draws:
        view = fit(_random_part(shown.picture, draw[1:]), shown.rules)
        yield view[:, ::-1] if draw[0] < 0.5 else view


def _random_part(pixels: _Pixels, draw: _Draws) -> _Pixels:
    height, width = pixels.shape[:2]
    for attempt in range(_CROP_ATTEMPTS):
        area = _between(_CROP_AREA, 1, draw[2 + 2 * attempt])
        aspect = _CROP_ASPECT ** _between(-1, 1, draw[3 + 2 * attempt])
        across, down = math.sqrt(area * aspect), math.sqrt(area / aspect)  # shares of the sides
        if across <= 1 and down <= 1:
            w, h = max(1, round(across * width)), max(1, round(down * height))
            left, top = int(draw[0] * (width - w + 1)), int(draw[1] * (height - h + 1))
            return np.ascontiguousarray(pixels[top : top + h, left : left + w])
    return pixels


def _xray(shown: _Shown, draws: Sequence[_Draws]) -> Iterable[_Pixels]:
    """What differs between two exposures of one chest: how it lies, and how bright it is.

    All uniform: rotation by -7 to 7 degrees, shift by -5 to 5 % of either side, magnification by
    1 to 1.1; then contrast about the mean and brightness by factors of 0.9 to 1.1, as
    torchvision's ``ColorJitter(0.1, 0.1)`` defines them. No flip: the heart is on one side.

    What comes in at the edges is their mirror image; black corners, which no real image has, would
    tell an augmented view from a plain one. View 0 is what is turned: turned at twice its size and
    shrunk afterwards (twice the time), Lite0's features lie 0.09 from those turned at four times
    its size, turned as it is 0.13, and the augmentation itself moves them by 0.46 (relative L2).
    """
    side = len(shown.plain)
    margin = math.ceil(_MARGIN * side)
    edges = [(margin, margin)] * 2 + [(0, 0)] * (shown.plain.ndim - 2)
    padded = np.pad(shown.plain, edges, mode="symmetric")
    for draw in draws:
        view = warp(padded, _random_placing(draw, side, margin), side)
        contrast, brightness = (_between(1 - _JITTER, 1 + _JITTER, d) for d in draw[4:6])
        mean = float(view.mean())
        table = brightness * (contrast * (np.arange(256) - mean) + mean)
        yield np.clip(np.rint(table), 0, 255).astype(np.uint8)[view]


def _random_placing(draw: _Draws, side: int, margin: int) -> tuple[float, ...]:
    """Return a, b, c, d, e, f: what stands at (x, y) comes from (ax + by + c, dx + ey + f).

    Rounded to multiples of 2**-16: all products and sums are then exact in float64, and the pixels
    the same wherever they are computed. (One pixel of 50,000 off by 1 of 255 moves Lite0's features
    by 1.4e-4 to 7.8e-4, and ``verify --data`` allows 1e-4.)
    """
    angle = math.radians(_between(-_DEGREES, _DEGREES, draw[0]))
    right, down = (_between(-_SHIFT, _SHIFT, d) * side for d in draw[1:3])
    zoom = _between(1, 1 + _ZOOM, draw[3])
    cosine, sine = math.cos(angle) / zoom, math.sin(angle) / zoom
    middle = side / 2
    x, y = middle + right, middle + down  # where the picture's middle goes
    c, f = middle + margin - cosine * x - sine * y, middle + margin + sine * x - cosine * y
    return tuple(round(v * _GRID) / _GRID for v in (cosine, sine, c, -sine, cosine, f))


def _between(low: float, high: float, draw: float) -> float:
    return low + (high - low) * float(draw)


AUGMENTATIONS: dict[str, _Augmentation] = {"flip": _flip, "crop": _crop, "xray": _xray}
"""By name: a picture and the numbers of each view -> views (S, S) or (S, S, 3)."""

PLAIN = ViewRules()
"""The plain image alone: what every split but the one to train on gets."""
