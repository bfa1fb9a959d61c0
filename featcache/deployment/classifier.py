"""Classify new images with a trained run, and export backbone and head as one network.

Reads: runs, images or caches. Writes: exported files.
"""

from __future__ import annotations

import copy
import hashlib
import io
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from featcache.backbones.backbone import Backbone
from featcache.backbones.engine import build_engine, eager_features
from featcache.cache.reading import open_cache
from featcache.data.dataset import ImageDataset, list_images
from featcache.errors import ConfigError, RunError
from featcache.extraction.pipeline import Lane, stream_features
from featcache.extraction.recipe import Recipe, decode_probes, recipe_from_identity
from featcache.files import join_names, readable_json, write_bytes, write_csv
from featcache.heads.fit import predict_probs
from featcache.heads.run import Run, load_head, load_run, require_same_features
from featcache.heads.streaming import StoredFeatures
from featcache.pixels.views import PLAIN
from featcache.precision import relative_errors
from featcache.runtime import resolve_device

_OUTPUTS = {
    "multiclass": "logits (B, C); softmax gives the probabilities of the classes in order",
    "multilabel": "logits (B, C); sigmoid gives the probability of each class in order, one by one",
}
_EXPORT_TOLERANCE = 1e-4  # relative, on logits: another summation order, nothing more


@dataclass(frozen=True)
class Predictions:
    """Predictions of a number of images.

    Attributes:
        classes: C class names.
        paths: N paths, in the order of ``probs``.
        probs: (N, C) probabilities: of one class an image the softmax, of several labels the
            sigmoid.
        failures: (path, reason) of images that could not be read.
        average_views: Whether a row of several views has the mean of their probabilities.
        task: ``multiclass``, or ``multilabel``: several labels an image.
    """

    classes: tuple[str, ...]
    paths: tuple[str, ...]
    probs: npt.NDArray[np.float64]
    failures: tuple[tuple[str, str], ...]
    average_views: bool = False
    task: str = "multiclass"

    @property
    def preds(self) -> tuple[Any, ...]:
        """The class of each image: the one of the largest probability.

        Of several labels, a tuple of those above 0.5.
        """
        if self.task == "multilabel":
            return tuple(
                tuple(self.classes[i] for i in np.flatnonzero(row > 0.5)) for row in self.probs
            )
        return tuple(self.classes[i] for i in self.probs.argmax(axis=1)) if len(self.probs) else ()

    def as_json(self) -> dict[str, Any]:
        """Return the predictions as JSON values."""
        has_labels, rows = self.task == "multilabel", []
        for path, pred, row in zip(self.paths, self.preds, self.probs, strict=True):
            called = {"preds": [*pred]} if has_labels else {"pred": pred, "prob": float(row.max())}
            rows.append({"path": path, **called, "probs": row.tolist()})
        return {
            "classes": list(self.classes),
            "task": self.task,
            "predictions": rows,
            "failures": [{"path": path, "reason": reason} for path, reason in self.failures],
            "average_views": self.average_views,
        }


@dataclass(frozen=True)
class Classifier:
    """A backbone and a trained head: what a user deploys.

    Attributes:
        run: The run the head comes from.
        recipe: Backbone and preprocessing, those of the run's cache.
        head: Features to logits, eval mode.
        device: Where it runs.
        batch_size: Images a batch.
    """

    run: Run
    recipe: Recipe
    head: nn.Sequential
    device: torch.device
    batch_size: int | str = "auto"

    def predict(self, images: Iterable[str | Path] | ImageDataset) -> Predictions:
        """Classify image files and folders of images, with the decoding of the extraction.

        Args:
            images: Paths, or a scanned data set.

        Raises:
            DataError: If a path leads nowhere, or a folder holds no image.
        """
        dataset = images if isinstance(images, ImageDataset) else list_images(images)
        samples, plain = dataset.samples, replace(self.recipe, view_rules=PLAIN)
        engine = build_engine(
            plain.backbone, self.device, decode_probes(dataset, samples, plain.rules),
            batch_size=self.batch_size, num_images=len(samples),
        )  # fmt: skip
        rows: list[npt.NDArray[np.float32]] = []
        paths, failures = [], []
        for batch in stream_features(dataset, samples, [Lane(plain, engine)]):
            for outcome, features in zip(batch.outcomes, batch.features[0], strict=True):
                if features is not None:
                    rows.append(features)
                    paths.append(outcome.sample.path)
                else:
                    failures.append((outcome.sample.path, str(outcome.reason)))
        features = np.concatenate([np.empty((0, engine.num_features), np.float32), *rows])
        probs = predict_probs(self.head, features, self.device, self.run.task)
        return Predictions(
            self.run.classes, tuple(paths), probs, tuple(failures), task=self.run.task
        )

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

    def export(self, file: str | Path) -> dict[str, Any]:
        """Write the state dict of backbone and head, and ``FILE.json`` with how to use it.

        The file loads with ``strict=True`` into the backbone's library once its classifier was
        replaced by the head's ``nn.Sequential``.

        Args:
            file: ``NAME.pt``; must not exist.

        Returns:
            What was written to ``FILE.json``.

        Raises:
            ConfigError: If the file's ending is not ``.pt``.
            RunError: If the file exists, or the network disagrees with the cached path.
        """
        path = Path(file)
        check_export_path(path)
        network = self.as_network()
        self._check_network(network)
        buffer = io.BytesIO()
        torch.save(network.state_dict(), buffer)
        facts = self._export_facts(hashlib.sha256(buffer.getvalue()).hexdigest())
        beside = path.with_name(path.name + ".json")
        write_bytes(beside, readable_json(facts).encode())
        try:
            write_bytes(path, buffer.getvalue())
        except BaseException:  # or the next try would be refused: the file exists
            beside.unlink(missing_ok=True)
            raise
        return facts

    def _check_network(self, network: nn.Module) -> None:
        """Compare the joined network with backbone, then head, on two seeded images."""
        backbone = self.recipe.backbone
        shape = (2, backbone.image_size, backbone.image_size, 3)
        pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone.mean, backbone.std))
        with torch.inference_mode():
            images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std
            joined = network(images).numpy()
            features = torch.from_numpy(eager_features(backbone, pixels))
            apart = copy.deepcopy(self.head).cpu()(features).numpy()
        worst = max(relative_errors(joined, apart))
        if worst > _EXPORT_TOLERANCE:
            raise RunError(
                "exported network", expected=f"logits within {_EXPORT_TOLERANCE:.0e} of the run's",
                found=f"{worst:.1e}", where=self.run.path, hint="Please report this",
            )  # fmt: skip

    def _export_facts(self, sha256: str) -> dict[str, Any]:
        backbone, rules = self.recipe.backbone, self.recipe.rules
        return {
            "format": "featcache-export",
            "format_version": 1,
            "sha256": sha256,
            "backbone": backbone.name,
            "classifier_name": backbone.classifier_name,
            "head": {**self.run.head.as_json(), "layers": [str(layer) for layer in self.head]},
            "task": self.run.task,
            "classes": list(self.run.classes),
            "preprocessing": {
                **rules.as_identity(), "mean": list(backbone.mean), "std": list(backbone.std),
                "input": "RGB, (B, 3, S, S) float32, (pixels / 255 - mean) / std",
            },
            "output": _OUTPUTS[self.run.task],
            "fingerprint": self.run.cache["fingerprint"],
            "head_sha256": self.run.weights_sha256,
        }  # fmt: skip


def check_export_path(path: Path) -> None:
    """Refuse a file to export to before any work is done.

    Raises:
        ConfigError: If its ending is not ``.pt``.
        RunError: If it exists, or its folder does not.
    """
    if path.suffix != ".pt":
        raise ConfigError(
            "export", expected="a file name ending in .pt", found=path.name,
            hint="It will hold a torch state dict",
        )  # fmt: skip
    beside = path.with_name(path.name + ".json")
    taken = path.exists() or beside.exists()
    if taken or not path.parent.is_dir():
        found = "an existing file" if taken else "no such folder"
        raise RunError(
            "export", expected="a new file in an existing folder", found=found, where=path,
            hint="Choose another name",
        )  # fmt: skip


def load_classifier(
    run: str | Path,
    *,
    weights: str | Path | None = None,
    backbone: Backbone | str | None = None,
    device: str = "auto",
    batch_size: int | str = "auto",
) -> Classifier:
    """Load a run and the backbone its features were made with.

    Args:
        run: The run folder.
        weights: The backbone's weights file, where the library's own were not used.
        backbone: The backbone itself, if it was made in Python; its name, if a ``python:`` function
            makes it.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        batch_size: Images a batch, or ``auto``.

    Raises:
        RunError: If the folder is not a whole run.
        BackboneError: If the backbone's weights are not at hand; names the wanted sha256.
    """
    loaded = load_run(run)
    place = resolve_device(device).torch()
    recipe = recipe_from_identity(loaded.cache["identity"], weights=weights, backbone=backbone)
    return Classifier(loaded, recipe, load_head(loaded).to(place), place, batch_size)


def predict_cache(
    run: str | Path, cache: str | Path, *, device: str = "auto", average_views: bool = False
) -> Predictions:
    """Classify every row of a cache, by view 0: no images and no backbone needed.

    Args:
        run: The run folder.
        cache: The cache.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        average_views: Classify rows of several views by the mean of their views' probabilities.

    Raises:
        ConfigError: If there are to be views averaged, and no split has several.
        RunError: If the run is not whole, or the cache's features were made otherwise.
        CacheError: If the cache is not whole.
    """
    loaded, opened = load_run(run), open_cache(cache)
    require_same_features(loaded.cache["identity"], opened.identity, opened.path)
    if average_views and all(split.num_views == 1 for split in opened.splits.values()):
        raise ConfigError(
            "--average-views", expected="several views of a row", found="one in every split",
            where=opened.path, hint="Extract the images with --views",
        )  # fmt: skip
    place = resolve_device(device).torch()
    head = load_head(loaded).to(place)
    paths, probs = [], [np.empty((0, len(loaded.classes)))]
    for split in opened.splits.values():
        if opened.num_features != loaded.head.num_features:
            raise RunError(
                "features", expected=f"{loaded.head.num_features} a row",
                found=opened.num_features, where=cache, hint="Use the cache it was trained on",
            )  # fmt: skip
        features = StoredFeatures(split, np.arange(len(split)), plain=not average_views)
        probs.append(predict_probs(head, features, place, loaded.task))
        paths += split.paths
    failures = tuple((f.path, f.reason) for f in opened.failures)
    return Predictions(
        loaded.classes, tuple(paths), np.concatenate(probs), failures, average_views, loaded.task
    )


def write_predictions(file: str | Path, predictions: Predictions) -> None:
    """Write a CSV with path, pred, prob and the probability of each class; failures come last.

    Of several labels an image ``preds``, the names joined by ``|``, stands for pred and prob.
    """
    has_labels = predictions.task == "multilabel"
    called = ["preds"] if has_labels else ["pred", "prob"]
    header = ["path", *called, *(f"prob_{name}" for name in predictions.classes), "failure"]
    rows: list[list[object]] = []
    for path, pred, probs in zip(
        predictions.paths, predictions.preds, predictions.probs, strict=True
    ):
        cells = [join_names(pred)] if has_labels else [pred, float(probs.max())]
        rows.append([path, *cells, *map(float, probs), ""])
    blank = [""] * (len(header) - 2)
    rows += [[path, *blank, reason] for path, reason in predictions.failures]
    write_csv(Path(file), header, rows)
