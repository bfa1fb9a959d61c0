"""The run: a folder with a trained head, or several and their mean, and what it was trained on.

``RUN/run.json`` holds the configuration, the classes and the cache's fingerprint and identity;
``head.safetensors`` the weights; ``rows.bin`` hashes of the rows trained on (``trained_rows``);
``history.csv`` a row per epoch; ``environment.json`` the machine.
The weights' sha256 stands in ``run.json``, the weights carry head and classes with them, and
``run.json`` bears its own hash, ``sha256`` of the canonical JSON of its other keys: a changed mean
or image size would only show as wrong predictions. Nothing that featcache does depends on
``history.csv``, ``environment.json`` or ``evaluation/``, which are for people: they are not
checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featcache.cache.by_url import by_url
from featcache.cache.container import is_container
from featcache.cache.contents import TASKS
from featcache.errors import ConfigError, RunError, printable
from featcache.files import (
    canonical_json,
    json_sha256,
    local_path,
    optional_json_object,
    read_regular,
)
from featcache.formatting import join_few
from featcache.heads.head import HeadConfig, build_head, run_layout, split_members
from featcache.untrusted import find_fault, parse_json_object, reading_hint, why_no_file

if TYPE_CHECKING:
    from torch import nn

FORMAT = "featcache-run"
FORMAT_VERSION, ENSEMBLE_VERSION, SEVERAL_CACHES_VERSION = 1, 2, 3
"""Of run.json: 2 if it has ``members``, 3 if it has ``caches`` (and ``members`` or not), so that an
earlier featcache, which would read the first alone, refuses it."""
WEIGHTS_NAME = "head.safetensors"

_KEYS = {
    "format", "format_version", "head", "training", "seed", "data_seed", "classes", "cache",
    "weights_sha256",
}  # fmt: skip
_MAX_JSON_BYTES = 2**28
_MAX_WEIGHTS_BYTES = 2**31
_COPY_AGAIN = "copy it again, or train it again"
_NO_RUN = "Make it with featcache train, or name FOLDER/ensemble of crossval --keep-ensemble"
_DAMAGED = f"The run is damaged or was edited: {_COPY_AGAIN}"


@dataclass(frozen=True)
class Run:
    """A loaded run.

    Attributes:
        path: The folder.
        head: The shape of the head.
        state: The head's weights by their names in its state dict, as NumPy arrays.
        training: How it was trained, a JSON object.
        seed: Decided the initial weights and dropout.
        data_seed: Decided the order of the rows, and the hold-out if there was one.
        classes: Names of the head's outputs, in order.
        task: ``multiclass``, or ``multilabel``: an output per class is a question of its own.
        cache: ``path`` (relative to the folder where possible), ``fingerprint``, ``identity``,
            ``payload_sha256`` and ``num_failed`` of the cache it was trained on, and the backbone's
            ``weights_source`` if that is ``random``.
        caches: The same of all caches, in the order of their features, with ``num_features`` where
            there are several.
        weights_sha256: sha256 of ``head.safetensors``.
        members: Of an ensemble how each of its heads was trained, else empty. ``head`` is the shape
            of each, and ``state`` has ``members.0.0.weight`` and so on.
    """

    __module__ = "featcache"

    path: Path
    head: HeadConfig
    state: dict[str, npt.NDArray[Any]]
    training: dict[str, Any]
    seed: int
    data_seed: int
    classes: tuple[str, ...]
    cache: dict[str, Any]
    weights_sha256: str
    task: str = "multiclass"
    members: tuple[dict[str, Any], ...] = ()
    caches: tuple[dict[str, Any], ...] = ()

    @property
    def num_members(self) -> int:
        """How many heads the mean of the probabilities is of: 1 without an ensemble."""
        return max(len(self.members), 1)

    def __repr__(self) -> str:
        hidden = ", ".join(map(str, self.head.hidden)) or "none"
        hidden += f"; mean of {self.num_members} heads" * bool(self.members)
        names = " + ".join(str(cache["identity"].get("backbone")) for cache in self.caches)
        backbone = printable(names)[:60]
        return (
            f"Run({printable(self.path.name)}: {join_few(self.classes)}; hidden {hidden}; "
            f"{self.head.num_features:,} features of {backbone})"
        )


def is_run(path: Path) -> bool:
    """Return whether ``path`` is the folder of a run, of any version, damaged or not."""
    facts = optional_json_object(path / "run.json", max_bytes=_MAX_JSON_BYTES)
    return facts.get("format") == FORMAT


@by_url("path")
def load_run(path: str | Path) -> Run:
    """Load a run and check it: format, version, the weights' sha256 before they are parsed.

    Raises:
        RunError: If something is missing, damaged, edited or of a newer version.
    """
    folder = local_path(path, "run")
    facts = _read_facts(folder)
    try:
        head = HeadConfig.from_json(facts["head"])
    except ConfigError as error:
        raise _damaged(folder, "head", error.expected, error.found) from error
    classes = facts["classes"]
    named = all(isinstance(name, str) for name in classes) and len(set(classes)) == len(classes)
    if not named or len(classes) != head.num_classes:
        raise _damaged(folder, "classes", f"{head.num_classes} different names", classes)
    for name in classes:
        if fault := find_fault(name, is_class=True):
            raise _damaged(folder, "classes", "names in UTF-8, without NUL", fault)
    task = facts.get("task", "multiclass")  # the first runs do not say
    if task not in TASKS:
        raise _damaged(folder, "task", " or ".join(TASKS), task)
    members = tuple(facts.get("members", ()))
    return Run(
        path=folder,
        head=head,
        state=_read_weights(
            folder, facts["weights_sha256"], head, classes, task, max(len(members), 1)
        ),
        training=facts["training"],
        seed=facts["seed"],
        data_seed=facts["data_seed"],
        classes=tuple(classes),
        cache=facts["cache"],
        weights_sha256=facts["weights_sha256"],
        task=task,
        members=members,
        caches=tuple(_read_caches(folder, facts, head)),
    )


def load_head(run: Run | str | Path) -> nn.Sequential:
    """Return the trained head of a run as a torch module, without the backbone.

    Args:
        run: The run folder, or what ``load_run`` returned.

    Returns:
        Features (B, D) float32 -> logits (B, C); on the CPU, in eval mode. That of an ensemble has
        one layer, ``members``; softmax (sigmoid) of its logits is the mean of its heads'
        probabilities.

    Raises:
        RunError: If the folder is not a whole run.

    Example:
        >>> head = featcache.load_head("run")  # doctest: +SKIP
    """
    import torch

    loaded = run if isinstance(run, Run) else load_run(run)
    heads = []
    for state in split_members(loaded.state):
        heads.append(build_head(loaded.head, seed=0))
        heads[-1].load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    if not loaded.members:
        return heads[0].eval()
    from featcache.heads.ensemble import mean_of_heads

    return mean_of_heads(heads, loaded.task).eval()


def _name_run(folder: Path) -> str:
    """Return what to name in place of a folder without run.json, for a message."""
    if not (folder / "crossval.json").is_file():
        return _NO_RUN
    ensemble = folder / "ensemble"
    if is_run(ensemble):
        return f"It is of a cross-validation: name its run, {ensemble.as_posix()}"
    return (
        "It is of a cross-validation without --keep-ensemble: name a run of featcache train, or "
        "repeat crossval with it"
    )


def _read_facts(folder: Path) -> dict[str, Any]:
    try:
        facts = parse_json_object(read_regular(folder / "run.json", max_bytes=_MAX_JSON_BYTES))
    except OSError as error:
        found = error.strerror
        if isinstance(error, FileNotFoundError):
            found = "a folder without it" if folder.is_dir() else "nothing"
        elif is_container(folder):
            found = "a cache, which is one file"
        elif isinstance(error, NotADirectoryError):
            found = why_no_file(folder) or "a file"
        raise RunError(
            "run", expected="a folder with run.json", found=found, where=folder,
            hint=reading_hint(error, _name_run(folder)),
        ) from error  # fmt: skip
    except ValueError as error:
        raise _damaged(folder, "run.json", "a JSON object", error) from error
    if facts.get("format") != FORMAT:
        raise _damaged(folder, "run.json", f"format {FORMAT}", "another")
    version = facts.get("format_version")
    if type(version) is not int or version < 1:
        raise _damaged(folder, "format_version", "a whole number from 1", version)
    if version > SEVERAL_CACHES_VERSION:
        raise RunError(
            "run", expected=f"format version {SEVERAL_CACHES_VERSION} or lower",
            found=f"version {version}",
            where=folder, hint="A newer featcache wrote it: upgrade with pip install -U featcache",
        )  # fmt: skip
    if not _is_as_written(facts):
        raise _damaged(folder, "run.json", "its own sha256", "another")
    kinds = {
        "head": dict, "training": dict, "seed": int, "data_seed": int, "classes": list,
        "cache": dict, "weights_sha256": str,
    }  # fmt: skip
    for key, kind in kinds.items():
        if not isinstance(facts.get(key), kind):
            raise _damaged(folder, key, f"a JSON {kind.__name__}", facts.get(key))
    for key in ("seed", "data_seed"):
        _check_number(folder, key, facts[key])
    _check_cache_facts(folder, "cache", facts["cache"])
    _check_members(folder, version, facts.get("members"))
    return facts


def _check_cache_facts(folder: Path, what: str, cache: Any) -> None:
    if not isinstance(cache, dict):
        raise _damaged(folder, what, "a JSON object", cache)
    for key, kind in {"path": str, "fingerprint": str, "identity": dict}.items():
        if not isinstance(cache.get(key), kind):
            raise _damaged(folder, f"{what}.{key}", f"a JSON {kind.__name__}", cache.get(key))
    _check_number(folder, f"{what}.num_failed", cache.get("num_failed", 0))


def _check_number(folder: Path, what: str, number: Any) -> None:
    if type(number) is not int or not 0 <= number < 1 << 63:
        raise _damaged(folder, what, "a whole number from 0 to below 2**63", number)


def _read_caches(folder: Path, facts: Mapping[str, Any], head: HeadConfig) -> list[dict[str, Any]]:
    """Return the facts of all caches of a run: ``cache`` alone, or ``caches``."""
    caches = facts.get("caches")
    if facts["format_version"] != SEVERAL_CACHES_VERSION and caches is None:
        return [facts["cache"]]
    if not isinstance(caches, list) or len(caches) < 2:
        raise _damaged(folder, "caches", "two or more", caches)
    if facts["format_version"] != SEVERAL_CACHES_VERSION:
        wanted = f"format version {SEVERAL_CACHES_VERSION}"
        raise _damaged(folder, "caches", wanted, f"version {facts['format_version']}")
    for number, cache in enumerate(caches):
        _check_cache_facts(folder, f"caches.{number}", cache)
        _check_number(folder, f"caches.{number}.num_features", cache.get("num_features"))
    num_features = sum(cache["num_features"] for cache in caches)
    if num_features != head.num_features:
        raise _damaged(folder, "caches", f"{head.num_features} features together", num_features)
    if caches[0]["fingerprint"] != facts["cache"]["fingerprint"]:
        raise _damaged(folder, "caches", "the cache first", "another")
    return caches


def _check_members(folder: Path, version: int, members: object) -> None:
    is_ensemble = (
        isinstance(members, list)
        and len(members) > 1
        and all(isinstance(member, dict) for member in members)
    )
    has_members = version == ENSEMBLE_VERSION or members is not None
    if has_members and not (is_ensemble and version > FORMAT_VERSION):
        raise _damaged(folder, "members", "a JSON object for each of two or more heads", members)


def _is_as_written(facts: Mapping[str, Any]) -> bool:
    """Whether run.json bears its own hash; the first runs had none, only the fingerprint."""
    if set(facts) != _KEYS:
        return json_sha256(facts, without="sha256") == facts.get("sha256")
    cache = facts["cache"]
    identity, fingerprint = (
        (cache.get("identity"), cache.get("fingerprint")) if isinstance(cache, dict) else (0, 0)
    )
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest() == fingerprint


def _read_weights(  # noqa: PLR0917 (what the file is to be of)
    folder: Path,
    sha256: str,
    head: HeadConfig,
    classes: Sequence[str],
    task: str,
    num_members: int,
) -> dict[str, npt.NDArray[Any]]:
    from safetensors import SafetensorError
    from safetensors import numpy as safetensors

    try:
        data = read_regular(folder / WEIGHTS_NAME, max_bytes=_MAX_WEIGHTS_BYTES)
    except OSError as error:
        raise RunError(
            f"run, {WEIGHTS_NAME}", expected="a readable file", found=error.strerror, where=folder,
            hint=reading_hint(error, _COPY_AGAIN.capitalize()),
        ) from error  # fmt: skip
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise _damaged(folder, WEIGHTS_NAME, f"sha256 {sha256[:16]}...", f"{found[:16]}...")
    try:
        state: dict[str, npt.NDArray[Any]] = safetensors.load(data)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that NumPy lacks
        raise _damaged(folder, WEIGHTS_NAME, "a safetensors file", error) from error
    try:
        header = parse_json_object(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except ValueError as error:
        raise _damaged(folder, WEIGHTS_NAME, "a header as featcache writes it", error) from error
    if header.get("__metadata__") != weights_metadata(head, classes, task, num_members):
        found = "others in run.json"
        raise _damaged(folder, WEIGHTS_NAME, "the head, classes and task it was saved with", found)
    layout = run_layout(head, num_members)
    if {name: (value.dtype, value.shape) for name, value in state.items()} != layout:
        raise _damaged(folder, WEIGHTS_NAME, "the entries of the head in run.json", "others")
    if not all(np.isfinite(value).all() for value in state.values()):
        raise _damaged(folder, WEIGHTS_NAME, "finite weights", "NaN or infinity")
    for name, value in state.items():  # the square root of less is NaN
        if name.endswith("running_var") and (value < 0).any():
            raise _damaged(folder, WEIGHTS_NAME, "variances from 0", f"{value.min()} in {name}")
    return {name: state[name] for name in layout}  # safetensors' order is another each time


def weights_metadata(
    head: HeadConfig, classes: Sequence[str], task: str, num_members: int
) -> dict[str, str]:
    """Return what the weights file says about the head in it.

    It has one key only: safetensors writes several in no fixed order, and the bytes are hashed. The
    task is named if it is not ``multiclass``, and the number of members if there are several, so
    that an earlier featcache refuses such heads and reads all others.
    """
    facts: dict[str, Any] = {"head": head.as_json(), "classes": list(classes)}
    if task != "multiclass":
        facts["task"] = task
    if num_members > 1:
        facts["members"] = num_members
    return {"featcache": canonical_json(facts)}


def _damaged(folder: Path, what: str, expected: object, found: object) -> RunError:
    brief = str(found)[:200]
    return RunError(f"run, {what}", expected=expected, found=brief, where=folder, hint=_DAMAGED)
