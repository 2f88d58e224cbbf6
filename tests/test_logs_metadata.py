"""Each kind of line about a task, read as JSON: it has the task's uid, and the metadata marked for logs."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from enum import StrEnum
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from fastapi import Depends

from otel_tasks import RestartPolicy, RetryPolicy, TaskManager, create_task, global_task_manager
from otel_tasks._core.log import log_fields_of_all
from otel_tasks._core.request_group import RequestGroup
from otel_tasks.asgi import TaskGroupMiddleware
from otel_tasks.logs import TaskContextFilter
from otel_tasks.testing import FakeConnection
from tests.helpers import PATIENCE, fail, give, ignore_cancels, rest, settle, until
from tests.live_client import client_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from otel_tasks import ManagedTask
    from otel_tasks.testing import SpanRecorder

JOB = {"job": 4711, "secret": "not marked"}
ONCE = RestartPolicy(max_failures=1)


class Lines(logging.Handler):
    """Formats each record as JSON, as packages for JSON logs do, and keeps what a log's reader gets."""

    plain = logging.makeLogRecord({}).__dict__.keys() | {"message", "asctime", "taskName"}

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        extra = {key: value for key, value in vars(record).items() if key not in self.plain}
        self._lines.append(json.dumps({"message": record.getMessage(), **extra}, allow_nan=False))

    @property
    def all(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._lines]

    def with_text(self, text: str) -> dict[str, Any]:
        """The one line that has this text."""
        [found] = [line for line in self.all if text in line["message"]]
        return found


@pytest.fixture
def lines() -> Iterator[Lines]:
    """The library's lines."""
    handler = Lines()
    logger = logging.getLogger("otel_tasks")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def manager(spans: SpanRecorder) -> TaskManager:
    return TaskManager("shop", log_metadata=("job",), tracer_provider=spans.provider)


# -- each kind of line ------------------------------------------------------------------------------

# Each makes the line about the task that it returns.


async def fails(manager: TaskManager) -> ManagedTask[Any]:
    task = manager.create_task(fail(ValueError("boom")), name="t", group="mail", metadata=JOB)
    await settle()
    return task


async def ignores(manager: TaskManager) -> ManagedTask[Any]:
    task = manager.create_task(ignore_cancels(1), name="t", metadata=JOB)
    await settle()
    await manager.cancel_task("t")
    return task


async def breaks_on_error(manager: TaskManager) -> ManagedTask[Any]:
    def broken(*_: object) -> None:
        raise LookupError("broken")

    other = TaskManager("shop", log_metadata=["job"], on_error=broken)
    return await fails(other)


async def breaks_a_listener(manager: TaskManager) -> ManagedTask[Any]:
    def broken(event: str, info: object) -> None:
        raise LookupError(event)

    manager.add_listener(broken)
    task = manager.create_task(give(1), name="t", metadata=JOB)
    await task
    return task


async def breaks_telemetry(manager: TaskManager) -> ManagedTask[Any]:
    task = manager.create_task(give(1), name="t", metadata=JOB)
    span: Any = task._span
    end = span.end
    span.end = None  # To call it raises, as a span processor might.
    await task
    end()
    return task


async def is_stubborn_at_shutdown(manager: TaskManager) -> ManagedTask[Any]:
    task = manager.create_task(ignore_cancels(9), name="t", metadata=JOB)
    await settle()
    await manager.shutdown(0, 1)
    await asyncio.sleep(10)
    return task


async def is_watched_while_cancelled(manager: TaskManager) -> ManagedTask[Any]:
    with manager.watch(held=None, ignored=1):
        task = manager.create_task(ignore_cancels(9), name="t", metadata=JOB)
        await settle()
        task.cancel()
        await asyncio.sleep(10)
    return task


async def is_watched_before_its_start(manager: TaskManager) -> ManagedTask[Any]:
    with manager.watch(held=None, ignored=None, unstarted=1):
        manager.create_task(ignore_cancels(9), name="t")
        await settle()
        task = manager.create_task(give(1), name="t", on_conflict="replace", metadata=JOB)
        await asyncio.sleep(20)
    return task


async def is_retried(manager: TaskManager) -> ManagedTask[Any]:
    policy = RetryPolicy(max_attempts=2, on=ValueError)
    task = manager.create_task(lambda: fail(ValueError("boom")), name="t", retry=policy, metadata=JOB)
    await manager.join()
    return task


async def gives_up(manager: TaskManager) -> ManagedTask[Any]:
    def broken(*_: object) -> None:
        raise LookupError("broken")

    task = await manager.start_service(
        "t", lambda: fail(OSError("no")), restart=ONCE, critical=True, on_give_up=broken, metadata=JOB
    )
    await asyncio.sleep(1)
    return task


async def is_cancelled_by_a_viewer(manager: TaskManager) -> ManagedTask[Any]:
    task = manager.create_task(rest(), name="t", metadata=JOB)
    await settle()
    client = client_of(manager, auth=Depends(lambda: "ada"), actions={"cancel"})
    await client.cancel(task.uid)
    return task


async def handles_an_item(manager: TaskManager) -> ManagedTask[Any]:
    tasks: list[Any] = []
    queue: asyncio.Queue[int] = asyncio.Queue()
    queue.put_nowait(1)

    async def t(item: int) -> None:
        tasks.append(asyncio.current_task())
        raise OSError("no")

    def broken(*_: object) -> None:
        raise LookupError("broken")

    await manager.start_consumer("jobs", queue, t, on_failure=broken, metadata=JOB)
    await queue.join()
    await manager.shutdown(0)
    task: ManagedTask[Any] = tasks[0]
    return task


async def fails_while_cut(manager: TaskManager) -> ManagedTask[Any]:
    tasks: list[Any] = []
    queue: asyncio.Queue[int] = asyncio.Queue()
    queue.put_nowait(1)

    async def t(item: int) -> None:
        tasks.append(asyncio.current_task())
        try:
            await rest()
        except asyncio.CancelledError:
            raise OSError("connection lost") from None

    async def bury(item: int, error: Exception) -> None:
        raise AssertionError("it is too late for that")

    await manager.start_consumer("jobs", queue, t, on_failure=bury, metadata=JOB)
    await settle()
    await manager.shutdown(1)
    task: ManagedTask[Any] = tasks[0]
    return task


@pytest.mark.parametrize(
    ("scenario", "text"),
    [
        (fails, "task 't' (job=4711) failed and nobody awaits it"),
        (ignores, "task 't' (job=4711) ignored its cancellation (explicit) and completed"),
        (breaks_on_error, "on_error of manager 'shop' raised"),
        (breaks_a_listener, "raised and is dropped"),
        (breaks_telemetry, "telemetry of task 't' (job=4711) raised"),
        (is_stubborn_at_shutdown, "task 't' (job=4711) did not stop at shutdown"),
        (is_watched_while_cancelled, "task 't' (job=4711) still runs"),
        (is_watched_before_its_start, "task 't' (job=4711) was created"),
        (is_retried, "task 't' (job=4711) failed in attempt 1 and is retried"),
        (gives_up, "critical service 't' (job=4711) gave up (OSError: no)"),
        (gives_up, "on_give_up of service 't' (job=4711) raised"),
        (is_cancelled_by_a_viewer, "ada cancels task 't' (job=4711) in the live view"),
        (handles_an_item, "raised for task 't' (job=4711), which had failed with OSError('no')"),
        (fails_while_cut, "task 't' (job=4711) failed while the shutdown cancelled it"),
    ],
)
async def test_line_about_a_task_names_uid_and_marked_metadata(
    manager: TaskManager,
    lines: Lines,
    scenario: Callable[[TaskManager], Awaitable[ManagedTask[Any]]],
    text: str,
) -> None:
    """The text has the marked metadata behind the name, and the fields have them with the task's uid."""
    task = await scenario(manager)
    info = task.info()

    assert info.uid is not None
    assert lines.with_text(text)["otel_tasks"] == {
        "task_id": "t",
        "task_name": "t",
        "task_group": info.group,
        "task_uid": info.uid,
        "task_metadata": {"job": 4711},
        "trace_id": info.trace_id or "",
        "span_id": info.span_id or "",
    }


async def test_line_about_a_service_names_the_attempt_in_its_fields(
    manager: TaskManager, lines: Lines
) -> None:
    """The metadata are those of the service, which its attempts share."""
    service = await manager.start_service("prices", lambda: fail(OSError("no")), metadata=JOB)
    await asyncio.sleep(0.1)
    line = lines.with_text("service 'prices' (job=4711) failed in attempt 'prices#1'")["otel_tasks"]
    assert (line["task_id"], line["task_metadata"]) == ("prices#1", {"job": 4711})
    assert line["task_uid"] != service.uid
    await manager.shutdown(0)


@pytest.mark.real_clock
async def test_lines_about_threads(manager: TaskManager, lines: Lines) -> None:
    """A thread that outlives its task is named with the task's uid and metadata, at the end of both."""
    entered, gate = threading.Event(), threading.Event()

    def stuck() -> None:
        entered.set()
        gate.wait(PATIENCE)

    task = manager.run_in_thread(stuck, name="t", abandon=True, metadata=JOB)
    await asyncio.to_thread(entered.wait, PATIENCE)
    task.cancel()
    await asyncio.wait([task])
    await manager.shutdown(0, 1)
    gate.set()
    await until(lambda: len(lines.all) == 3)

    assert [line["message"].partition(")")[2].partition(" (")[0].partition(";")[0] for line in lines.all] == [
        " runs on after the task",
        " has not returned at shutdown",
        " has returned",
    ]
    for line in lines.all:
        assert line["message"].startswith("the thread of task 't' (job=4711) ")
        assert line["otel_tasks"]["task_uid"] == task.uid


@pytest.mark.real_clock
async def test_line_about_what_holds_the_loop(manager: TaskManager, lines: Lines) -> None:
    """The thread that sees it makes the uid; a plain task has none."""

    async def spins() -> None:
        end = time.monotonic() + PATIENCE
        while not any("(job=4711) has held" in line["message"] for line in lines.all):
            assert time.monotonic() < end

    with manager.watch(held=0.02, ignored=None, unstarted=None, outlived=None):
        task = manager.create_task(spins(), name="t", metadata=JOB)
        await task

    fields = lines.with_text("task 't' (job=4711) has held the event loop")["otel_tasks"]
    assert (fields["task_uid"], fields["task_metadata"]) == (task.uid, {"job": 4711})


async def test_line_about_several_tasks_lists_their_uids(manager: TaskManager, lines: Lines) -> None:
    """Beside the ids; the text stays a list of names."""
    tasks = [manager.create_task(ignore_cancels(9), name=name, metadata=JOB) for name in "ab"]
    await settle()
    await manager.cancel_all_tasks(timeout=1.0)
    line = lines.with_text("cancelled and still running after 1.0 s: 'a', 'b'")
    assert line["otel_tasks"] == {"task_ids": ["a", "b"], "task_uids": [task.uid for task in tasks]}
    await manager.join()


async def test_shutdown_lists_the_uids_of_what_it_cancels(manager: TaskManager, lines: Lines) -> None:
    """Made after the tasks have ended, they still find the records."""
    manager.create_task(rest(), name="a")
    await settle()
    await manager.shutdown(0)
    [uid] = lines.with_text("the shutdown of manager 'shop' cancelled 1 task: 'a'")["otel_tasks"]["task_uids"]
    info = manager.get_task_info(uid)
    assert info is not None
    assert (info.id, info.status) == ("a", "cancelled")


async def test_consumer_lists_uids_of_tasks_at_hand_alone(manager: TaskManager, lines: Lines) -> None:
    """Those that still run; the ids of items that were handed back follow, without a uid."""
    queue: asyncio.Queue[int] = asyncio.Queue()
    for item in range(2):
        queue.put_nowait(item)
    tasks: list[Any] = []

    async def t(item: int) -> None:
        if item:
            await rest()
        tasks.append(asyncio.current_task())
        await ignore_cancels(9)

    await manager.start_consumer("jobs", queue, t, concurrency=2)
    await settle()
    await manager.shutdown(0, 1)
    line = lines.with_text("consumer 'jobs' has stopped")
    assert line["otel_tasks"] == {"task_ids": ["t", "t-2"], "task_uids": [tasks[0].uid]}
    await asyncio.sleep(10)


async def test_uids_of_many_tasks_are_bounded(manager: TaskManager) -> None:
    """A line about thousands of tasks has all ids, and makes a hundred uids."""
    tasks = [manager.create_task(give(1)) for _ in range(300)]
    fields = log_fields_of_all(tasks)["otel_tasks"]
    assert fields["task_ids"] == [task.id for task in tasks]
    assert len(fields["task_uids"]) == 100
    assert tasks[100].info().uid is None
    await manager.join()


# -- the uid ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", [fails, ignores])
async def test_uid_of_a_line_finds_the_record(
    manager: TaskManager, lines: Lines, scenario: Callable[[TaskManager], Awaitable[ManagedTask[Any]]]
) -> None:
    """What stands in the log can be looked up, even if other tasks have had the name since."""
    await scenario(manager)
    await manager.create_task(give(1), name="t")
    [line] = lines.all
    info = manager.get_task_info(line["otel_tasks"]["task_uid"])
    assert info is not None
    assert (info.id, info.metadata) == ("t", JOB)


class Counting:
    """A value that counts how often its text is read."""

    reads = 0

    def __str__(self) -> str:
        self.reads += 1
        return "text"


async def test_disabled_lines_read_nothing(manager: TaskManager) -> None:
    """Without a record, no uid is made, and no metadata are turned into text."""
    logging.getLogger("otel_tasks").setLevel(logging.CRITICAL)
    value = Counting()
    try:
        task = manager.create_task(fail(ValueError("boom")), metadata={"job": value})
        stubborn = manager.create_task(ignore_cancels(9))
        await settle()
        await manager.cancel_task(stubborn.id, timeout=1)
        await manager.join()
    finally:
        logging.getLogger("otel_tasks").setLevel(logging.NOTSET)
    assert (task.info().uid, stubborn.info().uid) == (None, None)
    assert value.reads == 0


async def test_record_is_that_of_the_place_that_logs(
    manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """File, line, and function of a record are those of the code that logs, and its arguments are text."""
    await fails(manager)
    [record] = caplog.records
    assert (record.filename, record.funcName) == ("ending.py", "_report_unhandled")
    assert isinstance(record.args, tuple)
    assert record.args[0] == "'t' (job=4711)"


# -- values -----------------------------------------------------------------------------------------


class Color(StrEnum):
    RED = "red"


class Broken:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("value", "field", "text"),
    [
        (4711, 4711, "4711"),
        (True, True, "True"),
        (None, None, "None"),
        (0.5, 0.5, "0.5"),
        ("acme", "acme", "acme"),
        ("acme inc", "acme inc", "'acme inc'"),
        ("", "", "''"),
        ("x) failed\nERROR all", "x) failed\nERROR all", r"'x) failed\nERROR all'"),
        ("\x1b[2J", "\x1b[2J", r"'\x1b[2J'"),
        (Color.RED, "red", "red"),
        (UUID(int=7), str(UUID(int=7)), str(UUID(int=7))),
        ([1, 2], "[1, 2]", "'[1, 2]'"),
        (float("nan"), "nan", "nan"),
        (2**64, str(2**64), str(2**64)),
        pytest.param(
            10**5000, "<int without text: ValueError>", "'<int without text: ValueError>'", id="5000 digits"
        ),
        ("a" * 201, "a" * 200 + "…", "'" + "a" * 200 + "…'"),
        (Broken(), "<Broken without text: RuntimeError>", "'<Broken without text: RuntimeError>'"),
    ],
)
async def test_values_are_plain_and_short(
    manager: TaskManager, lines: Lines, value: object, field: object, text: str
) -> None:
    """Numbers stay numbers, everything else is text of bounded length, which can forge no line."""
    manager.create_task(fail(ValueError("boom")), name="t", metadata={"job": value})
    await settle()
    [line] = lines.all
    assert line["otel_tasks"]["task_metadata"] == {"job": field}
    assert line["message"].startswith(f"task 't' (job={text}) failed")
    assert manager.stats().failed == 1


async def test_keys_are_those_that_the_task_has(lines: Lines) -> None:
    """In the order in which they are marked; a task without metadata is named as ever."""
    manager = TaskManager(log_metadata=("job", "tenant", "region"))
    manager.create_task(fail(ValueError()), name="a", metadata={"tenant": "acme", "x": 1, "job": 1})
    manager.create_task(fail(ValueError()), name="b")
    await settle()
    assert [line["message"] for line in lines.all] == [
        "task 'a' (job=1, tenant=acme) failed and nobody awaits it",
        "task 'b' failed and nobody awaits it",
    ]
    assert [line["otel_tasks"]["task_metadata"] for line in lines.all] == [{"job": 1, "tenant": "acme"}, {}]


async def test_line_about_a_task_that_cannot_be_described(manager: TaskManager, lines: Lines) -> None:
    """If its group's name cannot be read, the line still comes, with the task's own name."""
    known = True

    def route() -> str:
        if known:
            return "GET /"
        raise LookupError("no route")

    group = RequestGroup.open(manager, route, binding=None, host=None)
    task = group.create_task(give(1), name="t")
    known = False
    manager._ledger.log_once("telemetry of task %s raised", task, task=task)
    known = True
    await task
    assert lines.with_text("telemetry of task 't' raised")["otel_tasks"] == {"task_name": "t"}
    group._leave_tree()


# -- the option -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("job", r"must be a collection of strings, got 'job': write log_metadata=\('job',\)"),
        (None, "must be a collection of strings, got None"),
        (7, "must be a collection of strings, got 7"),
        (("job", 1), "must contain only strings, got 1"),
        ([b"job"], "must contain only strings, got b'job'"),
    ],
)
def test_bad_keys_are_refused(keys: Any, message: str) -> None:
    """At the call, with the line to write, by the constructor and by the attribute."""
    with pytest.raises(TypeError, match=f"log_metadata {message}"):
        TaskManager(log_metadata=keys)
    with pytest.raises(TypeError, match=f"log_metadata {message}"):
        global_task_manager.log_metadata = keys
    assert global_task_manager.log_metadata == ()


async def test_keys_can_be_changed(manager: TaskManager, lines: Lines) -> None:
    """That is how the global manager gets them; each key counts once."""
    assert manager.log_metadata == ("job",)
    manager.log_metadata = ["tenant", "tenant"]
    assert manager.log_metadata == ("tenant",)
    manager.create_task(fail(ValueError()), name="t", metadata={"job": 1, "tenant": "acme"})
    await settle()
    lines.with_text("task 't' (tenant=acme) failed")


# -- the application's own lines --------------------------------------------------------------------


@pytest.fixture
def own_lines() -> Iterator[SimpleNamespace]:
    """The lines of an application, through the filter."""
    handler, logger = Lines(), logging.getLogger("app.jobs")
    found = TaskContextFilter()
    handler.addFilter(found)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield SimpleNamespace(handler=handler, filter=found, info=logger.info)
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


async def test_own_lines_have_the_same_fields(manager: TaskManager, own_lines: SimpleNamespace) -> None:
    """The filter adds uid and marked metadata of the current task, with the names of the library's lines."""

    async def work() -> None:
        own_lines.info("here")

    task = manager.create_task(work(), name="t", metadata=JOB)
    await task
    own_lines.info("outside")
    inside, outside = own_lines.handler.all
    assert (inside["task_uid"], inside["task_metadata"]) == (task.uid, {"job": 4711})
    assert (outside["task_uid"], outside["task_metadata"]) == ("", "")


async def test_filter_can_leave_the_uid_out(manager: TaskManager, own_lines: SimpleNamespace) -> None:
    """Then no task gets one for a line of its own."""
    own_lines.filter.uid = False

    async def work() -> None:
        own_lines.info("here")

    task = manager.create_task(work(), name="t")
    await task
    [line] = own_lines.handler.all
    assert (line["task_id"], line["task_uid"], line["task_metadata"]) == ("t", "", "")
    assert task.info().uid is None


async def test_request_that_ends_lists_the_uids_of_its_tasks(manager: TaskManager, lines: Lines) -> None:
    """A request whose tasks do not end names them with their uids."""
    tasks: list[ManagedTask[Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tasks.append(create_task(ignore_cancels(20), name="deaf"))
        await asyncio.sleep(0)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    await FakeConnection().run(TaskGroupMiddleware(app, manager=manager))
    fields = lines.with_text("its tasks still run: 'GET#1/deaf'")["otel_tasks"]
    assert fields == {"task_ids": ["GET#1/deaf"], "task_uids": [tasks[0].uid]}
    await manager.join()
