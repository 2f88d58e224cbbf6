"""The views: an answer of the feed as lines of text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from otel_tasks_terminal import phrases
from otel_tasks_terminal.pen import SHAPES, TONES, Cell, Column, Pen, table
from otel_tasks_terminal.text import (
    clean,
    counted,
    cut,
    duration,
    fine,
    fit,
    number,
    percent,
    place,
    short_place,
    width,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from otel_tasks_terminal.model import Entry, Model

Row = dict[str, Any]

MAX_WARNINGS = 5
# Below this width, the columns of counts leave their room to the names; two columns remain, of so many cells.
NARROW = 96
COUNT = 7
AGE = 9
TIMES = "\N{MULTIPLICATION SIGN}"

# --- a list of tasks -------------------------------------------------------------------------------

LIVE = (
    Column("STATUS", 12, keep=6),
    Column("AGE", 4, right=True, keep=5),
    Column("NAME", 16),
    Column("GROUP", 12, keep=2),
    Column("DOING", 18, keep=3),
    Column("ID", 22, keep=1),
)
# With a fleet, after the group.
NODE = Column("NODE", 12, keep=2)
NODE_AT = {"live": 4, "ended": 5}
ENDED = (
    Column("STATUS", 11, keep=6),
    Column("AGE", 4, right=True, keep=4),
    Column("TOOK", 4, right=True, keep=2),
    Column("NAME", 16),
    Column("GROUP", 12, keep=2),
    Column("OUTCOME", 20, keep=3),
    Column("ID", 22, keep=1),
)


def live_list(answer: Row, pen: Pen) -> Iterable[str]:
    """Live tasks, one a line."""
    now = answer.get("now", 0.0)
    rows = [_live_cells(task, now) for task in answer["rows"]]
    return _with_nodes(pen, LIVE, rows, answer, NODE_AT["live"])


def _live_cells(task: Row, now: float) -> list[Cell]:
    tone = tone_of(task)
    return [
        (status(task), tone),
        (duration(now - task.get("created", now)), None),
        (named(task), "bold"),
        (clean(task.get("group_id", "")), None),
        (phrases.doing(task, now), tone if tone == "cancel" else "mute"),
        (clean(task.get("id", "")), "mute"),
    ]


def ended_list(answer: Row, pen: Pen) -> Iterable[str]:
    """Ended tasks, one a line."""
    now = answer.get("now", 0.0)
    rows = [_ended_cells(task, now) for task in answer["rows"]]
    return _with_nodes(pen, ENDED, rows, answer, NODE_AT["ended"])


def _with_nodes(
    pen: Pen, columns: tuple[Column, ...], rows: list[list[Cell]], answer: Row, at: int
) -> Iterable[str]:
    """A table, with a column of nodes if the tasks are those of a fleet."""
    if not any(task.get("node") for task in answer["rows"]):
        return table(pen, columns, rows)
    cells = [
        [*row[:at], (node_name(task.get("node")), "mute"), *row[at:]]
        for row, task in zip(rows, answer["rows"], strict=True)
    ]
    return table(pen, (*columns[:at], NODE, *columns[at:]), cells)


def node_name(node: object) -> str:
    """A node as people call it: its host and its process."""
    return "/".join(clean(str(node or "")).split("/")[:2])


def _ended_cells(task: Row, now: float) -> list[Cell]:
    ended = task.get("ended", now)
    return [
        (status(task), tone_of(task)),
        (duration(now - ended), None),
        (fine(ended - task.get("created", ended)), None),
        (named(task), "bold"),
        (clean(task.get("group_id", "")), None),
        (phrases.outcome(task, now), "mute"),
        (clean(task.get("id") or ""), "mute"),
    ]


def status(task: Row) -> str:
    """A task's status, with its shape."""
    word = clean(task.get("status", "?"), 20)
    return f"{SHAPES.get(word, '?')} {word}"


def tone_of(task: Row) -> str:
    """The color of a task's status."""
    return TONES.get(str(task.get("status")), "wait")


def named(task: Row, instance: str = "") -> str:
    """A task's name, the number of its group, and its priority if that is not the usual one."""
    priority = clean(task.get("priority", "NORMAL"), 12)
    parts = (clean(task.get("name", "?")), clean(instance), "" if priority == "NORMAL" else priority)
    return " ".join(part for part in parts if part)


# --- the overview ----------------------------------------------------------------------------------

TREE = (
    Column("NAME", 28),
    Column("COUNT", 5, right=True, keep=7),
    Column("WAIT", 4, right=True, keep=4),
    Column("RUN", 3, right=True, keep=3),
    Column("CANCEL", 6, right=True, keep=5),
    Column("AGE p50 · p90 · oldest", 6, keep=6),
    Column("DOING", 14, keep=2),
)


def head(model: Model, pen: Pen, state: str = "") -> Iterator[str]:
    """Who this is, the counters, and what is in trouble."""
    yield pen.line((identity(model), "bold"), (f"  {state or access(model)}", "mute"))
    counted_up = _counters(model)
    if pen.columns is not None and sum(width(text) for text, _ in counted_up) > pen.columns:
        yield pen.line(*counted_up[:3])
        counted_up = counted_up[3:]
    if counted_up:
        yield pen.line(*counted_up)
    now = model.now()
    for warning in model.warnings[:MAX_WARNINGS]:
        yield pen.line(("! ", "cancel"), (warned(warning, now), None))
    if len(model.warnings) > MAX_WARNINGS:
        yield pen.line((f"! {counted(len(model.warnings) - MAX_WARNINGS, 'more warning')}", "cancel"))


def warned(warning: Row, now: float) -> str:
    """A warning, with its node if it is that of a fleet."""
    says = phrases.warning(warning, now)
    return f"{says} · {node_name(warning['node'])}" if warning.get("node") else says


def identity(model: Model) -> str:
    """The service, its host, and its process; of a fleet, how many nodes it has."""
    about = model.about
    parts = [about.get("service") or about.get("namespace")]
    if model.nodes:
        parts.append(_nodes(model))
    if not model.nodes or about.get("node"):
        # Otherwise, the one that answers is no part of what is shown.
        parts += [about.get("host"), f"pid {about.get('pid')}"]
    return " · ".join(clean(part) for part in parts if part)


def _nodes(model: Model) -> str:
    shown, count = model.shown_nodes(), len(model.nodes)
    says = counted(count, "node") if model.only is None else f"{len(shown)} of {counted(count, 'node')}"
    silent = sum(model.silent_since(node) is not None for node in shown)
    return f"{says}, {silent} silent" if silent else says


def access(model: Model) -> str:
    """What the view may do."""
    if model.stats.get("closed"):
        return "shut down"
    return "can cancel" if model.may_cancel else "read-only"


def _counters(model: Model) -> list[Cell]:
    stats, rates = model.shown_stats(), model.rates()
    parts: list[Cell] = []
    for word, key, status in (
        ("running", "running", "running"),
        ("waiting", "queued", "queued"),
        ("cancelling",) * 3,
    ):
        if key in stats:
            parts.append((f"{SHAPES[status]} {number(stats[key])} {word}   ", TONES[status]))
    for index, status in enumerate(("completed", "failed", "cancelled")):
        if status not in stats:
            continue
        value = number(stats.get(status, 0)) if rates is None else f"{number(round(rates[index], 1))}/s"
        parts.append((f"{SHAPES[status]} {value} {status}   ", TONES[status]))
    return [*parts[:-1], *((text.rstrip(), tone) for text, tone in parts[-1:])]


def counters(model: Model) -> str:
    """The counters as plain text."""
    return "".join(text for text, _ in _counters(model))


def tree(entries: Iterable[Entry], model: Model, pen: Pen) -> Iterable[str]:
    """The rows of the overview; in a narrow terminal, what a task does follows its name."""
    now = model.now()
    if pen.columns is not None and pen.columns < NARROW:
        cells = pen.columns
        rows = (dimmed(narrow_cells(entry, now, cells), entry) for entry in entries)
        lines = (narrow_heading(cells), *rows)
        return (pen.line(*line).rstrip() for line in lines)
    return table(pen, TREE, [dimmed(tree_cells(entry, now), entry) for entry in entries])


def dimmed(cells: list[Cell], entry: Entry) -> list[Cell]:
    """The cells of a row, without colors if its node is silent: they may be old."""
    return [(text, "mute") for text, _ in cells] if entry.silent else cells


def narrow_heading(cells: int) -> list[Cell]:
    """The titles of the columns of a narrow terminal."""
    return [(fit("NAME", _names(cells)) + "COUNT".rjust(COUNT) + "AGE".rjust(AGE), "mute")]


def narrow_cells(entry: Entry, now: float, cells: int) -> list[Cell]:
    """One row of a narrow terminal."""
    indent, row = "  " * entry.level, entry.row
    if entry.kind == "more" or is_unknown(entry):
        return [(_more(indent, row) if entry.kind == "more" else f"▸ {title(entry, now)}", "mute")]
    if entry.kind in ("group", "class"):
        oldest = row.get("oldest") if row.get("count") else None
        mark = "▾" if entry.open else "▸"
        return [
            (
                fit(f"{indent}{mark} {title(entry, now)}", _names(cells)),
                "bold" if entry.kind == "group" else None,
            ),
            (number(row.get("count") or 0).rjust(COUNT), "cancel" if row.get("cancelling") else None),
            (("" if oldest is None else duration(now - oldest)).rjust(AGE), "mute"),
        ]
    return [*task_cells(entry, now, max(10, cells - AGE)), (task_age(row, now).rjust(AGE), None)]


def task_cells(entry: Entry, now: float, cells: int, *, with_node: bool = True) -> list[Cell]:
    """A task and what it does, as wide as there is room; in a flat list, with its group, and its node."""
    row, tone = entry.row, tone_of(entry.row)
    says = _says(entry, now)
    shape = "·" if entry.kind == "ghost" else SHAPES.get(str(row.get("status")), "?")
    head = f"{'  ' * entry.level}{shape} "
    # The name goes first: one finds a task by it.
    name = cut(named(row, entry.instance), max(8, cells - width(head) - (12 if says else 0)))
    places = [node_name(row.get("node"))] if with_node else []
    places.append(clean(row.get("group_id") or ""))
    group = "".join(f"  {part}" for part in places if part and entry.level == 0)
    left = cells - width(head) - width(name)
    return [
        (head, tone),
        (name, "bold" if tone == "cancel" else None),
        (fit(f"{group}  {says}", left), tone if tone in ("cancel", "fail") else "mute"),
    ]


def task_age(task: Row, now: float) -> str:
    """How old a live task is, or how long an ended one took."""
    return duration(task.get("ended", now) - task.get("created", now))


def _names(cells: int) -> int:
    return max(10, cells - COUNT - AGE)


def _more(indent: str, row: Row) -> str:
    return f"{indent}… {number(row['total'] - row['shown'])} more"


def _says(entry: Entry, now: float) -> str:
    if entry.kind == "ghost":
        return "has ended"
    return phrases.outcome(entry.row, now) if entry.kind == "ended" else phrases.doing(entry.row, now)


def tree_cells(entry: Entry, now: float) -> list[Cell]:
    """The cells of one row."""
    indent, row = "  " * entry.level, entry.row
    if entry.kind == "more" or is_unknown(entry):
        return [*narrow_cells(entry, now, 0), *[("", None)] * (len(TREE) - 1)]
    if entry.kind in ("group", "class"):
        return _counted_cells(entry, indent, now)
    tone = tone_of(row)
    shape = SHAPES.get(str(row.get("status")), "?")
    counts: list[Cell] = [("", None)] * 4
    return [
        (f"{indent}{shape} {named(row, entry.instance)}", tone),
        *counts,
        (task_age(row, now), None),
        (_with_progress(row, _says(entry, now)), tone),
    ]


def _counted_cells(entry: Entry, indent: str, now: float) -> list[Cell]:
    row = entry.row
    count, queued, cancelling = (row.get(key) or 0 for key in ("count", "queued", "cancelling"))
    mark = "▾" if entry.open else "▸"
    return [
        (f"{indent}{mark} {title(entry, now)}", "bold" if entry.kind == "group" else None),
        (number(count), None),
        (number(queued), "wait" if queued else "mute"),
        (number(count - queued - cancelling), None if count - queued - cancelling else "mute"),
        (number(cancelling), "cancel" if cancelling else "mute"),
        (ages(row, now), None),
        (phrases.progress(row), "run"),
    ]


def is_unknown(entry: Entry) -> bool:
    """Whether a row stands for a node of which nothing is known, not even that it runs nothing."""
    return bool(entry.row.get("unknown"))


def title(entry: Entry, now: float) -> str:
    """The name of a group or class, and how many it stands for; of a silent node, since when it is."""
    row = entry.row
    if row.get("silent_since") is not None:
        return f"{node_name(row['node'])} · silent for {duration(now - row['silent_since'])}"
    if row.get("unknown"):
        return f"{node_name(row['node'])} · no answer yet"
    times = row.get("count") if entry.kind == "class" else row.get("instances")
    is_node = entry.kind == "group" and row.get("parent") is None and row.get("node")
    parts = [node_name(row["node"])] if is_node else []
    parts.append(clean(row.get("name", "?")))
    if entry.kind == "class" or (times or 0) > 1:
        parts.append(f"{TIMES}{number(times or 0)}")
    if row.get("limit"):
        parts.append(f"limit {number(row['limit'])}")
    if row.get("kind") in ("thread", "service"):
        parts.append(row["kind"])
    return " ".join(parts)


def ages(row: Row, now: float) -> str:
    """The median age, the one that 90 % do not reach, and the oldest."""
    if not row.get("count") or row.get("oldest") is None:
        return ""
    texts = [duration(now - row[key]) for key in ("p50", "p90", "oldest") if row.get(key) is not None]
    return texts[0] if len(set(texts)) == 1 else " · ".join(texts)


def _with_progress(task: Row, says: str) -> str:
    report = task.get("progress") or {}
    fraction = report.get("fraction")
    done = "" if fraction is None else percent(fraction)
    return " · ".join(part for part in (done, says) if part)


def where(task: Row) -> str | None:
    """The line where a task waits, as a search takes it; None if it is not known."""
    return place(task["where"]) if task.get("where") else None


def short_where(task: Row) -> str:
    """The same for people."""
    return short_place(task["where"])
