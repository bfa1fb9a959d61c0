"""Zips made to harm are refused before they take memory; of the others every byte is right."""

import random
import stat
import struct
import tracemalloc
import zipfile
import zlib

import pytest

from featcache.data.archive import list_entries, locate_members, read_member
from featcache.errors import DataError

MAX_BYTES = 2**31
METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]


def pack(place, *paths, method=zipfile.ZIP_DEFLATED):
    """Make a zip of files whose content is their own path."""
    with zipfile.ZipFile(place, "w", method) as archive:
        for path in paths:
            archive.writestr(path, "" if path.endswith("/") else path)
    return place


def patched(place, offset_in_directory, layout, value):
    """Change one field of the first member's entry in the zip's directory."""
    data = bytearray(place.read_bytes())
    start = data.index(b"PK\x01\x02") + offset_in_directory
    data[start : start + struct.calcsize(layout)] = struct.pack(layout, value)
    place.write_bytes(data)
    return place


def members_of(place, max_bytes=MAX_BYTES):
    files = [entry for entry in list_entries(place) if entry.kind == "file"]
    return locate_members(place, files, max_bytes=max_bytes)


@pytest.mark.parametrize("method", METHODS)
def test_members_read_as_zipfile_reads_them(tmp_path, method):
    generator = random.Random(0)
    with zipfile.ZipFile(tmp_path / "d.zip", "w", method) as archive:
        for number, size in enumerate((0, 1, 1000, 70_000)):
            info = zipfile.ZipInfo(f"é {number}.png", (2020, 2, 3, 4, 5, 6))
            info.extra = b"\x99\x99\x02\x00ab" * number  # where the bytes begin differs
            info.compress_type = method
            archive.writestr(info, generator.randbytes(size // 2) * 2)
    members = members_of(tmp_path / "d.zip")
    with zipfile.ZipFile(tmp_path / "d.zip") as archive:
        wanted = {name: archive.read(name) for name in archive.namelist()}
    assert {name: read_member(tmp_path / "d.zip", m) for name, m in members.items()} == wanted
    assert {name: m.num_bytes for name, m in members.items()} == {
        name: len(data) for name, data in wanted.items()
    }


def test_entries_have_plain_paths_and_kinds(tmp_path):
    pack(tmp_path / "d.zip", "./a/1.png", "b\\2.png", "c//d/", "e/./3.png")
    with zipfile.ZipFile(tmp_path / "d.zip", "a") as archive:
        for name, kind in (("l", stat.S_IFLNK), ("p", stat.S_IFIFO), ("r", stat.S_IFREG)):
            info = zipfile.ZipInfo(name)
            info.external_attr = (kind | 0o644) << 16
            archive.writestr(info, "/etc/passwd")
    assert [(entry.path, entry.kind) for entry in list_entries(tmp_path / "d.zip")] == [
        ("a/1.png", "file"), ("b/2.png", "file"), ("c/d", "folder"), ("e/3.png", "file"),
        ("l", "link"), ("p", "other"), ("r", "file"),
    ]  # fmt: skip


def test_an_entry_for_the_packed_folder_itself_is_skipped(tmp_path):
    pack(tmp_path / "d.zip", "./", "././", "a/1.png")
    assert [entry.path for entry in list_entries(tmp_path / "d.zip")] == ["a/1.png"]


@pytest.mark.parametrize(
    "name",
    ["../a.png", "a/../../b.png", "/etc/a.png", "C:/a.png", "..\\a.png", "C:\\a.png", "/", "."],
)
def test_names_that_climb_out_of_the_zip_are_refused(tmp_path, name):
    with pytest.raises(DataError, match="a name inside the zip"):
        list(list_entries(pack(tmp_path / "d.zip", "a/1.png", name)))


def test_a_name_that_stands_twice_is_refused(tmp_path):
    pack(tmp_path / "d.zip", "a/1.png", "b/1.png", "a\\1.png")  # one path by two spellings
    with pytest.raises(DataError, match="every name once"):
        members_of(tmp_path / "d.zip")


@pytest.mark.parametrize(
    ("offset", "layout", "value", "message"),
    [
        (8, "<H", 1, "no encryption"),
        (10, "<H", 14, "stored or deflated, found method 14"),
        (24, "<I", 2**31 + 1, "at most 2,147,483,648 bytes"),
        (24, "<I", 2**30, "decompression bomb"),
    ],
)
def test_members_of_unsupported_kinds_are_refused(tmp_path, offset, layout, value, message):
    place = patched(pack(tmp_path / "d.zip", "a/1.png", "b/1.png"), offset, layout, value)
    with pytest.raises(DataError, match=message):
        members_of(place)
    others = [entry for entry in list_entries(place) if entry.path == "b/1.png"]
    assert list(locate_members(place, others, max_bytes=MAX_BYTES)) == ["b/1.png"]


def test_the_limit_is_the_callers(tmp_path):
    place = pack(tmp_path / "d.zip", "a" * 100)
    assert members_of(place, max_bytes=100)
    with pytest.raises(DataError, match="at most 99 bytes, found 100"):
        members_of(place, max_bytes=99)


def test_bombs(tmp_path):
    with zipfile.ZipFile(tmp_path / "one.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(2**25))
    with pytest.raises(DataError, match=r"a\.png.*decompression bomb"):
        members_of(tmp_path / "one.zip")
    with zipfile.ZipFile(tmp_path / "many.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(20):
            archive.writestr(f"{number}.png", bytes(2**20))
    with pytest.raises(DataError, match="all images"):
        members_of(tmp_path / "many.zip")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("declared", [10, 6999, 7001, 10**6])
def test_members_that_lie_about_their_size(tmp_path, method, declared):
    with zipfile.ZipFile(tmp_path / "d.zip", "w", method) as archive:
        archive.writestr("1.png", bytes(7000))
    members = members_of(patched(tmp_path / "d.zip", 24, "<I", declared))
    with pytest.raises(ValueError, match="not what the zip's directory says"):
        read_member(tmp_path / "d.zip", members["1.png"])


def test_members_never_take_more_memory_than_they_say(tmp_path):
    with zipfile.ZipFile(tmp_path / "d.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", bytes(2**26))
    members = members_of(patched(tmp_path / "d.zip", 24, "<I", 1000))
    tracemalloc.start()
    with pytest.raises(ValueError, match="not what the zip"):
        read_member(tmp_path / "d.zip", members["1.png"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("method", METHODS)
def test_damage_never_gives_other_bytes(tmp_path, method):
    """Whatever byte of a member changes, wherever the zip ends: its bytes, or a ValueError."""
    text = "a/1.png"
    place = pack(tmp_path / "d.zip", text, method=method)
    member, whole = members_of(place)[text], place.read_bytes()
    begin, end = 30 + len(text), 30 + len(text) + member.packed_bytes

    def is_refused(data):
        place.write_bytes(data)
        try:
            assert read_member(place, member) == text.encode()
        except ValueError:
            return True
        return False

    refused = {
        position
        for position in range(end)
        if is_refused(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
    }
    sure_end = end - 2  # deflate ends in bits that say nothing more
    assert {*range(4), *range(26, 30), *range(begin, sure_end)} <= refused
    assert not refused & {*range(4, 26), *range(30, begin)}  # said in the directory, too
    assert all(is_refused(whole[:length]) for length in range(sure_end))
    place.unlink()
    with pytest.raises(FileNotFoundError):
        read_member(place, member)


def test_files_that_are_no_zip_are_refused(tmp_path):
    place = pack(tmp_path / "d.zip", "1.png")
    for data in (b"", b"PK", place.read_bytes()[:40]):
        place.write_bytes(data)
        with pytest.raises(DataError, match="a whole zip file"):
            list(list_entries(place))
    with pytest.raises(DataError, match="a whole zip file"):
        list(list_entries(tmp_path / "missing.zip"))


def test_a_zip_of_too_many_members(tmp_path, monkeypatch):
    monkeypatch.setattr("featcache.data.archive._MAX_MEMBERS", 2)
    assert len(list(list_entries(pack(tmp_path / "d.zip", "1", "2")))) == 2
    with pytest.raises(DataError, match="at most 2 members, found 3"):
        list(list_entries(pack(tmp_path / "d.zip", "1", "2", "3")))


def test_a_changed_member_never_looks_unchanged(tmp_path):
    def time_of(text, date=(2020, 2, 3, 4, 5, 6)):
        with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
            archive.writestr(zipfile.ZipInfo("1.png", date), text)
        return members_of(tmp_path / "d.zip")["1.png"].mtime_ns

    assert time_of("one") != time_of("two")
    assert time_of("one") == 1580702706 * 10**9 + zlib.crc32(b"one") % 10**9
    assert time_of("one", (2020, 0, 0, 0, 0, 0)) == zlib.crc32(b"one") % 10**9
