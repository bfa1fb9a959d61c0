"""What an interrupted command has kept: an extraction, a training, a sweep or a cross-validation.

Reads: the folder it keeps it in, such as ``CACHE.partial``. Writes: nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featcache.files import result_as_dict
from featcache.formatting import brief_repr


@dataclass(frozen=True)
class UnfinishedInfo:
    """What an interrupted command has kept.

    Attributes:
        path: The folder: ``CACHE.partial``, ``RUN.partial``, ``RUN.sweep`` or ``FOLDER.partial``.
        command: ``extract``, ``train``, ``sweep`` or ``crossval``.
        output: The cache, run or folder that it will become.
        kept: How far it is. extract: ``num_images``, ``num_shards`` and, fixed at its start,
            ``engine, precision, batch_size, device``. train: ``num_epochs_done``, ``num_epochs``.
            sweep: ``num_trials_done``, ``num_trials``, ``num_repeats_done``, ``num_repeats``.
            crossval: ``num_folds_done`` of all repeats, ``num_folds``, ``num_repeats``.
        disk_bytes: Size of its files.
        next_step: How to go on, a sentence.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    path: Path
    command: str
    output: Path
    kept: dict[str, Any]
    disk_bytes: int
    next_step: str

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as JSON values."""
        return {"kind": f"unfinished {self.command}"} | result_as_dict(self)


def find_unfinished(path: Path) -> Path:
    """Return where an interrupted command keeps what it has of ``path``, if that is not there."""
    if path.exists():
        return path
    partials = [path.with_name(path.name + ending) for ending in (".partial", ".sweep")]
    return next((partial for partial in partials if partial.is_dir()), path)


def read_unfinished(folder: Path) -> UnfinishedInfo | None:
    """Return what an interrupted command has kept in a folder, None if none keeps anything there.

    Raises:
        CacheError: If an extraction's cannot be read.
        RunError: If a training's cannot be read.
        ConfigError: If a sweep's or a cross-validation's cannot be read.
    """
    describe = next((_READERS[name] for name in _READERS if (folder / name).is_file()), None)
    return None if describe is None else describe(folder)


def _extraction_info(folder: Path) -> UnfinishedInfo:
    from featcache.extraction.manifest import open_manifest

    manifest = open_manifest(folder / "manifest.json")
    facts = asdict(manifest.engine)
    kept = {
        "num_images": sum(receipt.num_rows for receipt in manifest.shards),
        "num_shards": len(manifest.shards),
        **{name: facts[name] for name in ("engine", "precision", "batch_size")},
        "device": facts["device_type"],
    }
    return _unfinished(folder, "extract", kept, "discard it with --rebuild")


def _parts_info(folder: Path) -> UnfinishedInfo:
    from featcache.extraction.workers.plans import read_parts, read_plan

    plan = read_plan(folder, patience=0)
    if plan is None:  # merged just now
        return _extraction_info(folder)
    parts = read_parts(folder, plan)
    receipts = [receipt for manifest in parts.values() for receipt in manifest.shards]
    done = [str(n) for n, manifest in parts.items() if manifest.facts_of_part.get("is_done")]
    kept = {
        "num_images": sum(receipt.num_rows for receipt in receipts),
        "num_shards": len(receipts),
        "num_parts": plan.num_parts,
        "parts_done": ", ".join(done) or "none",
        "parts_begun": ", ".join(str(n) for n in parts if str(n) not in done) or "none",
        **{name: asdict(plan.engine)[name] for name in ("engine", "precision", "batch_size")},
        "device": plan.engine.device_type,
    }
    return _unfinished(folder, "extract", kept, "discard it with --rebuild")


def _training_info(folder: Path) -> UnfinishedInfo:
    from featcache.heads.resuming import read_saved

    _, facts = read_saved(folder / "training.safetensors")
    history, training = facts.get("history"), facts["work"].get("training")
    kept = {
        "num_epochs_done": len(history) if isinstance(history, list) else None,
        "num_epochs": training.get("epochs") if isinstance(training, dict) else None,
    }
    return _unfinished(folder, "train", kept, "begin anew with --overwrite")


def _journal_info(folder: Path) -> UnfinishedInfo:
    from featcache.sweeps.journal import read_journal

    work, entries = read_journal(folder / "journal.jsonl")
    if work.get("format") == "featcache-crossval":
        kept = {
            "num_folds_done": len(entries), "num_folds": work.get("folds"),
            "num_repeats": work.get("repeats"),
        }  # fmt: skip
        return _unfinished(folder, "crossval", kept, "begin anew with --overwrite")
    rounds = [entry["trials"] for entry in entries if isinstance(entry.get("trials"), list)]
    kept = {
        "num_trials_done": sum(map(len, rounds)),
        "num_trials": work.get("trials"),
        "num_repeats_done": sum("repeat" in entry for entry in entries),
        "num_repeats": work.get("repeats"),
    }
    return _unfinished(folder, "sweep", kept, "remove this folder to begin anew")


_READERS = {
    "plan.json": _parts_info,
    "manifest.json": _extraction_info,
    "training.safetensors": _training_info,
    "journal.jsonl": _journal_info,
}


def _unfinished(folder: Path, command: str, kept: dict[str, Any], else_do: str) -> UnfinishedInfo:
    output = folder.with_name(folder.name.removesuffix(".partial").removesuffix(".sweep"))
    return UnfinishedInfo(
        path=folder, command=command, output=output, kept=kept,
        disk_bytes=sum(part.stat().st_size for part in folder.iterdir() if part.is_file()),
        next_step=f"the featcache {command} that began it, called again, goes on; or {else_do}",
    )  # fmt: skip
