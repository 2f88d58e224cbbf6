"""asyncio's own task, past the overrides of ``ManagedTask``, and the attributes that it does not document."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

# For what is done to a task on nobody's behalf: these callbacks do not count as somebody who waits.
add_done_callback: Callable[..., None] = asyncio.Task.add_done_callback
remove_done_callback = asyncio.Task.remove_done_callback
base_name: Callable[[asyncio.Task[Any]], str] = asyncio.Task.get_name
init_task: Callable[..., None] = asyncio.Task.__init__
asyncio_cancel = asyncio.Task.cancel
asyncio_uncancel = asyncio.Task.uncancel


def cancel_message(task: asyncio.Task[Any]) -> object:
    """Read what the last ``cancel()`` of a running task said; asyncio's own attribute, 3.11 to 3.15."""
    return getattr(task, "_cancel_message", None)


def failure_of(task: asyncio.Task[Any]) -> BaseException | None:
    """Look at what a finished task raised without marking it as retrieved.

    ``task.exception()`` would: asyncio then no longer logs an error that nobody ever takes.
    """
    # The attribute that asyncio.Future itself reads, in C and in Python, 3.11 to 3.15.
    error: BaseException | None = task._exception
    return error
