"""Folding against what it must leave: no batch norms, no padding of its own, the same values."""

import copy

import pytest
import torch
from torch import nn

from featcache.backbones.forward import fold

NAMES = ["efficientnet-b0", "efficientnet-lite0", "torchvision:resnet18", "tiny"]


def count(network, *names):
    return sum(type(module).__name__ in names for module in network.modules())


@pytest.mark.parametrize("name", NAMES)
def test_folding_leaves_no_batch_norm(backbones, name):
    backbone = backbones[name]
    network = copy.deepcopy(backbone.network)
    assert count(network, "BatchNorm2d") > 0
    folded = fold(network, backbone.image_size)
    assert count(folded, "BatchNorm2d", "MemoryEfficientSwish", "Swish") == 0
    for module in folded.modules():
        if isinstance(module, nn.ZeroPad2d):  # what could not go into the convolution
            left, right, top, bottom = module.padding
            assert (left, top) != (right, bottom)
    assert count(backbone.network, "BatchNorm2d") > 0


def test_folding_reaches_the_padding_and_swish_of_b0(backbones):
    network = backbones["efficientnet-b0"].network
    folded = fold(copy.deepcopy(network), 64)
    assert count(folded, "SiLU") == count(network, "MemoryEfficientSwish") > 10
    # only stride 2 pads unevenly: stem and four of the blocks
    assert count(network, "ZeroPad2d") == 17
    assert count(folded, "ZeroPad2d") == 5


@pytest.mark.parametrize("name", NAMES)
def test_a_folded_network_gives_the_same_features(backbones, name):
    backbone = backbones[name]
    folded = fold(copy.deepcopy(backbone.network), backbone.image_size)
    size = backbone.image_size
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        torch.testing.assert_close(folded(images), backbone.network(images), rtol=1e-4, atol=1e-5)
