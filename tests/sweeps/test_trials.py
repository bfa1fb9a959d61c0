"""Rounds of trials: who is given up."""

from __future__ import annotations

from pathlib import Path

import pytest
from sample_rows import CLASSES, make_cache, rows_of

from featcache.heads.rows import choose_rows
from featcache.runtime import CPU, log_line
from featcache.sweeps.folds import Pool
from featcache.sweeps.trials import Judge, Trial, fit_trials


def test_the_worse_half_is_given_up_at_a_rung(tmp_path: Path) -> None:
    rows = {"train": rows_of("train", [0, 1] * 30), "valid": rows_of("valid", [0, 1] * 12)}
    cache = make_cache(tmp_path / "c.h5", **rows)
    pool = Pool.of(cache, choose_rows(cache, None, 0, log_line))
    judge = Judge("loss", None, CLASSES, CPU)
    fast = {"hidden": (8,), "learning_rate": 0.02, "epochs": 8}
    slow = fast | {"learning_rate": 1e-6}
    plan = {0: slow, 1: slow, 2: fast}
    shares: list[float] = []

    def fit(earlier: list[Trial]) -> list[Trial]:
        return fit_trials(
            judge, plan, [pool.take(pool.pair)], earlier, seed=0,
            on_epoch=lambda _: None, on_share=shares.append,
        )  # fmt: skip

    whole = fit([])
    assert [trial.state for trial in whole] == ["done"] * 3
    middling = (whole[1].losses[0][1] + whole[2].losses[0][1]) / 2
    reference = [Trial(i, {}, "done", 1.0, [[middling] * 8], [1]) for i in range(8)]
    assert [trial.state for trial in fit(reference[:7])] == ["done"] * 3, "too few to go by"
    assert sum(shares) == pytest.approx(2 * 3)  # twice three whole trainings
    shares.clear()
    zero, given_up, kept = fit(reference)
    assert (zero.state, given_up.state, kept.state) == ("done", "pruned", "done")
    assert len(given_up.losses[0]) == 2
    assert given_up.score is None
    assert given_up.losses[0] == pytest.approx(whole[1].losses[0][:2], rel=1e-4)
    assert len(zero.losses[0]) == 8, "the default is never given up"
    assert sum(shares) == pytest.approx(2 + 2 / 8)  # two of its eight epochs
