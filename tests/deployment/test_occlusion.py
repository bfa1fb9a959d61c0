"""Occlusion: cells, covers, and ranks to compare them with a map."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from featcache.deployment.occlusion import choose_side, cover_cells, rank_correlation, sum_cells


def test_ranks_and_cells() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 5, (2, 6, 6)).astype(float)
    assert rank_correlation(one, other) == pytest.approx(
        stats.spearmanr(one.ravel(), other.ravel()).statistic
    )
    assert rank_correlation(one, np.zeros((6, 6))) is None
    assert [choose_side(side) for side in (None, 1, 2, 7, 14, 16, 28, 56, 17)] == [
        7, 7, 2, 7, 14, 8, 14, 14, 7,
    ]  # fmt: skip
    plane = rng.normal(size=(16, 16))
    assert sum_cells(plane, 8)[1, 2] == pytest.approx(plane[2:4, 4:6].sum())


@pytest.mark.parametrize("shape", [(20, 20), (20, 20, 3)])
def test_every_pixel_is_covered_once_with_the_mean_colour(shape: tuple[int, ...]) -> None:
    pixels = np.full(shape, 9, np.uint8)
    pixels[:10] = 30
    covered = cover_cells(pixels, 7)
    assert len(covered) == 49
    changed = sum((image == 20).reshape(20, 20, -1).all(axis=2).astype(int) for image in covered)
    assert (np.asarray(changed) == 1).all()
    assert set(np.unique(pixels)) == {9, 30}
