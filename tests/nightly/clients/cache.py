"""redis-py, and no client at all."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.nightly.clients.base import POOL_SIZE, POOL_TIMEOUT, only

if TYPE_CHECKING:
    from tests.nightly.clients.base import Operations


class Redis:
    """redis-py."""

    def __init__(self, backend: str) -> None:
        import redis.asyncio as redis

        self.pool = redis.BlockingConnectionPool.from_url(
            backend, max_connections=POOL_SIZE, timeout=POOL_TIMEOUT, decode_responses=True
        )
        self.redis = redis.Redis(connection_pool=self.pool)

    async def open(self) -> None:
        await self.redis.ping()

    async def close(self) -> None:
        await self.redis.aclose()
        await self.pool.aclose()

    def operations(self) -> Operations:
        return {
            "command": self.command,
            "pipeline": self.pipeline,
            "blocking-read": self.blocking_read,
            "lock": self.lock,
            "pubsub": self.pubsub,
        }

    async def command(self, token: str, seconds: float) -> str:
        await self.redis.set(token, token, ex=60)
        await asyncio.sleep(seconds)
        return str(await self.redis.get(token))

    async def pipeline(self, token: str, seconds: float) -> str:
        async with self.redis.pipeline(transaction=True) as pipe:
            await pipe.watch(token)
            await asyncio.sleep(seconds)
            pipe.multi()  # type: ignore[no-untyped-call]  # redis-py leaves this one without types
            pipe.set(token, token, ex=60)
            pipe.echo(token)
            pipe.get(token)
            answers = await pipe.execute()
        return only({answers[1], answers[2]})

    async def blocking_read(self, token: str, seconds: float) -> str:
        # The server answers after `seconds`, and the connection is busy until then.
        assert await self.redis.blpop([f"never-{token}"], timeout=seconds) is None
        await self.redis.rpush(f"list-{token}", token)
        popped = await self.redis.blpop([f"list-{token}"], timeout=5)
        assert popped is not None
        return str(popped[1])

    async def lock(self, token: str, seconds: float) -> str:
        async with self.redis.lock(f"lock-{token[-1]}", timeout=5, sleep=0.002):
            await self.redis.set(token, token, ex=60)
            await asyncio.sleep(seconds)
            return str(await self.redis.get(token))

    async def pubsub(self, token: str, seconds: float) -> str:
        async with self.redis.pubsub() as channel:
            await channel.subscribe(token)
            await asyncio.sleep(seconds)
            # No publish(): that takes a second connection, and five requests that hold one each wait forever.
            while (message := await channel.get_message(timeout=5)) is None:
                pass
            return str(message["channel"])

    async def hold(self, token: str, together: asyncio.Barrier) -> str:
        async with self.redis.client() as connection:
            await together.wait()
            return str(await connection.echo(token))

    async def leftovers(self) -> list[str]:
        clients = await self.redis.client_list()
        return [f"{len(clients)} connections"] if len(clients) > POOL_SIZE else []


class Naive:
    """No client: five connections to Redis, put back whatever happens. The test is to see its mix-ups."""

    def __init__(self, backend: str) -> None:
        self.port = int(backend.rpartition(":")[2].partition("/")[0])
        self.free: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

    async def open(self) -> None:
        for _ in range(POOL_SIZE):
            self.free.put_nowait(await asyncio.open_connection("127.0.0.1", self.port))

    async def close(self) -> None:
        while not self.free.empty():
            self.free.get_nowait()[1].close()

    def operations(self) -> Operations:
        return {"command": self.command}

    async def command(self, token: str, seconds: float) -> str:
        connection = await self.free.get()
        try:
            return await self.echo(connection, token, seconds)
        finally:
            self.free.put_nowait(connection)

    async def echo(
        self, connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], token: str, seconds: float
    ) -> str:
        reader, writer = connection
        if seconds:
            writer.write(f"BLPOP never-{token} {seconds}\r\n".encode())
            assert await reader.readline() in {b"*-1\r\n", b"$-1\r\n"}
        writer.write(f"ECHO {token}\r\n".encode())
        await reader.readline()
        return (await reader.readline()).decode().strip()

    async def hold(self, token: str, together: asyncio.Barrier) -> str:
        connection = await self.free.get()
        await together.wait()
        self.free.put_nowait(connection)
        return token

    async def leftovers(self) -> list[str]:
        return []
