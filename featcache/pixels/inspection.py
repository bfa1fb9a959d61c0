"""What an image file holds: its depth, channels and values. No pixels for a network are made of it.

Reads: bytes. Writes: nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from featcache.data.dicom_files import is_dicom
from featcache.errors import DataError
from featcache.pixels.decoding import MisreadError, open_unread, read
from featcache.pixels.deep import is_deep_colour
from featcache.pixels.dicom_rules import DicomRules
from featcache.pixels.unsupported import may_wrap
from featcache.untrusted import MAX_PIXELS


def deep_kind(data: bytes) -> str | None:
    """Return ``grey`` or ``colour`` if the header says integers of more than 8 bits, else None."""
    try:
        name, image = open_unread(data)
    except DataError:
        return None
    if image.mode[0] == "I":
        return "grey"
    return "colour" if is_deep_colour(name, image) else None


def stored_channels(data: bytes) -> int:
    """Return how many channels a file stores, alpha included; a palette image stores one.

    Raises:
        DataError: If there is no header of a known format.
    """
    return len(open_unread(data)[1].getbands())


def misread_reason(data: bytes) -> str | None:
    """Return why an image is refused that earlier versions read wrongly; None for all others."""
    try:
        _, image = open_unread(data)
        if may_wrap(image):
            read(data, fill=False)
    except MisreadError as error:
        return str(error.found)
    except DataError:
        return None
    return None


def deep_maximum(data: bytes, max_pixels: int = MAX_PIXELS) -> int | None:
    """Return the largest stored value of an integer image of more than 8 bits; alpha is left out.

    None for images whose range is known (8-bit images, files that state it, such as 12-bit TIFF and
    PGM), and for those that fail anyway (float images, damaged files).
    """
    if deep_kind(data) is None:
        return None
    try:
        loaded = read(data, fill=False, all_bits=True, max_pixels=max_pixels)
    except DataError:
        return None
    return None if loaded.stated_maximum else int(loaded.values.max())


def glance(data: bytes) -> tuple[int, int, bool, bool]:
    """Return width, height, whether an image has few values, and whether it is nearly one colour.

    Few values: at most 32 different ones (sums over the channels); or 97 % of the pixels are within
    4 % of one of two, as in a mask that was saved as JPEG. Nearly one colour: 99 % of the pixels
    are within 4 % of one value.

    Raises:
        DataError: If it cannot be decoded.
    """
    if is_dicom(data):
        from featcache.pixels.isolation import decode_dicom

        values: np.ndarray[Any, Any] = decode_dicom(data, DicomRules(), MAX_PIXELS).pixels
    else:
        values = read(data, fill=False, all_bits=True).values
    height, width = values.shape[:2]
    step = max(1, int((height * width / 2**18) ** 0.5))
    part = values[::step, ::step].astype(np.float64)
    grey = part.sum(axis=2) if part.ndim == 3 else part
    if not np.isfinite(grey).all():
        return width, height, False, False
    levels, counts = np.unique(grey, return_counts=True)
    whole = 255 * (3 if part.ndim == 3 else 1)
    near = 0.04 * (whole if values.dtype == np.uint8 else levels[-1] - levels[0])
    shares = []
    for _ in range(2):
        peak = levels[counts.argmax()]
        is_near = abs(levels - peak) <= near
        shares.append(counts[is_near].sum() / grey.size)
        counts = np.where(is_near, 0, counts)
    has_few = len(levels) <= min(32, grey.size // 16) or sum(shares) >= 0.97
    return width, height, bool(has_few), bool(shares[0] >= 0.99)


def check_bit_depth(maxima: Iterable[int]) -> None:
    """Raise an error that asks for the bit depth if no deep image uses the top bit of 16.

    12-bit X-rays in 16-bit files look nearly black when they are scaled as 16 bits.

    Args:
        maxima: ``deep_maximum`` of a sample of the images of one kind (``deep_kind``), without the
            None.

    Raises:
        DataError: If there are maxima and all are below 2**15.
    """
    largest = max(maxima, default=None)
    if largest is not None and largest < 2**15:
        fitting = next((bits for bits in (12, 14) if largest < 2**bits), 16)
        raise DataError(
            "bit depth of the 16-bit images", expected="values up to 65535",
            found=f"none above {largest} in the sample",
            hint=f"Say what they are: --bit-depth 12, 14, 16 or minmax (they fit into {fitting})",
        )  # fmt: skip
