"""Batches as the networks take them: make them of images, and run them.

Reads: images. Writes: nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from featcache.backbones.backbone import Backbone
from featcache.data.dataset import Sample
from featcache.deployment.inputs import Inputs
from featcache.errors import ConfigError
from featcache.extraction.recipe import Recipe
from featcache.pixels.images import load, load_opened, resize_to_square
from featcache.runtime import exact_fp32

Row: TypeAlias = npt.NDArray[np.float32] | str
"""Of an image: its features (D,), or why there are none."""
IMAGES_AT_ONCE = 64  # of those in memory: 10 MB of pixels at 224 x 224


def fit_image(image: Any, recipe: Recipe) -> npt.NDArray[np.uint8]:
    """Return pixels (S, S) or (S, S, 3) of a file's bytes, a PIL image or an array."""
    rules = recipe.rules.with_dicom()
    picture = load(image, rules) if isinstance(image, bytes) else load_opened(image, rules)
    return resize_to_square(picture.pixels, rules)


def make_batches(inputs: Inputs, recipes: Sequence[Recipe]) -> tuple[torch.Tensor, ...]:
    """Return images as each network takes them: see ``Classifier.preprocess_each``."""
    batches = []
    for recipe in recipes:
        backbone = recipe.backbone
        pixels = np.empty((len(inputs.images), *[backbone.image_size] * 2, 3), np.uint8)
        for slot, image in zip(pixels, inputs.images, strict=True):
            data = inputs.dataset.read(image) if isinstance(image, Sample) else image
            fitted = fit_image(data, recipe)
            slot[:] = fitted[:, :, None] if fitted.ndim == 2 else fitted
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone.mean, backbone.std))
        scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        batches.append((scaled - mean) / std)
    return tuple(batches)


def run_batches(
    images: Any, recipes: Sequence[Recipe], networks: Sequence[nn.Module], device: torch.device
) -> npt.NDArray[np.float32]:
    """Return the features (B, D) of preprocessed batches, by the library's own networks."""
    batches = images if len(recipes) > 1 else [images]
    if not isinstance(batches, list | tuple) or len(batches) != len(recipes):
        raise ConfigError(
            "preprocessed images", expected=f"{len(recipes)} batches, one a backbone",
            found=f"{type(batches).__name__}", hint="Make them with preprocess_each",
        )  # fmt: skip
    made = [
        _run_batch(batch, recipe.backbone, network, device)
        for batch, recipe, network in zip(batches, recipes, networks, strict=True)
    ]
    if len({len(features) for features in made}) > 1:
        raise ConfigError(
            "preprocessed images", expected="batches of the same images",
            found=" and ".join(str(len(features)) for features in made),
        )  # fmt: skip
    return np.concatenate(made, axis=1)


def _run_batch(
    batch: Any, backbone: Backbone, network: nn.Module, device: torch.device
) -> npt.NDArray[np.float32]:
    side = backbone.image_size
    shape = tuple(getattr(batch, "shape", ()))
    if not (
        isinstance(batch, torch.Tensor)
        and batch.is_floating_point()
        and shape == (len(batch), 3, side, side)
    ):
        raise ConfigError(
            "preprocessed images", expected=f"a float tensor (B, 3, {side}, {side})",
            found=f"{getattr(batch, 'dtype', type(batch).__name__)} {shape}",
            hint="Make it with preprocess, or leave preprocessed=True out",
        )  # fmt: skip
    with torch.inference_mode(), exact_fp32():
        parts = torch.split(batch.to(torch.float32), IMAGES_AT_ONCE)
        rows = [row for part in parts for row in network(part.to(device)).cpu().numpy()]
    return np.array(rows, np.float32).reshape(-1, backbone.num_features)


def join_rows(rows: Sequence[Row]) -> Row:
    """Return the features of one image side by side, or the first reason why there are none."""
    features = list[npt.NDArray[np.float32]]()
    for row in rows:
        if isinstance(row, str):
            return row
        features.append(row)
    return features[0] if len(features) == 1 else np.concatenate(features)
