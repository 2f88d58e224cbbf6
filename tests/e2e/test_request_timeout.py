"""A request that takes longer than its limit, on real servers: what its client gets, and what they log."""

from __future__ import annotations

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from .clients import Http2Client
from .servers import Case
from .test_servers import expect_group_cancelled
from .test_telemetry import STACKS, children_reach, named, status_of, trace_of

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("variant", ["plain", "inside", "outside"])
def test_client_gets_a_504_and_may_use_its_connection_again(case: Case, variant: str, method: str) -> None:
    """The work is cancelled, for a POST too; nothing is logged, with BaseHTTPMiddleware or without."""
    with case.server.connect() as client:
        (client.get if method == "GET" else client.post)(case.path(f"{variant}/wait", "limit"))
        assert client.response() == (504, b"Gateway Timeout")
        expect_group_cancelled(case, kind="timeout")
        case.wait_for("handler cancelled")
        case.wait_for("status", status=504)
        client.get(case.path("plain/ping"))
        assert client.response()[0] == 200


def test_client_that_does_not_send_its_body_gets_a_504(case: Case) -> None:
    """The handler waits in receive()."""
    with case.server.connect() as client:
        client.head("POST", case.path("plain/read", "limit"), content_length=10)
        assert client.response() == (504, b"Gateway Timeout")
        expect_group_cancelled(case, kind="timeout")


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_started_stream_stays_incomplete(case: Case, method: str) -> None:
    """The server closes the connection without the last chunk; uvicorn and gunicorn log that as an error."""
    case.complaints_expected = True
    with case.server.connect() as client:
        (client.get if method == "GET" else client.post)(case.path("plain/stream", "limit"))
        client.read_until(b"first\n")
        with pytest.raises(AssertionError, match="the connection ended"):
            client.read_until(b"\r\n0\r\n")
    case.wait_for_any("stream cancelled", "stream raised")
    logs_it = case.server.kind.name.startswith(("uvicorn", "gunicorn"))
    if logs_it:
        case.wait_for_log("without completing")
    else:
        case.release_all()
        case.wait_until_settled()
        assert "without completing" not in case.server.log(case.log_start)


def test_http2_request_gets_a_504_and_others_go_on(case: Case) -> None:
    """Only its stream ends."""
    if not case.server.kind.http2:
        pytest.skip(f"{case.server.kind.name} does not speak HTTP/2 without TLS")
    left, right = Case(case.server, f"{case.key}-left"), Case(case.server, f"{case.key}-right")
    with Http2Client(case.server.port) as client:
        bounded, other = client.get(left.path("plain/wait", "limit")), client.get(right.path("plain/wait"))
        assert client.status(bounded) == 504
        expect_group_cancelled(left, kind="timeout")
        right.nothing_is_cancelled()
        right.release()
        assert client.status(other) == 200
    left.release()


def test_websocket_is_closed_with_1011(case: Case) -> None:
    """A function of the scope bounds it, and its handler is cancelled."""
    with connect(f"ws://127.0.0.1:{case.server.port}{case.path('plain/socket/wait', 'limit')}") as socket:
        case.wait_for("handler entered")
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=30)
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1011, "request timeout")
    case.wait_for("task cancelled", kind="timeout")


@pytest.mark.parametrize("stack", STACKS)
def test_trace_says_timeout(case: Case, stack: str) -> None:
    """The server span has the 504 and the outcome; the spans of the tasks are cancelled and linked to it."""
    with case.server.connect() as client:
        client.post(case.path(f"{stack}/wait", "limit"))
        assert client.response()[0] == 504
    server, spans = trace_of(case, stack)
    assert status_of(server) == 504
    assert server["status"] == "ERROR", server
    assert server["attributes"]["otel_tasks.request.outcome"] == "timeout"
    assert server["attributes"]["otel_tasks.request.handler"] == "cancelled"
    assert server["attributes"]["otel_tasks.cancel.count"] == 2
    assert children_reach(spans, server)
    for name in ("first", "second"):
        assert named(spans, name)["attributes"]["otel_tasks.cancel.reason"] == "timeout"
