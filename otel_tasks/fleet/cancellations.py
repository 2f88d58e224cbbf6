"""The cancellations of the last hour, for tasks that have not started yet, and the remote tasks that run.

Rules, each with its own test:

1. Positions, not clocks, order cancellations and tasks: a cancellation applies to tasks sent before it. So
   the same task can be sent again after it was cancelled. While a node's own cancellations wait for the
   bus, they have no position: their numbers order them and what the node sends meanwhile.
2. A cancellation is kept for an hour, by the clock of the bus.
3. A lookup takes no longer with ten thousand cancellations than with one.
"""

from __future__ import annotations

import asyncio
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, cast
from weakref import WeakKeyDictionary, WeakValueDictionary

from otel_tasks._core.log import logger
from otel_tasks.fleet.bus import KEPT, START, position_of
from otel_tasks.fleet.entries import decode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from otel_tasks import ManagedTask
    from otel_tasks.fleet.bus import Entry
    from otel_tasks.fleet.entries import CancelEntry

# The most cancellations that are kept; beyond that, the oldest are dropped. Each takes about 0.4 KB.
LIMIT: Final = 50_000
# Up to so many bytes, an entry is kept as it came: that takes less memory than its fields, and costs the
# garbage collector nothing. A longer one may have fields that nobody reads.
_SHORT: Final = 2000
# Seconds between two searches for entries older than an hour.
_FORGOTTEN_EVERY: Final = 1.0


# The entry or its bytes, its id, and when it expires, on the loop's clock. A plain tuple: the start creates
# thousands, in a third of the time of named tuples.
# The last item is the newest cancellation of the same name by another node, for tasks that this one spares.
_Kept: TypeAlias = "tuple[CancelEntry | bytes, str, float, _Kept | None]"


class Sent(NamedTuple):
    """The place of a remote task in the order of the log, as far as its sender knew it.

    Attributes:
        after: The newest position that the sender had read or published.
        sender: The sender, if it had posted entries that the log did not have yet, as while the bus is down.
        posted: The number of the last of these entries.
    """

    after: tuple[int, int]
    sender: str | None = None
    posted: int = 0

    def is_later_than(self, entry: CancelEntry, position: tuple[int, int]) -> bool:
        """Return whether the task was sent after this cancellation was requested, as far as is known."""
        if self.after >= position:
            return True
        return entry.post is not None and entry.post <= self.posted and entry.node == self.sender


class Cancellations:
    """The cancellations that one node has read, and the remote tasks that run in it."""

    def __init__(self) -> None:
        # In the order of the log. A newer cancellation of the same name takes the place of the older one.
        self._kept: dict[str, _Kept] = {}
        self._forget_at = 0.0
        self._running: WeakValueDictionary[str, ManagedTask[Any]] = WeakValueDictionary()
        self._sent: WeakKeyDictionary[ManagedTask[Any], Sent] = WeakKeyDictionary()
        self._was_full = False

    def __len__(self) -> int:
        return len(self._kept)

    # -- what has been cancelled ----------------------------------------------------------------

    def record(self, entry: CancelEntry, at: Entry) -> None:
        """Keep a cancellation that the node has read.

        Args:
            entry: The cancellation.
            at: Its position and its age.
        """
        now = asyncio.get_running_loop().time()
        if at.age < KEPT:
            key = target_in(entry)
            content = at.payload if 0 < len(at.payload) <= _SHORT else entry
            new = content, at.id, now + KEPT - at.age, None
            known = self._kept.get(key)
            if known is None:
                self._kept[key] = new
            elif position_of(known[1]) <= position_of(at.id):
                del self._kept[key]
                self._kept[key] = _with_earlier(new, known)
            else:
                # It comes again after the server has lost its data.
                self._kept[key] = _with_earlier(known, new)
        if now >= self._forget_at or len(self._kept) > LIMIT:
            self._forget(now)

    def find(
        self, task_id: str, name: str | None = None, group: str | None = None, sent: Sent | None = None
    ) -> CancelEntry | None:
        """Return a cancellation that applies to a remote task that is about to start; None without one.

        Args:
            task_id: The id of the broker's message.
            name: The name of the task; None for none.
            group: The label of its group; a cancellation of an enclosing group applies too. None for none.
            sent: When the task was sent; None if that is unknown.
        """
        if not self._kept:
            return None
        sent = sent or _UNKNOWN
        now = asyncio.get_running_loop().time()
        for key in targets_of(task_id, name, group):
            kept = self._kept.get(key)
            while kept is not None and kept[2] > now and position_of(kept[1]) > sent.after:
                entry = _content(kept)
                if not sent.is_later_than(entry, position_of(kept[1])):
                    return entry
                kept = kept[3]
        return None

    def _forget(self, now: float) -> None:
        # Seldom, and many at once: the next first key of a dictionary is behind the gaps of those before it.
        self._forget_at = now + _FORGOTTEN_EVERY
        old = [key for key, _ in takewhile(lambda item: item[1][2] <= now, self._kept.items())]
        if len(self._kept) - len(old) > LIMIT:
            self._log_full()
            old = list(islice(self._kept, len(self._kept) - LIMIT))
        for key in old:
            del self._kept[key]

    def _log_full(self) -> None:
        if not self._was_full:
            self._was_full = True
            logger.warning(
                "the fleet has more than %d cancellations per hour: the oldest are dropped, and do not "
                "reach remote tasks that still wait; this is logged once",
                LIMIT,
            )

    # -- what runs ------------------------------------------------------------------------------

    def track(self, task_id: str, task: ManagedTask[Any], sent: Sent | None = None) -> None:
        """Let a cancellation of a broker's message reach the task that executes it.

        Args:
            task_id: The id of the broker's message.
            task: The task. It needs no cleanup when it ends.
            sent: As for ``find``. An earlier cancellation spares the task.
        """
        self._running[task_id] = task
        if sent is not None:
            self._sent[task] = sent

    def execution_of(self, task_id: str) -> ManagedTask[Any] | None:
        """Return the live task that executes a broker's message; None if this node has none."""
        task = self._running.get(task_id)
        return None if task is None or task.done() else task

    def sent(self, task: ManagedTask[Any]) -> Sent | None:
        """Return when a remote task was sent; None for a task of this process."""
        return self._sent.get(task)


_UNKNOWN: Final = Sent(position_of(START))


def _content(kept: _Kept) -> CancelEntry:
    content = kept[0]
    return cast("CancelEntry", decode(content)) if isinstance(content, bytes) else content


def _with_earlier(newest: _Kept, older: _Kept) -> _Kept:
    """Add the newest one by another node, of those known, to the newest of all."""
    node = _content(newest).node
    earlier = newest[3]
    for each in (older, older[3]):
        if (
            each is not None
            and _content(each).node != node
            and (earlier is None or position_of(each[1]) > position_of(earlier[1]))
        ):
            earlier = (*each[:3], None)
    return (*newest[:3], earlier)


def target_in(entry: CancelEntry) -> str:
    """Return the target of a cancellation, as ``targets_of`` has it."""
    return f"{entry.target} {entry.name}"


def targets_of(task_id: str, name: str | None, group: str | None) -> Iterator[str]:
    """Return all targets with which a cancellation reaches a remote task.

    Args:
        task_id: The id of the broker's message.
        name: The name of the task; None for none.
        group: The label of its group; None for none.
    """
    yield f"message {task_id}"
    if name is not None:
        yield f"task {name}"
    while group:
        yield f"group {group}"
        group = group.rpartition(".")[0]
    yield "group root"
