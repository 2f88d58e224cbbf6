"""Handlers that nest tasks in every way, and tasks that note why they were cancelled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter

from otel_tasks import ManagedTask, TaskGroup, TaskManager, create_task
from tests.e2e.journal import manager, noted, work
from tests.shapes import SHAPES

if TYPE_CHECKING:
    from collections.abc import Coroutine

router = APIRouter()
_shapes = {shape.__name__: shape for shape in SHAPES}


class _Noted:
    """Starts tasks that work until they are cancelled."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.other: TaskManager = manager
        self._count = 0

    def leaf(self, group: TaskGroup | None = None) -> ManagedTask[Any]:
        self._count += 1
        return self.task(work(self.key, f"leaf-{self._count}"), group)

    def task(self, coro: Coroutine[Any, Any, Any], group: TaskGroup | None = None) -> ManagedTask[Any]:
        return create_task(coro) if group is None else group.create_task(coro)

    def keep(self, task: ManagedTask[Any]) -> ManagedTask[Any]:
        return task


@router.get("/nest/{shape}/{key}")
async def nest(shape: str, key: str) -> None:
    with noted(key):
        await _shapes[shape](_Noted(key))
