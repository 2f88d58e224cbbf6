"""The panel: everything that is known of one task, beside the list or below it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.widgets import Static

from otel_tasks_terminal import details
from otel_tasks_terminal.errors import ExitCode
from otel_tasks_terminal.text import clean

if TYPE_CHECKING:
    from collections.abc import Callable

    from textual.app import ComposeResult

    from otel_tasks_terminal.errors import CommandError
    from otel_tasks_terminal.pen import Cell
    from otel_tasks_terminal.top.look import Look

Row = dict[str, Any]

FORGOTTEN = "This task has ended and is no longer remembered."


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
        # Why there is nothing newer.
        self._trouble = ""

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
        self._opened, self._answer, self._trouble = task, None, ""
        self.set_class(True, "shown")
        self.scroll_home(animate=False)
        self._write([[("…", "mute")]])

    def close(self) -> None:
        """Show nothing."""
        self._opened, self._answer, self._trouble = {}, None, ""
        self.set_class(False, "shown")

    def take(self, answer: Row) -> None:
        """Show everything about the task; of a forgotten one, what was known last."""
        if answer.get("state") == "forgotten":
            self._trouble = FORGOTTEN
        else:
            self._answer, self._trouble = answer, ""
        self.draw()

    def fail(self, error: CommandError) -> None:
        """Show why there is nothing newer."""
        self._trouble = FORGOTTEN if error.code is ExitCode.NOTHING_DONE else clean(error, 300)
        self.draw()

    def draw(self) -> None:
        """Draw the answer again: what it says gets older each second."""
        lines: list[list[Cell]] = [[(self._trouble, "fail")], []] if self._trouble else []
        if self._answer is not None:
            lines += details.parts({**self._answer, "now": self._now()})
        if lines:
            self._write(lines)

    def _write(self, lines: list[list[Cell]]) -> None:
        cells = self.scrollable_content_region.width
        self.query_one("#details", Static).update(self._look().wrapped(lines, cells))
