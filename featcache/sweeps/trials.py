"""Trials in, scores out: heads of a round trained as stacks, the hopeless given up on the way.

A trial is given up (successive halving, asynchronous) when after a quarter or half of its epochs
its lowest validation loss is above the median of what the trials of earlier rounds had there, which
were not given up before. Rounds before its own decide, not its own: heads of a round run side by
side in no fixed order, and a sweep must give the same twice.

Reads and writes nothing.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featcache.heads.config import LBFGS, FitResult, HeadJob, choose_strengths
from featcache.heads.fit import fit_heads
from featcache.heads.head import HeadConfig
from featcache.heads.prediction import predict_probs
from featcache.heads.rows import Targets
from featcache.metrics.scores import compute_score, describe_metric
from featcache.runtime import Device, Say, log_line
from featcache.sweeps.folds import Arrays
from featcache.sweeps.space import Params, build_configs, params_from_json

_STATES = ("done", "pruned", "failed")
_LEAST_REFERENCE = 8  # trials: the median of fewer says little

OnEpoch = Callable[[int], None]
"""Called with a trial's number, the steps it took, and whether that was its last epoch here."""


@dataclass(frozen=True)
class Trial:
    """A head configuration and what came of it.

    Attributes:
        number: From 0, which is the default head.
        params: Options that differ from the defaults of ``train``.
        state: ``done``, ``pruned`` (given up on the way) or ``failed`` (its loss was no number).
        score: Mean over the folds; None unless done.
        losses: The validation loss of each epoch, fold by fold.
        best_epochs: The epoch kept of each fold.
        fold_scores: The score of each fold; none in journals of earlier versions.
    """

    number: int
    params: Params
    state: str
    score: float | None
    losses: list[list[float]]
    best_epochs: list[int]
    fold_scores: list[float] = dataclasses.field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the trial as a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Trial:
        """Return the trial that ``as_json`` wrote.

        Raises:
            ValueError: If it did not write this.
        """
        try:
            trial = cls(**{**value, "params": params_from_json(value["params"])})
            numbers = [trial.number, *trial.best_epochs]
            scores = [trial.score or 0.0, *trial.fold_scores]
            scores += [loss for fold in trial.losses for loss in fold]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a trial without {error}") from error
        whole = all(type(number) is int and 0 <= number < 1 << 31 for number in numbers)
        if not whole or any(type(score) not in {int, float} for score in scores):
            raise ValueError(f"a trial of {value!r:.80}")
        if trial.state not in _STATES:
            raise ValueError(f"a trial that is {trial.state!r:.40}")
        return trial


@dataclass(frozen=True)
class Judge:
    """How heads are trained and judged in a sweep.

    Attributes:
        metric: See ``metrics.compute_score``.
        positive: The class that is looked for, or None.
        classes: Names.
        device: Where to compute.
        prunes: Whether hopeless trials are given up.
        say: Where lines for people go.
        task: ``multiclass`` or ``multilabel``.
    """

    metric: str
    positive: str | None
    classes: Sequence[str]
    device: Device
    prunes: bool = True
    say: Say = log_line
    task: str = "multiclass"

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return -1 if self.metric == "loss" else 1

    @property
    def description(self) -> str:
        """The metric with its averaging."""
        has_labels = self.task == "multilabel"
        return describe_metric(self.metric, self.positive, has_labels=has_labels)

    def score_prior(self, train_targets: Targets, targets: Targets) -> float | None:
        """Return what is got without looking: by the shares of the classes to train on.

        For multilabel caches, the share of yes among the known answers of a class, each answer
        being seen once more than it was (Laplace's rule): one never seen does not cost all.
        """
        if targets.ndim == 2:
            num_yes, num_no = ((train_targets == answer).sum(0) for answer in (1, 0))
            shares = (num_yes + 1) / (num_yes + num_no + 2)
        else:
            shares = np.bincount(train_targets, minlength=len(self.classes)) / len(train_targets)
        probs = np.tile(shares, (len(targets), 1))
        return compute_score(self.metric, targets, probs, self.classes, self.positive)

    def score(self, head: HeadConfig, result: FitResult, arrays: Arrays) -> float:
        """Return the figure of a trained head."""
        if self.metric in {"loss", "accuracy"}:
            return float(result.history[result.best_epoch - 1][f"valid_{self.metric}"])
        probs = predict_probs(head, result.state, arrays[2], self.task)
        score = compute_score(self.metric, arrays[3], probs, self.classes, self.positive)
        assert score is not None  # of the prior it was not
        return score

    def fit(
        self,
        plan: Mapping[int, Params],
        arrays: Arrays,
        *,
        seed: int,
        on_epoch: Callable[[int, dict[str, Any]], bool | None],
        on_share: Callable[[float], None],
    ) -> dict[int, tuple[HeadConfig, FitResult]]:
        """Train the heads of a plan on one pair of rows; seed and order by ``seed``."""
        num_features, numbers = arrays[0].shape[-1], list(plan)
        configs = [build_configs(plan[n], num_features, len(self.classes)) for n in numbers]
        results = fit_heads(
            [HeadJob(head, training, seed) for head, training in configs], *arrays, data_seed=seed,
            device=self.device, classes=self.classes,
            on_epoch=lambda place, row: on_epoch(numbers[place], row), on_share=on_share,
            say=self.say,
        )  # fmt: skip
        heads = [head for head, _ in configs]
        return dict(zip(numbers, zip(heads, results, strict=True), strict=True))


def fit_trials(
    judge: Judge,
    plan: Mapping[int, Params],
    folds: Iterable[Arrays],
    earlier: Sequence[Trial],
    *,
    seed: int,
    on_epoch: OnEpoch,
    on_share: Callable[[float], None],
) -> list[Trial]:
    """Train a round of trials.

    Args:
        judge: How.
        plan: Options by number.
        folds: The rows of each fold.
        earlier: Trials of earlier rounds.
        seed: Decides initial weights, dropout and order, in each trial alike.
        on_epoch: For the progress.
        on_share: As for ``fit_heads``.

    Returns:
        The trials, by their numbers.
    """
    alive, scores = dict(plan), {number: list[float]() for number in plan}
    losses: dict[int, list[list[float]]] = {number: [] for number in plan}
    best: dict[int, list[int]] = {number: [] for number in plan}
    states = dict.fromkeys(plan, "done")
    for fold, arrays in enumerate(folds):
        halving = _Halving(earlier, fold)
        num_rows = len(arrays[1])
        watch = _Watch(alive, halving if judge.prunes else None, num_rows, on_epoch)
        fitted = judge.fit(alive, arrays, seed=seed, on_epoch=watch, on_share=on_share)
        for number, (head, result) in fitted.items():
            losses[number].append(watch.losses[number])
            if number in watch.given_up:
                states[number] = "pruned"
            best[number].append(result.best_epoch)
            if result.diverged_in is not None:
                states[number] = "failed"
            elif states[number] == "done":
                scores[number].append(judge.score(head, result, arrays))
        alive = {n: params for n, params in alive.items() if states[n] == "done"}
        if not alive:
            break
    return [
        Trial(
            number, params, states[number],
            statistics.fmean(scores[number]) if states[number] == "done" else None,
            losses[number], best[number], scores[number],
        )
        for number, params in sorted(plan.items())
    ]  # fmt: skip


def count_steps(params: Params, num_rows: int) -> int:
    """Return the optimizer steps of an epoch; with lbfgs, a strength counts as one."""
    if params.get("optimizer") == LBFGS:
        return 1
    return math.ceil(num_rows / build_configs(params, 1, 2)[1].rows_per_step(num_rows))


def count_epochs(params: Params) -> int:
    """Return the epochs of a trial, or with lbfgs the strengths."""
    training = build_configs(params, 1, 2)[1]
    if training.optimizer == LBFGS:
        return len(choose_strengths(training, 1, has_valid=True))
    return training.epochs


class _Watch:
    """Sees every epoch of a round on one fold, and says which heads are given up."""

    def __init__(
        self, plan: Mapping[int, Params], halving: _Halving | None, num_rows: int,
        on_epoch: OnEpoch,
    ) -> None:  # fmt: skip
        self._halving, self._on_epoch = halving, on_epoch
        self._steps = {number: count_steps(params, num_rows) for number, params in plan.items()}
        self._epochs = {number: count_epochs(params) for number, params in plan.items()}
        self.losses: dict[int, list[float]] = {number: [] for number in plan}
        self.given_up: set[int] = set()

    def __call__(self, number: int, row: dict[str, Any]) -> bool:
        losses, epochs = self.losses[number], self._epochs[number]
        losses.append(row["valid_loss"])
        of_epochs = "epoch" in row  # a path of strengths has no hopeless beginning
        if number and of_epochs and self._halving and self._halving.is_hopeless(losses, epochs):
            self.given_up.add(number)
        is_over = number in self.given_up
        self._on_epoch(self._steps[number])
        return is_over


class _Halving:
    """What trials of earlier rounds had in a fold, rung by rung."""

    def __init__(self, earlier: Sequence[Trial], fold: int) -> None:
        self._losses = [
            trial.losses[fold] for trial in earlier
            if len(trial.losses) > fold and trial.params.get("optimizer") != LBFGS
        ]  # fmt: skip
        self._medians: dict[int, float | None] = {}

    def is_hopeless(self, losses: Sequence[float], epochs: int) -> bool:
        """Whether a head with these losses so far is in the worse half at a rung."""
        epoch = len(losses)
        if epoch >= epochs or epoch not in {epochs // 4, epochs // 2}:
            return False
        if epoch not in self._medians:
            reached = [min(other[:epoch]) for other in self._losses if len(other) >= epoch]
            enough = len(reached) >= _LEAST_REFERENCE
            self._medians[epoch] = statistics.median(reached) if enough else None
        median = self._medians[epoch]
        return median is not None and min(losses) > median
