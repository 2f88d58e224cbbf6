"""A service without a framework, for tests of signals: `python -m tests.e2e.worker_app HOW`."""

from __future__ import annotations

import asyncio
import logging
import sys

from otel_tasks import RestartPolicy, TaskManager, run


def say(what: str) -> None:
    print(what, flush=True)


async def job(number: int, seconds: float) -> None:
    """A job of the worker, which says how it ended."""
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        say(f"job {number} cancelled")
        raise
    say(f"job {number} done")


async def lose_database() -> None:
    raise OSError("no route")


async def hold_loop() -> None:
    while True:
        pass


async def main(how: str) -> str:
    try:
        async with TaskManager("worker", grace=1.5) as manager:
            manager.create_task(job(1, 1.0), name="job-1")
            manager.create_task(job(2, 3600.0), name="job-2")
            if how == "critical":
                once = RestartPolicy(max_failures=1)
                await manager.start_service("db", lose_database, restart=once, critical=True)
            await asyncio.sleep(0)
            say("ready")
            if how == "held":
                manager.create_task(hold_loop())
            if how != "return":
                await asyncio.Event().wait()
        return "returned"
    finally:
        say("closed")


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
    factory = None
    if sys.argv[1] == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    say(run(main(sys.argv[1]), loop_factory=factory))
