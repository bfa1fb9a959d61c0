"""Every kind of run has a page: solved heads, means of heads, several labels, several caches."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_rows import make_cache

import featcache


def quiet(_: str) -> None:
    pass


QUIET: dict[str, Any] = {"say": quiet, "progress": False}
SPLITS = ("train", "valid", "test")


def write(path: Path, *, labels: bool = False, backbone: str = "b") -> Path:
    """Write a cache of four classes, or of three labels of which one is unknown."""
    rng = np.random.default_rng(0)
    features = {name: rng.normal(size=(40, 6)).astype("f4") for name in SPLITS}
    targets: dict[str, Any] = {
        name: (rows[:, :3] > 0).astype("f4") if labels else rows[:, :4].argmax(axis=1)
        for name, rows in features.items()
    }
    if labels:
        targets["valid"][0, 0] = np.nan
    featcache.write_cache(
        path, features, targets, {name: [f"{name}/{i:03}" for i in range(40)] for name in SPLITS},
        classes=["a", "b", "c", "d"][: 4 - labels], identity={"backbone": backbone},
    )  # fmt: skip
    return path


def report(run: Path, **options: Any) -> tuple[featcache.ReportSummary, str]:
    summary = featcache.report(run, say=quiet, **options)
    return summary, summary.file.read_text("utf-8")


@pytest.mark.parametrize("positive", [None, "b"])
def test_a_head_that_was_solved_for(tmp_path: Path, positive: str | None) -> None:
    run = tmp_path / "run"
    featcache.train(write(tmp_path / "c.h5"), run, hidden=(), optimizer="lbfgs", **QUIET)
    summary, page = report(run, positive=positive)
    assert (summary.num_valid, summary.num_test) == (40, 40)
    assert "There are no losses by epoch to draw" in page
    assert ('id="slider"' in page) == (positive is not None)
    assert ('data-pair="' in page) == (positive is None)
    if positive is None:  # a cell without an image has nothing to choose
        assert '<td class="cell">0</td>' in page
        assert ">0</button>" not in page


def test_the_hold_out_stands_in_for_a_split_valid(tmp_path: Path) -> None:
    make_cache(tmp_path / "c.h5", train=[0, 1] * 20)
    run = tmp_path / "run"
    featcache.train(
        tmp_path / "c.h5", run, hidden=(4,), epochs=2, valid_fraction=0.2, **QUIET
    )  # fmt: skip
    summary, page = report(run, positive="covid")
    assert (summary.num_valid, summary.num_test) == (8, 0)
    assert "rows of train that were held out" in page
    assert "no labelled split test" in page


@pytest.mark.parametrize("positive", [None, "a"])
def test_several_labels_an_image(tmp_path: Path, positive: str | None) -> None:
    run = tmp_path / "run"
    featcache.train(
        write(tmp_path / "c.h5", labels=True), run, hidden=(4,), epochs=2, **QUIET
    )  # fmt: skip
    _, page = report(run, positive=positive)
    with pytest.warns(featcache.FeatcacheWarning, match="chosen by"):
        evaluation = featcache.evaluate(run, split="valid", positive="a", say=quiet)
    assert f"{evaluation.calibration['log_loss']:.3f}" in page
    if positive is not None:
        found = re.search(r'"num_yes":(\d+),"num_no":(\d+)', page)
        assert found
        assert int(found[1]) + int(found[2]) == 39


def test_a_sweep_shows_its_trials_and_several_caches_their_backbones(tmp_path: Path) -> None:
    caches = [write(tmp_path / f"{name}.h5", backbone=name) for name in ("x", "y")]
    run = tmp_path / "run"
    featcache.sweep(caches, run, trials=2, repeats=2, **QUIET)
    _, page = report(run, positive="a")
    assert 'id="sweep"' in page
    assert "x + y" in page
    assert "featcache sweep x.h5 y.h5 run" in page


def test_subgroups_are_those_of_the_last_evaluation(tmp_path: Path) -> None:
    make_cache(tmp_path / "c.h5")
    run, table = tmp_path / "run", tmp_path / "sex.csv"
    featcache.train(tmp_path / "c.h5", run, hidden=(4,), epochs=1, **QUIET)
    paths = featcache.open_cache(tmp_path / "c.h5").split("valid").paths
    lines = [f"{path},{'<b>F' if i % 3 else 'M'}" for i, path in enumerate(paths)]
    table.write_text("\n".join(["path,sex", *lines]) + "\n", "utf-8")
    options: dict[str, Any] = {"by": "sex", "table": table, "split": "valid", "say": quiet}
    with pytest.warns(featcache.FeatcacheWarning, match="chosen by"):
        featcache.evaluate(run, positive="covid", **options)
    _, page = report(run, positive="covid")
    assert "By sex" in page
    assert "&lt;b&gt;F" in page
    assert "too few" in page
    assert "By sex" not in report(run, positive="normal")[1]
