"""From the client's close to the end of the last task, on uvicorn over loopback: the one part in wall time.

Client and server are two processes; the clock is the system's monotonic one, which they share. Each probe
sends a request whose handler waits for three tasks, lets it grow to a certain age, and closes its socket.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Effort, Row, Spread, Table
from benchmarks.middleware import serve, wait_for_port
from benchmarks.names import OURS, WATCHER

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

AGES = (0.001, 0.020, 0.060, 0.500)
BUSY = 200
AT_ONCE = 10
PORT = 18_417


def run(effort: Effort) -> list[Table]:
    """Measure this library, and a watcher task per request, idle and busy."""
    return asyncio.run(_measure(effort))


async def _measure(effort: Effort) -> list[Table]:
    tables = []
    samples = 20 if effort.quick else 100
    for number, side in enumerate((OURS, WATCHER)):
        for busy in (0, BUSY):
            port = PORT + 2 * number + (busy > 0)
            async with _server(side, port):
                tables.append(await _table(side, port, busy, samples))
    return tables


@asynccontextmanager
async def _server(side: str, port: int) -> AsyncIterator[None]:
    process = serve(f"probed:{side}", port)
    try:
        await asyncio.to_thread(wait_for_port, port)
        yield
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 20)


async def _table(side: str, port: int, busy: int, samples: int) -> Table:
    others = [asyncio.create_task(_keep_busy(port)) for _ in range(busy)]
    await asyncio.sleep(1.0 if busy else 0.1)
    for age in AGES:
        await _probes(port, age, samples)
    for other in others:
        other.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.sleep(0.5)
    taken: dict[str, list[float]] = json.loads(await _get(port, "/taken"))
    load = f"{busy} other requests in flight" if busy else "idle"
    key = "ours" if side == OURS else "watcher"
    table = Table(
        f"disconnect-{key}-{'busy' if busy else 'idle'}",
        f"From the client's close to the last task's end: {side}, {load}",
        "ms",
        "",
        samples,
        note="Wall time. Median, and from 50 to 99 of 100.",
    )
    for age in AGES:
        values = sorted(taken[f"{age:g}"])
        cut = statistics.quantiles(values, n=100, method="inclusive")
        table.rows.append(Row(f"{age * 1000:g} ms old", Spread(cut[49], cut[49], cut[98])))
    return table


async def _probes(port: int, age: float, samples: int) -> None:
    turns = asyncio.Semaphore(AT_ONCE)

    async def one() -> None:
        async with turns:
            # Spread over the sweep's ticks.
            await asyncio.sleep(random.uniform(0, 0.05))
            await _probe(port, age)

    await asyncio.gather(*(one() for _ in range(samples)))


async def _probe(port: int, age: float) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    key = f"{age:g}-{random.getrandbits(40)}"
    writer.write(f"GET /wait/{key} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
    await asyncio.sleep(age)
    # The server's clock is the same; the time is reported afterwards, so that reporting costs nothing before.
    closed_at = time.monotonic()
    writer.transport.abort()
    await asyncio.sleep(0.15)
    await _get(port, f"/closed/{key}/{closed_at!r}")


async def _keep_busy(port: int) -> None:
    while True:
        await _get(port, "/work")


async def _get(port: int, path: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
        answer = await reader.read()
    finally:
        writer.close()
    return answer.partition(b"\r\n\r\n")[2].decode()


class Probed:
    """The application of the server: it notes when the last task of each request ended."""

    def __init__(self) -> None:
        self.ended: dict[str, float] = {}
        self.taken: dict[str, list[float]] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        kind, *words = scope["path"].strip("/").split("/")
        answer = b"ok"
        if kind == "wait":
            await self.wait(words[0])
        elif kind == "work":
            for _ in range(10):
                await asyncio.sleep(0.02)
        elif kind == "closed":
            age = words[0].partition("-")[0]
            # In milliseconds; infinity for one that has not ended at all.
            took = (self.ended.pop(words[0], float("inf")) - float(words[1])) * 1000
            self.taken.setdefault(age, []).append(took)
        else:
            answer = json.dumps(self.taken).encode()
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

    async def sleep(self, key: str) -> None:
        """Sleep, and note the end."""
        try:
            await asyncio.sleep(10)
        finally:
            self.ended[key] = time.monotonic()
