"""Samples -> pixels -> batches -> features: the one path of extraction, verification, prediction.

Threads read, hash and decode images while the network runs; Pillow and torch release the GIL.
Every batch has the engine's constant shape: failed slots and the tail are zero images whose rows
are dropped, so that a row depends on its image alone.

Memory: ``_AHEAD`` + 1 batches of pixels, or 32 images if that is more, and one undecoded and one
decoded file a thread.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.dataset import ImageDataset, Sample
from featcache.engine import Engine
from featcache.errors import ConfigError, DataError, printable
from featcache.images import PixelRules, decode
from featcache.isolation import DECODE_SECONDS, IsolatedDecoder
from featcache.runtime import Timer, available_cores
from featcache.views import PLAIN, ViewRules, render

_AHEAD = 3  # batches in the making while one is in the network, and at least ...
_AHEAD_IMAGES = 32  # ... so many images, or one large file stops the small batches of a CPU


@dataclass(frozen=True)
class Outcome:
    """What became of one image.

    Attributes:
        sample: The image.
        sha256: Of the file's bytes; 32 zero bytes if it could not be read.
        reason: Why it failed, or None.
        truncated: It was cut off and has been filled in.
    """

    sample: Sample
    sha256: bytes
    reason: str | None
    truncated: bool


_Decoded = tuple[Outcome, npt.NDArray[np.uint8] | None]


@dataclass(frozen=True)
class FeatureBatch:
    """A batch's outcomes, one per sample, and the features of those that did not fail.

    ``features`` is (M, D) float32: the views of each outcome without a ``reason``, in their order;
    ``num_views`` tells of each outcome how many it has, or would have.
    """

    outcomes: tuple[Outcome, ...]
    features: npt.NDArray[np.float32]
    num_views: tuple[int, ...]

    def per_image(self) -> Iterator[tuple[Outcome, npt.NDArray[np.float32] | None]]:
        """Yield each outcome with its features (V, D), None where it failed."""
        start = 0
        for outcome, count in zip(self.outcomes, self.num_views, strict=True):
            if outcome.reason is None:
                yield outcome, self.features[start : start + count]
                start += count
            else:
                yield outcome, None


def resolve_workers(workers: int | str) -> int:
    """Return the number of decoding threads of ``auto`` (one a core, at least 2) or a number.

    Raises:
        ConfigError: If it is neither ``auto`` nor a whole number from 1 to 256.
    """
    if workers == "auto":
        return max(2, available_cores())
    if not isinstance(workers, int) or not 1 <= workers <= 256:
        raise ConfigError("--workers", expected="auto, or 1 to 256", found=workers)
    return workers


def stream_features(
    dataset: ImageDataset,
    samples: Sequence[Sample],
    engine: Engine,
    rules: PixelRules,
    *,
    view_rules: ViewRules = PLAIN,
    workers: int | str = "auto",
    timer: Timer | None = None,
    isolate: bool = False,
) -> Iterator[FeatureBatch]:
    """Run samples through the engine, batch by batch, in their order.

    Args:
        dataset: Where the samples are read from.
        samples: What to run.
        engine: The forward pass.
        rules: How bytes become pixels.
        view_rules: Which views of images to train on.
        workers: Decoding threads, or ``auto``.
        timer: Adds up ``waiting`` (for decoding) and ``forward``.
        isolate: Decode in a child process, image by image: slower, and survives any image.
    """
    clock = timer or Timer()
    size = engine.batch_size
    for outcomes, pixels in stream_pixels(
        dataset, samples, rules, size, view_rules=view_rules, workers=workers, timer=clock,
        isolate=isolate,
    ):  # fmt: skip
        counts = tuple(_count_views(dataset, o.sample, view_rules) for o in outcomes)
        good = np.repeat([o.reason is None for o in outcomes], counts)
        features = np.empty((0, engine.num_features), np.float32)
        if good.any():
            with clock("forward"):
                parts = [engine.forward(p) for p in np.split(pixels, len(pixels) // size)]
                features = np.concatenate(parts)[: len(good)][good]
        yield FeatureBatch(outcomes, features, counts)


def _count_views(dataset: ImageDataset, sample: Sample, view_rules: ViewRules) -> int:
    return view_rules.for_split(sample.split, dataset.splits).num_views


def _batch_samples(
    dataset: ImageDataset, samples: Sequence[Sample], view_rules: ViewRules, batch_size: int
) -> Iterator[list[Sample]]:
    """Yield as many samples as have ``batch_size`` views together, one at least."""
    part: list[Sample] = []
    num_views = 0
    for sample in samples:
        count = _count_views(dataset, sample, view_rules)
        if part and num_views + count > batch_size:
            yield part
            part, num_views = [], 0
        part.append(sample)
        num_views += count
    if part:
        yield part


def stream_pixels(
    dataset: ImageDataset,
    samples: Sequence[Sample],
    rules: PixelRules,
    batch_size: int,
    *,
    view_rules: ViewRules = PLAIN,
    workers: int | str = "auto",
    timer: Timer | None = None,
    isolate: bool = False,
) -> Iterator[tuple[tuple[Outcome, ...], npt.NDArray[np.uint8]]]:
    """Decode samples into batches of constant shape; the next ones are decoded meanwhile.

    An image that has not come back after ``DECODE_SECONDS`` is tried again in a child process.

    Yields:
        The outcomes of up to ``batch_size`` samples, and the pixels of all their views in their
        order, (M, S, S, 3) uint8, zeros where there is no image. M is ``batch_size``, or a multiple
        of it if a single image has more views.
    """
    clock = timer or Timer()
    parts = _batch_samples(dataset, samples, view_rules, batch_size)
    under_way: deque[list[tuple[Sample, Future[_Decoded]]]] = deque()
    with (
        IsolatedDecoder() as child,
        _Threads(1 if isolate else resolve_workers(workers)) as threads,
    ):
        recipe = rules, view_rules
        decoder = child if isolate else None

        def start_batch() -> None:
            part = next(parts, None)
            if part is not None:
                under_way.append(
                    [(s, threads.submit(_decode_sample, dataset, s, recipe, decoder)) for s in part]
                )

        for _ in range(max(_AHEAD, _AHEAD_IMAGES // batch_size)):
            start_batch()
        while under_way:
            batch = under_way.popleft()
            counts = [_count_views(dataset, sample, view_rules) for sample, _ in batch]
            num_slots = -(-max(sum(counts), batch_size) // batch_size) * batch_size
            pixels = np.zeros((num_slots, rules.image_size, rules.image_size, 3), np.uint8)
            outcomes = []
            slot = 0
            with clock("waiting"):
                for (sample, future), count in zip(batch, counts, strict=True):
                    try:
                        # an isolated decoder keeps the time itself
                        outcome, images = future.result(None if isolate else DECODE_SECONDS)
                    except FutureTimeoutError:
                        threads.replace_one()
                        outcome, images = _decode_sample(dataset, sample, recipe, child)
                    outcomes.append(outcome)
                    if images is not None:
                        pixels[slot : slot + count] = images
                    slot += count
            start_batch()
            yield tuple(outcomes), pixels


def _decode_sample(
    dataset: ImageDataset, sample: Sample, recipe: tuple[PixelRules, ViewRules],
    child: IsolatedDecoder | None,
) -> _Decoded:  # fmt: skip
    """Read, hash and decode one image. The seam every decoder stands behind."""
    sha256 = bytes(32)
    rules, view_rules = recipe[0], recipe[1].for_split(sample.split, dataset.splits)
    try:
        data = dataset.read(sample)
        sha256 = hashlib.sha256(data).digest()
        if view_rules == PLAIN:
            image = child.decode(data, rules) if child else decode(data, rules)
            return Outcome(sample, sha256, None, image.truncated), image.pixels[None]
        made = (child.render if child else render)(data, [(rules, view_rules)], sha256)
    except DataError as error:
        return Outcome(sample, sha256, str(error.found), truncated=False), None
    except (OSError, MemoryError) as error:
        reason = printable(error) or type(error).__name__
        return Outcome(sample, sha256, reason, truncated=False), None
    views = made.views[0]
    colour = views if views.ndim == 4 else np.repeat(views[..., None], 3, axis=3)
    return Outcome(sample, sha256, None, made.truncated), colour


class _Threads:
    """A pool of daemon threads: unlike concurrent.futures', one that hangs does not stop exit."""

    def __init__(self, num_threads: int) -> None:
        self._tasks: queue.SimpleQueue[
            tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None
        ]
        self._tasks = queue.SimpleQueue()
        self._num_threads = num_threads
        for _ in range(num_threads):
            self._start()

    def _start(self) -> None:
        threading.Thread(target=self._work, name="featcache-decode", daemon=True).start()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, function, arguments = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(*arguments))
            except BaseException as error:  # noqa: BLE001 (handed to whoever asks for the result)
                future.set_exception(error)

    def submit(self, function: Callable[..., _Decoded], *arguments: Any) -> Future[_Decoded]:
        """Run a function on the next free thread."""
        future: Future[_Decoded] = Future()
        self._tasks.put((future, function, arguments))
        return future

    def replace_one(self) -> None:
        """Start a thread in place of one that hangs (and may yet come back)."""
        self._num_threads += 1
        self._start()

    def __enter__(self) -> _Threads:
        return self

    def __exit__(self, *_: object) -> None:
        while True:  # drop what has not begun, then send everyone home
            try:
                task = self._tasks.get_nowait()
            except queue.Empty:
                break
            if task is not None:
                task[0].cancel()
        for _thread in range(self._num_threads):
            self._tasks.put(None)
