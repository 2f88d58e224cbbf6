"""The feed: what a manager does, as updates that build on one another.

It uses the manager's public functions alone, and no framework; ``hub`` calls it once a second while there are
viewers.

Rules, each with a test of its own:

1. Values are absolute: applying an update twice is harmless. A value that only ages is not sent again.
2. An update names its base. The last 256 are kept for clients that come back; for any other there is the
   snapshot.
3. An id contains the instance, because a number alone is wrong after a restart.
4. Everything is bounded: rows, ended tasks, names.
"""

from __future__ import annotations

import json
import os
import socket
from collections import deque
from dataclasses import dataclass, replace
from importlib.metadata import version
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from otel_tasks.live.rows import Row, Shown, class_row, ended_row, group_row, seconds, task_row
from otel_tasks.live.trouble import Trouble

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from otel_tasks import ManagedTask, Overview, TaskManager

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
# Classes of one task that are shown as the task: each costs some 15 us.
ONLY = 100

Lists = dict[str, dict[str, Row]]


@dataclass(frozen=True, slots=True)
class Update:
    """One tick: its number, and the delta from the one before as JSON."""

    number: int
    delta: str


class Feed:
    """The updates about one manager.

    Args:
        manager: The manager to show.
        shown: What the view shows of a task.
        actions: What the view may do.
    """

    def __init__(self, manager: TaskManager, shown: Shown, actions: Iterable[str]) -> None:
        self.manager = manager
        self.shown = shown
        self.instance = token_hex(4)
        self.number = 0
        self.look()
        self._started = self.overview.now
        self._actions = sorted(actions)
        self._trouble = Trouble()
        self._ring: deque[Update] = deque(maxlen=RING)
        self._samples: deque[list[float]] = deque(maxlen=SAMPLES)
        self._ended: deque[Row] = deque(maxlen=ENDED)
        self._ended_rows = 0
        self._ended_total: int | None = None
        self._lists: Lists = {"groups": {}, "classes": {}, "cancelling": {}}
        self._more = {"groups": 0, "classes": 0, "cancelling": 0}
        self._warnings: list[Row] = []
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
        """The whole overview, as of the last tick, as JSON."""
        if self._snapshot is None:
            self._snapshot = encoded(self._whole())
        return self._snapshot

    def stamp(self) -> Row:
        """What each answer begins with: the version, and the clock."""
        return {"v": VERSION, "now": seconds(self.overview.now), "epoch": seconds(self.overview.epoch)}

    def look(self) -> None:
        """Take an overview now, if none is taken every second.

        It keeps no task alive: it may stay until the next viewer comes.
        """
        overview = self.manager.overview()
        classes = tuple(row if row.only is None else replace(row, only=None) for row in overview.classes)
        self.overview = replace(overview, cancelling=(), classes=classes)

    def parsed(self, update_id: str) -> int | str:
        """The number in an id of this instance; otherwise the reason why it cannot be continued."""
        instance, _, number = update_id.rpartition(":")
        if instance != self.instance:
            return "restart"
        return int(number) if number.isdecimal() and len(number) < 16 else "old"

    # -- moving it on -----------------------------------------------------------------------

    def tick(self, members: Mapping[str, int] | None = None, *, held: float = 0.0) -> None:
        """Look at the manager, and record what has changed.

        Args:
            members: The keys of the rows whose tasks are wanted next, and for each how many.
            held: The longest time for which something held the loop since the last tick.
        """
        overview = self.overview = self.manager.overview(members={**(members or {}), **self._trouble.wants})
        before, self._lists = self._lists, self._read_lists(overview)
        ended, more_ended = self._read_ended(overview)
        warnings = self._trouble.find(self.manager, overview, held)
        stats = self._stats()
        sample = self._read_sample(overview.now, stats)
        self.number += 1
        delta = {
            **self._head("delta"),
            "base": self.id_of(self.number - 1),
            "stats": stats,
            "sample": sample,
            "set": {
                name: [row for key, row in rows.items() if before[name].get(key) != row]
                for name, rows in self._lists.items()
            },
            "gone": {
                name: [key for key in before[name] if key not in rows] for name, rows in self._lists.items()
            },
            "more": self._more,
            "ended": ended,
            "ended_more": more_ended,
        }
        if warnings != self._warnings:
            delta["warnings"] = warnings
        self._warnings = warnings
        self._ring.append(Update(self.number, encoded(delta)))
        self._snapshot = None

    def pause(self) -> None:
        """Forget what only viewers need; the next tick starts from nothing, and old ids do not lead to it."""
        self._ring.clear()
        self._samples.clear()
        self._ended.clear()
        self._ended_total = None
        self._snapshot = None
        self._trouble = Trouble()
        self.look()
        # A client that comes back with the last id gets no empty list of updates.
        self.number += 1

    def rows(self, tasks: Iterable[ManagedTask[Any]]) -> list[Row]:
        """The rows of live tasks; those that have ended are left out."""
        live = [task for task in tasks if not task.done()]
        nodes = self.manager.describe(live)
        return [
            task_row(task, node, self.overview, self.shown) for task, node in zip(live, nodes, strict=True)
        ]

    # -- its parts --------------------------------------------------------------------------

    def _head(self, kind: str) -> Row:
        return {**self.stamp(), "kind": kind, "id": self.id}

    def _whole(self) -> Row:
        return {
            **self._head("snapshot"),
            "instance": self.instance,
            "interval": INTERVAL,
            "service": os.environ.get("OTEL_SERVICE_NAME"),
            "manager": self.overview.manager,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": seconds(self._started),
            "version": version("otel-tasks"),
            "actions": self._actions,
            "trace_url": self.shown.trace_url,
            "stats": self._stats(),
            "samples": list(self._samples),
            **{name: list(rows.values()) for name, rows in self._lists.items()},
            "warnings": self._warnings,
            "ended": list(reversed(self._ended)),
            "more": self._more,
        }

    def _stats(self) -> Row:
        overview = self.overview
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

    def _read_sample(self, now: float, stats: Row) -> list[float]:
        names = ("running", "queued", "cancelling", "completed", "failed", "cancelled")
        sample = [round(now, 3), *(stats[name] for name in names)]
        self._samples.append(sample)
        return sample

    def _read_lists(self, overview: Overview) -> Lists:
        # The ones that have been cancelling for longest.
        cancelling = sorted(overview.cancelling, key=_requested_at)
        rows = self.rows(cancelling[:CANCELLING])
        alone = [row.only for row in overview.classes if row.only is not None][:ONLY]
        only = {row["id"]: row for row in self.rows(alone)}
        ids = {id(task): only.get(task.uid) for task in alone}
        self._more = {
            "groups": overview.folded_groups,
            "classes": overview.folded_classes,
            "cancelling": max(0, len(cancelling) - CANCELLING),
        }
        return {
            "groups": {row.key: group_row(row) for row in overview.groups},
            "classes": {row.key: class_row(row, ids.get(id(row.only))) for row in overview.classes},
            "cancelling": {row["id"]: row for row in rows},
        }

    def _read_ended(self, overview: Overview) -> tuple[list[Row], int]:
        """The rows of the tasks that ended since the last tick, newest first, and how many are left out."""
        stats = overview.stats
        total = stats.completed + stats.failed + stats.cancelled
        if self._ended_total is None:
            # The first tick shows what was before.
            infos = self.manager.recent(ENDED)
            self._ended_total = total - len(infos)
        else:
            infos = self.manager.recent(ENDED_PER_TICK, among=min(total - self._ended_total, ENDED_SEEN))
        left_out = total - self._ended_total - len(infos)
        self._ended_total = total
        rows: list[Row] = []
        for info in reversed(infos):
            self._ended_rows += 1
            rows.append(ended_row(info, self._ended_rows, overview, self.shown))
        self._ended.extend(rows)
        return rows[::-1], max(0, left_out)


def encoded(data: object) -> str:
    """The data as one line of JSON, in ASCII: a lone surrogate in a name must not end a stream."""
    return json.dumps(data, separators=(",", ":"))


def _requested_at(task: ManagedTask[Any]) -> float:
    cause = task.cause
    return task.created_at if cause is None or cause.at is None else cause.at
