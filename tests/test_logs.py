from __future__ import annotations

import ast
import asyncio
import json
import logging
import logging.handlers
import queue
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import otel_tasks
from otel_tasks import TaskManager, create_task
from otel_tasks._core.request_group import RequestGroup
from otel_tasks.asgi import TaskGroupMiddleware
from otel_tasks.logs import TaskContextFilter
from otel_tasks.testing import FakeConnection
from tests.blocks import python_blocks, run_block
from tests.helpers import fail, ignore_cancels, settle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from otel_tasks.testing import SpanRecorder

PAGE = "docs/logs.md"
PACKAGE = Path(otel_tasks.__file__).parent
FIELDS = ("task_id", "task_name", "task_group", "trace_id", "span_id")
# Tests of their own have the other two: `test_logs_metadata.py`.
ALL_FIELDS = {*FIELDS, "task_uid", "task_metadata"}

logger = logging.getLogger("app.mail")


class Kept(logging.Handler):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def fields(self) -> list[tuple[object, ...]]:
        return [tuple(getattr(record, field) for field in FIELDS) for record in self.records]


@pytest.fixture
def kept() -> Iterator[Kept]:
    """A handler with the filter, at the root."""
    handler = Kept()
    handler.addFilter(TaskContextFilter())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield handler
    root.removeHandler(handler)
    root.setLevel(level)


# -- the filter ---------------------------------------------------------------------------------


async def test_record_in_a_task_names_it_and_its_span(kept: Kept, spans: SpanRecorder) -> None:
    """Inside a task a record has its id, name and group, and the current span's trace and id."""

    async def work() -> None:
        logger.info("in the task")
        with spans.provider.get_tracer("app").start_as_current_span("inner"):
            logger.info("in a span of its own")

    async with TaskManager(tracer_provider=spans.provider) as manager:
        task = manager.create_task(work(), name="send", group="mail.out")
        await task

    inner = spans.span("inner").context
    assert inner is not None
    info = task.info()
    assert kept.fields() == [
        ("send", "send", "mail.out", info.trace_id, info.span_id),
        ("send", "send", "mail.out", info.trace_id, f"{inner.span_id:016x}"),
    ]


async def test_task_is_named_without_an_sdk(kept: Kept) -> None:
    """Without an SDK the task is named, and trace and span are empty."""

    async def work() -> None:
        logger.info("here")

    async with TaskManager() as manager, manager.group("load") as group:
        group.create_task(work(), name="first")

    assert kept.fields() == [(f"{group.id}/first", "first", "load", "", "")]


async def test_fields_are_empty_outside_of_a_task(kept: Kept) -> None:
    """In a plain task, in a callback of the loop and in a thread the fields are there, and empty."""
    logger.info("plain task")
    asyncio.get_running_loop().call_soon(logger.info, "callback")
    await asyncio.sleep(0)
    thread = threading.Thread(target=logger.info, args=("thread",))
    thread.start()
    thread.join()

    assert kept.fields() == [("",) * 5] * 3


def test_fields_are_empty_without_a_loop(kept: Kept) -> None:
    """Without a running event loop, the fields are empty too."""
    logger.info("before the start")

    assert kept.fields() == [("",) * 5]


async def test_span_without_a_task_is_named(kept: Kept, spans: SpanRecorder) -> None:
    """Below a span that is no task's, a request's say, trace and span are there without a task."""
    with spans.provider.get_tracer("app").start_as_current_span("request") as span:
        logger.info("in the handler")

    context = span.get_span_context()
    assert kept.fields() == [("", "", "", f"{context.trace_id:032x}", f"{context.span_id:016x}")]


@pytest.mark.real_clock
async def test_threads_of_a_task(kept: Kept, spans: SpanRecorder) -> None:
    """The function of `run_in_thread` is in its task; in `asyncio.to_thread` trace and span are left."""

    async def hand_over() -> None:
        await asyncio.to_thread(logger.info, "elsewhere")

    async with TaskManager(tracer_provider=spans.provider) as manager:
        own = manager.run_in_thread(logger.info, "in the thread", name="hash", group="files")
        await own
        plain = manager.create_task(hand_over(), name="read")
        await plain

    assert kept.fields() == [
        ("hash", "hash", "files", own.info().trace_id, own.info().span_id),
        ("", "", "", plain.info().trace_id, plain.info().span_id),
    ]


async def test_fields_that_a_record_has_are_left_alone(kept: Kept) -> None:
    """A field that the caller has set stays, and so does what a first filter has found."""

    async def work() -> None:
        logger.info("mine", extra={"task_id": "my own"})

    async with TaskManager() as manager:
        await manager.create_task(work(), name="work")
    TaskContextFilter(default_value="-").filter(kept.records[0])

    assert kept.fields() == [("my own", "work", "root", "", "")]


async def test_queue_handler_with_the_filter_carries_the_fields_to_its_listener() -> None:
    """On a `QueueHandler` the filter runs in the task, and the listener's thread finds the fields."""
    line: queue.SimpleQueue[Any] = queue.SimpleQueue()
    sender = logging.handlers.QueueHandler(line)
    sender.addFilter(TaskContextFilter())
    receiver = Kept()
    receiver.addFilter(TaskContextFilter())
    listener = logging.handlers.QueueListener(line, receiver)
    logger.addHandler(sender)

    async def work() -> None:
        logger.warning("queued")

    try:
        listener.start()
        async with TaskManager() as manager:
            await manager.create_task(work(), name="work")
        listener.stop()
    finally:
        logger.removeHandler(sender)

    assert receiver.fields() == [("work", "work", "root", "", "")]


def test_name_and_default_value() -> None:
    """With a name it lets the records of that logger alone pass, as any filter; the default may be None."""
    filtering = TaskContextFilter("app", default_value=None)
    record = logging.makeLogRecord({"name": "app.mail"})

    assert filtering.filter(record)
    assert [getattr(record, field) for field in FIELDS] == [None] * 5
    assert not filtering.filter(logging.makeLogRecord({"name": "other"}))


async def test_filter_never_raises(kept: Kept) -> None:
    """If a group's name cannot be read, the record passes with empty fields."""
    known = True

    def route() -> str:
        if known:
            return "GET /"
        raise LookupError("no route")

    async def work() -> None:
        nonlocal known
        known = False
        logger.info("here")
        known = True

    async with TaskManager() as manager:
        group = RequestGroup.open(manager, route, binding=None, host=None)
        await group.create_task(work(), name="work")
        group._leave_tree()

    assert kept.fields() == [("",) * 5]


async def test_asking_makes_no_group_for_a_request(kept: Kept) -> None:
    """A record in a handler that starts no task makes no group for its request."""
    manager = TaskManager()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        logger.info("in the handler")
        assert not manager._ledger.scopes
        await answer(send)

    await FakeConnection().run(TaskGroupMiddleware(app, manager=manager))

    assert kept.fields() == [("",) * 5]


async def test_task_of_a_request_is_named_with_its_group(kept: Kept) -> None:
    """A task of a request has the group of the request, and an id that tells this request from others."""

    async def work() -> None:
        logger.info("for the request")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await create_task(work(), name="prices")
        await answer(send)

    await FakeConnection().run(TaskGroupMiddleware(app, manager=TaskManager()))

    [(task_id, name, group, *_)] = kept.fields()
    assert (name, group) == ("prices", "GET")
    assert re.fullmatch(r"GET#\d+/prices", str(task_id))


async def answer(send: Any) -> None:
    """Send an empty response."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


JSON_LOGS = """
import asyncio
import json
import logging.config

from otel_tasks import TaskManager


class JsonFormatter(logging.Formatter):
    # As the packages for JSON logs do it: whatever a plain record has not, is printed.
    known = logging.makeLogRecord({}).__dict__.keys() | {"message", "asctime", "taskName"}

    def format(self, record):
        extra = {key: value for key, value in vars(record).items() if key not in self.known}
        return json.dumps({"message": record.getMessage(), **extra})


logging.config.dictConfig(
    {
        "version": 1,
        "filters": {"task": {"()": "otel_tasks.logs.TaskContextFilter", "default_value": None}},
        "formatters": {"json": {"()": JsonFormatter}},
        "handlers": {
            "out": {
                "class": "logging.StreamHandler",
                "stream": "ext://sys.stdout",
                "filters": ["task"],
                "formatter": "json",
            }
        },
        "root": {"handlers": ["out"], "level": "INFO"},
    }
)


async def work():
    logging.getLogger("app.mail").info("sent", extra={"to": "Ada"})


async def main():
    async with TaskManager() as manager:
        await manager.create_task(work(), name="mail")


logging.info("begin")
asyncio.run(main())
"""


def test_dict_config_makes_json_lines() -> None:
    """`dictConfig` puts it on a handler, and a formatter that prints all extra fields prints these."""
    nothing = dict.fromkeys(ALL_FIELDS)
    lines = [json.loads(line) for line in run_block(JSON_LOGS).splitlines()]

    assert re.fullmatch(r"[\w-]{22}", lines[1]["task_uid"])
    assert lines == [
        {"message": "begin", **nothing},
        {
            "message": "sent",
            "to": "Ada",
            **nothing,
            "task_id": "mail",
            "task_name": "mail",
            "task_group": "root",
            "task_uid": lines[1]["task_uid"],
        },
    ]


def test_fields_are_none_of_the_logging_instrumentation() -> None:
    """No field has a name that logging has itself, or that OpenTelemetry's instrumentation sets."""
    taken = {"otelTraceID", "otelSpanID", "otelTraceSampled", "otelServiceName", "taskName"}

    assert not (taken | vars(logging.makeLogRecord({})).keys()) & {*ALL_FIELDS, "otel_tasks"}


# -- what the library logs ----------------------------------------------------------------------


async def test_line_of_the_library_is_about_the_task_that_it_names(kept: Kept, spans: SpanRecorder) -> None:
    """A failure logged outside of any task has its task's fields; so has a warning in another task."""

    async def cancel_another() -> None:
        await manager.cancel_task("stubborn", timeout=1.0)
        await asyncio.sleep(10.0)

    async with TaskManager(tracer_provider=spans.provider) as manager:
        failing = manager.create_task(fail(ValueError("boom")), name="failing", group="mail")
        stubborn = manager.create_task(ignore_cancels(5.0), name="stubborn")
        await settle()
        await manager.create_task(cancel_another(), name="canceller")

    lines = {
        record.getMessage().partition(" (")[0]: fields
        for record, fields in zip(kept.records, kept.fields(), strict=True)
    }
    assert lines == {
        "task 'failing' failed and nobody awaits it": (
            *("failing", "failing", "mail"),
            *(failing.info().trace_id, failing.info().span_id),
        ),
        "cancelled and still running after 1.0 s: 'stubborn'": ("", "", "", "", ""),
        "task 'stubborn' ignored its cancellation": (
            *("stubborn", "stubborn", "root"),
            *(stubborn.info().trace_id, stubborn.info().span_id),
        ),
    }
    assert kept.records[1].__dict__["otel_tasks"] == {"task_ids": ["stubborn"], "task_uids": [stubborn.uid]}


async def test_record_factory_with_the_same_names_does_no_harm(kept: Kept) -> None:
    """If a record factory sets `trace_id` on every record, the library can still log."""
    before = logging.getLogRecordFactory()

    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = before(*args, **kwargs)
        record.trace_id = "theirs"
        return record

    logging.setLogRecordFactory(factory)
    try:
        async with TaskManager() as manager:
            manager.create_task(fail(ValueError("boom")), name="failing")
            await settle()
    finally:
        logging.setLogRecordFactory(before)

    assert kept.fields() == [("failing", "failing", "root", "theirs", "")]
    assert manager.stats().failed == 1


def test_page_lists_every_line_that_the_code_can_log() -> None:
    """The table of `docs/logs.md` has each line of the code once, with level and fields, and no other."""
    in_code = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        in_code |= lines_of(ast.parse(path.read_text("utf-8")))

    assert sorted(rows_of_the_page()) == sorted(in_code)


def test_all_lines_go_to_one_logger() -> None:
    """Only one module gets a logger, and its name is that of the package."""
    calls = [
        (path.name, ast.unparse(node))
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith("getLogger")
        and "opentelemetry" not in ast.unparse(node)
    ]

    assert calls == [("log.py", "logging.getLogger('otel_tasks')")]


def test_blocks_of_the_page_print_their_comments() -> None:
    """Each Python block of the page runs, and prints the text block behind it."""
    text = (PACKAGE.parent / PAGE).read_text("utf-8")
    expected = re.findall(r"^```text\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)

    assert [run_block(code) for code in python_blocks(PAGE)] == expected


LEVELS = {"debug", "info", "warning", "error", "exception", "critical", "log"}
ROW = re.compile(r"^\| (?P<level>[A-Z]+) \| `(?P<line>.+?)` \| .+? \| ?(?P<fields>\w*) ?\|$", re.MULTILINE)


def rows_of_the_page() -> list[tuple[str, str, str]]:
    """Level, line and fields of each row."""
    text = (PACKAGE.parent / PAGE).read_text("utf-8").partition("## What the library logs")[2]
    return [(row["level"], row["line"], row["fields"]) for row in ROW.finditer(text)]


def lines_of(tree: ast.AST) -> set[tuple[str, str, str]]:
    """Level, line and fields of each call that logs; `log_once` is the ledger's, for the first only."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, owner = node.func.attr, ast.unparse(node.func.value)
        if name == "log_once":
            about = "task" if any(keyword.arg == "task" for keyword in node.keywords) else ""
            found.add(("ERROR", readable(node) + "; further ones are not logged", about))
        elif owner.startswith("TaskLogger(") and name in LEVELS:
            level = "ERROR" if name == "exception" else name.upper()
            found.add((level, readable(node), "task"))
        elif owner == "logger" and name in LEVELS:
            level = "ERROR" if name == "exception" else name.upper()
            found.add((level, readable(node), fields_of(node)))
    return found


def readable(call: ast.Call) -> str:
    """The line as the page writes it."""
    text = call.args[0]
    assert isinstance(text, ast.Constant), f"line {call.lineno}: a line that is logged is written out"
    return re.sub(r"%\w", "…", str(text.value)).replace("\n", " ")


def fields_of(call: ast.Call) -> str:
    """The value of `record.otel_tasks`."""
    for keyword in call.keywords:
        if keyword.arg == "extra":
            assert ast.unparse(keyword.value).startswith("log_fields_of_all(")
            return "task_ids"
    return ""
