"""Weights files: what loads, what is refused, that nothing in them runs; and the download."""

import contextlib
import functools
import hashlib
import http.server
import io
import os
import pickle
import random
import re
import threading

import efficientnet_pytorch.utils
import pytest
import tiny_network
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from featcache.backbones.backbone import build_backbone, wrap_backbone
from featcache.backbones.weights import download_state, load_state, read_state
from featcache.errors import BackboneError


def assert_equal_states(found, truth):
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[name], truth[name]) for name in truth)


def assert_one_line(caught):
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- files


def save_legacy(state, file):
    torch.save(state, file, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("w.pt", torch.save),
        ("w.pth", torch.save),
        ("w.pth", save_legacy),
        ("w.safetensors", save_file),
    ],
)
def test_files_load_into_the_network(name, save, tmp_path):
    state = tiny_network.state()
    save(state, tmp_path / name)
    assert_equal_states(read_state(tmp_path / name), state)
    backbone = build_backbone("python:tiny_network:network", weights=tmp_path / name, image_size=32)
    assert_equal_states(backbone.network.state_dict(), state)
    assert backbone.weights_source == name
    truth = tiny_network.network()
    truth.load_state_dict(state)
    assert backbone.weights_sha256 == wrap_backbone("t", truth, image_size=32).weights_sha256


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    for name in ("absent.pt", "absent.safetensors", "folder.pt"):
        with pytest.raises(BackboneError, match=name) as caught:
            read_state(tmp_path / name)
        assert_one_line(caught)


@pytest.mark.parametrize(
    "value", [torch.ones(3), [torch.ones(3)], {"a": 1.0}, {"epoch": 3, "a": torch.ones(1)}], ids=str
)
def test_files_that_hold_no_state_dict_are_refused(value, tmp_path):
    torch.save(value, tmp_path / "w.pt")
    with pytest.raises(BackboneError, match="expected a state dict of tensors"):
        read_state(tmp_path / "w.pt")


@pytest.mark.parametrize("save", [torch.save, save_legacy, save_file])
def test_truncated_files_are_refused(save, tmp_path):
    whole, file = tmp_path / "whole", tmp_path / "w.pt"
    if save is save_file:
        file = tmp_path / "w.safetensors"
    save(tiny_network.state(), whole)
    data = whole.read_bytes()
    for length in (0, 1, 7, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(BackboneError, match=file.name) as caught:
            read_state(file)
        assert_one_line(caught)


@pytest.mark.filterwarnings("ignore")  # torch remarks on the protocols of strange pickles
@pytest.mark.parametrize("save", [torch.save, save_legacy, save_file])
def test_damaged_files_load_or_are_refused_but_nothing_else(save, tmp_path):
    file = tmp_path / ("w.safetensors" if save is save_file else "w.pt")
    save(tiny_network.state(), file)
    data, dice = file.read_bytes(), random.Random(4)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(dice.randrange(1, 6)):
            damaged[dice.randrange(len(data) if dice.random() < 0.3 else 1200)] = dice.randrange(
                256
            )
        file.write_bytes(damaged)
        with contextlib.suppress(BackboneError):
            read_state(file)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "data",
    [
        b"<html>login</html>",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"\x80\x02.",
        b"PK\x03\x04",
        pickle.dumps({"a": 1}),
    ],
    ids=str,
)
def test_files_of_other_kinds_are_refused(data, tmp_path):
    for name in ("w.pt", "w.safetensors"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BackboneError, match=name) as caught:
            read_state(tmp_path / name)
        assert_one_line(caught)


# ----------------------------------------------------------------------------------- hostile files


class Hostile:
    """Unpickled by the book, this creates a file."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"echo ran > '{self.proof}'",)


def write_hostile(file, proof, kind):
    if kind == "zip":
        torch.save({"a": torch.ones(1), "b": Hostile(proof)}, file)
    elif kind == "legacy":
        save_legacy({"b": Hostile(proof)}, file)
    else:
        file.write_bytes(pickle.dumps(Hostile(proof), protocol=2))


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_code_in_a_weights_file_never_runs(kind, tmp_path):
    file, proof = tmp_path / "w.pt", tmp_path / "proof"
    write_hostile(file, proof, kind)
    with pytest.raises(BackboneError, match=r"w\.pt"):
        read_state(file)
    assert not proof.exists()
    with contextlib.suppress(Exception):  # the file is a real attack: torch told to trust it
        torch.load(file, weights_only=False)
    assert proof.exists()


# Torch warns; as an error that would stop it in place of us.
@pytest.mark.filterwarnings("default:Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
def test_code_never_runs_even_where_the_environment_turns_torchs_default_off(tmp_path, monkeypatch):
    """Of a file, of the built backbone's and of a file in the download cache."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    write_hostile(tmp_path / "trap.pt", tmp_path / "trapped", "zip")
    with pytest.warns(UserWarning, match="forcing weights_only=False"):
        torch.load(tmp_path / "trap.pt")
    assert (tmp_path / "trapped").exists()  # torch reads the variable when it loads
    for kind in ("zip", "legacy", "plain"):
        write_hostile(tmp_path / f"{kind}.pt", tmp_path / f"proof-{kind}", kind)
        with pytest.raises(BackboneError):
            read_state(tmp_path / f"{kind}.pt")
    with pytest.raises(BackboneError):
        build_backbone("torchvision:resnet18", weights=tmp_path / "zip.pt")
    (tmp_path / "checkpoints").mkdir()
    write_hostile(tmp_path / "checkpoints" / "hub-00000000.pt", tmp_path / "proof-hub", "zip")
    with pytest.raises(BackboneError):
        download_state("http://127.0.0.1:9/hub-00000000.pt")
    assert list(tmp_path.glob("proof*")) == []


# ---------------------------------------------------------------------------- into which network?


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


def spoiled(state, name, value):
    state = dict(state)
    state[name] = state[name].clone()
    state[name].view(-1)[0] = value
    return state


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda s: without(s, "conv.weight"), "conv.weight missing"),
        (lambda s: without(s, "norm.running_mean"), "norm.running_mean missing"),
        (lambda s: s | {"extra.weight": torch.ones(1)}, "extra.weight unknown"),
        (lambda s: s | {"conv.weight": s["conv.weight"][:6]}, r"conv.weight of shape \(6, 3, 3, 3"),
        (lambda s: s | {"widen.bias": torch.ones(())}, r"widen.bias of shape \(\)"),
        (lambda s: spoiled(s, "widen.weight", float("nan")), "widen.weight not finite"),
        (lambda s: spoiled(s, "norm.running_var", float("inf")), "norm.running_var not finite"),
        (lambda s: {}, "and [45] more"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_loaded(change, found):
    network = tiny_network.network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(BackboneError, match=found) as caught:
        load_state(network, change(tiny_network.state()), None, "given.pt")
    assert "given.pt" in str(caught.value)
    assert_one_line(caught)
    assert_equal_states(network.state_dict(), before)


@pytest.mark.parametrize(
    "classifier",
    [
        {},
        {"1.weight": torch.ones(7, 24), "1.bias": torch.ones(7)},
        {"1.0.weight": torch.ones(5), "1.4.bias": torch.full((2,), float("nan"))},
    ],
)
def test_the_classifier_in_a_weights_file_is_ignored(classifier):
    network = nn.Sequential(tiny_network.network(), nn.Linear(24, 2))
    head = network[1].weight.clone()
    state = tiny_network.state()
    load_state(network, {f"0.{k}": v for k, v in state.items()} | classifier, "1", "given.pt")
    assert_equal_states(network[0].state_dict(), state)
    assert torch.equal(network[1].weight, head)


def test_a_layer_whose_name_begins_like_the_classifiers_is_not_the_classifier():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.fc_norm = nn.LayerNorm(2)

    network = Network()
    with pytest.raises(BackboneError, match="fc_norm"):
        load_state(network, without(network.state_dict(), "fc_norm.weight"), "fc", "given.pt")


def test_batch_norm_counters_may_be_missing():
    """Files from before torch 0.4.1 have none, and torch itself loads them with strict=True."""
    state = without(tiny_network.state(), "norm.num_batches_tracked")
    network = tiny_network.network()
    load_state(network, state, None, "given.pt")
    assert_equal_states(without(network.state_dict(), "norm.num_batches_tracked"), state)


# ---------------------------------------------------------------------------------------- download


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Torch's download cache in an empty folder of its own, reached without a proxy."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(torch.hub, "_hub_dir", str(folder))
    monkeypatch.setenv("no_proxy", "*")
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    timeout = 10

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(folder):
    """Serve a folder on a free port of this machine; yields the address."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(10)


def publish(state, folder, stem, *, wrong_hash=False):
    """Save a state dict under a name that carries its hash, as the libraries' files do."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    prefix = "0" * 8 if wrong_hash else hashlib.sha256(data).hexdigest()[:8]
    folder.mkdir(exist_ok=True)
    (folder / f"{stem}-{prefix}.pth").write_bytes(data)
    return f"{stem}-{prefix}.pth"


def test_pretrained_weights_are_downloaded_once(hub, tmp_path, monkeypatch, capfd):
    library = efficientnet_pytorch.EfficientNet.from_name("efficientnet-b0", image_size=64)
    name = publish(library.state_dict(), tmp_path / "www", "efficientnet-b0")
    truth = wrap_backbone("t", library, image_size=64, classifier_name="_fc").weights_sha256
    with serving(tmp_path / "www") as address:
        url_map = efficientnet_pytorch.utils.url_map
        monkeypatch.setitem(url_map, "efficientnet-b0", f"{address}/{name}")
        first = build_backbone("efficientnet-b0", image_size=64)
    second = build_backbone("efficientnet-b0", image_size=64)  # nobody is serving any more
    assert first.weights_sha256 == second.weights_sha256 == truth
    assert first.weights_source == name
    assert [file.name for file in (hub / "checkpoints").iterdir()] == [name]
    assert capfd.readouterr().out == ""


def test_a_file_that_is_not_what_its_name_says_is_refused_and_not_kept(hub, tmp_path):
    name = publish(tiny_network.state(), tmp_path / "www", "tiny", wrong_hash=True)
    with (
        serving(tmp_path / "www") as address,
        pytest.raises(BackboneError, match="hash") as caught,
    ):
        download_state(f"{address}/{name}")
    assert_one_line(caught)
    assert list((hub / "checkpoints").iterdir()) == []


def test_a_cut_off_download_is_refused_and_not_kept(hub, tmp_path):
    name = publish(tiny_network.state(), tmp_path / "www", "tiny")
    file = tmp_path / "www" / name
    file.write_bytes(file.read_bytes()[:-100])
    with serving(tmp_path / "www") as address, pytest.raises(BackboneError, match="hash"):
        download_state(f"{address}/{name}")
    assert list((hub / "checkpoints").iterdir()) == []


def test_what_cannot_be_downloaded_is_named_with_where_to_put_it(hub, tmp_path, monkeypatch):
    (tmp_path / "www").mkdir()
    with serving(tmp_path / "www") as address:  # serves, but not this file
        missing = f"{address}/efficientnet-b0-00000000.pth"
        monkeypatch.setitem(efficientnet_pytorch.utils.url_map, "efficientnet-b0", missing)
        with pytest.raises(BackboneError, match=r"(?i)not found") as nothing_there:
            build_backbone("efficientnet-b0", image_size=64)
    with pytest.raises(BackboneError, match="refused") as nobody_there:
        build_backbone("efficientnet-b0", image_size=64)
    for caught in (nothing_there, nobody_there):
        assert missing in str(caught.value)
        assert str(hub / "checkpoints" / "efficientnet-b0-00000000.pth") in str(caught.value)
        assert "--weights FILE" in str(caught.value)
        assert_one_line(caught)
    assert [file for file in hub.rglob("*") if file.is_file()] == []


def test_a_damaged_file_in_the_download_cache_is_named(hub):
    (hub / "checkpoints").mkdir(parents=True)
    file = hub / "checkpoints" / "tiny-00000000.pth"
    file.write_bytes(b"<html>please log in</html>")
    with pytest.raises(BackboneError, match=re.escape(str(file))) as caught:
        download_state("http://127.0.0.1:9/tiny-00000000.pth")
    assert_one_line(caught)


def old_style(name, state):
    """Return a state dict as old files hold it; torchvision still serves such, and loads them."""
    state = {key: v for key, v in state.items() if not key.endswith("num_batches_tracked")}
    if name == "densenet121":  # names from when a module's name could have a dot in it
        dotted = r"(denselayer\d+\.(?:norm|relu|conv))([12])\."
        state = {re.sub(dotted, r"\1.\2.", key): value for key, value in state.items()}
        assert any("norm.1.weight" in key for key in state)
    return state


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_torchvisions_own_files_load(name, hub, tmp_path, monkeypatch):
    library = models.get_model(name)
    for parameter in library.parameters():
        parameter.data += 0.001  # not what a seed gives
    file = publish(old_style(name, library.state_dict()), tmp_path / "www", name)
    weights = models.get_model_weights(name).DEFAULT
    with serving(tmp_path / "www") as address:
        monkeypatch.setattr(type(weights), "url", f"{address}/{file}")
        backbone = build_backbone(f"torchvision:{name}", image_size=64)
    classifier = backbone.classifier_name
    truth = wrap_backbone("t", library, image_size=64, classifier_name=classifier)
    assert backbone.weights_sha256 == truth.weights_sha256
