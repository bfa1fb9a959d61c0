"""Compare an exported ONNX file with its run, in ONNX Runtime, on drawn and on real images.

Reads: an ONNX file; with data, images and the caches of the run. Writes: nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from featcache.backbones.engine import eager_features, measure_spread
from featcache.backbones.forward import onnx_session
from featcache.cache.side_by_side import caches_of
from featcache.deployment.classifier import Classifier
from featcache.deployment.exporting.graph import (
    FEATURES,
    REFERRED,
    behind_features,
    input_names,
    outcome_of,
    with_features,
)
from featcache.errors import DataError, RunError
from featcache.evaluation.deciding.decision_file import REFER, Decisions
from featcache.extraction.comparison import find_images
from featcache.heads.prediction import predict_probs
from featcache.heads.run_caches import open_own_caches
from featcache.heads.streaming import StoredFeatures
from featcache.metrics.temperature import apply_temperature
from featcache.pixels.images import decode
from featcache.precision import PARITY_BOUNDS, format_bound, parity_bound, relative_errors
from featcache.runtime import available_cores, exact_fp32

BATCHES = (1, 2, 7, 64)
HEAD_BOUND = 1e-4
"""Largest difference of a probability that the head makes of equal features."""

_NUM_PHANTOMS, _NUM_ROWS = 8, 20

_Pixels = Sequence[npt.NDArray[np.uint8]]
"""Of each backbone the same images, (N, S, S, 3) with its own S."""
_Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Parity:
    """What the comparison of an ONNX file with its run came to.

    Attributes:
        bound: Largest relative L2 error of an image's features that is allowed.
        largest_error: That was found.
        num_phantoms: Drawn images that were compared, at each of ``batches``.
        batches: Images a batch.
        num_rows: Real images that were compared: of the caches' rows those nearest the threshold.
        num_unread: Of these rows, images that are not at hand or cannot be read.
        num_within_bound: Compared images so near the threshold that features within the bound
            could change the decision.
        num_changed: Of these, images whose decision is another.
    """

    bound: float
    largest_error: float
    num_phantoms: int
    batches: tuple[int, ...]
    num_rows: int
    num_unread: int
    num_within_bound: int
    num_changed: int


def draw_phantoms(side: int, num_images: int = _NUM_PHANTOMS) -> npt.NDArray[np.uint8]:
    """Return seeded images (N, side, side, 3): two dark lungs in light tissue, grey or tinted."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    images = np.empty((num_images, side, side, 3), np.uint8)
    for number, image in enumerate(images):
        tissue = 210 - 60 * (x**2 + y**2)
        for middle in (-0.45, 0.45):
            width, height = rng.uniform(0.25, 0.4), rng.uniform(0.5, 0.8)
            inside = ((x - middle) / width) ** 2 + ((y - rng.uniform(-0.1, 0.1)) / height) ** 2
            tissue -= rng.uniform(60, 140) * np.exp(-(inside**2))
        spot = (x - rng.uniform(-0.6, 0.6)) ** 2 + (y - rng.uniform(-0.5, 0.5)) ** 2
        tissue += rng.uniform(0, 90) * np.exp(-spot / rng.uniform(0.01, 0.1))
        tissue += rng.normal(0, 6, tissue.shape)
        tint = rng.uniform(0.7, 1, 3) if number % 4 == 3 else np.ones(3)
        image[:] = np.clip(tissue[:, :, None] * tint, 0, 255).round()
    return images


def decision_names(
    decisions: Decisions | None, classes: Sequence[str], task: str, probs: _Array
) -> list[Any]:  # fmt: skip
    """Return the decision of each row: as ``Decisions.apply``, or without it the usual one."""
    if decisions is not None:
        return [[*said] if task == "multilabel" else said for said in decisions.apply(probs)]
    if task == "multilabel":
        return [[classes[i] for i in np.flatnonzero(row > 0.5).tolist()] for row in probs]
    return [classes[i] for i in probs.argmax(axis=1)]


def decision_numbers(
    decisions: Decisions | None, classes: Sequence[str], task: str, probs: _Array
) -> npt.NDArray[np.int64]:
    """Return the decisions as the graph numbers them, (N,) or with several labels (N, C)."""
    said = decision_names(decisions, classes, task, probs)
    if task == "multilabel":
        return np.array([[name in row for name in classes] for row in said], np.int64)
    numbers = {REFER: REFERRED} | {name: number for number, name in enumerate(classes)}
    return np.array([numbers[name] for name in said], np.int64)


def calibrated_probs(decisions: Decisions | None, probs: _Array) -> _Array:
    """Return the calibrated probabilities (N, C), where there is no temperature as they were."""
    if decisions is None:
        return probs
    softened = probs.copy()
    for name, rule in decisions.rules.items():
        if rule["temperature"] is None:
            continue
        if decisions.task != "multilabel":
            return apply_temperature(probs, rule["temperature"])
        column = decisions.classes.index(name)
        softened[:, column] = decisions.calibrate(probs)[name]
    return softened


def distance_to_threshold(decisions: Decisions | None, task: str, probs: _Array) -> _Array:
    """Return how much the probabilities of each row may change without another decision, (N,)."""
    if task == "multilabel":
        columns = np.full(probs.shape[1], 0.5)
        for name, rule in {} if decisions is None else decisions.rules.items():
            assert decisions is not None
            columns[decisions.classes.index(name)] = rule["threshold"]
        of_labels: _Array = np.abs(probs - columns).min(axis=1)
        return of_labels
    others, distance = probs, np.full(len(probs), np.inf)
    goes_to_others = np.ones(len(probs), bool)
    if decisions is not None:
        ((name, rule),) = decisions.rules.items()
        of_class = probs[:, decisions.classes.index(name)]
        limits = [limit for limit in (rule["threshold"], rule["refer_below"]) if limit is not None]
        distance = np.min([np.abs(of_class - limit) for limit in limits], axis=0)
        others = np.delete(probs, decisions.classes.index(name), axis=1)
        goes_to_others = of_class < rule["threshold"]
    if others.shape[1] > 1:
        first, second = np.sort(others, axis=1)[:, :-3:-1].T
        gap = np.where(goes_to_others, (first - second) / 2, np.inf)
        distance = np.minimum(distance, gap)
    return distance


def probability_reach(classifier: Classifier, features: _Array, bound: float) -> _Array:
    """Return how far probabilities (N,) can move when features (N, D) move by a relative bound.

    To first order: the length of the step times the largest slope of a class's probability; and
    what the head's own rounding may add.
    """
    outcome = outcome_of(classifier)
    leaf = torch.from_numpy(features).requires_grad_()
    with torch.enable_grad(), exact_fp32():
        probs = outcome.probabilities(leaf)
        slopes = [
            torch.autograd.grad(probs[:, column].sum(), leaf, retain_graph=True)[0].norm(dim=1)
            for column in range(probs.shape[1])
        ]
    lengths = np.linalg.norm(features.astype(np.float64), axis=1)
    reach: _Array = bound * lengths * torch.stack(slopes).amax(0).double().numpy() + HEAD_BOUND
    return reach


def check_model(
    classifier: Classifier, model: bytes, where: Path, data: str | Path | None
) -> Parity:
    """Compare an ONNX file with the run that it was made of.

    Args:
        classifier: The run, with its backbones.
        model: The file's bytes.
        where: Its name, for messages.
        data: The images of the run's caches; None compares drawn images only.

    Raises:
        RunError: If features, probabilities or decisions differ.
        DataError: If ``data`` has none of the images.
    """
    num_features = classifier.run.head.num_features
    session = onnx_session(with_features(model, num_features), available_cores())
    sides = [recipe.backbone.image_size for recipe in classifier.recipes]
    phantoms = [draw_phantoms(side) for side in sides]
    checks = [_Check(classifier, phantoms, where)]
    for size in BATCHES:
        order = np.arange(size) % _NUM_PHANTOMS
        checks[0].compare(session, order, f"batch of {size}")
    checks[0].compare_outcome(onnx_session(behind_features(model, num_features), 1))
    num_rows = num_unread = 0
    if data is not None:
        pixels, num_unread = _read_nearest(classifier, data)
        num_rows = len(pixels[0])
        if num_rows:
            checks.append(_Check(classifier, pixels, where))
            for row in range(num_rows):
                checks[1].compare(session, np.array([row]), "images of the cache")
    return Parity(
        max(check.bound for check in checks), max(check.largest for check in checks),
        _NUM_PHANTOMS, BATCHES, num_rows, num_unread,
        sum(int(check.is_near.sum()) for check in checks),
        sum(len(check.changed) for check in checks),
    )  # fmt: skip


class _Check:
    """Some images, what the run makes of them, and how far a graph is from it."""

    def __init__(self, classifier: Classifier, pixels: _Pixels, where: Path) -> None:
        self._classifier, self._pixels, self._where = classifier, pixels, where
        self.largest, self.changed = 0.0, set[int]()
        backbones = [recipe.backbone for recipe in classifier.recipes]
        parts = [eager_features(b, p) for b, p in zip(backbones, pixels, strict=True)]
        self._features = np.concatenate(parts, axis=1)
        self._parts = parts
        self.bound = PARITY_BOUNDS["fp32"]
        run = classifier.run
        self._probs = predict_probs(run.head, run.state, self._features, run.task)
        self._measure_reach()

    def _measure_reach(self) -> None:
        """Find the images whose decision could change within the bound."""
        run, decisions = self._classifier.run, self._classifier.decisions
        self._decision = self._number(self._probs)
        reach = probability_reach(self._classifier, self._features, self.bound)
        self.is_near = distance_to_threshold(decisions, run.task, self._probs) <= reach

    def _number(self, probs: _Array) -> _Array:
        run = self._classifier.run
        return decision_numbers(self._classifier.decisions, run.classes, run.task, probs)

    def compare(self, session: Any, rows: _Array, what: str) -> None:
        """Run a batch of the images and compare it.

        Raises:
            RunError: If it is not what the run makes of them.
        """
        names = input_names(len(self._pixels))
        batch = {n: p[rows] for n, p in zip(names, self._pixels, strict=True)}
        try:
            probs, calibrated, decision, features = session.run(None, batch)
        except Exception as error:  # ONNX Runtime's own errors have no common class
            raise self._refusal(
                what, "outputs", (str(error) or type(error).__name__).splitlines()[0][:200]
            ) from error
        self._compare_features(features, rows, what)
        self._compare_outputs((probs, calibrated, decision), features, what)
        differs = (decision != self._decision[rows]).reshape(len(rows), -1).any(axis=1)
        if (differs & ~self.is_near[rows]).any():
            found = f"{int((differs & ~self.is_near[rows]).sum())} others"
            raise self._refusal(what, "the run's decisions away from the threshold", found)
        self.changed |= set(rows[differs].tolist())

    def compare_outcome(self, session: Any) -> None:
        """Compare what follows the features, on lines through those of the images.

        Few images lie near a threshold. A line through two passes through all probabilities, as a
        rule, so that a wrong threshold or temperature shows.

        Args:
            session: Of ``behind_features``.
        """
        steps = np.linspace(-20, 21, 165, dtype=np.float32)[:, None]
        for first, second in zip(self._features, np.roll(self._features, 1, axis=0), strict=True):
            features = first + steps * (second - first)
            outputs = session.run(None, {FEATURES: features})
            self._compare_outputs(outputs, features, "features between those of images")

    def _compare_outputs(self, outputs: Sequence[_Array], features: _Array, what: str) -> None:
        """Compare outputs with what NumPy makes of the features."""
        run, decisions = self._classifier.run, self._classifier.decisions
        probs, calibrated, decision = outputs
        wanted = predict_probs(run.head, run.state, features, run.task)
        for found, expected, name in (
            (probs, wanted, "probabilities"),
            (calibrated, calibrated_probs(decisions, probs), "calibrated probabilities"),
        ):
            worst = float(np.abs(found - expected).max())
            if not worst <= HEAD_BOUND:
                raise self._refusal(what, f"{name} within {HEAD_BOUND:.0e}", f"{worst:.1e}")
        if not np.array_equal(self._number(probs), decision):
            raise self._refusal(what, "decisions by the thresholds", "others")

    def _compare_features(self, features: _Array, rows: _Array, what: str) -> None:
        """Compare the features of each backbone; see ``engine.build_engine`` for the bound."""
        start = 0
        for number, part in enumerate(self._parts):
            found = features[:, start : start + part.shape[1]]
            start += part.shape[1]
            worst = max(relative_errors(found, part[rows]))
            if worst > self.bound:
                backbone = self._classifier.recipes[number].backbone
                spread = measure_spread(backbone, self._pixels[number], part)
                self.bound = max(self.bound, parity_bound("fp32", spread))
                self._measure_reach()
            if worst > self.bound:
                raise self._refusal(what, f"features within {format_bound(self.bound)}",
                                    f"{worst:.1e}")  # fmt: skip
            self.largest = max(self.largest, worst)

    def _refusal(self, what: str, expected: str, found: str) -> RunError:
        return RunError(
            f"exported ONNX, {what}", expected=f"{expected}, as the run", found=found,
            where=self._where, hint="It was not kept. Export FILE.pt instead, and please report it",
        )  # fmt: skip


def _read_nearest(classifier: Classifier, data: str | Path) -> tuple[_Pixels, int]:
    """Return pixels of the caches' rows nearest the threshold, and how many could not be read."""
    run = classifier.run
    cache = open_own_caches(run)
    dataset, samples, _ = find_images(caches_of(cache)[0], data)
    keys, distances = list[tuple[str, str]](), [np.empty(0)]
    for name, split in cache.splits.items():
        rows = StoredFeatures(split, np.arange(len(split)), plain=True)
        probs = predict_probs(run.head, run.state, rows, run.task)
        distances.append(distance_to_threshold(classifier.decisions, run.task, probs))
        keys += [(name, path) for path in split.paths]
    nearest = np.argsort(np.concatenate(distances), kind="stable")[:_NUM_ROWS]
    found: list[list[npt.NDArray[np.uint8]]] = []
    for number in nearest.tolist():
        sample = samples.get(keys[number])
        try:
            if sample is not None:
                content = dataset.read(sample)
                found.append([decode(content, r.rules).pixels for r in classifier.recipes])
        except DataError:
            continue
    return [_stack(p) for p in zip(*found, strict=True)] or [np.empty((0, 1, 1, 3), np.uint8)], len(
        nearest
    ) - len(found)


def _stack(images: Iterable[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    return np.stack(list(images))
