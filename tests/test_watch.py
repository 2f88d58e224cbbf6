"""`manager.watch()`: warnings about tasks in trouble, while they live."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import re
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks import TaskManager, WrongThreadError, create_task
from otel_tasks._core import watch, watchdog
from otel_tasks._core.inspection import request_of
from otel_tasks._core.watch import HealthScan
from otel_tasks._core.watchdog import Watchdog
from otel_tasks.asgi import TaskGroupMiddleware
from otel_tasks.testing import FakeConnection, run
from tests.helpers import give, ignore_cancels, rest, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

PATIENCE = 60.0
"""Real seconds after which a test gives up."""


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    """The log lines, with N for each number."""
    return [
        re.sub(r"\.py:\d+", ".py:N", record.getMessage())
        for record in caplog.records
        if record.levelno == level
    ]


# -- by the loop's timer ----------------------------------------------------------------------------


async def test_task_that_ignores_its_cancellation_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """A task that keeps running after its cancel request is named with its cause and line, once."""
    async with TaskManager() as manager:
        with manager.watch(held=None, ignored=5):
            task = manager.create_task(ignore_cancels(60), name="stubborn", group="jobs")
            await asyncio.sleep(1)
            task.cancel("enough")
            await asyncio.sleep(4.9)
            assert lines(caplog) == []
            await asyncio.sleep(50)
            (line,) = lines(caplog)
            assert re.fullmatch(
                r"task 'stubborn' still runs [5-7]\.\ds after its cancellation was requested "
                r"\(explicit: enough\); it is at ignore_cancels tests/helpers\.py:N > sleep",
                line,
            )
            facts: Any = caplog.records[0].__dict__["otel_tasks"]
            assert (facts["task_id"], facts["task_group"]) == ("stubborn", "jobs")
            await task


async def test_task_that_ends_in_time_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A task that takes a while to clean up, or ends after all, is not logged."""

    async def cleans_up() -> None:
        try:
            await rest()
        finally:
            await asyncio.sleep(3)

    async with TaskManager() as manager:
        with manager.watch(held=None, ignored=5):
            task = manager.create_task(cleans_up())
            await settle()
            task.cancel()
            await asyncio.sleep(20)
    assert lines(caplog) == []


async def test_withdrawn_cancellation_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A task that its own timeout cancelled, and that continues, has not ignored anything."""

    async def times_out() -> None:
        try:
            async with asyncio.timeout(1):
                await rest()
        except TimeoutError:
            await asyncio.sleep(50)

    async with TaskManager() as manager:
        with manager.watch(held=None, ignored=1, unstarted=None, outlived=None):
            await manager.create_task(times_out())
    assert lines(caplog) == []


async def test_task_that_never_starts_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A task that has to wait for another one that does not end is named with that one."""
    async with TaskManager() as manager:
        with manager.watch(held=None, ignored=None, unstarted=10):
            manager.create_task(ignore_cancels(60), name="old")
            await settle()
            task = manager.create_task(give(1), name="old", on_conflict="replace")
            await asyncio.sleep(9)
            assert lines(caplog) == []
            await asyncio.sleep(30)
            (line,) = lines(caplog)
            assert re.fullmatch(
                r"task 'old' was created 1\d\.\ds ago and has not started: it waits until '\S+' has ended",
                line,
            )
            await task


async def test_queue_is_no_trouble(caplog: pytest.LogCaptureFixture) -> None:
    """A task that waits for a place under a limit is where it belongs."""
    async with TaskManager(max_concurrency=1) as manager:
        with manager.watch(held=None):
            manager.create_task(asyncio.sleep(50))
            await manager.create_task(give(1))
    assert lines(caplog) == []


async def test_many_at_once_are_logged_in_few_lines(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many tasks in the same trouble, ten are named and the others counted; none is logged twice."""
    # So that a look takes several turns.
    monkeypatch.setattr(watch, "_BATCH", 5)
    async with TaskManager() as manager:
        with manager.watch(held=None, ignored=5, unstarted=5):
            async with manager.group("block") as block:
                for number in range(13):
                    manager.create_task(ignore_cancels(30), name=f"stubborn-{number}")
                block.create_task(ignore_cancels(30))
                await settle()
                for number in range(12):
                    manager.create_task(give(1), name=f"stubborn-{number}", on_conflict="replace")
                await asyncio.sleep(25)
    found = lines(caplog)
    asked = [line for line in found if "its cancellation was requested" in line]
    created = [line for line in found if "has not started" in line]
    assert (len(asked), len(created)) == (10, 10)
    assert "2 more tasks still run after their cancellation was requested" in found
    assert "2 more tasks have not started" in found
    (record, *_) = [record for record in caplog.records if "2 more" in record.getMessage()]
    assert len(record.__dict__["otel_tasks"]["task_ids"]) == 2


async def test_end_of_the_block_ends_the_looking(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the block, nothing is logged and no timer is left, even if it ends during a scan."""
    monkeypatch.setattr(watch, "_BATCH", 1)
    async with TaskManager() as manager:
        for number in range(10):
            manager.create_task(ignore_cancels(30), name=f"stubborn-{number}")
        await settle()
        for task in manager.get_group("root").tasks:
            task.cancel()
        watching = manager.watch(held=None, ignored=2, unstarted=None, outlived=None)
        # The scan at 2 s takes 11 turns.
        await asyncio.sleep(2)
        watching.close()
        watching.close()
        await asyncio.sleep(20)
        assert lines(caplog) == []


def test_manager_that_goes_to_another_loop_is_left(caplog: pytest.LogCaptureFixture) -> None:
    """A watch ends with the loop it was started for."""
    manager = TaskManager()
    scans: list[HealthScan] = []

    async def first() -> None:
        manager.watch(held=None, ignored=1)

    async def second() -> None:
        scan = HealthScan(manager._ledger, asyncio.get_running_loop(), 1.0, None, None)
        scans.append(scan)
        manager._ledger.home.loop = None
        scan._scan_batch(iter(()), [[]])
        assert not hasattr(scan, "_handle")

    run(first())
    run(second())
    assert lines(caplog) == []


async def test_looking_for_nothing_does_nothing() -> None:
    """With all kinds left out, there is neither a timer nor a thread."""
    threads = threading.active_count()
    async with TaskManager() as manager:
        with manager.watch(held=None, ignored=None, unstarted=float("inf"), outlived=None):
            assert threading.active_count() == threads
            # Were there a timer, the clock would not have to jump so far.
            await asyncio.sleep(3000)


async def test_looking_keeps_no_task(caplog: pytest.LogCaptureFixture) -> None:
    """A logged task is freed when it has ended."""
    async with TaskManager() as manager:
        with manager.watch(held=None, ignored=1):
            task = manager.create_task(ignore_cancels(10))
            await settle()
            task.cancel()
            await task
            gone = weakref.ref(task)
            del task
            await asyncio.sleep(5)
            gc.collect()
            assert gone() is None
    assert len(lines(caplog)) == 2


class Told(asyncio.Task[Any]):
    """A plain task that tells its context, as those of Python 3.12 do."""

    def __init__(
        self, coro: Coroutine[Any, Any, Any], *, context: contextvars.Context, **options: Any
    ) -> None:
        super().__init__(coro, context=context, **options)
        self.told_context = context

    def get_context(self) -> contextvars.Context:
        return self.told_context


def started_here(coro: Coroutine[Any, Any, Any], name: str = "stray") -> asyncio.Task[Any]:
    """Start a plain task whose context can be asked for in every Python."""
    return Told(coro, context=contextvars.copy_context(), loop=asyncio.get_running_loop(), name=name)


async def test_plain_task_that_outlives_its_request_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A task of `asyncio.create_task` in a handler is named with the request, once for its function."""
    manager = TaskManager()
    strays: list[asyncio.Task[Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        strays.append(started_here(rest(), f"stray-{len(strays)}"))
        # In the group, in another one, in a managed task of another one: all of them the user's intention.
        create_task(rest())
        manager.create_task(rest(), group="outbox")
        manager.create_task(starts_one(), group="outbox")

    async def starts_one() -> None:
        strays.append(started_here(rest(), "legal"))

    with manager.watch(held=None, outlived=10):
        for _ in range(2):
            await FakeConnection().run(TaskGroupMiddleware(app, manager=manager))
        await asyncio.sleep(9)
        assert lines(caplog) == []
        await asyncio.sleep(30)
    (line,) = lines(caplog)
    assert re.fullmatch(
        r"asyncio task 'stray-[02]' \(rest\) was started in request 'GET' and still runs 1\d\.\ds after "
        r"the request ended; it is at rest tests/helpers\.py:N > sleep; "
        r"create_task\(\) would have ended it with the request",
        line,
    )
    for task in strays:
        task.cancel()
    await asyncio.wait(strays)
    await manager.shutdown(grace=0)


async def test_plain_task_of_a_running_request_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """While the request lasts, its plain tasks are no trouble."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        task = started_here(rest())
        await asyncio.sleep(60)
        task.cancel()

    manager = TaskManager()
    with manager.watch(held=None, outlived=1):
        await FakeConnection().run(TaskGroupMiddleware(app, manager=manager))
    assert lines(caplog) == []


async def test_very_many_tasks_are_not_searched_for_plain_ones(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If asyncio had to go through too many tasks at once, plain ones are not looked for."""
    monkeypatch.setattr(watch, "_MAX_LIVE", 0)
    manager = TaskManager()
    strays: list[asyncio.Task[Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        strays.append(started_here(rest()))

    with manager.watch(held=None, outlived=1):
        work = manager.create_task(rest())
        await FakeConnection().run(TaskGroupMiddleware(app, manager=manager))
        await asyncio.sleep(30)
    assert lines(caplog) == []
    for task in (*strays, work):
        task.cancel()
    await asyncio.wait([*strays, work])


@pytest.mark.skipif(
    sys.version_info < (3, 12), reason="asyncio's tasks do not tell their context before 3.12"
)
async def test_task_of_asyncio_shows_its_request() -> None:
    """On Python 3.12, any plain task that was started in a request is recognized."""
    found: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        task = asyncio.create_task(rest())
        found.append(request_of(task))
        task.cancel()

    await FakeConnection().run(TaskGroupMiddleware(app, manager=TaskManager()))
    assert found[0].closed is True
    assert found[0].name == "GET"


# -- by the thread ----------------------------------------------------------------------------------


def spin_until(happened: Callable[[], object]) -> None:
    """Hold the loop until something is so, for a bounded time."""
    end = time.monotonic() + PATIENCE
    while not happened() and time.monotonic() < end:
        pass


@pytest.mark.real_clock
async def test_task_that_blocks_the_loop_is_logged_meanwhile(caplog: pytest.LogCaptureFixture) -> None:
    """The warning comes while the task spins, with its line; one about the end follows."""
    caplog.set_level(logging.INFO, "otel_tasks")

    async def spins() -> None:
        spin_until(lambda: about("'spins'"))

    def about(whom: str, level: int = logging.WARNING) -> list[str]:
        # On a busy machine others may be slow as well.
        return [line for line in lines(caplog, level) if whom in line]

    async with TaskManager() as manager:
        with manager.watch(held=0.02, ignored=None, unstarted=None, outlived=None):
            await manager.create_task(spins(), name="spins")
            await until(lambda: about("'spins'", logging.INFO))
    (line,) = about("'spins'")
    assert re.match(r"task 'spins' has held the event loop for more than 20ms; it is at ", line)
    assert "tests/test_watch.py:N" in line
    (record,) = [record for record in caplog.records if record.getMessage().startswith("task 'spins'")]
    assert record.__dict__["otel_tasks"]["task_name"] == "spins"
    (end,) = about("'spins'", logging.INFO)
    assert re.fullmatch(r"the event loop runs again: it was held for \S+s by task 'spins'", end)


@pytest.mark.real_clock
@pytest.mark.parametrize("call", ["call_soon", "call_soon_threadsafe"])
async def test_callback_that_blocks_the_loop_is_logged(call: str, caplog: pytest.LogCaptureFixture) -> None:
    """A callback has no task, but a line; below one from a thread Python 3.14 has a frame more."""

    def spins() -> None:
        spin_until(told)

    def told() -> list[str]:
        return [line for line in lines(caplog) if line.startswith("a callback has held the event loop")]

    async with TaskManager() as manager:
        before = set(threading.enumerate())
        with manager.watch(held=0.02, ignored=None, unstarted=None, outlived=None):
            (dog,) = set(threading.enumerate()) - before
            assert isinstance(dog, Watchdog)
            # It has had an answer, and so knows what is below a callback.
            await until(lambda: dog._caller)
            getattr(asyncio.get_running_loop(), call)(spins)
            await until(told)
    assert "for more than 20ms; it is at " in told()[0]


@pytest.mark.real_clock
async def test_handler_that_blocks_the_loop_is_logged_with_its_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """For a plain task, such as a server's, the request is named as well."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        spin_until(told)

    def told() -> list[str]:
        return [line for line in lines(caplog) if " of request " in line]

    def make(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> Told:
        context = options.pop("context", None) or contextvars.copy_context()
        return Told(coro, context=context, loop=loop, **options)

    async with TaskManager() as manager:
        with manager.watch(held=0.02, ignored=None, unstarted=None, outlived=None):
            asyncio.get_running_loop().set_task_factory(make)
            await asyncio.create_task(FakeConnection().run(TaskGroupMiddleware(app, manager=manager)))
    assert re.match(r"task '\S+' of request 'GET' has held the event loop for more than 20ms", told()[0])


@pytest.mark.real_clock
async def test_loop_that_waits_is_not_held(caplog: pytest.LogCaptureFixture) -> None:
    """An idle loop is never reported, whatever a late thread measures."""
    async with TaskManager() as manager:
        dog = Watchdog(manager._ledger, asyncio.get_running_loop(), 0.02)
        manager._ledger.home.bind(asyncio.get_running_loop())

        def tells() -> str | None:
            # The test's task is about to wait for this thread.
            while asyncio.current_task(dog._loop) is not None:
                pass
            return dog._report()

        # Before its first answer a callback cannot be told from what runs the loop.
        assert await asyncio.to_thread(tells) is None
        dog._loop.call_soon(dog._answer)
        await asyncio.sleep(0)
        dog._answered.clear()
        assert await asyncio.to_thread(tells) is None
    assert lines(caplog) == []


@pytest.mark.real_clock
async def test_answer_that_comes_in_between_is_no_trouble(caplog: pytest.LogCaptureFixture) -> None:
    """Code that runs after the loop has answered is not blamed, and none is after the end."""
    async with TaskManager() as manager:
        manager._ledger.home.bind(asyncio.get_running_loop())
        dog = Watchdog(manager._ledger, asyncio.get_running_loop(), 0.02)
        dog._answered.set()
        assert dog._report() is None
        dog._answered.clear()
        dog.stop()
        assert dog._report() is None
        dog._wait_for_answer(time.monotonic(), "somebody")
    assert lines(caplog) == []


def test_loop_that_does_not_run_is_not_held() -> None:
    """Between two runs of a loop, no answer is expected."""
    loop = asyncio.new_event_loop()
    try:
        assert Watchdog(TaskManager()._ledger, loop, 0.02)._report() is None
    finally:
        loop.close()


@pytest.mark.real_clock
async def test_code_that_lets_no_thread_run_is_logged_afterwards(caplog: pytest.LogCaptureFixture) -> None:
    """If the thread itself was held up, it looks at once, before anything else runs."""

    class Late(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            # As if code in C had kept all threads from running for so long.
            return super().wait(0.1)

    def told() -> list[str]:
        return [line for line in lines(caplog) if "'holds'" in line]

    async with TaskManager() as manager:
        manager._ledger.home.bind(asyncio.get_running_loop())
        dog = Watchdog(manager._ledger, asyncio.get_running_loop(), 0.01)
        dog._stopped = Late()

        async def holds() -> None:
            dog.start()
            spin_until(told)

        await manager.create_task(holds(), name="holds")
        dog.stop()
        await asyncio.to_thread(dog.join, PATIENCE)
    assert "task 'holds' has held the event loop for more than 10ms" in told()[0]
    assert not dog.is_alive()


async def test_same_functions_are_logged_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task is logged once; so are others that block the loop in the same functions, for a minute."""
    async with TaskManager() as manager:
        dog = Watchdog(manager._ledger, asyncio.get_running_loop(), 0.02)
        one, two, three = (manager.create_task(rest()) for _ in range(3))
        here, there = frozenset([rest.__code__]), frozenset([give.__code__])
        assert not dog._was_reported(one, here)
        assert dog._was_reported(one, there)
        assert dog._was_reported(two, here)
        assert dog._was_reported(None, here)
        assert not dog._was_reported(None, there)
        monkeypatch.setattr(watchdog, "_QUIET", 0.0)
        assert not dog._was_reported(three, here)
        assert dog._was_reported(three, here)
        await manager.cancel_all_tasks()


@pytest.mark.real_clock
async def test_known_trouble_is_not_logged_again(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is logged unless there is news, even at the end."""
    async with TaskManager() as manager:
        manager._ledger.home.bind(asyncio.get_running_loop())
        dog = Watchdog(manager._ledger, asyncio.get_running_loop(), 0.02)

        async def holds() -> None:
            assert dog._report() == "task 'holds'"
            assert dog._report() is None
            # The loop is held for some rounds more, by what was told of.
            threading.Timer(0.1, dog._answered.set).start()
            dog._held = 0.01
            dog._wait_for_answer(time.monotonic(), None)

        await manager.create_task(holds(), name="holds")
        assert dog._answered.is_set()
    assert len(lines(caplog)) == 1


@pytest.mark.real_clock
async def test_thread_ends_with_the_block() -> None:
    """`close()` ends the thread, soon."""
    async with TaskManager() as manager:
        before = set(threading.enumerate())
        with manager.watch(held=0.02):
            (dog,) = set(threading.enumerate()) - before
        await asyncio.to_thread(dog.join, PATIENCE)
        assert not dog.is_alive()


def test_thread_ends_with_the_loop() -> None:
    """A watch that is not ended stops when its loop is closed."""
    before = set(threading.enumerate())

    async def main() -> None:
        TaskManager().watch(held=0.02)

    asyncio.run(main())
    for dog in set(threading.enumerate()) - before:
        dog.join(PATIENCE)
        assert not dog.is_alive()


async def until(happened: Callable[[], object]) -> None:
    """Wait until something is so, for a bounded time."""
    async with asyncio.timeout(PATIENCE):
        while not happened():  # noqa: ASYNC110 - what a thread does sets no event
            await asyncio.sleep(0.001)


# -- how it is called -------------------------------------------------------------------------------


def test_watch_outside_of_a_loop_is_refused() -> None:
    """Without a running loop there is nothing to watch, and the message says where to call it."""
    with pytest.raises(WrongThreadError, match="lifespan"):
        TaskManager("shop").watch()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"held": 0.001}, ValueError),
        ({"held": -1}, ValueError),
        ({"ignored": -1}, ValueError),
        ({"unstarted": "soon"}, TypeError),
        ({"outlived": True}, TypeError),
    ],
)
async def test_wrong_durations_are_refused(options: dict[str, Any], error: type[Exception]) -> None:
    """A wrong duration is refused by its name, before anything has started."""
    threads = threading.active_count()
    with pytest.raises(error, match=next(iter(options))):
        TaskManager().watch(**options)
    assert threading.active_count() == threads
