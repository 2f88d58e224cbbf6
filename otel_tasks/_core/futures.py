"""Tasks that another thread creates in the event loop, and the futures that represent them there.

Rules, each with a test of its own:

1. A task that a thread requests is created in the loop, or refused: immediately where that is known,
   otherwise by its future. If the loop is closed before it creates the task, the coroutine is closed.
2. A future ends when its task has ended and is recorded. Cancelling the future cancels the task.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from contextlib import suppress
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from otel_tasks._core.binding import worker_here
from otel_tasks._core.causes import cause_elsewhere
from otel_tasks._core.native import add_done_callback
from otel_tasks._core.task import ManagedTask, extras_of, request_cancel
from otel_tasks.exceptions import WrongLoopError

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Coroutine

T = TypeVar("T")


def create_in_loop(
    loop: asyncio.AbstractEventLoop,
    work: Coroutine[Any, Any, T] | Callable[[], Coroutine[Any, Any, T]],
    create: Callable[[Any], ManagedTask[T]],
) -> TaskFuture[T]:
    """Create a task in ``loop``, in a copy of the calling thread's context.

    Args:
        loop: The manager's.
        work: The coroutine, or a function that creates it in the loop.
        create: Creates the task of ``work``; called in the loop.

    Returns:
        The task's future. A closed loop is reported by it, with a ``WrongLoopError``.
    """
    future = TaskFuture[T](loop)
    context = copy_context()
    # What the task calls in other threads does not belong to this thread's worker.
    context.run(worker_here.set, None)
    with suppress(RuntimeError):  # The loop has just been closed: the future reports it.
        loop.call_soon_threadsafe(_Creation(work, create, future), context=context)
    return future


class TaskFuture(concurrent.futures.Future[T]):
    """Represents a task in other threads."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._loop = loop
        self._task: ManagedTask[T] | None = None
        # Its task has ended, or was refused: a cancellation from now on is not forwarded.
        self._settled = False
        self.add_done_callback(_forward_cancel)

    @property
    def awaited(self) -> bool:
        """True if a callback, or a thread that waits, will receive a failure."""
        condition: threading.Condition = self._condition
        with condition:
            # The first callback is ours. The future's own `_waiters` are those of `concurrent.futures.wait`.
            callbacks = vars(self)["_done_callbacks"]
            waiting = getattr(condition, "_waiters", ()) or self._waiters or len(callbacks) > 1
            return bool(waiting) and not self.cancelled()

    def attach(self, task: ManagedTask[T]) -> None:
        """Represent ``task`` from now on; called in its loop."""
        self._task = task
        extras = extras_of(task)
        extras.futures = (*extras.futures, self)
        # After the callback that records the task's end: a thread that this wakes finds it recorded.
        add_done_callback(task, self._settle)

    def refuse(self, error: BaseException) -> None:
        """End without a task that has ended."""
        self._settled = True
        if self.set_running_or_notify_cancel():
            self.set_exception(error)

    def _settle(self, task: ManagedTask[T]) -> None:
        self._settled = True
        self._task = None
        if task.cancelled():
            self.cancel()
        if not self.set_running_or_notify_cancel():
            return
        error = task.exception()
        if error is None:
            self.set_result(task.result())
        else:
            self.set_exception(error)


def _forward_cancel(future: concurrent.futures.Future[Any]) -> None:
    # Runs in the thread that has cancelled the future, or in the loop when the future has ended otherwise.
    if not isinstance(future, TaskFuture) or future._settled:
        return
    cause = cause_elsewhere(future._loop, "its future was cancelled")

    def forward() -> None:
        # Read here: the task may have been created since.
        if future._task is not None:
            request_cancel(future._task, cause)

    with suppress(RuntimeError):  # The loop is closed, and its task is gone.
        future._loop.call_soon_threadsafe(forward)


class _Creation(Generic[T]):
    """The callback that creates a task for a thread; if the loop drops it without a call, it refuses."""

    def __init__(
        self,
        work: Coroutine[Any, Any, T] | Callable[[], Coroutine[Any, Any, T]],
        create: Callable[[Any], ManagedTask[T]],
        future: TaskFuture[T],
    ) -> None:
        self._work = work
        self._create = create
        # The future does not refer to this object: a thread that waits for it does not keep this alive.
        self._future = future
        self._called = False

    def __call__(self) -> None:
        """Create the task."""
        self._called = True
        work = self._work
        if self._future.cancelled():
            self._refuse("its future was cancelled before the task was created")
            return
        try:
            self._future.attach(self._create(work))
        except BaseException as error:
            self._future.refuse(error)
            if isinstance(error, SystemExit | KeyboardInterrupt):
                raise

    def __del__(self) -> None:
        if not self._called:
            self._refuse("the event loop was closed before the task was created in it")

    def _refuse(self, why: str) -> None:
        if asyncio.iscoroutine(self._work):
            self._work.close()
        self._future.refuse(WrongLoopError(why))
