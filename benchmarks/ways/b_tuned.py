"""Way (b): live in every epoch, tuned by hand as someone who knows PyTorch would.

The backbone in eval and inference mode, channels_last, plain SiLU instead of the memory-efficient
swish, loader workers that persist, fused Adam over the head alone, larger batches where nothing is
trained. The best weights by validation loss are tested.
"""

import copy
import os
import time

import torch
from shared import build_head, build_network, parse_args, report
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

args = parse_args()
torch.manual_seed(args.seed)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
num_workers = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)

transform = transforms.Compose(
    [
        transforms.Resize((224, 224)),
        transforms.ToTensor(),
        transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ]
)
data = {name: ImageFolder(args.data / name, transform) for name in ("train", "valid", "test")}
options = {"num_workers": num_workers, "pin_memory": device.type == "cuda"}
train = DataLoader(
    data["train"], batch_size=32, shuffle=True, drop_last=len(data["train"]) % 32 == 1,
    persistent_workers=True, **options,
)  # fmt: skip
valid = DataLoader(data["valid"], batch_size=64, persistent_workers=True, **options)
test = DataLoader(data["test"], batch_size=64, **options)

network = build_network(args.backbone, args.weights).eval().requires_grad_(requires_grad=False)
if args.backbone != "efficientnet-lite0":  # Lite0 has ReLU6, which set_swish would replace
    network.set_swish(memory_efficient=False)
network = network.to(device, memory_format=torch.channels_last)
head = build_head(len(data["train"].classes)).to(device)
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(head.parameters(), lr=5e-4, fused=True)


def compute_features(images: torch.Tensor) -> torch.Tensor:
    """Return (B, 1280) features, free to take part in a backward pass."""
    images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
    with torch.inference_mode():
        features = network.extract_features(images).mean((2, 3))
    return features.clone()


lowest_loss, best_state, epoch_seconds = float("inf"), head.state_dict(), []
for _ in range(args.epochs):
    start = time.perf_counter()
    head.train()
    for images, targets in train:
        loss = criterion(head(compute_features(images)), targets.to(device, non_blocking=True))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    head.eval()
    with torch.inference_mode():
        losses = [
            criterion(head(compute_features(images)), targets.to(device)) * len(images)
            for images, targets in valid
        ]
    valid_loss = torch.stack(losses).sum().item()
    if valid_loss < lowest_loss:
        lowest_loss, best_state = valid_loss, copy.deepcopy(head.state_dict())
    epoch_seconds.append(time.perf_counter() - start)

head.load_state_dict(best_state)
torch.save(best_state, args.out / "head.pt")
head.eval()
preds: list[int] = []
with torch.inference_mode():
    for images, _ in test:
        preds += head(compute_features(images)).argmax(1).tolist()
truth = {path[len(str(args.data)) + 1 :]: target for path, target in data["test"].samples}
report(args, dict(zip(truth, preds, strict=True)), truth, epoch_seconds=epoch_seconds)
