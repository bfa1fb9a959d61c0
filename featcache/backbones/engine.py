"""Engines: a fast forward pass of a backbone, checked against the plain fp32 network.

They are tried in this order until the features of one are within the precision's bound:

- ``onnx``: ONNX Runtime, on CPUs in fp32, one image at a time on every core. B0 on two cores: 112
  images/s; batches spread over both cores give 100 at best, ``folded`` 55, efficientnet_pytorch 16.
  The feature maps of one image stay in its core's cache, and no core waits for another.
- ``folded``: the network with batch norms and paddings folded (module ``forward``), in torch,
  channels_last. On all devices.
- ``eager``: the library's own network, channels_last.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from featcache.backbones.backbone import Backbone
from featcache.backbones.forward import (
    Forward,
    IsFrozen,
    NotUsableError,
    onnx_forward,
    torch_forward,
)
from featcache.errors import BackboneError, ConfigError, warn_user
from featcache.memory import is_out_of_memory
from featcache.precision import PARITY_BOUNDS, format_bound, parity_bound, relative_errors
from featcache.runtime import available_cores, exact_fp32

ENGINES = ("onnx", "folded", "eager")

# Exporting and loading B0 takes 1 s; each image then takes 9 ms less.
ONNX_PAYS_FROM = 128
# B0's largest feature map is 96 x 112 x 112 floats. Six of them stay under the 32 MiB from which
# glibc maps and unmaps memory at every allocation: on two cores ``folded`` ran Lite0 at 73 images/s
# in batches of 6, 66 of 8, 30 of 32.
_CPU_BATCH = {"onnx": 1, "folded": 6, "eager": 6}
_GPU_BATCHES = (64, 128, 256, 512)
_GPU_STREAMS = 2  # fill and send one batch while computing another


Images = Sequence[npt.NDArray[np.uint8]] | npt.NDArray[np.uint8]
"""Images of one size, each (S, S) grey or (S, S, 3), uint8; or one array (n, S, S, 3) of them."""


@dataclass(frozen=True)
class Engine:
    """A forward pass of constant batch shape. Threads may share it.

    Attributes:
        name: ``onnx``, ``folded`` or ``eager``.
        reason: Why it was chosen, in a few words.
        device: The device it runs on.
        precision: ``fp32``, ``tf32``, ``fp16`` or ``bf16``.
        batch_size: Rows per batch.
        concurrency: Number of batches to run at once, each in its own thread.
        num_features: D.
        parity: Relative L2 error per probed image against the eager fp32 forward, of the features
            as they are stored.
        forward: The forward pass of one full batch.
        is_frozen: Returns whether the network's state is unchanged.
        spread: Largest relative L2 error of the library's own fp32 against float64 on the probed
            images; None where the precision's usual bound was met, and it was not measured.
    """

    name: str
    reason: str
    device: torch.device
    precision: str
    batch_size: int
    concurrency: int
    num_features: int
    parity: tuple[float, ...]
    forward: Forward
    is_frozen: IsFrozen
    spread: float | None = None

    def run(self, images: Images) -> npt.NDArray[np.float32]:
        """Return features (n, D) float32 of n images, with as many threads as are useful.

        Every batch has the same shape, so that a row depends on its image alone. The last batch is
        filled with zero images, whose rows are dropped.
        """
        if self.concurrency == 1 or len(images) <= self.batch_size:
            return self.run_here(images)
        with ThreadPoolExecutor(self.concurrency) as threads:
            return self._join(threads.map(self._run_batch, self._split(images)))

    def run_here(self, images: Images) -> npt.NDArray[np.float32]:
        """Do what ``run`` does, but in the calling thread only."""
        return self._join(map(self._run_batch, self._split(images)))

    def _split(self, images: Images) -> Iterator[Images]:
        for start in range(0, len(images), self.batch_size):
            yield images[start : start + self.batch_size]

    def _join(self, rows: Iterable[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        return np.concatenate([np.empty((0, self.num_features), np.float32), *rows])

    def _run_batch(self, images: Images) -> npt.NDArray[np.float32]:
        # Grey images have one channel until they are on the device: a third of the bytes.
        grey = all(image.ndim == 2 for image in images)
        shape = (self.batch_size, *images[0].shape[:2], 1 if grey else 3)
        # Pinned memory, which torch reuses, is copied to a GPU in the background.
        batch = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        pixels = batch.numpy()
        pixels[len(images) :] = 0
        for slot, image in zip(pixels, images, strict=False):
            slot[:] = image[:, :, None] if image.ndim == 2 else image
        return self.forward(batch)[: len(images)]


def build_engine(
    backbone: Backbone,
    device: torch.device,
    probes: Images,
    *,
    precision: str = "fp32",
    batch_size: int | str = "auto",
    name: str = "auto",
    num_images: int | None = None,
    feature_dtype: str = "float32",
    reference: npt.NDArray[np.float32] | None = None,
) -> Engine:
    """Choose the fastest engine whose features agree with the plain network's on real images.

    Some networks amplify rounding: two passes of the library in fp32 differ by more than the
    bound. So if an engine misses it, the library's own fp32 is compared with float64, and the bound
    becomes three times that spread (see ``parity_bound``).

    Args:
        backbone: The backbone to run.
        device: The device to run on.
        probes: A few of the user's images to compare on; may be empty.
        precision: ``fp32``, ``tf32`` (CUDA only), ``fp16`` or ``bf16``.
        batch_size: Rows per batch, or ``auto``: fixed by the engine on a CPU (see the constants
            above), measured on a GPU. It is halved if a GPU's memory does not suffice.
        name: ``auto``, or the name of an engine.
        num_images: Number of images to come, if known: for few, an export does not pay off.
        feature_dtype: What the features will be stored as: ``parity`` includes its rounding.
        reference: ``eager_features`` of the probes (n, D), if they are known: of another process or
            machine, say, which the engine has to agree with.

    Raises:
        ConfigError: If an option is unknown or does not fit the device.
        BackboneError: If no engine is within the precision's bound.
    """
    _check_options(device, precision, batch_size, name)
    is_own = reference is None
    reference = eager_features(backbone, probes) if reference is None else reference
    reasons: list[str] = []
    spread: float | None = None
    for candidate in _candidates(device, precision, name, num_images):
        try:
            engine = _assemble(
                candidate, backbone, device, precision=precision, batch_size=batch_size,
                num_images=num_images,
            )  # fmt: skip
        except NotUsableError as error:
            reasons.append(f"{candidate} cannot be used: {error}")
        else:
            found = engine.run(probes)
            worst = max(relative_errors(found, reference), default=0.0)
            if worst > PARITY_BOUNDS[precision] and spread is None:
                # Of this network here: another's features say nothing of its rounding.
                own = reference if is_own else eager_features(backbone, probes)
                spread = measure_spread(backbone, probes, own)
            bound = parity_bound(precision, spread)
            if worst <= bound:
                why = [*reasons] or ["asked for" if name != "auto" else "the fastest here"]
                if bound == PARITY_BOUNDS[precision]:
                    spread = None
                if spread is not None:
                    why.append(f"bound {format_bound(bound)}: {_describe_spread(spread)}")
                return replace(
                    engine, parity=_stored_errors(found, reference, feature_dtype),
                    reason="; ".join(why), spread=spread,
                )  # fmt: skip
            reasons.append(
                f"{candidate} at {precision} is off by {worst:.1e} (bound "
                f"{format_bound(bound)}) and is not used"
            )
        warn_user(f"engine {reasons[-1]}")
    expected = f"features within {format_bound(parity_bound(precision, spread))}"
    if spread is not None and spread > PARITY_BOUNDS["fp32"]:
        reasons.append(_describe_spread(spread))
    raise BackboneError(
        f"engine at {precision}", expected=expected, found="; ".join(reasons),
        where=backbone.name, hint=_suggest(precision, name),
    )  # fmt: skip


def _describe_spread(spread: float) -> str:
    return f"the library's own fp32 is off by {spread:.1e} against float64"


def _suggest(precision: str, name: str) -> str:
    """Return a hint that names nothing that was used."""
    if precision != "fp32":
        return "Use --precision fp32"
    if name in {"onnx", "folded"}:
        return "Use --engine auto"
    return "Check the weights: the network amplifies rounding, or its outputs are not finite"


def _stored_errors(
    found: npt.NDArray[np.float32], reference: npt.NDArray[np.float32], feature_dtype: str
) -> tuple[float, ...]:
    """Return the errors (N,) of features (N, D) after they were stored."""
    with np.errstate(over="ignore"):
        stored = found.astype(feature_dtype)
    # What float16 cannot hold is refused when it is stored.
    return relative_errors(stored if np.isfinite(stored).all() else found, reference)


def _check_options(device: torch.device, precision: str, batch_size: int | str, name: str) -> None:
    if precision not in PARITY_BOUNDS:
        expected = "one of " + ", ".join(PARITY_BOUNDS)
        raise ConfigError("--precision", expected=expected, found=precision)
    if precision == "tf32" and device.type != "cuda":
        raise ConfigError("--precision tf32", expected="a CUDA device", found=device.type)
    if name not in {"auto", *ENGINES}:
        raise ConfigError("--engine", expected="auto, " + ", ".join(ENGINES), found=name)
    if name == "onnx" and (device.type, precision) != ("cpu", "fp32"):
        found = f"{device.type} at {precision}"
        raise ConfigError("--engine onnx", expected="a CPU at fp32", found=found)
    if batch_size != "auto" and not (isinstance(batch_size, int) and 1 <= batch_size <= 65536):
        raise ConfigError("--batch-size", expected="auto, or 1 to 65536", found=batch_size)


def _candidates(
    device: torch.device, precision: str, name: str, num_images: int | None
) -> tuple[str, ...]:
    if name != "auto":
        return (name,)
    few = num_images is not None and num_images < ONNX_PAYS_FROM
    if few or (device.type, precision) != ("cpu", "fp32"):
        return ("folded", "eager")
    return ENGINES


def _assemble(
    name: str, backbone: Backbone, device: torch.device, *, precision: str, batch_size: int | str,
    num_images: int | None,
) -> Engine:  # fmt: skip
    """Build an engine by name and choose its batch size; its parity is still to be measured."""
    rows = _CPU_BATCH[name] if batch_size == "auto" else int(batch_size)
    is_frozen: IsFrozen = _is_always_frozen  # an exported network cannot change
    concurrency = 1  # torch spreads one batch over a CPU's cores by itself
    if name == "onnx":
        forward, concurrency = onnx_forward(backbone, rows), available_cores()
    else:
        forward, is_frozen = torch_forward(backbone, device, precision, folded=name == "folded")
    if device.type == "cuda":
        concurrency = _GPU_STREAMS
    engine = Engine(
        name, "", device, precision, rows, concurrency, backbone.num_features, (), forward,
        is_frozen,
    )  # fmt: skip
    if device.type == "cpu":
        return engine

    def time_batch(rows: int) -> float:
        return _time_batch(replace(engine, batch_size=rows), backbone.image_size)

    if batch_size == "auto":
        rows = choose_batch_size(time_batch, num_images or _GPU_BATCHES[-1])
    else:
        rows = halve_until_it_fits(time_batch, rows)[0]
    return replace(engine, batch_size=rows)


def _is_always_frozen() -> bool:
    return True


# ------------------------------------------------------------------------------------ batch size


def choose_batch_size(time_batch: Callable[[int], float], num_images: int) -> int:
    """Return the smallest of the usual sizes within 3 % of the best measured rate.

    Args:
        time_batch: Runs a batch of this many rows and returns its seconds; may run out of memory.
        num_images: Sizes above the first that holds all images are not tried.
    """
    smallest, seconds = halve_until_it_fits(time_batch, _GPU_BATCHES[0], say=False)
    rates = {smallest: smallest / seconds}
    larger = () if smallest < _GPU_BATCHES[0] else _GPU_BATCHES[1:]
    for before, rows in pairwise((smallest, *larger)):
        if before >= num_images:
            break
        try:
            rates[rows] = rows / time_batch(rows)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
    return min(rows for rows, rate in rates.items() if rate >= 0.97 * max(rates.values()))


def halve_until_it_fits(
    time_batch: Callable[[int], float], rows: int, *, say: bool = True
) -> tuple[int, float]:
    """Return the largest of rows, rows / 2, rows / 4 ... that fits in the device's memory.

    Returns:
        The rows, and the seconds of such a batch.

    Raises:
        RuntimeError: From torch, if not even one row fits.
    """
    asked = rows
    while True:
        try:
            seconds = time_batch(rows)
            break
        except RuntimeError as error:
            if rows == 1 or not is_out_of_memory(error):
                raise
            rows //= 2
    if rows < asked and say:
        message = f"batches of {asked} do not fit into the device's memory: {rows} are used"
        warn_user(message)
    return rows, seconds


def _time_batch(engine: Engine, image_size: int) -> float:
    """Return the best of three times of a batch, with ``concurrency`` batches at once."""
    num_rows = engine.batch_size * engine.concurrency
    images = np.zeros((num_rows, image_size, image_size, 3), np.uint8)
    times = []
    try:
        for _ in range(4):  # the first one allocates memory and chooses algorithms
            start = time.perf_counter()
            engine.run(images)
            times.append((time.perf_counter() - start) / engine.concurrency)
    finally:
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()  # free the blocks of this size
    return min(times[1:])


# ---------------------------------------------------------------------------------------- parity


def eager_features(backbone: Backbone, images: Images) -> npt.NDArray[np.float32]:
    """Return reference features (n, D): the library's own network, on the CPU, in IEEE fp32."""
    features = _run_one_by_one(backbone, backbone.network.eval(), images, torch.float32)
    return features.astype(np.float32, copy=False)


def measure_spread(backbone: Backbone, images: Images, reference: npt.NDArray[np.float32]) -> float:
    """Return the largest relative L2 error of the library's own network in fp32.

    Two passes are compared with one in float64: image by image, and in batches with channels_last,
    which add in another order.

    Args:
        backbone: The backbone.
        images: A few images.
        reference: Its ``eager_features`` of them.
    """
    truth: npt.NDArray[Any] = reference
    with contextlib.suppress(Exception):  # some networks compute in fp32 whatever they are given
        network = copy.deepcopy(backbone.network).eval().double()
        truth = _run_one_by_one(backbone, network, images, torch.float64)
    forward, _ = torch_forward(backbone, torch.device("cpu"), "fp32", folded=False)
    rows = _CPU_BATCH["eager"]
    engine = Engine(
        "eager", "", torch.device("cpu"), "fp32", rows, 1, backbone.num_features, (), forward,
        _is_always_frozen,
    )  # fmt: skip
    passes = (reference, engine.run(images))
    return max((e for found in passes for e in relative_errors(found, truth)), default=0.0)


def _run_one_by_one(
    backbone: Backbone, network: nn.Module, images: Images, dtype: torch.dtype
) -> npt.NDArray[Any]:
    """Return features (n, D) of images that may be grey or in colour."""
    mean, std = (
        torch.tensor(v, dtype=dtype).view(1, 3, 1, 1) for v in (backbone.mean, backbone.std)
    )
    rows: list[npt.NDArray[Any]] = [np.empty((0, backbone.num_features), np.float32)]
    with torch.inference_mode(), exact_fp32():
        for image in images:
            pixels = torch.from_numpy(np.atleast_3d(image)).permute(2, 0, 1)[None].to(dtype)
            rows.append(network((pixels.expand(-1, 3, -1, -1) / 255 - mean) / std).numpy())
    return np.concatenate(rows)
