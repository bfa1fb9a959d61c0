"""The arithmetic of explanations: which position of a map moved the log-odds by how much.

The features are the mean over the positions of a map, so a position's share in a feature is known,
and the head alone has to be explained: integrated gradients in feature space (Sundararajan, Taly
and Yan 2017), from the mean of the training images to the image. No gradient of the backbone is
needed. For a linear head the parts are those of class activation maps (Zhou et al. 2016).

Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from featcache.backbones.pooling import apply_norm

_MAX_STEPS = 1 << 16
_BLOCK_STEPS = 1024  # 10 MB of 1280 features in float64
_LEAST_SLOPE = 1e-6  # of a norm, as a share of its largest: a feature of less carries nothing

Plane = npt.NDArray[np.float64]
"""(H, W)"""
Score = Callable[[torch.Tensor], torch.Tensor]
"""Averages (n, D) float64 -> log-odds (n,), differentiable."""


@dataclass(frozen=True)
class Attribution:
    """What moved the log-odds from those of the mean training image to those of an image.

    Attributes:
        weights: (D,) what a unit of each average moves: its mean gradient along the path.
        start: (D,) the averages where the path begins.
        baseline: Log-odds there. With the parts of all positions they are the log-odds.
        residual: By how much they miss them.
        num_steps: Points of the path at which the gradient was taken.
    """

    weights: npt.NDArray[np.float64]
    start: npt.NDArray[np.float64]
    baseline: float
    residual: float
    num_steps: int


def log_odds_of(head: nn.Module, positive: int, against: int | None) -> Score:
    """Return the log-odds of one class against another as a function of features (n, D) float64.

    Of two classes, or the only two that count, they are the difference of the logits. Softmax
    ignores what all logits share, and so does this.

    Args:
        head: Features to logits, in float64.
        positive: Number of the class.
        against: Number of the other one; None for the logit of a label alone.
    """

    def score(features: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = head(features)
        return logits[:, positive] if against is None else logits[:, positive] - logits[:, against]

    return score


def behind_norms(
    score: Score, widths: Sequence[int], norms: Sequence[nn.LayerNorm | None]
) -> Score:
    """Return a score of averages, of which norms make the features, a slice for each backbone."""
    if all(norm is None for norm in norms):
        return score

    def normed(averages: torch.Tensor) -> torch.Tensor:
        parts = zip(torch.split(averages, list(widths), dim=1), norms, strict=True)
        return score(torch.cat([apply_norm(part, norm) for part, norm in parts], dim=1))

    return normed


def before_norm(
    features: npt.NDArray[np.float64], averages: npt.NDArray[np.float64], norm: nn.LayerNorm | None
) -> npt.NDArray[np.float64]:
    """Return averages (D,) that a norm makes features (D,) of, as nearly as it can.

    A norm forgets mean and length: they are those of the averages of an image. The mean of many
    normed vectors is shorter than they are, so what is met is its direction.
    """
    if norm is None:
        return features
    weight, bias = (
        np.full(len(features), fill) if p is None else p.detach().double().cpu().numpy()
        for p, fill in ((norm.weight, 1.0), (norm.bias, 0.0))
    )
    is_used = np.abs(weight) > _LEAST_SLOPE * np.abs(weight).max(initial=0)
    direction = np.where(is_used, (features - bias) / np.where(is_used, weight, 1), 0)
    direction -= direction.mean()
    length = direction.std()
    direction = direction / length if length > 0 else direction
    met: npt.NDArray[np.float64] = averages.mean() + averages.std() * direction
    return met


def attribute(
    score: Score, start: npt.NDArray[np.float64], end: npt.NDArray[np.float64], log_odds: float, *,
    num_steps: int, tolerance: float,
) -> Attribution:  # fmt: skip
    """Return the integrated gradients of a score, with steps doubled until they are complete.

    Args:
        score: Of averages.
        start: (D,) averages where the path begins.
        end: (D,) those of the image.
        log_odds: What the score at the end is by the network's own features.
        num_steps: To begin with: 1 is exact where the score is linear.
        tolerance: See ``completeness_bound``.
    """
    first, last = torch.from_numpy(start), torch.from_numpy(end)
    with torch.no_grad():
        baseline = float(score(first[None])[0])
    bound = completeness_bound(log_odds, tolerance)
    while True:
        weights = _mean_gradient(score, first, last, num_steps)
        residual = float(weights @ (last - first)) + baseline - log_odds
        if abs(residual) <= bound or num_steps >= _MAX_STEPS:
            return Attribution(weights.numpy(), start, baseline, residual, num_steps)
        num_steps *= 2


def completeness_bound(log_odds: float, tolerance: float) -> float:
    """Return by how much parts and baseline may miss the log-odds.

    By the tolerance; beyond 100, where features are float32, by that share of a hundredth of them.
    """
    return tolerance * max(1.0, abs(log_odds) / 100)


def _mean_gradient(
    score: Score, first: torch.Tensor, last: torch.Tensor, num_steps: int
) -> torch.Tensor:
    """Return the mean gradient (D,) at the middles of equal steps from one point to another."""
    total = torch.zeros_like(first)
    for begin in range(0, num_steps, _BLOCK_STEPS):
        places = torch.arange(begin, min(begin + _BLOCK_STEPS, num_steps), dtype=torch.float64)
        points = first + (last - first) * ((places + 0.5) / num_steps)[:, None]
        points.requires_grad_()
        (gradients,) = torch.autograd.grad(score(points).sum(), points)
        total += gradients.sum(0)
    return total / num_steps


def place_parts(
    positions: npt.NDArray[np.float32], weights: npt.NDArray[np.float64],
    start: npt.NDArray[np.float64],
) -> Plane:  # fmt: skip
    """Return what each position (H, W) adds to the log-odds, from a map (H, W, D)."""
    height, width, _ = positions.shape
    parts: Plane = (positions.astype(np.float64) - start) @ weights / (height * width)
    return parts


def sum_cells(plane: Plane, side: int) -> Plane:
    """Return the sums (side, side) of a plane (H, W), H and W being at least that."""
    rows, columns = (_edges(length, side)[:-1] for length in plane.shape)
    cells: Plane = np.add.reduceat(np.add.reduceat(plane, rows, 0), columns, 1)
    return cells


def choose_side(map_side: int | None) -> int:
    """Return into how many cells a side of an image is parted to cover one after the other.

    As many as the map has positions where that are few enough, else a number that divides them.
    """
    if map_side is None or map_side < 2:
        return 7
    if map_side <= 14:
        return map_side
    return next((side for side in range(14, 6, -1) if map_side % side == 0), 7)


def cover_cells(pixels: npt.NDArray[np.uint8], side: int) -> list[npt.NDArray[np.uint8]]:
    """Return copies of an image, in each of which one of side x side cells has its mean colour.

    Of 35 sick phantoms (Lite0, 7 x 7) the cell that mattered most lay in the sign of disease in 12
    by the default head and in 11 by a linear one, by chance in 6. Blurred cells, and covers two or
    three cells wide, were better for one of the heads and worse for the other.

    Args:
        pixels: (S, S) or (S, S, 3)
        side: Cells a side.
    """
    edges, covered = _edges(len(pixels), side), []
    for row in range(side):
        for column in range(side):
            copy = pixels.copy()
            cell = slice(edges[row], edges[row + 1]), slice(edges[column], edges[column + 1])
            copy[cell] = np.round(pixels.mean(axis=(0, 1)))
            covered.append(copy)
    return covered


def _edges(length: int, side: int) -> npt.NDArray[np.int64]:
    return np.round(np.linspace(0, length, side + 1)).astype(np.int64)


def rank_correlation(one: Plane, other: Plane) -> float | None:
    """Return Spearman's rank correlation of two planes; None where all values of one are equal."""
    ranks = [_ranks(plane.ravel()) for plane in (one, other)]
    first, second = (values - values.mean() for values in ranks)
    length = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / length if length > 0 else None


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return ranks; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    shared: npt.NDArray[np.float64] = (last - (counts - 1) / 2)[inverse]
    return shared


def share_inside(plane: Plane, side: float) -> dict[str, float | None]:
    """Return which share of what speaks for, and against, lies in the middle of the image.

    Args:
        plane: (H, W)
        side: Of the middle, as a share of the image's.
    """
    inside = np.multiply.outer(*(_inside(length, side) for length in plane.shape))
    shares = dict[str, float | None]()
    for name, of_sign in (("for", np.maximum(plane, 0)), ("against", np.maximum(-plane, 0))):
        total = float(of_sign.sum())
        shares[name] = min(float((of_sign * inside).sum()) / total, 1.0) if total > 0 else None
    return shares


def _inside(length: int, side: float) -> npt.NDArray[np.float64]:
    """Return which share of each of so many cells lies in the middle."""
    edges = np.linspace(-1, 1, length + 1)
    clipped = np.clip(edges, -side, side)
    return np.diff(clipped) / np.diff(edges)
