"""What a user may hand to a classifier -> image files, and images in memory, in their order."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache import progress
from featcache.data.dataset import ImageDataset
from featcache.data.image_lists import list_in_order
from featcache.data.listing import Listing
from featcache.errors import ConfigError, DataError

_EXPECTED = "paths, PIL images or uint8 arrays"


@dataclass(frozen=True)
class Inputs:
    """Images to classify.

    Attributes:
        dataset: Where the files among them are read from, each once.
        names: Of each image its path, or its position as text if it is in memory.
        images: Each a ``Sample`` of the data set, a PIL image, or an array.
    """

    dataset: ImageDataset
    names: Sequence[str]
    images: Sequence[Any]


def list_inputs(images: Any, **listing: Any) -> Inputs:
    """Return images one by one; a folder becomes all images in it, sorted by path.

    Args:
        images: One or many of: a file, folder, CSV or glob of these (``str`` or ``Path``), a PIL
            image, a uint8 array (H, W) or (H, W, 3). Or one array (B, H, W, 3), or a scanned data
            set. Or a zip, or tars or Parquet files or folders or globs of them. Any by URL.
        **listing: The keywords of ``Listing.of``.

    Raises:
        DataError: If a path leads nowhere, a folder holds no image, or companions of images; or if
            a store refuses or has nothing there.
        ConfigError: If an array has another shape or dtype, or for bytes, a torch tensor or what
            else is none of these; or if there are both paths and URLs.
    """
    if isinstance(images, ImageDataset):
        return Inputs(images, [sample.path for sample in images.samples], images.samples)
    given = _as_list(images)
    named: list[str | Path] = [
        image if isinstance(image, str) else Path(image)
        for image in given if isinstance(image, str | os.PathLike)
    ]  # fmt: skip
    dataset, of_each = list_in_order(
        named, Listing.of(**listing), may_be_packed=len(named) == len(given),
        progress=progress.OF_URLS,
    )  # fmt: skip
    has_columns = listing.get("columns") or listing.get("ignore_columns")
    if has_columns and dataset.layout == "images" and not any(map(_is_csv, named)):
        raise ConfigError("--columns", expected="a CSV of images", found="none")
    names: list[str] = []
    listed: list[Any] = []
    found = iter(of_each)
    for image in given:
        if isinstance(image, str | os.PathLike):
            samples = next(found)
            names += [sample.path for sample in samples]
            listed += samples
        else:
            names.append(str(len(listed)))
            listed.append(image)
    if not listed and any(listing.values()):
        raise DataError("images", expected="some that --include and --exclude leave", found="none")
    return Inputs(dataset, names, listed)


def _is_csv(path: str | Path) -> bool:
    return os.fspath(path).lower().endswith(".csv")


def _as_list(images: Any) -> list[Any]:
    """Return paths, PIL images and arrays (H, W) or (H, W, 3), however many were given."""
    if isinstance(images, np.ndarray):
        _require_pixels(images, batch=True)
        return [*images] if images.ndim == 4 else [images]
    if isinstance(images, bytes | bytearray | memoryview):
        raise ConfigError(
            "images", expected=_EXPECTED, found=type(images).__name__,
            hint="Open the bytes of an image file with PIL.Image.open(io.BytesIO(data))",
        )  # fmt: skip
    if isinstance(images, str | os.PathLike) or hasattr(images, "getexif"):
        return [images]
    if not isinstance(images, Iterable):
        raise ConfigError("images", expected=_EXPECTED, found=repr(images)[:80])
    if hasattr(images, "is_floating_point"):  # a torch tensor, and torch need not be there
        raise ConfigError(
            "images", expected=_EXPECTED, found="a torch tensor",
            hint="Pass preprocessed=True with a batch (B, 3, S, S) that preprocess made",
        )  # fmt: skip
    listed = list(images)
    for image in listed:
        if isinstance(image, np.ndarray):
            _require_pixels(image, batch=False)
    return listed


def _require_pixels(array: npt.NDArray[Any], *, batch: bool) -> None:
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == 3)
    is_batch = batch and array.ndim == 4 and array.shape[-1] == 3
    if array.dtype != np.uint8 or not (is_image or is_batch) or 0 in array.shape[-3:]:
        shapes = "(H, W), (H, W, 3) or (B, H, W, 3)" if batch else "(H, W) or (H, W, 3)"
        raise ConfigError(
            "images", expected=f"uint8 arrays {shapes}", found=f"{array.dtype} {array.shape}",
            hint="Values are 0 to 255, channels are RGB and come last",
        )  # fmt: skip
