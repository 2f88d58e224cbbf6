"""The live view on real servers: streams, viewers that leave, restarts, slow readers, the server's stop."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.nginx import nginx_command
from tests.processes import free_port

from .servers import DEADLINE, Kind, Pool, Server, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]


def _uvicorn(*options: str) -> Callable[[int], list[str]]:
    return lambda port: ["uvicorn", "live_app:app", "--port", str(port), "--no-use-colors", *options]


def _hypercorn(port: int) -> list[str]:
    return ["hypercorn", "live_app:app", "-b", f"127.0.0.1:{port}", "-w", "0"]


def _granian(port: int) -> list[str]:
    return ["granian", "live_app:app", "--interface", "asgi", "--port", str(port)]


def _gunicorn(port: int) -> list[str]:
    return ["gunicorn", "live_app:app", "-k", "asgi", "-b", f"127.0.0.1:{port}", "--no-control-socket"]


KINDS = (
    Kind("uvicorn-uvloop", _uvicorn("--loop", "uvloop", "--http", "httptools")),
    Kind("uvicorn-asyncio", _uvicorn("--loop", "asyncio", "--http", "h11")),
    Kind("hypercorn", _hypercorn),
    Kind("granian", _granian),
    Kind("gunicorn", _gunicorn),
)

NOISE = ("sync_mail", "ResourceWarning", "Error while closing socket")
"""The demo's own stuck task, and gunicorn's own warnings."""


class Viewer:
    """A client of the stream, which reads one event at a time."""

    def __init__(self, port: int, query: str = "", prefix: str = "/tasks") -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
        self._connection.request("GET", f"{prefix}/v1/events{query}")
        self._response = self._connection.getresponse()
        assert self._response.status == 200, self._response.read()

    def next(self) -> tuple[str, Any]:
        """The next event; an empty name at the end of the stream."""
        fields: dict[str, str] = {}
        while line := self._response.readline().decode():
            name, _, value = line.rstrip("\n").partition(": ")
            if name:
                fields[name] = value
            elif "event" in fields:
                return fields["event"], json.loads(fields["data"])
        return "", None

    def until(self, kind: str) -> Any:
        """The data of the next event of this kind."""
        while True:
            name, data = self.next()
            assert name, f"the stream ended without {kind}"
            if name == kind:
                return data

    def close(self) -> None:
        """Leave."""
        self._response.close()
        self._connection.close()


@contextlib.contextmanager
def viewer(server: Server, query: str = "") -> Iterator[Viewer]:
    """A viewer that leaves at the end of the block."""
    found = Viewer(server.port, query)
    try:
        yield found
    finally:
        found.close()


def request(port: int, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """The status and the JSON of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    with contextlib.closing(connection):
        headers = {"content-type": "application/json", "authorization": "Bearer test"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def complaints(server: Server) -> list[str]:
    """The lines of the log that tell of something wrong."""
    return [line for line in server.complaints() if not any(noise in line for noise in NOISE)]


def started(pool: Pool, kind: Kind) -> Server:
    """A server that is ready."""
    server = pool.start(kind)
    server.wait_until_ready()
    return server


@pytest.fixture(scope="module")
def served(pool: Pool) -> dict[str, Server]:
    """A server of each kind."""
    return {kind.name: pool.start(kind) for kind in KINDS}


@pytest.mark.parametrize("name", [kind.name for kind in KINDS])
def test_viewers_see_work_and_the_stop(served: dict[str, Server], name: str) -> None:
    """Two viewers follow it, one leaves, a task is cancelled, and the stream does not hold the stop up."""
    server = served[name]
    server.wait_until_ready()
    with viewer(server, "?viewer=one&expand=oldest:5") as one:
        snapshot = one.until("snapshot")
        assert snapshot["stats"]["live"] == 31
        assert len(one.until("rows")["set"]) == 5
        with viewer(server, "?viewer=two") as two:
            assert two.until("snapshot")["instance"] == snapshot["instance"]
            base = two.until("delta")
            assert two.until("delta")["base"] == base["id"]
        # The other one goes on; its own requests are no work.
        _, answer = request(server.port, "GET", "/tasks/v1/tasks?q=sync_mail")
        (row,) = answer["rows"]
        _, answer = request(server.port, "POST", f"/tasks/v1/tasks/{row['id']}/cancel", {"reason": "test"})
        assert answer["result"] in ("cancelled", "ended"), answer
        eventually(lambda: one.until("delta")["stats"]["live"] == 30, server.log)
        server.process.send_signal(signal.SIGTERM)
        assert one.until("bye") == {"v": 1, "reason": "shutdown"}
        assert one.next() == ("", None)
    # The stream would have lasted up to 25 s, and the server as long.
    server.process.wait(12.0)
    assert complaints(server) == [], server.log()


def test_feed_rests_without_viewers(pool: Pool) -> None:
    """A few seconds after the last viewer has left, nothing of the view runs."""
    server = started(pool, KINDS[0])
    with viewer(server) as one:
        one.until("delta")
        assert "otel_tasks.live" in server.state()["asyncio"]
    eventually(lambda: "otel_tasks.live" not in server.state()["asyncio"], server.log)
    server.terminate()
    server.process.wait(DEADLINE)


def test_stream_continues_and_notices_a_restart(pool: Pool) -> None:
    """A stream of another process's id gets resync, and a stream lives longer than a request may."""
    first, second = pool.start(KINDS[0]), pool.start(KINDS[1])
    for server in (first, second):
        server.wait_until_ready()
    with viewer(first) as one:
        last = one.until("snapshot")
        # The application's request_timeout is 5 s.
        for _ in range(7):
            last = one.until("delta")
    with viewer(first, f"?after={last['id']}") as one:
        name, data = one.next()
        assert (name, data["base"]) == ("delta", last["id"])
    with viewer(second, f"?after={last['id']}") as one:
        assert one.next() == ("resync", {"v": 1, "reason": "restart"})
        assert one.next()[0] == "snapshot"
    for server in (first, second):
        assert complaints(server) == [], server.log()
        server.terminate()
        server.process.wait(DEADLINE)


def test_reader_that_stops_reading_holds_nothing_up(pool: Pool) -> None:
    """Other viewers are served, and the server ends."""
    server = started(pool, KINDS[0])
    with socket.create_connection(("127.0.0.1", server.port)) as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        stalled.sendall(b"GET /tasks/v1/events?viewer=stalled HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with viewer(server) as one:
            for _ in range(3):
                one.until("delta")
        server.terminate()
        server.process.wait(DEADLINE)


SERVER = """
    server {{
        listen 127.0.0.1:{port};
        location /internal/ {{ proxy_pass http://127.0.0.1:{upstream}/; proxy_http_version 1.1; }}
        location /default/ {{ proxy_pass http://127.0.0.1:{upstream}/; proxy_http_version 1.0; }}
    }}
"""


def test_view_behind_nginx(pool: Pool, tmp_path: Path) -> None:
    """Below a prefix that the application does not know, each event comes at once."""
    server = started(pool, KINDS[0])
    port = free_port()
    command = nginx_command(tmp_path, SERVER.format(port=port, upstream=server.port))
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: _listens(port), lambda: "nginx did not start")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
        with contextlib.closing(connection):
            connection.request("GET", "/internal/tasks")
            response = connection.getresponse()
            response.read()
            assert (response.status, response.headers["location"]) == (307, "./tasks/")
            # As it came until 1.29.7: all clients look local, and the view has no authentication.
            connection.request("GET", "/default/tasks/")
            response = connection.getresponse()
            assert (response.status, b"forbidden_client" in response.read()) == (403, True)
        one = Viewer(port, prefix="/internal/tasks")
        begun = time.monotonic()
        one.until("snapshot")
        one.until("delta")
        # Buffered, it would come with the end of the stream.
        assert time.monotonic() - begun < 10.0
        one.close()
        eventually(lambda: "otel_tasks.live" not in server.state()["asyncio"], server.log)
    finally:
        process.terminate()
        process.wait(DEADLINE)
    server.terminate()
    server.process.wait(DEADLINE)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
