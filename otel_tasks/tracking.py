"""Track, cancel, and find asyncio tasks of any origin.

Rules, each with a test of its own:

1. Tasks are cancelled in one pass and awaited together, under one deadline.
2. The calling task is never cancelled, nor a task that waits for it: with ``await``, ``asyncio.gather``,
   ``shield``, ``wait``, ``wait_for``, or ``as_completed``, or as the host of an ``asyncio.TaskGroup`` or a
   ``TaskGroup`` in which the caller runs. The cancellation would come back to the caller.
3. A task is cancelled once, however often these functions meet it, so that its cleanup is not interrupted.
4. Tasks that do not stop are reported with their stacks. A failure stays with its task, and is reported like
   that of any task that is not awaited.
5. A tracker forgets a task once it is done.
"""

from __future__ import annotations

import asyncio
import functools
from contextvars import Context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from otel_tasks._core.awaiters import with_awaiters
from otel_tasks._core.cancellation import cancel_once
from otel_tasks._core.checks import checked_seconds
from otel_tasks._core.coroutines import close_quietly
from otel_tasks._core.events import CancelCause
from otel_tasks._core.log import logger
from otel_tasks._core.native import add_done_callback, failure_of
from otel_tasks._core.state import CancelKind
from otel_tasks._core.task import stack_of
from otel_tasks._core.waiting import wait_until_done
from otel_tasks.exceptions import WrongLoopError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from types import TracebackType
    from typing import Self

TaskT = TypeVar("TaskT", bound=asyncio.Task[Any])


@dataclass(frozen=True, slots=True)
class CancelReport:
    """The outcome of cancelling tasks; it holds neither tasks nor frames.

    Attributes:
        cancelled: The number of tasks that ended cancelled.
        completed: The number of tasks that returned anyway.
        failed: The number of tasks that raised something else.
        still_running: The names of the tasks that did not stop, each with its stack. A repeated name gets a
            number.
    """

    cancelled: int = 0
    completed: int = 0
    failed: int = 0
    still_running: Mapping[str, str] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """True if every task has ended."""
        return not self.still_running

    def __str__(self) -> str:
        ended = f"{self.cancelled} cancelled, {self.completed} completed, {self.failed} failed"
        names = ", ".join(map(repr, self.still_running)) or "none"
        return f"{ended}, still running: {names}"


class CancelCounts(NamedTuple):
    """The result of ``TaskTracker.cancel_all``.

    Attributes:
        success_count: The number of tasks that ended cancelled.
        error_count: The number of tasks that did not: they returned anyway, raised something else, or still
            run.
    """

    success_count: int
    error_count: int


class TaskTracker:
    """Holds running tasks of any origin until they are done.

    It holds its tasks strongly; the event loop does not. With ``async with``, no task is left at the end of
    the block: those that still run are cancelled. ``await tracker.wait()`` as the last line lets them finish.

    Cancellation: at the end of a block, it propagates, and the tasks stay cancelled.

    Example:
        >>> async with TaskTracker() as tracker:
        ...     reader = tracker.add(asyncio.create_task(read()))
    """

    def __init__(self) -> None:
        # A dict, for its order. The callback is bound to the dict, so that it does not hold the tracker.
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._forget = functools.partial(_forget, self._tasks)
        self._closed = False
        self._report: CancelReport | None = None

    def add(self, task: TaskT) -> TaskT:
        """Track a task until it is done, and return it.

        Raises:
            RuntimeError: The tracker is closed; the task keeps running.
            TypeError: It is not a task; a coroutine is closed.
        """
        _check_tasks("tracker.add()", [task])
        if self._closed:
            raise RuntimeError(
                f"cannot track task {task.get_name()!r}: the tracker is closed; "
                "add tasks before close() and before its block ends"
            )
        if not task.done() and task not in self._tasks:
            self._tasks[task] = None
            # Past the counting of callbacks: this one does not see a failure.
            add_done_callback(task, self._forget, context=Context())
        return task

    def close(self) -> None:
        """Take no more tasks; tracked tasks keep running."""
        self._closed = True

    @property
    def closed(self) -> bool:
        """True while it takes no new tasks."""
        return self._closed

    @property
    def last_report(self) -> CancelReport | None:
        """The report of the last ``cancel_all`` or of the end of the block; None before."""
        return self._report

    def get_count(self) -> int:
        """The number of tracked tasks, as ``len()``; a task that ends drops out in the loop's next turn."""
        return len(self._tasks)

    async def cancel_all(self, timeout: float | None = 10.0, *, reason: str | None = None) -> CancelCounts:
        """Cancel all tracked tasks at once, and wait for them together.

        The calling task and the tasks that wait for it are spared. Tasks that do not stop stay tracked, and
        are in ``last_report`` with their stacks.

        Args:
            timeout: Seconds for all of them together, at least 0; None means no limit.
            reason: The message in the cause of each managed task, and in the CancelledError of any other.

        Returns:
            ``(success_count, error_count)``: the numbers of tasks that ended cancelled and of the others.

        Raises:
            WrongLoopError: A tracked task runs in another event loop.

        Cancellation: ends the wait; the tasks stay cancelled.

        Example:
            >>> cancelled, others = await tracker.cancel_all(timeout=5.0)
        """
        seconds = checked_seconds("timeout", timeout)
        report = await _end(self._others(), seconds, reason or "cancelled by its tracker")
        self._report = report
        errors = report.completed + report.failed + len(report.still_running)
        return CancelCounts(report.cancelled, errors)

    async def wait(self, timeout: float | None = None) -> bool:
        """Wait until all tracked tasks have ended, including those added meanwhile.

        It does not raise their exceptions, and does not wait for the calling task or the tasks that wait for
        it.

        Args:
            timeout: Seconds, at least 0; None means no limit. The tasks keep running after it.

        Returns:
            True if all of them have ended.

        Raises:
            WrongLoopError: A tracked task runs in another event loop.

        Cancellation: ends the wait; the tasks keep running.

        Example:
            >>> if not await tracker.wait(timeout=30.0):
            ...     await tracker.cancel_all()
        """
        seconds = checked_seconds("timeout", timeout)
        loop = asyncio.get_running_loop()
        deadline = None if seconds is None else loop.time() + seconds
        while others := self._others():
            await wait_until_done(others, None if deadline is None else max(0.0, deadline - loop.time()))
            if deadline is not None and loop.time() >= deadline:
                return not self._others()
        return True

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, task: object) -> bool:
        return task in self._tasks

    def __iter__(self) -> Iterator[asyncio.Task[Any]]:
        """Iterate over the tasks that are tracked now, oldest first."""
        return iter(list(self._tasks))

    def __repr__(self) -> str:
        return f"<TaskTracker {'closed' if self._closed else 'open'}, {len(self._tasks)} tasks>"

    async def __aenter__(self) -> Self:
        """Open it, again if it was closed."""
        self._closed = False
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        await self.cancel_all(reason="its tracker's block has ended")
        if self._report is not None and not self._report.clean:
            # A block returns no report to its caller.
            logger.warning("at the end of a tracker's block: %s", self._report)

    def _others(self) -> list[asyncio.Task[Any]]:
        """The tracked tasks that still run, except the caller and those that wait for it."""
        for task in list(self._tasks):
            if task.get_loop().is_closed():
                # It can never end.
                del self._tasks[task]
        return _without_awaiters(self._tasks)


async def cancel_and_wait(
    *tasks: asyncio.Task[Any], timeout: float | None = 10.0, reason: str | None = None
) -> CancelReport:
    """Cancel tasks at once, managed or not, and wait until they have ended.

    The calling task and the tasks that wait for it are spared.

    Args:
        tasks: The tasks to cancel; those that are done are skipped.
        timeout: Seconds for all of them together, at least 0; None means no limit.
        reason: The message in the cause of each managed task, and in the CancelledError of any other.

    Returns:
        A report of how they ended. It does not raise their exceptions.

    Raises:
        TypeError: One is not a task; coroutines are closed.
        WrongLoopError: A task runs in another event loop.

    Cancellation: ends the wait; the tasks stay cancelled.

    Example:
        >>> report = await cancel_and_wait(reader, writer, timeout=2.0)
    """
    seconds = checked_seconds("timeout", timeout)
    _check_tasks("cancel_and_wait()", tasks)
    return await _end(_without_awaiters(tasks), seconds, reason)


async def cleanup_lingering_tasks(
    timeout: float | None = 10.0, exclude: Iterable[asyncio.Task[Any]] = ()
) -> CancelReport:
    """Cancel every task of the running event loop at once, and wait for them together.

    Use it in scripts and tests, which own their loop. In a service, the loop also runs the tasks of the
    server and of other libraries: shut the manager down there, or cancel a tracker's tasks.

    Args:
        timeout: Seconds for all of them together, at least 0; None means no limit.
        exclude: Tasks to spare. The calling task and the tasks that wait for it are always spared.

    Returns:
        A report of how they ended. Tasks started meanwhile are not cancelled, but reported as still running.

    Raises:
        TypeError: ``exclude`` contains something other than tasks.

    Cancellation: ends the wait; the tasks stay cancelled.

    Example:
        >>> report = await cleanup_lingering_tasks(timeout=2.0)
        >>> assert report.clean, report
    """
    seconds = checked_seconds("timeout", timeout)
    if isinstance(exclude, asyncio.Future):
        raise TypeError(f"exclude must be an iterable of tasks, got {exclude!r}: put it in a list")
    kept = set(exclude)
    _check_tasks("cleanup_lingering_tasks(exclude=...)", kept)
    tasks = _without_awaiters(asyncio.all_tasks() - kept)
    ended = await _end(tasks, seconds, "lingering task")
    later = _without_awaiters(asyncio.all_tasks() - kept - set(tasks))
    return _report_on([*tasks, *later]) if later else ended


async def _end(tasks: list[asyncio.Task[Any]], timeout: float | None, reason: str | None) -> CancelReport:
    cause = CancelCause.make(CancelKind.EXPLICIT, reason)
    # Newest first: an older task may own what a newer one is using.
    for task in reversed(tasks):
        cancel_once(task, cause)
    await wait_until_done(tasks, timeout)
    return _report_on(tasks)


def _report_on(tasks: Iterable[asyncio.Task[Any]]) -> CancelReport:
    cancelled = completed = failed = 0
    still_running: dict[str, str] = {}
    for task in tasks:
        if not task.done():
            still_running[_free_name(task.get_name(), still_running)] = stack_of(task)
        elif task.cancelled():
            cancelled += 1
        elif failure_of(task) is None:
            completed += 1
        else:
            failed += 1
    return CancelReport(cancelled, completed, failed, still_running)


def _free_name(name: str, taken: Mapping[str, str]) -> str:
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}#{number}"
    return free


def _check_tasks(where: str, tasks: Iterable[object]) -> None:
    wrong = [task for task in tasks if not isinstance(task, asyncio.Task)]
    for task in wrong:
        close_quietly(task)
    if wrong:
        hint = "make it one with asyncio.create_task(...)" if asyncio.iscoroutine(wrong[0]) else "pass tasks"
        raise TypeError(f"{where} takes tasks, got {wrong[0]!r}: {hint}")


def _forget(tasks: dict[asyncio.Task[Any], None], task: asyncio.Task[Any]) -> None:
    tasks.pop(task, None)


def _without_awaiters(tasks: Iterable[asyncio.Task[Any]]) -> list[asyncio.Task[Any]]:
    """The tasks that run in this loop, except the caller and those that wait for it, each once.

    Raises:
        WrongLoopError: A task runs in another loop.
    """
    loop = asyncio.get_running_loop()
    spared = with_awaiters(asyncio.current_task())
    others = [task for task in dict.fromkeys(tasks) if not task.done() and task not in spared]
    return [task for task in others if _runs_in(loop, task)]


def _runs_in(loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> bool:
    if task.get_loop() is loop:
        return True
    if task.get_loop().is_closed():
        return False
    raise WrongLoopError(
        f"task {task.get_name()!r} runs in another event loop: cancel it there, or from here with "
        "loop.call_soon_threadsafe(task.cancel)"
    )
