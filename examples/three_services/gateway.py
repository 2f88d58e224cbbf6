"""The shop's front door: what does this basket cost, when does it come, and what goes with it?

Each answer takes a call to `pricing`, and all of them run at once. A customer who closes the page ends this
handler and its tasks; with the tasks end their calls, and so `pricing` sees its own caller leave.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any
from urllib.parse import quote

import httpx
from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse

from examples.three_services.shared import NOT_FOUND, TELEMETRY, connect, debug_routes, set_up_telemetry
from otel_tasks import TaskManager, TaskPriority
from otel_tasks.fastapi import RequestTasks, TaskGroupMiddleware, make_lifespan

send_the_rest = set_up_telemetry("gateway")
pricing = connect(os.environ.get("PRICING_URL", "http://127.0.0.1:8001"))
# No more than that many calls at a time; who waits for a place goes by priority.
manager = TaskManager("gateway", max_concurrency=100)


@asynccontextmanager
async def connections(_: FastAPI) -> AsyncIterator[None]:
    async with pricing:
        yield
    await send_the_rest()


app = FastAPI(
    title="Gateway",
    telemetry=TELEMETRY,
    lifespan=make_lifespan(connections, manager=manager, grace=1.0, timeout=5.0),
)
app.add_middleware(TaskGroupMiddleware, manager=manager)
app.include_router(debug_routes(manager))


@app.get("/basket")
async def price_basket(
    item: Annotated[list[str], Query(min_length=1, max_length=20)], tasks: RequestTasks
) -> dict[str, Any]:
    # The customer waits for these: they come first. A span's name is the task's, never the customer's input.
    prices = [
        tasks.create_task(find_price(each), name="price", priority=TaskPriority.HIGH, timeout=50.0)
        for each in item
    ]
    delivery = tasks.create_task(find_delivery(), name="delivery")
    # Nice to have: the answer waits for it only so long.
    extras = tasks.create_task(find_extras(), name="extras", priority=TaskPriority.LOW, timeout=5.0)
    needed: list[asyncio.Task[Any]] = [*prices, delivery]
    await asyncio.wait([*needed, extras])
    goes_with_it = [] if extras.exception() else extras.result()
    # Retrieve all, although the first is enough to fail: asyncio logs exceptions that are never retrieved.
    for failure in filter(None, [task.exception() for task in needed]):
        raise failure
    costs = dict(zip(item, (price.result() for price in prices), strict=True))
    return {
        "total": sum(costs[each] or 0 for each in item),
        "not_to_be_had": [name for name, cost in costs.items() if cost is None],
        "delivery": delivery.result(),
        "extras": goes_with_it,
    }


async def find_price(item: str) -> int | None:
    answer = await pricing.get(f"/prices/{quote(item, safe='')}")
    if answer.status_code == NOT_FOUND:
        return None
    cost: int = answer.raise_for_status().json()["price"]
    return cost


async def find_delivery() -> str:
    answer = await pricing.get("/delivery")
    day: str = answer.raise_for_status().json()["day"]
    return day


async def find_extras() -> list[str]:
    answer = await pricing.get("/extras")
    extras: list[str] = answer.raise_for_status().json()
    return extras


@app.exception_handler(httpx.HTTPError)
async def pricing_has_failed(_: Request, error: httpx.HTTPError) -> JSONResponse:
    return JSONResponse({"detail": f"pricing gave no answer: {error}"}, status_code=502)
