"""An app whose requests share the five connections of one client.

CLIENT names the client, BACKEND its server. If PROTECTED, each request uses the client in `uncancellable()`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from otel_tasks.asgi import TaskGroupMiddleware, uncancellable
from tests.nightly.clients.base import POOL_SIZE, SharedClient
from tests.nightly.clients.broker import AioPika
from tests.nightly.clients.cache import Naive, Redis
from tests.nightly.clients.database import Asyncpg, Psycopg
from tests.nightly.clients.documents import Pymongo
from tests.nightly.clients.orm import SQLAlchemyAsyncpg, SQLAlchemyPsycopg
from tests.nightly.clients.web import Aiohttp, Httpx, Httpx2

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

HOLD_TIMEOUT = 10.0

CLIENTS: dict[str, type[SharedClient]] = {
    "redis": Redis,
    "asyncpg": Asyncpg,
    "psycopg": Psycopg,
    "sqlalchemy-asyncpg": SQLAlchemyAsyncpg,
    "sqlalchemy-psycopg": SQLAlchemyPsycopg,
    "httpx": Httpx,
    "httpx2": Httpx2,
    "aiohttp": Aiohttp,
    "pymongo": Pymongo,
    "aio-pika": AioPika,
    "naive": Naive,
}


class Service:
    """The app's state: its client, and what its requests came to."""

    def __init__(self) -> None:
        self.client = CLIENTS[os.environ["CLIENT"]](os.environ["BACKEND"])
        self.protection = uncancellable if os.environ.get("PROTECTED") else contextlib.nullcontext
        self.active = 0
        self.cancelled: Counter[str] = Counter()

    async def ask(self, operation: str, token: str, seconds: float) -> str:
        """Run one operation and count how it ends."""
        self.active += 1
        try:
            async with self.protection():
                return await self.client.operations()[operation](token, seconds)
        except asyncio.CancelledError:
            self.cancelled[operation] += 1
            raise
        finally:
            self.active -= 1

    async def wrong_in_pool(self) -> list[str]:
        """Take all five connections at once, and ask on each."""
        together = asyncio.Barrier(POOL_SIZE)
        tokens = [f"whole-{number}" for number in range(POOL_SIZE)]
        try:
            async with asyncio.timeout(HOLD_TIMEOUT):
                answers = await asyncio.gather(
                    *(self.client.hold(token, together) for token in tokens), return_exceptions=True
                )
        except TimeoutError:
            return [f"{POOL_SIZE} connections cannot be had at once"]
        wrong = [
            f"{token} got {answer!r}"
            for token, answer in zip(tokens, answers, strict=True)
            if token != answer
        ]
        return wrong + await self.leftovers()

    async def leftovers(self) -> list[str]:
        """What is still left behind after a moment: a server takes its time to end a connection."""
        for _ in range(50):
            if not await self.client.leftovers():
                return []
            await asyncio.sleep(0.1)
        return await self.client.leftovers()


def make_app() -> FastAPI:
    """The app, for ``uvicorn --factory``."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        app.state.service = Service()
        await app.state.service.client.open()
        yield
        await app.state.service.client.close()

    app = FastAPI(lifespan=lifespan)
    # Looks at the requests more often than by default: the hang-ups are to hit short operations.
    app.add_middleware(TaskGroupMiddleware, cancel_handler=True, detect_after=0.002)

    @app.get("/operations")
    async def operations() -> list[str]:
        return list(app.state.service.client.operations())

    @app.get("/state")
    async def state() -> dict[str, Any]:
        return {"active": app.state.service.active, "cancelled": dict(app.state.service.cancelled)}

    @app.get("/pool")
    async def pool() -> list[str]:
        wrong: list[str] = await app.state.service.wrong_in_pool()
        return wrong

    @app.get("/ask/{operation}/{token}")
    async def ask(operation: str, token: str, seconds: float) -> str:
        answer: str = await app.state.service.ask(operation, token, seconds)
        return answer

    return app
