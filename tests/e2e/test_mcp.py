"""An MCP server in a FastAPI application, with the real client: a hang-up stops a call, and no session."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from mcp import Client

from otel_tasks import TaskManager
from tests.blocks import ENVIRONMENT, ROOT
from tests.processes import free_port

from .mcp_app import Journal, make_app
from .servers import COMPLAINT, eventually
from .serving import AGE, DEADLINE, served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from mcp.client.client import ConnectMode

    from .serving import Site

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]


HEADERS = {"Accept": "application/json, text/event-stream"}

# None is the application without the middleware: it must do the same.
rules = pytest.mark.parametrize("rule", [None, "safe", True], ids=["bare", "safe", "all"])
# With a session, and from the protocol's revision of 2026-07-28 on, in which each call is one request.
modes = pytest.mark.parametrize("mode", ["legacy", "2026-07-28"])


class Tools:
    """The running server, and what its tools did."""

    def __init__(self, site: Site, journal: Journal, manager: TaskManager) -> None:
        self.url = f"http://127.0.0.1:{site.port}/mcp/"
        self.journal = journal
        self.manager = manager


@asynccontextmanager
async def tools(rule: bool | str | None) -> AsyncIterator[Tools]:
    """Serve the application; at its end nothing is left and nothing was logged."""
    journal, manager = Journal(), TaskManager()
    complaints: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: complaints.append(record.getMessage())  # type: ignore[method-assign]  # a list
    logging.getLogger().addHandler(handler)
    try:
        async with (
            asyncio.timeout(DEADLINE),
            served(make_app(journal, manager, cancel_handler=rule)) as site,
        ):
            yield Tools(site, journal, manager)
    finally:
        # sse-starlette's poll for the signal that ends a server; this one ends without.
        for task in asyncio.all_tasks():
            if getattr(task.get_coro(), "__name__", "") == "_shutdown_watcher":
                task.cancel()
        logging.getLogger().removeHandler(handler)
    assert complaints == []
    assert [info.id for info in manager.get_all_task_info().values() if not info.status.is_final] == []


@rules
@modes
async def test_session_outlives_the_request_that_opened_it(
    rule: bool | str | None, mode: ConnectMode
) -> None:
    """Calls after the opening request create tasks, and get their results."""
    async with tools(rule) as served_tools, Client(served_tools.url, mode=mode) as client:
        await asyncio.sleep(AGE)
        for number in range(3):
            result = await client.call_tool("add", {"a": number, "b": 1})
            assert result.structured_content == {"result": number + 1}


@rules
@modes
@pytest.mark.parametrize("tool", ["wait_itself", "wait_for_task"])
async def test_cancelled_tool_call_stops(rule: bool | str | None, mode: ConnectMode, tool: str) -> None:
    """A call that its client cancels ends on the server, with the task it awaits; the session goes on."""
    async with tools(rule) as served_tools, Client(served_tools.url, mode=mode) as client:
        kind = "tool" if tool == "wait_itself" else "task"
        calling = asyncio.create_task(client.call_tool(tool))
        await served_tools.journal.wait_for(f"{kind} started")
        await asyncio.sleep(AGE)
        calling.cancel()
        await served_tools.journal.settles(f"{kind} cancelled")
        result = await client.call_tool("add", {"a": 1, "b": 1})
        assert result.structured_content == {"result": 2}


async def events(response: httpx.Response) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """The id and the message of each server-sent event."""
    number = ""
    async for line in response.aiter_lines():
        name, _, value = line.partition(": ")
        if name == "id":
            number = value
        elif name == "data" and value:
            yield number, json.loads(value)


@rules
async def test_dropped_stream_resumes(rule: bool | str | None) -> None:
    """A call whose stream is cut goes on in its session; its later events come with `Last-Event-ID`."""
    call = {"name": "count", "arguments": {}, "_meta": {"progressToken": "steps"}}
    async with tools(rule) as served_tools, httpx.AsyncClient(headers=HEADERS, trust_env=False) as client:
        session = await open_session(client, served_tools.url)
        seen, last_id = [], ""
        request = {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": call}
        async with client.stream("POST", served_tools.url, json=request, headers=session) as response:
            await served_tools.journal.wait_for("count started")
            async for last_id, message in events(response):  # noqa: B007  # used after the loop
                seen.append(message["params"]["progress"])
                if len(seen) == 2:
                    await asyncio.sleep(AGE)
                    break
        # The stream is closed here, in the middle of the call.
        await asyncio.sleep(AGE)
        assert "count cancelled" not in served_tools.journal.events

        last = session | {"Last-Event-ID": last_id}
        async with client.stream("GET", served_tools.url, headers=last) as response:
            served_tools.journal.release.set()
            resumed = events(response)
            assert (await anext(resumed))[1]["params"]["progress"] == 3
            assert (await anext(resumed))[1]["result"]["content"][0]["text"] == "counted"
        assert (await client.delete(served_tools.url, headers=session)).status_code == 200
    assert seen == [1, 2]


@rules
async def test_hang_up_on_the_listening_stream_keeps_the_session(rule: bool | str | None) -> None:
    """A client may close the stream on which it listens, and open it again."""
    async with tools(rule) as served_tools, httpx.AsyncClient(headers=HEADERS, trust_env=False) as client:
        session = await open_session(client, served_tools.url)
        for _ in range(2):
            async with client.stream("GET", served_tools.url, headers=session) as response:
                assert response.status_code == 200
                await asyncio.sleep(AGE)
            await asyncio.sleep(AGE)
        call = {"name": "add", "arguments": {"a": 1, "b": 2}}
        request = {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": call}
        async with client.stream("POST", served_tools.url, json=request, headers=session) as response:
            results = [message async for _, message in events(response)]
        assert results[-1]["result"]["structuredContent"] == {"result": 3}


@modes
@pytest.mark.parametrize("rule", ["safe", "all"])
def test_server_stops_with_open_calls(rule: str, mode: ConnectMode, tmp_path: Path) -> None:
    """A session, its listening stream, and a call in flight end with the server, which has nothing to log."""
    log = tmp_path / "log"
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "tests.e2e.mcp_app:create", "--factory", "--port", str(port)]
    # Without it, uvicorn waits for a call that is one request.
    command += ["--timeout-graceful-shutdown", "1"]
    environment = ENVIRONMENT | {"MCP_RULE": rule, "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        eventually(lambda: "running on" in log.read_text(), log.read_text)
        asyncio.run(stop_during_a_call(f"http://127.0.0.1:{port}/mcp/", mode, process, log))
    finally:
        process.kill()
        process.wait()
    lines = log.read_text().splitlines()
    assert "task cancelled" in lines
    own = "timeout graceful shutdown exceeded"
    assert [line for line in lines if COMPLAINT.search(line) and own not in line] == [], log.read_text()


async def stop_during_a_call(
    url: str, mode: ConnectMode, process: subprocess.Popen[bytes], log: Path
) -> None:
    """Call a tool, and end the server during the call."""

    async def call() -> None:
        async with Client(url, mode=mode) as client:
            await client.call_tool("wait_for_task")

    calling = asyncio.create_task(call())
    await asyncio.to_thread(eventually, lambda: "task started" in log.read_text(), log.read_text)
    await asyncio.sleep(AGE)
    process.terminate()
    await asyncio.to_thread(process.wait, DEADLINE)
    calling.cancel()
    # Its server is gone, as its errors say.
    await asyncio.gather(calling, return_exceptions=True)


async def open_session(client: httpx.AsyncClient, url: str) -> dict[str, str]:
    """Open a session; the headers of its requests."""
    hello = {
        "protocolVersion": "2025-11-25",
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "1"},
    }
    request = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello}
    async with client.stream("POST", url, json=request) as response:
        messages = [message async for _, message in events(response)]
    assert messages[-1]["result"]["serverInfo"]["name"] == "tools"
    session = {
        "Mcp-Session-Id": response.headers["mcp-session-id"],
        "Mcp-Protocol-Version": messages[-1]["result"]["protocolVersion"],
    }
    ready = {"jsonrpc": "2.0", "method": "notifications/initialized"}
    assert (await client.post(url, json=ready, headers=session)).status_code == 202
    return session
