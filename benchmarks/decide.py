"""How often is the true recall below the bound that ``decide`` gives?

Each set is drawn anew: features of two classes, a head trained on some of them, a threshold chosen
on others, and the recall on 4,000 fresh positive rows. A short try:
``python benchmarks/decide.py --sets 20 --out /tmp``.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from measuring import HERE, as_table, current_load, frame_report, write_report

from featcache.heads.config import TrainingConfig
from featcache.heads.fit import fit_head
from featcache.heads.head import HeadConfig
from featcache.heads.prediction import predict_probs
from featcache.metrics.thresholds import Choice, choose_for_recall
from featcache.runtime import CPU

NUM_FEATURES, NUM_TRAIN, NUM_VALID, SHARE_POSITIVE = 64, 160, 200, 0.35
SHIFT = 0.42  # of each of 16 features of the positives: a ROC AUC of about 0.93
WISH, NUM_FRESH, NUM_FOLDS, NUM_REPEATS = 0.9, 4_000, 5, 3
HEADS = {
    "default": (HeadConfig(NUM_FEATURES, 2), TrainingConfig()),
    "logistic": (
        HeadConfig(NUM_FEATURES, 2, (), 0.0), TrainingConfig(optimizer="lbfgs"),
    ),
}  # fmt: skip

Array = npt.NDArray[Any]


class DrawnSet:
    """Rows to train on and to choose by, and fresh ones, all of one distribution.

    Args:
        seed: Of the rows.
        head: A key of ``HEADS``.
    """

    def __init__(self, seed: int, head: str) -> None:
        self._seed, (self._config, self._training) = seed, HEADS[head]
        rng = np.random.default_rng(seed)
        number = NUM_TRAIN + NUM_VALID
        self.targets = (rng.permutation(number) < round(SHARE_POSITIVE * number)).astype(np.int64)
        self.features = self._draw(rng, self.targets)
        self._fresh = self._draw(rng, np.ones(NUM_FRESH, np.int64))
        self._rng = rng

    def _draw(self, rng: np.random.Generator, targets: Array) -> Array:
        features = rng.standard_t(6, (len(targets), NUM_FEATURES))
        features[:, :16] += SHIFT * targets[:, None]
        return features.astype(np.float32)

    def train(self, rows: Array, chosen_by: Array, seed: int = 0) -> Any:
        """Return the state of a head."""
        return fit_head(
            self._config, self._training, self.features[rows], self.targets[rows],
            self.features[chosen_by], self.targets[chosen_by], seed=seed, data_seed=self._seed,
            device=CPU, say=lambda _: None,
        ).state  # fmt: skip

    def predict(self, state: Any, rows: Array | None = None) -> Array:
        """Return the probability of the positive class; of the fresh rows without ``rows``."""
        features = self._fresh if rows is None else self.features[rows]
        return predict_probs(self._config, state, features)[:, 1]

    def hold_out(self, rows: Array, share: float) -> tuple[Array, Array]:
        """Return the rows to train on and those to choose the epoch by, stratified."""
        mixed = self._rng.permutation(rows)
        ordered = mixed[np.argsort(self.targets[mixed], kind="stable")]
        is_held = np.arange(len(rows)) % round(1 / share) == 0
        return ordered[~is_held], ordered[is_held]

    def folds(self) -> Iterator[tuple[Array, Array]]:
        """Yield the rows outside and inside each fold, stratified."""
        mixed = self._rng.permutation(len(self.targets))
        ordered = mixed[np.argsort(self.targets[mixed], kind="stable")]
        number = np.arange(len(ordered)) % NUM_FOLDS
        for fold in range(NUM_FOLDS):
            yield ordered[number != fold], ordered[number == fold]


def judge_valid(drawn: DrawnSet) -> Iterator[tuple[str, Choice, float]]:
    """Yield what each kind of valid gives: its name, the choice, the recall on fresh rows."""
    train, valid = np.arange(NUM_TRAIN), np.arange(NUM_TRAIN, NUM_TRAIN + NUM_VALID)
    for name, pair in (
        ("valid, fresh", drawn.hold_out(train, 0.2)),
        ("valid that chose the epoch", (train, valid)),
    ):
        state = drawn.train(*pair)
        choice = _choose(drawn, drawn.predict(state, valid), valid)
        yield name, choice, float((drawn.predict(state) >= choice.threshold).mean())


def judge_folds(drawn: DrawnSet) -> Iterator[tuple[str, Choice, float]]:
    """Yield the same for out-of-fold scores, for one head and for the mean of the folds'."""
    everything = np.arange(NUM_TRAIN + NUM_VALID)
    of_folds, fresh = np.empty((NUM_REPEATS, len(everything))), list[Array]()
    for repeat in range(NUM_REPEATS):
        for rest, inside in drawn.folds():
            state = drawn.train(*drawn.hold_out(rest, 0.2), seed=repeat)
            of_folds[repeat, inside] = drawn.predict(state, inside)
            fresh.append(drawn.predict(state))
    train, valid = everything[:NUM_TRAIN], everything[NUM_TRAIN:]
    heads = {
        "one head": drawn.predict(drawn.train(train, valid)),
        "mean of the folds' heads": np.mean(fresh, axis=0),
        "mean of the first repeat's heads": np.mean(fresh[:NUM_FOLDS], axis=0),
    }
    scores = {"first of 3 repeats": of_folds[0], "mean of 3 repeats": of_folds.mean(axis=0)}
    for way, of_rows in scores.items():
        choice = _choose(drawn, of_rows, everything)
        for name, probs in heads.items():
            yield f"{way}, {name}", choice, float((probs >= choice.threshold).mean())
    each = [_choose(drawn, of_rows, everything) for of_rows in of_folds]
    median = sorted(each, key=lambda choice: choice.threshold)[NUM_REPEATS // 2]
    for name, probs in heads.items():
        recall = float((probs >= median.threshold).mean())
        yield f"median threshold of 3 repeats, {name}", median, recall


def _choose(drawn: DrawnSet, scores: Array, rows: Array) -> Choice:
    return choose_for_recall(scores, drawn.targets[rows] == 1, WISH)


def summarise(found: Sequence[tuple[Choice, float]]) -> dict[str, Any]:
    """Return how often the recall is below the bound, and how recall and threshold lie."""
    below = [recall < choice.bound for choice, recall in found]
    share, number = float(np.mean(below)), len(found)
    return {
        "num_sets": number, "share_below_bound": share,
        "standard_error": float(np.sqrt(share * (1 - share) / number)),
        "bound": float(np.mean([choice.bound for choice, _ in found])),
        "recall": float(np.mean([recall for _, recall in found])),
    }  # fmt: skip


def main() -> None:
    """Print a table and write ``decide.json`` and ``decide.md``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=2000, help="drawn sets per head")
    parser.add_argument("--fold-every", type=int, default=4, help="every n-th set has folds too")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no set after so many")
    parser.add_argument("--seed", type=int, default=0, help="of the first set")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    load, start = current_load(), time.perf_counter()
    found = {head: defaultdict[str, list[tuple[Choice, float]]](list) for head in HEADS}
    for number in range(options.sets):
        if time.perf_counter() - start > 60 * options.minutes:
            break
        for head, of_head in found.items():
            drawn = DrawnSet(options.seed + number, head)
            with_folds = number % options.fold_every == 0
            for name, choice, recall in [
                *judge_valid(drawn), *(judge_folds(drawn) if with_folds else ()),
            ]:  # fmt: skip
                of_head[name].append((choice, recall))
    results = {
        head: {name: summarise(pairs) for name, pairs in of_head.items()}
        for head, of_head in found.items()
    }
    report = frame_report(
        "decide", torch.device("cpu"), load, 1, wish=WISH, seed=options.seed, num_train=NUM_TRAIN,
        num_valid=NUM_VALID, share_positive=SHARE_POSITIVE, num_fresh=NUM_FRESH,
        num_folds=NUM_FOLDS, num_repeats=NUM_REPEATS, seconds=time.perf_counter() - start,
        results=results,
    )  # fmt: skip
    rows = [
        [
            head, name, row["num_sets"],
            f"{row['share_below_bound']:.1%} +- {row['standard_error']:.1%}",
            f"{row['bound']:.3f}", f"{row['recall']:.3f}",
        ]
        for head, of_head in results.items() for name, row in of_head.items()
    ]  # fmt: skip
    header = ["head", "rows that the threshold is chosen by", "sets", "below the bound", "bound"]
    table = as_table([*header, "recall"], rows, num_text=2)
    write_report(options.out, "decide", report, "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
