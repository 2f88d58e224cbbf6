"""A recorder of the spans and metrics of a test; it alone needs the OpenTelemetry SDK."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Self

    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.trace import ReadableSpan, Span, TracerProvider


class SpanRecorder:
    """Records the spans and metrics of a test in memory, with its own providers and ids that count up from 1.

    While it is open, it also records OpenTelemetry's log lines, which show a span that ended twice. Use it as
    a context manager, or call ``close()``.

    Attributes:
        provider: The SDK's TracerProvider, to inject.
        meter_provider: The SDK's MeterProvider, to inject.
        complaints: The lines that the loggers below ``opentelemetry`` logged at WARNING and above.

    Raises:
        ImportError: ``opentelemetry-sdk`` is not installed.

    Example:
        >>> with SpanRecorder() as spans:
        ...     with spans.provider.get_tracer("example").start_as_current_span("work"):
        ...         pass
        ...     spans.span("work").status.status_code.name
        'UNSET'
    """

    def __init__(self) -> None:
        self.complaints: list[str] = []
        self._started: dict[int, Span] = {}
        self._finished: list[ReadableSpan] = []
        self._ended: dict[int, int] = {}
        self.provider, self.meter_provider, self._reader = _providers(self)
        self._handler = _Collector(self.complaints)
        logging.getLogger("opentelemetry").addHandler(self._handler)

    provider: TracerProvider
    meter_provider: MeterProvider

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Shut the providers down and stop listening to OpenTelemetry's loggers."""
        logging.getLogger("opentelemetry").removeHandler(self._handler)
        self.provider.shutdown()
        self.meter_provider.shutdown()

    @property
    def finished(self) -> tuple[ReadableSpan, ...]:
        """The spans that have ended, in that order."""
        return tuple(self._finished)

    @property
    def open(self) -> tuple[Span, ...]:
        """The spans that have started and not ended, oldest first."""
        return tuple(span for key, span in self._started.items() if key not in self._ended)

    @property
    def names(self) -> list[str]:
        """The names of ``finished``."""
        return [span.name for span in self._finished]

    def span(self, name: str) -> ReadableSpan:
        """The one finished span called ``name``.

        Raises:
            LookupError: There is none, or more than one; the message lists all spans.
        """
        found = self.spans(name)
        if len(found) != 1:
            open_names = [span.name for span in self.open]
            raise LookupError(
                f"{len(found)} finished spans are named {name!r}; finished: {self.names}, open: {open_names}"
            )
        return found[0]

    def spans(self, name: str) -> list[ReadableSpan]:
        """The finished spans called ``name``."""
        return [span for span in self._finished if span.name == name]

    def children(self, parent: ReadableSpan) -> list[ReadableSpan]:
        """The finished spans whose parent is ``parent``."""
        return [span for span in self._finished if _parent_id(span) == _span_id(parent)]

    def metrics(self) -> dict[str, list[Any]]:
        """Collect the data points now, and return them by metric name."""
        data = self._reader.get_metrics_data()
        if data is None:
            return {}
        scopes = itertools.chain.from_iterable(resource.scope_metrics for resource in data.resource_metrics)
        return {metric.name: list(metric.data.data_points) for scope in scopes for metric in scope.metrics}

    def check(self) -> None:
        """Fail unless every span has ended exactly once and OpenTelemetry has logged no warning.

        Raises:
            AssertionError: With the names of the spans, or the logged lines.
        """
        twice = [self._started[key].name for key, count in self._ended.items() if count > 1]
        faults = {
            "spans never ended": [span.name for span in self.open],
            "spans ended more than once": twice,
            "opentelemetry logged": self.complaints,
        }
        if found := [f"{what}: {names}" for what, names in faults.items() if names]:
            raise AssertionError("; ".join(found))

    def clear(self) -> None:
        """Forget all ended spans, and the logged lines."""
        for key in self._ended:
            self._started.pop(key, None)
        self._ended.clear()
        self._finished.clear()
        self.complaints.clear()

    def _on_start(self, span: Span) -> None:
        self._started[_span_id(span)] = span

    def _on_end(self, span: ReadableSpan) -> None:
        key = _span_id(span)
        self._ended[key] = self._ended.get(key, 0) + 1
        self._finished.append(span)


class _Collector(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(f"{record.name}: {record.getMessage()}")


def _span_id(span: ReadableSpan) -> int:
    context = span.context
    return context.span_id if context is not None else 0


def _parent_id(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent is not None else None


def _providers(recorder: SpanRecorder) -> tuple[TracerProvider, MeterProvider, Any]:
    try:
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
        from opentelemetry.sdk.trace.id_generator import IdGenerator
    except ImportError as error:
        raise ImportError(
            "SpanRecorder needs the OpenTelemetry SDK: pip install 'otel-tasks[otlp]'"
        ) from error

    class CountingIds(IdGenerator):
        def __init__(self) -> None:
            self._span_ids = itertools.count(1)
            self._trace_ids = itertools.count(1)

        def generate_span_id(self) -> int:
            return next(self._span_ids)

        def generate_trace_id(self) -> int:
            return next(self._trace_ids)

    class Recording(SpanProcessor):
        def on_start(self, span: Span, parent_context: object = None) -> None:
            recorder._on_start(span)

        def on_end(self, span: ReadableSpan) -> None:
            recorder._on_end(span)

    provider = TracerProvider(id_generator=CountingIds(), shutdown_on_exit=False)
    provider.add_span_processor(Recording())
    reader = InMemoryMetricReader()
    return provider, MeterProvider([reader], shutdown_on_exit=False), reader
