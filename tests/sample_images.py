"""Small images on the disk, in class folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, seed: int, *, bright: bool = False) -> None:
    """Write a small image of seeded noise; bright ones are class ``covid``, say."""
    rng = np.random.default_rng(seed)
    low, high = (110, 250) if bright else (5, 140)
    side = int(rng.integers(36, 60))
    pixels = rng.integers(low, high, (side, side + 5), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_tree(root: Path, sizes: dict[str, int] | None = None) -> Path:
    """Write split folders of class folders covid and normal; ``sizes``: images per class."""
    sizes = sizes or {"train": 12, "valid": 5, "test": 6}
    seed = 0
    for split, number in sizes.items():
        for name in ("covid", "normal"):
            for i in range(number):
                seed += 1
                ending = "png" if i % 2 else "jpg"
                # two images a patient, so that groups have something to keep together
                path = root / split / name / f"{split[:2]}{name[0]}{i // 2:03d}_{i % 2}.{ending}"
                write_image(path, seed, bright=name == "covid")
    return root
