"""Cache in, run out: check the rows, train a head on them, keep the best epoch.

Reads: a cache. Writes: a run folder.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.by_url import by_url
from featcache.cache.reading import Cache, warn_of_leaks
from featcache.cache.side_by_side import Caches, list_caches, open_caches
from featcache.cache.verdict import say_verdict
from featcache.errors import ConfigError, printable
from featcache.files import result_as_dict
from featcache.formatting import brief_repr, count, decimal, join_few, list_counts, shorten
from featcache.heads.config import (
    LBFGS,
    MAX_ITERATIONS,
    USED_BY_LBFGS,
    FitResult,
    HeadJob,
    TrainingConfig,
    check_seed,
    check_valid_fraction,
)
from featcache.heads.fit import compare_linear_probe, fit_head
from featcache.heads.head import HeadConfig
from featcache.heads.resuming import STATE_NAME, SavedTraining
from featcache.heads.rows import Part, Targets, check_cache, choose_rows, read_rows
from featcache.heads.run_writing import record_fit, run_output
from featcache.output_folders import check_folder, new_folder
from featcache.progress import Progress
from featcache.runtime import Say, log_line, resolve_device

_IMBALANCE = 5  # beyond 1:5 the loss of the rare class is easily drowned
_RECALLS_WIDTH = 36  # with what stands before and behind them: lines of up to 80 characters
_MANY_CLASSES = 20  # more do not get a line each


@dataclass(frozen=True)
class TrainSummary:
    """What a training came to.

    Attributes:
        run: The run folder.
        classes: Class names.
        task: ``multiclass``, or ``multilabel``: several labels an image.
        num_train: Labelled rows trained on.
        num_valid: Labelled rows the epoch was chosen by.
        num_unlabelled: Rows left out because they have no target (multilabel: no known one).
        num_failed: Images that failed and are therefore not in the cache, over all splits.
        num_views: Views of each row trained on, of which an epoch sees one, lbfgs all.
        num_epochs: Epochs run; with lbfgs, strengths of regularisation solved for.
        best_epoch: The epoch (strength) kept, from 1; loss, accuracy and recalls (None without
            rows) are its own.
        strength: Of the regularisation, with lbfgs.
        linear_probe: What ``fit.compare_linear_probe`` says of the same rows: ``strength,
            valid_loss, valid_accuracy, valid_recall``; None with lbfgs and where there is none.
        fit_seconds: Wall time of the fitting alone.
        total_seconds: Wall time from opening the cache to the finished folder.
        device: Where it ran.
        fingerprint: That of the cache; of several, sha256 of the list of their identities.
        weights_sha256: That of the weights.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    run: Path
    classes: tuple[str, ...]
    task: str
    num_train: int
    num_valid: int
    num_unlabelled: int
    num_failed: int
    num_views: int
    num_epochs: int
    best_epoch: int
    strength: float | None
    linear_probe: dict[str, Any] | None
    valid_loss: float
    valid_accuracy: float
    valid_recall: dict[str, float | None]
    fit_seconds: float
    total_seconds: float
    device: str
    fingerprint: str
    weights_sha256: str

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return result_as_dict(self)


@by_url("cache", makes="run")
def train(
    cache: Caches,
    run: str | Path,
    *,
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
) -> TrainSummary:
    """Train a head on the split ``train`` of a cache; the split ``test`` is not touched.

    Kept is the epoch with the lowest plain cross-entropy on ``valid``, the earliest on ties. Of
    images with views, each epoch trains on one view drawn at random, and ``valid`` is seen as is.
    Of a ``multilabel`` cache the loss is a binary cross-entropy per class, its mean over the known
    targets. With ``optimizer="lbfgs"`` a linear head is solved for at 65 strengths of
    regularisation, and kept is the one with the lowest cross-entropy on ``valid``, the strongest on
    ties.

    At most once a minute, at an epoch's end, the state is kept in ``RUN.partial``: killed and
    called again with the same arguments, a training goes on from there and ends as if it had not
    been.

    Args:
        cache: The cache; or several of the same images, or a folder of them: their features are
            put side by side (see module ``side_by_side``).
        run: The folder to make.
        hidden: Width of each hidden layer; empty for a linear head.
        dropout: Before the last layer, in [0, 1).
        learning_rate: See ``TrainingConfig``, as for the next nine.
        weight_decay: For adam and sgd added to the gradient, for adamw taken off the weights; for
            lbfgs the one strength to solve for.
        optimizer: ``adam``, ``adamw``, ``sgd``, or ``lbfgs`` with ``hidden=()``.
        schedule: ``constant`` or ``cosine``.
        batch_size: Rows per step, or ``auto``: about 1 % of the rows, 32 to 4096.
        epochs: The most passes over the rows.
        patience: Stop after this many epochs without a lower validation loss.
        class_weights: ``none``, ``balanced`` or a number per class; for multilabel caches, of the
            positives of a class.
        label_smoothing: In [0, 1).
        warmup: Epochs in which the learning rate rises from 0, step by step.
        valid_fraction: Share of ``train`` (or of ``all``) held out as ``valid``, stratified (of
            several labels, by the rarest positive one of a row), with groups and identical images
            kept together. A split ``valid`` stays fresh then: it is not touched.
        seed: Decides the initial weights and dropout.
        data_seed: Decides the order of the rows, their views and the hold-out; None takes ``seed``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        overwrite: Replace an existing run, or begin anew where an unfinished one is another's.
        say: Receives the lines for people.
        progress: Show how far it is: a bar, or without a terminal a line a minute.

    Returns:
        The summary; the run itself is the folder.

    Raises:
        RunError: If ``run`` exists and ``overwrite`` is not set; if an unfinished training of this
            name was begun with other arguments.
        ConfigError: If an option has no meaning.
        CacheError: If the cache is damaged, lacks a split, or its rows cannot be trained on; if
            several caches are not of the same rows.

    Example:
        >>> featcache.train("covid.h5", "runs/covid", seed=1)  # doctest: +SKIP
    """
    start, folder = time.perf_counter(), Path(run)
    output = run_output(run, overwrite=overwrite, inputs=list_caches(cache))
    check_folder(output)
    training = TrainingConfig(
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        optimizer=optimizer,
        schedule=schedule,
        batch_size=batch_size,
        epochs=epochs,
        patience=patience,
        class_weights=class_weights,
        label_smoothing=label_smoothing,
        warmup=warmup,
    )
    refuse_unused(training)
    seed = check_seed("--seed", seed)
    order_seed = seed if data_seed is None else check_seed("--data-seed", data_seed)
    valid_fraction = check_valid_fraction(valid_fraction)
    # What does not fit is told before the cache is read.
    HeadJob(HeadConfig(1, 2, tuple(hidden), dropout), training, seed)
    where = resolve_device(device)
    opened = open_caches(cache)
    check_cache(opened)
    warn_of_leaks(opened)
    say_verdict(opened, say)
    parts = choose_rows(opened, valid_fraction, order_seed, say)
    _say_counts(opened, parts, training, say)
    head = HeadConfig(opened.num_features, len(opened.classes), tuple(hidden), dropout)
    work = {
        "cache_sha256": opened.payload_sha256, "head": head.as_json(),
        "training": training.as_json(), "seed": seed, "data_seed": order_seed,
        "valid_fraction": valid_fraction, "device": where.type,
    }  # fmt: skip
    with new_folder(output, state=[STATE_NAME]) as partial:
        saved = SavedTraining(partial.parent / STATE_NAME, work, replace=overwrite, say=say)
        fit_start = time.perf_counter()
        features, valid_features = read_rows(parts, where, say)
        with Progress("train", "epoch", epochs, shown=progress) as bar:
            say_beside = bar.beside(say)
            result = fit_head(
                head, training, features, parts[0].targets, valid_features, parts[1].targets,
                seed=seed, data_seed=order_seed, device=where, classes=opened.classes,
                on_epoch=_epoch_lines(opened.classes, say_beside),
                on_share=lambda share: bar.move_by(share * epochs), say=say_beside,
                saved=None if optimizer == LBFGS else saved,  # it takes no minute
            )  # fmt: skip
        fit_seconds = time.perf_counter() - fit_start
        linear_probe = None
        if optimizer != LBFGS:
            linear_probe = compare_linear_probe(
                training, features, parts[0].targets, valid_features, parts[1].targets,
                opened.classes,
            )  # fmt: skip
        weights_sha256 = record_fit(
            partial, output.target, opened, head=head, training=training, result=result, seed=seed,
            data_seed=order_seed, device=where, parts=parts,
            valid_fraction=valid_fraction,
        )  # fmt: skip
    kept = result.history[result.best_epoch - 1]
    summary = TrainSummary(
        run=folder, classes=opened.classes, task=opened.task, num_train=len(parts[0].rows),
        num_valid=len(parts[1].rows),
        num_unlabelled=sum(part.num_unlabelled for part in parts),
        num_failed=len(opened.failures), num_views=parts[0].split.num_views,
        num_epochs=len(result.history), best_epoch=result.best_epoch, strength=kept.get("strength"),
        linear_probe=linear_probe,
        valid_loss=kept["valid_loss"], valid_accuracy=kept["valid_accuracy"],
        valid_recall={name: kept[f"valid_recall_{name}"] for name in opened.classes},
        fit_seconds=fit_seconds, total_seconds=time.perf_counter() - start,
        device=str(where), fingerprint=opened.fingerprint, weights_sha256=weights_sha256,
    )  # fmt: skip
    _say_kept(summary, result, say)
    return summary


def refuse_unused(training: TrainingConfig) -> None:
    """Refuse options that L-BFGS has no use for: whoever gives them expects them to do something.

    Raises:
        ConfigError: If there is one that is not as it comes.
    """
    if training.optimizer != LBFGS:
        return
    for field in dataclasses.fields(training):
        value = getattr(training, field.name)
        if field.name not in USED_BY_LBFGS and value != field.default:
            raise ConfigError(
                "--" + field.name.replace("_", "-"), found=repr(value),
                expected="none with --optimizer lbfgs, which has no use for it",
                hint="Leave it out, or take another optimizer",
            )  # fmt: skip


def _say_kept(summary: TrainSummary, result: FitResult, say: Say) -> None:
    kept, many = f"epoch {summary.best_epoch}", count(summary.num_epochs, "epoch")
    if summary.strength is not None:
        kept, many = f"strength {summary.strength:.2e}", count(summary.num_epochs, "strength")
        unsolved = sum(not row["converged"] for row in result.history)
        if unsolved:
            say(
                f"{unsolved} of {many} had not converged after {MAX_ITERATIONS:,} iterations: with "
                "so little regularisation the weights of linearly separable classes grow without "
                "bound"
            )
    accuracy = decimal(summary.valid_accuracy)
    say(f"kept {kept}: valid loss {summary.valid_loss:.4f}, accuracy {accuracy}")
    if summary.linear_probe is not None:
        say(probe_line(summary.linear_probe))
    say(
        f"{many} in {summary.fit_seconds:.1f} s on {summary.device}, written to "
        f"{printable(summary.run.as_posix())}"
    )


def probe_line(probe: Mapping[str, Any]) -> str:
    """Return the line on a linear probe of the same rows."""
    figures = f"valid loss {probe['valid_loss']:.4f}, accuracy {decimal(probe['valid_accuracy'])}"
    return f"beside it, a linear probe: {figures} (strength {probe['strength']:.2g})"


def _say_counts(cache: Cache, parts: Sequence[Part], training: TrainingConfig, say: Say) -> None:
    """Say how many rows of each class each part has, and what is left out or lopsided."""
    counts = [_count_answers(part.targets, len(cache.classes)) for part in parts]
    heads = ("{}",) if cache.task == "multiclass" else ("{}: yes", "no", "unknown")
    names = ["class", *cache.classes, "(unlabelled, left out)", "total"]
    columns = [[shorten(printable(name), 40) for name in names]]
    for part, of_part in zip(parts, counts, strict=True):
        below = [f"{part.num_unlabelled:,}", f"{len(part.rows):,}"]
        for head, column in zip(heads, of_part.T.tolist(), strict=True):
            columns.append([head.format(part.name), *(f"{n:,}" for n in column), *below])
            below = ["", ""]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        [f"{cell:>{max(w, 7)}}" for cell, w in zip(line[1:], widths[1:], strict=True)]
        for line in zip(*columns, strict=True)
    ]
    if len(cache.classes) > _MANY_CLASSES:
        for part, of_part in zip(parts, counts, strict=True):
            found = dict(zip(cache.classes, of_part[:, 0].tolist(), strict=True))
            found |= {"unlabelled": part.num_unlabelled} if part.num_unlabelled else {}
            say(f"{part.name}: {list_counts(found)}")
    else:
        for i, (name, line) in enumerate(zip(columns[0], lines, strict=True)):
            if i != len(lines) - 2 or any(part.num_unlabelled for part in parts):
                say(f"{name:<{widths[0]}}  {'  '.join(line)}".rstrip())
    _say_failures(cache, say)
    num_views = parts[0].split.num_views
    if num_views > 1:
        how = printable(cache.identity.get("augmentation") or "of unknown making")
        used = "all count" if training.optimizer == LBFGS else "each epoch draws one of them"
        say(f"views: {num_views} of each training image ({how}), {used}")
    if "test" in cache.splits:
        say(f"test is not touched: {count(len(cache.splits['test']), 'row')}")
    if training.class_weights == "none":
        _say_imbalance(cache, counts[0], say)
    if training.optimizer == LBFGS:
        say("lbfgs: solved for, without dropout; strengths are of L2 on standardised features")


def _count_answers(targets: Targets, num_classes: int) -> npt.NDArray[np.int64]:
    """Return the rows of each class, (C, 1); for multilabel caches yes, no and unknown, (C, 3)."""
    if targets.ndim == 1:
        return np.bincount(targets, minlength=num_classes)[:, None]
    return np.stack([(targets == 1).sum(0), (targets == 0).sum(0), np.isnan(targets).sum(0)], 1)


def _say_imbalance(cache: Cache, counts: npt.NDArray[np.int64], say: Say) -> None:
    if cache.task == "multiclass":
        ratio = counts.max() / counts.min()
        found = f"the largest class of train is {ratio:.1f} times the smallest"
    else:
        answers = counts[:, :2]
        ratios = np.where(answers.all(1), answers.max(1) / answers.min(1).clip(min=1), 1)
        ratio, name = ratios.max(), printable(cache.classes[ratios.argmax()])
        found = f"in train one answer to {name} is {ratio:.1f} times as frequent as the other"
    if ratio > _IMBALANCE:
        say(f"hint: {found}; try --class-weights balanced")


def _say_failures(cache: Cache, say: Say) -> None:
    """Say how many images are missing, and of what: without those of a class a head is biased."""
    if not cache.failures:
        return
    counts: Counter[str] = Counter()
    for failure in cache.failures:
        known = 0 <= failure.target < len(cache.classes)
        counts[f"{failure.split}/{cache.classes[failure.target]}" if known else failure.split] += 1
    listed = join_few(f"{n:,} of {name}" for name, n in counts.most_common())
    failed = count(len(cache.failures), "failed image")
    say(f"not in this cache: {failed} ({listed}); see featcache info")


def _epoch_lines(classes: Sequence[str], say: Say) -> Callable[[dict[str, Any]], None]:
    """Return what says a line per epoch or strength: losses, accuracy, recall per class of valid.

    Where the classes do not fit side by side, the lowest recall and its class stand instead.
    """
    widths = [max(6, len(printable(name))) for name in classes]
    while sum(widths) + 2 * len(widths) > _RECALLS_WIDTH and max(widths) > 6:
        widths[widths.index(max(widths))] -= 1
    fits = sum(widths) + 2 * len(widths) <= _RECALLS_WIDTH
    lowest, is_first = float("inf"), True

    def line(row: dict[str, Any]) -> None:
        nonlocal lowest, is_first
        if is_first:
            is_first = False
            first = f"{'epoch':>5}" if "epoch" in row else f"{'strength':>8}"
            head = f"{first}  train loss  valid loss  accuracy  "
            names = (
                f"{shorten(printable(n), w):>{w}}" for n, w in zip(classes, widths, strict=True)
            )
            say(f"{'(* = lowest valid loss so far)':<{len(head)}}recall on valid")
            say(head + ("  ".join(names) if fits else "lowest of the classes"))
        recalls = [(row[f"valid_recall_{name}"], printable(name)) for name in classes]
        if not fits:
            recall, name = min((p for p in recalls if p[0] is not None), default=(None, ""))
            shown = "-" if recall is None else f"{decimal(recall)} {shorten(name, 28)}"
        else:
            shown = "  ".join(
                f"{'-' if recall is None else decimal(recall):>{w}}"
                for (recall, _), w in zip(recalls, widths, strict=True)
            )
        mark = "  *" if row["valid_loss"] < lowest else ""
        lowest = min(lowest, row["valid_loss"])
        number = f"{row['epoch']:>5}" if "epoch" in row else f"{row['strength']:.2e}"
        say(
            f"{number}  {row['train_loss']:>10.4f}  {row['valid_loss']:>10.4f}  "
            f"{decimal(row['valid_accuracy']):>8}  {shown}{mark}"
        )

    return line
