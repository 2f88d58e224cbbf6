"""The live view: what a viewer costs a service with 10,000 live tasks and 1,000 changes a second.

    python -m benchmarks.live    # about a minute

Server and clients are processes of their own. The latency of the service's own route is measured with and
without viewers, in turns.
"""

from __future__ import annotations

import asyncio
import http.client
import statistics
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI

from benchmarks.middleware import wait_for_port
from otel_tasks import TaskManager, global_task_manager
from otel_tasks.fastapi import TaskGroupMiddleware, make_lifespan
from otel_tasks.live import live_view

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

PORT = 18_461
TASKS, GROUPS = 10_000, 20
# Ends per second.
CHANGES = 1000
VIEWERS = 5
SECONDS = 8.0
REQUESTS = 400
ROUNDS = 5


async def _rest(forever: asyncio.Event) -> None:
    await forever.wait()


async def _churn() -> None:
    while not global_task_manager.closed:
        for _ in range(CHANGES // 20):
            global_task_manager.create_task(asyncio.sleep(0.01), name="quick", group="churn")
        await asyncio.sleep(0.05)


@asynccontextmanager
async def _work(app: FastAPI) -> AsyncIterator[None]:
    forever = asyncio.Event()
    for number in range(TASKS):
        global_task_manager.create_task(_rest(forever), group=f"group{chr(97 + number % GROUPS)}")
    await global_task_manager.start_service("churn", _churn)
    yield


app = FastAPI(lifespan=make_lifespan(_work, grace=0.0))
app.add_middleware(TaskGroupMiddleware)
app.include_router(live_view(insecure=True), prefix="/tasks")


@app.get("/hello")
async def hello() -> dict[str, str]:
    """Answer, as the service's own work."""
    return {"hello": "world"}


@app.get("/cpu")
async def cpu() -> float:
    """The CPU time of this process."""
    return time.process_time()


def main() -> None:
    """Measure, and print the figures."""
    print(f"overview of {TASKS:,} tasks: {asyncio.run(_overview()) * 1000:.1f} ms")
    command = [sys.executable, "-m", "uvicorn", "benchmarks.live:app", "--port", str(PORT)]
    quiet = ["--no-access-log", "--log-level", "warning"]
    server = subprocess.Popen([*command, *quiet], cwd=Path(__file__).parents[1])
    try:
        wait_for_port(PORT)
        alone = _cpu()
        with _viewers(1):
            one = _cpu()
        with _viewers(VIEWERS):
            five = _cpu()
        print(f"CPU of the service: {alone:.2%} of a core; the first viewer adds {one - alone:.2%}")
        print(f"{VIEWERS} viewers add {five - alone:.2%}, {(five - alone) / VIEWERS:.2%} each")
        print(f"a delta has {_bytes_per_delta():,.0f} bytes")
        print(_slowdown())
    finally:
        server.terminate()
        server.wait(30)


async def _overview() -> float:
    async with TaskManager() as manager:
        forever = asyncio.Event()
        for number in range(TASKS):
            manager.create_task(_rest(forever), group=f"group{chr(97 + number % GROUPS)}")
        await asyncio.sleep(0)
        times: list[float] = []
        for _ in range(50):
            start = time.process_time()
            manager.overview()
            times.append(time.process_time() - start)
        forever.set()
        return statistics.median(times)


def _cpu() -> float:
    """The part of a core that the server needs."""
    time.sleep(2.0)
    before, start = _cpu_time(), time.monotonic()
    time.sleep(SECONDS)
    return (_cpu_time() - before) / (time.monotonic() - start)


def _cpu_time() -> float:
    with closing(http.client.HTTPConnection("127.0.0.1", PORT)) as connection:
        connection.request("GET", "/cpu")
        return float(connection.getresponse().read())


@contextmanager
def _viewers(number: int) -> Iterator[None]:
    """So many viewers, in one process, which read their streams and open them again."""
    code = f"import benchmarks.live as live; live.view({number})"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        time.sleep(3.0)
        yield
    finally:
        process.kill()
        process.wait()


def view(number: int) -> None:
    """Read so many streams until the process is killed."""
    for each in range(1, number):
        threading.Thread(target=_read, args=(f"viewer-{each}",), daemon=True).start()
    _read("viewer-0")


def _read(name: str) -> None:
    while True:
        with closing(http.client.HTTPConnection("127.0.0.1", PORT)) as connection:
            connection.request("GET", f"/tasks/v1/events?viewer={name}&expand=oldest:50")
            response = connection.getresponse()
            while response.readline():
                pass


def _bytes_per_delta() -> float:
    with closing(http.client.HTTPConnection("127.0.0.1", PORT)) as connection:
        connection.request("GET", "/tasks/v1/events?viewer=bytes")
        response = connection.getresponse()
        sizes: list[int] = []
        while len(sizes) < 5:
            line = response.readline()
            if b'"kind":"delta"' in line:
                sizes.append(len(line))
        return statistics.mean(sizes)


def _slowdown() -> str:
    """The latency of the service's own route with viewers, compared with that without."""
    ratios: dict[str, list[float]] = {"p50": [], "p99": []}
    for _ in range(ROUNDS):
        alone = _latencies()
        with _viewers(VIEWERS):
            watched = _latencies()
        for name, part in (("p50", 0.5), ("p99", 0.99)):
            ratios[name].append(watched[int(REQUESTS * part)] / alone[int(REQUESTS * part)])
    text = ", ".join(f"{name} {statistics.median(values):.2f}" for name, values in ratios.items())
    return f"latency with {VIEWERS} viewers, compared with none: {text}"


def _latencies() -> list[float]:
    """The seconds of some requests, one each 10 ms, ascending."""
    times: list[float] = []
    with closing(http.client.HTTPConnection("127.0.0.1", PORT)) as connection:
        for _ in range(REQUESTS):
            time.sleep(0.01)
            start = time.perf_counter()
            connection.request("GET", "/hello")
            connection.getresponse().read()
            times.append(time.perf_counter() - start)
    return sorted(times)


if __name__ == "__main__":
    main()
