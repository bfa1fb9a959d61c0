"""State dicts inside what trainers save: under keys, with prefixes, several in one file."""

import argparse
from collections import OrderedDict

import pytest
import tiny_network
import torch
from safetensors.torch import save_file
from torch import nn

from featcache.backbones.backbone import build_backbone
from featcache.backbones.weights import load_state, read_state
from featcache.errors import BackboneError

STATE, OTHER = tiny_network.state(), tiny_network.state(4)


def prefixed(prefix, state=STATE):
    return {prefix + name: value for name, value in state.items()}


def load(contents, folder, classifier=None):
    torch.save(contents, folder / "w.pt")
    network = tiny_network.network()
    load_state(network, read_state(folder / "w.pt"), classifier, "w.pt")
    return network.state_dict()


def refusal(contents, folder):
    with pytest.raises(BackboneError) as caught:
        load(contents, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_equal_states(found, truth=STATE):
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[name], truth[name]) for name in truth)


OPTIMIZER = {"state": {0: {"step": torch.ones(()), "exp_avg": torch.ones(3)}}, "param_groups": []}
CHECKPOINTS = {
    "state_dict": {"state_dict": STATE, "epoch": 3, "best": 0.5},
    "model": {"model": STATE, "args": ["a"]},
    "DataParallel": OrderedDict(prefixed("module.")),
    "DataParallel in a checkpoint": {"state_dict": prefixed("module.")},
    "parameters": {n: nn.Parameter(v) if v.is_floating_point() else v for n, v in STATE.items()},
    "Lightning": {"state_dict": prefixed("model."), "epoch": 3, "callbacks": {"a": {"best": 0.1}}},
    "Lightning with a weighted loss": {
        "state_dict": prefixed("net.") | {"criterion.weight": torch.ones(3)}
    },
    "torch.compile": prefixed("_orig_mod."),
    "compiled and parallel": {"model": prefixed("module._orig_mod.")},
    "a key of its own": {"net": STATE, "epoch": 3, "optimizer": OPTIMIZER},
    "detectron2, deeply": {"checkpoint": {"weights": {"net": prefixed("backbone.bottom_up.")}}},
    "a list of one": {"models": [prefixed("module.")]},
    "a sequential with its head": prefixed("0.") | {"1.weight": torch.ones(2, 24)},
    "a prefix without a dot": prefixed("net/"),
    "a copy beside": {"state_dict": STATE, "ema": OTHER},
    "a copy beside, inside": {"run": {"ema": OTHER, "model": STATE}},
    "equal copies": {"net": STATE, "best": {n: v.double() for n, v in STATE.items()}},
    "timm": {"state_dict": STATE, "args": argparse.Namespace(lr=0.1, sched=None), "version": 2},
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_state_dicts_inside_checkpoints_are_found(kind, tmp_path):
    assert_equal_states(load(CHECKPOINTS[kind], tmp_path))


def test_prefixes_are_taken_off_safetensors_too(tmp_path):
    save_file(prefixed("model.encoder."), tmp_path / "w.safetensors")
    backbone = build_backbone(
        "python:tiny_network:network", weights=tmp_path / "w.safetensors", image_size=32
    )
    assert_equal_states(backbone.network.state_dict())


def test_the_classifier_may_be_other_behind_a_prefix(tmp_path):
    network = nn.Sequential(OrderedDict(body=tiny_network.network(), fc=nn.Linear(24, 2)))
    state = prefixed("body.") | {"fc.weight": torch.ones(7, 24), "fc.bias": torch.ones(7)}
    contents = {"state_dict": {f"model.{name}": value for name, value in state.items()}}
    torch.save(contents, tmp_path / "w.pt")
    load_state(network, read_state(tmp_path / "w.pt"), "fc", "w.pt")
    assert_equal_states(network.body.state_dict())


def test_names_that_begin_like_a_wrapper_are_the_networks_own(tmp_path):
    network = nn.Sequential(OrderedDict(module=nn.Linear(2, 2)))
    state = {"module.weight": torch.ones(2, 2), "module.bias": torch.ones(2)}
    torch.save(state, tmp_path / "w.pt")
    load_state(network, read_state(tmp_path / "w.pt"), None, "w.pt")
    assert_equal_states(network.state_dict(), state)


@pytest.mark.parametrize(
    ("contents", "listed"),
    [
        ({"net": STATE, "ema": OTHER, "epoch": 3}, "net, ema"),
        ({"state_dict": prefixed("student.") | prefixed("teacher.", OTHER)},
         "state_dict/student.*, state_dict/teacher.*"),
        ({"model": {"a": STATE, "b": OTHER}, "other": STATE}, "model/a, model/b"),
        ([STATE, OTHER] and {"folds": [STATE, OTHER]}, "folds/0, folds/1"),
    ],
)  # fmt: skip
def test_several_that_fit_and_differ_are_refused_and_listed(contents, listed, tmp_path):
    assert f"2 that differ: {listed} (w.pt)" in refusal(contents, tmp_path)


def test_what_has_the_backbones_names_and_more_is_not_its_own(tmp_path):
    message = refusal(STATE | prefixed("ema.", OTHER), tmp_path)
    assert "ema.conv.weight unknown" in message


def test_a_misfit_names_one_of_each_side_and_the_keys(tmp_path):
    renamed = {f"model.{n.replace('conv', 'stem')}": value for n, value in STATE.items()}
    message = refusal({"net": renamed, "epoch": 3, "optimizer": OPTIMIZER}, tmp_path)
    assert "the file has model.stem.weight, the backbone has conv.weight" in message
    assert "the file holds: net, epoch, optimizer" in message
    message = refusal(prefixed("model.") | {"model.conv.weight": torch.ones(5)}, tmp_path)
    assert "conv.weight of shape (5,)" in message
    assert "holds" not in message
    assert "model.norm.weight" in refusal({"model.norm.weight": torch.ones(12)}, tmp_path)


def test_files_without_a_state_dict_are_refused_with_their_keys(tmp_path):
    message = refusal({"epoch": 3, "metrics": {"loss": 0.1}}, tmp_path)
    assert "expected a state dict of tensors, found none under the keys epoch, metrics" in message


def test_a_file_that_contains_itself_or_is_nested_without_end_is_searched_once(tmp_path):
    contents = {"net": STATE}
    contents["again"] = [contents, contents]
    assert_equal_states(load(contents, tmp_path))
    doubled = {"a": 1}
    for _ in range(60):  # 2**60 ways lead to the innermost
        doubled = {"a": doubled, "b": doubled}
    assert "none under the keys a, b" in refusal(doubled, tmp_path)
    odd = {10**100: STATE, (1, 2): STATE, 3: {"net": STATE}, 4: {10**100: torch.ones(1)}}
    assert_equal_states(load(odd, tmp_path))
    assert "none under the keys 7" in refusal({7: 1, 10**100: 2, (1,): 3}, tmp_path)
    assert len(refusal({"x" * 10**6: STATE | {"y" * 10**6: torch.ones(1)}}, tmp_path)) < 1000
