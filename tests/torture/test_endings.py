"""Every verb ended by SIGINT, SIGTERM and SIGHUP at ten moments: what it says is true.

A moment is the n-th call of a function of featcache. What is said is one line, and then the same
command finishes, or the line says that its output is whole.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from children import TINY, Result, names, wait_for, warm_parent
from sample_images import write_tree
from sample_sweeps import SPACE

from featcache.cli.ending import TRAINING_NAME
from featcache.heads.resuming import STATE_NAME

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
BACKBONE = TINY[:2]
TRAIN = ("train", "c.h5", "new", "--epochs", 4, "--hidden", 8, "--device", "cpu")
COMMANDS: dict[str, tuple[object, ...]] = {
    "split": ("split", "data/train", "new"),
    "extract": ("extract", "data", "new.h5", *TINY),
    "select": ("select", "c.h5", "new.h5", "--classes", "covid,normal"),
    "info": ("info", "c.h5"),
    "verify": ("verify", "c.h5", "--data", "data", *BACKBONE),
    "audit": ("audit", "c.h5", "--csv", "new.csv"),
    "train": TRAIN,
    "sweep": (
        "sweep", "c.h5", "new", "--trials", 3, "--space", "s.toml", "--repeats", 2, "--device",
        "cpu",
    ),
    "crossval": (
        "crossval", "c.h5", "new", "--folds", 3, "--epochs", 4, "--hidden", 8, "--device", "cpu",
    ),
    "decide": ("decide", "run", "--positive", "covid", "--recall", "0.5"),
    "evaluate": ("evaluate", "run", "--csv", "new.csv"),
    "predict": ("predict", "run", "data/test", *BACKBONE, "--csv", "new.csv"),
    "export": ("export", "run", "new.pt", *BACKBONE),
    "report": ("report", "run", "new.html"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        write_tree(made / "data", {"train": 12, "valid": 6, "test": 4})
        (made / "s.toml").write_text(SPACE, "utf-8")
        for command in (
            ("extract", "data", "c.h5", *TINY),
            ("train", "c.h5", "run", "--epochs", 2, "--hidden", "none", "--device", "cpu"),
        ):
            result = warm_parent().run(*command, cwd=made)
            assert result.code == 0, result
        yield made


@pytest.fixture
def place(folder: Path) -> Path:
    """The folder without what earlier tests made."""
    for name in names(folder) - {"data", "s.toml", "c.h5", "run"}:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def clear(place: Path, before: set[str]) -> None:
    for name in names(place) - before:
        path = place / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def assert_true(place: Path, verb: str, result: Result, before: set[str]) -> str:
    """Check what an interrupted command said; return what became of it, for the tally."""
    assert "Traceback" not in result.err, result
    said = [line for line in result.err.splitlines() if line and not line.startswith("warning: ")]
    assert len(said) == 1, result
    assert said[0].startswith("interrupted: "), result
    if "nothing is kept" in said[0]:
        # a sweep's has the first line of its journal
        assert names(place) - before <= {"new.sweep", "new.h5.partial"}, result
    if "is whole" in said[0]:
        assert names(place) > before, result
        return "whole"
    assert "the same command" in said[0], result
    again = warm_parent().run(*COMMANDS[verb], cwd=place)
    assert again.code == 0, (result, again)
    assert not [name for name in names(place) if name.endswith((".partial", ".sweep"))]
    return "finished by the same command"


@pytest.mark.parametrize("verb", COMMANDS)
def test_interrupted_at_any_moment_it_says_what_is_true(
    place: Path, verb: str, rounds: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    before, calls = names(place), place / "calls"
    whole = warm_parent().run(*COMMANDS[verb], cwd=place, before=(("at_moment", 0, calls),))
    assert whole.code == 0, whole
    num_calls = int(calls.read_text("ascii"))
    number_of_verb = list(COMMANDS).index(verb)
    for number in SIGNALS if rounds(1, 3) == 3 else [SIGNALS[number_of_verb % 3]]:
        for moment in range(10) if rounds(1, 10) == 10 else [3 + number_of_verb % 5]:
            clear(place, before)
            call = 1 + moment * (num_calls - 1) // 9
            when = ("at_moment", call, number.name)
            result = warm_parent().run(*COMMANDS[verb], cwd=place, before=(when,))
            if result.code == 0:  # it had ended, and said so
                assert "interrupted" not in result.err, (call, result)
                tally(f"{verb} interrupted", "had ended")
                continue
            assert result.code == 128 + number, (call, result)
            tally(f"{verb} interrupted", assert_true(place, verb, result, before))


STUCK: dict[str, tuple[str, str]] = {
    "split": ("featcache.data.split_outputs", "_place"),
    "extract": ("featcache.extraction.work", "write_shard"),
    "select": ("featcache.cache.selection", "write_rows"),
    "verify": ("featcache.extraction.verification", "_check_whole"),
    "audit": ("featcache.evaluation.auditing.audit", "find_near"),
    "train": ("featcache.heads.group", "HeadGroup.train_epoch"),
    "sweep": ("featcache.heads.group", "HeadGroup.train_epoch"),  # in threads
    "crossval": ("featcache.heads.group", "HeadGroup.train_epoch"),
    "decide": ("featcache.evaluation.predicted_rows", "predict_probs"),
    "evaluate": ("featcache.evaluation.predicted_rows", "predict_probs"),
    "predict": ("featcache.deployment.classifier", "build_engine"),
    "export": ("featcache.deployment.exporting.export", "load_classifier"),
    "report": ("featcache.evaluation.predicted_rows", "predict_probs"),
}


@pytest.mark.parametrize("verb", STUCK)
def test_stuck_where_no_signal_reaches_it_ends_all_the_same(
    place: Path, verb: str, tally: Callable[..., None]
) -> None:
    reached = place.parent / f"{place.name}.reached"
    reached.unlink(missing_ok=True)
    before = names(place)
    number = SIGNALS[list(COMMANDS).index(verb) % 3]
    stuck = ("stuck", *STUCK[verb], reached)
    child = warm_parent().start(*COMMANDS[verb], cwd=place, before=(stuck,))
    assert wait_for(reached.exists, child), child.wait()
    reached.unlink()
    child.kill(number)
    result = child.wait()
    assert result.code == 128 + number, result
    said = [line for line in result.err.splitlines() if line and not line.startswith("warning: ")]
    assert len(said) == 1, result
    assert said[0].startswith("interrupted: "), result
    again = warm_parent().run(*COMMANDS[verb], cwd=place)
    assert again.code == 0, (result, again)
    left = names(place) - before
    assert not [name for name in left if name.endswith((".partial", ".sweep", ".tmp"))]
    tally("stuck", f"{verb} ended by the watchdog")


@pytest.mark.skipif(sys.platform != "linux", reason="kills by Linux's /proc")
@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGKILL])
def test_a_training_killed_at_any_epoch_ends_equal(
    place: Path, number: signal.Signals, rounds: Callable[[int, int], int]
) -> None:
    """The signal comes at a call that writes, renames or syncs what is in RUN.partial."""
    whole = warm_parent().run(*TRAIN, cwd=place, before=(("save_each_epoch",),))
    assert whole.code == 0, whole
    wanted = (place / "new" / "head.safetensors").read_bytes()
    shutil.rmtree(place / "new")
    counting = ("at_call", place / "new", 0, place / "calls")
    counted = warm_parent().run(*TRAIN, cwd=place, before=(("save_each_epoch",), counting))
    assert counted.code == 0, counted
    num_calls, before = int((place / "calls").read_text("ascii")), names(place) - {"new"}
    num_resumed = 0
    for i in range(rounds(3, num_calls)):
        clear(place, before)
        call = 1 + i * num_calls // rounds(3, num_calls)
        deadly = ("at_call", place / "new", call, number.name)
        killed = warm_parent().run(*TRAIN, cwd=place, before=(("save_each_epoch",), deadly))
        assert killed.code in {-number, 128 + number}, killed
        if (place / "new").exists():
            assert number == signal.SIGKILL or "is whole" in killed.err, killed
        else:
            again = warm_parent().run(*TRAIN, cwd=place)
            assert again.code == 0, again
            num_resumed += "going on after epoch" in again.out
        assert (place / "new" / "head.safetensors").read_bytes() == wanted
    assert num_resumed, "no training went on"


def test_what_the_command_line_calls_it() -> None:
    assert TRAINING_NAME == STATE_NAME


def test_under_nohup_a_closed_terminal_changes_nothing(place: Path) -> None:
    ignoring: Any = ("ignore", "SIGHUP")
    when = ("at_moment", 20, "SIGHUP")
    result = warm_parent().run(*COMMANDS["info"], cwd=place, before=(ignoring, when))
    assert (result.code, result.err) == (0, "")
