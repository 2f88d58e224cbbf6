"""`otel-tasks top` under test: its screen, and the prepared view that it shows."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from otel_tasks_terminal.client import Address, Client
from otel_tasks_terminal.top.app import Top
from tests.live_server import View, prepared, serving, snapshot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from textual.pilot import Pilot

    from otel_tasks_terminal.top.silence import Silenced

DEADLINE = 30.0


class Screen:
    """The screen under test, and the view that it shows."""

    def __init__(self, app: Top, pilot: Pilot[int], view: View) -> None:
        self.app = app
        self.pilot = pilot
        self.view = view

    async def until(self, look: Callable[[], object]) -> None:
        """Wait until something is true."""
        end = time.monotonic() + DEADLINE
        while not look():
            assert time.monotonic() < end, self.text()
            await self.pilot.pause(0.01)

    async def press(self, *keys: str) -> None:
        """Press keys."""
        await self.pilot.press(*keys)
        await self.pilot.pause()

    def row_keys(self) -> list[str]:
        """The keys of the rows."""
        return [entry.key for entry in self.app.rows.entries]

    def selected(self) -> str | None:
        """The key of the selected row."""
        return None if self.app.rows.current is None else self.app.rows.current.key

    def text(self) -> str:
        """Everything on the screen."""
        width, height = self.app.size
        lines = self.app.screen._compositor.render_strips()
        return "\n".join("".join(segment.text for segment in line)[:width] for line in lines[:height])


@asynccontextmanager
async def screen(
    view: View | None = None,
    size: tuple[int, int] = (120, 30),
    *,
    ascii_only: bool = False,
    silenced: Silenced | None = None,
    node: str | None = None,
    ready: Callable[[Top], object] = lambda app: app.rows.entries,
) -> AsyncIterator[Screen]:
    """The screen, once it has shown its first rows."""
    view = view or prepared()
    view.stays_open = True
    view.streams = [[("snapshot", snapshot())]] if not view.streams else view.streams
    with serving(view):
        app = Top(
            Client(Address.parse(view.url), timeout=5), ascii_only=ascii_only, silenced=silenced, node=node
        )
        async with app.run_test(size=size, notifications=True) as pilot:
            shown = Screen(app, pilot, view)
            await shown.until(lambda: ready(app))
            yield shown
            app.exit(0)
