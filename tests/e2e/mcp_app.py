"""An MCP server over streamable HTTP, mounted in a FastAPI application as its users do it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.streamable_http import EventCallback, EventMessage, EventStore
from starlette.middleware.base import BaseHTTPMiddleware

from otel_tasks import TaskManager, create_task
from otel_tasks.asgi import TaskGroupMiddleware


class Events(EventStore):
    """Keeps every event, for clients that resume a stream."""

    def __init__(self) -> None:
        self._events: list[tuple[str, Any]] = []

    async def store_event(self, stream_id: str, message: Any) -> str:
        """Keep an event and return its id."""
        self._events.append((stream_id, message))
        return str(len(self._events) - 1)

    async def replay_events_after(self, last_event_id: str, send_callback: EventCallback) -> str | None:
        """Send the later events of the same stream."""
        stream, _ = self._events[int(last_event_id)]
        for number, (each, message) in enumerate(self._events):
            if number > int(last_event_id) and each == stream and message is not None:
                await send_callback(EventMessage(message, str(number)))
        return stream


class Journal:
    """What the tools have done."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self._changed = asyncio.Condition()
        self.release = asyncio.Event()

    def add(self, what: str) -> None:
        """Add an event where nothing can be awaited."""
        self.events.append(what)
        print(what)

    async def note(self, what: str) -> None:
        """Add an event."""
        self.add(what)
        async with self._changed:
            self._changed.notify_all()

    async def settles(self, what: str) -> None:
        """Wait until it has happened, where no condition can be notified."""
        while what not in self.events:  # noqa: ASYNC110  # noted where nothing can be awaited
            await asyncio.sleep(0.01)

    async def wait_for(self, what: str) -> None:
        """Wait until it has happened."""
        async with self._changed:
            await self._changed.wait_for(lambda: what in self.events)


def make_app(journal: Journal, manager: TaskManager, *, cancel_handler: bool | str | None) -> FastAPI:
    """The application; without the middleware if ``cancel_handler`` is None."""
    server = MCPServer("tools")

    async def search(kind: str) -> str:
        await journal.note(f"{kind} started")
        try:
            await journal.release.wait()
        except asyncio.CancelledError:
            # At once: in a cancelled scope of anyio, no `await` returns.
            journal.add(f"{kind} cancelled")
            raise
        return "found"

    @server.tool()
    async def add(a: int, b: int) -> int:
        """Add two numbers in a managed task."""

        async def added() -> int:
            return a + b

        return await create_task(added(), name="added")

    @server.tool()
    async def wait_itself() -> str:
        """Wait in the tool."""
        return await search("tool")

    @server.tool()
    async def wait_for_task() -> str:
        """Wait in a task of the tool."""
        return await create_task(search("task"), name="search")

    @server.tool()
    async def count(context: Context[Any, Any]) -> str:
        """Report progress: two steps, and the third when it is released."""
        for step in range(1, 4):
            if step == 3:
                await search("count")
            await context.report_progress(step, 3)
        return "counted"

    mounted = server.streamable_http_app(streamable_http_path="/", event_store=Events())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with server.session_manager.run():
            yield

    async def pass_through(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    app = FastAPI(lifespan=lifespan)
    app.mount("/mcp", mounted)
    app.add_middleware(BaseHTTPMiddleware, dispatch=pass_through)
    if cancel_handler is not None:
        app.add_middleware(TaskGroupMiddleware, manager=manager, cancel_handler=cancel_handler)
    return app


def create() -> FastAPI:
    """The application, for ``uvicorn --factory``."""
    return make_app(Journal(), TaskManager(), cancel_handler=os.environ["MCP_RULE"])
