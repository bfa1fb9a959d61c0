"""Samples -> views -> batches -> features: the one path of extraction, verification, prediction.

Threads decode images (module ``view_stream``); others run the network over what is decoded; the
consumer writes what came out meanwhile. torch and ONNX Runtime release the GIL.

Memory: what is decoded and not yet consumed, at most ``images_under_way`` images' views, and one
file with its decoded picture a decoding thread. It does not grow with the number of images.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featcache.backbones.engine import Engine
from featcache.data.dataset import ImageDataset, Sample
from featcache.extraction.recipe import Recipe
from featcache.extraction.view_stream import Outcome, Views, chunks_ahead, stream_views
from featcache.runtime import Timer
from featcache.threads import Threads

_KNOWN_BYTES = 1 << 25  # of features of images that are stored twice: 6,500 times 1,280 floats


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
class FeatureBatch:
    """The outcomes of some images, in their order, and their features.

    Attributes:
        outcomes: One per image.
        features: Per lane, per outcome: (V, D) float32, or None where the image failed or the lane
            did not claim it.
    """

    outcomes: tuple[Outcome, ...]
    features: tuple[tuple[npt.NDArray[np.float32] | None, ...], ...]


def chunk_size(lanes: Sequence[Lane]) -> int:
    """Return how many views travel together: as many as the largest lane's batch holds."""
    return max(lane.engine.batch_size for lane in lanes)


def images_under_way(lanes: Sequence[Lane]) -> int:
    """Return the most images that have been read but not yet given to the consumer."""
    size = chunk_size(lanes)
    return size * (chunks_ahead(size) + 2 * _concurrency(lanes) + 1)


def vectors_under_way(lanes: Sequence[Lane]) -> int:
    """Return the most vectors of a lane that are run, or are being run, and nobody has taken."""
    largest = max(chunk_size(lanes), *(lane.recipe.view_rules.num_views for lane in lanes))
    return largest * (2 * _concurrency(lanes) + 1)  # so many chunks before the first is taken


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
