"""Eight networks of three libraries as ONNX and as folder, in the long runs alone: equal decisions.

Weights are random, and heads fitted so that the probabilities of drawn images spread over 0.1 to
0.9: a head that is sure of everything would hide an error.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

import featcache
from featcache.cache.reading import open_cache
from featcache.deployment.exporting.parity import draw_phantoms
from featcache.heads.head import HeadConfig
from featcache.heads.run_writing import write_run
from featcache.pixels.images import decode

NAMES = (
    "efficientnet-b0", "efficientnet-lite0", "torchvision:resnet18", "torchvision:densenet121",
    "torchvision:convnext_tiny", "torchvision:mobilenet_v3_small", "timm:deit_tiny_patch16_224",
    "timm:mobilenetv4_conv_small",
)  # fmt: skip
NUM_IMAGES = 16  # even: none lies at 0.5


def spread_head(features: Any) -> tuple[HeadConfig, Mapping[str, Any]]:
    """Return a linear head that gives row i of (N, D) the probability 0.1 + 0.8 i / (N - 1)."""
    num_features = features.shape[1]
    probs = np.linspace(0.1, 0.9, len(features))
    mean, var = features.mean(axis=0, dtype=np.float64), features.var(axis=0, dtype=np.float64)
    scaled = (features - mean) / np.sqrt(var + 1e-5)
    weight = np.linalg.lstsq(scaled, np.log(probs / (1 - probs)), rcond=None)[0]
    return HeadConfig(num_features, 2, hidden=()), {
        "0.weight": np.ones(num_features, np.float32),
        "0.bias": np.zeros(num_features, np.float32),
        "0.running_mean": mean.astype(np.float32),
        "0.running_var": var.astype(np.float32),
        "0.num_batches_tracked": np.array(1),
        "2.weight": np.stack([weight, np.zeros(num_features)]).astype(np.float32),
        "2.bias": np.zeros(2, np.float32),
    }


@pytest.mark.parametrize("name", NAMES)
def test_decisions_are_those_of_the_run(
    name: str, tmp_path: Path, rounds: Callable[[int, int], int]
) -> None:
    if not rounds(0, 1):
        pytest.skip("with --long")
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    quiet: dict[str, Any] = {"say": lambda _: None}
    for number, pixels in enumerate(draw_phantoms(300, NUM_IMAGES)):
        place = tmp_path / "data" / ("ill" if number % 2 else "well") / f"{number:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place)
    featcache.extract(
        tmp_path / "data", tmp_path / "c.h5", backbone=name, weights="random", engine="eager",
        **quiet,
    )  # fmt: skip
    cache = open_cache(tmp_path / "c.h5")
    head, state = spread_head(cache.splits["all"].read_features())
    facts = {
        "path": "../c.h5", "fingerprint": cache.fingerprint, "identity": cache.identity,
        "payload_sha256": cache.payload_sha256, "num_failed": 0,
        "weights_source": cache.provenance["weights_source"],
    }  # fmt: skip
    run = tmp_path / "run"
    run.mkdir()
    write_run(
        run, head=head, state=state, training={}, seed=0, data_seed=0, classes=cache.classes,
        cache=facts, history=[{"epoch": 1}], environment={},
    )  # fmt: skip
    paths = [str(tmp_path / "data" / path) for path in cache.splits["all"].paths]
    classifier = featcache.load_classifier(run, weights="random", device="cpu")
    wanted = classifier.predict(paths)
    np.testing.assert_allclose(wanted.probs[:, 0], np.linspace(0.1, 0.9, NUM_IMAGES), atol=2e-3)
    made = featcache.export(run, tmp_path / "m.onnx", weights="random", data=tmp_path / "data")
    assert (made.parity["num_rows"], made.parity["num_changed"]) == (NUM_IMAGES, 0)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    rules = classifier.recipe.rules
    batch = np.stack([decode(Path(path).read_bytes(), rules).pixels for path in paths])
    probs, _, decision = session.run(None, {"pixels": batch})
    np.testing.assert_allclose(probs, wanted.probs, atol=1e-4)
    assert [wanted.classes[i] for i in decision] == [*wanted.preds]
    featcache.export(run, f"{tmp_path}/out/", weights="random")
    done = subprocess.run(
        [sys.executable, tmp_path / "out" / "predict.py", "--json", *paths],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows = json.loads(done.stdout)["predictions"]
    np.testing.assert_allclose([row["probs"] for row in rows], wanted.probs, atol=1e-4)
    assert [row["decision"] for row in rows] == [*wanted.preds]
