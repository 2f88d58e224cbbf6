"""The endpoints of the live view, as a router of FastAPI; docs/reference/live.md describes them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from fastapi import APIRouter, Request, params
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from otel_tasks import Overview, TaskManager, global_task_manager
from otel_tasks._core.checks import check_flag
from otel_tasks.asgi import set_request_timeout
from otel_tasks.fleet import Fleet
from otel_tasks.live import files, guard
from otel_tasks.live.guard import Refused
from otel_tasks.live.params import WATCHED, BadRequest, Params, printable, reason_of, watched
from otel_tasks.live.routes import REST, guarded_routes
from otel_tasks.live.rows import Shown
from otel_tasks.live.sse import EventStream
from otel_tasks.live.stream import polled
from otel_tasks.live.view import View

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from otel_tasks import ManagedTask
    from otel_tasks.live.elsewhere import RemoteTask

    # With a fleet, the task may be a RemoteTask.
    Can = Callable[[Request, str, Any], bool | Awaitable[bool]]

ACTIONS: Final = frozenset({"cancel"})
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
        ValueError: There is neither ``auth`` nor ``insecure=True``, an action or a host is none,
            ``trace_url`` has no ``{trace_id}``, or the fleet has another manager.
        TypeError: ``auth`` is not a dependency, ``manager`` not a TaskManager, ``fleet`` not a Fleet, a
            collection a string or one of other things than strings, or another option has the wrong type.

    Telemetry: a cancellation links to the span of its request, and its cause names the user.

    Example:
        >>> app.include_router(live_view(auth=Depends(admin)), prefix="/tasks")
    """
    check_flag("insecure", insecure)
    check_flag("errors", errors)
    _check_auth(auth, insecure)
    _check_can(can)
    _check_trace_url(trace_url)
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
    view = View(manager or global_task_manager, shown, frozenset(actions), fleet)
    return _router(_Endpoints(view, can), auth, insecure, names)


def _check_collections(**options: object) -> None:
    for option, value in options.items():
        # Each character of a string would be one.
        is_text = isinstance(value, str)
        if is_text or not isinstance(value, Collection) or not all(isinstance(each, str) for each in value):
            hint = f": write {{{value!r}}}" if is_text else ""
            raise TypeError(f"{option} must be a collection of strings, got {value!r}{hint}")


def _check_can(can: object) -> None:
    if can is not None and not callable(can):
        raise TypeError(f"can must be a function, got {can!r}: write can=lambda request, action, task: ...")


def _check_trace_url(trace_url: object) -> None:
    example = "https://jaeger.example.com/trace/{trace_id}"
    if trace_url is not None and not isinstance(trace_url, str):
        raise TypeError(f"trace_url must be a string such as {example!r}, got {trace_url!r}")
    if trace_url is not None and "{trace_id}" not in trace_url:
        raise ValueError(f"trace_url must have {{trace_id}} in it, as in {example!r}, got {trace_url!r}")


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


def _router(endpoints: _Endpoints, auth: Any, insecure: bool, hosts: Collection[str]) -> APIRouter:
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
    add("/v1/snapshot", endpoints.snapshot)
    add("/v1/events", endpoints.events)
    add("/v1/tasks", endpoints.tasks)
    add("/v1/tasks/{task_id:path}/cancel", endpoints.cancel, "POST")
    add("/v1/tasks/{task_id:path}", endpoints.task)
    fallbacks.add(add(REST, _nothing, *METHODS))
    return router


class _Endpoints:
    """The endpoints of one view: what a request means to it, and its answers as responses.

    Args:
        view: The view.
        can: Decides on each action.
    """

    def __init__(self, view: View, can: Can | None) -> None:
        self._view = view
        self._can = can

    async def snapshot(self, request: Request, user: Any) -> Response:
        """Answer with the whole overview."""
        Params(request.query_params.multi_items(), ())
        return _json(await self._view.snapshot(_address(request)))

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
        stream = await self._view.stream(wanted, _address(request))
        return _json(polled(stream)) if wanted.poll else EventStream(stream)

    async def tasks(self, request: Request, user: Any) -> Response:
        """Answer with a list of tasks."""
        return _json(await self._view.tasks(request.query_params.multi_items()))

    async def task(self, request: Request, user: Any) -> Response:
        """Answer with everything about one task."""
        node = Params(request.query_params.multi_items(), ("node",)).text("node")
        task_id, may = request.path_params["task_id"], partial(self._may, request)
        return _json(await self._view.task(task_id, may, node))

    async def cancel(self, request: Request, user: Any) -> Response:
        """Cancel one task, and wait a little for its end."""
        self._view.check_action("cancel")
        reason = reason_of(await _body(request))
        uid, may = request.path_params["task_id"], partial(self._may, request)
        return _json(await self._view.cancel(uid, reason, _asker(request, user), may))

    async def _may(self, request: Request, action: str, task: ManagedTask[Any] | RemoteTask) -> bool:
        if self._can is None:
            return True
        allowed = self._can(request, action, task)
        if inspect.isawaitable(allowed):
            allowed = await allowed
        return allowed is True


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
