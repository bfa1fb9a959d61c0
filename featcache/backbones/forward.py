"""Forward passes: a network and its preprocessing as one function from a batch of pixels.

By torch on any device, by ONNX Runtime on CPUs. The batch is uint8, as the decoder made it, and is
normalized where the network runs.
"""

from __future__ import annotations

import contextlib
import copy
import io
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from featcache.backbones.backbone import Backbone, state_sha256
from featcache.backbones.folding import fold
from featcache.runtime import exact_fp32

Forward = Callable[[torch.Tensor], npt.NDArray[np.float32]]
"""A batch (B, S, S, 1 or 3) uint8 in host memory -> (B, D) float32."""
IsFrozen = Callable[[], bool]
"""Whether the network's state is what it was when it was made."""

_DTYPES = {
    "fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
}  # fmt: skip
_OPSET = 17


class NotUsableError(Exception):
    """This network cannot be run this way here; the message says why."""


class _FromPixels(nn.Module):
    """The network, fed with (B, S, S, 1 or 3) uint8 and normalizing them itself."""

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
    except Exception as error:  # people's networks do anything, also when they are watched
        raise NotUsableError(_reason(error)) from error


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def torch_forward(
    backbone: Backbone, device: torch.device, precision: str, *, folded: bool
) -> tuple[Forward, IsFrozen]:
    """Return the network in torch, channels_last, at a precision, and whether it stays as it was.

    Args:
        backbone: What to run; a copy of its network goes to the device.
        device: Where.
        precision: ``fp32``, ``tf32``, ``fp16`` or ``bf16``; normalizing is fp32 in any case.
        folded: As ``folding`` makes it, or as the library made it.

    Raises:
        NotUsableError: If the network cannot be copied or folded.
    """
    dtype = _DTYPES[precision]
    network = _copy_network(backbone, folded=folded).to(device=device, dtype=dtype)
    network = network.to(memory_format=torch.channels_last)
    model = _FromPixels(backbone, network).to(device).eval()
    before = state_sha256(network)  # also waits until all of it is on the device

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

    One a thread and device, for all networks: torch keeps freed memory apart by stream.
    """
    if device.type != "cuda":
        yield
        return
    mine: dict[torch.device, torch.cuda.Stream] = _streams.__dict__.setdefault("of_device", {})
    if device not in mine:
        mine[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(mine[device]):
        yield


def onnx_forward(backbone: Backbone, rows: int) -> Forward:
    """Return the folded network as a session of ONNX Runtime that computes in the calling thread.

    Raises:
        NotUsableError: If the network cannot be exported, or there is no ONNX Runtime.
    """
    try:
        import onnxruntime as ort

        model = _FromPixels(backbone, _copy_network(backbone, folded=True)).eval()
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors: they are raised as well
        session = ort.InferenceSession(
            _export(model, (rows, backbone.image_size, backbone.image_size, 3)), options,
            providers=["CPUExecutionProvider"],
        )  # fmt: skip
    except Exception as error:  # the exporter raises anything at a network it does not understand
        raise NotUsableError(_reason(error)) from error

    def forward(batch: torch.Tensor) -> npt.NDArray[np.float32]:
        pixels = batch.expand(-1, -1, -1, 3).contiguous().numpy()
        rows: npt.NDArray[np.float32] = session.run(None, {"pixels": pixels})[0]
        return rows

    return forward


def _export(model: nn.Module, shape: tuple[int, ...]) -> bytes:
    """Return the model for one input shape as ONNX.

    By the exporter that traces (0.9 s for B0): the newer one takes 6 s and two more packages.
    """
    buffer: Any = io.BytesIO()
    with warnings.catch_warnings(), torch.inference_mode(), exact_fp32():
        warnings.simplefilter("ignore")  # of its deprecation, and of Python values it traces
        torch.onnx.export(
            model, (torch.zeros(shape, dtype=torch.uint8),), buffer, dynamo=False,
            opset_version=_OPSET, input_names=["pixels"], output_names=["features"],
        )  # fmt: skip
    return bytes(buffer.getvalue())
