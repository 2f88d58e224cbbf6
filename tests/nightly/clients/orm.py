"""SQLAlchemy, over asyncpg and over psycopg."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.nightly.clients.base import POOL_SIZE, POOL_TIMEOUT, only
from tests.nightly.clients.database import CONNECTIONS, IN_TRANSACTION, postgresql_leftovers

if TYPE_CHECKING:
    import asyncio

    from tests.nightly.clients.base import Operations


class SQLAlchemy:
    """SQLAlchemy's asyncio engine and sessions, over the driver that a subclass names."""

    driver = ""

    def __init__(self, backend: str) -> None:
        from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

        url = backend.replace("postgresql://", f"postgresql+{self.driver}://")
        self.engine = create_async_engine(url, pool_size=POOL_SIZE, max_overflow=0, pool_timeout=POOL_TIMEOUT)
        self.session = async_sessionmaker(self.engine, expire_on_commit=False)

    async def open(self) -> None:
        async with self.engine.connect():
            pass

    async def close(self) -> None:
        await self.engine.dispose()

    def operations(self) -> Operations:
        return {
            "fetch": self.fetch,
            "transaction": self.transaction,
            "session": self.in_session,
            "stream": self.stream,
        }

    async def fetch(self, token: str, seconds: float) -> str:
        async with self.engine.connect() as connection:
            return str(await connection.scalar(*_sleeping(token, seconds)))

    async def transaction(self, token: str, seconds: float) -> str:
        async with self.engine.begin() as connection:
            await connection.execute(*_insert(token))
            await connection.execute(*_sleeping(token, seconds))
            return str(await connection.scalar(*_select(token)))

    async def in_session(self, token: str, seconds: float) -> str:
        async with self.session() as session, session.begin():
            await session.execute(*_insert(token))
            await session.flush()
            await session.execute(*_sleeping(token, seconds))
            return str(await session.scalar(*_select(token)))

    async def stream(self, token: str, seconds: float) -> str:
        from sqlalchemy import text

        rows = text(
            "SELECT CAST(:token AS text), pg_sleep(CAST(:seconds AS float) / 20) FROM generate_series(1, 20)"
        )
        async with self.session() as session:
            answer = await session.stream(rows, {"token": token, "seconds": seconds})
            return only({row[0] async for row in answer})

    async def hold(self, token: str, together: asyncio.Barrier) -> str:
        async with self.session() as session:
            await session.execute(*_sleeping(token, 0))
            await together.wait()
            return str(await session.scalar(*_sleeping(token, 0)))

    async def leftovers(self) -> list[str]:
        from sqlalchemy import text

        async with self.engine.connect() as connection:
            found = (await connection.execute(text(f"SELECT ({IN_TRANSACTION}), ({CONNECTIONS})"))).one()
        return postgresql_leftovers(*found)


class SQLAlchemyAsyncpg(SQLAlchemy):
    """SQLAlchemy over asyncpg."""

    driver = "asyncpg"


class SQLAlchemyPsycopg(SQLAlchemy):
    """SQLAlchemy over psycopg."""

    driver = "psycopg"


def _sleeping(token: str, seconds: float) -> tuple[Any, dict[str, Any]]:
    from sqlalchemy import text

    return (
        text("SELECT CAST(:token AS text) FROM pg_sleep(CAST(:seconds AS float))"),
        {"token": token, "seconds": seconds},
    )


def _insert(token: str) -> tuple[Any, dict[str, Any]]:
    from sqlalchemy import text

    return text("INSERT INTO answers VALUES (:token)"), {"token": token}


def _select(token: str) -> tuple[Any, dict[str, Any]]:
    from sqlalchemy import text

    return text("SELECT token FROM answers WHERE token = :token"), {"token": token}
