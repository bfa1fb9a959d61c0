"""Integers and page headers of Parquet files, decoded. No byte is trusted.

The format: github.com/apache/parquet-format, Encodings.md and parquet.thrift.

Reads: bytes; of headers, by the function that it is given. Writes: nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.data.blobs import ReadAt

_HEADER_BYTES, _MAX_HEADER_BYTES = 1 << 12, 1 << 24
_MAX_DEPTH = 8

Ints = npt.NDArray[np.int64]


def decode_deltas(data: bytes, number: int) -> tuple[Ints, int]:
    """Return integers encoded as DELTA_BINARY_PACKED, and how many bytes they take."""
    block, position = _varint(data, 0)
    parts, position = _varint(data, position)
    total, position = _varint(data, position)
    first, position = _varint(data, position)
    if total != number or not 0 < parts <= 1024 or not 0 < block <= 1 << 20 or block % parts:
        raise ValueError("lengths that are damaged")
    size = block // parts
    values = np.zeros(number, np.int64)
    values[0], done = _zigzag(first), 1
    while done < number:
        least, position = _varint(data, position)
        widths, position = data[position : position + parts], position + parts
        for width in widths:
            if done >= number:
                break
            packed = data[position : position + size * width // 8]
            if width > 64 or size % 8 or len(packed) < size * width // 8:
                raise ValueError("lengths that are damaged")
            position += len(packed)
            deltas = _unpack_bits(packed, width, size)[: number - done] + _zigzag(least)
            values[done : done + len(deltas)] = deltas
            done += len(deltas)
        if len(widths) < parts:
            raise ValueError("lengths that are damaged")
    return np.cumsum(values), position


def _unpack_bits(data: bytes, width: int, number: int) -> Ints:
    if not width:
        return np.zeros(number, np.int64)
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    wide = bits[: number * width].reshape(number, width).astype(np.int64)
    return wide @ (np.int64(1) << np.arange(width, dtype=np.int64))


def decode_runs(data: bytes, width: int, number: int) -> Ints:
    """Return integers of the RLE and bit-packing hybrid."""
    if width > 32:
        raise ValueError("integers of more than 32 bits")
    if not width:
        return np.zeros(number, np.int64)
    values, done, position, wide = np.empty(number, np.int64), 0, 0, -(-width // 8)
    while done < number:
        header, position = _varint(data, position)
        if header & 1:
            count = min(8 * (header >> 1), 8 * (len(data) // width + 1))
            packed = data[position : position + count * width // 8]
            count = min(count, 8 * len(packed) // width)
            run = _unpack_bits(packed, width, count)[: number - done]
            position += len(packed)
        else:
            value = int.from_bytes(data[position : position + wide], "little")
            position += wide
            run = np.full(min(header >> 1, number - done), value, np.int64)
        if not len(run) or position > len(data):
            raise ValueError("levels or indices that end before the page's values")
        values[done : done + len(run)] = run
        done += len(run)
    return values


# ----------------------------------------------------------------------- headers (Thrift, compact)


def read_header(read: ReadAt, position: int, end: int) -> tuple[dict[int, Any], int]:
    """Return a page's header, and its length. It may hold statistics of any length."""
    size = _HEADER_BYTES
    while True:
        data = read(position, min(size, end - position))
        try:
            return _thrift_struct(data, 0, 0)
        except IndexError:
            if len(data) < size or size >= _MAX_HEADER_BYTES:
                raise ValueError("a page header that is damaged") from None
            size *= 16


def _thrift_struct(data: bytes, position: int, depth: int) -> tuple[dict[int, Any], int]:
    if depth > _MAX_DEPTH:
        raise ValueError("a page header that is damaged")
    fields: dict[int, Any] = {}
    number = 0
    while True:
        head = data[position]
        position += 1
        if not head:
            return fields, position
        kind, step = head & 15, head >> 4
        if step:
            number += step
        else:
            number, position = _varint(data, position)
            number = _zigzag(number)
        fields[number], position = _thrift_value(data, position, kind, depth)


def _thrift_value(data: bytes, position: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in {1, 2}:
        return kind == 1, position
    if kind == 3:
        return data[position], position + 1
    if kind in {4, 5, 6}:
        value, position = _varint(data, position)
        return _zigzag(value), position
    if kind == 8:
        length, position = _varint(data, position)
        if position + length > len(data):
            raise IndexError
        return None, position + length  # statistics
    if kind == 12:
        return _thrift_struct(data, position, depth + 1)
    if kind == 7:
        if position + 8 > len(data):
            raise IndexError
        return None, position + 8
    raise ValueError("a page header that is damaged")


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data):
            raise IndexError
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number that is damaged")


def _zigzag(value: int) -> int:
    made = (value >> 1) ^ -(value & 1)
    if not -(2**63) <= made < 2**63:
        raise ValueError("a number that is damaged")
    return made
