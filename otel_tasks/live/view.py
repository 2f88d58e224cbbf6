"""The view: what a live view answers, as JSON, in whatever way it was asked; it needs no framework."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from otel_tasks import TaskManager, TaskNotFoundError
from otel_tasks._core.log import TaskLogger, logger
from otel_tasks._core.slices import in_slices
from otel_tasks.live.detail import ended_detail, live_detail
from otel_tasks.live.elsewhere import (
    Namesakes,
    RemoteTask,
    cancelled_there,
    found_there,
    listed_everywhere,
    namesakes,
    several,
    state_of,
)
from otel_tasks.live.feed import INTERVAL, VERSION, Feed, encoded
from otel_tasks.live.guard import Refused
from otel_tasks.live.hub import LINGER, Hub, NotTicking, TooManyViewers
from otel_tasks.live.marks import is_marked
from otel_tasks.live.others import Others
from otel_tasks.live.params import QUERIED, BadRequest, Params, Watched, query
from otel_tasks.live.rows import Row, Shown, ended_row
from otel_tasks.live.search import listed, live_named
from otel_tasks.live.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    from otel_tasks import ManagedTask, TaskInfo
    from otel_tasks.fleet import Fleet

    # Whether the client may take an action on a task.
    May = Callable[[str, ManagedTask[Any] | RemoteTask], Awaitable[bool]]

# Seconds that a cancellation waits for the task's end.
CANCEL_WAIT = 2.0


class View:
    """Answers the questions of the viewers of one manager, or of one fleet.

    Its methods raise ``Refused`` where there is no answer, and ``BadRequest`` for a wrong parameter.

    Args:
        manager: The manager to show.
        shown: What the view shows of a task.
        actions: The actions of viewers.
        fleet: The fleet to show; None without one.
    """

    def __init__(
        self, manager: TaskManager, shown: Shown, actions: Collection[str], fleet: Fleet | None = None
    ) -> None:
        self._manager = manager
        self._shown = shown
        self._actions = actions
        self._fleet = fleet
        self._others: Others | None = None
        self._hub: Hub | None = None

    @property
    def hub(self) -> Hub:
        """The viewers; made by the first, because a server may fork after the view is built."""
        others = None if self._fleet is None else self._others_of(self._fleet)
        if self._hub is None:
            shown = self._shown if self._fleet is None else _in_fleet(self._shown, self._fleet)
            self._hub = Hub(Feed(self._manager, shown, self._actions, others), others)
        return self._hub

    def _others_of(self, fleet: Fleet) -> Others:
        if not fleet.is_started:
            message = "this process has not joined its fleet"
            raise Refused(503, "not_started", message, {"Retry-After": "5"})
        if self._others is None or self._others.node != fleet.node:
            # A fleet that starts again makes another node.
            self._others, self._hub = Others(fleet.views, fleet.node, self._manager.now), None
        return self._others

    # -- looking --------------------------------------------------------------------------------

    async def snapshot(self, viewer: str) -> str:
        """Return the whole overview.

        Cancellation: ends the wait for it.
        """
        await self._admit(viewer)
        if self._fleet is not None:
            # A single request must not miss a node that answers a moment later.
            await self.hub.complete()
        return self.hub.feed.snapshot()

    async def stream(self, wanted: Watched, address: str) -> Stream:
        """Return a stream that has what it begins with.

        Args:
            wanted: What the viewer wants.
            address: Its name, if it gives none.

        Cancellation: ends the reading.
        """
        viewer = wanted.viewer or address
        await self._admit(viewer)
        await self.hub.read_now(wanted.expand, wanted.panels)
        return Stream(self.hub, viewer, wanted.expand, wanted.names, wanted.panels, wanted.after)

    async def tasks(self, pairs: list[tuple[str, str]]) -> str:
        """Return a list of tasks.

        Cancellation: ends the search.
        """
        params = Params(pairs, (*QUERIED, "node"))
        wanted = query(params)
        if self._fleet is None:
            _check_one_process(params.text("node"))
            return await listed(self.hub.feed, wanted)
        others = await self._found_others(self._fleet)
        return await listed_everywhere(others, self.hub.feed, wanted, pairs, params.text("node"))

    async def task(self, name: str, may: May, node: str | None = None) -> str:
        """Return everything about one task.

        Args:
            name: Its id in this view, its id in its manager, or its name.
            may: Decides what the viewer may do with it.
            node: The name, the host, or the host and process of the nodes that are searched; None for all.

        Cancellation: ends the search.
        """
        details, task = await self._found(name, node)
        allowed = [] if task is None else await self._allowed(task, may)
        return encoded({**self.hub.feed.stamp(), **details, "can": allowed})

    # -- cancelling -----------------------------------------------------------------------------

    def check_action(self, action: str) -> None:
        """Refuse an action that this view does not have."""
        if action not in self._actions:
            raise Refused(
                403, "read_only", 'this view is read-only: live_view(actions={"cancel"}) lets it cancel'
            )

    async def cancel(self, uid: str, reason: str | None, asker: str, may: May) -> str:
        """Cancel one task, and wait a little for its end.

        Args:
            uid: Its id in this view.
            reason: Recorded with the cause.
            asker: The viewer, for the log and the cause.
            may: Decides whether the viewer may.

        Cancellation: ends the wait; the task stays cancelled.
        """
        if self._fleet is not None and is_marked(uid):
            return await self._cancel_there(self._fleet, uid, reason, asker, may)
        await self._look()
        task = self._live(uid)
        if task is None:
            return encoded({"v": VERSION, "result": "ended", **await self._state(uid)})
        await _check_allowed(task, may)
        TaskLogger(task).warning(
            "%s cancels task %s in the live view%s",
            asker,
            task,
            "" if reason is None else f": {reason}",
        )
        done = await self._manager.cancel_task(uid, reason, timeout=CANCEL_WAIT, asked_by=asker)
        result = "cancelled" if done and task.cancelled() else "ended" if task.done() else "requested"
        state = await self._state(uid) if not task.done() else self._end(task.info())
        return encoded({"v": VERSION, "result": result, **state})

    async def _cancel_there(self, fleet: Fleet, name: str, reason: str | None, asker: str, may: May) -> str:
        """Cancel one task of another node, through the bus."""
        details, task = await self._there(fleet, name)
        if task is None:
            return encoded({"v": VERSION, "result": "ended", **state_of(details)})
        await _check_allowed(task, may)
        logger.warning(
            "%s cancels task %s of node %s in the live view%s",
            asker,
            task.id,
            task.node,
            "" if reason is None else f": {reason}",
        )
        result = await cancelled_there(fleet, task, reason, asker, CANCEL_WAIT)
        after, _ = await self._there(fleet, name)
        return encoded({"v": VERSION, "result": result, **state_of(after)})

    # -- finding --------------------------------------------------------------------------------

    async def _there(self, fleet: Fleet, name: str, node: str | None = None) -> tuple[Row, RemoteTask | None]:
        """The details of a task of another node, and the task if it is live."""
        return await found_there(await self._found_others(fleet), self.hub.feed, name, node)

    async def _found_others(self, fleet: Fleet) -> Others:
        """The other nodes, also if nobody looks at them."""
        others = self._others_of(fleet)
        await others.find(max_age=INTERVAL)
        return others

    async def _allowed(self, task: ManagedTask[Any] | RemoteTask, may: May) -> list[str]:
        return [action for action in sorted(self._actions) if await may(action, task)]

    async def _look(self) -> None:
        """Take an overview, unless there is a recent one: rows have their keys from it."""
        await in_slices(self.hub.feed.look(max_age=INTERVAL))

    async def _admit(self, viewer: str) -> None:
        stopping = Refused(503, "shutting_down", "the server stops", {"Retry-After": "5"})
        if self.hub.closing:
            raise stopping
        try:
            await self.hub.admit(viewer)
        except NotTicking:
            if self.hub.closing:
                raise stopping from None
            message = "the feed has failed: see the log of the service"
            raise Refused(503, "failed", message, {"Retry-After": "5"}) from None
        except TooManyViewers:
            raise Refused(
                429, "too_many_viewers", "too many others are looking", {"Retry-After": f"{LINGER:g}"}
            ) from None

    async def _found(self, name: str, node: str | None) -> tuple[Row, ManagedTask[Any] | RemoteTask | None]:
        """The details of the only task with this id or name, and the task itself if it is live."""
        if self._fleet is None:
            _check_one_process(node)
        elif is_marked(name):
            return await self._there(self._fleet, name, node)
        await self._look()
        there = await self._namesakes(name, node)
        here = await live_named(self.hub.feed, name) if there.is_here else []
        if len(here) + there.count > 1:
            raise several(name, here, there, self.hub.feed)
        details: Row
        if here:
            details = await in_slices(live_detail(self.hub.feed, here[0]))
            return {**details, **there.unheard()}, here[0]
        details, task = there.live or (await self._ended(name, there), None)
        return {**details, **there.unheard()}, task

    async def _namesakes(self, name: str, node: str | None) -> Namesakes:
        """The tasks of other nodes with this id or name."""
        if self._fleet is None or (node is None and self._is_own(name)):
            return Namesakes()
        return await namesakes(await self._found_others(self._fleet), self.hub.feed, name, node)

    def _is_own(self, name: str) -> bool:
        """True if this is the uid of a task of this process: no other one has it."""
        info = self._manager.get_task_info(name)
        return info is not None and info.uid == name

    def _live(self, uid: str) -> ManagedTask[Any] | None:
        """The live task with this uid: never one that merely has this name."""
        try:
            task = self._manager.get_task(uid)
        except TaskNotFoundError:
            return None
        return task if task.uid == uid else None

    async def _state(self, uid: str) -> Row:
        feed, task = self.hub.feed, self._live(uid)
        if task is not None:
            return {"state": "live", "task": feed.rows([task])[0]}
        ended = await self._ended(uid, Namesakes())
        if ended["task"].get("id") != uid:
            raise _not_found(uid, self.hub.feed)
        return {"state": "ended", "task": ended["task"]}

    def _end(self, info: TaskInfo) -> Row:
        """The state of a task that has ended just now; a manager may remember none."""
        feed = self.hub.feed
        return {"state": "ended", "task": ended_row(info, None, feed.overview, feed.shown)}

    async def _ended(self, name: str, there: Namesakes) -> Row:
        """The details of a task that has ended, in this process or elsewhere."""
        info = self._manager.get_task_info(name) if there.is_here else None
        if info is not None:
            return await in_slices(ended_detail(self.hub.feed, info))
        if there.ended is not None:
            return there.ended
        if there.silent:
            nodes = ", ".join(there.silent)
            message = f"no node that answers has a task {name[:80]!r}, and there is no answer from {nodes}"
            raise Refused(503, "silent", message, {"Retry-After": "5"})
        raise _not_found(name, self.hub.feed)


def _in_fleet(shown: Shown, fleet: Fleet) -> Shown:
    return replace(shown, node=None if fleet.is_observer else fleet.node, namespace=fleet.namespace)


def _check_one_process(node: str | None) -> None:
    if node is not None:
        raise BadRequest("this view shows one process: node chooses those of a fleet")


async def _check_allowed(task: ManagedTask[Any] | RemoteTask, may: May) -> None:
    if not await may("cancel", task):
        raise Refused(403, "not_allowed", "you may not cancel this task")


def _not_found(name: str, feed: Feed) -> Refused:
    # Which process says so: a server with several workers may have sent the request to another one.
    return Refused(
        404,
        "not_found",
        f"no task has the id or name {name[:80]!r}: it was never started, or has been forgotten",
        {"Otel-Tasks-Instance": feed.instance},
    )
