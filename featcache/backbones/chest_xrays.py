"""The DenseNets of torchxrayvision, which were trained on public chest X-rays.

This is the only module that imports torchxrayvision, when one of its networks is asked for.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from featcache.backbones.libraries import Blueprint, call_foreign
from featcache.backbones.weights import unreachable
from featcache.errors import BackboneError

_T = TypeVar("_T")

# xrv.datasets.normalize(image, 255): 2 * x / 255 - 1, times 1024 (torchxrayvision 1.5.7, utils.py).
_RANGE = ((0.5,) * 3, (1 / 2048,) * 3)


class GreyFeatures(nn.Module):
    """A DenseNet of torchxrayvision for images of three channels, whose mean it sees.

    The state has the library's names. With ``classifier`` replaced by ``nn.Identity`` the output is
    the library's ``features2``.

    Args:
        network: An ``xrv.models.DenseNet``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.features, self.classifier = network.features, network.classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return (B, C) logits for (B, 3, S, S) images in [-1024, 1024]."""
        hidden = nn.functional.relu(self.features(images.mean(1, keepdim=True)))  # type: ignore[operator]
        pooled = nn.functional.adaptive_avg_pool2d(hidden, 1).flatten(1)
        return self.classifier(pooled)  # type: ignore[operator, no-any-return]


def find_xrv(name: str, size: int | None) -> Blueprint:
    """Return how to build a network of torchxrayvision; ``densenet121`` is ``-res224-all``.

    Raises:
        BackboneError: If there is no such network.
        ModuleNotFoundError: If the library, or one that it imports, is not installed.
    """
    models = _quietly(_import_models)
    known = [key for key in models.model_urls if key.startswith("densenet121-")]
    key = "densenet121-res224-all" if name == "densenet121" else name
    if key not in known:
        raise BackboneError(
            "backbone", expected="xrv:densenet121, or xrv: and one of " + ", ".join(known),
            found=f"xrv:{name}",
        )  # fmt: skip

    def download() -> tuple[Mapping[str, Any], str]:
        url = models.model_urls[key]["weights_url"]
        try:
            network = _quietly(lambda: models.DenseNet(weights=key))
        except Exception as error:  # requests' kinds, and those of damaged pickles
            place = Path(models.utils.get_cache_dir()) / url.rpartition("/")[2]
            raise unreachable(url, str(place), error) from error
        state = network.state_dict()
        return {name: value for name, value in state.items() if name != "op_threshs"}, key

    def build() -> nn.Module:
        return GreyFeatures(call_foreign(f"xrv:{name}", lambda: _quietly(models.DenseNet)))

    side = size or int(models.model_urls[key]["input_resolution"])
    return Blueprint(side, _RANGE, build, "classifier", download)


def _import_models() -> Any:
    from torchxrayvision import models

    return models


def _quietly(call: Callable[[], _T]) -> _T:
    """Call the library without what it prints, and keep Python's filters of warnings.

    Importing it turns all warnings off, and its download prints to standard output.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        return call()
