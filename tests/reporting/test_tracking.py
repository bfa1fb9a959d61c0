"""Runs in MLflow and TensorBoard, read back by their own programs; what is logged, and once."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_crossval import LBFGS, crossval_small
from sample_rows import make_cache, rows_of
from sample_trackers import MemoryTracker

import featcache
from featcache.errors import ConfigError, RunError
from featcache.reporting import tracking
from featcache.reporting.tracked import Part, Tracked, read_tracked, safe_name


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, a run with decision and evaluation, a sweep and a cross-validation."""
    folder = tmp_path_factory.mktemp("work")
    sizes = {"train": 60, "valid": 60, "test": 24}
    rows = {name: rows_of(name, np.arange(n) % 2, width=16) for name, n in sizes.items()}
    make_cache(folder / "c.h5", **rows)
    quiet = {"say": lambda _: None}
    options: dict[str, Any] = {"hidden": (4,), "device": "cpu", "valid_fraction": 0.2}
    featcache.train(folder / "c.h5", folder / "run", epochs=3, **options)
    featcache.decide(folder / "run", positive=classes(folder)[0], recall=0.5, **quiet)
    featcache.evaluate(folder / "run", positive=classes(folder)[0], **quiet)
    featcache.audit(folder / "c.h5", **quiet)
    featcache.sweep(folder / "c.h5", folder / "sweep", trials=2, repeats=2)
    crossval_small(folder, "folds", folds=2, keep_ensemble=True)
    return folder


def classes(folder: Path) -> list[str]:
    return list(featcache.open_cache(folder / "c.h5").classes)


@pytest.fixture
def place(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(work, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> MemoryTracker:
    tracker = MemoryTracker()
    monkeypatch.setattr(tracking, "_open_tensorboard", lambda out: tracker)
    return tracker


def log(run: Any, to: str = "tensorboard", **options: Any) -> featcache.LogSummary:
    return featcache.log(run, to=to, say=lambda _: None, **options)


def everything(tracked: Tracked) -> Iterator[Part]:
    yield from tracked.parts
    for child in tracked.children:
        yield from everything(child)


def test_what_opens_the_tracker_is_said(place: Path) -> None:
    said: list[str] = []
    featcache.log("run", to="tensorboard", out="my logs", say=said.append)
    assert said[-1] == "to look at it: tensorboard --logdir 'my logs'"


def test_a_second_call_changes_nothing_and_a_new_evaluation_is_added(
    place: Path, memory: MemoryTracker
) -> None:
    first = log("run")
    assert set(memory.runs["run"]) == {
        "training", "losses", "evaluation/test", "decision", "audit",
    }  # fmt: skip
    assert (first.num_new, first.num_known) == (5, 0)
    assert (log("run").num_new, log("run").num_known) == (0, 5)
    featcache.evaluate("run", split="valid", say=lambda _: None)
    again = log("run")
    assert (again.num_new, again.num_known) == (1, 5)
    assert "evaluation/valid" in memory.runs["run"]
    assert memory.finished == ["run"] * 4


def test_metrics_are_those_of_the_evaluation_with_interval_ends(place: Path) -> None:
    parts = {part.name: part for part in read_tracked("run", None, has_paths=False).parts}
    metrics = {name: value for name, _, value in parts["evaluation/test"].metrics}
    facts = json.loads(Path("run/evaluation/test.json").read_text())
    for name in ("accuracy", "balanced_accuracy", "sensitivity", "specificity", "roc_auc"):
        assert metrics[f"test/{name}"] == facts[name]
        low, high = facts["intervals"][name]
        assert (metrics[f"test/{name}_low"], metrics[f"test/{name}_high"]) == (low, high)
    name = facts["classes"][1]
    assert metrics[f"test/per_class/{name}/f1"] == facts["per_class"][name]["f1"]
    assert metrics["test/calibration/ece"] == facts["calibration"]["ece"]
    with Path("run/history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    curve = [(s, v) for name, s, v in parts["training"].metrics if name == "training/train_loss"]
    assert curve == [(int(row["epoch"]), float(row["train_loss"])) for row in rows]
    assert parts["training"].params["head.hidden"] == "4"
    assert parts["training"].params["training.optimizer"] == "adam"


def test_no_path_of_an_image_unless_asked_for(place: Path) -> None:
    cache = featcache.open_cache("c.h5")
    paths = [path.encode() for split in cache.splits.values() for path in split.paths]
    Path("run/report.html").write_bytes(b"page with " + paths[-1])

    def named(path: str, *, has_paths: bool) -> bool:
        parts = list(everything(read_tracked(path, None, has_paths=has_paths)))
        data = b"".join(repr(part).encode() + b"".join(part.files.values()) for part in parts)
        return any(name in data for name in paths)

    for folder in ("run", "sweep", "folds", "folds/ensemble"):
        assert not named(folder, has_paths=False), folder
    assert named("run", has_paths=True)
    assert named("folds", has_paths=True)


def test_trials_folds_and_heads_are_runs_below(place: Path, memory: MemoryTracker) -> None:
    log("sweep")
    with Path("sweep/trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [n for n in memory.runs if "/" in n] == [f"sweep/trial {r['trial']}" for r in rows]
    part = memory.runs["sweep/trial 0"]["trial"]
    assert ("score", 0, float(rows[0]["score"])) in part.metrics
    assert part.params["hidden"] == rows[0]["hidden"]
    assert log("folds").num_runs == 4  # with both folds and the mean of their heads
    facts = json.loads(Path("folds/crossval.json").read_text())
    metrics = {name: value for name, _, value in memory.runs["folds"]["crossval"].metrics}
    assert metrics["mean/accuracy"] == facts["mean"]["accuracy"]["mean"]
    assert metrics["mean/accuracy_low"] == facts["mean"]["accuracy"]["low"]
    fold = memory.runs["folds/repeat 1 fold 2"]["training"]
    assert {"training/train_loss", "fold/valid_loss"} <= {name for name, _, _ in fold.metrics}
    log("folds/ensemble")
    assert "ensemble/repeat 1 fold 2" in memory.runs


def test_names_stay_different_and_fit(place: Path) -> None:
    names = ["a/b", "a_b", "../x", "", " ", "_hidden", "$\\frac", "x" * 500, "\udcff", "a\nb", "é"]
    safe = [safe_name(name) for name in names]
    assert len(set(safe)) == len(names)
    assert all(text and "/" not in text and len(text) < 80 for text in safe)
    assert safe_name("covid-19 (1)".replace("(", "").replace(")", "")) == "covid-19 1"


def test_wrong_calls_are_one_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, text in (
        ({"to": "wandb"}, "--to: expected mlflow or tensorboard, found wandb"),
        ({"to": "mlflow", "out": "x"}, "--out: expected --to tensorboard"),
        ({"to": "tensorboard", "uri": "x"}, "--uri: expected --to mlflow"),
        ({"to": "tensorboard", "model": "c.h5"}, "--model: expected an ONNX file of this run"),
    ):
        with pytest.raises(ConfigError, match=text):
            log("run", **options)
    with pytest.raises(RunError):
        log("nothing")
    for name in ("mlflow", "tensorboard"):
        missing = [module for module in sys.modules if module.split(".")[0] == name]
        for module in [name, f"{name}.tracking", f"{name}.compat.proto", *missing]:
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ConfigError, match=r'pip install "featcache\[tracking\]"'):
            log("run", to=name)


def test_a_model_is_logged_if_it_is_of_this_run(place: Path, memory: MemoryTracker) -> None:
    sha256 = featcache.load_run("run").weights_sha256
    Path("m").mkdir()
    Path("m/model.onnx").write_bytes(b"onnx" + sha256.encode())
    Path("m/README.md").write_text("the card")
    log("run", model="m")
    files = memory.runs["run"]["model"].files
    assert set(files) == {"model/model.onnx", "model/README.md"}
    assert not any(b"pickle" in data for data in files.values())
    Path("m/model.onnx").write_bytes(b"onnx" + b"0" * 64)
    with pytest.raises(ConfigError, match="found one of another run"):
        log("run", model="m")


def test_damaged_files_for_people_are_left_out(place: Path, memory: MemoryTracker) -> None:
    Path("run/history.csv").write_text("epoch\nx\n")
    Path("run/evaluation/test.json").write_text("[1")
    Path("run/evaluation/other.json").write_text("{}")
    Path("run/loss_curves.png").unlink()
    log("run")
    assert set(memory.runs["run"]) == {"training", "decision", "audit"}
    assert memory.runs["run"]["training"].metrics == []


def test_a_linear_probe_has_its_strengths_as_steps(place: Path, memory: MemoryTracker) -> None:
    featcache.train("c.h5", "probe", **LBFGS)
    log("probe")
    metrics = memory.runs["probe"]["training"].metrics
    steps = [step for name, step, _ in metrics if name == "training/strength"]
    assert steps == [*range(1, len(steps) + 1)]
    assert len(steps) > 1


# ---------------------------------------------------------------------------- the real programs


def test_tensorboard_reads_what_was_logged_once(place: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    summary = log("run", out="tb")
    names = sorted(path.name for path in Path("tb").rglob("*"))
    assert log("run", out="tb").num_new == 0
    assert sorted(path.name for path in Path("tb").rglob("*")) == names
    read = EventAccumulator(f"tb/{summary.tracker_run}").Reload()
    facts = json.loads(Path("run/evaluation/test.json").read_text())
    (scalar,) = read.Scalars("test/accuracy")
    assert scalar.value == pytest.approx(facts["accuracy"])
    assert [row.step for row in read.Scalars("training/valid_loss")] == [1, 2, 3]
    (image,) = read.Images("evaluation/test_roc")
    assert image.encoded_image_string == Path("run/evaluation/test_roc.png").read_bytes()
    texts = [tag for tag in read.Tags()["tensors"] if tag.endswith(".json")]
    assert {"run/decision.json", "audit.json", "evaluation/test.json"} <= set(texts)
    told = read.Tensors("run/decision.json")[0].tensor_proto.string_val[0].decode()
    assert json.loads(told.removeprefix("```json").removesuffix("```"))["decisions"]
    assert "_hparams_/session_start_info" in read.summary_metadata
    log("sweep", out="tb")
    trial = EventAccumulator(str(next(Path("tb").glob("sweep-*/trial 0")))).Reload()
    assert len(trial.Scalars("score")) == 1


def test_tensorboard_refuses_a_file_in_its_place(place: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    Path("tb").write_text("mine")
    with pytest.raises(ConfigError, match="--out: expected a folder"):
        log("run", out="tb")
    assert Path("tb").read_text() == "mine"


@pytest.mark.filterwarnings("default")
def test_mlflow_reads_what_was_logged_once(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlflow", reason='mlflow is not installed: "featcache[tracking]"')
    from mlflow.tracking import MlflowClient

    summary = log("run", "mlflow")
    assert summary.place == "sqlite:///mlflow.db"
    client = MlflowClient(tracking_uri="sqlite:///mlflow.db")
    made = client.get_run(summary.tracker_run)
    facts = json.loads(Path("run/evaluation/test.json").read_text())
    assert made.info.status == "FINISHED"
    assert made.data.metrics["test/accuracy"] == facts["accuracy"]
    assert made.data.metrics["test/accuracy_low"] == facts["intervals"]["accuracy"][0]
    assert made.data.params["training.epochs"] == "3"
    history = client.get_metric_history(summary.tracker_run, "training/valid_loss")
    assert [row.step for row in history] == [1, 2, 3]
    artifacts = {
        item.path
        for folder in ("", "run", "evaluation")
        for item in client.list_artifacts(summary.tracker_run, folder)
    }
    assert {
        "loss_curves.png", "run/head.safetensors", "run/decision.json", "evaluation/test_roc.png",
        "audit.json",
    } <= artifacts  # fmt: skip
    before = made.to_dictionary()
    assert log("run", "mlflow").num_new == 0
    assert client.get_run(summary.tracker_run).to_dictionary() == before
    experiment = made.info.experiment_id
    assert len(client.search_runs([experiment])) == 1
    featcache.evaluate("run", split="valid", say=lambda _: None)
    added = log("run", "mlflow")
    assert (added.tracker_run, added.num_new) == (summary.tracker_run, 1)
    assert "valid/accuracy" in client.get_run(summary.tracker_run).data.metrics
    whole = log("sweep", "mlflow")
    log("sweep", "mlflow")
    wanted = f"tags.`mlflow.parentRunId` = '{whole.tracker_run}'"
    trials = client.search_runs([experiment], wanted)
    assert len(trials) == whole.num_runs - 1 > 1
    assert all("score" in trial.data.metrics for trial in trials)
    assert capfd.readouterr().out == ""
    Path("mine.txt").write_text("years of work " * 100)
    with pytest.raises(ConfigError, match=r"--uri sqlite:///mine\.txt: expected an MLflow"):
        log("run", "mlflow", uri="sqlite:///mine.txt")
    assert Path("mine.txt").read_text() == "years of work " * 100
