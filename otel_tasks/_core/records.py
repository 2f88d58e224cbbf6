"""A manager's records of its tasks: counters, a bounded history, and the listeners for each event.

A record holds no frame, no task, and no group.
"""

from __future__ import annotations

import asyncio
from asyncio import CancelledError
from collections import deque
from contextvars import copy_context
from dataclasses import replace
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from otel_tasks._core.events import CancelCause
from otel_tasks._core.info import TaskInfo
from otel_tasks._core.log import TaskLogger
from otel_tasks._core.names import Key, full_name
from otel_tasks._core.state import TaskPriority, TaskStatus
from otel_tasks._core.telemetry import SpanContext, low_cardinality
from otel_tasks._core.telemetry.context import ids_in_hex

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from otel_tasks._core.log import LoggedTask

TaskEvent = Literal["created", "dequeued", "cancelling", "ended"]

# The record of a plain task that returned or was cancelled. Most tasks do, and a TaskInfo would cost each 1
# us more. The fields: asyncio's name and the key, see `names`; the group's name, its id, and whether it is
# scoped; priority; times of creation and end; the cause, if cancelled; the span.
Brief = tuple[
    str,
    Key,
    tuple[str, str, bool],
    TaskPriority,
    float,
    float,
    CancelCause | None,
    SpanContext | None,
]


class TaskStats(NamedTuple):
    """Counters since the manager was created; they also count the tasks that the history has dropped.

    ``created == live + completed + failed + cancelled`` at any moment.

    Attributes:
        created: Tasks created.
        live: Tasks that have not ended.
        completed: Tasks that returned.
        failed: Tasks that raised, timeouts included.
        cancelled: Tasks that ended cancelled.
        cancel_ignored: Completed tasks that were cancelled and completed anyway.
        queued: Live tasks that wait for a place.
        remembered: Ended tasks that the history holds now.
    """

    created: int
    live: int
    completed: int
    failed: int
    cancelled: int
    cancel_ignored: int
    queued: int
    remembered: int

    def to_dict(self) -> dict[str, int]:
        """Return the counters as JSON-ready data."""
        return self._asdict()


class Counters:
    """How many tasks have ended, and how; tasks that the history has dropped stay counted."""

    def __init__(self) -> None:
        self.completed = 0
        self.failed = 0
        self.cancelled = 0
        self.cancel_ignored = 0
        # By the low-cardinality name of the group and the kind of the cause.
        self.cancelled_by: dict[tuple[str, str], int] = {}
        # By the low-cardinality name of the group and the type of the error.
        self.retried_by: dict[tuple[str, str], int] = {}
        # Group, cause, and key of the last count: tasks that are cancelled together share them.
        self._last_cancelled: tuple[str, CancelCause | None, tuple[str, str]] = ("", None, ("", ""))

    @property
    def ended(self) -> int:
        """The number of ended tasks."""
        return self.completed + self.failed + self.cancelled

    def count_lost(self) -> None:
        """Count a task that can never end, as failed."""
        self.failed += 1

    def count_cancelled(self, group: str, cause: CancelCause | None) -> None:
        """Count a task that has ended cancelled."""
        self.cancelled += 1
        if cause is None:
            return
        if self._last_cancelled[0] is not group or self._last_cancelled[1] is not cause:
            self._last_cancelled = (group, cause, (low_cardinality(group), str(cause.kind)))
        key = self._last_cancelled[2]
        self.cancelled_by[key] = self.cancelled_by.get(key, 0) + 1

    def count_retry(self, group: str, error: str) -> None:
        """Count a failed attempt that another one follows."""
        key = (low_cardinality(group), error)
        self.retried_by[key] = self.retried_by.get(key, 0) + 1


class Listeners:
    """The functions that are called for each event of a task.

    Args:
        changed: Called when a listener has been added or removed.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        # Always the same list: `ending` reads it directly, to see whether there are listeners.
        self.functions: list[Callable[[TaskEvent, TaskInfo], object]] = []

    def add(self, listener: Callable[[TaskEvent, TaskInfo], object]) -> None:
        """Call ``listener`` for each event from now on."""
        self.functions.append(listener)
        self._changed()

    def remove(self, listener: Callable[[TaskEvent, TaskInfo], object]) -> None:
        """Stop calling ``listener``; raises ValueError if it was not added."""
        self.functions.remove(listener)
        self._changed()

    def notify(self, event: TaskEvent, task: LoggedTask, info: TaskInfo) -> None:
        """Call the listeners; one that raises is logged and dropped."""
        for listener in list(self.functions):
            try:
                # In a copy, so that one listener's context variables do not reach the next.
                copy_context().run(listener, event, info)
            except (Exception, CancelledError):
                # A CancelledError too, which a listener gets from a future that it reads: nobody cancels this
                # call.
                TaskLogger(task).exception("listener %r raised and is dropped", listener)
                if listener in self.functions:
                    self.remove(listener)


class KeptResult(NamedTuple):
    """The record of a task that keeps its result, for callers that wait for it later."""

    info: TaskInfo
    error: BaseException | None

    def take(self) -> Any:
        """Return the result, or raise as the task did."""
        if self.info.status is TaskStatus.CANCELLED:
            raise asyncio.CancelledError(f"task {self.info.name!r} was cancelled")
        if self.error is not None:
            # A new copy each time, because raising adds a traceback, and so frames.
            raise without_frames(self.error)
        return self.info.result


class History:
    """The last tasks that ended, oldest first.

    A lookup walks from the newest record on. The bound keeps that short, and adding a record costs little.

    Args:
        limit: The number of tasks to keep, at least 0.
    """

    def __init__(self, limit: int) -> None:
        self._entries: deque[Brief | TaskInfo | KeptResult] = deque(maxlen=limit)
        self._epoch = 0.0
        # Called for each task that ends.
        self.add = self._entries.append

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[TaskInfo]:
        return map(self._info, self._entries)

    def find(self, task_id: str, group_id: str | None = None) -> TaskInfo | None:
        """Find the newest task with this id or uid; with a group, this name matches too."""
        entry = self._newest(task_id, group_id)
        return None if entry is None else self._info(entry)

    def ending(self, task_id: str, group_id: str | None = None) -> KeptResult | None:
        """Find the newest task as ``find`` does; None if its result was not kept."""
        entry = self._newest(task_id, group_id)
        return entry if isinstance(entry, KeptResult) else None

    def newest(self, limit: int | None, among: int | None, group_id: str | None) -> Iterator[TaskInfo]:
        """Iterate over the newest records, as they are now, newest first; make each snapshot on demand.

        Args:
            limit: How many at most; None: all.
            among: Choose from the newest so many, and prefer failed and cancelled tasks; None: the newest.
            group_id: Only those of this group; None: of all.
        """
        found: Iterator[Brief | TaskInfo | KeptResult] = reversed(self._entries)
        if group_id is not None:
            found = (entry for entry in found if _group_id(entry) == group_id)
        entries = list(islice(found, limit if among is None else among))
        # The epoch of now: a record whose epoch differs keeps its own.
        return map(_info, _chosen(entries, limit), repeat(self._epoch))

    def change_epoch(self, epoch: float) -> None:
        """Set the epoch of the clock for the next tasks; the records of ended tasks keep theirs."""
        if epoch != self._epoch:
            entries = [
                entry if isinstance(entry, KeptResult) else self._info(entry) for entry in self._entries
            ]
            self._entries.clear()
            self._entries.extend(entries)
            self._epoch = epoch

    def forget(self, before: float) -> int:
        """Drop the tasks that ended at or before this time on their clock; returns how many."""
        kept = [entry for entry in self._entries if (self._info(entry).ended_at or 0.0) > before]
        dropped = len(self._entries) - len(kept)
        self._entries.clear()
        self._entries.extend(kept)
        return dropped

    def note_uid(self, ended: TaskInfo) -> None:
        """Add a uid, which was read after the task's end, to its record, if the history still has it."""
        # The newest first: of two tasks with one name and equal times, on a virtual clock, it is the later.
        for index in reversed(range(len(self._entries))):
            entry = self._entries[index]
            if _is_called(entry, ended.name, ended.group_id):
                info = self._info(entry)
                if info.uid is None and _times(info) == _times(ended):
                    info = replace(info, uid=ended.uid)
                    self._entries[index] = (
                        entry._replace(info=info) if isinstance(entry, KeptResult) else info
                    )
                    return

    def _info(self, entry: Brief | TaskInfo | KeptResult) -> TaskInfo:
        return _info(entry, self._epoch)

    def _newest(self, task_id: str, group_id: str | None) -> Brief | TaskInfo | KeptResult | None:
        entry: Brief | TaskInfo | KeptResult
        for entry in reversed(self._entries):
            if _is_called(entry, task_id, group_id):
                return entry
        return None


def _chosen(
    entries: list[Brief | TaskInfo | KeptResult], limit: int | None
) -> Iterator[Brief | TaskInfo | KeptResult]:
    """Choose the entries to show when the first one is asked for, which takes 0.2 us for each."""
    if limit is not None and len(entries) > limit:
        notable = [entry for entry in entries if _is_notable(entry)][:limit]
        others = (entry for entry in entries if not _is_notable(entry))
        # In their order: the entries are compared by identity, because a result may not compare.
        chosen = {id(entry) for entry in (*notable, *islice(others, limit - len(notable)))}
        entries = [entry for entry in entries if id(entry) in chosen]
    yield from entries


def _is_notable(entry: Brief | TaskInfo | KeptResult) -> bool:
    if isinstance(entry, KeptResult):
        entry = entry.info
    return entry.status is not TaskStatus.COMPLETED if isinstance(entry, TaskInfo) else entry[6] is not None


def _times(info: TaskInfo) -> tuple[float, float | None]:
    return info.created_at, info.ended_at


def _is_called(entry: Brief | TaskInfo | KeptResult, name: str, wanted: str | None) -> bool:
    """True if this is the task's id or uid, or, with a wanted group, its name there."""
    task_id, own, uid, group_id = _known_as(entry)
    if wanted is None:
        return name in (task_id, uid)
    return name in (task_id, uid, own) and _is_same_group(group_id, wanted, is_scoped=task_id != own)


def _known_as(entry: Brief | TaskInfo | KeptResult) -> tuple[str, str, str | None, str]:
    """The id, the name, the uid, and the group's id."""
    if isinstance(entry, KeptResult):
        entry = entry.info
    if isinstance(entry, TaskInfo):
        return entry.id, entry.name, entry.uid, entry.group_id
    name, (_, group_id, scoped) = full_name(entry[0], entry[1]), entry[2]
    return f"{group_id}/{name}" if scoped else name, name, None, group_id


def _group_id(entry: Brief | TaskInfo | KeptResult) -> str:
    if isinstance(entry, KeptResult):
        entry = entry.info
    return entry.group_id if isinstance(entry, TaskInfo) else entry[2][1]


def _is_same_group(group_id: str, wanted: str, *, is_scoped: bool) -> bool:
    if group_id == wanted:
        return True
    # By its number: the name before the "#" changes when the route of a request becomes known.
    return is_scoped and "#" in wanted and group_id.rpartition("#")[2] == wanted.rpartition("#")[2]


def _info(entry: Brief | TaskInfo | KeptResult, epoch: float) -> TaskInfo:
    if isinstance(entry, KeptResult):
        return entry.info
    if isinstance(entry, TaskInfo):
        return entry
    _, _, (group, group_id, _), priority, created_at, ended_at, cause, span = entry
    task_id, name, uid, _ = _known_as(entry)
    trace_id, span_id = ids_in_hex(span)
    return TaskInfo(
        id=task_id,
        uid=uid,
        name=name,
        group=group,
        group_id=group_id,
        priority=priority,
        status=TaskStatus.COMPLETED if cause is None else TaskStatus.CANCELLED,
        created_at=created_at,
        started_at=created_at,
        ended_at=ended_at,
        error_type=None,
        error=None,
        cause=cause,
        cancel_ignored=False,
        progress=None,
        metadata={},
        trace_id=trace_id,
        span_id=span_id,
        epoch=epoch,
    )


def without_frames(error: BaseException, seen: frozenset[int] = frozenset()) -> BaseException:
    """Copy an exception without its traceback, which would keep every frame of the task alive.

    The original is not changed: other code may hold it. One that cannot be copied is returned as it is.
    """
    try:
        copy = _copied(error)
    except Exception:
        return error
    cause = error.__cause__
    # The causes of an exception may form a cycle.
    known = cause is None or id(cause) in seen or cause is error
    copy.__cause__ = None if known or cause is None else without_frames(cause, seen | {id(error)})
    copy.__suppress_context__ = error.__suppress_context__
    return copy


def _copied(error: BaseException) -> BaseException:
    if isinstance(error, BaseExceptionGroup):
        return error.derive([without_frames(part) for part in error.exceptions])
    cls = type(error)
    # The nearest built-in class can construct itself again (errno and file name, the parts of a
    # UnicodeError). A class of the user's is not called: it may need arguments that the exception does not
    # keep.
    base: Any = next(
        parent for parent in cls.__mro__ if parent.__module__ == "builtins" and "__init__" in vars(parent)
    )
    _, arguments, *state = base.__reduce__(error)
    copy: BaseException = cls.__new__(cls, *arguments)
    vars(base)["__init__"](copy, *arguments)
    copy.__setstate__(*state or [None])
    for parent in cls.__mro__:
        for slot in parent.__dict__.get("__slots__", ()):
            if hasattr(error, slot):
                setattr(copy, slot, getattr(error, slot))
    return copy
