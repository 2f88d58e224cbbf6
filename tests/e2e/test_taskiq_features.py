"""Taskiq as its users have it, under managed(): in memory, on Redis Streams, and on RabbitMQ."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator  # noqa: TC003 - Taskiq reads the annotations of dependencies
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import taskiq_fastapi
from fastapi import FastAPI, Request
from taskiq import (
    AckableMessage,
    Context,
    SimpleRetryMiddleware,
    SmartRetryMiddleware,
    TaskiqDepends,
    TaskiqEvents,
    TaskiqMessage,
    TaskiqMiddleware,
    TaskiqResult,
    TaskiqScheduler,
    async_shared_broker,
)
from taskiq.acks import AcknowledgeType
from taskiq.api import run_scheduler_task
from taskiq.middlewares.opentelemetry_middleware import OpenTelemetryMiddleware
from taskiq.schedule_sources import LabelScheduleSource
from taskiq_pipelines import Pipeline, PipelineMiddleware

from otel_tasks import TaskPriority, current_cancel_event, current_task
from otel_tasks.fastapi import make_lifespan
from otel_tasks.taskiq import labels, remote

from .queues import Pair

if TYPE_CHECKING:
    from collections.abc import Callable

    from examples.redis_server import Redis
    from otel_tasks.testing import SpanRecorder

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]

# Generous: other tests run at the same time.
WITHIN = 60.0


@pytest.fixture(params=["memory", "redis", "rabbitmq"])
def make(request: pytest.FixtureRequest, key: str) -> Callable[..., Pair]:
    """Makes a sender and a worker on one kind of broker."""
    urls: dict[str, str] = {}
    if request.param != "memory":
        server: Redis = request.getfixturevalue("redis_server")
        urls["redis"] = server.url
    if request.param == "rabbitmq":
        urls["rabbitmq"] = request.getfixturevalue("rabbitmq").url
    return lambda *spans: Pair(request.param, urls, f"{key}-{os.getpid()}", *spans)


@pytest.fixture
def pair(make: Callable[..., Pair]) -> Pair:
    """A sender and a worker."""
    return make()


async def until(look: Callable[[], object]) -> None:
    """Wait for a state."""
    async with asyncio.timeout(WITHIN):
        while not look():  # noqa: ASYNC110 - it is not an event: a test asks for many things
            await asyncio.sleep(0.01)


def live(pair: Pair) -> list[str]:
    """The names of the live tasks of the worker."""
    infos = pair.worker.manager.get_all_task_info().values()
    return sorted(info.name for info in infos if not info.status.is_final)


# -- messages and results -------------------------------------------------------------------------


async def test_plain_call_has_its_id_labels_and_result(pair: Pair) -> None:
    """kicker(), with_task_id(), and with_labels() work as before; the types of labels are kept."""

    async def work(page: int, context: Context = TaskiqDepends()) -> list[Any]:  # noqa: B008 - Taskiq's way
        message = context.message
        return [page, message.task_id, message.labels["tenant"], message.labels["tries"]]

    task = pair.task(work, tenant="acme")
    async with pair.running():
        sent = await task.kicker().with_task_id(f"{id(pair)}").with_labels(tries=3).kiq(7)
        result = await sent.wait_result(timeout=WITHIN)
    assert result.return_value == [7, f"{id(pair)}", "acme", 3]
    assert (result.is_err, sent.task_id) == (False, f"{id(pair)}")


async def test_error_is_the_error_of_the_result(pair: Pair) -> None:
    """A plain call gets the exception of the function; raise_for_error() raises it."""

    async def work() -> None:
        raise LookupError("no such page")

    task = pair.task(work)
    async with pair.running():
        result = await (await task.kiq()).wait_result(timeout=WITHIN)
    assert result.is_err
    with pytest.raises(LookupError, match="no such page"):
        result.raise_for_error()


async def test_one_kicker_sends_many_calls(pair: Pair) -> None:
    """A kicker with labels of its own is used for two calls at once: each has an id of its own."""

    async def work(page: int, context: Context = TaskiqDepends()) -> list[Any]:  # noqa: B008 - Taskiq's way
        await asyncio.sleep(0.2)
        return [page, context.message.labels["tenant"]]

    task = pair.task(work)
    async with pair.running():
        kicker = task.kicker().with_labels(tenant="acme")
        found = await asyncio.gather(*(remote(kicker, page) for page in range(3)))
        assert kicker.custom_task_id is None
    assert found == [[page, "acme"] for page in range(3)]


async def test_task_that_is_declared_after_the_start_runs(pair: Pair) -> None:
    """Tasks of a running worker, with dependencies, async and plain."""

    async def page_size() -> int:
        return 7

    async def work(size: Any = TaskiqDepends(page_size)) -> list[Any]:  # noqa: B008 - Taskiq's way
        return [_name(), size]

    def plain(size: Any = TaskiqDepends(page_size)) -> list[Any]:  # noqa: B008 - Taskiq's way
        return [_name(), size]

    async with pair.running():
        found = [await remote(pair.task(function)) for function in (work, plain)]
    assert found == [["work", 7], ["plain", 7]]


def _name() -> str | None:
    """The name of the managed task, without the number that makes it the only one."""
    task = current_task()
    return None if task is None else task.name.partition("-")[0]


async def test_shared_task_is_sent_by_the_default_broker(pair: Pair) -> None:
    """A task of async_shared_broker runs managed, by remote() and by kiq()."""

    @async_shared_broker.task(task_name=f"tests:shared{id(pair)}")
    async def work() -> str | None:
        return _name()

    async_shared_broker.default_broker(pair.sender.broker)
    try:
        async with pair.running():
            assert await remote(work) == "work"
            result = await (await work.kiq()).wait_result(timeout=WITHIN)
            assert result.return_value == "work"
            result = await (await work.kicker().with_broker(pair.sender.broker).kiq()).wait_result()
            assert result.return_value == "work"
    finally:
        async_shared_broker.default_broker(None)  # type: ignore[arg-type]  # as it was
        async_shared_broker.global_task_registry.pop(f"tests:shared{id(pair)}")


async def test_plain_function_runs_in_a_thread(pair: Pair) -> None:
    """A def function runs in the receiver's pool; its cancellation sets its event."""
    threads: list[int] = []

    def work() -> str:
        threads.append(threading.get_ident())
        event = current_cancel_event()
        while not event.is_set():
            time.sleep(0.01)
        return str(event.cause)

    task = pair.task(work)
    async with pair.running():
        call = pair.sender.manager.create_task(remote(task), name="spin")
        await until(lambda: threads)
        call.cancel("enough")
        await asyncio.wait([call])
        await until(lambda: not live(pair))
    assert threads[0] != threading.get_ident()


# -- middlewares and events -----------------------------------------------------------------------


class Recorder(TaskiqMiddleware):
    """Records the hooks that are called, and for whom."""

    def __init__(self, side: str, calls: list[str]) -> None:
        super().__init__()
        self._side = side
        self._calls = calls

    def _record(self, hook: str) -> None:
        self._calls.append(f"{self._side}.{hook}")

    async def startup(self) -> None:
        """Record it."""
        self._record("startup")

    async def shutdown(self) -> None:
        """Record it."""
        self._record("shutdown")

    async def pre_send(self, message: TaskiqMessage) -> TaskiqMessage:
        """Record it."""
        self._record("pre_send")
        message.labels["seen_by"] = self._side
        return message

    def post_send(self, message: TaskiqMessage) -> None:
        """Record it."""
        self._record("post_send")

    def pre_execute(self, message: TaskiqMessage) -> TaskiqMessage:
        """Record it."""
        self._record("pre_execute")
        return message

    async def post_execute(self, message: TaskiqMessage, result: TaskiqResult[Any]) -> None:
        """Record it."""
        self._record(f"post_execute {type(result.error).__name__}")

    async def on_error(
        self, message: TaskiqMessage, result: TaskiqResult[Any], exception: BaseException
    ) -> None:
        """Record it."""
        self._record(f"on_error {type(exception).__name__}")

    def post_save(self, message: TaskiqMessage, result: TaskiqResult[Any]) -> None:
        """Record it."""
        self._record("post_save")


async def test_hooks_of_middlewares_are_called_in_their_order(pair: Pair) -> None:
    """Hooks run around a managed task, for a result and for an error, as around any other."""
    calls: list[str] = []
    pair.sender.broker.add_middlewares(Recorder("sender", calls))
    if pair.worker is not pair.sender:
        pair.worker.broker.add_middlewares(Recorder("worker", calls))

    async def work(fails: bool, context: Context = TaskiqDepends()) -> str:  # noqa: B008 - Taskiq's way
        calls.append("work")
        if fails:
            raise LookupError
        return str(context.message.labels["seen_by"])

    task = pair.task(work)
    worker = "sender" if pair.worker is pair.sender else "worker"
    async with pair.running():
        await until(lambda: f"{worker}.startup" in calls)
        calls.clear()
        assert await remote(task, False) == "sender"
        ended = _without_post_send(calls)
        calls.clear()
        with pytest.raises(LookupError):
            await remote(task, True)
        failed = _without_post_send(calls)
        calls.clear()
    before = [f"{worker}.pre_execute", "work"]
    assert ended == ["sender.pre_send", *before, f"{worker}.post_execute NoneType", f"{worker}.post_save"]
    after = [f"{worker}.on_error LookupError", f"{worker}.post_execute LookupError", f"{worker}.post_save"]
    assert failed == ["sender.pre_send", *before, *after]
    assert sorted(calls) == sorted({f"{worker}.shutdown", "sender.shutdown"})


def _without_post_send(calls: list[str]) -> list[str]:
    """What happens once the message is sent has no order with the other side."""
    assert "sender.post_send" in calls
    return [call for call in calls if call != "sender.post_send"]


async def test_hooks_see_the_end_of_a_cancelled_task(pair: Pair) -> None:
    """A cancelled task is a NoResultError to on_error and post_execute, which end what pre_execute began."""
    calls: list[str] = []
    pair.worker.broker.add_middlewares(Recorder("worker", calls))
    task = pair.task(sleep)
    async with pair.running():
        call = pair.sender.manager.create_task(remote(task))
        await until(lambda: live(pair) and "worker.pre_execute" in calls)
        await asyncio.sleep(0.2)
        call.cancel()
        await asyncio.wait([call])
        await until(lambda: "worker.post_execute ExecutionEndedError" in calls)
    assert "worker.on_error ExecutionEndedError" in calls
    assert "worker.post_save" not in calls


async def sleep() -> None:
    """Run until it is cancelled."""
    await asyncio.sleep(600)


async def test_events_and_state_are_those_of_the_broker(pair: Pair) -> None:
    """A handler of WORKER_STARTUP sets what tasks use; the fleet is started when tasks run."""

    async def work(context: Context = TaskiqDepends()) -> str:  # noqa: B008 - Taskiq's way
        return str(context.state.database)

    async def open_database(state: Any) -> None:
        state.database = "open"

    closed: list[str] = []
    pair.worker.broker.add_event_handler(TaskiqEvents.WORKER_STARTUP, open_database)
    pair.worker.broker.add_event_handler(
        TaskiqEvents.WORKER_SHUTDOWN, lambda state: closed.append(state.database)
    )
    task = pair.task(work)
    async with pair.running():
        assert await remote(task) == "open"
    assert closed == ["open"]


# -- dependencies ---------------------------------------------------------------------------------


async def test_generator_dependencies_are_closed_when_the_task_is_cancelled(pair: Pair) -> None:
    """Async and plain generators see the end of a cancelled task, and run their cleanup."""
    log: list[str] = []

    async def session() -> AsyncIterator[str]:
        log.append("open")
        try:
            yield "session"
        except BaseException as error:
            log.append(type(error).__name__)
            raise
        finally:
            log.append("close")

    def lock(session: Any = TaskiqDepends(session)) -> Iterator[str]:  # noqa: B008 - Taskiq's way
        log.append("lock")
        try:
            yield "lock"
        finally:
            log.append("unlock")

    async def work(db: Any = TaskiqDepends(session), held: Any = TaskiqDepends(lock)) -> None:  # noqa: B008 - Taskiq's way
        log.append(f"work {db} {held}")
        await asyncio.sleep(600)

    task = pair.task(work)
    async with pair.running():
        call = pair.sender.manager.create_task(remote(task))
        await until(lambda: len(log) == 3)
        call.cancel()
        await asyncio.wait([call])
        await until(lambda: "close" in log)
    assert log == ["open", "lock", "work session lock", "unlock", "ExecutionEndedError", "close"]


# -- retries --------------------------------------------------------------------------------------


@pytest.mark.parametrize("middleware", [SimpleRetryMiddleware, SmartRetryMiddleware])
async def test_retries_go_on_until_one_succeeds(pair: Pair, middleware: type[TaskiqMiddleware]) -> None:
    """remote() returns the result of the last attempt; each one is a managed task."""
    options: dict[str, Any] = {"default_retry_count": 3}
    if middleware is SmartRetryMiddleware:
        options |= {"default_delay": 0, "use_jitter": False}
    pair.worker.broker.add_middlewares(middleware(**options))
    names: list[str | None] = []

    async def work() -> int:
        names.append(_name())
        if len(names) < 3:
            raise ConnectionError
        return len(names)

    task = pair.task(work, retry_on_error=True)
    async with pair.running():
        async with asyncio.timeout(WITHIN):
            assert await remote(task) == 3
    assert names == ["work"] * 3


async def test_cancelled_task_is_not_retried(pair: Pair) -> None:
    """A cancellation ends all attempts: also those to come."""
    pair.worker.broker.add_middlewares(SmartRetryMiddleware(default_retry_count=9, default_delay=0))
    attempts: list[float] = []

    async def work() -> None:
        attempts.append(time.monotonic())
        if len(attempts) < 2:
            raise ConnectionError
        await asyncio.sleep(600)

    task = pair.task(work, retry_on_error=True)
    async with pair.running():
        call = pair.sender.manager.create_task(remote(task))
        await until(lambda: len(attempts) == 2)
        call.cancel()
        await asyncio.wait([call])
        await until(lambda: not live(pair))
        await asyncio.sleep(0.5)
    assert len(attempts) == 2


async def test_rejected_task_is_a_failed_call(pair: Pair) -> None:
    """context.reject() fails the call with Taskiq's error."""

    async def work(context: Context = TaskiqDepends()) -> None:  # noqa: B008 - Taskiq's way
        context.reject()

    task = pair.task(work)
    async with pair.running():
        with pytest.raises(Exception, match="reject"):
            await asyncio.wait_for(remote(task), WITHIN)


# -- schedules ------------------------------------------------------------------------------------


async def test_scheduler_in_process_sends_managed_tasks(pair: Pair) -> None:
    """A task with a schedule label is sent by TaskiqScheduler, and runs managed, with its labels."""
    found: list[Any] = []

    async def work(page: int, context: Context = TaskiqDepends()) -> None:  # noqa: B008 - Taskiq's way
        task = current_task()
        assert task is not None
        found.append([_name(), task.group.name, page, "schedule_id" in context.message.labels])

    schedule = [{"interval": 1, "args": [7], "labels": labels(group="reports")}]
    pair.task(work, schedule=schedule)
    scheduler = TaskiqScheduler(pair.sender.broker, [LabelScheduleSource(pair.sender.broker)])
    async with pair.running():
        running = asyncio.create_task(run_scheduler_task(scheduler))
        await until(lambda: len(found) >= 2)
        running.cancel()
        await asyncio.wait([running])
    assert found[:2] == [["work", "reports", 7, True]] * 2


# -- the receiver ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ack_type", list(AcknowledgeType))
async def test_each_kind_of_acknowledgment_ends_the_message(make: Callable[..., Pair], ack_type: Any) -> None:
    """With each --ack-type, results, errors, and cancellations leave no message behind."""
    pair = make()
    if pair.kind == "memory":
        pytest.skip("it acknowledges nothing")
    acknowledged: list[str] = []
    listen = vars(pair.worker.broker)["listen"]

    async def listen_and_count() -> AsyncIterator[AckableMessage]:
        async for message in listen():
            ack = message.ack

            async def counted(ack: Any = ack) -> None:
                await ack()
                acknowledged.append("")

            yield AckableMessage(data=message.data, ack=counted)

    vars(pair.worker.broker)["listen"] = listen_and_count

    async def work(kind: str, context: Context = TaskiqDepends()) -> str:  # noqa: B008 - Taskiq's way
        try:
            if kind == "fails":
                raise LookupError
            await asyncio.sleep(600 if kind == "waits" else 0)
            return kind
        finally:
            if ack_type is AcknowledgeType.MANUAL:
                await context.ack()

    task = pair.task(work)
    async with pair.running(ack_type=ack_type):
        assert await remote(task, "ends") == "ends"
        with pytest.raises(LookupError):
            await remote(task, "fails")
        call = pair.sender.manager.create_task(remote(task, "waits"))
        await until(lambda: live(pair))
        await asyncio.sleep(0.1)
        call.cancel()
        await asyncio.wait([call])
        await until(lambda: len(acknowledged) == 3)
    assert call.cancelled()


async def test_worker_runs_no_more_than_its_limit(pair: Pair) -> None:
    """--max-async-tasks bounds the managed tasks of a worker."""
    if pair.kind == "memory":
        pytest.skip("its receiver is made with the broker")
    at_once: list[int] = []
    running: set[int] = set()

    async def work(number: int) -> None:
        running.add(number)
        at_once.append(len(running))
        await asyncio.sleep(0.1)
        running.discard(number)

    task = pair.task(work)
    async with pair.running(at_once=2, max_prefetch=3):
        await asyncio.gather(*(remote(task, number) for number in range(8)))
    assert max(at_once) == 2


async def test_high_priorities_overtake_in_the_queue(pair: Pair) -> None:
    """Low tasks are sent first, high ones while the worker is busy: the high ones start first."""
    if pair.kind == "memory":
        pytest.skip("it has no queue")
    order: list[str] = []
    release = asyncio.Event()

    async def work(key: str) -> None:
        order.append(key)
        if key == "first":
            await release.wait()

    task = pair.task(work)
    create = pair.sender.manager.create_task
    async with pair.running(at_once=1):
        calls = [create(remote(task, "first"))]
        await until(lambda: order == ["first"])
        for level, name in ((TaskPriority.NORMAL, "normal"), (TaskPriority.HIGH, "high")):
            calls += [create(remote(task, f"{name}{number}"), priority=level) for number in range(5)]
            await asyncio.sleep(0.5)
        release.set()
        await asyncio.wait_for(asyncio.gather(*calls), WITHIN)
    rest = order[1:]
    # The worker may hold one message more than it runs.
    waited = [key for key in rest if not key.startswith("high")][:1]
    assert [key for key in rest if key not in waited][:5] == [f"high{number}" for number in range(5)], order


# -- other packages -------------------------------------------------------------------------------


async def test_steps_of_a_pipeline_are_managed_tasks(pair: Pair) -> None:
    """taskiq-pipelines: each step runs managed, and the pipeline's result is that of the last one."""
    for side in {pair.sender, pair.worker}:
        side.broker.add_middlewares(PipelineMiddleware())
    names: list[str | None] = []

    async def double(number: int) -> int:
        names.append(_name())
        return number * 2

    task = pair.task(double)
    async with pair.running():
        pipeline = Pipeline(pair.sender.broker, task).call_next(task).call_next(task)
        result = await (await pipeline.kiq(1)).wait_result(timeout=WITHIN)
    assert result.return_value == 8
    assert names == ["double"] * 3


async def test_worker_runs_the_lifespan_of_an_application(pair: Pair) -> None:
    """taskiq-fastapi: tasks use the application's state, whose lifespan starts and stops the same fleet."""
    worker = pair.worker

    @asynccontextmanager
    async def connections(app: FastAPI) -> AsyncIterator[None]:
        if not worker.broker.is_worker_process:
            await worker.broker.startup()
        app.state.database = "open"
        yield
        app.state.database = "closed"

    app = FastAPI(lifespan=make_lifespan(connections, fleet=worker.fleet, manager=worker.manager))
    taskiq_fastapi.init(worker.broker, app)
    if pair.kind == "memory":
        # As its page says: there is no worker process.
        taskiq_fastapi.populate_dependency_context(worker.broker, app)
        app.state.database = "open"

    async def work(request: Request = TaskiqDepends()) -> list[Any]:  # noqa: B008 - Taskiq's way
        return [request.app.state.database, _name()]

    task = pair.task(work)
    async with pair.running():
        assert await remote(task) == ["open", "work"]
    assert not worker.fleet.is_started
    assert app.state.database == ("open" if pair.kind == "memory" else "closed")


# -- Taskiq's own instrumentation -----------------------------------------------------------------


async def test_instrumentation_of_taskiq_adds_its_spans_to_the_trace(
    make: Callable[..., Pair], spans: SpanRecorder
) -> None:
    """With it, a remote call is one trace of four spans, each below the one before; none is there twice."""
    pair = make(spans)
    for side in {pair.sender, pair.worker}:
        middleware = OpenTelemetryMiddleware(tracer_provider=spans.provider)
        side.broker.middlewares.insert(0, middleware)
        middleware.set_broker(side.broker)

    async def work() -> str:
        return "done"

    task = pair.task(work)
    async with pair.running():
        assert await pair.sender.manager.create_task(remote(task), name="call") == "done"
        await until(lambda: len(spans.finished) >= 4)
    (root,) = (span for span in spans.finished if span.parent is None)
    way = [root.name]
    while children := spans.children(root):
        (root,) = children
        way.append(root.name)
    assert way == ["call", "send/tests:work", "execute/tests:work", "call"]
    assert len(spans.finished) == 4
