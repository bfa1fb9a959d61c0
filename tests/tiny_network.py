"""A network small enough for tests, importable as ``python:tiny_network:build``."""

from __future__ import annotations

import torch
from torch import nn

from featcache.backbones.backbone import Backbone, wrap_backbone

IMAGE_SIZE = 32
NUM_FEATURES = 24


class TinyNetwork(nn.Module):
    """Convolution, batch norm, SiLU, dropout, pooling: (B, 3, 32, 32) to (B, 24)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.drop = nn.Dropout(0.5)
        self.widen = nn.Conv2d(12, NUM_FEATURES, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(nn.functional.silu(self.norm(self.conv(images))))
        return nn.functional.silu(self.widen(hidden)).mean((2, 3))


def network() -> TinyNetwork:
    """Return the network with seeded weights and batch-norm statistics that are not trivial."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        made = TinyNetwork()
        made.norm.running_mean.uniform_(-0.2, 0.2)
        made.norm.running_var.uniform_(0.5, 2.0)
    return made


def build() -> Backbone:
    """Return it as a backbone."""
    return wrap_backbone("python:tiny_network:build", network(), image_size=IMAGE_SIZE)


def state(seed: int = 3) -> dict[str, torch.Tensor]:
    """Return a state dict for the network in which no two tensors are alike."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value.clone() if name.endswith("tracked") else torch.rand(
            value.shape, generator=generator
        )
        for name, value in network().state_dict().items()
    }  # fmt: skip


def shard_bytes(rows: int, batch_size: int, num_features: int = NUM_FEATURES) -> int:
    """Return the ``SHARD_BYTES`` with which shards have so many rows.

    Of the engines of torch on a CPU, which run one batch at a time: three are under way at most.
    """
    return (rows - 1 + 3 * batch_size) * num_features * 4
