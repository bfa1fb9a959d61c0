"""Build a frozen network by name, with its preprocessing and the hash of its weights.

The classifier is replaced by ``nn.Identity``, so that a forward pass returns the pooled pre-logits.
Nothing else is changed: parameters keep the library's names, so that the library can load an
exported file.
"""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featcache.backbones.libraries import build_network, call_foreign, find_blueprint
from featcache.backbones.weights import load_state, read_state
from featcache.errors import BackboneError, ConfigError
from featcache.files import canonical_json
from featcache.formatting import brief_repr

NORMALIZATIONS = {
    # torchvision's ImageNet statistics: EfficientNet-B0..B7 and most others were trained with them.
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    # The tutorial's choice, and EfficientNet-Lite's own.
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
RANDOM_WEIGHTS_SEED = 0


@dataclass(frozen=True)
class Backbone:
    """A frozen network from (B, 3, S, S) float32 to (B, D), and its preprocessing.

    Attributes:
        name: The name it was built by.
        network: The library's module, classifier replaced by ``nn.Identity``; eval mode, no
            gradients.
        classifier_name: Dotted name of the classifier (``_fc``), or None if there was none.
        num_features: D.
        image_size: S, in pixels.
        mean: Per channel, for pixels in [0, 1].
        std: Per channel, for pixels in [0, 1].
        weights_sha256: Hash of the state without the classifier (see ``state_sha256``).
        weights_source: Where the weights came from, for messages: a file name or ``random``.
        built_as: ``library`` for the few networks that earlier versions built unlike their library
            builds them with weights; None for all others. Part of a cache's identity.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    name: str
    network: nn.Module
    classifier_name: str | None
    num_features: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    weights_sha256: str
    weights_source: str
    built_as: str | None = None


def build_backbone(
    name: str,
    *,
    weights: str | Path | None = None,
    image_size: int | str = "auto",
    normalize: str = "auto",
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
) -> Backbone:
    """Build a frozen backbone by name.

    Args:
        name: ``efficientnet-b0`` to ``-b7``, ``efficientnet-lite0``, ``torchvision:NAME``,
            ``timm:NAME``, ``xrv:NAME`` or ``python:package.module:function``.
        weights: A state-dict file (.pt, .pth, .safetensors), ``random`` (seeded; for benchmarks
            and tests), or None for the library's own pretrained weights.
        image_size: Side in pixels, or ``auto`` for the backbone's own.
        normalize: ``auto`` (the backbone's own), ``imagenet`` or ``half``.
        mean: Three values for pixels in [0, 1]; overrides ``normalize`` together with ``std``.
        std: Three positive values.

    Raises:
        BackboneError: If the name is unknown, its library is missing, or the weights cannot be
            loaded or do not fit.
        ConfigError: If size, mean or std are invalid.
    """
    size = None if image_size == "auto" else _check_image_size(image_size)
    with torch.random.fork_rng(devices=[]):  # libraries use torch's global generator
        torch.manual_seed(RANDOM_WEIGHTS_SEED)
        blueprint = find_blueprint(name, size)
        network, is_other = build_network(name, blueprint)
    if isinstance(network, Backbone):  # a user's function may return a Backbone
        return _use_ready_made(
            network, name, weights=weights, image_size=size, normalize=normalize, mean=mean, std=std
        )
    classifiers = blueprint.classifier_name or blueprint.removed
    if weights == "random":
        is_resized = blueprint.resize is not None
        own = blueprint.image_size if is_resized else size or blueprint.image_size
        _calibrate_batch_norms(name, network, own)
        source = f"random (seed {RANDOM_WEIGHTS_SEED})"
    elif weights is not None:
        load_state(network, read_state(Path(weights)), classifiers, str(weights))
        source = Path(weights).name
    elif blueprint.download is not None:
        state, source = blueprint.download()
        load_state(network, state, classifiers, source)
    else:
        source = "as built by the function"
    if resize := blueprint.resize:
        network = call_foreign(name, lambda: resize(network))
    if cut := blueprint.cut:
        call_foreign(name, lambda: cut(network))
    default = blueprint.normalization if normalize == "auto" else normalize
    mean, std = _resolve_normalization(default, mean, std)
    backbone = wrap_backbone(
        name, network, image_size=size or blueprint.image_size, mean=mean, std=std,
        classifier_name=blueprint.classifier_name, weights_source=source,
    )  # fmt: skip
    return replace(backbone, built_as="library") if is_other else backbone


def wrap_backbone(
    name: str,
    network: nn.Module,
    *,
    image_size: int = 224,
    mean: tuple[float, float, float] = NORMALIZATIONS["imagenet"][0],
    std: tuple[float, float, float] = NORMALIZATIONS["imagenet"][1],
    classifier_name: str | None = None,
    weights_source: str = "in memory",
) -> Backbone:
    """Make a backbone from any module that maps (B, 3, S, S) to (B, D).

    The module itself is not changed: a copy is frozen.

    Args:
        name: The name to record in the cache.
        network: The module. With ``classifier_name``, that layer is removed first.
        image_size: S, in pixels.
        mean: Three values for pixels in [0, 1].
        std: Three positive values.
        classifier_name: Dotted name of the layer to replace by ``nn.Identity``, or None.
        weights_source: Where the weights came from, for messages.

    Raises:
        BackboneError: If the module does not return one row of finite features per image.
    """
    mean, std = _resolve_normalization((mean, std), None, None)
    frozen = copy.deepcopy(network).cpu().float().eval().requires_grad_(requires_grad=False)
    if classifier_name is not None:
        cut = nn.Identity().eval()
        call_foreign(name, lambda: frozen.set_submodule(classifier_name, cut, strict=True))
    with torch.inference_mode():
        images = torch.zeros(2, 3, image_size, image_size)
        features = call_foreign(name, lambda: frozen(images))
    if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != 2:
        found = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features)
        raise BackboneError(
            f"backbone {name}", expected="(B, D) features for (B, 3, S, S) images", found=found,
            hint="Pool the feature map and return one row per image",
        )  # fmt: skip
    if not torch.isfinite(features).all():
        raise BackboneError(
            f"backbone {name}", expected="finite features", found="NaN or infinity",
            where=weights_source, hint="Check the weights file",
        )  # fmt: skip
    return Backbone(
        name, frozen, classifier_name, features.shape[1], image_size, mean, std,
        state_sha256(frozen), weights_source,
    )  # fmt: skip


def state_sha256(network: nn.Module) -> str:
    """Return the sha256 (64 hex digits) of a network's parameters and buffers.

    It covers each entry's name, dtype, shape and bytes, sorted by name.
    """
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        array = value.detach().cpu().contiguous()
        digest.update(canonical_json([name, str(array.dtype), list(array.shape)]).encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _use_ready_made(backbone: Backbone, name: str, **options: Any) -> Backbone:
    """Return a ready-made backbone under the requested name, after checking the options.

    Raises:
        ConfigError: If an option differs from the backbone's own setting.
    """
    own = {"image_size": backbone.image_size, "mean": backbone.mean, "std": backbone.std}
    for option, value in options.items():
        if value in (None, "auto") or (option in own and own[option] == value):
            continue
        raise ConfigError(
            f"--{option.replace('_', '-')}", expected=f"what {name} made itself", found=value,
            hint="It returns a ready Backbone: set this where it is made",
        )  # fmt: skip
    return replace(backbone, name=name)


def _calibrate_batch_norms(name: str, network: nn.Module, image_size: int) -> None:
    """Set the variances of batch norms from seeded noise; else features would be near 1e-13.

    Variances are rounded to powers of two, so that weights and hash are the same on all machines.
    """

    def fit(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None:
            variance = inputs[0].var().clamp(1e-20, 1e20)
            norm.running_var.fill_(float(2 ** variance.log2().round()))

    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return
    noise = torch.randn(2, 3, image_size, image_size, generator=_seeded())
    handles = [module.register_forward_pre_hook(fit) for module in network.modules()]
    network.eval()
    with torch.no_grad():
        call_foreign(name, lambda: network(noise))
    for handle in handles:
        handle.remove()


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(RANDOM_WEIGHTS_SEED)


# ---------------------------------------------------------------------------------- preprocessing


def _check_image_size(value: int | str) -> int:
    if type(value) is not int or not 32 <= value <= 4096:
        raise ConfigError("--image-size", expected="auto, or pixels from 32 to 4096", found=value)
    return value


def _resolve_normalization(
    choice: str | tuple[tuple[float, ...], tuple[float, ...]],
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    if (mean is None) != (std is None):
        raise ConfigError("--mean and --std", expected="both or neither", found="one of them")
    if mean is not None and std is not None:
        choice = (mean, std)
    elif isinstance(choice, str):
        if choice not in NORMALIZATIONS:
            names = "auto, " + ", ".join(NORMALIZATIONS)
            raise ConfigError("--normalize", expected=f"one of {names}", found=choice)
        choice = NORMALIZATIONS[choice]
    first, second = (tuple(float(v) for v in values) for values in choice)
    finite = all(map(math.isfinite, (*first, *second)))
    if len(first) != 3 or len(second) != 3 or not finite or min(second) <= 0:
        found = [first, second]
        raise ConfigError("--mean and --std", expected="three values, std above 0", found=found)
    return first, second
