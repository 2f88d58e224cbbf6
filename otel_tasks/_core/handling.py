"""How a consumer handles an item: the coroutine of the item's task, and its options."""

from __future__ import annotations

import asyncio
import functools
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar, cast

from otel_tasks._core.backoff import check_retry
from otel_tasks._core.checks import checked_priority, checked_seconds
from otel_tasks._core.coroutines import OwnCoroutine, close_quietly, not_a_coroutine
from otel_tasks._core.extras import checked_metadata
from otel_tasks._core.retry import retried
from otel_tasks._core.source import check_handler

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from otel_tasks._core.backoff import RetryPolicy
    from otel_tasks._core.state import TaskPriority

Item = TypeVar("Item")


class Handling(Generic[Item]):
    """How a consumer handles an item: the function, and the options of the item's task.

    Args:
        handle: The handler.
        retry: As for ``create_task``.
        timeout: As for ``create_task``.
        priority: The priority, or a function of the item.
        metadata: The metadata, or a function of the item.
        on_failure: Called with an item that has failed, and the exception.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        handle: Callable[[Item], Coroutine[Any, Any, object]],
        retry: RetryPolicy | None,
        timeout: float | None,
        priority: TaskPriority | int | Callable[[Item], TaskPriority | int],
        metadata: Mapping[str, Any] | Callable[[Item], Mapping[str, Any]] | None,
        on_failure: Callable[[Item, Exception], object] | None,
    ) -> None:
        check_handler(handle)
        check_retry(retry)
        checked_seconds("timeout", timeout)
        if not callable(priority):
            checked_priority(priority)
        if metadata is not None and not callable(metadata):
            checked_metadata(metadata)
        _check_on_failure(on_failure)
        self._handle = handle
        self._retry = retry
        self._priority = priority
        self._metadata = metadata
        self.timeout = timeout
        self.on_failure = on_failure
        self.name = _name_of(handle)

    def of(
        self, item: Item, default: RetryPolicy | None
    ) -> tuple[Coroutine[Any, Any, object], TaskPriority, Mapping[str, Any] | None]:
        """Return coroutine, priority, and metadata for an item.

        Args:
            item: The item.
            default: When to retry if the consumer does not say.

        Raises:
            Exception: What a function of the item raised, or an error about what it returned.
        """
        priority = checked_priority(self._priority(item) if callable(self._priority) else self._priority)
        metadata = self._metadata(item) if callable(self._metadata) else self._metadata
        return self._named(self._coroutine(item, self._retry or default)), priority, metadata

    def failing(self, error: Exception) -> Coroutine[Any, Any, object]:
        """Return a coroutine with the handler's name that raises ``error``."""
        return self._named(_raise(error))

    def _coroutine(self, item: Item, retry: RetryPolicy | None) -> Coroutine[Any, Any, object]:
        if retry is not None:
            make: Any = functools.partial(self._handle, item)
            return retried(make, retry, "start_consumer")
        coro = self._handle(item)
        if not asyncio.iscoroutine(coro):
            raise not_a_coroutine(cast("Any", self._handle), coro, "start_consumer")
        return coro

    def _named(self, coro: Coroutine[Any, Any, object]) -> Coroutine[Any, Any, object]:
        # A decorated function, or an object with __call__, makes coroutines with other names.
        if self.name is not None and isinstance(coro, CoroutineType | OwnCoroutine):
            coro.__name__ = self.name
        return coro


async def _raise(error: Exception) -> NoReturn:
    raise error


def _name_of(handle: object) -> str | None:
    """Return the name of the handler's tasks; None leaves it to the coroutine."""
    while isinstance(handle, functools.partial):
        handle = handle.func
    name: str = getattr(handle, "__name__", type(handle).__name__)
    return None if name == "<lambda>" else name


def _check_on_failure(on_failure: object) -> None:
    if on_failure is not None and not callable(on_failure):
        close_quietly(on_failure)
        raise TypeError(
            f"on_failure must be a function of an item and an exception, got {on_failure!r}: "
            "write on_failure=lambda item, error: ..."
        )
