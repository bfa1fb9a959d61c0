"""A training that was interrupted goes on: its state is kept in a file, at most once a minute.

The file has all that decides the steps to come (weights, moments, running statistics, the states
of all generators) and what was found so far (history, the weights of the best epoch). It is read
like a stranger's: no pickle, every name, shape and number checked.

Reads and writes: ``RUN.partial/training.safetensors``.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from featcache import __version__
from featcache.errors import FeatcacheError, RunError, printable, warn_user
from featcache.files import canonical_json, json_sha256, read_regular, write_bytes
from featcache.heads.config import FitResult
from featcache.renames import remove_temporaries
from featcache.runtime import Say, log_line
from featcache.untrusted import parse_json_object, reading_hint

STATE_NAME = "training.safetensors"
SAVE_SECONDS = 60.0
"""Least time between two saves. A save takes 20 ms for the default head (11 MB) on a local disk."""

_FORMAT, _FORMAT_VERSION = "featcache-training", 1
_FACTS = "facts"  # the name of the array that holds the JSON
_MAX_BYTES = 1 << 32

Array: TypeAlias = npt.NDArray[Any]
Generator: TypeAlias = np.random.Generator | np.random.RandomState
Snapshot: TypeAlias = tuple[dict[str, Array], list[Generator]]
"""Arrays that decide the steps to come, by name, and the generators that do, themselves."""


class Trainer(Protocol):
    """What trains one head: ``HeadGroup`` or ``StackTrainer``."""

    def snapshot(self) -> Snapshot:
        """Return all that decides the steps to come; arrays may be those in use."""

    def restore(self, arrays: Mapping[str, Array]) -> None:
        """Go on from the arrays of a snapshot."""

    def state(self, place: int) -> dict[str, Array]:
        """Return a copy of a head's state dict."""


def read_saved(file: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return the arrays of a saved training, and its facts: ``work``, ``history`` and more.

    Raises:
        FileNotFoundError: If there is none.
        RunError: If it cannot be read or is damaged.
    """
    from safetensors import SafetensorError
    from safetensors import numpy as safetensors

    try:
        data = read_regular(file, max_bytes=_MAX_BYTES)
    except FileNotFoundError:
        raise
    except OSError as error:  # of the disk: it may pass
        _refuse(file, error.strerror, reading_hint(error, "Begin anew with --overwrite"))
    try:
        arrays: dict[str, Array] = safetensors.load(data)
        facts = parse_json_object(arrays.pop(_FACTS).tobytes())
        is_whole = (
            facts["sha256"] == json_sha256(facts, without="sha256")
            and facts["arrays_sha256"] == _hash_arrays(arrays)
        )  # fmt: skip
        is_known = (facts["format"], facts["format_version"]) == (_FORMAT, _FORMAT_VERSION)
        work = facts["work"]
    except (SafetensorError, ValueError, LookupError, TypeError):
        _refuse(file, "another file, or a damaged one")
    if not is_whole or not is_known or not isinstance(work, dict):
        _refuse(file, "a damaged one, or one of another version")
    return arrays, facts


def _refuse(
    file: Path, found: object, hint: str = "It cannot be resumed; begin anew with --overwrite"
) -> NoReturn:
    raise RunError("unfinished training", expected="its state", found=found, where=file, hint=hint)


class SavedTraining:
    """The file with the state of a training of one head, resumed or to be begun.

    Make it while holding the lock of the file's folder.

    Args:
        file: The file.
        work: A JSON object: all that decides the training, but what ``load`` is given.
        replace: Begin anew where the file is of other work, or damaged.
        say: Told when a training goes on.

    Raises:
        RunError: If the file is of other work (says of which) or damaged, unless ``replace``.
    """

    def __init__(
        self, file: Path, work: Mapping[str, Any], *, replace: bool = False, say: Say = log_line
    ) -> None:
        self._file, self._replace, self._say = file, replace, say
        self._work: dict[str, Any] = {"version": __version__, **work}
        self._last, self._can_write = time.monotonic(), True
        self._arrays: dict[str, Array] = {}
        self._facts: dict[str, Any] = {}
        if file.parent.is_dir():
            remove_temporaries(file)
        try:
            self._read()
        except RunError as error:
            self._begin_anew(error)

    def _begin_anew(self, error: RunError) -> None:
        """Forget what was read if that is allowed, else raise what is wrong with it."""
        if not self._replace:
            raise error
        self._arrays, self._facts = {}, {}
        self._say("the unfinished training that was there is replaced")

    def _read(self) -> None:
        try:
            arrays, facts = read_saved(self._file)
        except FileNotFoundError:
            return
        wanted = json.loads(canonical_json(self._work))
        self._compare({key: value for key, value in facts["work"].items() if key != "how"}, wanted)
        self._arrays, self._facts = arrays, facts

    def _compare(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        keys = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
        if keys:
            begun, now = (
                ", ".join(f"{key} {_brief(side.get(key))}" for key in keys)
                for side in (found, wanted)
            )
            raise RunError(
                "unfinished training", expected=f"the command that began it: {begun}", found=now,
                where=self._file, hint="Repeat that command, or begin anew with --overwrite",
            )  # fmt: skip

    def load(
        self, trainer: Trainer, how: Mapping[str, Any], columns: Sequence[str], num_epochs: int
    ) -> tuple[list[dict[str, Any]], dict[str, Array]]:
        """Let a trainer go on from what was kept; return the history and the best epoch's weights.

        Args:
            trainer: One that has taken no step.
            how: What else decides the training, a JSON object; it is kept with the rest.
            columns: Of the history.
            num_epochs: The most that there will be.

        Returns:
            No rows and no weights where nothing was kept.

        Raises:
            RunError: As the class itself does.
        """
        self._work["how"] = dict(how)
        facts, arrays, self._facts, self._arrays = self._facts, self._arrays, {}, {}
        if not facts:
            return [], {}
        try:
            self._compare(facts["work"].get("how") or {}, json.loads(canonical_json(dict(how))))
            history = self._check_history(facts.get("history"), columns, num_epochs)
            best = self._restore(trainer, arrays, facts.get("generators"))
        except RunError as error:
            self._begin_anew(error)
            return [], {}
        self._say(
            f"going on after epoch {len(history):,} of {num_epochs:,}, kept in "
            + printable(self._file.parent.name)
        )
        return history, best

    def _check_history(
        self, history: object, columns: Sequence[str], num_epochs: int
    ) -> list[dict[str, Any]]:
        if not isinstance(history, list) or not 1 <= len(history) < num_epochs:
            _refuse(self._file, "a history of another length")
        for epoch, row in enumerate(history, 1):
            is_row = isinstance(row, dict) and set(row) == set(columns)
            if not is_row or type(row["epoch"]) is not int or row["epoch"] != epoch:
                _refuse(self._file, f"another history in epoch {epoch}")
            for name, value in row.items():
                may_miss = name.startswith("valid_recall_")
                if not (_is_finite(value) or (may_miss and value is None)):
                    _refuse(self._file, f"no finite {name} in epoch {epoch}")
        return [{name: row[name] for name in columns} for row in history]

    def _restore(
        self, trainer: Trainer, arrays: Mapping[str, Array], states: object
    ) -> dict[str, Array]:
        steps, generators = trainer.snapshot()
        wanted = _join(steps, trainer.state(0))
        layouts = [
            {name: (array.dtype, array.shape) for name, array in side.items()}
            for side in (wanted, arrays)
        ]
        if layouts[0] != layouts[1] or not isinstance(states, list):
            _refuse(self._file, "that of another head")
        try:
            for generator, state in zip(generators, states, strict=True):
                set_generator_state(generator, state)
            trainer.restore({name: arrays[f"steps/{name}"] for name in steps})
        except (ValueError, TypeError, LookupError, OverflowError):
            _refuse(self._file, "generators that cannot be")
        return {name: arrays[f"best/{name}"].copy() for name in trainer.state(0)}

    def keep(self, trainer: Trainer, result: FitResult) -> None:
        """Write the state at an epoch's end, if it was not written within the last minute.

        A full disk does not stop the training: it is warned of, once.

        Args:
            trainer: Of one head.
            result: What was found so far.
        """
        if not self._can_write or time.monotonic() - self._last < SAVE_SECONDS:
            return
        from safetensors import numpy as safetensors

        steps, generators = trainer.snapshot()
        arrays = {n: np.asarray(a, order="C") for n, a in _join(steps, result.state).items()}
        facts: dict[str, Any] = {
            "format": _FORMAT, "format_version": _FORMAT_VERSION, "work": self._work,
            "history": result.history, "generators": [*map(generator_state, generators)],
            "arrays_sha256": _hash_arrays(arrays),
        }  # fmt: skip
        facts["sha256"] = json_sha256(facts, without="sha256")
        data = np.frombuffer(canonical_json(facts).encode(), np.uint8)
        try:
            write_bytes(self._file, safetensors.save(arrays | {_FACTS: data}))
        except (OSError, FeatcacheError) as error:
            self._can_write = False
            warn_user(f"an interrupted training could not be resumed: {error}")
        self._last = time.monotonic()


def _join(steps: Mapping[str, Array], best: Mapping[str, Array]) -> dict[str, Array]:
    return {f"steps/{n}": a for n, a in steps.items()} | {f"best/{n}": a for n, a in best.items()}


def _hash_arrays(arrays: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _is_finite(value: object) -> bool:
    if not isinstance(value, int | float) or type(value) is bool:
        return False
    return abs(value) <= sys.float_info.max


def _brief(value: object) -> str:
    text = value if isinstance(value, str) else canonical_json(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


# ---------------------------------------------------------------------------------- generators


def generator_state(generator: Generator) -> dict[str, Any]:
    """Return the state of one of NumPy's generators, MT19937 or PCG64, as JSON values."""
    state = _state_of(generator)
    inner = state["state"]
    if state["bit_generator"] == "MT19937":
        return {"key": inner["key"].tolist(), "pos": int(inner["pos"])}
    return {
        "state": f"{inner['state']:x}", "inc": f"{inner['inc']:x}",  # 128 bits: no JSON numbers
        "has_uint32": int(state["has_uint32"]), "uinteger": int(state["uinteger"]),
    }  # fmt: skip


def set_generator_state(generator: Generator, state: Mapping[str, Any]) -> None:
    """Set a generator to what ``generator_state`` returned.

    NumPy checks no bounds: a position behind the key's end would read foreign memory.

    Raises:
        ValueError, TypeError, KeyError, OverflowError: If it is no such state.
    """
    old = _state_of(generator)
    if old["bit_generator"] == "MT19937":
        key, position = state["key"], _whole(state["pos"], 624)
        if not isinstance(key, list) or len(key) != 624:
            raise ValueError("key")
        key = np.array([_whole(word, (1 << 32) - 1) for word in key], np.uint32)
        _set_state(generator, old | {"state": {"key": key, "pos": position}})
        return
    inner = {name: _whole(int(state[name], 16), (1 << 128) - 1) for name in ("state", "inc")}
    if not inner["inc"] % 2:
        raise ValueError("inc")
    whole = {
        "state": inner, "has_uint32": _whole(state["has_uint32"], 1),
        "uinteger": _whole(state["uinteger"], (1 << 32) - 1),
    }  # fmt: skip
    _set_state(generator, old | whole)


def _state_of(generator: Generator) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state(legacy=False)


def _set_state(generator: Generator, state: dict[str, Any]) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _whole(value: object, at_most: int) -> int:
    if type(value) is not int or not 0 <= value <= at_most:
        raise ValueError(value)
    return value
