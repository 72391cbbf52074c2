"""The application: POST /predict, /healthz, /metrics, and a start page that shows what a run predicts."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import importlib.resources
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from http import HTTPStatus
from typing import Any

import anyio
import numpy as np
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vixml_jax import __version__
from vixml_jax.serving.batching import Batcher, Full
from vixml_jax.serving.label_pictures import LabelPictures
from vixml_jax.serving.limits import Limits
from vixml_jax.serving.requests import Held, Query, Refused, read_query
from vixml_jax.xmc_model import XmcModel

PAGE = "page.html"
# Pictures unpacked at the same time: each may take 4 bytes a pixel for a moment.
UNPACKED_AT_ONCE = 2
# Seconds after which a refused client may come back.
RETRY_AFTER = 1
# Paths that are counted by name; any other is "other", so that no client can fill the memory with names.
PATHS = ("/", "/predict", "/healthz", "/metrics", "/info")
HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}


class Service:
    """A run, ready to answer over HTTP; `app` is the ASGI application.

    Args:
      model: the run.
      limits: of requests.
      token: clients must send as "Authorization: Bearer TOKEN"; None for anyone.
    """

    def __init__(self, model: XmcModel, limits: Limits, token: str | None = None):
        self._model, self._limits, self._token = model, limits, token
        self._started = time.time()
        self._held = Held(limits.held_bytes)
        self._unpacking = anyio.CapacityLimiter(UNPACKED_AT_ONCE)
        self._pictures = LabelPictures(model.dataset, model.changes)
        self._page = importlib.resources.files("vixml_jax.serving").joinpath(PAGE).read_text("utf-8")
        self._registry = CollectorRegistry()
        self._requests = self._metric(Counter, "requests", "Requests", ["path", "status"])
        self._seconds = self._metric(Histogram, "request_seconds", "Time of a request to /predict")
        sizes = [2**i for i in range(11)]
        self._batches = self._metric(Histogram, "batch_size", "Queries computed together", buckets=sizes)
        self._metric(Gauge, "queue_length", "Queries that wait").set_function(lambda: self._batcher.waiting)
        ProcessCollector(registry=self._registry)
        self._batcher: Batcher[Any, list[dict[str, Any]]] = Batcher(
            self._answer,
            max_batch=limits.batch,
            max_wait=limits.wait_seconds,
            max_queue=limits.queue,
            on_batch=self._batches.observe,
        )
        self.app = Starlette(
            routes=[
                Route("/", self._start_page),
                Route("/predict", self._predict, methods=["POST"]),
                Route("/healthz", self._health),
                Route("/metrics", self._metrics),
                Route("/info", self._info),
                Route("/labels/{number:int}/picture", self._label_picture),
            ],
            lifespan=self._lifespan,
            middleware=[Middleware(_Counted, requests=self._requests)],
            exception_handlers={HTTPException: _http_error, Refused: _refused, Exception: _bug},
        )

    def warm_up(self) -> None:
        """Compiles for batches of the usual sizes, of short texts and long ones, so that no client waits."""
        titles = list(self._model.dataset.test.titles[: self._limits.batch]) or ["a"]
        images = [Image.new("RGB", (8, 8))] if self._model.uses_images else []
        size = 1
        while size < 2 * self._limits.batch:
            texts = [titles[i % len(titles)] for i in range(min(size, self._limits.batch))]
            for repeats in (1, 50):  # longer than any run reads
                self._answer([(" ".join([text] * repeats), images, 10) for text in texts])
            size *= 2

    def _metric(self, kind: Any, name: str, text: str, labels: Sequence[str] = (), **options: Any) -> Any:
        return kind(f"vixml_{name}", text, labels, registry=self._registry, **options)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._batcher.start()
        try:
            yield
        finally:
            await self._batcher.stop()

    async def _predict(self, request: Request) -> Response:
        self._authorise(request)
        with self._seconds.time():
            with self._held.claim() as count:
                query = await read_query(request, self._limits, count)
                if query.images and not self._model.uses_images:
                    raise Refused(
                        HTTPStatus.BAD_REQUEST, "this run was trained without pictures: send a text alone"
                    )
                images = await self._unpacked(query)
            (text,) = self._model.texts_of([{"title": query.title, "content": query.content}])
            # A run that reads another field than the one that was given still has something to go by.
            try:
                async with asyncio.timeout(self._limits.answer_seconds):
                    labels = await self._batcher.ask((text or query.title, images, query.k))
            except (Full, TimeoutError):
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests wait") from None
            return JSONResponse({"labels": labels}, headers=HEADERS)

    async def _unpacked(self, query: Query) -> list[Image.Image]:
        images = []
        for number, image in enumerate(query.images, 1):
            opened = await anyio.to_thread.run_sync(
                self._model.fitted_picture, image, limiter=self._unpacking, abandon_on_cancel=False
            )
            if opened is None:
                raise Refused(HTTPStatus.BAD_REQUEST, f"picture {number} cannot be read")
            images.append(opened)
        return images

    def _answer(self, queries: Sequence[tuple[str, list[Image.Image], int]]) -> list[list[dict[str, Any]]]:
        """Labels of a batch of (text, pictures, k)."""
        k = max(k for _, _, k in queries)
        images = [images for _, images, _ in queries] if self._model.uses_images else None
        answers = self._model.predict_named([text for text, _, _ in queries], images, k)
        return [labels[:k] for labels, (_, _, k) in zip(answers, queries, strict=True)]

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", "seconds": round(time.time() - self._started)}, headers=HEADERS)

    async def _metrics(self, request: Request) -> Response:
        self._authorise(request)
        return Response(
            generate_latest(self._registry), headers={**HEADERS, "Content-Type": CONTENT_TYPE_LATEST}
        )

    async def _info(self, request: Request) -> Response:
        self._authorise(request)
        return JSONResponse(await run_in_threadpool(self._about), headers=HEADERS)

    def _about(self) -> dict[str, Any]:
        model = self._model
        rows = np.linspace(0, len(model.dataset.test) - 1, 6).astype(np.int64)
        return {
            "version": __version__,
            "run": model.name,
            "dataset": model.dataset.name,
            "labels": model.changes.total - len(model.changes.removed),
            "images": self._limits.images if model.uses_images else 0,
            "max_k": self._limits.k,
            "examples": list(dict.fromkeys(filter(None, model.dataset.test.titles[rows]))),
        }

    async def _label_picture(self, request: Request) -> Response:
        self._authorise(request)
        picture = await run_in_threadpool(self._pictures.thumbnail, request.path_params["number"])
        if picture is None:
            raise Refused(HTTPStatus.NOT_FOUND, "this label has no picture")
        headers = {**HEADERS, "Cache-Control": "private, max-age=3600"}
        return Response(picture, media_type="image/jpeg", headers=headers)

    async def _start_page(self, _: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )
        headers = {**HEADERS, "Content-Security-Policy": policy}
        return Response(self._page.replace("$nonce", nonce), media_type="text/html", headers=headers)

    def _authorise(self, request: Request) -> None:
        if self._token is None:
            return
        given = request.headers.get("authorization", "")
        scheme, _, token = given.partition(" ")
        same = hmac.compare_digest(token.strip().encode("utf-8", "replace"), self._token.encode())
        if scheme.lower() != "bearer" or not same:
            raise Refused(HTTPStatus.UNAUTHORIZED, "a token is needed: Authorization: Bearer TOKEN")


class _Counted:
    """Counts every response by path and status."""

    def __init__(self, app: ASGIApp, requests: Counter):
        self._app, self._requests = app, requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in PATHS else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted)


def _problem(status: int, problem: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": problem}, status, headers={**HEADERS, **(headers or {})})


def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = {
        HTTPStatus.UNAUTHORIZED: {"WWW-Authenticate": "Bearer"},
        HTTPStatus.SERVICE_UNAVAILABLE: {"Retry-After": str(RETRY_AFTER)},
    }
    return _problem(error.status, error.problem, headers.get(error.status))


def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _problem(error.status_code, error.detail.lower(), dict(error.headers or {}))


def _bug(_: Request, __: Exception) -> Response:
    return _problem(HTTPStatus.INTERNAL_SERVER_ERROR, "an error of the service; its log has it")
