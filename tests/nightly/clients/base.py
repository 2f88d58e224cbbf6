"""What all the shared clients have in common."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio

Operations = Mapping[str, Callable[[str, float], Awaitable[str]]]
"""What a request can do: send the token to a server that takes some seconds, and return what comes back."""

POOL_SIZE = 5
POOL_TIMEOUT = 10.0


class SharedClient(Protocol):
    """One client library, with five connections for all requests."""

    def __init__(self, backend: str) -> None: ...

    async def open(self) -> None:
        """Connect."""

    async def close(self) -> None:
        """Disconnect."""

    def operations(self) -> Operations:
        """What a request can do."""
        ...

    async def hold(self, token: str, together: asyncio.Barrier) -> str:
        """Take a connection, wait until all are taken, and ask for the token."""
        ...

    async def leftovers(self) -> list[str]:
        """What cancelled requests left behind, in the client or on the server."""
        ...


def only(answers: set[str]) -> str:
    """Return the one answer; several are a mix-up, and returned as one wrong answer."""
    return ",".join(sorted(answers))
