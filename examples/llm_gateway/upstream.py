"""Stands for a provider of language models: generates tokens slowly, and counts them.

It speaks the part of OpenAI's API that the gateway needs, and stops generating when its own client leaves, as
such servers do (vLLM, for one). What it generated for whom is on ``/debug/calls``.

Variables: ``FIRST_TOKEN`` (seconds before the first token, 0.8) and ``TOKENS_PER_SECOND`` (25).
"""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from examples.three_services.shared import TELEMETRY, set_up_telemetry

FIRST_TOKEN = float(os.environ.get("FIRST_TOKEN", "0.8"))
TOKENS_PER_SECOND = float(os.environ.get("TOKENS_PER_SECOND", "25"))

send_the_rest = set_up_telemetry("upstream")
app = FastAPI(title="Upstream", telemetry=TELEMETRY, on_shutdown=[send_the_rest])


@dataclass
class Call:
    """One request; times are seconds since the epoch."""

    user: str
    tokens: list[float] = field(default_factory=list)
    ended_at: float | None = None


calls: list[Call] = []


class Completion(BaseModel):
    """The body of a request for a completion."""

    model: str
    messages: list[dict[str, Any]]
    stream: bool = False
    max_tokens: int = 50
    user: str = ""


class Embedding(BaseModel):
    """The body of a request for an embedding."""

    model: str
    input: str
    user: str = ""


@app.post("/v1/chat/completions", response_model=None)
async def complete(body: Completion, request: Request) -> StreamingResponse | dict[str, Any]:
    call = Call(body.user)
    calls.append(call)
    if body.stream:
        # Starlette cancels the generator when the client leaves.
        return StreamingResponse(events(call, body), media_type="text/event-stream")
    words = [token async for token in generate(call, body.max_tokens, request)]
    message = {"role": "assistant", "content": "".join(words)}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return envelope(body.model, "chat.completion", choice) | {"usage": usage(call)}


async def generate(call: Call, count: int, request: Request | None = None) -> AsyncIterator[str]:
    """Yield tokens until all are there or the client is gone."""
    try:
        await asyncio.sleep(FIRST_TOKEN)
        for number in range(count):
            if request is not None and await request.is_disconnected():
                return
            call.tokens.append(time.time())
            yield f"token-{number} "
            await asyncio.sleep(1 / TOKENS_PER_SECOND)
    finally:
        call.ended_at = time.time()


async def events(call: Call, body: Completion) -> AsyncIterator[str]:
    """Yield server-sent events, a token in each; the last but one has the usage."""
    async for token in generate(call, body.max_tokens):
        choice = {"index": 0, "delta": {"content": token}, "finish_reason": None}
        yield f"data: {json.dumps(envelope(body.model, 'chat.completion.chunk', choice))}\n\n"
    end = {"index": 0, "delta": {}, "finish_reason": "stop"}
    last = envelope(body.model, "chat.completion.chunk", end) | {"usage": usage(call)}
    yield f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n"


def envelope(model: str, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "object": kind, "created": 0, "model": model, "choices": [choice]}


def usage(call: Call) -> dict[str, int]:
    return {"prompt_tokens": 10, "completion_tokens": len(call.tokens), "total_tokens": 10 + len(call.tokens)}


@app.post("/v1/embeddings")
async def embed(body: Embedding) -> dict[str, Any]:
    call = Call(body.user)
    calls.append(call)
    try:
        await asyncio.sleep(FIRST_TOKEN)
    finally:
        call.ended_at = time.time()
    vector = {"object": "embedding", "index": 0, "embedding": [0.25, 0.5]}
    tokens = {"prompt_tokens": 10, "total_tokens": 10}
    return {"object": "list", "model": body.model, "data": [vector], "usage": tokens}


@app.get("/debug/calls", include_in_schema=False)
async def all_calls() -> list[dict[str, Any]]:
    return [asdict(call) for call in calls]
