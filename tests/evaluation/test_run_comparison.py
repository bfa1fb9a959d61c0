"""evaluate --against: two runs on the same rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from featcache.cache.reading import Cache, open_cache
from featcache.cache.writing import SplitRows, write_cache, write_rows
from featcache.errors import ConfigError, FeatcacheWarning, RunError
from featcache.evaluation.comparison import compare_rows, comparison_lines
from featcache.evaluation.evaluation import evaluate
from featcache.evaluation.predicted_rows import PredictedRows
from featcache.heads.training import train
from featcache.metrics.areas import compare_auc, mcnemar

CLASSES = ["covid", "normal"]
SPLITS = {"train": 40, "valid": 20, "test": 50}


def cache_of(path: Path, width: int, noise: float, **change: Any) -> Cache:
    """Write features of the same images, made by a backbone of its own for each width."""
    rng = np.random.default_rng(width)
    targets = {name: np.arange(number) % 2 for name, number in SPLITS.items()}
    features = {
        name: (noise * rng.normal(size=(len(t), width)) + t[:, None]).astype("<f4")
        for name, t in targets.items()
    }
    options: dict[str, Any] = {
        "features": features, "targets": targets, "classes": CLASSES,
        "paths": {name: [f"{name}/{i:02d}" for i in range(n)] for name, n in SPLITS.items()},
        "groups": {name: [f"{name}{i // 3}" for i in range(n)] for name, n in SPLITS.items()},
        "identity": {"backbone": f"fake{width}"},
    }  # fmt: skip
    return write_cache(path, overwrite=True, **(options | change))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on one cache, and a third on features of another backbone."""
    folder = tmp_path_factory.mktemp("against")
    cache_of(folder / "a.h5", 4, 1.5)
    cache_of(folder / "b.h5", 3, 1.0)
    for cache, name, seed in (("a", "one", 0), ("a", "two", 5), ("b", "three", 0)):
        train(folder / f"{cache}.h5", folder / name, hidden=(), epochs=1, seed=seed, device="cpu")
    return folder


def predictions(run: Path, csv: Path, **options: Any) -> tuple[Any, Any]:
    """Return targets and probabilities of normal, from the CSV of an evaluation."""
    evaluate(run, csv=csv, **options)
    table = np.genfromtxt(csv, delimiter=",", names=True, dtype=None, encoding=None)
    return (table["target"] == "normal").astype(int), table["prob_normal"]


@pytest.mark.parametrize("other", ["two", "three"])
def test_the_comparison_is_that_of_the_two_runs_predictions(
    folder: Path, tmp_path: Path, other: str
) -> None:
    """One has the same features, one its own cache of the same images."""
    said: list[str] = []
    result = evaluate(
        folder / "one", against=folder / other, positive="normal", say=said.append
    ).as_dict()
    targets, first = predictions(folder / "one", tmp_path / "1.csv")
    _, second = predictions(folder / other, tmp_path / "2.csv")
    facts, names = result["against"], [f"test{i // 3}" for i in range(50)]
    assert (facts["num_samples"], facts["num_groups"]) == (50, 17)
    area = facts["roc_auc"]
    assert area["first"] == pytest.approx(roc_auc_score(targets, first))
    assert area["second"] == pytest.approx(roc_auc_score(targets, second))
    expected = compare_auc(targets == 1, first, second, names)
    found = area["difference"], *area["interval"], area["p_value"]
    assert found == pytest.approx(tuple(expected), abs=1e-9)
    right = [(probs > 0.5) == (targets == 1) for probs in (first, second)]
    assert facts["accuracy"] == {
        "first": pytest.approx(right[0].mean()), "second": pytest.approx(right[1].mean()),
        "only_first": (right[0] & ~right[1]).sum(), "only_second": (right[1] & ~right[0]).sum(),
        "p_value": mcnemar(*right, names),
    }  # fmt: skip
    assert right[0].tolist() != right[1].tolist()  # or this test shows little
    for name, side in (("sensitivity", targets == 1), ("specificity", targets == 0)):
        assert facts[name]["first"] == pytest.approx(result[name]) == right[0][side].mean()
        assert facts[name]["second"] == pytest.approx(right[1][side].mean())
    text = "\n".join(said)
    assert f"this run against {(folder / other).as_posix()}, on the same 50 images" in text
    assert f"  difference   {area['difference']:+.3f} (" in text


def test_a_run_against_itself_differs_by_nothing(folder: Path) -> None:
    facts = evaluate(folder / "one", against=folder / "one").against
    assert facts is not None
    assert facts["accuracy"]["p_value"] == facts["roc_auc"]["p_value"] == 1
    assert facts["accuracy"]["only_first"] == facts["roc_auc"]["difference"] == 0
    assert facts["sensitivity"] is facts["specificity"] is None


def test_lines_have_80_columns() -> None:
    rng, targets = np.random.default_rng(3), np.arange(9000) % 2
    groups = [f"p{i // 2}" for i in range(9000)]
    first = PredictedRows(
        ("a", "b"), groups, groups, targets, rng.dirichlet(np.ones(2), 9000)
    )  # fmt: skip
    second = replace(first, probs=rng.dirichlet(np.ones(2), 9000))
    lines = [*comparison_lines(compare_rows(first, second, "other", "a"))]
    assert max(map(len, lines)) <= 80
    assert " ".join(map(str.strip, lines)).count("McNemar p") == 3


def test_without_groups_the_tests_are_mcnemars_and_delongs() -> None:
    rng = np.random.default_rng(3)
    targets = np.arange(80) % 3
    probs = rng.dirichlet(np.ones(3), 80)
    first = PredictedRows(("a", "b", "c"), ["x"] * 80, [""] * 80, targets, probs)
    second = replace(first, probs=rng.dirichlet(np.ones(3), 80))
    facts = compare_rows(first, second, "other", None)
    assert (facts["num_groups"], facts["roc_auc"]) == (None, None)
    assert facts["test"] == "McNemar, exact"
    counts = [facts["accuracy"][f"only_{name}"] for name in ("first", "second")]
    expected = stats.binomtest(counts[0], sum(counts)).pvalue
    assert facts["accuracy"]["p_value"] == pytest.approx(expected)
    of_b = compare_rows(first, second, "other", "b")["roc_auc"]
    assert of_b["first"] == pytest.approx(roc_auc_score(targets == 1, probs[:, 1]))
    labels = replace(first, targets=np.eye(3)[targets])
    of_labels = compare_rows(labels, replace(labels, probs=second.probs), "other", "b")
    assert of_labels["accuracy"] is None
    assert of_labels["roc_auc"] == of_b


def test_classes_in_another_order_are_matched_by_name(folder: Path, tmp_path: Path) -> None:
    turned = {name: 1 - np.arange(number) % 2 for name, number in SPLITS.items()}
    rng, plain = np.random.default_rng(3), {}
    for name, number in SPLITS.items():  # the features of b.h5
        target = np.arange(number) % 2
        plain[name] = (rng.normal(size=(number, 3)) + target[:, None]).astype("<f4")
    cache_of(tmp_path / "t.h5", 3, 1.0, features=plain, targets=turned, classes=CLASSES[::-1])
    train(tmp_path / "t.h5", tmp_path / "t", hidden=(), epochs=1, device="cpu")
    facts = evaluate(folder / "one", against=tmp_path / "t", positive="covid").against
    assert facts is not None
    alone = evaluate(tmp_path / "t", positive="covid")
    assert facts["sensitivity"]["second"] == pytest.approx(alone.sensitivity)
    assert facts["roc_auc"]["second"] == pytest.approx(alone.positive_roc_auc)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paths": {n: [f"{n}/x{i}" for i in range(k)] for n, k in SPLITS.items()}},
         r"the same 50 images in split test .* found 50 are not there, such as test/00 \("),
        ({"targets": {n: (np.arange(k) // 2) % 2 for n, k in SPLITS.items()}},
         "expected a cache with the same targets, found another for test/01"),
        ({"classes": ["covid", "other"]}, "a multiclass run of covid, normal, found a multiclass"),
    ],
)  # fmt: skip
def test_other_rows_or_classes_are_refused_in_one_line(
    folder: Path, tmp_path: Path, change: Any, message: str
) -> None:
    cache_of(tmp_path / "o.h5", 5, 1.0, **change)
    train(tmp_path / "o.h5", tmp_path / "o", hidden=(), epochs=1, device="cpu")
    with pytest.raises(RunError, match=message) as found:
        evaluate(folder / "one", against=tmp_path / "o")
    assert "\n" not in str(found.value)


def test_another_image_under_the_same_path_is_refused(tmp_path: Path) -> None:
    for name, width in (("a", 4), ("b", 3)):
        cache, rows = cache_of(tmp_path / f"{name}.h5", width, 1.0), {}
        for split_name, split in cache.splits.items():
            rng = np.random.default_rng(SPLITS[split_name])
            hashes = rng.integers(1, 256, (len(split), 32), np.uint8)
            hashes[9:11] ^= width  # of these two the images differ
            if name == "a":
                hashes[15:20] = 0  # of these it is not known
            features = np.array(split.features)
            rows[split_name] = SplitRows(
                features.shape, features.dtype, lambda features=features: [features],
                np.array(split.targets), split.paths, split.groups, hashes,
                np.array(split.image_bytes), np.array(split.mtime_ns),
            )  # fmt: skip
        write_rows(cache.path, rows, identity=cache.identity, provenance={}, classes=CLASSES,
                   task="multiclass")  # fmt: skip
        train(tmp_path / f"{name}.h5", tmp_path / name, hidden=(), epochs=1, device="cpu")
    with pytest.raises(RunError, match="found 2 are other images, such as test/09"):
        evaluate(tmp_path / "a", against=tmp_path / "b")


def test_rows_that_the_second_run_has_seen_are_warned_of_or_left_out(
    folder: Path, tmp_path: Path
) -> None:
    of_test = np.array(open_cache(folder / "a.h5").split("test").features)
    features = {"train": of_test[:30], "valid": of_test[30:40], "test": of_test}
    write_cache(
        tmp_path / "s.h5", features, {n: np.arange(len(f)) % 2 for n, f in features.items()},
        {n: [f"{n}/{i:02d}" for i in range(len(f))] for n, f in features.items()},
        classes=CLASSES, identity={"backbone": "fake4"},
    )  # fmt: skip
    train(tmp_path / "s.h5", tmp_path / "s", hidden=(), epochs=1, device="cpu")
    with pytest.warns(FeatcacheWarning, match=r"trained on 30 and was chosen by 10 of the 50 rows "
                      r"of test: the figures of .*/s are too good"):  # fmt: skip
        evaluate(folder / "one", against=tmp_path / "s")
    said: list[str] = []
    left = evaluate(folder / "one", against=tmp_path / "s", unseen=True, say=said.append)
    assert said[1].startswith(f"rows left out: 30 that the head of {tmp_path / 's'} was trained on")
    assert left.against is not None
    assert left.num_samples == left.against["num_samples"] == 10


def test_labels_need_a_positive_class(tmp_path: Path) -> None:
    labels = {n: np.eye(2, dtype="<f4")[np.arange(k) % 2] for n, k in SPLITS.items()}
    cache_of(tmp_path / "m.h5", 4, 1.0, targets=labels)
    for name, seed in (("m", 0), ("n", 1)):
        train(tmp_path / "m.h5", tmp_path / name, hidden=(), epochs=1, seed=seed, device="cpu")
    with pytest.raises(ConfigError, match="--against: expected --positive where images have"):
        evaluate(tmp_path / "m", against=tmp_path / "n")
    facts = evaluate(tmp_path / "m", against=tmp_path / "n", positive="covid").against
    assert facts is not None
    assert facts["accuracy"] is None
    assert facts["sensitivity"] is not None
