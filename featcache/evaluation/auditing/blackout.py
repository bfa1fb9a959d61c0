"""How well does the same head do on images whose centre is blacked out, or nothing but the centre?

Reads: images. Writes: nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featcache.backbones.engine import Engine, build_engine
from featcache.cache.reading import Cache
from featcache.evaluation.auditing.folds import FoldedRows, out_of_fold_probs
from featcache.evaluation.auditing.images import AuditImages
from featcache.extraction.earlier import refuse_dark_colour, refuse_misread
from featcache.extraction.pipeline import Lane, stream_features
from featcache.extraction.recipe import Recipe, decode_probes, recipe_from_identity
from featcache.formatting import count, decimal
from featcache.metrics.scores import paired_interval
from featcache.pixels.views import PLAIN
from featcache.runtime import Say, resolve_device

if TYPE_CHECKING:
    import torch

    from featcache.backbones.backbone import Backbone

WAYS = ("centre removed", "centre only")


@dataclass(frozen=True)
class Blackout:
    """Balanced accuracies of one head on whole and on blacked-out images, in the same folds.

    Attributes:
        sentence: What it says, or why nothing was measured.
        reason: Why nothing was measured, None where something was.
        splits: Whose rows were used.
        num_rows: Labelled rows in them whose image was read.
        num_folds: How many folds.
        head: The head's mean balanced accuracy on whole images, by the cache's features.
        blacked_out: A row per share and way: ``share`` (of width and of height), ``way``
            (``centre removed`` or ``centre only``), ``balanced_accuracy``, and ``difference``, by
            which whole images are better: ``mean``, and ``low`` and ``high`` of its 95 % interval
            (Nadeau and Bengio; Bonferroni over the rows), None where every fold agrees.
    """

    sentence: str
    reason: str | None
    splits: tuple[str, ...]
    num_rows: int
    num_folds: int = 0
    head: float | None = None
    blacked_out: tuple[dict[str, Any], ...] = ()


def blackout_recipe(
    cache: Cache, weights: str | Path | None, backbone: Backbone | str | None, max_pixels: int
) -> Recipe:
    """Return how the cache's features of plain images were made.

    Raises:
        FeatcacheError: As ``recipe_from_identity``.
    """
    recipe = recipe_from_identity(
        cache.identity, weights=weights, backbone=backbone, max_pixels=max_pixels,
        source=cache.provenance.get("weights_source"),
    )  # fmt: skip
    return replace(recipe, view_rules=PLAIN)


def measure_blackout(  # noqa: PLR0917
    folded: FoldedRows, images: AuditImages, recipe: Recipe, shares: Sequence[float],
    device: str, say: Say,
) -> Blackout:  # fmt: skip
    """Judge the head in the same folds on features of images without, and with only, the centre.

    Args:
        folded: The labelled rows, in folds.
        images: Where they are read from. Rows whose image was not read are left out.
        recipe: How the cache's features were made.
        shares: Of the width and of the height of what the network sees.
        device: Where to compute.
        say: Where lines for people go.

    Raises:
        BackboneError: If no engine is within the bound.
        CacheError: If an earlier version read the cache's images wrongly.
        DataError: Likewise.
    """
    refuse_misread(folded.cache, images.dataset)
    refuse_dark_colour(recipe, images.dataset, folded.cache.path)
    is_read = images.is_read[folded.numbers]
    if isinstance(folded.folds, str) or folded.pool is None:
        reason = "the features are larger than the memory"
        reason = folded.folds if isinstance(folded.folds, str) else reason
        return Blackout(f"not measured: {reason}", reason, folded.splits, int(is_read.sum()))
    features, is_read = _masked_features(
        folded.numbers, is_read, images, recipe, shares, device, say
    )
    folds = [(train[is_read[train]], judged[is_read[judged]]) for train, judged in folded.folds]
    num_classes = len(folded.cache.classes)
    if any(len(np.unique(folded.targets[rows])) < num_classes for pair in folds for rows in pair):
        reason = "a class has too few images that were read"
        return Blackout(f"not measured: {reason}", reason, folded.splits, int(is_read.sum()))
    if is_read.all():  # other parts have these probabilities too
        own = _scores_of(folded.probs, folded.targets, folds)
    else:
        own = _fold_scores(folded.pool.plain, folded.targets, folds)
    ratio = float(np.mean([len(judged) / len(train) for train, judged in folds]))
    ways = [(share, way) for share in shares for way in WAYS]
    blacked_out = []
    for (share, way), made in zip(ways, features, strict=True):
        scores = _fold_scores(made, folded.targets, folds)
        differences = [one - other for one, other in zip(own, scores, strict=True)]
        mean, low, high = paired_interval(differences, ratio, len(ways))
        interval = {"low": None, "high": None} if low == high else {"low": low, "high": high}
        blacked_out.append({
            "share": share, "way": way, "balanced_accuracy": float(np.mean(scores)),
            "difference": {"mean": mean, **interval},
        })  # fmt: skip
    head = float(np.mean(own))
    return Blackout(
        _sentence(head, blacked_out), None, folded.splits, int(is_read.sum()), len(folds), head,
        tuple(blacked_out),
    )  # fmt: skip


def _sentence(head: float, rows: Sequence[dict[str, Any]]) -> str:
    removed = [row for row in rows if row["way"] == WAYS[0]]
    row = max(removed, key=lambda row: row["share"])
    low, mean = row["difference"]["low"], row["difference"]["mean"]
    figures = (
        f"{decimal(row['balanced_accuracy'])} with {row['share']:g} of each side blacked out, "
        f"{decimal(head)} on whole images"
    )
    if (mean if low is None else low) > 0:
        return f"the head does worse without the centre: {figures}"
    return f"no evidence that the head needs the centre: {figures}"


def _fold_scores(
    features: Any, targets: npt.NDArray[Any], folds: list[tuple[Any, Any]]
) -> list[float]:
    """Return the balanced accuracy of each fold, by the head of the other folds' rows."""
    return _scores_of(out_of_fold_probs(features, targets, folds), targets, folds)


def _scores_of(
    probs: npt.NDArray[np.float64], targets: npt.NDArray[Any], folds: list[tuple[Any, Any]]
) -> list[float]:
    from sklearn.metrics import balanced_accuracy_score

    preds = probs.argmax(axis=1)
    return [
        float(balanced_accuracy_score(targets[judged], preds[judged])) for _, judged in folds
    ]  # fmt: skip


def _masked_features(  # noqa: PLR0917
    numbers: npt.NDArray[np.int64], is_read: npt.NDArray[np.bool_], images: AuditImages,
    recipe: Recipe, shares: Sequence[float], device: str, say: Say,
) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.bool_]]:  # fmt: skip
    """Return features (N, D) per share and way, and which rows have them."""
    asked = np.flatnonzero(is_read).tolist()
    samples = [images.samples[numbers[row]] for row in asked]
    probes = decode_probes(images.dataset, samples, recipe.rules)
    engine = build_engine(
        recipe.backbone, resolve_device(device).torch(), probes, num_images=len(samples)
    )
    masks = [mask for share in shares for mask in _masks(recipe.rules.image_size, share)]
    say(f"blackout: {count(len(samples), 'image')} in {count(len(masks), 'way')} by {engine.name}")
    lanes = [Lane(recipe, _with_mask(engine, mask)) for mask in masks]
    shape = len(numbers), recipe.backbone.num_features
    made = [np.zeros(shape, np.float32) for _ in masks]
    has_features = np.zeros(len(numbers), np.bool_)
    for batch in stream_features(images.dataset, samples, lanes):
        for number, outcome in enumerate(batch.outcomes):
            if outcome.reason is None:
                row = asked[outcome.position]
                has_features[row] = True
                for features, of_lane in zip(made, batch.features, strict=True):
                    features[row] = of_lane[number]
    return made, has_features


def _masks(side: int, share: float) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return what is kept (S, S) without the centre, and of the centre only."""
    size = max(1, round(side * share))
    start = (side - size) // 2
    is_centre = np.zeros((side, side), np.bool_)
    is_centre[start : start + size, start : start + size] = True
    return ~is_centre, is_centre


def _with_mask(engine: Engine, kept: npt.NDArray[np.bool_]) -> Engine:
    """Return an engine that sees black where pixels are not kept."""
    forward: Callable[[torch.Tensor], npt.NDArray[np.float32]] = engine.forward

    def masked(batch: torch.Tensor) -> npt.NDArray[np.float32]:
        batch.numpy()[:, ~kept] = 0  # a batch is made for this call
        return forward(batch)

    return replace(engine, forward=masked)
