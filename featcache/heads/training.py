"""Cache in, run out: check the rows, train a head on them, keep the best epoch.

Reads: a cache. Writes: a run folder.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcache.cache.by_url import by_url
from featcache.cache.reading import warn_of_leaks
from featcache.cache.side_by_side import Caches, list_caches, open_caches
from featcache.cache.verdict import say_verdict
from featcache.errors import printable
from featcache.files import result_as_dict
from featcache.formatting import brief_repr, count, decimal
from featcache.heads.config import (
    LBFGS,
    MAX_ITERATIONS,
    FitResult,
    HeadJob,
    TrainingConfig,
    check_seed,
    check_valid_fraction,
    refuse_unused,
)
from featcache.heads.fit import compare_linear_probe, fit_head
from featcache.heads.head import HeadConfig
from featcache.heads.lines import epoch_lines, probe_line, say_counts
from featcache.heads.resuming import STATE_NAME, SavedTraining
from featcache.heads.rows import check_cache, choose_rows, read_rows
from featcache.heads.run_writing import record_fit, run_output
from featcache.output_folders import check_folder, new_folder
from featcache.progress import Progress
from featcache.runtime import Say, log_line, resolve_device


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
    say_counts(opened, parts, training, say)
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
                on_epoch=epoch_lines(opened.classes, say_beside),
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
