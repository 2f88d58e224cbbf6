"""Threads: what they hand over to the loop, and tasks whose function runs in one.

Rules, each with a test of its own:

1. What a thread hands over is created in the loop, or refused: at once where that can be known, else by
   its future. A coroutine that comes to neither, because the loop is closed before, is closed.
2. A future ends when its task has ended and is in the books. Cancelling it cancels the task.
3. The function of a task in a thread runs in the task's context and has a cancel event of its own, below
   that of the task's group.
4. A thread cannot be stopped: a task that is cancelled sets this event, and ends as cancelled when the
   function has returned, whatever it returned. One that may abandon its thread ends at once.
5. A thread that runs on after its task is named in the log, and listed until it returns. It keeps its
   place until then: of threads that never return there are no more than places.

The threads are not those of asyncio's default executor: that one is shared with everything else in the
process (name look-ups included), starts its queue regardless of priority, and the interpreter waits for
it at exit, for a thread that hangs without end. A thread of one's own costs about as much to start as it
costs to hand work to a pool and back.
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
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from otel_tasks._core.binding import worker_here
from otel_tasks._core.cancellation import CancelEvent
from otel_tasks._core.clock import clock_of
from otel_tasks._core.log import log_fields, logger
from otel_tasks._core.state import TaskStatus
from otel_tasks._core.task import (
    ManagedTask,
    add_done_callback,
    cause_at_end,
    cause_elsewhere,
    extras_of,
    record_cause,
    request_cancel,
    snapshot,
)
from otel_tasks.exceptions import WrongLoopError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextvars import Context

T = TypeVar("T")

# asyncio's, and what the future of a cancelled task raises in a thread.
_CANCELLED = (asyncio.CancelledError, concurrent.futures.CancelledError)


# -- from a thread to the loop ------------------------------------------------------------------


class TaskFuture(concurrent.futures.Future[T]):
    """What stands for a task in other threads."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._loop = loop
        self._task: ManagedTask[T] | None = None
        self._settled = False
        self.add_done_callback(_pass_cancel_on)

    @property
    def awaited(self) -> bool:
        """True if somebody will be told of a failure: a callback, or a thread that waits."""
        condition: threading.Condition = self._condition
        with condition:
            # The first callback is ours. The future's own `_waiters` are those of `concurrent.futures.wait`.
            callbacks = vars(self)["_done_callbacks"]
            waiting = getattr(condition, "_waiters", ()) or self._waiters or len(callbacks) > 1
            return bool(waiting) and not self.cancelled()

    def attach(self, task: ManagedTask[T]) -> None:
        """Stand for ``task`` from now on; called in its loop."""
        self._task = task
        extras = extras_of(task)
        extras.futures = (*extras.futures, self)
        # Behind the one that takes the task's end: whom this wakes finds the books in order.
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


def _pass_cancel_on(future: concurrent.futures.Future[Any]) -> None:
    # In the thread that has cancelled the future; or in the loop when it has ended otherwise.
    if not isinstance(future, TaskFuture) or future._settled:
        return
    cause = cause_elsewhere(future._loop, "its future was cancelled")

    def pass_on() -> None:
        # Looked up here: the task may have been created since.
        if future._task is not None:
            request_cancel(future._task, cause)

    with suppress(RuntimeError):  # The loop is closed, and the task with it.
        future._loop.call_soon_threadsafe(pass_on)


class _HandOver(Generic[T]):
    """What the loop calls to create a task for a thread; dropped without a call, it refuses."""

    def __init__(
        self,
        work: Coroutine[Any, Any, T] | Callable[[], Coroutine[Any, Any, T]],
        create: Callable[[Coroutine[Any, Any, T]], ManagedTask[T]],
        future: TaskFuture[T],
    ) -> None:
        self._work = work
        self._create = create
        # It does not refer to this one: a thread that waits for it keeps nothing of this in being.
        self._future = future
        self._called = False

    def __call__(self) -> None:
        """Create the task."""
        self._called = True
        work = self._work
        if self._future.cancelled():
            self._give_up("its future was cancelled before the task was created")
            return
        try:
            self._future.attach(self._create(work if asyncio.iscoroutine(work) else work()))
        except BaseException as error:
            self._future.refuse(error)
            if isinstance(error, SystemExit | KeyboardInterrupt):
                raise

    def __del__(self) -> None:
        if not self._called:
            self._give_up("the event loop was closed before the task was created in it")

    def _give_up(self, why: str) -> None:
        if asyncio.iscoroutine(self._work):
            self._work.close()
        self._future.refuse(WrongLoopError(why))


def hand_over(
    loop: asyncio.AbstractEventLoop,
    work: Coroutine[Any, Any, T] | Callable[[], Coroutine[Any, Any, T]],
    create: Callable[[Coroutine[Any, Any, T]], ManagedTask[T]],
) -> TaskFuture[T]:
    """Have a task created in ``loop``, in a copy of the context that is current here.

    Args:
        loop: The manager's.
        work: The coroutine, or what makes it there.
        create: Makes the task; called in the loop.
    """
    future = TaskFuture[T](loop)
    context = copy_context()
    # What the task calls in other threads is none of this worker's.
    context.run(worker_here.set, None)
    with suppress(RuntimeError):  # It has been closed just now: the future says so.
        loop.call_soon_threadsafe(_HandOver(work, create, future), context=context)
    return future


# -- from the loop to a thread ------------------------------------------------------------------


class Threads:
    """The threads of one manager, and the places that they take.

    Args:
        limit: How many at a time; None is without bound.
        ageing: Seconds of waiting for a place that are worth one level of priority.
    """

    def __init__(self, limit: int | None, ageing: float) -> None:
        self._limit = limit
        self._ageing = ageing
        self._numbers = itertools.count()
        # Those that have a place: it is given back by the thread itself, whatever became of its loop.
        self.workers: dict[Worker[Any], None] = {}
        self._waiting: list[tuple[float, int, Worker[Any]]] = []
        # The manager's; there is one before there is a worker.
        self.loop: asyncio.AbstractEventLoop

    @property
    def limit(self) -> int | None:
        """How many at a time; a lower one waits for threads to return."""
        return self._limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        self._limit = limit
        self.pass_on()

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Belong to another loop: who waited in the old one is gone, what runs on in a thread is not."""
        self.loop = loop
        self._waiting.clear()
        for worker in list(self.workers):
            worker.abandoned = True

    def abandoned(self) -> list[Worker[Any]]:
        """Those whose threads run on after their tasks."""
        return [worker for worker in list(self.workers) if worker.abandoned]

    def take(self, worker: Worker[Any]) -> bool:
        """Give a place, if one is free; else it waits, highest priority first."""
        if self._room():
            self.workers[worker] = None
            return True
        level, now = worker.task.priority, clock_of(worker.task.get_loop())()
        key = -float(level) if self._ageing == float("inf") else now - level * self._ageing
        heappush(self._waiting, (key, next(self._numbers), worker))
        return False

    def pass_on(self) -> None:
        """Give the free places to those who wait."""
        while self._waiting and self._room():
            worker = heappop(self._waiting)[2]
            if worker.waits:
                self.workers[worker] = None
                worker.wake()

    def give_back(self, worker: Worker[Any]) -> None:
        """Take a place back, if it has one, for the next."""
        self.workers.pop(worker, None)
        self.pass_on()

    def _room(self) -> bool:
        return self._limit is None or len(self.workers) < self._limit


class Worker(Generic[T]):
    """One function in a thread, and the task that waits for it.

    Args:
        threads: The manager's.
        task: Whose function it is.
        function: What to call.
    """

    def __init__(self, threads: Threads, task: ManagedTask[T], function: Callable[[], T]) -> None:
        self.task = task
        self.id = task.id
        self.event = CancelEvent(task.group.cancel_event)
        # The task has ended; its thread may not have returned.
        self.abandoned = False
        self._threads = threads
        self._function = function
        # Set when it is started.
        self._thread: _WorkerThread
        # The thread has returned, and the loop knows.
        self._over = False
        self._waiter: asyncio.Future[None] | None = None
        self._result: T
        self._error: BaseException | None = None

    def requester_name(self) -> str | None:
        """The name of its task; None once that has ended."""
        task = getattr(self, "task", None)
        return None if task is None else task.get_name()

    @property
    def waits(self) -> bool:
        """Its task waits: for a place, or for the thread."""
        return self._waiter is not None and not self._waiter.done()

    def wake(self) -> None:
        """Let the task go on."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def thread_id(self) -> int | None:
        """The identifier of its thread; None before that has started."""
        thread = getattr(self, "_thread", None)
        return None if thread is None else thread.ident

    def stack(self) -> str:
        """Say where the thread is, as lines of a traceback; empty if it has none that works."""
        number = None if self._over else self.thread_id
        frame = None if number is None else sys._current_frames().get(number)
        outer, depth = frame, 0
        # Without what is below the function: this module, and how a thread begins.
        while outer is not None and outer.f_code is not Worker.work.__code__:
            outer, depth = outer.f_back, depth + 1
        return "" if outer is None else "".join(traceback.format_stack(frame, depth))

    async def run(self, *, abandon: bool) -> T:
        """Take a place, start the thread, and wait until it has returned.

        Args:
            abandon: Do not wait for it once the task is cancelled.

        Cancellation: sets the worker's event, and goes on when the thread has returned.
        """
        extras = extras_of(self.task)
        extras.worker = self
        reason: tuple[Any, ...] | None = None
        try:
            await self._start()
            while not self._over:
                try:
                    await self._wait()
                except asyncio.CancelledError as error:
                    self.event.set(cause_at_end(self.task, TaskStatus.CANCELLED))
                    if abandon:
                        raise
                    reason = error.args if reason is None else reason
            return self._take(reason)
        finally:
            extras.worker = None
            # Also where the coroutine was closed, because its loop was.
            self._leave()
            if self._over:
                # The traceback of an error leads here, and the task to the error: no cycle of it.
                del self.task

    async def _start(self) -> None:
        try:
            if not self._threads.take(self):
                await self._wait()
            # Its own, where the thread will report: the manager may belong to another by then.
            self._loop = asyncio.get_running_loop()
            context = copy_context()
            context.run(worker_here.set, self)
            self._thread = _WorkerThread(self._threads, self, context)
            self._thread.start()
        except BaseException:
            # Cancelled while it waited, or just when it got its place; or no thread could be started.
            self._threads.give_back(self)
            extras_of(self.task).never_called = True
            raise

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def work(self, context: Context) -> None:
        """Call the function, and tell the loop; this is all that runs in the thread."""
        try:
            self._result = context.run(self._function)
        except BaseException as error:
            self._error = error
        # What it was called with is not kept by an error, nor while an abandoned thread is in the books.
        del self._function
        self._threads.workers.pop(self, None)
        try:
            self._loop.call_soon_threadsafe(self._returned)
        except RuntimeError:
            # It is closed: nobody waits in it any more, but perhaps for the place, in another one.
            self.abandoned = True
            self._report()
            with suppress(RuntimeError):
                self._threads.loop.call_soon_threadsafe(self._threads.pass_on)

    def _returned(self) -> None:
        self._over = True
        self._thread.is_back = True
        self._threads.pass_on()
        self.wake()
        self._report()

    def _take(self, reason: tuple[Any, ...] | None) -> T:
        """Give what the function returned, or raise what it raised or why the task was cancelled."""
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
                f"the function of task {self.task.name!r} gave a coroutine: "
                "run_in_thread() takes a plain function, create_task() a coroutine"
            )
        return self._result

    def _stopped_by(self, error: BaseException) -> BaseException:
        """What to raise for a function that ended itself in the grace, before its task was cancelled."""
        cause = self.event.cause
        if cause is None:
            return error
        if self.task.cause is None:
            record_cause(self.task, cause)
        return asyncio.CancelledError(str(cause))

    def _leave(self) -> None:
        self.abandoned = not self._over
        # A thread that has returned is no longer there, even if the loop does not know yet.
        if self.abandoned and self in self._threads.workers:
            logger.warning(
                "the thread of task %r runs on after the task (%s); its cancel event is set",
                self.id,
                self.event.cause,
                extra=log_fields(snapshot(self.task)),
            )

    def _report(self) -> None:
        """Say how an abandoned thread has ended: nobody else will be told."""
        if not self.abandoned:
            return
        error, self._error = self._error, None
        extra = log_fields(snapshot(self.task))
        if error is None or isinstance(error, _CANCELLED):
            logger.info("the thread of task %r has returned", self.id, extra=extra)
        else:
            logger.error("the thread of task %r failed after the task", self.id, exc_info=error, extra=extra)


class _WorkerThread(threading.Thread):
    """A daemon: at exit the interpreter does not wait for one that hangs."""

    def __init__(self, threads: Threads, worker: Worker[Any], context: Context) -> None:
        super().__init__(target=worker.work, args=(context,), name=f"otel_tasks {worker.id}", daemon=True)
        self._threads = threads
        # The loop knows that the thread has returned.
        self.is_back = False

    @property
    def works_for(self) -> asyncio.AbstractEventLoop | None:
        """The loop that this one will tell: for the virtual clock of `testing`, which waits for it."""
        return None if self.is_back else self._threads.loop


def current_worker() -> Worker[Any] | None:
    """The worker in whose thread this runs; None elsewhere."""
    worker: Any = worker_here.get()
    if not isinstance(worker, Worker) or worker._over:
        # The function has left its context to something that outlives it.
        return None
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return worker
    # A loop that the function runs itself may have managed tasks of its own.
    return None if isinstance(task, ManagedTask) else worker


def in_thread(
    threads: Threads, function: Callable[..., T], args: tuple[Any, ...], *, abandon: bool
) -> Coroutine[Any, Any, T]:
    """Make the coroutine of a task that runs ``function(*args)`` in a thread, named after the function."""
    check_function(function)
    coro = cast("Any", _in_thread(threads, functools.partial(function, *args), abandon=abandon))
    named: Any = function
    while isinstance(named, functools.partial):
        named = named.func
    coro.__name__ = getattr(named, "__name__", type(named).__name__)
    qualified = getattr(named, "__qualname__", type(named).__qualname__)
    coro.__qualname__ = f"{getattr(named, '__module__', None) or type(named).__module__}.{qualified}"
    return cast("Coroutine[Any, Any, T]", coro)


async def _in_thread(threads: Threads, function: Callable[[], T], *, abandon: bool) -> T:
    worker = Worker(threads, cast("ManagedTask[T]", asyncio.current_task()), function)
    return await worker.run(abandon=abandon)


def check_function(function: object) -> None:
    """Raise a TypeError that shows the right line, unless ``function`` is a plain function."""
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
