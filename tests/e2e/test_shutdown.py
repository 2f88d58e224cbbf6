"""What becomes of a request that is at work when its server is told to stop."""

from __future__ import annotations

import pytest

from .servers import Case, Kind, Pool

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]


@pytest.mark.parametrize("method", ["get", "post"])
def test_stopping_the_server_is_a_shutdown_and_no_disconnect(kind: Kind, pool: Pool, key: str, method: str) -> None:
    """SIGTERM during a request cancels its tasks with cause `shutdown`, and the server comes to its end."""
    if kind.outlives_shutdown:
        pytest.skip(kind.outlives_shutdown)
    server = pool.start(kind)
    server.wait_until_ready()
    case = Case(server, key)
    with server.connect() as client:
        getattr(client, method)(case.path("plain/wait"))
        case.wait_for_start()
        case.let_it_age()
        server.terminate()
        case.wait_for("task cancelled", task="first")
    for task in ("first", "second", "outbox"):
        case.wait_for("task cancelled", task=task, kind="shutdown")
        assert case.count("task cancelled", task=task) == 1, case.story()
    assert not case.has("task cancelled", kind="client_disconnect"), case.story()
