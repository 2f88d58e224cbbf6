"""An application that listens for the disconnect ends as it does without the middleware."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from .servers import Case

if TYPE_CHECKING:
    from .clients import Client

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]

LAYERS = {
    "listen": "bare",
    "listen-inside": "bare-base",
    "listen-outside": "bare-base",
    "listen-between": "bare-bases",
}
"""Each stack with the middleware, and the same one without."""

NOT_COMPARED = ("task ", "status", "app ")


def request(client: Client, case: Case, method: str, route: str) -> None:
    """Send it; the `catch` route gets an incomplete body."""
    if route.endswith("/catch"):
        client.head(method, case.path(route), content_length=10)
    elif method == "POST":
        client.post(case.path(route))
    else:
        client.get(case.path(route))


def leave(case: Case, method: str, route: str) -> None:
    """Hang up while the handler waits."""
    with case.server.connect() as client:
        request(client, case, method, route)
        case.wait_for("waits")
        case.let_it_age()


def story_of(case: Case) -> Counter[str]:
    """Count what the application did."""
    case.wait_for("app returned")
    whats = [event["what"] for event in case.server.events(case.key)]
    return Counter(what for what in whats if not what.startswith(NOT_COMPARED))


def both(case: Case, method: str, layers: str, route: str) -> tuple[Counter[str], Counter[str]]:
    """Return the events without the middleware and with it."""
    bare = Case(case.server, f"{case.key}-bare")
    leave(bare, method, f"{LAYERS[layers]}/{route}")
    leave(case, method, f"{layers}/{route}")
    case.wait_for("task cancelled", task="first", kind="client_disconnect")
    if route == "ignore":
        case.let_it_age()
        assert not case.has("app returned"), case.story()
        bare.release()
        case.release()
    stories = story_of(bare), story_of(case)
    bare.release()
    return stories


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("route", ["own-group", "own-scope", "stray-listener", "ignore", "catch", "events"])
def test_listening_application_ends_in_its_own_way(case: Case, route: str, layers: str, method: str) -> None:
    """Handler, close handler, background task, and outer code do the same as without the middleware."""
    bare, bound = both(case, method, layers, route)
    assert bound == bare, case.story()
    if layers == "listen":
        assert {"rest returned", "catcher returned", "close handler returned"} & bound.keys(), case.story()


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("layers", LAYERS)
def test_stream_that_starlette_ends_runs_its_background_task(case: Case, layers: str, method: str) -> None:
    """Where Starlette listens, the stream's background task runs, and so does the code after `call_next`."""
    if case.server.kind.asgi >= (2, 4):
        pytest.skip(f"Starlette does not listen on {case.server.kind.name}")
    bare, bound = both(case, method, layers, "stream")
    assert bound == bare, case.story()
    assert bound["background returned"] == 1, case.story()


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("sender", ["sender", "child-sender"])
def test_application_that_cannot_send_continues(case: Case, sender: str, method: str) -> None:
    """An application that got the server's `OSError` knows that the client left: it is not cancelled."""
    # The client is still connected, so the server complains about the incomplete response.
    case.complaints_expected = True
    stories: list[Counter[str]] = []
    for variant in (f"bare-{sender}", f"listen-{sender}"):
        each = Case(case.server, f"{case.key}-{variant}")
        with each.server.connect() as client:
            request(client, each, method, variant)
            client.read_until(b"more")
            each.release("-gone")
            stories.append(story_of(each))
        assert bool(each.has("task cancelled", kind="client_disconnect")) == variant.startswith("listen")
        each.release()
    assert stories[0] == stories[1]
    assert stories[0]["send failed"] == stories[0]["rest returned"] == 1
