"""A streamed body's generator ends as docs/howto/streaming.md says when the client leaves."""

from __future__ import annotations

import re

import pytest

from .servers import KINDS, REPOSITORY, Case, Kind

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]

PAGE = REPOSITORY / "docs" / "howto" / "streaming.md"

CANCELLED = "`CancelledError` at its `await`"
CLOSED = "nothing at its `await`; `GeneratorExit` at its next `yield`"


def expected(kind: Kind, method: str) -> str:
    """Return what the page says about a generator on this server."""
    # Below ASGI 2.4 Starlette listens for the disconnect, and cancels the stream whatever its method.
    return CLOSED if method == "POST" and kind.asgi >= (2, 4) else CANCELLED


def rows() -> dict[str, list[str]]:
    """The page's table: server to ASGI version, GET, POST."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text("utf-8").splitlines()
        if re.match(r"\| \w+ \| \d\.\d \|", line)
    ]
    return {name: rest for name, *rest in cells}


def test_page_matches_the_servers() -> None:
    """The page's table has one row per server, with the behavior that these tests assert."""
    assert rows() == {
        kind.name.split("-")[0]: [
            ".".join(map(str, kind.asgi)),
            expected(kind, "GET"),
            expected(kind, "POST"),
        ]
        for kind in KINDS
    }


def start(case: Case, method: str, route: str) -> None:
    """Begin to read a stream, and hang up while its generator waits."""
    with case.server.connect() as client:
        if method == "POST":
            client.post(case.path(route, "quiet=1"))
        else:
            client.get(case.path(route, "quiet=1"))
        client.read_until(b"first\n")
        case.wait_for_start()
        case.let_it_age()


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_generator_that_waits_behaves_as_the_page_says(case: Case, method: str) -> None:
    """A waiting generator is cancelled at its await, or runs to its next chunk and is closed."""
    start(case, method, "plain/stream")
    case.wait_for("task cancelled", task="first", kind="client_disconnect")
    if expected(case.server.kind, method) == CLOSED:
        case.let_it_age()
        assert not case.has("stream cancelled"), case.story()
        case.release()
        case.wait_for("stream raised", error="GeneratorExit")
    else:
        case.wait_for("stream cancelled")
    case.wait_for("app returned")


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("variant", ["stock", "keep"])
def test_handler_that_is_kept_streams_as_without_the_middleware(
    case: Case, variant: str, method: str
) -> None:
    """With `cancel_handler=False`, a stream ends as without the middleware."""
    start(case, method, f"{variant}/stream")
    if case.server.kind.asgi >= (2, 4):
        case.let_it_age()
        assert not case.has("stream cancelled"), case.story()
        case.release()
        # Without the middleware the server takes what it is sent: none of these raises.
        case.wait_for_any("stream raised", "stream returned")
    else:
        case.wait_for("stream cancelled")
        case.release()
    case.wait_for("app returned")


def test_generator_of_a_post_whose_handler_is_cancelled_is_cancelled(case: Case) -> None:
    """With `cancel_handler=True`, the generator of a POST is cancelled immediately on every server."""
    start(case, "POST", "always/stream")
    case.wait_for("stream cancelled")
    case.wait_for("app returned")


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_generator_that_sends_on_comes_to_an_end(case: Case, method: str) -> None:
    """A generator that never waits ends too, at the latest when its next chunk is sent."""
    with case.server.connect() as client:
        if method == "POST":
            client.post(case.path("plain/stream"))
        else:
            client.get(case.path("plain/stream"))
        client.read_until(b"more\n")
        case.wait_for_start()
        case.let_it_age()
    case.wait_for("app returned")
    case.wait_for_any("stream cancelled", "stream raised")


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_event_source_of_sse_starlette_is_cancelled_on_every_server(case: Case, method: str) -> None:
    """sse-starlette listens for the disconnect itself, on every ASGI version."""
    with case.server.connect() as client:
        if method == "POST":
            client.post(case.path("cleanup-safe/events", "entered=after"))
        else:
            client.get(case.path("cleanup-safe/events", "entered=after"))
        case.wait_for("work entered")
        case.let_it_age()
    case.wait_for("cleanup entered")
    case.release("-cleanup")
    case.wait_for("app returned")


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_event_source_of_fastapi_streams_in_the_same_way(case: Case, method: str) -> None:
    """FastAPI's events are a Starlette stream: the generator ends as the page says."""
    with case.server.connect() as client:
        if method == "POST":
            client.post(case.path("cleanup-safe/fastapi-events", "entered=after"))
        else:
            client.get(case.path("cleanup-safe/fastapi-events", "entered=after"))
        case.wait_for("work entered")
        case.let_it_age()
    if expected(case.server.kind, method) == CLOSED:
        case.let_it_age()
        assert not case.has("cleanup entered"), case.story()
        case.release()
    case.wait_for("cleanup entered")
    case.release("-cleanup")
    case.wait_for("app returned")
