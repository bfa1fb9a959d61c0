"""What the threshold of a run changes where it is used, and what it leaves as it was."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_labels
from sample_decisions import SMALL, copy_run, decide_quietly, make_work, read_csv, rewrite_json
from sample_images import write_tree
from sample_rows import make_cache

import featcache
from featcache.backbones.backbone import Backbone
from featcache.deployment.predictions import Predictions, predict
from featcache.evaluation.deciding.decision_file import Decisions
from featcache.evaluation.evaluation import evaluate
from featcache.heads.training import train


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_work(tmp_path_factory.mktemp("work"))


@pytest.fixture
def run(work: Path, tmp_path: Path) -> Path:
    return copy_run(work, tmp_path)


def predict_cache(run: Path, **options: Any) -> Predictions:
    with pytest.warns(featcache.FeatcacheWarning, match="trained on"):
        return predict(run, cache=run.parent / "c.h5", **options)


def test_evaluate_sets_both_side_by_side_and_changes_nothing_else(
    run: Path, tmp_path: Path
) -> None:
    before = evaluate(run, positive="covid", csv=tmp_path / "t.csv", say=lambda _: None).as_dict()
    assert before["decision"] is None
    decided = decide_quietly(run, recall=0.9, refer=0.1, on="valid")
    said: list[str] = []
    result = evaluate(run, positive="covid", say=said.append, csv=tmp_path / "t.csv")
    after = result.as_dict()
    facts = after["decision"]["covid"]
    assert before | {"decision": after["decision"]} == after
    kept = json.loads((run / "evaluation" / "test.json").read_text("utf-8"))
    assert kept["decision"] == after["decision"]
    rows = read_csv(tmp_path / "t.csv")
    assert [*rows[0]][3:6] == ["pred", "decision", "prob_covid"]
    scores = np.array([float(row["prob_covid"]) for row in rows])
    is_positive = np.array([row["target"] == "covid" for row in rows])
    called = scores >= decided.threshold
    assert facts["image"]["recall"]["hits"] == called[is_positive].sum()
    assert facts["image"]["specificity"]["hits"] == (~called)[~is_positive].sum()
    assert facts["argmax"]["recall"]["hits"] == (scores > 0.5)[is_positive].sum()
    assert facts["argmax"]["specificity"]["hits"] == (scores < 0.5)[~is_positive].sum()
    assert facts["false_negatives"] == [
        row["path"] for row, is_missed in zip(rows, is_positive & ~called, strict=True) if is_missed
    ]
    assert facts["group"]["recall"]["total"] == len(
        {r["group"] for r in rows if r["target"] == "covid"}
    )
    assert facts["threshold"] == decided.threshold
    between = called & (scores < decided.refer_below)
    wanted = np.where(between, "refer", np.where(called, "covid", "normal"))
    assert [row["decision"] for row in rows] == wanted.tolist()
    assert facts["refer"]["num_referred"] == between.sum()
    rest = is_positive & ~between
    assert facts["refer"]["recall"]["hits"] == (scores >= decided.refer_below)[rest].sum()
    assert max(len(line) for line in said if not line.startswith("written to")) <= 80
    shown = "\n".join(said)
    missed = f"{before['num_samples'] and int((is_positive & ~called).sum()):,}"
    assert f"{len(before['false_negatives']):<26,}" + missed in shown


def test_predict_has_the_decision_in_a_column_a_key_and_a_mark(run: Path, tmp_path: Path) -> None:
    plain = predict_cache(run, csv=tmp_path / "plain.csv").as_dict()
    assert plain["thresholds"] is None
    assert "decision" not in plain["predictions"][0]
    decided = decide_quietly(run, threshold=0.3, refer=0.05)
    found = predict_cache(run, csv=tmp_path / "plain.csv")  # replaced: it is of the same kind
    rows = read_csv(tmp_path / "plain.csv")
    assert [*rows[0]][:4] == ["path", "pred", "prob", "decision"]
    assert decided.refer_below is not None
    for row, facts, path in zip(rows, found.as_dict()["predictions"], found.paths, strict=True):
        score = float(row["prob_covid"])
        wanted = "refer" if score < decided.refer_below else "covid"
        assert row["decision"] == facts["decision"] == (wanted if score >= 0.3 else "normal"), path
        assert row["pred"] == facts["pred"] == ("covid" if score > 0.5 else "normal")
    assert {row["decision"] for row in rows} == {"covid", "normal", "refer"}
    predict_cache(run, csv=tmp_path / "plain.csv")  # and with the column it is still its own
    again = pickle.loads(pickle.dumps(found))
    assert again.decision == found.decision


def test_calibrated_probabilities_are_another_output(work: Path, run: Path, tmp_path: Path) -> None:
    decided = decide_quietly(run, recall=0.9, on=work / "folds")
    assert decided.calibration["log_loss_out_of_fold"] is not None
    # whether it is kept depends on the rows: here it is set
    rewrite_json(run / "decision.json", lambda f: f["decisions"]["covid"].update(temperature=2.5))
    found = predict_cache(run, csv=tmp_path / "p.csv")
    powers = found.probs ** (1 / 2.5)
    wanted = powers / powers.sum(axis=1, keepdims=True)
    for i, name in enumerate(("covid", "normal")):
        np.testing.assert_allclose(found.calibrated[name], wanted[:, i])
    rows = read_csv(tmp_path / "p.csv")
    assert [*rows[0]][-4:-2] == ["calibrated_covid", "calibrated_normal"]
    np.testing.assert_allclose([float(r["calibrated_covid"]) for r in rows], wanted[:, 0])
    first = found.as_dict()["predictions"][0]
    assert first["calibrated"]["covid"] == pytest.approx(wanted[0, 0])
    assert first["probs"] == found.probs[0].tolist()
    facts = evaluate(run, say=lambda _: None).decision
    assert facts is not None
    assert facts["covid"]["calibrated_log_loss"] != facts["covid"]["log_loss"]
    few = decide_quietly(run, recall=0.9)
    assert few.calibration["fitted"] is not None  # 54 groups are enough
    predict_cache(run, csv=tmp_path / "p.csv")  # an older file with those columns is replaced


def test_below_30_positives_no_temperature_is_fitted(tmp_path: Path) -> None:
    make_cache(tmp_path / "c.h5", train=[0, 1] * 30, valid=[0] * 29 + [1] * 30, test=[0, 1])
    train(tmp_path / "c.h5", tmp_path / "run", valid_fraction=0.2, **SMALL)
    said: list[str] = []
    found = featcache.decide(tmp_path / "run", positive="covid", recall=0.9, say=said.append)
    assert (found.temperature, found.calibration["fitted"]) == (None, None)
    assert any("29 positive images, fewer than the 30" in line for line in said)
    other = decide_quietly(tmp_path / "run", positive="normal", recall=0.9)
    assert other.calibration["fitted"] is not None


def test_of_three_classes_what_is_not_positive_is_the_most_probable_other() -> None:
    rule = {"threshold": 0.3, "refer_below": None, "temperature": None}
    decisions = Decisions(("a", "b", "c"), "multiclass", {"b": rule})
    probs = np.array([[0.6, 0.3, 0.1], [0.6, 0.29, 0.11], [0.1, 0.29, 0.61], [0.34, 0.32, 0.34]])
    assert decisions.apply(probs) == ("b", "a", "c", "b")
    high = Decisions(("a", "b", "c"), "multiclass", {"b": rule | {"threshold": 0.9}})
    assert high.apply(np.array([[0.1, 0.7, 0.2]])) == ("c",)  # not b, though it is the likeliest
    assert decisions.apply(np.empty((0, 3))) == ()
    referring = Decisions(("a", "b"), "multiclass", {"b": rule | {"refer_below": 0.5}})
    rows = np.array([[0.7, 0.3], [0.5, 0.5], [0.71, 0.29]])
    assert referring.apply(rows) == ("refer", "b", "a")


def test_several_labels_are_decided_one_by_one(tmp_path: Path) -> None:
    cache = sample_labels.make_cache(tmp_path / "c.h5")
    train(cache.path, tmp_path / "run", **sample_labels.SMALL)
    decide_quietly(tmp_path / "run", positive="a|b\\c", threshold=0.2)
    decide_quietly(tmp_path / "run", positive="=rare", threshold=0.05)
    rewrite_json(
        tmp_path / "run" / "decision.json",
        lambda f: f["decisions"]["=rare"].update(temperature=2.0),
    )
    found = predict_cache(tmp_path / "run", csv=tmp_path / "p.csv")
    limits = np.array([0.5, 0.2, 0.5, 0.05])
    for probs, decided in zip(found.probs, found.decision or (), strict=True):
        above = (probs >= limits) | ((limits == 0.5) & (probs > 0.5))
        assert decided == tuple(np.array(found.classes)[above])
    odds = np.log(found.probs[:, 3] / (1 - found.probs[:, 3])) / 2
    np.testing.assert_allclose(found.calibrated["=rare"], 1 / (1 + np.exp(-odds)))
    assert [*found.calibrated] == ["=rare"]
    rows = read_csv(tmp_path / "p.csv")
    assert [*rows[0]][:3] == ["path", "preds", "decision"]
    assert "calibrated_=rare" in rows[0]
    said: list[str] = []
    evaluate(tmp_path / "run", say=said.append)
    assert sum("above 0.5" in line for line in said) == 2  # a table for each threshold


def test_images_and_exports_have_it_too(tmp_path: Path, tiny_backbone: Backbone) -> None:
    write_tree(tmp_path / "data", {"train": 6, "valid": 3, "test": 2})
    featcache.extract(tmp_path / "data", tmp_path / "c.h5", backbone=tiny_backbone)
    train(tmp_path / "c.h5", tmp_path / "run", hidden=(), epochs=2)
    plain = featcache.export(tmp_path / "run", tmp_path / "a.pt", backbone=tiny_backbone)
    assert plain.decision is None
    decided = decide_quietly(tmp_path / "run", threshold=0.0)
    classifier = featcache.load_classifier(tmp_path / "run", backbone=tiny_backbone)
    found = classifier.predict(tmp_path / "data" / "test")
    assert set(found.decision or ()) == {"covid"}
    summary = classifier.export(tmp_path / "b.pt")
    facts = json.loads((tmp_path / "b.pt.json").read_text("utf-8"))
    assert summary.decision == facts["decision"]
    assert facts["decision"]["thresholds"]["covid"]["threshold"] == decided.threshold
    assert "else the most probable other class" in facts["decision"]["rule"]
