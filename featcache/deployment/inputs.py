"""What a user may hand to a classifier -> image files, and images in memory, in their order."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.data.dataset import ImageDataset, Sample, Samples, list_images, scan
from featcache.data.sources import are_packed
from featcache.errors import ConfigError, DataError
from featcache.files import local_path

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
        images: One or many of: a file, folder or CSV (``str`` or ``Path``), a PIL image, a uint8
            array (H, W) or (H, W, 3). Or one array (B, H, W, 3), or a scanned data set. Or a zip,
            or tars or Parquet files or folders of them.
        **listing: The keywords of ``list_images``.

    Raises:
        DataError: If a path leads nowhere, a folder holds no image, or companions of images.
        ConfigError: If an array has another shape or dtype, or for bytes, a torch tensor or what
            else is none of these.
    """
    given = images if isinstance(images, ImageDataset) else _as_list(images)
    if not isinstance(given, ImageDataset) and (packed := _list_packed(given, listing)) is not None:
        given = packed
    if isinstance(given, ImageDataset):
        return Inputs(given, [sample.path for sample in given.samples], given.samples)
    names: list[str] = []
    listed: list[Any] = []
    has_csv = any(str(i).lower().endswith(".csv") for i in given if isinstance(i, str | Path))
    if (listing.get("columns") or listing.get("ignore_columns")) and not has_csv:
        raise ConfigError("--columns", expected="a CSV of images", found="none")
    for image in given:
        if isinstance(image, str | os.PathLike):
            samples = list_images([local_path(Path(image), "image")], **listing).samples
            names += [sample.path for sample in samples]
            listed += samples
        else:
            names.append(str(len(listed)))
            listed.append(image)
    if not listed and any(listing.values()):
        raise DataError("images", expected="some that --include and --exclude leave", found="none")
    files = dict.fromkeys(image for image in listed if isinstance(image, Sample))
    return Inputs(ImageDataset(Path(), "images", (), Samples(files)), names, listed)


def _list_packed(images: Sequence[Any], listing: Mapping[str, Any]) -> ImageDataset | None:
    """Return the images of a zip, or of tars or Parquet files; None for others."""
    given = [image for image in images if isinstance(image, str | os.PathLike)]
    paths = [local_path(Path(image), "image") for image in given]
    if not are_packed(paths) or len(paths) < len(images):
        return None
    return scan(paths[0] if len(paths) == 1 else paths, no_classes=True, **listing)


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
