"""Export: backbone and head of a run as one network, for use without featcache.

Reads: a run. Writes: ``FILE.pt`` and ``FILE.pt.json``.
"""

from __future__ import annotations

import copy
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from featcache.backbones.backbone import Backbone
from featcache.backbones.engine import eager_features
from featcache.deployment.classifier import Classifier, load_classifier
from featcache.errors import ConfigError, RunError
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
_TOLERANCE = 1e-4  # relative, on logits: another summation order, nothing more


@dataclass(frozen=True)
class ExportSummary:
    """What was exported: ``FILE.json`` holds all but the path.

    Attributes:
        path: The file with the state dict.
        sha256: Of the file.
        backbone: Name of the backbone.
        classifier_name: Name of the module that the head replaces, None where there was none.
        head: The shape of the head, and its ``layers`` as torch prints them. Of an ensemble those
            of each member, with ``num_members`` and, in words, how their logits become the output.
        task: ``multiclass`` or ``multilabel``.
        classes: Names of the outputs, in order.
        preprocessing: How an image becomes the network's input.
        output: What the outputs are, in words.
        fingerprint: Of the cache the head was trained on.
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

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as JSON values: what ``FILE.json`` holds."""
        facts = result_as_dict(self)
        del facts["path"]
        return {"format": "featcache-export", "format_version": 1, **facts}


def export(
    run: str | Path,
    file: str | Path,
    *,
    weights: str | Path | None = None,
    backbone: Backbone | str | None = None,
) -> ExportSummary:
    """Write the state dict of backbone and head to a file, and how to use it to ``FILE.json``.

    The file loads with ``strict=True`` into the backbone's library once its classifier was
    replaced by the head's ``nn.Sequential``. Of an ensemble it is a module with the heads in an
    ``nn.ModuleList`` named ``members``: README.md of ``featcache/heads`` has its six lines.

    Args:
        run: The run folder.
        file: ``NAME.pt``; must not exist.
        weights: The backbone's weights file, where the library's own were not used.
        backbone: The backbone itself, if it was made in Python; its name, if a ``python:`` function
            makes it.

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
    """Compare the joined network with backbone, then head, on two seeded images."""
    backbone = classifier.recipe.backbone
    shape = (2, backbone.image_size, backbone.image_size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone.mean, backbone.std))
    with torch.inference_mode(), exact_fp32():
        images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std
        # One by one, as the features are: some networks amplify the rounding of a batch's sums.
        joined = torch.cat([network(image[None]) for image in images]).numpy()
        features = torch.from_numpy(eager_features(backbone, pixels))
        apart = copy.deepcopy(classifier.head).cpu()(features).numpy()
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
    run, backbone, rules = classifier.run, classifier.recipe.backbone, classifier.recipe.rules
    layers = build_head(run.head, seed=0)
    mean = {"num_members": run.num_members, "mean": _OF_MEMBERS[run.task]} if run.members else {}
    decisions = classifier.decisions
    return ExportSummary(
        path=path,
        sha256=sha256,
        backbone=backbone.name,
        classifier_name=backbone.classifier_name,
        head={**run.head.as_json(), "layers": [str(layer) for layer in layers], **mean},
        task=run.task,
        classes=run.classes,
        preprocessing={
            **rules.as_identity(), "mean": list(backbone.mean), "std": list(backbone.std),
            "input": "RGB, (B, 3, S, S) float32, (pixels / 255 - mean) / std",
        },
        output=_OUTPUTS[run.task],
        fingerprint=run.cache["fingerprint"],
        head_sha256=run.weights_sha256,
        decision=(
            None if decisions is None
            else {"rule": _RULES[run.task], "thresholds": decisions.brief()}
        ),
    )  # fmt: skip


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
