"""From the client's close to the end of the last task, on uvicorn over loopback: the one part in wall time.

Clients, load, and server are processes of their own; the clock is the system's monotonic one, which they
share. Each client sends a request whose handler waits for three tasks, and closes its socket when the request
has a certain age. The sides take turns in each round.

The load is as even as that of many clients: its connections are kept open, and its requests wait for random
times. Otherwise the load would make most of the worst figures: it would compete for the processors, and
dozens of its requests would share a turn of the loop.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.measure import Effort, Row, Spread, Table
from benchmarks.middleware import serve, wait_for_port
from benchmarks.names import LISTENER, OURS, WATCHER

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

# The ages of the requests, and the hang-ups of each age in a round. The younger ones only wait for a tick.
AGES = {0.001: 40, 0.020: 40, 0.060: 120, 0.500: 120}
# Seconds between two hang-ups.
EVERY = 0.00625
BUSY = 200


class Load(NamedTuple):
    """How a server is loaded, and how often it is measured.

    Attributes:
        key: The end of the tables' ids.
        title: The end of their titles.
        app: The application, see ``benchmarks.apps``.
        busy: Other requests in flight.
        rounds: How many.
    """

    key: str
    title: str
    app: str
    busy: int
    rounds: int


LOADS = (
    Load("idle", "idle", "probed", 0, 2),
    Load("busy", f"{BUSY} other requests in flight", "probed", BUSY, 6),
    Load("tuned", f"{BUSY} other requests in flight, gc tuned", "probed-tuned", BUSY, 6),
)
# Seconds for the last tasks to end: a young request's disconnect is noticed after two ticks.
SETTLING = 0.2
# Seconds that a request of the load takes, in sleeps.
SLEEPS, SLEEP = 10, 0.02
PORT = 18_417
WORK = b"GET /work HTTP/1.1\r\nhost: localhost\r\n\r\n"
ANSWER = b"done"
# The least that a server allows: the handler itself awaits the disconnect, and cancels asyncio's own tasks.
SIDES = {"ours": OURS, "watcher": WATCHER, "listener": LISTENER}


def run(effort: Effort) -> list[Table]:
    """Measure this library, a watcher task per request, and a handler that listens, idle and busy."""
    return asyncio.run(_measure(effort))


async def _measure(effort: Effort) -> list[Table]:
    loads = [load._replace(rounds=1) if effort.quick else load for load in LOADS]
    return [table for load in loads for table in await _tables(load)]


@asynccontextmanager
async def _server(app: str, side: str, port: int) -> AsyncIterator[None]:
    async with _process(serve(f"{app}:{side}", port)):
        await asyncio.to_thread(wait_for_port, port)
        yield


@asynccontextmanager
async def _process(process: subprocess.Popen[bytes]) -> AsyncIterator[None]:
    try:
        yield
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 20)


async def _tables(load: Load) -> list[Table]:
    ports = {key: PORT + number for number, key in enumerate(SIDES)}
    async with AsyncExitStack() as stack:
        for key, side in SIDES.items():
            await stack.enter_async_context(_server(load.app, side, ports[key]))
        taken = await _take_turns(ports, load)
    tables = []
    for key, side in SIDES.items():
        few, many = load.rounds * min(AGES.values()), load.rounds * max(AGES.values())
        table = Table(
            f"disconnect-{key}-{load.key}",
            f"From the client's close to the last task's end: {side}, {load.title}",
            "ms",
            "",
            load.rounds,
            note=f"Wall time. Median, and from 50 to 99 of 100, of {few} (young) and {many} hang-ups each.",
        )
        for age in AGES:
            cut = statistics.quantiles(taken[key, age], n=100, method="inclusive")
            table.rows.append(Row(f"{age * 1000:g} ms old", Spread(cut[49], cut[49], cut[98])))
        tables.append(table)
    return tables


async def _take_turns(ports: dict[str, int], load: Load) -> dict[tuple[str, float], list[float]]:
    taken: dict[tuple[str, float], list[float]] = defaultdict(list)
    order = list(ports)
    for _ in range(load.rounds):
        random.shuffle(order)
        for key in order:
            for age, took in await _one_round(ports[key], load.busy):
                taken[key, age].append(took)
    return taken


async def _one_round(port: int, busy: int) -> list[tuple[float, float]]:
    """Return, for each hang-up, its age, and the milliseconds until its last task has ended."""
    async with AsyncExitStack() as stack:
        if busy:
            await stack.enter_async_context(_process(_start_load(port, busy)))
            # For the load to start, and its requests to spread.
            await asyncio.sleep(1.0)
        closed = await _hang_up_all(port)
        await asyncio.sleep(SETTLING)
    ended: dict[str, float] = json.loads(await _get(port, "/ended"))
    # Infinity for one that has not ended at all.
    return [
        (age, (ended.get(key, float("inf")) - closed_at) * 1000) for key, (age, closed_at) in closed.items()
    ]


async def _hang_up_all(port: int) -> dict[str, tuple[float, float]]:
    """Open and close requests of all ages, and return the age and the time of the close of each."""
    loop = asyncio.get_running_loop()
    closed: dict[str, tuple[float, float]] = {}
    ages = [age for age, count in AGES.items() for _ in range(count)]
    random.shuffle(ages)
    for number, age in enumerate(ages):
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(f"GET /wait/{number} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        loop.call_later(age, _hang_up, client, closed, str(number), age)
        # Random: the sweep's ticks are regular.
        await asyncio.sleep(random.uniform(0, 2 * EVERY))
    await asyncio.sleep(max(AGES) + EVERY)
    return closed


def _hang_up(client: socket.socket, closed: dict[str, tuple[float, float]], key: str, age: float) -> None:
    # No transport: it would close its socket only in the next turn of this loop.
    closed[key] = age, time.monotonic()
    client.close()


def _start_load(port: int, busy: int) -> subprocess.Popen[bytes]:
    # Not in the clients' process: it would keep them from closing in time.
    return subprocess.Popen([sys.executable, "-m", "benchmarks.disconnect", str(port), str(busy)])


async def _keep_busy(port: int, busy: int) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(busy):
        await loop.create_connection(_Requests, "127.0.0.1", port)
        # Spread: otherwise all wake in the same turn of the server's loop.
        await asyncio.sleep(SLEEPS * SLEEP / busy)
    await asyncio.Event().wait()


class _Requests(asyncio.Protocol):
    """One request after another on one connection, as from a proxy: the load itself takes little of a CPU."""

    _transport: Any

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._transport.write(WORK)

    def data_received(self, data: bytes) -> None:
        if data.endswith(ANSWER):
            self._transport.write(WORK)


async def _get(port: int, path: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
        answer = await reader.read()
    finally:
        writer.close()
    return answer.partition(b"\r\n\r\n")[2].decode()


class Probed:
    """The application of the server: it notes when the last task of each request ended.

    Args:
        listens: The handler itself awaits the disconnect.
    """

    def __init__(self, *, listens: bool = False) -> None:
        self.ended: dict[str, float] = {}
        self.listens = listens

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        kind, *words = scope["path"].strip("/").split("/")
        answer = ANSWER
        if kind == "wait" and self.listens:
            await self.listen(words[0], receive)
        elif kind == "wait":
            await self.wait(words[0])
        elif kind == "work":
            for _ in range(SLEEPS):
                # Random: with a fixed length, requests that have met would share their turns for good.
                await asyncio.sleep(random.uniform(0, 2 * SLEEP))
        else:
            answer = json.dumps(self.ended).encode()
            self.ended.clear()
        headers = [(b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    async def wait(self, key: str) -> None:
        """Wait for three tasks that would take ten seconds."""
        from otel_tasks import create_task

        tasks = [create_task(self.sleep(key)) for _ in range(3)]
        try:
            await asyncio.wait(tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def listen(self, key: str, receive: Any) -> None:
        """Start three tasks of asyncio's, and cancel them when the client leaves."""
        tasks = [asyncio.create_task(self.sleep(key)) for _ in range(3)]
        while (await receive())["type"] != "http.disconnect":
            pass
        for task in tasks:
            task.cancel()

    async def sleep(self, key: str) -> None:
        """Sleep, and note the end."""
        try:
            await asyncio.sleep(10)
        finally:
            self.ended[key] = time.monotonic()


if __name__ == "__main__":
    asyncio.run(_keep_busy(*map(int, sys.argv[1:])))
