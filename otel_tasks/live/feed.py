"""The feed: what a manager does, as updates that build on one another.

It uses the manager's public functions alone, and no framework; ``hub`` calls it once a second while there are
viewers.

Rules, each with a test of its own:

1. Values are absolute: applying an update twice is harmless. A value that only ages is not sent again.
2. An update names its base. The last 256 are kept for clients that come back; for any other there is the
   snapshot.
3. An id contains the instance, because a number alone is wrong after a restart.
4. Everything is bounded: rows, ended tasks, names.
5. A tick shows one moment, that of its first slice, and is published in its last one: until then, the feed
   shows the tick before. A task that ends in between is live in this tick, and has ended in the next.
"""

from __future__ import annotations

import json
import os
import socket
from collections import deque
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Protocol

from otel_tasks._core.slices import COUNTS_PER_SLICE, ROWS_PER_SLICE, TASKS_PER_SLICE, at_once, smallest
from otel_tasks.live.rows import Row, Shown, class_row, ended_row, group_row, seconds, task_row
from otel_tasks.live.trouble import Trouble

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence

    from otel_tasks import ManagedTask, Overview, TaskInfo, TaskManager

# The version of the JSON.
VERSION = 1
INTERVAL = 1.0
RING = 256
SAMPLES = 60
ENDED = 256
ENDED_PER_TICK = 50
# Of more ends in one tick, only so many are looked at.
ENDED_SEEN = 1000
CANCELLING = 50
# Classes of one task that are shown as the task: each costs some 20 us.
ONLY = 100

# Rows by their keys, each as JSON: it is made once for all viewers, and comparing it is cheap.
Encoded = dict[str, str]
Lists = dict[str, Encoded]


@dataclass(slots=True)
class Gathered:
    """What the other nodes of a fleet add to an overview.

    Attributes:
        lists: Their rows.
        ended_counts: How many of their tasks have ended since they were first seen.
        totals: How many live tasks each row stands for.
        stats: The counters of each.
        more: How many rows each leaves out.
        warnings: Their warnings.
        ended: Their tasks that have ended since the last tick.
        nodes: The nodes.
        left_out: How many nodes are not looked at.
    """

    lists: Lists
    ended_counts: dict[str, int]
    totals: dict[str, int] = field(default_factory=dict)
    stats: list[Row] = field(default_factory=list)
    more: list[Row] = field(default_factory=list)
    warnings: list[Row] = field(default_factory=list)
    ended: list[Row] = field(default_factory=list)
    nodes: list[Row] = field(default_factory=list)
    left_out: int = 0


class Elsewhere(Protocol):
    """The other nodes of a fleet, as the feed sees them."""

    def gathered(self) -> Generator[None, None, Gathered]:
        """What they add to the overview of this one, in slices; ended tasks once."""
        ...

    def clear(self) -> None:
        """Forget everything."""


@dataclass(frozen=True, slots=True)
class Update:
    """One tick: its number, and the delta from the one before as JSON."""

    number: int
    delta: str


@dataclass(slots=True)
class _Ended:
    """The tasks that ended since the last tick.

    Attributes:
        infos: Their records, newest first.
        total: How many tasks have ended in all.
        count: How many are new; None for the first tick, which shows those from before it.
    """

    infos: Iterator[TaskInfo]
    total: int
    count: int | None


@dataclass(frozen=True, slots=True)
class _Changes:
    """What differs in each list from that of the last tick: the rows, and the keys of those that are gone."""

    rows: dict[str, list[str]]
    gone: dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class _Published:
    """What the last tick has published, but for the ended tasks and the samples, which are rings.

    Attributes:
        overview: Its overview, without tasks.
        stats: The counters.
        lists: The rows.
        more: How many rows each list leaves out.
        totals: How many live tasks each row stands for.
        warnings: The warnings.
        nodes: The nodes of the fleet.
        ended_elsewhere: How many tasks have ended in other nodes.
    """

    overview: Overview
    stats: Row
    lists: Lists = field(default_factory=lambda: {"groups": {}, "classes": {}, "cancelling": {}})
    more: dict[str, int] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)
    warnings: list[Row] = field(default_factory=list)
    nodes: list[Row] = field(default_factory=list)
    ended_elsewhere: Mapping[str, int] = field(default_factory=dict)


class Feed:
    """The updates about one manager.

    Args:
        manager: The manager to show.
        shown: What the view shows of a task.
        actions: What the view may do.
        elsewhere: The other nodes of a fleet; None without one.
    """

    def __init__(
        self,
        manager: TaskManager,
        shown: Shown,
        actions: Iterable[str],
        elsewhere: Elsewhere | None = None,
    ) -> None:
        self.manager = manager
        self.shown = shown
        self._elsewhere = elsewhere
        # Each row of a fleet names its node.
        self._node: Row = {} if shown.node is None else {"node": shown.node}
        self.instance = token_hex(4)
        self.number = 0
        self._started = manager.now()
        self._actions = sorted(actions)
        self._overview: Overview | None = None
        self._published: _Published | None = None
        self._trouble = Trouble()
        self._ring: deque[Update] = deque(maxlen=RING)
        self._samples: deque[str] = deque(maxlen=SAMPLES)
        self._ended: deque[str] = deque(maxlen=ENDED)
        self._ended_rows = 0
        self._ended_total: int | None = None
        self._snapshot: str | None = None

    # -- reading it -------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """The id of the last update."""
        return self.id_of(self.number)

    def id_of(self, number: int) -> str:
        """The id of an update."""
        return f"{self.instance}:{number}"

    def since(self, number: int) -> list[Update] | None:
        """The updates after this one; None if they do not lead on from there."""
        updates = [update for update in self._ring if update.number > number]
        return updates if number == self.number or (updates and updates[0].number == number + 1) else None

    def snapshot(self) -> str:
        """The whole overview, as of the last tick, as JSON; before the first, it ticks in one step."""
        if self._published is None:
            at_once(self.slices())
            return self.snapshot()
        if self._snapshot is None:
            self._snapshot = self._whole(self._published)
        return self._snapshot

    def total_of(self, key: str) -> int:
        """How many live tasks a row stands for, as of the last tick."""
        return 0 if self._published is None else self._published.totals.get(key, 0)

    def stamp(self) -> Row:
        """What each answer begins with: the version, and the clock."""
        return _stamp(self.overview)

    @property
    def overview(self) -> Overview:
        """The last overview without its tasks, with the time of now: it gives rows their keys."""
        if self._overview is None:
            self._overview = _without_tasks(self.manager.overview())
        return replace(self._overview, now=self.manager.now())

    def look(
        self, members: Mapping[str, int | None] | None = None, *, max_age: float = 0.0
    ) -> Generator[None, None, Overview]:
        """Take an overview, unless there is one: a tick takes one too.

        Args:
            members: The keys of the rows whose tasks are wanted, and for each how many. None: all, in no
                order.
            max_age: Seconds that the last overview may be old, if no tasks are wanted.
        """
        last = self._overview
        if not members and last is not None and self.manager.now() - last.now < max_age:
            return last
        overview = yield from self.manager.overview_slices(members=members)
        self._keep(overview)
        return overview

    def parsed(self, update_id: str) -> int | str:
        """The number in an id of this instance; otherwise the reason why it cannot be continued."""
        instance, _, number = update_id.rpartition(":")
        if instance != self.instance:
            return "restart"
        return int(number) if number.isdecimal() and len(number) < 16 else "old"

    # -- moving it on -----------------------------------------------------------------------

    def slices(
        self, members: Mapping[str, int] | None = None, *, held: float = 0.0
    ) -> Generator[None, None, Mapping[str, Sequence[ManagedTask[Any]]]]:
        """Look at the manager, and publish what has changed: one tick. The generator returns the tasks.

        Only one tick may run at a time.

        Args:
            members: The keys of the rows whose tasks are wanted, and for each how many.
            held: The longest time for which something held the loop since the last tick.
        """
        # The same moment as the first slice of the overview, which follows without a yield.
        new = self._read_ended()
        wanted = dict(members or {})
        for key, limit in self._trouble.wants.items():
            wanted[key] = max(limit, wanted.get(key, 0))
        overview = yield from self.manager.overview_slices(members=wanted)
        lists = yield from self._read_lists(overview)
        warnings = yield from self._trouble.slices(self.manager, overview, held)
        gathered = None if self._elsewhere is None else (yield from self._elsewhere.gathered())
        others = [] if gathered is None else gathered.ended
        ended = yield from self._ended_rows_of(new, overview, others)
        yield
        published = _Published(
            overview=_without_tasks(overview),
            stats=_stats(overview),
            lists=lists,
            more={
                "groups": overview.folded_groups,
                "classes": overview.folded_classes,
                "cancelling": max(0, len(overview.cancelling) - CANCELLING),
            },
            totals=_totals(overview),
            warnings=warnings,
        )
        if gathered is not None:
            own = [] if self.shown.node is None else [self._own_node(overview)]
            published = _joined(published if own else _without_own(published), gathered, own)
            yield
        before = _Published(overview, {}) if self._published is None else self._published
        changes = yield from _changes(before.lists, published.lists)
        self._publish(before, published, new, ended, changes)
        return overview.members

    def pause(self) -> None:
        """Forget what only viewers need; the next tick starts from nothing, and old ids do not lead to it."""
        self._ring.clear()
        self._samples.clear()
        self._ended.clear()
        self._ended_total = None
        self._snapshot = None
        self._trouble = Trouble()
        if self._elsewhere is not None:
            self._elsewhere.clear()
        # A client that comes back with the last id gets no empty list of updates.
        self.number += 1

    def rows(self, tasks: Iterable[ManagedTask[Any]]) -> list[Row]:
        """The rows of live tasks; those that have ended are left out."""
        live = [task for task in tasks if not task.done()]
        overview = self.overview
        nodes = self.manager.describe(live)
        return [task_row(task, node, overview, self.shown) for task, node in zip(live, nodes, strict=True)]

    def encoded_rows(self, tasks: Sequence[ManagedTask[Any]]) -> Generator[None, None, Encoded]:
        """The rows of live tasks, by their ids, in slices."""
        found: Encoded = {}
        for start in range(0, len(tasks), ROWS_PER_SLICE):
            found.update(
                (row["id"], encoded(row)) for row in self.rows(tasks[start : start + ROWS_PER_SLICE])
            )
            yield
        return found

    # -- a tick's parts ---------------------------------------------------------------------

    def _keep(self, overview: Overview) -> None:
        """Keep an overview until the next one; it keeps no task alive."""
        if self._overview is None or overview.now >= self._overview.now:
            self._overview = _without_tasks(overview)

    def _read_ended(self) -> _Ended:
        """Find the tasks that ended since the last tick."""
        stats = self.manager.stats()
        total = stats.completed + stats.failed + stats.cancelled
        if self._ended_total is None:
            return _Ended(self.manager.iter_recent(ENDED), total, None)
        count = total - self._ended_total
        return _Ended(self.manager.iter_recent(ENDED_PER_TICK, among=min(count, ENDED_SEEN)), total, count)

    def _read_lists(self, overview: Overview) -> Generator[None, None, Lists]:
        # The ones that have been cancelling for longest.
        longest = yield from smallest(overview.cancelling, CANCELLING, _requested_at)
        cancelling = yield from self.encoded_rows(longest)
        alone = [row.only for row in overview.classes if row.only is not None][:ONLY]
        only: dict[int, Row] = {}
        for start in range(0, len(alone), ROWS_PER_SLICE):
            batch = [task for task in alone[start : start + ROWS_PER_SLICE] if not task.done()]
            only.update((id(task), row) for task, row in zip(batch, self.rows(batch), strict=True))
            yield
        groups: Encoded = {}
        for start in range(0, len(overview.groups), COUNTS_PER_SLICE):
            found = overview.groups[start : start + COUNTS_PER_SLICE]
            groups.update((row.key, encoded({**group_row(row), **self._node})) for row in found)
            yield
        classes: Encoded = {}
        for start in range(0, len(overview.classes), COUNTS_PER_SLICE):
            for row in overview.classes[start : start + COUNTS_PER_SLICE]:
                classes[row.key] = encoded({**class_row(row, only.get(id(row.only))), **self._node})
            yield
        return {"groups": groups, "classes": classes, "cancelling": cancelling}

    @property
    def waits_for_nodes(self) -> bool:
        """True while a node of the fleet has never answered, and does not count as silent yet."""
        nodes = [] if self._published is None else self._published.nodes
        return any(node["key"] is None and node["silent_since"] is None for node in nodes)

    def _fleet(self, published: _Published) -> Row:
        return {"namespace": self.shown.namespace, "node": self.shown.node, "nodes": published.nodes}

    def _own_node(self, overview: Overview) -> Row:
        return {
            **self._node,
            "key": overview.groups[0].key,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": version("otel-tasks"),
            "silent_since": None,
        }

    def _ended_rows_of(
        self, new: _Ended, overview: Overview, others: Iterable[Row]
    ) -> Generator[None, None, list[str]]:
        """The rows of the tasks that ended since the last tick, oldest first."""
        rows: list[Row] = []
        # The first one takes as long as a slice: it is chosen among many.
        size = 1
        while batch := list(islice(new.infos, size)):
            rows += [ended_row(info, None, overview, self.shown) for info in batch]
            size = COUNTS_PER_SLICE
            yield
        if others:
            rows = sorted([*rows, *others], key=lambda row: -row["ended"])[:ENDED]
        ended: list[str] = []
        for number, row in enumerate(reversed(rows), self._ended_rows + 1):
            ended.append(encoded({"n": number, **row}))
            if len(ended) % COUNTS_PER_SLICE == 0:
                yield
        return ended

    def _publish(
        self, before: _Published, published: _Published, new: _Ended, ended: list[str], changes: _Changes
    ) -> None:
        """Record what has changed since the last tick."""
        self.number += 1
        sample = _sample(published)
        delta = {
            **self._head("delta", published),
            "base": encoded(self.id_of(self.number - 1)),
            "stats": encoded(published.stats),
            "sample": sample,
            "set": assembled({name: array(rows) for name, rows in changes.rows.items()}),
            "gone": encoded(changes.gone),
            "more": encoded(published.more),
            "ended": array(reversed(ended)),
            "ended_more": encoded(0 if new.count is None else max(0, new.count - len(ended))),
        }
        if published.warnings != before.warnings:
            delta["warnings"] = encoded(published.warnings)
        if published.nodes != before.nodes:
            delta["nodes"] = encoded(published.nodes)
        self._keep(published.overview)
        self._published = published
        self._samples.append(sample)
        self._ended.extend(ended)
        self._ended_rows += len(ended)
        self._ended_total = new.total
        self._ring.append(Update(self.number, assembled(delta)))
        self._snapshot = None

    def _head(self, kind: str, published: _Published) -> Encoded:
        head = {**_stamp(published.overview), "kind": kind, "id": self.id}
        return {name: encoded(value) for name, value in head.items()}

    def _whole(self, published: _Published) -> str:
        facts: Row = {
            "instance": self.instance,
            "interval": INTERVAL,
            "service": os.environ.get("OTEL_SERVICE_NAME"),
            "manager": published.overview.manager,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": seconds(self._started),
            "version": version("otel-tasks"),
            "actions": self._actions,
            "trace_url": self.shown.trace_url,
            "stats": published.stats,
            "warnings": published.warnings,
            "more": published.more,
            **({} if self._elsewhere is None else self._fleet(published)),
        }
        return assembled(
            {
                **self._head("snapshot", published),
                **{name: encoded(value) for name, value in facts.items()},
                "samples": array(self._samples),
                **{name: array(rows.values()) for name, rows in published.lists.items()},
                "ended": array(reversed(self._ended)),
            }
        )


_encoder = json.JSONEncoder(separators=(",", ":"))


def encoded(data: object) -> str:
    """The data as one line of JSON, in ASCII: a lone surrogate in a name must not end a stream."""
    return _encoder.encode(data)


def assembled(values: Mapping[str, str]) -> str:
    """An object of JSON; its values are JSON already, and its names need no escaping."""
    return "{" + ",".join([f'"{name}":{value}' for name, value in values.items()]) + "}"


def array(values: Iterable[str]) -> str:
    """An array of JSON; its values are JSON already."""
    return "[" + ",".join(values) + "]"


def _changes(before: Lists, lists: Lists) -> Generator[None, None, _Changes]:
    found = _Changes({}, {})
    for name, rows in lists.items():
        old = before[name]
        changed = found.rows[name] = []
        every = iter(rows.items())
        while batch := list(islice(every, TASKS_PER_SLICE)):
            changed += [row for key, row in batch if old.get(key) != row]
            yield
        found.gone[name] = [key for key in old if key not in rows]
    return found


def _stamp(overview: Overview) -> Row:
    return {"v": VERSION, "now": seconds(overview.now), "epoch": seconds(overview.epoch)}


def _stats(overview: Overview) -> Row:
    stats, live = overview.stats, overview.groups[0].tasks
    return {
        "live": live.count,
        "running": live.count - live.queued - live.cancelling,
        "queued": live.queued,
        "cancelling": live.cancelling,
        "created": stats.created,
        "completed": stats.completed,
        "failed": stats.failed,
        "cancelled": stats.cancelled,
        "cancel_ignored": stats.cancel_ignored,
        "groups": overview.open_groups,
        "limit": overview.max_concurrency,
        "closed": overview.closed,
    }


def _totals(overview: Overview) -> dict[str, int]:
    groups = {row.key: row.tasks.count for row in overview.groups}
    return groups | {row.key: row.tasks.count for row in overview.classes}


def _sample(published: _Published) -> str:
    names = ("running", "queued", "cancelling", "completed", "failed", "cancelled")
    stats = {**published.stats, **published.ended_elsewhere}
    return encoded([round(published.overview.now, 3), *(stats[name] for name in names)])


# What no sum is made of.
_OWN = frozenset({"limit", "closed"})


def _without_own(published: _Published) -> _Published:
    """What an observer publishes of itself: it is no node, and has no tasks."""
    return _Published(published.overview, {**published.stats, "groups": 0}, more=published.more)


def _joined(published: _Published, gathered: Gathered, own: list[Row]) -> _Published:
    """What a node has published, with what the other nodes add to it."""
    stats, more, totals = dict(published.stats), dict(published.more), dict(published.totals)
    for counts, others in ((stats, gathered.stats), (more, gathered.more)):
        for other in others:
            for name in counts.keys() & other.keys() - _OWN:
                counts[name] += other[name]
    for key, total in gathered.totals.items():
        totals[key] = totals.get(key, 0) + total
    return replace(
        published,
        stats={**stats, "limit": None},
        lists={name: {**rows, **gathered.lists[name]} for name, rows in published.lists.items()},
        more={**more, "nodes": gathered.left_out},
        totals=totals,
        warnings=[*published.warnings, *gathered.warnings],
        nodes=[*own, *gathered.nodes],
        ended_elsewhere={
            name: published.stats[name] + count for name, count in gathered.ended_counts.items()
        },
    )


def _without_tasks(overview: Overview) -> Overview:
    """An overview that keeps no task alive: it may stay until the next viewer comes."""
    return replace(overview, cancelling=(), classes=(), members={})


def _requested_at(task: ManagedTask[Any]) -> float:
    cause = task.cause
    return task.created_at if cause is None or cause.at is None else cause.at
