"""How a command ends: closed and full streams, and errors as objects for ``--json``."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import TESTS, TINY, Result, on_terminal
from failing import failing
from sample_rows import make_cache

from featcache.cache.reading import open_cache
from featcache.errors import DataError
from featcache.heads.run import load_run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="streams of a POSIX shell")

TRAIN = "train c.h5 run --epochs 2 --hidden 4 --device cpu"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_cache(tmp_path / "c.h5")
    return tmp_path


def shell(line: str, cwd: Path) -> Result:
    """Run ``featcache LINE`` by a shell, with its redirections."""
    python = shlex.quote(sys.executable)
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        f"{python} -m featcache {line}", shell=True, cwd=cwd, env=environment,
        capture_output=True, text=True, check=False, executable="/bin/bash",
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&-", "<&- >&- 2>&-"])
def test_with_closed_streams_it_works(folder: Path, closed: str) -> None:
    result = shell(f"{TRAIN} {closed}", folder)
    assert result.code == 0, result
    assert result.err == ""
    assert load_run(folder / "run").classes == ("covid", "normal")


def test_with_closed_streams_no_library_writes_into_a_cache(tree: Path, tmp_path: Path) -> None:
    result = shell(f"extract data c.h5 {' '.join(TINY)} <&- >&- 2>&-", tmp_path)
    assert result.code == 0, result
    assert open_cache(tmp_path / "c.h5").splits.keys() == {"train", "valid", "test"}


def test_with_closed_streams_an_error_is_still_an_error(folder: Path) -> None:
    assert shell("info nowhere 2>&-", folder) == Result(1, "", "")


needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@needs_full
@pytest.mark.parametrize("options", ["", "--json"])
def test_a_full_output_costs_its_lines_and_not_the_work(folder: Path, options: str) -> None:
    result = shell(f"{TRAIN} {options} >/dev/full", folder)
    assert result.code == 1
    assert result.err == (
        "error: standard output: expected room for what is printed, found No space left on device. "
        "The command has done its work; only its lines are lost.\n"
    )
    assert load_run(folder / "run").classes == ("covid", "normal")


@needs_full
def test_with_full_streams_nothing_is_lost_but_what_they_say(folder: Path) -> None:
    assert shell(f"{TRAIN} >/dev/full 2>/dev/full", folder) == Result(1, "", "")
    assert load_run(folder / "run").classes == ("covid", "normal")
    result = shell("info run 2>/dev/full", folder)
    assert (result.code, result.err) == (0, "")
    assert shell("info nowhere 2>/dev/full", folder) == Result(1, "", "")
    assert shell("info --nonsense 2>/dev/full", folder) == Result(2, "", "")


@pytest.mark.parametrize(
    "line", ["info c.h5 | head -1", "info c.h5 --json | true", "--help | true"]
)
def test_a_broken_pipe_ends_quietly(folder: Path, line: str) -> None:
    result = shell(line, folder)
    assert (result.code, result.err) == (0, "")


def test_featcache_alone_prints_its_help(run: Any) -> None:
    result = run()
    assert result.code == 2
    assert result.err.startswith("Usage: featcache [OPTIONS] COMMAND")
    assert "\\n" not in result.err
    assert "\n  extract " in result.err


@pytest.mark.parametrize(
    ("arguments", "code", "wanted"),
    [
        (["info", "nowhere"], 1, {"what": "cache", "where": "nowhere"}),
        (["train", "nowhere", "r"], 1, {"what": "cache", "where": "nowhere"}),
        (["train", "c.h5", "r", "--dropout", "2"], 1, {"found": "2.0", "where": None}),
        (["evaluate", "nowhere"], 1, {"what": "run"}),
        (["split", "nowhere", "new"], 1, {}),
        (["train", "c.h5"], 2, {"what": "usage", "found": "Missing argument 'RUN'."}),
        (["nonsense"], 2, {"what": "usage"}),
    ],
)
def test_an_error_is_an_object_on_standard_output_too(
    run: Any, folder: Path, arguments: list[str], code: int, wanted: dict[str, Any]
) -> None:
    plain, result = run(*arguments), run(*arguments, "--json")
    assert (plain.code, plain.out) == (code, "")
    assert (result.code, result.err) == (code, plain.err)
    facts = json.loads(result.out, parse_constant=pytest.fail)
    assert list(facts) == ["error"]
    assert list(facts["error"]) == ["what", "expected", "found", "where", "hint"]
    assert facts["error"].items() >= wanted.items()
    if code == 1:
        assert facts["error"]["expected"] in result.err
        assert facts["error"]["found"] in result.err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (MemoryError("no room"), 1, "error: memory: expected enough, found no room."),
        (OSError(5, "Input/output error", "c.h5"), 1, "error: reading or writing: "),
        (DataError("x", expected="\x1b[31m", found="b\udcff", where=Path("/a")), 1, "error: x:"),
        (KeyboardInterrupt(), 130, "interrupted: nothing was changed; the same command"),
    ],
)
def test_every_kind_of_end_is_one_line_and_one_object(
    run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int,
    line: str,
) -> None:  # fmt: skip
    from featcache.evaluation import info

    monkeypatch.setattr(info, "info", failing(error))
    result = run("info", "c.h5", "--json")
    assert result.code == code
    said = result.err.strip()  # click begins a new line after the terminal's ^C
    assert said.startswith(line), result
    assert len(said.splitlines()) == len(result.out.splitlines()) == 1
    assert set(json.loads(result.out)["error"]) == {"what", "expected", "found", "where", "hint"}
    assert "\x1b" not in result.out + result.err


LOUD = """
import os, sys
from tiny_network import build as quiet

def build():
    print("a line of Python", flush=True)
    os.write(1, b"a line of C\\n")
    return quiet()
"""


def test_json_is_all_that_reaches_standard_output(tree: Path, tmp_path: Path, run: Any) -> None:
    """Whatever a library prints, in Python or in C: it goes to standard error."""
    (tmp_path / "loud_network.py").write_text(LOUD)
    options = ["--backbone", "python:loud_network:build", "--json"]
    result = shell(f"extract data c.h5 {' '.join(options)}", tmp_path)
    assert "num_images" in json.loads(result.out), result
    assert "a line of Python" in result.err
    assert "a line of C" in result.err
    assert "error" in json.loads(run("extract", "nothing", "c.h5", *options).out)


@pytest.mark.parametrize("columns", [60, 80])
def test_on_a_terminal_lines_break_between_words(folder: Path, columns: int) -> None:
    """Of a long line no word is torn; in a pipe it stays one line."""
    long = "a-rather-long-name-for-a-run-" + 60 * "x"
    line = f"train c.h5 {long} --epochs 2 --hidden 4 --device cpu"
    shown = on_terminal(["-m", "featcache", *line.split()], folder, columns)
    lines = shown.split("\r\n")
    assert long in shown
    assert all(len(x) <= columns or x.strip() == long for x in lines), lines
    piped = shell(f"train c.h5 {long}2 --epochs 2 --hidden 4 --device cpu", folder)
    assert any(x.endswith(f"written to {long}2") for x in piped.out.splitlines())


def test_the_signals_of_windows_end_a_command_too() -> None:
    """There is no SIGHUP there, and Ctrl-Break is SIGBREAK; SIGUSR1 plays its part here."""
    played = "import os, signal; del signal.SIGHUP; signal.SIGBREAK = signal.SIGUSR1\n"
    played += "from featcache.cli import main; from featcache.evaluation import info\n"
    played += "info.info = lambda *_, **__: os.kill(os.getpid(), signal.SIGBREAK)\n"
    played += "main.main()"
    done = subprocess.run(
        [sys.executable, "-c", played, "info", "c.h5"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 128 + signal.SIGUSR1
    assert done.stderr.strip().startswith("interrupted: ")
