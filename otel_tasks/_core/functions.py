"""The functions of the package: they work in whatever is current where they are called."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

from otel_tasks._core.coroutines import close_quietly
from otel_tasks._core.current import (
    as_coroutine_function,
    current_group_or_none,
    current_root,
    set_global_root,
)
from otel_tasks._core.group import TaskGroup
from otel_tasks._core.manager import TaskManager
from otel_tasks._core.options import NamedTaskOptions, OnConflict, TaskOptions, with_options_of
from otel_tasks._core.service import DEFAULT_POLICY, RestartPolicy
from otel_tasks._core.state import TaskPriority
from otel_tasks._core.task import ManagedTask
from otel_tasks._core.threads import current_worker

if TYPE_CHECKING:
    import concurrent.futures
    from collections.abc import Callable, Coroutine, Mapping
    from typing import Unpack

    from otel_tasks._core.events import CancelEvent
    from otel_tasks._core.info import TaskInfo

T = TypeVar("T")
Args = TypeVarTuple("Args")

global_task_manager = TaskManager()
"""The manager that is current outside of requests and managed tasks."""
global_task_manager._ledger.in_code = "global_task_manager"
set_global_root(global_task_manager._root)


def current_manager() -> TaskManager:
    """The manager of the request or the managed task that runs here; elsewhere the global manager.

    In the thread of ``run_in_thread`` it is the task's manager. In a plain asyncio task of a request
    (``asyncio.gather`` makes such tasks) it is the request's manager.

    Example:
        >>> current_manager().create_task(send_mail(user), group="outbox")
    """
    return _owner(current_root())


def current_task() -> ManagedTask[Any] | None:
    """The managed task that runs here, or whose function does in its thread; None outside of one."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        worker = current_worker()
        return None if worker is None else worker.task
    return task if isinstance(task, ManagedTask) else None


def current_group() -> TaskGroup:
    """The group that ``create_task`` uses here: the request's, the enclosing task's, else the global root.

    In a plain asyncio task (``asyncio.gather`` makes such) it is the request's, if there is one.
    """
    return current_group_or_none() or global_task_manager._root


def current_cancel_event() -> CancelEvent:
    """The cancel event of the current group, to wait for or to look at between two steps.

    In the thread of ``run_in_thread`` the task's own, which is set when the task is cancelled too.
    """
    worker = current_worker()
    return current_group().cancel_event if worker is None else worker.event


@with_options_of(TaskGroup._create)
def create_task(
    coro: Coroutine[Any, Any, T],
    *,
    name: str | None = None,
    priority: TaskPriority | int = TaskPriority.NORMAL,
    **options: Unpack[TaskOptions],
) -> ManagedTask[T]:
    """Create a task in the current group; the parameters are those of ``TaskManager.create_task``.

    Example:
        >>> prices = create_task(fetch_prices(id), priority=TaskPriority.HIGH)
    """
    try:
        where = current_group()
    except BaseException:
        close_quietly(coro)
        raise
    if options:
        return where._create_with(coro, name, priority, options)
    return where.create_task(coro, name=name, priority=priority)


@with_options_of(TaskGroup._create)
def create_task_threadsafe(
    work: Coroutine[Any, Any, T] | Callable[[], Coroutine[Any, Any, T]], **options: Unpack[NamedTaskOptions]
) -> concurrent.futures.Future[T]:
    """Create a task in the current group from another thread; see ``TaskGroup.create_task_threadsafe``.

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
    return where.create_task_threadsafe(work, **options)


@with_options_of(TaskGroup._create)
def run_in_thread(
    function: Callable[[*Args], T],
    /,
    *args: *Args,
    abandon: bool = False,
    **options: Unpack[NamedTaskOptions],
) -> ManagedTask[T]:
    """Create a task in the current group that calls a plain function in a thread.

    See ``TaskGroup.run_in_thread``.

    Example:
        >>> digest = await run_in_thread(hash_file, path)
    """
    return current_group().run_in_thread(function, *args, abandon=abandon, **options)


def _owner(group: TaskGroup) -> TaskManager:
    manager = group._ledger.owner
    assert isinstance(manager, TaskManager)  # noqa: S101 - it narrows the type, which the ledger does not know
    return manager


def _manager_for(group: str | TaskGroup | None) -> TaskManager:
    """The manager of a group object; a name, or nothing, is looked up in the current manager."""
    return _owner(group) if isinstance(group, TaskGroup) else current_manager()


# By name, in the current manager. Plain functions that return a coroutine: the manager is that of the caller,
# not that of the task which runs the coroutine.


@as_coroutine_function
@with_options_of(TaskManager.start_task)
def start_task(
    name: str,
    factory: Callable[[], Coroutine[Any, Any, T]] | Coroutine[Any, Any, T],
    *,
    group: str | TaskGroup | None = None,
    priority: TaskPriority | int = TaskPriority.NORMAL,
    cancel_existing: bool = False,
    **options: Unpack[TaskOptions],
) -> Coroutine[Any, Any, ManagedTask[T]]:
    """Start a task by name in the current manager; the rest is as for ``TaskManager.start_task``.

    The current manager is that of the request or the managed task which calls this, else the global manager.
    The task belongs to the manager, not to the request.

    Args:
        name: Unique among the live tasks of the manager.
        factory: What makes the coroutine.
        group: A labeled group, by its name or itself; None is the manager's root.
        priority: How urgent.
        cancel_existing: The same as ``on_conflict="replace"``.
        **options: As for ``TaskManager.start_task``.

    Raises:
        TaskExistsError: A live task has the name, and ``on_conflict`` is ``"error"``.
        GroupClosedError: ``group`` takes no new tasks.
        ManagerClosedError: The manager is shut down.
        QueueFullError: No place is free, and no more tasks may wait.
        WrongLoopError: The manager has live tasks in another loop.

    **Cancellation**: of the caller, while it waits for the task to be replaced: no new task is started.

    Example:
        >>> await start_task("import", lambda: run_import(file))
        >>> await wait_for_task("import")
    """
    return _manager_for(group).start_task(
        name, factory, group=group, priority=priority, cancel_existing=cancel_existing, **options
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
) -> Coroutine[Any, Any, ManagedTask[T]]:
    """Start a service in the current manager; the parameters are those of ``TaskManager.start_service``.

    Raises:
        TaskExistsError: A live task has the name.
        ManagerClosedError: The manager is shut down.

    **Cancellation**: of the caller, while it waits for the service to be replaced: no new one is started.

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
    )


@as_coroutine_function
def wait_for_task(
    name: str, timeout: float | None = None, *, group: str | TaskGroup | None = None
) -> Coroutine[Any, Any, Any]:
    """Wait for a task of the current manager by name; see ``TaskManager.wait_for_task``.

    With a group object the manager is that of the group.

    Raises:
        TaskNotFoundError: No such task, or it has ended and its result was not kept.
        TimeoutError: It still runs after ``timeout``; it goes on running.
        WrongLoopError: The manager has live tasks in another loop.

    What else the task raised is raised here.

    **Cancellation**: of the caller leaves the task alone.
    """
    return _manager_for(group).wait_for_task(name, timeout, group=group)


@as_coroutine_function
def cancel_group(
    group: str | TaskGroup, reason: str | None = None, *, grace: float = 0.0, timeout: float | None = 10.0
) -> Coroutine[Any, Any, int]:
    """Cancel a group, which a name finds in the current manager; see ``TaskManager.cancel_group``.

    Raises:
        WrongLoopError: The manager has live tasks in another loop.

    **Cancellation**: of the caller ends the waiting; the tasks stay cancelled.
    """
    return _manager_for(group).cancel_group(group, reason, grace=grace, timeout=timeout)


@as_coroutine_function
def cancel_all_tasks(
    reason: str | None = None, *, grace: float = 0.0, timeout: float | None = 10.0
) -> Coroutine[Any, Any, int]:
    """Cancel every task of the current manager; see ``TaskManager.cancel_all_tasks``.

    Raises:
        WrongLoopError: The manager has live tasks in another loop.

    **Cancellation**: of the caller ends the waiting; the tasks stay cancelled.
    """
    return current_manager().cancel_all_tasks(reason, grace=grace, timeout=timeout)


def get_all_task_info() -> dict[str, TaskInfo]:
    """Give snapshots of all tasks of the current manager by id; see ``TaskManager.get_all_task_info``."""
    return current_manager().get_all_task_info()
