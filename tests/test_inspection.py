"""`manager.tree()`: what runs just now, as data and as text."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otel_tasks import (
    GroupNode,
    ManagedTask,
    RestartPolicy,
    TaskManager,
    TaskNode,
    TaskPriority,
    TaskStatus,
    TaskTree,
    create_task,
    current_task,
)
from otel_tasks._core import inspection, task_tree
from otel_tasks._core.request_group import RequestGroup
from otel_tasks._core.slices import COUNTS_PER_SLICE, ROWS_PER_SLICE, at_once
from otel_tasks._core.targets import take_tree
from otel_tasks._core.task_tree import duration
from otel_tasks.asgi import TaskGroupMiddleware
from otel_tasks.testing import FakeConnection, run
from tests.helpers import fail, ignore_cancels, now, rest, settle

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from otel_tasks.testing import SpanRecorder

T = TypeVar("T")
PATIENCE = 60.0
"""Real seconds after which a test gives up that waits for a thread."""


async def load(pages: int) -> None:
    progress = asyncio.current_task()
    assert isinstance(progress, ManagedTask)
    progress.progress.update(done=4, total=pages, message="parsing")
    await rest()


async def first_of(task: ManagedTask[Any]) -> None:
    await task


def without_lines(text: str) -> str:
    """The drawing with N for each number of a line."""
    return re.sub(r"(\.py):\d+", r"\1:N", text)


def nodes(group: GroupNode) -> Iterator[TaskNode | GroupNode]:
    """Everything in a group, at all levels; of a service its attempt too."""
    for task in group.tasks:
        yield task
        if task.attempt is not None:
            yield task.attempt
    for child in group.groups:
        yield child
        yield from nodes(child)


def find(tree: TaskTree, name: str) -> TaskNode:
    """The task of this name."""
    return next(node for node in nodes(tree.root) if isinstance(node, TaskNode) and node.name == name)


async def test_drawing_shows_groups_tasks_ages_places_progress_and_cancellations() -> None:
    """The text has a line for each task and group, with what one looks for."""
    async with TaskManager("shop") as manager:
        manager.create_task(load(10), name="load", group="ingest", priority=TaskPriority.HIGH)
        await asyncio.sleep(100)
        slow = manager.create_task(rest(), name="slow", group="ingest.fetch")
        manager.create_task(first_of(slow), name="waits")
        stubborn = manager.create_task(ignore_cancels(1000), name="stubborn")
        manager.create_task(rest(), name="new", group="ingest.fetch")
        await asyncio.sleep(10)
        stubborn.cancel("enough")
        await asyncio.sleep(2.5)

        text = str(manager.tree())

        assert without_lines(text) == "\n".join(
            [
                "manager shop: 5 live tasks",
                "├── (T) waits: running, 12.5s, at first_of tests/test_inspection.py:N, awaits slow",
                "├── (T) stubborn: cancelling, 12.5s, cancel requested 2.5s ago (explicit: enough), "
                "at ignore_cancels tests/helpers.py:N > sleep",
                "└── ingest: 1 task",
                "    ├── (T) load: running, 1m52s, high, at rest tests/helpers.py:N > sleep, "
                "progress 4 of 10 (40%): parsing",
                "    └── ingest.fetch: 2 tasks",
                "        ├── (T) slow: running, 12.5s, at rest tests/helpers.py:N > sleep",
                "        └── (T) new: running, 12.5s, at rest tests/helpers.py:N > sleep",
            ]
        )
        await manager.cancel_all_tasks(timeout=None)


async def test_empty_and_closed_manager() -> None:
    """Without tasks there is one line, and it says if the manager is shut down."""
    manager = TaskManager("shop", max_concurrency=3)
    assert str(manager.tree()) == "manager shop: 0 live tasks, max_concurrency 3"
    async with manager:
        pass
    assert str(manager.tree()) == "manager shop: 0 live tasks, max_concurrency 3, shut down"


async def test_queue_is_shown_with_the_places_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queued task is shown with its place in the queue, unless the queue is very long."""
    async with TaskManager("shop", max_concurrency=1) as manager:
        manager.create_task(rest(), name="runs")
        manager.create_task(rest(), name="last", priority=TaskPriority.LOW)
        manager.create_task(rest(), name="second")
        manager.create_task(rest(), name="first", priority=TaskPriority.HIGH)
        manager.get_group("one").max_concurrency = 1
        manager.create_task(rest(), name="elsewhere", group="one")
        gone = manager.create_task(rest(), name="gone", priority=TaskPriority.CRITICAL)
        await settle()
        gone.cancel()
        await settle()

        tree = manager.tree()

        places = {node.name: node.queue_position for node in nodes(tree.root) if isinstance(node, TaskNode)}
        assert places == {"runs": None, "first": 1, "second": 2, "elsewhere": 3, "last": 4}
        assert (tree.stats.queued, tree.max_concurrency) == (4, 1)
        assert without_lines(str(tree)).splitlines() == [
            "manager shop: 5 live tasks, 4 queued, max_concurrency 1",
            "├── (T) runs: running, 0ms, at rest tests/helpers.py:N > sleep",
            "├── (T) last: queued, 0ms, low, queue position 4",
            "├── (T) second: queued, 0ms, queue position 2",
            "├── (T) first: queued, 0ms, high, queue position 1",
            "└── one: 1 task, 1 queued, max_concurrency 1",
            "    └── (T) elsewhere: queued, 0ms, queue position 3",
        ]
        monkeypatch.setattr(inspection, "_MAX_QUEUE", 2)
        node = find(manager.tree(), "first")
        assert (node.queued, node.queue_position) == (True, None)
        await manager.cancel_all_tasks()


async def test_service_is_shown_with_its_attempt() -> None:
    """An attempt hangs below its service, and between two attempts there is none."""

    async def falls_over() -> None:
        await asyncio.sleep(1)
        raise ValueError("again")

    async with TaskManager() as manager:
        policy = RestartPolicy(delay=10, jitter=0)
        service = await manager.start_service("prices", falls_over, restart=policy)
        await asyncio.sleep(0.5)
        lines = without_lines(str(manager.tree())).splitlines()
        assert lines[0] == "manager default: 2 live tasks"
        assert lines[1] == "└── (S) prices: running, 500ms, critical"
        assert lines[2].startswith("    └── (T) prices#1: running, 500ms, critical, at test_service_is")
        # Renamed, it comes behind its attempt.
        service.set_name("offers")
        assert [task.name for task in manager.tree().root.tasks] == ["offers"]
        assert manager.tree().to_dict()["root"]["tasks"][0]["attempt"]["name"] == "prices#1"
        await asyncio.sleep(1)
        assert str(manager.tree()).splitlines()[1:] == [
            "└── (S) offers: running, 1.5s, critical, no running attempt"
        ]


async def test_blocks_are_shown_with_their_host_task() -> None:
    """A block names the task in which it is; of a plain one the line as well."""

    async def opens() -> None:
        async with manager.group("inner", max_concurrency=4) as group:
            group.create_task(rest(), name="work")

    task = asyncio.current_task()
    assert task is not None
    me = task.get_name()
    async with TaskManager() as manager:
        manager.create_task(opens(), name="host", group="jobs")
        async with manager.group("outer") as outer:
            outer.create_task(ignore_cancels(5), name="work")
            await settle()
            lines = without_lines(str(manager.tree())).splitlines()
            plain, managed = manager.tree().root.groups[::-1]
            outer.cancel("over")
            with pytest.raises(asyncio.CancelledError):
                await asyncio.sleep(0)
            cancelled = manager.tree().root.groups[1]
        assert lines == [
            "manager default: 3 live tasks",
            "├── jobs: 1 task",
            "│   ├── (T) host: running, 0ms, at test_blocks_are_shown_with_their_host_task.<locals>.opens "
            "tests/test_inspection.py:N > TaskGroup.__aexit__",
            "│   └── inner#2: 1 task, max_concurrency 4, block in host",
            "│       └── (T) work: running, 0ms, at rest tests/helpers.py:N > sleep",
            f"└── outer#1: 1 task, block in {me} at test_blocks_are_shown_with_their_host_task "
            "tests/test_inspection.py:N",
            "    └── (T) work: running, 0ms, at ignore_cancels tests/helpers.py:N > sleep",
        ]
        assert (managed.kind, managed.groups[0].kind, managed.groups[0].host) == ("labeled", "block", "host")
        assert (plain.kind, plain.host, managed.groups[0].where) == ("block", me, None)
        assert plain.where is not None
        assert cancelled.cause is not None
        assert cancelled.refusal == "is closed (explicit)"
        assert f"cancelled (explicit: over), block in {me} at" in task_tree._head_of(cancelled)


async def test_closed_group_says_so() -> None:
    """A group that takes no new tasks and is not being cancelled shows why."""
    async with TaskManager() as manager:
        group = RequestGroup.open(manager, "GET", binding=None, host=None)
        group.create_task(rest(), name="work")
        group._seal()
        node = manager.tree().root.groups[0]
        assert (node.kind, node.refusal, node.host) == ("request", "is finished", None)
        assert str(manager.tree()).splitlines()[1] == "└── GET#1: 1 task, is finished"


async def test_request_is_shown_with_its_handler() -> None:
    """A request's group says where its handler is."""
    manager = TaskManager()
    trees: list[TaskTree] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        create_task(rest(), name="work")
        await asyncio.sleep(1)

    async def looks() -> None:
        await asyncio.sleep(0.5)
        trees.append(manager.tree())

    async with asyncio.TaskGroup() as group:
        group.create_task(looks())
        connection = FakeConnection()
        await connection.run(TaskGroupMiddleware(app, manager=manager))
    node = trees[0].root.groups[0]
    assert (node.kind, node.name, [task.id for task in node.tasks]) == ("request", "GET", ["GET#1/work"])
    assert without_lines(str(trees[0])).splitlines()[1] == (
        "└── GET#1: 1 task, handler at test_request_is_shown_with_its_handler.<locals>.app "
        "tests/test_inspection.py:N"
    )


def stays(release: threading.Event, began: threading.Event, returned: threading.Event) -> None:
    began.set()
    release.wait(PATIENCE)
    returned.set()


@pytest.mark.real_clock
async def test_thread_is_shown_where_it_is() -> None:
    """For a function in a thread, the line is the thread's, even if its task has abandoned it."""
    release, began, returned = threading.Event(), threading.Event(), threading.Event()
    async with TaskManager(max_threads=1) as manager:
        task = manager.run_in_thread(stays, release, began, returned, name="stays", abandon=True)
        await asyncio.to_thread(began.wait, PATIENCE)
        waiting = manager.run_in_thread(stays, release, began, returned, name="waits")
        await settle()
        try:
            node, other = find(manager.tree(), "stays"), find(manager.tree(), "waits")
            assert (node.kind, other.kind) == ("thread", "thread")
            assert node.where is not None
            assert (node.where.function, node.calls) == ("stays", "Event.wait")
            assert "in a thread, at stays tests/test_inspection.py:" in str(node)
            # It has no thread yet.
            assert other.where is None or other.where.function != "stays"
            task.cancel()
            waiting.cancel()
            await settle()
            tree = manager.tree()
            assert [(name, where and where.function) for name, where in tree.abandoned_threads] == [
                ("stays", "stays")
            ]
            assert tree.to_dict()["abandoned_threads"][0]["where"]["function"] == "stays"
            last = without_lines(str(tree)).splitlines()[-1]
            assert last == "abandoned thread of stays at stays tests/test_inspection.py:N"
        finally:
            release.set()
        await asyncio.to_thread(returned.wait, PATIENCE)


async def test_tree_is_ready_for_json(spans: SpanRecorder) -> None:
    """`to_dict()` gives what the JSON encoder takes, with the facts of a task."""
    async with TaskManager("shop", tracer_provider=spans.provider) as manager:
        task = manager.create_task(load(10), name="load", group="ingest", metadata={"odd": object()})
        await asyncio.sleep(3)
        task.cancel("enough")

        data = json.loads(json.dumps(manager.tree().to_dict()))

        node = data["root"]["groups"][0]["tasks"][0]
        assert (data["manager"], data["closed"], data["stats"]["live"]) == ("shop", False, 1)
        assert (node["id"], node["status"], node["age"], node["priority"]) == (
            "load",
            "cancelling",
            3.0,
            "NORMAL",
        )
        assert (node["where"]["function"], node["calls"]) == ("rest", "sleep")
        assert (node["cause"]["message"], node["cancelling_for"]) == ("enough", 0.0)
        assert (node["progress"]["fraction"], node["trace_id"]) == (0.4, task.trace_id)
        assert "metadata" not in node


async def test_tree_may_be_taken_in_any_thread() -> None:
    """A thread sees the same as the loop."""
    async with TaskManager() as manager:
        manager.create_task(rest(), name="work")
        await settle()
        here, there = manager.tree(), await asyncio.to_thread(manager.tree)
        assert here.root.tasks[0].where == there.root.tasks[0].where
        assert here.root.live == there.root.live == 1


async def test_tree_taken_by_a_task_shows_it_where_it_is() -> None:
    """The task that takes the tree is at its own line."""
    async with TaskManager() as manager:

        async def looks() -> TaskNode:
            return manager.tree().root.tasks[0]

        node = await manager.create_task(looks())
        assert node.where is not None
        assert (node.where.function, node.calls) == (looks.__qualname__, None)


class OddCoroutine:
    """A coroutine by its methods alone, that shows nothing of itself."""

    __name__ = "odd"
    __qualname__ = "odd"

    def send(self, value: Any) -> Any:
        future = asyncio.get_running_loop().create_future()
        future._asyncio_future_blocking = True
        return future

    def throw(self, error: Any, *_: Any) -> Any:
        raise error

    def close(self) -> None:
        """Nothing to close."""

    def __await__(self) -> Generator[Any, Any, None]:
        yield from ()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name) if name.startswith("_") else RuntimeError(name)


async def test_odd_coroutine_is_listed_without_a_place() -> None:
    """A coroutine that has no frames, or raises when inspected, is shown without a line."""
    async with TaskManager() as manager:
        odd: Any = OddCoroutine()
        manager.create_task(odd, name="odd")
        await settle()
        assert str(manager.tree()).splitlines()[1] == "└── (T) odd: running, 0ms"
        await manager.cancel_all_tasks()


async def test_names_cannot_write_to_the_terminal() -> None:
    """Line ends and control characters in names and messages are shown, not obeyed."""
    async with TaskManager() as manager:
        # A name that is given cannot have them; a function's can.
        coro: Any = rest()
        coro.__name__ = "a\nb\x1b[2J"
        task = manager.create_task(coro, group="caf\u00e9")
        await settle()
        task.cancel("x\ty")
        first, second, third = str(manager.tree()).splitlines()
        assert second == "└── caf\u00e9: 1 task"
        assert third.startswith(
            "    └── (T) a\\nb\\x1b[2J: cancelling, 0ms, cancel requested 0ms ago (explicit: x\\ty)"
        )
        assert first == "manager default: 1 live task"


async def test_cause_without_a_moment() -> None:
    """If the time of the request is unknown, no duration is shown."""
    async with TaskManager() as manager:
        task = manager.create_task(rest(), name="work")
        await settle()
        task.cancel("enough")
        assert task.cause is not None
        task._cause = type(task.cause)(task.cause.kind)
        node = manager.tree().root.tasks[0]
        assert node.cancelling_for is None
        assert "cancel requested (explicit)" in str(node)


async def test_progress_without_a_total() -> None:
    """With an unknown total, only the finished part is shown."""

    async def counts() -> None:
        task = current_task()
        assert task is not None
        task.progress.update(done=7)
        await rest()

    async with TaskManager() as manager:
        manager.create_task(counts(), name="counts")
        await settle()
        assert str(manager.tree()).endswith(" > sleep, progress 7")


async def test_big_tree_is_bounded_and_counts_the_rest() -> None:
    """A big group does not hide the others, and says how many of its tasks are not shown."""
    async with TaskManager() as manager:
        for number in range(500):
            manager.create_task(rest(), name=f"big-{number}", group="big")
        for number in range(300):
            manager.create_task(rest(), name=f"root-{number}")
        for number in range(40):
            manager.create_task(rest(), group=f"small.{number}")
        manager.create_task(rest(), name="alone", group="other")
        tree = manager.tree(limit=40)
        assert len(list(nodes(tree.root))) <= 40
        assert [group.id for group in tree.root.groups] == ["big", "small", "other"]
        assert [task.name for task in tree.root.tasks[:2]] == ["root-0", "root-1"]
        assert tree.root.more_tasks == 300 - len(tree.root.tasks)
        big, small, other = tree.root.groups
        assert (big.live, big.more_tasks) == (500, 500 - len(big.tasks))
        assert small.more_groups == 40 - len(small.groups)
        assert [task.name for task in other.tasks] == ["alone"]
        text = str(tree)
        assert f"│   └── ... {big.more_tasks} more tasks" in text
        assert f"... {small.more_groups} more groups" in text
        assert len(text.splitlines()) < 60


async def test_limit_of_one() -> None:
    """The smallest tree shows one task, and counts what is left."""
    async with TaskManager() as manager:
        manager.create_task(rest(), name="first")
        manager.create_task(rest(), name="second")
        manager.create_task(rest(), group="other")
        tree = manager.tree(limit=1)
        assert [task.name for task in tree.root.tasks] == ["first"]
        assert (tree.root.more_tasks, tree.root.more_groups) == (1, 1)
        assert str(tree).splitlines()[2:] == ["├── ... 1 more task", "└── ... 1 more group"]


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "many", None])
def test_wrong_limit_is_refused(limit: Any) -> None:
    """A limit below 1, or none at all, says what it must be."""
    with pytest.raises(ValueError, match=r"limit must be the number of .* at least 1"):
        TaskManager().tree(limit=limit)


async def test_deep_tree_is_cut() -> None:
    """Deeply nested parts are counted instead, so that neither this nor JSON runs out of stack."""
    async with TaskManager() as manager:
        manager.create_task(rest(), name="deep", group=".".join(["a"] * 100))
        tree = manager.tree(limit=1000)
        assert len(list(nodes(tree.root))) == 50
        assert str(tree).splitlines()[-1].endswith("└── ... 1 more group")


def slices_of(slices: Generator[None, None, T]) -> tuple[T, int]:
    """What a generator returns, and after how many slices."""
    count = 0
    while True:
        count += 1
        try:
            next(slices)
        except StopIteration as end:
            return end.value, count


@pytest.mark.parametrize("groups", [1, 20, 600])
async def test_big_tree_is_taken_and_written_in_slices(groups: int) -> None:
    """A slice has so many nodes, in few groups and in many; the tree is that of one step."""
    async with TaskManager() as manager:
        for number in range(600):
            manager.create_task(rest(), name=f"import-{number}", group=f"group {number % groups}")
        await settle()
        tree, taken = slices_of(take_tree(manager, 2000))
        assert tree == manager.tree(limit=2000)
        assert taken >= 600 / ROWS_PER_SLICE
        data, count = slices_of(task_tree.tree_data(tree))
        assert (data, count >= 600 / COUNTS_PER_SLICE) == (tree.to_dict(), True)
        text, count = slices_of(task_tree.tree_text(tree))
        assert (text, count >= 600 / COUNTS_PER_SLICE) == (str(tree), True)
        assert text.count("import-") == 600
        await manager.cancel_all_tasks()


async def test_nodes_show_the_moment_of_their_slice() -> None:
    """A task that ends between two slices has its outcome and no place, and a group that ends is empty."""
    async with TaskManager() as manager:
        for number in range(ROWS_PER_SLICE):
            manager.create_task(rest(), name=f"first-{number}", group="first")
        async with manager.group("block") as block:
            ended = manager.create_task(rest(), name="ended", group="first")
            block.create_task(rest())
            await settle()
            slices = take_tree(manager, 100)
            next(slices)
            ended.cancel()
            block.cancel()
        tree = at_once(slices)
        node = find(tree, "ended")
        assert (node.status, node.where) == (TaskStatus.CANCELLED, None)
        first, closed = tree.root.groups
        assert (first.live, len(first.tasks), first.more_tasks) == (ROWS_PER_SLICE + 1, ROWS_PER_SLICE + 1, 0)
        assert (closed.name, closed.live, closed.tasks) == ("block", 0, ())
        await manager.cancel_all_tasks()


async def test_tree_that_is_broken_off_keeps_nothing() -> None:
    """Between two slices, neither frames nor tasks are kept once the generator is closed."""
    async with TaskManager() as manager:
        tasks = [manager.create_task(rest()) for _ in range(50)]
        await settle()
        slices = take_tree(manager, 100)
        next(slices)
        slices.close()
        for task in tasks:
            task.cancel()
        references = [weakref.ref(task) for task in tasks]
        del tasks, task
        await settle()
        assert not any(reference() for reference in references)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(["root", "a", "a.b", "a.b.c", "d", "e.f"]), max_size=40),
    st.integers(min_value=1, max_value=50),
)
def test_tree_is_never_larger_than_its_limit_and_nothing_is_lost(groups: list[str], limit: int) -> None:
    """However tasks are spread: no more than the limit is shown, and of each group shown the sum is right."""

    async def scenario() -> None:
        async with TaskManager() as manager:
            for group in groups:
                manager.create_task(rest(), group=group)
            tree = manager.tree(limit=limit)
            shown = list(nodes(tree.root))
            assert len(shown) <= limit
            for node in [tree.root, *shown]:
                if isinstance(node, GroupNode):
                    assert len(node.tasks) + node.more_tasks == node.live == groups.count(node.id)
            everything = len(groups) + len({part for group in groups for part in parts_of(group)})
            if everything <= limit:
                assert len(shown) == everything

    run(scenario())


def parts_of(group: str) -> set[str]:
    """A group and those above it, the root aside."""
    parts = group.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts) + 1)} - {"root"}


async def test_snapshot_holds_no_task() -> None:
    """A tree that is kept keeps nothing else in being."""
    async with TaskManager() as manager:
        task = manager.create_task(rest(), name="work")
        await settle()
        tree = manager.tree()
        await manager.cancel_all_tasks()
        gone = weakref.ref(task)
        del task
        gc.collect()
        assert gone() is None
        assert tree.root.tasks[0].status is TaskStatus.RUNNING


async def test_looking_keeps_nothing_until_the_next_collection() -> None:
    """The inspecting function's variables are freed when it returns, without the collector."""

    class Thing:
        pass

    async def looks() -> weakref.ref[Thing]:
        thing = Thing()
        str(manager.tree())
        return weakref.ref(thing)

    async with TaskManager() as manager:
        gc.disable()
        try:
            assert (await manager.create_task(looks()))() is None
        finally:
            gc.enable()


@pytest.mark.real_clock
async def test_tree_is_taken_while_a_thread_creates_tasks() -> None:
    """Tasks that come and go meanwhile do no harm."""
    stop = threading.Event()
    trees: list[TaskTree] = []

    def looks(manager: TaskManager) -> None:
        while not stop.is_set():
            trees.append(manager.tree())
            str(trees[-1])

    async with TaskManager() as manager:
        looking = asyncio.create_task(asyncio.to_thread(looks, manager))
        end = time.monotonic() + 0.3
        while time.monotonic() < end or len(trees) < 5:
            tasks = [manager.create_task(asyncio.sleep(0), group=f"g.{n % 7}") for n in range(50)]
            async with manager.group("block") as group:
                group.create_task(asyncio.sleep(0))
            await asyncio.gather(*tasks)
        stop.set()
        await looking


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0ms"),
        (0.25, "250ms"),
        (0.9994, "999ms"),
        (0.9996, "1.0s"),
        (12.34, "12.3s"),
        (60.0, "1m00s"),
        (3599.9, "59m59s"),
        (3600.0, "1h00m"),
        (86399.0, "23h59m"),
        (90000.0, "1d01h"),
    ],
)
def test_duration_in_few_characters(seconds: float, text: str) -> None:
    """A duration is written with the units that matter."""
    assert duration(seconds) == text


async def test_age_is_that_of_the_loop() -> None:
    """Ages are on the loop's own clock."""
    async with TaskManager() as manager:
        manager.create_task(rest(), name="work")
        begin = now()
        await asyncio.sleep(42)
        assert manager.tree().root.tasks[0].age == now() - begin == 42


async def test_failed_task_is_shown_as_ended() -> None:
    """A task that has just ended is listed with its final status until it is recorded."""
    async with TaskManager(on_error=lambda info, error: None) as manager:
        task = manager.create_task(fail(ValueError()), name="fails")
        seen: list[str] = []
        task.add_done_callback(lambda _: None)
        asyncio.get_running_loop().call_soon(lambda: seen.append(str(manager.tree())))
        await settle()
        assert "(T) fails: failed" in seen[0]
