"""aio-pika."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from tests.nightly.clients.base import POOL_SIZE

if TYPE_CHECKING:
    from tests.nightly.clients.base import Operations


class AioPika:
    """aio-pika: one robust connection, and a pool of five channels."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    async def open(self) -> None:
        import aio_pika
        from aio_pika.pool import Pool

        self.connection = await aio_pika.connect_robust(self.backend)
        self.channels: Pool[Any] = Pool(self.connection.channel, max_size=POOL_SIZE)

    async def close(self) -> None:
        await self.channels.close()
        await self.connection.close()

    def operations(self) -> Operations:
        return {"get": self.get, "consume": self.consume, "publish": self.publish}

    async def get(self, token: str, seconds: float) -> str:
        async with self.channels.acquire() as channel:
            queue = await channel.declare_queue(f"get-{token}", auto_delete=True)
            await channel.default_exchange.publish(_message(token), routing_key=queue.name)
            await asyncio.sleep(seconds)
            message = await queue.get(timeout=5)
            await message.ack()
            await queue.delete(if_unused=False, if_empty=False)
            return str(message.body.decode())

    async def consume(self, token: str, seconds: float) -> str:
        async with self.channels.acquire() as channel:
            queue = await channel.declare_queue(f"consume-{token}", auto_delete=True)
            await channel.default_exchange.publish(_message(token), routing_key=queue.name)
            await asyncio.sleep(seconds)
            async with queue.iterator(timeout=5) as messages:
                async for message in messages:
                    async with message.process():
                        return str(message.body.decode())
            return "nothing"

    async def publish(self, token: str, seconds: float) -> str:
        async with self.channels.acquire() as channel:
            exchange = await channel.declare_exchange("answers", "direct", auto_delete=False)
            await asyncio.sleep(seconds)
            # It waits for the broker's confirmation, which returns the message: no queue takes it.
            answer = await exchange.publish(_message(token), routing_key=token, mandatory=True)
            return str(answer.header.properties.correlation_id)

    async def hold(self, token: str, together: asyncio.Barrier) -> str:
        async with self.channels.acquire() as channel:
            await together.wait()
            queue = await channel.declare_queue(exclusive=True, auto_delete=True)
            await channel.default_exchange.publish(_message(token), routing_key=queue.name)
            message = await queue.get(timeout=5)
            await message.ack()
            await queue.delete(if_unused=False, if_empty=False)
            return str(message.body.decode())

    async def leftovers(self) -> list[str]:
        return []


def _message(token: str) -> Any:
    import aio_pika

    return aio_pika.Message(token.encode(), correlation_id=token)
