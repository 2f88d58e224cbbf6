"""Inspection: shows this process to the other nodes, and the other nodes to this process.

Rules, each with its own test:

1. All nodes are asked at the same time. A call returns when each has answered, or when the time is up, and
   names the silent nodes.
2. Rows are bounded, and the rest are counted.
3. A node answers in slices, and its event loop runs in between. It stops when the time of the question is up,
   when the fleet stops, and, for its own question, when the caller is cancelled. There is no pause between
   two slices, because someone waits for the answer.
4. Arguments, results, metadata, and the messages of exceptions do not leave the process.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Final, TypeVar

from otel_tasks._core.slices import COUNTS_PER_SLICE, TASKS_PER_SLICE, Budget, in_slices, smallest
from otel_tasks._core.targets import find_tasks, take_tree
from otel_tasks._core.task_tree import tree_data, tree_text
from otel_tasks._core.telemetry import quiet_context
from otel_tasks.fleet.entries import VIEW, InspectEntry
from otel_tasks.fleet.gathering import parts_of
from otel_tasks.fleet.nodes import Node, read_description
from otel_tasks.fleet.reports import FleetTree, TaskRows

if TYPE_CHECKING:
    from collections.abc import Coroutine, Generator

    from otel_tasks import TaskInfo, TaskManager
    from otel_tasks.fleet.bus import Entry
    from otel_tasks.fleet.gathering import Gathering, Question
    from otel_tasks.fleet.link import Link
    from otel_tasks.fleet.nodes import Presence

    Row = dict[str, Any]

T = TypeVar("T")

MAX_ROWS: Final = 2000
# Questions that may wait for their answers in one node; further ones get none.
MAX_ANSWERING: Final = 1000
_LIVE = frozenset({"pending", "running", "cancelling"})


class Inspector:
    """What one node shows, and what it sees.

    Args:
        manager: The manager that it shows.
        link: The link of this node.
        gathering: The questions of this node.
        presence: Its description of itself.
    """

    def __init__(self, manager: TaskManager, link: Link, gathering: Gathering, presence: Presence) -> None:
        self._manager = manager
        self._link = link
        self._gathering = gathering
        self._presence = presence
        self._listens = False
        self._answering: set[asyncio.Task[None]] = set()
        # One answer after another: the slices of many together would hold the loop.
        self._turn = asyncio.Lock()

    def listen(self) -> None:
        """Answer the questions of other nodes, and include this one in what it sees: it is a node."""
        self._listens = True
        self._link.subscribe(InspectEntry, self._on_entry)

    async def tasks(
        self, name: str | None, group: str | None, status: str | None, limit: int, timeout: float
    ) -> TaskRows:
        """Return the tasks of all nodes.

        Cancellation: ends the wait for the answers.
        """
        answers, question = await self._ask(
            "tasks", timeout, name=name, group=group, status=status, limit=limit
        )
        rows, more = await in_slices(_merged(answers, limit))
        return TaskRows(rows, more=more, silent=self._silent(answers, question))

    async def tree(self, limit: int, timeout: float) -> FleetTree:
        """Return the trees of all nodes.

        Cancellation: ends the wait for the answers.
        """
        answers, question = await self._ask("tree", timeout, limit=limit)
        return FleetTree(
            nodes={node: answer["tree"] for node, answer in answers.items() if _is_tree(answer)},
            drawings={node: answer["drawing"] for node, answer in answers.items() if _is_tree(answer)},
            silent=self._silent(answers, question),
        )

    async def nodes(self, timeout: float) -> list[Node]:
        """Return all nodes, including those that do not answer.

        Cancellation: ends the wait for the answers.
        """
        answers, question = await self._ask("nodes", timeout)
        found = [Node.read(node, answer, 0.0, silent=False) for node, answer in answers.items()]
        since = asyncio.get_running_loop().time() - question.roster_at
        for node, (description, age) in (question.roster or {}).items():
            if node not in answers:
                found.append(Node.read(node, read_description(description), age + since, silent=True))
        return sorted(found, key=lambda node: node.node)

    async def _ask(self, what: str, timeout: float, **filters: Any) -> tuple[dict[str, Row], Question]:
        with self._gathering.question() as question:
            entry = InspectEntry(
                node=self._link.node, request=question.request, what=what, timeout=timeout, **filters
            )
            posted = self._link.post(entry, must_arrive=False)
            own = self._show_here(entry, timeout) if self._listens else None
            try:
                await self._gathering.answers(question, posted, timeout)
                answers = await in_slices(question.data())
                shown = None if own is None else await own
            finally:
                if own is not None:
                    own.cancel()
            return ({} if shown is None else {self._link.node: shown}) | answers, question

    def _silent(self, answers: dict[str, Row], question: Question) -> tuple[str, ...]:
        """Return the nodes without an answer; this node is one if its slices took too long."""
        here = self._link.node
        if not self._listens or here in answers:
            return question.silent
        return tuple(sorted((here, *question.silent)))

    async def stop(self) -> None:
        """Give no more answers.

        Cancellation: ends the wait for the last ones.
        """
        for task in self._answering:
            task.cancel()
        if self._answering:
            await asyncio.wait(self._answering)

    # -- here -----------------------------------------------------------------------------------

    def _on_entry(self, entry: InspectEntry, at: Entry) -> None:
        # Nobody waits for an answer to an old question. A node that starts reads those of the last hour.
        left = (entry.timeout or 0.0) - at.age
        if entry.what == VIEW or entry.node == self._link.node or left <= 0:
            return
        if len(self._answering) < MAX_ANSWERING:
            answering = _start(self._answer(entry, left))
            self._answering.add(answering)
            answering.add_done_callback(self._answering.discard)

    def _show_here(self, entry: InspectEntry, timeout: float) -> asyncio.Task[Row | None]:
        """Start the own answer; its result is None if the time is up."""

        async def show() -> Row | None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout), self._turn:
                    return await in_slices(self._shown(entry))
            return None

        return _start(show())

    async def _answer(self, entry: InspectEntry, left: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left), self._turn:
                await in_slices(self._send(entry))

    def _send(self, entry: InspectEntry) -> Generator[None, None, None]:
        data = yield from self._shown(entry)
        parts = yield from parts_of(data, self._link.node, entry.request)
        for part in parts:
            self._link.post_to(entry.node, part)
            yield

    def _shown(self, entry: InspectEntry) -> Generator[None, None, Row]:
        limit = max(1, min(entry.limit or MAX_ROWS, MAX_ROWS))
        if entry.what == "tasks":
            found = yield from find_tasks(self._manager, entry.name, entry.group, entry.status, limit)
            rows: list[Row] = []
            for start in range(0, len(found.infos), COUNTS_PER_SLICE):
                rows += map(_row, found.infos[start : start + COUNTS_PER_SLICE])
                yield
            return {"rows": rows, "more": found.more}
        if entry.what == "tree":
            tree = yield from take_tree(self._manager, limit)
            data = yield from tree_data(tree)
            return {"tree": data, "drawing": (yield from tree_text(tree))}
        # This also answers questions of a later version: a node that answers is not silent.
        return self._presence.describe()


def _merged(answers: dict[str, Row], limit: int) -> Generator[None, None, tuple[list[Row], int]]:
    """Merge the rows of all nodes, in slices; return them, and how many further tasks match."""
    live: list[Row] = []
    ended: list[Row] = []
    more = sum(_count(answer.get("more")) for answer in answers.values())
    budget = Budget(TASKS_PER_SLICE)
    for node, answer in answers.items():
        for row in _dicts(answer.get("rows"))[:limit]:
            (live if row.get("status") in _LIVE else ended).append({"node": node, **row})
            if budget.spend():
                yield
    # The hosts' clocks decide the order, which is good enough for a list.
    rows = yield from smallest(live, limit, lambda row: str(row.get("created_at")))
    rows += yield from smallest(ended, limit - len(rows), lambda row: str(row.get("ended_at")), reverse=True)
    return rows, more + len(live) + len(ended) - len(rows)


def _start(coro: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    return asyncio.get_running_loop().create_task(
        coro,
        name="otel_tasks.fleet.inspect",
        # It does not belong to the request or the span that is current here.
        context=quiet_context(),
    )


def _row(info: TaskInfo) -> Row:
    return {**info.to_dict(), "metadata": {}, "error": None}


def _dicts(values: object) -> list[Row]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _is_tree(answer: Row) -> bool:
    return isinstance(answer.get("tree"), dict) and isinstance(answer.get("drawing"), str)


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0
