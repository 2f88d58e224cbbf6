"""Both demos as processes: their telemetry arrives here over OTLP, and is compared with what is expected."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from examples.jaeger_ui import marked, warnings
from examples.otlp_receiver import Received, receiver
from tests.blocks import ROOT
from tests.jaeger import fetch_traces
from tests.outline import compare, metrics_outline, outline_by_request
from tests.processes import marked_environment, marked_processes

if TYPE_CHECKING:
    from examples.trace_tree import Span

pytestmark = [pytest.mark.e2e]

# Three servers that start one after another, on a machine that is busy with other tests.
PATIENCE = 110


@dataclass
class Run:
    """A demo that has ended: what it printed, and what it has sent."""

    status: int
    printed: str
    complaints: str
    received: Received
    environment: dict[str, str]


def run_demo(*command: str, **settings: str) -> Run:
    """Run it to its end, with a receiver for its collector."""
    with receiver() as received:
        environment = marked_environment() | {"OTEL_EXPORTER_OTLP_ENDPOINT": received.endpoint} | settings
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    return Run(done.returncode, done.stdout, done.stderr, received, environment)


@dataclass
class Link:
    """A link to Jaeger that a demo has printed: the word it looks for, and the trace's spans."""

    ui_find: str
    spans: list[Span]


def links(run: Run) -> list[Link]:
    """The links as printed; each marks the spans that say its word, and no others."""
    found = re.findall(
        r"http://127\.0\.0\.1:16686/trace/([0-9a-f]{32})(?:\?uiFind=(\w+))?$", run.printed, re.MULTILINE
    )
    all_links = [Link(word, run.received.spans(trace_id)) for trace_id, word in found]
    for link in all_links:
        assert marked(link.spans, link.ui_find) == [
            span
            for span in link.spans
            if link.ui_find
            and link.ui_find in (span.cancel_reason, span.attributes.get("otel_tasks.request.outcome"))
        ]
    return all_links


@pytest.fixture(scope="module")
def services() -> Run:
    """The demo of the three services, whose exporters pack what they send."""
    return run_demo("-m", "examples.three_services", OTEL_EXPORTER_OTLP_COMPRESSION="gzip")


def test_three_services_keep_every_promise(services: Run) -> None:
    """The demo ends well, without a word on stderr, and leaves no process behind."""
    assert services.status == 0, services.printed + services.complaints
    assert services.complaints == ""
    assert len(re.findall(r"^ok ", services.printed, re.MULTILINE)) == 6
    assert "FAILED" not in services.printed
    assert f"These traces were sent to {services.received.endpoint}\n" in services.printed
    assert marked_processes(services.environment) == set()


def test_three_services_are_drawn_as_one_tree(services: Run) -> None:
    """Each trace is drawn across the services, and the way of the hang-up is printed in milliseconds."""
    stays, leaves = re.split(r"^\d\. ", services.printed, flags=re.MULTILINE)[1:]
    assert re.search(r"gateway GET /basket .* 200", stays)
    assert "client leaves ▼" in leaves
    assert re.search(r"gateway GET /basket .* 499 client_disconnect \(tasks cancelled: 2\)", leaves)
    assert re.search(r"─ pricing GET /prices/\{item\} .* 499 client_disconnect \(tasks", leaves)
    assert re.search(r"─ calculate .* cancelled: client_disconnect <- GET /quotes/\{item\}", leaves)
    took = re.findall(r"end of the last task in suppliers: ([\d.]+) ms", services.printed)
    assert len(took) == 1
    assert float(took[0]) > 0


def test_three_services_leave_the_expected_traces(services: Run) -> None:
    """One trace for each request, across all three; a cancelled task says why, and names its request."""
    assert {headers["content-encoding"] for headers in services.received.headers} == {"gzip"}
    compare(outline_by_request(services.received.spans()), "services.txt")
    assert warnings(services.received.spans()) == []


def test_links_of_three_services_mark_what_was_cancelled(services: Run) -> None:
    """The link to the hang-up marks spans of all three services; the other one marks none."""
    stays, leaves = links(services)
    assert stays.ui_find == ""
    assert leaves.ui_find == "client_disconnect"
    assert {span.service for span in marked(leaves.spans, leaves.ui_find)} == {
        "gateway", "pricing", "suppliers",
    }  # fmt: skip


def test_three_services_report_the_expected_metrics(services: Run) -> None:
    """Names, units, attributes and counts arrive as they were measured, and no id is among them."""
    found = metrics_outline(services.received.points())
    compare(found, "services-metrics.txt")
    values = re.findall(r"=([^,:]+)", found)
    assert [value for value in values if re.search(r"\d", value)] == []


def test_a_broken_promise_is_named_and_fails_the_demo() -> None:
    """Where the SDK cuts the reasons off, the demo says which tasks have none, and ends with an error."""
    run = run_demo("-m", "examples.three_services", OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT="16")
    assert run.status == 1
    assert re.search(r"^FAILED every cancelled task .* what cancelled it$", run.printed, re.MULTILINE)
    assert "suppliers, calculate: client_disconnec\n" in run.printed
    assert len(re.findall(r"^ok ", run.printed, re.MULTILINE)) == 5
    assert marked_processes(run.environment) == set()


def test_the_demo_leaves_the_expected_traces() -> None:
    """The traces of `make demo`: a failed supplier, two hang-ups, a timeout, an order, an export."""
    run = run_demo("examples/demo.py")
    assert run.status == 0, run.complaints
    compare(outline_by_request(run.received.spans()), "demo.txt")
    assert warnings(run.received.spans()) == []
    assert [link.ui_find for link in links(run)] == ["", "client_disconnect", "timeout", "client_disconnect"]


def test_the_llm_demo_leaves_traces_that_jaeger_shows_whole() -> None:
    """Its client's spans are the roots; the link opens the hang-up, from the gateway to the upstream."""
    run = run_demo("-m", "examples.llm_gateway")
    assert run.status == 0, run.printed + run.complaints
    assert warnings(run.received.spans()) == []
    (hang_up,) = links(run)
    assert hang_up.ui_find == "client_disconnect"
    assert {span.service for span in marked(hang_up.spans, hang_up.ui_find)} == {"gateway"}


def test_jaeger_has_the_expected_traces() -> None:
    """A real Jaeger gives the three services' traces back as they were sent."""
    query, endpoint = os.environ.get("JAEGER_QUERY_URL"), os.environ.get("JAEGER_OTLP_ENDPOINT")
    if not query or not endpoint:
        pytest.skip(
            "JAEGER_QUERY_URL and JAEGER_OTLP_ENDPOINT are not set: "
            "with `docker compose up`, http://localhost:16686 and http://localhost:4318"
        )
    run = run_demo("-m", "examples.three_services", OTEL_EXPORTER_OTLP_ENDPOINT=endpoint)
    assert run.status == 0, run.printed + run.complaints
    trace_ids = re.findall(r"^trace ([0-9a-f]{32})$", run.printed, re.MULTILINE)
    assert len(trace_ids) == 2
    compare(outline_by_request(fetch_traces(query, trace_ids)), "services.txt")
