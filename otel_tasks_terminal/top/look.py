"""The look: colors for a dark and a light terminal, and rows as styled text."""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING, Any

from rich.text import Text

from otel_tasks_terminal import views
from otel_tasks_terminal.text import fit, number, percent, width

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from otel_tasks_terminal.model import Entry
    from otel_tasks_terminal.pen import Cell, Pen

Row = dict[str, Any]

# The colors of Okabe and Ito, lighter on dark and darker on light, so that small text is readable on both.
DARK = {
    "run": "#56b4e9",
    "wait": "#9aa0a6",
    "cancel": "#f0a533",
    "ok": "#2fbf93",
    "fail": "#ff7f6e",
    "gone": "#c9a4e8",
    "bold": "bold",
    "mute": "#8b9096",
}
LIGHT = {
    "run": "#0061a8",
    "wait": "#5f6368",
    "cancel": "#a35200",
    "ok": "#00734f",
    "fail": "#b3261e",
    "gone": "#7b3fa0",
    "bold": "bold",
    "mute": "#6a6f75",
}

# Not up to the full block: a line that does not change would be a wall.
SPARKS = "▁▂▃▄▅"
COUNTS = 7
NODES = 18
AGES = 22
PROGRESS = 12


class Look:
    """Makes styled text.

    Args:
        pen: Whether only ASCII may be written.
        dark: Whether the background is dark.
        nodes: Whether tasks have a column with their node.
    """

    def __init__(self, pen: Pen, *, dark: bool, nodes: bool = False) -> None:
        self._pen = pen
        self._nodes = nodes
        self._tones = DARK if dark else LIGHT

    @property
    def ascii(self) -> bool:
        """Whether only ASCII may be written."""
        return self._pen.ascii

    def text(self, parts: Iterable[Cell]) -> Text:
        """Put texts with their tones together."""
        made = Text(no_wrap=False, end="")
        for text, tone in parts:
            made.append(self._pen.plain(text), self._tones.get(tone or "", ""))
        return made

    def lines(self, lines: Iterable[Sequence[Cell]]) -> Text:
        """Put lines below each other."""
        return Text("\n", end="").join(self.text(parts) for parts in lines)

    def wrapped(self, lines: Iterable[Sequence[Cell]], cells: int) -> Text:
        """Put lines below each other; what does not fit goes on below its beginning."""
        return self.lines(piece for parts in lines for piece in _wrap(parts, max(20, cells)))

    def spark(self, values: Sequence[float], cells: int) -> str:
        """Draw the last values as a line of bars."""
        if len(values) < 2:
            return " " * cells
        picked = values[-60:]
        step = max(1, -(-len(picked) // cells))
        means = [
            sum(part) / len(part) for part in (picked[i : i + step] for i in range(0, len(picked), step))
        ]
        top = max(*means, 1.0)
        line = "".join(SPARKS[min(len(SPARKS) - 1, int(len(SPARKS) * value / top))] for value in means)
        return line.rjust(cells)

    # --- rows -------------------------------------------------------------------------------------

    def heading(self, cells: int) -> Text:
        """The titles of the columns."""
        names = max(10, cells - self._rest(cells))
        counts = "".join(title.rjust(COUNTS) for title in ("COUNT", "WAIT", "RUN", "CANCEL"))
        if cells < views.NARROW:
            return self.text([(" ", None), *views.narrow_heading(cells - 1)])
        if self._nodes:
            names = cells - NODES - AGES - PROGRESS - 2
            columns = (" NAME", names), ("  NODE", NODES), ("  AGE", AGES + 2), ("PROGRESS", PROGRESS)
            return self.text([("".join(fit(*column) for column in columns), "mute")])
        text = f"{fit(' NAME', names)}{counts}  {fit('AGE p50 · p90 · max', AGES)}{fit('PROGRESS', PROGRESS)}"
        return self.text([(text, "mute")])

    def row(self, entry: Entry, now: float, cells: int) -> Text:
        """One row of the list."""
        if entry.kind == "more":
            return self.text([(f"{_indent(entry)}… {_more(entry.row)}", "mute")])
        if cells < views.NARROW or views.is_unknown(entry):
            parts = [(" ", None), *views.narrow_cells(entry, now, cells - 1)]
        else:
            draw = self._counted if entry.kind in ("group", "class") else self._task
            parts = draw(entry, now, cells)
        return self.text(views.dimmed(parts, entry))

    def _counted(self, entry: Entry, now: float, cells: int) -> list[Cell]:
        row = entry.row
        count, queued, cancelling = (row.get(key) or 0 for key in ("count", "queued", "cancelling"))
        running = count - queued - cancelling
        return [
            (
                fit(_titled(entry, now), max(10, cells - self._rest(cells))),
                "bold" if entry.kind == "group" else None,
            ),
            (number(count).rjust(COUNTS), None),
            (number(queued).rjust(COUNTS), "wait" if queued else "mute"),
            (number(running).rjust(COUNTS), None if running else "mute"),
            (number(cancelling).rjust(COUNTS), "cancel" if cancelling else "mute"),
            ("  " + fit(views.ages(row, now), AGES), None),
            *self._progress(row.get("progress")),
        ]

    def _task(self, entry: Entry, now: float, cells: int) -> list[Cell]:
        row = entry.row
        node = [("  " + fit(views.node_name(row.get("node")), NODES - 2), "mute")] if self._nodes else []
        room = max(10, cells - AGES - PROGRESS - 3 - (NODES if node else 0))
        age = "  " + fit(views.task_age(row, now), AGES)
        parts = views.task_cells(entry, now, room, with_node=not node)
        return [(" ", None), *parts, *node, (age, None), *self._progress(row.get("progress"))]

    def _progress(self, report: Row | None) -> list[Cell]:
        total = (report or {}).get("total")
        if not report or not total:
            return [(" " * PROGRESS, None)]
        fraction = min(1.0, max(0.0, (report.get("done") or 0) / total))
        full = round(fraction * 6)
        return [
            ("█" * full, "run"),
            ("░" * (6 - full), "mute"),
            (percent(fraction).rjust(PROGRESS - 7) + " ", None),
        ]

    def _rest(self, cells: int) -> int:
        return 4 * COUNTS + AGES + PROGRESS + 2 if cells >= views.NARROW else 0


def _wrap(parts: Sequence[Cell], cells: int) -> Iterator[Sequence[Cell]]:
    if sum(width(text) for text, _ in parts) <= cells:
        yield parts
        return
    *head, (text, tone) = parts
    taken = sum(width(text) for text, _ in head)
    # A line without a term, such as a step of a chain, has its own indent.
    hang = "" if head else "    "
    for number_of, piece in enumerate(wrap(text, max(12, cells - taken), subsequent_indent=hang)):
        yield [*head, (piece, tone)] if number_of == 0 else [(" " * taken, None), (piece, tone)]


def _indent(entry: Entry) -> str:
    return " " + "  " * entry.level


def _titled(entry: Entry, now: float) -> str:
    return f"{_indent(entry)}{'▾' if entry.open else '▸'} {views.title(entry, now)}"


def _more(row: Row) -> str:
    hint = "Enter shows more" if row["shown"] < 1000 else "/ finds them"
    return f"{number(row['total'] - row['shown'])} more: {hint}"
