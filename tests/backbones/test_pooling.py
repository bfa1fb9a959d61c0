"""The map behind the features is found by structure, and proved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from featcache.backbones.backbone import build_backbone
from featcache.backbones.pooling import Pooling, apply_norm, find_pooling, read_map
from featcache.errors import BackboneError

NETWORKS = [  # the first two in CI
    "timm:convnext_atto", "efficientnet-lite0", "torchvision:resnet18", "efficientnet-b0",
    "torchvision:densenet121", "torchvision:swin_t", "timm:regnety_002",
    "torchvision:convnext_tiny",
]  # fmt: skip
WITHOUT = ["torchvision:mobilenet_v3_small", "torchvision:vit_b_32", "torchvision:alexnet"]


def images(side: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NETWORKS)
def test_libraries_networks(name: str, rounds: Callable[[int, int], int]) -> None:
    if NETWORKS.index(name) >= rounds(2, len(NETWORKS)):
        pytest.skip("with --long")
    network = build_backbone(name, weights="random", image_size=64).network
    pooling = find_pooling(network, images())
    assert pooling is not None
    assert (pooling.norm is not None) == ("convnext" in name)
    with torch.no_grad():
        wanted = network(images())
    for made, features in zip(read_map(network, images(), pooling), wanted, strict=True):
        assert made.positions.shape == (2, 2, len(features))
        torch.testing.assert_close(made.features, features, rtol=1e-5, atol=1e-6)
        found = apply_norm(made.positions.mean((0, 1)), pooling.norm)
        torch.testing.assert_close(found, features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WITHOUT)
def test_features_behind_other_layers_have_no_map(
    name: str, rounds: Callable[[int, int], int]
) -> None:
    if WITHOUT.index(name) >= rounds(1, len(WITHOUT)):
        pytest.skip("with --long")
    size = 224 if "vit" in name else 64
    network = build_backbone(name, weights="random", image_size=size).network
    assert find_pooling(network, images(size)) is None


class Toy(nn.Module):
    """Rows of pixels, pooled in one of several ways."""

    def __init__(self, pool: Callable[[Any], Any]) -> None:
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(3, 6, 3), nn.LayerNorm(6), pool

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.pool(self.conv(batch))
        return made


@pytest.mark.parametrize(
    ("pool", "found"),
    [
        (lambda x: x.mean((2, 3)), True),
        (lambda x: x.mean((-1, -2), keepdim=True).flatten(1), True),
        (lambda x: nn.functional.avg_pool2d(x, x.shape[-1]).flatten(1), True),
        (lambda x: nn.functional.adaptive_avg_pool2d(x, 1)[..., 0, 0], True),
        (lambda x: x.flatten(2).transpose(1, 2).mean(1), True),
        (lambda x: x.permute(0, 2, 3, 1).mean((1, 2)), True),
        (lambda x: x.amax((2, 3)), False),
        (lambda x: x.mean((2, 3)) + x.amax((2, 3)), False),
        (lambda x: x.mean((2, 3)).relu() + 1, False),
        (lambda x: x[:, :, 0].mean(2), False),
    ],
)
def test_every_way_to_average(pool: Callable[[Any], Any], found: bool) -> None:
    network = Toy(pool).eval()
    pooling = find_pooling(network, images(16))
    assert pooling == (Pooling(0, None) if found else None)
    if pooling is not None:
        assert read_map(network, images(16), pooling)[1].positions.shape == (14, 14, 6)


def test_a_norm_behind_the_average_is_found_and_a_second_one_is_not() -> None:
    network = Toy(lambda x: network.norm(x.mean((2, 3)))).eval()
    assert find_pooling(network, images(16)) == Pooling(0, network.norm)
    network.pool = lambda x: network.norm(network.norm(x.mean((2, 3))) + 1)
    assert find_pooling(network, images(16)) is None


def test_a_map_that_does_not_give_the_features_is_refused() -> None:
    network = Toy(lambda x: x.mean((2, 3))).eval()
    pooling = find_pooling(network, images(16))
    assert pooling is not None
    network.pool = lambda x: x.mean((2, 3)) + 1
    with pytest.raises(BackboneError, match="map of the backbone"):
        read_map(network, images(16), pooling)
