"""The machine: device, exact fp32 arithmetic, cores, signals and timers.

Imports torch only where a GPU may be, or where torch is about to compute.
"""

from __future__ import annotations

import contextlib
import functools
import logging
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
"""Called with one line of text to tell the user what is happening."""

_REPORTED_PACKAGES = (
    "featcache", "torch", "torchvision", "efficientnet_pytorch", "numpy", "h5py", "pillow",
    "onnxruntime", "scikit-learn",
)  # fmt: skip


def log_line(line: str) -> None:
    """Log a line at level INFO to the logger ``featcache``: the default of every ``say``."""
    logging.getLogger("featcache").info(line)


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

    ``auto`` is the first available of CUDA, MPS and CPU. torch is imported only if the operating
    system shows a GPU, since importing it takes seconds.

    Raises:
        ConfigError: If the name is unknown or the device is not available.
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
            hint="Leave --device out to use the fastest device available",
        )  # fmt: skip
    return found


def _may_have_gpu() -> bool:
    """Return whether the operating system shows a GPU that torch could use."""
    system = platform.system()
    if system == "Darwin":
        return platform.machine() == "arm64"
    return system != "Linux" or any(Path("/dev", name).exists() for name in _GPU_FILES)


class _Arithmetic:
    """Changes and restores torch's fp32 precision settings, which all threads share.

    The first block entered saves the caller's settings and the last one left restores them. In
    between, the block entered last decides. So blocks may nest, and threads may share a mode.

    In a child forked from a process that has one, torch computes with one thread: OpenMP would wait
    for ever for the others, which the child does not have.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._modes: list[bool] = []
        self._callers: list[str] = []
        import torch

        backends: Any = torch.backends
        self._gpu = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        self._cpu = [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._begin_child)

    def _begin_child(self) -> None:
        import torch

        torch.set_num_threads(1)
        self._lock = threading.Lock()  # another thread of the parent may have held it

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

    On CUDA, convolutions use TF32 by default, so fp32 is not exact without this. Blocks may nest,
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
    """Return what a result depends on: versions, processor, device, date."""
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
    """Return how many processor cores this process may use, within its container's limit."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no control groups, or no limit ("max")
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


INTERRUPTS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    if hasattr(signal, name)
)
"""Signals that ask a process to end: Ctrl-C, ``kill`` or a scheduler, a closed terminal.

SIGBREAK is Windows' Ctrl-Break.
"""


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end. The message, if any, says what is kept.

    Attributes:
        signal_number: Number of that signal.
    """

    def __init__(self, signal_number: int, message: str = "") -> None:
        super().__init__(message)
        self.signal_number = signal_number


_holders: list[Callable[[], float]] = []


def held_seconds() -> float:
    """Return the seconds that the blocks of ``held_signals`` need to end, 0 outside of them."""
    return max((seconds() for seconds in [*_holders]), default=0.0)


@contextlib.contextmanager
def held_signals(seconds: Callable[[], float] = lambda: 0.0) -> Iterator[Callable[[], None]]:
    """Delay the signals ``INTERRUPTS`` inside the block; yield a function that raises them.

    The function raises ``Interrupted`` if a signal has come. A second signal acts at once. Outside
    the main thread, where handlers cannot be set, nothing is delayed.

    Args:
        seconds: Returns how long the block would take from now on to call the function and to end:
            for ``held_seconds``.
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
        for number in INTERRUPTS:
            if signal.getsignal(number) not in {signal.SIG_IGN, None}:  # None: not Python's
                before[number] = signal.signal(number, hold)
    _holders.append(seconds)
    try:
        yield check
    finally:
        _holders.remove(seconds)
        restore()
    check()  # a signal after the last check


def processor_name() -> str:
    """Return the processor's name."""
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

    Threads may share one; seconds of threads that run at the same time add up.
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
