"""Who waits for a task: whom its cancellation, or its end, would reach.

asyncio keeps no list of who awaits what before Python 3.14. It is all in the done-callbacks, though: who
awaits a task has one there, and so have the futures that stand between.
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


def with_awaiters(*callers: asyncio.Task[Any] | None) -> set[asyncio.Future[Any]]:
    """The callers, and all that their end would wake: tasks, and the futures between."""
    reached: dict[asyncio.Future[Any], None] = {caller: None for caller in callers if caller is not None}
    found = list(reached)
    # The list grows while it is walked.
    for future in found:
        for waiting in _waiting_for(future):
            if waiting not in reached:
                reached[waiting] = None
                found.append(waiting)
    return set(reached)


def _waiting_for(future: asyncio.Future[Any]) -> Iterator[asyncio.Future[Any]]:
    # asyncio's own attribute, 3.11 to 3.15, in C and in Python.
    for callback, _ in future._callbacks or ():
        yield from _woken_by(callback)
    yield from waiters_behind(future)
    yield from hosts_of(future)


def _woken_by(callback: object) -> Iterator[asyncio.Future[Any]]:
    """Say what a done-callback is going to wake."""
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        # A user's callback may be another of its methods, say cancel().
        if getattr(callback, "__name__", "").endswith("wakeup"):
            yield owner
    elif isinstance(owner, asyncio.TaskGroup):
        yield vars(owner)["_parent_task"]
    elif isinstance(owner, Wait):
        yield owner.outcome
    # as_completed() has its queue there from Python 3.13 on, in a closure before.
    for thing in [*_enclosed_in(callback), getattr(owner, "_done", None)]:
        if isinstance(thing, asyncio.Queue):
            yield from vars(thing)["_getters"]
        elif isinstance(thing, asyncio.Future) and not isinstance(thing, asyncio.Task):
            # What gather(), shield() and wait() give is no task. A task here is one that a user's
            # callback is about.
            yield thing


def _enclosed_in(callback: object) -> Iterator[object]:
    """Everything in the closure of a callback, and of the functions in it, or among its bound arguments."""
    if isinstance(callback, functools.partial):
        yield from callback.args
    functions = [callback]
    # The list grows while it is walked.
    for function in functions:
        for cell in getattr(function, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # the cell is empty
                content = cell.cell_contents
                yield content
                if isinstance(content, FunctionType) and content not in functions:
                    functions.append(content)


@functools.singledispatch
def hosts_of(task: asyncio.Future[Any]) -> Iterable[asyncio.Future[Any]]:
    """The tasks whose block or request this one runs in; `group` registers the variant for managed tasks."""
    return ()
