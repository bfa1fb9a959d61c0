"""Small images and masks of them, in the layouts that collections have."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from sample_images import write_image


def write_mask(path: Path, image: Path, *, share: float = 1.0) -> None:
    """Write a mask of two blobs of ``image``: of its shape, ``share`` times its size."""
    with Image.open(image) as opened:
        width, height = opened.size
    seed = zlib.crc32(image.name.encode())
    pixels = np.zeros((height, width), np.uint8)
    pixels[5 + seed % 7 : -6 - seed // 7 % 7, 4:14] = 255
    pixels[5 + seed // 49 % 7 : -6 - seed // 343 % 7, 20 : 27 + seed // 2401 % 7] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    size = round(width * share), round(height * share)
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(path)


def write_pair(image: Path, mask: Path, seed: int, *, bright: bool, share: float = 1.0) -> None:
    write_image(image, seed, bright=bright)
    write_mask(mask, image, share=share)


def write_radiography(root: Path, number: int = 6) -> Path:
    """Write COVID-19_Radiography: CLASS/images, CLASS/masks (of another size), metadata."""
    for k, name in enumerate(("COVID", "Normal", "Viral Pneumonia")):
        for i in range(1, number + 1):
            file = f"{name}-{i}.png"
            write_pair(root / name / "images" / file, root / name / "masks" / file, 100 * k + i,
                       bright=k == 0, share=256 / 299)  # fmt: skip
        (root / f"{name}.metadata.xlsx").write_bytes(b"PK")
    (root / "README.md.txt").write_text("about")
    return root


def write_busi(root: Path, number: int = 6) -> Path:
    """Write Dataset_BUSI_with_GT: ``benign (1).png`` and ``benign (1)_mask.png``."""
    for k, name in enumerate(("benign", "malignant", "normal")):
        for i in range(1, number + 1):
            stem = root / name / f"{name} ({i})"
            image = stem.with_name(stem.name + ".png")
            write_pair(image, stem.with_name(stem.name + "_mask.png"), 100 * k + i, bright=k == 1)
        write_mask(stem.with_name(stem.name + "_mask_1.png"), image)
    return root
