"""Pixels against a NumPy truth, against Pillow's and torchvision's own path, and bad files."""

import io
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_encodings import PLAIN, RULES, SIDE, as_grey, encoded, noise, pillow, smooth, tiff
from torchvision.transforms import functional

from featcache.errors import ConfigError, DataError
from featcache.pixels.images import PixelRules, decode

XRAYS = Path(__file__).resolve().parents[3] / "shared" / "data" / "xray-raw"


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
