"""The head of the screen: who this is, how fresh it is, counters with their last minute, and warnings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from textual.widgets import Static

from otel_tasks_terminal import views
from otel_tasks_terminal.pen import SHAPES, TONES, Cell
from otel_tasks_terminal.text import counted, cut, fit, number, width

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from otel_tasks_terminal.model import Model
    from otel_tasks_terminal.top.look import Look

Row = dict[str, Any]

MAX_WARNINGS = 4
# The cells of a counter with its word. A wide screen has all counters in one line, a narrow one has no words.
WORDS = 18
WIDE = 6 * WORDS
NARROW = 60
# A counter: its word, its status, its column in a sample, and its key in the stats, or None for a rate.
COUNTERS = (
    ("running", "running", 1, "running"),
    ("waiting", "queued", 2, "queued"),
    ("cancelling", "cancelling", 3, "cancelling"),
    ("completed", "completed", 4, None),
    ("failed", "failed", 5, None),
    ("cancelled", "cancelled", 6, None),
)


class Summary(Static):
    """Shows the head."""

    def show(self, model: Model, warnings: Sequence[Row], look: Look, state: Sequence[Cell]) -> None:
        """Draw it again.

        Args:
            model: What is known.
            warnings: Those of its warnings that are not silenced.
            look: How text is drawn.
            state: How fresh it is.
        """
        cells = max(20, self.size.width or self.app.size.width)
        lines = [*_lines(model, look, state, cells, small=self.app.size.height < 20)]
        if model.about:
            lines += _warnings(warnings, len(model.warnings) - len(warnings), model.now())
        self.update(look.lines(lines))


def _lines(
    model: Model, look: Look, state: Sequence[Cell], cells: int, *, small: bool
) -> Iterator[Sequence[Cell]]:
    if not model.about:
        yield [("Tasks  ", "bold"), *state]
        return
    head, tail = f"{views.identity(model)}  ", f"  {views.access(model)}"
    # In one line: the rows below must not move when the connection is lost.
    room = cells - width(f"Tasks  {head}{tail}")
    cut_state = [(cut(text, max(20, room)), tone) for text, tone in state]
    yield [("Tasks  ", "bold"), (head, None), *cut_state, (tail, "mute")]
    if small or cells < NARROW:
        yield [
            (f"{SHAPES[status]} {_value(model, column, key)}  ", TONES[status])
            for _, status, column, key in _shown(model)
        ]
    elif cells < WIDE:
        yield from _half(model, look, cells // 3)
    else:
        yield from _counters(model, look, min(20, cells // len(COUNTERS)))


def _shown(model: Model) -> Sequence[tuple[str, str, int, str | None]]:
    # Of single nodes, the feed has neither rates nor samples.
    stats = model.shown_stats()
    return COUNTERS if model.only is None else [counter for counter in COUNTERS if counter[3] in stats]


def _spark(model: Model, look: Look, column: int, cells: int) -> str:
    return look.spark(model.series(column) if model.only is None else (), cells)


def _warnings(shown: Sequence[Row], silenced: int, now: float) -> Iterator[Sequence[Cell]]:
    for index, warning in enumerate(shown[:MAX_WARNINGS], 1):
        opens = f"[{index}]" if warning.get("query") else ""
        yield [(f"! {views.warned(warning, now)}  ", "cancel"), (opens, "mute")]
    if len(shown) > MAX_WARNINGS:
        yield [(f"! {counted(len(shown) - MAX_WARNINGS, 'more warning')}  ", "cancel"), ("[!]", "mute")]
    if silenced:
        yield [(f"{counted(silenced, 'warning')} silenced  [!]", "mute")]


def _half(model: Model, look: Look, cells: int) -> Iterator[Sequence[Cell]]:
    """Two lines of three counters, each with its minute beside it: no word is cut."""
    for first in (0, 3):
        parts: list[Cell] = []
        for word, status, column, key in _shown(model)[first : first + 3]:
            text = fit(f"{SHAPES[status]} {_value(model, column, key)} {word}", WORDS)
            parts.append((f"{text} {_spark(model, look, column, cells - WORDS - 2)} ", TONES[status]))
        yield parts


def _counters(model: Model, look: Look, cells: int) -> Iterator[Sequence[Cell]]:
    yield [
        (fit(cut(f"{SHAPES[status]} {_value(model, column, key)} {word}", cells - 1), cells), TONES[status])
        for word, status, column, key in _shown(model)
    ]
    yield [
        (fit(_spark(model, look, column, cells - 2), cells), TONES[status])
        for _, status, column, _ in _shown(model)
    ]


def _value(model: Model, column: int, key: str | None) -> str:
    if key is not None:
        return number(model.shown_stats().get(key, 0))
    rates = model.series(column)
    return f"{number(round(rates[-1], 1))}/s" if rates else "·/s"
