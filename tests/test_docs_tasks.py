"""The table of docs/howto/tasks.md: each way to start a task does what its row says."""

from __future__ import annotations

import asyncio
import inspect
import re
from typing import TYPE_CHECKING, Any

import pytest

import otel_tasks
from otel_tasks import (
    ManagedTask,
    TaskGroup,
    TaskManager,
    create_task,
    current_manager,
    managed_task,
    start_service,
    start_task,
)
from otel_tasks.asgi import TaskGroupMiddleware, request_group, uncancellable
from otel_tasks.testing import FakeConnection
from tests.blocks import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

    from otel_tasks._asgi.connection import Receive, Scope, Send

    Task = asyncio.Task[Any]
    Way = Callable[[list[Task]], object]

PAGE = (ROOT / "docs" / "howto" / "tasks.md").read_text("utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in re.findall(r"^\| [a-z ]+ \| `.*", PAGE.partition("## A block or a label")[0], re.MULTILINE)
]
# The table of `help(otel_tasks)`: its columns are at least two spaces apart.
SHORT_ROWS = [
    re.split(r" {2,}", line.strip())
    for line in (otel_tasks.__doc__ or "").split("    ==")[2].splitlines()[1:]
    if line.strip()
]


async def work() -> None:
    await asyncio.sleep(3600)


decorated = managed_task(work)
labeled = managed_task(group="mail")(work)


async def awaited(started: list[Task]) -> None:
    runner = asyncio.create_task(decorated())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    # The only live task of the request's group: it has no other name.
    started.extend(request_group().tasks)
    started.append(runner)


async def block(started: list[Task]) -> None:
    async with TaskGroup("load") as group:
        started.append(group.create_task(work()))


async def by_name(started: list[Task]) -> None:
    started.append(await start_task("import", work))


async def service(started: list[Task]) -> None:
    started.append(await start_service("prices", work))


# The row's number, its way, and the id of the group that the row names.
WAYS: list[tuple[int, Way, str | None]] = [
    (0, lambda started: started.append(create_task(work())), "GET#1"),
    (1, lambda started: started.append(request_group().create_task(work())), "GET#1"),
    (2, lambda started: started.append(decorated.start()), "GET#1"),
    (2, awaited, "GET#1"),
    (3, block, "load#2"),
    (4, lambda started: started.append(current_manager().create_task(work(), group="mail")), "mail"),
    (5, lambda started: started.append(labeled.start()), "mail"),
    (6, lambda started: started.append(current_manager().create_task(work())), "root"),
    (7, by_name, "root"),
    (7, service, "root"),
    (8, lambda started: started.append(asyncio.create_task(work())), None),
]


@pytest.fixture
def manager() -> TaskManager:
    """Give each test a manager of its own."""
    return TaskManager("shop")


class Visit:
    """One request whose handler starts a task in one of the ways."""

    def __init__(self, manager: TaskManager, way: Way, *, stays: bool) -> None:
        self.started: list[Task] = []
        self._way = way
        self._stays = stays
        app = TaskGroupMiddleware(self._handle, manager=manager)
        self.connection = FakeConnection()
        self.serving = asyncio.create_task(self.connection.run(app))

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self._way(self.started)
        if inspect.isawaitable(found):
            await found
        if self._stays:
            await asyncio.sleep(3600)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    @property
    def task(self) -> Task:
        """The task that the handler has started."""
        return self.started[0]

    async def close(self) -> None:
        """End what still runs."""
        rest = [task for task in (self.serving, *self.started) if not task.done()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)


def what_became_of(task: Task) -> str:
    """The word of the page for it."""
    return "cancelled" if task.cancelled() else "continues"


def test_every_row_has_its_ways() -> None:
    """The page's table has nine rows, each of which is tried here."""
    assert len(ROWS) == 9
    assert {row for row, _, _ in WAYS} == set(range(9))


def test_help_and_page_list_the_same_ways() -> None:
    """`help(otel_tasks)` has the rows of the page's table: names, calls, and cancellations."""
    assert [row[0] for row in SHORT_ROWS] == [row[0] for row in ROWS]
    for (name, call, _, *ended_by), page in zip(SHORT_ROWS, ROWS, strict=True):
        assert f"`{call}`" in page[1], name
        assert ("disconnect" in "".join(ended_by)) is (page[3] == "cancelled"), name
        assert ("request end" in "".join(ended_by)) is page[4].startswith("cancelled"), name


@pytest.mark.parametrize("function", [create_task, TaskManager.create_task])
def test_create_task_leads_to_the_table(function: Callable[..., object]) -> None:
    """The docstrings of both functions refer to the table."""
    assert "``help(otel_tasks)`` shows where a task goes" in (function.__doc__ or "")


@pytest.mark.parametrize(("row", "way", "group"), WAYS)
async def test_task_joins_the_group_of_its_row(
    manager: TaskManager, row: int, way: Way, group: str | None
) -> None:
    """A managed task is in the group that the row names; a plain one is in none."""
    visit = Visit(manager, way, stays=True)
    await asyncio.sleep(1)
    assert (visit.task.group.id if isinstance(visit.task, ManagedTask) else None) == group
    await visit.close()


@pytest.mark.parametrize(("row", "way", "group"), WAYS)
async def test_disconnect_does_what_the_row_says(
    manager: TaskManager, row: int, way: Way, group: str | None
) -> None:
    """A client that leaves cancels the tasks below its request, and no others."""
    visit = Visit(manager, way, stays=True)
    await asyncio.sleep(1)
    visit.connection.disconnect()
    await asyncio.sleep(1)
    assert what_became_of(visit.task) == ROWS[row][3]
    await visit.close()


@pytest.mark.parametrize(("row", "way", "group"), WAYS)
async def test_end_of_the_request_does_what_the_row_says(
    manager: TaskManager, row: int, way: Way, group: str | None
) -> None:
    """A request that ends cancels the tasks of its group; a block holds it up."""
    visit = Visit(manager, way, stays=False)
    await asyncio.sleep(1)
    if way is block:
        assert not visit.serving.done()
        assert ROWS[row][4] == "the block waits for it first"
    else:
        assert visit.serving.done()
        assert what_became_of(visit.task) == ROWS[row][4].partition(",")[0]
    await visit.close()


@pytest.mark.parametrize(("row", "way", "group"), WAYS)
async def test_shutdown_ends_every_managed_task(
    manager: TaskManager, row: int, way: Way, group: str | None
) -> None:
    """A shutdown cancels the task of each row but the last."""
    visit = Visit(manager, way, stays=True)
    await asyncio.sleep(1)
    await manager.shutdown(grace=0)
    assert what_became_of(visit.task) == ("continues" if row == 8 else "cancelled")
    await visit.close()


async def test_create_task_in_the_body_of_a_block_joins_the_current_group(manager: TaskManager) -> None:
    """`create_task()` does not look at the block around it."""

    async def body(started: list[Task]) -> None:
        async with TaskGroup("load"):
            started.append(create_task(work()))

    visit = Visit(manager, body, stays=True)
    await asyncio.sleep(1)
    assert isinstance(visit.task, ManagedTask)
    assert visit.task.group.id == "GET#1"
    await visit.close()


async def test_create_task_in_uncancellable_joins_a_group_that_a_disconnect_does_not_reach(
    manager: TaskManager,
) -> None:
    """The group has a name of its own, and its tasks continue when the client leaves."""

    async def body(started: list[Task]) -> None:
        async with uncancellable():
            task = create_task(asyncio.sleep(10))
            started.append(task)
            await task

    visit = Visit(manager, body, stays=False)
    await asyncio.sleep(1)
    visit.connection.disconnect()
    await asyncio.sleep(1)
    assert isinstance(visit.task, ManagedTask)
    assert visit.task.group.name == "GET uncancellable"
    assert what_became_of(visit.task) == "continues"
    await visit.serving
    assert visit.task.done()
    assert not visit.task.cancelled()


async def test_plain_task_starts_tasks_in_its_request_and_later_in_the_manager(manager: TaskManager) -> None:
    """`create_task()` in a plain task joins the request's group, and the root once the request is over."""
    go = asyncio.Event()
    found: list[ManagedTask[None]] = []

    async def session() -> None:
        for _ in range(2):
            found.append(create_task(work()))
            await go.wait()

    async def open_session(started: list[Task]) -> None:
        started.append(asyncio.create_task(session()))
        await asyncio.sleep(0.5)

    visit = Visit(manager, open_session, stays=False)
    await asyncio.sleep(1)
    go.set()
    await asyncio.sleep(1)
    assert [task.group.id for task in found] == ["GET#1", "root"]
    await manager.shutdown(grace=0)
    await visit.close()


async def test_outside_a_request_the_current_group_is_that_of_the_managed_task(manager: TaskManager) -> None:
    """`create_task()` joins the group of the managed task that calls it."""
    found: list[ManagedTask[None]] = []

    async def parent() -> None:
        found.append(create_task(work()))

    await manager.create_task(parent(), group="mail")
    assert found[0].group.id == "mail"
    await manager.shutdown(grace=0)
