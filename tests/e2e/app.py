"""The application that the end-to-end tests serve with real servers.

One process serves several variants, each below a path prefix of its own (`/plain/wait/k1`), so that a
server is started once. What happens in a request is written to the journal file named by
`E2E_JOURNAL`, one JSON line per event: it can be read while the server is busy, and after it has ended.
A handler waits until the test lets it go on (`POST /release/{key}`), never for a span of time.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import BackgroundTasks, FastAPI, Request, Response, WebSocket
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import format_span_id, format_trace_id
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from otel_tasks import ManagedTask, TaskManager, create_task, current_group, current_task
from otel_tasks.asgi import TaskGroupMiddleware, uncancellable
from otel_tasks.fastapi import make_lifespan

# Servers give only their own loggers a handler; what asyncio, OpenTelemetry and the library log must
# reach the log that the tests read as well.
logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)


def _end_with_the_tests() -> None:
    """End the server and its workers, one process group, when the tests that started it are gone."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


threading.Thread(target=_end_with_the_tests, daemon=True).start()

PATIENCE = 20.0
"""Seconds that a handler waits to be let go on, so that a failed test leaves no request behind."""

manager = TaskManager("e2e")


# --- the journal ---------------------------------------------------------------------------------

_journal = os.open(os.environ["E2E_JOURNAL"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def note(key: str, what: str, **details: object) -> None:
    """Write one event to the journal; one `write` call, so that lines never mix."""
    os.write(_journal, (json.dumps({"key": key, "what": what, **details}) + "\n").encode())


@contextlib.contextmanager
def noted(key: str, what: str = "handler") -> Iterator[None]:
    """Note how a block of a handler begins and how it ends."""
    note(key, f"{what} entered")
    try:
        yield
    except asyncio.CancelledError:
        note(key, f"{what} cancelled")
        raise
    except BaseException as exc:
        note(key, f"{what} raised", error=type(exc).__name__)
        raise
    else:
        note(key, f"{what} returned")


_releases: dict[str, asyncio.Event] = {}


async def released(key: str) -> None:
    """Wait until the test says that `key` may go on."""
    async with asyncio.timeout(PATIENCE):
        await _releases.setdefault(key, asyncio.Event()).wait()


async def work(key: str, name: str) -> str:
    """A task that works until it is cancelled (or let go on), and notes by what."""
    note(key, "task started", task=name)
    try:
        await released(key)
    except asyncio.CancelledError:
        task = current_task()
        cause = task.cause if task is not None else None
        note(
            key,
            "task cancelled",
            task=name,
            kind=str(cause.kind) if cause is not None else None,
            message=cause.message if cause is not None else None,
        )
        raise
    note(key, "task completed", task=name)
    return name


def start_work(key: str) -> ManagedTask[str]:
    """Two tasks of the request, and one of the application that a disconnect must not touch."""
    task = create_task(work(key, "first"), name="first")
    create_task(work(key, "second"), name="second")
    manager.create_task(work(key, "outbox"), name="outbox", group="outbox")
    return task


# --- the routes, the same in each variant --------------------------------------------------------


def add_routes(app: FastAPI) -> None:
    """Give `app` every route that a scenario needs."""

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
    async def stream(key: str, quiet: bool = False) -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            with noted(key, "stream"):
                yield b"first\n"
                if quiet:
                    await released(key)
                while not _releases.setdefault(key, asyncio.Event()).is_set():
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
                # Some servers say it once, and would let a further call wait for ever.
                async with asyncio.timeout(PATIENCE):
                    for _ in range(3):
                        note(key, f"{(await receive())['type']} again")
                return
            if not message.get("more_body", False) and scope["method"] == "POST":
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": b"done"})
                return


# --- the variants --------------------------------------------------------------------------------


async def _pass_through(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


def _fastapi(**options: Any) -> FastAPI:
    app = FastAPI(**options)
    add_routes(app)
    return app


def _bound(**options: Any) -> FastAPI:
    app = _fastapi()
    app.add_middleware(TaskGroupMiddleware, manager=manager, **options)
    return app


def _inside_of_us() -> FastAPI:
    app = _fastapi()
    app.add_middleware(BaseHTTPMiddleware, dispatch=_pass_through)
    app.add_middleware(TaskGroupMiddleware, manager=manager)
    return app


def _outside_of_us(**options: Any) -> FastAPI:
    app = _bound(**options)
    app.add_middleware(BaseHTTPMiddleware, dispatch=_pass_through)
    return app


def _mounted() -> FastAPI:
    outer = FastAPI()
    outer.add_middleware(TaskGroupMiddleware, manager=manager)
    outer.mount("/sub", _bound())
    return outer


class Stack:
    """A tracer provider with its spans in memory, and the manager that uses it."""

    def __init__(self, name: str) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.manager = TaskManager(name, tracer_provider=self.provider)


stacks = {name: Stack(name) for name in ("native", "contrib", "contrib-asgi")}


def _native() -> FastAPI:
    stack = stacks["native"]
    app = _fastapi(telemetry={"tracer_provider": stack.provider})
    app.add_middleware(TaskGroupMiddleware, manager=stack.manager)
    return app


def _contrib() -> FastAPI:
    stack = stacks["contrib"]
    app = _fastapi()
    app.add_middleware(TaskGroupMiddleware, manager=stack.manager)
    FastAPIInstrumentor.instrument_app(app, tracer_provider=stack.provider)
    return app


def _contrib_asgi() -> ASGIApp:
    stack = stacks["contrib-asgi"]
    app = _fastapi(telemetry={"tracing": False})
    inner = TaskGroupMiddleware(app, manager=stack.manager)
    return OpenTelemetryMiddleware(inner, tracer_provider=stack.provider)


variants: dict[str, ASGIApp] = {
    "plain": _bound(),
    "stock": _fastapi(),
    "keep": _bound(cancel_handler=False),
    "always": _bound(cancel_handler=True),
    "inside": _inside_of_us(),
    "outside": _outside_of_us(),
    "keep-outside": _outside_of_us(cancel_handler=False),
    "mounted": _mounted(),
    "raw": TaskGroupMiddleware(raw, manager=manager),
    "native": _native(),
    "contrib": _contrib(),
    "contrib-asgi": _contrib_asgi(),
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
    _releases.setdefault(key, asyncio.Event()).set()


@control.get("/state")
async def state() -> dict[str, Any]:
    """What lives in this process: managed tasks, asyncio tasks, memory."""
    managers = [manager, *(stack.manager for stack in stacks.values())]
    live = [
        info.id for each in managers for info in each.get_all_task_info().values() if not info.status.is_final
    ]
    tasks = asyncio.all_tasks()
    coroutines = [getattr(task.get_coro(), "__qualname__", "?") for task in tasks]
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
