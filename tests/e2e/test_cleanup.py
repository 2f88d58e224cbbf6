"""Cleanup after a disconnect: an `uncancellable()` block completes wherever it is entered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .servers import Case

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]

PLACES = (
    "plain",
    "task",
    "unawaited-task",
    "gather",
    "stream",
    "events",
    "fastapi-events",
    "dependency",
)
"""Places for a handler's cleanup: the routes of `cleanup_app`."""

LAYERS = ("cleanup", "cleanup-inside", "cleanup-outside", "cleanup-stacked")
"""No `BaseHTTPMiddleware`, one inside of ours, one outside, several on both sides."""

STEPS = ("create_task", "TaskGroup", "asyncio.TaskGroup")


def leave(case: Case, route: str, query: str, *, method: str = "POST") -> None:
    """Send a request, and hang up while it works."""
    with case.server.connect() as client:
        if method == "POST":
            client.post(case.path(route, query))
        else:
            client.get(case.path(route, query))
        case.wait_for("work entered")
        case.let_it_age()


def expect_cleanup(case: Case) -> None:
    """Check that the cleanup and the tasks it starts complete before the request ends."""
    case.wait_for("cleanup entered")
    # Long enough for a second cancellation to arrive, or for a request that does not wait to end.
    case.let_it_age()
    assert not case.has("app returned"), case.story()
    case.release("-cleanup")
    case.wait_for("app returned")
    case.expect_order(
        "cleanup entered", *(f"{step} returned" for step in STEPS), "cleanup returned", "app returned"
    )


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("place", PLACES)
def test_cleanup_entered_after_the_disconnect_is_finished(case: Case, place: str, layers: str) -> None:
    """A `finally` with `uncancellable()` can await and start work, and the request waits for all of it."""
    leave(case, f"{layers}/{place}", "entered=after")
    expect_cleanup(case)


@pytest.mark.parametrize("layers", ["cleanup", "cleanup-stacked"])
@pytest.mark.parametrize("place", [place for place in PLACES if place != "dependency"])
def test_block_entered_before_the_disconnect_is_finished(case: Case, place: str, layers: str) -> None:
    """A disconnect that comes while `uncancellable()` is open waits for its end, and so does the request."""
    leave(case, f"{layers}/{place}", "entered=before")
    expect_cleanup(case)


@pytest.mark.parametrize("place", ["plain", "stream", "events", "fastapi-events"])
@pytest.mark.parametrize("entered", ["before", "after"])
def test_cleanup_of_a_get_is_finished(case: Case, place: str, entered: str) -> None:
    """The same holds for methods whose handlers are cancelled by default."""
    leave(case, f"cleanup-safe/{place}", f"entered={entered}", method="GET")
    expect_cleanup(case)


@pytest.mark.parametrize("place", ["stream", "events", "fastapi-events"])
def test_block_of_a_post_that_runs_on_is_finished(case: Case, place: str) -> None:
    """In a POST, which the middleware does not cancel, no listener of the application breaks the block."""
    leave(case, f"cleanup-safe/{place}", "entered=before")
    case.wait_for("cleanup entered")
    case.let_it_age()
    assert not case.has("cleanup cancelled"), case.story()
    case.release("-cleanup")
    case.wait_for("cleanup returned")
    case.release()
    case.wait_for("app returned")


@pytest.mark.parametrize("shielded", ["true", "false"])
def test_background_task_after_a_disconnect_may_start_work(case: Case, shielded: str) -> None:
    """A background task that starts after the client has left can create tasks and await them."""
    leave(case, "cleanup-safe/background", f"shielded={shielded}")
    case.release()
    expect_cleanup(case)


@pytest.mark.parametrize("how", ["finally", "except"])
def test_cleanup_without_a_block_may_start_work(case: Case, how: str) -> None:
    """A handler that cleans up after its cancellation was delivered can create tasks and await them."""
    leave(case, "cleanup/unshielded", f"how={how}")
    expect_cleanup(case)


@pytest.mark.parametrize("layers", LAYERS)
def test_handler_that_swallows_its_cancellation_starts_nothing(case: Case, layers: str) -> None:
    """Continuing is not cleanup: the request's group is closed and refuses the task."""
    leave(case, f"{layers}/swallow", "")
    case.wait_for("app returned")
    # Under a `BaseHTTPMiddleware` outside of ours, anyio cancels the handler again before that.
    assert not case.has("create_task entered"), case.story()
    if layers in ("cleanup", "cleanup-inside"):
        case.expect_order("swallowed", "start raised")
        assert case.has("start raised", error="GroupClosedError"), case.story()
