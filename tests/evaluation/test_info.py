"""Info: the layers of a run, and what an interrupted command has kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Result
from sample_rows import make_cache

import featcache
from featcache.errors import CacheError, ConfigError, RunError
from featcache.evaluation.info import RunInfo
from featcache.evaluation.unfinished import UnfinishedInfo
from featcache.heads import resuming
from featcache.heads.head import HeadConfig, build_head, list_layers
from featcache.sweeps.search import Search


@pytest.mark.parametrize("hidden", [(), (7,), (512, 128), (9, 8, 7)])
def test_layers_are_those_of_the_torch_module(hidden: tuple[int, ...]) -> None:
    import torch

    config = HeadConfig(20, 3, hidden)
    network, layers = build_head(config).eval(), list_layers(config)
    values = torch.zeros(2, 20)
    for (name, module), layer in zip(network.named_children(), layers, strict=True):
        values = module(values)
        assert (layer.name, layer.kind) == (name, type(module).__name__)
        assert values.shape == (2, layer.num_outputs)
        assert layer.num_parameters == sum(p.numel() for p in module.parameters())


def test_the_layers_of_a_run_are_a_table(tmp_path: Path, run: Callable[..., Result]) -> None:
    make_cache(tmp_path / "c.h5")
    featcache.train(tmp_path / "c.h5", tmp_path / "run", hidden=(6, 5), epochs=1)
    done = run("info", "run", "--layers")
    assert done.out.splitlines() == [
        "input: (N, 3, 32, 32)",
        "layer            output   parameters  trained",
        "fake             (N, 10)              no, frozen",
        "  0 BatchNorm1d  (N, 10)          20  yes",
        "  1 Linear       (N, 6)           66  yes",
        "  2 ReLU         (N, 6)            0",
        "  3 BatchNorm1d  (N, 6)           12  yes",
        "  4 Linear       (N, 5)           35  yes",
        "  5 ReLU         (N, 5)            0",
        "  6 BatchNorm1d  (N, 5)           10  yes",
        "  7 Dropout      (N, 5)            0",
        "  8 Linear       (N, 2)           12  yes",
        "head                             155  yes",
    ]
    facts = featcache.info(tmp_path / "run")
    assert facts.num_parameters == 155
    done = run("info", "c.h5", "--layers")
    assert (done.code, done.out) == (2, "")
    assert "--layers is of a run; this is a cache" in done.err


def unfinished(path: Path) -> UnfinishedInfo:
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    facts = featcache.info(path)
    assert isinstance(facts, UnfinishedInfo)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert facts.disk_bytes == sum(map(len, before.values()))
    return facts


def test_an_unfinished_extraction_says_what_is_kept() -> None:
    facts = unfinished(Path(__file__).parent.parent / "data" / "partial_v2")
    assert facts.command == "extract"
    assert facts.kept["num_images"] == 4
    assert facts.kept["num_shards"] == 4
    assert (facts.kept["precision"], facts.kept["device"]) == ("fp32", "cpu")


def test_an_unfinished_training_says_its_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Result]
) -> None:
    make_cache(tmp_path / "c.h5")
    monkeypatch.setattr(resuming, "SAVE_SECONDS", 0.0)

    def stop(line: str) -> None:
        if line.strip().startswith("3  "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        featcache.train(tmp_path / "c.h5", tmp_path / "run", hidden=(4,), epochs=5, say=stop)
    facts = unfinished(tmp_path / "run.partial")
    assert facts.kept == {"num_epochs_done": 2, "num_epochs": 5}
    assert facts.output == tmp_path / "run"
    shown = run("info", "run.partial").out.splitlines()
    assert shown[0] == "run.partial: an unfinished featcache train"
    assert shown[-1] == (
        "next_step: the featcache train that began it, called again, goes on; or begin anew with "
        "--overwrite"
    )


def test_an_unfinished_sweep_says_its_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cache(tmp_path / "c.h5")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Search, "_repeat", stop)
    with pytest.raises(KeyboardInterrupt):
        featcache.sweep(tmp_path / "c.h5", tmp_path / "best", trials=3, repeats=2)
    facts = unfinished(tmp_path / "best.sweep")
    assert facts.kept == {
        "num_trials_done": 3, "num_trials": 3, "num_repeats_done": 0, "num_repeats": 2
    }  # fmt: skip
    assert facts.output == tmp_path / "best"


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("manifest.json", CacheError), ("training.safetensors", RunError),
        ("journal.jsonl", ConfigError),
    ],
)  # fmt: skip
def test_a_damaged_one_is_one_line(
    tmp_path: Path, name: str, error: type[Exception], run: Callable[..., Result]
) -> None:
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / name).write_bytes(b"not what it should be\n")
    with pytest.raises(error):
        featcache.info(tmp_path / "x.partial")
    done = run("info", "x.partial")
    assert (done.code, done.out) == (1, "")
    assert len(done.err.splitlines()) == 1


def test_a_run_is_a_run_whatever_else_lies_in_it(tmp_path: Path) -> None:
    make_cache(tmp_path / "c.h5")
    featcache.train(tmp_path / "c.h5", tmp_path / "run", hidden=(), epochs=1)
    for name in ("manifest.json", "journal.jsonl"):
        (tmp_path / "run" / name).write_text("the user's own", encoding="utf-8")
    assert isinstance(featcache.info(tmp_path / "run"), RunInfo)


def test_entries_of_a_strangers_journal_are_only_counted(tmp_path: Path) -> None:
    (tmp_path / "x.sweep").mkdir()
    lines = ['{"format": "featcache-sweep"}', '{"trials": 7}', '{"trials": [1, 2]}', "{}"]
    text = "".join(f"{line}\n" for line in lines)
    (tmp_path / "x.sweep" / "journal.jsonl").write_text(text, encoding="utf-8")
    assert unfinished(tmp_path / "x.sweep").kept["num_trials_done"] == 2
