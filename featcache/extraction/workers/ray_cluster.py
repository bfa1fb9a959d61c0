"""A Ray cluster: whether one is there, a connection to it, and what each actor takes of its nodes.

Ray waits for minutes where something else answers at an address, and cannot be told not to. So the
connection is tried first in a child process, which runs this module and has a time limit.

Reads: nothing. Writes: nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from featcache.errors import ConfigError
from featcache.files import child_process
from featcache.runtime import INTERRUPTS, available_cores

LOCAL = "local"
"""In place of an address: a Ray of our own on this machine, for as long as it is needed."""

_CONNECT_SECONDS = 5.0  # for a port to answer
_INIT_SECONDS = 15.0  # for Ray behind it; alone on two cores it takes 4 s, most of them an import


def check_ray(address: str) -> None:
    """Check that Ray is installed and that a cluster of its version answers at an address.

    Raises:
        ConfigError: If not; within 20 s.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "--ray", expected="the package ray", found="none",
            hint="pip install 'featcache[ray]', on every node",
        )  # fmt: skip
    if address == LOCAL or _is_connected():
        return
    if address != "auto":
        _check_port(address)
    command, environment = child_process(__spec__.name)
    try:
        done = subprocess.run(
            [*command, address], env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=_INIT_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        found = f"nothing that answers as Ray does within {_INIT_SECONDS:.0f} s"
        raise unreachable(address, found) from error
    if done.returncode:
        raise unreachable(address, "something that Ray's client ends at")
    if done.stdout:
        raise unreachable(address, done.stdout.decode("utf-8", "replace"))


def _is_connected() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _check_port(address: str) -> None:
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
        raise unreachable(address, error.strerror or str(error)) from error


def unreachable(address: str, found: str) -> ConfigError:
    """Return the error of an address where there is no cluster that can be used."""
    hint = "Start it with 'ray start --head', or pass --ray local to use this machine alone"
    return ConfigError("--ray", expected=f"a Ray cluster at {address}", found=found, hint=hint)


def main() -> NoReturn:
    """Connect to an address; write why it cannot be done, or nothing."""
    answer = os.dup(1)
    os.dup2(2, 1)  # Ray prints
    try:
        with connected(sys.argv[1]):
            os._exit(0)  # Ray's own way out takes a second
    except ConfigError as error:
        os.write(answer, str(error.found).encode())
    except Exception as error:  # noqa: BLE001 (a package of that name that is broken, say)
        os.write(answer, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".encode())
    os._exit(0)


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Yield the module ``ray``, connected; leave a connection that was there before as it is.

    Raises:
        ConfigError: If no cluster can be reached, or started.
    """
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
        # Else Ray puts the current folder first on the actors' ``sys.path``: a file ``numpy.py``
        # beside the images would run there. Only its own remote client is spared that.
        "job_config": ray.job_config.JobConfig(_client_job=True),
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
        # Other versions are told in six lines.
        found = " ".join(str(error).split())[:300] or type(error).__name__
        raise unreachable(address, found) from error


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
class Room:
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

    def fits(self, node: dict[str, Any]) -> bool:
        """Whether a node, as Ray lists them, is there and large enough."""
        found = node["Resources"] if node["Alive"] else {}
        return bool(found.get("CPU", 0) >= self.cores and found.get("GPU", 0) >= self.gpus)


def find_rooms(nodes: Sequence[dict[str, Any]], device: str, processes: int) -> list[Room]:
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
        rooms += [Room(i, number, _rounded(cores / number), part) for i in range(number)]
    return sorted(rooms, key=lambda room: room.index)


def _rounded(share: float) -> float:
    """Ray wants whole numbers above 1, and at most four digits below."""
    return math.floor(share) if share >= 1 else math.floor(share * 1e4) / 1e4


if __name__ == "__main__":
    main()
