"""Where each value of a Parquet column of bytes lies, by the headers of the column's pages.

Arrow reads whole row groups, and pandas writes a data set as one of them: gigabytes for an image.
A page is about 1 MiB. Pages of values as they are, in a dictionary, or behind their lengths
(DELTA_LENGTH_BYTE_ARRAY) are read; others are refused.

The format: github.com/apache/parquet-format, Encodings.md and parquet.thrift.

Reads: stretches of a file, by the function that it is given. Writes: nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from featcache.data.blobs import ReadAt
from featcache.data.parquet_encodings import Ints, decode_deltas, decode_runs, read_header

_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3  # page types
_PLAIN, _PLAIN_DICTIONARY, _RLE, _DELTA_LENGTH, _RLE_DICTIONARY = 0, 2, 3, 6, 8  # encodings
_ENCODINGS = {4: "BIT_PACKED", 5: "DELTA_BINARY_PACKED", 7: "DELTA_BYTE_ARRAY"}
_MAX_PAGE_BYTES = 2**31
_MAX_RATIO, _RATIO_FREE_BYTES = 250, 1 << 24  # of a decompression bomb, as in ``archive``

Unpack = Callable[[bytes, int], bytes]
"""(compressed bytes, size they unpack to) -> those bytes."""


class Page(NamedTuple):
    """Bytes of a column chunk that are unpacked together.

    Args:
        offset: Where they begin in the file.
        num_bytes: How many they are there.
        unpacked_bytes: What they unpack to; 0 if they are not compressed.
    """

    offset: int
    num_bytes: int
    unpacked_bytes: int


class Places(NamedTuple):
    """Where the values of a column chunk lie, in the order of its rows.

    Args:
        pages: Its pages with values.
        page: (N,) number of the page with the bytes of each row.
        offset: (N,) where they begin in the unpacked page.
        size: (N,) how many they are; -1 for a null.
    """

    pages: list[Page]
    page: Ints
    offset: Ints
    size: Ints


class Chunk(NamedTuple):
    """A column chunk: the values of a column in a row group.

    Args:
        read: Reads a stretch of the file.
        start: Where the chunk begins in the file.
        end: Where it ends.
        num_values: How many values it has, nulls among them.
        levels: The largest definition level of the column. It has no repetition levels.
        unpack: Unpacks a page; None if pages are not compressed.
    """

    read: ReadAt
    start: int
    end: int
    num_values: int
    levels: int
    unpack: Unpack | None


class _Dictionary(NamedTuple):
    """Where the values of a dictionary lie: number of its page, offsets and sizes."""

    page: int
    offsets: Ints
    sizes: Ints


def locate_values(chunk: Chunk) -> Places:
    """Return where the values of a column chunk lie.

    Raises:
        ValueError: If it is damaged, or of a kind that is not read; with the reason.
        IndexError: If it is damaged.
    """
    pages: list[Page] = []
    parts: list[tuple[Ints, Ints, Ints]] = []
    dictionary: _Dictionary | None = None
    position, found = chunk.start, 0
    while found < chunk.num_values:
        if position >= chunk.end:
            raise ValueError(f"a column that ends after {found:,} of {chunk.num_values:,} values")
        header, length = read_header(chunk.read, position, chunk.end)
        page = _page_of(chunk, header, position + length)
        if header.get(1) == _DICTIONARY and dictionary is None and not found:
            dictionary = _read_dictionary(chunk, page, _struct(header, 7), len(pages))
            pages.append(page)
        elif header.get(1) in {_DATA, _DATA_V2}:
            left, before = chunk.num_values - found, (len(pages), dictionary)
            own, part = _read_values(chunk, page, header, left, before)
            pages += own
            parts.append(part)
            found += len(part[0])
        position += length + page.num_bytes
    if not parts:
        return Places(pages, _NOTHING, _NOTHING, _NOTHING)
    return Places(pages, *(np.concatenate(column) for column in zip(*parts, strict=True)))


_NOTHING = np.empty(0, np.int64)


def _page_of(chunk: Chunk, header: dict[int, Any], position: int) -> Page:
    packed, unpacked = header.get(3), header.get(2)
    if not _is_int(header.get(1)):
        raise ValueError("a page header that is damaged")
    if not (_is_int(packed) and 0 <= packed <= chunk.end - position):
        raise ValueError("a page that leads out of its column")
    if not (_is_int(unpacked) and 0 <= unpacked < _MAX_PAGE_BYTES):
        raise ValueError("a page without a size")
    return Page(position, packed, 0 if chunk.unpack is None else unpacked)


def _read_values(
    chunk: Chunk, page: Page, header: dict[int, Any], most: int,
    before: tuple[int, _Dictionary | None],
) -> tuple[list[Page], tuple[Ints, Ints, Ints]]:  # fmt: skip
    """Return a data page, if it holds values itself, and where those of its rows lie."""
    is_v2 = header.get(1) == _DATA_V2
    facts = _struct(header, 8 if is_v2 else 5)
    number = _count(facts, most)
    payload, start, levels = (_split_v2 if is_v2 else _split_v1)(chunk, page, facts)
    is_there = np.ones(number, bool)
    if chunk.levels:
        is_there = decode_runs(levels, chunk.levels.bit_length(), number) == chunk.levels
    num_pages, dictionary = before
    encoding, num_there = facts.get(4 if is_v2 else 2), int(is_there.sum())
    if not _is_int(encoding):
        raise ValueError("a page header that is damaged")
    if encoding in {_PLAIN_DICTIONARY, _RLE_DICTIONARY}:
        found, own = _look_up(payload, start, num_there, dictionary), []
    else:
        walked = _walk_of(encoding)(payload, start, num_there)
        found, own = _Dictionary(num_pages, *walked), [payload.page]
    offsets, sizes = np.zeros(number, np.int64), np.full(number, -1, np.int64)
    offsets[is_there], sizes[is_there] = found.offsets, found.sizes
    return own, (np.full(number, found.page, np.int64), offsets, sizes)


def _read_dictionary(chunk: Chunk, page: Page, facts: dict[int, Any], number: int) -> _Dictionary:
    if facts.get(2, _PLAIN) not in (_PLAIN, _PLAIN_DICTIONARY):
        raise ValueError("a dictionary of an unknown encoding")
    payload = _Payload(chunk, page)
    return _Dictionary(number, *_walk_plain(payload, 0, _count(facts, payload.num_bytes)))


def _split_v1(chunk: Chunk, page: Page, facts: dict[int, Any]) -> tuple[_Payload, int, bytes]:
    """Return a page, where its values begin, and its definition levels."""
    payload = _Payload(chunk, page)
    if not chunk.levels:
        return payload, 0, b""
    if facts.get(3, _RLE) != _RLE:
        raise ValueError("levels of the encoding BIT_PACKED, which is not read")
    length = int.from_bytes(payload.read(0, 4), "little")
    if 4 + length > payload.num_bytes:
        raise ValueError("a page with levels beyond its end")
    return payload, 4 + length, payload.read(4, length)


def _split_v2(chunk: Chunk, page: Page, facts: dict[int, Any]) -> tuple[_Payload, int, bytes]:
    """Return the same of a page of version 2, whose levels are never packed."""
    length, before = facts.get(5, 0), facts.get(6, 0)
    if not (_is_int(length) and _is_int(before) and min(length, before) >= 0):
        raise ValueError("a page header that is damaged")
    size = length + before
    if size > page.num_bytes or (page.unpacked_bytes and size > page.unpacked_bytes):
        raise ValueError("a page with levels beyond its end")
    is_packed = page.unpacked_bytes > size and facts.get(7, True) is True
    unpacked = page.unpacked_bytes - size if is_packed else 0
    values = Page(page.offset + size, page.num_bytes - size, unpacked)
    return _Payload(chunk, values), 0, chunk.read(page.offset + before, length)


def _look_up(
    payload: _Payload, start: int, number: int, dictionary: _Dictionary | None
) -> _Dictionary:
    """Return where values lie that are numbers of values of the dictionary."""
    if dictionary is None:
        raise ValueError("a page without its dictionary")
    data = payload.read(start, payload.num_bytes - start)
    indices = decode_runs(data[1:], data[0], number) if number else _NOTHING
    if number and indices.max() >= len(dictionary.offsets):
        raise ValueError("a value that is not in the dictionary")
    return _Dictionary(dictionary.page, dictionary.offsets[indices], dictionary.sizes[indices])


def _walk_of(encoding: int) -> Callable[[_Payload, int, int], tuple[Ints, Ints]]:
    walks = {_PLAIN: _walk_plain, _DELTA_LENGTH: _walk_delta_length}
    if encoding in walks:
        return walks[encoding]
    name = _ENCODINGS.get(encoding, f"{encoding}")
    raise ValueError(f"the encoding {name}, which is not read for images")


class _Payload:
    """The bytes of a page: unpacked as a whole, or read in small stretches as they are."""

    def __init__(self, chunk: Chunk, page: Page) -> None:
        self.page, self._read, self._data = page, chunk.read, b""
        self.num_bytes = page.unpacked_bytes or page.num_bytes
        if page.unpacked_bytes and chunk.unpack is not None:
            if page.unpacked_bytes > max(_RATIO_FREE_BYTES, _MAX_RATIO * page.num_bytes):
                raise ValueError("a page that looks like a decompression bomb")
            packed = chunk.read(page.offset, page.num_bytes)
            self._data = unpack_page(packed, page.unpacked_bytes, chunk.unpack)

    def read(self, start: int, size: int) -> bytes:
        """Return a stretch, shorter where it would leave the page."""
        size = max(0, min(size, self.num_bytes - start))
        if self.page.unpacked_bytes:
            return self._data[start : start + size]
        return self._read(self.page.offset + start, size) if size else b""


def unpack_page(data: bytes, unpacked: int, unpack: Unpack) -> bytes:
    """Return the unpacked bytes of a page.

    Raises:
        ValueError: If they are others, or other in number, than its header says.
    """
    if not unpacked:
        return b""
    made = bytes(unpack(data, unpacked))
    if len(made) != unpacked:
        raise ValueError("a page that unpacks to another size")
    return made


def _walk_plain(payload: _Payload, start: int, number: int) -> tuple[Ints, Ints]:
    """Return offsets and sizes of values that have their length before them."""
    offsets, sizes = np.empty(number, np.int64), np.empty(number, np.int64)
    position, end = start, payload.num_bytes
    for i in range(number):
        head = payload.read(position, 4)
        if len(head) < 4:
            raise ValueError("a page that ends before its values")
        size = int.from_bytes(head, "little")
        position += 4
        if size > end - position:
            raise ValueError("a value that leads out of its page")
        offsets[i], sizes[i] = position, size
        position += size
    return offsets, sizes


def _walk_delta_length(payload: _Payload, start: int, number: int) -> tuple[Ints, Ints]:
    """Return offsets and sizes of values behind all of their lengths."""
    if not number:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    # 32 values take 4 bytes and more each at most; the values themselves need not be read
    sizes, used = decode_deltas(payload.read(start, 64 + 10 * number), number)
    if sizes.min() < 0 or sizes.max() > payload.num_bytes:
        raise ValueError("a value that leads out of its page")
    ends = np.cumsum(sizes) + (start + used)
    if ends[-1] > payload.num_bytes:
        raise ValueError("a value that leads out of its page")
    return ends - sizes, sizes


def _struct(header: dict[int, Any], number: int) -> dict[int, Any]:
    facts = header.get(number)
    if not isinstance(facts, dict):
        raise ValueError("a page header that is damaged")
    return facts


def _count(facts: dict[int, Any], most: int) -> int:
    value = facts.get(1)
    if not _is_int(value) or not 0 <= value <= most:
        raise ValueError("a page with another number of values than its column")
    return value


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
