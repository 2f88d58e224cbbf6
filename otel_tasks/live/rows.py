"""The rows of the feed: tasks, groups, and classes as JSON-ready data.

What a row may show is decided here, once: never arguments, results, locals, or source text; an error's text
and metadata only where the options say so.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from otel_tasks import CancelKind

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from otel_tasks import (
        CancelCause,
        ClassRow,
        Counted,
        GroupRow,
        Location,
        ManagedTask,
        Overview,
        Progress,
        TaskInfo,
        TaskNode,
    )

Row = dict[str, Any]

MAX_TEXT = 120
_INSTALLED = re.compile(r".*[/\\](?:site|dist)-packages[/\\]")
_STANDARD_LIBRARY = os.path.join(os.path.dirname(os.__file__), "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What a view shows of a task beyond its name and its state.

    Attributes:
        errors: The texts of exceptions.
        metadata: The keys of metadata.
        trace_url: The link to a trace, with ``{trace_id}`` in it; None for no link.
        node: The node of a fleet that shows it; None without a fleet, and for an observer of one.
        namespace: The name of that fleet; None without one.
    """

    errors: bool = False
    metadata: Collection[str] = ()
    trace_url: str | None = None
    node: str | None = None
    namespace: str | None = None


def text(value: str) -> str:
    """Cut a text that may come from a client."""
    return value if len(value) <= MAX_TEXT else value[:MAX_TEXT] + "…"


def seconds(time: float | None) -> float | None:
    """Round a time to milliseconds."""
    return None if time is None else round(time, 3)


def group_row(row: GroupRow) -> Row:
    """A group of the overview."""
    return {
        "key": row.key,
        "parent": row.parent,
        "name": text(row.name),
        "kind": "root" if row.parent is None else row.kind,
        "instances": row.instances,
        "group_id": None if row.group_id is None else text(row.group_id),
        "limit": row.max_concurrency,
        **_counted(row.tasks),
    }


def class_row(row: ClassRow, only: Row | None) -> Row:
    """A class of the overview.

    Args:
        row: The class.
        only: Its only task, as a row.
    """
    return {
        "key": row.key,
        "group": row.group,
        "name": text(row.name),
        "kind": row.kind,
        **_counted(row.tasks),
        "task": only,
    }


def task_row(task: ManagedTask[Any], node: TaskNode, overview: Overview, shown: Shown) -> Row:
    """A live task.

    Args:
        task: The task.
        node: What the manager says of it.
        overview: An overview, of the same moment.
        shown: What the view shows.
    """
    # A service waits for its attempt: that is what runs.
    works = node.attempt or node
    group, cls = overview.keys_of(task)
    now = overview.now
    row = {
        "id": task.uid,
        "task_id": text(node.id),
        "name": text(node.name),
        "kind": works.kind if node.attempt is None else node.kind,
        "group": group,
        "class": cls,
        "group_id": text(task.group.id),
        "priority": node.priority.name,
        "status": "queued" if works.queued and node.cause is None else str(node.status),
        "created": seconds(task.created_at),
        "cancel_requested": None if node.cause is None else seconds(node.cause.at),
        "cause": cause_row(node.cause, shown),
        "where": location(works.where),
        "calls": None if works.calls is None else text(works.calls),
        "awaits": None if works.awaits is None else text(works.awaits),
        "queue_position": works.queue_position,
        "progress": _progress(works.progress),
        "attempt": works.attempt_number,
        # Whole seconds: they are measured again in each look, and a row that differs is sent again.
        "retry_at": None if works.retry_in is None else round(now + works.retry_in),
        "next_run": None if node.next_run_in is None else round(now + node.next_run_in),
        "consumer": None if node.consumer is None else node.consumer.to_dict(),
        "trace_id": works.trace_id,
        "span_id": works.span_id,
        "node": shown.node,
    }
    return {key: value for key, value in row.items() if value is not None}


def ended_row(info: TaskInfo, number: int | None, overview: Overview, shown: Shown) -> Row:
    """A task that has ended.

    Args:
        info: Its record.
        number: Its number among the ended tasks of the feed; None for one that the feed has not seen end.
        overview: An overview of now.
        shown: What the view shows.
    """
    group, cls = overview.keys_of(info)
    row = {
        "n": number,
        "id": info.uid,
        "task_id": text(info.id),
        "name": text(info.name),
        "group": group,
        "class": cls,
        "group_id": text(info.group_id),
        "priority": info.priority.name,
        "status": str(info.status),
        "cancel_ignored": info.cancel_ignored or None,
        "created": seconds(info.created_at),
        "started": seconds(info.started_at),
        "ended": seconds(info.ended_at),
        "cause": cause_row(info.cause, shown),
        "error_type": None if info.error_type is None else text(info.error_type),
        "error": text(info.error) if shown.errors and info.error else None,
        "progress": _progress(info.progress),
        "trace_id": info.trace_id,
        "span_id": info.span_id,
        "node": shown.node,
    }
    return {key: value for key, value in row.items() if value is not None}


def cause_row(cause: CancelCause | None, shown: Shown) -> Row | None:
    """Why a task was cancelled, without the text of another task's exception."""
    if cause is None:
        return None
    data = cause.to_dict()
    hidden = cause.kind is CancelKind.SIBLING_FAILED and not shown.errors
    data["message"] = None if hidden or cause.message is None else text(cause.message)
    data["asked_by"] = None if cause.asked_by is None else text(cause.asked_by)
    data["at"] = seconds(cause.at)
    return {key: value for key, value in data.items() if value is not None}


def location(where: Location | None) -> Row | None:
    """A line of code, with a path that does not show where the service is installed."""
    if where is None:
        return None
    return {"file": short_path(where.file), "line": where.line, "function": text(where.function)}


def short_path(path: str) -> str:
    """A path relative to the working directory, to the libraries, or to the standard library."""
    try:
        return _short_path(path, os.getcwd())
    except OSError:
        # The directory is gone.
        return os.path.basename(path)


@lru_cache(maxsize=4096)
def _short_path(path: str, working_directory: str) -> str:
    path = _INSTALLED.sub("", path).removeprefix(_STANDARD_LIBRARY)
    path = path.removeprefix(os.path.join(working_directory, ""))
    # Anything else: the file and its folder.
    return path if not os.path.isabs(path) else os.path.join(*path.replace("\\", "/").split("/")[-2:])


def metadata_row(metadata: Mapping[str, Any], shown: Shown) -> dict[str, str]:
    """The metadata that the view shows, as text."""
    return {key: text(_str(metadata[key])) for key in shown.metadata if key in metadata}


def _str(value: object) -> str:
    """A value as text. An object of the service that cannot show itself must not end the feed."""
    try:
        return str(value)
    except Exception as error:
        return f"<{type(value).__name__} without text: {type(error).__name__}>"


def trace_link(trace_id: str | None, cause: CancelCause | None, shown: Shown) -> str | None:
    """The link to a task's trace; of a cancelled task, Jaeger marks the spans with its cause."""
    return trace_link_of(trace_id, None if cause is None else cause.kind, shown)


def trace_link_of(trace_id: str | None, cause_kind: str | None, shown: Shown) -> str | None:
    """As ``trace_link``, of a task of which there is only a row."""
    if shown.trace_url is None or trace_id is None:
        return None
    url = shown.trace_url.replace("{trace_id}", trace_id)
    if cause_kind is None:
        return url
    return f"{url}{'&' if '?' in url else '?'}uiFind={cause_kind}"


def _counted(counted: Counted) -> Row:
    progress = counted.progress
    return {
        "count": counted.count,
        "queued": counted.queued,
        "cancelling": counted.cancelling,
        "p50": seconds(counted.p50),
        "p90": seconds(counted.p90),
        "oldest": seconds(counted.oldest),
        "progress": None
        if progress is None
        else {
            "done": _bounded(progress.done),
            "total": None if progress.total is None else _bounded(progress.total),
            "reporting": progress.reporting,
        },
    }


def _bounded(number: float) -> float:
    """A sum as a number of JSON: it has no infinity, and a browser refuses an answer with one as a whole."""
    return min(number, sys.float_info.max)


def _progress(progress: Progress | None) -> Row | None:
    if progress is None:
        return None
    left = progress.seconds_left
    return {
        "done": progress.done,
        "total": progress.total,
        "fraction": progress.fraction,
        "message": None if progress.message is None else text(progress.message),
        "seconds_left": None if left is None else round(left, 1),
        "at": seconds(progress.updated_at),
    }
