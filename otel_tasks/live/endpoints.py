"""The endpoints of the live view, as a router of FastAPI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter

from otel_tasks import global_task_manager
from otel_tasks.live.feed import Feed

if TYPE_CHECKING:
    from otel_tasks import TaskManager


def live_view(*, auth: Any = None, manager: TaskManager | None = None) -> APIRouter:
    """Make a router that shows what runs in a manager: a page, and the JSON behind it.

    Args:
        auth: A dependency, ``Depends(admin)``, that refuses clients who may not look.
        manager: The manager to show. None: ``global_task_manager``.

    Returns:
        The router, for ``app.include_router(..., prefix="/tasks")``.

    Raises:
        ValueError: There is no ``auth``.

    Example:
        >>> app.include_router(live_view(auth=Depends(admin)), prefix="/tasks")
    """
    if auth is None:
        raise ValueError(
            "live_view() shows what your service does to everyone who can reach it: "
            "write live_view(auth=Depends(...))"
        )
    feed = Feed(global_task_manager if manager is None else manager)
    router = APIRouter(dependencies=[auth], include_in_schema=False)

    async def snapshot() -> dict[str, Any]:
        return feed.snapshot()

    router.add_api_route("/v1/snapshot", snapshot)
    return router
