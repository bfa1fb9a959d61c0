"""Sizes that the bytes of a DICOM file say, before pydicom and decoders take memory for them.

Reads: bytes. Writes: nothing. Every failure is a ``DataError`` whose ``found`` is the reason.
"""

from __future__ import annotations

import io
import zlib
from typing import BinaryIO

from featcache.data.dicom_files import LONG, MAGIC, MAGIC_AT, has_magic
from featcache.pixels.dicom_display import failure

_DEFLATED, _EXPLICIT = b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.1\0\0\0"
# two an element, and 4 us: a multi-frame image of 10,000 frames may have 300,000 elements
_MOST_READS = 1_000_000
_META_BYTES, _CHUNK = 1 << 16, 1 << 20
_JPEG_FRAMES = ({*range(0xC0, 0xD0), 0xF7}) - {0xC4, 0xC8, 0xCC}
_WITHOUT_BODY = {0x01, *range(0xD0, 0xD9)}


class CountedReads:
    """A file that may be read so often: a header can be millions of elements without a byte."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, _MOST_READS
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, as files do.

        Raises:
            DataError: If there have been too many reads.
        """
        self._left -= 1
        if self._left < 0:
            raise failure(f"a DICOM file of more than {_MOST_READS // 2:,} elements")
        return self._file.read(size)


def inflate(file: BinaryIO, max_bytes: int, *, whole: bool = True) -> BinaryIO:
    """Return a file whose data set is not deflated: this one, or what it holds.

    Args:
        file: Open, at its start.
        max_bytes: Refuse a data set of more; without ``whole``, return so much of it.
        whole: Whether all of it is wanted.

    Raises:
        DataError: If it holds more, or does not say where it begins.
    """
    data = file.read(_META_BYTES)
    end = _end_of_meta(data)
    is_deflated = _DEFLATED in (data + file.read() if end is None else data[:end])
    file.seek(0)
    if not is_deflated:
        return file
    if end is None:
        raise failure("a deflated DICOM file whose header does not say where it ends")
    file.seek(end)
    inflator, rest = zlib.decompressobj(-zlib.MAX_WBITS), file.read()
    inflated = io.BytesIO()
    inflated.write(data[:end].replace(_DEFLATED, _EXPLICIT))
    while rest and not inflator.eof and inflated.tell() <= end + max_bytes:
        inflated.write(inflator.decompress(rest, _CHUNK))
        rest = inflator.unconsumed_tail
    if whole and inflated.tell() > end + max_bytes:
        raise failure("a deflated DICOM file that holds more than --max-pixels allow")
    inflated.seek(0)
    return inflated


def _end_of_meta(data: bytes) -> int | None:
    """Return where the meta information of a file ends, None where it does not in these bytes.

    It is of group 2, in explicit VR little endian (PS3.10, 7.1). Its own length, which pydicom does
    not look at, is not believed.
    """
    place = MAGIC_AT + len(MAGIC) if has_magic(data) else 0
    while data[place : place + 2] == b"\x02\0":
        representation = data[place + 4 : place + 6]
        if not representation.isalpha():
            return None
        is_long = representation in LONG
        first, last = (place + 8, place + 12) if is_long else (place + 6, place + 8)
        place = last + int.from_bytes(data[first:last], "little")
    return place if place + 2 <= len(data) else None


def codestream_size(stream: bytes) -> tuple[int, int, int] | None:
    """Return width, height and channels of a JPEG, JPEG-LS or JPEG 2000 codestream; else None.

    Raises:
        DataError: If a JPEG or JPEG-LS image has bits that neither has: GDCM crashes on them.
    """

    def number(place: int, size: int) -> int:
        return int.from_bytes(stream[place : place + size], "big")

    if stream.startswith(b"\0\0\0\x0cjP  "):  # JP2: its codestream is a box in it
        stream = stream[max(0, stream.find(b"\xff\x4f\xff\x51")) :]
    if stream.startswith(b"\xff\x4f\xff\x51"):  # T.800, A.5.1: SOC, SIZ
        width, height = (number(at, 4) - number(at + 8, 4) for at in (8, 12))
        return width, height, number(40, 2)
    if not stream.startswith(b"\xff\xd8"):
        return None
    place = 2
    while stream[place : place + 1] == b"\xff":
        marker = number(place + 1, 1)
        if marker in _JPEG_FRAMES:
            bits = number(place + 4, 1)
            if not 2 <= bits <= 16:  # T.81, B.2.2; T.87, C.2.2
                raise failure(f"a compressed image of {bits} bits")
            return number(place + 7, 2), number(place + 5, 2), number(place + 9, 1)
        length = number(place + 2, 2)
        place += 1 if marker == 0xFF else 2 if marker in _WITHOUT_BODY else 2 + length
    return None
