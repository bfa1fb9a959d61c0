"""A published extractor: thingsvision, as its documentation shows it, in an environment of its own.

Runs torchvision's EfficientNet-B0 with random weights: another implementation of the same network.
Nothing of featcache is imported. Prints one JSON object, as ``stock_extract.py`` does, and how far
its features are from its own network run by hand on the first images.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from thingsvision import get_extractor
from thingsvision.utils.data import DataLoader, ImageDataset

NUM_COMPARED = 8

parser = argparse.ArgumentParser()
parser.add_argument("--data", type=Path, required=True, help="a folder of exactly the images")
parser.add_argument("--device", required=True)
parser.add_argument("--out", type=Path, required=True, help="the .npy")
args = parser.parse_args()

torch.manual_seed(0)
extractor = get_extractor(
    model_name="efficientnet_b0", source="torchvision", device=args.device, pretrained=False
)
dataset = ImageDataset(
    root=str(args.data), out_path=str(args.out.parent), backend=extractor.get_backend(),
    transforms=extractor.get_transformations(),
)  # fmt: skip
batches = DataLoader(dataset=dataset, batch_size=32, backend=extractor.get_backend())
start = time.perf_counter()
features = extractor.extract_features(
    batches=batches, module_name="avgpool", flatten_acts=True, output_type="ndarray"
)
seconds = time.perf_counter() - start
np.save(args.out, features)

network = extractor.model.eval()
pixels = torch.stack([dataset[i] for i in range(NUM_COMPARED)]).to(args.device)
with torch.no_grad():
    truth = network.avgpool(network.features(pixels)).flatten(1).cpu().numpy()
errors = np.linalg.norm(features[:NUM_COMPARED] - truth, axis=1) / np.linalg.norm(truth, axis=1)
print(
    json.dumps(
        {
            "num_images": len(features),
            "num_after_first": len(features),
            "first_seconds": 0.0,
            "rest_seconds": seconds,
            "version": f"thingsvision {version('thingsvision')}, torch {torch.__version__}",
            "parity": float(errors.max()),
        }
    )
)
