"""Views: shows this process to the live views of other nodes, and those nodes to its own live view.

Rules, each with its own test:

1. A node that no view asks does nothing and loads nothing.
2. A view asks each node separately, through its inbox: the log is for cancellations.
3. Metadata and the messages of exceptions do not leave the process.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from otel_tasks._core.slices import one_turn
from otel_tasks._core.telemetry import quiet_context
from otel_tasks.fleet.bus import BusUnavailableError
from otel_tasks.fleet.entries import VIEW, InspectEntry
from otel_tasks.fleet.gathering import MAX_PARTS, PART, text_parts
from otel_tasks.fleet.nodes import Node, read_description

if TYPE_CHECKING:
    from otel_tasks import TaskManager
    from otel_tasks.fleet.bus import Entry
    from otel_tasks.fleet.gathering import Gathering
    from otel_tasks.fleet.link import Link
    from otel_tasks.live.served import Served

# Questions that one node answers at a time; further ones get no answer.
MAX_ANSWERING: Final = 100


class Views:
    """What live views show of the processes of a fleet, in both directions.

    Args:
        manager: The manager of this node.
        link: The link of this node.
        gathering: The questions of this node.
    """

    def __init__(self, manager: TaskManager, link: Link, gathering: Gathering) -> None:
        self._manager = manager
        self._link = link
        self._gathering = gathering
        self._answering: set[asyncio.Task[None]] = set()
        self._served: Served | None = None

    def listen(self) -> None:
        """Answer the views of other nodes: this process is a node, not an observer."""
        self._link.subscribe(InspectEntry, self._on_entry)

    async def ask(self, node: str, data: dict[str, Any], timeout: float) -> dict[str, Any] | None:
        """Ask another node for the data of its view.

        Args:
            node: The node.
            data: The part, as ``Served`` defines it.
            timeout: Seconds to wait.

        Returns:
            The answer; None if it does not come in this time.

        Cancellation: ends the wait.
        """
        with self._gathering.question(node) as question:
            entry = InspectEntry(
                node=self._link.node, request=question.request, what=VIEW, timeout=timeout, data=data
            )
            self._link.post_to(node, entry)
            return await self._gathering.answer(question, node, timeout)

    async def others(self) -> dict[str, Node] | None:
        """Return the other nodes of the fleet; None if the bus does not answer.

        Cancellation: ends the call.
        """
        try:
            roster = await self._link.call(self._link.bus.roster)
        except BusUnavailableError:
            return None
        return {
            node: Node.read(node, read_description(description), age, silent=False)
            for node, (description, age) in roster.items()
            if node != self._link.node
        }

    async def stop(self) -> None:
        """Stop answering.

        Cancellation: ends the wait for the last answers.
        """
        for task in self._answering:
            task.cancel()
        if self._answering:
            await asyncio.wait(self._answering)
        if self._served is not None:
            self._served.close()

    # -- here -----------------------------------------------------------------------------------

    def _on_entry(self, entry: InspectEntry, at: Entry) -> None:
        is_for_this = entry.what == VIEW and entry.node != self._link.node
        if not is_for_this or at.age >= (entry.timeout or 0.0) or len(self._answering) >= MAX_ANSWERING:
            return
        answering = asyncio.get_running_loop().create_task(
            self._answer(entry),
            name="otel_tasks.fleet.view",
            # No request and no span of this process caused it.
            context=quiet_context(),
        )
        self._answering.add(answering)
        answering.add_done_callback(self._answering.discard)

    async def _answer(self, entry: InspectEntry) -> None:
        if self._served is None:
            # Loaded by the first question: most processes never get one.
            from otel_tasks.live.served import Served

            self._served = Served(self._manager)
        text = await self._served.answer(entry.data or {}, entry.node)
        if len(text) <= PART * MAX_PARTS:
            for part in text_parts(text, self._link.node, entry.request):
                self._link.post_to(entry.node, part)
                await one_turn()
