"""Compare a cache with its images: by name, by content, and by features computed again.

Reads: caches, images. Writes: nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featcache.backbones.backbone import Backbone
from featcache.backbones.engine import build_engine
from featcache.cache.integrity import BadRow
from featcache.cache.precisions import UNKNOWN, error_bound, error_bounds, row_precisions
from featcache.cache.provenance import listing_of
from featcache.cache.reading import Cache
from featcache.data.dataset import ImageDataset, Sample, scan
from featcache.data.hashing import hash_images
from featcache.data.sources import Data, listing_for, named
from featcache.errors import CacheError, ConfigError, printable
from featcache.extraction.earlier import refuse_dark_colour, refuse_misread
from featcache.extraction.identifiers import as_listed
from featcache.extraction.pipeline import Lane, stream_features
from featcache.extraction.recipe import Recipe, decode_probes, recipe_from_identity
from featcache.extraction.update import label_of_row
from featcache.extraction.view_stream import Outcome, resolve_workers
from featcache.formatting import count
from featcache.precision import format_bound, relative_errors
from featcache.runtime import Say, resolve_device

_LINES_SAID = 20

_Key = tuple[str, str]
"""Split and path."""

_Rows = Mapping[_Key, int]
"""Number of each row in its split."""


@dataclass(frozen=True)
class Comparison:
    """How a cache compares with images.

    Attributes:
        bad_rows: Rows whose image changed, and rows whose features differ, in the order of the
            cache.
        changed: Paths of rows whose image changed.
        vanished: Paths whose image is gone; their rows cannot be judged.
        appeared: Paths of images that the cache does not know.
        relabelled: Paths of images of another class than the cache says; extracting again mends it.
        num_compared: Rows whose features were recomputed.
        largest_error: The largest relative L2 error among those of unchanged images.
        bound: What every row has to stay under; rows of a smaller bound are judged by theirs.
    """

    bad_rows: tuple[BadRow, ...]
    changed: tuple[str, ...]
    vanished: tuple[str, ...]
    appeared: tuple[str, ...]
    relabelled: tuple[str, ...]
    num_compared: int
    largest_error: float
    bound: float


def compare(
    cache: Cache, data: Data, *, samples: int | str, weights: str | Path | None,
    backbone: Backbone | str | None, device: str, max_pixels: int, say: Say,
    group_salt: str | Path | None = None,
) -> Comparison:  # fmt: skip
    """Compare a cache with the images it was made of.

    Args:
        cache: An open cache.
        data: The images.
        samples: How many rows to recompute, by the plain network in fp32, or ``all``.
        weights: The backbone's weights file, where the library's own were not used.
        backbone: The backbone itself, or its name, as for ``recipe.recipe_from_identity``.
        device: Where to recompute.
        max_pixels: Images of more pixels count as not true.
        say: Where lines for people go.
        group_salt: The salt of hashed paths, where it does not lie beside the cache.

    Raises:
        CacheError: If ``data`` has none of the images.
        BackboneError: If the backbone cannot be built.
    """
    bound = error_bound(cache)
    recipe = recipe_from_identity(
        cache.identity, weights=weights, backbone=backbone, max_pixels=max_pixels,
        source=cache.provenance.get("weights_source"),
    )  # fmt: skip
    dataset, now, rows = find_images(cache, data, group_salt)
    refuse_misread(cache, dataset)
    refuse_dark_colour(recipe, dataset, cache.path)
    common = rows.keys() & now.keys()
    changed = _compare_sizes(cache, rows, [now[key] for key in common])
    # The same size may be the same image: times differ between copies, so only content decides.
    same = sorted(common - {(bad.split, bad.path) for bad in changed})
    chosen = _choose_rows(same, samples)
    touched = [
        now[key] for key in same
        if key not in chosen and cache.splits[key[0]].mtime_ns[rows[key]] != now[key].mtime_ns
    ]  # fmt: skip
    changed += _compare_contents(cache, rows, dataset, dataset.in_reading_order(touched))
    planned = dataset.in_reading_order(sample for key, sample in now.items() if key in chosen)
    also_changed, differing, errors = _compare_features(
        cache, rows, _recompute(dataset, planned, recipe, device)
    )
    changed += also_changed
    order = {split: number for number, split in enumerate(cache.splits)}
    failed = {(f.split, f.path): f.image_bytes for f in cache.failures}
    comparison = Comparison(
        bad_rows=tuple(sorted(changed + differing, key=lambda bad: (order[bad.split], bad.row))),
        changed=tuple(sorted(bad.path for bad in changed)),
        vanished=tuple(sorted(path for _, path in rows.keys() - now.keys())),
        appeared=tuple(sorted(
            key[1] for key in now.keys() - rows.keys() if failed.get(key) != now[key].image_bytes
        )),
        relabelled=tuple(
            key[1] for key in sorted(common)
            if label_of_row(cache, cache.splits[key[0]].targets[rows[key]])
            != dataset.label_of(now[key])
        ),
        num_compared=len(errors), largest_error=max(errors, default=0.0), bound=bound,
    )  # fmt: skip
    _say_comparison(comparison, say)
    return comparison


def find_images(
    cache: Cache, data: Data, group_salt: str | Path | None = None
) -> tuple[ImageDataset, dict[_Key, Sample], dict[_Key, int]]:
    """List the images that a cache was made of, as ``extract`` listed them.

    Returns:
        The data set, its samples by split and path, and by split and path the number of each row
        of the cache in its split.

    Raises:
        CacheError: If ``data`` has none of the images, or the salt of hashed paths is not there.
    """
    listing = listing_for(data, listing_of(cache))
    dataset = scan(data, **(listing.as_json() | {"companions": "ignore"}))
    dataset = as_listed(dataset, cache, group_salt)
    now = {(s.split, s.path): s for s in dataset.samples}
    rows = {(s, p): i for s, split in cache.splits.items() for i, p in enumerate(split.paths)}
    if rows and not rows.keys() & now.keys():
        raise CacheError(
            "images of the cache", expected="those it was made of", where=named(data),
            found=f"none of {len(rows):,} with the same name", hint="Check --data",
        )  # fmt: skip
    return dataset, now, rows


def _compare_sizes(cache: Cache, rows: _Rows, samples: Iterable[Sample]) -> list[BadRow]:
    """Return the rows whose image has another size now."""
    return [
        _changed_row(rows, sample, f"one of {sample.image_bytes:,} bytes")
        for sample in samples
        if cache.splits[sample.split].image_bytes[rows[sample.split, sample.path]]
        != sample.image_bytes
    ]


def _compare_contents(
    cache: Cache, rows: _Rows, dataset: ImageDataset, samples: list[Sample]
) -> list[BadRow]:
    """Return the rows whose image has another sha256 now, or cannot be read."""
    return [
        _changed_row(rows, sample, "an unreadable one" if sha256 is None else "another one")
        for sample, sha256 in zip(
            samples, hash_images(dataset, samples, resolve_workers("auto")), strict=True
        )
        if sha256 != _recorded_sha256(cache, rows, sample)
    ]


def _compare_features(
    cache: Cache,
    rows: _Rows,
    recomputed: Iterable[tuple[Outcome, npt.NDArray[np.float32] | None]],
) -> tuple[list[BadRow], list[BadRow], list[float]]:
    """Return the rows whose image changed, those whose features differ, and all errors."""
    bounds, precisions = error_bounds(cache), row_precisions(cache)
    changed, differing, errors = list[BadRow](), list[BadRow](), list[float]()
    for outcome, features in recomputed:
        sample = outcome.sample
        if outcome.reason is not None:
            changed.append(_changed_row(rows, sample, f"an unreadable one, {outcome.reason}"))
        elif outcome.sha256 != _recorded_sha256(cache, rows, sample):
            changed.append(_changed_row(rows, sample, "another one"))
        else:
            row = rows[sample.split, sample.path]
            bound = float(bounds[sample.split][row])
            error, found = _measure(cache, row, sample.split, features, bound)
            errors.append(error)
            if found is not None:
                is_known = precisions[sample.split][row] != UNKNOWN
                judged = "" if is_known else ", as at fp32, since nobody knows their precision"
                expected = f"features within {format_bound(bound)}{judged}"
                differing.append(BadRow(sample.split, row, sample.path, expected, found))
    return changed, differing, errors


def _changed_row(rows: _Rows, sample: Sample, found: str) -> BadRow:
    row = rows[sample.split, sample.path]
    return BadRow(sample.split, row, sample.path, "the image it was made of", found)


def _recorded_sha256(cache: Cache, rows: _Rows, sample: Sample) -> bytes:
    row = rows[sample.split, sample.path]
    sha256: bytes = cache.splits[sample.split].image_sha256[row].tobytes()
    return sha256


def _choose_rows(same: list[_Key], samples: int | str) -> set[_Key]:
    if samples == "all":
        return set(same)
    if not isinstance(samples, int) or samples < 1:
        raise ConfigError("--samples", expected="all, or a number from 1", found=samples)
    return set(random.Random(0).sample(same, min(samples, len(same))))


def _recompute(
    dataset: ImageDataset, planned: list[Sample], recipe: Recipe, device: str
) -> Iterator[tuple[Outcome, npt.NDArray[np.float32] | None]]:
    """Yield what became of each planned image, and its features (V, D)."""
    if not planned:
        return
    probes = decode_probes(dataset, planned, recipe.rules)
    engine = build_engine(recipe.backbone, resolve_device(device).torch(), probes, name="eager")
    for batch in stream_features(dataset, planned, [Lane(recipe, engine)]):
        yield from zip(batch.outcomes, batch.features[0], strict=True)


def _measure(
    cache: Cache, row: int, split_name: str, features: npt.NDArray[np.float32] | None, bound: float
) -> tuple[float, str | None]:
    """Return the largest error of a row's views, and what to say of it beyond the bound."""
    assert features is not None
    split = cache.splits[split_name]
    if len(features) != split.num_views:
        raise CacheError(
            f"views of {split_name}", expected=f"{len(features)} views", found=split.num_views,
            where=cache.path, hint="Extract it again: featcache extract DATA CACHE --rebuild",
        )  # fmt: skip
    stored = split.read_rows(np.array([row]), split.num_views)
    cached = stored.astype(np.float32).reshape(features.shape)
    errors = relative_errors(cached, features)
    error, view = max((error, view) for view, error in enumerate(errors))
    found = f"an error of {error:.1e}" + (f" in view {view}" if view else "")
    return error, None if error <= bound else found


def _say_comparison(comparison: Comparison, say: Say) -> None:
    for word in ("changed", "vanished", "appeared", "relabelled"):
        paths = getattr(comparison, word)
        for path in paths[:_LINES_SAID]:
            say(f"{word}: {printable(path)}")
        if len(paths) > _LINES_SAID:
            say(f"{word}: and {len(paths) - _LINES_SAID:,} more")
    say(
        f"{count(comparison.num_compared, 'row')} recomputed: largest relative error "
        f"{comparison.largest_error:.1e}, bound {format_bound(comparison.bound)}"
    )
