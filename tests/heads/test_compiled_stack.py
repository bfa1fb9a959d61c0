"""Compiled steps against those of torch: the same parameters, moments and statistics."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch

from featcache.heads import compiled_stack, fit
from featcache.heads.compiled_stack import (
    Batches,
    CompiledSteps,
    kernels_for,
    load_kernels,
)
from featcache.heads.config import OPTIMIZERS, HeadJob, TrainingConfig
from featcache.heads.fit import fit_heads
from featcache.heads.head import HeadConfig
from featcache.heads.loss import (
    binary_cross_entropy,
    cross_entropy,
    want_classes,
    want_labels,
)
from featcache.heads.optimizer import StackOptimizer
from featcache.heads.stack import HeadStack, SharedRows
from featcache.threads import Threads

CPU = torch.device("cpu")
TILES = (150, 70)
"""Hidden widths of which a layer's gradient is made in three tiles and in two, the last cut.
Of the first, the forward pass is cut in two."""


def make_targets(
    generator: torch.Generator, num_rows: int, has_labels: bool, num_classes: int = 3
) -> torch.Tensor:
    targets = torch.randint(num_classes, (num_rows,), generator=generator)
    if not has_labels:
        return targets
    answers = torch.tensor([0.0, 1.0, torch.nan])
    labels = answers[torch.randint(3, (num_rows, num_classes), generator=generator)]
    labels[0, 0] = 1
    return labels


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("hidden", "num_classes"), [
    ((), 3), ((), 70), ((9,), 3), (TILES, 3), ((6, 5, 4), 3),
])  # fmt: skip
@pytest.mark.parametrize("has_labels", [False, True])
def test_steps_equal_those_of_torch(
    has_labels: bool, hidden: tuple[int, ...], num_classes: int, optimizer: str
) -> None:
    """Two heads unlike in everything that may be; batches of other sizes, down to two rows."""
    kernels = load_kernels()
    assert kernels is not None
    config = HeadConfig(17, num_classes, hidden)
    dropouts, decays, rates = [0.0, 0.5], [0.0, 0.1], [1e-3, 0.1]
    loss = binary_cross_entropy if has_labels else cross_entropy
    stacks = [HeadStack(config, dropouts, [1, 2], CPU, torch.float32, loss) for _ in range(2)]
    optimizers = [StackOptimizer(optimizer, s.params, s.grads, decays) for s in stacks]
    class_weights, smoothing = torch.ones(2, num_classes), [0.1, 0.0]
    class_weights[0, :3] = torch.tensor([1, 2, 0.5])
    compiled = CompiledSteps(kernels, stacks[0], optimizers[0], class_weights, smoothing)
    generator = torch.Generator().manual_seed(3)
    for num_rows in (32, 32, 31, 2, 8):
        # The second is set to the first before each step: what differs is this step's own.
        stacks[1].params.copy_(stacks[0].params)
        for name in ("first", "second"):
            getattr(optimizers[1], name).copy_(getattr(optimizers[0], name))
        rows = torch.randn((num_rows, 17), generator=generator) * 5 + 3
        targets = make_targets(generator, num_rows, has_labels, num_classes)
        # Of some batches the rows count alike.
        weights = torch.rand(num_rows, generator=generator) + 0.5 if num_rows % 2 else None
        ends = np.array([num_rows])
        batch = Batches(ends, rows, targets, weights, compiled.draw_masks(ends))
        (losses,) = compiled.take(batch, [rates], lambda: None)
        want = want_labels if has_labels else want_classes
        wanted = torch.stack(
            [
                want(targets, *of_head, weights)
                for of_head in zip(class_weights, smoothing, strict=True)
            ]
        )
        expected = stacks[1].backward(SharedRows.of(rows), wanted)
        optimizers[1].step(rates)
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stacks[0].stats, stacks[1].stats, rtol=1e-5, atol=1e-5)
        if num_rows == 2:  # two normalised rows are 1 and -1: all gradient is rounding
            continue
        scale = float(stacks[1].grads.abs().max())
        torch.testing.assert_close(
            optimizers[0].first, optimizers[1].first, rtol=1e-4, atol=1e-4 * scale
        )
        torch.testing.assert_close(
            optimizers[0].second, optimizers[1].second, rtol=1e-3, atol=1e-4 * scale**2
        )
        # Adam moves by the sign of a gradient that is zero but for rounding; all others agree.
        apart = (stacks[0].params - stacks[1].params).abs() > 1e-5
        assert apart.float().mean() < 0.02
        assert (stacks[0].params - stacks[1].params).abs().max() < 0.25
    assert [s.num_batches for s in stacks] == [5, 5]


@pytest.mark.parametrize("hidden", [(), (9,)])
def test_batches_at_once_are_taken_one_after_the_other(hidden: tuple[int, ...]) -> None:
    """To the last bit as in a call for each: their rows, targets, weights, masks and rates."""
    kernels, ends = load_kernels(), np.array([32, 64, 91, 93])
    assert kernels is not None
    results = []
    for at_once in (True, False):
        stack = HeadStack(HeadConfig(17, 3, hidden), [0.2, 0.5], [1, 2], CPU, torch.float32)
        optimizer = StackOptimizer("adam", stack.params, stack.grads, [0.0, 0.1])
        steps = CompiledSteps(kernels, stack, optimizer, torch.ones(2, 3), [0.1, 0.0])
        generator = torch.Generator().manual_seed(3)
        rows, weights = torch.randn((93, 17), generator=generator), torch.ones(93)
        weights[::3] = 2
        targets, rates = make_targets(generator, 93, has_labels=False), [[0.1, 0.01], [0.05, 1]] * 2
        if at_once:
            masks = steps.draw_masks(ends)
            losses = steps.take(Batches(ends, rows, targets, weights, masks), rates, lambda: None)
        else:
            losses = torch.cat([
                steps.take(
                    Batches(size, rows[part], targets[part], weights[part], steps.draw_masks(size)),
                    [of_step], lambda: None,
                )
                for start, end, of_step in zip([0, *ends[:-1]], ends, rates, strict=True)
                for part, size in [(slice(start, end), np.array([end - start]))]
            ])  # fmt: skip
        results.append([losses, stack.params, stack.stats, optimizer.first, optimizer.second])
        assert stack.num_batches == 4
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def train_some(
    num_heads: int = 3, width: int = 12, hidden: tuple[int, ...] = (8,), num_rows: int = 90
) -> list[Any]:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(num_rows, width)).astype("f4"), np.arange(num_rows) % 3
    jobs = [
        HeadJob(HeadConfig(width, 3, hidden), TrainingConfig(epochs=3, learning_rate=10.0**-k), k)
        for k in range(1, num_heads + 1)
    ]
    return fit_heads(jobs, x, y, x, y, data_seed=4, device=CPU)


def assert_equal_states(left: list[Any], right: list[Any]) -> None:
    for one, other in zip(left, right, strict=True):
        for name, value in one.state.items():
            assert torch.equal(value, other.state[name]), name


def test_repeats_bit_for_bit_alone_or_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_stack, "WORTH_PARAM_STEPS", 0)
    results = train_some()
    assert_equal_states(results, train_some())
    assert_equal_states(results[:1], train_some(1))
    monkeypatch.setattr(fit, "_PASS_BYTES", 1)  # a thread for each
    assert_equal_states(results, train_some())


@pytest.mark.parametrize("hidden", [(), (8,), (400, 70)])
def test_a_helper_changes_no_bit(monkeypatch: pytest.MonkeyPatch, hidden: tuple[int, ...]) -> None:
    """It also draws rows, into memory that is used again, while others are trained on."""
    monkeypatch.setattr(compiled_stack, "WORTH_PARAM_STEPS", 0)
    monkeypatch.setattr(compiled_stack, "available_cores", lambda: 2)
    results = []
    for worth in (1e18, 0):
        monkeypatch.setattr(compiled_stack, "WORTH_HELPER", worth)
        results.append(train_some(1, 300, hidden, num_rows=900))
    assert_equal_states(*results)


def test_a_helper_that_comes_late_finds_all_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose other core is taken: the leader must not wait for it."""
    monkeypatch.setattr(compiled_stack, "WORTH_PARAM_STEPS", 0)
    alone = train_some(1)
    monkeypatch.setattr(compiled_stack, "WORTH_HELPER", 0)
    monkeypatch.setattr(compiled_stack, "available_cores", lambda: 2)

    class Late:
        """What ``submit`` returns; begins when it is waited for."""

        def __init__(self, function: Any, arguments: tuple[Any, ...]) -> None:
            self.call = functools.partial(function, *arguments)

        def result(self) -> Any:
            return self.call()

    helped = list[str]()

    def submit(_: Threads, function: Any, *arguments: Any) -> Late:
        helped.append(function.__name__)
        return Late(function, arguments)

    monkeypatch.setattr(Threads, "submit", submit)
    assert_equal_states(alone, train_some(1))
    assert helped.count("<lambda>") == helped.count("steps") == 3  # 90 rows at a time


def test_what_fails_while_the_partner_draws_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_stack, "WORTH_PARAM_STEPS", 0)
    monkeypatch.setattr(compiled_stack, "WORTH_HELPER", 0)
    monkeypatch.setattr(compiled_stack, "available_cores", lambda: 2)
    drawing = CompiledSteps.draw_masks

    def draw_masks(steps: CompiledSteps, ends: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            raise OSError("the file is gone")
        return drawing(steps, ends)

    monkeypatch.setattr(CompiledSteps, "draw_masks", draw_masks)
    with pytest.raises(OSError, match="the file is gone"):
        train_some(1, num_rows=600)


def test_without_numba_torch_takes_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train_some()
    monkeypatch.setattr(compiled_stack, "WORTH_PARAM_STEPS", 0)
    compiled = train_some()
    monkeypatch.setitem(sys.modules, "featcache.heads.compiled.head_kernels", None)
    monkeypatch.delattr("featcache.heads.compiled.head_kernels", raising=False)
    assert load_kernels() is None
    assert_equal_states(plain, train_some())
    with pytest.raises(AssertionError):  # another order of summation: it was taken before
        assert_equal_states(plain, compiled)


def test_work_space_begins_with_a_cache_line() -> None:
    for size in range(1, 200, 7):
        space = compiled_stack._aligned(size)
        assert (len(space), space.ctypes.data % 64) == (size, 0)


def test_a_small_training_does_not_load_numba() -> None:
    code = (
        "import sys, numpy as np, torch\n"
        "sys.path.insert(0, 'tests/heads')\n"
        "from test_compiled_stack import train_some\n"
        "train_some(); assert 'numba' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_nothing_is_compiled_once_the_kernels_are_loaded() -> None:
    """A helper of the kernels that is called from Python would be, in each process: 0.4 s."""
    assert load_kernels() is not None  # or the other process would compile them, parts and all
    code = (
        "import sys, numba.core.event\n"
        "sys.path.insert(0, 'tests/heads')\n"
        "from featcache.heads import compiled_stack\n"
        "from test_compiled_stack import train_some\n"
        "compiled_stack.WORTH_PARAM_STEPS = compiled_stack.WORTH_HELPER = 0\n"
        "assert compiled_stack.load_kernels() is not None\n"
        "with numba.core.event.install_recorder('numba:compile') as recorder:\n"
        "    train_some(1), train_some(3)\n"
        "assert not recorder.buffer, recorder.buffer\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_long_compilation_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowFinder:
        """Finds nothing, after a while."""

        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "featcache.heads.compiled.head_kernels":
                assert heard.wait(30)

    heard, lines = threading.Event(), list[str]()

    def say(line: str) -> None:
        lines.append(line)
        heard.set()

    assert load_kernels(say) is not None  # there already
    monkeypatch.setattr(compiled_stack, "_LONG_SECONDS", 0.01)
    monkeypatch.delitem(sys.modules, "featcache.heads.compiled.head_kernels")
    monkeypatch.delattr("featcache.heads.compiled.head_kernels")
    monkeypatch.setattr(sys, "meta_path", [SlowFinder, *sys.meta_path])
    assert load_kernels(say) is not None
    assert lines == ["compiling the training step, once on this machine: about half a minute"]


def test_what_is_worth_it_is_decided_by_size_alone() -> None:
    assert compiled_stack.WORTH_PARAM_STEPS > 1e8
    jobs = [HeadJob(HeadConfig(1280, 2), TrainingConfig(epochs=10, batch_size=32), 0)]
    assert kernels_for(jobs, 3200, CPU, torch.float32) is not None
    assert kernels_for(jobs, 3200, CPU, torch.float64) is None
    assert kernels_for(jobs, 320, CPU, torch.float32) is None
    assert kernels_for([], 3200, CPU, torch.float32) is None
