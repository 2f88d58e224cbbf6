"""The list: rows by their keys, of which only those in sight are drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from rich.segment import Segment
from rich.style import Style
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.text import Text
    from textual import events

    from otel_tasks_terminal.model import Entry


class Painter(Protocol):
    """Draws the rows."""

    def heading(self, cells: int) -> Text:
        """Draw the line above them."""
        ...

    def row(self, entry: Entry, now: float, cells: int) -> Text:
        """Draw a row."""
        ...


class RowList(ScrollView, can_focus=True, inherit_bindings=False):
    """Shows entries; one is selected, by its key.

    Args:
        painter: Returns what draws the rows.
        now: Returns the time on the server's clock.
    """

    COMPONENT_CLASSES: ClassVar[set[str]] = {"rows--selected", "rows--heading"}

    class Chosen(Message):
        """A row was clicked, once it was selected."""

        def __init__(self, entry: Entry) -> None:
            super().__init__()
            self.entry = entry

    def __init__(self, painter: Callable[[], Painter], now: Callable[[], float], **options: Any) -> None:
        super().__init__(**options)
        self._painter = painter
        self._now = now
        self._entries: list[Entry] = []
        self._selected: str | None = None
        # The row that the reader has selected last: another view shows it selected, if it has it.
        self._wanted: str | None = None

    # --- entries ----------------------------------------------------------------------------------

    def show(self, entries: list[Entry]) -> None:
        """Show these entries; the selected one stays where it is on the screen."""
        before = self._index()
        kept = self._with_selected(entries)
        begins = self._selected is None and bool(kept)
        self._entries = kept
        # The heading is a line of its own, which does not scroll away.
        self.virtual_size = Size(0, len(kept) + 1)
        after = self._index()
        if before is not None and after is not None and after != before:
            self.scroll_to(y=self.scroll_offset.y + after - before, animate=False, force=True)
        if begins:
            keys = [entry.key for entry in kept]
            self._go(keys.index(self._wanted) if self._wanted in keys else 0)
        self.refresh()

    def _with_selected(self, entries: list[Entry]) -> list[Entry]:
        """Keep a selected task that has ended in its place, until the selection moves on."""
        index, entry = self._index(), self.current
        if index is None or entry is None or entry.kind not in ("task", "ghost"):
            return entries
        if any(each.key == entry.key for each in entries):
            return entries
        above = self._entries[index - 1].key if index else None
        places = [place for place, each in enumerate(entries) if each.key == above]
        place = places[0] + 1 if places else min(index, len(entries))
        return [*entries[:place], entry._replace(kind="ghost"), *entries[place:]]

    def reset(self) -> None:
        """Forget the rows of another view."""
        self._entries, self._selected = [], None
        self.scroll_to(y=0, animate=False, force=True)

    @property
    def entries(self) -> list[Entry]:
        """The rows, from the top."""
        return self._entries

    @property
    def current(self) -> Entry | None:
        """The selected row."""
        index = self._index()
        return None if index is None else self._entries[index]

    def _index(self) -> int | None:
        return next((i for i, entry in enumerate(self._entries) if entry.key == self._selected), None)

    # --- selection --------------------------------------------------------------------------------

    def select(self, index: int) -> None:
        """Select a row, and bring it into sight."""
        if not self._entries:
            return
        self._go(max(0, min(len(self._entries) - 1, index)))
        self._wanted = self._selected

    def _go(self, index: int) -> None:
        self._selected = self._entries[index].key
        self.scroll_to_region(Region(0, index, 1, 2), animate=False, force=True)
        self.refresh()

    def move(self, step: int) -> None:
        """Move the selection by so many rows."""
        index = self._index()
        self.select(0 if index is None else index + step)

    def next(self, test: Callable[[Entry], bool]) -> bool:
        """Select the next row that passes, from the top again after the last; return whether there is one."""
        start = self._index()
        count = len(self._entries)
        for step in range(1, count + 1):
            index = ((-1 if start is None else start) + step) % count
            if test(self._entries[index]):
                self.select(index)
                return True
        return False

    def above(self) -> None:
        """Select the row that this one is below."""
        index, entry = self._index(), self.current
        if index is None or entry is None:
            return
        for place in range(index - 1, -1, -1):
            if self._entries[place].level < entry.level:
                self.select(place)
                return

    @property
    def page(self) -> int:
        """How many rows are in sight."""
        return max(1, self.size.height - 1)

    def on_click(self, event: events.Click) -> None:
        """Select the row under the pointer; a click on the selected one opens it."""
        index = event.y - 1 + self.scroll_offset.y
        if not 0 <= index < len(self._entries) or event.y < 1:
            return
        entry = self._entries[index]
        if entry.key == self._selected:
            self.post_message(self.Chosen(entry))
        else:
            self.select(index)

    # --- drawing ----------------------------------------------------------------------------------

    def render_line(self, y: int) -> Strip:
        """Draw one line of the screen."""
        cells = self.scrollable_content_region.width
        base = self.rich_style
        if y == 0:
            text = self._painter().heading(cells)
            return self._strip(text, cells, base)
        index = y - 1 + self.scroll_offset.y
        if index >= len(self._entries):
            return Strip.blank(cells, base)
        entry = self._entries[index]
        chosen = entry.key == self._selected
        style = self.get_component_rich_style("rows--selected") if chosen else base
        return self._strip(self._painter().row(entry, self._now(), cells), cells, style)

    def _strip(self, text: Any, cells: int, style: Style) -> Strip:
        segments = [
            Segment(segment.text, style + (segment.style or Style()), None)
            for segment in text.render(self.app.console)
        ]
        return Strip(segments).adjust_cell_length(cells, style)
