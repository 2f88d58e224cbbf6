"""A worker of a fleet without HTTP: `python -m tests.e2e.fleet_node_app NAME`, with FLEET_URL and others."""

from __future__ import annotations

import asyncio
import os
import sys

from otel_tasks import global_task_manager
from otel_tasks.fleet import Fleet


async def work() -> None:
    """Wait for long."""
    await asyncio.sleep(3600)


async def ignore_cancels() -> None:
    """Run until the process is killed."""
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            continue


async def main(name: str) -> None:
    """Join, and run what there is to see."""
    manager = global_task_manager
    async with Fleet(os.environ["FLEET_URL"], namespace=os.environ["FLEET_NAMESPACE"]) as fleet, manager:
        for number in range(3):
            manager.create_task(work(), name=f"import-{name}-{number}", group="imports")
        manager.create_task(work(), name="same", group="jobs")
        manager.create_task(ignore_cancels(), name=f"stuck-{name}", group="jobs")
        print(fleet.node, flush=True)
        await asyncio.sleep(3600)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
