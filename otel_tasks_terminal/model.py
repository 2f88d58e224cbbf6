"""The model: what the feed has sent of one manager, and the rows of its tree."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Row = dict[str, Any]
# A ghost is a task that has ended while it was selected, and a band the heading of a group in a timeline.
Kind = Literal["group", "class", "task", "ended", "ghost", "more", "band"]

SORTS = ("status", "age", "name", "count")
# Groups and classes up to this number are shown opened.
FEW_ROWS = 40
MAX_SAMPLES = 60
MAX_ENDED = 256
# Seconds over which a rate is taken: that of one second alone jumps.
RATE = 5

_RANKS = {"cancelling": 0, "queued": 1}
# The columns of a sample: time, running, queued, cancelling, completed, failed, cancelled.
_FIRST_RATE = 4


class Entry(NamedTuple):
    """A row of the tree.

    Attributes:
        key: Tells it from the other rows, in each update.
        kind: What it stands for.
        level: 0 for the root.
        row: What the feed says of it.
        open: Whether the rows below it are shown; None if it cannot have any.
        instance: Of a task, which of the groups that share a row it belongs to: ``#4711``.
        silent: The node of the row does not answer.
    """

    key: str
    kind: Kind
    level: int
    row: Row
    open: bool | None = None
    instance: str = ""
    silent: bool = False


class Model:
    """The overview of one manager, or of a fleet, kept up to date by events.

    Args:
        clock: A monotonic clock.
        only: The name, the host, or the host and process of the nodes that are shown; None for all.

    Attributes:
        only: The same, to be changed.
        nodes: The nodes of a fleet, by name; none of a single process.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, only: str | None = None) -> None:
        self._clock = clock
        self.only = only
        self.nodes: dict[str, Row] = {}
        self._skew = 0.0
        self._frozen: float | None = None
        self.about: Row = {}
        self.stats: Row = {}
        self.more: Row = {}
        self.epoch = 0.0
        self.samples: list[list[float]] = []
        self._warnings: list[Row] = []
        self.ended: list[Row] = []
        self._groups: dict[str, Row] = {}
        self._classes: dict[str, Row] = {}
        self._cancelling: dict[str, Row] = {}
        # The tasks of rows that were opened, by the key of the row, and how many there are in all.
        self._members: dict[str, dict[str, Row]] = {}
        self._totals: dict[str, int] = {}
        self.opened: dict[str, bool] = {}
        # The keys below a row, in the order in which they were shown last.
        self._order: dict[str | None, list[str]] = {}

    # --- events -----------------------------------------------------------------------------------

    def apply(self, name: str, data: Row) -> None:
        """Apply an event; its order and its base are the follower's concern."""
        if name == "snapshot":
            self._load(data)
        elif name == "delta":
            self._change(data)
        elif name == "rows":
            self.take(
                data["key"],
                data.get("set", ()),
                data.get("gone", ()),
                data.get("total", 0),
                full=data.get("full", False),
            )

    def _load(self, data: Row) -> None:
        if data.get("instance") != self.about.get("instance"):
            self._members.clear()
            self._totals.clear()
        self.about = data
        self._set_clock(data)
        self._groups = {row["key"]: row for row in data.get("groups", ())}
        self._classes = {row["key"]: row for row in data.get("classes", ())}
        self._cancelling = {row["id"]: row for row in data.get("cancelling", ())}
        self.stats = data.get("stats", {})
        self.more = data.get("more", {})
        self.samples = list(data.get("samples", ()))[-MAX_SAMPLES:]
        self._warnings = list(data.get("warnings", ()))
        self.nodes = {node["node"]: node for node in data.get("nodes", ())}
        self.ended = list(data.get("ended", ()))[:MAX_ENDED]
        self._decide()

    def _change(self, data: Row) -> None:
        self._set_clock(data)
        for name, rows in (
            ("groups", self._groups),
            ("classes", self._classes),
            ("cancelling", self._cancelling),
        ):
            for key in data.get("gone", {}).get(name, ()):
                rows.pop(key, None)
            for row in data.get("set", {}).get(name, ()):
                rows[row["id" if name == "cancelling" else "key"]] = row
        self.stats = data.get("stats", self.stats)
        self.more = data.get("more", self.more)
        if "sample" in data:
            self.samples = [*self.samples, data["sample"]][-MAX_SAMPLES:]
        self._warnings = list(data.get("warnings", self._warnings))
        if "nodes" in data:
            self.nodes = {node["node"]: node for node in data["nodes"]}
        self.ended = [*data.get("ended", ()), *self.ended][:MAX_ENDED]
        self._decide()

    def take(self, key: str, rows: Iterable[Row], gone: Iterable[str], total: int, *, full: bool) -> None:
        """Take the tasks of an opened row: all of them, or those that have changed."""
        known = {} if full else self._members.get(key, {})
        for task in gone:
            known.pop(task, None)
        known |= {row["id"]: row for row in rows}
        self._members[key] = known
        self._totals[key] = total

    def forget(self, key: str) -> None:
        """Drop the tasks of a row that was closed: they get old."""
        self._members.pop(key, None)

    def members(self, key: str) -> list[Row] | None:
        """Return the known tasks of an opened row; None if they have not come yet."""
        known = self._members.get(key)
        return None if known is None else list(known.values())

    def _set_clock(self, data: Row) -> None:
        self.epoch = data.get("epoch", 0.0)
        self._skew = data.get("now", 0.0) - self._clock()

    def now(self) -> float:
        """Return the time on the server's clock."""
        return self._clock() + self._skew if self._frozen is None else self._frozen

    def freeze(self) -> None:
        """Let ages stand still."""
        self._frozen = self.now()

    def thaw(self) -> None:
        """Let ages go on."""
        self._frozen = None

    # --- nodes ------------------------------------------------------------------------------------

    @property
    def warnings(self) -> list[Row]:
        """The warnings of the nodes that are shown."""
        own = self.about.get("node")
        return [row for row in self._warnings if self.is_shown(row.get("node") or own)]

    def is_shown(self, node: object) -> bool:
        """Whether rows of a node are shown."""
        return self.only is None or node == self.only or str(node).startswith(f"{self.only}/")

    def shown_nodes(self) -> list[str]:
        """The names of the nodes that are shown."""
        return [node for node in self.nodes if self.is_shown(node)]

    def silent_since(self, node: object) -> float | None:
        """When a node answered last, if it does not answer now; None if it does."""
        return self.nodes.get(str(node), {}).get("silent_since")

    def is_silent(self, row: Row) -> bool:
        """Whether the node of a row does not answer."""
        return self.silent_since(row.get("node")) is not None

    def unheard(self) -> list[str]:
        """The nodes that are shown and have not answered: silent ones, and those that were just asked."""
        silent = [node for node in self.nodes if self.silent_since(node) is not None]
        return [node for node in self.shown_nodes() if node in silent or not self._has_root(node)]

    def _has_root(self, node: str) -> bool:
        return self.nodes[node].get("key") in self._groups

    def _roots(self) -> list[Row]:
        """The roots of the nodes that are shown. A node that has sent nothing yet has one that says so."""
        roots = [row for row in self._groups.values() if row.get("parent") is None]
        roots += [_unknown(node) for node in self.nodes if not self._has_root(node)]
        return [{**row, **self._state(row)} for row in roots if self.is_shown(row.get("node"))]

    def _state(self, root: Row) -> Row:
        since = self.silent_since(root.get("node"))
        return {} if since is None else {"silent_since": since}

    def shown_stats(self) -> Row:
        """The counters: of the whole fleet, or of the nodes that are shown, as far as they have answered."""
        if self.only is None:
            return self.stats
        # Of single nodes, the feed has no rates.
        roots = [row for row in self._roots() if "count" in row]
        if not roots:
            return {}
        count, queued, cancelling = (
            sum(row.get(name) or 0 for row in roots) for name in ("count", "queued", "cancelling")
        )
        return {"running": count - queued - cancelling, "queued": queued, "cancelling": cancelling}

    @property
    def may_cancel(self) -> bool:
        """Whether the view has the action."""
        return "cancel" in self.about.get("actions", ())

    def rates(self) -> list[float] | None:
        """Return completed, failed, and cancelled tasks per second; None while they are not known."""
        series = [self.series(_FIRST_RATE + index) for index in range(3)]
        return [values[-1] for values in series] if series[0] else None

    def series(self, column: int) -> list[float]:
        """Return the values of a column of the samples; of a counter, its rates."""
        if column < _FIRST_RATE:
            return [sample[column] for sample in self.samples]
        rates: list[float] = []
        for index in range(1, len(self.samples)):
            old, new = self.samples[max(0, index - RATE)], self.samples[index]
            rates.append((new[column] - old[column]) / max(0.001, new[0] - old[0]))
        return rates

    # --- rows -------------------------------------------------------------------------------------

    def _decide(self) -> None:
        """Decide once per group whether it starts open: all of few groups, otherwise those in trouble."""
        few = len(self._groups) + len(self._classes) <= FEW_ROWS
        for key, row in self._groups.items():
            self.opened.setdefault(key, row.get("parent") is None or few or bool(row.get("cancelling")))

    def open_all(self) -> None:
        """Open all groups."""
        self.opened.update(dict.fromkeys(self._groups, True))

    def is_open(self, key: str) -> bool:
        """Whether the rows below a group or class are shown."""
        return self.opened.get(key, False)

    def find(self, key: str) -> Row | None:
        """Return the group or class with this key."""
        return self._groups.get(key) or self._classes.get(key)

    def tree(self, sort: str = "status", *, finished: bool = False, hold: bool = False) -> list[Entry]:
        """Return the rows of the tree that are shown, from the top.

        Args:
            sort: One of ``SORTS``; ties are broken by key, so that equal rows never change places.
            finished: Whether the tasks that ended last are shown below their class.
            hold: Whether the rows that were shown keep their places: someone is looking at them.
        """
        return self.marked(_Tree(self, sort, finished, hold).entries(None, 0))

    def marked(self, entries: Iterable[Entry]) -> list[Entry]:
        """Mark the rows of silent nodes."""
        return [entry._replace(silent=self.is_silent(entry.row)) for entry in entries]

    def arrange(
        self, below: str | None, rows: Iterable[Row], order: Callable[[Row], Any], *, hold: bool
    ) -> list[Row]:
        """Sort the rows below another one; with ``hold``, those that were there stay where they were."""
        arranged = sorted(rows, key=order)
        if hold:
            places = {key: index for index, key in enumerate(self._order.get(below, ()))}
            arranged.sort(key=lambda row: places.get(_key(row), len(places)))
        self._order[below] = [_key(row) for row in arranged]
        return arranged

    def children(self, parent: str | None) -> list[Row]:
        """The groups below a group."""
        if parent is None:
            return self._roots()
        return [row for row in self._groups.values() if row.get("parent") == parent]

    def classes(self, group: str) -> list[Row]:
        """The classes in a group."""
        return [row for row in self._classes.values() if row.get("group") == group]

    def tasks(self, key: str) -> list[Row]:
        """The known tasks of a class: all of an opened row, otherwise those that are being cancelled."""
        known = self.members(key)
        return (
            [row for row in self._cancelling.values() if row.get("class") == key] if known is None else known
        )

    def instance_of(self, task: Row) -> str:
        """Which of the groups that share a row a task belongs to, ``#4711``; empty if its group is alone."""
        group = self._groups.get(str(task.get("group")), {})
        return instance(task) if (group.get("instances") or 0) > 1 else ""

    def total(self, key: str) -> int:
        """How many tasks a row has, shown or not; 0 while they have not come."""
        return self._totals.get(key, 0) if key in self._members else 0

    def newest(self, task: Row) -> Row:
        """What was said last of the only task of a class."""
        uid = task["id"]
        return self._members.get(task.get("class", ""), {}).get(uid) or self._cancelling.get(uid) or task


class _Tree:
    """One pass over the rows."""

    def __init__(self, model: Model, sort: str, finished: bool, hold: bool) -> None:
        self._model = model
        self._sort = sort
        self._finished = finished
        self._hold = hold

    def _rows(self, below: str | None, rows: Iterable[Row]) -> list[Row]:
        return self._model.arrange(below, rows, lambda row: row_order(row, self._sort), hold=self._hold)

    def entries(self, parent: str | None, level: int) -> Iterable[Entry]:
        for row in self._rows(parent, self._model.children(parent)):
            opened = self._model.is_open(row["key"])
            yield Entry(row["key"], "group", level, row, opened)
            if opened:
                for each in self._rows(f"in {row['key']}", self._model.classes(row["key"])):
                    yield from self._class(each, level + 1)
                yield from self.entries(row["key"], level + 1)

    def _class(self, row: Row, level: int) -> Iterable[Entry]:
        key, only = row["key"], row.get("task")
        opened = self._model.is_open(key)
        if only is not None:
            task = self._model.newest(only)
            yield self._task(task, level)
        else:
            yield Entry(key, "class", level, row, opened)
            yield from self._tasks(key, opened, level + 1)
        if self._finished and (opened or only is not None):
            for ended in self._model.ended:
                if ended.get("class") == key:
                    yield self._task(ended, level + 1)

    def _tasks(self, key: str, opened: bool, level: int) -> Iterable[Entry]:
        # In a closed class, only tasks that are being cancelled are shown: they are what one looks for.
        tasks = (
            self._model.tasks(key)
            if opened
            else [row for row in self._model.tasks(key) if "cancel_requested" in row]
        )
        arranged = self._model.arrange(key, tasks, lambda task: task_order(task, self._sort), hold=self._hold)
        for task in arranged:
            yield self._task(task, level)
        total = self._model.total(key)
        if opened and total > len(tasks):
            yield Entry(f"more {key}", "more", level, {"key": key, "shown": len(tasks), "total": total})

    def _task(self, task: Row, level: int) -> Entry:
        return task_entry(task, level, self._model.instance_of(task))


def _key(row: Row) -> str:
    key: str = row["key"] if "key" in row else row["id"]
    return key


def _unknown(node: str) -> Row:
    return {"key": f"node {node}", "parent": None, "name": "", "node": node, "kind": "root", "unknown": True}


def row_order(row: Row, sort: str) -> tuple[Any, ...]:
    """The sort key of a group or class."""
    name, key = row.get("name", ""), row["key"]
    if row.get("kind") == "root" and row.get("node"):
        # Nodes often have managers of the same name.
        name = f"{row['node']} {name}"
    oldest = row.get("oldest")
    age = math.inf if oldest is None else oldest
    return {
        "status": (0 if row.get("cancelling") else 1 if row.get("queued") else 2, name, key),
        "age": (age, key),
        "name": (name, key),
        "count": (-row.get("count", 0), name, key),
    }[sort]


def task_order(task: Row, sort: str) -> tuple[Any, ...]:
    """The sort key of a live task."""
    created, uid = task.get("created", 0.0), task["id"]
    if sort == "name":
        return (task.get("name", ""), created, uid)
    if sort == "status":
        return (_RANKS.get(task.get("status", ""), 2), created, uid)
    return (created, uid)


def task_entry(task: Row, level: int, instance: str = "") -> Entry:
    """The row of a live or an ended task. An ended one is found by its path: its id may be unknown."""
    if "ended" in task:
        return Entry(
            f"ended {task.get('task_id')} {task.get('created')}", "ended", level, task, None, instance
        )
    return Entry(task["id"], "task", level, task, None, instance)


def instance(task: Row) -> str:
    """The number of a task's group among those of the same name: ``#4711``; empty if it has none."""
    _, mark, number = str(task.get("group_id", "")).rpartition("#")
    return mark + number if mark else ""
