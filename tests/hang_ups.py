"""Clients that hang up on an application behind the middleware."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from otel_tasks._core.binding import stopping
from otel_tasks.asgi import TaskGroupMiddleware
from otel_tasks.testing import FakeConnection

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from otel_tasks import TaskManager
    from otel_tasks._asgi.connection import Receive, Scope, Send

    App = Callable[[Scope, Receive, Send], Awaitable[None]]

START = {"type": "http.response.start", "status": 200, "headers": []}
BODY = {"type": "http.response.body", "body": b"done"}
# Longer than the middleware takes to watch a request.
LONG = 0.1
# Short: where anyio cancels at every turn of the loop, a virtual clock never gets on.
CLEANUP = 0.02


def app_of(handler: Callable[[], Awaitable[object]]) -> App:
    """An application that runs ``handler`` and answers."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await handler()
        await send(dict(START))
        await send(dict(BODY))

    return app


async def hang_up_on(
    app: App, manager: TaskManager, connection: FakeConnection | None = None, **options: Any
) -> FakeConnection:
    """Let the client leave while the application works; return when the server is done."""
    connection = connection or FakeConnection()
    serving = asyncio.create_task(connection.run(TaskGroupMiddleware(app, manager=manager, **options)))
    await asyncio.sleep(LONG)
    connection.disconnect()
    await serving
    assert not serving.cancelling()
    assert not stopping
    return connection


def post() -> FakeConnection:
    """A request whose handler is not cancelled by default."""
    return FakeConnection(method="POST")
