"""What a head is trained by, and what comes of it."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import ConfigError
from featcache.heads.head import HeadConfig, to_python

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("constant", "cosine")
CLASS_WEIGHTS = ("none", "balanced")
LBFGS = "lbfgs"
"""The optimizer of heads without hidden layers that solves for them: module ``linear_probe``."""

USED_BY_LBFGS = ("optimizer", "weight_decay", "class_weights", "label_smoothing")
"""The only fields of ``TrainingConfig`` that L-BFGS reads."""


STRENGTHS = tuple(10 ** (2 - number / 8) for number in range(65))
"""L-BFGS' path of regularisation where there are validation rows, the strongest first, at CLIP's
resolution: 8 a decade (Radford et al. 2021, appendix A.3). From 100, where little more than the
classes' shares is left, to 1e-6, where the training rows are fitted whatever they are: both of the
mean loss on standardised rows, so they need not follow the number of rows as CLIP's do."""

MAX_ITERATIONS = 1000
"""L-BFGS' iteration limit per block of strengths, CLIP's. Reached only for linearly separable
classes with almost no regularisation."""


@dataclass(frozen=True)
class TrainingConfig:
    """How a head is trained. The defaults are the tutorial's.

    Attributes:
        learning_rate: Step size at the first epoch after the warm-up.
        weight_decay: Added to the gradient (adam, sgd) or taken off the weights (adamw). With
            lbfgs, the one strength of regularisation; 0 chooses one from a path.
        optimizer: ``adam``, ``adamw`` (betas 0.9 and 0.999) or ``sgd`` (momentum 0.9); ``lbfgs``
            for heads without hidden layers, which has no use for learning rate, schedule, batch
            size, epochs, patience and warm-up.
        schedule: ``constant``, or ``cosine``: from epoch to epoch down half a cosine towards 0.
        batch_size: Rows per step, two or more, or ``auto`` (see ``auto_batch_size``).
        epochs: The most passes over the rows.
        patience: Stop after this many epochs without a lower validation loss (without validation
            rows: training loss); None never does.
        class_weights: In the loss: ``none``, ``balanced`` (N / (C * n) for n of N rows) or a
            number per class (a tuple, list or array; kept as a tuple). For multilabel caches, the
            weight of a class' positives: ``balanced`` is its known negatives over its known
            positives (1 where it has none of either).
        label_smoothing: Share in [0, 1) of each target spread evenly over all classes; for
            multilabel caches, over yes and no.
        warmup: Epochs, fewer than all, in which the step size rises from step to step in a line
            from 0; the cosine begins after them.
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
    warmup: int = 0

    def __post_init__(self) -> None:
        """Raises: ConfigError: if a value has no meaning."""
        for field in dataclasses.fields(self):
            value = to_python(getattr(self, field.name))
            if field.name == "class_weights" and isinstance(value, list | tuple | np.ndarray):
                value = tuple(map(to_python, value))
            object.__setattr__(self, field.name, value)
        rate, decay, smoothing = self.learning_rate, self.weight_decay, self.label_smoothing
        weights, patience, size = self.class_weights, self.patience, self.batch_size
        optimizers = (*OPTIMIZERS, LBFGS)
        for option, value, fits, expected in (
            ("--optimizer", self.optimizer, self.optimizer in optimizers, " or ".join(optimizers)),
            ("--schedule", self.schedule, self.schedule in SCHEDULES, " or ".join(SCHEDULES)),
            ("--class-weights", weights, _are_class_weights(weights),
             " or ".join(CLASS_WEIGHTS) + " or numbers from 0"),
            ("--learning-rate", rate, _is_finite(rate) and rate > 0, "a number above 0"),
            ("--weight-decay", decay, _is_finite(decay) and decay >= 0, "a number from 0"),
            ("--label-smoothing", smoothing, _is_finite(smoothing) and 0 <= smoothing < 1,
             "a number from 0 to below 1"),
            ("--epochs", self.epochs, _is_count(self.epochs, 1), "a whole number from 1"),
            ("--patience", patience, patience is None or _is_count(patience, 1),
             "a whole number from 1"),
            ("--batch-size", size, size == "auto" or _is_count(size, 2),  # 1 has no variance
             "auto or a whole number from 2"),
            ("--warmup", self.warmup, _is_count(self.warmup, 0), "a whole number from 0"),
            ("--warmup", self.warmup, self.warmup < self.epochs,
             f"fewer than the {self.epochs} epochs"),
        ):  # fmt: skip
            if not fits:
                raise ConfigError(option, expected=expected, found=repr(value))

    def as_json(self) -> dict[str, Any]:
        """Return the configuration as a JSON object, without what its optimizer does not use."""
        facts = dataclasses.asdict(self)
        return {k: facts[k] for k in USED_BY_LBFGS} if self.optimizer == LBFGS else facts

    def rows_per_step(self, num_rows: int) -> int:
        """Return the batch size for ``num_rows`` training rows, ``auto`` worked out."""
        size = self.batch_size
        return size if isinstance(size, int) else auto_batch_size(num_rows)

    def steps_per_epoch(self, num_rows: int) -> int:
        """Return the batches of an epoch; a last one of a single row is left out."""
        size = self.rows_per_step(num_rows)
        return num_rows // size + (num_rows % size > 1)

    def learning_rate_at(self, epoch: int, share: float = 1.0) -> float:
        """Return the step size of ``epoch``, counted from 1.

        Args:
            epoch: Which.
            share: How far it has come when the step is taken, above 0: matters in the warm-up.
        """
        if epoch <= self.warmup:
            return self.learning_rate * (epoch - 1 + share) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        way = (epoch - 1 - self.warmup) / (self.epochs - self.warmup)
        return self.learning_rate * (1 + math.cos(math.pi * way)) / 2


@dataclass(frozen=True)
class FitResult:
    """A trained head.

    Attributes:
        state: The head's whole state dict (batch-norm statistics too) after the best epoch, as
            arrays by the names of its ``nn.Sequential``.
        history: One row per epoch: ``epoch`` (from 1), ``train_loss`` (the loss minimised, weights
            and smoothing included), ``valid_loss`` (plain cross-entropy), ``valid_accuracy``, one
            ``valid_recall_CLASS`` per class (None without rows of it), ``learning_rate``,
            ``seconds``. Without validation rows there are no ``valid_`` columns. For multilabel
            caches, loss and accuracy are means over the known targets; above 0.5 means yes. With
            lbfgs there is one row per strength of regularisation, the strongest first:
            ``strength`` in place of ``epoch``, ``train_loss`` without the regularisation, and
            ``num_iterations`` and ``converged`` in place of ``learning_rate``.
        best_epoch: The epoch with the lowest ``valid_loss``, the earliest on ties; without
            validation rows the last. With lbfgs the number of the strength, likewise.
        diverged_in: The epoch in which the loss was no finite number; it is not in the history.
    """

    state: dict[str, npt.NDArray[Any]]
    history: list[dict[str, Any]]
    best_epoch: int
    diverged_in: int | None = None


def auto_batch_size(num_rows: int) -> int:
    """Return the power of two nearest to 1 % of the rows, at least 32 and at most 4096.

    32 up to about 4,500 rows: the steps per epoch, not the batch, then grow with the data.
    """
    return min(1 << max(round(math.log2(max(num_rows, 1) / 100)), 5), 4096)


def choose_strengths(
    training: TrainingConfig, num_rows: int, *, has_valid: bool
) -> tuple[float, ...]:
    """Return the strengths that are solved for, the strongest first.

    The weight decay alone where there is one; else ``STRENGTHS`` where there are rows to choose by,
    and 1 / N where there are none: scikit-learn's default, C = 1.
    """
    if training.weight_decay:
        return (training.weight_decay,)
    return STRENGTHS if has_valid else (1 / num_rows,)


@dataclass(frozen=True)
class HeadJob:
    """A head to train.

    Attributes:
        head: Its shape; D and C must be those of the arrays.
        training: Optimizer, epochs and the rest.
        seed: Decides the initial weights and dropout.
    """

    head: HeadConfig
    training: TrainingConfig
    seed: int

    def __post_init__(self) -> None:
        """Raises: ConfigError: if the optimizer is not one for such a head."""
        object.__setattr__(self, "seed", to_python(self.seed))
        if self.training.optimizer == LBFGS and self.head.hidden:
            hidden = ",".join(map(str, self.head.hidden))
            raise ConfigError(
                "--optimizer", expected=" or ".join(OPTIMIZERS) + f" for hidden layers {hidden}",
                found=LBFGS, hint="lbfgs solves for linear heads: --hidden none",
            )  # fmt: skip


def _are_class_weights(value: object) -> bool:
    if isinstance(value, tuple):
        return all(_is_finite(weight) and weight >= 0 for weight in value)
    return value in CLASS_WEIGHTS


def _is_finite(value: object) -> bool:
    if not isinstance(value, int | float) or type(value) is bool:
        return False
    return abs(value) <= sys.float_info.max  # an int may be too large for math.isfinite


def _is_count(value: object, at_least: int) -> bool:
    return type(value) is int and value >= at_least


def check_seed(option: str, seed: object) -> int:
    """Return a seed as a Python int.

    Raises:
        ConfigError: If it is no whole number from 0 to below 2**63, which torch's generators take.
    """
    seed = to_python(seed)
    if type(seed) is not int or not 0 <= seed < 1 << 63:
        raise ConfigError(option, expected="a whole number from 0", found=repr(seed))
    return seed


def check_valid_fraction(fraction: object) -> float | None:
    """Return the share to hold out as a Python float.

    Raises:
        ConfigError: If it is neither None nor a number between 0 and 1.
    """
    fraction = to_python(fraction)
    if fraction is None or (isinstance(fraction, float) and 0 < fraction < 1):
        return fraction
    raise ConfigError("--valid-fraction", expected="a number between 0 and 1", found=repr(fraction))


def refuse_unused(training: TrainingConfig) -> None:
    """Refuse options that L-BFGS does not use: who gives them expects them to do something.

    Raises:
        ConfigError: If one of them is not at its default.
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
