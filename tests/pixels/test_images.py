"""Pixels against a NumPy truth, against Pillow's and torchvision's own path, and bad files."""

import contextlib
import io
import pickle
import random
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from torchvision.transforms import functional

from featcache.errors import ConfigError, DataError, TransientError
from featcache.pixels import decoding, images
from featcache.pixels.images import PixelRules, check_bit_depth, decode, deep_maximum

XRAYS = Path(__file__).resolve().parents[3] / "shared" / "data" / "xray-raw"
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


def png_rows(values, dtype):
    return b"".join(b"\0" + row.astype(dtype).tobytes() for row in values)


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


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_plain_images_equal_pillow_bit_for_bit(name, interpolation):
    decoded = decode(PLAIN[name], PixelRules(SIDE, interpolation=interpolation))
    truth = pillow(PLAIN[name], resample=Image.Resampling[interpolation.upper()])
    assert decoded.pixels.dtype == np.uint8
    assert decoded.pixels.shape == (SIDE, SIDE, 3)
    assert decoded.pixels.flags.writeable
    assert not decoded.truncated
    np.testing.assert_array_equal(decoded.pixels, truth)


@pytest.mark.parametrize("name", ["rgb jpeg", "grey png", "smaller than wanted"])
def test_squash_equals_torchvision(name):
    with Image.open(io.BytesIO(PLAIN[name])) as image:
        truth = functional.resize(image.convert("RGB"), [SIDE, SIDE])
    np.testing.assert_array_equal(decode(PLAIN[name], RULES).pixels, np.asarray(truth))


@pytest.mark.parametrize("size", [(61, 83), (83, 61), (300, 301), (40, 500), (10, 10)])
@pytest.mark.parametrize("side", [48, 49, 224])
def test_center_equals_torchvision(size, side):
    pixels = noise(*size, 3)
    image = functional.resize(Image.fromarray(pixels), round(side / 0.875))
    truth = np.asarray(functional.center_crop(image, [side, side]))
    found = decode(encoded(pixels), PixelRules(side, crop_mode="center")).pixels
    np.testing.assert_array_equal(found, truth)


@pytest.mark.parametrize(("height", "width"), [(60, 40), (40, 60), (50, 50), (3, 200), (301, 7)])
def test_border_keeps_the_shape_and_pads_with_black(height, width):
    pixels = noise(height, width)
    found = decode(encoded(pixels), PixelRules(SIDE, crop_mode="border")).pixels
    long = max(height, width)
    inner = (max(1, round(SIDE * width / long)), max(1, round(SIDE * height / long)))
    truth = np.zeros((SIDE, SIDE), np.uint8)
    left, top = (SIDE - inner[0]) // 2, (SIDE - inner[1]) // 2
    resized = Image.fromarray(pixels).resize(inner, Image.Resampling.BILINEAR)
    truth[top : top + inner[1], left : left + inner[0]] = np.asarray(resized)
    np.testing.assert_array_equal(found, as_grey(truth))


@pytest.mark.xray
def test_real_xrays_equal_pillow_and_torchvision():
    if not XRAYS.is_dir():
        pytest.skip(f"no real X-rays at {XRAYS}")
    files = sorted(XRAYS.glob("*/*"))
    for path in random.Random(0).sample(files, 60):
        data = path.read_bytes()
        found = decode(data, PixelRules(224)).pixels
        np.testing.assert_array_equal(found, pillow(data, 224), err_msg=path.name)
        with Image.open(path) as image:
            truth = functional.resize(image.convert("RGB"), [224, 224])
        np.testing.assert_array_equal(found, np.asarray(truth), err_msg=path.name)


# Alpha, palettes, orientation ----------------------------------------------------------------


def test_alpha_is_dropped_and_hidden_colours_stay():
    pixels = noise(20, 20, 4)
    pixels[:, :, 3] = 0
    np.testing.assert_array_equal(decode(encoded(pixels), PixelRules(20)).pixels, pixels[:, :, :3])
    grey = noise(20, 20, 2)
    grey[:, :, 1] = 0
    found = decode(encoded(grey), PixelRules(20)).pixels
    np.testing.assert_array_equal(found, as_grey(grey[:, :, 0]))


def test_premultiplied_alpha_of_tiff():
    grey = noise(20, 20, 2)
    grey[:, :, 1] = 255
    data = tiff(grey, bits=8, tag_338=1)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "La"
    np.testing.assert_array_equal(decode(data, PixelRules(20)).pixels, as_grey(grey[:, :, 0]))


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 250, 10))])
def test_palette_with_transparency(transparency):
    image = Image.fromarray(noise(20, 20, 3)).quantize(25)
    data = encoded(image, transparency=transparency)
    truth = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(decode(data, PixelRules(20)).pixels, truth)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_tags_are_obeyed(kind, orientation):
    stored = smooth(32, 48)
    turns = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(stored, kind, exif=exif, **options)
    with Image.open(io.BytesIO(encoded(stored, kind, **options))) as image:
        upright = turns[orientation](np.asarray(image.convert("RGB")))
    truth = Image.fromarray(np.ascontiguousarray(upright)).resize((SIDE, SIDE), 2)
    np.testing.assert_array_equal(decode(data, RULES).pixels, np.asarray(truth))


def test_orientation_of_deep_images():
    exif = Image.Exif()
    exif[0x0112] = 6
    values = noise(20, 30, high=65536, dtype=np.uint16)
    found = decode(encoded(Image.fromarray(values), exif=exif), PixelRules(20, "border")).pixels
    turned = np.rot90(np.rint(values / 257).astype(np.uint8), -1)
    image = Image.fromarray(np.ascontiguousarray(turned)).resize((13, 20), 2)
    np.testing.assert_array_equal(found[:, 3:16, 0], np.asarray(image))


@pytest.mark.parametrize("value", [0, 9, 255, 65535])
def test_unknown_orientations_leave_the_pixels(value):
    exif = Image.Exif()
    exif[0x0112] = value
    data = encoded(smooth(20, 20), "JPEG", exif=exif.tobytes())
    np.testing.assert_array_equal(decode(data, RULES).pixels, pillow(data))


def test_damaged_exif_leaves_the_pixels():
    exif = Image.Exif()
    exif[0x0112] = 6
    body = exif.tobytes()
    for cut in range(6, len(body)):
        broken = body[:cut] + bytes(random.Random(cut).randbytes(len(body) - cut))
        data = encoded(smooth(20, 20), "JPEG", exif=broken)
        assert decode(data, RULES).pixels.shape == (SIDE, SIDE, 3)


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


@pytest.mark.parametrize("bits", [12, 14, 16])
def test_deep_grey_is_scaled_in_every_container(bits):
    values = noise(30, 40, high=2**bits, dtype=np.int64)
    values[0, :2] = 0, 2**bits - 1
    truth = np.rint(values * 255 / (2**bits - 1))
    for name, data in deep_files(values).items():
        found = decode(data, PixelRules(SIDE, bit_depth=bits)).pixels
        np.testing.assert_array_equal(found, as_grey(truth, SIDE), err_msg=name)
        assert deep_maximum(data) == 2**bits - 1, name


def test_every_16_bit_value_is_rounded_right():
    values = np.arange(65536).reshape(256, 256)
    data = encoded(Image.fromarray(values.astype(np.uint16)))
    found = decode(data, PixelRules(256)).pixels
    np.testing.assert_array_equal(found, as_grey((values * 255 + 32767) // 65535))


def test_minmax_uses_each_images_own_range():
    values = noise(30, 40, high=900, dtype=np.int64) + 1000
    low, high = values.min(), values.max()
    truth = as_grey(np.rint((values - low) * 255 / (high - low)), SIDE)
    rules = PixelRules(SIDE, bit_depth="minmax")
    for name, data in deep_files(values).items():
        np.testing.assert_array_equal(decode(data, rules).pixels, truth, err_msg=name)
    signed = encoded(Image.fromarray((values - 1500).astype(np.int32)), "TIFF")
    np.testing.assert_array_equal(decode(signed, rules).pixels, truth)
    floats = encoded(Image.fromarray((values / 1000).astype(np.float32)), "TIFF")
    assert np.abs(decode(floats, rules).pixels.astype(int) - truth).max() <= 1
    flat = encoded(Image.fromarray(np.full((9, 9), 777, np.uint16)))
    assert not decode(flat, rules).pixels.any()


def test_minmax_leaves_8_bit_images_alone():
    for data in PLAIN.values():
        found = decode(data, PixelRules(SIDE, bit_depth="minmax")).pixels
        np.testing.assert_array_equal(found, pillow(data))


def test_a_file_that_states_its_range_is_believed():
    values = noise(30, 40, high=4096, dtype=np.uint16)
    truth = as_grey(np.rint(values * 255.0 / 4095), SIDE)
    stated = {
        "12-bit tiff": tiff(values, bits=12),
        "pgm": b"P5 40 30 4095\n" + values.astype(">u2").tobytes(),
    }
    for bit_depth in (12, 14, 16):
        for name, data in stated.items():
            found = decode(data, PixelRules(SIDE, bit_depth=bit_depth)).pixels
            np.testing.assert_array_equal(found, truth, err_msg=f"{name} {bit_depth}")
            assert deep_maximum(data) is None


def test_inverted_deep_tiff_is_turned_round():
    values = noise(30, 40, high=65536, dtype=np.uint16)
    truth = as_grey(255 - np.rint(values / 257), SIDE)
    np.testing.assert_array_equal(decode(tiff(values, photometric=0), RULES).pixels, truth)


def test_values_outside_the_bit_depth_are_refused():
    data = encoded(Image.fromarray(np.full((9, 9), 5000, np.uint16)))
    assert "5000 outside the 0 to 4095" in reason(data, PixelRules(SIDE, bit_depth=12))
    negative = encoded(Image.fromarray(np.full((9, 9), -1, np.int32)), "TIFF")
    assert "-1 outside the 0 to 65535" in reason(negative)


def test_floats_need_minmax():
    data = encoded(Image.fromarray(np.linspace(0, 1, 81, dtype=np.float32).reshape(9, 9)), "TIFF")
    assert "minmax" in reason(data)
    holes = np.full((9, 9), np.nan, np.float32)
    data = encoded(Image.fromarray(holes), "TIFF")
    assert "not finite" in reason(data, PixelRules(SIDE, bit_depth="minmax"))


@pytest.mark.parametrize(("colour", "bands"), [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colour_keeps_the_high_byte(colour, bands):
    values = noise(20, 20, bands, high=65536, dtype=np.uint16)
    data = png(20, 20, 16, colour, png_rows(values, ">u2"))
    high = (values >> 8).astype(np.uint8)
    truth = as_grey(high[:, :, 0]) if bands == 2 else high[:, :, :3]
    np.testing.assert_array_equal(decode(data, PixelRules(20)).pixels, truth)
    for bit_depth in (12, 14, "minmax"):
        assert "16-bit colour" in reason(data, PixelRules(20, bit_depth=bit_depth))
    assert deep_maximum(data) is None


def test_16_bit_colour_in_other_containers():
    values = noise(20, 20, 3, high=65536, dtype=np.uint16)
    for order in "<>":
        data = tiff(values, photometric=2, order=order)
        np.testing.assert_array_equal(decode(data, PixelRules(20)).pixels, values >> 8)
        assert "16-bit colour" in reason(data, PixelRules(20, bit_depth="minmax"))
    ppm = b"P6 20 20 65535\n" + values.astype(">u2").tobytes()
    truth = np.rint(values / 257)
    np.testing.assert_array_equal(decode(ppm, PixelRules(20)).pixels, truth)
    assert "16-bit colour" in reason(ppm, PixelRules(20, bit_depth=12))
    stated = b"P6 20 20 4095\n" + (values >> 4).astype(">u2").tobytes()
    found = decode(stated, PixelRules(20, bit_depth=12)).pixels
    np.testing.assert_array_equal(found, np.rint((values >> 4) * 255.0 / 4095))


def test_deep_maximum_of_others_is_none():
    assert all(deep_maximum(data) is None for data in PLAIN.values())
    assert deep_maximum(b"") is None
    values = noise(30, 40, high=65536, dtype=np.uint16)
    assert deep_maximum(encoded(Image.fromarray(values))[:-300]) is None


def test_the_bit_depth_is_asked_for_when_the_top_bit_is_never_used():
    check_bit_depth([])
    check_bit_depth([100, 2**15])
    with pytest.raises(DataError, match=r"--bit-depth 12, 14, 16 or minmax .*fit into 12"):
        check_bit_depth([100, 4095])
    with pytest.raises(DataError, match="fit into 14"):
        check_bit_depth(value for value in [4096])
    with pytest.raises(DataError, match="fit into 16"):
        check_bit_depth([2**15 - 1])


# Truncated files -----------------------------------------------------------------------------

CUT = {
    name: encoded(smooth(200, 300), kind, **options)
    for name, kind, options in (
        ("jpeg", "JPEG", {}),
        ("progressive", "JPEG", {"progressive": True}),
        ("png", "PNG", {}),
        ("bmp", "BMP", {}),
        ("tiff", "TIFF", {}),
        ("webp", "WEBP", {}),
        ("ppm", "PPM", {}),
    )
}
KEEP = PixelRules(SIDE, truncated="keep")


@pytest.mark.parametrize("kind", CUT)
def test_truncated_files_fail_wherever_they_are_cut(kind):
    whole = CUT[kind]
    for cut in np.linspace(1, len(whole) - 30, 40):
        assert reason(whole[: int(cut)])
    for cut in range(len(whole) - 30, len(whole)):  # the end of a PNG holds no pixels
        with contextlib.suppress(DataError):
            np.testing.assert_array_equal(decode(whole[:cut], RULES).pixels, pillow(whole))


@pytest.mark.parametrize("kind", sorted(set(CUT) - {"webp"}))
def test_keep_fills_in_and_says_so(kind):
    whole = CUT[kind]
    kept = decode(whole[: len(whole) * 3 // 4], KEEP)
    assert kept.truncated
    # What was there stays: the top quarter of the picture is whole in every one of these formats
    # (BMP is stored from below).
    part = slice(SIDE * 3 // 4, None) if kind == "bmp" else slice(0, SIDE // 4)
    found = kept.pixels[part].astype(int)
    wanted = decode(whole, KEEP).pixels[part].astype(int)
    assert np.abs(found - wanted).max() <= (40 if kind == "progressive" else 0)


def test_keep_leaves_whole_images_alone_and_hopeless_ones_failed():
    for data in PLAIN.values():
        kept = decode(data, KEEP)
        assert not kept.truncated
        np.testing.assert_array_equal(kept.pixels, pillow(data))
    assert "truncated" in reason(CUT["webp"][:500], KEEP) or reason(CUT["webp"][:500], KEEP)
    for data in (b"", b"rubbish", CUT["jpeg"][:20], CUT["png"][:30]):
        assert reason(data, KEEP)


def test_the_users_setting_neither_counts_nor_is_lost(monkeypatch):
    cut = CUT["jpeg"][:3000]
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert "truncated" in reason(cut)
    assert decode(cut, KEEP).truncated
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_strict_and_keeping_threads_do_not_disturb_each_other():
    cut = CUT["jpeg"][:3000]
    filled = decode(cut, KEEP).pixels
    whole = pillow(CUT["jpeg"])
    start = threading.Barrier(6)

    def work(number):
        start.wait()
        results = set()
        for _ in range(60):
            if number % 2:
                kept = decode(cut, KEEP)
                results.add(kept.truncated and np.array_equal(kept.pixels, filled))
            else:
                results.add("truncated" in reason(cut))
            results.add(np.array_equal(decode(CUT["jpeg"], KEEP).pixels, whole))
        return results

    with ThreadPoolExecutor(6) as pool:
        assert set().union(*pool.map(work, range(6))) == {True}
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


# Not images ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "an empty file"),
        (b"garbage, no image at all", "no known image format"),
        (b"\n<!DOCTYPE html><html>404</html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS"),
        (encoded(noise(9, 9), "GIF"), "a GIF"),
        (bytes(128) + b"DICM" + bytes(50), "DICOM"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "broken PNG"),
        (b"\xff\xd8\xff" + bytes(50), "broken JPEG"),
        (b"RIFF\0\0\0\0WEBPVP8 " + bytes(20), "broken WEBP"),
        (b"II*\0" + bytes(20), "broken TIFF"),
        (b"BM" + bytes(60), "broken BMP"),
        (b"P5 \xff", "broken PPM"),
    ],
)
def test_what_is_no_image_says_what_it_is(data, expected):
    found = reason(data)
    assert expected in found
    assert "0x" not in found
    assert reason(data) == found
    assert len(found) < 250


def test_bombs_are_refused_unread():
    side = 2**14 + 1
    assert "268,435,456" in reason(png(side, side, 1, 0))
    assert "268,435,456" in reason(b"P5 100000 100000 255\n")
    strip = encoded(noise(2, 4000), "PNG")
    assert "too long" in reason(strip, PixelRules(2048, crop_mode="center"))
    assert decode(strip, PixelRules(2048, crop_mode="border")).pixels.shape == (2048, 2048, 3)


def test_no_memory_for_an_image_costs_that_image(monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(images, "_resize", fail)
    assert "MemoryError" in reason(PLAIN["rgb png"])
    with pytest.raises(TransientError):  # not the image's fault: its copies are tried themselves
        decode(PLAIN["rgb png"], PixelRules(32))


def test_no_memory_makes_no_image_a_cut_off_one(monkeypatch):
    """With ``--truncated keep`` an image that could not be read is read again, and filled in."""
    real, tries = images.read, []

    def read(data, *, fill):
        tries.append(fill)
        if len(tries) == 1:
            raise decoding.failure("a broken PNG file", MemoryError())
        return real(data, fill=fill)

    monkeypatch.setattr(images, "read", read)
    with pytest.raises(TransientError, match="MemoryError"):
        decode(PLAIN["rgb png"], PixelRules(32, truncated="keep"))


def test_large_images_are_read_whatever_pillows_limit_is(monkeypatch):
    data = encoded(noise(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    np.testing.assert_array_equal(decode(data, PixelRules(100)).pixels[:, :, 0], noise(100, 100))
    assert "more than 1,000" in reason(encoded(noise(100, 100), "TIFF"))
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_damage_never_raises_anything_else():
    generator = random.Random(1)
    for name, whole in (PLAIN | CUT | deep_files(noise(30, 40, high=4096, dtype=np.int64))).items():
        for _ in range(40):
            data = bytearray(whole)
            for _ in range(generator.randint(1, 6)):
                place = generator.randrange(min(len(data), generator.choice((60, 10**6))))
                data[place] = generator.randrange(256)
            for rules in (RULES, KEEP):
                with contextlib.suppress(DataError):
                    assert decode(bytes(data), rules).pixels.shape == (SIDE, SIDE, 3), name
            deep_maximum(bytes(data))


# Pillow's warnings ---------------------------------------------------------------------------


def warning_tiff():
    """Return a TIFF that Pillow reads with a remark: a tag's data lies behind the file's end."""
    data = bytearray(tiff(noise(20, 20, high=65536, dtype=np.uint16)))
    directory = struct.unpack("<I", data[4:8])[0]
    data[directory : directory + 2] = struct.pack("<H", 10)
    data[-4:] = struct.pack("<HHII", 700, 1, 500, 10**6) + bytes(4)
    return bytes(data)


def test_no_warning_of_pillow_escapes_from_any_thread():
    data = warning_tiff()
    with (
        pytest.warns(UserWarning, match="Truncated File Read"),
        Image.open(io.BytesIO(data)) as image,
    ):
        image.load()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ThreadPoolExecutor(4) as pool:
            for decoded in pool.map(lambda _: decode(data, RULES), range(200)):
                assert decoded.pixels.any()
        warnings.warn("one of the user's", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["one of the user's"]


def test_it_works_where_warnings_are_errors():
    script = (
        "import sys; from featcache.pixels.images import *; "
        "sys.exit(decode(sys.stdin.buffer.read(), PixelRules(9)).truncated)"
    )
    command = [sys.executable, "-W", "error", "-c", script]
    subprocess.run(command, input=warning_tiff(), check=True)


# Rules ---------------------------------------------------------------------------------------


def test_the_identity_tells_all_and_comes_back():
    rules = PixelRules(224, "center", "bicubic", "minmax", "keep")
    identity = rules.as_identity()
    assert identity == {
        "image_size": 224, "crop_mode": "center", "interpolation": "bicubic",
        "bit_depth": "minmax", "truncated": "keep", "orientation": "exif", "alpha": "dropped",
    }  # fmt: skip
    assert PixelRules.from_identity(identity | {"backbone": "b0"}) == rules
    assert pickle.loads(pickle.dumps(rules)) == rules
    for key in identity:
        with pytest.raises(DataError, match=key):
            PixelRules.from_identity({k: v for k, v in identity.items() if k != key})
    with pytest.raises(DataError, match="orientation exif, found 'ignored'"):
        PixelRules.from_identity(identity | {"orientation": "ignored"})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("image_size", 0), ("image_size", True), ("image_size", 224.0), ("crop_mode", "middle"),
        ("interpolation", "nearest"), ("bit_depth", 8), ("bit_depth", "auto"), ("truncated", "x"),
    ],
)  # fmt: skip
def test_unknown_rules_are_refused(option, value):
    with pytest.raises(ConfigError, match="--" + option.replace("_", "-")):
        PixelRules(**{"image_size": 224, option: value})


def test_the_gate_is_free_in_a_forked_child():
    gate = decoding._TruncationGate()
    with gate(fill=True):
        gate.reset()
        with gate(fill=False):
            assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    ImageFile.LOAD_TRUNCATED_IMAGES = False
