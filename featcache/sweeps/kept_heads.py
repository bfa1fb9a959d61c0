"""The heads of the folds until there are all, and then their mean as a run.

Reads, writes: ``heads.bin``, the heads' values one after the other. Writes: a run.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featcache.files import disk_error, read_regular, sync_file
from featcache.heads.head import HeadConfig, state_layout
from featcache.heads.rows import Part
from featcache.heads.run_writing import record_ensemble
from featcache.runtime import Device
from featcache.sweeps.folds import Pool
from featcache.sweeps.journal import Journal

if TYPE_CHECKING:
    from featcache.sweeps.fold_heads import Fold, FoldPlan

HEADS_NAME = "heads.bin"


class KeptHeads:
    """A file with the heads that are trained, of which a journal has the hashes.

    Args:
        path: The file, which need not be there.
        config: The shape of the heads.
    """

    def __init__(self, path: Path, config: HeadConfig) -> None:
        self._path = path
        self._layout = [
            (name, np.dtype(dtype), shape) for name, (dtype, shape) in state_layout(config).items()
        ]
        self._size = sum(
            dtype.itemsize * int(np.prod(shape, dtype=np.int64)) for _, dtype, shape in self._layout
        )

    def write(self, number: int, state: Mapping[str, npt.NDArray[Any]]) -> str:
        """Write a head after ``number`` others, there for good when this returns.

        Returns:
            The sha256 of its values.

        Raises:
            CacheError: If the disk is full.
        """
        data = b"".join(state[name].astype(dtype).tobytes() for name, dtype, _ in self._layout)
        try:
            with self._path.open("ab") as file:
                file.truncate(number * self._size)  # a kill may have left some of this one
                file.write(data)
                file.flush()
                sync_file(file.fileno(), self._path)
        except OSError as error:
            raise disk_error(error, self._path, len(data)) from error
        return hashlib.sha256(data).hexdigest()

    def read(self, journal: Journal) -> list[dict[str, npt.NDArray[Any]]]:
        """Return the state dicts of the heads that a journal has.

        Raises:
            ConfigError: If one of them is not there, or is another.
        """
        if not journal.entries:
            return []
        try:
            data = read_regular(self._path, max_bytes=(len(journal.entries) + 1) * self._size)
        except OSError as error:
            raise journal.damaged(f"{HEADS_NAME}: {error.strerror}") from error
        heads = []
        for number, entry in enumerate(journal.entries):
            part = data[number * self._size : (number + 1) * self._size]
            if hashlib.sha256(part).hexdigest() != entry.get("head_sha256"):
                raise journal.damaged(f"{HEADS_NAME} with another head {number + 1}")
            history = entry.get("history")
            if (
                not isinstance(history, list)
                or not history
                or not all(isinstance(row, list) and len(row) == len(history[0]) for row in history)
            ):
                raise journal.damaged(f"no history of head {number + 1}")
            heads.append(self._unpack(part))
        return heads

    def _unpack(self, data: bytes) -> dict[str, npt.NDArray[Any]]:
        state, offset = {}, 0
        for name, dtype, shape in self._layout:
            number = int(np.prod(shape, dtype=np.int64))
            state[name] = np.frombuffer(data, dtype, number, offset).reshape(shape)
            offset += number * dtype.itemsize
        return state


def write_ensemble(  # noqa: PLR0917 (where, and what was done)
    partial: Path, target: Path, pool: Pool, parts: Sequence[Part], plan: FoldPlan,
    folds: Sequence[Fold], entries: Sequence[Mapping[str, Any]],
    heads: Sequence[Mapping[str, npt.NDArray[Any]]], device: Device,
) -> str:  # fmt: skip
    """Write the mean of the folds' heads as a run and return the sha256 of its weights.

    Args:
        partial: Where it is written; made here.
        target: Where it will be.
        pool: The rows.
        parts: The splits that they are of, in the same order.
        plan: How the heads were trained.
        folds: All of them.
        entries: What became of each: see ``FoldPlan.fit``.
        heads: Their state dicts.
        device: Where they were trained.
    """
    partial.mkdir()
    members = [
        {"repeat": fold.repeat, "fold": fold.number} | plan.head_facts(fold, entry)
        for fold, entry in zip(folds, entries, strict=True)
    ]
    history = [
        {"repeat": entry["repeat"], "fold": entry["fold"]}
        | dict(zip(entry["history"][0], row, strict=True))
        for entry in entries for row in entry["history"][1:]
    ]  # fmt: skip
    training = plan.training.as_json() | {
        "valid_fraction": plan.share, "folds": plan.num_folds, "repeats": plan.num_repeats,
    }  # fmt: skip
    return record_ensemble(
        partial, target, pool.cache, head=plan.head, states=heads, members=members,
        training=training, seed=plan.seed, data_seed=plan.data_seed, device=device,
        parts=_seen_parts(parts, folds), history=history,
    )  # fmt: skip


def _seen_parts(parts: Sequence[Part], folds: Sequence[Fold]) -> list[Part]:
    """Return the rows that any head was trained on, and the others that any was chosen by."""
    num_rows = sum(len(part.rows) for part in parts)
    trained, chosen = np.zeros((2, num_rows), bool)
    for fold in folds:
        trained[fold.train] = chosen[fold.valid] = True
    seen, start = list[Part](), 0
    for part in parts:
        own = slice(start, start + len(part.rows))
        for name, mask in (("train", trained), ("valid", chosen & ~trained)):
            seen.append(dataclasses.replace(part, name=name, rows=part.rows[mask[own]]))
        start = own.stop
    return seen
