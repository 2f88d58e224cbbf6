"""`make_lifespan(request_grace=...)` on real servers: requests that would hold the stop up end, quietly."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from .servers import DEADLINE, Kind, Pool, Server, eventually

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]

ALL = ("short", "slow", "post", "thread", "stream", "quiet", "events", "starlette-events", "background")


def _uvicorn(*options: str) -> Callable[[int], list[str]]:
    return lambda port: [
        *("uvicorn", "stopping_app:app", "--port", str(port), "--no-access-log", "--no-use-colors"),
        *options,
    ]


def _hypercorn(*options: str) -> Callable[[int], list[str]]:
    # Its graceful timeout, 3 s, would end the requests first.
    address = "127.0.0.1:{}"
    return lambda port: [
        *("hypercorn", "stopping_app:app", "-b", address.format(port), "--graceful-timeout", "30"),
        *options,
    ]


def _granian(*options: str) -> Callable[[int], list[str]]:
    return lambda port: [
        *("granian", "stopping_app:app", "--interface", "asgi", "--port", str(port)),
        *options,
    ]


def _gunicorn(worker: str) -> Callable[[int], list[str]]:
    address = "127.0.0.1:{}"
    return lambda port: [
        *("gunicorn", "stopping_app:app", "-k", worker, "-b", address.format(port), "--no-control-socket"),
    ]


KINDS = (
    Kind("uvicorn-uvloop", _uvicorn("--loop", "uvloop", "--http", "httptools")),
    Kind("uvicorn-asyncio", _uvicorn("--loop", "asyncio", "--http", "h11")),
    Kind("uvicorn-workers", _uvicorn("--workers", "2")),
    Kind("hypercorn", _hypercorn()),
    Kind("hypercorn-alone", _hypercorn("-w", "0")),
    Kind("granian", _granian()),
    Kind("granian-asyncio", _granian("--loop", "asyncio")),
    Kind("gunicorn", _gunicorn("asgi")),
    Kind("gunicorn-uvicorn", _gunicorn("uvicorn.workers.UvicornWorker")),
)

OWN_NOISE = ("Error while closing socket", "ResourceWarning: ")
"""What gunicorn with uvicorn's worker, and the parent of uvicorn's workers, log at each stop."""

CLOSE_CODES = {"granian": None, "granian-asyncio": None}
"""What the client of a WebSocket gets; granian closes it at the signal, and without a code."""


class Calls:
    """Requests that are open at the same time, each in a thread, and what their clients got."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._threads: list[threading.Thread] = []
        self._results: dict[str, object] = {}

    def open(self, *names: str) -> None:
        """Send these requests, and wait until they are being served."""
        for name in names:
            target = self._chat if name == "chat" else self._request
            thread = threading.Thread(target=target, args=(name,), daemon=True)
            thread.start()
            self._threads.append(thread)
        for name in names:
            self.wait_for(f"({name} begins)")

    def wait_for(self, text: str) -> None:
        """Wait until the server has logged `text`."""
        eventually(
            lambda: text in self._server.log(), lambda: f"no {text!r} in the log:\n{self._server.log()}"
        )

    def results(self) -> dict[str, object]:
        """What each client got: a status, and whether the response was whole."""
        for thread in self._threads:
            thread.join(DEADLINE)
        return self._results

    def _request(self, name: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=DEADLINE)
        with contextlib.closing(connection):
            try:
                connection.request("POST" if name == "post" else "GET", f"/{name}")
                response = connection.getresponse()
                response.read()
            except http.client.IncompleteRead:
                self._results[name] = "cut"
            except (http.client.HTTPException, OSError) as error:
                self._results[name] = repr(error)
            else:
                self._results[name] = response.status

    def _chat(self, name: str) -> None:
        with connect(f"ws://127.0.0.1:{self._server.port}/{name}") as socket:
            try:
                socket.recv(DEADLINE)
            except ConnectionClosed as closed:
                self._results[name] = closed.rcvd and closed.rcvd.code


def stop(server: Server, signum: int = signal.SIGTERM) -> None:
    """Send the signal to the server's main process."""
    server.process.send_signal(signum)


def exit_code(server: Server) -> int:
    """Wait until the server has ended by itself."""
    try:
        return server.process.wait(DEADLINE)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{server.kind.name} did not end:\n{server.log()}") from None


def complaints(server: Server) -> list[str]:
    """The lines of the log that tell of something wrong."""
    return [line for line in server.complaints() if not any(noise in line for noise in OWN_NOISE)]


@pytest.fixture(scope="module")
def stopping(pool: Pool) -> dict[str, Server]:
    """A server of each kind, started at the same time, to save some."""
    return {kind.name: pool.start(kind) for kind in KINDS}


def kind_named(name: str) -> Kind:
    """One of the kinds above."""
    return next(kind for kind in KINDS if kind.name == name)


def started(pool: Pool, kind: Kind) -> Server:
    """A server that is ready."""
    server = pool.start(kind)
    server.wait_until_ready()
    return server


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the requests of a server that is started from here on an hour."""
    monkeypatch.setenv("REQUEST_GRACE", "3600")


@pytest.mark.parametrize("name", [kind.name for kind in KINDS])
def test_open_requests_end_after_the_grace(stopping: dict[str, Server], name: str) -> None:
    """Each kind of request ends as its client expects, then the server does, and nothing complains."""
    server = stopping[name]
    server.wait_until_ready()
    calls = Calls(server)
    calls.open(*ALL, "chat")
    stop(server)
    results = calls.results()
    assert exit_code(server) in (0, -signal.SIGTERM)
    assert results == {
        "short": 200,
        "slow": 503,
        "post": 503,
        "thread": 503,
        "stream": 200,
        "quiet": 200,
        "events": 200,
        "starlette-events": 200,
        "background": 200,
        "chat": CLOSE_CODES.get(name, 1012),
    }
    log = server.log()
    for each in ("slow", "post", "quiet", "background"):
        assert f"({each} cancelled)" in log, log
    for each in (*ALL, "chat"):
        assert f"({each} ends)" in log, log
    assert complaints(server) == [], log


@pytest.mark.usefixtures("endless")
@pytest.mark.parametrize("name", ["uvicorn-uvloop", "hypercorn", "granian", "gunicorn"])
def test_server_without_open_requests_stops_at_once(pool: Pool, name: str) -> None:
    """The grace is a bound, and no delay."""
    server = started(pool, kind_named(name))
    stop(server)
    assert exit_code(server) in (0, -signal.SIGTERM)
    assert complaints(server) == [], server.log()


@pytest.mark.parametrize("name", ["uvicorn-asyncio", "uvicorn-workers", "hypercorn", "granian"])
def test_control_c_gives_the_grace_too(pool: Pool, name: str) -> None:
    """A terminal sends SIGINT to all processes of the server; gunicorn's worker would end at once."""
    server = started(pool, kind_named(name))
    calls = Calls(server)
    calls.open("short", "slow", "stream")
    os.killpg(server.process.pid, signal.SIGINT)
    assert calls.results() == {"short": 200, "slow": 503, "stream": 200}
    assert exit_code(server) in (0, -signal.SIGINT)
    assert complaints(server) == [], server.log()


@pytest.mark.skipif(
    shutil.which("curl") is None, reason="h2 takes no frame after the server's GOAWAY; curl does"
)
@pytest.mark.parametrize(
    ("name", "paths"),
    [
        # hypercorn 0.18 sends no end of a stream that ends after the signal, with us and without.
        ("hypercorn", ("short", "slow", "background")),
        ("granian", ("short", "slow", "background", "stream", "quiet")),
    ],
)
def test_streams_of_http2_end_too(pool: Pool, name: str, paths: tuple[str, ...]) -> None:
    """Each of them is answered, although the server has announced the end of its connection."""
    server = started(pool, kind_named(name))
    clients = {path: curl(f"http://127.0.0.1:{server.port}/{path}") for path in paths}
    calls = Calls(server)
    for path in paths:
        calls.wait_for(f"({path} begins)")
    stop(server)
    results = {path: client.communicate(timeout=DEADLINE)[0] for path, client in clients.items()}
    assert results == {path: "2 503 0" if path == "slow" else "2 200 0" for path in paths}
    assert exit_code(server) == 0
    assert complaints(server) == [], server.log()


def curl(url: str) -> subprocess.Popen[str]:
    """A client that speaks HTTP/2; it prints the version, the status, and its own exit code."""
    options = ["-sN", "-m", str(DEADLINE), "-o", os.devnull, "--http2-prior-knowledge"]
    report = "%{http_version} %{http_code} %{exitcode}"
    return subprocess.Popen(["curl", *options, "-w", report, url], stdout=subprocess.PIPE, text=True)


@pytest.mark.usefixtures("endless")
def test_second_control_c_forces_the_exit(pool: Pool) -> None:
    """As uvicorn does without us."""
    server = started(pool, kind_named("uvicorn-uvloop"))
    calls = Calls(server)
    calls.open("slow", "stream")
    stop(server, signal.SIGINT)
    calls.wait_for("Waiting for connections to close")
    stop(server, signal.SIGINT)
    exit_code(server)


@pytest.mark.usefixtures("endless")
def test_servers_own_bound_wins(pool: Pool) -> None:
    """A shorter `--timeout-graceful-shutdown` ends the requests uvicorn's way."""
    kind = Kind("uvicorn-bounded", _uvicorn("--timeout-graceful-shutdown", "1"))
    server = started(pool, kind)
    calls = Calls(server)
    calls.open("slow", "quiet")
    stop(server)
    exit_code(server)
    calls.wait_for("timeout graceful shutdown exceeded")
    for name in ("slow", "quiet"):
        assert f"({name} cancelled)" in server.log()
    assert "request_grace" not in server.log()


def test_change_of_the_code_reloads_although_a_stream_is_open(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`uvicorn --reload` waits for the process that serves, which ends after the grace."""
    monkeypatch.setenv("REQUEST_GRACE", "0.5")
    code = tmp_path / "watched"
    code.mkdir()
    (code / "changing.py").write_text("version = 1\n")
    server = started(pool, Kind("uvicorn-reload", _uvicorn("--reload", "--reload-dir", str(code))))
    before = server.state()["pid"]
    calls = Calls(server)
    calls.open("stream", "slow")
    time.sleep(0.1)
    (code / "changing.py").write_text("version = 2\n")
    assert calls.results() == {"stream": 200, "slow": 503}
    server.wait_until_ready()
    eventually(lambda: server.state()["pid"] != before, server.log)
    stop(server)
    assert exit_code(server) == 0
    assert [line for line in complaints(server) if "detected changes" not in line] == [], server.log()
