"""OpenTelemetry, set up as in any other service: the API and the workers have different service names."""

import os

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor


def set_up_telemetry(service: str) -> None:
    """Send spans by OTLP over HTTP if `OTEL_EXPORTER_OTLP_ENDPOINT` is set.

    Args:
        service: The name of the service, unless `OTEL_SERVICE_NAME` is set.
    """
    if not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return
    name = os.environ.get("OTEL_SERVICE_NAME", service)
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    # Twice a second: a worker that is killed loses what it has not sent.
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(), schedule_delay_millis=500))
    trace.set_tracer_provider(provider)
