"""The one WARNING about work that ends with its loop, because nothing has shut its manager down."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI

from otel_tasks import TaskManager, global_task_manager
from otel_tasks.asgi import TaskGroupMiddleware
from otel_tasks.testing import run
from tests.helpers import give, ignore_cancels, rest, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

ROOT = Path(__file__).parents[1]
LOST = "manager 'shop' was not shut down before its event loop ended, and lost "
CUT = "WARNING the shutdown of manager 'shop' cancelled 1 task: 'poll'"
HINT = (
    ". In a script, write otel_tasks.run(main(), manager=manager); on a server, write "
    "lifespan=make_lifespan(manager=manager), or add the middleware, and leave the server's lifespan on"
)


@pytest.fixture
def manager() -> TaskManager:
    return TaskManager("shop")


@pytest.fixture
def _destroyed_tasks_are_expected() -> Generator[None]:
    """Collect what was left behind: asyncio says that it is destroyed while pending."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


async def leave(manager: TaskManager) -> None:
    """Return while tasks of two groups still run."""
    manager.create_task(rest(), name="mail-7", group="outbox")
    manager.create_task(rest(), name="poll")
    manager.create_task(rest(), name="mail-8", group="outbox")
    await settle()


# -- the loop's runner cancels what is left ----------------------------------------------------------


@pytest.mark.parametrize("runner", [asyncio.run, run])
def test_end_of_the_loop_names_lost_tasks(
    runner: Callable[[Any], None], manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """One line has the groups, the tasks, and the line of code that would have prevented it."""
    runner(leave(manager))

    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == f"{LOST}group 'root': 'poll'; group 'outbox': 'mail-7', 'mail-8'{HINT}"
    fields = record.__dict__["otel_tasks"]
    assert fields["task_ids"] == ["poll", "mail-7", "mail-8"]
    assert len(set(fields["task_uids"])) == 3
    assert manager.stats().cancelled == 3


def test_global_manager_is_called_by_its_name(caplog: pytest.LogCaptureFixture) -> None:
    """The line to write names the global manager as code does."""

    async def main() -> None:
        global_task_manager.create_task(rest(), name="poll")

    run(main())
    assert "write otel_tasks.run(main(), manager=global_task_manager);" in caplog.text
    assert "write lifespan=make_lifespan(manager=global_task_manager)," in caplog.text


def test_task_that_has_not_started_is_marked(manager: TaskManager, caplog: pytest.LogCaptureFixture) -> None:
    """If the loop ends before a task has started, the line says so."""

    async def forgets() -> None:
        # Created in the loop's last turn.
        asyncio.get_running_loop().call_soon(lambda: manager.create_task(give(1), name="late"))

    run(forgets())
    assert caplog.messages == [f"{LOST}group 'root': 'late' (not started){HINT}"]


def test_long_lists_are_cut(manager: TaskManager, caplog: pytest.LogCaptureFixture) -> None:
    """Ten tasks are named, the others counted."""

    async def main() -> None:
        for number in range(13):
            manager.create_task(rest(), name=f"mail-{number}")
        await settle()

    run(main())
    [message] = caplog.messages
    assert "'mail-9'; 3 more tasks. In a script" in message
    assert "'mail-10'" not in message


def test_two_managers_have_a_line_each(caplog: pytest.LogCaptureFixture) -> None:
    """Each manager tells of its own tasks."""

    async def main() -> None:
        for name in ("shop", "bank"):
            TaskManager(name).create_task(rest())
        await settle()

    run(main())
    assert sorted(message.split("'")[1] for message in caplog.messages) == ["bank", "shop"]


def test_each_loop_is_reported(manager: TaskManager, caplog: pytest.LogCaptureFixture) -> None:
    """Tasks that the next loop loses are reported, too."""
    for _ in range(2):
        run(leave(manager))
    assert len(caplog.messages) == 2


def test_tasks_that_end_otherwise_are_lost_too(
    manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """The line tells of the loop's end, whatever a task makes of its cancellation; and only once."""

    async def main() -> None:
        manager.create_task(ignore_cancels(1), name="stubborn")
        await settle()

    run(main())
    assert [message for message in caplog.messages if "lost" in message] == [
        f"{LOST}group 'root': 'stubborn'{HINT}"
    ]


@pytest.mark.parametrize("way", ["async with", "shutdown", "joined"])
def test_nothing_is_said_where_nothing_is_lost(
    way: str, manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """A manager that was shut down, or whose tasks have ended, leaves no line."""

    async def main() -> None:
        if way == "joined":
            manager.create_task(give(1))
            await manager.join()
            return
        manager.create_task(rest())
        await settle()
        await manager.shutdown(0)

    async def in_block() -> None:
        async with manager:
            manager.create_task(asyncio.sleep(1))

    run(in_block() if way == "async with" else main())
    assert not [message for message in caplog.messages if "lost" in message]


@pytest.mark.parametrize("started", [False, True])
def test_services_are_no_lost_work(
    started: bool, manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """They start again with the application; other tasks beside them are named."""

    async def main() -> None:
        await manager.start_service("prices", rest)
        if started:
            manager.create_task(rest(), name="mail-7", group="outbox")
            await settle()

    run(main())
    assert caplog.messages == ([f"{LOST}group 'outbox': 'mail-7'{HINT}"] if started else [])


def test_stubborn_task_of_a_shutdown_is_reported_by_that(
    manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """A task that does not stop at a shutdown is not reported as lost."""

    async def main() -> None:
        manager.create_task(ignore_cancels(5), name="stubborn")
        await settle()
        await manager.shutdown(0, 1)

    run(main())
    assert not [message for message in caplog.messages if "lost" in message]


def test_cancelling_between_two_runs_of_a_loop_is_not_its_end(
    manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """A script may cancel a task between two runs of its loop on purpose."""

    async def start() -> Any:
        task = manager.create_task(rest())
        await settle()
        return task

    with asyncio.Runner() as runner:
        task = runner.run(start())
        task.cancel()
        runner.run(settle())
        assert task.cancelled()
    assert caplog.messages == []


def test_block_that_is_cancelled_with_its_tasks_is_silent(
    manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """A plain task that is cancelled at the loop's end sees that its block's tasks are."""

    async def block() -> None:
        async with manager.group("load") as group:
            group.create_task(rest())

    async def main() -> None:
        hold = asyncio.create_task(block())
        await settle()
        assert not hold.done()

    run(main())
    assert caplog.messages == []


@pytest.mark.parametrize("queued", [False, True])
def test_queued_tasks_are_lost_too(
    queued: bool, manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """One that waits for its place is named with the others."""
    manager.max_concurrency = 1 if queued else None

    async def main() -> None:
        for name in ("first", "second"):
            manager.create_task(rest(), name=name)
        await settle()

    run(main())
    marked = " (not started)" if queued else ""
    assert caplog.messages == [f"{LOST}group 'root': 'first', 'second'{marked}{HINT}"]


@pytest.mark.real_clock
def test_client_without_a_lifespan_loses_the_outbox(
    manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """TestClient without `with` ends its loop with the request; with it, the middleware shuts down."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fastapi.testclient import TestClient
    app = FastAPI()
    app.add_middleware(TaskGroupMiddleware, manager=manager)

    @app.post("/orders")
    async def order(seconds: float) -> None:
        manager.create_task(asyncio.sleep(seconds), name="mail-7", group="outbox")

    with TestClient(app) as client:
        assert client.post("/orders?seconds=0.1").status_code == 200
    assert caplog.messages == []
    assert manager.stats().completed == 1
    assert TestClient(app).post("/orders?seconds=60").status_code == 200
    assert [message for message in caplog.messages if "HTTP" not in message] == [
        f"{LOST}group 'outbox': 'mail-7'{HINT}"
    ]


# -- the loop is closed under live tasks -------------------------------------------------------------


@pytest.mark.usefixtures("_destroyed_tasks_are_expected")
def test_loop_closed_under_tasks_is_reported_in_the_next(
    manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """If the tasks were not cancelled, the manager finds them when it is used again."""
    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave(manager))
    loop.close()
    assert caplog.messages == []

    assert run(created(manager)) == 1
    assert caplog.messages == [f"{LOST}group 'root': 'poll'; group 'outbox': 'mail-7', 'mail-8'{HINT}"]


async def created(manager: TaskManager) -> int:
    return await manager.create_task(give(1))


@pytest.mark.usefixtures("_destroyed_tasks_are_expected")
def test_task_cancelled_after_its_loop_is_reported_with_the_others(
    manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """A cancellation that the closed loop can no longer deliver changes nothing."""

    async def start() -> Any:
        task = manager.create_task(rest(), name="poll")
        await settle()
        return task

    loop = asyncio.new_event_loop()
    task = loop.run_until_complete(start())
    loop.close()
    with pytest.raises(RuntimeError, match="closed"):
        task.cancel()
    run(created(manager))
    assert caplog.messages == [f"{LOST}group 'root': 'poll'{HINT}"]


# -- the process ends ----------------------------------------------------------------------------------

SCRIPT = """
import asyncio, logging, multiprocessing, os, sys, threading
from otel_tasks import TaskManager

logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
manager = TaskManager("shop")


async def leave(seconds=0.0):
    manager.create_task(asyncio.sleep(60), name="poll")
    await asyncio.sleep(seconds)


def in_loop():
    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    return loop


"""

ENDS = {
    "the loop is open": "loop = in_loop()",
    "the loop is closed": "in_loop().close()",
    "a daemon thread": """
        started = threading.Event()
        async def serve():
            await leave()
            started.set()
            await asyncio.sleep(60)
        threading.Thread(target=asyncio.run, args=(serve(),), daemon=True).start()
        started.wait()
    """,
    "sys.exit": "loop = in_loop(); sys.exit(0)",
    "a worker of multiprocessing": """
        worker = multiprocessing.get_context("fork").Process(target=in_loop)
        worker.start()
        worker.join()
    """,
}


def printed(code: str) -> list[str]:
    """The lines that a script prints, asyncio's about destroyed tasks aside."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [
        line for line in done.stdout.splitlines() if "destroyed" not in line and not line.startswith("task:")
    ]


@pytest.mark.parametrize("end", ENDS)
def test_end_of_the_process_names_lost_tasks(end: str) -> None:
    """A process that ends with live tasks says so, once."""
    assert printed(ENDS[end]) == [f"WARNING {LOST}group 'root': 'poll'{HINT}"]


def test_end_of_the_loop_is_not_reported_again_at_the_end_of_the_process() -> None:
    """The end of the process does not repeat what the end of the loop has reported."""
    assert len(printed("asyncio.run(leave())")) == 1


def test_manager_that_was_shut_down_leaves_a_process_quietly() -> None:
    """Nothing is said of a manager whose tasks have ended, or that has reported what it cancelled."""
    assert printed("asyncio.run(manager.shutdown())") == []
    assert printed("loop = in_loop(); loop.run_until_complete(manager.shutdown(0))") == [CUT]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this platform")
def test_child_process_does_not_lose_its_parents_work() -> None:
    """A fork that ends does not speak of the tasks that live on in its parent."""
    code = """
        loop = in_loop()
        if os.fork() == 0:
            sys.exit(0)
        os.wait()
        loop.run_until_complete(manager.shutdown(0))
    """
    assert printed(code) == [CUT]
