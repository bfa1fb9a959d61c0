"""The classifier: the backbone and the trained head of a run, together.

Reads: a run, images. Writes: nothing.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from featcache.backbones.backbone import Backbone
from featcache.backbones.engine import ONNX_PAYS_FROM, Engine, Images, build_engine
from featcache.data.dataset import Sample
from featcache.deployment.inputs import Inputs, list_inputs
from featcache.deployment.predictions import Predictions
from featcache.errors import ConfigError, DataError
from featcache.evaluation.decision_file import Decisions, load_decisions
from featcache.evaluation.novelty import Novelty
from featcache.extraction.earlier import refuse_dark_colour
from featcache.extraction.pipeline import Lane, stream_features
from featcache.extraction.recipe import NUM_PROBES, Recipe, decode_probes, recipe_from_identity
from featcache.formatting import join_few
from featcache.heads.prediction import predict_probs
from featcache.heads.run import Run, load_head, load_run
from featcache.pixels.images import load, load_opened, resize_to_square
from featcache.pixels.views import PLAIN
from featcache.runtime import exact_fp32, resolve_device
from featcache.untrusted import MAX_PIXELS

if TYPE_CHECKING:
    from featcache.deployment.export import ExportSummary

_IMAGES_AT_ONCE = 64  # of those in memory: 10 MB of pixels at 224 x 224

_Row: TypeAlias = npt.NDArray[np.float32] | str
"""The features (D,) of an image, or why it could not be read."""


class Classifier:
    """A backbone and a trained head: what a user deploys. ``load_classifier`` makes one.

    The first prediction chooses the fastest engine that agrees with the plain network on its
    images; later ones use it, so one more image costs one forward pass.

    Attributes:
        run: The run the head comes from.
        recipe: Backbone and preprocessing, those of the run's cache.
        device: Where the backbone runs.
        batch_size: Images a batch.
        decisions: The thresholds that ``decide`` wrote into the run, None without.
    """

    __module__ = "featcache"

    def __init__(
        self, run: Run, recipe: Recipe, device: torch.device, batch_size: int | str = "auto",
        decisions: Decisions | None = None,
    ) -> None:  # fmt: skip
        self.run, self.device, self.batch_size = run, device, batch_size
        self.recipe, self.decisions = replace(recipe, view_rules=PLAIN), decisions
        self._engine: Engine | None = None
        self._num_images = 0  # that the engine was chosen for

    def __repr__(self) -> str:
        classes = join_few(self.run.classes)
        return f"Classifier({self.recipe.backbone.name}: {classes}; on {self.device})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_engine": None}  # each process chooses its own

    @cached_property
    def head(self) -> nn.Sequential:
        """The head as a torch module on the CPU, eval mode: features (B, D) to logits (B, C)."""
        return load_head(self.run)

    @cached_property
    def _novelty(self) -> Novelty | None:
        return Novelty.of(self.run)

    def predict(
        self, images: Any, *, preprocessed: bool = False, include: str | Iterable[str] = (),
        exclude: str | Iterable[str] = (), companions: str | None = None,
        columns: Mapping[str, str] | None = None, ignore_columns: str | Iterable[str] = (),
    ) -> Predictions:  # fmt: skip
        """Classify images, in the order they are given, repeats included.

        Files, PIL images and arrays get the same pixels as in the extraction.

        Args:
            images: One or many of: a file, a folder or a CSV (``str`` or ``Path``; a folder stands
                for all images in it, a CSV for those it names, sorted); a PIL image; a uint8 array,
                grey (H, W) or RGB (H, W, 3). Or an array (B, H, W, 3), or what ``scan`` returned.
            preprocessed: ``images`` is a float batch (B, 3, S, S), as ``preprocess`` returns it.
            include: Globs on the path below each folder, or on the name of a file: see ``scan``.
            exclude: Globs of files that are left out.
            companions: ``keep`` takes masks and the like in a folder as images; they are an error.
            columns: Column -> its header in a CSV of images.
            ignore_columns: Headers of a CSV of images that are not used.

        Returns:
            The predictions; images that cannot be read are among its ``failures``.

        Raises:
            DataError: If a path leads nowhere, a folder holds no image, or companions of images.
            ConfigError: If an array or a batch has another shape or dtype.
        """
        names, rows = self._compute(
            images, preprocessed=preprocessed, include=include, exclude=exclude,
            companions=companions, columns=columns, ignore_columns=ignore_columns,
        )  # fmt: skip
        pairs = list(zip(names, rows, strict=True))
        failures = tuple((name, row) for name, row in pairs if isinstance(row, str))
        good = [(name, row) for name, row in pairs if not isinstance(row, str)]
        features, novelty = self._stack([row for _, row in good]), self._novelty
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
            ConfigError: As for ``predict``.
        """
        inputs, backbone = list_inputs(images), self.recipe.backbone
        pixels = np.empty((len(inputs.images), *[backbone.image_size] * 2, 3), np.uint8)
        for slot, image in zip(pixels, inputs.images, strict=True):
            fitted = self._fit(inputs.dataset.read(image) if isinstance(image, Sample) else image)
            slot[:] = fitted[:, :, None] if fitted.ndim == 2 else fitted
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone.mean, backbone.std))
        scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        normalized: torch.Tensor = (scaled - mean) / std
        return normalized

    def _fit(self, image: Any) -> npt.NDArray[np.uint8]:
        """Return pixels (S, S) or (S, S, 3) of a file's bytes, a PIL image or an array."""
        rules = self.recipe.rules
        picture = load(image, rules) if isinstance(image, bytes) else load_opened(image, rules)
        return resize_to_square(picture.pixels, rules)

    def _compute(
        self, images: Any, *, preprocessed: bool, **listing: Any
    ) -> tuple[Sequence[str], list[_Row]]:
        """Return the names of images, and of each its features, or why it could not be read."""
        if preprocessed:
            features = self._run_preprocessed(images)
            return [str(i) for i in range(len(features))], [*features]
        inputs = list_inputs(images, **listing)
        files = self._run_files(inputs)
        in_memory = iter(self._run_opened([i for i in inputs.images if not isinstance(i, Sample)]))
        return inputs.names, [
            files[image] if isinstance(image, Sample) else next(in_memory)
            for image in inputs.images
        ]

    def _run_files(self, inputs: Inputs) -> dict[Sample, _Row]:
        dataset, rows = inputs.dataset, dict[Sample, _Row]()
        if not dataset.samples:
            return rows
        refuse_dark_colour(self.recipe, dataset, self.run.path)
        engine = self._choose_engine(
            len(dataset.samples),
            lambda: decode_probes(dataset, dataset.samples, self.recipe.rules),
        )
        for batch in stream_features(dataset, dataset.samples, [Lane(self.recipe, engine)]):
            for outcome, features in zip(batch.outcomes, batch.features[0], strict=True):
                rows[outcome.sample] = str(outcome.reason) if features is None else features[0]
        return rows

    def _run_opened(self, images: Sequence[Any]) -> Iterator[_Row]:
        """Yield the features of PIL images and arrays, or why they could not be used."""
        for i in range(0, len(images), _IMAGES_AT_ONCE):
            fitted: list[npt.NDArray[np.uint8] | str] = []
            for image in images[i : i + _IMAGES_AT_ONCE]:
                try:
                    fitted.append(self._fit(image))
                except DataError as error:
                    fitted.append(str(error.found))
            pixels = [image for image in fitted if not isinstance(image, str)]
            probes = pixels[:NUM_PROBES]
            engine = self._choose_engine(len(images), partial(list, probes))
            rows = iter(engine.run(pixels))
            yield from (image if isinstance(image, str) else next(rows) for image in fitted)

    def _choose_engine(self, num_images: int, probes: Callable[[], Images]) -> Engine:
        """Return the engine to run so many images: the one there is, or a new one.

        Args:
            num_images: How many; where there are many, an export to ONNX pays.
            probes: Gives a few of them, to compare a new engine with the plain network on.
        """
        pays = self._num_images < ONNX_PAYS_FROM <= num_images
        if self._engine is not None and not pays:
            return self._engine
        engine = build_engine(
            self.recipe.backbone, self.device, probes(), batch_size=self.batch_size,
            num_images=num_images,
        )  # fmt: skip
        if engine.parity:  # else no image could be read, and nothing was compared
            self._engine, self._num_images = engine, num_images
        return engine

    def _run_preprocessed(self, batch: Any) -> npt.NDArray[np.float32]:
        """Return the features (B, D) of a preprocessed batch, by the library's own network."""
        side = self.recipe.backbone.image_size
        shape = tuple(getattr(batch, "shape", ()))
        if not (
            isinstance(batch, torch.Tensor)
            and batch.is_floating_point()
            and shape == (len(batch), 3, side, side)
        ):
            raise ConfigError(
                "preprocessed images", expected=f"a float tensor (B, 3, {side}, {side})",
                found=f"{getattr(batch, 'dtype', type(batch).__name__)} {shape}",
                hint="Make it with preprocess, or leave preprocessed=True out",
            )  # fmt: skip
        with torch.inference_mode(), exact_fp32():
            parts = torch.split(batch.to(torch.float32), _IMAGES_AT_ONCE)
            rows = [r for p in parts for r in self._network(p.to(self.device)).cpu().numpy()]
        return self._stack(rows)

    @cached_property
    def _network(self) -> nn.Module:
        """The library's network on the device."""
        network = self.recipe.backbone.network.eval()
        return network if self.device.type == "cpu" else copy.deepcopy(network).to(self.device)

    def _stack(self, rows: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        return np.array(rows, np.float32).reshape(-1, self.recipe.backbone.num_features)

    def _head_probs(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        return predict_probs(self.run.head, self.run.state, features, self.run.task)

    def as_network(self) -> nn.Module:
        """Return backbone and head as one module, (B, 3, S, S) normalized pixels to logits (B, C).

        The head stands where the library's classifier was (``_fc`` of efficientnet_pytorch), or
        behind the backbone where it had none.
        """
        network = copy.deepcopy(self.recipe.backbone.network)
        head = copy.deepcopy(self.head).cpu()
        name = self.recipe.backbone.classifier_name
        if name is None:
            return nn.Sequential(OrderedDict(backbone=network, head=head)).eval()
        network.set_submodule(name, head)
        return network.eval()

    def export(self, file: str | Path) -> ExportSummary:
        """Write backbone and head as one state dict: see ``featcache.export``."""
        from featcache.deployment.export import export_classifier

        return export_classifier(self, Path(file))


def load_classifier(
    run: str | Path,
    *,
    weights: str | Path | None = None,
    backbone: Backbone | str | None = None,
    device: str = "auto",
    batch_size: int | str = "auto",
    max_pixels: int = MAX_PIXELS,
) -> Classifier:
    """Load a run and the backbone its features were made with.

    Args:
        run: The run folder.
        weights: The backbone's weights file, where the library's own were not used.
        backbone: The backbone itself, if it was made in Python; its name, if a ``python:`` function
            makes it.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        batch_size: Images a batch, or ``auto``.
        max_pixels: Image files of more pixels are refused.

    Raises:
        RunError: If the folder is not a whole run, or its ``decision.json`` is damaged or of
            another head.
        BackboneError: If the backbone's weights are not at hand; names the wanted sha256.
    """
    loaded = load_run(run)
    decisions = load_decisions(loaded)
    place = resolve_device(device).torch()
    recipe = recipe_from_identity(
        loaded.cache["identity"], weights=weights, backbone=backbone, max_pixels=max_pixels,
        source=loaded.cache.get("weights_source"),
    )  # fmt: skip
    return Classifier(loaded, recipe, place, batch_size, decisions)
