"""The chart: panels of bars, ours in color, and a mark where the goal is. Drawn by hand: no dependency."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from benchmarks import goals
from benchmarks.goals import added, ratio, worst
from benchmarks.names import BARE, BASE_HTTP, NONE

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.goals import Goal
    from benchmarks.measure import Row, Table

WIDTH, MARGIN, GAP = 960, 24, 32
PANEL = (WIDTH - 2 * MARGIN - GAP) / 2
LABEL, VALUE = 202, 64
BAR, STEP = 14, 22
OURS, PEER, GOAL, INK, FAINT = "#2f6fdf", "#b9c0ca", "#d0463b", "#1f2430", "#697180"


@dataclass
class Bar:
    """One line of a panel."""

    label: str
    value: float
    ours: bool


@dataclass
class Panel:
    """One comparison.

    Attributes:
        title: What is compared.
        unit: What the bars show; shorter is better in all of them.
        show: How a value is written.
        goal: Where the mark stands; None without one.
        bars: From top to bottom.
    """

    title: str
    unit: str
    show: str
    goal: float | None
    bars: list[Bar] = field(default_factory=list)

    @property
    def height(self) -> float:
        """The height of heading and bars."""
        return 46 + STEP * len(self.bars) + (16 if self.goal is not None else 4)


def draw(tables: list[Table]) -> str:
    """Draw what was measured; a panel whose table is missing is left out."""
    return _drawn("What it costs", PANELS, tables)


def draw_middleware(tables: list[Table]) -> str:
    """Draw what each middleware adds to a request."""
    return _drawn("What it adds to a request", REQUEST_PANELS, tables)


def _drawn(
    title: str, makers: tuple[Callable[[dict[str, Table]], Panel | None], ...], tables: list[Table]
) -> str:
    known = {table.id: table for table in tables}
    panels = [panel for panel in (make(known) for make in makers) if panel is not None]
    body, y = [], 62.0
    for left, right in zip(panels[::2], [*panels[1::2], None], strict=False):
        body.append(_panel(left, MARGIN, y))
        if right is not None:
            body.append(_panel(right, MARGIN + PANEL + GAP, y))
        y += max(left.height, 0 if right is None else right.height) + 18
    return _document(title, y, "\n".join(body))


def _document(title: str, height: float, body: str) -> str:
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" \
font-family="system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif" font-size="12">
<rect width="{WIDTH}" height="{height:.0f}" rx="8" fill="#ffffff"/>
<text x="{MARGIN}" y="30" font-size="17" font-weight="600" fill="{INK}">{escape(title)}</text>
<text x="{MARGIN}" y="48" fill="{FAINT}">Shorter is better. </text>
<rect x="{MARGIN + 106}" y="38" width="12" height="12" rx="2" fill="{OURS}"/>
<text x="{MARGIN + 123}" y="48" fill="{FAINT}">otel_tasks</text>
<rect x="{MARGIN + 196}" y="38" width="12" height="12" rx="2" fill="{PEER}"/>
<text x="{MARGIN + 213}" y="48" fill="{FAINT}">others</text>
<line x1="{MARGIN + 264}" x2="{MARGIN + 264}" y1="38" y2="50" stroke="{GOAL}" stroke-width="2" \
stroke-dasharray="3 2"/>
<text x="{MARGIN + 272}" y="48" fill="{FAINT}">goal for otel_tasks</text>
{body}
</svg>
"""


def _panel(panel: Panel, x: float, y: float) -> str:
    heading = f'<text x="{x:.0f}" y="{y + 16:.0f}" font-size="14" font-weight="600" fill="{INK}">'
    lines = [
        f"{heading}{escape(panel.title)}</text>",
        f'<text x="{x:.0f}" y="{y + 32:.0f}" fill="{FAINT}">{escape(panel.unit)}</text>',
    ]
    room = PANEL - LABEL - VALUE
    most = max([bar.value for bar in panel.bars] + ([panel.goal] if panel.goal is not None else []))
    top = y + 44
    for number, bar in enumerate(panel.bars):
        line = top + number * STEP
        width = max(1.5, bar.value / most * room)
        ink, weight = (OURS, ' font-weight="600"') if bar.ours else (INK, "")
        lines += [
            f'<text x="{x + LABEL - 8:.0f}" y="{line + 11:.0f}" text-anchor="end" fill="{ink}"{weight}>'
            f"{escape(bar.label)}</text>",
            f'<rect x="{x + LABEL:.0f}" y="{line:.0f}" width="{width:.1f}" height="{BAR}" rx="2" '
            f'fill="{OURS if bar.ours else PEER}"/>',
            f'<text x="{x + LABEL + width + 6:.0f}" y="{line + 11:.0f}" fill="{ink}"{weight}>'
            f"{panel.show.format(bar.value)}</text>",
        ]
    if panel.goal is not None:
        lines.append(_mark(panel, x + LABEL + panel.goal / most * room, top))
    return "\n".join(lines)


def _mark(panel: Panel, x: float, top: float) -> str:
    bottom = top + STEP * len(panel.bars)
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4:.0f}" y2="{bottom:.0f}" stroke="{GOAL}" '
        f'stroke-width="1.5" stroke-dasharray="3 2"/>\n'
        f'<text x="{x:.0f}" y="{bottom + 12:.0f}" text-anchor="middle" font-size="10" fill="{GOAL}">'
        f"{panel.show.format(panel.goal)}</text>"
    )


def _bars(table: Table, figure: Callable[[Row], float], *without: str) -> list[Bar]:
    bars = [
        Bar(row.name.removeprefix("asyncio: "), max(0.0, figure(row)), row.name.startswith("otel_tasks"))
        for row in table.rows
        if row.name not in without
    ]
    return sorted(bars, key=lambda bar: bar.value)


def _ratios(title: str, unit: str, table_id: str, goal: Goal) -> Callable[[dict[str, Table]], Panel | None]:
    def make(known: dict[str, Table]) -> Panel | None:
        table = known.get(table_id)
        return Panel(title, unit, "{:.2f}", goal.limit, _bars(table, ratio)) if table else None

    return make


def _memory(known: dict[str, Table]) -> Panel | None:
    table = known.get("memory-100000")
    if table is None:
        return None
    limit = goals.MEMORY.limit
    return Panel(
        "Memory of a live task", "bytes more than a bare one", "{:,.0f}", limit, _bars(table, added, BARE)
    )


def _request(
    title: str, table_id: str, goal: Goal | None = None
) -> Callable[[dict[str, Table]], Panel | None]:
    def make(known: dict[str, Table]) -> Panel | None:
        table = known.get(table_id)
        base = None if table is None else table.row(NONE)
        if table is None or base is None:
            return None
        limit = None if goal is None else base.value.median * (1 / goal.limit - 1)
        unit = f"CPU µs more than without any middleware ({base.value.median:,.0f} µs)"
        return Panel(title, unit, "{:,.1f}", limit, _bars(table, added, NONE, BASE_HTTP))

    return make


def _disconnect(known: dict[str, Table]) -> Panel | None:
    panel = Panel(
        "The client hangs up: until the last task has ended",
        "ms, 99 of 100, by the age of the request, 200 others in flight",
        "{:.1f}",
        goals.DISCONNECT.limit,
    )
    sides = (("ours", "otel_tasks"), ("watcher", "a watcher per request"), ("listener", "handler awaits it"))
    for key, name in sides:
        table = known.get(f"disconnect-{key}-busy")
        for row in table.rows[1:] if table else []:
            panel.bars.append(Bar(f"{name}, {row.name.removesuffix(' old')}", worst(row), key == "ours"))
    return panel if panel.bars else None


PANELS = (
    _ratios(
        "A task: create, run, end",
        "CPU time; asyncio.TaskGroup = 1; no SDK",
        "spawn-asyncio-5000",
        goals.SPAWN,
    ),
    _memory,
    _ratios("A task with a span", "CPU time; hand-written span = 1; batch export", "span-batch", goals.SPAN),
    _request("A FastAPI request", "middleware-fastapi-get", goals.FASTAPI),
    _ratios(
        "Cancel 100,000 sleeping tasks",
        "CPU time; a bare loop of cancel() = 1",
        "cancel-100000",
        goals.CANCEL,
    ),
    _disconnect,
)
REQUEST_PANELS = (
    _request("A GET", "middleware-fastapi-get", goals.FASTAPI),
    _request("A POST with a body", "middleware-fastapi-post"),
    _request("A stream of 200 chunks", "middleware-fastapi-stream"),
    _request("A GET that waits, 1,000 in flight", "middleware-in-flight"),
)
