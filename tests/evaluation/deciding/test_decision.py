"""Thresholds of a run: chosen by valid or by folds, told apart, written, and refused if damaged."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_labels
from sample_decisions import (
    SMALL,
    copy_run,
    decide_quietly,
    make_work,
    read_csv,
    rewrite_json,
)
from sample_rows import edited, make_cache, rows_of

from featcache.deployment.classifier import load_classifier
from featcache.errors import CacheError, ConfigError, FeatcacheWarning, RunError
from featcache.evaluation.deciding.decision import decide
from featcache.evaluation.deciding.decision_file import load_decisions
from featcache.evaluation.evaluation import evaluate
from featcache.evaluation.info import info
from featcache.heads.run import load_run
from featcache.heads.training import train
from featcache.metrics.rates import lower_bound
from featcache.metrics.thresholds import most_misses
from featcache.sweeps.crossval import crossval


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_work(tmp_path_factory.mktemp("work"))


@pytest.fixture
def run(work: Path, tmp_path: Path) -> Path:
    return copy_run(work, tmp_path)


def highest_per_group(rows: list[dict[str, str]], target: str = "covid") -> Any:
    """The ascending highest scores of the groups of a class, from the rows of a CSV."""
    found: dict[str, float] = {}
    for row in rows:
        if row["target"] == target:
            found[row["group"]] = max(found.get(row["group"], 0), float(row["prob_covid"]))
    return np.sort([*found.values()])


def test_rows_that_chose_nothing_guarantee_a_bound_per_group(run: Path, tmp_path: Path) -> None:
    said: list[str] = []
    found = decide(run, positive="covid", recall=0.8, say=said.append)
    assert (found.on, found.basis, found.unit) == ("valid", "guarantee", "group")
    assert any("recall guaranteed to be at least 0.8" in line for line in said)
    assert max(map(len, said[:-1])) <= 80  # the last has the path
    evaluate(run, split="valid", csv=tmp_path / "v.csv", say=lambda _: None)
    rows = read_csv(tmp_path / "v.csv")
    of_groups = highest_per_group(rows)
    allowed = most_misses(len(of_groups), 0.8)
    assert found.num_allowed == allowed
    assert found.num_units - found.num_right == allowed
    assert of_groups[allowed - 1] < found.threshold < of_groups[allowed]
    assert found.bound == lower_bound(len(of_groups) - allowed, len(of_groups)) >= 0.8
    scores = np.array([float(row["prob_covid"]) for row in rows])
    is_positive = np.array([row["target"] == "covid" for row in rows])
    image = found.image
    assert image["recall"]["hits"] == (scores[is_positive] >= found.threshold).sum()
    assert image["specificity"]["hits"] == (scores[~is_positive] < found.threshold).sum()
    assert image["share_positive"] == (scores >= found.threshold).mean()
    assert found.group["recall"]["total"] == len(of_groups)
    lone = [row for row in rows if row["group"] == row["path"] and row["target"] == "covid"]
    assert found.num_without_group == len(lone) > 0


def test_rows_that_chose_the_epoch_give_an_estimate(
    work: Path, tmp_path: Path, run: Path, capsys: Any
) -> None:
    said: list[str] = []
    decide(work / "chosen", positive="covid", specificity=0.8, say=said.append)
    crossval(work / "c.h5", tmp_path / "f", folds=2, hidden=(), optimizer="lbfgs", device="cpu")
    train(work / "c.h5", tmp_path / "r", hidden=(), optimizer="lbfgs", device="cpu")
    assert decide_quietly(tmp_path / "r", recall=0.8, on=tmp_path / "f").on == "crossval"
    assert "          estimate: the head's epoch was chosen on these rows" in said
    assert not any("guarantee" in line for line in said)
    # a hold-out of a cache without valid
    make_cache(tmp_path / "all.h5", all=[0, 1] * 40)
    train(tmp_path / "all.h5", tmp_path / "held", valid_fraction=0.25, **SMALL)
    held = decide_quietly(tmp_path / "held", recall=0.5)
    assert (held.basis, held.num_units, held.group) == ("estimate", 10, None)
    assert held.reason == "the head's epoch was chosen on these rows"
    (tmp_path / "all.h5").unlink()
    with pytest.raises(RunError, match="the run's cache"):
        decide_quietly(tmp_path / "held", recall=0.5)


def test_of_repeats_the_median_threshold_is_taken(work: Path, run: Path) -> None:
    said: list[str] = []
    found = decide_quietly(run, recall=0.8, on=work / "folds", say=said.append)
    assert max(map(len, said[:-1])) <= 80
    rows = read_csv(work / "folds" / "predictions.csv")
    lowest = []
    for repeat in "123":
        of_groups = highest_per_group([row for row in rows if row["repeat"] == repeat])
        lowest.append(float(of_groups[most_misses(len(of_groups), 0.8) or 0]))
    assert found.threshold <= lowest[(found.repeat or 0) - 1]
    thresholds = []
    for keep in "123":  # each alone, by a cross-validation of one repeat
        folder = run.parent / f"only{keep}"
        folder.mkdir()
        lines = (work / "folds" / "predictions.csv").read_text("utf-8").splitlines(keepends=True)
        data = "".join([lines[0], *(line for line in lines if line.split(",")[2] == keep)])
        (folder / "predictions.csv").write_text(data, "utf-8")
        shutil.copy(work / "folds" / "crossval.json", folder)
        rewrite_json(
            folder / "crossval.json", lambda f, d=data: f.update(predictions_sha256=sha256(d))
        )
        thresholds.append(decide_quietly(run, recall=0.8, on=folder).threshold)
    assert found.threshold == sorted(thresholds)[1]
    assert (found.num_repeats, found.on) == (3, "crossval")
    assert "not a guarantee" in found.basis
    assert found.num_units == len(highest_per_group(rows[: len(rows) // 3]))


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_rows_of_test_choose_nothing(work: Path, run: Path, tmp_path: Path) -> None:
    with pytest.warns(FeatcacheWarning, match="no test left"):
        crossval(work / "c.h5", tmp_path / "all", folds=2, with_test=True, **SMALL)
    found = decide_quietly(run, recall=0.8, on=tmp_path / "all")
    assert found.image["recall"]["total"] + found.image["specificity"]["total"] == 400
    with pytest.raises(ConfigError, match="found test"):
        decide_quietly(run, recall=0.8, on="test")


def test_a_wish_that_cannot_be_promised_is_said(run: Path) -> None:
    with pytest.warns(FeatcacheWarning, match="needs 299 groups without an error, and there are"):
        found = decide(run, positive="covid", recall=0.99, say=lambda _: None)
    assert (found.is_reached, found.num_allowed, found.num_needed) == (False, 0, 299)
    assert found.num_right == found.num_units
    before = (run / "decision.json").read_bytes()
    with pytest.raises(RunError, match=r"--recall: expected 299 or more groups.*Nothing was"):
        decide(run, positive="normal", recall=0.99, strict=True)
    assert (run / "decision.json").read_bytes() == before


def test_a_fixed_threshold_that_finds_nothing_has_no_bound(run: Path) -> None:
    said: list[str] = []
    found = decide(run, positive="covid", threshold=1, say=said.append)
    assert (found.bound, found.num_right, found.is_reached) == (0, 0, None)
    assert "  bound   none: no group is found" in said
    assert not any("guaranteed" in line for line in said)
    decide(run, positive="covid", threshold=0.5, say=said.append)
    assert any("trained nor chosen on these rows; it holds only" in line for line in said)
    assert not any("guaranteed" in line or "replaces" in line for line in said)
    decide(run, positive="normal", threshold=0.5, say=said.append)
    assert said[-1] == "it replaces the threshold for covid: a run has one"
    assert evaluate(run, say=said.append).decision is not None


def test_referred_images_prevalence_and_patients_unknown(run: Path) -> None:
    said: list[str] = []
    found = decide(
        run, positive="covid", recall=0.8, refer=0.1, prevalence=0.02, say=said.append
    )  # fmt: skip
    assert found.refer is not None
    assert found.prevalence is not None
    assert found.refer_below is not None
    assert 0 < found.refer["num_referred"] <= 16
    recall, specificity = (
        found.image[k]["hits"] / found.image[k]["total"] for k in ("recall", "specificity")
    )
    ppv = 0.02 * recall / (0.02 * recall + 0.98 * (1 - specificity))
    assert found.prevalence["ppv"] == pytest.approx(ppv)
    for name in ("ppv", "npv"):
        low, high = found.prevalence[f"{name}_interval"]
        assert low < found.prevalence[name] <= high
    assert any("patients unknown: too optimistic" in line for line in said)


def test_groups_named_like_files_are_no_patients(tmp_path: Path) -> None:
    rows = {name: rows_of(name, [0, 1] * 20) for name in ("train", "valid", "test")}
    for name, part in rows.items():
        groups = [f"{name}-{i // 8}" for i in range(40)]
        groups[::2] = part.paths[::2]
        rows[name] = edited(part, groups=groups)
    make_cache(tmp_path / "c.h5", **rows)
    train(tmp_path / "c.h5", tmp_path / "run", **SMALL)
    of_files = decide_quietly(tmp_path / "run", recall=0.8)
    assert (of_files.unit, of_files.num_without_group, of_files.num_units) == ("image", 20, 20)
    of_groups = decide_quietly(tmp_path / "run", recall=0.8, positive="normal")
    assert (of_groups.unit, of_groups.num_without_group, of_groups.num_units) == ("group", 0, 5)


def test_several_labels_have_a_threshold_each(tmp_path: Path) -> None:
    cache = sample_labels.make_cache(tmp_path / "c.h5")
    train(cache.path, tmp_path / "run", valid_fraction=0.3, **sample_labels.SMALL)
    crossval(cache.path, tmp_path / "folds", folds=2, **sample_labels.SMALL)
    one = decide_quietly(tmp_path / "run", positive="a|b\\c", recall=0.8)
    two = decide_quietly(tmp_path / "run", positive="=rare", recall=0.5, on=tmp_path / "folds")
    assert (one.basis, two.on) == ("guarantee", "crossval")
    known = np.concatenate([cache.splits[name].targets[:, 3] for name in ("train", "valid")])
    assert two.image["recall"]["total"] == (known == 1).sum()
    assert two.image["specificity"]["total"] == (known == 0).sum()
    result = evaluate(tmp_path / "run", say=lambda _: None)
    assert result.decision is not None
    assert set(result.decision) == {"a|b\\c", "=rare"}
    targets = cache.splits["test"].targets[:, 1]
    recall = result.decision["a|b\\c"]["image"]["recall"]
    assert recall["total"] == (targets == 1).sum()
    with pytest.raises(ConfigError, match="one label an image"):
        decide_quietly(tmp_path / "run", recall=0.5, positive="mass", refer=0.1)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"recall": 1.2}, "--recall: expected a number above 0 and below 1, found 1.2"),
        ({"recall": 1}, "No number of images"),
        ({}, "found none"),
        ({"recall": 0.9, "threshold": 0.5}, "found --recall and --threshold"),
        ({"threshold": 1.5}, "from 0 to 1"),
        ({"recall": 0.9, "positive": "flu"}, "one of covid, normal"),
        ({"recall": 0.9, "refer": 0}, "--refer"),
        ({"recall": 0.9, "prevalence": 1.0}, "--prevalence"),
    ],
)
def test_wishes_that_make_no_sense(work: Path, options: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        decide_quietly(work / "run", **options)


def test_valid_without_the_class_or_without_others(tmp_path: Path) -> None:
    splits = {"train": [0, 1] * 20, "valid": [1] * 8, "test": [0, 1] * 4}
    make_cache(tmp_path / "c.h5", **splits)
    train(tmp_path / "c.h5", tmp_path / "run", valid_fraction=0.2, **SMALL)
    with pytest.raises(CacheError, match="labelled rows of covid, found none"):
        decide_quietly(tmp_path / "run", recall=0.5)
    with pytest.raises(CacheError, match="labelled rows of other classes, found none"):
        decide_quietly(tmp_path / "run", positive="normal", specificity=0.5)
    assert decide_quietly(tmp_path / "run", positive="normal", recall=0.5).num_units == 8


def test_a_cache_that_has_changed_chooses_nothing(run: Path) -> None:
    make_cache(run.parent / "c.h5", train=[0, 1] * 20, valid=[0, 1] * 9)
    with pytest.raises(RunError, match="one that has changed"):
        decide_quietly(run, recall=0.5)


FOLDERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "head": (lambda f: f["head"].update(hidden=[9]), "another head"),
    "option": (lambda f: f["training"].update(learning_rate=1.0), "another learning_rate, 1.0"),
    "cache": (lambda f: f["cache"].update(payload_sha256="0" * 64), "another cache"),
    "classes": (lambda f: f.update(classes=["a", "b"]), "other classes"),
    "no training": (lambda f: f.update(training=[1]), "training, a JSON dict"),
    "empty training": (lambda f: f.update(training={"batch_size": "auto"}), "another learning"),
    "no cache": (lambda f: f.update(cache=None), "cache, a JSON dict"),
    "no caches": (lambda f: f.update(caches=[1]), "caches, JSON objects"),
    "fewer caches": (lambda f: f.update(caches=[]), "another cache"),
    "format": (lambda f: f.update(format="x"), "format featcache-crossval"),
    "version": (lambda f: f.update(format_version=[2]), "format version 1"),
    "rows": (lambda f: f.update(predictions_sha256="0" * 64), "another predictions.csv"),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_folds_of_another_head_are_refused(what: str, work: Path, run: Path) -> None:
    change, found = FOLDERS[what]
    folder = shutil.copytree(work / "folds", run.parent / "folds")
    rewrite_json(folder / "crossval.json", change)
    with pytest.raises(RunError, match=found):
        decide_quietly(run, recall=0.5, on=folder)
    assert not (run / "decision.json").exists()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda text: text.replace(",covid,", ",flu,", 1), "numbers and names"),
        (lambda text: text.replace("split,fold", "split,folds"), "the columns"),
        (lambda text: text + "train,1,x,p,g,covid,covid,0.5,0.5\n", "numbers and names"),
        (lambda text: text + "train,1,1,p,g,covid,covid,nan,0.5\n", "probabilities"),
        (lambda text: text + "train,1,1,p,g,covid,covid,0.5\n", "a probability of each class"),
        (lambda text: text + "train,1,1,p,g,covid,covid,0.5,0.5\n", "the same rows"),
        (lambda text: text + "train\n", "numbers and names"),
        (lambda text: text.splitlines()[0] + "\n", "rows in predictions.csv"),
        (lambda _: "", "the columns"),
        (lambda text: text + '"\0', "numbers and names|probabilit|columns"),
    ],
)
def test_damaged_predictions_are_one_error(
    work: Path, run: Path, change: Callable[[str], str], part: str
) -> None:
    folder = shutil.copytree(work / "folds", run.parent / "folds")
    text = change((folder / "predictions.csv").read_text("utf-8"))
    (folder / "predictions.csv").write_text(text, "utf-8")
    with pytest.raises(RunError, match=r"another predictions\.csv"):
        decide_quietly(run, recall=0.5, on=folder)
    rewrite_json(folder / "crossval.json", lambda f: f.update(predictions_sha256=sha256(text)))
    with pytest.raises(RunError, match=part):
        decide_quietly(run, recall=0.5, on=folder)


def rule(facts: dict[str, Any], **change: Any) -> None:
    facts["decisions"]["covid"].update(change)


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another head": (lambda f: f.update(weights_sha256="0" * 64), "of head 0000000000000000"),
    "another class": (lambda f: f.update(decisions={"flu": f["decisions"]["covid"]}), "thresholds"),
    "two of one label": (
        lambda f: f["decisions"].update(normal=f["decisions"]["covid"]), "thresholds"
    ),
    "none": (lambda f: f.update(decisions={}), "thresholds"),
    "a list": (lambda f: f.update(decisions=[1]), "thresholds"),
    "no rule": (lambda f: f.update(decisions={"covid": 0.5}), "thresholds"),
    "a text": (lambda f: rule(f, threshold="0.5"), "thresholds"),
    "a whole number": (lambda f: rule(f, threshold=1), "thresholds"),
    "above 1": (lambda f: rule(f, threshold=1.5), "thresholds"),
    "in no order": (lambda f: rule(f, refer_below=0.0), "thresholds"),
    "temperature": (lambda f: rule(f, temperature=0.0), "thresholds"),
    "wish": (lambda f: rule(f, wish={"recall": "x"}), "thresholds"),
    "bound": (lambda f: rule(f, bound=None), "thresholds"),
    "unit": (lambda f: rule(f, unit="x\ny"), "thresholds"),
    "a newer version": (lambda f: f.update(format_version=2), "upgrade"),
    "another format": (lambda f: f.update(format="x"), "format featcache-decision"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_a_decision_of_another_head_or_damaged_is_one_error(
    what: str, run: Path, capsys: Any
) -> None:
    decide_quietly(run, threshold=0.5)
    change, part = DAMAGE[what]
    rewrite_json(run / "decision.json", change)
    for use in (evaluate, info):
        with pytest.raises(RunError, match=part):
            use(run)
    if what == "another head":
        with pytest.raises(RunError, match=part):
            load_classifier(run)
    (run / "decision.json").unlink()
    assert info(run).decision is None


def test_a_decision_that_was_edited_or_is_no_file(run: Path) -> None:
    decide_quietly(run, threshold=0.5)
    path = run / "decision.json"
    text = path.read_text("utf-8")
    for spoilt in (text.replace("0.5", "0.4", 1), text[:-9], "[]", "\0", "{}", '{"a": NaN}'):
        path.write_text(spoilt, "utf-8")
        with pytest.raises(RunError, match=r"decision\.json"):
            info(run)
    path.unlink()
    path.mkdir()
    with pytest.raises(RunError, match=r"decision\.json"):
        info(run)
    with pytest.raises(RunError, match="a new file, or an earlier decision"):
        decide_quietly(run, threshold=0.5)


def test_no_damage_of_the_file_is_silent(run: Path) -> None:
    decide_quietly(run, recall=0.8)
    path, rng, loaded = run / "decision.json", random.Random(0), load_run(run)
    raw, wanted = path.read_bytes(), load_decisions(loaded)
    num_refused = 0
    for number in range(300):
        spoilt = bytearray(raw)
        for _ in range(1 + number % 4):
            spoilt[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(spoilt if number % 3 else spoilt[: rng.randrange(len(raw))])
        try:
            assert load_decisions(loaded) == wanted
        except RunError:
            num_refused += 1
    assert num_refused > 250


def test_the_file_says_what_was_returned_and_goes_with_the_weights(run: Path) -> None:
    found = decide_quietly(run, recall=0.8)
    facts = json.loads((run / "decision.json").read_text("utf-8"))
    assert facts["weights_sha256"] == load_run(run).weights_sha256
    ((name, rule),), wanted = facts["decisions"].items(), found.as_dict()
    del wanted["run"]
    assert (name, rule) == ("covid", wanted)
    before = (run / "decision.json").read_bytes()
    decide_quietly(run, recall=0.8)
    assert (run / "decision.json").read_bytes() == before
    decide_quietly(run, recall=0.8, positive="normal")  # one label an image: one threshold
    assert info(run).decision.keys() == {"normal"}
    train(run.parent / "c.h5", run, overwrite=True, valid_fraction=0.2, seed=1, **SMALL)
    assert info(run).decision is None
