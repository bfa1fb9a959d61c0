"""Way (a): the tutorial's, to the letter. Every epoch decodes and forwards every image.

The whole network in train mode, no workers, default Adam over ``model.parameters()``, a validation
pass after each epoch, the last weights tested. One repair, without which it could not run on every
data set: a last batch of one row is left out, batch norm cannot train on it.
"""

import time

import matplotlib as mpl
import torch
from PIL import ImageFile
from shared import build_head, build_network, parse_args, report
from sklearn.metrics import confusion_matrix
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

mpl.use("Agg")
import matplotlib.pyplot as plt

ImageFile.LOAD_TRUNCATED_IMAGES = True
args = parse_args()
torch.manual_seed(args.seed)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

transform = transforms.Compose(
    [
        transforms.Resize((224, 224)),
        transforms.ToTensor(),
        transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ]
)
data = {name: ImageFolder(args.data / name, transform) for name in ("train", "valid", "test")}
one_row_left = len(data["train"]) % 32 == 1
train = DataLoader(data["train"], batch_size=32, shuffle=True, drop_last=one_row_left)
valid = DataLoader(data["valid"], batch_size=32, shuffle=True)
test = DataLoader(data["test"], batch_size=32)

model = build_network(args.backbone, args.weights)
for parameter in model.parameters():
    parameter.requires_grad = False
model._fc = build_head(len(data["train"].classes))
model = model.to(device)
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)

lowest_loss, epoch_seconds = float("inf"), []
for _ in range(args.epochs):
    start = time.perf_counter()
    model.train()
    for images, targets in train:
        images, targets = images.to(device), targets.to(device)  # noqa: PLW2901
        optimizer.zero_grad()
        loss = criterion(model(images), targets)
        loss.backward()
        optimizer.step()
    model.eval()
    valid_loss = 0.0
    with torch.no_grad():
        for images, targets in valid:
            images, targets = images.to(device), targets.to(device)  # noqa: PLW2901
            valid_loss += criterion(model(images), targets).item() * len(images)
    if valid_loss <= lowest_loss:
        lowest_loss = valid_loss
        torch.save(model.state_dict(), args.out / "model.pt")
    epoch_seconds.append(time.perf_counter() - start)

model.eval()
preds: list[int] = []
with torch.no_grad():
    for images, _ in test:
        preds += model(images.to(device)).argmax(1).tolist()
matrix = confusion_matrix([target for _, target in data["test"].samples], preds)
plt.imshow(matrix, cmap="Blues")
plt.colorbar()
plt.savefig(args.out / "confusion.png")

truth = {path[len(str(args.data)) + 1 :]: target for path, target in data["test"].samples}
report(args, dict(zip(truth, preds, strict=True)), truth, epoch_seconds=epoch_seconds)
