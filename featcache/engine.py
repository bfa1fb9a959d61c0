"""Engines: a backbone becomes a fast forward pass on a device, at a precision, with its parity.

Two engines, tried in this order until one is within the precision's bound of the plain network:

- ``folded``: batch norms folded into the convolutions before them, SiLU in one kernel instead of
  efficientnet_pytorch's memory-efficient swish (which saves memory in training only), symmetric
  padding moved into the convolution, channels_last.
- ``eager``: the library's network as it is, channels_last.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from featcache.backbone import Backbone
from featcache.errors import BackboneError, ConfigError, FeatcacheWarning
from featcache.runtime import exact_fp32

ENGINES = ("folded", "eager")
PARITY_BOUNDS = {"fp32": 1e-4, "tf32": 2e-3, "fp16": 2e-2, "bf16": 2e-1}
"""Largest relative L2 error of an image's features against the eager fp32 forward."""
FLOAT16_STORAGE_ERROR = 5e-4
"""Added to the bound when features are stored as float16 (measured 2.4e-4)."""

_DTYPES = {
    "fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
}  # fmt: skip
_SWISHES = {"Swish", "MemoryEfficientSwish"}


@dataclass(frozen=True)
class Engine:
    """A forward pass of constant batch shape.

    Attributes:
        name: ``folded`` or ``eager``.
        device: Where it runs.
        precision: ``fp32``, ``tf32``, ``fp16`` or ``bf16``.
        batch_size: Rows of every batch.
        num_features: D.
        parity: Relative L2 error per probed image against the eager fp32 forward.
        forward: (B, S, S, 3) uint8 -> (B, D) float32.
    """

    name: str
    device: torch.device
    precision: str
    batch_size: int
    num_features: int
    parity: tuple[float, ...]
    forward: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]


def build_engine(
    backbone: Backbone,
    device: torch.device,
    probe: npt.NDArray[np.uint8],
    *,
    precision: str = "fp32",
    batch_size: int | str = "auto",
    name: str = "auto",
) -> Engine:
    """Choose the fastest engine that agrees with the plain network on real images.

    Args:
        backbone: What to run.
        device: Where.
        probe: (n, S, S, 3) uint8, a few of the user's own images; n may be 0.
        precision: ``fp32``, ``tf32`` (CUDA only), ``fp16`` or ``bf16``.
        batch_size: Rows a batch, or ``auto``: 6 on a CPU, 256 on a GPU.
        name: ``auto``, or one engine to insist on.

    Raises:
        ConfigError: If an option is unknown or does not suit the device.
        BackboneError: If no engine is within the precision's bound.
    """
    if precision not in PARITY_BOUNDS:
        expected = "one of " + ", ".join(PARITY_BOUNDS)
        raise ConfigError("--precision", expected=expected, found=precision)
    if precision == "tf32" and device.type != "cuda":
        raise ConfigError("--precision tf32", expected="a CUDA device", found=device.type)
    if name not in {"auto", *ENGINES}:
        raise ConfigError("--engine", expected="auto, " + ", ".join(ENGINES), found=name)
    rows = resolve_batch_size(batch_size, device)
    reference = eager_features(backbone, probe)
    candidates = ENGINES if name == "auto" else (name,)
    worst = 0.0
    for candidate in candidates:
        forward = _make_forward(backbone, candidate, device, precision)
        engine = Engine(candidate, device, precision, rows, backbone.num_features, (), forward)
        parity = relative_errors(run_padded(engine, probe), reference)
        worst = max(parity, default=0.0)
        if worst <= PARITY_BOUNDS[precision]:
            return replace(engine, parity=parity)
        warnings.warn(
            f"engine {candidate} at {precision} is off by {worst:.1e} (bound "
            f"{PARITY_BOUNDS[precision]:.0e}) and is not used",
            FeatcacheWarning,
            stacklevel=2,
        )
    raise BackboneError(
        f"engine at {precision}", expected=f"features within {PARITY_BOUNDS[precision]:.0e}",
        found=f"{worst:.1e}", where=backbone.name, hint="Use --precision fp32",
    )  # fmt: skip


def resolve_batch_size(batch_size: int | str, device: torch.device) -> int:
    """Return the rows of a batch on this device.

    Raises:
        ConfigError: If it is neither ``auto`` nor a whole number from 1 to 65,536.
    """
    if batch_size == "auto":
        # B0's largest feature map is 96 x 112 x 112 floats. Six of them stay under the 32 MiB from
        # which glibc maps and unmaps memory at every allocation: on two cores Lite0 ran at 73
        # images/s in batches of 6, 66 of 8, 30 of 32; B0 at 54, 48 and 33.
        return 6 if device.type == "cpu" else 256
    if not isinstance(batch_size, int) or not 1 <= batch_size <= 65536:
        raise ConfigError("--batch-size", expected="auto, or 1 to 65536", found=batch_size)
    return batch_size


def run_padded(engine: Engine, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Run any number of images through batches of the engine's constant shape.

    Args:
        engine: The engine.
        pixels: (n, S, S, 3) uint8.

    Returns:
        (n, D) float32.
    """
    features = np.empty((len(pixels), engine.num_features), np.float32)
    for start in range(0, len(pixels), engine.batch_size):
        part = pixels[start : start + engine.batch_size]
        batch = np.zeros((engine.batch_size, *pixels.shape[1:]), np.uint8)
        batch[: len(part)] = part
        features[start : start + len(part)] = engine.forward(batch)[: len(part)]
    return features


def eager_features(backbone: Backbone, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return (n, D) features by the library's own network on the CPU in IEEE fp32: the truth.

    Args:
        backbone: What to run.
        pixels: (n, S, S, 3) uint8.
    """
    network = backbone.network.eval()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone.mean, backbone.std))
    rows = [np.empty((0, backbone.num_features), np.float32)]
    with torch.inference_mode(), exact_fp32():
        for start in range(0, len(pixels), 8):
            part = torch.from_numpy(pixels[start : start + 8]).permute(0, 3, 1, 2)
            rows.append(network((part.float() / 255 - mean) / std).numpy())
    return np.concatenate(rows)


def relative_errors(
    found: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]
) -> tuple[float, ...]:
    """Return the relative L2 error of each row, (N, D) against (N, D); infinite for NaN."""
    difference = np.linalg.norm(found.astype(np.float64) - reference, axis=1)
    length = np.maximum(np.linalg.norm(reference.astype(np.float64), axis=1), 1e-30)
    return tuple(float(e) if np.isfinite(e) else float("inf") for e in difference / length)


def _make_forward(
    backbone: Backbone, name: str, device: torch.device, precision: str
) -> Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]:
    network = copy.deepcopy(backbone.network).eval()
    if name == "folded":
        network = fold(network, backbone.image_size)
    dtype = _DTYPES[precision]
    network = network.to(device=device, dtype=dtype).to(memory_format=torch.channels_last)
    # (x / 255 - mean) / std in one multiply and one add.
    scale = 1 / (255 * torch.tensor(backbone.std, dtype=torch.float64))
    shift = -torch.tensor(backbone.mean, dtype=torch.float64) * 255 * scale
    scale, shift = (v.float().view(1, 3, 1, 1).to(device) for v in (scale, shift))

    def forward(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        with torch.inference_mode(), exact_fp32(tf32=precision == "tf32"):
            # NHWC memory seen as NCHW is channels_last already: no copy.
            batch = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)
            features = network(torch.addcmul(shift, batch.float(), scale).to(dtype))
            rows: npt.NDArray[np.float32] = features.float().cpu().numpy()
        return rows

    return forward


# ---------------------------------------------------------------------------------------- folding


def fold(network: nn.Module, image_size: int) -> nn.Module:
    """Return the network with batch norms, swishes and paddings folded; it is changed in place.

    Which batch norm follows which convolution is seen by watching one forward pass, so it works
    for any library. What it gets wrong is caught by the parity check.

    Args:
        network: A network in eval mode.
        image_size: S: the size of the image to watch with.
    """
    for convolution, norm_name, norm in _find_pairs(network, image_size):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        weight, bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var,
            norm.eps, norm.weight, norm.bias,
        )  # fmt: skip
        convolution.weight = nn.Parameter(weight.detach(), requires_grad=False)
        convolution.bias = nn.Parameter(bias.detach(), requires_grad=False)
        network.set_submodule(norm_name, nn.Identity())
    for name, module in list(network.named_modules()):
        if type(module).__name__ in _SWISHES:
            network.set_submodule(name, nn.SiLU(inplace=True))
        if isinstance(module, nn.Conv2d):
            _fold_padding(module)
    return network


def _find_pairs(network: nn.Module, image_size: int) -> list[tuple[nn.Conv2d, str, nn.BatchNorm2d]]:
    """Return (convolution, name of the batch norm, batch norm) where one feeds the other."""
    made_by: dict[int, tuple[nn.Conv2d, torch.Tensor]] = {}
    pairs: list[tuple[nn.Conv2d, str, nn.BatchNorm2d]] = []
    names = {module: name for name, module in network.named_modules()}
    uses: dict[nn.Module, int] = {}

    def after_convolution(module: nn.Module, _: object, output: torch.Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        uses[module] = uses.get(module, 0) + 1
        made_by[id(output)] = (module, output)  # keeping the tensor keeps its id its own

    def before_norm(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        uses[module] = uses.get(module, 0) + 1
        if id(inputs[0]) in made_by:
            pairs.append((made_by[id(inputs[0])][0], names[module], module))

    handles = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(after_convolution))
        elif type(module) is nn.BatchNorm2d and module.track_running_stats:
            handles.append(module.register_forward_pre_hook(before_norm))
    with torch.inference_mode():
        network(torch.zeros(1, 3, image_size, image_size))
    for handle in handles:
        handle.remove()
    # A layer used twice may stand before different things each time.
    return [pair for pair in pairs if uses[pair[0]] == 1 and uses[pair[2]] == 1]


def _fold_padding(convolution: nn.Conv2d) -> None:
    """Move efficientnet_pytorch's explicit zero padding into the convolution, if symmetric."""
    pad = getattr(convolution, "static_padding", None)
    if isinstance(pad, nn.ZeroPad2d):
        left, right, top, bottom = pad.padding
        if left == right and top == bottom:
            convolution.padding = (top, left)
            convolution.static_padding = nn.Identity()
