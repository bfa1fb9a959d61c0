"""Workers that are Ray actors: one for each GPU of a cluster, or for the cores of each node.

An actor is another way to reach a ``Worker``: the coordinator, what it does about deaths and its
messages are those of processes on this machine. So an actor is never restarted by Ray: each death
is told to the coordinator, which starts another one. Messages come back as they are made, as the
results of one call for each task; of shards with their bytes where the actor does not see the
cache's folder. Between Ray and this process is a ``ray_bridge``.

Reads: nothing. Writes: shards that actors have sent.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import featcache
from featcache.child import receive, send
from featcache.errors import ConfigError
from featcache.extraction.options import ExtractionOptions
from featcache.extraction.plan import Job
from featcache.extraction.workers.coordinator import Coordinator, Ended, Event, Failed
from featcache.extraction.workers.messages import pack_facts
from featcache.extraction.workers.ray_cluster import (
    LOCAL,
    Room,
    check_address,
    find_rooms,
    unreachable,
)
from featcache.extraction.workers.ray_node import SentShard, Start, what_is_seen
from featcache.extraction.workers.ray_workers import LOST_SECONDS, Plan, ended, silent
from featcache.extraction.workers.worker import Facts, Task
from featcache.files import child_process
from featcache.formatting import count

# Where ten processes share each core, a cluster has answered after 6 s (2 s of CPU, most of it an
# import), and a Ray of our own has begun after 32 s.
_INIT_SECONDS = 15.0
_BEGIN_SECONDS = 90.0
_STOP_SECONDS = 5.0  # for an actor to end that was asked to, as for processes of this machine
_EXIT_SECONDS = 30.0  # for the bridge, and a Ray of our own, to end
_SILENT_SECONDS = 60.0  # then a bridge is taken for dead, as the sign of life of a part is
_LOOKS = 60  # in that time: one that was stopped itself has looked once only


def check_ray(address: str) -> None:
    """Check that Ray is installed and that a cluster of its version answers at an address.

    Raises:
        ConfigError: If not; within 20 s.
    """
    check_address(address)
    if address != LOCAL:
        with _bridge(address):
            pass


def work_with_ray(jobs: Sequence[Job], positions: Sequence[int]) -> None:
    """Do what ``work`` does, with Ray actors.

    Raises:
        Interrupted: If a signal asked for the end; it says how far it got.
        FeatcacheError: If Ray cannot be reached, or an image, the network, the disk or the workers
            do not allow to go on.
    """
    options = jobs[0].options
    assert options.ray is not None
    assert jobs[0].engine is not None
    device = jobs[0].engine.device.type
    with _bridge(options.ray) as bridge:
        rooms = _plan_rooms(bridge.nodes, device, options)
        bridge.say = options.say
        manifests = [job.partial.file.absolute() for job in jobs]

        def start(number: int, facts: Facts, tell: Callable[[Event], object]) -> RayWorker:
            if not bridge.is_planned:  # once for all; classes of a script are sent by their code
                from ray import cloudpickle

                data = pack_facts(facts, "--ray", cloudpickle.dumps)
                seen = what_is_seen(facts, manifests)
                starts = [Start(featcache.__version__, sys.path, device, r, seen) for r in rooms]
                bridge.plan(Plan(tuple(rooms), tuple(starts), data, LOST_SECONDS), facts)
            return RayWorker(bridge, number, tell)

        Coordinator(jobs, positions, start, len(rooms)).run()


def _plan_rooms(
    nodes: Sequence[dict[str, Any]], device: str, options: ExtractionOptions
) -> list[Room]:
    """Return what each actor takes, and say it."""
    rooms = find_rooms(nodes, device, options.processes)
    if not rooms:
        raise ConfigError(
            "--ray", expected="nodes with " + ("GPUs" if device == "cuda" else "cores"),
            found=f"none in {count(len(nodes), 'node')}", where=options.ray,
            hint="The engine is chosen on this machine: pass --device cpu to use no GPU",
        )  # fmt: skip
    gpus = sum(int(n["Resources"].get("GPU", 0)) for n in nodes if n["Alive"])
    unused = ""
    if gpus and device != "cuda":
        unused = f" Its {count(gpus, 'GPU')} are not used: run this where torch sees one."
    options.say(f"Ray: {count(len(rooms), 'worker')} of {rooms[0].size}.{unused}")
    return rooms


@contextlib.contextmanager
def _bridge(address: str) -> Iterator[Bridge]:
    """Yield a bridge to a cluster; end it, and with it all actors."""
    bridge = Bridge(address)
    try:
        bridge.connect()
        yield bridge
    finally:
        bridge.close()


class Bridge:
    """A child process that is connected to a cluster.

    Args:
        address: Of the cluster, ``auto`` or ``local``.

    Attributes:
        nodes: As Ray lists them.
        say: Tells the user.
    """

    def __init__(self, address: str) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.say: Callable[[str], object] = lambda text: None
        self._address, self._folders = address, list[Path]()
        self._workers: dict[int, RayWorker] = {}
        self._keys = itertools.count()
        self._is_over = self._is_hearing = self._was_silent = False
        self._num_heard = 0
        self._has_closed = threading.Event()
        self._lock = threading.Lock()
        self._reader: threading.Thread | None = None
        command, environment = child_process("featcache.extraction.workers.ray_bridge")
        # Ray would send statistics of its use, and warn of CUDA_VISIBLE_DEVICES.
        environment |= {
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_usage_stats_enabled": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }  # fmt: skip
        if address == LOCAL:  # else Ray makes a token for all to come in the user's home
            environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._child = subprocess.Popen(
            [*command, address], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C goes to the command, which tells the actors
        )  # fmt: skip

    @property
    def is_planned(self) -> bool:
        """Whether ``plan`` was called."""
        return self._reader is not None

    def connect(self) -> None:
        """Wait until it is connected.

        Raises:
            ConfigError: If there is nothing to be connected to.
        """
        assert self._child.stdout is not None
        seconds = _BEGIN_SECONDS if self._address == LOCAL else _INIT_SECONDS
        timer = threading.Timer(seconds, self._child.kill)
        timer.start()
        try:
            message: Any = receive(self._child.stdout)
        except (EOFError, OSError) as error:
            found = "something that Ray ends at"
            if not timer.is_alive():
                found = f"nothing that answers as Ray does within {seconds:.0f} s"
            raise unreachable(self._address, found) from error
        finally:
            timer.cancel()
        (answer,) = message
        if isinstance(answer, ConfigError):
            raise answer
        self.nodes = answer

    def plan(self, plan: Plan, facts: Facts) -> None:
        """Tell it what actors take and are told; then it can start some."""
        self._folders = [job.folder for job in facts.jobs]
        self._reader = threading.Thread(target=self._read, name="featcache-ray", daemon=True)
        self._reader.start()
        threading.Thread(target=self._watch, name="featcache-ray-watch", daemon=True).start()
        self.order(plan)

    def add(self, worker: RayWorker) -> int:
        """Return the key of a worker, whose answers it gets from now on."""
        key = next(self._keys)
        with self._lock:
            self._workers[key] = worker
            is_over = self._is_over
        if is_over:
            worker.lose(self._loss())
        return key

    def order(self, order: object) -> None:
        """Send an order. It waits while the bridge is busy; not for one that says nothing."""
        assert self._child.stdin is not None
        with contextlib.suppress(OSError):  # it has died, which ``_read`` tells
            send(self._child.stdin, order)

    def _read(self) -> None:
        """Hand answers on until there are none."""
        assert self._child.stdout is not None
        with contextlib.suppress(OSError, EOFError, pickle.UnpicklingError):
            while True:
                self._is_hearing = True
                message: Any = receive(self._child.stdout)
                self._is_hearing, self._num_heard = False, self._num_heard + 1
                key, answer = message
                if key is not None:
                    self._hand_on(self._workers[key], answer)
                elif answer:  # else it says that it lives
                    self.say(answer)
        self._child.stdout.close()
        with self._lock:
            self._is_over = True
            left = list(self._workers.values())
        for worker in left:
            worker.lose(self._loss())

    def _watch(self) -> None:
        """End a bridge that says nothing: whoever waits for it, to read an order say, goes on."""
        num_silent, num_heard = 0, 0
        while not self._has_closed.wait(_SILENT_SECONDS / _LOOKS):
            is_silent = self._is_hearing and self._num_heard == num_heard
            num_silent, num_heard = num_silent + 1 if is_silent else 0, self._num_heard
            if num_silent >= _LOOKS:
                self._was_silent = True
                self._child.kill()
                return

    def _loss(self) -> ConfigError:
        """Return why there is no bridge any more."""
        return silent(self._address, _SILENT_SECONDS) if self._was_silent else ended(self._address)

    def _hand_on(self, worker: RayWorker, answer: Any) -> None:
        if isinstance(answer, SentShard):
            try:
                answer = answer.write(self._folders[answer.made.job])
            except Exception as error:  # noqa: BLE001 (a full disk; raised by the coordinator)
                answer = Failed(error)
        worker.tell(answer)

    def close(self) -> None:
        """End it; it ends all actors, and a Ray of our own."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with contextlib.suppress(OSError):
            self._child.stdin.close()
        try:
            # Else it has begun nothing, and is importing torch.
            has_begun = self.is_planned or self._address == LOCAL
            self._child.wait(_EXIT_SECONDS if has_begun else 0.0)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._has_closed.set()
        if self._reader is None:
            self._child.stdout.close()
        else:
            self._reader.join(_STOP_SECONDS)


class RayWorker:
    """A worker that is a Ray actor: a ``WorkerHandle``.

    Args:
        bridge: To Ray, with a plan.
        number: Of the worker.
        tell: Called with what it says, in a thread of its own.
    """

    def __init__(self, bridge: Bridge, number: int, tell: Callable[[Event], object]) -> None:
        self._bridge, self._tell = bridge, tell
        self._is_killed, self._has_ended = False, threading.Event()
        self._deadline = 0.0
        self._key = bridge.add(self)
        bridge.order(("start", self._key, number))

    def give(self, task: Task) -> None:
        """Let it run a task next."""
        self._bridge.order(("give", self._key, task))

    def listed(self) -> None:
        """Let it go on after a shard."""
        self._bridge.order(("listed", self._key))

    def stop(self) -> None:
        """Let it hand back what it has and end."""
        self._deadline = self._deadline or time.monotonic() + _STOP_SECONDS
        self._bridge.order(("stop", self._key))

    def kill(self) -> None:
        """End it now if it has not ended by itself soon after ``stop``; tell nothing any more."""
        self._is_killed = True
        self._has_ended.wait(max(0.05, self._deadline - time.monotonic()))
        self._bridge.order(("kill", self._key))

    def tell(self, event: Event) -> None:
        """Hand on what it says."""
        if isinstance(event, Ended):
            self._has_ended.set()
        if not self._is_killed:
            self._tell(event)

    def lose(self, error: ConfigError) -> None:
        """Say that the bridge has ended, and this with it."""
        if not self._has_ended.is_set():
            self.tell(Failed(error, ends_all=True))
            self.tell(Ended("an error"))
