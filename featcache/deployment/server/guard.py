"""What stands in front of every route of a server: who may ask, for how long, and how errors look.

Reads and writes: nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h11
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from featcache.deployment.server.uploads import Limits, RefusedError
from featcache.errors import FeatcacheError, printable

NOTICE = "Not for diagnosis: for research, and for whoever knows what this network was tested on."

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]
_DISCARDED_BYTES, _DISCARD_SECONDS = 1 << 28, 10.0


def error_body(error: FeatcacheError, **more: Any) -> bytes:
    """Return an error as ``featcache --json`` prints it, and that this is not for diagnosis."""
    facts = {
        "what": printable(error.what), "expected": printable(error.expected),
        "found": printable(error.found),
        "where": None if error.where is None else printable(error.where),
        "hint": printable(error.hint),
    }  # fmt: skip
    return json.dumps({"error": facts, "notice": NOTICE, **more}).encode()


def error_response(error: FeatcacheError, status: int, **more: Any) -> Response:
    """Return an error as a response, and when to try again where that may help."""
    headers = {"retry-after": "1"} if status == 503 else None
    body = error_body(error, **more)
    return Response(body, status, headers=headers, media_type="application/json")


class Hosts:
    """The names that a request may call this server by, in its ``Host`` header.

    A page of a stranger can let a name of its own lead to this machine (DNS rebinding), and would
    then read the answers as its own. Addresses cannot be made to lead elsewhere: all are allowed.

    Args:
        names: Allowed besides ``localhost`` and the names of this machine.
    """

    def __init__(self, names: Iterable[str]) -> None:
        own = {"localhost", socket.gethostname(), socket.getfqdn(), *names}
        self._names = {name.lower().rstrip(".") for name in own}

    def __contains__(self, host: str) -> bool:
        """Return whether a ``Host`` header, with or without a port, is allowed."""
        name = host.lower()
        if name.startswith("["):
            name = name[1:].partition("]")[0]
        elif name.count(":") == 1:
            name = name.partition(":")[0]
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(name)
            return True
        return name.rstrip(".") in self._names


class Guard:
    """Checks ``Host`` and ``Origin``, adds headers, and lets a client finish before it is refused.

    A client that is still sending when the connection is closed may never see the answer. So an
    early answer is sent at once, and what still comes is read and dropped for a while.

    Args:
        app: The routes.
        hosts: Names that this server may be called by.
    """

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send)
        try:
            self._check(exchange.headers)
            await self._app(scope, exchange.receive, exchange.send)
        except RefusedError as error:
            await exchange.refuse(error.status, error)
        except ClientDisconnect:
            pass  # nobody is there to be answered
        except Exception as error:  # noqa: BLE001 (the routes have answered)
            log_fault(error)

    def _check(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if host not in self._hosts:
            raise RefusedError(
                421, "Host", expected="localhost, an address or a name of this machine", found=host,
                hint="Another name has to be allowed with --allow-host",
            )  # fmt: skip
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise RefusedError(403, "Origin", expected="this page's own", found=origin)


def log_fault(error: BaseException) -> None:
    """Log where an unforeseen error was raised, not its message: that may name a patient."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = ""
    if place is not None:
        where = f" in {Path(place.tb_frame.f_code.co_filename).name}, line {place.tb_lineno}"
    logging.getLogger("featcache").error("serve: %s%s", type(error).__name__, where)


class _Exchange:
    """A request and its response: what of the body has come, and what was answered."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers = Headers(scope=scope)
        self._receive, self._send = receive, send
        length = self.headers.get("content-length", "0")
        self._has_more = length != "0" or "transfer-encoding" in self.headers
        # A client that waits for leave to send its body sends none once it is refused.
        self._has_begun = self.headers.get("expect", "").lower() != "100-continue"

    async def receive(self) -> Message:
        self._has_begun = True
        message = await self._receive()
        if not message.get("more_body", False):
            self._has_more = False
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            is_early = [(b"connection", b"close")] if self._has_more else []
            message = {**message, "headers": [*message["headers"], *_HEADERS, *is_early]}
        elif self._has_more and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            if self._has_begun:
                await self._discard()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    async def _discard(self) -> None:
        """Read what the client still sends, and drop it."""
        left = _DISCARDED_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_SECONDS):
                while self._has_more and left > 0:
                    left -= len((await self.receive()).get("body", b""))

    async def refuse(self, status: int, error: FeatcacheError) -> None:
        response = error_response(error, status)
        await response({"type": "http"}, self.receive, self.send)


def make_protocol(limits: Limits) -> type[H11Protocol]:
    """Return uvicorn's protocol, with a limit on connections and on the time for a request's head.

    Uvicorn has neither; a client that sends a byte now and then would hold its connection for ever.
    """

    class Protocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.num_connections:
                self._answer(503, "server", "a connection that is free", "too many others")
                return
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_watching()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            self._answer(400, "request", "HTTP", "something else")

        def _is_busy(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _watch(self) -> None:
            if self._is_busy() or self.transport.is_closing():
                self._stop_watching()
            elif self._timer is None:
                self._timer = self.loop.call_later(limits.header_seconds, self._give_up)

        def _stop_watching(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _give_up(self) -> None:
            self._timer = None
            if not self._is_busy() and not self.transport.is_closing():
                found = f"none after {limits.header_seconds:g} s"
                self._answer(408, "request", "its head", found)

        def _answer(self, status: int, what: str, expected: str, found: str) -> None:
            """Answer by hand, where there is no request that the routes could answer."""
            body = error_body(FeatcacheError(what, expected=expected, found=found))
            headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
            headers += [("connection", "close")]
            if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
                events: list[Any] = [
                    h11.Response(status_code=status, headers=headers), h11.Data(data=body),
                    h11.EndOfMessage(),
                ]  # fmt: skip
                for event in events:
                    self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

    return Protocol
