"""Other: another node of a fleet, as a view knows it, and how what it sends becomes rows of this view.

Rules, each with a test of its own:

1. An answer is read in slices, and takes effect in one step: no tick shows half of it.
2. What does not have the form of the reference raises, and changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from otel_tasks import Overview
from otel_tasks._core.slices import COUNTS_PER_SLICE
from otel_tasks.live.feed import encoded
from otel_tasks.live.marks import marked

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Collection, Generator, Iterable, Sequence

    from otel_tasks.live.feed import Lists
    from otel_tasks.live.rows import Row

# Seconds by which the offset between two clocks may be wrong before it is measured again.
DRIFT: Final = 0.5

_NAMES = frozenset({"id", "key", "parent", "group", "class"})
_TIMES = frozenset({"created", "started", "ended", "cancel_requested", "at", "p50", "p90", "oldest", "since"})
# These are in whole seconds, so that they are the same in each look.
_ROUGH_TIMES = frozenset({"retry_at", "next_run"})


class KnownNode(Protocol):
    """What the fleet knows of a node."""

    @property
    def node(self) -> str:
        """Its name."""
        ...

    @property
    def host(self) -> str:
        """Its host."""
        ...

    @property
    def pid(self) -> int:
        """The id of its process."""
        ...

    @property
    def version(self) -> str:
        """Its version of this package."""
        ...


@dataclass(slots=True)
class _Overview:
    """What a snapshot or a delta says, as data of this view.

    Attributes:
        data: All of it, as the node has sent it.
        lists: Its rows.
        sizes: How many live tasks each row stands for.
        root: The key of the node's root, if its row is there.
        gone: The keys and ids of the rows that are gone, by list; None for a snapshot.
        ended: The ended tasks, with their numbers.
    """

    data: Row
    lists: Lists = field(default_factory=lambda: {"groups": {}, "classes": {}, "cancelling": {}})
    sizes: dict[str, int] = field(default_factory=dict)
    root: str | None = None
    gone: dict[str, list[str]] | None = None
    ended: list[Row] = field(default_factory=list)


@dataclass(slots=True)
class Reading:
    """What an answer says, as data of this view.

    Attributes:
        overviews: Snapshots and deltas, in their order.
        rows: The tasks of expanded rows: when each was created, and its row.
        totals: How many tasks these rows stand for.
        panels: The tasks of panels.
        is_drifted: True if the clocks have drifted apart since the last answer.
    """

    overviews: list[_Overview] = field(default_factory=list)
    rows: dict[str, dict[str, tuple[float, str]]] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)
    panels: dict[str, Row] = field(default_factory=dict)
    is_drifted: bool = False


@dataclass(eq=False)
class Other:
    """Another node: what it has sent.

    Attributes:
        about: Its host, its process, and its version.
        mark: The start of its ids and keys.
        seen: When it answered last, on this node's clock.
        after: The id of its last update.
        lists: Its rows.
        sizes: How many live tasks its groups and classes stand for, by key.
        head: The other parts of its overview.
        rows: The tasks of expanded rows, by key and id: when each was created, and its row.
        panels: The tasks of panels, by id.
        ended: The ended tasks that the feed has not taken yet.
    """

    about: KnownNode
    mark: str
    seen: float
    after: str | None = None
    offset: float | None = None
    asking: asyncio.Task[None] | None = None
    lists: Lists = field(default_factory=lambda: {"groups": {}, "classes": {}, "cancelling": {}})
    sizes: dict[str, int] = field(default_factory=dict)
    head: Row = field(default_factory=dict)
    rows: dict[str, dict[str, tuple[float, str]]] = field(default_factory=dict)
    panels: dict[str, Row] = field(default_factory=dict)
    ended: list[Row] = field(default_factory=list)
    last_ended: int = 0
    root: str | None = None

    @property
    def node(self) -> str:
        """Its name."""
        return self.about.node

    def forget(self) -> None:
        """Drop its rows."""
        self.after = None
        self.lists = {"groups": {}, "classes": {}, "cancelling": {}}
        self.sizes, self.head, self.rows, self.panels, self.root = {}, {}, {}, {}, None

    # -- its data as data of the view -----------------------------------------------------------

    def moving(self, answer: Row) -> Generator[None, None, Row]:
        """Return an answer of this node as data of the view, in slices: its lists are cut."""
        found: Row = {}
        for name, each in answer.items():
            if isinstance(each, list):
                found[name] = yield from self._moving_rows(each)
            else:
                found[name] = self._moved(each, name)
        return self._with_node(found)

    def _moving_rows(self, rows: Sequence[Any]) -> Generator[None, None, list[Any]]:
        found: list[Any] = []
        for start in range(0, len(rows), COUNTS_PER_SLICE):
            found += [self._moved(row) for row in rows[start : start + COUNTS_PER_SLICE]]
            yield
        return found

    def moved(self, row: Row) -> Row:
        """Return an object of this node as data of the view."""
        found: Row = self._moved(row)
        return found

    def _moved(self, value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            if name == "metadata":
                return value
            return self._with_node({key: self._moved(each, key) for key, each in value.items()})
        if isinstance(value, list):
            return [self._moved(each) for each in value]
        if isinstance(value, str):
            return marked(self.mark, value) if name in _NAMES else value
        return value if value is None else self._on_this_clock(name, value)

    def _with_node(self, row: Row) -> Row:
        return {**row, "node": self.node} if "group_id" in row or "key" in row else row

    def _on_this_clock(self, name: str, value: float) -> float | None:
        if not math.isfinite(value):
            # A browser refuses a whole answer with one.
            return None
        if name in _TIMES:
            return round(value + (self.offset or 0.0), 3)
        return round(value + (self.offset or 0.0)) if name in _ROUGH_TIMES else value

    # -- what it sends --------------------------------------------------------------------------

    def reading(self, answer: Row, now: float) -> Generator[None, None, Reading]:
        """Read an answer, in slices; ``apply`` lets it take effect.

        Raises:
            ValueError: It does not have the form of the reference; or another error of that kind.
        """
        found = Reading(is_drifted=self._compare_clocks(now - float(answer["now"])))
        for event in answer["events"]:
            kind, data = event["event"], event["data"]
            if kind == "snapshot":
                found.overviews.append((yield from self._reading_overview(data, data)))
            elif kind == "delta":
                overview = yield from self._reading_overview(data, data["set"])
                overview.gone = {name: self._moved_keys(data["gone"][name]) for name in overview.lists}
                found.overviews.append(overview)
            elif kind == "rows":
                key = marked(self.mark, Overview.ROOT if data["key"] == "oldest" else data["key"])
                found.rows[key] = yield from self._reading_rows(data["set"])
                found.totals[key] = int(data["total"])
            elif kind == "task":
                panel = self.moved(data)
                found.panels[str(panel["task"]["id"])] = panel
        return found

    def _compare_clocks(self, offset: float) -> bool:
        # The smallest one has the shortest way of an answer in it. It stays, so that times do not change.
        before = self.offset
        if before is not None and abs(offset - before) <= DRIFT:
            return False
        self.offset = offset
        return before is not None

    def _reading_rows(self, rows: Sequence[Row]) -> Generator[None, None, dict[str, tuple[float, str]]]:
        found: dict[str, tuple[float, str]] = {}
        for start in range(0, len(rows), COUNTS_PER_SLICE):
            moved = _with_number(map(self.moved, rows[start : start + COUNTS_PER_SLICE]), "created")
            found.update((row["id"], (row["created"], encoded(row))) for row in moved)
            yield
        return found

    def _moved_keys(self, keys: Iterable[str]) -> list[str]:
        return [marked(self.mark, key) for key in keys]

    def _reading_overview(self, data: Row, given: Row) -> Generator[None, None, _Overview]:
        found = _Overview(data)
        for name, rows in found.lists.items():
            sent = given[name]
            for start in range(0, len(sent), COUNTS_PER_SLICE):
                for row in map(self.moved, sent[start : start + COUNTS_PER_SLICE]):
                    key = row["id"] if name == "cancelling" else row["key"]
                    rows[key] = encoded(row)
                    if name != "cancelling":
                        found.sizes[key] = int(row["count"])
                    if name == "groups" and row["parent"] is None:
                        found.root = key
                yield
        found.ended = _with_number((yield from self._moving_rows(data["ended"])), "ended")
        return found

    def apply(self, reading: Reading, panels: Collection[str]) -> None:
        """Let an answer take effect.

        Args:
            reading: What it says.
            panels: The tasks of which everything was wanted.

        Raises:
            ValueError: It does not have the form of the reference; or another error of that kind.
        """
        if reading.is_drifted:
            self.forget()
        for overview in reading.overviews:
            if overview.gone is None:
                self._load(overview)
            else:
                self._change(overview, overview.gone)
        self.rows = reading.rows
        self.sizes |= reading.totals
        kept = {uid: panel for uid, panel in self.panels.items() if uid in panels}
        self.panels = {**kept, **reading.panels}

    def _load(self, overview: _Overview) -> None:
        data = overview.data
        if self.head.get("instance") != data["instance"]:
            self.last_ended = 0
        self.lists = {"groups": {}, "classes": {}, "cancelling": {}}
        self.sizes = {}
        self._set(overview, {"instance": data["instance"], **_head(data)})

    def _change(self, overview: _Overview, gone: dict[str, list[str]]) -> None:
        data = overview.data
        if data["base"] != self.after:
            # The next question asks for everything.
            self.after = None
            return
        for name, rows in self.lists.items():
            for key in gone[name]:
                rows.pop(key, None)
                self.sizes.pop(key, None)
        self._set(overview, {**self.head, **_head({**self.head, **data})})

    def _set(self, overview: _Overview, head: Row) -> None:
        for name, rows in self.lists.items():
            rows.update(overview.lists[name])
        self.sizes |= overview.sizes
        self.root = overview.root or self.root
        self.head = head
        self.after = str(overview.data["id"])
        new = [row for row in overview.ended if row["n"] > self.last_ended]
        self.ended += new
        self.last_ended = max([self.last_ended, *(row["n"] for row in new)])


def _head(data: Row) -> Row:
    """The parts of an overview that are added to others.

    Raises:
        ValueError: They do not have the form of the reference; or another error of that kind.
    """
    stats, more = data["stats"], data["more"]
    for name, value in (*stats.items(), *more.items()):
        # Without a limit, there is none to show.
        if name != "limit" and not math.isfinite(value):
            raise ValueError(f"{value!r} is no count")
    return {"stats": stats, "more": more, "warnings": [dict(row) for row in data["warnings"]]}


def _with_number(rows: Iterable[Row], name: str) -> list[Row]:
    """Rows that are sorted by a number; one without it raises."""
    return [row for row in rows if math.isfinite(row[name])]
