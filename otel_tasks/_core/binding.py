"""The binding of a context to a group or a request, and the requests that are being cancelled."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias
from weakref import ref

from otel_tasks._core.suspension import may_forward

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from contextvars import Context

    # A callback of a future, and the context in which it is called.
    Callback: TypeAlias = tuple[Callable[..., object], Context]


class Binding(Protocol):
    """Stands for the current group in a context: a group, or a request that makes one when it is needed.

    ``Any`` stands for a class of a higher module: naming it here would make an import cycle.
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
    """What the core needs from a request."""

    host: asyncio.Task[Any] | None
    # It has ended.
    closed: bool

    @property
    def over(self) -> bool:
        """True if the request has ended and the caller is not part of its cleanup."""
        ...

    @property
    def name(self) -> str:
        """The route, which is also the name of its group."""
        ...

    @property
    def cancelled_from_outside(self) -> bool:
        """True if its handler's task has been cancelled, and not by the request itself."""
        ...

    def cause_of_shutdown(self, message: str | None = None) -> Any:
        """The cause for work that is cancelled because the server has cancelled the handler's task."""
        ...

    def task_group(self) -> Any:
        """The group that new tasks join."""
        ...

    def stand_in(self, group: Any) -> Any:
        """The group that takes a task meant for the closed ``group``; ``group`` itself if none does."""
        ...

    def intercept(self, awaited: asyncio.Task[Any], message: object, callbacks: list[Callback]) -> bool:
        """Keep a cancellation of this request from ``awaited``; False if it is not the request's."""
        ...


class RequestBinding(ref["BoundRequest"]):
    """Binds contexts to a request until it is over: a weak reference.

    A context may outlive its request by far, and must not keep it in memory: uvicorn starts its keep-alive
    timer in the context of the request, and a connection pool the tasks that it starts on first use. The
    request's group refers to this too, so that the two are no cycle for the garbage collector.

    Attributes:
        kept: The request, once it is over and has left work behind that needs it. Unset otherwise.
        facts: Its name once it is gone, as ``name_from`` takes it.
        manager: The manager whose root is above its group.
    """

    __slots__ = ("facts", "kept", "manager")

    kept: BoundRequest
    facts: Any
    manager: Any

    # Set by the subclass, which knows the facts.
    name_from: Callable[[Any], str]

    @property
    def name(self) -> str:
        """The name of the request."""
        request = self()
        return self.name_from(self.facts) if request is None else request.name

    @property
    def closed(self) -> bool:
        """True if the request has ended."""
        request = self()
        return request is None or request.closed

    @property
    def task_group(self) -> Any:
        """The group that new tasks join; the manager's root once the request is over."""
        request = self()
        return self.manager.get_group("root") if request is None else request.task_group()

    @property
    def _request(self) -> BoundRequest | None:
        return self()


class ThreadWorker(Protocol):
    """What the core needs from a function that ``run_in_thread`` calls."""

    def requester_name(self) -> str | None:
        """The name of its task; None once the task has ended."""
        ...

    @property
    def thread_id(self) -> int | None:
        """The thread in which the function runs; None before it runs."""
        ...

    def stack(self) -> str:
        """The stack of the function, as lines of a traceback."""
        ...

    @property
    def binding(self) -> Binding | None:
        """The group of its task while the function runs; None after that."""
        ...


# Set where the current task does not determine the group: in a request's handler, and in tasks that a request
# has started in another group.
current_binding: ContextVar[Binding | None] = ContextVar("otel_tasks_group", default=None)
# Its value here. Bound once: Python 3.11 looks up the method of an imported object slowly, at each call.
binding_here = current_binding.get

# The worker whose function runs here. Set only in the context of its thread.
worker_here: ContextVar[ThreadWorker | None] = ContextVar("otel_tasks_worker", default=None)

# Requests whose work is being cancelled. Usually empty, so that a cancel() elsewhere costs one check.
stopping: set[BoundRequest] = set()


def bound_request() -> BoundRequest | None:
    """The request that the caller belongs to; None outside of a request, and once it is over."""
    bound = current_binding.get()
    request = None if bound is None else bound._request
    return None if request is None or request.over else request


def is_request_over() -> bool:
    """True in code that outlives its request, such as a plain task that runs on after it."""
    bound = current_binding.get()
    request = None if bound is None else bound._request
    return isinstance(bound, RequestBinding) if request is None else request.over


def request_in(context: Context) -> BoundRequest | None:
    """The request of ``context``, even one that is over but has left work behind; None outside of one."""
    bound = context.get(current_binding)
    return None if bound is None else bound._request


def intercepted(awaited: asyncio.Task[Any], message: object) -> bool:
    """Let requests that are being stopped keep their cancellation from ``awaited``, a task of other code.

    asyncio forwards a task's ``cancel()`` to what the task awaits. A request cancels its own work and nothing
    else, so tasks of others that it awaits must not be cancelled. The contexts of the callbacks show which
    requests await the task.
    """
    # In one pass: a thousand requests that await one task may be stopped in the same turn.
    found: dict[BoundRequest, list[Callback]] = {}
    here = current_binding.get()
    request = None if here is None else here._request
    if request is not None and request in stopping:
        found[request] = []
    for callback, context in awaited._callbacks or ():
        # An empty context has no binding; a callback that was given None, as C allows, has no context.
        if not context or not may_forward(callback):
            continue
        bound = context.get(current_binding)
        request = None if bound is None else bound._request
        if request is not None and request in stopping:
            found.setdefault(request, []).append((callback, context))
    # A list, not any(): each of these requests has to handle its own callbacks.
    return True in [request.intercept(awaited, message, callbacks) for request, callbacks in found.items()]


def awaiting(awaited: asyncio.Task[Any]) -> set[BoundRequest]:
    """The requests that await a task, by the contexts of its callbacks."""
    # asyncio's own attribute, 3.11 to 3.15.
    bound = [context.get(current_binding) for _, context in awaited._callbacks or () if context]
    return {binding._request for binding in bound if binding is not None and binding._request is not None}
