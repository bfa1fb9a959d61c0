"""What ``data/partial_v2`` was begun with: six BMP images and a network without random weights.

The folder is what an extraction that was killed left at c921d99, before there was a ledger: four
images in four shards, the third a copy, without vectors. Images and weights are of whole numbers,
so that they have the same bytes and the same sha256 with every version of Pillow and torch.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from featcache.backbones.backbone import Backbone, wrap_backbone


class _Mean(nn.Module):
    """Four weighted sums of the mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.arange(12, dtype=torch.float32).reshape(3, 4))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) @ self.weights


def backbone() -> Backbone:
    """Return the network: 8 x 8 images to 4 features."""
    return wrap_backbone("golden", _Mean(), image_size=8)


def write_images(folder: Path) -> Path:
    """Write the six images, with the times they had; number 1 and 2 are copies."""
    for number, seed in enumerate([0, 1, 1, 3, 4, 5]):
        pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3 + 10 * seed
        path = folder / ("train" if number < 4 else "valid") / "ab"[number % 2] / f"{number}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        os.utime(path, ns=(number, 1_700_000_000_000_000_000 + number))
    return folder
