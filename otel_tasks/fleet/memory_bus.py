"""The bus of one process: ``memory://`` joins the fleets of one event loop, in tests and in development.

It follows the rules of ``bus``. Its clock is the loop's, so a test on a virtual clock sees leases and claims
expire. In a test, ``memory_server(...).fail()`` takes the server down, and ``restore()`` brings it back.
"""

from __future__ import annotations

import asyncio
import math
import threading
import weakref
from bisect import bisect_right
from typing import TYPE_CHECKING

from otel_tasks.fleet.bus import (
    DONE_KEPT,
    END,
    INBOX_KEPT,
    INBOX_LIMIT,
    KEPT,
    LEASE,
    NONE_FINISHED,
    START,
    BusUnavailableError,
    Claim,
    Entry,
    position_of,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence

    Record = tuple[tuple[int, int], bytes]

# A reader gets as many entries at once as from Redis.
_BATCH = 1000

_servers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, str], MemoryServer]] = (
    weakref.WeakKeyDictionary()
)


def memory_server(name: str = "", namespace: str = "") -> MemoryServer:
    """Return the server of ``memory://name`` for a namespace, in the running loop.

    Example:
        >>> memory_server(namespace="shop").fail()
        >>> memory_server(namespace="shop").restore()
    """
    loop = asyncio.get_running_loop()
    servers = _servers.setdefault(loop, {})
    if (name, namespace) not in servers:
        servers[name, namespace] = MemoryServer(_clock_of(loop))
    return servers[name, namespace]


def _clock_of(loop: asyncio.AbstractEventLoop) -> Callable[[], float]:
    # Weak: a server with a reference to its loop would keep both in the dictionary. A thread reads it too.
    reference = weakref.ref(loop)

    def clock() -> float:
        loop = reference()
        return 0.0 if loop is None else loop.time()

    return clock


class MemoryBus:
    """A connection of one node to a ``MemoryServer``.

    Args:
        name: The part of the URL that keeps servers apart.
        namespace: The fleet.
    """

    renew_blocks = False
    server_age = math.inf

    def __init__(self, name: str, namespace: str) -> None:
        self.address = f"memory://{name}"
        self._names = (name, namespace)
        # The message of each claim: a claim that has expired is taken again.
        self._deliveries: dict[str, str] = {}
        self._after: dict[str, tuple[int, int]] = {}
        self._connected: MemoryServer | None = None

    async def connect(self) -> None:
        """Find the server of this loop, and check that it answers."""
        self._connected = memory_server(*self._names)
        self._connected.check()

    async def close(self) -> None:
        """Leave the server, which lives as long as its loop."""
        self._connected = None

    async def time(self) -> float:
        """Return the time of the server's clock."""
        return self._server.time()

    @property
    def _server(self) -> MemoryServer:
        if self._connected is None:
            raise BusUnavailableError(f"{self.address} is not connected")
        self._connected.check()
        return self._connected

    async def publish(self, payload: bytes) -> str:
        """Append an entry to the log."""
        return self._server.append(payload)

    async def lost(self, ids: Sequence[str]) -> set[str]:
        """Return those of these entries that the log no longer has."""
        server = self._server
        return {entry_id for entry_id in ids if not server.has(entry_id)}

    async def send(
        self,
        inboxes: Mapping[str, Collection[bytes]],
        *,
        owner: str = "",
        finished: Mapping[str, str] = NONE_FINISHED,
    ) -> None:
        """Append entries to inboxes, and turn claims into marks that their messages were executed."""
        server = self._server
        server.deliver(inboxes)
        for key, delivery in finished.items():
            self._deliveries.pop(key, None)
            server.finish(key, owner, delivery)

    async def read(self, inbox: str, after: str) -> AsyncGenerator[list[Entry]]:
        """Iterate over the log and an inbox.

        Cancellation: ends the iteration.
        """
        position = self._server.last() if after == END else position_of(after)
        if self._server.last() < position:
            position = position_of(START)
        caught_up = False
        while True:
            server = self._server
            batch = server.entries(inbox, position, self._after.get(inbox, position_of(START)))
            if batch or not caught_up:
                caught_up = caught_up or not batch
                yield batch
            else:
                await server.wait()
            for entry in batch:
                if entry.inbox:
                    self._after[inbox] = position_of(entry.id)
                else:
                    position = position_of(entry.id)

    async def announce(self, node: str, description: bytes, ttl: float) -> None:
        """Enter a node into the roster."""
        self._server.announce(node, description, ttl)

    async def roster(self) -> dict[str, tuple[bytes, float]]:
        """Return the nodes of the roster."""
        return self._server.roster()

    async def namespaces(self) -> set[str]:
        """Return the fleets of the server that have nodes."""
        servers = _servers.get(asyncio.get_running_loop(), {})
        return {fleet for (name, fleet), each in servers.items() if name == self._names[0] and each.roster()}

    async def leave(self, node: str) -> None:
        """Remove a node, its lease, and its inbox."""
        self._server.leave(node)

    async def claim(self, key: str, owner: str, delivery: str) -> Claim:
        """Claim an execution."""
        claim = self._server.claim(key, owner, delivery)
        if claim is Claim.TAKEN:
            self._deliveries[key] = delivery
        return claim

    async def release(self, key: str, owner: str) -> None:
        """Drop a claim."""
        self._deliveries.pop(key, None)
        self._server.release(key, owner)

    async def leases(self, nodes: Collection[str]) -> set[str]:
        """Return the nodes whose lease is valid."""
        return self._server.leases(nodes)

    def renew(self, node: str, *, lease: bool, claims: Collection[str]) -> list[str]:
        """Renew the lease and claims of a node; call it in the loop or in a thread."""
        held = {key: self._deliveries[key] for key in claims if key in self._deliveries}
        lost = self._server.renew(node, lease=lease, claims=held)
        for key in lost:
            self._deliveries.pop(key, None)
        return lost


class MemoryServer:
    """The data of one fleet: a log, inboxes, a roster, and keys that expire.

    Args:
        clock: Its clock, in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._keys = _Keys(clock)
        self._log: list[Record] = []
        self._inboxes: dict[str, tuple[float, list[Record]]] = {}
        self._roster: dict[str, tuple[float, float, bytes]] = {}
        self._newest = position_of(START)
        # In the order in which they started to wait, so that a test sees one order of events.
        self._waiting: dict[asyncio.Future[None], None] = {}
        self._failure: str | None = None

    # -- faults -----------------------------------------------------------------------------

    def fail(self, reason: str = "it was taken away") -> None:
        """Refuse everything until ``restore``, and end the readers."""
        self._failure = reason
        self._wake()

    def restore(self, *, lose_data: bool = False) -> None:
        """Answer again.

        Args:
            lose_data: Forget everything, like a restarted server without persistence.
        """
        self._failure = None
        if lose_data:
            self._keys = _Keys(self._clock)
            self._log.clear()
            self._inboxes.clear()
            self._roster.clear()

    def check(self) -> None:
        """Raise ``BusUnavailableError`` while it fails."""
        if self._failure is not None:
            raise BusUnavailableError(f"memory:// does not answer: {self._failure}")

    def time(self) -> float:
        """Return the time of its clock."""
        return self._clock()

    # -- log and inboxes --------------------------------------------------------------------

    def append(self, payload: bytes) -> str:
        """Append an entry to the log, and drop entries that are too old."""
        oldest = (int((self._clock() - KEPT) * 1000), 0)
        if self._log and self._log[0][0] < oldest:
            self._log = _records_after(self._log, oldest)
        self._log.append((self._next_position(), payload))
        self._wake()
        return _id(self._newest)

    def has(self, entry_id: str) -> bool:
        """Return whether the log has an entry."""
        time, number = position_of(entry_id)
        rest = _records_after(self._log, (time, number - 1))
        return bool(rest) and rest[0][0] == (time, number)

    def last(self) -> tuple[int, int]:
        """Return the position of the log's last entry."""
        return self._log[-1][0] if self._log else position_of(START)

    def deliver(self, inboxes: Mapping[str, Collection[bytes]]) -> None:
        """Append entries to inboxes, and drop the inboxes that have expired."""
        now = self._clock()
        self._inboxes = {node: inbox for node, inbox in self._inboxes.items() if inbox[0] > now}
        for node, payloads in inboxes.items():
            _, records = self._inboxes.get(node, (now, []))
            records = records + [(self._next_position(), payload) for payload in payloads]
            self._inboxes[node] = (now + INBOX_KEPT, records[-INBOX_LIMIT:])
        self._wake()

    def entries(self, inbox: str, after_log: tuple[int, int], after_inbox: tuple[int, int]) -> list[Entry]:
        """Return the next entries of the log and of an inbox."""
        now = self._clock()
        expires, records = self._inboxes.get(inbox, (now, []))
        letters = _records_after(records, after_inbox)[:_BATCH] if expires > now else []
        found = [_entry(record, now, inbox=False) for record in _records_after(self._log, after_log)[:_BATCH]]
        return found + [_entry(record, now, inbox=True) for record in letters]

    async def wait(self) -> None:
        """Wait for an entry, or for a failure.

        Cancellation: ends the wait.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[future] = None
        try:
            await future
        finally:
            del self._waiting[future]

    def _next_position(self) -> tuple[int, int]:
        time, number = self._newest
        now = int(self._clock() * 1000)
        self._newest = (now, 0) if now > time else (time, number + 1)
        return self._newest

    def _wake(self) -> None:
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    # -- roster -----------------------------------------------------------------------------

    def announce(self, node: str, description: bytes, ttl: float) -> None:
        """Enter a node into the roster for ``ttl`` seconds."""
        now = self._clock()
        self._roster[node] = (now, now + ttl, description)

    def roster(self) -> dict[str, tuple[bytes, float]]:
        """Return the description of each node, and the seconds since it was announced."""
        now = self._clock()
        self._roster = {node: row for node, row in self._roster.items() if row[1] > now}
        return {node: (description, now - since) for node, (since, _, description) in self._roster.items()}

    def leave(self, node: str) -> None:
        """Remove a node, its lease, and its inbox."""
        self._roster.pop(node, None)
        self._inboxes.pop(node, None)
        with self._keys as keys:
            keys.drop(_lease_key(node))

    # -- claims and leases ------------------------------------------------------------------

    def claim(self, key: str, owner: str, delivery: str) -> Claim:
        """Claim an execution, unless it is claimed or its message was executed."""
        with self._keys as keys:
            if keys.get(_done_key(key, delivery)) is not None:
                return Claim.DONE
            if keys.get(_claim_key(key)) is not None:
                return Claim.HELD
            keys.put(_claim_key(key), f"{owner} {delivery}", LEASE)
            return Claim.TAKEN

    def finish(self, key: str, owner: str, delivery: str) -> None:
        """Mark a message as executed, and drop the owner's claim."""
        with self._keys as keys:
            keys.put(_done_key(key, delivery), "", DONE_KEPT)
            if _is_of(keys.get(_claim_key(key)), owner):
                keys.drop(_claim_key(key))

    def release(self, key: str, owner: str) -> None:
        """Drop the owner's claim."""
        with self._keys as keys:
            if _is_of(keys.get(_claim_key(key)), owner):
                keys.drop(_claim_key(key))

    def leases(self, nodes: Collection[str]) -> set[str]:
        """Return the nodes whose lease is valid."""
        with self._keys as keys:
            return {node for node in nodes if keys.get(_lease_key(node)) is not None}

    def renew(self, node: str, *, lease: bool, claims: Mapping[str, str]) -> list[str]:
        """Renew the lease and claims of a node; return the claims that another node holds."""
        lost: list[str] = []
        with self._keys as keys:
            if lease:
                keys.put(_lease_key(node), "", LEASE)
            for key, delivery in claims.items():
                held = keys.get(_claim_key(key))
                if held is not None and not _is_of(held, node):
                    lost.append(key)
                elif keys.get(_done_key(key, delivery)) is None:
                    keys.put(_claim_key(key), f"{node} {delivery}", LEASE)
        return lost


class _Keys:
    """Keys that expire. A thread may use them: each use is one ``with``."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._values: dict[str, tuple[float, str]] = {}
        self._puts = 0

    def __enter__(self) -> _Keys:
        self._lock.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def get(self, key: str) -> str | None:
        """Return the value of a key; None if it has expired."""
        expires, value = self._values.get(key, (-math.inf, ""))
        return value if expires > self._clock() else None

    def put(self, key: str, value: str, ttl: float) -> None:
        """Set a key for ``ttl`` seconds."""
        now = self._clock()
        self._puts += 1
        if self._puts % 1000 == 0:
            self._values = {known: pair for known, pair in self._values.items() if pair[0] > now}
        self._values[key] = (now + ttl, value)

    def drop(self, key: str) -> None:
        """Delete a key."""
        self._values.pop(key, None)


def _records_after(records: list[Record], position: tuple[int, int]) -> list[Record]:
    return records[bisect_right(records, position, key=lambda record: record[0]) :]


def _entry(record: Record, now: float, *, inbox: bool) -> Entry:
    position, payload = record
    return Entry(_id(position), payload, inbox, max(0.0, now - position[0] / 1000))


def _id(position: tuple[int, int]) -> str:
    return f"{position[0]}-{position[1]}"


def _lease_key(node: str) -> str:
    return f"lease:{node}"


def _claim_key(key: str) -> str:
    return f"claim:{key}"


def _done_key(key: str, delivery: str) -> str:
    return f"done:{key}:{delivery}"


def _is_of(claim: str | None, owner: str) -> bool:
    return claim is not None and claim.startswith(f"{owner} ")
