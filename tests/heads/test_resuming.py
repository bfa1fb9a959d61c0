"""A training that was interrupted at any epoch ends as one that was not, bit for bit."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from failing import failing
from safetensors import numpy as safetensors
from sample_rows import make_cache, rows_of

from featcache.cache.writing import write_cache
from featcache.errors import FeatcacheWarning, RunError
from featcache.files import canonical_json, json_sha256
from featcache.heads import fit, one_pass, resuming, rows
from featcache.heads.resuming import STATE_NAME
from featcache.heads.stack import StackTrainer
from featcache.heads.training import train
from featcache.runtime import CPU

SMALL: dict[str, Any] = {
    "hidden": (12, 7), "epochs": 6, "device": "cpu", "learning_rate": 0.02, "batch_size": 8
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Nets this small only wait for each other on more threads, and long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def save_each_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "SAVE_SECONDS", 0.0)


@pytest.fixture(params=["numpy", "compiled", "stacked"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what heads are trained, whatever their size: the last is that of GPUs."""
    monkeypatch.setattr(fit, "_KERNELS_WORTH", 0 if request.param == "compiled" else math.inf)
    if request.param == "stacked":
        monkeypatch.setattr(
            one_pass, "HeadGroup", lambda jobs, data, *_: StackTrainer(jobs, data, CPU.torch())
        )


def plain(folder: Path) -> Path:
    splits = {"train": [0, 1, 1] * 30, "valid": [0, 1] * 8}
    make_cache(folder / "c.h5", **{k: rows_of(k, v) for k, v in splits.items()})
    return folder / "c.h5"


def with_views(folder: Path) -> Path:
    rng = np.random.default_rng(1)
    features = {"train": rng.normal(size=(90, 3, 10)).astype("f4"),
                "valid": rng.normal(size=(20, 10)).astype("f4")}  # fmt: skip
    targets = {"train": np.arange(90) % 2, "valid": np.arange(20) % 2}
    return write(folder, features, targets)


def of_several_labels(folder: Path) -> Path:
    rng = np.random.default_rng(2)
    features = {k: rng.normal(size=(n, 10)).astype("f4") for k, n in SIZES.items()}
    targets = {k: rng.integers(0, 2, (n, 2)).astype("f4") for k, n in SIZES.items()}
    targets["train"][::7, 0] = np.nan
    return write(folder, features, targets)


SIZES = {"train": 90, "valid": 20}


def write(folder: Path, features: Any, targets: Any) -> Path:
    paths = {k: [f"{k}/{i}" for i in range(len(v))] for k, v in features.items()}
    write_cache(folder / "c.h5", features, targets, paths, classes=["covid", "normal"])
    return folder / "c.h5"


def files_of(run: Path) -> dict[str, Any]:
    """Everything in a run that is the same each time: not its dates and seconds."""
    with (run / "history.csv").open(newline="") as file:
        history = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    weights, facts = ((run / name).read_bytes() for name in ("head.safetensors", "run.json"))
    return {"history": history, "weights": weights, "facts": facts}


def interrupted_after(epochs: int) -> Callable[[str], None]:
    """Return a ``say`` that raises before the state of the epoch after these is kept."""
    left = epochs + 1

    def say(line: str) -> None:
        nonlocal left
        if line.lstrip().split("  ")[0].isdigit():
            left -= 1
            if not left:
                raise KeyboardInterrupt

    return say


def begin(cache: Path, run: Path, epochs: int = 2, **options: Any) -> Path:
    """Interrupt a training after so many epochs; return the file with its state."""
    with pytest.raises(KeyboardInterrupt):
        train(cache, run, say=interrupted_after(epochs), **(SMALL | options))
    return run.with_name(run.name + ".partial") / STATE_NAME


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (plain, {}),
        (plain, {"hidden": (), "optimizer": "sgd", "schedule": "cosine", "warmup": 2}),
        (plain, {"patience": 4, "weight_decay": 0.01, "optimizer": "adamw", "dropout": 0.0}),
        (with_views, {"class_weights": "balanced", "label_smoothing": 0.1}),
        (of_several_labels, {}),
    ],
)
@pytest.mark.usefixtures("path")
def test_interrupted_in_each_epoch_it_ends_equal(
    tmp_path: Path, make: Any, options: dict[str, Any]
) -> None:
    cache, options = make(tmp_path), SMALL | options
    train(cache, tmp_path / "whole", **options)
    wanted = files_of(tmp_path / "whole")
    for epoch in range(1, len(wanted["history"])):  # each goes on from the one before
        said: list[str] = []
        with pytest.raises(KeyboardInterrupt):
            train(cache, tmp_path / "r", say=both(said.append, interrupted_after(epoch)), **options)
        going_on = [line for line in said if line.startswith("going on after epoch")]
        assert (
            going_on == [f"going on after epoch {epoch - 1} of 6, kept in r.partial"][epoch == 1 :]
        )
        assert not (tmp_path / "r").exists()
    said = []
    train(cache, tmp_path / "r", say=said.append, **options)
    assert files_of(tmp_path / "r") == wanted
    shown = [line for line in said if line.lstrip().split("  ")[0].isdigit()]
    assert len(shown) == len(wanted["history"]), "earlier epochs are shown again"
    assert {p.name for p in tmp_path.iterdir()} == {"c.h5", "whole", "r"}
    assert {p.name for p in (tmp_path / "r").iterdir()} == {
        p.name for p in (tmp_path / "whole").iterdir()
    }


def both(*functions: Callable[[str], None]) -> Callable[[str], None]:
    def say(line: str) -> None:
        for function in functions:
            function(line)

    return say


@pytest.mark.usefixtures("path")
def test_features_that_stay_in_their_file_are_read_in_the_same_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_MEMORY_SHARE", 0.0)
    monkeypatch.setattr(rows, "_LEAST_BLOCK_BYTES", 1024)
    cache = plain(tmp_path)
    train(cache, tmp_path / "whole", **SMALL)
    begin(cache, tmp_path / "r", 3)
    train(cache, tmp_path / "r", **SMALL)
    assert files_of(tmp_path / "r") == files_of(tmp_path / "whole")


def test_it_is_kept_no_sooner_than_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "SAVE_SECONDS", math.inf)
    begin(plain(tmp_path), tmp_path / "r", 5)
    assert {p.name for p in tmp_path.iterdir()} == {"c.h5"}


def test_lbfgs_keeps_nothing(tmp_path: Path) -> None:
    train(plain(tmp_path), tmp_path / "r", hidden=(), optimizer="lbfgs", device="cpu")
    assert {p.name for p in tmp_path.iterdir()} == {"c.h5", "r"}


def test_another_command_is_refused_and_says_in_what_it_differs(tmp_path: Path) -> None:
    cache = plain(tmp_path)
    file = begin(cache, tmp_path / "r")
    kept = file.read_bytes()
    lbfgs = {"hidden": (), "optimizer": "lbfgs", "device": "cpu"}
    for options in (
        SMALL | {"seed": 1}, SMALL | {"data_seed": 1}, SMALL | {"epochs": 7},
        SMALL | {"hidden": (12,)}, lbfgs,
    ):  # fmt: skip
        with pytest.raises(RunError, match=r"the command that began it.*--overwrite"):
            train(cache, tmp_path / "r", **options)
    other = make_cache(tmp_path / "other.h5", train=[0, 1] * 20, valid=[0, 1] * 8).path
    with pytest.raises(RunError, match="cache_sha256"):
        train(other, tmp_path / "r", **SMALL)
    assert file.read_bytes() == kept
    train(cache, tmp_path / "r", **SMALL)


def test_overwrite_begins_anew_only_where_it_cannot_go_on(tmp_path: Path) -> None:
    cache = plain(tmp_path)
    train(cache, tmp_path / "r", **SMALL)
    wanted = files_of(tmp_path / "r")
    begin(cache, tmp_path / "r", seed=1, overwrite=True)
    assert files_of(tmp_path / "r") == wanted, "the old run stays until the new one is there"
    said: list[str] = []
    train(cache, tmp_path / "r", overwrite=True, say=said.append, **SMALL)
    assert "the unfinished training that was there is replaced" in said
    assert files_of(tmp_path / "r") == wanted
    begin(cache, tmp_path / "r", overwrite=True)
    said.clear()
    train(cache, tmp_path / "r", overwrite=True, say=said.append, **SMALL)
    assert any(line.startswith("going on after epoch 2") for line in said)
    assert files_of(tmp_path / "r") == wanted


def test_a_full_disk_does_not_stop_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "write_bytes", failing(OSError(28, "No space left on device")))
    with pytest.warns(FeatcacheWarning, match="No space left") as warned:
        train(plain(tmp_path), tmp_path / "r", **SMALL)
    assert len(warned) == 1
    assert (tmp_path / "r" / "run.json").is_file()


# ----------------------------------------------------------------------- strangers' and damaged


def repacked(data: bytes, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> bytes:
    """Return the file with its facts and arrays changed, and all hashes right."""
    arrays = {name: array.copy() for name, array in safetensors.load(data).items()}
    facts = json.loads(arrays.pop("facts").tobytes())
    change(facts, arrays)
    facts["arrays_sha256"] = resuming._hash_arrays(arrays)
    facts["sha256"] = json_sha256(facts, without="sha256")
    arrays["facts"] = np.frombuffer(canonical_json(facts).encode(), np.uint8)
    return safetensors.save(arrays)


def change_first(key: str, value: object) -> Callable[..., object]:
    """Change the state of the generator that has this key."""

    def change(facts: dict[str, Any], _: object) -> None:
        next(g for g in facts["generators"] if key in g)[key] = value

    return change


CHANGES: dict[str, Callable[[dict[str, Any], dict[str, Any]], object]] = {
    "foreign memory": change_first("pos", 10**6),
    "a negative position": change_first("pos", -1),
    "a short key": change_first("key", [1, 2]),
    "words that are none": change_first("key", [1 << 40] * 624),
    "an endless number": change_first("state", 10**400),
    "an even increment": change_first("inc", 2),
    "text": change_first("uinteger", "1"),
    "no generators": lambda facts, _: facts.pop("generators"),
    "one generator": lambda facts, _: facts.update(generators=facts["generators"][:1]),
    "a number for a generator": lambda facts, _: facts.update(generators=[1] * 4),
    "no history": lambda facts, _: facts.update(history=[]),
    "an endless history": lambda facts, _: facts.update(history=facts["history"] * 5),
    "another epoch": lambda facts, _: facts["history"][0].update(epoch=9),
    "a word for a loss": lambda facts, _: facts["history"][0].update(train_loss="low"),
    "nothing for a loss": lambda facts, _: facts["history"][1].update(valid_loss=None),
    "another column": lambda facts, _: facts["history"][0].update(more=1),
    "a row that is none": lambda facts, _: facts["history"].insert(0, []),
    "other work": lambda facts, _: facts.update(work=[]),
    "another format": lambda facts, _: facts.update(format_version=2),
    "a narrower array": lambda _, arrays: arrays.update({"steps/firsts": np.zeros(1, "f4")}),
    "another dtype": lambda _, arrays: arrays.update(
        {"steps/firsts": arrays["steps/firsts"].astype("f8")}
    ),
    "one array less": lambda _, arrays: arrays.popitem(),
    "one array more": lambda _, arrays: arrays.update(more=np.zeros(1, "f4")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_strangers_state_is_one_error(tmp_path: Path, name: str) -> None:
    cache = plain(tmp_path)
    file = begin(cache, tmp_path / "r")
    assert repacked(file.read_bytes(), lambda *_: None) == file.read_bytes()
    file.write_bytes(repacked(file.read_bytes(), CHANGES[name]))
    with pytest.raises(RunError, match=r"unfinished training: expected .* --overwrite"):
        train(cache, tmp_path / "r", **SMALL)
    train(cache, tmp_path / "r", overwrite=True, **SMALL)
    assert {p.name for p in tmp_path.iterdir()} == {"c.h5", "r"}


def test_a_damaged_state_is_one_error(tmp_path: Path, rounds: Callable[[int, int], int]) -> None:
    cache = plain(tmp_path)
    file = begin(cache, tmp_path / "r")
    data, rng = file.read_bytes(), np.random.default_rng(0)
    places = rng.integers(0, len(data), rounds(40, 4000)).tolist()
    flipped = [
        data[:i] + bytes([data[i] ^ 1 << j % 8]) + data[i + 1 :] for j, i in enumerate(places)
    ]
    cut = [data[:i] for i in places[: len(places) // 2]]
    for damaged in (b"", b"dear", *flipped, *cut, data + b"\0"):
        file.write_bytes(damaged)
        with pytest.raises(RunError, match="unfinished training"):
            train(cache, tmp_path / "r", **SMALL)
    file.write_bytes(data)
    train(cache, tmp_path / "r", **SMALL)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_in_its_place_does_not_block(tmp_path: Path) -> None:
    cache = plain(tmp_path)
    file = begin(cache, tmp_path / "r")
    file.unlink()
    os.mkfifo(file)
    try:
        with pytest.raises(RunError, match="not a regular file"):
            resuming.SavedTraining(file, {})
    finally:
        file.unlink()
    train(cache, tmp_path / "r", **SMALL)
