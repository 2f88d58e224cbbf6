"""Where a manager reports: the providers it was given, or the global ones, including those set up later."""

from __future__ import annotations

import functools
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from weakref import WeakSet, ref

from opentelemetry import context as otel_context
from opentelemetry import metrics, trace
from opentelemetry.metrics import MeterProvider, NoOpMeterProvider
from opentelemetry.metrics import _internal as metrics_internal
from opentelemetry.trace import NoOpTracer, NoOpTracerProvider, Span, Tracer, TracerProvider

from otel_tasks._core.state import Outcome
from otel_tasks._core.telemetry.conventions import (
    ERROR_TYPE,
    GROUP_NAME,
    SCOPE,
    TASK_NAME,
    TASK_OUTCOME,
    TASK_PRIORITY,
    VERSION,
    error_type,
    low_cardinality,
)
from otel_tasks._core.telemetry.errors import log_otel_error
from otel_tasks._core.telemetry.metrics import Totals, instruments_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from otel_tasks._core.telemetry.metrics import Instruments, MetricsSource

T = TypeVar("T")

# Whether OpenTelemetry's globals can be read without a call. A later version may rename them.
_READABLE = hasattr(trace, "_TRACER_PROVIDER")
_METERS_READABLE = hasattr(metrics_internal, "_METER_PROVIDER")
# The placeholder of metrics has no public name at all.
_METER_PLACEHOLDER: object = getattr(metrics_internal, "_PROXY_METER_PROVIDER", None)


# Stands for one of OpenTelemetry's modules in a manager that does not report to the global provider.
_OWN = SimpleNamespace(_TRACER_PROVIDER=True, _METER_PROVIDER=True)


class Providers(NamedTuple):
    """Where spans and metrics go; None is the global provider, including one that is set up later."""

    tracer: TracerProvider | None = None
    meter: MeterProvider | None = None


def _default_providers() -> Providers:
    """Return where managers without providers of their own report: nowhere, if the environment says so.

    The variable is that of ``opentelemetry-instrument``, which skips the instrumentations that it names. This
    library needs no start, so it has to read the variable itself. ``*`` skips all instrumentations; it does
    not apply to a library that traces itself.
    """
    named = os.environ.get("OTEL_PYTHON_DISABLED_INSTRUMENTATIONS", "").split(",")
    if any(name.strip() == SCOPE for name in named):
        return Providers(NoOpTracerProvider(), NoOpMeterProvider())
    return Providers()


_default = _default_providers()
# All of this process: they follow a change of the default.
_instances: WeakSet[Telemetry] = WeakSet()


def set_default_providers(providers: Providers | None) -> None:
    """Set where managers without providers of their own report; None restores the initial default."""
    global _default
    _default = _default_providers() if providers is None else providers
    for telemetry in list(_instances):
        telemetry.follow_default()


class Telemetry:
    """The tracer and the instruments of one manager.

    Args:
        manager_name: The value of ``otel_tasks.manager.name``.
        tracer_provider: Where spans go; None is the global provider, including one that is set up later.
        meter_provider: Where metrics go; None is the global provider, including one that is set up later.
    """

    def __init__(
        self,
        manager_name: str,
        tracer_provider: TracerProvider | None,
        meter_provider: MeterProvider | None,
    ) -> None:
        self.manager_name = manager_name
        # OpenTelemetry's placeholders stand for the global providers.
        self._own = Providers(
            None if _is_a(tracer_provider, trace.ProxyTracerProvider) else tracer_provider,
            None if meter_provider is _METER_PLACEHOLDER else meter_provider,
        )
        self._provider: TracerProvider | None = None
        self._tracer: Tracer | None = None
        self._meter_provider: MeterProvider | None = None
        self._metrics: Instruments | None = None
        self._source: ref[MetricsSource] | None = None
        # What the source counted while it reported elsewhere: that stays there.
        self._before = Totals({}, {})
        self._stop_observing: Callable[[], object] | None = None
        self.follow_default()
        _instances.add(self)

    def follow_default(self) -> None:
        """Report to the providers that the manager was given, and where it was given none, to the default."""
        tracer = _default.tracer if self._own.tracer is None else self._own.tracer
        meter = _default.meter if self._own.meter is None else self._own.meter
        self._injected = tracer is not None
        self._follows_meters = meter is None and _METERS_READABLE
        # Where `_TRACER_PROVIDER` and `_METER_PROVIDER` are None while nothing would be recorded: the caller
        # reads them without a call, which would take 2% of a task.
        self.tracing: Any = trace if _READABLE and tracer is None else _OWN
        self.metering: Any = metrics_internal if self._follows_meters else _OWN
        self._use_tracer_provider(tracer)
        source = self._live_source()
        if source is not None:
            self._before = source.totals.copy()
        self._use_meter_provider(meter)

    def providers(self) -> tuple[object, object]:
        """Return the providers of spans and metrics in use; None without one."""
        return self._provider, self._meter_provider

    def tracer(self) -> Tracer | None:
        """Return the tracer; None without an SDK."""
        if not self._injected:
            # The public get_tracer_provider() reads os.environ each time (1.2 us, half a task). This is the
            # variable that it reads; where a later version has none, ask the public function.
            provider = trace._TRACER_PROVIDER if _READABLE else _global_provider(trace.get_tracer_provider)
            if provider is not self._provider:
                self._use_tracer_provider(provider)
                # The code that sets up one provider sets up the other: its gauges show live tasks, too.
                self.metered()
        return self._tracer

    def _use_tracer_provider(self, provider: TracerProvider | None) -> None:
        self._provider = provider
        self._tracer = None
        if provider is None or _is_a(provider, trace.ProxyTracerProvider, NoOpTracerProvider):
            return
        try:
            tracer = provider.get_tracer(SCOPE, VERSION)
        except Exception:
            # Asked again when another provider is set, not for each task.
            log_otel_error("asking the tracer provider for a tracer")
        else:
            # With OTEL_SDK_DISABLED=true, the SDK returns one of these.
            self._tracer = None if _is_a(tracer, NoOpTracer) else tracer

    def observe(self, source: MetricsSource) -> None:
        """Let the observable instruments read ``source``; only the first call has an effect."""
        if self._source is not None:
            return
        self._source = ref(source)
        # Where the environment names providers, these calls load them.
        _global_provider(trace.get_tracer_provider)
        current = _global_provider(metrics.get_meter_provider)
        if self._meter_provider is None and not _METERS_READABLE:
            self._use_meter_provider(current)
        elif not self.metered():
            self._use_meter_provider(self._meter_provider)

    def metered(self) -> bool:
        """True if a meter provider would record a task's duration."""
        if self._follows_meters and metrics_internal._METER_PROVIDER is not self._meter_provider:
            self._use_meter_provider(metrics_internal._METER_PROVIDER)
        return self._metrics is not None

    def _use_meter_provider(self, provider: MeterProvider | None) -> None:
        """Let the instruments of this provider observe the source, and those of the previous one no more."""
        self._meter_provider = provider
        source = self._live_source()
        if self._stop_observing is not None:
            self._stop_observing()
            if source is not None:
                self._before = source.totals.copy()
        self._stop_observing = self._metrics = None
        if source is not None and provider is not None and not _is_a(provider, NoOpMeterProvider):
            self._metrics = instruments_of(provider)
            self._stop_observing = self._metrics.observe(source, self._before)

    def _live_source(self) -> MetricsSource | None:
        return None if self._source is None else self._source()

    def record(
        self,
        name: str,
        group: str,
        outcome: Outcome,
        error: BaseException | None,
        seconds: float,
        span: Span | None,
    ) -> None:
        """Record one ended task in ``otel_tasks.task.duration``.

        Raises:
            Exception: The instrument's own.
        """
        if self._metrics is None:
            return
        attributes = {
            TASK_NAME: low_cardinality(name),
            GROUP_NAME: low_cardinality(group),
            TASK_OUTCOME: str(outcome),
        }
        if error is not None:
            attributes[ERROR_TYPE] = str(outcome) if outcome is Outcome.TIMEOUT else error_type(error)
        # A done-callback runs in an empty context; with the span in it, the sample gets an exemplar.
        context = None if span is None else trace.set_span_in_context(span, otel_context.Context())
        self._metrics.duration.record(seconds, attributes, context)

    def record_queue(self, group: str, priority: int, seconds: float) -> None:
        """Record in ``otel_tasks.task.queue.duration`` how long a task waited for its place.

        Raises:
            Exception: The instrument's own.
        """
        if self._metrics is not None:
            attributes: dict[str, str | int] = {
                GROUP_NAME: low_cardinality(group),
                TASK_PRIORITY: priority,
            }
            self._metrics.queue_duration.record(seconds, attributes)


def flushers(all_telemetry: Iterable[Telemetry]) -> list[Callable[[], object]]:
    """Return functions that export what the providers hold back, and that may block; they never raise.

    The global providers are included: an application's own spans are there, too.
    """
    found: dict[int, object] = {}
    own = [provider for telemetry in all_telemetry for provider in telemetry.providers()]
    for provider in [*own, trace.get_tracer_provider(), metrics.get_meter_provider()]:
        # The API's placeholders have no such method.
        if hasattr(provider, "force_flush"):
            found[id(provider)] = provider
    return [functools.partial(_flush, provider) for provider in found.values()]


def _flush(provider: Any) -> None:
    try:
        provider.force_flush()
    except Exception:
        log_otel_error("flushing a provider")


def _is_a(value: object, *kinds: type) -> bool:
    """``isinstance()``, also for a proxy that raises while it stands for nothing yet."""
    try:
        return isinstance(value, kinds)
    except Exception:
        log_otel_error("looking at a provider")
        return False


def _global_provider(get: Callable[[], T]) -> T | None:
    """Return a global provider, which OpenTelemetry loads here if the environment names one."""
    try:
        return get()
    except Exception:
        log_otel_error("loading the provider that the environment names")
        return None
