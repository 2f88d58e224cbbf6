"""The suppliers, as one service: a quote is what they have in stock, and what it costs.

The end of the line: nothing is called from here, and what runs is what a departed customer would have left
behind.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException

from examples.three_services.shared import TELEMETRY, debug_routes, set_up_telemetry
from otel_tasks import TaskManager, TaskPriority
from otel_tasks.fastapi import RequestTasks, TaskGroupMiddleware, make_lifespan

PRICES = {
    "acme": {"lamp": 39, "desk": 210, "wardrobe": 880, "sofa": 1190},
    "globex": {"lamp": 42, "desk": 195, "wardrobe": 920, "sofa": 1090},
}
# No supplier stocks these: a workshop has to answer, which takes time.
MADE_TO_ORDER = {"wardrobe", "sofa"}

send_the_rest = set_up_telemetry("suppliers")
manager = TaskManager("suppliers")


@asynccontextmanager
async def connections(_: FastAPI) -> AsyncIterator[None]:
    yield
    await send_the_rest()


app = FastAPI(
    title="Suppliers",
    telemetry=TELEMETRY,
    lifespan=make_lifespan(connections, manager=manager, grace=1.0, timeout=5.0),
)
app.add_middleware(TaskGroupMiddleware, manager=manager)
app.include_router(debug_routes(manager))


@app.get("/quotes/{item}")
async def quote(item: str, supplier: str, tasks: RequestTasks) -> dict[str, Any]:
    if item not in PRICES.get(supplier, {}):
        raise HTTPException(404, f"{supplier!r} has no {item!r}")
    price = tasks.create_task(calculate(supplier, item), name="calculate", priority=TaskPriority.HIGH)
    stock = tasks.create_task(count_stock(item), name="count_stock")
    return {"supplier": supplier, "price": await price, "in_stock": await stock}


async def calculate(supplier: str, item: str) -> int:
    await asyncio.sleep(30.0 if item in MADE_TO_ORDER else 0.1)
    return PRICES[supplier][item]


async def count_stock(item: str) -> int:
    await asyncio.sleep(0.05)
    return 0 if item in MADE_TO_ORDER else 7
