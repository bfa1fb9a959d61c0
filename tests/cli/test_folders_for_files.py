"""A folder where a cache or a run is wanted: the one line names what is in the folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import TINY, assert_one_line_error
from sample_decisions import SMALL
from sample_images import write_tree
from sample_rows import make_cache

from featcache.heads.training import train
from featcache.sweeps.crossval import crossval

VERBS = (
    ("audit", "sizes"), ("verify", "sizes"), ("verify", "sizes", "--repair"), ("info", "sizes"),
    ("select", "sizes", "new.h5"), ("neighbours", "sizes", "0.png"),
    ("extract", "data", "sizes", *TINY),
)  # fmt: skip


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_a_folder_of_caches_is_not_made_again_but_one_of_them_named(
    run: Any, tmp_path: Path, verb: tuple[str, ...]
) -> None:
    (tmp_path / "sizes").mkdir()
    for name in ("32", "48"):
        make_cache(tmp_path / "sizes" / f"{name}.h5")
    write_tree(tmp_path / "data", {"train": 2})
    done = run(*verb)
    assert_one_line_error(done, "found a folder", "Name one of its caches: sizes/32.h5, sizes/48.")
    assert "Make it with" not in done.err


def test_of_one_cache_it_is_named_and_of_a_run_its_cache(run: Any, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    make_cache(tmp_path / "one" / "c.h5")
    assert_one_line_error(run("audit", "one"), "(one). Name one/c.h5.")
    train(tmp_path / "one" / "c.h5", tmp_path / "run", valid_fraction=0.25, **SMALL)
    assert_one_line_error(run("audit", "run"), "It is a run: name the cache that it was trained on")
    (tmp_path / "empty").mkdir()
    assert_one_line_error(run("audit", "empty"), "found a folder (empty). Make it with featcache")


def test_a_folder_of_crossval_is_no_run_but_has_one(run: Any, tmp_path: Path) -> None:
    make_cache(tmp_path / "c.h5")
    crossval(tmp_path / "c.h5", tmp_path / "f", folds=2, keep_ensemble=True, **SMALL)
    wish = ("--positive", "covid", "--recall", 0.5)
    done = run("decide", "f", "--on", "f", *wish)
    assert_one_line_error(done, "It is of a cross-validation: name its run, f/ensemble.")
    done = run("decide", "f/ensemble", "--on", "f/ensemble", *wish)
    assert_one_line_error(done, "Name the folder of the cross-validation: f.")
    assert run("decide", "f/ensemble", "--on", "f", *wish).code == 0
    shutil.rmtree(tmp_path / "f" / "ensemble")
    for verb in (("evaluate", "f"), ("predict", "f", "--cache", "c.h5"), ("export", "f", "x.pt")):
        assert_one_line_error(run(*verb), "without --keep-ensemble", "repeat crossval with it")


def test_a_cache_a_file_and_nothing_are_no_runs(run: Any, tmp_path: Path) -> None:
    make_cache(tmp_path / "c.h5")
    (tmp_path / "note.txt").write_text("no run")
    for name, found in (
        ("c.h5", "found a cache, which is one file"), ("note.txt", "found a file (note.txt)"),
        ("none", "found nothing"), (".", "found a folder without it"),
    ):  # fmt: skip
        assert_one_line_error(run("evaluate", name), f"expected a folder with run.json, {found}")


def test_where_a_cache_has_moved_the_hint_is_an_option_that_there_is(
    run: Any, tmp_path: Path
) -> None:
    make_cache(tmp_path / "c.h5")
    train(tmp_path / "c.h5", tmp_path / "r", **SMALL)
    (tmp_path / "c.h5").rename(tmp_path / "d.h5")
    assert_one_line_error(run("report", "r"), "Put it back")
    assert run("evaluate", "r", "--cache", "d.h5").code == 0
    assert "Choose from: mlflow, tensorboard" in run("log", "r").err
