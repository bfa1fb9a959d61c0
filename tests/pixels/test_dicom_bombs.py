"""Hostile DICOM files fail with a reason before they take memory or time."""

from __future__ import annotations

import io
import random
import time
import tracemalloc
import zlib

import numpy as np
import pytest

from featcache.data.dicom_files import is_dicom
from featcache.errors import DataError
from featcache.pixels.dicom import read_dicom
from featcache.pixels.dicom_headers import read_headers
from featcache.pixels.dicom_rules import DicomRules
from featcache.pixels.images import PixelRules, load

pytest.importorskip("pydicom", reason="pydicom, the extra dicom")
for name in ("gdcm", "openjpeg"):
    pytest.importorskip(name, reason=f"{name}, the extra dicom")

from sample_dicom import make_dicom, ramp, read_back, table  # noqa: E402


def reason(data: bytes, most: int = 2**24) -> str:
    with pytest.raises(DataError) as caught:
        read_dicom(data, DicomRules(), most)
    return str(caught.value.found)


def test_a_deflate_bomb_is_refused() -> None:
    data = make_dicom(np.zeros((4000, 4000), np.uint16), syntax="deflated")
    assert len(data) < 100_000
    assert "4000 x 4000 pixels, above" in reason(data, most=10_000)
    bomb = make_dicom(np.zeros((8000, 5000), np.uint16), syntax="deflated")
    assert "holds more than --max-pixels allow" in reason(bomb, most=10_000)
    place = bomb.index(b"\x02\0\0\0UL") + 8  # the length of the meta information: a lie
    lying = bomb[:place] + bytes(4) + bomb[place + 4 :]
    assert "holds more than --max-pixels allow" in reason(lying, most=10_000)


def test_values_far_beyond_the_stored_bits_make_no_table_of_them() -> None:
    """JPEG 2000 has bits of its own: 24 of them took 0.7 GB, and 32 would take 130."""
    values = np.zeros((64, 72), np.uint32)
    values[0, 0], values[1] = 2**24 - 1, 4095
    dataset = read_back(make_dicom(values, bits=24, syntax="JPEG 2000 lossless"))
    dataset.BitsStored, dataset.HighBit = 12, 11
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    tracemalloc.start()
    try:
        picture = read_dicom(buffer.getvalue(), DicomRules(), 2**24)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6
    assert picture.is_deep
    assert (picture.pixels[0, 0], picture.pixels[0, 1], picture.pixels[1, 0]) == (255, 0, 255)


def test_a_codestream_of_another_size_is_refused_before_memory_is_taken() -> None:
    data = make_dicom(ramp(8), syntax="JPEG 2000 lossless")
    place = data.index(b"\xff\x4f\xff\x51")
    huge = data[: place + 8] + (60_000).to_bytes(4, "big") + data[place + 12 :]
    assert "a compressed image of 60000 x 64 x 1" in reason(huge)
    jpeg = make_dicom(ramp(8), syntax="JPEG")
    place = jpeg.index(b"\xff\xc0") + 5
    huge = jpeg[:place] + (60_000).to_bytes(2, "big") + jpeg[place + 2 :]
    assert "a compressed image of 72 x 60000 x 1" in reason(huge)


def test_a_codestream_of_bits_that_crash_a_decoder_is_refused() -> None:
    data = bytearray(make_dicom(ramp(12), bits=12, syntax="JPEG-LS"))
    precision = data.index(b"\xff\xf7") + 4
    data[precision] = 141
    assert "a compressed image of 141 bits" in reason(bytes(data))


def test_a_deflate_bomb_behind_long_meta_information_is_refused() -> None:
    # pydicom asks for no order, and inflates whatever the transfer syntax says at last
    bomb = make_dicom(np.zeros((8000, 5000), np.uint16), syntax="deflated")
    place = bomb.index(b"\x02\0\x10\0UI")
    padding = b"\x02\0\x02\x01OB\0\0" + (70_000).to_bytes(4, "little") + bytes(70_000)
    hidden = bomb[:place] + padding + bomb[place:]
    assert "deflated DICOM file whose header does not say" in reason(hidden, most=10_000)


def test_a_header_of_millions_of_empty_elements_is_refused() -> None:
    plain = make_dicom(ramp(12), bits=12, syntax="deflated")
    meta = plain[: plain.index(b"1.2.840.10008.1.2.1.99") + 22]
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = meta + packer.compress(bytes(1 << 23)) + packer.flush()
    assert len(data) < 20_000
    assert "more than 500,000 elements" in reason(data, most=2**24)
    assert read_headers([("", data)], ["a.dcm"], b"salt") == [None]


# ---------------------------------------------------------------------------------------- fuzzing

LUT = {"VOILUTSequence": [table(np.arange(4096)[::-1] // 16, 0, 8)]}
NESTED = b"\x08\0\x15\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff"
LENGTHS = (0, 1, 3, 0xFFFF, 0xFFFFFFFE, 0xFFFFFFFF, 0x7FFFFFFE, 0x80000000)


def damage(data: bytearray, kind: str, chance: random.Random) -> bytearray:
    """Return a file with its header damaged in one of the ways of ``KINDS``."""
    reach = min(900 if chance.random() < 0.9 else len(data), len(data) - 8)
    places = [chance.randrange(132, reach) for _ in range(chance.choice([1, 1, 2, 5, 20]))]
    if kind == "cut off":
        return data[: places[0]]
    if kind == "nested sequences":
        place = max(bytes(data).find(b"\x08\0", 140), 132)
        return data[:place] + NESTED * chance.choice([1, 50, 2000]) + data[place:]
    for place in places:
        if kind == "bytes":
            data[place] = chance.choice([0, 255, chance.randrange(256)])
        elif kind == "lengths":
            value, size = (
                chance.choice([*LENGTHS, chance.randrange(1 << 32)]),
                chance.choice([2, 4]),
            )
            data[place : place + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
        elif chance.random() < 0.5:
            del data[place : place + chance.choice([1, 2, 8])]
        else:
            data[place:place] = chance.randbytes(chance.choice([1, 2, 8]))
    return data


KINDS = ("bytes", "bytes", "lengths", "lengths", "moved", "cut off", "nested sequences")


def test_fuzzed_headers_neither_crash_nor_hang_nor_leak(pytestconfig: pytest.Config) -> None:
    """10,000 behind --long."""
    chance = random.Random(0)
    sources = [
        make_dicom(
            ramp(12), bits=12, syntax=syntax, PatientName="Smith^John", PatientID="Q90125", **how
        )
        for syntax in ("explicit", "implicit", "deflated", "RLE", "JPEG-LS", "JPEG 2000 lossless")
        for how in ({}, LUT)
    ]
    outcomes = {"read": 0, "refused": 0}
    for _ in range(10_000 if pytestconfig.getoption("--long") else 300):
        data = bytes(damage(bytearray(chance.choice(sources)), chance.choice(KINDS), chance))
        if not is_dicom(data):
            continue
        begin = time.monotonic()
        text = ""
        try:
            load(data, PixelRules(64, dicom=DicomRules(), max_pixels=2**22))
            outcomes["read"] += 1
        except DataError as error:
            outcomes["refused"] += 1
            text = str(error)
        (facts,) = read_headers([("", data)], ["x.dcm"], b"salt")
        assert not any(name in f"{text} {facts}" for name in ("Smith", "Q90125"))
        assert "crashed" not in text
        assert time.monotonic() - begin < 10
    assert min(outcomes.values()) > 20, outcomes
