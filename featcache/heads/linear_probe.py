"""The linear probe: multinomial logistic regression with L2, solved over a path of strengths.

Minimised for each strength s, over the weights W (C, D) and biases of the last layer, is

    mean loss of the training rows + s / 2 * sum of W ** 2

with the loss that other heads are trained on (weights of rows and classes, label smoothing),
without dropout, and on rows standardised as the head's batch norm will: mean and variance of the
training rows become its running statistics. What comes out is an ordinary head ``BatchNorm1d
Dropout Linear``. In scikit-learn's terms C = 1 / (s N); with two classes, of which it has one row
of weights, 2 / (s N).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featcache.errors import ConfigError
from featcache.heads.config import FitResult, HeadJob, TrainingConfig
from featcache.heads.head import state_layout
from featcache.heads.loss import want_classes, weigh_classes
from featcache.heads.softmax_regression import SoftmaxRegression
from featcache.heads.streaming import StoredFeatures
from featcache.heads.trainer import Rows, judge_logits
from featcache.runtime import available_memory

STRENGTHS = tuple(10 ** (2 - number / 8) for number in range(65))
"""The path where there are rows to choose by, the strongest first, at CLIP's resolution: 8 a decade
(Radford et al. 2021, appendix A.3). From 100, where little more than the classes' shares is left,
to 1e-6, where the training rows are fitted whatever they are: both of the mean loss on standardised
rows, so they need not follow the number of rows as CLIP's 1e-6 to 1e6 of the sum do."""

_BLOCK_STRENGTHS, _BLOCK_BYTES = 16, 1 << 30
_EPS = 1e-5  # torch.nn.BatchNorm1d's


def fit_linear_probe(job: HeadJob, rows: Rows, tell: Callable[[dict[str, Any]], bool]) -> FitResult:
    """Solve a linear head and keep the strength with the lowest cross-entropy on the valid rows.

    Nothing is drawn at random: the seeds do not matter. Of rows with views each view counts, for
    its share of the row.

    Args:
        job: A head without hidden layers. Of its training, ``weight_decay``, ``class_weights`` and
            ``label_smoothing`` count.
        rows: To solve for, and to choose by.
        tell: Called with each row of the history; where it answers True, the path ends there.
    """
    if rows.targets.ndim == 2:
        raise ConfigError(
            "--optimizer lbfgs", expected="one class per row", found="several labels",
            hint="Take another optimizer",
        )  # fmt: skip
    features = _in_memory(rows.features, rows.device)
    scaling = _Scaling.of(features)
    history, lowest, best, state = list[dict[str, Any]](), math.inf, 0, dict[str, Tensor]()
    for row, weight, bias in _walk(job, rows, features, scaling):
        history.append(row)
        loss = row.get("valid_loss", row["train_loss"])
        if not math.isfinite(row["train_loss"] + loss):
            return FitResult(state, history[:-1], best, diverged_in=len(history))
        if loss < lowest:
            lowest, best, state = loss, len(history), _state(job, scaling, weight, bias)
        if tell(row):
            break
    return FitResult(state, history, best)


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
class _Scaling:
    """What the batch norm of the head will do: (x - mean) / sqrt(variance + eps).

    In the dtype of the head, so that what is solved is what will be computed.
    """

    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> _Scaling:
        variance, mean = torch.var_mean(features.flatten(0, -2).double(), 0, correction=0)
        return cls(mean.to(features.dtype), variance.to(features.dtype))

    def apply(self, features: Tensor) -> Tensor:
        """Return rows (N, D) in float64, of rows with views (N * V, D)."""
        rows = features.flatten(0, -2).double() - self.mean
        return rows.mul_(torch.rsqrt(self.variance.double() + _EPS))


def _walk(
    job: HeadJob, rows: Rows, features: Tensor, scaling: _Scaling
) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
    """Yield a row of history, weights (C, D) and biases (C,) for each strength.

    Blocks of strengths are solved at once, each from where the one before ended. On one core, 3,200
    x 1280, all 65 of them: blocks of 65, 16, 4 and 1 took 6.9, 6.0, 12 and 5.2 s with 2 classes,
    31, 16, 16 and (scipy's L-BFGS-B on the same terms) 32 s with 10.
    """
    dtype, training = features.dtype, job.training
    problem = SoftmaxRegression(scaling.apply(features), _wanted(job, rows).to(features.device))
    valid = rows.valid_features
    if valid is not None:
        valid = scaling.apply(_in_memory(valid, rows.device))
    strengths = choose_strengths(training, len(rows.targets), has_valid=valid is not None)
    size = max(1, min(_BLOCK_STRENGTHS, _BLOCK_BYTES // problem.bytes_per_strength))
    for start in range(0, len(strengths), size):
        began = time.perf_counter()
        block = problem.solve(strengths[start : start + size])
        seconds = (time.perf_counter() - began) / len(block)
        for solution in block:
            row: dict[str, Any] = {"strength": solution.strength, "train_loss": solution.loss}
            weight, bias = solution.weight.to(dtype), solution.bias.to(dtype)
            if valid is not None and rows.valid_targets is not None:
                logits = torch.addmm(bias.double(), valid, weight.double().T).cpu()
                row |= judge_logits(logits, rows.valid_targets, rows.names)
            row |= {"num_iterations": solution.num_iterations, "converged": solution.converged}
            yield row | {"seconds": seconds}, weight, bias


def _wanted(job: HeadJob, rows: Rows) -> Tensor:
    """Return (N, C), with views (N * V, C), by what each class' -log(p) counts in the mean loss."""
    kind, smoothing = job.training.class_weights, job.training.label_smoothing
    targets, row_weights = rows.targets.cpu(), rows.weights
    if row_weights is not None:
        row_weights = row_weights.cpu().double()
    class_weights = weigh_classes(kind, targets, job.head.num_classes, torch.float64)
    wanted = want_classes(targets, class_weights, smoothing, row_weights)
    num_views = rows.features.shape[1] if rows.features.ndim == 3 else 1
    return wanted.repeat_interleave(num_views, 0) / num_views


def _state(job: HeadJob, scaling: _Scaling, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """Return the state dict of the head, on the CPU."""
    layout = state_layout(job.head)
    norm, linear = (name.rsplit(".", 1)[0] for name in (next(iter(layout)), next(reversed(layout))))
    values = {
        f"{norm}.weight": torch.ones_like(scaling.mean),
        f"{norm}.bias": torch.zeros_like(scaling.mean),
        f"{norm}.running_mean": scaling.mean,
        f"{norm}.running_var": scaling.variance,
        f"{norm}.num_batches_tracked": torch.tensor(0),
        f"{linear}.weight": weight,
        f"{linear}.bias": bias,
    }
    return {name: values[name].cpu() for name in layout}


def _in_memory(features: Tensor | StoredFeatures, device: torch.device) -> Tensor:
    """Return features where they can be computed with in float64.

    Raises:
        ConfigError: If memory has no room for them, twice: as they are and turned.
    """
    if device.type == "mps":  # has no float64
        device = torch.device("cpu")
    wanted, found = 16 * math.prod(features.shape), available_memory(device)
    if isinstance(features, Tensor) and wanted <= found:
        return features.to(device)
    raise ConfigError(
        "--optimizer lbfgs", expected=f"{wanted / 1e9:.3g} GB of memory, for all rows in float64",
        found=f"{found / 1e9:.3g} GB", hint="Take adam: it needs a part of the rows at a time",
    )  # fmt: skip
