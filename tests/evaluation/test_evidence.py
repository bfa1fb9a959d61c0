"""Where the evidence lies: shares by arithmetic, and by images whose sign is put in a place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_network
from PIL import Image

import featcache
from featcache.evaluation.audit_folds import FoldedRows
from featcache.evaluation.evidence import (
    EXPECTED_OUTSIDE,
    MOST_IMAGES,
    ClassEvidence,
    choose_images,
    share_inside,
)

QUIET: dict[str, Any] = {"say": lambda _: None}
pytestmark = pytest.mark.usefixtures("one_thread")


def test_even_evidence_lies_outside_by_area() -> None:
    for side in (1, 7, 10, 16):
        assert share_inside(np.ones((side, side))) == {"for": pytest.approx(0.36), "against": None}
    assert pytest.approx(0.64) == EXPECTED_OUTSIDE
    plane = np.zeros((5, 5))
    plane[2, 2], plane[0, 0] = 1, -1
    assert share_inside(plane) == {"for": 1, "against": 0}


def test_shares_are_of_the_sums_and_their_intervals_of_the_units() -> None:
    rng = np.random.default_rng(0)
    planes = rng.normal(size=(30, 10, 10)) * rng.uniform(0.1, 9, (30, 1, 1))
    evidence = ClassEvidence("covid", 99)
    for number, plane in enumerate(planes):
        evidence.add([plane], number // 2)
    found = evidence.as_dict()
    outside = np.ones((10, 10), bool)
    outside[2:8, 2:8] = False
    assert (found["num_rows"], found["num_images"]) == (99, 30)
    np.testing.assert_allclose(found["maps"], [planes.mean(axis=0)])
    for sign, of_sign in (("for", planes.clip(0)), ("against", (-planes).clip(0))):
        share = found["outside"][sign]
        assert share["share"] == pytest.approx(of_sign[:, outside].sum() / of_sign.sum())
        assert share["low"] < share["share"] < share["high"]
    few = ClassEvidence("covid", 2)
    few.add([np.ones((10, 10))], "one patient")
    assert few.as_dict()["outside"] == {
        "for": {"share": pytest.approx(0.64), "low": None, "high": None}, "against": None,
    }  # fmt: skip


def test_of_many_images_some_are_drawn_always_the_same() -> None:
    assert (choose_images(np.arange(MOST_IMAGES)) == np.arange(MOST_IMAGES)).all()
    chosen = choose_images(np.arange(5000))
    assert len({*chosen.tolist()}) == MOST_IMAGES
    assert (chosen == choose_images(np.arange(5000))).all()
    assert 0.4 < chosen.mean() / 5000 < 0.6


def write_marked(root: Path, place: slice) -> Path:
    """Write 25 images of noise of each class; those of covid have a bright mark in one place."""
    for number in range(50):
        rng = np.random.default_rng(number)
        image = rng.integers(60, 110, (32, 32), np.uint8)
        if number % 2:
            image[place, place] += 90
        path = root / ("normal", "covid")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return root


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with ``data`` and ``c.h5``: the mark in the ``middle``, and in the ``corner``."""
    made = {}
    for name, place in (("middle", slice(12, 20)), ("corner", slice(0, 8))):
        folder = tmp_path_factory.mktemp(name)
        write_marked(folder / "data", place)
        featcache.extract(folder / "data", folder / "c.h5", backbone=tiny_network.build(), **QUIET)
        made[name] = folder
    return made


def audit(folder: Path, **options: Any) -> featcache.Audit:
    given: dict[str, Any] = {
        "data": folder / "data", "only": "outliers", "evidence": True,
        "backbone": tiny_network.build(), "device": "cpu", **QUIET,
    }  # fmt: skip
    return featcache.audit(folder / "c.h5", **given | options)


def test_audit_tells_a_mark_in_the_middle_from_one_in_the_corner(marked: dict[str, Path]) -> None:
    lines = list[str]()
    shares = {}
    for name, folder in marked.items():
        found = audit(folder, say=lines.append).evidence
        assert found is not None
        assert (found["reason"], found["expected"]) == (None, pytest.approx(0.64))
        (covid, normal) = found["classes"]
        assert (covid["class"], covid["num_images"], normal["num_images"]) == ("covid", 25, 25)
        assert np.shape(covid["maps"]) == (1, 16, 16)
        shares[name] = covid["outside"]["for"]["share"]
    assert shares["middle"] < 0.55
    assert shares["corner"] > 0.75
    text = "\n".join(lines)
    for part in ("evidence outside the middle (0.6 of each side)", "were it spread evenly"):
        assert part in text
    assert "covid (25)" in text
    assert max(map(len, lines)) <= 80


def test_maps_add_up_to_the_log_odds_of_the_other_folds_heads(marked: dict[str, Path]) -> None:
    cache = featcache.open_cache(marked["middle"] / "c.h5")
    folded = FoldedRows(cache, lambda _: None)
    assert not isinstance(folded.folds, str)
    moved = np.zeros(folded.num_rows)
    for head, (_, judged) in zip(folded.heads, folded.folds, strict=True):
        probs = folded.probs[judged]
        moved[judged] = np.log(probs[:, 0] / probs[:, 1]) + head[1].intercept_[0]
    found = audit(marked["middle"]).evidence
    assert found is not None
    for number, sign in ((0, 1), (1, -1)):
        total = np.sum(found["classes"][number]["maps"])
        assert total == pytest.approx(sign * moved[folded.targets == number].mean(), abs=1e-3)


def test_what_cannot_be_measured_is_said(marked: dict[str, Path], tmp_path: Path) -> None:
    folder = marked["corner"]
    few = tmp_path / "few.h5"
    featcache.extract(
        folder / "data", few, backbone=tiny_network.build(), include="*/[1-9].png", **QUIET
    )
    lines = list[str]()
    found = featcache.audit(
        few, data=folder / "data", only="same", evidence=True, backbone=tiny_network.build(),
        say=lines.append,
    ).evidence  # fmt: skip
    assert found is not None
    assert "labelled rows" in found["reason"]
    assert any("not measured" in line for line in lines)


def test_report_shows_the_maps_of_valid_and_of_test_folded_away(
    marked: dict[str, Path], tmp_path: Path
) -> None:
    data, cache = marked["corner"] / "data", tmp_path / "c.h5"
    featcache.split(data, tmp_path / "s.csv", fractions=(0.5, 0.25, 0.25), **QUIET)
    featcache.extract(tmp_path / "s.csv", cache, backbone=tiny_network.build(), **QUIET)
    featcache.train(cache, tmp_path / "run", hidden=(8,), epochs=20, learning_rate=5e-3, **QUIET)
    lines = list[str]()
    made = featcache.report(
        tmp_path / "run", tmp_path / "r.html", data=tmp_path / "s.csv",
        backbone=tiny_network.build(), device="cpu", say=lines.append,
    )  # fmt: skip
    page = (tmp_path / "r.html").read_text("utf-8")
    assert (made.has_evidence, made.has_images) == (True, False)
    assert "Where the evidence lies in images of valid" in page
    test = page.index('<details id="test"')
    assert test < page.index("Where the evidence lies in images of test") < page.index("#errors")
    assert "lies outside the middle" in page
    lone = featcache.report(tmp_path / "run", tmp_path / "r.html", data=tmp_path / "s.csv", **QUIET)
    assert not lone.has_evidence
    assert "Where the evidence lies" not in (tmp_path / "r.html").read_text("utf-8")
