"""The endpoints of the live view, as a router of FastAPI; docs/reference/live.md describes them."""

from __future__ import annotations

import inspect
import json
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from fastapi import APIRouter, Request, params
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from otel_tasks import Overview, TaskManager, TaskNotFoundError, global_task_manager
from otel_tasks._core.log import TaskLogger, logger
from otel_tasks.asgi import set_request_timeout
from otel_tasks.fleet import Fleet
from otel_tasks.live import files, guard
from otel_tasks.live.detail import ended_detail, live_detail
from otel_tasks.live.elsewhere import (
    RemoteTask,
    cancelled_there,
    found_there,
    listed_everywhere,
    state_of,
)
from otel_tasks.live.feed import INTERVAL, VERSION, Feed, encoded
from otel_tasks.live.guard import Refused
from otel_tasks.live.hub import LINGER, Hub, NotTicking, TooManyViewers
from otel_tasks.live.marks import is_marked
from otel_tasks.live.others import Others
from otel_tasks.live.params import QUERIED, WATCHED, BadRequest, Params, printable, query, reason_of, watched
from otel_tasks.live.routes import REST, guarded_routes
from otel_tasks.live.rows import Row, Shown, ended_row
from otel_tasks.live.search import listed, named
from otel_tasks.live.slices import in_slices
from otel_tasks.live.sse import EventStream
from otel_tasks.live.stream import Stream, polled

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    from otel_tasks import ManagedTask, TaskInfo

    # With a fleet, the task may be a RemoteTask.
    Can = Callable[[Request, str, Any], bool | Awaitable[bool]]

ACTIONS: Final = frozenset({"cancel"})
# Seconds that a cancel request waits for the task's end.
CANCEL_WAIT = 2.0
MAX_BODY = 8192
READS: Final = ("GET", "HEAD")
METHODS: Final = (*READS, "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def live_view(
    *,
    auth: Any = None,
    insecure: bool = False,
    hosts: Collection[str] = (),
    manager: TaskManager | None = None,
    fleet: Fleet | None = None,
    actions: Collection[str] = (),
    can: Can | None = None,
    trace_url: str | None = None,
    errors: bool = False,
    metadata: Collection[str] = (),
) -> APIRouter:
    """Make a router that shows what runs in a manager: a page, and the JSON behind it.

    Without a viewer it costs nothing. It shows names, times, lines of code, and causes; it does *not* show
    arguments, results, or local variables.

    Args:
        auth: A dependency, ``Depends(admin)``, that refuses clients who may not look: it raises, or returns
            False or a response. Any other value that it returns names the user in the log and in the cause of
            a cancellation: a string, or something with ``username``, ``name``, ``email``, ``sub``, or ``id``,
            as an attribute or a key.
        insecure: True builds a view without ``auth``, which answers only clients on this machine, under a
            local name. Behind a proxy, use ``auth``: one on the same machine that adds no header looks like
            a local client.
        hosts: Further names that such clients may use.
        manager: The manager to show. None: that of the fleet, or ``global_task_manager``.
        fleet: Show all processes of this fleet. None shows this process.
        actions: The actions of viewers besides looking: ``{"cancel"}``, or nothing.
        can: Called as ``can(request, action, task)`` before each action, and to offer it; returns whether
            this client may. It may be a coroutine function. None allows what ``actions`` has. A task of
            another process is a ``RemoteTask``.
        trace_url: The link to a trace, with ``{trace_id}`` in it. None shows no links.
        errors: Show the texts of exceptions, which may contain secrets; their types are always shown.
        metadata: The keys of tasks' metadata to show.

    Returns:
        The router, for ``app.include_router(..., prefix="/tasks")``; it needs a prefix.

    Raises:
        ValueError: There is neither ``auth`` nor ``insecure=True``, an action or a host is none, or the
            fleet has another manager.
        TypeError: ``auth`` is not a dependency, ``manager`` not a TaskManager, ``fleet`` not a Fleet, or a
            collection a string.

    Telemetry: a cancellation links to the span of its request, and its cause names the user.

    Example:
        >>> app.include_router(live_view(auth=Depends(admin)), prefix="/tasks")
    """
    _check_auth(auth, insecure)
    _check_collections(hosts=hosts, actions=actions, metadata=metadata)
    names = frozenset(map(guard.host_name, hosts))
    if "" in names:
        raise ValueError(f"hosts must be names, such as 'tasks.internal', got {sorted(hosts)}")
    unknown = set(actions) - ACTIONS
    if unknown:
        raise ValueError(f"actions may contain 'cancel', got {sorted(unknown)}")
    if manager is not None and not isinstance(manager, TaskManager):
        raise TypeError(f"manager must be a TaskManager, got {manager!r}")
    if fleet is not None:
        manager = _manager_of(fleet, manager)
    shown = Shown(errors=errors, metadata=tuple(metadata), trace_url=trace_url)
    view = _View(manager or global_task_manager, shown, frozenset(actions), can, fleet)
    return _router(view, auth, insecure, names)


def _check_collections(**options: Collection[str]) -> None:
    for option, value in options.items():
        # Each of its characters would be one.
        if isinstance(value, str):
            raise TypeError(f"{option} must be a collection of strings, got {value!r}: write {{{value!r}}}")


def _manager_of(fleet: object, manager: TaskManager | None) -> TaskManager:
    if not isinstance(fleet, Fleet):
        raise TypeError(f"fleet must be a Fleet, got {fleet!r}")
    if manager is not None and manager is not fleet.manager:
        raise ValueError(f"manager must be that of the fleet, {fleet.manager.name!r}: leave it out")
    return fleet.manager


def _check_auth(auth: object, insecure: bool) -> None:
    if auth is not None and (not isinstance(auth, params.Depends) or auth.dependency is None):
        raise TypeError(f"auth must be a dependency, got {auth!r}: write live_view(auth=Depends(...))")
    if auth is None and not insecure:
        raise ValueError(
            "live_view() needs auth: everyone who can reach it would see what your service does. "
            "Write live_view(auth=Depends(...)), or live_view(insecure=True) for clients on this machine"
        )


def _router(view: _View, auth: Any, insecure: bool, hosts: Collection[str]) -> APIRouter:
    pages: set[Any] = set()
    fallbacks: set[Any] = set()
    routes = guarded_routes(insecure=insecure, hosts=hosts, pages=pages, fallbacks=fallbacks)
    router = APIRouter(include_in_schema=False, route_class=routes)

    def add(path: str, answer: Callable[[Request, Any], Awaitable[Response]], *methods: str) -> Any:
        # The dependency's value is the user: one parameter for both.
        async def endpoint(request: Request, user: Any = auth) -> Response:
            if isinstance(user, Response):
                # A redirect to a login that is returned instead of raised: it does not let anybody in.
                return user
            if user is False:
                raise Refused(403, "unauthorized", "you may not look at this")
            return await answer(request, user)

        # FastAPI reads annotations in the module's names, and these are objects already.
        endpoint.__annotations__ = {"request": Request, "user": Any, "return": Response}
        names = list(methods or READS)
        router.add_api_route(path, endpoint, methods=names, response_class=Response, response_model=None)
        return endpoint

    pages.add(add("", _redirect))
    pages.add(add("/", partial(_file, files.PAGE)))
    for name in files.parts():
        add(f"/{name}", partial(_file, name))
    add("/v1/snapshot", view.snapshot)
    add("/v1/events", view.events)
    add("/v1/tasks", view.tasks)
    add("/v1/tasks/{task_id:path}/cancel", view.cancel, "POST")
    add("/v1/tasks/{task_id:path}", view.task)
    fallbacks.add(add(REST, _nothing, *METHODS))
    return router


class _View:
    """The endpoints of one view.

    Args:
        manager: The manager to show.
        shown: What the view shows of a task.
        actions: The actions of viewers.
        can: Decides on each action.
        fleet: The fleet to show; None without one.
    """

    def __init__(
        self,
        manager: TaskManager,
        shown: Shown,
        actions: Collection[str],
        can: Can | None,
        fleet: Fleet | None = None,
    ) -> None:
        self._fleet = fleet
        self._others: Others | None = None
        self._manager = manager
        self._shown = shown
        self._actions = actions
        self._can = can
        self._hub: Hub | None = None

    @property
    def hub(self) -> Hub:
        """The viewers; made by the first, because a server may fork after the view is built."""
        others = None if self._fleet is None else self._others_of(self._fleet)
        node = None if others is None else others.node
        # A fleet that starts again makes another node.
        if self._hub is None or self._hub.feed.shown.node != node:
            shown = replace(self._shown, node=node)
            self._hub = Hub(Feed(self._manager, shown, self._actions, others), others)
        return self._hub

    def _others_of(self, fleet: Fleet) -> Others:
        if not fleet.is_started:
            message = "this process has not joined its fleet"
            raise Refused(503, "not_started", message, {"Retry-After": "5"})
        if self._others is None or self._others.node != fleet.node:
            self._others = Others(fleet.views, fleet.node, self._manager.now)
        return self._others

    async def snapshot(self, request: Request, user: Any) -> Response:
        """Answer with the whole overview."""
        Params(request.query_params.multi_items(), ())
        await self._admit(_address(request))
        return _json(self.hub.feed.snapshot())

    async def events(self, request: Request, user: Any) -> Response:
        """Answer with a stream, or with what it would begin with."""
        wanted = watched(
            Params(request.query_params.multi_items(), WATCHED),
            request.headers.get("last-event-id"),
            Overview.ROOT,
        )
        # The middleware would cut it short; it ends by itself.
        with suppress(RuntimeError):
            set_request_timeout(None)
        viewer = wanted.viewer or _address(request)
        await self._admit(viewer)
        await self.hub.read_now(wanted.expand, wanted.panels)
        stream = Stream(self.hub, viewer, wanted.expand, wanted.names, wanted.panels, wanted.after)
        if wanted.poll:
            return _json(polled(stream))
        return EventStream(stream)

    async def tasks(self, request: Request, user: Any) -> Response:
        """Answer with a list of tasks."""
        pairs = request.query_params.multi_items()
        if self._fleet is None:
            return _json(await listed(self.hub.feed, query(Params(pairs, QUERIED))))
        params = Params(pairs, (*QUERIED, "node"))
        wanted, others = query(params), await self._found_others(self._fleet)
        node = params.text("node")
        return _json(await listed_everywhere(others, self.hub.feed, wanted, pairs, node))

    async def task(self, request: Request, user: Any) -> Response:
        """Answer with everything about one task."""
        Params(request.query_params.multi_items(), ())
        feed, name = self.hub.feed, request.path_params["task_id"]
        if self._fleet is not None and is_marked(name):
            details, there = await self._there(self._fleet, name)
            allowed = [] if there is None else await self._allowed(request, there)
            return _json(encoded({**feed.stamp(), **details, "can": allowed}))
        await self._look()
        task = await self._found(name)
        if task is None:
            return _json(encoded({**feed.stamp(), **await self._ended(name), "can": []}))
        allowed = await self._allowed(request, task)
        detail = await in_slices(live_detail(feed, task))
        return _json(encoded({**feed.stamp(), **detail, "can": allowed}))

    async def cancel(self, request: Request, user: Any) -> Response:
        """Cancel one task, and wait a little for its end."""
        if "cancel" not in self._actions:
            raise Refused(
                403, "read_only", 'this view is read-only: live_view(actions={"cancel"}) lets it cancel'
            )
        reason = reason_of(await _body(request))
        uid = request.path_params["task_id"]
        if self._fleet is not None and is_marked(uid):
            return await self._cancel_there(self._fleet, request, user, reason)
        await self._look()
        task = self._live(uid)
        if task is None:
            return _json(encoded({"v": VERSION, "result": "ended", **await self._state(uid)}))
        if not await self._may(request, "cancel", task):
            raise Refused(403, "not_allowed", "you may not cancel this task")
        name = _asker(request, user)
        TaskLogger(task).warning(
            "%s cancels task %s in the live view%s",
            name,
            task,
            "" if reason is None else f": {reason}",
        )
        done = await self._manager.cancel_task(uid, reason, timeout=CANCEL_WAIT, asked_by=name)
        result = "cancelled" if done and task.cancelled() else "ended" if task.done() else "requested"
        state = await self._state(uid) if not task.done() else self._end(task.info())
        return _json(encoded({"v": VERSION, "result": result, **state}))

    async def _cancel_there(self, fleet: Fleet, request: Request, user: Any, reason: str | None) -> Response:
        """Cancel one task of another node, through the bus."""
        name = request.path_params["task_id"]
        details, task = await self._there(fleet, name)
        if task is None:
            return _json(encoded({"v": VERSION, "result": "ended", **state_of(details)}))
        if not await self._may(request, "cancel", task):
            raise Refused(403, "not_allowed", "you may not cancel this task")
        asker = _asker(request, user)
        logger.warning(
            "%s cancels task %s of node %s in the live view%s",
            asker,
            task.id,
            task.node,
            "" if reason is None else f": {reason}",
        )
        result = await cancelled_there(fleet, task, reason, asker, CANCEL_WAIT)
        after, _ = await self._there(fleet, name)
        return _json(encoded({"v": VERSION, "result": result, **state_of(after)}))

    async def _there(self, fleet: Fleet, name: str) -> tuple[Row, RemoteTask | None]:
        """The details of a task of another node, and the task if it is live."""
        return await found_there(await self._found_others(fleet), self.hub.feed, name)

    async def _found_others(self, fleet: Fleet) -> Others:
        """The other nodes, also if nobody looks at them."""
        others = self._others_of(fleet)
        await others.find(max_age=INTERVAL)
        return others

    async def _allowed(self, request: Request, task: ManagedTask[Any] | RemoteTask) -> list[str]:
        return [action for action in sorted(self._actions) if await self._may(request, action, task)]

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

    async def _may(self, request: Request, action: str, task: ManagedTask[Any] | RemoteTask) -> bool:
        if self._can is None:
            return True
        allowed = self._can(request, action, task)
        if inspect.isawaitable(allowed):
            allowed = await allowed
        return allowed is True

    async def _found(self, name: str) -> ManagedTask[Any] | None:
        """The live task with this uid or id, or the only one with this name."""
        with suppress(TaskNotFoundError):
            return self._manager.get_task(name)
        found = await named(self.hub.feed, name)
        if len(found) > 1:
            message = f"{len(found)} live tasks have the name {name[:80]!r}: use the id of one, such as "
            raise Refused(404, "not_found", f"{message}{found[0].uid!r}, the oldest")
        return found[0] if found else None

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
        ended = await self._ended(uid)
        if ended["task"].get("id") != uid:
            raise _not_found(uid, self.hub.feed)
        return {"state": "ended", "task": ended["task"]}

    def _end(self, info: TaskInfo) -> Row:
        """The state of a task that has ended just now; a manager may remember none."""
        feed = self.hub.feed
        return {"state": "ended", "task": ended_row(info, None, feed.overview, feed.shown)}

    async def _ended(self, name: str) -> Row:
        info = self._manager.get_task_info(name)
        if info is None:
            raise _not_found(name, self.hub.feed)
        return await in_slices(ended_detail(self.hub.feed, info))


def user_name(user: Any) -> str | None:
    """The name of the user that ``auth`` has returned; None if it shows none."""
    if isinstance(user, str):
        return user[:120] or None
    for key in ("username", "name", "email", "sub", "id"):
        value = user.get(key) if isinstance(user, dict) else getattr(user, key, None)
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            return str(value)[:120]
    return None


def _asker(request: Request, user: Any) -> str:
    return printable(user_name(user) or f"a client at {_address(request)}")


def _address(request: Request) -> str:
    return "unknown" if request.client is None else request.client.host


async def _body(request: Request) -> Any:
    """The JSON of a request, which must say that it is JSON."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "not_json", "the content type must be application/json")
    body = b""
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY:
                raise BadRequest(f"the body has more than {MAX_BODY} bytes")
    except ClientDisconnect:
        raise BadRequest("the body ends early") from None
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise BadRequest("the body is not JSON") from None


async def _redirect(request: Request, user: Any) -> Response:
    # Relative: whatever prefix a proxy has taken away stays. With "./", because a prefix may have a
    # parameter: "https:evil.example" is a name in a path, and another site at the start of a reference.
    last = quote(request.scope["path"].rpartition("/")[2])
    query_string = request.scope["query_string"].decode("latin-1")
    search = f"?{query_string}" if query_string else ""
    return Response(status_code=307, headers={"Location": f"./{last}/{search}"})


async def _file(name: str, request: Request, user: Any) -> Response:
    return files.answer(name, ",".join(request.headers.getlist("accept-encoding")))


async def _nothing(request: Request, user: Any) -> Response:
    raise Refused(404, "not_found", "the live view has nothing at this path")


def _json(data: str) -> Response:
    return Response(data, media_type="application/json")


def _not_found(name: str, feed: Feed) -> Refused:
    # Which process says so: a server with several workers may have sent the request to another one.
    return Refused(
        404,
        "not_found",
        f"no task has the id {name[:80]!r}: it was never started, or is forgotten",
        {"Otel-Tasks-Instance": feed.instance},
    )
