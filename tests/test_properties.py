"""Random trees of groups and tasks, with random cancels, failures and timeouts: what holds for all."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import gc
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st

from otel_tasks import ManagedTask, TaskGroup, TaskManager, TaskStatus
from otel_tasks._core.shields import shield, unshield
from otel_tasks.testing import SpanRecorder, assert_no_tasks_left, run
from tests.helpers import ignore_cancels

if TYPE_CHECKING:
    from otel_tasks._core.scope import OnError

LABELS = ("a", "a.b", "a.b.c", "d")
SECONDS = st.integers(0, 4)


@dataclass(frozen=True)
class Work:
    """A task to be: what it does, and the block it opens for its children."""

    what: str
    seconds: int
    timeout: int | None
    priority: int
    isolate: bool
    block_timeout: int | None
    children: tuple[Work, ...]


@dataclass(frozen=True)
class Cancel:
    """Cancel a task, a block, or a labeled group; the number picks one of them."""

    after: int
    what: str
    number: int


def works(children: st.SearchStrategy[tuple[Work, ...]]) -> st.SearchStrategy[Work]:
    return st.builds(
        Work,
        what=st.sampled_from(["return", "fail", "ignore", "foreign", "shield", "uncancel", "replace"]),
        seconds=SECONDS,
        timeout=st.none() | SECONDS,
        priority=st.integers(0, 3),
        isolate=st.booleans(),
        block_timeout=st.none() | SECONDS,
        children=children,
    )


WORK = st.recursive(
    works(st.just(())), lambda work: works(st.lists(work, max_size=3).map(tuple)), max_leaves=6
)
CANCEL = st.builds(
    Cancel,
    after=SECONDS,
    what=st.sampled_from(["task", "block", "label", "await"]),
    number=st.integers(0, 20),
)


@dataclass
class World:
    """Runs a plan, and knows of each task and block what is above it: not from the library, from the plan."""

    manager: TaskManager
    tasks: list[ManagedTask[None]] = field(default_factory=list)
    blocks: list[TaskGroup] = field(default_factory=list)
    parents: dict[object, object] = field(default_factory=dict)
    reasons: list[tuple[str, object]] = field(default_factory=list)

    def create(self, work: Work, group: TaskGroup, parent: object) -> None:
        task = group.create_task(
            self.perform(work),
            name="work",
            on_conflict="replace" if work.what == "replace" else "suffix",
            timeout=work.timeout,
            priority=work.priority,
        )
        self.tasks.append(task)
        self.parents[task] = parent

    async def perform(self, work: Work) -> None:
        task = asyncio.current_task()
        assert isinstance(task, ManagedTask)
        if work.children:
            on_error: OnError = "isolate" if work.isolate else "cancel"
            async with self.manager.group("block", on_error=on_error, timeout=work.block_timeout) as block:
                self.blocks.append(block)
                self.parents[block] = task
                for child in work.children:
                    self.create(child, block, block)
                await self.act(work, task)
        else:
            await self.act(work, task)

    async def act(self, work: Work, task: ManagedTask[Any]) -> None:
        if work.what == "ignore":
            await ignore_cancels(work.seconds)
        elif work.what == "shield":
            shield(task)
            try:
                await asyncio.sleep(work.seconds)
            finally:
                unshield(task)
        elif work.what == "uncancel":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await asyncio.sleep(work.seconds)
        else:
            await asyncio.sleep(work.seconds)
        if work.what == "fail":
            raise ValueError("planned")
        if work.what == "foreign":
            raise asyncio.CancelledError

    def is_below(self, node: object, top: object) -> bool:
        while node is not None and node != top:
            # A labeled group's parent is in its name; the others are in the plan.
            node = node.rpartition(".")[0] or None if isinstance(node, str) else self.parents[node]
        return node is not None

    async def cancel(self, cancel: Cancel, reason: str) -> None:
        """Cancel something; then check that all that is below it was asked, and nothing else."""
        before = {task: task.cause for task in self.tasks}
        if cancel.what == "label":
            top: object = LABELS[cancel.number % len(LABELS)]
            group = self.manager.get_group(str(top))
            event = group.cancel_event
            group.cancel(reason)
            assert event.is_set()
            # A labeled group stays usable.
            assert not group.cancel_event.is_set()
        elif cancel.what == "block" and self.blocks:
            top = block = self.blocks[cancel.number % len(self.blocks)]
            block.cancel(reason)
        elif self.tasks:
            top = task = self.tasks[cancel.number % len(self.tasks)]
            task.cancel(reason)
        else:
            return
        self.reasons.append((reason, top))
        for task, cause in before.items():
            if task.done() or cause is not None:
                assert task.cause == cause
            elif task is top or (cancel.what in ("label", "block") and self.is_below(task, top)):
                assert task.cause is not None
                assert task.cause.message == reason
            else:
                assert task.cause is None


async def drive(manager: TaskManager, plan: list[tuple[str, Work]], cancels: list[Cancel]) -> World:
    world = World(manager)
    for label, work in plan:
        world.create(work, manager.get_group(label), label)
    passed = 0
    for number, cancel in enumerate(sorted(cancels, key=lambda cancel: cancel.after)):
        await asyncio.sleep(cancel.after - passed)
        passed = cancel.after
        await world.cancel(cancel, f"reason {number}")
    await asyncio.sleep(1)
    assert (await manager.shutdown(grace=1, timeout=100)).clean
    await assert_no_tasks_left()
    return world


def check(world: World, heard: list[tuple[str, str]], spans: SpanRecorder) -> None:
    counts = collections.Counter(task.status for task in world.tasks)
    assert all(status.is_final for status in counts)
    stats = world.manager.stats()
    assert (stats.live, stats.created) == (0, len(world.tasks))
    assert stats.completed == counts[TaskStatus.COMPLETED]
    assert stats.failed == counts[TaskStatus.FAILED]
    assert stats.cancelled == counts[TaskStatus.CANCELLED]
    assert stats.cancel_ignored == sum(task.cancel_ignored for task in world.tasks)
    # Listeners see every task once at its start and once at its end; so does the span processor its span.
    events = collections.Counter(event for event, _ in heard)
    assert events["created"] == events["ended"] == stats.created
    spans.check()
    assert len(spans.finished) == stats.created
    # A cause reaches only what is below what was cancelled.
    for reason, top in world.reasons:
        for task in world.tasks:
            if task.cause is not None and task.cause.message == reason:
                assert world.is_below(task, top)
    # Nothing is left in the records.
    ledger = world.manager._ledger
    assert not ledger.scopes
    assert not ledger.hosts
    assert not world.manager._root._live
    assert not world.manager._root._children
    assert len(world.manager.get_all_task_info()) <= stats.created


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    plan=st.lists(st.tuples(st.sampled_from(LABELS), WORK), min_size=1, max_size=4),
    cancels=st.lists(CANCEL, max_size=4),
)
def test_random_trees_keep_the_rules(plan: list[tuple[str, Work]], cancels: list[Cancel]) -> None:
    """Each task ends once, in one status, with one span; a cancel reaches what is below and no other."""
    heard: list[tuple[str, str]] = []
    with SpanRecorder() as spans, warnings.catch_warnings():
        warnings.simplefilter("error")
        manager = TaskManager(
            on_error=lambda info, error: None,
            tracer_provider=spans.provider,
            meter_provider=spans.meter_provider,
        )
        manager.add_listener(lambda event, info: heard.append((event, info.id)))
        check(run(drive(manager, plan, cancels)), heard, spans)
    # The young ones only: a full collection per example would take most of the time.
    gc.collect(1)
