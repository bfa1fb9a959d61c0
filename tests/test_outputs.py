"""What may be written over: files and folders of one's own kind, and nothing else."""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
import threading
from pathlib import Path

import pytest

from featcache import files, outputs
from featcache.errors import CacheError, ConfigError, RunError
from featcache.outputs import Kind, Output, csv_kind, write_output, write_outputs

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links, pipes and flock of POSIX")

TABLE = csv_kind("CSV", ("path", "pred"), ("path", "preds"), ends=("failure",))
HEADER = b"path,pred,prob_a,prob_b,failure\n"
ANY = Kind("thing", "a new file", RunError)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# --- files


def table(path: Path, *inputs: Path) -> Output:
    return Output(path, "--csv", TABLE, inputs=inputs)


@pytest.mark.usefixtures("renames")
def test_a_csv_of_the_same_columns_is_replaced_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for old in (None, HEADER + b"x,a,1,0,\n", b"path,preds,prob_z,failure\n", b""):
        if old is not None:
            path.write_bytes(old)
            path.chmod(0o600)
        write_output(table(path), HEADER)
        assert path.read_bytes() == HEADER
        assert old is None or stat.S_IMODE(path.stat().st_mode) == 0o600
        assert names(tmp_path) == ["a.csv"]


@pytest.mark.parametrize(
    "content",
    [b"years of work", b"\x89PNG\r\n", b"path,pred\nx,a\n", b"path,pred,prob_a\nx,a,1\n",
     HEADER[:-1], b"path,pred,prob_a,note,failure\n", b"path,pred,prob_a,failure,note\n",
     b"\n" + HEADER],
)  # fmt: skip
@pytest.mark.usefixtures("renames")
def test_any_other_file_is_refused_and_stays(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    output = table(path)
    for act in (output.check, lambda: write_output(output, HEADER)):
        with pytest.raises(ConfigError, match=r"^--csv: .*something that is no CSV .*a\.csv"):
            act()
    assert path.read_bytes() == content
    assert names(tmp_path) == ["a.csv"]


@pytest.mark.usefixtures("renames")
def test_what_came_while_it_worked_stays_whatever_it_is(tmp_path: Path) -> None:
    """Even a file of the right kind: whoever made it did not ask for ours."""
    path = tmp_path / "a.csv"
    for old, new in ((None, b"mine"), (None, HEADER), (HEADER, HEADER + b"mine,a,1,0,\n")):
        if old is not None:
            path.write_bytes(old)
        output = table(path)
        output.check()
        path.write_bytes(new)
        with pytest.raises(ConfigError, match=r"in the meantime|no CSV"):
            write_output(output, HEADER)
        assert path.read_bytes() == new
        assert names(tmp_path) == ["a.csv"]
        path.unlink()


def test_what_came_between_check_and_rename_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last instant: it comes when the check has passed and the names are exchanged."""
    path = tmp_path / "a.csv"
    path.write_bytes(HEADER)
    output, real = table(path), outputs.exchange

    def late(one: Path, other: Path) -> bool:
        monkeypatch.setattr(outputs, "exchange", real)
        path.unlink()
        path.write_bytes(b"mine")
        return real(one, other)

    monkeypatch.setattr(outputs, "exchange", late)
    with pytest.raises(ConfigError, match="in the meantime"):
        write_output(output, b"new")
    assert path.read_bytes() == b"mine"
    assert names(tmp_path) == ["a.csv"]


@pytest.mark.usefixtures("renames")
def test_a_link_is_followed_and_the_temporary_file_stands_beside_its_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "far").mkdir()
    real, link = tmp_path / "far" / "real.csv", tmp_path / "a.csv"
    link.symlink_to("far/real.csv")
    places: list[Path] = []
    create = files._create

    def noting(temporary: Path, *, like: Path) -> object:
        places.append(temporary.parent)
        return create(temporary, like=like)

    monkeypatch.setattr(files, "_create", noting)
    for _ in range(2):  # dangling at first
        write_output(table(link), HEADER)
        assert link.is_symlink()
        assert real.read_bytes() == HEADER
    assert places == [tmp_path / "far"] * 2


def test_an_input_is_refused_by_whatever_name(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_bytes(HEADER)  # of the right kind, and yet
    (tmp_path / "link").symlink_to("in.csv")
    os.link(source, tmp_path / "hard")
    for name in ("in.csv", "link", "hard"):
        with pytest.raises(ConfigError, match="another file than those that are read"):
            table(tmp_path / name, source).check()
    assert source.read_bytes() == HEADER


@pytest.mark.parametrize(
    ("place", "said"),
    [("no/a.csv", "no such folder"), ("folder", "something that is no CSV"),
     ("file/a.csv", "Not a directory"), ("x" * 256, "File name too long")],
)  # fmt: skip
def test_places_where_no_file_can_be_are_one_line(tmp_path: Path, place: str, said: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"^--csv: .*found {said}.*{re.escape(place)}"):
        table(tmp_path / place).check()


def test_pipes_are_written_into(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        read: list[bytes] = []
        reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))  # noqa: B023
        reader.start()
        write_output(table(tmp_path / name), HEADER)
        reader.join()
        assert read == [HEADER]
        assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert names(tmp_path) == ["link", "pipe"]


def test_devices_are_written_into_and_full_ones_are_one_line() -> None:
    write_output(table(Path("/dev/null")), HEADER)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)  # noqa: PTH116
    if Path("/dev/full").exists():
        with pytest.raises(CacheError, match="disk space"):
            write_output(table(Path("/dev/full")), HEADER)


def test_other_kinds_are_not_written_into_pipes_and_devices(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(RunError):
            Output(path, "export", ANY).check()


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_standard_output_is_written_to_wherever_it_goes(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--csv /dev/stdout > FILE`` must neither replace FILE nor write over its lines."""
    code = "import sys; from pathlib import Path; import featcache.outputs as o\n"
    code += "k = o.csv_kind('CSV', ('path',)); out = o.Output('/dev/stdout', '--csv', k)\n"
    code += "out.check(); print('first'); o.write_output(out, b'second\\n'); print('third')"
    import subprocess

    with (tmp_path / "out").open("wb") as file:
        where = file if kind == "file" else subprocess.PIPE
        done = subprocess.run([sys.executable, "-c", code], stdout=where, check=True)
    said = (tmp_path / "out").read_bytes() if kind == "file" else done.stdout
    assert said == b"first\nsecond\nthird\n"


# --- several files


@pytest.mark.usefixtures("renames")
def test_files_that_are_written_together_are_all_there_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = table(tmp_path / "old"), table(tmp_path / "new")
    old.target.write_bytes(HEADER)
    write_outputs({table(tmp_path / "old"): HEADER + b"2", new: b"3"})
    assert (old.target.read_bytes(), new.target.read_bytes()) == (HEADER + b"2", b"3")
    new.target.unlink()

    def full(handle: int, calls: list[int] = []) -> None:  # noqa: B006 (counts the calls)
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CacheError, match="disk space: expected 2 bytes"):
        write_outputs({table(tmp_path / "old"): b"4", table(tmp_path / "new"): b"5"})
    assert names(tmp_path) == ["old"]
    assert old.target.read_bytes() == HEADER + b"2"


def test_where_one_of_several_is_refused_no_new_one_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = outputs.rename_new

    def late(source: Path, target: Path) -> None:
        if target.name == "b":
            target.write_bytes(b"mine")
        real(source, target)

    monkeypatch.setattr(outputs, "rename_new", late)
    with pytest.raises(RunError, match=r"in the meantime .*/b\)"):
        write_outputs({Output(tmp_path / n, "export", ANY): b"x" for n in "ab"})
    assert names(tmp_path) == ["b"]
    assert (tmp_path / "b").read_bytes() == b"mine"
