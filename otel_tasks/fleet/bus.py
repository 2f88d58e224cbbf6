"""The interface to the server that joins the processes of a fleet; it moves bytes, and knows no entries.

Rules, which each bus keeps:

1. The log is in one order, the same for all processes. The ids of its entries grow; they compare with
   ``position_of``. It keeps the entries of the last hour.
2. An inbox belongs to one process, and is bounded in size and in time: an answer that nobody reads is lost.
3. Times and expiries are the server's: a process whose clock is wrong does no harm.
4. Every call that needs the server raises ``BusUnavailableError`` within ``CALL_TIMEOUT`` if that is gone,
   does not answer, or refuses to write. No call tries again: ``link`` decides when.
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
# Seconds after which a lease or a claim that nobody renews expires, and between two renewals.
LEASE: Final = 6.0
RENEWED_EVERY: Final = 2.0
# Seconds for which a finished execution is remembered.
DONE_KEPT: Final = 30.0
# Seconds after which an inbox that nothing is written to is gone, and the entries that it has at most.
INBOX_KEPT: Final = 60.0
INBOX_LIMIT: Final = 10_000
NONE_FINISHED: Final[Mapping[str, str]] = MappingProxyType({})
# The position before all entries.
START: Final = "0-0"
# In place of a position: after all entries that there are.
END: Final = "end"


class BusUnavailableError(OtelTasksError):
    """The server that joins the fleet cannot be reached, does not answer, or refuses to write."""


class BusRefusedError(BusUnavailableError):
    """The server answers, and refuses this process: a password, a permission, a certificate, its version."""


class Entry(NamedTuple):
    """One entry of the log or of an inbox.

    Attributes:
        id: Its position, such as ``1764380000250-0``.
        payload: Its content.
        inbox: True if it came to the inbox, False if it is of the log.
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
        """Connect, or check that the server answers and can be written to; called again after each failure.

        Raises:
            BusRefusedError: To try again is useless until somebody has changed the settings.
        """
        ...

    async def close(self) -> None:
        """End all connections; a second call does nothing."""
        ...

    async def time(self) -> float:
        """Return the time of the server's clock, in seconds."""
        ...

    async def publish(self, payload: bytes) -> str:
        """Append an entry to the log, drop what is older than ``KEPT``, and return the new entry's id."""
        ...

    async def lost(self, ids: Sequence[str]) -> set[str]:
        """Return those of these entries that the log no longer has: its server has lost data."""
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

        An empty batch says once that everything written before the call has been read. From then on, it waits
        for new entries, on a connection of its own. If the log ends before the position, because the server
        has lost data, it is read from its start.

        Args:
            inbox: The node whose inbox to read. The first call also reads what came before; each further one
                goes on where the one before stopped.
            after: The position in the log; ``START`` for all that it has, ``END`` for what comes from now on.
        """
        ...

    async def announce(self, node: str, description: bytes, ttl: float) -> None:
        """Enter this node into the roster, or renew its entry, for ``ttl`` seconds."""
        ...

    async def roster(self) -> dict[str, tuple[bytes, float]]:
        """Return the description of each node, and the seconds since it was last announced."""
        ...

    async def namespaces(self) -> set[str]:
        """Return the fleets of the server that have nodes; some of them, if it has very many keys."""
        ...

    async def leave(self, node: str) -> None:
        """Remove this node, its lease, and its inbox."""
        ...

    async def claim(self, key: str, owner: str, delivery: str) -> Claim:
        """Claim the execution ``key`` for ``LEASE`` seconds.

        Args:
            key: The id of the task.
            owner: The node that claims; a claim that it holds itself is ``HELD``.
            delivery: The message. An execution of the same message that has been finished is ``DONE``.
        """
        ...

    async def release(self, key: str, owner: str) -> None:
        """Drop the owner's claim: another node may execute the message at once."""
        ...

    async def leases(self, nodes: Collection[str]) -> set[str]:
        """Return those of these nodes whose lease is valid."""
        ...

    def renew(self, node: str, *, lease: bool, claims: Collection[str]) -> list[str]:
        """Renew the node's lease, and claims; blocks, because a thread of its own calls it.

        A claim that has expired is taken again, unless another node has taken it.

        Returns:
            The claims that another node holds.
        """
        ...


# Each entry that arrives is asked for its position three times in a row.
@lru_cache(maxsize=64)
def position_of(entry_id: str) -> tuple[int, int]:
    """Return an entry's id as a value that compares in the order of the log."""
    time, _, number = entry_id.partition("-")
    return int(time), int(number or 0)
