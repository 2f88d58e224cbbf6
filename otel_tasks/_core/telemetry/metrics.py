"""The instruments: two histograms of durations, and three observable ones that read the managers' counts.

One set of instruments serves all managers that report to the same meter provider. Its callbacks run on the
metric reader's thread and read only tables of counts, never live tasks.
"""

from __future__ import annotations

from threading import RLock
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar
from weakref import finalize, ref

from opentelemetry.metrics import (
    CallbackOptions,
    Histogram,
    Meter,
    MeterProvider,
    NoOpHistogram,
    NoOpMeter,
    Observation,
)

from otel_tasks._core.telemetry.conventions import (
    ACTIVE_TASKS,
    CANCEL_REASON,
    CANCELLATIONS,
    ERROR_TYPE,
    GROUP_NAME,
    QUEUE_DURATION,
    RETRIES,
    SCOPE,
    TASK_DURATION,
    TASK_STATE,
    VERSION,
)
from otel_tasks._core.telemetry.errors import log_otel_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

K = TypeVar("K")

# Numbers of tasks by group name and a second attribute: state, reason, or type of error.
Counts = dict[tuple[str, str], int]


class Totals(NamedTuple):
    """What counters have counted since their start."""

    cancelled: Counts
    retried: Counts

    def copy(self) -> Totals:
        """Return a copy, which does not follow the counters."""
        return Totals(*(counts.copy() for counts in self))


# Seconds. Tasks are often far shorter than requests, so the buckets are finer than the convention's for HTTP.
_DURATION_BUCKETS = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]


class MetricsSource(Protocol):
    """What the observable instruments read of a manager, on the metric reader's thread."""

    @property
    def totals(self) -> Totals:
        """Cancelled tasks by group name and reason, and retries by group name and type of error."""
        ...

    def active(self) -> Mapping[tuple[str, str], int]:
        """Live tasks by group name and state, ``active`` or ``queued``."""
        ...


class _Observed(NamedTuple):
    """A source, held weakly, and what it had counted before it reported to this provider."""

    source: ref[MetricsSource]
    before: Totals


class Instruments:
    """The instruments of one meter provider, shared by all managers that report to it."""

    def __init__(self, provider: MeterProvider) -> None:
        meter = _meter_of(provider)
        # Weak references: a provider lives as long as the process, a manager need not. The tuple is replaced,
        # never changed: the metric reader's thread may be iterating over it.
        self._observed: tuple[_Observed, ...] = ()
        # The counts of managers that are gone or report elsewhere now: a counter never decreases.
        self._past = Totals({}, {})
        self.duration = _histogram(meter, TASK_DURATION, "From the creation of a task to its end.")
        self.queue_duration = _histogram(
            meter, QUEUE_DURATION, "From the creation of a task to the place that it had to wait for."
        )
        # Each on its own: a meter without observable instruments still has histograms.
        try:
            meter.create_observable_up_down_counter(
                ACTIVE_TASKS,
                callbacks=[self._observe_active],
                unit="{task}",
                description="Tasks that are live.",
            )
        except Exception:
            log_otel_error(f"creating instrument {ACTIVE_TASKS}")
        _observable_counter(
            meter, CANCELLATIONS, "{cancellation}", "Tasks that ended cancelled.", self._observe_cancellations
        )
        _observable_counter(
            meter, RETRIES, "{retry}", "Failed attempts that another one follows.", self._observe_retries
        )

    def observe(self, source: MetricsSource, before: Totals) -> Callable[[], object]:
        """Report what ``source`` counts beyond ``before``; call the returned function to stop."""
        observed = _Observed(ref(source), before)
        self._observed = (*(each for each in self._observed if each.source() is not None), observed)
        keep_counts = finalize(source, _add_difference, self._past, source.totals, before)
        # Not at the interpreter's exit: the last export still reads the source.
        keep_counts.atexit = False

        def stop() -> None:
            self._observed = tuple(each for each in self._observed if each is not observed)
            keep_counts()

        return stop

    def _alive(self) -> list[tuple[MetricsSource, Totals]]:
        return [(source, each.before) for each in self._observed if (source := each.source()) is not None]

    def _observe_active(self, _: CallbackOptions) -> Iterable[Observation]:
        totals: Counts = {}
        for source, _before in self._alive():
            _add(totals, source.active())
        return [
            Observation(count, {GROUP_NAME: group, TASK_STATE: state})
            for (group, state), count in totals.items()
        ]

    def _observe_cancellations(self, _: CallbackOptions) -> Iterable[Observation]:
        return [
            Observation(count, {GROUP_NAME: group, CANCEL_REASON: reason})
            for (group, reason), count in self._totals().cancelled.items()
        ]

    def _observe_retries(self, _: CallbackOptions) -> Iterable[Observation]:
        return [
            Observation(count, {GROUP_NAME: group, ERROR_TYPE: error})
            for (group, error), count in self._totals().retried.items()
        ]

    def _totals(self) -> Totals:
        totals = self._past.copy()
        for source, before in self._alive():
            _add_difference(totals, source.totals.copy(), before)
        return totals


# One set of instruments per provider, by the provider's identity: it need not be hashable, and two equal ones
# are still two. The reference to the provider stands beside it, because another may get the same id later.
_instruments: dict[int, tuple[Callable[[], MeterProvider | None], Instruments]] = {}
# Re-entrant: a provider may create tasks, or be dropped, while it creates a meter.
_creating = RLock()


def instruments_of(provider: MeterProvider) -> Instruments:
    """Return the instruments of a meter provider, created on first use."""
    with _creating:
        link, instruments = _instruments.get(id(provider), (None, None))
        if link is None or instruments is None or link() is not provider:
            instruments = Instruments(provider)
            _instruments[id(provider)] = (_link_to(provider), instruments)
        return instruments


def _link_to(provider: MeterProvider) -> Callable[[], MeterProvider | None]:
    """Refer to a provider, weakly if its class allows that; its instruments are dropped with it."""
    key = id(provider)

    def forget(link: object) -> None:
        if key in _instruments and _instruments[key][0] is link:
            _instruments.pop(key, None)

    try:
        return ref(provider, forget)
    except TypeError:
        return lambda: provider


def _meter_of(provider: MeterProvider) -> Meter:
    try:
        return provider.get_meter(SCOPE, VERSION)
    except Exception:
        log_otel_error("asking the meter provider for a meter")
        return NoOpMeter(SCOPE)


def _histogram(meter: Meter, name: str, description: str) -> Histogram:
    """Create a histogram of seconds; if the meter raises, one that records nothing."""
    try:
        return meter.create_histogram(
            name, unit="s", description=description, explicit_bucket_boundaries_advisory=_DURATION_BUCKETS
        )
    except Exception:
        log_otel_error(f"creating instrument {name}")
        return NoOpHistogram(name)


def _observable_counter(
    meter: Meter,
    name: str,
    unit: str,
    description: str,
    callback: Callable[[CallbackOptions], Iterable[Observation]],
) -> None:
    """Create a counter that ``callback`` reads; if the meter raises, there is no counter."""
    try:
        meter.create_observable_counter(name, callbacks=[callback], unit=unit, description=description)
    except Exception:
        log_otel_error(f"creating instrument {name}")


def _add(totals: dict[K, int], counts: Mapping[K, int]) -> None:
    for key, count in counts.items():
        totals[key] = totals.get(key, 0) + count


def _add_difference(totals: Totals, counted: Totals, before: Totals) -> None:
    """Add what has been counted since ``before``."""
    for total, counts, earlier in zip(totals, counted, before, strict=True):
        _add(total, {key: count - earlier.get(key, 0) for key, count in counts.items()})
