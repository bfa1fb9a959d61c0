"""A classifier as one ONNX graph: pixels in, probabilities and decision out.

Reads: nothing. Writes: nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import onnx
import torch
from torch import nn

from featcache.backbones.forward import export_onnx, folded_from_pixels
from featcache.deployment.classifier import Classifier
from featcache.errors import BackboneError
from featcache.evaluation.deciding.decision_file import Decisions

OUTPUTS = ("probabilities", "calibrated", "decision")
FEATURES = "features"
"""Name of the features (B, D) inside the graph."""
REFERRED = -1
"""The decision of an image that is referred to a person."""

_TINY = 1e-300  # as of ``metrics.temperature``: a probability of 0 has no logarithm
_EXAMPLE_BATCH = 2  # exporters take a dimension of 0 or 1 for constant


def input_names(num_backbones: int) -> list[str]:
    """Return the names of the graph's inputs, one for each backbone."""
    return ["pixels"] if num_backbones == 1 else [f"pixels_{i}" for i in range(num_backbones)]


class Outcome(nn.Module):
    """Features (B, D) to probabilities, calibrated probabilities and decision.

    The head computes in float32, all that follows in float64, as ``predict`` does.

    Args:
        heads: One, or the members of an ensemble; each features (B, D) to logits (B, C).
        task: ``multiclass`` or ``multilabel``.
        num_classes: C.
        decisions: Thresholds and temperatures, None without.
    """

    temperatures: torch.Tensor
    thresholds: torch.Tensor

    def __init__(
        self, heads: Sequence[nn.Module], task: str, num_classes: int, decisions: Decisions | None
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads = nn.ModuleList(copy.deepcopy(head).cpu().eval() for head in heads)
        self._is_multi = task == "multilabel"
        self._positive: int | None = None
        self._may_refer = self._has_temperature = False
        temperatures = torch.ones(num_classes, dtype=torch.float64)
        # Several labels: without a threshold of its own a class is found above 0.5, and not at it.
        thresholds = torch.full((num_classes,), math.nextafter(0.5, 1), dtype=torch.float64)
        for name, rule in {} if decisions is None else decisions.rules.items():
            assert decisions is not None
            column, high = decisions.classes.index(name), rule["refer_below"]
            temperature = rule["temperature"]
            self._has_temperature |= temperature is not None
            if self._is_multi:
                temperatures[column], thresholds[column] = temperature or 1.0, rule["threshold"]
            else:
                self._positive, self._may_refer = column, high is not None
                temperatures[:] = temperature or 1.0
                thresholds[0] = rule["threshold"]
                thresholds[1] = rule["threshold"] if high is None else high
        self.register_buffer("temperatures", temperatures)
        self.register_buffer("thresholds", thresholds)

    def probabilities(self, features: torch.Tensor) -> torch.Tensor:
        """Return (B, C) float64, the mean of the heads'."""
        logits = [head(features).double() for head in self.heads]
        probs = [z.sigmoid() if self._is_multi else z.softmax(1) for z in logits]
        return probs[0] if len(probs) == 1 else torch.stack(probs).mean(0)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return probabilities and calibrated ones (B, C), and the decision (B,) or (B, C)."""
        probs = self.probabilities(features)
        return probs, self._calibrate(probs), self._decide(probs)

    def _calibrate(self, probs: torch.Tensor) -> torch.Tensor:
        if not self._has_temperature:
            return probs + 0.0  # an output has a name of its own
        logs = probs.clamp(min=_TINY).log() / self.temperatures
        if not self._is_multi:
            return logs.softmax(1)
        rest = (1 - probs).clamp(min=_TINY).log() / self.temperatures
        softened = torch.stack([rest, logs]).softmax(0)[1]
        return torch.where(self.temperatures == 1, probs, softened)  # equal bits without one

    def _decide(self, probs: torch.Tensor) -> torch.Tensor:
        if self._is_multi:
            return (probs >= self.thresholds).long()
        if self._positive is None:
            return probs.argmax(1)
        of_class = probs[:, self._positive]
        is_positive = torch.arange(probs.shape[1]) == self._positive
        other = torch.where(is_positive, torch.full_like(probs, -1.0), probs).argmax(1)
        chosen = torch.full_like(other, self._positive)
        if self._may_refer:
            referred = torch.full_like(other, REFERRED)
            chosen = torch.where(of_class >= self.thresholds[1], chosen, referred)
        return torch.where(of_class >= self.thresholds[0], chosen, other)


class _Graph(nn.Module):
    def __init__(self, backbones: Sequence[nn.Module], outcome: Outcome) -> None:
        super().__init__()
        self.backbones, self.outcome = nn.ModuleList(backbones), outcome

    def forward(self, *pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = torch.cat([n(p) for n, p in zip(self.backbones, pixels, strict=True)], 1)
        return features, *self.outcome(features)


def outcome_of(classifier: Classifier) -> Outcome:
    """Return what follows the features of a classifier."""
    run, head = classifier.run, classifier.head
    heads = [*head.get_submodule("members").children()] if run.members else [head]
    return Outcome(heads, run.task, len(run.classes), classifier.decisions)


def build_graph(classifier: Classifier, metadata: Mapping[str, str]) -> bytes:
    """Return a classifier as an ONNX file.

    Args:
        classifier: The classifier.
        metadata: What the file says of itself.

    Raises:
        BackboneError: If a backbone cannot be exported.
    """
    recipes = classifier.recipes
    shapes = [(_EXAMPLE_BATCH, *[r.backbone.image_size] * 2, 3) for r in recipes]
    try:
        networks = [folded_from_pixels(recipe.backbone) for recipe in recipes]
        graph = _Graph(networks, outcome_of(classifier)).eval()
        made = export_onnx(
            graph, shapes, input_names(len(recipes)), [FEATURES, *OUTPUTS], any_batch=True
        )
    except Exception as error:  # the exporter may raise anything
        found = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise BackboneError(
            "ONNX", expected="a network that torch can export", found=found,
            where=" + ".join(recipe.backbone.name for recipe in recipes),
            hint="Export FILE.pt instead",
        ) from error  # fmt: skip
    model = onnx.load_from_string(made)
    del model.graph.output[0]  # the features stay inside, for ``with_features``
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


def behind_features(model: bytes, num_features: int) -> bytes:
    """Return what follows the features in an ONNX file of ``build_graph``: they are its input."""
    loaded = onnx.load_from_string(model)
    needed, kept = {output.name for output in loaded.graph.output}, []
    for node in reversed(loaded.graph.node):
        if needed.intersection(node.output) and FEATURES not in node.output:
            kept.append(node)
            needed.update(node.input)
    initial = [each for each in loaded.graph.initializer if each.name in needed]
    made = onnx.helper.make_graph(
        kept[::-1], "outcome", [_features_info(num_features)], loaded.graph.output, initial
    )
    part = onnx.helper.make_model(made, opset_imports=loaded.opset_import)
    part.ir_version = loaded.ir_version
    return bytes(part.SerializeToString())


def with_features(model: bytes, num_features: int) -> bytes:
    """Return an ONNX file of ``build_graph`` with its features (B, D) as its last output."""
    loaded = onnx.load_from_string(model)
    loaded.graph.output.append(_features_info(num_features))
    return bytes(loaded.SerializeToString())


def _features_info(num_features: int) -> onnx.ValueInfoProto:
    shape: list[str | int | None] = ["batch", num_features]
    return onnx.helper.make_tensor_value_info(FEATURES, onnx.TensorProto.FLOAT, shape)
