"""Predict and export: the deployed network equals the cached path, in its own library too."""

from __future__ import annotations

import csv
import json
import os
import pickle
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tiny_network
import torch
from PIL import ExifTags, Image, ImageOps
from sample_heads import probs_of
from sample_images import write_image, write_tree
from sample_selections import write_table

import featcache
from featcache.backbones.backbone import Backbone, build_backbone
from featcache.cache.reading import open_cache
from featcache.cache.selection import select
from featcache.cache.writing import write_cache
from featcache.deployment.classifier import load_classifier
from featcache.deployment.predictions import predict
from featcache.errors import BackboneError, ConfigError, DataError, FeatcacheWarning, RunError
from featcache.extraction.extraction import extract
from featcache.heads.run import load_head, load_run
from featcache.heads.training import train

TINY = "python:tiny_network:build"


@pytest.fixture
def run(cache_of_tree: Path, tmp_path: Path) -> Path:
    train(cache_of_tree, tmp_path / "run", hidden=(16,), epochs=5, learning_rate=5e-3)
    return tmp_path / "run"


def cached_probs(run: Path, split: str) -> dict[str, np.ndarray]:
    cache = open_cache(run.parent / "c.h5").splits[split]
    probs = probs_of(load_head(load_run(run)), np.array(cache.features))
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
    with pytest.warns(FeatcacheWarning, match="was trained on 24 .* by 10 of the 46 rows of c.h5"):
        predictions = predict(run, cache=tmp_path / "c.h5")
    assert (predictions.num_trained_on, predictions.num_chosen_by) == (24, 10)
    wanted = {k: v for s in ("train", "valid", "test") for k, v in cached_probs(run, s).items()}
    assert len(predictions.paths) == 46
    for path, probs in zip(predictions.paths, predictions.probs, strict=True):
        np.testing.assert_allclose(probs, wanted[path], atol=1e-6)


def test_rows_of_a_cache_that_the_head_has_not_seen_are_not_warned_of(
    run: Path, tmp_path: Path
) -> None:
    own = open_cache(tmp_path / "c.h5")
    rows = [(path, "all") for path in own.splits["test"].paths]
    table = write_table(tmp_path / "test.csv", rows, "path,split")
    select(own.path, tmp_path / "test.h5", table=table)
    result = predict(run, cache=tmp_path / "test.h5")  # warnings are errors here
    assert (result.num_trained_on, result.num_chosen_by, result.num_unclear) == (0, 0, 0)
    assert result.as_dict()["num_trained_on"] == 0
    (run / "rows.bin").unlink()
    own.path.unlink()
    with pytest.warns(FeatcacheWarning, match="rows of test.h5 cannot be told"):
        assert predict(run, cache=tmp_path / "test.h5").num_trained_on is None


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
    with pytest.raises(RunError, match="something already there"):
        classifier.export(tmp_path / "out.pt")
    assert (tmp_path / "out.pt").read_bytes() == b"mine"
    with pytest.raises(RunError, match="no such folder"):
        classifier.export(tmp_path / "nowhere" / "out.pt")
    with pytest.raises(ConfigError, match=r"\.pt"):
        classifier.export(tmp_path / "out.tflite")


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
        # the library's own network; the cache's engine may differ from it by 1e-4, relative L2
        np.testing.assert_allclose(probs, wanted[path.removeprefix("data/")], atol=1e-4)


def test_missing_weights_are_named_by_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import efficientnet_pytorch.utils

    tree = write_tree(tmp_path / "data", {"train": 6, "valid": 2, "test": 2})
    options = {"backbone": "efficientnet-b0", "image_size": 32}
    state = build_backbone("efficientnet-b0", weights="random", image_size=32).network.state_dict()
    state["_conv_head.weight"] *= 2
    torch.save(state, tmp_path / "mine.pt")
    extract(tree, tmp_path / "c.h5", weights=tmp_path / "mine.pt", engine="eager", **options)
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


def test_a_second_prediction_costs_one_forward_pass(
    run: Path, tree: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    forward = tiny_network.TinyNetwork.forward
    monkeypatch.setattr(
        tiny_network.TinyNetwork, "forward",
        lambda self, images: passes.append(len(images)) or forward(self, images),
    )  # fmt: skip
    classifier = load_classifier(run, backbone=tiny_backbone)
    image = tree / "test" / "covid" / "tec000_0.jpg"
    first = classifier.predict(image)
    assert len(passes) > 1  # engines are compared with the plain network
    for again in (image, Image.open(image), np.asarray(Image.open(image))):
        passes.clear()
        assert np.array_equal(classifier.predict(again).probs, first.probs)
        assert len(passes) == 1
    passes.clear()
    assert len(pickle.loads(pickle.dumps(classifier)).predict(image).probs) == 1
    assert len(passes) > 1  # a copy chooses its own engine


def test_one_or_many_in_the_order_asked_repeats_included(
    run: Path, tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    classifier = load_classifier(run, backbone=tiny_backbone)
    folder = tree / "test" / "normal"
    a, b = folder / "ten000_1.png", tree / "test" / "covid" / "tec001_0.jpg"
    (tmp_path / "bad.png").write_bytes(b"broken")
    array = np.array(Image.open(b).convert("RGB"))
    asked = [str(b), array, a, tmp_path / "bad.png", b, Image.open(a), folder]
    predictions = classifier.predict(asked)
    inside = sorted(path.as_posix() for path in folder.iterdir())
    assert [*predictions.paths] == [f"{b}", "1", f"{a}", f"{b}", "5", *inside]
    assert [path for path, _ in predictions.failures] == [f"{tmp_path / 'bad.png'}"]
    probs = predictions.probs
    assert np.array_equal(probs[[0, 0, 2]], probs[[1, 3, 4]])
    alone = classifier.predict(str(a)).probs  # another number of rows, another order of sums
    np.testing.assert_allclose(alone, probs[[2]], rtol=0, atol=1e-7)
    with pytest.raises(DataError, match=r"bad\.png"):
        classifier.predict_proba(asked)
    assert np.array_equal(featcache.predict(run, a, backbone=tiny_backbone).probs, alone)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "I;16", "LA"])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_a_pil_image_an_array_and_a_file_are_one(
    run: Path, tmp_path: Path, tiny_backbone: Backbone, mode: str, ending: str
) -> None:
    rng, path = np.random.default_rng(3), tmp_path / f"image.{ending}"
    image = Image.fromarray(rng.integers(0, 256, (50, 41, 3), np.uint8))
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, (50, 41), np.uint16))
    elif mode != "RGB":
        image = image.convert(mode)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    image.save(path, exif=turned)
    classifier = load_classifier(run, backbone=tiny_backbone)
    wanted = classifier.transform(path)
    # By name, Pillow 13 maps an uncompressed TIFF and forgets to turn it.
    opened = Image.open(BytesIO(path.read_bytes()))
    before = opened.info.copy(), opened.mode
    assert np.array_equal(classifier.transform(opened), wanted)
    assert (opened.info, opened.mode) == before
    if mode in {"L", "RGB"}:
        upright = np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(path.read_bytes()))))
        assert np.array_equal(classifier.transform(upright), wanted)
    if mode == "RGB":
        both = classifier.transform(np.stack([upright, upright]))
        assert np.array_equal(both, np.concatenate([wanted, wanted]))


def test_preprocessed_batches_and_what_is_none(
    run: Path, tree: Path, tiny_backbone: Backbone
) -> None:
    classifier = load_classifier(run, backbone=tiny_backbone)
    assert repr(classifier) == "Classifier(python:tiny_network:build: covid, normal; on cpu)"
    batch = classifier.preprocess(tree / "test")
    assert (batch.shape, batch.dtype) == ((12, 3, 32, 32), torch.float32)
    probs = classifier.predict_proba(tree / "test")
    again = classifier.predict(batch, preprocessed=True)
    np.testing.assert_allclose(again.probs, probs, rtol=0, atol=1e-6)
    assert again.paths == tuple(map(str, range(12)))
    with torch.inference_mode():
        joined = classifier.as_network()(batch).softmax(1).numpy()
    np.testing.assert_allclose(joined, probs, rtol=0, atol=1e-5)
    for images, preprocessed in (
        (batch, False), (batch[0], True), (batch.numpy(), True), (np.zeros((9, 9, 4), "u1"), False),
        (np.zeros((9, 9), "f4"), False), ([np.zeros((2, 9, 9, 3), "u1")], False),
        (None, False), (3.5, False), (bytearray(9), False),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            classifier.predict(images, preprocessed=preprocessed)
    assert [name for name, _ in classifier.predict([3.5]).failures] == ["0"]
    image = next((tree / "test" / "covid").iterdir())
    with pytest.raises(ConfigError, match=r"found bytes.*PIL\.Image\.open"):
        classifier.predict(image.read_bytes())
    with Image.open(image) as opened:
        assert len(classifier.predict(opened).paths) == 1


def test_the_verb_takes_images_or_a_cache(run: Path, tmp_path: Path) -> None:
    for given in ({}, {"images": "a.png", "cache": tmp_path / "c.h5"}):
        with pytest.raises(ConfigError, match="images or a cache"):
            predict(run, **given)
    with pytest.raises(ConfigError, match="--average-views"):
        predict(run, "a.png", average_views=True)
    with pytest.warns(FeatcacheWarning, match="trained on"):
        predict(run, cache=tmp_path / "c.h5", csv=tmp_path / "p.csv")
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 47
    with pytest.raises(ConfigError, match="--csv"):
        predict(run, cache=tmp_path / "c.h5", csv=tmp_path / "nowhere" / "p.csv")
