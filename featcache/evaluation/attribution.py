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

from featcache.backbones.pooling import PooledMap, apply_norm

_MAX_STEPS = 1 << 16
_BLOCK_STEPS = 1024  # 10 MB of 1280 features in float64
_LEAST_SLOPE = 1e-6  # of a norm, as a share of its largest: a feature of less carries nothing

Plane = npt.NDArray[np.float64]
"""(H, W)"""
Score = Callable[[torch.Tensor], torch.Tensor]
"""Averages (n, D) float64 -> log-odds (n,), differentiable."""


_LINEAR, _CURVED = (1, 1e-4), (64, 1e-3)  # steps to begin with, and what the sum may be off by


@dataclass(frozen=True)
class Attribution:
    """What moved the log-odds from those of the mean training image to those of an image.

    Attributes:
        weights: (D,) what a unit of each average moves: its mean gradient along the path.
        start: (D,) the averages where the path begins.
        baseline: Log-odds there. With the parts of all positions they are the log-odds.
        residual: By how much they miss them.
        num_steps: Points of the path at which the gradient was taken.
        is_complete: Whether they miss them by no more than the bound.
    """

    weights: npt.NDArray[np.float64]
    start: npt.NDArray[np.float64]
    baseline: float
    residual: float
    num_steps: int
    is_complete: bool


def attribute_maps(  # noqa: PLR0917 (a head, and what of each backbone it stands on)
    head: nn.Module, positive: int, against: int | None, maps: Sequence[PooledMap],
    norms: Sequence[nn.LayerNorm | None], mean: npt.NDArray[np.float64], *, is_linear: bool,
) -> tuple[Attribution, list[Plane], float]:  # fmt: skip
    """Return what each position of an image's maps adds to the log-odds of a class.

    Args:
        head: Features of all backbones, side by side, to logits, in float64.
        positive: Number of the class.
        against: Number of the other one; None for the logit of a label alone.
        maps: Of the image by each backbone; one without a map has a single position.
        norms: Between each backbone's averages and its features.
        mean: (D,) features where the path begins.
        is_linear: Whether the head is.

    Returns:
        The attribution, a plane (H, W) for each backbone, and the log-odds.
    """
    widths = [len(made.features) for made in maps]
    score = log_odds_of(head, positive, against)
    features = torch.cat([made.features for made in maps]).double()
    with torch.no_grad():
        log_odds = float(score(features[None])[0])
    edges = np.cumsum(widths)[:-1]
    starts, ends = [], []
    for made, part, norm in zip(maps, np.split(mean, edges), norms, strict=True):
        ends.append(made.positions.double().mean((0, 1)).numpy())
        starts.append(before_norm(part, ends[-1], norm))
    num_steps, tolerance = _LINEAR if is_linear and not any(norms) else _CURVED
    found = attribute(
        behind_norms(score, widths, norms), np.concatenate(starts), np.concatenate(ends),
        log_odds, num_steps=num_steps, tolerance=tolerance,
    )  # fmt: skip
    parts = zip(maps, np.split(found.weights, edges), starts, strict=True)
    planes = [place_parts(made.positions.numpy(), weights, start) for made, weights, start in parts]
    return found, planes, log_odds


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
        is_complete = abs(residual) <= bound
        if is_complete or num_steps >= _MAX_STEPS:
            return Attribution(weights.numpy(), start, baseline, residual, num_steps, is_complete)
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
