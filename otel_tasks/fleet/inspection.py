"""Inspection: shows this process to the other nodes, and the other nodes to this process.

Rules, each with its own test:

1. All nodes are asked at the same time. A call returns when each has answered, or when the time is up, and
   names the silent nodes.
2. Rows are bounded, and the rest are counted.
3. Arguments, results, metadata, and the messages of exceptions do not leave the process.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from otel_tasks._core.targets import find_tasks
from otel_tasks.fleet.entries import VIEW, InspectEntry
from otel_tasks.fleet.gathering import parts_of
from otel_tasks.fleet.nodes import Node, read_description
from otel_tasks.fleet.reports import FleetTree, TaskRows

if TYPE_CHECKING:
    from otel_tasks import TaskInfo, TaskManager
    from otel_tasks.fleet.bus import Entry
    from otel_tasks.fleet.gathering import Gathering, Question
    from otel_tasks.fleet.link import Link
    from otel_tasks.fleet.nodes import Presence

    Row = dict[str, Any]

MAX_ROWS: Final = 2000
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
        rows = [
            {"node": node, **row}
            for node, answer in answers.items()
            for row in _dicts(answer.get("rows"))[:limit]
        ]
        # The hosts' clocks decide the order, which is good enough for a list.
        live = [row for row in rows if row.get("status") in _LIVE]
        ended = [row for row in rows if row.get("status") not in _LIVE]
        live.sort(key=lambda row: str(row.get("created_at")))
        ended.sort(key=lambda row: str(row.get("ended_at")), reverse=True)
        more = sum(_count(answer.get("more")) for answer in answers.values())
        return TaskRows(
            [*live, *ended][:limit], more=more + max(0, len(rows) - limit), silent=question.silent
        )

    async def tree(self, limit: int, timeout: float) -> FleetTree:
        """Return the trees of all nodes.

        Cancellation: ends the wait for the answers.
        """
        answers, question = await self._ask("tree", timeout, limit=limit)
        return FleetTree(
            nodes={node: answer["tree"] for node, answer in answers.items() if _is_tree(answer)},
            drawings={node: answer["drawing"] for node, answer in answers.items() if _is_tree(answer)},
            silent=question.silent,
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
            own = {self._link.node: self._shown(entry)} if self._listens else {}
            await self._gathering.answers(question, posted, timeout)
            return {**own, **question.data()}, question

    # -- here -----------------------------------------------------------------------------------

    def _on_entry(self, entry: InspectEntry, at: Entry) -> None:
        # Nobody waits for an answer to an old question. A node that starts reads those of the last hour.
        if entry.what == VIEW:
            return
        if entry.node != self._link.node and at.age < (entry.timeout or 0.0):
            for part in parts_of(self._shown(entry), self._link.node, entry.request):
                self._link.post_to(entry.node, part)

    def _shown(self, entry: InspectEntry) -> Row:
        limit = max(1, min(entry.limit or MAX_ROWS, MAX_ROWS))
        if entry.what == "tasks":
            found = find_tasks(self._manager, entry.name, entry.group, entry.status, limit)
            return {"rows": [_row(info) for info in found.infos], "more": found.more}
        if entry.what == "tree":
            tree = self._manager.tree(limit=limit)
            return {"tree": tree.to_dict(), "drawing": str(tree)}
        # This also answers questions of a later version: a node that answers is not silent.
        return self._presence.describe()


def _row(info: TaskInfo) -> Row:
    return {**info.to_dict(), "metadata": {}, "error": None}


def _dicts(values: object) -> list[Row]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _is_tree(answer: Row) -> bool:
    return isinstance(answer.get("tree"), dict) and isinstance(answer.get("drawing"), str)


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0
