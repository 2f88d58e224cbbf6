"""Applications that learn by themselves that their client has left, and end in a way of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
from fastapi import APIRouter, FastAPI, Request, Response
from sse_starlette import EventSourceResponse
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from otel_tasks import create_task
from otel_tasks.asgi import TaskGroupMiddleware
from tests.e2e.journal import manager, note, noted, release_of, released, work

router = APIRouter()
either = router.api_route


async def _linger(key: str, what: str) -> None:
    """Await more than once after the disconnect, where that is allowed."""
    with noted(key, what):
        for _ in range(3):
            await asyncio.sleep(0.005)


def _start(key: str) -> None:
    create_task(work(key, "first"), name="first")


@either("/events/{key}", methods=["GET", "POST"])
async def events(key: str) -> EventSourceResponse:
    """sse-starlette listens, calls back, and runs the background task."""

    async def gone(_: Any) -> None:
        await _linger(key, "close handler")

    _start(key)
    return EventSourceResponse(
        _chunks(key),
        client_close_handler_callable=gone,
        background=BackgroundTask(_linger, key, "background"),
    )


@either("/stream/{key}", methods=["GET", "POST"])
async def stream(key: str) -> StreamingResponse:
    """Starlette listens, where the server's version of ASGI is below 2.4, and runs the background task."""
    _start(key)
    return StreamingResponse(_chunks(key), background=BackgroundTask(_linger, key, "background"))


async def _chunks(key: str) -> AsyncIterator[str]:
    note(key, "waits")
    yield "first\n"
    await released(key)
    yield "last\n"


@either("/catch/{key}", methods=["GET", "POST"])
async def catch(key: str, request: Request) -> None:
    """The handler reads a body that does not come, and catches what Starlette makes of it."""
    _start(key)
    note(key, "waits")
    try:
        await request.body()
    except ClientDisconnect:
        await _linger(key, "catcher")
    note(key, "handler returned")


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@either("/own-group/{key}", methods=["GET", "POST"])
async def own_group(key: str, request: Request) -> None:
    """A listener in a task group of the application tells the handler."""
    gone = asyncio.Event()

    async def listen() -> None:
        await _disconnect(request.receive)
        note(key, "told")
        gone.set()

    _start(key)
    await request.body()
    note(key, "waits")
    async with asyncio.TaskGroup() as group:
        group.create_task(listen())
        await gone.wait()
        await _linger(key, "rest")
    note(key, "handler returned")


@either("/own-scope/{key}", methods=["GET", "POST"])
async def own_scope(key: str, request: Request) -> None:
    """A listener in a task group of anyio's cancels its scope."""

    async def listen() -> None:
        await _disconnect(request.receive)
        group.cancel_scope.cancel()

    _start(key)
    await request.body()
    note(key, "waits")
    async with anyio.create_task_group() as group:
        group.start_soon(listen)
        await released(key)
        note(key, "came to its end")
    await _linger(key, "rest")
    note(key, "handler returned")


@either("/stray-listener/{key}", methods=["GET", "POST"])
async def stray_listener(key: str, request: Request) -> None:
    """A listener in a plain task that nobody awaits until it has told."""
    _start(key)
    await request.body()
    note(key, "waits")
    await asyncio.wait([asyncio.create_task(_disconnect(request.receive))])
    await _linger(key, "rest")
    note(key, "handler returned")


@either("/ignore/{key}", methods=["GET", "POST"])
async def ignore(key: str, request: Request) -> None:
    """A listener that only notes it: the handler goes on."""

    async def listen() -> None:
        await _disconnect(request.receive)
        note(key, "told")

    _start(key)
    await request.body()
    note(key, "waits")
    async with asyncio.TaskGroup() as group:
        group.create_task(listen())
        await released(key)
        await _linger(key, "rest")
    note(key, "handler returned")


async def sender(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that sends on until it cannot; see `_broken`."""
    key = scope["path"].rsplit("/", 1)[-1]
    _start(key)
    note(key, "waits")
    try:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"more\n", "more_body": True})
            await asyncio.sleep(0.01)
    except BrokenPipeError:
        note(key, "send failed")
    await _linger(key, "rest")
    note(key, "handler returned")


async def child_sender(scope: Scope, receive: Receive, send: Send) -> None:
    """The same in a child task."""
    async with asyncio.TaskGroup() as group:
        group.create_task(sender(scope, receive, send))


def _broken(app: ASGIApp) -> ASGIApp:
    """A server whose `send` raises: none of those here does, though ASGI 2.4 wants it."""

    async def served(scope: Scope, receive: Receive, send: Send) -> None:
        key = scope["path"].rsplit("/", 1)[-1]

        async def sending(message: Message) -> None:
            if release_of(f"{key}-gone").is_set():
                raise BrokenPipeError
            await send(message)

        await app(scope, receive, sending)

    return served


async def _noting(request: Request, call_next: RequestResponseEndpoint) -> Response:
    key = request.url.path.rsplit("/", 1)[-1]
    response = await call_next(request)
    await _linger(key, "after call_next")
    return response


def current_binding(app: ASGIApp) -> ASGIApp:
    return TaskGroupMiddleware(app, manager=manager)


def _routes(*layers: Callable[[ASGIApp], ASGIApp]) -> ASGIApp:
    app = FastAPI()
    app.include_router(router)
    for layer in layers:
        app.add_middleware(_Layer, layer=layer)
    return app


class _Layer:
    """A middleware made by a function, as Starlette adds one."""

    def __init__(self, app: ASGIApp, layer: Callable[[ASGIApp], ASGIApp]) -> None:
        self._app = layer(app)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        return self._app(scope, receive, send)


def _base(app: ASGIApp) -> ASGIApp:
    return BaseHTTPMiddleware(app, dispatch=_noting)


variants: dict[str, ASGIApp] = {
    "bare": _routes(),
    "bare-base": _routes(_base),
    "bare-bases": _routes(_base, _base),
    "listen": _routes(current_binding),
    "listen-inside": _routes(_base, current_binding),
    "listen-outside": _routes(current_binding, _base),
    "listen-between": _routes(_base, current_binding, _base),
    "bare-sender": _broken(sender),
    "listen-sender": _broken(current_binding(sender)),
    "bare-child-sender": _broken(child_sender),
    "listen-child-sender": _broken(current_binding(child_sender)),
}
