"""Frameworks other than FastAPI: their handlers see the same disconnect with and without the middleware."""

from __future__ import annotations

from collections import Counter

import pytest
from websockets.sync.client import connect

from .servers import KINDS, Case

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]

LISTENING = ("django", "quart")
"""These listen for the disconnect and cancel the handler, for every method."""

DEAF = ("litestar", "blacksheep")
"""These do not listen: without the middleware, the handler runs to its end."""

SOCKETS = ("quart", "litestar", "blacksheep")


def leave(case: Case, method: str, variant: str) -> None:
    """Hang up while the handler waits."""
    with case.server.connect() as client:
        if method == "POST":
            client.post(case.path(f"{variant}/slow"))
        else:
            client.get(case.path(f"{variant}/slow"))
        case.wait_for("task started")
        case.let_it_age()


def story_of(case: Case) -> Counter[str]:
    """What the handler did, how often."""
    case.wait_for_any("app returned", "app raised")
    return Counter(
        what + " " + event.get("error", "")
        for event in case.server.events(case.key)
        if (what := event["what"]).startswith(("handler", "rest"))
    )


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("framework", LISTENING)
def test_framework_that_listens_cancels_its_handler_itself(case: Case, framework: str, method: str) -> None:
    """Django and Quart cancel the handler once when its client leaves, and nothing is logged."""
    bare = Case(case.server, f"{case.key}-bare")
    leave(bare, method, f"bare-{framework}")
    leave(case, method, framework)
    case.wait_for("task cancelled", task="first", kind="client_disconnect")
    for each in (bare, case):
        each.wait_for("handler cancelled")
        each.wait_for("rest returned")
    assert story_of(case) == story_of(bare)
    bare.release()


@pytest.mark.parametrize("framework", DEAF)
def test_handler_of_a_get_is_cancelled_where_the_framework_does_not_listen(
    case: Case, framework: str
) -> None:
    """Under Litestar and BlackSheep, the middleware cancels the handler, which can clean up."""
    leave(case, "GET", framework)
    case.wait_for("task cancelled", task="first", kind="client_disconnect")
    case.wait_for("handler cancelled")
    case.wait_for("rest returned")
    case.wait_for("app returned")


@pytest.mark.parametrize("framework", DEAF)
def test_handler_of_a_post_runs_on_where_the_framework_does_not_listen(case: Case, framework: str) -> None:
    """Under Litestar and BlackSheep, a POST runs to its end; only its tasks are cancelled."""
    leave(case, "POST", framework)
    case.wait_for("task cancelled", task="first", kind="client_disconnect")
    assert not case.has("handler cancelled")
    case.release()
    case.wait_for("handler returned")
    case.wait_for("app returned")


@pytest.mark.parametrize("how", ["close", "vanish"])
@pytest.mark.parametrize("framework", SOCKETS)
def test_websocket_ends_as_without_the_middleware(case: Case, framework: str, how: str) -> None:
    """The handler gets the same signal from its framework as without the middleware."""
    stories: list[Counter[str]] = []
    for variant in (f"bare-{framework}", framework):
        each = Case(case.server, f"{case.key}-{variant}")
        with connect(
            f"ws://127.0.0.1:{each.server.port}{each.path(f'{variant}/ws')}", close_timeout=0.5
        ) as socket:
            each.wait_for("waits")
            each.let_it_age()
            if how == "vanish":
                socket.socket.shutdown(2)
        stories.append(story_of(each))
        if variant == framework:
            each.wait_for("task cancelled", task="first")
        each.release()
    # Not the end of the app call: without the middleware, some servers refuse the closing frame.
    assert stories[0] == stories[1]
    assert any(what.startswith("handler") for what in stories[1])
    case.complaints_expected = True


@pytest.mark.parametrize("kind", [KINDS[0]], ids=lambda kind: kind.name, indirect=True)
@pytest.mark.parametrize(
    ("framework", "name"), [("litestar", "GET /slow/{key}"), ("span", "GET /slow/{key}")]
)
def test_group_is_named_after_the_route_that_the_framework_leaves(
    case: Case, framework: str, name: str
) -> None:
    """Litestar leaves the route in the scope; instrumentation leaves it on the server span."""
    with case.server.connect() as client:
        client.get(case.path(f"{framework}/slow"))
        assert case.wait_for("group")["name"] == name
        case.release()
        assert client.response()[0] == 200
