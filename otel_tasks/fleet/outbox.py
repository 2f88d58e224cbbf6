"""The entries of this node that wait for the bus, and those of the last hour, in case the server loses them.

An entry for the log waits until its id is known: from the answer to its publication, or because the node has
read it in the log. Its number identifies copies.
"""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import count, islice
from typing import TYPE_CHECKING, Final, NamedTuple

from otel_tasks._core.log import logger
from otel_tasks.fleet.bus import KEPT, BusUnavailableError
from otel_tasks.fleet.entries import encode

if TYPE_CHECKING:
    from collections.abc import Callable

    from otel_tasks.fleet.bus import Bus
    from otel_tasks.fleet.entries import FleetEntry

# The most entries that wait for the bus: for the log, and for the inboxes.
OUTBOX_LIMIT: Final = 10_000
# Entries that are sent in one round trip.
BATCH: Final = 200
# Seconds after which the wait of an entry matters.
_LATE: Final = 0.05
# The log may have dropped older entries, which is not a loss of data.
_RECENT: Final = KEPT - 60.0


class Outbox:
    """The entries that wait to be sent by one node.

    Args:
        bus: The bus.
        node: This node.
        on_failure: Called with the error when the bus fails.
        on_published: Called with the id of each entry that the log has.
    """

    def __init__(
        self,
        bus: Bus,
        node: str,
        on_failure: Callable[[BusUnavailableError], None],
        on_published: Callable[[str], None],
    ) -> None:
        self._bus = bus
        self._node = node
        self._on_failure = on_failure
        self._on_published = on_published
        self._numbers = count(1)
        self._posts: dict[int, _Post] = {}
        self._letters: deque[_Letter] = deque()
        # The message of each execution whose claim ends, and the futures of that.
        self._finished: dict[str, str] = {}
        self._finishing: list[asyncio.Future[None]] = []
        self._published: deque[_Post] = deque(maxlen=OUTBOX_LIMIT)
        self._wake = asyncio.Event()
        self._empty = asyncio.Event()
        self._open = False
        # True while the bus is called.
        self._in_hand = False
        self._full_logged = False

    def __len__(self) -> int:
        return len(self._posts) + len(self._letters)

    @property
    def newest(self) -> int:
        """The number of the newest entry that is not in the log yet; 0 if all are."""
        return next(reversed(self._posts), 0)

    def post(self, entry: FleetEntry, *, must_arrive: bool) -> asyncio.Future[str]:
        """Queue an entry for the log; return the future of its id."""
        number = next(self._numbers)
        payload = encode(entry, post=number)
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        # Callers need not await it.
        future.add_done_callback(_retrieve)
        if not must_arrive and not self._open:
            future.set_exception(BusUnavailableError(f"{self._bus.address} is not available"))
        elif len(self._posts) >= OUTBOX_LIMIT:
            self._refuse(future)
        else:
            self._posts[number] = _Post(number, entry, payload, future, must_arrive)
            self._wake.set()
        return future

    def post_to(self, node: str, entry: FleetEntry, *, must_arrive: bool) -> None:
        """Queue an entry for an inbox; unless it must arrive, it is dropped while the bus is down."""
        if (self._open or must_arrive) and len(self._letters) < OUTBOX_LIMIT:
            self._letters.append(_Letter(node, encode(entry), must_arrive))
            self._wake.set()

    def finish(self, key: str, delivery: str) -> asyncio.Future[None] | None:
        """End the claim of an execution, together with what else is sent; return the future of that.

        While the bus is down, it waits, and the future is None. The future has no error: it is done, too, if
        the bus fails.
        """
        if len(self._finished) >= OUTBOX_LIMIT:
            # The claim expires.
            return None
        self._finished[key] = delivery
        if not self._open:
            return None
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._finishing.append(future)
        self._wake.set()
        return future

    def written(self, number: int, entry_id: str) -> None:
        """Record that the log has an entry."""
        post = self._posts.pop(number, None)
        if post is not None:
            self._on_published(entry_id)
            post.arrived(entry_id)
            if post.must_arrive:
                self._published.append(post)

    # -- state ------------------------------------------------------------------------------

    async def open(self) -> None:
        """Start to send; first, what the server has lost.

        Raises:
            BusUnavailableError: The bus fails.

        Cancellation: leaves it closed.
        """
        await self._send_lost()
        self._open = True
        self._full_logged = False
        self._wake.set()

    def close(self) -> None:
        """Stop sending: entries wait, and those that need not arrive fail."""
        self._open = False
        error = BusUnavailableError(f"{self._bus.address} is not available")
        for post in [post for post in self._posts.values() if not post.must_arrive]:
            self._give_up(post, error)
        self._letters = deque(letter for letter in self._letters if letter.must_arrive)
        self._wake_finishing()

    def fail(self, error: BusUnavailableError) -> None:
        """Give up everything."""
        self._open = False
        for post in list(self._posts.values()):
            self._give_up(post, error)
        self._letters.clear()
        self._finished.clear()
        self._wake_finishing()

    async def flushed(self) -> None:
        """Wait until nothing is left to send.

        Cancellation: ends the wait.
        """
        while self._has_work or self._in_hand:
            self._empty.clear()
            await self._empty.wait()

    # -- sending ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Send what is queued, whenever the outbox is open.

        Cancellation: ends it.
        """
        while True:
            self._wake.clear()
            if self._open and self._has_work:
                self._in_hand = True
                try:
                    await self._send_some()
                finally:
                    self._in_hand = False
            else:
                if not self._has_work:
                    self._empty.set()
                await self._wake.wait()

    @property
    def _has_work(self) -> bool:
        return bool(self._posts or self._letters or self._finished)

    async def _send_some(self) -> None:
        try:
            await self._publish()
            await self._deliver()
        except BusUnavailableError as error:
            self._on_failure(error)
        except Exception:
            # A bug: without this, one entry would be sent again and again.
            logger.exception("sending to the fleet's bus raised; the waiting entries are dropped")
            self.fail(BusUnavailableError(f"sending to {self._bus.address} raised"))
            self._open = True

    async def _publish(self) -> None:
        posts = list(islice(self._posts.values(), BATCH))
        if not posts:
            return
        answers = await asyncio.gather(
            *(self._bus.publish(post.dated()) for post in posts), return_exceptions=True
        )
        errors: list[BaseException] = []
        for post, answer in zip(posts, answers, strict=True):
            if isinstance(answer, str):
                self.written(post.number, answer)
            else:
                errors.append(answer)
        for error in errors:
            raise error

    async def _deliver(self) -> None:
        letters = [self._letters.popleft() for _ in range(min(BATCH, len(self._letters)))]
        finished, self._finished = self._finished, {}
        finishing, self._finishing = self._finishing, []
        if not letters and not finished:
            return
        inboxes: dict[str, list[bytes]] = {}
        for letter in letters:
            inboxes.setdefault(letter.node, []).append(letter.payload)
        try:
            await self._bus.send(inboxes, owner=self._node, finished=finished)
        except BaseException:
            # It may have arrived, and arrives twice then: an inbox's entries are repeatable.
            self._letters.extendleft(letter for letter in reversed(letters) if letter.must_arrive)
            self._finished = finished | self._finished
            raise
        finally:
            _wake_all(finishing)

    async def _send_lost(self) -> None:
        """Publish again what the log no longer has; a server loses the newest entries first, or all."""
        since = asyncio.get_running_loop().time() - _RECENT
        while self._published and self._published[0].since < since:
            self._published.popleft()
        if not self._published or not await self._bus.lost([self._published[-1].id]):
            return
        recent = list(self._published)
        lost = await self._bus.lost([post.id for post in recent])
        logger.warning(
            "the fleet's server at %s lost data; entries of the last hour that are sent again: %d",
            self._bus.address,
            len(lost),
        )
        for post in recent:
            if post.id in lost:
                post.id = await self._bus.publish(post.copy())

    def _refuse(self, future: asyncio.Future[str]) -> None:
        if not self._full_logged:
            self._full_logged = True
            logger.warning(
                "the fleet's outbox is full: it refuses further entries until the bus at %s is back",
                self._bus.address,
            )
        future.set_exception(BusUnavailableError(f"{OUTBOX_LIMIT} entries wait for {self._bus.address}"))

    def _wake_finishing(self) -> None:
        finishing, self._finishing = self._finishing, []
        _wake_all(finishing)

    def _give_up(self, post: _Post, error: BusUnavailableError) -> None:
        del self._posts[post.number]
        if not post.future.done():
            post.future.set_exception(error)


class _Post:
    """One entry for the log."""

    __slots__ = (
        "_late",
        "_posted_at",
        "entry",
        "first_id",
        "future",
        "id",
        "must_arrive",
        "number",
        "payload",
        "since",
    )

    def __init__(
        self,
        number: int,
        entry: FleetEntry,
        payload: bytes,
        future: asyncio.Future[str],
        must_arrive: bool,
    ) -> None:
        self.number = number
        self.entry = entry
        self.payload = payload
        self.future = future
        self.must_arrive = must_arrive
        self.id = self.first_id = ""
        self.since = 0.0
        self._posted_at = future.get_loop().time()
        self._late: float | None = None

    def dated(self) -> bytes:
        """Return its bytes, with the seconds for which it has waited."""
        waited = self.future.get_loop().time() - self._posted_at
        if waited < _LATE:
            return self.payload
        self._late = round(waited, 3)
        try:
            return encode(self.entry, post=self.number, late=self._late)
        except ValueError:
            # It has the largest size already.
            return self.payload

    def copy(self) -> bytes:
        """Return its bytes for a log that has lost it."""
        return encode(self.entry, post=self.number, was=self.first_id, late=self._late)

    def arrived(self, entry_id: str) -> None:
        """Record the entry's id, and wake the task that waits for it."""
        self.id = self.first_id = entry_id
        self.since = self.future.get_loop().time()
        self.payload = b""
        # A cancelled waiter has cancelled the future, and the entry is sent anyway.
        if not self.future.done():
            self.future.set_result(entry_id)


class _Letter(NamedTuple):
    node: str
    payload: bytes
    must_arrive: bool


def _wake_all(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


def _retrieve(future: asyncio.Future[str]) -> None:
    if not future.cancelled():
        future.exception()
