"""Streams whose clients all leave, and streams whose clients do not read: on uvicorn, in wall time.

A gateway asks an upstream through httpx for each of its clients, one connection per stream. Clients, gateway,
and upstream are processes of their own; the clock is the system's monotonic one, which they share. The
gateways with and without the middleware run side by side, and take turns in each round.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.measure import Effort, Row, Spread, Table, tabulate
from benchmarks.middleware import serve, wait_for_port
from benchmarks.names import NONE, RULE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi import FastAPI

STREAMS = 200
# Seconds in which all clients leave.
LEAVING = 0.1
# Seconds between two tokens of the upstream, and until its answer is complete.
EVERY, LENGTH = 0.2, 3.0
# Without the middleware, the last kind takes as long as the answer.
ROUNDS = {"post": 20, "get": 20, "whole": 4}
TITLES = {
    "post": ("POST", "stream", "a streamed POST"),
    "get": ("GET", "stream", "a streamed GET"),
    "whole": ("POST", "whole", "a POST that awaits the whole answer"),
}

FIGURES = ("median", "p99", "last", "CPU time for each")

READERS = 100
CHUNK, CHUNKS = bytes(65_536), 1_600
# Seconds that the readers stay.
READING = 4.0

PORT = 18_431
SIDES = {NONE: f"gateway:{NONE}", RULE: f"gateway:{RULE}"}


def run(effort: Effort) -> list[Table]:
    """Measure with the middleware and without it."""
    return asyncio.run(_measure(effort))


async def _measure(effort: Effort) -> list[Table]:
    ports = dict(zip(SIDES, range(PORT + 1, PORT + 1 + len(SIDES)), strict=True))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(_process(_serve_upstream(), PORT))
        servers = {
            side: await stack.enter_async_context(_process(serve(app, ports[side]), ports[side]))
            for side, app in SIDES.items()
        }
        # First: what a server has once had, it keeps.
        tables = [await _memory(ports, servers)]
        for key in TITLES:
            tables.append(await _hang_ups(key, ports, servers, 2 if effort.quick else ROUNDS[key]))
    return tables


def _serve_upstream() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "benchmarks.streams", str(PORT)])


@asynccontextmanager
async def _process(process: subprocess.Popen[bytes], port: int) -> AsyncIterator[subprocess.Popen[bytes]]:
    try:
        await asyncio.to_thread(wait_for_port, port)
        yield process
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 20)


# Clients that leave.


async def _hang_ups(
    key: str, ports: dict[str, int], servers: dict[str, subprocess.Popen[bytes]], rounds: int
) -> Table:
    method, how, what = TITLES[key]
    figures: dict[str, list[float]] = defaultdict(list)
    sides = list(ports)
    # The first round warms up.
    for number in range(rounds + 1):
        random.shuffle(sides)
        for side in sides:
            taken, cpu = await _one_round(ports[side], servers[side].pid, method, how)
            cut = statistics.quantiles(taken, n=100, method="inclusive")
            for name, figure in zip(FIGURES, (cut[49], cut[98], max(taken), cpu / STREAMS), strict=True):
                figures[f"{side}: {name}"].extend([figure] if number else [])
    table = Table(
        f"streams-{key}",
        f"From the client's close to the upstream's: {what}, {STREAMS} clients that leave within 100 ms",
        "ms",
        "",
        rounds,
        note=f"Wall time: the median round, and the range. An answer takes {LENGTH * 1000:,.0f} ms.",
        high="rounds",
    )
    for name in (f"{side}: {name}" for side in ports for name in FIGURES):
        values = figures[name]
        table.rows.append(Row(name, Spread(statistics.median(values), min(values), max(values))))
    return table


async def _one_round(port: int, pid: int, method: str, how: str) -> tuple[list[float], float]:
    """Return the milliseconds from each client's close to its upstream's, and those of the server's CPU."""
    prefix = f"{random.getrandbits(40)}"
    keys = [f"{prefix}-{number}" for number in range(STREAMS)]
    writers = await asyncio.gather(*(_open(port, method, how, key) for key in keys))
    while len(await _ends(prefix)) < STREAMS:  # noqa: ASYNC110  # of another process
        await asyncio.sleep(0.05)
    # The middleware watches each of them by the time it leaves.
    await asyncio.sleep(0.2)
    began, cpu = asyncio.get_running_loop().time(), _cpu_time(pid)
    times = await asyncio.gather(*(_leave(writer, began) for writer in writers))
    closed = dict(zip(keys, times, strict=True))
    while None in (ends := await _ends(prefix)).values():  # noqa: ASYNC110  # of another process
        await asyncio.sleep(0.3)
    taken = [(ended - closed[key]) * 1000 for key, ended in ends.items() if ended is not None]
    return taken, (_cpu_time(pid) - cpu) * 1000


async def _open(port: int, method: str, how: str, key: str) -> asyncio.StreamWriter:
    # Spread, so that the tokens are.
    await asyncio.sleep(random.uniform(0, EVERY))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        f"{method} /v1/{how}/{key} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n".encode()
    )
    if how == "stream":
        await reader.readuntil(b"token")
    return writer


async def _leave(writer: asyncio.StreamWriter, began: float) -> float:
    await asyncio.sleep(began - asyncio.get_running_loop().time() + random.uniform(0, LEAVING))
    closed_at = time.monotonic()
    writer.transport.abort()
    return closed_at


async def _ends(prefix: str) -> dict[str, float | None]:
    """Return when each of the upstream's connections ended; None for one that is open."""
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
    writer.write(f"GET /ends/{prefix} HTTP/1.1\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    ends: dict[str, float | None] = json.loads(answer)
    return ends


def _cpu_time(pid: int) -> float:
    with open(f"/proc/{pid}/schedstat", encoding="ascii") as file:
        return int(file.read().split()[0]) / 1e9


# Clients that do not read.


async def _memory(ports: dict[str, int], servers: dict[str, subprocess.Popen[bytes]]) -> Table:
    table = Table(
        "streams-memory",
        f"Memory of {READERS} streams of 100 MB whose clients read slowly or not at all (resident size)",
        "MB",
        NONE,
        1,
        note=f"The most within {READING:.0f} s. A server that read ahead would need 10,000 MB.",
    )
    figures = {side: [await _grown(port, servers[side].pid)] for side, port in ports.items()}
    return tabulate(table, figures, scale=1.0)


async def _grown(port: int, pid: int) -> float:
    """Return the megabytes by which a server grows while it serves clients that hardly read."""
    await _read(port, 0.1, EVERY)
    before = most = _resident_size(pid)
    pauses = (None, 0.05)
    readers = [
        asyncio.create_task(_read(port, READING, pauses[number % len(pauses)])) for number in range(READERS)
    ]
    while not all(reader.done() for reader in readers):
        await asyncio.sleep(0.05)
        most = max(most, _resident_size(pid))
    await asyncio.gather(*readers)
    return (most - before) / 1e6


async def _read(port: int, seconds: float, pause: float | None) -> None:
    """Read a kilobyte after each pause, or nothing without one, into a small buffer; then leave."""
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", port))
        await loop.sock_sendall(client, b"GET /flood HTTP/1.1\r\nhost: localhost\r\n\r\n")
        until = loop.time() + seconds
        while (left := until - loop.time()) > 0:
            await asyncio.sleep(left if pause is None else pause)
            await loop.sock_recv(client, 1024)


def _resident_size(pid: int) -> int:
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# The servers.


def gateway() -> FastAPI:
    """A gateway as its users build it: one client of the upstream, whose answer the response iterates."""
    import httpx
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse

    app = FastAPI()
    upstream = httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", limits=httpx.Limits(), timeout=60)

    @app.api_route("/v1/stream/{key}", methods=["GET", "POST"])
    async def stream(key: str) -> StreamingResponse:
        async def tokens() -> AsyncIterator[bytes]:
            async with upstream.stream("POST", f"/stream/{key}") as response:
                async for part in response.aiter_raw():
                    yield part

        return StreamingResponse(tokens())

    @app.post("/v1/whole/{key}")
    async def whole(key: str) -> Any:
        return (await upstream.post(f"/whole/{key}")).json()

    @app.get("/flood")
    async def flood() -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(CHUNKS):
                yield CHUNK

        return StreamingResponse(chunks())

    return app


class Upstream(asyncio.Protocol):
    """The upstream's side of a connection: it makes tokens, and notes when it can stop."""

    # Of all connections.
    ends: ClassVar[dict[str, float | None]] = {}

    def connection_made(self, transport: Any) -> None:
        """Wait for the request."""
        self.transport: asyncio.Transport = transport
        self.key = ""
        self.timer: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        """Begin with the answer."""
        _, path, _ = data.split(b" ", 2)
        _, kind, key = path.decode().split("/")
        if kind == "ends":
            found = {name: at for name, at in self.ends.items() if name.startswith(f"{key}-")}
            self.transport.write(json.dumps(found).encode())
            self.transport.close()
            return
        self.key = key
        self.ends[key] = None
        loop = asyncio.get_running_loop()
        until = loop.time() + LENGTH
        if kind == "stream":
            self.transport.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            self.token(until)
        else:
            self.timer = loop.call_at(until, self.end, b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    def token(self, until: float) -> None:
        """Send a token, and come again."""
        loop = asyncio.get_running_loop()
        if loop.time() >= until:
            self.end(b"0\r\n\r\n")
            return
        self.transport.write(b"7\r\ntoken \n\r\n")
        self.timer = loop.call_later(EVERY, self.token, until)

    def end(self, rest: bytes) -> None:
        """Complete the answer."""
        self.transport.write(rest)
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop."""
        if self.key:
            self.ends[self.key] = time.monotonic()
        if self.timer is not None:
            self.timer.cancel()


async def _upstream(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", port, backlog=STREAMS)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_upstream(int(sys.argv[1])))
