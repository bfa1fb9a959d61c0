"""Samples -> views -> batches -> features: the one path of extraction, verification, prediction.

Threads read, hash and decode images; others run the network over what is decoded; the consumer
writes what came out meanwhile. Pillow, torch and ONNX Runtime release the GIL, and nothing is
pickled. Each image is decoded once for all the recipes that want it.

Memory: what is decoded and not yet consumed, at most ``images_under_way`` images' views, and one
file with its decoded picture a decoding thread. It does not grow with the number of images.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from featcache.backbones.engine import Engine
from featcache.data.dataset import ImageDataset, Sample
from featcache.errors import ConfigError, DataError, TransientError, printable
from featcache.extraction.recipe import Recipe
from featcache.pixels import acceleration
from featcache.pixels.facts import PictureFacts
from featcache.pixels.images import PixelRules
from featcache.pixels.isolation import DECODE_SECONDS, IsolatedDecoder
from featcache.pixels.views import Rendering, ViewRules, render
from featcache.runtime import Timer, available_cores
from featcache.threads import Threads

_AHEAD = 3  # chunks in the making while others are in the network, and at least ...
_KNOWN_BYTES = 1 << 25  # of features of images that are stored twice: 6,500 times 1,280 floats
_AHEAD_IMAGES = 32  # ... so many images, or one large file stops the small batches of a CPU

Views = tuple[npt.NDArray[np.uint8], ...]
"""Of one image: per recipe, (V, S, S) or (V, S, S, 3) uint8."""
_Render = Callable[[bytes, Sequence[tuple[PixelRules, ViewRules]], bytes], Rendering]


class PixelRecipe(Protocol):
    """What ``stream_views`` needs of a recipe."""

    @property
    def rules(self) -> PixelRules:
        """How bytes become pixels."""

    @property
    def view_rules(self) -> ViewRules:
        """Which views are made of images to train on."""


def _claim_all(position: int, sha256: bytes) -> bool:
    return True


@dataclass(frozen=True)
class Lane:
    """One recipe, whose features are to be made of the images.

    Attributes:
        recipe: What its features are made by.
        engine: The forward pass.
        claim: Asked in the decoding threads, by position of an image and sha256 of its bytes,
            whether its features are to be made: known content is neither decoded nor run.
    """

    recipe: Recipe
    engine: Engine
    claim: Callable[[int, bytes], bool] = _claim_all


@dataclass(frozen=True)
class Outcome:
    """What became of one image.

    Attributes:
        position: Of the image among the samples.
        sample: The image.
        sha256: Of the file's bytes; 32 zero bytes if it could not be read.
        reason: Why it failed, or None.
        truncated: It was cut off and has been filled in.
        claims: Per lane. Whether this lane took the image; then ``features`` or ``reason`` is set.
        is_transient: The reason says nothing of other images of the same content.
        facts: Of the picture, where they were asked for.
    """

    position: int
    sample: Sample
    sha256: bytes
    reason: str | None
    truncated: bool
    claims: tuple[bool, ...] = ()
    is_transient: bool = False
    facts: PictureFacts | None = None


@dataclass(frozen=True)
class FeatureBatch:
    """The outcomes of some images, in their order, and their features.

    Attributes:
        outcomes: One per image.
        features: Per lane, per outcome: (V, D) float32, or None where the image failed or the lane
            did not claim it.
    """

    outcomes: tuple[Outcome, ...]
    features: tuple[tuple[npt.NDArray[np.float32] | None, ...], ...]


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


def chunk_size(lanes: Sequence[Lane]) -> int:
    """Return how many views travel together: as many as the largest lane's batch holds."""
    return max(lane.engine.batch_size for lane in lanes)


def images_under_way(lanes: Sequence[Lane]) -> int:
    """Return the most images that have been read but not yet given to the consumer."""
    size = chunk_size(lanes)
    return size * (_num_ahead(size) + 2 * _concurrency(lanes) + 1)


def vectors_under_way(lanes: Sequence[Lane]) -> int:
    """Return the most vectors of a lane that are run, or are being run, and nobody has taken."""
    largest = max(chunk_size(lanes), *(lane.recipe.view_rules.num_views for lane in lanes))
    return largest * (2 * _concurrency(lanes) + 1)  # so many chunks before the first is taken


def _num_ahead(size: int) -> int:
    return max(_AHEAD, _AHEAD_IMAGES // size)


def _concurrency(lanes: Sequence[Lane]) -> int:
    return max(lane.engine.concurrency for lane in lanes)


def stream_features(
    dataset: ImageDataset,
    samples: Sequence[Sample],
    lanes: Sequence[Lane],
    *,
    positions: Sequence[int] | None = None,
    workers: int | str = "auto",
    timer: Timer | None = None,
    isolate: bool = False,
) -> Iterator[FeatureBatch]:
    """Run samples through the engines of all lanes, chunk by chunk, in their order.

    Args:
        dataset: Where the samples are read from.
        samples: The images.
        lanes: What features to make of them.
        positions: Which of the samples to run, in this order. Default: all.
        workers: Decoding threads, or ``auto``.
        timer: Adds up the threads' seconds of ``decode`` and ``forward``, and the seconds that the
            consumer had to wait for either.
        isolate: Decode in a child process, image by image: slower, and survives any image.
    """
    clock = timer or Timer()
    concurrency = _concurrency(lanes)
    under_way: deque[Future[FeatureBatch]] = deque()

    run = tuple(_Forward(lane.engine, dataset.copies) for lane in lanes)

    def claim(position: int, sha256: bytes) -> tuple[bool, ...]:
        return tuple(lane.claim(position, sha256) for lane in lanes)

    decoded = stream_views(
        dataset, samples, [lane.recipe for lane in lanes], chunk_size(lanes), positions=positions,
        workers=workers, timer=clock, isolate=isolate, claim=claim,
    )  # fmt: skip
    with contextlib.closing(decoded), Threads("forward", concurrency, wait=True) as threads:
        for outcomes, views in decoded:
            under_way.append(threads.submit(_forward_chunk, run, outcomes, views, clock))
            if len(under_way) > 2 * concurrency:
                yield _wait_for(under_way.popleft(), clock)
        while under_way:
            yield _wait_for(under_way.popleft(), clock)


def _wait_for(future: Future[FeatureBatch], clock: Timer) -> FeatureBatch:
    with clock("waiting for forward"):
        return future.result()


def find_bottleneck(seconds: Mapping[str, float]) -> str:
    """Return the stage that the others wait for: ``decode``, ``forward`` or ``write``."""
    waits = {
        "decode": seconds.get("waiting for decode", 0.0),
        "forward": seconds.get("waiting for forward", 0.0),
        "write": seconds.get("write", 0.0),
    }
    return max(waits, key=lambda stage: waits[stage])


class _Forward:
    """Runs an engine over images; of equal pixels in two files of ``copies``, over one of them."""

    def __init__(self, engine: Engine, copies: frozenset[str]) -> None:
        self._engine, self._copies = engine, copies
        self._known: dict[bytes | int, npt.NDArray[np.float32]] = {}
        self._room = _KNOWN_BYTES

    def __call__(
        self, paths: Sequence[str], images: Sequence[npt.NDArray[np.uint8] | None]
    ) -> tuple[npt.NDArray[np.float32] | None, ...]:
        """Return the features (V, D) of images (V, ...); None of None."""
        keys: list[bytes | int] = [
            i if image is None or path not in self._copies
            else hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).digest()
            for i, (path, image) in enumerate(zip(paths, images, strict=True))
        ]  # fmt: skip
        made = {key: self._known[key] for key in keys if key in self._known}
        pairs = zip(keys, images, strict=True)
        wanted = {key: image for key, image in pairs if image is not None and key not in made}
        views = [view for image in wanted.values() for view in image]
        rows = iter(self._engine.run_here(views)) if views else iter(())
        for key, image in wanted.items():
            made[key] = np.stack([next(rows) for _ in image])
            if isinstance(key, bytes) and self._room >= made[key].nbytes:
                self._known[key], self._room = made[key], self._room - made[key].nbytes
        return tuple(made.get(key) for key in keys)


def _forward_chunk(
    run: Sequence[_Forward],
    outcomes: Sequence[Outcome],
    views: Sequence[Views | None],
    clock: Timer,
) -> FeatureBatch:
    """Run a chunk through every lane's engine in this thread."""
    features, paths = [], [outcome.sample.path for outcome in outcomes]
    with clock("forward"):
        for number, forward in enumerate(run):
            wanted = [
                of_image[number] if of_image is not None and outcome.claims[number] else None
                for outcome, of_image in zip(outcomes, views, strict=True)
            ]
            features.append(forward(paths, wanted))
    return FeatureBatch(tuple(outcomes), tuple(features))


def stream_views(
    dataset: ImageDataset,
    samples: Sequence[Sample],
    recipes: Sequence[PixelRecipe],
    size: int,
    *,
    positions: Sequence[int] | None = None,
    workers: int | str = "auto",
    timer: Timer | None = None,
    isolate: bool = False,
    claim: Callable[[int, bytes], tuple[bool, ...]] | None = None,
    with_facts: bool = False,
) -> Generator[tuple[tuple[Outcome, ...], tuple[Views | None, ...]], None, None]:
    """Decode samples, ``size`` views at a time; the next ones are decoded meanwhile.

    Arguments are those of ``stream_features``. An image that has not come back after
    ``DECODE_SECONDS`` is tried again in a child process. One that ``claim`` says nobody claims is
    read and hashed, and not decoded. ``with_facts`` has each picture measured too.

    Yields:
        The outcomes of the samples that have up to ``size`` views for any recipe, one at least, and
        per outcome its views by recipe, None where it failed or was not claimed.
    """
    clock = timer or Timer()
    order = range(len(samples)) if positions is None else positions
    acceleration.start_for(sum(samples[position].image_bytes for position in order))
    under_way: deque[list[tuple[int, Future[_Decoded]]]] = deque()
    job = _Job(dataset, samples, recipes, clock, claim or (lambda *_: (True,) * len(recipes)))
    chunks = _cut(order, job, size)
    with (
        IsolatedDecoder() as child,
        Threads("decode", 1 if isolate else resolve_workers(workers)) as threads,
    ):
        here: _Render = render
        in_child: _Render = child.render
        if with_facts:
            here, in_child = (functools.partial(r, with_facts=True) for r in (render, child.render))
        renderer = in_child if isolate else here

        def start_chunk() -> None:
            if part := next(chunks, None):
                under_way.append([(p, threads.submit(job.decode, p, renderer)) for p in part])

        for _ in range(_num_ahead(size)):
            start_chunk()
        while under_way:
            decoded = []
            with clock("waiting for decode"):
                for position, future in under_way.popleft():
                    try:
                        # an isolated decoder keeps the time itself
                        decoded.append(future.result(None if isolate else DECODE_SECONDS))
                    except FutureTimeoutError:
                        threads.replace_one()
                        outcome, of_image = job.decode(position, in_child)
                        # twice is no accident: each of its copies would hang too
                        decoded.append((replace(outcome, is_transient=False), of_image))
            start_chunk()
            outcomes, views = zip(*decoded, strict=True)
            yield outcomes, views


def hash_images(
    dataset: ImageDataset, samples: Sequence[Sample], workers: int | str = "auto"
) -> Iterator[bytes | None]:
    """Yield the sha256 of every image, in order; None where it cannot be read."""

    def digest(sample: Sample) -> bytes | None:
        try:
            return hashlib.sha256(dataset.read(sample)).digest()
        except (DataError, OSError, MemoryError):
            return None  # whoever decodes it will say why

    under_way: deque[Future[bytes | None]] = deque()
    with Threads("hash", resolve_workers(workers)) as threads:
        for sample in samples:
            under_way.append(threads.submit(digest, sample))
            if len(under_way) > _AHEAD_IMAGES:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def _cut(order: Sequence[int], job: _Job, size: int) -> Iterator[list[int]]:
    """Yield as many positions as have ``size`` views together, one at least."""
    part: list[int] = []
    num_views = 0
    for position in order:
        count = job.plan_of(job.samples[position].split).num_views
        if part and num_views + count > size:
            yield part
            part, num_views = [], 0
        part.append(position)
        num_views += count
    if part:
        yield part


_Decoded = tuple[Outcome, Views | None]


class _Plan(NamedTuple):
    """What the recipes want to see of an image; those that want the same views share them.

    Args:
        different: Pixel and view rules, once each.
        of_recipes: Of each recipe, which of these are its own.
        num_views: The most that one wants.
    """

    different: list[tuple[PixelRules, ViewRules]]
    of_recipes: list[int]
    num_views: int


class _Job:
    """What the decoding threads need to know."""

    def __init__(
        self, dataset: ImageDataset, samples: Sequence[Sample], recipes: Sequence[PixelRecipe],
        clock: Timer, claim: Callable[[int, bytes], tuple[bool, ...]],
    ) -> None:  # fmt: skip
        self.samples = samples
        self._dataset, self._recipes, self._clock, self._claim = dataset, recipes, clock, claim
        self._plans: dict[str, _Plan] = {}

    def plan_of(self, split: str) -> _Plan:
        """Return what the recipes want to see of the images of a split."""
        if split not in self._plans:
            splits = self._dataset.splits
            plans = [(r.rules, r.view_rules.for_split(split, splits)) for r in self._recipes]
            different = list(dict.fromkeys(plans))
            most = max(views.num_views for _, views in plans)
            self._plans[split] = _Plan(different, [different.index(plan) for plan in plans], most)
        return self._plans[split]

    def decode(self, position: int, renderer: _Render) -> _Decoded:
        """Read, hash and decode one image. The seam every decoder stands behind."""
        sample, sha256 = self.samples[position], bytes(32)
        claims = (True,) * len(self._recipes)  # whoever wants it, if it cannot be read
        plan = self.plan_of(sample.split)

        def without_views(reason: str | None, *, is_transient: bool = False) -> _Decoded:
            return Outcome(
                position, sample, sha256, reason, truncated=False, claims=claims,
                is_transient=is_transient,
            ), None  # fmt: skip

        try:
            with self._clock("decode"):
                data = self._dataset.read(sample)
                sha256 = hashlib.sha256(data).digest()
                claims = self._claim(position, sha256)
                if not any(claims):
                    return without_views(None)
                rendering = renderer(data, plan.different, sha256)
        except DataError as error:
            return without_views(str(error.found), is_transient=isinstance(error, TransientError))
        except (OSError, MemoryError) as error:
            return without_views(printable(error) or type(error).__name__, is_transient=True)
        cut, facts = rendering.truncated, rendering.facts
        views = tuple(rendering.views[number] for number in plan.of_recipes)
        return Outcome(position, sample, sha256, None, cut, claims, facts=facts), views
