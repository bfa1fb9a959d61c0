"""Audit with images: copies by pixels and pictures, shortcuts by facts, blacked-out centres."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from sample_copies import NEAR, SAME, draw_chest, write_copies
from tiny_network import IMAGE_SIZE

import featcache
from featcache.backbones.backbone import Backbone
from featcache.evaluation.auditing import registration, thumbnails
from featcache.evaluation.auditing.shortcuts import picture_facts
from featcache.pixels.facts import measure_picture
from featcache.pixels.images import PixelRules
from featcache.pixels.isolation import IsolatedDecoder
from featcache.pixels.views import PLAIN, render

pytestmark = pytest.mark.usefixtures("one_thread")


def quiet(cache: Path, **options: Any) -> featcache.Audit:
    return featcache.audit(cache, say=lambda line: None, **options)


def extract(data: Path, cache: Path, backbone: Backbone) -> Path:
    featcache.extract(data, cache, backbone=backbone, say=lambda line: None, progress=False)
    return cache


class Planted(NamedTuple):
    data: Path
    cache: Path
    origins: dict[str, str]
    found: featcache.Audit
    lines: list[str]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone) -> Planted:
    """40 pictures and one copy of each kind, audited for copies."""
    root = tmp_path_factory.mktemp("planted")
    origins = write_copies(root / "data")
    cache = extract(root / "data", root / "c.h5", tiny_backbone)
    lines: list[str] = []
    found = featcache.audit(
        cache, data=root / "data", only="same,near", csv=root / "copies.csv", say=lines.append
    )
    return Planted(root / "data", cache, origins, found, lines)


def stems(pair: dict[str, Any]) -> set[str]:
    return {Path(row["path"]).stem for row in pair["rows"]}


# ----------------------------------------------------------------------------------------- copies


def test_copies_of_every_kind_are_found_and_nothing_else(planted: Planted) -> None:
    """Each copy is in one set with its original, and no set joins two originals."""
    table = (planted.cache.parent / "copies.csv").read_text(encoding="utf-8").splitlines()[1:]
    sets: dict[str, set[str]] = {}
    for path, _, number in (line.split(",") for line in table):
        if number:
            sets.setdefault(number, set()).add(path)
    endings = SAME | {kind: ending for kind, (_, ending) in NEAR.items()}
    wanted = [
        {origin, f"test/{origin.split('/')[1]}/{kind}.{endings[kind]}"}
        for kind, origin in planted.origins.items()
    ]
    assert sorted(map(sorted, sets.values())) == sorted(map(sorted, wanted))
    assert planted.found.num_leaks == len(NEAR) + len(SAME)


def test_the_same_pixels_in_another_format_are_the_same_picture(planted: Planted) -> None:
    same = planted.found.same
    assert same is not None
    assert (same["num_sets"], same["num_by_pixels"]) == (3, 2)
    assert "same pixels in different files: 2 sets" in planted.lines
    without = quiet(planted.cache, only="same").same
    assert without is not None
    assert (without["num_sets"], without["num_by_pixels"]) == (1, None)


def test_pairs_say_how_they_are_alike(planted: Planted) -> None:
    near = planted.found.near
    assert near is not None
    assert near["num_pairs"] == len(NEAR)
    assert near["pictures"]["threshold"] >= 0.9
    told = {kind: pair for pair in near["pairs"] for kind in stems(pair) & NEAR.keys()}
    assert len(told) == 5
    for kind, pair in told.items():
        assert pair["confirmed"]
        assert pair["mirrored"] == (kind in {"mirrored", "both"}), kind
        assert pair["inverted"] == (kind in {"inverted", "both"}), kind


def test_features_that_agree_by_chance_are_rejected_by_the_pictures(
    planted: Planted, tmp_path: Path
) -> None:
    """Two rows with the features of one, of pictures that differ."""
    opened = featcache.open_cache(planted.cache)
    splits = {name: split.read_features() for name, split in opened.splits.items()}
    splits["train"][30] = splits["train"][31]
    targets = {name: split.targets for name, split in opened.splits.items()}
    paths = {name: split.paths for name, split in opened.splits.items()}
    featcache.write_cache(tmp_path / "c.h5", splits, targets, paths, classes=opened.classes)
    pair = set(paths["train"][30:32])

    def pairs(**options: Any) -> list[set[str]]:
        near = quiet(tmp_path / "c.h5", only="near", **options).near
        assert near is not None
        return [{row["path"] for row in found["rows"]} for found in near["pairs"]]

    assert pair in pairs()
    near = quiet(tmp_path / "c.h5", only="near", data=planted.data).near
    assert near is not None
    assert near["pictures"]["num_rejected"] >= 1
    assert pair not in pairs(data=planted.data)


def test_few_pictures_are_not_compared(tmp_path: Path, tiny_backbone: Backbone) -> None:
    for i in range(6):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_chest(i // 3, 40).save(path)
    cache = extract(tmp_path / "data", tmp_path / "c.h5", tiny_backbone)
    found = quiet(cache, data=tmp_path / "data", only="near").near
    assert found is not None
    assert (found["threshold"], found["pictures"], found["num_pairs"]) == (None, None, 0)


def test_pictures_with_little_in_them_are_not_compared(
    tmp_path: Path, tiny_backbone: Backbone
) -> None:
    """Bars that differ in their place alone: laid over each other, they agree."""
    for i in range(24):
        pixels = np.full((64, 64), 30, np.uint8)
        pixels[:, 20 + i // 4 : 26 + i // 4] = 200
        pixels[0, 0] = i  # none is another's copy
        (tmp_path / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "data" / "ab"[i % 2] / f"{i:02}.png")
    cache = extract(tmp_path / "data", tmp_path / "c.h5", tiny_backbone)
    lines: list[str] = []
    found = featcache.audit(cache, data=tmp_path / "data", only="near", say=lines.append).near
    assert found is not None
    assert found["pictures"] == {"threshold": None, "num_compared": 0, "num_rejected": 0}
    assert any("too little detail" in line for line in lines)


def test_images_that_are_gone_changed_or_too_large_are_named_and_the_rest_is_audited(
    planted: Planted, tmp_path: Path
) -> None:
    data = shutil.copytree(planted.data, tmp_path / "data")
    (data / "train/covid/030.png").unlink()
    draw_chest(99).save(data / "train/normal/031.png")
    lines: list[str] = []
    found = featcache.audit(planted.cache, data=data, only="same,near", say=lines.append)
    assert found.images is not None
    assert found.images["num_read"] == 40 + len(NEAR) + len(SAME) - 2
    assert found.images["missing"] == {"num_rows": 1, "paths": ["train/covid/030.png"]}
    assert found.images["changed"] == {"num_rows": 1, "paths": ["train/normal/031.png"]}
    assert found.num_leaks == planted.found.num_leaks
    (line,) = (line for line in lines if "not audited by their images" in line)
    assert "1 image missing (train/covid/030.png)" in line
    assert "1 image changed (train/normal/031.png)" in line
    small = quiet(planted.cache, data=data, only="same", max_pixels=50 * 50)
    assert small.images is not None
    assert small.images["num_read"] == 1  # the halved one
    with pytest.raises(featcache.CacheError, match="none of 51 with the same name"):
        quiet(planted.cache, data=data / "train", only="same")


def test_blocks_find_the_same_candidates(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    small = np.stack([np.asarray(draw_chest(i, 64)) for i in range(30)])
    whole = thumbnails.find_candidates(small)
    monkeypatch.setattr(thumbnails, "_BLOCK_BYTES", 4 * 30 * 7)
    monkeypatch.setattr(thumbnails, "_ROWS", 11)
    assert thumbnails.find_candidates(small).tolist() == whole.tolist()
    scores = registration.compare_pictures(small, whole).scores
    monkeypatch.setattr(registration, "_PAIRS", 13)
    parted = registration.compare_pictures(small, whole).scores
    assert parted == pytest.approx(scores, abs=1e-4)


def test_pictures_of_one_colour_agree_with_nothing() -> None:
    small = np.stack([np.full((64, 64), value, np.uint8) for value in (0, 9, 255)])
    pairs = np.array([[0, 1], [1, 2]])
    assert registration.compare_pictures(small, pairs).scores.tolist() == [-1, -1]


# ------------------------------------------------------------------------------- facts, shortcuts


def test_facts_are_measured_here_and_in_a_child_process_alike(tmp_path: Path) -> None:
    pixels = np.zeros((40, 64, 3), np.uint8)
    pixels[:, 56:, 0] = 200  # the right stripe is red
    Image.fromarray(pixels).save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    recipes = [(PixelRules(16), PLAIN)]
    here = render(data, recipes, bytes(32), with_facts=True).facts
    with IsolatedDecoder() as child:
        assert child.render(data, recipes, bytes(32), with_facts=True).facts == here
    assert here is not None
    values = here.values
    assert (values["width"], values["height"], values["aspect ratio"]) == ((64,), (40,), (1.6,))
    assert (values["grey file"], values["number of channels"], values["colour in it"]) == (
        (0,),
        (3,),
        (1,),
    )
    assert values["brightness of borders"][:4] == (7.5, 7.5, 0, 60)
    assert values["brightness of corners"] == (0, 60, 0, 60)


def test_equal_channels_are_the_same_pixels_and_another_shape_is_not() -> None:
    grey = np.arange(200, dtype=np.uint8).reshape(10, 20)
    hashes = [
        measure_picture(pixels, num_channels=1, is_deep=False).pixels_sha256
        for pixels in (grey, np.stack([grey] * 3, axis=2), grey.reshape(20, 10), grey + 1)
    ]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


class Bordered(NamedTuple):
    data: Path
    cache: Path


@pytest.fixture(scope="module")
def bordered(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone) -> Bordered:
    """Noise of the network's own size; the border tells the class, and so does grey or RGB."""
    root = tmp_path_factory.mktemp("bordered")
    rng = np.random.default_rng(3)
    for i in range(48):
        name = "ab"[i % 2]
        pixels = rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE), np.uint8)
        edge = IMAGE_SIZE // 8
        border = np.ones(pixels.shape, bool)
        border[edge:-edge, edge:-edge] = False
        pixels[border] //= 1 + 3 * (i % 2)
        (root / "data" / name).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels).convert("L" if name == "b" else "RGB")
        image.save(root / "data" / name / f"{i:03}.png")
    return Bordered(root / "data", extract(root / "data", root / "c.h5", tiny_backbone))


def test_a_grey_file_is_a_shortcut_that_is_named(bordered: Bordered) -> None:
    lines: list[str] = []
    found = featcache.audit(
        bordered.cache, only="shortcuts", data=bordered.data, say=lines.append
    ).shortcuts
    assert found is not None
    assert found["verdict"] == "not shown to beat"
    assert "grey file alone: 1.000" in " ".join(line.strip() for line in lines)
    facts = {row["fact"]: max(row["logistic"], row["tree"]) for row in found["facts"]}
    assert facts["grey file"] == facts["number of channels"] == facts["brightness of borders"] == 1
    assert "colour in it" not in facts  # in none of the pictures
    assert max(map(len, lines)) <= 80


def test_blackout_is_what_images_with_black_centres_give(
    bordered: Bordered, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    """The same accuracies come from caches of images that are drawn black."""
    lines: list[str] = []
    found = featcache.audit(
        bordered.cache, only="same", data=bordered.data, blackout=(0.75, 0.5),
        backbone=tiny_backbone, say=lines.append,
    ).blackout  # fmt: skip
    assert found is not None
    assert (found["num_rows"], found["num_folds"], found["splits"]) == (48, 5, ["all"])
    assert [(row["share"], row["way"]) for row in found["blacked_out"]] == [
        (0.75, "centre removed"), (0.75, "centre only"), (0.5, "centre removed"),
        (0.5, "centre only"),
    ]  # fmt: skip
    for row in found["blacked_out"][:2]:
        data = shutil.copytree(bordered.data, tmp_path / row["way"])
        for path in data.rglob("*.png"):
            pixels = np.asarray(Image.open(path)).copy()
            edge = IMAGE_SIZE // 8
            centre = np.zeros(pixels.shape[:2], bool)
            centre[edge:-edge, edge:-edge] = True
            pixels[centre if row["way"] == "centre removed" else ~centre] = 0
            Image.fromarray(pixels).save(path)
        cache = extract(data, tmp_path / f"{row['way']}.h5", tiny_backbone)
        drawn = quiet(cache, only="shortcuts").shortcuts
        assert drawn is not None
        assert row["balanced_accuracy"] == pytest.approx(drawn["head"], abs=0.02)
    removed, only = (row["balanced_accuracy"] for row in found["blacked_out"][:2])
    assert removed > 0.95 > 0.75 > only
    assert found["head"] > 0.95
    assert "no evidence that the head needs the centre" in found["sentence"]
    assert any(line.startswith("  centre removed, 0.75 of each side") for line in lines)
    assert max(map(len, lines)) <= 80


def test_blackout_leaves_rows_without_an_image_out(
    bordered: Bordered, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    data = shutil.copytree(bordered.data, tmp_path / "data")
    for path in sorted((data / "a").iterdir())[:3]:
        path.unlink()
    found = quiet(bordered.cache, only="same", data=data, blackout=0.5, backbone=tiny_backbone)
    assert found.blackout is not None
    assert (found.blackout["num_rows"], found.blackout["reason"]) == (45, None)


def test_pictures_that_were_not_read_have_the_median_facts() -> None:
    images: Any = SimpleNamespace(facts={
        "mean": np.array([[1.0], [2], [np.nan], [9]]), "grey": np.array([[1.0], [1], [np.nan], [0]])
    })  # fmt: skip
    facts = picture_facts(images, np.array([0, 1, 2]))
    assert set(facts) == {"mean"}  # of these rows, all that were read are grey
    assert facts["mean"].ravel().tolist() == [1, 2, 1.5]
