"""Traces and metrics as text for people and tests: no ids, no times, no random order.

The expected text is in files, and a failure shows the difference. After an intended change,
``UPDATE_EXPECTED=1 make test ARGS=tests/e2e/test_services.py`` rewrites the files.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from examples.trace_tree import NO_ROOT, missing_parents
from otel_tasks import TaskPriority

if TYPE_CHECKING:
    from collections.abc import Iterable

    from examples.otlp_receiver import Point
    from examples.trace_tree import Span

EXPECTED = Path(__file__).parent / "e2e" / "expected"


def outline(spans: Iterable[Span]) -> str:
    """The spans as a tree: each line is one, indented below its parent.

    It says service, name and kind (of a task its priority and its group), status, how it ended and why, and
    where its links lead, or that its parent cancelled it. Siblings stand in the order of the alphabet. Spans
    whose parent did not come stand below a line that says so.
    """
    known = {span.span_id: span for span in spans}
    children: dict[str | None, list[Span]] = {}
    for span in known.values():
        children.setdefault(span.parent_id, []).append(span)

    def trees(parent: str | None, depth: int) -> list[str]:
        found = sorted(
            ["  " * depth + _line(span, known), *trees(span.span_id, depth + 1)]
            for span in children.get(parent, [])
        )
        return [line for tree in found for line in tree]

    lost = sorted([NO_ROOT, *trees(parent, 1)] for parent in missing_parents(known.values()))
    return "\n".join([*trees(None, 0), *(line for tree in lost for line in tree)]) + "\n"


def outline_by_request(spans: Iterable[Span]) -> str:
    """Several traces, each below what its first request asked for."""
    traces: dict[str, list[Span]] = {}
    for span in spans:
        traces.setdefault(span.trace_id, []).append(span)
    parts = sorted(f"## {_asked(trace)}\n\n{outline(trace)}" for trace in traces.values())
    return "\n".join(parts)


def metrics_outline(points: Iterable[Point]) -> str:
    """The last value of each point of the library's own metrics, a line for each."""
    last = {
        (point.service, point.name, point.kind, point.unit, _pairs(point.attributes)): point.value
        for point in points
        if point.scope == "otel_tasks"
    }
    lines = (
        f"{service}  {name}  {kind}, {unit}  {pairs}: {value:g}"
        for (service, name, kind, unit, pairs), value in last.items()
    )
    return "\n".join(sorted(lines)) + "\n"


def compare(found: str, name: str) -> None:
    """Compare with the file of that name, or write it where that is asked for."""
    path = EXPECTED / name
    if os.environ.get("UPDATE_EXPECTED"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(found, "utf-8")
    expected = path.read_text("utf-8") if path.exists() else ""
    if found != expected:
        difference = difflib.unified_diff(
            expected.splitlines(),
            found.splitlines(),
            fromfile=f"expected ({path.name})",
            tofile="found",
            lineterm="",
            n=50,
        )
        pytest.fail("\n".join(difference), pytrace=False)


def _line(span: Span, known: dict[str, Span]) -> str:
    facts = [_kind(span), f"status {span.status.lower()}", _end(span)]
    facts += [_link(purpose, target, span, known) for purpose, target in sorted(span.links)]
    if "otel_tasks.cancel.origin.span_id" in span.attributes:
        facts.append("cancelled by its parent" if span.cancelled_by == span.parent_id else "no parent's id")
    return f"{span.service}  {span.name}  {', '.join(fact for fact in facts if fact)}"


def _kind(span: Span) -> str:
    if not span.is_task:
        return span.kind.lower() if span.is_request or span.is_call else "group"
    priority = TaskPriority(span.attributes["otel_tasks.task.priority"]).name.lower()
    return f"{priority} task of {span.attributes['otel_tasks.group.name']}"


def _end(span: Span) -> str:
    attributes = span.attributes
    if span.is_request or span.is_call:
        words = [str(attributes.get("http.response.status_code", "no answer"))]
        if "otel_tasks.request.outcome" in attributes:
            words.append(str(attributes["otel_tasks.request.outcome"]))
            words.append(f"tasks cancelled: {attributes['otel_tasks.cancel.count']}")
        return ", ".join(words)
    words = [str(attributes.get("otel_tasks.task.outcome", ""))]
    if "otel_tasks.cancel.reason" in attributes:
        words.append(f"because {attributes['otel_tasks.cancel.reason']}")
    if "error.type" in attributes:
        words.append(f"with {attributes['error.type']} {span.description!r}")
    return " ".join(word for word in words if word)


def _link(purpose: str, target: str, span: Span, known: dict[str, Span]) -> str:
    linked = known.get(target)
    if linked is None:
        return f"{purpose} -> another trace"
    place = "above" if target in _above(span, known) else "elsewhere"
    return f"{purpose} -> {linked.service} {linked.name} {place}"


def _above(span: Span, known: dict[str, Span]) -> list[str]:
    above: list[str] = []
    while span.parent_id in known:
        above.append(span.parent_id)
        span = known[span.parent_id]
    return above


def _asked(trace: list[Span]) -> str:
    first = min((span for span in trace if span.is_request), key=lambda span: span.start)
    path, query = first.attributes["url.path"], first.attributes.get("url.query", "")
    # A task's uid is another one each time.
    path = re.sub(r"/[\w-]{22}(?=/|$)", "/{uid}", path)
    return f"{first.attributes['http.request.method']} {path}{'?' if query else ''}{query}"


def _pairs(attributes: dict[str, Any]) -> str:
    pairs = sorted(attributes.items())
    return ", ".join(f"{name.removeprefix('otel_tasks.')}={value}" for name, value in pairs)
