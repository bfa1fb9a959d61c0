"""How many head-steps a second a machine allows: its matrix products and its memory, measured.

A step of a head needs the matrix products of its layers, and the optimizer reads parameters,
gradients and two moments and writes all but the gradients: 28 bytes a parameter in fp32. Nothing of
it is optional; everything else (normalising, dropout, the loss, Python) could in principle be
hidden. So a head-step takes at least

    products at the real shapes + 28 bytes * parameters / bandwidth

with the bandwidth of buffers as large as one head's parameters and moments, which stay in the
processor's cache (the bound of a stack cut to fit it), or of buffers that do not (the bound of one
that is not). Both rates are measured in as many threads as train heads at a time, side by side.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plain_loops import Task
from torch import Tensor

from featcache.runtime import available_cores, exact_fp32, resolve_device

ADAM_BYTES = 28
_STATE_BYTES = 12  # parameters and two moments
_LARGE = {"cpu": 1 << 28, "cuda": 1 << 31}
_CACHE_SIZE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
_HEADS_AT_ONCE = {"cpu": (1, 8), "cuda": (1, 64)}


def measure_bound(
    task: Task, widths: tuple[int, ...], num_params: int, num_heads: int, seconds: float
) -> dict[str, Any]:
    """Measure the machine; runs in a process of its own.

    Args:
        task: Its batch size, number of features and device.
        widths: Of the layers, the features first, the classes last.
        num_params: Of a head.
        num_heads: K, which decides how many threads can work.
        seconds: Of each measurement.
    """
    device = resolve_device(task.device).torch()
    # One head too is trained by two threads.
    num_threads = min(max(2, num_heads), available_cores()) if device.type == "cpu" else 1
    products = {}
    with exact_fp32():
        for at_once in _HEADS_AT_ONCE[device.type]:
            if at_once <= num_heads:
                prepare = functools.partial(_products, task, widths, at_once, device)
                rate = at_once * _rate(prepare, num_threads, seconds, device)
                products[f"{at_once} at once"] = rate
        state = num_params * _STATE_BYTES
        bandwidths = {
            "one head": _bandwidth(state, num_threads, seconds, device),
            "memory": _bandwidth(_large(device) // num_threads, num_threads, seconds, device),
        }
    product_seconds, num_bytes = 1 / max(products.values()), num_params * ADAM_BYTES
    bounds = {
        name: 1 / (product_seconds + num_bytes / max(kinds.values()))
        for name, kinds in bandwidths.items()
    }
    flops = 2 * task.batch_size * sum(
        wide * narrow * (2 if place == 0 else 3)  # the first layer's input needs no gradient
        for place, (wide, narrow) in enumerate(itertools.pairwise(widths))
    )  # fmt: skip
    return {
        "num_threads": num_threads,
        "products_per_second": products,
        "product_seconds": product_seconds,
        "flops_per_second": flops / product_seconds,
        "adam_bytes": num_bytes,
        "bytes_per_second": bandwidths,
        "head_steps_per_second": bounds,
    }


def summarise_bounds(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the best of all rounds, for that is what the machine can do, and the samples."""
    return {
        "num_threads": samples[0]["num_threads"],
        "adam_bytes": samples[0]["adam_bytes"],
        "product_seconds": min(s["product_seconds"] for s in samples),
        "flops_per_second": max(s["flops_per_second"] for s in samples),
        "bytes_per_second": {
            name: max(max(s["bytes_per_second"][name].values()) for s in samples)
            for name in samples[0]["bytes_per_second"]
        },
        "head_steps_per_second": {
            name: max(s["head_steps_per_second"][name] for s in samples)
            for name in samples[0]["head_steps_per_second"]
        },
        "samples": samples,
    }


def _products(
    task: Task, widths: tuple[int, ...], num_heads: int, device: torch.device
) -> Callable[[], object]:
    """Return the products of a step of some heads: forward, and the gradients that are needed."""

    def empty(*shape: int) -> Tensor:
        return torch.full((num_heads, *shape), 0.5, device=device)

    rows = task.batch_size
    values = [empty(rows, width) for width in widths]
    weights = [empty(b, a) for a, b in itertools.pairwise(widths)]
    grads = [torch.empty_like(weight) for weight in weights]
    outs = [torch.empty_like(value) for value in values]

    def run() -> None:
        for place, weight in enumerate(weights):
            torch.bmm(values[place], weight.mT, out=outs[place + 1])
            torch.bmm(values[place + 1].mT, values[place], out=grads[place])
            if place:
                torch.bmm(values[place + 1], weight, out=outs[place])

    return run


def _bandwidth(
    num_bytes: int, num_threads: int, seconds: float, device: torch.device
) -> dict[str, float]:
    """Return bytes a second of two kernels on two buffers of so many bytes together, per thread.

    A plain copy, and an addition in place, which reads two and writes one as an optimizer does. The
    faster counts: where writing must first read what it overwrites, a copy falls behind.
    """
    count = num_bytes // 8  # two buffers of fp32

    def buffers() -> tuple[Tensor, Tensor]:
        return torch.zeros(count, device=device), torch.zeros(count, device=device)

    def copy() -> Callable[[], object]:
        first, second = buffers()
        return lambda: first.copy_(second)

    def add() -> Callable[[], object]:
        first, second = buffers()
        return lambda: first.add_(second)

    return {
        "copy": 8 * count * _rate(copy, num_threads, seconds, device),
        "add in place": 12 * count * _rate(add, num_threads, seconds, device),
    }


def _large(device: torch.device) -> int:
    """Return a number of bytes that does not stay in a cache."""
    cache = 0
    if device.type == "cpu" and _CACHE_SIZE.exists():
        cache = 1024 * int(_CACHE_SIZE.read_text(encoding="ascii").strip().rstrip("K"))
    return max(_LARGE[device.type], 8 * cache)


def _rate(
    prepare: Callable[[], Callable[[], object]], num_threads: int, seconds: float,
    device: torch.device,
) -> float:  # fmt: skip
    """Return calls a second of what ``prepare`` makes, all threads together, each with its own."""
    ready, rates = threading.Barrier(num_threads), list[float]()

    def work() -> None:
        torch.set_num_threads(1)
        run = prepare()
        run()
        calls_at_once = 1 if device.type == "cpu" else 20  # between two waits
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ready.wait()
        start, count = time.perf_counter(), 0
        while (spent := time.perf_counter() - start) < seconds or not count:
            for _ in range(calls_at_once):
                run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            count += calls_at_once
        rates.append(count / spent)

    threads = [threading.Thread(target=work) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(rates)
