"""Apply a trained head to features with NumPy: no torch is imported to use a head.

A head in eval mode is a few matrix products: three for two hidden layers.

Reads: features of a cache. Writes: nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from featcache.csv_files import join_names, prob_columns
from featcache.errors import RunError
from featcache.heads.head import BATCH_NORM_EPS, HeadConfig, norm_and_linear, split_members
from featcache.heads.streaming import StoredFeatures
from featcache.memory import require_memory_for_products

_BLOCK_ROWS = 512  # 3 MB of 1280 features: a block and its activations stay in the cache

COLUMNS = ("path", "group", "target", "pred")
COLUMNS_OF_LABELS = ("path", "group", "targets", "unknown", "preds")
"""Of a CSV of predicted rows, before the probabilities: see ``prediction_table``."""

Features: TypeAlias = npt.NDArray[Any] | StoredFeatures
State: TypeAlias = Mapping[str, npt.NDArray[Any]]
"""A head's state dict as arrays, by the names of ``nn.Sequential``: ``0.weight`` and so on.

That of an ensemble has the members' one after the other: ``members.0.0.weight`` and so on."""


def predict_probs(
    config: HeadConfig, state: State, features: Features, task: str = "multiclass"
) -> npt.NDArray[np.float64]:
    """Return the probabilities (N, C) that a head gives to features, in blocks of 512 rows.

    An ensemble gives the mean of its members' probabilities.

    Logits are float32, as torch computes them, and probabilities float64: a very sure head still
    ranks its rows instead of giving them all 1.

    Args:
        config: The shape of the head.
        state: Its weights, or those of an ensemble of heads of that shape.
        features: (N, D); or (N, V, D) for the mean of the probabilities of V views.
        task: ``multiclass`` for the softmax, ``multilabel`` for the sigmoid of each logit.

    Raises:
        RunError: If a logit is not finite: of weights out of range, or of such features.
        CacheError: If a stored feature is not finite.
        MemoryError: If there is no memory left for matrix products.
    """
    probs = np.empty((len(features), config.num_classes))
    for rows, logits in _logit_blocks(config, state, features):
        members = (_sigmoid(z) if task == "multilabel" else _softmax(z) for z in logits)
        probs[rows] = np.mean([of_views.mean(axis=1) for of_views in members], axis=0)
    return probs


def predict_logits(config: HeadConfig, state: State, features: Features) -> npt.NDArray[Any]:
    """Return the logits (N, C) that one head gives to features (N, D), in the weights' dtype.

    Raises:
        RunError: If a logit is not finite: of weights out of range, or of such features.
        CacheError: If a stored feature is not finite.
        MemoryError: If there is no memory left for matrix products.
    """
    dtype = next(value.dtype for value in state.values() if value.dtype.kind == "f")
    all_logits = np.empty((len(features), config.num_classes), dtype)
    for rows, (logits,) in _logit_blocks(config, state, features):
        all_logits[rows] = logits[:, 0]
    return all_logits


def _logit_blocks(
    config: HeadConfig, state: State, features: Features
) -> Iterator[tuple[slice, list[npt.NDArray[Any]]]]:
    """Yield the logits (n, V, C) that each member gives to some rows after the other."""
    require_memory_for_products()
    members = split_members(state)
    num_views = features.shape[1] if features.ndim == 3 else 1
    num_rows = max(1, _BLOCK_ROWS // num_views)
    for i in range(0, len(features), num_rows):
        part = features[i : i + num_rows]
        block = part.load() if isinstance(part, StoredFeatures) else part
        flat = block.reshape(-1, block.shape[-1])
        logits = [
            compute_logits(config, member, flat).reshape(len(block), num_views, -1)
            for member in members
        ]
        is_finite = np.all([np.isfinite(part).all((1, 2)) for part in logits], axis=0)
        if not is_finite.all():
            hint = "Its weights or these features are out of range: look at them, and train again"
            raise RunError(
                "outputs of the head", expected="finite numbers", found="NaN or infinity",
                where=_name_row(features, i + int(is_finite.argmin())), hint=hint,
            )  # fmt: skip
        yield slice(i, i + len(block)), logits


def _name_row(features: Features, row: int) -> str:
    return features.path(row) if isinstance(features, StoredFeatures) else f"row {row} (from 0)"


def compute_logits(
    config: HeadConfig, state: State, features: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    """Return the logits (n, C) of features (n, D), in the weights' dtype.

    Batch norms use their running statistics, dropout does nothing.
    """
    hidden = features
    # As in torch, huge features overflow to infinity or NaN without a word.
    with np.errstate(over="ignore", invalid="ignore"):
        for layer in range(len(config.hidden) + 1):
            norm, linear = norm_and_linear(config, layer)
            variance = state[f"{norm}.running_var"]
            scale = state[f"{norm}.weight"] * (
                1 / np.sqrt(variance + variance.dtype.type(BATCH_NORM_EPS))
            )
            shift = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
            # Rounded once, as torch's fused multiply-add: the two terms may nearly cancel. Rounded
            # twice, probabilities of a linear probe were 5e-6 from exact ones, torch's are 2e-6.
            hidden = (hidden.astype(np.float64) * scale + shift).astype(scale.dtype)
            hidden = hidden @ state[f"{linear}.weight"].T
            hidden += state[f"{linear}.bias"]
            if layer < len(config.hidden):
                np.maximum(hidden, 0, out=hidden)
    return hidden


def prediction_table(
    classes: Sequence[str], paths: Sequence[str], groups: Sequence[str],
    targets: npt.NDArray[Any], probs: npt.NDArray[np.float64],
) -> tuple[list[str], list[list[object]]]:  # fmt: skip
    """Return header and rows of a CSV of labelled rows with their probabilities.

    Args:
        classes: C names.
        paths: n paths.
        groups: n groups, empty where there are none.
        targets: (n,) class indices; or (n, C) of 0, 1 and NaN = unknown: several labels a row.
        probs: (n, C).
    """
    if targets.ndim == 2:
        header = [*COLUMNS_OF_LABELS]
        chosen = (targets == 1, np.isnan(targets), probs > 0.5)
        words = [
            [join_names(classes[c] for c in np.flatnonzero(row).tolist()) for row in which]
            for which in chosen
        ]
    else:
        header = [*COLUMNS]
        words = [[classes[i] for i in which.tolist()] for which in (targets, probs.argmax(1))]
    rows = zip(paths, groups, zip(*words, strict=True), probs.tolist(), strict=True)
    return header + prob_columns(classes), [
        [path, group, *named, *of_row] for path, group, named, of_row in rows
    ]


def _softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    powers = np.exp(shifted)
    probs: npt.NDArray[np.float64] = powers / powers.sum(axis=-1, keepdims=True)
    return probs


def _sigmoid(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    probs: npt.NDArray[np.float64] = np.exp(-np.logaddexp(0, -logits.astype(np.float64)))
    return probs
