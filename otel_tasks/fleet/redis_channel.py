"""Connections to Redis: one that many calls share, and what an error of the client means for a fleet.

This module uses redis-py's connections directly, without its clients: these have their own pools and retries,
and instrumentations hook into them, which would create a span for each poll.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from contextlib import asynccontextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from redis import exceptions

from otel_tasks._core.telemetry import quiet_context
from otel_tasks.fleet.bus import CALL_TIMEOUT, BusRefusedError, BusUnavailableError
from otel_tasks.fleet.redis_scripts import SOURCES

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

    Command = tuple[str | bytes | int, ...]
    # Of some commands, of which some may be exceptions.
    Answers = asyncio.Future[list[Any]]

# Commands in one round trip: enough to be fast, and few enough to be answered in time.
_BATCH = 500
# A timer that is late by so many seconds shows that the event loop was held.
_LATE = 1.0
# Seconds for which patient calls wait while the loop has other work, and a turn of a loop that has none.
_PATIENCE = 0.003
_IDLE_TURN = 0.00004

_REASONS: dict[type[Exception], str] = {
    exceptions.OutOfMemoryError: "is full, and refuses to write (maxmemory)",
    exceptions.ReadOnlyError: "is a replica, and refuses to write: the URL must name the primary",
    exceptions.BusyLoadingError: "is still loading its data",
}
_REFUSALS = (
    exceptions.AuthenticationError,
    exceptions.AuthorizationError,
    exceptions.NoPermissionError,
    ssl.SSLError,
)


class Channel:
    """A connection whose calls share round trips: those of one turn of the loop, and those made meanwhile.

    Args:
        make: Creates a connection that is not connected yet.
        address: The server, for messages.
    """

    def __init__(self, make: Callable[[], Any], address: str) -> None:
        self._make = make
        self._address = address
        self._connection: Any = None
        self._pending: deque[_Call] = deque()
        self._sending: asyncio.Task[None] | None = None
        self._closed = False
        # True if one of the calls that wait is not patient.
        self._is_urgent = False

    def open(self) -> None:
        """Allow calls again after ``close``."""
        self._closed = False

    async def call(self, *commands: Command, patient: bool = False) -> list[Any]:
        """Execute commands in this order, and return their answers.

        Args:
            commands: The commands.
            patient: They may wait a moment for others while the loop is busy, to share a round trip.

        Raises:
            BusUnavailableError: The server does not answer within ``CALL_TIMEOUT``, or answers with an error.

        Cancellation: ends the wait; the commands are executed anyway.
        """
        return await self.answers(self.start(*commands, patient=patient))

    def start(self, *commands: Command, patient: bool = False) -> Answers:
        """Execute commands in this order; return the future of their answers, for ``answers``.

        Args:
            commands: The commands.
            patient: As for ``call``.

        Raises:
            BusUnavailableError: The connection was closed.
        """
        self._is_urgent = self._is_urgent or not patient
        return self.start_late(lambda: commands)

    def start_late(self, make: Callable[[], Sequence[Command]]) -> Answers:
        """Execute commands that are made when they can be sent; return the future of their answers.

        They are patient, as for ``call``. The future has no exception, and one answer at least.

        Args:
            make: Makes the commands; not called if the connection fails before.

        Raises:
            BusUnavailableError: The connection was closed.
        """
        if self._closed:
            raise BusUnavailableError(f"the connection to {self._address} was closed")
        loop = asyncio.get_running_loop()
        call = _Call(make, loop.create_future())
        self._pending.append(call)
        # Done: a factory of eager tasks has run it to its end before it was known here.
        if self._sending is None or self._sending.done():
            self._sending = loop.create_task(
                self._send(), name="otel_tasks.fleet.calls", context=quiet_context()
            )
        return call.answers

    async def answers(self, call: Answers) -> list[Any]:
        """Return the answers to commands.

        Raises:
            BusUnavailableError: As ``call``.

        Cancellation: ends the wait; the commands are executed anyway.
        """
        answers = await call
        for answer in answers:
            if isinstance(answer, Exception):
                raise unavailable(self._address, answer) from answer
        return answers

    async def close(self) -> None:
        """End the connection, and fail the calls that wait."""
        self._closed = True
        sending = self._sending
        if sending is not None:
            sending.cancel()
            await asyncio.wait([sending])
        self._fail(self._pending, ConnectionError("the connection was closed"))
        await self._disconnect()

    async def _send(self) -> None:
        try:
            while self._pending:
                await self._wait_for_more()
                await self._send_batch()
        finally:
            self._sending = None

    async def _wait_for_more(self) -> None:
        """Let patient calls wait while the loop is busy: to send ten together takes a tenth of its time.

        In a loop without other work, this takes two of its turns.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        until = now + _PATIENCE
        idle_turns = 0
        while not self._is_urgent and idle_turns < 2 and now < until:
            await asyncio.sleep(0)
            before, now = now, loop.time()
            idle_turns = idle_turns + 1 if now - before < _IDLE_TURN else 0

    async def _send_batch(self) -> None:
        batch: list[tuple[_Call, int]] = []
        commands: list[Command] = []
        self._is_urgent = False
        while self._pending and len(commands) < _BATCH:
            call = self._pending.popleft()
            made = call.make()
            commands += made
            batch.append((call, len(made)))
        try:
            async with answered_within(CALL_TIMEOUT):
                answers = iter(await self._execute(commands))
        except Exception as error:
            # The calls behind this batch have waited as long.
            self._fail([call for call, _ in batch], error)
            self._fail(self._pending, error)
            await self._disconnect()
        except asyncio.CancelledError:
            self._fail([call for call, _ in batch], ConnectionError("the connection was closed"))
            raise
        else:
            for call, count in batch:
                call.settle(list(islice(answers, count)))

    async def _execute(self, commands: Sequence[Command]) -> list[Any]:
        if self._connection is None:
            self._connection = self._make()
            await self._connection.connect()
        answers = await exchange(self._connection, commands)
        unknown = [n for n, answer in enumerate(answers) if isinstance(answer, exceptions.NoScriptError)]
        if unknown:
            again = [("EVAL", SOURCES[str(commands[n][1])], *commands[n][2:]) for n in unknown]
            for n, answer in zip(unknown, await exchange(self._connection, again), strict=True):
                answers[n] = answer
        return answers

    @staticmethod
    def _fail(calls: Iterable[_Call], error: Exception) -> None:
        for call in list(calls):
            call.settle([error])
        if isinstance(calls, deque):
            calls.clear()

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)


class _Call(NamedTuple):
    """What makes commands, and the future of their answers."""

    make: Callable[[], Sequence[Command]]
    answers: Answers

    def settle(self, answers: list[Any]) -> None:
        """Wake the caller, unless it was cancelled."""
        if not self.answers.done():
            self.answers.set_result(answers)


async def exchange(connection: Any, commands: Iterable[Command]) -> list[Any]:
    """Send commands in one round trip; return their answers, of which some may be exceptions.

    Cancellation: leaves the connection unusable; disconnect it.
    """
    commands = list(commands)
    await connection.send_packed_command(connection.pack_commands(commands), check_health=False)
    answers: list[Any] = []
    for _ in commands:
        try:
            answers.append(await connection.read_response(disconnect_on_error=False))
        except exceptions.ResponseError as error:
            answers.append(error)
    return answers


@asynccontextmanager
async def answered_within(seconds: float) -> AsyncGenerator[None]:
    """Limit the time of a block; if it ends late, the loop was held, and the server is perhaps not to blame.

    Raises:
        TimeoutError: The time is over.

    Cancellation: ends the block.
    """
    loop = asyncio.get_running_loop()
    due = loop.time() + seconds
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        late = loop.time() - due
        if late < _LATE:
            raise
        raise TimeoutError(f"the event loop of this process was held for {late:.1f} s") from None


def unavailable(address: str, error: BaseException) -> BusUnavailableError:
    """Return what an error of redis-py, or of the system, means for the fleet."""
    for cause in _chain(error):
        if isinstance(cause, _REFUSALS):
            return BusRefusedError(f"{address} refuses this process: {str(cause).rstrip('.')}")
    if isinstance(error, TimeoutError | exceptions.TimeoutError):
        # redis-py's own text says no more than that.
        held = f": {error}" if isinstance(error, TimeoutError) and str(error) else ""
        return BusUnavailableError(f"{address} does not answer{held}")
    for kind, reason in _REASONS.items():
        if isinstance(error, kind):
            return BusUnavailableError(f"{address} {reason}")
    if str(error).startswith("MOVED "):
        return BusRefusedError(f"{address} is a node of a cluster, and another node has the keys: {error}")
    if "DB index is out of range" in str(error):
        return BusRefusedError(f"{address} has no database of this number")
    if isinstance(error, exceptions.ResponseError):
        return BusUnavailableError(f"{address} answers with an error: {error}")
    return BusUnavailableError(f"{address} cannot be reached: {error}")


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    # redis-py raises its own error while it handles that of TLS, without naming it as the cause.
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
