"""Memory: how much this process may still take, and whether an error means that it ran out.

Imports torch only where a GPU is asked about.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from featcache.runtime import CPU, Device

if TYPE_CHECKING:
    import torch


def available_memory(device: Device | torch.device = CPU) -> float:
    """Return how many bytes this process may still allocate on a device.

    On a CPU this is the smallest of: the system's available memory, what the control groups allow
    (file pages that can be dropped count as free), and what ``ulimit -v`` and ``ulimit -d`` leave.
    It is read from Linux's ``/proc``; infinity on other systems.
    """
    if device.type == "cuda":
        import torch

        place = torch.device(str(device))
        cached = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
        return torch.cuda.mem_get_info(place)[0] + cached
    limits = [*_process_limits(), *_limits_of_groups()]
    facts = _read_counts(Path("/proc/meminfo"))
    if "MemAvailable" in facts:
        limits.append(facts["MemAvailable"] << 10)
    return max(0, min(limits, default=math.inf))


PRODUCT_BYTES = 40 << 20
"""Memory that each thread takes for NumPy's matrix products: 32 MiB of buffers of OpenBLAS.

OpenBLAS ends the whole process where it cannot get them (0.3.31, under ulimit -v: 32 MB were too
few, 40 enough)."""


@functools.cache
def require_memory_for_products() -> None:
    """Refuse to begin where NumPy's matrix products could not get their buffers.

    Looks until it is content once: the process keeps the buffers of its first product.

    Raises:
        MemoryError: If the process may not take that much.
    """
    room = available_memory()
    if room < PRODUCT_BYTES:
        raise MemoryError(f"room for {room / 1e6:.0f} MB")


def _process_limits() -> Iterator[int]:
    facts = _read_counts(Path("/proc/self/status"))
    if "VmSize" in facts:
        import resource  # not on Windows

        for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
            allowed = resource.getrlimit(limit)[0]
            if allowed != resource.RLIM_INFINITY:
                yield allowed - (facts[used] << 10)


def _limits_of_groups(root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Yield the bytes left in each control group (version 2 or 1) of this process."""
    groups = []
    with contextlib.suppress(OSError):
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    for group in groups:
        _, controllers, path = group.split(":", 2)
        top, names = root, ("memory.max", "memory.current")
        if "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        elif controllers:
            continue
        folder = top / path.strip("/")  # missing in a container, whose own group is the top
        for place in (folder, *folder.parents[: len(folder.parts) - len(top.parts)]):
            with contextlib.suppress(OSError, ValueError):  # none, or no limit ("max")
                allowed, used = (int((place / name).read_text(encoding="ascii")) for name in names)
                facts = _read_counts(place / "memory.stat")
                kinds = ("inactive_file", "active_file")
                yield allowed - used + sum(facts.get(f"total_{k}", facts.get(k, 0)) for k in kinds)


def _read_counts(path: Path) -> dict[str, int]:
    """Return name -> number of a file of such lines; empty if there is no such file."""
    with contextlib.suppress(OSError):
        lines = map(str.split, path.read_text(encoding="utf-8", errors="replace").splitlines())
        return {w[0].rstrip(":"): int(w[1]) for w in lines if len(w) > 1 and w[1].isdecimal()}
    return {}


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on any device.

    Only CUDA's allocator raises a type of its own; others are recognised by their message.
    """
    torch = sys.modules.get("torch")
    kinds = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    if isinstance(error, kinds):
        return True
    words = (
        "out of memory", "alloc_failed", "can't allocate memory", "bad allocation",
        "can't start new thread", "could not create a primitive",  # under ulimit -v
    )  # fmt: skip
    return isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words)
