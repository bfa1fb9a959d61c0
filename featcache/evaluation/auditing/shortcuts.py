"""Can file facts that look at no lung tell the classes? The same folds judge them and the features.

Reads: a cache; facts of images that were read. Writes: nothing.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featcache.cache.reading import Cache
from featcache.evaluation.auditing.folds import LEAST_PER_CLASS, FoldedRows, thin
from featcache.heads.rows import labelled_part, training_source
from featcache.metrics.scores import paired_interval
from featcache.runtime import Say

if TYPE_CHECKING:
    from featcache.evaluation.auditing.images import AuditImages

_DEPTH = 3
_TOGETHER = "all together"
_NEARLY, _MOST_NAMED = 0.03, 6

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Shortcuts:
    """Balanced accuracies of classifiers that see no image, and of a linear head on the features.

    All are means over the same folds, which keep groups and identical images together.

    Attributes:
        verdict: ``beats``, ``not shown to beat``, ``too few`` or, where there is nothing to
            compare, ``not measured``.
        sentence: The verdict as one sentence.
        reason: Why there are too few, None where there are enough.
        splits: Whose rows were used.
        num_rows: Labelled rows in them.
        num_folds: How many folds; 0 where there are too few rows.
        head: The linear head's mean balanced accuracy.
        facts: A row per fact, and ``all together`` (of two facts or more): ``fact``, ``logistic``
            and ``tree``, balanced accuracies; the best first.
        best: The best of them: ``fact``, ``model``, ``balanced_accuracy``.
        difference: Head less the best: ``mean``, and ``low`` and ``high`` of its 95 % interval
            (Nadeau and Bengio; Bonferroni over all the classifiers of which it is the best), None
            where every fold agrees.
    """

    verdict: str
    sentence: str
    reason: str | None
    splits: tuple[str, ...]
    num_rows: int
    num_folds: int = 0
    head: float | None = None
    facts: tuple[dict[str, Any], ...] = ()
    best: dict[str, Any] | None = None
    difference: dict[str, Any] | None = None


def measure_shortcuts(
    cache: Cache, say: Say, folded: FoldedRows | None = None, images: AuditImages | None = None
) -> Shortcuts:
    """Compare shortcuts with a linear head on the labelled rows of train and valid, or all.

    Args:
        cache: The cache.
        say: Where lines for people go.
        folded: The same rows in folds, where another part has them already.
        images: Their images, whose sizes, colours, brightness and borders are facts too.

    Raises:
        CacheError: If there are no rows to train on, or a feature is not finite.
    """
    names = [training_source(cache)]
    names += [name for name in ("valid",) if name in cache.splits]
    parts = [labelled_part(cache, name, "train" if not i else "valid")
             for i, name in enumerate(names)]  # fmt: skip
    num_rows = sum(len(part.rows) for part in parts)

    def left_out(verdict: str, reason: str) -> Shortcuts:
        return Shortcuts(verdict, f"{verdict}: {reason}", reason, tuple(names), num_rows)

    if cache.task == "multilabel":
        return left_out("not measured", "the rows have several labels, not one class each")
    counts = np.bincount(
        np.concatenate([part.targets for part in parts]), minlength=len(cache.classes)
    )
    if len(counts) < 2 or counts.min() < LEAST_PER_CLASS:
        return left_out(
            "too few",
            f"a class has {counts.min(initial=num_rows):,} labelled rows of {' and '.join(names)}, "
            f"and at least {LEAST_PER_CLASS} of each of two classes are needed",
        )
    facts = file_facts(
        [part.split.paths[row] for part in parts for row in part.rows.tolist()],
        np.concatenate([part.split.image_bytes[part.rows] for part in parts]),
    )
    folded = FoldedRows(cache, say) if folded is None else folded
    if images is not None:
        facts |= picture_facts(images, folded.numbers)
    if not facts:
        return left_out("not measured", "no fact of the files differs between rows")
    if isinstance(folded.folds, str):
        return left_out("not measured" if folded.pool is None else "too few", folded.folds)
    return _compare(folded.probs, folded.targets, facts, folded.folds, tuple(names))


def file_facts(paths: Sequence[str], image_bytes: Array) -> dict[str, Array]:
    """Return the facts that differ between rows, each as columns (N, k) float64.

    The name is the last part of the path: folders may be the classes themselves.
    """
    names = [posixpath.basename(path) for path in paths]
    stems, endings = zip(*(posixpath.splitext(name.casefold()) for name in names), strict=True)
    facts = {
        "file size": np.log1p(np.asarray(image_bytes, np.float64))[:, None],
        "file ending": _one_hot(list(endings)),
        "name length": np.array([[len(stem)] for stem in stems], np.float64),
        "digits in name": np.array([[sum(map(str.isdigit, s))] for s in stems], np.float64),
        "kind of first letter": _one_hot([_kind(name) for name in names]),
    }
    return {name: columns for name, columns in facts.items() if np.ptp(columns, axis=0).any()}


def picture_facts(images: AuditImages, rows: npt.NDArray[np.int64]) -> dict[str, Array]:
    """Return the facts of the pictures that differ between rows, each as columns (N, k) float64.

    Rows whose image was not read have the medians of the others.
    """
    facts = {}
    for name, values in images.facts.items():
        columns = values[rows]
        known = columns[~np.isnan(columns).any(axis=1)]
        if len(known) and np.ptp(known, axis=0).any():
            facts[name] = np.where(np.isnan(columns), np.median(known, axis=0), columns)
    return facts


def _kind(name: str) -> str:
    first = name[:1]
    if first.isalpha():
        return "upper" if first.isupper() else "lower"
    return "digit" if first.isdigit() else "other"


def _one_hot(values: Sequence[str]) -> Array:
    kinds = sorted(set(values))[:50]  # an ending of its own for each file tells nothing
    return np.array([[value == kind for kind in kinds] for value in values], np.float64)


def _compare(
    probs: Array, targets: Array, facts: dict[str, Array], folds: Sequence[tuple[Array, Array]],
    splits: tuple[str, ...],
) -> Shortcuts:  # fmt: skip
    from sklearn.metrics import balanced_accuracy_score

    models = _models()
    pairs = [(thin(train), judged) for train, judged in folds]
    head = [
        float(balanced_accuracy_score(targets[judged], probs[judged].argmax(axis=1)))
        for _, judged in folds
    ]
    if len(facts) > 1:
        facts = facts | {_TOGETHER: np.concatenate(list(facts.values()), axis=1)}
    scores = {
        (fact, name): _scores(make, columns, targets, pairs)
        for fact, columns in facts.items() for name, make in models.items()
    }  # fmt: skip

    def mean_of(key: tuple[str, str]) -> float:
        return float(np.mean(scores[key]))

    best = max(scores, key=mean_of)
    ratio = float(np.mean([len(judged) / len(train) for train, judged in pairs]))
    differences = [one - other for one, other in zip(head, scores[best], strict=True)]
    mean, low, high = paired_interval(differences, ratio, len(scores))
    alike = low == high
    rows: list[dict[str, Any]] = [
        {"fact": fact, **{name: mean_of((fact, name)) for name in models}} for fact in facts
    ]
    rows.sort(key=lambda row: -max(row["logistic"], row["tree"]))
    named = _name_best(rows, float(np.mean(head)))
    how = "every fold alike" if alike else f"{low:.3f} to {high:.3f}"
    if low > 0:
        verdict = "beats"
        sentence = (
            f"the head beats the best shortcut ({named}) by {mean:.3f} ({how}), which does not "
            "prove that it reads the images"
        )
    else:
        verdict = "not shown to beat"
        sentence = (
            f"no evidence that the head beats the best shortcut ({named}): balanced accuracy "
            f"differs by {mean:.3f} ({how})"
        )
    return Shortcuts(
        verdict, sentence, None, splits, len(targets), len(folds), float(np.mean(head)),
        tuple(rows),
        {"fact": best[0], "model": best[1], "balanced_accuracy": mean_of(best)},
        {"mean": mean, "low": None if alike else low, "high": None if alike else high},
    )  # fmt: skip


def _models() -> dict[str, Callable[[], Any]]:
    """Return what makes each kind of classifier that the facts are given to."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.tree import DecisionTreeClassifier

    return {
        "logistic": lambda: make_pipeline(
            StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000)
        ),
        "tree": lambda: DecisionTreeClassifier(
            max_depth=_DEPTH, class_weight="balanced", random_state=0
        ),
    }


def _name_best(rows: Sequence[dict[str, Any]], head: float) -> str:
    """Return the best of sorted rows, and up to six facts that alone are nearly as good."""
    named = list[str]()
    for row in rows:
        score = max(row["logistic"], row["tree"])
        if not named or (score >= head - _NEARLY and len(named) <= _MOST_NAMED):
            alone = "" if row["fact"] == _TOGETHER else " alone"
            named.append(f"{row['fact']}{alone}: {score:.3f}")
    return "; ".join(named)


def _scores(
    make: Callable[[], Any], columns: Array, targets: Array, pairs: Sequence[tuple[Array, Array]]
) -> list[float]:
    """Return the balanced accuracy of each fold, by a classifier of the other folds' rows."""
    from sklearn.metrics import balanced_accuracy_score

    scores = []
    for train, judged in pairs:
        fitted = make().fit(columns[train], targets[train])
        scores.append(float(balanced_accuracy_score(targets[judged],
                                                    fitted.predict(columns[judged]))))  # fmt: skip
    return scores
