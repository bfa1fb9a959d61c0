"""Files that are not read: named for what they are, and told apart from broken ones."""

import io
import re

import numpy as np
import pytest
from PIL import Image
from sample_encodings import RULES, SIDE, encoded, noise, pillow, reason, smooth, tiff

from featcache.errors import DataError
from featcache.pixels.images import PixelRules, decode, load, load_opened
from featcache.pixels.inspection import misread_reason

tifffile = pytest.importorskip("tifffile")


def box(brand, *others):
    return b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0" + b"".join(others) + bytes(60)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (box(b"heic", b"mif1"), "an iPhone photo (HEIC)"),
        (box(b"mif1", b"heic"), "a HEIF image"),
        (box(b"mif1", b"avif"), "an AVIF image"),
        (box(b"avif", b"mif1", b"miaf"), "an AVIF image"),
        (box(b"isom"), "a video"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "a JPEG 2000 image"),
        (b"\xff\x4f\xff\x51" + bytes(40), "a JPEG 2000 image"),
        (b"\xff\x0a" + bytes(40), "a JPEG XL image"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), "a JPEG XL image"),
        (b"8BPS" + bytes(40), "a Photoshop document"),
        (bytes(344) + b"n+1\0" + bytes(9), "a NIfTI file"),
        (bytes(128) + b"DICM" + bytes(9), "a DICOM file"),
        (b"  <svg/>", "an HTML or XML page"),
        (b"GIF89a", "a GIF"),
    ],
)
def test_other_formats_are_named_by_their_first_bytes(data, kind):
    assert reason(data).startswith(kind)


def written(values, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, values, metadata=None, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("values", "options", "kind"),
    [
        (np.zeros((9, 9), "f8"), {}, "1 band of 64-bit float values (grey)"),
        (np.zeros((9, 9), "f2"), {}, "1 band of 16-bit float values (grey)"),
        (np.zeros((9, 9), "c8"), {}, "1 band of 64-bit complex values (grey)"),
        (np.zeros((9, 9, 3), "f4"), {"photometric": "rgb"}, "3 bands of 32-bit float values (RGB)"),
        (
            np.zeros((9, 9, 7), "u2"),
            {"photometric": "minisblack", "planarconfig": "contig"},
            "7 bands of 16-bit unsigned",
        ),
    ],
)
def test_a_tiff_that_is_not_supported_is_not_called_broken(values, options, kind):
    found = reason(written(values, **options))
    assert found.startswith(f"a TIFF of {kind}")
    assert found.endswith("not supported")


def test_compressions_and_kinds_of_jpeg_that_are_not_supported():
    grey = noise(20, 30)
    assert reason(written(grey, compression="jpeg2000")) == (
        "a TIFF compressed by JPEG 2000, which is not supported"
    )
    assert "compressed by WebP" in reason(written(noise(20, 30, 3), compression="webp"))
    assert "big-endian BigTIFF" in reason(written(grey, bigtiff=True, byteorder=">"))
    data = bytearray(encoded(smooth(20, 30), "JPEG"))
    place = data.index(b"\xff\xc0")
    data[place + 4] = 12
    assert reason(bytes(data)) == "a 12-bit JPEG, which is not supported"
    data[place + 1], data[place + 4] = 0xC3, 16
    assert reason(bytes(data)) == "a lossless JPEG of 16 bits, which is not supported"


def test_damage_is_still_called_broken():
    whole = written(noise(60, 80, 3), photometric="rgb", compression="zlib")
    for data in (whole[:-200], whole[:60], whole[:8] + bytes(len(whole) - 8)):
        assert "broken TIFF" in reason(data)
    assert "broken JPEG" in reason(encoded(smooth(60, 80), "JPEG")[:300])


# Misread -------------------------------------------------------------------------------------


def planes(values):
    return np.ascontiguousarray(values.transpose(2, 0, 1))


DEEP = noise(30, 40, 3, high=65536, dtype=np.uint16)
MISREAD = {
    "separate planes": written(planes(DEEP), photometric="rgb", planarconfig="separate"),
    "separate inks": written(
        planes(noise(30, 40, 4, high=65536, dtype=np.uint16)),
        photometric="separated", planarconfig="separate",
    ),
    "swapped": written(DEEP[:, :, 0].astype(np.int16), compression="lzw", byteorder=">"),
    "swapped floats": written(np.ones((9, 9), "f4"), compression="zlib", byteorder=">"),
    "signed bytes": written(np.full((9, 9), -3, np.int8)),
    "large": written(np.full((9, 9), 2**32 - 1, np.uint32)),
    "inks of no Adobe": encoded(Image.new("CMYK", (9, 9)), "JPEG").replace(b"Adobe", b"Other"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISREAD)
@pytest.mark.parametrize("bit_depth", [16, "minmax"])
def test_what_pillow_misreads_is_refused(name, bit_depth):
    rules = PixelRules(SIDE, bit_depth=bit_depth)
    found = reason(MISREAD[name], rules)
    assert "broken" not in found
    assert misread_reason(MISREAD[name]) == reason(
        MISREAD[name], PixelRules(SIDE, bit_depth="minmax")
    )


@pytest.mark.parametrize("name", MISREAD)
@pytest.mark.parametrize("is_loaded", [False, True])
def test_images_in_memory_are_refused_alike(name, is_loaded):
    with Image.open(io.BytesIO(MISREAD[name])) as image:
        if is_loaded:
            image.load()
        with pytest.raises(DataError, match=re.escape(misread_reason(MISREAD[name]))):
            load_opened(image, PixelRules(SIDE, bit_depth="minmax"))


def test_colours_that_are_fewer_than_pixels_are_not_filled_in():
    data = tiff(noise(30, 40), photometric=6, bits=8, tag_530=2 << 16 | 2, tag_277=3)
    assert "fewer colours than pixels" in reason(data, PixelRules(SIDE, truncated="keep"))


def test_their_neighbours_are_read_right():
    packed = written(planes(DEEP), photometric="rgb", planarconfig="separate", compression="lzw")
    plain = written(planes(DEEP >> 8).astype("u1"), photometric="rgb", planarconfig="separate")
    for data in (packed, plain):
        np.testing.assert_array_equal(load(data, RULES).pixels, DEEP >> 8)
        assert misread_reason(data) is None
    for values in (np.full((9, 9), 100, np.int8), np.full((9, 9), 2**31 - 1, np.uint32)):
        data = written(values)
        load(data, PixelRules(SIDE, bit_depth="minmax"))
        assert misread_reason(data) is None
    ramp = np.arange(-200, 200, dtype=np.int16).reshape(20, 20)
    truth = np.rint((ramp + 200.0) * 255 / 399)
    for options in ({"byteorder": ">"}, {"byteorder": "<", "compression": "lzw"}):
        found = load(written(ramp, **options), PixelRules(SIDE, bit_depth="minmax"))
        np.testing.assert_array_equal(found.pixels, truth)
    adobe = encoded(Image.new("CMYK", (9, 9)), "JPEG")
    np.testing.assert_array_equal(decode(adobe, RULES).pixels, pillow(adobe))


@pytest.mark.parametrize("options", [{"bigtiff": True}, {"tile": (16, 32)}, {"rowsperstrip": 7}])
def test_deep_colour_in_separate_planes_that_are_compressed(options):
    values = DEEP >> 4
    data = written(
        planes(values), photometric="rgb", planarconfig="separate", compression="zlib", **options
    )
    truth = np.rint(values * 255.0 / 4095)
    np.testing.assert_array_equal(load(data, PixelRules(SIDE, bit_depth=12)).pixels, truth)


def test_a_wrapped_value_needs_the_pixels_to_be_found():
    values = np.arange(81, dtype=np.uint32).reshape(9, 9)
    assert misread_reason(tiff(values, bits=32)) is None
    values[0, 0] = 2**31
    assert misread_reason(tiff(values, bits=32)) == (
        "a value of 2147483648, above the 2147483647 that Pillow reads"
    )


# PNG's profiles and texts --------------------------------------------------------------------


def test_large_profiles_and_texts_of_a_png_are_left_out():
    from PIL.PngImagePlugin import PngInfo

    values, texts = noise(20, 30, 3), PngInfo()
    for number in range(70):
        texts.add_text(f"note {number}", "x" * 1_000_000, zip=True)
    large = PngInfo()
    large.add_text("one", "x" * 3_000_000, zip=True)
    for options in ({"icc_profile": bytes(2_000_000)}, {"pnginfo": texts}, {"pnginfo": large}):
        data = encoded(values, **options)
        np.testing.assert_array_equal(load(data, RULES).pixels, values)
        end = data.index(b"IDAT") - 4
        place = data.index(b"IEND") - 4
        behind = data[:33] + data[end:place] + data[33:end] + data[place:]
        np.testing.assert_array_equal(load(behind, RULES).pixels, values)


def test_texts_that_may_turn_an_image_are_not_left_out():
    from PIL.PngImagePlugin import PngInfo

    large = PngInfo()
    large.add_itxt("XML:com.adobe.xmp", "x" * 3_000_000, zip=True)
    assert "MAX_TEXT_CHUNK" in reason(encoded(noise(20, 30, 3), pnginfo=large))
