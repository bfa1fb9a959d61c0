"""Engines: a backbone becomes a fast forward pass on a device, at a precision, with its parity.

They are tried in this order until one is within the precision's bound of the plain network:

- ``onnx``: ONNX Runtime, on CPUs in fp32. One image at a time on every core: 112 images/s of B0 on
  two cores, where one batch after the other on both cores gives 100 at best, ``folded`` 55 and
  efficientnet_pytorch 16. One image's feature maps stay in its core's own cache, and no core waits
  for another.
- ``folded``: the network with batch norms and paddings folded (module ``forward``), in torch,
  channels_last. Everywhere.
- ``eager``: the library's network as it is, channels_last.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from featcache.backbones.backbone import Backbone
from featcache.backbones.forward import (
    Forward,
    IsFrozen,
    NotUsableError,
    onnx_forward,
    torch_forward,
)
from featcache.errors import BackboneError, ConfigError, FeatcacheWarning
from featcache.precision import PARITY_BOUNDS, relative_errors
from featcache.runtime import available_cores, exact_fp32, is_out_of_memory

ENGINES = ("onnx", "folded", "eager")

# Exporting B0 and loading it take 1 s, and every image then saves 9 ms.
ONNX_PAYS_FROM = 128
# B0's largest feature map is 96 x 112 x 112 floats. Six of them stay under the 32 MiB from which
# glibc maps and unmaps memory at every allocation: on two cores ``folded`` ran Lite0 at 73 images/s
# in batches of 6, 66 of 8, 30 of 32.
_CPU_BATCH = {"onnx": 1, "folded": 6, "eager": 6}
_GPU_BATCHES = (64, 128, 256, 512)
_GPU_STREAMS = 2  # one batch is filled and sent while another is computed


Images = Sequence[npt.NDArray[np.uint8]] | npt.NDArray[np.uint8]
"""Images of one size, each (S, S) grey or (S, S, 3), uint8; or one array (n, S, S, 3) of them."""


@dataclass(frozen=True)
class Engine:
    """A forward pass of constant batch shape. Threads may share it.

    Attributes:
        name: ``onnx``, ``folded`` or ``eager``.
        reason: Why this one, in a few words for people.
        device: Where it runs.
        precision: ``fp32``, ``tf32``, ``fp16`` or ``bf16``.
        batch_size: Rows of every batch.
        concurrency: How many batches to run at once, each from a thread of its own.
        num_features: D.
        parity: Relative L2 error per probed image against the eager fp32 forward.
        forward: The forward pass of one whole batch.
        is_frozen: Tells whether the network it runs is still the one it was.
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

    def run(self, images: Images) -> npt.NDArray[np.float32]:
        """Return the features (n, D) float32 of any number of images, as fast as it can.

        Every batch has the engine's constant shape, so that a row depends on its image alone: what
        the last one lacks are zero images, whose rows are dropped.
        """
        if self.concurrency == 1 or len(images) <= self.batch_size:
            return self.run_here(images)
        with ThreadPoolExecutor(self.concurrency) as threads:
            return self._join(threads.map(self._run_batch, self._split(images)))

    def run_here(self, images: Images) -> npt.NDArray[np.float32]:
        """Do what ``run`` does in the calling thread alone: others run other images."""
        return self._join(map(self._run_batch, self._split(images)))

    def _split(self, images: Images) -> Iterator[Images]:
        for start in range(0, len(images), self.batch_size):
            yield images[start : start + self.batch_size]

    def _join(self, rows: Iterable[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        return np.concatenate([np.empty((0, self.num_features), np.float32), *rows])

    def _run_batch(self, images: Images) -> npt.NDArray[np.float32]:
        # Grey images stay one channel until the device: a third of the bytes to move.
        grey = all(image.ndim == 2 for image in images)
        shape = (self.batch_size, *images[0].shape[:2], 1 if grey else 3)
        # Pinned memory, which torch keeps and reuses, goes to a GPU in the background.
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
) -> Engine:
    """Choose the fastest engine that agrees with the plain network on real images.

    Args:
        backbone: What to run.
        device: Where.
        probes: A few of the user's own images, or none, to compare on.
        precision: ``fp32``, ``tf32`` (CUDA only), ``fp16`` or ``bf16``.
        batch_size: Rows a batch, or ``auto``: fixed by the engine on a CPU (see the constants
            above), measured on a GPU. Where a GPU's memory does not suffice, it is halved.
        name: ``auto``, or one engine to insist on.
        num_images: How many images it is for, if that is known: few do not pay for an export.

    Raises:
        ConfigError: If an option is unknown or does not suit the device.
        BackboneError: If no engine is within the precision's bound.
    """
    _check_options(device, precision, batch_size, name)
    reference = eager_features(backbone, probes)
    reasons: list[str] = []
    for candidate in _candidates(device, precision, name, num_images):
        try:
            engine = _assemble(
                candidate, backbone, device, precision=precision, batch_size=batch_size,
                num_images=num_images,
            )  # fmt: skip
        except NotUsableError as error:
            reasons.append(f"{candidate} cannot be used: {error}")
        else:
            parity = relative_errors(engine.run(probes), reference)
            worst = max(parity, default=0.0)
            if worst <= PARITY_BOUNDS[precision]:
                asked = "asked for" if name != "auto" else "the fastest here"
                return replace(engine, parity=parity, reason="; ".join(reasons) or asked)
            reasons.append(
                f"{candidate} at {precision} is off by {worst:.1e} (bound "
                f"{PARITY_BOUNDS[precision]:.0e}) and is not used"
            )
        warnings.warn(f"engine {reasons[-1]}", FeatcacheWarning, stacklevel=2)
    raise BackboneError(
        f"engine at {precision}", expected=f"features within {PARITY_BOUNDS[precision]:.0e}",
        found="; ".join(reasons), where=backbone.name,
        hint="Use --precision fp32 and --engine auto",
    )  # fmt: skip


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
    """Return the engine by its name, its batch size settled, its parity yet to be found."""
    rows = _CPU_BATCH[name] if batch_size == "auto" else int(batch_size)
    is_frozen: IsFrozen = _always  # what is exported cannot change
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

    def seconds_of(rows: int) -> float:
        return _time_batch(replace(engine, batch_size=rows), backbone.image_size)

    if batch_size == "auto":
        rows = choose_batch_size(seconds_of, num_images or _GPU_BATCHES[-1])
    else:
        rows = halve_until_it_fits(seconds_of, rows)[0]
    return replace(engine, batch_size=rows)


def _always() -> bool:
    return True


# ------------------------------------------------------------------------------------ batch size


def choose_batch_size(seconds_of: Callable[[int], float], num_images: int) -> int:
    """Return the smallest of the usual sizes within 3 % of the best measured rate.

    Args:
        seconds_of: Runs a batch of so many rows and returns its time; may run out of memory.
        num_images: No size beyond the first that holds them all is tried.
    """
    smallest, seconds = halve_until_it_fits(seconds_of, _GPU_BATCHES[0], say=False)
    rates = {smallest: smallest / seconds}
    larger = () if smallest < _GPU_BATCHES[0] else _GPU_BATCHES[1:]
    for before, rows in pairwise((smallest, *larger)):
        if before >= num_images:
            break
        try:
            rates[rows] = rows / seconds_of(rows)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
    return min(rows for rows, rate in rates.items() if rate >= 0.97 * max(rates.values()))


def halve_until_it_fits(
    seconds_of: Callable[[int], float], rows: int, *, say: bool = True
) -> tuple[int, float]:
    """Return the largest of rows, rows / 2, rows / 4 ... that the device's memory holds.

    Returns:
        The rows, and the seconds of such a batch.

    Raises:
        RuntimeError: torch's own, if it does not hold a single row.
    """
    asked = rows
    while True:
        try:
            seconds = seconds_of(rows)
            break
        except RuntimeError as error:
            if rows == 1 or not is_out_of_memory(error):
                raise
            rows //= 2
    if rows < asked and say:
        message = f"batches of {asked} do not fit into the device's memory: {rows} are used"
        warnings.warn(message, FeatcacheWarning, stacklevel=2)
    return rows, seconds


def _time_batch(engine: Engine, image_size: int) -> float:
    """Return the shortest of three times of a batch, as many at once as there will be."""
    num_rows = engine.batch_size * engine.concurrency
    images = np.zeros((num_rows, image_size, image_size, 3), np.uint8)
    times = []
    try:
        for _ in range(4):  # the first one allocates and chooses
            start = time.perf_counter()
            engine.run(images)
            times.append((time.perf_counter() - start) / engine.concurrency)
    finally:
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()  # or other sizes' blocks would be in the way
    return min(times[1:])


# ---------------------------------------------------------------------------------------- parity


def eager_features(backbone: Backbone, images: Images) -> npt.NDArray[np.float32]:
    """Return (n, D) features by the library's own network on the CPU in IEEE fp32: the truth."""
    network = backbone.network.eval()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone.mean, backbone.std))
    rows = [np.empty((0, backbone.num_features), np.float32)]
    with torch.inference_mode(), exact_fp32():
        for image in images:  # one by one: they may be grey or coloured
            pixels = torch.from_numpy(np.atleast_3d(image)).permute(2, 0, 1)[None].float()
            rows.append(network((pixels.expand(-1, 3, -1, -1) / 255 - mean) / std).numpy())
    return np.concatenate(rows)
