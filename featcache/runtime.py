"""Facts of the machine and choices made once: device, exact arithmetic, memory, clocks.

Imports torch only where a GPU may be, or where torch is about to compute.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.errors import ConfigError

if TYPE_CHECKING:
    import torch

Say = Callable[[str], None]
"""Where a stage tells people what it does: one line of text a call."""

_REPORTED_PACKAGES = (
    "featcache", "torch", "torchvision", "efficientnet_pytorch", "numpy", "h5py", "pillow",
    "onnxruntime", "scikit-learn",
)  # fmt: skip


def silent(line: str) -> None:
    """Say nothing: the default of every ``say`` argument."""


@dataclass(frozen=True)
class Device:
    """A device to compute on, named as torch names it, without importing torch.

    Attributes:
        type: ``cpu``, ``cuda`` or ``mps``.
        index: Number of the GPU, None for the default one.
    """

    type: str
    index: int | None = None

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"

    def torch(self) -> torch.device:
        """Return it as torch's own type."""
        import torch

        return torch.device(str(self))


CPU = Device("cpu")

_GPU_FILES = ("nvidiactl", "nvidia0", "kfd", "dxg")  # of /dev: NVIDIA, AMD, Windows' WSL


def resolve_device(name: str = "auto") -> Device:
    """Return the device of ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.

    ``auto`` is CUDA, then MPS, then the CPU, whichever is there first. torch is asked only where
    the operating system shows a GPU: importing it takes seconds.

    Raises:
        ConfigError: If the name is unknown or the device is not there.
    """
    if name == "cpu" or (name == "auto" and not _may_have_gpu()):
        return CPU
    import torch

    available = [CPU]
    if torch.backends.mps.is_available():
        available.insert(0, Device("mps"))
    if torch.cuda.is_available():
        gpus = [Device("cuda", i) for i in range(torch.cuda.device_count())]
        available[:0] = [Device("cuda"), *gpus]
    found = available[0] if name == "auto" else next((d for d in available if str(d) == name), None)
    if found is None:
        raise ConfigError(
            "--device", expected="one of auto, " + ", ".join(map(str, available)), found=name,
            hint="Leave --device out to take the fastest device there is",
        )  # fmt: skip
    return found


def _may_have_gpu() -> bool:
    """Return whether the operating system shows a GPU that torch could use."""
    system = platform.system()
    if system == "Darwin":
        return platform.machine() == "arm64"
    return system != "Linux" or any(Path("/dev", name).exists() for name in _GPU_FILES)


class _Arithmetic:
    """Owns torch's fp32 precision settings, which are one set for all threads of the process.

    The first block that is entered saves the caller's settings, the last one left restores them;
    in between the block entered last rules. So blocks may nest, and threads may share a mode.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._modes: list[bool] = []
        self._callers: list[str] = []
        import torch

        backends: Any = torch.backends
        self._gpu = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        self._cpu = [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]

    def enter(self, *, tf32: bool) -> None:
        with self._lock:
            if not self._modes:
                # By the names of torch 2.9: the older allow_tf32 raises when the caller used the
                # newer ones.
                self._callers = [setting.fp32_precision for setting in self._gpu + self._cpu]
            self._modes.append(tf32)
            self._apply()

    def leave(self, *, tf32: bool) -> None:
        with self._lock:
            del self._modes[len(self._modes) - 1 - self._modes[::-1].index(tf32)]
            self._apply()

    def _apply(self) -> None:
        if self._modes:
            values = ["tf32" if self._modes[-1] else "ieee"] * len(self._gpu)
            values += ["ieee"] * len(self._cpu)
        else:
            values = self._callers
        for setting, value in zip(self._gpu + self._cpu, values, strict=True):
            setting.fp32_precision = value


_arithmetic = functools.cache(_Arithmetic)


@contextlib.contextmanager
def exact_fp32(*, tf32: bool = False) -> Iterator[None]:
    """Run with IEEE fp32 arithmetic (or TF32 where asked), then restore the caller's settings.

    Convolutions use TF32 by default on CUDA, so "fp32" means nothing without this. Blocks may nest,
    and several threads may be inside at once if they ask for the same arithmetic.
    """
    import torch

    _arithmetic().enter(tf32=tf32)
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        _arithmetic().leave(tf32=tf32)


def environment_facts(device: Device | torch.device | None = None) -> dict[str, Any]:
    """Return what a reader needs to place a result: versions, processor, device, date."""
    from importlib import metadata  # slow: it parses e-mail

    torch = sys.modules.get("torch")
    versions = {}
    for name in _REPORTED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "num_cores": available_cores(),
        "num_threads": available_cores() if torch is None else torch.get_num_threads(),
        "versions": versions,
    }
    if device is not None:
        facts["device"] = device_name(device)
    return facts


def available_cores() -> int:
    """Return how many processor cores this process may use, a container's share included."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no control groups, or no limit ("max")
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def available_memory(device: Device | torch.device = CPU) -> float:
    """Return how many bytes this process may still take on a device.

    On a CPU the least of what the system has, the control groups allow (file pages that can be
    dropped are not counted as used) and ``ulimit -v`` and ``ulimit -d`` leave; infinity where the
    system does not tell (it is read from Linux's ``/proc``).
    """
    if device.type == "cuda":
        import torch

        place = torch.device(str(device))
        cached = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
        return torch.cuda.mem_get_info(place)[0] + cached
    limits = [*_limits_of_process(), *_limits_of_groups()]
    facts = _read_counts(Path("/proc/meminfo"))
    if "MemAvailable" in facts:
        limits.append(facts["MemAvailable"] << 10)
    return max(0, min(limits, default=math.inf))


def _limits_of_process() -> Iterator[int]:
    facts = _read_counts(Path("/proc/self/status"))
    if "VmSize" in facts:
        import resource  # not on Windows

        for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
            allowed = resource.getrlimit(limit)[0]
            if allowed != resource.RLIM_INFINITY:
                yield allowed - (facts[used] << 10)


def _limits_of_groups(root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Yield what each control group that this process is in has left, of version 2 and 1."""
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
        folder = top / path.strip("/")  # in a container not there, but the top is its own
        for place in (folder, *folder.parents[: len(folder.parts) - len(top.parts)]):
            with contextlib.suppress(OSError, ValueError):  # none, or no limit ("max")
                allowed, used = (int((place / name).read_text(encoding="ascii")) for name in names)
                facts = _read_counts(place / "memory.stat")
                kinds = ("inactive_file", "active_file")
                yield allowed - used + sum(facts.get(f"total_{k}", facts.get(k, 0)) for k in kinds)


def _read_counts(path: Path) -> dict[str, int]:
    """Return the numbers of a file of names and numbers; none where there is no such file."""
    with contextlib.suppress(OSError):
        lines = map(str.split, path.read_text(encoding="utf-8", errors="replace").splitlines())
        return {w[0].rstrip(":"): int(w[1]) for w in lines if len(w) > 1 and w[1].isdecimal()}
    return {}


class Interrupted(KeyboardInterrupt):
    """The user or the system asked us to end, and what was in hand has been finished.

    Attributes:
        signal_number: Of the signal that asked.
    """

    def __init__(self, signal_number: int, message: str = "") -> None:
        super().__init__(message)
        self.signal_number = signal_number


@contextlib.contextmanager
def held_signals() -> Iterator[Callable[[], None]]:
    """Hold SIGINT and SIGTERM back inside, until the function that is given is called.

    It raises ``Interrupted`` if one has come. A second one acts at once, as if not held. Where
    handlers cannot be set (any thread but the main one) nothing is held.
    """
    came: list[int] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def hold(number: int, frame: object) -> None:
        if came:
            restore()
            signal.raise_signal(number)
        came.append(number)

    def check() -> None:
        if came:
            raise Interrupted(came[0])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in {signal.SIG_IGN, None}:  # None: not Python's
                before[number] = signal.signal(number, hold)
    try:
        yield check
    finally:
        restore()
    check()  # one that came in the last moment


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, on any device: only CUDA's allocator has a type for it."""
    torch = sys.modules.get("torch")
    kinds = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    if isinstance(error, kinds):
        return True
    words = (
        "out of memory", "alloc_failed", "can't allocate memory", "bad allocation",
        "can't start new thread", "could not create a primitive",  # under ulimit -v
    )  # fmt: skip
    return isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words)


def processor_name() -> str:
    """Return the processor's name as the system gives it."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: Device | torch.device) -> str:
    """Return ``cpu``, ``mps`` or the name of the CUDA device."""
    if device.type != "cuda":
        return device.type
    import torch

    return torch.cuda.get_device_name(torch.device(str(device)))


class Timer:
    """Adds up wall seconds by name: ``with timer("forward"): ...``; then ``timer.seconds``.

    Threads may share one; what they do at the same time counts for each of them.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            with self._lock:
                self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
