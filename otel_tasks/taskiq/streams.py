"""Redelivery on Redis Streams: sends the messages of lost workers again, even while nothing else arrives.

Taskiq's ``RedisStreamBroker`` looks for unacknowledged messages only after a new message has arrived
(``taskiq_redis`` 1.2): on a quiet stream, the message of a killed worker would wait indefinitely. So each
worker looks for these messages itself. It appends a copy to the stream, and acknowledges the old message in
the same step. If the message still runs, the copy waits for its claim, like any duplicate.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from otel_tasks._core.telemetry import quiet_context

if TYPE_CHECKING:
    from taskiq import AsyncBroker

# The longest time between two searches, in seconds.
_LONGEST: Final = 10.0


class Redelivery:
    """Looks for the messages of lost workers while it runs.

    Args:
        broker: A ``RedisStreamBroker``.
    """

    def __init__(self, broker: Any) -> None:
        self._broker = broker
        # Milliseconds, as in Redis.
        self._every = min(broker.idle_timeout / 2000, _LONGEST)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start looking."""
        self._task = asyncio.get_running_loop().create_task(self._run(), context=quiet_context())

    async def stop(self) -> None:
        """Stop looking.

        Cancellation: ends the wait for the last look.
        """
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        from redis.asyncio import Redis
        from redis.exceptions import RedisError

        streams = [self._broker.queue_name, *self._broker.additional_streams]
        while True:
            await asyncio.sleep(self._every)
            # The broker itself reports a server that is away.
            with suppress(RedisError, OSError):
                async with Redis(connection_pool=self._broker.connection_pool) as client:
                    for stream in streams:
                        await self._renew(client, stream)

    async def _renew(self, client: Any, stream: str) -> None:
        broker, start = self._broker, "0-0"
        group = broker.consumer_group_name
        while True:
            start, messages, *_ = await client.xautoclaim(
                stream,
                group,
                broker.consumer_name,
                broker.idle_timeout,
                start,
                broker.unacknowledged_batch_size,
            )
            for message_id, fields in messages:
                if message_id is None:
                    # Redis 6.2 lists messages that were trimmed from the stream; later versions forget them.
                    continue
                async with client.pipeline(transaction=True) as step:
                    step.xadd(stream, fields, maxlen=broker.maxlen, approximate=broker.approximate)
                    step.xack(stream, group, message_id)
                    await step.execute()
            if start in (b"0-0", "0-0"):
                return


def redelivery_for(broker: AsyncBroker) -> Redelivery | None:
    """Return the redelivery of a broker on Redis Streams; None for any other broker."""
    module = sys.modules.get("taskiq_redis")
    if module is None or not isinstance(broker, module.RedisStreamBroker):
        return None
    return Redelivery(broker)
