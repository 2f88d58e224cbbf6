"""Services: long-running work that is restarted when it fails.

Rules, each with a test of its own:

1. A service is a *supervisor*, the handle that ``start_service`` returns, and its *attempts*, one after
   another, each a managed task: ``prices#1``, ``prices#2``.
2. The supervisor has no span, which would be exported only when the application ends, and takes no place
   under a limit. Each attempt has its own trace, linked to the attempt before it, and takes a place. So has
   each task that an attempt starts: the trace of an attempt may never end.
3. Only a failure leads to another attempt: an exception, or a CancelledError that no request caused. An
   attempt that returns, or that is cancelled, ends the service, as with systemd's ``Restart=on-failure`` and
   Erlang's ``transient``. A policy may count returning as a failure (Erlang's ``permanent``).
4. A service ends as its last attempt ended. Each cancellation of the service is forwarded to its attempt with
   its cause, and the service waits for the attempt.
5. There is no restart once its group is being cancelled or its manager shuts down.
6. A failure is reported once: as a warning that announces the restart, or, without a restart, as the failure
   of the service.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar, cast

from otel_tasks._core.backoff import Delays, RestartPolicy
from otel_tasks._core.cancellation import sleep_unless_set
from otel_tasks._core.checks import AttemptName, check_flag, checked_name
from otel_tasks._core.coroutines import close_quietly, name_of_refused, not_a_coroutine
from otel_tasks._core.critical import check_on_give_up, watch_service
from otel_tasks._core.events import CancelCause
from otel_tasks._core.frames import exc_info_of
from otel_tasks._core.log import TaskLogger, task_label, text_of
from otel_tasks._core.native import asyncio_cancel, cancel_message, failure_of
from otel_tasks._core.state import CancelKind, TaskStatus
from otel_tasks._core.task import cause_at_end, extras_of, request_cancel
from otel_tasks._core.telemetry.spans import link_next, prepare_attempts
from otel_tasks.exceptions import ManagerClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from otel_tasks._core.critical import OnGiveUp
    from otel_tasks._core.extras import Supervision
    from otel_tasks._core.group import TaskGroup
    from otel_tasks._core.options import NamedTaskOptions, OnConflict
    from otel_tasks._core.state import TaskPriority
    from otel_tasks._core.task import ManagedTask

T = TypeVar("T")

DEFAULT_POLICY = RestartPolicy()


async def start_supervisor(
    group: TaskGroup,
    name: str,
    factory: Callable[[], Coroutine[Any, Any, T]],
    policy: RestartPolicy,
    priority: TaskPriority | int,
    metadata: Mapping[str, Any] | None,
    on_conflict: OnConflict,
    *,
    drains: bool,
    on_give_up: OnGiveUp | None,
    critical: bool,
    consumer: Supervision | None = None,
) -> ManagedTask[T]:
    """Start a service in a labeled group; see ``TaskManager.start_service`` and ``start_consumer``."""
    check_repeatable(factory, "start_service", "a service may be restarted")
    check_on_give_up(on_give_up)
    check_flag("critical", critical)
    check_flag("drains", drains)
    kind = "service" if consumer is None else "consumer"
    checked_name(kind, name, 'name it after its work, as in start_service("prices", work)')
    if not isinstance(policy, RestartPolicy):
        raise TypeError(f"restart must be a RestartPolicy, got {policy!r}")
    service = Service(group, factory, policy, priority, metadata, drains=drains, takes_place=consumer is None)
    coro = service.run()
    task = await create_supervisor(group, kind, name, coro, priority, metadata, on_conflict)
    # Not with on_conflict="return", which may return another task.
    if task.get_coro() is coro:
        extras_of(task).supervision = consumer
        watch_service(task, on_give_up, critical=critical)
    return task


async def create_supervisor(
    group: TaskGroup,
    kind: str,
    name: str,
    coro: Coroutine[Any, Any, T],
    priority: TaskPriority | int,
    metadata: Mapping[str, Any] | None,
    on_conflict: OnConflict,
) -> ManagedTask[T]:
    """Create a task that only supervises others: it has no span, and takes no place.

    Args:
        group: A labeled group.
        kind: Its name in messages, such as "service".
        name: Its name.
        coro: Its coroutine; closed if the task is refused.
        priority: Its priority.
        metadata: Its metadata.
        on_conflict: What happens if a live task has the name.

    Raises:
        ValueError: The group is a scoped one.

    Cancellation: cancelling the caller while it waits for the task to replace creates no new task.
    """
    try:
        if group.scoped:
            raise ValueError(
                f"cannot start {kind} {name!r}: group {group.id!r} ends with its block or its request, and a "
                f"{kind} runs on; name a group of the manager"
            )
        if on_conflict == "replace":
            await group._clear_name(name, f"replaced by a new {kind} {name!r}")
            group._end_producer()
        where = group._open_group()
    except BaseException:
        close_quietly(coro)
        raise
    task = where._create(
        coro,
        name,
        priority,
        # Its group's default is meant for tasks that end.
        math.inf,
        None,
        metadata,
        on_conflict,
        None,
        # Not the caller's: the supervisor's log records would stand under the caller's trace for days.
        Context(),
        False,
        True,
        supervises=True,
        takes_place=False,
    )
    extras_of(task).takes_no_place = True
    where._ledger.supervisors.add(task)
    return task


async def create_supervised(
    supervisor: ManagedTask[Any],
    group: TaskGroup,
    coro: Coroutine[Any, Any, T],
    context: Context,
    number: int,
    priority: TaskPriority | int,
    metadata: Mapping[str, Any] | None,
    timeout: float,
    *,
    takes_place: bool = True,
) -> ManagedTask[T]:
    """Create the next task of a supervisor, as soon as the queue has room for it.

    Args:
        supervisor: The calling task; it ends cancelled if the manager is shut down.
        group: The labeled group of both.
        coro: The task's coroutine.
        context: The task runs in a copy.
        number: Counts the tasks of the supervisor, from 1 on.
        priority: The task's priority.
        metadata: The task's metadata.
        timeout: Seconds for the task; infinity for no limit, whatever the group sets.
        takes_place: Count the task against the limits of its group and its manager.

    Cancellation: cancelling the caller while it waits for room creates no task.
    """
    options: NamedTaskOptions = {
        "name": AttemptName(f"{supervisor.get_name()}#{number}"),
        "priority": priority,
        "metadata": metadata,
        "timeout": timeout,
        "trace": "new",
        "context": context.copy(),
        # It could fail before a service waits for it, and be reported as unawaited.
        "eager_start": False,
    }
    try:
        if takes_place:
            task = await group.put_task(coro, **options)
        else:
            task = group._create(coro, **options, takes_place=False)
            extras_of(task).takes_no_place = True
        extras_of(supervisor).attempt = task
        return task
    except ManagerClosedError:
        cause = group.cancel_event.cause or CancelCause.make(CancelKind.SHUTDOWN)
    end_cancelled(supervisor, cause)


class Service(Generic[T]):
    """One supervisor: it creates the attempts, waits for them, and decides about restarts."""

    def __init__(
        self,
        group: TaskGroup,
        factory: Callable[[], Coroutine[Any, Any, T]],
        policy: RestartPolicy,
        priority: TaskPriority | int,
        metadata: Mapping[str, Any] | None,
        *,
        drains: bool,
        takes_place: bool = True,
    ) -> None:
        self._drains = drains
        self._takes_place = takes_place
        self._group = group
        self._factory = factory
        self._policy = policy
        self._priority = priority
        self._metadata = metadata
        # Each attempt gets a copy, so that it does not see what another one has set.
        self._context = copy_context()
        # The trace of an attempt lasts as long as the attempt: what it starts has traces of its own.
        prepare_attempts(self._context)
        self._failures = Failures(policy)
        self._attempts = 0

    async def run(self) -> T:
        """Run attempts one after another until one is the last, and end as it did.

        Cancellation: is forwarded to the attempt; the service ends when the attempt has ended.
        """
        service = cast("ManagedTask[T]", asyncio.current_task())
        extras_of(service).runs_forever = not self._drains
        attempt: ManagedTask[T] | None = None
        failure: Exception | None = None
        try:
            while True:
                attempt = await self._start_attempt(service)
                await _until_ended(service, attempt)
                failure = self._failure_of(service, attempt)
                if failure is None:
                    return attempt.result()
                if not await self._back_off(service, attempt, failure):
                    raise failure
                # Its frames hold what the attempt has used: not while the next one runs, maybe for days.
                failure = None
        finally:
            extras_of(service).attempt = None
            # The exception refers to this frame: break the cycle.
            del service, attempt, failure

    async def _start_attempt(self, service: ManagedTask[T]) -> ManagedTask[T]:
        """Create the next attempt, as soon as the queue has room for it."""
        self._attempts += 1
        attempt = await create_supervised(
            service,
            self._group,
            self._context.run(make_attempt, self._factory, "start_service"),
            self._context,
            self._attempts,
            self._priority,
            self._metadata,
            math.inf,
            takes_place=self._takes_place,
        )
        extras_of(attempt).runs_forever = not self._drains
        return attempt

    def _failure_of(self, service: ManagedTask[T], attempt: ManagedTask[T]) -> Exception | None:
        """Return the failure that leads to another attempt; None if this one was the last."""
        error = None if attempt.cancelled() else attempt.exception()
        if isinstance(error, SystemExit | KeyboardInterrupt):
            # The loop has raised it to the code that runs the loop; the service does not raise it again.
            text = f"{attempt.name} raised {text_of(error, repr)}"
            end_cancelled(service, CancelCause.make(CancelKind.SIBLING_FAILED, text))
        if service.cancelling():
            return None
        if attempt.cancelled():
            return _failure_of_cancelled(service, attempt)
        if error is None and self._policy.on == "always" and not self._group.cancel_event.is_set():
            return RuntimeError(f"attempt {attempt.name!r} returned, but the service must not end")
        return error if isinstance(error, Exception) else None

    async def _back_off(self, service: ManagedTask[T], attempt: ManagedTask[T], failure: Exception) -> bool:
        """Wait until it is time for the next attempt; return False to give up."""
        event = self._group.cancel_event
        if event.cause is not None:
            _warn(service, attempt, failure, f"not restarted ({event.cause})")
            end_cancelled(service, event.cause)
        delay = self._failures.add(attempt._ended_at, _seconds_of(attempt))
        if delay is None:
            # A note, not a log record: the failure is reported as that of the service.
            failure.add_note(self._failures.given_up(service.id, _label_of(attempt)))
            return False
        _warn(service, attempt, failure, f"restarted in {delay:.3g} s")
        if attempt._span is not None:
            link_next(self._context, attempt._span, "restart_of")
        await sleep_unless_set(delay, event)
        if event.cause is not None:
            end_cancelled(service, event.cause)
        return True


class Failures:
    """Counts the failures of one service. It reads no clock, so tests of a policy need none."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._delays = Delays(policy)
        # The times of the last ``max_failures`` failures, oldest first.
        self._recent: deque[float] = deque(maxlen=policy.max_failures or 0)

    def add(self, now: float, ran: float) -> float | None:
        """Count one more failure.

        Args:
            now: The time of the failure.
            ran: How long the attempt ran, in seconds.

        Returns:
            Seconds until the next attempt; None to give up.
        """
        policy = self._policy
        self._recent.append(now)
        if len(self._recent) == policy.max_failures and now - self._recent[0] < policy.within:
            return None
        if ran >= policy.within:
            self._delays.start_over()
        return self._delays.next()

    def given_up(self, service: str, attempt: str) -> str:
        """Return the note for the last failure, that of ``attempt``."""
        policy = self._policy
        if policy.max_failures == 1:
            return f"service {service!r} gave up after one failure, that of {attempt}"
        return (
            f"service {service!r} gave up after {policy.max_failures} failures within {policy.within:g} s; "
            f"the last one was that of {attempt}"
        )


def make_attempt(factory: Callable[[], Coroutine[Any, Any, T]], caller: str) -> Coroutine[Any, Any, T]:
    """Call the factory that ``caller`` got; if it raises, the attempt fails.

    Raises:
        TypeError: It does not return a coroutine. That is an error of the caller, not a failure to retry.
    """
    try:
        made = factory()
    except Exception as error:
        return _fail(error)
    if not asyncio.iscoroutine(made):
        raise not_a_coroutine(factory, made, caller)
    return made


async def _fail(error: Exception) -> NoReturn:
    raise error


async def _until_ended(service: ManagedTask[Any], attempt: ManagedTask[Any]) -> None:
    """Wait for an attempt, and forward each cancellation of the service to it."""
    while not attempt.done():
        try:
            # With this the attempt counts as awaited. `await attempt` would do that too, but it forwards a
            # cancellation without its cause.
            await asyncio.wait([attempt])
        except asyncio.CancelledError:
            if attempt.done() and not attempt.cancelled() and failure_of(attempt) is None:
                # It has returned in this turn, so the cancellation is the service's alone.
                raise
            forward_cancel(service, attempt)


def forward_cancel(service: ManagedTask[Any], attempt: ManagedTask[Any]) -> None:
    """Cancel an attempt once for each cancellation of its service."""
    cause = cause_at_end(service, TaskStatus.CANCELLED)
    if (
        attempt._cause is not None
        and attempt._cause is cause
        and attempt.cancelling() >= service.cancelling()
    ):
        # Cancelling their group, or shutting the manager down, has cancelled both. The count alone does not
        # tell: a timeout inside the attempt raises it too, and lowers it again.
        return
    if cause is None or not request_cancel(attempt, cause):
        asyncio_cancel(attempt, cancel_message(service))


def end_cancelled(service: ManagedTask[Any], cause: CancelCause) -> NoReturn:
    """End a service as if the service itself had been cancelled."""
    request_cancel(service, cause)
    raise asyncio.CancelledError(str(cause))


def _failure_of_cancelled(service: ManagedTask[Any], attempt: ManagedTask[Any]) -> Exception | None:
    """Return the failure of an attempt that raised CancelledError without a request; None after a request."""
    cause = attempt.cause
    if cause is not None and cause.kind is not CancelKind.FOREIGN:
        request_cancel(service, cause)
        return None
    return failure_of_cancelled("attempt", attempt)


def failure_of_cancelled(kind: str, task: ManagedTask[Any]) -> Exception:
    """Return the failure of a task that ended with a CancelledError without a request."""
    failure = RuntimeError(f"{kind} {task.name!r} ended with a CancelledError that no request caused")
    try:
        task.result()
    except asyncio.CancelledError as error:
        # Its traceback shows what the task was waiting for.
        failure.__cause__ = error
    return failure


def _seconds_of(attempt: ManagedTask[Any]) -> float:
    """Return how long an ended attempt ran, without its wait for a place."""
    started_at = attempt.info().started_at
    return 0.0 if started_at is None else attempt._ended_at - started_at


def _warn(service: ManagedTask[Any], attempt: ManagedTask[Any], failure: Exception, fate: str) -> None:
    TaskLogger(attempt).warning(
        "service %s failed in %s and is %s",
        task_label(service),
        _label_of(attempt),
        fate,
        exc_info=exc_info_of(failure),
    )


def _label_of(attempt: ManagedTask[Any]) -> str:
    trace = f" (trace {attempt.trace_id})" if attempt.trace_id else ""
    return f"attempt {attempt.id!r}{trace}"


def check_repeatable(factory: object, caller: str, reason: str) -> None:
    """Raise a TypeError unless ``factory`` can make a coroutine for each attempt.

    Args:
        factory: What the user passed; closed if it is a coroutine.
        caller: The function that the user called.
        reason: Why a coroutine is not enough, for the message.
    """
    if asyncio.iscoroutine(factory):
        name = name_of_refused(factory)
        raise TypeError(
            f"{reason}, and the coroutine {name} runs only once: write {caller}(name, lambda: {name}(...))"
        )
    if not callable(factory):
        raise TypeError(
            f"{caller}() takes a function that returns a coroutine, got {factory!r}: "
            f"write {caller}(name, lambda: work(1))"
        )
