"""Functions in threads of someone else's, and the managed tasks that stand for them.

A thread pool that this package does not own, such as that of a task queue, calls ``Visit.work``. The thread
then waits until its managed task runs, calls the function as the task's, and returns.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from otel_tasks._core.threads import Threads, Worker

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Context

    from otel_tasks._core.task import ManagedTask
    from otel_tasks._core.threads import WorkingThread

T = TypeVar("T")


class Visit(Generic[T]):
    """One call of a function in a thread that waits for its managed task.

    Args:
        function: The function.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        # What the thread has to call; None if there is nothing to do.
        self._work: concurrent.futures.Future[Callable[[], None] | None] = concurrent.futures.Future()
        self.thread_id: int | None = None

    def work(self) -> None:
        """Call the function when its task runs; the thread of someone else's calls this."""
        self.thread_id = get_ident()
        work = self._work.result()
        if work is not None:
            work()

    async def as_task(self) -> T:
        """Run the function in the thread, as the managed task that this coroutine is.

        Cancellation: sets the cancel event; it is raised when the function has returned.
        """
        task = cast("ManagedTask[T]", asyncio.current_task())
        return await _VisitingWorker(task, self).run(abandon=False)

    def let_work(self, work: Callable[[], None]) -> None:
        """Let the thread call ``work``."""
        self._work.set_result(work)

    def dismiss(self) -> None:
        """Let the thread return without a call, unless it works already."""
        if not self._work.done():
            self._work.set_result(None)

    @property
    def function(self) -> Callable[[], T]:
        """The function."""
        return self._function


class _VisitingWorker(Worker[T]):
    def __init__(self, task: ManagedTask[T], visit: Visit[T]) -> None:
        # Threads of its own: a place belongs to the pool of the thread.
        super().__init__(Threads(None, float("inf")), task, visit.function)
        self._visit = visit

    def _thread_in(self, context: Context) -> WorkingThread:
        return _VisitingThread(self._visit, partial(self.work, context))


class _VisitingThread:
    def __init__(self, visit: Visit[Any], work: Callable[[], None]) -> None:
        self.is_back = False
        self._visit = visit
        self._work = work

    @property
    def ident(self) -> int | None:
        return self._visit.thread_id

    def start(self) -> None:
        self._visit.let_work(self._work)
