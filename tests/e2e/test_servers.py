"""What the middleware does on real servers, when real clients leave in all the ways they can."""

from __future__ import annotations

import hashlib
import json

import pytest
from websockets.sync.client import connect

from .clients import Http2Client
from .servers import Case

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]

TWO_HUNDRED_KB = 200_000


def expect_group_cancelled(case: Case, *tasks: str, kind: str = "client_disconnect") -> None:
    """Both tasks of the request ended by the disconnect, once; the application's own goes on."""
    for task in tasks or ("first", "second"):
        case.wait_for("task cancelled", task=task, kind=kind)
        assert case.count("task cancelled", task=task) == 1, case.story()
    assert not case.has("task cancelled", task="outbox"), case.story()


# --- the client leaves while the handler works ----------------------------------------------------


@pytest.mark.parametrize("leave", ["close", "reset", "half_close"])
def test_client_that_leaves_cancels_the_tasks_and_the_handler_of_a_get(case: Case, leave: str) -> None:
    """A FIN, a RST and a half-close all stop what runs for a GET, and a 499 is what the outer layers see."""
    with case.server.connect() as client:
        client.get(case.path("plain/wait"))
        case.wait_for_start()
        case.let_it_age()
        getattr(client, leave)()
        expect_group_cancelled(case)
        case.wait_for("handler cancelled")
        case.wait_for("status", status=499)


def test_client_that_leaves_at_once_is_noticed_too(case: Case) -> None:
    """A disconnect that comes before the sweep has seen the request is found at its next ticks."""
    with case.server.connect() as client:
        client.get(case.path("plain/wait"))
        case.wait_for("handler entered")
    expect_group_cancelled(case)
    case.wait_for("handler cancelled")


@pytest.mark.parametrize("leave", ["close", "reset", "half_close"])
def test_client_that_leaves_lets_the_handler_of_a_post_finish(case: Case, leave: str) -> None:
    """A POST has effects: its tasks are cancelled, and its handler runs to its end."""
    with case.server.connect() as client:
        client.post(case.path("plain/wait"))
        case.wait_for_start()
        case.let_it_age()
        getattr(client, leave)()
        expect_group_cancelled(case)
        assert not case.has("handler cancelled")
        case.release()
        case.wait_for("handler returned")


def test_post_that_awaits_its_own_task_ends_with_it(case: Case) -> None:
    """A POST's handler ends where it awaits a task of its group, and the server logs no error for it."""
    with case.server.connect() as client:
        client.post(case.path("plain/await-task"))
        case.wait_for_start()
        case.let_it_age()
    expect_group_cancelled(case)
    case.wait_for("handler cancelled")
    case.wait_for("status", status=499)


def test_post_that_starts_another_task_after_the_disconnect_ends_there(case: Case) -> None:
    """The closed group refuses the task; that is the client's doing, and no failure of the server's."""
    with case.server.connect() as client:
        client.post(case.path("plain/one-by-one"))
        case.wait_for_start()
        case.let_it_age()
    expect_group_cancelled(case)
    case.release()
    case.wait_for("handler raised", error="GroupClosedError")
    case.wait_for("status", status=499)
    case.wait_for("app returned")


@pytest.mark.parametrize(("variant", "method"), [("keep", "get"), ("always", "post")])
def test_cancel_handler_decides_for_every_method(case: Case, variant: str, method: str) -> None:
    """`cancel_handler=False` spares the handler of a GET, `True` cancels that of a POST."""
    with case.server.connect() as client:
        getattr(client, method)(case.path(f"{variant}/wait"))
        case.wait_for_start()
        case.let_it_age()
    expect_group_cancelled(case)
    if variant == "keep":
        case.release()
        case.wait_for("handler returned")
    else:
        case.wait_for("handler cancelled")


@pytest.mark.parametrize("route", ["inside/wait", "outside/wait", "mounted/sub/wait"])
def test_disconnect_is_noticed_through_other_layers(case: Case, route: str) -> None:
    """With `BaseHTTPMiddleware` inside and outside, and in a mounted app, the same things are cancelled."""
    with case.server.connect() as client:
        client.get(case.path(route))
        case.wait_for_start()
        case.let_it_age()
    expect_group_cancelled(case)
    case.wait_for("handler cancelled")


def test_uncancellable_block_is_finished_before_the_handler_is_cancelled(case: Case) -> None:
    """A disconnect reaches the tasks at once, and the handler only when it leaves the block."""
    with case.server.connect() as client:
        client.get(case.path("plain/protected"))
        case.wait_for_start(tasks=1)
        case.wait_for("protected entered")
        case.let_it_age()
    expect_group_cancelled(case, "first")
    assert not case.has("handler cancelled")
    case.release()
    case.wait_for("protected returned")
    case.wait_for("handler cancelled")


def test_event_reaches_a_handler_in_a_thread(case: Case) -> None:
    """A `def` endpoint cannot be cancelled, but sees its group's cancel event."""
    with case.server.connect() as client:
        client.get(case.path("plain/thread"))
        case.wait_for("handler entered")
        case.let_it_age()
    case.wait_for("saw event")
    case.wait_for("handler returned")


@pytest.mark.parametrize("variant", ["keep", "keep-outside"])
def test_is_disconnected_still_works(case: Case, variant: str) -> None:
    """Starlette's own polling sees the disconnect that our watcher has read, behind `BaseHTTPMiddleware` too.

    Not with a `BaseHTTPMiddleware` between us and the handler: there it stays false without us as well.
    """
    with case.server.connect() as client:
        client.get(case.path(f"{variant}/polled"))
        case.wait_for_start()
        case.let_it_age()
    case.wait_for("saw disconnect")
    case.wait_for("handler returned")
    expect_group_cancelled(case)


# --- bodies -----------------------------------------------------------------------------------------


def test_client_that_leaves_during_an_upload_being_read(case: Case) -> None:
    """The handler that reads gets `ClientDisconnect`, its tasks are cancelled, nothing is logged."""
    with case.server.connect() as client:
        client.head("POST", case.path("plain/read"), content_length=1_000_000)
        client.send(bytes(10_000))
        case.wait_for_start()
        case.let_it_age()
    expect_group_cancelled(case)
    case.wait_for("handler raised", error="ClientDisconnect")


def test_client_that_leaves_during_an_unread_upload(case: Case) -> None:
    """Half a body, read by the watcher only, does not hide the disconnect behind it."""
    with case.server.connect() as client:
        client.head("POST", case.path("plain/wait"), content_length=100_000)
        client.send(bytes(10_000))
        case.wait_for_start()
        case.let_it_age()
    expect_group_cancelled(case)
    case.release()
    case.wait_for("handler returned")


@pytest.mark.parametrize("route", ["plain/read", "inside/read", "outside/read"])
def test_slow_upload_arrives_whole(case: Case, route: str) -> None:
    """A body that trickles in while the request is watched reaches the handler complete and in order."""
    parts = [bytes([number]) * 6_000 for number in range(3)]
    with case.server.connect() as client:
        client.head("POST", case.path(route), content_length=sum(map(len, parts)))
        for part in parts:
            client.send(part)
            case.let_it_age()
        status, answer = client.response()
    assert status == 200
    assert json.loads(answer)["sha256"] == hashlib.sha256(b"".join(parts)).hexdigest()
    case.wait_for("task cancelled", task="first", kind="scope_ended")


@pytest.mark.parametrize("size", [10_000, TWO_HUNDRED_KB, 1_500_000], ids=["10kB", "200kB", "1.5MB"])
def test_body_read_late_arrives_whole(case: Case, size: int) -> None:
    """The handler gets the whole body: what the watcher read, and what it left because of its limit."""
    body = bytes(range(256)) * (size // 256)
    with case.server.connect() as client:
        client.head("POST", case.path("plain/read", "late=1"), content_length=len(body))
        sent = client.send_what_fits(body)
        case.wait_for_start()
        case.let_it_age()
        case.release()
        client.send(body[sent:])
        status, answer = client.response()
    assert status == 200
    assert json.loads(answer) == {"length": len(body), "sha256": hashlib.sha256(body).hexdigest()}


def test_handler_and_watcher_never_both_wait_for_the_body(case: Case) -> None:
    """A handler that starts to read while the watcher waits for the rest of the body gets all of it."""
    first, second = bytes(range(256)) * 40, bytes(reversed(range(256))) * 40
    with case.server.connect() as client:
        client.head("POST", case.path("plain/read", "late=1"), content_length=2 * len(first))
        client.send(first)
        case.wait_for_start()
        case.let_it_age()
        case.release()
        case.let_it_age()
        for start in range(0, len(second), 2_048):
            client.send(second[start : start + 2_048])
            case.let_it_age()
        status, answer = client.response()
    assert status == 200
    assert json.loads(answer)["sha256"] == hashlib.sha256(first + second).hexdigest()


def test_unread_body_does_not_keep_the_client_from_its_answer(case: Case) -> None:
    """A POST of 200 kB that the handler never reads gets its answer."""
    with case.server.connect() as client:
        client.post(case.path("plain/wait"), bytes(TWO_HUNDRED_KB))
        case.wait_for_start()
        case.let_it_age()
        case.release()
        assert client.response() == (200, json.dumps({"key": case.key}, separators=(",", ":")).encode())
    case.wait_for("handler returned")
    assert not case.has("task cancelled", kind="client_disconnect")


def test_client_that_leaves_after_an_unread_body_is_noticed(case: Case) -> None:
    """A POST of 200 kB that the handler never reads does not hide the disconnect behind it."""
    with case.server.connect() as client:
        client.post(case.path("plain/wait"), bytes(TWO_HUNDRED_KB))
        case.wait_for_start()
        case.let_it_age()
    expect_group_cancelled(case)
    case.release()
    case.wait_for("handler returned")


def test_large_upload_to_an_idle_handler_stays_with_the_client(case: Case) -> None:
    """Little of an unread 60 MB body is taken into memory: the server's backpressure holds."""
    body = memoryview(bytes(60_000_000))
    before = case.server.state()["rss"]
    with case.server.connect() as client:
        client.head("POST", case.path("plain/wait"), content_length=len(body))
        taken = client.send_what_fits(body)
        case.wait_for_start()
        case.let_it_age()
        taken += client.send_what_fits(body[taken:])
        grown = case.server.state()["rss"] - before
        # Most of the data is in the kernel's socket buffers, on both sides.
        assert taken < len(body) // 2, taken
        assert grown < 4_000_000, grown
        case.release()
        case.wait_for("handler returned")
    if case.server.kind.hangs_with_large_uploads:
        case.calls_may_hang = True
        case.server.tasks_lost += 3


# --- responses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["plain/stream", "inside/stream", "outside/stream"])
@pytest.mark.parametrize("manner", ["chatty", "quiet"])
def test_client_that_leaves_during_a_stream_stops_it(case: Case, route: str, manner: str) -> None:
    """A stream that keeps sending and one that waits both end with their tasks when the client leaves."""
    with case.server.connect() as client:
        client.get(case.path(route, "quiet=1" if manner == "quiet" else ""))
        client.read_until(b"first\n")
        case.wait_for_start()
        case.let_it_age()
    expect_group_cancelled(case)
    if manner == "quiet":
        case.wait_for_any("stream cancelled", "stream raised")
    # A generator whose chunk was being sent is merely dropped, as it is without us, and ends when collected.
    case.wait_for("app returned")


def test_whole_stream_arrives_when_the_client_stays(case: Case) -> None:
    """A watched stream reaches a client that stays, to its last chunk."""
    with case.server.connect() as client:
        client.get(case.path("plain/stream"))
        case.wait_for_start()
        case.let_it_age()
        case.release()
        status, body = client.response()
    assert status == 200
    assert body.startswith(b"first\n")
    assert body.endswith(b"last\n")
    case.wait_for("stream returned")
    assert not case.has("task cancelled", kind="client_disconnect")


@pytest.mark.parametrize(
    ("route", "leave"),
    [
        ("plain/background", "close"),
        ("plain/background", "reset"),
        ("plain/background", "half_close"),
        ("inside/background", "close"),
        ("outside/background", "close"),
    ],
)
def test_client_that_leaves_after_the_response_cancels_nothing(case: Case, route: str, leave: str) -> None:
    """After a complete response the background task runs on; the group's tasks end with the request."""
    with case.server.connect() as client:
        client.get(case.path(route))
        assert client.response()[0] == 200
        case.wait_for("background entered")
        case.let_it_age()
        getattr(client, leave)()
        case.nothing_is_cancelled()
        case.release()
        case.wait_for("background returned")
        case.wait_for("task cancelled", task="first", kind="scope_ended")


@pytest.mark.parametrize("leave", ["stay", "close", "reset", "half_close"])
def test_background_task_of_a_watched_request_runs_on(case: Case, leave: str) -> None:
    """The same for a request so old that it is being watched when its response is complete."""
    with case.server.connect() as client:
        client.get(case.path("plain/background", "late=1"))
        case.wait_for("task started")
        case.let_it_age()
        case.release("-answer")
        assert client.response()[0] == 200
        case.wait_for("background entered")
        if leave != "stay":
            getattr(client, leave)()
        case.nothing_is_cancelled()
        case.release()
        case.wait_for("background returned")
        case.wait_for("task cancelled", task="first", kind="scope_ended")


def test_background_task_runs_on_for_a_client_that_stays(case: Case) -> None:
    """The disconnect that servers report once a response is complete means nothing."""
    with case.server.connect() as client:
        client.get(case.path("plain/background"))
        assert client.response()[0] == 200
        case.wait_for("background entered")
        case.nothing_is_cancelled()
        case.release()
        case.wait_for("background returned")
        case.wait_for("task cancelled", task="first", kind="scope_ended")


def test_second_request_on_a_kept_connection_is_served(case: Case) -> None:
    """Our reading ahead takes nothing from the next request on the same connection."""
    with case.server.connect() as client:
        for each in (Case(case.server, f"{case.key}-{number}") for number in range(3)):
            client.post(each.path("plain/wait"), bytes(30_000))
            each.wait_for_start()
            each.let_it_age()
            each.release()
            assert client.response()[0] == 200
            each.wait_for("handler returned")
            assert not each.has("task cancelled", kind="client_disconnect")
        client.get(case.path("plain/ping"))
        assert client.response()[0] == 200


def test_disconnect_of_a_later_request_on_a_kept_connection_is_noticed(case: Case) -> None:
    """The first request's completion does not pass for the second one's."""
    with case.server.connect() as client:
        client.get(case.path("plain/ping"))
        assert client.response()[0] == 200
        client.get(case.path("plain/wait"))
        case.wait_for_start()
        case.let_it_age()
    expect_group_cancelled(case)
    case.wait_for("handler cancelled")


# --- failures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["handler", "task"])
def test_failing_handler_gets_the_same_response_with_the_middleware(case: Case, how: str) -> None:
    """The client gets its 500; the server logs the plain exception as often as without the middleware."""
    logged: dict[str, int] = {}
    case.complaints_expected = True
    for variant in ("stock", "plain"):
        each = Case(case.server, f"{case.key}-{variant}")
        with each.server.connect() as client:
            client.get(each.path(f"{variant}/fail", f"how={how}"))
            each.wait_for("task started", task="first")
            each.let_it_age()
            each.release()
            assert client.response()[0] == 500
        each.wait_for("handler raised", error="ValueError")
        complaint = f"ValueError: boom {each.key}"
        if each.server.kind.logs_failures:
            # Hypercorn logs it twice: with its own handler, and with the root logger's.
            each.wait_for_log(complaint, times=logged.get("stock", 1))
        each.wait_until_settled()
        log = each.server.log(each.log_start)
        logged[variant] = log.count(complaint)
        assert "ExceptionGroup" not in log
    assert logged["plain"] == logged["stock"]


# --- raw ASGI, WebSockets, HTTP/2 ---------------------------------------------------------------------------


def test_application_that_reads_by_itself_gets_every_message(case: Case) -> None:
    """A raw ASGI application gets the disconnect each time it reads, and is not cancelled meanwhile."""
    with case.server.connect() as client:
        client.get(case.path("raw"))
        case.wait_for_start()
        case.let_it_age()
    case.wait_for("http.disconnect")
    case.wait_for("handler returned")
    assert case.count("http.disconnect again") == 3
    expect_group_cancelled(case)


def test_application_that_reads_by_itself_gets_a_whole_body(case: Case) -> None:
    """Its chunks add up, no matter which reader got them first."""
    with case.server.connect() as client:
        client.head("POST", case.path("raw"), content_length=40_000)
        for _ in range(4):
            client.send(bytes(10_000))
            case.let_it_age()
        assert client.response()[0] == 200
    case.wait_for("handler returned")
    lengths = [event["length"] for event in case.server.events(case.key) if event["what"] == "http.request"]
    assert sum(lengths) == 40_000


@pytest.mark.parametrize("manner", ["reading", "idle"])
def test_websocket_that_is_closed_cancels_its_group(case: Case, manner: str) -> None:
    """A WebSocket's tasks end with it, and its application gets the message even if it was not reading."""
    query = "idle=1" if manner == "idle" else ""
    url = f"ws://127.0.0.1:{case.server.port}{case.path('plain/ws', query)}"
    # Some servers answer the closing frame only once the application has read of it.
    with connect(url, close_timeout=0.5) as socket:
        case.wait_for_start()
        case.let_it_age()
        if manner == "reading":
            socket.send("hello")
            assert socket.recv(timeout=10) == "echo hello"
    # Closed in order (1000), which is no disconnect, unless the server hides the code.
    expect_group_cancelled(
        case, kind="client_disconnect" if case.server.kind.hides_close_codes else "scope_ended"
    )
    case.release()
    case.wait_for("websocket.disconnect")
    case.wait_for("handler returned")


def test_websocket_whose_client_vanishes_cancels_its_group(case: Case) -> None:
    """A connection that is lost without a closing frame counts as well."""
    with connect(f"ws://127.0.0.1:{case.server.port}{case.path('plain/ws')}") as socket:
        case.wait_for_start()
        case.let_it_age()
        socket.socket.shutdown(2)
    expect_group_cancelled(case)
    case.wait_for("websocket.disconnect")
    case.wait_for("handler returned")


def test_http2_stream_reset_leaves_its_siblings_alone(case: Case) -> None:
    """The reset of one stream cancels that request and no other on the connection."""
    if not case.server.kind.http2:
        pytest.skip(f"{case.server.kind.name} does not speak HTTP/2 without TLS")
    left, right = Case(case.server, f"{case.key}-left"), Case(case.server, f"{case.key}-right")
    with Http2Client(case.server.port) as client:
        leaving, staying = client.get(left.path("plain/wait")), client.get(right.path("plain/wait"))
        left.wait_for_start()
        right.wait_for_start()
        left.let_it_age()
        client.reset(leaving)
        expect_group_cancelled(left)
        left.wait_for("handler cancelled")
        right.nothing_is_cancelled()
        right.release()
        assert client.status(staying) == 200
    right.wait_for("handler returned")
    left.release()


def test_http2_connection_that_ends_cancels_all_of_its_requests(case: Case) -> None:
    """A lost connection takes each of its streams with it."""
    if not case.server.kind.http2:
        pytest.skip(f"{case.server.kind.name} does not speak HTTP/2 without TLS")
    left, right = Case(case.server, f"{case.key}-left"), Case(case.server, f"{case.key}-right")
    with Http2Client(case.server.port) as client:
        client.get(left.path("plain/wait"))
        client.get(right.path("plain/wait"))
        left.wait_for_start()
        right.wait_for_start()
        left.let_it_age()
    for each in (left, right):
        expect_group_cancelled(each)
        each.wait_for("handler cancelled")
        each.release()
