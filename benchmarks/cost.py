"""The cost of a task and of a request, as counts that do not depend on the machine: the guard in the tests.

``python -m benchmarks.cost`` prints them beside the baseline, ``--write`` makes them the baseline of this
Python version, which ``tests/test_cost.py`` holds. Counted is what this package does, not what asyncio or an
SDK do:

- ``calls``: functions of its own, and those that it calls itself, in Python or C;
- ``instructions``: of Python's bytecode, in its own functions;
- ``bytes``: for a live task, all that Python has allocated.

Each is the difference between many and few, so that what is done once does not count.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import sys
import sysconfig
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON

import otel_tasks
from otel_tasks import TaskManager
from otel_tasks.asgi import TaskGroupMiddleware
from otel_tasks.fleet import Fleet

if TYPE_CHECKING:
    from types import FrameType

Counts: TypeAlias = dict[str, dict[str, float]]
Work: TypeAlias = Callable[[int], Awaitable[object]]

BASELINE = Path(__file__).with_name("cost.json")
# The objects of a free-threaded build are larger.
_BUILD = "t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}{_BUILD}"
PACKAGE = str(Path(otel_tasks.__file__).parent)
FEW, MANY = 100, 300
# Of another patch release of Python, or another size of a dictionary.
TOLERANCE = 0.01


def main() -> None:
    """Count, and print or write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=__doc__)
    parser.add_argument("--write", action="store_true", help="make this the baseline of this Python version")
    parser.add_argument("--json", action="store_true", help="print nothing but the counts")
    parser.add_argument("--fleet", action="store_true", help="count without and in a fleet; print JSON")
    options = parser.parse_args()
    if options.fleet:
        print(json.dumps(asyncio.run(count_in_fleet())))
        return
    counts = asyncio.run(count_all())
    if options.json:
        print(json.dumps(counts))
        return
    print(as_text(counts, baseline()))
    if options.write:
        write(counts)


def baseline() -> Counts:
    """The committed counts of this Python version; none if it has none."""
    return _committed().get(PYTHON, {})


def write(counts: Counts) -> None:
    """Make these counts the baseline of this Python version."""
    every = _committed() | {PYTHON: counts}
    BASELINE.write_text(json.dumps(dict(sorted(every.items())), indent=1) + "\n", encoding="utf-8")


def grown(counts: Counts, before: Counts) -> list[str]:
    """Say what costs more than the baseline, one line for each count."""
    return [
        f"{scenario}: {what} {then:g} -> {counts[scenario][what]:g} ({counts[scenario][what] - then:+g})"
        for scenario, known in before.items()
        for what, then in known.items()
        if counts[scenario][what] > then * (1 + TOLERANCE)
    ]


def as_text(counts: Counts, before: Counts) -> str:
    """A table, with the difference to the baseline where there is one."""
    lines = []
    for scenario, kinds in counts.items():
        cells = [_cell(value, before.get(scenario, {}).get(what), what) for what, value in kinds.items()]
        lines.append(f"{scenario:40} " + "  ".join(cells))
    return "\n".join(lines)


def _cell(value: float, then: float | None, what: str) -> str:
    change = "" if then is None or then == value else f" ({value - then:+g})"
    return f"{value:g} {what}{change}"


def _committed() -> dict[str, Counts]:
    if not BASELINE.exists():
        return {}
    every: dict[str, Counts] = json.loads(BASELINE.read_text("utf-8"))
    return every


async def count_all() -> Counts:
    """Count each scenario."""
    counts = {}
    for name, work in _scenarios().items():
        counts[name] = await _count(work)
    for name, start in _live().items():
        counts[name] = {"bytes": await _slope(start, _counted_bytes)}
    return counts


async def count_in_fleet() -> tuple[Counts, Counts]:
    """Count tasks and requests of a process without a fleet, and of one in a fleet."""
    manager = TaskManager("plain")
    scenarios = {
        "task": _batch(_creating(manager)),
        "request without tasks": _requests(_answer, manager),
        "request with a task": _requests(_answer_with_task, manager),
    }
    without = {name: await _count(work) for name, work in scenarios.items()}
    async with Fleet("memory://", namespace="cost", manager=manager):
        return without, {name: await _count(work) for name, work in scenarios.items()}


async def _count(work: Work) -> dict[str, float]:
    # When it counts, caches are filled and Python has adapted its instructions, to being watched too.
    await work(FEW)
    await _counted_instructions(work, FEW)
    return {
        "calls": await _slope(work, _counted_calls),
        "instructions": await _slope(work, _counted_instructions),
    }


async def _slope(work: Work, counted: Callable[[Work, int], Awaitable[int]]) -> float:
    # A collection of garbage calls functions of ours, and comes when it likes.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        few, many = await counted(work, FEW), await counted(work, MANY)
    finally:
        if was_enabled:
            gc.enable()
    return round((many - few) / (MANY - FEW), 2)


async def _counted_calls(work: Work, pieces: int) -> int:
    total = 0

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal total
        if event == "c_call":
            total += _is_ours(frame)
        elif event == "call":
            total += _is_ours(frame) or (frame.f_back is not None and _is_ours(frame.f_back))

    sys.setprofile(profile)
    try:
        await work(pieces)
    finally:
        sys.setprofile(None)
    return total


async def _counted_instructions(work: Work, pieces: int) -> int:
    total = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal total
        if event == "opcode":
            total += 1
        elif not _is_ours(frame):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return trace

    sys.settrace(trace)
    try:
        await work(pieces)
    finally:
        sys.settrace(None)
    return total


async def _counted_bytes(start: Work, pieces: int) -> int:
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    tasks: Any = await start(pieces)
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return after - before


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(PACKAGE)


async def work() -> None:
    """A task that does nothing."""


async def wait() -> None:
    """A task that is live."""
    await asyncio.get_running_loop().create_future()


def _scenarios() -> dict[str, Work]:
    plain = TaskManager("plain")
    scenarios = {
        "task": _batch(lambda: plain.create_task(work())),
        "task in a group": _in_group(plain),
        "named task in a labeled group": _batch(lambda: plain.create_task(work(), name="work", group="a.b")),
        "task with a timeout": _batch(lambda: plain.create_task(work(), timeout=60)),
        "task under a limit": _batch(_creating(TaskManager("limited", max_concurrency=10))),
        "task with a span": _batch(_creating(_traced(ALWAYS_ON))),
        "task with a span, sampled out": _batch(_creating(_traced(ALWAYS_OFF))),
        "task that is cancelled": _cancelled(plain),
        "request without tasks": _requests(_answer, TaskManager("requests")),
        "request with a task": _requests(_answer_with_task, TaskManager("requests")),
    }
    if sys.version_info >= (3, 12):
        scenarios["task, eager start"] = _batch(lambda: plain.create_task(work(), eager_start=True))
    return scenarios


def _live() -> dict[str, Work]:
    plain, traced = TaskManager("plain"), _traced(ALWAYS_ON)
    return {
        "live task": _started(lambda: plain.create_task(wait())),
        "live task with a span": _started(lambda: traced.create_task(wait())),
    }


def _traced(sampler: Any) -> TaskManager:
    return TaskManager("traced", tracer_provider=TracerProvider(sampler=sampler))


def _creating(manager: TaskManager) -> Callable[[], Any]:
    return lambda: manager.create_task(work())


def _batch(create: Callable[[], Any]) -> Work:
    async def batch(pieces: int) -> None:
        await asyncio.wait([create() for _ in range(pieces)])
        await asyncio.sleep(0)

    return batch


def _in_group(manager: TaskManager) -> Work:
    async def batch(pieces: int) -> None:
        async with manager.group("batch") as group:
            for _ in range(pieces):
                group.create_task(work())

    return batch


def _cancelled(manager: TaskManager) -> Work:
    async def batch(pieces: int) -> None:
        async with manager.group("batch") as group:
            for _ in range(pieces):
                group.create_task(wait())
            await asyncio.sleep(0)
            group.cancel()

    return batch


def _started(create: Callable[[], Any]) -> Work:
    async def start(pieces: int) -> list[Any]:
        tasks = [create() for _ in range(pieces)]
        await asyncio.sleep(0)
        return tasks

    return start


def _requests(app: Any, manager: TaskManager) -> Work:
    # No tick of the sweeper: how many come depends on the machine. Each goes once through the requests since
    # the last one, which are a few instructions each.
    middleware = TaskGroupMiddleware(app, manager=manager, detect_after=3600.0)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        pass

    async def serve(pieces: int) -> None:
        for _ in range(pieces):
            await middleware({"type": "http", "method": "GET", "path": "/"}, receive, send)

    return serve


async def _answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


async def _answer_with_task(scope: Any, receive: Any, send: Any) -> None:
    await otel_tasks.create_task(work())
    await _answer(scope, receive, send)


if __name__ == "__main__":
    main()
