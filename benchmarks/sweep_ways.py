"""The ways of training K heads that ``sweep.py`` compares: featcache's and its peers'.

Each takes the same jobs and rows and returns what the whole job takes: building K heads, all
epochs, a validation of every head after each. Where that would take too long, part of it is
measured and the rest reckoned at its rate: fewer heads where heads do not touch each other, fewer
steps where they go in step. What was measured is in the result.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import NotHere, import_peer, median, peak_memory
from plain_loops import Curve, Rows, Task, judge, make_rows, train_by_index, warm_up_rows
from torch import Tensor, nn
from torch.nn import functional

from featcache.heads.compiled import kernels
from featcache.heads.config import HeadJob, TrainingConfig
from featcache.heads.fit import fit_heads
from featcache.heads.head import HeadConfig, build_head
from featcache.runtime import Device, available_cores, resolve_device

DATA_SEED = 0
_TRIAL_SECONDS, _TRIAL_STEPS = 0.3, 3  # of each number of threads, at least
_ADAM = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Plan:
    """What is trained, where, and how much of it the slow ways do.

    Attributes:
        task: Rows, batch size and epochs.
        device: Where.
        heads: How many are measured of ways that train heads one by one.
        steps: How many are measured of ways that train all heads in step.
    """

    task: Task
    device: torch.device
    heads: int
    steps: int


Result = dict[str, Any]
"""``seconds`` of the whole job, ``measured_heads``, ``measured_steps`` each, ``num_threads``, and
their ``valid_losses`` in the end."""


def draw_jobs(task: Task, num_heads: int) -> list[HeadJob]:
    """Return the default head, then others of its shape, batch size and optimizer."""
    generator = torch.Generator().manual_seed(0)
    jobs = [task.job(0)]
    for seed in range(1, num_heads):
        rate, dropout, decay = torch.rand(3, generator=generator).tolist()
        training = TrainingConfig(
            learning_rate=10 ** (-4 + 1.5 * rate), weight_decay=10 ** (-6 + 3 * decay),
            batch_size=task.batch_size, epochs=task.epochs,
        )  # fmt: skip
        jobs.append(
            HeadJob(HeadConfig(task.num_features, 2, dropout=0.6 * dropout), training, seed)
        )
    return jobs


def measure_way(name: str, task: Task, num_heads: int, heads: int, steps: int) -> Result:
    """Warm a way up and measure it; runs in a process of its own.

    Args:
        name: Of the way.
        task: What is trained on.
        num_heads: K.
        heads: See ``Plan``.
        steps: See ``Plan``.

    Raises:
        NotHere: If it cannot be measured on this machine.
    """
    warnings.simplefilter("ignore")
    way, device, rows = WAYS[name], resolve_device(task.device).torch(), make_rows(task)
    few, short = warm_up_rows(rows, task)
    way(draw_jobs(short, min(num_heads, 2)), few, Plan(short, device, heads, steps))
    kernels.load("float32")  # the warm-up is too short to: 0.5 s, as torch.optim is loaded
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    result = way(draw_jobs(task, num_heads), rows, Plan(task, device, heads, steps))
    result["peak_bytes"] = peak_memory()
    if device.type == "cuda":
        result["device_peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return result


def compare_losses(task: Task, num_heads: int) -> dict[str, list[float]]:
    """Return the final validation losses of the loop, of it with other seeds, and of featcache."""
    warnings.simplefilter("ignore")
    device, rows = resolve_device(task.device).torch(), make_rows(task)
    jobs, plan = draw_jobs(task, num_heads), Plan(task, device, num_heads, 0)
    others = [dataclasses.replace(job, seed=job.seed + 1_000_000) for job in jobs]
    return {
        "loop": fit_one_by_one(jobs, rows, plan, 1)["valid_losses"],
        "loop, other seeds": fit_one_by_one(others, rows, plan, 1)["valid_losses"],
        FEATCACHE: fit_by_featcache(jobs, rows, plan)["valid_losses"],
    }


# ------------------------------------------------------------------------------- heads one by one


def fit_by_featcache(jobs: Sequence[HeadJob], rows: Rows, plan: Plan) -> Result:
    """Fit all heads by ``fit_heads``, to the end."""
    start = time.perf_counter()
    results = fit_heads(jobs, *rows.arrays, data_seed=DATA_SEED, device=Device(plan.device.type))
    seconds = time.perf_counter() - start
    losses = [r.history[-1]["valid_loss"] if r.history else None for r in results]
    return {
        "seconds": seconds, "measured_heads": len(jobs), "num_threads": None,
        "measured_steps": plan.task.num_steps * plan.task.epochs, "valid_losses": losses,
    }  # fmt: skip


def fit_one_by_one(jobs: Sequence[HeadJob], rows: Rows, plan: Plan, num_threads: int) -> Result:
    """Fit the first heads by the tensor-indexed loop with fused Adam, one after another."""
    torch.set_num_threads(num_threads)
    some, losses = jobs[: plan.heads], list[float]()
    start = time.perf_counter()
    for job in some:
        curve = Curve()
        train_by_index(job, rows, plan.device, DATA_SEED, curve)
        losses.append(curve.points[-1]["valid_loss"])
    seconds = (time.perf_counter() - start) * len(jobs) / len(some)
    return {
        "seconds": seconds, "measured_heads": len(some), "num_threads": num_threads,
        "measured_steps": plan.task.num_steps * plan.task.epochs, "valid_losses": losses,
    }  # fmt: skip


def fit_by_processes(jobs: Sequence[HeadJob], rows: Rows, plan: Plan) -> Result:
    """Fit heads by the same loop in joblib's processes, one a core, of one thread each.

    Starting them and their imports is not counted. At least four heads a process are measured.
    """
    joblib, cores = import_peer("joblib"), available_cores()
    some = jobs[: max(plan.heads, 4 * cores)]
    few, short = warm_up_rows(rows, plan.task)
    with joblib.Parallel(n_jobs=cores, backend="loky") as parallel:
        fit = joblib.delayed(_fit_alone)
        parallel(fit(job, few, plan.device) for job in draw_jobs(short, 2 * cores))
        start = time.perf_counter()
        found = parallel(fit(job, rows, plan.device) for job in some)
        seconds = (time.perf_counter() - start) * len(jobs) / len(some)
    joblib.externals.loky.get_reusable_executor(reuse=True).shutdown()  # or we would not end
    peaks = {process: peak for _, process, peak in found}  # the last of each is its highest
    return {
        "seconds": seconds, "measured_heads": len(some), "num_threads": 1,
        "num_processes": cores, "measured_steps": plan.task.num_steps * plan.task.epochs,
        "valid_losses": [loss for loss, _, _ in found],
        "processes_peak_bytes": None if None in peaks.values() else sum(peaks.values()),
    }  # fmt: skip


def _fit_alone(job: HeadJob, rows: Rows, device: torch.device) -> tuple[float, int, int | None]:
    warnings.simplefilter("ignore")  # joblib maps arrays read-only, which torch remarks upon
    torch.set_num_threads(1)
    curve = Curve()
    train_by_index(job, rows, device, DATA_SEED, curve)
    return curve.points[-1]["valid_loss"], os.getpid(), peak_memory()


# ---------------------------------------------------------------------------------- heads in step


def fit_by_summed_losses(jobs: Sequence[HeadJob], rows: Rows, plan: Plan) -> Result:
    """Fit as DINOv2's linear evaluation does: a ModuleDict, a loop over it, one sum of losses.

    One optimizer with a group of parameters per head; here it is fused Adam.
    """
    device = plan.device
    _check_memory(jobs, device, bytes_per_param=16)
    start = time.perf_counter()
    features, targets, valid_features, valid_targets = rows.tensors(device)
    heads = nn.ModuleDict()
    for number, job in enumerate(jobs):
        torch.manual_seed(job.seed)
        heads[str(number)] = build_head(job.head)
    heads.to(device).train()
    groups = [
        {"params": list(head.parameters()), "lr": job.training.learning_rate,
         "weight_decay": job.training.weight_decay}
        for head, job in zip(heads.values(), jobs, strict=True)
    ]  # fmt: skip
    optimizer = torch.optim.Adam(groups, fused=True)

    def step(batch: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        inputs, wanted = features[batch], targets[batch]
        losses = [functional.cross_entropy(head(inputs), wanted) for head in heads.values()]
        torch.stack(losses).sum().backward()
        optimizer.step()

    def validate() -> list[float]:
        losses = [judge(head, valid_features, valid_targets)[0] for head in heads.values()]
        heads.train()
        return losses

    return _run_in_step(step, validate, len(jobs), plan, start)


class _PlainHead(nn.Module):
    """The default head without batch norm, whose running statistics ``vmap`` cannot keep."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        widths = [config.num_features, *config.hidden, config.num_classes]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))

    def forward(self, values: Tensor, dropout: Tensor | None) -> Tensor:
        for layer in self.layers[:-1]:
            values = layer(values).relu()
        if dropout is not None:
            values = values * ((torch.rand_like(values) >= dropout) / (1 - dropout))
        logits: Tensor = self.layers[-1](values)
        return logits


def fit_by_vmap(jobs: Sequence[HeadJob], rows: Rows, plan: Plan) -> Result:
    """Fit by ``torch.func.stack_module_state`` and ``vmap``, on heads without batch norm.

    Adam is written out in place on the stacked parameters: torch's has one learning rate a tensor.
    """
    from torch.func import functional_call, grad, stack_module_state, vmap

    device = plan.device
    _check_memory(jobs, device, bytes_per_param=24)
    start = time.perf_counter()
    features, targets, valid_features, valid_targets = rows.tensors(device)
    heads = []
    for job in jobs:
        torch.manual_seed(job.seed)
        heads.append(_PlainHead(job.head))
    head = copy.deepcopy(heads[0]).to("meta")
    params, _ = stack_module_state(heads)
    del heads
    params = {name: value.detach().to(device) for name, value in params.items()}
    adam = _StackedAdam(params, jobs)
    dropouts = torch.tensor([job.head.dropout for job in jobs], device=device)

    def loss_of(
        params: dict[str, Tensor], dropout: Tensor, inputs: Tensor, wanted: Tensor
    ) -> Tensor:
        return functional.cross_entropy(functional_call(head, params, (inputs, dropout)), wanted)

    gradient = vmap(grad(loss_of), in_dims=(0, 0, None, None), randomness="different")
    evaluate = vmap(lambda params, inputs: functional_call(head, params, (inputs, None)), (0, None))

    def step(batch: Tensor) -> None:
        adam.step(gradient(params, dropouts, features[batch], targets[batch]))

    def validate() -> list[float]:
        losses: list[float] = []
        with torch.no_grad():
            for first in range(0, len(jobs), 8):  # (8, M, 512) at a time
                part = {name: value[first : first + 8] for name, value in params.items()}
                logits = evaluate(part, valid_features)
                wanted = valid_targets.expand(len(logits), -1)
                of_rows = functional.cross_entropy(logits.mT, wanted, reduction="none")
                losses += of_rows.mean(1).tolist()
                (logits.argmax(2) == wanted).float().mean(1).tolist()
        return losses

    return _run_in_step(step, validate, len(jobs), plan, start)


class _StackedAdam:
    """Adam on stacked parameters (K, ...), with a learning rate and a weight decay per head."""

    def __init__(self, params: dict[str, Tensor], jobs: Sequence[HeadJob]) -> None:
        self._params, self._steps = params, 0
        self._first = {name: torch.zeros_like(value) for name, value in params.items()}
        self._second = {name: torch.zeros_like(value) for name, value in params.items()}
        like = next(iter(params.values()))
        self._rates = like.new_tensor([job.training.learning_rate for job in jobs])
        self._decays = like.new_tensor([job.training.weight_decay for job in jobs])

    def step(self, grads: dict[str, Tensor]) -> None:
        self._steps += 1
        beta1, beta2, eps = _ADAM
        root = math.sqrt(1 - beta2**self._steps)
        for name, param in self._params.items():
            shape = (-1, *[1] * (param.ndim - 1))
            grad, first, second = grads[name], self._first[name], self._second[name]
            grad = grad.addcmul_(param, self._decays.view(shape))
            first.lerp_(grad, 1 - beta1)
            second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            change = second.sqrt().div_(root).add_(eps).reciprocal_().mul_(first)
            param.addcmul_(change, self._rates.view(shape), value=-1 / (1 - beta1**self._steps))


def _run_in_step(
    step: Callable[[Tensor], None], validate: Callable[[], list[float]], num_heads: int, plan: Plan,
    start: float,
) -> Result:  # fmt: skip
    """Run the steps that are allowed, at the better number of threads; reckon the whole job.

    Args:
        step: Trains all heads on the rows of a batch.
        validate: Returns all heads' validation losses.
        num_heads: K.
        plan: What is trained on, where, and for how many steps.
        start: When building began.
    """
    task, device = plan.task, plan.device

    def finish() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    order = torch.Generator().manual_seed(DATA_SEED)

    def draw() -> tuple[Tensor, ...]:
        rows = torch.randperm(task.num_rows, generator=order).to(device)
        return rows.split(task.batch_size)

    batches = draw()
    step(batches[0])  # allocates gradients and moments
    built = finish() - start
    num_threads = None
    if device.type == "cpu":
        num_threads = _choose_threads(lambda: step(batches[0]), finish)
    total, steps, step_seconds, checks = task.num_steps * task.epochs, 0, 0.0, list[float]()
    allowed, losses = min(total, plan.steps), list[float]()
    while steps < allowed:
        begin = finish()
        for batch in draw()[: allowed - steps]:
            step(batch)
            steps += 1
        trained = finish()
        step_seconds += trained - begin
        losses = validate()
        checks.append(finish() - trained)
    seconds = built + step_seconds * (total - 1) / steps + median(checks) * task.epochs
    return {
        "seconds": seconds, "measured_heads": num_heads, "measured_steps": steps,
        "num_threads": num_threads, "valid_losses": losses,
    }  # fmt: skip


def _choose_threads(run: Callable[[], None], finish: Callable[[], float]) -> int:
    """Set the number of threads, one or one a core, that takes a step in less time."""
    rates = {}
    for number in sorted({1, available_cores()}):
        torch.set_num_threads(number)
        run()
        begin, count = finish(), 0
        while count < _TRIAL_STEPS or finish() - begin < _TRIAL_SECONDS:
            run()
            count += 1
        rates[number] = count / (finish() - begin)
    best = max(rates, key=lambda number: rates[number])
    torch.set_num_threads(best)
    return best


def count_params(job: HeadJob) -> int:
    """Return the number of trained numbers of a head."""
    with torch.device("meta"):
        return sum(param.numel() for param in build_head(job.head).parameters())


def _check_memory(jobs: Sequence[HeadJob], device: torch.device, bytes_per_param: int) -> None:
    """Raise NotHere if a stack would take more than nine tenths of what memory is free."""
    needed, free = len(jobs) * count_params(jobs[0]) * bytes_per_param, None
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    elif (facts := Path("/proc/meminfo")).exists():
        lines = facts.read_text(encoding="ascii").splitlines()
        kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable"))
        free = 1024 * int(kib)
    if free is not None and needed > 0.9 * free:
        raise NotHere(f"needs {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} are free")


def _one_by_one(num_threads: int) -> Callable[..., Result]:
    return lambda *arguments: fit_one_by_one(*arguments, num_threads)


FEATCACHE = "featcache"
IN_TURN = "one after another"
WAYS: dict[str, Callable[..., Result]] = {
    FEATCACHE: fit_by_featcache,
    **{f"{IN_TURN}, threads {n}": _one_by_one(n) for n in sorted({1, available_cores()})},
    "summed losses (DINOv2)": fit_by_summed_losses,
    "joblib processes": fit_by_processes,
    "vmap, no batch norm": fit_by_vmap,
}
