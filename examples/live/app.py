"""A shop with all the trouble that a live view is for: a full queue, a stuck cancellation, lost clients.

Run it with ``make demo-live``, which sends the load too. The live view is one line, see (1).
"""

import asyncio
import itertools
import json
import logging
import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from examples.live.pool import Pool
from otel_tasks import (
    QueueFullError,
    RestartPolicy,
    TaskInfo,
    TaskManager,
    TaskPriority,
    create_task,
    current_task,
)
from otel_tasks.fastapi import RequestTasks, TaskGroupMiddleware, make_lifespan
from otel_tasks.live import live_view

JAEGER = "http://localhost:16686"


def set_up_tracing() -> TracerProvider:
    """Give each task a trace; the spans are exported if there is a collector."""
    provider = TracerProvider(
        resource=Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "shop")})
    )
    if os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        # Imported only where it is used: the demo needs no exporter.
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def log_error(info: TaskInfo, error: BaseException) -> None:
    """Log one line per failed task: they fail on purpose here."""
    logger.warning("%s failed: %r", info.id, error)


logger = logging.getLogger("shop")
tracer_provider = set_up_tracing()
manager = TaskManager("shop", tracer_provider=tracer_provider, on_error=log_error, history=10_000)
database = Pool(24)
# One connection, which each payment keeps for long.
ledger = Pool(1)


@asynccontextmanager
async def run_services(_: FastAPI) -> AsyncIterator[None]:
    """Start what runs as long as the shop does, and log warnings about tasks in trouble."""
    async with AsyncExitStack() as stack:
        stack.enter_context(manager.watch(held=0.2))
        manager.get_group("imports", max_concurrency=50, max_queue=150)
        await manager.start_service("prices feed", read_prices, group="services")
        await manager.start_service("consume orders", consume_orders, group="services")
        flaky = RestartPolicy(delay=2.0, max_failures=None)
        await manager.start_service("search index", follow_index, group="services", restart=flaky)
        await manager.start_periodic("refresh rates", refresh_rates, every=5.0, group="services")
        yield


app = FastAPI(
    title="Shop",
    lifespan=make_lifespan(run_services, manager=manager, grace=0.5, timeout=2.0),
)
app.add_middleware(TaskGroupMiddleware, manager=manager)

# --- 1. The live view ------------------------------------------------------------------------------------

# Without a login, it answers only clients on this machine. A service takes `auth=Depends(...)` instead.
app.include_router(
    live_view(
        insecure=True,
        manager=manager,
        actions={"cancel"},
        errors=True,
        metadata={"customer", "file"},
        trace_url=f"{JAEGER}/trace/{{trace_id}}",
    ),
    prefix="/tasks",
)

# --- 2. Reports: a fan-out, and a task that ignores its cancellation -------------------------------------


@app.get("/report/{number}")
async def report(number: int, tasks: RequestTasks) -> dict[str, int]:
    """Ask for many prices at the same time, and draw them."""
    mail = tasks.create_task(
        sync_mail(stuck=number % 100 == 7),
        name="sync_mail",
        priority=TaskPriority.HIGH,
        metadata={"customer": f"customer-{number}"},
    )
    prices = [tasks.create_task(fetch_price(), name="fetch_prices") for _ in range(30)]
    chart = tasks.create_task(draw_chart(mail), name="render_chart")
    found = await asyncio.gather(*prices, return_exceptions=True)
    await chart
    return {"number": number, "total": sum(price for price in found if isinstance(price, int))}


async def fetch_price() -> int:
    """Read one price from the database, which has few connections."""
    await database.query(random.uniform(0.2, 1.0))
    if random.random() < 0.01:
        raise LookupError("no such article")
    return random.randint(1, 100)


async def sync_mail(*, stuck: bool) -> None:
    """Read mail. When a stuck one is cancelled, its cleanup waits for a server that is gone."""
    try:
        await asyncio.sleep(random.uniform(3.0, 8.0))
        if stuck:
            await asyncio.sleep(3600)
    except asyncio.CancelledError:
        if stuck:
            await log_out()
        raise


async def log_out() -> None:
    """Wait for the mail server to confirm."""
    confirmed = asyncio.Event()
    await confirmed.wait()


async def draw_chart(mail: asyncio.Future[None]) -> None:
    """Draw, as soon as the mail is there."""
    await mail
    await asyncio.sleep(0.5)


# --- 3. Imports: a limit, a full queue, progress ---------------------------------------------------------

_numbers = itertools.count(1)


@app.post("/imports", status_code=202)
async def start_imports(count: int = 20) -> dict[str, int]:
    """Import files, 50 at a time. 150 may wait; more are refused."""
    started = 0
    for _ in range(count):
        number = next(_numbers)
        what = "import_order" if number % 5 == 0 else "import_user"
        try:
            manager.create_task(
                import_file(random.randint(20, 200)),
                name=what,
                group="imports",
                priority=TaskPriority.LOW,
                metadata={"file": f"{what}-{number}.csv"},
            )
        except QueueFullError:
            if not started:
                raise HTTPException(503, "the queue is full", {"Retry-After": "10"}) from None
            break
        started += 1
    return {"started": started}


async def import_file(lines: int) -> None:
    """Report each line as progress."""
    task = current_task()
    assert task is not None
    task.progress.update(total=lines, message="reading")
    for number in range(1, lines + 1):
        await asyncio.sleep(random.uniform(0.05, 0.4))
        task.progress.update(done=number, message=f"line {number} of {lines}")
        if random.random() < 0.0005:
            raise ValueError(f"line {number} has no price")


# --- 4. Streams whose clients hang up, and mail ----------------------------------------------------------


@app.get("/prices/stream")
async def stream_prices() -> StreamingResponse:
    """Send a price each second, until the client has had enough."""

    async def lines() -> AsyncIterator[str]:
        while True:
            price = await create_task(next_price(), name="next_price")
            yield f"data: {json.dumps({'price': price})}\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")


async def next_price() -> int:
    """Wait for the exchange."""
    await asyncio.sleep(random.uniform(0.5, 1.5))
    return random.randint(80, 120)


@app.post("/payments", status_code=202)
async def book_payments(count: int = 1) -> dict[str, int]:
    """Book payments one after another; all others wait for the connection."""
    for _ in range(count):
        manager.create_task(book_payment(), group="payments", priority=TaskPriority.HIGH)
    return {"queued": count}


async def book_payment() -> None:
    """Keep the ledger for most of a minute."""
    await ledger.query(45.0)


@app.post("/mail", status_code=202)
async def send_mail(count: int = 10) -> dict[str, int]:
    """Send mail in the background: many short tasks."""
    for _ in range(count):
        manager.create_task(deliver(), name="deliver", group="mail")
    return {"queued": count}


async def deliver() -> None:
    """Talk to the mail server."""
    await asyncio.sleep(random.expovariate(0.5))
    if random.random() < 0.02:
        raise ConnectionError("the mail server refused the address")


# --- 5. Services, and one that holds the loop ------------------------------------------------------------


async def read_prices() -> None:
    """Follow the exchange for as long as the shop runs."""
    prices: asyncio.Queue[int] = asyncio.Queue()
    while True:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await prices.get()


async def consume_orders() -> None:
    """Wait for orders that never come."""
    orders: asyncio.Queue[str] = asyncio.Queue()
    while True:
        await orders.get()


async def follow_index() -> None:
    """Fail now and then: the service restarts with a growing delay."""
    await asyncio.sleep(random.uniform(5.0, 15.0))
    raise ConnectionError("the index closed the connection")


async def refresh_rates() -> None:
    """Compute without awaiting, once in a while: that holds the event loop."""
    await asyncio.sleep(0.1)
    if next(_refreshes) % 6 == 1:
        time.sleep(0.35)  # noqa: ASYNC251 - the fault that the warning "blocked" is about


_refreshes = itertools.count()
