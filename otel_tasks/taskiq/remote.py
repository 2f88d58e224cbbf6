"""remote: calls a task of a managed broker as a coroutine of this process."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeAlias, TypeVar, cast, overload

from taskiq.decor import AsyncTaskiqDecoratedTask
from taskiq.exceptions import ResultGetError
from taskiq.kicker import AsyncKicker
from taskiq.result_backends.dummy import DummyResultBackend

from otel_tasks import CancelCause, CancelKind, current_task
from otel_tasks._core.clock import now
from otel_tasks._core.constructs import known_cause
from otel_tasks._core.coroutines import name_of_refused
from otel_tasks._core.task import own_coroutine, request_cancel
from otel_tasks._core.telemetry import span_from_hex
from otel_tasks.fleet.entries import CancelEntry
from otel_tasks.taskiq.broker import managed_broker_of
from otel_tasks.taskiq.errors import BrokerStoppedError, RemoteCancelledError, RemoteResultError
from otel_tasks.taskiq.functions import plain_name
from otel_tasks.taskiq.labels import CAUSE, TRACEBACK
from otel_tasks.taskiq.sending import Sending, current_sending

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from types import CoroutineType

    from taskiq import AsyncTaskiqTask, TaskiqResult

    from otel_tasks import ManagedTask
    from otel_tasks.taskiq.broker import ManagedBroker
    from otel_tasks.taskiq.calls import Call

P = ParamSpec("P")
T = TypeVar("T")

RemoteTask: TypeAlias = AsyncTaskiqDecoratedTask[P, T] | AsyncKicker[P, T]

# Seconds between two attempts to read a saved result, and the number of attempts.
_READ_PAUSE = 0.5
_READ_TRIES = 20


@overload
def remote(
    task: RemoteTask[P, CoroutineType[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs
) -> Coroutine[Any, Any, T]: ...
@overload
def remote(
    task: RemoteTask[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs
) -> Coroutine[Any, Any, T]: ...
@overload
def remote(task: RemoteTask[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]: ...
def remote(task: Any, /, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, Any]:
    """Create a coroutine that runs a task on a worker and returns its result.

    Pass it to ``create_task`` or ``start_task`` like any other coroutine: it joins a group, has a name, a
    priority, and a timeout, and reports the worker's progress. If it is cancelled, the task on the worker is
    cancelled with the same cause, even while its message waits in the broker's queue.

    Args:
        task: A task of a managed broker, or its ``kicker()`` with more labels.
        args: The arguments of its function.
        kwargs: The keyword arguments of its function.

    Returns:
        A coroutine, which sends nothing until it runs. It returns what the function on the worker returns,
        and raises the function's error as the result backend restores it. It raises
        ``RemoteCancelledError`` if someone else cancels the task on the worker; a managed task that
        consists only of this call ends cancelled instead.

    Raises:
        TypeError: ``task`` is not a task of Taskiq.
        RuntimeError: Its broker is not managed, not started, or has no result backend.

    Cancellation: publishes the cancellation and ends immediately, without waiting for the worker.

    Telemetry: no span of its own. The span of the local task is the parent of the worker's.

    Example:
        >>> pages = [tasks.create_task(remote(render, page), timeout=30) for page in range(8)]
    """
    kicker = _kicker_of(task)
    managed_broker = _managed_broker_of(kicker, task)
    name = kicker.task_name.rpartition(":")[2] or kicker.task_name
    coro = cast("Any", _call(managed_broker, kicker, name, args, kwargs))
    coro.__name__, coro.__qualname__ = name, kicker.task_name.replace(":", ".")
    return cast("Coroutine[Any, Any, Any]", coro)


async def _call(
    managed_broker: ManagedBroker,
    kicker: AsyncKicker[..., Any],
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    task = current_task()
    is_whole = task is not None and getattr(own_coroutine(task), "cr_code", None) is _call.__code__
    task_id = kicker.custom_task_id or managed_broker.broker.id_generator()
    keeper = managed_broker.fleet.keeper
    call = managed_broker.calls.open(task_id, task if is_whole else None)
    try:
        await keeper.hold_lease()
        try:
            sending = _sending(call, task, name if is_whole else None)
            # A copy: the same kicker may be used for other calls.
            sent = await _send(managed_broker, copy.copy(kicker).with_task_id(task_id), sending, args, kwargs)
            await call.ended
            result = call.result or await _read(call, sent)
        finally:
            keeper.drop_lease()
    except BaseException as error:
        if not call.has_ended:
            _cancel(managed_broker, call, error)
        raise
    finally:
        managed_broker.calls.close(call)
    if not result.is_err:
        return result.return_value
    cause = _cause_in(result)
    if cause is None or cause.kind is CancelKind.TIMEOUT:
        _raise(result)
    if task is not None and is_whole:
        request_cancel(task, cause)
        # Where the cancellation is delivered.
        await asyncio.sleep(0)
    raise RemoteCancelledError(f"the task {name!r} on the worker was cancelled ({cause})")


async def _send(
    managed_broker: ManagedBroker,
    kicker: AsyncKicker[..., Any],
    sending: Sending,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> AsyncTaskiqTask[Any]:
    task = asyncio.current_task()
    before = 0 if task is None else task.cancelling()
    token = current_sending.set(sending)
    try:
        sent = await kicker.kiq(*args, **kwargs)
    finally:
        current_sending.reset(token)
    if task is not None and task.cancelling() > before:
        # The client of the broker has swallowed the cancellation (seen with redis-py 8.1 under load).
        raise asyncio.CancelledError
    return sent


def _sending(call: Call, task: ManagedTask[Any] | None, function: str | None) -> Sending:
    """Return what a local task passes on; its name only if it consists of the call to ``function``."""
    host = call.host
    if task is None:
        return Sending(call.task_id, call.delivery, host, None, None, None, None)
    deadline = task.deadline
    timeout = None if deadline is None else max(0.0, deadline - asyncio.get_running_loop().time())
    name = None if function is None else _given_name(task, function)
    return Sending(call.task_id, call.delivery, host, name, _group_name(task), task.priority, timeout)


def _given_name(task: ManagedTask[Any], function: str) -> str | None:
    """Return the name that the user gave the task; None if it comes from the function's name."""
    name = task.name
    if name == function:
        return None
    base, _, number = name.rpartition("-")
    return None if base == function and number.isdecimal() else name


def _group_name(task: ManagedTask[Any]) -> str | None:
    """Return the name of the task's group, as a label; None if it cannot be one."""
    group = task.group
    if group.name == "root" or (group.scoped and "." in group.name):
        # A label's dots nest; those of a route or a block do not.
        return None
    return group.name


# -- the result -----------------------------------------------------------------------------------


async def _read(call: Call, sent: AsyncTaskiqTask[Any]) -> TaskiqResult[Any]:
    failed: ResultGetError | None = None
    for number in range(_READ_TRIES):
        if number:
            await asyncio.sleep(_READ_PAUSE)
        try:
            result = await sent.get_result()
        except ResultGetError as error:
            failed = error
            continue
        if call.owns(result):
            return result
        failed = None
    reason = "cannot be read" if failed else "is not there, but that of another call with this id"
    raise RemoteResultError(f"the remote task {sent.task_id} has ended, and its result {reason}") from failed


def _cause_in(result: TaskiqResult[Any]) -> CancelCause | None:
    """Return the cause with which the worker's task was cancelled; None if it was not."""
    text = result.labels.get(CAUSE)
    try:
        data: Any = json.loads(text) if isinstance(text, str) else None
        if not isinstance(data, dict):
            return None
        kind = CancelKind(data.get("kind", ""))
    except ValueError:
        return None
    origin = span_from_hex(data.get("trace_id"), data.get("span_id"))
    return CancelCause(kind, data.get("message"), data.get("asked_by"), now(), origin)


def _raise(result: TaskiqResult[Any]) -> NoReturn:
    error = result.error
    if error is None:
        error = RemoteResultError("the remote task failed, and its result has no error")
    text = result.labels.get(TRACEBACK)
    # In one process, the error has its traceback.
    if isinstance(text, str) and error.__traceback__ is None:
        error.add_note(f"On the worker:\n{text}")
    raise error


# -- the cancellation -----------------------------------------------------------------------------


def _cancel(managed_broker: ManagedBroker, call: Call, error: BaseException) -> None:
    """Publish the cancellation of a call that ends before its result; the link sends it when it can."""
    cause = _cause_of(error)
    entry = CancelEntry.from_cause(cause, node=call.host, target="message", name=call.task_id)
    # Without a running loop, as when a forgotten coroutine is closed, or after the end of the fleet, nothing
    # is left that could send it.
    with contextlib.suppress(RuntimeError):
        managed_broker.fleet.link.post(entry)


def _cause_of(error: BaseException) -> CancelCause:
    if isinstance(error, BrokerStoppedError):
        return CancelCause.make(CancelKind.SHUTDOWN, "the broker was shut down")
    if not isinstance(error, asyncio.CancelledError):
        return CancelCause.make(CancelKind.EXPLICIT, f"the call failed: {type(error).__name__}")
    task = asyncio.current_task()
    cause = None if task is None else known_cause(task)
    return cause or CancelCause.make(CancelKind.EXPLICIT, str(error) or None)


# -- wrong arguments ------------------------------------------------------------------------------


def _kicker_of(task: object) -> AsyncKicker[..., Any]:
    if isinstance(task, AsyncKicker):
        return task
    if isinstance(task, AsyncTaskiqDecoratedTask):
        return task.kicker()
    if asyncio.iscoroutine(task):
        name = plain_name(name_of_refused(task))
        raise TypeError(
            f"remote() takes a task and its arguments, got a coroutine: write remote({name}, ...)"
        )
    name = getattr(task, "__name__", repr(task))
    what = f"the function {name}: decorate it with @broker.task" if callable(task) else repr(task)
    raise TypeError(f"remote() takes a task of a managed broker, got {what}")


def _managed_broker_of(kicker: AsyncKicker[..., Any], task: object) -> ManagedBroker:
    managed_broker = managed_broker_of(kicker.broker)
    name = kicker.task_name
    if managed_broker is None:
        raise RuntimeError(f"remote({name}) needs a managed broker: write broker = managed(broker, fleet)")
    if isinstance(kicker.broker.result_backend, DummyResultBackend):
        raise RuntimeError(
            f"remote({name}) needs a result backend: write "
            "broker.with_result_backend(RedisAsyncResultBackend(url)); without one, use kiq()"
        )
    if not managed_broker.is_started:
        raise RuntimeError(
            f"remote({name}) needs a started broker: write `await broker.startup()` at the start"
        )
    return managed_broker
