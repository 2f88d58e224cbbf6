"""An application that uses the library and does not know of OpenTelemetry: it is not to be changed for it."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI

from otel_tasks import TaskGroup, TaskPriority, create_task, current_group, global_task_manager

app = FastAPI()


async def price(item: str) -> int:
    """Stand in for a call of another service."""
    await asyncio.sleep(0.01)
    if item == "gold":
        raise ValueError("no price for gold")
    return len(item)


@app.get("/basket")
async def basket() -> dict[str, int | str]:
    """Tasks of a request, one after another so that their spans end in this order."""
    total = 0
    for item in ("apples", "pears"):
        total += await create_task(price(item), name=f"price-of-{item}", priority=TaskPriority.HIGH)
    global_task_manager.create_task(price("mail"), name="mail", group="outbox", trace="new")
    return {"total": total, "group": current_group().name}


@app.get("/group")
async def group() -> dict[str, str]:
    """A group with a span of its own, of which one task fails and the other is cancelled."""
    outcome = "priced"
    try:
        async with TaskGroup("prices", span=True) as prices:
            prices.create_task(asyncio.sleep(60), name="patient")
            prices.create_task(price("gold"), name="failing")
    except* ValueError:
        outcome = "no price"
    return {"outcome": outcome}


@app.get("/slow")
async def slow() -> None:
    """What nobody waits for to the end."""
    await create_task(asyncio.sleep(60), name="slow")


@app.get("/live")
async def live() -> list[str]:
    """The names of the live tasks, for the test to wait for."""
    return [
        info.name for info in global_task_manager.get_all_task_info().values() if not info.status.is_final
    ]
