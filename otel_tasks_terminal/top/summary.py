"""The head of the screen: who this is, how fresh it is, counters with their last minute, and warnings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.widgets import Static

from otel_tasks_terminal import phrases, views
from otel_tasks_terminal.pen import SHAPES, TONES, Cell
from otel_tasks_terminal.text import counted, cut, fit, number

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from otel_tasks_terminal.model import Model
    from otel_tasks_terminal.top.look import Look

MAX_WARNINGS = 4
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

    def show(self, model: Model, look: Look, state: Sequence[Cell]) -> None:
        """Draw it again."""
        cells = max(20, self.size.width or self.app.size.width)
        self.update(look.lines(list(_lines(model, look, state, cells, small=self.app.size.height < 20))))


def _lines(
    model: Model, look: Look, state: Sequence[Cell], cells: int, *, small: bool
) -> Iterator[Sequence[Cell]]:
    if not model.about:
        yield [("Tasks  ", "bold"), *state]
        return
    yield [
        ("Tasks  ", "bold"),
        (f"{views.identity(model)}  ", None),
        *state,
        (f"  {views.access(model)}", "mute"),
    ]
    if small or cells < 72:
        yield [
            (f"{SHAPES[status]} {_value(model, column, key)}  ", TONES[status])
            for _, status, column, key in COUNTERS
        ]
    else:
        yield from _counters(model, look, min(20, cells // len(COUNTERS)))
    now = model.now()
    for index, warning in enumerate(model.warnings[:MAX_WARNINGS], 1):
        opens = f"{index} " if warning.get("query") else "  "
        yield [
            (f"! {phrases.warning(warning, now)}  ", "cancel"),
            (f"[{opens.strip()}]" if opens.strip() else "", "mute"),
        ]
    if len(model.warnings) > MAX_WARNINGS:
        yield [(f"! {counted(len(model.warnings) - MAX_WARNINGS, 'more warning')}", "cancel")]


def _counters(model: Model, look: Look, cells: int) -> Iterator[Sequence[Cell]]:
    yield [
        (fit(cut(f"{SHAPES[status]} {_value(model, column, key)} {word}", cells - 1), cells), TONES[status])
        for word, status, column, key in COUNTERS
    ]
    yield [
        (fit(look.spark(model.series(column), cells - 2), cells), TONES[status])
        for _, status, column, _ in COUNTERS
    ]


def _value(model: Model, column: int, key: str | None) -> str:
    if key is not None:
        return number(model.stats.get(key, 0))
    rates = model.series(column)
    return f"{number(round(rates[-1], 1))}/s" if rates else "·/s"
