"""The pen: shapes, colors, and the width of the terminal that a command writes to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple, TextIO

from otel_tasks_terminal.text import cut, fit, width

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# A shape and a word go with each color: a color alone tells nothing to many people.
SHAPES = {
    "pending": "○",
    "queued": "○",
    "running": "▶",
    "cancelling": "◐",
    "completed": "✓",
    "failed": "✕",
    "cancelled": "⊘",
}
TONES = {
    "pending": "wait",
    "queued": "wait",
    "running": "run",
    "cancelling": "cancel",
    "completed": "ok",
    "failed": "fail",
    "cancelled": "gone",
}
# The colors of Okabe and Ito, as near as the 256 colors of a terminal have them.
_SGR = {
    "run": "38;5;74",
    "wait": "38;5;245",
    "cancel": "38;5;214",
    "ok": "38;5;36",
    "fail": "38;5;209",
    "gone": "38;5;175",
    "bold": "1",
    "mute": "2",
}
_ASCII = str.maketrans(
    "○▶◐✓✕⊘·…▸▾\N{MULTIPLICATION SIGN}│─▁▂▃▄▅▆▇█░●┄━╍◆\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}",
    "o>~+x/-.+-x|-__..--==.o.=~*<",
)


class Pen(NamedTuple):
    """How to write for one reader.

    Attributes:
        columns: The cells of a line; None where lines are not cut (a file, a pipe).
        color: Whether escape sequences may be written.
        ascii: Whether only ASCII may be written.
    """

    columns: int | None = None
    color: bool = False
    ascii: bool = False

    def paint(self, text: str, tone: str | None) -> str:
        """Color a text."""
        sgr = _SGR.get(tone or "")
        return f"\x1b[{sgr}m{text}\x1b[0m" if self.color and sgr and text else text

    def plain(self, text: str) -> str:
        """Replace what is not ASCII, if it must be."""
        return text.translate(_ASCII).encode("ascii", "replace").decode() if self.ascii else text

    def line(self, *parts: tuple[str, str | None]) -> str:
        """Write parts with their tones, cut to the width of the terminal."""
        left = self.columns
        written: list[str] = []
        for text, tone in parts:
            plain = self.plain(text)
            if left is not None:
                plain = cut(plain, left) if not self.ascii else plain[:left]
                left -= width(plain)
            written.append(self.paint(plain, tone))
        return "".join(written)


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        title: Its heading.
        least: The cells that it needs; wider text is cut down to them where the terminal is narrow.
        right: Whether its text is aligned to the right.
        keep: Columns with a lower number go first where the terminal is too narrow for all.
    """

    title: str
    least: int
    right: bool = False
    keep: int = 9


Cell = tuple[str, str | None]


def table(
    pen: Pen, columns: Sequence[Column], rows: Sequence[Sequence[Cell]], *, heading: bool = True
) -> Iterable[str]:
    """Lay out a table: as wide as its text, or as the terminal.

    Args:
        pen: How to write.
        columns: The columns.
        rows: The cells of each row, a text and its tone.
        heading: Whether there is a line with the titles.
    """
    titles: list[Sequence[Cell]] = [[(column.title, "mute") for column in columns]] if heading else []
    lines = [[(pen.plain(text), tone) for text, tone in row] for row in (*titles, *rows)]
    natural = [max((width(line[index][0]) for line in lines), default=0) for index in range(len(columns))]
    sizes = _sizes(columns, natural, pen.columns)
    shown = [index for index in range(len(columns)) if sizes[index]]
    for line in lines:
        cells = [
            pen.paint(
                pen.plain(fit(line[index][0], sizes[index], right=columns[index].right)), line[index][1]
            )
            for index in shown
        ]
        yield "  ".join(cells).rstrip()


def _sizes(columns: Sequence[Column], natural: list[int], room: int | None) -> list[int]:
    """The cells of each column; 0 for one that is left out."""
    sizes = list(natural)
    if room is None:
        return sizes
    order = sorted(range(len(columns)), key=lambda index: columns[index].keep)
    for index in order[:-1]:
        if _least(columns, sizes) <= room:
            break
        sizes[index] = 0
    while _taken(sizes) > room:
        # The widest gives way first, so that no text is cut while another one has much more room.
        widest = max(
            range(len(sizes)), key=lambda index: sizes[index] - min(natural[index], columns[index].least)
        )
        if sizes[widest] <= min(natural[widest], columns[widest].least):
            sizes[order[-1]] = max(1, room)
            break
        sizes[widest] -= 1
    return sizes


def _taken(sizes: list[int]) -> int:
    return sum(size + 2 for size in sizes if size) - 2


def _least(columns: Sequence[Column], sizes: list[int]) -> int:
    return _taken([min(size, column.least) for size, column in zip(sizes, columns, strict=True)])


def pen_for(stream: TextIO, environ: Mapping[str, str] = os.environ, *, ascii_only: bool = False) -> Pen:
    """Return the pen for a stream: a terminal, a pipe, or a file."""
    encoding = (getattr(stream, "encoding", None) or "").lower().replace("-", "")
    plain = ascii_only or not encoding.startswith("utf") or (stream.isatty() and _is_plain(environ))
    if not stream.isatty():
        return Pen(ascii=plain)
    # https://no-color.org: set to anything but the empty text.
    color = not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"
    return Pen(terminal_size(stream, environ)[0], color=color, ascii=plain)


def _is_plain(environ: Mapping[str, str]) -> bool:
    """Whether the locale says that a terminal shows ASCII alone; one that is not set says nothing.

    The encoding does not tell: in the locale C, Python writes UTF-8 and sets ``LC_CTYPE`` (PEP 538).
    """
    for name in ("LC_ALL", "LC_CTYPE", "LANG"):
        value = environ.get(name, "")
        if value and (name, value) != ("LC_CTYPE", "C.UTF-8"):
            return value in ("C", "POSIX")
    return False


def terminal_size(stream: TextIO, environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return the columns and lines of a terminal; ``COLUMNS`` and ``LINES`` win, as for other programs.

    ``shutil`` has this too, and brings half the compression formats with it.
    """
    try:
        size = os.get_terminal_size(stream.fileno())
    except OSError:
        size = os.terminal_size((80, 24))
    columns, lines = (environ.get(name, "") for name in ("COLUMNS", "LINES"))
    return (
        max(20, int(columns) if columns.isdecimal() and int(columns) else size.columns or 80),
        max(5, int(lines) if lines.isdecimal() and int(lines) else size.lines or 24),
    )
