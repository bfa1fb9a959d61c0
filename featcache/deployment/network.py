"""Backbones and a trained head as one torch module.

Reads: nothing. Writes: nothing.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from featcache.backbones.backbone import Backbone


class SideBySide(nn.Module):
    """Several backbones and one head that sees their features side by side.

    Args:
        backbones: Each from (B, 3, S, S) with its own S to (B, D) with its own D.
        head: From the sum of the D to (B, C).
    """

    def __init__(self, backbones: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.backbones, self.head = nn.ModuleList(backbones), head

    def forward(self, *images: torch.Tensor) -> torch.Tensor:
        """Return logits (B, C) of the same B images, a batch for each backbone."""
        pairs = zip(self.backbones, images, strict=True)
        logits: torch.Tensor = self.head(torch.cat([network(batch) for network, batch in pairs], 1))
        return logits


def join_network(backbones: Sequence[Backbone], head: nn.Sequential) -> nn.Module:
    """Return copies of backbones and head as one module, in eval mode.

    The head stands where the library's classifier was (``_fc`` of efficientnet_pytorch), or behind
    the backbone where it had none. Several backbones are a ``SideBySide``.
    """
    networks = [copy.deepcopy(backbone.network) for backbone in backbones]
    head = copy.deepcopy(head).cpu()
    if len(networks) > 1:
        return SideBySide(networks, head).eval()
    name = backbones[0].classifier_name
    if name is None:
        return nn.Sequential(OrderedDict(backbone=networks[0], head=head)).eval()
    networks[0].set_submodule(name, head)
    return networks[0].eval()
