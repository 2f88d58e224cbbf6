"""PyMongo."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from tests.nightly.clients.base import POOL_SIZE, POOL_TIMEOUT, only

if TYPE_CHECKING:
    from tests.nightly.clients.base import Operations


class Pymongo:
    """PyMongo's asyncio client."""

    def __init__(self, backend: str) -> None:
        from pymongo import AsyncMongoClient

        self.client: Any = AsyncMongoClient(
            backend, maxPoolSize=POOL_SIZE, minPoolSize=POOL_SIZE, waitQueueTimeoutMS=POOL_TIMEOUT * 1000
        )
        self.answers = self.client.clients.answers

    async def open(self) -> None:
        # FerretDB's cursors end with their connection, and a cancelled request closes its connection.
        self.has_cursors = not any(
            "ferretdb" in name for name in await self.client.admin.command("buildInfo")
        )

    async def close(self) -> None:
        await self.client.close()

    def operations(self) -> Operations:
        cursor = {"cursor": self.cursor} if self.has_cursors else {}
        return {"find": self.find, "insert": self.insert, "bulk": self.bulk, **cursor}

    async def find(self, token: str, seconds: float) -> str:
        await self.answers.update_one({"_id": token}, {"$set": {"token": token}}, upsert=True)
        await asyncio.sleep(seconds)
        return str((await self.answers.find_one({"_id": token}))["token"])

    async def insert(self, token: str, seconds: float) -> str:
        inserted = await self.answers.insert_one({"token": token})
        await asyncio.sleep(seconds)
        return str((await self.answers.find_one({"_id": inserted.inserted_id}))["token"])

    async def cursor(self, token: str, seconds: float) -> str:
        await self.answers.insert_many([{"token": token} for _ in range(20)])
        rows = self.answers.find({"token": token}, batch_size=3)
        found = set()
        async for row in rows:
            found.add(str(row["token"]))
            await asyncio.sleep(seconds / 20)
        return only(found)

    async def bulk(self, token: str, seconds: float) -> str:
        from pymongo import DeleteMany, InsertOne

        await self.answers.bulk_write([InsertOne({"bulk": token}) for _ in range(50)])
        await asyncio.sleep(seconds)
        found = {str(row["bulk"]) async for row in self.answers.find({"bulk": token}, batch_size=100)}
        await self.answers.bulk_write([DeleteMany({"bulk": token})])
        return only(found)

    async def hold(self, token: str, together: asyncio.Barrier) -> str:
        # PyMongo has no way to hold a connection.
        await together.wait()
        return await self.find(token, 0)

    async def leftovers(self) -> list[str]:
        return []
