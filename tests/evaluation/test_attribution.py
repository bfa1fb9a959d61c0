"""The parts of a map add up to the log-odds, and are what captum's integrated gradients are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from featcache.backbones.backbone import build_backbone
from featcache.backbones.pooling import apply_norm, find_pooling, read_map
from featcache.evaluation.attribution import (
    Attribution,
    Score,
    attribute,
    before_norm,
    behind_norms,
    log_odds_of,
    place_parts,
)
from featcache.heads.ensemble import mean_of_heads
from featcache.heads.head import HeadConfig, build_head

NETWORKS = [  # the first two in CI
    "timm:convnext_atto", "torchvision:resnet18", "efficientnet-lite0", "torchvision:densenet121",
    "efficientnet-b0", "torchvision:convnext_tiny",
]  # fmt: skip


def random_head(width: int, hidden: tuple[int, ...], features: torch.Tensor, seed: int) -> Any:
    """Return a head in float64 whose batch norms know the features, with uneven weights."""
    head = build_head(HeadConfig(width, 3, hidden, 0.0), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _ in range(60):
            head(features.float())
        for parameter in head.parameters():
            parameter.mul_(1 + torch.rand(parameter.shape, generator=generator))
    return head.double().eval().requires_grad_(False)


def explained(
    positions: Any, norm: Any, score: Score, mean: Any, *, is_linear: bool
) -> tuple[Attribution, Any, float]:
    end = positions.double().mean((0, 1))
    start = before_norm(mean, end.numpy(), norm)
    normed = behind_norms(score, [len(end)], [norm])
    log_odds = float(score(apply_norm(end, norm)[None])[0])
    found = attribute(
        normed, start, end.numpy(), log_odds, num_steps=1 if is_linear else 64,
        tolerance=1e-4 if is_linear else 1e-3,
    )  # fmt: skip
    return found, place_parts(positions.numpy(), found.weights, found.start), log_odds


@pytest.fixture(scope="module")
def maps() -> Callable[[str], tuple[Any, Any, torch.Tensor]]:
    """``maps(name)``: the map of an image by a network, its norm, and features of six images."""
    made: dict[str, Any] = {}

    def find(name: str) -> Any:
        if name not in made:
            network = build_backbone(name, weights="random", image_size=64).network
            batch = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(1))
            pooling = find_pooling(network, batch[:1])
            assert pooling is not None
            found = read_map(network, batch, pooling)
            features = torch.stack([one.features for one in found])
            made[name] = found[0].positions, pooling.norm, features
        return made[name]

    return find


@pytest.mark.parametrize("hidden", [(), (16, 8)])
@pytest.mark.parametrize("name", NETWORKS)
def test_parts_and_baseline_are_the_log_odds(
    name: str, hidden: tuple[int, ...], maps: Any, rounds: Callable[[int, int], int]
) -> None:
    if NETWORKS.index(name) >= rounds(2, len(NETWORKS)):
        pytest.skip("with --long")
    positions, norm, features = maps(name)
    mean = features.double().mean(0).numpy()
    for seed in range(3):
        head = random_head(len(mean), hidden, features, seed)
        score = log_odds_of(head, 2, 0)
        is_linear = norm is None and not hidden
        found, parts, log_odds = explained(positions, norm, score, mean, is_linear=is_linear)
        bound = 1e-4 if is_linear else 1e-3
        assert abs(found.baseline + parts.sum() - log_odds) <= bound * max(1, abs(log_odds) / 100)
        assert found.num_steps == 1 or not is_linear
        if norm is None:
            assert found.baseline == pytest.approx(float(score(torch.tensor(mean)[None])[0]))


@pytest.mark.parametrize("name", NETWORKS)
def test_parts_are_captums_integrated_gradients(
    name: str, maps: Any, rounds: Callable[[int, int], int]
) -> None:
    attr = pytest.importorskip("captum.attr")
    if NETWORKS.index(name) >= rounds(2, len(NETWORKS)):
        pytest.skip("with --long")
    positions, norm, features = maps(name)
    mean = features.double().mean(0).numpy()
    heads = [random_head(len(mean), (16,), features, seed) for seed in range(3)]
    score = log_odds_of(mean_of_heads(heads, "multiclass"), 1, 0)
    found, parts, _ = explained(positions, norm, score, mean, is_linear=False)

    def whole(batch: torch.Tensor) -> torch.Tensor:
        return score(apply_norm(batch.mean((1, 2)), norm))

    baseline = torch.from_numpy(found.start).expand_as(positions)
    wanted = attr.IntegratedGradients(whole).attribute(
        positions.double()[None], baseline[None], n_steps=found.num_steps, method="riemann_middle"
    )
    np.testing.assert_allclose(parts, wanted[0].sum(2).numpy(), atol=1e-9)


def test_another_head_gives_another_map(maps: Any) -> None:
    positions, norm, features = maps("torchvision:resnet18")
    mean = features.double().mean(0).numpy()
    made = [
        explained(positions, norm, log_odds_of(random_head(len(mean), (16,), features, seed), 0, 1),
                  mean, is_linear=False)[1]
        for seed in range(6)
    ]  # fmt: skip
    pairs = [np.linalg.norm(one - made[0]) / np.linalg.norm(made[0]) for one in made[1:]]
    assert np.median(pairs) > 0.5


def test_steps_are_doubled_until_the_sum_is_right() -> None:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 2)).double()
    score = log_odds_of(head.requires_grad_(False), 0, 1)
    start, end = np.zeros(5), np.full(5, 30.0)
    log_odds = float(score(torch.from_numpy(end)[None])[0])
    rough = attribute(score, start, end, log_odds, num_steps=1, tolerance=1e9)
    fine = attribute(score, start, end, log_odds, num_steps=1, tolerance=1e-4)
    assert (rough.num_steps, rough.residual) != (fine.num_steps, fine.residual)
    assert fine.num_steps > 8
    assert abs(fine.residual) <= 1e-4 * max(1, abs(log_odds))


def test_a_mean_behind_a_norm_is_met_in_its_direction() -> None:
    norm = nn.LayerNorm(8).requires_grad_(False)
    norm.weight.uniform_(0.5, 2)
    norm.bias.uniform_(-1, 1)
    rng = np.random.default_rng(0)
    averages, seen = rng.normal(3, 5, 8), torch.from_numpy(rng.normal(0, 1, (20, 8)))
    mean = apply_norm(seen, norm).mean(0).numpy()
    start = before_norm(mean, averages, norm)
    assert start.mean() == pytest.approx(averages.mean())
    assert start.std() == pytest.approx(averages.std())
    weight, bias = norm.weight.double().numpy(), norm.bias.double().numpy()
    met = (apply_norm(torch.from_numpy(start), norm).numpy() - bias) / weight
    wanted = (mean - bias) / weight
    assert np.corrcoef(met, wanted)[0, 1] == pytest.approx(1)
    norm.weight[3] = 0  # carries nothing
    assert np.isfinite(before_norm(mean, averages, norm)).all()
