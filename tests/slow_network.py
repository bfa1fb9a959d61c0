"""The tiny network with a pause in each batch, so that processes can be killed while they work."""

from __future__ import annotations

import time

import tiny_network
import torch

from featcache.backbones.backbone import Backbone, wrap_backbone

SECONDS = 0.15


class SlowNetwork(tiny_network.TinyNetwork):
    """Takes ``SECONDS`` a batch."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_tracing():
            time.sleep(SECONDS)
        return super().forward(images)


def build() -> Backbone:
    """Return it as a backbone, with the weights of the tiny one."""
    network = SlowNetwork()
    network.load_state_dict(tiny_network.network().state_dict())
    return wrap_backbone("python:slow_network:build", network, image_size=tiny_network.IMAGE_SIZE)
