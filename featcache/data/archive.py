"""Read zip files in place: list their entries, read a member. No zip is trusted.

Names never become paths, so none can lead outside the zip. Members that lie about their size, and
decompression bombs, are refused before they take memory.

Reads: zip files, here and in stores. Writes: nothing.
"""

from __future__ import annotations

import calendar
import contextlib
import io
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from featcache.data.remote import RemoteFile
from featcache.errors import DataError, printable
from featcache.untrusted import open_regular, reading_hint

_MAX_MEMBERS = 2_000_000
_MAX_NAME, _MAX_DEPTH = 4096, 64
_MAX_RATIO = 200  # deflate cannot exceed 1032; a 16-bit TIFF of a black image reaches ~100
_RATIO_FREE_BYTES = 2**24  # members this small may have any ratio
_HEADER_BYTES = 30  # before a member's name and its bytes
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}


class Entry(NamedTuple):
    """An entry of a zip's directory.

    Args:
        path: ``/``-separated, without a leading ``./``, inside the zip.
        kind: ``file``, ``folder``, ``link`` or ``other`` (pipes, devices).
        info: The entry as ``zipfile`` gives it.
    """

    path: str
    kind: str
    info: zipfile.ZipInfo


class Member(NamedTuple):
    """Where a file lies in a zip: enough to read it without the zip's directory.

    Args:
        num_bytes: Size of the file.
        mtime_ns: Its time. The digits below the second are its CRC, so that a changed member never
            looks unchanged.
        offset: Where it begins in the zip, in bytes.
        method: Compression: ``zipfile.ZIP_STORED`` or ``ZIP_DEFLATED``.
        packed_bytes: Its compressed size.
        crc: CRC-32 of the file.
    """

    num_bytes: int
    mtime_ns: int
    offset: int
    method: int
    packed_bytes: int
    crc: int


@contextlib.contextmanager
def _open_zip(root: Path | RemoteFile, num_bytes: int = 1 << 18) -> Iterator[BinaryIO]:
    """Open a zip; one of a store to read so many bytes at once."""
    if isinstance(root, Path):
        with io.BufferedReader(open_regular(root)) as file:
            yield file
    else:
        with root.open(num_bytes) as stored:
            yield stored


def list_entries(root: Path, file: RemoteFile | None = None) -> Iterator[Entry]:
    """Yield the entries of a zip's directory, in its order.

    Args:
        root: The zip.
        file: The zip where it is in a store.

    Raises:
        DataError: If it is not a whole zip, has too many members, or a name leads outside it.
    """
    try:
        with _open_zip(file or root) as opened, zipfile.ZipFile(opened) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise DataError(
            "zip", expected="a whole zip file", found=getattr(error, "strerror", None) or error,
            where=root, hint=reading_hint(error, "") if isinstance(error, OSError) else "",
        ) from error  # fmt: skip
    if len(infos) > _MAX_MEMBERS:
        expected = f"at most {_MAX_MEMBERS:,} members"
        raise DataError("zip", expected=expected, found=f"{len(infos):,}", where=root)
    kinds = {0: "file", stat.S_IFREG: "file", stat.S_IFLNK: "link"}
    for info in infos:
        if "\0" in info.orig_filename:  # zipfile cuts the name off there
            raise DataError(
                "zip member", expected="a name without NUL", found=repr(info.orig_filename),
                where=root, hint="Do not trust this zip",
            )  # fmt: skip
        path, is_folder = safe_path(info.filename, root)
        if not path:  # "./": the folder that was packed
            continue
        kind = kinds.get(stat.S_IFMT(info.external_attr >> 16), "other")
        yield Entry(path, "folder" if is_folder else kind, info)


def safe_path(name: str, root: object, kind: str = "zip") -> tuple[str, bool]:
    """Return the plain path of a member ("" for ``./``), and whether it is a folder.

    Args:
        name: The member's name.
        root: The archive, for messages.
        kind: What the archive is: ``zip`` or ``tar``.

    Raises:
        DataError: If the name leads outside.
    """
    if kind == "zip":
        name = name.replace("\\", "/")  # written by some Windows programs
    parts = [part for part in name.split("/") if part not in {"", "."}]
    if len(name) > _MAX_NAME or len(parts) > _MAX_DEPTH:  # folders of folders take squares of it
        raise DataError(
            f"{kind} member", expected=f"a path of at most {_MAX_NAME:,} letters and {_MAX_DEPTH} "
            "folders", found=f"{len(name):,} letters, {len(parts):,} folders", where=root,
            hint=f"Do not trust this {kind}",
        )  # fmt: skip
    is_root = not parts and name.startswith(".") and name.endswith("/")
    is_inside = bool(parts) and ".." not in parts and not name.startswith("/")
    if not (is_root or is_inside) or re.match("[A-Za-z]:", name):
        raise DataError(
            f"{kind} member", expected=f"a name inside the {kind}", found=repr(name), where=root,
            hint=f"Do not trust this {kind}",
        )  # fmt: skip
    return "/".join(parts), name.endswith("/")


def locate_members(
    root: Path, entries: Iterable[Entry], *, max_bytes: int, file: RemoteFile | None = None
) -> dict[str, Member]:  # fmt: skip
    """Check some entries of a zip and return path -> ``Member``.

    Raises:
        DataError: If a member is encrypted, compressed by another method, larger than
            ``max_bytes``, or listed twice; if members overlap; or if one or all of them unpack to
            far more than their compressed size.
    """
    members: dict[str, Member] = {}
    place = printable(root)
    for path, _, info in entries:
        _check(info, place, max_bytes)
        if path in members:
            raise DataError(
                "zip member", expected="every name once", found="it twice",
                where=f"{place}: {info.filename}",
            )  # fmt: skip
        members[path] = Member(
            info.file_size, _mtime_ns(info), info.header_offset, info.compress_type,
            info.compress_size, info.CRC,
        )  # fmt: skip
    _check_apart(members, place)
    num_bytes = sum(member.num_bytes for member in members.values())
    zip_bytes = root.stat().st_size if file is None else file.num_bytes
    _check_ratio(num_bytes, zip_bytes, f"{place}: all images")
    return members


def _check(info: zipfile.ZipInfo, place: str, max_bytes: int) -> None:
    where = f"{place}: {info.filename}"
    if info.flag_bits & 0x41:
        hint = "Unpack it and scan the folder"
        raise DataError(
            "zip member", expected="no encryption", found="some", where=where, hint=hint
        )
    if info.compress_type not in _METHODS:
        found = f"method {info.compress_type}"
        raise DataError("zip member", expected="stored or deflated", found=found, where=where)
    if max(info.file_size, info.compress_size) > max_bytes:
        found = f"{info.file_size:,}"
        expected = f"at most {max_bytes:,} bytes"
        raise DataError("zip member", expected=expected, found=found, where=where)
    _check_ratio(info.file_size, info.compress_size, where)


def _check_apart(members: dict[str, Member], place: str) -> None:
    """Refuse members that overlap: so 42 kB become 5 GB whatever the ratio (Fifield, 2019)."""
    end, before = 0, ""
    for path, member in sorted(members.items(), key=lambda item: item[1].offset):
        if member.offset < end:
            raise DataError(
                "zip members", expected="apart from each other", found="two that overlap",
                where=f"{place}: {before}, {path}", hint="Do not trust this zip",
            )  # fmt: skip
        end, before = member.offset + _HEADER_BYTES + member.packed_bytes, path


def _check_ratio(num_bytes: int, packed_bytes: int, where: str) -> None:
    if num_bytes > _RATIO_FREE_BYTES and num_bytes > _MAX_RATIO * packed_bytes:
        raise DataError(
            "zip", expected=f"at most {_MAX_RATIO} times its packed size",
            found=f"{num_bytes:,} bytes in {packed_bytes:,}", where=where,
            hint="This looks like a decompression bomb",
        )  # fmt: skip


def _mtime_ns(info: zipfile.ZipInfo) -> int:
    try:
        seconds = calendar.timegm((*info.date_time, 0, 0, 0))
    except ValueError:  # month 0 and the like
        seconds = 0
    return seconds * 10**9 + info.CRC % 10**9


def read_member(root: Path | RemoteFile, member: Member) -> bytes:
    """Return the bytes of a member; takes no more memory than its stated size.

    Seeks to the offset found by ``locate_members``, which costs as much as opening a file.
    ``ZipFile`` would parse the directory again in every thread and process.

    Raises:
        OSError: If the zip cannot be read.
        ValueError: If the bytes do not match the member's size and CRC.
    """
    # Of a store with one get: what the name and the fields before the bytes take is a guess.
    with _open_zip(root, _HEADER_BYTES + 512 + member.packed_bytes) as file:
        file.seek(member.offset)
        header = file.read(_HEADER_BYTES)
        if len(header) < _HEADER_BYTES or not header.startswith(b"PK\x03\x04"):
            raise ValueError("no zip member where one was")
        file.seek(sum(struct.unpack("<HH", header[26:])), os.SEEK_CUR)
        data = file.read(member.packed_bytes)
    if member.method == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.num_bytes + 1)
        except zlib.error as error:
            raise ValueError(f"a damaged member: {error}") from error
    if len(data) != member.num_bytes or zlib.crc32(data) != member.crc:
        raise ValueError("a member that is not what the zip's directory says")
    return data


@dataclass(frozen=True)
class ZipStore:
    """Reads the images of a zip. Picklable; keeps nothing open.

    Args:
        root: The zip.
        members: Path of an image -> where it lies.
    """

    root: Path | RemoteFile
    members: dict[str, Member]

    def read(self, path: str) -> bytes:
        """Return the bytes of an image: see ``read_member``."""
        return read_member(self.root, self.members[path])

    def place_of(self, path: str) -> tuple[int, int]:
        """Return what images are sorted by to be read one after another."""
        return 0, self.members[path].offset

    def path_inside(self, path: str) -> str:
        """Return the path in the folders that were packed."""
        return path
