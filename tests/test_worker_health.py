"""The responses of `examples/worker/health.py`; see `tests/e2e/test_worker.py` for its connections."""

from __future__ import annotations

import re

import pytest

from examples.worker.health import respond

CHECKS = {"/livez": lambda: "", "/readyz": lambda: "rates gave up"}


def answer(request: str) -> tuple[int, dict[str, str], str]:
    """The status, header, and body of the response; the text of a request has no carriage returns."""
    head = request.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n"
    lines, _, body = respond(head, CHECKS).decode().partition("\r\n\r\n")
    status_line, *fields = lines.split("\r\n")
    (status,) = re.findall(r"HTTP/1\.1 (\d{3}) [A-Z][\w ]+", status_line)
    return int(status), dict(field.split(": ", 1) for field in fields), body


@pytest.mark.parametrize(
    "request_line",
    [
        "GET /livez HTTP/1.1",
        "GET /livez?verbose=1 HTTP/1.1",
        "GET http://pod:8080/livez HTTP/1.1",
        "GET /livez HTTP/1.7",
    ],
)
def test_check_without_complaint_is_200(request_line: str) -> None:
    """A query, the form for proxies, and a later minor version change nothing."""
    status, header, body = answer(f"{request_line}\nHost: pod:8080\nUser-Agent: kube-probe/1.34")
    assert (status, body) == (200, "ok\n")
    assert header["Content-Length"] == "3"
    assert header["Connection"] == "close"
    assert header["Date"].endswith(" GMT")


def test_check_with_complaint_is_503_and_says_why() -> None:
    """The body is what `kubectl describe pod` shows."""
    status, header, body = answer("GET /readyz HTTP/1.1\nHost: pod")
    assert (status, body) == (503, "rates gave up\n")
    assert header["Content-Length"] == "14"


def test_head_gets_the_header_alone() -> None:
    """It has the length of the body that GET would get."""
    status, header, body = answer("HEAD /readyz HTTP/1.1\nHost: pod")
    assert (status, header["Content-Length"], body) == (503, "14", "")


def test_http_1_0_needs_no_host() -> None:
    """Older load balancers probe with it."""
    assert answer("GET /livez HTTP/1.0")[0] == 200


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        ("GET /metrics HTTP/1.1\nHost: pod", 404),
        ("GET http://[ HTTP/1.1\nHost: pod", 404),
        ("OPTIONS * HTTP/1.1\nHost: pod", 404),
        ("POST /livez HTTP/1.1\nHost: pod\nContent-Length: 5", 405),
        ("GET /livez HTTP/2.0\nHost: pod", 505),
        ("GET /livez HTTP/1.1", 400),
        ("GET /livez HTTP/1.1\nHost: pod\nHost: other", 400),
        ("GET /livez HTTP/1.0\nHost: pod\nHost: other", 400),
        ("GET /livez", 400),
        ("GET  /livez HTTP/1.1\nHost: pod", 400),
        ("GET /livez HTTP/1.1\nHost : pod", 400),
        ("GET /livez HTTP/1.1\nHost: pod\n folded: line", 400),
        ("\x16\x03\x01\x02", 400),
        ("", 400),
    ],
)
def test_bad_requests_are_refused(request_text: str, status: int) -> None:
    """Each gets the status that RFC 9110 and RFC 9112 name."""
    assert answer(request_text)[0] == status


def test_refused_method_names_those_that_are_allowed() -> None:
    """A 405 must have an Allow field."""
    assert answer("DELETE /livez HTTP/1.1\nHost: pod")[1]["Allow"] == "GET, HEAD"
