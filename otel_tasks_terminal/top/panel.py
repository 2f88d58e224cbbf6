"""The panel: everything that is known of one task, beside the list or below it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.widgets import Static

from otel_tasks_terminal import details
from otel_tasks_terminal.text import clean

if TYPE_CHECKING:
    from collections.abc import Callable

    from textual.app import ComposeResult

    from otel_tasks_terminal.errors import CommandError
    from otel_tasks_terminal.top.look import Look

Row = dict[str, Any]


class Panel(VerticalScroll):
    """Shows one task, until it is closed. It has keys of its own while it has the focus: they scroll it.

    Args:
        look: Returns how text is drawn.
        now: Returns the time on the server's clock.
    """

    BINDINGS: ClassVar[list[Any]] = [
        Binding("j,down", "step(1)", show=False),
        Binding("k,up", "step(-1)", show=False),
    ]

    def __init__(self, look: Callable[[], Look], now: Callable[[], float], **options: Any) -> None:
        super().__init__(**options)
        self._look = look
        self._now = now
        # The task as its row had it, and everything about it once that has come.
        self._opened: Row = {}
        self._answer: Row | None = None

    def compose(self) -> ComposeResult:
        """Lay it out."""
        yield Static("", id="details")

    def action_step(self, lines: int) -> None:
        """Scroll by a line."""
        self.scroll_relative(y=lines, animate=False, immediate=True)

    @property
    def row(self) -> Row:
        """What is known of the task; empty while none is shown."""
        return (self._answer or {}).get("task") or self._opened

    def open(self, task: Row) -> None:
        """Show a task, of which everything is to come."""
        self._opened, self._answer = task, None
        self.set_class(True, "shown")
        self.scroll_home(animate=False)
        self._write([[("…", "mute")]])

    def close(self) -> None:
        """Show nothing."""
        self._opened, self._answer = {}, None
        self.set_class(False, "shown")

    def take(self, answer: Row) -> None:
        """Show everything about the task."""
        self._answer = answer
        self.draw()

    def fail(self, error: CommandError) -> None:
        """Show why there is nothing to show."""
        self._answer = None
        self._write([[(clean(error, 300), "fail")]])

    def draw(self) -> None:
        """Draw the answer again: what it says gets older each second."""
        if self._answer is not None:
            self._write(list(details.parts({**self._answer, "now": self._now()})))

    def _write(self, lines: list[Any]) -> None:
        cells = self.scrollable_content_region.width
        self.query_one("#details", Static).update(self._look().wrapped(lines, cells))
