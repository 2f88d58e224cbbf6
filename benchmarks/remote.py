"""Remote calls against plain Taskiq, on a real Redis with one real worker process, which take turns.

    python -m benchmarks.remote    # about two minutes; needs redis-server and Linux

The CPU time of caller and worker counts, because the machine may be busy with other things; wall time is
shown beside it. Plain Taskiq polls for its results every 10 ms here, and every 200 ms by default.
"""

# ruff: noqa: ASYNC110, ASYNC220, ASYNC230, ASYNC240 - nothing else runs in these loops

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from benchmarks.fleet import URL, redis
from otel_tasks import TaskManager
from otel_tasks.fleet import Fleet
from otel_tasks.taskiq import managed, remote

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from taskiq import AsyncBroker, AsyncTaskiqDecoratedTask

ROUNDS = 3
CALLS = 1000
AT_ONCE = 50
LATENCIES = 200
CANCELS = 200
POLL = 0.01


def main() -> int:
    """Measure all, and print it."""
    if shutil.which("redis-server") is None:
        print("redis-server is not installed (Debian: redis-server)", file=sys.stderr)
        return 1
    with redis():
        asyncio.run(_measure())
    return 0


class Side:
    """Plain Taskiq, or the same broker managed.

    Args:
        kind: ``"plain"`` or ``"managed"``.
        name: The name of the stream.
    """

    def __init__(self, kind: str, name: str) -> None:
        self.kind = kind
        results: Any = RedisAsyncResultBackend(URL, result_ex_time=600)
        stream = RedisStreamBroker(URL, queue_name=name, consumer_group_name=name, consumer_id="0")
        self.broker: AsyncBroker = stream.with_result_backend(results)
        self.manager = TaskManager()
        if kind == "managed":
            managed(self.broker, Fleet(URL, namespace=name, manager=self.manager))
        self.nothing: AsyncTaskiqDecoratedTask[..., Any] = self.broker.task(task_name="nothing")(_nothing())
        self.forever: AsyncTaskiqDecoratedTask[..., Any] = self.broker.task(task_name="sleep")(_sleep())

    async def call(self, number: int) -> None:
        """Call a task, and wait for its result."""
        if self.kind == "managed":
            await self.manager.create_task(remote(self.nothing, number))
            return
        sent = await self.nothing.kiq(number)
        await sent.wait_result(check_interval=POLL)


def _nothing() -> Callable[[int], Awaitable[int]]:
    # A function for each side: Taskiq renames what it decorates.
    async def nothing(number: int) -> int:
        return number

    return nothing


def _sleep() -> Callable[[str], Awaitable[None]]:
    async def sleep(path: str) -> None:
        Path(path).touch()
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            with Path(path).open("a") as file:
                file.write(repr(time.monotonic()))
            raise

    return sleep


def __getattr__(name: str) -> AsyncBroker:
    """Make the broker that the worker process asks for."""
    if name != "broker" or "BENCH_SIDE" not in os.environ:
        raise AttributeError(name)
    side = globals()["side"] = Side(os.environ["BENCH_SIDE"], os.environ["BENCH_NAME"])
    globals()["broker"] = side.broker
    return side.broker


@asynccontextmanager
async def _running(kind: str, name: str) -> AsyncIterator[tuple[Side, int]]:
    side = Side(kind, name)
    await side.broker.startup()
    command = [sys.executable, "-m", "taskiq", "worker", "benchmarks.remote:broker", "--workers", "1"]
    environment = {**os.environ, "BENCH_SIDE": kind, "BENCH_NAME": name}
    worker = subprocess.Popen([*command, "--log-level", "ERROR"], env=environment)
    try:
        await side.call(0)
        children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text("utf-8")
        await asyncio.sleep(1)
        yield side, int(children.split()[0])
    finally:
        worker.terminate()
        await asyncio.to_thread(worker.wait, 30)
        await side.broker.shutdown()


async def _measure() -> None:
    figures: dict[str, dict[str, list[float]]] = {"plain": {}, "managed": {}}
    for number in range(ROUNDS):
        for kind, found in figures.items():
            async with _running(kind, f"{kind}{number}") as (side, pid):
                for what, value in (await _calls(side, pid)).items():
                    found.setdefault(what, []).append(value)
                if kind == "managed" and number == 0:
                    taken = sorted([await _cancel(side, n) for n in range(CANCELS)])
                    print(
                        f"cancel to CancelledError on the worker: p50 {taken[len(taken) // 2] * 1e3:.2f} ms, "
                        f"p95 {taken[len(taken) * 95 // 100] * 1e3:.2f} ms"
                    )
    for what, plain in figures["plain"].items():
        ours = figures["managed"][what]
        ratios = sorted(mine / theirs for mine, theirs in zip(ours, plain, strict=True))
        print(
            f"{what}: plain {statistics.median(plain):.2f}, managed {statistics.median(ours):.2f}, "
            f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


async def _calls(side: Side, pid: int) -> dict[str, float]:
    """Measure calls of one side: many at once, and one after another."""
    limit = asyncio.Semaphore(AT_ONCE)

    async def call(number: int) -> None:
        async with limit:
            await side.call(number)

    worker, caller, began = _cpu(pid), time.process_time(), time.perf_counter()
    await asyncio.gather(*(call(number) for number in range(CALLS)))
    seconds = time.perf_counter() - began
    figures = {
        "worker, CPU us per call": (_cpu(pid) - worker) / CALLS * 1e6,
        "caller, CPU us per call": (time.process_time() - caller) / CALLS * 1e6,
    }
    figures["both, CPU us per call"] = sum(figures.values())
    figures[f"{AT_ONCE} at once, wall us per call"] = seconds / CALLS * 1e6
    taken: list[float] = []
    for number in range(LATENCIES):
        began = time.perf_counter()
        await side.call(number)
        taken.append(time.perf_counter() - began)
    figures["one at a time, median wall ms"] = statistics.median(taken) * 1e3
    return figures


async def _cancel(side: Side, number: int) -> float:
    """Cancel a running call, and return the seconds until its function on the worker gets the error."""
    path = Path(f"/tmp/otel_tasks_bench.{os.getpid()}.{number}")  # noqa: S108 - of this process alone
    try:
        task = side.manager.create_task(remote(side.forever, str(path)))
        while not path.exists():
            await asyncio.sleep(0.005)
        began = time.monotonic()
        task.cancel()
        while not (text := path.read_text("utf-8")):
            await asyncio.sleep(0.001)
        return float(text) - began
    finally:
        path.unlink(missing_ok=True)


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
