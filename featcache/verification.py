"""Verify: is this cache whole, and is it true? And describe what a cache or a run holds.

Reads: caches, runs, images. Writes: nothing.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.backbone import Backbone
from featcache.cache import Cache, CacheSplit, is_content, open_cache
from featcache.container import content_sha256
from featcache.dataset import ImageDataset, Sample, scan
from featcache.engine import FLOAT16_STORAGE_ERROR, PARITY_BOUNDS, build_engine, relative_errors
from featcache.errors import CacheError, ConfigError, printable
from featcache.hdf5 import compare_with_hdf5
from featcache.pipeline import Lane, stream_features
from featcache.recipe import Recipe, decode_probes, recipe_from_identity
from featcache.run import load_run
from featcache.runtime import Say, resolve_device, silent

_BLOCK_ROWS = 8192
_REPAIR = "Extract it again: featcache extract DATA CACHE --rebuild"


@dataclass(frozen=True)
class Verification:
    """What was checked, all of it good: anything bad is an error.

    Attributes:
        cache: The file.
        num_rows: Rows of all splits.
        payload_sha256: As recorded and as found.
        content_sha256: As recorded and as found.
        num_compared: Rows whose features were recomputed from their images.
        largest_error: Their largest relative L2 error, None without ``data``.
        bound: What it had to stay under, None without ``data``.
        changed: Paths whose image is another one now.
        vanished: Paths whose image is gone.
        appeared: Paths of images that the cache does not know.
    """

    cache: str
    num_rows: int
    payload_sha256: str
    content_sha256: str
    num_compared: int
    largest_error: float | None
    bound: float | None
    changed: tuple[str, ...]
    vanished: tuple[str, ...]
    appeared: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the verification as JSON values."""
        return asdict(self)


def verify(
    cache: str | Path,
    *,
    data: str | Path | None = None,
    samples: int | str = 32,
    weights: str | Path | None = None,
    backbone: Backbone | str | None = None,
    device: str = "auto",
    say: Say = silent,
) -> Verification:
    """Check that a cache is whole, and with ``data`` that its features are those of the images.

    Whole: lengths, checksums, the table against libhdf5's view (in a child process), finite
    features, sorted paths. True: features of a seeded sample, with all its views, are recomputed
    from the images by the plain network in fp32, and stay within the precision's bound of the
    cached ones.

    Args:
        cache: The file.
        data: The images it was made of.
        samples: Rows to recompute, or ``all``.
        weights: The weights file it was made with, where the library's own were not used.
        backbone: The backbone itself, if it was made in Python; its name, if a ``python:`` function
            makes it.
        device: Where to recompute.
        say: Where lines for people go.

    Raises:
        CacheError: At the first thing that is not right, naming it and the repair.
        BackboneError: If the backbone cannot be built.
    """
    opened = open_cache(cache, verify=True)
    say(f"payload sha256 {opened.payload_sha256}: as recorded")
    _check_whole(opened)
    say("table, HDF5 view, content sha256, finite features, order of paths: good")
    num_rows = sum(len(split) for split in opened.splits.values())
    if data is None:
        return Verification(
            opened.path.as_posix(), num_rows, opened.payload_sha256, opened.content_sha256,
            0, None, None, (), (), (),
        )  # fmt: skip
    recipe = recipe_from_identity(opened.identity, weights=weights, backbone=backbone)
    dataset = scan(data)
    comparison = _compare_names(opened, dataset)
    for word in ("changed", "vanished", "appeared"):
        paths = comparison[word]
        if paths:
            say(f"{word}: {len(paths):,} images, such as {printable(paths[0])}")
    chosen = _choose_rows(comparison["same"], samples)
    if num_rows and not chosen:
        raise CacheError(
            "images of the cache", expected="those it was made of", where=data,
            found=f"none of {num_rows:,} with the same name and size", hint="Check --data",
        )  # fmt: skip
    bound = PARITY_BOUNDS[str(opened.provenance.get("precision", "fp32"))]
    if opened.identity.get("feature_dtype") == "float16":
        bound += FLOAT16_STORAGE_ERROR
    planned = [sample for sample in dataset.samples if (sample.split, sample.path) in chosen]
    errors = list(_recompute(opened, dataset, planned, recipe, device=device, bound=bound))
    largest = max(errors, default=0.0)
    say(f"{len(errors):,} rows recomputed: largest relative error {largest:.1e}, bound {bound:.0e}")
    return Verification(
        opened.path.as_posix(), num_rows, opened.payload_sha256, opened.content_sha256,
        len(errors), largest, bound, tuple(comparison["changed"]),
        tuple(comparison["vanished"]), tuple(comparison["appeared"]),
    )  # fmt: skip


def _recompute(
    cache: Cache, dataset: ImageDataset, planned: list[Sample], recipe: Recipe, *,
    device: str, bound: float,
) -> Iterator[float]:  # fmt: skip
    """Yield the largest relative error of each planned row's views; raise at an untrue one."""
    rows = {(s, p): i for s, split in cache.splits.items() for i, p in enumerate(split.paths)}
    probes = decode_probes(dataset, planned, recipe.rules)
    engine = build_engine(recipe.backbone, resolve_device(device), probes, name="eager")
    for batch in stream_features(dataset, planned, [Lane(recipe, engine)]):
        for outcome, features in zip(batch.outcomes, batch.features[0], strict=True):
            sample = outcome.sample
            if features is None:
                raise _untrue(cache, sample, "a readable image", str(outcome.reason))
            split, i = cache.splits[sample.split], rows[sample.split, sample.path]
            if split.image_sha256[i].tobytes() != outcome.sha256:
                raise _untrue(cache, sample, "the image it was made of", "another one")
            if len(features) != split.num_views:
                raise _untrue(cache, sample, f"{len(features)} views", str(split.num_views))
            cached = split.features[i].astype(np.float32).reshape(features.shape)
            errors = relative_errors(cached, features)
            error, view = max((error, view) for view, error in enumerate(errors))
            if error > bound:
                found = f"an error of {error:.1e}" + (f" in view {view}" if view else "")
                raise _untrue(cache, sample, f"features within {bound:.0e}", found)
            yield error


def _untrue(cache: Cache, sample: Sample, expected: str, found: str) -> CacheError:
    where = f"{sample.split}: {sample.path}"
    return CacheError(
        f"row of {cache.path.name}", expected=expected, found=found, where=where, hint=_REPAIR
    )


def _check_whole(cache: Cache) -> None:
    """Check what opening does not: HDF5's view, the content hash, values and order."""

    def wrong(what: str, expected: object, found: object) -> CacheError:
        return CacheError(what, expected=expected, found=found, where=cache.path, hint=_REPAIR)

    differences = compare_with_hdf5(cache.container)
    if differences:
        raise wrong("HDF5 view of the cache", "what the table says", differences[0])
    digests = {
        name: (entry.dtype, entry.shape, _array_sha256(cache, name))
        for name, entry in cache.container.arrays.items()
        if is_content(name)
    }
    if content_sha256(digests) != cache.content_sha256:
        raise wrong("content sha256", cache.content_sha256, content_sha256(digests))
    for name, split in cache.splits.items():
        for start in range(0, len(split), _BLOCK_ROWS):
            block = split.features[start : start + _BLOCK_ROWS]
            finite = np.isfinite(block.reshape(len(block), -1)).all(axis=1)
            if not finite.all():
                row = start + int(np.flatnonzero(~finite)[0])
                place = f"row {row}, {printable(split.paths[row])}"
                raise wrong(f"features of {name}", "finite values", f"NaN or infinity in {place}")
        stored = cache.container.map(f"splits/{name}/paths").tolist()
        if stored != sorted(set(stored)):
            raise wrong(f"paths of {name}", "each once, sorted by their bytes", "another order")


def _array_sha256(cache: Cache, name: str) -> str:
    array = cache.container.map(name)
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def _compare_names(cache: Cache, dataset: ImageDataset) -> dict[str, Any]:
    """Compare the cache's images with those on the disk by name, size and time."""
    now = {(s.split, s.path): (s.image_bytes, s.mtime_ns) for s in dataset.samples}
    failed = {(f.split, f.path) for f in cache.failures}
    then = {
        (name, path): (int(split.image_bytes[i]), int(split.mtime_ns[i]))
        for name, split in cache.splits.items()
        for i, path in enumerate(split.paths)
    }
    # The same bytes may have another time (a copy); those of another size are another image.
    same = sorted(key for key in then.keys() & now.keys() if then[key][0] == now[key][0])
    return {
        "same": same,
        "changed": sorted(p for s, p in (then.keys() & now.keys()) - set(same)),
        "vanished": sorted(p for s, p in then.keys() - now.keys()),
        "appeared": sorted(p for s, p in now.keys() - then.keys() - failed),
    }


def _choose_rows(same: list[tuple[str, str]], samples: int | str) -> set[tuple[str, str]]:
    if samples == "all":
        return set(same)
    if not isinstance(samples, int) or samples < 1:
        raise ConfigError("--samples", expected="all, or a number from 1", found=samples)
    return set(random.Random(0).sample(same, min(samples, len(same))))


# ------------------------------------------------------------------------------------------- info


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
            "kind": "run", "path": place.as_posix(), "classes": list(run.classes),
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
        "num_views": split.num_views, "num_per_class": labels,
        "num_groups": None if groups is None else len(set(groups)),
    }  # fmt: skip


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
