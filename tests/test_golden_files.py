"""What commit c921d99 wrote (``tests/data/golden``) is read as it was meant, by the verbs alone."""

from __future__ import annotations

import csv
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sample_golden import GOLDEN, GROUPS, RUNS, write_image, write_images

import featcache
from featcache.cli.ending import ENDING
from featcache.cli.main import main

Tool = Callable[..., str]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Tool]:
    """Run the command line in this process and return what it printed."""
    monkeypatch.setattr(ENDING, "listen", lambda: None)  # signals are the test runner's
    show = warnings.showwarning

    def run(*arguments: object) -> str:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["featcache", *map(str, arguments)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as stopped:
            main()
        out, err = capfd.readouterr()
        assert stopped.value.code == 0, err
        return out

    yield run
    warnings.showwarning = show


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy of the golden files: commands write beside what they read."""
    return shutil.copytree(GOLDEN, tmp_path / "golden")


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_equal(found: Any, wanted: Any, key: str = "") -> None:
    """Compare JSON: probabilities within 1e-6, metrics but for the last bits of a sum, all else."""
    if isinstance(wanted, dict):
        assert found.keys() >= wanted.keys(), key
        for name, value in wanted.items():
            assert_equal(found[name], value, name)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), key
        for one, other in zip(found, wanted, strict=True):
            assert_equal(one, other, key)
    elif isinstance(wanted, float):
        bound = 1e-6 if key == "prob" else 1e-12
        assert found == pytest.approx(wanted, rel=0, abs=bound), key
    else:
        assert found == wanted, key


@pytest.mark.parametrize("run", RUNS)
def test_a_run_predicts_what_it_predicted_when_it_was_made(
    run: str, golden: Path, tool: Tool
) -> None:
    tool("predict", golden / run, "--cache", golden / RUNS[run], "--csv", golden / "new.csv")
    found, wanted = read_csv(golden / "new.csv"), read_csv(golden / f"{run}_predictions.csv")
    assert len(found) == len(wanted) >= 54
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys() | {"unlike_training"}  # which came later
        for key, value in other.items():
            if key.startswith("prob") and value:
                assert float(one[key]) == pytest.approx(float(value), rel=0, abs=1e-6)
            else:
                assert one[key] == value


@pytest.mark.parametrize("run", RUNS)
def test_an_evaluation_gives_the_same_metrics_as_before(run: str, golden: Path, tool: Tool) -> None:
    positive = [] if run == "findings_run" else ["--positive", "covid"]
    found = json.loads(tool("evaluate", golden / run, *positive, "--json"))
    assert_equal(found, json.loads((golden / f"{run}_evaluation.json").read_text("utf-8")))


@pytest.mark.parametrize("run", RUNS)
def test_an_export_carries_the_very_weights_that_were_trained(
    run: str, golden: Path, tool: Tool
) -> None:
    trust = ["--backbone", "python:tiny_network:build"]
    tool("export", golden / run, golden / "new.pt", *trust)
    state = torch.load(golden / "new.pt", weights_only=True)
    trained = load_file(golden / run / "head.safetensors")
    assert {key for key in state if key.startswith("head.")} == {f"head.{key}" for key in trained}
    for key, array in trained.items():
        assert state[f"head.{key}"].numpy().tobytes() == array.tobytes()


def test_a_cache_holds_the_rows_that_were_extracted(golden: Path, tool: Tool) -> None:
    """By h5py, which knows nothing of featcache: features, targets, paths, groups, a failure."""
    for name in ("images.h5", "findings.h5"):
        cache = featcache.open_cache(golden / name)
        with h5py.File(golden / name) as file:
            assert {*file["splits"]} == {*cache.splits} == {"train", "valid", "test"}
            for split_name, split in cache.splits.items():
                rows = file["splits"][split_name]
                for key in ("features", "targets", "image_sha256"):
                    assert np.asarray(getattr(split, key)).tobytes() == rows[key][()].tobytes()
                assert split.paths == [path.decode() for path in rows["paths"]]
                assert split.groups == [group.decode() for group in rows["groups"]]
        tool("verify", golden / name)
    failures = featcache.open_cache(golden / "images.h5").failures
    assert [f.path for f in failures] == ["train/covid/trc999_0.bmp"]


def test_an_old_cache_is_updated_and_not_made_anew(golden: Path, tool: Tool) -> None:
    """Of the same images only the one that was added goes through the network."""
    write_images(golden / "images")
    write_image(golden / "images" / "train" / "normal" / "trn500_0.bmp", 500)
    cache = golden / "images.h5"
    before = {path: row.tobytes() for path, row in rows_of(cache)}
    facts = json.loads(
        tool("extract", golden / "images", cache, "--backbone", "python:tiny_network:build",
             "--group-by", GROUPS, "--max-errors", "10%", "--rehash", "--json")
    )  # fmt: skip
    assert (facts["num_new"], facts["num_failed"]) == (1, 1)
    after = {path: row.tobytes() for path, row in rows_of(cache)}
    assert after.keys() - before.keys() == {"train/normal/trn500_0.bmp"}
    assert {path: after[path] for path in before} == before


def rows_of(cache: Path) -> Iterator[tuple[str, np.ndarray]]:
    for split in featcache.open_cache(cache).splits.values():
        yield from zip(split.paths, split.features, strict=True)


def test_the_same_images_give_the_same_features(golden: Path, tool: Tool) -> None:
    """Bit for bit for a network without arithmetic, which is alike on every machine; else 1e-6."""
    extract = ["--group-by", GROUPS, "--max-errors", "10%", "--device", "cpu"]
    images = write_images(golden / "images")
    own = ["--backbone", "python:sample_golden:pixels", "--engine", "eager"]
    tool("extract", images, golden / "pixels.h5", *extract, *own)
    cache = featcache.open_cache(golden / "pixels.h5")
    wanted = json.loads((GOLDEN / "pixels.json").read_text("utf-8"))
    assert cache.fingerprint == wanted["fingerprint"]
    assert cache.content_sha256 == wanted["content_sha256"]
    tiny = ["--backbone", "python:tiny_network:build", "--engine", "folded"]
    tool("extract", images, golden / "new.h5", *extract, *tiny)
    new, old = featcache.open_cache(golden / "new.h5"), featcache.open_cache(golden / "images.h5")
    assert (new.fingerprint, new.classes) == (old.fingerprint, old.classes)
    for (path, row), (old_path, old_row) in zip(
        rows_of(golden / "new.h5"), rows_of(golden / "images.h5"), strict=True
    ):
        assert path == old_path
        np.testing.assert_allclose(row, old_row, rtol=1e-6, atol=1e-6)
