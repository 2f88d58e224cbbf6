"""A replica of a service in a fleet: `uvicorn tests.e2e.fleet_app:app`, with FLEET_URL and others."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from otel_tasks import global_task_manager, start_task
from otel_tasks.fastapi import TaskGroupMiddleware, make_lifespan
from otel_tasks.fleet import BusUnavailableError, Fleet
from otel_tasks.live import live_view

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

fleet = Fleet(os.environ["FLEET_URL"], namespace=os.environ["FLEET_NAMESPACE"])


@asynccontextmanager
async def traced(_: FastAPI) -> AsyncGenerator[None]:
    yield
    await asyncio.to_thread(provider.shutdown)


provider = TracerProvider(resource=Resource.create({"service.name": os.environ["SERVICE"]}))
if "OTEL_EXPORTER_OTLP_ENDPOINT" in os.environ:
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)

app = FastAPI(lifespan=make_lifespan(traced, fleet=fleet, grace=0.2))
app.add_middleware(TaskGroupMiddleware)
app.include_router(live_view(insecure=True, fleet=fleet, actions={"cancel"}), prefix="/tasks")


async def work() -> None:
    await asyncio.sleep(600)


@app.get("/node")
async def node() -> dict[str, Any]:
    return {"node": fleet.node, "pid": os.getpid(), "up": fleet.link.is_up}


@app.post("/jobs/{name}")
async def start_job(name: str) -> None:
    await start_task(name, work, group="jobs")


@app.get("/jobs/{name}")
async def job(name: str) -> dict[str, Any] | None:
    info = global_task_manager.get_task_info(name)
    return None if info is None else info.to_dict()


@app.delete("/jobs/{name}")
async def stop_job(name: str, timeout: float = 5.0) -> dict[str, Any]:
    try:
        report = await fleet.cancel_task(name, "stopped by the user", timeout=timeout)
    except BusUnavailableError as error:
        return {"error": str(error)}
    return report.to_dict()


@app.get("/nodes")
async def nodes() -> list[dict[str, Any]]:
    return [each.to_dict() for each in await fleet.nodes(timeout=1.0)]


@app.get("/jobs")
async def jobs() -> list[dict[str, Any]]:
    return await fleet.tasks(group="jobs", status="running")
