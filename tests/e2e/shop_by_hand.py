"""The same application, set up line by line: what `opentelemetry-instrument` is compared with."""

from __future__ import annotations

import os

from opentelemetry import trace
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

from otel_tasks.asgi import TaskGroupMiddleware

from .shop import app

provider = TracerProvider()
provider.add_span_processor(BatchSpanProcessor(ConsoleSpanExporter()))
trace.set_tracer_provider(provider)
if os.environ["SERVER_SPANS"] == "contrib":
    FastAPIInstrumentor.instrument_app(app)
if os.environ["WITH_MIDDLEWARE"] == "true":
    app.add_middleware(TaskGroupMiddleware)
