"""The training step equals torch's, in NumPy, compiled, and stacked as on a GPU."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from featcache.heads import fit
from featcache.heads.batches import TrainingData
from featcache.heads.compiled import kernels, numpy_kernels
from featcache.heads.compiled.team import Team
from featcache.heads.config import OPTIMIZERS, FitResult, HeadJob, TrainingConfig
from featcache.heads.fit import fit_heads
from featcache.heads.group import HeadGroup
from featcache.heads.head import HeadConfig, build_head
from featcache.heads.stack import StackTrainer
from featcache.runtime import CPU

PATHS = ("numpy", "compiled", "stacked")
WIDE = (300, 400)
"""Hidden widths of which the layers are moved in pieces; the second is shared by two threads."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_data(
    num_rows: int = 75, *, has_labels: bool = False, weighted: bool = False, num_classes: int = 3,
    dtype: str = "f8",
) -> TrainingData:  # fmt: skip
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(num_rows, 17)) * 5 + 3).astype(dtype)
    targets: Any = np.arange(num_rows) % num_classes
    if has_labels:
        targets = rng.choice([0, 1, np.nan], (num_rows, num_classes))
        targets[:, 0] = np.arange(num_rows) % 2
    weights = rng.random(num_rows) + 0.5 if weighted else None
    names = [str(i) for i in range(num_classes)]
    return TrainingData.of(features, targets, features[:40], targets[:40], weights, names, 6)


def make_trainer(path: str, jobs: list[HeadJob], data: TrainingData) -> HeadGroup | StackTrainer:
    if path == "stacked":
        return StackTrainer(jobs, data, torch.device("cpu"))
    return HeadGroup(jobs, data, numpy_kernels if path == "numpy" else kernels.load(data.dtype))


def torch_loss(
    logits: torch.Tensor, targets: Any, job: HeadJob, weights: Any, class_weights: torch.Tensor
) -> torch.Tensor:
    """Return the loss as its definition says, by torch's own functions."""
    smoothing = job.training.label_smoothing
    if targets.ndim == 1:
        rows = nn.functional.cross_entropy(
            logits, torch.from_numpy(targets), class_weights, reduction="none",
            label_smoothing=smoothing,
        )  # fmt: skip
        return (rows * weights).sum() / (class_weights[targets] * weights).sum()
    wanted = torch.from_numpy(targets)
    known = (~wanted.isnan()).to(logits) * weights[:, None]
    wanted = wanted.nan_to_num() * (1 - smoothing) + smoothing / 2
    return nn.functional.binary_cross_entropy_with_logits(
        logits, wanted, known, reduction="sum", pos_weight=class_weights
    ) / known.sum()  # fmt: skip


def train_by_torch(job: HeadJob, data: TrainingData, rates: list[float]) -> tuple[Any, float]:
    """Train an epoch as a script would, with ``torch.optim``; return the state and the loss."""
    assert isinstance(data.features, np.ndarray)
    head = build_head(job.head, job.seed).to(torch.from_numpy(data.features).dtype)
    masks = np.random.default_rng([job.seed, 1])
    dropout = job.head.dropout

    def drop(_: nn.Module, values: tuple[torch.Tensor]) -> torch.Tensor:
        draws = masks.random(tuple(values[0].shape), np.float32)
        return values[0] * torch.from_numpy(draws >= dropout) / (1 - dropout)

    head[-2] = nn.Identity()
    if dropout:
        head[-2].register_forward_pre_hook(drop)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    more: Any = {"momentum": 0.9} if job.training.optimizer == "sgd" else {}
    optimizer = kind[job.training.optimizer](
        head.parameters(), weight_decay=job.training.weight_decay, **more
    )
    num_rows, total, count = len(data.targets), 0.0, 0
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(data.data_seed))
    kept = job.training.class_weights
    classes = torch.ones(job.head.num_classes) if kept == "none" else torch.tensor(kept)
    for start, rate in zip(range(0, num_rows - 1, 32), rates, strict=True):
        rows = order[start : start + 32].numpy()
        weights = np.ones(len(rows)) if data.row_weights is None else data.row_weights[rows]
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = torch_loss(
            head(torch.from_numpy(data.features[rows])), data.targets[rows], job,
            torch.from_numpy(weights).to(head[0].weight.dtype), classes.to(head[0].weight.dtype),
        )  # fmt: skip
        loss.backward()
        optimizer.step()
        total, count = total + loss.item() * len(rows), count + len(rows)
    return head.state_dict(), total / count


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("hidden", [(), (9,), (6, 5, 4), WIDE])
@pytest.mark.parametrize("has_labels", [False, True])
def test_an_epoch_equals_that_of_a_script(
    has_labels: bool, hidden: tuple[int, ...], optimizer: str, path: str
) -> None:
    """Two heads unlike in everything that may be, on batches of 32, 32 and 11 rows."""
    data = make_data(has_labels=has_labels, weighted=optimizer != "adam")
    jobs = [
        HeadJob(
            HeadConfig(17, 3, hidden, dropout),
            TrainingConfig(
                optimizer=optimizer, weight_decay=decay, label_smoothing=smoothing,
                class_weights=class_weights,
            ),
            seed,
        )
        for dropout, decay, smoothing, class_weights, seed in (
            (0.0, 0.0, 0.1, (1.0, 2.0, 0.5), 1), (0.5, 0.1, 0.0, "none", 2),
        )
    ]  # fmt: skip
    rates = [[1e-3, 0.1], [2e-3, 0.05], [3e-3, 0.01]]
    trainer = make_trainer(path, jobs, data)
    losses = trainer.train_epoch(32, rates)
    for place, job in enumerate(jobs):
        state, loss = train_by_torch(job, data, [step[place] for step in rates])
        assert losses[place] == pytest.approx(loss, rel=1e-9)
        trained = trainer.state(place)
        assert list(trained) == list(state)
        for name, value in state.items():
            np.testing.assert_allclose(trained[name], value.numpy(), 1e-7, 1e-9, err_msg=name)
            assert trained[name].dtype == value.numpy().dtype


@pytest.mark.parametrize("has_labels", [False, True])
def test_float32_is_close_to_float64(has_labels: bool) -> None:
    """SGD: Adam moves by the sign of a gradient that is zero but for rounding."""
    job = HeadJob(HeadConfig(17, 3, WIDE, 0.2), TrainingConfig(optimizer="sgd"), 1)
    states = []
    for dtype in ("f4", "f8"):
        for path in PATHS:
            trainer = make_trainer(path, [job], make_data(has_labels=has_labels, dtype=dtype))
            trainer.train_epoch(32, [[0.01]] * 3)
            states.append((trainer.state(0), trainer.validate()[0]))
            assert states[-1][0]["0.weight"].dtype == dtype
    for state, valid in states[:-1]:
        assert valid["valid_loss"] == pytest.approx(states[-1][1]["valid_loss"], rel=1e-4)
        for name, value in states[-1][0].items():
            np.testing.assert_allclose(state[name], value, 1e-3, 1e-4, err_msg=name)


@pytest.mark.parametrize("path", PATHS)
def test_heads_that_are_given_up_leave_the_others_as_they_are(path: str) -> None:
    jobs = [HeadJob(HeadConfig(17, 3, (8,)), TrainingConfig(), seed) for seed in range(3)]
    alone, together = (make_trainer(path, part, make_data()) for part in (jobs[2:], jobs))
    for trainer, rates in ((alone, [[0.01]] * 3), (together, [[0.01] * 3] * 3)):
        trainer.train_epoch(32, rates)
    together.keep([2])
    for trainer in (alone, together):
        trainer.train_epoch(32, [[0.01]] * 3)
    for name, value in alone.state(0).items():
        np.testing.assert_allclose(together.state(0)[name], value, 1e-9, 1e-12)


def train_some(
    num_heads: int = 3, hidden: tuple[int, ...] = (8,), num_rows: int = 90, width: int = 12
) -> list[FitResult]:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(num_rows, width)).astype("f4"), np.arange(num_rows) % 3
    jobs = [
        HeadJob(HeadConfig(width, 3, hidden), TrainingConfig(epochs=3, learning_rate=10.0**-k), k)
        for k in range(1, num_heads + 1)
    ]
    return fit_heads(jobs, x, y, x, y, data_seed=4, device=CPU)


def assert_equal_states(left: list[FitResult], right: list[FitResult]) -> None:
    for one, other in zip(left, right, strict=True):
        assert list(one.state) == list(other.state)
        for name, value in one.state.items():
            assert np.array_equal(value, other.state[name]), name


@pytest.mark.parametrize("worth", [0, 1e12], ids=["compiled", "numpy"])
@pytest.mark.parametrize("hidden", [(8,), WIDE])
def test_the_same_bits_alone_beside_others_and_with_any_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, hidden: tuple[int, ...], worth: float
) -> None:
    monkeypatch.setattr(fit, "_KERNELS_WORTH", worth)
    monkeypatch.setattr(fit, "available_cores", lambda: 1)
    alone = train_some(1, hidden)
    for num_cores in (1, 2, 3):
        monkeypatch.setattr(fit, "available_cores", lambda n=num_cores: n)
        monkeypatch.setattr(fit, "_TEAM_SIZE", num_cores)
        assert_equal_states(train_some(1, hidden), alone)
        assert_equal_states(train_some(5, hidden)[:1], alone)


def test_several_threads_may_train_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "_KERNELS_WORTH", 0)
    expected, results = train_some(1, WIDE), list[list[FitResult]]()
    threads = [
        threading.Thread(target=lambda: results.append(train_some(1, WIDE))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    for result in results:
        assert_equal_states(result, expected)


FORKED = """
import os, sys
import numpy as np
from featcache.heads import fit
from featcache.heads.config import HeadJob, TrainingConfig
from featcache.heads.head import HeadConfig
from featcache.runtime import CPU
fit._KERNELS_WORTH = 0
x, y = np.random.default_rng(0).normal(size=(90, 12)).astype("f4"), np.arange(90) % 3
def train():
    job = HeadJob(HeadConfig(12, 3, (300, 400)), TrainingConfig(epochs=2), 0)
    results = fit.fit_heads([job] * 2, x, y, x, y, data_seed=4, device=CPU)
    return results[1].history[-1]["valid_loss"]
before = train()
child = os.fork()
if not child:
    os._exit(0 if train() == before else 1)
assert os.waitpid(child, 0)[1] == 0, "the child"
assert train() == before
assert "torch" not in sys.modules
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_trains_and_so_does_its_parent() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True)  # noqa: PLW1510
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_not_a_number_comes_through_every_function(dtype: str) -> None:
    """Full fast math would remove the checks: a head that diverges would seem to learn."""
    for functions in (numpy_kernels, kernels.load(np.dtype(dtype))):
        nan, ones = np.full((4, 8), np.nan, dtype), np.ones((4, 8), dtype)

        def flat(n: int = 4) -> Any:
            return np.zeros(n, dtype)

        out, mean, variance = np.zeros((4, 8), dtype), flat(8), flat(8)
        with np.errstate(all="ignore"):
            functions.normalise_columns(nan, out, mean, variance)
            assert np.isnan(out).all()
            assert np.isnan(mean).all()
            normed, z = np.zeros((4, 8), dtype), nan.copy()
            functions.relu_and_normalise(
                z, flat(), flat(), flat(), flat(), flat(), normed, flat(), out
            )
            assert np.isnan(z).all()
            assert np.isnan(out).all()
            for logits in (nan, ones * np.inf, np.where(np.arange(8) == 1, np.nan, ones)):
                for wide in (4, 8):
                    logits = np.ascontiguousarray(logits, dtype)  # noqa: PLW2901
                    loss = functions.loss_and_gradient(
                        logits, np.ones((8, wide), dtype), np.ones(8, dtype), out
                    )
                    assert not np.isfinite(loss)
            sums = flat(), flat(), flat()
            functions.norm_and_relu_backward(nan, ones, flat() + 1, flat() + 1, ones, out, *sums)
            assert np.isnan(out).all()
            assert all(np.isnan(part).all() for part in sums)
            for is_sgd in (0, 1):
                settings = np.array([is_sgd, 0.1, 0, 1, 0.9, 0.99, 1, 1e-8], dtype)
                w, m, v = ones.copy(), out * 0, out * 0
                functions.move_layer(
                    nan.copy(), flat(), flat(8) + 1, flat(8), w, m, v, flat(8), flat(8), settings
                )
                assert np.isnan(w).all()
                p = flat() + 1
                functions.move_values(flat() * np.nan, p, flat(), flat(), settings)
                assert np.isnan(p).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("hidden", [(), (8,), (8, 4)])
def test_a_head_that_diverges_is_noticed(path: str, hidden: tuple[int, ...]) -> None:
    job = HeadJob(HeadConfig(17, 3, hidden), TrainingConfig(optimizer="sgd"), 0)
    for data, rate in (
        (make_data(dtype="f4"), 1e30),
        (dataclasses.replace(make_data(), features=np.full((75, 17), np.nan)), 1e-3),
    ):
        trainer = make_trainer(path, [job], data)
        losses = [trainer.train_epoch(32, [[rate]] * 3)[0] for _ in range(3)]
        assert not np.isfinite(losses[-1])


def test_each_function_is_compiled_once_for_each_dtype() -> None:
    """Whatever the depth, width, classes, loss and optimizer."""
    for dtype in ("f4", "f8"):
        compiled = kernels.load(np.dtype(dtype))
        shapes = itertools.cycle(((), (9,), (6, 5, 4)))
        for optimizer, hidden in zip(OPTIMIZERS, shapes, strict=False):
            job = HeadJob(HeadConfig(17, 3, hidden), TrainingConfig(optimizer=optimizer), 0)
            for has_labels in (False, True):
                data = make_data(dtype=dtype, has_labels=has_labels)
                HeadGroup([job], data, compiled).train_epoch(32, [[0.01]] * 3)
        assert 6 <= len(vars(compiled)) <= 8
        for function in vars(compiled).values():
            assert len(function.signatures) == 1
            assert function.targetoptions["fastmath"] == {"reassoc", "contract"}  # NaN stays NaN


def test_what_a_thread_of_the_team_raises_is_raised() -> None:
    def fail(number: int) -> None:
        if number == 1:
            raise ZeroDivisionError

    with Team(2) as team:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                team.run(fail, [(0,), (1,), (2,)])
        team.run(fail, [(0,)])


def test_without_numba_numpy_takes_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train_some()
    monkeypatch.setattr(fit, "_KERNELS_WORTH", 0)
    monkeypatch.setitem(sys.modules, "featcache.heads.compiled.kernels", None)
    monkeypatch.delattr("featcache.heads.compiled.kernels")
    assert_equal_states(train_some(), expected)


SMALL = """
import sys
import numpy as np
from featcache.heads.config import TrainingConfig
from featcache.heads.fit import fit_head
from featcache.heads.head import HeadConfig
from featcache.runtime import CPU
import featcache.sweeps.trials
x, y = np.random.default_rng(0).normal(size=(200, 12)).astype("f4"), np.arange(200) % 3
fit_head(HeadConfig(12, 3), TrainingConfig(), x, y, x, y, seed=0, data_seed=0, device=CPU)
print(*sorted({"torch", "numba", "scipy", "sklearn"} & set(sys.modules)))
"""


def test_a_small_training_loads_neither_torch_nor_numba() -> None:
    done = subprocess.run([sys.executable, "-c", SMALL], capture_output=True, text=True, check=True)
    assert not done.stdout.strip()


def test_a_long_compilation_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    lines, is_said = list[str](), threading.Event()

    def slow(_: Any) -> Any:
        assert is_said.wait(60)
        return numpy_kernels

    def say(line: str) -> None:
        lines.append(line)
        is_said.set()

    monkeypatch.setattr(fit, "_KERNELS_WORTH", 0)
    monkeypatch.setattr(fit, "_LONG_SECONDS", 0.01)
    monkeypatch.setattr(kernels, "load", slow)
    x, y = np.ones((8, 3), "f4"), np.arange(8) % 2
    job = HeadJob(HeadConfig(3, 2, ()), TrainingConfig(epochs=1), 0)
    fit_heads([job], x, y, data_seed=0, device=CPU, say=say)
    assert len(lines) == 1
    assert "compiling" in lines[0]
