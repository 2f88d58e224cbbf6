"""docs/howto/proxy.md with a real nginx and HAProxy, where they are installed: who passes a hang-up on?"""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

import httpx
import pytest

from tests.blocks import ENVIRONMENT, ROOT
from tests.nginx import nginx_command
from tests.processes import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

T = TypeVar("T")

pytestmark = pytest.mark.e2e

TEXT = (ROOT / "docs" / "howto" / "proxy.md").read_text("utf-8")
(NGINX,) = re.findall(r"^```nginx\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
(HAPROXY,) = re.findall(r"^```haproxy\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
(APP,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
# The handler's seconds, in place of the page's 10: enough for a hang-up to arrive on a busy machine.
PATIENCE = 3.0
DEADLINE = 60.0
STREAM = """

from fastapi.responses import StreamingResponse

from otel_tasks import create_task


@app.get("/events")
async def events():
    async def lines():
        yield "data: first\\n\\n"
        await create_task(asyncio.sleep(10), name="slow")

    return StreamingResponse(lines(), media_type="text/event-stream")


def show(event, info):
    if event == "created":
        print("created", info.name)


manager.add_listener(show)
"""


@contextmanager
def running(command: list[str], port: int, log: Path) -> Iterator[None]:
    """A process that listens at ``port``; ended by its own id."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=log.parent, env=ENVIRONMENT | SERVICE, stdout=file, stderr=file
        )
    try:
        until(lambda: listens(process, port, log), log)
        yield
    finally:
        process.terminate()
        process.wait(timeout=DEADLINE)


def listens(process: subprocess.Popen[bytes], port: int, log: Path) -> bool:
    """Whether the process accepts connections; fail when it has ended."""
    assert process.poll() is None, log.read_text()
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def until(look: Callable[[], T], log: Path) -> T:
    """Return the first true result of ``look``; fail with the log when it does not come."""
    end = time.monotonic() + DEADLINE
    while not (found := look()):
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.02)
    return found


SERVICE = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """The page's own check behind uvicorn: its port, and the file with what it prints."""
    tmp_path = tmp_path_factory.mktemp("app")
    (tmp_path / "app.py").write_text(APP.replace("sleep(10)", f"sleep({PATIENCE})") + STREAM)
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "app:app", "--port", str(port), "--no-access-log"]
    with running(command, port, tmp_path / "app.log"):
        yield port, tmp_path / "app.log"


def nginx(tmp_path: Path, port: int, *changes: tuple[str, str]) -> tuple[list[str], int]:
    """The page's configuration with the app's port, a free one to listen at, and changes."""
    listening = free_port()
    servers = NGINX.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    servers = servers.replace("listen 8080", f"listen 127.0.0.1:{listening}")
    for old, new in changes:
        assert old in servers
        servers = servers.replace(old, new)
    return nginx_command(tmp_path, servers), listening


def haproxy(tmp_path: Path, port: int, *changes: tuple[str, str]) -> tuple[list[str], int]:
    """The same for HAProxy."""
    if shutil.which("haproxy") is None:
        pytest.skip("haproxy is not installed")
    listening = free_port()
    text = HAPROXY.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace(":8080", f":{listening}")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "haproxy.cfg").write_text(text)
    return ["haproxy", "-db", "-f", str(tmp_path / "haproxy.cfg")], listening


def said_after_hang_up(log: Path, port: int, path: str = "/debug/slow", *, http2: bool = False) -> str:
    """What the service prints of a task whose client leaves once it is there."""
    begin = len(log.read_text())

    def printed(pattern: str) -> re.Match[str] | None:
        return re.search(pattern, log.read_text()[begin:], re.MULTILINE)

    url = f"http://127.0.0.1:{port}{path}"
    asyncio.run(hang_up(url, lambda: printed("^created slow$"), log, http2=http2))
    found = until(lambda: printed("^slow .*$"), log)
    assert found is not None
    return found[0]


async def hang_up(url: str, begun: Callable[[], object], log: Path, *, http2: bool) -> None:
    """Send a request, and leave in the middle of it."""

    async def ask() -> None:
        # Prior knowledge: the proxy speaks HTTP/2 in clear here.
        async with (
            httpx.AsyncClient(http1=not http2, http2=http2, timeout=DEADLINE, trust_env=False) as client,
            client.stream("GET", url) as answer,
        ):
            async for _ in answer.aiter_bytes():
                pass

    asking = asyncio.create_task(ask())
    await asyncio.to_thread(until, begun, log)
    # The service watches a request that is older than 60 ms.
    await asyncio.sleep(0.1)
    asking.cancel()
    await asyncio.wait([asking])
    assert asking.cancelled(), asking


GONE = "slow cancelled client_disconnect"
UNSEEN = "slow completed None"


@pytest.mark.parametrize("path", ["/debug/slow", "/events"])
def test_nginx_as_on_the_page_passes_a_hang_up_on(tmp_path: Path, app: tuple[int, Path], path: str) -> None:
    """With the page's configuration the request's task is cancelled, before a response and in a stream."""
    command, port = nginx(tmp_path, app[0])
    with running(command, port, tmp_path / "nginx.out"):
        assert said_after_hang_up(app[1], port, path) == GONE


def test_nginx_passes_a_reset_stream_on(tmp_path: Path, app: tuple[int, Path]) -> None:
    """A client of HTTP/2 that resets its stream is gone, too."""
    command, port = nginx(tmp_path, app[0], (";\n\n    location / {", " http2;\n\n    location / {"))
    with running(command, port, tmp_path / "nginx.out"):
        assert said_after_hang_up(app[1], port, http2=True) == GONE


def test_nginx_that_ignores_aborts_hides_a_hang_up(tmp_path: Path, app: tuple[int, Path]) -> None:
    """The setting that the page warns of does what the page says."""
    change = ("proxy_ignore_client_abort off", "proxy_ignore_client_abort on")
    command, port = nginx(tmp_path, app[0], change)
    with running(command, port, tmp_path / "nginx.out"):
        assert said_after_hang_up(app[1], port) == UNSEEN


def test_nginx_that_caches_hides_a_hang_up(tmp_path: Path, app: tuple[int, Path]) -> None:
    """A response that is wanted for the cache is waited for."""
    cache = f"proxy_cache_path {tmp_path}/cache keys_zone=c:1m;\nupstream app"
    changes = [
        ("upstream app", cache),
        ("location / {", "location / { proxy_cache c; proxy_cache_valid 200 1m;"),
    ]
    command, port = nginx(tmp_path, app[0], *changes)
    with running(command, port, tmp_path / "nginx.out"):
        assert said_after_hang_up(app[1], port) == UNSEEN


@pytest.mark.parametrize("passes_on", [True, False])
def test_haproxy_needs_an_option(tmp_path: Path, app: tuple[int, Path], passes_on: bool) -> None:
    """HAProxy passes a hang-up on only with `option abortonclose` in the defaults."""
    changes = [] if passes_on else [("    option abortonclose\n", "")]
    command, port = haproxy(tmp_path, app[0], *changes)
    with running(command, port, tmp_path / "haproxy.out"):
        assert said_after_hang_up(app[1], port) == (GONE if passes_on else UNSEEN)
