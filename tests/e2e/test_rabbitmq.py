"""The RabbitMQ that the tests of workers use does what they rely on."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

import aio_pika
import pytest

if TYPE_CHECKING:
    from examples.rabbitmq_server import RabbitMQ

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]


async def put(server: RabbitMQ, queue: str, body: bytes) -> None:
    connection = await aio_pika.connect(server.url)
    async with connection, connection.channel() as channel:
        await channel.declare_queue(queue, durable=True)
        message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(message, queue)


async def get(server: RabbitMQ, queue: str) -> bytes:
    connection = await aio_pika.connect(server.url)
    async with connection, connection.channel() as channel:
        incoming = await (await channel.declare_queue(queue, durable=True)).get(timeout=10)
        assert incoming is not None
        await incoming.ack()
        return incoming.body


async def test_durable_messages_survive_a_restart(own_rabbitmq: RabbitMQ) -> None:
    """After a stop and a start, the server has its address and its messages again."""
    await put(own_rabbitmq, "kept", b"one")
    await asyncio.to_thread(own_rabbitmq.restart)
    assert await get(own_rabbitmq, "kept") == b"one"


async def test_paused_server_answers_later(rabbitmq: RabbitMQ) -> None:
    """A paused server accepts connections and says nothing; a resumed one answers."""
    rabbitmq.pause()
    try:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await put(rabbitmq, "paused", b"lost")
    finally:
        rabbitmq.resume()
    await put(rabbitmq, "paused", b"one")
    assert await get(rabbitmq, "paused") == b"one"


def test_nothing_is_left_of_a_killed_server(own_rabbitmq: RabbitMQ) -> None:
    """Killing it ends Erlang and its helpers too."""
    server = own_rabbitmq._server
    assert server is not None
    own_rabbitmq.kill()
    with pytest.raises(ProcessLookupError):
        os.killpg(server.pid, signal.SIGCONT)
