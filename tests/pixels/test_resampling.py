"""Resizing by the kernels against Pillow, bit for bit."""

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from featcache.pixels import acceleration, kernels
from featcache.pixels.resampling import INTERPOLATIONS, resize

SIZES = [1, 2, 3, 4, 5, 7, 8, 16, 31, 48, 63, 97, 224, 301]


def noise(height, width, channels, seed):
    rng = np.random.default_rng(seed)
    shape = (height, width) if channels == 1 else (height, width, channels)
    extremes = rng.integers(0, 2, shape) * 255  # where bicubic overshoots
    return np.where(rng.random(shape) < 0.5, extremes, rng.integers(0, 256, shape)).astype(np.uint8)


def pillow(pixels, width, height, interpolation):
    method = Image.Resampling[interpolation.upper()]
    return np.asarray(Image.fromarray(pixels).resize((width, height), method))


@pytest.fixture(autouse=True)
def started(monkeypatch):
    assert acceleration.start()
    calls = []
    resample = kernels.resample
    monkeypatch.setattr(kernels, "resample", lambda *a: calls.append(1) or resample(*a))
    return calls


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_any_size_to_any_size_equals_pillow(channels, interpolation, started):
    rng = np.random.default_rng(channels)
    for seed in range(250):
        height, width, new_height, new_width = rng.choice(SIZES, 4)
        pixels = noise(height, width, channels, seed)
        found = resize(pixels, int(new_width), int(new_height), interpolation)
        truth = pillow(pixels, int(new_width), int(new_height), interpolation)
        np.testing.assert_array_equal(found, truth, f"{pixels.shape} to {truth.shape}")
        assert found.flags.writeable
        assert found.flags.c_contiguous
    assert len(started) >= 250


@pytest.mark.parametrize("shape", [(1024, 1024), (2500, 2000), (375, 500, 3), (2000, 150, 3)])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_real_sizes_equal_pillow(shape, interpolation, started):
    pixels = noise(*shape[:2], 3 if len(shape) == 3 else 1, seed=0)
    for side in (224, 299):
        truth = pillow(pixels, side, side, interpolation)
        np.testing.assert_array_equal(resize(pixels, side, side, interpolation), truth)
    assert started


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_views_of_any_memory_order_can_be_resized(turn):
    pixels = np.rot90(noise(40, 60, 3, seed=1), turn)[::-1]
    truth = pillow(np.ascontiguousarray(pixels), 20, 30, "bilinear")
    np.testing.assert_array_equal(resize(pixels, 20, 30, "bilinear"), truth)
    frozen = noise(9, 9, 1, seed=1)
    frozen.flags.writeable = False
    np.testing.assert_array_equal(resize(frozen, 9, 9, "bicubic"), frozen)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_the_axis_that_goes_first_is_pillows(interpolation, started):
    """Every wanted size of one tall, one square and one wide picture."""
    for height, width in ((24, 10), (16, 16), (10, 24)):
        pixels = noise(height, width, 1, seed=2)
        for new_height in range(1, height + 3):
            for new_width in range(1, width + 3):
                found = resize(pixels, new_width, new_height, interpolation)
                truth = pillow(pixels, new_width, new_height, interpolation)
                np.testing.assert_array_equal(found, truth, f"{pixels.shape} to {truth.shape}")
    assert started


def test_the_order_of_the_axes_is_the_same_without_the_kernels(monkeypatch, started):
    """And with a Pillow that would take the other axis first: 12 took rows first, always."""
    tall = noise(40, 20, 3, seed=3)
    truth, other_order = pillow(tall, 10, 9, "bicubic"), pillow(tall, 10, 40, "bicubic")
    assert not np.array_equal(pillow(other_order, 10, 9, "bicubic"), truth)  # it matters
    sizes, real = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, how: sizes.append(size) or real(self, size, how)
    )
    monkeypatch.setattr(acceleration, "is_ready", lambda: False)
    np.testing.assert_array_equal(resize(tall, 10, 9, "bicubic"), truth)
    assert sizes == [(20, 9), (10, 9)]  # an axis at a time
    assert not started


def test_strips_that_shrink_beyond_measure_are_left_to_pillow(started):
    strip = noise(2, 30_000, 1, seed=0)
    np.testing.assert_array_equal(resize(strip, 8, 8, "bilinear"), pillow(strip, 8, 8, "bilinear"))
    assert not started


def test_the_weights_of_strips_take_little_memory():
    strip = noise(2, 8_001, 1, seed=0)
    tracemalloc.start()
    try:
        resize(strip, 8, 2, "bicubic")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 500_000
