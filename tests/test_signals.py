"""`manager.dump_on_signal()`: the tree on a signal, whatever runs just then."""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks import TaskManager
from tests.helpers import rest, settle

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PATIENCE = 60.0
"""Real seconds after which a test gives up."""

if not hasattr(signal, "SIGUSR1"):
    pytest.skip("this platform has no SIGUSR1", allow_module_level=True)


@pytest.fixture(autouse=True)
def handlers_are_put_back() -> Iterator[None]:
    """Restore the handlers after each test."""
    numbers = (signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    yield
    after = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    assert after == before


def send(number: int = signal.SIGUSR1) -> None:
    """Send this process a signal; its handler has run on return."""
    signal.raise_signal(number)


async def test_signal_writes_the_tree() -> None:
    """Each signal writes what runs just then, and none after the block."""
    file = io.StringIO()
    async with TaskManager("shop") as manager:
        manager.create_task(rest(), name="work", group="jobs")
        await settle()
        with manager.dump_on_signal(file=file):
            send()
            text = file.getvalue()
            send()
        assert re.sub(r"py:\d+", "py:N", text).splitlines() == [
            "manager shop: 1 live task",
            "└── jobs: 1 task",
            "    └── (T) work: running, 0ms, at rest tests/helpers.py:N > sleep",
        ]
        assert file.getvalue() == text * 2


async def test_other_signal_and_limit() -> None:
    """Signal and size are the caller's choice, and `close()` ends it as the block does."""
    file = io.StringIO()
    async with TaskManager() as manager:
        for _ in range(3):
            manager.create_task(rest())
        dump = manager.dump_on_signal(signal.SIGUSR2, file=file, limit=1)
        send(signal.SIGUSR2)
        dump.close()
        dump.close()
        assert file.getvalue().splitlines()[-1] == "└── ... 2 more tasks"


async def test_standard_error_is_the_default(capfd: pytest.CaptureFixture[str]) -> None:
    """Without a file it goes to standard error, past the buffers, with its lines drawn."""
    async with TaskManager() as manager:
        manager.create_task(rest(), name="work")
        with manager.dump_on_signal():
            send()
        assert "└── (T) work" in capfd.readouterr().err


@pytest.mark.real_clock
async def test_tree_comes_while_a_task_holds_the_loop() -> None:
    """A task that spins is interrupted, and shown at the line where it is."""
    file = io.StringIO()

    spinning = [False]

    def interrupt() -> None:
        end = time.monotonic() + PATIENCE
        while not spinning[0] and time.monotonic() < end:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGUSR1)

    async def spins() -> None:
        end = time.monotonic() + PATIENCE
        thread = threading.Thread(target=interrupt)
        thread.start()
        while not file.getvalue() and time.monotonic() < end:
            spinning[0] = True
        thread.join()

    async with TaskManager() as manager:
        with manager.dump_on_signal(file=file):
            await manager.create_task(spins(), name="spins")
    assert "(T) spins: running" in file.getvalue()
    assert re.search(r"at test_tree_comes_while.*spins tests/test_signals\.py:\d+", file.getvalue())


async def test_handler_of_before_is_called_too() -> None:
    """The previous handler of the signal still runs, and is restored."""
    called: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: called.append(number))
    file = io.StringIO()
    with TaskManager("one").dump_on_signal(file=file), TaskManager("two").dump_on_signal(file=file):
        send()
    send()
    signal.signal(signal.SIGUSR1, before)
    assert called == [signal.SIGUSR1] * 2
    assert [line.split(":")[0] for line in file.getvalue().splitlines()] == ["manager two", "manager one"]


async def test_ending_in_another_order_leaves_the_newer_one() -> None:
    """A handler that was set later stays, and the ended one writes nothing."""
    file = io.StringIO()
    before = signal.getsignal(signal.SIGUSR1)
    older = TaskManager("older").dump_on_signal(file=file)
    newer = TaskManager("newer").dump_on_signal(file=file)
    older.close()
    called: list[int] = []
    # So that the signal has a handler that does not end the process.
    send()
    newer.close()
    signal.signal(signal.SIGUSR1, before)
    assert file.getvalue().splitlines() == ["manager newer: 0 live tasks"]
    assert called == []


async def test_ended_in_a_thread_it_is_silent() -> None:
    """A thread cannot restore a handler; ending it there is silent anyway."""
    file = io.StringIO()
    before = signal.getsignal(signal.SIGUSR1)
    dump = TaskManager().dump_on_signal(file=file)
    await asyncio.to_thread(dump.close)
    send()
    signal.signal(signal.SIGUSR1, before)
    assert file.getvalue() == ""


async def test_handler_that_was_not_pythons(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that Python does not know is replaced by the default one at the end."""
    real = signal.signal
    before = real(signal.SIGUSR1, signal.SIG_IGN)
    monkeypatch.setattr(signal, "signal", lambda number, handler: real(number, handler) and None)
    dump = TaskManager().dump_on_signal(file=io.StringIO())
    dump.close()
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    real(signal.SIGUSR1, before)


async def test_handler_raises_nothing_into_the_interrupted_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree that cannot be drawn is replaced by the reason, a file that cannot be written by nothing."""
    manager = TaskManager()
    file, closed = io.StringIO(), io.StringIO()
    closed.close()
    with manager.dump_on_signal(file=closed):
        send()

    def broken(*_: object) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr("otel_tasks._core.manager.tree_of", broken)
    with manager.dump_on_signal(file=file):
        send()
    assert file.getvalue().endswith("RuntimeError: broken\n")


async def test_signal_while_the_tree_is_written_is_answered_by_that() -> None:
    """Signals that arrive while a tree is written do not pile up, and reach the previous handler."""

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            send()
            return super().write(text)

    called: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: called.append(number))
    file = Slow()
    with TaskManager().dump_on_signal(file=file):
        send()
        send()
    signal.signal(signal.SIGUSR1, before)
    assert file.getvalue().splitlines() == ["manager default: 0 live tasks"] * 2
    assert len(called) == 4


async def test_file_gets_all_of_a_long_tree(tmp_path: Path) -> None:
    """A real file is written by its descriptor, however long the text."""
    path = tmp_path / "dump.txt"
    async with TaskManager() as manager:
        for number in range(2000):
            manager.create_task(rest(), name=f"caf\u00e9-{number}-{'x' * 60}")
        with path.open("w", encoding="ascii") as file, manager.dump_on_signal(file=file, limit=2000):
            send()
        assert path.read_text("utf-8") == str(manager.tree(limit=2000)) + "\n"


@pytest.mark.parametrize("wrong", [0, 12345, "SIGUSR1", signal.SIGKILL])
def test_wrong_signal_is_refused(wrong: Any) -> None:
    """A value that is no signal, or cannot be handled, is refused, and the message names one that works."""
    with pytest.raises(ValueError, match=r"signal\.SIGUSR1"):
        TaskManager().dump_on_signal(wrong)


@pytest.mark.parametrize("error", [OSError(22, "Invalid argument"), ValueError("invalid signal value")])
def test_signal_that_cannot_be_handled(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """However the platform refuses a signal, the message names one that this platform has."""

    def refuse(*_: Any) -> None:
        raise error

    monkeypatch.setattr(signal, "signal", refuse)
    monkeypatch.delattr(signal, "SIGUSR1")
    with pytest.raises(ValueError, match=r"cannot handle SIGTERM: use signal\.SIGUSR2$"):
        TaskManager().dump_on_signal(signal.SIGTERM)


@pytest.mark.parametrize("wrong", ["tree.txt", 2])
def test_wrong_file_is_refused(wrong: Any) -> None:
    """A file that cannot be written to is refused at once, before the handler is set."""
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(TypeError, match=r"writes to an open text file, got .*: pass file=open"):
        TaskManager().dump_on_signal(file=wrong)
    assert signal.getsignal(signal.SIGUSR1) is before


def test_platform_without_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without SIGUSR1 (Windows), the message names the signals that exist."""
    monkeypatch.delattr(signal, "SIGUSR1")
    with pytest.raises(RuntimeError, match="SIGBREAK"):
        TaskManager().dump_on_signal()


async def test_other_thread_is_refused() -> None:
    """Signals are handled in the main thread, and the message says so."""
    with pytest.raises(RuntimeError, match="main thread"):
        await asyncio.to_thread(TaskManager().dump_on_signal)


def test_wrong_limit_is_refused() -> None:
    """A limit below 1 is refused before a handler is there."""
    with pytest.raises(ValueError, match=r"limit must be the number of .* at least 1"):
        TaskManager().dump_on_signal(limit=0)


SERVICE = """
    import contextlib, signal, sys, uvicorn
    from otel_tasks import global_task_manager as manager
    from otel_tasks.fastapi import make_lifespan
    from fastapi import FastAPI

    released = []
    signal.signal(signal.SIGUSR1, lambda number, frame: released.append(number))

    async def spins():
        print("spins", flush=True)
        while not released:
            pass
        print("released", flush=True)

    @contextlib.asynccontextmanager
    async def opened(app):
        with manager.dump_on_signal():
            task = manager.create_task(spins(), name="spins")
            task.add_done_callback(lambda _: print("ended", flush=True))
            yield

    app = FastAPI(lifespan=make_lifespan(opened, grace=0.0))
    uvicorn.run(app, port=0, log_level="warning", loop=sys.argv[1])
"""


@pytest.mark.e2e
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_under_uvicorn(loop: str) -> None:
    """In a real server a signal shows the task that holds the loop, then what there is when it idles."""
    command = [sys.executable, "-c", textwrap.dedent(SERVICE), loop]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        guard = threading.Timer(60, process.kill)
        guard.start()
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == "spins\n"
            process.send_signal(signal.SIGUSR1)
            lines = [process.stderr.readline() for _ in range(2)]
            assert process.stdout.readline() == "released\n"
            assert process.stdout.readline() == "ended\n"
            process.send_signal(signal.SIGUSR1)
            idle = process.stderr.readline()
            process.send_signal(signal.SIGTERM)
            rest_of_it = process.communicate(timeout=60)
        finally:
            guard.cancel()
            process.kill()
    assert lines[0] == "manager default: 1 live task\n"
    assert re.fullmatch(r"└── \(T\) spins: running, .+, at spins <string>:\d+\n", lines[1])
    assert idle == "manager default: 0 live tasks\n"
    assert rest_of_it == ("", "")
