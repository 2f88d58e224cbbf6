"""Served: what a node of a fleet answers the live view of another one. It needs no framework.

Each question has the parameters of an endpoint, and its answer the JSON of that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from otel_tasks import Overview, TaskManager
from otel_tasks._core.slices import in_slices
from otel_tasks.live.detail import ended_or_forgotten, live_detail
from otel_tasks.live.feed import INTERVAL, Feed, encoded
from otel_tasks.live.hub import Hub, NotTicking, TooManyViewers
from otel_tasks.live.params import MAX_NAME, QUERIED, WATCHED, BadRequest, Params, query, watched
from otel_tasks.live.rows import Shown, seconds
from otel_tasks.live.search import listed, live_named
from otel_tasks.live.stream import Stream, polled

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Served:
    """The feed of one node for the views of the others.

    Args:
        manager: The manager of this node.
    """

    def __init__(self, manager: TaskManager) -> None:
        self._manager = manager
        # Neither metadata nor texts of exceptions leave the process.
        self._hub = Hub(Feed(manager, Shown(), ()))
        self._parts: dict[object, Callable[[Params, str], Awaitable[str]]] = {
            "events": self._events,
            "tasks": self._tasks,
            "task": self._task,
        }

    async def answer(self, data: dict[str, Any], viewer: str) -> str:
        """Answer a question.

        Args:
            data: ``what``, and the ``params`` of that endpoint as pairs.
            viewer: The node that asks.

        Returns:
            JSON: an object with the answer, or with an ``error``.

        Cancellation: ends the work.
        """
        try:
            part = self._parts.get(data.get("what"))
            if part is None:
                raise BadRequest("this node does not have that part of a view")
            return await part(_params(data.get("params")), viewer)
        except BadRequest as error:
            return encoded({"error": str(error)})
        except (TooManyViewers, NotTicking):
            return encoded({"error": "this node cannot be looked at now"})

    def close(self) -> None:
        """End the ticking."""
        self._hub.close()

    async def _events(self, params: Params, viewer: str) -> str:
        wanted = watched(params, None, Overview.ROOT)
        hub = self._hub
        await hub.admit(viewer)
        await hub.read_now(wanted.expand, wanted.panels)
        stream = Stream(hub, viewer, wanted.expand, wanted.names, wanted.panels, wanted.after)
        return f'{polled(stream)[:-1]},"now":{encoded(seconds(self._manager.now()))}}}'

    async def _tasks(self, params: Params, viewer: str) -> str:
        return await listed(self._hub.feed, query(params))

    async def _task(self, params: Params, viewer: str) -> str:
        feed, name = self._hub.feed, params.text("task", MAX_NAME) or ""
        await in_slices(feed.look(max_age=INTERVAL))
        found = await live_named(feed, name)
        if len(found) > 1:
            several = {"state": "several", "count": len(found), "task": {"id": found[0].uid}}
            return encoded({**feed.stamp(), **several})
        detail = await in_slices(live_detail(feed, found[0]) if found else ended_or_forgotten(feed, name))
        return encoded({**feed.stamp(), **detail})


def _params(pairs: object) -> Params:
    """Read the parameters of a question, which may be anything."""
    if not isinstance(pairs, list):
        raise BadRequest("params must be a list of pairs")
    found: list[tuple[str, str]] = []
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(each, str) for each in pair)):
            raise BadRequest("params must be a list of pairs")
        found.append((pair[0], pair[1]))
    return Params(found, (*WATCHED, *QUERIED))
