"""Waiting with cancel events, for any asyncio task, and the public names of ``events``.

Rules of waiting with events:

1. An event takes effect in the loop's turn after its ``set()``: by a callback, not by polling.
2. A task that the wait cancels has ended when the wait returns.
3. The waiter's own cancellation is raised, and does not affect the task that it waits for.
4. Actions of the task while it is being cancelled, even setting its completion event, decide only how it
   ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import weakref
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from otel_tasks._core.binding import bound_request
from otel_tasks._core.causes import passing, unwatch_cancels, watch_cancels
from otel_tasks._core.checks import checked_seconds
from otel_tasks._core.clock import clock_of
from otel_tasks._core.constructs import known_cause
from otel_tasks._core.events import TREE_LOCK, CancelCause, CancelEvent, requester_name
from otel_tasks._core.state import CancelKind
from otel_tasks._core.telemetry.context import current_span_context

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

__all__ = [
    "TREE_LOCK",
    "CancelCause",
    "CancelEvent",
    "Wait",
    "WaitOutcome",
    "call_when_set",
    "cancel_once",
    "propagate_cancellation",
    "sleep_unless_set",
    "wait_with_cancellation",
]


class WaitOutcome(StrEnum):
    """How a wait ended; true if the task completed, false for all others."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"

    def __bool__(self) -> bool:
        return self is WaitOutcome.COMPLETED


async def wait_with_cancellation(
    task: asyncio.Future[Any] | Coroutine[Any, Any, Any],
    cancel_event: asyncio.Event | None = None,
    *,
    completion_event: asyncio.Event | None = None,
    timeout: float | None = None,
) -> WaitOutcome:
    """Wait until a task has ended, and cancel it when an event is set.

    Args:
        task: Any asyncio task, managed or not. A coroutine runs as a plain asyncio task that belongs to this
            call; pass a task if you want its result or its exception.
        cancel_event: When it is set, the task is cancelled: in the loop's next turn, or immediately if it is
            already set. A ``CancelEvent`` passes its cause on to a managed task.
        completion_event: When it is set, the wait ends: the task counts as completed and is left alone.
        timeout: Seconds, at least 0, after which the task is cancelled; 0 means now, None no limit.

    Returns:
        ``COMPLETED`` (true): it returned, even after a cancel request, or the completion event was set.
        ``FAILED``: it raised; ``task.exception()`` has the error. ``CANCELLED``: the event or other code
        cancelled it. ``TIMED_OUT``: ``timeout`` cancelled it.

    Raises:
        TypeError: ``task`` is neither a task nor a coroutine, or an event is not an ``asyncio.Event``.
        ValueError: ``timeout`` is negative, or the task belongs to another event loop.
        RuntimeError: The calling task would wait for itself.

    The cleanup of a cancelled task has no bound: the task has ended on return. If it may never end, put
    ``asyncio.timeout()`` around the call.

    Cancellation: of the caller is raised and leaves the task alone. A coroutine's task is cancelled, and has
    ended when the cancellation propagates.

    Example:
        >>> if not await wait_with_cancellation(task, request_gone, timeout=5.0):
        ...     log.info("stopped early")
    """
    caller = asyncio.current_task()
    try:
        seconds = checked_seconds("timeout", timeout)
        for what, event in (("cancel_event", cancel_event), ("completion_event", completion_event)):
            if event is not None:
                _check_event(what, event)
        future = _checked_work(task, caller)
    except BaseException:
        if asyncio.iscoroutine(task):
            task.close()
        raise
    wait = Wait(future, requester_name())
    try:
        with contextlib.ExitStack() as watches:
            wait.start(watches, cancel_event, completion_event, seconds)
            return await wait.outcome
    except BaseException:
        if future is not task:
            known = None if caller is None else known_cause(caller)
            text = "the task that waits for it was cancelled"
            cancel_once(future, known or CancelCause.make(CancelKind.EXPLICIT, text))
            await asyncio.wait([future])
        raise


async def propagate_cancellation(parent_event: asyncio.Event, child_events: Iterable[asyncio.Event]) -> None:
    """Wait for an event, and set others when it is set; run it as a task.

    It links plain events. A ``CancelEvent`` made with ``parent=`` needs no task, and reaches all levels of a
    tree at once; this takes one turn of the loop per level.

    Args:
        parent_event: The event to wait for.
        child_events: The events to set. They are read when the parent is set, so a list may grow until
            then. A ``CancelEvent`` gets the cause of its parent, if that is a ``CancelEvent`` too.

    Raises:
        TypeError: ``parent_event`` is not an ``asyncio.Event``, or ``child_events`` is a single event.

    Cancellation: sets nothing.

    Example:
        >>> link = asyncio.create_task(propagate_cancellation(shutdown, [reader_stop, writer_stop]))
    """
    _check_event("parent_event", parent_event)
    if isinstance(child_events, asyncio.Event):
        raise TypeError(f"child_events must be several events, got {child_events!r}: put it in a list")
    await parent_event.wait()
    cause = parent_event.cause if isinstance(parent_event, CancelEvent) else None
    for event in list(child_events):
        if isinstance(event, CancelEvent):
            event.set(cause)
        else:
            event.set()


# Unmanaged tasks that ``cancel_once`` has cancelled.
_cancelled: weakref.WeakSet[asyncio.Future[Any]] = weakref.WeakSet()

# The loop itself holds its tasks weakly. This is what keeps a task whose wait its completion event ended.
_running: set[asyncio.Future[Any]] = set()


@functools.singledispatch
def cancel_once(task: asyncio.Future[Any], cause: CancelCause) -> bool:
    """Cancel a task on another task's behalf: once, so that its cleanup is not interrupted.

    ``task`` registers the variant for managed tasks, which records the cause.

    Returns:
        True if this call made the request.
    """
    # The count alone does not tell: a timeout inside the task raises it too, and lowers it again.
    if task in _cancelled and isinstance(task, asyncio.Task) and task.cancelling():
        return False
    _cancelled.add(task)
    with passing(cause):
        return task.cancel(str(cause))


class Wait:
    """One wait for a future; the loop calls everything but ``start``.

    Args:
        future: The future to wait for.
        waiter: The requester, as a cause names it.
    """

    def __init__(self, future: asyncio.Future[Any], waiter: str | None) -> None:
        self._future = future
        self._waiter = waiter
        self._stopping = False
        # The outcome if the future ends cancelled.
        self._if_cancelled = WaitOutcome.CANCELLED
        self.outcome: asyncio.Future[WaitOutcome] = future.get_loop().create_future()

    def start(
        self,
        watches: contextlib.ExitStack,
        cancel_event: asyncio.Event | None,
        completion_event: asyncio.Event | None,
        seconds: float | None,
    ) -> None:
        """Act on what has happened already, and watch for the rest until ``watches`` is closed."""
        if self._future.done():
            self._ended(self._future)
            return
        if completion_event is not None and completion_event.is_set():
            self._completed()
            return
        self._future.add_done_callback(self._ended)
        watches.callback(self._future.remove_done_callback, self._ended)
        if completion_event is not None:
            watches.callback(call_when_set(completion_event, self._completed))
        if cancel_event is not None:
            self._watch_cancel_event(watches, cancel_event)
        if seconds == 0:
            self._expired(seconds)
        elif seconds is not None:
            watches.callback(self._future.get_loop().call_later(seconds, self._expired, seconds).cancel)

    def _watch_cancel_event(self, watches: contextlib.ExitStack, event: asyncio.Event) -> None:
        if event.is_set():
            self._cancel(event)
        else:
            watches.callback(call_when_set(event, functools.partial(self._cancel, event)))

    def _ended(self, future: asyncio.Future[Any]) -> None:
        if self.outcome.done():
            return
        # Not exception(): asyncio would then no longer log an error that nobody ever retrieves.
        error = None if future.cancelled() else future._exception
        if future.cancelled():
            self.outcome.set_result(self._if_cancelled)
        elif isinstance(error, asyncio.CancelledError):
            # gather() reports a cancellation this way; as a failure it would be logged.
            future.exception()
            self.outcome.set_result(self._if_cancelled)
        else:
            self.outcome.set_result(WaitOutcome.COMPLETED if error is None else WaitOutcome.FAILED)

    def _completed(self, _: object = None) -> None:
        # Set in a `finally`, it comes with the end of the task, which says more.
        if not (self._stopping or self._future.done() or self.outcome.done()):
            self.outcome.set_result(WaitOutcome.COMPLETED)

    def _cancel(self, event: asyncio.Event, _: object = None) -> None:
        cause = event.cause if isinstance(event, CancelEvent) else None
        self._stop(
            cause or self._cause(CancelKind.EXPLICIT, "its cancel event was set"), WaitOutcome.CANCELLED
        )

    def _expired(self, seconds: float) -> None:
        cause = self._cause(CancelKind.TIMEOUT, f"waited for {seconds:g} s")
        self._stop(cause, WaitOutcome.TIMED_OUT)

    def _stop(self, cause: CancelCause, outcome: WaitOutcome) -> None:
        if self._stopping or self._future.done() or self.outcome.done():
            return
        self._stopping = True
        if cancel_once(self._future, cause):
            self._if_cancelled = outcome

    def _cause(self, kind: CancelKind, message: str) -> CancelCause:
        # A callback has no current task, but it has the context of the code that registered it.
        now = clock_of(self._future.get_loop())()
        return CancelCause(kind, message, self._waiter, now, current_span_context(None))


def call_when_set(event: asyncio.Event, callback: Callable[[object], None]) -> Callable[[], None]:
    """Call back in the turn after ``event`` is set; the returned function cancels that.

    The event's own ``wait()`` starts here and never continues: this takes no task and no turn, and closing it
    removes its future from the event.
    """
    waiting = event.wait()
    try:
        future: asyncio.Future[Any] = waiting.send(None)
    except StopIteration:
        # Another thread has set it since the last check.
        return asyncio.get_running_loop().call_soon(callback, None).cancel
    future.add_done_callback(callback)
    return waiting.close


async def sleep_unless_set(seconds: float, event: asyncio.Event) -> None:
    """Sleep for ``seconds``, or until ``event`` is set, which it is not yet.

    Cancellation: cancelling the caller ends the sleep.
    """
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] = loop.create_future()

    def wake(_: object = None) -> None:
        if not waiter.done():
            waiter.set_result(None)

    timer = loop.call_later(seconds, wake)
    # Not asyncio.timeout(): that would cancel the task, which its status would show.
    stop_watching = call_when_set(event, wake)
    try:
        await waiter
    finally:
        timer.cancel()
        stop_watching()


def _checked_work(
    work: asyncio.Future[Any] | Coroutine[Any, Any, Any], caller: asyncio.Task[Any] | None
) -> asyncio.Future[Any]:
    if caller is not None and work is caller:
        raise RuntimeError(
            f"task {caller.get_name()!r} cannot wait for itself: it would wait forever; "
            "pass another task, or a coroutine"
        )
    loop = asyncio.get_running_loop()
    if isinstance(work, asyncio.Future):
        # Raises for a future of another loop.
        future: asyncio.Future[Any] = asyncio.ensure_future(work, loop=loop)
        return future
    if not asyncio.iscoroutine(work):
        raise TypeError(
            f"wait_with_cancellation() takes a task or a coroutine, got {work!r}: "
            "write wait_with_cancellation(work(...), ...) with `async def work(...)`"
        )
    task = loop.create_task(work)
    _running.add(task)
    task.add_done_callback(_running.discard)
    # It records why the task is cancelled: a managed task that it awaits is cancelled by it, with that cause.
    watch_cancels(task, bound_request())
    task.add_done_callback(unwatch_cancels)
    return task


def _check_event(what: str, event: object) -> None:
    # threading.Event would block the whole loop.
    if not isinstance(event, asyncio.Event):
        raise TypeError(f"{what} must be an asyncio.Event or a CancelEvent, got {event!r}")
