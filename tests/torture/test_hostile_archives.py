"""Zips made to harm: nothing outside is read or written, memory stays small, the verdict is right.

Every file that is opened is seen by an audit hook of the child.
"""

from __future__ import annotations

import re
import stat
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from bounded import GIB, command, run_bounded
from PIL import Image

from featcache.data.dataset import scan
from featcache.errors import DataError
from featcache.pixels.images import PixelRules, decode

SECRET = b"the secret beside the zip"


def png(path: Path, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40), np.uint8)
    Image.fromarray(pixels).save(path, "PNG")
    return path.read_bytes()


class Verdict(NamedTuple):
    """What becomes of a zip: refused for a reason, or the samples, each whole or failed."""

    refused: str | None
    whole: list[str]
    failed: dict[str, str]
    ignored: dict[str, int]
    opened: list[tuple[str, Any]]
    num_samples: int = 0


def judge(place: Path) -> Verdict:
    """Scan a zip and decode its images (the first 1,000 of them), as an extraction does."""
    opened: list[tuple[str, Any]] = []
    sys.addaudithook(
        lambda event, args: opened.append((str(args[0]), args[1])) if event == "open" else None
    )
    whole, failed = [], {}
    try:
        dataset = scan(place, companions="ignore")  # looking at pixels starts a process
    except DataError as error:
        return Verdict(str(error), [], {}, {}, list(opened))
    for sample in dataset.samples[:1000]:
        try:
            data = dataset.read(sample)
            assert SECRET not in data
            decode(data, PixelRules(32))
            whole.append(sample.path)
        except DataError as error:
            failed[sample.path] = str(error)
    ignored = dataset.num_ignored
    return Verdict(None, whole, failed, ignored, list(opened), len(dataset.samples))


# ------------------------------------------------------------------------------------ the zips


def fresh(folder: Path) -> tuple[zipfile.ZipFile, bytes]:
    """Begin ``z.zip`` with a good image in each of two classes."""
    archive = zipfile.ZipFile(folder / "z.zip", "w", zipfile.ZIP_DEFLATED)
    data = png(folder / "image.png")
    archive.writestr("a/good.png", data)
    archive.writestr("b/good.png", data)
    return archive, data


def named(*names: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        archive, data = fresh(folder)
        with archive:
            for name in names:
                archive.writestr(name, data)

    return build


def of_kind(kind: int, text: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        archive, _ = fresh(folder)
        with archive:
            info = zipfile.ZipInfo("a/odd.png")
            info.create_system = 3
            info.external_attr = (kind | 0o644) << 16
            archive.writestr(info, text)

    return build


def twice(folder: Path) -> None:
    archive, data = fresh(folder)
    with archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("a/good.png", data + b"another")


def bomb(folder: Path) -> None:
    archive, _ = fresh(folder)
    with archive, archive.open("a/bomb.png", "w", force_zip64=True) as member:
        for _ in range(64):
            member.write(bytes(2**20))


def many_small_bombs(folder: Path) -> None:
    archive, _ = fresh(folder)
    with archive:
        for number in range(16):
            archive.writestr(f"a/{number}.png", bytes(2**21))


def patched(field: int, layout: str, value: int) -> Callable[[Path], None]:
    """Change a field of the first entry of the directory."""

    def build(folder: Path) -> None:
        fresh(folder)[0].close()
        data = bytearray((folder / "z.zip").read_bytes())
        start = data.index(b"PK\x01\x02") + field
        data[start : start + struct.calcsize(layout)] = struct.pack(layout, value)
        (folder / "z.zip").write_bytes(data)

    return build


def nested(folder: Path) -> None:
    archive, _ = fresh(folder)
    archive.close()
    inner = (folder / "z.zip").read_bytes()
    archive, _ = fresh(folder)
    with archive:
        archive.writestr("a/inner.zip", inner)
        archive.writestr("a/inner.png", inner)


def hand_made(entries: list[tuple[str, int, int, int, int, int]], body: bytes) -> bytes:
    """Return a zip: ``body`` and a directory of (name, method, size, packed, crc, offset)."""
    directory = bytearray()
    for name, method, size, packed, crc, offset in entries:
        raw = name.encode()
        directory += struct.pack(
            "<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, method, 0, 33, crc, packed, size, len(raw),
            0, 0, 0, 0, 0, offset,
        )  # fmt: skip
        directory += raw
    num, size, start = len(entries), len(directory), len(body)
    wide = struct.pack(
        "<4sQ2H2L4Q4sLQL4s4H2LH", b"PK\x06\x06", 44, 45, 45, 0, 0, num, num, size, start,
        b"PK\x06\x07", 0, start + size, 1, b"PK\x05\x06", 0, 0, min(num, 65535), min(num, 65535),
        min(size, 2**32 - 1), min(start, 2**32 - 1), 0,
    )  # fmt: skip
    return body + bytes(directory) + wide


def local(name: str, method: int, data: bytes, packed: bytes) -> bytes:
    raw = name.encode()
    return (
        struct.pack(
            "<4s5H3L2H", b"PK\x03\x04", 20, 0, method, 0, 33, zlib.crc32(data), len(packed),
            len(data), len(raw), 0,
        )
        + raw + packed
    )  # fmt: skip


def overlapping(folder: Path) -> None:
    """Fifield's bomb in its simplest form: every entry is the same packed bytes."""
    data = bytes(2**16)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(data) + packer.flush()
    body = local("a/0.png", 8, data, packed)
    entries = [
        (f"{'ab'[n % 2]}/{n}.png", 8, len(data), len(packed), zlib.crc32(data), 0)
        for n in range(100)
    ]
    (folder / "z.zip").write_bytes(hand_made(entries, body))


def many_members(folder: Path, number: int) -> None:
    body, entries = bytearray(), []
    for n in range(number):
        name = f"{'ab'[n % 2]}/{n}.png"
        entries.append((name, 0, 0, 0, 0, len(body)))
        body += local(name, 0, b"", b"")
    (folder / "z.zip").write_bytes(hand_made(entries, bytes(body)))


def cut_directory(folder: Path) -> None:
    fresh(folder)[0].close()
    data = (folder / "z.zip").read_bytes()
    start = data.rindex(b"PK\x05\x06")
    (folder / "z.zip").write_bytes(data[: start - 30] + data[start:])


def with_nul(folder: Path) -> None:
    named("a/nul.png_.exe")(folder)
    data = (folder / "z.zip").read_bytes()
    (folder / "z.zip").write_bytes(data.replace(b"nul.png_.exe", b"nul.png\0.exe"))


GOOD = ["a/good.png", "b/good.png"]
REFUSED = {
    "path outside": (named("a/../../up.png"), "a name inside the zip"),
    "absolute": (named("/tmp/abs.png"), "a name inside the zip"),
    "drive letter": (named("C:\\win.png"), "a name inside the zip"),
    "share": (named("\\\\server\\share\\x.png"), "a name inside the zip"),
    "duplicate": (twice, "every name once"),
    "class twins": (named("A/good.png"), "more than case"),
    "bomb 1000:1": (bomb, "decompression bomb"),
    "many bombs": (many_small_bombs, "decompression bomb"),
    "encrypted": (patched(8, "<H", 1), "no encryption"),
    "size of 3 GiB": (patched(24, "<L", 3 * 2**30), "at most"),
    "overlapping": (overlapping, "apart from each other|Overlapped entries"),
    "directory cut": (cut_directory, "a whole zip file"),
    "nul in a name": (with_nul, "a name without NUL"),
}
TAKEN = {
    # build -> whole, failed: reason, ignored
    "link": (of_kind(stat.S_IFLNK, "../secret.png"), GOOD, {}, {"link": 1}),
    "device": (of_kind(stat.S_IFCHR, ""), GOOD, {}, {"not a regular file": 1}),
    "pipe": (of_kind(stat.S_IFIFO, ""), GOOD, {}, {"not a regular file": 1}),
    "file twins": (named("a/GOOD.png"), ["a/GOOD.png", *GOOD], {}, {}),
    "300 characters": (named(f"a/{'x' * 300}.png"), [*GOOD[:1], f"a/{'x' * 300}.png", GOOD[1]],
                       {}, {}),
    "nested": (nested, GOOD, {"a/inner.png": "a zip archive"}, {"not an image ending": 1}),
    "size too small": (patched(24, "<L", 10), GOOD[1:], {GOOD[0]: "directory says"}, {}),
    "size too large": (patched(24, "<L", 10**6), GOOD[1:], {GOOD[0]: "directory says"}, {}),
    "offset elsewhere": (patched(42, "<L", 7), GOOD[1:], {GOOD[0]: "no zip member"}, {}),
}  # fmt: skip


def judged(build: Callable[[Path], None], tmp_path: Path) -> Verdict:
    """Judge a zip in a child, and check that it touched nothing but the zip."""
    folder = tmp_path / "zips"
    folder.mkdir()
    build(folder)
    (folder / "image.png").unlink(missing_ok=True)
    (tmp_path / "secret.png").write_bytes(SECRET)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    ended = run_bounded(judge, folder / "z.zip")
    assert ended.error is None
    assert ended.peak_bytes < GIB
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    assert (tmp_path / "secret.png").read_bytes() == SECRET
    verdict = ended.value
    assert isinstance(verdict, Verdict)
    python = re.compile(r"\.py$|\.so$|/__pycache__/")  # imports, while it works
    # A handle, whose path was an opening of its own, is a number.
    opened = {o for o in verdict.opened if not python.search(o[0]) and not o[0].isdigit()}
    assert {path for path, _ in opened} == {str(folder / "z.zip")}
    assert {mode for _, mode in opened} <= {"r", "rb", None}
    return verdict


@pytest.mark.parametrize("kind", REFUSED)
def test_hostile_zips_are_refused(kind: str, tmp_path: Path, tally: Any) -> None:
    build, message = REFUSED[kind]
    verdict = judged(build, tmp_path)
    assert verdict.refused
    assert re.search(message, verdict.refused), verdict.refused
    assert "z.zip" in verdict.refused
    tally("hostile zip", "refused with file and reason")


@pytest.mark.parametrize("kind", TAKEN)
def test_unusual_zips_are_read_correctly(kind: str, tmp_path: Path, tally: Any) -> None:
    build, whole, failed, ignored = TAKEN[kind]
    verdict = judged(build, tmp_path)
    assert verdict.refused is None
    assert sorted(verdict.whole) == sorted(whole)
    assert verdict.failed.keys() == failed.keys()
    for path, reason in failed.items():
        assert reason in verdict.failed[path]
    assert verdict.ignored == ignored
    tally("hostile zip", "read rightly")


def test_very_many_members(tmp_path: Path, rounds: Any, tally: Any) -> None:
    number = rounds(10_000, 100_000)
    verdict = judged(lambda folder: many_members(folder, number), tmp_path)
    assert verdict.refused is None
    assert verdict.whole == []
    assert (verdict.num_samples, len(verdict.failed)) == (number, 1000)
    assert all("empty file" in reason for reason in verdict.failed.values())
    tally("hostile zip", "read rightly")


def test_the_command_says_it_in_one_line(tmp_path: Path) -> None:
    bomb(tmp_path)
    done = command(tmp_path, "extract", "z.zip", "c.h5", "--backbone", "python:tiny_network:build")
    assert (done.code, done.out) == (1, "")
    assert len(done.err.splitlines()) == 1
    assert "decompression bomb" in done.err
    assert "z.zip: a/bomb.png" in done.err
    assert not list(tmp_path.glob("c.h5*"))
