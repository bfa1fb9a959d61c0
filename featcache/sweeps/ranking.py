"""Which head of a sweep is kept, and why.

The best of many trials on few validation rows is mostly luck. So the best few and the default are
trained again on new hold-outs with new seeds, and the default is kept unless the best is better
than it, and than guessing by the shares of the classes, by an interval that excludes zero.

Reads and writes nothing.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from featcache.errors import printable
from featcache.formatting import brief_repr
from featcache.metrics.scores import paired_interval
from featcache.sweeps.space import DEFAULTS
from featcache.sweeps.trials import Trial

NUM_FINALISTS = 3
METHOD = "corrected resampled t interval (Nadeau and Bengio 2003), 95 %"
_PRIOR = "prior"

Scores = Mapping[str, Sequence[float]]
"""Of each trial (its number as text) and of ``prior``: a figure per hold-out."""


@dataclass(frozen=True)
class Decision:
    """What the repeats came to.

    Attributes:
        best: The number of the best trial other than the default.
        chosen: The number of the trial that is kept: that, or 0.
        difference: Best minus default, mean over the repeats, in the metric's own sign.
        low: Lower end of its interval.
        high: Upper end.
        over_prior: Best minus guessing by the shares of the classes: mean, low, high.
        num_splits: Hold-outs that were judged by.
        num_finalists: Trials trained again, not counting the default.
        reason: Why that one is kept, in a few words.
        scores: The metric on each hold-out, by trial (its number as text): the finalists, the
            default ``0`` and ``prior``, which guesses by the shares of the classes.
        ratio: Rows judged by over rows trained on, the mean over the hold-outs. With ``scores``,
            all that the intervals are computed from: see ``metrics.scores.paired_interval``.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    best: int
    chosen: int
    difference: float
    low: float
    high: float
    over_prior: tuple[float, float, float]
    num_splits: int
    num_finalists: int
    reason: str
    scores: dict[str, list[float]]
    ratio: float

    def as_json(self) -> dict[str, Any]:
        """Return the decision as a JSON object."""
        method = METHOD + f", for {_finalists(self.num_finalists)} (Bonferroni)"
        return dataclasses.asdict(self) | {"over_prior": [*self.over_prior], "method": method}


def rank(trials: Iterable[Trial], sign: int) -> list[Trial]:
    """Return the trials that are done, best first, the earlier one on ties."""
    done = [(trial.score, trial) for trial in trials if trial.score is not None]
    return [trial for score, trial in sorted(done, key=lambda d: (-sign * d[0], d[1].number))]


def decide(scores: Scores, sign: int, ratio: float, select: str) -> Decision:
    """Choose between the default and the best of the finalists.

    Args:
        scores: Of the finalists, the default (``"0"``) and ``prior``.
        sign: 1 where more is better, -1 where less is.
        ratio: Rows judged by over rows trained on.
        select: ``safe``, or ``best``: the highest mean is kept, whatever the interval.
    """
    finalists = [number for number in scores if number not in {"0", _PRIOR}]
    best = max(finalists, key=lambda n: (sign * statistics.fmean(scores[n]), -int(n)))

    def compare(other: str) -> tuple[float, float, float]:
        pairs = zip(scores[best], scores[other], strict=True)
        return paired_interval([one - two for one, two in pairs], ratio, len(finalists))

    (difference, low, high), over_prior = compare("0"), compare(_PRIOR)
    is_better = low > 0 if sign > 0 else high < 0
    beats_prior = over_prior[1] > 0 if sign > 0 else over_prior[2] < 0
    if select == "best":
        takes, reason = sign * difference > 0, "the higher mean over the repeats, by --select best"
    elif not is_better:
        takes, reason = False, "the interval does not exclude zero in favour of the best"
    elif not beats_prior:
        takes, reason = False, "the best is not better than guessing by the classes' shares"
    else:
        takes, reason = True, "the interval excludes zero"
    return Decision(
        best=int(best),
        chosen=int(best) if takes else 0,
        difference=difference,
        low=low,
        high=high,
        over_prior=over_prior,
        num_splits=len(scores[best]),
        num_finalists=len(finalists),
        reason=reason,
        scores={number: [*scores[number]] for number in sorted(scores)},  # as when resumed
        ratio=ratio,
    )


def ranking_lines(ranked: Sequence[Trial], metric: str) -> Iterator[str]:
    """Yield a table of trials, best first: a column for each option in which they differ.

    Options that all trials share stand in a line below.
    """
    options = {
        name: [_option_text((DEFAULTS | trial.params)[name]) for trial in ranked]
        for name in DEFAULTS
        if any(name in trial.params for trial in ranked)
    }
    shared = {name: texts[0] for name, texts in options.items() if len(set(texts)) == 1}
    columns = [["", "trial", *(f"{trial.number}" for trial in ranked)]]
    columns.append(["", metric, *(f"{trial.score:.4f}" for trial in ranked)])
    for name, texts in options.items():
        if name not in shared:  # long names take two lines: the table fits 80 columns
            columns.append([*name.rpartition("_")[::2], *texts])
    widths = [max(map(len, column)) for column in columns]
    for line in zip(*columns, strict=True):
        if any(line):
            yield "  ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True))
    if any(trial.number == 0 for trial in ranked):
        yield "trial 0 is the default head"
    if shared:
        words = (f"--{name.replace('_', '-')} {text}" for name, text in shared.items())
        yield f"all with {' '.join(words)}"


def decision_lines(decision: Decision, metric: str, sign: int) -> Iterator[str]:
    """Yield the answer: best minus default, with its interval."""
    interval = f"{decision.difference:+.4f} [{decision.low:+.4f}, {decision.high:+.4f}]"
    less = "" if sign > 0 else " (less is better)"
    yield printable(f"best minus default: {interval} {metric}{less}, trial {decision.best}")
    which = _finalists(decision.num_finalists)
    yield f"  over {decision.num_splits} new hold-outs, for {which};"
    yield f"  {METHOD}"
    kept = "the default head" if decision.chosen == 0 else f"trial {decision.chosen}"
    yield f"kept: {kept}: {decision.reason}"


def _finalists(number: int) -> str:
    return "the one finalist" if number == 1 else f"all {number} finalists at once"


def _option_text(value: Any) -> str:
    """Return the value of an option as ``featcache train`` takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def trial_rows(trials: Iterable[Trial]) -> tuple[list[str], list[list[Any]]]:
    """Return header and rows of ``trials.csv``, by the trials' numbers."""
    header = [
        "trial", "state", "score", "fold_scores", "num_epochs", "best_epoch", "lowest_loss",
        *DEFAULTS,
    ]  # fmt: skip
    rows = []
    for trial in sorted(trials, key=lambda trial: trial.number):
        params = DEFAULTS | trial.params
        cells = [
            ",".join(map(str, v)) or "none" if isinstance(v, tuple) else v for v in params.values()
        ]
        lowest = [min(losses) for losses in trial.losses if losses]
        rows.append([
            trial.number, trial.state, trial.score, " ".join(map(repr, trial.fold_scores)),
            sum(map(len, trial.losses)),
            " ".join(map(str, trial.best_epochs)),
            statistics.fmean(lowest) if lowest else None, *cells,
        ])  # fmt: skip
    return header, rows
