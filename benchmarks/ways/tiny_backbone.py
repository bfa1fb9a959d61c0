"""A network that costs next to nothing: what is left is everything around it."""

import torch
from torch import nn


class Tiny(nn.Module):
    """(B, 3, S, S) to (B, 48): means of a 4 x 4 grid."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features of a batch."""
        return nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


def build() -> nn.Module:
    """Return the network, for ``--backbone python:tiny_backbone:build``."""
    return Tiny()
