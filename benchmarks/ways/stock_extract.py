"""The stock way to features: ImageFolder, DataLoader, the eager network, ``np.save``.

Nothing of featcache is imported. Prints one JSON object: the images, the seconds up to and with the
first batch since the loop began (workers start there), and the seconds of the rest.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from shared import build_network
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Normalize, Resize, ToTensor

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

parser = argparse.ArgumentParser()
parser.add_argument("--data", type=Path, required=True, help="class folders")
parser.add_argument("--weights", type=Path, required=True)
parser.add_argument("--num", type=int, required=True, help="so many images, from the first")
parser.add_argument("--device", required=True)
parser.add_argument("--out", type=Path, required=True, help="the .npy")
args = parser.parse_args()

transform = Compose([Resize((224, 224)), ToTensor(), Normalize(*IMAGENET)])
images = ImageFolder(args.data, transform)
network = build_network("efficientnet-b0", args.weights).eval().to(args.device)
batches = DataLoader(Subset(images, range(args.num)), batch_size=32, num_workers=2)
rows, start, first = [], time.perf_counter(), 0.0
with torch.no_grad():
    for pixels, _ in batches:
        rows.append(network.extract_features(pixels.to(args.device)).mean((2, 3)).cpu())
        first = first or time.perf_counter() - start
np.save(args.out, torch.cat(rows).numpy())
rest = time.perf_counter() - start - first
print(
    json.dumps(
        {
            "num_images": args.num,
            "num_after_first": args.num - len(rows[0]),
            "first_seconds": first,
            "rest_seconds": rest,
            "version": torch.__version__,
        }
    )
)
