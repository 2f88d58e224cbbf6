"""The bus of a fleet: how fast it delivers, catches up, and answers, and what it costs while nothing happens.

    python -m benchmarks.fleet    # about two minutes; needs redis-server

Redis and all nodes are processes of this machine. Delivery is measured on the system's monotonic clock, which
all processes share.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from benchmarks.middleware import wait_for_port
from otel_tasks import TaskManager
from otel_tasks.fleet import Fleet
from otel_tasks.fleet.entries import CancelEntry
from otel_tasks.fleet.link import Link
from otel_tasks.fleet.urls import open_bus

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

PORT = 18_463
URL = f"redis://127.0.0.1:{PORT}/0"
ROUNDS = 5
DELIVERIES = 400
PACE = 0.005
CANCELS = 10_000
IDLE = 20.0
NODES = 50
TASKS = 20

# Not a fresh interpreter for each node: fifty of them would measure how fast this machine imports.
_fork = multiprocessing.get_context("fork")


def main() -> int:
    """Measure all, and print it."""
    if shutil.which("redis-server") is None:
        print("redis-server is not installed (Debian: redis-server)", file=sys.stderr)
        return 1
    with redis():
        _print_delivery()
        _print_replay()
        _print_throughput()
        _print_idle()
        _print_inspection()
    return 0


@contextmanager
def redis() -> Iterator[None]:
    """Run a Redis of the benchmark's own."""
    with tempfile.TemporaryDirectory() as directory:
        command = [
            "redis-server",
            "--port",
            str(PORT),
            "--bind",
            "127.0.0.1",
            "--dir",
            directory,
            "--save",
            "",
        ]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            wait_for_port(PORT)
            yield
        finally:
            server.kill()
            server.wait()


def _in_process(work: Callable[[Connection], None]) -> tuple[BaseProcess, Connection]:
    here, there = _fork.Pipe()
    process = _fork.Process(target=work, args=(there,), daemon=True)
    process.start()
    return process, here


def _cancel(name: str) -> CancelEntry:
    return CancelEntry(
        node="bench/1/abcdef",
        target="task",
        name=name,
        at=time.monotonic(),
        message="stopped by the user",
        asked_by="DELETE /jobs/{job}",
    )


# -- delivery -----------------------------------------------------------------------------------


def _print_delivery() -> None:
    """From `post` in one process to the handler in another one."""
    process, pipe = _in_process(_receive)
    pipe.recv()
    asyncio.run(_send_paced())
    ages = pipe.recv()
    process.join()
    p50, p95 = statistics.median(ages), statistics.quantiles(ages, n=20)[-1]
    print(f"publish to delivery, {DELIVERIES} entries: p50 {p50 * 1e3:.2f} ms, p95 {p95 * 1e3:.2f} ms")


def _receive(pipe: Connection) -> None:
    ages: list[float] = []

    async def receive() -> None:
        done = asyncio.Event()

        def take(cancel: CancelEntry, entry: object) -> None:
            ages.append(time.monotonic() - cancel.at)
            if cancel.name == "last":
                done.set()

        link = Link(open_bus(URL, "delivery"), "receiver")
        link.subscribe(CancelEntry, take)
        await link.start(10.0)
        pipe.send(None)
        await done.wait()
        await link.stop()

    asyncio.run(receive())
    pipe.send(ages)


async def _send_paced() -> None:
    link = Link(open_bus(URL, "delivery"), "sender")
    await link.start(10.0)
    for n in range(DELIVERIES):
        link.post(_cancel("last" if n == DELIVERIES - 1 else f"job-{n}"))
        await asyncio.sleep(PACE)
    await link.stop()


# -- replay and throughput ----------------------------------------------------------------------


def _print_replay() -> None:
    """The start of a node that finds 10,000 cancellations of the last hour."""
    asyncio.run(_fill("replay"))
    figures = [asyncio.run(_replay()) * 1e3 for _ in range(ROUNDS)]
    print(
        f"start with {CANCELS} cancellations: median {statistics.median(figures):.0f} ms, {_spread(figures)}"
    )


async def _fill(namespace: str) -> float:
    link = Link(open_bus(URL, namespace), "sender")
    await link.start(10.0)
    begin = time.perf_counter()
    await asyncio.gather(*(link.post(_cancel(f"job-{n}")) for n in range(CANCELS)))
    seconds = time.perf_counter() - begin
    await link.stop()
    return seconds


async def _replay() -> float:
    seen: list[str] = []
    link = Link(open_bus(URL, "replay"), "reader")
    link.subscribe(CancelEntry, lambda cancel, entry: seen.append(cancel.name))
    begin = time.perf_counter()
    await link.start(10.0)
    seconds = time.perf_counter() - begin
    await link.stop()
    if len(seen) != CANCELS:
        raise RuntimeError(f"read {len(seen)} entries")
    return seconds


def _print_throughput() -> None:
    """What one process sends, while it reads its own entries."""
    figures = [CANCELS / asyncio.run(_fill(f"throughput-{n}")) for n in range(ROUNDS)]
    print(
        f"cancellations that one process sends: median {statistics.median(figures):.0f}/s, {_spread(figures)}"
    )


# -- a fleet that rests -------------------------------------------------------------------------


def _print_idle() -> None:
    """The processor time of a process whose fleet has nothing to do."""
    process, pipe = _in_process(_rest)
    used = pipe.recv()
    process.join()
    print(f"idle node: {used / IDLE:.3%} of a core, over {IDLE:.0f} s")


def _rest(pipe: Connection) -> None:
    async def rest() -> float:
        async with Fleet(URL, namespace="idle", manager=TaskManager()):
            await asyncio.sleep(1.0)
            begin = time.process_time()
            await asyncio.sleep(IDLE)
            return time.process_time() - begin

    pipe.send(asyncio.run(rest()))


# -- inspection ---------------------------------------------------------------------------------


def _print_inspection() -> None:
    """The tree and the tasks of 50 processes, as one of them asks."""
    nodes = [_in_process(_serve) for _ in range(NODES - 1)]
    for _, pipe in nodes:
        pipe.recv()
    for what, figures in asyncio.run(_inspect()).items():
        print(f"{what} of {NODES} nodes: median {statistics.median(figures):.0f} ms, {_spread(figures)}")
    for process, pipe in nodes:
        pipe.send(None)
        process.join()


def _serve(pipe: Connection) -> None:
    async def serve() -> None:
        loop = asyncio.get_running_loop()
        over = asyncio.Event()
        loop.add_reader(pipe.fileno(), over.set)
        async with TaskManager() as manager, Fleet(URL, namespace="inspect", manager=manager):
            for n in range(TASKS):
                manager.create_task(over.wait(), name=f"job-{os.getpid()}-{n}", group="jobs")
            pipe.send(None)
            await over.wait()

    asyncio.run(serve())


async def _inspect() -> dict[str, list[float]]:
    figures: dict[str, list[float]] = {"tasks()": [], "tree()": [], "nodes()": []}
    async with TaskManager() as manager, Fleet(URL, namespace="inspect", manager=manager) as fleet:
        await asyncio.sleep(1.0)
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "tasks()": fleet.tasks,
            "tree()": fleet.tree,
            "nodes()": fleet.nodes,
        }
        for _ in range(ROUNDS):
            for what, call in calls.items():
                begin = time.perf_counter()
                await call()
                figures[what].append((time.perf_counter() - begin) * 1e3)
            await asyncio.sleep(0.2)
        rows = await fleet.tasks()
        if rows.silent:
            raise RuntimeError(f"silent: {rows.silent}")
    return figures


def _spread(figures: list[float]) -> str:
    return f"{min(figures):.0f} to {max(figures):.0f} in {len(figures)} rounds"


if __name__ == "__main__":
    sys.exit(main())
