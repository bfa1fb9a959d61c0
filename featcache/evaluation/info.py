"""Info: what a cache, a run or a cross-validation holds. No cache is hashed.

Reads: a cache, a run or the folder of a cross-validation. Writes: nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.cache.by_url import by_url
from featcache.cache.cache_split import CacheSplit
from featcache.cache.precisions import row_precisions
from featcache.cache.reading import Cache, Failure, open_cache
from featcache.cache.verdict import read_verdict
from featcache.evaluation.unfinished import UnfinishedInfo, find_unfinished, read_unfinished
from featcache.files import local_path, result_as_dict
from featcache.formatting import brief_repr

if TYPE_CHECKING:
    from featcache.heads.head import HeadConfig


@dataclass(frozen=True)
class CacheInfo:
    """What a cache holds, as its own table tells: the file was not hashed.

    Attributes:
        path: The file.
        file_bytes: Its size.
        fingerprint: sha256 of the identity.
        content_sha256: sha256 over identity, classes, features, targets and paths, as recorded.
        payload_sha256: sha256 of all bytes behind the user block, as recorded.
        identity: What decides the features' values: backbone, weights, preprocessing.
        provenance: How they were made: versions, device, engine, parity.
        task: ``multiclass`` or ``multilabel``.
        classes: Class names.
        splits: Split -> ``num_samples``; ``features``, their shape and dtype; ``num_views``;
            ``num_per_class``; with several labels an image ``num_known_per_class``; ``num_groups``,
            None without groups; ``num_per_precision``, rows made at each.
        failures: Images that could not be read.
        audit: The verdict on this content of the audit that looked at most: ``parts``,
            ``num_images`` read, ``num_leaks``, ``verdict`` and ``version``; None if it was never
            audited.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    path: Path
    file_bytes: int
    fingerprint: str
    content_sha256: str
    payload_sha256: str
    identity: dict[str, Any]
    provenance: dict[str, Any]
    task: str
    classes: tuple[str, ...]
    splits: dict[str, dict[str, Any]]
    failures: tuple[Failure, ...]
    audit: dict[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as JSON values."""
        path, *facts = result_as_dict(self).items()
        return dict([("kind", "cache"), path, ("verified", False), *facts])


@dataclass(frozen=True)
class RunInfo:
    """What a run holds.

    Attributes:
        path: The folder.
        task: ``multiclass`` or ``multilabel``.
        classes: Names of the head's outputs.
        head: The shape of the head.
        layers: Its layers, each with ``name, kind, num_outputs, num_parameters``; all parameters
            are trained, those of the backbone in front of them are not.
        num_parameters: Of all layers; of an ensemble, of all its heads.
        num_members: How many heads the mean of the probabilities is of, each with these layers; 1
            without an ensemble.
        training: How it was trained, a JSON object.
        seed: Decided the initial weights and dropout.
        data_seed: Decided the order of the rows.
        cache: Path, fingerprint, identity and hash of the cache it was trained on.
        caches: The same of all caches, where several stand side by side; else empty.
        weights_sha256: sha256 of the weights file.
        evaluations: Names of the splits it was evaluated on.
        decision: Class -> ``threshold`` and what is known of it; None where ``decide`` was not
            called.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    path: Path
    task: str
    classes: tuple[str, ...]
    head: HeadConfig
    layers: tuple[dict[str, Any], ...]
    num_parameters: int
    num_members: int
    training: dict[str, Any]
    seed: int
    data_seed: int
    cache: dict[str, Any]
    caches: tuple[dict[str, Any], ...]
    weights_sha256: str
    evaluations: tuple[str, ...]
    decision: dict[str, dict[str, Any]] | None

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as JSON values."""
        facts = result_as_dict(self)
        if not self.caches:
            del facts["caches"]
        return {"kind": "run"} | facts


@dataclass(frozen=True)
class CrossvalInfo:
    """What the folder of a cross-validation holds.

    Attributes:
        path: The folder.
        made: When, by the date of its ``crossval.json``.
        task: ``multiclass`` or ``multilabel``.
        classes: Class names.
        splits: Names of the splits whose rows were used.
        num_rows: Labelled rows, each in one fold of every repeat.
        num_folds: Of each repeat.
        num_repeats: How often the rows were split into folds.
        head: The shape of the heads.
        training: How they were trained, a JSON object.
        valid_fraction: Share of a fold's training rows that were held out to choose the epoch.
        seed: Of the first repeat.
        data_seed: Of the first repeat.
        cache: Path, fingerprint and hashes of the cache.
        caches: The same of all caches, where several stand side by side; else empty.
        mean: Of each figure over all folds: see ``CrossvalSummary``.
        ensemble: The run with the mean of the heads, None where none is kept.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    path: Path
    made: str
    task: str
    classes: tuple[str, ...]
    splits: tuple[str, ...]
    num_rows: int
    num_folds: int
    num_repeats: int
    head: dict[str, Any]
    training: dict[str, Any]
    valid_fraction: float
    seed: int
    data_seed: int
    cache: dict[str, Any]
    caches: tuple[dict[str, Any], ...]
    mean: dict[str, Any]
    ensemble: Path | None

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as JSON values."""
        facts = result_as_dict(self)
        if not self.caches:
            del facts["caches"]
        return {"kind": "cross-validation"} | facts


@by_url("path")
def info(path: str | Path) -> CacheInfo | RunInfo | CrossvalInfo | UnfinishedInfo:
    """Return what a cache, a run or a cross-validation holds. Reads no features, hashes no cache.

    Args:
        path: A cache file, the folder of a run or of a cross-validation, or the folder in which an
            interrupted command keeps what it has done: itself, or what it will become.

    Raises:
        CacheError: If the file is not a cache, or an unfinished extraction cannot be read.
        RunError: If the folder is neither a whole run nor a whole cross-validation, or an
            unfinished training cannot be read.
        ConfigError: If an unfinished sweep or cross-validation cannot be read.

    Example:
        >>> featcache.info("covid.h5").classes  # doctest: +SKIP
        ('covid', 'normal')
    """
    place = find_unfinished(local_path(path, "cache or run"))
    if place.is_dir():
        if (place / "run.json").exists():
            return _run_info(place)
        if (unfinished := read_unfinished(place)) is not None:
            return unfinished
        if (place / "crossval.json").exists():
            return _crossval_info(place)
        if not any(place.glob("*.h5")):  # of a folder of caches, the error names them
            return _run_info(place)
    cache = open_cache(place, verify=False)
    return CacheInfo(
        path=place,
        file_bytes=place.stat().st_size,
        fingerprint=cache.fingerprint,
        content_sha256=cache.content_sha256,
        payload_sha256=cache.payload_sha256,
        identity=cache.identity,
        provenance=cache.provenance,
        task=cache.task,
        classes=cache.classes,
        splits={name: _split_facts(cache, split) for name, split in cache.splits.items()},
        failures=cache.failures,
        audit=read_verdict(cache),
    )


def _crossval_info(folder: Path) -> CrossvalInfo:
    from featcache.sweeps.crossval_files import ENSEMBLE_NAME, FACTS_NAME, read_crossval

    facts, _ = read_crossval(folder)
    ensemble = folder / ENSEMBLE_NAME
    has_ensemble = "ensemble_weights_sha256" in facts and ensemble.is_dir()
    made = datetime.fromtimestamp((folder / FACTS_NAME).stat().st_mtime, UTC)
    return CrossvalInfo(
        path=folder, made=made.isoformat(timespec="seconds"), task=facts["task"],
        classes=tuple(facts["classes"]), splits=tuple(facts["splits"]), num_rows=facts["num_rows"],
        num_folds=facts["folds"], num_repeats=facts["repeats"], head=facts["head"],
        training=facts["training"], valid_fraction=facts["valid_fraction"], seed=facts["seed"],
        data_seed=facts["data_seed"], cache=facts["cache"],
        caches=tuple(facts["caches"]) if len(facts["caches"]) > 1 else (), mean=facts["mean"],
        ensemble=ensemble if has_ensemble else None,
    )  # fmt: skip


def _run_info(folder: Path) -> RunInfo:
    from featcache.evaluation.deciding.decision_file import load_decisions
    from featcache.heads.head import list_layers
    from featcache.heads.run import load_run

    run = load_run(folder)
    decisions = load_decisions(run)
    layers = list_layers(run.head)
    return RunInfo(
        path=folder,
        task=run.task,
        classes=run.classes,
        head=run.head,
        layers=tuple(layer._asdict() for layer in layers),
        num_parameters=run.num_members * sum(layer.num_parameters for layer in layers),
        num_members=run.num_members,
        training=run.training,
        seed=run.seed,
        data_seed=run.data_seed,
        cache=run.cache,
        caches=run.caches if len(run.caches) > 1 else (),
        weights_sha256=run.weights_sha256,
        evaluations=tuple(sorted(p.stem for p in folder.glob("evaluation/*.json"))),
        decision=None if decisions is None else decisions.brief(),
    )


def _split_facts(cache: Cache, split: CacheSplit) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "num_samples": len(split),
        "features": [*split.shape, split.dtype.name],
        "num_views": split.num_views,
    }
    if cache.task == "multilabel":
        counts = (split.targets == 1).sum(axis=0).tolist()
        known = (~np.isnan(split.targets)).sum(axis=0).tolist()
        facts["num_per_class"] = dict(zip(cache.classes, counts, strict=True))
        facts["num_known_per_class"] = dict(zip(cache.classes, known, strict=True))
    else:
        facts["num_per_class"] = _count_classes(cache, split)
    groups = split.groups
    return facts | {
        "num_groups": None if groups is None else len(set(groups)),
        "num_per_precision": dict(Counter(row_precisions(cache)[split.name])),
    }


def _count_classes(cache: Cache, split: CacheSplit) -> dict[str, int]:
    counts = Counter(split.targets.tolist())
    per_class = {name: counts[i] for i, name in enumerate(cache.classes)}
    return per_class | ({"unlabelled": counts[-1]} if counts[-1] else {})
