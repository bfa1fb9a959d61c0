"""Forward passes: normalization and network as one function of a batch of pixels.

They run in torch on any device, or in ONNX Runtime on CPUs. The batch is uint8, as decoded, and is
normalized on the device.

Folded networks make fewer passes over memory: batch norms go into the convolutions before them,
efficientnet_pytorch's memory-efficient swish (which saves memory in training only) becomes SiLU in
one kernel, symmetric padding moves into the convolution. On one core that is 2.1 times the stock
network's speed with channels_last.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from featcache.backbones.backbone import Backbone, state_sha256
from featcache.runtime import exact_fp32

Forward = Callable[[torch.Tensor], npt.NDArray[np.float32]]
"""A batch (B, S, S, 1 or 3) uint8 in host memory -> (B, D) float32."""
IsFrozen = Callable[[], bool]
"""Returns whether the network's state is unchanged since it was made."""

_DTYPES = {
    "fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
}  # fmt: skip
_OPSET = 17


class NotUsableError(Exception):
    """The network cannot be run by this engine; the message says why."""


class _FromPixels(nn.Module):
    """The network with normalization in front: takes (B, S, S, 1 or 3) uint8."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, backbone: Backbone, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        # (x / 255 - mean) / std in one multiply and one add.
        scale = 1 / (255 * torch.tensor(backbone.std, dtype=torch.float64))
        shift = -torch.tensor(backbone.mean, dtype=torch.float64) * 255 * scale
        self.register_buffer("scale", scale.float().view(1, 3, 1, 1))
        self.register_buffer("shift", shift.float().view(1, 3, 1, 1))

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return (B, 3, S, S) float32."""
        return torch.addcmul(self.shift, pixels.permute(0, 3, 1, 2).float(), self.scale)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.network(self.normalize(pixels))
        return features


def _copy_network(backbone: Backbone, *, folded: bool) -> nn.Module:
    try:
        network = copy.deepcopy(backbone.network).eval()
        return fold(network, backbone.image_size) if folded else network
    except Exception as error:  # a user's network may raise anything
        raise NotUsableError(_reason(error)) from error


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def torch_forward(
    backbone: Backbone, device: torch.device, precision: str, *, folded: bool
) -> tuple[Forward, IsFrozen]:
    """Return a forward pass in torch (channels_last), and a check that its state is unchanged.

    Args:
        backbone: The backbone; its network is copied to the device.
        device: The device to run on.
        precision: ``fp32``, ``tf32``, ``fp16`` or ``bf16``; normalization is always fp32.
        folded: Use ``fold``, or keep the library's layers.

    Raises:
        NotUsableError: If the network cannot be copied or folded.
    """
    dtype = _DTYPES[precision]
    network = _copy_network(backbone, folded=folded).to(device=device, dtype=dtype)
    network = network.to(memory_format=torch.channels_last)
    model = _FromPixels(backbone, network).to(device).eval()
    before = state_sha256(network)  # also waits until the copy is complete

    def forward(batch: torch.Tensor) -> npt.NDArray[np.float32]:
        with _own_stream(device), torch.inference_mode(), exact_fp32(tf32=precision == "tf32"):
            pixels = batch.to(device, non_blocking=batch.is_pinned())
            images = model.normalize(pixels).to(dtype)
            features = network(images.contiguous(memory_format=torch.channels_last))
            rows: npt.NDArray[np.float32] = features.float().cpu().numpy()
        return rows

    return forward, lambda: state_sha256(network) == before


_streams = threading.local()


@contextlib.contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """Use the calling thread's own CUDA stream: its copies overlap other threads' kernels.

    Each thread has one per device, for all networks: torch reuses freed memory per stream.
    """
    if device.type != "cuda":
        yield
        return
    mine: dict[torch.device, torch.cuda.Stream] = _streams.__dict__.setdefault("by_device", {})
    if device not in mine:
        mine[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(mine[device]):
        yield


def onnx_forward(backbone: Backbone, rows: int) -> Forward:
    """Return a forward pass of the folded network in ONNX Runtime, in the calling thread.

    Raises:
        NotUsableError: If the network cannot be exported, or ONNX Runtime is not installed.
    """
    try:
        model = export_onnx(
            folded_from_pixels(backbone), [(rows, backbone.image_size, backbone.image_size, 3)],
            ["pixels"], ["features"],
        )  # fmt: skip
        session = onnx_session(model, num_threads=1)
    except Exception as error:  # the exporter may raise anything
        raise NotUsableError(_reason(error)) from error

    def forward(batch: torch.Tensor) -> npt.NDArray[np.float32]:
        pixels = batch.numpy()
        if pixels.shape[3] == 1:
            # Not by torch: its threads wait for each other by spinning, 1.5 ms of the CPU an image.
            grey, pixels = pixels, np.empty((*pixels.shape[:3], 3), np.uint8)
            for channel in range(3):
                pixels[..., channel] = grey[..., 0]
        rows: npt.NDArray[np.float32] = session.run(None, {"pixels": pixels})[0]
        return rows

    return forward


def folded_from_pixels(backbone: Backbone) -> nn.Module:
    """Return (B, S, S, 3) uint8 to features (B, D): normalization and the folded network.

    Raises:
        NotUsableError: If the network cannot be copied or folded.
    """
    return _FromPixels(backbone, _copy_network(backbone, folded=True)).eval()


def onnx_session(model: bytes | str, num_threads: int) -> Any:
    """Return an ``onnxruntime.InferenceSession`` on the CPU of a model, or of its file."""
    # From 1.32 on it would write what runs where into the home folder, and send it to its makers.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only, which are raised as well
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def export_onnx(
    model: nn.Module, shapes: Sequence[tuple[int, ...]], inputs: Sequence[str],
    outputs: Sequence[str], *, any_batch: bool = False,
) -> bytes:  # fmt: skip
    """Return a model of uint8 inputs as ONNX.

    The tracing exporter takes 0.9 s for B0; the newer one takes 6 s and needs two more packages.

    Args:
        model: The module, in eval mode.
        shapes: Of each input.
        inputs: Their names.
        outputs: Names of the outputs.
        any_batch: The first dimension of all may be any number, else it is that of the shapes.
    """
    buffer: Any = io.BytesIO()
    batches = tuple(torch.zeros(shape, dtype=torch.uint8) for shape in shapes)
    axes = {name: {0: "batch"} for name in (*inputs, *outputs)} if any_batch else None
    with warnings.catch_warnings(), torch.inference_mode(), exact_fp32(), _no_onnx_log():
        warnings.simplefilter("ignore")  # its deprecation, and Python values in traces
        torch.onnx.export(
            model, batches, buffer, dynamo=False, opset_version=_OPSET, input_names=[*inputs],
            output_names=[*outputs], dynamic_axes=axes,
        )  # fmt: skip
    return bytes(buffer.getvalue())


@contextlib.contextmanager
def _no_onnx_log() -> Iterator[None]:
    """Keep torch's exporter from printing its graph where it fails: the error says enough.

    Torch 2.14 and 2.15 mean to print with ``verbose`` only, but test a function where they should
    call it. They print from C++: it goes to a file here, which is shown only if nothing failed.
    """
    choose_stream = getattr(torch._C, "_jit_set_onnx_log_output_stream", None)
    with _export_lock, contextlib.ExitStack() as stack:
        try:
            stderr = os.dup(2)
        except OSError:  # it is closed
            yield
            return
        stack.callback(os.close, stderr)
        file = stack.enter_context(tempfile.TemporaryFile())
        if choose_stream is not None:
            choose_stream("stderr")
            stack.callback(choose_stream, "stdout")
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
        file.seek(0)
        if said := file.read():
            os.write(2, said)


_export_lock = threading.Lock()  # descriptor 2 is one for all threads


_SWISHES = {"Swish", "MemoryEfficientSwish"}


def fold(network: nn.Module, image_size: int) -> nn.Module:
    """Fold batch norms, swishes and paddings of a network, in place, and return it.

    Hooks in one forward pass find out which batch norm follows which convolution, so this works for
    any library. The parity check catches mistakes.

    Args:
        network: A network in eval mode.
        image_size: S, the size of the image of that pass.
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
        made_by[id(output)] = (module, output)  # a tensor that is kept keeps its id unique

    def before_norm(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        uses[module] = uses.get(module, 0) + 1
        if inputs and id(inputs[0]) in made_by:
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
    # A layer that is used twice may be followed by different layers.
    return [pair for pair in pairs if uses[pair[0]] == 1 and uses[pair[2]] == 1]


def _fold_padding(convolution: nn.Conv2d) -> None:
    """Move efficientnet_pytorch's explicit zero padding into the convolution, if symmetric."""
    pad = getattr(convolution, "static_padding", None)
    if isinstance(pad, nn.ZeroPad2d):
        left, right, top, bottom = pad.padding
        if left == right and top == bottom:
            convolution.padding = (top, left)
            convolution.static_padding = nn.Identity()
