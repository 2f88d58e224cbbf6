"""Eager start: the first step of a task runs when the task is created (Python 3.12 and later)."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from contextvars import Context

    from otel_tasks._core.records import Listeners

T = TypeVar("T")

EAGER = sys.version_info >= (3, 12)
# The options of a plain task that starts eagerly; equal to no options where Python cannot do it.
EAGERLY = {"eager_start": True} if EAGER else None


def is_free(context: Context) -> bool:
    """True if no code is running in this context; otherwise an eager first step cannot run in it."""
    try:
        context.run(int)
    except RuntimeError:
        return False
    return True


async def announced_first(work: Coroutine[Any, Any, T], listeners: Listeners) -> T:
    """Notify the listeners of an eager task right before its first step; before that there is no task."""
    # The task that is being created, and so a managed one: its class is not known here.
    task: Any = asyncio.current_task()
    listeners.notify("created", task, task.info())
    return await work
