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
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from otel_tasks._core.binding import current_binding, worker_here

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from otel_tasks._core.binding import Binding

F = TypeVar("F", bound="Callable[..., Any]")
G = TypeVar("G", bound="Group")

# ManagedTask, which stands above this module: `task` names it, once.
_managed_task: type[Any]
# The root group of the manager that is current where no other is: `functions` names it, once.
_global_root: Any


def set_managed_task(task_class: type[Any]) -> None:
    """Name the class of tasks that have a group."""
    global _managed_task
    _managed_task = task_class


def set_global_root(root: object) -> None:
    """Name the group that is current where no other is."""
    global _global_root
    _global_root = root


class Group(Protocol):
    """What decides whether a group takes new tasks, and which one takes them in its place."""

    @property
    def _refusal(self) -> str | None: ...

    @property
    def _binding(self) -> Binding | None: ...

    @property
    def _parent(self) -> Group | None: ...


def innermost() -> Binding | None:
    """Find what decides here which group and which manager are current; None where nothing does."""
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
    """The ``TaskGroup`` that new tasks join here; None where there is none but the global manager's root."""
    here = innermost()
    if here is None:
        return None
    group = here.task_group
    return group if group._refusal is None else nearest_open(group)


def stand_in(group: G) -> G:
    """Where a task goes that was meant for ``group``: into another one if a request cleans up."""
    if group._refusal is None or group._binding is None:
        return group
    request = group._binding._request
    taker: G = group if request is None else request.stand_in(group)
    return taker


def nearest_open(group: Any) -> Any:
    """The group that new tasks join where ``group``, the current one, is closed.

    Code that is being cancelled may start tasks for its cleanup. They join the nearest group above
    that takes any; in a request that is the one for its cleanup.
    """
    node = group
    while node is not None and node._refusal is not None:
        if node._binding is not None:
            return stand_in(node)
        node = node._parent if is_being_cancelled() else None
    return node or group


def is_being_cancelled() -> bool:
    """True where a cancellation is on its way through the calling code: in a ``finally`` or an ``except``.

    After an ``except`` that has swallowed it, it is not.
    """
    return in_flight(lambda error: isinstance(error, asyncio.CancelledError | GeneratorExit))


def in_flight(is_wanted: Callable[[BaseException], bool]) -> bool:
    """Tell whether the calling code handles such an exception, or one that took its place or contains it."""
    pending = [sys.exception()]
    # By their ids: exceptions may refer to one another in a circle, and be equal or not as their class says.
    seen = set[int]()
    # The list grows while it is walked.
    for exception in pending:
        if exception is None or id(exception) in seen:
            continue
        seen.add(id(exception))
        if is_wanted(exception):
            return True
        inner = exception.exceptions if isinstance(exception, BaseExceptionGroup) else ()
        pending.extend((exception.__context__, exception.__cause__, *inner))
    return False


def is_request_over() -> bool:
    """True in code that a request has left behind: a plain task, say, which runs on after it."""
    bound = current_binding.get()
    request = None if bound is None else bound._request
    return request is not None and request.over


@contextmanager
def bound_to(here: Binding | None) -> Generator[None]:
    """Make ``here`` current in the block, unless the context binds something itself."""
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

    Such a function decides at its call what is current. A coroutine function would decide at its first step,
    which may run in a plain task: ``asyncio.gather(start_task(...))``.
    """
    if sys.version_info >= (3, 12):
        return inspect.markcoroutinefunction(function)
    vars(function)["_is_coroutine"] = vars(asyncio.coroutines)["_is_coroutine"]
    return function
