"""Way (c): live in every epoch, but with featcache's own decoder, engine and optimizer.

What is left between this and way (e) is caching alone.
"""

import copy
import time
from collections.abc import Iterator, Sequence

import torch
from shared import build_head, parse_args, report
from torch.nn import functional

from featcache.backbones.backbone import build_backbone
from featcache.backbones.engine import build_engine
from featcache.data.dataset import Sample, scan
from featcache.extraction.pipeline import Lane, stream_features
from featcache.extraction.recipe import decode_probes, make_recipe
from featcache.runtime import resolve_device

args = parse_args()
torch.manual_seed(args.seed)
device = resolve_device().torch()
dataset = scan(args.data)
backbone = build_backbone(args.backbone, weights=args.weights, normalize="half")
recipe = make_recipe(backbone, dataset)
engine = build_engine(backbone, device, decode_probes(dataset, dataset.samples, recipe.rules))


def forward(samples: Sequence[Sample]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield features (32, 1280) and targets of the samples, in their order."""
    rows, targets = [], []
    for batch in stream_features(dataset, samples, [Lane(recipe, engine)]):
        for outcome, features in zip(batch.outcomes, batch.features[0], strict=True):
            if features is not None:
                rows.append(torch.from_numpy(features[0]))
                targets.append(outcome.sample.target)
        while len(rows) >= 32:
            yield torch.stack(rows[:32]).to(device), torch.tensor(targets[:32]).to(device)
            del rows[:32], targets[:32]
    if rows:
        yield torch.stack(rows).to(device), torch.tensor(targets).to(device)


head = build_head(len(dataset.classes)).to(device)
optimizer = torch.optim.Adam(head.parameters(), lr=5e-4, fused=True)
train, valid, test = (dataset.split(name) for name in ("train", "valid", "test"))
lowest_loss, best_state, epoch_seconds = float("inf"), head.state_dict(), []
for _ in range(args.epochs):
    start = time.perf_counter()
    head.train()
    for features, targets in forward([train[i] for i in torch.randperm(len(train)).tolist()]):
        if len(features) > 1:
            optimizer.zero_grad()
            functional.cross_entropy(head(features), targets).backward()
            optimizer.step()
    head.eval()
    with torch.inference_mode():
        losses = [
            functional.cross_entropy(head(features), targets, reduction="sum")
            for features, targets in forward(valid)
        ]
    valid_loss = torch.stack(losses).sum().item()
    if valid_loss < lowest_loss:
        lowest_loss, best_state = valid_loss, copy.deepcopy(head.state_dict())
    epoch_seconds.append(time.perf_counter() - start)

head.load_state_dict(best_state)
torch.save(best_state, args.out / "head.pt")
head.eval()
with torch.inference_mode():
    preds = torch.cat([head(features).argmax(1) for features, _ in forward(test)]).tolist()
truth = {sample.path: sample.target for sample in test}
report(
    args, dict(zip(truth, preds, strict=True)), truth,
    epoch_seconds=epoch_seconds, engine=engine.name,
)  # fmt: skip
