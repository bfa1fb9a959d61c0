"""The hash of a backbone's weights, and random weights that are the same every time."""

import hashlib
import json
import sys
import types

import pytest
import tiny_network
import torch
from quick_weights import draw_quickly
from sample_pixels import images, off_by, run
from torch import nn
from torchvision import models

from featcache.backbones.backbone import build_backbone, state_sha256, wrap_backbone
from featcache.backbones.weights import download_state
from featcache.errors import BackboneError

# ------------------------------------------------------------------------------- the weights' hash


def independent_sha256(state):
    """Hash a state dict by the rule the cache format states, without featcache."""
    digest = hashlib.sha256()
    for name in sorted(state):
        array = state[name].numpy()
        dtype = f"torch.{array.dtype.name}"
        header = json.dumps([name, dtype, list(array.shape)], separators=(",", ":"))
        digest.update(header.encode() + array.tobytes())
    return digest.hexdigest()


def test_hash_follows_the_stated_rule():
    network = tiny_network.network()
    assert state_sha256(network) == independent_sha256(network.state_dict())


def test_hash_changes_with_every_tensor_its_name_shape_and_dtype():
    hashes = [state_sha256(tiny_network.network())]
    for name in tiny_network.network().state_dict():
        network = tiny_network.network()
        value = network.state_dict()[name]
        with torch.no_grad():
            value.view(-1)[-1] += 1
        hashes.append(state_sha256(network))
    weight = torch.arange(6.0)
    for tensors in (
        {"a": weight},
        {"b": weight},
        {"a": weight.reshape(2, 3)},
        {"a": weight.reshape(3, 2)},
        {"a": weight.view(torch.int32)},  # the same bytes
    ):
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        hashes.append(state_sha256(module))
    assert len(set(hashes)) == len(hashes) == 1 + 8 + 5


def test_hash_does_not_see_memory_layout_device_or_the_classifier():
    network = nn.Sequential(tiny_network.network(), nn.Linear(24, 5))
    first = wrap_backbone("mine", network, image_size=32, classifier_name="1")
    network[1] = nn.Linear(24, 1000)
    network = network.to(memory_format=torch.channels_last)
    assert not network[0].conv.weight.is_contiguous()
    second = wrap_backbone("mine", network, image_size=32, classifier_name="1")
    assert first.weights_sha256 == second.weights_sha256


def test_weights_of_another_classifier_have_the_same_hash(tmp_path, monkeypatch):
    draw_quickly(monkeypatch)
    network = models.get_model("resnet18", num_classes=2)
    torch.save(network.state_dict(), tmp_path / "two.pt")
    with torch.no_grad():
        network.fc = nn.Linear(512, 7)
        torch.save(network.state_dict(), tmp_path / "seven.pt")
        network.bn1.running_mean[3] += 1e-6
        torch.save(network.state_dict(), tmp_path / "moved.pt")
    two, seven, moved = (
        build_backbone("torchvision:resnet18", weights=tmp_path / f"{name}.pt", image_size=32)
        for name in ("two", "seven", "moved")
    )
    assert two.weights_sha256 == seven.weights_sha256 != moved.weights_sha256
    assert two.weights_source == "two.pt"


# ---------------------------------------------------------------------------------- random weights


def unseeded():
    """Build a network the way users do: from torch's global generator."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


@pytest.fixture
def unseeded_name(monkeypatch):
    module = types.ModuleType("user_networks")
    module.unseeded = unseeded
    monkeypatch.setitem(sys.modules, "user_networks", module)
    return "python:user_networks:unseeded"


NAMES = ["efficientnet-lite0", "torchvision:resnet18", "timm:test_resnet", "python"]


@pytest.mark.parametrize("name", NAMES)
def test_random_weights_are_the_same_every_time(name, unseeded_name):
    name = unseeded_name if name == "python" else name
    if name.startswith("timm"):
        pytest.importorskip("timm", reason="timm is not installed")
    hashes = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        hashes.add(build_backbone(name, weights="random", image_size=64).weights_sha256)
    assert len(hashes) == 1


@pytest.mark.parametrize("name", NAMES)
def test_building_leaves_torchs_generator_alone(name, unseeded_name):
    name = unseeded_name if name == "python" else name
    if name.startswith("timm"):
        pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    build_backbone(name, weights="random", image_size=64)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_random_weights_keep_features_alive(b0):
    """The libraries' own initialisation gives B0 features near 1e-13: no parity to speak of."""
    features = run(b0.network, images(224))
    assert features.std() > 1e-3
    assert off_by(features[0], features[1]) > 1e-3


def test_the_name_of_a_downloaded_file_may_carry_the_whole_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(tiny_network.network().state_dict(), tmp_path / "tiny.pth")
    data = (tmp_path / "tiny.pth").read_bytes()
    file = tmp_path / "checkpoints" / f"tiny-{hashlib.sha256(data).hexdigest()}.pth"
    file.write_bytes(data)
    assert download_state(f"http://127.0.0.1:9/{file.name}")[1] == file.name
    file.write_bytes(data[:-1])
    with pytest.raises(BackboneError, match="downloaded weights: expected sha256"):
        download_state(f"http://127.0.0.1:9/{file.name}")
