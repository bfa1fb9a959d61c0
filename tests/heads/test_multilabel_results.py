"""Several labels a row: figures, predictions and the exported network of a run."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from sample_images import write_tree
from sample_labels import (
    CLASSES,
    IDENTITY,
    SMALL,
    assert_same_figures,
    by_scikit_learn,
    call,
    known_rows,
    make_cache,
    probs_of,
    rows_of,
)

from featcache.backbones.backbone import Backbone
from featcache.cache.reading import open_cache
from featcache.cache.writing import write_cache
from featcache.csv_files import plain_cell
from featcache.deployment.classifier import load_classifier
from featcache.deployment.predictions import predict
from featcache.errors import CacheError, FeatcacheWarning
from featcache.evaluation.evaluation import evaluate
from featcache.extraction.extraction import extract
from featcache.heads.run import load_run
from featcache.heads.training import train
from featcache.metrics.areas import auc_interval


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_cache(tmp_path / "c.h5")
    train(tmp_path / "c.h5", tmp_path / "r", **SMALL)
    return tmp_path / "r"


# --- evaluate


@pytest.mark.usefixtures("drawn")
def test_figures_equal_scikit_learns_over_the_known_targets(run: Path, tmp_path: Path) -> None:
    features, targets, paths = known_rows(open_cache(tmp_path / "c.h5"), "test")
    probs = probs_of(load_run(run).state, features)
    said: list[str] = []
    result = evaluate(run, positive="mass", say=said.append)
    wanted = by_scikit_learn(targets, probs)
    assert_same_figures(result, wanted)
    assert (result["task"], result["num_samples"]) == ("multilabel", 81)
    assert (result["balanced_accuracy"], result["confusion_matrix"]) == (None, None)
    of_mass = wanted["per_class"]["mass"]
    (no_no, no_yes), _ = of_mass["confusion_matrix"]
    assert result["sensitivity"] == pytest.approx(of_mass["recall"])
    assert result["specificity"] == pytest.approx(no_no / (no_no + no_yes))
    low, high = result["intervals"]["positive_roc_auc"]
    assert low < result["positive_roc_auc"] < high
    is_known = ~np.isnan(targets[:, 2])
    assert 0 < is_known.sum() < 81
    part = open_cache(tmp_path / "c.h5").split("test")
    group_of = dict(zip(part.paths, part.groups or [""] * len(part), strict=True))
    names = [group_of[path] for path, known in zip(paths, is_known, strict=True) if known]
    interval = auc_interval(targets[is_known, 2] == 1, probs[is_known, 2], groups=names)
    assert (low, high) == pytest.approx(interval, abs=1e-6)
    assert result["intervals"]["roc_auc"] is None  # a mean of several areas
    missed = [paths[i] for i in range(81) if targets[i, 2] == 1 and probs[i, 2] <= 0.5]
    assert result["false_negatives"] == missed
    assert missed
    wrong = {
        (paths[i], CLASSES[c], int(targets[i, c]), int(probs[i, c] > 0.5)): probs[i, c]
        for i in range(81) for c in range(4)
        if targets[i, c] in (0, 1) and (probs[i, c] > 0.5) != targets[i, c]
    }  # fmt: skip
    found = {(r["path"], r["class"], r["target"], r["pred"]): r["prob"] for r in result["mistakes"]}
    assert found == pytest.approx(wrong, abs=1e-6)
    sure = [max(r["prob"], 1 - r["prob"]) for r in result["mistakes"]]
    assert sure == sorted(sure, reverse=True)
    folder = run / "evaluation"
    pictures = ["test_reliability.png", "test_roc.png"]  # no confusion matrix
    assert sorted(p.name for p in folder.iterdir()) == ["test.json", *pictures]
    assert json.loads((folder / "test.json").read_text()) == result.as_dict()
    assert "16 unlabelled rows left out" not in said
    assert "9 unlabelled rows left out" in said
    assert any(line.split()[:3] == ["roc", "auc", f"{result['roc_auc']:.3f}"] for line in said)


@pytest.mark.usefixtures("drawn")
def test_undefined_figures_are_null_and_not_in_the_means(run: Path, tmp_path: Path) -> None:
    features, targets, paths, groups = rows_of(7, 60)
    targets[:, 0] = np.nan
    targets[:, 1] = np.where(np.isnan(targets[:, 1]), np.nan, 0)
    parts = {"features": features, "targets": targets, "paths": paths, "groups": groups}
    cache = make_cache(tmp_path / "o.h5", {}, **parts)
    result = evaluate(run, cache=cache.path, split="all", positive="edema")
    rows, known, _ = known_rows(cache, "all")
    wanted = by_scikit_learn(known, probs_of(load_run(run).state, rows))
    assert_same_figures(result, wanted)
    assert [row["roc_auc"] is None for row in result["per_class"].values()] == [
        True, True, False, False,
    ]  # fmt: skip
    assert (result["sensitivity"], result["specificity"], result["false_negatives"]) == (
        None, None, [],
    )  # fmt: skip
    targets[:, 2:] = np.nan
    parts["targets"] = targets
    result = evaluate(run, cache=make_cache(tmp_path / "p.h5", {}, **parts).path, split="all")
    assert (result["roc_auc"], result["average_precision"]) == (None, None)
    json.dumps(result.as_dict(), allow_nan=False)


def test_classes_of_another_cache_are_matched_by_name(run: Path, tmp_path: Path) -> None:
    own = evaluate(run)
    features, targets, paths = known_rows(open_cache(tmp_path / "c.h5"), "test")
    turned = {"classes": ("=rare", "mass", "edema"), "targets": targets[:, [3, 2, 0]]}
    known = ~np.isnan(turned["targets"]).all(1)
    cache = make_cache(
        tmp_path / "o.h5", {}, features=features, paths=paths, groups=None, **turned
    )  # fmt: skip
    said: list[str] = []
    other = evaluate(run, cache=cache.path, split="all", say=said.append)
    assert "this cache has no class a|b\\c: matched the others by name" in said
    assert other["num_samples"] == known.sum()
    for name in turned["classes"]:
        found, wanted = other["per_class"][name], own["per_class"][name]
        lost = wanted["num_unknown"] - found["num_unknown"]
        assert lost == 81 - known.sum()
        assert found | {"num_unknown": 0} == wanted | {"num_unknown": 0}
    assert other["per_class"]["a|b\\c"]["num_unknown"] == known.sum()
    one = write_cache(
        tmp_path / "m.h5", features, np.arange(81) % 4, paths, classes=CLASSES, identity=IDENTITY
    )
    with pytest.raises(CacheError, match=r"a multilabel cache, as .* found a multiclass one"):
        evaluate(run, cache=one.path, split="all")


def split_names(cell: str) -> set[str]:
    """The names in a cell, by the rule that README states."""
    return {re.sub(r"\\(.)", r"\1", name) for name in re.findall(r"(?:[^\\|]|\\.)+", cell)}


def test_a_csv_has_the_names_of_every_answer(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("evaluate", run, "--json", "--csv", tmp_path / "e.csv", "--positive", "edema")
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((run / "evaluation" / "test.json").read_text())
    features, targets, paths = known_rows(open_cache(tmp_path / "c.h5"), "test")
    probs = probs_of(load_run(run).state, features)
    with (tmp_path / "e.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    of_probs = [f"prob_{name}" for name in CLASSES]
    assert list(lines[0]) == ["path", "group", "targets", "unknown", "preds", *of_probs]
    assert [line["path"] for line in lines] == paths
    for line, target, prob in zip(lines, targets, probs, strict=True):
        for column, chosen in (
            ("targets", target == 1), ("unknown", np.isnan(target)), ("preds", prob > 0.5),
        ):  # fmt: skip
            wanted = {name for name, is_chosen in zip(CLASSES, chosen, strict=True) if is_chosen}
            assert split_names(plain_cell(line[column])) == wanted
        np.testing.assert_allclose([float(line[name]) for name in of_probs], prob, atol=1e-6)
    assert any("a\\|b\\\\c" in line["preds"] for line in lines)


# --- predict, export, info


def test_a_cache_is_classified_by_every_label(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(FeatcacheWarning, match="trained on"):
        call("predict", run, "--cache", tmp_path / "c.h5", "--json", "--csv", tmp_path / "p.csv")
    printed = json.loads(capsys.readouterr().out)
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    of_probs = [f"prob_{name}" for name in CLASSES]
    assert list(lines[0]) == ["path", "preds", *of_probs, "unlike_training", "failure"]
    cache, state = open_cache(tmp_path / "c.h5"), load_run(run).state
    wanted = {
        path: row
        for split in cache.splits.values()
        for path, row in zip(split.paths, probs_of(state, split.features), strict=True)
    }
    assert (printed["task"], printed["classes"], len(lines)) == ("multilabel", [*CLASSES], 330)
    for line, row in zip(lines, printed["predictions"], strict=True):
        probs = wanted[line["path"]]
        names = [name for name, prob in zip(CLASSES, probs, strict=True) if prob > 0.5]
        assert set(row) == {"path", "preds", "probs", "unlike_training"}
        assert (row["path"], row["preds"]) == (line["path"], names)
        assert split_names(plain_cell(line["preds"])) == set(names)
        np.testing.assert_allclose(row["probs"], probs, atol=1e-6)
        np.testing.assert_allclose([float(line[name]) for name in of_probs], probs, atol=1e-6)
    with pytest.warns(FeatcacheWarning, match="trained on"):
        call("predict", run, "--cache", tmp_path / "c.h5")
    *first, last = capsys.readouterr().out.splitlines()
    counts = [f"{sum(p[i] > 0.5 for p in wanted.values()):,} {n}" for i, n in enumerate(CLASSES)]
    assert last == f"330 images: {', '.join(counts)}"
    assert sum(line.endswith(": none") for line in first) == sum(
        (row <= 0.5).all() for row in wanted.values()
    )
    for thing in (run, tmp_path / "c.h5"):
        call("info", thing)
        assert "task: multilabel" in (said := capsys.readouterr().out)
    targets = cache.splits["train"].targets
    for i, name in enumerate(CLASSES):
        num_known = (~np.isnan(targets[:, i])).sum()
        assert f"{(targets[:, i] == 1).sum():,} of {num_known:,} known {name}" in said


def test_images_are_classified_and_the_network_is_exported(
    tmp_path: Path, tiny_backbone: Backbone
) -> None:
    """Labels of one's own beside features that were extracted, as README shows."""
    tree = write_tree(tmp_path / "data")
    extracted = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, group_by=r"^(\w+)_")
    cache, rng = open_cache(extracted.cache), np.random.default_rng(0)
    features, paths, groups = (
        {name: getattr(split, column) for name, split in cache.splits.items()}
        for column in ("features", "paths", "groups")
    )
    targets = {name: rng.choice([0, 1, np.nan], (len(paths[name]), 3)) for name in paths}
    classes = ["edema", "effusion", "mass"]
    write_cache(
        tmp_path / "labels.h5", features, targets, paths, classes=classes, groups=groups,
        identity=cache.identity,
    )  # fmt: skip
    before = (tmp_path / "labels.h5").read_bytes()
    with pytest.raises(CacheError, match=r"found several labels per image.* another file name"):
        extract(tree, tmp_path / "labels.h5", backbone=tiny_backbone, group_by=r"^(\w+)_")
    assert (tmp_path / "labels.h5").read_bytes() == before
    train(tmp_path / "labels.h5", tmp_path / "run", **SMALL)
    classifier = load_classifier(tmp_path / "run", backbone=tiny_backbone)
    found = classifier.predict([tree / "test"])
    with pytest.warns(FeatcacheWarning, match="trained on"):
        cached = predict(tmp_path / "run", cache=tmp_path / "labels.h5")
    wanted = dict(zip(cached.paths, cached.probs, strict=True))
    for path, probs, preds in zip(found.paths, found.probs, found.preds, strict=True):
        of_cache = wanted[Path(path).relative_to(tree).as_posix()]
        np.testing.assert_allclose(probs, of_cache, atol=1e-5)
        assert preds == tuple(
            name for name, p in zip(found.classes, of_cache, strict=True) if p > 0.5
        )
    assert np.abs(found.probs.sum(1) - 1).max() > 0.05  # no softmax
    (tmp_path / "bad.png").write_bytes(b"broken")
    classifier.predict([tmp_path / "bad.png"]).write_csv(tmp_path / "p.csv")
    with (tmp_path / "p.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert (line["preds"], line["prob_mass"]) == ("", "")
    assert line["failure"]
    facts = classifier.export(tmp_path / "out.pt")
    assert facts.task == "multilabel"
    assert "sigmoid" in facts.output
    assert "softmax" not in facts.output
