"""A small service under a vendor's telemetry, set up as the vendor documents it; `VENDOR` names the vendor.

Run by `tests/nightly/test_vendors.py` in an environment that has this vendor's package and no other's.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from otel_tasks import create_task, global_task_manager
from otel_tasks.asgi import TaskGroupMiddleware
from otel_tasks.fastapi import RequestTasks, lifespan

if TYPE_CHECKING:
    from collections.abc import Callable

# What the vendor's own exporter would have sent: name, id, and id of the parent.
kept: list[tuple[str, str, str | None]] = []


# -- set up before the application is made; what is returned is called with it -----------------------------


def nothing() -> Callable[[FastAPI], object]:
    """For vendors whose command does all."""
    return lambda app: None


def logfire() -> Callable[[FastAPI], object]:
    import logfire

    logfire.configure(send_to_logfire=False, console=False)
    return lambda app: logfire.instrument_fastapi(app)


def datadog() -> Callable[[FastAPI], object]:
    from ddtrace.trace import TraceFilter, tracer

    class Keep(TraceFilter):
        def process_trace(self, trace: list[Any]) -> None:
            # None: no agent is there to send it to.
            kept.extend(
                (span.resource, f"{span.span_id:x}", f"{span.parent_id:x}" if span.parent_id else None)
                for span in trace
            )

    tracer.configure(trace_processors=[Keep()])
    return lambda app: None


def newrelic() -> Callable[[FastAPI], object]:
    from newrelic.agent import current_transaction

    def add_route(app: FastAPI) -> None:
        @app.get("/transaction")
        async def transaction(tasks: RequestTasks) -> dict[str, bool]:
            async def look() -> object:
                return current_transaction()

            here = current_transaction()
            assert here is not None
            return {
                "plain": await asyncio.create_task(look()) is here,
                "managed": await tasks.create_task(look()) is here,
            }

    return add_route


def elastic() -> Callable[[FastAPI], object]:
    from elasticapm.contrib.starlette import ElasticAPM

    client = _elastic_client()
    return lambda app: app.add_middleware(ElasticAPM, client=client)


def elastic_bridge() -> Callable[[FastAPI], object]:
    """The tracer of Elastic's bridge: it knows no events, and not every parent."""
    from elasticapm.contrib.opentelemetry import Tracer
    from elasticapm.contrib.starlette import ElasticAPM
    from opentelemetry.trace import TracerProvider

    from otel_tasks._core.telemetry.providers import Providers, set_default_providers

    client = _elastic_client()

    class Provider(TracerProvider):
        def get_tracer(self, *args: Any, **kwargs: Any) -> Any:
            return Tracer(elasticapm_client=client)

    # Not the global one, to which FastAPI reports too: the bridge breaks it.
    set_default_providers(Providers(Provider()))
    return lambda app: app.add_middleware(ElasticAPM, client=client)


def _elastic_client() -> Any:
    from elasticapm.contrib.starlette import make_apm_client
    from elasticapm.transport import base

    class Keep(base.Transport):
        def queue(self, event_type: str, data: Any, flush: bool = False) -> None:
            if event_type in ("transaction", "span"):
                kept.append((data["name"], data["id"], data.get("parent_id")))

        def start_thread(self, pid: int | None = None) -> None:
            pass

        def close(self) -> None:
            pass

        def flush(self) -> None:
            pass

    # The client finds its transport by name.
    base.Keep = Keep
    options = {"TRANSPORT_CLASS": "elasticapm.transport.base.Keep", "CENTRAL_CONFIG": False}
    return make_apm_client(options | {"SERVICE_NAME": "shop", "METRICS_INTERVAL": "0s"})


def sentry() -> Callable[[FastAPI], object]:
    import sentry_sdk
    from sentry_sdk.transport import Transport

    class Keep(Transport):
        def capture_envelope(self, envelope: Any) -> None:
            for event in filter(None, (item.get_transaction_event() for item in envelope.items)):
                trace = event["contexts"]["trace"]
                kept.append((event["transaction"], trace["span_id"], trace.get("parent_span_id")))

    sentry_sdk.init(dsn="http://key@127.0.0.1:9/1", transport=Keep, traces_sample_rate=1.0)
    return lambda app: None


def sentry_otlp() -> Callable[[FastAPI], object]:
    import sentry_sdk
    from sentry_sdk.integrations.otlp import OTLPIntegration
    from sentry_sdk.transport import Transport

    class Drop(Transport):
        def capture_envelope(self, envelope: Any) -> None:
            pass

    endpoint = os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"]
    integration = OTLPIntegration(collector_url=f"{endpoint}/v1/traces")
    sentry_sdk.init(dsn="http://key@127.0.0.1:9/1", transport=Drop, integrations=[integration])
    return lambda app: None


SET_UPS: dict[str, Callable[[], Callable[[FastAPI], object]]] = {
    "datadog": datadog,
    "distro": nothing,
    "elastic": elastic,
    "elastic-bridge": elastic_bridge,
    "elastic-otel": nothing,
    "logfire": logfire,
    "newrelic": newrelic,
    "newrelic-otel": newrelic,
    "sentry": sentry,
    "sentry-otlp": sentry_otlp,
}


# -- the application ----------------------------------------------------------------------------------------


finish = SET_UPS[os.environ["VENDOR"]]()
app = FastAPI(lifespan=lifespan)
app.add_middleware(TaskGroupMiddleware)
finish(app)


@app.get("/basket/{item}")
async def basket(item: str, tasks: RequestTasks) -> dict[str, int]:
    return {item: await tasks.create_task(price(), name="price")}


async def price() -> int:
    return await create_task(quote(), name="quote")


async def quote() -> int:
    await asyncio.sleep(0.01)
    return 39


@app.get("/slow/{item}")
async def slow(item: str, tasks: RequestTasks) -> None:
    await tasks.create_task(asyncio.sleep(60), name="calculate")


@app.get("/debug/tasks")
async def debug_tasks() -> dict[str, str | None]:
    """What became of each task: its status, and why it was cancelled."""
    known = global_task_manager.get_all_task_info().values()
    return {
        info.name: info.status if info.cause is None else f"{info.status}: {info.cause.kind}"
        for info in known
    }


@app.get("/debug/spans")
async def debug_spans() -> list[tuple[str, str, str | None]]:
    return kept
