"""What ``async with`` adds to a group: its body, its errors, and the rules of its exit.

On every Python, the rules are those of ``asyncio.TaskGroup`` in Python 3.15, whose own tests pass here:
``cancel()`` leaves the block without an exception, and closing a generator inside a block raises none.
"""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Any, Literal, Protocol

from otel_tasks._core.binding import bound_request
from otel_tasks._core.causes import passing, unwatch_cancels, watch_cancels
from otel_tasks._core.constructs import known_cause
from otel_tasks._core.events import CancelCause
from otel_tasks._core.log import text_of
from otel_tasks._core.native import asyncio_cancel, asyncio_uncancel, cancel_message
from otel_tasks._core.state import CancelKind
from otel_tasks._core.telemetry.context import span_context

if TYPE_CHECKING:
    from otel_tasks._core.options import GroupOptions
    from otel_tasks._core.telemetry import Span

OnError = Literal["cancel", "isolate"]


class Child(Protocol):
    """The attributes that a block reads of a failed task."""

    @property
    def name(self) -> str: ...

    @property
    def _span(self) -> Span | None: ...

    def exception(self) -> BaseException | None: ...


class Owner(Protocol):
    """The methods that a block calls on its group."""

    @property
    def id(self) -> str: ...

    @property
    def _cause(self) -> CancelCause | None: ...

    def _signal_cancel(self, cause: CancelCause) -> object: ...

    def _cancel_tasks(self, cause: CancelCause) -> int: ...

    def _is_empty(self) -> bool: ...

    def _now(self) -> float: ...


@functools.singledispatch
def cancel_host(host: asyncio.Task[Any], cause: CancelCause) -> None:
    """Cancel the task in which a block runs; `task` registers the variant for managed tasks."""
    host.cancel(str(cause))


class Scope:
    """The state of one ``async with`` block over a group.

    Args:
        on_error: ``"cancel"``: a failing task cancels its siblings and the body, and the block raises its
            error; ``"isolate"``: the failure is reported, and the others continue.
        timeout: Seconds that the whole block may take; None means no limit.
        span: Give the block a span of its own.
    """

    def __init__(self, on_error: OnError, timeout: float | None, *, span: bool) -> None:
        self.on_error = on_error
        self.timeout = timeout
        self.wants_span = span
        # Set by the group: the defaults of its tasks.
        self.options: GroupOptions | None = None
        self.entered = False
        # None before the block and after it, so that the scope does not keep the task alive.
        self.host: asyncio.Task[Any] | None = None
        # The block around this one in the same task.
        self.outer: Any = None
        self.exiting = False
        self.timed_out = False
        self._errors: list[BaseException] = []
        self._base_error: BaseException | None = None
        # This scope has cancelled the host, and has to call uncancel() once.
        self._body_cancelled = False
        self._level = 0
        self._idle: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def enter(self, group: Owner, host: asyncio.Task[Any], loop: asyncio.AbstractEventLoop) -> None:
        """Start the block in the task ``host``."""
        self.entered = True
        self.host = host
        self._level = host.cancelling()
        watch_cancels(host, bound_request())
        if self.timeout is not None:
            self._timer = loop.call_later(self.timeout, self._run_out, group)

    def close(self) -> None:
        """Release the host: the block has ended."""
        if self.host is not None:
            unwatch_cancels(self.host)
        self.host = self.outer = None

    def cancel_body(self, cause: CancelCause) -> None:
        """Cancel the body, once; not during the exit, which waits for tasks that end by themselves."""
        if self.host is None or self.exiting or self._body_cancelled:
            return
        self._body_cancelled = True
        with passing(cause):
            cancel_host(self.host, cause)

    def child_failed(self, group: Owner, task: Child, error: BaseException) -> bool:
        """Take a task's failure; returns False if the block will not raise it."""
        if self.on_error == "isolate" and isinstance(error, Exception):
            return False
        if self.host is None or self.host.done():
            return False
        # Marks the failure as retrieved: the block raises it, so asyncio need not log it.
        task.exception()
        self._errors.append(error)
        if isinstance(error, SystemExit | KeyboardInterrupt) and self._base_error is None:
            self._base_error = error
        if group._cause is None:
            message = f"{task.name} failed: {text_of(error, repr)}"
            now = group._now()
            origin = None if task._span is None else span_context(task._span)
            self.abort(group, CancelCause(CancelKind.SIBLING_FAILED, message, task.name, now, origin))
        return True

    def abort(self, group: Owner, cause: CancelCause) -> None:
        """Cancel all tasks of the group, and the body if it still runs."""
        group._signal_cancel(cause)
        group._cancel_tasks(cause)
        self.cancel_body(cause)

    async def leave(self, group: Owner, error: BaseException | None) -> bool:
        """Wait for the tasks, and decide what the block raises; True suppresses ``error``."""
        self.exiting = True
        if isinstance(error, SystemExit | KeyboardInterrupt) and self._base_error is None:
            self._base_error = error
        if error is not None:
            self._abort_because_of(group, error)
        pending = error if isinstance(error, asyncio.CancelledError) else None
        pending = await self._wait_for_tasks(group) or pending
        if self._body_cancelled and pending is None:
            pending = await self._absorb()
        raised = self._settle(group, error, pending)
        if raised is None:
            return error is not None
        if raised is error:
            return False
        try:
            raise raised
        finally:
            # An exception in a local variable of a frame in its own traceback lives until the next
            # collection.
            error = pending = raised = None

    async def _wait_for_tasks(self, group: Owner) -> asyncio.CancelledError | None:
        interrupted = None
        # In a loop: the host may be cancelled again and again while it waits here.
        while not group._is_empty():
            self._idle = asyncio.get_running_loop().create_future()
            try:
                await self._idle
            except asyncio.CancelledError as error:
                interrupted = error
                self._abort_because_of(group, error)
        self._idle = None
        try:
            return interrupted
        finally:
            # See `leave`.
            interrupted = None

    async def _absorb(self) -> asyncio.CancelledError | None:
        """Receive this scope's own cancellation, if the body has ended before its next await.

        Before Python 3.13, ``uncancel()`` alone would let it arrive after the block.
        """
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError as error:
            return error
        return None

    def tasks_ended(self) -> None:
        """Wake the exit, which waits for the last task."""
        idle = self._idle
        # If the loop was closed before the block ended, nothing waits.
        if idle is not None and not idle.done() and not idle.get_loop().is_closed():
            idle.set_result(None)

    def _settle(
        self, group: Owner, error: BaseException | None, pending: asyncio.CancelledError | None
    ) -> BaseException | None:
        """Withdraw the cancellation of the body, and return what the block raises."""
        if self._timer is not None:
            self._timer.cancel()
        errors, self._errors = self._errors, []
        base_error, self._base_error = self._base_error, None
        if base_error is not None:
            return base_error
        if self._body_cancelled and self.host is not None and self.host.uncancel() <= self._level:
            # The only cancellation was that of this scope: it ends here.
            pending = None
        if error is not None and not isinstance(error, asyncio.CancelledError):
            errors.append(error)
        if errors:
            self._redeliver()
            # close() of a generator must raise nothing.
            is_closed = isinstance(error, GeneratorExit) and len(errors) == 1
            text = f"unhandled errors in group {group.id!r}"
            return error if is_closed else _without_context(BaseExceptionGroup(text, errors))
        if pending is not None:
            return pending
        if self.timed_out:
            text = f"group {group.id!r} ran into its timeout of {self.timeout:g} s"
            return _without_context(TimeoutError(text))
        return None

    def _redeliver(self) -> None:
        """If other code has cancelled the host too, raise the errors first.

        The cancellation arrives at the host's next await, with the count and the cause unchanged.
        """
        host = self.host
        if host is not None and host.cancelling() > self._level:
            message = cancel_message(host)
            asyncio_uncancel(host)
            asyncio_cancel(host, message)

    def _abort_because_of(self, group: Owner, error: BaseException) -> None:
        cause = None
        if isinstance(error, asyncio.CancelledError) and self.host is not None:
            cause = known_cause(self.host)
        if group._cause is not None and cause in (None, group._cause):
            # The code that has set the event decides which tasks it cancels, and when.
            return
        if cause is None:
            # Also for a CancelledError from something that the block awaits: the host was not cancelled.
            cause = CancelCause.make(CancelKind.SCOPE_ENDED, f"the block raised {text_of(error, repr)}")
        group._signal_cancel(cause)
        group._cancel_tasks(cause)

    def _run_out(self, group: Owner) -> None:
        if group._cause is None:
            self.timed_out = True
            message = f"group timeout of {self.timeout:g} s"
            self.abort(group, CancelCause.make(CancelKind.TIMEOUT, message))


def _without_context(error: BaseException) -> BaseException:
    """Suppress the context, as ``raise ... from None`` does."""
    error.__suppress_context__ = True
    return error
