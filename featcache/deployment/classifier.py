"""The classifier: the backbone and the trained head of a run, together.

A run of several caches has a backbone for each: an image is decoded once for all of them, and its
features stand side by side as in the caches.

Reads: a run, images. Writes: nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from featcache.backbones.engine import ONNX_PAYS_FROM, Engine, Images, build_engine
from featcache.cache.by_url import by_url
from featcache.data.dataset import Sample
from featcache.deployment.batches import (
    IMAGES_AT_ONCE,
    Row,
    fit_image,
    join_rows,
    make_batches,
    run_batches,
)
from featcache.deployment.inputs import Inputs, list_inputs
from featcache.deployment.network import join_network
from featcache.deployment.predictions import Predictions
from featcache.deployment.recipes import Backbones, Weights, rebuild_recipes
from featcache.errors import ConfigError, DataError, printable, warn_user
from featcache.evaluation.deciding.decision_file import Decisions, load_decisions
from featcache.evaluation.novelty import Novelty
from featcache.extraction.earlier import refuse_dark_colour
from featcache.extraction.pipeline import Lane, stream_features
from featcache.extraction.recipe import NUM_PROBES, Recipe, decode_probes
from featcache.formatting import join_few
from featcache.heads.prediction import predict_probs
from featcache.heads.run import Run, load_head, load_run
from featcache.pixels.dicom_rules import DicomRules
from featcache.pixels.views import PLAIN
from featcache.runtime import resolve_device
from featcache.untrusted import MAX_PIXELS

if TYPE_CHECKING:
    from featcache.deployment.exporting.delivery import DeliverySummary
    from featcache.deployment.exporting.export import ExportSummary


class Classifier:
    """A backbone and a trained head: what a user deploys. ``load_classifier`` makes one.

    The first prediction chooses the fastest engine that agrees with the plain network on its
    images; later ones use it, so one more image costs one forward pass.

    Attributes:
        run: The run the head comes from.
        recipes: Backbone and preprocessing of each of the run's caches.
        recipe: The first of them, as a rule the only one.
        device: Where the backbone runs.
        batch_size: Images a batch.
        decisions: The thresholds that ``decide`` wrote into the run, None without.
    """

    __module__ = "featcache"

    def __init__(
        self, run: Run, recipes: Sequence[Recipe], device: torch.device,
        batch_size: int | str = "auto", decisions: Decisions | None = None,
    ) -> None:  # fmt: skip
        self.run, self.device, self.batch_size = run, device, batch_size
        self.recipes = tuple(replace(recipe, view_rules=PLAIN) for recipe in recipes)
        self.recipe, self.decisions = self.recipes[0], decisions
        self._has_noted_dicom = all(recipe.rules.dicom is not None for recipe in recipes)
        # Per recipe its engine, and the number of images that it was chosen for.
        self._engines: dict[int, tuple[Engine, int]] = {}

    def __repr__(self) -> str:
        classes = join_few(self.run.classes)
        names = " + ".join(recipe.backbone.name for recipe in self.recipes)
        return f"Classifier({names}: {classes}; on {self.device})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_engines": {}}  # each process chooses its own

    @cached_property
    def head(self) -> nn.Sequential:
        """The head as a torch module on the CPU, eval mode: features (B, D) to logits (B, C)."""
        return load_head(self.run)

    @cached_property
    def novelty(self) -> Novelty | None:
        """What tells whether an image is unlike any training image; None where nothing does."""
        return Novelty.of(self.run)

    def predict(
        self, images: Any, *, preprocessed: bool = False, include: str | Iterable[str] = (),
        exclude: str | Iterable[str] = (), companions: str | None = None,
        columns: Mapping[str, str] | None = None, ignore_columns: str | Iterable[str] = (),
    ) -> Predictions:  # fmt: skip
        """Classify images, in the order they are given, repeats included.

        Files, PIL images and arrays get the same pixels as in the extraction.

        Args:
            images: One or many of: a file, a folder, a CSV or a glob (``str`` or ``Path``; a folder
                stands for all images in it, a CSV for those it names, sorted); a PIL image; a uint8
                array, grey (H, W) or RGB (H, W, 3). Or an array (B, H, W, 3), or what ``scan``
                returned. Or a zip, or tars or Parquet files or folders or globs of them. All paths
                may be URLs, but not some of them.
            preprocessed: ``images`` is a float batch (B, 3, S, S), as ``preprocess`` returns it; of
                several backbones, the tuple of batches that ``preprocess_each`` returns.
            include: Globs on the path below each folder, or on the name of a file: see ``scan``.
            exclude: Globs of files that are left out.
            companions: ``keep`` takes masks and the like in a folder as images; they are an error.
            columns: Column -> its header in a CSV of images.
            ignore_columns: Headers of a CSV of images that are not used.

        Returns:
            The predictions; images that cannot be read are among its ``failures``.

        Raises:
            DataError: If a path leads nowhere, a folder holds no image, or companions of images; or
                if a store refuses or has nothing there.
            ConfigError: If an array or a batch has another shape or dtype.
        """
        names, rows = self._compute(
            images, preprocessed=preprocessed, include=include, exclude=exclude,
            companions=companions, columns=columns, ignore_columns=ignore_columns,
        )  # fmt: skip
        return self.predict_rows(names, rows)

    def predict_rows(
        self, names: Sequence[str], rows: Sequence[npt.NDArray[np.float32] | str]
    ) -> Predictions:  # fmt: skip
        """Return what the head makes of images whose features are at hand.

        Args:
            names: Of each image.
            rows: Of each image its features (D,), or why it could not be read.
        """
        pairs = list(zip(names, rows, strict=True))
        failures = tuple((name, row) for name, row in pairs if isinstance(row, str))
        good = [(name, row) for name, row in pairs if not isinstance(row, str)]
        features, novelty = self._stack([row for _, row in good]), self.novelty
        return Predictions(
            classes=self.run.classes,
            paths=tuple(name for name, _ in good),
            probs=self._head_probs(features),
            failures=failures,
            task=self.run.task,
            unlike_training=None if novelty is None else novelty.find_unlike(features),
            novelty=None if novelty is None else novelty.facts,
        ).with_decisions(self.decisions)

    def predict_proba(self, images: Any, *, preprocessed: bool = False) -> npt.NDArray[np.float64]:
        """Return the probabilities (N, C) of N images, in their order.

        Args:
            images: As for ``predict``.
            preprocessed: As for ``predict``.

        Raises:
            DataError: As for ``predict``, and if an image cannot be read.
            ConfigError: As for ``predict``.
        """
        return self._head_probs(self.transform(images, preprocessed=preprocessed))

    def transform(self, images: Any, *, preprocessed: bool = False) -> npt.NDArray[np.float32]:
        """Return the backbone's features (N, D) float32 of N images, in their order.

        Those of several backbones stand side by side.

        Args:
            images: As for ``predict``.
            preprocessed: As for ``predict``.

        Raises:
            DataError: As for ``predict``, and if an image cannot be read.
            ConfigError: As for ``predict``.
        """
        names, rows = self._compute(images, preprocessed=preprocessed)
        for name, row in zip(names, rows, strict=True):
            if isinstance(row, str):
                raise DataError("image", expected="a readable image", found=row, where=name)
        return self._stack([row for row in rows if not isinstance(row, str)])

    def preprocess(self, images: Any) -> torch.Tensor:
        """Return images as the network takes them: RGB (N, 3, S, S) float32, normalized.

        That is ``(pixels / 255 - mean) / std`` of the resized pixels, on the CPU: for ``predict``
        with ``preprocessed=True``, or for the network of ``as_network``.

        Args:
            images: As for ``predict``.

        Raises:
            DataError: As for ``predict``, and if an image cannot be read.
            ConfigError: As for ``predict``, and if there are several backbones.
        """
        if len(self.recipes) > 1:
            raise ConfigError(
                "preprocess", expected="one backbone", found=len(self.recipes),
                hint="preprocess_each returns a batch for each",
            )  # fmt: skip
        return self.preprocess_each(images)[0]

    def preprocess_each(self, images: Any) -> tuple[torch.Tensor, ...]:
        """Return what ``preprocess`` returns, for each backbone: their sizes may differ.

        Args:
            images: As for ``predict``.

        Raises:
            DataError: As for ``predict``, and if an image cannot be read.
            ConfigError: As for ``predict``.
        """
        inputs = list_inputs(images)
        if inputs.dataset.has_dicom:
            self.note_dicom()
        return make_batches(inputs, self.recipes)

    def _compute(
        self, images: Any, *, preprocessed: bool, **listing: Any
    ) -> tuple[Sequence[str], list[Row]]:
        """Return the names of images, and of each its features, or why it could not be read."""
        if preprocessed:
            features = run_batches(images, self.recipes, self.networks, self.device)
            return [str(i) for i in range(len(features))], [*features]
        inputs = list_inputs(images, **listing)
        files = self._run_files(inputs)
        in_memory = iter(self._run_opened([i for i in inputs.images if not isinstance(i, Sample)]))
        return inputs.names, [
            files[image] if isinstance(image, Sample) else next(in_memory)
            for image in inputs.images
        ]

    def _run_files(self, inputs: Inputs) -> dict[Sample, Row]:
        dataset = inputs.dataset
        if not dataset.samples:
            return {}
        if dataset.has_dicom:
            self.note_dicom()
        made: list[dict[Sample, Row]] = [{} for _ in self.recipes]
        for numbers in self.decoded_alike():
            lanes = []
            for number in numbers:
                recipe = self.recipes[number]
                refuse_dark_colour(recipe, dataset, self.run.path)
                rules = recipe.rules.with_dicom()
                probes = partial(decode_probes, dataset, dataset.samples, rules)
                engine = self.choose_engine(number, len(dataset.samples), probes)
                lanes.append(Lane(replace(recipe, rules=rules), engine))
            for batch in stream_features(dataset, dataset.samples, lanes):
                for number, of_lane in zip(numbers, batch.features, strict=True):
                    for outcome, features in zip(batch.outcomes, of_lane, strict=True):
                        made[number][outcome.sample] = (
                            str(outcome.reason) if features is None else features[0]
                        )
        return {sample: join_rows([rows[sample] for rows in made]) for sample in dataset.samples}

    def note_dicom(self) -> None:
        """Warn, once, that a run that was trained without DICOM files sees such files now."""
        if not self._has_noted_dicom:
            self._has_noted_dicom = True
            warn_user(
                f"{printable(self.run.path)} was trained without DICOM files, and sees them now: "
                f"{DicomRules().describe()}"
            )

    def decoded_alike(self) -> Iterable[list[int]]:
        """Return the numbers of the recipes in groups that can share a decoded picture."""
        groups: dict[tuple[object, ...], list[int]] = {}
        for number, recipe in enumerate(self.recipes):
            rules = recipe.rules
            alike = (rules.bit_depth, rules.truncated, rules.dicom)
            groups.setdefault(alike, []).append(number)
        return groups.values()

    def _run_opened(self, images: Sequence[Any]) -> Iterator[Row]:
        """Yield the features of PIL images and arrays, or why they could not be used."""
        for i in range(0, len(images), IMAGES_AT_ONCE):
            part = images[i : i + IMAGES_AT_ONCE]
            made = [self._run_pixels(n, part, len(images)) for n in range(len(self.recipes))]
            yield from map(join_rows, zip(*made, strict=True))

    def _run_pixels(self, number: int, images: Sequence[Any], num_images: int) -> list[Row]:
        """Return the features of some images by one recipe, ``num_images`` being all of them."""
        fitted: list[npt.NDArray[np.uint8] | str] = []
        for image in images:
            try:
                fitted.append(fit_image(image, self.recipes[number]))
            except DataError as error:
                fitted.append(str(error.found))
        pixels = [image for image in fitted if not isinstance(image, str)]
        engine = self.choose_engine(number, num_images, partial(list, pixels[:NUM_PROBES]))
        rows = iter(engine.run(pixels))
        return [image if isinstance(image, str) else next(rows) for image in fitted]

    def choose_engines(self, draw: Callable[[int], Images]) -> tuple[Engine, ...]:
        """Return the engine of each backbone for many images, chosen before there is one.

        Args:
            draw: Gives images of a side in pixels, to compare an engine with the plain network on.
        """
        return tuple(
            self.choose_engine(number, ONNX_PAYS_FROM, partial(draw, recipe.backbone.image_size))
            for number, recipe in enumerate(self.recipes)
        )

    def choose_engine(
        self, number: int, num_images: int, probes: Callable[[], Images]
    ) -> Engine:  # fmt: skip
        """Return the engine to run so many images: the one there is, or a new one.

        Args:
            number: Of the recipe.
            num_images: How many; where there are many, an export to ONNX pays.
            probes: Gives a few of them, to compare a new engine with the plain network on.
        """
        known, chosen_for = self._engines.get(number, (None, 0))
        if known is not None and not chosen_for < ONNX_PAYS_FROM <= num_images:
            return known
        engine = build_engine(
            self.recipes[number].backbone, self.device, probes(), batch_size=self.batch_size,
            num_images=num_images,
        )  # fmt: skip
        if engine.parity:  # else no image could be read, and nothing was compared
            self._engines[number] = engine, num_images
        return engine

    @cached_property
    def networks(self) -> list[nn.Module]:
        """The libraries' networks on the device."""
        networks = [recipe.backbone.network.eval() for recipe in self.recipes]
        if self.device.type == "cpu":
            return networks
        return [copy.deepcopy(network).to(self.device) for network in networks]

    def _stack(self, rows: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        return np.array(rows, np.float32).reshape(-1, self.run.head.num_features)

    def _head_probs(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        return predict_probs(self.run.head, self.run.state, features, self.run.task)

    def as_network(self) -> nn.Module:
        """Return backbone and head as one module, (B, 3, S, S) normalized pixels to logits (B, C).

        The head stands where the library's classifier was (``_fc`` of efficientnet_pytorch), or
        behind the backbone where it had none. Of several backbones it takes a batch for each.
        """
        return join_network([recipe.backbone for recipe in self.recipes], self.head)

    def export(self, file: str | Path) -> ExportSummary | DeliverySummary:
        """Write backbone and head as one network: see ``featcache.export``."""
        from featcache.deployment.exporting.export import export_classifier

        return export_classifier(self, file)


@by_url("run")
def load_classifier(
    run: str | Path,
    *,
    weights: Weights = None,
    backbone: Backbones = None,
    device: str = "auto",
    batch_size: int | str = "auto",
    max_pixels: int = MAX_PIXELS,
) -> Classifier:
    """Load a run and the backbone its features were made with.

    Args:
        run: The run folder.
        weights: The backbone's weights file, where the library's own were not used. Of a run of
            several caches, a file for all of them or a list in their order.
        backbone: The backbone itself, if it was made in Python; its name, if a ``python:`` function
            makes it. Of a run of several caches, a list in any order.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        batch_size: Images a batch, or ``auto``.
        max_pixels: Image files of more pixels are refused.

    Raises:
        RunError: If the folder is not a whole run, or its ``decision.json`` is damaged or of
            another head.
        BackboneError: If the backbone's weights are not at hand; names the wanted sha256.
        ConfigError: If there are several weights files, and not one for each cache.
    """
    loaded = load_run(run)
    decisions = load_decisions(loaded)
    place = resolve_device(device).torch()
    recipes = rebuild_recipes(loaded, weights, backbone, max_pixels)
    return Classifier(loaded, recipes, place, batch_size, decisions)
