"""NIH and CheXpert, made small, from the command line: from their CSVs to evaluate and a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import TINY, assert_one_line_error
from sample_collections import CHEXPERT, NIH, write_chexpert, write_nih

import featcache

SMALL = ["--hidden", "none", "--epochs", 2]


@pytest.fixture
def facts(run: Any) -> Any:
    """Call the command line with --json; return the object that it prints."""

    def call(*arguments: object) -> dict[str, Any]:
        done = run(*arguments, "--json")
        assert done.code == 0, done.err
        return json.loads(done.out)  # type: ignore[no-any-return]

    return call


def test_nih(tmp_path: Path, run: Any, facts: Any) -> None:
    labels = write_nih(tmp_path / "nih")
    table = "nih/Data_Entry_2017.csv"
    assert_one_line_error(run("extract", table, "c.h5", *TINY, *NIH[:6]), "--target-separator '|'")
    lists = ["--split-list", "test=nih/test_list.txt"]
    made = facts("extract", table, "c.h5", *TINY, *NIH, *lists)
    names = {"train": [*labels][:32], "test": [*labels][32:]}
    truth = {
        split: {c: sum(c in labels[n] for n in listed) for c in ("Effusion", "Mass", "Nodule")}
        for split, listed in names.items()
    }
    assert (made["splits"], made["num_images"], made["num_failed"]) == (truth, 48, 0)
    again = run("extract", table, "c.h5", *TINY)
    assert "c.h5: up to date, 48 images." in again.out
    assert " train: 32 images; yes: " in again.out
    assert "splits: 32 rows in no --split-list, taken as train" in again.out
    known = facts("info", "c.h5")
    assert (known["task"], known["splits"]["test"]["num_per_class"]) == (
        "multilabel",
        truth["test"],
    )
    assert known["splits"]["train"]["num_groups"] == 16
    assert facts("verify", "c.h5", "--data", table, *TINY)["relabelled"] == []
    facts("train", "c.h5", "run", *SMALL, "--valid-fraction", 0.25)
    result = facts("evaluate", "run")
    assert (result["task"], result["num_samples"]) == ("multilabel", 16)
    assert {c: f["num_positive"] for c, f in result["per_class"].items()} == truth["test"]
    missed = facts("evaluate", "run", "--positive", "Mass")
    positives = {path.rpartition("/")[2] for path in missed["false_negatives"]}
    assert positives <= {name for name in names["test"] if "Mass" in labels[name]}
    assert facts("decide", "run", "--positive", "Mass", "--recall", 0.5)["positive"] == "Mass"
    found = facts("predict", "run", "nih/images_003", *TINY)
    assert len(found["predictions"]) == 16
    assert facts("audit", "c.h5")["splits"] == {"train": 32, "test": 16}
    facts("report", "run")
    assert (tmp_path / "run/report.html").exists()
    chosen = facts(
        "select", "c.h5", "s.h5", "--fractions", "0.5,0.25,0.25", "--classes", "Mass,Nodule"
    )
    assert sum(counts["Mass"] for counts in chosen["splits"].values()) == sum(
        counts["Mass"] for counts in truth.values()
    )
    facts("crossval", "c.h5", "folds", "--folds", 2, *SMALL)
    facts("sweep", "s.h5", "sweep", "--trials", 2, "--sampler", "random")


def test_nih_split_by_patient(tmp_path: Path, facts: Any) -> None:
    labels = write_nih(tmp_path / "nih")
    made = facts("split", "nih/Data_Entry_2017.csv", "split.csv", *NIH)
    columns = ["--target-columns", ",".join(made["classes"]), "--blank", "unknown"]
    done = facts("extract", "split.csv", "c.h5", *TINY, *columns)
    assert done["splits"] == made["counts"]
    assert made["num_groups"] == 24
    cache = featcache.open_cache(tmp_path / "c.h5")
    groups = [{*split.groups} for split in cache.splits.values() if split.groups is not None]
    assert sum(map(len, groups)) == 24
    for split in cache.splits.values():
        for path, target in zip(split.paths, split.targets, strict=True):
            yes = {c for c, value in zip(cache.classes, target, strict=True) if value == 1}
            assert yes == labels[path.rpartition("/")[2]]


def expected(cells: list[list[str]], *, blank: float) -> np.ndarray[Any, Any]:
    """Return targets of CheXpert, its columns sorted, by a rule of its own."""
    values = np.array([[float(c) if c else blank for c in row] for row in cells])
    is_empty = np.array([[not c for c in row] for row in cells])
    values[values == -1] = np.nan
    healthy = values[:, 0] == 1
    values[healthy[:, None] & is_empty & (np.arange(len(CHEXPERT)) < len(CHEXPERT) - 1)] = 0
    return values[:, [CHEXPERT.index(name) for name in sorted({*CHEXPERT} - {"No Finding"})]]


@pytest.mark.parametrize(("word", "blank"), [("unknown", np.nan), ("no", 0.0)])
def test_chexpert(tmp_path: Path, run: Any, facts: Any, word: str, blank: float) -> None:
    cells = write_chexpert(tmp_path / "CheXpert-v1.0-small")
    options = [*TINY, "--columns", "path=Path", "--target-columns", ",".join(CHEXPERT)]
    patient = ["--group-by-path", r"(patient\d+)"]
    train, valid = (f"CheXpert-v1.0-small/{name}.csv" for name in ("train", "valid"))
    question = run("extract", train, "c.h5", *options)
    assert_one_line_error(question, "--blank unknown", "--blank no", "column ")
    facts("extract", train, "c.h5", *options, *patient, "--blank", word)
    facts("extract", valid, "v.h5", *options)
    cache = featcache.open_cache(tmp_path / "c.h5")
    split = cache.splits["all"]
    assert cache.classes == tuple(sorted({*CHEXPERT} - {"No Finding"}))
    assert np.array_equal(split.targets, expected(cells["train"], blank=blank), equal_nan=True)
    assert len({*(split.groups or ())}) == 24
    facts("train", "c.h5", "run", *SMALL, "--valid-fraction", 0.25)
    result = facts("evaluate", "run", "--cache", "v.h5", "--split", "all")
    truth = expected(cells["valid"], blank=0)
    assert [f["num_positive"] for f in result["per_class"].values()] == (truth == 1).sum(0).tolist()
    assert result["num_samples"] == 16
    found = facts("predict", "run", valid, *TINY, "--columns", "path=Path")
    assert len(found["predictions"]) == 16
    assert facts("audit", "c.h5")["splits"] == {"all": 48}
    facts("report", "run")
