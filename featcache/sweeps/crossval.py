"""Cache in, out-of-fold probabilities out: every row judged by a head that has not seen it.

What belongs together (a group, copies of one image, also across splits) lies in one fold. The head
of a fold is trained on the other folds, and its epoch or strength is chosen on an inner hold-out of
those rows: nothing of the fold decides anything about the head that judges it.

``FOLDER.partial/journal.jsonl`` has an entry per finished fold until the folder is there, and
``heads.bin`` beside it the heads that are kept.

Reads: a cache. Writes: a folder with ``crossval.json`` and ``predictions.csv``, and a run in it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache import __version__
from featcache.cache.by_url import by_url
from featcache.cache.reading import Cache
from featcache.cache.side_by_side import Caches, list_caches, open_caches
from featcache.cache.verdict import say_verdict
from featcache.errors import CacheError, ConfigError, warn_user
from featcache.files import result_as_dict
from featcache.formatting import brief_repr, count, join_few, percent
from featcache.heads.config import (
    LBFGS,
    HeadJob,
    TrainingConfig,
    check_seed,
    check_valid_fraction,
    refuse_unused,
)
from featcache.heads.head import HeadConfig
from featcache.heads.rows import (
    Part,
    check_cache,
    check_labels,
    labelled_part,
    training_source,
)
from featcache.output_folders import check_folder, new_folder
from featcache.outputs import Output
from featcache.runtime import Device, Say, log_line, resolve_device
from featcache.sweeps.crossval_figures import crossval_lines
from featcache.sweeps.crossval_files import CROSSVAL, ENSEMBLE_NAME, FORMAT, write_crossval
from featcache.sweeps.fold_heads import Fold, FoldPlan
from featcache.sweeps.folds import Pool
from featcache.sweeps.journal import Journal
from featcache.sweeps.kept_heads import HEADS_NAME, KeptHeads, write_ensemble

JOURNAL_NAME = "journal.jsonl"
_INNER_SHARE = 0.2  # held out to choose the epoch by, where no split valid says how much
_UNFINISHED = "an unfinished cross-validation"


@dataclass(frozen=True)
class CrossvalSummary:
    """What a cross-validation came to.

    Attributes:
        folder: Where ``crossval.json`` and ``predictions.csv`` are.
        classes: Class names.
        task: ``multiclass``, or ``multilabel``: several labels an image.
        splits: Whose rows were used.
        num_rows: Labelled rows, each in one fold of every repeat.
        num_unlabelled: Rows left out because they have no target.
        num_folds: Of each repeat.
        num_repeats: How often the rows were parted anew.
        valid_fraction: Share of a fold's rows to train on that was held out to choose the epoch by.
        per_fold: A row per repeat and fold, from 1: ``num_rows``; ``num_train`` and ``num_valid``,
            trained on and chosen by; ``best_epoch`` and ``batch_size`` (with lbfgs ``strength`` in
            place of the latter); ``accuracy``, ``balanced_accuracy``, ``roc_auc``; ``per_class``
            with ``recall``, ``roc_auc`` and the numbers of rows.
        mean: Of each figure over all folds: ``mean``, and ``low`` and ``high`` of its 95 %
            interval (corrected resampled t, Nadeau and Bengio 2003; None where all folds agree or
            fewer than two define the figure).
        pooled: A row per repeat, of all its rows in one: rates alone, for scores of different
            heads have no common order. ``intervals`` has 95 % ones, two-sided, as
            ``Evaluation.intervals``: for these heads on other images, while those of ``mean`` are
            for heads trained on other rows too.
        seconds: Wall time of this process.
        device: Where it ran.
        fingerprint: That of the cache.
        predictions_sha256: That of ``predictions.csv``.
        ensemble: The run with the mean of the heads, None where none is kept.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    folder: Path
    classes: tuple[str, ...]
    task: str
    splits: tuple[str, ...]
    num_rows: int
    num_unlabelled: int
    num_folds: int
    num_repeats: int
    valid_fraction: float
    per_fold: list[dict[str, Any]]
    mean: dict[str, Any]
    pooled: list[dict[str, Any]]
    seconds: float
    device: str
    fingerprint: str
    predictions_sha256: str
    ensemble: Path | None

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return result_as_dict(self)


@by_url("cache", makes="folder")
def crossval(
    cache: Caches,
    folder: str | Path,
    *,
    folds: int = 5,
    repeats: int = 1,
    with_test: bool = False,
    keep_ensemble: bool = False,
    hidden: Sequence[int] = (512, 128),
    dropout: float = 0.4,
    learning_rate: float = 5e-4,
    weight_decay: float = 0.0,
    optimizer: str = "adam",
    schedule: str = "constant",
    batch_size: int | str = "auto",
    epochs: int = 10,
    patience: int | None = None,
    class_weights: str | tuple[float, ...] = "none",
    label_smoothing: float = 0.0,
    warmup: int = 0,
    valid_fraction: float | None = None,
    seed: int = 0,
    data_seed: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    say: Say = log_line,
    progress: bool = False,
) -> CrossvalSummary:
    """Predict every labelled row of ``train`` and ``valid`` by a head trained without it.

    The rows (those of ``all`` where there are no splits) are parted into folds, stratified, with
    groups and identical images kept together across splits too. The head of a fold is what
    ``train --valid-fraction`` makes of the rows of the other folds. Killed and called again with
    the same arguments, it goes on after the folds that are finished.

    Args:
        cache: As for ``train``: one, or several side by side.
        folder: The folder to make, with ``crossval.json`` and ``predictions.csv``: a line per row
            and repeat with the probabilities, which read back to the same floats.
        folds: How many parts, two or more.
        repeats: How often, each time with other folds. The first uses ``seed`` and ``data_seed``,
            the second ``seed + 1`` and ``data_seed + 1``, and so on.
        with_test: Use the rows of ``test`` too: it is then no test of these heads' options.
        keep_ensemble: Keep the heads of all folds and repeats as one run, ``FOLDER/ensemble``: its
            probabilities are the mean of theirs.
        hidden: As for ``train``, as are the next eleven.
        dropout: In [0, 1).
        learning_rate: Above 0.
        weight_decay: From 0.
        optimizer: ``adam``, ``adamw``, ``sgd`` or ``lbfgs``.
        schedule: ``constant`` or ``cosine``.
        batch_size: Rows per step, or ``auto``.
        epochs: The most passes over the rows.
        patience: Stop after this many epochs without a lower loss on the inner hold-out.
        class_weights: ``none``, ``balanced`` or a number per class.
        label_smoothing: In [0, 1).
        warmup: Epochs in which the learning rate rises.
        valid_fraction: Share of the rows outside a fold that is held out to choose the epoch by.
            None takes the share of ``valid`` in ``train`` and ``valid``, without such a split 0.2.
        seed: Decides initial weights and dropout.
        data_seed: Decides folds, inner hold-outs, the order of the rows and their views; None
            takes ``seed``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        overwrite: Replace an existing folder, or begin anew where an unfinished one is of other
            arguments.
        say: Receives the lines for people.
        progress: Show how far it is: a bar, or without a terminal a line a minute.

    Raises:
        ConfigError: If an option has no meaning; if ``folder`` is there and ``overwrite`` is not
            set; if what is unfinished there was begun with other arguments.
        CacheError: If the cache is damaged, has no rows to train on, or a class has too few groups
            for so many folds.

    Example:
        >>> featcache.crossval("covid.h5", "folds", seed=1)  # doctest: +SKIP
    """
    start = time.perf_counter()
    inputs = list_caches(cache)
    output = Output(folder, "output folder", CROSSVAL, replace=overwrite, inputs=inputs)
    check_folder(output)
    _check_options(folds, repeats)
    training = TrainingConfig(
        learning_rate=learning_rate, weight_decay=weight_decay, optimizer=optimizer,
        schedule=schedule, batch_size=batch_size, epochs=epochs, patience=patience,
        class_weights=class_weights, label_smoothing=label_smoothing, warmup=warmup,
    )  # fmt: skip
    refuse_unused(training)
    order_seed = check_seed("--data-seed", seed if data_seed is None else data_seed)
    seed = check_seed("--seed", seed)
    check_seed("--seed", max(seed, order_seed) + repeats)
    valid_fraction = check_valid_fraction(valid_fraction)
    HeadJob(HeadConfig(1, 2, tuple(hidden), dropout), training, seed)
    where = resolve_device(device)
    opened = open_caches(cache)
    check_cache(opened)
    parts = _choose_parts(opened, with_test=with_test)
    plan = FoldPlan(
        HeadConfig(opened.num_features, len(opened.classes), tuple(hidden), dropout), training,
        folds, repeats, _inner_share(parts) if valid_fraction is None else valid_fraction, seed,
        order_seed,
    )  # fmt: skip
    work = _Work(
        Pool.of(opened, parts, where, say), parts, plan, where, keep_ensemble=keep_ensemble
    )
    chosen = plan.choose_rows(work.pool)
    _say_plan(plan, parts, work.pool, say, with_test=with_test)
    say_verdict(opened, say)
    facts = work.run(output, chosen, replace=overwrite, progress=progress, say=say)
    summary = CrossvalSummary(
        folder=Path(folder), classes=opened.classes, task=opened.task,
        splits=tuple(part.split.name for part in parts), num_rows=len(work.pool.targets),
        num_unlabelled=sum(part.num_unlabelled for part in parts), num_folds=folds,
        num_repeats=repeats, valid_fraction=plan.share, per_fold=facts["per_fold"],
        mean=facts["mean"], pooled=facts["pooled"], seconds=time.perf_counter() - start,
        device=str(where), fingerprint=opened.fingerprint,
        predictions_sha256=facts["predictions_sha256"],
        ensemble=Path(folder) / ENSEMBLE_NAME if keep_ensemble else None,
    )  # fmt: skip
    for line in crossval_lines(summary):
        say(line)
    return summary


@dataclass(frozen=True)
class _Work:
    """A cross-validation that is about to be done.

    Attributes:
        pool: The rows.
        parts: The splits that they are of, in the same order.
        plan: How the heads are trained.
        device: Where.
        keep_ensemble: Whether their mean is kept.
    """

    pool: Pool
    parts: Sequence[Part]
    plan: FoldPlan
    device: Device
    keep_ensemble: bool

    def run(
        self, output: Output, folds: Sequence[Fold], *, replace: bool, progress: bool, say: Say
    ) -> dict[str, Any]:
        """Train the heads that are not yet trained, write the folder, return its facts."""
        pool, plan, ensemble = self.pool, self.plan, dict[str, str]()
        with new_folder(output, state=[JOURNAL_NAME, HEADS_NAME]) as new:
            file = new.parent / HEADS_NAME
            heads = KeptHeads(file, plan.head) if self.keep_ensemble else None
            with _open_journal(new.parent, self._as_json(), replace=replace) as journal:
                if journal.entries:
                    say(f"going on after {count(len(journal.entries), 'fold')} that are finished")
                entries = plan.fit(
                    pool, folds, journal, heads, self.device, progress=progress, say=say
                )
            if heads is not None:
                ensemble["ensemble_weights_sha256"] = write_ensemble(
                    new / ENSEMBLE_NAME, output.target / ENSEMBLE_NAME, pool, self.parts, plan,
                    folds, entries, heads.read(journal), self.device,
                )  # fmt: skip
            return write_crossval(
                new, output.target, pool, self.parts, plan, folds, entries, ensemble
            )

    def _as_json(self) -> dict[str, Any]:
        """Return all that decides what is found, as a JSON object."""
        return {
            "format": FORMAT, "version": __version__,
            "cache_sha256": self.pool.cache.payload_sha256,
            "splits": [part.split.name for part in self.parts], "device": self.device.type,
            "keep_ensemble": self.keep_ensemble, **self.plan.as_json(),
        }  # fmt: skip


def _check_options(folds: Any, repeats: Any) -> None:
    for option, value, least in (("--folds", folds, 2), ("--repeats", repeats, 1)):
        if type(value) is not int or value < least:
            raise ConfigError(option, expected=f"a whole number from {least}", found=repr(value))


def _choose_parts(cache: Cache, *, with_test: bool) -> list[Part]:
    """Return the labelled rows of the splits that are used, the rows with views first.

    Raises:
        CacheError: If there is nothing to train on, or a class has no row.
        ConfigError: If a test that is asked for is not there.
    """
    source = training_source(cache)
    if with_test and "test" not in cache.splits:
        raise ConfigError(
            "--with-test", expected="a cache with the split test",
            found="only " + ", ".join(cache.splits), where=cache.path, hint="Leave it out",
        )  # fmt: skip
    others = [name for name in ("valid", "test") if name in cache.splits]
    if not with_test:
        others = [name for name in others if name != "test"]
    parts = [labelled_part(cache, source, "train")]
    parts += [labelled_part(cache, name, "valid") for name in others]
    targets = np.concatenate([part.targets for part in parts])
    names = " and ".join([source, *others])
    if cache.task == "multilabel":
        check_labels(cache, targets, names)
        return parts
    counts = np.bincount(targets, minlength=len(cache.classes))
    missing = [name for name, number in zip(cache.classes, counts, strict=True) if not number]
    if missing:
        raise CacheError(
            names, expected="labelled rows of each class", found=f"none of {join_few(missing)}",
            where=cache.path, hint="Add images of that class, or leave its folder out",
        )  # fmt: skip
    return parts


def _inner_share(parts: Sequence[Part]) -> float:
    """Return the share of ``valid`` in ``train`` and ``valid``, without such a split a fifth."""
    sizes = {part.split.name: len(part.rows) for part in parts}
    num_valid = sizes.get("valid", 0)
    return num_valid / (sizes["train"] + num_valid) if num_valid else _INNER_SHARE


@contextlib.contextmanager
def _open_journal(folder: Path, work: Mapping[str, Any], *, replace: bool) -> Iterator[Journal]:
    """Open the journal, or begin anew with ``replace``; one without entries is not left behind."""
    path = folder / JOURNAL_NAME
    try:
        journal = Journal(path, work, _UNFINISHED)
    except ConfigError:
        if not replace:
            raise
        path.unlink()
        journal = Journal(path, work, _UNFINISHED)
    try:
        yield journal
    except BaseException:
        if not journal.entries:
            path.unlink(missing_ok=True)
            (folder / HEADS_NAME).unlink(missing_ok=True)
        raise


def _say_plan(
    plan: FoldPlan, parts: Sequence[Part], pool: Pool, say: Say, *, with_test: bool
) -> None:
    rows, names = count(len(pool.targets), "row"), " and ".join(part.split.name for part in parts)
    again = f", {plan.num_repeats} times" if plan.num_repeats > 1 else ""
    say(f"{rows} of {names} in {plan.num_folds} folds{again}")
    if unlabelled := sum(part.num_unlabelled for part in parts):
        say(f"{count(unlabelled, 'unlabelled row')} left out")
    what = "strength" if plan.training.optimizer == LBFGS else "epoch"
    say(f"the {what} is chosen on {percent(plan.share)} of the rows outside a fold")
    if all(part.split.groups is None for part in parts):
        say("this cache has no groups: images of one patient may be in several folds")
    splits = pool.cache.splits
    if with_test:
        warn_user(
            f"--with-test: {count(len(splits['test']), 'row')} of test are trained on and "
            "predicted here; what is chosen by these figures has no test left"
        )
    elif "test" in splits:
        say(f"test is not touched: {count(len(splits['test']), 'row')}")
