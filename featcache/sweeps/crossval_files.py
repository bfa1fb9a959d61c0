"""The folder of a cross-validation: ``crossval.json`` and ``predictions.csv``.

``predictions.csv`` has a line per row and repeat: ``split, fold, repeat`` (both from 1), then the
columns of ``evaluate --csv``. ``crossval.json`` says how they were made and how good they are; it
bears the hash of the other file and its own, as ``run.json`` does. ``ensemble``, if it is kept, is
a run: the mean of the heads.

Reads, writes: the files of such a folder.
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
from featcache.csv_files import csv_text
from featcache.errors import ConfigError, RunError
from featcache.files import json_sha256, optional_json_object, read_regular, write_bytes, write_json
from featcache.heads.prediction import prediction_table
from featcache.heads.rows import Part
from featcache.heads.run import is_run
from featcache.heads.run_writing import RUN, relative_path
from featcache.outputs import Kind
from featcache.sweeps.crossval_figures import mean_figures, measure_fold, pool_figures
from featcache.sweeps.fold_heads import Fold, FoldPlan
from featcache.sweeps.folds import Pool
from featcache.untrusted import parse_json_object, reading_hint

FORMAT, FORMAT_VERSION = "featcache-crossval", 1
FACTS_NAME, ROWS_NAME, ENSEMBLE_NAME = "crossval.json", "predictions.csv", "ensemble"
_KINDS = {
    "task": str, "classes": list, "splits": list, "num_rows": int, "folds": int, "repeats": int,
    "head": dict, "training": dict, "valid_fraction": float, "seed": int, "data_seed": int,
    "cache": dict, "mean": dict,
}  # fmt: skip
_MAX_JSON_BYTES, _MAX_ROWS_BYTES = 1 << 28, 1 << 31


def _is_crossval(path: Path) -> bool:
    facts = optional_json_object(path / FACTS_NAME, max_bytes=_MAX_JSON_BYTES)
    return facts.get("format") == FORMAT


def _list_others(folder: Path) -> list[str]:
    others = []
    for path in sorted(folder.iterdir()):
        if path.name == ENSEMBLE_NAME and not path.is_symlink() and is_run(path):
            others += [f"{ENSEMBLE_NAME}/{name}" for name in RUN.list_others(path)]
        elif path.name not in {FACTS_NAME, ROWS_NAME} or path.is_symlink() or not path.is_file():
            others.append(path.name)
    return others


CROSSVAL = Kind(
    "cross-validation", "a new or empty folder", ConfigError, _is_crossval, switch="--overwrite",
    is_folder=True, list_others=_list_others,
)  # fmt: skip


def read_crossval(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Return what ``crossval.json`` says, and ``predictions.csv``, after checking their hashes.

    ``cache`` is the first of ``caches``, which has one or more.

    Raises:
        RunError: If a file cannot be read, is damaged, edited or of a newer version.
    """
    try:
        facts = parse_json_object(_read(folder, FACTS_NAME, _MAX_JSON_BYTES))
    except ValueError as error:
        raise damaged(folder, f"a JSON object in {FACTS_NAME}", error) from error
    if facts.get("format") != FORMAT:
        raise damaged(folder, f"format {FORMAT}", "another")
    version = facts.get("format_version")
    if version != FORMAT_VERSION:
        raise RunError(
            "cross-validation", expected=f"format version {FORMAT_VERSION}",
            found=f"version {str(version)[:20]}", where=folder,
            hint="A newer featcache wrote it: upgrade with pip install -U featcache",
        )  # fmt: skip
    if json_sha256(facts, without="sha256") != facts.get("sha256"):
        raise damaged(folder, f"{FACTS_NAME} with its own sha256", "another")
    for key, kind in _KINDS.items():
        if not isinstance(facts.get(key), kind):
            raise damaged(folder, f"{key}, a JSON {kind.__name__}", facts.get(key))
    if not _are_figures(facts["mean"]):
        raise damaged(folder, "mean, figures with their intervals", facts["mean"])
    caches = facts.setdefault("caches", [facts["cache"]])
    if not isinstance(caches, list) or not all(isinstance(cache, dict) for cache in caches):
        raise damaged(folder, "caches, JSON objects", caches)
    predictions = _read(folder, ROWS_NAME, _MAX_ROWS_BYTES)
    if hashlib.sha256(predictions).hexdigest() != facts.get("predictions_sha256"):
        raise damaged(folder, f"the {ROWS_NAME} that {FACTS_NAME} names", f"another {ROWS_NAME}")
    return facts, predictions


def _are_figures(mean: Mapping[str, Any]) -> bool:
    """Whether this is what ``mean_figures`` returns."""
    of_classes = mean.get("per_class")
    if not isinstance(of_classes, dict):
        return False
    rows = [row for row in of_classes.values() if isinstance(row, dict)]
    figures = [row.get("recall") for row in rows]
    figures += [mean[name] for name in mean if name != "per_class"]
    return len(rows) == len(of_classes) and all(
        isinstance(figure, dict)
        and all(isinstance(figure.get(key, ""), float | None) for key in ("mean", "low", "high"))
        for figure in figures
    )


def _read(folder: Path, name: str, max_bytes: int) -> bytes:
    try:
        return read_regular(folder / name, max_bytes=max_bytes)
    except OSError as error:
        raise RunError(
            "cross-validation", expected=f"a folder with {name}", found=error.strerror,
            where=folder, hint=reading_hint(error, _name_folder(folder)),
        ) from error  # fmt: skip


def _name_folder(folder: Path) -> str:
    """Return what to name in place of a folder that is none of a cross-validation."""
    if _is_crossval(folder.parent):
        return f"Name the folder of the cross-validation: {folder.parent.as_posix()}"
    return "Make it with featcache crossval"


def damaged(folder: Path, expected: str, found: object) -> RunError:
    """Return the error for a cross-validation whose files are not as they were written."""
    return RunError(
        "cross-validation", expected=expected, found=str(found)[:200], where=folder,
        hint="It is damaged or was edited: make it again with featcache crossval",
    )  # fmt: skip


def write_crossval(  # noqa: PLR0917 (where, and what was done)
    partial: Path, target: Path, pool: Pool, parts: Sequence[Part], plan: FoldPlan,
    folds: Sequence[Fold], entries: Sequence[Mapping[str, Any]], ensemble: Mapping[str, Any],
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
        ensemble: ``ensemble_weights_sha256``, if one was kept.
    """
    shape = plan.num_repeats, len(pool.targets), len(pool.classes)
    probs, fold_of, per_fold = np.empty(shape), np.empty(shape[:2], np.int64), []
    for fold, entry in zip(folds, entries, strict=True):
        of_repeat = probs[fold.repeat - 1]
        of_repeat[fold.rows] = entry["probs"]
        fold_of[fold.repeat - 1, fold.rows] = fold.number
        per_fold.append(
            {"repeat": fold.repeat, "fold": fold.number, "num_rows": len(fold.rows)}
            | plan.head_facts(fold, entry)
            | measure_fold(pool.targets[fold.rows], of_repeat[fold.rows], pool.classes)
        )
    ratio = float(np.mean([len(fold.rows) / len(fold.train) for fold in folds]))
    groups = _list_groups(parts)
    data = csv_text(*_table(pool, parts, groups, probs, fold_of)).encode()
    write_bytes(partial / ROWS_NAME, data)
    cache = pool.cache
    caches = [_cache_facts(each, target) for each in caches_of(cache)]
    facts = {
        "format": FORMAT, "format_version": FORMAT_VERSION, "cache": caches[0],
        "classes": list(cache.classes), "task": cache.task,
        "splits": [part.split.name for part in parts], **plan.as_json(),
        "num_rows": len(pool.targets), "per_fold": per_fold, "mean": mean_figures(per_fold, ratio),
        "pooled": [
            {"repeat": i} | pool_figures(pool.targets, of_repeat, pool.classes, groups)
            for i, of_repeat in enumerate(probs, 1)
        ],
        "predictions_sha256": hashlib.sha256(data).hexdigest(), **ensemble,
    }  # fmt: skip
    if len(caches) > 1:
        facts["caches"] = caches
    write_json(partial / FACTS_NAME, facts | {"sha256": json_sha256(facts, without="sha256")})
    return facts


def _list_groups(parts: Sequence[Part]) -> list[str]:
    """Return the group of each row, empty where it has none."""
    return [
        part.split.groups[row] if part.split.groups else ""
        for part in parts for row in part.rows.tolist()
    ]  # fmt: skip


def _cache_facts(cache: Cache, folder: Path) -> dict[str, Any]:
    return {
        "path": relative_path(cache.path, folder), "fingerprint": cache.fingerprint,
        "payload_sha256": cache.payload_sha256, "content_sha256": cache.content_sha256,
    }  # fmt: skip


def _table(
    pool: Pool, parts: Sequence[Part], groups: Sequence[str], probs: npt.NDArray[np.float64],
    fold_of: npt.NDArray[np.int64],
) -> tuple[list[str], Iterator[list[object]]]:  # fmt: skip
    """Return the header and the rows of ``predictions.csv``, repeat by repeat."""
    splits, paths = list[str](), list[str]()
    for part in parts:
        rows = part.rows.tolist()
        splits += [part.split.name] * len(rows)
        paths += [part.split.paths[row] for row in rows]
    tables = [
        prediction_table(pool.classes, paths, groups, pool.targets, of_repeat)
        for of_repeat in probs
    ]
    return ["split", "fold", "repeat", *tables[0][0]], (
        [split, number, repeat, *row]
        for repeat, (_, table) in enumerate(tables, 1)
        for split, number, row in zip(splits, fold_of[repeat - 1].tolist(), table, strict=True)
    )
