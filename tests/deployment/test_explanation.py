"""explain: maps that add up, the occlusion beside them, the nearest training images, the folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_network
import torch
from PIL import Image
from sample_images import write_tree
from torch import nn

import featcache
from featcache.backbones.backbone import wrap_backbone
from featcache.deployment.classifier import Classifier, load_classifier
from featcache.deployment.explainer import Explainer
from featcache.errors import ConfigError, DataError
from featcache.heads.prediction import predict_probs

QUIET: dict[str, Any] = {"say": lambda _: None}
BLOB = 9  # pixels, of the sign of disease


def draw(seed: int, *, sick: bool) -> tuple[Any, tuple[int, int]]:
    """Return an image (32, 32) of noise, and the corner of the bright blob of a sick one."""
    rng = np.random.default_rng(seed)
    image, (top, left) = rng.integers(60, 110, (32, 32), np.uint8), rng.integers(0, 32 - BLOB, 2)
    if sick:
        image[top : top + BLOB, left : left + BLOB] += 90
    return image, (int(top), int(left))


def write_blobs(root: Path) -> Path:
    for number in range(80):
        name, split = ("covid", "normal")[number % 2], "valid" if number % 8 > 5 else "train"
        path = root / split / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(number, sick=name == "covid")[0]).save(path)
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """Images ``data``, their cache, and runs: ``linear``, ``run`` (a hidden layer), an ensemble."""
    folder = tmp_path_factory.mktemp("explained")
    write_blobs(folder / "data")
    cache, backbone = folder / "c.h5", tiny_network.build()
    featcache.extract(folder / "data", cache, backbone=backbone, **QUIET)
    shape: dict[str, Any] = {"epochs": 40, "learning_rate": 5e-3, **QUIET}
    featcache.train(cache, folder / "linear", hidden=(), **shape)
    featcache.train(cache, folder / "run", hidden=(16,), **shape)
    featcache.crossval(cache, folder / "folds", folds=2, keep_ensemble=True, hidden=(8,), **shape)
    return folder


def explainer_of(run: Path, **asked: Any) -> Explainer:
    return Explainer(load_classifier(run, backbone=tiny_network.build(), device="cpu"), **asked)


@pytest.mark.parametrize("name", ["linear", "run", "folds/ensemble"])
def test_the_map_adds_up_to_the_log_odds_of_the_probabilities(place: Path, name: str) -> None:
    explainer = explainer_of(place / name, positive="covid")
    made = explainer.explain([draw(500, sick=True)[0]])
    (prob, other), (facts,) = made.probs, made.maps
    assert made.log_odds == pytest.approx(np.log(prob / other), abs=1e-4)
    total = made.baseline + np.sum(facts["map"])
    assert total == pytest.approx(made.log_odds, abs=1e-4 if name == "linear" else 1e-3)
    assert (made.num_steps == 1) == (name == "linear")
    assert np.shape(facts["map"]) == (16, 16)
    assert np.shape(facts["occlusion"]) == (8, 8)
    run = featcache.load_run(place / name)
    mean = featcache.open_cache(place / "c.h5").splits["train"].features.mean(0, dtype=np.float64)
    at_mean = predict_probs(run.head, run.state, mean[None].astype(np.float32))[0]
    assert made.baseline == pytest.approx(np.log(at_mean[0] / at_mean[1]), abs=1e-3)
    against = explainer_of(place / name, positive="normal").explain([draw(500, sick=True)[0]])
    np.testing.assert_allclose(against.maps[0]["map"], -np.array(facts["map"]), atol=1e-12)


def test_map_and_occlusion_point_to_the_sign_of_disease_and_another_head_does_not(
    place: Path,
) -> None:
    explainer = explainer_of(place / "run", positive="covid")
    classifier = load_classifier(place / "run", backbone=tiny_network.build(), device="cpu")
    head = featcache.HeadConfig(24, 2, (16,))
    from featcache.heads.head import initial_state

    random = Explainer(
        Classifier(
            replace(classifier.run, state=initial_state(head, 5)), classifier.recipes,
            torch.device("cpu"),
        ),
        "covid",
    )  # fmt: skip
    hits, chance, agreement, differences = {"map": 0, "occlusion": 0}, 0.0, [], []
    for seed in range(900, 920):
        image, (top, left) = draw(seed, sick=True)
        mask = np.zeros((32, 32), bool)
        mask[top : top + BLOB, left : left + BLOB] = True
        (facts,), (other,) = explainer.explain([image]).maps, random.explain([image]).maps
        for key in hits:
            plane = np.array(facts[key])
            cell = 32 // len(plane)
            touched = mask.reshape(len(plane), cell, -1, cell).any((1, 3))
            hits[key] += bool(touched.flat[plane.argmax()])
        chance += mask.mean()
        agreement.append(facts["rank_correlation"])
        plane = np.array(facts["map"])
        differences.append(np.linalg.norm(plane - other["map"]) / np.linalg.norm(plane))
    assert hits["map"] >= 18
    assert hits["occlusion"] >= 18
    assert chance < 3
    assert np.median(agreement) > 0.3
    assert min(differences) > 0.3


@pytest.mark.usefixtures("drawn")
def test_the_folder_and_the_lines(place: Path, tmp_path: Path) -> None:
    lines = list[str]()
    images = sorted((place / "data" / "valid" / "covid").iterdir())[:2]
    (tmp_path / "bad.png").write_bytes(b"broken")
    featcache.decide(place / "run", positive="covid", threshold=0.4, **QUIET)
    made = featcache.explain(
        place / "run", [*images, tmp_path / "bad.png"], tmp_path / "out", say=lines.append,
        backbone=tiny_network.build(), device="cpu",
    )  # fmt: skip
    (place / "run" / "decision.json").unlink()
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"000{i + 1}_{path.stem}.png" for i, path in enumerate(images)] + [
        "explanations.json"
    ]
    with Image.open(tmp_path / "out" / names[0]) as picture:
        assert min(picture.size) > 300
    facts = json.loads((tmp_path / "out" / "explanations.json").read_text("utf-8"))
    assert facts["explanations"] == json.loads(json.dumps(made.as_dict()["explanations"]))
    assert facts["failures"][0]["path"].endswith("bad.png")
    first = made.explanations[0]
    assert (first.preds, first.decision, first.unlike_training) == (("covid",), "covid", False)
    assert [near["same"] for near in first.nearest] == [True, False, False, False, False]
    assert first.nearest[0]["path"].endswith(images[0].name)
    assert {near["classes"][0] for near in first.nearest} <= {"covid", "normal"}
    distances = [near["distance"] for near in first.nearest]
    assert distances == sorted(distances)
    text = "\n".join(lines)
    for part in (
        "; decision: covid", "log-odds of covid against normal: +",
        "in the middle 36%: ",
        "rank correlation", "near: covid, distance 0.000", "the image itself", "failed: ",
        "Not for diagnosis",
    ):  # fmt: skip
        assert part in text
    with pytest.raises(DataError, match="none of 1, the first being"):
        featcache.explain(
            place / "run", tmp_path / "bad.png", tmp_path / "out2", backbone=tiny_network.build(),
            **QUIET,
        )  # fmt: skip
    assert not (tmp_path / "out2").exists()


def test_nearest_rows_are_those_of_the_whole_cache(place: Path) -> None:
    explainer = explainer_of(place / "run")
    image = draw(321, sick=True)[0]
    made = explainer.explain([image])
    features = load_classifier(place / "run", backbone=tiny_network.build()).transform(image)[0]
    cache = featcache.open_cache(place / "c.h5")
    found = []
    for name in ("train", "valid"):
        split = cache.splits[name]
        lengths = np.linalg.norm(split.features, axis=1) * np.linalg.norm(features)
        found += zip(1 - split.features @ features / lengths, split.paths, strict=True)
    wanted = sorted(found)[:5]
    assert [near["path"] for near in made.nearest] == [path for _, path in wanted]
    assert [near["distance"] for near in made.nearest] == pytest.approx(
        [distance for distance, _ in wanted], abs=1e-5
    )


def test_without_the_cache_the_mean_is_the_heads_and_it_is_said(
    place: Path, tmp_path: Path
) -> None:
    (tmp_path / "lone").mkdir()
    for path in (place / "run").iterdir():
        if path.is_file():
            (tmp_path / "lone" / path.name).write_bytes(path.read_bytes())
    lines = list[str]()
    made = featcache.explain(
        tmp_path / "lone", draw(1, sick=True)[0], tmp_path / "out", say=lines.append,
        backbone=tiny_network.build(), device="cpu",
    ).explanations[0]  # fmt: skip
    assert (made.baseline_of, made.nearest, made.unlike_training) == ("head", (), None)
    assert made.baseline + np.sum(made.maps[0]["map"]) == pytest.approx(made.log_odds, abs=1e-3)
    assert any("not at hand" in line for line in lines)


class NoMap(tiny_network.TinyNetwork):
    """Its features come from a layer behind the pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(24, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.last(super().forward(images)).relu()
        return made


@pytest.mark.usefixtures("drawn")
def test_side_by_side_each_backbone_has_a_map_or_occlusion_alone(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        no_map = NoMap()
    backbones = [
        wrap_backbone("grey", tiny_network.network(), image_size=32),
        wrap_backbone("large", tiny_network.network(), image_size=48, mean=(0.5, 0.4, 0.3)),
        wrap_backbone("none", no_map, image_size=40),
    ]
    write_tree(tmp_path / "data")
    featcache.extract(tmp_path / "data", tmp_path / "caches", backbone=backbones, **QUIET)
    featcache.train(tmp_path / "caches", tmp_path / "run", hidden=(8,), epochs=4, **QUIET)
    lines = list[str]()
    made = featcache.explain(
        tmp_path / "run", tmp_path / "data/test/covid/tec000_0.jpg", tmp_path / "out",
        backbone=backbones, device="cpu", say=lines.append,
    ).explanations[0]  # fmt: skip
    assert [facts["backbone"] for facts in made.maps] == ["grey", "large", "none"]
    assert [facts["map"] is None for facts in made.maps] == [False, False, True]
    assert np.shape(made.maps[1]["map"]) == (24, 24)
    assert np.shape(made.maps[2]["occlusion"]) == (7, 7)
    assert made.maps[2]["rank_correlation"] is None
    parts = sum(np.sum(facts["map"] or facts["unlocated"]) for facts in made.maps)
    assert made.baseline + parts == pytest.approx(made.log_odds, abs=1e-3)
    assert sum("occlusion alone" in line for line in lines) == 1


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three classes."""
    folder = tmp_path_factory.mktemp("three")
    for number, name in enumerate(("covid", "normal", "pneumonia")):
        for i in range(12):
            path = folder / "data" / name / f"{number}{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw(i + 50 * number, sick=number == 0)[0]).save(path)
    featcache.split(folder / "data", folder / "s.csv", **QUIET)
    featcache.extract(folder / "s.csv", folder / "c.h5", backbone=tiny_network.build(), **QUIET)
    featcache.train(folder / "c.h5", folder / "run", hidden=(), epochs=3, **QUIET)
    return folder


def test_of_three_classes_one_is_held_against_the_runner_up_or_a_named_one(three: Path) -> None:
    image = draw(77, sick=True)[0]
    made = explainer_of(three / "run").explain([image])
    order = [made.classes[i] for i in np.argsort(made.probs)[::-1]]
    assert (made.positive, made.against) == (order[0], order[1])
    named = explainer_of(three / "run", positive=order[2], against=order[0]).explain([image])
    probs = dict(zip(named.classes, named.probs, strict=True))
    wanted = np.log(probs[order[2]] / probs[order[0]])
    assert named.log_odds == pytest.approx(wanted, abs=1e-4)
    held = explainer_of(three / "run", against=order[0]).explain([image])
    assert (held.positive, held.against) == (order[1], order[0])
    for asked, part in (
        ({"positive": "cat"}, "--positive"), ({"against": "dog"}, "one of covid, normal"),
        ({"positive": "covid", "against": "covid"}, "another class"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=part):
            explainer_of(three / "run", **asked)


def test_a_label_is_explained_by_its_own_logit(three: Path) -> None:
    loaded = load_classifier(three / "run", backbone=tiny_network.build(), device="cpu")
    labels = Classifier(replace(loaded.run, task="multilabel"), loaded.recipes, loaded.device)
    made = Explainer(labels, "normal").explain([draw(7, sick=True)[0]])
    prob = made.probs[1]
    assert made.against is None
    assert made.log_odds == pytest.approx(np.log(prob / (1 - prob)), abs=1e-4)
    assert made.baseline + np.sum(made.maps[0]["map"]) == pytest.approx(made.log_odds, abs=1e-4)
    assert made.preds == tuple(
        name for name, value in zip(made.classes, made.probs, strict=True) if value > 0.5
    )
    with pytest.raises(ConfigError, match="each label is a question of its own"):
        Explainer(labels, "normal", "covid")
