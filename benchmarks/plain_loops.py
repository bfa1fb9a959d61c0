"""What ``head.py`` and ``sweep.py`` share: synthetic rows, and the loops people write by hand.

Both loops train what ``featcache.heads.fit.fit_head`` trains: the same head from the same seed,
batches of as many rows, validation after every epoch. They take their rows as arrays in main memory
and bring them to the device themselves, as ``fit_head`` does.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from featcache.heads.config import HeadJob, TrainingConfig
from featcache.heads.head import HeadConfig, build_head

_ROWS_SEED = 0
_NUM_CAUSES, _NUM_UNITS, _MARGIN, _NOISE = 8, 16, 0.2, 0.5


@dataclass(frozen=True)
class Task:
    """What is trained on, and for how long.

    Attributes:
        num_rows: Of the training split.
        num_valid: Of the validation split.
        num_features: D.
        batch_size: Rows a step.
        epochs: Passes over the training rows.
        device: Where: ``cpu`` or ``cuda``.
    """

    num_rows: int
    num_valid: int
    num_features: int
    batch_size: int
    epochs: int
    device: str

    @property
    def num_steps(self) -> int:
        """Steps an epoch."""
        return -(-self.num_rows // self.batch_size)

    def job(self, seed: int) -> HeadJob:
        """Return the default head for two classes."""
        training = TrainingConfig(batch_size=self.batch_size, epochs=self.epochs)
        return HeadJob(HeadConfig(self.num_features, 2), training, seed)


@dataclass(frozen=True)
class Rows:
    """Arrays of the two splits."""

    features: np.ndarray  # (N, D) float32
    targets: np.ndarray  # (N,) int64
    valid_features: np.ndarray
    valid_targets: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """All four, in the order of ``fit_heads``."""
        return self.features, self.targets, self.valid_features, self.valid_targets

    def tensors(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return all four on a device."""
        return tuple(torch.from_numpy(array).to(device) for array in self.arrays)


class Curve:
    """Validation losses against the wall clock, which begins to run when this is made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.points: list[dict[str, float]] = []

    def note(self, valid_loss: float, valid_accuracy: float) -> None:
        """Take in an epoch."""
        seconds = time.perf_counter() - self._start
        self.points.append(
            {"seconds": seconds, "valid_loss": valid_loss, "valid_accuracy": valid_accuracy}
        )


def make_rows(task: Task) -> Rows:
    """Return rows that a head goes on learning from for some epochs, to an accuracy near 0.98.

    A few hidden causes decide the class, by a function that is not linear, and show in all features
    under noise. Rows too near to the border are left out, as if no one could name their class.
    """
    rng = np.random.default_rng(_ROWS_SEED)
    num_rows = task.num_rows + task.num_valid
    causes = rng.normal(size=(2 * num_rows + 100, _NUM_CAUSES))
    scale = 1 / np.sqrt(_NUM_CAUSES)
    shown = np.tanh(causes @ rng.normal(size=(_NUM_CAUSES, _NUM_UNITS), scale=1.5 * scale))
    scores = shown @ rng.normal(size=_NUM_UNITS)
    scores -= np.median(scores)
    clear = np.flatnonzero(np.abs(scores) > _MARGIN * scores.std())[:num_rows]
    targets = (scores[clear] > 0).astype(np.int64)
    mixing = rng.normal(size=(_NUM_CAUSES, task.num_features), scale=scale)
    features = (causes[clear] @ mixing).astype(np.float32)
    features += _NOISE * rng.standard_normal(features.shape, dtype=np.float32)
    cut = task.num_rows
    return Rows(features[:cut], targets[:cut], features[cut:], targets[cut:])


def warm_up_rows(rows: Rows, task: Task) -> tuple[Rows, Task]:
    """Return three batches: enough to import, to start threads and to allocate."""
    cut = 3 * task.batch_size
    few = Rows(*(array[:cut] for array in rows.arrays))
    return few, dataclasses.replace(task, num_rows=cut, num_valid=cut, epochs=1)


def train_with_loader(
    job: HeadJob, rows: Rows, device: torch.device, data_seed: int, curve: Curve
) -> None:
    """Train as tutorials do: a shuffling DataLoader, default Adam, ``.item()`` after each step."""
    train, valid = (
        TensorDataset(torch.from_numpy(features), torch.from_numpy(targets))
        for features, targets in (rows.arrays[:2], rows.arrays[2:])
    )
    size, order = job.training.rows_per_step(len(train)), torch.Generator().manual_seed(data_seed)
    loader = DataLoader(train, batch_size=size, shuffle=True, generator=order)
    held_out = DataLoader(valid, batch_size=size)
    head = _build(job, device)
    optimizer = torch.optim.Adam(
        head.parameters(), lr=job.training.learning_rate, weight_decay=job.training.weight_decay
    )
    criterion = nn.CrossEntropyLoss()
    for _ in range(job.training.epochs):
        head.train()
        running = 0.0
        for features, targets in loader:
            inputs, wanted = features.to(device), targets.to(device)
            optimizer.zero_grad()
            loss = criterion(head(inputs), wanted)
            loss.backward()
            optimizer.step()
            running += loss.item() * len(inputs)
        head.eval()
        total, right = 0.0, 0
        with torch.no_grad():
            for features, targets in held_out:
                inputs, wanted = features.to(device), targets.to(device)
                logits = head(inputs)
                total += criterion(logits, wanted).item() * len(inputs)
                right += int((logits.argmax(1) == wanted).sum().item())
        curve.note(total / len(valid), right / len(valid))


def train_by_index(
    job: HeadJob, rows: Rows, device: torch.device, data_seed: int, curve: Curve
) -> None:
    """Train as those do who have measured: rows on the device, batches by index, fused Adam."""
    features, targets, valid_features, valid_targets = rows.tensors(device)
    order = torch.Generator().manual_seed(data_seed)
    head = _build(job, device)
    optimizer = torch.optim.Adam(
        head.parameters(), lr=job.training.learning_rate, fused=True,
        weight_decay=job.training.weight_decay,
    )  # fmt: skip
    size = job.training.rows_per_step(len(features))
    for _ in range(job.training.epochs):
        head.train()
        for batch in torch.randperm(len(features), generator=order).to(device).split(size):
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(head(features[batch]), targets[batch]).backward()
            optimizer.step()
        curve.note(*judge(head, valid_features, valid_targets))


def judge(head: nn.Module, features: Tensor, targets: Tensor) -> tuple[float, float]:
    """Return cross-entropy and accuracy on validation rows; leaves the head in eval mode."""
    head.eval()
    with torch.inference_mode():
        logits = head(features)
        loss = functional.cross_entropy(logits, targets)
        return loss.item(), (logits.argmax(1) == targets).float().mean().item()


def _build(job: HeadJob, device: torch.device) -> nn.Sequential:
    """Return the head of the job's seed; the seed's stream then goes on to the dropout masks."""
    torch.manual_seed(job.seed)
    return build_head(job.head).to(device)
