"""Nodes: the processes of a fleet, and how each one announces itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from otel_tasks._core.telemetry import VERSION, quiet_context
from otel_tasks.fleet.bus import BusUnavailableError

if TYPE_CHECKING:
    from otel_tasks import TaskManager
    from otel_tasks.fleet.link import Link

# Seconds between two announcements of a node, and seconds after which a node that stops announcing is gone.
ANNOUNCED_EVERY: Final = 10.0
GONE_AFTER: Final = 30.0

_HOST_LIMIT = 40
_DESCRIPTION_LIMIT = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A process of a fleet.

    Attributes:
        node: Its name in the fleet, ``host/pid/random``; a process that starts again gets a new name.
        host: Its host name.
        pid: The id of the process.
        version: Its version of this package.
        manager: The name of its manager.
        started: When it joined the fleet, by its own clock.
        live_tasks: How many tasks run or wait in it.
        last_seen: Seconds since it answered or announced itself.
        silent: True if it did not answer now.
    """

    node: str
    host: str
    pid: int
    version: str
    manager: str
    started: str
    live_tasks: int
    last_seen: float
    silent: bool

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        return {key: getattr(self, key) for key in self.__slots__}

    @classmethod
    def read(cls, node: str, description: object, last_seen: float, *, silent: bool) -> Node:
        """Create a node from its description of itself, which may be anything."""
        known: dict[str, Any] = description if isinstance(description, dict) else {}
        parts = node.split("/")
        started = _number(known.get("started"))
        return cls(
            node=node,
            host=_text(known.get("host")) or parts[0],
            pid=int(_number(known.get("pid"))),
            version=_text(known.get("version")),
            manager=_text(known.get("manager")),
            started=datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
            live_tasks=int(_number(known.get("live_tasks"))),
            last_seen=round(last_seen, 3),
            silent=silent,
        )


def new_name() -> str:
    """Create a name for this process that no other process has."""
    return f"{socket.gethostname()[:_HOST_LIMIT]}/{os.getpid()}/{secrets.token_hex(3)}"


class Presence:
    """The entry of one node in the roster.

    Args:
        link: The link of this node.
        manager: Its manager.
    """

    def __init__(self, link: Link, manager: TaskManager) -> None:
        self._link = link
        self._manager = manager
        self._started = time.time()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def describe(self) -> dict[str, Any]:
        """Return what other nodes learn of this one."""
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": VERSION,
            "manager": self._manager.name,
            "started": self._started,
            "live_tasks": self._manager.stats().live,
        }

    async def start(self) -> None:
        """Announce the node, and keep it announced.

        Cancellation: the node is no longer announced.
        """
        self._link.on_state(self._wake.set)
        await self._announce()
        self._task = asyncio.get_running_loop().create_task(
            self._keep_announced(), name="otel_tasks.fleet.presence", context=quiet_context()
        )

    async def stop(self) -> None:
        """Take the node out of the roster, so that nobody waits for it.

        Cancellation: the node may stay there until its entry expires.
        """
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        # Without the bus, the entry expires by itself.
        with contextlib.suppress(BusUnavailableError):
            await self._link.call(lambda: self._link.bus.leave(self._link.node))

    async def _keep_announced(self) -> None:
        while True:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ANNOUNCED_EVERY):
                    # The bus may be back, and may have lost its roster.
                    await self._wake.wait()
            await self._announce()

    async def _announce(self) -> None:
        description = json.dumps(self.describe()).encode()
        # If the bus is down, the node is announced when it is back.
        with contextlib.suppress(BusUnavailableError):
            await self._link.call(lambda: self._link.bus.announce(self._link.node, description, GONE_AFTER))


def read_description(description: bytes) -> object:
    """Return a node's description of itself; None if it is not JSON."""
    try:
        return json.loads(description[:_DESCRIPTION_LIMIT])
    except (ValueError, RecursionError):
        return None


def _text(value: object) -> str:
    return value[:200] if isinstance(value, str) else ""


def _number(value: object) -> float:
    # No time after the year 9999, and no infinity.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and 0 <= value < 2.5e11 else 0  # type: ignore[operator,return-value]  # it is a number
