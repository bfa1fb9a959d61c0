"""Samples -> views: threads read, hash and decode images, the next ones while others are in use.

The decoders release the GIL, and nothing is pickled. Each image is decoded once for all the recipes
that want it.
"""

from __future__ import annotations

import functools
import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from featcache.data.dataset import ImageDataset, Sample
from featcache.errors import ConfigError, DataError, TransientError, printable
from featcache.pixels import acceleration
from featcache.pixels.facts import PictureFacts
from featcache.pixels.images import PixelRules
from featcache.pixels.isolation import DECODE_SECONDS, IsolatedDecoder
from featcache.pixels.views import Rendering, ViewRules, render
from featcache.runtime import Timer, available_cores
from featcache.threads import Threads

_AHEAD = 3  # chunks in the making while others are in the network, and at least ...
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


def chunks_ahead(size: int) -> int:
    """Return how many chunks of so many views are in the making at once."""
    return max(_AHEAD, _AHEAD_IMAGES // size)


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

        for _ in range(chunks_ahead(size)):
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
