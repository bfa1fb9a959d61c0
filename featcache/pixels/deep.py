"""Decode all 16 bits of colour, of which Pillow keeps the high byte.

A file is decoded twice, the second time as if its bytes were in the other order: then Pillow keeps
the low byte.

Reads: bytes. Writes: nothing.
"""

from __future__ import annotations

import io
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import TiffImageFile

_OTHER_ORDER = {"L": "B", "B": "L"}
_PLANES = 284  # tag of TIFF: 2 if each colour lies in a plane of its own
# Tags of TIFF that say where and how pixels lie: those of a grey image of one plane.
_WHERE = (256, 257, 259, 266, 274, 278, 317, 322, 323)
_OFFSETS_AND_SIZES = (273, 279, 324, 325)  # of strips, of tiles
_MULTIPLIED = "16-bit colour multiplied by its alpha is read with --bit-depth 16 only"
_NATIVE = "L" if sys.byteorder == "little" else "B"


def is_deep_colour(name: str, image: ImageFile.ImageFile) -> bool:
    """Return whether an image with its header read has 16 bits a channel, and Pillow keeps 8.

    Files that state a smaller range (PPM) are scaled by Pillow, and are not meant.
    """
    if image.mode[0] in "IF" or not image.tile:
        return False
    raw_mode, *rest = _arguments(image)
    if name == "PPM":
        return bool(rest) and rest[0] == 65535
    return name in {"PNG", "TIFF"} and ";16" in str(raw_mode)


def read_samples(
    name: str, open_again: Callable[[], ImageFile.ImageFile]
) -> tuple[npt.NDArray[np.uint16], ImageFile.ImageFile]:
    """Decode a file of deep colour.

    Args:
        name: Its format.
        open_again: Opens the file with its header read; called twice.

    Returns:
        (H, W) of grey with alpha, (H, W, 3) of RGB or (H, W, 4) of CMYK, without alpha; and the
        image that was loaded.

    Raises:
        ValueError: If colours are multiplied by an alpha that is not the same everywhere.
        Exception: Whatever Pillow raises for a damaged file.
    """
    first = open_again()
    raw_mode = str(_arguments(first)[0])
    if name == "PPM":  # Pillow scales it to 8 bits, unless it is grey
        width, height = first.size
        flat = _decode(first, raw_mode, mode="I", size=(3 * width, height))
        return flat.reshape(height, width, 3).astype(np.uint16), first
    if raw_mode == "LA;16B":  # PNG's grey and alpha, as one number of 32 bits
        joined = _decode(first, "I;32B", mode="I").view(np.uint32)
        return (joined >> np.uint32(16)).astype(np.uint16), first
    if isinstance(first, TiffImageFile) and first.tag_v2.get(_PLANES) == 2:
        if "RGBa" in raw_mode:
            raise ValueError(_MULTIPLIED)
        planes = _read_planes(first)
        first.load()
        return planes, first
    kind, order = raw_mode[:-1], raw_mode[-1].replace("N", _NATIVE)
    kind = kind.replace("RGBa", "RGBA")  # as stored
    high = _decode(first, kind + order)
    low = _decode(open_again(), kind + _OTHER_ORDER[order])
    samples = high.astype(np.uint16) << np.uint16(8) | low
    if "RGBa" in raw_mode and samples[:, :, 3].min() != samples[:, :, 3].max():
        raise ValueError(_MULTIPLIED)
    return (samples if first.mode == "CMYK" else samples[:, :, :3]), first


def cmyk_to_rgb(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return RGB (H, W, 3) of inks (H, W, 4), as Pillow converts them: profiles are not applied."""
    height, width = pixels.shape[:2]
    inks = Image.frombytes("CMYK", (width, height), np.ascontiguousarray(pixels).tobytes())
    return np.array(inks.convert("RGB"))


def _arguments(image: ImageFile.ImageFile) -> tuple[Any, ...]:
    """Return the arguments of the decoder; the first is Pillow's raw mode."""
    arguments = image.tile[0].args
    return arguments if isinstance(arguments, tuple) else (arguments,)


def _decode(
    image: ImageFile.ImageFile, raw_mode: str, *, mode: str | None = None,
    size: tuple[int, int] | None = None,
) -> npt.NDArray[Any]:  # fmt: skip
    """Load an opened image by another raw mode, and by other mode and size, and return its array.

    Pillow has no public way to say so.
    """
    tiles = []
    for tile in image.tile:
        arguments = (raw_mode, *tile.args[1:]) if isinstance(tile.args, tuple) else raw_mode
        extents = (0, 0, *size) if size else tile.extents
        tiles.append(tile._replace(args=arguments, extents=extents))
    image.tile = tiles
    if mode is not None:
        image._mode = mode
    if size is not None:
        image._size = size
    image.load()
    return np.asarray(image)


def _read_planes(image: TiffImageFile) -> npt.NDArray[np.uint16]:
    """Return (H, W, 3) or (H, W, 4) of a TIFF of separate planes, which libtiff reads one by one.

    Pillow chooses the byte of each sample itself. So each plane becomes a grey TIFF: the same file
    with other tags behind it.
    """
    assert image.fp is not None
    image.fp.seek(0)
    data, tags = image.fp.read(), image.tag_v2
    num_planes, planes = tags[277], []
    for plane in range(4 if image.mode == "CMYK" else 3):
        grey = {258: (16,), 262: (1,), 277: (1,)} | {t: (tags[t],) for t in _WHERE if t in tags}
        for tag in _OFFSETS_AND_SIZES:
            if tag in tags:
                each = len(tags[tag]) // num_planes
                grey[tag] = tags[tag][plane * each : (plane + 1) * each]
        opened = type(image)(io.BytesIO(_with_tags(data, grey)))
        opened.load()
        planes.append(np.asarray(opened).astype(np.uint16))
    return np.stack(planes, axis=-1)


def _with_tags(data: bytes, tags: Mapping[int, Sequence[int]]) -> bytes:
    """Return a TIFF file with other tags: a new directory at its end (TIFF 6.0, section 2)."""
    order, is_big = "<" if data.startswith(b"II") else ">", data[2] == 43
    word, kind, entry_bytes = ("Q", 16, 20) if is_big else ("I", 4, 12)
    width = struct.calcsize(word)
    place = len(data) + len(data) % 2
    directory = struct.pack(order + ("Q" if is_big else "H"), len(tags))
    lists, lists_place = b"", place + len(directory) + len(tags) * entry_bytes + width
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}{word}", *values)
        if len(values) > 1:
            packed, lists = struct.pack(order + word, lists_place + len(lists)), lists + packed
        directory += struct.pack(f"{order}HH{word}", tag, kind, len(values)) + packed
    start = data[:width] + struct.pack(order + word, place)
    return (
        start
        + data[len(start) : len(data)]
        + bytes(len(data) % 2)
        + directory
        + bytes(width)
        + lists
    )
