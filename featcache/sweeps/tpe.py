"""Propose a round of trials by TPE, Optuna's sampler, from the trials of earlier rounds.

Reads and writes nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from featcache.errors import ConfigError
from featcache.sweeps.search import Plan, derive_seed
from featcache.sweeps.space import Params, Space
from featcache.sweeps.trials import Trial

_ROUND_TRIALS = 16  # TPE learns from a round before it proposes the next


def propose_round(
    plan: Plan, sign: int, earlier: Sequence[Trial], number: int
) -> dict[int, Params]:
    """Return the next round of trials, chosen by TPE from the results of the earlier ones.

    The study is built anew each time from those and a seed of the round: nothing of Optuna's own
    is stored, and a killed round is proposed again as it was.

    Args:
        plan: The sweep's.
        sign: 1 where a higher score is better, else -1.
        earlier: All trials so far, the default head first.
        number: Of the round, from 0.

    Returns:
        Number of the trial -> its options.
    """
    first = len(earlier)
    numbers = range(first, min(first + _ROUND_TRIALS, plan.num_trials))
    if not earlier:
        return {n: plan.space.draw(plan.seed, n) if n else Params() for n in numbers}
    optuna = import_optuna()
    distributions: dict[str, Any] = {}
    for d in plan.space.dimensions:
        if d.choices:
            distributions[d.name] = optuna.distributions.CategoricalDistribution(
                tuple(range(len(d.choices)))
            )
        elif d.is_whole:
            distributions[d.name] = optuna.distributions.IntDistribution(d.low, d.high, log=d.log)
        else:
            distributions[d.name] = optuna.distributions.FloatDistribution(d.low, d.high, log=d.log)
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant_liar is called experimental
            seed = derive_seed(plan.seed, 2, number) % (1 << 32)
            sampler = optuna.samplers.TPESampler(n_startup_trials=1, constant_liar=True, seed=seed)
            study = optuna.create_study(sampler=sampler)
            for trial in earlier:
                if trial.number:  # the default's options may lie outside the space
                    study.add_trial(
                        _as_optuna_trial(optuna, trial, plan.space, distributions, sign)
                    )
            asked = [study.ask(distributions).params for _ in numbers]
    finally:
        optuna.logging.set_verbosity(level)
    choices = {d.name: d.choices for d in plan.space.dimensions if d.choices}
    return {
        n: plan.space.fixed | {k: choices[k][v] if k in choices else v for k, v in params.items()}
        for n, params in zip(numbers, asked, strict=True)
    }


def _as_optuna_trial(
    optuna: Any, trial: Trial, space: Space, distributions: Mapping[str, Any], sign: int
) -> Any:
    """Return a trial in Optuna's form; a failed one ranks below all that were pruned."""
    values = {
        d.name: d.choices.index(trial.params[d.name]) if d.choices else trial.params[d.name]
        for d in space.dimensions
    }
    value = None if trial.score is None else -sign * trial.score
    states = optuna.trial.TrialState
    losses = trial.losses[-1] if trial.state == "pruned" else []
    return optuna.trial.create_trial(
        state=states.PRUNED if value is None else states.COMPLETE, params=values,
        distributions=dict(distributions), value=value,
        intermediate_values=dict(enumerate(losses)),
    )  # fmt: skip


def import_optuna() -> Any:
    """Return the module ``optuna``.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "--sampler tpe", expected="the package optuna", found="none",
            hint="pip install 'featcache[sweep]', or take --sampler random",
        ) from error  # fmt: skip
    return optuna
