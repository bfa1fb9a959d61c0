"""A fit -> its run folder.

Reads: nothing. Writes: a run folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from featcache.cache.reading import Cache
from featcache.errors import ConfigError
from featcache.heads.config import LBFGS, FitResult, TrainingConfig
from featcache.heads.head import HeadConfig
from featcache.heads.run import relative_path, write_run
from featcache.runtime import environment_facts


def check_seed(option: str, seed: object) -> None:
    """Refuse what torch's generators would not take.

    Raises:
        ConfigError: If it is no whole number from 0 to below 2**63.
    """
    if type(seed) is not int or not 0 <= seed < 1 << 63:
        raise ConfigError(option, expected="a whole number from 0", found=repr(seed))


def check_valid_fraction(fraction: object) -> None:
    """Refuse a share to hold out that is none.

    Raises:
        ConfigError: If it is neither None nor a number between 0 and 1.
    """
    if fraction is not None and not (isinstance(fraction, int | float) and 0 < fraction < 1):
        raise ConfigError(
            "--valid-fraction", expected="a number between 0 and 1", found=repr(fraction)
        )


def record_fit(
    partial: Path,
    folder: Path,
    cache: Cache,
    *,
    head: HeadConfig,
    training: TrainingConfig,
    result: FitResult,
    seed: int,
    data_seed: int,
    device: torch.device,
    num_train: int,
    valid_fraction: float | None,
    details: Mapping[str, Any] | None = None,
) -> str:
    """Write a fit as a run and return the sha256 of its weights.

    Args:
        partial: Where it is written.
        folder: Where it will be.
        cache: What it was trained on.
        head: Its shape.
        training: How it was trained.
        result: What came of it.
        seed: Decided the initial weights and dropout.
        data_seed: Decided the order of the rows, and the hold-out.
        device: Where it was trained.
        num_train: Rows it was trained on.
        valid_fraction: Share that was held out, if any.
        details: Further facts for ``training`` in ``run.json``.
    """
    facts: dict[str, Any] = {"valid_fraction": valid_fraction}
    if training.optimizer == LBFGS:
        strengths = [row["strength"] for row in result.history]
        facts |= {"strength": strengths[result.best_epoch - 1], "strengths": strengths}
    else:
        facts["batch_size"] = training.rows_per_step(num_train)
        facts["best_epoch"] = result.best_epoch
    return write_run(
        partial, head=head, state=result.state,
        training=training.as_json() | facts | dict(details or {}),
        seed=seed, data_seed=data_seed, classes=cache.classes, cache=_cache_facts(cache, folder),
        history=result.history, environment=environment_facts(device), task=cache.task,
    )  # fmt: skip


def _cache_facts(cache: Cache, folder: Path) -> dict[str, Any]:
    return {
        "path": relative_path(cache.path, folder),
        "fingerprint": cache.fingerprint,
        "identity": cache.identity,
        "payload_sha256": cache.payload_sha256,
        "num_failed": len(cache.failures),
    }
