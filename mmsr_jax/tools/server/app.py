"""The application: routes, a pool of threads, and an end for every request.

POST /retrieve  {"queries": [...], "topk": 3, "return_scores": true}, as Search-R1's retrieval
                server takes it -> {"result": [[{"document": {...}, "score": x}, ...], ...]}, one
                list a query; without return_scores the documents alone. A document's `contents` is
                '"title"' in the first line, then the text; `title`, `link` and `text` stand beside.
POST /image     a picture as the body (and ?topk=), or JSON {"image": base64, "topk": 3}
                -> {"result": [{"title", "link", "score", "thumbnail": base64}, ...]}
GET /health     {"status": "ok", "passages": n, "pictures": n, ...}
GET /metrics    for Prometheus

Errors are {"error": {"kind": ..., "message": ...}} with a status of 4xx or 5xx.
"""

import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from mmsr_jax import __version__
from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.local import Passage, PictureEntry
from mmsr_jax.tools.server import requests
from mmsr_jax.tools.server.metrics import Metrics
from mmsr_jax.tools.server.requests import Limits, Refused

log = logging.getLogger(__name__)


class TextSearcher(Protocol):
    """A text index of any kind."""

    def __len__(self) -> int: ...

    def scored(self, query: str, topk: int) -> list[tuple[Passage, float]]: ...


class PictureSearcher(Protocol):
    """A picture index of any kind."""

    def __len__(self) -> int: ...

    def scored(self, picture: bytes, topk: int) -> list[tuple[PictureEntry, float]]: ...


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """How much the server does at a time."""

    threads: int = 0  # that search texts; 0 is twice the cores
    picture_threads: int = 4  # that search pictures: decoding one may take 200 MB
    body_bytes: int = 512_000_000  # of all requests under way; more are told to come again (503)
    waiting: int = 512  # requests under way at most; more are told to come again (503)
    deadline: float = 30.0  # seconds from the first byte of a request to its answer
    limits: Limits = Limits()

    def __post_init__(self):
        if self.threads < 0 or self.waiting < 1 or not self.deadline > 0:
            raise ValueError(
                f"threads {self.threads} (0 or more), waiting {self.waiting} (1 or more), "
                f"deadline {self.deadline} (above 0)"
            )
        if self.picture_threads < 1 or self.body_bytes < self.limits.picture_limit:
            raise ValueError(
                f"picture_threads {self.picture_threads} (1 or more), body_bytes "
                f"{self.body_bytes} ({self.limits.picture_limit} or more, one picture's)"
            )


def application(
    text: TextSearcher | None,
    pictures: PictureSearcher | None,
    config: ServerConfig | None = None,
    close: Callable[[], None] = lambda: None,
) -> Starlette:
    """The ASGI application over these indices; `close` is called when it has ended."""
    config = ServerConfig() if config is None else config
    server = _Server(text, pictures, config)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        try:
            yield
        finally:
            server.pool.shutdown(cancel_futures=True)
            server.decoders.shutdown(cancel_futures=True)
            close()

    routes = [
        Route("/retrieve", server.guard("/retrieve", server.retrieve), methods=["POST"]),
        Route("/image", server.guard("/image", server.image), methods=["POST"]),
        Route("/health", server.health, methods=["GET"]),
        Route("/metrics", server.metrics_page, methods=["GET"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _http})


class _Server:
    def __init__(self, text, pictures, config: ServerConfig):
        self.text, self.pictures, self.config = text, pictures, config
        threads = config.threads or 2 * (os.cpu_count() or 1)
        self.pool = concurrent.futures.ThreadPoolExecutor(threads, "search")
        self.decoders = concurrent.futures.ThreadPoolExecutor(config.picture_threads, "pictures")
        self.metrics = Metrics()
        self.held = 0  # bytes of bodies that are here, or may come

    def guard(
        self, path: str, answer: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """`answer` with a limit on what is under way, a deadline, named errors, and counts."""

        async def guarded(request: Request) -> Response:
            began, kind = time.perf_counter(), ""
            self.metrics.in_flight += 1
            try:
                if self.metrics.in_flight > self.config.waiting:
                    raise Refused(503, "overloaded", f"{self.config.waiting} requests are waiting")
                async with asyncio.timeout(self.config.deadline):
                    response = await answer(request)
            except Refused as error:
                kind, response = error.kind, _error(error.status, error.kind, str(error))
            except TimeoutError:
                kind = "timeout"
                response = _error(504, kind, f"no answer within {self.config.deadline:g} seconds")
            except ClientDisconnect:
                kind, response = "disconnected", Response(status_code=499)
            except Exception as error:
                log.exception("a request to %s failed", path)
                kind = "failed"
                response = _error(500, kind, type(error).__name__)
            finally:
                self.metrics.in_flight -= 1
            seconds = time.perf_counter() - began
            self.metrics.done(path, response.status_code, seconds, kind)
            return response

        return guarded

    async def retrieve(self, request: Request) -> Response:
        if self.text is None:
            raise Refused(404, "no_documents", "this index has pictures only")
        limits = self.config.limits
        with self._room(request, limits.json_bytes):
            data = await requests.body(request.stream(), limits.json_bytes)
            asked = requests.retrieve(data, limits)
        self.metrics.asked("/retrieve", len(asked.queries))
        found = await asyncio.gather(
            *(self._run(self.pool, self.text.scored, query, asked.topk) for query in asked.queries)
        )
        return JSONResponse({
            "result": [
                [
                    {"document": _document(passage), "score": score}
                    if asked.return_scores
                    else _document(passage)
                    for passage, score in passages
                ]
                for passages in found
            ]
        })  # fmt: skip

    async def image(self, request: Request) -> Response:
        if self.pictures is None:
            raise Refused(404, "no_pictures", "this index has documents only")
        limits = self.config.limits
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        is_json = kind == "application/json"
        limit = limits.picture_limit if is_json else limits.picture_bytes
        with self._room(request, limit):
            data = await requests.body(request.stream(), limit)
            query = request.query_params.get("topk")
            picture, topk = requests.picture(data, is_json, query, limits)
            self.metrics.asked("/image", 1)
            try:
                found = await self._run(self.decoders, self.pictures.scored, picture, topk)
            except ToolError as error:
                raise Refused(422, "bad_image", str(error)) from None
        return JSONResponse({
            "result": [
                {
                    "title": entry.title,
                    "link": entry.link,
                    "score": score,
                    "thumbnail": base64.b64encode(entry.thumbnail).decode("ascii"),
                }
                for entry, score in found
            ]
        })  # fmt: skip

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "version": __version__, **self._sizes()})

    async def metrics_page(self, request: Request) -> Response:
        return PlainTextResponse(
            self.metrics.text(self._sizes()), media_type="text/plain; version=0.0.4"
        )

    def _sizes(self) -> dict[str, int]:
        return {
            "passages": 0 if self.text is None else len(self.text),
            "pictures": 0 if self.pictures is None else len(self.pictures),
        }

    @contextlib.contextmanager
    def _room(self, request: Request, limit: int) -> Iterator[None]:
        """Sets memory aside for a body: what it says it has, or all that it may have."""
        said = request.headers.get("content-length", "")
        size = min(int(said), limit) if said.isascii() and said.isdigit() else limit
        if self.held + size > self.config.body_bytes:
            text = f"bodies of {self.held} bytes are under way, at most {self.config.body_bytes}"
            raise Refused(503, "overloaded", text)
        self.held += size
        try:
            yield
        finally:
            self.held -= size

    def _run(self, pool, function, *arguments) -> asyncio.Future:
        # What is past its deadline and has not begun is taken out of the queue by the cancelling.
        return asyncio.get_running_loop().run_in_executor(pool, function, *arguments)


def _document(passage: Passage) -> dict[str, str]:
    """As in Search-R1's corpora, whose clients cut `contents` after the first line."""
    title = " ".join(passage.title.split())
    return {
        "id": passage.link,
        "contents": f'"{title}"\n{passage.text}',
        "title": passage.title,
        "link": passage.link,
        "text": passage.text,
    }


def _error(status: int, kind: str, message: str) -> Response:
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse({"error": {"kind": kind, "message": message}}, status, headers)


async def _http(request: Request, error: Exception) -> Response:
    """404 and 405 in the shape of the other errors."""
    kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
    return _error(error.status_code, kind, f"{request.method} {request.url.path}: {error.detail}")
