"""Write a run: a folder with one trained head and what it was trained on. See ``run``.

Reads: what rows were trained on. Writes: the files of a run.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featcache.cache.reading import Cache
from featcache.cache.remote_copies import place_from
from featcache.cache.side_by_side import caches_of
from featcache.csv_files import write_csv
from featcache.errors import RunError, escaped
from featcache.files import json_sha256, write_bytes, write_json
from featcache.heads.config import LBFGS, FitResult, TrainingConfig
from featcache.heads.head import HeadConfig, join_members
from featcache.heads.rows import Part
from featcache.heads.run import (
    ENSEMBLE_VERSION,
    FORMAT,
    FORMAT_VERSION,
    SEVERAL_CACHES_VERSION,
    WEIGHTS_NAME,
    is_run,
    weights_metadata,
)
from featcache.heads.trained_rows import ROWS_NAME, TrainedRows
from featcache.outputs import Kind, Output
from featcache.runtime import Device, environment_facts

if TYPE_CHECKING:
    import torch

_OWN_FILES = re.compile(
    r"(run|environment|sweep|decision)\.json|head\.safetensors|rows\.bin|report\.html"
    r"|(history|trials)\.csv|loss_curves\.png"
    r"|evaluation(/[a-z]+(\.json|_confusion\.csv|_(confusion|roc|reliability)\.png))?"
)
"""What verbs write into a run. Other files in it are the user's: such a run is not replaced."""


def _list_others(run: Path) -> list[str]:
    """Return the names of files in a run's folder that are not the run's."""
    paths = {path.relative_to(run).as_posix(): path for path in sorted(run.rglob("*"))}
    return [
        name for name, path in paths.items()
        if not _OWN_FILES.fullmatch(name) or path.is_symlink()
        or path.is_dir() != (name == "evaluation")
    ]  # fmt: skip


RUN = Kind(
    "run", "a new or empty folder", RunError, is_run, switch="--overwrite", is_folder=True,
    list_others=_list_others,
)  # fmt: skip


def run_output(run: str | Path, *, overwrite: bool, inputs: Sequence[str | Path | None]) -> Output:
    """Return the folder of a new run as an output; ``inputs`` are what it is made of."""
    return Output(run, "output folder", RUN, replace=overwrite, inputs=inputs)


def write_run(
    folder: Path,
    *,
    head: HeadConfig,
    state: Mapping[str, npt.ArrayLike],
    training: Mapping[str, Any],
    seed: int,
    data_seed: int,
    classes: Sequence[str],
    cache: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
    task: str = "multiclass",
    members: Sequence[Mapping[str, Any]] = (),
    caches: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Write the files of a run into ``folder`` and return the sha256 of its weights.

    Args:
        folder: An existing folder, as a rule the one that ``output_folders.new_folder`` gives.
        head: The shape of the head.
        state: Its state dict, of arrays or of torch tensors on the CPU.
        training: A JSON object: how it was trained.
        seed: Decided the initial weights and dropout.
        data_seed: Decided the order of the rows.
        classes: Names of the outputs, in order.
        cache: See ``Run.cache``; ``relative_path`` makes its ``path``.
        history: A row per epoch, all with the same keys.
        environment: A JSON object: ``runtime.environment_facts``.
        task: ``multiclass`` or ``multilabel``.
        members: Of an ensemble of two or more heads, whose ``state`` is that of ``join_members``: a
            JSON object per head, how it was trained.
        caches: See ``Run.caches``; where there is one, ``cache`` alone is written.
    """
    from safetensors import numpy as safetensors

    arrays = {name: np.asarray(value, order="C") for name, value in state.items()}
    weights = safetensors.save(arrays, weights_metadata(head, classes, task, max(len(members), 1)))
    weights_sha256 = hashlib.sha256(weights).hexdigest()
    write_bytes(folder / WEIGHTS_NAME, weights)
    columns = list(history[0])
    write_csv(
        folder / "history.csv",
        [escaped(name) for name in columns],
        [[row[name] for name in columns] for row in history],
    )
    write_json(folder / "environment.json", dict(environment))
    facts = {
        "format": FORMAT,
        "format_version": ENSEMBLE_VERSION if members else FORMAT_VERSION,
        "head": head.as_json(),
        "training": dict(training),
        "seed": seed,
        "data_seed": data_seed,
        "classes": list(classes),
        "task": task,
        "cache": dict(cache),
        "weights_sha256": weights_sha256,
        **({"members": [dict(member) for member in members]} if members else {}),
    }
    if len(caches) > 1:
        facts |= {"format_version": SEVERAL_CACHES_VERSION, "caches": [*map(dict, caches)]}
    write_json(folder / "run.json", facts | {"sha256": json_sha256(facts, without="sha256")})
    return weights_sha256


def relative_path(cache: Path, run: Path) -> str:
    """Return the cache's path as seen from the run folder, ``/``-separated.

    Relative, so that both can move together; absolute only from another drive, and where one of
    them lies in a store: then the cache's URL, or its absolute path.
    """
    if place := place_from(cache, run):
        return place
    target = cache.resolve()
    try:
        return Path(os.path.relpath(target, run.resolve())).as_posix()
    except ValueError:  # Windows: another drive
        return target.as_posix()


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
    device: Device | torch.device,
    parts: Sequence[Part],
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
        parts: The rows it was trained on, and those its epoch was chosen by.
        valid_fraction: Share that was held out, if any.
        details: Further facts for ``training`` in ``run.json``.
    """
    facts: dict[str, Any] = {"valid_fraction": valid_fraction}
    if training.optimizer == LBFGS:
        strengths = [row["strength"] for row in result.history]
        facts |= {"strength": strengths[result.best_epoch - 1], "strengths": strengths}
    else:
        facts["batch_size"] = training.rows_per_step(len(parts[0].rows))
        facts["best_epoch"] = result.best_epoch
    return _write_with_rows(
        partial, folder, cache, parts, head=head, state=result.state,
        training=training.as_json() | facts | dict(details or {}), seed=seed, data_seed=data_seed,
        history=result.history, environment=environment_facts(device),
    )  # fmt: skip


def record_ensemble(
    partial: Path,
    folder: Path,
    cache: Cache,
    *,
    head: HeadConfig,
    states: Sequence[Mapping[str, npt.ArrayLike]],
    members: Sequence[Mapping[str, Any]],
    training: Mapping[str, Any],
    seed: int,
    data_seed: int,
    device: Device | torch.device,
    parts: Sequence[Part],
    history: Sequence[Mapping[str, Any]],
) -> str:
    """Write the mean of several heads as a run and return the sha256 of its weights.

    Args:
        partial: Where it is written.
        folder: Where it will be.
        cache: What they were trained on.
        head: The shape of each.
        states: The state dict of each.
        members: How each was trained, JSON objects.
        training: How all were, a JSON object.
        seed: Of the first.
        data_seed: Of the first.
        device: Where they were trained.
        parts: The rows that any of them was trained on, and the others that any was chosen by.
        history: A row per head and epoch.
    """
    return _write_with_rows(
        partial, folder, cache, parts, head=head, state=join_members(states), members=members,
        training=training, seed=seed, data_seed=data_seed, history=history,
        environment=environment_facts(device),
    )  # fmt: skip


def _write_with_rows(
    partial: Path, folder: Path, cache: Cache, parts: Sequence[Part], **facts: Any
) -> str:
    """Write a run of a cache and the hashes of the rows that it has seen: see ``write_run``."""
    caches = [_cache_facts(each, folder) for each in caches_of(cache)]
    weights_sha256 = write_run(
        partial, classes=cache.classes, task=cache.task, cache=caches[0],
        caches=[
            facts_of_one | {"num_features": each.num_features}
            for facts_of_one, each in zip(caches, caches_of(cache), strict=True)
        ], **facts,
    )  # fmt: skip
    write_bytes(partial / ROWS_NAME, TrainedRows.of(parts).as_bytes(weights_sha256))
    return weights_sha256


def _cache_facts(cache: Cache, folder: Path) -> dict[str, Any]:
    source = cache.provenance.get("weights_source")
    return {
        "path": relative_path(cache.path, folder),
        "fingerprint": cache.fingerprint,
        "identity": cache.identity,
        "payload_sha256": cache.payload_sha256,
        "num_failed": len(cache.failures),
        # Only where it helps: without it, predict and export would first download others.
        **({"weights_source": source} if str(source).startswith("random") else {}),
    }
