"""The interface to the server that joins the processes of a fleet; it moves bytes, and does not parse them.

Rules that every bus follows:

1. The log has one order, the same for all processes. The ids of its entries increase; compare them with
   ``position_of``. The log keeps the entries of the last hour.
2. An inbox belongs to one process, and is bounded in size and in time: an answer that nobody reads is lost.
3. Times and expiries use the server's clock: a process whose clock is wrong does no harm.
4. Every call that needs the server raises ``BusUnavailableError`` within ``CALL_TIMEOUT`` if the server is
   down, does not answer, or refuses to write. No call retries: ``link`` decides when to try again.
"""

from __future__ import annotations

from enum import StrEnum
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from otel_tasks.exceptions import OtelTasksError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Collection, Mapping, Sequence

# Seconds that the log keeps an entry.
KEPT: Final = 3600.0
# Seconds in which the server answers a call, or counts as unavailable.
CALL_TIMEOUT: Final = 3.0
# Seconds after which a lease or a claim expires without renewal, and seconds between two renewals.
LEASE: Final = 6.0
RENEWED_EVERY: Final = 2.0
# Seconds for which a finished execution is remembered.
DONE_KEPT: Final = 30.0
# Seconds after which an inbox without new entries expires, and the most entries that it holds.
INBOX_KEPT: Final = 60.0
INBOX_LIMIT: Final = 10_000
NONE_FINISHED: Final[Mapping[str, str]] = MappingProxyType({})
# The position before all entries.
START: Final = "0-0"
# In place of a position: after all existing entries.
END: Final = "end"


class BusUnavailableError(OtelTasksError):
    """The server of the fleet cannot be reached, does not answer, or refuses to write."""


class BusRefusedError(BusUnavailableError):
    """The server answers, but refuses this process: a password, a permission, a certificate, a version."""


class Entry(NamedTuple):
    """One entry of the log or of an inbox.

    Attributes:
        id: Its position, such as ``1764380000250-0``.
        payload: Its content.
        inbox: True for an entry of the inbox, False for one of the log.
        age: Seconds since it was written, by the server's clock, at least 0.
    """

    id: str
    payload: bytes
    inbox: bool
    age: float


class Claim(StrEnum):
    """The answer to a claim of one execution."""

    TAKEN = "taken"
    HELD = "held"
    DONE = "done"


class Bus(Protocol):
    """A log that every process reads, an inbox for each process, and keys that expire."""

    @property
    def address(self) -> str:
        """The server, without a password, for messages."""
        ...

    @property
    def renew_blocks(self) -> bool:
        """True if ``renew`` waits for the server, so that it needs a thread."""
        ...

    @property
    def server_age(self) -> float:
        """Seconds for which the server had been running at the last ``connect``; 0 if unknown."""
        ...

    async def connect(self) -> None:
        """Connect, or check that the server answers and accepts writes; called again after each failure.

        Raises:
            BusRefusedError: The server refuses this process. Retrying is useless until someone changes the
                settings.
        """
        ...

    async def close(self) -> None:
        """End all connections; a second call does nothing."""
        ...

    async def time(self) -> float:
        """Return the time of the server's clock, in seconds."""
        ...

    async def publish(self, payload: bytes) -> str:
        """Append an entry to the log, drop entries older than ``KEPT``, and return the new entry's id."""
        ...

    async def lost(self, ids: Sequence[str]) -> set[str]:
        """Return the entries that are missing in the log because its server has lost data."""
        ...

    async def send(
        self,
        inboxes: Mapping[str, Collection[bytes]],
        *,
        owner: str = "",
        finished: Mapping[str, str] = NONE_FINISHED,
    ) -> None:
        """Append entries to the inboxes of these nodes, and finish executions, in one round trip.

        Args:
            inboxes: The entries, by node.
            owner: The node that has executed.
            finished: The executions, and the message of each: the owner's claim turns into a mark, for a
                while, that this message was executed.
        """
        ...

    def read(self, inbox: str, after: str) -> AsyncGenerator[list[Entry]]:
        """Iterate over the log after a position, and over an inbox, in batches.

        One empty batch marks the point at which everything written before the call has been read. From then
        on, the iterator waits for new entries, on its own connection. If the log ends before the position,
        because the server has lost data, the iterator reads it from the start.

        Args:
            inbox: The node whose inbox to read. The first call also reads earlier entries; each further call
                continues where the previous one stopped.
            after: The position in the log; ``START`` for all of it, ``END`` for new entries only.
        """
        ...

    async def announce(self, node: str, description: bytes, ttl: float) -> None:
        """Enter this node into the roster, or renew its entry, for ``ttl`` seconds."""
        ...

    async def roster(self) -> dict[str, tuple[bytes, float]]:
        """Return the description of each node, and the seconds since it was last announced."""
        ...

    async def namespaces(self) -> set[str]:
        """Return the fleets of the server that have nodes; only some of them if it has very many keys."""
        ...

    async def leave(self, node: str) -> None:
        """Remove this node, its lease, and its inbox."""
        ...

    async def claim(self, key: str, owner: str, delivery: str) -> Claim:
        """Claim the execution ``key`` for ``LEASE`` seconds.

        Args:
            key: The id of the task.
            owner: The node that claims; a claim that it holds itself is ``HELD``.
            delivery: The message. The answer is ``DONE`` if this message has already been executed.
        """
        ...

    async def release(self, key: str, owner: str) -> None:
        """Drop the owner's claim: another node may execute the message at once."""
        ...

    async def leases(self, nodes: Collection[str]) -> set[str]:
        """Return the nodes whose lease is valid."""
        ...

    def renew(self, node: str, *, lease: bool, claims: Collection[str]) -> list[str]:
        """Renew the node's lease and claims; blocks, because a dedicated thread calls it.

        A claim that has expired is taken again, unless another node has taken it.

        Returns:
            The claims that another node holds.
        """
        ...


# The position of each entry that arrives is read three times in a row.
@lru_cache(maxsize=64)
def position_of(entry_id: str) -> tuple[int, int]:
    """Return an entry's id as a value that compares in the order of the log."""
    time, _, number = entry_id.partition("-")
    return int(time), int(number or 0)
