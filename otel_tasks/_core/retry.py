"""Retries: one task that runs its work again when it fails.

Rules, each with a test of its own:

1. One task runs all attempts, so its name, its result, its progress, and its cancellation are those of the
   task. Each attempt has a copy of the task's context, and a span below the task's span.
2. Only an exception that the policy names leads to another attempt. A cancellation never does, whatever its
   cause; neither does a failure of a task that is being cancelled.
3. A task that backs off holds no place. It then queues with the time of its first arrival, and the bound of
   the queue does not refuse it.
4. The cancel event of the group ends a backoff. The task then ends cancelled, with the cause of the event.
5. A failure is reported once: as a warning that announces the next attempt, or as the failure of the task.
"""

from __future__ import annotations

import asyncio
import logging
import math
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from otel_tasks._core.backoff import Delays, check_retry
from otel_tasks._core.cancellation import cancel_once, sleep_unless_set
from otel_tasks._core.constructs import known_cause
from otel_tasks._core.coroutines import (
    OwnCoroutine,
    close_quietly,
    code_name,
    function_name,
    made_coroutine,
    name_of_refused,
)
from otel_tasks._core.current import current_group_or_none
from otel_tasks._core.events import CancelCause
from otel_tasks._core.extras import extras_for
from otel_tasks._core.log import TaskLogger, logger, text_of
from otel_tasks._core.places import lift
from otel_tasks._core.state import CancelKind, Outcome, TaskPriority
from otel_tasks._core.suspension import awaiters
from otel_tasks._core.task_spans import start_attempt_span
from otel_tasks._core.telemetry import end_span, error_type, note_retry

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator
    from contextvars import Context
    from types import FrameType

    from otel_tasks._core.backoff import RetryPolicy
    from otel_tasks._core.extras import Extras

T = TypeVar("T")


class Group(Protocol):
    """The part of a ``TaskGroup`` that an error names."""

    @property
    def id(self) -> str:
        """Its id."""
        ...


def retried(
    work: Callable[[], Coroutine[Any, Any, T]] | Coroutine[Any, Any, T],
    policy: RetryPolicy,
    function: str = "create_task",
) -> Attempts[T]:
    """Create the coroutine of a task that repeats ``work`` until it succeeds, with the name of the work.

    The coroutine of the first attempt is made here: the task gets its name, even if ``work`` is a lambda, and
    a function that returns no coroutine is refused where the caller sees it.

    Args:
        work: Makes the coroutine of each attempt; a coroutine is refused.
        policy: Which failures lead to another attempt, and when.
        function: The name of the function that the caller called, for the messages.

    Raises:
        TypeError: ``work`` cannot be called repeatedly, it does not return a coroutine, or ``policy`` is not
            a policy.
    """
    check_retried(work, policy, function)
    first = made_coroutine(work, function)
    make: Any = work
    return Attempts(make, first, policy, function)


def check_retried(work: object, policy: object, function: str) -> None:
    """Raise a TypeError that shows what to write instead, unless a task can repeat ``work``.

    A coroutine is closed.
    """
    if asyncio.iscoroutine(work):
        name = name_of_refused(work)
        raise TypeError(
            f"retry= runs the work again, and the coroutine {name} runs only once: "
            f"write {function}({_NAMED.get(function, '')}lambda: {name}(...), retry=...)"
        )
    if not callable(work):
        raise TypeError(
            f"retry= takes a function that makes the coroutine of each attempt, got {work!r}: "
            f"write {function}({_NAMED.get(function, '')}lambda: work(...), retry=...)"
        )
    check_retry(policy)


def retried_in_group(
    work: Any, policy: RetryPolicy | None, default: RetryPolicy | None, function: str, group: Group
) -> Any:
    """Return ``work``, or the coroutine of all its attempts if the call or its group has a policy.

    Args:
        work: A coroutine, or a function that makes one; a coroutine that is refused is closed.
        policy: The policy of the call.
        default: That of the group.
        function: The name of the function that the caller called, for the message.
        group: The group.

    Raises:
        TypeError: ``work`` is a coroutine, which runs only once, or it makes none.
    """
    if policy is not None:
        return retried(work, policy, function)
    if default is None:
        return work
    if not asyncio.iscoroutine(work):
        return retried(work, default, function)
    # A task of the group is retried as a whole: what it creates from a coroutine is part of its attempt.
    if isinstance(work, Attempts) or current_group_or_none() is group:
        return work
    name = name_of_refused(work)
    raise TypeError(
        f"group {group.id!r} retries its tasks, and the coroutine {name} runs only once: "
        f"write {function}({_NAMED.get(function, '')}lambda: {name}(...), group={group.id!r})"
    )


# The arguments before the function in a call with ``retry=``, for messages that show the call.
_NAMED = {"start_task": "name, "}


class Attempts(OwnCoroutine[T]):
    """The coroutine of a task that runs one attempt after another, with the name of the work.

    Rejected: a coroutine function. Closed before its first step, its coroutine runs no code at all, and the
    coroutine of the first attempt would remain, which Python then reports as never awaited.

    Args:
        work: Makes the coroutine of each attempt.
        first: The coroutine of the first attempt.
        policy: Which failures lead to another attempt, and when.
        function: The name of the function that the caller called, for a message.
    """

    def __init__(
        self,
        work: Callable[[], Coroutine[Any, Any, T]],
        first: Coroutine[Any, Any, T],
        policy: RetryPolicy,
        function: str,
    ) -> None:
        self.__name__ = function_name(first)
        self.__qualname__ = code_name(first)
        self._work = work
        self._first: Coroutine[Any, Any, T] | None = first
        self._policy = policy
        self._function = function
        self._delays = Delays(policy)
        self._number = 0
        # The coroutine of `_run`, once it has started.
        self._running: Coroutine[Any, Any, T] | None = None
        # Set while it runs.
        self._task: Any
        self._extras: Extras

    # -- a coroutine ----------------------------------------------------------------------------

    def __await__(self) -> Generator[Any, Any, T]:
        iterator: Any = self
        awaited: Generator[Any, Any, T] = iterator
        return awaited

    def __next__(self) -> Any:
        return self.send(None)

    def send(self, value: Any) -> Any:
        """Run the next step, as ``Coroutine.send`` does."""
        if self._running is None:
            self._running = self._run()
        return self._running.send(value)

    def throw(self, *error: Any) -> Any:
        """Raise in the coroutine, as ``Coroutine.throw`` does; before its first step, it runs no code."""
        if self._running is None:
            self._running = self._run()
            close_quietly(self._first)
        return self._running.throw(*error)

    def close(self) -> None:
        """Close the coroutine, and that of the first attempt if it has not started."""
        close_quietly(self._first if self._running is None else self._running)

    def __del__(self) -> None:
        self.close()

    @property
    def has_begun(self) -> bool:
        """True if it has run any code of the work."""
        return self._running is not None

    # Code that looks for where a task waits reads these.

    @property
    def cr_frame(self) -> FrameType | None:
        """The frame that runs the attempts."""
        frame: FrameType | None = getattr(self._running, "cr_frame", None)
        return frame

    @property
    def cr_await(self) -> Any:
        """The object that it awaits."""
        return getattr(self._running, "cr_await", None)

    @property
    def cr_running(self) -> bool:
        """True while it runs a step."""
        return bool(getattr(self._running, "cr_running", False))

    @property
    def cr_suspended(self) -> bool:
        """True between two steps."""
        return bool(getattr(self._running, "cr_suspended", False))

    # -- the attempts ---------------------------------------------------------------------------

    async def _run(self) -> T:
        """Run one attempt after another until one is the last, and end as it did."""
        self._task = asyncio.current_task()
        self._extras = extras_for(self._task)
        surroundings = copy_context()
        failure: Exception | None = None
        try:
            while True:
                try:
                    return await self._attempt(surroundings.copy())
                except Exception as error:
                    if not self._goes_on(error):
                        raise
                    failure = error
                await self._back_off(failure)
                # Its frames hold what the attempt has used: not while the next one runs.
                failure = None
        finally:
            # The exceptions refer to this frame and to this object: break the cycles.
            del self._task, failure

    async def _attempt(self, context: Context) -> T:
        self._number += 1
        extras = self._extras
        extras.attempt_number = self._number
        extras.attempt_timed_out = False
        if self._task._span is not None:
            extras.attempt_span = context.run(start_attempt_span, self._task, self._number)
        try:
            result = await self._within_timeout(context)
        except BaseException as error:
            self._end_span(error)
            raise
        self._end_span(None)
        return result

    async def _within_timeout(self, context: Context) -> T:
        extras = self._extras
        seconds = self._policy.attempt_timeout
        extras.attempt_timeout = bound = asyncio.timeout(None if seconds == math.inf else seconds)
        try:
            async with bound:
                coro = self._first or context.run(made_coroutine, self._work, self._function)
                self._first = None
                extras.inner = coro
                return await _InContext(coro, context)
        except TimeoutError:
            if not bound.expired():
                raise
            extras.attempt_timed_out = True
            text = f"attempt {self._number} ran into its attempt_timeout of {seconds:g} s"
            raise TimeoutError(text) from None
        finally:
            # It refers to the task.
            extras.attempt_timeout = None
            del bound

    def _goes_on(self, error: Exception) -> bool:
        """True if another attempt follows this failure; otherwise it gets a note."""
        policy = self._policy
        if not self._task.cancelling() and self._number != policy.max_attempts and policy.matches(error):
            return True
        if self._number > 1:
            error.add_note(f"task {self._task.id!r} failed after {self._number} attempts")
        return False

    async def _back_off(self, failure: Exception) -> None:
        """Wait until it is time for the next attempt and there is a place for it."""
        extras = self._extras
        group = self._task._group
        places, event = group._ledger.places, group.cancel_event
        self._stop_if_cancelled(event.cause, failure)
        delay = self._delays.next()
        self._report(failure, delay)
        extras.retry_at = group._ledger.home.clock() + delay
        if extras.ticket is not None:
            places.give_back(extras.ticket)
        try:
            await sleep_unless_set(delay, event)
        finally:
            extras.retry_at = None
        self._stop_if_cancelled(event.cause, failure)
        place = extras.claim_again(asyncio.get_running_loop())
        if place is not None:
            self._lift_for_waiters()
            await place
            self._stop_if_cancelled(event.cause, failure)

    def _report(self, failure: Exception, delay: float) -> None:
        """Announce the next attempt: on the task's span, in the metrics, and in the log."""
        extras, task = self._extras, self._task
        kind = str(Outcome.TIMEOUT) if extras.attempt_timed_out else error_type(failure)
        extras.last_failure = f"attempt {self._number} failed with {text_of(failure, repr)}"
        if task._span is not None:
            note_retry(task._span, self._number, delay, kind)
        task._group._ledger.counters.count_retry(task._group.name, kind)
        self._warn(failure, f"retried in {delay:.3g} s")

    def _lift_for_waiters(self) -> None:
        """Raise the priority of the task, which queues again, to those of the tasks that wait for it."""
        for waiter in awaiters(self._task):
            level = getattr(waiter.task, "priority", None)
            if self._extras.ticket is not None and isinstance(level, TaskPriority):
                lift(self._extras.ticket, level)

    def _stop_if_cancelled(self, cause: CancelCause | None, failure: Exception) -> None:
        """End the task as if it had been cancelled: its work was not done because of ``cause``."""
        if cause is not None:
            self._warn(failure, f"not retried ({cause})")
            cancel_once(self._task, cause)
            raise asyncio.CancelledError(str(cause)) from failure

    def _warn(self, failure: Exception, fate: str) -> None:
        TaskLogger(self._task).warning(
            "task %s failed in attempt %d and is %s: %s",
            self._task,
            self._number,
            fate,
            text_of(failure, repr),
            # A retry is expected. The failure of the last attempt has its traceback.
            exc_info=failure if logger.isEnabledFor(logging.DEBUG) else None,
        )

    def _end_span(self, error: BaseException | None) -> None:
        span, self._extras.attempt_span = self._extras.attempt_span, None
        if span is None:
            return
        task = self._task
        ledger = task._group._ledger
        cause = None
        if isinstance(error, asyncio.CancelledError):
            cause = known_cause(task) or CancelCause(CancelKind.FOREIGN)
        try:
            end_span(span, self._outcome(error), error, cause, now=ledger.home.clock())
        except Exception:
            ledger.log_once("telemetry of task %s raised", task, task=task)

    def _outcome(self, error: BaseException | None) -> Outcome:
        if error is None:
            return Outcome.SUCCESS
        if isinstance(error, asyncio.CancelledError):
            return Outcome.CANCELLED
        if isinstance(error, GeneratorExit):
            # Its loop was closed.
            return Outcome.ABANDONED
        return Outcome.TIMEOUT if self._extras.attempt_timed_out else Outcome.ERROR


class _InContext(Generic[T]):
    """Awaits a coroutine, and runs each of its steps in ``context`` instead of the task's.

    Rejected: a task for each attempt. The work would then not run in the managed task: ``current_task()``,
    ``uncancel()``, and timeouts in the work would reach another one.
    """

    __slots__ = ("_context", "_coro")

    def __init__(self, coro: Coroutine[Any, Any, T], context: Context) -> None:
        self._coro = coro
        self._context = context

    def __await__(self) -> Generator[Any, Any, T]:
        iterator: Any = self
        awaited: Generator[Any, Any, T] = iterator
        return awaited

    def __next__(self) -> Any:
        return self._context.run(self._coro.send, None)

    def throw(self, *error: Any) -> Any:
        """Raise in the coroutine, as ``Generator.throw`` does."""
        return self._context.run(self._coro.throw, *error)

    def close(self) -> None:
        """Close the coroutine."""
        self._context.run(self._coro.close)

    # For code that looks for where a task waits, this is the coroutine itself.

    @property
    def cr_frame(self) -> FrameType | None:
        """The coroutine's frame."""
        frame: FrameType | None = getattr(self._coro, "cr_frame", None)
        return frame

    @property
    def cr_await(self) -> Any:
        """The object that the coroutine awaits."""
        return getattr(self._coro, "cr_await", None)
