"""Image files of every kind and size, small and odd ones among them, to compare pixels on."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from make_images import KINDS, encode_image
from PIL import Image

FULL_SIZE_EVERY = 25  # so many small ones to one of the size that the speed is measured on


def encode_varied(number: int) -> tuple[str, bytes]:
    """Return what image ``number`` is, and its bytes.

    One in 25 is of a kind and size of ``make_images``. The others go round all formats and modes,
    with sides from 1 to 900 pixels; contents are blocks, ramps and noise, so that edges are hard.
    """
    if number % FULL_SIZE_EVERY == 0:
        names = list(KINDS)
        name = names[number // FULL_SIZE_EVERY % len(names)]
        return name, encode_image(KINDS[name], number)
    rng = np.random.default_rng(number)
    width, height = (int(side) for side in np.exp(rng.uniform(0, np.log(900), 2)))
    blocks = rng.integers(0, 256, (7, 5, 3), dtype=np.uint8)
    image = Image.fromarray(blocks).resize(
        (width, height), Image.Resampling.NEAREST if number % 2 else Image.Resampling.BICUBIC
    )
    noise = rng.integers(-20, 21, (height, width, 3))
    pixels = np.clip(np.asarray(image).astype(int) + noise, 0, 255).astype(np.uint8)
    names = list(_VARIANTS)
    name = names[number % len(names)]
    return f"{name} {width}x{height}", _VARIANTS[name](pixels)


def true_pixels(what: str, data: bytes, side: int) -> np.ndarray:
    """Return (side, side, 3) uint8 as Pillow gives them, deep grey scaled to 8 bits before."""
    with Image.open(io.BytesIO(data)) as file:
        image: Image.Image = file
        if "grey16" in what:
            values = np.asarray(file).astype(np.float64)
            image = Image.fromarray(np.round(values * 255 / 65535).astype(np.uint8))
        resized = image if image.mode == "L" else image.convert("RGB")
        resized = resized.resize((side, side), Image.Resampling.BILINEAR)
        return np.asarray(resized.convert("RGB"))


def _saver(ending: str, mode: str = "RGB", **options: Any) -> Callable[[np.ndarray], bytes]:
    def save(pixels: np.ndarray) -> bytes:
        image = Image.fromarray(pixels)
        if mode == "I;16":
            deep = pixels[:, :, 0].astype(np.uint16) * 256 + pixels[:, :, 1]
            image = Image.fromarray(deep)
        elif mode in {"RGBA", "LA"}:
            image = image.convert("RGB" if mode == "RGBA" else "L")
            image.putalpha(Image.fromarray(pixels[:, :, 2]))
        else:
            image = image.convert(mode)
        file = io.BytesIO()
        image.save(file, ending, **options)
        return file.getvalue()

    return save


_VARIANTS = {
    "jpeg 4:2:0": _saver("JPEG", quality=90, subsampling="4:2:0"),
    "jpeg 4:2:2": _saver("JPEG", quality=75, subsampling="4:2:2"),
    "jpeg 4:4:4": _saver("JPEG", quality=95, subsampling="4:4:4"),
    "jpeg progressive": _saver("JPEG", quality=85, progressive=True),
    "jpeg restart": _saver("JPEG", quality=85, restart_marker_blocks=3),
    "jpeg grey": _saver("JPEG", "L", quality=90),
    "jpeg cmyk": _saver("JPEG", "CMYK", quality=90),
    "png rgb": _saver("PNG"),
    "png grey": _saver("PNG", "L"),
    "png stored": _saver("PNG", "L", compress_level=0),
    "png rgba": _saver("PNG", "RGBA"),
    "png grey alpha": _saver("PNG", "LA"),
    "png palette": _saver("PNG", "P"),
    "png palette, 16 colours": _saver("PNG", "P", bits=4),
    "png transparent colour": _saver("PNG", transparency=(1, 2, 3)),
    "png 1 bit": _saver("PNG", "1"),
    "png grey16": _saver("PNG", "I;16"),
    "tiff grey16": _saver("TIFF", "I;16"),
    "tiff rgb": _saver("TIFF"),
    "tiff lzw": _saver("TIFF", "L", compression="tiff_lzw"),
    "bmp": _saver("BMP"),
    "webp": _saver("WEBP", quality=80),
    "ppm": _saver("PPM"),
}
