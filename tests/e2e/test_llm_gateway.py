"""The example's gateway stops its upstream when a real client hangs up, and records what was generated."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

from examples.llm_gateway import app as gateway
from examples.llm_gateway import upstream
from otel_tasks import TaskPriority

from .serving import DEADLINE, Site, served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]

PROMPTLY = 0.5
"""Seconds in which the upstream stops after the hang-up; left alone, it would generate for hours."""

ENDLESS = 1_000_000
SMALL: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": "Hello"}]}
CHAT = "/v1/chat/completions"
KEY = "sk-test"


class Stage:
    """A gateway and its upstream, both served in this loop."""

    def __init__(self, site: Site, upstream_site: Site) -> None:
        self.site = site
        self.upstream_site = upstream_site
        self.url = f"http://127.0.0.1:{site.port}"

    def sdk(self, key: str = KEY) -> openai.AsyncOpenAI:
        """An asynchronous client that does not repeat what has failed."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def sdk_sync(self) -> openai.OpenAI:
        """The same, for threads."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    def http(self, key: str = KEY) -> httpx.AsyncClient:
        """A client that knows nothing of the API."""
        return httpx.AsyncClient(
            base_url=self.url, headers={"authorization": f"Bearer {key}"}, timeout=DEADLINE
        )

    async def calls(self, count: int) -> list[upstream.Call]:
        """Wait until the upstream has been called so often."""
        await until(lambda: len(upstream.calls) >= count)
        return upstream.calls

    async def nothing_is_left(self) -> None:
        """Wait until no request, no connection to the upstream in use, and no task is left."""
        async with asyncio.timeout(DEADLINE):
            await self.site.wait_until_idle()
            await self.upstream_site.wait_until_idle()
        await until(lambda: gateway.manager.stats().live == 0)


async def until(holds: Callable[[], object]) -> None:
    """Look again and again until it holds."""
    async with asyncio.timeout(DEADLINE):
        while not holds():  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0.005)


@asynccontextmanager
async def stage() -> AsyncIterator[Stage]:
    """Serve both, and look afterwards that nothing is left in either."""
    upstream.calls.clear()
    gateway.usage_records.clear()
    async with served(upstream.app) as upstream_site:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("UPSTREAM_URL", f"http://127.0.0.1:{upstream_site.port}")
            async with served(gateway.app) as site:
                found = Stage(site, upstream_site)
                yield found
                await found.nothing_is_left()


@pytest.fixture(autouse=True)
def pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast upstream, and a tenant with a key for the tests."""
    monkeypatch.setattr(upstream, "FIRST_TOKEN", 0.05)
    monkeypatch.setattr(upstream, "TOKENS_PER_SECOND", 100.0)
    monkeypatch.setitem(gateway.TENANTS, KEY, gateway.Tenant("test", TaskPriority.NORMAL, 10, 10))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """An upstream that thinks about its first token for hours."""
    monkeypatch.setattr(upstream, "FIRST_TOKEN", 3600.0)


# --- clients that leave ----------------------------------------------------------------------------------

# Each returns when its client has left. A timeout leaves time for the request to be watched, and more.
GIVE_UP = 0.4


async def openai_cancelled(stage: Stage, **body: Any) -> None:
    async with stage.sdk() as client:
        request = asyncio.create_task(client.chat.completions.create(**body))
        await stage.calls(1)
        await asyncio.sleep(GIVE_UP)
        request.cancel()
        await asyncio.wait([request])


async def openai_timeout(stage: Stage, **body: Any) -> None:
    async with stage.sdk() as client:
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(**body, timeout=GIVE_UP)


async def openai_close(stage: Stage, **body: Any) -> None:
    async with stage.sdk() as client:
        stream = await client.chat.completions.create(**body)
        for _ in range(10):
            await anext(stream)
        await stream.close()


async def openai_break(stage: Stage, **body: Any) -> None:
    async with stage.sdk() as client:
        async for _ in await client.chat.completions.create(**body):
            break


async def openai_stream_cancelled(stage: Stage, **body: Any) -> None:
    async def read() -> None:
        async for _ in await client.chat.completions.create(**body):
            read_some.set()

    read_some = asyncio.Event()
    async with stage.sdk() as client:
        reading = asyncio.create_task(read())
        await read_some.wait()
        await asyncio.sleep(GIVE_UP)
        reading.cancel()
        await asyncio.wait([reading])


def in_thread(leave: Callable[[openai.OpenAI, dict[str, Any]], None]) -> Callable[..., Awaitable[None]]:
    async def run(stage: Stage, **body: Any) -> None:
        with stage.sdk_sync() as client:
            await asyncio.to_thread(leave, client, body)

    return run


def sync_timeout(client: openai.OpenAI, body: dict[str, Any]) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(**body, timeout=GIVE_UP)


def sync_close(client: openai.OpenAI, body: dict[str, Any]) -> None:
    stream = client.chat.completions.create(**body)
    for _ in range(10):
        next(stream)
    stream.close()


def sync_break(client: openai.OpenAI, body: dict[str, Any]) -> None:
    with client.chat.completions.create(**body) as stream:
        for _ in stream:
            break


async def httpx_timeout(stage: Stage, **body: Any) -> None:
    async with stage.http() as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post(CHAT, json=body, timeout=GIVE_UP)


async def httpx_leaves_block(stage: Stage, **body: Any) -> None:
    async with stage.http() as client, client.stream("POST", CHAT, json=body) as response:
        async for line in response.aiter_lines():
            if line:
                break


async def curl(stage: Stage, **body: Any) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    json_body = httpx.Request("POST", stage.url, json=body).content.decode()
    headers = ("-H", f"authorization: Bearer {KEY}", "-H", "content-type: application/json")
    process = await asyncio.create_subprocess_exec(
        *("curl", "-sN", "-m", "1", *headers, "-d", json_body, stage.url + CHAT),
        stdout=asyncio.subprocess.PIPE,
    )
    await process.communicate()
    assert process.returncode == 28, "curl's code for a timeout"


WAYS = {
    "openai, cancelled": openai_cancelled,
    "openai, timeout": openai_timeout,
    "openai sync, timeout": in_thread(sync_timeout),
    "httpx, timeout": httpx_timeout,
    "curl": curl,
}
MID_STREAM = {
    "openai, cancelled": openai_stream_cancelled,
    "openai, close": openai_close,
    "openai, break": openai_break,
    "openai sync, close": in_thread(sync_close),
    "openai sync, break": in_thread(sync_break),
    "httpx, block left": httpx_leaves_block,
    "curl": curl,
}


async def hang_up(way: Callable[..., Awaitable[None]], *, stream: bool) -> None:
    """Let one client leave; the call stops promptly, its usage is recorded, nothing is left."""
    async with stage() as at:
        await way(at, **SMALL, stream=stream, max_tokens=ENDLESS, user="leaver")
        left_at = time.time()
        (call,) = await at.calls(1)
        await until(lambda: call.ended_at)
        assert call.ended_at is not None
        assert call.ended_at - left_at < PROMPTLY
        await until(lambda: gateway.usage_records)
        (record,) = gateway.usage_records
        assert (record.tenant, record.model, record.user) == ("test", "small", "leaver")
        assert not record.complete
        # A token may be under way when the connection is closed.
        assert len(call.tokens) - 3 <= record.completion_tokens <= len(call.tokens)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
async def test_hang_up_on_a_plain_answer_stops_the_upstream(way: Callable[..., Awaitable[None]]) -> None:
    """A client that waits for the whole answer leaves while the upstream generates."""
    await hang_up(way, stream=False)
    assert gateway.usage_records[0].completion_tokens > 0


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
async def test_hang_up_before_the_first_token_stops_the_upstream(
    way: Callable[..., Awaitable[None]], stream: bool
) -> None:
    """A client leaves while the upstream has not sent a token."""
    await hang_up(way, stream=stream)
    assert gateway.usage_records[0].completion_tokens == 0


@pytest.mark.parametrize("way", MID_STREAM.values(), ids=MID_STREAM)
async def test_hang_up_in_a_stream_stops_the_upstream(way: Callable[..., Awaitable[None]]) -> None:
    """A client leaves a stream after its first tokens."""
    await hang_up(way, stream=True)
    assert gateway.usage_records[0].completion_tokens > 0


async def test_hang_up_of_a_client_that_does_not_read_stops_the_upstream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gateway waits for the client to read on, and not for the upstream, when the client leaves."""
    monkeypatch.setattr(upstream, "generate", flood)
    async with stage() as at:
        body = {**SMALL, "stream": True, "user": "leaver"}
        request = httpx.Request(
            "POST", f"{at.url}{CHAT}", json=body, headers={"authorization": f"Bearer {KEY}"}
        )
        _, writer = await asyncio.open_connection("127.0.0.1", at.site.port, limit=1024)
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        writer.write(f"POST {CHAT} HTTP/1.1\r\n{head}\r\n".encode() + request.content)
        (call,) = await at.calls(1)
        sent = -1
        while sent < len(call.tokens):
            sent = len(call.tokens)
            await asyncio.sleep(GIVE_UP)
        assert not call.ended_at
        writer.transport.abort()
        left_at = time.time()
        await until(lambda: call.ended_at and gateway.usage_records)
        assert call.ended_at is not None
        assert call.ended_at - left_at < PROMPTLY
        assert gateway.usage_records[0].completion_tokens > 0


async def test_many_that_leave_their_streams_at_once_stop_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a stream's generators are when its client leaves, each call to the upstream is closed."""
    monkeypatch.setitem(gateway.TENANTS, KEY, gateway.Tenant("crowd", TaskPriority.NORMAL, 100, 0))
    monkeypatch.setattr(upstream, "TOKENS_PER_SECOND", 200.0)

    async def leave(at: Stage, number: int) -> None:
        body = {**SMALL, "stream": True, "max_tokens": ENDLESS, "user": str(number)}
        async with at.http() as client, client.stream("POST", CHAT, json=body) as response:
            read = 0
            async for line in response.aiter_lines():
                read += line != ""
                if read > number % 7:
                    break

    async with stage() as at:
        await asyncio.gather(*(leave(at, number) for number in range(20)))
        await until(lambda: all(call.ended_at for call in upstream.calls))
        await until(lambda: len(gateway.usage_records) == 20)
        assert len(upstream.calls) == 20


async def flood(call: upstream.Call, count: int, request: object = None) -> AsyncIterator[str]:
    """Generate as fast as the reader reads, and much at a time: no buffer takes it all."""
    try:
        for _ in range(ENDLESS):
            call.tokens.append(time.time())
            yield "token " * 20_000
            await asyncio.sleep(0)
    finally:
        call.ended_at = time.time()


async def test_hang_up_on_embeddings_stops_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding's call stops too, and its usage is recorded."""
    monkeypatch.setattr(upstream, "FIRST_TOKEN", GIVE_UP * 5)
    async with stage() as at, at.sdk() as client:
        with pytest.raises(openai.APITimeoutError):
            await client.embeddings.create(model="small", input="x", timeout=GIVE_UP)
        await until(lambda: gateway.usage_records)
        assert not upstream.calls[0].ended_at
        assert not gateway.usage_records[0].complete


# --- clients that stay -----------------------------------------------------------------------------------


async def test_answers_are_those_of_the_api() -> None:
    """The SDK gets a completion, a stream with its usage, and an embedding; each is recorded in full."""
    body: dict[str, Any] = {**SMALL, "max_tokens": 3}
    async with stage() as at, at.sdk() as client:
        plain = await client.chat.completions.create(**body)
        assert plain.choices[0].message.content == "token-0 token-1 token-2 "
        assert plain.usage is not None
        assert plain.usage.total_tokens == 13
        chunks = [chunk async for chunk in await client.chat.completions.create(**body, stream=True)]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == plain.choices[0].message.content
        embedding = await client.embeddings.create(model="small", input="x", encoding_format="float")
        assert embedding.data[0].embedding == [0.25, 0.5]
        await until(lambda: len(gateway.usage_records) == 3)
    assert [record.completion_tokens for record in gateway.usage_records] == [3, 3, 0]
    assert all(record.complete and record.prompt_tokens == 10 for record in gateway.usage_records)


async def test_other_middleware_works_beside_it() -> None:
    """CORS headers and those of a BaseHTTPMiddleware are on a plain answer and on a stream."""
    async with stage() as at, at.http() as client:
        for stream in (False, True):
            body = {**SMALL, "max_tokens": 1, "stream": stream}
            answer = await client.post(CHAT, json=body, headers={"origin": "https://example.org"})
            assert answer.headers["access-control-allow-origin"] == "*"
            assert answer.headers["x-served-by"] == "llm-gateway"
        assert answer.text.endswith("data: [DONE]\n\n")


# --- limits ----------------------------------------------------------------------------------------------


async def test_full_queue_answers_429_with_retry_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one call at work and one in the queue, the next is refused; the others get their answer."""
    monkeypatch.setitem(gateway.TENANTS, KEY, gateway.Tenant("narrow", TaskPriority.NORMAL, 1, 1))
    monkeypatch.setattr(upstream, "FIRST_TOKEN", GIVE_UP)
    async with stage() as at, at.sdk() as client:
        body: dict[str, Any] = {**SMALL, "max_tokens": 1}
        admitted = [asyncio.create_task(client.chat.completions.create(**body)) for _ in range(2)]
        await at.site.wait_for_calls(2)
        await at.calls(1)
        with pytest.raises(openai.RateLimitError) as refused:
            await client.chat.completions.create(**body)
        assert refused.value.response.headers["retry-after"] == "1"
        assert refused.value.code == "rate_limit_exceeded"
        await asyncio.gather(*admitted)
        await until(lambda: len(gateway.usage_records) == 2)
    assert len(upstream.calls) == 2


@pytest.mark.usefixtures("slow")
async def test_client_that_leaves_the_queue_is_never_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place in the queue is free again, and the upstream does not hear of it."""
    monkeypatch.setitem(gateway.TENANTS, KEY, gateway.Tenant("narrow", TaskPriority.NORMAL, 1, 1))
    async with stage() as at, at.http() as client:
        at_work = asyncio.create_task(client.post(CHAT, json=SMALL))
        await at.calls(1)
        for _ in range(2):
            with pytest.raises(httpx.ReadTimeout):
                await client.post(CHAT, json=SMALL, timeout=GIVE_UP)
            await at.site.wait_for_calls(1)
        at_work.cancel()
        await asyncio.wait([at_work])
        await at.nothing_is_left()
    assert len(upstream.calls) == 1
    assert len(gateway.usage_records) == 1


async def test_better_plan_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the calls that wait for the upstream, that of the higher priority is the next."""
    for name, priority in (("free", TaskPriority.LOW), ("pro", TaskPriority.HIGH)):
        monkeypatch.setitem(gateway.TENANTS, f"sk-{name}", gateway.Tenant(name, priority, 10, 10))
    monkeypatch.setattr(gateway.at_upstream, "max_concurrency", 1)
    monkeypatch.setattr(upstream, "FIRST_TOKEN", GIVE_UP)
    async with stage() as at, contextlib.AsyncExitStack() as clients:
        asked: list[asyncio.Task[httpx.Response]] = []
        for number, name in enumerate(["test", "free", "pro"], start=1):
            client = await clients.enter_async_context(at.http(f"sk-{name}"))
            body = {**SMALL, "max_tokens": 1, "user": name}
            asked.append(asyncio.create_task(client.post(CHAT, json=body)))
            await at.site.wait_for_calls(number)
        await asyncio.gather(*asked)
        assert [call.user for call in upstream.calls] == ["test", "pro", "free"]


# --- errors ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_silent_model_answers_504(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """A model that sends nothing within its timeout is an error in OpenAI's format; the call has stopped."""
    monkeypatch.setitem(gateway.MODELS, "small", 0.1)
    async with stage() as at, at.sdk() as client:
        with pytest.raises(openai.InternalServerError) as late:
            await client.chat.completions.create(**SMALL, stream=stream)
        assert late.value.status_code == 504
        assert late.value.code == "timeout"
        await until(lambda: upstream.calls[0].ended_at)
        await until(lambda: gateway.usage_records)


async def test_model_that_falls_silent_ends_the_stream_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first token the status is sent, so the error is an event; the SDK raises it."""
    monkeypatch.setattr(upstream, "TOKENS_PER_SECOND", 1 / 3600)
    monkeypatch.setitem(gateway.MODELS, "small", 0.3)
    async with stage() as at, at.sdk() as client:
        stream = await client.chat.completions.create(**SMALL, stream=True)
        assert (await anext(stream)).choices[0].delta.content == "token-0 "
        with pytest.raises(openai.APIError, match="took too long"):
            await anext(stream)
        await until(lambda: gateway.usage_records)
        assert gateway.usage_records[0].completion_tokens == 1


async def test_upstream_that_is_down_answers_502() -> None:
    """An upstream that cannot be reached is the gateway's error, in OpenAI's format."""
    with pytest.MonkeyPatch.context() as patched:
        async with stage() as at, at.sdk() as client:
            patched.setattr(gateway.app.state, "upstream", httpx.AsyncClient(base_url="http://127.0.0.1:1"))
            with pytest.raises(openai.InternalServerError) as failed:
                await client.chat.completions.create(**SMALL)
            assert failed.value.status_code == 502
            assert failed.value.code == "upstream_error"


async def test_bad_requests_are_refused_in_the_format_of_the_api() -> None:
    """A bad key, model, or body gets the error that the SDK knows, and no usage record."""
    huge: dict[str, Any] = {**SMALL, "model": "huge"}
    async with stage() as at:
        async with at.sdk("sk-unknown") as stranger:
            with pytest.raises(openai.AuthenticationError, match="API key"):
                await stranger.chat.completions.create(**SMALL)
        async with at.sdk() as client:
            with pytest.raises(openai.NotFoundError, match="huge"):
                await client.chat.completions.create(**huge)
            with pytest.raises(openai.BadRequestError, match="messages"):
                await client.chat.completions.create(**SMALL, extra_body={"messages": "none"})
        async with at.http() as client:
            answer = await client.post(CHAT, content=b"{")
            assert answer.status_code == 400
            assert answer.json()["error"]["type"] == "invalid_request_error"
    assert not gateway.usage_records
    assert not upstream.calls
