"""The details: everything about one task as lines of text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from otel_tasks_terminal import phrases
from otel_tasks_terminal.pen import SHAPES, Cell, Pen
from otel_tasks_terminal.text import clean, clock, cut, duration, fine, number, percent, place
from otel_tasks_terminal.views import tone_of

if TYPE_CHECKING:
    from collections.abc import Iterator

Row = dict[str, Any]


def lines(answer: Row, pen: Pen) -> Iterator[str]:
    """Everything about one task."""
    return (pen.line(*line) for line in parts(answer))


def parts(answer: Row) -> Iterator[list[Cell]]:
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
    if task.get("node"):
        yield "Node", clean(task["node"], 200), None
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
    times = [_when(steps, index, epoch) for index in range(len(steps))]
    # A time of another day has its date.
    cells = max(map(len, times), default=0) + 2
    return [
        (f"{at:<{cells}}{_step(step)}", None if index else "cancel")
        for index, (at, step) in enumerate(zip(times, steps, strict=True))
    ]


def _when(steps: list[Row], index: int, epoch: float) -> str:
    at = steps[index].get("at")
    if at is None:
        return ""
    before = steps[index - 1].get("at") if index else None
    return clock(epoch + at, milliseconds=True) if before is None else f"+{fine(max(0.0, at - before))}"


def _step(step: Row) -> str:
    if step.get("step") == "cause":
        kind, name = step.get("kind"), step.get("name")
        says = phrases.because({"kind": kind, "asked_by": name})
        parts = (says, None if kind == "explicit" else name, step.get("message"))
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
    return (
        f"{SHAPES.get(str(task.get('status')), '?')} {cut(clean(task.get('name', '?')), 40)}  {says}".rstrip()
    )
