"""The maps of images by the networks of recipes.

Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from featcache.backbones.pooling import PooledMap, Pooling, find_pooling, read_map
from featcache.extraction.recipe import Recipe
from featcache.runtime import exact_fp32


class MapReader:
    """Runs networks on images one by one; what each pools is looked for on its first image.

    Args:
        recipes: Backbones and what they take.
        networks: Of the backbones, on the device, in eval mode.
        device: Where they are.
    """

    def __init__(
        self, recipes: Sequence[Recipe], networks: Sequence[nn.Module], device: torch.device
    ) -> None:
        self._recipes, self._networks, self._device = recipes, networks, device
        self._poolings: list[Pooling | None] | None = None

    @property
    def has_map(self) -> list[bool]:
        """Of each backbone, whether its features are the mean over a map. Known after an image."""
        return [pooling is not None for pooling in self._poolings or ()]

    @property
    def norms(self) -> list[nn.LayerNorm | None]:
        """Of each backbone, the norm behind the mean. Known after an image."""
        return [None if pooling is None else pooling.norm for pooling in self._poolings or ()]

    def read(self, pixels: Sequence[npt.NDArray[np.uint8]]) -> list[PooledMap]:
        """Return features and map of an image by each backbone; 1 x 1 where there is no map.

        Args:
            pixels: What each backbone sees, (S, S) or (S, S, 3).

        Raises:
            BackboneError: If a network does not run alike for all images.
        """
        batches = [
            _to_batch(image, recipe).to(self._device)
            for image, recipe in zip(pixels, self._recipes, strict=True)
        ]
        if self._poolings is None:
            self._poolings = [*map(find_pooling, self._networks, batches)]
        made = []
        for network, batch, pooling in zip(self._networks, batches, self._poolings, strict=True):
            if pooling is not None:
                made += read_map(network, batch, pooling)
                continue
            with torch.no_grad(), exact_fp32():
                (features,) = network(batch).float().cpu()
            made.append(PooledMap(features, features[None, None]))
        return made


def _to_batch(pixels: npt.NDArray[np.uint8], recipe: Recipe) -> torch.Tensor:
    """Return an image (S, S) or (S, S, 3) as the network takes it: (1, 3, S, S)."""
    rgb = np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels
    backbone = recipe.backbone
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (backbone.mean, backbone.std))
    return (torch.from_numpy(rgb.copy())[None].permute(0, 3, 1, 2).float() / 255 - mean) / std
