"""Membership: one stay of a process in its fleet, from start to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Final

from otel_tasks.fleet.bus import END, START
from otel_tasks.fleet.cancellations import Cancellations
from otel_tasks.fleet.cancelling import Canceller
from otel_tasks.fleet.gathering import Gathering
from otel_tasks.fleet.inspection import Inspector
from otel_tasks.fleet.keeper import Keeper
from otel_tasks.fleet.link import Link
from otel_tasks.fleet.nodes import Presence, new_name
from otel_tasks.fleet.views import Views

if TYPE_CHECKING:
    from otel_tasks import TaskManager
    from otel_tasks.fleet.bus import Bus

# Seconds that a start waits for the bus; after that, joining continues in the background.
START_TIMEOUT: Final = 5.0
# Seconds for the last calls of the bus when the fleet stops.
STOP_TIMEOUT: Final = 2.0


class Membership:
    """The parts of a started fleet. They belong to one process and one event loop.

    Args:
        bus: The bus.
        manager: The manager whose tasks the fleet sees.
        is_node: True if other nodes see this one, False for an observer.

    Attributes:
        node: The name of this node.
        link: Its link to the bus.
        keeper: The object that renews the node's lease and claims.
        cancellations: The cancellations of the last hour.
        canceller: Its cancellations, in both directions.
        inspector: What the node shows, and what it sees.
        views: The data of live views, in both directions.
    """

    def __init__(self, bus: Bus, manager: TaskManager, *, is_node: bool = True) -> None:
        self.loop = asyncio.get_running_loop()
        self.pid = os.getpid()
        self.node = new_name()
        # The cancellations of the last hour cannot concern an observer, which has no tasks.
        self.link = Link(bus, self.node, after=START if is_node else END)
        self.keeper = Keeper(bus, self.node)
        self.cancellations = Cancellations()
        self._gathering = Gathering(self.link)
        self._presence = Presence(self.link, manager)
        self.canceller = Canceller(manager, self.link, self.cancellations, self._gathering)
        self.inspector = Inspector(manager, self.link, self._gathering, self._presence)
        self.views = Views(manager, self.link, self._gathering)
        self._is_node = is_node
        if is_node:
            self.canceller.listen()
            self.inspector.listen()
            self.views.listen()

    async def start(self) -> None:
        """Connect to the bus, read the cancellations of the last hour, and announce the node.

        Raises:
            BusRefusedError: The server refuses this process.

        Cancellation: ends the stay.
        """
        await self.link.start(START_TIMEOUT)
        if not self._is_node:
            return
        try:
            await self._presence.start()
        except BaseException:
            await self.link.stop(0.0)
            raise

    async def stop(self) -> None:
        """Answer the nodes that still wait, send the entries that wait, and leave.

        Cancellation: leaves without further waiting.
        """
        self._gathering.stop()
        flush = 0.0
        try:
            await self.canceller.stop()
            await self.inspector.stop()
            await self.views.stop()
            if self.link.is_up:
                # Before the lease goes: workers that miss it would report this node as lost, not as stopped.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(STOP_TIMEOUT):
                        await self.link.flush()
            async with asyncio.timeout(STOP_TIMEOUT):
                await self.keeper.stop()
                await self._presence.stop()
            flush = STOP_TIMEOUT
        except TimeoutError:
            # The bus does not answer: the lease and the entry in the roster expire.
            pass
        finally:
            await self.link.stop(flush)
