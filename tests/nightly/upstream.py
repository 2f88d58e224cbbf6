"""An HTTP server that sends back the token that it gets, as slowly as it is asked to."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, StreamingResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

app = FastAPI()
together = asyncio.Barrier(5)


@app.get("/echo/{token}")
async def echo(token: str, seconds: float = 0) -> PlainTextResponse:
    """Send the token after a while."""
    await asyncio.sleep(seconds)
    return PlainTextResponse(token)


@app.get("/stream/{token}")
async def stream(token: str, seconds: float = 0) -> StreamingResponse:
    """Send the token line by line."""

    async def lines() -> AsyncIterator[str]:
        for _ in range(10):
            yield f"{token}\n"
            await asyncio.sleep(seconds / 10)

    return StreamingResponse(lines(), media_type="text/plain")


@app.post("/post")
async def post(request: Request, seconds: float = 0) -> PlainTextResponse:
    """Send back the body."""
    body = await request.body()
    await asyncio.sleep(seconds)
    return PlainTextResponse(body)


@app.get("/together/{token}")
async def wait_for_others(token: str) -> PlainTextResponse:
    """Answer when five requests are here."""
    async with asyncio.timeout(10):
        await together.wait()
    return PlainTextResponse(token)
