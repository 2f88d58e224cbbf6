"""`run`: the order of a shutdown, its bounds, and what it returns or raises. See also `tests/e2e`."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

import otel_tasks
from otel_tasks import (
    CancelKind,
    ManagerClosedError,
    RestartPolicy,
    TaskManager,
    create_task,
    current_cancel_event,
    global_task_manager,
)
from otel_tasks._core.telemetry.errors import _logged
from otel_tasks._core.telemetry.providers import flushers
from otel_tasks.testing import VirtualClockLoop
from tests.helpers import fail, give, ignore_cancels, now, rest, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from otel_tasks.testing import SpanRecorder

TERM, INT = signal.SIGTERM, signal.SIGINT
run_any: Any = otel_tasks.run


def run(main: Coroutine[Any, Any, Any], **options: Any) -> Any:
    """`otel_tasks.run` on the virtual clock."""
    return otel_tasks.run(main, loop_factory=VirtualClockLoop, **options)


def code_of(main: Coroutine[Any, Any, Any], **options: Any) -> object:
    """The exit code with which it ends."""
    with pytest.raises(SystemExit) as ended:
        run(main, **options)
    return ended.value.code


def signal_after(seconds: float, signum: int = TERM) -> None:
    """Send a signal to this process."""
    asyncio.get_running_loop().call_later(seconds, signal.raise_signal, signum)


def names_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if "received SIG" not in message]


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="otel_tasks")


# -- the end of the main coroutine -------------------------------------------------------------------------


def test_value_of_main_is_returned_after_the_grace(caplog: pytest.LogCaptureFixture) -> None:
    """Tasks that are live when main returns get their grace; the rest is cancelled and named."""
    times: list[float] = []

    async def main() -> str:
        times.append(now())
        create_task(asyncio.sleep(3), name="short")
        create_task(rest(), name="long")
        asyncio.get_running_loop().call_later(4.9, lambda: times.append(global_task_manager.stats().live))
        return "done"

    assert run(main()) == "done"
    assert times[1] == 1
    assert names_in(caplog) == ["the shutdown of manager 'default' cancelled 1 task: 'long'"]


def test_main_that_raises_waits_for_nothing() -> None:
    """Its exception is raised at once, and its tasks are cancelled without a grace."""
    started: list[Any] = []

    async def main() -> None:
        started.extend([create_task(rest()), now(), asyncio.get_running_loop()])
        await settle()
        raise ValueError("no database")

    with pytest.raises(ValueError, match="no database"):
        run(main())
    task, begin, loop = started
    assert task.cancelled()
    assert task.cause.kind is CancelKind.SHUTDOWN
    assert loop.time() == begin


def test_exit_in_a_task_ends_the_service_with_its_code() -> None:
    """sys.exit() in main or in a task ends everything without a grace, with that code."""

    async def leave() -> None:
        sys.exit(3)

    async def main(*, in_task: bool) -> None:
        other = create_task(rest())
        try:
            if in_task:
                create_task(leave())
                await rest()
            await leave()
        finally:
            assert other.cancelled() is in_task

    assert code_of(main(in_task=True)) == 3
    assert code_of(main(in_task=False)) == 3


def test_main_that_is_cancelled_raises_as_in_asyncio_run() -> None:
    """A cancellation that no signal caused is raised."""

    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await rest()

    with pytest.raises(asyncio.CancelledError):
        run(main())


# -- signals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("signum", "code"), [(INT, 130), (TERM, 143)])
def test_signal_ends_tasks_before_main(signum: int, code: int, caplog: pytest.LogCaptureFixture) -> None:
    """Tasks get their grace while main's resources are open; main is cancelled after them."""
    told: list[object] = []

    async def work(seconds: float) -> None:
        try:
            await asyncio.sleep(seconds)
        finally:
            told.append((asyncio.current_task().get_name(), now() - begin))  # type: ignore[union-attr]  # it runs

    begin = 0.0

    async def main() -> None:
        nonlocal begin
        begin = now()
        create_task(work(4), name="short")
        create_task(work(60), name="long")
        signal_after(1, signum)
        try:
            await rest()
        except asyncio.CancelledError as error:
            told.append((str(error), now() - begin))
            raise

    assert code_of(main()) == code
    name = signal.Signals(signum).name
    assert told == [
        ("short", pytest.approx(4)),
        ("long", pytest.approx(6)),
        (f"run(), which received {name}", pytest.approx(6)),
    ]
    assert caplog.messages == [
        f"received {name}, shutting down",
        "the shutdown of manager 'default' cancelled 1 task: 'long'",
    ]


def test_own_grace_and_timeout_win() -> None:
    """`grace` and `timeout` replace those of every manager."""
    ended: list[float] = []

    async def main() -> None:
        begin = now()
        manager = TaskManager("mail", grace=30.0)
        manager.create_task(ignore_cancels(7), name="stubborn")
        signal_after(0)
        try:
            await rest()
        finally:
            ended.append(now() - begin)

    assert code_of(main(), grace=2.0, timeout=4.0) == 143
    assert ended == [pytest.approx(6.0)]


def test_every_manager_of_the_loop_is_shut_down(caplog: pytest.LogCaptureFixture) -> None:
    """Also one that main has made, with its own bounds; a manager that main used earlier is left alone."""
    ends: dict[str, float] = {}

    async def work(name: str, begin: float) -> None:
        try:
            await rest()
        finally:
            ends[name] = now() - begin

    async def main() -> None:
        begin = now()
        async with TaskManager("early") as early:
            await early.create_task(give(1))
        async with TaskManager("own", grace=7.0) as own:
            own.create_task(work("own", begin))
            global_task_manager.create_task(work("global", begin))
            signal_after(0)
            await rest()

    assert code_of(main()) == 143
    assert ends == {"global": pytest.approx(5.0), "own": pytest.approx(7.0)}
    assert "early" not in caplog.text


def test_main_may_end_itself_when_the_event_is_set() -> None:
    """The root's cancel event is set by the signal; main that returns then is not cancelled."""
    told: list[str] = []

    async def main() -> None:
        signal_after(1)
        await current_cancel_event().wait()
        told.append("closing")
        await asyncio.sleep(0)

    task_ends: list[float] = []

    async def slow() -> None:
        await asyncio.sleep(2)
        task_ends.append(now())

    async def with_task() -> None:
        create_task(slow())
        await main()

    assert code_of(with_task()) == 143
    assert told == ["closing"]
    assert task_ends


@pytest.mark.parametrize("grouped", [False, True])
def test_main_that_creates_a_task_after_the_signal_fails_quietly(grouped: bool) -> None:
    """A producer that is refused ends with the service, without a traceback."""

    async def produce() -> None:
        while True:
            create_task(asyncio.sleep(0.1))
            await asyncio.sleep(1)

    async def main() -> None:
        signal_after(1.5)
        create_task(asyncio.sleep(3))
        if not grouped:
            await produce()
        async with asyncio.TaskGroup() as group:
            group.create_task(produce())

    assert code_of(main()) == 143


def test_error_of_main_during_the_shutdown_is_raised() -> None:
    """A main that fails while it closes its resources ends with that error, not with the signal's code."""

    async def main() -> None:
        signal_after(1)
        try:
            await rest()
        finally:
            raise OSError("the file is gone")

    with pytest.raises(OSError, match="the file is gone"):
        run(main())


def test_second_signal_cuts_the_grace_short(caplog: pytest.LogCaptureFixture) -> None:
    """Live tasks are cancelled immediately, and main after them."""
    ends: list[float] = []

    async def work(begin: float) -> None:
        try:
            await rest()
        finally:
            ends.append(now() - begin)

    async def main() -> None:
        begin = now()
        create_task(work(begin))
        signal_after(1)
        signal_after(2, INT)
        try:
            await rest()
        finally:
            ends.append(now() - begin)

    assert code_of(main()) == 143
    assert ends == [pytest.approx(2), pytest.approx(2)]
    assert "received SIGINT, cutting the shutdown short" in caplog.messages


def test_signal_after_main_has_returned_cuts_its_grace_short() -> None:
    """The first signal is enough then, and decides about the exit code."""

    async def main() -> None:
        create_task(rest())
        signal_after(1, INT)

    assert code_of(main()) == 130


@pytest.mark.parametrize("kind", ["task", "plain task", "main"])
def test_nothing_that_ignores_its_cancellation_holds_the_end_up(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each wait has a bound; what still runs is named with its stack, once."""
    begin: list[float] = []
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        begin.append(now())
        signal_after(0)
        if kind == "main":
            await ignore_cancels(1000)
        elif kind == "task":
            create_task(ignore_cancels(1000), name="stubborn")
        else:
            loops.append(asyncio.create_task(ignore_cancels(1000), name="stubborn"))  # type: ignore[arg-type]  # kept
        await rest()

    assert code_of(main(), grace=1.0, timeout=3.0) == 143
    [message] = [line for line in caplog.messages if "did not stop at shutdown" in line]
    assert "ignore_cancels" in message
    assert loops[0].time() - begin[0] <= 1.0 + 3.0 + 3.0 + 0.1


def test_plain_task_that_fails_at_the_end_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """Plain asyncio tasks are cancelled last; what one raises then is logged, as asyncio.run() does."""

    async def breaks() -> None:
        try:
            await rest()
        finally:
            raise ValueError("in cleanup")

    kept: list[Any] = []

    async def main() -> None:
        kept.append(asyncio.create_task(breaks()))
        await settle()

    run(main())
    assert "unhandled exception during run() shutdown" in caplog.text


def test_handlers_are_restored() -> None:
    """After run(), the signals have the handlers from before; an ignored one stays ignored."""
    before = signal.getsignal(TERM)
    seen: list[object] = []

    async def main() -> None:
        seen.append(signal.getsignal(INT))

    ignored = signal.signal(INT, signal.SIG_IGN)
    try:
        run(main())
    finally:
        signal.signal(INT, ignored)
    assert seen == [signal.SIG_IGN]
    assert signal.getsignal(TERM) == before


# -- critical services -------------------------------------------------------------------------------------

ONCE = RestartPolicy(max_failures=1)


def test_critical_service_that_gives_up_ends_the_application(caplog: pytest.LogCaptureFixture) -> None:
    """Its manager shuts down in order, the exit code is 1, and one line says why."""

    async def main() -> None:
        task = create_task(asyncio.sleep(3))
        await otel_tasks.start_service("db", lambda: fail(OSError("no route")), restart=ONCE, critical=True)
        try:
            await rest()
        finally:
            assert task.done()
            assert not task.cancelled()

    assert code_of(main()) == 1
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.CRITICAL] == [
        "critical service 'db' gave up (OSError: no route): the application ends with exit code 1"
    ]


async def test_critical_service_without_run_shuts_its_manager_down(caplog: pytest.LogCaptureFixture) -> None:
    """Under a server, the manager refuses new tasks, and says which service ended it."""
    manager = TaskManager("shop")
    await manager.start_service("db", lambda: fail(OSError("no route")), restart=ONCE, critical=True)
    await asyncio.sleep(0.1)

    assert manager.closed
    assert manager.failed_services == ("db",)
    with pytest.raises(ManagerClosedError, match="critical service 'db', which gave up"):
        manager.create_task(give(1))
    assert "critical service 'db' gave up (OSError: no route): manager 'shop' shuts down" in caplog.messages


async def test_application_learns_that_a_service_gave_up(caplog: pytest.LogCaptureFixture) -> None:
    """The callback gets the snapshot and the exception, and the error is still logged."""
    calls: list[Any] = []
    manager = TaskManager()

    def on_give_up(info: Any, error: BaseException) -> None:
        calls.append((info.id, info.status, error))
        raise ValueError("broken callback")

    broken = OSError("no route")
    service = await manager.start_service("db", lambda: fail(broken), restart=ONCE, on_give_up=on_give_up)
    await asyncio.sleep(0.1)

    assert calls == [("db", "failed", broken)]
    assert service.done()
    assert "task 'db' failed and nobody awaits it" in caplog.messages
    assert "on_give_up of service 'db' raised" in caplog.messages
    assert not manager.closed


async def test_service_that_starts_again_has_not_failed() -> None:
    """`failed_services` lists a service until it is started again; a cancelled one is not in it."""
    manager = TaskManager()
    await manager.start_service("db", lambda: fail(OSError()), restart=ONCE, on_give_up=lambda *_: None)
    await asyncio.sleep(0.1)
    assert manager.failed_services == ("db",)
    service = await manager.start_service("db", rest)
    assert manager.failed_services == ()
    assert await manager.start_service("db", rest, on_conflict="return") is service
    await settle()
    service.cancel()
    await settle()
    assert manager.failed_services == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_give_up": give}, "on_give_up must be a plain function of a TaskInfo and an exception"),
        ({"on_give_up": 1}, "write on_give_up=lambda info, error: ..."),
        ({"critical": "yes"}, "critical must be True or False, got 'yes'"),
        ({"drains": "no"}, "drains must be True or False, got 'no'"),
    ],
)
async def test_options_of_giving_up_are_checked(options: dict[str, Any], message: str) -> None:
    """A coroutine function would never run."""
    with pytest.raises(TypeError, match=message):
        await TaskManager().start_service("db", rest, **options)


# -- telemetry ---------------------------------------------------------------------------------------------


def test_providers_are_flushed(spans: SpanRecorder) -> None:
    """Each provider in use once, however many managers use it; one that raises is logged."""
    flushed: list[object] = []
    manager = TaskManager(tracer_provider=spans.provider)
    telemetry = manager._ledger.telemetry
    spans.provider.force_flush = lambda *_: flushed.append(1)  # type: ignore[method-assign,assignment]  # a spy

    for flush in flushers([telemetry, telemetry]):
        flush()
    assert flushed == [1]


@pytest.mark.real_clock
def test_last_spans_are_exported(spans: SpanRecorder, caplog: pytest.LogCaptureFixture) -> None:
    """run() returns after the flush; an error in it is logged."""
    manager = TaskManager(tracer_provider=spans.provider)
    flushed: list[int] = []

    def flush(timeout_millis: int = 0) -> bool:
        flushed.append(len(spans.spans("last")))
        raise OSError("the collector is gone")

    spans.provider.force_flush = flush  # type: ignore[method-assign]  # a spy

    async def main() -> None:
        manager.create_task(asyncio.sleep(0.01), name="last")
        _logged.discard("flushing a provider")

    otel_tasks.run(main(), manager=manager)
    assert flushed == [1]
    assert "OpenTelemetry raised while flushing a provider" in caplog.text


def test_collector_that_does_not_answer_does_not_hold_the_end_up(
    spans: SpanRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    """After 5 s, one line says that spans may be missing."""
    manager = TaskManager(tracer_provider=spans.provider)
    answer = threading.Event()
    spans.provider.force_flush = lambda *_: answer.wait(60)  # type: ignore[method-assign]  # a dead collector

    async def main() -> None:
        await manager.create_task(asyncio.sleep(0.01), name="last")

    run(main(), manager=manager)
    answer.set()
    assert names_in(caplog) == ["the last spans and metrics were not exported within 5.0 s"]


# -- misuse ------------------------------------------------------------------------------------------------


async def test_run_in_a_running_loop_is_refused() -> None:
    """The message has the line to write, and the coroutine is closed."""
    with pytest.raises(RuntimeError, match="one runs here: write `await main\\(\\)`"):
        otel_tasks.run(give(1))


def test_run_in_another_thread_is_refused() -> None:
    """Only the main thread handles signals."""
    errors: list[str] = []

    def work() -> None:
        try:
            otel_tasks.run(give(1))
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    [error] = errors
    assert "in a thread, write asyncio.run(main()), with `async with manager:` in main()" in error


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: run_any(rest), TypeError, r"got the function rest: write run\(rest\(\.\.\.\)\)"),
        (lambda: run_any(give(1), manager=1), TypeError, "manager must be a TaskManager, got 1"),
        (lambda: run_any(give(1), grace=-1), ValueError, "grace must be at least 0"),
        (lambda: run_any(give(1), timeout="5"), TypeError, "timeout must be seconds"),
        (
            lambda: run_any(give(1), loop_factory=asyncio),
            TypeError,
            "write loop_factory=uvloop.new_event_loop",
        ),
        (lambda: run_any(give(1), loop_factory=lambda: 1 // 0), ZeroDivisionError, "by zero"),
    ],
)
def test_wrong_arguments_are_refused(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    """Before a loop is made, with the line to write; the coroutine is closed."""
    with pytest.raises(error, match=message):
        call()


# -- what others have left behind ---------------------------------------------------------------------------


def test_cleanup_of_a_task_that_is_being_cancelled_is_awaited() -> None:
    """A plain task that main has cancelled without waiting for it ends before the loop is closed."""
    cleaned: list[float] = []

    async def work() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            await asyncio.sleep(0.5)
            cleaned.append(now())

    async def main() -> None:
        task = asyncio.create_task(work())
        await asyncio.sleep(1)
        task.cancel()

    run(main())
    assert len(cleaned) == 1


def test_main_has_the_shutdown_timeout_of_the_manager() -> None:
    """Without timeout=, main may clean up for as long as the manager's tasks may."""
    cleaned: list[float] = []

    async def main() -> None:
        signal_after(1)
        try:
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(30)
            cleaned.append(now())

    assert code_of(main(), manager=TaskManager("patient", shutdown_timeout=60.0)) == 143
    assert len(cleaned) == 1


def test_loop_that_is_stopped_shuts_down() -> None:
    """Code that calls loop.stop() ends the service with asyncio's error, after its tasks and its main."""
    ended: list[str] = []

    async def work(name: str) -> None:
        try:
            await asyncio.sleep(100)
        finally:
            await asyncio.sleep(0)
            ended.append(name)

    async def main() -> None:
        create_task(work("task"))
        asyncio.get_running_loop().call_later(1, asyncio.get_running_loop().stop)
        await work("main")

    with pytest.raises(RuntimeError, match="stopped before"):
        run(main())
    assert ended == ["task", "main"]


def test_manager_with_live_tasks_in_another_loop_is_left_to_it() -> None:
    """Its tasks run on, and the main coroutine is cancelled and cleans up as usual."""
    manager, cleaned = TaskManager("elsewhere"), []
    other = VirtualClockLoop()

    async def start() -> asyncio.Task[None]:
        return manager.create_task(rest())

    async def main() -> None:
        signal_after(1)
        try:
            await asyncio.sleep(1000)
        finally:
            cleaned.append(1)

    task = other.run_until_complete(start())
    assert code_of(main(), manager=manager) == 143
    assert cleaned == [1]
    assert not task.cancelling()
    other.run_until_complete(manager.shutdown(grace=0))
    other.close()


def test_failed_shutdown_still_cancels_main(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the shutdown of a manager is raised after main has cleaned up."""
    cleaned: list[int] = []

    async def broken(*_: object) -> None:
        raise ValueError("broken")

    async def main() -> None:
        signal_after(1)
        try:
            await asyncio.sleep(1000)
        finally:
            cleaned.append(1)

    monkeypatch.setattr("otel_tasks._core.run.shut_down", broken)
    with pytest.raises(ValueError, match="broken"):
        run(main())
    assert cleaned == [1]


@pytest.mark.parametrize("ends_by_signal", [False, True])
def test_main_may_cancel_every_other_task_and_wait_for_them(*, ends_by_signal: bool) -> None:
    """As scripts do with all_tasks(), which lists no task of run() itself."""
    ended: list[str] = []

    async def work() -> None:
        try:
            await rest()
        finally:
            ended.append("task")

    async def main() -> int:
        create_task(work())
        await asyncio.sleep(1)
        if ends_by_signal:
            signal_after(1)
        try:
            await asyncio.sleep(1000 if ends_by_signal else 0)
        finally:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            ended.append("main")
        return 7

    if ends_by_signal:
        assert code_of(main()) == 143
    else:
        assert run(main()) == 7
    assert ended == ["task", "main"]
