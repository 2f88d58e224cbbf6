"""Names of coroutines, and checks of what is passed as a coroutine."""

from __future__ import annotations

import asyncio
import inspect
from abc import abstractmethod
from collections.abc import Coroutine
from types import CodeType, CoroutineType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

# The code of functions and what `code_name` returned, by their qualified names; at most so many.
_code_names: dict[str, tuple[CodeType, str]] = {}
_MOST_NAMES = 1024

# The modules whose coroutines have the qualified name, module included, of the function for which they stand.
_FOR_OTHERS = (
    "otel_tasks._core.decorator",
    "otel_tasks._core.threads",
    "otel_tasks.taskiq.functions",
    "otel_tasks.taskiq.remote",
)


class OwnCoroutine(Coroutine[Any, Any, T]):
    """A coroutine of this package that no coroutine function has made."""

    __name__: str

    @property
    @abstractmethod
    def has_begun(self) -> bool:
        """True if it has run any code of the user's."""


def check_coroutine(coro: object, function: str = "create_task") -> None:
    """Raise a TypeError that shows what to write instead, unless ``coro`` is a coroutine.

    Args:
        coro: The object to check.
        function: The name of the function that the caller called, for the message.
    """
    if type(coro) is CoroutineType or asyncio.iscoroutine(coro):
        return
    if inspect.isasyncgen(coro) or inspect.isasyncgenfunction(coro):
        what = (
            f"the async generator {coro.__name__}: "
            "iterate over it in a coroutine function, and pass its coroutine"
        )
    elif callable(coro):
        name = getattr(coro, "__name__", type(coro).__name__)
        what = f"the function {name}: write {function}({name}(...))"
    elif inspect.isawaitable(coro):
        what = f"a {type(coro).__name__}: await it inside a coroutine function, and pass that one's coroutine"
    else:
        what = f"{coro!r}: write {function}(work(...)) with `async def work(...)`"
    raise TypeError(f"{function}() takes a coroutine, got {what}")


def close_quietly(coro: object) -> None:
    """Close a refused coroutine, so that Python does not warn that it was never awaited."""
    if asyncio.iscoroutine(coro):
        coro.close()


def name_of_refused(coro: Any) -> str:
    """Close a coroutine that is refused, and return the name of its function, for the message."""
    name = function_name(coro)
    close_quietly(coro)
    return name


def function_name(coro: Any) -> str:
    """The name of the function that made a coroutine."""
    try:
        name: str = coro.__name__
    except AttributeError:
        # Cython's coroutines and other objects that only have a coroutine's methods.
        name = type(coro).__name__
    return name


def qualified_name(coro: object) -> str:
    """The name of the function that made a coroutine, with its class."""
    return getattr(coro, "__qualname__", None) or type(coro).__qualname__


def code_name(coro: Coroutine[Any, Any, Any]) -> str:
    """Module and qualified name, as the semantic conventions define ``code.function.name``."""
    if type(coro) is not CoroutineType:
        return _code_name(coro)
    # Composing the name takes 1 % of a task with a span, and most functions make many tasks. The name alone
    # does not identify a function, nor does the code: all wrappers that a decorator makes have the same.
    known = _code_names.get(coro.__qualname__)
    if known is not None and known[0] is coro.cr_code:
        return known[1]
    name = _code_name(coro)
    # Without a frame it has ended, and does not tell its module.
    if coro.cr_frame is not None:
        if len(_code_names) >= _MOST_NAMES:
            _code_names.clear()
        _code_names[coro.__qualname__] = coro.cr_code, name
    return name


def _code_name(coro: Coroutine[Any, Any, Any]) -> str:
    qualified = qualified_name(coro)
    frame = getattr(coro, "cr_frame", None)
    module = None if frame is None else frame.f_globals.get("__name__")
    if module in _FOR_OTHERS:
        return qualified
    return f"{module}.{qualified}" if module else qualified


def check_factory(factory: object) -> None:
    """Raise a TypeError that shows what to write instead, unless this is a function or a coroutine."""
    if not callable(factory) and not asyncio.iscoroutine(factory):
        raise TypeError(
            f"start_task() takes a function that returns a coroutine, got {factory!r}: "
            "write start_task(name, lambda: work(1))"
        )


def made_coroutine(
    factory: Callable[[], Coroutine[Any, Any, T]] | Coroutine[Any, Any, T], function: str = "start_task"
) -> Coroutine[Any, Any, T]:
    """Return a coroutine as it is, or the one that a factory returns.

    Args:
        factory: A coroutine, or a function that returns one.
        function: The name of the function that the caller called, for the message.

    Raises:
        TypeError: The factory is neither, or does not return a coroutine.
    """
    if asyncio.iscoroutine(factory):
        return factory
    check_factory(factory)
    made = factory()
    if not asyncio.iscoroutine(made):
        raise not_a_coroutine(factory, made, function)
    return made


def not_a_coroutine(factory: Callable[[], object], made: object, function: str) -> TypeError:
    """Return the error for a factory that has returned something else than a coroutine."""
    name = getattr(factory, "__name__", repr(factory))
    if name == "<lambda>":
        returned, remedy = f"the lambda returned {made!r}", "let it call an `async def` function"
    else:
        returned, remedy = f"{name}() returned {made!r}", f"declare it as `async def {name}(...)`"
    return TypeError(f"{function}() takes a function that returns a coroutine, and {returned}: {remedy}")
