"""The cost of the middleware per request, on uvicorn's own protocol with a transport that discards all data.

So nothing is measured but uvicorn, the application and what stands between them. Where ``wrk`` is installed,
also requests per second over loopback: that is wall time, with a client that competes for the CPU.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from benchmarks import apps
from benchmarks.apps import make_app
from benchmarks.measure import Effort, Table, cpu_clock, tabulate, take_turns
from benchmarks.names import NONE, SIDES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.measure import Side

COUNT = 200
IN_FLIGHT = 1_000
# How often a server that waits for its end looks (uvicorn).
TICK = 0.1
BODY = b'{"item": "lamp", "count": 2}'
GET = b"GET /hello/you HTTP/1.1\r\nhost: localhost\r\n\r\n"
POST = (
    b"POST /orders HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: "
    + str(len(BODY)).encode()
    + b"\r\n\r\n"
    + BODY
)
STREAM = b"GET /stream HTTP/1.1\r\nhost: localhost\r\n\r\n"
WAIT = b"GET /wait HTTP/1.1\r\nhost: localhost\r\n\r\n"


class Kind(NamedTuple):
    """What is requested, and how often in each turn."""

    title: str
    app: str
    request: bytes
    times: int = COUNT


KINDS = {
    "raw": Kind("raw ASGI application that does not suspend", "raw", GET),
    "raw-suspending": Kind("raw ASGI application that suspends once", "raw-suspending", GET),
    "fastapi-get": Kind("FastAPI, GET", "fastapi", GET),
    "fastapi-post": Kind("FastAPI, POST with a body", "fastapi", POST),
    "fastapi-stream": Kind("FastAPI, a stream of 200 chunks", "fastapi", STREAM, COUNT // 10),
}


def run(effort: Effort) -> list[Table]:
    """Measure CPU time for each kind of application, then throughput."""
    part = replace(effort, seconds=effort.seconds * 0.14)
    tables = [asyncio.run(_measure(kind, part)) for kind in KINDS]
    tables.append(asyncio.run(_measure_in_flight(part)))
    if shutil.which("wrk") is not None:
        tables.append(_throughput(effort.less(0.16)))
    return tables


async def _measure(kind: str, effort: Effort) -> Table:
    what = KINDS[kind]
    sides = {side: _one_by_one(make_app(what.app, side), what) for side in SIDES}
    table = Table(f"middleware-{kind}", f"A request: {what.title}", "µs per request", NONE, 0)
    return tabulate(table, await _take_turns(sides, effort))


async def _measure_in_flight(effort: Effort) -> Table:
    sides = {side: _at_once(make_app("fastapi", side)) for side in SIDES}
    table = Table(
        "middleware-in-flight",
        f"A request: FastAPI, GET that waits for {1000 * apps.WAIT:.0f} ms, {IN_FLIGHT:,} in flight",
        "µs per request",
        NONE,
        0,
    )
    return tabulate(table, await _take_turns(sides, effort))


async def _take_turns(sides: dict[str, Side], effort: Effort) -> dict[str, list[float]]:
    """Measure beside the timer of uvicorn's main loop.

    As in production, it is the first one in the loop's queue, which keeps cancelled timers behind it, such as
    uvicorn's for idle connections, with their contexts. Without it, they are freed at once.
    """
    ticks = asyncio.create_task(_tick())
    try:
        return await take_turns(sides, effort)
    finally:
        ticks.cancel()


async def _tick() -> None:
    while True:  # noqa: ASYNC110  # as uvicorn does
        await asyncio.sleep(TICK)


def _one_by_one(app: Any, kind: Kind) -> Side:
    async def side() -> float:
        protocol = _connected(_config(app))
        begin = cpu_clock()
        for _ in range(kind.times):
            protocol.data_received(kind.request)
            while not protocol.cycle.response_complete:  # noqa: ASYNC110  # to be told would cost more
                await asyncio.sleep(0)
        took = (cpu_clock() - begin) / kind.times
        protocol.connection_lost(None)
        # The application needs a moment to notice that.
        await asyncio.sleep(0.01)
        return took

    return side


def _at_once(app: Any) -> Side:
    async def side() -> float:
        config = _config(app)
        protocols = [_connected(config) for _ in range(IN_FLIGHT)]
        begin = cpu_clock()
        for protocol in protocols:
            protocol.data_received(WAIT)
        for protocol in protocols:
            while not protocol.cycle.response_complete:  # noqa: ASYNC110  # to be told would cost more
                await asyncio.sleep(0.01)
        took = (cpu_clock() - begin) / IN_FLIGHT
        for protocol in protocols:
            protocol.connection_lost(None)
        await asyncio.sleep(0.01)
        return took

    return side


class Nowhere(asyncio.Transport):
    """A transport that takes everything and sends nothing."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Addresses, as uvicorn asks for them."""
        return {"sockname": ("127.0.0.1", 8000), "peername": ("127.0.0.1", 54321)}.get(name, default)

    def write(self, data: Any) -> None:
        """Drop it."""

    def is_closing(self) -> bool:
        """Stays open."""
        return False

    def close(self) -> None:
        """Nothing to close."""

    def pause_reading(self) -> None:
        """Nothing is read."""

    def resume_reading(self) -> None:
        """Nothing is read."""


def _config(app: Any) -> Config:
    config = Config(app=app, http=HttpToolsProtocol, lifespan="off", access_log=False, log_config=None)
    config.load()
    return config


def _connected(config: Config) -> Any:
    protocol = HttpToolsProtocol(config=config, server_state=ServerState(), app_state={})
    protocol.connection_made(Nowhere())
    return protocol


# Over loopback.


def _throughput(effort: Effort) -> Table:
    table = Table(
        "middleware-wrk",
        "FastAPI GET over loopback, 16 connections: requests per second (wrk)",
        "requests/s",
        NONE,
        0,
        note="Wall time, and wrk runs on the same machine.",
    )
    seconds = max(1, round(effort.seconds / (len(SIDES) * 4)))
    with _servers() as ports:
        sides = {side: _wrk(port, seconds) for side, port in ports.items()}
        figures = asyncio.run(take_turns(sides, effort, collect=False))
    return tabulate(table, figures, scale=1.0)


def _wrk(port: int, seconds: int) -> Side:
    async def side() -> float:
        command = ["wrk", "-t1", "-c16", f"-d{seconds}s", f"http://127.0.0.1:{port}/hello/you"]
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout  # noqa: ASYNC221  # nothing else runs in this loop
        found = re.search(r"Requests/sec:\s*([\d.]+)", out)
        if found is None or "Non-2xx" in out:
            raise RuntimeError(f"wrk did not get its answers: {out}")
        return float(found[1])

    return side


@contextmanager
def _servers() -> Iterator[dict[str, int]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        first = probe.getsockname()[1]
    ports = {side: first + number for number, side in enumerate(SIDES)}
    processes = [serve(f"fastapi:{side}", port) for side, port in ports.items()]
    try:
        for port in ports.values():
            wait_for_port(port)
        yield ports
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(10)


def serve(app: str, port: int) -> subprocess.Popen[bytes]:
    """Start uvicorn with one of the applications."""
    command = [sys.executable, "-m", "uvicorn", "--factory", "benchmarks.apps:from_environment"]
    options = ["--port", str(port), "--no-access-log", "--log-level", "critical", "--http", "httptools"]
    return subprocess.Popen([*command, *options], env={**os.environ, "BENCH_APP": app})


def wait_for_port(port: int) -> None:
    """Wait until somebody listens there."""
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise TimeoutError(f"nobody listens on port {port}")
