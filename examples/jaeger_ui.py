"""Jaeger's UI, as far as the demos need it: links to traces, the spans they mark, and warnings about a trace.

The rules are those of Jaeger 2.20, read in its source: https://github.com/jaegertracing/jaeger-ui and
https://github.com/jaegertracing/jaeger. Where no Jaeger runs, the tests ask this module what it would show.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote, urlsplit

from examples.trace_tree import Span, missing_parents

PORT = 16686


def trace_link(endpoint: str, trace_id: str, spans: Iterable[Span]) -> str:
    """The address of a trace in Jaeger, which opens and marks what was cancelled.

    Args:
        endpoint: Where the spans were sent. Jaeger's UI is on the same host, unless `JAEGER_UI_URL` names it.
        trace_id: The trace, in hex.
        spans: Its spans, and any others.
    """
    host = urlsplit(endpoint).hostname or "localhost"
    base = os.environ.get("JAEGER_UI_URL") or f"http://{host}:{PORT}"
    words = cancel_words(span for span in spans if span.trace_id == trace_id)
    # Jaeger marks a span that has one of the words.
    find = f"?uiFind={quote(' '.join(words))}" if words else ""
    return f"{base.rstrip('/')}/trace/{trace_id}{find}"


def cancel_words(spans: Iterable[Span]) -> list[str]:
    """Why spans were cancelled, and how requests were left: each word once, in the order of the alphabet."""
    names = ("otel_tasks.cancel.reason", "otel_tasks.request.outcome")
    return sorted({str(span.attributes[name]) for span in spans for name in names if name in span.attributes})


def marked(spans: Iterable[Span], ui_find: str) -> list[Span]:
    """The spans that Jaeger opens and marks for `uiFind` (`filter-spans.ts`).

    A span matches if one of the words is part of its name, its service, or a key, a value, or `key=value` of
    its attributes, its events, or its resource, in upper or lower case. A word in double quotes may have
    blanks. Keys that contain a word which starts with `-` are left out.
    """
    words = [word.strip('"').lower() for word in re.findall(r'"[^"]*"|[^\s"]+', ui_find)]
    wanted = [word for word in words if word and not word.startswith("-")]
    without = [word[1:] for word in words if word.startswith("-")]
    return [
        span
        for span in spans
        if span.span_id in wanted
        or any(word in text.lower() for text in _texts(span, without) for word in wanted)
    ]


def _texts(span: Span, without: list[str]) -> Iterator[str]:
    yield span.name
    yield span.service
    status = {"otel.status_description": span.description} if span.description else {}
    events = ({"event": name} | attributes for name, attributes in span.events)
    tables: list[Mapping[str, Any]] = [span.attributes, status, span.resource, *events]
    for key, value in (pair for table in tables for pair in table.items()):
        if not any(word in key.lower() for word in without):
            # The key and the value are parts of it.
            yield f"{key}={value}"


def warnings(spans: Iterable[Span]) -> list[str]:
    """What is wrong with the traces of these spans, in Jaeger's words where it has some.

    - `<trace-without-root-span>`: the trace has no name, because each of its spans has a parent. Newer
      versions show the trace id in place of the name.
    - `Incomplete`: spans whose parent was not exported. A link to another trace is no parent.
    - A link to the span's own parent is not shown; it turns the reference to the parent into FOLLOWS_FROM.
    """
    traces: dict[str, list[Span]] = {}
    for span in spans:
        traces.setdefault(span.trace_id, []).append(span)
    return [f"{trace_id}: {found}" for trace_id, trace in traces.items() for found in _warnings(trace)]


def _warnings(trace: list[Span]) -> Iterator[str]:
    if all(span.parent_id for span in trace):
        yield "<trace-without-root-span>"
    missing = missing_parents(trace)
    if orphans := [span.name for span in trace if span.parent_id in missing]:
        yield f"Incomplete: missing parent of {', '.join(sorted(orphans))}"
    for span in trace:
        hidden = [purpose for purpose, target in span.links if target == span.parent_id]
        if hidden:
            yield f"link to its own parent is not shown: {span.name} ({', '.join(hidden)})"
