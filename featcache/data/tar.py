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
from featcache.formatting import count
from featcache.untrusted import find_fault

_BLOCK = 512
_END = bytes(_BLOCK)
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
    return _Tar(read, num_bytes, where).entries()


class _Tar:
    """A tar that is being listed, and how far that is."""

    def __init__(self, read: ReadAt, num_bytes: int, where: str) -> None:
        self._read, self._num_bytes, self._where = read, num_bytes, where
        self._offset = self._number = 0
        self._last = ""
        self._shared: dict[bytes, bytes] = {}  # of a global PAX header
        self._own: dict[bytes, bytes] = {}  # of PAX headers and long names before their member

    def entries(self) -> Iterator[TarEntry]:
        while True:
            block = self._read(self._offset, _BLOCK)
            if block == _END:
                self._check_end()
                return
            if len(block) < _BLOCK:
                raise self._cut_off(block)
            header = _read_header(block)
            if header is None or header.num_bytes < 0:
                raise self._damaged(block)
            start = self._offset + _BLOCK
            try:
                if header.kind in b"xgXLK":
                    self._extend(header, start)
                    self._offset = start + _padded(header.num_bytes)
                    continue
                entry, size = self._member(header, start, block)
            except ValueError as error:
                raise self._damaged(block) from error
            self._own = {}
            self._number += 1
            if self._number > _MAX_MEMBERS:
                raise DataError("tar", expected=f"at most {_MAX_MEMBERS:,} members", found="more",
                                where=self._where)  # fmt: skip
            if entry is not None:
                self._last = entry.path
                yield entry
            self._offset += size

    def _extend(self, header: _Header, start: int) -> None:
        """Take what a header says of the next member, or of all that follow."""
        if header.num_bytes > _MAX_EXTENDED:
            raise ValueError("a PAX header without end")
        data = self._read(start, header.num_bytes)
        if len(data) < header.num_bytes:
            raise self._cut_off(b"x")
        if header.kind in b"LK":
            self._own[b"path" if header.kind == ord("L") else b"linkpath"] = data.split(b"\0")[0]
        else:
            records = self._shared if header.kind == ord("g") else self._own
            records.update(_pax_records(data))

    def _member(self, header: _Header, start: int, block: bytes) -> tuple[TarEntry | None, int]:
        """Return a member and how many bytes it takes; None for the folder that was packed."""
        extended = self._shared | self._own if self._shared else self._own
        if header.kind == ord("S"):
            more = block[482]
            while more:  # GNU's map of a sparse file
                extension = self._read(start, _BLOCK)
                if len(extension) < _BLOCK:
                    raise self._cut_off(b"x")
                more, start = extension[504], start + _BLOCK
        size = int(extended.get(b"size", header.num_bytes))
        if size < 0:
            raise ValueError("a negative size")
        entry = _make_entry(header, extended, start, size, self._where)
        size = 0 if header.kind in _NO_DATA else size
        if start + size > self._num_bytes:
            raise self._cut_off(b"x", inside=header.name if entry is None else entry.path)
        return entry, start + _padded(size) - self._offset

    def _check_end(self) -> None:
        """Check that nothing but zeros, or what is no tar, follows the end mark.

        Raises:
            DataError: If another tar follows, as ``cat a.tar b.tar`` makes them.
        """
        offset = self._offset
        while data := self._read(offset, 1 << 16):
            kept = data.lstrip(b"\0")
            if not kept:
                offset += len(data)
                continue
            offset += (len(data) - len(kept)) // _BLOCK * _BLOCK
            block = self._read(offset, _BLOCK)
            if len(block) == _BLOCK and _read_header(block) is not None:
                raise DataError(
                    "tar", expected="one", found=f"another behind its end, at byte {offset:,}",
                    where=self._where, hint="Programs see the first alone: make two files of it",
                )  # fmt: skip
            return

    def _cut_off(self, block: bytes, *, inside: str | None = None) -> DataError:
        if self._number == 0 and inside is None and not block:
            found = f"{self._num_bytes:,} bytes, none of them a member"
            return DataError("tar", expected="a tar", found=found, where=self._where)
        if self._number == 0 and inside is None and self._offset == 0:
            return self._damaged(block)
        place = f"after {count(self._number, 'member')}, the last of them {self._last!r}"
        if inside is not None:
            place = f"in {inside!r}, after {count(self._number, 'whole member')}"
        hint = "Copy or download it again"
        if not block and inside is None:
            hint += f". If it is whole but for its end mark: truncate -s +1024 {self._where}"
        return DataError(
            "tar", expected="a whole tar", found=f"one cut off {place}", where=self._where,
            hint=hint,
        )  # fmt: skip

    def _damaged(self, block: bytes) -> DataError:
        if self._offset:
            found = f"a damaged header at byte {self._offset:,}, after {self._number:,} members"
            return DataError(
                "tar", expected="a whole tar", found=found, where=self._where,
                hint="Copy or download it again",
            )  # fmt: skip
        for mark, (name, command) in _COMPRESSED.items():
            if block.startswith(mark):
                return DataError(
                    "tar", expected="a plain one: its members are read in place",
                    found=f"one compressed by {name}", where=self._where,
                    hint=f"Unpack the tar from it once: {command} {self._where}",
                )  # fmt: skip
        return DataError("tar", expected="a tar", found="another kind of file", where=self._where)


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
        if stated != total:  # some old programs took bytes for signed
            signed = total - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
            if stated != signed:
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
        value, bits = int.from_bytes(field, "big"), 8 * len(field)
        return value - (1 << bits) if field[0] == 0xFF else value - (1 << bits - 1)
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


_USED = {b"path", b"linkpath", b"size", b"mtime", b"GNU.sparse.name"}


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """Return the records ``LENGTH KEY=VALUE`` of a PAX header that are of use.

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
        if key in _USED:
            records[key] = value
        elif key.startswith(b"GNU.sparse."):
            records[b"GNU.sparse."] = value
        start += length
    return records


def _make_entry(
    header: _Header, extended: Mapping[bytes, bytes], start: int, size: int, where: str
) -> TarEntry | None:
    """Return the entry of a header and what was said before it; None for the folder packed."""
    name, link = header.name, header.link
    mtime_ns, kind = header.mtime * 10**9, _KINDS.get(header.kind, "other")
    if extended:
        if b"path" in extended:
            name = extended[b"path"].decode("utf-8", "surrogateescape")
        if b"mtime" in extended:
            mtime_ns = _nanoseconds(extended[b"mtime"])
        link = extended.get(b"linkpath", link)
        if any(key.startswith(b"GNU.sparse.") for key in extended):
            kind = "sparse"
            name = extended.get(b"GNU.sparse.name", name.encode("utf-8", "surrogateescape")).decode(
                "utf-8", "surrogateescape"
            )
    if fault := find_fault(name):
        raise DataError(
            "tar member", expected="a name without NUL", found=fault, where=where,
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
    return TarEntry(path, kind, start, size, mtime_ns, target)


def _nanoseconds(text: bytes) -> int:
    match = re.fullmatch(rb"(-?)(\d{1,12})(?:\.(\d*))?", text)
    if match is None:
        raise ValueError("a time")
    sign, whole, fraction = match.groups()
    value = int(whole) * 10**9 + int((fraction or b"")[:9].ljust(9, b"0"))
    return -value if sign else value
