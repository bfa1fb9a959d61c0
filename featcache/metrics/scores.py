"""How good are these probabilities? Figures as scikit-learn defines them, null where undefined.

Targets (N,) are one class a row. Targets (N, C) of 0, 1 and NaN are several labels a row: each
class is a question of its own, asked of the rows where its answer is known.

All are counts and ranks, computed here: scikit-learn takes 15 s for the areas of 3,000 classes and
9,000 rows, and 0.8 s to import, a third of a whole ``evaluate``. The tests compare with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import ConfigError, DataError
from featcache.formatting import join_few


def compute_metrics(
    targets: npt.NDArray[Any],
    probs: npt.NDArray[Any],
    classes: Sequence[str],
    positive: str | None = None,
) -> dict[str, Any]:
    """Compare probabilities with targets.

    ``None`` stands where a figure is undefined, never NaN: a recall without rows of the class, a
    precision without predictions of it, an area under a curve without rows on both sides.

    Args:
        targets: (N,) integers from 0 to C - 1, N >= 1; unlabelled rows must be left out. Or (N, C)
            of 0, 1 and NaN = unknown, some known.
        probs: (N, C) finite floats; the prediction is the largest, the first on ties. For several
            labels, each above 0.5.
        classes: C names.
        positive: The class that is looked for, or None.

    Returns:
        A JSON object: ``accuracy``; ``balanced_accuracy`` (mean recall of the classes that have
        rows); ``roc_auc`` and ``average_precision`` (macro mean of one-vs-rest over all classes,
        None if one of them is undefined); ``per_class`` {class: precision, recall, f1, roc_auc and
        average_precision (of the class against the rest), num_samples}; ``confusion_matrix`` (rows
        = target; None above 100 classes); ``positive``; and of it against the rest, None without
        ``positive``: ``sensitivity`` (its recall), ``specificity`` (share of the other rows that
        are predicted as any other class), ``positive_roc_auc``, ``positive_average_precision``.

        For several labels a row: ``accuracy`` over the known targets; ``roc_auc`` and
        ``average_precision``, macro means over the classes that have both answers, None without
        one; ``per_class`` {class: precision, recall, f1, roc_auc, average_precision, num_positive,
        num_negative, num_unknown, confusion_matrix (rows = no, yes)}; and the same four figures of
        the positive class. ``balanced_accuracy`` and ``confusion_matrix`` are None.

    Raises:
        DataError: If the arrays are empty, do not fit each other or hold NaN.
        ConfigError: If ``positive`` is not a class.
    """
    _check(targets, probs, classes, positive)
    if targets.ndim == 2:
        return _compute_label_metrics(targets, probs, classes, positive)
    preds, number = probs.argmax(axis=1), len(classes)
    num_right, num_targets, num_preds = _count_classes(targets, preds, number)
    per_class = {
        name: {
            "precision": _ratio(num_right[i], num_preds[i]),
            "recall": _ratio(num_right[i], num_targets[i]),
            "f1": _ratio(2 * num_right[i], num_targets[i] + num_preds[i]),
            **_areas(targets == i, probs[:, i]),
            "num_samples": num_targets[i],
        }
        for i, name in enumerate(classes)
    }
    confusion = None
    if number <= MAX_MATRIX_CLASSES:
        cells = np.bincount(targets * number + preds, minlength=number**2)
        confusion = cells.reshape(number, number).tolist()
    recalls = [row["recall"] for row in per_class.values()]
    specificity = None
    if positive is not None:
        index = list(classes).index(positive)
        specificity = _ratio(
            int(((targets != index) & (preds != index)).sum()), int((targets != index).sum())
        )
    return {
        "accuracy": sum(num_right) / len(targets),
        "balanced_accuracy": _mean([value for value in recalls if value is not None]),
        **{name: _mean_of_all(row[name] for row in per_class.values()) for name in _AREAS},
        "per_class": per_class,
        "confusion_matrix": confusion,
        **_of_positive(per_class, positive, specificity),
    }


def _compute_label_metrics(
    targets: npt.NDArray[Any], probs: npt.NDArray[Any], classes: Sequence[str], positive: str | None
) -> dict[str, Any]:
    per_class = {name: _measure_label(targets[:, i], probs[:, i]) for i, name in enumerate(classes)}
    specificity = None
    if positive is not None:
        (no_no, no_yes), _ = per_class[positive]["confusion_matrix"]
        specificity = _ratio(no_no, no_no + no_yes)
    return {
        "accuracy": _accuracy_of_labels(targets, probs),
        "balanced_accuracy": None,
        **{name: _mean_of_known(row[name] for row in per_class.values()) for name in _AREAS},
        "per_class": per_class,
        "confusion_matrix": None,
        **_of_positive(per_class, positive, specificity),
    }


def _of_positive(
    per_class: Mapping[str, Mapping[str, Any]], positive: str | None, specificity: float | None
) -> dict[str, Any]:
    """Return the figures of the positive class against the rest, None without one."""
    row = {} if positive is None else per_class[positive]
    return {
        "positive": positive,
        "sensitivity": row.get("recall"),
        "specificity": specificity,
        **{f"positive_{name}": row.get(name) for name in _AREAS},
    }


def _areas(is_yes: npt.NDArray[np.bool_], probs: npt.NDArray[Any]) -> dict[str, float | None]:
    """Return the areas under both curves of one class, None without rows on both sides.

    The ROC AUC is the share of pairs of a positive and a negative row that are ranked right, ties
    half (Mann and Whitney, 1947); the average precision is the mean, over the positive rows, of
    the precision at the threshold of each.
    """
    yes = np.sort(probs[is_yes])
    num_yes, num_no = len(yes), len(probs) - len(yes)
    if not num_yes or not num_no:
        return dict.fromkeys(_AREAS)
    ranked = np.sort(probs)
    below, up_to = (np.searchsorted(ranked, yes, side) for side in ("left", "right"))
    yes_below, yes_up_to = (np.searchsorted(yes, yes, side) for side in ("left", "right"))
    pairs_right = ((below - yes_below) + (up_to - yes_up_to)).sum() / 2
    precisions = (num_yes - yes_below) / (len(ranked) - below)
    return {
        "roc_auc": float(pairs_right / (num_yes * num_no)),
        "average_precision": float(precisions.mean()),
    }


def _count_classes(
    targets: npt.NDArray[Any], preds: npt.NDArray[Any], num_classes: int
) -> tuple[list[int], list[int], list[int]]:
    """Return for each class the rows predicted right, the rows with that target, and with it."""
    right, of_targets, of_preds = (
        np.bincount(values, minlength=num_classes).tolist()
        for values in (targets[targets == preds], targets, preds)
    )
    return right, of_targets, of_preds


def _measure_label(targets: npt.NDArray[Any], probs: npt.NDArray[Any]) -> dict[str, Any]:
    """Return the figures of one class, over the rows where it is known."""
    is_yes, probs = _known_answers(targets, probs)
    says_yes = probs > 0.5
    no_no, no_yes, yes_no, yes_yes = (
        int(((is_yes == of_target) & (says_yes == of_pred)).sum())
        for of_target in (False, True) for of_pred in (False, True)
    )  # fmt: skip
    return {
        "precision": _ratio(yes_yes, no_yes + yes_yes),
        "recall": _ratio(yes_yes, yes_no + yes_yes),
        "f1": _f1(is_yes, probs),
        **_areas(is_yes, probs),
        "num_positive": yes_no + yes_yes,
        "num_negative": no_no + no_yes,
        "num_unknown": len(targets) - len(is_yes),
        "confusion_matrix": [[no_no, no_yes], [yes_no, yes_yes]],
    }


def _known_answers(
    targets: npt.NDArray[Any], probs: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[Any]]:
    """Return where a class is positive, and its probabilities, of the rows where it is known."""
    known = ~np.isnan(targets)
    return targets[known] == 1, probs[known]


def _f1(is_yes: npt.NDArray[np.bool_], probs: npt.NDArray[Any]) -> float | None:
    says_yes = probs > 0.5
    return _ratio(2 * int((is_yes & says_yes).sum()), int(is_yes.sum() + says_yes.sum()))


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _accuracy_of_labels(targets: npt.NDArray[Any], probs: npt.NDArray[Any]) -> float:
    known = ~np.isnan(targets)
    return float(((probs > 0.5) == (targets == 1))[known].mean())


def _mean_of_all(values: Iterable[float | None]) -> float | None:
    """Return the mean, None if one of the values is undefined."""
    listed = list(values)
    return None if None in listed else _mean_of_known(listed)


def _mean_of_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if known else None


MAX_MATRIX_CLASSES = 100
"""With more, the cells of a confusion matrix outnumber the rows many times over."""

METRICS = ("loss", "accuracy", "balanced_accuracy", "roc_auc", "average_precision", "f1")
"""What heads can be chosen by; of ``loss`` less is better."""

_AREAS = ("roc_auc", "average_precision")
_OF_CLASSES = (*_AREAS, "f1")
_OF_LABELS = ("loss", "accuracy", *_OF_CLASSES)


def check_metric(
    metric: str, positive: str | None, classes: Sequence[str], *, has_labels: bool = False
) -> None:
    """Refuse what ``compute_score`` could not compute.

    Args:
        metric: What is asked for.
        positive: The class that is looked for.
        classes: Those there are.
        has_labels: Whether a row has several labels.

    Raises:
        ConfigError: If there is no such metric or class, or the metric looks for no class.
    """
    if metric not in METRICS:
        raise ConfigError("--metric", expected="one of " + ", ".join(METRICS), found=metric)
    if has_labels and metric not in _OF_LABELS:
        wanted = "for several labels per image one of " + ", ".join(_OF_LABELS)
        raise ConfigError("--metric", expected=wanted, found=metric)
    if positive is not None and metric not in _OF_CLASSES:
        wanted = "a --metric of one class: " + ", ".join(_OF_CLASSES)
        raise ConfigError("--positive", expected=wanted, found=f"--metric {metric}")
    if positive is not None and positive not in classes:
        raise ConfigError("--positive", expected="one of " + join_few(classes), found=positive)


def describe_metric(metric: str, positive: str | None, *, has_labels: bool = False) -> str:
    """Return the metric with its averaging: ``f1 (macro mean over the classes)``."""
    if has_labels:
        if metric in _OF_CLASSES:
            mean = "macro mean over the classes with both answers"
            return f"{metric} ({mean if positive is None else f'of {positive}'})"
        of_what = "mean binary cross-entropy" if metric == "loss" else "share of right answers"
        return f"{metric} ({of_what} over the known targets)"
    if metric == "loss":
        return "loss (mean cross-entropy)"
    if metric == "balanced_accuracy":
        return "balanced_accuracy (mean recall over the classes)"
    if metric not in _OF_CLASSES:
        return metric
    mean = "macro mean over the classes" + (", each against the rest" if metric != "f1" else "")
    return f"{metric} ({mean if positive is None else f'of {positive}, against the rest'})"


def compute_score(
    metric: str,
    targets: npt.NDArray[Any],
    probs: npt.NDArray[Any],
    classes: Sequence[str],
    positive: str | None = None,
) -> float | None:
    """Return one figure, None where it is undefined.

    Args:
        metric: One of ``METRICS``: ``loss`` is the mean cross-entropy; ``roc_auc``,
            ``average_precision`` and ``f1`` are macro means over the classes, or those of the
            positive class. For multilabel targets, ``loss`` and ``accuracy`` are over the known
            targets, and the means over the classes with both answers.
        targets: As for ``compute_metrics``, as are the three that follow.
        probs: (N, C).
        classes: C names.
        positive: The class that is looked for.

    Raises:
        DataError: If the arrays are empty, do not fit each other or hold NaN.
        ConfigError: If there is no such metric or class, or the metric looks for no class.
    """
    check_metric(metric, positive, classes, has_labels=targets.ndim == 2)
    _check(targets, probs, classes, positive)
    if targets.ndim == 2:
        return _score_labels(metric, targets, probs, classes, positive)
    if metric == "loss":
        of_targets = probs[np.arange(len(targets)), targets].astype(np.float64)
        return _mean((-np.log(np.maximum(of_targets, np.finfo(np.float64).tiny))).tolist())
    if metric in {"accuracy", "balanced_accuracy"}:
        right = probs.argmax(axis=1) == targets
        if metric == "accuracy":
            return float(right.mean())
        return _mean([float(right[targets == i].mean()) for i in np.unique(targets)])
    wanted = range(len(classes)) if positive is None else [list(classes).index(positive)]
    if metric == "f1":
        counts = zip(*_count_classes(targets, probs.argmax(axis=1), len(classes)), strict=True)
        of_wanted = [of_class for i, of_class in enumerate(counts) if i in wanted]
        if not all(num_targets for _, num_targets, _ in of_wanted):
            return None  # 0 or undefined, as the predictions happen to be
        return _mean([2 * right / (rows + preds) for right, rows, preds in of_wanted])
    return _mean_of_all(_areas(targets == i, probs[:, i])[metric] for i in wanted)


def _score_labels(
    metric: str, targets: npt.NDArray[Any], probs: npt.NDArray[Any], classes: Sequence[str],
    positive: str | None,
) -> float | None:  # fmt: skip
    if metric == "accuracy":
        return _accuracy_of_labels(targets, probs)
    if metric == "loss":
        of_targets = np.where(targets == 1, probs, 1 - probs)[~np.isnan(targets)]
        return _mean((-np.log(np.maximum(of_targets, np.finfo(np.float64).tiny))).tolist())
    wanted = range(len(classes)) if positive is None else [list(classes).index(positive)]
    answers = (_known_answers(targets[:, i], probs[:, i]) for i in wanted)
    return _mean_of_known(
        _f1(is_yes, of_class) if metric == "f1" else _areas(is_yes, of_class)[metric]
        for is_yes, of_class in answers
        if is_yes.any() and not is_yes.all()
    )


def paired_interval(
    differences: Sequence[float], ratio: float, num_compared: int = 1
) -> tuple[float, float, float]:
    """Return the mean difference of two heads over splits, and its 95 % interval.

    The corrected resampled t interval (Nadeau and Bengio, 2003; over repeated folds: Bouckaert and
    Frank, 2004): splits of one data set overlap, which a plain t interval would take for
    independent evidence.

    Args:
        differences: One per split, two or more.
        ratio: Rows judged by over rows trained on.
        num_compared: Heads of which the best is the one compared: the interval holds for all of
            them at once (Bonferroni).
    """
    from scipy import stats

    number, mean = len(differences), _mean(list(differences))
    variance = math.fsum((x - mean) ** 2 for x in differences) / (number - 1)
    quantile = float(stats.t.ppf(1 - 0.05 / (2 * num_compared), number - 1))
    half = quantile * math.sqrt((1 / number + ratio) * variance)
    return mean, mean - half, mean + half


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _check(
    targets: npt.NDArray[Any],
    probs: npt.NDArray[Any],
    classes: Sequence[str],
    positive: str | None,
) -> None:
    if probs.shape != (len(targets), len(classes)) or not np.isfinite(probs).all():
        raise DataError(
            "probs", expected=f"finite numbers of shape {(len(targets), len(classes))}",
            found=f"shape {probs.shape}" if np.isfinite(probs).all() else "NaN or infinity",
        )  # fmt: skip
    if not len(targets):
        raise DataError("rows to measure", expected="one or more", found="none")
    if targets.ndim == 2:
        _check_labels(targets, probs)
    elif targets.min() < 0 or targets.max() >= len(classes):
        raise DataError(
            "targets", expected=f"numbers from 0 to {len(classes) - 1}",
            found=f"{targets.min()} to {targets.max()}",
        )  # fmt: skip
    if positive is not None and positive not in classes:
        raise ConfigError("--positive", expected="one of " + join_few(classes), found=positive)


def _check_labels(targets: npt.NDArray[Any], probs: npt.NDArray[Any]) -> None:
    known = ~np.isnan(targets) if targets.shape == probs.shape else np.zeros(1, bool)
    if not known.any() or not np.isin(targets[known], (0, 1)).all():
        raise DataError(
            "targets", expected=f"0, 1 and NaN of shape {probs.shape}, some known",
            found=f"shape {targets.shape}, {int(known.sum())} known",
        )  # fmt: skip
