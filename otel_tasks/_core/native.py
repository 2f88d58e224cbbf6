"""asyncio's own methods of a task, without the overrides of ``ManagedTask``, and undocumented attributes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

# The package's own calls: the callbacks added here do not count as waiters.
add_done_callback: Callable[..., None] = asyncio.Task.add_done_callback
remove_done_callback = asyncio.Task.remove_done_callback
base_name: Callable[[asyncio.Task[Any]], str] = asyncio.Task.get_name
# Python 3.11 looks up a method of C slowly on a task, because a task may have attributes of its own.
is_cancelled: Callable[[asyncio.Task[Any]], bool] = asyncio.Task.cancelled
# Makes a task without a coroutine, which is not scheduled before `init_task`.
new_task: Callable[[type[Any]], Any] = asyncio.Task.__new__
init_task: Callable[..., None] = asyncio.Task.__init__
asyncio_cancel = asyncio.Task.cancel
asyncio_uncancel = asyncio.Task.uncancel


def cancel_message(task: asyncio.Task[Any]) -> object:
    """Return the message of the last ``cancel()`` of a live task; asyncio's own attribute, 3.11 to 3.15."""
    return getattr(task, "_cancel_message", None)


def failure_of(task: asyncio.Task[Any]) -> BaseException | None:
    """Return the exception that a finished task raised, without marking it as retrieved.

    ``task.exception()`` marks it, and asyncio then no longer logs an error that no code retrieves.
    """
    # The attribute that asyncio.Future itself reads, in C and in Python, 3.11 to 3.15.
    error: BaseException | None = task._exception
    return error
