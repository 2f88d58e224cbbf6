"""The same two handlers in frameworks that are not FastAPI, with the middleware and without."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import blacksheep
import django
import django.conf
import django.http
import django.urls
import litestar
import litestar.response
import quart
from blacksheep.server.responses import text as blacksheep_text
from django.core.handlers.asgi import ASGIHandler
from opentelemetry import trace
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.sdk.trace import TracerProvider
from starlette.types import Receive, Scope, Send

from otel_tasks import TaskManager, create_task, current_group
from otel_tasks.asgi import TaskGroupMiddleware
from tests.e2e.journal import manager, note, noted, released, work
from tests.e2e.streams_app import BODIES

App: TypeAlias = Any
"""Each framework has types of its own for what ASGI says."""


async def slow(key: str) -> str:
    """Wait for the test; a cancellation is cleaned up after."""
    _start(key)
    try:
        with noted(key):
            await released(key)
    except asyncio.CancelledError:
        with noted(key, "rest"):
            await asyncio.sleep(0.01)
        raise
    return "slow"


async def echo(key: str, receive: Callable[[], Awaitable[object]]) -> None:
    """Receive until the framework says in its own way that the client has left."""
    with noted(key):
        _start(key)
        note(key, "waits")
        while True:
            if await receive() is None:
                return


def _start(key: str) -> None:
    create_task(work(key, "first"), name="first")
    if (group := current_group()) is not None:
        note(key, "group", name=group.name)


# --- Django -------------------------------------------------------------------------------------------

django.conf.settings.configure(
    ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], SECRET_KEY="x", LOGGING_CONFIG=None
)
django.setup()


async def _view(_: django.http.HttpRequest, key: str) -> django.http.HttpResponse:
    return django.http.HttpResponse((await slow(key)).encode())


async def _streaming_view(
    _: django.http.HttpRequest, how: str, key: str
) -> django.http.StreamingHttpResponse:
    return django.http.StreamingHttpResponse(BODIES[how](key))


urlpatterns = [
    django.urls.path("slow/<str:key>", _view),
    django.urls.path("stream/<str:how>/<str:key>", _streaming_view),
]


async def _django() -> App:
    return ASGIHandler()


# --- Quart --------------------------------------------------------------------------------------------


async def _quart() -> App:
    app = quart.Quart(__name__)

    @app.route("/slow/<key>", methods=["GET", "POST"])
    async def handler(key: str) -> str:
        return await slow(key)

    @app.route("/stream/<how>/<key>", methods=["GET", "POST"])
    async def stream(how: str, key: str) -> quart.Response:
        response = quart.Response(BODIES[how](key), content_type="text/plain")
        response.timeout = None
        return response

    @app.websocket("/ws/<key>")
    async def socket(key: str) -> None:
        await quart.websocket.accept()
        await echo(key, quart.websocket.receive)

    await app.startup()
    return app


# --- Litestar -----------------------------------------------------------------------------------------


@litestar.route("/slow/{key:str}", http_method=["GET", "POST"], status_code=200)
async def _litestar_handler(key: str) -> str:
    return await slow(key)


@litestar.route("/stream/{how:str}/{key:str}", http_method=["GET", "POST"], status_code=200)
async def _litestar_stream(how: str, key: str) -> litestar.response.Stream:
    return litestar.response.Stream(BODIES[how](key))


@litestar.websocket("/ws/{key:str}")
async def _litestar_socket(key: str, socket: litestar.WebSocket[Any, Any, Any]) -> None:
    await socket.accept()
    await echo(key, socket.receive_text)


async def _litestar() -> App:
    return litestar.Litestar([_litestar_handler, _litestar_stream, _litestar_socket], logging_config=None)


# --- BlackSheep ---------------------------------------------------------------------------------------


async def _blacksheep() -> App:
    app = blacksheep.Application(router=blacksheep.Router())

    async def handler(key: str) -> blacksheep.Response:
        return blacksheep_text(await slow(key))

    app.router.add_get("/slow/{key}", handler)
    app.router.add_post("/slow/{key}", handler)

    @app.router.ws("/ws/{key}")
    async def socket(socket: blacksheep.WebSocket, key: str) -> None:
        await socket.accept()
        await echo(key, socket.receive_text)

    await app.start()  # type: ignore[no-untyped-call]  # has no annotations
    return app


# --- none at all, with a route on the server's span -----------------------------------------------------


async def _span() -> App:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        trace.get_current_span().set_attribute("http.route", "/slow/{key}")
        await slow(scope["path"].rsplit("/", 1)[-1])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return app


_MAKERS: dict[str, Callable[[], Awaitable[App]]] = {
    "django": _django,
    "quart": _quart,
    "litestar": _litestar,
    "blacksheep": _blacksheep,
    "span": _span,
}
_made: dict[str, App] = {}


async def serve(framework: str, bound: bool, scope: Scope, receive: Receive, send: Send) -> None:
    """Serve one connection, within the middleware if `bound`."""
    if framework not in _made:
        # A framework that configures logging gets the records of all tests that follow. Litestar's default
        # writes them in a thread, later than the event that a test waits for.
        handlers = list(logging.root.handlers)
        _made[framework] = await _MAKERS[framework]()
        assert logging.root.handlers == handlers, f"{framework} replaced the root logger's handlers"
    app = _made[framework]
    if bound:
        app = TaskGroupMiddleware(app, manager=_traced if framework == "span" else manager)
    if framework == "span":
        app = OpenTelemetryMiddleware(app, tracer_provider=_provider)
    await app(scope, receive, send)


_provider = TracerProvider()
_traced = TaskManager("traced", tracer_provider=_provider)
