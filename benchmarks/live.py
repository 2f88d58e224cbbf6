"""The live view: what viewers cost a service with 10,000 live tasks and 1,000 changes a second.

Three equal servers run side by side: without a viewer, with one, and with five, who all have the 50 oldest
tasks in sight. They take turns at each request to the service's own route, so that whatever else the machine
does meets all of them. Servers and viewers are processes of their own.
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from contextlib import ExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI

from benchmarks.measure import Effort, Row, Spread, Table, tabulate
from benchmarks.middleware import wait_for_port
from otel_tasks import TaskManager, global_task_manager
from otel_tasks.fastapi import TaskGroupMiddleware, make_lifespan
from otel_tasks.live import live_view
from otel_tasks.live.feed import Feed
from otel_tasks.live.rows import Shown

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PORT = 18_471
TASKS, GROUPS = int(os.environ.get("BENCHMARK_TASKS", "10000")), 20
# For the start of `otel-tasks`, which depends on the tasks that it lists.
FEW_TASKS = 50
# Ends per second.
CHANGES = 1000
NO_VIEWER, ONE, FIVE = "no viewer", "1 viewer", "5 viewers"
VIEWERS = {NO_VIEWER: 0, ONE: 1, FIVE: 5}
# Requests to each server in one round, and seconds between two.
REQUESTS, GAP = 400, 0.002
PERCENTILES = {"p50": 0.5, "p99": 0.99}
TICKS = 40
STARTS = 11


async def _rest(forever: asyncio.Event) -> None:
    await forever.wait()


async def _churn(manager: TaskManager) -> None:
    while not manager.closed:
        for _ in range(CHANGES // 20):
            manager.create_task(asyncio.sleep(0.01), name="quick", group="churn")
        await asyncio.sleep(0.05)


async def _start(manager: TaskManager, forever: asyncio.Event) -> None:
    for number in range(TASKS):
        manager.create_task(_rest(forever), group=f"group{chr(97 + number % GROUPS)}")
    await manager.start_service("churn", lambda: _churn(manager))


@asynccontextmanager
async def _work(app: FastAPI) -> AsyncIterator[None]:
    await _start(global_task_manager, asyncio.Event())
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


def run(effort: Effort) -> list[Table]:
    """Measure the servers' latency and CPU time, a tick's slices, and the start of ``otel-tasks``."""
    with ExitStack() as stack:
        for port in _PORTS.values():
            stack.callback(_stop, _serve(port, TASKS))
        stack.callback(_stop, _serve(SMALL_PORT, FEW_TASKS))
        for port in (*_PORTS.values(), SMALL_PORT):
            wait_for_port(port)
        for name, port in _PORTS.items():
            if VIEWERS[name]:
                code = f"import benchmarks.live as live; live.view({VIEWERS[name]}, {port})"
                stack.callback(_stop, _spawn(sys.executable, "-c", code))
        time.sleep(4.0)
        latencies, shares = _take_rounds(effort)
        starts = _starts(STARTS if not effort.quick else 3)
        sizes = [size / 1000 for size in _sizes(10 if not effort.quick else 2)]
    return [
        _latency_table(latencies),
        tabulate(
            Table("live-cpu", f"CPU time of a service with {TASKS:,} tasks", "% of a core", NO_VIEWER, 0),
            shares,
            100.0,
        ),
        asyncio.run(_slices(TICKS if not effort.quick else 3)),
        _plain("live-bytes", "Sent to each viewer per second", "kB", {"changes of the overview": sizes}),
        _plain("live-ls", f"From the start of a process to its first line, {FEW_TASKS} tasks", "ms", starts),
    ]


_PORTS = {name: PORT + number for number, name in enumerate(VIEWERS)}
SMALL_PORT = PORT + 5


def _serve(port: int, tasks: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "uvicorn", "benchmarks.live:app", "--port", str(port)]
    quiet = ["--no-access-log", "--log-level", "critical"]
    environment = {**os.environ, "BENCHMARK_TASKS": str(tasks)}
    return subprocess.Popen([*command, *quiet], cwd=Path(__file__).parents[1], env=environment)


def _spawn(*command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, cwd=Path(__file__).parents[1])


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(30)


def _take_rounds(effort: Effort) -> tuple[dict[str, list[list[float]]], dict[str, list[float]]]:
    """For each server, the latencies of each round, ascending, and its share of a core."""
    latencies: dict[str, list[list[float]]] = {name: [] for name in _PORTS}
    shares: dict[str, list[float]] = {name: [] for name in _PORTS}
    until = time.monotonic() + effort.seconds
    # The first round warms up.
    for number in range(effort.rounds + 1):
        before = {name: (_cpu_time(port), time.monotonic()) for name, port in _PORTS.items()}
        found = _latencies()
        for name, port in _PORTS.items():
            cpu, start = before[name]
            share = (_cpu_time(port) - cpu) / (time.monotonic() - start)
            if number:
                latencies[name].append(sorted(found[name]))
                shares[name].append(share)
        if number >= 2 and time.monotonic() > until:
            break
    return latencies, shares


def _latencies() -> dict[str, list[float]]:
    """The seconds of one round's requests to each server."""
    times: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        connections = {
            name: stack.enter_context(closing(http.client.HTTPConnection("127.0.0.1", port)))
            for name, port in _PORTS.items()
        }
        order = list(connections)
        for _ in range(REQUESTS):
            random.shuffle(order)
            for name in order:
                time.sleep(GAP)
                start = time.perf_counter()
                connections[name].request("GET", "/hello")
                connections[name].getresponse().read()
                times[name].append(time.perf_counter() - start)
    return times


def _latency_table(latencies: dict[str, list[list[float]]]) -> Table:
    table = Table(
        "live-latency",
        f"Latency of the service's own route, {TASKS:,} live tasks, {CHANGES:,} changes a second",
        "ms",
        f"{NO_VIEWER}: p99",
        len(latencies[NO_VIEWER]),
        note="The servers take turns at each request.",
    )
    for part, share in PERCENTILES.items():
        figures = {
            name: [times[int(len(times) * share)] for times in rounds] for name, rounds in latencies.items()
        }
        for name, values in figures.items():
            pairs = zip(values, figures[NO_VIEWER], strict=True)
            ratio = None if name == NO_VIEWER else Spread.of([value / other for value, other in pairs])
            value = Spread.of([value * 1000 for value in values])
            table.rows.append(Row(f"{name}: {part}", value, ratio))
    return table


def _plain(table_id: str, title: str, unit: str, figures: dict[str, list[float]]) -> Table:
    """A table without a yardstick."""
    table = Table(table_id, title, unit, "", min(map(len, figures.values())), high="quartiles")
    table.rows = [Row(name, Spread.of(values)) for name, values in figures.items()]
    return table


async def _slices(ticks: int) -> Table:
    """The CPU time of the slices of one tick after another, with the 50 oldest tasks in sight."""
    figures: dict[str, list[float]] = defaultdict(list)
    async with TaskManager() as manager:
        forever = asyncio.Event()
        await _start(manager, forever)
        await asyncio.sleep(0.5)
        feed = Feed(manager, Shown(), ())
        root = manager.overview().ROOT
        for _ in range(ticks + 1):
            await asyncio.sleep(0.2)
            times: list[float] = []
            slices = feed.slices({root: 50})
            for _ in itertools.count():
                start = time.thread_time()
                ended = next(slices, slices)
                times.append((time.thread_time() - start) * 1000)
                if ended is slices:
                    break
                await asyncio.sleep(0)
            figures["one slice, median"].append(statistics.median(times))
            figures["the longest slice"].append(max(times))
            figures["all slices of a tick"].append(sum(times))
        forever.set()
        await manager.shutdown(grace=0.0)
    warm = {name: values[1:] for name, values in figures.items()}
    return _plain("live-slices", f"One tick with {TASKS:,} live tasks, CPU time", "ms", warm)


def _cpu_time(port: int) -> float:
    with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        connection.request("GET", "/cpu")
        return float(connection.getresponse().read())


def view(number: int, port: int) -> None:
    """Read so many streams until the process is killed."""
    for each in range(1, number):
        threading.Thread(target=_read, args=(f"viewer-{each}", port), daemon=True).start()
    _read("viewer-0", port)


def _read(name: str, port: int) -> None:
    while True:
        with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
            connection.request("GET", f"/tasks/v1/events?viewer={name}&expand=oldest:50")
            response = connection.getresponse()
            while response.readline():
                pass


def _sizes(count: int) -> list[float]:
    """The bytes of some deltas."""
    with closing(http.client.HTTPConnection("127.0.0.1", _PORTS[ONE])) as connection:
        connection.request("GET", "/tasks/v1/events?viewer=bytes")
        response = connection.getresponse()
        sizes: list[float] = []
        while len(sizes) < count:
            line = response.readline()
            if b'"kind":"delta"' in line:
                sizes.append(len(line))
        return sizes


def _starts(count: int) -> dict[str, list[float]]:
    """The milliseconds until a process has printed its first line."""
    url = f"http://127.0.0.1:{SMALL_PORT}/tasks"
    program = str(Path(sys.executable).with_name("otel-tasks"))
    commands = {
        "python, a bare print": [sys.executable, "-c", "print(1)"],
        "otel-tasks ls": [program, "ls", "--url", url],
    }
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(count):
        for name, command in commands.items():
            start = time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
                line = process.stdout.readline() if process.stdout is not None else b""
                times[name].append((time.perf_counter() - start) * 1000)
                process.communicate()
            if not line or process.returncode:
                raise RuntimeError(f"{command} printed nothing, and ended with {process.returncode}")
    return times
