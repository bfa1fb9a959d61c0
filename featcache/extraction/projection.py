"""Project what an extraction will take, by decoding a sample and running one batch."""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from featcache.backbones.engine import build_engine
from featcache.data.dataset import ImageDataset
from featcache.extraction.pipeline import stream_views
from featcache.extraction.recipe import Recipe, decode_probes, sample_depths
from featcache.pixels.views import training_split

_NUM_DECODED = 64
_ROW_OVERHEAD_BYTES = 160  # path, hash, size, time, target


@dataclass(frozen=True)
class Projection:
    """What an extraction is expected to take on this machine.

    Attributes:
        splits: Per split, images per class.
        classes: Class names.
        num_images: All of them.
        num_groups: Different groups, None without groups.
        num_ignored: Reason -> number of files that are not taken.
        identity: What the cache's identity will be.
        engine: The engine chosen, and why.
        decode_seconds: Expected time of decoding alone, an image, all workers together.
        forward_seconds: Expected time of the network alone, an image.
        deepest: Largest value in a sample of images of more than 8 bits, None if there are none.
        num_decoded: Images decoded for this projection.
        failures: (path, reason) among them.
        images_per_second: Expected rate.
        seconds: Expected time for all images.
        cache_bytes: Size of the cache.
        working_bytes: Disk needed while working: shards and cache together.
    """

    splits: dict[str, dict[str, int]]
    classes: tuple[str, ...]
    num_images: int
    num_groups: int | None
    num_ignored: dict[str, int]
    identity: dict[str, Any]
    engine: str
    decode_seconds: float
    forward_seconds: float
    deepest: int | None
    num_decoded: int
    failures: tuple[tuple[str, str], ...]
    images_per_second: float
    seconds: float
    cache_bytes: int
    working_bytes: int

    def as_json(self) -> dict[str, Any]:
        """Return the projection as JSON values."""
        return asdict(self)


def project(
    dataset: ImageDataset,
    recipe: Recipe,
    device: torch.device,
    *,
    precision: str = "fp32",
    engine: str = "auto",
    batch_size: int | str = "auto",
    workers: int | str = "auto",
) -> Projection:
    """Decode a seeded sample, run one batch, and scale up.

    Raises:
        FeatcacheError: As an extraction with these options would at its start.
    """
    num_images = len(dataset.samples)
    chosen = random.Random(0).sample(dataset.samples, min(_NUM_DECODED, num_images))
    probes = decode_probes(dataset, chosen, recipe.rules)
    num_train = len(dataset.split(training_split(dataset.splits) or ""))
    num_views = num_images + (recipe.view_rules.num_views - 1) * num_train
    built = build_engine(
        recipe.backbone, device, probes, precision=precision, batch_size=batch_size, name=engine,
        num_images=num_images,
    )  # fmt: skip
    start = time.perf_counter()
    decoded = stream_views(dataset, chosen, [recipe], 1, workers=workers)
    outcomes = [outcome for part, _ in decoded for outcome in part]
    decode_seconds = (time.perf_counter() - start) / max(1, len(outcomes))
    side = recipe.rules.image_size
    images = np.zeros((built.batch_size * built.concurrency, side, side, 3), np.uint8)
    built.run(images)  # the first pass allocates
    start = time.perf_counter()
    built.run(images)
    forward_seconds = (time.perf_counter() - start) / len(images) * num_views / num_images
    # On a CPU both share the cores; a GPU computes while the CPU decodes.
    both = decode_seconds, forward_seconds
    per_image = sum(both) if device.type == "cpu" else max(both)
    row_bytes = recipe.backbone.num_features * np.dtype(recipe.feature_dtype).itemsize
    feature_bytes = num_views * row_bytes
    cache_bytes = feature_bytes + num_images * _ROW_OVERHEAD_BYTES + 4096
    groups = {sample.group for sample in dataset.samples}
    return Projection(
        splits=dataset.count(),
        classes=dataset.classes,
        num_images=num_images,
        num_groups=None if None in groups else len(groups),
        num_ignored=dict(dataset.num_ignored),
        identity=recipe.identity,
        engine=f"{built.name} ({built.reason})",
        decode_seconds=round(decode_seconds, 5),
        forward_seconds=round(forward_seconds, 5),
        deepest=max(sample_depths(dataset), default=None),
        num_decoded=len(outcomes),
        failures=tuple((o.sample.path, o.reason) for o in outcomes if o.reason is not None),
        images_per_second=round(1 / per_image, 2),
        seconds=round(num_images * per_image, 1),
        cache_bytes=cache_bytes,
        working_bytes=cache_bytes + feature_bytes,
    )
