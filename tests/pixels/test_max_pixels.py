"""One limit of pixels for all formats, which can be raised: see ``--max-pixels``."""

import io

import numpy as np
import pytest
from PIL import Image
from sample_encodings import encoded, noise

from featcache.errors import ConfigError, DataError
from featcache.pixels.images import PixelRules, decode
from featcache.pixels.inspection import deep_maximum
from featcache.pixels.isolation import IsolatedDecoder
from featcache.pixels.views import PLAIN
from featcache.untrusted import MAX_PIXELS

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "PPM", "WEBP")


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_has_the_same_limit(kind):
    data = encoded(noise(40, 50, 3), kind=kind)
    truth = decode(data, PixelRules(16)).pixels
    for truncated in ("skip", "keep"):
        rules = PixelRules(16, truncated=truncated, max_pixels=2000)
        np.testing.assert_array_equal(decode(data, rules).pixels, truth)
        with pytest.raises(DataError, match="50 x 40 pixels, above --max-pixels 1,999"):
            decode(data, PixelRules(16, truncated=truncated, max_pixels=1999))


def one_colour(kind, **options):
    """Return a file of 1 x 2**28 + 1 pixels, in a shape that the format can hold."""
    buffer = io.BytesIO()
    Image.new("L", (16_385, 16_384), 77).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "options"),
    [("TIFF", {"compression": "packbits"}), ("PNG", {"compress_level": 1}), ("JPEG", {})],
)
def test_images_above_the_default_are_read_where_that_is_raised(kind, options):
    data = one_colour(kind, **options)
    with pytest.raises(DataError, match=f"above --max-pixels {MAX_PIXELS:,}"):
        decode(data, PixelRules(16))
    found = decode(data, PixelRules(16, max_pixels=16_385 * 16_384)).pixels
    assert (found == 77).all()


def test_the_limit_holds_for_deep_images_and_in_a_child_process():
    data = encoded(Image.fromarray(np.full((40, 50), 4095, np.uint16)))
    assert deep_maximum(data, 2000) == 4095
    assert deep_maximum(data, 1999) is None
    with IsolatedDecoder() as child:
        assert child.deep_maximum(data, 1999) is None
        with pytest.raises(DataError, match="above --max-pixels 1,999"):
            child.render(data, [(PixelRules(16, max_pixels=1999), PLAIN)], bytes(32))


def test_the_limit_is_no_part_of_the_identity():
    assert PixelRules(16, max_pixels=9) == PixelRules(16)
    assert PixelRules(16, max_pixels=9).as_identity() == PixelRules(16).as_identity()
    for odd in (0, -1, True, 2.0, "9"):
        with pytest.raises(ConfigError, match="--max-pixels"):
            PixelRules(16, max_pixels=odd)
