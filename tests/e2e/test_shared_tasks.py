"""A disconnect cancels what belongs to the request: and no task of the application."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from .servers import KINDS, Case, eventually
from .test_telemetry import trace_of

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.real_clock,
    # Nothing here depends on the server; one on each of the two loops.
    pytest.mark.parametrize("kind", KINDS[:2], ids=lambda kind: kind.name, indirect=True),
]

AT_ONCE = ("await", "plain", "wait", "shield", "timeout", "wait-for", "wait-for-task", "as-completed")
"""Ways to wait that a cancelled handler leaves immediately."""

WITH_THE_TASK = ("gather", "asyncio-group", "scoped-group", "nested-task", "request-task")
"""Ways to wait that it may leave only when the awaited task has ended."""


@pytest.fixture
def first(case: Case) -> Case:
    """The request whose client leaves; `case` is the one that stays."""
    return Case(case.server, f"{case.key}-first")


@pytest.fixture(autouse=True)
def _task_ends(case: Case) -> Iterator[None]:
    yield
    case.release("-load")


@pytest.mark.parametrize("method", ["get", "post"])
@pytest.mark.parametrize("way", [*AT_ONCE, *WITH_THE_TASK])
def test_application_task_continues_when_one_of_its_waiters_leaves(
    case: Case, first: Case, way: str, method: str
) -> None:
    """The first client hangs up; the second still gets the result."""
    with case.server.connect() as staying:
        with case.server.connect() as leaving:
            getattr(leaving, method)(first.path(f"shared/{way}", f"of={case.key}"))
            first.wait_for("handler entered")
            getattr(staying, method)(case.path(f"shared/{way}", f"of={case.key}"))
            case.wait_for("handler entered")
            case.wait_for("load entered")
            case.let_it_age()
        if way in AT_ONCE:
            first.wait_for("app returned")
        case.nothing_is_cancelled()
        assert not case.has("load cancelled"), case.story()
        case.release("-load")
        assert staying.response() == (200, json.dumps(f"price of {case.key}").encode())
    first.wait_for("app returned")
    assert case.count("load returned") == 1
    assert not case.has("handler cancelled")


@pytest.mark.parametrize("way", [*AT_ONCE, *WITH_THE_TASK])
def test_application_task_continues_when_its_only_waiter_leaves(case: Case, way: str) -> None:
    """A payment in `group="outbox"` completes although nothing waits for it any longer."""
    with case.server.connect() as client:
        client.post(case.path(f"shared/{way}", f"of={case.key}"))
        case.wait_for("load entered")
        case.let_it_age()
    if way in AT_ONCE:
        case.wait_for("app returned")
    case.nothing_is_cancelled()
    case.release("-load")
    case.wait_for("load returned")
    case.wait_for("app returned")


@pytest.mark.parametrize("way", ["timeout-that-expires", "cancelled-waiter"])
def test_cancelling_a_waiter_keeps_its_meaning(case: Case, way: str) -> None:
    """A timeout or an explicit cancel of the waiting task cancels the awaited task, as in asyncio."""
    case.complaints_expected = True
    with case.server.connect() as client:
        client.post(case.path(f"shared/{way}", f"of={case.key}"))
        case.wait_for("load cancelled")
        client.response()


@pytest.mark.parametrize("how", ["task", "group", "callback"])
def test_task_that_outlives_its_request_starts_tasks_with_the_manager(case: Case, how: str) -> None:
    """Once its request is over, a plain asyncio task creates its tasks in the manager."""
    with case.server.connect() as client:
        client.get(case.path("shared/session", f"how={how}"))
        assert client.response()[0] == 200
    case.wait_for("app returned")
    case.release("-session")
    case.wait_for("late task")
    case.wait_for("session returned")
    assert case.has("late task", group="group" if how == "group" else "root"), case.story()


def test_late_task_has_a_trace_of_its_own(case: Case) -> None:
    """The task's span links to the finished request and is not a child of it."""
    with case.server.connect() as client:
        client.get(case.path("native/session"))
        assert client.response()[0] == 200
    case.wait_for("app returned")
    case.release("-session")
    case.wait_for("session returned")

    def look() -> dict[str, Any] | None:
        spans: list[dict[str, Any]] = case.server.control("GET", "/spans/native")
        return next((span for span in spans if span["name"] == "late"), None)

    late = eventually(look, case.story)
    assert late is not None
    server, spans = trace_of(case, "native")
    assert late["parent_id"] is None
    assert late["trace_id"] != server["trace_id"]
    (link,) = late["links"]
    assert link["attributes"] == {"otel_tasks.link": "spawned_by"}
    assert link["span_id"] in {span["span_id"] for span in spans}
