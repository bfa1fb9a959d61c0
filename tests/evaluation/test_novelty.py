"""Novelty: predict marks what is farther from all training images than they from each other."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featcache
from featcache.cache.writing import write_cache
from featcache.csv_files import csv_text
from featcache.evaluation import novelty
from featcache.evaluation.novelty import Novelty
from featcache.heads.run import load_run

WIDTH = 16


def rows_near(number: int, axis: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    rows = rng.normal(scale=0.3, size=(number, WIDTH)) + 1
    rows[:, axis] += 4
    return rows.astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on c.h5, and new.h5 with 20 rows like those to train on and then 3 unlike any."""
    place = tmp_path_factory.mktemp("novelty")
    train = np.concatenate([rows_near(40, axis, axis) for axis in (0, 1)])
    valid = np.concatenate([rows_near(10, axis, 7 + axis) for axis in (0, 1)])
    new = np.concatenate([rows_near(10, axis, 20 + axis) for axis in (0, 1)] + [rows_near(3, 9, 5)])
    for name, parts in (("c.h5", {"train": train, "valid": valid}), ("new.h5", {"all": new})):
        write_cache(
            place / name, parts, {k: np.arange(len(v)) // (len(v) // 2) % 2
                                  for k, v in parts.items()},
            {k: [f"{name[0]}{k}/{i:03}.png" for i in range(len(v))] for k, v in parts.items()},
            classes=["a", "b"],
            groups={k: [f"{k}{i // 2}" for i in range(len(v))] for k, v in parts.items()},
        )  # fmt: skip
    featcache.train(place / "c.h5", place / "run", hidden=(), epochs=2, device="cpu")
    return place


def test_rows_unlike_any_are_marked_in_json_csv_and_python(folder: Path, tmp_path: Path) -> None:
    found = featcache.predict(folder / "run", cache=folder / "new.h5", csv=tmp_path / "p.csv")
    marks = [False] * 20 + [True] * 3
    assert found.unlike_training == tuple(marks)
    facts = json.loads(json.dumps(found.as_dict()))
    assert [row["unlike_training"] for row in facts["predictions"]] == marks
    assert (facts["novelty"]["num_rows"], facts["novelty"]["num_compared_with"]) == (100, 100)
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8") as file:
        assert [line["unlike_training"] == "yes" for line in csv.DictReader(file)] == marks


def test_the_threshold_is_the_quantile_of_distances_between_groups(folder: Path) -> None:
    measured = Novelty.of(load_run(folder / "run"))
    assert measured is not None
    cache = featcache.open_cache(folder / "c.h5")
    rows = np.concatenate([cache.splits[name].read_features() for name in ("train", "valid")])
    groups = [group for name in ("train", "valid") for group in cache.splits[name].groups or ()]
    nearest = []
    for row, group in zip(rows, groups, strict=True):
        others = rows[[g != group for g in groups]]
        cosines = others @ row / np.linalg.norm(others, axis=1) / np.linalg.norm(row)
        nearest.append(1 - cosines.max())
    assert measured.threshold == pytest.approx(max(nearest), abs=1e-6)


def test_a_large_cache_is_sampled_and_it_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featcache.cli.wording import prediction_lines

    monkeypatch.setattr(novelty, "_MOST_ROWS", 30)
    found = featcache.predict(folder / "run", cache=folder / "new.h5")
    assert found.novelty is not None
    assert found.novelty["num_compared_with"] == 30
    lines = [*prediction_lines(found)]
    assert found.unlike_training is not None
    marks = ["(unlike any training image)" in line for line in lines]
    assert marks[:23] == [*found.unlike_training]
    assert all(marks[20:23])
    number = sum(found.unlike_training)
    assert f"100 training images, of which 30 were compared: {number}" in lines[-1]


def test_an_ensemble_that_saw_test_rows_knows_them(tmp_path: Path) -> None:
    parts = {name: np.concatenate([rows_near(20, axis, i + axis) for axis in (0, 1)])
             for i, name in enumerate(("train", "valid", "test"))}  # fmt: skip
    parts["test"][:, 9] += 9  # unlike those of train and valid
    write_cache(
        tmp_path / "c.h5", parts, {name: np.arange(40) // 20 for name in parts},
        {name: [f"{name}/{i:03}.png" for i in range(40)] for name in parts}, classes=["a", "b"],
    )  # fmt: skip
    unlike = {}
    for name, with_test in (("without", False), ("with", True)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", featcache.FeatcacheWarning)  # of rows that it saw
            featcache.crossval(
                tmp_path / "c.h5", tmp_path / name, folds=2, hidden=(), epochs=1, device="cpu",
                with_test=with_test, keep_ensemble=True,
            )  # fmt: skip
            found = featcache.predict(tmp_path / name / "ensemble", cache=tmp_path / "c.h5")
        assert found.novelty is not None
        unlike[name] = sum(found.unlike_training or ()), found.novelty["num_rows"]
    assert unlike == {"without": (40, 80), "with": (0, 120)}


@pytest.mark.parametrize("change", ["gone", "another", "damaged"])
def test_nothing_is_said_where_the_cache_is_not_at_hand(
    folder: Path, tmp_path: Path, change: str
) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "f")
    cache = tmp_path / "f" / "c.h5"
    data = bytearray(cache.read_bytes())
    cache.unlink()
    if change == "another":
        shutil.copyfile(folder / "new.h5", cache)
    elif change == "damaged":
        data[-1] ^= 1
        cache.write_bytes(data)
    found = featcache.predict(tmp_path / "f" / "run", cache=folder / "new.h5",
                              csv=tmp_path / "p.csv")  # fmt: skip
    assert (found.unlike_training, found.novelty) == (None, None)
    assert found.as_dict()["predictions"][0]["unlike_training"] is None
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8") as file:
        assert {line["unlike_training"] for line in csv.DictReader(file)} == {""}


def test_a_csv_of_an_earlier_version_is_replaced(folder: Path, tmp_path: Path) -> None:
    old = csv_text(["path", "pred", "prob", "prob_a", "prob_b", "failure"], [])
    (tmp_path / "p.csv").write_bytes(old.encode())
    for _ in range(2):
        featcache.predict(folder / "run", cache=folder / "new.h5", csv=tmp_path / "p.csv")
    assert (tmp_path / "p.csv").read_text("utf-8").count("\n") == 24
