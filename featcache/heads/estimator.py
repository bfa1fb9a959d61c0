"""The head as a scikit-learn classifier over features."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import LabelEncoder
from sklearn.utils import check_random_state
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_sample_weight,
    check_is_fitted,
    column_or_1d,
    validate_data,
)

from featcache.errors import ConfigError, FeatcacheError
from featcache.heads.config import TrainingConfig
from featcache.heads.fit import fit_head
from featcache.heads.head import HeadConfig, build_head, norm_and_linear, to_python
from featcache.heads.prediction import predict_logits, predict_probs
from featcache.heads.run import Run, load_run
from featcache.runtime import resolve_device

if TYPE_CHECKING:
    import torch

_PARAMETERS = {
    "--hidden": "hidden_layer_sizes", "--optimizer": "solver", "--epochs": "max_epochs",
    "--patience": "n_iter_no_change", "--class-weights": "class_weight",
}  # fmt: skip
"""Options whose parameter here has scikit-learn's name; the others differ by the dashes."""

_FIELDS = {
    "learning_rate": "learning_rate", "weight_decay": "weight_decay", "solver": "optimizer",
    "schedule": "schedule", "batch_size": "batch_size", "max_epochs": "epochs",
    "n_iter_no_change": "patience", "label_smoothing": "label_smoothing", "warmup": "warmup",
}  # fmt: skip
"""Parameters here whose values are those of a run's ``training``, and their names there."""

_Compute: TypeAlias = Callable[
    [HeadConfig, Mapping[str, npt.NDArray[Any]], npt.NDArray[Any]], npt.NDArray[np.float64]
]


class HeadClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """featcache's head as a scikit-learn classifier over features (N, D).

    Trains what ``featcache.train`` trains: with the validation rows of a cache and the same seed
    the weights are equal bit for bit. By default there are no validation rows: all epochs are run
    and the last is kept.

    X may be a NumPy array, a torch tensor, a data frame or the features of a cache's split (of one
    with views: ``plain_features``), of numbers up to 1e18. Their scale does not matter: see module
    ``scaling``. Whatever its dtype, the head trains in float32, as features are made; predictions
    are computed in float64, so that a row's does not depend on which others are predicted with it
    (in float32 by 6e-7, more than scikit-learn allows; it takes 3 times as long). Any value of y is
    a class: leave rows of a cache with target -1 (unlabelled) out.

    Args:
        hidden_layer_sizes: Width of each hidden layer; ``()`` for a linear head.
        dropout: Chance in [0, 1) before the last layer.
        learning_rate: Step size at the first epoch after the warm-up.
        batch_size: Rows per step, two or more, or ``auto``: about 1 % of the rows, 32 to 4096.
        max_epochs: The most passes over the rows.
        validation_fraction: Share of the rows held out, stratified, to keep the epoch with the
            lowest loss on them; 0 holds out none. It knows no groups: where rows of one patient
            must stay together, hand ``X_val`` and ``y_val`` to ``fit``.
        n_iter_no_change: Stop after this many epochs without a lower validation loss (without
            validation rows: training loss); None never does.
        class_weight: ``balanced`` (by the rows' number in each class), or a dict of class to
            weight; classes it does not name weigh 1.
        solver: ``adam``, ``adamw`` or ``sgd``; or ``lbfgs``, which solves for a linear head
            (``hidden_layer_sizes=()``) and uses of the other parameters ``weight_decay``,
            ``class_weight`` and ``label_smoothing`` alone.
        schedule: ``constant`` or ``cosine``.
        weight_decay: Added to the gradient (adam, sgd) or taken off the weights (adamw). With
            lbfgs, the strength of regularisation; 0 chooses it from a path by the validation rows,
            and without those is 1 / N, scikit-learn's C = 1.
        label_smoothing: Share in [0, 1) of each target spread evenly over all classes.
        warmup: Epochs in which the learning rate rises from 0, step by step.
        random_state: An int decides initial weights, dropout and order as ``seed`` of
            ``featcache.train`` does; None or a ``RandomState`` draws such a seed.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        verbose: Above 0, a line per epoch is printed.

    Attributes:
        classes_: The classes, sorted.
        n_features_in_: D.
        feature_names_in_: Of a data frame whose columns are strings.
        head_: The trained ``torch.nn.Sequential``, on the CPU, in eval mode.
        history_: One dict per epoch: losses, validation accuracy and recalls, learning rate.
            With lbfgs one per strength, the strongest first.
        best_epoch_: The epoch kept, from 1; with lbfgs the strength.
        n_iter_: How many epochs were run, or strengths solved for.

    Example:
        >>> from sklearn.model_selection import cross_val_score  # doctest: +SKIP
        >>> cross_val_score(HeadClassifier(random_state=0), X, y)  # doctest: +SKIP
    """

    __module__ = "featcache"

    def __init__(  # noqa: PLR0917 (the order of the contract)
        self,
        hidden_layer_sizes: Any = (512, 128),
        dropout: float = 0.4,
        learning_rate: float = 5e-4,
        batch_size: int | str = "auto",
        max_epochs: int = 10,
        validation_fraction: float = 0,
        class_weight: Mapping[Any, float] | str | None = None,
        random_state: Any = None,
        device: str = "auto",
        verbose: int = 0,
        *,
        n_iter_no_change: int | None = None,
        solver: str = "adam",
        schedule: str = "constant",
        weight_decay: float = 0.0,
        label_smoothing: float = 0.0,
        warmup: int = 0,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.dropout = dropout
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.validation_fraction = validation_fraction
        self.class_weight = class_weight
        self.random_state = random_state
        self.device = device
        self.verbose = verbose
        self.n_iter_no_change = n_iter_no_change
        self.solver = solver
        self.schedule = schedule
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing
        self.warmup = warmup

    def fit(
        self, X: Any, y: Any, sample_weight: Any = None, *, X_val: Any = None, y_val: Any = None
    ) -> HeadClassifier:
        """Train the head.

        Args:
            X: (N, D) features.
            y: (N,) classes: whole numbers, strings or whatever sorts.
            sample_weight: (N,) from 0, a weight per row in the loss, multiplied with the class's;
                rows of weight 0 are left out. Weight 2 is not quite the row twice: batch norm sees
                it once.
            X_val: (M, D) features to keep the best epoch by.
            y_val: (M,) their classes, none that ``y`` lacks.

        Returns:
            The estimator itself.

        Raises:
            ValueError: If the arrays do not fit or a parameter has no meaning.
        """
        features, y = self._check_rows(X, _to_numpy(y), ensure_min_samples=2)
        check_classification_targets(y)
        encoder = LabelEncoder()
        targets, self.classes_ = encoder.fit_transform(y), encoder.classes_
        _check_classes(self.classes_)
        with _errors_of_scikit_learn():
            head, training = self._head_config(), self._training_config(y)
            kept, weights = _weigh(_to_numpy(sample_weight), training, features, targets)
            _check_classes(encoder.inverse_transform(np.unique(targets[kept])))
            seed = self._seed()
            held_out = self._check_validation(encoder, X_val, y_val)
            if self.validation_fraction:
                kept, held = self._hold_out(kept, targets, seed)
                held_out = features[held], targets[held]
            if len(kept) < len(features):
                features, targets = features[kept], targets[kept]
                weights = None if weights is None else weights[kept]
            result = fit_head(
                head, training, features, targets, *held_out, seed=seed, data_seed=seed,
                device=resolve_device(self.device), train_weights=weights,
                classes=[str(name) for name in self.classes_],
                on_epoch=_print_epoch if self.verbose else None,
            )  # fmt: skip
        self.history_, self.best_epoch_ = result.history, result.best_epoch
        self.n_iter_ = len(result.history)
        self._config, self._state = head, result.state
        return self

    @property
    def head_(self) -> torch.nn.Sequential:
        """A new ``torch.nn.Sequential`` of the trained head, on the CPU, in eval mode."""
        import torch

        check_is_fitted(self)
        head = build_head(self._config, seed=0).eval()
        head.load_state_dict({name: torch.from_numpy(v) for name, v in self._state.items()})
        return head

    def decision_function(self, X: Any) -> npt.NDArray[np.float64]:
        """Return the logits (N, C); of two classes (N,), the second's minus the first's."""
        logits = self._compute(predict_logits, X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: Any) -> npt.NDArray[np.float64]:
        """Return the probability of each class, (N, C) in the order of ``classes_``."""
        return self._compute(predict_probs, X)

    def predict_log_proba(self, X: Any) -> npt.NDArray[np.float64]:
        """Return the logarithm of each probability, (N, C): finite where the probability is 0."""
        logits = self._compute(predict_logits, X)
        logs: npt.NDArray[np.float64] = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        return logs

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """Return the most probable class of each row, (N,)."""
        logits = self._compute(predict_logits, X)
        preds: npt.NDArray[Any] = self.classes_[logits.argmax(1)]
        return preds

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy of ``predict``."""
        return float(super().score(X, _to_numpy(y), _to_numpy(sample_weight)))

    @classmethod
    def from_run(cls, run: Run | str | Path) -> HeadClassifier:
        """Return a fitted estimator with the head and the parameters of a run.

        It predicts what the run predicts on features. There is no way back: an estimator knows
        neither its cache and rows, nor what steps of a pipeline did to them. ``featcache.train``
        with the same options and seed makes the run, with the same weights.

        Args:
            run: The run folder, or what ``load_run`` returned.

        Returns:
            The estimator. ``classes_`` are the names of the run's classes, sorted: compare it with
            names, not with the numbers in a cache's targets. ``history_`` and ``n_iter_``, which
            no run has for certain, are missing.

        Raises:
            RunError: If the folder is not a whole run.
            ConfigError: If the run is one of several labels an image, or an ensemble.

        Example:
            >>> head = HeadClassifier.from_run("run")  # doctest: +SKIP
            >>> head.predict(cache.split("test").plain_features)  # doctest: +SKIP
        """
        loaded = run if isinstance(run, Run) else load_run(run)
        if loaded.task != "multiclass":
            raise ConfigError(
                "HeadClassifier.from_run", expected="a run of one class an image",
                found="several labels", where=loaded.path, hint="Use featcache.load_head",
            )  # fmt: skip
        if loaded.members:
            raise ConfigError(
                "HeadClassifier.from_run", expected="a run with one head",
                found=f"the mean of {loaded.num_members}", where=loaded.path,
                hint="Use featcache.load_head",
            )  # fmt: skip
        told, head = loaded.training, loaded.head
        parameters = {
            name: told[option] for name, option in _FIELDS.items() if option in told
        }  # fmt: skip
        weights = told.get("class_weights", "none")
        if not isinstance(weights, str):
            weights = dict(zip(loaded.classes, weights, strict=True))
        estimator = cls(
            head.hidden, head.dropout, random_state=loaded.seed,
            class_weight=None if weights == "none" else weights, **parameters,
        )  # fmt: skip
        order = np.argsort(np.array(loaded.classes))
        estimator.classes_ = np.array(loaded.classes)[order]
        estimator.n_features_in_ = head.num_features
        _, last = norm_and_linear(head, len(head.hidden))
        outputs = {f"{last}.weight", f"{last}.bias"}
        estimator._config, estimator._state = head, {
            name: value[order] if name in outputs else value for name, value in loaded.state.items()
        }  # fmt: skip
        if "best_epoch" in told:
            estimator.best_epoch_ = told["best_epoch"]
        return estimator

    def _check_rows(self, X: Any, *y: Any, **options: Any) -> Any:
        with np.errstate(over="ignore", invalid="ignore"):  # infinities are refused, not warned of
            return validate_data(self, _to_numpy(X), *y, dtype=np.float32, **options)

    def _head_config(self) -> HeadConfig:
        sizes = self.hidden_layer_sizes
        hidden = (sizes,) if np.ndim(sizes) == 0 else tuple(sizes)
        return HeadConfig(self.n_features_in_, len(self.classes_), hidden, self.dropout)

    def _training_config(self, y: npt.NDArray[Any]) -> TrainingConfig:
        class_weights: str | tuple[float, ...] = "none"
        if isinstance(self.class_weight, str) and self.class_weight == "balanced":
            class_weights = "balanced"
        elif self.class_weight is not None:
            weights = compute_class_weight(self.class_weight, classes=self.classes_, y=y)
            class_weights = tuple(weights.tolist())
        return TrainingConfig(
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            optimizer=self.solver,
            schedule=self.schedule,
            batch_size=self.batch_size,
            epochs=self.max_epochs,
            patience=self.n_iter_no_change,
            class_weights=class_weights,
            label_smoothing=self.label_smoothing,
            warmup=self.warmup,
        )

    def _seed(self) -> int:
        generator = check_random_state(self.random_state)
        if isinstance(self.random_state, Integral):
            return int(self.random_state)
        return int(generator.randint(np.iinfo(np.int32).max))

    def _check_validation(
        self, encoder: LabelEncoder, X_val: Any, y_val: Any
    ) -> tuple[npt.NDArray[Any] | None, npt.NDArray[Any] | None]:
        """Return features and targets to keep the best epoch by, or twice None."""
        if X_val is None and y_val is None:
            return None, None
        if X_val is None or y_val is None or self.validation_fraction:
            raise ValueError("X_val and y_val go together, and with validation_fraction=0")
        features = self._check_rows(X_val, reset=False)
        return features, encoder.transform(column_or_1d(_to_numpy(y_val), warn=True))

    def _hold_out(
        self, rows: npt.NDArray[Any], targets: npt.NDArray[Any], seed: int
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Part the rows (n,) into those to train on and those to keep the best epoch by."""
        fraction = to_python(self.validation_fraction)
        if not isinstance(fraction, float) or not 0 < fraction < 1:
            raise ConfigError(
                "validation_fraction", expected="a number from 0 to below 1", found=repr(fraction)
            )
        parts: list[npt.NDArray[Any]] = train_test_split(
            rows, test_size=fraction, stratify=targets[rows], random_state=seed
        )
        return np.sort(parts[0]), np.sort(parts[1])

    def _compute(self, function: _Compute, X: Any) -> npt.NDArray[np.float64]:
        """Apply the head to rows in float64."""
        check_is_fitted(self)
        features = self._check_rows(X, reset=False)
        state = {name: value.astype(np.float64) for name, value in self._state.items()}
        with _errors_of_scikit_learn():
            return function(self._config, state, features)


def _weigh(
    sample_weight: Any,
    training: TrainingConfig,
    features: npt.NDArray[Any],
    targets: npt.NDArray[Any],
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32] | None]:
    """Return which rows (n,) weigh anything, and the weights (N,), None where all weigh alike.

    Rows of no weight are left out, not weighed 0: batch norm would see them.
    """
    weights, counts = None, np.ones(len(targets), bool)
    if sample_weight is not None:
        given = _check_sample_weight(
            sample_weight, features, dtype=np.float64, ensure_non_negative=True
        )
        weights = (given / max(given.max(), np.finfo(np.float64).tiny)).astype(np.float32)
        counts = weights > 0
    if isinstance(training.class_weights, tuple):
        counts &= np.array(training.class_weights)[targets] > 0
    if counts.sum() < 2:
        raise ValueError(f"2 or more samples need a weight above zero, {counts.sum()} have one")
    return np.flatnonzero(counts), weights


def _check_classes(classes: npt.NDArray[Any]) -> None:
    if len(classes) < 2:
        raise ValueError(
            "HeadClassifier needs samples of at least 2 classes in the data, but the data contains "
            f"only one class: {classes[0]!r}"
        )


@contextlib.contextmanager
def _errors_of_scikit_learn() -> Iterator[None]:
    """Raise featcache's errors as ValueError, by the names of the parameters here."""
    try:
        yield
    except FeatcacheError as error:

        def name(option: re.Match[str]) -> str:
            return _PARAMETERS.get(option[0], option[0].strip("-").replace("-", "_"))

        raise ValueError(re.sub(r"--[a-z-]+", name, str(error))) from error


def _to_numpy(value: Any) -> Any:
    torch = sys.modules.get("torch")  # without which there is no tensor
    if torch is None or not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def _print_epoch(row: dict[str, Any]) -> None:
    number = f"epoch {row['epoch']:>3}" if "epoch" in row else f"strength {row['strength']:.2e}"
    line = f"{number}  train loss {row['train_loss']:.4f}"
    if "valid_loss" in row:
        line += f"  valid loss {row['valid_loss']:.4f}  accuracy {row['valid_accuracy']:.3f}"
    print(line)  # noqa: T201 (what verbose means in scikit-learn)
