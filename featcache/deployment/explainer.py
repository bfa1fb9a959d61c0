"""The explainer: maps and occlusion of images by a classifier.

Reads: the cache of the run where it is at hand. Writes: nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from featcache.backbones.pooling import PooledMap, Pooling, find_pooling, read_map
from featcache.data.dataset import ImageDataset, Sample
from featcache.deployment.attribution import (
    Attribution,
    attribute,
    before_norm,
    behind_norms,
    choose_side,
    completeness_bound,
    cover_cells,
    log_odds_of,
    place_parts,
    rank_correlation,
    share_inside,
    sum_cells,
)
from featcache.deployment.classifier import Classifier, fit_image
from featcache.deployment.training_images import TrainingImages
from featcache.errors import ConfigError, warn_user
from featcache.extraction.recipe import Recipe
from featcache.files import result_as_dict
from featcache.formatting import brief_repr, join_few
from featcache.heads.prediction import predict_probs
from featcache.runtime import exact_fp32

MIDDLE = 0.6
"""Of each side of an image: what ``share_inside`` takes for its middle."""

_LINEAR, _CURVED = (1, 1e-4), (64, 1e-3)  # steps to begin with, and what the sum may be off by
_NUM_NEAREST = 5
_CHANCE = 1.645  # / sqrt(n - 1): above it is one in twenty rank correlations of n unrelated values
_LEAST_CELLS = 9  # fewer say nothing about agreement


@dataclass(frozen=True)
class Explanation:
    """What spoke for and against a class in one image.

    Attributes:
        path: The image; of one in memory its position as text.
        picture: Name of the picture in the folder, None if none was drawn.
        classes: C names.
        probs: C probabilities.
        preds: The most probable class; with several labels an image, those above 0.5.
        decision: What the thresholds of ``decide`` make of it, as in ``Predictions``; None without.
        positive: The class that is explained.
        against: The class that it is held against: its log-odds are the difference of two logits.
            None with several labels an image, where they are its own logit.
        log_odds: Of ``positive``, natural logarithm.
        baseline: The log-odds at the mean of the training images.
        baseline_of: ``cache`` or ``head``, where that mean is from: see ``TrainingImages``.
        residual: By how much baseline and parts miss the log-odds.
        num_steps: Points at which the gradient of the head was taken.
        maps: For each backbone ``backbone``; ``map``, what each position (H rows of W) adds to the
            log-odds, None where its features are not the mean over a map; ``unlocated``, what such
            a backbone adds as a whole; ``occlusion``, by how much the log-odds fall where a cell
            (rows of columns) of its input is covered; ``rank_correlation`` of both (None where
            there is no map, or fewer than 9 cells); ``disagree``, whether that is no higher than of
            unrelated maps (0.24 of 49 cells, which one in twenty of those exceeds);
            ``share_inside``, the share of what speaks ``for``, and of what speaks ``against``, that
            lies in the middle 0.6 x 0.6 of the map (else of the occlusion).
        nearest: The nearest training images: see ``TrainingImages.find_nearest``. Empty where the
            cache is not at hand.
        unlike_training: Whether it is unlike any training image: see ``Predictions``.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    path: str
    picture: str | None
    classes: tuple[str, ...]
    probs: tuple[float, ...]
    preds: tuple[str, ...]
    decision: Any
    positive: str
    against: str | None
    log_odds: float
    baseline: float
    baseline_of: str
    residual: float
    num_steps: int
    maps: tuple[dict[str, Any], ...]
    nearest: tuple[dict[str, Any], ...]
    unlike_training: bool | None

    def as_dict(self) -> dict[str, Any]:
        """Return the explanation as JSON values."""
        return result_as_dict(self)


class Explainer:
    """Explains images by a classifier; the networks are looked at once.

    Args:
        classifier: Backbones and head.
        positive: See ``explain``.
        against: Likewise.

    Raises:
        ConfigError: If there is no such class.
        CacheError: If the run's cache has features that are not finite.
    """

    def __init__(
        self, classifier: Classifier, positive: str | None = None, against: str | None = None
    ) -> None:
        run = classifier.run
        self._classifier, self._positive, self._against = classifier, positive, against
        for option, name in (("--positive", positive), ("--against", against)):
            if name is not None and name not in run.classes:
                raise ConfigError(option, expected=f"one of {join_few(run.classes)}", found=name)
        if against is not None and (run.task == "multilabel" or against == positive):
            wanted = "another class than --positive"
            if run.task == "multilabel":
                wanted = "none: each label is a question of its own"
            raise ConfigError("--against", expected=wanted, found=against)
        self._training = TrainingImages.of(run)
        self._head = copy.deepcopy(classifier.head).double().requires_grad_(requires_grad=False)
        self._widths = [recipe.backbone.num_features for recipe in classifier.recipes]
        self._poolings: list[Pooling | None] | None = None

    def read(self, image: Any, dataset: ImageDataset) -> list[npt.NDArray[np.uint8]]:
        """Return the pixels that each backbone sees, (S, S) or (S, S, 3).

        Raises:
            DataError: If the image cannot be read.
        """
        data = dataset.read(image) if isinstance(image, Sample) else image
        return [fit_image(data, recipe) for recipe in self._classifier.recipes]

    def explain(self, pixels: Sequence[npt.NDArray[np.uint8]], path: str = "0") -> Explanation:
        """Return the explanation of one image.

        Args:
            pixels: As ``read`` returned them.
            path: Its name.
        """
        run = self._classifier.run
        maps = [self._run(number, image) for number, image in enumerate(pixels)]
        features = np.concatenate([made.features.numpy() for made in maps])
        (probs,) = predict_probs(run.head, run.state, features[None], run.task)
        positive, against = self._choose(probs)
        norms = [None if pooling is None else pooling.norm for pooling in self._poolings or ()]
        score = log_odds_of(self._head, positive, against)
        with torch.no_grad():
            log_odds = float(score(torch.from_numpy(features[None]).double())[0])
        edges = np.cumsum(self._widths)[:-1]
        pairs = zip(maps, np.split(self._training.mean, edges), norms, strict=True)
        starts, ends = [], []
        for made, mean, norm in pairs:
            end = made.positions.double().mean((0, 1)).numpy()
            ends.append(end)
            starts.append(before_norm(mean, end, norm))
        is_linear = not (run.head.hidden or run.members or any(norm is not None for norm in norms))
        num_steps, tolerance = _LINEAR if is_linear else _CURVED
        found = attribute(
            behind_norms(score, self._widths, norms), np.concatenate(starts), np.concatenate(ends),
            log_odds, num_steps=num_steps, tolerance=tolerance,
        )  # fmt: skip
        if abs(found.residual) > completeness_bound(log_odds, tolerance):
            warn_user(f"{path}: the parts miss the log-odds by {found.residual:.2g}")
        parts = zip(np.split(found.weights, edges), starts, strict=True)
        described = [
            self._describe(number, maps[number].positions.numpy(), weights, start, pixels, features,
                           (positive, against, log_odds))
            for number, (weights, start) in enumerate(parts)
        ]  # fmt: skip
        return self._join(path, features, probs, (positive, against), log_odds, found, described)

    def _join(  # noqa: PLR0917
        self, path: str, features: npt.NDArray[np.float32], probs: npt.NDArray[np.float64],
        pair: tuple[int, int | None], log_odds: float, found: Attribution,
        maps: Sequence[dict[str, Any]],
    ) -> Explanation:  # fmt: skip
        classifier, run = self._classifier, self._classifier.run
        positive, against = pair
        likely = [int(probs.argmax())]
        if run.task == "multilabel":
            likely = np.flatnonzero(probs > 0.5).tolist()
        decisions, novelty = classifier.decisions, classifier.novelty
        return Explanation(
            path=path, picture=None, classes=run.classes, probs=tuple(probs.tolist()),
            preds=tuple(run.classes[i] for i in likely),
            decision=None if decisions is None else decisions.apply(probs[None])[0],
            positive=run.classes[positive],
            against=None if against is None else run.classes[against],
            log_odds=log_odds, baseline=found.baseline, baseline_of=self._training.mean_of,
            residual=found.residual, num_steps=found.num_steps, maps=tuple(maps),
            nearest=tuple(self._training.find_nearest(features, _NUM_NEAREST)),
            unlike_training=None if novelty is None else novelty.find_unlike(features[None])[0],
        )  # fmt: skip

    def _choose(self, probs: npt.NDArray[np.float64]) -> tuple[int, int | None]:
        """Return the numbers of the class to explain and of the one to hold it against."""
        classes = self._classifier.run.classes
        order = np.argsort(-probs, kind="stable").tolist()
        if self._against is not None:
            against = classes.index(self._against)
            order.remove(against)
        positive = order[0] if self._positive is None else classes.index(self._positive)
        if self._classifier.run.task == "multilabel":
            return positive, None
        if self._against is not None:
            return positive, against
        return positive, next(number for number in order if number != positive)

    def _run(self, number: int, pixels: npt.NDArray[np.uint8]) -> PooledMap:
        """Return features and map of an image by one backbone; 1 x 1 where there is no map."""
        recipe, network = self._classifier.recipes[number], self._classifier.networks[number]
        batch = _to_batch(pixels, recipe).to(self._classifier.device)
        if self._poolings is None:
            self._poolings = []
        if len(self._poolings) == number:
            self._poolings.append(find_pooling(network, batch))
        pooling = self._poolings[number]
        if pooling is not None:
            return read_map(network, batch, pooling)[0]
        with torch.no_grad(), exact_fp32():
            (features,) = network(batch).float().cpu()
        return PooledMap(features, features[None, None])

    def _describe(  # noqa: PLR0917
        self, number: int, positions: npt.NDArray[np.float32], weights: npt.NDArray[np.float64],
        start: npt.NDArray[np.float64], pixels: Sequence[npt.NDArray[np.uint8]],
        features: npt.NDArray[np.float32], asked: tuple[int, int | None, float],
    ) -> dict[str, Any]:  # fmt: skip
        """Return map and occlusion of one backbone as JSON values."""
        plane = place_parts(positions, weights, start)
        has_map = self._poolings is not None and self._poolings[number] is not None
        side = choose_side(min(plane.shape) if has_map else None)
        occlusion = self._cover(number, pixels[number], side, features, asked)
        correlation, disagree = None, None
        if has_map and side * side >= _LEAST_CELLS and side <= min(plane.shape):
            correlation = rank_correlation(sum_cells(plane, side), occlusion)
        if correlation is not None:
            disagree = correlation < _CHANCE / math.sqrt(side * side - 1)
        return {
            "backbone": self._classifier.recipes[number].backbone.name,
            "map": plane.tolist() if has_map else None,
            "unlocated": None if has_map else float(plane.sum()),
            "occlusion": occlusion.tolist(),
            "rank_correlation": correlation,
            "disagree": disagree,
            "share_inside": share_inside(plane if has_map else occlusion, MIDDLE),
        }

    def _cover(
        self, number: int, pixels: npt.NDArray[np.uint8], side: int,
        features: npt.NDArray[np.float32], asked: tuple[int, int | None, float],
    ) -> npt.NDArray[np.float64]:  # fmt: skip
        """Return by how much the log-odds fall where a cell of one backbone's input is covered."""
        positive, against, log_odds = asked
        covered = cover_cells(pixels, side)
        engine = self._classifier.choose_engine(number, len(covered), lambda: [pixels])
        rows = np.repeat(features[None], len(covered), axis=0)
        end = sum(self._widths[: number + 1])
        rows[:, end - self._widths[number] : end] = engine.run(covered)
        with torch.no_grad():
            scores = log_odds_of(self._head, positive, against)(torch.from_numpy(rows).double())
        fall: npt.NDArray[np.float64] = (log_odds - scores).numpy().reshape(side, side)
        return fall


def _to_batch(pixels: npt.NDArray[np.uint8], recipe: Recipe) -> torch.Tensor:
    """Return an image (S, S) or (S, S, 3) as the network takes it: (1, 3, S, S)."""
    rgb = np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels
    backbone = recipe.backbone
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (backbone.mean, backbone.std))
    return (torch.from_numpy(rgb.copy())[None].permute(0, 3, 1, 2).float() / 255 - mean) / std
