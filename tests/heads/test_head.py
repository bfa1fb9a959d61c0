from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from featcache.errors import ConfigError
from featcache.heads.head import HeadConfig, build_head, initial_state, state_layout


def kinds(head: nn.Sequential) -> list[str]:
    return [type(layer).__name__ for layer in head]


def test_default_head_is_the_tutorials_layer_by_layer() -> None:
    head = build_head(HeadConfig(1280, 2))
    wanted = [
        nn.BatchNorm1d(1280), nn.Linear(1280, 512), nn.ReLU(),
        nn.BatchNorm1d(512), nn.Linear(512, 128), nn.ReLU(),
        nn.BatchNorm1d(128), nn.Dropout(0.4), nn.Linear(128, 2),
    ]  # fmt: skip
    assert [repr(layer) for layer in head] == [repr(layer) for layer in wanted]
    assert sum(p.numel() for p in head.parameters()) == 725_634  # research/speed.md


@pytest.mark.parametrize(
    ("hidden", "wanted"),
    [
        ((), ["BatchNorm1d", "Dropout", "Linear"]),
        ((7,), ["BatchNorm1d", "Linear", "ReLU", "BatchNorm1d", "Dropout", "Linear"]),
    ],
)
def test_hidden_layers_are_batchnorm_linear_relu(
    hidden: tuple[int, ...], wanted: list[str]
) -> None:
    head = build_head(HeadConfig(5, 3, hidden=hidden, dropout=0.1))
    assert kinds(head) == wanted
    assert head(torch.randn(4, 5)).shape == (4, 3)


def test_seed_gives_the_weights_of_a_plain_script_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(11)
    plain = nn.Sequential(
        nn.BatchNorm1d(6), nn.Linear(6, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Dropout(0.2),
        nn.Linear(4, 2),
    )  # fmt: skip
    torch.manual_seed(99)
    before = torch.get_rng_state()
    head = build_head(HeadConfig(6, 2, hidden=(4,), dropout=0.2), seed=11)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(
        torch.equal(a, b) for a, b in zip(head.parameters(), plain.parameters(), strict=True)
    )
    other = build_head(HeadConfig(6, 2, hidden=(4,), dropout=0.2), seed=12)
    assert not torch.equal(other[1].weight, head[1].weight)


def test_heads_built_on_several_threads_are_those_built_alone() -> None:
    """torch has one generator for all threads: a seeded head may not draw from it."""
    config, seeds = HeadConfig(300, 2, hidden=(200,)), range(40)
    wanted = [build_head(config, seed).state_dict() for seed in seeds]
    torch.manual_seed(1)
    numbers = torch.rand(5000)
    torch.manual_seed(1)
    drawn = []
    with ThreadPoolExecutor(4) as pool:
        heads = [pool.submit(build_head, config, seed) for seed in seeds]
        while len(drawn) < 5000:  # the caller goes on with the global one meanwhile
            drawn.append(torch.rand(1))
    for head, state in zip(heads, wanted, strict=True):
        found = head.result().state_dict()
        assert all(torch.equal(found[name], value) for name, value in state.items())
    assert torch.equal(torch.cat(drawn), numbers)


def test_a_generator_goes_on_as_the_global_one_would() -> None:
    config = HeadConfig(6, 2, hidden=(4, 3))
    torch.manual_seed(11)
    plain, following = build_head(config), torch.rand(3)
    generator = torch.Generator().manual_seed(11)
    head = build_head(config, generator)
    assert torch.equal(torch.rand(3, generator=generator), following)
    assert all(
        torch.equal(a, b) for a, b in zip(head.parameters(), plain.parameters(), strict=True)
    )


def test_configuration_survives_json() -> None:
    config = HeadConfig(8, 3, hidden=(4, 2), dropout=0.25)
    assert HeadConfig.from_json(config.as_json()) == config
    assert HeadConfig(8, 3, hidden=[4, 2], dropout=0.25) == config  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"num_features": 0}, {"num_features": True}, {"num_classes": 1}, {"num_classes": "2"},
        {"hidden": (0,)}, {"hidden": (4, -1)}, {"hidden": (2.5,)}, {"hidden": (1 << 40,)},
        {"dropout": 1.0}, {"dropout": -0.1}, {"dropout": float("nan")}, {"dropout": "0.4"},
    ],
)  # fmt: skip
def test_values_without_meaning_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        HeadConfig(**({"num_features": 8, "num_classes": 2} | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value",
    [{}, {"num_features": 8, "num_classes": 2, "hidden": 4, "dropout": 0.1}, {"hidden": []}],
)
def test_json_of_another_shape_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="an object of dropout, hidden"):
        HeadConfig.from_json(value)


def test_state_layout_is_that_of_a_built_head() -> None:
    config = HeadConfig(9, 3, hidden=(5,))
    state = build_head(config).state_dict()
    assert state_layout(config) == {k: (v.numpy().dtype, tuple(v.shape)) for k, v in state.items()}


def test_building_a_head_waits_for_no_algebra() -> None:
    """``to_empty`` of a module brings sympy in: 0.6 s of train, evaluate and predict."""
    code = (
        "import sys\nfrom featcache.heads.head import HeadConfig, build_head\n"
        "build_head(HeadConfig(8, 2), seed=0)\nassert 'sympy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("hidden", [(), (8,), (512, 128), (7, 5, 3)])
def test_initial_weights_are_those_of_torch_bit_for_bit(hidden: tuple[int, ...]) -> None:
    config = HeadConfig(1280, 3, hidden)
    for seed in (0, 5, (1 << 32) + 3, (1 << 62) + 7):
        torch.manual_seed(seed)
        wanted = build_head(config).state_dict()
        state = initial_state(config, seed)
        assert list(state) == list(wanted)
        for name, value in wanted.items():
            assert state[name].dtype == value.numpy().dtype
            assert np.array_equal(state[name], value.numpy()), name
