"""Neighbours: the rows of a cache that are nearest to an image, by the cosine of their features.

Reads: a cache, an image. Writes: nothing.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featcache.cache.by_url import by_url
from featcache.cache.cache_split import CacheSplit
from featcache.cache.reading import Cache, open_cache
from featcache.data.remote import url_of
from featcache.errors import CacheError, ConfigError, DataError, printable
from featcache.files import local_path, result_as_dict
from featcache.formatting import brief_repr
from featcache.runtime import Say, log_line
from featcache.untrusted import MAX_PIXELS, why_no_file

if TYPE_CHECKING:
    from featcache.backbones.backbone import Backbone

_BLOCK_BYTES = 32 << 20  # of rows in float64


@dataclass(frozen=True)
class Neighbours:
    """The rows of a cache nearest to an image, the nearest first.

    Attributes:
        cache: The file.
        query: The image: a path of the cache, or a file.
        is_row: Whether it is a row of the cache; that row is then left out.
        num_rows: Rows that it was compared with.
        rows: Each with ``path``; ``split``; ``target``, the name of its class (of several labels
            the list of those it has; None where unlabelled); ``group``, None without; ``cosine``;
            ``distance``, 1 less the cosine; ``is_same_image``, by the sha256 of the files, None
            where either is not known.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    cache: Path
    query: str
    is_row: bool
    num_rows: int
    rows: tuple[dict[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the neighbours as JSON values."""
        return result_as_dict(self)


@by_url("cache")
def neighbours(
    cache: str | Path, image: str | Path, *, k: int = 10, weights: str | Path | None = None,
    backbone: Backbone | str | None = None, device: str = "auto", max_pixels: int = MAX_PIXELS,
    say: Say = log_line,
) -> Neighbours:  # fmt: skip
    """Return the rows of a cache nearest to an image: exact, all rows are compared.

    Of views, the plain image's features are compared. Equal rows come in the order of the cache.

    Args:
        cache: The file.
        image: A path of the cache, whose row is left out; else an image file, here or by URL, whose
            features the cache's backbone computes. Only then is a network built.
        k: How many, from 1; of fewer rows, all.
        weights: The weights file that the cache was made with, where the library's own were not
            used.
        backbone: The backbone itself, if it was made in Python; its name, if a ``python:`` function
            makes it.
        device: Where to compute the image's features.
        max_pixels: A larger image is refused.
        say: Where lines for people go.

    Raises:
        ConfigError: If k is below 1.
        CacheError: If the cache is not whole, or has features that are not finite.
        DataError: If there is neither such a row nor such an image, it cannot be read, or its
            features are all zero.
        BackboneError: If the backbone cannot be built.

    Example:
        >>> featcache.neighbours("covid.h5", "new.png", k=5).rows[0]["path"]  # doctest: +SKIP
        'train/covid/17.png'
    """
    if k < 1:
        raise ConfigError("-k", expected="1 or more", found=k)
    opened = open_cache(local_path(cache, "CACHE"))
    url = url_of(image)
    name = url or (image.as_posix() if isinstance(image, Path) else image)
    place = _find_row(opened, name)
    if place is not None:
        split = opened.splits[place[0]]
        query = split.read_rows(np.array([place[1]]))[0].astype(np.float64)
        sha256 = split.image_sha256[place[1]].tobytes()
    else:
        if url is None:
            _require_image(opened, name)
        how: dict[str, Any] = {"weights": weights, "backbone": backbone, "max_pixels": max_pixels}
        query, sha256 = _compute(opened, name, device, how)
    length = np.sqrt(query @ query)
    if not np.isfinite(length) or length == 0:
        found = "only zeros" if length == 0 else "NaN or infinity"
        raise DataError("features of the image", expected="a direction", found=found, where=name)
    places = [(s, row) for s, split in opened.splits.items() for row in range(len(split))]
    cosines = np.concatenate(
        [_cosines(opened, split, query / length) for split in opened.splits.values()]
    )
    if place is not None:
        cosines[places.index(place)] = -np.inf
    num_rows = len(places) - (place is not None)
    order = np.argsort(-cosines, kind="stable")[: min(k, num_rows)].tolist()
    found_rows = tuple(_row(opened, places[i], float(cosines[i]), sha256) for i in order)
    result = Neighbours(opened.path, name, place is not None, num_rows, found_rows)
    for line in _lines(result):
        say(line)
    return result


def _find_row(cache: Cache, name: str) -> tuple[str, int] | None:
    """Return split and number of the row of this path, the first if splits share it."""
    for split_name, split in cache.splits.items():
        if name in split.paths:
            return split_name, split.paths.index(name)
    return None


def _require_image(cache: Cache, name: str) -> None:
    if found := why_no_file(Path(name), missing="neither"):
        paths = [path for split in cache.splits.values() for path in split.paths[:20_000]]
        close = difflib.get_close_matches(name, paths, n=1) if len(name) < 1000 else []
        raise DataError(
            "image", expected="a path of the cache, or an image file", found=found, where=name,
            hint=f"The cache has {printable(close[0])}" if close else "",
        )  # fmt: skip


def _compute(
    cache: Cache, image: str, device: str, how: dict[str, Any]
) -> tuple[npt.NDArray[np.float64], bytes]:
    """Return the features (D,) of an image file and the sha256 of its bytes."""
    from featcache.backbones.engine import build_engine
    from featcache.data.image_lists import list_images
    from featcache.extraction.earlier import refuse_dark_colour
    from featcache.extraction.pipeline import Lane, stream_features
    from featcache.extraction.recipe import decode_probes, recipe_from_identity
    from featcache.runtime import resolve_device

    recipe = recipe_from_identity(
        cache.identity, source=cache.provenance.get("weights_source"), **how
    )  # fmt: skip
    recipe = replace(recipe, rules=recipe.rules.with_dicom())
    dataset = list_images([image])
    if len(dataset.samples) != 1:
        found = f"{len(dataset.samples)} images"
        raise DataError("image", expected="one image file", found=found, where=image)
    refuse_dark_colour(recipe, dataset, cache.path)
    probes = decode_probes(dataset, dataset.samples, recipe.rules)
    engine = build_engine(recipe.backbone, resolve_device(device).torch(), probes, name="eager")
    (batch,) = stream_features(dataset, dataset.samples, [Lane(recipe, engine)])
    outcome, features = batch.outcomes[0], batch.features[0][0]
    if features is None:
        raise DataError(
            "image", expected="one that can be read", found=outcome.reason, where=image
        )  # fmt: skip
    plain: npt.NDArray[np.float64] = features[0].astype(np.float64)
    if len(plain) != cache.num_features:
        raise CacheError(
            "features", expected=f"{len(plain)}, as the backbone gives", found=cache.num_features,
            where=cache.path,
        )  # fmt: skip
    return plain, outcome.sha256


def _cosines(
    cache: Cache, split: CacheSplit, direction: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the cosine of each row (N,) and a vector of length 1; 0 of rows of zeros."""
    cosines = np.empty(len(split), np.float64)
    block_rows = max(1, _BLOCK_BYTES // (8 * len(direction)))
    for start in range(0, len(split), block_rows):
        numbers = np.arange(start, min(start + block_rows, len(split)))
        block = split.read_rows(numbers).astype(np.float64)
        lengths = np.sqrt(np.einsum("nd,nd->n", block, block))
        finite = np.isfinite(lengths)
        if not finite.all():
            row = start + int(finite.argmin())
            raise CacheError(
                f"features of {split.paths[row]}", expected="finite numbers",
                found="NaN or infinity", where=cache.path, hint="Extract it again",
            )  # fmt: skip
        cosines[numbers] = (block @ direction) / np.where(lengths > 0, lengths, 1)
    return np.clip(cosines, -1, 1)


def _row(
    cache: Cache, place: tuple[str, int], cosine: float, sha256: bytes
) -> dict[str, Any]:  # fmt: skip
    split_name, row = place
    split = cache.splits[split_name]
    target: Any = None
    if cache.task == "multilabel":
        has = np.flatnonzero(split.targets[row] == 1).tolist()
        target = [cache.classes[number] for number in has]
    elif split.targets[row] >= 0:
        target = cache.classes[split.targets[row]]
    own = split.image_sha256[row].tobytes()
    is_known = any(own) and any(sha256)
    return {
        "path": split.paths[row], "split": split_name, "target": target,
        "group": (split.groups[row] or None) if split.groups is not None else None,
        "cosine": cosine, "distance": max(0.0, 1 - cosine),
        "is_same_image": own == sha256 if is_known else None,
    }  # fmt: skip


def _lines(result: Neighbours) -> list[str]:
    """Return the neighbours as lines: distance, class, split and path."""
    kind = "row of the cache, left out below" if result.is_row else "image file"
    lines = [f"{printable(result.query)}: {kind}; {result.num_rows:,} rows compared by cosine"]
    for number, row in enumerate(result.rows, 1):
        target = row["target"]
        words = ", ".join(target) or "none" if isinstance(target, list) else target
        is_named = row["group"] not in {None, row["path"]}  # without a name it is its own group
        group = f" group {printable(row['group'])}" if is_named else ""
        same = " (the same file)" if row["is_same_image"] else ""
        lines.append(
            f"{number:>4}  distance {row['distance']:.4f}  {printable(words or 'unlabelled')}  "
            f"{row['split']}  {printable(row['path'])}{group}{same}"
        )
    return lines
