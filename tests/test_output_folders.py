"""Folders that are made whole or not at all, under a lock, and what may be replaced by them."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from featcache import outputs
from featcache.errors import FeatcacheError, RunError
from featcache.heads.run_writing import RUN
from featcache.locking import writer_lock
from featcache.output_folders import check_folder, new_folder
from featcache.outputs import Output

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links, pipes and flock of POSIX")

OURS = '{"format": "featcache-run"}'


class Boom(BaseException):
    """Not even an Exception: what Ctrl-C is."""


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def run_output(path: Path, *, overwrite: bool = False, inputs: tuple[Path, ...] = ()) -> Output:
    return Output(path, "output folder", RUN, replace=overwrite, inputs=inputs)


def make_run(path: Path, text: str = OURS) -> Path:
    with new_folder(run_output(path)) as partial:
        (partial / "run.json").write_text(text)
        (partial / "evaluation").mkdir()
        (partial / "evaluation" / "test.json").write_bytes(b"b")
    return path


def fill(
    path: Path, *, overwrite: bool = True, error: BaseException | None = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> None:  # fmt: skip
    with new_folder(run_output(path, overwrite=overwrite)) as partial:
        (partial / "run.json").write_text("new")
        meanwhile()
        if error:
            raise error


def content(path: Path) -> str:
    return (path / "run.json").read_text()


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    with new_folder(run_output(path)) as partial:
        (partial / "run.json").write_text("{}")
        assert not path.exists()
    assert names(path) == ["run.json"]
    assert names(path.parent) == ["run"]


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), Boom()])
@pytest.mark.parametrize("exists", [False, True])
def test_an_exception_leaves_what_was_there(
    tmp_path: Path, error: BaseException, exists: bool
) -> None:
    if exists:
        make_run(tmp_path / "run")
    with pytest.raises(type(error)):
        fill(tmp_path / "run", error=error)
    assert names(tmp_path) == ["run"] * exists
    assert not exists or content(tmp_path / "run") == OURS


@pytest.mark.usefixtures("renames")
def test_overwriting_replaces_a_run_and_nothing_of_it_stays(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    path.chmod(0o700)
    (path / "run.json").chmod(0o600)
    with new_folder(run_output(path, overwrite=True)) as partial:
        (partial / "run.json").write_text("new")
        assert content(path) == OURS, "the old run serves until the end"
    assert names(path) == ["run.json"]
    assert content(path) == "new"
    assert names(tmp_path) == ["run"]
    modes = [stat.S_IMODE(p.stat().st_mode) for p in (path, path / "run.json")]
    assert modes == [0o700, 0o600]


@pytest.mark.parametrize("call", ["rename_new", "exchange"])
def test_a_rename_that_fails_while_overwriting_keeps_the_old_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = make_run(tmp_path / "run")

    def fail(*_: object) -> None:
        raise PermissionError(errno.EACCES, "an antivirus holds it open")

    monkeypatch.setattr(outputs, call, fail)
    with pytest.raises(FeatcacheError, match="antivirus"):
        fill(path)
    assert content(path) == OURS
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("after", [1, 2])
def test_an_interruption_between_two_renames_keeps_the_old_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Where names cannot be exchanged the old run is away for an instant."""
    path, real, calls = make_run(tmp_path / "run"), outputs.rename_new, list[Path]()

    def interrupted(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == after + 1:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(outputs, "exchange", lambda *_: False)
    monkeypatch.setattr(outputs, "rename_new", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(path)
    assert content(path) == OURS
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("is_away", [False, True])
def test_what_a_killed_writer_left_is_cleared_away_or_put_back(
    tmp_path: Path, is_away: bool
) -> None:
    path, partial = make_run(tmp_path / "run"), tmp_path / "run.partial"
    (partial / "new").mkdir(parents=True)
    (partial / "lock").write_text("process 7 on this since then")
    (partial / "new" / "half").write_text("x")
    if is_away:  # killed between two renames
        path.rename(partial / "old")
        with pytest.raises(RunError, match="--overwrite"):
            fill(path, overwrite=False)
        assert content(path) == OURS
    else:
        fill(path)
        assert content(path) == "new"
    assert names(tmp_path) == ["run"]


def test_state_is_kept_for_the_same_command_and_removed_at_the_end(tmp_path: Path) -> None:
    output, state = run_output(tmp_path / "run"), tmp_path / "run.partial" / "state"

    def fail() -> None:
        with new_folder(output, state=["state"]) as partial:
            (partial.parent / "state").write_text("epoch 5")
            raise Boom

    with pytest.raises(Boom):
        fail()
    assert names(tmp_path / "run.partial") == ["lock", "state"]
    with new_folder(output, state=["state"]) as partial:
        assert state.read_text() == "epoch 5"
        assert names(partial) == []
    assert names(tmp_path) == ["run"]


def test_an_existing_result_is_refused_before_any_work(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    with pytest.raises(RunError, match="--overwrite"), new_folder(run_output(path)):
        pytest.fail("must not begin")
    assert names(tmp_path) == ["run"]


def thesis(path: Path) -> Path:
    path.mkdir()
    (path / "chapter.tex").write_text("years of work")
    return path / "chapter.tex"


def other_json(path: Path) -> Path:
    path.mkdir()
    (path / "run.json").write_text('{"format": "mine"}')
    return path / "run.json"


def plain_file(path: Path) -> Path:
    path.write_text("years of work")
    return path


def notes_in_a_run(path: Path) -> Path:
    (make_run(path) / "notes.txt").write_text("years of work")
    return path / "notes.txt"


def link_in_a_run(path: Path) -> Path:
    (make_run(path) / "evaluation" / "valid.json").symlink_to("test.json")
    return path / "evaluation" / "valid.json"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("make", [thesis, other_json, plain_file, notes_in_a_run, link_in_a_run])
def test_only_a_run_is_overwritten_and_only_with_its_own_files(
    tmp_path: Path, make: Callable[[Path], Path], overwrite: bool
) -> None:
    kept = make(tmp_path / "run")
    before = kept.read_bytes()
    with pytest.raises(RunError, match="expected") as refused:
        fill(tmp_path / "run", overwrite=overwrite)
    if overwrite and make in {notes_in_a_run, link_in_a_run}:
        assert kept.relative_to(tmp_path / "run").as_posix() in str(refused.value)
    assert kept.read_bytes() == before
    assert names(tmp_path) == ["run"]


def test_a_run_that_holds_an_input_is_not_overwritten(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    (path / "rows.bin").write_bytes(b"x")
    output = run_output(path, overwrite=True, inputs=(path / "rows.bin",))
    with pytest.raises(RunError, match=r"another file than those that are read.*rows\.bin"):
        output.check()


@pytest.mark.usefixtures("renames")
def test_a_folder_made_while_it_worked_stays(tmp_path: Path) -> None:
    for overwrite in (False, True):
        for is_run in (False, True):
            with new_folder(run_output(tmp_path / "other")) as theirs:
                (theirs / "run.json").write_text(OURS if is_run else "dear")

            def come(other: Path = tmp_path / "other") -> None:
                other.rename(tmp_path / "run")

            with pytest.raises(RunError, match="in the meantime"):
                fill(tmp_path / "run", overwrite=overwrite, meanwhile=come)
            assert content(tmp_path / "run") in {OURS, "dear"}
            assert names(tmp_path) == ["run"]
            (tmp_path / "run" / "run.json").unlink()
            (tmp_path / "run").rmdir()


@pytest.mark.usefixtures("renames")
def test_notes_put_into_a_run_while_it_is_replaced_stay(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    with pytest.raises(RunError, match="in the meantime"):
        fill(path, meanwhile=lambda: (path / "notes.txt").write_text("years of work"))
    assert names(path) == ["evaluation", "notes.txt", "run.json"]
    assert names(tmp_path) == ["run"]


@pytest.mark.usefixtures("renames")
def test_an_empty_folder_and_a_link_to_nothing_are_filled(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("deep/real")
    for name in ("run", "link"):
        make_run(tmp_path / name)
        assert content(tmp_path / name) == OURS
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "deep") == ["real"]


@pytest.mark.usefixtures("renames")
def test_a_linked_run_is_replaced_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    real = make_run(tmp_path / "big" / "real")
    (tmp_path / "run").symlink_to(real)
    fill(tmp_path / "run")
    assert (tmp_path / "run").is_symlink()
    assert content(real) == "new"
    assert names(tmp_path) == ["big", "run"]
    assert names(tmp_path / "big") == ["real"]


@pytest.mark.parametrize("name", [".run.4242.old", "run.old", "run.partial2"])
def test_folders_beside_it_are_other_peoples(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "run.json").write_text("kept by hand")
    fill(make_run(tmp_path / "run"))
    assert (tmp_path / name / "run.json").read_text() == "kept by hand"


@pytest.mark.parametrize("kind", ["folder", "file", "link", "file called new"])
def test_somebody_elses_folder_of_the_name_is_refused_and_stays(tmp_path: Path, kind: str) -> None:
    partial = tmp_path / "run.partial"
    if kind == "file":
        partial.write_text("years of work")
    else:
        place = tmp_path / "elsewhere" if kind == "link" else partial
        place.mkdir()
        (place / ("new" if kind.endswith("new") else "letter")).write_text("dear")
        if kind == "link":
            partial.symlink_to("elsewhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FeatcacheError, match=r"^place to write run: .*found run\.partial"):
        make_run(tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_second_writer_of_a_folder_is_told_at_once(tmp_path: Path) -> None:
    with writer_lock(tmp_path / "run.partial" / "lock", "run"):
        for begin in (fill, lambda path: check_folder(run_output(path))):
            with pytest.raises(FeatcacheError, match=f"one at work: process {os.getpid()}"):
                begin(tmp_path / "run")
        assert not (tmp_path / "run").exists()
