"""Draw phantom X-rays: a thorax with lungs, ribs, spine, heart and vessels.

In class ``covid`` hazy patches lie in the outer and lower parts of both lungs, some so faint that
nobody would swear to them; ``normal`` has its own distractions. Patients, file formats, sizes and
exposures are drawn alike for both classes, so only the lungs tell them apart.

Writes: images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Plane = NDArray[Any]  # (H, W) floating point

CLASSES = ("covid", "normal")
GROUP_BY = r"^(P\d+)_"  # the patient in a phantom's file name
NUM_PER_CLASS = 160
_DRAWN_PIXELS = 256  # the anatomy is drawn in a square of this side, then resized
_TEXTURE_PIXELS = 320
_KINDS = (("L", ".png"), ("L", ".jpg"), ("RGB", ".jpg"), ("I;16", ".png"), ("RGBA", ".png"))
_KIND_SHARES = (0.40, 0.25, 0.17, 0.09, 0.09)


@dataclass(frozen=True)
class _Patient:
    """What all pictures of one patient share. Lengths are in half picture widths."""

    body_width: float
    lung_width: float
    lung_top: float
    lung_base: float
    heart_width: float
    rib_gap: float
    rib_slope: float
    softness: float  # of the tissue over the lower lungs
    stomach_air: float
    texture: float
    spots: tuple[tuple[float, float, float, float], ...]  # x, y, radius, share of air it takes
    vessels: Plane  # over the square from -1 to 1, like the next two; 0 to 1
    grain: Plane  # a hundred grains across, about unit variance
    cloud: Plane  # a dozen clouds across, about unit variance


def make_phantoms(folder: Path, *, num_per_class: int = NUM_PER_CLASS, seed: int = 0) -> int:
    r"""Draw phantom X-rays into ``folder/covid`` and ``folder/normal``.

    Patients have one to four pictures, named ``P0012_1.png``: the group is ``^(P\d+)_``. The same
    seed draws the same bytes (with the same versions of NumPy and Pillow on the same machine).

    Args:
        folder: Where the class folders go; they are made.
        num_per_class: How many pictures each class gets.
        seed: Of everything that is drawn.

    Returns:
        The number of pictures written.
    """
    numbers = iter(np.random.default_rng([seed, 0]).permutation(2 * num_per_class) + 1)
    for target, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True, exist_ok=True)
        num_left = num_per_class
        while num_left:
            rng = np.random.default_rng([seed, 1 + target, num_left])
            patient, number = draw_patient(rng, sick=name == "covid"), next(numbers)
            num_views = min(num_left, int(rng.choice((1, 2, 3, 4), p=(0.5, 0.25, 0.15, 0.1))))
            for view in range(1, num_views + 1):
                _save(draw_picture(patient, rng), folder / name / f"P{number:04d}_{view}", rng)
            num_left -= num_views
    return 2 * num_per_class


def draw_patient(rng: np.random.Generator, *, sick: bool) -> _Patient:
    """Return a new patient, with hazy patches in both lungs if ``sick``."""
    spots = []
    if sick:
        # Most are plain to see; one in fifteen is faint enough to be missed.
        severity = rng.uniform(0.05, 0.25) if rng.uniform() < 0.07 else rng.uniform(0.38, 0.85)
        for side in (-1.0, 1.0):
            for _ in range(rng.integers(4, 8)):
                x, y = side * rng.uniform(0.36, 0.64), min(max(rng.normal(0.08, 0.26), -0.5), 0.42)
                spots.append((x, y, rng.uniform(0.07, 0.17), severity * rng.uniform(0.6, 1.1)))
    elif rng.uniform() < 0.25:  # one hazy, harmless patch: a scar, a fold of skin
        x, y = rng.uniform(0.2, 0.55) * rng.choice((-1, 1)).item(), rng.uniform(-0.3, 0.4)
        spots.append((x, y, rng.uniform(0.08, 0.2), rng.uniform(0.1, 0.4)))
    if rng.uniform() < 0.3:  # small round shadows say nothing about the class
        for _ in range(rng.integers(1, 4)):
            x, y = rng.uniform(0.25, 0.58) * rng.choice((-1, 1)).item(), rng.uniform(-0.4, 0.3)
            spots.append((x, y, rng.uniform(0.02, 0.05), rng.uniform(0.2, 0.5)))
    return _Patient(
        body_width=rng.uniform(0.86, 1.04),
        lung_width=rng.uniform(0.42, 0.52),
        lung_top=rng.uniform(-0.78, -0.64),
        lung_base=rng.uniform(0.24, 0.46),
        heart_width=rng.uniform(0.28, 0.44),
        rib_gap=rng.uniform(0.135, 0.165),
        rib_slope=rng.uniform(0.15, 0.5),
        softness=rng.uniform(0.0, 0.30),
        stomach_air=rng.uniform(0.0, 0.22),
        texture=rng.uniform(0.02, 0.07),
        spots=tuple(spots),
        vessels=_draw_vessels(rng),
        grain=_draw_noise(96, rng),
        cloud=_draw_noise(14, rng),
    )


def draw_picture(patient: _Patient, rng: np.random.Generator) -> Plane:
    """Return one exposure of the patient, (H, W) float32 in 0..1, H and W from 256 to 512."""
    height = int(rng.integers(292, 489))
    width = int(height * rng.uniform(0.88, 1.05))
    angle, zoom = math.radians(rng.normal(0, 2.5)), rng.uniform(0.80, 0.98)
    grid = np.linspace(-zoom, zoom, _DRAWN_PIXELS, dtype=np.float32)
    columns, rows = grid[None, :] + rng.normal(0, 0.03), grid[:, None] + rng.normal(-0.08, 0.04)
    x = columns * math.cos(angle) - rows * math.sin(angle)
    y = columns * math.sin(angle) + rows * math.cos(angle)

    drawn = Image.fromarray(_draw_density(patient, x, y))
    density = np.array(drawn.resize((width, height), Image.Resampling.BICUBIC))
    density += rng.uniform(0.004, 0.022) * rng.standard_normal((height, width), dtype=np.float32)
    low, high = rng.uniform(0.0, 0.08), rng.uniform(0.84, 1.04)
    picture = np.clip((density - low) / (high - low), 0, 1) ** rng.uniform(0.8, 1.4)
    if rng.uniform() < 0.25:  # the edge of the exposed field
        top, left, bottom, right = (int(height * v) for v in rng.uniform(0.005, 0.05, size=4))
        inner, border = picture[top:-bottom, left:-right], ((top, bottom), (left, right))
        picture = np.pad(inner, border, constant_values=0.02)
    if rng.uniform() < 0.6:
        _draw_side_marker(picture, rng)
    return picture


def _draw_density(patient: _Patient, x: Plane, y: Plane) -> Plane:
    """Return what the rays met on their way, about 0 (air) to 1 (bone), at points (x, y)."""
    side = np.abs(x)
    shoulders = _step((y + 1.00) / 0.40)  # from the neck outwards
    waist = 1 - 0.06 * _step((y - 0.1) / 0.5)
    edge = patient.body_width * (0.26 + 0.74 * shoulders) * waist
    body = _soft(edge - side, 0.015)
    thickness = np.sqrt(np.clip(1 - (x / (edge + 0.05)) ** 2, 0, 1))
    density = body * (0.36 + 0.30 * thickness + 0.14 * _step((y - 0.1) / 0.5))
    arm = _soft(0.16 - np.abs(side - 1.06 - 0.15 * y), 0.03) * _step((y + 0.72) / 0.25)
    density = np.maximum(density, 0.42 * arm)

    # In the lungs every thing in the way takes its share of the air: shares multiply.
    lungs = _draw_lungs(patient, x, y)
    vessels, grain, cloud = _look_up((patient.vessels, patient.grain, patient.cloud), x, y)
    air = 1 - 0.55 * vessels - patient.texture * grain
    air -= patient.softness * _step((y + 0.1) / 0.5)
    clouded = 1.0 + 0.5 * cloud + 0.12 * grain  # what is hazy is so in clouds
    for spot_x, spot_y, radius, share in patient.spots:
        air *= 1 - share * np.clip(_spot(x, y, spot_x, spot_y, radius) * clouded, 0, 1)
    air *= 1 - _draw_middle(patient, x, y)
    density -= 0.46 * lungs * air

    density += _draw_ribs(patient, x, y)
    vertebrae = 0.045 + 0.012 * np.sin(y * 34.0)
    density += body * vertebrae * _soft(0.075 - side, 0.012)
    bubble = _spot(x * 0.8, y, 0.27, patient.lung_base + 0.30, 0.06)  # air in the stomach
    density -= patient.stomach_air * bubble * (1 - lungs)
    return density.astype(np.float32)


def _draw_middle(patient: _Patient, x: Plane, y: Plane) -> Plane:
    """Return what heart, great vessels and mediastinum take of the lungs' air, 0..1."""
    from_x, from_y = x - 0.08, y - (patient.lung_base - 0.19)
    along = from_x * 0.87 + from_y * 0.50  # the heart lies tilted, its tip to the left
    across = from_y * 0.87 - from_x * 0.50
    reach = np.sqrt((along / patient.heart_width) ** 2 + (across / 0.24) ** 2)
    heart = 0.94 * _soft(1 - reach, 0.05)
    broad = 0.115 + 0.05 * _step((y + 0.4) / 0.5)
    middle = 0.88 * _soft(broad - np.abs(x - 0.01), 0.018)
    knob = 0.8 * _soft(0.085 - np.hypot(x - 0.10, y + 0.36), 0.012)
    taken: Plane = np.maximum(np.maximum(heart, middle), knob)
    return taken


def _draw_lungs(patient: _Patient, x: Plane, y: Plane) -> Plane:
    """Return how much lung lies at each point, 0..1."""
    lungs = np.zeros_like(x)
    for side, base in ((-1.0, patient.lung_base - 0.03), (1.0, patient.lung_base + 0.02)):
        out = x * side  # grows away from the spine
        depth = np.clip((y - patient.lung_top) / (base + 0.15 - patient.lung_top), 0, 1)
        round_top = np.sqrt(np.clip(1 - (1 - depth) ** 2, 0, 1))
        outer = 0.26 + patient.lung_width * round_top
        inner = 0.26 - 0.20 * round_top
        diaphragm = base + 1.3 * np.clip(out - 0.34, -0.3, 0.4) ** 2
        distance = np.minimum(np.minimum(outer - out, out - inner), diaphragm - y)
        lungs += _soft(np.minimum(distance, y - patient.lung_top), 0.014)
    return np.clip(lungs, 0, 1)


def _draw_ribs(patient: _Patient, x: Plane, y: Plane) -> Plane:
    """Return the density of ribs (behind steep, in front faint) and collar bones."""
    side = np.abs(x)
    cage = _soft(0.34 + patient.lung_width - side, 0.02) * _soft(side - 0.07, 0.02)
    cage *= _step((y + 0.80) / 0.15) * _step((0.62 - y) / 0.2)
    behind = (y - patient.rib_slope * side**2 + 0.10 * side) / patient.rib_gap
    front = (y + 0.55 * side - 0.9 * side**2) / (patient.rib_gap * 1.12)
    wave = 0.5 + 0.5 * np.cos(2 * np.pi * behind)
    rim = np.exp(-(((wave - 0.45) / 0.16) ** 2))  # the cortex is denser than the marrow
    ribs = cage * (0.075 * _step((wave - 0.35) / 0.2) + 0.03 * rim)
    faint = (0.5 + 0.5 * np.cos(2 * np.pi * front)) ** 3
    ribs += cage * 0.035 * faint * _step((side - 0.25) / 0.2)
    line = patient.lung_top + 0.14 - 0.16 * (side - 0.1) + 0.03 * np.sin(7 * side)
    collar = np.exp(-(((y - line) / 0.030) ** 2)) * _soft(side - 0.08, 0.02)
    shown: Plane = ribs + 0.11 * collar * _soft(0.72 - side, 0.03)
    return shown


def _draw_vessels(rng: np.random.Generator) -> Plane:
    """Return branches that leave the hila, thinner and fainter as they go."""
    canvas = Image.new("L", (_TEXTURE_PIXELS, _TEXTURE_PIXELS))
    draw = ImageDraw.Draw(canvas)
    scale = _TEXTURE_PIXELS / 2
    for side in (-1.0, 1.0):
        for _ in range(26):
            x, y = side * rng.uniform(0.12, 0.2), rng.uniform(-0.25, 0.1)
            heading = rng.uniform(-1.35, 1.35)
            for step, turn in enumerate(rng.normal(0, 0.28, size=8).tolist()):
                heading += turn
                ahead = (x + 0.065 * side * math.cos(heading), y + 0.065 * math.sin(heading))
                line = [(v + 1) * scale for v in (x, y, *ahead)]
                draw.line(line, fill=190 - 20 * step, width=max(1, 5 - step))
                x, y = ahead
    blurred = canvas.filter(ImageFilter.GaussianBlur(1.4))
    return np.asarray(blurred, dtype=np.float32) / np.float32(255)


def _draw_noise(num_cells: int, rng: np.random.Generator) -> Plane:
    noise = Image.fromarray(rng.standard_normal((num_cells, num_cells), dtype=np.float32))
    side = (_TEXTURE_PIXELS, _TEXTURE_PIXELS)
    return np.asarray(noise.resize(side, Image.Resampling.BICUBIC))


def _look_up(planes: tuple[Plane, ...], x: Plane, y: Plane) -> tuple[Plane, ...]:
    """Return the planes' values at points (x, y), nearest neighbour."""
    scale = np.float32(_TEXTURE_PIXELS / 2)
    row = np.clip((y + 1) * scale, 0, _TEXTURE_PIXELS - 1).astype(np.int32)
    column = np.clip((x + 1) * scale, 0, _TEXTURE_PIXELS - 1).astype(np.int32)
    index = row * np.int32(_TEXTURE_PIXELS) + column
    return tuple(plane.ravel()[index] for plane in planes)


def _draw_side_marker(picture: Plane, rng: np.random.Generator) -> None:
    """Put the technician's bright L into a corner, in place."""
    height, width = picture.shape
    size, stroke = int(height * rng.uniform(0.03, 0.05)), height // 120
    top, left = int(rng.uniform(0.03, 0.10) * height), int(rng.uniform(0.86, 0.92) * width)
    picture[top : top + size, left : left + stroke] = 0.97
    picture[top + size - stroke : top + size, left : left + int(size * 0.7)] = 0.97


def _soft(distance: Plane, width: float) -> Plane:
    """Return 0 outside (negative) to 1 inside, with a border about four ``width`` wide."""
    inside: Plane = 0.5 + 0.5 * np.tanh(distance / (2 * width))
    return inside


def _step(value: Plane) -> Plane:
    """Return a smooth step: 0 below 0, 1 above 1."""
    value = np.clip(value, 0, 1)
    smooth: Plane = value * value * (3 - 2 * value)
    return smooth


def _spot(x: Plane, y: Plane, spot_x: float, spot_y: float, radius: float) -> Plane:
    bell: Plane = np.exp(-((x - spot_x) ** 2 + (y - spot_y) ** 2) / (2 * radius**2))
    return bell


def _save(picture: Plane, stem: Path, rng: np.random.Generator) -> None:
    """Write the picture in one of the kinds that real collections mix."""
    mode, suffix = _KINDS[rng.choice(len(_KINDS), p=_KIND_SHARES)]
    deepest, dtype = (65535, np.uint16) if mode == "I;16" else (255, np.uint8)
    image = Image.fromarray(np.round(picture * deepest).astype(dtype)).convert(mode)
    # A JPEG takes the quality from these, a PNG the level.
    image.save(stem.with_suffix(suffix), quality=int(rng.integers(75, 96)), compress_level=1)
