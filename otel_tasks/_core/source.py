"""Sources: a queue, or a function that returns the next item, behind one interface.

Rules, each with a test of its own:

1. A queue is any object with a coroutine function ``get()``. What else it has is used: ``task_done()`` to
   acknowledge items, ``put_nowait()`` to hand them back, ``get_nowait()`` and ``qsize()`` to drain it.
2. An item that is handed back is put before the first take is acknowledged: the count of unfinished items
   never reaches zero in between, so ``queue.join()`` goes on waiting for the item.
3. An error of ``task_done()``, ``put_nowait()``, or ``qsize()`` is logged; it ends neither the consumer nor a
   shutdown.
"""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, TypeVar

from otel_tasks._core.coroutines import name_of_refused
from otel_tasks._core.log import logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_queue_shut_down: type[Exception] | None = getattr(asyncio, "QueueShutDown", None)
# What ``get()`` raises once ``queue.shutdown()`` was called (Python 3.13).
QUEUE_ENDED: tuple[type[Exception], ...] = () if _queue_shut_down is None else (_queue_shut_down,)


_NO_ROOM: tuple[type[Exception], ...] = (asyncio.QueueFull, *QUEUE_ENDED)

Item_co = TypeVar("Item_co", covariant=True)


class Queue(Protocol[Item_co]):
    """An ``asyncio.Queue``, or another object that has items."""

    def get(self) -> Awaitable[Item_co]:
        """Wait for the next item and return it."""
        ...


class Source:
    """Where a consumer takes its items from.

    Args:
        source: The queue or the function that the caller passed, checked with ``check_source``.
        consumer: The consumer's name, for the log.
    """

    def __init__(self, source: Any, consumer: str) -> None:
        self._consumer = consumer
        self._get: Callable[[], Awaitable[Any]] = getattr(source, "get", source)
        self._get_nowait: Callable[[], Any] | None = getattr(source, "get_nowait", None)
        self._put_nowait: Callable[[Any], object] | None = getattr(source, "put_nowait", None)
        self._task_done: Callable[[], object] | None = getattr(source, "task_done", None)
        self._qsize: Callable[[], int] | None = getattr(source, "qsize", None)
        # A subclass may do more in a get() of its own, so that one is not bypassed.
        self._is_plain = isinstance(source, asyncio.Queue) and type(source).get is asyncio.Queue.get

    def start_get(self) -> asyncio.Future[Any]:
        """Start to wait for the next item.

        In a task of its own: cancelling that leaves its result, if it has taken an item in the same turn.

        Raises:
            TypeError: The function does not return an awaitable.
        """
        made = self._get()
        if not inspect.isawaitable(made):
            raise TypeError(
                f"the source of consumer {self._consumer!r} returned {made!r}, which cannot be awaited: "
                "pass an asyncio.Queue, or an `async def` function that returns the next item"
            )
        return asyncio.ensure_future(made)

    def take_at_once(self, *, draining: bool = False) -> Any:
        """Take an item without waiting.

        Args:
            draining: Use ``get_nowait()`` of any queue, not only of asyncio's.

        Raises:
            asyncio.QueueEmpty: No item is there, or finding out needs ``get()``.
        """
        if self._get_nowait is None or not (draining or self._is_plain):
            raise asyncio.QueueEmpty
        return self._get_nowait()

    @property
    def size(self) -> int | None:
        """How many items are in the queue; None if the source does not tell."""
        try:
            return None if self._qsize is None else self._qsize()
        except Exception:
            logger.exception("qsize() of the source of consumer %r raised", self._consumer)
            return None

    def acknowledge(self) -> None:
        """Report one item that was taken as finished."""
        if self._task_done is None:
            return
        try:
            self._task_done()
        except Exception:
            logger.exception(
                "task_done() of the source of consumer %r raised: the consumer calls it once for each item, "
                "and the handler must not",
                self._consumer,
            )

    def hand_back(self, item: object) -> bool:
        """Put an item back; return False if the source takes none, or none now."""
        if self._put_nowait is None:
            return False
        try:
            self._put_nowait(item)
        except _NO_ROOM:
            return False
        except Exception:
            logger.exception("put_nowait() of the source of consumer %r raised", self._consumer)
            return False
        self.acknowledge()
        return True


def check_source(source: object, drain: str) -> None:
    """Raise a TypeError that shows what to write instead, unless a consumer can take items from ``source``.

    Args:
        source: What the caller passed; closed if it is a coroutine.
        drain: What happens at a shutdown, checked.

    Raises:
        ValueError: The source cannot be drained that way.
    """
    if asyncio.iscoroutine(source):
        name = name_of_refused(source)
        raise TypeError(
            f"a consumer calls its source for each item, and the coroutine {name} returns only one: "
            f"write start_consumer(name, {name}, handle), or pass a queue"
        )
    get = getattr(source, "get", source)
    if isinstance(source, type) or not makes_coroutines(get):
        raise TypeError(
            f"source must be an asyncio.Queue, or a coroutine function that returns the next item, got "
            f"{source!r}: {_hint_for(source)}"
        )
    if drain != "running" and not (hasattr(source, "qsize") and hasattr(source, "get_nowait")):
        raise ValueError(
            f"drain={drain!r} needs a queue that has qsize() and get_nowait(), got {source!r}: "
            'write drain="running"'
        )


def _hint_for(source: object) -> str:
    if isinstance(source, type):
        return f"create one, as in {source.__name__}()"
    if hasattr(source, "get"):
        return "its get() would block the event loop; use an asyncio.Queue"
    return "declare it with async def" if callable(source) else "write source=asyncio.Queue()"


def check_handler(handle: object) -> None:
    """Raise a TypeError that shows what to write instead, unless this is a coroutine function of an item.

    A coroutine is closed.
    """
    if asyncio.iscoroutine(handle):
        name = name_of_refused(handle)
        raise TypeError(
            f"a consumer calls its handler for each item, and the coroutine {name} runs only once: "
            f"write start_consumer(name, source, {name})"
        )
    if not makes_coroutines(handle):
        name = getattr(handle, "__name__", "handle")
        raise TypeError(
            f"the handler must be a coroutine function that takes an item, got {handle!r}: "
            f"write async def {name}(item)"
        )


def makes_coroutines(function: object) -> TypeGuard[Callable[..., Awaitable[Any]]]:
    """True for a coroutine function, whatever wraps it, and for a lambda, which may call one."""
    if not callable(function) or isinstance(function, type):
        return False
    inner = inspect.unwrap(function)
    if inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__):
        return True
    return getattr(inner, "__name__", None) == "<lambda>"
