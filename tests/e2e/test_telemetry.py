"""What the traces say of a disconnect, below each of the telemetry stacks that a FastAPI team has."""

from __future__ import annotations

from typing import Any

import pytest

from .servers import Case, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]

Span = dict[str, Any]

STACKS = ("native", "contrib", "contrib-asgi")


def trace_of(case: Case, stack: str) -> tuple[Span, list[Span]]:
    """The request's server span, and every span of its trace (the server span ends last but one)."""

    def find() -> tuple[Span, list[Span]] | None:
        spans: list[Span] = case.server.control("GET", f"/spans/{stack}")
        noted = case.has("trace") or {}
        for span in spans:
            ours = span["trace_id"] == noted.get("id") or case.key in str(span["attributes"])
            if span["kind"] == "SERVER" and ours:
                return span, [each for each in spans if each["trace_id"] == span["trace_id"]]
        return None

    found = eventually(find, lambda: f"no server span for {case.key}\n{case.story()}")
    assert found is not None
    return found


def named(spans: list[Span], name: str) -> Span:
    """The one span of this name."""
    found = [span for span in spans if span["name"] == name]
    assert len(found) == 1, [span["name"] for span in spans]
    return found[0]


def status_of(server: Span) -> object:
    """The recorded HTTP status, under the new name of the attribute or the old one."""
    attributes = server["attributes"]
    return attributes.get("http.response.status_code", attributes.get("http.status_code"))


def children_reach(spans: list[Span], server: Span) -> bool:
    """Whether each span of the trace hangs below the server span."""
    parents = {span["span_id"]: span["parent_id"] for span in spans}

    def root(span_id: str) -> str:
        while (parent := parents.get(span_id)) is not None:
            span_id = parent
        return span_id

    return all(root(span["span_id"]) == server["span_id"] for span in spans)


@pytest.mark.parametrize("stack", STACKS)
def test_disconnect_leaves_one_trace_that_tells_it(case: Case, stack: str) -> None:
    """Server span 499, unset status, outcome and count; task spans cancelled, naming it; no noise."""
    with case.server.connect() as client:
        client.get(case.path(f"{stack}/wait"))
        case.wait_for_start()
        case.let_it_age()
    case.wait_for("handler cancelled")
    server, spans = trace_of(case, stack)
    assert status_of(server) == 499
    assert server["status"] == "UNSET", server
    assert server["attributes"]["otel_tasks.request.outcome"] == "client_disconnect"
    assert server["attributes"]["otel_tasks.cancel.count"] == 2
    assert children_reach(spans, server)
    for name in ("first", "second"):
        expect_cancelled_task(named(spans, name), server)
    assert [span["name"] for span in spans if span["name"].endswith("http receive")] == []
    assert [span["name"] for span in spans if span["status"] == "ERROR"] == []


def expect_cancelled_task(task: Span, server: Span) -> None:
    """A task's span says that it was cancelled, and names the request's span, by a link if not its parent."""
    attributes = task["attributes"]
    assert task["scope"] == "otel_tasks"
    assert attributes["otel_tasks.task.outcome"] == "cancelled"
    assert attributes["otel_tasks.cancel.reason"] == "client_disconnect"
    assert task["status"] == "UNSET"
    assert "otel_tasks.cancel_requested" in task["events"]
    assert "exception" not in task["events"]
    if task["parent_id"] == server["span_id"]:
        assert int(attributes["otel_tasks.cancel.origin.span_id"], 16) == int(server["span_id"], 16)
        assert task["links"] == []
    else:
        assert task["links"] == [
            {"span_id": server["span_id"], "attributes": {"otel_tasks.link": "cancelled_by"}}
        ]


@pytest.mark.parametrize("stack", STACKS)
def test_group_of_a_request_is_named_after_its_route(case: Case, stack: str) -> None:
    """The task spans carry the route's template and never the raw path."""
    with case.server.connect() as client:
        client.get(case.path(f"{stack}/wait"))
        case.wait_for_start()
        case.let_it_age()
        case.release()
        assert client.response()[0] == 200
    server, spans = trace_of(case, stack)
    assert status_of(server) == 200
    assert "otel_tasks.request.outcome" not in server["attributes"]
    task = named(spans, "first")
    assert task["attributes"]["otel_tasks.group.name"] == "GET /wait/{key}"
    assert task["attributes"]["otel_tasks.task.outcome"] in {"success", "cancelled"}


@pytest.mark.parametrize("stack", STACKS)
def test_client_that_leaves_during_a_stream(case: Case, stack: str) -> None:
    """A started response keeps its status; the spans of its tasks are cancelled and linked."""
    with case.server.connect() as client:
        client.get(case.path(f"{stack}/stream", "quiet=1"))
        client.read_until(b"first\n")
        case.wait_for_start()
        case.let_it_age()
    case.wait_for_any("stream cancelled", "stream raised")
    server, spans = trace_of(case, stack)
    assert status_of(server) == 200
    assert server["attributes"]["otel_tasks.request.outcome"] == "client_disconnect"
    assert server["attributes"]["otel_tasks.cancel.count"] == 2
    for name in ("first", "second"):
        expect_cancelled_task(named(spans, name), server)


@pytest.mark.parametrize("stack", STACKS)
def test_watcher_that_reads_a_body_leaves_no_span(case: Case, stack: str) -> None:
    """The watcher's reads make no `http receive` span, neither in the request's trace nor in a new one."""
    with case.server.connect() as client:
        client.post(case.path(f"{stack}/wait"), bytes(1_000))
        case.wait_for_start()
        case.let_it_age()
        case.release()
        assert client.response()[0] == 200
    trace_of(case, stack)
    everything: list[Span] = case.server.control("GET", f"/spans/{stack}")
    reading = [span for span in everything if span["name"].endswith("http receive")]
    # A streaming response of Starlette's reads by itself on some servers, as it does without us.
    assert [span["name"] for span in reading if "stream" not in span["name"]] == []
    assert [span["name"] for span in reading if span["parent_id"] is None] == []


@pytest.mark.parametrize("stack", STACKS)
def test_handler_that_is_cancelled_is_called_so(case: Case, stack: str) -> None:
    """The server span tells that the handler was cancelled, and has an event for the disconnect."""
    with case.server.connect() as client:
        client.get(case.path(f"{stack}/wait"))
        case.wait_for_start()
        case.let_it_age()
    case.wait_for("handler cancelled")
    server, _ = trace_of(case, stack)
    assert server["attributes"]["otel_tasks.request.handler"] == "cancelled"
    assert server["events"].count("otel_tasks.client_disconnect") == 1


@pytest.mark.parametrize("stack", STACKS)
def test_handler_that_runs_on_is_called_so(case: Case, stack: str) -> None:
    """A POST's span lasts until the handler ends, and its event shows when the client left."""
    with case.server.connect() as client:
        client.post(case.path(f"{stack}/wait"))
        case.wait_for_start()
        case.let_it_age()
    case.wait_for("task cancelled", task="first")
    case.let_it_age()
    case.release()
    case.wait_for("handler returned")
    server, _ = trace_of(case, stack)
    assert server["attributes"]["otel_tasks.request.outcome"] == "client_disconnect"
    assert server["attributes"]["otel_tasks.request.handler"] == "ran_on"
    assert server["end_time"] - server["event_times"]["otel_tasks.client_disconnect"] > 70_000_000


def test_request_whose_client_stays_has_neither(case: Case) -> None:
    """Without a disconnect, the server span has neither the attribute nor the event."""
    with case.server.connect() as client:
        client.post(case.path("native/wait"))
        case.wait_for_start()
        case.let_it_age()
        case.release()
        assert client.response()[0] == 200
    server, _ = trace_of(case, "native")
    assert "otel_tasks.request.handler" not in server["attributes"]
    assert "otel_tasks.client_disconnect" not in server["events"]
