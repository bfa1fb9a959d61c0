"""Make image files as they come in practice, the same ones on every machine.

    python benchmarks/make_images.py FOLDER --kind jpeg-500x375 --num 2000
    python benchmarks/make_images.py FOLDER --kind jpeg-64x64 --num 100000 --layout splits
    python benchmarks/make_images.py --list

Nothing is downloaded. Pictures are smooth shapes at several scales with sensor noise on top, and
the noise is chosen so that files get the size of real ones: a 500 x 375 JPEG 60 to 100 KB, an X-ray
as PNG half to two thirds of its pixels. A picture follows from its kind and number alone. The small
ones are a few pictures under many names, each with its own number in a comment, so that no two
files are equal: 100,000 of them take seconds.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

SPLIT_SHARES = (("train", 0.7), ("valid", 0.15), ("test", 0.15))
CLASSES = ("first", "second")


@dataclass(frozen=True)
class Kind:
    """A kind of image file.

    Attributes:
        mode: Pillow's: ``RGB``, ``L`` or ``I;16``.
        size: Width and height.
        ending: ``jpg`` or ``png``.
        noise: Standard deviation of the sensor noise, as a share of the range.
        num_distinct: How many different pictures there are; the rest repeat them.
    """

    mode: str
    size: tuple[int, int]
    ending: str
    noise: float
    num_distinct: int | None = None

    @property
    def megapixels(self) -> float:
        """Pixels of the file, in millions."""
        return self.size[0] * self.size[1] / 1e6


KINDS = {
    "jpeg-500x375": Kind("RGB", (500, 375), "jpg", 0.05),
    "jpeg-2000x1500": Kind("RGB", (2000, 1500), "jpg", 0.022),
    "png-grey-1024": Kind("L", (1024, 1024), "png", 0.010),
    "png-grey-2500x2000": Kind("L", (2500, 2000), "png", 0.010),
    "png-grey16-3000x2500": Kind("I;16", (3000, 2500), "png", 0.0002),
    "jpeg-64x64": Kind("RGB", (64, 64), "jpg", 0.02, num_distinct=64),
}


def encode_image(kind: Kind, number: int) -> bytes:
    """Return the bytes of image ``number`` of a kind; no two numbers give equal bytes."""
    picture = number % (kind.num_distinct or number + 1)
    data = _encode_picture(kind, picture) if kind.num_distinct else _encode(kind, picture)
    if kind.ending == "jpg":  # a comment behind the start-of-image mark
        text = f"number {number}".encode()
        return data[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + data[2:]
    return data


def paint(kind: Kind, number: int) -> np.ndarray:
    """Return the pixels of a picture: (H, W) uint8 or uint16, or (H, W, 3) uint8."""
    width, height = kind.size
    rng = np.random.default_rng([number, width, height])
    shapes, noise = _layers(width, height)
    weights = np.sort(rng.dirichlet(np.ones(len(shapes))))[::-1]  # coarse before fine
    light = _mix(shapes, weights, rng)
    light = (light - light.min()) / (light.max() - light.min())
    light = 0.04 + 0.88 * light
    if kind.mode == "RGB":
        tint = _mix(shapes[:2], np.array([0.5, 0.5]), rng)
        light = np.stack([light + 0.2 * tint, light, light - 0.2 * tint], axis=2)
        grain = np.stack([_roll(noise, rng) for _ in range(3)], axis=2)
    else:
        grain = _roll(noise, rng) * np.sqrt(0.25 + light)  # photons: more where it is bright
    pixels = np.clip(light + kind.noise * grain, 0, 1)
    if kind.mode == "I;16":
        return np.rint(pixels * 65535).astype(np.uint16)
    return np.rint(pixels * 255).astype(np.uint8)


def write_images(
    folder: Path, kind_name: str, num_images: int, *, layout: str = "classes"
) -> list[Path]:
    """Write images into class folders, or split folders of class folders.

    Args:
        folder: Made if it is not there; files that are there already are kept.
        kind_name: A key of ``KINDS``.
        num_images: How many.
        layout: ``classes`` or ``splits``.

    Returns:
        The files, in the order of their numbers.
    """
    kind, paths = KINDS[kind_name], []
    for number, part in zip(range(num_images), _places(num_images, layout), strict=True):
        path = folder / part / f"{number:06d}.{kind.ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_bytes(encode_image(kind, number))
        paths.append(path)
    return paths


def _places(num_images: int, layout: str) -> Iterator[str]:
    for number in range(num_images):
        label = CLASSES[number % len(CLASSES)]
        if layout == "classes":
            yield label
            continue
        share, reached, split = (number + 0.5) / num_images, 0.0, ""
        for name, width in SPLIT_SHARES:
            split, reached = name, reached + width
            if share < reached:
                break
        yield f"{split}/{label}"


def _encode(kind: Kind, number: int) -> bytes:
    image = Image.fromarray(paint(kind, number))
    file = io.BytesIO()
    if kind.ending == "jpg":
        image.save(file, "JPEG", quality=90, subsampling="4:2:0")
    else:
        image.save(file, "PNG")
    return file.getvalue()


@cache
def _encode_picture(kind: Kind, picture: int) -> bytes:
    return _encode(kind, picture)


@cache
def _layers(width: int, height: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Return smooth layers (H, W) float32 in [-1, 1], from coarse to fine, and white noise."""
    rng = np.random.default_rng([width, height])
    layers = []
    for cells in (3, 5, 9, 17, 33):
        coarse = rng.standard_normal((cells, cells), dtype=np.float32)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        field = np.asarray(smooth)
        layers.append(np.tanh(3 * field / cells**0.25))  # flat areas with soft edges between them
    return layers, rng.standard_normal((height, width), dtype=np.float32)


def _mix(layers: list[np.ndarray], weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    mixed = np.zeros_like(layers[0])
    for layer, weight in zip(layers, weights, strict=True):
        mixed += np.float32(weight) * layer[:: rng.choice((-1, 1)), :: rng.choice((-1, 1))]
    return mixed


def _roll(noise: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.roll(noise, tuple(rng.integers(0, noise.shape)), axis=(0, 1))


def main() -> None:
    """Write the images asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("images"))
    parser.add_argument("--kind", choices=KINDS, default="jpeg-500x375")
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--layout", choices=("classes", "splits"), default="classes")
    parser.add_argument("--list", action="store_true", help="say how large a file of each kind is")
    args = parser.parse_args()
    if args.list:
        for name, kind in KINDS.items():
            num_bytes = len(encode_image(kind, 0))
            depth = {"RGB": 3, "L": 1, "I;16": 2}[kind.mode]
            ratio = depth * kind.megapixels * 1e6 / num_bytes
            print(f"{name}: {num_bytes / 1000:,.0f} KB, {ratio:.1f} times smaller than its pixels")
        return
    paths = write_images(args.folder, args.kind, args.num, layout=args.layout)
    print(f"{len(paths)} files, {sum(path.stat().st_size for path in paths) / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
