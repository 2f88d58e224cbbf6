"""A uvicorn in the test's own loop: for a scenario whose whole application fits into the test."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import uvicorn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping

    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[Message, Receive, Send], Awaitable[None]]

DEADLINE = 30.0
"""Seconds after which an event that did not come fails the test."""

AGE = 0.1
"""Seconds after which the middleware watches a request (60 ms), and a little more."""


class Site:
    """An application that is being served, and its calls in flight."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._calls = 0
        self._changed = asyncio.Condition()
        self.port = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one connection, and count it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        await self._count(1)
        try:
            await self._app(scope, receive, send)
        finally:
            await self._count(-1)

    async def _count(self, step: int) -> None:
        async with self._changed:
            self._calls += step
            self._changed.notify_all()

    async def open(self, request: str, *, calls: int = 1) -> asyncio.StreamWriter:
        """Send `request` (`GET /path`), and wait until `calls` calls are in flight and are being watched."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        length = "Content-Length: 0\r\n" if request.startswith("POST") else ""
        writer.write(f"{request} HTTP/1.1\r\nHost: x\r\n{length}\r\n".encode())
        await self.wait_for_calls(calls)
        await asyncio.sleep(AGE)
        return writer

    async def hang_up(self, request: str) -> None:
        """Send `request`, hang up while it is being served, and wait until the application has returned."""
        writer = await self.open(request)
        writer.transport.abort()
        await self.wait_until_idle()

    async def wait_until_idle(self) -> None:
        """Wait until no call is in flight."""
        await self.wait_for_calls(0)

    async def wait_for_calls(self, calls: int) -> None:
        """Wait until that many calls are in flight."""
        async with asyncio.timeout(DEADLINE), self._changed:
            await self._changed.wait_for(lambda: self._calls == calls)


@asynccontextmanager
async def served(app: App) -> AsyncIterator[Site]:
    """Serve `app` with uvicorn on a free port."""
    site = Site(app)
    config = uvicorn.Config(site, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(DEADLINE):
            while not server.started:  # noqa: ASYNC110  # uvicorn has no event for it
                await asyncio.sleep(0.01)
        site.port = server.servers[0].sockets[0].getsockname()[1]
        yield site
    finally:
        server.should_exit = True
        await serving
