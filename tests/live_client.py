"""A client of the live view, in process and on the virtual clock."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from fastapi import FastAPI

from otel_tasks.live import live_view
from otel_tasks.live.hub import LINGER
from otel_tasks.testing import FakeConnection

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from otel_tasks import TaskManager

HOST = {"host": "localhost"}
TOKEN = {"authorization": "Bearer x", "content-type": "application/json"}

Event = tuple[str, str | None, Any]


class Client:
    """A client of one application."""

    def __init__(self, app: Any, prefix: str = "/tasks") -> None:
        self.app = app
        self.prefix = prefix

    def connection(self, path: str, method: str = "GET", **options: Any) -> FakeConnection:
        """A request, not sent yet."""
        path, _, query = f"{self.prefix}{path}".partition("?")
        headers = {**HOST, **options.pop("headers", {})}
        connection = FakeConnection(method=method, path=unquote(path), headers=headers, **options)
        connection.scope["query_string"] = query.encode()
        return connection

    async def send(self, path: str, method: str = "GET", **options: Any) -> FakeConnection:
        """Send a request, and wait for the answer."""
        connection = self.connection(path, method, **options)
        await connection.run(self.app)
        return connection

    async def get(self, path: str, status: int = 200) -> Any:
        """The JSON of an answer."""
        connection = await self.send(path)
        assert connection.status == status, connection.body
        return json.loads(connection.body)

    async def cancel(
        self, uid: str, body: Any = None, status: int = 200, headers: dict[str, str] | None = None
    ) -> Any:
        """Cancel a task."""
        connection = await self.send(
            f"/v1/tasks/{quote(uid)}/cancel",
            "POST",
            headers={**TOKEN, **(headers or {})},
            body=json.dumps({} if body is None else body).encode(),
        )
        assert connection.status == status, connection.body
        return json.loads(connection.body)

    @asynccontextmanager
    async def stream(self, query: str = "") -> AsyncIterator[FakeConnection]:
        """An open stream; at the end of the block, the client leaves."""
        connection = self.connection(f"/v1/events{query}")
        serving = asyncio.create_task(connection.run(self.app))
        await asyncio.sleep(0.01)
        yield connection
        connection.disconnect()
        await serving


def events(connection: FakeConnection) -> list[Event]:
    """The events that a stream has sent."""
    found: list[Event] = []
    for block in connection.body.decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        if "event" in fields:
            found.append((fields["event"], fields.get("id"), json.loads(fields["data"])))
    return found


def of_kind(connection: FakeConnection, kind: str) -> list[Any]:
    """The data of the events of one kind."""
    return [data for name, _, data in events(connection) if name == kind]


def client_of(manager: TaskManager | None, **options: Any) -> Client:
    """A client of an application that shows one manager."""
    app = FastAPI(openapi_url=None)
    options.setdefault("insecure", "auth" not in options)
    app.include_router(live_view(manager=manager, **options), prefix="/tasks")
    return Client(app)


async def leave() -> None:
    """Wait until the feed has noticed that all viewers are gone."""
    await asyncio.sleep(LINGER + 2)
