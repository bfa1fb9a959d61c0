"""Arrays in, trained head out. All rows live on the device; there is no DataLoader.

A default head on 200 rows takes milliseconds per epoch, so what surrounds the arithmetic decides:
batches are gathered by index, a step is one fused kernel, and the host waits once per epoch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from featcache.errors import ConfigError, DataError
from featcache.head import HeadConfig, build_head
from featcache.optimizer import OPTIMIZERS, FusedOptimizer
from featcache.runtime import exact_fp32

SCHEDULES = ("constant", "cosine")
CLASS_WEIGHTS = ("none", "balanced")

_FORWARD_ROWS, _ONE_THREAD_ROWS = 8192, 64
_VIEWS_SEED = 1 << 62  # another stream than that of the order

_Batch: TypeAlias = tuple[Tensor, ...]
"""What indexes features: rows (n,), and views (n,) where there are any."""


@dataclass(frozen=True)
class TrainingConfig:
    """How a head is trained. The defaults are the tutorial's.

    Attributes:
        learning_rate: Step size at the first epoch.
        weight_decay: Added to the gradient (adam, sgd) or taken off the weights (adamw).
        optimizer: ``adam``, ``adamw`` (betas 0.9 and 0.999) or ``sgd`` (momentum 0.9).
        schedule: ``constant``, or ``cosine``: from epoch to epoch down half a cosine towards 0.
        batch_size: Rows per step, two or more, or ``auto`` (see ``auto_batch_size``).
        epochs: The most passes over the rows.
        patience: Stop after this many epochs without a lower validation loss (without validation
            rows: training loss); None never does.
        class_weights: In the loss: ``none``, ``balanced`` (N / (C * n) for n of N rows) or a tuple.
        label_smoothing: Share in [0, 1) of each target spread evenly over all classes.
    """

    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    optimizer: str = "adam"
    schedule: str = "constant"
    batch_size: int | str = "auto"
    epochs: int = 10
    patience: int | None = None
    class_weights: str | tuple[float, ...] = "none"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Raises: ConfigError: if a value has no meaning."""
        rate, decay, smoothing = self.learning_rate, self.weight_decay, self.label_smoothing
        weights, patience, size = self.class_weights, self.patience, self.batch_size
        for option, value, fits, expected in (
            ("--optimizer", self.optimizer, self.optimizer in OPTIMIZERS, " or ".join(OPTIMIZERS)),
            ("--schedule", self.schedule, self.schedule in SCHEDULES, " or ".join(SCHEDULES)),
            ("--class-weights", weights, _are_class_weights(weights),
             " or ".join(CLASS_WEIGHTS) + " or a tuple of numbers from 0"),
            ("--learning-rate", rate, _is_finite(rate) and rate > 0, "a number above 0"),
            ("--weight-decay", decay, _is_finite(decay) and decay >= 0, "a number from 0"),
            ("--label-smoothing", smoothing, _is_finite(smoothing) and 0 <= smoothing < 1,
             "a number from 0 to below 1"),
            ("--epochs", self.epochs, _is_count(self.epochs, 1), "a whole number from 1"),
            ("--patience", patience, patience is None or _is_count(patience, 1),
             "a whole number from 1"),
            ("--batch-size", size, size == "auto" or _is_count(size, 2),  # 1 has no variance
             "auto or a whole number from 2"),
        ):  # fmt: skip
            if not fits:
                raise ConfigError(option, expected=expected, found=repr(value))

    def as_json(self) -> dict[str, Any]:
        """Return the configuration as a JSON object."""
        return dataclasses.asdict(self)

    def rows_per_step(self, num_rows: int) -> int:
        """Return the batch size for ``num_rows`` training rows, ``auto`` worked out."""
        size = self.batch_size
        return size if isinstance(size, int) else auto_batch_size(num_rows)

    def learning_rate_at(self, epoch: int) -> float:
        """Return the step size of ``epoch``, counted from 1."""
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * (1 + math.cos(math.pi * (epoch - 1) / self.epochs)) / 2


@dataclass(frozen=True)
class FitResult:
    """A trained head.

    Attributes:
        state: The head's whole state dict (batch-norm statistics too) after the best epoch, on
            the CPU.
        history: One row per epoch: ``epoch`` (from 1), ``train_loss`` (the loss minimised, weights
            and smoothing included), ``valid_loss`` (plain cross-entropy), ``valid_accuracy``, one
            ``valid_recall_CLASS`` per class (None without rows of it), ``learning_rate``,
            ``seconds``. Without validation rows there are no ``valid_`` columns.
        best_epoch: The epoch with the lowest ``valid_loss``, the earliest on ties; without
            validation rows the last.
    """

    state: dict[str, Tensor]
    history: list[dict[str, Any]]
    best_epoch: int


def auto_batch_size(num_rows: int) -> int:
    """Return the power of two nearest to 1 % of the rows, at least 32 and at most 4096.

    32 up to about 4,500 rows: the steps per epoch, not the batch, then grow with the data.
    """
    return min(1 << max(round(math.log2(max(num_rows, 1) / 100)), 5), 4096)


def fit_head(  # noqa: PLR0917 (two configurations, two pairs of arrays)
    head_config: HeadConfig,
    training: TrainingConfig,
    train_features: npt.NDArray[Any],
    train_targets: npt.NDArray[Any],
    valid_features: npt.NDArray[Any] | None = None,
    valid_targets: npt.NDArray[Any] | None = None,
    *,
    seed: int,
    data_seed: int,
    device: torch.device,
    train_weights: npt.NDArray[Any] | None = None,
    classes: Sequence[str] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> FitResult:
    """Train a head and keep the epoch with the lowest cross-entropy on the validation rows.

    Without validation rows the last epoch is kept.

    The same as a script that calls ``torch.manual_seed(seed)``, builds the head and loops, with
    the rows in the order of ``torch.randperm`` under a generator of ``data_seed``. Of rows with
    views, one view is drawn per row and epoch, uniformly and under a generator of its own: the
    order of the rows is that of rows without. Bit for bit repeatable on one machine; on the CPU
    with more than 64 rows per step, also for one number of threads. The caller's random state is
    restored.

    Args:
        head_config: The shape of the head; D and C must be those of the arrays.
        training: Optimizer, epochs and the rest.
        train_features: (N, D) or (N, V, D) float; float64 trains in float64, anything else in
            float32.
        train_targets: (N,) integers from 0 to C - 1.
        valid_features: (M, D) float, or None.
        valid_targets: (M,) integers from 0 to C - 1, or None.
        seed: Decides the initial weights and dropout.
        data_seed: Decides the order of the rows and their views.
        device: Where the rows and the head live.
        train_weights: (N,) above 0, a weight per row, multiplied with that of its class: the loss
            of a batch is the mean of its rows' so weighed. None weighs all rows alike.
        classes: Names for the history's columns; None numbers them.
        on_epoch: Called with each row of the history as it is made.

    Raises:
        DataError: If the arrays do not fit each other or the head.
        ConfigError: If the loss is no longer a finite number, or class weights do not fit.
    """
    views = train_features.ndim == 3
    _check_rows(
        "training rows", train_features, train_targets, head_config, at_least=2, views=views
    )
    if train_weights is not None:
        _check_weights(train_weights, len(train_targets))
    if valid_features is not None and valid_targets is not None:
        _check_rows("validation rows", valid_features, valid_targets, head_config, at_least=1)
    names = [str(i) for i in range(head_config.num_classes)] if classes is None else list(classes)
    features = _to_tensor(train_features, device)
    held_out = None
    if valid_features is not None:
        held_out = _to_tensor(valid_features, device).to(features.dtype)
    draw = _Draw(features, data_seed)
    batch_size = training.rows_per_step(len(features))

    history: list[dict[str, Any]] = []
    state, best_epoch, lowest_epoch, lowest_loss = dict[str, Tensor](), 0, 0, math.inf
    with exact_fp32(), _own_random_state(seed, device), _few_threads(batch_size):
        head = build_head(head_config).to(device, features.dtype)
        weights = _class_weights(training, train_targets, head_config.num_classes, features)
        trainer = _Trainer(
            head, training, features, train_targets, class_weights=weights,
            row_weights=train_weights,
        )  # fmt: skip
        for epoch in range(1, training.epochs + 1):
            start = time.perf_counter()
            rate = training.learning_rate_at(epoch)
            batches = draw.epoch(batch_size)
            row: dict[str, Any] = {"epoch": epoch, "train_loss": trainer.epoch(batches, rate)}
            if held_out is not None and valid_targets is not None:
                row |= _validate(head, held_out, valid_targets, names)
            row |= {"learning_rate": rate, "seconds": time.perf_counter() - start}
            loss = row.get("valid_loss", row["train_loss"])
            if not math.isfinite(row["train_loss"] + loss):
                found, hint = f"none in epoch {epoch}", "Lower --learning-rate"
                raise ConfigError("training", expected="a finite loss", found=found, hint=hint)
            history.append(row)
            if loss < lowest_loss:
                lowest_epoch, lowest_loss = epoch, loss
            if held_out is None or epoch == lowest_epoch:
                best_epoch = epoch
                state = {name: value.detach().clone() for name, value in head.state_dict().items()}
            if on_epoch is not None:
                on_epoch(row)
            if training.patience is not None and epoch - lowest_epoch >= training.patience:
                break
    return FitResult({name: value.cpu() for name, value in state.items()}, history, best_epoch)


def forward_head(
    head: nn.Module, features: npt.NDArray[Any], device: torch.device
) -> npt.NDArray[Any]:
    """Return logits (N, C) of features (N, D) in the head's dtype, a few thousand rows at a time.

    Leaves the head in eval mode on ``device``.
    """
    head = head.to(device).eval()
    dtype = next(head.parameters()).dtype
    logits = [
        _logits(head, _to_tensor(features[i : i + _FORWARD_ROWS], device).to(dtype)).numpy()
        for i in range(0, max(len(features), 1), _FORWARD_ROWS)
    ]
    return np.concatenate(logits)


def predict_probs(
    head: nn.Module, features: npt.NDArray[Any], device: torch.device
) -> npt.NDArray[np.float64]:
    """Return probs (N, C) float64, the softmax of ``forward_head``.

    float64, so that a very sure head still ranks its rows instead of calling them all 1.
    """
    logits = torch.from_numpy(forward_head(head, features, device))
    return np.asarray(logits.double().softmax(1))


class _Trainer:
    """A head, its training rows, its loss and its optimizer."""

    def __init__(
        self,
        head: nn.Module,
        training: TrainingConfig,
        features: Tensor,
        targets: npt.NDArray[Any],
        *,
        class_weights: Tensor | None,
        row_weights: npt.NDArray[Any] | None,
    ) -> None:
        self._head, self._features = head, features
        self._targets = torch.from_numpy(targets.astype(np.int64)).to(features.device)
        self._class_weights, self._row_weights = class_weights, None
        if row_weights is not None:
            self._row_weights = torch.from_numpy(row_weights).to(features)
        self._label_smoothing = training.label_smoothing
        self._optimizer = FusedOptimizer(
            training.optimizer, training.weight_decay, list(head.parameters())
        )

    def epoch(self, batches: list[_Batch], rate: float) -> float:
        """Take one step per batch; return the mean of the batches' losses, weighed by rows."""
        self._head.train()
        total = self._features.new_zeros(())
        for batch in batches:
            rows = batch[0]
            loss = self._loss(self._head(self._features[batch]), rows)
            self._optimizer.step(loss, rate)
            total += loss.detach() * len(rows)
        return total.item() / sum(len(batch[0]) for batch in batches)

    def _loss(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Return the mean cross-entropy, weighed by the rows' weights times their classes'."""
        targets = self._targets[rows]
        loss = functional.cross_entropy(
            logits, targets, self._class_weights, label_smoothing=self._label_smoothing,
            reduction="mean" if self._row_weights is None else "none",
        )  # fmt: skip
        if self._row_weights is None:
            return loss
        weights = self._row_weights[rows]
        total = weights if self._class_weights is None else weights * self._class_weights[targets]
        return (loss * weights).sum() / total.sum()


class _Draw:
    """What an epoch consists of: all rows in a new order and, of rows with views, one view each."""

    def __init__(self, features: Tensor, seed: int) -> None:
        self._features = features
        self._order = torch.Generator().manual_seed(seed)
        self._views = torch.Generator().manual_seed(seed ^ _VIEWS_SEED)

    def epoch(self, batch_size: int) -> list[_Batch]:
        """Return the batches of the next epoch."""
        num_rows, device = len(self._features), self._features.device
        rows = torch.randperm(num_rows, generator=self._order).to(device)
        parts = [torch.split(rows, batch_size)]
        if self._features.ndim == 3:
            shape, num_views = (num_rows,), self._features.shape[1]
            views = torch.randint(num_views, shape, generator=self._views).to(device)
            parts.append(torch.split(views, batch_size))
        batches: list[_Batch] = list(zip(*parts, strict=True))
        if len(batches[-1][0]) == 1:  # batch norm cannot train on one row (pytorch#4534)
            batches.pop()
        return batches


def _validate(
    head: nn.Module, features: Tensor, targets: npt.NDArray[Any], names: Sequence[str]
) -> dict[str, Any]:
    """Return the validation columns of a history row."""
    head.eval()
    logits = torch.cat(
        [_logits(head, rows) for rows in torch.split(features, _FORWARD_ROWS)]
    ).double()
    loss = functional.cross_entropy(logits, torch.from_numpy(targets.astype(np.int64))).item()
    right = logits.argmax(1).numpy() == targets
    recalls = {
        f"valid_recall_{name}": right[targets == i].mean().item() if (targets == i).any() else None
        for i, name in enumerate(names)
    }
    return {"valid_loss": loss, "valid_accuracy": right.mean().item(), **recalls}


@torch.inference_mode()
def _logits(head: nn.Module, features: Tensor) -> Tensor:
    logits: Tensor = head(features).cpu()
    return logits


@contextlib.contextmanager
def _own_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the CPU's and the device's generator; put the caller's states back afterwards.

    ``torch.manual_seed`` would also move the generators of devices that are not in use here.
    """
    gpus: list[int] = []
    if device.type == "cuda":
        gpus = [torch.cuda.current_device() if device.index is None else device.index]
    mps_state = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        with torch.random.fork_rng(devices=gpus):
            torch.default_generator.manual_seed(seed)
            if gpus:
                torch.cuda.default_generators[gpus[0]].manual_seed(seed)
            if mps_state is not None:
                torch.mps.manual_seed(seed)
            yield
    finally:
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)


@contextlib.contextmanager
def _few_threads(batch_size: int) -> Iterator[None]:
    """Take one thread for small batches, then give the caller its number back.

    At 32 rows a second thread gains at most a fifth, and when anything else wants the cores its
    barriers cost all: ten epochs of 200 rows took 0.4 s with one, 3 to 9 s with two on two cores.
    """
    before = torch.get_num_threads()
    if batch_size <= _ONE_THREAD_ROWS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _class_weights(
    training: TrainingConfig, targets: npt.NDArray[Any], num_classes: int, like: Tensor
) -> Tensor | None:
    if training.class_weights == "none":
        return None
    if isinstance(training.class_weights, tuple):
        if (found := len(training.class_weights)) != num_classes:
            raise ConfigError("--class-weights", expected=f"{num_classes} numbers", found=found)
        return like.new_tensor(training.class_weights)
    counts = np.maximum(np.bincount(targets, minlength=num_classes), 1)
    return torch.from_numpy(len(targets) / (num_classes * counts)).to(like.dtype).to(like.device)


def _to_tensor(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    dtype = np.float64 if array.dtype == np.float64 else np.float32
    if array.dtype != dtype or not array.flags.writeable:  # a tensor may not share a mapped file
        array = array.astype(dtype)
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _check_rows(
    what: str,
    features: npt.NDArray[Any],
    targets: npt.NDArray[Any],
    head: HeadConfig,
    *,
    at_least: int,
    views: bool = False,
) -> None:
    found, top = f"features {features.shape}, targets {targets.shape}", head.num_classes - 1
    shape = (*features.shape[:1], *features.shape[2:]) if views else features.shape
    if shape != (len(targets), head.num_features) or targets.dtype.kind not in "iu":
        kind = f"(N, V, {head.num_features})" if views else f"(N, {head.num_features})"
        wanted = f"features {kind} and targets (N,) of whole numbers"
        raise DataError(what, expected=wanted, found=found)
    if 0 in features.shape[1:]:
        raise DataError(what, expected="at least one view", found=found)
    if len(targets) < at_least:
        raise DataError(what, expected=f"at least {at_least}", found=len(targets))
    if targets.min() < 0 or targets.max() > top:
        found = f"{targets.min()} to {targets.max()}"
        raise DataError(what, expected=f"targets from 0 to {top}", found=found)


def _check_weights(weights: npt.NDArray[Any], num_rows: int) -> None:
    if weights.shape != (num_rows,) or not (np.isfinite(weights) & (weights > 0)).all():
        found = f"{weights.shape}, {weights.min(initial=np.inf)} to {weights.max(initial=-np.inf)}"
        wanted = f"({num_rows},) finite numbers above 0"
        raise DataError("weights of training rows", expected=wanted, found=found)


def _are_class_weights(value: object) -> bool:
    if isinstance(value, tuple):
        return all(_is_finite(weight) and weight >= 0 for weight in value)
    return value in CLASS_WEIGHTS


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def _is_count(value: object, at_least: int) -> bool:
    return type(value) is int and value >= at_least
