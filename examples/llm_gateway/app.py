"""A gateway to language models, the way a team might build it: OpenAI's API, keys, limits, usage records.

Run it with ``UPSTREAM_URL=... uvicorn examples.llm_gateway.app:app``, or see it work with ``make demo-llm``.

One line makes a hang-up stop the work: the `TaskGroupMiddleware` in (1). The handler ends, its call to the
upstream ends with it, and the upstream generates no more. The usage record must survive the hang-up (2).
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import httpx
from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict
from starlette.middleware.base import RequestResponseEndpoint
from starlette.middleware.cors import CORSMiddleware

from examples.llm_gateway.errors import ApiError, api_error, handle_errors
from examples.three_services.shared import TELEMETRY, connect, debug_routes, set_up_telemetry
from otel_tasks import TaskGroup, TaskManager, TaskPriority, create_task
from otel_tasks.fastapi import TaskGroupMiddleware, make_lifespan, uncancellable

manager = TaskManager("gateway")
# The calls that the upstream accepts at a time, from all tenants together.
at_upstream = manager.get_group("upstream", max_concurrency=25)


@dataclass
class Tenant:
    """The owner of a key, and what its plan allows."""

    name: str
    priority: TaskPriority
    max_concurrency: int
    max_queue: int

    @property
    def group(self) -> TaskGroup:
        """The group whose places its calls take."""
        return manager.get_group(
            f"tenants.{self.name}", max_concurrency=self.max_concurrency, max_queue=self.max_queue
        )


TENANTS = {
    "sk-pro": Tenant("pro", TaskPriority.HIGH, max_concurrency=20, max_queue=100),
    "sk-free": Tenant("free", TaskPriority.LOW, max_concurrency=10, max_queue=20),
}
# Seconds that each model may stay silent: before its first token, or between two tokens.
MODELS = {"small": 5.0, "large": 30.0}

# --- 1. The application ----------------------------------------------------------------------------------

send_the_rest = set_up_telemetry("gateway")


@asynccontextmanager
async def resources(app: FastAPI) -> AsyncIterator[None]:
    async with connect(os.environ.get("UPSTREAM_URL", "http://127.0.0.1:8001")) as app.state.upstream:
        yield
    await send_the_rest()


app = FastAPI(
    title="LLM gateway",
    telemetry=TELEMETRY,
    lifespan=make_lifespan(resources, manager=manager, request_grace=10.0),
)
app.include_router(debug_routes(manager))
handle_errors(app)


@app.middleware("http")
async def name_server(request: Request, call_next: RequestResponseEndpoint) -> Response:
    response = await call_next(request)
    response.headers["x-served-by"] = "llm-gateway"
    return response


app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])
if os.environ.get("MIDDLEWARE") != "off":  # for comparison
    app.add_middleware(TaskGroupMiddleware, manager=manager, cancel_handler="safe, POST /v1/*")

# --- 2. Keys, limits, and usage --------------------------------------------------------------------------


async def authenticate(authorization: Annotated[str, Header()] = "") -> Tenant:
    tenant = TENANTS.get(authorization.removeprefix("Bearer "))
    if tenant is None:
        raise ApiError(401, "invalid_api_key", "the API key is not known")
    return tenant


async def admit(tenant: Annotated[Tenant, Depends(authenticate)]) -> AsyncIterator[Tenant]:
    """Hold a place of the tenant and one at the upstream until the response is complete."""
    async with hold(tenant.group), hold(at_upstream, tenant.priority):
        yield tenant


@asynccontextmanager
async def hold(group: TaskGroup, priority: TaskPriority = TaskPriority.NORMAL) -> AsyncIterator[None]:
    """Hold one of a group's places: wait for it in the group's queue, and give it back after the block."""
    granted, done = asyncio.Event(), asyncio.Event()

    async def occupy() -> None:
        granted.set()
        await done.wait()

    task = group.create_task(occupy(), name=f"place in {group.name}", priority=priority)
    try:
        await granted.wait()
        yield
    finally:
        done.set()
        if not granted.is_set():
            task.cancel()  # the client has left the queue


@dataclass
class Usage:
    """The tokens that one call has used so far."""

    tenant: str
    model: str = ""
    user: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    complete: bool = False


# Stands for the database.
usage_records: list[Usage] = []


async def record(usage: Usage) -> None:
    await asyncio.sleep(0.02)
    usage_records.append(usage)


async def metered(tenant: Annotated[Tenant, Depends(admit)]) -> AsyncIterator[Usage]:
    """Record what the call has used, however it ends: a disconnect does not reach the block."""
    usage = Usage(tenant.name)
    try:
        yield usage
    finally:
        if usage.model:
            async with uncancellable():
                await record(usage)


Metered = Annotated[Usage, Depends(metered)]

# --- 3. The API ------------------------------------------------------------------------------------------


class Body(BaseModel):
    """The parameters that the gateway reads; the others pass through."""

    model_config = ConfigDict(extra="allow")

    model: str
    user: str = ""


class ChatBody(Body):
    """The body of a request for a completion."""

    messages: list[dict[str, Any]]
    stream: bool = False


@app.post("/v1/chat/completions", response_model=None)
async def complete(body: ChatBody, usage: Metered) -> StreamingResponse | dict[str, Any]:
    chunks = generate(body, usage)
    if not body.stream:
        return await create_task(merge(chunks, usage), name="merge")
    # Wait for it before the response starts: an error of the upstream still has a status of its own.
    first = await anext(chunks)
    return StreamingResponse(events(first, chunks), media_type="text/event-stream")


async def generate(body: ChatBody, usage: Usage) -> AsyncIterator[dict[str, Any]]:
    """Yield the upstream's chunks. A plain answer is made of them too, so that each token is counted."""
    timeout = start(usage, body)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async with app.state.upstream.stream(
        "POST", "/v1/chat/completions", json=body.model_dump(exclude_unset=True) | options, timeout=timeout
    ) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                usage.completion_tokens += text_of(chunk) != ""
                if total := chunk.get("usage"):
                    usage.prompt_tokens, usage.complete = total["prompt_tokens"], True
                yield chunk


def start(usage: Usage, body: Body) -> float:
    """Note what the call is for; returns the model's timeout."""
    if body.model not in MODELS:
        raise ApiError(404, "model_not_found", f"the model {body.model!r} does not exist")
    usage.model, usage.user = body.model, body.user
    return MODELS[body.model]


def text_of(chunk: dict[str, Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])


async def merge(chunks: AsyncIterator[dict[str, Any]], usage: Usage) -> dict[str, Any]:
    """Make one answer of all chunks."""
    text, chunk = "", {}
    async for chunk in chunks:
        text += text_of(chunk)
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    total = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
    total["total_tokens"] = sum(total.values())
    return chunk | {"object": "chat.completion", "choices": [choice], "usage": total}


async def events(first: dict[str, Any], chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """Yield server-sent events. After the first one, an error is an event too."""
    yield f"data: {json.dumps(first)}\n\n"
    try:
        async for chunk in chunks:
            yield f"data: {json.dumps(chunk)}\n\n"
    except httpx.HTTPError as error:
        yield f"data: {json.dumps(api_error(error).body)}\n\n"
    yield "data: [DONE]\n\n"


@app.post("/v1/embeddings")
async def embed(body: Body, usage: Metered) -> dict[str, Any]:
    timeout = start(usage, body)
    json_body = body.model_dump(exclude_unset=True)
    response = await app.state.upstream.post("/v1/embeddings", json=json_body, timeout=timeout)
    result: dict[str, Any] = response.raise_for_status().json()
    usage.prompt_tokens, usage.complete = result["usage"]["prompt_tokens"], True
    return result


@app.get("/debug/usage", include_in_schema=False)
async def all_usage() -> list[dict[str, Any]]:
    return [asdict(usage) for usage in usage_records]
