"""The current group and manager: one rule finds both, everywhere.

The rule, from the inside out:

1. The binding of the context: a request, or the group of a task that a request has started in another group.
2. The group of the managed task that is running.
3. The group of the managed task whose function runs in this thread.
4. Otherwise nothing is current, and new tasks belong to the root of the global manager.

A plain asyncio task inherits the binding (1) with its context, but not the running task's group (2).
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from otel_tasks._core.binding import current_binding, worker_here

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from otel_tasks._core.binding import Binding

F = TypeVar("F", bound="Callable[..., Any]")
G = TypeVar("G", bound="Group")

# ManagedTask. Its module imports this one, and sets it once.
_managed_task: type[Any]
# The root group of the global manager, which is current if nothing else is; `functions` sets it once.
_global_root: Any


def set_managed_task(task_class: type[Any]) -> None:
    """Set the class of the tasks that have a group."""
    global _managed_task
    _managed_task = task_class


def set_global_root(root: object) -> None:
    """Set the group that is current if no other group is."""
    global _global_root
    _global_root = root


class Group(Protocol):
    """What this module reads of a group: whether it takes new tasks, and where to look for one that does."""

    @property
    def _refusal(self) -> str | None: ...

    @property
    def _binding(self) -> Binding | None: ...

    @property
    def _parent(self) -> Group | None: ...


def innermost() -> Binding | None:
    """Find the binding that decides which group and manager are current; None if the global manager is."""
    bound = current_binding.get()
    if bound is not None:
        return bound
    try:
        task = asyncio.current_task()
    except RuntimeError:
        worker = worker_here.get()
        return None if worker is None else worker.binding
    here: Any = task
    group: Binding | None = here._group if isinstance(here, _managed_task) else None
    return group


def current_root() -> Any:
    """The root group of the manager that is current here."""
    here = innermost()
    return _global_root if here is None else here.manager._root


def current_group_or_none() -> Any:
    """The ``TaskGroup`` that new tasks join here; None if only the global manager's root is left."""
    here = innermost()
    if here is None:
        return None
    group = here.task_group
    return group if group._refusal is None else nearest_open(group)


def stand_in(group: G) -> G:
    """The group that takes a task meant for ``group``: another one during the cleanup of a request."""
    if group._refusal is None or group._binding is None:
        return group
    request = group._binding._request
    # The binding of a request that is over and gone knows the root.
    taker: G = group._binding.task_group if request is None else request.stand_in(group)
    return taker


def nearest_open(group: Any) -> Any:
    """The group that new tasks join if ``group``, the current one, is closed.

    Code that is being cancelled may start tasks for its cleanup. They join the nearest group above that still
    takes tasks; in a request, that is the group for its cleanup.
    """
    node = group
    while node is not None and node._refusal is not None:
        if node._binding is not None:
            return stand_in(node)
        node = node._parent if is_being_cancelled() else None
    return node or group


def is_being_cancelled() -> bool:
    """True if the caller is in a ``finally`` or an ``except`` that a cancellation propagates through.

    After an ``except`` that has swallowed the cancellation, it is False.
    """
    return in_flight(lambda error: isinstance(error, asyncio.CancelledError | GeneratorExit))


def in_flight(is_wanted: Callable[[BaseException], bool]) -> bool:
    """Check whether the caller handles a wanted exception, or one that has replaced or contains it."""
    pending = [sys.exception()]
    # By their ids: exceptions may refer to each other in a cycle, and their classes may define equality.
    seen = set[int]()
    # The loop below extends the list.
    for exception in pending:
        if exception is None or id(exception) in seen:
            continue
        seen.add(id(exception))
        if is_wanted(exception):
            return True
        inner = exception.exceptions if isinstance(exception, BaseExceptionGroup) else ()
        pending.extend((exception.__context__, exception.__cause__, *inner))
    return False


@contextmanager
def bound_to(here: Binding | None) -> Generator[None]:
    """Make ``here`` current in the block, unless the context already has a binding."""
    if here is None or current_binding.get() is not None:
        yield
        return
    token = current_binding.set(here)
    try:
        yield
    finally:
        current_binding.reset(token)


def as_coroutine_function(function: F) -> F:
    """Mark a plain function that returns a coroutine, so that frameworks do not call it in a thread.

    Such a function finds the current group when it is called. A coroutine function would find it in its first
    step, which may run in a plain task: ``asyncio.gather(start_task(...))``.
    """
    if sys.version_info >= (3, 12):
        return inspect.markcoroutinefunction(function)
    vars(function)["_is_coroutine"] = vars(asyncio.coroutines)["_is_coroutine"]
    return function
