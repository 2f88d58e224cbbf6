"""A fleet: how fast it cancels, catches up, and answers, what it costs at rest, and what remote calls cost.

Redis, the nodes, and the workers are processes of this machine. Times that begin in one process and end in
another one are read from the system's monotonic clock, which they share.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import statistics
import time
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from benchmarks import remote
from benchmarks.measure import Effort, Row, Spread, Table
from benchmarks.redis_server import URL, circumstances, missing, redis
from otel_tasks import TaskManager
from otel_tasks._core.slices import at_once
from otel_tasks.fleet import Fleet
from otel_tasks.fleet.entries import CancelEntry
from otel_tasks.fleet.link import Link
from otel_tasks.fleet.urls import open_bus
from otel_tasks.live.others import Others

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

ROUNDS, FEW_ROUNDS = 9, 2
CANCEL = "`cancel_task()` to `CancelledError`"
# Cancellations of one round, and seconds between two.
CANCELED, PACE = 100, 0.005
REPLAYED = 10_000
# Seconds of each round.
IDLE = 3.0
NODES, TASKS = 50, 20
# Tasks of each node that a live view shows, seconds of some of them, and seconds between two ticks.
VIEWED, SHORT, TICK = 200, 1.0, 0.5

# Not a fresh interpreter for each node: fifty of them would measure how fast this machine imports.
_fork = multiprocessing.get_context("fork")


def run(effort: Effort) -> list[Table]:
    """Measure the bus and remote calls; nothing where there is no Redis."""
    if reason := missing():
        print(f"\nfleet: {reason}: not measured.")
        return []
    rounds = FEW_ROUNDS if effort.quick else ROUNDS
    note = circumstances()
    replayed = f"Start of a node that finds {REPLAYED:,} cancellations"
    asked = f"Answers of {NODES} nodes with {TASKS} tasks each"
    viewed = f"A tick of the live view with {NODES} nodes, {VIEWED} tasks each"
    with redis():
        return [
            _table("cancel", f"{CANCEL} in another process", "ms", _cancels(rounds), note),
            _table("replay", replayed, "ms", _replays(rounds), note),
            _table("rate", "Cancellations that one process sends", "per second", _rates(rounds), note),
            _table("idle", "CPU time of a node at rest", "% of a core", _idle(rounds), note),
            _table("inspect", asked, "ms", _inspections(rounds), note),
            _table("view", viewed, "ms", _views(rounds), note),
            *remote.measure(rounds, note),
        ]


def _table(name: str, title: str, unit: str, figures: dict[str, list[float]], note: str) -> Table:
    table = Table(
        f"fleet-{name}", title, unit, "", min(map(len, figures.values())), note=note, high="quartiles"
    )
    table.rows = [Row(row, Spread.of(values)) for row, values in figures.items()]
    return table


def _in_process(work: Callable[[Connection], None]) -> tuple[BaseProcess, Connection]:
    here, there = _fork.Pipe()
    process = _fork.Process(target=work, args=(there,), daemon=True)
    process.start()
    return process, here


# -- cancelling ---------------------------------------------------------------------------------


def _cancels(rounds: int) -> dict[str, list[float]]:
    """From the call in one process to the end of the task in another one, with 50 and 95 of 100 per round."""
    process, pipe = _in_process(_hold_tasks)
    count = (rounds + 1) * CANCELED
    pipe.send(count)
    pipe.recv()
    began = asyncio.run(_cancel_paced(count))
    ended = pipe.recv()
    process.join()
    figures: dict[str, list[float]] = {"p50": [], "p95": []}
    # The first round warms up.
    for first in range(CANCELED, count, CANCELED):
        taken = [(ended[n] - began[n]) * 1e3 for n in range(first, first + CANCELED)]
        figures["p50"].append(statistics.median(taken))
        figures["p95"].append(statistics.quantiles(taken, n=20)[-1])
    return figures


def _hold_tasks(pipe: Connection) -> None:
    ended: dict[int, float] = {}

    async def sleep(number: int) -> None:
        try:
            await asyncio.sleep(600)
        finally:
            ended[number] = time.monotonic()

    async def hold(count: int) -> None:
        async with TaskManager() as manager, Fleet(URL, namespace="cancel", manager=manager):
            tasks = [manager.create_task(sleep(number), name=f"job-{number}") for number in range(count)]
            await asyncio.sleep(0.1)
            pipe.send(None)
            await asyncio.wait(tasks)

    asyncio.run(hold(pipe.recv()))
    pipe.send(ended)


async def _cancel_paced(count: int) -> list[float]:
    began: list[float] = []
    async with TaskManager() as manager, Fleet(URL, namespace="cancel", manager=manager) as fleet:
        for number in range(count):
            began.append(time.monotonic())
            await fleet.cancel_task(f"job-{number}", "stopped by the user", timeout=0)
            await asyncio.sleep(PACE)
    return began


# -- replay, and sending ------------------------------------------------------------------------


def _replays(rounds: int) -> dict[str, list[float]]:
    """The start of a node that finds the cancellations of the last hour."""
    asyncio.run(_fill("replay"))
    figures: dict[str, list[float]] = {"wall time": [], "CPU time of the node": []}
    for _ in range(rounds):
        wall, cpu = asyncio.run(_replay())
        figures["wall time"].append(wall * 1e3)
        figures["CPU time of the node"].append(cpu * 1e3)
    return figures


async def _replay() -> tuple[float, float]:
    fleet = Fleet(URL, namespace="replay", manager=TaskManager())
    wall, cpu = time.perf_counter(), time.process_time()
    async with fleet:
        taken = time.perf_counter() - wall, time.process_time() - cpu
        if len(fleet.cancellations) != REPLAYED:
            raise RuntimeError(f"read {len(fleet.cancellations)} cancellations")
    return taken


def _rates(rounds: int) -> dict[str, list[float]]:
    """What one process sends, while it reads its own entries."""
    return {"sent and read": [REPLAYED / asyncio.run(_fill(f"rate-{n}")) for n in range(min(rounds, 3))]}


async def _fill(namespace: str) -> float:
    link = Link(open_bus(URL, namespace), "bench/1/abcdef")
    await link.start(10.0)
    begin = time.perf_counter()
    await asyncio.gather(*(link.post(_cancellation(f"job-{number}")) for number in range(REPLAYED)))
    seconds = time.perf_counter() - begin
    await link.stop()
    return seconds


def _cancellation(name: str) -> CancelEntry:
    return CancelEntry(
        node="bench/1/abcdef",
        target="task",
        name=name,
        at=time.time(),
        message="stopped by the user",
        asked_by="DELETE /jobs/{job}",
    )


# -- at rest ------------------------------------------------------------------------------------


def _idle(rounds: int) -> dict[str, list[float]]:
    """The CPU time of a process whose fleet has nothing to do."""
    process, pipe = _in_process(_rest)
    pipe.send(rounds)
    shares = pipe.recv()
    process.join()
    return {"idle node": shares}


def _rest(pipe: Connection) -> None:
    async def rest(rounds: int) -> list[float]:
        shares: list[float] = []
        async with Fleet(URL, namespace="idle", manager=TaskManager()):
            await asyncio.sleep(1.0)
            for _ in range(rounds):
                begin, cpu = time.perf_counter(), time.process_time()
                await asyncio.sleep(IDLE)
                shares.append((time.process_time() - cpu) / (time.perf_counter() - begin) * 100)
        return shares

    pipe.send(asyncio.run(rest(pipe.recv())))


# -- inspection ---------------------------------------------------------------------------------


def _inspections(rounds: int) -> dict[str, list[float]]:
    """What all processes answer, as one of them asks."""
    with _nodes("inspect", TASKS):
        return asyncio.run(_inspect(rounds))


@contextmanager
def _nodes(namespace: str, tasks: int) -> Iterator[None]:
    """Run the other nodes of a fleet for the block."""
    nodes = [_in_process(partial(_serve, namespace, tasks)) for _ in range(NODES - 1)]
    for _, pipe in nodes:
        pipe.recv()
    yield
    for process, pipe in nodes:
        pipe.send(None)
        process.join()


def _serve(namespace: str, tasks: int, pipe: Connection) -> None:
    async def serve() -> None:
        loop = asyncio.get_running_loop()
        over = asyncio.Event()
        loop.add_reader(pipe.fileno(), over.set)
        async with TaskManager() as manager, Fleet(URL, namespace=namespace, manager=manager):
            for number in range(tasks):
                manager.create_task(over.wait(), name=f"job-{os.getpid()}-{number}", group="jobs")
            pipe.send(None)
            while namespace == "view" and not over.is_set():
                # Something changes in each tick.
                manager.create_task(asyncio.sleep(SHORT), name=f"short-{loop.time()}", group="short")
                await asyncio.sleep(TICK / 2)
            await over.wait()

    asyncio.run(serve())


async def _inspect(rounds: int) -> dict[str, list[float]]:
    figures: dict[str, list[float]] = defaultdict(list)
    async with TaskManager() as manager, Fleet(URL, namespace="inspect", manager=manager) as fleet:
        await asyncio.sleep(1.0)
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "tasks()": fleet.tasks,
            "tree()": fleet.tree,
            "nodes()": fleet.nodes,
        }
        # The first round warms up.
        for number in range(rounds + 1):
            for name, call in calls.items():
                begin = time.perf_counter()
                await call()
                if number:
                    figures[name].append((time.perf_counter() - begin) * 1e3)
                await asyncio.sleep(0.1)
        rows = await fleet.tasks()
        if rows.silent or len(rows) != (NODES - 1) * TASKS:
            raise RuntimeError(f"{len(rows)} tasks, silent: {rows.silent}")
    return figures


# -- the live view ------------------------------------------------------------------------------


def _views(rounds: int) -> dict[str, list[float]]:
    """What a tick of a view takes that asks all other nodes, and gathers what they answer."""
    with _nodes("view", VIEWED):
        return asyncio.run(_view(rounds))


async def _view(rounds: int) -> dict[str, list[float]]:
    figures: dict[str, list[float]] = {"wall time": [], "CPU time of the viewer": []}
    async with TaskManager() as manager, Fleet(URL, namespace="view", manager=manager) as fleet:
        await asyncio.sleep(1.0)
        others = Others(fleet.views, fleet.node, manager.now)
        async with asyncio.timeout(60):
            # The first answer has everything, and takes an import; each further one has what has changed.
            while len(found := at_once(others.gathered()).nodes) < NODES - 1 or any(
                not node["key"] for node in found
            ):
                await others.look({}, ())
                await asyncio.sleep(TICK)
        for _ in range(rounds):
            wall, cpu = time.perf_counter(), time.process_time()
            await others.look({}, ())
            at_once(others.gathered())
            figures["wall time"].append((time.perf_counter() - wall) * 1e3)
            figures["CPU time of the viewer"].append((time.process_time() - cpu) * 1e3)
            await asyncio.sleep(TICK)
    return figures
