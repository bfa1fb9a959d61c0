"""List the members of a tar by one pass over its headers. No tar is trusted.

Old tars, ustar, GNU (long names) and PAX. Names never become paths, so none can lead outside the
tar. A tar that is cut off, damaged or compressed is refused: what stands behind the fault could
only be guessed at.

Reads: the headers of a tar, by the function that it is given. Writes: nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from featcache.data.archive import safe_path
from featcache.data.blobs import ReadAt
from featcache.errors import DataError
from featcache.untrusted import MAX_TEXT, find_fault

_BLOCK = 512
_MAX_MEMBERS = 20_000_000
_MAX_EXTENDED = 4 << 20  # bytes of a PAX header or a long name
_NO_DATA = frozenset(b"123456")  # links, devices, folders, pipes: nothing follows their header
_KINDS = {
    **dict.fromkeys(b"\x0007", "file"), **dict.fromkeys(b"5", "folder"), ord("1"): "hard link",
    ord("2"): "link", ord("S"): "sparse",
}  # fmt: skip
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip -k"), b"BZh": ("bzip2", "bunzip2 -k"),
    b"\xfd7zXZ\x00": ("xz", "unxz -k"), b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}  # fmt: skip


class TarEntry(NamedTuple):
    """A member of a tar.

    Args:
        path: ``/``-separated, without a leading ``./``, inside the tar.
        kind: ``file``, ``folder``, ``hard link``, ``link``, ``sparse`` or ``other``.
        offset: Where its bytes begin in the tar.
        num_bytes: How many they are.
        mtime_ns: Its time.
        target: Of a hard link, the path of the member that has its bytes.
    """

    path: str
    kind: str
    offset: int
    num_bytes: int
    mtime_ns: int
    target: str


def list_tar(read: ReadAt, num_bytes: int, where: str) -> Iterator[TarEntry]:
    """Yield the members of a tar, in its order.

    Args:
        read: Reads a stretch of it.
        num_bytes: Its size.
        where: Its name, for messages.

    Raises:
        DataError: If it is not a whole tar, is compressed, or a name leads outside it.
        OSError: If it cannot be read.
    """
    offset, number, last = 0, 0, ""
    shared: dict[bytes, bytes] = {}  # of a global PAX header
    own: dict[bytes, bytes] = {}  # of PAX headers and long names before the member they are of
    while True:
        block = read(offset, _BLOCK)
        if block == bytes(_BLOCK) and (number or offset == 0):
            _check_end(read, offset, num_bytes, where)
            return
        if len(block) < _BLOCK:
            raise _cut_off(where, offset, number, last, num_bytes, block)
        header = _read_header(block)
        if header is None:
            raise _damaged(where, offset, number, block)
        kind, size = block[156], header.num_bytes
        start = offset + _BLOCK
        try:
            if kind in b"xgXLK":
                if not 0 <= size <= _MAX_EXTENDED:
                    raise _damaged(where, offset, number, block)
                data = read(start, size)
                if len(data) < size:
                    raise _cut_off(where, offset, number, last, num_bytes, b"x")
                if kind in b"LK":
                    own[b"path" if kind == ord("L") else b"linkpath"] = data.split(b"\0", 1)[0]
                else:
                    (shared if kind == ord("g") else own).update(_pax_records(data))
                offset = start + _padded(size)
                continue
            entry = _make_entry(header, shared | own if shared else own, start, where)
        except ValueError as error:
            raise _damaged(where, offset, number, block) from error
        if entry is not None and entry.kind == "sparse" and kind == ord("S"):
            more = block[482]
            while more:
                extension = read(start, _BLOCK)
                if len(extension) < _BLOCK:
                    raise _cut_off(where, offset, number, last, num_bytes, b"x")
                more, start = extension[504], start + _BLOCK
        own = {}
        size = 0 if kind in _NO_DATA else (entry.num_bytes if entry is not None else size)
        if start + size > num_bytes:
            name = header.name if entry is None else entry.path
            raise _cut_off(where, offset, number, name, num_bytes, b"x", inside=True)
        offset = start + _padded(size)
        number += 1
        if number > _MAX_MEMBERS:
            raise DataError("tar", expected=f"at most {_MAX_MEMBERS:,} members", found="more",
                            where=where)  # fmt: skip
        if entry is not None:
            last = entry.path
            yield entry


class _Header(NamedTuple):
    name: str
    kind: int
    num_bytes: int
    mtime: int
    link: bytes


def _read_header(block: bytes) -> _Header | None:
    """Return the fields of a header; None if it is none."""
    try:
        stated = _number(block[148:156])
        total = sum(block) - sum(block[148:156]) + 8 * 0x20
        # Some old programs took bytes for signed.
        if stated not in {total, total - 256 * sum(b > 127 for b in block[:148] + block[156:])}:
            return None
        name = block[:100].split(b"\0", 1)[0]
        if block[257:263] == b"ustar\0" and block[345]:
            name = block[345:500].split(b"\0", 1)[0] + b"/" + name
        return _Header(
            name.decode("utf-8", "surrogateescape"), block[156], _number(block[124:136]),
            _number(block[136:148]), block[157:257].split(b"\0", 1)[0],
        )  # fmt: skip
    except ValueError:
        return None


def _number(field: bytes) -> int:
    """Return an octal number, or one of GNU's in base 256."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big")
        return (
            value - (1 << 8 * len(field))
            if field[0] == 0xFF
            else value - (0x80 << 8 * (len(field) - 1))
        )
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """Return the records ``LENGTH KEY=VALUE`` of a PAX header.

    Raises:
        ValueError: If it has others.
    """
    records: dict[bytes, bytes] = {}
    start = 0
    while start < len(data) and data[start]:
        digits, blank, _ = data[start : start + 20].partition(b" ")
        length = int(digits)
        record = data[start : start + length]
        key, sign, value = record[len(digits) + 1 : -1].partition(b"=")
        if not (digits.isdigit() and blank and sign and record.endswith(b"\n")):
            raise ValueError("a PAX record")
        if len(record) != length:
            raise ValueError("a PAX record")
        records[key] = value
        start += length
    return records


def _make_entry(
    header: _Header, extended: Mapping[bytes, bytes], start: int, where: str
) -> TarEntry | None:
    """Return the entry of a header and what was said before it; None for the folder packed."""
    name, num_bytes, link = header.name, header.num_bytes, header.link
    mtime_ns, kind = header.mtime * 10**9, _KINDS.get(header.kind, "other")
    if extended:
        if b"path" in extended:
            name = extended[b"path"].decode("utf-8", "surrogateescape")
        if b"size" in extended:
            num_bytes = int(extended[b"size"])
        if b"mtime" in extended:
            mtime_ns = _nanoseconds(extended[b"mtime"])
        link = extended.get(b"linkpath", link)
        if any(key.startswith(b"GNU.sparse.") for key in extended):
            kind = "sparse"
            name = extended.get(b"GNU.sparse.name", name.encode("utf-8", "surrogateescape")).decode(
                "utf-8", "surrogateescape"
            )
    if num_bytes < 0:
        raise ValueError("a negative size")
    if (fault := find_fault(name)) or len(name) > MAX_TEXT:
        raise DataError(
            "tar member", expected="a name", found=fault or "a long one", where=where,
            hint="Do not trust this tar",
        )  # fmt: skip
    path, is_folder = safe_path(name, where, "tar")
    if not path:
        return None
    if is_folder and kind == "file":
        kind = "folder"
    target = ""
    if kind == "hard link":
        text = link.decode("utf-8", "surrogateescape")
        target = "/".join(part for part in text.split("/") if part not in {"", "."})
    return TarEntry(path, kind, start, num_bytes, mtime_ns, target)


def _nanoseconds(text: bytes) -> int:
    match = re.fullmatch(rb"(-?)(\d{1,12})(?:\.(\d*))?", text)
    if match is None:
        raise ValueError("a time")
    sign, whole, fraction = match.groups()
    value = int(whole) * 10**9 + int((fraction or b"")[:9].ljust(9, b"0"))
    return -value if sign else value


def _check_end(read: ReadAt, offset: int, num_bytes: int, where: str) -> None:
    """Check that nothing but zeros, or what is no tar, follows the end mark.

    Raises:
        DataError: If another tar follows, as ``cat a.tar b.tar`` makes them.
    """
    while offset < num_bytes:
        data = read(offset, 1 << 16)
        kept = data.lstrip(b"\0")
        if not data:
            return
        if kept:
            offset += (len(data) - len(kept)) // _BLOCK * _BLOCK
            if _read_header(read(offset, _BLOCK).ljust(_BLOCK, b"\0")) is not None:
                raise DataError(
                    "tar", expected="one", found=f"another behind its end, at byte {offset:,}",
                    where=where, hint="Programs see the first alone: keep both as files of their own",
                )  # fmt: skip
            return
        offset += len(data)


def _cut_off(
    where: str, offset: int, number: int, last: str, num_bytes: int, block: bytes, *,
    inside: bool = False,
) -> DataError:  # fmt: skip
    if number == 0 and not inside and not block.strip(b"\0"):
        found = f"{num_bytes:,} bytes, none of them a member"
        return DataError("tar", expected="a tar", found=found, where=where)
    if inside:
        place = f"in {last!r}, the member after {number:,} whole ones"
    else:
        place = f"after {number:,} members, the last of them {last!r}"
    hint = "Copy or download it again"
    if not block and not inside:
        hint += f". If it is whole but for its end mark: truncate -s +1024 {where}"
    return DataError(
        "tar", expected="a whole tar", found=f"one cut off {place}", where=where, hint=hint
    )


def _damaged(where: str, offset: int, number: int, block: bytes) -> DataError:
    if offset == 0:
        for mark, (name, command) in _COMPRESSED.items():
            if block.startswith(mark):
                return DataError(
                    "tar", expected="a plain one: its members are read in place",
                    found=f"one compressed by {name}", where=where,
                    hint=f"Unpack the tar from it once: {command} {where}",
                )  # fmt: skip
        return DataError("tar", expected="a tar", found="another kind of file", where=where)
    found = f"a damaged header at byte {offset:,}, after {number:,} members"
    return DataError(
        "tar", expected="a whole tar", found=found, where=where, hint="Copy or download it again"
    )
