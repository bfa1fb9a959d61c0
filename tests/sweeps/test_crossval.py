"""Out-of-fold probabilities: whose rows, whose heads, which files."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_labels
from sample_crossval import LBFGS, SMALL, crossval_small, grouped_cache, read_probs, read_rows
from sample_rows import array_of, edited, make_cache, rows_of
from scipy import stats
from sklearn import metrics

from featcache.cache.reading import Cache
from featcache.cli import main as cli
from featcache.errors import FeatcacheWarning
from featcache.evaluation.evaluation import evaluate
from featcache.heads.training import train
from featcache.metrics.rates import grouped_rate_interval, mean_rate_interval
from featcache.sweeps.crossval import CrossvalSummary, crossval
from featcache.sweeps.folds import Pair, Pool


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return grouped_cache(tmp_path / "c.h5")


@pytest.fixture
def go(tmp_path: Path, cache: Cache) -> Callable[..., CrossvalSummary]:
    """Cross-validate the cache in four folds."""
    return functools.partial(crossval_small, tmp_path)


def fold_cache(path: Path, cache: Cache, rows: list[dict[str, str]], fold: str) -> Cache:
    """Write the rows outside a fold as ``train`` and those of the fold as ``test``.

    A row's path begins with its split, as crossval names rows.
    """
    taken: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for row in rows:
        number = cache.split(row["split"]).paths.index(row["path"])
        taken["test" if row["fold"] == fold else "train"].append((row["split"], number))
    splits = {}
    for name, numbers in taken.items():
        sources = [(cache.split(split), n) for split, n in numbers]
        features = np.stack([s.features[n] for s, n in sources])
        made = rows_of(name, [s.targets[n] for s, n in sources], width=features.shape[1])
        splits[name] = edited(
            made, features=features, paths=[f"{s.name}/{s.paths[n]}" for s, n in sources],
            groups=[(s.groups or [])[n] for s, n in sources],
            image_sha256=np.stack([s.image_sha256[n] for s, n in sources]),
        )  # fmt: skip
    return make_cache(path, **splits)


# --- whose heads


@pytest.mark.parametrize("options", [SMALL, LBFGS], ids=["default", "lbfgs"])
@pytest.mark.parametrize("share", [None, 0.3])
def test_a_fold_is_what_train_and_evaluate_make_of_its_rows(
    tmp_path: Path, cache: Cache, options: dict[str, Any], share: float | None
) -> None:
    """By the plain path: a cache without the fold, a run, its probabilities of the fold."""
    number, seeds = 3, {"seed": 5, "data_seed": 2}
    made = crossval(
        cache.path, tmp_path / "f", folds=number, valid_fraction=share, **seeds, **options
    )
    rows = read_rows(tmp_path / "f")
    wanted_share = share or 23 / 80  # of valid in train and valid, labelled
    assert made.valid_fraction == pytest.approx(wanted_share)
    for fold in range(1, number + 1):
        own = fold_cache(tmp_path / f"{fold}.h5", cache, rows, str(fold))
        run = tmp_path / f"run{fold}"
        summary = train(own.path, run, valid_fraction=made.valid_fraction, **seeds, **options)
        evaluate(run, csv=tmp_path / "plain.csv")
        with (tmp_path / "plain.csv").open(newline="", encoding="utf-8") as file:
            plain = {row["path"]: row for row in csv.DictReader(file)}
        of_fold = [row for row in rows if row["fold"] == str(fold)]
        assert len(of_fold) == len(plain) > 20
        for row in of_fold:
            other = plain[f"{row['split']}/{row['path']}"]
            assert {k: v for k, v in row.items() if k in other and k != "path"} == {
                k: v for k, v in other.items() if k != "path"
            }
        facts = made.per_fold[fold - 1]
        sizes = facts["num_train"], facts["num_valid"]
        assert sizes == (summary.num_train, summary.num_valid)
        assert (facts["best_epoch"], facts["valid_loss"]) == (
            summary.best_epoch, summary.valid_loss,
        )  # fmt: skip
        assert facts.get("strength") == summary.strength
        own = json.loads((run / "run.json").read_text("utf-8"))["training"]
        assert facts.get("batch_size") == own.get("batch_size")


@pytest.mark.parametrize("options", [SMALL | {"class_weights": "balanced"}, LBFGS], ids=str)
def test_a_folds_targets_decide_nothing_about_its_head(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Permuted, its probabilities stay equal to the bit; those of the other folds do not."""
    chosen: list[Pair] = []
    make_folds = Pool.make_folds

    def same_folds(pool: Pool, number: int, seed: int) -> list[Pair]:
        chosen[:] = chosen or make_folds(pool, number, seed)
        return chosen

    monkeypatch.setattr(Pool, "make_folds", same_folds)
    crossval(cache.path, tmp_path / "f", folds=3, **options)
    first = read_rows(tmp_path / "f")
    places = {(r["split"], r["path"]) for r in first if r["fold"] == "2"}
    rows = {}
    for name in ("train", "valid", "test"):
        split = cache.split(name)
        targets = np.array(split.targets)
        held = [i for i, path in enumerate(split.paths) if (name, path) in places]
        targets[held] = 1 - targets[held]
        rows[name] = edited(
            rows_of(name, targets, width=16), features=np.array(split.features),
            groups=split.groups, image_sha256=split.image_sha256,
        )  # fmt: skip
    make_cache(tmp_path / "other.h5", **rows)
    crossval(tmp_path / "other.h5", tmp_path / "g", folds=3, **options)
    second = read_rows(tmp_path / "g")
    for fold in ("1", "2", "3"):
        one, two = ([r for r in rows if r["fold"] == fold] for rows in (first, second))
        assert [r["path"] for r in one] == [r["path"] for r in two]
        assert np.array_equal(read_probs(one), read_probs(two)) == (fold == "2")
    assert [r["target"] for r in first] != [r["target"] for r in second]


# --- whose rows


def test_each_labelled_row_once_a_repeat_and_what_belongs_together_in_one_fold(
    tmp_path: Path, cache: Cache, go: Callable[..., CrossvalSummary]
) -> None:
    said: list[str] = []
    made = go(repeats=3, say=said.append)
    rows = read_rows(tmp_path / "f")
    labelled = {
        (name, split.paths[i])
        for name, split in cache.splits.items() if name != "test"
        for i in np.flatnonzero(split.targets >= 0)
    }  # fmt: skip
    assert (made.num_rows, made.num_unlabelled) == (len(labelled), 4) == (80, 4)
    parted = set()
    for repeat in ("1", "2", "3"):
        own = [row for row in rows if row["repeat"] == repeat]
        assert {(row["split"], row["path"]) for row in own} == labelled
        assert len(own) == len(labelled)
        folds_of: dict[Any, set[str]] = {}
        for row in own:
            split = cache.split(row["split"])
            number = split.paths.index(row["path"])
            assert row["target"] == cache.classes[split.targets[number]]
            assert row["group"] == (split.groups or [])[number]
            for key in (row["group"], split.image_sha256[number].tobytes()):
                folds_of.setdefault(key, set()).add(row["fold"])
        assert {len(folds) for folds in folds_of.values()} == {1}
        assert {row["fold"] for row in own} == {"1", "2", "3", "4"}
        parted.add(tuple(row["fold"] for row in own))
    assert len(parted) == 3, "another repeat, other folds"
    assert "4 unlabelled rows left out" in said
    assert "test is not touched: 12 rows" in said
    assert made.splits == ("train", "valid")


def test_without_splits_all_rows_are_used_and_a_fifth_chooses_the_epoch(tmp_path: Path) -> None:
    make_cache(tmp_path / "c.h5", all=[0, 1] * 30)
    said: list[str] = []
    made = crossval(tmp_path / "c.h5", tmp_path / "f", say=said.append, **SMALL)
    assert (made.splits, made.num_rows, made.num_folds) == (("all",), 60, 5)
    assert made.valid_fraction == 0.2
    assert {(f["num_rows"], f["num_valid"]) for f in made.per_fold} == {(12, 10)}
    assert sum("no groups" in line for line in said) == 1
    assert {row["group"] for row in read_rows(tmp_path / "f")} == {""}


def test_test_is_used_where_it_is_asked_for_and_that_is_warned_of(
    tmp_path: Path, go: Callable[..., CrossvalSummary]
) -> None:
    with pytest.warns(FeatcacheWarning, match=r"--with-test: 12 rows of test .*no test left"):
        made = go(with_test=True)
    assert made.splits == ("train", "valid", "test")
    assert {row["split"] for row in read_rows(tmp_path / "f")} == {"train", "valid", "test"}


def test_of_views_all_are_trained_on_and_the_image_itself_is_predicted(tmp_path: Path) -> None:
    part = rows_of("train", [0, 1] * 30)
    views = np.random.default_rng(1).normal(size=(60, 3, 10)).astype("<f4")
    views[:, 0] = array_of(part)
    found = []
    for name, change in (("a", 0.0), ("b", 1.0)):
        views[:, 1:] += change
        make_cache(
            tmp_path / f"{name}.h5", train=edited(part, features=views.copy()), valid=[0, 1] * 10
        )
        crossval(tmp_path / f"{name}.h5", tmp_path / name, folds=3, **SMALL)
        found.append(read_probs(read_rows(tmp_path / name)))
    assert not np.array_equal(*found)
    assert len(found[0]) == 80


def test_several_labels_an_image(tmp_path: Path) -> None:
    cache = sample_labels.make_cache(tmp_path / "c.h5")
    made = crossval(cache.path, tmp_path / "f", folds=3, say=lambda _: None, **SMALL)
    assert (made.task, made.num_rows, made.num_unlabelled) == ("multilabel", 215, 25)
    rows = read_rows(tmp_path / "f")
    assert [*rows[0]][:8] == [
        "split", "fold", "repeat", "path", "group", "targets", "unknown", "preds",
    ]  # fmt: skip
    targets = np.stack([
        cache.split(row["split"]).targets[cache.split(row["split"]).paths.index(row["path"])]
        for row in rows
    ])  # fmt: skip
    wanted = sample_labels.by_scikit_learn(targets, read_probs(rows))
    (pooled,) = made.pooled
    assert pooled["accuracy"] == pytest.approx(wanted["accuracy"])
    for name, row in pooled["per_class"].items():
        own = wanted["per_class"][name]
        assert row.pop("recall") == pytest.approx(own["recall"])
        assert row == {key: own[key] for key in row}
        assert len(row) == 4
    assert pooled["balanced_accuracy"] is pooled["intervals"]["accuracy"] is None
    number, recall = len(rows), wanted["per_class"]["mass"]["recall"]
    low, high = pooled["intervals"]["per_class"]["mass"]["recall"]
    assert low < recall < high < 1 < number
    assert "roc_auc" not in pooled


# --- files and figures


@pytest.mark.filterwarnings("ignore:in more than one split")
def test_the_files_are_as_documented_and_the_figures_are_scikit_learns(
    tmp_path: Path, cache: Cache, go: Callable[..., CrossvalSummary]
) -> None:
    made = go("deep/f", repeats=2, epochs=6)
    folder = tmp_path / "deep" / "f"
    assert sorted(p.name for p in folder.iterdir()) == ["crossval.json", "predictions.csv"]
    assert [p.name for p in folder.parent.iterdir()] == ["f"]
    facts = json.loads((folder / "crossval.json").read_text("utf-8"))
    assert (facts["format"], facts["format_version"]) == ("featcache-crossval", 1)
    digest = hashlib.sha256((folder / "predictions.csv").read_bytes()).hexdigest()
    assert facts["predictions_sha256"] == made.predictions_sha256 == digest
    rest = {key: value for key, value in facts.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    assert facts["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert facts["cache"] == {
        "path": "../../c.h5", "fingerprint": cache.fingerprint,
        "payload_sha256": cache.payload_sha256, "content_sha256": cache.content_sha256,
    }  # fmt: skip
    train(cache.path, tmp_path / "run", **(SMALL | {"epochs": 6}))
    run = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert facts["head"] == run["head"]
    assert {k: run["training"][k] for k in facts["training"] if k != "batch_size"} == {
        k: v for k, v in facts["training"].items() if k != "batch_size"
    }
    rows = read_rows(folder)
    assert [*rows[0]] == [
        "split", "fold", "repeat", "path", "group", "target", "pred", "prob_covid", "prob_normal",
    ]  # fmt: skip
    recalls: list[float] = []
    for of_fold in facts["per_fold"]:
        key = str(of_fold["repeat"]), str(of_fold["fold"])
        own = [row for row in rows if (row["repeat"], row["fold"]) == key]
        truth, preds = ([row[k] for row in own] for k in ("target", "pred"))
        area = metrics.roc_auc_score([t == "normal" for t in truth], read_probs(own)[:, 1])
        assert of_fold["num_rows"] == len(own)
        assert of_fold["accuracy"] == pytest.approx(metrics.accuracy_score(truth, preds))
        balanced = metrics.balanced_accuracy_score(truth, preds)
        assert of_fold["balanced_accuracy"] == pytest.approx(balanced)
        assert of_fold["roc_auc"] == pytest.approx(area)
        recalls.append(metrics.recall_score(truth, preds, pos_label="covid"))
        assert of_fold["per_class"]["covid"]["recall"] == pytest.approx(recalls[-1])
    ratio = np.mean([f["num_rows"] / f["num_train"] for f in facts["per_fold"]])
    half = stats.t.ppf(0.975, 7) * math.sqrt((1 / 8 + ratio) * np.var(recalls, ddof=1))
    mean = np.mean(recalls)
    wanted = {"mean": mean, "low": max(mean - half, 0), "high": min(mean + half, 1), "num_folds": 8}
    assert facts["mean"]["per_class"]["covid"]["recall"] == pytest.approx(wanted)
    for number, pooled in enumerate(facts["pooled"], 1):
        own = [row for row in rows if row["repeat"] == str(number)]
        truth, preds = ([row[k] for row in own] for k in ("target", "pred"))
        matrix = metrics.confusion_matrix(truth, preds).tolist()
        assert (pooled["repeat"], pooled["confusion_matrix"]) == (number, matrix)
        assert pooled["accuracy"] == pytest.approx(metrics.accuracy_score(truth, preds))
    assert (made.per_fold, made.mean) == (facts["per_fold"], facts["mean"])
    assert made.pooled == facts["pooled"]


def test_rates_of_all_rows_have_intervals_that_respect_groups(
    tmp_path: Path, go: Callable[..., CrossvalSummary]
) -> None:
    """Without groups SciPy's; with groups of the rows as predictions.csv has them."""
    make_cache(tmp_path / "plain.h5", all=[0, 1] * 40)
    said: list[str] = []
    plain = crossval(tmp_path / "plain.h5", tmp_path / "p", say=said.append, **SMALL)
    (pooled,) = plain.pooled
    assert pooled["intervals"]["num_groups"] is None
    assert any("on the right for" in line for line in said)
    found = {name: pooled["intervals"]["per_class"][name]["recall"] for name in plain.classes}
    found["all"] = pooled["intervals"]["accuracy"]
    rates = {name: (row["recall"], 40) for name, row in pooled["per_class"].items()}
    for name, (rate, number) in (rates | {"all": (pooled["accuracy"], 80)}).items():
        hits = round(rate * number)
        assert 0 < hits < number, "an interval worth testing"
        wanted = stats.binomtest(hits, number).proportion_ci(method="wilson")
        assert found[name] == pytest.approx([wanted.low, wanted.high])
    said.clear()
    made = go(repeats=2, say=said.append)
    rows = read_rows(tmp_path / "f")
    for number, pooled in enumerate(made.pooled, 1):
        own = [row for row in rows if row["repeat"] == str(number)]
        intervals, of_class = pooled["intervals"], {}
        for name in made.classes:
            of_class[name] = [row for row in own if row["target"] == name]
        for name, which in (of_class | {"all": own}).items():
            is_hit = np.array([row["pred"] == row["target"] for row in which])
            wanted = grouped_rate_interval(is_hit, [row["group"] for row in which])
            key = intervals["accuracy"]
            if name != "all":
                key = intervals["per_class"][name]["recall"]
            assert key == pytest.approx(wanted)
        recalls = [pooled["per_class"][name]["recall"] for name in made.classes]
        ends = [intervals["per_class"][name]["recall"] for name in made.classes]
        wanted = mean_rate_interval(recalls, ends)
        assert intervals["balanced_accuracy"] == pytest.approx(wanted)
        assert intervals["num_groups"] == len({row["group"] for row in own}) == 17
    assert any("on the right (17 groups) for" in line for line in said)
    named = ("this cache was never audited", "written to")  # with the whole path
    assert max(len(line) for line in said[:-1] if not line.startswith(named)) <= 80


def test_folds_that_agree_give_no_interval_of_width_zero(tmp_path: Path) -> None:
    rows = rows_of("all", [0, 1] * 30)
    make_cache(tmp_path / "c.h5", all=edited(rows, features=array_of(rows) * 0.01 + np.eye(2, 10)
                                             [np.arange(60) % 2].astype("<f4") * 9))  # fmt: skip
    said: list[str] = []
    made = crossval(tmp_path / "c.h5", tmp_path / "f", say=said.append, **LBFGS)
    assert made.mean["accuracy"] == {"mean": 1.0, "low": None, "high": None, "num_folds": 5}
    assert any("1.000 (folds alike)" in line for line in said)


# --- the command line


def test_the_command_line(
    tmp_path: Path, go: Callable[..., CrossvalSummary], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    call = functools.partial(cli.cli.main, standalone_mode=False)
    options = "--folds 4 --hidden 8 --epochs 3 --learning-rate 0.02 --device cpu"
    call(f"crossval c.h5 a {options}".split())
    out, err = capfd.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "80 rows of train and valid in 4 folds"
    assert "target \\ pred  covid  normal" in lines
    assert lines[-1].startswith("4 heads in ")
    call(f"crossval c.h5 b {options} --json".split())
    facts = json.loads(capfd.readouterr().out)
    wanted = go().as_dict()
    assert facts | {"folder": "", "seconds": 0} == wanted | {"folder": "", "seconds": 0}
    assert (tmp_path / "a" / "predictions.csv").read_bytes() == (
        tmp_path / "f" / "predictions.csv"
    ).read_bytes()
    given = {parameter.name for parameter in cli.cli.commands["crossval"].params}
    assert {p.name for p in cli.cli.commands["train"].params} - given == {"run"}
