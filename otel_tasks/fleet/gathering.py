"""Gathering: asks all nodes, and collects their answers until each has answered or the time is up.

Rules, each with its own test:

1. A question waits for each node that was in the roster after it was sent, and for no other.
2. While the roster may be incomplete, because the bus has just come back, a question also waits for late
   nodes.
3. Answers are bounded: those of a node that sends too much are dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from typing import TYPE_CHECKING, Any, Final

from otel_tasks._core.slices import in_slices
from otel_tasks.fleet.bus import BusUnavailableError
from otel_tasks.fleet.entries import AnswerEntry, CancelAnswer
from otel_tasks.fleet.json_slices import decoded, encoded

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from otel_tasks.fleet.bus import Entry
    from otel_tasks.fleet.entries import FleetEntry
    from otel_tasks.fleet.link import Link

    Roster = dict[str, tuple[bytes, float]]

# Characters of a part of an answer, which is JSON in JSON: each may be escaped, and an entry has 64 KiB.
PART: Final = 30_000
# Parts of one node's answer to one question.
MAX_PARTS: Final = 128


class Question:
    """A question to all nodes, and the answers so far.

    Args:
        request: Its id.
        to: The only node that is asked; None for all.

    Attributes:
        request: Its id.
        cancelled: The answers to a cancellation, by node.
        roster: The other nodes of the fleet, once they are known.
        roster_at: When it was read, on the loop's clock.
    """

    def __init__(self, request: str, to: str | None = None) -> None:
        self.request = request
        self._to = to
        self.cancelled: dict[str, CancelAnswer] = {}
        self.roster: Roster | None = None
        self.roster_at = 0.0
        self._parts: dict[str, dict[int, str]] = {}
        self._sizes: dict[str, int] = {}
        self._changed = asyncio.Event()

    def take(self, entry: AnswerEntry | CancelAnswer) -> None:
        """Take an answer, or a part of one; each may come twice."""
        if isinstance(entry, CancelAnswer):
            self.cancelled[entry.node] = entry
        elif 0 <= entry.part < MAX_PARTS:
            text = entry.data.get("text")
            self._parts.setdefault(entry.node, {})[entry.part] = text if isinstance(text, str) else ""
            if entry.last:
                self._sizes[entry.node] = entry.part + 1
        self.wake()

    def wake(self) -> None:
        """Check again whether the wait is over."""
        self._changed.set()

    async def changes(self) -> None:
        """Wait for the next change.

        Cancellation: ends the wait.
        """
        self._changed.clear()
        await self._changed.wait()

    @property
    def answered(self) -> set[str]:
        """The nodes whose answers are complete."""
        complete = {node for node, size in self._sizes.items() if len(self._parts[node]) >= size}
        return complete | self.cancelled.keys()

    @property
    def silent(self) -> tuple[str, ...]:
        """The nodes that were asked and have not answered."""
        asked = {self._to} if self._to is not None else set(self.roster or {})
        return tuple(sorted(asked - self.answered))

    def data(self) -> Generator[None, None, dict[str, dict[str, Any]]]:
        """Read the answers by node, in slices, except those that are not JSON objects."""
        found: dict[str, dict[str, Any]] = {}
        for node in sorted(self.answered - self.cancelled.keys()):
            answer = yield from self.data_of(node)
            if answer is not None:
                found[node] = answer
            yield
        return found

    def data_of(self, node: str) -> Generator[None, None, dict[str, Any] | None]:
        """Read the answer of a node, in slices; None without one, or if it is not a JSON object."""
        parts = self._parts.get(node, {})
        with contextlib.suppress(ValueError, RecursionError):
            answer = yield from decoded("".join(parts[number] for number in sorted(parts)))
            if isinstance(answer, dict):
                return answer
        return None


class Gathering:
    """The open questions of one node.

    Args:
        link: The link of this node.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._open: dict[str, Question] = {}
        self._stopped = False
        link.subscribe(AnswerEntry, self._take)
        link.subscribe(CancelAnswer, self._take)
        link.on_state(self._wake_all)

    def stop(self) -> None:
        """Fail the questions that still wait."""
        self._stopped = True
        self._wake_all()

    @contextlib.contextmanager
    def question(self, to: str | None = None) -> Generator[Question]:
        """Open a question to all nodes, or to one, and collect its answers in the block."""
        question = Question(secrets.token_hex(6), to)
        self._open[question.request] = question
        try:
            yield question
        finally:
            del self._open[question.request]

    async def answers(self, question: Question, posted: asyncio.Future[str], timeout: float) -> None:
        """Wait until all nodes have answered a question, or the time is up.

        Args:
            question: The question.
            posted: Its position in the log, once it is published.
            timeout: Seconds to wait, at least 0.

        Raises:
            BusUnavailableError: The question was not sent in this time, the nodes of the fleet are unknown,
                or the fleet has stopped.

        Cancellation: ends the wait; the question stays asked.
        """
        posted.add_done_callback(lambda _: question.wake())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._until(question, posted.done)
                posted.result()
                question.roster = await self._roster(question)
                question.roster_at = asyncio.get_running_loop().time()
                await self._until(question, lambda: not question.silent and self._link.judges)
        if question.roster is None:
            raise BusUnavailableError(f"{self._link.bus.address} is not available")

    async def answer(self, question: Question, node: str, timeout: float) -> dict[str, Any] | None:
        """Return the answer of one node; None without one in this time, or if it is not a JSON object.

        Cancellation: ends the wait.
        """
        with contextlib.suppress(TimeoutError, BusUnavailableError):
            async with asyncio.timeout(timeout):
                await self._until(question, lambda: node in question.answered)
        return await in_slices(question.data_of(node)) if node in question.answered else None

    async def _until(self, question: Question, is_met: Callable[[], bool]) -> None:
        while not is_met():
            if self._stopped:
                raise BusUnavailableError("the fleet has stopped")
            await question.changes()

    async def _roster(self, question: Question) -> Roster:
        while True:
            await self._until(question, lambda: self._link.is_up)
            with contextlib.suppress(BusUnavailableError):
                roster = await self._link.call(self._link.bus.roster)
                roster.pop(self._link.node, None)
                return roster

    def _take(self, entry: AnswerEntry | CancelAnswer, _: Entry) -> None:
        question = self._open.get(entry.request)
        if question is not None and entry.node != self._link.node:
            question.take(entry)

    def _wake_all(self) -> None:
        for question in self._open.values():
            question.wake()


def parts_of(data: dict[str, Any], node: str, request: str) -> Generator[None, None, Iterator[FleetEntry]]:
    """Encode an answer, in slices; rows that do not fit are counted instead.

    Returns:
        The entries that carry it. Each takes about 0.1 ms to make.
    """
    text = yield from encoded(data)
    while len(text) > PART * MAX_PARTS:
        rows = data.get("rows", [])
        kept = rows[: len(rows) // 2]
        data = {"rows": kept, "more": data.get("more", 0) + len(rows) - len(kept)}
        text = yield from encoded(data)
    return text_parts(text, node, request)


def text_parts(text: str, node: str, request: str) -> Iterator[FleetEntry]:
    """Make the entries that carry an answer that is JSON already."""
    starts = range(0, len(text), PART)
    for number, start in enumerate(starts):
        data = {"text": text[start : start + PART]}
        yield AnswerEntry(node=node, request=request, part=number, last=number == len(starts) - 1, data=data)
