"""Draws a trace as a tree with a time bar: what Jaeger shows, for a terminal."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.table import Table
from rich.text import Text

BAR_WIDTH = 30
COLOURS = {
    "success": "green",
    "cancelled": "yellow",
    "timeout": "magenta",
    "error": "red",
    "abandoned": "red",
}


@dataclass(frozen=True)
class Span:
    """The part of an OpenTelemetry span that the picture needs; times are seconds since the epoch."""

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    start: float
    end: float
    attributes: dict[str, Any]
    description: str
    cancelled_by: str | None

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "Span":
        """Read what `ReadableSpan.to_json()` writes."""
        return cls(
            trace_id=raw["context"]["trace_id"].removeprefix("0x"),
            span_id=raw["context"]["span_id"],
            parent_id=raw["parent_id"],
            name=raw["name"],
            start=_seconds(raw["start_time"]),
            end=_seconds(raw["end_time"]),
            attributes=raw["attributes"],
            description=raw["status"].get("description", ""),
            cancelled_by=_cancelled_by(raw["links"]),
        )

    @property
    def is_request(self) -> bool:
        """A server's span, as against a task's or a group's."""
        return "http.request.method" in self.attributes

    @property
    def is_task(self) -> bool:
        """A task's span; what is neither a request's nor a task's is a group's."""
        return "otel_tasks.task.name" in self.attributes

    @property
    def cancel_reason(self) -> str | None:
        """Why it was cancelled, or None where it was not."""
        return self.attributes.get("otel_tasks.cancel.reason")

    @property
    def outcome(self) -> str:
        """How it ended, in the words of `otel_tasks.task.outcome`."""
        if "otel_tasks.task.outcome" in self.attributes:
            return str(self.attributes["otel_tasks.task.outcome"])
        if self.cancel_reason or "otel_tasks.request.outcome" in self.attributes:
            return "cancelled"
        return "error" if "error.type" in self.attributes else "success"


def trace_tree(spans: Iterable[Span], *, hung_up_at: float | None = None) -> Table:
    """The spans of one trace, children below their parents in the order of their start.

    Args:
        spans: All spans of the trace; a span whose parent is not among them is a root.
        hung_up_at: When the client left (seconds since the epoch), drawn as a mark above the bars.
    """
    rows = list(_walk(sorted(spans, key=lambda span: span.start)))
    names = {span.span_id: span.name for _, span in rows}
    first = min(span.start for _, span in rows)
    last = max(span.end for _, span in rows)
    scale = BAR_WIDTH / max(last - first, 0.001)

    table = Table(box=None, padding=(0, 1), show_edge=False, header_style="")
    table.add_column(Text("request and its tasks", "dim"), no_wrap=True, min_width=26)
    table.add_column(_ruler(hung_up_at, first, scale), no_wrap=True, min_width=BAR_WIDTH)
    table.add_column(Text("ms", "dim"), justify="right", no_wrap=True, min_width=4)
    table.add_column(Text("outcome and cause", "dim"), no_wrap=True)
    for guide, span in rows:
        colour = COLOURS[span.outcome]
        name = Text.assemble((guide, "dim"), (span.name, "bold" if span.is_request else ""))
        if not span.is_request and not span.is_task:
            name.append(" ").append("(group)", "dim")
        bar = _bar((span.start - first) * scale, (span.end - first) * scale, colour)
        milliseconds = f"{(span.end - span.start) * 1000:.0f}"
        table.add_row(name, bar, milliseconds, Text(_verdict(span, names), style=colour))
    return table


def _walk(spans: list[Span]) -> Iterator[tuple[str, Span]]:
    """Each span with the guide lines that stand before its name, depth first."""
    known = {span.span_id for span in spans}
    children: dict[str | None, list[Span]] = {}
    for span in spans:
        children.setdefault(span.parent_id if span.parent_id in known else None, []).append(span)

    def below(parent: str | None, indent: str) -> Iterator[tuple[str, Span]]:
        siblings = children.get(parent, [])
        for span in siblings:
            is_last = span is siblings[-1]
            yield indent + ("└─ " if is_last else "├─ "), span
            yield from below(span.span_id, indent + ("   " if is_last else "│  "))

    for root in children.get(None, []):
        yield "", root
        yield from below(root.span_id, "")


def _bar(start: float, end: float, colour: str) -> Text:
    """A bar from one column to another; the shortest span is still seen."""
    left = min(round(start), BAR_WIDTH - 1)
    # The blanks have no style of their own: some viewers of SVG drop those that begin a styled text.
    return Text.assemble(" " * left, ("█" * max(round(end) - left, 1), colour))


def _ruler(hung_up_at: float | None, first: float, scale: float) -> Text:
    """The heading of the bars: when the client left, above the place in the bars."""
    if hung_up_at is None:
        return Text("time", "dim")
    column = min(max(round((hung_up_at - first) * scale), 0), BAR_WIDTH - 1)
    label = "client leaves ▼"
    if column < len(label):
        return Text.assemble(" " * column, ("▼ client leaves", "dim"))
    return Text.assemble(" " * (column - len(label) + 1), (label, "dim"))


def _verdict(span: Span, names: dict[str, str]) -> str:
    if span.is_request:
        words = [str(span.attributes.get("http.response.status_code", ""))]
        if "otel_tasks.request.outcome" in span.attributes:
            words.append(str(span.attributes["otel_tasks.request.outcome"]))
            words.append(f"(tasks cancelled: {span.attributes.get('otel_tasks.cancel.count', 0)})")
        return " ".join(words)
    verdict = span.outcome
    if span.outcome == "cancelled":
        verdict += f": {span.cancel_reason}"
    if span.outcome == "error":
        verdict += f": {span.description or span.attributes.get('error.type')}"
    if span.cancelled_by in names:
        verdict += f" <- {names[span.cancelled_by]}"
    return verdict


def _cancelled_by(links: list[dict[str, Any]]) -> str | None:
    for link in links:
        if link["attributes"].get("otel_tasks.link") == "cancelled_by":
            return str(link["context"]["span_id"])
    return None


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()
