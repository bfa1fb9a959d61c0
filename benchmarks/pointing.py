"""Does the strongest cell of a map, or of an occlusion, lie in the sign of disease?

The phantoms of ``featcache demo`` are drawn with and without their spots, so the place of the signs
is known. One half of the images is to choose a way to cover by, the other to report it on. On real
X-rays, where no place is known, each way is compared with the map. A short try:
``python benchmarks/pointing.py --phantoms 2 --out /tmp``.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from measuring import HERE, as_table, current_load, frame_report, write_report
from PIL import Image, ImageFilter
from sklearn.metrics import roc_auc_score

import featcache
from featcache.cli import phantoms
from featcache.deployment.classifier import load_classifier
from featcache.deployment.explainer import Explainer
from featcache.deployment.occlusion import cover_cells, rank_correlation
from featcache.evaluation.attribution import log_odds_of
from featcache.heads.head import initial_state

SIDE, NUM_MASKS, SHARE_COVERED, BLUR = 7, 98, 0.2, 24
HOT = 0.25  # of the strongest change by the spots: a cell with more is a sign of disease
HEADS: dict[str, dict[str, Any]] = {"default": {}, "linear": {"hidden": (), "epochs": 30}}
HALVES = ("choose", "report")
KEYS = ("hit", "chance", "roc_auc", "rank_correlation")

Array = npt.NDArray[Any]


def train_heads(data: Path, folder: Path, group_by: str) -> dict[str, Explainer]:
    """Return an explainer of each head, and of a head with random weights, for Lite0."""
    quiet: dict[str, Any] = {"say": lambda _: None}
    folder.mkdir()
    featcache.extract(
        data, folder / "c.h5", backbone="efficientnet-lite0", group_by=group_by, **quiet
    )
    made = {}
    for name, options in HEADS.items():
        featcache.train(folder / "c.h5", folder / name, valid_fraction=0.2, **options, **quiet)
        made[name] = load_classifier(folder / name, device="cpu")
    random = load_classifier(folder / "default", device="cpu")
    random.run = dataclasses.replace(random.run, state=initial_state(random.run.head, 1))
    return {name: Explainer(each, "covid") for name, each in (made | {"random": random}).items()}


def draw_sick(seed: int) -> tuple[Array, Array]:
    """Return a phantom (S, S) uint8, and which cells (7, 7) its spots changed."""
    patient = phantoms.draw_patient(np.random.default_rng([seed, 9]), sick=True)
    well = dataclasses.replace(patient, spots=())
    planes = [
        phantoms.draw_picture(one, np.random.default_rng([seed, 10])) for one in (patient, well)
    ]
    change = Image.fromarray(np.abs(planes[0] - planes[1]).astype(np.float32))
    cells = np.asarray(change.resize((SIDE * 32,) * 2, Image.Resampling.BILINEAR))
    cells = cells.reshape(SIDE, 32, SIDE, 32).mean((1, 3))
    return np.round(planes[0] * 255).astype(np.uint8), cells > HOT * cells.max()


def cover_in_ways(pixels: Array, seed: int) -> dict[str, tuple[list[Array], Callable[..., Array]]]:
    """Return for each way the covered images, and what makes cells of how far their scores fall."""
    blurred = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(BLUR)))
    masks = np.random.default_rng(seed).random((NUM_MASKS, SIDE * SIDE)) < SHARE_COVERED
    size = len(pixels) // SIDE

    mean = np.broadcast_to(np.round(pixels.mean(axis=(0, 1))).astype(np.uint8), pixels.shape)

    def cover(cells: Array, by: Array) -> Array:
        covered = np.kron(cells.reshape(SIDE, SIDE), np.ones((size, size)))
        covered = covered if pixels.ndim == 2 else covered[:, :, None]
        return np.where(covered > 0, by, pixels)

    def regress(falls: Array) -> Array:
        centred = masks - masks.mean(axis=0)
        ridge = centred.T @ centred + 4 * np.eye(SIDE * SIDE)
        return np.linalg.solve(ridge, centred.T @ (falls - falls.mean()))

    one_by_one = np.eye(SIDE * SIDE)
    return {
        "cells, mean colour": ([cover(cells, mean) for cells in one_by_one], np.asarray),
        "cells, blurred (explain)": (cover_cells(pixels, SIDE), np.asarray),
        "random fifths, blurred": ([cover(mask, blurred) for mask in masks], regress),
    }


def measure(
    explainers: dict[str, Explainer], image: Any, hot: Array | None, seed: int, engine: Any
) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Yield head, way and figures of one image."""
    (pixels,) = next(iter(explainers.values())).read(image, None)  # type: ignore[arg-type]
    located = {name: each.locate([pixels]) for name, each in explainers.items()}
    for name, made in located.items():
        yield name, "map", figures(made.planes[0], made.planes[0], hot)
    for way, (covered, join) in cover_in_ways(pixels, seed).items():
        features = torch.from_numpy(engine.run(covered)).double()
        for name in HEADS:
            made = located[name]
            scores = log_odds_of(explainers[name]._head, made.positive, made.against)(features)
            falls = join(made.log_odds - scores.numpy()).reshape(SIDE, SIDE)
            yield name, way, figures(falls, made.planes[0], hot)


def figures(plane: Array, of_map: Array, hot: Array | None) -> dict[str, float]:
    """Return how a plane agrees with the map, and where known with the signs of disease."""
    found = {"rank_correlation": rank_correlation(plane, of_map) or 0.0}
    if hot is not None:
        found["hit"] = float(hot.flat[plane.argmax()])
        found["chance"] = float(hot.mean())
        found["roc_auc"] = float(roc_auc_score(hot.ravel(), plane.ravel()))
    return found


def measure_all(
    explainers: dict[str, Explainer], images: Sequence[tuple[Any, Array | None]]
) -> dict[str, Any]:
    """Return per half, head and way the means over images; every second one is of each half."""
    found: dict[str, Any] = {half: defaultdict(list) for half in HALVES}
    first = explainers["default"]
    pixels = first.read(images[0][0], None)  # type: ignore[arg-type]
    engine = first._classifier.choose_engine(0, 10_000, lambda: pixels)
    for number, (image, hot) in enumerate(images):
        for name, way, values in measure(explainers, image, hot, number, engine):
            found[HALVES[number % 2]][f"{name}: {way}"].append(values)
        print(f"{number + 1} of {len(images)}", flush=True)
    return {
        half: {
            way: {"num_images": len(rows)}
            | {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
            for way, rows in of_half.items()
        }
        for half, of_half in found.items()
    }


def main() -> None:
    """Print a table and write ``pointing.json`` and ``pointing.md``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--phantoms", type=int, default=100)
    parser.add_argument("--xrays", type=int, default=40)
    parser.add_argument("--data", type=Path, help="real X-rays: a folder with covid and normal")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    load, start, results = current_load(), time.perf_counter(), {}
    with TemporaryDirectory() as place:
        folder = Path(place)
        phantoms.make_phantoms(folder / "raw", num_per_class=90)
        explainers = train_heads(folder / "raw", folder / "phantoms", phantoms.GROUP_BY)
        images = [draw_sick(1000 + seed) for seed in range(options.phantoms)]
        results["phantoms"] = measure_all(explainers, images)
        if options.data is not None:
            explainers = train_heads(options.data, folder / "xrays", r"^(\d{8})_")
            paths = sorted((options.data / "covid").iterdir())
            chosen = np.random.default_rng(0).permutation(len(paths))[: options.xrays]
            results["xrays"] = measure_all(explainers, [
                (Image.open(paths[number]).convert("RGB"), None) for number in chosen.tolist()
            ])  # fmt: skip
    report = frame_report(
        "pointing", torch.device("cpu"), load, 1, backbone="efficientnet-lite0", side=SIDE,
        num_masks=NUM_MASKS, share_covered=SHARE_COVERED, blur=BLUR, hot=HOT,
        seconds=time.perf_counter() - start, results=results,
    )  # fmt: skip
    rows = [
        [
            kind, half, way, row["num_images"],
            *(f"{row[key]:.2f}" if key in row else "" for key in KEYS),
        ]
        for kind, halves in results.items() for half, ways in halves.items()
        for way, row in ways.items()
    ]  # fmt: skip
    header = ["images", "half", "head: way", "number", *KEYS]
    write_report(options.out, "pointing", report, "\n".join(as_table(header, rows, 3)) + "\n")


if __name__ == "__main__":
    main()
