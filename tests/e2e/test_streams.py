"""A streamed body's generator ends as docs/howto/streaming.md says when the client leaves."""

from __future__ import annotations

import re

import pytest

from .servers import KINDS, REPOSITORY, Case, Kind

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]

PAGE = REPOSITORY / "docs" / "howto" / "streaming.md"

CANCELLED = "`CancelledError` there"
RUNS_ON = "nothing; `GeneratorExit` at its next `yield`"
CLOSED = "`GeneratorExit` there"
RESUMED = "`CancelledError` at its next `await`, or `GeneratorExit` at its next `yield`"

BODIES = (
    *("stream/waits", "stream/yields", "stream/outer-waits", "stream/outer-yields"),
    *("stream/thread-waits", "stream/thread-yields"),
    *("events/waits", "events/yields", "fastapi/waits", "fastapi/yields"),
    *("proxy/waits", "openai/waits"),
)
# What asyncio, anyio, and Python log about a generator that nothing has closed in time.
LEFT_OPEN = re.compile(
    "destroyed but|ignored GeneratorExit|already running|different task|never retrieved|closing of"
)


def expected(kind: Kind, method: str) -> str:
    """Return what the page says about a generator that waits, on this server."""
    # Below ASGI 2.4 Starlette listens for the disconnect, and cancels the stream whatever its method.
    return RUNS_ON if method == "POST" and kind.asgi >= (2, 4) else CANCELLED


def expected_at_yield(kind: Kind) -> str:
    """Return what the page says about a generator whose last part the client has not taken."""
    # gunicorn's send() never returns once the client has left; that of the others does, at once.
    return CLOSED if kind.asgi >= (2, 4) else RESUMED


def rows() -> list[list[str]]:
    """The page's table: server, ASGI version, method, and what a generator gets at an await and a yield."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text("utf-8").splitlines()
        if re.match(r"\| \w+ \| \d\.\d \|", line)
    ]


def test_page_matches_the_servers() -> None:
    """The page's table has a row per server and method, with the behavior that these tests assert."""
    described = {
        (kind.name.split("-")[0], ".".join(map(str, kind.asgi)), method): (
            expected(kind, method),
            expected_at_yield(kind),
        )
        for kind in KINDS
        for method in ("GET", "POST")
    }
    assert rows() == [[*key, *cells] for key, cells in described.items()]


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("variant", ["streams", "streams-inside"])
@pytest.mark.parametrize("body", BODIES)
def test_generators_are_closed_before_the_request_ends(
    case: Case, body: str, variant: str, method: str
) -> None:
    """Each `finally` runs to its end, awaits, and starts a task, whatever the generator and its consumer."""
    with case.server.connect() as client:
        send = client.post if method == "POST" else client.get
        send(case.path(f"{variant}/{body}"))
        client.read_until(b"first")
        _wait_until_it_is_there(case, body)
    if body == "fastapi/yields":
        # FastAPI's own task meets the stream that FastAPI has closed: BrokenResourceError, also without us.
        case.complaints_expected = True
    if case.server.kind.name == "granian" and body.endswith("yields"):
        # It logs what it could not send.
        case.complaints_expected = True
    if body.endswith("waits"):
        case.let_it_age()
        case.release()
        case.release("-upstream")
    case.wait_for_any("app returned", "app raised")

    _assert_all_are_closed(case)
    if body == "openai/waits":
        Case(case.server, f"{case.key}-upstream").wait_for("body closed")
    if body == "proxy/waits":
        upstream = Case(case.server, f"{case.key}-upstream")
        upstream.wait_for("app returned")
        _assert_all_are_closed(upstream)


def _wait_until_it_is_there(case: Case, body: str) -> None:
    """Wait until the generator waits, or no part has been taken for a while."""
    if body.endswith("waits"):
        case.wait_for("outer waits" if "outer" in body else "body waits") if not body.startswith(
            ("proxy", "openai")
        ) else None
        case.let_it_age()
        return
    case.wait_for("body yields")
    count = 0
    while (now := case.count("body yields")) != count:
        count = now
        case.let_it_age()


def _assert_all_are_closed(case: Case) -> None:
    events = case.server.events(case.key)
    whats = [event["what"] for event in events]
    closing = [event for event in events if event["what"].endswith(" closing")]
    assert closing, case.story()
    for event in closing:
        assert not event["finalizer"], case.story()
        assert event["error"] in {"CancelledError", "GeneratorExit"}, case.story()
        end = min(whats.index(end) for end in ("app returned", "app raised") if end in whats)
        assert whats.index(event["what"].replace("closing", "closed")) < end, case.story()
    assert not LEFT_OPEN.search(case.server.log(case.log_start)), case.story()


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_generator_at_its_yield_behaves_as_the_page_says(case: Case, method: str) -> None:
    """The client does not read, and leaves: the generator gets what the page's last column says."""
    with case.server.connect() as client:
        send = client.post if method == "POST" else client.get
        send(case.path("streams/stream/yields"))
        client.read_until(b"first")
        _wait_until_it_is_there(case, "stream/yields")
    # granian logs what it could not send.
    case.complaints_expected = case.server.kind.name == "granian"
    error = case.wait_for("body closing")["error"]
    assert f"`{error}`" in expected_at_yield(case.server.kind), case.story()
    case.wait_for("app returned")


@pytest.mark.parametrize("how", ["waits", "yields", "outer-waits", "outer-yields"])
def test_generators_of_an_application_without_a_framework_are_closed(case: Case, how: str) -> None:
    """The frame that iterates a generator is found, whatever framework it belongs to."""
    with case.server.connect() as client:
        client.get(case.path(f"streams-raw/{how}"))
        client.read_until(b"first")
        _wait_until_it_is_there(case, how)
    case.complaints_expected = case.server.kind.name == "granian"
    case.wait_for("app returned")
    _assert_all_are_closed(case)


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("how", ["waits", "yields", "outer-yields"])
@pytest.mark.parametrize("framework", ["django", "quart", "litestar"])
def test_generators_of_other_frameworks_are_closed(case: Case, framework: str, how: str, method: str) -> None:
    """Whatever iterates the body: the generator it leaves open is found."""
    with case.server.connect() as client:
        send = client.post if method == "POST" else client.get
        send(case.path(f"{framework}/stream/{how}"))
        client.read_until(b"first")
        _wait_until_it_is_there(case, how)
    # Their servers log what they could not send.
    case.complaints_expected = how.endswith("yields")
    case.wait_for("app returned")
    _assert_all_are_closed(case)


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
    if expected(case.server.kind, method) == RUNS_ON:
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
    if expected(case.server.kind, method) == RUNS_ON:
        case.let_it_age()
        assert not case.has("cleanup entered"), case.story()
        case.release()
    case.wait_for("cleanup entered")
    case.release("-cleanup")
    case.wait_for("app returned")
