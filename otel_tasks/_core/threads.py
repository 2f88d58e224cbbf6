"""Functions that run in threads of the library's own, and the tasks that wait for them.

Rules, each with a test of its own:

1. The function of a task in a thread runs in the task's context and has a cancel event of its own, below that
   of the task's group.
2. A thread cannot be stopped: cancelling its task sets this event. The task ends as cancelled when the
   function has returned, whatever it returned. A task that may abandon its thread ends immediately.
3. A thread that outlives its task is named in the log, and listed until it returns. It keeps its place until
   then, so that threads that never return are never more than the places.

They are not the threads of asyncio's default executor: everything else in the process shares that one (name
look-ups included), its queue ignores priorities, and at exit the interpreter waits for it, without end for a
thread that hangs. Starting a thread takes about as long as passing work to a pool and back.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import inspect
import itertools
import sys
import threading
import traceback
from contextlib import suppress
from contextvars import copy_context
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

from otel_tasks._core.binding import worker_here
from otel_tasks._core.clock import clock_of
from otel_tasks._core.events import CancelEvent
from otel_tasks._core.frames import exc_info_of
from otel_tasks._core.futures import create_in_loop
from otel_tasks._core.log import TaskLogger
from otel_tasks._core.state import TaskStatus
from otel_tasks._core.task import (
    ManagedTask,
    cause_at_end,
    extras_of,
    record_cause,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextvars import Context

    from otel_tasks._core.binding import Binding

T = TypeVar("T")

# asyncio's, and the one that the future of a cancelled task raises in a thread.
_CANCELLED = (asyncio.CancelledError, concurrent.futures.CancelledError)


def in_thread(
    threads: Threads, function: Callable[..., T], args: tuple[Any, ...], *, abandon: bool
) -> Coroutine[Any, Any, T]:
    """Create the coroutine of a task that runs ``function(*args)`` in a thread, named after the function.

    Args:
        threads: The manager's.
        function: A plain function; it is called with ``args``.
        args: Its arguments.
        abandon: End the task as soon as it is cancelled, and let the thread run on.

    Raises:
        TypeError: ``function`` is not a plain function.
    """
    _check_function(function)
    coro = cast("Any", _run(threads, functools.partial(function, *args), abandon=abandon))
    named: Any = function
    while isinstance(named, functools.partial):
        named = named.func
    coro.__name__ = getattr(named, "__name__", type(named).__name__)
    qualified = getattr(named, "__qualname__", type(named).__qualname__)
    coro.__qualname__ = f"{getattr(named, '__module__', None) or type(named).__module__}.{qualified}"
    return cast("Coroutine[Any, Any, T]", coro)


async def _run(threads: Threads, function: Callable[[], T], *, abandon: bool) -> T:
    worker = Worker(threads, cast("ManagedTask[T]", asyncio.current_task()), function)
    return await worker.run(abandon=abandon)


def _check_function(function: object) -> None:
    """Raise a TypeError that shows the correct line, unless ``function`` is a plain function."""
    name = getattr(function, "__name__", repr(function))
    if asyncio.iscoroutine(function):
        function.close()
    elif callable(function) and not inspect.iscoroutinefunction(function):
        return
    elif not callable(function):
        raise TypeError(
            f"run_in_thread() takes a function and its arguments, got {function!r}: "
            "write run_in_thread(work, 1), not run_in_thread(work(1))"
        )
    raise TypeError(
        f"run_in_thread() takes a plain function, got the coroutine {name}: write create_task({name}(...))"
    )


def current_worker() -> Worker[Any] | None:
    """The worker in whose thread this runs; None elsewhere."""
    worker: Any = worker_here.get()
    if not isinstance(worker, Worker) or worker._returned:
        # Something that outlives the function has inherited its context.
        return None
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return worker
    # The function may run a loop of its own, with managed tasks.
    return None if isinstance(task, ManagedTask) else worker


class Threads:
    """The threads of one manager, and the places that they take.

    Args:
        limit: How many threads at a time; None means no limit.
        ageing: Seconds of waiting for a place that are worth one level of priority.
    """

    def __init__(self, limit: int | None, ageing: float) -> None:
        self._limit = limit
        self._ageing = ageing
        self._numbers = itertools.count()
        # The workers with a place. The thread itself releases it, because its loop may be closed then.
        self.workers: dict[Worker[Any], None] = {}
        self._waiting: list[tuple[float, int, Worker[Any]]] = []
        # The manager's; it is bound before the first worker starts.
        self.loop: asyncio.AbstractEventLoop

    @property
    def limit(self) -> int | None:
        """How many threads at a time; a lower limit takes effect as threads return."""
        return self._limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        self._limit = limit
        self.pass_on()

    def coroutine(
        self, function: Callable[..., T], args: tuple[Any, ...], *, abandon: bool
    ) -> Coroutine[Any, Any, T]:
        """Create the coroutine of a task that calls ``function(*args)`` in a thread; see `in_thread`."""
        return in_thread(self, function, args, abandon=abandon)

    # As a method, so that groups reach it through the manager's threads: futures stand above tasks and
    # groups.
    create_in_loop = staticmethod(create_in_loop)

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Move to another loop: workers that waited in the old one are gone, running threads are not."""
        self.loop = loop
        self._waiting.clear()
        for worker in list(self.workers):
            worker.abandoned = True

    def abandoned(self) -> list[Worker[Any]]:
        """The workers whose threads outlive their tasks."""
        return [worker for worker in list(self.workers) if worker.abandoned]

    def acquire(self, worker: Worker[Any]) -> bool:
        """Give ``worker`` a place if one is free; otherwise queue it by priority, and return False."""
        if self._has_room():
            self.workers[worker] = None
            return True
        level, now = worker.task.priority, clock_of(worker.task.get_loop())()
        key = -float(level) if self._ageing == float("inf") else now - level * self._ageing
        heappush(self._waiting, (key, next(self._numbers), worker))
        return False

    def release(self, worker: Worker[Any]) -> None:
        """Take back the place of ``worker``, if it has one, and pass it on."""
        self.workers.pop(worker, None)
        self.pass_on()

    def pass_on(self) -> None:
        """Give free places to waiting workers, highest priority first."""
        while self._waiting and self._has_room():
            worker = heappop(self._waiting)[2]
            if worker.is_waiting:
                self.workers[worker] = None
                worker.wake()

    def _has_room(self) -> bool:
        return self._limit is None or len(self.workers) < self._limit


class WorkingThread(Protocol):
    """The thread that calls ``Worker.work``."""

    # It has told the loop that it has returned.
    is_back: bool

    @property
    def ident(self) -> int | None:
        """Its identifier; None before it has started."""
        ...

    def start(self) -> None:
        """Let it call ``Worker.work``."""
        ...


class Worker(Generic[T]):
    """One function in a thread, for the task that waits for it.

    Args:
        threads: The manager's.
        task: The task that runs the function.
        function: The function to call.
    """

    def __init__(self, threads: Threads, task: ManagedTask[T], function: Callable[[], T]) -> None:
        self.task = task
        self.id = task.id
        self.event = CancelEvent(task.group.cancel_event)
        # The task has ended; its thread may not have returned.
        self.abandoned = False
        self._threads = threads
        self._function = function
        # Set at its start.
        self._thread: WorkingThread
        # The thread has returned, and has told the loop.
        self._returned = False
        self._waiter: asyncio.Future[None] | None = None
        self._result: T
        self._error: BaseException | None = None

    @property
    def binding(self) -> Binding | None:
        """The group of its task while the function runs; None after that."""
        # Something that outlives the function has inherited its context.
        return None if self._returned else self.task._group

    def requester_name(self) -> str | None:
        """The name of its task; None once the task has ended."""
        task = getattr(self, "task", None)
        return None if task is None else task.get_name()

    @property
    def is_waiting(self) -> bool:
        """True while its task waits for a place or for the thread."""
        return self._waiter is not None and not self._waiter.done()

    def wake(self) -> None:
        """Let the task continue."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def thread_id(self) -> int | None:
        """The identifier of its thread; None before that has started."""
        thread = getattr(self, "_thread", None)
        return None if thread is None else thread.ident

    def stack(self) -> str:
        """Return where the thread is, as lines of a traceback; empty unless the function runs."""
        number = None if self._returned else self.thread_id
        frame = None if number is None else sys._current_frames().get(number)
        outer, depth = frame, 0
        # Without the frames that call the function: this module's, and those of threading.
        while outer is not None and outer.f_code is not Worker.work.__code__:
            outer, depth = outer.f_back, depth + 1
        return "" if outer is None else "".join(traceback.format_stack(frame, depth))

    async def run(self, *, abandon: bool) -> T:
        """Get a place, start the thread, and wait until the function has returned.

        Args:
            abandon: Stop waiting once the task is cancelled.

        Cancellation: sets the worker's event; it is raised when the function has returned.
        """
        extras = extras_of(self.task)
        extras.worker = self
        reason: tuple[Any, ...] | None = None
        try:
            await self._start()
            while not self._returned:
                try:
                    await self._wait()
                except asyncio.CancelledError as error:
                    self.event.set(cause_at_end(self.task, TaskStatus.CANCELLED))
                    if abandon:
                        raise
                    reason = error.args if reason is None else reason
            return self._result_or_raise(reason)
        finally:
            extras.worker = None
            # This also runs when the coroutine is closed because its loop was.
            self._abandon_if_running()
            if self._returned:
                # The traceback of an error refers to this object, and the task to the error: break the cycle.
                del self.task

    async def _start(self) -> None:
        try:
            if not self._threads.acquire(self):
                await self._wait()
            # The thread reports to this loop, even if the manager has moved to another one.
            self._loop = asyncio.get_running_loop()
            context = copy_context()
            context.run(worker_here.set, self)
            self._thread = self._thread_in(context)
            self._thread.start()
        except BaseException:
            # It was cancelled while it waited, or just as it got its place; or the thread could not start.
            self._threads.release(self)
            extras_of(self.task).never_called = True
            raise

    def _thread_in(self, context: Context) -> WorkingThread:
        return _WorkerThread(self._threads, self, context)

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def work(self, context: Context) -> None:
        """Call the function and tell the loop; the thread runs nothing else."""
        try:
            self._result = context.run(self._function)
        except BaseException as error:
            self._error = error
        # Neither an error nor the entry of an abandoned thread keeps the function's arguments alive.
        del self._function
        self._threads.workers.pop(self, None)
        try:
            self._loop.call_soon_threadsafe(self._on_return)
        except RuntimeError:
            # The loop is closed: its task is gone, but a worker in another loop may wait for the place.
            self.abandoned = True
            self._log_late_end()
            with suppress(RuntimeError):
                self._threads.loop.call_soon_threadsafe(self._threads.pass_on)

    def _on_return(self) -> None:
        self._returned = True
        self._thread.is_back = True
        self._threads.pass_on()
        self.wake()
        if self.abandoned:
            self._log_late_end()

    def _result_or_raise(self, reason: tuple[Any, ...] | None) -> T:
        """Return the function's result, or raise its error or the cancellation of the task (``reason``)."""
        error, self._error = self._error, None
        try:
            if error is not None and not isinstance(error, _CANCELLED):
                raise error
            if reason is not None:
                raise asyncio.CancelledError(*reason)
            if error is not None:
                raise self._stopped_by(error)
        finally:
            # An exception that its own frame refers to would live until the next collection.
            del error
        if asyncio.iscoroutine(self._result):
            self._result.close()
            raise TypeError(
                f"the function of task {self.task.name!r} returned a coroutine: "
                "run_in_thread() takes a plain function, create_task() a coroutine"
            )
        return self._result

    def _stopped_by(self, error: BaseException) -> BaseException:
        """Return the error for a function that stopped in the grace period, before its task was cancelled."""
        cause = self.event.cause
        if cause is None:
            return error
        if self.task.cause is None:
            record_cause(self.task, cause)
        return asyncio.CancelledError(str(cause))

    def _abandon_if_running(self) -> None:
        self.abandoned = not self._returned
        # A thread without a place has returned, even if it has not told the loop yet.
        if self.abandoned and self in self._threads.workers:
            TaskLogger(self.task).warning(
                "the thread of task %s runs on after the task (%s); its cancel event is set",
                self.task,
                self.event.cause,
            )

    def _log_late_end(self) -> None:
        """Log how an abandoned thread has ended: nothing else reports it."""
        error, self._error = self._error, None
        task = self.task
        if error is None or isinstance(error, _CANCELLED):
            TaskLogger(task).info("the thread of task %s has returned", task)
        else:
            TaskLogger(task).error(
                "the thread of task %s failed after the task", task, exc_info=exc_info_of(error)
            )


class _WorkerThread(threading.Thread):
    """A daemon thread: at exit, the interpreter does not wait for one that hangs."""

    def __init__(self, threads: Threads, worker: Worker[Any], context: Context) -> None:
        super().__init__(target=worker.work, args=(context,), name=f"otel_tasks {worker.id}", daemon=True)
        self._threads = threads
        # It has told the loop that it has returned.
        self.is_back = False

    @property
    def works_for(self) -> asyncio.AbstractEventLoop | None:
        """The loop that it will tell: the virtual clock of ``testing`` waits for it."""
        return None if self.is_back else self._threads.loop
