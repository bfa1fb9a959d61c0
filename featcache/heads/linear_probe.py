"""The linear probe: multinomial logistic regression with L2, solved over a path of strengths.

Minimised for each strength s, over the weights W (C, D) and biases of the last layer, is

    mean loss of the training rows + s / 2 * sum of W ** 2

with the loss that other heads are trained on (weights of rows and classes, label smoothing),
without dropout, and on rows standardised exactly, whatever their scale: mean and variance of the
training rows become the running statistics of the head's batch norm, whose weights make up for its
eps (module ``scaling``). What comes out is an ordinary head ``BatchNorm1d Dropout Linear``. In
scikit-learn's terms C = 1 / (s N); with two classes, of which it has one row of weights, 2 / (s N).

The solver is a batched L-BFGS for several strengths at once. Three changes of variables, none of
which changes the solution, make it quick. Logits matter only by their differences, so for C classes
C - 1 orthonormal contrasts are solved for: at the optimum the weights of the classes sum to 0
anyway. Features are rotated to the axes of their second moments, and with fewer rows than features
only the span of the rows is kept, as no weights lie outside of it. On those axes the Hessian is
nowhere above second moment / 2 + strength (Boehning 1992), which is what L-BFGS starts from: with
warm starts 19 iterations a strength where scikit-learn's takes 94 (3,200 x 1280, two classes, 65
strengths), and a quarter of its time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from featcache.errors import ConfigError
from featcache.heads.batches import Features, TrainingData
from featcache.heads.config import MAX_ITERATIONS, FitResult, HeadJob, choose_strengths
from featcache.heads.head import BATCH_NORM_EPS, state_layout
from featcache.heads.loss import class_weights, target_weights, validation_columns
from featcache.heads.scaling import ColumnScaling
from featcache.heads.streaming import StoredFeatures
from featcache.memory import available_memory
from featcache.threads import stop_if_asked

_BLOCK_STRENGTHS, _BLOCK_BYTES = 8, 1 << 30

Floats: TypeAlias = npt.NDArray[np.float64]


def fit_linear_probe(
    job: HeadJob, data: TrainingData, tell: Callable[[dict[str, Any]], bool]
) -> FitResult:
    """Solve a linear head and keep the strength with the lowest cross-entropy on the valid rows.

    On the CPU, whatever the device of other heads. The head that is returned is one of scaled
    features. Nothing is drawn at random: the seeds do not matter. Of rows with views each view
    counts, for its share of the row.

    Args:
        job: A head without hidden layers. Of its training, ``weight_decay``, ``class_weights`` and
            ``label_smoothing`` count.
        data: Rows to solve for, and validation rows to choose the strength by; with a scaling.
        tell: Called with each row of the history; where it answers True, the path ends there.
    """
    if data.targets.ndim == 2:
        raise ConfigError(
            "--optimizer lbfgs", expected="one class per row", found="several labels",
            hint="Take another optimizer",
        )  # fmt: skip
    features = _in_memory(data.features)
    history, lowest, best = list[dict[str, Any]](), math.inf, 0
    state = dict[str, npt.NDArray[Any]]()
    for row, weight, bias in _walk(job, data, features):
        history.append(row)
        loss = row.get("valid_loss", row["train_loss"])
        if not math.isfinite(row["train_loss"] + loss):
            return FitResult(state, history[:-1], best, diverged_in=len(history))
        if loss < lowest:
            lowest, best, state = loss, len(history), _state(job, weight, bias)
        if tell(row):
            break
    return FitResult(state, history, best)


def _standardise(features: npt.NDArray[Any], scaling: ColumnScaling) -> Floats:
    """Return rows (N, D) in float64, of rows with views (N * V, D)."""
    rows: Floats = features.reshape(-1, features.shape[-1]).astype(np.float64)
    rows -= scaling.mean
    rows *= scaling.inverse
    return rows


def _walk(
    job: HeadJob, data: TrainingData, features: npt.NDArray[Any]
) -> Iterator[tuple[dict[str, Any], npt.NDArray[Any], npt.NDArray[Any]]]:
    """Yield a row of history, weights (C, D) and biases (C,) for each strength.

    Blocks of strengths are solved at once, each from where the one before ended. On one core, 3,200
    x 1280, all 65 of them: blocks of 16 and 8 took 2.4 and 2.4 s with 2 classes, 19 and 16 s with
    10 (one at a time, by scipy's L-BFGS-B on the same terms, twice as long); 200 rows 0.12 and 0.25
    s. Of 8, as a path that is given up early ends earlier: ``train`` on 200 rows took 1.4 instead
    of 1.9 s.
    """
    dtype, weights = features.dtype, _weigh(job, data)
    assert data.scaling is not None
    problem = SoftmaxRegression(_standardise(features, data.scaling), weights)
    valid = None
    if data.valid_features is not None:
        valid = _standardise(_in_memory(data.valid_features), data.scaling)
    strengths = choose_strengths(job.training, len(data.targets), has_valid=valid is not None)
    size = max(1, min(_BLOCK_STRENGTHS, _BLOCK_BYTES // problem.bytes_per_strength))
    for start in range(0, len(strengths), size):
        began = time.perf_counter()
        block = problem.solve(strengths[start : start + size])
        seconds = (time.perf_counter() - began) / len(block)
        for solution in block:
            row: dict[str, Any] = {"strength": solution.strength, "train_loss": solution.loss}
            weight, bias = solution.weight.astype(dtype), solution.bias.astype(dtype)
            if valid is not None and data.valid_targets is not None:
                logits = valid @ weight.T.astype(np.float64) + bias.astype(np.float64)
                row |= validation_columns(logits, data.valid_targets, data.names)
            row |= {"num_iterations": solution.num_iterations, "converged": solution.converged}
            yield row | {"seconds": seconds}, weight, bias


def _weigh(job: HeadJob, data: TrainingData) -> npt.NDArray[np.float64]:
    """Return the weight (N, C), with views (N * V, C), of each -log p in the mean loss."""
    kind, smoothing = job.training.class_weights, job.training.label_smoothing
    row_weights = None if data.row_weights is None else data.row_weights.astype(np.float64)
    of_classes = class_weights(kind, data.targets, job.head.num_classes, np.float64)
    weights, denominators = target_weights(data.targets, of_classes, smoothing, row_weights)
    num_views = data.features.shape[1] if data.features.ndim == 3 else 1
    return np.repeat(weights / denominators.sum(), num_views, 0) / num_views


def _state(
    job: HeadJob, weight: npt.NDArray[Any], bias: npt.NDArray[Any]
) -> dict[str, npt.NDArray[Any]]:
    """Return the state dict of the head, of standardised features: its batch norm does nothing."""
    *norm, weights_name, bias_name = state_layout(job.head)
    ones, zeros = np.ones(job.head.num_features), np.zeros(job.head.num_features)
    values = (
        math.sqrt(1 + BATCH_NORM_EPS) * ones, zeros.astype(weight.dtype), zeros, ones,
        np.array(0, np.int64),
    )  # fmt: skip
    return dict(zip(norm, values, strict=True)) | {weights_name: weight, bias_name: bias}


def _in_memory(features: Features) -> npt.NDArray[Any]:
    """Return features where they can be computed with in float64.

    Raises:
        ConfigError: If memory has no room for them, twice: as they are and turned.
    """
    wanted, found = 16 * math.prod(features.shape), available_memory()
    if not isinstance(features, StoredFeatures) and wanted <= found:
        return features
    raise ConfigError(
        "--optimizer lbfgs", expected=f"{wanted / 1e9:.3g} GB of memory, for all rows in float64",
        found=f"{found / 1e9:.3g} GB", hint="Take adam: it needs a part of the rows at a time",
    )  # fmt: skip


_TOLERANCE = 1e-9  # of the objective

_MEMORY = 20  # steps that L-BFGS remembers

_SUFFICIENT, _HALVINGS = 1e-4, 40

_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Solution:
    """The optimum for one strength.

    Attributes:
        strength: Of the regularisation.
        weight: (C, D) float64.
        bias: (C,) float64.
        loss: Without the regularisation.
        num_iterations: What it took.
        converged: Whether the objective is within 1e-9 of its minimum. Else it took too long, as it
            does where classes are separable and the strength is below 1e-5: up to 2e-8 above it.
    """

    strength: float
    weight: Floats
    bias: Floats
    loss: float
    num_iterations: int
    converged: bool


class SoftmaxRegression:
    """Weighted rows; ``solve`` goes on from its last solution.

    Args:
        rows: (N, D) float64, of mean 0 or nearly so.
        weights: (N, C) float64, of the negative log-probability of each class in the loss.
    """

    def __init__(self, rows: Floats, weights: Floats) -> None:
        self._weights, self._row_weights = np.ascontiguousarray(weights.T), weights.sum(1)
        basis = None
        if len(rows) < rows.shape[1]:
            basis, _ = np.linalg.qr(rows.T)
            rows = rows @ basis
        moments, axes = np.linalg.eigh(rows.T @ (rows * self._row_weights[:, None]))
        self._basis = axes if basis is None else basis @ axes
        ones = np.ones((len(rows), 1))
        self._rows = np.concatenate([rows @ axes, ones], 1)  # the last column is the bias's
        self._moments = np.append(moments.clip(min=0), 1.0)
        self._contrasts = _contrasts(weights.shape[1])
        self._params = np.zeros((weights.shape[1] - 1, len(self._moments)))

    @property
    def bytes_per_strength(self) -> int:
        """About the memory that ``solve`` takes for each strength."""
        return 8 * (6 * self._weights.size + (2 * _MEMORY + 8) * self._params.size)

    def solve(self, strengths: Sequence[float]) -> list[Solution]:
        """Solve for some strengths at once, each from the last solution found."""
        descent = _Descent(self, np.tile(self._params, (len(strengths), 1, 1)), strengths)
        for _ in range(MAX_ITERATIONS):
            stop_if_asked()
            if not descent.advance():
                break
        self._params = descent.params[-1]
        weights = self._contrasts @ descent.params
        converged, losses = (~descent.active()).tolist(), descent.losses.tolist()
        return [
            Solution(
                strengths[i], weights[i, :, :-1] @ self._basis.T, weights[i, :, -1], losses[i],
                int(descent.num_iterations[i]), converged[i],
            )
            for i in range(len(strengths))
        ]  # fmt: skip

    def metric(self, decay: Floats) -> Floats:
        """Return 1 / the bound of the Hessian's diagonal, for decay (L, 1, P)."""
        bound = self._moments / 2 + decay
        return 1 / bound.clip(min=_EPS * self._moments.max())

    def project(self, params: Floats) -> Floats:
        """Return the contrasts (L, C - 1, N) of the rows under parameters (L, C - 1, P)."""
        flat: Floats = params.reshape(-1, params.shape[2]) @ self._rows.T
        return flat.reshape(*params.shape[:2], -1)

    def losses(self, points: Floats) -> Floats:
        """Return the loss (L,) of contrasts (L, C - 1, N)."""
        logits = self._contrasts @ points
        of_targets = np.einsum("lcn,cn->l", logits, self._weights)
        highest = logits.max(1, keepdims=True)
        logits -= highest
        sums = np.log(np.exp(logits, out=logits).sum(1)) + highest[:, 0]
        losses: Floats = sums @ self._row_weights - of_targets
        return losses

    def grads(self, points: Floats) -> Floats:
        """Return the gradient (L, C - 1, P) of the loss by the parameters, from the contrasts."""
        errors = self._contrasts @ points
        errors -= errors.max(1, keepdims=True)
        np.exp(errors, out=errors)
        errors *= self._row_weights / errors.sum(1, keepdims=True)
        errors -= self._weights
        of_points = self._contrasts.T @ errors
        flat: Floats = of_points.reshape(-1, of_points.shape[2]) @ self._rows
        return flat.reshape(*of_points.shape[:2], -1)


class _Descent:
    """Some strengths on the way to their minima, by L-BFGS with a backtracking line search.

    A strength s has arrived when its gradient g says that its objective is within 1e-9 of the
    minimum: it is strongly convex in the weights, so it is above by |g|^2 / (2 s) at most. The
    biases, which are not regularised, have a curvature of their own; hence s up to 0.01 there.
    """

    def __init__(
        self, problem: SoftmaxRegression, params: Floats, strengths: Sequence[float]
    ) -> None:
        self._problem, self.params = problem, params
        decay = np.tile(np.array(strengths)[:, None, None], (1, 1, params.shape[2]))
        self._tolerances = 2 * _TOLERANCE * decay[:, 0, 0].clip(max=1e-2)
        decay[..., -1] = 0
        self._decay = decay
        self._memory = _Memory(problem.metric(decay))
        self._points = problem.project(params)
        self.losses, self._values = self._evaluate(params, self._points)
        self._grads = problem.grads(self._points) + decay * params
        self.num_iterations = np.zeros(len(self.losses), np.int64)

    def active(self) -> npt.NDArray[np.bool_]:
        """Return which strengths (L,) have not arrived."""
        return ~(_dot(self._grads, self._grads) <= self._tolerances)

    def advance(self) -> bool:
        """Take a step with every strength that has not arrived; return whether there was any."""
        active = self.active()
        if not active.any():
            return False
        self.num_iterations += active
        directions = -self._memory.multiply(self._grads)
        by_size = self._problem.project(directions)
        slopes, sizes = _dot(self._grads, directions), active.astype(np.float64)
        slack = 8 * _EPS * np.abs(self._values)
        for _ in range(_HALVINGS):  # cheap: the contrasts are linear in the step's size
            params = self.params + sizes[:, None, None] * directions
            points = self._points + sizes[:, None, None] * by_size
            losses, values = self._evaluate(params, points)
            fails = active & ~(values <= self._values + _SUFFICIENT * sizes * slopes + slack)
            if not fails.any():
                break
            sizes = np.where(fails, sizes / 2, sizes)
        grads = self._problem.grads(points) + self._decay * params
        self._memory.add(params - self.params, grads - self._grads)
        self.params, self._points, self._grads = params, points, grads
        self.losses, self._values = losses, values
        return True

    def _evaluate(self, params: Floats, points: Floats) -> tuple[Floats, Floats]:
        """Return the losses (L,), and with the regularisation."""
        losses = self._problem.losses(points)
        return losses, losses + _dot(self._decay * params, params) / 2


class _Memory:
    """L-BFGS' approximation of the inverse Hessian of each strength, (L, C - 1, P) on the diagonal.

    Args:
        metric: The diagonal it starts from; scaled, as usual, by the latest step.
    """

    def __init__(self, metric: Floats) -> None:
        self._metric, self._scale = metric, np.ones(len(metric))
        self._pairs: list[tuple[Floats, Floats, Floats]] = []

    def add(self, steps: Floats, changes: Floats) -> None:
        """Remember steps and the changes of the gradient; those of no length count for nothing."""
        products = _dot(steps, changes)
        counts = products > 0
        inverses = np.divide(1.0, products, out=np.zeros_like(products), where=counts)
        scaled = _dot(changes, self._metric * changes)
        self._scale = np.divide(products, scaled, out=self._scale.copy(), where=counts)
        self._pairs = [*self._pairs[1 - _MEMORY :], (steps, changes, inverses)]

    def multiply(self, grads: Floats) -> Floats:
        """Return the approximation times the gradients: the two-loop recursion."""
        result, shares = grads.copy(), list[Floats]()
        for steps, changes, inverses in reversed(self._pairs):
            shares.append(inverses * _dot(steps, result))
            result -= shares[-1][:, None, None] * changes
        result *= self._metric * self._scale[:, None, None]
        for (steps, changes, inverses), share in zip(self._pairs, reversed(shares), strict=True):
            result += (share - inverses * _dot(changes, result))[:, None, None] * steps
        return result


def _contrasts(num_classes: int) -> Floats:
    """Return (C, C - 1) with orthonormal columns that sum to 0."""
    centred = np.eye(num_classes) - 1 / num_classes
    return np.linalg.qr(centred[:, :-1])[0]


def _dot(one: Floats, other: Floats) -> Floats:
    products: Floats = np.einsum("lcp,lcp->l", one, other)
    return products
