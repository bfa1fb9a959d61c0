"""Heads trained together in float32 against the plain way: nn.Sequential and torch.optim, alone.

In float64 both agree to 1e-10 (test_fit). In float32 any two orders of summation drift apart, so
the first ten steps are compared to 1e-4, and final losses by how much the seed moves them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sample_heads import SeededDropout, as_tensors, logits_of
from torch import nn

from featcache.heads import fit, one_pass
from featcache.heads.config import FitResult, HeadJob, TrainingConfig
from featcache.heads.fit import fit_heads
from featcache.heads.head import HeadConfig, build_head
from featcache.heads.stack import StackTrainer
from featcache.runtime import CPU

WIDTH, BATCH, DATA_SEED = 20, 14, 6
NUM_ROWS = 5 * BATCH + 1  # the last batch of an epoch has a single row, and is left out
TEN_STEPS = {"epochs": 2, "batch_size": BATCH}
OPTIONS: list[dict[str, Any]] = [
    {}, {"schedule": "cosine"}, {"class_weights": "balanced"}, {"label_smoothing": 0.2},
    {"weight_decay": 0.1}, {"dropout": 0.4}, {"learning_rate": 0.02},
    {"dropout": 0.2, "schedule": "cosine", "class_weights": "balanced", "label_smoothing": 0.1,
     "weight_decay": 0.01},
]  # fmt: skip
"""What may differ from head to head of a stack."""

SHAPES = [((), 2), ((), 10), ((8,), 2), ((8,), 10), ((9, 7, 5), 2), ((9, 7, 5), 10)]
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Nets this small only wait for each other on more threads, and long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["numpy", "compiled", "stacked"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By what heads are trained, whatever their size: the last is that of GPUs."""
    monkeypatch.setattr(fit, "_KERNELS_WORTH", 0 if request.param == "compiled" else math.inf)
    monkeypatch.setattr(fit, "available_cores", lambda: 2)
    if request.param == "stacked":
        monkeypatch.setattr(
            one_pass, "HeadGroup", lambda jobs, data, *_: StackTrainer(jobs, data, CPU.torch())
        )
    return str(request.param)


def make_rows(num_classes: int, num_rows: int = NUM_ROWS, seed: int = 0) -> tuple[Any, Any]:
    """Rows of classes that overlap; the last class has a single one."""
    rng = np.random.default_rng(seed)
    targets = np.arange(num_rows) % max(num_classes - 1, 1)
    if num_classes == 2:
        targets[: num_rows // 2] = 1
    else:
        targets[3] = num_classes - 1
    features = (rng.normal(size=(num_rows, WIDTH)) * rng.uniform(0.1, 9, WIDTH)).astype("f4")
    features[np.arange(num_rows), targets] += 2
    return features, targets


def make_jobs(
    number: int, hidden: tuple[int, ...], num_classes: int, optimizer: str, first: int = 0,
    **training: Any,
) -> list[HeadJob]:  # fmt: skip
    """Heads of one shape that differ in whatever they may, beginning with option ``first``."""
    jobs = []
    for seed in range(number):
        options = {"dropout": 0.0, "learning_rate": 0.003} | OPTIONS[(first + seed) % len(OPTIONS)]
        head = HeadConfig(WIDTH, num_classes, hidden, options.pop("dropout"))
        jobs.append(
            HeadJob(head, TrainingConfig(optimizer=optimizer, **(options | training)), seed)
        )
    return jobs


@functools.cache  # the same for every path
def plain_loop(job: HeadJob, num_held_out: int = 40) -> Any:
    """Train as a script would; return logits of the held-out rows and their loss, each epoch."""
    training, num_classes = job.training, job.head.num_classes
    arrays = make_rows(num_classes), make_rows(num_classes, num_held_out, seed=1)
    (x, y), (valid_x, valid_y) = (map(torch.from_numpy, pair) for pair in arrays)
    torch.manual_seed(job.seed)
    head = build_head(job.head)  # layer by layer as by hand: test_head
    head[-2] = SeededDropout(job.head.dropout, job.seed)
    momentum = {"momentum": 0.9} if training.optimizer == "sgd" else {}
    stepper = OPTIMIZERS[training.optimizer](
        head.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, **momentum
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(stepper, training.epochs)
    weight = None
    if training.class_weights == "balanced":
        weight = (len(y) / (num_classes * torch.bincount(y, minlength=num_classes))).float()
    criterion = nn.CrossEntropyLoss(weight, label_smoothing=training.label_smoothing)
    order, logits, losses = torch.Generator().manual_seed(DATA_SEED), [], []
    for _ in range(training.epochs):
        head.train()
        for batch in torch.randperm(len(x), generator=order).split(training.rows_per_step(len(x))):
            if len(batch) > 1:
                loss = criterion(head(x[batch]), y[batch])
                stepper.zero_grad()
                loss.backward()
                stepper.step()
        if training.schedule == "cosine":
            cosine.step()
        logits.append(logits_of(head, valid_x.numpy()))
        each = nn.functional.cross_entropy(torch.from_numpy(logits[-1]).double(), valid_y)
        losses.append(each.item())
    return logits, losses


def fit_stack(jobs: Sequence[HeadJob], rows: Any, held_out: Any, **options: Any) -> list[FitResult]:
    return fit_heads(jobs, *rows, *held_out, data_seed=DATA_SEED, device=CPU, **options)


def trained_logits(job: HeadJob, result: FitResult, held_out: tuple[Any, Any]) -> Any:
    head = build_head(job.head, 0)
    head.load_state_dict(as_tensors(result.state))
    return logits_of(head, held_out[0])


def assert_ten_steps_agree(jobs: Sequence[HeadJob], rows: Any, held_out: Any) -> None:
    """Compare the losses of both epochs, and the logits after the better of them.

    One head in thirty may differ by more: where a ReLU's input is zero but for rounding, one order
    of summation passes the gradient and another does not. The plain loop itself then differs by
    7e-4 between float32 and float64.
    """
    apart = []
    for job, result in zip(jobs, fit_stack(jobs, rows, held_out), strict=True):
        logits, losses = plain_loop(job)
        loss_gap = np.abs(np.array([row["valid_loss"] for row in result.history]) - losses).max()
        found, wanted = trained_logits(job, result, held_out), logits[result.best_epoch - 1]
        apart.append(max(loss_gap, (np.abs(found - wanted) / (1 + np.abs(wanted))).max()))
    assert np.sum(np.array(apart) > 1e-4) <= len(jobs) // 30, apart
    assert max(apart) < 5e-3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("hidden", "num_classes"), SHAPES)
@pytest.mark.parametrize("number", [1, 3])
def test_ten_steps_are_those_of_the_plain_loop(
    number: int, hidden: tuple[int, ...], num_classes: int, optimizer: str
) -> None:
    rows, held_out = make_rows(num_classes), make_rows(num_classes, 40, seed=1)
    one_by_one = number == 1 and (hidden, num_classes) == ((8,), 2)
    for first in range(len(OPTIONS)) if one_by_one else (4 if num_classes == 10 else 1,):
        jobs = make_jobs(number, hidden, num_classes, optimizer, first, **TEN_STEPS)
        assert_ten_steps_agree(jobs, rows, held_out)


@pytest.mark.parametrize(
    ("optimizer", "hidden", "num_classes"),
    [("adam", (8,), 2), ("adamw", (9, 7, 5), 10), ("sgd", (), 10)],
)
def test_ten_steps_of_64_heads_are_those_of_the_plain_loop(
    optimizer: str, hidden: tuple[int, ...], num_classes: int
) -> None:
    rows, held_out = make_rows(num_classes), make_rows(num_classes, 40, seed=1)
    jobs = make_jobs(64, hidden, num_classes, optimizer, **TEN_STEPS)
    assert_ten_steps_agree(jobs, rows, held_out)


def seeds_of(job: HeadJob) -> list[HeadJob]:
    return [HeadJob(job.head, job.training, seed) for seed in range(5)]


@pytest.mark.parametrize("first", range(len(OPTIONS)))
def test_final_losses_agree_within_the_spread_of_five_seeds(first: int) -> None:
    hidden, num_classes = [((8,), 2), ((9, 7, 5), 10)][first % 2]
    rows, held_out = make_rows(num_classes), make_rows(num_classes, 200, seed=1)
    (job,) = make_jobs(1, hidden, num_classes, "adam", first, batch_size=BATCH, epochs=10)
    wanted = np.array([plain_loop(j, len(held_out[1]))[1][-1] for j in seeds_of(job)])
    results = fit_stack(seeds_of(job), rows, held_out)
    found = np.array([result.history[-1]["valid_loss"] for result in results])
    assert abs(found - wanted).max() < wanted.std()


@pytest.mark.parametrize(
    ("optimizer", "hidden", "num_classes"),
    [("adam", (9, 7, 5), 2), ("adamw", (8,), 10), ("sgd", (), 2)],
)
def test_a_head_among_64_is_the_head_alone(
    optimizer: str, hidden: tuple[int, ...], num_classes: int
) -> None:
    rows, held_out = make_rows(num_classes), make_rows(num_classes, 200, seed=1)
    chosen = range(0, 64, 9)  # every option
    jobs = make_jobs(64, hidden, num_classes, optimizer, **TEN_STEPS)
    among = fit_stack(jobs, rows, held_out)
    for job, result in ((jobs[i], among[i]) for i in chosen):
        (alone,) = fit_stack([job], rows, held_out)
        assert alone.best_epoch == result.best_epoch
        np.testing.assert_allclose(
            trained_logits(job, result, held_out),
            trained_logits(job, alone, held_out),
            rtol=1e-4,
            atol=1e-4,
        )
    # Later, rounding has moved them apart: among a third as many, by less than the seed does.
    chosen = range(0, 24, 3)  # every option again
    jobs = make_jobs(24, hidden, num_classes, optimizer, batch_size=BATCH, epochs=6)
    among = fit_stack(jobs, rows, held_out)
    others = fit_stack([seed for i in chosen for seed in seeds_of(jobs[i])], rows, held_out)
    for i, seeds in zip(chosen, np.reshape(np.array(others, object), (-1, 5)), strict=True):
        (alone,) = fit_stack([jobs[i]], rows, held_out)
        difference = alone.history[-1]["valid_loss"] - among[i].history[-1]["valid_loss"]
        assert abs(difference) < np.std([result.history[-1]["valid_loss"] for result in seeds])


def test_heads_that_stay_when_others_are_given_up_are_not_moved() -> None:
    rows, held_out = make_rows(2), make_rows(2, 40, seed=1)
    for optimizer in OPTIMIZERS:
        jobs = make_jobs(8, (8,), 2, optimizer, **TEN_STEPS)
        given_up = itertools.cycle((True, False, True))
        ends = {number: next(given_up) for number in range(8)}
        results = fit_stack(jobs, rows, held_out, on_epoch=lambda number, _, e=ends: e[number])
        for number, (job, result) in enumerate(zip(jobs, results, strict=True)):
            assert len(result.history) == (1 if ends[number] else 2)
            losses = plain_loop(job)[1][: len(result.history)]
            found = [row["valid_loss"] for row in result.history]
            np.testing.assert_allclose(found, losses, rtol=1e-4)
