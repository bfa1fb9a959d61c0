"""Serve: a page and a JSON endpoint that classify images with a run.

Reads: a run, and the images that are sent to it. Writes: nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.cache.by_url import by_url
from featcache.errors import ConfigError, warn_user
from featcache.runtime import Interrupted, Say, available_cores, held_signals, log_line

if TYPE_CHECKING:
    from featcache.deployment.recipes import Backbones, Weights
    from featcache.deployment.server.uploads import Limits

MAX_PIXELS = 1 << 26
"""By default, larger images are refused: a picture of so many takes 200 MB, one a core."""

_EXTRA = {"fastapi": "fastapi", "uvicorn": "uvicorn", "python_multipart": "python-multipart"}
_BACKLOG, _KEEP_ALIVE_SECONDS, _MORE_SECONDS = 128, 5, 1


@by_url("run")
def serve(
    run: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    allow_hosts: Iterable[str] = (),
    weights: Weights = None,
    backbone: Backbones = None,
    batch_size: int | str = "auto",
    device: str = "auto",
    max_pixels: int = MAX_PIXELS,
    limits: Limits | None = None,
    say: Say = log_line,
    ready: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Classify images over HTTP until a signal ends it: a page at ``/``, JSON at ``/predict``.

    What is sent is neither stored nor logged. There is no password and no encryption: on another
    address than a loopback one, everybody who reaches the machine can use it. Not for diagnosis.

    Args:
        run: The run folder.
        host: The address to listen on.
        port: The port; 0 for any that is free.
        allow_hosts: Names that a ``Host`` header may have besides ``localhost``, addresses and this
            machine's own names.
        weights: The backbone's weights file: see ``predict``.
        backbone: The backbone itself: see ``predict``.
        batch_size: Images a batch, or ``auto``.
        device: Where the backbone runs: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        max_pixels: Images of more pixels are refused.
        limits: Bytes, files, requests and seconds that are taken.
        say: Gets lines for people.
        ready: Called with ``url`` and ``card`` once requests are answered.

    Raises:
        ConfigError: If the extra ``serve`` is not installed, or the address cannot be listened on.
        RunError: If the run is not whole.
        BackboneError: If the backbone's weights are not at hand.
        Interrupted: After SIGINT, SIGTERM or SIGHUP, once the requests in hand are answered. It is
            a ``KeyboardInterrupt``.
    """
    require_extra()
    from featcache.deployment.classifier import load_classifier
    from featcache.deployment.server.guard import Hosts
    from featcache.deployment.server.routes import Service
    from featcache.deployment.server.uploads import Limits
    from featcache.deployment.server.work_queue import WorkQueue

    limits = limits or Limits()
    listener = _listen(host, port)
    with contextlib.closing(listener):
        address, number = listener.getsockname()[:2]
        if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            warn_user(
                f"--host {host}: whoever reaches this machine can use it, without a password and "
                "without encryption; leave --host out, or put a proxy with both in front"
            )
        classifier = load_classifier(
            run, weights=weights, backbone=backbone, device=device, batch_size=batch_size,
            max_pixels=max_pixels,
        )  # fmt: skip
        num_decoders = available_cores()
        with WorkQueue(
            classifier, num_decoders=num_decoders, decode_seconds=limits.decode_seconds
        ) as work:
            service = Service(classifier, work, limits, Hosts([host, *allow_hosts]))
            url = f"http://{f'[{address}]' if ':' in address else address}:{number}/"

            def tell() -> None:
                say(f"{classifier!r} at {url}")
                say("not for diagnosis; nothing is stored; Ctrl-C ends it")
                if ready is not None:
                    ready({"url": url, "card": service.card})

            _run_server(service, limits, listener, tell)


def require_extra() -> None:
    """Refuse to go on without the packages of the extra ``serve``.

    Raises:
        ConfigError: If one of them is not installed.
    """
    missing = [name for module, name in _EXTRA.items() if not importlib.util.find_spec(module)]
    if missing:
        raise ConfigError(
            "serve", expected=", ".join(_EXTRA.values()), found=f"no {', '.join(missing)}",
            hint="Install them with pip install 'featcache[serve]'",
        )  # fmt: skip


def _listen(host: str, port: int) -> socket.socket:
    if port not in range(1 << 16):
        raise ConfigError("--port", expected="0 to 65535", found=port)
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}", expected="an address to listen on",
            found=error.strerror or error, hint="Use another --port, or 0 for any that is free",
        ) from error  # fmt: skip


def _run_server(
    service: Any, limits: Limits, listener: socket.socket, ready: Callable[[], None]
) -> None:  # fmt: skip
    """Answer requests until a signal comes, and then those in hand."""
    import logging

    import uvicorn

    from featcache.deployment.server.guard import make_protocol

    for name in ("uvicorn", "uvicorn.error", "python_multipart"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they would quote from requests

    with held_signals() as check:

        class Server(uvicorn.Server):
            stopped_by = 0

            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield  # they are held

            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                ready()

            async def on_tick(self, counter: int) -> bool:
                try:
                    check()
                except Interrupted as stop:
                    self.stopped_by = stop.signal_number
                    service.drain()
                    return True
                return await super().on_tick(counter)

        server = Server(
            uvicorn.Config(
                service.app, http=make_protocol(limits), ws="none", lifespan="off", loop="asyncio",
                log_config=None, access_log=False, server_header=False, proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(limits.drain_seconds) + _MORE_SECONDS,
            )
        )  # fmt: skip
        server.run([listener])
        if server.stopped_by:
            raise Interrupted(
                server.stopped_by,
                "interrupted: the requests in hand were answered; the same command starts again",
            )
