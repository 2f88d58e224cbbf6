"""Tasks of Taskiq for the tests of remote calls: imported by workers, and made by callers in their process.

What happens is written to the file named by `E2E_JOURNAL`, one JSON line per event, with the process's id.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from taskiq import AsyncBroker, SimpleRetryMiddleware, TaskiqScheduler
from taskiq.schedule_sources import LabelScheduleSource
from taskiq_aio_pika import AioPikaBroker, Exchange, Queue, QueueType
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from otel_tasks import TaskManager, TaskPriority, current_cancel_event, current_task
from otel_tasks.asgi import request_group
from otel_tasks.fastapi import TaskGroupMiddleware, make_lifespan
from otel_tasks.fleet import Fleet
from otel_tasks.taskiq import labels, managed, rabbitmq_priorities, remote, stream_priorities

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from taskiq import AsyncTaskiqDecoratedTask

TASKS = ("nothing", "sleep", "spin", "block", "fail", "flaky", "unsaved", "ordered", "fan_out", "loop")


@dataclass(frozen=True)
class Settings:
    """The servers and names of one test."""

    redis: str
    broker: str
    namespace: str
    journal: str

    def environment(self) -> dict[str, str]:
        """The variables that carry them to another process."""
        return {f"E2E_{key.upper()}": value for key, value in vars(self).items()}

    @classmethod
    def from_environment(cls) -> Settings:
        """Read them."""
        return cls(*(os.environ[f"E2E_{key.upper()}"] for key in cls.__dataclass_fields__))


def write_note(journal: str, event: str, key: str, **details: Any) -> None:
    """Write a line to a journal."""
    line = json.dumps({"event": event, "key": key, "pid": os.getpid(), "at": time.time(), **details})
    with open(journal, "a") as file:
        file.write(line + "\n")


class App:
    """A fleet, a broker, and the tasks, as one process has them."""

    def __init__(self, settings: Settings, manager: TaskManager | None = None) -> None:
        self._journal = settings.journal
        self.settings = settings
        self.manager = manager or TaskManager()
        self.fleet = Fleet(settings.redis, namespace=settings.namespace, manager=self.manager)
        self.broker: AsyncBroker = _broker(settings, self.fleet)
        self.tasks: dict[str, AsyncTaskiqDecoratedTask[..., Any]] = {
            name: self.broker.task(task_name=f"shop:{name}")(self._function(name)) for name in TASKS
        }
        self.tasks["describe"] = self.broker.task(task_name="shop:describe")(describe)

    def call(self, name: str, *args: Any) -> Any:
        """The coroutine of a remote call."""
        return remote(self.tasks[name], *args)

    def call_with(self, kicker: Any, *args: Any) -> Any:
        """The coroutine of a remote call, with the labels and the id of a kicker."""
        return remote(kicker, *args)

    def note(self, event: str, key: str, **details: Any) -> None:
        """Write to the journal."""
        write_note(self._journal, event, key, **details)

    def _function(self, name: str) -> Any:
        method = getattr(self, f"_{name}")
        if name in ("spin",):

            def plain(*args: Any) -> Any:
                return method(*args)

            plain.__name__ = name
            return plain

        async def function(*args: Any) -> Any:
            return await method(*args)

        function.__name__ = name
        return function

    async def _nothing(self, value: int = 0) -> int:
        return value

    async def _sleep(self, key: str, seconds: float) -> str:
        self.note("started", key)
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            task = current_task()
            cause = task.cause if task is not None else None
            self.note("cancelled", key, cause=None if cause is None else cause.to_dict())
            raise
        self.note("finished", key)
        return key

    def _spin(self, key: str) -> None:
        self.note("started", key)
        event = current_cancel_event()
        while not event.is_set():
            time.sleep(0.01)
        self.note("saw the event", key)

    async def _block(self, key: str, seconds: float) -> str:
        self.note("started", key)
        time.sleep(seconds)  # noqa: ASYNC251 - the test is about a blocked loop
        self.note("finished", key)
        return key

    async def _fail(self) -> None:
        raise LookupError("no such page")

    async def _flaky(self, key: str, failures: int) -> int:
        self.note("started", key)
        attempts = Path(self._journal).read_text("utf-8").count(f'"event": "started", "key": "{key}"')
        await asyncio.sleep(0.2)
        self.note("finished", key)
        if attempts <= failures:
            raise ConnectionError(f"attempt {attempts}")
        return attempts

    async def _unsaved(self) -> Any:
        # It cannot be pickled.
        return threading.Lock()

    async def _loop(self) -> tuple[str, bool]:
        loop = asyncio.get_running_loop()
        return type(loop).__module__.partition(".")[0], loop.get_task_factory() is not None

    async def _ordered(self, key: str) -> None:
        self.note("started", key)

    async def _fan_out(self, key: str, seconds: float) -> list[str]:
        self.note("started", key)
        return [await self.call("sleep", f"{key}.inner", seconds)]


def _broker(settings: Settings, fleet: Fleet) -> AsyncBroker:
    name = settings.namespace
    # A restart of the server cuts the connections of the pools.
    retry = Retry(ExponentialBackoff(), 5)
    results: Any = RedisAsyncResultBackend(settings.redis, result_ex_time=600, retry=retry)
    if settings.broker == "redis":
        streams = {TaskPriority.NORMAL: f"{name}.normal", TaskPriority.HIGH: f"{name}.high"}
        broker: AsyncBroker = RedisStreamBroker(
            settings.redis,
            queue_name=f"{name}.high",
            additional_streams={f"{name}.normal": ">"},
            consumer_group_name=name,
            consumer_id="0",
            # Then another worker takes the message of a lost one; a claim keeps it from running twice.
            idle_timeout=2000,
            xread_block=200,
            unacknowledged_lock_timeout=5,
            retry=retry,
        ).with_result_backend(results)
        # It retries what is labeled so.
        broker.add_middlewares(SimpleRetryMiddleware())
        return managed(broker, fleet, priorities=stream_priorities(streams), grace=0.5)
    broker = AioPikaBroker(
        settings.broker,
        exchange=Exchange(name=f"{name}.exchange"),
        task_queues=[Queue(name=f"{name}.tasks", type=QueueType.CLASSIC, max_priority=9)],
        dead_letter_queue=Queue(name=f"{name}.dead"),
        qos=100,
    ).with_result_backend(results)
    broker.add_middlewares(SimpleRetryMiddleware())
    return managed(broker, fleet, priorities=rabbitmq_priorities(9), grace=0.5)


def trace_to_receiver() -> None:
    """Export spans to the receiver of the test, if there is one."""
    if "OTEL_EXPORTER_OTLP_ENDPOINT" not in os.environ:
        return
    provider = TracerProvider(resource=Resource.create())
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


def api() -> FastAPI:
    """The service of `uvicorn --factory tests.e2e.remote_app:api`: a request whose work is two calls deep."""
    trace_to_receiver()
    app = App(Settings.from_environment())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await app.broker.startup()
        yield
        await app.broker.shutdown()

    service = FastAPI(lifespan=make_lifespan(lifespan, manager=app.manager, grace=0.5, request_grace=0.5))
    service.add_middleware(TaskGroupMiddleware, manager=app.manager)

    @service.get("/book/{key}")
    async def book(key: str, seconds: float) -> list[str]:
        task = request_group().create_task(app.call("fan_out", key, seconds), name="book")
        pages: list[str] = await task
        return pages

    return service


def __getattr__(name: str) -> Any:
    """Make `broker` or `scheduler`, for `taskiq worker` and `taskiq scheduler`."""
    if name not in ("broker", "scheduler"):
        raise AttributeError(name)
    trace_to_receiver()
    app = globals()["app"] = App(Settings.from_environment())
    broker = globals()["broker"] = app.broker
    if name == "broker":
        return broker
    schedule = [{"interval": 1, "args": ["tick"], "labels": labels(group="reports")}]
    app.tasks["describe"].labels["schedule"] = schedule
    scheduler = globals()["scheduler"] = TaskiqScheduler(broker, [LabelScheduleSource(broker)])
    return scheduler


def describe(key: str) -> None:
    """Note the managed task: a plain function, which a process pool can import."""
    task = current_task()
    managed_as = None if task is None else [task.name.partition("-")[0], task.group.name]
    write_note(os.environ["E2E_JOURNAL"], "described", key, task=managed_as)


async def _call_forever(name: str, *args: str) -> None:
    """Call a task in a process that a test ends in the middle; the last argument is a number of seconds."""
    app = App(Settings.from_environment())
    await app.broker.startup()
    await run_call(app, name, *args[:-1], float(args[-1]))


async def run_call(app: App, name: str, *args: Any) -> None:
    """Call a task in the manager of an app, and note how that ended."""
    app.note("called", str(args[0]))
    try:
        await app.manager.create_task(app.call(name, *args))
    except asyncio.CancelledError:
        app.note("call cancelled", str(args[0]))
        raise
    finally:
        await app.broker.shutdown()


if __name__ == "__main__":
    import sys

    import otel_tasks

    otel_tasks.run(_call_forever(*sys.argv[1:]))
