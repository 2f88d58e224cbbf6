"""Elsewhere: answers of the endpoints that are about tasks of other nodes of a fleet."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from otel_tasks._core.slices import NAMES_PER_SLICE, ROWS_PER_SLICE, in_slices, smallest
from otel_tasks.fleet import BusUnavailableError
from otel_tasks.fleet.json_slices import decoded
from otel_tasks.live.feed import array, assembled, encoded
from otel_tasks.live.guard import Refused
from otel_tasks.live.marks import is_marked, is_named, marked
from otel_tasks.live.params import MAX_ROWS
from otel_tasks.live.rows import Row, trace_link_of
from otel_tasks.live.search import listed, offset

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from otel_tasks import ManagedTask
    from otel_tasks.fleet import Fleet
    from otel_tasks.live.feed import Feed
    from otel_tasks.live.other import Other
    from otel_tasks.live.others import Others
    from otel_tasks.live.params import Query

# The texts of a row of a list, and those of a task.
_ROW_TEXTS: Final = ("name", "status", "task_id")
_TASK_TEXTS: Final = (*_ROW_TEXTS, "id", "group_id", "priority")
# Nodes that an error names.
LISTED: Final = 5
_FIRST: Final = {"cancelling": 0, "queued": 1, "pending": 1}
_ORDERS: Final[dict[str, Callable[[Row], tuple[Any, ...]]]] = {
    "ended": lambda row: (-row["ended"],),
    "age": lambda row: (row["created"], row["task_id"]),
    "-age": lambda row: (-row["created"], row["task_id"]),
    "name": lambda row: (row["name"], row["created"], row["task_id"]),
    "status": lambda row: (_FIRST.get(row["status"], 2), row["created"], row["task_id"]),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteTask:
    """A task of another process of the fleet, as ``can`` gets it. Its metadata stays in that process.

    Attributes:
        node: The process, by its name in the fleet.
        uid: Its uid there.
        id: Its id there.
        name: Its name.
        group_id: The id of its group.
        priority: The name of its priority.
        status: Its status.

    Example:
        >>> def can(request, action, task):
        ...     return task.name.startswith("import")
    """

    node: str
    uid: str
    id: str
    name: str
    group_id: str
    priority: str
    status: str


async def found_there(
    others: Others, feed: Feed, name: str, node: str | None = None
) -> tuple[Row, RemoteTask | None]:
    """The details of a task of another node, and the task itself if it is live.

    Args:
        others: The other nodes.
        feed: The feed of this node.
        name: The id of the task in this view.
        node: The name, the host, or the host and process that its node must have; None for any.

    Raises:
        Refused: No node has this task, its node does not answer, or it is another one than ``node``.

    Cancellation: ends the wait.
    """
    asked = others.asked(name)
    if asked is None:
        raise _not_found(f"no node of the fleet has the task {name[:80]!r}", feed)
    other, uid = asked
    if node is not None and not is_named(other.node, node):
        raise _not_found(f"the task {name[:80]!r} is on node {other.node}, not on {node!r}", feed)
    details = _readable(await others.answer(other, "task", [["task", uid]]))
    if details is None:
        raise Refused(503, "silent", f"node {other.node} does not answer", {"Retry-After": "5"})
    if details.get("state") not in ("live", "ended"):
        raise _not_found(f"node {other.node} has no task with the id {uid[:80]!r}, or has forgotten it", feed)
    task = details["task"]
    details["trace_url"] = _trace_link(task, feed)
    return details, None if details["state"] == "ended" else _remote(other, task)


def _remote(other: Other, task: Row) -> RemoteTask:
    return RemoteTask(
        node=other.node,
        uid=task["id"].removeprefix(marked(other.mark, "")),
        id=task["task_id"],
        name=task["name"],
        group_id=task["group_id"],
        priority=task["priority"],
        status=task["status"],
    )


@dataclass(slots=True)
class Namesakes:
    """The tasks of other nodes that have one name.

    Attributes:
        is_here: True if this process is searched, too.
        count: How many of them are live.
        nodes: The nodes of the live ones, each as ``host/pid``.
        first: The id of a live one.
        live: The details of a live one, and the task, if its node has no other one.
        ended: The details of the one that ended last.
        silent: The nodes that have not answered, and may have such a task, too.
        not_asked: How many nodes were not asked, because the fleet has too many.
    """

    is_here: bool = True
    count: int = 0
    nodes: list[str] = field(default_factory=list)
    first: str | None = None
    live: tuple[Row, RemoteTask] | None = None
    ended: Row | None = None
    silent: list[str] = field(default_factory=list)
    not_asked: int = 0

    def take(self, other: Other, details: Row, feed: Feed) -> None:
        """Take the answer of a node."""
        state, task = details.get("state"), details.get("task", {})
        if state in ("live", "ended"):
            details["trace_url"] = _trace_link(task, feed)
        if state == "ended" and (self.ended is None or self.ended["task"]["ended"] < task["ended"]):
            self.ended = details
        if state in ("live", "several"):
            self.count += 1 if state == "live" else _number(details.get("count"))
            self.nodes.append(_short(other.node))
            self.first = self.first or task["id"]
        if state == "live":
            self.live = details, _remote(other, task)

    def unheard(self) -> Row:
        """What an answer says of the nodes that may have such a task, too."""
        found = {"silent": self.silent, "not_asked": self.not_asked}
        return {name: value for name, value in found.items() if value}


async def namesakes(others: Others, feed: Feed, name: str, node: str | None) -> Namesakes:
    """Ask the other nodes for a task by its id there, or by its name.

    Args:
        others: The other nodes.
        feed: The feed of this node.
        name: The name or the id.
        node: The name, the host, or the host and process of the nodes that are asked; None for all.

    Raises:
        Refused: No node is called ``node``.

    Cancellation: ends the wait.
    """
    asked = others.named(node)
    is_here = node is None or (feed.shown.node is not None and is_named(feed.shown.node, node))
    if not asked and not is_here:
        raise _not_found(f"no node is called {node!r}: {_names_of(others, feed)}", feed)
    answers = [
        _readable(answer)
        for answer in await asyncio.gather(
            *(others.answer(other, "task", [["task", name]]) for other in asked)
        )
    ]
    # One process is either asked or unknown.
    not_asked = 0 if node is not None and "/" in node else others.left_out
    found = Namesakes(is_here=is_here, silent=_silent(asked, answers), not_asked=not_asked)
    for other, details in zip(asked, answers, strict=True):
        if details is not None:
            found.take(other, details, feed)
    return found


def several(name: str, here: Sequence[ManagedTask[Any]], there: Namesakes, feed: Feed) -> Refused:
    """The refusal of a name that several live tasks have: none of them is chosen."""
    count = len(here) + there.count
    first = here[0].uid if here else there.first
    own = [] if not here or feed.shown.node is None else [_short(feed.shown.node)]
    nodes = [*own, *there.nodes]
    if len(nodes) > 1:
        which = f", on {_listed(nodes)}: choose a node, or use the id of one, such as {first!r}"
    else:
        on = f" on {nodes[0]}" if nodes else ""
        which = f"{on}: use the id of one, such as {first!r}{', the oldest' if here else ''}"
    return _not_found(f"{count} live tasks have the name {name[:80]!r}{which}", feed)


def _names_of(others: Others, feed: Feed) -> str:
    own = [] if feed.shown.node is None else [feed.shown.node]
    names = [*own, *(other.node for other in others.named(None))]
    return f"the nodes are {_listed([_short(name) for name in names])}"


def _listed(nodes: Sequence[str]) -> str:
    more = len(nodes) - LISTED
    return ", ".join(nodes[:LISTED]) + (f", and {more} more" if more > 0 else "")


def _short(node: str) -> str:
    """A node as people call it: its host and its process."""
    return node.rpartition("/")[0]


def state_of(details: Row) -> Row:
    """What the answer to a cancellation says of its task."""
    return {"state": details["state"], "task": details["task"]}


async def listed_everywhere(
    others: Others, feed: Feed, wanted: Query, pairs: Sequence[tuple[str, str]], node: str | None
) -> str:
    """Answer a query with the tasks of all nodes, or of some.

    Args:
        others: The other nodes.
        feed: The feed of this node.
        wanted: The query.
        pairs: The same as parameters.
        node: The name, the host, or the host and process of the nodes that are asked; None for all.

    Cancellation: ends the search.
    """
    start = offset(wanted.after)
    end = min(MAX_ROWS, start + wanted.limit)
    asked = _asked(others, wanted.key, node)
    is_here = _is_asked_here(wanted.key, others, node)
    params = _params(pairs, wanted.key, others, end)
    answers = await asyncio.gather(
        *([_listed_here(feed, replace(wanted, after=None, limit=end))] if is_here else []),
        *(others.answer(other, "tasks", params) for other in asked),
    )
    silent = _silent(asked, answers[is_here:])
    answered = [answer for answer in answers if answer is not None and isinstance(answer.get("rows"), list)]
    rows = (await in_slices(_ordered(answered, wanted, end)))[start:]
    shown: list[str] = []
    for first in range(0, len(rows), ROWS_PER_SLICE):
        shown += map(encoded, rows[first : first + ROWS_PER_SLICE])
        await asyncio.sleep(0)
    total = sum(_number(answer.get("total")) for answer in answered)
    following = start + wanted.limit
    facts = {
        **feed.stamp(),
        "total": total,
        # Beyond that, each node has its own pages.
        "next": str(following) if following < min(total, MAX_ROWS) else None,
        "partial": any(bool(answer.get("partial")) for answer in answered),
        "silent": silent,
    }
    return assembled({**{name: encoded(value) for name, value in facts.items()}, "rows": array(shown)})


async def _listed_here(feed: Feed, wanted: Query) -> Row:
    answer: Row = await in_slices(decoded(await listed(feed, wanted)))
    return answer


def _asked(others: Others, key: str | None, node: str | None) -> list[Other]:
    """The other nodes that are asked: those that are named, or the one that has the row."""
    found = others.named(node)
    if key is None:
        return found
    owner = others.asked(key)
    return [other for other in found if owner is not None and other is owner[0]]


def _is_asked_here(key: str | None, others: Others, node: str | None) -> bool:
    return (node is None or is_named(others.node, node)) and (key is None or not is_marked(key))


def _params(pairs: Sequence[tuple[str, str]], key: str | None, others: Others, limit: int) -> list[list[str]]:
    """The parameters of a query, for the nodes that are asked."""
    owner = None if key is None else others.asked(key)
    own = [["key", owner[1]]] if owner is not None else []
    kept = [[name, value] for name, value in pairs if name not in ("after", "key", "limit", "node")]
    return [*kept, *own, ["limit", str(limit)]]


def _silent(asked: Sequence[Other], answers: Sequence[Row | None]) -> list[str]:
    return [other.node for other, answer in zip(asked, answers, strict=True) if answer is None]


# -- what other nodes send, which may be anything --------------------------------------------------


def _readable(details: Row | None) -> Row | None:
    """Return the details of a task; None if their form is not that of this version."""
    task: Any = None if details is None else details.get("task")
    match None if details is None else details.get("state"):
        case "live":
            is_readable = _is_row(task, ended=False, texts=_TASK_TEXTS) and _has_cause(task)
        case "ended":
            is_readable = _is_row(task, ended=True) and _has_cause(task)
        case "several":
            is_readable = isinstance(task, dict) and isinstance(task.get("id"), str)
        case _:
            is_readable = True
    return details if is_readable else None


def _has_cause(task: Row) -> bool:
    """Return whether its cause is one, or it has none."""
    cause = task.get("cause")
    return cause is None or (isinstance(cause, dict) and "kind" in cause)


def _is_row(row: Any, *, ended: bool, texts: tuple[str, ...] = _ROW_TEXTS) -> bool:
    return (
        isinstance(row, dict)
        and all(isinstance(row.get(name), str) for name in texts)
        and isinstance(row.get("created"), int | float)
        and (not ended or isinstance(row.get("ended"), int | float))
    )


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _ordered(answers: Sequence[Row], wanted: Query, limit: int) -> Generator[None, None, list[Row]]:
    rows: list[Row] = []
    for answer in answers:
        for start in range(0, len(answer["rows"]), NAMES_PER_SLICE):
            batch = answer["rows"][start : start + NAMES_PER_SLICE]
            rows += [row for row in batch if _is_row(row, ended=bool(wanted.ended))]
            yield
    return (yield from smallest(rows, limit, _ORDERS["ended" if wanted.ended else wanted.sort]))


async def cancelled_there(
    fleet: Fleet, task: RemoteTask, reason: str | None, asked_by: str, timeout: float
) -> str:
    """Cancel a task of another node: ``"cancelled"``, ``"requested"``, or ``"ended"``.

    Raises:
        Refused: The node does not answer, or the bus does not; the task is cancelled when they do.

    Cancellation: ends the wait; the cancellation stays sent.
    """
    try:
        report = await fleet.cancel_task(task.uid, reason, timeout=timeout, asked_by=asked_by, node=task.node)
    except BusUnavailableError as error:
        raise Refused(504, "silent", str(error)) from None
    if report.silent:
        message = f"node {task.node} does not answer; it cancels the task as soon as it reads this"
        raise Refused(504, "silent", message)
    if report.still_running:
        return "requested"
    return "cancelled" if report.ended else "ended"


def _not_found(message: str, feed: Feed) -> Refused:
    return Refused(404, "not_found", message, {"Otel-Tasks-Instance": feed.instance})


def _trace_link(task: Row, feed: Feed) -> str | None:
    cause = task.get("cause")
    return trace_link_of(task.get("trace_id"), None if cause is None else cause["kind"], feed.shown)
