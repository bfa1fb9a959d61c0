"""Sweeps over real caches: the answer, the options, the command line."""

from __future__ import annotations

import csv
import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from sample_heads import probs_of
from sample_rows import CLASSES, array_of, edited, make_cache, rows_of
from sample_sweeps import SPACE, run_files, small_cache, sweep_small
from scipy import stats

import featcache
from featcache import progress
from featcache.cache.reading import Cache
from featcache.cache.writing import SplitRows
from featcache.cli import main as cli
from featcache.errors import CacheError, ConfigError
from featcache.heads.rows import choose_rows
from featcache.heads.run import load_run
from featcache.heads.training import train
from featcache.metrics.scores import METRICS
from featcache.runtime import CPU, log_line
from featcache.sweeps.folds import Pool
from featcache.sweeps.search import Plan
from featcache.sweeps.space import DEFAULTS, Dimension, Space
from featcache.sweeps.sweeping import SAMPLERS, SELECTIONS, SweepSummary, sweep
from featcache.sweeps.tpe import propose_round
from featcache.sweeps.trials import Judge, Trial


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return small_cache(tmp_path)


@pytest.fixture
def go(tmp_path: Path, cache: Cache) -> Callable[..., SweepSummary]:
    """Sweep the cache by a small space."""
    return functools.partial(sweep_small, tmp_path)


def read_trials(run: Path) -> list[dict[str, str]]:
    with (run / "trials.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- the answer


def test_the_run_is_what_train_makes_of_the_options(
    tmp_path: Path, cache: Cache, go: Callable[..., SweepSummary]
) -> None:
    kept = go("kept", seed=3)
    assert kept.chosen == 0
    plain = train(cache.path, tmp_path / "plain", seed=3, device="cpu")
    assert kept.weights_sha256 == plain.weights_sha256
    assert load_run(tmp_path / "kept").training["sweep"] == {"trial": 0, "trials": 8}


@pytest.mark.parametrize("sampler", ["random", "grid", "tpe"])
def test_every_trial_once_and_the_same_twice(
    tmp_path: Path, go: Callable[..., SweepSummary], sampler: str
) -> None:
    space = "hidden = [[4], []]\nlearning_rate = { low = 1e-3, high = 1e-2 }\nepochs = 3\n"
    (tmp_path / "s.toml").write_text(space, "utf-8")
    number = 7 if sampler == "grid" else 20
    made = [go(name, sampler=sampler, trials=20) for name in ("a", "b")]
    rows = read_trials(tmp_path / "a")
    assert [int(row["trial"]) for row in rows] == list(range(number))
    assert rows[0]["state"] == "done"
    for name, value in DEFAULTS.items():  # trial 0 is the default head
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert rows[0][name] == ("" if value is None else text)
    assert made[0].num_trials == number
    tried = [(row["hidden"], row["learning_rate"]) for row in rows]
    assert len(set(tried)) == number
    assert run_files(tmp_path / "a") == run_files(tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c.h5", "s.toml"]
    if sampler != "grid":
        go("c", sampler=sampler, trials=20, seed=1)
        other = [(row["hidden"], row["learning_rate"]) for row in read_trials(tmp_path / "c")]
        assert set(tried[1:]).isdisjoint(other[1:])


@pytest.mark.parametrize("options", [{}, {"folds": 3, "metric": "balanced_accuracy"}], ids=str)
def test_the_intervals_and_scores_follow_from_the_files_of_the_run(
    tmp_path: Path, go: Callable[..., SweepSummary], options: dict[str, Any]
) -> None:
    """By the formula of Nadeau and Bengio, written out here."""
    found = go("r", **options)
    assert found.decision is not None
    told = json.loads((tmp_path / "r" / "sweep.json").read_text("utf-8"))["decision"]
    number, num_finalists = told["num_splits"], told["num_finalists"]
    quantile = stats.t.ppf(1 - 0.05 / 2 / num_finalists, number - 1)
    best = np.array(told["scores"][str(told["best"])])
    assert len(told["scores"]) == num_finalists + 2
    assert {len(scores) for scores in told["scores"].values()} == {number}
    intervals = {
        "0": [told["difference"], told["low"], told["high"]], "prior": told["over_prior"],
    }  # fmt: skip
    for other, interval in intervals.items():
        differences = best - told["scores"][other]
        half = quantile * np.sqrt((1 / number + told["ratio"]) * differences.var(ddof=1))
        mean = differences.mean()
        np.testing.assert_allclose(interval, [mean, mean - half, mean + half], rtol=1e-9)
    done = [row for row in read_trials(tmp_path / "r") if row["state"] == "done"]
    for row in done:
        folds = [float(score) for score in row["fold_scores"].split()]
        assert len(folds) == options.get("folds", 1)
        assert float(row["score"]) == pytest.approx(np.mean(folds), rel=1e-12)


def easy(name: str, targets: list[int]) -> SplitRows:
    """Rows far apart, which a faster head tells apart with more certainty."""
    rows = rows_of(name, targets, width=16)
    features = array_of(rows)
    features[np.arange(len(targets)), np.array(targets)] += 4
    return edited(rows, features=features)


def test_a_clear_gain_is_taken_and_noise_is_not(tmp_path: Path) -> None:
    space = tmp_path / "s.toml"
    space.write_text("dropout = [0.0]\nlearning_rate = [0.004, 0.006, 0.008]\n", "utf-8")
    splits = {"train": [0, 1] * 40, "valid": [0, 1] * 20}
    cache = make_cache(tmp_path / "signal.h5", **{k: easy(k, v) for k, v in splits.items()})
    options: dict[str, Any] = {"trials": 4, "sampler": "grid", "space": space, "device": "cpu"}
    said: list[str] = []
    found = sweep(cache.path, tmp_path / "s", say=said.append, **options)
    assert found.chosen > 0
    assert found.decision is not None
    assert found.decision.high < 0
    assert f"kept: trial {found.chosen}: the interval excludes zero" in said
    again = train(cache.path, tmp_path / "again", **found.options, device="cpu")
    assert (again.weights_sha256, again.valid_loss) == (found.weights_sha256, found.valid_loss)


@pytest.mark.parametrize("metric", ["loss", "roc_auc"])
def test_a_sweep_over_noise_keeps_the_default(tmp_path: Path, metric: str) -> None:
    rng, rows = np.random.default_rng(3), {}
    for name, number in (("train", 40), ("valid", 20)):
        part = rows_of(name, [0, 1] * number)
        rows[name] = edited(part, features=rng.normal(size=(2 * number, 10)).astype("<f4"))
    make_cache(tmp_path / "c.h5", **rows)
    (tmp_path / "s.toml").write_text(SPACE, "utf-8")
    options: dict[str, Any] = {"trials": 16, "space": tmp_path / "s.toml", "device": "cpu"}
    said: list[str] = []
    kept = sweep(tmp_path / "c.h5", tmp_path / "r", metric=metric, say=said.append, **options)
    assert kept.chosen == 0
    assert kept.top[0]["trial"] > 0, "some trial was luckier than the default"
    assert kept.decision is not None
    assert kept.decision.low < kept.decision.difference < kept.decision.high
    assert any(line.startswith("kept: the default head: ") for line in said)


def test_the_test_split_does_not_matter(tmp_path: Path, go: Callable[..., SweepSummary]) -> None:
    first = go("a")
    splits = {"train": [0, 1] * 30, "valid": [0, 1] * 12}
    rows = {k: rows_of(k, v, width=16) for k, v in splits.items()}
    bad = edited(rows_of("test", [0, 1]), features=np.full((2, 16), np.nan, "<f4"))
    make_cache(tmp_path / "c.h5", **rows, test=bad)
    assert go("b").weights_sha256 == first.weights_sha256
    assert (tmp_path / "a/trials.csv").read_bytes() == (tmp_path / "b/trials.csv").read_bytes()


def test_where_every_other_trial_fails_it_says_that_the_default_is_kept(
    tmp_path: Path, go: Callable[..., SweepSummary]
) -> None:
    (tmp_path / "s.toml").write_text(
        'optimizer = "sgd"\nhidden = [[]]\nlearning_rate = [1e35, 1e36]\nepochs = 4\n', "utf-8"
    )
    said: list[str] = []
    summary = go(sampler="grid", trials=3, say=said.append)
    assert (summary.failed, summary.decision, summary.chosen) == ([1, 2], None, 0)
    assert "kept: the default head: no other trial is left to compare it with" in said


def test_a_trial_that_diverges_is_listed(tmp_path: Path, go: Callable[..., SweepSummary]) -> None:
    (tmp_path / "s.toml").write_text(
        'optimizer = "sgd"\nhidden = [[]]\nlearning_rate = [0.01, 1e36]\nepochs = 4\n', "utf-8"
    )
    said: list[str] = []
    summary = go(sampler="grid", trials=3, say=said.append)
    assert (summary.num_failed, summary.failed) == (1, [2])
    assert "failed, for the loss was no number: 1 trial (2)" in said
    assert [row["state"] for row in read_trials(tmp_path / "r")] == ["done", "done", "failed"]
    assert read_trials(tmp_path / "r")[2]["score"] == ""
    json.dumps(summary.as_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("metric", "positive"),
    [
        ("loss", None), ("accuracy", None), ("balanced_accuracy", None), ("roc_auc", None),
        ("average_precision", "covid"), ("f1", None), ("f1", "normal"),
    ],
)  # fmt: skip
def test_the_score_is_that_of_the_head(
    tmp_path: Path, cache: Cache, go: Callable[..., SweepSummary], metric: str, positive: str | None
) -> None:
    """Against scikit-learn on the probabilities of the run's head, trained again alone."""
    from sklearn import metrics

    go(metric=metric, positive=positive, trials=2)
    score = float(read_trials(tmp_path / "r")[0]["score"])
    classifier = featcache.load_run(tmp_path / "r")
    valid = cache.split("valid")
    from featcache.heads.run import load_head

    probs = probs_of(load_head(classifier), valid.features)
    targets, preds = np.array(valid.targets), probs.argmax(1)
    index = 1 if positive is None else CLASSES.index(positive)
    wanted = {
        "loss": lambda: metrics.log_loss(targets, probs),
        "accuracy": lambda: metrics.accuracy_score(targets, preds),
        "balanced_accuracy": lambda: metrics.balanced_accuracy_score(targets, preds),
        "roc_auc": lambda: metrics.roc_auc_score(targets, probs[:, 1]),
        "average_precision": lambda: metrics.average_precision_score(
            targets == index, probs[:, index]
        ),
        "f1": lambda: (
            metrics.f1_score(targets, preds, average="macro") if positive is None
            else metrics.f1_score(targets, preds, pos_label=index)
        ),
    }[metric]()  # fmt: skip
    assert score == pytest.approx(wanted, abs=1e-4)


def test_tpe_learns_from_earlier_trials(tmp_path: Path) -> None:
    """Of two metrics of opposite sign it seeks opposite ends."""
    space = Space((
        Dimension("learning_rate", low=1e-5, high=1e-1, log=True),
        Dimension("hidden", ((8,), (4,), ())),
    ), {"epochs": 4})  # fmt: skip
    plan = Plan(100, "tpe", space, None, 2, "safe", 0)
    earlier = [Trial(0, {}, "done", 0.5, [[1.0]], [1])]
    for number in range(1, 48):
        params = space.draw(0, number)
        state = ("done", "pruned", "failed")[number % 8 if number % 8 < 3 else 0]
        score = abs(math.log10(params["learning_rate"]) + 5)
        losses = [] if state == "failed" else [[1.0]]
        earlier.append(
            Trial(number, params, state, score if state == "done" else None, losses, [1])
        )
    rates = {}
    for sign in (-1, 1):
        asked = propose_round(plan, sign, earlier, 3)
        assert list(asked) == list(range(48, 64))
        assert asked == propose_round(plan, sign, earlier, 3)
        assert asked != propose_round(plan, sign, earlier, 4)
        assert all(p["epochs"] == 4 and p["hidden"] in {(8,), (4,), ()} for p in asked.values())
        rates[sign] = np.median([math.log10(p["learning_rate"]) for p in asked.values()])
    assert rates[-1] < -4
    assert rates[1] > -2
    assert len(propose_round(Plan(50, "tpe", space, None, 2, "safe", 0), 1, earlier, 3)) == 2


# --- folds


def test_folds_judge_each_trial_by_their_mean(
    tmp_path: Path, cache: Cache, go: Callable[..., SweepSummary]
) -> None:
    summary = go(folds=3, trials=4, prune=False)
    assert summary.decision is not None
    assert summary.decision.num_splits == 2 * 3
    pool = Pool.of(cache, choose_rows(cache, None, 0, log_line))
    judge = Judge("loss", None, CLASSES, CPU)
    losses = []
    for pair in pool.make_folds(3, 0):
        arrays = pool.take(pair)
        (_, result) = judge.fit(
            {0: {}}, arrays, seed=0, on_epoch=lambda *_: None, on_share=lambda _: None
        )[0]
        losses.append(min(row["valid_loss"] for row in result.history))
    assert float(read_trials(tmp_path / "r")[0]["score"]) == pytest.approx(np.mean(losses))


def test_too_few_groups_are_told_before_anything_is_trained(tmp_path: Path) -> None:
    rows = {n: edited(rows_of(n, [0, 1] * 6), groups=[f"{n}{i % 2}" for i in range(12)])
            for n in ("train", "valid")}  # fmt: skip
    cache = make_cache(tmp_path / "c.h5", **rows)
    with pytest.raises(CacheError, match=r"--folds: expected class .* in each of 5 parts"):
        sweep(cache.path, tmp_path / "r", trials=3, folds=5, device="cpu")
    assert [p.name for p in tmp_path.iterdir()] == ["c.h5"]


# --- options


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"trials": 1}, "--trials: expected a whole number from 2"),
        ({"trials": 8, "sampler": "cma"}, "--sampler: expected random or grid or tpe"),
        ({"folds": 1}, "--folds: expected a whole number from 2"),
        ({"repeats": 1}, "--repeats: expected a whole number from 2"),
        ({"select": "all"}, "--select: expected safe or best"),
        ({"metric": "auc"}, "--metric: expected one of loss, accuracy"),
        ({"positive": "covid"}, "--positive: expected a --metric of one class"),
        ({"metric": "f1", "positive": "x"}, "--positive: expected one of covid, normal, found x"),
        ({"seed": -1}, "--seed: expected a whole number from 0"),
        ({"sampler": "grid"}, "--trials: expected 54, .*found 8"),
        ({"valid_fraction": 1.5}, "--valid-fraction: expected a number between 0 and 1"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path, go: Callable[..., SweepSummary], options: Any, wanted: str
) -> None:
    with pytest.raises(ConfigError, match=wanted):
        go(**options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.h5", "s.toml"]


@pytest.mark.parametrize("only", [0, 1])
def test_a_metric_that_valid_cannot_give_is_refused(tmp_path: Path, only: int) -> None:
    make_cache(tmp_path / "c.h5", train=[0, 1] * 10, valid=[only] * 5)
    for metric in ("roc_auc", "average_precision", "f1"):
        with pytest.raises(ConfigError, match="expected rows of every class in valid"):
            sweep(tmp_path / "c.h5", tmp_path / "r", trials=2, metric=metric, device="cpu")


def test_folds_can_give_a_metric_that_valid_alone_cannot(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.h5", train=[0, 1] * 10, valid=[1] * 6)
    (tmp_path / "s.toml").write_text("dropout = [0.1, 0.2]\nepochs = 2\n", "utf-8")
    options: Any = {"trials": 2, "folds": 2, "repeats": 2, "device": "cpu"}
    found = sweep(
        cache.path, tmp_path / "r", metric="roc_auc", space=tmp_path / "s.toml", **options
    )  # fmt: skip
    assert [0 <= trial["score"] <= 1 for trial in found.top] == [True, True]


def test_without_optuna_the_extra_is_named(
    tmp_path: Path, go: Callable[..., SweepSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'featcache\[sweep\]'"):
        go(sampler="tpe")
    assert go("random", trials=2).num_trials == 2


def test_a_cache_without_valid_holds_a_part_out(tmp_path: Path) -> None:
    make_cache(tmp_path / "c.h5", all=[0, 1] * 30)
    with pytest.raises(CacheError, match="--valid-fraction"):
        sweep(tmp_path / "c.h5", tmp_path / "r", trials=2, device="cpu")
    options: Any = {"valid_fraction": 0.3, "seed": 2, "device": "cpu"}
    kept = sweep(tmp_path / "c.h5", tmp_path / "r", trials=2, repeats=2, **options)
    plain = train(tmp_path / "c.h5", tmp_path / "p", **options)
    assert kept.chosen == 0
    assert kept.weights_sha256 == plain.weights_sha256


def test_the_command_line(
    tmp_path: Path, go: Callable[..., SweepSummary], capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    arguments = "sweep c.h5 r --trials 4 --space s.toml --device cpu --repeats 2 --json"
    cli.cli.main(arguments.split(), standalone_mode=False)
    facts = json.loads(capfd.readouterr().out)
    assert (facts["num_trials"], facts["chosen"], facts["run"]) == (4, 0, "r")
    assert facts["decision"]["method"].startswith("corrected resampled t interval")
    assert len(facts["top"]) == 4
    assert facts["weights_sha256"] == go("other", trials=4).weights_sha256
    choices = {
        parameter.name: tuple(parameter.type.choices)
        for parameter in cli.cli.commands["sweep"].params
        if isinstance(parameter.type, click.Choice)
    }
    assert choices == {"sampler": SAMPLERS, "metric": METRICS, "select": SELECTIONS}


def test_progress_shows_trials_and_steps_on_standard_error(
    go: Callable[..., SweepSummary], capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "BAR_AFTER_SECONDS", 0.0)
    summary = go(progress=True)
    out, err = capfd.readouterr()
    assert "/8 [" in err
    assert "head-steps/s" in err
    assert out == ""
    assert summary.num_head_steps > 8 * 2
    go("quiet", trials=2)
    assert capfd.readouterr().err == ""
