"""Search: the tasks of a class, the oldest tasks, those that match some words, and the ended ones.

It looks at many tasks, so it works in batches: the service's own work comes in between.
"""

from __future__ import annotations

import asyncio
import heapq
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

from otel_tasks import Overview, TaskNotFoundError
from otel_tasks._core.slices import COUNTS_PER_SLICE, ROWS_PER_SLICE, in_slices
from otel_tasks.live.feed import Encoded, array, assembled, encoded
from otel_tasks.live.params import BadRequest, Query
from otel_tasks.live.rows import ended_row, short_path, text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from otel_tasks import ManagedTask, TaskInfo, TaskNode
    from otel_tasks.live.feed import Feed

# Tasks whose names are read in one step.
NAMES_PER_STEP = 100
# Tasks that one search by line looks at.
MAX_LOOKS = 2000
# Ended tasks that are searched.
MAX_ENDED = 10_000

# A queued task is pending too.
_STATUS = {"queued": "pending"}
_FIRST = {"cancelling": 0, "pending": 1}

# Ties by id, so that the order is the same each time.
_SORT_KEYS: dict[str, Callable[[ManagedTask[Any]], tuple[Any, ...]]] = {
    "age": lambda task: (task.created_at, task.id),
    "-age": lambda task: (task.created_at, task.id),
    "name": lambda task: (task.name, task.created_at, task.id),
    "status": lambda task: (_FIRST.get(str(task.status), 2), task.created_at, task.id),
}


async def listed(feed: Feed, query: Query) -> str:
    """Answer a query, with JSON.

    Cancellation: ends the search.
    """
    answer = await (_ended(feed, query) if query.ended else _live(feed, query))
    stamp = {name: encoded(value) for name, value in feed.stamp().items()}
    return assembled({**stamp, **answer})


async def _live(feed: Feed, query: Query) -> Encoded:
    key = query.key or Overview.ROOT
    overview = await in_slices(feed.look({key: None}))
    tasks = overview.members[key]
    found: list[ManagedTask[Any]] = []
    for start in range(0, len(tasks), NAMES_PER_STEP):
        batch = tasks[start : start + NAMES_PER_STEP]
        found += [task for task in batch if _may_match(task, query, overview.now)]
        await asyncio.sleep(0)
    found, partial = await _looked_at(feed, found, query)
    start = offset(query.after)
    page = await _ordered(found, query.sort, start + query.limit)
    rows = await in_slices(feed.encoded_rows(page[start:]))
    return _answer(rows.values(), len(found), start + query.limit, partial=partial)


async def live_named(feed: Feed, name: str) -> list[ManagedTask[Any]]:
    """The live task with this uid or id, or those with this name in whichever groups they are, oldest first.

    Cancellation: ends the search.
    """
    with suppress(TaskNotFoundError):
        return [feed.manager.get_task(name)]
    overview = await in_slices(feed.look({Overview.ROOT: None}))
    tasks = overview.members[Overview.ROOT]
    found: list[ManagedTask[Any]] = []
    for start in range(0, len(tasks), NAMES_PER_STEP):
        found += [task for task in tasks[start : start + NAMES_PER_STEP] if task.name == name]
        await asyncio.sleep(0)
    return await _ordered([task for task in found if not task.done()], "age", len(found))


def _may_match(task: ManagedTask[Any], query: Query, now: float) -> bool:
    """True unless what is quickly known of a task rules it out."""
    if task.done():
        return False
    if query.status is not None and str(task.status) != _STATUS.get(query.status, query.status):
        return False
    cause = task.cause
    since = task.created_at
    if query.status == "cancelling" and cause is not None and cause.at is not None:
        since = cause.at
    return now - since >= query.min_age and (query.group_id is None or _is_in(task, query.group_id))


def _is_in(task: ManagedTask[Any], group_id: str) -> bool:
    group = task.group
    while True:
        if _is_called(group.id, group_id):
            return True
        if group.parent is None:
            return False
        group = group.parent


def _is_called(group_id: str, wanted: str) -> bool:
    """True if this is the id of the group, whole or as rows show it."""
    return group_id == wanted or text(group_id) == wanted


async def _looked_at(
    feed: Feed, tasks: list[ManagedTask[Any]], query: Query
) -> tuple[list[ManagedTask[Any]], bool]:
    """The tasks that match, by what only a look can tell too, and whether there were too many to look at."""
    every_needs_look = query.where is not None or query.status in ("queued", "pending")
    if not query.words and not every_needs_look:
        return tasks, False
    found: list[ManagedTask[Any]] = []
    looks: list[ManagedTask[Any]] = []
    for number, task in enumerate(tasks, 1):
        needs_look = every_needs_look or not _has_words(_names(task), query.words)
        (looks if needs_look else found).append(task)
        if number % NAMES_PER_STEP == 0:
            await asyncio.sleep(0)
    oldest = await _ordered(looks, "age", MAX_LOOKS)
    for start in range(0, len(oldest), ROWS_PER_SLICE):
        batch = [task for task in oldest[start : start + ROWS_PER_SLICE] if not task.done()]
        nodes = feed.manager.describe(batch)
        found += [task for task, node in zip(batch, nodes, strict=True) if _matches(task, node, query)]
        await asyncio.sleep(0)
    return found, len(looks) > MAX_LOOKS


def _matches(task: ManagedTask[Any], node: TaskNode, query: Query) -> bool:
    works = node.attempt or node
    line = "" if works.where is None else f"{short_path(works.where.file)}:{works.where.line}"
    status = "queued" if works.queued and node.cause is None else str(node.status)
    return (
        (query.status is None or status == query.status)
        and (query.where is None or line == query.where)
        and _has_words(f"{_names(task)} {line}".casefold(), query.words)
    )


def _names(task: ManagedTask[Any]) -> str:
    return f"{task.id} {task.group.id} {task.trace_id or ''}".casefold()


def _has_words(names: str, words: tuple[str, ...]) -> bool:
    return all(word in names for word in words)


async def _ordered(tasks: list[ManagedTask[Any]], sort: str, limit: int) -> list[ManagedTask[Any]]:
    """The first ``limit`` tasks in this order: batches are sorted, and merged as far as that."""
    key, descending = _SORT_KEYS[sort], sort == "-age"
    batches: list[list[tuple[Any, int]]] = []
    for start in range(0, len(tasks), NAMES_PER_STEP):
        batch = enumerate(tasks[start : start + NAMES_PER_STEP], start)
        # With the number, no tasks are compared.
        batches.append(sorted(((key(task), number) for number, task in batch), reverse=descending))
        await asyncio.sleep(0)
    merged = islice(heapq.merge(*batches, reverse=descending), limit)
    ordered: list[ManagedTask[Any]] = []
    while found := [tasks[number] for _, number in islice(merged, NAMES_PER_STEP)]:
        ordered += found
        await asyncio.sleep(0)
    return ordered


async def _ended(feed: Feed, query: Query) -> Encoded:
    if query.status is not None or query.where is not None:
        raise BadRequest("status and where are for live tasks")
    overview = feed.overview
    found: list[TaskInfo] = []
    infos = islice(feed.manager.iter_recent(), MAX_ENDED)
    while batch := list(islice(infos, COUNTS_PER_SLICE)):
        found += [
            info
            for info in batch
            if (query.group_id is None or _is_called(info.group_id, query.group_id))
            and (query.key is None or query.key in overview.keys_of(info))
            and _has_words(f"{info.id} {info.group_id} {info.trace_id or ''}".casefold(), query.words)
        ]
        await asyncio.sleep(0)
    start = offset(query.after)
    page = iter(found[start : start + query.limit])
    rows: list[str] = []
    while batch := list(islice(page, COUNTS_PER_SLICE)):
        rows += [encoded(ended_row(info, None, overview, feed.shown)) for info in batch]
        await asyncio.sleep(0)
    return _answer(rows, len(found), start + query.limit, partial=False)


def _answer(rows: Iterable[str], total: int, end: int, *, partial: bool) -> Encoded:
    return {
        "rows": array(rows),
        "total": encoded(total),
        "next": encoded(str(end) if end < total else None),
        "partial": encoded(partial),
    }


def offset(after: str | None) -> int:
    """The number of the first row of a page."""
    if after is None:
        return 0
    if not after.isdecimal() or len(after) > 9:
        raise BadRequest("after must be the next of the page before")
    return int(after)
