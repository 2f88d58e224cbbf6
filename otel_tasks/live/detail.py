"""Everything about one task, as JSON-ready data: what the panel shows."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from otel_tasks import ManagedTask, TaskStatus
from otel_tasks._core.slices import COUNTS_PER_SLICE, ROWS_PER_SLICE
from otel_tasks.live.rows import (
    Row,
    cause_row,
    ended_row,
    location,
    metadata_row,
    seconds,
    task_row,
    text,
    trace_link,
)

if TYPE_CHECKING:
    from collections.abc import Generator

    from otel_tasks import CancelCause, TaskDetails, TaskInfo, TaskPlace
    from otel_tasks.live.feed import Feed

MAX_FRAMES = 30
MAX_WAITERS = 20
MAX_SIBLINGS = 20
# The records in which ended siblings are searched.
SEARCHED = 1000


def live_detail(feed: Feed, task: ManagedTask[Any]) -> Generator[None, None, Row]:
    """A live task, in slices."""
    details = feed.manager.details(task)
    row = task_row(task, details.node, feed.overview, feed.shown)
    siblings = yield from _siblings(feed, task.group.id, task)
    return {
        "state": "live",
        "task": row,
        "path": [text(name) for name in details.path],
        "frames": [{**(location(line) or {}), "own": own} for line, own in details.frames[:MAX_FRAMES]],
        "awaited": None if details.awaited is None else _other(details.awaited),
        "waiters": [_other(waiter) for waiter in details.waiters[:MAX_WAITERS]],
        "cause_chain": _chain(feed, task.name, details.node.cause, details, None),
        "siblings": siblings,
        "children": details.children,
        "metadata": metadata_row(task.metadata, feed.shown) if feed.shown.metadata else {},
        "trace_url": trace_link(details.node.trace_id, details.node.cause, feed.shown),
    }


def ended_detail(feed: Feed, info: TaskInfo) -> Generator[None, None, Row]:
    """A task that has ended, and that the manager remembers, in slices."""
    siblings = yield from _siblings(feed, info.group_id, None, info)
    return {
        "state": "ended",
        "task": ended_row(info, None, feed.overview, feed.shown),
        "path": [text(feed.manager.name), text(info.group_id), text(info.name)],
        "frames": [],
        "awaited": None,
        "waiters": [],
        "cause_chain": _chain(feed, info.name, info.cause, None, info),
        "siblings": siblings,
        "children": 0,
        "metadata": metadata_row(info.metadata, feed.shown),
        "trace_url": trace_link(info.trace_id, info.cause, feed.shown),
    }


def ended_or_forgotten(feed: Feed, uid: str) -> Generator[None, None, Row]:
    """A task that is live no more, in slices; of one that the manager has forgotten, the id alone."""
    info = feed.manager.get_task_info(uid)
    if info is None:
        return {"state": "forgotten", "task": {"id": uid}}
    return (yield from ended_detail(feed, info))


def _other(place: TaskPlace) -> Row:
    """A task on the other end of an await."""
    task = place.task
    uid, task_id = (task.uid, text(task.id)) if isinstance(task, ManagedTask) else (None, None)
    return {
        "id": uid,
        "name": text(task.get_name()),
        "task_id": task_id,
        "function": text(place.function),
        "where": location(place.where),
    }


def _chain(
    feed: Feed, name: str, cause: CancelCause | None, details: TaskDetails | None, ended: TaskInfo | None
) -> list[Row]:
    """How a cancellation came about: its cause, the groups that it came through, and the task."""
    if cause is None:
        return []
    shown = cause_row(cause, feed.shown) or {}
    steps: list[Row] = [
        {
            "step": "cause",
            "kind": shown.get("kind"),
            "name": shown.get("asked_by"),
            "message": shown.get("message"),
            "at": shown.get("at"),
        }
    ]
    groups = () if details is None else details.cancelled_groups
    steps += [
        {"step": "group", "name": text(group), "at": seconds(other.at)}
        for group, other in groups
        if other.kind is cause.kind
    ]
    end = None if ended is None else seconds(ended.ended_at)
    return [*steps, {"step": "task", "name": text(name), "at": seconds(cause.at), "ended": end}]


def _siblings(
    feed: Feed, group_id: str, task: ManagedTask[Any] | None, info: TaskInfo | None = None
) -> Generator[None, None, Row]:
    """The other tasks of the same group."""
    live = [] if task is None else [other for other in task.group.tasks if other is not task]
    infos = islice(feed.manager.iter_recent(group_id=group_id), SEARCHED)
    counts = {str(status): 0 for status in TaskStatus if status.is_final}
    ended: list[TaskInfo] = []
    yield
    while batch := list(islice(infos, COUNTS_PER_SLICE)):
        others = [other for other in batch if info is None or not _is_same(other, info)]
        for other in others:
            counts[str(other.status)] += 1
        ended += others[: MAX_SIBLINGS - len(ended)]
        yield
    overview = feed.overview
    ended_rows = [ended_row(other, None, overview, feed.shown) for other in ended]
    yield
    rows: list[Row] = []
    for start in range(0, MAX_SIBLINGS, ROWS_PER_SLICE):
        rows += feed.rows(live[start : min(start + ROWS_PER_SLICE, MAX_SIBLINGS)])
        yield
    return {"live": len(live), "ended": counts, "rows": rows, "ended_rows": ended_rows}


def _is_same(info: TaskInfo, other: TaskInfo) -> bool:
    return (info.id, info.created_at, info.ended_at) == (other.id, other.created_at, other.ended_at)
