"""Predict and export: the deployed network equals the cached path, in its own library too."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sample_images import write_image, write_tree

from featcache.backbones.backbone import Backbone
from featcache.cache.reading import open_cache
from featcache.cache.writing import write_cache
from featcache.deployment.classifier import load_classifier
from featcache.deployment.predictions import predict
from featcache.errors import BackboneError, ConfigError, DataError, RunError
from featcache.extraction.extraction import extract
from featcache.heads.fit import predict_probs
from featcache.heads.run import load_head, load_run
from featcache.heads.training import train

TINY = "python:tiny_network:build"


@pytest.fixture
def run(tree: Path, tmp_path: Path, tiny_backbone: Backbone) -> Path:
    extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    train(tmp_path / "c.h5", tmp_path / "run", hidden=(16,), epochs=5, learning_rate=5e-3)
    return tmp_path / "run"


def cached_probs(run: Path, split: str) -> dict[str, np.ndarray]:
    cache = open_cache(run.parent / "c.h5").splits[split]
    probs = predict_probs(load_head(load_run(run)), np.array(cache.features), torch.device("cpu"))
    return dict(zip(cache.paths, probs, strict=True))


def test_new_images_get_the_cached_path_s_probabilities(
    run: Path, tree: Path, tiny_backbone: Backbone
) -> None:
    wanted = cached_probs(run, "test")
    for classifier in (
        load_classifier(run, backbone=TINY),
        load_classifier(run, backbone=tiny_backbone),
    ):
        predictions = classifier.predict([tree / "test"])
        assert len(predictions.paths) == 12
        for path, probs, pred in zip(
            predictions.paths, predictions.probs, predictions.preds, strict=True
        ):
            name = Path(path).relative_to(tree).as_posix()
            np.testing.assert_allclose(probs, wanted[name], atol=1e-5)
            assert pred == predictions.classes[int(wanted[name].argmax())]


def test_a_cache_is_classified_without_images(run: Path, tmp_path: Path) -> None:
    predictions = predict(run, cache=tmp_path / "c.h5")
    wanted = {k: v for s in ("train", "valid", "test") for k, v in cached_probs(run, s).items()}
    assert len(predictions.paths) == 46
    for path, probs in zip(predictions.paths, predictions.probs, strict=True):
        np.testing.assert_allclose(probs, wanted[path], atol=1e-6)


def test_bad_images_are_failures_and_do_not_stop_the_rest(
    run: Path, tree: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(b"broken")
    write_image(tmp_path / "=1+1.png", 5, bright=True)
    images = [tmp_path / "bad.png", tmp_path / "=1+1.png", tree / "test" / "covid"]
    predictions = load_classifier(run, backbone=TINY).predict(images)
    assert [Path(p).name for p, _ in predictions.failures] == ["bad.png"]
    assert len(predictions.paths) == 7
    predictions.write_csv(tmp_path / "p.csv")
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert rows[-1]["failure"]
    assert float(rows[0]["prob_covid"]) + float(rows[0]["prob_normal"]) == pytest.approx(1)
    assert json.loads(json.dumps(predictions.as_dict()))["failures"][0]["reason"]


def test_nothing_there_and_no_images_are_errors(run: Path, tmp_path: Path) -> None:
    classifier = load_classifier(run, backbone=TINY)
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere.png", tmp_path / "empty"):
        with pytest.raises(DataError):
            classifier.predict([path])


def test_features_made_otherwise_are_refused(run: Path, tmp_path: Path) -> None:
    features = np.ones((2, 24), np.float32)
    other = {**open_cache(tmp_path / "c.h5").identity, "crop_mode": "center"}
    write_cache(
        tmp_path / "x.h5", features, np.array([0, 1]), ["a", "b"], classes=["covid", "normal"],
        identity=other,
    )  # fmt: skip
    with pytest.raises(RunError, match="crop_mode squash, found crop_mode center"):
        predict(run, cache=tmp_path / "x.h5")


def test_export_of_a_network_without_classifier(run: Path, tree: Path, tmp_path: Path) -> None:
    classifier = load_classifier(run, backbone=TINY)
    summary = classifier.export(tmp_path / "out.pt")
    assert json.loads((tmp_path / "out.pt.json").read_text()) == summary.as_dict()
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    network = classifier.as_network()
    network.load_state_dict(state, strict=True)
    assert {name.split(".")[0] for name in state} == {"backbone", "head"}


def test_an_export_never_replaces_a_file(run: Path, tmp_path: Path) -> None:
    classifier = load_classifier(run, backbone=TINY)
    (tmp_path / "out.pt").write_bytes(b"mine")
    with pytest.raises(RunError, match="an existing file"):
        classifier.export(tmp_path / "out.pt")
    assert (tmp_path / "out.pt").read_bytes() == b"mine"
    with pytest.raises(RunError, match="no such folder"):
        classifier.export(tmp_path / "nowhere" / "out.pt")
    with pytest.raises(ConfigError, match=r"\.pt"):
        classifier.export(tmp_path / "out.onnx")


_WITHOUT_FEATCACHE = """
import json, sys
import numpy as np, torch
from PIL import Image
from torch import nn
from efficientnet_pytorch import EfficientNet

facts = json.load(open("b0.pt.json"))
size, pre = facts["preprocessing"]["image_size"], facts["preprocessing"]
network = EfficientNet.from_name("efficientnet-b0", image_size=size)
network._fc = nn.Sequential(
    nn.BatchNorm1d(1280), nn.Linear(1280, 512), nn.ReLU(),
    nn.BatchNorm1d(512), nn.Linear(512, 128), nn.ReLU(),
    nn.BatchNorm1d(128), nn.Dropout(0.4), nn.Linear(128, len(facts["classes"])),
)
network.load_state_dict(torch.load("b0.pt", weights_only=True), strict=True)
network.eval()
result = {}
for path in sys.argv[1:]:
    image = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(pre[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.inference_mode():
        result[path] = network((x - mean) / std).softmax(1)[0].tolist()
assert "featcache" not in sys.modules
print(json.dumps(result))
"""


def test_an_exported_b0_loads_strictly_in_its_library_and_agrees(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "data", {"train": 6, "valid": 2, "test": 2})
    extract(tree, tmp_path / "c.h5", backbone="efficientnet-b0", weights="random", image_size=64)
    train(tmp_path / "c.h5", tmp_path / "run", epochs=3)
    wanted = cached_probs(tmp_path / "run", "test")
    assert np.ptp([p[0] for p in wanted.values()]) > 1e-3  # the features are alive
    load_classifier(tmp_path / "run", weights="random").export(tmp_path / "b0.pt")
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_FEATCACHE, *[f"data/{p}" for p in wanted]],
        cwd=tmp_path, capture_output=True, check=False, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    for path, probs in json.loads(done.stdout).items():
        np.testing.assert_allclose(probs, wanted[path.removeprefix("data/")], atol=1e-5)


def test_missing_weights_are_named_by_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import efficientnet_pytorch.utils

    tree = write_tree(tmp_path / "data", {"train": 6, "valid": 2, "test": 2})
    extract(tree, tmp_path / "c.h5", backbone="efficientnet-b0", weights="random", image_size=32)
    train(tmp_path / "c.h5", tmp_path / "run", epochs=1, hidden=())
    wanted = open_cache(tmp_path / "c.h5").identity["weights_sha256"]
    nowhere = {"efficientnet-b0": "http://127.0.0.1:9/efficientnet-b0-355c32eb.pth"}
    monkeypatch.setattr(efficientnet_pytorch.utils, "url_map", nowhere)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(BackboneError, match=f"{wanted}.*--weights FILE"):
        load_classifier(tmp_path / "run")


def test_a_run_s_python_backbone_is_not_called_unasked(run: Path) -> None:
    with pytest.raises(BackboneError, match="your word that its code may run"):
        load_classifier(run)
