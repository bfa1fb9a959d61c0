"""Features in, trained head out. All rows that fit live on the device; there is no DataLoader.

On a CPU the steps are NumPy's (module ``group``), with compiled functions where there are many of
them (package ``compiled``), and torch is not imported. On a GPU heads of one shape are trained as
one stack (module ``stack``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import ConfigError
from featcache.heads.batches import Features, TrainingData, check_row_weights, check_rows
from featcache.heads.compiled import numpy_kernels
from featcache.heads.compiled.team import Team, one_blas_thread
from featcache.heads.config import LBFGS, FitResult, HeadJob, TrainingConfig
from featcache.heads.head import HeadConfig, count_values
from featcache.heads.one_pass import are_finite, fit_pass
from featcache.heads.passes import plan_passes
from featcache.heads.prediction import compute_logits
from featcache.heads.resuming import SavedTraining
from featcache.heads.scaling import ColumnScaling, check_sizes, choose_scalings
from featcache.heads.streaming import StoredFeatures
from featcache.memory import require_memory_for_products
from featcache.runtime import CPU, Device, Say, available_cores, log_line
from featcache.threads import Threads

_CHECKED_ROWS = 32  # that go through each head at the end: its outputs must be finite
_PROBE_VALUES = 1 << 23  # rows * classes * (features + classes): 3 s on a core
_PATIENCE = 4  # strengths: half a decade

_KERNELS_WORTH = 6e7
"""Parameters times steps from which compiled functions pay for being loaded (0.5 s): 82 steps of
the default head. Of fewer, as in the README's example of 200 X-rays, NumPy is done before."""

_TEAM_SIZE = 2
"""Threads that share the steps of one head. A further one would wait: half of a step is shared."""

_COMPILING = "compiling the training step, once on this machine: a few seconds"
_LONG_SECONDS = 3.0


def fit_head(  # noqa: PLR0917 (two configurations, two pairs of arrays)
    head_config: HeadConfig,
    training: TrainingConfig,
    train_features: Features,
    train_targets: npt.NDArray[Any],
    valid_features: Features | None = None,
    valid_targets: npt.NDArray[Any] | None = None,
    *,
    seed: int,
    data_seed: int,
    device: Device,
    train_weights: npt.NDArray[Any] | None = None,
    classes: Sequence[str] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    on_share: Callable[[float], None] | None = None,
    say: Say = log_line,
    saved: SavedTraining | None = None,
) -> FitResult:
    """Train a head and keep the epoch with the lowest cross-entropy on the validation rows.

    Without validation rows the last epoch is kept. Targets (N, C) are several labels a row: the
    loss is then a binary cross-entropy per class, its mean over the known targets (module
    ``loss``). A head whose optimizer is ``lbfgs`` is solved for instead (module ``linear_probe``).

    The same as a script that calls ``torch.manual_seed(seed)``, builds the head and loops, with
    the rows in the order of ``torch.randperm`` under a generator of ``data_seed``. Dropout masks
    and, of rows with views, the view drawn per row and epoch come from streams of their own, the
    same on every device. Bit for bit repeatable on one machine, on a CPU for any number of
    threads. The caller's random state is not touched.

    Args:
        head_config: See ``HeadJob``, as for ``training`` and ``seed``.
        training: Optimizer, epochs and the rest.
        train_features: (N, D) or (N, V, D) float; float64 trains in float64, anything else in
            float32. Those that stay in their file are read in shuffled blocks, each epoch anew.
            The order then differs from that in memory and depends on the block size.
        train_targets: (N,) integers from 0 to C - 1; or (N, C) floats of 0, 1 and NaN = unknown,
            of each row at least one known.
        valid_features: (M, D) float, or None.
        valid_targets: (M,) or (M, C) alike, or None.
        seed: Decides the initial weights and dropout.
        data_seed: Decides the order of the rows and their views.
        device: Where the head is trained.
        train_weights: (N,) above 0, a weight per row, multiplied with that of its class: the loss
            of a batch is the mean of its rows' (of their known targets') so weighted. None weighs
            all rows alike.
        classes: Names for the history's columns; None numbers them.
        on_epoch: Called with each row of the history as it is made.
        on_share: As for ``fit_heads``, as is the next.
        say: For people.
        saved: Keeps the state, and has what an interrupted training left. Not used by lbfgs.

    Raises:
        DataError: If the arrays do not fit each other or the head, or a feature is not finite or
            beyond 1e18.
        RunError: If what is kept is another training's.
        ConfigError: If the loss is no longer a finite number, or class weights do not fit.
    """
    (result,) = fit_heads(
        [HeadJob(head_config, training, seed)], train_features, train_targets, valid_features,
        valid_targets, data_seed=data_seed, device=device, train_weights=train_weights,
        classes=classes, on_epoch=None if on_epoch is None else lambda _, row: on_epoch(row),
        on_share=on_share, say=say, saved=saved,
    )  # fmt: skip
    if result.diverged_in is not None:
        found, hint = f"none in epoch {result.diverged_in}", "Lower --learning-rate"
        if training.optimizer == LBFGS:
            hint = "Raise --weight-decay"
        raise ConfigError("training", expected="a finite loss", found=found, hint=hint)
    return result


def fit_heads(
    jobs: Sequence[HeadJob],
    train_features: Features,
    train_targets: npt.NDArray[Any],
    valid_features: Features | None = None,
    valid_targets: npt.NDArray[Any] | None = None,
    *,
    data_seed: int,
    device: Device,
    train_weights: npt.NDArray[Any] | None = None,
    classes: Sequence[str] | None = None,
    on_epoch: Callable[[int, dict[str, Any]], bool | None] | None = None,
    on_share: Callable[[float], None] | None = None,
    say: Say = log_line,
    saved: SavedTraining | None = None,
) -> list[FitResult]:
    """Train many heads on the same rows in the same order, each as ``fit_head`` would.

    On a CPU one head is trained by each core at a time: heads do not wait for each other. Small
    ones share their batches.

    Args:
        jobs: The heads.
        train_features: As for ``fit_head``, as are the four that follow.
        train_targets: (N,) or (N, C).
        valid_features: (M, D).
        valid_targets: (M,) or (M, C).
        data_seed: Of the order and the views.
        device: Where the heads are trained.
        train_weights: (N,), as for ``fit_head``.
        classes: Names for the history's columns; None numbers them.
        on_epoch: Called with the number of a job and each row of its history as it is made, from
            one thread at a time. Where it answers True, the job is given up: it ends there, and
            the others go on the faster.
        on_share: Called after each batch, from one thread at a time, with the share of one head's
            training that it was, in [0, 1]; heads that share a batch add up.
        say: Receives a line when memory limits how many heads are trained at once, and when code
            is compiled.
        saved: As for ``fit_head``, of one job.

    Returns:
        A result per job, in their order. One whose loss is no longer a finite number ends there.

    Raises:
        DataError: If the arrays do not fit each other or the heads.
    """
    views, rank = train_features.ndim == 3, train_targets.ndim
    for head in dict.fromkeys(job.head for job in jobs):
        pair = train_features, train_targets
        check_rows("training rows", *pair, head, rank=rank, at_least=2, views=views)
        if valid_features is not None and valid_targets is not None:
            pair = valid_features, valid_targets
            check_rows("validation rows", *pair, head, rank=rank, at_least=1)
    if train_weights is not None:
        check_row_weights(train_weights, len(train_targets))
    if not jobs:
        return []
    names = list(map(str, range(jobs[0].head.num_classes) if classes is None else classes))
    data = TrainingData.of(
        train_features, train_targets, valid_features, valid_targets, train_weights, names,
        data_seed,
    )  # fmt: skip
    scalings = choose_scalings([job.training for job in jobs], data.features, data.dtype)
    if data.valid_features is not None:
        check_sizes("validation rows", data.valid_features)
    if device.type == "cpu":
        require_memory_for_products()
    lock = threading.Lock()

    def tell(number: int, row: dict[str, Any]) -> bool:
        if on_epoch is None:
            return False
        with lock:
            return bool(on_epoch(number, row))

    def tell_share(share: float) -> None:
        if on_share is not None:
            with lock:
                on_share(share)

    num_cores = available_cores()
    passes, num_threads = plan_passes(jobs, scalings, data, device, num_cores=num_cores, say=say)
    kernels = _choose_kernels(jobs, data, device, say)
    fit = functools.partial(
        fit_pass, jobs=jobs, scalings=scalings, data=data, device=device, tell=tell,
        tell_share=tell_share, saved=saved,
    )  # fmt: skip
    results: dict[int, FitResult] = {}
    with one_blas_thread() if device.type == "cpu" else contextlib.nullcontext():
        if num_threads > 1:
            with Threads("fit", num_threads, wait=True) as threads:
                for future in [threads.submit(fit, part, kernels, Team()) for part in passes]:
                    results |= future.result()
        else:
            team_size = 1 if kernels is numpy_kernels else min(num_cores, _TEAM_SIZE)
            with Team(team_size) as team:
                for part in passes:
                    results |= fit(part, kernels, team)
        return [
            _finish(results[number], job, scaling, data)
            for number, (job, scaling) in enumerate(zip(jobs, scalings, strict=True))
        ]


def compare_linear_probe(  # noqa: PLR0917 (as fit_head)
    training: TrainingConfig,
    train_features: Features,
    train_targets: npt.NDArray[Any],
    valid_features: Features,
    valid_targets: npt.NDArray[Any],
    classes: Sequence[str],
) -> dict[str, Any] | None:
    """Return how good a linear probe of the same rows is, to hold beside a trained head.

    It is solved for with ever weaker regularisation, and given up once half a decade of that
    brought no lower validation loss: for 200 rows x 1280 this takes 0.1 to 0.6 s, for 3,200 rows
    3 s. The whole path, which ``--optimizer lbfgs`` takes, may have a lower one beyond.

    Args:
        training: Its class weights and label smoothing count.
        train_features: As for ``fit_head``, as are the three that follow.
        train_targets: (N,) or (N, C).
        valid_features: (M, D).
        valid_targets: (M,) or (M, C).
        classes: Names.

    Returns:
        ``strength``, ``valid_loss``, ``valid_accuracy``, ``valid_recall`` {class: recall, None
        without rows}. None for several labels per row, for features that stay in their file, above
        3,271 rows x 1280 of two classes (``_PROBE_VALUES``), and where the loss was no number.
    """
    num_features, number = train_features.shape[-1], len(classes)
    # The solver's contrasts of the classes take classes ** 2 per row: with 1,000 they rule.
    size = math.prod(train_features.shape[:-1]) * number * (num_features + number)
    in_memory = not isinstance(train_features, StoredFeatures)
    if train_targets.ndim == 2 or not in_memory or size > _PROBE_VALUES:
        return None
    losses = list[float]()

    def is_over(_: int, row: Mapping[str, Any]) -> bool:
        losses.append(row["valid_loss"])
        return len(losses) - losses.index(min(losses)) > _PATIENCE

    solved = TrainingConfig(
        optimizer=LBFGS, class_weights=training.class_weights,
        label_smoothing=training.label_smoothing,
    )  # fmt: skip
    head = HeadConfig(train_features.shape[-1], len(classes), (), 0.0)
    (result,) = fit_heads(
        [HeadJob(head, solved, 0)], train_features, train_targets, valid_features, valid_targets,
        data_seed=0, device=CPU, classes=classes, on_epoch=is_over,
    )  # fmt: skip
    if result.diverged_in is not None:
        return None
    kept = result.history[result.best_epoch - 1]
    figures = {name: kept[name] for name in ("strength", "valid_loss", "valid_accuracy")}
    return figures | {"valid_recall": {name: kept[f"valid_recall_{name}"] for name in classes}}


def _finish(
    result: FitResult, job: HeadJob, scaling: ColumnScaling | None, data: TrainingData
) -> FitResult:
    """Return a head as it is used, of raw features; diverged if what it gives is not finite."""
    if result.diverged_in is not None:
        return result
    state = result.state if scaling is None else scaling.fold(result.state)
    num_rows = len(data.features)
    some = data.features[np.arange(0, num_rows, math.ceil(num_rows / _CHECKED_ROWS))]
    rows = some.load() if isinstance(some, StoredFeatures) else some
    logits = compute_logits(job.head, state, rows.reshape(-1, rows.shape[-1]))
    is_finite = are_finite([*state.values(), logits])
    diverged_in = None if is_finite else result.best_epoch
    return dataclasses.replace(result, state=state, diverged_in=diverged_in)


def _choose_kernels(jobs: Sequence[HeadJob], data: TrainingData, device: Device, say: Say) -> Any:
    """Return compiled functions if there is work enough for them and Numba, else NumPy's.

    By the size of the training alone, so that it takes the same steps every time.
    """
    work = sum(
        job.training.epochs * job.training.steps_per_epoch(len(data.targets))
        * count_values(job.head)
        for job in jobs
        if job.training.optimizer != LBFGS
    )  # fmt: skip
    if device.type != "cpu" or work < _KERNELS_WORTH:
        return numpy_kernels
    timer = threading.Timer(_LONG_SECONDS, say, [_COMPILING])
    timer.daemon = True
    timer.start()
    try:
        from featcache.heads.compiled import kernels

        return kernels.load(data.dtype)
    except Exception:  # noqa: BLE001 (a Python too new for Numba, a compiler that fails: do without)
        return numpy_kernels
    finally:
        timer.cancel()
