"""The map whose mean over its positions is a backbone's features, found by running the network.

Most convolutional networks, and some transformers, end in an average over the positions of their
last map. ``find_pooling`` looks for it among the operations of one forward pass, so it needs no
names of layers, and proves it: the features are computed again from the map.

Reads and writes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from featcache.errors import BackboneError
from featcache.precision import PARITY_BOUNDS
from featcache.runtime import exact_fp32

_MAX_ERROR = PARITY_BOUNDS["fp32"]  # relative L2 error of features computed from the map


@dataclass(frozen=True)
class Pooling:
    """The last average over positions in a network's forward pass.

    Attributes:
        number: Which average of the forward pass it is, from 0.
        norm: A layer norm of the averages behind it (ConvNeXt has one), None where the averages
            are the features themselves.
    """

    number: int
    norm: nn.LayerNorm | None


@dataclass(frozen=True)
class PooledMap:
    """What one forward pass of an image gave.

    Attributes:
        features: (D,) float32, as the network returned them.
        positions: (H, W, D) float32, whose mean over H and W, normed where there is a norm, is the
            features.
    """

    features: torch.Tensor
    positions: torch.Tensor


class _Averages(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Notes what is averaged over positions in a forward pass."""

    def __init__(self, keep: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count, self.map = 0, None
        self._keep = keep

    map: torch.Tensor | None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Do the operation, and keep what it averages if it does so over positions."""
        made = func(*args, **(kwargs or {}))
        positions = _averaged(func, args, made)
        if positions is not None:
            if self._keep in {None, self.count}:
                self.map = positions
            self.count += 1
        return made


def _averaged(func: Any, args: tuple[Any, ...], made: Any) -> torch.Tensor | None:
    """Return what an operation averages over all positions, as (B, H, W, D); None of another."""
    aten, given = torch.ops.aten, args[0] if args else None
    if not isinstance(given, torch.Tensor) or not isinstance(made, torch.Tensor):
        return None
    if func is aten.mean.dim and given.ndim in {3, 4} and args[1]:
        over = sorted(dim % given.ndim for dim in args[1])
        if given.ndim == 4 and over in ([1, 2], [2, 3]):
            return given if over == [1, 2] else given.permute(0, 2, 3, 1)
        if given.ndim == 3 and over in ([1], [2]):  # tokens, of a square
            tokens = given if over == [1] else given.transpose(1, 2)
            side = math.isqrt(tokens.shape[1])
            if side * side == tokens.shape[1]:
                return tokens.reshape(len(tokens), side, side, -1)
    is_pool = func in {aten.avg_pool2d.default, aten._adaptive_avg_pool2d.default}
    if is_pool and given.ndim == 4 and made.shape[-2:] == (1, 1):
        return given.permute(0, 2, 3, 1)
    return None


def find_pooling(network: nn.Module, images: torch.Tensor) -> Pooling | None:
    """Return the average over positions that gives a network's features, None if there is none.

    Args:
        network: (B, 3, S, S) to (B, D), in eval mode.
        images: (B, 3, S, S) to find and prove it on.
    """
    norms = list[nn.LayerNorm]()
    handles = [
        module.register_forward_hook(lambda norm, *_: norms.append(norm))
        for module in network.modules() if isinstance(module, nn.LayerNorm)
    ]  # fmt: skip
    averages = _Averages()
    try:
        features = _run(network, images, averages)
    finally:
        for handle in handles:
            handle.remove()
    if averages.map is None:
        return None
    last = norms[-1:]  # of those in the network's order, only the last can stand behind it
    for norm in (None, *last):
        if _is_mean(averages.map, norm, features):
            return Pooling(averages.count - 1, norm)
    return None


def read_map(network: nn.Module, images: torch.Tensor, pooling: Pooling) -> list[PooledMap]:
    """Return the map of each image, after computing the features from it again.

    Args:
        network: (B, 3, S, S) to (B, D), in eval mode.
        images: (B, 3, S, S)
        pooling: What ``find_pooling`` returned for the network.

    Raises:
        BackboneError: If the map does not give the features: the network does not run alike for
            all images.
    """
    averages = _Averages(pooling.number)
    features = _run(network, images, averages)
    if averages.map is None or not _is_mean(averages.map, pooling.norm, features):
        raise BackboneError(
            "map of the backbone", expected=f"features within {_MAX_ERROR:g} of the mean over it",
            found="others", hint="The network runs differently for each image: this is a bug",
        )  # fmt: skip
    pairs = zip(features.cpu(), averages.map.float().cpu(), strict=True)
    return [PooledMap(of_image, positions) for of_image, positions in pairs]


def apply_norm(pooled: torch.Tensor, norm: nn.LayerNorm | None) -> torch.Tensor:
    """Return the features (..., D) of averages (..., D), in their dtype."""
    if norm is None:
        return pooled
    weight, bias = (None if p is None else p.to(pooled) for p in (norm.weight, norm.bias))
    return nn.functional.layer_norm(pooled, pooled.shape[-1:], weight, bias, norm.eps)


def _run(network: nn.Module, images: torch.Tensor, averages: _Averages) -> torch.Tensor:
    # Not inference_mode: there a mode would see one operation in place of those it is made of.
    with torch.no_grad(), exact_fp32(), averages:
        features: torch.Tensor = network(images)
    return features


def _is_mean(positions: torch.Tensor, norm: nn.LayerNorm | None, features: torch.Tensor) -> bool:
    pooled = positions.double().mean((1, 2))
    if pooled.shape != features.shape:
        return False
    found, wanted = apply_norm(pooled, norm), features.double()
    error = (found - wanted).norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-30)
    return bool((error <= _MAX_ERROR).all())
