"""Cut-off and damaged files, files that are no images, bombs, Pillow's warnings."""

import contextlib
import io
import random
import struct
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from failing import failing
from PIL import Image, ImageFile
from sample_encodings import (
    PLAIN,
    RULES,
    SIDE,
    deep_files,
    encoded,
    noise,
    pillow,
    png,
    reason,
    smooth,
    tiff,
)

from featcache.errors import DataError, TransientError
from featcache.pixels import decoding, images
from featcache.pixels.images import PixelRules, decode
from featcache.pixels.inspection import deep_maximum

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
    monkeypatch.setattr(images, "resize", failing(MemoryError()))
    assert "MemoryError" in reason(PLAIN["rgb png"])
    with pytest.raises(TransientError):  # not the image's fault: its copies are tried themselves
        decode(PLAIN["rgb png"], PixelRules(32))


def test_an_image_that_ran_out_of_memory_is_not_taken_for_truncated(monkeypatch):
    """With ``--truncated keep`` an image that could not be read is read again, and filled in."""
    real, tries = images.read, []

    def read(data, *, fill, **options):
        tries.append(fill)
        if len(tries) == 1:
            raise decoding.failure("a broken PNG file", MemoryError())
        return real(data, fill=fill, **options)

    monkeypatch.setattr(images, "read", read)
    with pytest.raises(TransientError, match="MemoryError"):
        decode(PLAIN["rgb png"], PixelRules(32, truncated="keep"))


def test_large_images_are_read_whatever_pillows_limit_is(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for kind, options in (("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})):
        data = encoded(noise(100, 100), kind, **options)
        found = decode(data, PixelRules(100)).pixels[:, :, 0]
        np.testing.assert_array_equal(found, noise(100, 100))
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


def test_the_gate_is_free_in_a_forked_child():
    gate = decoding._TruncationGate()
    with gate(fill=True):
        gate.reset()
        with gate(fill=False):
            assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    ImageFile.LOAD_TRUNCATED_IMAGES = False
