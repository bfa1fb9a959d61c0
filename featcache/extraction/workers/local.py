"""Workers that are processes of this machine: one for each device, or several on its cores.

The parent writes tasks to a child's standard input and reads messages from its output, each a
pickle. A child whose input ends has lost its parent, and ends at once. It has the parent's
``sys.path`` behind its own, so that it finds the modules of the user's backbones.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any, NoReturn

from featcache.child import receive, send
from featcache.errors import ConfigError
from featcache.extraction.plan import Job
from featcache.extraction.workers.coordinator import Coordinator, Ended, Event, Failed
from featcache.extraction.workers.messages import (
    Bundled,
    pack_facts,
    sendable_error,
    unpack_facts,
)
from featcache.extraction.workers.worker import (
    Facts,
    Message,
    ShardMade,
    StoppedError,
    Task,
    Worker,
)
from featcache.files import child_process
from featcache.runtime import (
    INTERRUPTS,
    Interrupted,
    available_cores,
    held_signals,
    resolve_device,
)

_KILL_SECONDS = 1.0  # for a worker that was asked to end and has nothing to do


def resolve_devices(names: str = "auto", processes: int = 1) -> list[str]:
    """Return the device of each process of an extraction.

    Args:
        names: A device as ``resolve_device`` takes it, several with commas, or ``all`` GPUs.
        processes: How many there are on each.

    Raises:
        ConfigError: If one is unknown or not available, or they are of different kinds.
    """
    if names == "all":
        gpus = _count_gpus()
        if not gpus:
            raise ConfigError(
                "--device all", expected="at least one GPU that torch can use", found="none",
                hint="Leave --device out to use the fastest device available",
            )  # fmt: skip
        found = [f"cuda:{number}" for number in range(gpus)]
    else:
        found = [str(resolve_device(name.strip())) for name in names.split(",")]
    kinds = {name.partition(":")[0] for name in found}
    if len(kinds) > 1:
        raise ConfigError(
            "--device", expected="devices of one kind", found=names,
            hint="The rows of one cache are made by one engine and batch shape: choose GPUs or the "
            "CPU",
        )  # fmt: skip
    return [name for name in found for _ in range(processes)]


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def work_on(devices: Sequence[str], jobs: Sequence[Job], positions: Sequence[int]) -> None:
    """Do what ``work`` does, with a process for each of some devices of this machine.

    Raises:
        Interrupted: If a signal asked for the end; it says how far it got.
        FeatcacheError: If an image, the network, the disk or the workers do not allow to go on.
    """
    cores = share_cores(len(devices))
    counts = Counter(devices)
    listed = ", ".join(f"{number} x {device}" for device, number in sorted(counts.items()))
    jobs[0].options.say(f"Processes: {listed}.")
    pickled: list[bytes] = []  # once for all

    def start(number: int, facts: Facts, tell: Callable[[Event], object]) -> LocalWorker:
        if not pickled:
            pickled.append(pack_facts(facts, "--processes"))
        return LocalWorker(pickled[0], devices[number], cores[number], tell)

    Coordinator(jobs, positions, start, len(devices)).run()


def share_cores(number: int) -> list[list[int]]:
    """Return the cores of each of so many processes; of fewer cores, some have the same one.

    Where a container's limit is below the number of cores, nothing is shared out but by the system.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [[] for _ in range(number)]
    cores = sorted(os.sched_getaffinity(0))
    if available_cores() < len(cores):
        return [[] for _ in range(number)]
    if number > len(cores):
        return [[cores[i % len(cores)]] for i in range(number)]
    ends = [len(cores) * i // number for i in range(number + 1)]
    return [cores[ends[i] : ends[i + 1]] for i in range(number)]


@dataclass(frozen=True)
class _Start:
    """What a child is told first."""

    path: list[str]
    device: str
    cores: list[int]


_STOP, _LISTED = "stop", "listed"


class LocalWorker:
    """A worker in a child process: a ``WorkerHandle``.

    Args:
        facts: What it is told, as a pickle.
        device: Where it computes.
        cores: It may use these only, if there are any.
        tell: Called with what it says, in a thread of its own.
    """

    def __init__(
        self, facts: bytes, device: str, cores: list[int], tell: Callable[[Event], object]
    ) -> None:
        self._tell, self._is_killed, self._deadline = tell, False, math.inf
        command, environment = child_process(__name__)
        self._child = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C goes to the parent, which tells its children
        )  # fmt: skip
        self._orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._orders.put(_Start(sys.path, device, cores))
        self._orders.put(facts)
        for target in (self._write, self._read):
            threading.Thread(target=target, name="featcache-worker", daemon=True).start()

    def give(self, task: Task) -> None:
        """Let it run a task next."""
        self._orders.put(task)

    def listed(self) -> None:
        """Let it go on after a shard."""
        self._orders.put(_LISTED)

    def stop(self) -> None:
        """Let it hand back what it has and end."""
        self._deadline = min(self._deadline, time.monotonic() + _KILL_SECONDS)
        self._orders.put(_STOP)

    def kill(self) -> None:
        """End it now if it has not ended by itself soon after ``stop``; tell nothing any more."""
        self._is_killed = True
        self._deadline = min(self._deadline, time.monotonic() + _KILL_SECONDS)
        try:
            self._child.wait(max(0.05, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._orders.put(None)

    def _write(self) -> None:
        """Send what is given; a thread, since a child that does not read blocks a pipe."""
        assert self._child.stdin is not None
        with contextlib.suppress(OSError):  # it has died, which ``_read`` tells
            while (order := self._orders.get()) is not None:
                send(self._child.stdin, order)
        with contextlib.suppress(OSError):
            self._child.stdin.close()

    def _read(self) -> None:
        assert self._child.stdout is not None
        with contextlib.suppress(OSError, EOFError, pickle.UnpicklingError):
            while True:
                message: Any = receive(self._child.stdout)
                if not self._is_killed:
                    self._tell(message)
        self._child.stdout.close()
        code = self._child.wait()
        self._orders.put(None)
        if not self._is_killed:
            self._tell(Ended(_describe_code(code), was_asked=code in _ASKED_CODES))


_ASKED_CODES = {0, *(128 + number for number in INTERRUPTS)}


def _describe_code(code: int) -> str:
    if code < 0:
        return f"killed by {_signal_name(-code)}"
    if code in _ASKED_CODES:
        return "asked to" if not code else f"asked to by {_signal_name(code - 128)}"
    return f"exit code {code}"


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


# ------------------------------------------------------------------------------------ in the child


class _Orders:
    """What the parent says, read by a thread; the parent's end is this process's end."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._is_busy = threading.Event()
        self.num_listed = threading.Semaphore(0)  # shards that were not waited for yet
        self.is_stopping = threading.Event()

    def read_one(self) -> Any:
        """Return the next thing that is said, before ``start``."""
        return receive(self._stream)

    def start(self) -> None:
        """Read on in a thread."""
        threading.Thread(target=self._read, name="featcache-orders", daemon=True).start()

    def begin(self) -> None:
        """From now on ``_STOP`` does not end the process at once."""
        self._is_busy.set()

    def _read(self) -> None:
        try:
            while True:
                order: Any = receive(self._stream)
                if order == _LISTED:
                    self.num_listed.release()
                    continue
                if order != _STOP:
                    self._tasks.put(order)
                    continue
                if not self._is_busy.is_set():
                    os._exit(0)  # nothing is in hand
                self.is_stopping.set()
                self._tasks.put(None)
        except (OSError, EOFError):
            os._exit(1)

    def next_task(self, check: Callable[[], object]) -> Task | None:
        """Wait for a task; None asks for the end."""
        while not self.is_stopping.is_set():
            check()
            with contextlib.suppress(queue.Empty):
                return self._tasks.get(timeout=0.2)
        return None


def main() -> NoReturn:
    """Run tasks until the parent asks for the end, or is gone."""
    # What a user's network prints must not come between the messages.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    code = 0
    try:
        with held_signals() as check:
            _serve(_Orders(sys.stdin.buffer), answers, check)
    except Interrupted as stop:
        code = 128 + stop.signal_number
    except EOFError:
        code = 1
    except BaseException as error:  # noqa: BLE001 (raised in the parent)
        send(answers, Failed(sendable_error(error)))
        code = 1
    # A thread of a decoder that hangs, or of a library, would hold up the interpreter's end.
    with contextlib.suppress(OSError):
        answers.flush()
    os._exit(code)


def _serve(orders: _Orders, answers: IO[bytes], check: Callable[[], object]) -> None:
    start = orders.read_one()
    sys.path += [path for path in start.path if path not in sys.path]
    if start.cores:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, start.cores)
    warnings.simplefilter("ignore")  # the parent's engine has said the same
    facts = unpack_facts(orders.read_one(), "--processes")
    orders.start()
    worker = Worker(facts, start.device)
    check()
    orders.begin()
    send(answers, worker.ready)

    def hand_on(message: Message) -> None:
        send(answers, message)
        if isinstance(message, ShardMade):
            orders.num_listed.acquire()

    hand_back = Bundled(hand_on)

    def check_orders() -> None:
        try:
            check()
        except Interrupted as stop:
            raise StoppedError from stop
        if orders.is_stopping.is_set():
            raise StoppedError

    while (task := orders.next_task(check)) is not None:
        worker.run(task, hand_back, check_orders)
        check()


if __name__ == "__main__":
    main()
