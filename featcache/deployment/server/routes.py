"""The routes of a server: the page, predictions, explanations, its state and its card.

Nothing of a request is kept, and nothing of it is logged.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jinja2
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from featcache import __version__
from featcache.deployment.classifier import Classifier
from featcache.deployment.predictions import Predictions
from featcache.deployment.server.guard import NOTICE, Guard, Hosts, error_response
from featcache.deployment.server.uploads import (
    Limits,
    RefusedError,
    Upload,
    busy,
    read_uploads,
)
from featcache.deployment.server.work_queue import WorkQueue
from featcache.errors import DataError, FeatcacheError
from featcache.files import optional_json_object

_FIGURES = (
    "num_samples", "accuracy", "balanced_accuracy", "roc_auc", "average_precision", "positive",
    "sensitivity", "specificity", "per_class", "intervals",
)  # fmt: skip
_MAX_BYTES = 1 << 26
_PAGE = Path(__file__).parent / "page"
_KINDS = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
_TOO_MANY_PIXELS = "above --max-pixels"  # of pixels.decoding


class Service:
    """Answers requests with a run.

    Args:
        classifier: The run, with its backbones.
        work: Where files are decoded and classified.
        limits: What is taken.
        hosts: Names that this server may be called by.

    Attributes:
        app: The ASGI application.
        card: What the run is: see ``describe``.
    """

    def __init__(
        self, classifier: Classifier, work: WorkQueue, limits: Limits, hosts: Hosts
    ) -> None:  # fmt: skip
        self._work, self._limits = work, limits
        self._task = classifier.run.task
        self.card = describe(classifier, work, limits)
        self._page = _render_page(self.card)
        self._last: float | None = None  # the time by which all in hand have been answered
        self._num_requests, self._bytes_left = 0, limits.waiting_bytes
        self._clocks: set[asyncio.Timeout] = set()
        routes = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
        read = ["GET", "HEAD"]
        routes.add_api_route("/", self._show_page, methods=read)
        routes.add_api_route("/page/{name}", _show_file, methods=read)
        routes.add_api_route("/health", self._show_health, methods=read)
        routes.add_api_route("/card", self._show_card, methods=read)
        routes.add_api_route("/predict", self._predict, methods=["POST"])
        routes.add_api_route("/explain", self._explain, methods=["POST"])
        for kind in (HTTPException, RefusedError, Exception):
            routes.add_exception_handler(kind, _answer_error)
        self.app = Guard(routes, hosts)

    def drain(self) -> None:
        """Take no further request, and give those in hand a last limit of time."""
        self._last = asyncio.get_running_loop().time() + self._limits.drain_seconds
        for clock in self._clocks:
            self._shorten(clock)

    @property
    def is_draining(self) -> bool:
        """Whether no request is taken any more."""
        return self._last is not None

    async def _show_page(self) -> Response:
        return Response(self._page, media_type="text/html")

    async def _show_health(self) -> Response:
        status = "draining" if self.is_draining else "ok"
        facts = {"status": status, "num_requests": self._num_requests, "notice": NOTICE}
        return _json(facts, 503 if self.is_draining else 200)

    async def _show_card(self) -> Response:
        return _json(self.card)

    async def _predict(self, request: Request) -> Response:
        async with self._take(request, self._limits) as uploads:
            waiting = [self._work.compute(upload.data) for upload in uploads]
            rows = await asyncio.gather(*map(asyncio.wrap_future, waiting))
            names = [upload.name or str(number) for number, upload in enumerate(uploads)]
            predictions = await asyncio.wrap_future(self._work.predict(names, rows))
        if not predictions.paths:
            return _none_readable(predictions)
        return _json({"notice": NOTICE} | predictions.as_dict())

    async def _explain(self, request: Request) -> Response:
        async with self._take(request, replace(self._limits, num_files=1)) as (upload,):
            name = upload.name or "0"
            try:
                explanation, picture = await asyncio.wrap_future(
                    self._work.explain(name, upload.data)
                )
            except DataError as error:
                failures = [{"path": name, "reason": str(error.found)}]
                status = 413 if _TOO_MANY_PIXELS in str(error.found) else 422
                return error_response(error, status, failures=failures)
        facts = explanation.as_dict()
        for row in facts["nearest"]:
            del row["path"]  # of a patient, perhaps, who is none of the client's
        url = "data:image/png;base64," + base64.b64encode(picture).decode()
        return _json({"notice": NOTICE, "explanation": facts, "picture": url})

    @contextlib.asynccontextmanager
    async def _take(self, request: Request, limits: Limits) -> AsyncIterator[list[Upload]]:
        """Take a request in hand and yield its files; the block is limited in time."""
        if self.is_draining:
            raise busy("a server that is not about to end")
        if self._num_requests >= limits.num_requests:
            raise busy(f"at most {limits.num_requests} requests in hand")
        held = [0]
        self._num_requests += 1
        try:
            async with self._within(limits.body_seconds, 408, "the whole body"):
                stream = self._count(request.stream(), held)
                uploads = await read_uploads(request.headers, stream, limits)
            async with self._within(limits.work_seconds, 503, "an answer"):
                yield uploads
        finally:
            self._num_requests -= 1
            self._bytes_left += held[0]

    @contextlib.asynccontextmanager
    async def _within(self, seconds: float, status: int, expected: str) -> AsyncIterator[None]:
        """Limit a block in time; ``drain`` may shorten it."""
        try:
            async with asyncio.timeout(seconds) as clock:
                self._clocks.add(clock)
                self._shorten(clock)
                try:
                    yield
                finally:
                    self._clocks.discard(clock)
        except TimeoutError as error:
            if self.is_draining:
                raise busy("a server that is not about to end") from error
            found = f"none after {seconds:g} s"
            raise RefusedError(status, "request", expected=expected, found=found) from error

    def _shorten(self, clock: asyncio.Timeout) -> None:
        if self._last is not None and (clock.when() or self._last) >= self._last:
            clock.reschedule(self._last)

    async def _count(self, stream: AsyncIterator[bytes], held: list[int]) -> AsyncIterator[bytes]:
        """Yield a body while there is memory for it."""
        async for chunk in stream:
            if len(chunk) > self._bytes_left:
                raise busy("memory for this request")
            self._bytes_left -= len(chunk)
            held[0] += len(chunk)
            yield chunk


def describe(classifier: Classifier, work: WorkQueue, limits: Limits) -> dict[str, Any]:
    """Return what a run is and what the server takes, as JSON values."""
    run = classifier.run
    novelty, decisions = classifier.novelty, classifier.decisions
    return {
        "notice": NOTICE,
        "classes": list(run.classes),
        "task": run.task,
        "backbones": [
            {"name": recipe.backbone.name, "image_size": recipe.backbone.image_size,
             "fingerprint": cache["fingerprint"],
             "weights_sha256": cache["identity"].get("weights_sha256"),
             "weights_source": cache.get("weights_source")}
            for recipe, cache in zip(classifier.recipes, run.caches, strict=True)
        ],
        "engines": [
            {"name": engine.name, "device": str(engine.device), "batch_size": engine.batch_size,
             "parity": max(engine.parity, default=None)}
            for engine in work.engines
        ],
        "head": {"hidden": list(run.head.hidden), "num_members": run.num_members,
                 "weights_sha256": run.weights_sha256},
        "decision": None if decisions is None else decisions.brief(),
        "novelty": None if novelty is None else novelty.facts,
        "evaluation": _evaluations(classifier),
        "limits": asdict(limits) | {"max_pixels": classifier.recipe.rules.max_pixels},
        "version": __version__,
    }  # fmt: skip


def _evaluations(classifier: Classifier) -> dict[str, dict[str, Any]]:
    """Return the figures of each split that the run was measured on, without any path."""
    found = {}
    for path in sorted(classifier.run.path.glob("evaluation/*.json")):
        facts = optional_json_object(path, max_bytes=_MAX_BYTES)
        if facts.get("fingerprint") == classifier.run.cache["fingerprint"]:
            found[path.stem] = {key: facts[key] for key in _FIGURES if key in facts}
    return found


def _render_page(card: dict[str, Any]) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    text = (_PAGE / "page.html.jinja").read_text("utf-8")
    return environment.from_string(text).render(card=card)


async def _show_file(name: str) -> Response:
    kind = _KINDS.get(Path(name).suffix)
    if kind is None or name not in {"page.css", "page.js"}:
        raise HTTPException(404)
    return Response((_PAGE / name).read_bytes(), media_type=kind)


async def _answer_error(request: Request, error: Exception) -> Response:
    """Return whatever was raised in the form of all errors."""
    if isinstance(error, RefusedError):
        return error_response(error, error.status)
    status = error.status_code if isinstance(error, HTTPException) else 500
    expected = {404: "/, /predict, /explain, /health or /card", 405: "another method"}
    failed = FeatcacheError(
        "request", expected=expected.get(status, "an answer"), found=f"status {status}"
    )
    return error_response(failed, status)


def _none_readable(predictions: Predictions) -> Response:
    path, reason = predictions.failures[0]
    failures = [{"path": path, "reason": reason} for path, reason in predictions.failures]
    is_large = all(_TOO_MANY_PIXELS in reason for _, reason in predictions.failures)
    error = DataError(
        "images", expected="one or more that can be read", where=path,
        found=f"none of {len(failures):,}, the first being {reason}",
    )  # fmt: skip
    return error_response(error, 413 if is_large else 422, failures=failures)


def _json(facts: dict[str, Any], status: int = 200) -> Response:
    body = json.dumps(facts, allow_nan=False).encode()
    return Response(body, status, media_type="application/json")
