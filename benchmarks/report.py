"""The figures as text: tables for the terminal and in Markdown, between markers in the documents."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from benchmarks.goals import FLEET_GOALS, GOALS, Goal, ratio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from benchmarks.measure import Row, Spread, Table

BEGIN, END = "<!-- benchmarks: made by `make bench` -->", "<!-- benchmarks: end -->"


# Tables with the same rows, side by side on docs/performance.md: each column's heading, and the table's id.
TASKS = {
    "5,000, asyncio": "spawn-asyncio-5000",
    "100,000": "spawn-asyncio-100000",
    "awaited singly": "spawn-asyncio-serial",
    "5,000, uvloop": "spawn-uvloop-5000",
}
REQUESTS = {
    "raw ASGI": "middleware-raw",
    "FastAPI GET": "middleware-fastapi-get",
    "FastAPI POST": "middleware-fastapi-post",
    "stream of 200": "middleware-fastapi-stream",
    "1,000 in flight": "middleware-in-flight",
}


def write(root: Path, tables: list[Table], machine: dict[str, Any]) -> None:
    """Put the goals into the pages on performance and on fleets, and every table into ``docs/figures.md``."""
    where = _machine(machine)
    goals = "\n".join(_markdown(_goal_cells(GOALS, tables)))
    picture = "![Bars: what a task, a span, a cancellation and a request cost here and with peers]"
    summary = [
        _side_by_side("CPU time per task, `asyncio.TaskGroup` = 1", TASKS, tables, _multiple),
        _side_by_side("CPU time per request, µs", REQUESTS, tables, lambda row: _number(row.value.median)),
    ]
    requests = "![Bars: what each middleware adds to a request]"
    in_docs = [f"{picture}(images/benchmarks.svg)", goals, f"{requests}(images/middleware.svg)", *summary]
    _between(root / "docs" / "performance.md", "\n\n".join(in_docs))
    _between(root / "docs" / "reference" / "fleet.md", _fleet(tables))
    _between(root / "docs" / "figures.md", "\n\n".join([where, *map(_table, tables)]))


def print_goals(tables: list[Table]) -> None:
    """Show the goals beside what was measured."""
    print("\n" + "\n".join(_columns(_goal_cells((*GOALS, *FLEET_GOALS), tables))), flush=True)


def as_text(table: Table) -> str:
    """A table for the terminal."""
    return "\n".join([table.title, *_columns(_cells(table)), *([table.note] if table.note else [])])


def _fleet(tables: list[Table]) -> str:
    """The goals of a fleet, with the quartiles of the rounds in place of a yardstick."""
    cells = _goal_cells(FLEET_GOALS, tables)
    for line, spread in zip(
        cells, ["quartiles", *(_spread(goal, tables) for goal in FLEET_GOALS)], strict=True
    ):
        line[1:5] = [*line[2:4], spread, line[4]]
    notes = dict.fromkeys(table.note for table in tables if table.id == "fleet-cancel")
    return "\n\n".join(["\n".join(_markdown(cells)), *notes])


def _spread(goal: Goal, tables: list[Table]) -> str:
    row = goal.decisive(tables)
    spread = row and (row.ratio if goal.figure is ratio else row.value)
    return "" if not spread else f"{goal.show.format(spread.low)} to {goal.show.format(spread.high)}"


def _goal_cells(goals: Iterable[Goal], tables: list[Table]) -> list[list[str]]:
    cells = [["what", "yardstick", "goal", "measured", ""]]
    for goal in goals:
        figure = goal.measured(tables)
        shown = "not measured" if figure is None else goal.show.format(figure)
        verdict = "" if figure is None else ("met" if goal.is_met(figure) else "missed")
        cells.append([goal.what, goal.yardstick, goal.text, shown, verdict])
    return cells


def _table(table: Table) -> str:
    rounds = f"{table.rounds} rounds. " if table.rounds > 1 else ""
    caption = f"### {table.title}\n\n{rounds}{table.note}".rstrip()
    return "\n".join([caption, "", *_markdown(_cells(table))])


def _side_by_side(
    title: str, columns: dict[str, str], tables: list[Table], cell: Callable[[Row], str]
) -> str:
    chosen = {
        table.id: {row.name: row for row in table.rows} for table in tables if table.id in columns.values()
    }
    names = dict.fromkeys(name for rows in chosen.values() for name in rows)
    lines = [
        [
            name,
            *(cell(rows[name]) if name in rows else "" for rows in map(chosen.__getitem__, columns.values())),
        ]
        for name in names
    ]
    return "\n".join(_markdown([[title, *columns], *lines]))


def _multiple(row: Row) -> str:
    return "1" if row.ratio is None else f"{row.ratio.median:.2f}"


def _cells(table: Table) -> list[list[str]]:
    compared = any(row.ratio for row in table.rows)
    header = ["", table.unit, *(["ratio", "quartiles"] if compared else [table.high])]
    return [header, *(_row(row, table.yardstick, compared) for row in table.rows)]


def _row(row: Row, yardstick: str, compared: bool) -> list[str]:
    cells = [row.name, _number(row.value.median)]
    if not compared:
        return [*cells, _beside(row.value)]
    if row.ratio is None:
        return [*cells, "1" if row.name == yardstick else "", ""]
    return [*cells, f"{row.ratio.median:.2f}", _quartiles(row.ratio)]


def _beside(value: Spread) -> str:
    high = _number(value.high)
    return high if value.low == value.median else f"{_number(value.low)} to {high}"


def _quartiles(ratio: Spread) -> str:
    return "" if ratio.low == ratio.high else f"{ratio.low:.2f} to {ratio.high:.2f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _machine(machine: dict[str, Any]) -> str:
    peers = ", ".join(f"{name} {version}" for name, version in machine["peers"].items())
    python = f"{machine['implementation']} {machine['python']}"
    return f"{python}, {machine['system']}, {machine['cpus']} processors; {peers}."


def _markdown(cells: list[list[str]]) -> list[str]:
    header, *rows = cells
    lines = [header, ["---", *(["---:"] * (len(header) - 1))], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _columns(cells: list[list[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]


def _between(path: Path, text: str) -> None:
    old = path.read_text("utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if len(pattern.findall(old)) != 1:
        raise ValueError(f"{path} must have once: {BEGIN} ... {END}")
    path.write_text(pattern.sub(lambda _: f"{BEGIN}\n\n{text}\n\n{END}", old), encoding="utf-8")
