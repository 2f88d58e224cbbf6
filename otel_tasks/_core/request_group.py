"""RequestGroup: the task group of one request, with the methods that the middleware uses.

It is scoped but has no block: the middleware opens it, propagates cancellations through it, and seals it.
The methods without an underscore are the middleware's whole interface to the core's groups.
"""

from __future__ import annotations

from asyncio import _get_running_loop
from typing import TYPE_CHECKING, Any

from otel_tasks._core.events import CancelCause
from otel_tasks._core.group import TaskGroup
from otel_tasks._core.state import CancelKind
from otel_tasks._core.task import ManagedTask

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Collection

    from otel_tasks._core.binding import Binding
    from otel_tasks._core.manager import TaskManager

# The end of a request that cancels nothing, as most requests do. It is shared, because it needs no origin.
REQUEST_ENDED = CancelCause(CancelKind.SCOPE_ENDED)


class RequestGroup(TaskGroup):
    """A scoped group that isolates failures; users see a ``TaskGroup``."""

    # TaskGroup declares both as None, their value in every other group.
    __slots__ = ("_binding", "_host")

    @classmethod
    def open(
        cls,
        manager: TaskManager,
        name: str | Callable[[], str],
        *,
        binding: Binding | None,
        host: asyncio.Task[Any] | None,
        span: bool = False,
    ) -> RequestGroup:
        """Open a group below the root of ``manager``.

        Args:
            manager: The manager of its tasks.
            name: The group's name. A function is called at each read, because the route is known late.
            binding: Represents the group in the contexts of its request.
            host: The task in which the request's handler runs; None if there is no such task.
            span: Give the group a span of its own.
        """
        ledger, root = manager._ledger, manager._root
        loop = _get_running_loop()
        if loop is None and host is not None:
            # In the thread of a `def` handler.
            loop = host.get_loop()
        if loop is not None and loop is not ledger.home.loop:
            ledger.home.meet(loop)
        group = cls.__new__(cls)
        group._set_up(ledger, name, root)
        group._binding = binding
        group._host = host
        group._open(root)
        if span:
            group._start_span()
        return group

    def contains(self, task: asyncio.Future[Any] | None) -> bool:
        """Return True for a task of this group or of a group below it."""
        if not isinstance(task, ManagedTask):
            return False
        return self in task._group._outward()

    def live_tasks(self) -> list[ManagedTask[Any]]:
        """Return the live tasks of this group and of the groups below it, each once."""
        return list(self._every_live())

    @property
    def is_empty(self) -> bool:
        """True if no task and no group is live in it."""
        return self._is_empty()

    @property
    def has_groups(self) -> bool:
        """True if a group is live in it."""
        return bool(self._children)

    @property
    def is_sealed(self) -> bool:
        """True once ``seal`` has been called."""
        return self._sealed

    def signal_cancel(self, cause: CancelCause) -> None:
        """Set the cancel events here and below; scoped groups refuse new tasks from now on."""
        self._signal_cancel(cause)

    def cancel_tasks(self, cause: CancelCause, *, spared: Collection[asyncio.Future[Any] | None] = ()) -> int:
        """Cancel every live task here and below in one pass, except for ``spared``.

        Returns:
            How many tasks were cancelled that had not been cancelled before.
        """
        return self._cancel_tasks(cause, spared=spared)

    def seal(self, cause: CancelCause | None = None, *, refuse: bool = True) -> None:
        """Leave the tree as soon as it is empty, and refuse new tasks unless ``refuse`` is False."""
        self._seal(cause, refuse=refuse)

    def close_if_unused(self) -> bool:
        """Close the group if nothing is live in it and its cancel event was never read, as in most requests.

        Returns:
            False if the group is in use; it is then left as it is.
        """
        if self._event is not None or not self._is_empty():
            return False
        self._signal_cancel(REQUEST_ENDED)
        self._seal(REQUEST_ENDED)
        return True
