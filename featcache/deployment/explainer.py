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

from featcache.data.dataset import ImageDataset, Sample
from featcache.deployment.batches import fit_image
from featcache.deployment.classifier import Classifier
from featcache.deployment.occlusion import choose_side, cover_cells, rank_correlation, sum_cells
from featcache.deployment.training_images import TrainingImages
from featcache.errors import ConfigError, warn_user
from featcache.evaluation.attribution import Attribution, Plane, attribute_maps, log_odds_of
from featcache.evaluation.evidence import share_inside
from featcache.evaluation.maps import MapReader
from featcache.files import result_as_dict
from featcache.formatting import brief_repr, join_few
from featcache.heads.prediction import predict_probs

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


@dataclass(frozen=True)
class Located:
    """What each position of an image's maps adds to the log-odds of a class.

    Attributes:
        features: (D,) float32.
        probs: (C,)
        positive: Number of the class.
        against: Number of the other one, or None.
        log_odds: Of the class.
        found: The attribution.
        planes: (H, W) for each backbone; 1 x 1 where it has no map.
    """

    features: npt.NDArray[np.float32]
    probs: npt.NDArray[np.float64]
    positive: int
    against: int | None
    log_odds: float
    found: Attribution
    planes: list[Plane]


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
        self._is_linear = not (run.head.hidden or run.members)
        self._maps = MapReader(classifier.recipes, classifier.networks, classifier.device)

    def read(self, image: Any, dataset: ImageDataset) -> list[npt.NDArray[np.uint8]]:
        """Return the pixels that each backbone sees, (S, S) or (S, S, 3).

        Raises:
            DataError: If the image cannot be read.
        """
        data = dataset.read(image) if isinstance(image, Sample) else image
        return [fit_image(data, recipe) for recipe in self._classifier.recipes]

    @property
    def has_map(self) -> list[bool]:
        """Of each backbone, whether its features are the mean over a map. Known after an image."""
        return self._maps.has_map

    def locate(
        self, pixels: Sequence[npt.NDArray[np.uint8]], path: str = "0", positive: int | None = None
    ) -> Located:
        """Return what each position of an image's maps adds to the log-odds.

        Args:
            pixels: As ``read`` returned them.
            path: Its name.
            positive: Number of the class to explain, in place of the one that was asked for.
        """
        run = self._classifier.run
        maps = self._maps.read(pixels)
        features = np.concatenate([made.features.numpy() for made in maps])
        (probs,) = predict_probs(run.head, run.state, features[None], run.task)
        chosen, against = self._choose(probs, positive)
        found, planes, log_odds = attribute_maps(
            self._head, chosen, against, maps, self._maps.norms, self._training.mean,
            is_linear=self._is_linear,
        )  # fmt: skip
        if not found.is_complete:
            warn_user(f"{path}: the parts miss the log-odds by {found.residual:.2g}")
        return Located(features, probs, chosen, against, log_odds, found, planes)

    def explain(self, pixels: Sequence[npt.NDArray[np.uint8]], path: str = "0") -> Explanation:
        """Return the explanation of one image.

        Args:
            pixels: As ``read`` returned them.
            path: Its name.
        """
        classifier, run = self._classifier, self._classifier.run
        made = self.locate(pixels, path)
        probs = made.probs
        likely = [int(probs.argmax())]
        if run.task == "multilabel":
            likely = np.flatnonzero(probs > 0.5).tolist()
        decisions, novelty = classifier.decisions, classifier.novelty
        unlike = None if novelty is None else novelty.find_unlike(made.features[None])[0]
        return Explanation(
            path=path, picture=None, classes=run.classes, probs=tuple(probs.tolist()),
            preds=tuple(run.classes[i] for i in likely),
            decision=None if decisions is None else decisions.apply(probs[None])[0],
            positive=run.classes[made.positive],
            against=None if made.against is None else run.classes[made.against],
            log_odds=made.log_odds, baseline=made.found.baseline,
            baseline_of=self._training.mean_of,
            residual=made.found.residual, num_steps=made.found.num_steps,
            maps=tuple(self._describe(number, pixels, made) for number in range(len(pixels))),
            nearest=tuple(self._training.find_nearest(made.features, _NUM_NEAREST)),
            unlike_training=unlike,
        )  # fmt: skip

    def _choose(
        self, probs: npt.NDArray[np.float64], positive: int | None
    ) -> tuple[int, int | None]:
        """Return the numbers of the class to explain and of the one to hold it against."""
        classes = self._classifier.run.classes
        order = np.argsort(-probs, kind="stable").tolist()
        against = None if self._against is None else classes.index(self._against)
        if positive is None and self._positive is not None:
            positive = classes.index(self._positive)
        if positive is None:
            positive = next(number for number in order if number != against)
        if self._classifier.run.task == "multilabel":
            return positive, None
        if against is None:
            against = next(number for number in order if number != positive)
        return positive, against

    def _describe(
        self, number: int, pixels: Sequence[npt.NDArray[np.uint8]], made: Located
    ) -> dict[str, Any]:
        """Return map and occlusion of one backbone as JSON values."""
        plane, has_map = made.planes[number], self._maps.has_map[number]
        side = choose_side(min(plane.shape) if has_map else None)
        occlusion = self._cover(number, pixels[number], side, made)
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
            "share_inside": share_inside(plane if has_map else occlusion),
        }

    def _cover(self, number: int, pixels: npt.NDArray[np.uint8], side: int, made: Located) -> Plane:
        """Return by how much the log-odds fall where a cell of one backbone's input is covered."""
        covered = cover_cells(pixels, side)
        engine = self._classifier.choose_engine(number, len(covered), lambda: [pixels])
        rows = np.repeat(made.features[None], len(covered), axis=0)
        widths = [recipe.backbone.num_features for recipe in self._classifier.recipes]
        end = sum(widths[: number + 1])
        rows[:, end - widths[number] : end] = engine.run(covered)
        score = log_odds_of(self._head, made.positive, made.against)
        with torch.no_grad():
            scores = score(torch.from_numpy(rows).double())
        fall: Plane = (made.log_odds - scores).numpy().reshape(side, side)
        return fall
