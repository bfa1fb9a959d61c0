"""Several labels a row: sweeps."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_labels import SIZES, by_scikit_learn, known_rows, make_cache, probs_of, rows_of

from featcache.cache.reading import Cache
from featcache.errors import ConfigError, FeatcacheWarning
from featcache.evaluation.evaluation import evaluate
from featcache.heads.config import TrainingConfig
from featcache.heads.fit import fit_head
from featcache.heads.head import HeadConfig
from featcache.heads.rows import choose_rows
from featcache.heads.run import load_run
from featcache.heads.training import TrainSummary, train
from featcache.runtime import CPU, log_line
from featcache.sweeps.folds import Pool
from featcache.sweeps.sweeping import sweep


def read_scores(run: Path) -> list[float]:
    with (run / "trials.csv").open(newline="", encoding="utf-8") as file:
        return [float(row["score"]) for row in csv.DictReader(file)]


METRICS = ("loss", "accuracy", "roc_auc", "average_precision", "f1")


@pytest.fixture
def space(tmp_path: Path) -> Path:
    text = "hidden = [[4], []]\nlearning_rate = { low = 1e-3, high = 1e-2 }\nepochs = 2\n"
    (tmp_path / "s.toml").write_text(text, "utf-8")
    return tmp_path / "s.toml"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, TrainSummary]:
    """A cache and a run of the default head, the first trial of every sweep."""
    folder = tmp_path_factory.mktemp("plain")
    cache = make_cache(folder / "c.h5")
    return cache, train(cache.path, folder / "plain", device="cpu")


@pytest.mark.parametrize("metric", METRICS)
def test_a_trial_has_the_figure_that_scikit_learn_gives(
    tmp_path: Path, space: Path, metric: str, plain: tuple[Cache, TrainSummary]
) -> None:
    cache, trained = plain
    options: dict[str, Any] = {"trials": 3, "repeats": 2, "space": space, "device": "cpu"}
    summary = sweep(cache.path, tmp_path / "r", metric=metric, **options)
    features, targets, _ = known_rows(cache, "valid")
    wanted = by_scikit_learn(targets, probs_of(load_run(trained.run).state, features))
    scores = read_scores(tmp_path / "r")
    assert len(scores) == 3
    assert scores[0] == pytest.approx(wanted[metric], abs=1e-5)
    assert ("known targets" in summary.metric) == (metric in {"loss", "accuracy"})
    assert ("both answers" in summary.metric) == (metric not in {"loss", "accuracy"})
    assert summary.chosen == 0  # of heads as small as these none is better beyond doubt
    assert summary.weights_sha256 == trained.weights_sha256
    assert load_run(tmp_path / "r").task == "multilabel"
    assert evaluate(tmp_path / "r")["task"] == "multilabel"


def test_folds_are_by_groups_and_their_mean_is_the_score(tmp_path: Path, space: Path) -> None:
    cache = make_cache(tmp_path / "c.h5")
    parts = choose_rows(cache, None, 0, log_line)
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
