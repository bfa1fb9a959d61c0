"""The bridge to Ray: a child process of the command, the only one of its processes that Ray is in.

Ray waits for minutes where something else answers at an address, takes over signals, prints, and
ends its process at once where the node's own part of it ends: a child can be given up and missed.
Run as a module, it answers first whether there is a cluster, and then carries orders to actors and
their answers back, as pickles. It says that it lives, every two seconds, by an empty line for the
user. A bridge whose input ends has lost the command: it ends, and with it all actors.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from typing import Any, NoReturn

from featcache.child import send
from featcache.extraction.workers.ray_cluster import LOCAL, unreachable
from featcache.runtime import INTERRUPTS, available_cores

_BEAT_SECONDS = 2.0


def main() -> NoReturn:
    """Connect to the address in the command line, and carry orders until there are no more."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # Ray prints
    lock = threading.Lock()

    def tell(*message: object) -> None:
        with lock, contextlib.suppress(OSError):  # the command is gone: the input ends as well
            send(answers, message)

    def live() -> None:
        while True:
            tell(None, "")
            time.sleep(_BEAT_SECONDS)

    with contextlib.ExitStack() as stack:
        try:
            import ray

            untyped: Any = ray
            _connect(untyped, sys.argv[1], stack)
        except Exception as error:  # noqa: BLE001 (Ray raises many kinds, also plain ones)
            # Other versions are told in six lines.
            found = " ".join(str(error).split())[:300] or type(error).__name__
            tell(unreachable(sys.argv[1], found))
        else:
            for number in INTERRUPTS:  # a scheduler's come to all processes: the command says what
                signal.signal(number, signal.SIG_IGN)
            tell(untyped.nodes())
            threading.Thread(target=live, name="featcache-live", daemon=True).start()
            with contextlib.suppress(EOFError):
                from featcache.extraction.workers.ray_workers import serve  # imports torch

                serve(untyped, sys.argv[1], tell)
    os._exit(0)


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
    ray.init(**options)


if __name__ == "__main__":
    main()
