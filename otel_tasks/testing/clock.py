"""The virtual clock: an event loop where sleeping costs no time, and what runs a test on it."""

from __future__ import annotations

import asyncio
import selectors
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable
    from concurrent.futures import Executor

T = TypeVar("T")


class DeadlockError(RuntimeError):
    """Every task waits, and nothing can wake any of them."""


def run(coro: Coroutine[Any, Any, T], *, timeout: float = 3600.0) -> T:
    """Run ``coro`` to its end on a fresh ``VirtualClockLoop``, as ``asyncio.run`` does on a real one.

    Args:
        coro: The coroutine to run. Tasks it leaves behind are cancelled and awaited.
        timeout: Virtual seconds that the whole run may take. It bounds tasks that wake up again and again; a
            task that waits forever is found immediately. ``float("inf")`` means no limit.

    Returns:
        The result of ``coro``.

    Raises:
        DeadlockError: All tasks wait, no timer is set, and no thread or socket can wake one.
        TimeoutError: The virtual clock would pass ``timeout``.
        RuntimeError: A loop is already running in this thread.

    **Cancellation**: Ctrl-C cancels ``coro``, as in ``asyncio.run``.

    Example:
        >>> run(asyncio.sleep(600, result="at once"))
        'at once'
    """
    with asyncio.Runner(loop_factory=lambda: VirtualClockLoop(timeout=timeout)) as runner:
        return runner.run(coro)


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose ``time()`` jumps to the next timer when nothing else can run.

    While a thread works for the loop (``run_in_executor``, ``run_in_thread``, anyio's worker threads), time
    passes at its real pace, because only the thread can produce its result. Sockets are polled at each turn,
    but not waited for while a timer is set.

    Args:
        timeout: Virtual seconds after which the loop gives up with ``TimeoutError``.
    """

    def __init__(self, *, timeout: float = float("inf")) -> None:
        self._now = self._start = 1000.0
        self._time_limit = timeout
        self._threads_out = 0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        """The virtual time in seconds; it starts at 1000, because a real clock is never near 0."""
        return self._now

    def run_in_executor(  # type: ignore[override]  # typeshed's TypeVarTuple form cannot be forwarded
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """As the base class; the loop waits for the thread instead of jumping over its work."""
        future = super().run_in_executor(executor, func, *args)
        self._threads_out += 1
        future.add_done_callback(self._thread_returned)
        return future

    async def shutdown_default_executor(
        self,
        timeout: float | None = None,  # the base class's signature since 3.12
    ) -> None:
        """As the base class, which joins its threads in one more thread."""
        self._threads_out += 1
        try:
            await super().shutdown_default_executor()
        finally:
            self._threads_out -= 1

    def _thread_returned(self, future: asyncio.Future[Any]) -> None:
        self._threads_out -= 1

    def _a_thread_works(self) -> bool:
        return self._threads_out > 0 or any(map(self._is_busy, threading.enumerate()))

    def _is_busy(self, thread: threading.Thread) -> bool:
        # A thread of `run_in_thread` has `works_for` until this loop knows that it has returned.
        return self._is_busy_anyio_worker(thread) or getattr(thread, "works_for", None) is self

    def _is_busy_anyio_worker(self, thread: threading.Thread) -> bool:
        # anyio (and so Starlette's ``def`` handlers) does not use run_in_executor. The loop's callback that
        # delivers a worker's result also puts the worker into ``idle_workers``.
        idle: Iterable[object] | None = getattr(thread, "idle_workers", None)
        return idle is not None and getattr(thread, "loop", None) is self and thread not in idle

    def _jump(self, seconds: float) -> None:
        self._now += seconds
        if self._now - self._start > self._time_limit:
            tasks = _describe(asyncio.all_tasks(self))
            # Only once: the tasks that are cancelled after this may need a timer to unwind.
            self._time_limit, limit = float("inf"), self._time_limit
            raise TimeoutError(f"the virtual clock passed the limit of {limit} s; unfinished tasks:\n{tasks}")


class _JumpingSelector(selectors.DefaultSelector):
    """Polls the real selector, then moves the loop's clock instead of sleeping."""

    REAL_PATIENCE = 30.0
    """Real seconds that a thread or a socket may take to wake a loop that has nothing else to do."""

    def __init__(self, loop: VirtualClockLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if events or (timeout is not None and timeout <= 0):
            return events
        if self._loop._a_thread_works():
            return self._select_really(timeout)
        # A thread may have woken the loop and ended since the first poll.
        events = super().select(0)
        if events:
            return events
        if timeout is not None:
            self._loop._jump(timeout)
            return events
        if self._has_sockets():
            return self._select_really(None)
        raise _deadlock(self._loop)

    def _select_really(self, timeout: float | None) -> list[tuple[selectors.SelectorKey, int]]:
        begin = time.monotonic()
        events = super().select(self.REAL_PATIENCE if timeout is None else timeout)
        passed = time.monotonic() - begin
        if timeout is None and not events:
            raise _deadlock(self._loop)
        # Never past the next timer: a timer runs exactly at the time it was set for.
        self._loop._jump(passed if timeout is None else min(passed, timeout))
        return events

    def _has_sockets(self) -> bool:
        # One is the loop's own: the pipe through which other threads wake it.
        return len(self.get_map()) > 1


def _deadlock(loop: asyncio.AbstractEventLoop) -> DeadlockError:
    return DeadlockError(
        f"deadlock: every task waits and no timer is set:\n{_describe(asyncio.all_tasks(loop))}"
    )


def _describe(tasks: Iterable[asyncio.Task[Any]]) -> str:
    return "\n".join(sorted(f"  {task.get_name()}: {_where(task)}" for task in tasks)) or "  (none)"


def _where(task: asyncio.Task[Any]) -> str:
    """The calls from the task's own coroutine down to the innermost one, and the line where that waits."""
    names: list[str] = []
    line = "not started"
    coro: Any = task.get_coro()
    while (frame := getattr(coro, "cr_frame", None)) is not None:
        names.append(frame.f_code.co_qualname)
        line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        coro = coro.cr_await
    return f"{' > '.join(names)} at {line}"


async def assert_no_tasks_left(*, turns: int = 10) -> None:
    """Fail if an asyncio task other than the caller's is alive.

    Args:
        turns: How many turns of the loop ending tasks may still take, at least 0.

    Raises:
        AssertionError: With the name of each task and the line where it waits.

    **Cancellation**: propagates; nothing was changed.

    Example:
        >>> async def test_shutdown():
        ...     await server.shutdown()
        ...     await assert_no_tasks_left()
    """
    for _ in range(turns):
        if not _others():
            return
        await asyncio.sleep(0)
    if left := _others():
        raise AssertionError(f"{len(left)} task(s) left:\n{_describe(left)}")


def _others() -> set[asyncio.Task[Any]]:
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}
