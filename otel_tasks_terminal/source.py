"""The source: the interface that commands ask, a live view or the nodes of a fleet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

Answer = dict[str, Any]
Pairs = list[tuple[str, str]]

# The tasks on one page of a list.
PAGE = 1000


class Event(NamedTuple):
    """An event of a stream."""

    name: str
    data: Answer


class Source(ABC):
    """Answers with the JSON of a live view. Each method may raise ``CommandError`` instead of answering."""

    @property
    @abstractmethod
    def address(self) -> object:
        """What people call it."""

    @abstractmethod
    def snapshot(self) -> Answer:
        """Fetch the overview."""

    @abstractmethod
    def tasks(self, pairs: Pairs) -> Answer:
        """Fetch one page of a list of tasks."""

    @abstractmethod
    def task(self, task_id: str, node: str | None = None) -> Answer:
        """Fetch everything about one task, of these nodes alone if they are named."""

    @abstractmethod
    def cancel(self, uid: str, reason: str | None) -> Answer:
        """Request the cancellation of the task with this uid."""

    @abstractmethod
    def events(self, pairs: Pairs) -> Iterator[Event]:
        """Follow a stream until it ends."""

    @abstractmethod
    def fresh(self, *, timeout: float | None = None) -> Source:
        """Make another one of the same address, for another thread."""

    @abstractmethod
    def interrupt(self) -> None:
        """End the read of another thread: its call fails immediately."""

    @abstractmethod
    def close(self) -> None:
        """End all connections."""

    def listed(self, pairs: Pairs, limit: int) -> Answer:
        """Fetch a list of at most ``limit`` tasks, from as many pages as it takes."""
        rows: dict[Any, Answer] = {}
        after: Pairs = []
        while True:
            size = min(PAGE, limit - len(rows))
            answer = self.tasks([*pairs, ("limit", str(size)), *after])
            before = len(rows)
            for row in answer.get("rows", ()):
                # A task may be on two pages: an older one has ended in between.
                rows[row.get("id") or (row.get("task_id"), row.get("created"), row.get("ended"))] = row
            if not answer.get("next") or len(rows) >= limit or len(rows) == before:
                return {**answer, "rows": list(rows.values())}
            after = [("after", str(answer["next"]))]
