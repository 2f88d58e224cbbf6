"""An application of Starlette that does not know of this library: it is not to be changed for it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

if TYPE_CHECKING:
    from starlette.requests import Request

# Of the requests: their paths while they run, and how they ended.
running: list[str] = []
outcomes: dict[str, str] = {}


async def work(request: Request) -> JSONResponse:
    """What a client may leave."""
    path = request.url.path
    running.append(path)
    try:
        await asyncio.sleep(2)
        outcomes[path] = "finished"
    except asyncio.CancelledError:
        outcomes[path] = "cancelled"
        raise
    finally:
        running.remove(path)
    return JSONResponse("done")


async def live(request: Request) -> JSONResponse:
    """The requests that run, for the test to wait for."""
    return JSONResponse(running)


async def ended(request: Request) -> JSONResponse:
    """How the requests ended."""
    return JSONResponse(outcomes)


app = Starlette(
    routes=[
        Route("/live", live),
        Route("/ended", ended),
        Route("/{path:path}", work, methods=["POST"]),
    ]
)
