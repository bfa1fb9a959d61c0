"""Does a head trained on cached augmented views predict better? Cross-validation, in pairs.

    python benchmarks/views.py                               (about 10 minutes on two shared cores)
    python benchmarks/views.py --repeats 1 --limit 60 --out try                        (a try)

Real X-rays, Lite0, folds that keep patients together, featcache's own head and training. In every
fold heads are trained on the same rows with the same seed, and tested on the plain images:

    none      the plain image alone
    flip      V = 2: the plain image and its mirror image
    crop      V = 8: random resized crops, flipped
    xray      V = 8: turned, shifted, magnified and exposed a little

each for the default 10 epochs and for 40. An epoch draws one view of each row, so heads of equally
many epochs took equally many steps, over the rows in the same order: ``none`` at as many epochs is
the fair control. ``none, other seed`` shows how far two equally good heads lie apart.

Declared beforehand: balanced accuracy of the test rows decides, by the 95 % interval of the paired
difference to ``none`` at as many epochs (Nadeau and Bengio's for repeated cross-validation, as in
accuracy.py). Cross-entropy on the test rows, the finer measure, is shown beside it. Added after a
first run: balanced accuracy on the test rows' ``xray`` views 1 to 7, the same chests lying and
exposed otherwise.

The classes of these X-rays come from different sources: a high figure shows that the pipeline
works, not that it finds COVID.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import BACKBONE, GROUP_BY, NUM_FOLDS, TASKS, Fold, compare, make_folds
from end_to_end import read_commit
from sklearn.metrics import balanced_accuracy_score

from featcache.cache.reading import open_cache
from featcache.extraction.extraction import extract
from featcache.heads.config import TrainingConfig
from featcache.heads.fit import fit_head
from featcache.heads.head import HeadConfig
from featcache.heads.prediction import predict_probs
from featcache.runtime import environment_facts

NUM_VIEWS = {"flip": 2, "crop": 8, "xray": 8}
EPOCHS = (10, 40)
MEASURES = {
    "balanced accuracy": "balanced_accuracy",
    "cross-entropy": "cross_entropy",
    "balanced accuracy on xray views": "balanced_accuracy_moved",
}
OTHER_SEED = "none, other seed"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Rows:
    """Images in one order for all augmentations."""

    classes: tuple[str, ...]
    targets: np.ndarray  # (N,) int64
    groups: np.ndarray  # (N,) of patients
    views: dict[str, np.ndarray]  # by augmentation (N, V, 1280) float32, "none" (N, 1280)

    def of_classes(self, classes: tuple[str, ...]) -> Rows:
        """Return the rows of some of the classes."""
        chosen = np.flatnonzero([self.classes[target] in classes for target in self.targets])
        targets = np.array([classes.index(self.classes[self.targets[i]]) for i in chosen])
        views = {name: array[chosen] for name, array in self.views.items()}
        return Rows(classes, targets, self.groups[chosen], views)


def read_rows(data: Path, limit: int | None, folder: Path) -> Rows:
    """Extract a cache per augmentation into ``folder``, where it is not there yet."""
    views: dict[str, np.ndarray] = {}
    for name in ("none", *NUM_VIEWS):
        options = {} if name == "none" else {"views": NUM_VIEWS[name], "augment": name}
        path = folder / f"{name}.h5"
        extract(data, path, backbone=BACKBONE, group_by=GROUP_BY, limit=limit, say=print, **options)
        split = open_cache(path).split("all")
        views[name] = split.read_features()
        if not np.array_equal(split.plain_features, views["none"]):
            raise SystemExit(f"view 0 of {name} is not the plain image")
    return Rows(open_cache(path).classes, np.array(split.targets), np.array(split.groups), views)


def measure_head(
    rows: Rows, fold: Fold, name: str, epochs: int, seed: int
) -> tuple[float, float, float, int]:
    """Return the three measures on the fold's test rows, and the epoch kept."""
    train, plain = rows.views[name], rows.views["none"]
    config = HeadConfig(plain.shape[-1], len(rows.classes))
    result = fit_head(
        config, TrainingConfig(epochs=epochs), train[fold.train], rows.targets[fold.train],
        plain[fold.valid], rows.targets[fold.valid], seed=seed, data_seed=seed, device=CPU,
    )  # fmt: skip
    probs, truth = predict_probs(config, result.state, plain[fold.test]), rows.targets[fold.test]
    accuracy = balanced_accuracy_score(truth, probs.argmax(1))
    loss = -np.log(probs[np.arange(len(truth)), truth]).mean()
    moved = rows.views["xray"][fold.test, 1:]
    vectors = moved.reshape(-1, config.num_features)
    preds = predict_probs(config, result.state, vectors).argmax(1)
    moved_accuracy = balanced_accuracy_score(np.repeat(truth, moved.shape[1]), preds)
    return float(accuracy), float(loss), float(moved_accuracy), result.best_epoch


def measure_task(rows: Rows, repeats: int) -> dict[str, Any]:
    """Run all folds of a task."""
    folds = [fold for repeat in range(repeats) for fold in make_folds(rows, repeat)]
    ways = [(name, epochs) for epochs in EPOCHS for name in rows.views] + [(OTHER_SEED, EPOCHS[0])]
    samples: dict[str, list[tuple[float, float, float, int]]] = {f"{n}, {e}": [] for n, e in ways}
    for number, fold in enumerate(folds):
        for name, epochs in ways:
            other = name == OTHER_SEED
            seed = number + 100_000 * other
            found = measure_head(rows, fold, "none" if other else name, epochs, seed)
            samples[f"{name}, {epochs}"].append(found)
        scores = ", ".join(f"{way} {s[-1][0]:.3f}" for way, s in samples.items())
        print(f"{'/'.join(rows.classes)} fold {number + 1} of {len(folds)}: {scores}", flush=True)
    kinds = (*MEASURES.values(), "best_epoch")
    raw = {kind: {w: [s[i] for s in found] for w, found in samples.items()}
           for i, kind in enumerate(kinds)}  # fmt: skip
    share = 1 / (NUM_FOLDS - 1)
    return {
        "classes": rows.classes,
        "num_images": np.bincount(rows.targets).tolist(),
        "num_groups": len(set(rows.groups)),
        "mean": {k: {w: float(np.mean(v)) for w, v in raw[k].items()} for k in kinds},
        "differences": {
            kind: {
                f"{name}, {epochs}": compare(
                    raw[kind][f"{name}, {epochs}"], raw[kind][f"none, {epochs}"], share
                )
                for name, epochs in ways
                if name != "none"
            }
            for kind in MEASURES.values()
        },
        **raw,
    }


def describe(report: dict[str, Any]) -> str:
    """Return the Markdown table."""
    measured = [f"{kind} | difference to none (95 %)" for kind in MEASURES]
    lines = [
        f"| classes | epochs | views | {' | '.join(measured)} |",
        "| --- | ---: | --- | ---: | --- | ---: | --- | ---: | --- |",
    ]
    for task in report["tasks"]:
        for way in task["mean"]["balanced_accuracy"]:
            name, epochs = way.rsplit(", ", 1)
            cells = []
            for kind in MEASURES.values():
                cells += [f"{task['mean'][kind][way]:.3f}", ""]
                pair = task["differences"][kind].get(way)
                if pair is not None:
                    cells[-1] = f"{pair['mean']:+.3f}"
                if pair is not None and pair["interval_95"] is not None:
                    low, high = pair["interval_95"]
                    differs = ", differs" if low * high > 0 else ""
                    cells[-1] += f" ({low:+.3f} to {high:+.3f}){differs}"
            classes = ", ".join(task["classes"])
            lines.append(f"| {classes} | {epochs} | {name} | {' | '.join(cells)} |")
    num_shown = sum(len(pairs) for t in report["tasks"] for pairs in t["differences"].values())
    num_folds = report["repeats"] * NUM_FOLDS
    chance = f"Of twenty differences one differs by chance; {num_shown} are shown."
    return "\n".join([*lines, "", f"{num_folds} folds each. {chance}"]) + "\n"


def main() -> None:
    """Measure both tasks; write JSON and a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).resolve().parent
    data = here.parent.parent / "shared" / "data" / "xray-raw"
    parser.add_argument("--data", type=Path, default=data, help="folders covid, normal, pneumonia")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of the 5 folds")
    parser.add_argument("--caches", type=Path, help="keep the caches there, and go on with them")
    parser.add_argument("--limit", type=int, help="images in all, for a try")
    parser.add_argument("--out", type=Path, default=here / "results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="featcache-benchmark-") as folder:
        rows = read_rows(args.data, args.limit, args.caches or Path(folder))
    report = {
        "benchmark": "views",
        "backbone": BACKBONE,
        "num_views": NUM_VIEWS,
        "repeats": args.repeats,
        "num_folds": NUM_FOLDS,
        "tasks": [measure_task(rows.of_classes(classes), args.repeats) for classes in TASKS],
        "commit": read_commit(),
        "environment": environment_facts(CPU),
        "seconds": time.perf_counter() - start,
    }
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    (args.out / "views.json").write_text(text)
    (args.out / "views.md").write_text(describe(report))
    print("\n" + describe(report))


if __name__ == "__main__":
    main()
