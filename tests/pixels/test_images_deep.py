"""Deep greyscale, 16-bit colour and bit depths against a NumPy truth."""

import io

import numpy as np
import pytest
from PIL import Image
from sample_encodings import (
    PLAIN,
    RULES,
    SIDE,
    as_grey,
    deep_files,
    encoded,
    noise,
    pillow,
    png,
    reason,
    tiff,
)

from featcache.errors import DataError
from featcache.pixels.images import PixelRules, decode, load, load_opened
from featcache.pixels.inspection import check_bit_depth, deep_kind, deep_maximum


def png_rows(values, dtype):
    return b"".join(b"\0" + row.astype(dtype).tobytes() for row in values)


def test_orientation_of_deep_images():
    exif = Image.Exif()
    exif[0x0112] = 6
    values = noise(20, 30, high=65536, dtype=np.uint16)
    found = decode(encoded(Image.fromarray(values), exif=exif), PixelRules(20, "border")).pixels
    turned = np.rot90(np.rint(values / 257).astype(np.uint8), -1)
    image = Image.fromarray(np.ascontiguousarray(turned)).resize((13, 20), 2)
    np.testing.assert_array_equal(found[:, 3:16, 0], np.asarray(image))


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
    assert deep_kind(data) == "colour"
    assert deep_maximum(data) == (values[..., :1] if bands == 2 else values[..., :3]).max()


def test_16_bit_colour_in_other_containers_keeps_the_high_byte():
    values = noise(20, 20, 3, high=65536, dtype=np.uint16)
    for order in "<>":
        data = tiff(values, photometric=2, order=order)
        np.testing.assert_array_equal(decode(data, PixelRules(20)).pixels, values >> 8)
    ppm = b"P6 20 20 65535\n" + values.astype(">u2").tobytes()
    truth = np.rint(values / 257)
    np.testing.assert_array_equal(decode(ppm, PixelRules(20)).pixels, truth)
    stated = b"P6 20 20 4095\n" + (values >> 4).astype(">u2").tobytes()
    found = decode(stated, PixelRules(20, bit_depth=12)).pixels
    np.testing.assert_array_equal(found, np.rint((values >> 4) * 255.0 / 4095))
    assert deep_maximum(stated) is None


def deep_colour_files(values):
    """Return RGB values (H, W, 3) in every container that holds 16-bit colour, with any alpha."""
    height, width = values.shape[:2]
    alpha = noise(height, width, 1, seed=8, high=65536, dtype=np.uint16)
    opaque = np.full_like(alpha, 65535)
    with_alpha, with_opaque = (np.concatenate([values, a], axis=2) for a in (alpha, opaque))
    found = {
        "png": png(width, height, 16, 2, png_rows(values, ">u2")),
        "png with alpha": png(width, height, 16, 6, png_rows(with_alpha, ">u2")),
        "ppm": b"P6 %d %d 65535\n" % (width, height) + values.astype(">u2").tobytes(),
        "plain ppm": b"P3 %d %d 65535 # why not\n" % (width, height)
        + b" ".join(b"%d" % value for value in values.ravel()),
    }
    for order in "<>":
        options = {"photometric": 2, "order": order}
        found[f"tiff {order}"] = tiff(values, **options)
        found[f"tiff {order} with alpha"] = tiff(with_alpha, **options, tag_338=2)
        found[f"tiff {order} with a band more"] = tiff(with_alpha, **options, tag_338=0)
        found[f"tiff {order} with opaque alpha"] = tiff(with_opaque, **options, tag_338=1)
    return found


@pytest.mark.parametrize("bits", [12, 14])
def test_deep_colour_is_scaled_in_every_container(bits):
    values = noise(30, 40, 3, high=2**bits, dtype=np.uint16)
    values[0, 0] = 0, 1, 2**bits - 1
    truth = np.rint(values * 255.0 / (2**bits - 1))
    for name, data in deep_colour_files(values).items():
        assert deep_kind(data) == "colour", name
        assert deep_maximum(data) == 2**bits - 1, name
        found = load(data, PixelRules(SIDE, bit_depth=bits)).pixels
        np.testing.assert_array_equal(found, truth, err_msg=name)
        found = load(
            data, PixelRules(SIDE, bit_depth="minmax")
        ).pixels  # one range, so no hue moves
        np.testing.assert_array_equal(found, truth, err_msg=name)
    beyond = deep_colour_files(values * 2)["png"]
    assert f"of --bit-depth {bits}" in reason(beyond, PixelRules(SIDE, bit_depth=bits))


def test_deep_grey_with_alpha_and_deep_inks_are_scaled():
    values = noise(30, 40, 4, high=4096, dtype=np.uint16)
    values[0, 0] = 0, 4095, 0, 4095
    scaled = np.rint(values * 255.0 / 4095).astype(np.uint8)
    for rules in (PixelRules(SIDE, bit_depth=12), PixelRules(SIDE, bit_depth="minmax")):
        inks = Image.frombytes("CMYK", (40, 30), scaled.tobytes()).convert("RGB")
        for order in "<>":
            data = tiff(values, photometric=5, order=order)
            np.testing.assert_array_equal(load(data, rules).pixels, np.asarray(inks))
        data = png(40, 30, 16, 4, png_rows(values[:, :, 1:3], ">u2"))
        if rules.bit_depth == 12:
            np.testing.assert_array_equal(load(data, rules).pixels, scaled[:, :, 1])


def test_orientation_of_deep_colour():
    values = noise(20, 30, 3, high=4096, dtype=np.uint16)
    data = tiff(values, photometric=2, tag_274=6)
    turned = np.rot90(np.rint(values * 255.0 / 4095), -1)
    np.testing.assert_array_equal(load(data, PixelRules(SIDE, bit_depth=12)).pixels, turned)


def test_cut_off_deep_colour_is_filled_in_or_refused():
    data = deep_colour_files(noise(30, 40, 3, high=4096, dtype=np.uint16))["png"][:-2000]
    assert "broken PNG" in reason(data, PixelRules(SIDE, bit_depth=12))
    assert load(data, PixelRules(SIDE, bit_depth=12, truncated="keep")).truncated


def test_colours_multiplied_by_alpha_are_read_at_16_bits_only():
    values = noise(20, 20, 4, high=4096, dtype=np.uint16)
    data = tiff(values, photometric=2, tag_338=1)
    assert "multiplied by its alpha" in reason(data, PixelRules(SIDE, bit_depth=12))
    load(data, RULES)


def test_an_image_in_memory_has_lost_its_low_bytes():
    data = deep_colour_files(noise(20, 20, 3, high=4096, dtype=np.uint16))["png"]
    with Image.open(io.BytesIO(data)) as image, pytest.raises(DataError, match="give its path"):
        load_opened(image, PixelRules(SIDE, bit_depth=12))


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
