"""TaskGroup: names and conflicts, nesting by dots, cancelling what is below, the current group."""

from __future__ import annotations

import asyncio
import contextvars
import enum
import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks import (
    CancelCause,
    CancelEvent,
    CancelKind,
    GroupClosedError,
    TaskExistsError,
    TaskGroup,
    TaskManager,
    TaskStatus,
    create_task,
    current_cancel_event,
    current_group,
    current_task,
    global_task_manager,
)
from tests.helpers import counters, fail, give, ignore_cancels, now, rest, settle

if TYPE_CHECKING:
    from otel_tasks._core.options import OnConflict
    from otel_tasks.testing import SpanRecorder

DISCONNECT = CancelCause(CancelKind.CLIENT_DISCONNECT, "gone")


# -- names -----------------------------------------------------------------------------------------


async def test_name_is_made_from_the_functions_name() -> None:
    """Without a name a task is called after its function, from the second one on with a number."""
    manager = TaskManager()
    assert [manager.create_task(give(n)).name for n in range(3)] == ["give", "give-2", "give-3"]
    await manager.join()


async def test_made_name_avoids_a_given_one() -> None:
    """A generated name skips names that were given to other tasks."""
    manager = TaskManager()
    manager.create_task(give(0), name="give-2")
    assert [manager.create_task(give(n)).name for n in range(2)] == ["give", "give-3"]
    await manager.join()


async def test_made_name_avoids_as_many_as_were_given() -> None:
    """After thousands of names with numbers, the library can still generate the next one."""
    manager = TaskManager()
    for number in range(1, 2001):
        manager.create_task(give(number), name=f"give-{number}")
    assert [manager.create_task(give(0)).name for _ in range(2)] == ["give", "give-2001"]
    await manager.join()


async def test_name_may_be_a_member_of_an_enumeration() -> None:
    """The characters of a str that is also an Enum are the name, wherever it is read."""

    class Work(str, enum.Enum):  # noqa: UP042  # a StrEnum's text is its characters anyway
        SYNC = "sync"

    manager = TaskManager()
    task = manager.create_task(give(1), name=Work.SYNC, group=Work.SYNC)
    assert (task.name, task.id, task.group.id) == ("sync", "sync", "sync")
    assert manager.get_task("sync") is task
    with pytest.raises(TaskExistsError):
        manager.create_task(give(2), name="sync", on_conflict="error")
    await task
    await settle()
    info = manager.get_task_info("sync")
    assert info is not None
    assert info.group == "sync"
    assert manager.stats().live == 0


async def test_names_are_unique_among_all_labeled_groups() -> None:
    """A name is taken in the whole manager, whichever labeled group has the task."""
    manager = TaskManager()
    manager.create_task(rest(), name="a", group="one")
    with pytest.raises(TaskExistsError):
        manager.create_task(rest(), name="a", group="two", on_conflict="error")
    await manager.shutdown(0)


async def test_scoped_group_has_names_of_its_own() -> None:
    """In a scoped group a name is unique among its own tasks, and its id has the group's before it."""
    manager = TaskManager()
    outside = manager.create_task(give(1), name="a")
    async with manager.group("load") as group:
        inside = group.create_task(give(2), name="a", on_conflict="error")
        assert (outside.id, inside.id) == ("a", f"{group.id}/a")
        assert group.id.startswith("load#")


async def test_name_is_free_again_after_the_end() -> None:
    """Only live tasks hold their names; a done task does not, even before its callbacks have run."""
    manager = TaskManager()
    manager.create_task(give(1), name="a")
    await asyncio.sleep(0)
    second = manager.create_task(give(2), name="a", on_conflict="error")
    assert await second == 2
    assert second.name == "a"
    assert manager.stats().completed == 2


async def test_conflict_error_names_the_task_and_the_options() -> None:
    """on_conflict="error" refuses, closes the coroutine, and leaves the live one alone."""
    manager = TaskManager()
    first = manager.create_task(rest(), name="mail", group="outbox")
    with pytest.raises(
        TaskExistsError,
        match=r"^cannot create task 'mail': a task with that name is pending in group 'outbox'; wait for it, "
        r'choose another name, or pass on_conflict="suffix", "return" or "replace"$',
    ):
        manager.create_task(rest(), name="mail", on_conflict="error")
    assert manager.get_task("mail") is first
    assert first.cancelling() == 0
    await manager.shutdown(0)


async def test_conflict_suffix_makes_another_name() -> None:
    """on_conflict="suffix", create_task's own, makes fetch-2, and then numbers that are free."""
    manager = TaskManager()
    names = [manager.create_task(rest(), name="fetch").name for _ in range(3)]
    assert names[:2] == ["fetch", "fetch-2"]
    assert len(set(names)) == 3
    await manager.shutdown(0)


async def test_conflict_return_gives_the_live_task() -> None:
    """on_conflict="return" gives the live one and closes the coroutine."""
    manager = TaskManager()
    first = manager.create_task(rest(), name="a")
    assert manager.create_task(rest(), name="a", on_conflict="return") is first
    assert manager.stats().created == 1
    await manager.shutdown(0)
    gc.collect()


async def test_conflict_replace_waits_for_the_old_ones_end() -> None:
    """on_conflict="replace" cancels the old one, which has ended before the new one's first step."""
    manager = TaskManager()
    order: list[str] = []

    async def tidy() -> None:
        try:
            await rest()
        finally:
            await asyncio.sleep(3)
            order.append("old ended")

    async def work() -> None:
        order.append("new began")

    old = manager.create_task(tidy(), name="a")
    await settle()
    new = manager.create_task(work(), name="a", on_conflict="replace")
    assert manager.get_task("a") is new
    assert new.status is TaskStatus.PENDING
    await asyncio.sleep(1)
    assert new.status is TaskStatus.PENDING
    await new
    assert order == ["old ended", "new began"]
    assert old.cause is not None
    assert (old.cause.kind, old.cause.message) == (CancelKind.REPLACED, "replaced by a new task 'a'")
    assert new.cause is None


async def test_replaced_replacement_still_waits_for_the_first() -> None:
    """A third task waits for the first one too, although the second never started."""
    manager = TaskManager()
    first = manager.create_task(ignore_cancels(50), name="a")
    await settle()
    second = manager.create_task(rest(), name="a", on_conflict="replace")
    await settle()

    async def look() -> bool:
        return first.done()

    assert await manager.create_task(look(), name="a", on_conflict="replace") is True
    assert second.status is TaskStatus.CANCELLED
    assert second.info().started_at is None


async def test_replacing_task_can_be_cancelled_while_it_waits() -> None:
    """A replacement that is cancelled before its turn runs none of its code."""
    manager = TaskManager()
    first = manager.create_task(ignore_cancels(5), name="a")
    await settle()
    second = manager.create_task(rest(), name="a", on_conflict="replace")
    await settle()
    second.cancel()
    await asyncio.wait([second])
    assert second.status is TaskStatus.CANCELLED
    assert second.info().started_at is None
    await first
    gc.collect()


async def test_timeout_of_a_replacement_counts_from_its_creation() -> None:
    """Waiting for the old one is part of a replacement's time."""
    manager = TaskManager()
    first = manager.create_task(ignore_cancels(5), name="a")
    await settle()
    start = now()
    with pytest.raises(TimeoutError):
        await manager.create_task(rest(), name="a", on_conflict="replace", timeout=2)
    assert now() - start == 2
    await first
    gc.collect()


async def test_refused_replacement_leaves_the_old_one_alone() -> None:
    """Arguments are checked before anything is cancelled."""
    manager = TaskManager()
    old = manager.create_task(rest(), name="a")
    with pytest.raises(ValueError, match="timeout"):
        manager.create_task(rest(), name="a", on_conflict="replace", timeout=-1)
    assert old.cancelling() == 0
    assert manager.get_task("a") is old
    await manager.shutdown(0)


@pytest.mark.parametrize("on_conflict", ["suffix", "error", "return", "replace"])
async def test_conflict_with_a_task_that_is_just_done_is_none(on_conflict: OnConflict) -> None:
    """A task that is done, with its callbacks still to run, causes no conflict."""
    manager = TaskManager()
    old = manager.create_task(give("old"), name="a")
    await asyncio.sleep(0)
    assert old.done()
    new = manager.create_task(give("new"), name="a", on_conflict=on_conflict)
    assert await new == "new"
    assert new.name == "a"
    await settle()
    assert counters(manager) == {"created": 2, "completed": 2, "remembered": 2}
    assert not manager._root.tasks


# -- labeled groups --------------------------------------------------------------------------------


async def test_labelled_group_is_made_on_first_use_and_kept_while_used() -> None:
    """The same name is the same group as long as it is used."""
    manager = TaskManager()
    task = manager.create_task(rest(), group="ingest")
    group = manager.get_group("ingest")
    assert task.group is group
    assert (group.name, group.id, group.scoped) == ("ingest", "ingest", False)
    assert group.tasks == (task,)
    assert manager.get_group("root") is group.parent
    await manager.shutdown(0)


async def test_groups_nest_by_dots() -> None:
    """A group "a.b.c" is below "a.b", which is below "a"."""
    manager = TaskManager()
    group = manager.get_group("a.b.c")
    above: list[str] = []
    while group.parent is not None:
        group = group.parent
        above.append(group.name)
    assert above == ["a.b", "a", "root"]


async def test_emptied_labeled_group_costs_nothing() -> None:
    """When its last task ends, a labeled group leaves the tree and is freed."""
    manager = TaskManager()
    group = weakref.ref(manager.get_group("a.b"))
    await manager.create_task(give(1), group="a.b")
    await settle()
    gc.collect()
    assert group() is None
    assert not manager._ledger.labels
    assert not manager._root._children


async def test_failure_in_a_labeled_group_stays_with_its_task() -> None:
    """Siblings of a failed task in a labeled group keep running."""
    manager = TaskManager()
    sibling = manager.create_task(asyncio.sleep(1, "fine"), group="g")
    with pytest.raises(ValueError, match="no"):
        await manager.create_task(fail(ValueError("no")), group="g")
    assert await sibling == "fine"


async def test_cancelling_a_group_reaches_its_descendants_and_nothing_else() -> None:
    """Cancelling "ingest" cancels "ingest.fetch" and scoped groups below it; other tasks continue."""
    manager = TaskManager()
    inside = [manager.create_task(rest(), group=name) for name in ("ingest", "ingest.fetch", "ingest.a.b")]
    outside = [manager.create_task(rest(), group=name) for name in ("ingestion", "other", None)]
    await settle()
    manager.get_group("ingest").cancel("enough")
    assert [task.cause and task.cause.message for task in inside] == ["enough"] * 3
    assert [task.cause for task in outside] == [None] * 3
    await asyncio.wait(inside)
    assert all(task.cancelled() for task in inside)
    await manager.shutdown(0)


async def test_cancellation_refuses_then_sets_events_then_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each step, all groups below are at the same point, so no code sees a tree that is half cancelled."""
    manager = TaskManager()
    seen: list[tuple[list[bool], list[bool], list[int]]] = []
    set_event = CancelEvent.set
    async with manager.group("outer") as outer, outer.group("inner") as inner:
        groups, events = (outer, inner), (outer.cancel_event, inner.cancel_event)
        tasks = [group.create_task(rest()) for group in groups]

        def look() -> None:
            refusing = [group._refusal is not None for group in groups]
            seen.append(
                (refusing, [event.is_set() for event in events], [task.cancelling() for task in tasks])
            )

        def look_and_set(event: CancelEvent, cause: CancelCause | None = None) -> None:
            look()
            set_event(event, cause)

        monkeypatch.setattr(CancelEvent, "set", look_and_set)
        manager.add_listener(lambda event, _: look() if event == "cancelling" else None)
        outer.cancel()
    both = [True, True]
    assert seen == [(both, [False, False], [0, 0]), (both, both, [1, 0]), (both, both, [1, 1])]


async def test_group_cancels_newest_first() -> None:
    """An older task may own what a newer one uses: the newest is cancelled first."""
    manager = TaskManager()
    order: list[int] = []

    async def work(number: int) -> None:
        try:
            await rest()
        finally:
            order.append(number)

    for number in range(3):
        manager.create_task(work(number), group="g")
    await settle()
    manager.get_group("g").cancel()
    await manager.join()
    assert order == [2, 1, 0]


async def test_cancelled_labeled_group_has_a_fresh_event() -> None:
    """A labeled group stays usable: new tasks see an event that is not set."""
    manager = TaskManager()
    task = manager.create_task(rest(), group="g")
    group = manager.get_group("g")
    event = group.cancel_event
    group.cancel("enough")
    assert event.is_set()
    assert event.cause is not None
    assert event.cause.message == "enough"
    assert not group.cancel_event.is_set()
    await asyncio.wait([task])
    assert await group.create_task(give(1)) == 1


async def test_empty_groups_below_have_fresh_events_too() -> None:
    """A group that is empty while one above it is cancelled is usable afterwards."""
    manager = TaskManager()
    below, deeper = manager.get_group("a.b"), manager.get_group("a.b.c")
    events = [below.cancel_event, deeper.cancel_event]
    manager.get_group("a").cancel()
    assert all(event.is_set() for event in events)
    assert not deeper.cancel_event.is_set()
    assert not below.cancel_event.is_set()
    assert deeper.cancel_event.parent is below.cancel_event


async def test_held_event_keeps_its_group_connected() -> None:
    """A held event of an empty labeled group is set when that group is cancelled later."""
    manager = TaskManager()
    event = manager.get_group("g").cancel_event
    gc.collect()
    manager.get_group("g").cancel()
    assert event.is_set()


async def test_task_of_a_cancelled_group_that_awaits_another_is_cancelled_once() -> None:
    """A cancellation that arrives through an awaited task of the same group counts as the group's."""
    manager = TaskManager()
    inner = manager.create_task(rest(), group="g")

    async def outer() -> None:
        await inner

    task = manager.create_task(outer(), group="g")
    await settle()
    manager.get_group("g").cancel("enough")
    assert (task.cancelling(), inner.cancelling()) == (1, 1)
    assert inner.cause is task.cause
    await asyncio.wait([task, inner])


async def test_join_waits_for_all_that_is_below() -> None:
    """join() of a group returns when nothing is live in it and below it."""
    manager = TaskManager()
    manager.create_task(asyncio.sleep(2), group="a")
    manager.create_task(asyncio.sleep(5), group="a.b")
    manager.create_task(asyncio.sleep(9), group="c")
    start = now()
    await manager.get_group("a").join()
    assert now() - start == 5
    await manager.join()


async def test_join_waits_for_tasks_created_meanwhile() -> None:
    """join() also waits for a task that is started while it waits."""
    manager = TaskManager()
    group = manager.get_group("g")

    async def parent() -> None:
        await asyncio.sleep(1)
        group.create_task(asyncio.sleep(3))

    group.create_task(parent())
    start = now()
    await group.join()
    assert now() - start == 4


async def test_join_of_a_task_that_is_just_done_returns() -> None:
    """A done task whose callbacks have not run does not keep join() busy."""
    manager = TaskManager()
    task = manager.create_task(give(1))
    await asyncio.sleep(0)
    assert task.done()
    await manager.join()
    assert manager.stats().live == 0


async def test_task_that_joins_its_own_group_does_not_wait_for_itself() -> None:
    """The calling task is left out of a join."""
    manager = TaskManager()
    manager.create_task(asyncio.sleep(2), group="g")
    await manager.create_task(manager.get_group("g").join(), group="g")
    assert manager.stats().live == 0


@pytest.mark.parametrize("order", ["jjx", "xjj", "jxj", "jjxx", "xjxjxj"])
@pytest.mark.parametrize("at_once", [True, False])
async def test_tasks_that_join_the_group_they_share_do_not_wait_for_each_other(
    order: str, at_once: bool
) -> None:
    """In any order of arrival, and whatever each waits for at that point, all return with the last one."""
    group = TaskManager().get_group("g")
    start = now()

    async def join() -> None:
        await asyncio.sleep(0)
        await group.join()

    tasks = []
    for seconds, kind in enumerate(order, 1):
        tasks.append(group.create_task(join() if kind == "j" else asyncio.sleep(seconds)))
        if not at_once:
            await settle()
    await asyncio.wait(tasks, timeout=100)
    assert all(task.done() for task in tasks)
    assert now() - start == order.rindex("x") + 1


async def test_labeled_group_cannot_be_entered() -> None:
    """A labeled group is already open; the message shows what can be entered."""
    with pytest.raises(
        RuntimeError,
        match=r"^group 'mail' is already open and cannot be entered: "
        r'write async with manager\.group\("name"\)$',
    ):
        async with TaskManager().get_group("mail"):
            raise AssertionError("unreachable")


async def test_repr_shows_the_state_of_a_group() -> None:
    """The repr shows id, state and number of live tasks."""
    manager = TaskManager()
    manager.create_task(rest(), group="g")
    assert repr(manager.get_group("g")) == "<TaskGroup 'g' is open, 1 live tasks>"
    assert repr(TaskGroup("load")) == "<TaskGroup 'load' has not been entered, 0 live tasks>"
    manager.get_group("g")._signal_cancel(DISCONNECT)
    assert repr(manager.get_group("g")) == "<TaskGroup 'g' is being cancelled, 1 live tasks>"
    await manager.shutdown(0)


# -- groups without a block: a request's -----------------------------------------------------------


async def test_cancel_spares_the_given_tasks() -> None:
    """The caller that is going to wait, or a task that has the message already, is left alone."""
    manager = TaskManager()
    spared, other = manager.create_task(rest(), group="g"), manager.create_task(rest(), group="g")
    assert manager.get_group("g")._cancel_tasks(DISCONNECT, spared=[spared]) == 1
    assert spared.cancelling() == 0
    assert other.cause is DISCONNECT
    await manager.shutdown(0)


# -- the current group -----------------------------------------------------------------------------


async def test_create_task_joins_the_enclosing_tasks_group() -> None:
    """create_task() in a managed task creates in that task's group."""
    manager = TaskManager()

    async def parent() -> list[Any]:
        child = create_task(give(1))
        task = current_task()
        return [task and task.name, current_group(), child.group, current_cancel_event(), await child]

    group = manager.get_group("g")
    found = await group.create_task(parent(), name="parent")
    assert found == ["parent", group, group, group.cancel_event, 1]


async def test_outside_of_all_tasks_the_current_group_is_the_global_root() -> None:
    """By default, a task belongs to the global manager."""
    assert current_task() is None
    assert current_group() is global_task_manager.get_group("root")
    task = create_task(give(1))
    assert task.group is current_group()
    assert await task == 1


def test_current_objects_can_be_read_without_a_loop() -> None:
    """Outside of a loop there is no current task, and the current group is the global root."""
    assert current_task() is None
    assert current_group() is global_task_manager.get_group("root")
    assert not current_cancel_event().is_set()


async def test_binding_in_the_context_beats_the_current_task() -> None:
    """A request's handler has its group by context; a task started from it elsewhere has its own group."""
    manager = TaskManager()
    from otel_tasks._core.binding import current_binding

    bound = manager.get_group("request")
    token = current_binding.set(bound)
    try:
        assert current_group() is bound

        async def look() -> TaskGroup:
            return current_group()

        assert await create_task(look()) is bound
        assert await manager.create_task(look(), group="outbox") is manager.get_group("outbox")
        plain = asyncio.create_task(look())
        assert await plain is bound
    finally:
        current_binding.reset(token)


async def test_create_task_closes_the_coroutine_where_the_binding_refuses() -> None:
    """The stand-in for the current group may refuse; then the coroutine is closed."""
    from otel_tasks._core.binding import current_binding

    class Refusing:
        _request = None

        @property
        def manager(self) -> TaskManager:
            return global_task_manager

        @property
        def task_group(self) -> TaskGroup:
            raise LookupError("no request")

    token = current_binding.set(Refusing())
    try:
        with pytest.raises(LookupError):
            create_task(rest())
    finally:
        current_binding.reset(token)
    gc.collect()


async def test_task_runs_in_the_context_it_is_given() -> None:
    """context= is where a task runs; without tracing it is not copied."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="")
    context = contextvars.copy_context()

    async def work() -> None:
        variable.set("changed")

    await TaskManager().create_task(work(), context=context)
    assert context[variable] == "changed"
    assert variable.get() == ""


async def test_given_context_is_copied_for_a_span(spans: SpanRecorder) -> None:
    """With tracing the user's own context object is left alone."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="")
    context = contextvars.copy_context()
    before = list(context.items())

    async def work() -> None:
        variable.set("changed")

    await TaskManager(tracer_provider=spans.provider).create_task(work(), context=context)
    assert list(context.items()) == before


async def test_task_can_start_a_new_trace(spans: SpanRecorder) -> None:
    """trace="new" links to the creator's span instead of being its child."""
    manager = TaskManager(tracer_provider=spans.provider)
    with spans.provider.get_tracer("test").start_as_current_span("creator") as creator:
        await manager.create_task(give(1), name="child")
        await manager.create_task(give(1), name="loose", trace="new")
    assert [span.name for span in spans.children(spans.span("creator"))] == ["child"]
    loose = spans.span("loose")
    assert loose.parent is None
    assert [link.context for link in loose.links] == [creator.get_span_context()]


async def test_block_below_a_group_that_has_not_been_entered_is_refused() -> None:
    """It would hang outside of the tree, where no shutdown sees it."""
    manager = TaskManager()
    with pytest.raises(
        GroupClosedError,
        match=r"^group 'b' cannot be entered: the group above it, 'a', has not been entered; "
        r"enter it inside the block of that group$",
    ):
        async with manager.group("a").group("b"):
            pass
    assert not manager._ledger.hosts


async def test_block_below_a_finished_group_is_refused() -> None:
    """A finished group takes no work through a block below it, and does not return to the tree."""
    manager = TaskManager()
    async with manager.group("a") as over:
        pass
    with pytest.raises(GroupClosedError, match=r"the group above it, 'a#1', is finished"):
        async with over.group("b"):
            pass
    assert not manager._root._children


async def test_tasks_created_in_the_grace_are_waited_for_and_counted() -> None:
    """cancel_group() cancels all that is live after its grace, and so it waits for all of that."""
    manager = TaskManager()

    async def first() -> None:
        await asyncio.sleep(1)
        manager.create_task(rest(), group="g")
        await rest()

    manager.create_task(first(), group="g")
    assert await manager.cancel_group("g", grace=2) == 2
    assert manager.stats().live == 0


async def test_label_does_not_hide_blocks_of_its_name() -> None:
    """cancel_group() reaches the labeled group and the blocks of that name."""
    manager = TaskManager()
    manager.create_task(rest(), group="load")
    async with manager.group("load") as block:
        task = block.create_task(rest())
        await settle()
        assert await manager.cancel_group("load") == 2
        await rest()
    assert task.cancelled()


async def test_group_of_no_manager_is_refused() -> None:
    """The message says what to pass."""
    with pytest.raises(
        TypeError, match=r"^manager must be a TaskManager, got 3: leave it out for the current"
    ):
        TaskGroup(manager=3)  # type: ignore[arg-type]  # that is the mistake
