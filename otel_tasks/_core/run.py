"""run: ``asyncio.run`` for a service, which a signal shuts down in order.

Rules, each with a test of its own:

1. Tasks end before the main coroutine does: a task may use what that has opened. The first signal shuts down
   every manager of the loop, which refuse new tasks and set their cancel events; the main coroutine is
   cancelled when their tasks have ended.
2. The second signal cuts this short: what is live is cancelled and gets one more second. The third ends the
   process.
3. Every wait has a bound, also those for a main coroutine that ignores its cancellation, for asynchronous
   generators, for threads, and for an export of spans to a collector that does not answer.
4. If the main coroutine returns, the tasks get their grace; if it raises, they are cancelled immediately.
5. The exit code is that of a shell: 130 after SIGINT, 143 after SIGTERM, 1 after an exception and after a
   critical service that gave up.

Rejected: cancelling the main coroutine first, as ``asyncio.run()`` does. It would close the connections that
the tasks need to finish.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from otel_tasks._core.coroutines import check_coroutine, close_quietly
from otel_tasks._core.critical import stopped_by
from otel_tasks._core.functions import global_task_manager
from otel_tasks._core.lifetime import belongs_to, bounds_of, managers_in, open_in, shut_down, telemetry_of
from otel_tasks._core.log import logger
from otel_tasks._core.manager import TaskManager
from otel_tasks._core.options import FROM_MANAGER, FromManager
from otel_tasks._core.shutdown import ShutdownBounds
from otel_tasks._core.task import ManagedTask, stack_of
from otel_tasks._core.telemetry.providers import flushers
from otel_tasks.exceptions import ManagerClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine, Generator

T = TypeVar("T")

# SIGBREAK is Windows' Ctrl-Break, and what a parent process sends there instead of SIGTERM.
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
# Seconds for what is left after a second signal.
_HURRY = 1.0
# Seconds for the export of the last spans and metrics.
_FLUSH = 5.0


def run(
    main: Coroutine[Any, Any, T],
    *,
    manager: TaskManager | None = None,
    grace: float | FromManager = FROM_MANAGER,
    timeout: float | FromManager | None = FROM_MANAGER,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
    debug: bool | None = None,
) -> T:
    """Run a service's main coroutine, as ``asyncio.run`` does, and shut its tasks down in order.

    SIGINT and SIGTERM shut down every manager that the loop uses: new tasks are refused, queued ones dropped,
    and running ones get their grace before they are cancelled. Then ``main`` is cancelled, and the last spans
    and metrics are exported, for at most 5 seconds. A second signal cuts all of this short; a third ends the
    process. As PID 1 of a container, the process handles both signals as well.

    Args:
        main: The coroutine to run, not the function.
        manager: A manager to shut down even if the loop has not used it. None means
            ``global_task_manager``.
        grace: Seconds in which tasks may finish, at least 0. By default, that of each manager.
        timeout: Seconds for everything after that, at least 0, and once more for ``main``. None means no
            limit. By default, the ``shutdown_timeout`` of each manager.
        loop_factory: Makes the event loop, such as ``uvloop.new_event_loop``. None means asyncio's own.
        debug: As for ``asyncio.run``.

    Returns:
        What ``main`` returned. When it returns, live tasks get their grace first.

    Raises:
        SystemExit: A signal ended the service (code 130 for SIGINT, 143 for SIGTERM), or a critical service
            gave up (1).
        RuntimeError: An event loop runs here, or this is not the main thread.
        TypeError: ``main`` is not a coroutine, ``manager`` not a manager, or a duration not a number.
        ValueError: A duration is negative.

    It also raises what ``main`` raised; live tasks are then cancelled without a grace.

    Example:
        >>> run(main())
        >>> run(main(), grace=20.0, loop_factory=uvloop.new_event_loop)
    """
    try:
        _check(main, manager, loop_factory)
        ShutdownBounds(None, None).or_own(grace, timeout)
        loop = (loop_factory or asyncio.new_event_loop)()
    except BaseException:
        close_quietly(main)
        raise
    return _Run(manager or global_task_manager, grace, timeout, loop).run(main, debug)


def _check(main: object, manager: object, loop_factory: object) -> None:
    check_coroutine(main, "run")
    if loop_factory is not None and not callable(loop_factory):
        raise TypeError(
            f"loop_factory must be a function that makes an event loop, got {loop_factory!r}: "
            "write loop_factory=uvloop.new_event_loop"
        )
    if manager is not None and not isinstance(manager, TaskManager):
        raise TypeError(f"manager must be a TaskManager, got {manager!r}: write run(main(), manager=manager)")
    if asyncio._get_running_loop() is not None:
        raise RuntimeError("run() starts an event loop, and one runs here: write `await main()`")
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "run() handles signals, which only the main thread can: in a thread, write asyncio.run(main()), "
            "with `async with manager:` in main()"
        )


class _Run:
    """One call of ``run``."""

    _main: asyncio.Task[Any]
    # Done when a signal or a critical service stops the service.
    _stop: asyncio.Future[None]
    # Done when a second signal cuts the shutdown short.
    _cut: asyncio.Future[None]

    def __init__(
        self,
        manager: TaskManager,
        grace: float | FromManager,
        timeout: float | FromManager | None,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._loop = loop
        self._manager = manager
        self._grace = grace
        self._timeout = timeout
        self._signals = 0
        self._reason = "run() at the end of its main coroutine"
        self._code = 0
        # A SystemExit or KeyboardInterrupt that a task raised, or the error of a loop that code has stopped.
        self._exit: BaseException | None = None

    def run(self, main: Coroutine[Any, Any, T], debug: bool | None) -> T:
        """Run ``main`` to its end and that of the tasks; return or raise what ``run`` does."""
        loop = self._loop
        asyncio.set_event_loop(loop)
        try:
            if debug is not None:
                loop.set_debug(debug)
            open_in(self._manager, loop)
            self._stop, self._cut = loop.create_future(), loop.create_future()
            self._main = loop.create_task(main)
            with _handling(self._on_signal), stopped_by(loop, self.stop):
                self._drive(self._until_stopped())
                self._drive(self._end())
        finally:
            asyncio.set_event_loop(None)
            loop.close()
        result: T = self._outcome()
        return result

    def stop(self, reason: str, code: int = 1) -> None:
        """Shut down; only the first call decides about the exit code."""
        if not self._stop.done():
            self._reason, self._code = reason, code
            self._stop.set_result(None)

    # -- signals ----------------------------------------------------------------------------

    def _on_signal(self, signum: int, frame: object) -> None:
        # Not loop.add_signal_handler(): this one runs even while a task holds the loop, and on Windows.
        self._signals += 1
        if self._signals > 2:
            os._exit(128 + signum)
        with suppress(RuntimeError):  # The loop is closed: the process is about to end.
            self._loop.call_soon_threadsafe(self._react, signum, self._signals)

    def _react(self, signum: int, number: int) -> None:
        name = signal.Signals(signum).name
        is_ending = self._stop.done() or self._main.done()
        logger.info("received %s, %s", name, "cutting the shutdown short" if is_ending else "shutting down")
        self.stop(f"run(), which received {name}", 128 + signum)
        if is_ending and not self._cut.done():
            self._cut.set_result(None)

    # -- running ----------------------------------------------------------------------------

    def _drive(self, coro: Coroutine[Any, Any, None]) -> None:
        """Run the loop until ``coro`` has ended, even if its tasks raise through the loop, or stop it."""
        task = self._own_task(coro)
        while not task.done():
            try:
                self._loop.run_until_complete(task)
            except (SystemExit, KeyboardInterrupt, RuntimeError) as error:
                # asyncio raises a RuntimeError after a loop.stop().
                self._exit = self._exit or error
                self.stop(f"run(), because of {error!r}")

    def _own_task(self, coro: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Create a task that ``asyncio.all_tasks()`` does not list.

        Scripts cancel everything that it lists, and wait for that: it would never end, as it waits for them.
        """
        task = self._loop.create_task(coro)
        # From "Extending asyncio" in Python's documentation.
        asyncio._unregister_task(task)
        return task

    async def _until_stopped(self) -> None:
        await asyncio.wait([self._main, self._stop], return_when=asyncio.FIRST_COMPLETED)

    async def _end(self) -> None:
        managers = [
            manager
            for manager in dict.fromkeys([*self._own_manager(), *managers_in(self._loop)])
            if manager is self._manager or not manager.closed or manager.stats().live
        ]
        try:
            await self._shut_down(managers)
        finally:
            await self._end_main(managers)

    def _own_manager(self) -> list[TaskManager]:
        # Not with live tasks in another loop: that loop has to shut it down.
        return [self._manager] if belongs_to(self._manager, self._loop) else []

    async def _end_main(self, managers: list[TaskManager]) -> None:
        """Cancel the main coroutine and what is left, and export the last spans and metrics."""
        if not self._main.done():
            self._main.cancel(self._reason)
            await self._wait_for([self._main])
        await self._cancel_rest()
        await self._close_loop()
        await self._flush(managers)

    async def _shut_down(self, managers: list[TaskManager]) -> None:
        grace = 0.0 if self._has_failed() else self._grace
        shutdowns = [
            self._own_task(shut_down(manager, grace, self._timeout, self._reason)) for manager in managers
        ]
        if await self._wait(shutdowns, None, hurry=0.0):
            for task in shutdowns:
                # Raises what a shutdown raised, so that no error is lost.
                task.result()
            return
        for task in shutdowns:
            task.cancel()
        await asyncio.wait(shutdowns)
        hurried = (self._own_task(shut_down(manager, 0.0, _HURRY, self._reason)) for manager in managers)
        await asyncio.gather(*hurried)

    def _has_failed(self) -> bool:
        if self._exit is not None:
            return True
        main = self._main
        return main.done() and (main.cancelled() or main.exception() is not None)

    async def _cancel_rest(self) -> None:
        """Cancel the plain asyncio tasks that are left, as ``asyncio.run()`` does, but wait with a bound."""
        # Their managers have cancelled and reported managed tasks.
        rest = {
            task
            for task in asyncio.all_tasks(self._loop) - {self._main}
            if not (isinstance(task, ManagedTask) and task.cancelling())
        }
        for task in rest:
            # A task that is being cancelled may still clean up: that is not interrupted, but awaited.
            if not task.cancelling():
                task.cancel(self._reason)
        await self._wait_for(rest)
        for task in rest:
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                self._loop.call_exception_handler(
                    {"message": "unhandled exception during run() shutdown", "exception": error, "task": task}
                )

    async def _close_loop(self) -> None:
        # The default executor is that of asyncio.to_thread().
        for what in (self._loop.shutdown_asyncgens(), self._loop.shutdown_default_executor()):
            await self._wait_for([self._own_task(what)])

    async def _flush(self, managers: list[TaskManager]) -> None:
        """Export the last spans and metrics."""
        # In threads: the SDK's force_flush() blocks, and ignores its timeout.
        flushed = [self._in_thread(flush) for flush in flushers(map(telemetry_of, managers))]
        if not await self._wait(flushed, _FLUSH):
            logger.warning("the last spans and metrics were not exported within %s s", _FLUSH)

    def _in_thread(self, function: Callable[[], object]) -> asyncio.Future[None]:
        loop, future = self._loop, self._loop.create_future()

        def call() -> None:
            function()
            with suppress(RuntimeError):  # The loop is closed: nothing waits any more.
                loop.call_soon_threadsafe(future.set_result, None)

        # A daemon: the end of the process does not wait for it.
        threading.Thread(target=call, name="otel_tasks flush", daemon=True).start()
        return future

    # -- waiting ----------------------------------------------------------------------------

    async def _wait_for(self, tasks: Collection[asyncio.Task[Any]]) -> None:
        """Wait for cancelled tasks, and log those that do not stop."""
        own = bounds_of(self._manager).or_own(0.0, self._timeout)
        await self._wait(tasks, own.timeout)
        for task in tasks:
            if not task.done():
                logger.error(
                    "asyncio task %r did not stop at shutdown; it is at\n%s", task.get_name(), stack_of(task)
                )

    async def _wait(
        self, futures: Collection[asyncio.Future[Any]], seconds: float | None, *, hurry: float = _HURRY
    ) -> bool:
        """Wait for all of these, for ``seconds``, or ``hurry`` after a second signal; True if all ended."""
        if futures:
            everything: asyncio.Future[Any] = self._own_task(asyncio.wait(futures, timeout=seconds))
            await asyncio.wait([everything, self._cut], return_when=asyncio.FIRST_COMPLETED)
            everything.cancel()
            if self._cut.done():
                await asyncio.wait(futures, timeout=hurry)
        return all(future.done() for future in futures)

    # -- the end ----------------------------------------------------------------------------

    def _outcome(self) -> Any:
        main = self._main
        error = None if main.cancelled() or not main.done() else main.exception()
        if self._exit is not None:
            raise self._exit
        if not self._stop.done():
            return main.result()
        if error is not None and not _is_refusal(error):
            raise error
        raise SystemExit(self._code)


def _is_refusal(error: BaseException) -> bool:
    """True if a main coroutine only failed because the shutdown refused its tasks."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(ManagerClosedError)[1] is None
    return isinstance(error, ManagerClosedError)


@contextmanager
def _handling(handler: Callable[[int, Any], None]) -> Generator[None]:
    """Handle the signals, and restore their handlers at the end of the block."""
    before: dict[int, Any] = {}
    for signum in _SIGNALS:
        # An ignored signal stays ignored: a shell ignores SIGINT for its background jobs.
        if signal.getsignal(signum) is not signal.SIG_IGN:
            before[signum] = signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, previous in before.items():
            # None is a handler that was not set from Python, and cannot be set again.
            signal.signal(signum, signal.SIG_DFL if previous is None else previous)
