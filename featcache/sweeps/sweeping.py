"""Cache in, run out: try many heads, keep the best if it is truly better than the default.

``RUN.sweep/journal.jsonl`` has an entry per round of trials and per repeat until the run is there.
A round is a function of the rounds before it (options, rows and seeds), so a sweep that was killed
repeats the round it was in and ends as if it had not been.

Reads: a cache. Writes: a run folder.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcache import __version__
from featcache.cache.by_url import by_url
from featcache.cache.reading import warn_of_leaks
from featcache.cache.side_by_side import Caches, list_caches, open_caches
from featcache.cache.verdict import say_verdict
from featcache.csv_files import write_csv
from featcache.errors import ConfigError, printable
from featcache.files import canonical_json, make_folder, read_regular, result_as_dict, write_json
from featcache.formatting import brief_repr, count, decimal
from featcache.heads.config import LBFGS, check_seed, check_valid_fraction
from featcache.heads.fit import compare_linear_probe, fit_head
from featcache.heads.lines import probe_line
from featcache.heads.rows import Part, check_cache, choose_rows
from featcache.heads.run_writing import record_fit, run_output
from featcache.locking import folder_lock, remove_lock
from featcache.metrics.scores import check_metric
from featcache.output_folders import check_folder, new_folder
from featcache.outputs import Output
from featcache.renames import beside, remove_temporaries
from featcache.runtime import Say, log_line, resolve_device
from featcache.sweeps.folds import Pool
from featcache.sweeps.journal import Journal
from featcache.sweeps.ranking import Decision, decision_lines, ranking_lines, trial_rows
from featcache.sweeps.search import Found, Plan, Search, check_grid
from featcache.sweeps.space import Params, build_configs, default_space, read_space
from featcache.sweeps.tpe import import_optuna, propose_round
from featcache.sweeps.trials import Judge
from featcache.untrusted import parse_json, parse_json_object

SAMPLERS = ("random", "grid", "tpe")
SELECTIONS = ("safe", "best")
_MAX_TRIALS = 1_000_000
_JOURNAL_NAME, _ANSWER_NAME = "journal.jsonl", "sweep.json"
_MAX_ANSWER_BYTES = 1 << 24
_SHOWN = 10


@dataclass(frozen=True)
class SweepSummary:
    """What a sweep came to.

    Attributes:
        run: The run folder.
        num_trials: Trials, the default among them.
        num_pruned: Trials that were stopped early.
        num_failed: Those whose loss was no number.
        metric: With its averaging.
        top: The ten best: number, score and options.
        failed: Numbers of the failed.
        decision: What the repeats came to; None where nothing but the default was left.
        chosen: The number of the trial kept, 0 for the default.
        options: Its options that differ from the defaults.
        valid_loss: Of the run, like the next two.
        valid_accuracy: On ``valid``.
        best_epoch: The epoch kept.
        linear_probe: As for ``train``.
        num_head_steps: Optimizer steps of all heads, in this process.
        seconds: Wall time of this process.
        device: Where it ran.
        fingerprint: That of the cache.
        weights_sha256: That of the weights.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    run: Path
    num_trials: int
    num_pruned: int
    num_failed: int
    metric: str
    top: list[dict[str, Any]]
    failed: list[int]
    decision: Decision | None
    chosen: int
    options: Params
    valid_loss: float
    valid_accuracy: float
    best_epoch: int
    linear_probe: dict[str, Any] | None
    num_head_steps: int
    seconds: float
    device: str
    fingerprint: str
    weights_sha256: str

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        decision = None if self.decision is None else self.decision.as_json()
        return result_as_dict(self) | {"decision": decision}


@by_url("cache", makes="run")
def sweep(
    cache: Caches,
    run: str | Path,
    *,
    trials: int,
    sampler: str = "random",
    space: str | Path | None = None,
    metric: str = "loss",
    positive: str | None = None,
    folds: int | None = None,
    repeats: int = 5,
    select: str = "safe",
    prune: bool = True,
    valid_fraction: float | None = None,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    say: Say = log_line,
    progress: bool = False,
) -> SweepSummary:
    """Try many heads on a cache and write one as a run; the split ``test`` is not touched.

    Trial 0 is the default head. Trials are ranked by ``metric`` on ``valid``, or over folds. The
    three best and the default are then trained again, each on the same new hold-outs of ``train``
    and ``valid`` (or folds) with new seeds, and the default is kept unless the best is better by an
    interval that excludes zero. The run is what ``train`` makes of the options chosen. Killed and
    called again with the same arguments, a sweep goes on.

    Args:
        cache: As for ``train``: one, or several side by side.
        run: The folder to make; it has ``trials.csv`` and ``sweep.json`` besides a run's files.
        trials: How many, the default among them.
        sampler: ``random``, ``grid`` or ``tpe`` (Optuna's, 16 trials a round).
        space: A TOML file (see module ``space``); None is the default space.
        metric: ``loss``, ``accuracy``, ``balanced_accuracy``, ``roc_auc``, ``average_precision`` or
            ``f1``; the last three are macro means unless ``positive`` is given. For multilabel
            caches all but ``balanced_accuracy``, over the known targets.
        positive: The class that those three look for.
        folds: Judge trials by cross-validation over ``train`` and ``valid`` instead, groups and
            identical images together.
        repeats: New hold-outs (or repetitions of all folds), two or more.
        select: ``safe``, or ``best``: keep the highest mean over the repeats.
        prune: Stop hopeless trials early.
        valid_fraction: As for ``train``.
        seed: Decides everything that is drawn.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        overwrite: Replace an existing run.
        say: Receives the lines for people.
        progress: Show how far it is: a bar, or without a terminal a line a minute.

    Raises:
        RunError: If ``run`` exists and ``overwrite`` is not set.
        ConfigError: If an option has no meaning, or an unfinished sweep of this name was begun
            with others.
        CacheError: If the cache is damaged, lacks a split, or its rows cannot be trained on.

    Example:
        >>> featcache.sweep("covid.h5", "runs/best", trials=200)  # doctest: +SKIP
    """
    start, folder = time.perf_counter(), Path(run)
    inputs = [*list_caches(cache), space]
    output = run_output(run, overwrite=overwrite, inputs=inputs)
    journal_folder = beside(output.target, ".sweep")
    if not (journal_folder / _JOURNAL_NAME).exists():
        check_folder(output)
    _check_options(trials, sampler, folds, repeats, select)
    seed = check_seed("--seed", seed)
    valid_fraction = check_valid_fraction(valid_fraction)
    read = None if space is None else read_space(Path(space))
    where = resolve_device(device)
    opened = open_caches(cache)
    check_cache(opened)
    has_labels = opened.task == "multilabel"
    check_metric(metric, positive, opened.classes, has_labels=has_labels)
    warn_of_leaks(opened)
    say_verdict(opened, say)
    parts = choose_rows(opened, valid_fraction, seed, say)
    pool = Pool.of(opened, parts, where, say)
    chosen_space = read or default_space(len(pool.pair[0]))
    if sampler == "grid":
        check_grid(chosen_space, trials)
    plan = Plan(trials, sampler, chosen_space, folds, repeats, select, seed)
    judge = Judge(metric, positive, opened.classes, where, prune, _say_once(say), opened.task)
    work = {
        "format": "featcache-sweep", "version": __version__,
        "cache_fingerprint": opened.fingerprint, "cache_sha256": opened.payload_sha256,
        "trials": trials,
        "sampler": sampler, "space": chosen_space.as_json(), "metric": metric,
        "positive": positive, "folds": folds, "repeats": repeats, "select": select,
        "prune": prune, "valid_fraction": valid_fraction, "seed": seed,
        "device": where.type,
    }  # fmt: skip
    propose = functools.partial(propose_round, plan, judge.sign) if sampler == "tpe" else None
    search = Search(plan, judge, pool, propose, progress=progress)
    _check_metric_is_known(judge, pool, search)
    _say_plan(plan, judge, pool, say)
    make_folder(output.target.parent)
    with folder_lock(journal_folder, f"sweep {folder}", re.escape(_JOURNAL_NAME)):
        may_replace = overwrite or _is_from_this(journal_folder, output.target, work)
        output = run_output(run, overwrite=may_replace, inputs=inputs)
        try:
            with new_folder(output) as partial:
                journal = Journal(journal_folder / _JOURNAL_NAME, work)
                if journal.entries:
                    say(f"going on with what {printable(journal_folder.as_posix())} has")
                found = search.search(journal)
                summary = _write(
                    partial, found, pool, judge, work, parts=parts, start=start, output=output
                )
        except BaseException:
            if not (journal_folder / _JOURNAL_NAME).exists():
                _remove_journal(journal_folder)
            raise
        _remove_journal(journal_folder)
    _say_result(summary, found, judge, say)
    return summary


def _is_from_this(journal_folder: Path, run: Path, work: Mapping[str, Any]) -> bool:
    """Return whether a run was written by this very sweep, killed before its journal was removed.

    It is then written once more.
    """
    has_journal = (journal_folder / _JOURNAL_NAME).exists()
    return has_journal and bool(_read_work(run) == parse_json(canonical_json(work)))


def _read_work(run: Path) -> Any:
    """Return what the sweep that wrote a run was asked, None if no sweep did."""
    try:
        data = read_regular(run / _ANSWER_NAME, max_bytes=_MAX_ANSWER_BYTES)
        return parse_json_object(data).get("sweep")
    except (OSError, ValueError):
        return None


def _remove_journal(folder: Path) -> None:
    """Remove what is ours, under its lock; the lock last."""
    remove_temporaries(folder / _JOURNAL_NAME)
    (folder / _JOURNAL_NAME).unlink(missing_ok=True)
    remove_lock(folder)  # and the folder, unless others' files are in it


def _write(
    partial: Path, found: Found, pool: Pool, judge: Judge, work: Mapping[str, Any],
    *, parts: Sequence[Part], start: float, output: Output,
) -> SweepSummary:  # fmt: skip
    """Train what was chosen as ``train`` would, and write it into the folder ``partial``."""
    options = found.trials[found.chosen].params
    arrays, cache, seed = pool.take(pool.pair), pool.cache, work["seed"]
    head, training = build_configs(options, cache.num_features, len(cache.classes))
    result = fit_head(
        head, training, *arrays, seed=seed, data_seed=seed, device=judge.device,
        classes=cache.classes,
    )  # fmt: skip
    decision = None if found.decision is None else found.decision.as_json()
    weights_sha256 = record_fit(
        partial, output.target, cache, head=head, training=training, result=result, seed=seed,
        data_seed=seed, device=judge.device, parts=parts,
        valid_fraction=work["valid_fraction"],
        details={"sweep": {"trial": found.chosen, "trials": len(found.trials)}},
    )  # fmt: skip
    write_csv(partial / "trials.csv", *trial_rows(found.trials))
    write_json(partial / _ANSWER_NAME, {"sweep": dict(work), "decision": decision})
    kept = result.history[result.best_epoch - 1]
    linear_probe = None
    if training.optimizer != LBFGS:
        linear_probe = compare_linear_probe(training, *arrays, cache.classes)
    return SweepSummary(
        run=output.path, num_trials=len(found.trials),
        num_pruned=sum(trial.state == "pruned" for trial in found.trials),
        num_failed=len(found.failed), metric=judge.description,
        top=[
            {"trial": t.number, "score": t.score, "options": t.params}
            for t in found.ranked[:_SHOWN]
        ],
        failed=found.failed, decision=found.decision, chosen=found.chosen, options=options,
        valid_loss=kept["valid_loss"], valid_accuracy=kept["valid_accuracy"],
        best_epoch=result.best_epoch, linear_probe=linear_probe,
        num_head_steps=found.num_head_steps,
        seconds=time.perf_counter() - start, device=str(judge.device),
        fingerprint=cache.fingerprint, weights_sha256=weights_sha256,
    )  # fmt: skip


def _check_options(trials: Any, sampler: Any, folds: Any, repeats: Any, select: Any) -> None:
    for option, value, fits, expected in (
        ("--trials", trials, type(trials) is int and 2 <= trials <= _MAX_TRIALS,
         f"a whole number from 2 to {_MAX_TRIALS:,}"),
        ("--sampler", sampler, sampler in SAMPLERS, " or ".join(SAMPLERS)),
        ("--folds", folds, folds is None or (type(folds) is int and folds >= 2),
         "a whole number from 2"),
        ("--repeats", repeats, type(repeats) is int and repeats >= 2, "a whole number from 2"),
        ("--select", select, select in SELECTIONS, " or ".join(SELECTIONS)),
    ):  # fmt: skip
        if not fits:
            raise ConfigError(option, expected=expected, found=repr(value))
    if sampler == "tpe":
        import_optuna()


def _check_metric_is_known(judge: Judge, pool: Pool, search: Search) -> None:
    """Refuse a metric that some rows to judge by do not define: no head would have a score there.

    Of one class a row, new hold-outs and folds have rows of every class.
    """
    has_labels = judge.task == "multilabel"
    for train, valid in search.pairs if has_labels else search.pairs[:1]:
        if judge.score_prior(pool.targets[train], pool.targets[valid]) is None:
            wanted, found = "rows of every class in valid", "none of some class"
            if has_labels:
                of_class = "of a class" if judge.positive is None else f"of {judge.positive}"
                wanted = f"positive and negative rows {of_class} in whatever is judged by"
                found = "one answer only"
            raise ConfigError(
                f"--metric {judge.metric}", expected=wanted, found=found, where=pool.cache.path,
                hint="Take --metric loss",
            )  # fmt: skip


def _say_once(say: Say) -> Say:
    """Say the first line only: each round of trials has the same to say."""
    said = list[str]()

    def once(line: str) -> None:
        if not said:
            said.append(line)
            say(line)

    return once


def _say_plan(plan: Plan, judge: Judge, pool: Pool, say: Say) -> None:
    names = ", ".join(d.name for d in plan.space.dimensions)
    say(printable(f"searching {names} by {judge.description}"))
    num_train, num_valid = map(len, pool.pair)
    how = "to choose by" if plan.num_folds is None else f"in valid, in {plan.num_folds} folds"
    say(f"{count(num_train, 'row')} to train on, {num_valid:,} {how}")
    if "test" in pool.cache.splits:
        say(f"test is not touched: {count(len(pool.cache.splits['test']), 'row')}")


def _say_result(summary: SweepSummary, found: Found, judge: Judge, say: Say) -> None:
    if len(found.ranked) > _SHOWN:
        say(f"the best {_SHOWN} of {len(found.ranked):,} trials that were finished:")
    for line in ranking_lines(found.ranked[:_SHOWN], judge.metric):
        say(line)
    if summary.failed:
        numbers = ", ".join(map(str, summary.failed[:20]))
        failed = count(summary.num_failed, "trial")
        say(f"failed, for the loss was no number: {failed} ({numbers})")
    if found.decision is None:
        say("kept: the default head: no other trial is left to compare it with")
    else:
        for line in decision_lines(found.decision, judge.metric, judge.sign):
            say(line)
    say(
        f"{count(summary.num_trials, 'trial')}, {summary.num_pruned:,} given up on the way, in "
        f"{summary.seconds:.1f} s on {summary.device}"
    )
    figures = f"valid loss {summary.valid_loss:.4f}, accuracy {decimal(summary.valid_accuracy)}"
    say(f"{figures}, written to {printable(summary.run.as_posix())}")
    if summary.linear_probe is not None:
        say(probe_line(summary.linear_probe))
