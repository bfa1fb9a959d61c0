"""The files that commit c921d99 made, and the images they were made from.

``tests/data/golden`` holds what its command line wrote: a cache of 54 small images with groups and
one failure, a cache of three findings an image made from it, and for each a trained run, what
``evaluate --json`` printed and what ``predict --cache --csv`` wrote; a linear probe and the best
head of a sweep; and ``pixels.json``, the hash of a cache that is the same on every machine.

To make them once more, with a checkout of c921d99 installed as ``python``, in an empty folder::

    PYTHONPATH=FOLDER_OF_THIS_FILE_AND_OF_ITS_TINY_NETWORK python -m sample_golden
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import featcache

GOLDEN = Path(__file__).parent / "data" / "golden"
GROUPS = r"^([a-z]+\d+)_"
RUNS = {
    "run": "images.h5",
    "probe": "images.h5",
    "best": "images.h5",
    "findings_run": "findings.h5",
}
"""Each golden run and the cache that it was trained on."""


def write_images(folder: Path) -> Path:
    """Write the images: their bytes are the same on every machine and with every library."""
    seed = 0
    for split, number in {"train": 14, "valid": 6, "test": 7}.items():
        for name in ("covid", "normal"):
            for i in range(number):
                seed += 1
                file = f"{split[:2]}{name[0]}{i // 2:03d}_{i % 2}.bmp"
                write_image(folder / split / name / file, seed, brighter=name == "covid")
    (folder / "train" / "covid" / "trc999_0.bmp").write_bytes(b"no image")
    return folder


def write_image(path: Path, seed: int, *, brighter: bool = False) -> None:
    """Write seeded noise of a seeded brightness; the brightnesses of the two classes overlap."""
    rng = random.Random(seed)
    noise = np.frombuffer(rng.randbytes(40 * 45), np.uint8).reshape(40, 45)
    level = rng.randrange(60, 130) + (20 if brighter else 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((noise // 4 + level).astype(np.uint8)).save(path)


class PixelNetwork(torch.nn.Module):
    """Takes 24 values of the image as they are: no arithmetic that differs between machines."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.tensor(7))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, 7::128]


def pixels() -> featcache.Backbone:
    """Return the backbone ``python:sample_golden:pixels``."""
    return featcache.wrap_backbone("python:sample_golden:pixels", PixelNetwork(), image_size=32)


# --- what made the files


def command(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "featcache", *map(str, arguments)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def write_findings() -> None:
    """Write ``findings.h5``: three classes, the first that of the images; some answers unknown."""
    cache, rng = featcache.open_cache("images.h5"), random.Random(3)
    targets = {}
    for name, split in cache.splits.items():
        noise = [[rng.random(), rng.random(), rng.random()] for _ in range(len(split))]
        bright, unknown = np.array(split.targets) == 0, np.array(noise) < 0.1
        answers = np.stack([bright, *(np.array(noise).T[1:] < 0.3 + 0.4 * bright)], 1)
        targets[name] = np.where(unknown, np.nan, answers.astype(np.float32)).astype(np.float32)
    splits = cache.splits.items()
    featcache.write_cache(
        "findings.h5", {name: np.array(split.features) for name, split in splits}, targets,
        {name: split.paths for name, split in splits}, classes=["covid", "edema", "mass"],
        groups={name: split.groups for name, split in splits}, identity=cache.identity,
    )  # fmt: skip


def main() -> None:
    write_images(Path("images"))
    extract = ["--group-by", GROUPS, "--max-errors", "10%", "--device", "cpu"]
    tiny = ["--backbone", "python:tiny_network:build", "--engine", "folded"]
    command("extract", "images", "images.h5", *extract, *tiny)
    write_findings()
    own = ["--backbone", "python:sample_golden:pixels", "--engine", "eager"]
    command("extract", "images", "pixels.h5", *extract, *own)
    cache = featcache.open_cache("pixels.h5")
    facts = {"content_sha256": cache.content_sha256, "fingerprint": cache.fingerprint}
    Path("pixels.json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    train = ["--epochs", "6", "--learning-rate", "0.01", "--batch-size", "4", "--device", "cpu"]
    command("train", "images.h5", "run", "--hidden", "8", *train)
    command("train", "images.h5", "probe", "--hidden", "none", "--optimizer", "lbfgs")
    command("train", "findings.h5", "findings_run", "--hidden", "8", *train)
    space = "hidden = [[8], []]\nlearning_rate = { low = 1e-3, high = 3e-2, log = true }\n"
    Path("space.toml").write_text(space + "epochs = 20\n", "utf-8")
    sweep = ["--trials", "8", "--space", "space.toml", "--repeats", "2", "--device", "cpu"]
    command("sweep", "images.h5", "best", *sweep, "--select", "best")
    for run, cache_file in RUNS.items():
        positive = [] if run == "findings_run" else ["--positive", "covid"]
        text = command("evaluate", run, *positive, "--json")
        Path(f"{run}_evaluation.json").write_text(text, "utf-8")
        predictions = f"{run}_predictions.csv"
        command("predict", run, "--cache", cache_file, "--csv", predictions, "--device", "cpu")


if __name__ == "__main__":
    main()
