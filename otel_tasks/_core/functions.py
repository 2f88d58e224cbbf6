"""The functions of the package: each uses the manager or the group that is current where it is called."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple, overload

from otel_tasks._core.coroutines import close_quietly
from otel_tasks._core.current import (
    as_coroutine_function,
    current_group_or_none,
    current_root,
    set_global_root,
)
from otel_tasks._core.group import TaskGroup
from otel_tasks._core.manager import TaskManager
from otel_tasks._core.options import (
    NamedTaskOptions,
    OnConflict,
    RetriedTaskOptions,
    TaskOptions,
    with_options_of,
)
from otel_tasks._core.service import DEFAULT_POLICY
from otel_tasks._core.state import TaskPriority
from otel_tasks._core.task import ManagedTask
from otel_tasks._core.threads import current_worker

if TYPE_CHECKING:
    import concurrent.futures
    from collections.abc import Callable, Coroutine, Mapping
    from typing import Unpack

    from otel_tasks._core.backoff import RestartPolicy, RetryPolicy
    from otel_tasks._core.critical import OnGiveUp
    from otel_tasks._core.events import CancelEvent
    from otel_tasks._core.info import TaskInfo

T = TypeVar("T")
Args = TypeVarTuple("Args")

global_task_manager = TaskManager()
"""The manager that is current outside of requests and managed tasks."""
global_task_manager._ledger.in_code = "global_task_manager"
set_global_root(global_task_manager._root)


def current_manager() -> TaskManager:
    """Return the manager of the request or managed task that runs here, or else the global manager.

    In a thread of ``run_in_thread``, it is the manager of the task. In a plain asyncio task of a request
    (``asyncio.gather`` creates such tasks), it is the manager of the request.

    Example:
        >>> current_manager().create_task(send_mail(user), group="outbox")
    """
    return _owner(current_root())


def current_task() -> ManagedTask[Any] | None:
    """Return the managed task that runs here; None outside of one.

    In a thread of ``run_in_thread``, it is the task whose function runs there.

    Example:
        >>> current_task().progress.update(3, total=10)
    """
    try:
        task = asyncio.current_task()
    except RuntimeError:
        worker = current_worker()
        return None if worker is None else worker.task
    return task if isinstance(task, ManagedTask) else None


def current_group() -> TaskGroup:
    """Return the group that ``create_task`` uses here.

    It is the group of the request or of the managed task that runs here, or else the root of the global
    manager. In a plain asyncio task (``asyncio.gather`` creates them), it is the group of its request, if
    there is one.

    Example:
        >>> current_group().cancel("not needed anymore")
    """
    return current_group_or_none() or global_task_manager._root


def current_cancel_event() -> CancelEvent:
    """Return the cancel event of the current group, to await or to check between two steps.

    In a thread of ``run_in_thread``, it is the task's own event, which is also set when the task is
    cancelled.

    Example:
        >>> while not current_cancel_event().is_set():
        ...     index(await queue.get())
    """
    worker = current_worker()
    return current_group().cancel_event if worker is None else worker.event


@overload
def create_task(
    coro: Coroutine[Any, Any, T],
    *,
    name: str | None = None,
    priority: TaskPriority | int = TaskPriority.NORMAL,
    **options: Unpack[TaskOptions],
) -> ManagedTask[T]: ...
@overload
def create_task(
    coro: Callable[[], Coroutine[Any, Any, T]],
    *,
    retry: RetryPolicy,
    name: str | None = None,
    priority: TaskPriority | int = TaskPriority.NORMAL,
    **options: Unpack[TaskOptions],
) -> ManagedTask[T]: ...
@with_options_of(TaskGroup._create)
def create_task(
    coro: Coroutine[Any, Any, T] | Callable[[], Coroutine[Any, Any, T]],
    *,
    name: str | None = None,
    priority: TaskPriority | int = TaskPriority.NORMAL,
    **options: Unpack[RetriedTaskOptions],
) -> ManagedTask[T]:
    """Create a task in the current group: that of the request or of the managed task that calls it.

    ``help(otel_tasks)`` shows where a task goes, and what ends it, for each way to start one. Outside of
    requests and managed tasks, the current group is the root of the global manager.

    Args:
        coro: The coroutine to run; closed if the task is refused. With ``retry``, a function that makes it.
        name: Unique among the live tasks of the group. None means the function's name, with a number if that
            name is taken.
        priority: How urgent the task is.
        **options: As for ``TaskManager.create_task``.

    Raises:
        GroupClosedError: The current group takes no new tasks.
        ManagerClosedError: The manager is shut down.
        QueueFullError: No place is free, and no more tasks may wait.
        WrongThreadError: No event loop runs in this thread.
        WrongLoopError: The manager has live tasks in another loop.
        TypeError: ``coro`` is not a coroutine, or an option has the wrong type.
        ValueError: An option is out of its range.

    Telemetry: a span named after the task, from now to the task's end.

    Example:
        >>> prices = create_task(fetch_prices(id), priority=TaskPriority.HIGH)
    """
    try:
        where = current_group()
    except BaseException:
        close_quietly(coro)
        raise
    return where._create_task(coro, name, priority, options)


@with_options_of(TaskGroup._create)
def create_task_threadsafe(
    work: Coroutine[Any, Any, T] | Callable[[], Coroutine[Any, Any, T]],
    *,
    retry: RetryPolicy | None = None,
    **options: Unpack[NamedTaskOptions],
) -> concurrent.futures.Future[T]:
    """Create a task in the current group from another thread; see ``TaskGroup.create_task_threadsafe``.

    Args:
        work: A coroutine, or a function that returns one; the function is called in the event loop.
        retry: As for ``create_task``; ``work`` must then be a function.
        **options: As for ``create_task``.

    Returns:
        A future that ends with the task; its ``cancel()`` cancels the task.

    Raises:
        GroupClosedError: The current group takes no new tasks.
        ManagerClosedError: The manager is shut down.
        WrongLoopError: The manager has not been used in an event loop yet, or that loop is closed.
        TypeError: ``work`` is neither a coroutine nor a function, or an option has the wrong type.
        ValueError: An option is out of its range.

    Telemetry: as for ``create_task``; the span belongs to the trace of the calling thread.

    Example:
        >>> @app.get("/report")
        ... def report():
        ...     return create_task_threadsafe(fetch_report()).result()
    """
    try:
        where = current_group()
    except BaseException:
        close_quietly(work)
        raise
    return where.create_task_threadsafe(work, retry=retry, **options)


@with_options_of(TaskGroup._create)
def run_in_thread(
    function: Callable[[*Args], T],
    /,
    *args: *Args,
    abandon: bool = False,
    retry: RetryPolicy | None = None,
    **options: Unpack[NamedTaskOptions],
) -> ManagedTask[T]:
    """Create a task in the current group that calls a plain function in a thread.

    Args:
        function: The function to call.
        *args: Its arguments.
        abandon: True ends a cancelled task at once, and its thread runs on; False waits for the function.
            See ``TaskGroup.run_in_thread``.
        retry: Which failures lead to another call of the function, and when. None means none.
        **options: As for ``create_task``.

    Returns:
        The task; its result is what the function returns.

    Raises:
        GroupClosedError: The current group takes no new tasks.
        ManagerClosedError: The manager is shut down.
        QueueFullError: No place is free, and no more tasks may wait.
        TypeError: ``function`` is not a plain function, or an option has the wrong type.
        ValueError: An option is out of its range.

    Telemetry: as for ``create_task``; spans of the function are below the task's span.

    Example:
        >>> digest = await run_in_thread(hash_file, path)
    """
    return current_group().run_in_thread(function, *args, abandon=abandon, retry=retry, **options)


def _owner(group: TaskGroup) -> TaskManager:
    manager = group._ledger.owner
    assert isinstance(manager, TaskManager)  # noqa: S101 - it narrows the type, which the ledger cannot name
    return manager


def _manager_for(group: str | TaskGroup | None) -> TaskManager:
    """Return the manager of a group object, or the current manager, which looks up a name."""
    return _owner(group) if isinstance(group, TaskGroup) else current_manager()


# These look names up in the current manager. They are plain functions that return a coroutine, so that the
# manager is that of the caller, not that of the task that runs the coroutine.


@as_coroutine_function
@with_options_of(TaskManager.start_task)
def start_task(
    name: str,
    factory: Callable[[], Coroutine[Any, Any, T]] | Coroutine[Any, Any, T],
    *,
    group: str | TaskGroup | None = None,
    priority: TaskPriority | int = TaskPriority.NORMAL,
    cancel_existing: bool = False,
    retry: RetryPolicy | None = None,
    **options: Unpack[TaskOptions],
) -> Coroutine[Any, Any, ManagedTask[T]]:
    """Start a task by name in the current manager; see ``TaskManager.start_task``.

    The current manager is that of the request or managed task that calls this, or else the global manager.
    The task belongs to the manager, not to the request.

    Args:
        name: Unique among the live tasks of the manager.
        factory: Returns the coroutine: ``lambda: work(1)``, or the coroutine function itself.
        group: A labeled group, by its name or as an object. None means the manager's root.
        priority: How urgent the task is.
        cancel_existing: The same as ``on_conflict="replace"``.
        retry: As for ``TaskManager.create_task``; ``factory`` must then be a function.
        **options: As for ``TaskManager.start_task``.

    Returns:
        The live task. ``start_task`` does not wait for its end.

    Raises:
        TaskExistsError: A live task has the name, and ``on_conflict`` is ``"error"``.
        GroupClosedError: ``group`` takes no new tasks.
        ManagerClosedError: The manager is shut down.
        QueueFullError: No place is free, and no more tasks may wait.
        WrongLoopError: The manager has live tasks in another loop.

    Cancellation: cancelling the caller while it waits for the end of the task to replace starts no new task;
    the old task stays cancelled.

    Telemetry: as for ``create_task``.

    Example:
        >>> await start_task("import", lambda: run_import(file))
        >>> await wait_for_task("import")
    """
    return _manager_for(group).start_task(
        name,
        factory,
        group=group,
        priority=priority,
        cancel_existing=cancel_existing,
        retry=retry,
        **options,
    )


@as_coroutine_function
def start_service(
    name: str,
    factory: Callable[[], Coroutine[Any, Any, T]],
    *,
    restart: RestartPolicy = DEFAULT_POLICY,
    group: str | TaskGroup | None = None,
    priority: TaskPriority | int = TaskPriority.CRITICAL,
    metadata: Mapping[str, Any] | None = None,
    on_conflict: OnConflict = "error",
    drains: bool = False,
    on_give_up: OnGiveUp | None = None,
    critical: bool = False,
) -> Coroutine[Any, Any, ManagedTask[T]]:
    """Start a service in the current manager; the parameters are those of ``TaskManager.start_service``.

    Returns:
        The service, a task that supervises the attempts.

    Raises:
        TaskExistsError: A live task has the name.
        ManagerClosedError: The manager is shut down.

    Cancellation: cancelling the caller while it waits for the end of the service to replace starts no new
    service; the old one stays cancelled.

    Telemetry: a span for each attempt, in a trace of its own.

    Example:
        >>> await start_service("prices", refresh_prices, restart=RestartPolicy(max_delay=30))
    """
    return _manager_for(group).start_service(
        name,
        factory,
        restart=restart,
        group=group,
        priority=priority,
        metadata=metadata,
        on_conflict=on_conflict,
        drains=drains,
        on_give_up=on_give_up,
        critical=critical,
    )


@as_coroutine_function
def wait_for_task(
    name: str, timeout: float | None = None, *, group: str | TaskGroup | None = None
) -> Coroutine[Any, Any, Any]:
    """Wait for a task of the current manager by name; see ``TaskManager.wait_for_task``.

    Args:
        name: The task's name, id, or uid.
        timeout: Seconds, at least 0. None means no limit.
        group: Look in this group alone. A group object also selects its manager.

    Raises:
        TaskNotFoundError: There is no such task, or it has ended and its result was not kept.
        TimeoutError: The task has not ended after ``timeout``; it continues to run.
        WrongLoopError: The manager has live tasks in another loop.

    It also raises what the task raised.

    Cancellation: cancelling the caller ends the wait; the task continues.

    Example:
        >>> rows = await wait_for_task("import", timeout=30.0)
    """
    return _manager_for(group).wait_for_task(name, timeout, group=group)


@as_coroutine_function
def cancel_group(
    group: str | TaskGroup, reason: str | None = None, *, grace: float = 0.0, timeout: float | None = 10.0
) -> Coroutine[Any, Any, int]:
    """Cancel a group and wait for its tasks; see ``TaskManager.cancel_group``.

    Args:
        group: A group object, or the name or id of a group of the current manager.
        reason: Recorded with the cause of each task.
        grace: Seconds between the cancel event and the cancellation, at least 0; 0 cancels immediately.
        timeout: Seconds to wait for the tasks' end after that, at least 0. None means no limit.

    Returns:
        How many tasks the cancellation ended.

    Raises:
        WrongLoopError: The manager has live tasks in another loop.

    Cancellation: cancelling the caller ends the grace or the wait; the tasks are cancelled.

    Example:
        >>> await cancel_group("ingest", reason="no longer wanted")
    """
    return _manager_for(group).cancel_group(group, reason, grace=grace, timeout=timeout)


@as_coroutine_function
def cancel_all_tasks(
    reason: str | None = None, *, grace: float = 0.0, timeout: float | None = 10.0
) -> Coroutine[Any, Any, int]:
    """Cancel every task of the current manager and wait for them; see ``TaskManager.cancel_all_tasks``.

    Returns:
        How many tasks the cancellation ended.

    Raises:
        WrongLoopError: The manager has live tasks in another loop.

    Cancellation: cancelling the caller ends the grace or the wait; the tasks are cancelled.

    Example:
        >>> await cancel_all_tasks(reason="reload")
    """
    return current_manager().cancel_all_tasks(reason, grace=grace, timeout=timeout)


def get_all_task_info() -> dict[str, TaskInfo]:
    """Return snapshots of all tasks of the current manager by id; see ``TaskManager.get_all_task_info``.

    Example:
        >>> [info.id for info in get_all_task_info().values() if info.status == "failed"]
    """
    return current_manager().get_all_task_info()
