"""The timeline: bars of live and recently ended tasks on one axis, as the page of the live view draws them.

A live bar has an open end, and a cause is marked where it struck.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from otel_tasks_terminal import phrases, views
from otel_tasks_terminal.model import Entry, instance, task_entry
from otel_tasks_terminal.pen import SHAPES
from otel_tasks_terminal.text import clean, clock, cut, duration, fine, fit, width

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.text import Text

    from otel_tasks_terminal.model import Model
    from otel_tasks_terminal.pen import Cell
    from otel_tasks_terminal.top.look import Look

Row = dict[str, Any]

# Seconds; a quarter of each is easy to read.
WINDOWS = (20, 60, 120, 240, 600, 1200, 3600, 14400, 86400, 345600)
# The part of the bars whose start the window must show.
MOST = 0.8
# The cells of a duration, right of its bar.
TOOK = 8

# What a bar is made of: a shape for each color. Lines, not blocks: bars in neighboring rows stay apart.
_WAITED, _RAN, _CANCELLING = "┄", "━", "╍"
_BEYOND, _STRUCK, _OPEN = "\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}", "◆", "▸"


class Timeline:
    """Puts tasks below each other, and chooses how much time their axis has.

    Args:
        model: The clock.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.span = float(WINDOWS[1])

    def entries(self, tasks: list[Row]) -> list[Entry]:
        """Return the rows: the tasks of a request together, those with live tasks first."""
        self._choose_span(tasks)
        rows: list[Entry] = []
        for group, members in _groups(tasks).items():
            if len(members) == 1:
                rows.append(task_entry(members[0], 0, instance(members[0])))
                continue
            node, name = group
            band = {"name": " · ".join(filter(None, (name, views.node_name(node)))), "node": node}
            key = f"band {name} {node}".rstrip()
            rows.append(Entry(key, "band", 0, {**band, "struck": self._struck(members)}))
            rows += [task_entry(task, 1) for task in members]
        return rows

    def _choose_span(self, tasks: list[Row]) -> None:
        """Take the shortest window that shows the start of most bars; a longer one is kept for a while."""
        needed = _span(tasks, self._model.now())
        if needed > self.span or needed < self.span / 4:
            self.span = needed

    def _struck(self, members: Iterable[Row]) -> str:
        """The cause that struck first."""
        struck = [(at, task) for task in members if (at := _cause_at(task)) is not None]
        if not struck:
            return ""
        at, task = min(struck, key=lambda each: each[0])
        return f"⊘ {phrases.because(task.get('cause') or {})}, {clock(self._model.epoch + at)}"


def _groups(tasks: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """The tasks by their node, which is empty without a fleet, and their group."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for task in sorted(tasks, key=_order):
        key = str(task.get("node") or ""), str(task.get("group_id", ""))
        groups.setdefault(key, []).append(task)
    return groups


def _order(task: Row) -> tuple[Any, ...]:
    # What still runs is what people look for: it comes before what has ended.
    return "ended" in task, task.get("created", 0.0), _natural(str(task.get("task_id")))


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts ``load-9`` before ``load-10``."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", text)]


def _span(tasks: Iterable[Row], now: float) -> float:
    ages = sorted(now - task.get("created", now) for task in tasks)
    needed = ages[int((len(ages) - 1) * MOST)] if ages else 60.0
    return next((float(window) for window in WINDOWS if window >= needed), needed)


def _cause_at(task: Row) -> float | None:
    at: float | None = task.get("cancel_requested")
    return at if at is not None else (task.get("cause") or {}).get("at")


class Bars:
    """Draws the rows of a timeline.

    Args:
        look: How text is drawn.
        span: The seconds from the left end of the axis to now.
    """

    def __init__(self, look: Look, span: float) -> None:
        self._look = look
        self._span = span

    def heading(self, cells: int) -> Text:
        """The axis."""
        label, bar = _layout(cells)
        text = ""
        for part in range(4):
            tick, at = f"{duration(self._span * (1 - part / 4))} ago", bar * part // 4
            # One that would touch its neighbors is left out.
            if (len(text) < at or not part) and at + len(tick) < bar - len("now"):
                text = fit(text, at) + tick
        return self._look.text([(f"{' ' * label} {fit(text, bar - len('now'))}now", "mute")])

    def row(self, entry: Entry, now: float, cells: int) -> Text:
        """A bar, or the heading of a group's bars."""
        if entry.kind == "band":
            name = cut(f" {clean(entry.row['name'])}", cells)
            struck = cut(f"  {entry.row['struck']}", cells - width(name))
            return self._look.text([(name, "bold"), (struck, "gone")])
        label, bar = _layout(cells)
        task, tone = entry.row, views.tone_of(entry.row)
        ended, created = task.get("ended"), task.get("created", now)
        shape = "·" if entry.kind == "ghost" else SHAPES.get(str(task.get("status")), "?")
        head = f"{' ' * (1 + 2 * entry.level)}{shape} "
        took = duration(now - created) if ended is None else fine(ended - created)
        parts: list[Cell] = [
            (head, tone),
            (fit(_named(task, self._place(entry, label), label - width(head)), label - width(head)), None),
            (" ", None),
            *_merged(self._bar(task, now, bar)),
            (took.rjust(TOOK), None),
        ]
        return self._look.text(views.dimmed(parts, entry))

    @staticmethod
    def _place(entry: Entry, cells: int) -> str:
        """What tells tasks of one name apart: the request, and the node where no heading names it."""
        node = views.node_name(entry.row.get("node")) if entry.level == 0 else ""
        return " ".join(part for part in (entry.instance, cut(node, cells // 2)) if part)

    def _bar(self, task: Row, now: float, cells: int) -> list[Cell]:
        """The cells of a bar, each with its tone."""
        begin, cause = now - self._span, _cause_at(task)
        created, ended = task.get("created", now), task.get("ended")
        end = now if ended is None else ended

        def cell_of(time: float) -> int:
            return min(cells - 1, int((time - begin) / self._span * cells))

        drawn: list[Cell] = [(" ", None)] * cells
        if end <= begin:
            return drawn
        for cell in range(max(0, cell_of(created)), cell_of(end) + 1):
            # The middle of the cell; a bar shorter than a cell has none of its own.
            at = min(end, max(created, begin + (cell + 0.5) / cells * self._span))
            drawn[cell] = self._part(task, at, end, cause)
        if created < begin:
            drawn[0] = (_BEYOND, "mute")
        if ended is None:
            drawn[-1] = (">" if self._look.ascii else _OPEN, views.tone_of(task))
        if cause is not None and cause > begin:
            # Beside the open end, not in its place.
            drawn[min(cell_of(cause), cells - (2 if ended is None else 1))] = (_STRUCK, "gone")
        return drawn

    def _part(self, task: Row, at: float, end: float, cause: float | None) -> Cell:
        """What the task did at a time."""
        if cause is not None and at >= cause:
            return (_CANCELLING, "cancel")
        if at < _started(task, end):
            return (_WAITED, "wait")
        return (_RAN, "run" if task.get("ended") is None else views.tone_of(task))


def _started(task: Row, end: float) -> float:
    """When the task got its slot. The feed says so of ended tasks; a live one ran from the start."""
    if task.get("started") is not None:
        return float(task["started"])
    return end if task.get("status") in ("queued", "pending") else task.get("created", end)


def _named(task: Row, instance: str, cells: int) -> str:
    """The name, cut before the number of its group: tasks of the same name are told apart by it."""
    name = clean(task.get("name", "?"))
    return f"{cut(name, cells - width(instance) - 1)} {instance}" if instance else cut(name, cells)


def _layout(cells: int) -> tuple[int, int]:
    """The cells of the labels and of the bars."""
    label = max(12, min(36, cells // 3))
    return label, max(8, cells - label - TOOK - 1)


def _merged(drawn: list[Cell]) -> Iterable[Cell]:
    """Put neighbors of the same tone together."""
    text, tone = "", None
    for each, other in drawn:
        if other != tone:
            yield text, tone
            text, tone = "", other
        text += each
    yield text, tone
