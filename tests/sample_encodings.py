"""Small images in every encoding people have, and what they must decode to."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from featcache.errors import DataError
from featcache.pixels.images import PixelRules, decode

SIDE = 48
RULES = PixelRules(SIDE)


def noise(height, width, *bands, seed=0, high=256, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, high, (height, width, *bands)).astype(dtype)


def smooth(height, width, bands=3):
    """Return a smooth picture: JPEG survives it, and every orientation looks different."""
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [rows * 255 / height, columns * 255 / width, (rows + columns) % 256]
    return np.stack(planes[:bands], axis=-1).astype(np.uint8)


def encoded(image, kind="PNG", **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pillow(data, side=SIDE, resample=Image.Resampling.BILINEAR):
    """Return what the tutorial's code gives."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB").resize((side, side), resample))


def as_grey(values, side=None):
    """Return the truth of an 8-bit grey picture, resized by Pillow."""
    image = Image.fromarray(np.asarray(values, np.uint8))
    image = image if side is None else image.resize((side, side), Image.Resampling.BILINEAR)
    return np.repeat(np.asarray(image)[:, :, None], 3, axis=2)


def tiff(values, *, photometric=1, bits=16, order="<", **more):
    """Return an uncompressed one-strip TIFF, written by hand; ``more`` tags as ``tag_338=1``."""
    height, width, *bands = values.shape
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(np.uint32)
        joined = (pairs[:, 0] << 12) | pairs[:, 1]
        strip = b"".join(int(value).to_bytes(3, "big") for value in joined)
    else:
        strip = values.astype(values.dtype.newbyteorder(order)).tobytes()
    tags = {
        256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8,
        277: bands[0] if bands else 1, 278: height, 279: len(strip),
    } | {int(name[4:]): value for name, value in more.items()}  # fmt: skip
    directory = struct.pack(order + "H", len(tags))
    for tag, value in tags.items():
        directory += struct.pack(order + "HHII", tag, 4, 1, value)
    start = b"II*\0" if order == "<" else b"MM\0*"
    return start + struct.pack(order + "I", 8 + len(strip)) + strip + directory + b"\0\0\0\0"


def png(width, height, depth, colour, pixels=b""):
    """Return a PNG with any header; what Pillow itself cannot write."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def reason(data, rules=RULES):
    with pytest.raises(DataError) as caught:
        decode(data, rules)
    return str(caught.value.found)


# The plain path ------------------------------------------------------------------------------

PLAIN = {
    "rgb png": encoded(noise(61, 83, 3)),
    "grey png": encoded(noise(61, 83)),
    "rgba png": encoded(noise(61, 83, 4)),
    "grey-alpha png": encoded(noise(61, 83, 2)),
    "1-bit png": encoded(Image.fromarray(noise(61, 83)).convert("1")),
    "palette png": encoded(Image.fromarray(noise(61, 83, 3)).quantize(60)),
    "grey jpeg": encoded(smooth(61, 83, 1)[:, :, 0], "JPEG"),
    "rgb jpeg": encoded(smooth(200, 300), "JPEG", quality=70),
    "progressive jpeg": encoded(smooth(200, 300), "JPEG", progressive=True),
    "cmyk jpeg": encoded(Image.fromarray(smooth(61, 83)).convert("CMYK"), "JPEG"),
    "bmp": encoded(noise(61, 83, 3), "BMP"),
    "grey bmp": encoded(noise(61, 83), "BMP"),
    "rgb tiff": encoded(noise(61, 83, 3), "TIFF"),
    "packed tiff": encoded(noise(61, 83, 3), "TIFF", compression="tiff_lzw"),
    "jpeg tiff": encoded(smooth(64, 80), "TIFF", compression="jpeg"),
    "webp": encoded(smooth(61, 83), "WEBP"),
    "lossless webp": encoded(noise(61, 83, 4), "WEBP", lossless=True),
    "ppm": encoded(noise(61, 83, 3), "PPM"),
    "pgm": encoded(noise(61, 83), "PPM"),
    "pbm": encoded(Image.fromarray(noise(61, 83)).convert("1"), "PPM"),
    "lab tiff": encoded(Image.frombytes("LAB", (83, 61), noise(61, 83, 3).tobytes()), "TIFF"),
    "smaller than wanted": encoded(noise(5, 3, 3)),
    "one pixel": encoded(noise(1, 1)),
}  # fmt: skip


# Deep images ---------------------------------------------------------------------------------


def deep_files(values):
    """Return the same deep grey values in every container people use."""
    return {
        "png": encoded(Image.fromarray(values.astype(np.uint16))),
        "tiff": encoded(Image.fromarray(values.astype(np.uint16)), "TIFF"),
        "packed tiff": encoded(
            Image.fromarray(values.astype(np.uint16)), "TIFF", compression="tiff_lzw"
        ),
        "big-endian tiff": tiff(values.astype(np.uint16), order=">"),
        "32-bit tiff": encoded(Image.fromarray(values.astype(np.int32)), "TIFF"),
        "pgm": b"P5 %d %d 65535\n" % values.shape[::-1] + values.astype(">u2").tobytes(),
        "plain pgm": b"P2 %d %d 65535\n" % values.shape[::-1]
        + b" ".join(b"%d" % value for value in values.ravel()),
    }
