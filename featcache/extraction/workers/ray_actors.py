"""Workers that are Ray actors: one for each GPU of a cluster, or for the cores of each node.

An actor is another way to reach a ``Worker``: the coordinator, what it does about deaths and its
messages are those of processes on this machine. So an actor is never restarted by Ray: each death
is told to the coordinator, which starts another one. Messages come back as they are made, as the
results of one call for each task; features do not: workers write their shards into the folder of
the cache, which all nodes have to see.

Reads: the manifest in ``CACHE.partial/``, to find out whether it is seen. Writes: nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import pickle
import queue
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import featcache
from featcache.errors import CacheError, ConfigError, DataError, FeatcacheError
from featcache.extraction.manifest import open_manifest
from featcache.extraction.plan import Job
from featcache.extraction.workers.coordinator import Coordinator, Ended, Event, Failed
from featcache.extraction.workers.local import first_line, sendable_error, share_cores
from featcache.extraction.workers.worker import (
    Facts,
    Message,
    Progress,
    Ready,
    StoppedError,
    Task,
    Worker,
)
from featcache.files import json_sha256
from featcache.formatting import count
from featcache.runtime import INTERRUPTS, Say, available_cores

LOCAL = "local"
"""In place of an address: a Ray of our own on this machine, for as long as it is needed."""

_CONNECT_SECONDS = 5.0  # for a cluster to answer at all
_PLACE_SECONDS = 30.0  # then it is said that an actor waits for one
_SEEN_SECONDS = 3.0  # for a shared folder to show a manifest that was just written
_NODE_SECONDS = 20.0  # for a node to answer
_STOP_SECONDS = 5.0  # as for processes of this machine
_NODE_DIED = "its node is gone"

# ------------------------------------------------------------------------------------- the cluster


def check_ray(address: str) -> None:
    """Check that Ray is installed and that something answers at an address.

    Raises:
        ConfigError: If not.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "--ray", expected="the package ray", found="none",
            hint="pip install 'featcache[ray]', on every node",
        )  # fmt: skip
    if address in {LOCAL, "auto"}:
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(
            "--ray", expected="local, auto or HOST:PORT of the head node", found=address,
            hint="Run the command on a node of the cluster, and name the address that 'ray start' "
            "printed",
        )  # fmt: skip
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise _unreachable(address, error.strerror or str(error)) from error


def _unreachable(address: str, found: str) -> ConfigError:
    hint = "Start it with 'ray start --head', or pass --ray local to use this machine alone"
    return ConfigError("--ray", expected=f"a Ray cluster at {address}", found=found, hint=hint)


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Yield the module ``ray``, connected; leave a connection that was there before as it is."""
    with contextlib.ExitStack() as stack:
        # Ray reads these when it is imported, and hands them on to its processes. It would send
        # statistics of its use, and warn of CUDA_VISIBLE_DEVICES.
        settings = {
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_usage_stats_enabled": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }  # fmt: skip
        if address == LOCAL:
            # Else Ray makes a token for all to come in the user's home, and says so.
            settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
            stack.callback(_read_settings)
        stack.enter_context(_environment(settings))
        import ray

        if address == LOCAL:
            _read_settings()
        if not ray.is_initialized():
            stack.enter_context(_quiet())
            stack.callback(ray.shutdown)
            _connect(ray, address, stack)
        yield ray


def _connect(ray: Any, address: str, stack: contextlib.ExitStack) -> None:
    options: dict[str, Any] = {
        "log_to_driver": False, "configure_logging": False, "logging_level": "CRITICAL",
    }  # fmt: skip
    if address == LOCAL:
        # Below a short name: paths of sockets have 107 characters at most.
        folder = tempfile.mkdtemp(prefix="featcache-", dir="/tmp" if os.name == "posix" else None)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(ray.shutdown)
        options |= {
            "address": "local", "num_cpus": available_cores(), "include_dashboard": False,
            "_temp_dir": folder, "_node_ip_address": "127.0.0.1",
        }  # fmt: skip
    else:
        options["address"] = address
    try:
        with _kept_handlers():
            ray.init(**options)
    except Exception as error:  # Ray raises many kinds, also plain ones
        raise _unreachable(address, first_line(error)) from error


def _read_settings() -> None:
    """Let Ray read its settings again: it may have been imported before they were made."""
    with contextlib.suppress(ImportError):  # of a version without tokens
        from ray import _raylet

        _raylet.Config.initialize("")
        _raylet.AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let Ray not print on standard output that a worker died; ``log_to_driver`` leaves that."""
    from ray._private import worker

    before = getattr(worker, "_worker_logs_enabled", True)
    worker._worker_logs_enabled = False
    try:
        yield
    finally:
        worker._worker_logs_enabled = before


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _kept_handlers() -> Iterator[None]:
    """Undo that Ray takes over SIGTERM: its handler ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: not Python's
                signal.signal(number, handler)


@dataclass(frozen=True)
class _Room:
    """What one actor takes of a node.

    Attributes:
        index: Of the actor, among those of the node.
        number: How many of them there are.
        cores: Its share of the node's.
        gpus: One, or the part of one.
    """

    index: int
    number: int
    cores: float
    gpus: float


def _find_rooms(nodes: Sequence[dict[str, Any]], device: str, processes: int) -> list[_Room]:
    """Return what each actor takes, so that the first ones are on different nodes.

    Args:
        nodes: As Ray lists them.
        device: ``cuda`` for so many processes a GPU, else so many a node.
        processes: How many.
    """
    rooms = []
    for node in nodes:
        found = node["Resources"] if node["Alive"] else {}
        cores, gpus = found.get("CPU", 0), int(found.get("GPU", 0))
        number = (gpus if device == "cuda" else cores >= 1) * processes
        part = _rounded(1 / processes) if device == "cuda" else 0.0
        rooms += [_Room(i, number, _rounded(cores / number), part) for i in range(number)]
    return sorted(rooms, key=lambda room: room.index)


def _rounded(share: float) -> float:
    """Ray wants whole numbers above 1, and at most four digits below."""
    return math.floor(share) if share >= 1 else math.floor(share * 1e4) / 1e4


# -------------------------------------------------------------------------------------- the driver


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
    with _connected(options.ray) as ray:
        nodes = ray.nodes()
        rooms = _find_rooms(nodes, device, options.processes)
        gpus = sum(int(n["Resources"].get("GPU", 0)) for n in nodes if n["Alive"])
        if not rooms:
            raise ConfigError(
                "--ray", expected="nodes with " + ("GPUs" if device == "cuda" else "cores"),
                found=f"none in {count(len(nodes), 'node')}", where=options.ray,
                hint="The engine is chosen on this machine: pass --device cpu to use no GPU",
            )  # fmt: skip
        unused = ""
        if gpus and device != "cuda":
            unused = f" Its {count(gpus, 'GPU')} are not used: run this where torch sees one."
        of_each = f"{rooms[0].cores:g} cores" + (f", {rooms[0].gpus:g} GPU" * (device == "cuda"))
        options.say(f"Ray: {count(len(rooms), 'worker')} of {of_each}.{unused}")
        # Two calls at once, so that it can be told to stop; no restarts: see the module's text.
        how = {"max_concurrency": 2, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        remote = ray.remote(**how)(_Actor)
        manifests = [job.partial.file.absolute() for job in jobs]
        known: dict[int, Any] = {}

        def start(number: int, facts: Facts, tell: Callable[[Event], object]) -> RayWorker:
            if not known:  # pickled and checked once for all
                known[0] = ray.put(_pickle(ray, facts)), _what_is_seen(facts, manifests)
            data, seen = known[0]
            room = rooms[number]
            actor = remote.options(num_cpus=room.cores, num_gpus=room.gpus).remote()
            start = _Start(featcache.__version__, sys.path, device, room, seen)
            return RayWorker(ray, actor, (start, data), tell, _patience(number, room, options.say))

        Coordinator(jobs, positions, start, len(rooms)).run()


def _patience(number: int, room: _Room, say: Say) -> Callable[[], object]:
    return functools.partial(
        say,
        f"Worker {number + 1} still waits for Ray to start it ({room.cores:g} cores"
        + (f" and {room.gpus:g} GPU" if room.gpus else "")
        + ").",
    )


def _pickle(ray: Any, facts: Facts) -> bytes:
    """Return the facts as a pickle, classes of a notebook or a script by their code."""
    try:
        data: bytes = ray.cloudpickle.dumps(facts)
    except Exception as error:  # a user's network may refuse in any way
        raise ConfigError(
            "--ray", expected="a backbone that can be sent to another process",
            found=first_line(error), hint="Make it of classes of a module",
        ) from error  # fmt: skip
    return data


class RayWorker:
    """A worker that is a Ray actor: a ``WorkerHandle``.

    Args:
        ray: The module, connected.
        actor: The actor, which may be still to be placed.
        start: What it is told first: a ``_Start``, and the facts.
        tell: Called with what it says, in a thread of its own.
        be_patient: Called when it has waited for its place for a while.
    """

    def __init__(
        self, ray: Any, actor: Any, start: tuple[Any, Any], tell: Callable[[Event], object],
        be_patient: Callable[[], object],
    ) -> None:  # fmt: skip
        self._ray, self._actor, self._tell_all = ray, actor, tell
        self._be_patient = be_patient
        self._is_killed = self._is_stopping = self._is_ready = False
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._run, args=start, name="featcache-worker", daemon=True
        )
        self._thread.start()

    def give(self, task: Task) -> None:
        """Let it run a task next."""
        self._tasks.put(task)

    def stop(self) -> None:
        """Let it hand back what it has and end."""
        self._is_stopping = True
        self._tasks.put(None)
        with contextlib.suppress(Exception):  # it has died, which ``_run`` tells
            if self._is_ready:
                self._actor.stop.remote()
            else:
                self._ray.kill(self._actor)

    def kill(self) -> None:
        """End it now if it does not end by itself within seconds; tell nothing any more."""
        self._is_killed = True
        self._thread.join(_STOP_SECONDS)
        with contextlib.suppress(Exception):
            self._ray.kill(self._actor)
        self._thread.join(_STOP_SECONDS)

    def _tell(self, event: Event) -> None:
        if not self._is_killed:
            self._tell_all(event)

    def _run(self, start: _Start, facts: Any) -> None:
        """Hand tasks on and messages back, until it is asked to end or it dies."""
        try:
            reason = self._serve(start, facts)
        except self._ray.exceptions.RayTaskError as error:  # it could not even be imported
            self._tell(Failed(_not_there(error)))
            reason = "an error"
        except self._ray.exceptions.RayError as error:
            reason = self._find_reason(error)
        except SystemExit:  # Ray raises it where it has ended, or has lost its own node
            self._tell(Failed(_ended()))
            reason = "an error"
        except Exception as error:  # noqa: BLE001 (raised by the coordinator)
            self._tell(Failed(error))
            reason = "an error"
        with contextlib.suppress(
            Exception, SystemExit
        ):  # Ray may believe that it is only out of reach
            self._ray.kill(self._actor)
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

    def _serve(self, start: _Start, facts: Any) -> str:
        begun = self._actor.begin.remote(start, facts)
        if not self._ray.wait([begun], timeout=_PLACE_SECONDS)[0] and not self._is_stopping:
            self._be_patient()
        event: Event = self._ray.get(begun)
        self._is_ready = True
        self._tell(event)
        while not isinstance(event, Failed):
            if (task := self._tasks.get()) is None:
                return "asked to"
            for result in self._actor.run.options(num_returns="streaming").remote(task):
                event = self._ray.get(result)
                self._tell(event)
        return "an error"


def _ended() -> ConfigError:
    return ConfigError(
        "--ray", expected="a cluster that answers", found="one that has ended on this machine",
        hint="Start it again; the same command then goes on",
    )  # fmt: skip


def _not_there(error: BaseException) -> ConfigError:
    lines = [line.strip() for line in str(error).splitlines() if "Error: " in line]
    return ConfigError(
        "--ray", expected=f"featcache {featcache.__version__} on every node",
        found=lines[-1][:200] if lines else first_line(error),
        hint="pip install 'featcache[ray]' in the Python of every node",
    )  # fmt: skip


# --------------------------------------------------------------------------------- what nodes see


@dataclass(frozen=True)
class _Seen:
    """What an actor has to see as this process does.

    Attributes:
        manifests: The file of the manifest of each cache.
        sha256: Of what does not change in each.
        images: Position in the data set that is sent -> bytes, of images that can be read here.
    """

    manifests: tuple[Path, ...]
    sha256: tuple[str, ...]
    images: dict[int, int]


@dataclass(frozen=True)
class _Start:
    """What an actor is told first.

    Attributes:
        version: Of featcache.
        path: Where modules are looked for here.
        device: ``cpu``, ``cuda`` (the GPU that Ray gives it) or ``mps``.
        room: Its share of the node.
        seen: What it has to see.
    """

    version: str
    path: list[str]
    device: str
    room: _Room
    seen: _Seen


def _what_is_seen(facts: Facts, manifests: Sequence[Path]) -> _Seen:
    images = {}
    for position, sample in enumerate(facts.dataset.samples):
        with contextlib.suppress(DataError):
            images[position] = len(facts.dataset.read(sample))
    seen = tuple(_manifest_sha256(file) for file in manifests)
    return _Seen(tuple(manifests), seen, images)


def _manifest_sha256(file: Path) -> str:
    """Return a hash of what stays the same in a manifest while workers are at work."""
    manifest = open_manifest(file)
    kept = (manifest.fingerprint, manifest.provenance.get("date"))
    parts = [None if part is None else asdict(part) for part in (manifest.engine, manifest.probes)]
    return json_sha256({"kept": kept, "parts": parts}, without="")


def _check_seen(facts: Facts, seen: _Seen) -> None:
    """Check that the caches' folders and the images are those that the command sees.

    Raises:
        CacheError: If a cache's folder is not.
        DataError: If the data is not.
    """
    host = socket.gethostname()
    for job, file, wanted in zip(facts.jobs, seen.manifests, seen.sha256, strict=True):
        found = "another one"
        for _ in range(2):
            try:
                if (there := _manifest_sha256(file)) == wanted:
                    break
            except (FeatcacheError, OSError):
                there, found = "", "none"
            time.sleep(_SEEN_SECONDS)
        if there != wanted:
            raise CacheError(
                f"worker on {host}", expected=f"the folder of {job.name} that the command writes",
                found=found, where=job.folder,
                hint="Write CACHE to a folder that all nodes share, or use --part on each of them",
            )  # fmt: skip
    for position, num_bytes in seen.images.items():
        with contextlib.suppress(DataError):
            if len(facts.dataset.read(facts.dataset.samples[position])) == num_bytes:
                return
    if seen.images:
        raise DataError(
            f"worker on {host}", expected="the images that the command has found",
            found="none of them", where=facts.dataset.root,
            hint="Put DATA into a folder that all nodes share, under one name",
        )  # fmt: skip


# ------------------------------------------------------------------------------------- in the actor


class _Actor:
    """What Ray makes in a process of its own; ``stop`` may be called while ``run`` runs."""

    def __init__(self) -> None:
        self._is_stopping = threading.Event()
        self._worker: Worker | None = None
        self._cores: list[int] = []

    def begin(self, start: _Start, facts: bytes) -> Ready | Failed:
        """Build the engines."""
        try:
            if start.version != featcache.__version__:
                found = featcache.__version__
                raise ConfigError(
                    f"worker on {socket.gethostname()}", expected=f"featcache {start.version}",
                    found=found, hint="Install the same version on every node",
                )  # fmt: skip
            sys.path += [path for path in start.path if path not in sys.path]
            warnings.simplefilter("ignore")  # the driver's engine has said the same
            room = start.room
            self._cores = share_cores(room.number)[room.index] if room.number > 1 else []
            _stay_on(self._cores)
            known = _unpickle(facts)
            _check_seen(known, start.seen)
            self._worker = Worker(known, start.device)
        except BaseException as error:  # noqa: BLE001 (raised by the coordinator)
            return Failed(sendable_error(error))
        return self._worker.ready

    def stop(self) -> None:
        """Let ``run`` hand back what it has."""
        self._is_stopping.set()

    def _check(self) -> None:
        if self._is_stopping.is_set():
            raise StoppedError

    def run(self, task: Task) -> Iterator[Message | Failed]:
        """Run a task, and yield its messages as they come."""
        worker = self._worker
        assert worker is not None
        messages: queue.SimpleQueue[Message | Failed | None] = queue.SimpleQueue()

        def work() -> None:
            _stay_on(self._cores)
            try:
                worker.run(task, messages.put, self._check)
            except BaseException as error:  # noqa: BLE001 (raised by the coordinator)
                messages.put(Failed(sendable_error(error)))
            finally:
                messages.put(None)

        threading.Thread(target=work, name="featcache-task", daemon=True).start()
        num_images = 0  # that were not told of yet
        while (message := messages.get()) is not None:
            if isinstance(message, Progress):
                num_images += message.num_images
                if num_images < 64:
                    continue
                message, num_images = replace(message, num_images=num_images), 0
            yield message


def _stay_on(cores: list[int]) -> None:
    """Keep this thread, and those that it starts, on some cores, if there are any."""
    if cores:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cores)


def _unpickle(data: bytes) -> Facts:
    try:
        facts = pickle.loads(data)
    except Exception as error:  # a module that is not there, or fails
        raise ConfigError(
            f"worker on {socket.gethostname()}", expected="a backbone that can be imported there",
            found=first_line(error), hint="Put its module on PYTHONPATH of every node",
        ) from error  # fmt: skip
    assert isinstance(facts, Facts)
    return facts
