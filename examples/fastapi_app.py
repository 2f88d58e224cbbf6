"""A small travel search service, built the way a team might build it with this library.

Run it with ``uvicorn examples.fastapi_app:app``, or see it at work with ``make demo``.

Read it from the top: tracing is set up once and shared by everything that records spans (1); one line binds
work to its request (2); a handler ends together with everything it starts (3); work that a closed tab must
not interrupt is kept apart (4); a long task belongs to no request, so any client can watch its progress (5);
and a page shows what runs, to those who may see it (6).
"""

import asyncio
import json
import os
import random
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, HTTPException, Query, WebSocket
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from fastapi.sse import EventSourceResponse, ServerSentEvent
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    SimpleSpanProcessor,
    SpanExporter,
    SpanExportResult,
)
from pydantic import BaseModel, Field

from otel_tasks import (
    ManagedTask,
    TaskInfo,
    TaskManager,
    TaskPriority,
    create_task,
    current_group,
    current_task,
)
from otel_tasks.fastapi import (
    RequestTasks,
    TaskGroupMiddleware,
    make_lifespan,
    progress_events,
    uncancellable,
)
from otel_tasks.live import live_view

# --- 1. Tracing ------------------------------------------------------------------------------------------


class RecentSpans(SpanExporter):
    """Keeps the newest spans in memory: for ``/debug/spans``, where there is no Jaeger to send them to."""

    def __init__(self, limit: int = 2000) -> None:
        self.spans: deque[ReadableSpan] = deque(maxlen=limit)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Keep them; the oldest make room."""
        self.spans.extend(spans)
        return SpanExportResult.SUCCESS


def set_up_tracing(recent: RecentSpans) -> TracerProvider:
    """OTLP where an endpoint is configured, else memory (or both, with ``KEEP_SPANS=1``)."""
    name = os.environ.get("OTEL_SERVICE_NAME", "travel-search")
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    has_collector = bool(os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"))
    if has_collector:
        # Imported here so that the service starts without the exporter where it is not wanted.
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    if not has_collector or os.environ.get("KEEP_SPANS"):
        provider.add_span_processor(SimpleSpanProcessor(recent))
    return provider


recent_spans = RecentSpans()
tracer_provider = set_up_tracing(recent_spans)


@asynccontextmanager
async def send_last_spans(_: FastAPI) -> AsyncIterator[None]:
    """Send what is still buffered when the server stops.

    Not left to `atexit`: uvicorn ends by the very signal that stopped it, and then nothing runs at exit.
    """
    yield
    # In a thread, for it waits for the network.
    await asyncio.to_thread(tracer_provider.force_flush, 3000)


# --- 2. The application ----------------------------------------------------------------------------------

# A manager of one's own, with the provider handed in. An app that sets the global provider needs none:
# without `manager=` the middleware uses `otel_tasks.global_task_manager`, and `lifespan=lifespan` does.
manager = TaskManager("travel", tracer_provider=tracer_provider)

app = FastAPI(
    title="Travel search",
    # FastAPI records the span of each request itself, outside of all `add_middleware` layers: the
    # tasks' spans hang below it. Its spans per dependency and endpoint are left out, to keep the
    # picture to requests and tasks.
    telemetry={
        "tracer_provider": tracer_provider,
        "operation_spans": False,
        "exclude": lambda scope: scope["path"].startswith(("/debug/", "/tasks")),
    },
    # Shuts the manager down with the server: what runs then is cancelled with cause `shutdown`. The
    # lifespan inside it ends last, so that the spans of those tasks are sent too.
    lifespan=make_lifespan(send_last_spans, manager=manager, grace=1.0, timeout=5.0),
)
app.add_middleware(TaskGroupMiddleware, manager=manager)

# --- 3. Work that ends with its request ------------------------------------------------------------------

_calls_to_trains = 0


class SupplierError(Exception):
    """A supplier answered, but not with offers."""


async def ask(supplier: str, city: str, seconds: float, *, fail: str = "", slow: str = "") -> list[str]:
    """Stand in for an HTTP call. ``fail`` and ``slow`` name the supplier that is to misbehave."""
    await asyncio.sleep(5.0 if supplier == slow else seconds)
    if supplier == fail or (supplier == "trains" and _trains_are_down()):
        raise SupplierError(f"{supplier} answered 503")
    return [f"{supplier} offer {number} for {city}" for number in (1, 2)]


def _trains_are_down() -> bool:
    """Every tenth call fails: now and then, but not by chance."""
    global _calls_to_trains
    _calls_to_trains += 1
    return _calls_to_trains % 10 == 0


async def ask_hotels(city: str, *, fail: str, slow: str) -> list[str]:
    """Two chains, queried in a group of their own below the request's.

    This group is scoped, as `asyncio.TaskGroup` is: a list with one chain missing would rank wrongly, so
    when one fails the other is cancelled and the whole is one failure. It has a span of its own.
    """
    async with current_group().group("hotels", span=True) as group:
        harbour = group.create_task(ask("harbour", city, 0.30, fail=fail, slow=slow), name="harbour")
        station = group.create_task(ask("station", city, 0.90, fail=fail, slow=slow), name="station")
    return sorted(harbour.result() + station.result())


@app.get("/search/{city}")
async def search(city: str, tasks: RequestTasks, fail: str = "", slow: str = "") -> dict[str, Any]:
    """Ask four suppliers at once, and answer with what came.

    The request's group isolates failures, so one supplier's bad day is not the others'. When the client
    leaves, this handler and all six tasks below it stop; nothing here has to care.
    """
    offers = {
        # Ahead of the others where slots are scarce, and last to be cancelled in a shutdown.
        "flights": tasks.create_task(
            ask("flights", city, 0.95, fail=fail, slow=slow),
            name="flights",
            priority=TaskPriority.HIGH,
            timeout=1.5,
        ),
        "hotels": tasks.create_task(ask_hotels(city, fail=fail, slow=slow), name="hotels", timeout=1.5),
        "trains": tasks.create_task(
            ask("trains", city, 0.25, fail=fail, slow=slow), name="trains", timeout=1.5
        ),
        # Nice to have: it does not hold up the answer for long.
        "events": tasks.create_task(
            ask("events", city, 0.90, fail=fail, slow=slow),
            name="events",
            priority=TaskPriority.LOW,
            timeout=1.2,
        ),
    }
    results = await asyncio.gather(*offers.values(), return_exceptions=True)
    found = dict(zip(offers, results, strict=True))
    return {
        "city": city,
        "offers": {name: found[name] for name in found if not isinstance(found[name], BaseException)},
        "missing": {name: repr(found[name]) for name in found if isinstance(found[name], BaseException)},
    }


@app.get("/departures/{city}")
async def departures(city: str, limit: int = 100) -> StreamingResponse:
    """A stream, one line per departure. A client that closes it ends the task that waits for the next."""

    async def lines() -> AsyncIterator[str]:
        for number in range(limit):
            # Plain `create_task`, nothing passed around: it finds the request's group by itself.
            departure = await create_task(next_departure(city, number), name="next_departure")
            yield json.dumps(departure) + "\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")


async def next_departure(city: str, number: int) -> dict[str, Any]:
    """Stand in for waiting on a message queue."""
    await asyncio.sleep(0.1)
    return {"from": city, "gate": number % 7 + 1}


@app.websocket("/alerts")
async def alerts(socket: WebSocket) -> None:
    """The client names cities; a task watches the prices in each, until the client is gone."""
    await socket.accept()
    async for city in socket.iter_text():
        create_task(watch_prices(socket, city), name="watch_prices")


async def watch_prices(socket: WebSocket, city: str) -> None:
    """Never returns: it is cancelled with the connection's group."""
    while True:
        await socket.send_text(f"{city}: {random.randint(80, 120)} EUR")
        await asyncio.sleep(0.2)


@app.get("/brochure/{city}")
def brochure(city: str, tasks: RequestTasks, pages: int = 20) -> dict[str, Any]:
    """A ``def`` handler runs in a thread, and nothing can stop a thread from outside.

    The group's event may be read there, so a long loop can ask now and then whether anyone still waits.
    """
    printed = 0
    while printed < pages and not tasks.cancel_event.is_set():
        time.sleep(0.02)
        printed += 1
    return {"city": city, "pages": printed}


# --- 4. Work that must not be torn -----------------------------------------------------------------------


class Order(BaseModel):
    """The client's request, with a reference of its own, so that it can retry after a broken connection."""

    reference: str = Field(min_length=1, max_length=40)
    city: str


# Stands for the database.
orders: dict[str, str] = {}


@app.post("/orders", status_code=201)
async def place_order(order: Order) -> dict[str, str]:
    """Take the payment once and wholly, whatever the client does meanwhile."""
    # Only good for this response, hence the request's: it stops when the client leaves.
    map_of_the_city = create_task(draw_map(order.city), name="draw_map")
    async with uncancellable():
        # A disconnect does not reach in here, neither this body nor the tasks it starts. It takes effect
        # at the end of the block: the payment and the message about it belong together.
        await create_task(charge(order), name="charge")
        # The message may take its time, so it is not the request's but the application's. A shutdown
        # waits for it (up to `grace`); a departing client does not end it.
        manager.create_task(send_confirmation(order), name="send_confirmation", group="outbox")
    return {"reference": order.reference, "status": orders[order.reference], "map": await map_of_the_city}


@app.get("/orders/{reference}")
async def read_order(reference: str) -> dict[str, str]:
    """How far an order has come: what a client asks for whose connection broke."""
    if reference not in orders:
        raise HTTPException(404, f"no order {reference!r}")
    return {"reference": reference, "status": orders[reference]}


async def charge(order: Order) -> None:
    """Two steps that must both happen: without the second, money is held for nothing."""
    orders[order.reference] = "authorized"
    await asyncio.sleep(0.25)
    orders[order.reference] = "paid"


async def send_confirmation(order: Order) -> None:
    """Stand in for a mail server."""
    await asyncio.sleep(0.3)
    orders[order.reference] = "confirmed"


async def draw_map(city: str) -> str:
    """Stand in for something slow that only the client's own screen needs."""
    await asyncio.sleep(0.6)
    return f"map of {city}"


# --- 5. A long task, and who watches it ------------------------------------------------------------------


class Export(BaseModel):
    """The export to write."""

    city: str
    pages: int = Field(20, ge=1, le=10_000)


@app.post("/exports", status_code=202)
async def start_export(export: Export) -> dict[str, str]:
    """Begin, and say where to watch. The task is the application's: it goes on when the request has ended."""
    task = manager.create_task(write_export(export), group="exports", priority=TaskPriority.LOW)
    # Not its name: no client can guess the uid of another export.
    return {"id": task.uid, "progress": f"/exports/{task.uid}/progress"}


async def write_export(export: Export) -> None:
    """Stand in for pages of a report. What it reports is kept with the task, whether anybody looks or not."""
    task = current_task()
    assert task is not None
    task.progress.update(total=export.pages, message=f"looking for offers in {export.city}")
    for number in range(1, export.pages + 1):
        await asyncio.sleep(0.05)
        task.progress.update(done=number, message=f"page {number} of {export.pages}")


@app.get("/exports")
async def read_exports() -> dict[str, Any]:
    """All exports that run now, added up."""
    return manager.get_group("exports").progress.to_dict()


async def find_export(uid: str) -> ManagedTask[Any] | TaskInfo:
    """The task, or the record of one that has ended: a client may come late. No other tasks are shown."""
    info = manager.get_task_info(uid, group="exports")
    if info is None:
        raise HTTPException(404, f"no export {uid!r}")
    return info if info.status.is_final else manager.get_task(uid, group="exports")


@app.get("/exports/{uid}/progress", response_class=EventSourceResponse)
async def watch_export(
    export: Annotated[ManagedTask[Any] | TaskInfo, Depends(find_export)],
    last_event_id: Annotated[str | None, Header()] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events until the task has ended; a client that leaves ends the watching, not the task.

    In a browser::

        const source = new EventSource(`/exports/${uid}/progress`);
        source.addEventListener("progress", (event) => (bar.value = JSON.parse(event.data).fraction));
        source.addEventListener("ended", () => source.close());  // else it would come back for more
    """
    async for event in progress_events(export, last_event_id=last_event_id):
        yield event


# --- 6. The live view ------------------------------------------------------------------------------------

password = os.environ.get("LIVE_VIEW_PASSWORD", "")


def viewer(credentials: Annotated[HTTPBasicCredentials, Depends(HTTPBasic())]) -> str:
    """The user of anyone who knows the password. A service would ask its own users for more."""
    if not secrets.compare_digest(credentials.password.encode(), password.encode()):
        raise HTTPException(401, "wrong password", {"WWW-Authenticate": "Basic"})
    return credentials.username


# Without a password, it answers only this machine: in a container, even its own host is another one.
app.include_router(
    live_view(
        auth=Depends(viewer) if password else None,
        insecure=not password,
        manager=manager,
        trace_url="http://localhost:16686/trace/{trace_id}",
    ),
    prefix="/tasks",
)

# --- For the demo; a service that is reachable from outside would not have these ------------------------


@app.get("/debug/spans", include_in_schema=False)
async def debug_spans(newest: Annotated[int, Query(ge=1)] = 2000) -> list[dict[str, Any]]:
    """The newest ended spans, oldest first, in the SDK's own JSON."""
    return [json.loads(span.to_json()) for span in list(recent_spans.spans)[-newest:]]


@app.get("/debug/tasks", include_in_schema=False)
async def debug_tasks() -> dict[str, Any]:
    """Live tasks, and those that ended last: the same facts without any tracing."""
    return {task_id: info.to_dict() for task_id, info in manager.get_all_task_info().items()}
