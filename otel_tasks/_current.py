"""What is current: the one ContextVar, and the one rule by which everything finds its group and its manager.

The rule, from the inside out:

1. What the context binds: a request, or the group of a task that a request has started in another group.
2. The group of the managed task that runs here.
3. The group of the managed task whose function runs in this thread.
4. Nothing: then new tasks belong to the root of the global manager.

A plain asyncio task inherits 1 with its context, and nothing of 2.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from otel_tasks._task import ManagedTask
from otel_tasks._threads import current_worker

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from otel_tasks._group import TaskGroup
    from otel_tasks._manager import TaskManager

F = TypeVar("F", bound="Callable[..., Any]")


class Binding(Protocol):
    """What stands for the current group in a context: a group, or what makes one when it is needed."""

    @property
    def task_group(self) -> TaskGroup:
        """The group that new tasks join."""
        ...

    @property
    def manager(self) -> TaskManager:
        """The manager of that group; asking for it makes no group."""
        ...


# Set where the current task alone does not tell the group: in a request's handler, and in
# tasks that were started from one into another group.
_bound: ContextVar[Binding | None] = ContextVar("otel_tasks_group", default=None)

_global_manager: TaskManager


def set_global_manager(manager: TaskManager) -> None:
    """Name the manager that is current where no other is; `_manager`, above this module, does so once."""
    global _global_manager
    _global_manager = manager


def innermost() -> Binding | None:
    """Find what decides here which group and which manager are current; None where nothing does."""
    bound = _bound.get()
    if bound is not None:
        return bound
    try:
        task = asyncio.current_task()
    except RuntimeError:
        worker = current_worker()
        return None if worker is None else worker.task._group
    return task._group if isinstance(task, ManagedTask) else None


def current_group_or_none() -> TaskGroup | None:
    """The group that new tasks join here; None where there is none but the global manager's root."""
    here = innermost()
    return None if here is None else here.task_group


def current_manager() -> TaskManager:
    """The manager of the request or the managed task that runs here; elsewhere the global manager.

    In the thread of ``run_in_thread`` it is the task's manager. In a plain asyncio task of a request
    (``asyncio.gather`` makes such tasks) it is the request's manager.

    Example:
        >>> current_manager().create_task(send_mail(user), group="outbox")
    """
    here = innermost()
    return _global_manager if here is None else here.manager


@contextmanager
def bound_to(here: Binding | None) -> Generator[None]:
    """Make ``here`` current in the block, unless the context binds something itself."""
    if here is None or _bound.get() is not None:
        yield
        return
    token = _bound.set(here)
    try:
        yield
    finally:
        _bound.reset(token)


def as_coroutine_function(function: F) -> F:
    """Mark a plain function that returns a coroutine, so that frameworks do not call it in a thread.

    Such a function decides at its call what is current. A coroutine function would decide at its first step,
    which may run in a plain task: ``asyncio.gather(start_task(...))``.
    """
    if sys.version_info >= (3, 12):
        return inspect.markcoroutinefunction(function)
    vars(function)["_is_coroutine"] = vars(asyncio.coroutines)["_is_coroutine"]
    return function
