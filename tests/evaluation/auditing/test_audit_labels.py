"""Labels: swapped ones are found as by cleanlab and by the paper's steps; nothing is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featcache
from featcache.cache.writing import write_cache
from featcache.evaluation.auditing.folds import FoldedRows
from featcache.evaluation.auditing.labels import (
    label_lines,
    neighbour_labels,
    rank_labels,
    suggest_labels,
)

NUM_SWAPPED = 12


def swapped(path: Path, seed: int = 0, sizes: tuple[int, ...] = (90, 60, 40)) -> set[str]:
    """Write a cache of overlapping classes; return the paths of rows with another's label."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(len(sizes)), sizes)
    features = rng.normal(size=(len(truth), 16)).astype(np.float32) + 3
    features[np.arange(len(truth)), truth] += 4
    wrong = rng.choice(len(truth), NUM_SWAPPED, replace=False)
    targets = truth.copy()
    targets[wrong] = (targets[wrong] + rng.integers(1, len(sizes), NUM_SWAPPED)) % len(sizes)
    paths = [f"{i:03}.png" for i in range(len(truth))]
    write_cache(path, {"train": features}, {"train": targets}, {"train": paths}, classes="abc")
    return {paths[i] for i in wrong}


def folded_of(path: Path) -> FoldedRows:
    return FoldedRows(featcache.open_cache(path), lambda line: None)


def confident_joint(probs: Any, targets: Any) -> Any:
    """Northcutt et al. 2021, equations 1 and 2, row by row."""
    num_classes = probs.shape[1]
    thresholds = []
    for j in range(num_classes):
        own = [probs[i, j] for i in range(len(targets)) if targets[i] == j]
        thresholds.append(sum(own) / len(own))
    joint = np.zeros((num_classes, num_classes), int)
    for i, given in enumerate(targets):
        confident = [j for j in range(num_classes) if probs[i, j] >= thresholds[j]]
        if confident:
            joint[given, max(confident, key=lambda j: probs[i, j])] += 1
    return joint


def prune_by_noise_rate(probs: Any, targets: Any) -> list[int]:
    """The paper's method 4: of each pair of classes as many rows as the joint says, by margin."""
    joint, chosen = confident_joint(probs, targets), set[int]()
    for given in range(len(joint)):
        own = [i for i in range(len(targets)) if targets[i] == given]
        for other in {*range(len(joint))} - {given}:
            number = round(joint[given, other] / joint[given].sum() * len(own))
            chosen |= {*sorted(own, key=lambda i: probs[i, given] - probs[i, other])[:number]}
    return sorted(i for i in chosen if probs[i].argmax() != targets[i])


@pytest.mark.parametrize("seed", [0, 1])
def test_swapped_labels_are_found_as_by_cleanlab(tmp_path: Path, seed: int) -> None:
    paths = swapped(tmp_path / "c.h5", seed)
    folded = folded_of(tmp_path / "c.h5")
    names = [folded.cache.splits["train"].paths[i] for i in folded.numbers.tolist()]
    wrong = {i for i, name in enumerate(names) if name in paths}
    _, order = rank_labels(folded.probs, folded.targets, neighbour_labels(folded))

    def found(ranking: Any) -> int:
        return len(wrong.intersection([*ranking][: 2 * NUM_SWAPPED]))

    given = folded.probs[np.arange(len(order)), folded.targets]
    assert found(order) >= max(found(np.argsort(given)) - 1, NUM_SWAPPED - 2)
    rank = pytest.importorskip("cleanlab.rank", reason="cleanlab, an oracle, is not installed")
    quality = rank.get_label_quality_scores(folded.targets, folded.probs)
    assert found(order) >= found(np.argsort(quality)) - 1


@pytest.mark.parametrize("sizes", [(60, 60), (200, 25), (80, 50, 30, 20)])
def test_suggestions_are_those_of_the_paper_s_steps(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(len(sizes))
    targets = np.repeat(np.arange(len(sizes)), sizes)
    probs = rng.dirichlet(np.ones(len(sizes)), len(targets))
    probs[np.arange(len(targets)), targets] += 0.2
    probs /= probs.sum(axis=1, keepdims=True)
    wanted = prune_by_noise_rate(probs, targets)
    assert 0 < len(wanted) < len(targets) / 2
    suggested = suggest_labels(probs, targets)
    assert np.flatnonzero(suggested != targets).tolist() == wanted
    assert suggested[wanted].tolist() == probs[wanted].argmax(axis=1).tolist()
    filters = pytest.importorskip("cleanlab.filter", reason="cleanlab is not installed")
    theirs = np.flatnonzero(filters.find_label_issues(targets, probs, n_jobs=1)).tolist()
    assert len({*theirs} ^ {*wanted}) <= len(sizes)  # it rounds otherwise


def test_neighbours_decide_between_equal_probabilities_whatever_the_sizes_of_classes() -> None:
    """Two suspicious rows of the rare class: the one whose neighbours are of the other is first."""
    targets = np.array([0] * 20 + [1] * 4)
    probs = np.tile([0.9, 0.1], (24, 1))
    probs[20:] = [0.1, 0.9]
    probs[[20, 21]] = [0.95, 0.05]
    neighbours = np.tile(targets[:, None], 10)
    neighbours[20] = [1] * 3 + [0] * 7  # more than its class's share of the rows
    neighbours[21] = [0] * 10
    suggested, order = rank_labels(probs, targets, neighbours)
    assert np.flatnonzero(suggested != targets).tolist() == [20, 21]
    assert order[:2].tolist() == [21, 20]


def test_suspicious_rows_are_named_and_the_cache_stays_as_it_is(tmp_path: Path) -> None:
    cache = tmp_path / "c.h5"
    wrong, before = swapped(cache), (tmp_path / "c.h5").read_bytes()
    lines: list[str] = []
    found = featcache.audit(cache, only="labels", say=lines.append).labels
    assert found is not None
    named = {row["row"]["path"] for row in found["suspicious"]}
    assert found["num_suspicious"] == len(named)
    assert len(named & wrong) >= NUM_SWAPPED / 2
    assert len(named - wrong) <= 3
    for row in found["suspicious"]:
        assert row["given"] == row["row"]["class"] != row["suggested"]
        assert row["probs"][1] > row["probs"][0]
        assert sum(row["neighbours"]) <= 10
    assert cache.read_bytes() == before
    assert lines[1] == f"labels: {len(named)} of 190 rows look wrong, to check by eye"
    assert found["suspicious"][0]["row"]["path"] in lines[2]
    assert max(map(len, lines)) <= 80


def test_too_few_rows_and_several_labels_are_said(tmp_path: Path) -> None:
    write_cache(tmp_path / "c.h5", np.eye(8, dtype=np.float32), ["a", "b"] * 4, list("stuvwxyz"))
    write_cache(
        tmp_path / "m.h5", np.eye(4, dtype=np.float32),
        np.array([[1, 0], [1, 1], [0, 0], [0, 1]]), list("abcd"), classes=["x", "y"],
    )  # fmt: skip
    for name, part in (("c.h5", "at least 20"), ("m.h5", "several labels")):
        found = featcache.audit(tmp_path / name, only="labels", say=lambda line: None).labels
        assert found is not None
        assert part in found["reason"]
        assert found["suspicious"] == []


def test_long_names_of_classes_fit_into_80_columns() -> None:
    row = {"split": "train", "path": "a/" * 50, "class": "a" * 60, "group": ""}
    one = {"row": row, "given": "a" * 60, "suggested": "b" * 60, "probs": [0.1, 0.9],
           "neighbours": [0, 10]}  # fmt: skip
    facts = {"num_rows": 99, "reason": None, "num_suspicious": 1, "suspicious": [one]}
    lines = [*label_lines(facts)]
    assert max(map(len, lines)) <= 80
    assert lines[-1].endswith("neighbours")
