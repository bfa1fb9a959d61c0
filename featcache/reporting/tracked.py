"""What a tracker is told of a finished run, sweep or cross-validation: plain values and files.

Reads: the folder, the verdict on its cache, and what was exported of it. Writes: nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featcache.cache.reading import open_cache
from featcache.cache.verdict import read_verdict
from featcache.errors import ConfigError, FeatcacheError
from featcache.evaluation.deciding.decision_file import load_decisions
from featcache.evaluation.history import History, read_histories, read_table
from featcache.files import (
    canonical_json,
    local_path,
    optional_json_object,
    read_regular,
    readable_json,
)
from featcache.heads.run import Run, load_run
from featcache.heads.run_caches import cache_paths, fetch_caches
from featcache.sweeps.crossval_files import ENSEMBLE_NAME, read_crossval

_MAX_BYTES = 1 << 31
_MAX_VALUE = 500  # characters of a parameter
_RUN_FILES = ("run.json", "head.safetensors", "rows.bin", "history.csv", "environment.json")
_SWEEP_FILES = ("sweep.json", "trials.csv")
_PICTURES = ("confusion", "roc", "reliability")
_WITH_PATHS = {"mistakes", "false_negatives", "by", "against"}
"""Keys of an evaluation with paths, and with values of a table that may name patients."""

_NOT_MEASURED = _WITH_PATHS | {"confusion_matrix", "classes", "positive", "unseen", "wish"}
_OF_INTERVALS = {"confidence", "num_groups", "num_ungrouped", "few"}
_OF_TRIALS = {"trial", "state", "score", "fold_scores", "num_epochs", "best_epoch", "lowest_loss"}


@dataclass(frozen=True)
class Part:
    """What is logged at once, or not at all if the tracker has it.

    Attributes:
        name: Unique in its run.
        params: Text by name.
        metrics: Name, step and value.
        files: Content by path in the tracker.
    """

    name: str
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Sequence[tuple[str, int, float]] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Of all that it holds."""
        files = {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}
        facts = [self.name, dict(self.params), [[*row] for row in self.metrics], files]
        return hashlib.sha256(canonical_json(facts).encode()).hexdigest()


@dataclass(frozen=True)
class Tracked:
    """A run as a tracker has it.

    Attributes:
        name: For people.
        key: What it is recognised by, hexadecimal digits and a suffix.
        parts: What is known of it.
        children: Trials of a sweep, folds of a cross-validation, heads of an ensemble.
    """

    name: str
    key: str
    parts: Sequence[Part]
    children: Sequence[Tracked] = ()


def read_tracked(path: str | Path, model: str | Path | None, *, has_paths: bool) -> Tracked:
    """Return what there is to log of the folder of a run, a sweep or a cross-validation.

    Args:
        path: The folder.
        model: What ``export`` made of the run, or None.
        has_paths: Whether paths of images are a part of it.

    Raises:
        RunError: If the folder is none of these, or damaged.
        ConfigError: If ``model`` was not exported from this run.
    """
    folder = local_path(path, "run")
    if (folder / "crossval.json").is_file() and not (folder / "run.json").exists():
        if model is not None:
            raise ConfigError(
                "--model", expected="a run", found="the folder of a cross-validation",
                where=folder, hint=f"Log {ENSEMBLE_NAME} in it, if it was kept, or leave it out",
            )  # fmt: skip
        return _crossval(folder, has_paths=has_paths)
    run = load_run(folder)
    histories = read_histories(run)
    children = [*_trials(run), *(_members(run, histories) if run.members else [])]
    extra = [] if model is None else [_model(run, Path(model))]
    return Tracked(
        folder.resolve().name, run.weights_sha256,
        [*_run_parts(run, histories, has_paths=has_paths), *extra], children,
    )  # fmt: skip


def _run_parts(run: Run, histories: Sequence[History], *, has_paths: bool) -> Iterator[Part]:
    curves = [*_curves(histories[0])] if len(histories) == 1 else []
    files = _files(run.path, _RUN_FILES, "run/")
    yield Part("training", _run_params(run), curves, files)
    yield from _optional("losses", _files(run.path, ["loss_curves.png"]))
    yield from _optional("sweep", _files(run.path, _SWEEP_FILES, "run/"))
    for path in sorted((run.path / "evaluation").glob("*.json")):
        yield from _evaluation(path, has_paths=has_paths)
    if (decisions := load_decisions(run)) is not None:
        facts = {safe_name(name): rule for name, rule in decisions.brief().items()}
        yield Part("decision", metrics=[*_flat(facts, "decision")],
                   files=_files(run.path, ["decision.json"], "run/"))  # fmt: skip
    yield from _optional("audit", _verdicts(run))
    if has_paths:
        yield from _optional("report", _files(run.path, ["report.html"]))


def _optional(name: str, files: Mapping[str, bytes]) -> Iterator[Part]:
    if files:
        yield Part(name, files=files)


def _files(folder: Path, names: Sequence[str], prefix: str = "") -> dict[str, bytes]:
    """Return the files that there are; a link or a pipe is none."""
    found = {}
    for name in names:
        if (folder / name).is_file() and not (folder / name).is_symlink():
            found[prefix + name] = read_regular(folder / name, max_bytes=_MAX_BYTES)
    return found


def _run_params(run: Run) -> dict[str, str]:
    facts: dict[str, Any] = {"head": run.head.as_json(), "training": dict(run.training)}
    facts["training"].pop("strengths", None)  # a curve, and long
    facts |= {"seed": run.seed, "data_seed": run.data_seed, "task": run.task}
    facts |= {"classes": list(run.classes), "num_members": run.num_members}
    facts["weights_sha256"] = run.weights_sha256
    for number, cache in enumerate(run.caches):
        name = "cache" if len(run.caches) == 1 else f"cache{number}"
        kept = ("fingerprint", "payload_sha256", "num_failed", "weights_source")
        facts[name] = {key: cache[key] for key in kept if key in cache}
        facts[name] |= {"identity": cache["identity"]}
    return dict(_params(facts))


def _params(facts: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        name = f"{before}{safe_name(key)}"
        if isinstance(value, Mapping):
            yield from _params(value, f"{name}.")
            continue
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        yield name, text if len(text) <= _MAX_VALUE else f"{text[: _MAX_VALUE - 3]}..."


def _curves(history: History) -> Iterator[tuple[str, int, float]]:
    """Yield the columns of a history: by epoch or, of a linear probe, by the strength's place."""
    of_path = history.step == "strength"
    columns = {**({"strength": history.steps} if of_path else {}), **history.columns}
    for name, values in columns.items():
        for place, value in enumerate(values):
            step = place + 1 if of_path else int(history.steps[place])
            yield f"training/{safe_name(name)}", step, value


def _evaluation(path: Path, *, has_paths: bool) -> Iterator[Part]:
    """Yield the figures of a split; a file that is no evaluation is left out."""
    name = safe_name(path.stem)
    facts = optional_json_object(path, max_bytes=_MAX_BYTES)
    if not {"split", "accuracy", "fingerprint"} <= facts.keys():
        return
    measured = {key: value for key, value in facts.items() if key not in _NOT_MEASURED}
    intervals = measured.pop("intervals", None)
    metrics = [*_flat(measured, name)]
    if isinstance(intervals, dict):
        kept = {key: value for key, value in intervals.items() if key not in _OF_INTERVALS}
        metrics += _flat(kept, name)
    files = _files(path.parent, [f"{path.stem}_{kind}.png" for kind in _PICTURES], "evaluation/")
    files[f"evaluation/{path.name}"] = readable_json(
        facts if has_paths else _without_paths(facts)
    ).encode()
    yield Part(f"evaluation/{name}", metrics=metrics, files=files)


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(v) for key, v in value.items() if key not in _WITH_PATHS}
    return [_without_paths(v) for v in value] if isinstance(value, list) else value


def _flat(value: Any, name: str) -> Iterator[tuple[str, int, float]]:
    """Yield numbers of JSON by the names on the way to them; of an interval both ends."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        if math.isfinite(value):
            yield name, 0, float(value)
    elif isinstance(value, list):
        if len(value) == 2 and all(type(end) in {int, float} for end in value):
            for end, number in zip(("low", "high"), value, strict=True):
                yield from _flat(number, f"{name}_{end}")
    elif isinstance(value, dict):
        if {"mean", "low", "high"} <= value.keys():
            yield from _flat(value["mean"], name)
            yield from _flat([value["low"], value["high"]], name)
            return
        for key, inner in value.items():
            if key not in _NOT_MEASURED:
                yield from _flat(inner, f"{name}/{safe_name(key)}")


def safe_name(name: str) -> str:
    """Return a name as trackers take it: ASCII letters, digits, ``_-.`` and spaces.

    One that had to be changed ends in a hash, so that two names stay two.
    """
    safe = re.sub(r"[^\w\-. ]", "_", name, flags=re.ASCII)[:60].strip(" .")
    if safe == name and safe:
        return safe
    return f"{safe}_{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def _verdicts(run: Run) -> dict[str, bytes]:
    """Return the verdicts of audits of the run's own caches, where these are at hand."""
    files = {}
    with contextlib.suppress(FeatcacheError):
        fetch_caches(run)
    for number, (path, facts) in enumerate(zip(cache_paths(run), run.caches, strict=True)):
        try:
            cache = open_cache(path, verify=False)
        except (FeatcacheError, OSError):
            continue
        if cache.payload_sha256 == facts.get("payload_sha256") and (found := read_verdict(cache)):
            name = "audit.json" if len(run.caches) == 1 else f"audit{number}.json"
            files[name] = readable_json(found).encode()
    return files


def _trials(run: Run) -> Iterator[Tracked]:
    for row in read_table(run.path / "trials.csv"):
        if not row.keys() >= _OF_TRIALS:
            return
        metrics = []
        for key in ("score", "num_epochs", "lowest_loss"):
            metrics += _numbers(key, row[key], is_curve=False)
        metrics += _numbers("fold_score", row["fold_scores"], is_curve=True)
        metrics += _numbers("best_epoch", row["best_epoch"], is_curve=True)
        params = {key: value for key, value in row.items() if key not in _OF_TRIALS}
        params["state"] = row["state"]
        number = safe_name(row["trial"])
        part = Part("trial", dict(_params(params)), metrics)
        yield Tracked(f"trial {number}", f"{run.weights_sha256}/trial/{number}", [part])


def _numbers(name: str, cell: str, *, is_curve: bool) -> list[tuple[str, int, float]]:
    try:
        values = [float(text) for text in cell.split()]
    except ValueError:
        return []
    values = values if is_curve or len(values) == 1 else []
    start = 1 if is_curve else 0
    return [(name, n, value) for n, value in enumerate(values, start) if math.isfinite(value)]


def _members(run: Run, histories: Sequence[History]) -> Iterator[Tracked]:
    """Yield the heads of an ensemble."""
    for number, facts in enumerate(run.members):
        history = histories[number : number + 1]
        yield _head(run.weights_sha256, number, facts, history)


def _head(
    key: str, number: int, facts: Mapping[str, Any], histories: Sequence[History]
) -> Tracked:  # fmt: skip
    names = ("repeat", "fold")
    name = " ".join(f"{which} {facts[which]}" for which in names if which in facts)
    curves = [row for history in histories for row in _curves(history)]
    measured = {key: value for key, value in facts.items() if key not in names}
    metrics = [*_flat(measured, "fold")]
    params = {which: facts[which] for which in names if which in facts}
    part = Part("training", dict(_params(params)), [*curves, *metrics])
    return Tracked(name or f"head {number + 1}", f"{key}/head/{number}", [part])


def _crossval(folder: Path, *, has_paths: bool) -> Tracked:
    facts, predictions = read_crossval(folder)
    ensemble, histories, children = folder / ENSEMBLE_NAME, list[History](), list[Tracked]()
    key = facts["sha256"]
    if "ensemble_weights_sha256" in facts and ensemble.is_dir():
        run = load_run(ensemble)
        histories = read_histories(run)
        parts = [*_run_parts(run, histories, has_paths=has_paths)]
        children.append(Tracked(ENSEMBLE_NAME, run.weights_sha256, parts))
    for number, fold in enumerate(facts["per_fold"]):
        its_own = [
            history for history in histories
            if history.member == {"repeat": fold.get("repeat"), "fold": fold.get("fold")}
        ]  # fmt: skip
        children.append(_head(key, number, fold, its_own))
    left_out = {"per_fold", "mean", "pooled", "cache", "caches", "format", "format_version"}
    params = {name: value for name, value in facts.items() if name not in left_out}
    for name in ("fingerprint", "content_sha256"):
        params[f"cache.{name}"] = str(facts["cache"].get(name))
    files = {"crossval.json": readable_json(facts).encode()}
    if has_paths:
        files["predictions.csv"] = predictions
    metrics = [*_flat(facts["mean"], "mean")]
    part = Part("crossval", dict(_params(params)), metrics, files)
    return Tracked(folder.resolve().name, key, [part], children)


def _model(run: Run, model: Path) -> Part:
    """Return what ``export`` made of this run: an ONNX file, or a folder with its card."""
    names = ["model.onnx", "head.safetensors", "config.json", "predict.py", "README.md"]
    files = (
        _files(model, names, "model/") if model.is_dir()
        else _files(model.parent, [model.name], "model/")
    )  # fmt: skip
    networks = [data for name, data in files.items() if name.endswith(".onnx")]
    if not networks or any(run.weights_sha256.encode() not in data for data in networks):
        found = "none" if not networks else "one of another run"
        raise ConfigError(
            "--model", expected="an ONNX file of this run, or the folder with it", found=found,
            where=model, hint="Make it with featcache export RUN FILE.onnx",
        )  # fmt: skip
    return Part("model", files=files)
