"""Where in the images of each class the evidence of a linear head lies: in the middle, or outside?

Reads: images. Writes: nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from featcache.errors import printable, warn_user
from featcache.evaluation.attribution import attribute_maps
from featcache.evaluation.auditing.folds import FoldedRows
from featcache.evaluation.auditing.images import AuditImages
from featcache.evaluation.evidence import (
    EXPECTED_OUTSIDE,
    MIDDLE,
    ClassEvidence,
    choose_images,
)
from featcache.evaluation.maps import MapReader
from featcache.extraction.earlier import refuse_dark_colour, refuse_misread
from featcache.extraction.recipe import Recipe
from featcache.extraction.view_stream import stream_views
from featcache.formatting import count
from featcache.runtime import Say, resolve_device

_CHUNK = 32


@dataclass(frozen=True)
class Evidence:
    """Where the evidence lies for and against the class that an image is of.

    Each image is judged by the linear head of the other folds' rows. Evidence is what a position of
    the backbone's last map adds to the log-odds of the image's class against the most probable
    other one, from the mean of the rows that the head was trained on.

    Attributes:
        reason: Why nothing was measured, None where something was.
        splits: Whose rows were used.
        middle: Of each side of the image: what is called its middle.
        expected: The share of the evidence outside it, were it spread evenly.
        classes: For each class, what ``evidence.ClassEvidence.as_dict`` returns.
    """

    reason: str | None
    splits: tuple[str, ...]
    middle: float = MIDDLE
    expected: float = EXPECTED_OUTSIDE
    classes: tuple[dict[str, Any], ...] = ()


def measure_evidence(
    folded: FoldedRows, images: AuditImages, recipe: Recipe, device: str, say: Say
) -> Evidence:
    """Measure where the evidence lies, in up to ``MOST_IMAGES`` images of each class.

    Args:
        folded: The labelled rows, in folds.
        images: Where they are read from. Rows whose image was not read are left out.
        recipe: How the cache's features were made.
        device: Where to compute.
        say: Where lines for people go.

    Raises:
        BackboneError: If the network does not run alike for all images.
        CacheError: If an earlier version read the cache's images wrongly.
        DataError: Likewise.
    """
    refuse_misread(folded.cache, images.dataset)
    refuse_dark_colour(recipe, images.dataset, folded.cache.path)
    if isinstance(folded.folds, str):
        return Evidence(folded.folds, folded.splits)
    is_read = images.is_read[folded.numbers]
    names = folded.cache.classes
    of_class = [
        np.flatnonzero(is_read & (folded.targets == number)) for number in range(len(names))
    ]
    chosen = np.concatenate([*map(choose_images, of_class)])
    say(f"evidence: the maps of {count(len(chosen), 'image')}")
    heads = [_as_module(pipeline, len(names)) for pipeline in folded.heads]
    means = [np.asarray(pipeline[0].mean_, np.float64) for pipeline in folded.heads]
    fold_of = np.full(folded.num_rows, -1)
    for number, (_, judged) in enumerate(folded.folds):
        fold_of[judged] = number
    found = [
        ClassEvidence(name, int((folded.targets == number).sum()))
        for number, name in enumerate(names)
    ]  # fmt: skip
    reader = _reader(recipe, device)
    for row, pixels in _read(folded, images, recipe, chosen):
        (made,) = maps = reader.read([pixels])
        if not all(reader.has_map):
            name = printable(recipe.backbone.name)
            return Evidence(f"the features of {name} are not the mean over a map", folded.splits)
        head, target = heads[fold_of[row]], int(folded.targets[row])
        with torch.no_grad():
            logits = head(made.features.double()[None])[0]
        logits[target] = -torch.inf
        attribution, planes, _ = attribute_maps(
            head, target, int(logits.argmax()), maps, reader.norms, means[fold_of[row]],
            is_linear=True,
        )  # fmt: skip
        if not attribution.is_complete:
            warn_user(f"evidence: parts miss the log-odds by {attribution.residual:.2g}")
        found[target].add(planes, int(folded.units[row]))
    if not all(each.num_images for each in found):
        return Evidence("a class has no image that was read", folded.splits)
    return Evidence(None, folded.splits, classes=tuple(each.as_dict() for each in found))


def _as_module(pipeline: Any, num_classes: int) -> nn.Module:
    """Return a scaler and a logistic regression as one layer, features to logits in float64."""
    scaler, regression = pipeline[0], pipeline[1]
    weight = np.asarray(regression.coef_, np.float64) / scaler.scale_
    bias = np.asarray(regression.intercept_, np.float64) - weight @ scaler.mean_
    if num_classes == 2:  # scikit-learn keeps the difference of the two
        weight, bias = (np.concatenate([np.zeros_like(part), part]) for part in (weight, bias))
    layer = nn.Linear(weight.shape[1], num_classes).double().requires_grad_(requires_grad=False)
    layer.weight.copy_(torch.from_numpy(weight))
    layer.bias.copy_(torch.from_numpy(bias))
    return layer


def _reader(recipe: Recipe, device: str) -> MapReader:
    place = resolve_device(device).torch()
    network = recipe.backbone.network.eval()
    if place.type != "cpu":
        network = copy.deepcopy(network).to(place)
    return MapReader([recipe], [network], place)


def _read(
    folded: FoldedRows, images: AuditImages, recipe: Recipe, rows: npt.NDArray[np.int64]
) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """Yield the pixels of rows that can be read, in their order."""
    samples = [images.samples[int(number)] for number in folded.numbers[rows]]
    for outcomes, views in stream_views(images.dataset, samples, [recipe], _CHUNK):
        for outcome, view in zip(outcomes, views, strict=True):
            if view is not None:
                yield int(rows[outcome.position]), np.asarray(view[0][0])
