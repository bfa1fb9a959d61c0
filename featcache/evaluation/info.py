"""What a cache or a run holds, without hashing it.

Reads: a cache or a run folder. Writes: nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from featcache.cache.reading import Cache, CacheSplit, open_cache
from featcache.heads.run import load_run


def describe(path: str | Path) -> dict[str, Any]:
    """Return what a cache or a run holds, as JSON values. Hashes nothing.

    Args:
        path: A cache file, or a run folder.

    Raises:
        CacheError: If the file is not a cache.
        RunError: If the folder is not a run.
    """
    place = Path(path)
    if place.is_dir():
        run = load_run(place)
        return {
            "kind": "run", "path": place.as_posix(), "task": run.task,
            "classes": list(run.classes),
            "head": run.head.as_json(), "training": run.training, "seed": run.seed,
            "data_seed": run.data_seed, "cache": run.cache, "weights_sha256": run.weights_sha256,
            "evaluations": sorted(p.stem for p in place.glob("evaluation/*.json")),
        }  # fmt: skip
    cache = open_cache(place, verify=False)
    return {
        "kind": "cache", "path": place.as_posix(), "verified": False,
        "file_bytes": place.stat().st_size, "fingerprint": cache.fingerprint,
        "content_sha256": cache.content_sha256, "payload_sha256": cache.payload_sha256,
        "identity": cache.identity, "provenance": cache.provenance, "task": cache.task,
        "classes": list(cache.classes),
        "splits": {name: _describe_split(cache, split) for name, split in cache.splits.items()},
        "failures": [asdict(failure) for failure in cache.failures],
    }  # fmt: skip


def _describe_split(cache: Cache, split: CacheSplit) -> dict[str, Any]:
    labels = dict(_count_targets(cache, split))
    groups = split.groups
    return {
        "num_samples": len(split), "features": [*split.features.shape, split.features.dtype.name],
        "num_views": split.num_views, "num_per_class": labels, **_count_known(cache, split),
        "num_groups": None if groups is None else len(set(groups)),
    }  # fmt: skip


def _count_known(cache: Cache, split: CacheSplit) -> dict[str, dict[str, int]]:
    """Return, of several labels an image, how many targets of each class are known."""
    if cache.task != "multilabel":
        return {}
    known = (~np.isnan(split.targets)).sum(axis=0).tolist()
    return {"num_known_per_class": dict(zip(cache.classes, known, strict=True))}


def _count_targets(cache: Cache, split: CacheSplit) -> Iterator[tuple[str, int]]:
    if cache.task == "multilabel":
        for i, name in enumerate(cache.classes):
            yield name, int((split.targets[:, i] == 1).sum())
        return
    counts = Counter(split.targets.tolist())
    for i, name in enumerate(cache.classes):
        yield name, counts.get(i, 0)
    if counts.get(-1):
        yield "unlabelled", counts[-1]
