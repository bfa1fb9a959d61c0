"""Backbones built once for all tests of this folder."""

from __future__ import annotations

import pytest
import tiny_network

from featcache.backbones.backbone import Backbone, build_backbone

NAMES = ["efficientnet-lite0", "efficientnet-b0", "torchvision:resnet18"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    """On shared cores two threads take twice as long as one."""


@pytest.fixture(scope="session")
def backbones() -> dict[str, Backbone]:
    """Each by its name, and ``tiny``; at 64 pixels, a twelfth of the work of 224."""
    named = {
        name: build_backbone(name, weights=weights, image_size=64)
        for name, weights in zip(NAMES, (None, "random", "random"), strict=True)
    }
    return named | {"tiny": tiny_network.build()}


@pytest.fixture(scope="session")
def lite0() -> Backbone:
    """Lite0 as it is used: real weights, 224 pixels."""
    return build_backbone("efficientnet-lite0")


@pytest.fixture(scope="session")
def b0() -> Backbone:
    """B0 of random weights at 224 pixels."""
    return build_backbone("efficientnet-b0", weights="random")
