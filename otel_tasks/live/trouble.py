"""Trouble: finds what a person should look at first, in each overview.

Each kind has a minimum age, so that work that is merely busy raises nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from otel_tasks import TaskStatus
from otel_tasks._core.slices import ROWS_PER_SLICE, TASKS_PER_SLICE
from otel_tasks.live.rows import Row, location, seconds, short_path

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Generator, Iterable, Iterator

    from otel_tasks import Location, ManagedTask, Overview, TaskManager, TaskNode

MAX_WARNINGS = 20
# Seconds.
CANCELLING = 30.0
UNSTARTED = 10.0
WAITING = 5.0
OUTLIVED = 10.0
HELD = 0.25
# How long a blocked loop stays on the list.
REMEMBERED = 60.0
# As many tasks at one line are worth a warning.
MANY = 10
# The oldest tasks are looked at, some in each tick: each costs some 20 us.
LOOKED_AT = 500
PER_TICK = 100
# The search for plain tasks looks at every task of the loop: it is made in one of so many ticks, and not with
# more live tasks than this.
SEARCHED_EACH = 5
SEARCHED_MOST = 10_000


class Trouble:
    """Finds warnings, and remembers what takes more than one tick to find."""

    def __init__(self) -> None:
        self._root: str | None = None
        # The oldest tasks, those of them still to be looked at, and the lines where the others wait.
        self._queue: list[ManagedTask[Any]] = []
        self._places: dict[ManagedTask[Any], Location] = {}
        self._unstarted: set[ManagedTask[Any]] = set()
        # The plain tasks that outlive their requests, and when each was first seen to.
        self._outliving: dict[asyncio.Task[Any], float] = {}
        self._ticks = 0
        # When the loop was held, and for how long.
        self._held: list[tuple[float, float]] = []

    @property
    def wants(self) -> dict[str, int]:
        """The rows whose tasks are wanted in the next overview."""
        return {} if self._root is None or self._queue else {self._root: LOOKED_AT}

    def slices(
        self, manager: TaskManager, overview: Overview, held: float
    ) -> Generator[None, None, list[Row]]:
        """Find the warnings of this moment, the most urgent kinds first.

        Args:
            manager: The manager.
            overview: The live tasks, with those that ``wants`` asked for.
            held: The longest time for which something held the loop since the last call.
        """
        self._root = overview.groups[0].key
        yield from self._look(manager, overview)
        yield from self._search(manager, overview)
        cancelling = yield from _cancelling(overview)
        now = overview.now
        if held >= HELD:
            self._held.append((now, held))
        self._held = [(at, long) for at, long in self._held if now - at < REMEMBERED]
        found = [
            *cancelling,
            *self._blocked(),
            *self._not_started(now),
            *self._outlived(now),
            *self._waiting(overview),
            *_ignored(overview),
        ]
        return found[:MAX_WARNINGS]

    def _look(self, manager: TaskManager, overview: Overview) -> Generator[None, None, None]:
        """Look at the next tasks."""
        if not self._queue and self._root is not None:
            self._queue = list(overview.members.get(self._root, ()))[:LOOKED_AT]
            # Those that have ended, or that are among the oldest no more, are forgotten.
            known = set(self._queue)
            self._places = {task: at for task, at in self._places.items() if task in known}
        looked_at, self._queue = self._queue[:PER_TICK], self._queue[PER_TICK:]
        for start in range(0, len(looked_at), ROWS_PER_SLICE):
            batch = [task for task in looked_at[start : start + ROWS_PER_SLICE] if not task.done()]
            for task, node in zip(batch, manager.describe(batch), strict=True):
                self._note(task, node, overview.now)
            yield
        self._places = {task: at for task, at in self._places.items() if not task.done()}
        self._unstarted = {task for task in self._unstarted if task.status is TaskStatus.PENDING}

    def _search(self, manager: TaskManager, overview: Overview) -> Generator[None, None, None]:
        """Look for plain tasks that outlive their requests."""
        self._ticks += 1
        if self._ticks % SEARCHED_EACH == 1 and overview.stats.live <= SEARCHED_MOST:
            seen, now = self._outliving, overview.now
            found = yield from manager.outliving_slices()
            self._outliving = {task: seen.get(task, now) for task in found}

    def _note(self, task: ManagedTask[Any], node: TaskNode, now: float) -> None:
        works = node.attempt or node
        if works.where is not None and not works.queued and now - task.created_at >= WAITING:
            self._places[task] = works.where
        else:
            self._places.pop(task, None)
        if node.status is TaskStatus.PENDING and not node.queued and now - task.created_at >= UNSTARTED:
            self._unstarted.add(task)

    def _blocked(self) -> Iterator[Row]:
        if self._held:
            longest = max(long for _, long in self._held)
            row = _warning("blocked", len(self._held), self._held[-1][0], HELD, None)
            yield {**row, "seconds": round(longest, 2)}

    def _not_started(self, now: float) -> Iterator[Row]:
        late = [task.created_at for task in self._unstarted if now - task.created_at >= UNSTARTED]
        if late:
            query = {"status": "pending", "min_age": f"{UNSTARTED:g}"}
            yield _warning("unstarted", len(late), min(late), UNSTARTED, query)

    def _outlived(self, now: float) -> Iterator[Row]:
        late = [at for task, at in self._outliving.items() if now - at >= OUTLIVED and not task.done()]
        if late:
            yield _warning("outlived", len(late), min(late), OUTLIVED, None)

    def _waiting(self, overview: Overview) -> Iterator[Row]:
        waiting: dict[Location, list[float]] = {}
        for task, place in self._places.items():
            waiting.setdefault(place, []).append(task.created_at)
        for place, created in sorted(waiting.items(), key=lambda each: -len(each[1]))[:5]:
            if len(created) < MANY:
                return
            at = f"{short_path(place.file)}:{place.line}"
            query = {"where": at, "min_age": f"{WAITING:g}"}
            row = _warning("waiting", len(created), min(created), WAITING, query)
            estimated = overview.groups[0].tasks.count > LOOKED_AT
            yield {**row, "key": f"waiting {at}", "where": location(place), "estimated": estimated}


def _cancelling(overview: Overview) -> Generator[None, None, list[Row]]:
    late: list[float] = []
    for start in range(0, len(overview.cancelling), TASKS_PER_SLICE):
        times = _requests(overview.cancelling[start : start + TASKS_PER_SLICE])
        late += [at for at in times if overview.now - at >= CANCELLING]
        yield
    if not late:
        return []
    query = {"status": "cancelling", "min_age": f"{CANCELLING:g}"}
    return [_warning("cancelling", len(late), min(late), CANCELLING, query)]


def _requests(tasks: Iterable[ManagedTask[Any]]) -> Iterator[float]:
    for task in tasks:
        cause = task.cause
        if cause is not None and cause.at is not None:
            yield cause.at


def _ignored(overview: Overview) -> Iterator[Row]:
    if overview.stats.cancel_ignored:
        yield _warning("ignored", overview.stats.cancel_ignored, None, 0.0, None)


def _warning(kind: str, count: int, since: float | None, min_age: float, query: dict[str, str] | None) -> Row:
    return {
        "key": kind,
        "kind": kind,
        "count": count,
        "since": seconds(since),
        "min_age": min_age,
        "where": None,
        "seconds": None,
        "query": None if query is None else urlencode(query),
    }
