"""In the bridge to Ray: the workers that are Ray's actors.

Reads: nothing. Writes: nothing.
"""

from __future__ import annotations

import contextlib
import queue
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import featcache
from featcache.child import receive
from featcache.errors import ConfigError
from featcache.extraction.workers.coordinator import Ended, Failed
from featcache.extraction.workers.messages import first_line, sendable_error
from featcache.extraction.workers.ray_cluster import Room
from featcache.extraction.workers.ray_node import (
    Answer,
    Begun,
    FeatcacheActor,
    Start,
)
from featcache.extraction.workers.worker import Task
from featcache.runtime import Say

_LOOK_SECONDS = 5.0  # between two looks at whether an actor that waits for its place may get one
_PLACE_SECONDS = 30.0  # then it is said that it waits
LOST_SECONDS = 60.0
"""Without a node that is large enough; then it is over."""
_NODE_SECONDS = 20.0  # for a node to answer
_NODE_DIED = "its node is gone"


@dataclass(frozen=True)
class Plan:
    """What the command tells first, once it has chosen what each actor takes.

    Attributes:
        rooms: What each takes of a node.
        starts: What each is told first.
        facts: What all are told, packed.
        lost_seconds: So long no node may be large enough.
    """

    rooms: tuple[Room, ...]
    starts: tuple[Start, ...]
    facts: bytes
    lost_seconds: float


def serve(ray: Any, address: str, tell: Callable[..., None]) -> NoReturn:
    """Carry out orders, and tell what comes of them.

    Args:
        ray: The module, connected.
        address: Of the cluster.
        tell: Takes the key of a worker and what it says, or None and a line for the user.

    Raises:
        EOFError: When the command is gone, or has what it wants.
    """
    orders = sys.stdin.buffer
    plan: Any = receive(orders)
    assert isinstance(plan, Plan)
    cluster = _Cluster(ray, address, plan, lambda text: tell(None, text))
    # Two calls at once, so that it can be told to stop; never restarted: see ``ray_actors``.
    how = {"max_concurrency": 2, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
    remote, facts = ray.remote(**how)(FeatcacheActor), ray.put(plan.facts)
    workers: dict[int, Actor] = {}
    while True:
        order: Any = receive(orders)
        match order:
            case ("start", key, number):
                room = plan.rooms[number]
                make = remote.options(num_cpus=room.cores, num_gpus=room.gpus).remote
                begin = (plan.starts[number], facts)

                def tell_of(answer: Answer | Ended, key: int = key) -> None:
                    tell(key, answer)

                workers[key] = Actor(cluster, number, make, begin, tell_of)
            case ("give", key, task):
                workers[key].give(task)
            case ("listed", key):
                workers[key].listed()
            case ("stop", key):
                workers[key].stop()
            case ("kill", key):
                workers[key].kill()


@dataclass(frozen=True)
class _Cluster:
    """What all workers share.

    Attributes:
        ray: The module, connected.
        address: Of the cluster.
        plan: What each worker takes of a node, and is told.
        say: Tells the user.
    """

    ray: Any
    address: str
    plan: Plan
    say: Say

    def has_room(self) -> bool:
        """Whether there is a node that is large enough for one of the workers, busy or not."""
        try:
            nodes = self.ray.nodes()
        except Exception:  # noqa: BLE001 (the head does not answer)
            return False
        return any(room.fits(node) for node in nodes for room in self.plan.rooms)

    def lost(self) -> ConfigError:
        """Return the error of a cluster whose nodes are gone."""
        smallest = min(self.plan.rooms, key=lambda room: (room.gpus, room.cores))
        return ConfigError(
            "--ray", expected=f"a node with {smallest.size}",
            found=f"none for {self.plan.lost_seconds:.0f} s", where=self.address,
            hint="Start nodes with 'ray start'; the same command then goes on",
        )  # fmt: skip


class Actor:
    """A Ray actor that is a worker, as the bridge has it.

    Args:
        cluster: Where.
        number: Of the worker.
        make: Makes the actor, which then may wait for its place.
        start: What it is told first: a ``Start``, and the facts.
        tell: Called with what it says, in a thread of its own.
    """

    def __init__(
        self, cluster: _Cluster, number: int, make: Callable[[], Any], start: tuple[Any, Any],
        tell: Callable[[Answer | Ended], object],
    ) -> None:  # fmt: skip
        self._cluster, self._ray, self._number = cluster, cluster.ray, number
        self._tell = tell
        self._actor: Any = None
        self._is_stopping = self._is_ready = False
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._run, args=(make, *start), name="featcache-worker", daemon=True
        )
        self._thread.start()

    def give(self, task: Task) -> None:
        """Let it run a task next."""
        self._tasks.put(task)

    def listed(self) -> None:
        """Let it go on after a shard."""
        with contextlib.suppress(Exception, SystemExit):  # it has died, which ``_run`` tells
            self._actor.listed.remote()

    def stop(self) -> None:
        """Let it hand back what it has and end."""
        self._is_stopping = True
        self._tasks.put(None)
        if self._is_ready:
            with contextlib.suppress(Exception, SystemExit):  # it has died, which ``_run`` tells
                self._actor.stop.remote()
        else:
            self.kill()

    def kill(self) -> None:
        """End it now."""
        if self._actor is not None:
            with contextlib.suppress(Exception, SystemExit):
                self._ray.kill(self._actor)

    def _run(self, make: Callable[[], Any], start: Start, facts: Any) -> None:
        """Hand tasks on and messages back, until it is asked to end or it dies."""
        reason = "an error"
        try:
            self._actor = make()
            reason = self._serve(start, facts)
        except self._ray.exceptions.RayTaskError as error:  # it could not even be imported
            self._tell(Failed(_not_there(error)))
        except self._ray.exceptions.RayError as error:
            reason = self._find_reason(error)
        except SystemExit:  # Ray raises it where it has ended, or has lost its own node
            self._tell(Failed(ended(self._cluster.address), ends_all=True))
        except _LostError:
            self._tell(Failed(self._cluster.lost(), ends_all=True))
        except Exception as error:  # noqa: BLE001 (raised by the coordinator)
            self._tell(Failed(sendable_error(error)))
        self.kill()  # Ray may believe that it is only out of reach
        # That a node ends is not the fault of images.
        self._tell(Ended(reason, was_asked=self._is_stopping or reason == _NODE_DIED))

    def _find_reason(self, error: BaseException) -> str:
        """Say how it died: Ray knows that of a process at once, of a node half a minute later."""
        unavailable = self._ray.exceptions.ActorUnavailableError
        if isinstance(error, unavailable):
            try:
                self._ray.get(self._actor.stop.remote(), timeout=_NODE_SECONDS)
            except self._ray.exceptions.RayError as later:
                error = later
        text = " ".join(str(error).split())
        if isinstance(error, unavailable) or re.search(r"its (worker )?node has died", text):
            return _NODE_DIED
        if "due to the node running low on memory" in text:
            return "ended by Ray, as its node had no memory left"
        return "its process died"

    def _serve(self, start: Start, facts: Any) -> str:
        begun = self._begin(start, facts)
        if isinstance(begun, Failed):
            self._tell(begun)
            return "an error"
        self._is_ready = True
        if begun.sent:
            self._cluster.say(
                f"Worker {self._number + 1} on {begun.ready.host} does not see the folder of "
                f"{' or '.join(begun.sent)}: it sends its shards."
            )
        self._tell(begun.ready)
        while (task := self._tasks.get()) is not None:
            for result in self._actor.run.options(num_returns="streaming").remote(task):
                answer: Answer = self._ray.get(result)
                self._tell(answer)
                if isinstance(answer, Failed):
                    return "an error"
        return "asked to"

    def _begin(self, start: Start, facts: Any) -> Begun | Failed:
        """Wait until it is placed and its engines are built."""
        begun = self._actor.begin.remote(start, facts)
        begin = seen = time.monotonic()
        is_patient = False
        while not self._ray.wait([begun], timeout=_LOOK_SECONDS)[0]:
            now = time.monotonic()
            if self._cluster.has_room():
                seen = now
            elif now - seen > self._cluster.plan.lost_seconds:
                raise _LostError
            if now - begin > _PLACE_SECONDS and not (is_patient or self._is_stopping):
                is_patient = True
                size = self._cluster.plan.rooms[self._number].size
                self._cluster.say(
                    f"Worker {self._number + 1} still waits for Ray to start it ({size})."
                )
        answer: Begun | Failed = self._ray.get(begun)
        return answer


class _LostError(Exception):
    """No node is left."""


def ended(address: str) -> ConfigError:
    """Return the error of a cluster that is gone as a whole."""
    return ConfigError(
        "--ray", expected="a cluster that answers", found="one that has ended on this machine",
        where=address, hint="Start it again; the same command then goes on",
    )  # fmt: skip


def silent(address: str, seconds: float) -> ConfigError:
    """Return the error of a bridge that hangs, or was stopped."""
    return ConfigError(
        "--ray", expected="a cluster that answers", where=address,
        found=f"a process of Ray's on this machine that said nothing for {seconds:.0f} s",
        hint="The same command goes on",
    )  # fmt: skip


def _not_there(error: BaseException) -> ConfigError:
    lines = [line.strip() for line in str(error).splitlines() if "Error: " in line]
    return ConfigError(
        "--ray", expected=f"featcache {featcache.__version__} on every node",
        found=lines[-1][:200] if lines else first_line(error),
        hint="pip install 'featcache[ray]' in the Python of every node",
    )  # fmt: skip
