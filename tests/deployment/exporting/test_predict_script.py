"""The pixels of ``predict.py``: those of featcache bit for bit, or a refusal."""

from __future__ import annotations

import io
import zlib
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from featcache.deployment.exporting import predict_script
from featcache.deployment.exporting.predict_script import RefusedError, read_pixels
from featcache.errors import DataError
from featcache.pixels.images import PixelRules, decode

SIZE = (57, 83)
RULES = PixelRules(32)


def noise(*shape: int, high: int = 256, dtype: Any = np.uint8) -> Any:
    return np.random.default_rng(len(shape)).integers(0, high, shape).astype(dtype)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


GREY, COLOUR = Image.fromarray(noise(*SIZE)), Image.fromarray(noise(*SIZE, 3))
ALPHA, DEEP = Image.fromarray(noise(*SIZE, 4)), noise(*SIZE, high=65536, dtype=np.uint16)
FILES = {
    "grey png": saved(GREY, "PNG"),
    "bilevel png": saved(GREY.convert("1"), "PNG"),
    "grey alpha png": saved(GREY.convert("LA"), "PNG"),
    "grey transparent png": saved(GREY, "PNG", transparency=7),
    "palette png": saved(COLOUR.quantize(20), "PNG"),
    "palette transparent png": saved(COLOUR.quantize(20), "PNG", transparency=b"\x00\x7f"),
    "colour png": saved(COLOUR, "PNG"),
    "alpha png": saved(ALPHA, "PNG"),
    "deep png": saved(Image.fromarray(DEEP), "PNG"),
    "turned png": saved(COLOUR, "PNG", **turned(5)),
    "grey jpeg": saved(GREY, "JPEG"),
    "colour jpeg": saved(COLOUR, "JPEG", quality=85),
    "full colour jpeg": saved(COLOUR, "JPEG", subsampling=0),
    "progressive jpeg": saved(COLOUR, "JPEG", progressive=True),
    "ink jpeg": saved(COLOUR.convert("CMYK"), "JPEG"),
    "bmp": saved(COLOUR, "BMP"),
    "palette bmp": saved(COLOUR.quantize(9), "BMP"),
    "webp": saved(COLOUR, "WEBP"),
    "lossless alpha webp": saved(ALPHA, "WEBP", lossless=True),
    "grey ppm": saved(GREY, "PPM"),
    "colour ppm": saved(COLOUR, "PPM"),
    "plain ppm of few values": b"P2\n3 2\n7\n0 1 2 3 4 7\n",
    "grey tiff": saved(GREY, "TIFF"),
    "colour lzw tiff": saved(COLOUR, "TIFF", compression="tiff_lzw"),
    "colour deflate tiff": saved(COLOUR, "TIFF", compression="tiff_adobe_deflate"),
    "alpha tiff": saved(ALPHA, "TIFF"),
    "deep tiff": saved(Image.fromarray(DEEP), "TIFF"),
    **{f"jpeg turned {n}": saved(COLOUR, "JPEG", **turned(n)) for n in range(1, 10)},
}


def tiff(array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def png_of_depth_16(colour_type: int, num_samples: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(kind + body).to_bytes(4)
        return len(body).to_bytes(4) + kind + body + checksum

    header = (4).to_bytes(4) + (3).to_bytes(4) + bytes([16, colour_type, 0, 0, 0])
    rows = zlib.compress((b"\0" + bytes(4 * 2 * num_samples)) * 3)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


REFUSED = {
    "a PNG of 16-bit colour": png_of_depth_16(2, 3),
    "a PNG of 16-bit colour:": png_of_depth_16(4, 2),
    "a PPM of more than 8 bits": b"P2\n3 2\n300\n0 1 2 3 4 300\n",
    "a TIFF of 8 bits, photometric 0": tiff(noise(*SIZE), photometric="miniswhite"),
    "a TIFF of 32 bits, photometric 1": tiff(noise(*SIZE, dtype=np.float32)),
    "a TIFF of 16 bits, photometric 2": tiff(noise(*SIZE, 3, dtype=np.uint16), photometric="rgb"),
    "a TIFF of 8 bits, photometric 2": tiff(
        noise(3, *SIZE), photometric="rgb", planarconfig="separate"
    ),
    "a TIFF of 8 bits, photometric 5": saved(COLOUR.convert("CMYK"), "TIFF"),
    "not a PNG, JPEG, BMP, TIFF, WebP or PPM file": b"GIF89a" + bytes(30),
    "a DICOM file, which this script does not read": bytes(128) + b"DICM" + bytes(99),
    "empty": b"",
    "a broken PNG file": FILES["colour png"][:400],
    "a broken JPEG file": FILES["colour jpeg"][:900],
    "a broken or unknown PNG file": FILES["grey png"][:20],
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_featcache(name: str) -> None:
    found = read_pixels(FILES[name], RULES.as_identity(), 10**6)
    np.testing.assert_array_equal(found, decode(FILES[name], RULES).pixels)


@pytest.mark.parametrize(
    ("crop", "interpolation", "size"),
    [
        *product(("squash", "center", "border"), ("bilinear", "bicubic"), (None,)),
        ("center", "bicubic", 40),
        ("center", "bilinear", 24),
        ("squash", "bilinear", 48),
    ],
)
def test_every_rule_of_resizing_is_followed(
    crop: str, interpolation: str, size: int | None
) -> None:
    rules = PixelRules(32, crop_mode=crop, interpolation=interpolation, resize_size=size)
    for shape in ((57, 83), (90, 31), (32, 32), (20, 25), (7, 300)):
        for image in (Image.fromarray(noise(*shape)), Image.fromarray(noise(*shape, 3))):
            data = saved(image, "PNG")
            found = read_pixels(data, rules.as_identity(), 10**6)
            np.testing.assert_array_equal(found, decode(data, rules).pixels)


@pytest.mark.parametrize("depth", [12, 14, 16, "minmax"])
def test_deep_grey_is_scaled_or_refused(depth: int | str) -> None:
    rules = PixelRules(32, bit_depth=depth)
    for high in (1, 2**12, 2**14, 2**16):
        data = saved(Image.fromarray(noise(*SIZE, high=high, dtype=np.uint16)), "PNG")
        try:
            wanted = decode(data, rules).pixels
        except DataError:
            with pytest.raises(RefusedError, match="a value of"):
                read_pixels(data, rules.as_identity(), 10**6)
        else:
            np.testing.assert_array_equal(read_pixels(data, rules.as_identity(), 10**6), wanted)


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_read_exactly_is_refused_by_name(reason: str) -> None:
    with pytest.raises(RefusedError) as caught:
        read_pixels(REFUSED[reason], RULES.as_identity(), 10**6)
    assert str(caught.value).startswith(reason)


def test_large_and_unmarked_images_are_refused() -> None:
    with pytest.raises(RefusedError, match="83 x 57 pixels, above 4,000"):
        read_pixels(FILES["grey png"], RULES.as_identity(), 4000)
    place = FILES["ink jpeg"].index(b"Adobe")
    data = FILES["ink jpeg"][:place] + b"Bdobe" + FILES["ink jpeg"][place + 5 :]
    with pytest.raises(RefusedError, match="a CMYK JPEG without Adobe's marker"):
        read_pixels(data, RULES.as_identity(), 10**6)


def test_whatever_is_read_is_what_featcache_reads() -> None:
    rng, num_read = np.random.default_rng(3), 0
    for name, data in FILES.items():
        for _ in range(12):
            changed = bytearray(data)
            for _ in range(int(rng.integers(1, 4))):
                changed[int(rng.integers(8, len(data)))] = int(rng.integers(256))
            try:
                found = read_pixels(bytes(changed), RULES.as_identity(), 10**5)
            except RefusedError:
                continue
            num_read += 1
            np.testing.assert_array_equal(found, decode(bytes(changed), RULES).pixels, name)
    assert num_read > 50


def test_script_stands_alone() -> None:
    source = Path(predict_script.__file__).read_text("utf-8")
    assert "featcache" not in source
    assert "torch" not in source
