"""Images to run networks on, and what the plain networks answer."""

import numpy as np
import tiny_network
import torch
from torchvision import transforms

from featcache.backbones.engine import (
    build_engine,
)

CPU = torch.device("cpu")


def pictures(number, size, seed=0):
    """Return (n, S, S, 3) uint8: a smooth ramp with noise, each image of its own brightness."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 150, size)[:, None, None] + np.linspace(0, 60, size)[None, :, None]
    noise = rng.integers(0, 30, (number, size, size, 3))
    return (ramp + noise + rng.integers(0, 15, (number, 1, 1, 1))).astype(np.uint8)


def tiny_engine(**options):
    options = {"batch_size": 4, **options}
    return build_engine(tiny_network.build(), CPU, pictures(2, 32), **options)


def worst(found, truth):
    """Return the largest relative L2 error of a row, by other arithmetic than the engine's."""
    return max(
        np.linalg.norm(np.float64(row) - true) / np.linalg.norm(np.float64(true))
        for row, true in zip(found, truth, strict=True)
    )


def plain_features(backbone, pixels):
    """Return the network's own answer to normalized images, one at a time."""
    normalize = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(backbone.mean, backbone.std)]
    )
    with torch.inference_mode():
        return np.concatenate([backbone.network(normalize(p)[None]).numpy() for p in pixels])


def images(size, number=2, seed=0):
    """Return a batch of normalized images."""
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(seed))


def run(network, batch):
    with torch.inference_mode():
        return network(batch)


def off_by(found, truth):
    return float((found - truth).norm() / truth.norm())
