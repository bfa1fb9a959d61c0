"""What does ``audit`` find of copies, swapped labels and odd images that were planted?

    python benchmarks/audit.py                        (about 15 minutes on two shared cores)
    python benchmarks/audit.py --rounds 1 --each 2 --trials 1 --out try               (a try)

Real X-rays, EfficientNet-Lite0. Copies: in every round so many copies of each kind, each of another
X-ray, are put beside the X-rays as a split ``test``; few at a time, as many copies at once distort
the threshold. A copy is found if ``audit --csv`` puts it into the group of its X-ray: by features
alone, and with ``--data``. A false alarm is a group with two different X-rays; each is listed, to
be looked at.

Labels: of the two-class X-rays, 12 of the labels of train and valid are swapped. Counted are those
among the first 24 of audit's ranking, and of cleanlab's on the same probabilities (where cleanlab
is installed), and whether both name the same rows.

Outliers: 30 X-rays are turned upside down, inverted or turned by 90 degrees. Unlike any training
image: the same done to X-rays of test, of a run on train and valid. Shortcuts and blackout are
those that ``audit --data --blackout`` prints.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import random
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import HERE, NotHere, as_table, current_load, frame_report, import_peer, write_report
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from sklearn.metrics import roc_auc_score

import featcache
from featcache.evaluation.auditing.folds import FoldedRows
from featcache.evaluation.auditing.labels import neighbour_labels, rank_labels
from featcache.evaluation.auditing.outliers import NUM_NEIGHBOURS
from featcache.evaluation.nearest_rows import find_nearest, to_directions

BACKBONE = "efficientnet-lite0"
GROUP_BY = r"^(\d{8})_"
CLASSES = ("covid", "normal")
NUM_SWAPPED = 12
NUM_TURNED = 10  # of each kind
SEED = 0

Picture = Image.Image


# --------------------------------------------------------------------------------------- copies


def crop(picture: Picture, share: float) -> Picture:
    """Return a picture without a share of each border."""
    width, height = picture.size
    wide, high = round(width * share), round(height * share)
    return picture.crop((wide, high, width - wide, height - high))


def crop_unevenly(picture: Picture) -> Picture:
    """Return a picture without 0 to 5 % of each border, drawn from its size."""
    draw, (width, height) = random.Random(str(picture.size)), picture.size
    left, right = (round(width * draw.uniform(0, 0.05)) for _ in range(2))
    top, bottom = (round(height * draw.uniform(0, 0.05)) for _ in range(2))
    return picture.crop((left, top, width - right, height - bottom))


def mark(picture: Picture) -> Picture:
    """Return a picture with a source's name in its lower and a block in its upper border."""
    marked, (width, height) = picture.copy(), picture.size
    draw, band = ImageDraw.Draw(marked), max(12, height // 16)
    is_grey = picture.mode == "L"
    light, dark = (255, 0) if is_grey else ((255, 255, 0), (0, 0, 0))
    draw.rectangle((0, height - band, width // 3, height), fill=dark)
    draw.text((3, height - band), "Source: ARCHIVE 2020", fill=light)
    draw.rectangle((width - width // 8, 0, width, height // 16), fill=light)
    return marked


def expose(picture: Picture) -> Picture:
    """Return a picture with gamma 0.7."""
    curve = [round(255 * (value / 255) ** 0.7) for value in range(256)]
    return picture.point(curve * len(picture.getbands()))


def same(picture: Picture) -> Picture:
    """Return a picture as it is."""
    return picture


KINDS: dict[str, tuple[Callable[[Picture], Picture], str, dict[str, int]] | None] = {
    "the file under another name": None,
    "JPEG 90 under another patient's name": (same, "jpg", {"quality": 90}),
    "BMP": (same, "bmp", {}),
    "RGB TIFF": (lambda picture: picture.convert("RGB"), "tiff", {}),
    "JPEG 75": (same, "jpg", {"quality": 75}),
    "JPEG 40": (same, "jpg", {"quality": 40}),
    "half the size": (
        lambda picture: picture.resize(
            (picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS
        ), "png", {},
    ),
    "gamma 0.7": (expose, "png", {}),
    "brightness x 1.3": (lambda p: ImageEnhance.Brightness(p).enhance(1.3), "png", {}),
    "contrast x 1.5": (lambda p: ImageEnhance.Contrast(p).enhance(1.5), "png", {}),
    "mirrored": (ImageOps.mirror, "png", {}),
    "inverted": (ImageOps.invert, "png", {}),
    "both, as JPEG 80": (lambda p: ImageOps.invert(ImageOps.mirror(p)), "jpg", {"quality": 80}),
    "3 % cropped from each border": (lambda picture: crop(picture, 0.03), "png", {}),
    "5 % cropped": (lambda picture: crop(picture, 0.05), "png", {}),
    "0 to 5 % cropped, each border another": (crop_unevenly, "jpg", {"quality": 85}),
    "a source's name and a block in the borders": (mark, "jpg", {"quality": 85}),
    "mirrored, cropped by 2 %, marked, gamma 0.7, JPEG 75": (
        lambda picture: expose(mark(crop(ImageOps.mirror(picture), 0.02))), "jpg", {"quality": 75},
    ),
}  # fmt: skip


def open_picture(path: Path) -> Picture:
    """Return an image as grey or RGB."""
    picture = Image.open(path)
    return picture if picture.mode in {"L", "RGB"} else picture.convert("RGB")


def plant(folder: Path, each: int, draw: random.Random) -> dict[str, tuple[str, str]]:
    """Write copies of ``train`` into ``test``; return path -> its kind and its original's path."""
    shutil.rmtree(folder / "test", ignore_errors=True)
    files = list_files(folder / "train")
    originals = iter(draw.sample(files, each * len(KINDS)))
    planted = {}
    for kind, how in KINDS.items():
        for _ in range(each):
            original = next(originals)
            name = f"{draw.randrange(10**8):08}_{draw.randrange(30):03}"
            target = folder / "test" / original.parent.name / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if how is None:
                target = target.with_suffix(original.suffix)
                shutil.copyfile(original, target)
            else:
                change, ending, options = how
                target = target.with_suffix("." + ending)
                change(open_picture(original)).save(target, **options)
            paths = [path.relative_to(folder).as_posix() for path in (target, original)]
            planted[paths[0]] = kind, paths[1]
    return planted


def list_files(folder: Path) -> list[Path]:
    """Return the files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def find_sets(cache: Path, data: Path | None, table: Path) -> list[list[str]]:
    """Return the sets of copies that audit puts into one group, as paths."""
    featcache.audit(cache, only="same,near", data=data, csv=table, say=quiet)
    sets = defaultdict(list)
    with table.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line["copies"]:
                sets[line["copies"]].append(line["path"])
    return [*sets.values()]


def measure_copies(folder: Path, rounds: int, each: int) -> dict[str, Any]:
    """Return how many copies of each kind were found, and pairs of different X-rays."""
    found = {kind: [0, 0] for kind in KINDS}
    pairs: list[set[tuple[str, str]]] = [set(), set()]
    draw = random.Random(SEED)
    for number in range(rounds):
        planted = plant(folder, each, draw)
        extract(folder, folder.with_suffix(".h5"))
        roots = {path: root for path, (_, root) in planted.items()}
        for way, data in enumerate((None, folder)):
            sets = find_sets(folder.with_suffix(".h5"), data, folder.with_suffix(".csv"))
            set_of = {path: i for i, paths in enumerate(sets) for path in paths}
            for path, (kind, root) in planted.items():
                found[kind][way] += path in set_of and set_of[path] == set_of.get(root)
            for paths in sets:
                first, *others = sorted({roots.get(path, path) for path in paths})
                pairs[way].update((first, other) for other in others)
        print(f"round {number + 1} of {rounds}: {found}", flush=True)
    return {
        "num_planted": rounds * each,
        "found": {
            kind: {"features": counts[0], "data": counts[1]} for kind, counts in found.items()
        },
        "different_images": {
            name: sorted(map(list, of_way))
            for name, of_way in zip(("features", "data"), pairs, strict=True)
        },
    }  # fmt: skip


# ---------------------------------------------------------------------- labels, outliers, shortcuts


def measure_labels(cache: Path, trials: int) -> dict[str, Any]:
    """Return how many swapped labels are among the first 2k, for audit and for cleanlab."""
    try:
        rank, select = import_peer("cleanlab.rank"), import_peer("cleanlab.filter")
    except NotHere:
        rank = select = None
    rows = []
    for trial in range(trials):
        folded, draw = FoldedRows(featcache.open_cache(cache), quiet), np.random.default_rng(trial)
        swapped = draw.choice(folded.num_rows, NUM_SWAPPED, replace=False)
        targets = folded.targets.copy()
        targets[swapped] = 1 - targets[swapped]
        pool = dataclasses.replace(folded.pool, targets=targets)
        folded.targets, folded.__dict__["pool"] = targets, pool
        suggested, order = rank_labels(folded.probs, targets, neighbour_labels(folded))
        named = {*np.flatnonzero(suggested != targets).tolist()}

        def count_first(ranked: Any, swapped: Any = swapped) -> int:
            return int(np.isin(swapped, ranked[: 2 * NUM_SWAPPED]).sum())

        row = {
            "first_2k": count_first(order), "num_named": len(named),
            "named_and_swapped": len(named & {*swapped.tolist()}),
        }  # fmt: skip
        if rank is not None:
            scores = rank.get_label_quality_scores(targets, folded.probs)
            issues = select.find_label_issues(targets, folded.probs, n_jobs=1)
            row["cleanlab_first_2k"] = count_first(np.argsort(scores))
            row["names_what_cleanlab_names"] = {*np.flatnonzero(issues).tolist()} == named
        rows.append(row)
    return {"num_rows": folded.num_rows, "num_swapped": NUM_SWAPPED, "trials": rows}


TURNS: dict[str, Callable[[Picture], Picture]] = {
    "upside down": lambda picture: picture.transpose(Image.Transpose.ROTATE_180),
    "inverted": lambda picture: ImageOps.invert(picture.convert("RGB")),
    "by 90 degrees": lambda picture: picture.transpose(Image.Transpose.ROTATE_90),
}


def turn(files: Iterable[Path], folder: Path, draw: random.Random) -> dict[str, list[str]]:
    """Write some files, turned, by class into a folder; return kind -> their names there."""
    chosen = iter(draw.sample(sorted(files), NUM_TURNED * len(TURNS)))
    names = defaultdict(list)
    for kind, change in TURNS.items():
        for _ in range(NUM_TURNED):
            file = next(chosen)
            target = folder / file.parent.name / f"{file.stem}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            picture = change(open_picture(file))
            (folder / file.parent.name / file.name).unlink(missing_ok=True)
            picture.save(target)
            names[kind].append(f"{file.parent.name}/{target.name}")
    return names


def measure_outliers(data: Path, folder: Path) -> dict[str, Any]:
    """Return the ROC AUC of the distance for each kind of turned image, and how many come first."""
    for name in CLASSES:
        shutil.copytree(data / name, folder / name)
    names = turn(list_files(folder), folder, random.Random(SEED))
    cache = folder.with_suffix(".h5")
    extract(folder, cache)
    split = featcache.open_cache(cache).split("all")
    paths, targets = np.array(split.paths), split.targets
    kinds = {path: kind for kind, of_kind in names.items() for path in of_kind}
    features = split.read_features().astype(np.float64)
    spreads = features.std(axis=0)
    scaled = (features - features.mean(axis=0)) / np.where(spreads > 1e-9, spreads, 1)
    facts = {}
    for way, vectors in (("as they are", features), ("standardised", scaled)):
        distances = np.zeros(len(paths))
        for target in range(len(CLASSES)):
            own = np.flatnonzero(targets == target)
            rows, units = to_directions(vectors[own].astype(np.float32)), np.arange(len(own))
            distances[own] = find_nearest(rows, rows, NUM_NEIGHBOURS, units, units)[1][:, -1]
        facts[way] = {
            kind: float(roc_auc_score(is_kind[is_kind | is_plain], distances[is_kind | is_plain]))
            for kind in TURNS
            for is_kind in [np.array([kinds.get(path) == kind for path in paths])]
            for is_plain in [np.array([path not in kinds for path in paths])]
        }
    found = featcache.audit(cache, only="outliers", group_by=GROUP_BY, say=quiet).outliers or {}
    first = [
        row["row"]["path"] in kinds
        for of_class in found["per_class"].values() for row in of_class["farthest"][:15]
    ]  # fmt: skip
    return {"num_planted": len(kinds), "among_15_farthest_of_each_class": sum(first), "auc": facts}


def measure_novelty(data: Path, cache: Path, folder: Path) -> dict[str, Any]:
    """Return how many images of test are marked as unlike any training image, by kind."""
    featcache.train(cache, folder / "run", device="cpu", say=quiet)
    test = featcache.open_cache(cache).split("test").paths
    files = [next(data.rglob(Path(path).name)) for path in test]
    found = {}
    plain = featcache.predict(folder / "run", files)
    found["as they are"] = [sum(plain.unlike_training or ()), len(files)]
    for kind, names in turn(files, folder / "turned", random.Random(SEED)).items():
        marked = featcache.predict(folder / "run", [folder / "turned" / name for name in names])
        found[kind] = [sum(marked.unlike_training or ()), len(names)]
    return {"marked": found, "facts": plain.novelty}


def measure_shortcuts(cache: Path, data: Path, shares: tuple[float, ...]) -> dict[str, Any]:
    """Return the shortcuts and what is left without the centre, as audit has them."""
    found = featcache.audit(cache, only="shortcuts", data=data, blackout=shares, say=quiet)
    return {"shortcuts": found.shortcuts, "blackout": found.as_dict()["blackout"]}


def extract(data: Path, cache: Path) -> None:
    """Extract the features of a data set, or bring its cache up to date."""
    featcache.extract(data, cache, backbone=BACKBONE, group_by=GROUP_BY, say=quiet, progress=False)


def quiet(_: str) -> None:
    """Say nothing."""


# --------------------------------------------------------------------------------------- the report


def measure(data: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return all figures; a folder for what is made on the way."""
    facts: dict[str, Any] = {}
    table = folder / "two.csv"
    featcache.split(data, table, classes=CLASSES, group_by=GROUP_BY, seed=SEED, say=quiet)
    two = folder / "two.h5"
    extract(table, two)
    facts["labels"] = measure_labels(two, options.trials)
    facts["novelty"] = measure_novelty(data, two, folder)
    facts["outliers"] = measure_outliers(data, folder / "outliers")
    shutil.copytree(data, folder / "copies" / "train")
    facts["copies"] = measure_copies(folder / "copies", options.rounds, options.each)
    facts["two_classes"] = measure_shortcuts(two, table, (0.6, 0.8))
    shutil.rmtree(folder / "copies" / "test")
    extract(data, folder / "three.h5")
    facts["three_classes"] = measure_shortcuts(folder / "three.h5", data, (0.6,))
    return facts


def describe(facts: Mapping[str, Any]) -> str:
    """Return the tables and lines of the report."""
    copies, labels, outliers = facts["copies"], facts["labels"], facts["outliers"]
    number = copies["num_planted"]
    rows = [
        [kind, *(f"{100 * counts[way] / number:.0f} %" for way in ("features", "data"))]
        for kind, counts in copies["found"].items()
    ]  # fmt: skip
    lines = [
        f"Copies found, of {number} of each kind.", "",
        *as_table(["copy", "by features alone", "with `--data`"], rows), "",
    ]  # fmt: skip
    for way, pairs in copies["different_images"].items():
        lines += [f"Different files in one group, {way}: {len(pairs)}."]
        lines += [f"- {one} and {other}" for one, other in pairs]
    first, swapped = 2 * labels["num_swapped"], labels["num_swapped"]
    what = f"Swapped labels among the first {first} of {labels['num_rows']}"
    lines += ["", f"{what}, {swapped} swapped, a line per trial.", ""]
    columns = ["first_2k", "cleanlab_first_2k", "num_named", "named_and_swapped",
               "names_what_cleanlab_names"]  # fmt: skip
    trials = [[row.get(name, "") for name in columns] for row in labels["trials"]]
    lines += [*as_table(columns, trials, num_text=0), ""]
    ways = outliers["auc"]
    lines += as_table(
        ["outliers, ROC AUC", *TURNS],
        [[way, *(f"{ways[way][kind]:.3f}" for kind in TURNS)] for way in ways],
    )
    among = outliers["among_15_farthest_of_each_class"]
    planted = f"Of {outliers['num_planted']} planted, {among}"
    lines += [f"{planted} are among the 15 farthest of the two classes.", ""]
    lines += as_table(
        ["unlike any training image", "marked", "of"],
        [[kind, *counts] for kind, counts in facts["novelty"]["marked"].items()],
    )
    lines += [""]
    for name in ("two_classes", "three_classes"):
        shortcuts, blackout = facts[name]["shortcuts"], facts[name]["blackout"]
        lines += [f"{name.replace('_', ' ')}: {shortcuts['sentence']}.", ""]
        table = [["head", f"{shortcuts['head']:.3f}", ""]]
        table += [
            [row["fact"], f"{row['logistic']:.3f}", f"{row['tree']:.3f}"]
            for row in shortcuts["facts"]
        ]  # fmt: skip
        table += [
            [f"{row['way']}, {row['share']:g}", f"{row['balanced_accuracy']:.3f}", ""]
            for row in blackout["blacked_out"]
        ]  # fmt: skip
        lines += [*as_table(["balanced accuracy", "logistic", "tree"], table), ""]
    return "\n".join(lines)


def main() -> None:
    """Measure, and write ``audit.json`` and ``audit.md``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = HERE.parent.parent / "shared" / "data" / "xray-raw"
    parser.add_argument("--data", type=Path, default=data, help="folders covid, normal, pneumonia")
    parser.add_argument("--rounds", type=int, default=4, help="of planting copies")
    parser.add_argument("--each", type=int, default=5, help="copies of each kind in a round")
    parser.add_argument("--trials", type=int, default=10, help="of swapping labels")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    load, start = current_load(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        facts = measure(options.data.resolve(), Path(folder).resolve(), options)
    report = frame_report(
        "audit", torch.device("cpu"), load, options.rounds, backbone=BACKBONE, seed=SEED,
        seconds=time.perf_counter() - start, **facts,
    )  # fmt: skip
    write_report(options.out, "audit", report, describe(facts))


if __name__ == "__main__":
    main()
