"""For asyncio tasks of any origin: keep track of them, end them, find what would linger.

Rules, each with a test of its own:

1. All that are to end are asked in one pass and waited for together, under one deadline.
2. The calling task is never asked, nor one that waits for it: by ``await``, by ``asyncio.gather``,
   ``shield``, ``wait``, ``wait_for`` or ``as_completed``, or as the task of an ``asyncio.TaskGroup`` or
   a ``TaskGroup`` in which the caller runs. The cancellation would come back to the caller.
3. A task is asked once, however often these functions meet it, so that its clean-up is not torn.
4. What would not stop is reported with its stack, not logged. A failure is not taken out of its task: it is
   reported as that of any task which nobody awaits.
5. A tracker forgets a task once it is done.
"""

from __future__ import annotations

import asyncio
import functools
import io
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from otel_tasks._checks import checked_seconds
from otel_tasks._state import CancelKind
from otel_tasks._task import NOBODYS_CONTEXT, ManagedTask, add_done_callback, failure_of, wait_until_done
from otel_tasks.cancellation import CancelCause, ask_to_end
from otel_tasks.exceptions import WrongLoopError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import TracebackType
    from typing import Self

T = TypeVar("T")

logger = logging.getLogger("otel_tasks")


@dataclass(frozen=True, slots=True)
class CancelReport:
    """What became of tasks that were asked to end; it holds neither tasks nor frames.

    Attributes:
        cancelled: How many ended cancelled.
        completed: How many returned all the same.
        failed: How many raised something else.
        still_running: The names of those that would not stop, each with the stack where it is. A name that
            is there already gets a number behind it.
    """

    cancelled: int = 0
    completed: int = 0
    failed: int = 0
    still_running: Mapping[str, str] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """True if nothing runs on."""
        return not self.still_running

    def __str__(self) -> str:
        counts = f"{self.cancelled} cancelled, {self.completed} completed, {self.failed} failed"
        if self.clean:
            return f"{counts}, none still running"
        names = ", ".join(map(repr, self.still_running))
        return f"{counts}, {len(self.still_running)} still running: {names}"


class CancelCounts(NamedTuple):
    """What ``TaskTracker.cancel_all`` returns.

    Attributes:
        success_count: How many tasks ended cancelled.
        error_count: How many did not: they returned all the same, raised something else, or still run.
    """

    success_count: int
    error_count: int


class TaskTracker:
    """A set of running tasks that empties itself: a task is in it until it is done.

    It holds its tasks, which the event loop alone does not. With ``async with`` nothing is left at the end
    of the block: what still runs is cancelled (``await tracker.wait()`` as its last line lets it finish).

    Args:
        timeout: Seconds that ``cancel_all`` and the end of the block wait, at least 0, unless told
            otherwise; None is without bound.

    Cancellation: while the end of the block waits, it goes on its way; the tasks stay cancelled.

    Example:
        >>> async with TaskTracker() as tracker:
        ...     reader = tracker.add(asyncio.create_task(read()))
    """

    def __init__(self, *, timeout: float | None = 10.0) -> None:
        self._timeout = checked_seconds("timeout", timeout)
        # A dict for its order. The callback is bound to it and not to the tracker.
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._forget = functools.partial(_forget, self._tasks)
        self._closed = False
        self._report: CancelReport | None = None

    def add(self, task: asyncio.Task[T]) -> asyncio.Task[T]:
        """Track a task until it is done, and give it back.

        Raises:
            RuntimeError: The tracker is closed; the task runs on.
            TypeError: It is not a task; a coroutine is closed.
        """
        if not isinstance(task, asyncio.Task):
            raise _no_task("tracker.add()", task)
        if self._closed:
            raise RuntimeError(
                f"cannot track task {task.get_name()!r}: the tracker is closed; "
                "add tasks before close() and before the end of its block"
            )
        if not task.done() and task not in self._tasks:
            self._tasks[task] = None
            add_done_callback(task, self._forget, context=NOBODYS_CONTEXT)
        return task

    def close(self) -> None:
        """Take no more tasks; those that are tracked run on."""
        self._closed = True

    @property
    def closed(self) -> bool:
        """True once it takes no more tasks."""
        return self._closed

    @property
    def last_report(self) -> CancelReport | None:
        """What the last ``cancel_all``, or the end of the block, found; None before."""
        return self._report

    def get_count(self) -> int:
        """How many tasks are tracked; the same as ``len(tracker)``."""
        return len(self._tasks)

    async def cancel_all(
        self, timeout: float | None = ..., reason: str | None = None  # type: ignore[assignment]
    ) -> CancelCounts:
        """Cancel all tracked tasks at once, and wait for them together."""
        raise NotImplementedError
