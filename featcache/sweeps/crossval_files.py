"""The folder of a cross-validation: ``crossval.json`` and ``predictions.csv``.

``predictions.csv`` has a line per row and repeat: ``split, fold, repeat`` (both from 1), then the
columns of ``evaluate --csv``. ``crossval.json`` says how they were made and how good they are; it
bears the hash of the other file and its own, as ``run.json`` does.

Reads: nothing. Writes: the files of such a folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.reading import Cache
from featcache.cache.side_by_side import caches_of
from featcache.errors import ConfigError
from featcache.files import csv_text, json_sha256, read_regular, write_bytes, write_json
from featcache.heads.prediction import prediction_table
from featcache.heads.rows import Part
from featcache.heads.run_writing import relative_path
from featcache.outputs import Kind
from featcache.sweeps.crossval_figures import mean_figures, measure_fold, pool_figures
from featcache.sweeps.fold_heads import Fold, FoldPlan
from featcache.sweeps.folds import Pool
from featcache.untrusted import parse_json_object

FORMAT, FORMAT_VERSION = "featcache-crossval", 1
FACTS_NAME, ROWS_NAME = "crossval.json", "predictions.csv"
_MAX_JSON_BYTES = 1 << 28


def _is_crossval(path: Path) -> bool:
    try:
        facts = parse_json_object(read_regular(path / FACTS_NAME, max_bytes=_MAX_JSON_BYTES))
    except (OSError, ValueError):
        return False
    return facts.get("format") == FORMAT


def _list_others(folder: Path) -> list[str]:
    return [
        path.name for path in sorted(folder.iterdir())
        if path.name not in {FACTS_NAME, ROWS_NAME} or path.is_symlink() or not path.is_file()
    ]  # fmt: skip


CROSSVAL = Kind(
    "cross-validation", "a new or empty folder", ConfigError, _is_crossval, switch="--overwrite",
    is_folder=True, list_others=_list_others,
)  # fmt: skip


def write_crossval(  # noqa: PLR0917 (where, and what was done)
    partial: Path, target: Path, pool: Pool, parts: Sequence[Part], plan: FoldPlan,
    folds: Sequence[Fold], entries: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """Write both files and return what ``crossval.json`` says, without its own hash.

    Args:
        partial: Where they are written.
        target: Where they will be.
        pool: The rows.
        parts: The splits that they are of, in the same order.
        plan: How the heads were trained.
        folds: All of them.
        entries: What became of each: see ``FoldPlan.fit``.
    """
    shape = plan.num_repeats, len(pool.targets), len(pool.classes)
    probs, fold_of, per_fold = np.empty(shape), np.empty(shape[:2], np.int64), []
    for fold, entry in zip(folds, entries, strict=True):
        probs[fold.repeat, fold.rows] = entry["probs"]
        fold_of[fold.repeat, fold.rows] = fold.number + 1
        strength = {} if entry["strength"] is None else {"strength": entry["strength"]}
        per_fold.append(
            {
                "repeat": fold.repeat + 1, "fold": fold.number + 1, "num_rows": len(fold.rows),
                "num_train": len(fold.train), "num_valid": len(fold.valid),
                "best_epoch": entry["best_epoch"], **strength, "valid_loss": entry["valid_loss"],
            }
            | measure_fold(pool.targets[fold.rows], probs[fold.repeat, fold.rows], pool.classes)
        )  # fmt: skip
    ratio = float(np.mean([len(fold.rows) / len(fold.train) for fold in folds]))
    data = csv_text(*_table(pool, parts, probs, fold_of)).encode()
    write_bytes(partial / ROWS_NAME, data)
    cache = pool.cache
    caches = [_cache_facts(each, target) for each in caches_of(cache)]
    facts = {
        "format": FORMAT, "format_version": FORMAT_VERSION, "cache": caches[0],
        "classes": list(cache.classes), "task": cache.task,
        "splits": [part.split.name for part in parts], **plan.as_json(),
        "num_rows": len(pool.targets), "per_fold": per_fold, "mean": mean_figures(per_fold, ratio),
        "pooled": [
            {"repeat": i + 1} | pool_figures(pool.targets, of_repeat, pool.classes)
            for i, of_repeat in enumerate(probs)
        ],
        "predictions_sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    if len(caches) > 1:
        facts["caches"] = caches
    write_json(partial / FACTS_NAME, facts | {"sha256": json_sha256(facts, without="sha256")})
    return facts


def _cache_facts(cache: Cache, folder: Path) -> dict[str, Any]:
    return {
        "path": relative_path(cache.path, folder), "fingerprint": cache.fingerprint,
        "payload_sha256": cache.payload_sha256, "content_sha256": cache.content_sha256,
    }  # fmt: skip


def _table(
    pool: Pool, parts: Sequence[Part], probs: npt.NDArray[np.float64],
    fold_of: npt.NDArray[np.int64],
) -> tuple[list[str], Iterator[list[object]]]:  # fmt: skip
    """Return the header and the rows of ``predictions.csv``, repeat by repeat."""
    splits, paths, groups = list[str](), list[str](), list[str]()
    for part in parts:
        rows = part.rows.tolist()
        splits += [part.split.name] * len(rows)
        paths += [part.split.paths[row] for row in rows]
        groups += [part.split.groups[row] if part.split.groups else "" for row in rows]
    tables = [
        prediction_table(pool.classes, paths, groups, pool.targets, of_repeat)
        for of_repeat in probs
    ]
    return ["split", "fold", "repeat", *tables[0][0]], (
        [split, number, repeat, *row]
        for repeat, (_, table) in enumerate(tables, 1)
        for split, number, row in zip(splits, fold_of[repeat - 1].tolist(), table, strict=True)
    )
