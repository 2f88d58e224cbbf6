"""What becomes of a request that is at work when its server is told to stop."""

from __future__ import annotations

import pytest
from websockets.sync.client import connect

from .servers import KINDS, Case, Kind, Pool, Server

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]


@pytest.fixture(scope="module")
def doomed(pool: Pool) -> dict[str, Server]:
    """A server of each kind that may be ended; started at the same time, to save some."""
    return {kind.name: pool.start(kind) for kind in KINDS if not kind.outlives_shutdown}


def test_stopping_the_server_is_a_shutdown_and_no_disconnect(
    kind: Kind, doomed: dict[str, Server], key: str
) -> None:
    """SIGTERM during requests cancels their tasks with cause `shutdown`, once, and then the application's."""
    if kind.outlives_shutdown:
        pytest.skip(kind.outlives_shutdown)
    server = doomed[kind.name]
    server.wait_until_ready()
    cases = {method: Case(server, f"{key}-{method}") for method in ("get", "post", "socket")}
    url = f"ws://127.0.0.1:{server.port}{cases['socket'].path('plain/ws')}"
    with server.connect() as one, server.connect() as two, connect(url, close_timeout=0.5):
        one.get(cases["get"].path("plain/wait"))
        two.post(cases["post"].path("plain/wait"))
        for case in cases.values():
            case.wait_for_start()
            case.let_it_age()
        server.terminate()
        for case in cases.values():
            expect_shutdown(case)


def expect_shutdown(case: Case) -> None:
    """Every task of the request and of the application ended by the shutdown, once, and by nothing else."""
    for task in ("first", "second", "outbox"):
        case.wait_for("task cancelled", task=task)
        assert case.count("task cancelled", task=task) == 1, case.story()
        assert case.has("task cancelled", task=task, kind="shutdown"), case.story()
