from __future__ import annotations

import csv
import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from featcache.errors import FeatcacheWarning, RunError
from featcache.files import canonical_json
from featcache.heads.head import HeadConfig, build_head
from featcache.heads.run import load_head, load_run
from featcache.heads.run_caches import cache_paths, require_same_features
from featcache.heads.run_writing import relative_path, write_run

HEAD = HeadConfig(6, 2, hidden=(4,))
CLASSES = ("covid", "normal")
IDENTITY = {"backbone": "b0", "weights_sha256": "a" * 64, "image_size": 224, "views": 1}
NOT_ITS_OWN = "the head, classes and task it was saved with"
HISTORY = [
    {"epoch": 1, "train_loss": 0.7, "valid_loss": 0.6, "valid_recall_covid": None, "seconds": 0.1},
    {"epoch": 2, "train_loss": 0.5, "valid_loss": 0.4, "valid_recall_covid": 0.5, "seconds": 0.1},
]


def make_run(folder: Path, **change: Any) -> Path:
    folder.mkdir(parents=True)
    cache = {
        "path": "../c.h5", "fingerprint": "f" * 64, "identity": IDENTITY,
        "payload_sha256": "e" * 64, "num_failed": 0,
    }  # fmt: skip
    options: dict[str, Any] = {
        "head": HEAD, "state": build_head(HEAD, seed=3).state_dict(), "training": {"epochs": 2},
        "seed": 1, "data_seed": 2, "classes": CLASSES, "cache": cache, "history": HISTORY,
        "environment": {"python": "3"},
    }  # fmt: skip
    write_run(folder, **(options | change))
    return folder


def edit(folder: Path, *, signed: bool = True, **change: Any) -> Path:
    """Change run.json, by somebody who keeps the hash over it right or does not know of it."""
    file = folder / "run.json"
    facts = json.loads(file.read_text()) | change
    rest = {key: value for key, value in facts.items() if key != "sha256"}
    if signed:
        facts["sha256"] = hashlib.sha256(canonical_json(rest).encode()).hexdigest()
    file.write_text(json.dumps(facts))
    return folder


def test_a_run_comes_back_as_it_was_written(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "r"))
    assert (run.head, run.classes, run.seed, run.data_seed) == (HEAD, CLASSES, 1, 2)
    assert run.training == {"epochs": 2}
    assert run.cache["identity"] == IDENTITY
    wanted = build_head(HEAD, seed=3).eval()
    head = load_head(run)
    assert not head.training
    x = torch.randn(5, 6)
    assert torch.equal(head(x), wanted(x))


def test_files_are_text_but_the_weights_and_have_the_contracts_keys(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    assert {p.name for p in folder.iterdir()} == {
        "run.json", "head.safetensors", "history.csv", "environment.json",
    }  # fmt: skip
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert set(facts) == {
        "format", "format_version", "head", "training", "seed", "data_seed", "classes", "task",
        "cache", "weights_sha256", "sha256",
    }  # fmt: skip
    with (folder / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["valid_loss"] for row in rows] == ["0.6", "0.4"]
    assert [row["valid_recall_covid"] for row in rows] == ["", "0.5"]


def test_the_same_head_gives_the_same_bytes(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    assert load_run(a).weights_sha256 == load_run(b).weights_sha256


def test_every_flipped_byte_of_the_weights_is_noticed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    file = folder / "head.safetensors"
    data = file.read_bytes()
    for position in range(0, len(data), 7):
        file.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(RunError, match=r"head\.safetensors: expected sha256"):
            load_run(folder)
    file.write_bytes(data[:-1])
    with pytest.raises(RunError, match="expected sha256"):
        load_run(folder)
    file.unlink()
    with pytest.raises(RunError, match=r"head\.safetensors: expected a readable file"):
        load_run(folder)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"format_version": 4}, "found version 4 .* A newer featcache wrote it"),
        ({"format_version": 2}, "run, members: expected a JSON object for each"),
        ({"format_version": "1"}, "format_version"),
        ({"format": "zip"}, "expected format featcache-run"),
        ({"classes": ["covid", "normal", "pneumonia"]}, "expected 2 different names"),
        ({"classes": ["covid", "covid"]}, "expected 2 different names"),
        ({"classes": ["covid", 1]}, "expected 2 different names"),
        ({"classes": ["normal", "covid"]}, NOT_ITS_OWN),
        ({"classes": None}, "run, classes: expected a JSON list"),
        ({"head": {**HEAD.as_json(), "hidden": [5]}}, NOT_ITS_OWN),
        ({"head": {**HEAD.as_json(), "num_classes": 0}}, "run, head"),
        ({"head": {"hidden": []}}, "run, head"),
        ({"task": "multilabel"}, NOT_ITS_OWN),
        ({"task": "regression"}, "expected multiclass or multilabel, found regression"),
        ({"task": ["multiclass"]}, "expected multiclass or multilabel"),
        ({"task": None}, "expected multiclass or multilabel"),
        ({"cache": {}}, r"cache\.path"),
        ({"seed": "0"}, "run, seed"),
        ({"weights_sha256": "0" * 64}, "expected sha256 0000"),
    ],
)
def test_an_edited_run_is_refused(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    folder = edit(make_run(tmp_path / "r"), **change)
    with pytest.raises(RunError, match=what):
        load_run(folder)


@pytest.mark.parametrize("change", [
    {"seed": 3}, {"training": {"epochs": 3}}, {"note": "mine"}, {"sha256": "0" * 64},
    {"task": "multilabel"},
    {"cache": {"path": "../c.h5", "fingerprint": "f" * 64, "identity": IDENTITY | {"mean": 0}}},
])  # fmt: skip
def test_any_unsigned_edit_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = edit(make_run(tmp_path / "r"), signed=False, **change)
    with pytest.raises(RunError, match=r"run\.json: expected its own sha256"):
        load_run(folder)


def test_a_run_from_before_run_json_was_signed_loads(tmp_path: Path) -> None:
    fingerprint = hashlib.sha256(canonical_json(IDENTITY).encode()).hexdigest()
    cache = {"path": "../c.h5", "fingerprint": fingerprint, "identity": IDENTITY}
    file = make_run(tmp_path / "r", cache=cache) / "run.json"
    facts = json.loads(file.read_text())
    del facts["sha256"], facts["task"]
    file.write_text(json.dumps(facts))
    assert load_run(tmp_path / "r").cache == cache
    facts["cache"]["identity"] = IDENTITY | {"image_size": 225}
    file.write_text(json.dumps(facts))
    with pytest.raises(RunError, match="its own sha256"):
        load_run(tmp_path / "r")


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_a_run_without_a_task_has_one_class_a_row(tmp_path: Path, task: str) -> None:
    """Runs of before there were tasks load; one whose task was taken out does not."""
    folder = make_run(tmp_path / "r", task=task)
    assert load_run(folder).task == task
    facts = json.loads((folder / "run.json").read_text())
    del facts["task"], facts["sha256"]
    facts["sha256"] = hashlib.sha256(canonical_json(facts).encode()).hexdigest()
    (folder / "run.json").write_text(json.dumps(facts))
    if task == "multiclass":
        assert load_run(folder).task == "multiclass"
    else:
        with pytest.raises(RunError, match=NOT_ITS_OWN):
            load_run(folder)


def test_weights_of_one_class_a_row_have_the_metadata_they_always_had(tmp_path: Path) -> None:
    """So that an older featcache reads them, and refuses those of several labels."""
    for task, more in (("multiclass", {}), ("multilabel", {"task": "multilabel"})):
        data = (make_run(tmp_path / task, task=task) / "head.safetensors").read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        facts = {"head": HEAD.as_json(), "classes": list(CLASSES)}
        assert json.loads(header["__metadata__"]["featcache"]) == facts | more


def test_weights_of_another_head_are_refused_even_with_their_hash(tmp_path: Path) -> None:
    other = build_head(HeadConfig(6, 2, hidden=(5,))).state_dict()
    with pytest.raises(RunError, match="the entries of the head"):
        load_run(make_run(tmp_path / "r", state=other))
    state = build_head(HEAD).state_dict()
    state["1.weight"][0, 0] = float("nan")
    with pytest.raises(RunError, match="finite weights"):
        load_run(make_run(tmp_path / "n", state=state))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\xff", "[" * 100_000])
def test_a_run_json_that_is_no_run_is_refused(tmp_path: Path, text: str) -> None:
    folder = make_run(tmp_path / "r")
    (folder / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=r"run\.json"):
        load_run(folder)


def test_a_missing_run_names_the_folder_and_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"expected a folder with run\.json.*featcache train"):
        load_run(tmp_path / "none")


def test_cache_path_is_relative_and_moves_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "caches").mkdir(parents=True)
    cache = tmp_path / "a" / "caches" / "c.h5"
    cache.touch()
    path = relative_path(cache, tmp_path / "a" / "runs" / "r")
    assert path == "../../caches/c.h5"
    monkeypatch.chdir(tmp_path / "a")
    assert relative_path(Path("caches/c.h5"), Path("runs/r")) == path
    record = {"path": path, "fingerprint": "", "identity": {}}
    make_run(tmp_path / "a" / "runs" / "r", cache=record)
    assert cache_paths(load_run("runs/r")) == [cache.resolve()]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert cache_paths(load_run("b/runs/r")) == [(tmp_path / "b/caches/c.h5").resolve()]


def test_cache_path_from_another_drive_is_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_drive(*_: object) -> str:
        raise ValueError("path is on mount 'C:', start on mount 'D:'")

    monkeypatch.setattr(os.path, "relpath", other_drive)
    path = relative_path(tmp_path / "c.h5", tmp_path / "r")
    assert path == (tmp_path / "c.h5").resolve().as_posix()


def test_features_of_another_backbone_or_preprocessing_are_refused_in_one_line() -> None:
    require_same_features(IDENTITY, dict(IDENTITY))
    other = IDENTITY | {"weights_sha256": "b" * 64, "image_size": 240}
    with pytest.raises(RunError) as caught:
        require_same_features(IDENTITY, other)
    assert str(caught.value) == (
        "features: expected those the head was trained on, image_size 224, weights_sha256 "
        "aaaaaaaaaaaaaaaa..., found image_size 240, weights_sha256 bbbbbbbbbbbbbbbb.... "
        "Extract the images again with the run's backbone and options, or train on these."
    )
    with pytest.raises(RunError, match=r"expected .* mean null, found mean 0\.5"):
        require_same_features(IDENTITY, IDENTITY | {"mean": 0.5})


def test_views_and_stored_dtype_may_differ_with_a_warning() -> None:
    other = IDENTITY | {"views": 4, "augmentation": "flip", "feature_dtype": "float16"}
    wanted = "null, feature_dtype null, views 1; these features have augmentation flip, feature"
    with pytest.warns(FeatcacheWarning, match=wanted):
        require_same_features(IDENTITY, other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FeatcacheWarning)
        with pytest.raises(RunError, match="image_size 224, found image_size 1"):
            require_same_features(IDENTITY, other | {"image_size": 1})


def test_hostile_class_names_survive(tmp_path: Path) -> None:
    classes = ("\x1b[31m", "=cmd|'/c calc'!A1")
    history = [{"epoch": 1, f"valid_recall_{classes[0]}": 1.0, f"valid_recall_{classes[1]}": 0.0}]
    run = load_run(make_run(tmp_path / "r", classes=classes, history=history))
    assert run.classes == classes
    assert "\x1b" not in (tmp_path / "r" / "history.csv").read_text(encoding="utf-8")
