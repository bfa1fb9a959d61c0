"""Networks made ready to run as fast as each way allows: featcache's engine and its peers.

Every ``Way`` says which settings are worth trying on a device (``choices``) and makes a ``Runner``
of one of them. A peer that is not installed, or that cannot work here, raises ``NotHere`` with the
reason. Peers get their input ready-made: normalized floats of the right layout, on the device, and
their features may stay there. featcache gets bytes in main memory and gives floats in main memory.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import NotHere, import_peer

from featcache.backbones import engine as featcache_engine
from featcache.backbones.backbone import Backbone, build_backbone
from featcache.backbones.engine import build_engine
from featcache.runtime import exact_fp32

PRECISIONS = ("fp32", "default", "tf32", "fp16", "bf16")
"""``fp32`` is IEEE everywhere; ``default`` leaves torch alone: TF32 convolutions on CUDA."""
_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Job:
    """What all ways run.

    Attributes:
        pixels: (n, S, S, 3) uint8, real image content.
        device: Where.
        precision: One of ``PRECISIONS``.
        batch_sizes: To choose from.
        compile_batch_sizes: Fewer, for compiling takes a minute each.
        engine_images: How many images featcache's engine is given at a time.
    """

    pixels: np.ndarray
    device: torch.device
    precision: str
    batch_sizes: tuple[int, ...]
    compile_batch_sizes: tuple[int, ...]
    engine_images: int


@dataclass(frozen=True)
class Runner:
    """A network ready to run: ``run()`` forwards ``num_images`` and returns when they are done."""

    num_images: int
    run: Callable[[], object]
    features: Callable[[], np.ndarray]  # of the job's pixels, for the parity


@dataclass(frozen=True)
class Way:
    """One way of running one network.

    Attributes:
        name: For the table.
        backbone: The network whose eager fp32 features are its truth.
        choices: Settings to try; the fastest is measured.
        make: Makes a runner of a setting.
    """

    name: str
    backbone: str
    choices: tuple[dict[str, Any], ...]
    make: Callable[[Backbone, Job, dict[str, Any]], Runner] = field(repr=False)


def list_ways(stock: str, job: Job, *, compile_mode: str = "default") -> list[Way]:
    """Return the ways to measure: the stock network's, then timm's.

    Args:
        stock: ``efficientnet-b0`` or ``efficientnet-lite0``.
        job: What will be run.
        compile_mode: Of ``torch.compile``.
    """
    layouts = tuple(
        {"batch_size": b, "channels_last": c, "cudnn_benchmark": job.device.type == "cuda"}
        for b in job.batch_sizes
        for c in (False, True)
    )
    compiled = tuple({"batch_size": b, "mode": compile_mode} for b in job.compile_batch_sizes)
    plain = tuple({"batch_size": b} for b in job.batch_sizes)
    hints = tuple(
        {"batch_size": b, "hint": hint} for hint in ("LATENCY", "THROUGHPUT") for b in
        job.batch_sizes
    )  # fmt: skip
    ways = [
        Way("featcache", stock, ({},), _featcache),
        Way("stock eager, batch 32", stock, ({"batch_size": 32, "channels_last": False},), _eager),
        Way("stock eager, its best", stock, layouts, _eager),
        Way("ONNX Runtime", stock, plain, _onnxruntime),
        Way("OpenVINO", stock, hints, _openvino),
    ]
    models = ("tf_efficientnet_b0", "efficientnet_b0")
    if stock == "efficientnet-lite0":
        models = ("tf_efficientnet_lite0",)
    for model in models:
        ways.append(Way(f"timm {model} eager", f"timm:{model}", layouts, _eager))
        ways.append(Way(f"timm {model} torch.compile", f"timm:{model}", compiled, _compiled))
    return ways


def build(name: str) -> Backbone:
    """Return the backbone with seeded random weights, Lite0 with its own.

    Raises:
        NotHere: If its library is not installed.
    """
    try:
        return build_backbone(name, weights=None if name == "efficientnet-lite0" else "random")
    except Exception as error:
        if isinstance(error.__cause__, ModuleNotFoundError):
            raise NotHere("not installed") from error
        raise


def run_engine(engine: Any, pixels: np.ndarray) -> np.ndarray:
    """Return (n, D) features by featcache's engine, any number of images."""
    if hasattr(engine, "run"):
        return engine.run(pixels)
    return featcache_engine.run_padded(engine, pixels)


# ---------------------------------------------------------------------------------------- the ways


def _featcache(backbone: Backbone, job: Job, _: dict[str, Any]) -> Runner:
    if job.precision == "default":
        raise NotHere("featcache has no such precision: it says fp32 or tf32")
    engine = build_engine(backbone, job.device, job.pixels[:8], precision=job.precision)
    many = np.resize(job.pixels, (job.engine_images, *job.pixels.shape[1:]))
    return Runner(
        len(many), lambda: run_engine(engine, many), lambda: run_engine(engine, job.pixels)
    )


def _eager(backbone: Backbone, job: Job, choice: dict[str, Any]) -> Runner:
    network = copy.deepcopy(backbone.network).eval()
    return _torch_runner(network, backbone, job, choice, autocast="timm" not in backbone.name)


def _compiled(backbone: Backbone, job: Job, choice: dict[str, Any]) -> Runner:
    if job.device.type == "cpu" and not any(
        map(shutil.which, (os.getenv("CXX", "g++"), "clang++"))
    ):
        raise NotHere("no C++ compiler")
    import torch._inductor.config

    torch._inductor.config.freezing = True
    network = copy.deepcopy(backbone.network).eval()
    wanted = choice | {"channels_last": True}
    return _torch_runner(network, backbone, job, wanted, autocast=False, mode=choice["mode"])


def _torch_runner(
    network: Any, backbone: Backbone, job: Job, choice: dict[str, Any], *, autocast: bool,
    mode: str | None = None,
) -> Runner:  # fmt: skip
    """Make a runner of a torch module, compiled if ``mode`` is given.

    Half precision is autocast, what users of the stock network do, or halved weights.
    """
    half = _HALF.get(job.precision)
    dtype = torch.float32 if autocast or half is None else half
    layout = torch.channels_last if choice["channels_last"] else torch.contiguous_format
    network = network.to(device=job.device, dtype=dtype, memory_format=layout)
    floats = normalized(backbone, job.pixels)
    size = choice["batch_size"]

    def put(rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(rows).to(device=job.device, dtype=dtype, memory_format=layout)

    call = network
    if mode is not None:
        torch._dynamo.reset()  # its process has this way alone, and nothing else compiled in use
        call = torch.compile(network, mode=None if mode == "default" else mode, dynamic=False)
    batch = put(np.resize(floats, (size, *floats.shape[1:])))

    def forward(rows: torch.Tensor) -> torch.Tensor:
        no_gradients = torch.no_grad() if mode else torch.inference_mode()
        context = contextlib.nullcontext()
        if autocast and half is not None:
            context = torch.autocast(job.device.type, dtype=half)
        with no_gradients, settings(job, cudnn_benchmark=choice.get("cudnn_benchmark")), context:
            return call(rows)

    def run() -> None:
        forward(batch)
        if job.device.type == "cuda":
            torch.cuda.synchronize()

    def features() -> np.ndarray:
        return _in_batches(lambda part: forward(put(part)).float().cpu().numpy(), floats, size)

    return Runner(size, run, features)


def _onnxruntime(backbone: Backbone, job: Job, choice: dict[str, Any]) -> Runner:
    if job.device.type != "cpu" or job.precision != "fp32":
        raise NotHere("measured on the CPU at fp32 only")
    onnxruntime = import_peer("onnxruntime")
    session = onnxruntime.InferenceSession(exported(backbone), providers=["CPUExecutionProvider"])
    floats, size = normalized(backbone, job.pixels), choice["batch_size"]
    batch = np.resize(floats, (size, *floats.shape[1:]))

    def forward(rows: np.ndarray) -> np.ndarray:
        return session.run(None, {"images": rows})[0]

    return Runner(size, lambda: forward(batch), lambda: _in_batches(forward, floats, size))


def _openvino(backbone: Backbone, job: Job, choice: dict[str, Any]) -> Runner:
    if job.device.type != "cpu" or job.precision not in {"fp32", "bf16"}:
        raise NotHere("measured on the CPU at fp32 and bf16 only")
    openvino = import_peer("openvino")
    core, size = openvino.Core(), choice["batch_size"]
    model = core.read_model(exported(backbone))
    model.reshape([size, 3, backbone.image_size, backbone.image_size])
    compiled = core.compile_model(
        model, "CPU",
        {
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[job.precision],
            "PERFORMANCE_HINT": choice["hint"],
        },
    )  # fmt: skip
    floats = normalized(backbone, job.pixels)
    batch = np.resize(floats, (size, *floats.shape[1:]))
    requests = openvino.AsyncInferQueue(compiled)  # as many as it finds best itself

    def run() -> None:
        for _ in range(len(requests)):
            requests.start_async({0: batch}, share_inputs=True)
        requests.wait_all()

    def forward(rows: np.ndarray) -> np.ndarray:
        return compiled(rows)[0].copy()

    return Runner(size * len(requests), run, lambda: _in_batches(forward, floats, size))


# -------------------------------------------------------------------------------------- their food


def normalized(backbone: Backbone, pixels: np.ndarray) -> np.ndarray:
    """Return (n, 3, S, S) float32 as the network was trained on."""
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (backbone.mean, backbone.std))
    return np.ascontiguousarray(
        (pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255 - mean) / std
    )


@contextlib.contextmanager
def settings(job: Job, *, cudnn_benchmark: bool | None) -> Iterator[None]:
    """Run with the arithmetic of the job's precision; ``cudnn.benchmark`` where asked."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = bool(cudnn_benchmark)
    exact = job.precision in {"fp32", "tf32"}
    try:
        with exact_fp32(tf32=job.precision == "tf32") if exact else contextlib.nullcontext():
            yield
    finally:
        torch.backends.cudnn.benchmark = before


def exported(backbone: Backbone) -> bytes:
    """Return the network as ONNX with a free batch size, the way its library says.

    Raises:
        NotHere: If onnx is not installed.
    """
    import_peer("onnx")
    network = copy.deepcopy(backbone.network).eval()
    if hasattr(network, "set_swish"):
        from efficientnet_pytorch.utils import MemoryEfficientSwish

        if any(isinstance(module, MemoryEfficientSwish) for module in network.modules()):
            network.set_swish(memory_efficient=False)
    images = torch.zeros(2, 3, backbone.image_size, backbone.image_size)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        path = Path(folder) / "network.onnx"
        with contextlib.redirect_stdout(io.StringIO()):
            torch.onnx.export(
                network, (images,), str(path), dynamo=False, input_names=["images"],
                output_names=["features"], dynamic_axes={"images": {0: "n"}, "features": {0: "n"}},
            )  # fmt: skip
        return path.read_bytes()


def _in_batches(
    forward: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, size: int
) -> np.ndarray:
    """Run all rows in batches of one size; the last one is filled up with the first rows."""
    found = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        padded = np.concatenate([part, np.resize(rows, (size - len(part), *rows.shape[1:]))])
        found.append(forward(np.ascontiguousarray(padded))[: len(part)])
    return np.concatenate(found)
