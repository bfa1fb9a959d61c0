"""A Ray cluster, without Ray: its address, and what each actor takes of its nodes."""

from __future__ import annotations

import importlib.util
import math
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from featcache.errors import ConfigError

LOCAL = "local"
"""In place of an address: a Ray of our own on this machine, for as long as it is needed."""

_CONNECT_SECONDS = 5.0  # for a port to answer


def check_address(address: str) -> None:
    """Check that Ray is installed and that something listens at an address.

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
        raise unreachable(address, error.strerror or str(error)) from error


def unreachable(address: str, found: str) -> ConfigError:
    """Return the error of an address where there is no cluster that can be used."""
    hint = "Start it with 'ray start --head', or pass --ray local to use this machine alone"
    return ConfigError("--ray", expected=f"a Ray cluster at {address}", found=found, hint=hint)


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

    @property
    def size(self) -> str:
        """In words."""
        return f"{self.cores:g} cores" + (f", {self.gpus:g} GPU" if self.gpus else "")

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
