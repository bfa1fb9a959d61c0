"""Outliers and nearest rows: planted rows float up, and blocks find what one matrix finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import featcache
from featcache.cache.writing import write_cache
from featcache.evaluation import nearest_rows
from featcache.evaluation.auditing import outliers
from featcache.evaluation.nearest_rows import find_nearest, sample_rows, to_directions


def planted(path: Path, num_classes: int = 2) -> Path:
    """60 rows a class, of which the last four lie in a bunch of their own, of one patient."""
    rng = np.random.default_rng(3)
    features, targets, groups = [], [], []
    for i in range(num_classes):
        rows = rng.normal(scale=0.3, size=(60, 24)) + np.eye(24)[i] * 4 + 1
        rows[56:] = rng.normal(scale=0.1, size=(4, 24)) + np.eye(24)[20 + i % 3] * 4 + 1
        features.append(rows)
        targets += [f"class {i}"] * 60
        groups += [f"{i}-{j}" for j in range(56)] + [f"{i}-odd"] * 4
    number = len(targets)
    write_cache(
        path, {"all": np.concatenate(features).astype(np.float32)}, {"all": targets},
        {"all": [f"{i:04}.png" for i in range(number)]}, groups={"all": groups},
    )  # fmt: skip
    return path


def test_a_bunch_of_odd_rows_floats_up_in_its_class(tmp_path: Path) -> None:
    lines: list[str] = []
    found = featcache.audit(planted(tmp_path / "c.h5"), only="outliers", say=lines.append).outliers
    assert found is not None
    for i, name in enumerate(("class 0", "class 1")):
        of_class = found["per_class"][name]
        farthest = [row["row"]["path"] for row in of_class["farthest"]]
        assert {*farthest[:4]} == {f"{60 * i + j:04}.png" for j in range(56, 60)}
        distances = [row["distance"] for row in of_class["farthest"]]
        assert distances == sorted(distances, reverse=True)
        assert distances[3] > 2 * of_class["median"] > 0
    assert max(map(len, lines)) <= 80
    assert any(f"  all: {60 + 56:04}.png"[:8] in line for line in lines)


def test_many_classes_have_one_list(tmp_path: Path) -> None:
    lines: list[str] = []
    featcache.audit(planted(tmp_path / "c.h5", num_classes=6), only="outliers", say=lines.append)
    listed = [line.rpartition(" ")[2] for line in lines if line.startswith("    ")]
    assert len(listed) == 6
    assert all(int(name[:4]) % 60 >= 56 for name in listed)


def test_large_classes_are_compared_with_a_sample_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outliers, "sample_rows", lambda number: sample_rows(number, 30))
    lines: list[str] = []
    found = featcache.audit(planted(tmp_path / "c.h5"), only="outliers", say=lines.append).outliers
    assert found is not None
    assert found["per_class"]["class 0"]["num_compared_with"] == 30
    assert any("drawn at random" in line for line in lines)


def test_classes_of_few_rows_are_left_out(tmp_path: Path) -> None:
    write_cache(tmp_path / "c.h5", np.eye(8, dtype=np.float32), ["a", "b"] * 4, list("stuvwxyz"))
    lines: list[str] = []
    found = featcache.audit(tmp_path / "c.h5", only="outliers", say=lines.append).outliers
    assert found is not None
    assert found["per_class"] == {}
    assert any("too few" in line for line in lines)


def test_unlabelled_rows_are_said_in_every_part(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    write_cache(tmp_path / "c.h5", rows, [None] * 40, [f"{i:02}" for i in range(40)])
    lines: list[str] = []
    found = featcache.audit(tmp_path / "c.h5", say=lines.append)
    assert found.outliers == {"reason": "no labelled rows in all", "per_class": {}}
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("block_rows", [7, 1024])
def test_blocks_find_what_one_matrix_finds(
    block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest_rows, "_BLOCK_ROWS", block_rows)
    rng = np.random.default_rng(0)
    queries, rows = rng.normal(size=(40, 6)), rng.normal(size=(30, 6))
    query_units, row_units = np.arange(40) // 2, np.arange(30) // 3
    numbers, distances = find_nearest(
        to_directions(queries), to_directions(rows), 4, query_units, row_units
    )
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(rows, axis=1)
    whole = 1 - queries @ rows.T / lengths
    whole[query_units[:, None] == row_units] = np.inf
    assert numbers.tolist() == np.argsort(whole, axis=1)[:, :4].tolist()
    assert distances == pytest.approx(np.sort(whole, axis=1)[:, :4], abs=1e-6)


def test_a_unit_of_all_rows_leaves_no_nearest() -> None:
    rows, units = to_directions(np.eye(3)), np.zeros(3, np.int64)
    _, distances = find_nearest(rows, rows, 5, units, units)
    assert distances.shape == (3, 3)
    assert np.isinf(distances).all()
    assert to_directions(np.zeros((1, 3))).tolist() == [[0, 0, 0]]


def test_a_sample_is_the_same_each_time() -> None:
    chosen = sample_rows(1000, 10)
    assert chosen.tolist() == sample_rows(1000, 10).tolist() == sorted({*chosen.tolist()})
    assert sample_rows(5, 10).tolist() == [0, 1, 2, 3, 4]
