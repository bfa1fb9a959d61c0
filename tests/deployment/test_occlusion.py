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


@pytest.mark.parametrize("shape", [(21, 21), (21, 21, 3)])
def test_every_pixel_is_blurred_once_and_keeps_its_brightness(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 2, shape, np.uint8) * 200
    covered = cover_cells(pixels, 7)
    assert len(covered) == 49
    changed = [(image != pixels).reshape(21, 21, -1).any(axis=2) for image in covered]
    assert (np.sum(changed, axis=0) == 1).all()
    assert np.ptp(np.stack(covered)[:, 9:12, 9:12], axis=(1, 2)).min() < 200
    inside = np.mean([image[is_in].mean() for image, is_in in zip(covered, changed, strict=True)])
    assert inside == pytest.approx(pixels.mean(), abs=15)
