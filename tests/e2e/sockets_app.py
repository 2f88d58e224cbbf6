"""WebSockets whose handlers end in all the ways they can when their client leaves."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, FastAPI, WebSocket
from starlette.types import ASGIApp

from otel_tasks import create_task
from otel_tasks.asgi import TaskGroupMiddleware
from tests.e2e.journal import manager, note_trace, noted, released, work

router = APIRouter()


async def _accept(socket: WebSocket, key: str) -> None:
    await socket.accept()
    note_trace(key)
    create_task(work(key, "first"), name="first")


@router.websocket("/socket/{how}/{key}")
async def socket(socket: WebSocket, how: str, key: str) -> None:
    """Accept, start a task, and go on until the client has left."""
    await _accept(socket, key)
    with noted(key):
        await _HOWS[how](socket, key)


async def _receive(socket: WebSocket, _: str) -> None:
    # As FastAPI's tutorial has it: WebSocketDisconnect is raised here, and leaves the application.
    while True:
        await socket.send_text(f"echo {await socket.receive_text()}")


async def _fail(socket: WebSocket, _: str) -> None:
    await _receive_until_disconnect(socket)
    raise ValueError("failed after the disconnect")


async def _start_task(_: WebSocket, key: str) -> None:
    await released(key)
    await create_task(work(key, "late"), name="late")


async def _await_task(_: WebSocket, key: str) -> None:
    await create_task(work(key, "awaited"), name="awaited")


async def _wait(_: WebSocket, key: str) -> None:
    await released(key)


async def _send(socket: WebSocket, key: str) -> None:
    await released(key)
    while True:
        await socket.send_text("more")
        await asyncio.sleep(0.01)


async def _receive_until_disconnect(socket: WebSocket) -> None:
    while (await socket.receive())["type"] != "websocket.disconnect":
        pass


_HOWS = {
    "receive": _receive,
    "fail": _fail,
    "start-task": _start_task,
    "await-task": _await_task,
    "wait": _wait,
    "send": _send,
}


def _app(**options: Any) -> ASGIApp:
    app = FastAPI()
    app.include_router(router)
    app.add_middleware(TaskGroupMiddleware, manager=manager, **options)
    return app


def _bare() -> ASGIApp:
    app = FastAPI()
    app.include_router(router)
    return app


variants: dict[str, ASGIApp] = {
    "sockets": _app(),
    "sockets-always": _app(cancel_handler=True),
    "bare-sockets": _bare(),
}
