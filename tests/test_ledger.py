"""The records of a manager: failures, counters, history, listeners, and the loop it belongs to."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import errno
import gc
import json
import logging
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import traceback
import warnings
from dataclasses import FrozenInstanceError, replace
from typing import Any, TypeVar

import pytest

from otel_tasks import (
    CancelCause,
    CancelKind,
    ManagedTask,
    ManagerClosedError,
    RetryPolicy,
    TaskInfo,
    TaskManager,
    TaskStatus,
    WrongLoopError,
    WrongThreadError,
)
from otel_tasks._core.records import without_frames
from otel_tasks._core.task import request_cancel_all
from otel_tasks.testing import SpanRecorder, VirtualClockLoop, run
from tests.helpers import counters, fail, give, ignore_cancels, rest, settle

Failure = tuple[TaskInfo, BaseException]
E = TypeVar("E", bound=Exception)


# -- failures: never silent, never twice -----------------------------------------------------------


async def test_failure_that_no_code_awaits_is_logged_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """Without on_error, the failure is logged at ERROR with its traceback, and not again by asyncio."""
    TaskManager().create_task(fail(ValueError("no")), name="bad")
    await settle()
    [record] = caplog.records
    assert (record.name, record.levelno) == ("otel_tasks", logging.ERROR)
    assert record.getMessage() == "task 'bad' failed and nobody awaits it"
    assert record.exc_info is not None
    assert "in fail" in caplog.text
    gc.collect()
    assert len(caplog.records) == 1


@pytest.mark.parametrize("options", [{}, {"timeout": 5.0}, {"retry": RetryPolicy(attempt_timeout=5.0)}])
async def test_logged_traceback_starts_with_the_code_of_the_user(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The wrappers that a timeout or retries put around it are left out."""
    manager = TaskManager()
    work: Any = (lambda: fail(ValueError("no"))) if "retry" in options else fail(ValueError("no"))
    manager.create_task(work, **options)
    await manager.join()
    *_, record = caplog.records
    assert record.exc_info is not None
    assert [frame.name for frame in traceback.extract_tb(record.exc_info[2])] == ["fail"]


async def test_logged_failure_names_its_trace(spans: SpanRecorder, caplog: pytest.LogCaptureFixture) -> None:
    """With tracing the log line has the trace id."""
    task = TaskManager(tracer_provider=spans.provider).create_task(fail(ValueError("no")), name="bad")
    await settle()
    assert caplog.messages == [f"task 'bad' failed and nobody awaits it (trace {task.trace_id})"]


async def test_failure_with_a_waiter_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The error is raised in the waiter, and reported nowhere else."""
    manager = TaskManager(on_error=lambda info, error: pytest.fail("reported"))
    with pytest.raises(ValueError, match="no"):
        await manager.create_task(fail(ValueError("no")))
    await asyncio.gather(manager.create_task(fail(ValueError("no"))), return_exceptions=True)
    task = manager.create_task(fail(ValueError("no")), name="bad")
    with pytest.raises(ValueError, match="no"):
        await manager.wait_for_task("bad")
    del task
    await settle()
    gc.collect()
    assert not caplog.messages


async def test_failure_after_the_awaiter_gave_up_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A waiter that has gone does not count."""
    manager = TaskManager()

    async def work() -> None:
        await asyncio.sleep(5)
        raise ValueError("no")

    manager.create_task(work(), name="bad")
    with pytest.raises(TimeoutError):
        await manager.wait_for_task("bad", timeout=1)
    await manager.join()
    await settle()
    assert caplog.messages == ["task 'bad' failed and nobody awaits it"]


async def test_waiter_that_never_looks_leaves_it_to_asyncio(caplog: pytest.LogCaptureFixture) -> None:
    """asyncio logs a failure that reached a waiter but was never retrieved, as for any task."""
    task: ManagedTask[None] | None = TaskManager().create_task(fail(ValueError("no")))
    assert task is not None
    await asyncio.wait([task])
    await settle()
    assert not caplog.messages
    task = None
    gc.collect()
    [message] = caplog.messages
    assert message.startswith("ManagedTask exception was never retrieved")


async def test_join_does_not_count_as_awaiting(caplog: pytest.LogCaptureFixture) -> None:
    """join() raises no failures, so they are logged."""
    manager = TaskManager()
    manager.create_task(fail(ValueError("no")), name="bad")
    await manager.join()
    assert caplog.messages == ["task 'bad' failed and nobody awaits it"]


async def test_on_error_is_called_instead_of_logging(caplog: pytest.LogCaptureFixture) -> None:
    """on_error gets the snapshot and the exception itself."""
    reported: list[Failure] = []
    error = ValueError("no")
    manager = TaskManager(on_error=lambda *failure: reported.append(failure))
    manager.create_task(fail(error), name="bad")
    await settle()
    [(info, seen)] = reported
    assert (info.name, info.status) == ("bad", TaskStatus.FAILED)
    assert seen is error
    gc.collect()
    assert not caplog.messages


async def test_on_error_that_raises_is_logged_and_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """A broken on_error is logged once; the failures are logged from then on."""
    calls: list[int] = []

    def broken(info: TaskInfo, error: BaseException) -> None:
        calls.append(1)
        raise LookupError("broken")

    manager = TaskManager("mine", on_error=broken)
    manager.create_task(fail(ValueError("no")), name="a")
    manager.create_task(fail(ValueError("no")), name="b")
    await settle()
    assert caplog.messages == [
        "on_error of manager 'mine' raised and is dropped",
        "task 'a' failed and nobody awaits it",
        "task 'b' failed and nobody awaits it",
    ]
    assert len(calls) == 1


async def test_cancelled_task_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    """A cancelled task is neither reported nor logged."""
    TaskManager().create_task(rest()).cancel()
    await settle()
    assert not caplog.messages


async def test_timeout_that_nobody_awaits_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """A task that runs into its timeout has failed."""
    manager = TaskManager()
    manager.create_task(rest(), name="slow", timeout=1)
    await manager.join()
    assert caplog.messages == ["task 'slow' failed and nobody awaits it"]


async def test_error_without_a_text_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """An exception whose __str__ raises is recorded as far as it can be."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError("no text")

    manager = TaskManager(on_error=lambda info, error: None)
    manager.create_task(fail(Mute()), name="mute")
    await settle()
    info = manager.get_task_info("mute")
    assert info is not None
    assert (info.error_type, info.error) == ("Mute", "<Mute without text: ValueError>")
    assert not manager._root.tasks
    assert not caplog.messages


async def test_error_that_is_falsy_is_still_an_error() -> None:
    """An exception with a length of zero is one: it fails its task."""

    class Empty(Exception):
        def __len__(self) -> int:
            return 0

    reported: list[Failure] = []
    manager = TaskManager(on_error=lambda *failure: reported.append(failure))
    manager.create_task(fail(Empty()), name="bad")
    await manager.start_task("named", lambda: fail(Empty()))
    await settle()
    assert manager.stats().failed == 2
    assert len(reported) == 2
    with pytest.raises(Empty):
        await manager.wait_for_task("named")


# -- counters --------------------------------------------------------------------------------------


async def test_counters_add_up() -> None:
    """Created is live + completed + failed + cancelled at any moment."""
    manager = TaskManager(on_error=lambda info, error: None)
    manager.create_task(give(1))
    manager.create_task(fail(ValueError("no")))
    stubborn = manager.create_task(ignore_cancels(5))
    cancelled = manager.create_task(rest())
    assert counters(manager) == {"created": 4, "live": 4}
    await settle()
    stubborn.cancel()
    cancelled.cancel()
    await settle()
    ended = {"completed": 1, "failed": 1, "cancelled": 1, "remembered": 3}
    assert counters(manager) == {"created": 4, "live": 1, **ended}
    await manager.join()
    ended = {"completed": 2, "failed": 1, "cancelled": 1, "cancel_ignored": 1, "remembered": 4}
    assert counters(manager) == {"created": 4, **ended}


async def test_counters_survive_the_history() -> None:
    """Records that the history drops stay counted."""
    manager = TaskManager(history=1)
    for number in range(3):
        await manager.create_task(give(number))
    assert counters(manager) == {"created": 3, "completed": 3, "remembered": 1}
    assert manager.cleanup_completed_tasks() == 1
    assert counters(manager) == {"created": 3, "completed": 3}


async def test_cancellations_are_counted_by_group_and_reason() -> None:
    """The metric's source counts cancelled tasks by group and kind of cause."""
    manager = TaskManager()
    manager.create_task(rest(), group="mail")
    manager.create_task(fail(asyncio.CancelledError()), group="mail")
    await settle()
    await manager.cancel_group("mail")
    assert manager._ledger.totals.cancelled == {("mail", "explicit"): 1, ("mail", "foreign"): 1}


# -- history ---------------------------------------------------------------------------------------


async def test_history_keeps_the_newest_records() -> None:
    """History is bounded by count; the oldest go first."""
    manager = TaskManager(history=2)
    for name in "abc":
        await manager.create_task(give(name), name=name)
    assert sorted(manager.get_all_task_info()) == ["b", "c"]
    assert manager.get_task_info("a") is None


async def test_history_of_zero_keeps_nothing() -> None:
    """history=0 keeps no record."""
    manager = TaskManager(history=0)
    await manager.start_task("a", lambda: give(1))
    await settle()
    assert manager.get_all_task_info() == {}
    assert manager.stats().completed == 1


async def test_newest_record_of_a_name_counts() -> None:
    """If two tasks have one name, the later one is shown."""
    manager = TaskManager(on_error=lambda info, error: None)
    await manager.create_task(give(1), name="a")
    manager.create_task(fail(ValueError("no")), name="a")
    await settle()
    info = manager.get_task_info("a")
    assert info is not None
    assert info.status is TaskStatus.FAILED
    assert manager.get_all_task_info()["a"] == info


async def test_snapshot_has_a_result_only_where_it_is_kept() -> None:
    """A completed start_task() has its result on its snapshot, before and after it is recorded."""
    manager = TaskManager()
    started, created = (
        await manager.start_task("started", give(1)),
        manager.create_task(give(1), name="created"),
    )
    assert not started.info().has_result
    await asyncio.wait([started, created])
    for info in (started.info(), manager.get_task_info("started")):
        assert info is not None
        assert info.has_result
        assert info.result == 1
        assert not any("result" in key for key in info.to_dict())
        assert "result" not in repr(info)
    for info in (created.info(), manager.get_task_info("created")):
        assert info is not None
        assert not info.has_result
        assert getattr(info, "result", None) is None
        with pytest.raises(AttributeError, match=r"of task 'created' \(completed\) has no result"):
            _ = info.result


def pickled(info: TaskInfo) -> TaskInfo:
    """A snapshot as another process gets it."""
    twin: TaskInfo = pickle.loads(pickle.dumps(info))  # noqa: S301  # it was made right here
    return twin


async def test_snapshot_survives_a_copy_and_a_pickle() -> None:
    """A copied or pickled snapshot is equal, and still says whether it has a result."""
    manager = TaskManager()
    for task in (await manager.start_task("a", give(1)), manager.create_task(give(1))):
        await asyncio.wait([task])
        info = task.info()
        for twin in (copy.deepcopy(info), pickled(info), replace(info)):
            assert twin == info
            assert twin.has_result == info.has_result


async def test_snapshot_is_frozen() -> None:
    """No field of a snapshot can be set, and it has no room for others."""
    info = TaskManager().create_task(give(1)).info()
    with pytest.raises(FrozenInstanceError):
        info.status = TaskStatus.FAILED  # type: ignore[misc]  # that is the test
    assert not hasattr(info, "__dict__")
    assert list(info.to_dict()) == [
        *(
            "id",
            "uid",
            "name",
            "group",
            "group_id",
            "priority",
            "status",
            "created_at",
            "started_at",
            "ended_at",
        ),
        *(
            "error_type",
            "error",
            "cause",
            "cancel_ignored",
            "progress",
            "metadata",
            "trace_id",
            "span_id",
            "attempt",
            "periodic",
            "consumer",
        ),
        "duration",
    ]
    await settle()


async def test_record_of_a_task_that_simply_returned_is_complete() -> None:
    """The short way for plain tasks remembers the same as the long one."""
    manager = TaskManager()

    async def work() -> None:
        await asyncio.sleep(2)

    plain = manager.create_task(work(), name="plain", group="g")
    told = manager.create_task(work(), name="told", group="g", metadata={})
    await asyncio.wait([plain, told])
    short, long = manager.get_task_info("plain"), manager.get_task_info("told")
    assert short is not None
    assert long is not None
    assert replace(short, id="told", name="told") == long
    assert short == plain.info()


async def test_cleanup_by_age_keeps_the_younger_ones() -> None:
    """cleanup_completed_tasks(max_age) forgets what ended longer ago."""
    manager = TaskManager()
    await manager.create_task(give(1), name="old")
    await asyncio.sleep(10)
    await manager.start_task("young", lambda: give(2))
    await asyncio.sleep(5)
    assert manager.cleanup_completed_tasks(20) == 0
    assert manager.cleanup_completed_tasks(float("inf")) == 0
    assert manager.cleanup_completed_tasks(7) == 1
    assert list(manager.get_all_task_info()) == ["young"]
    assert await manager.wait_for_task("young") == 2
    assert manager.cleanup_completed_tasks(0) == 1


def test_cleanup_before_the_first_task_does_nothing() -> None:
    """A manager without a loop has nothing to forget."""
    assert TaskManager().cleanup_completed_tasks(5) == 0


# -- exceptions that are kept ----------------------------------------------------------------------


class OwnOSError(OSError):
    def __init__(self, key: str, cause: OSError) -> None:
        self.key = key
        super().__init__(cause.errno, cause.strerror)


class Slotted(Exception):
    __slots__ = ("code", "unset")

    def __init__(self, code: int) -> None:
        self.code = code


class Uncopyable(Exception):
    def __new__(cls, first: int, second: int) -> Uncopyable:
        return super().__new__(cls, first)

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first}{second}")


def raised(error: E) -> E:
    try:
        raise error
    except type(error) as caught:
        return caught


def test_kept_exception_has_no_frames() -> None:
    """The copy has type, arguments and attributes, and no traceback; the original is not changed."""
    error = raised(LookupError("a", 1))
    error.add_note("a note")
    copy = without_frames(error)
    assert type(copy) is LookupError
    assert (copy.args, copy.__notes__) == (("a", 1), ["a note"])
    assert copy.__traceback__ is None
    assert error.__traceback__ is not None


def test_kept_builtin_exceptions_keep_their_attributes() -> None:
    """Built-in classes keep fields in C: they are set on the copy too."""
    decode = without_frames(raised(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")))
    assert str(decode) == "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"
    missing = without_frames(raised(FileNotFoundError(errno.ENOENT, "gone", "a.txt")))
    assert isinstance(missing, FileNotFoundError)
    assert (missing.errno, missing.filename) == (errno.ENOENT, "a.txt")


def test_kept_exceptions_of_the_users_are_not_constructed_again() -> None:
    """A class with arguments of its own, or slots, is copied without calling it."""
    own = without_frames(raised(OwnOSError("key", OSError(errno.ENOENT, "gone"))))
    assert isinstance(own, OwnOSError)
    assert (own.key, own.errno) == ("key", errno.ENOENT)
    slotted = without_frames(raised(Slotted(7)))
    assert isinstance(slotted, Slotted)
    assert slotted.code == 7


def test_kept_exception_group_is_copied_through() -> None:
    """The parts of a group lose their frames as well."""
    group = raised(ExceptionGroup("several", [raised(ValueError("a")), raised(LookupError("b"))]))
    copy = without_frames(group)
    assert isinstance(copy, ExceptionGroup)
    assert copy.message == "several"
    assert [repr(part) for part in copy.exceptions] == ["ValueError('a')", "LookupError('b')"]
    assert [part.__traceback__ for part in copy.exceptions] == [None, None]


def test_kept_exception_keeps_its_cause() -> None:
    """`raise ... from ...` is kept, without frames too."""
    error = ValueError("outer")
    error.__cause__ = raised(LookupError("inner"))
    copy = without_frames(raised(error))
    assert repr(copy.__cause__) == "LookupError('inner')"
    assert copy.__cause__ is not None
    assert copy.__cause__.__traceback__ is None
    assert copy.__suppress_context__ is True


def test_exception_that_cannot_be_copied_is_kept_itself() -> None:
    """Better with frames than not at all."""
    error = raised(Uncopyable(1, 2))
    assert without_frames(error) is error


# -- listeners -------------------------------------------------------------------------------------


async def test_listeners_see_the_life_of_a_task() -> None:
    """A listener sees created, cancelling and ended, each with a snapshot of that moment."""
    heard: list[tuple[str, str, TaskStatus]] = []
    manager = TaskManager()
    manager.add_listener(lambda event, info: heard.append((event, info.name, info.status)))
    task = manager.create_task(rest(), name="a")
    await settle()
    task.cancel()
    task.cancel()
    await settle()
    assert heard == [
        ("created", "a", TaskStatus.PENDING),
        ("cancelling", "a", TaskStatus.CANCELLING),
        ("ended", "a", TaskStatus.CANCELLED),
    ]


async def test_listeners_see_group_cancellations() -> None:
    """A cancellation by group reaches listeners like one by task, with its cause."""
    heard: list[CancelCause | None] = []
    manager = TaskManager()
    manager.create_task(rest(), group="g")
    await settle()
    manager.add_listener(lambda event, info: heard.append(info.cause))
    await manager.cancel_group("g")
    assert [cause and cause.kind for cause in heard] == [CancelKind.EXPLICIT, CancelKind.EXPLICIT]


async def test_removed_listener_hears_nothing() -> None:
    """remove_listener() takes back what add_listener() did; a stranger is an error."""
    heard: list[str] = []

    def listen(event: str, info: TaskInfo) -> None:
        heard.append(event)

    manager = TaskManager()
    manager.add_listener(listen)
    manager.remove_listener(listen)
    await manager.create_task(give(1))
    assert not heard
    with pytest.raises(ValueError, match=r" is not a listener of manager 'default'$"):
        manager.remove_listener(listen)


async def test_raising_listener_is_logged_once_and_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """A broken listener breaks neither the task nor the other listeners."""
    heard: list[str] = []

    def broken(event: str, info: TaskInfo) -> None:
        raise LookupError("broken")

    manager = TaskManager()
    manager.add_listener(broken)
    manager.add_listener(lambda event, info: heard.append(event))
    assert await manager.create_task(give(1)) == 1
    assert heard == ["created", "ended"]
    assert len(caplog.messages) == 1
    assert "raised and is dropped" in caplog.messages[0]


async def test_listener_may_remove_itself_and_raise() -> None:
    """A listener that has gone already is not removed twice."""
    manager = TaskManager()

    def once(event: str, info: TaskInfo) -> None:
        manager.remove_listener(once)
        raise LookupError("and broken")

    manager.add_listener(once)
    assert await manager.create_task(give(1)) == 1
    await settle()
    assert not manager._root.tasks


# -- broken telemetry ------------------------------------------------------------------------------


async def test_raising_exporter_breaks_no_task(caplog: pytest.LogCaptureFixture) -> None:
    """A span processor that raises is logged once; results, groups, and shutdown work as usual."""
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider

    class Broken(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            raise RuntimeError("broken")

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(Broken())
    manager = TaskManager(tracer_provider=provider)
    async with manager.group("load", span=True) as group:
        task = group.create_task(give(1))
    assert task.result() == 1
    assert not manager._ledger.scopes
    stubborn = manager.create_task(ignore_cancels(50))
    await settle()
    assert not (await manager.shutdown(0, 1)).clean
    await stubborn
    complaints = [message for message in caplog.messages if "not logged" in message]
    assert len(complaints) == 1


async def test_task_leaves_its_group_whatever_its_span_raises(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A span without any of a span's methods blocks no waiter and reaches no exception handler."""
    spans = SpanRecorder()
    manager = TaskManager(tracer_provider=spans.provider, meter_provider=spans.meter_provider)
    errors: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context["message"]))

    class Broken:
        def get_span_context(self) -> None:
            raise RuntimeError("broken")

    task = manager.create_task(give(1), group="g")
    span = task._span
    monkeypatch.setattr(task, "_span", Broken())
    assert await task == 1
    await manager.join()
    assert manager.stats().live == 0
    assert errors == []
    assert "telemetry of task 'give' raised; further ones are not logged" in caplog.messages
    assert span is not None
    span.end()


# -- loops and threads -----------------------------------------------------------------------------


def test_task_cannot_be_created_where_no_loop_runs() -> None:
    """Without a running loop create_task() raises, and closes the coroutine."""
    with pytest.raises(
        WrongThreadError,
        match=r"^manager 'mine' creates tasks in a running event loop, and none runs in this thread: "
        r"write create_task_threadsafe\(\.\.\.\), or call it from a coroutine$",
    ):
        TaskManager("mine").create_task(rest())
    gc.collect()


def test_task_cannot_be_created_between_two_runs_of_a_loop() -> None:
    """Between two calls of run_until_complete() no loop runs, even in the thread of the loop."""
    manager = TaskManager()

    async def create() -> str:
        return await manager.create_task(give("made"))

    with contextlib.closing(asyncio.new_event_loop()) as loop:
        assert [loop.run_until_complete(create()) for _ in range(3)] == ["made"] * 3
        with pytest.raises(WrongThreadError):
            manager.create_task(rest())
        assert loop.run_until_complete(create()) == "made"


async def test_loop_inside_a_running_loop_has_its_own_tasks() -> None:
    """In a loop that is run inside another one, as nest_asyncio allows, a task belongs to the inner one."""
    manager = TaskManager()
    outer = asyncio.get_running_loop()
    for _ in range(3):
        assert await manager.create_task(give("outer")) == "outer"
    await settle()

    async def create() -> str:
        return await manager.create_task(give("inner"))

    current = asyncio.current_task()
    assert current is not None
    with contextlib.closing(asyncio.new_event_loop()) as inner:
        # From Python 3.14 on, a thread has one current task, not one for each loop: no other can run in it.
        asyncio._leave_task(outer, current)
        asyncio._set_running_loop(None)
        try:
            assert inner.run_until_complete(create()) == "inner"
        finally:
            asyncio._set_running_loop(outer)
            asyncio._enter_task(outer, current)
    assert await manager.create_task(give("outer")) == "outer"


async def test_thread_without_hooks_for_generators_is_not_that_of_a_loop_without_them() -> None:
    """A loop that sets no hooks for asynchronous generators is told apart from no loop at all."""
    manager = TaskManager()
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(firstiter=None, finalizer=None)
    try:
        for _ in range(3):
            assert await manager.create_task(give("made")) == "made"
        with pytest.raises(WrongThreadError):
            await asyncio.to_thread(lambda: manager.create_task(rest()))
    finally:
        sys.set_asyncgen_hooks(*hooks)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this platform")
def test_child_of_a_fork_has_no_running_loop() -> None:
    """After a fork in a coroutine, the child can create tasks only in a loop of its own."""
    script = """
        import asyncio, os, sys
        from otel_tasks import TaskManager, WrongThreadError

        manager = TaskManager()

        async def work():
            pass

        async def create():
            for _ in range(3):
                await manager.create_task(work())
            await asyncio.sleep(0)

        async def fork():
            await create()
            if os.fork():
                sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
            coro = work()
            try:
                manager.create_task(coro)
            except WrongThreadError:
                asyncio.run(create())
                os._exit(7)
            os._exit(1)

        asyncio.run(fork())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, ""), done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this platform")
def test_child_of_a_fork_is_told_that_the_tasks_are_its_parents() -> None:
    """It can neither run them nor hand work over to their loop."""
    script = """
        import asyncio, os, sys
        from otel_tasks import TaskManager, WrongLoopError

        manager = TaskManager("mine")

        async def create():
            await manager.create_task(asyncio.sleep(0))

        async def fork():
            task = manager.create_task(asyncio.sleep(0.01))
            await asyncio.sleep(0)
            if pid := os.fork():
                await task
                sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            asyncio.set_event_loop(None)
            try:
                asyncio.run(create())
            except WrongLoopError as error:
                print(error, flush=True)
                asyncio.run(own(TaskManager("own")))
                os._exit(7)
            os._exit(1)

        async def own(manager):
            await manager.create_task(asyncio.sleep(0))

        asyncio.run(fork())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (
        7,
        "manager 'mine' has 1 live task in the process that forked this one: "
        "use a TaskManager of its own here, "
        "or start the process with multiprocessing's spawn\n",
    ), done.stderr


async def test_task_cannot_be_created_from_another_thread() -> None:
    """A thread of its own has no running loop."""
    manager = TaskManager()
    errors: list[type[BaseException]] = []

    def work() -> None:
        try:
            manager.create_task(rest())
        except WrongThreadError as error:
            errors.append(type(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == [WrongThreadError]
    gc.collect()


def test_manager_with_live_tasks_refuses_another_loop() -> None:
    """Tasks live in one loop: from another one nothing may be created, waited for or cancelled."""
    manager = TaskManager("mine")
    first = VirtualClockLoop()
    message = (
        r"^manager 'mine' has 1 live task in another event loop: "
        r"use one TaskManager per loop, hand the work over with create_task_threadsafe\(\.\.\.\), "
        r"or shut it down there first$"
    )

    async def use() -> None:
        task = manager.create_task(rest(), name="a")
        await settle()
        del task

    async def misuse() -> None:
        with pytest.raises(WrongLoopError, match=message):
            manager.create_task(rest())
        for refused in (
            manager.wait_for_task("a"),
            manager.cancel_task("a"),
            manager.cancel_all_tasks(),
            manager.join(),
            manager.shutdown(),
        ):
            with pytest.raises(WrongLoopError, match=message):
                await refused

    first.run_until_complete(use())
    run(misuse())
    assert manager.get_task("a").cancelling() == 0
    first.run_until_complete(manager.shutdown(0))
    first.close()
    gc.collect()


def test_clock_that_was_put_onto_the_loop_is_the_tasks_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop whose time() was replaced, on the object alone, gives a task its times."""

    async def main() -> None:
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: 5.0)
        task = TaskManager().create_task(give(1))
        assert task.info().created_at == 5.0
        await task
        monkeypatch.undo()

    asyncio.run(main())


def test_manager_without_live_tasks_binds_to_a_new_loop() -> None:
    """A manager can be used in one asyncio.run() after the other."""
    manager = TaskManager()

    async def use() -> int:
        return await manager.create_task(give(1))

    assert [run(use()), run(use())] == [1, 1]
    assert manager.stats().completed == 2


async def test_counters_are_ready_for_json() -> None:
    """to_dict() has each counter under its name."""
    manager = TaskManager()
    await manager.create_task(give(1))
    counters = manager.stats().to_dict()
    assert json.loads(json.dumps(counters)) == {
        "created": 1,
        "live": 0,
        "completed": 1,
        "failed": 0,
        "cancelled": 0,
        "cancel_ignored": 0,
        "queued": 0,
        "remembered": 1,
    }


def leave_behind(manager: TaskManager, *, in_block: bool = False) -> None:
    """Close a loop under a live task, without any clean-up."""

    async def block() -> None:
        async with manager.group("block") as group:
            group.create_task(rest(), name="lost")

    async def use() -> None:
        hold = asyncio.create_task(block()) if in_block else manager.create_task(rest(), name="lost")
        await settle()
        del hold

    loop = VirtualClockLoop()
    loop.run_until_complete(use())
    loop.close()


@pytest.fixture
def destroyed_tasks_are_expected() -> Any:
    """Collect what was left behind: asyncio says that it is destroyed while pending."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


@pytest.mark.usefixtures("destroyed_tasks_are_expected")
@pytest.mark.parametrize("in_block", [False, True])
def test_tasks_of_a_closed_loop_are_let_go(
    in_block: bool, spans: SpanRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    """A loop that was closed under live tasks does not block the manager; they count as failed."""
    manager = TaskManager(tracer_provider=spans.provider)
    leave_behind(manager, in_block=in_block)

    async def use() -> int:
        return await manager.create_task(give(1))

    assert run(use()) == 1
    assert counters(manager) == {"created": 2, "completed": 1, "failed": 1, "remembered": 1}
    # asyncio says so too of a task that is collected early.
    [message] = [record.getMessage() for record in caplog.records if record.name == "otel_tasks"]
    assert message.startswith(
        "manager 'default' was not shut down before its event loop ended, and lost group "
    )
    assert not manager._ledger.scopes
    assert not manager._ledger.hosts


@pytest.mark.usefixtures("destroyed_tasks_are_expected")
def test_shutdown_in_a_new_loop_releases_a_closed_ones_tasks() -> None:
    """shutdown() and the rest do not touch tasks that can never end."""
    manager = TaskManager()
    leave_behind(manager)
    report = run(manager.shutdown())
    assert report.clean
    assert manager.stats().live == 0


async def test_closed_manager_refuses_tasks() -> None:
    """After shutdown() a task is refused, its coroutine closed, its factory not called."""
    manager = TaskManager("mine")
    await manager.shutdown()
    message = (
        r"^manager 'mine' was shut down by shutdown\(\) in test_closed_manager_refuses_tasks "
        r"tests/test_ledger\.py:\d+ and takes no new tasks in this event loop: "
        r"create them before that, or open it again with async with$"
    )
    with pytest.raises(ManagerClosedError, match=message):
        manager.create_task(rest())
    with pytest.raises(ManagerClosedError, match=message):
        await manager.start_task("a", lambda: pytest.fail("called"))
    with pytest.raises(ManagerClosedError, match=message):
        async with manager.group("load"):
            raise AssertionError("unreachable")
    gc.collect()


async def test_one_pass_cancels_each_task_once() -> None:
    """One pass cancels all, and tells how many were newly asked."""
    manager = TaskManager()
    tasks = [manager.create_task(rest()) for _ in range(3)]
    tasks[0].cancel()
    assert request_cancel_all(tasks, CancelCause(CancelKind.SHUTDOWN)) == 2
    assert [task.cancelling() for task in tasks] == [1, 1, 1]
    await asyncio.wait(tasks)


async def test_requested_cancellation_before_the_first_step_is_not_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A task that another one cancels before it starts is nothing unusual."""
    async with TaskManager() as manager:
        task = manager.create_task(give(1))
        task.cancel()
        manager.create_task(give(1), group="jobs")
        await manager.cancel_group("jobs")
    assert caplog.records == []
