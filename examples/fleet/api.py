"""The API: requests whose tasks run on the workers, and jobs that any replica can start, show, and cancel.

uvicorn examples.fleet.api:app
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Response
from fastapi.telemetry import TelemetryConfig
from opentelemetry import trace

from examples.fleet.tasks import broker, fleet, import_rows, render
from otel_tasks import TaskExistsError, TaskPriority, start_task
from otel_tasks.fastapi import RequestTasks, TaskGroupMiddleware, make_lifespan
from otel_tasks.taskiq import remote

# FastAPI's spans per dependency and endpoint are left out, to keep the picture to requests and tasks.
TELEMETRY: TelemetryConfig = {
    "operation_spans": False,
    "exclude": lambda scope: scope["path"] in ("/tasks", "/nodes"),
}


@asynccontextmanager
async def connections(_: FastAPI) -> AsyncIterator[None]:
    await broker.startup()
    yield
    await broker.shutdown()
    provider = trace.get_tracer_provider()
    if flush := getattr(provider, "force_flush", None):
        await asyncio.to_thread(flush, 3000)


app = FastAPI(
    title="Library",
    telemetry=TELEMETRY,
    lifespan=make_lifespan(connections, fleet=fleet, grace=1.0, timeout=5.0),
)
app.add_middleware(TaskGroupMiddleware)


@app.get("/book/{book}")
async def read_book(book: str, tasks: RequestTasks, pages: int = 8, seconds: float = 0.5) -> Response:
    """Render all pages at once, on any free worker; a hang-up stops them."""
    started = [
        tasks.create_task(remote(render, page, seconds), name="page", priority=TaskPriority.HIGH, timeout=60)
        for page in range(pages)
    ]
    return Response("\n".join([await page for page in started]))


@app.post("/jobs/{name}", status_code=202)
async def start_job(name: str, rows: int = 100) -> dict[str, str]:
    """Start an import that outlives this request."""
    try:
        task = await start_task(name, remote(import_rows, rows), group="imports")
    except TaskExistsError:
        raise HTTPException(409, f"{name} is running") from None
    return {"job": task.name}


@app.delete("/jobs/{name}")
async def cancel_job(name: str) -> dict[str, Any]:
    """Cancel it, whichever replica started it."""
    report = await fleet.cancel_task(name, "deleted by its owner")
    return {"asked": report.asked, "ended": report.ended, "silent": report.silent}


@app.get("/nodes")
async def list_nodes() -> list[str]:
    """The processes of the fleet."""
    return [node.node for node in await fleet.nodes()]


@app.get("/tasks")
async def list_tasks(name: str | None = None) -> list[dict[str, Any]]:
    """The live tasks of all processes."""
    return [row for row in await fleet.tasks(name=name) if row["ended_at"] is None]
