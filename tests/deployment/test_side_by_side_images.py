"""Images by several backbones: decoded once, equal to the cached path, rebuilt in plain torch."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_network
import torch
from PIL import Image
from sample_images import write_tree
from torch import nn

from featcache.backbones.backbone import Backbone, wrap_backbone
from featcache.cache.reading import open_cache
from featcache.deployment.classifier import Classifier, load_classifier
from featcache.deployment.exporting.export import export
from featcache.deployment.predictions import predict
from featcache.errors import BackboneError, ConfigError, FeatcacheWarning
from featcache.extraction import view_stream
from featcache.extraction.extraction import extract
from featcache.heads.training import train
from featcache.pixels.views import render

QUIET: dict[str, Any] = {"say": lambda _: None}
SHAPE: dict[str, Any] = {"engine": "folded", "batch_size": 4}
"""Of the cache and of the classifier, whose rows are then equal to the bit."""


class Narrow(tiny_network.TinyNetwork):
    """Another network with other features, whose classifier its library has under ``widen``."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Linear(12, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.silu(self.norm(self.conv(images))).mean((2, 3))
        features: torch.Tensor = self.widen(hidden)
        return features


def backbones() -> list[Backbone]:
    """Two sizes of one network, and another network: 24 + 24 + 12 features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        narrow = Narrow()
    return [
        wrap_backbone("small", tiny_network.network(), image_size=32),
        wrap_backbone("large", tiny_network.network(), image_size=48, mean=(0.5,) * 3),
        wrap_backbone("narrow", narrow, image_size=40, classifier_name="widen"),
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images ``data``, the folder of their caches, and a run on them."""
    folder = tmp_path_factory.mktemp("images")
    write_tree(folder / "data")
    extract(folder / "data", folder / "caches", backbone=backbones(), **SHAPE, **QUIET)
    train(folder / "caches", folder / "run", hidden=(16,), epochs=4, learning_rate=5e-3, **QUIET)
    return folder


@pytest.fixture(scope="module")
def classifier(place: Path) -> Classifier:
    return load_classifier(place / "run", backbone=backbones()[::-1], batch_size=4)


def cached_probs(place: Path) -> dict[str, np.ndarray]:
    with pytest.warns(FeatcacheWarning, match="trained on 24 and was chosen by 10"):
        made = predict(place / "run", cache=place / "caches")
    return dict(zip(made.paths, made.probs, strict=True))


def test_images_get_the_cached_probabilities_bit_for_bit_from_one_decoding(
    place: Path, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = Counter[bytes]()

    def counting(data: bytes, recipes: Any, sha256: bytes) -> Any:
        counts[sha256] += 1
        return render(data, recipes, sha256)

    monkeypatch.setattr(view_stream, "render", counting)
    found = classifier.predict(place / "data" / "test")
    assert (len(counts), set(counts.values())) == (12, {1})
    wanted = cached_probs(place)
    for path, probs in zip(found.paths, found.probs, strict=True):
        name = Path(path).relative_to(place / "data").as_posix()
        np.testing.assert_array_equal(probs, wanted[name])
    assert repr(classifier).startswith("Classifier(large + narrow + small: covid, normal;")


def test_other_engines_and_batches_decide_alike(place: Path) -> None:
    found = predict(place / "run", place / "data" / "test", backbone=backbones(), batch_size=1)
    wanted = cached_probs(place)
    for path, probs in zip(found.paths, found.probs, strict=True):
        name = Path(path).relative_to(place / "data").as_posix()
        np.testing.assert_allclose(probs, wanted[name], atol=1e-5)
        assert probs.argmax() == wanted[name].argmax()


def test_images_in_memory_and_preprocessed_batches_too(place: Path, classifier: Classifier) -> None:
    paths = [Path(path) for path in classifier.predict(place / "data" / "test").paths]
    wanted = classifier.predict_proba(paths)
    again = pickle.loads(pickle.dumps(classifier))
    np.testing.assert_array_equal(again.predict_proba([Image.open(p) for p in paths]), wanted)
    batches = classifier.preprocess_each(paths)
    assert [batch.shape[-1] for batch in batches] == [48, 40, 32]
    found = classifier.predict_proba(batches, preprocessed=True)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    rows = classifier.transform(paths)
    splits = [open_cache(p).splits["test"] for p in sorted((place / "caches").iterdir())]
    np.testing.assert_array_equal(rows, np.concatenate([s.features for s in splits], 1))
    with torch.inference_mode():
        logits = classifier.as_network()(*batches)
    np.testing.assert_allclose(logits.softmax(1).numpy(), wanted, atol=1e-5)
    for wrong, said in (
        (batches[0], "3 batches, one a backbone, found Tensor"),
        (batches[:2], "3 batches, one a backbone, found tuple"),
        (batches[::-1], r"a float tensor \(B, 3, 48, 48\)"),
        ((*batches[:2], batches[2][:5]), "batches of the same images, found 12 and 12 and 5"),
    ):
        with pytest.raises(ConfigError, match=said):
            classifier.predict_proba(wrong, preprocessed=True)
    with pytest.raises(ConfigError, match=r"one backbone, found 3.* preprocess_each"):
        classifier.preprocess(paths)


def test_an_image_that_cannot_be_read_fails_once(
    place: Path, classifier: Classifier, tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(b"broken")
    good = sorted((place / "data" / "test" / "covid").iterdir())
    found = classifier.predict([tmp_path / "bad.png", *good])
    assert [Path(path).name for path, _ in found.failures] == ["bad.png"]
    assert len(found.paths) == len(good)
    flat = np.full((3, 100_000), 7, np.uint8)  # resized to no row of pixels
    found = classifier.predict([flat, np.zeros((9, 9), np.uint8)])
    assert len(found.paths) + len(found.failures) == 2


def test_caches_that_decode_differently_are_read_one_after_the_other(
    place: Path, tmp_path: Path
) -> None:
    for backbone, truncated in zip(backbones()[:2], ("skip", "keep"), strict=True):
        cache = tmp_path / f"{backbone.name}.h5"
        extract(place / "data", cache, backbone=backbone, truncated=truncated, **SHAPE, **QUIET)
    both = [tmp_path / "small.h5", tmp_path / "large.h5"]
    train(both, tmp_path / "run", hidden=(4,), epochs=1, **QUIET)
    with pytest.warns(FeatcacheWarning, match="trained on 24"):
        cached = predict(tmp_path / "run", cache=both)
    wanted = dict(zip(cached.paths, cached.probs, strict=True))
    found = predict(tmp_path / "run", place / "data" / "test", backbone=backbones(), batch_size=4)
    for path, probs in zip(found.paths, found.probs, strict=True):
        np.testing.assert_array_equal(
            probs, wanted[Path(path).relative_to(place / "data").as_posix()]
        )


class Rebuilt(nn.Module):
    """What ``deployment/README.md`` writes out: torch alone."""

    def __init__(self, backbones: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.backbones, self.head = nn.ModuleList(backbones), head

    def forward(self, *images: torch.Tensor) -> torch.Tensor:
        rows = [network(batch) for network, batch in zip(self.backbones, images, strict=True)]
        logits: torch.Tensor = self.head(torch.cat(rows, 1))
        return logits


def test_the_export_is_rebuilt_in_plain_torch(
    place: Path, classifier: Classifier, tmp_path: Path
) -> None:
    summary = classifier.export(tmp_path / "three.pt")
    facts = json.loads((tmp_path / "three.pt.json").read_text())
    assert facts == json.loads(json.dumps(summary.as_dict()))
    assert facts["format_version"] == 2
    assert not facts.keys() & {"backbone", "classifier_name", "preprocessing", "fingerprint"}
    networks: dict[str, nn.Module] = {
        "small": tiny_network.TinyNetwork(), "large": tiny_network.TinyNetwork(),
        "narrow": Narrow(),
    }  # fmt: skip
    ordered = []
    for each in facts["backbones"]:
        network = networks[each["backbone"]]
        if each["classifier_name"]:
            setattr(network, each["classifier_name"], nn.Identity())
        ordered.append(network)
    sizes = [each["num_features"] for each in facts["backbones"]]
    head = nn.Sequential(
        nn.BatchNorm1d(sum(sizes)), nn.Linear(sum(sizes), 16), nn.ReLU(), nn.BatchNorm1d(16),
        nn.Dropout(0.4), nn.Linear(16, len(facts["classes"])),
    )  # fmt: skip
    assert [str(layer) for layer in head] == facts["head"]["layers"]
    model = Rebuilt(ordered, head)
    model.load_state_dict(torch.load(tmp_path / "three.pt", weights_only=True), strict=True)
    paths = sorted((place / "data" / "test").rglob("*.*g"))
    batches = []
    for each in facts["backbones"]:
        rules = each["preprocessing"]
        side, mean, std = rules["image_size"], rules["mean"], rules["std"]
        images = [
            Image.open(p).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
            for p in paths
        ]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        batches.append(
            ((pixels.float() / 255 - torch.tensor(mean)) / torch.tensor(std)).movedim(3, 1)
        )
    with torch.inference_mode():
        probs = model.eval()(*batches).softmax(1).numpy()
    np.testing.assert_allclose(probs, classifier.predict_proba(paths), atol=1e-5)


def test_what_is_given_for_several_backbones_is_checked(place: Path, tmp_path: Path) -> None:
    large, narrow, small = sorted(backbones(), key=lambda backbone: backbone.name)
    for given, said in (
        ([large, narrow], "small"),
        ([large, narrow, wrap_backbone("small", tiny_network.network(), image_size=40)], "small"),
        (small, "preprocessing of small"),
    ):
        with pytest.raises(BackboneError, match=said):
            load_classifier(place / "run", backbone=given)
    with pytest.raises(ConfigError, match="one, or 3 in the order of the run's caches, found 2"):
        export(place / "run", tmp_path / "e.pt", weights=["a.pt", "b.pt"])
    assert not any(tmp_path.iterdir())
