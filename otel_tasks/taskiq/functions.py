"""Wraps the function of a task: the receiver calls the wrapper, which runs it as a managed task."""

from __future__ import annotations

import asyncio
import functools
import inspect
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from otel_tasks._core.visits import Visit
from otel_tasks.taskiq.execution import current_execution

if TYPE_CHECKING:
    from collections.abc import Callable

# Taskiq appends this to the name of a task's function, so that a process pool can find it.
_SUFFIX = "__taskiq_original"


def covered_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with the same signature that runs ``function`` as a managed task of the worker."""
    name, qualified = _names_of(function)
    if not _is_async(function):
        return _PlainFunction(function, name, f"{function.__module__}.{qualified}")

    def make(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _renamed(function(*args, **kwargs), name, qualified)

    @functools.wraps(function)
    async def run(*args: Any, **kwargs: Any) -> Any:
        execution = current_execution.get()
        if execution is None:
            return await function(*args, **kwargs)
        return await execution.run(lambda: make(args, kwargs))

    return run


def plain_name(name: str) -> str:
    """Return the name that a function had before Taskiq renamed it."""
    return name.partition(_SUFFIX)[0]


class _PlainFunction:
    """The wrapper of a plain function, which the receiver calls in a thread of its pool.

    A process pool gets the function itself: this process cannot manage a function that runs in another one.
    """

    def __init__(self, function: Callable[..., Any], name: str, qualified: str) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._names = (name, qualified)

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        return _unchanged, (self._function,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        execution = current_execution.get()
        if execution is None:
            return self._function(*args, **kwargs)
        visit = Visit(lambda: [self._function(*args, **kwargs)])
        made = execution.run(lambda: _renamed(_result_of(visit), *self._names))
        ended = asyncio.run_coroutine_threadsafe(made, execution.loop)
        # Also if it ends before its task runs: the thread must not wait for that.
        ended.add_done_callback(lambda _: visit.dismiss())
        visit.work()
        return ended.result()


async def _result_of(visit: Visit[list[Any]]) -> Any:
    (result,) = await visit.as_task()
    # A decorator may have wrapped a coroutine function in a plain one.
    return await result if inspect.isawaitable(result) else result


def _unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _names_of(function: Callable[..., Any]) -> tuple[str, str]:
    """Return the name and the qualified name that a function had before Taskiq renamed it."""
    name: str = getattr(function, "__name__", type(function).__name__)
    outer = getattr(function, "__qualname__", "").rpartition(".")[0]
    name = plain_name(name)
    return name, f"{outer}.{name}" if outer else name


def _renamed(coro: Any, name: str, qualified: str) -> Any:
    if isinstance(coro, CoroutineType):
        coro.__name__, coro.__qualname__ = name, qualified
    return coro


def _is_async(function: Callable[..., Any]) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - whether it is a coroutine function, not callable
    )
