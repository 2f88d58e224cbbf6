"""Cleanup: the tasks that ``uncancellable()`` shelters, and the group of the tasks that they start."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from otel_tasks._core.binding import BoundRequest, current_binding, intercepted
from otel_tasks._core.causes import covered
from otel_tasks._core.request_group import RequestGroup
from otel_tasks._core.shields import shield, unshield
from otel_tasks._core.task import ManagedTask

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Generator

    from otel_tasks._core.group import TaskGroup
    from otel_tasks._core.manager import TaskManager

# A `def` handler may ask for its request's group at the same time as the loop, or another thread, does.
GROUP_LOCK = threading.RLock()


class CleaningRequest(BoundRequest, Protocol):
    """The request as its cleanup sees it."""

    @property
    def manager(self) -> TaskManager:
        """The manager whose root is above its groups."""
        ...

    def own_group(self) -> RequestGroup:
        """Return the request's own group."""
        ...


class Cleanup:
    """Bound where a request cleans up: new tasks outlive its cancellation, and end before the request does.

    Attributes:
        group: Their group; None until one is needed.
    """

    __slots__ = ("_request", "_sheltered", "group")

    def __init__(self, request: CleaningRequest) -> None:
        self._request = request
        self.group: RequestGroup | None = None
        # In how many blocks of uncancellable() each task is. None stands for code without a task.
        self._sheltered: dict[asyncio.Task[Any] | None, int] = {}

    @property
    def manager(self) -> TaskManager:
        """The manager whose root is above its group."""
        return self._request.manager

    @property
    def task_group(self) -> TaskGroup:
        """The group for cleanup, made on first use; the manager's root for code that outlives the request."""
        with GROUP_LOCK:
            group = self.group
            if (group is None or group.is_sealed) and self._request.over:
                return self.manager.get_group("root")
            if group is None:
                # The end of the request joins both groups.
                self._request.own_group()
                self.group = group = RequestGroup.open(
                    self.manager, self._name, binding=self, host=self._request.host
                )
            return group

    @property
    def is_sheltering(self) -> bool:
        """A block of ``uncancellable()`` is open."""
        return bool(self._sheltered)

    def shelters(self, task: asyncio.Task[Any] | None) -> bool:
        """Return True if ``task`` is in ``uncancellable()``."""
        return task in self._sheltered

    @contextmanager
    def sheltering(self, task: asyncio.Task[Any] | None) -> Generator[None]:
        """Keep the end of the request away from ``task`` in the block, until ``release`` delivers it."""
        self._sheltered[task] = self._sheltered.get(task, 0) + 1
        if isinstance(task, ManagedTask):
            shield(task)
            yield
        elif task is None:
            yield
        else:
            with covered(task, intercepted):
                yield

    def release(self, task: asyncio.Task[Any] | None) -> bool:
        """End one shelter of ``task``; return True if that has cancelled it."""
        self._sheltered[task] -= 1
        if not self._sheltered[task]:
            del self._sheltered[task]
        if not isinstance(task, ManagedTask):
            return False
        before = task.cancelling()
        unshield(task)
        return task.cancelling() > before

    def _name(self) -> str:
        return f"{self._request.name} uncancellable"


def is_in_cleanup() -> bool:
    """Return True in the body of ``uncancellable()``."""
    return isinstance(current_binding.get(), Cleanup)
