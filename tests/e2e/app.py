"""The application that the end-to-end tests serve with real servers.

One process serves several variants, each below a path prefix of its own (`/plain/wait/k1`), so that a
server is started once. `journal` has what they share.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import BackgroundTasks, FastAPI, Request, WebSocket
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import format_span_id, format_trace_id
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from otel_tasks import ManagedTask, TaskManager, create_task, current_group, current_task
from otel_tasks.asgi import TaskGroupMiddleware, uncancellable
from otel_tasks.fastapi import make_lifespan
from tests.e2e import (
    causes_app,
    cleanup_app,
    listeners_app,
    shared_app,
    sockets_app,
    streams_app,
    threads_app,
)
from tests.e2e.journal import (
    PATIENCE,
    manager,
    note,
    note_trace,
    noted,
    pass_through,
    release_all,
    release_of,
    released,
    work,
)

FRAMEWORKS = ("django", "quart", "litestar", "blacksheep", "span")
"""See `frameworks_app`."""


def start_work(key: str) -> ManagedTask[str]:
    """Two tasks of the request, and one of the application that a disconnect must not touch."""
    task = create_task(work(key, "first"), name="first")
    create_task(work(key, "second"), name="second")
    manager.create_task(work(key, "outbox"), name="outbox", group="outbox")
    return task


# --- the routes, the same in each variant --------------------------------------------------------


def add_routes(app: FastAPI) -> None:
    """Give `app` every route that a scenario needs."""
    app.include_router(shared_app.sessions)
    app.include_router(sockets_app.router)
    app.include_router(causes_app.router)

    @app.get("/ping/{key}")
    async def ping(key: str) -> dict[str, str]:
        note(key, "ping")
        return {"key": key}

    @app.get("/wait/{key}")
    @app.post("/wait/{key}")
    async def wait(key: str) -> dict[str, str]:
        with noted(key):
            start_work(key)
            await released(key)
        return {"key": key}

    @app.post("/await-task/{key}")
    async def await_task(key: str) -> dict[str, str]:
        with noted(key):
            return {"done": await start_work(key)}

    @app.post("/one-by-one/{key}")
    async def one_by_one(key: str) -> dict[str, str]:
        with noted(key):
            start_work(key)
            await released(key)
            return {"done": await create_task(work(key, "third"), name="third")}

    @app.post("/read/{key}")
    async def read(key: str, request: Request, late: bool = False) -> dict[str, str | int]:
        with noted(key):
            start_work(key)
            if late:
                await released(key)
            body = await request.body()
        return {"length": len(body), "sha256": hashlib.sha256(body).hexdigest()}

    @app.get("/stream/{key}")
    @app.post("/stream/{key}")
    async def stream(key: str, quiet: bool = False) -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            with noted(key, "stream"):
                yield b"first\n"
                if quiet:
                    await released(key)
                while not release_of(key).is_set():
                    yield b"more\n"
                    await asyncio.sleep(0.01)
                yield b"last\n"

        with noted(key):
            start_work(key)
        return StreamingResponse(chunks(), media_type="text/plain")

    @app.get("/background/{key}")
    async def background(key: str, later: BackgroundTasks, late: bool = False) -> dict[str, str]:
        async def afterwards() -> None:
            with noted(key, "background"):
                await released(key)

        create_task(stubborn_work(key), name="first")
        later.add_task(afterwards)
        if late:
            await released(f"{key}-answer")
        return {"key": key}

    @app.get("/polled/{key}")
    async def polled(key: str, request: Request) -> dict[str, str]:
        with noted(key):
            start_work(key)
            deadline = time.monotonic() + PATIENCE
            while not await request.is_disconnected():
                if time.monotonic() > deadline:
                    raise TimeoutError("is_disconnected() stayed false")
                await asyncio.sleep(0.01)
            note(key, "saw disconnect")
        return {"key": key}

    @app.get("/fail/{key}")
    async def fail(key: str, how: str = "handler") -> None:
        async def failing() -> None:
            await released(key)
            raise ValueError(f"boom {key}")

        with noted(key):
            create_task(work(key, "first"), name="first")
            if how == "task":
                await create_task(failing(), name="failing")
            await failing()

    @app.get("/thread/{key}")
    def thread(key: str) -> dict[str, str]:
        with noted(key):
            group = current_group()
            assert group is not None
            deadline = time.monotonic() + PATIENCE
            while not group.cancel_event.is_set():
                if time.monotonic() > deadline:
                    raise TimeoutError("the cancel event stayed unset")
                time.sleep(0.005)
            note(key, "saw event")
        return {"key": key}

    @app.get("/protected/{key}")
    async def protected(key: str) -> dict[str, str]:
        with noted(key):
            create_task(work(key, "first"), name="first")
            async with uncancellable():
                with noted(key, "protected"):
                    await released(key)
            await asyncio.sleep(PATIENCE)
        return {"key": key}

    @app.websocket("/ws/{key}")
    async def websocket(socket: WebSocket, key: str, idle: bool = False) -> None:
        await socket.accept()
        note_trace(key)
        with noted(key):
            start_work(key)
            if idle:
                await released(key)
            while True:
                message = await socket.receive()
                note(key, message["type"], code=message.get("code"), text=message.get("text"))
                if message["type"] == "websocket.disconnect":
                    return
                await socket.send_text(f"echo {message.get('text')}")


async def stubborn_work(key: str) -> str:
    """Like `work`, but only a cancellation ends it: what is left at the end of a request."""
    _unreleased = f"{key}/never"
    try:
        note(key, "task started", task="first")
        await released(_unreleased)
    except asyncio.CancelledError:
        task = current_task()
        cause = task.cause if task is not None else None
        note(key, "task cancelled", task="first", kind=str(cause.kind) if cause is not None else None)
        raise
    return "first"


async def raw(scope: Scope, receive: Receive, send: Send) -> None:
    """An application without a framework that reads its messages itself."""
    key = scope["path"].rsplit("/", 1)[-1]
    with noted(key):
        start_work(key)
        while True:
            message = await receive()
            note(key, message["type"], length=len(message.get("body", b"")))
            if message["type"] == "http.disconnect":
                # Some servers say it once, and a further call would never return.
                async with asyncio.timeout(PATIENCE):
                    for _ in range(3):
                        note(key, f"{(await receive())['type']} again")
                return
            if not message.get("more_body", False) and scope["method"] == "POST":
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": b"done"})
                return


# --- the variants --------------------------------------------------------------------------------


def _fastapi(**options: Any) -> FastAPI:
    app = FastAPI(**options)
    add_routes(app)
    return app


def limit(scope: Scope) -> float | None:
    """A tenth of a second for the requests that ask for it."""
    return 0.1 if b"limit" in scope["query_string"] else None


def current_binding(**options: Any) -> FastAPI:
    app = _fastapi()
    options.setdefault("request_timeout", limit)
    app.add_middleware(TaskGroupMiddleware, manager=manager, **options)
    return app


def _inside_of_us() -> FastAPI:
    app = _fastapi()
    app.add_middleware(BaseHTTPMiddleware, dispatch=pass_through)
    app.add_middleware(TaskGroupMiddleware, manager=manager, request_timeout=limit)
    return app


def _outside_of_us(**options: Any) -> FastAPI:
    app = current_binding(**options)
    app.add_middleware(BaseHTTPMiddleware, dispatch=pass_through)
    return app


def _mounted() -> FastAPI:
    outer = FastAPI()
    outer.add_middleware(TaskGroupMiddleware, manager=manager)
    outer.mount("/sub", current_binding(request_timeout=None))
    return outer


class Stack:
    """A tracer provider with its spans in memory, and the manager that uses it."""

    def __init__(self, name: str) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.manager = TaskManager(name, tracer_provider=self.provider)


stacks = {name: Stack(name) for name in ("native", "native-stock", "contrib", "contrib-asgi")}


def _native() -> FastAPI:
    stack = stacks["native"]
    app = _fastapi(telemetry={"tracer_provider": stack.provider})
    app.add_middleware(TaskGroupMiddleware, manager=stack.manager, request_timeout=limit)
    return app


def _native_stock() -> FastAPI:
    return _fastapi(telemetry={"tracer_provider": stacks["native-stock"].provider})


def _contrib() -> FastAPI:
    stack = stacks["contrib"]
    app = _fastapi()
    app.add_middleware(TaskGroupMiddleware, manager=stack.manager, request_timeout=limit)
    FastAPIInstrumentor.instrument_app(app, tracer_provider=stack.provider)
    return app


def _contrib_asgi() -> ASGIApp:
    stack = stacks["contrib-asgi"]
    app = _fastapi(telemetry={"tracing": False})
    inner = TaskGroupMiddleware(app, manager=stack.manager, request_timeout=limit)
    return OpenTelemetryMiddleware(inner, tracer_provider=stack.provider)


def _framework(name: str, *, bound: bool) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        # With its first request: four frameworks take longer to import than all of the rest.
        from tests.e2e import frameworks_app

        await frameworks_app.serve(name, bound, scope, receive, send)

    return app


variants: dict[str, ASGIApp] = {
    "plain": current_binding(),
    "stock": _fastapi(),
    "keep": current_binding(cancel_handler=False),
    "always": current_binding(cancel_handler=True),
    "inside": _inside_of_us(),
    "outside": _outside_of_us(),
    "keep-outside": _outside_of_us(cancel_handler=False),
    "mounted": _mounted(),
    "raw": TaskGroupMiddleware(raw, manager=manager),
    "native": _native(),
    "native-stock": _native_stock(),
    "contrib": _contrib(),
    "contrib-asgi": _contrib_asgi(),
    **cleanup_app.variants,
    **listeners_app.variants,
    **threads_app.variants,
    **shared_app.variants,
    **sockets_app.variants,
    **streams_app.variants,
    **{name: _framework(name, bound=True) for name in FRAMEWORKS},
    **{f"bare-{name}": _framework(name, bound=False) for name in FRAMEWORKS},
}


# --- what the tests ask of the process -----------------------------------------------------------


@asynccontextmanager
async def _stacks_running(_: FastAPI) -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as running:
        for stack in stacks.values():
            await running.enter_async_context(stack.manager)
        yield


# Below the servers' own second, as one would have it.
_lifespan = make_lifespan(_stacks_running, manager=manager, grace=0.1, timeout=0.5)
control = FastAPI(telemetry={"tracing": False}, lifespan=_lifespan)


@control.post("/release/{key}")
async def release(key: str) -> None:
    """Let every handler and task of `key` go on."""
    release_of(key).set()


@control.post("/release-all/{prefix}")
async def release_everything(prefix: str) -> None:
    """Let go on all that waits for a key which begins with `prefix`."""
    release_all(prefix)


@control.get("/state")
async def state() -> dict[str, Any]:
    """The live managed tasks, asyncio tasks, and the memory of this process."""
    managers = [manager, *(stack.manager for stack in stacks.values())]
    live = [
        info.id for each in managers for info in each.get_all_task_info().values() if not info.status.is_final
    ]
    tasks = asyncio.all_tasks()
    names = [getattr(task.get_coro(), "__qualname__", "?") for task in tasks]
    # sse-starlette keeps one such task per loop from its first response on.
    coroutines = [name for name in names if name != "_shutdown_watcher"]
    ours = [task.get_name() for task in tasks if task.get_name().startswith("otel_tasks")]
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory = pages * os.sysconf("SC_PAGE_SIZE")
    return {"pid": os.getpid(), "live": live, "ours": ours, "asyncio": sorted(coroutines), "rss": memory}


@control.get("/spans/{stack}")
async def spans(stack: str) -> list[dict[str, Any]]:
    """The finished spans of one telemetry stack."""
    return [_span_as_dict(span) for span in stacks[stack].exporter.get_finished_spans()]


def _span_as_dict(span: ReadableSpan) -> dict[str, Any]:
    context = span.context
    assert context is not None
    return {
        "name": span.name,
        "kind": span.kind.name,
        "trace_id": format_trace_id(context.trace_id),
        "span_id": format_span_id(context.span_id),
        "parent_id": format_span_id(span.parent.span_id) if span.parent is not None else None,
        "status": span.status.status_code.name,
        "attributes": dict(span.attributes or {}),
        "events": [event.name for event in span.events],
        "event_times": {event.name: event.timestamp for event in span.events},
        "end_time": span.end_time,
        "links": [
            {"span_id": format_span_id(link.context.span_id), "attributes": dict(link.attributes or {})}
            for link in span.links
        ],
        "scope": span.instrumentation_scope.name if span.instrumentation_scope is not None else None,
    }


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Hand a request to the variant that its path begins with."""
    if scope["type"] == "lifespan":
        await control(scope, receive, send)
        return
    _, first, rest = (*scope["path"].split("/", 2), "")[:3]
    chosen = variants.get(first)
    if chosen is None:
        await control(scope, receive, send)
        return
    path = f"/{rest}"
    key = path.rsplit("/", 1)[-1]
    with noted(key, "app"):
        await chosen({**scope, "path": path, "raw_path": path.encode()}, receive, _noting(send, key))


def _noting(send: Send, key: str) -> Send:
    """Note which status leaves the outermost layer, also when nobody is there to read it."""

    async def noting(message: Message) -> None:
        if message["type"] == "http.response.start":
            note(key, "status", status=message["status"])
        await send(message)

    return noting
