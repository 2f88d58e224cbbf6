from __future__ import annotations

import io
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from examples.three_services.__main__ import (
    CUSTOMER,
    NAMES,
    Visit,
    checks,
    how_long,
    print_checks,
)
from examples.trace_tree import Span, trace_tree

if TYPE_CHECKING:
    from collections.abc import Callable

STAYS = Visit("waits", ["lamp"], "a" * 32, ended="got 200")
LEAVES = Visit("leaves", ["sofa"], "b" * 32, ended="left", left_at=1.0)
UNEXPLAINED = {
    "otel_tasks.task.id": "work",
    "otel_tasks.task.outcome": "cancelled",
    "otel_tasks.cancel.reason": "client_disconnect",
}
NOTHING_LEFT: dict[str, list[str]] = {name: [] for name in NAMES}


def span(trace_id: str, service: str, name: str, parent: str | None, **changes: Any) -> Span:
    """A span whose id is its service and name."""
    span_id = f"{trace_id[0]} {service} {name}"
    return replace(
        Span(trace_id, span_id, parent and f"{trace_id[0]} {parent}", name, 0.0, 1.0, {}),
        service=service,
        **changes,
    )


def trace_of(visit: Visit) -> list[Span]:
    """A customer's request that goes through all three services, with one task in each."""
    root = span(visit.trace_id, CUSTOMER, "call", None, kind="CLIENT")
    root.attributes.update({"http.response.status_code": 200} if visit is STAYS else {})
    caller, spans = f"{CUSTOMER} call", [root]
    for name in NAMES:
        request = span(
            visit.trace_id, name, "GET", caller, kind="SERVER", attributes={"http.request.method": "GET"}
        )
        task = span(visit.trace_id, name, "work", f"{name} GET", attributes={"otel_tasks.task.id": "work"})
        call = span(visit.trace_id, name, "call", f"{name} work", kind="CLIENT")
        answered = visit is STAYS
        call.attributes.update({"http.response.status_code": 200} if answered else {})
        task.attributes["otel_tasks.task.outcome"] = "success" if answered else "cancelled"
        if not answered:
            task.attributes["otel_tasks.cancel.reason"] = "client_disconnect"
            task.attributes["otel_tasks.cancel.origin.span_id"] = request.span_id
            task = replace(task, end=1.25)
        spans += [request, task, call]
        caller = f"{name} call"
    # The last service calls none.
    return spans[:-1]


def broken(change: Callable[[list[Span]], list[Span]], **options: Any) -> dict[str, list[str]]:
    """The violations that the checks find after this change in the spans of two good requests."""
    spans = change([*trace_of(STAYS), *trace_of(LEAVES)])
    defaults: dict[str, Any] = {"stays": STAYS, "leaves": LEAVES, "left": NOTHING_LEFT}
    found = {
        promise: list(complaints) for promise, complaints in checks(spans, **(defaults | options)).items()
    }
    return {promise: complaints for promise, complaints in found.items() if complaints}


def changed(spans: list[Span], which: str, **changes: Any) -> list[Span]:
    """The spans with one of them changed."""
    assert which in {each.span_id for each in spans}
    return [replace(each, **changes) if each.span_id == which else each for each in spans]


def test_good_traces_keep_all_promises() -> None:
    """Nothing is complained of where all is as promised."""
    assert broken(lambda spans: spans) == {}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda spans: changed(spans, "b pricing GET", status="ERROR"), "pricing, GET: ERROR"),
        (
            lambda spans: [
                each for each in spans if each.service != "suppliers" or each.trace_id == "a" * 32
            ],
            "nothing from suppliers",
        ),
        (
            lambda spans: changed(spans, "b suppliers work", trace_id="c" * 32),
            f"suppliers, work is of another trace, {'c' * 32}",
        ),
        (
            lambda spans: changed(spans, "b suppliers GET", parent_id="gone"),
            "suppliers, GET hangs below nothing",
        ),
        (
            lambda spans: changed(spans, "b suppliers GET", parent_id=None),
            "suppliers, GET hangs below nothing",
        ),
        (
            lambda spans: [each for each in spans if each.span_id != "a customer call"],
            "gateway, GET hangs below nothing",
        ),
        (lambda spans: changed(spans, "b suppliers work", attributes={}), "none in suppliers"),
        (
            lambda spans: changed(spans, "b pricing work", attributes=UNEXPLAINED),
            "pricing, work does not name its service's request",
        ),
        (
            lambda spans: changed(
                spans, "b pricing work", links=(("cancelled_by", "b gateway GET"),), attributes=UNEXPLAINED
            ),
            "pricing, work does not name its service's request",
        ),
        (
            lambda spans: changed(spans, "a gateway work", attributes={"otel_tasks.task.outcome": "timeout"}),
            "gateway, work: timeout",
        ),
        (lambda spans: [], "the customer who waits: nothing from gateway"),
    ],
)
def test_each_broken_promise_is_found(change: Callable[[list[Span]], list[Span]], complaint: str) -> None:
    """Each error in the traces is named with its span."""
    complaints = [each for found in broken(change).values() for each in found]
    assert any(complaint in each for each in complaints), complaints


def test_a_task_that_is_left_and_an_answer_that_failed_are_found() -> None:
    """Tasks that the services still run, and the customer's response, are checked too."""
    left = NOTHING_LEFT | {"suppliers": ["calculate", "calculate"]}
    assert broken(lambda spans: spans, left=left) == {
        "no task is left in any of the three services": ["suppliers still runs calculate, calculate"]
    }
    failed = replace(STAYS, ended="got 502")
    (complaints,) = broken(lambda spans: spans, stays=failed).values()
    assert complaints == ["the customer got 502"]


def test_the_verdict_of_all_promises_is_that_none_is_broken() -> None:
    """Each is printed with its violations, and one violation fails the run."""
    console = Console(width=100, record=True, file=io.StringIO())
    assert print_checks(console, {"one trace": []})
    assert not print_checks(console, {"no error": ["pricing, GET"], "no task": []})
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert lines == ["ok     one trace", "FAILED no error", "         pricing, GET", "ok     no task"]


def test_the_way_of_the_hang_up_is_read_from_the_spans() -> None:
    """It ends with the last cancelled task of the last service; where there is none, that is said."""
    assert how_long(trace_of(LEAVES), LEAVES).endswith("last task in suppliers: 250.0 ms")
    assert how_long(trace_of(STAYS), LEAVES) == "no task in suppliers was cancelled"


# --- the picture ---------------------------------------------------------------------------------------


def drawn(spans: list[Span]) -> list[str]:
    """The first column of the picture."""
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(trace_tree(spans))
    lines = console.export_text().splitlines()[1:]
    return [line.partition("█")[0].strip() for line in lines]


def test_a_call_is_one_row_below_the_task_that_made_it() -> None:
    """The client's span is left out where the server's is there, which says of which service it is."""
    assert drawn(trace_of(STAYS)) == [
        "gateway GET",
        "└─ work",
        "└─ pricing GET",
        "└─ work",
        "└─ suppliers GET",
        "└─ work",
    ]


def test_a_call_that_nobody_took_is_drawn() -> None:
    """If the server's span is missing, the client's span stands for the call and says that no answer came."""
    spans = [each for each in trace_of(LEAVES) if each.service in (CUSTOMER, "gateway")]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(trace_tree(spans))
    *_, last = console.export_text().splitlines()
    assert last.lstrip().startswith("└─ call")
    assert last.rstrip().endswith("no answer")
