"""Several labels a row, the whole path: a cache, a run, figures, predictions, a sweep.

The figures are computed a second time here: the forward pass by NumPy, the rest by scikit-learn on
the rows whose target is known.
"""

from __future__ import annotations

import csv
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_images import write_tree
from sklearn import metrics

from featcache.backbones.backbone import Backbone
from featcache.cache.reading import Cache, open_cache
from featcache.cache.selection import select
from featcache.cache.writing import write_cache
from featcache.cli import main as cli
from featcache.deployment.classifier import load_classifier
from featcache.deployment.predictions import predict
from featcache.errors import CacheError, ConfigError, FeatcacheWarning
from featcache.evaluation.evaluation import evaluate
from featcache.extraction.extraction import extract
from featcache.files import plain_cell
from featcache.heads import rows as partition
from featcache.heads.config import TrainingConfig
from featcache.heads.fit import fit_head
from featcache.heads.head import HeadConfig
from featcache.heads.rows import choose_rows
from featcache.heads.run import load_run
from featcache.heads.training import train
from featcache.runtime import CPU, silent
from featcache.sweeps.folds import Pool
from featcache.sweeps.sweeping import sweep

CLASSES = ("edema", "a|b\\c", "mass", "=rare")
IDENTITY = {"backbone": "fake", "image_size": 32}
SMALL: dict[str, Any] = {"hidden": (8,), "epochs": 4, "device": "cpu", "learning_rate": 0.02}


def rows_of(seed: int, num_rows: int) -> tuple[Any, Any, list[str], list[str]]:
    """Features, targets (a fifth unknown, of every tenth row all), paths, groups of two rows."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num_rows, 10)).astype("<f4")
    chances = 1 / (1 + np.exp(-1.5 * features[:, :4] + [0, 0.5, 1, 2.4]))
    targets = (rng.random((num_rows, 4)) < chances).astype("<f4")
    targets[rng.random((num_rows, 4)) < 0.2] = np.nan
    targets[::10] = np.nan
    paths = [f"{seed}/{i:04d}.png" for i in range(num_rows)]
    return features, targets, paths, [f"p{seed}-{i // 2}" for i in range(num_rows)]


def make_cache(path: Path, sizes: dict[str, int] | None = None, **change: Any) -> Cache:
    sizes = sizes or {"train": 160, "valid": 80, "test": 90}
    parts = {name: rows_of(seed, n) for seed, (name, n) in enumerate(sizes.items())}
    columns = [{name: part[i] for name, part in parts.items()} for i in range(4)]
    given = dict(zip(("features", "targets", "paths", "groups"), columns, strict=True))
    options: dict[str, Any] = {"classes": CLASSES, "identity": IDENTITY} | given | change
    return write_cache(path, **options)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_cache(tmp_path / "c.h5")
    train(tmp_path / "c.h5", tmp_path / "r", **SMALL)
    return tmp_path / "r"


def probs_of(state: Any, features: Any) -> Any:
    """Sigmoid of a head of any hidden layers, by NumPy alone."""
    weights = {name: value.astype(np.float64) for name, value in state.items()}
    x, layer = features.astype("f8"), 0
    while True:
        x = (x - weights[f"{layer}.running_mean"]) / np.sqrt(weights[f"{layer}.running_var"] + 1e-5)
        x = x * weights[f"{layer}.weight"] + weights[f"{layer}.bias"]
        is_last = f"{layer + 1}.weight" not in weights
        linear = layer + (2 if is_last else 1)
        x = x @ weights[f"{linear}.weight"].T + weights[f"{linear}.bias"]
        if is_last:
            return 1 / (1 + np.exp(-x))
        x, layer = np.maximum(x, 0), layer + 3


def by_scikit_learn(targets: Any, probs: Any) -> dict[str, Any]:
    """The figures over the known targets, each class alone; the means where it has both answers."""
    per_class = {}
    for i, name in enumerate(CLASSES):
        known = [row for row in range(len(targets)) if targets[row, i] in (0, 1)]
        truth, prob = targets[known, i].astype(int), probs[known, i]
        if not known:
            figures = ("precision", "recall", "f1", "roc_auc", "average_precision")
            per_class[name] = dict.fromkeys(figures) | {
                "num_positive": 0, "num_negative": 0, "num_unknown": len(targets),
                "confusion_matrix": [[0, 0], [0, 0]],
            }  # fmt: skip
            continue
        called = (prob > 0.5).astype(int)
        per_class[name] = {
            "precision": metrics.precision_score(truth, called, zero_division=np.nan),
            "recall": metrics.recall_score(truth, called, zero_division=np.nan),
            "f1": metrics.f1_score(truth, called, zero_division=np.nan),
            "roc_auc": metrics.roc_auc_score(truth, prob) if len(set(truth)) == 2 else None,
            "average_precision": (
                metrics.average_precision_score(truth, prob) if len(set(truth)) == 2 else None
            ),
            "num_positive": int(truth.sum()), "num_negative": int((1 - truth).sum()),
            "num_unknown": len(targets) - len(known),
            "confusion_matrix": metrics.confusion_matrix(truth, called, labels=[0, 1]).tolist(),
        }  # fmt: skip
    known = ~np.isnan(targets)
    both = [row for row in per_class.values() if row["roc_auc"] is not None]
    return {
        "accuracy": metrics.accuracy_score(targets[known], (probs > 0.5)[known]),
        "roc_auc": np.mean([row["roc_auc"] for row in both]) if both else None,
        "average_precision": np.mean([row["average_precision"] for row in both]) if both else None,
        "f1": np.mean([row["f1"] for row in both]) if both else None,
        "loss": metrics.log_loss(targets[known], probs[known], labels=[0, 1]),
        "per_class": per_class,
    }  # fmt: skip


def assert_same_figures(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in ("accuracy", "roc_auc", "average_precision"):
        assert found[key] == pytest.approx(wanted[key], abs=1e-6)
    for name, row in wanted["per_class"].items():
        assert set(found["per_class"][name]) == set(row)
        for key, value in row.items():
            is_number = isinstance(value, float) and not np.isnan(value)
            expected = pytest.approx(value, abs=1e-6) if is_number else value
            if isinstance(value, float) and not is_number:
                expected = None
            assert found["per_class"][name][key] == expected


def known_rows(cache: Cache, split: str) -> tuple[Any, Any, list[str]]:
    part = cache.split(split)
    rows = [i for i in range(len(part)) if not np.isnan(part.targets[i]).all()]
    return part.features[rows], np.array(part.targets[rows]), [part.paths[i] for i in rows]


def call(*arguments: object) -> None:
    cli.cli.main([str(a) for a in arguments], standalone_mode=False)


# --- train


def test_the_run_holds_the_head_of_the_rows_with_a_known_target(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.h5")
    said: list[str] = []
    summary = train(cache.path, tmp_path / "r", seed=3, say=said.append, **SMALL)
    arrays = [array for name in ("train", "valid") for array in known_rows(cache, name)[:2]]
    assert [len(array) for array in arrays[::2]] == [
        143,
        72,
    ]  # 16 and 8 are wholly unknown, and one more by chance
    wanted = fit_head(
        HeadConfig(10, 4, hidden=(8,)), TrainingConfig(epochs=4, learning_rate=0.02), *arrays,
        seed=3, data_seed=3, device=CPU, classes=CLASSES,
    )  # fmt: skip
    loaded = load_run(tmp_path / "r")
    assert all(np.array_equal(loaded.state[name], wanted.state[name]) for name in wanted.state)
    assert (loaded.task, loaded.classes) == ("multilabel", CLASSES)
    assert json.loads((tmp_path / "r" / "run.json").read_text())["task"] == "multilabel"
    assert (summary.task, summary.as_dict()["task"]) == ("multilabel", "multilabel")
    assert (summary.num_train, summary.num_valid, summary.num_unlabelled) == (143, 72, 25)
    # and the loss is a binary cross-entropy over the known targets
    targets = arrays[3]
    figures = by_scikit_learn(targets, probs_of(loaded.state, arrays[2]))
    assert summary.valid_loss == pytest.approx(figures["loss"], abs=1e-6)
    assert summary.valid_accuracy == pytest.approx(figures["accuracy"])
    for name, row in figures["per_class"].items():
        assert summary.valid_recall[name] == pytest.approx(row["recall"])


def test_features_that_stay_in_their_file_keep_their_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shuffled blocks of a file meet the targets of their own rows: the head learns them."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 10)).astype("<f4")
    targets = np.where(rng.random((400, 4)) < 0.3, np.nan, features[:, :4] > 0)
    parts = {"train": slice(300), "valid": slice(300, 400)}
    columns = [{name: column[rows] for name, rows in parts.items()} for column in
               (features, targets, [f"{i:04d}" for i in range(400)])]  # fmt: skip
    cache = write_cache(tmp_path / "c.h5", *columns, classes=CLASSES)
    monkeypatch.setattr(partition, "available_memory", lambda *_: 1)
    said: list[str] = []
    options: dict[str, Any] = {"hidden": (), "dropout": 0, "learning_rate": 0.05, "epochs": 20}
    summary = train(cache.path, tmp_path / "r", device="cpu", say=said.append, **options)
    assert any("streaming in blocks of" in line for line in said)
    valid, known, _ = known_rows(cache, "valid")
    figures = by_scikit_learn(known, probs_of(load_run(tmp_path / "r").state, valid))
    assert summary.valid_loss == pytest.approx(figures["loss"], abs=1e-6)
    assert figures["accuracy"] > 0.9


def test_counts_of_every_answer_are_said(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.h5")
    said: list[str] = []
    train(cache.path, tmp_path / "r", say=said.append, **SMALL)
    wanted = ["class", "train:", "yes", "no", "unknown", "valid:", "yes", "no", "unknown"]
    start = next(i for i, line in enumerate(said) if line.split() == wanted)
    for line, i in zip(said[start + 1 :], range(4), strict=False):
        counts = []
        for name in ("train", "valid"):
            column = known_rows(cache, name)[1][:, i]
            counts += [int((column == 1).sum()), int((column == 0).sum()), sum(column != column)]
        assert line.split() == [CLASSES[i], *map(str, counts)]
    assert said[start + 5].split() == ["(unlabelled,", "left", "out)", "17", "8"]
    assert said[start + 6].split() == ["total", "143", "72"]
    column = known_rows(cache, "train")[1][:, 3]
    ratio = (column == 0).sum() / (column == 1).sum()
    assert ratio > 5  # or this test shows nothing
    hint = f"hint: in train one answer to =rare is {ratio:.1f} times as frequent as the other"
    assert f"{hint}; try --class-weights balanced" in said
    said.clear()
    train(cache.path, tmp_path / "s", class_weights="balanced", say=said.append, **SMALL)
    assert not any(line.startswith("hint") for line in said)


def test_classes_that_cannot_be_learned_are_refused_or_warned_of(tmp_path: Path) -> None:
    targets = {name: rows_of(i, n)[1] for i, (name, n) in enumerate(SIZES.items())}
    targets["train"][:, 2] = np.where(np.isnan(targets["train"][:, 2]), np.nan, 0)
    targets["train"][:, 1] = np.where(np.isnan(targets["train"][:, 1]), np.nan, 1)
    make_cache(tmp_path / "c.h5", SIZES, targets=targets)
    with pytest.warns(FeatcacheWarning) as caught:
        train(tmp_path / "c.h5", tmp_path / "r", **SMALL)
    one_sided = "a|b\\c (never negative), mass (never positive)"
    (warning,) = caught
    wanted = f"cannot be learned from these rows to train on: {one_sided}"
    assert str(warning.message) == wanted
    assert caught[0].filename == __file__
    targets["train"][:, 2] = np.nan
    make_cache(tmp_path / "d.h5", SIZES, targets=targets)
    with pytest.raises(CacheError, match=r"found none of mass .*d\.h5.* select --classes"):
        train(tmp_path / "d.h5", tmp_path / "s", **SMALL)
    assert not (tmp_path / "s").exists()
    # what the hint says works
    select([tmp_path / "d.h5"], tmp_path / "e.h5", classes=["edema", "a|b\\c", "=rare"])
    with pytest.warns(FeatcacheWarning, match="cannot be learned"):
        train(tmp_path / "e.h5", tmp_path / "s", **SMALL)


SIZES = {"train": 60, "valid": 40, "test": 30}


def test_what_has_no_use_for_several_labels_is_refused(tmp_path: Path) -> None:
    make_cache(tmp_path / "c.h5", SIZES)
    with pytest.raises(ConfigError, match="expected one class per row, found several labels"):
        train(tmp_path / "c.h5", tmp_path / "r", hidden=(), optimizer="lbfgs", device="cpu")
    features, _, paths, _ = rows_of(0, 20)
    write_cache(tmp_path / "one.h5", features, np.eye(20)[:, :1], paths, classes=["edema"])
    with pytest.raises(
        CacheError, match=r"classes: expected two or more, found edema.* yes and no"
    ):
        train(tmp_path / "one.h5", tmp_path / "r", valid_fraction=0.3, **SMALL)


def test_many_classes_without_a_positive_row_to_choose_by(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    targets = {"train": rng.integers(0, 2, (40, 20)).astype("<f4"), "valid": np.zeros((9, 20))}
    write_cache(
        tmp_path / "c.h5", {name: rng.normal(size=(len(t), 6)).astype("<f4")
                            for name, t in targets.items()},
        targets, {name: [f"{name}{i}" for i in range(len(t))] for name, t in targets.items()},
        classes=[f"class {i}" for i in range(20)],
    )  # fmt: skip
    said: list[str] = []
    summary = train(tmp_path / "c.h5", tmp_path / "r", say=said.append, **SMALL)
    assert set(summary.valid_recall.values()) == {None}
    lines = [line for line in said if re.match(r" +\d+  ", line)]
    assert len(lines) == 4
    assert all(line.rstrip(" *").endswith("-") for line in lines)


@pytest.mark.parametrize("seed", range(3))
def test_a_hold_out_has_every_class_and_tears_no_group_apart(tmp_path: Path, seed: int) -> None:
    cache = make_cache(tmp_path / "c.h5", {"all": 200})
    parts = choose_rows(cache, 0.25, seed, silent)
    rows = [set(part.rows.tolist()) for part in parts]
    _, targets, paths = known_rows(cache, "all")
    split = cache.split("all")
    assert not rows[0] & rows[1]
    assert {split.paths[i] for i in rows[0] | rows[1]} == set(paths)
    groups = [{(split.groups or [])[i] for i in part} for part in rows]
    assert not groups[0] & groups[1]
    share = np.nansum(split.targets[sorted(rows[1])], 0) / np.nansum(targets, 0)
    assert ((share > 0.12) & (share < 0.4)).all(), share
    assert 0.2 < len(rows[1]) / len(targets) < 0.3
    summary = train(cache.path, tmp_path / "r", valid_fraction=0.25, data_seed=seed, **SMALL)
    assert summary.num_valid == len(rows[1])
    with pytest.warns(FeatcacheWarning, match="rows of all"):
        assert evaluate(tmp_path / "r", split="all")["num_samples"] == len(paths)


# --- evaluate


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
    assert [p.name for p in folder.iterdir()] == ["test.json"]  # no confusion matrix, no picture
    assert json.loads((folder / "test.json").read_text()) == result.as_dict()
    assert "16 unlabelled rows left out" not in said
    assert "9 unlabelled rows left out" in said
    assert any(line.split()[:3] == ["roc", "auc", f"{result['roc_auc']:.3f}"] for line in said)


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
    call("predict", run, "--cache", tmp_path / "c.h5", "--json", "--csv", tmp_path / "p.csv")
    printed = json.loads(capsys.readouterr().out)
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    of_probs = [f"prob_{name}" for name in CLASSES]
    assert list(lines[0]) == ["path", "preds", *of_probs, "failure"]
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
        assert set(row) == {"path", "preds", "probs"}
        assert (row["path"], row["preds"]) == (line["path"], names)
        assert split_names(plain_cell(line["preds"])) == set(names)
        np.testing.assert_allclose(row["probs"], probs, atol=1e-6)
        np.testing.assert_allclose([float(line[name]) for name in of_probs], probs, atol=1e-6)
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


# --- sweep


def read_scores(run: Path) -> list[float]:
    with (run / "trials.csv").open(newline="", encoding="utf-8") as file:
        return [float(row["score"]) for row in csv.DictReader(file)]


METRICS = ("loss", "accuracy", "roc_auc", "average_precision", "f1")


@pytest.fixture
def space(tmp_path: Path) -> Path:
    text = "hidden = [[4], []]\nlearning_rate = { low = 1e-3, high = 1e-2 }\nepochs = 2\n"
    (tmp_path / "s.toml").write_text(text, "utf-8")
    return tmp_path / "s.toml"


@pytest.mark.parametrize("metric", METRICS)
def test_a_trial_has_the_figure_that_scikit_learn_gives(
    tmp_path: Path, space: Path, metric: str
) -> None:
    cache = make_cache(tmp_path / "c.h5")
    options: dict[str, Any] = {"trials": 3, "repeats": 2, "space": space, "device": "cpu"}
    summary = sweep(cache.path, tmp_path / "r", metric=metric, **options)
    plain = train(cache.path, tmp_path / "plain", device="cpu")
    features, targets, _ = known_rows(cache, "valid")
    wanted = by_scikit_learn(targets, probs_of(load_run(tmp_path / "plain").state, features))
    scores = read_scores(tmp_path / "r")
    assert len(scores) == 3
    assert scores[0] == pytest.approx(wanted[metric], abs=1e-5)
    assert ("known targets" in summary.metric) == (metric in {"loss", "accuracy"})
    assert ("both answers" in summary.metric) == (metric not in {"loss", "accuracy"})
    assert summary.chosen == 0  # of heads as small as these none is better beyond doubt
    assert summary.weights_sha256 == plain.weights_sha256
    assert load_run(tmp_path / "r").task == "multilabel"
    assert evaluate(tmp_path / "r")["task"] == "multilabel"


def test_folds_are_by_groups_and_their_mean_is_the_score(tmp_path: Path, space: Path) -> None:
    cache = make_cache(tmp_path / "c.h5")
    parts = choose_rows(cache, None, 0, silent)
    pool = Pool.of(cache, parts)
    groups = [(part.split.groups or [])[row] for part in parts for row in part.rows]
    features, targets = (
        np.concatenate([known_rows(cache, name)[i] for name in ("train", "valid")]) for i in (0, 1)
    )
    scores, judged = [], []
    for train_rows, valid_rows in pool.make_folds(3, 0):
        assert not {groups[i] for i in train_rows} & {groups[i] for i in valid_rows}
        arrays = [a[rows] for rows in (train_rows, valid_rows) for a in (features, targets)]
        result = fit_head(
            HeadConfig(10, 4), TrainingConfig(), *arrays, seed=0, data_seed=0, device=CPU
        )
        probs = probs_of(result.state, features[valid_rows])
        scores.append(by_scikit_learn(targets[valid_rows], probs)["average_precision"])
        judged += valid_rows.tolist()
        positive = np.nansum(targets[valid_rows], 0) / np.nansum(targets, 0)
        assert ((positive > 0.15) & (positive < 0.55)).all(), positive
    assert sorted(judged) == list(range(215))
    sweep(
        cache.path, tmp_path / "r", trials=2, repeats=2, space=space, device="cpu", folds=3,
        metric="average_precision",
    )  # fmt: skip
    assert read_scores(tmp_path / "r")[0] == pytest.approx(np.mean(scores), abs=1e-5)
    sweep(
        cache.path, tmp_path / "s", trials=2, repeats=2, space=space, device="cpu", folds=3,
        metric="roc_auc", positive="=rare",
    )  # fmt: skip


def test_metrics_without_a_meaning_are_refused(tmp_path: Path, space: Path) -> None:
    targets = {name: rows_of(i, n)[1] for i, (name, n) in enumerate(SIZES.items())}
    targets["valid"][:, 3] = np.nan
    cache = make_cache(tmp_path / "c.h5", SIZES, targets=targets)
    options: dict[str, Any] = {"trials": 2, "repeats": 2, "space": space, "device": "cpu"}

    def refused(**more: Any) -> str:
        with pytest.raises(ConfigError) as caught, warnings.catch_warnings():
            sweep(cache.path, tmp_path / "r", **options, **more)
        assert not (tmp_path / "r").exists()
        assert not (tmp_path / "r.sweep").exists()
        return str(caught.value)

    listed = "expected for several labels per image one of " + ", ".join(METRICS)
    assert listed in refused(metric="balanced_accuracy")
    said = refused(metric="roc_auc", positive="=rare")
    assert "positive and negative rows of =rare in whatever is judged by, found one answer" in said
    sweep(cache.path, tmp_path / "r", metric="roc_auc", **options)  # of the other three
    # the one positive row of a class is in valid, but not in every new hold-out
    targets["train"][:, 3] = 0
    targets["valid"][:, 3] = [1, *[0] * 39]
    cache = make_cache(tmp_path / "d.h5", SIZES, targets=targets)
    with (
        pytest.warns(FeatcacheWarning, match="=rare .never positive"),
        pytest.raises(ConfigError, match="in whatever is judged by"),
    ):
        sweep(cache.path, tmp_path / "s", metric="f1", positive="=rare", **options)
    assert not (tmp_path / "s.sweep").exists()


def test_guessing_by_the_shares_of_the_known_answers(tmp_path: Path) -> None:
    from featcache.sweeps.trials import Judge

    train_targets = np.array([[1, 0, np.nan]] * 3 + [[0, np.nan, np.nan]] * 5)
    targets = np.array([[1, 1, 1], [0, np.nan, 0]])
    judge = Judge("loss", None, ("a", "b", "c"), CPU, task="multilabel")
    probs = np.array([4 / 10, 1 / 5, 1 / 2])  # Laplace's rule
    wanted = -np.log([probs[0], 1 - probs[0], probs[1], probs[2], 1 - probs[2]]).mean()
    assert judge.score_prior(train_targets, targets) == pytest.approx(wanted)
