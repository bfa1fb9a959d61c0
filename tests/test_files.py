from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import secrets
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from failing import failing

from featcache import files
from featcache.errors import ConfigError
from featcache.files import (
    atomic_writer,
    canonical_json,
    follow_link,
    local_path,
    make_folder,
    readable_json,
    sha256_file,
    sync_folder,
    write_bytes,
    write_json,
)

needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="kills and fsync of folders")


class Boom(BaseException):
    """Not even an Exception: what Ctrl-C is."""


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# --- JSON and hashes


def test_equal_values_give_one_json_text() -> None:
    one = {"b": [1, 2.5, None, True], "a": {"y": "ä", "x": ()}}
    two = {"a": {"x": [], "y": "ä"}, "b": [1, 2.5, None, True]}
    assert canonical_json(one) == canonical_json(two)
    assert canonical_json(one) == '{"a":{"x":[],"y":"\\u00e4"},"b":[1,2.5,null,true]}'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_never_holds_nan(value: float) -> None:
    for write in (canonical_json, readable_json):
        with pytest.raises(ValueError, match="JSON"):
            write({"a": [value]})


def test_readable_json_is_indented_and_ends_in_a_newline(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": [1]})
    text = (tmp_path / "a.json").read_text("utf-8")
    assert text == '{\n  "b": 1,\n  "a": [1]\n}\n'
    assert json.loads(text) == {"a": [1], "b": 1}


def test_rows_of_numbers_are_lines_and_all_else_stays_as_it_is() -> None:
    value = {
        "matrix": [[1, -2.5e-7], [300, 4]], "empty": [], "texts": ["[\n  1\n]", "1", "a, 2"],
        "mixed": [1, None, "x", True], "nested": [{"a": [0.125]}, [[1]]],
    }  # fmt: skip
    text = readable_json(value)
    assert json.loads(text) == value
    assert "    [1, -2.5e-07],\n    [300, 4]\n" in text


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 5, 3 << 20])
@pytest.mark.parametrize("offset", [0, 1, 4096])
def test_the_hash_is_that_of_the_rest_of_the_file(tmp_path: Path, size: int, offset: int) -> None:
    data = random.Random(size).randbytes(size)
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f", offset) == hashlib.sha256(data[offset:]).hexdigest()


# --- files, whole or absent


def test_a_written_file_is_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for data in (b"one", b"", b"three" * 10000):
        write_bytes(path, data)
        assert path.read_bytes() == data
        assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Boom])
@pytest.mark.parametrize("old", [b"the old content", None])
def test_an_exception_leaves_what_was_there(
    tmp_path: Path, error: type[BaseException], old: bytes | None
) -> None:
    path = tmp_path / "a.bin"
    if old is not None:
        path.write_bytes(old)
    before = names(tmp_path)

    def write_half() -> None:
        with atomic_writer(path) as file:
            file.write(b"half of the new " * 100000)
            file.flush()
            assert (path.read_bytes() if old is not None else None) == old
            raise error

    with pytest.raises(error):
        write_half()
    assert names(tmp_path) == before
    if old is not None:
        assert path.read_bytes() == old


def test_a_rename_that_fails_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match=r"directory|denied"):
        write_bytes(tmp_path / "a", b"x")
    assert names(tmp_path) == ["a"]


@needs_posix
def test_data_reach_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut cannot be had in a test; the order of calls that survives one can."""
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noting_fsync(handle: int) -> None:
        calls.append("folder" if os.path.isdir(f"/dev/fd/{handle}") else "file")  # noqa: PTH112
        fsync(handle)

    def noting_replace(self: Path, target: Path) -> Path:
        calls.append("rename")
        assert self.parent == target.parent, "a rename is atomic within one folder only"
        assert self.read_bytes() == b"data", "all must be written before the rename"
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "replace", noting_replace)
    write_bytes(tmp_path / "a", b"data")
    assert calls == ["file", "rename", "folder"]


WRITE_FOR_EVER = """
import itertools, sys
from pathlib import Path
from typing import Any
from featcache.files import write_bytes
for version in itertools.count(int(sys.argv[2])):
    write_bytes(Path(sys.argv[1]), b"%08d" % version * 40000)
"""


@needs_posix
def test_twenty_kills_and_the_file_is_always_one_whole_version(tmp_path: Path) -> None:
    path, rng = tmp_path / "a.bin", random.Random(0)
    write_bytes(path, b"%08d" % 0 * 40000)
    versions = set()
    for number in range(1, 21):  # each child has versions of its own
        before = path.read_bytes()
        start = str(number * 100_000)
        child = subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, str(path), start])
        try:
            deadline = time.monotonic() + 300
            while path.read_bytes() == before and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
        finally:
            child.kill()
            assert child.wait() == -signal.SIGKILL
        data = path.read_bytes()
        assert data == data[:8] * 40000
        versions.add(data[:8])
    assert len(versions) == 20, "a child was killed before it wrote anything"


# --- folders and names


@needs_posix
def test_folders_that_are_made_survive_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    make_folder(tmp_path / "a" / "b")
    assert set(synced) == {tmp_path, tmp_path / "a"}
    synced.clear()
    make_folder(tmp_path / "a" / "b")
    assert synced == []


@needs_posix
@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF])
@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_file_system_that_syncs_no_folders_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    real = getattr(os, call)

    def fail_for_folders(what: Any, *rest: Any) -> Any:
        if stat.S_ISDIR((os.fstat if call == "fsync" else os.stat)(what).st_mode):
            raise OSError(code, os.strerror(code))
        return real(what, *rest)

    write_bytes(tmp_path / "a", b"old")
    if call == "open":  # a new file is not there yet
        monkeypatch.setattr(files, "_create", lambda path, like: path.open("xb"))
    monkeypatch.setattr(os, call, fail_for_folders)
    write_bytes(tmp_path / "a", b"x")
    make_folder(tmp_path / "b" / "c")
    assert (tmp_path / "a").read_bytes() == b"x"


@needs_posix
def test_a_folder_that_is_gone_or_a_disk_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "none")
    monkeypatch.setattr(os, "fsync", failing(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match=rf"Input/output error: '{tmp_path}'"):
        sync_folder(tmp_path)


@needs_posix
def test_modes_that_cannot_be_kept_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    for name in ("fchmod", "fchown"):  # vfat, CIFS
        monkeypatch.setattr(os, name, failing(PermissionError(errno.EPERM, "not permitted")))
    write_bytes(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


def test_an_error_of_the_disk_names_the_file_and_not_the_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match=r"Input/output error: '.*/a'$"):
        write_bytes(tmp_path / "a", b"x")
    with pytest.raises(FileNotFoundError, match=r"'.*/no/a'$"):
        write_bytes(tmp_path / "no" / "a", b"x")


@needs_posix
def test_modes_are_kept_and_new_files_follow_the_umask(tmp_path: Path) -> None:
    path, before = tmp_path / "a", os.umask(0o027)
    try:
        write_bytes(path, b"x")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        for mode in (0o600, 0o666, 0o444):
            path.chmod(mode)
            write_bytes(path, b"y")
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(before)


@needs_posix
def test_nothing_is_written_through_a_planted_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever guesses the temporary name plants a link there; it must be neither used nor gone."""
    (tmp_path / "victim").write_text("years of work")
    monkeypatch.setattr(secrets, "token_hex", lambda _: "0123456789abcdef")
    link = tmp_path / ".a.0123456789abcdef.tmp"
    link.symlink_to("victim")
    with pytest.raises(FileExistsError):
        write_bytes(tmp_path / "a", b"x")
    assert (tmp_path / "victim").read_text() == "years of work"
    assert link.is_symlink()


@pytest.mark.parametrize("url", ["s3://bucket/a", "gs://b/c.h5", "https://x.org/y.png", "HDFS://x"])
def test_a_url_is_no_path(url: str) -> None:
    for path in (url, Path(url)):
        with pytest.raises(ConfigError, match=f"^CACHE: .*found a URL, {re.escape(url)}"):
            local_path(path, "CACHE")


@pytest.mark.parametrize("path", ["a:b/c", "C:/x", "c:\\x", "data.zip:folder", "python:a:b", "s3"])
def test_other_names_with_a_colon_are_paths(path: str) -> None:
    assert local_path(path, "CACHE") == Path(path)


def test_links_in_a_circle_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ConfigError, match=r"lead in a circle .*/a\)"):
        follow_link(tmp_path / "a")
    (tmp_path / "c").symlink_to("d")
    assert follow_link(tmp_path / "c") == tmp_path.resolve() / "d"
