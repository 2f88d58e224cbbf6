"""The views: an answer of the feed as lines of text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from otel_tasks_terminal import phrases
from otel_tasks_terminal.pen import SHAPES, TONES, Cell, Column, Pen, table
from otel_tasks_terminal.text import (
    clean,
    clock,
    counted,
    cut,
    duration,
    fine,
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
    return table(pen, LIVE, [_live_cells(task, now) for task in answer["rows"]])


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
    return table(pen, ENDED, [_ended_cells(task, now) for task in answer["rows"]])


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
    yield pen.line(*counted_up)
    now = model.now()
    for warning in model.warnings[:MAX_WARNINGS]:
        yield pen.line(("! ", "cancel"), (phrases.warning(warning, now), None))
    if len(model.warnings) > MAX_WARNINGS:
        yield pen.line((f"! {counted(len(model.warnings) - MAX_WARNINGS, 'more warning')}", "cancel"))


def identity(model: Model) -> str:
    """The service, its host, and its process."""
    about = model.about
    return " · ".join(
        clean(part) for part in (about.get("service"), about.get("host"), f"pid {about.get('pid')}") if part
    )


def access(model: Model) -> str:
    """What the view may do."""
    if model.stats.get("closed"):
        return "shut down"
    return "can cancel" if model.may_cancel else "read-only"


def _counters(model: Model) -> list[Cell]:
    stats, rates = model.stats, model.rates()
    parts: list[Cell] = []
    for word, key, status in (
        ("running", "running", "running"),
        ("waiting", "queued", "queued"),
        ("cancelling",) * 3,
    ):
        parts.append((f"{SHAPES[status]} {number(stats.get(key, 0))} {word}   ", TONES[status]))
    for index, status in enumerate(("completed", "failed", "cancelled")):
        value = number(stats.get(status, 0)) if rates is None else f"{number(round(rates[index], 1))}/s"
        parts.append((f"{SHAPES[status]} {value} {status}   ", TONES[status]))
    parts[-1] = (parts[-1][0].rstrip(), parts[-1][1])
    return parts


def counters(model: Model) -> str:
    """The counters as plain text."""
    return "".join(text for text, _ in _counters(model))


def tree(entries: Iterable[Entry], model: Model, pen: Pen) -> Iterable[str]:
    """The rows of the overview."""
    now = model.now()
    return table(pen, TREE, [tree_cells(entry, now) for entry in entries])


def tree_cells(entry: Entry, now: float) -> list[Cell]:
    """The cells of one row."""
    indent, row = "  " * entry.level, entry.row
    if entry.kind == "more":
        text = f"{indent}… {number(row['total'] - row['shown'])} more"
        return [(text, "mute"), *[("", None)] * (len(TREE) - 1)]
    if entry.kind in ("group", "class"):
        return _counted_cells(entry, indent, now)
    tone, ended = tone_of(row), entry.kind == "ended"
    age = row.get("ended", now) - row.get("created", now) if ended else now - row.get("created", now)
    says = phrases.outcome(row, now) if ended else phrases.doing(row, now)
    shape = SHAPES.get(str(row.get("status")), "?")
    counts: list[Cell] = [("", None)] * 4
    return [
        (f"{indent}{shape} {named(row, entry.instance)}", tone),
        *counts,
        (duration(age), None),
        (_with_progress(row, says), tone),
    ]


def _counted_cells(entry: Entry, indent: str, now: float) -> list[Cell]:
    row = entry.row
    count, queued, cancelling = (row.get(key) or 0 for key in ("count", "queued", "cancelling"))
    mark = "▾" if entry.open else "▸"
    return [
        (f"{indent}{mark} {title(entry)}", "bold" if entry.kind == "group" else None),
        (number(count), None),
        (number(queued), "wait" if queued else "mute"),
        (number(count - queued - cancelling), None if count - queued - cancelling else "mute"),
        (number(cancelling), "cancel" if cancelling else "mute"),
        (ages(row, now), None),
        (phrases.progress(row), "run"),
    ]


def title(entry: Entry) -> str:
    """The name of a group or class, and how many it stands for."""
    row = entry.row
    times = row.get("count") if entry.kind == "class" else row.get("instances")
    parts = [clean(row.get("name", "?"))]
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


# --- one task --------------------------------------------------------------------------------------


def detail(answer: Row, pen: Pen) -> Iterator[str]:
    """Everything about one task."""
    return (pen.line(*parts) for parts in detail_parts(answer))


def detail_parts(answer: Row) -> Iterator[list[Cell]]:
    """The same, each line as texts with their tones."""
    task, now, epoch = answer.get("task", {}), answer.get("now", 0.0), answer.get("epoch", 0.0)
    shape = SHAPES.get(str(task.get("status")), "?")
    yield [(f"{shape} ", tone_of(task)), (clean(task.get("name", "?")), "bold")]
    yield [(" / ".join(clean(name) for name in answer.get("path", ())), "mute")]
    yield []
    for term, value, tone in facts(answer):
        yield [(f"{term:<11}", "mute"), (value, tone)]
    why = "Why it is cancelled" if answer.get("state") == "live" else "Why it was cancelled"
    metadata = answer.get("metadata", {}).items()
    for heading, lines in (
        ("Waiting at", _frames(answer)),
        (why, _chain(answer, epoch)),
        ("Siblings", _siblings(answer, now)),
        ("Metadata", [(f"{clean(key)}: {clean(value)}", None) for key, value in metadata]),
    ):
        if lines:
            yield []
            yield [(heading, "bold")]
            yield from ([(f"  {text}", tone)] for text, tone in lines)


Fact = tuple[str, str, str | None]


def facts(answer: Row) -> Iterator[Fact]:
    """What is known of a task in a few words each: a term, its value, and a tone."""
    task, now, epoch = answer.get("task", {}), answer.get("now", 0.0), answer.get("epoch", 0.0)
    created, ended = task.get("created", now), task.get("ended")
    says = phrases.doing(task, now) if ended is None else phrases.outcome(task, now)
    if task.get("status") == "running":
        says = f"running · {says}" if says else "running"
    yield "Status", says, tone_of(task)
    yield "Priority", clean(task.get("priority", "NORMAL")), None
    yield "Created", f"{clock(epoch + created)}, {duration(now - created)} ago", None
    if ended is not None:
        yield "Ended", f"{clock(epoch + ended)}, after {fine(ended - created)}", None
    if task.get("progress"):
        yield "Progress", _progress(task["progress"], now), None
    if task.get("attempt"):
        yield "Attempt", clean(task["attempt"]), None
    yield from _others(answer, task)
    yield from _ids(answer, task)


def _others(answer: Row, task: Row) -> Iterator[Fact]:
    if task.get("awaits"):
        awaited = answer.get("awaited") or {}
        says = clean(task["awaits"]) if awaited.get("id") else _other(awaited, task["awaits"])
        yield "Waits for", says, None
    if answer.get("waiters"):
        yield "Awaited by", ", ".join(_other(waiter) for waiter in answer["waiters"]), None
    if answer.get("children"):
        yield "Children", phrases.also_ended(answer["children"]), None


def _other(other: Row, name: str = "?") -> str:
    """A task on the other end of an await; a plain asyncio task has no more than a number for a name."""
    says = clean(other.get("name") or name)
    if other.get("id") or not other.get("function"):
        return says
    where = other.get("where")
    at = f", at {clean(place(where))} in {clean(where.get('function', '?'))}" if where else ""
    return f"{says} (runs {clean(other['function'])}{at})"


def _ids(answer: Row, task: Row) -> Iterator[Fact]:
    yield "Task id", clean(task.get("task_id", "?"), 200), None
    if task.get("id"):
        yield "Id", clean(task["id"]), None
    if task.get("trace_id"):
        yield "Trace", clean(answer.get("trace_url") or task["trace_id"], 400), None


def _progress(report: Row, now: float) -> str:
    done, total, fraction = report.get("done") or 0, report.get("total"), report.get("fraction")
    parts = [f"{number(done)} of {number(total)}" if total else number(done)]
    if fraction is not None:
        parts[0] += f" ({percent(fraction)})"
    if report.get("seconds_left") is not None:
        parts.append(f"about {duration(report['seconds_left'] - (now - report.get('at', now)))} left")
    if report.get("message"):
        parts.append(clean(report["message"]))
    return ", ".join(parts)


def _frames(answer: Row) -> list[Cell]:
    frames = answer.get("frames") or [frame for frame in (answer.get("task", {}).get("where"),) if frame]
    return [
        (
            f"{clean(place(frame))} in {clean(frame.get('function', '?'))}",
            None if frame.get("own", True) else "mute",
        )
        for frame in frames
    ]


def _chain(answer: Row, epoch: float) -> list[Cell]:
    steps = answer.get("cause_chain", ())
    return [
        (f"{_when(steps, index, epoch):<14}{_step(step)}", "cancel" if index == 0 else None)
        for index, step in enumerate(steps)
    ]


def _when(steps: list[Row], index: int, epoch: float) -> str:
    at = steps[index].get("at")
    if at is None:
        return ""
    before = steps[index - 1].get("at") if index else None
    return clock(epoch + at, milliseconds=True) if before is None else f"+{fine(max(0.0, at - before))}"


def _step(step: Row) -> str:
    if step.get("step") == "cause":
        parts = (phrases.because({"kind": step.get("kind")}), step.get("name"), step.get("message"))
        return " · ".join(clean(part) for part in parts if part)
    if step.get("step") == "group":
        return f"group {clean(step.get('name'))}"
    ended, at = step.get("ended"), step.get("at")
    end = "not finished" if ended is None else "ended" if at is None else f"ended {fine(ended - at)} later"
    return f"this task · {end}"


def _siblings(answer: Row, now: float) -> list[Cell]:
    siblings = answer.get("siblings") or {}
    ended = siblings.get("ended", {})
    counts = [f"{number(count)} {SHAPES.get(name, '?')}" for name, count in ended.items() if count]
    total = sum(ended.values())
    if not total and not siblings.get("live"):
        return []
    summary = f"{number(siblings.get('live', 0))} live, {number(total)} ended" + (
        f" ({', '.join(counts)})" if counts else ""
    )
    lines: list[Cell] = [(summary, None)]
    for task in siblings.get("rows", ()):
        lines.append((_sibling(task, phrases.doing(task, now)), tone_of(task)))
    for task in siblings.get("ended_rows", ()):
        lines.append((_sibling(task, phrases.outcome(task, now)), tone_of(task)))
    return lines


def _sibling(task: Row, says: str) -> str:
    return f"{SHAPES.get(str(task.get('status')), '?')} {cut(clean(task.get('name', '?')), 40)}  {says}"


def where(task: Row) -> str | None:
    """The line where a task waits, as a search takes it; None if it is not known."""
    return place(task["where"]) if task.get("where") else None


def short_where(task: Row) -> str:
    """The same for people."""
    return short_place(task["where"])
