"""The small network that is trained on features: its configuration and its layers.

For ``hidden = (512, 128)`` and C classes it is, layer by layer and name by name,

    BatchNorm1d(D) Linear(D,512) ReLU BatchNorm1d(512) Linear(512,128) ReLU
    BatchNorm1d(128) Dropout Linear(128,C)

the head of the tutorial this project grew from, so its state dict fits wherever that one does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from featcache.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

_MAX_WIDTH = 1 << 20
MEMBERS = "members"
Value = TypeVar("Value")
BATCH_NORM_EPS, BATCH_NORM_MOMENTUM = 1e-5, 0.1  # torch.nn.BatchNorm1d's


@dataclass(frozen=True)
class HeadConfig:
    """What decides the shape of a head.

    Attributes:
        num_features: D, the number of features per image.
        num_classes: C, two or more.
        hidden: Width of each hidden layer, first to last; empty for a linear head.
        dropout: Chance in [0, 1) that an input of the last layer is dropped while training.
    """

    __module__ = "featcache"

    num_features: int
    num_classes: int
    hidden: tuple[int, ...] = (512, 128)
    dropout: float = 0.4

    def __post_init__(self) -> None:
        """Raises: ConfigError: if a value has no meaning."""
        for name in ("num_features", "num_classes", "dropout"):
            object.__setattr__(self, name, to_python(getattr(self, name)))
        object.__setattr__(self, "hidden", tuple(map(to_python, self.hidden)))
        _check_width("number of features", self.num_features, at_least=1)
        _check_width("number of classes", self.num_classes, at_least=2)
        for width in self.hidden:
            _check_width("--hidden", width, at_least=1)
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ConfigError(
                "--dropout", expected="a number from 0 to below 1", found=repr(self.dropout)
            )

    def as_json(self) -> dict[str, Any]:
        """Return the configuration as a JSON object."""
        return {
            "num_features": self.num_features,
            "num_classes": self.num_classes,
            "hidden": list(self.hidden),
            "dropout": self.dropout,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> HeadConfig:
        """Return the configuration that ``as_json`` wrote.

        Raises:
            ConfigError: If a key is missing or unknown, or a value has no meaning.
        """
        keys = {"num_features", "num_classes", "hidden", "dropout"}
        if set(value) != keys or not isinstance(value["hidden"], list | tuple):
            raise ConfigError(
                "head", expected="an object of " + ", ".join(sorted(keys)), found=str(value)[:200]
            )
        return cls(**value)


def to_python(value: Any) -> Any:
    """Return a NumPy scalar as Python's bool, int, float or str; anything else as it is."""
    is_scalar = isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0)
    return value.item() if is_scalar else value


def _check_width(what: str, value: object, *, at_least: int) -> None:
    if type(value) is not int or not at_least <= value <= _MAX_WIDTH:
        raise ConfigError(
            what, expected=f"a whole number from {at_least} to {_MAX_WIDTH}", found=repr(value)
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def build_head(config: HeadConfig, seed: int | torch.Generator | None = None) -> nn.Sequential:
    """Return an untrained head on the CPU, in train mode, mapping (B, D) to logits (B, C).

    Args:
        config: The shape of the head.
        seed: Gives the same initial weights every time: those of ``torch.manual_seed(seed)`` and
            the layers built by hand. torch's global generator, of which there is one for all
            threads, is neither used nor touched. A generator on the CPU is drawn from as it
            stands. None draws from torch's global generator.
    """
    import torch
    from torch import nn

    if seed is not None and not isinstance(seed, torch.Generator):
        seed = torch.Generator().manual_seed(seed)
    return nn.Sequential(*_layers(config, seed))


def _layers(config: HeadConfig, generator: torch.Generator | None = None) -> list[nn.Module]:
    from torch import nn

    layers: list[nn.Module] = []
    width = config.num_features
    for next_width in config.hidden:
        layers += [nn.BatchNorm1d(width), _linear(width, next_width, generator), nn.ReLU()]
        width = next_width
    return [
        *layers,
        nn.BatchNorm1d(width),
        nn.Dropout(config.dropout),
        _linear(width, config.num_classes, generator),
    ]


def _linear(num_inputs: int, num_outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """Return a layer as ``nn.Linear`` makes it, but drawn from ``generator``."""
    import torch
    from torch import nn

    if generator is None:
        return nn.Linear(num_inputs, num_outputs)
    # by hand: to_empty() imports sympy, 0.6 s of every new process
    layer = nn.Linear(num_inputs, num_outputs, device="meta")
    layer.weight = nn.Parameter(torch.empty(num_outputs, num_inputs))
    layer.bias = nn.Parameter(torch.empty(num_outputs))
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    bound = 1 / math.sqrt(num_inputs)
    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return layer


def initial_state(config: HeadConfig, seed: int) -> dict[str, npt.NDArray[Any]]:
    """Return the state dict of ``build_head(config, seed)``, bit for bit, without importing torch.

    Args:
        config: The shape of the head.
        seed: From 0; as in torch, only its lower 32 bits count.
    """
    generator = np.random.RandomState(seed & 0xFFFFFFFF)  # an MT19937, as torch's on CPUs
    layout = state_layout(config)
    state: dict[str, npt.NDArray[Any]] = {}
    for name, (dtype, shape) in layout.items():
        layer, kind = name.split(".")
        if f"{layer}.running_mean" in layout:
            state[name] = np.full(shape, float(kind in {"weight", "running_var"}), dtype)
        elif kind == "weight":
            # The bound as torch.nn.init computes it, which may differ in the last bit.
            gain = math.sqrt(2 / (1 + math.sqrt(5) ** 2))
            bound = math.sqrt(3) * (gain / math.sqrt(shape[1]))
            state[name] = _draw_uniform(generator, shape, bound)
        else:
            fan_in = layout[f"{layer}.weight"][1][1]
            state[name] = _draw_uniform(generator, shape, 1 / math.sqrt(fan_in))
    return state


def _draw_uniform(
    generator: np.random.RandomState, shape: tuple[int, ...], bound: float
) -> npt.NDArray[np.float32]:
    """Return numbers from -bound to bound as ``torch.Tensor.uniform_`` draws them on CPUs."""
    draws = generator.randint(0, 1 << 32, shape, dtype=np.uint32)
    fractions = (draws & 0xFFFFFF) * 2.0**-24  # 24 bits of each
    bound = float(np.float32(bound))
    return (fractions * (2 * bound) - bound).astype(np.float32)


class Layer(NamedTuple):
    """A layer of a head.

    Attributes:
        name: Its place in the ``nn.Sequential``, as in the state dict.
        kind: ``BatchNorm1d``, ``Linear``, ``ReLU`` or ``Dropout``.
        num_outputs: It gives (N, num_outputs).
        num_parameters: Weights and biases, all of them trained.
    """

    name: str
    kind: str
    num_outputs: int
    num_parameters: int


def list_layers(config: HeadConfig) -> list[Layer]:
    """Return the layers of ``build_head(config)``, in order, without importing torch."""
    kinds: list[tuple[str, int]] = []
    for width, next_width in pairwise([config.num_features, *config.hidden]):
        kinds += [("BatchNorm1d", width), ("Linear", next_width), ("ReLU", next_width)]
    width = (config.num_features, *config.hidden)[-1]
    kinds += [("BatchNorm1d", width), ("Dropout", width), ("Linear", config.num_classes)]
    layout = state_layout(config)
    layers = []
    for place, (kind, num_outputs) in enumerate(kinds):
        shapes = [layout.get(f"{place}.{part}", (None, (0,)))[1] for part in ("weight", "bias")]
        layers.append(Layer(str(place), kind, num_outputs, sum(map(math.prod, shapes))))
    return layers


def count_values(config: HeadConfig) -> int:
    """Return the number of values in a head's state dict."""
    return sum(math.prod(shape) for _, shape in state_layout(config).values())


def state_layout(config: HeadConfig) -> dict[str, tuple[npt.DTypeLike, tuple[int, ...]]]:
    """Return dtype and shape of every entry of the head's state dict, in its order."""
    layout: dict[str, tuple[npt.DTypeLike, tuple[int, ...]]] = {}
    widths = [config.num_features, *config.hidden, config.num_classes]
    for number, (width, next_width) in enumerate(pairwise(widths)):
        norm, linear = norm_and_linear(config, number)
        for name in ("weight", "bias", "running_mean", "running_var"):
            layout[f"{norm}.{name}"] = (np.float32, (width,))
        layout[f"{norm}.num_batches_tracked"] = (np.int64, ())
        layout[f"{linear}.weight"] = (np.float32, (next_width, width))
        layout[f"{linear}.bias"] = (np.float32, (next_width,))
    return layout


def run_layout(
    config: HeadConfig, num_members: int
) -> dict[str, tuple[npt.DTypeLike, tuple[int, ...]]]:
    """Return ``state_layout`` of a run: of one head, or of an ensemble of two or more."""
    layout = state_layout(config)
    return join_members([layout] * num_members) if num_members > 1 else layout


def join_members(states: Sequence[Mapping[str, Value]]) -> dict[str, Value]:
    """Return the state dict of an ensemble: ``members.0.0.weight`` and so on."""
    return {
        f"{MEMBERS}.{number}.{name}": value
        for number, state in enumerate(states)
        for name, value in state.items()
    }


def split_members(state: Mapping[str, Value]) -> list[Mapping[str, Value]]:
    """Return the state dict of each head in a run's: the members of an ensemble, else the one."""
    if not all(name.startswith(f"{MEMBERS}.") for name in state):
        return [state]
    members: dict[int, dict[str, Value]] = {}
    for key, value in state.items():
        _, number, name = key.split(".", 2)
        members.setdefault(int(number), {})[name] = value
    return [members[number] for number in sorted(members)]


def norm_and_linear(config: HeadConfig, layer: int) -> tuple[int, int]:
    """Return the places in the ``nn.Sequential`` of a layer's batch norm and linear map.

    Between them stands nothing; only the last layer has dropout there.
    """
    norm = 3 * layer
    return norm, norm + (2 if layer == len(config.hidden) else 1)
