"""Draws a trace as a tree with a time bar: what Jaeger shows, for a terminal."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from rich.table import Table
from rich.text import Text

BAR_WIDTH = 30
COLORS = {
    "success": "green",
    "cancelled": "yellow",
    "timeout": "magenta",
    "error": "red",
    "abandoned": "red",
}
# Stands for a parent that was not exported.
NO_ROOT = "no root span"


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
    description: str = ""
    kind: str = "INTERNAL"
    service: str = ""
    status: str = "UNSET"
    # The kind of each link, and the span it leads to.
    links: tuple[tuple[str, str], ...] = ()
    # The name of each event, and its attributes.
    events: tuple[tuple[str, dict[str, Any]], ...] = ()
    resource: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "Span":
        """Read what `ReadableSpan.to_json()` writes."""
        resource = raw["resource"]["attributes"]
        return cls(
            trace_id=_hex(raw["context"]["trace_id"]),
            span_id=_hex(raw["context"]["span_id"]),
            parent_id=raw["parent_id"] and _hex(raw["parent_id"]),
            name=raw["name"],
            start=_seconds(raw["start_time"]),
            end=_seconds(raw["end_time"]),
            attributes=raw["attributes"],
            description=raw["status"].get("description", ""),
            kind=raw["kind"].removeprefix("SpanKind."),
            service=resource.get("service.name", ""),
            status=raw["status"]["status_code"],
            links=tuple(
                (str(link["attributes"].get("otel_tasks.link", "")), _hex(link["context"]["span_id"]))
                for link in raw["links"]
            ),
            events=tuple((event["name"], event["attributes"]) for event in raw["events"]),
            resource=resource,
        )

    @property
    def is_request(self) -> bool:
        """A server's span, as against a task's or a group's."""
        return "http.request.method" in self.attributes and not self.is_call

    @property
    def is_call(self) -> bool:
        """The span of a client, which calls a server."""
        return self.kind == "CLIENT"

    @property
    def is_task(self) -> bool:
        """A task's span; what is neither a request's nor a task's is a group's."""
        return "otel_tasks.task.id" in self.attributes

    @property
    def cancel_reason(self) -> str | None:
        """Why it was cancelled, or None where it was not."""
        return self.attributes.get("otel_tasks.cancel.reason")

    @property
    def cancelled_by(self) -> str | None:
        """The span that caused the cancellation: attributes name the parent, a link names any other span."""
        links = (span_id for purpose, span_id in self.links if purpose == "cancelled_by")
        return next(links, self.attributes.get("otel_tasks.cancel.origin.span_id"))

    @property
    def outcome(self) -> str:
        """How it ended, in the words of `otel_tasks.task.outcome`."""
        if "otel_tasks.task.outcome" in self.attributes:
            return str(self.attributes["otel_tasks.task.outcome"])
        if self.cancel_reason or "otel_tasks.request.outcome" in self.attributes:
            return "cancelled"
        if self.is_call and "http.response.status_code" not in self.attributes:
            return "error" if self.status == "ERROR" else "cancelled"
        return "error" if "error.type" in self.attributes else "success"


def trace_tree(spans: Iterable[Span], *, hung_up_at: float | None = None) -> Table:
    """The spans of one trace, children below their parents in the order of their start.

    A call from one service to another is one row, the server's: the client's span around it is drawn only
    where the server's is not there.

    Args:
        spans: All spans of the trace. Those whose parent is not among them hang below a row that says so.
        hung_up_at: When the client left (seconds since the epoch), drawn as a mark above the bars.
    """
    shown = _without_calls(sorted(spans, key=lambda span: span.start))
    rows = list(_walk(shown))
    names = {span.span_id: span.name for span in shown}
    several_services = len({span.service for span in shown}) > 1
    first = min(span.start for span in shown)
    last = max(span.end for span in shown)
    scale = BAR_WIDTH / max(last - first, 0.001)

    table = Table(box=None, padding=(0, 1), show_edge=False, header_style="")
    table.add_column(Text("request and its tasks", "dim"), no_wrap=True, min_width=26)
    table.add_column(_ruler(hung_up_at, first, scale), no_wrap=True, min_width=BAR_WIDTH)
    table.add_column(Text("ms", "dim"), justify="right", no_wrap=True, min_width=4)
    table.add_column(Text("outcome and cause", "dim"), no_wrap=True)
    for guide, span in rows:
        if span is None:
            table.add_row(Text(NO_ROOT, "red"))
            continue
        color = COLORS[span.outcome]
        service = f"{span.service} " if several_services and span.is_request else ""
        name = Text.assemble(
            (guide, "dim"), (service, "cyan"), (span.name, "bold" if span.is_request else "")
        )
        if not span.is_request and not span.is_task and not span.is_call:
            name.append(" ").append("(group)", "dim")
        bar = _bar((span.start - first) * scale, (span.end - first) * scale, color)
        milliseconds = f"{(span.end - span.start) * 1000:.0f}"
        table.add_row(name, bar, milliseconds, Text(_verdict(span, names), style=color))
    return table


def _without_calls(spans: list[Span]) -> list[Span]:
    """Leave out each client's span that has a server's below it."""
    answered = {span.parent_id for span in spans if span.is_request}
    left_out = {span.span_id: span.parent_id for span in spans if span.is_call and span.span_id in answered}
    return [
        replace(span, parent_id=left_out.get(span.parent_id or "", span.parent_id))
        for span in spans
        if span.span_id not in left_out
    ]


def _walk(spans: list[Span]) -> Iterator[tuple[str, Span | None]]:
    """Each span with the guide lines that stand before its name, depth first.

    None takes the place of a parent that is not among them.
    """
    children: dict[str | None, list[Span]] = {}
    for span in spans:
        children.setdefault(span.parent_id, []).append(span)

    def below(parent: str | None, indent: str) -> Iterator[tuple[str, Span]]:
        siblings = children.get(parent, [])
        for span in siblings:
            is_last = span is siblings[-1]
            yield indent + ("└─ " if is_last else "├─ "), span
            yield from below(span.span_id, indent + ("   " if is_last else "│  "))

    for root in children.get(None, []):
        yield "", root
        yield from below(root.span_id, "")
    for parent in missing_parents(spans):
        yield "", None
        yield from below(parent, "")


def missing_parents(spans: Iterable[Span]) -> list[str]:
    """The ids of parents that were not exported: Jaeger shows a trace that has one as incomplete."""
    parents = {span.span_id: span.parent_id for span in spans}
    return [
        parent for parent in dict.fromkeys(parents.values()) if parent is not None and parent not in parents
    ]


def _bar(start: float, end: float, color: str) -> Text:
    """A bar from one column to another; the shortest span is still seen."""
    left = min(round(start), BAR_WIDTH - 1)
    # The blanks have no style: some SVG viewers drop blanks at the start of a styled text.
    return Text.assemble(" " * left, ("█" * max(round(end) - left, 1), color))


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
    if span.is_call:
        return str(span.attributes.get("http.response.status_code", "no answer"))
    verdict = span.outcome
    if span.outcome == "cancelled":
        verdict += f": {span.cancel_reason}"
    if span.outcome == "error":
        verdict += f": {span.description or span.attributes.get('error.type')}"
    if span.cancelled_by in names:
        verdict += f" <- {names[span.cancelled_by]}"
    return verdict


def _hex(number: str) -> str:
    return number.removeprefix("0x")


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()
