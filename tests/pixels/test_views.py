"""Views: view 0 is the plain image; the others depend on content, name and number alone."""

from __future__ import annotations

import hashlib
import io
import math

import numpy as np
import pytest
from PIL import Image

from featcache.data.folders import training_split
from featcache.errors import ConfigError
from featcache.pixels.images import PixelRules, decode, load, resize_to_square
from featcache.pixels.resampling import warp
from featcache.pixels.views import (
    AUGMENTATIONS,
    PLAIN,
    ViewRules,
    _draw,
    _random_part,
    _random_placing,
    render,
)

RULES = PixelRules(32)
RNG = np.random.default_rng(0)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A grey picture that resizing and turning does not alias: a few broad waves."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
    waves = [
        np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in rng.uniform(-1.5, 1.5, size=(4, 3))
    ]
    return (128 + 25 * sum(waves)).clip(0, 255).astype(np.uint8)


GREY, COLOUR = png(smooth(48, 60)), png(np.stack([smooth(48, 60, s) for s in (1, 2, 3)], 2))


def views_of(data: bytes, name: str, count: int, rules: PixelRules = RULES) -> np.ndarray:
    sha256 = hashlib.sha256(data).digest()
    return render(data, [(rules, ViewRules(count, name))], sha256).views[0]


def num_views(name: str) -> int:
    return 2 if name == "flip" else 6


NAMES = pytest.mark.parametrize("name", AUGMENTATIONS)


# --- what every augmentation promises


@NAMES
@pytest.mark.parametrize("mode", ["squash", "center", "border"])
def test_view_0_is_the_plain_image(name: str, mode: str) -> None:
    rules = PixelRules(32, mode)
    for data, shape in ((GREY, (32, 32)), (COLOUR, (32, 32, 3))):
        made = views_of(data, name, num_views(name), rules)
        assert made.shape == (num_views(name), *shape)
        assert made.dtype == np.uint8
        plain = decode(data, rules).pixels
        expected = plain[..., 0] if len(shape) == 2 else plain
        np.testing.assert_array_equal(made[0], expected)


@NAMES
def test_every_view_is_another_picture_and_every_image_has_others(name: str) -> None:
    made = views_of(GREY, name, num_views(name))
    assert len({view.tobytes() for view in made}) == len(made)
    if name == "flip":
        return
    # the same pixels in another file: another sha256, so other views of the same picture
    other = GREY + b" "
    again = views_of(other, name, num_views(name))
    np.testing.assert_array_equal(made[0], again[0])
    assert all((one != two).any() for one, two in zip(made[1:], again[1:], strict=True))


@pytest.mark.parametrize("name", ["crop", "xray"])
def test_more_views_leave_the_first_as_they_are(name: str) -> None:
    np.testing.assert_array_equal(views_of(GREY, name, 3), views_of(GREY, name, 9)[:3])


def test_one_decode_serves_recipes_of_several_sizes() -> None:
    recipes = [
        (RULES, PLAIN), (PixelRules(20), ViewRules(3, "crop")), (RULES, ViewRules(2, "flip")),
    ]  # fmt: skip
    sha256 = hashlib.sha256(GREY).digest()
    made = render(GREY, recipes, sha256)
    assert [views.shape for views in made.views] == [(1, 32, 32), (3, 20, 20), (2, 32, 32)]
    for recipe, views in zip(recipes, made.views, strict=True):
        np.testing.assert_array_equal(views, render(GREY, [recipe], sha256).views[0])


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 2), (3, 500)])
@NAMES
def test_odd_shapes_have_views_too(name: str, shape: tuple[int, int]) -> None:
    data = png(RNG.integers(0, 256, shape, np.uint8))
    assert views_of(data, name, num_views(name)).shape == (num_views(name), 32, 32)


def test_pixels_of_views_are_recorded() -> None:
    """Names are identity: a changed distribution needs a new name, and this test a new line."""
    data = (np.arange(48 * 60) ** 2 // 7 % 251).astype(np.uint8).reshape(48, 60)
    sha256 = hashlib.sha256(data.tobytes()).digest()
    found = {}
    for name in AUGMENTATIONS:
        made = render(png(data), [(RULES, ViewRules(num_views(name), name))], sha256).views[0]
        found[name] = hashlib.sha256(made[1:].tobytes()).hexdigest()[:16]
    assert found == {
        "flip": "8c50f0ddcb003ef8",
        "crop": "f2a25e30aa880ae1",
        "xray": "3e085f40bb9f2a57",
    }


# --- what each one draws


def draws(name: str, number: int = 2000) -> list[np.ndarray]:
    return [_draw(name, 1, hashlib.sha256(str(i).encode()).digest()) for i in range(number)]


def test_draws_are_uniform_and_differ_by_view_name_and_image() -> None:
    many = np.array(draws("crop"))
    assert many.min() >= 0
    assert many.max() < 1
    np.testing.assert_allclose(many.mean(0), 0.5, atol=0.04)
    np.testing.assert_allclose(many.var(0), 1 / 12, atol=0.01)
    assert np.abs(np.corrcoef(many.T) - np.eye(32)).max() < 0.12
    sha256 = bytes(32)
    first = _draw("crop", 1, sha256)
    for other in (_draw("crop", 2, sha256), _draw("xray", 1, sha256), _draw("crop", 1, b"1" * 32)):
        assert not np.isin(first, other).any()


def test_flip_is_the_mirror_image() -> None:
    made = views_of(COLOUR, "flip", 2)
    np.testing.assert_array_equal(made[1], made[0][:, ::-1])


def test_a_crop_is_a_part_of_the_picture_fitted_and_perhaps_flipped() -> None:
    data, height, width = GREY, 48, 60
    picture = load(data, RULES).pixels
    for i, view in enumerate(views_of(data, "crop", 64)[1:], start=1):
        draw = _draw("crop", i, hashlib.sha256(data).digest())
        part = _random_part(picture, draw[1:])
        assert part.shape[0] <= height
        assert part.shape[1] <= width
        fitted = resize_to_square(part, RULES)
        np.testing.assert_array_equal(view, fitted[:, ::-1] if draw[0] < 0.5 else fitted)


def test_crops_have_the_stated_areas_aspects_and_places() -> None:
    """Against torchvision's RandomResizedCrop of a square: the same rule."""
    transforms = pytest.importorskip("torchvision.transforms")
    torch = pytest.importorskip("torch")
    side = 1000
    picture = np.arange(side * side, dtype=np.uint32).reshape(side, side)
    ours = []
    for draw in draws("crop"):
        part = _random_part(picture, draw[1:])  # type: ignore[arg-type]
        top, left = divmod(int(part[0, 0]), side)
        ours.append((top, left, *part.shape))
    torch.manual_seed(0)
    image = torch.zeros(1, side, side)
    theirs = [
        transforms.RandomResizedCrop.get_params(image, [0.6, 1.0], [3 / 4, 4 / 3])
        for _ in range(2000)
    ]
    one, two = np.array(ours, float), np.array(theirs, float)
    areas = one[:, 2] * one[:, 3] / side**2
    aspects = one[:, 3] / one[:, 2]
    assert areas.min() > 0.599
    assert areas.max() <= 1
    assert aspects.min() > 0.749
    assert aspects.max() < 1.335
    np.testing.assert_allclose(one.mean(0), two.mean(0), atol=12)  # of 1000 pixels
    np.testing.assert_allclose(one.std(0), two.std(0), atol=12)


def test_an_xray_turns_shifts_and_grows_within_its_bounds() -> None:
    side, margin = 224, 27
    corners = np.array([[0, 0], [0, side], [side, 0], [side, side]], float)
    angles, zooms, shifts = [], [], []
    for draw in draws("xray"):
        a, b, c, d, e, f = _random_placing(draw, side, margin)
        assert all(value * 65536 == int(value * 65536) for value in (a, b, c, d, e, f))
        angles.append(math.degrees(math.atan2(b, a)))
        zooms.append(1 / math.hypot(a, b))
        source = corners @ np.array([[a, d], [b, e]]) + (c, f)
        shifts.append(np.linalg.inv([[a, b], [d, e]]) @ (112 + margin - np.array([c, f])) - 112)
        assert source.min() >= 0, "the mirrored margin is wide enough"
        assert source.max() <= side + 2 * margin
    assert np.abs(angles).max() == pytest.approx(7, abs=0.1)
    assert (min(zooms), max(zooms)) == pytest.approx((1, 1.1), abs=1e-3)
    assert np.abs(shifts).max() == pytest.approx(0.05 * side, abs=0.1)
    np.testing.assert_allclose(np.mean(angles), 0, atol=0.3)


def test_an_xray_lies_where_its_numbers_say() -> None:
    """A bright spot, found again where the inverse of the placing sends it."""
    pixels = np.zeros((64, 64), np.uint8)
    pixels[14:17, 40:43] = 255
    padded = np.pad(pixels, 8)
    for draw in draws("xray", 20):
        a, b, c, d, e, f = _random_placing(draw, 64, 8)
        view = warp(padded, (a, b, c, d, e, f), 64).astype(float)
        y, x = (np.mgrid[:64, :64] + 0.5).reshape(2, -1) @ view.reshape(-1) / view.sum()
        source = a * x + b * y + c - 8, d * x + e * y + f - 8
        assert source == pytest.approx((41.5, 15.5), abs=0.2)


def test_an_xray_keeps_its_side_and_has_no_black_corners() -> None:
    """Dark on the left, bright on the right, nothing black: so are all its views."""
    pixels = np.full((50, 50), 90, np.uint8)
    pixels[:, 25:] = 180
    made = views_of(png(pixels), "xray", 33).astype(float)
    assert made.min() > 60
    assert (made[:, :, 24:].mean((1, 2)) > 1.3 * made[:, :, :8].mean((1, 2))).all()
    means = made.mean((1, 2)) / made[0].mean()
    assert means.min() > 0.8
    assert means.max() < 1.2


def test_contrast_and_brightness_are_those_of_torchvision() -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    torch = pytest.importorskip("torch")
    data = png(RNG.integers(20, 220, (32, 32), np.uint8))
    made = views_of(data, "xray", 6)
    plain = load(data, RULES).pixels
    for i in range(1, 6):
        draw = _draw("xray", i, hashlib.sha256(data).digest())
        padded = np.pad(plain, 4, mode="symmetric")
        image = torch.from_numpy(warp(padded, _random_placing(draw, 32, 4), 32))[None]
        contrast, brightness = 0.9 + 0.2 * draw[4], 0.9 + 0.2 * draw[5]
        expected = functional.adjust_contrast(image.float() / 255, contrast)
        expected = functional.adjust_brightness(expected, brightness) * 255
        assert np.abs(made[i] - expected[0].numpy()).max() <= 0.51


def test_a_warp_that_moves_nothing_is_exact() -> None:
    for shape in ((32, 32), (32, 32, 3)):
        pixels = RNG.integers(0, 256, shape, np.uint8)
        np.testing.assert_array_equal(warp(pixels, (1, 0, 0, 0, 1, 0), 32), pixels)
        np.testing.assert_array_equal(warp(pixels, (1, 0, 3, 0, 1, 5), 20), pixels[5:25, 3:23])


# --- rules


@pytest.mark.parametrize(
    ("count", "name", "message"),
    [
        (0, None, "--views: expected 1 to 64, found 0"),
        (65, "crop", "--views: expected 1 to 64, found 65"),
        (True, None, "--views: expected 1 to 64, found True"),
        ("8", "crop", "--views: expected 1 to 64, found '8'"),
        (5, None, "--augment: expected one of flip, crop, xray, to make 4 of 5 views with, found"),
        (1, "crop", "--views: expected 2 or more with --augment crop, found 1, the plain image"),
        (5, "blur", "--augment: expected one of flip, crop, xray, found 'blur'"),
        (8, "flip", "--views: expected 2 with --augment flip: the image and its mirror image"),
    ],
)
def test_invalid_view_options_are_refused(count: object, name: str | None, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ViewRules(count, name)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)


def test_rules_survive_the_identity() -> None:
    for rules in (PLAIN, ViewRules(64, "crop"), ViewRules(2, "flip")):
        assert ViewRules.from_identity({"backbone": "b0", **rules.as_identity()}) == rules
    assert ViewRules.from_identity({}) == PLAIN


def test_only_the_split_to_train_on_has_views() -> None:
    rules = ViewRules(8, "xray")
    splits = ("train", "valid", "test", "all")
    assert [rules.for_split(name, splits) == rules for name in splits] == [True] + 3 * [False]
    assert rules.for_split("all", ["all"]) == rules
    assert rules.for_split("test", ["test"]) == PLAIN
    assert training_split(["test", "all"]) == "all"
    assert training_split(["valid", "test"]) is None
