"""Rounds of trials, then repeats: what the journal does not have yet is done, and noted there.

Reads and writes: a journal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featcache.errors import ConfigError
from featcache.progress import Progress
from featcache.sweeps.folds import Pair, Pool
from featcache.sweeps.journal import Journal
from featcache.sweeps.ranking import NUM_FINALISTS, Decision, decide, rank
from featcache.sweeps.space import Params, Space, build_configs
from featcache.sweeps.trials import Judge, Trial, count_steps, fit_trials

ROUND_TRIALS = 32
"""Trials of a round where the sampler does not learn: what a kill costs at most."""

Propose = Callable[[Sequence[Trial], int], dict[int, Params]]
"""Given the trials so far and the number of the round, returns the round."""


@dataclass(frozen=True)
class Plan:
    """What is asked of a search.

    Attributes:
        num_trials: The default among them.
        sampler: ``random`` or ``grid``; for any other, rounds are proposed one by one.
        space: What is searched.
        num_folds: None judges by the cache's own rows to choose by.
        num_repeats: Hold-outs, or repetitions of all folds, for the decision.
        select: See ``ranking.decide``.
        seed: Of all that is drawn.
    """

    num_trials: int
    sampler: str
    space: Space
    num_folds: int | None
    num_repeats: int
    select: str
    seed: int


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        trials: All, by their numbers.
        ranked: Those that are done, best first.
        decision: What the repeats came to; None where nothing but the default was left.
        num_head_steps: Optimizer steps of all heads, in this process.
    """

    trials: list[Trial]
    ranked: list[Trial]
    decision: Decision | None
    num_head_steps: int

    @property
    def chosen(self) -> int:
        """The number of the trial that is kept."""
        return 0 if self.decision is None else self.decision.chosen

    @property
    def failed(self) -> list[int]:
        """Numbers of the trials whose loss was no number."""
        return [trial.number for trial in self.trials if trial.state == "failed"]


class Search:
    """The rounds and the repeats of a sweep, as far as the journal does not have them.

    Args:
        plan: What is asked.
        judge: How heads are trained and judged.
        pool: The rows.
        propose: Makes the rounds of a sampler that learns; None for the others.
        progress: Show how far it is.

    Raises:
        CacheError: If the rows cannot be parted as the repeats or the folds need it.
    """

    def __init__(
        self, plan: Plan, judge: Judge, pool: Pool, propose: Propose | None, *, progress: bool
    ) -> None:
        self._plan, self._judge, self._pool = plan, judge, pool
        self._propose, self._shown = propose, progress
        self._num_head_steps, self._start = 0, time.perf_counter()
        # Both before any trial: what cannot be parted is said at once.
        number, seed = plan.num_folds, plan.seed
        self._folds = [pool.pair] if number is None else pool.make_folds(number, seed)
        seeds = [derive_seed(seed, 1, i) for i in range(plan.num_repeats)]
        self._again: list[tuple[int, list[Pair]]] = [
            (s, [pool.hold_out(s)] if number is None else pool.make_folds(number, s)) for s in seeds
        ]

    @property
    def pairs(self) -> list[Pair]:
        """All rows to train on and to judge by, of the trials and of the repeats."""
        return self._folds + [pair for _, pairs in self._again for pair in pairs]

    def search(self, journal: Journal) -> Found:
        """Do what the journal does not have, note it there, and return all."""
        self._journal = journal
        try:
            self._trials = [
                Trial.from_json(trial)
                for entry in journal.entries
                for trial in entry.get("trials", [])
            ]
            repeats = [entry["repeat"] for entry in journal.entries if "repeat" in entry]
            self._repeats = list(map(_check_repeat, repeats))
        except (TypeError, ValueError) as error:
            raise journal.damaged(error) from error
        rounds = [] if self._propose else list(plan_rounds(self._plan))
        num_trials = sum(map(len, rounds)) or self._plan.num_trials
        num_done = sum("trials" in entry for entry in self._journal.entries)
        with self._progress("trial", num_trials, len(self._trials)) as progress:
            while len(self._trials) < num_trials and not self._default_has_failed():
                propose = self._propose
                params = propose(self._trials, num_done) if propose else rounds[num_done]
                self._round(params, progress)
                num_done += 1
        if self._default_has_failed():
            raise _default_failed()
        self._trials.sort(key=lambda trial: trial.number)
        ranked = rank(self._trials, self._judge.sign)
        finalists = [trial for trial in ranked if trial.number][:NUM_FINALISTS]
        decision = self._repeat(finalists) if finalists else None
        return Found(self._trials, ranked, decision, self._num_head_steps)

    def _default_has_failed(self) -> bool:
        return any(trial.state == "failed" for trial in self._trials[:1])  # it comes first

    def _round(self, params: Mapping[int, Params], progress: Progress) -> None:
        arrays = (self._pool.take(pair) for pair in self._folds)
        done = fit_trials(
            self._judge, params, arrays, self._trials, seed=self._plan.seed,
            on_epoch=self._count_steps,
            on_share=lambda share: progress.move_by(share / len(self._folds), self._speed()),
        )  # fmt: skip
        self._journal.append({"trials": [trial.as_json() for trial in done]})
        # As a sweep that was killed would read them.
        self._trials += map(Trial.from_json, self._journal.entries[-1]["trials"])
        progress.move_to(len(self._trials))  # some may have ended early

    def _repeat(self, finalists: Sequence[Trial]) -> Decision | None:
        """Train the finalists and the default again, and decide."""
        plan = {0: Params()} | {trial.number: trial.params for trial in finalists}
        with self._progress("repeat", len(self._again), len(self._repeats)) as progress:
            for seed, pairs in self._again[len(self._repeats) :]:
                share = 1 / len(plan) / len(pairs)
                found = [self._score_again(plan, pair, seed, progress, share) for pair in pairs]
                repeat = {key: [scores[key] for scores in found] for key in found[0]}
                self._journal.append({"repeat": repeat})
                self._repeats.append(repeat)
                progress.move_to(len(self._repeats))
        joined = {key: [x for one in self._repeats for x in one[key]] for key in self._repeats[0]}
        scores: dict[str, list[float]] = {
            key: [x for x in values if x is not None]
            for key, values in joined.items() if None not in values
        }  # fmt: skip
        if "0" not in scores:
            raise _default_failed()
        if len(scores) == 2:  # the default and the prior
            return None
        pairs = [pair for _, again in self._again for pair in again]
        ratio = float(np.mean([len(valid) / len(train) for train, valid in pairs]))
        return decide(scores, self._judge.sign, ratio, self._plan.select)

    def _score_again(
        self, plan: Mapping[int, Params], pair: Pair, seed: int, progress: Progress, share: float
    ) -> dict[str, float | None]:
        """Train some heads on a pair of rows; return their figures, and that of the prior.

        None stands where the loss was no number. Each head is ``share`` of a repeat.
        """
        arrays, judge = self._pool.take(pair), self._judge
        num_rows = len(arrays[1])
        steps = {n: count_steps(params, num_rows) for n, params in plan.items()}

        def on_epoch(number: int, _: dict[str, Any]) -> None:
            self._count_steps(steps[number])

        results = judge.fit(
            plan, arrays, seed=seed, on_epoch=on_epoch,
            on_share=lambda done: progress.move_by(done * share, self._speed()),
        )  # fmt: skip
        scores = {"prior": judge.score_prior(arrays[1], arrays[3])}
        for number, (head, result) in results.items():
            diverged = result.diverged_in is not None
            scores[str(number)] = None if diverged else judge.score(head, result, arrays)
        return scores

    def _progress(self, unit: str, total: int, done: int) -> Progress:
        return Progress("sweep", unit, total, done=done, shown=self._shown)

    def _count_steps(self, num_steps: int) -> None:
        self._num_head_steps += num_steps

    def _speed(self) -> str:
        rate = self._num_head_steps / (time.perf_counter() - self._start)
        return f"{rate:,.0f} head-steps/s"


def plan_rounds(plan: Plan) -> Iterator[dict[int, Params]]:
    """Yield the rounds of a sampler that does not learn.

    Heads of one shape, batch size, optimizer and number of epochs come one after the other,
    wherever drawn: they train as one stack.
    """
    if plan.sampler == "grid":
        points = [point for point in plan.space.grid() if not _is_default(point)]
        params = dict(enumerate([Params(), *points]))
    else:
        drawn = (plan.space.draw(plan.seed, number) for number in range(1, plan.num_trials))
        params = dict(enumerate([Params(), *drawn]))
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, options in params.items():
        keys = ("hidden", "batch_size", "optimizer", "epochs")
        groups.setdefault(tuple(options.get(key) for key in keys), []).append(number)
    order = [number for group in groups.values() for number in group]
    for i in range(0, len(order), ROUND_TRIALS):
        yield {number: params[number] for number in order[i : i + ROUND_TRIALS]}


def check_grid(space: Space, num_trials: int) -> None:
    """Refuse a grid that the trials cannot hold: part of a grid is none.

    Raises:
        ConfigError: If so.
    """
    num_wanted = space.num_points()
    if num_wanted <= num_trials:
        num_wanted += not any(map(_is_default, space.grid()))
    if num_wanted > num_trials:
        raise ConfigError(
            "--trials", expected=f"{num_wanted:,}, for every point of the grid and the default",
            found=num_trials, hint="Raise it, or give a smaller grid with --space",
        )  # fmt: skip


def _is_default(params: Params) -> bool:
    return build_configs(params, 1, 2) == build_configs({}, 1, 2)


def _default_failed() -> ConfigError:
    return ConfigError(
        "the default head", expected="a finite loss", found="none",
        hint="Look at the features: featcache verify",
    )  # fmt: skip


def derive_seed(seed: int, purpose: int, number: int) -> int:
    """Return a seed of its own for one thing that is drawn."""
    state = np.random.SeedSequence([seed, purpose, number]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(2))


def _check_repeat(scores: Any) -> dict[str, list[float | None]]:
    """Return the scores of a repeat from a journal; raise ValueError if they are none."""
    fits = isinstance(scores, dict) and {"0", "prior"} <= scores.keys()
    if not fits or not all(isinstance(found, list) for found in scores.values()):
        raise ValueError(f"a repeat of {scores!r:.80}")
    if any(type(x) not in {int, float, type(None)} for found in scores.values() for x in found):
        raise ValueError(f"a repeat of {scores!r:.80}")
    return dict(scores)
