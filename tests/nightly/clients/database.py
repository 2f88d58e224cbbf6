"""asyncpg and psycopg."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from tests.nightly.clients.base import POOL_SIZE, POOL_TIMEOUT, only

if TYPE_CHECKING:
    from tests.nightly.clients.base import Operations


IN_TRANSACTION = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    " AND state LIKE 'idle in transaction%'"
)
CONNECTIONS = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    " AND backend_type = 'client backend'"
)


def postgresql_leftovers(in_transaction: int, connections: int) -> list[str]:
    found = [f"{in_transaction} open transactions"] if in_transaction else []
    return [*found, f"{connections} connections"] if connections > POOL_SIZE else found


class Asyncpg:
    """asyncpg, with its own pool."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    async def open(self) -> None:
        import asyncpg

        self.pool = await asyncpg.create_pool(
            self.backend, min_size=POOL_SIZE, max_size=POOL_SIZE, command_timeout=60
        )

    async def close(self) -> None:
        await asyncio.wait_for(self.pool.close(), POOL_TIMEOUT)

    def operations(self) -> Operations:
        return {
            "fetch": self.fetch,
            "transaction": self.transaction,
            "cursor": self.cursor,
            "copy": self.copy,
        }

    async def fetch(self, token: str, seconds: float) -> str:
        return str(await self.pool.fetchval("SELECT $1::text FROM pg_sleep($2)", token, seconds))

    async def transaction(self, token: str, seconds: float) -> str:
        async with self.pool.acquire() as connection, connection.transaction():
            await connection.execute("INSERT INTO answers VALUES ($1)", token)
            await connection.execute("SELECT pg_sleep($1)", seconds)
            return str(await connection.fetchval("SELECT token FROM answers WHERE token = $1", token))

    async def cursor(self, token: str, seconds: float) -> str:
        async with self.pool.acquire() as connection, connection.transaction():
            rows = connection.cursor(
                "SELECT $1::text, pg_sleep($2 / 20) FROM generate_series(1, 20)", token, seconds, prefetch=3
            )
            return only({row[0] async for row in rows})

    async def copy(self, token: str, seconds: float) -> str:
        async with self.pool.acquire() as connection:
            async with connection.transaction():
                await connection.copy_records_to_table("answers", records=[(token,)] * 50)
                await connection.execute("SELECT pg_sleep($1)", seconds)
            return only(
                {r[0] for r in await connection.fetch("SELECT * FROM answers WHERE token = $1", token)}
            )

    async def hold(self, token: str, together: asyncio.Barrier) -> str:
        async with self.pool.acquire() as connection:
            await together.wait()
            return str(await connection.fetchval("SELECT $1::text", token))

    async def leftovers(self) -> list[str]:
        found = await self.pool.fetchrow(f"SELECT ({IN_TRANSACTION}), ({CONNECTIONS})")
        assert found is not None
        return postgresql_leftovers(*found)


class Psycopg:
    """psycopg, with the pool of psycopg-pool."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    async def open(self) -> None:
        import psycopg_pool

        self.pool = psycopg_pool.AsyncConnectionPool(
            self.backend, min_size=POOL_SIZE, max_size=POOL_SIZE, timeout=POOL_TIMEOUT, open=False
        )
        await self.pool.open(wait=True)

    async def close(self) -> None:
        await self.pool.close()

    def operations(self) -> Operations:
        return {
            "fetch": self.fetch,
            "transaction": self.transaction,
            "pipeline": self.pipeline,
            "server-cursor": self.server_cursor,
            "copy": self.copy,
        }

    async def fetch(self, token: str, seconds: float) -> str:
        async with self.pool.connection() as connection:
            cursor = await connection.execute("SELECT %s::text FROM pg_sleep(%s)", (token, seconds))
            return await _value(cursor)

    async def transaction(self, token: str, seconds: float) -> str:
        async with self.pool.connection() as connection, connection.transaction():
            await connection.execute("INSERT INTO answers VALUES (%s)", (token,))
            await connection.execute("SELECT pg_sleep(%s)", (seconds,))
            return await _value(
                await connection.execute("SELECT token FROM answers WHERE token = %s", (token,))
            )

    async def pipeline(self, token: str, seconds: float) -> str:
        async with self.pool.connection() as connection, connection.pipeline():
            first = await connection.execute("SELECT %s::text FROM pg_sleep(%s)", (token, seconds))
            second = await connection.execute("SELECT %s::text", (token,))
            return only({await _value(first), await _value(second)})

    async def server_cursor(self, token: str, seconds: float) -> str:
        async with self.pool.connection() as connection, connection.cursor(name="rows") as cursor:
            cursor.itersize = 3
            await cursor.execute(
                "SELECT %s::text, pg_sleep(%s / 20.0) FROM generate_series(1, 20)", (token, seconds)
            )
            return only({row[0] async for row in cursor})

    async def copy(self, token: str, seconds: float) -> str:
        async with self.pool.connection() as connection, connection.cursor() as cursor:
            async with cursor.copy("COPY answers FROM STDIN") as rows:
                for _ in range(20):
                    await rows.write_row((token,))
                    await asyncio.sleep(seconds / 20)
            await cursor.execute("SELECT DISTINCT token FROM answers WHERE token = %s", (token,))
            return await _value(cursor)

    async def hold(self, token: str, together: asyncio.Barrier) -> str:
        async with self.pool.connection() as connection:
            await together.wait()
            return await _value(await connection.execute("SELECT %s::text", (token,)))

    async def leftovers(self) -> list[str]:
        async with self.pool.connection() as connection:
            found = await (await connection.execute(f"SELECT ({IN_TRANSACTION}), ({CONNECTIONS})")).fetchone()
        assert found is not None
        return postgresql_leftovers(*found)


async def _value(cursor: Any) -> str:
    row = await cursor.fetchone()
    return str(row[0])
