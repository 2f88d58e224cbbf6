"""What a context is bound to: the group or the request that new tasks join. Which requests are stopping."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import asyncio

    from otel_tasks._group import TaskGroup
    from otel_tasks._manager import TaskManager


class Binding(Protocol):
    """What stands for the current group in a context: a group, or what makes one when it is needed."""

    @property
    def task_group(self) -> TaskGroup:
        """The group that new tasks join."""
        ...

    @property
    def manager(self) -> TaskManager:
        """The manager of that group; asking for it makes no group."""
        ...

    @property
    def _request(self) -> BoundRequest | None:
        """The request to which the context belongs; None outside of one."""
        ...


class BoundRequest(Protocol):
    """What the core asks of a request."""

    @property
    def over(self) -> bool:
        """The request has ended, and the caller is not a part of it that is still ending."""
        ...

    def stand_in(self, group: TaskGroup) -> TaskGroup:
        """The group that takes a task which was meant for the closed ``group``; ``group`` if none does."""
        ...

    def intercept(self, awaited: asyncio.Task[Any], message: object) -> bool:
        """Keep a cancellation of this request from ``awaited``; False if it is not the request's."""
        ...


# Set where the current task alone does not tell the group: in a request's handler, and in
# tasks that were started from one into another group.
_bound: ContextVar[Binding | None] = ContextVar("otel_tasks_group", default=None)

# Requests whose work is being cancelled. Empty most of the time, so that a cancel() elsewhere costs one look.
stopping: set[BoundRequest] = set()


def intercepted(awaited: asyncio.Task[Any], message: object) -> bool:
    """Let requests that are being stopped take a cancellation which is theirs and not for ``awaited``.

    A task's ``cancel()`` is forwarded to what the task awaits. A request cancels its own work and nothing
    else, so what it awaits of others has to be left out. The contexts of the callbacks tell who awaits.
    """
    bound = [_bound.get(), *(context.get(_bound) for _, context in awaited._callbacks or () if context)]
    requests = {binding._request for binding in bound if binding is not None}
    # A list: each request concerned has to take its own.
    return True in [request.intercept(awaited, message) for request in requests if request in stopping]
