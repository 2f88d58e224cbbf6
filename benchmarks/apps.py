"""The applications that serve the requests, each with the middleware to be compared around it.

``uvicorn --factory benchmarks.apps:from_environment`` serves one of them; ``BENCH_APP`` names application
and side.
"""

from __future__ import annotations

import asyncio
import gc
import os
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.middleware.base import BaseHTTPMiddleware

from benchmarks.names import ANYIO, BASE_HTTP, LISTENER, NONE, OURS, POLLING, RULE, WATCHER
from otel_tasks.asgi import TaskGroupMiddleware

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping

    from starlette.requests import Request
    from starlette.responses import Response

    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


CHUNKS = 200
# Seconds that a request of /wait takes: long enough to be watched.
WAIT = 0.2


async def raw(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    """Answer without ever giving the loop a turn."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def raw_suspending(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    """Answer after a turn of the loop."""
    await asyncio.sleep(0)
    await raw(scope, receive, send)


class Order(BaseModel):
    """The body of the POST."""

    item: str
    count: int


def fastapi_app() -> FastAPI:
    """A small service."""
    app = FastAPI()

    @app.get("/hello/{name}")
    async def hello(name: str) -> dict[str, str]:
        return {"hello": name}

    @app.post("/orders")
    async def order(order: Order) -> Order:
        return order

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(CHUNKS):
                yield b"chunk"

        return StreamingResponse(chunks())

    @app.get("/wait")
    async def wait() -> None:
        await asyncio.sleep(WAIT)

    return app


class Watcher:
    """The handwritten way: a task per request reads ahead and cancels the handler."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve a request, beside its watcher."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages: asyncio.Queue[Message] = asyncio.Queue()
        host = asyncio.current_task()
        watcher = asyncio.create_task(watch(receive, messages, host))
        try:
            await self.app(scope, messages.get, send)
        except asyncio.CancelledError:
            if host is None or not watcher.done():
                raise
            host.uncancel()
        finally:
            watcher.cancel()


async def watch(receive: Receive, messages: asyncio.Queue[Message], host: asyncio.Task[Any] | None) -> None:
    """Read on behalf of the application, until the client has left."""
    while True:
        message = await receive()
        messages.put_nowait(message)
        if message["type"] == "http.disconnect":
            if host is not None:
                host.cancel()
            return


class AnyioGroup:
    """The same with anyio: the watcher runs in a task group, and cancels its scope."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve a request in a task group."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages: asyncio.Queue[Message] = asyncio.Queue()
        async with anyio.create_task_group() as group:
            group.start_soon(self.watch, receive, messages, group.cancel_scope)
            await self.app(scope, messages.get, send)
            group.cancel_scope.cancel()

    async def watch(
        self, receive: Receive, messages: asyncio.Queue[Message], scope: anyio.CancelScope
    ) -> None:
        """Read on behalf of the application, until the client has left."""
        while True:
            message = await receive()
            messages.put_nowait(message)
            if message["type"] == "http.disconnect":
                scope.cancel()
                return


class DoNothing(BaseHTTPMiddleware):
    """Starlette's convenient base class, with nothing in it."""

    async def dispatch(
        self, request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        """Pass on."""
        return await call_next(request)


class Polling(BaseHTTPMiddleware):
    """A task beside the handler polls the request, and cancels the handler when its client has left.

    A first look at once would take the body from the application.
    """

    async def dispatch(
        self, request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        """Serve a request, beside its poller."""
        handler = asyncio.ensure_future(call_next(request))
        poller = asyncio.create_task(self.poll(request, handler))
        try:
            return await handler
        finally:
            poller.cancel()

    async def poll(self, request: Request, handler: asyncio.Future[Response]) -> None:
        """Look ten times a second."""
        await asyncio.sleep(0.1)
        while not await request.is_disconnected():  # noqa: ASYNC110  # this is what is measured
            await asyncio.sleep(0.1)
        handler.cancel()


def _probed(side: str) -> App:
    from benchmarks.disconnect import Probed

    return Probed(listens=side == LISTENER)


def _tuned(side: str) -> App:
    # As docs/howto/fastapi.md recommends.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)
    return _probed(side)


def _gateway() -> FastAPI:
    from benchmarks.streams import gateway

    return gateway()


MIDDLEWARE: dict[str, Any] = {
    NONE: None,
    LISTENER: None,
    OURS: TaskGroupMiddleware,
    RULE: partial(TaskGroupMiddleware, cancel_handler="safe, POST /v1/*"),
    WATCHER: Watcher,
    ANYIO: AnyioGroup,
    BASE_HTTP: DoNothing,
    POLLING: Polling,
}
APPS: dict[str, Any] = {
    "raw": lambda _: raw,
    "raw-suspending": lambda _: raw_suspending,
    "fastapi": lambda _: fastapi_app(),
    "probed": _probed,
    "probed-tuned": _tuned,
    "gateway": lambda _: _gateway(),
}


def make_app(kind: str, side: str) -> Any:
    """An application with one middleware around it, put there as its framework wants it."""
    app, middleware = APPS[kind](side), MIDDLEWARE[side]
    if middleware is None:
        return app
    if isinstance(app, FastAPI):
        app.add_middleware(middleware)
        return app
    return middleware(app)


def from_environment() -> Any:
    """The application that ``BENCH_APP`` names, as ``kind:side``."""
    kind, _, side = os.environ["BENCH_APP"].partition(":")
    return make_app(kind, side)
