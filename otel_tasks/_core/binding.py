"""What a context is bound to: the group or the request that new tasks join. Which requests are stopping."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from otel_tasks._core.suspension import may_forward

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from contextvars import Context

    # A callback of a future, and the context in which it is called.
    Callback: TypeAlias = tuple[Callable[..., object], Context]


class Binding(Protocol):
    """What stands for the current group in a context: a group, or what makes one when it is needed.

    ``Any`` where the class stands above this module: naming it would close a circle of imports.
    """

    @property
    def task_group(self) -> Any:
        """The ``TaskGroup`` that new tasks join."""
        ...

    @property
    def manager(self) -> Any:
        """The ``TaskManager`` of that group; reading it makes no group."""
        ...

    @property
    def _request(self) -> BoundRequest | None:
        """The request to which the context belongs; None outside of one."""
        ...


class BoundRequest(Protocol):
    """What the core asks of a request."""

    host: asyncio.Task[Any] | None
    # It has ended.
    closed: bool

    @property
    def over(self) -> bool:
        """The request has ended, and the caller is not a part of it that is still ending."""
        ...

    @property
    def name(self) -> str:
        """Its route, as its group is named."""
        ...

    @property
    def cancelled_from_outside(self) -> bool:
        """Its handler's task has been cancelled, and not by the request itself."""
        ...

    def cause_of_shutdown(self, message: str | None = None) -> Any:
        """The cause of what ends because the server has cancelled the handler's task."""
        ...

    def stand_in(self, group: Any) -> Any:
        """The group that takes a task which was meant for the closed ``group``; ``group`` if none does."""
        ...

    def intercept(self, awaited: asyncio.Task[Any], message: object, callbacks: list[Callback]) -> bool:
        """Keep a cancellation of this request from ``awaited``; False if it is not the request's."""
        ...


class ThreadWorker(Protocol):
    """What the core asks of a function that ``run_in_thread`` calls."""

    def requester_name(self) -> str | None:
        """The name of its task; None once that has ended."""
        ...

    @property
    def thread_id(self) -> int | None:
        """The thread in which the function runs; None before it does."""
        ...

    def stack(self) -> str:
        """The stack of the function, as lines of a traceback."""
        ...

    @property
    def binding(self) -> Binding | None:
        """The group of its task while the function runs; None after that."""
        ...


# Set where the current task alone does not tell the group: in a request's handler, and in
# tasks that were started from one into another group.
current_binding: ContextVar[Binding | None] = ContextVar("otel_tasks_group", default=None)

# The worker whose function runs here. Set in its thread's context alone.
worker_here: ContextVar[ThreadWorker | None] = ContextVar("otel_tasks_worker", default=None)

# Requests whose work is being cancelled. Empty most of the time, so that a cancel() elsewhere costs one look.
stopping: set[BoundRequest] = set()


def bound_request() -> BoundRequest | None:
    """The request to which the calling code belongs; None outside of one, and once it is over."""
    bound = current_binding.get()
    request = None if bound is None else bound._request
    return None if request is None or request.over else request


def request_in(context: Context) -> BoundRequest | None:
    """The request to which ``context`` belongs, over or not; None outside of one."""
    bound = context.get(current_binding)
    return None if bound is None else bound._request


def intercepted(awaited: asyncio.Task[Any], message: object) -> bool:
    """Let requests that are being stopped take a cancellation which is theirs and not for ``awaited``.

    A task's ``cancel()`` is forwarded to what the task awaits. A request cancels its own work and nothing
    else, so what it awaits of others has to be left out. The contexts of the callbacks tell who awaits.
    """
    # In one pass: a thousand requests that await one task may be stopped in the same turn.
    found: dict[BoundRequest, list[Callback]] = {}
    here = current_binding.get()
    request = None if here is None else here._request
    if request is not None and request in stopping:
        found[request] = []
    for callback, context in awaited._callbacks or ():
        # An empty one binds nothing; a callback that was given None, as C allows, has none at all.
        if not context or not may_forward(callback):
            continue
        bound = context.get(current_binding)
        request = None if bound is None else bound._request
        if request is not None and request in stopping:
            found.setdefault(request, []).append((callback, context))
    # A list: each request concerned has to take its own.
    return True in [request.intercept(awaited, message, callbacks) for request, callbacks in found.items()]


def awaiting(awaited: asyncio.Task[Any]) -> set[BoundRequest]:
    """The requests that await a task: a callback has the context of the code that awaits."""
    # asyncio's own attribute, 3.11 to 3.15.
    bound = [context.get(current_binding) for _, context in awaited._callbacks or () if context]
    return {binding._request for binding in bound if binding is not None and binding._request is not None}
