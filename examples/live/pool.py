"""A pool with fewer connections than the shop wants: its tasks queue up at one line."""

import asyncio


class Pool:
    """Hands out connections.

    Args:
        size: The number of connections that are in use at the same time.
    """

    def __init__(self, size: int) -> None:
        self._free = asyncio.Semaphore(size)

    async def query(self, seconds: float) -> None:
        """Run one query that takes `seconds`, as soon as a connection is free."""
        await self.acquire()
        try:
            await asyncio.sleep(seconds)
        finally:
            self._free.release()

    async def acquire(self) -> None:
        """Wait for a connection."""
        await self._free.acquire()
