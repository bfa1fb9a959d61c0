"""Export: backbone and head of a run as one network, for use without featcache.

Reads: a run. Writes: ``FILE.pt`` and ``FILE.pt.json``; ``FILE.onnx``; or a folder.
"""

from __future__ import annotations

import copy
import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from featcache.backbones.engine import eager_features
from featcache.cache.by_url import by_url
from featcache.deployment.classifier import Classifier, load_classifier
from featcache.deployment.recipes import Backbones, Weights
from featcache.errors import ConfigError, RunError
from featcache.extraction.recipe import Recipe
from featcache.files import local_path, readable_json, result_as_dict
from featcache.formatting import brief_repr
from featcache.heads.head import build_head
from featcache.output_folders import check_folder
from featcache.outputs import Kind, Output, write_outputs
from featcache.precision import relative_errors
from featcache.runtime import exact_fp32

if TYPE_CHECKING:
    from featcache.deployment.exporting.delivery import DeliverySummary

_OUTPUTS = {
    "multiclass": "logits (B, C); softmax gives the probabilities of the classes in order",
    "multilabel": "logits (B, C); sigmoid gives the probability of each class in order, one by one",
}
_OF_MEMBERS = {
    "multiclass": "logsumexp over the members of log_softmax(logits), minus log of their number",
    "multilabel": "logsumexp over the members of logsigmoid(logits), minus that of their negatives",
}
RULES = {
    "multiclass": "the class if its probability >= threshold (from threshold to below refer_below: "
    "refer), else the most probable other class; probabilities at temperature 1",
    "multilabel": "each class if its probability >= its threshold; probabilities at temperature 1",
}
_NETWORK = Kind("network", "a new file in an existing folder", RunError, needs_folder=True)
_FOLDER = Kind("exported folder", "a new or an empty folder", RunError, is_folder=True)
_OF_ONE = ["backbone", "classifier_name", "preprocessing", "fingerprint"]
_TOLERANCE = 1e-4  # relative, on logits: another summation order, nothing more


@dataclass(frozen=True)
class ExportSummary:
    """What was exported: ``FILE.json`` holds all but the path.

    Of a run of several caches ``FILE.json`` has ``backbones`` in place of the four keys that are of
    one backbone, and format version 2.

    Attributes:
        path: The file with the state dict.
        sha256: Of the file.
        backbone: Name of the backbone; of several, their names joined by `` + ``.
        classifier_name: Name of the module that the head replaces, None where there was none, or
            where several backbones keep none.
        head: The shape of the head, and its ``layers`` as torch prints them. Of an ensemble those
            of each member, with ``num_members`` and, in words, how their logits become the output.
        task: ``multiclass`` or ``multilabel``.
        classes: Names of the outputs, in order.
        preprocessing: How an image becomes the network's input; empty for several.
        output: What the outputs are, in words.
        fingerprint: Of the cache the head was trained on; of several that of the first.
        backbones: Of several side by side, in the order of their features: ``backbone,
            classifier_name`` (of the module to replace by ``nn.Identity``), ``num_features``,
            ``preprocessing`` and ``fingerprint``. Else empty.
        head_sha256: sha256 of the run's weights.
        decision: ``rule``, in words, and ``thresholds``: class -> ``threshold`` and what is known
            of it; None where ``decide`` was not called.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    path: Path
    sha256: str
    backbone: str
    classifier_name: str | None
    head: dict[str, Any]
    task: str
    classes: tuple[str, ...]
    preprocessing: dict[str, Any]
    output: str
    fingerprint: str
    head_sha256: str
    decision: dict[str, Any] | None
    backbones: tuple[dict[str, Any], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as JSON values: what ``FILE.json`` holds."""
        facts = result_as_dict(self)
        several = bool(self.backbones)
        hidden = ["path", *(_OF_ONE if several else ["backbones"])]
        kept = {key: value for key, value in facts.items() if key not in hidden}
        return {"format": "featcache-export", "format_version": 2 if several else 1, **kept}


@by_url("run")
def export(
    run: str | Path,
    file: str | Path,
    *,
    weights: Weights = None,
    backbone: Backbones = None,
    data: str | Path | None = None,
    golden: str | Path | None = None,
) -> ExportSummary | DeliverySummary:
    """Write backbone and head as one network: a state dict, an ONNX file, or a folder.

    ``FILE.pt`` is a state dict; ``FILE.pt.json`` says how to use it. It loads with ``strict=True``
    into the backbone's library once its classifier was replaced by the head's ``nn.Sequential``. Of
    an ensemble it is a module with the heads in an ``nn.ModuleList`` named ``members``: README.md
    of ``featcache/heads`` has its six lines. Of a run of several caches it has the backbones'
    entries under ``backbones.0.``, ``backbones.1.`` and so on, and the head's under ``head.``.

    ``FILE.onnx`` takes uint8 pixels (B, S, S, 3) and gives ``probabilities``, ``calibrated`` and
    ``decision``. It is compared with the run in ONNX Runtime before it gets its name.

    ``FOLDER/`` holds that file, and ``predict.py`` that classifies image files with it and needs
    Pillow, NumPy and onnxruntime alone: see README.md of ``featcache/deployment``.

    Args:
        run: The run folder.
        file: ``NAME.pt``, ``NAME.onnx``, or ``FOLDER/``, with the slash at its end if there is no
            such folder; must not exist, or be an empty folder.
        weights: See ``classifier.load_classifier``.
        backbone: Likewise.
        data: The images of the run's caches: ONNX and folder are also compared on those nearest
            the threshold.
        golden: A folder of real images that FOLDER/ shall hold and be tested with. Those who get it
            can see them.

    Raises:
        ConfigError: If the file's ending is another, or an option does not go with it.
        RunError: If the file exists, the folder is not a whole run, or the network disagrees with
            the cached path.
        BackboneError: If the backbone's weights are not at hand, or it cannot be ONNX.

    Example:
        >>> featcache.export("run", "covid.onnx")  # doctest: +SKIP
    """
    _check_place(file, data, golden)
    classifier = load_classifier(run, weights=weights, backbone=backbone, device="cpu")
    return export_classifier(classifier, file, data, golden)


def export_classifier(
    classifier: Classifier, file: str | Path, data: str | Path | None = None,
    golden: str | Path | None = None,
) -> ExportSummary | DeliverySummary:  # fmt: skip
    """Write a classifier as one network: see ``export``."""
    kind, outputs = _check_place(file, data, golden)
    if kind == ".pt":
        return _export_state(classifier, *outputs)
    from featcache.deployment.exporting.delivery import export_folder, export_onnx_file

    if kind == ".onnx":
        return export_onnx_file(classifier, outputs[0], data)
    return export_folder(classifier, outputs[0], data, golden)


def _export_state(classifier: Classifier, weights: Output, facts: Output) -> ExportSummary:
    """Write a classifier's state dict and how to use it."""
    network = classifier.as_network()
    _check_network(classifier, network)
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    summary = _summarise(classifier, weights.path, sha256)
    # Together: where one of them exists, the next try would be refused.
    write_outputs({facts: readable_json(summary.as_dict()).encode(), weights: buffer.getvalue()})
    return summary


def _check_network(classifier: Classifier, network: nn.Module) -> None:
    """Compare the joined network with backbones, then head, on two seeded images."""
    rng, batches, features = np.random.default_rng(0), [], []
    with torch.inference_mode(), exact_fp32():
        for backbone in (recipe.backbone for recipe in classifier.recipes):
            shape = (2, backbone.image_size, backbone.image_size, 3)
            pixels = rng.integers(0, 256, shape, np.uint8)
            mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone.mean, backbone.std))
            batches.append(
                (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std
            )
            features.append(torch.from_numpy(eager_features(backbone, pixels)))
        # One by one, as the features are: some networks amplify the rounding of a batch's sums.
        pairs = zip(*batches, strict=True)
        joined = torch.cat([network(*(image[None] for image in pair)) for pair in pairs]).numpy()
        apart = copy.deepcopy(classifier.head).cpu()(torch.cat(features, 1)).numpy()
    if not (np.isfinite(joined).all() and np.isfinite(apart).all()):
        raise RunError(
            "outputs of the head", expected="finite numbers", found="NaN or infinity",
            where=classifier.run.path, hint="Its weights are too large: train it again",
        )  # fmt: skip
    worst = max(relative_errors(joined, apart))
    if worst > _TOLERANCE:
        raise RunError(
            "exported network", expected=f"logits within {_TOLERANCE:.0e} of the run's",
            found=f"{worst:.1e}", where=classifier.run.path, hint="Please report this",
        )  # fmt: skip


def _summarise(classifier: Classifier, path: Path, sha256: str) -> ExportSummary:
    run, decisions = classifier.run, classifier.decisions
    described = [
        describe_backbone(recipe, cache)
        for recipe, cache in zip(classifier.recipes, run.caches, strict=True)
    ]
    is_one = len(described) == 1
    layers = build_head(run.head, seed=0)
    mean = {"num_members": run.num_members, "mean": _OF_MEMBERS[run.task]} if run.members else {}
    return ExportSummary(
        path=path,
        sha256=sha256,
        backbone=" + ".join(each["backbone"] for each in described),
        classifier_name=described[0]["classifier_name"] if is_one else None,
        head={**run.head.as_json(), "layers": [str(layer) for layer in layers], **mean},
        task=run.task,
        classes=run.classes,
        preprocessing=described[0]["preprocessing"] if is_one else {},
        output=_OUTPUTS[run.task],
        fingerprint=run.cache["fingerprint"],
        head_sha256=run.weights_sha256,
        decision=(
            None if decisions is None
            else {"rule": RULES[run.task], "thresholds": decisions.brief()}
        ),
        backbones=() if is_one else tuple(described),
    )  # fmt: skip


def describe_backbone(recipe: Recipe, cache: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an export says of one backbone."""
    backbone, rules = recipe.backbone, recipe.rules
    return {
        "backbone": backbone.name,
        "classifier_name": backbone.classifier_name,
        "num_features": backbone.num_features,
        "preprocessing": {
            **rules.as_identity(), "mean": list(backbone.mean), "std": list(backbone.std),
            "input": "RGB, (B, 3, S, S) float32, (pixels / 255 - mean) / std",
        },
        "fingerprint": cache["fingerprint"],
    }  # fmt: skip


def _check_place(
    file: str | Path, data: object, golden: object
) -> tuple[str, tuple[Output, ...]]:  # fmt: skip
    """Return what to export, ``.pt``, ``.onnx`` or ``/``, and the places, checked before any work.

    Raises:
        ConfigError: If the ending is another, or an option does not go with it.
        RunError: If something is there, or a file's folder does not exist.
    """
    path = local_path(file, "export")
    kind = "/" if str(file).endswith(("/", os.sep)) or path.is_dir() else path.suffix
    if kind not in {".pt", ".onnx", "/"}:
        raise ConfigError(
            "export", expected="a file name ending in .pt or .onnx, or FOLDER/", found=path.name,
            hint=".pt holds a torch state dict, .onnx a graph, a folder what uses it",
        )  # fmt: skip
    if data is not None and kind == ".pt":
        raise ConfigError("--data", expected="an export to FILE.onnx or FOLDER/", found=path.name)
    if golden is not None and kind != "/":
        raise ConfigError("--golden", expected="an export to FOLDER/", found=path.name)
    if kind == "/":
        folder = Output(path, "export", _FOLDER)
        check_folder(folder)
        return kind, (folder,)
    names = [path.name, f"{path.name}.json"] if kind == ".pt" else [path.name]
    outputs = tuple(Output(path.with_name(name), "export", _NETWORK) for name in names)
    for output in outputs:
        output.check()
    return kind, outputs
