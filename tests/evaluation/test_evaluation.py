from __future__ import annotations

import csv
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featcache.cache.reading import Cache, Failure
from featcache.cache.writing import SplitRows, write_cache, write_rows
from featcache.deployment.predictions import predict
from featcache.errors import CacheError, ConfigError, FeatcacheWarning, RunError
from featcache.evaluation.evaluation import evaluate
from featcache.heads.run import load_head, load_run
from featcache.heads.training import train
from featcache.metrics.areas import auc_interval

IDENTITY = {"backbone": "fake", "image_size": 32}
CLASSES = ("covid", "normal")


def arrays(targets: Any, seed: int, width: int = 10) -> tuple[Any, Any, list[str]]:
    targets = np.asarray(targets, np.int64)
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(len(targets), width)).astype("<f4")
    features[np.arange(len(targets)), np.maximum(targets, 0)] += 1
    return features, targets, [f"{seed}/{i:04d}.png" for i in range(len(targets))]


def make_cache(
    path: Path, splits: dict[str, Any], classes: Any = CLASSES, identity: Any = IDENTITY
) -> Cache:
    """A cache of made-up features; the same split name gives the same rows."""
    order = ("train", "valid", "test", "all")
    parts = {name: arrays(targets, order.index(name)) for name, targets in splits.items()}
    columns = [{name: part[i] for name, part in parts.items()} for i in range(3)]
    return write_cache(path, *columns, classes=classes, identity=identity, overwrite=True)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run on c.h5, whose split test has 40 rows, half of each class."""
    splits = {"train": [0, 1] * 60, "valid": [0, 1] * 20, "test": [0, 1] * 20}
    make_cache(tmp_path / "c.h5", splits)
    train(tmp_path / "c.h5", tmp_path / "r", hidden=(8,), epochs=3, device="cpu")
    return tmp_path / "r"


def probs_of(run: Path, features: Any) -> Any:
    """Softmax of the head by NumPy alone: an independent forward pass."""
    state = {k: v.double().numpy() for k, v in load_head(load_run(run)).state_dict().items()}

    def norm(x: Any, i: int) -> Any:
        scaled = (x - state[f"{i}.running_mean"]) / np.sqrt(state[f"{i}.running_var"] + 1e-5)
        return scaled * state[f"{i}.weight"] + state[f"{i}.bias"]

    x = norm(features.astype("f8"), 0) @ state["1.weight"].T + state["1.bias"]
    x = norm(np.maximum(x, 0), 3) @ state["5.weight"].T + state["5.bias"]
    powers = np.exp(x - x.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def test_result_is_the_contracts_object_and_true(run: Path) -> None:
    result = evaluate(run)
    assert list(result) == [
        "split", "task", "num_samples", "classes", "accuracy", "balanced_accuracy", "roc_auc",
        "average_precision", "per_class", "confusion_matrix", "confusion_matrix_file",
        "positive", "sensitivity",
        "specificity", "positive_roc_auc", "positive_average_precision", "false_negatives",
        "mistakes", "num_failed", "num_trained_on", "num_chosen_by", "num_unclear", "unseen",
        "intervals", "calibration", "decision", "by", "against", "num_views", "fingerprint",
    ]  # fmt: skip
    features, targets, paths = arrays([0, 1] * 20, 2)
    probs = probs_of(run, features)
    preds = probs.argmax(1)
    wrong = np.flatnonzero(preds != targets)
    assert 0 < len(wrong) < 40  # or this test shows nothing
    assert (result["split"], result["num_samples"], [*result.classes]) == (
        "test", 40, ["covid", "normal"],
    )  # fmt: skip
    assert result["accuracy"] == pytest.approx((preds == targets).mean())
    confusion = [[int(((targets == i) & (preds == j)).sum()) for j in (0, 1)] for i in (0, 1)]
    assert result["confusion_matrix"] == confusion
    surest_first = sorted(wrong, key=lambda i: -probs[i].max())
    assert [row["path"] for row in result["mistakes"]] == [paths[i] for i in surest_first]
    assert [row["prob"] for row in result["mistakes"]] == pytest.approx(
        [probs[i].max() for i in surest_first], abs=1e-5
    )
    first, row = surest_first[0], result["mistakes"][0]
    assert (row["target"], row["pred"]) == (CLASSES[targets[first]], CLASSES[preds[first]])
    for key in ("positive", "sensitivity", "specificity", "false_negatives"):
        assert result[key] is None


@pytest.mark.parametrize("positive", CLASSES)
def test_positive_class_gives_its_false_negatives(run: Path, positive: str) -> None:
    result = evaluate(run, positive=positive)
    index = CLASSES.index(positive)
    matrix = result["confusion_matrix"]
    missed = [row["path"] for row in result["mistakes"] if row["target"] == positive]
    assert result["positive"] == positive
    assert result["false_negatives"] == sorted(missed)
    assert len(missed) == matrix[index][1 - index]
    assert result["sensitivity"] == pytest.approx(1 - len(missed) / 20)
    assert result["specificity"] == pytest.approx(matrix[1 - index][1 - index] / 20)


def test_a_positive_class_of_three_is_said_and_its_missed_rows_are_listed(tmp_path: Path) -> None:
    splits = {"train": [0, 1, 2] * 30, "valid": [0, 1, 2] * 9, "test": [0, 1, 2] * 15}
    make_cache(tmp_path / "c.h5", splits, classes=("covid", "normal", "other"))
    train(tmp_path / "c.h5", tmp_path / "r", hidden=(8,), epochs=2, device="cpu")
    said: list[str] = []
    result = evaluate(tmp_path / "r", positive="other", say=said.append)
    missed = [row["path"] for row in result["mistakes"] if row["target"] == "other"]
    assert result["false_negatives"] == sorted(missed)
    assert missed
    (a, b, _), (c, d, _), (_, _, e) = result["confusion_matrix"]
    assert result["sensitivity"] == pytest.approx(e / 15)
    assert result["specificity"] == pytest.approx((a + b + c + d) / 30)
    macro, own = result["average_precision"], result["positive_average_precision"]
    assert f"  average precision  {macro:.3f} (mean of the classes)" in said
    assert "  positive class     other against the rest" in said
    assert f"  its avg. precision {own:.3f}" in said
    assert f"  false negatives    {len(missed)}" in said


def test_positive_class_is_never_guessed(run: Path) -> None:
    for wrong in ("1", "COVID", ""):
        with pytest.raises(ConfigError, match="--positive: expected one of covid, normal"):
            evaluate(run, positive=wrong)


@pytest.mark.usefixtures("drawn")
def test_files_hold_the_result_and_the_picture(run: Path) -> None:
    result = evaluate(run)
    folder = run / "evaluation"
    pictures = [f"test_{name}.png" for name in ("confusion", "reliability", "roc")]
    assert sorted(p.name for p in folder.iterdir()) == ["test.json", *pictures]
    assert json.loads((folder / "test.json").read_text()) == result.as_dict()
    for path in [run / "loss_curves.png", *(folder / name for name in pictures)]:
        with Image.open(path) as image:
            assert image.format == "PNG"
    with pytest.warns(FeatcacheWarning, match="was chosen by 40 of the 40 rows of valid"):
        evaluate(run, split="valid")
    assert len(list(folder.iterdir())) == 8


def test_csv_has_every_labelled_row(run: Path, tmp_path: Path) -> None:
    features, targets, paths = arrays([0, 1, -1] * 4, 3)
    paths[4] = "=cmd()"
    groups = [f"p{i // 2}" for i in range(12)]
    write_cache(
        tmp_path / "o.h5", features, targets, paths, classes=CLASSES, groups=groups,
        identity=IDENTITY,
    )  # fmt: skip
    said: list[str] = []
    options: dict[str, Any] = {"cache": tmp_path / "o.h5", "split": "all", "say": said.append}
    result = evaluate(run, csv=tmp_path / "o.csv", **options)
    assert result["num_samples"] == 8
    assert "4 unlabelled rows left out" in said
    with (tmp_path / "o.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "group", "target", "pred", "prob_covid", "prob_normal"]
    assert len(rows) == 8
    probs = probs_of(run, features)
    for row in rows:
        index = paths.index(row["path"].lstrip("'"))
        assert (row["group"], row["target"]) == (groups[index], CLASSES[targets[index]])
        assert row["pred"] == CLASSES[probs[index].argmax()]
        found = [float(row["prob_covid"]), float(row["prob_normal"])]
        assert found == pytest.approx(probs[index], abs=1e-5)
    assert any(row["path"].startswith("'=") for row in rows)
    known = targets >= 0
    expected = auc_interval(targets[known] == 1, probs[known, 1], groups=[*np.array(groups)[known]])
    assert result["intervals"]["roc_auc"] == pytest.approx(expected, abs=1e-5)
    for bad in (tmp_path, tmp_path / "none" / "o.csv"):
        with pytest.raises(ConfigError, match="--csv"):
            evaluate(run, csv=bad, **options)


def test_classes_of_another_cache_are_matched_by_name(run: Path, tmp_path: Path) -> None:
    own = evaluate(run)
    features, targets, paths = arrays([0, 1] * 20, 2)
    turned = {"test": 1 - targets}
    write_cache(
        tmp_path / "turned.h5", {"test": features}, turned, {"test": paths},
        classes=("normal", "covid"), identity=IDENTITY,
    )  # fmt: skip
    other = evaluate(run, cache=tmp_path / "turned.h5")
    differing = [k for k in own if own[k] != other[k]]
    assert differing == ["fingerprint"] or differing == []

    covid = targets == 0
    write_cache(
        tmp_path / "covid.h5", features[covid], targets[covid],
        [p for p, c in zip(paths, covid, strict=True) if c], classes=("covid",), identity=IDENTITY,
    )  # fmt: skip
    said: list[str] = []
    options: dict[str, Any] = {"split": "all", "positive": "covid", "say": said.append}
    subset = evaluate(run, cache=tmp_path / "covid.h5", **options)
    assert subset["accuracy"] == pytest.approx(own["per_class"]["covid"]["recall"])
    assert (subset["roc_auc"], subset["specificity"]) == (None, None)
    assert [subset["intervals"][key] for key in ("roc_auc", "positive_roc_auc")] == [None, None]
    assert subset["confusion_matrix"][1] == [0, 0]
    assert any("has no class normal" in line for line in said)


def test_a_class_the_run_does_not_know_is_refused(run: Path, tmp_path: Path) -> None:
    make_cache(tmp_path / "o.h5", {"test": [0, 1, 0]}, classes=("covid", "pneumonia"))
    with pytest.raises(RunError, match="those of the run, covid, normal, found also pneumonia"):
        evaluate(run, cache=tmp_path / "o.h5")
    assert not (run / "evaluation").exists()


def test_other_features_are_refused_and_other_dtypes_said(run: Path, tmp_path: Path) -> None:
    other = IDENTITY | {"backbone": "another", "image_size": 64}
    make_cache(tmp_path / "o.h5", {"test": [0, 1] * 3}, identity=other)
    with pytest.raises(RunError, match="backbone fake, image_size 32, found backbone another"):
        evaluate(run, cache=tmp_path / "o.h5")
    features, targets, paths = arrays([0, 1] * 9, 3)
    half = features.astype("<f2")
    write_cache(tmp_path / "h.h5", half, targets, paths, classes=CLASSES, identity=IDENTITY)
    with pytest.warns(FeatcacheWarning, match="feature_dtype float16"):
        found = evaluate(run, cache=tmp_path / "h.h5", split="all")
    preds = probs_of(run, half).argmax(1)
    assert found["accuracy"] == pytest.approx((preds == targets).mean())


@pytest.mark.parametrize("targets", [[0, 1] * 30, [-1, 0, 1] * 20])
def test_of_rows_with_views_the_plain_one_counts(
    run: Path, tmp_path: Path, targets: list[int]
) -> None:
    features, wanted, paths = arrays(targets, 4)
    others = np.random.default_rng(0).normal(size=(60, 3, 10)).astype("<f4")
    views = np.concatenate([features[:, None], others], axis=1)
    identity = IDENTITY | {"views": 4, "augmentation": "crop"}
    write_cache(tmp_path / "v.h5", views, wanted, paths, classes=CLASSES, identity=identity)
    with pytest.warns(FeatcacheWarning, match="augmentation crop, views 4"):
        found = evaluate(run, cache=tmp_path / "v.h5", split="all", csv=tmp_path / "v.csv")
    known = wanted >= 0
    probs = probs_of(run, features[known])
    assert found["accuracy"] == pytest.approx((probs.argmax(1) == wanted[known]).mean())
    rows = list(csv.DictReader((tmp_path / "v.csv").read_text("utf-8").splitlines()))
    np.testing.assert_allclose([float(r["prob_covid"]) for r in rows], probs[:, 0], atol=1e-5)
    with pytest.warns(FeatcacheWarning, match="views 4"):
        predictions = predict(run, cache=tmp_path / "v.h5")
    np.testing.assert_allclose(predictions.probs, probs_of(run, features), atol=1e-5)


def test_the_runs_own_cache_is_known_by_its_content(run: Path, tmp_path: Path) -> None:
    shutil.copy(tmp_path / "c.h5", tmp_path / "copy.h5")
    for name in ("c.h5", "copy.h5"):
        said: list[str] = []
        with pytest.warns(FeatcacheWarning, match="trained on 120 of the 120 rows of train"):
            named = evaluate(run, cache=tmp_path / name, split="train", say=said.append)
        assert not any("not kept" in line for line in said)
        assert json.loads((run / "evaluation/train.json").read_text()) == named.as_dict()
        shutil.rmtree(run / "evaluation")
    make_cache(tmp_path / "o.h5", {"test": [0, 1] * 9})
    evaluate(run, cache=tmp_path / "o.h5")
    assert not (run / "evaluation").exists()


def test_rows_of_another_shape_are_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Earlier versions wrote such caches.
    monkeypatch.setattr("featcache.cache.writing.check_identity", lambda *_: None)
    features, targets, paths = arrays([0, 1] * 4, 3, width=11)
    identity = IDENTITY | {"num_features": 10}
    for name, array in (("wide", features), ("views", features[:, None])):
        path = tmp_path / f"{name}.h5"
        write_cache(path, array, targets, paths, classes=CLASSES, identity=identity)
        with pytest.raises(RunError, match="features: expected 10 per image, found 1"):
            evaluate(run, cache=path, split="all")
    labels = np.eye(2)[targets]
    write_cache(
        tmp_path / "m.h5", features[:, :10], labels, paths, classes=CLASSES, identity=IDENTITY
    )
    with pytest.raises(CacheError, match=r"expected a multiclass cache.* found a multilabel one"):
        evaluate(run, cache=tmp_path / "m.h5", split="all")


def test_a_missing_split_names_those_that_exist(run: Path) -> None:
    with pytest.raises(CacheError, match=r"one of train, valid, test, found all .*--split"):
        evaluate(run, split="all")


def test_a_cache_that_is_gone_or_of_another_identity_is_refused(run: Path, tmp_path: Path) -> None:
    splits = {"train": [0, 1] * 60, "valid": [0, 1] * 20, "test": [0, 1] * 20}
    make_cache(tmp_path / "c.h5", splits, identity=IDENTITY | {"image_size": 64})
    with pytest.raises(RunError, match=r"rebuilt since .* image_size 64 .*c\.h5.*--cache"):
        evaluate(run)
    (tmp_path / "c.h5").rename(tmp_path / "moved.h5")
    with pytest.raises(RunError, match=r"found no such file .*c\.h5.*--cache"):
        evaluate(run)


def test_a_cache_with_other_rows_is_warned_of_and_moving_both_is_not(
    run: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in ("c.h5", "r"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(tmp_path / "elsewhere" / "r")
    make_cache(tmp_path / "elsewhere" / "c.h5", {"train": [0, 1] * 60, "test": [0, 1] * 15})
    with pytest.warns(FeatcacheWarning, match="has changed since the training"):
        assert evaluate(tmp_path / "elsewhere" / "r")["num_samples"] == 30


def rows(targets: Any, features: Any = None) -> SplitRows:
    made, targets, paths = arrays(targets, 2)
    features = made if features is None else features
    return SplitRows(
        features.shape, features.dtype, lambda: [features], targets, paths, None,
        np.zeros((len(targets), 32), np.uint8), *np.zeros((2, len(targets)), np.int64),
    )  # fmt: skip


def write_test(path: Path, split: SplitRows, failures: Any = ()) -> Path:
    identity = IDENTITY | {"num_features": 10, "feature_dtype": "float32"}
    write_rows(
        path, {"test": split}, identity=identity, provenance={}, classes=CLASSES,
        task="multiclass", failures=failures,
    )  # fmt: skip
    return path


def test_failures_of_the_split_are_counted(run: Path, tmp_path: Path) -> None:
    failures = [
        Failure(f"{split}/{i}.png", split, 0, "cut short", 1, 1)
        for split, count in (("train", 3), ("test", 2))
        for i in range(count)
    ]
    said: list[str] = []
    cache = write_test(tmp_path / "o.h5", rows([0, 1] * 20), failures)
    assert evaluate(run, cache=cache, say=said.append)["num_failed"] == 2
    assert "40 images of test, 2 more could not be read" in said


def test_rows_that_cannot_be_measured_are_refused(run: Path, tmp_path: Path) -> None:
    unlabelled = write_test(tmp_path / "u.h5", rows([-1] * 40))
    with pytest.raises(CacheError, match="split test: expected labelled rows, found none"):
        evaluate(run, cache=unlabelled)
    features = arrays([0, 1] * 20, 2)[0]
    features[7, 1] = np.nan
    broken = write_test(tmp_path / "n.h5", rows([-1] + [0, 1] * 19 + [0], features))
    with pytest.raises(CacheError, match=r"NaN or infinity in row 7, 2/0007\.png"):
        evaluate(run, cache=broken)
    with pytest.raises(CacheError, match=r"NaN or infinity in row 7, 2/0007\.png"):
        predict(run, cache=broken)


def test_a_damaged_run_is_refused(run: Path) -> None:
    file = run / "head.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(RunError, match="expected sha256"):
        evaluate(run)


@pytest.mark.usefixtures("drawn")
def test_lines_are_readable_and_safe(tmp_path: Path) -> None:
    classes = ("covid\x1b[31m", "normal $x^")
    make_cache(tmp_path / "c.h5", {"train": [0, 1] * 9, "valid": [0, 1] * 9, "test": [0, 1] * 30},
               classes=classes)  # fmt: skip
    train(tmp_path / "c.h5", tmp_path / "r", hidden=(), epochs=1, device="cpu")
    said: list[str] = []
    result = evaluate(tmp_path / "r", positive=classes[0], say=said.append)
    assert len(result["mistakes"]) > 10
    text = "\n".join(said)
    assert "\x1b" not in text
    evaluate(tmp_path / "r", csv=tmp_path / "e.csv")
    with pytest.warns(FeatcacheWarning, match="was trained on"):
        predict(tmp_path / "r", cache=tmp_path / "c.h5", csv=tmp_path / "p.csv")
    for name in ("e.csv", "p.csv"):  # the same columns in both
        header = (tmp_path / name).read_text("utf-8").splitlines()[0]
        assert "prob_covid\\x1b[31m,prob_normal $x^" in header
    assert f"{len(result['mistakes'])} mistakes, the 10 most confident:" in said
    low, high = result["intervals"]["sensitivity"]
    assert 0 < low < result["sensitivity"] < high < 1
    shown = f"{result['sensitivity']:.3f} ({low:.3f} to {high:.3f})"
    assert any(line.startswith(f"  sensitivity        {shown}, ") for line in said)
    low, high = result["intervals"]["positive_roc_auc"]
    assert 0 < low < result["positive_roc_auc"] < high <= 1
    assert result["intervals"]["roc_auc"] == pytest.approx([low, high], abs=1e-6)
    shown = f"{result['roc_auc']:.3f} ({low:.3f} to {high:.3f})"
    assert f"  its roc auc        {shown}" in said
    assert f"  roc auc            {shown} (mean of the classes)" in said
    assert max(map(len, said[:-1])) <= 100


def with_views(path: Path, splits: dict[str, Any], num_views: int) -> dict[str, Any]:
    """Write a cache whose rows have views; return the views (N, V, D) of each split."""
    views, columns = {}, [dict[str, Any](), dict[str, Any](), dict[str, Any]()]
    for name, targets in splits.items():
        parts = [arrays(targets, seed) for seed in range(5, 5 + num_views)]
        views[name] = np.stack([part[0] for part in parts], 1)
        for column, value in zip(columns, (views[name], parts[0][1], parts[0][2]), strict=True):
            column[name] = value
    columns[2] = {name: [f"{name}/{path}" for path in paths] for name, paths in columns[2].items()}
    write_cache(path, *columns, classes=CLASSES, identity=IDENTITY)
    return views


def test_views_are_averaged_when_asked(run: Path, tmp_path: Path) -> None:
    targets = [0, 1, 1, -1] * 15
    views = with_views(tmp_path / "v.h5", {"all": targets}, 3)["all"]
    of_views = np.stack([probs_of(run, views[:, i]) for i in range(3)])
    labelled = np.array(targets) >= 0
    means = of_views.mean(0)
    assert (means.argmax(1) != of_views[0].argmax(1)).any()  # or this test shows nothing
    said: list[str] = []
    for average, probs, number in ((True, means, 3), (False, of_views[0], 1)):
        said.clear()
        csv_file = tmp_path / f"{average}.csv"
        result = evaluate(
            run, cache=tmp_path / "v.h5", split="all", average_views=average, csv=csv_file,
            say=said.append,
        )  # fmt: skip
        assert result["num_views"] == number
        right = probs.argmax(1)[labelled] == np.array(targets)[labelled]
        assert result["accuracy"] == pytest.approx(right.mean())
        assert any("mean of 3 views each" in line for line in said) == average
        with csv_file.open(newline="") as file:
            found = [[float(row["prob_covid"]), float(row["prob_normal"])]
                     for row in csv.DictReader(file)]  # fmt: skip
        np.testing.assert_allclose(found, probs[labelled], atol=1e-6)
        predictions = predict(run, cache=tmp_path / "v.h5", average_views=average)
        np.testing.assert_allclose(predictions.probs, probs, atol=1e-6)
        assert predictions.as_dict()["average_views"] is average


def test_without_views_there_is_nothing_to_average(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--average-views: expected several .* one in test"):
        evaluate(run, average_views=True)
    with pytest.raises(ConfigError, match=r"--average-views: .* found one in every split"):
        predict(run, cache=tmp_path / "c.h5", average_views=True)
    assert not (run / "evaluation").exists()
