"""Plan which heads are trained together, in one pass, and how many passes are run at once.

Reads and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from featcache.heads.batches import TrainingData, rows_at_once
from featcache.heads.config import LBFGS, HeadJob
from featcache.heads.head import count_values
from featcache.heads.scaling import ColumnScaling
from featcache.memory import PRODUCT_BYTES, available_memory
from featcache.runtime import Device, Say

_ROWS_AT_ONCE = 512  # go through a head that is used: 3 MB of 1280 features
_MEMORY_SHARE = 0.75  # of what is left
_PASS_BYTES, _HEADS_PER_PASS = 12 << 20, 64  # of one thread: its share of a last-level cache
_STACK_ROWS = 8192  # that go through a stack at once when it is evaluated


def plan_passes(
    jobs: Sequence[HeadJob], scalings: Sequence[ColumnScaling | None], data: TrainingData,
    device: Device, *, num_cores: int, say: Say,
) -> tuple[list[list[int]], int]:  # fmt: skip
    """Return the passes, each the numbers of the jobs it trains, and how many to run at once.

    Args:
        jobs: The heads.
        scalings: Of each job, None where features are as they are; a pass has one kind.
        data: The rows.
        device: Where the heads are trained.
        num_cores: That this process may use.
        say: Receives a line when memory limits how many heads are trained at once.
    """
    passes = _group_jobs(jobs, scalings, data, device, num_cores)
    return _cut_to_memory(passes, jobs, data, device, num_cores=num_cores, say=say)


def _group_jobs(
    jobs: Sequence[HeadJob], scalings: Sequence[ColumnScaling | None], data: TrainingData,
    device: Device, num_cores: int,
) -> list[list[int]]:  # fmt: skip
    """Return the passes that there would be with enough memory.

    On a CPU jobs of a pass share batches, and their parameters and moments stay in the cache;
    elsewhere they also share every operation.
    """
    on_cpu = device.type == "cpu"
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, job in enumerate(jobs):
        training = job.training
        key: tuple[Any, ...] = (
            training.optimizer == LBFGS, scalings[number] is None,
            training.rows_per_step(len(data.targets)), training.epochs,
        )  # fmt: skip
        if not on_cpu:
            key += job.head.hidden, training.optimizer
        groups.setdefault(key, []).append(number)
    passes = list[list[int]]()
    for group in groups.values():
        size = len(group)
        if on_cpu:
            head_bytes = 4 * data.dtype.itemsize * max(count_values(jobs[n].head) for n in group)
            share = math.ceil(size / num_cores)
            size = max(1, min(_HEADS_PER_PASS, _PASS_BYTES // head_bytes, share))
        passes += [group[i : i + size] for i in range(0, len(group), size)]
    return passes


def _cut_to_memory(
    passes: list[list[int]], jobs: Sequence[HeadJob], data: TrainingData, device: Device,
    *, num_cores: int, say: Say,
) -> tuple[list[list[int]], int]:  # fmt: skip
    """Return passes that memory has room for, and how many to run at once."""
    memory = _MEMORY_SHARE * available_memory(device)
    cut, largest = list[list[int]](), 1
    for part in passes:
        counts = [_count_bytes(jobs[number], data, device) for number in part]
        head_bytes, pass_bytes = (max(column) for column in zip(*counts, strict=True))
        size = max(1, int(min((memory - pass_bytes) / head_bytes, len(part))))
        cut += [part[i : i + size] for i in range(0, len(part), size)]
        largest = max(largest, size * head_bytes + pass_bytes)
    wanted = num_cores if device.type == "cpu" else 1
    num_threads = max(1, int(min(wanted, memory / largest)))
    if len(cut) > len(passes) or num_threads < min(wanted, len(passes)):
        at_once = min(len(jobs), num_threads * max(map(len, cut)))
        say(
            f"heads: {len(jobs):,}, memory for them: {memory / 1e9:,.3g} GB; training "
            f"{at_once:,} at a time"
        )
    return cut, min(num_threads, len(cut))


def _count_bytes(job: HeadJob, data: TrainingData, device: Device) -> tuple[int, int]:
    """Return about what a head takes while it is trained, and what a pass takes besides."""
    num_values = count_values(job.head)
    widths = job.head.num_features + sum(job.head.hidden) + job.head.num_classes
    batch = job.training.rows_per_step(len(data.targets))
    # Parameters, gradients, two moments, copies of them; of each layer, for batches of two sizes,
    # what the backward pass needs; logits of the validation rows.
    head_values = 8 * num_values + 8 * batch * (widths + job.head.num_features)
    head_values += 3 * data.num_valid * job.head.num_classes
    forward_rows = _ROWS_AT_ONCE if device.type == "cpu" else _STACK_ROWS
    pass_values = 3 * min(forward_rows, max(data.num_valid, batch)) * widths
    pass_values += 3 * rows_at_once(batch) * job.head.num_features  # drawn; joined of blocks
    pass_bytes = pass_values * data.dtype.itemsize
    if device.type == "cpu":
        pass_bytes += PRODUCT_BYTES
    return head_values * data.dtype.itemsize, pass_bytes
