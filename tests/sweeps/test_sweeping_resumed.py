"""Sweeps that were stopped, or meet another: see also tests/torture/test_killed_sweeps.py."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_rows import edited, make_cache, rows_of
from sample_sweeps import SPACE, run_files, small_cache, sweep_small

from featcache.errors import CacheError, ConfigError, DataError, RunError
from featcache.heads.group import HeadGroup
from featcache.locking import writer_lock
from featcache.sweeps import sweeping
from featcache.sweeps.sweeping import SweepSummary, sweep


@pytest.fixture
def go(tmp_path: Path) -> Callable[..., SweepSummary]:
    small_cache(tmp_path)
    return functools.partial(sweep_small, tmp_path)


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_other_files_beside_the_journal_stay(
    tmp_path: Path, go: Callable[..., SweepSummary]
) -> None:
    (tmp_path / "r.sweep").mkdir()
    (tmp_path / "r.sweep" / "mine.txt").write_text("mine")
    go(trials=2)
    assert [p.name for p in (tmp_path / "r.sweep").iterdir()] == ["mine.txt"]


def test_two_at_once_are_refused(tmp_path: Path, go: Callable[..., SweepSummary]) -> None:
    pytest.importorskip("fcntl")
    with (
        writer_lock(tmp_path / "r.sweep" / "lock", "sweep"),
        pytest.raises(CacheError, match="expected no other writer"),
    ):
        go()


def test_another_command_is_refused_by_what_differs(
    tmp_path: Path, go: Callable[..., SweepSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("featcache.sweeps.search.Search._repeat", stop)
        with pytest.raises(KeyboardInterrupt):
            go()
    for options, found in (
        ({"trials": 9}, "trials 8, found trials 9"), ({"seed": 1}, "seed 0, found seed 1"),
        ({"metric": "accuracy"}, "metric loss, found metric accuracy"),
        ({"folds": 3}, "folds null, found folds 3"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"expected the command that began it: {found}"):
            go(**options)
    (tmp_path / "s.toml").write_text(SPACE.replace("0.7", "0.6"), "utf-8")
    with pytest.raises(ConfigError, match=r"began it: space .*found space"):
        go()
    (tmp_path / "s.toml").write_text("# the same\n" + SPACE, "utf-8")
    said: list[str] = []
    assert go(say=said.append).num_trials == 8
    assert any(line.startswith("going on with what") for line in said)
    with pytest.raises(RunError, match="output folder"):
        go()


def test_another_cache_of_the_name_is_refused(
    tmp_path: Path, go: Callable[..., SweepSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("featcache.sweeps.search.Search._repeat", stop)
        with pytest.raises(KeyboardInterrupt):
            go()
    before = (tmp_path / "r.sweep" / "journal.jsonl").read_bytes()
    splits = {"train": [0, 1] * 30, "valid": [1, 0] * 12, "test": [0, 1] * 5}
    make_cache(tmp_path / "c.h5", **{k: rows_of(k, v, width=16) for k, v in splits.items()})
    with pytest.raises(ConfigError, match=r"began it: cache_sha256 \w+\.\.\., found cache_sha256"):
        go()
    assert (tmp_path / "r.sweep" / "journal.jsonl").read_bytes() == before


def test_stopped_when_the_run_is_there_it_only_tidies_up(
    tmp_path: Path, go: Callable[..., SweepSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loop ends: ``until featcache sweep ...; do :; done``."""
    with monkeypatch.context() as patch:
        patch.setattr(sweeping, "_remove_journal", stop)
        with pytest.raises(KeyboardInterrupt):
            go()
    whole = run_files(tmp_path / "r")
    with pytest.raises(RunError, match="output folder"):
        go(trials=9)
    with monkeypatch.context() as patch:
        patch.setattr("featcache.sweeps.trials.fit_heads", None)  # nothing is tried again
        summary = go()
    assert (summary.num_trials, summary.num_head_steps) == (8, 0)
    assert run_files(tmp_path / "r") == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.h5", "r", "s.toml"]
    with pytest.raises(RunError, match="output folder"):
        go()


def test_a_run_that_was_there_is_not_replaced_unasked(
    tmp_path: Path, go: Callable[..., SweepSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    go(trials=2)
    with monkeypatch.context() as patch:
        patch.setattr("featcache.sweeps.search.Search._repeat", stop)
        with pytest.raises(KeyboardInterrupt):
            go(overwrite=True)
    before = run_files(tmp_path / "r")
    with pytest.raises(RunError, match="replace it with --overwrite"):
        go()
    assert run_files(tmp_path / "r") == before
    assert go(overwrite=True).num_trials == 8


def test_a_run_made_while_the_lock_was_awaited_is_not_replaced(
    tmp_path: Path, go: Callable[..., SweepSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of one command: the second comes to the lock when the first has just ended."""
    locked = sweeping.folder_lock

    @contextlib.contextmanager
    def late(*arguments: Any) -> Iterator[None]:
        monkeypatch.setattr(sweeping, "folder_lock", locked)
        go()
        with locked(*arguments):
            yield

    made: list[Any] = []
    journal = sweeping.Journal
    monkeypatch.setattr(sweeping, "Journal", lambda *a: made.append(a) or journal(*a))
    monkeypatch.setattr(sweeping, "folder_lock", late)
    with pytest.raises(RunError, match="output folder"):
        go()
    assert len(made) == 1, "the second tried nothing"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.h5", "r", "s.toml"]


def test_a_default_that_fails_ends_the_sweep_in_its_first_round(
    tmp_path: Path, go: Callable[..., SweepSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {}
    for name in ("train", "valid"):
        signs = np.where(np.random.default_rng(0).random((60, 16)) < 0.5, -3e38, 3e38)
        rows[name] = edited(rows_of(name, [0, 1] * 30, width=16), features=signs.astype("<f4"))
    make_cache(tmp_path / "far.h5", **rows)
    with pytest.raises(DataError, match=r"training rows: expected features .* in column 0 "):
        sweep(tmp_path / "far.h5", tmp_path / "far", trials=2, device="cpu")
    make_cache(tmp_path / "c.h5", **{n: rows_of(n, [0, 1] * 30, width=16) for n in rows})
    monkeypatch.setattr(HeadGroup, "state", lambda *_: {"0.running_var": np.array([np.inf])})
    for _ in range(2):  # the second time by the journal alone
        with pytest.raises(ConfigError, match=r"the default head: expected a finite loss"):
            go(trials=70)
        assert (tmp_path / "r.sweep" / "journal.jsonl").read_bytes().count(b"\n") == 2
