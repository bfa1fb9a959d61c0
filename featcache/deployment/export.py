"""Export: backbone and head of a run as one network, for use without featcache.

Reads: a run. Writes: ``FILE.pt`` and ``FILE.pt.json``.
"""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from featcache.backbones.engine import eager_features
from featcache.deployment.classifier import Classifier, load_classifier
from featcache.deployment.recipes import Backbones, Weights
from featcache.errors import ConfigError, RunError
from featcache.extraction.recipe import Recipe
from featcache.files import local_path, readable_json, result_as_dict
from featcache.formatting import brief_repr
from featcache.heads.head import build_head
from featcache.outputs import Kind, Output, write_outputs
from featcache.precision import relative_errors
from featcache.runtime import exact_fp32

_OUTPUTS = {
    "multiclass": "logits (B, C); softmax gives the probabilities of the classes in order",
    "multilabel": "logits (B, C); sigmoid gives the probability of each class in order, one by one",
}
_OF_MEMBERS = {
    "multiclass": "logsumexp over the members of log_softmax(logits), minus log of their number",
    "multilabel": "logsumexp over the members of logsigmoid(logits), minus that of their negatives",
}
_RULES = {
    "multiclass": "the class if its probability >= threshold (from threshold to below refer_below: "
    "refer), else the most probable other class; probabilities at temperature 1",
    "multilabel": "each class if its probability >= its threshold; probabilities at temperature 1",
}
_NETWORK = Kind("network", "a new file in an existing folder", RunError, needs_folder=True)
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


def export(
    run: str | Path,
    file: str | Path,
    *,
    weights: Weights = None,
    backbone: Backbones = None,
) -> ExportSummary:
    """Write the state dict of backbone and head to a file, and how to use it to ``FILE.json``.

    The file loads with ``strict=True`` into the backbone's library once its classifier was
    replaced by the head's ``nn.Sequential``. Of an ensemble it is a module with the heads in an
    ``nn.ModuleList`` named ``members``: README.md of ``featcache/heads`` has its six lines. Of a
    run of several caches it has the backbones' entries under ``backbones.0.``, ``backbones.1.`` and
    so on, and the head's under ``head.``.

    Args:
        run: The run folder.
        file: ``NAME.pt``; must not exist.
        weights: See ``classifier.load_classifier``.
        backbone: Likewise.

    Raises:
        ConfigError: If the file's ending is not ``.pt``.
        RunError: If the file exists, the folder is not a whole run, or the network disagrees with
            the cached path.
        BackboneError: If the backbone's weights are not at hand.

    Example:
        >>> featcache.export("run", "covid.pt")  # doctest: +SKIP
    """
    path = local_path(file, "export")
    _outputs(path)
    classifier = load_classifier(run, weights=weights, backbone=backbone, device="cpu")
    return export_classifier(classifier, path)


def export_classifier(classifier: Classifier, path: Path) -> ExportSummary:
    """Write a classifier's state dict: see ``export``."""
    weights, facts = _outputs(path)
    network = classifier.as_network()
    _check_network(classifier, network)
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    summary = _summarise(classifier, path, hashlib.sha256(buffer.getvalue()).hexdigest())
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
        _describe(recipe, cache)
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
            else {"rule": _RULES[run.task], "thresholds": decisions.brief()}
        ),
        backbones=() if is_one else tuple(described),
    )  # fmt: skip


def _describe(recipe: Recipe, cache: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``FILE.json`` says of one backbone."""
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


def _outputs(path: Path) -> tuple[Output, Output]:
    """Return the two files to export to, checked before any work is done.

    Raises:
        ConfigError: If the ending is not ``.pt``.
        RunError: If one exists, or its folder does not.
    """
    if path.suffix != ".pt":
        raise ConfigError(
            "export", expected="a file name ending in .pt", found=path.name,
            hint="It will hold a torch state dict",
        )  # fmt: skip
    weights = Output(path, "export", _NETWORK)
    facts = Output(path.with_name(path.name + ".json"), "export", _NETWORK)
    for output in (weights, facts):
        output.check()
    return weights, facts
