"""Facts of a decoded picture that look at no part of its middle: size, colour, brightness, borders.

Reads: arrays. Writes: nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

_Pixels: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
_STRIPE = 8  # pixels, of the outer edge
_CORNER = 1 / 16  # of each side
# ITU-R BT.601, as Pillow's convert("L") has it
_RED, _GREEN, _BLUE = 0.299, 0.587, 0.114


@dataclass(frozen=True)
class PictureFacts:
    """What can be told of a picture without knowing what it shows.

    Attributes:
        pixels_sha256: sha256 of the decoded 8-bit pixels at full size, with height and width. Equal
            channels count as one, so that grey saved as RGB is the same picture.
        values: Fact -> its numbers, always as many: sizes in pixels, brightness of 0 to 255, and
            answers (0, 1), such as whether it is a ``grey file``.
    """

    pixels_sha256: bytes
    values: dict[str, tuple[float, ...]]


def measure_picture(pixels: _Pixels, *, num_channels: int, is_deep: bool) -> PictureFacts:
    """Return the facts of an upright picture (H, W) or (H, W, 3) uint8.

    Args:
        pixels: At the file's own size.
        num_channels: That the file stores.
        is_deep: Whether the file has more than 8 bits a channel.
    """
    height, width = pixels.shape[:2]
    plain = _one_channel(pixels)
    digest = hashlib.sha256(repr(plain.shape).encode())
    digest.update(np.ascontiguousarray(plain).data)
    shade = to_grey(plain)
    edge = min(_STRIPE, height, width)
    high, wide = max(1, round(height * _CORNER)), max(1, round(width * _CORNER))
    stripes = (shade[:edge], shade[-edge:], shade[:, :edge], shade[:, -edge:])
    corners = (shade[:high, :wide], shade[:high, -wide:], shade[-high:, :wide],
               shade[-high:, -wide:])  # fmt: skip
    return PictureFacts(
        digest.digest(),
        {
            "width": (float(width),), "height": (float(height),), "aspect ratio": (width / height,),
            "grey file": (float(pixels.ndim == 2),), "number of channels": (float(num_channels),),
            "colour in it": (float(plain.ndim == 3),),
            "more than 8 bits": (float(is_deep),),
            "mean brightness": (float(shade.mean()),),
            "spread of brightness": (float(shade.std()),),
            "brightness of borders": (*(float(s.mean()) for s in stripes),
                               *(float(s.std()) for s in stripes)),
            "brightness of corners": tuple(float(corner.mean()) for corner in corners),
        },
    )  # fmt: skip


def to_grey(pixels: _Pixels) -> _Pixels:
    """Return pixels (..., H, W) or (..., H, W, 3) as grey (..., H, W), uint8."""
    if pixels.ndim == 2 or pixels.shape[-1] != 3:
        return pixels
    mixed = pixels[..., 0] * np.float32(_RED)
    mixed += pixels[..., 1] * np.float32(_GREEN)
    mixed += pixels[..., 2] * np.float32(_BLUE)
    grey: _Pixels = np.rint(mixed).astype(np.uint8)
    return grey


def _one_channel(pixels: _Pixels) -> _Pixels:
    """Return pixels with equal channels as one channel; others as they are."""
    if pixels.ndim == 2:
        return pixels
    red = pixels[:, :, 0]
    is_grey = np.array_equal(red, pixels[:, :, 1]) and np.array_equal(red, pixels[:, :, 2])
    return np.ascontiguousarray(red) if is_grey else pixels
