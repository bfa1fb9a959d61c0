"""What the stock ways (a), (b) and (d) share: arguments, network, head, and the report.

Nothing of featcache is imported here: these are the incumbents.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn


def parse_args() -> argparse.Namespace:
    """Return data, backbone, weights, epochs, seed and out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="split folder")
    parser.add_argument("--backbone", required=True, help="efficientnet-lite0 or efficientnet-b0")
    parser.add_argument("--weights", type=Path, required=True, help="state dict of the backbone")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for what the way keeps")
    return parser.parse_args()


def build_network(name: str, weights: Path) -> Any:
    """Return the stock network with these weights; its classifier is ``_fc``."""
    if name == "efficientnet-lite0":
        from efficientnet_lite_pytorch import EfficientNet
    else:
        from efficientnet_pytorch import EfficientNet
    network = EfficientNet.from_name(name, image_size=224)
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network


def build_head(num_classes: int) -> nn.Sequential:
    """Return the tutorial's head."""
    return nn.Sequential(
        nn.BatchNorm1d(1280), nn.Linear(1280, 512), nn.ReLU(),
        nn.BatchNorm1d(512), nn.Linear(512, 128), nn.ReLU(),
        nn.BatchNorm1d(128), nn.Dropout(0.4), nn.Linear(128, num_classes),
    )  # fmt: skip


def report(
    args: argparse.Namespace, preds: dict[str, int], targets: dict[str, int], **facts: Any
) -> None:
    """Write ``report.json``: accuracy on test, and a hash of which images it was.

    Args:
        args: The way's arguments.
        preds: Path relative to the split folder -> predicted class index, for split ``test``.
        targets: The same paths -> true class index.
        facts: More to keep.
    """
    right = sum(preds[path] == target for path, target in targets.items())
    names = "\n".join(f"{path} {targets[path]}" for path in sorted(targets))
    facts |= {
        "num_test": len(targets),
        "accuracy": right / len(targets),
        "test_sha256": hashlib.sha256(names.encode()).hexdigest(),
    }
    (args.out / "report.json").write_text(json.dumps(facts))
