"""``managed_task``, the decorator that runs each call of a coroutine function as a managed task."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, overload

from otel_tasks._core.backoff import check_retry
from otel_tasks._core.checks import checked_name, checked_priority, checked_seconds
from otel_tasks._core.current import as_coroutine_function, bound_to, innermost
from otel_tasks._core.functions import create_task, current_manager
from otel_tasks._core.retry import retried
from otel_tasks._core.state import TaskPriority

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from otel_tasks._core.backoff import RetryPolicy
    from otel_tasks._core.binding import Binding
    from otel_tasks._core.manager import TaskManager
    from otel_tasks._core.task import ManagedTask

P = ParamSpec("P")
Q = ParamSpec("Q")
T = TypeVar("T")
S = TypeVar("S")


class ManagedFunction(Generic[P, T]):
    """A coroutine function whose calls run as managed tasks; ``managed_task`` creates it.

    A call and ``start()`` raise what ``create_task`` raises: ``GroupClosedError`` if the current group takes
    no new tasks, ``ManagerClosedError``, ``QueueFullError``, ``WrongLoopError``, and ``WrongThreadError``.
    They also raise what ``record`` raises. In all of these cases, the function does not run.
    """

    def __init__(
        self,
        function: Callable[P, Coroutine[Any, Any, T]],
        create: Callable[[Callable[[], Coroutine[Any, Any, T]], Mapping[str, Any] | None], ManagedTask[T]],
        record: Callable[..., Mapping[str, Any]] | None,
    ) -> None:
        self._function = function
        self._create = create
        self._record = record
        # A functools.partial has no name.
        name = getattr(function, "__name__", "_run")
        qualified = getattr(function, "__qualname__", name)
        self._shown_as = name, f"{getattr(function, '__module__', __name__)}.{qualified}"
        functools.update_wrapper(self, function)
        as_coroutine_function(self)

    @as_coroutine_function
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
        """Run the function as a managed task and return its result.

        The coroutine creates the task at its first step, in the group that is current at the call, even if
        ``asyncio.gather`` runs the coroutine in a plain task.

        Raises:
            GroupClosedError: The current group takes no new tasks.
            ManagerClosedError: The manager is shut down.
            QueueFullError: No place is free, and no more tasks may wait.
            TimeoutError: The task's ``timeout`` expired.
            WrongLoopError: The manager has live tasks in another loop.

        It also raises what the function raises.

        Cancellation: cancelling the caller cancels the task; the cancellation propagates when the task has
        ended.

        Telemetry: a span named after the task, from its creation to its end.

        Example:
            >>> await resize(640)
        """
        coro = _run(innermost(), functools.partial(self.start, *args, **kwargs))
        # For the task that runs it, and for Python's warning if nothing awaits it.
        named: Any = coro
        named.__name__, named.__qualname__ = self._shown_as
        return coro

    def start(self, *args: P.args, **kwargs: P.kwargs) -> ManagedTask[T]:
        """Start the function as a managed task and return the task without waiting.

        Raises:
            GroupClosedError: The current group takes no new tasks.
            ManagerClosedError: The manager is shut down.
            QueueFullError: No place is free, and no more tasks may wait.
            WrongLoopError: The manager has live tasks in another loop.
            WrongThreadError: No event loop runs in this thread.

        Telemetry: a span named after the task, from now to its end.

        Example:
            >>> task = resize.start(640)
        """
        metadata = None if self._record is None else self._record(*args, **kwargs)
        return self._create(functools.partial(self._function, *args, **kwargs), metadata)

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> ManagedFunction[P, T]: ...
    @overload
    def __get__(
        self: ManagedFunction[Concatenate[S, Q], T], instance: S, owner: type | None = None
    ) -> ManagedFunction[Q, T]: ...
    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Bind it to an instance, so that it works as a method: ``self.work.start(1)``."""
        if instance is None:
            return self
        record = None if self._record is None else functools.partial(self._record, instance)
        return ManagedFunction(self._function.__get__(instance, owner), self._create, record)


def _check_function(target: object) -> None:
    if inspect.iscoroutinefunction(target):
        return
    if isinstance(target, staticmethod | classmethod):
        hint = f"write @{type(target).__name__} above @managed_task"
    elif inspect.isasyncgenfunction(target):
        hint = "an async generator has no single result; iterate over it in a coroutine function"
    else:
        hint = "declare it with async def"
    raise TypeError(f"managed_task decorates a coroutine function, got {target!r}: {hint}")


async def _run(here: Binding | None, start: Callable[[], ManagedTask[T]]) -> T:
    with bound_to(here):
        task = start()
    return await task


@overload
def managed_task(function: Callable[P, Coroutine[Any, Any, T]], /) -> ManagedFunction[P, T]: ...
@overload
def managed_task(
    *,
    name: str | None = None,
    group: str | None = None,
    priority: TaskPriority | int = TaskPriority.NORMAL,
    timeout: float | None = None,
    retry: RetryPolicy | None = None,
    manager: TaskManager | None = None,
    record: Callable[..., Mapping[str, Any]] | None = None,
) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], ManagedFunction[P, T]]: ...
def managed_task(
    function: Callable[P, Coroutine[Any, Any, T]] | None = None,
    /,
    *,
    name: str | None = None,
    group: str | None = None,
    priority: TaskPriority | int = TaskPriority.NORMAL,
    timeout: float | None = None,
    retry: RetryPolicy | None = None,
    manager: TaskManager | None = None,
    record: Callable[..., Mapping[str, Any]] | None = None,
) -> Any:
    """Run each call of a coroutine function as a managed task.

    ``await work(1)`` runs it and returns its result; ``work.start(1)`` returns the task without waiting.

    Args:
        function: The coroutine function, if the decorator is used without parentheses.
        name: The name of its tasks; a second live task gets a number. None means the function's name.
        group: A labeled group of the manager. None means the current group, or the root of ``manager`` if
            that is set.
        priority: How urgent the tasks are.
        timeout: Seconds for each call, at least 0; then the task fails with ``TimeoutError``. None means no
            limit.
        retry: Which failures of a call lead to another attempt with the same arguments, and when. None means
            none.
        manager: The manager of its tasks. None means the manager of the request or managed task that calls
            the function, or else the global manager.
        record: Takes the arguments of each call and returns the metadata of its task. Without it, arguments
            are never recorded.

    Returns:
        The ``ManagedFunction``, or a decorator that creates one.

    Raises:
        TypeError: ``function`` is not a coroutine function, or an argument has the wrong type.
        ValueError: The name is not valid, the timeout is negative, or there is no such priority.

    Telemetry: a span for each call, named after the task.

    Example:
        >>> @managed_task(group="mail", timeout=30)
        ... async def send_mail(user: User) -> None: ...
    """
    if function is not None:
        return managed_task()(function)
    if name is not None:
        checked_name("task", name)
    checked_seconds("timeout", timeout)
    check_retry(retry)
    level = checked_priority(priority)

    def create(
        work: Callable[[], Coroutine[Any, Any, T]], metadata: Mapping[str, Any] | None
    ) -> ManagedTask[T]:
        if group is None and manager is None:
            coro = work() if retry is None else retried(work, retry)
            return create_task(coro, name=name, priority=level, timeout=timeout, metadata=metadata)
        owner = current_manager() if manager is None else manager
        # A function, because the group may have a policy.
        return owner._create_made(
            work, retry, group, name=name, priority=level, timeout=timeout, metadata=metadata
        )

    def decorate(target: Callable[P, Coroutine[Any, Any, T]]) -> ManagedFunction[P, T]:
        _check_function(target)
        return ManagedFunction(target, create, record)

    return decorate
