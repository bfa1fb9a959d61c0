"""The ONNX file: outputs, decisions and metadata against NumPy, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_network
import torch
from sample_decisions import decide_quietly
from sample_images import write_tree
from torch import nn

import featcache
from featcache.backbones.backbone import Backbone, wrap_backbone
from featcache.deployment.classifier import load_classifier
from featcache.deployment.exporting import delivery, parity
from featcache.deployment.exporting.graph import Outcome
from featcache.evaluation.deciding.decision_file import Decisions
from featcache.pixels.images import decode

QUIET: dict[str, Any] = {"say": lambda _: None}
CLASSES = ("a", "b", "c")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone) -> Path:
    """Images, their cache, and a run."""
    folder = tmp_path_factory.mktemp("graph")
    write_tree(folder / "data")
    featcache.extract(folder / "data", folder / "c.h5", backbone=tiny_backbone, **QUIET)
    options: dict[str, Any] = {"hidden": (8,), "epochs": 4, "learning_rate": 5e-3}
    featcache.train(folder / "c.h5", folder / "run", **options, **QUIET)
    decide_quietly(folder / "run", recall=0.9, refer=0.2)
    return folder


def open_onnx(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def pixels_of(side: int, number: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (number, side, side, 3), np.uint8)


def test_file_gives_what_the_run_predicts_at_any_batch(
    place: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    made = featcache.export(place / "run", tmp_path / "m.onnx", backbone=tiny_backbone)
    assert [*tmp_path.iterdir()] == [tmp_path / "m.onnx"]
    session, pixels = open_onnx(tmp_path / "m.onnx"), pixels_of(32, 9)
    assert [(i.name, i.type, i.shape[1:]) for i in session.get_inputs()] == [
        ("pixels", "tensor(uint8)", [32, 32, 3])
    ]
    classifier = load_classifier(place / "run", backbone=tiny_backbone)
    wanted = classifier.predict(pixels)
    for rows in (pixels, pixels[:1]):
        probs, calibrated, decision = session.run(None, {"pixels": rows})
        np.testing.assert_allclose(probs, wanted.probs[: len(rows)], atol=1e-6)
        np.testing.assert_array_equal(calibrated, probs)  # too few images for a temperature
        names = [{-1: "refer"}.get(d) or wanted.classes[d] for d in decision.tolist()]
        assert names == [*wanted.decision[: len(rows)]]
    assert made.parity["num_changed"] == 0
    assert made.parity["largest_error"] < made.parity["bound"] == 1e-4


def test_metadata_says_what_goes_in_and_comes_out(
    place: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    for name in ("m.onnx", "again.onnx"):
        featcache.export(place / "run", tmp_path / name, backbone=tiny_backbone)
    data = (tmp_path / "m.onnx").read_bytes()
    assert data == (tmp_path / "again.onnx").read_bytes()
    model = onnx.load_from_string(data)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    run = featcache.load_run(place / "run")
    assert json.loads(facts["classes"]) == ["covid", "normal"]
    assert facts["task"] == "multiclass"
    assert facts["fingerprint"] == run.cache["fingerprint"]
    assert facts["weights_sha256"] == tiny_backbone.weights_sha256
    assert facts["head_sha256"] == run.weights_sha256
    threshold = json.loads(facts["decision"])["thresholds"]["covid"]["threshold"]
    written = json.loads((place / "run" / "decision.json").read_text("utf-8"))
    assert threshold == written["decisions"]["covid"]["threshold"]
    (entry,) = json.loads(facts["inputs"])
    assert entry["preprocessing"]["mean"] == [*tiny_backbone.mean]
    assert str(place).encode() not in data


def test_images_nearest_the_threshold_are_compared_too(
    place: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    (tmp_path / "data").symlink_to(place / "data")
    made = featcache.export(
        place / "run", tmp_path / "m.onnx", backbone=tiny_backbone, data=tmp_path / "data"
    )
    assert (made.parity["num_rows"], made.parity["num_unread"]) == (20, 0)
    write_tree(tmp_path / "some", {"train": 2, "valid": 1, "test": 1})
    again = featcache.export(
        place / "run", tmp_path / "n.onnx", backbone=tiny_backbone, data=tmp_path / "some"
    )
    assert 0 < again.parity["num_unread"] == 20 - again.parity["num_rows"]


@pytest.mark.parametrize("fault", ["mean", "head", "threshold", "batch"])
def test_file_that_disagrees_is_refused_and_removed(
    place: Path, tmp_path: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:  # fmt: skip
    build = delivery.build_graph

    def wrong(classifier: Any, metadata: Any) -> bytes:
        model = onnx.load_from_string(build(classifier, metadata))
        arrays = {i.name: i for i in model.graph.initializer}
        if fault == "batch":
            for value in (*model.graph.input, *model.graph.output):
                value.type.tensor_type.shape.dim[0].dim_value = 2
            return bytes(model.SerializeToString())
        start, change = {
            "mean": ("backbones.0.shift", 0.02), "head": ("outcome.heads.0.5.bias", 0.3),
            "threshold": ("onnx::GreaterOrEqual", 0.01),
        }[fault]  # fmt: skip
        name = next(name for name in arrays if name.startswith(start))
        value = onnx.numpy_helper.to_array(arrays[name]).copy()
        value.reshape(-1)[0] += change
        arrays[name].CopyFrom(onnx.numpy_helper.from_array(value, name))
        return bytes(model.SerializeToString())

    monkeypatch.setattr(delivery, "build_graph", wrong)
    with pytest.raises(featcache.RunError, match=r"exported ONNX, .*expected .*, found"):
        featcache.export(place / "run", tmp_path / "m.onnx", backbone=tiny_backbone)
    assert [*tmp_path.iterdir()] == []


def decisions_of(task: str, **rules: dict[str, Any]) -> Decisions:
    usual = {"threshold": 0.5, "refer_below": None, "temperature": None}
    return Decisions(CLASSES, task, {name: usual | rule for name, rule in rules.items()})


@pytest.mark.parametrize(
    ("task", "decisions"),
    [
        ("multiclass", None),
        ("multiclass", decisions_of("multiclass", b={"threshold": 0.3})),
        ("multiclass", decisions_of("multiclass", b={"threshold": 0.3, "refer_below": 0.6})),
        ("multiclass", decisions_of("multiclass", c={"threshold": 0.4, "temperature": 2.5})),
        ("multilabel", None),
        ("multilabel", decisions_of("multilabel", a={"threshold": 0.2, "temperature": 0.3},
                                    c={"threshold": 0.9})),
    ],
)  # fmt: skip
@pytest.mark.parametrize("num_heads", [1, 3])
def test_outcome_is_what_numpy_makes_of_it(task: str, decisions: Any, num_heads: int) -> None:
    torch.manual_seed(num_heads)
    heads = [nn.Linear(4, 3) for _ in range(num_heads)]
    features = torch.randn(200, 4) * 3
    found = [o.detach().numpy() for o in Outcome(heads, task, 3, decisions)(features)]
    logits = np.stack([head(features).detach().numpy().astype("f8") for head in heads])
    powers = np.exp(logits)
    share = 1 / (1 + 1 / powers) if task == "multilabel" else powers / powers.sum(2, keepdims=True)
    probs = share.mean(0)
    np.testing.assert_allclose(found[0], probs, rtol=1e-12)
    calibrated = probs.copy()
    if decisions is not None:
        for name, of_class in decisions.calibrate(found[0]).items():
            calibrated[:, CLASSES.index(name)] = of_class
    np.testing.assert_allclose(found[1], calibrated, rtol=1e-9, atol=1e-15)
    numbers = parity.decision_numbers(decisions, CLASSES, task, found[0])
    np.testing.assert_array_equal(found[2], numbers)
    assert len(np.unique(found[2], axis=0)) > 1


def test_distance_is_how_far_a_probability_may_move() -> None:
    probs = np.array([[0.5, 0.3, 0.2], [0.1, 0.55, 0.35], [0.4, 0.35, 0.25]])
    usual = parity.distance_to_threshold(None, "multiclass", probs)
    np.testing.assert_allclose(usual, [0.1, 0.1, 0.025])
    rule = decisions_of("multiclass", b={"threshold": 0.3, "refer_below": 0.6})
    found = parity.distance_to_threshold(rule, "multiclass", probs)
    np.testing.assert_allclose(found, [0, 0.05, 0.05])
    labels = decisions_of("multilabel", a={"threshold": 0.45})
    found = parity.distance_to_threshold(labels, "multilabel", probs)
    np.testing.assert_allclose(found, [0.05, 0.05, 0.05])


def test_several_backbones_have_an_input_each(tmp_path: Path, tiny_backbone: Backbone) -> None:
    large = wrap_backbone("large", tiny_network.network(), image_size=48, mean=(0.5,) * 3)
    small = wrap_backbone("small", tiny_network.network(), image_size=32)
    write_tree(tmp_path / "data")
    featcache.extract(tmp_path / "data", tmp_path / "caches", backbone=[small, large], **QUIET)
    featcache.crossval(
        tmp_path / "caches", tmp_path / "folds", folds=2, hidden=(), epochs=2, keep_ensemble=True,
        **QUIET,
    )  # fmt: skip
    run = tmp_path / "folds" / "ensemble"
    classifier = load_classifier(run, backbone=[small, large])
    made = classifier.export(tmp_path / "m.onnx")
    assert [each["name"] for each in made.inputs] == ["pixels_0", "pixels_1"]
    paths = sorted((tmp_path / "data" / "test").rglob("*.*"))
    batch = {
        each["name"]: np.stack([decode(p.read_bytes(), recipe.rules).pixels for p in paths])
        for each, recipe in zip(made.inputs, classifier.recipes, strict=True)
    }
    probs, _, decision = open_onnx(tmp_path / "m.onnx").run(None, batch)
    wanted = classifier.predict(paths)
    np.testing.assert_allclose(probs, wanted.probs, atol=1e-6)
    assert [wanted.classes[i] for i in decision] == [*wanted.preds]
