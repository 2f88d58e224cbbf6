"""The best price for an item: all suppliers are queried at the same time.

Called by `gateway`, calls `suppliers`. When the gateway closes the connection, the handler, its tasks and
their calls end, and so on down the line.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, HTTPException

from examples.three_services.shared import NOT_FOUND, TELEMETRY, connect, debug_routes, set_up_telemetry
from otel_tasks import TaskManager
from otel_tasks.fastapi import RequestTasks, TaskGroupMiddleware, make_lifespan

SUPPLIERS = ("acme", "globex")

send_the_rest = set_up_telemetry("pricing")
suppliers = connect(os.environ.get("SUPPLIERS_URL", "http://127.0.0.1:8002"))
manager = TaskManager("pricing")


@asynccontextmanager
async def connections(_: FastAPI) -> AsyncIterator[None]:
    async with suppliers:
        yield
    await send_the_rest()


app = FastAPI(
    title="Pricing",
    telemetry=TELEMETRY,
    lifespan=make_lifespan(connections, manager=manager, grace=1.0, timeout=5.0),
)
app.add_middleware(TaskGroupMiddleware, manager=manager)
app.include_router(debug_routes(manager))


@app.get("/prices/{item}")
async def best_price(item: str, tasks: RequestTasks) -> dict[str, Any]:
    asked = [tasks.create_task(ask(supplier, item), name=supplier, timeout=40.0) for supplier in SUPPLIERS]
    # One supplier's bad day is not the others': the request's group isolates failures.
    answers = await asyncio.gather(*asked, return_exceptions=True)
    offers = [answer for answer in answers if isinstance(answer, dict)]
    if offers:
        return min(offers, key=lambda offer: offer["price"])
    if None in answers:
        raise HTTPException(404, f"no supplier has {item!r}")
    raise HTTPException(502, f"no supplier gave an answer: {answers[0]}")


async def ask(supplier: str, item: str) -> dict[str, Any] | None:
    answer = await suppliers.get(f"/quotes/{quote(item, safe='')}", params={"supplier": supplier})
    if answer.status_code == NOT_FOUND:
        return None
    offer: dict[str, Any] = answer.raise_for_status().json()
    return offer


@app.get("/delivery")
async def next_delivery() -> dict[str, str]:
    await asyncio.sleep(0.02)  # in place of a calendar query
    return {"day": "Thursday"}


@app.get("/extras")
async def what_others_bought() -> list[str]:
    await asyncio.sleep(0.03)  # in place of a query of the shop's figures
    return ["bulb", "felt pads"]
