"""Phrases: what a task does, why it is cancelled, and what is in trouble, in the words of the page."""

from __future__ import annotations

from typing import Any

from otel_tasks_terminal.text import clean, counted, duration, fine, number, percent, short_place

Row = dict[str, Any]

# The other kinds of causes read well without their underscores.
CAUSES = {
    "client_disconnect": "client disconnected",
    "explicit": "cancelled on request",
    "foreign": "cancelled by other code",
    "replaced": "replaced by a new task",
}


def doing(task: Row, now: float) -> str:
    """What a live task does now."""
    status = task.get("status")
    if status == "cancelling":
        since = f"cancelling {duration(now - (task.get('cancel_requested') or now))}"
        why = because(task["cause"]) if task.get("cause") else ""
        return " · ".join(part for part in (since, why, _waits(task)) if part)
    if status == "queued":
        ahead = (task.get("queue_position") or 0) - 1
        return "waits for a slot" + (
            f", {number(ahead)} ahead" if ahead > 0 else ", next" if ahead == 0 else ""
        )
    if status == "pending":
        return "not started yet"
    return _running(task, now)


def _running(task: Row, now: float) -> str:
    if task.get("retry_at"):
        return f"attempt {clean(task.get('attempt'))} failed, next in {duration(task['retry_at'] - now)}"
    if task.get("next_run"):
        return f"next run in {duration(task['next_run'] - now)}"
    if task.get("kind") == "service" and not task.get("where"):
        return "restarts soon"
    return _waits(task)


def _waits(task: Row) -> str:
    if task.get("awaits"):
        # Of the same group: its name is enough.
        return f"waits for {clean(str(task['awaits']).removeprefix(str(task.get('group_id')) + '/'))}"
    if task.get("where"):
        calls = task.get("calls")
        return f"at {clean(short_place(task['where']))}" + (f", in {clean(calls)}" if calls else "")
    return ""


def outcome(task: Row, now: float) -> str:
    """How an ended task ended."""
    status = clean(task.get("status"))
    parts = ["completed although cancelled" if task.get("cancel_ignored") else status]
    if status == "failed":
        parts.append(": ".join(clean(task[key]) for key in ("error_type", "error") if task.get(key)))
    if task.get("cause"):
        parts.append(because(task["cause"]))
    parts.append(f"{duration(now - task.get('ended', now))} ago")
    return " · ".join(part for part in parts if part)


def because(cause: Row) -> str:
    """Why something was cancelled, and by whom."""
    kind = str(cause.get("kind"))
    message = cause.get("message")
    says = CAUSES.get(kind, clean(kind).replace("_", " "))
    if kind == "explicit" and cause.get("asked_by"):
        says = f"requested by {clean(cause['asked_by'])}"
    return says + (f": {clean(message)}" if message else "")


def progress(row: Row) -> str:
    """How far a task, class, or group is: ``61 %``, or how much it has done of an unknown total."""
    report = row.get("progress")
    if not report:
        return ""
    done, total = report.get("done") or 0, report.get("total")
    return percent(done / total) if total else f"{number(done)} done"


def warning(row: Row, now: float) -> str:
    """A warning, with its count and since when."""
    kind, count = row.get("kind"), row.get("count") or 0
    if kind == "blocked":
        often = f"{number(count)} times, up to" if count > 1 else "for"
        return f"event loop blocked {often} {fine(row.get('seconds') or 0)}{_since(row, now)}"
    text = {
        "cancelling": f"cancelling for more than {duration(row.get('min_age') or 0)}",
        "unstarted": f"not started after {duration(row.get('min_age') or 0)}",
        "waiting": f"waiting at {clean(short_place(row.get('where') or '?'))}",
        "outlived": "outlived the request that started them",
        "ignored": "completed although cancelled",
    }.get(str(kind), clean(kind).replace("_", " "))
    about = "about " if row.get("estimated") else ""
    return f"{about}{number(count)} {text}{_since(row, now)}"


def _since(row: Row, now: float) -> str:
    if row.get("since") is None:
        return ""
    age = duration(now - row["since"])
    return {"blocked": f" · {age} ago", "ignored": f" · last {age} ago"}.get(
        str(row.get("kind")), f" · oldest {age}"
    )


def also_ended(children: int) -> str:
    """Which other tasks a cancellation ends."""
    return f"{counted(children, 'task')} in groups that it has opened" if children else "no other task"
