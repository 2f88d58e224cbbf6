"""Claims on Redis: claims that wait for the connection share one script."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from otel_tasks.fleet.bus import Claim
from otel_tasks.fleet.redis_channel import unavailable
from otel_tasks.fleet.redis_scripts import CLAIM

if TYPE_CHECKING:
    from collections.abc import Sequence

    from otel_tasks.fleet.redis_channel import Answers, Channel, Command

# What the script answers for each claim.
_MEANINGS: Final = {ord("t"): Claim.TAKEN, ord("h"): Claim.HELD, ord("d"): Claim.DONE}


class Claims:
    """The claims that one node takes.

    Args:
        channel: The connection.
        address: The server, for messages.
    """

    def __init__(self, channel: Channel, address: str) -> None:
        self._channel = channel
        self._address = address
        self._batch: _Batch | None = None

    async def take(self, claim: str, done: str, value: str, milliseconds: int) -> Claim:
        """Take a claim.

        Args:
            claim: Its key.
            done: The key of the mark that its message was executed.
            value: The owner and the message.
            milliseconds: After which it expires, the same for all claims.

        Raises:
            BusUnavailableError: The server does not answer in time, or answers with an error.

        Cancellation: ends the wait; a claim that was taken expires.
        """
        batch = self._batch
        if batch is None or not batch.is_open:
            batch = _Batch(self._address, milliseconds)
            self._channel.start_late(batch.commands).add_done_callback(batch.settle)
            self._batch = batch
        return await batch.add(claim, done, value)


class _Batch:
    """Claims that go together.

    Args:
        address: The server, for messages.
        milliseconds: After which they expire.

    Attributes:
        is_open: True until they are sent.
    """

    def __init__(self, address: str, milliseconds: int) -> None:
        self.is_open = True
        self._address = address
        self._milliseconds = milliseconds
        self._keys: list[str] = []
        self._values: list[str] = []
        self._claims: list[asyncio.Future[Claim]] = []

    def add(self, claim: str, done: str, value: str) -> asyncio.Future[Claim]:
        """Add a claim; return the future of its answer."""
        self._keys += (claim, done)
        self._values.append(value)
        future: asyncio.Future[Claim] = asyncio.get_running_loop().create_future()
        self._claims.append(future)
        return future

    def commands(self) -> Sequence[Command]:
        """Close the batch, and return its command."""
        self.is_open = False
        return [CLAIM(*self._keys, args=(self._milliseconds, *self._values))]

    def settle(self, answers: Answers) -> None:
        """Answer each claim."""
        self.is_open = False
        answer: Any = answers.result()[0]
        for number, claim in enumerate(self._claims):
            if claim.done():
                # Its execution was cancelled.
                continue
            if isinstance(answer, Exception):
                claim.set_exception(unavailable(self._address, answer))
            else:
                claim.set_result(_MEANINGS[answer[number]])
