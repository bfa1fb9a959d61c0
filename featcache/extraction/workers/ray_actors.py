"""Workers that are Ray actors: one for each GPU of a cluster, or for the cores of each node.

An actor is another way to reach a ``Worker``: the coordinator, what it does about deaths and its
messages are those of processes on this machine. So an actor is never restarted by Ray: each death
is told to the coordinator, which starts another one. Messages come back as they are made, as the
results of one call for each task; of shards with their bytes where the actor does not see the
cache's folder.

Reads: nothing. Writes: shards that actors have sent.
"""

from __future__ import annotations

import contextlib
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import featcache
from featcache.errors import ConfigError
from featcache.extraction.options import ExtractionOptions
from featcache.extraction.plan import Job
from featcache.extraction.workers.coordinator import Coordinator, Ended, Event, Failed
from featcache.extraction.workers.messages import first_line, pack_facts
from featcache.extraction.workers.ray_cluster import Room, connected, find_rooms
from featcache.extraction.workers.ray_node import (
    MOST_WAITING,
    Answer,
    Begun,
    FeatcacheActor,
    SentShard,
    Start,
    what_is_seen,
)
from featcache.extraction.workers.worker import Facts, Task
from featcache.formatting import count
from featcache.runtime import Say

_LOOK_SECONDS = 5.0  # between two looks at whether an actor that waits for its place may get one
_PLACE_SECONDS = 30.0  # then it is said that it waits
_LOST_SECONDS = 60.0  # without a node that is large enough; then it is over
_NODE_SECONDS = 20.0  # for a node to answer
_STOP_SECONDS = 5.0  # as for processes of this machine
_NODE_DIED = "its node is gone"


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
    with connected(options.ray) as ray:
        rooms = _plan_rooms(ray.nodes(), device, options)
        folders = [job.partial.folder.absolute() for job in jobs]
        cluster = _Cluster(ray, options.ray, rooms, folders, options.say)
        # Two calls at once, so that it can be told to stop; no restarts: see the module's text.
        how = {"max_concurrency": 2, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        remote = ray.remote(**how)(FeatcacheActor)
        manifests = [job.partial.file.absolute() for job in jobs]
        known: dict[int, Any] = {}

        def start(number: int, facts: Facts, tell: Callable[[Event], object]) -> RayWorker:
            if not known:  # pickled and checked once for all; classes of a script by their code
                data = pack_facts(facts, "--ray", ray.cloudpickle.dumps)
                known[0] = ray.put(data), what_is_seen(facts, manifests)
            data, seen = known[0]
            room = rooms[number]
            begin = Start(featcache.__version__, sys.path, device, room, seen)
            make = remote.options(num_cpus=room.cores, num_gpus=room.gpus).remote
            return RayWorker(cluster, number, make, (begin, data), tell)

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
    options.say(f"Ray: {count(len(rooms), 'worker')} of {_size(rooms[0])}.{unused}")
    return rooms


def _size(room: Room) -> str:
    return f"{room.cores:g} cores" + (f", {room.gpus:g} GPU" if room.gpus else "")


@dataclass(frozen=True)
class _Cluster:
    """What all workers share.

    Attributes:
        ray: The module, connected.
        address: Of the cluster.
        rooms: What each worker takes of a node.
        folders: Where the shards of each cache go.
        say: Tells the user.
    """

    ray: Any
    address: str
    rooms: Sequence[Room]
    folders: Sequence[Path]
    say: Say

    def has_room(self) -> bool:
        """Whether there is a node that is large enough for one of the workers, busy or not."""
        try:
            nodes = self.ray.nodes()
        except Exception:  # noqa: BLE001 (the head does not answer)
            return False
        return any(room.fits(node) for node in nodes for room in self.rooms)

    def lost(self) -> ConfigError:
        """Return the error of a cluster whose nodes are gone."""
        smallest = min(self.rooms, key=lambda room: (room.gpus, room.cores))
        return ConfigError(
            "--ray", expected=f"a node with {_size(smallest)}",
            found=f"none for {_LOST_SECONDS:.0f} s", where=self.address,
            hint="Start nodes with 'ray start'; the same command then goes on",
        )  # fmt: skip


class RayWorker:
    """A worker that is a Ray actor: a ``WorkerHandle``.

    Args:
        cluster: Where.
        number: Of the worker.
        make: Makes the actor, which then may wait for its place.
        start: What it is told first: a ``Start``, and the facts.
        tell: Called with what it says, in a thread of its own.
    """

    def __init__(
        self, cluster: _Cluster, number: int, make: Callable[[], Any], start: tuple[Any, Any],
        tell: Callable[[Event], object],
    ) -> None:  # fmt: skip
        self._cluster, self._ray, self._number = cluster, cluster.ray, number
        self._tell_all = tell
        self._actor: Any = None
        self._is_killed = self._is_stopping = self._is_ready = False
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._run, args=(make, *start), name="featcache-worker", daemon=True
        )
        self._thread.start()

    def give(self, task: Task) -> None:
        """Let it run a task next."""
        self._tasks.put(task)

    def stop(self) -> None:
        """Let it hand back what it has and end."""
        self._is_stopping = True
        self._tasks.put(None)
        if self._is_ready:
            with contextlib.suppress(Exception, SystemExit):  # it has died, which ``_run`` tells
                self._actor.stop.remote()
        else:
            self._kill_actor()

    def kill(self) -> None:
        """End it now if it does not end by itself within seconds; tell nothing any more."""
        self._is_killed = True
        self._thread.join(_STOP_SECONDS)
        self._kill_actor()
        self._thread.join(_STOP_SECONDS)

    def _kill_actor(self) -> None:
        if self._actor is not None:
            with contextlib.suppress(Exception, SystemExit):
                self._ray.kill(self._actor)

    def _tell(self, event: Event) -> None:
        if not self._is_killed:
            self._tell_all(event)

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
            self._tell(Failed(_ended(self._cluster.address), ends_all=True))
        except _LostError:
            self._tell(Failed(self._cluster.lost(), ends_all=True))
        except Exception as error:  # noqa: BLE001 (raised by the coordinator)
            self._tell(Failed(error))
        self._kill_actor()  # Ray may believe that it is only out of reach
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
            answers = self._actor.run.options(
                num_returns="streaming", _generator_backpressure_num_objects=MOST_WAITING
            )
            for result in answers.remote(task):
                answer: Answer = self._ray.get(result)
                if isinstance(answer, SentShard):
                    answer = answer.write(self._cluster.folders[answer.made.job])
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
            elif now - seen > _LOST_SECONDS:
                raise _LostError
            if now - begin > _PLACE_SECONDS and not (is_patient or self._is_stopping):
                is_patient = True
                size = _size(self._cluster.rooms[self._number])
                self._cluster.say(
                    f"Worker {self._number + 1} still waits for Ray to start it ({size})."
                )
        answer: Begun | Failed = self._ray.get(begun)
        return answer


class _LostError(Exception):
    """No node is left."""


def _ended(address: str) -> ConfigError:
    return ConfigError(
        "--ray", expected="a cluster that answers", found="one that has ended on this machine",
        where=address, hint="Start it again; the same command then goes on",
    )  # fmt: skip


def _not_there(error: BaseException) -> ConfigError:
    lines = [line.strip() for line in str(error).splitlines() if "Error: " in line]
    return ConfigError(
        "--ray", expected=f"featcache {featcache.__version__} on every node",
        found=lines[-1][:200] if lines else first_line(error),
        hint="pip install 'featcache[ray]' in the Python of every node",
    )  # fmt: skip
