from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from featcache.metrics.scores import METRICS, compute_score, describe_metric, paired_interval
from featcache.sweeps.ranking import decide, rank, ranking_lines, trial_rows
from featcache.sweeps.trials import Trial


def test_ranks_by_the_sign_and_the_earlier_on_ties() -> None:
    scores = [0.5, None, 0.7, 0.5, 0.1]
    trials = [Trial(i, {}, "done", s, [[1.0]], [1]) for i, s in enumerate(scores)]
    assert [t.number for t in rank(reversed(trials), 1)] == [2, 0, 3, 4]
    assert [t.number for t in rank(trials, -1)] == [4, 0, 3, 2]


BETTER, SAME, PRIOR = [0.9, 0.91, 0.92, 0.9], [0.7, 0.71, 0.7, 0.72], [0.5] * 4


def test_only_an_interval_that_excludes_zero_takes_the_best() -> None:
    clear = decide({"0": SAME, "7": BETTER, "prior": PRIOR}, 1, 0.2, "safe")
    assert (clear.chosen, clear.best) == (7, 7)
    assert 0 < clear.low < clear.difference < clear.high
    wide = decide({"0": SAME, "7": [0.7, 0.9, 0.6, 0.8], "prior": PRIOR}, 1, 0.2, "safe")
    assert (wide.chosen, wide.best) == (0, 7)
    assert (
        decide({"0": SAME, "7": [0.7, 0.9, 0.6, 0.8], "prior": PRIOR}, 1, 0.2, "best").chosen == 7
    )
    worse = {"0": BETTER, "7": SAME, "prior": PRIOR}
    assert decide(worse, 1, 0.2, "safe").chosen == decide(worse, 1, 0.2, "best").chosen == 0


def test_of_a_loss_less_is_better() -> None:
    found = decide({"0": BETTER, "7": SAME, "prior": [2.0] * 4}, -1, 0.2, "safe")
    assert found.chosen == 7
    assert found.high < 0
    assert decide({"0": SAME, "7": BETTER, "prior": [2.0] * 4}, -1, 0.2, "safe").chosen == 0


def test_what_is_not_better_than_guessing_is_not_taken() -> None:
    found = decide({"0": SAME, "7": BETTER, "prior": [0.9] * 4}, 1, 0.2, "safe")
    assert found.chosen == 0
    assert found.low > 0
    assert "guessing" in found.reason


def test_the_best_is_that_of_the_repeats_the_earlier_on_ties() -> None:
    scores = {"0": SAME, "12": BETTER, "9": BETTER, "3": SAME, "prior": PRIOR}
    assert decide(scores, 1, 0.2, "safe").best == 9
    assert decide(scores, 1, 0.2, "safe").num_finalists == 3


def test_the_interval_is_that_of_the_paper() -> None:
    """By its formula, with the quantile of four degrees of freedom from a table."""
    differences = [0.01, 0.03, -0.02, 0.05, 0.02]
    mean, low, high = paired_interval(differences, 0.25)
    half = 2.7764 * math.sqrt((1 / 5 + 0.25) * np.var(differences, ddof=1))
    assert mean == pytest.approx(0.018)
    assert (low, high) == pytest.approx((0.018 - half, 0.018 + half), rel=1e-4)
    _, wider, _ = paired_interval(differences, 0.25, 3)
    assert wider < low


def test_it_covers_what_overlapping_hold_outs_hide() -> None:
    """Two guessers of one true accuracy: 95 % intervals that exclude zero are few."""
    rng, wrong, plain_wrong = np.random.default_rng(0), 0, 0
    for _ in range(300):
        gains = rng.choice([-1, 0, 1], size=60, p=[0.25, 0.5, 0.25])  # per row, fixed
        repeats = [float(rng.permutation(gains)[:12].mean()) for _ in range(5)]
        _, low, high = paired_interval(repeats, 12 / 48)
        wrong += not low <= 0 <= high
        _, low, high = paired_interval(repeats, 0.0)
        plain_wrong += not low <= 0 <= high
    assert wrong <= 300 * 0.08
    assert wrong < plain_wrong


def test_rows_of_the_table_are_by_number_and_whole() -> None:
    trials = [
        Trial(1, {"hidden": (), "dropout": 0.1}, "failed", None, [[]], [0]),
        Trial(0, {}, "done", 0.5, [[0.6, 0.5], [0.7, 0.9]], [2, 1]),
    ]
    header, rows = trial_rows(trials)
    table = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["trial"] for row in table] == [0, 1]
    assert (table[0]["num_epochs"], table[0]["best_epoch"]) == (4, "2 1")
    assert table[0]["lowest_loss"] == pytest.approx(0.6)
    assert (table[1]["hidden"], table[1]["dropout"], table[1]["score"]) == ("none", 0.1, None)
    assert table[0]["hidden"] == "512,128"


def test_guessing_by_shares_is_no_skill() -> None:
    targets = np.array([0, 0, 0, 1])
    probs = np.tile([0.75, 0.25], (4, 1))
    found = {m: compute_score(m, targets, probs, ["a", "b"]) for m in METRICS}
    assert found["roc_auc"] == 0.5
    assert found["balanced_accuracy"] == 0.5
    assert found["accuracy"] == 0.75
    assert found["loss"] == pytest.approx(-(3 * math.log(0.75) + math.log(0.25)) / 4)
    assert compute_score("average_precision", targets, probs, ["a", "b"], "b") == 0.25
    assert compute_score("roc_auc", targets[:3], probs[:3], ["a", "b"]) is None
    assert compute_score("f1", targets[:3], probs[:3], ["a", "b"]) is None
    assert compute_score("roc_auc", targets[:3], probs[:3], ["a", "b"], "a") is None


def test_averaging_and_class_are_named() -> None:
    named = {metric: describe_metric(metric, None) for metric in METRICS}
    assert all("macro mean" in named[m] for m in ("roc_auc", "average_precision", "f1"))
    assert describe_metric("f1", "covid") == "f1 (of covid, against the rest)"


def test_scores_stand_under_their_metric() -> None:
    trials = [Trial(0, {}, "done", 0.5, [[0.6]], [1]), Trial(11, {}, "done", 0.25, [[0.6]], [1])]
    for metric in METRICS:
        header, *lines, last = ranking_lines(trials, metric)
        end = header.index(metric) + len(metric)
        assert [line[:end].split() for line in lines] == [["0", "0.5000"], ["11", "0.2500"]]
        assert last == "trial 0 is the default head"


def test_options_that_differ_have_a_column_and_the_others_a_line() -> None:
    options: list[dict[str, Any]] = [
        {}, {"hidden": (256,), "learning_rate": 1.2345678e-05, "epochs": 20},
        {"hidden": (), "learning_rate": 3e-3, "epochs": 20},
    ]  # fmt: skip
    trials = [Trial(n, params, "done", 0.5, [[0.6]], [1]) for n, params in enumerate(options)]
    assert list(ranking_lines(trials, "loss")) == [
        "                         learning        ",
        "trial    loss   hidden       rate  epochs",
        "    0  0.5000  512,128     0.0005      10",
        "    1  0.5000      256  1.235e-05      20",
        "    2  0.5000     none      0.003      20",
        "trial 0 is the default head",
    ]
    *_, last = ranking_lines(trials[1:], "loss")
    assert last == "all with --epochs 20"
