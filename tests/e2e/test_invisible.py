"""Disconnects that no middleware can see, as docs/limitations.md lists them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .servers import Case

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]

# The others tell the application only of the request they have read last.
SEE_PIPELINED = {"uvicorn-h11", "gunicorn"}


@pytest.mark.parametrize("leave", ["close", "reset"])
def test_disconnect_of_a_pipelined_request_is_invisible_on_most_servers(case: Case, leave: str) -> None:
    """A client that has already sent its next request leaves: most servers do not report it."""
    # uvloop refuses what uvicorn sends to the client that it has not noticed leaving.
    case.complaints_expected = case.server.kind.name == "uvicorn-httptools"
    with case.server.connect() as client:
        client.send(b"".join(head(case.path(route)) for route in ("plain/wait", "plain/wait")))
        case.wait_for_start()
        case.let_it_age()
        getattr(client, leave)()
        if case.server.kind.name in SEE_PIPELINED:
            case.wait_for("task cancelled", task="first", kind="client_disconnect")
        else:
            case.nothing_is_cancelled()


def head(path: str) -> bytes:
    """A request without a body."""
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
