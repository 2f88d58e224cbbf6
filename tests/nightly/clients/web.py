"""httpx, httpx2, and aiohttp."""

from __future__ import annotations

import asyncio
import importlib
from typing import TYPE_CHECKING, Any

from tests.nightly.clients.base import POOL_SIZE, POOL_TIMEOUT, only

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.nightly.clients.base import Operations


class Httpx:
    """httpx, with one client for all requests."""

    module = "httpx"

    def __init__(self, backend: str) -> None:
        httpx = importlib.import_module(self.module)
        limits = httpx.Limits(max_connections=POOL_SIZE, max_keepalive_connections=POOL_SIZE)
        self.client: Any = httpx.AsyncClient(base_url=backend, limits=limits, timeout=POOL_TIMEOUT)

    async def open(self) -> None:
        (await self.client.get("/echo/ready")).raise_for_status()

    async def close(self) -> None:
        await self.client.aclose()

    def operations(self) -> Operations:
        return {"get": self.get, "post": self.post, "stream": self.stream, "upload": self.upload}

    async def get(self, token: str, seconds: float) -> str:
        answer = await self.client.get(f"/echo/{token}", params={"seconds": seconds})
        return str(answer.raise_for_status().text)

    async def post(self, token: str, seconds: float) -> str:
        answer = await self.client.post("/post", params={"seconds": seconds}, content=token)
        return str(answer.raise_for_status().text)

    async def upload(self, token: str, seconds: float) -> str:
        answer = await self.client.post("/post", content=_in_parts(token, seconds))
        return only(set(answer.raise_for_status().text.split()))

    async def stream(self, token: str, seconds: float) -> str:
        async with self.client.stream("GET", f"/stream/{token}", params={"seconds": seconds}) as answer:
            return only({line async for line in answer.raise_for_status().aiter_lines()})

    async def hold(self, token: str, together: asyncio.Barrier) -> str:
        # The server answers once five requests are there; that makes five connections.
        answer = (await self.client.get(f"/together/{token}")).raise_for_status()
        await together.wait()
        return str(answer.text)

    async def leftovers(self) -> list[str]:
        return []


class Httpx2(Httpx):
    """httpx2, which goes on where httpx stopped."""

    module = "httpx2"


class Aiohttp:
    """aiohttp's client, with one session for all requests."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    async def open(self) -> None:
        import aiohttp

        self.session = aiohttp.ClientSession(
            self.backend,
            connector=aiohttp.TCPConnector(limit=POOL_SIZE),
            timeout=aiohttp.ClientTimeout(total=POOL_TIMEOUT),
            raise_for_status=True,
        )

    async def close(self) -> None:
        await self.session.close()

    def operations(self) -> Operations:
        return {"get": self.get, "post": self.post, "stream": self.stream, "upload": self.upload}

    async def get(self, token: str, seconds: float) -> str:
        async with self.session.get(f"/echo/{token}", params={"seconds": seconds}) as answer:
            return str(await answer.text())

    async def post(self, token: str, seconds: float) -> str:
        async with self.session.post("/post", params={"seconds": seconds}, data=token.encode()) as answer:
            return str(await answer.text())

    async def upload(self, token: str, seconds: float) -> str:
        async with self.session.post("/post", data=_in_parts(token, seconds)) as answer:
            return only(set((await answer.text()).split()))

    async def stream(self, token: str, seconds: float) -> str:
        async with self.session.get(f"/stream/{token}", params={"seconds": seconds}) as answer:
            return only({line.decode().strip() async for line in answer.content})

    async def hold(self, token: str, together: asyncio.Barrier) -> str:
        async with self.session.get(f"/together/{token}") as answer:
            await together.wait()
            return str(await answer.text())

    async def leftovers(self) -> list[str]:
        return []


async def _in_parts(token: str, seconds: float) -> AsyncIterator[bytes]:
    for _ in range(10):
        yield f"{token} ".encode()
        await asyncio.sleep(seconds / 10)
