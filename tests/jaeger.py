"""Asks a Jaeger for traces, by the interface that speaks OpenTelemetry's own format (``/api/v3``)."""

from __future__ import annotations

import base64
import time
from typing import TYPE_CHECKING, Any

import httpx
from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from examples.otlp_receiver import spans_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from examples.trace_tree import Span

# Seconds until Jaeger returns the spans it received.
PATIENCE = 20.0
# Seconds between two looks: Jaeger's collector hands on what it gets in batches, five a second.
PAUSE = 0.5
_IDS = ("traceId", "spanId", "parentSpanId")


def fetch_traces(
    url: str, trace_ids: Sequence[str], *, transport: httpx.BaseTransport | None = None
) -> list[Span]:
    """The spans of these traces, once no more of them come."""
    end = time.monotonic() + PATIENCE
    found: list[Span] = []
    with httpx.Client(base_url=url, transport=transport) as client:
        while time.monotonic() < end:
            before, found = found, [span for id in trace_ids for span in _fetch_trace(client, id)]
            if {span.trace_id for span in found} == set(trace_ids) and len(before) == len(found):
                return found
            time.sleep(PAUSE)
    raise AssertionError(f"after {PATIENCE} s Jaeger has {len(found)} spans of {', '.join(trace_ids)}")


def _fetch_trace(client: httpx.Client, trace_id: str) -> list[Span]:
    # Raw: Jaeger would else shift the times of services whose clocks seem to differ.
    answer = client.get(f"/api/v3/traces/{trace_id}", params={"raw_traces": "true"})
    if answer.status_code == httpx.codes.NOT_FOUND.value:
        return []
    return list(spans_of(to_request(answer.raise_for_status().json()["result"])))


def to_request(traces: dict[str, Any]) -> ExportTraceServiceRequest:
    """OTLP's JSON as a request: it writes ids in hex, where protobuf's own JSON has base64."""
    request = ExportTraceServiceRequest()
    json_format.ParseDict(_with_base64(traces), request, ignore_unknown_fields=True)
    return request


def _with_base64(node: Any) -> Any:
    if isinstance(node, list):
        return [_with_base64(item) for item in node]
    if not isinstance(node, dict):
        return node
    # The alphabet that protobuf decodes; Python 3.15 warns of the other one.
    return {
        key: base64.urlsafe_b64encode(bytes.fromhex(value)).decode() if key in _IDS else _with_base64(value)
        for key, value in node.items()
    }
