"""Features in, trained head out. All rows that fit live on the device; there is no DataLoader.

A default head on 200 rows takes milliseconds per epoch, so what surrounds the arithmetic decides:
batches are gathered by index, a step is one fused kernel, and the host waits once per epoch.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from featcache.errors import ConfigError, DataError
from featcache.heads.batches import Draw, rows_at_once
from featcache.heads.compiled_stack import kernels_for, partner_for
from featcache.heads.config import LBFGS, FitResult, HeadJob, TrainingConfig
from featcache.heads.head import HeadConfig, count_values
from featcache.heads.linear_probe import fit_linear_probe
from featcache.heads.stack import HeadStack
from featcache.heads.streaming import StoredFeatures
from featcache.heads.trainer import FORWARD_ROWS, Rows, Trainer
from featcache.runtime import Say, available_cores, available_memory, exact_fp32, silent
from featcache.threads import Threads

_ROWS_AT_ONCE = 512  # go through a head that is used: 3 MB of 1280 features
_ONE_THREAD_ROWS, _ONE_THREAD_VALUES = 64, 1 << 24  # of a batch; of all features, times classes
_HEADS_SHARE = 0.75  # of the memory that is left
_PASS_BYTES, _HEADS_PER_PASS = 12 << 20, 64  # of one thread: its share of a last-level cache

Features: TypeAlias = npt.NDArray[Any] | StoredFeatures


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
    device: torch.device,
    train_weights: npt.NDArray[Any] | None = None,
    classes: Sequence[str] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    say: Say = silent,
) -> FitResult:
    """Train a head and keep the epoch with the lowest cross-entropy on the validation rows.

    Without validation rows the last epoch is kept. Targets (N, C) are several labels a row: the
    loss is then a binary cross-entropy per class, its mean over the known targets (module
    ``loss``). A head whose optimizer is ``lbfgs`` is solved for instead (module ``linear_probe``).

    The same as a script that calls ``torch.manual_seed(seed)``, builds the head and loops, with
    the rows in the order of ``torch.randperm`` under a generator of ``data_seed``. Of rows with
    views, one view is drawn per row and epoch, uniformly and under a generator of its own: the
    order of the rows is that of rows without. Bit for bit repeatable on one machine; on the CPU
    with more than 64 rows per step, also for one number of threads. The caller's random state is
    not touched.

    Args:
        head_config: See ``HeadJob``, as for ``training`` and ``seed``.
        training: Optimizer, epochs and the rest.
        train_features: (N, D) or (N, V, D) float; float64 trains in float64, anything else in
            float32. Those that stay in their file are read in shuffled blocks, each epoch anew: in
            another order than from memory, which hangs on the size of the blocks too.
        train_targets: (N,) integers from 0 to C - 1; or (N, C) floats of 0, 1 and NaN = unknown,
            of each row at least one known.
        valid_features: (M, D) float, or None.
        valid_targets: (M,) or (M, C) alike, or None.
        seed: Decides the initial weights and dropout.
        data_seed: Decides the order of the rows and their views.
        device: Where the rows (or a block of them) and the head live.
        train_weights: (N,) above 0, a weight per row, multiplied with that of its class: the loss
            of a batch is the mean of its rows' (of their known targets') so weighed. None weighs
            all rows alike.
        classes: Names for the history's columns; None numbers them.
        on_epoch: Called with each row of the history as it is made.
        say: As for ``fit_heads``.

    Raises:
        DataError: If the arrays do not fit each other or the head.
        ConfigError: If the loss is no longer a finite number, or class weights do not fit.
    """
    (result,) = fit_heads(
        [HeadJob(head_config, training, seed)], train_features, train_targets, valid_features,
        valid_targets, data_seed=data_seed, device=device, train_weights=train_weights,
        classes=classes, on_epoch=None if on_epoch is None else lambda _, row: on_epoch(row),
        say=say,
    )  # fmt: skip
    if result.diverged_in is not None:
        found, hint = f"none in epoch {result.diverged_in}", "Lower --learning-rate"
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
    device: torch.device,
    train_weights: npt.NDArray[Any] | None = None,
    classes: Sequence[str] | None = None,
    on_epoch: Callable[[int, dict[str, Any]], bool | None] | None = None,
    say: Say = silent,
) -> list[FitResult]:
    """Train many heads on the same rows in the same order, each as ``fit_head`` would.

    Heads of one shape, batch size, optimizer and number of epochs are trained as one stack (module
    ``stack``). On a CPU the stacks are cut into passes that stay in the processor's cache, one a
    core at a time: heads do not wait for each other.

    Args:
        jobs: The heads.
        train_features: As for ``fit_head``, as are the four that follow.
        train_targets: (N,) or (N, C).
        valid_features: (M, D).
        valid_targets: (M,) or (M, C).
        data_seed: Of the order and the views.
        device: Where the rows and the heads live.
        train_weights: (N,), as for ``fit_head``.
        classes: Names for the history's columns; None numbers them.
        on_epoch: Called with the number of a job and each row of its history as it is made, from
            one thread at a time. Where it answers True, the job is given up: it ends there, and
            the others of its stack go on the faster.
        say: Told when memory has room for fewer heads at once than there would be, and when code
            is compiled.

    Returns:
        A result per job, in their order. One whose loss is no longer a finite number ends there.

    Raises:
        DataError: If the arrays do not fit each other or the heads.
    """
    views, rank = train_features.ndim == 3, train_targets.ndim
    for head in dict.fromkeys(job.head for job in jobs):
        pair = train_features, train_targets
        _check_rows("training rows", *pair, head, rank=rank, at_least=2, views=views)
        if valid_features is not None and valid_targets is not None:
            pair = valid_features, valid_targets
            _check_rows("validation rows", *pair, head, rank=rank, at_least=1)
    if train_weights is not None:
        _check_weights(train_weights, len(train_targets))
    num_classes = jobs[0].head.num_classes if jobs else 0
    names = [str(i) for i in range(num_classes)] if classes is None else list(classes)
    dtype = torch.float64 if train_features.dtype == np.float64 else torch.float32
    rows = Rows(
        _place(train_features, device, dtype),
        _to_targets(train_targets, device, dtype),
        None if train_weights is None else torch.from_numpy(train_weights).to(device, dtype),
        None if valid_features is None else _place(valid_features, device, dtype), valid_targets,
        names, data_seed, dtype,
    )  # fmt: skip
    results: dict[int, FitResult] = {}
    lock = threading.Lock()

    def tell(number: int, row: dict[str, Any]) -> bool:
        if on_epoch is None:
            return False
        with lock:
            return bool(on_epoch(number, row))

    passes = [part for group in _group(jobs, len(rows.targets)) for part in _cut(group, jobs, rows)]
    passes, num_threads = _cut_to_memory(passes, jobs, rows, say)
    kernels = kernels_for(jobs, len(rows.targets), device, dtype, say)
    with exact_fp32():
        if num_threads <= 1:
            helping = partner_for(jobs) if kernels is not None else contextlib.nullcontext()
            with helping as partner:
                for part in passes:
                    results |= _fit_pass(part, jobs, rows, tell, kernels, partner=partner)
        else:
            with Threads("fit", num_threads, wait=True) as threads:
                for future in [
                    threads.submit(_fit_pass, part, jobs, rows, tell, kernels, 1) for part in passes
                ]:
                    results |= future.result()
    return [results[number] for number in range(len(jobs))]


def _group(jobs: Sequence[HeadJob], num_rows: int) -> list[list[int]]:
    """Return the numbers of the jobs that can share batches and an optimizer."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, job in enumerate(jobs):
        training = job.training
        key = (
            job.head.hidden, training.rows_per_step(num_rows), training.optimizer, training.epochs
        )  # fmt: skip
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def _cut(group: list[int], jobs: Sequence[HeadJob], rows: Rows) -> list[list[int]]:
    """Cut a stack into passes whose parameters, gradients and moments stay in the cache."""
    size = len(group)
    if rows.device.type == "cpu":
        head_bytes = 4 * rows.dtype.itemsize * count_values(jobs[group[0]].head)
        size = max(1, min(_HEADS_PER_PASS, _PASS_BYTES // head_bytes))
    return [group[i : i + size] for i in range(0, len(group), size)]


def _cut_to_memory(
    passes: list[list[int]], jobs: Sequence[HeadJob], rows: Rows, say: Say
) -> tuple[list[list[int]], int]:
    """Return passes that memory has room for, and how many to run at once."""
    memory = _HEADS_SHARE * available_memory(rows.device)
    cut, largest = list[list[int]](), 1
    for part in passes:
        of_head, of_pass = _count_bytes(jobs[part[0]], rows)
        size = max(1, int(min((memory - of_pass) / of_head, len(part))))
        cut += [part[i : i + size] for i in range(0, len(part), size)]
        largest = max(largest, size * of_head + of_pass)
    wanted = available_cores() if rows.device.type == "cpu" else 1
    num_threads = max(1, int(min(wanted, memory / largest)))
    if len(cut) > len(passes) or num_threads < min(wanted, len(passes)):
        at_once = min(len(jobs), num_threads * max(map(len, cut)))
        say(
            f"heads: {len(jobs):,}, memory for them: {memory / 1e9:,.3g} GB; training "
            f"{at_once:,} at a time"
        )
    return cut, min(num_threads, len(cut))


def _count_bytes(job: HeadJob, rows: Rows) -> tuple[int, int]:
    """Return about what a head takes while it is trained, and what a pass takes besides."""
    num_values = count_values(job.head)
    widths = job.head.num_features + sum(job.head.hidden) + job.head.num_classes
    batch = job.training.rows_per_step(len(rows.targets))
    num_judged = 0 if rows.valid_targets is None else len(rows.valid_targets)
    # Parameters, gradients, two moments and copies while heads are given up; of each layer, what
    # the backward pass needs; logits to judge by.
    of_head = 8 * num_values + 8 * batch * (widths + job.head.num_features)
    of_head += 3 * num_judged * job.head.num_classes
    if job.head.dropout:  # masks, drawn ahead
        of_head += 2 * rows_at_once(batch) * (job.head.hidden or (job.head.num_features,))[-1]
    of_pass = 3 * min(FORWARD_ROWS, max(num_judged, batch)) * widths
    of_pass += 3 * rows_at_once(batch) * job.head.num_features  # drawn ahead; joined of blocks
    return of_head * rows.dtype.itemsize, of_pass * rows.dtype.itemsize


class _Progress:
    """How far one head is, and its best epoch so far."""

    def __init__(self, number: int, training: TrainingConfig) -> None:
        self.number, self.training = number, training
        self.is_over = False
        self._history: list[dict[str, Any]] = []
        self._state: dict[str, Tensor] = {}
        self._best_epoch, self._lowest_epoch, self._lowest_loss = 0, 0, math.inf
        self._diverged_in: int | None = None

    def note(self, row: dict[str, Any], stack: HeadStack, place: int) -> bool:
        """Take in an epoch; return whether its losses are finite. Keeps the state if it is best."""
        epoch, loss = row["epoch"], row.get("valid_loss", row["train_loss"])
        if not math.isfinite(row["train_loss"] + loss):
            self.is_over, self._diverged_in = True, epoch
            return False
        self._history.append(row)
        if loss < self._lowest_loss:
            self._lowest_epoch, self._lowest_loss = epoch, loss
        if "valid_loss" not in row or epoch == self._lowest_epoch:
            self._best_epoch = epoch
            self._state = {name: value.cpu() for name, value in stack.state(place).items()}
        patience = self.training.patience
        self.is_over = patience is not None and epoch - self._lowest_epoch >= patience
        return True

    def result(self) -> FitResult:
        return FitResult(self._state, self._history, self._best_epoch, self._diverged_in)


def _fit_pass(  # noqa: PLR0917
    numbers: Sequence[int], jobs: Sequence[HeadJob], rows: Rows,
    tell: Callable[[int, dict[str, Any]], bool], kernels: ModuleType | None,
    num_threads: int | None = None, partner: Threads | None = None,
) -> dict[int, FitResult]:  # fmt: skip
    """Train some heads that share batches and an optimizer; return their results by number."""
    training = jobs[numbers[0]].training
    if training.optimizer == LBFGS:
        work = math.prod(rows.features.shape) * len(rows.names)
        with _few_threads(num_threads, small=work < _ONE_THREAD_VALUES):
            return {n: fit_linear_probe(jobs[n], rows, functools.partial(tell, n)) for n in numbers}
    batch_size = training.rows_per_step(len(rows.targets))
    num_steps = training.steps_per_epoch(len(rows.targets))
    with _few_threads(num_threads, small=batch_size <= _ONE_THREAD_ROWS):
        draw = Draw(rows.features, rows.data_seed, rows.device, rows.dtype)
        trainer = Trainer([jobs[number] for number in numbers], rows, kernels, partner)
        heads = everyone = [_Progress(number, jobs[number].training) for number in numbers]
        for epoch in range(1, training.epochs + 1):
            start = time.perf_counter()
            rates = [
                [head.training.learning_rate_at(epoch, step / num_steps) for head in heads]
                for step in range(1, num_steps + 1)
            ]
            losses = trainer.epoch(draw.epoch(batch_size), batch_size, rates)
            valid = trainer.validate()
            seconds = time.perf_counter() - start
            for place, (head, rate, loss) in enumerate(zip(heads, rates[-1], losses, strict=True)):
                row = {"epoch": epoch, "train_loss": loss, **valid[place]}
                row |= {"learning_rate": rate, "seconds": seconds}
                if head.note(row, trainer.stack, place) and tell(head.number, row):
                    head.is_over = True
            left = [place for place, head in enumerate(heads) if not head.is_over]
            if not left:
                break
            if len(left) < len(heads):  # fewer heads, faster epochs
                trainer.keep(left)
                heads = [heads[place] for place in left]
    return {head.number: head.result() for head in everyone}


def forward_head(head: nn.Module, features: Features, device: torch.device) -> npt.NDArray[Any]:
    """Return logits (N, C) of features (N, D) in the head's dtype, a few thousand rows at a time.

    Leaves the head in eval mode on ``device``.
    """
    head = head.to(device).eval()
    dtype = next(head.parameters()).dtype
    logits = [
        _logits(head, _to_tensor(features[i : i + _ROWS_AT_ONCE], device).to(dtype)).numpy()
        for i in range(0, max(len(features), 1), _ROWS_AT_ONCE)
    ]
    return np.concatenate(logits)


def predict_probs(
    head: nn.Module, features: Features, device: torch.device, task: str = "multiclass"
) -> npt.NDArray[np.float64]:
    """Return probs (N, C) float64: of ``forward_head`` the softmax, for ``multilabel`` the sigmoid.

    Of features with views (N, V, D), the mean of the probs of a row's views. float64, so that a
    very sure head still ranks its rows instead of calling them all 1.
    """
    if features.ndim == 3:
        size = max(1, _ROWS_AT_ONCE // features.shape[1])
        parts = [features[i : i + size] for i in range(0, max(len(features), 1), size)]
        return np.concatenate([_average_views(head, part, device, task) for part in parts])
    logits = torch.from_numpy(forward_head(head, features, device)).double()
    return np.asarray(logits.sigmoid() if task == "multilabel" else logits.softmax(1))


def _average_views(
    head: nn.Module, features: Features, device: torch.device, task: str
) -> npt.NDArray[np.float64]:
    array = features.load() if isinstance(features, StoredFeatures) else features
    of_views = predict_probs(head, array.reshape(-1, array.shape[-1]), device, task)
    return np.asarray(of_views.reshape(*array.shape[:2], -1).mean(axis=1))


@torch.inference_mode()
def _logits(head: nn.Module, features: Tensor) -> Tensor:
    logits: Tensor = head(features).cpu()
    return logits


@contextlib.contextmanager
def _few_threads(num_threads: int | None, *, small: bool) -> Iterator[None]:
    """Take ``num_threads``, or one for small steps, then give the caller its number back.

    At 32 rows a second thread gains at most a fifth, and when anything else wants the cores its
    barriers cost all: ten epochs of 200 rows took 0.4 s with one, 3 to 9 s with two on two cores, a
    path of L-BFGS over 300 rows x 1280 1 s with one, 5 to 43 s with two.
    """
    before = torch.get_num_threads()
    if num_threads is not None or small:
        torch.set_num_threads(num_threads or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _place(features: Features, device: torch.device, dtype: torch.dtype) -> Tensor | StoredFeatures:
    """Return arrays as a tensor on the device, and what stays in its file as it is."""
    if isinstance(features, StoredFeatures):
        return features
    return _to_tensor(features, device).to(dtype)


def _to_tensor(features: Features, device: torch.device) -> Tensor:
    array = features.load() if isinstance(features, StoredFeatures) else features
    dtype = np.float64 if array.dtype == np.float64 else np.float32
    if array.dtype != dtype or not array.flags.writeable:  # a tensor may not share a mapped file
        array = array.astype(dtype)
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _to_targets(array: npt.NDArray[Any], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return targets as the loss takes them: int64, or ``dtype`` for several labels a row."""
    if array.ndim == 2:
        return torch.from_numpy(array.astype(np.float32)).to(device, dtype)
    return torch.from_numpy(array.astype(np.int64)).to(device)


def _check_rows(
    what: str,
    features: Features,
    targets: npt.NDArray[Any],
    head: HeadConfig,
    *,
    rank: int,
    at_least: int,
    views: bool = False,
) -> None:
    found, top = f"features {features.shape}, targets {targets.shape}", head.num_classes - 1
    shape = (*features.shape[:1], *features.shape[2:]) if views else features.shape
    has_labels = rank == 2
    of_targets = (len(targets), head.num_classes) if has_labels else (len(targets),)
    if (
        (shape, targets.shape) != ((len(targets), head.num_features), of_targets)
        or targets.dtype.kind not in ("f" if has_labels else "iu")
    ):  # fmt: skip
        kind = f"(N, V, {head.num_features})" if views else f"(N, {head.num_features})"
        kinds = f"(N, {head.num_classes}) of floats" if has_labels else "(N,) of whole numbers"
        wanted = f"features {kind} and targets {kinds}"
        raise DataError(what, expected=wanted, found=found)
    if 0 in features.shape[1:]:
        raise DataError(what, expected="at least one view", found=found)
    if len(targets) < at_least:
        raise DataError(what, expected=f"at least {at_least}", found=len(targets))
    if has_labels:
        known = ~np.isnan(targets)
        if not np.isin(targets[known], (0, 1)).all() or not known.any(axis=1).all():
            found = "a row without a known one" if not known.any(axis=1).all() else "other numbers"
            raise DataError(what, expected="targets of 0, 1 and NaN, some known", found=found)
    elif targets.min() < 0 or targets.max() > top:
        found = f"{targets.min()} to {targets.max()}"
        raise DataError(what, expected=f"targets from 0 to {top}", found=found)


def _check_weights(weights: npt.NDArray[Any], num_rows: int) -> None:
    if weights.shape != (num_rows,) or not (np.isfinite(weights) & (weights > 0)).all():
        found = f"{weights.shape}, {weights.min(initial=np.inf)} to {weights.max(initial=-np.inf)}"
        wanted = f"({num_rows},) finite numbers above 0"
        raise DataError("weights of training rows", expected=wanted, found=found)
