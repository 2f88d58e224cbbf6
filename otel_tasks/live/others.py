"""Others: what the other nodes of a fleet have sent to this node's view, as rows of this view.

Rules, each with a test of its own:

1. Ids and keys of another node begin with its mark, times are moved to this node's clock, and each row names
   its node.
2. Each node is asked once per tick, and not again before it has answered. A tick waits for the answers only
   for a moment: what comes later is shown with the next one.
3. A node that does not answer is silent. It stays with its last rows for ``KEPT`` seconds, and without them
   as long as the roster has it. Without the bus, all others are silent.
4. A node may send anything: what does not have the form of the reference is dropped, and logged once.
"""

from __future__ import annotations

import asyncio
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import urlencode

from otel_tasks import Overview
from otel_tasks._core.log import logger
from otel_tasks._core.slices import in_slices
from otel_tasks._core.telemetry import quiet_context
from otel_tasks.live.feed import Encoded, Gathered, Lists
from otel_tasks.live.marks import is_named, mark_of, marked, unmarked
from otel_tasks.live.other import Other
from otel_tasks.live.rows import Row, seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence

    from otel_tasks import ManagedTask
    from otel_tasks.live.other import KnownNode

    Pairs = list[list[str]]

# Seconds without an answer after which a node is silent, and after which its rows go.
SILENT: Final = 3.0
KEPT: Final = 30.0
# Seconds that a question waits for its answer, and that a tick waits for all of them.
PATIENCE: Final = 2.5
MOMENT: Final = 0.25
# Nodes that are asked.
MAX_NODES: Final = 100
_created = itemgetter(0)
_COUNTS: Final[tuple[str, ...]] = ("completed", "failed", "cancelled")


class Nodes(Protocol):
    """The fleet, as a view sees it."""

    async def others(self) -> Mapping[str, KnownNode] | None:
        """Return the other nodes; None if the bus does not answer."""
        ...

    async def ask(self, node: str, data: dict[str, Any], timeout: float) -> Row | None:
        """Ask one of them."""


class Others:
    """The other nodes of a fleet, for one view.

    Args:
        fleet: The fleet.
        node: The name of this node.
        clock: The clock of its manager.
    """

    def __init__(self, fleet: Nodes, node: str, clock: Callable[[], float]) -> None:
        self.node = node
        self._fleet = fleet
        self._clock = clock
        self._others: dict[str, Other] = {}
        # Nodes of the fleet beyond ``MAX_NODES``, which are not asked.
        self.left_out = 0
        self._found_at = float("-inf")
        self._unreadable: set[str] = set()
        # Ends since the first look at each node: a node that joins later must not look like a burst.
        self._ended: dict[str, int] = dict.fromkeys(_COUNTS, 0)
        self._counted: dict[str, Row] = {}

    # -- asking ---------------------------------------------------------------------------------

    async def look(self, expand: Mapping[str, int], panels: Iterable[str]) -> None:
        """Find the nodes, and ask them.

        Cancellation: ends the wait.
        """
        await self.find()
        await self.ask(expand, panels)
        for other in self._others.values():
            if other.head and self._clock() - other.seen > KEPT:
                other.forget()

    async def ask(self, expand: Mapping[str, int], panels: Iterable[str]) -> None:
        """Ask the known nodes for what has changed, and wait a moment for those that are not silent.

        Args:
            expand: The rows whose tasks are wanted, and for each how many.
            panels: The tasks of which everything is wanted.

        Cancellation: ends the wait.
        """
        panels = list(panels)
        for other in self._others.values():
            if other.asking is None or other.asking.done():
                other.asking = asyncio.get_running_loop().create_task(
                    self._ask(other, expand, panels),
                    name="otel_tasks.live.ask",
                    # Not in the context of a request, which may be over before the answer comes.
                    context=quiet_context(),
                )
        asking = [
            other.asking
            for other in self._others.values()
            if other.asking is not None and not self.is_silent(other)
        ]
        if asking:
            await asyncio.wait(asking, timeout=MOMENT)

    def clear(self) -> None:
        """Forget everything: nobody looks."""
        for other in self._others.values():
            if other.asking is not None:
                other.asking.cancel()
        self._others.clear()
        self._counted.clear()
        self._found_at = float("-inf")

    def asked(self, name: str) -> tuple[Other, str] | None:
        """The node of an id or a key, and what that node calls it; None for one of this node."""
        found = unmarked(name)
        other = None if found is None else self._others.get(found[0])
        return None if found is None or other is None else (other, found[1])

    def named(self, name: str | None) -> list[Other]:
        """The nodes with this name, host, or host and process; all without a name."""
        return [each for each in self._others.values() if name is None or is_named(each.node, name)]

    async def answer(self, other: Other, what: str, params: Pairs) -> Row | None:
        """Ask a node for one thing; None without an answer.

        Cancellation: ends the wait.
        """
        answer = await self._fleet.ask(other.node, {"what": what, "params": params}, PATIENCE)
        if answer is None:
            return None
        try:
            moved = await in_slices(other.moving(answer))
            return {**moved, "now": seconds(self._clock())}
        except (OverflowError, RecursionError):
            # JSON has numbers that no float can hold.
            return None

    async def find(self, max_age: float = 0.0) -> None:
        """Find the nodes, unless that was done a moment ago.

        Args:
            max_age: Seconds for which the last look counts.

        Cancellation: ends the call.
        """
        if self._clock() - self._found_at < max_age:
            return
        known = await self._fleet.others()
        if known is None:
            return
        self._found_at = self._clock()
        self.left_out = max(0, len(known) - MAX_NODES)
        wanted = {mark_of(node): about for node, about in sorted(known.items())[:MAX_NODES]}
        for mark in self._others.keys() - wanted.keys():
            gone = self._others.pop(mark)
            if gone.asking is not None:
                gone.asking.cancel()
        for mark, about in wanted.items():
            if mark in self._others:
                self._others[mark].about = about
            else:
                self._others[mark] = Other(about, mark, self._clock())

    async def _ask(self, other: Other, expand: Mapping[str, int], panels: list[str]) -> None:
        own = [found[1] for found in map(unmarked, panels) if found and found[0] == other.mark]
        params = [*_expanded(other, expand), *(["task", uid] for uid in own)]
        if other.after is not None:
            params.append(["after", other.after])
        answer = await self._fleet.ask(other.node, {"what": "events", "params": params}, PATIENCE)
        if answer is None:
            return
        now = self._clock()
        other.seen = now
        if "error" in answer:
            return
        try:
            changes = await in_slices(other.reading(answer, now))
            other.apply(changes, {marked(other.mark, uid) for uid in own})
            self._count(other)
        except (ArithmeticError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            other.forget()
            if other.node not in self._unreadable:
                self._unreadable.add(other.node)
                logger.warning(
                    "the live view cannot read what node %s sends, and shows nothing of it; "
                    "this is logged once",
                    other.node,
                    exc_info=True,
                )

    def _count(self, other: Other) -> None:
        stats = other.head.get("stats")
        if stats is None:
            return
        before = self._counted.get(other.node)
        if before is not None:
            for name in _COUNTS:
                self._ended[name] += max(0, stats[name] - before[name])
        self._counted[other.node] = stats

    # -- what a view shows of them ----------------------------------------------------------------

    def oldest(
        self, tasks: Sequence[ManagedTask[Any]], own: Encoded, limit: int
    ) -> Generator[None, None, Encoded]:
        """The oldest tasks of all nodes, in slices.

        Args:
            tasks: Those of this node.
            own: Their rows.
            limit: How many are wanted.
        """
        found = [(task.created_at, task.uid, own[task.uid]) for task in tasks if task.uid in own]
        yield
        for other in list(self._others.values()):
            rows = other.rows.get(marked(other.mark, Overview.ROOT), {})
            found += [(created, uid, row) for uid, (created, row) in rows.items()]
            # Stable, because equal times are frequent.
            found = sorted(found, key=_created)[:limit]
            yield
        return {uid: row for _, uid, row in found}

    def rows(self, key: str) -> Encoded:
        """The tasks of an expanded row of another node."""
        asked = self.asked(key)
        rows = {} if asked is None else asked[0].rows.get(key, {})
        return {uid: row for uid, (_, row) in rows.items()}

    def panel(self, uid: str) -> Row:
        """A task of another node."""
        asked = self.asked(uid)
        panel = None if asked is None else asked[0].panels.get(uid)
        return panel or {"state": "forgotten", "task": {"id": uid}}

    def gathered(self) -> Generator[None, None, Gathered]:
        """What the nodes add to the overview of this one, in slices: one for each node."""
        lists: Lists = {"groups": {}, "classes": {}, "cancelling": {}}
        found = Gathered(lists=lists, ended_counts={**self._ended})
        for other in list(self._others.values()):
            for name, rows in other.lists.items():
                lists[name].update(rows)
            found.totals.update(other.sizes)
            if other.root is not None:
                found.totals[Overview.ROOT] = found.totals.get(Overview.ROOT, 0) + other.sizes[other.root]
            found.stats.append(other.head.get("stats", {}))
            found.more.append(other.head.get("more", {}))
            found.warnings += [_warning(other, row) for row in other.head.get("warnings", ())]
            found.ended += other.ended
            other.ended = []
            about = other.about
            found.nodes.append(
                {
                    "node": other.node,
                    "key": other.root,
                    "host": about.host,
                    "pid": about.pid,
                    "version": about.version,
                    "silent_since": seconds(other.seen) if self.is_silent(other) else None,
                }
            )
            yield
        found.left_out = self.left_out
        return found

    def is_silent(self, other: Other) -> bool:
        """True if a node has not answered for a while."""
        return self._clock() - other.seen > SILENT


def _expanded(other: Other, expand: Mapping[str, int]) -> Iterator[list[str]]:
    for key, limit in expand.items():
        found = unmarked(key)
        if key == Overview.ROOT:
            yield ["expand", f"oldest:{limit}"]
        elif found is not None and found[0] == other.mark:
            yield ["expand", f"{found[1]}:{limit}"]


def _warning(other: Other, row: Row) -> Row:
    warning: Row = other.moved(row)
    query = warning.get("query")
    if isinstance(query, str):
        warning["query"] = f"{query}&{urlencode({'node': other.node})}"
    return warning
