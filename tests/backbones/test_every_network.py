"""Features of every kind of network against what its library documents.

With ``--long``: all networks of torchvision, and the first and last of each module of timm; the
table in featcache/backbones/README.md is of these. Networks of more than 300 million parameters
are built on the meta device, where nothing is computed: only the shape of their features is
compared. Networks that take any size run at 128 pixels, the others at their own.
"""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import warnings
from collections.abc import Iterator

import efficientnet_pytorch
import pytest
import timm
import torch
from quick_weights import draw_quickly
from sample_pixels import images, off_by, run
from torch import nn
from torchvision import models
from torchvision.models import regnet

from featcache.backbones.backbone import build_backbone
from featcache.backbones.libraries import build_network, find_blueprint
from featcache.errors import BackboneError

LARGE = 300_000_000  # parameters
SMALL = 128  # pixels

# Of each kind one: two heads, several, a layer in front, a convolution at the end.
SOME_OF_TIMM = ["deit_tiny_distilled_patch16_224", "levit_128s", "repvit_m0_9", "crossvit_9_240",
                "efficientvim_m1_dist", "test_efficientnet"]  # fmt: skip
SOME_OF_TORCHVISION = ["squeezenet1_1", "mnasnet0_5"]


def networks_of_timm() -> list[str]:
    by_module = (timm.list_models(module=module) for module in timm.list_modules())
    return list(
        dict.fromkeys(
            name for names in by_module if names for name in names[:: len(names) - 1 or 1]
        )
    )


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Libraries have advice of their own, on networks that were chosen by their place in a list."""
    level = logging.getLogger("timm").level
    logging.getLogger("timm").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.getLogger("timm").setLevel(level)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> dict[str, nn.Module]:
    """Networks of random weights as their library made them; each is made once, and then copied."""
    made: dict[str, nn.Module] = {}

    def once(create):
        def make(name, **options):
            if options:
                return create(name, **options)
            if name not in made:
                made[name] = create(name)
            return copy.deepcopy(made[name])

        return make

    # Most of the time goes into initial weights; uniform ones do as well as truncated normal ones.
    draw_quickly(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "erfinv_", lambda weights: weights)
    monkeypatch.setattr(timm, "create_model", once(timm.create_model))
    monkeypatch.setattr(models, "get_model", once(models.get_model))
    return made


def with_weights(library: nn.Module, network: nn.Module, heads: tuple[str, ...]) -> nn.Module:
    """Load the state of a backbone into its library's network, whose classifiers it lacks."""
    result = library.load_state_dict(network.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert all(key.startswith(heads) for key in result.missing_keys), result.missing_keys
    return library.eval()


def documented(library: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Return what timm calls the features of a network."""
    with torch.inference_mode():
        features = library.forward_head(library.forward_features(batch), pre_logits=True)
        if not hasattr(library, "num_classes") or library.num_classes:  # no encoder
            library.reset_classifier(0)
        assert off_by(library(batch), features) < 1e-5
    return features


def into_last_layer(library: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Return the input of a network's last layer; of a convolution, after pooling."""
    inputs: list[torch.Tensor] = []
    layers = [m for m in library.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    run(library, batch)
    return inputs[-1] if inputs[-1].ndim == 2 else inputs[-1].mean((2, 3))


def look_at(name: str) -> tuple[bool, bool]:
    """Return whether a network is large, and whether it is built for one size of images."""
    library, _, rest = name.partition(":")
    create = timm.create_model if library == "timm" else models.get_model
    try:
        with torch.device("meta"):
            network = create(rest)
    except (RuntimeError, NotImplementedError):  # it cannot be built there
        network = create(rest)
    constructors = [
        vars(cls)["__init__"] for cls in type(network).__mro__ if "__init__" in vars(cls)
    ]
    options = {name for made in constructors for name in inspect.signature(made).parameters}
    is_large = sum(parameter.numel() for parameter in network.parameters()) > LARGE
    return is_large, bool({"img_size", "image_size", "input_size"} & options)


def check(name: str, built: dict[str, nn.Module]) -> str:
    """Compare a backbone with its library's network; return what was compared."""
    library, _, rest = name.partition(":")
    truth = documented if library == "timm" else into_last_layer
    is_large, is_fixed = look_at(name)
    built.clear()
    if is_large:
        return check_shape(name, truth)
    backbone = build_backbone(name, weights="random", image_size="auto" if is_fixed else SMALL)
    heads = (
        (backbone.classifier_name,)
        if backbone.classifier_name
        else ("head", "aux_head", "classifier.1")
    )
    batch = images(backbone.image_size, 1)
    own = built.pop(rest)
    if rest in {"googlenet", "inception_v3"}:  # what torchvision does when it is given weights
        own.transform_input, own.aux_logits = True, False
        own.aux1 = own.aux2 = own.AuxLogits = None
    own = with_weights(own, backbone.network, heads)
    found = run(backbone.network, batch)
    expected = truth(own, batch)
    assert found.shape == expected.shape == (1, backbone.num_features)
    assert off_by(found, expected) < 1e-4
    return "right"


def check_shape(name: str, truth) -> str:
    with torch.device("meta"):
        blueprint = find_blueprint(name, None)
        network, _ = build_network(name, blueprint)
        batch = torch.zeros(1, 3, blueprint.image_size, blueprint.image_size)
        if truth is documented and network.num_classes == 0 and network(batch).ndim != 2:
            return f"refused: gives {tuple(network(batch).shape[1:])}, no row per image"
        if truth is documented:
            expected = network.forward_head(network.forward_features(batch), pre_logits=True)
        else:
            expected = truth(network, batch)
        if blueprint.cut is not None:
            blueprint.cut(network)
        if blueprint.classifier_name is not None:
            network.set_submodule(blueprint.classifier_name, nn.Identity(), strict=True)
        assert network(batch).shape == expected.shape
    return "right shape (more than 300 million parameters)"


def check_all(names, built, tally, kind) -> None:
    wrong = {}
    for name in names:
        try:
            outcome = check(name, built)
        except BackboneError as error:
            outcome = f"refused: {error}"
        except Exception as error:  # noqa: BLE001 - all are counted before the test fails
            wrong[name], outcome = f"{type(error).__name__}: {error}"[:500], "wrong"
        logging.getLogger(__name__).info("%s: %s %s", name, outcome, wrong.get(name, ""))
        tally(kind, outcome)
        built.clear()
        if len(names) > 10:  # it takes 0.5 s beside all that a session of tests has made
            gc.collect()
    assert wrong == {}


@pytest.fixture(autouse=True)
def _regnets_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchvision computes the widths of a RegNet by tensors, which have no values on meta."""
    real = regnet.BlockParams.from_init_params.__func__

    def on_cpu(cls, *arguments, **options):
        with torch.device("cpu"):
            return real(cls, *arguments, **options)

    monkeypatch.setattr(regnet.BlockParams, "from_init_params", classmethod(on_cpu))


def test_torchvisions_features_are_the_input_of_the_last_layer(rounds, tally, built):
    every = models.list_models(module=models)
    assert rounds(80, len(every)) == 80
    names = [SOME_OF_TORCHVISION, every][rounds(0, 1)]
    check_all([f"torchvision:{name}" for name in names], built, tally, "networks of torchvision")


def test_timms_features_are_those_in_front_of_the_logits(rounds, tally, built):
    names = [SOME_OF_TIMM, networks_of_timm()][rounds(0, 1)]
    check_all([f"timm:{name}" for name in names], built, tally, "networks of timm")


def test_features_of_efficientnets_are_pooled(rounds, monkeypatch):
    draw_quickly(monkeypatch)
    for number in range(rounds(1, 8)):
        name = f"efficientnet-b{number}"
        backbone = build_backbone(name, weights="random", image_size=SMALL)
        library = efficientnet_pytorch.EfficientNet.from_name(name, image_size=SMALL)
        own, batch = with_weights(library, backbone.network, ("_fc",)), images(SMALL, 1)
        with torch.inference_mode():
            truth = own.extract_features(batch).mean((2, 3))
        assert off_by(run(backbone.network, batch), truth) < 1e-5, name
        assert backbone.num_features == truth.shape[1]
