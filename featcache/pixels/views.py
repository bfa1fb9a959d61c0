"""Views of an image: the plain image and its augmentations. The file is decoded once for all.

View 0 is the plain image. Pixel rules decide the size of a view, view rules the number of augmented
views. Only training images have augmented views.

A view depends only on the image's content, the name of the augmentation and the number of the view.
Order, resumed runs, new file names and other workers do not change it, and asking for more views
keeps the first ones. The distribution of an augmentation never changes: a cache's identity records
only its name, so a changed distribution needs a new name.
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
from featcache.pixels.facts import PictureFacts, measure_picture
from featcache.pixels.images import PixelRules, load, resize_to_square
from featcache.pixels.inspection import deep_kind, stored_channels
from featcache.pixels.resampling import warp

MAX_VIEWS = 64

_NUM_DRAWS = 32  # random numbers per view; fixed, so that using one more changes no other
_CROP_AREA, _CROP_ASPECT, _CROP_ATTEMPTS = 0.6, 4 / 3, 10
_DEGREES, _SHIFT, _ZOOM, _JITTER = 7.0, 0.05, 0.1, 0.1
_MARGIN = 0.12  # share of the side; corners come from at most 0.11 outside
_GRID = 1 << 16

_Pixels: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
_Draws: TypeAlias = npt.NDArray[np.float64]
_Augmentation: TypeAlias = Callable[["_ViewSource", Sequence[_Draws]], Iterable[_Pixels]]


@dataclass(frozen=True)
class ViewRules:
    """Number of views of an image, and their augmentation: part of a cache's identity.

    Args:
        num_views: V; view 0 is the plain image.
        augmentation: Name of the augmentation of the other views; None if there are none.

    Raises:
        ConfigError: If a value is invalid, or the two do not fit together.
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
        """Return the rules as JSON values, with the keys of an identity."""
        return {"views": self.num_views, "augmentation": self.augmentation}

    @classmethod
    def from_identity(cls, identity: Mapping[str, Any]) -> ViewRules:
        """Return the rules in an identity; other keys are ignored.

        Raises:
            ConfigError: If this version does not know a value.
        """
        return cls(identity.get("views", 1), identity.get("augmentation"))

    def for_split(self, name: str, splits: Iterable[str]) -> ViewRules:
        """Return these rules for the training split, and ``PLAIN`` for other splits.

        Args:
            name: The split.
            splits: All splits of the data set.
        """
        return self if name == training_split(splits) else PLAIN


@dataclass(frozen=True)
class Rendering:
    """Views of one image.

    Attributes:
        views: One array per recipe: (V, S, S) if the image is grey, else (V, S, S, 3), uint8.
        truncated: Whether the file was cut off and has been filled in.
        facts: Of the picture at its own size, where they were asked for.
    """

    views: tuple[npt.NDArray[np.uint8], ...]
    truncated: bool
    facts: PictureFacts | None = None


def render(
    data: bytes,
    recipes: Sequence[tuple[PixelRules, ViewRules]],
    sha256: bytes,
    *,
    with_facts: bool = False,
) -> Rendering:
    """Decode an image file once and make each recipe's views of it.

    Args:
        data: The file's bytes.
        recipes: Pixel and view rules, all with the same bit depth and treatment of cut-off files.
        sha256: sha256 of the bytes; seeds the augmentation.
        with_facts: Measure the picture too.

    Raises:
        DataError: If the bytes cannot be decoded; ``found`` says why.
    """
    picture = load(data, recipes[0][0])
    views = [_make_views(picture.pixels, rules, wanted, sha256) for rules, wanted in recipes]
    facts = None
    if with_facts:
        is_deep = picture.dicom_is_deep
        facts = measure_picture(
            picture.pixels, num_channels=stored_channels(data) if is_deep is None else 1,
            is_deep=deep_kind(data) is not None if is_deep is None else is_deep,
        )  # fmt: skip
    return Rendering(tuple(views), picture.truncated, facts)


def _make_views(picture: _Pixels, rules: PixelRules, wanted: ViewRules, sha256: bytes) -> _Pixels:
    """Return views (V, S, S) or (V, S, S, 3) of a picture (H, W) or (H, W, 3)."""
    plain = resize_to_square(picture, rules)
    if wanted.augmentation is None:
        return plain[None]
    augment = AUGMENTATIONS[wanted.augmentation]
    draws = [_draw(wanted.augmentation, i, sha256) for i in range(1, wanted.num_views)]
    return np.stack([plain, *augment(_ViewSource(picture, rules, plain), draws)])


def _draw(name: str, view: int, sha256: bytes) -> _Draws:
    """Return numbers (32,) in [0, 1) for one view of one image.

    They come from a hash, as the distributions of NumPy's generators may change (NEP 19).
    """
    text = f"featcache view {view} {name} ".encode() + sha256
    words = np.frombuffer(hashlib.shake_256(text).digest(8 * _NUM_DRAWS), "<u8")
    draws: _Draws = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return draws


# -------------------------------------------------------------------------------- augmentations


@dataclass(frozen=True)
class _ViewSource:
    """Input of an augmentation: a picture (H, W) or (H, W, 3), its pixel rules, and view 0."""

    picture: _Pixels
    rules: PixelRules
    plain: _Pixels


def _flip(source: _ViewSource, draws: Sequence[_Draws]) -> Iterable[_Pixels]:
    """Return the mirror image as view 1: a view drawn in training is flipped with p = 0.5.

    There are only these two views, so nothing is random here.
    """
    return [source.plain[:, ::-1] for _ in draws]


def _crop(source: _ViewSource, draws: Sequence[_Draws]) -> Iterable[_Pixels]:
    """Yield random resized crops of 60 to 100 % of the picture, flipped with p = 0.5.

    As torchvision's ``RandomResizedCrop``: the share of the area is uniform, the logarithm of the
    aspect ratio is uniform between those of 3/4 and 4/3, the position is uniform; after ten failed
    attempts the whole picture is used. Two things differ. torchvision's areas start at 8 %, which
    would often miss the lungs. And the aspect ratio is relative to the picture's own, so that
    ``squash`` distorts a crop as it distorts view 0. Pixel rules apply to the crop.
    """
    for draw in draws:
        view = resize_to_square(_random_part(source.picture, draw[1:]), source.rules)
        yield view[:, ::-1] if draw[0] < 0.5 else view


def _random_part(pixels: _Pixels, draw: _Draws) -> _Pixels:
    height, width = pixels.shape[:2]
    for attempt in range(_CROP_ATTEMPTS):
        area = _scale_draw(_CROP_AREA, 1, draw[2 + 2 * attempt])
        aspect = _CROP_ASPECT ** _scale_draw(-1, 1, draw[3 + 2 * attempt])
        across, down = math.sqrt(area * aspect), math.sqrt(area / aspect)  # as shares of the sides
        if across <= 1 and down <= 1:
            w, h = max(1, round(across * width)), max(1, round(down * height))
            left, top = int(draw[0] * (width - w + 1)), int(draw[1] * (height - h + 1))
            return np.ascontiguousarray(pixels[top : top + h, left : left + w])
    return pixels


def _xray(source: _ViewSource, draws: Sequence[_Draws]) -> Iterable[_Pixels]:
    """Yield views as two exposures of one chest differ: in position and brightness.

    All uniform: rotation by -7 to 7 degrees, shift by -5 to 5 % of either side, magnification by
    1 to 1.1; then contrast about the mean and brightness by factors of 0.9 to 1.1, as
    torchvision's ``ColorJitter(0.1, 0.1)`` defines them. No flip: the heart is on one side.

    Edges are filled with their mirror image. Black corners, which no real image has, would tell
    augmented views from plain ones. View 0 is transformed at its own size: compared with four times
    the size, Lite0's features then differ by 0.13 (relative L2); at twice the size, in twice the
    time, by 0.09. The augmentation itself changes them by 0.46.
    """
    side = len(source.plain)
    margin = math.ceil(_MARGIN * side)
    edges = [(margin, margin)] * 2 + [(0, 0)] * (source.plain.ndim - 2)
    padded = np.pad(source.plain, edges, mode="symmetric")
    for draw in draws:
        view = warp(padded, _random_placing(draw, side, margin), side)
        contrast, brightness = (_scale_draw(1 - _JITTER, 1 + _JITTER, d) for d in draw[4:6])
        mean = float(view.mean())
        table = brightness * (contrast * (np.arange(256) - mean) + mean)
        yield np.clip(np.rint(table), 0, 255).astype(np.uint8)[view]


def _random_placing(draw: _Draws, side: int, margin: int) -> tuple[float, ...]:
    """Return a, b, c, d, e, f: pixel (x, y) is taken from (ax + by + c, dx + ey + f).

    They are rounded to multiples of 2**-16. All products and sums are then exact in float64, and
    the pixels are the same on every machine. (One pixel of 50,000 off by 1 of 255 moves Lite0's
    features by 1.4e-4 to 7.8e-4, and ``verify --data`` allows 1e-4.)
    """
    angle = math.radians(_scale_draw(-_DEGREES, _DEGREES, draw[0]))
    right, down = (_scale_draw(-_SHIFT, _SHIFT, d) * side for d in draw[1:3])
    zoom = _scale_draw(1, 1 + _ZOOM, draw[3])
    cosine, sine = math.cos(angle) / zoom, math.sin(angle) / zoom
    middle = side / 2
    x, y = middle + right, middle + down  # where the middle of the picture goes
    c, f = middle + margin - cosine * x - sine * y, middle + margin + sine * x - cosine * y
    return tuple(round(v * _GRID) / _GRID for v in (cosine, sine, c, -sine, cosine, f))


def _scale_draw(low: float, high: float, draw: float) -> float:
    return low + (high - low) * float(draw)


AUGMENTATIONS: dict[str, _Augmentation] = {"flip": _flip, "crop": _crop, "xray": _xray}
"""Name -> function from a picture and each view's random numbers to views (S, S[, 3])."""

PLAIN = ViewRules()
"""The plain image alone: the rules of all splits but the training split."""
