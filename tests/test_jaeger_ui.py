"""The stand-in for Jaeger's UI: what it says of a trace, and which spans a link marks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from examples.jaeger_ui import cancel_words, marked, trace_link, warnings
from examples.trace_tree import Span

TRACE = "a" * 32
CALL = Span(TRACE, "1", None, "GET /search/{city}", 0.0, 1.0, {}, kind="CLIENT", service="client")
REQUEST = Span(
    TRACE,
    "2",
    "1",
    "GET /search/{city}",
    0.0,
    1.0,
    {"http.request.method": "GET", "otel_tasks.request.outcome": "client_disconnect"},
    kind="SERVER",
    service="shop",
    events=(("otel_tasks.client_disconnect", {}),),
)
TASK = Span(
    TRACE,
    "3",
    "2",
    "fetch",
    0.0,
    1.0,
    {"otel_tasks.task.id": "fetch", "otel_tasks.cancel.reason": "client_disconnect"},
    service="shop",
    links=(("spawned_by", "9"),),
    resource={"service.name": "shop", "host.name": "Web-1"},
)
GROUP = Span(TRACE, "4", "3", "load", 0.0, 1.0, {"otel_tasks.cancel.reason": "timeout"}, service="shop")
WHOLE = [CALL, REQUEST, TASK, GROUP]


def ids(spans: list[Span]) -> str:
    """The ids of spans."""
    return "".join(span.span_id for span in spans)


def test_whole_trace_has_no_warning() -> None:
    """A root, all parents, and links to other spans than the parent."""
    assert warnings(WHOLE) == []


def test_trace_without_its_client_has_no_root_and_is_incomplete() -> None:
    """A demo whose client exports nothing loses its root; the others keep theirs."""
    other = replace(CALL, trace_id="b" * 32)
    assert warnings([*WHOLE[1:], other]) == [
        f"{TRACE}: <trace-without-root-span>",
        f"{TRACE}: Incomplete: missing parent of GET /search/{{city}}",
    ]


def test_each_span_without_its_parent_counts() -> None:
    """A span that was lost in the middle leaves the trace its root."""
    second = replace(GROUP, span_id="5", name="again")
    assert warnings([CALL, REQUEST, GROUP, second]) == [f"{TRACE}: Incomplete: missing parent of again, load"]


def test_link_to_the_own_parent_is_a_warning() -> None:
    """Jaeger shows none."""
    linked = replace(TASK, links=(("cancelled_by", "2"), ("spawned_by", "9")))
    assert warnings([CALL, REQUEST, linked]) == [
        f"{TRACE}: link to its own parent is not shown: fetch (cancelled_by)"
    ]


@pytest.mark.parametrize(
    ("ui_find", "expected"),
    [
        ("client_disconnect", "23"),
        ("CLIENT_disconnect", "23"),
        ("timeout", "4"),
        ("client_disconnect timeout", "234"),
        ("cancel.reason=timeout", "4"),
        ("cancel.reason", "34"),
        ("cancel.reason -otel_tasks.cancel", ""),
        ("shop", "234"),
        ("web-1", "3"),
        ("fetch", "3"),
        ("GET", "12"),
        ('"no such"', ""),
        ("4", "4"),
        ("", ""),
    ],
)
def test_link_marks_what_jaeger_would_mark(ui_find: str, expected: str) -> None:
    """Any of the words, as a part of names, keys, values, events and resources; an id as a whole."""
    assert ids(marked(WHOLE, ui_find)) == expected


def test_description_of_a_status_is_searched_too() -> None:
    """Jaeger has it as an attribute."""
    assert ids(marked([replace(CALL, description="broken pipe")], "pipe")) == "1"


def test_link_looks_for_what_cancelled_the_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reason once; nothing where nothing was cancelled, and nothing of other traces."""
    monkeypatch.delenv("JAEGER_UI_URL", raising=False)
    assert cancel_words(WHOLE) == ["client_disconnect", "timeout"]
    address = f"http://traces:16686/trace/{TRACE}"
    endpoint = "http://traces:4318"
    assert trace_link(endpoint, TRACE, [CALL]) == address
    assert trace_link(endpoint, TRACE, [REQUEST, TASK]) == f"{address}?uiFind=client_disconnect"
    assert trace_link(endpoint, TRACE, WHOLE) == f"{address}?uiFind=client_disconnect%20timeout"
    assert trace_link(endpoint, TRACE, [replace(GROUP, trace_id="b" * 32)]) == address


def test_link_leads_to_the_address_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a Jaeger behind a proxy, or one that gets its spans from another collector."""
    monkeypatch.setenv("JAEGER_UI_URL", "https://jaeger.example.com/jaeger/")
    link = trace_link("http://collector:4318", TRACE, [CALL])
    assert link == f"https://jaeger.example.com/jaeger/trace/{TRACE}"
