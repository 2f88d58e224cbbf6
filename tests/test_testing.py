"""The tools for tests, tested: the virtual clock, the fake connection, the recorder of spans."""

from __future__ import annotations

import asyncio
import doctest
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

import anyio.to_thread
import pytest

from otel_tasks import TaskManager
from otel_tasks.testing import (
    DeadlockError,
    FakeConnection,
    SpanRecorder,
    VirtualClockLoop,
    assert_no_tasks_left,
    clock,
    connection,
    run,
)
from otel_tasks.testing import spans as spans_module
from tests.blocks import run_pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

T = TypeVar("T")


def test_sleeping_costs_no_time() -> None:
    """Ten minutes pass at once, and the loop's clock shows them."""

    async def main() -> float:
        begin = asyncio.get_running_loop().time()
        await asyncio.sleep(600)
        return asyncio.get_running_loop().time() - begin

    began = time.monotonic()
    assert run(main()) == pytest.approx(600)
    assert time.monotonic() - began < 300


def test_timers_run_in_their_order() -> None:
    """Virtual time stops at each timer on its way."""

    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        begin, seen = loop.time(), []
        for delay in (3, 1, 2):
            loop.call_later(delay, lambda: seen.append(loop.time() - begin))
        await asyncio.sleep(4)
        return seen

    assert run(main()) == pytest.approx([1, 2, 3])


def test_waiting_forever_fails_with_names() -> None:
    """A test that would hang names the tasks that wait, and the calls in which they do."""

    async def forever() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        await asyncio.create_task(forever(), name="the culprit")

    with pytest.raises(DeadlockError, match=r"every task waits and no timer is set") as caught:
        run(main())
    assert "the culprit" in str(caught.value)
    assert "forever > Event.wait at" in str(caught.value)


def test_waking_again_and_again_is_bounded() -> None:
    """A loop of sleeps ends at the virtual time limit."""

    async def heartbeat() -> None:
        while True:  # noqa: ASYNC110  # the test is about such a loop
            await asyncio.sleep(1)

    with pytest.raises(TimeoutError, match=r"passed the limit of 50 s(.|\n)*heartbeat"):
        run(heartbeat(), timeout=50)


def test_tasks_left_behind_are_cancelled() -> None:
    """As in asyncio.run, what the coroutine leaves is cancelled and may clean up, also after a deadlock."""
    ended = []

    async def work() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(1)
            ended.append(True)

    async def main() -> list[asyncio.Task[None]]:
        tasks = [asyncio.create_task(work())]
        await asyncio.sleep(0)
        return tasks

    run(main(), timeout=10)
    assert ended == [True]


def test_thread_is_waited_for_really() -> None:
    """While a thread works the clock does not jump over its result."""

    async def main() -> tuple[str, float]:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        async with asyncio.timeout(60):
            result = await asyncio.to_thread(slowly, "done")
        return result, loop.time() - begin

    result, passed = run(main())
    assert result == "done"
    # Nothing passes where the thread is done before the loop waits for it.
    assert passed < 30


def test_anyio_thread_is_waited_for_really() -> None:
    """The threads of `def` endpoints, which are anyio's, are known too."""

    async def main() -> tuple[list[int], float]:
        loop = asyncio.get_running_loop()
        begin, numbers = loop.time(), []
        async with asyncio.timeout(60):
            for _ in range(2):
                numbers.append(await anyio.to_thread.run_sync(slowly, 7))
        return numbers, loop.time() - begin

    numbers, passed = run(main())
    assert numbers == [7, 7]
    assert passed < 30


def test_thread_that_has_just_woken_the_loop_and_ended_is_no_deadlock() -> None:
    """Between the look for events and the look for threads it may have done both."""

    async def wait() -> str:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualClockLoop)
        answer: asyncio.Future[str] = loop.create_future()

        def look() -> bool:
            if not answer.done():
                loop.call_soon_threadsafe(answer.set_result, "told")
            return False

        loop._a_thread_works = look  # type: ignore[method-assign]  # the moment in question
        return await answer

    assert run(wait()) == "told"


def test_thread_of_a_task_is_waited_for_really() -> None:
    """Those of `run_in_thread` are threads of their own."""

    async def wait() -> tuple[str, float]:
        loop = asyncio.get_running_loop()
        before = loop.time()
        async with TaskManager() as manager:
            result = await manager.run_in_thread(slowly, "done")
        return result, loop.time() - before

    result, seconds = run(wait())
    assert result == "done"
    assert 0 < seconds < 10


def test_thread_that_waits_for_a_timer_is_no_deadlock() -> None:
    """Timers run at the real pace while a thread waits for one of them."""

    async def main() -> bool:
        event = threading.Event()
        asyncio.get_running_loop().call_later(0.05, event.set)
        return await asyncio.to_thread(event.wait, 10)

    assert run(main())


@pytest.mark.parametrize("wakes", [True, False])
def test_socket_may_wake_a_loop_without_timers(wakes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a socket registered, the loop waits in real time, but not forever."""
    if not wakes:
        monkeypatch.setattr("otel_tasks.testing.clock._JumpingSelector.REAL_PATIENCE", 0.2)

    async def main() -> bytes:
        import socket

        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            if wakes:
                threading.Timer(0.05, theirs.send, [b"x"]).start()
            return await asyncio.get_running_loop().sock_recv(ours, 1)

    if wakes:
        assert run(main()) == b"x"
    else:
        with pytest.raises(DeadlockError):
            run(main())


def test_clock_starts_away_from_zero() -> None:
    """A time of 0 would be falsy, which a real loop's never is."""
    loop = VirtualClockLoop()
    try:
        assert loop.time() == 1000
    finally:
        loop.close()


async def test_tasks_left_are_named() -> None:
    """The check after each test says which task was left, and where it waits."""
    task = asyncio.create_task(asyncio.sleep(60), name="stray")
    with pytest.raises(AssertionError, match="1 task\\(s\\) left:\n  stray: "):
        await assert_no_tasks_left()
    task.cancel()
    await assert_no_tasks_left()


async def test_fixture_fails_a_test_that_leaves_a_task() -> None:
    """A test is failed for a task that it left, and for its own reason first."""
    from tests.conftest import _leaving_no_task  # type: ignore[import-not-found,unused-ignore]  # found by pytest

    strays = []

    async def leaves() -> None:
        strays.append(asyncio.create_task(asyncio.sleep(60)))

    async def fails() -> None:
        await leaves()
        raise KeyError("its own")

    with pytest.raises(AssertionError, match="left"):
        await _leaving_no_task(leaves())
    with pytest.raises(KeyError):
        await _leaving_no_task(fails())
    for stray in strays:
        stray.cancel()


def slowly(value: T) -> T:
    """The work of a thread."""
    time.sleep(0.03)
    return value


# --- FakeConnection ----------------------------------------------------------------------------------


async def test_connection_delivers_the_body_and_then_waits() -> None:
    """One message per chunk; after the last, receive() waits for the client to leave, and repeats that."""
    connection = FakeConnection(body=[b"a", b"b"])
    first, second = await connection.receive(), await connection.receive()
    assert (first["body"], first["more_body"], second["body"], second["more_body"]) == (
        b"a",
        True,
        b"b",
        False,
    )
    waiting = asyncio.ensure_future(connection.receive())
    await asyncio.sleep(1)
    assert not waiting.done()
    connection.disconnect()
    assert await waiting == {"type": "http.disconnect"}
    assert await connection.receive() == {"type": "http.disconnect"}
    assert (connection.received, connection.max_readers, connection.readers) == (4, 1, 0)


async def test_connection_says_disconnect_after_the_response() -> None:
    """As on all servers, the end of the response shows as a disconnect."""
    connection = FakeConnection()
    await connection.send({"type": "http.response.start", "status": 201, "headers": [(b"X-Id", b"7")]})
    assert not connection.complete
    await connection.send({"type": "http.response.body", "body": b"x"})
    assert connection.complete
    assert await connection.receive() == {"type": "http.disconnect"}
    assert (connection.status, connection.body, connection.headers) == (201, b"x", {"x-id": "7"})


async def test_connection_counts_readers() -> None:
    """Two calls of receive() at once are noticed."""
    connection = FakeConnection(body=None)
    readers = [asyncio.ensure_future(connection.receive()) for _ in range(2)]
    await asyncio.sleep(0)
    assert connection.max_readers == 2
    connection.disconnect()
    await asyncio.gather(*readers)


async def test_connection_with_backpressure() -> None:
    """send() waits for a client that does not read, until it reads or leaves."""
    connection = FakeConnection()
    for go_on in (connection.resume, connection.disconnect):
        connection.pause()
        sending = asyncio.ensure_future(connection.send({"type": "http.response.start", "status": 200}))
        await asyncio.sleep(1)
        assert not sending.done()
        go_on()
        await sending


@pytest.mark.parametrize("quirk", ["send_raises_after_disconnect", "send_hangs_after_disconnect", ""])
async def test_connection_after_the_disconnect(quirk: str) -> None:
    """A late send is noted, and dropped, refused or never returned from."""
    options: dict[str, Any] = {quirk: True} if quirk else {}
    connection = FakeConnection(**options)
    connection.disconnect()
    sending = asyncio.ensure_future(connection.send({"type": "http.response.start", "status": 200}))
    await asyncio.wait([sending], timeout=10)
    assert sending.done() == (quirk != "send_hangs_after_disconnect")
    assert len(connection.sent_late) == 1
    if quirk == "send_raises_after_disconnect":
        assert isinstance(sending.exception(), OSError)
    sending.cancel()


async def test_connection_that_answers_inside_the_final_send() -> None:
    """The reader is woken before the last send() returns."""
    connection = FakeConnection(body=None, disconnect_inside_final_send=True)
    reader = asyncio.ensure_future(connection.receive())
    await asyncio.sleep(0)
    await connection.send({"type": "http.response.start", "status": 200})
    await connection.send({"type": "http.response.body"})
    assert reader.done()


async def test_connection_as_websocket() -> None:
    """connect first, then what is fed, then disconnect with its code."""
    connection = FakeConnection.websocket("/ws")
    connection.feed("text")
    connection.feed(b"bytes")
    messages = [await connection.receive() for _ in range(3)]
    connection.disconnect(code=1006)
    messages.append(await connection.receive())
    assert [message["type"] for message in messages] == [
        "websocket.connect",
        "websocket.receive",
        "websocket.receive",
        "websocket.disconnect",
    ]
    assert (messages[1]["text"], messages[2]["bytes"], messages[3]["code"]) == ("text", b"bytes", 1006)
    assert connection.scope["type"] == "websocket"
    assert "method" not in connection.scope


# --- SpanRecorder --------------------------------------------------------------------------------------


def test_recorder_finds_spans_and_their_children(spans: SpanRecorder) -> None:
    """Finished spans are found by name, with ids that are the same in each run."""
    tracer = spans.provider.get_tracer("test")
    with tracer.start_as_current_span("parent") as parent:
        open_ones = spans.open
        with tracer.start_as_current_span("child"):
            pass
    assert [span.name for span in open_ones] == ["parent"]
    assert parent.get_span_context().span_id == 1
    assert spans.names == ["child", "parent"]
    assert spans.children(spans.span("parent")) == [spans.span("child")]
    assert len(spans.finished) == 2
    spans.clear()
    assert spans.finished == ()


def test_recorder_lists_its_spans_when_one_is_missing(spans: SpanRecorder) -> None:
    """A wrong name is answered with the right ones."""
    with spans.provider.get_tracer("test").start_as_current_span("work"):
        pass
    with pytest.raises(LookupError, match=r"0 finished spans are named 'wrok'; finished: \['work'\]"):
        spans.span("wrok")


def test_recorder_fails_for_a_span_that_never_ended() -> None:
    """check() names the open spans."""
    with SpanRecorder() as spans:
        spans.provider.get_tracer("test").start_span("lost")
        with pytest.raises(AssertionError, match=r"never ended: \['lost'\]"):
            spans.check()


def test_recorder_fails_for_a_span_that_ended_twice() -> None:
    """The SDK merely logs it, which check() reports."""
    with SpanRecorder() as spans:
        span = spans.provider.get_tracer("test").start_span("twice")
        span.end()
        span.end()
        with pytest.raises(AssertionError, match="ended span"):
            spans.check()


def test_recorder_collects_metrics(spans: SpanRecorder) -> None:
    """Data points are found by the metric's name."""
    assert spans.metrics() == {}
    spans.meter_provider.get_meter("test").create_counter("hits").add(3)
    assert [point.value for point in spans.metrics()["hits"]] == [3]


def test_recorder_names_the_extra_it_needs() -> None:
    """Without the SDK, the rest of the module works; only the recorder says what is missing."""
    script = (
        "import sys\n"
        "sys.modules['opentelemetry.sdk.trace'] = sys.modules['opentelemetry.sdk.metrics'] = None\n"
        "from otel_tasks.testing import FakeConnection, SpanRecorder, run\n"
        "try:\n    SpanRecorder()\n"
        "except ImportError as error:\n    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "otel-tasks[otlp]" in result.stdout


# --- the pytest plugin ---------------------------------------------------------------------------------

USES_BOTH_FIXTURES = """
import asyncio, sys, time

def test_clock(virtual_clock):
    assert "opentelemetry.sdk" not in sys.modules
    begin = time.monotonic()
    assert virtual_clock(asyncio.sleep(600, "done")) == "done"
    assert time.monotonic() - begin < 300

def test_spans(spans):
    with spans.provider.get_tracer("test").start_as_current_span("work"):
        pass
    assert spans.names == ["work"]
"""


def test_plugin_is_loaded_where_the_library_is_installed(tmp_path: Path) -> None:
    """Its entry point is found; loading it imports no SDK, gives no warning, and adds both fixtures."""
    assert "2 passed" in run_pytest(tmp_path, USES_BOTH_FIXTURES)


def test_plugin_can_be_switched_off(tmp_path: Path) -> None:
    """With `-p no:otel_tasks`, nothing of it is there."""
    report = run_pytest(tmp_path, USES_BOTH_FIXTURES, "-p", "no:otel_tasks")
    assert "fixture 'virtual_clock' not found" in report
    assert "2 errors" in report


def test_plugins_recorder_is_checked_at_the_end_of_the_test(tmp_path: Path) -> None:
    """A span that never ended fails the test that left it."""
    code = "def test_it(spans):\n    spans.provider.get_tracer('test').start_span('work')\n"
    report = run_pytest(tmp_path, code)
    assert "1 passed, 1 error" in report
    assert "spans never ended: ['work']" in report


def test_fixture_of_a_project_takes_the_place_of_the_plugins(tmp_path: Path) -> None:
    """A `spans` fixture in a conftest.py is the project's own."""
    (tmp_path / "conftest.py").write_text(
        "import pytest\n\n@pytest.fixture\ndef spans():\n    return 'mine'\n"
    )
    assert "1 passed" in run_pytest(tmp_path, "def test_it(spans):\n    assert spans == 'mine'\n")


def test_without_the_sdk_tests_with_spans_are_skipped(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The reason says what to install."""
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(pytest.skip.Exception, match=r"pip install 'otel-tasks\[otlp\]'"):
        request.getfixturevalue("spans")


def test_clock_fixture_runs_a_coroutine(virtual_clock: Callable[..., Any]) -> None:
    """It is `run()`, with its bound."""
    assert virtual_clock(asyncio.sleep(600, "done")) == "done"
    with pytest.raises(TimeoutError):
        virtual_clock(asyncio.sleep(600), timeout=1)


@pytest.mark.parametrize("module", [clock, connection, spans_module])
def test_examples_in_the_docstrings_run(module: ModuleType) -> None:
    """Each module's examples do what they show."""
    results = doctest.testmod(module, extraglobs={"run": run})
    assert (results.failed, results.attempted > 0) == (0, True)
