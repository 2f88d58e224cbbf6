"""The claims of docs/comparison.md: polling for a disconnect, listening for it by hand, and the one line."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import Depends, FastAPI, Request
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint

from otel_tasks.fastapi import TaskGroupMiddleware, cancel_handler_on_disconnect
from tests.blocks import python_blocks

from .serving import AGE, DEADLINE, Site, served

if TYPE_CHECKING:
    from starlette.responses import Response

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]

(BY_HAND,) = [block for block in python_blocks("docs/comparison.md") if "unless_disconnected" in block]
POLLS = 10


async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """Do nothing, as a middleware that only measures or logs does."""
    return await call_next(request)


class Seen(list[str]):
    """How handlers have ended, and whether one has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = asyncio.Event()


def polling_app(seen: Seen, *, every: float = AGE) -> FastAPI:
    """Build an application whose handlers poll `is_disconnected()`, and note how they end."""
    app = FastAPI()

    async def poll(request: Request) -> None:
        seen.begun.set()
        try:
            for _ in range(POLLS):
                if await request.is_disconnected():
                    seen.append("saw it")
                    return
                await asyncio.sleep(every)
            seen.append("never saw it")
        except asyncio.CancelledError:
            seen.append("was cancelled")
            raise

    @app.get("/search")
    async def search(request: Request) -> None:
        await poll(request)

    @app.post("/reports")
    async def reports(request: Request, report: dict[str, int]) -> None:
        await poll(request)

    return app


async def hang_up(site: Site, method: str, seen: Seen) -> None:
    """Send a request, a POST with a JSON body, and hang up while the handler works."""
    _, writer = await asyncio.open_connection("127.0.0.1", site.port)
    if method == "GET":
        writer.write(b"GET /search HTTP/1.1\r\nHost: x\r\n\r\n")
    else:
        writer.write(
            b"POST /reports HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b'Content-Length: 11\r\n\r\n{"pages":1}'
        )
    async with asyncio.timeout(DEADLINE):
        await seen.begun.wait()
    await asyncio.sleep(AGE)
    writer.transport.abort()
    await site.wait_until_idle()


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_polling_sees_the_disconnect_of_a_plain_application(method: str) -> None:
    """Without a `BaseHTTPMiddleware`, `is_disconnected()` becomes true."""
    seen = Seen()
    async with served(polling_app(seen)) as site:
        await hang_up(site, method, seen)
    assert seen == ["saw it"]


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_polling_behind_base_http_middleware_never_sees_the_disconnect(method: str) -> None:
    """Behind a `BaseHTTPMiddleware`, `is_disconnected()` stays false until the handler has ended."""
    seen = Seen()
    app = polling_app(seen)
    app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    async with served(app) as site:
        await hang_up(site, method, seen)
    assert seen == ["never saw it"]


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("place", ["inside", "outside"])
async def test_one_line_stops_the_handler_behind_base_http_middleware(place: str, method: str) -> None:
    """The middleware stops the same handlers, on either side of the `BaseHTTPMiddleware`."""
    seen = Seen()
    # A poll that comes before the middleware's own look would end the handler.
    app = polling_app(seen, every=DEADLINE)
    if place == "inside":
        app.add_middleware(TaskGroupMiddleware, cancel_handler=True)
    app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    if place == "outside":
        app.add_middleware(TaskGroupMiddleware, cancel_handler=True)
    async with served(app) as site:
        await hang_up(site, method, seen)
    assert seen == ["was cancelled"]


@pytest.mark.parametrize(("place", "end"), [("inside", "saw it"), ("outside", "never saw it")])
async def test_by_default_a_post_runs_on(place: str, end: str) -> None:
    """By default, the handler of a POST runs on; on the inner side, polling works again."""
    seen = Seen()
    app = polling_app(seen)
    if place == "inside":
        app.add_middleware(TaskGroupMiddleware)
    app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    if place == "outside":
        app.add_middleware(TaskGroupMiddleware)
    async with served(app) as site:
        await hang_up(site, "POST", seen)
    assert seen == [end]


async def test_dependency_stops_a_post_of_one_route() -> None:
    """`Depends(cancel_handler_on_disconnect)` stops the handler of one route, whatever its method."""
    seen = Seen()
    app = FastAPI()
    polling = polling_app(seen, every=DEADLINE)
    app.include_router(polling.router, dependencies=[Depends(cancel_handler_on_disconnect)])
    app.add_middleware(TaskGroupMiddleware)
    app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    async with served(app) as site:
        await hang_up(site, "POST", seen)
    assert seen == ["was cancelled"]


@pytest.mark.parametrize("behind", [False, True])
async def test_twenty_lines_by_hand_stop_the_work(behind: bool) -> None:
    """The page's twenty lines stop their work on a disconnect, behind a `BaseHTTPMiddleware` too."""
    names: dict[str, Any] = {}
    exec(BY_HAND, names)  # noqa: S102  # the page's own code
    seen = Seen()

    async def build(report: dict[str, int]) -> None:
        seen.begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    names["build"] = build
    app: FastAPI = names["app"]
    if behind:
        app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    async with served(app) as site:
        await hang_up(site, "POST", seen)
    assert seen == ["cancelled"]

    (function,) = re.findall(
        r"^async def unless_disconnected.*?(?=\n\n\n)", BY_HAND, re.MULTILINE | re.DOTALL
    )
    assert 15 <= len([line for line in function.splitlines() if line.strip()]) <= 22
