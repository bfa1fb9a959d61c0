"""Progress: lines without a terminal, a bar on one and in a notebook, how far at any moment."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import types
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from command_line import on_terminal

import featcache
from featcache import progress as progress_module
from featcache.progress import Progress


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line or a drawing at every move, so that no test waits for a clock."""
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(progress_module, "BAR_AFTER_SECONDS", 0.0)


@pytest.mark.usefixtures("at_once")
def test_a_total_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (True, "json"):
        with Progress("list", "object", 0, shown=shown) as progress:
            progress.move_to(2_000)
    line, *objects = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"list: 2,000 objects, [\d,.]+ objects/s", line), line
    for facts in map(json.loads, objects):
        assert (facts["num_done"], facts["num_total"], facts["seconds_left"]) == (2000, None, None)


@pytest.mark.usefixtures("at_once")
def test_without_a_terminal_it_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("extract", "image", 20_000, done=5_000, shown=True) as progress:
        progress.move_by(2_500, "waits for decode")
    out, err = capsys.readouterr()
    assert out == ""
    number = r"[\d,.]+"
    assert re.fullmatch(
        rf"extract: 7,500 of 20,000 images \(38%\), {number} images/s, \d+ s left, "
        r"waits for decode\n", err,
    ), err  # fmt: skip


@pytest.mark.usefixtures("at_once")
def test_for_programs_a_line_is_a_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("extract", "image", 20_000, done=5_000, shown="json") as progress:
        progress.move_by(2_500, "waits for decode")
        progress.move_by(2_500)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["num_done"] for line in lines] == [7_500, 10_000, 10_000]
    for line in lines:
        assert set(line) == {
            "time", "verb", "unit", "num_done", "num_total", "seconds", "images_per_second",
            "seconds_left", "note",
        }  # fmt: skip
        assert (line["verb"], line["num_total"]) == ("extract", 20_000)
        assert line["note"] == "waits for decode"
        assert datetime.fromisoformat(line["time"]).tzinfo is not None


def test_a_line_comes_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1_000.0]
    monkeypatch.setattr(
        progress_module, "time", types.SimpleNamespace(monotonic=lambda: now[0], time=lambda: 0.0)
    )
    with Progress("sweep", "trial", 90, shown=True) as progress:
        for second in range(300):
            now[0] = 1_000.0 + second
            progress.move_to(second / 10, "9 head-steps/s")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"sweep: {done} of 90 trials ({share}%), 6.0 trials/min, {left} left, 9 head-steps/s"
        for done, share, left in [
            (6, 7, "14 min 0 s"), (12, 13, "13 min 0 s"), (18, 20, "12 min 0 s"),
            (24, 27, "11 min 0 s"),
        ]
    ]  # fmt: skip


@pytest.mark.usefixtures("at_once")
def test_what_is_not_shown_goes_to_the_logger(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, "featcache"),
        Progress("extract", "image", 10, shown=False) as progress,
    ):
        progress.move_to(5)
    assert [record.getMessage()[:29] for record in caplog.records] == [
        "extract: 5 of 10 images (50%)"
    ]
    assert capsys.readouterr() == ("", "")


def test_quick_work_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("extract", "image", 10, shown=True) as progress:
        progress.move_to(10)
    assert capsys.readouterr() == ("", "")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class _Notebook(io.StringIO):
    __module__ = "ipykernel.iostream"


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("kind", [_Terminal, _Notebook])
def test_a_terminal_and_a_notebook_get_a_bar(
    kind: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = kind()
    monkeypatch.setattr(sys, "stderr", stream)
    said = list[str]()
    with Progress("train", "epoch", 4, shown=True) as progress:
        say = progress.beside(said.append)
        for step in range(8):
            progress.move_by(0.25)
            say(f"line {step}")
    drawn = stream.getvalue()
    assert "train:" in drawn
    assert "0.2/4" in drawn  # the bar moves inside an epoch
    assert "2/4" in drawn
    assert said == [f"line {step}" for step in range(8)]
    last = drawn.rsplit("\r", 2)
    assert last[-2].strip() == "", "the bar is taken away at the end"


@pytest.mark.usefixtures("at_once")
def test_a_full_standard_error_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115 (closing it fails)
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress("extract", "image", 10, shown=True) as progress:
        progress.move_to(5)
    with pytest.raises(OSError, match="No space"):
        stream.close()


def write_cache(path: Path, num_rows: int = 64) -> None:
    random = np.random.default_rng(0)
    parts = ("train", "valid", "test")
    featcache.write_cache(
        path, {part: random.normal(size=(num_rows, 8)).astype("f4") for part in parts},
        {part: np.arange(num_rows) % 2 for part in parts},
        {part: [f"{part}{i:03d}" for i in range(num_rows)] for part in parts}, classes=["a", "b"],
    )  # fmt: skip


@pytest.mark.usefixtures("at_once")
def test_train_and_sweep_move_inside_an_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cache(tmp_path / "c.h5")
    featcache.train(tmp_path / "c.h5", tmp_path / "run", hidden=(4,), epochs=2, progress=True)
    lines = capsys.readouterr().err.splitlines()
    # 64 rows in batches of 32, which are half an epoch
    assert [line.split(" epochs")[0] for line in lines] == [
        "train: 0.5 of 2", "train: 1 of 2", "train: 1.5 of 2", "train: 2 of 2"
    ]  # fmt: skip
    featcache.sweep(
        tmp_path / "c.h5", tmp_path / "best", trials=3, repeats=2, progress=True, seed=1
    )
    lines = capsys.readouterr().err.splitlines()
    trials = [line for line in lines if " of 3 trials" in line]
    repeats = [line for line in lines if " of 2 repeats" in line]
    assert len(trials) > 6
    assert trials[-1].startswith("sweep: 3 of 3 trials (100%)")
    assert len(repeats) > 6
    assert repeats[-1].startswith("sweep: 2 of 2 repeats (100%)")
    done = [float(line.split()[1]) for line in trials]
    assert done == sorted(done)
    assert any(x != int(x) for x in done)


def test_say_goes_to_the_logger_by_default(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_cache(tmp_path / "c.h5")
    with caplog.at_level(logging.INFO, "featcache"):
        featcache.train(tmp_path / "c.h5", tmp_path / "run", hidden=(4,), epochs=1)
    lines = [record.getMessage() for record in caplog.records if record.name == "featcache"]
    said = list[str]()
    featcache.train(tmp_path / "c.h5", tmp_path / "run2", hidden=(4,), epochs=1, say=said.append)
    assert lines[:-1] == said[:-1]  # the last tells the seconds


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudoterminal")
def test_the_command_draws_a_bar_on_a_terminal(tmp_path: Path) -> None:
    """A long epoch has a bar, and the lines on standard output are whole."""
    write_cache(tmp_path / "c.h5")
    code = (
        "import sys; from featcache import progress; progress.BAR_AFTER_SECONDS = 0\n"
        "from featcache.cli.main import main\n"
        "main(['train', 'c.h5', 'run', '--hidden', '4', '--epochs', '2'])\n"
    )
    shown = on_terminal(["-c", code], tmp_path, 80)
    assert "train:" in shown
    assert "/2 [" in shown
    lines = [line.rsplit("\r", 1)[-1] for line in shown.split("\r\n")]
    assert any(line.startswith("kept epoch") for line in lines), shown
