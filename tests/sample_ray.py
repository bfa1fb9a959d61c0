"""A real Ray cluster on this machine, whose raylets can be killed."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_CLONE_NEWNS = 0x20000
_MS_REC_PRIVATE = 0x4000 | 1 << 18


class Nodes:
    """A head without cores, and raylets of a core each, all on this machine."""

    def __init__(self, number: int = 2) -> None:
        from ray._private import utils
        from ray.cluster_utils import Cluster

        utils.set_sigterm_handler = lambda handler: None  # nodes are added by another thread
        # It lives as long as they do: Ray asks Linux to kill a raylet when the thread that has
        # started it ends (PR_SET_PDEATHSIG).
        self._thread, self._others = ThreadPoolExecutor(1), list[ThreadPoolExecutor]()
        # Ray takes half a minute to believe that a node is dead.
        health = {
            "health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000,
            "health_check_timeout_ms": 5000, "health_check_failure_threshold": 4,
        }  # fmt: skip
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": health}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self.add() for _ in range(number)]
        self.address = self.cluster.address

    def add(self) -> Any:
        """Return another raylet of a core."""
        return self._thread.submit(self.cluster.add_node, num_cpus=1).result()

    def add_without(self, folder: Path) -> None:
        """Add a raylet of two cores, in whose processes a folder is empty. Needs to be root."""

        def hide() -> None:  # of this thread and what it starts
            libc = ctypes.CDLL(None, use_errno=True)
            done = libc.unshare(_CLONE_NEWNS)
            private = (b"none", b"/", None, _MS_REC_PRIVATE, None)
            empty = (b"tmpfs", os.fsencode(folder), b"tmpfs", 0, None)
            if done or libc.mount(*private) or libc.mount(*empty):
                raise OSError(ctypes.get_errno(), "no mount namespace")
            self.nodes.append(self.cluster.add_node(num_cpus=2))

        self._others.append(ThreadPoolExecutor(1))
        self._others[-1].submit(hide).result()

    def kill_raylet(self, number: int) -> None:
        """Kill one."""
        raylet = self.nodes[number].all_processes["raylet"][0].process
        raylet.kill()
        raylet.wait()

    def replace_raylet(self, number: int) -> None:
        """Kill one, and let another one take its place."""
        self.kill_raylet(number)
        self.nodes[number] = self.add()


@contextlib.contextmanager
def started_nodes(number: int = 2) -> Iterator[Nodes]:
    """Yield a cluster; stop it."""
    before = dict(os.environ)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    made = Nodes(number)
    try:
        yield made
    finally:
        made.cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)


def find_actors(word: str) -> list[int]:
    """Return the actors whose raylets have a word in their command lines: a cluster's address."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"ray::FeatcacheActor"):
                status = path.with_name("stat").read_text("ascii", "replace")
                parent = status.rpartition(")")[2].split()[1]
                if word.encode() in Path(f"/proc/{parent}/cmdline").read_bytes():
                    found.append(int(path.parent.name))
    return sorted(found)
