"""The fast decoders against Pillow: same verdict, same pixels, of whole and of damaged files."""

import io
import random
import struct
import threading
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from failing import failing
from PIL import Image
from sample_encodings import encoded

from featcache.errors import DataError
from featcache.pixels import acceleration, decoding, png
from featcache.pixels.images import PixelRules, decode

SIGNATURE = b"\x89PNG\r\n\x1a\n"
RULES = PixelRules(48)


def picture(height, width, *bands, seed=0, high=255):
    """Return a smooth picture with some noise: what photos and X-rays are to a compressor."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [
        (rows * rng.uniform(0, 2) + columns * rng.uniform(0, 2) + rng.uniform(0, 9)) % 250
        for _ in range(np.prod(bands, dtype=int))
    ]
    values = np.stack(planes, axis=-1) + rng.integers(0, 6, (height, width, len(planes)))
    values = values * high / 255
    return values.astype(np.uint8 if high == 255 else np.uint16).reshape(height, width, *bands)


def chunks(data):
    found, place = [], 8
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        found.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    return found


def joined(parts):
    return SIGNATURE + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )


def repacked(data, change):
    """Return a PNG with its filtered rows changed."""
    head, *_ = chunks(data)
    rows = change(zlib.decompress(b"".join(b for kind, b in chunks(data) if kind == b"IDAT")))
    return joined([head, (b"IDAT", zlib.compress(bytes(rows))), (b"IEND", b"")])


KINDS = {
    "4:2:0": ((3,), "JPEG", {"subsampling": 2}),
    "4:2:2": ((3,), "JPEG", {"subsampling": 1, "quality": 95}),
    "4:4:4": ((3,), "JPEG", {"subsampling": 0, "quality": 50}),
    "restarts": ((3,), "JPEG", {"restart_marker_blocks": 2}),
    "progressive": ((3,), "JPEG", {"progressive": True, "quality": 90}),
    "grey jpeg": ((), "JPEG", {"quality": 90}),
    "grey progressive": ((), "JPEG", {"progressive": True}),
    "grey": ((), "PNG", {}),
    "grey and alpha": ((2,), "PNG", {"compress_level": 1}),
    "rgb": ((3,), "PNG", {"compress_level": 9}),
    "rgba": ((4,), "PNG", {}),
    "16 bits": ((), "PNG", {"compress_level": 3}),
    "stored": ((3,), "PNG", {"compress_level": 0}),
}


def example(kind, height, width, seed=0):
    bands, container, options = KINDS[kind]
    high = 65535 if kind == "16 bits" else 255
    return encoded(picture(height, width, *bands, seed=seed, high=high), container, **options)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Count how many images the fast decoders take (True) and how many they leave to Pillow."""
    assert acceleration.start()
    counts, real = Counter(), decoding._decode_fast

    def counting(*arguments):
        values = real(*arguments)
        counts[values is not None] += 1
        return values

    monkeypatch.setattr(decoding, "_decode_fast", counting)
    return counts


def outcome(data):
    """Return the pixels, or why there are none."""
    try:
        return decoding.read(data, fill=False).values
    except DataError as error:
        return str(error.found)


def by_pillow(data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "_decode_fast", lambda *_: None)
        return outcome(data)


def assert_same(data, note):
    found, truth = outcome(data), by_pillow(data)
    assert type(found) is type(truth), (note, found, truth)
    if isinstance(truth, str):
        assert found == truth, note
    else:
        assert found.dtype == truth.dtype, note
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, truth, str(note))


@pytest.mark.parametrize("kind", KINDS)
def test_whole_images_of_any_size_equal_pillow(kind, fast):
    rng = np.random.default_rng(len(kind))
    sizes = [(1, 1), (1, 9), (300, 3), (8, 200), *rng.integers(1, 70, (36, 2)).tolist()]
    for seed, (height, width) in enumerate(sizes):
        data = example(kind, height, width, seed)
        assert_same(data, (kind, height, width))
        with Image.open(io.BytesIO(data)) as image:
            if kind != "16 bits":
                truth = image.convert("RGB").resize((48, 48), Image.Resampling.BILINEAR)
                np.testing.assert_array_equal(decode(data, RULES).pixels, np.asarray(truth))
    assert fast[True] >= len(sizes)
    assert not fast[False]


@pytest.mark.parametrize("kind", ["grey", "grey and alpha", "rgb", "rgba", "16 bits"])
def test_every_filter_of_png_is_undone_as_pillow_does(kind, fast):
    """Filters written over others: any bytes are an image, and what follows depends on all."""
    for seed in range(40):
        generator = random.Random(seed)
        kinds = [[4], [3, 4], [0, 1, 2, 3, 4]][seed % 3]

        def change(rows, generator=generator, kinds=kinds):
            rows, length = bytearray(rows), len(rows) // 21
            rows[::length] = [generator.choice(kinds) for _ in range(21)]
            return rows

        assert_same(repacked(example(kind, 21, 17, seed), change), (kind, seed))
    assert fast == {True: 40}


LARGE = [(1024, 1024, "grey"), (2000, 2500, "grey"), (2500, 3000, "16 bits")]


@pytest.mark.parametrize("size", LARGE)
def test_large_xrays_take_the_fast_path_alone(size, fast, monkeypatch):
    height, width, kind = size
    data = example(kind, height, width)
    assert_same(data, size)
    monkeypatch.setattr(decoding.ImageFile.ImageFile, "load", None)  # looking for tags would load
    assert not isinstance(outcome(data), str)
    assert fast == {True: 2}


def test_interlaced_images_are_left_to_pillow(fast):
    """One pixel wide, they are as many bytes as plain rows, in another order."""
    head, pixels, end = chunks(example("grey", 8, 1))
    head = (b"IHDR", head[1][:-1] + b"\1")
    assert_same(joined([head, pixels, end]), "interlaced")
    assert fast == {False: 1}


EXTRA = {
    "text": (b"tEXt", b"a\0b"), "transparency": (b"tRNS", bytes(6)), "gamma": (b"gAMA", bytes(4)),
    "private": (b"abCd", b"zz"), "unknown": (b"ABCD", b""), "a frame": (b"fdAT", bytes(9)),
    "animation": (b"acTL", struct.pack(">II", 2, 0)), "more pixels": (b"IDAT", b"abc"),
    "orientation": (b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06" + bytes(6)),
}  # fmt: skip


@pytest.mark.parametrize("extra", EXTRA)
def test_chunks_before_between_and_after_the_pixels(extra, fast):
    head, pixels, end = chunks(example("rgb", 31, 43))
    half = len(pixels[1]) // 2
    parts = [(b"IDAT", pixels[1][:half]), (b"IDAT", b""), (b"IDAT", pixels[1][half:])]
    for place in range(5):
        inside = [*parts[:place], EXTRA[extra], *parts[place:]]
        assert_same(joined([head, *inside, end]), (extra, place))
    fast.clear()
    assert_same(joined([head, *parts, end]) + b"anything", extra)
    assert fast == {True: 1}


def test_missing_or_extra_rows_are_left_to_pillow():
    data = example("rgb", 31, 43)
    for change in (
        lambda rows: rows[:-1], lambda rows: rows[:-200], lambda rows: b"",
        lambda rows: rows + b"x", lambda rows: rows + bytes(3000),
        lambda rows: b"\5" + rows[1:], lambda rows: rows[:-130] + b"\xff" + rows[-129:],
    ):  # fmt: skip
        assert_same(repacked(data, change), "rows")
    place = data.index(b"IDAT") + 4
    with Image.open(io.BytesIO(data)) as image:
        assert png.decode(data, place, *image.size, "RGB") is not None
        assert png.decode(data, place, 43, 30, "RGB") is None
        assert png.decode(data, place, 43, 32, "RGB") is None


def test_no_memory_for_the_fast_path_leaves_the_image_to_pillow(monkeypatch, fast):
    monkeypatch.setattr(png, "decode", failing(MemoryError()))
    assert_same(example("grey", 9, 9), "memory")
    assert fast == {False: 1}


def test_a_file_that_inflates_to_more_than_it_says_is_pillows():
    head, *_ = chunks(example("grey", 9, 9))
    bomb = zlib.compressobj(9)
    body = b"".join(bomb.compress(bytes(2**20)) for _ in range(50)) + bomb.flush()
    assert_same(joined([head, (b"IDAT", body), (b"IEND", b"")]), "bomb")


JPEGS = [kind for kind in KINDS if KINDS[kind][1] == "JPEG"]


@pytest.mark.parametrize("kind", JPEGS)
def test_jpeg_headers_that_say_something_else(kind):
    data = example(kind, 33, 47)
    frame = next(i for i in range(len(data)) if data[i : i + 2] in {b"\xff\xc0", b"\xff\xc2"})
    for marker in range(0xC0, 0xD0):
        assert_same(data[: frame + 1] + bytes([marker]) + data[frame + 2 :], hex(marker))
    for place in range(frame + 4, frame + 20):
        for value in (0, 1, 2, 3, 4, 12, 17, 34, 255):
            changed = data[:place] + bytes([value]) + data[place + 1 :]
            assert_same(changed, (kind, place - frame, value))
    bare = data[:2] + data[4 + int.from_bytes(data[4:6], "big") :]  # without JFIF
    for transform in (0, 1, 2):
        adobe = b"\xff\xee\0\x0eAdobe\0d\0\0\0\0" + bytes([transform])
        assert_same(data[:2] + adobe + data[2:], (kind, transform))
        assert_same(bare[:2] + adobe + bare[2:], (kind, transform))
    for other in (bare, data + b"more", data + data, data[:-2], data[:-1], data[:-40]):
        assert_same(other, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_get_pillows_verdict(kind):
    generator = random.Random(kind)
    whole = example(kind, 61, 83)
    for _ in range(120):
        data = bytearray(whole)
        place = generator.randrange(min(len(data), generator.choice((700, 10**6))))
        match generator.randrange(4):
            case 0:
                del data[place:]
            case 1:
                data[place] ^= 1 << generator.randrange(8)
            case 2:
                del data[place : place + generator.randint(1, 50)]
            case _:
                data[place:place] = generator.randbytes(generator.randint(1, 20))
        assert_same(bytes(data), (kind, place))


def test_threads_that_decode_at_once_get_their_own_pixels():
    files = [example(kind, 90, 70, seed) for seed, kind in enumerate(KINDS)]
    truths = [decode(data, RULES).pixels for data in files]
    start = threading.Barrier(8)

    def work(number):
        start.wait(300)
        order = random.Random(number).choices(range(len(files)), k=80)
        return all(np.array_equal(decode(files[i], RULES).pixels, truths[i]) for i in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
