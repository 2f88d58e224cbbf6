"""The lifetime of a loop, of a server's lifespan or of ``run``: opens managers in it, and shuts them down."""

from __future__ import annotations

from typing import TYPE_CHECKING

from otel_tasks._core.lost import ledgers_in

if TYPE_CHECKING:
    import asyncio

    from otel_tasks._core.manager import TaskManager
    from otel_tasks._core.options import FromManager
    from otel_tasks._core.shutdown import ShutdownBounds
    from otel_tasks._core.telemetry.providers import Telemetry


def open_in(manager: TaskManager, loop: asyncio.AbstractEventLoop) -> None:
    """Let ``manager`` take tasks in ``loop``, even if an earlier lifespan shut it down there."""
    ledger = manager._ledger
    ledger.home.meet(loop)
    if ledger.home.loop is loop and ledger.home.closed:
        ledger.reopen()


def is_open_in(manager: TaskManager, loop: asyncio.AbstractEventLoop) -> bool:
    """Return True if ``manager`` belongs to ``loop`` and nothing has shut it down there."""
    return manager._ledger.home.is_open_in(loop)


def belongs_to(manager: TaskManager, loop: asyncio.AbstractEventLoop) -> bool:
    """Return True if ``manager`` belongs to ``loop``, which it joins unless tasks are live in another one."""
    home = manager._ledger.home
    home.meet(loop)
    return home.loop is loop


def bounds_of(manager: TaskManager) -> ShutdownBounds:
    """Return the bounds of the shutdowns of ``manager``."""
    return manager._bounds


def managers_in(loop: asyncio.AbstractEventLoop) -> list[TaskManager]:
    """Return the managers that belong to ``loop``."""
    return [ledger.owner for ledger in ledgers_in(loop)]


def telemetry_of(manager: TaskManager) -> Telemetry:
    """Return where ``manager`` reports."""
    return manager._ledger.telemetry


async def shut_down(
    manager: TaskManager, grace: float | FromManager, timeout: float | FromManager | None, by: str
) -> None:
    """Shut ``manager`` down as ``manager.shutdown()`` does.

    Args:
        manager: The manager.
        grace: Seconds in which tasks may finish.
        timeout: Seconds for everything after that; None for no bound.
        by: The caller, for the cause and the log.

    Cancellation: stops the shutdown.
    """
    await manager._shut_down(grace, timeout, by)
