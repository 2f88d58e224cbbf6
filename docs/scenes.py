"""A small application that produces every span, metric, and error, on a virtual clock.

``watch()`` returns what reached the SDK, ``messages()`` an example of each error's message.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

from fastapi import FastAPI
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import Histogram, InMemoryMetricReader, Sum
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider

from otel_tasks import OtelTasksError, RestartPolicy, RetryPolicy, TaskGroup, TaskManager, create_task
from otel_tasks._core.state import Signal, TaskStatus, next_status
from otel_tasks.fastapi import TaskGroupMiddleware, make_lifespan
from otel_tasks.testing import FakeConnection, run

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from otel_tasks._asgi.connection import Receive, Scope, Send


class Metric(NamedTuple):
    """One instrument, as its data shows it."""

    name: str
    instrument: str
    unit: str
    description: str
    attributes: list[str]
    buckets: tuple[float, ...]


class Seen(SpanProcessor):
    """Everything that reached the SDK."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []
        self._at_start: dict[int, set[str]] = {}
        self._reader = InMemoryMetricReader()
        self.tracer_provider = TracerProvider(shutdown_on_exit=False)
        self.tracer_provider.add_span_processor(self)
        self.meter_provider = MeterProvider([self._reader], shutdown_on_exit=False)
        self._metrics: list[Metric] = []

    def on_start(self, span: Span, parent_context: object = None) -> None:
        """Note the attributes it starts with, which a sampler can use."""
        self._at_start[_key(span)] = set(span.attributes or {})

    def on_end(self, span: ReadableSpan) -> None:
        """Keep it."""
        self.spans.append(span)

    def attributes(self) -> Iterator[tuple[str, str, str]]:
        """Each attribute of spans and links, with its types and places."""
        types: dict[str, set[str]] = defaultdict(set)
        places: dict[str, dict[str, None]] = defaultdict(dict)
        for span in self.spans:
            ours = {name: value for name, value in (span.attributes or {}).items() if _is_ours(span, name)}
            for name, value in ours.items():
                types[name].add(type(value).__name__)
                places[name][self._place(span, name)] = None
            for link in span.links:
                for name, value in (link.attributes or {}).items():
                    types[name].add(type(value).__name__)
                    places[name]["link"] = None
        kinds = ("task", "attempt", "group")
        order = [f"{kind}, {when}" for kind in kinds for when in ("from its start", "at its end")]
        order += ["request", "link"]
        for name in sorted(types, key=lambda name: (min(order.index(place) for place in places[name]), name)):
            yield name, " or ".join(sorted(types[name])), "; ".join(sorted(places[name], key=order.index))

    def _place(self, span: ReadableSpan, name: str) -> str:
        if span.name == REQUEST:
            return "request"
        what = "task" if "otel_tasks.task.id" in (span.attributes or {}) else "group"
        what = "attempt" if "otel_tasks.task.attempt" in (span.attributes or {}) else what
        return f"{what}, from its start" if name in self._at_start[_key(span)] else f"{what}, at its end"

    def events(self) -> list[tuple[str, list[str]]]:
        """Each kind of event with its attributes."""
        found: dict[str, set[str]] = defaultdict(set)
        for span in self.spans:
            for event in span.events:
                found[event.name] |= set(event.attributes or {})
        return [(name, sorted(found[name])) for name in sorted(found, reverse=True)]

    def links(self) -> list[str]:
        """Each kind of link."""
        return sorted(
            {str((link.attributes or {})["otel_tasks.link"]) for s in self.spans for link in s.links}
        )

    def statuses(self) -> dict[str, str]:
        """The span status of each outcome."""
        return {
            str((span.attributes or {})["otel_tasks.task.outcome"]): span.status.status_code.name
            for span in self.spans
            if "otel_tasks.task.outcome" in (span.attributes or {})
        }

    def metrics(self) -> list[Metric]:
        """Each instrument."""
        return self._metrics

    def close(self) -> None:
        """Read the metrics one last time."""
        data = self._reader.get_metrics_data()
        assert data is not None
        for resource in data.resource_metrics:
            for scope in resource.scope_metrics:
                self._metrics += sorted(map(_metric, scope.metrics), key=lambda metric: metric.name)
        self.meter_provider.shutdown()
        self.tracer_provider.shutdown()


def _metric(metric: Any) -> Metric:
    points = list(metric.data.data_points)
    if isinstance(metric.data, Histogram):
        instrument = "histogram"
    else:
        assert isinstance(metric.data, Sum)
        instrument = "observable counter" if metric.data.is_monotonic else "observable up-down counter"
    return Metric(
        metric.name,
        instrument,
        metric.unit,
        metric.description,
        sorted({name for point in points for name in point.attributes}),
        tuple(getattr(points[0], "explicit_bounds", ())),
    )


REQUEST = "GET /report/{id}"


def _is_ours(span: ReadableSpan, name: str) -> bool:
    # Of the server's span, only what the middleware sets.
    return span.name != REQUEST or name.startswith("otel_tasks.")


def _key(span: ReadableSpan) -> int:
    assert span.context is not None
    number: int = span.context.span_id
    return number


# --- scenes ------------------------------------------------------------------------------------------------


def watch() -> Seen:
    """Run every scene once."""
    seen = Seen()
    # The scenes log warnings, correctly; they do not concern the builder of the documentation.
    with _quiet():
        run(_spans(seen))
    return seen


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    logger = logging.getLogger("otel_tasks")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


async def _spans(seen: Seen) -> None:
    providers: dict[str, Any] = {
        "tracer_provider": seen.tracer_provider,
        "meter_provider": seen.meter_provider,
    }
    manager = TaskManager("shop", **providers)
    await _ends(manager)
    await _cancels(manager)
    await _request(manager, seen)
    limited = TaskManager("limited", max_concurrency=1, **providers)
    for _ in range(2):
        limited.create_task(asyncio.sleep(1), name="query")
    await limited.join()
    release = asyncio.Event()
    stubborn = limited.create_task(_stubborn(release), name="stubborn")
    await asyncio.sleep(1)
    await limited.shutdown(grace=0, timeout=1)
    # Read while a task is live: observable instruments show only live tasks.
    seen.close()
    release.set()
    await asyncio.wait([stubborn])
    await manager.shutdown()


async def _ends(manager: TaskManager) -> None:
    tasks = [
        manager.create_task(asyncio.sleep(1), name="success"),
        manager.create_task(_fail(), name="error"),
        manager.create_task(asyncio.sleep(60), name="timeout", timeout=1),
        manager.create_task(_fail, name="retried", retry=RetryPolicy(on=Exception, max_attempts=2)),
    ]
    await asyncio.gather(*tasks, return_exceptions=True)
    tracer = manager._ledger.telemetry.tracer()
    assert tracer is not None
    with tracer.start_as_current_span("creator"):
        await manager.create_task(asyncio.sleep(1), name="own_trace", trace="new")
    policy = RestartPolicy(max_failures=2, jitter=0)
    await asyncio.gather(
        await manager.start_service("service", _fail, restart=policy), return_exceptions=True
    )
    periodic = await manager.start_periodic("periodic", lambda: asyncio.sleep(0.1), every=1.0)
    await asyncio.sleep(1.5)
    periodic.cancel()
    await asyncio.wait([periodic])
    queue: asyncio.Queue[str] = asyncio.Queue()
    queue.put_nowait("item")
    consumer = await manager.start_consumer("consumer", queue, lambda _: _fail(), on_failure=_keep)
    await queue.join()
    consumer.cancel()
    await asyncio.wait([consumer])


async def _keep(item: str, error: Exception) -> None:
    await asyncio.sleep(1)


async def _cancels(manager: TaskManager) -> None:
    task = manager.create_task(asyncio.sleep(60), name="cancelled")
    ignoring = manager.create_task(_ignore(), name="ignoring")
    await asyncio.sleep(1)
    task.cancel("no longer wanted")
    ignoring.cancel()
    await asyncio.wait([task, ignoring])
    with contextlib.suppress(ExceptionGroup):
        async with manager.group("load", span=True) as group:
            group.create_task(asyncio.sleep(60), name="sibling")
            group.create_task(_fail(), name="failing")
    tracer = manager._ledger.telemetry.tracer()
    assert tracer is not None
    with tracer.start_as_current_span("creator"):
        async with manager.group("load", span=True) as group:
            group.create_task(asyncio.sleep(60), name="member")
            await asyncio.sleep(1)
            group.cancel("enough")


async def _request(manager: TaskManager, seen: Seen) -> None:
    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        await create_task(asyncio.sleep(60), name="prices")

    bound = TaskGroupMiddleware(handler, manager=manager)
    connection = FakeConnection(path="/report/7")

    async def server() -> None:
        with seen.tracer_provider.get_tracer("server").start_as_current_span(REQUEST):
            await connection.run(bound)

    serving = asyncio.create_task(server())
    await asyncio.sleep(1)
    connection.disconnect()
    await serving
    connection = FakeConnection.websocket("/alerts")
    serving = asyncio.create_task(server())
    await asyncio.sleep(1)
    connection.disconnect(code=1006)
    await serving


async def _fail() -> None:
    await asyncio.sleep(0.1)
    raise ValueError("the supplier answered 503")


async def _ignore() -> None:
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(60)


async def _stubborn(release: asyncio.Event) -> None:
    while not release.is_set():
        with contextlib.suppress(asyncio.CancelledError):
            await release.wait()


# --- messages of errors ------------------------------------------------------------------------------------


def messages() -> dict[str, str]:
    """One message of each error, by the error's name."""
    found: dict[str, str] = {}
    with _quiet():
        for scene in (
            _not_found,
            _exists,
            _group_closed,
            _manager_closed,
            _queue_full,
            _wrong_thread,
            _illegal,
        ):
            error = run(_error_of(scene))
            found[type(error).__name__] = str(error)
        error = _wrong_loop()
        found[type(error).__name__] = str(error)
    return found


async def _error_of(scene: Callable[[TaskManager], Any]) -> OtelTasksError:
    manager = TaskManager("shop", max_concurrency=1, max_queue=1)
    try:
        await scene(manager)
    except OtelTasksError as error:
        return error
    finally:
        await manager.shutdown(grace=0)
    raise AssertionError(f"{scene.__name__} raised nothing")


async def _not_found(manager: TaskManager) -> None:
    manager.get_task("import")


async def _exists(manager: TaskManager) -> None:
    await manager.start_task("import", lambda: asyncio.sleep(60))
    await manager.start_task("import", lambda: asyncio.sleep(60))


async def _group_closed(manager: TaskManager) -> None:
    async with TaskGroup("load", manager=manager) as group:
        pass
    group.create_task(asyncio.sleep(60), name="late")


async def _manager_closed(manager: TaskManager) -> None:
    async with make_lifespan(manager=manager)(FastAPI(title="Shop")):
        pass
    manager.create_task(asyncio.sleep(60), name="late")


async def _queue_full(manager: TaskManager) -> None:
    for _ in range(3):
        manager.create_task(asyncio.sleep(60), name="query")


async def _wrong_thread(manager: TaskManager) -> None:
    raised: list[OtelTasksError] = []

    def create() -> None:
        try:
            manager.create_task(asyncio.sleep(60), name="mail")
        except OtelTasksError as error:
            raised.append(error)

    thread = threading.Thread(target=create)
    thread.start()
    thread.join()
    raise raised[0]


async def _illegal(_: TaskManager) -> None:
    next_status(TaskStatus.FAILED, Signal.CANCEL)


def _wrong_loop() -> OtelTasksError:
    manager = TaskManager("shop")
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()

    async def create(name: str) -> None:
        manager.create_task(asyncio.sleep(60), name=name)

    async def shut_down() -> None:
        await manager.shutdown(grace=0)

    try:
        first.run_until_complete(create("mail"))
        second.run_until_complete(create("late"))
    except OtelTasksError as error:
        return error
    finally:
        first.run_until_complete(shut_down())
        first.close()
        second.close()
    raise AssertionError("a manager was used in two loops")
