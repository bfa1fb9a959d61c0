"""Rows in, out-of-fold probabilities out: a head per fold, which nothing of the fold decides.

Reads nothing. Writes: a journal and heads, through what it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import CacheError
from featcache.formatting import join_few
from featcache.heads.config import TrainingConfig
from featcache.heads.fit import fit_head
from featcache.heads.head import HeadConfig
from featcache.heads.prediction import predict_probs
from featcache.progress import Progress
from featcache.runtime import Device, Say
from featcache.sweeps.folds import Pair, Pool
from featcache.sweeps.journal import Journal
from featcache.sweeps.kept_heads import KeptHeads


@dataclass(frozen=True)
class Fold:
    """The rows of a fold, and those that its head is made of; no group is in two of them.

    Attributes:
        repeat: From 1.
        number: From 1, in its repeat.
        train: Numbers of the rows to train on.
        valid: Of the rows to choose the epoch or strength by.
        rows: Of the rows to predict.
    """

    repeat: int
    number: int
    train: npt.NDArray[np.int64]
    valid: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]

    @property
    def pair(self) -> Pair:
        """Rows to train on and to choose by."""
        return self.train, self.valid


@dataclass(frozen=True)
class FoldPlan:
    """How the heads of all folds are trained.

    Attributes:
        head: Their shape.
        training: Optimizer, epochs and the rest.
        num_folds: Of each repeat.
        num_repeats: How often the rows are parted, with both seeds one higher each time.
        share: Of the rows outside a fold, held out to choose the epoch by.
        seed: Decides initial weights and dropout.
        data_seed: Decides folds, hold-outs, the order of the rows and their views.
    """

    head: HeadConfig
    training: TrainingConfig
    num_folds: int
    num_repeats: int
    share: float
    seed: int
    data_seed: int

    def as_json(self) -> dict[str, Any]:
        """Return the plan as a JSON object."""
        return {
            "head": self.head.as_json(), "training": self.training.as_json(),
            "folds": self.num_folds, "repeats": self.num_repeats, "valid_fraction": self.share,
            "seed": self.seed, "data_seed": self.data_seed,
        }  # fmt: skip

    def choose_rows(self, pool: Pool) -> list[Fold]:
        """Return the folds of all repeats.

        Raises:
            CacheError: If a class has too few units, or is unknown wherever a fold's head learns.
        """
        chosen = [
            Fold(repeat, number, *pool.split_off(rest, self.share, data_seed), rows)
            for repeat, data_seed in enumerate(self._seeds(self.data_seed), 1)
            for number, (rest, rows) in enumerate(pool.make_folds(self.num_folds, data_seed), 1)
        ]
        if pool.targets.ndim == 2:
            _refuse_unknown(pool, chosen)
        return chosen

    def head_facts(self, fold: Fold, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Return how the head of a fold was trained, as a JSON object: see ``fit``."""
        of_solver = {"strength": entry["strength"]}
        if entry["strength"] is None:
            of_solver = {"batch_size": self.training.rows_per_step(len(fold.train))}
        return {
            "num_train": len(fold.train), "num_valid": len(fold.valid),
            "best_epoch": entry["best_epoch"], **of_solver, "valid_loss": entry["valid_loss"],
        }  # fmt: skip

    def _seeds(self, first: int) -> range:
        """Return the seed of each repeat."""
        return range(first, first + self.num_repeats)

    def fit(
        self, pool: Pool, folds: Sequence[Fold], journal: Journal, heads: KeptHeads | None,
        device: Device, *, progress: bool, say: Say,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Return an entry per fold; those that the journal has are not trained again.

        Args:
            pool: The rows.
            folds: From ``choose_rows``.
            journal: Gets an entry per fold.
            heads: Gets the head of each fold, if it is to be kept.
            device: Where to train.
            progress: Whether to show how far it is.
            say: Receives the lines for people.

        Returns:
            ``repeat``, ``fold``, ``best_epoch``, ``strength`` (None but with lbfgs), ``valid_loss``
            and ``probs`` (n, C) of the fold's rows; of heads that are kept also ``history`` (its
            columns, then its rows) and ``head_sha256``.

        Raises:
            ConfigError: If the journal is damaged, or a loss is no longer a finite number.
        """
        num_done = len(journal.entries)
        if num_done > len(folds):
            raise journal.damaged(f"{num_done} entries for {len(folds)} folds")
        for fold, entry in zip(folds, journal.entries, strict=False):
            _check_entry(entry, fold, len(pool.classes), journal)
        if heads is not None:
            heads.read(journal)
        with Progress("crossval", "fold", len(folds), done=num_done, shown=progress) as bar:
            for fold in folds[num_done:]:
                result = fit_head(
                    self.head, self.training, *pool.take(fold.pair),
                    seed=self._seeds(self.seed)[fold.repeat - 1],
                    data_seed=self._seeds(self.data_seed)[fold.repeat - 1], device=device,
                    classes=pool.classes, on_share=bar.move_by, say=bar.beside(say),
                )  # fmt: skip
                features, task = pool.plain[fold.rows], pool.cache.task
                best = result.history[result.best_epoch - 1]
                kept = {}
                if heads is not None:
                    sha256 = heads.write(len(journal.entries), result.state)
                    columns = [*result.history[0]]  # the journal sorts keys
                    history = [columns, *([row[c] for c in columns] for row in result.history)]
                    kept = {"history": history, "head_sha256": sha256}
                journal.append({
                    "repeat": fold.repeat, "fold": fold.number, "best_epoch": result.best_epoch,
                    "strength": best.get("strength"), "valid_loss": best["valid_loss"],
                    "probs": predict_probs(self.head, result.state, features, task).tolist(),
                    **kept,
                })  # fmt: skip
                bar.move_to(len(journal.entries))
        return journal.entries


def _check_entry(entry: Any, fold: Fold, num_classes: int, journal: Journal) -> None:
    """Refuse an entry that is not of this fold."""
    try:
        is_its = (entry["repeat"], entry["fold"]) == (fold.repeat, fold.number)
        probs = np.array(entry["probs"], np.float64)
        is_its &= probs.shape == (len(fold.rows), num_classes) and bool(np.isfinite(probs).all())
        numbers = entry["best_epoch"], entry["valid_loss"], entry["strength"] or 0.0
        is_its &= all(type(number) in {int, float} for number in numbers)
    except (KeyError, TypeError, ValueError):
        is_its = False
    if not is_its:
        raise journal.damaged(f"another entry for fold {fold.number}")


def _refuse_unknown(pool: Pool, folds: Sequence[Fold]) -> None:
    for fold in folds:
        unknown = np.isnan(pool.targets[fold.train]).all(axis=0)
        if unknown.any():
            names = join_few(pool.classes[i] for i in np.flatnonzero(unknown))
            raise CacheError(
                "--folds", expected="known targets of each class outside every fold",
                found=f"none of {names} outside fold {fold.number}", where=pool.cache.path,
                hint="Leave that class out: featcache select --classes takes the others",
            )  # fmt: skip
