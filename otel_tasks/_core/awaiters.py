"""Finds the tasks that wait for a given task: its end, or its cancellation, would reach them.

Before Python 3.14, asyncio keeps no list of them. The done-callbacks of a task show them: each task that
awaits it has one there, and so do the futures in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from types import FunctionType
from typing import TYPE_CHECKING, Any

from otel_tasks._core.cancellation import Wait
from otel_tasks._core.waiting import waiters_behind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# The modules, and the packages, whose done-callbacks belong to code that waits.
WAITING = frozenset({"asyncio.base_events", "asyncio.futures", "asyncio.taskgroups", "asyncio.tasks"})
_WAITING_PACKAGES = frozenset({"asyncio", "uvloop", "anyio", "otel_tasks"})


def with_awaiters(*callers: asyncio.Task[Any] | None) -> set[asyncio.Future[Any]]:
    """The callers, and all tasks and futures in between that their end would wake."""
    reached: dict[asyncio.Future[Any], None] = {caller: None for caller in callers if caller is not None}
    found = list(reached)
    # The loop below extends the list.
    for future in found:
        for waiting in _waiting_for(future):
            if waiting not in reached:
                reached[waiting] = None
                found.append(waiting)
    return set(reached)


def tasks_awaiting(task: asyncio.Task[Any]) -> list[asyncio.Task[Any]]:
    """The tasks that wait for a task, directly or through futures such as that of a ``gather()``."""
    reached: dict[asyncio.Future[Any], None] = {task: None}
    found = [task]
    pending: list[asyncio.Future[Any]] = [task]
    # The loop below extends the list.
    for future in pending:
        for waiting in _waiting_for(future):
            if waiting not in reached:
                reached[waiting] = None
                if isinstance(waiting, asyncio.Task):
                    found.append(waiting)
                else:
                    pending.append(waiting)
    return found[1:]


def _waiting_for(future: asyncio.Future[Any]) -> Iterator[asyncio.Future[Any]]:
    # asyncio's own attribute, 3.11 to 3.15, in C and in Python.
    for callback, _ in future._callbacks or ():
        yield from _woken_by(callback)
    yield from waiters_behind(future)
    yield from hosts_of(future)


def _woken_by(callback: object) -> Iterator[asyncio.Future[Any]]:
    """The tasks and futures that a done-callback wakes."""
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        # A user's callback may be another method of the task, such as cancel().
        if getattr(callback, "__name__", "").endswith("wakeup"):
            yield owner
    elif isinstance(owner, asyncio.TaskGroup):
        yield vars(owner)["_parent_task"]
    elif isinstance(owner, Wait):
        yield owner.outcome
    # as_completed() has its queue in `_done` from Python 3.13 on, and in a closure before that.
    for thing in [*_enclosed_in(callback), getattr(owner, "_done", None)]:
        if isinstance(thing, asyncio.Queue):
            yield from vars(thing)["_getters"]
        elif isinstance(thing, asyncio.Future) and not isinstance(thing, asyncio.Task):
            # The futures of gather(), shield(), and wait() are not tasks. A task here is one that a user's
            # callback refers to, and need not wait.
            yield thing


def _enclosed_in(callback: object) -> Iterator[object]:
    """The contents of a callback's closure, of the closures of functions in it, and its bound arguments."""
    if isinstance(callback, functools.partial):
        yield from callback.args
    functions = [callback]
    # The loop below extends the list.
    for function in functions:
        for cell in getattr(function, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # The cell is empty.
                content = cell.cell_contents
                yield content
                if isinstance(content, FunctionType) and content not in functions:
                    functions.append(content)


@functools.singledispatch
def hosts_of(task: asyncio.Future[Any]) -> Iterable[asyncio.Future[Any]]:
    """The hosts of the block or request in which a task runs; `group` registers that of managed tasks."""
    return ()


def waits(callback: object) -> bool:
    """True if a done-callback belongs to code that waits for the task, and so receives its failure.

    That is the wakeup of a task that awaits it, and what ``gather()``, ``wait()``, ``shield()``, and task
    groups add. They may take the failure long after the callback.
    """
    if isinstance(getattr(callback, "__self__", None), asyncio.Future):
        return True
    if isinstance(callback, functools.partial):
        callback = callback.func
    return str(getattr(callback, "__module__", "")).partition(".")[0] in _WAITING_PACKAGES


def may_retrieve(callback: object) -> bool:
    """True if a done-callback may take the failure; not for ``tasks.discard``, which only updates a set."""
    return not isinstance(getattr(callback, "__self__", None), set | list | dict)
