"""Two runs on the same rows: which is better, and may that be chance?

Reads: the second run, and its cache where its features are others. Writes: nothing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.cache_split import CacheSplit
from featcache.cache.reading import Cache
from featcache.cache.side_by_side import caches_of, join_caches
from featcache.errors import ConfigError, RunError, printable
from featcache.evaluation.lines import units_text
from featcache.evaluation.predicted_rows import PredictedRows, predict_rows
from featcache.evaluation.seen_rows import find_seen, leave_out_seen, warn_of_seen
from featcache.formatting import count, decimal, join_few
from featcache.heads.rows import RowNumbers
from featcache.heads.run import Run, load_run
from featcache.metrics.areas import compare_auc, mcnemar, roc_auc
from featcache.metrics.rates import count_groups
from featcache.runtime import Say

MCNEMAR = "McNemar, exact"
OF_GROUPS = "McNemar, exact, the rows of a group exchanged together (Obuchowski)"

_Mask = npt.NDArray[np.bool_]
_Floats = npt.NDArray[np.float64]


class OtherRun:
    """A second run, to be measured on the rows that a first one is measured on.

    Args:
        against: The second run's folder.
        first: The first run.
        positive: The class that is looked for, or None.

    Raises:
        RunError: If it is damaged, or its classes or its task are not those of the first.
        ConfigError: If rows have several labels and none of them is looked for.
    """

    def __init__(self, against: str | Path, first: Run, positive: str | None) -> None:
        self.name, self.run, self._first = Path(against).as_posix(), load_run(against), first
        if {*self.run.classes} != {*first.classes} or self.run.task != first.task:
            raise RunError(
                "--against", expected=f"a {first.task} run of {join_few(first.classes)}",
                found=f"a {self.run.task} one of {join_few(self.run.classes)}", where=against,
            )  # fmt: skip
        if first.task == "multilabel" and positive is None:
            raise ConfigError("--against", expected="--positive where images have several labels",
                              found="none")  # fmt: skip

    def find_rows(
        self, cache: Cache, split: CacheSplit, rows: RowNumbers, open_own: Callable[[Run], Cache],
        *, unseen: bool, say: Say,
    ) -> RowNumbers:  # fmt: skip
        """Find some rows where the second run can be measured on them; return those to be used.

        A run that was trained on features of the same identity is measured on the same cache, or
        on those of several side by side that it was trained on the like of. Another is measured on
        its own, whose split must have the same images: of equal paths and, where they are known,
        equal hashes.

        Args:
            cache: The cache that the first run is measured on.
            split: One of its splits.
            rows: n numbers of its rows.
            open_own: Opens the caches that a run was trained on.
            unseen: Leave out the rows that the second run has seen; else they are warned of.
            say: Receives lines for people.

        Raises:
            RunError: If the second run's cache lacks one of the images.
            CacheError: If no row is left.
        """
        self._cache, its_split, its_rows = cache, split, rows
        fingerprints = [[c["fingerprint"] for c in run.caches] for run in (self.run, self._first)]
        if fingerprints[0] != fingerprints[1]:
            at_hand = dict(zip(fingerprints[1], caches_of(cache), strict=True))
            wanted = [at_hand.get(fingerprint) for fingerprint in fingerprints[0]]
            found = [each for each in wanted if each is not None]
            self._cache = join_caches(found) if len(found) == len(wanted) else open_own(self.run)
            its_split = self._cache.split(split.name)
            its_rows = _match_rows(split, its_split, rows, self._cache.path)
        seen = find_seen(self.run, self._cache, its_split, its_rows)
        if unseen:
            kept = leave_out_seen(
                np.arange(len(rows)),
                seen,
                self._cache,
                split.name,
                say,
                head=f"the head of {self.name}",
            )
            rows, its_rows = rows[kept], its_rows[kept]
        else:
            warn_of_seen(seen, split.name, f"the figures of {printable(self.name)} are too good")
        self._split_name, self._rows = split.name, its_rows
        return rows

    def compare(
        self, first: PredictedRows, positive: str | None, say: Say, *, average_views: bool
    ) -> dict[str, Any]:
        """Predict the rows by the second run and return what ``compare_rows`` says.

        Args:
            first: The rows that ``find_rows`` returned, with the first run's predictions.
            positive: The class that is looked for, or None.
            say: Receives lines for people.
            average_views: Whether probabilities are means over a row's views.

        Raises:
            RunError: If its cache has another target for one of the rows.
        """
        second = self._predict(first, say, average_views=average_views)
        return compare_rows(first, second, self.name, positive)

    def _predict(self, first: PredictedRows, say: Say, *, average_views: bool) -> PredictedRows:
        """Return the rows with the second run's probabilities, in the first's order of classes."""
        second = predict_rows(
            self.run, self._cache, self._split_name, self._rows, say, average_views=average_views
        )
        order = [second.classes.index(name) for name in first.classes]
        targets = (
            second.targets[:, order] if first.has_labels else np.argsort(order)[second.targets]
        )
        differ = ~np.isclose(targets, first.targets, equal_nan=True)
        if differ.any():
            row = int(np.argmax(differ.reshape(len(differ), -1).any(axis=1)))
            raise RunError(
                "--against", expected="a cache with the same targets", where=self._cache.path,
                found=f"another for {first.paths[row]}",
            )  # fmt: skip
        return replace(first, probs=second.probs[:, order])


def compare_rows(
    first: PredictedRows, second: PredictedRows, run: str, positive: str | None
) -> dict[str, Any]:
    """Return how much better one run is than another, on the same rows.

    Args:
        first: n rows with the predictions of one.
        second: The same rows with those of the other.
        run: Name of the other.
        positive: The class that is looked for, or None.

    Returns:
        A JSON object: ``run``; ``num_samples``; ``num_groups`` and ``num_ungrouped`` as in
        ``Evaluation.intervals``; ``test``; ``accuracy`` (None with several labels), ``sensitivity``
        and ``specificity`` (None without ``positive``), each with the two rates ``first`` and
        ``second``, the rows that ``only_first`` and ``only_second`` gets right, and the ``p_value``
        of McNemar's test;
        ``roc_auc`` of ``positive`` or of two classes, else None: ``first``, ``second``,
        ``difference`` with its 95 % ``interval`` and ``p_value`` (``metrics.areas.compare_auc``).
    """
    has_groups = any(first.groups)
    facts: dict[str, Any] = {
        "run": run, "num_samples": len(first.targets),
        "num_groups": count_groups(first.groups) if has_groups else None,
        "num_ungrouped": first.groups.count("") if has_groups else None,
        "test": OF_GROUPS if count_groups(first.groups) < len(first.groups) else MCNEMAR,
        "accuracy": None, "sensitivity": None, "specificity": None, "roc_auc": None,
    }  # fmt: skip
    targets = first.targets
    if not first.has_labels:
        facts["accuracy"] = _compare_rates(
            first.groups, first.preds == targets, second.preds == targets
        )
    if positive is None and (first.has_labels or len(first.classes) != 2):
        return facts
    index = 1 if positive is None else first.classes.index(positive)
    if first.has_labels:
        of_class, of_others = targets[:, index] == 1, targets[:, index] == 0
    else:
        of_class, of_others = targets == index, targets != index
    if positive is not None:
        says, other_says = _says_yes(first, index), _says_yes(second, index)
        for name, rows, right_a, right_b in (
            ("sensitivity", of_class, says, other_says),
            ("specificity", of_others, ~says, ~other_says),
        ):
            groups = _taken(first.groups, rows)
            facts[name] = _compare_rates(groups, right_a[rows], right_b[rows])
    known = of_class | of_others
    if of_class.any() and of_others.any():
        scores = first.probs[known, index], second.probs[known, index]
        facts["roc_auc"] = _compare_areas(of_class[known], *scores, _taken(first.groups, known))
    return facts


def comparison_lines(facts: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield a comparison as lines of text.

    Args:
        facts: What ``compare_rows`` returned; of None there are no lines.
    """
    if facts is None:
        return
    rows, groups = count(facts["num_samples"], "image"), units_text(facts)
    yield printable(f"this run against {facts['run']}, on the same {rows}{groups}")
    for name in ("accuracy", "sensitivity", "specificity"):
        if (row := facts[name]) is not None:
            text = (
                f"  {name:<12} {decimal(row['first'])} against {decimal(row['second'])}; right "
                f"only here {row['only_first']:,}, there {row['only_second']:,}; "
                f"McNemar p {_p(row['p_value'])}"
            )
            yield from textwrap.wrap(text, 80, subsequent_indent="               ")
    if (row := facts["roc_auc"]) is not None:
        low, high = row["interval"]
        yield f"  roc auc      {decimal(row['first'])} against {decimal(row['second'])}"
        yield (
            f"  difference   {row['difference']:+.3f} ({low:+.3f} to {high:+.3f}, 95 %), "
            f"DeLong p {_p(row['p_value'])}"
        )
    if groups:
        yield "  (groups count as a whole in both tests)"


def _p(value: float) -> str:
    return decimal(value) if value >= 0.0005 else "<0.001"


def _match_rows(split: CacheSplit, other: CacheSplit, rows: RowNumbers, where: Path) -> RowNumbers:
    """Return the numbers in another cache of some rows of one.

    Raises:
        RunError: If it lacks one, or has another image under its path.
    """
    numbers = {path: number for number, path in enumerate(other.paths)}
    found = [numbers.get(split.paths[row]) for row in rows]
    lacking = [split.paths[row] for row, number in zip(rows, found, strict=True) if number is None]
    matched = np.array([number for number in found if number is not None], np.int64)
    fault = f"{len(lacking):,} are not there, such as {lacking[0]}" if lacking else ""
    if not lacking:
        ours, theirs = split.image_sha256[rows], other.image_sha256[matched]
        known = ours.any(axis=1) & theirs.any(axis=1)
        differ = np.flatnonzero(known & (ours != theirs).any(axis=1))
        if len(differ):
            fault = f"{len(differ):,} are other images, such as {split.paths[rows[differ[0]]]}"
    if fault:
        raise RunError(
            "--against", expected=f"the same {count(len(rows), 'image')} in split {split.name} of "
            "the cache of that run", found=fault, where=where,
            hint="Compare runs whose caches are of the same images",
        )  # fmt: skip
    return matched


def _says_yes(rows: PredictedRows, index: int) -> _Mask:
    says: _Mask = rows.preds[:, index] if rows.has_labels else rows.preds == index
    return says


def _taken(groups: list[str], which: _Mask) -> list[str]:
    return [groups[row] for row in np.flatnonzero(which).tolist()]


def _compare_rates(groups: list[str], first: _Mask, second: _Mask) -> dict[str, Any] | None:
    if not len(first):
        return None
    return {
        "first": float(first.mean()),
        "second": float(second.mean()),
        "only_first": int((first & ~second).sum()),
        "only_second": int((second & ~first).sum()),
        "p_value": mcnemar(first, second, groups),
    }


def _compare_areas(
    is_yes: _Mask, first: _Floats, second: _Floats, groups: list[str]
) -> dict[str, Any]:
    found = compare_auc(is_yes, first, second, groups)
    return {
        "first": roc_auc(is_yes, first),
        "second": roc_auc(is_yes, second),
        "difference": found.difference,
        "interval": [found.low, found.high],
        "p_value": found.p_value,
    }
