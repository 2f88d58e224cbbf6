"""The link of one process to the bus of its fleet: it reads, sends, and knows the state of the bus.

Rules, each with its own test:

1. What is posted to the log arrives once at every handler, those of its own node included, however the bus
   fails meanwhile. While the bus is down, it waits. If the answer to its publication was lost, the node finds
   the entry in the log, or sends it again, and readers drop the copy. If the server has lost its data, the
   entries of the last hour are sent again, and keep their positions.
2. The link is up once it has read what was written before; then it sends what waits. A change of state logs
   one line. A server that is down is tried again with exponential backoff and jitter.
3. While the bus is down, and for ``HOLD_OFF`` after it is back, no node judges leases: their holders could
   not renew them.
4. No entry and no handler ends the reader.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, TypeVar

from otel_tasks._core.backoff import Backoff, Delays
from otel_tasks._core.log import logger
from otel_tasks._core.telemetry import quiet_context
from otel_tasks.fleet.bus import LEASE, START, BusRefusedError, BusUnavailableError, position_of
from otel_tasks.fleet.entries import UnreadableEntryError, open_envelope
from otel_tasks.fleet.outbox import Outbox

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from otel_tasks.fleet.bus import Bus, Entry
    from otel_tasks.fleet.entries import FleetEntry

    E = TypeVar("E", bound=FleetEntry)

T = TypeVar("T")

# Seconds after the bus is back in which holders renew leases and claims, and no node judges them.
HOLD_OFF: Final = 3.0
# A link that was up for so many seconds retries with short delays again.
_STEADY = 10.0
# The most entries remembered to detect copies, which come seconds after the original or after a data loss.
_SEEN_LIMIT = 50_000
# Bytes of an entry of the inbox that takes a turn of the loop by itself: it takes 0.1 ms or more to decode.
_LARGE = 8192
# The most senders of unreadable entries that are remembered, so that each kind is logged once.
_SKIPPED_LIMIT = 1000
# Milliseconds by which the server's clock may go back before that counts.
_CLOCK_SLACK = 1000

_BACKOFF = Backoff(delay=0.1, factor=2.0, max_delay=2.0, jitter=0.5)


class Link:
    """The connection of one node to its fleet. Its methods belong to one event loop.

    Args:
        bus: The bus.
        node: The name of this node.
        after: The position after which the log is read.

    Attributes:
        bus: The bus.
        node: The name of this node.
        is_up: True while the bus answers, and everything written before has been read.
        judges: True while a missing lease or claim means that its holder is gone.
        synced: True once the link has been up.

    Example:
        >>> link = Link(bus, "host/7/abc")
        >>> link.subscribe(CancelEntry, lambda cancel, entry: print(cancel.name))
        >>> await link.start(timeout=5.0)
    """

    def __init__(self, bus: Bus, node: str, *, after: str = START) -> None:
        self.bus = bus
        self.node = node
        self.is_up = False
        self.judges = False
        self.synced = False
        self._inlet = _Inlet(node, after, lambda number, entry_id: self._outbox.written(number, entry_id))
        self._outbox = Outbox(bus, node, self._fail, self._inlet.published)
        self._on_state: list[Callable[[], None]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._started: asyncio.Future[None] | None = None
        self._attempt: asyncio.Timeout | None = None
        self._hold_off: asyncio.TimerHandle | None = None
        self._error: BusUnavailableError | None = None
        # When the state changed last, on the loop's clock.
        self._since = 0.0
        # How often the link has been up: an error of a call that began before says nothing about now.
        self._ups = 0
        self._was_steady = False
        # The server's clock less the loop's; None before the first connection.
        self._clock_offset: float | None = None

    @property
    def position(self) -> str:
        """The newest position of the log that this node has read or published."""
        return self._inlet.position

    @property
    def unpublished(self) -> int:
        """The number of this node's newest entry that is not in the log yet; 0 if all are."""
        return self._outbox.newest

    @property
    def error(self) -> BusUnavailableError | None:
        """Why the bus is not available; None if it is, or if nothing is known yet."""
        return self._error

    def subscribe(self, kind: type[E], handler: Callable[[E, Entry], None]) -> None:
        """Call ``handler`` in the loop for each entry of a kind, with its position and age."""
        self._inlet.subscribe(kind, handler)

    def on_state(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` in the loop after ``is_up`` or ``judges`` has changed."""
        self._on_state.append(callback)

    # -- sending ----------------------------------------------------------------------------

    def post(self, entry: FleetEntry, *, must_arrive: bool = True) -> asyncio.Future[str]:
        """Append an entry to the log, now or when the bus is back.

        Args:
            entry: The entry.
            must_arrive: True lets the entry wait while the bus is down; False fails.

        Returns:
            The future of its position. You need not await it, and cancelling it withdraws nothing. It raises
            ``BusUnavailableError`` if the outbox is full, if the link stops, or for ``must_arrive``.

        Raises:
            ValueError: The entry is too large, or a name in it is.
        """
        return self._outbox.post(entry, must_arrive=must_arrive)

    def post_to(self, node: str, entry: FleetEntry, *, must_arrive: bool = False) -> None:
        """Append an entry to the inbox of a node, together with others of this turn of the loop.

        Args:
            node: The node.
            entry: The entry. It may arrive twice.
            must_arrive: True lets the entry wait while the bus is down; False drops it.

        Raises:
            ValueError: The entry is too large, or a name in it is.
        """
        self._outbox.post_to(node, entry, must_arrive=must_arrive)

    def finish(self, key: str, delivery: str) -> asyncio.Future[None] | None:
        """End this node's claim of an execution, with a mark that its message was executed.

        Args:
            key: The execution.
            delivery: The message.

        Returns:
            The future of that; it has no error, and is done if the bus fails. None while the bus is down. The
            end then waits for it: the claim expires meanwhile, and no other node takes one before.
        """
        return self._outbox.finish(key, delivery)

    async def call(self, make: Callable[[], Awaitable[T]]) -> T:
        """Call the bus, and take the link down if that fails.

        Args:
            make: Starts the call, as ``lambda: link.bus.roster()``.

        Raises:
            BusUnavailableError: The bus fails, or the link is down: then it is not called.

        Cancellation: cancels the call; the bus may have executed it.
        """
        if not self.is_up:
            raise BusUnavailableError(f"{self.bus.address} is not available") from self._error
        ups = self._ups
        try:
            return await make()
        except BusUnavailableError as error:
            if ups == self._ups:
                self._fail(error)
            raise

    # -- time -------------------------------------------------------------------------------

    def bus_time(self) -> float | None:
        """Return the time of the bus's clock in seconds, as of the last ``sync_clock()``; None if unknown."""
        if self._clock_offset is None:
            return None
        return asyncio.get_running_loop().time() + self._clock_offset

    async def sync_clock(self) -> None:
        """Compare the bus's clock with the loop's, which drift apart by seconds a day.

        Raises:
            BusUnavailableError: The bus fails.

        Cancellation: ends the call.
        """
        loop = asyncio.get_running_loop()
        before = loop.time()
        time = await self.bus.time()
        self._clock_offset = time - (before + loop.time()) / 2

    # -- start and stop ---------------------------------------------------------------------

    async def start(self, timeout: float) -> None:
        """Connect, and read the log.

        Args:
            timeout: Seconds to wait; after that, the link continues in the background.

        Raises:
            BusRefusedError: The server refuses this process.

        Cancellation: stops the link.
        """
        loop = asyncio.get_running_loop()
        self._since = loop.time()
        self._started = loop.create_future()
        # Not in the caller's context: the link does not belong to its trace and its group.
        context = quiet_context()
        self._tasks = [
            loop.create_task(self._read(), name="otel_tasks.fleet.reader", context=context),
            loop.create_task(self._outbox.run(), name="otel_tasks.fleet.sender", context=context),
        ]
        try:
            await asyncio.wait([self._started], timeout=timeout)
            if self._started.done():
                self._started.result()
        except BaseException:
            await self.stop(flush=0.0)
            raise
        finally:
            self._started = None

    async def flush(self) -> None:
        """Wait until everything that was posted has been sent.

        Cancellation: ends the wait.
        """
        await self._outbox.flushed()

    async def stop(self, flush: float = 2.0) -> None:
        """Send what waits, and end the link.

        Args:
            flush: Seconds for which entries may wait for the bus.

        Cancellation: ends the link without further waiting.
        """
        try:
            if flush > 0 and self._tasks:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(flush):
                        await self._outbox.flushed()
        finally:
            await self._end()

    async def _end(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if len(self._outbox):
            logger.warning(
                "the fleet stopped; entries that were not sent to the bus at %s: %d",
                self.bus.address,
                len(self._outbox),
            )
        self._outbox.fail(BusUnavailableError("the fleet has stopped"))
        self._set_state(is_up=False, judges=False)
        if tasks:
            await asyncio.wait(tasks)
        await self.bus.close()

    # -- reading ----------------------------------------------------------------------------

    async def _read(self) -> None:
        delays = Delays(_BACKOFF)
        while True:
            try:
                await self._try_to_read()
            except BusUnavailableError as error:
                self._fail(error)
            except Exception:
                logger.exception("reading the fleet's bus raised; retrying")
                self._fail(BusUnavailableError(f"reading {self.bus.address} raised"))
            if self._was_steady:
                delays.start_over()
            await asyncio.sleep(delays.next())

    async def _try_to_read(self) -> None:
        try:
            async with asyncio.timeout(None) as self._attempt:
                await self.bus.connect()
                await self.sync_clock()
                await self._follow()
        except TimeoutError:
            # A call has failed; `_fail` has ended this attempt.
            pass
        finally:
            self._attempt = None

    async def _follow(self) -> None:
        async with contextlib.aclosing(self.bus.read(self.node, self._inlet.resume_after)) as batches:
            async for batch in batches:
                if batch:
                    self._inlet.take(batch)
                else:
                    await self._outbox.open()
                    self._come_up()

    # -- state ------------------------------------------------------------------------------

    def _come_up(self) -> None:
        loop = asyncio.get_running_loop()
        hold_off = HOLD_OFF
        if self._error is not None:
            logger.info(
                "the fleet's bus at %s is available again, after %g s",
                self.bus.address,
                round(loop.time() - self._since, 1),
            )
        elif not self.synced and self.bus.server_age >= LEASE + HOLD_OFF:
            # Neither this node nor the server was away, as far as it can know.
            hold_off = 0.0
        self.synced = True
        self._error = None
        self._ups += 1
        self._since = loop.time()
        if hold_off:
            self._hold_off = loop.call_later(hold_off, self._set_state, True, True)
        self._set_state(True, not hold_off)
        if self._started is not None and not self._started.done():
            self._started.set_result(None)

    def _fail(self, error: BusUnavailableError) -> None:
        """Take the link down, once, and let the reader connect again."""
        before, self._error = self._error, error
        if type(before) is not type(error):
            logger.warning(
                "the fleet's bus at %s is unavailable: %s; until it is back, cancellations reach "
                "only this process, and the rest wait",
                self.bus.address,
                error,
            )
        if before is None:
            loop = asyncio.get_running_loop()
            self._was_steady = self.is_up and loop.time() - self._since >= _STEADY
            self._since = loop.time()
            self._outbox.close()
            self._set_state(False, False)
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.reschedule(0.0)
        if isinstance(error, BusRefusedError) and self._started is not None and not self._started.done():
            self._started.set_exception(error)

    def _set_state(self, is_up: bool, judges: bool) -> None:
        if not is_up and self._hold_off is not None:
            self._hold_off.cancel()
            self._hold_off = None
        if (self.is_up, self.judges) == (is_up, judges):
            return
        self.is_up, self.judges = is_up, judges
        for callback in self._on_state:
            try:
                callback()
            except Exception:
                logger.exception("%r raised after the state of the fleet's bus changed", callback)


class _Inlet:
    """What comes from the bus: positions, copies, and handlers.

    Args:
        node: This node.
        after: The position after which the log is read.
        written: Called with the number and the id of each entry of this node that the log has.
    """

    def __init__(self, node: str, after: str, written: Callable[[int, str], None]) -> None:
        self._node = node
        self._written = written
        self._handlers: dict[type[FleetEntry], list[Callable[[Any, Entry], None]]] = {}
        self.resume_after = after
        self.position = START
        self._at = position_of(START)
        # The sender and the number of entries that were read. Its order is that of their reading.
        self._seen: dict[tuple[str, int], None] = {}
        self._skipped: set[tuple[str, str]] = set()
        # Large entries of the inbox, which wait for their turns.
        self._large: deque[Entry] = deque()

    def subscribe(self, kind: type[FleetEntry], handler: Callable[[Any, Entry], None]) -> None:
        """Add a handler."""
        self._handlers.setdefault(kind, []).append(handler)

    def published(self, entry_id: str) -> None:
        """Record the position of an entry of this node."""
        at = position_of(entry_id)
        if at > self._at:
            self.position, self._at = entry_id, at

    def take(self, batch: list[Entry]) -> None:
        """Hand a batch to the handlers."""
        for entry in reversed(batch):
            if not entry.inbox:
                self._move_to(entry)
                break
        for entry in batch:
            if entry.inbox and len(entry.payload) > _LARGE:
                self._take_later(entry)
            else:
                self._open(entry)

    def _take_later(self, entry: Entry) -> None:
        """Hand out an entry in a turn of its own: the answers of many nodes would hold the loop.

        Each part of an answer has a number, so their order does not matter.
        """
        self._large.append(entry)
        if len(self._large) == 1:
            asyncio.get_running_loop().call_soon(self._open_large)

    def _open_large(self) -> None:
        entry = self._large.popleft()
        if self._large:
            asyncio.get_running_loop().call_soon(self._open_large)
        self._open(entry)

    def _open(self, entry: Entry) -> None:
        try:
            content, envelope = open_envelope(entry.payload)
        except UnreadableEntryError as error:
            self._skip(error)
            return
        if entry.inbox or self._is_new(content.node, envelope.get("post"), entry.id):
            self._hand_out(content, _original(entry, envelope.get("was")))

    def _move_to(self, entry: Entry) -> None:
        self.resume_after = entry.id
        at = position_of(entry.id)
        # A server that has lost its data, and whose clock went back, has smaller positions from now on.
        went_back = at[0] + entry.age * 1000 < self._at[0] - _CLOCK_SLACK
        if at > self._at or went_back:
            self.position, self._at = entry.id, at

    def _is_new(self, node: str, number: object, entry_id: str) -> bool:
        if type(number) is not int:
            return True
        if node == self._node:
            self._written(number, entry_id)
        if (node, number) in self._seen:
            return False
        self._seen[node, number] = None
        if len(self._seen) > _SEEN_LIMIT:
            # Many at once: the next first key of a dictionary is behind the gaps of those before it.
            for key in list(islice(self._seen, _SEEN_LIMIT // 10)):
                del self._seen[key]
        return True

    def _hand_out(self, content: FleetEntry, entry: Entry) -> None:
        for handler in self._handlers.get(type(content), ()):
            try:
                handler(content, entry)
            except Exception:
                logger.exception("%r raised for a %r entry from %s", handler, content.KIND, content.node)

    def _skip(self, error: UnreadableEntryError) -> None:
        key = (error.node, error.kind)
        if key not in self._skipped and len(self._skipped) < _SKIPPED_LIMIT:
            self._skipped.add(key)
            logger.warning(
                "skipped a fleet entry of kind %r from %r: %s; further ones are not logged",
                error.kind,
                error.node,
                error,
            )


def _original(entry: Entry, was: object) -> Entry:
    """Return an entry that its sender has sent again, with the position and the age that it had at first."""
    if was is None:
        return entry
    try:
        first, now = position_of(str(was)), position_of(entry.id)
    except ValueError:
        return entry
    if first >= now:
        return entry
    return entry._replace(id=str(was), age=entry.age + (now[0] - first[0]) / 1000)
