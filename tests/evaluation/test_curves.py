"""ROC curves, reliability and losses as pictures, and what they are drawn from."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sample_crossval import LBFGS, crossval_small
from sample_rows import make_cache, rows_of
from sklearn import metrics

import featcache
from featcache.errors import RunError
from featcache.evaluation.curve_figures import draw_losses, draw_reliability, draw_roc
from featcache.evaluation.curves import measure_reliability, roc_curves
from featcache.evaluation.deciding.decision_file import Decisions
from featcache.evaluation.history import read_histories
from featcache.evaluation.predicted_rows import PredictedRows
from featcache.heads.run import load_run
from featcache.metrics.areas import roc_curve

pytestmark = pytest.mark.usefixtures("drawn")

HOSTILE = ["$\\frac{1}", "_hidden", "x" * 300, "a\nb\x1b[31m", "\udcff肺炎", "%s{0}"]


def make_rows(classes: list[str], number: int = 120, seed: int = 0) -> PredictedRows:
    rng = np.random.default_rng(seed)
    targets = rng.permutation(np.arange(number) % len(classes))
    scores = rng.normal(size=(number, len(classes)))
    scores[np.arange(number), targets] += 1.5
    probs = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    return PredictedRows(tuple(classes), ["p"] * number, [""] * number, targets, probs.round(2))


def label_rows() -> PredictedRows:
    rng = np.random.default_rng(3)
    targets = (rng.random((80, 3)) < 0.4).astype(np.float32)
    probs = np.clip(targets * 0.4 + rng.random((80, 3)) * 0.6, 0, 1)
    targets[rng.random((80, 3)) < 0.1] = np.nan
    return PredictedRows(("a", "b", "c"), ["p"] * 80, [""] * 80, targets, probs)


def threshold(rows: PredictedRows, name: str, value: float) -> Decisions:
    rule = {"threshold": value, "temperature": None, "refer_below": None}
    return Decisions(rows.classes, "multiclass", {name: rule})


def pixels_of(png: bytes) -> Any:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("seed", range(4))
def test_corners_are_those_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    is_yes = rng.random(60) < 0.4
    scores = rng.normal(size=60).round(seed % 2 + 0) + is_yes
    alarms, recalls = roc_curve(is_yes, scores)
    wanted = metrics.roc_curve(is_yes, scores, drop_intermediate=True)
    assert metrics.auc(alarms, recalls) == pytest.approx(metrics.roc_auc_score(is_yes, scores))
    for x, y in zip(alarms, recalls, strict=True):
        assert np.isclose(wanted[0], x).any()
        assert np.isclose(wanted[1], y).any()


def test_of_two_classes_the_one_with_a_threshold_is_drawn_with_its_point() -> None:
    rows = make_rows(["covid", "normal"])
    (curve,) = roc_curves(rows, None, threshold(rows, "covid", 0.3))
    called, is_yes = rows.probs[:, 0] >= 0.3, rows.targets == 0
    assert curve.name == "covid"
    assert curve.chosen is not None
    assert curve.chosen.recall == metrics.recall_score(is_yes, called)
    assert 1 - curve.chosen.false_alarms == pytest.approx(metrics.recall_score(~is_yes, ~called))
    assert [c.name for c in roc_curves(rows, "normal", None)] == ["normal"]
    assert len(roc_curves(rows, None, None)) == 2  # none is guessed


def test_of_many_classes_the_one_looked_for_and_the_worst_are_named() -> None:
    rows = make_rows([f"class{i:02}" for i in range(40)], 800)
    curves = roc_curves(rows, "class07", None)
    named, others = curves[:6], curves[6:]
    assert named[0].name == "class07"
    assert all(curve.interval is not None for curve in named)
    assert all(curve.interval is None for curve in others)
    assert max(c.auc for c in named[1:]) <= min(c.auc for c in others)
    assert sorted(c.name for c in curves) == list(rows.classes)


def test_bins_add_up_and_their_interval_holds_the_share() -> None:
    for rows in (make_rows(["a", "b", "c"]), label_rows()):
        facts = measure_reliability(rows, None, None)
        known = len(rows.targets) if rows.targets.ndim == 1 else (~np.isnan(rows.targets)).sum()
        assert sum(point.num_samples for point in facts.points) == facts.num_samples == known
        for point in facts.points:
            assert point.interval[0] <= point.share + 1e-12
            assert point.interval[1] >= point.share - 1e-12
            assert point.low <= point.mean_prob <= point.high


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_text_and_stay_inside(name: str) -> None:
    rows = make_rows([name, "normal", "other"])
    decisions = threshold(rows, name, 0.4)
    for png in (
        draw_roc(roc_curves(rows, name, decisions), name, 120, 3),
        draw_reliability(measure_reliability(rows, name, decisions), name, "multiclass"),
    ):
        pixels = pixels_of(png)
        assert pixels.shape[1] == round(4.8 * 144)
        assert (pixels[:, -8:] == 255).all()  # no text runs out of the picture


def test_a_name_that_begins_with_an_underscore_has_its_line_in_the_legend() -> None:
    heights = []
    for names in (["_a", "b", "c"], ["a", "b", "c"]):
        rows = make_rows(names)
        pixels = pixels_of(draw_roc(roc_curves(rows, None, None), "run", 120, 3))
        legend = pixels[-130:, 20:76]  # where the lines of the legend are
        heights.append(int((legend.min(axis=(1, 2)) < 250).sum()))
    assert heights[0] == heights[1] > 3


def test_lines_differ_in_grey_and_the_same_rows_give_the_same_bytes() -> None:
    rows = make_rows([f"c{i}" for i in range(6)])
    curves = roc_curves(rows, None, None)
    png = draw_roc(curves, "run", 120, 6)
    assert png == draw_roc(curves, "run", 120, 6)
    grey = pixels_of(png)[-190:, 20:76] @ [0.299, 0.587, 0.114]
    patterns = {(*(row < 235).tolist(), round(row.min() / 40)) for row in grey}
    assert len(patterns) >= 6  # dashes and lightness


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    sizes = {"train": 60, "valid": 24, "test": 12}
    rows = {name: rows_of(name, np.arange(n) % 2, width=16) for name, n in sizes.items()}
    make_cache(folder / "c.h5", **rows)
    featcache.train(folder / "c.h5", folder / "r", hidden=(4,), epochs=3, device="cpu")
    return folder


@pytest.fixture
def run(work: Path, tmp_path: Path) -> Path:
    shutil.copy(work / "c.h5", tmp_path / "c.h5")
    return Path(shutil.copytree(work / "r", tmp_path / "r"))


def test_history_has_what_training_wrote_and_says_what_was_kept(run: Path) -> None:
    (history,) = read_histories(load_run(run))
    assert history.steps == [1, 2, 3]
    assert history.best == int(np.argmin(history.columns["valid_loss"]))
    assert draw_losses([history], "r") is not None


@pytest.mark.parametrize("text", ["", "epoch\n1,2\n", "a,b\n1,2\n", "epoch,train_loss\n1,x\n2,1\n"])
def test_a_damaged_history_is_not_drawn_and_stops_nothing(run: Path, text: str) -> None:
    (run / "history.csv").write_text(text)
    featcache.evaluate(run, say=lambda _: None)
    assert not (run / "loss_curves.png").exists()
    assert (run / "evaluation" / "test_roc.png").exists()


def test_losses_are_drawn_once_and_the_run_can_still_be_replaced(run: Path) -> None:
    said = list[str]()
    featcache.evaluate(run, say=said.append)
    assert f"written to {run.as_posix()}/loss_curves.png" in said
    (run / "loss_curves.png").write_bytes(b"mine")
    featcache.evaluate(run, say=lambda _: None)
    assert (run / "loss_curves.png").read_bytes() == b"mine"
    options: dict[str, Any] = {"hidden": (4,), "epochs": 1, "device": "cpu", "overwrite": True}
    featcache.train(run.parent / "c.h5", run, **options)
    assert not (run / "loss_curves.png").exists()


def test_a_link_in_place_of_a_picture_is_refused(run: Path) -> None:
    (run / "evaluation").mkdir()
    (run / "evaluation" / "test_roc.png").symlink_to(run.parent / "elsewhere.png")
    with pytest.raises(RunError, match="found a link"):
        featcache.evaluate(run)


def test_a_curve_of_other_rows_does_not_stay(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    featcache.evaluate(run, say=lambda _: None)
    assert (run / "evaluation" / "test_roc.png").exists()
    # As with --unseen, where rows of one class may be left.
    monkeypatch.setattr("featcache.evaluation.figure_files.roc_curves", lambda *_: [])
    featcache.evaluate(run, say=lambda _: None)
    assert not (run / "evaluation" / "test_roc.png").exists()


def test_rows_of_one_class_have_no_curve() -> None:
    one = PredictedRows(("a", "b"), ["p"] * 3, [""] * 3, np.ones(3, int), np.full((3, 2), 0.5))
    assert roc_curves(one, None, None) == []


def test_heads_of_an_ensemble_and_of_a_linear_probe_are_drawn(work: Path) -> None:
    crossval_small(work, "f", folds=2, keep_ensemble=True)
    featcache.crossval(work / "c.h5", work / "g", folds=2, keep_ensemble=True, **LBFGS)
    for name, step in (("f", "epoch"), ("g", "strength")):
        histories = read_histories(load_run(work / name / "ensemble"))
        assert [history.member["fold"] for history in histories] == [1, 2]
        assert {history.step for history in histories} == {step}
        assert all(history.best is not None for history in histories)
        assert draw_losses(histories, name) is not None
