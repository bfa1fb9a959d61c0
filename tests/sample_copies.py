"""Drawn pictures of a chest each unlike the others, and copies of them of every kind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

SIDE = 96


def draw_chest(seed: int, side: int = SIDE) -> Image.Image:
    """Draw two dark lungs on grey, as in every such picture, with structure of its own."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    picture = 150 - 40 * np.abs(x - 0.5)
    for middle in (0.3, 0.7):
        lung = ((x - middle) / rng.uniform(0.14, 0.2)) ** 2 + ((y - 0.5) / 0.35) ** 2
        picture -= 70 / (1 + np.exp(8 * (lung - 1)))
    for _ in range(60):
        across, down, size = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.02, 0.08)
        blob = np.exp(-((x - across) ** 2 + (y - down) ** 2) / (2 * size**2))
        picture += rng.uniform(-35, 35) * blob
    return Image.fromarray(np.clip(np.rint(picture), 0, 255).astype(np.uint8))


def _crop(image: Image.Image) -> Image.Image:
    edge = round(0.03 * image.width)
    return image.crop((edge, edge, image.width - edge, image.height - edge))


def _mark(image: Image.Image) -> Image.Image:
    marked = image.copy()
    draw = ImageDraw.Draw(marked)
    draw.rectangle((0, image.height - 8, 40, image.height), fill=0)
    draw.text((2, image.height - 10), "ARCHIVE", fill=255)
    return marked


def _brighten(image: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(1.3)


def _halve(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2))


def _as_is(image: Image.Image) -> Image.Image:
    return image


NEAR: dict[str, tuple[Callable[[Image.Image], Image.Image], str]] = {
    "jpeg": (_as_is, "jpg"), "mirrored": (ImageOps.mirror, "png"),
    "inverted": (ImageOps.invert, "png"), "cropped": (_crop, "png"), "brighter": (_brighten, "png"),
    "marked": (_mark, "jpg"), "halved": (_halve, "png"),
    "both": (lambda image: ImageOps.invert(ImageOps.mirror(image)), "jpg"),
}  # fmt: skip
SAME = {"bitmap": "bmp", "colour": "tif", "bytes": "png"}


def write_copies(root: Path, number: int = 40) -> dict[str, str]:
    """Write ``number`` pictures into train, and copies of the first ones into test.

    Returns:
        Kind -> path of the original; the copy is ``test/CLASS/KIND.ENDING``.
    """
    for split in ("train", "test"):
        for name in ("covid", "normal"):
            (root / split / name).mkdir(parents=True)
    for i in range(number):
        draw_chest(i).save(root / f"train/{('covid', 'normal')[i % 2]}/{i:03}.png")
    origins = {}
    for i, kind in enumerate([*NEAR, *SAME]):
        name = ("covid", "normal")[i % 2]
        origins[kind] = f"train/{name}/{i:03}.png"
        if kind == "bytes":
            shutil.copy(root / origins[kind], root / f"test/{name}/bytes.png")
        elif kind in SAME:
            image = draw_chest(i).convert("RGB" if kind == "colour" else "L")
            image.save(root / f"test/{name}/{kind}.{SAME[kind]}")
        else:
            change, ending = NEAR[kind]
            change(draw_chest(i)).save(root / f"test/{name}/{kind}.{ending}")
    return origins
