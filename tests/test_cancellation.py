"""CancelCause as data, and the rules of the tree of CancelEvents."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks import CancelCause, CancelEvent, CancelKind, TaskManager, current_cancel_event
from otel_tasks._core.cancellation import sleep_unless_set
from otel_tasks._core.events import TREE_LOCK
from otel_tasks.testing import run
from tests.helpers import now, settle

if TYPE_CHECKING:
    from otel_tasks.testing import SpanRecorder

CAUSE = CancelCause(CancelKind.CLIENT_DISCONNECT, "the client left")


async def test_cause_records_its_origin_and_time() -> None:
    """A cause made in a task has that task's name and the loop's time."""
    cause = CancelCause.make(CancelKind.EXPLICIT, "enough")
    task = asyncio.current_task()
    assert task is not None
    assert cause == CancelCause(CancelKind.EXPLICIT, "enough", task.get_name(), now(), None)


def test_cause_can_be_made_outside_of_a_loop() -> None:
    """A cause made in a thread without a loop has a time and no asker."""
    cause = CancelCause.make(CancelKind.SHUTDOWN)
    assert cause.asked_by is None
    assert cause.at is not None


async def test_cause_made_in_a_callback_has_no_asker() -> None:
    """In a bare callback of the loop, no task makes the request."""
    made: list[CancelCause] = []
    asyncio.get_running_loop().call_soon(lambda: made.append(CancelCause.make(CancelKind.TIMEOUT)))
    await settle()
    assert made[0].asked_by is None
    assert made[0].at == now()


def test_cause_notes_the_current_span(spans: SpanRecorder) -> None:
    """The origin of a cause is the span that was current where it was made."""
    with spans.provider.get_tracer("test").start_as_current_span("request") as span:
        cause = CancelCause.make(CancelKind.CLIENT_DISCONNECT)
    assert cause.origin == span.get_span_context()
    assert cause.to_dict()["span_id"] == f"{span.get_span_context().span_id:016x}"


def test_cause_reads_as_kind_and_message() -> None:
    """A cause's text is its kind, with the message behind it if there is one."""
    assert str(CAUSE) == "client_disconnect: the client left"
    assert str(CancelCause(CancelKind.REPLACED)) == "replaced"


def test_cause_is_json_ready() -> None:
    """to_dict() gives what json can write; without a span its ids are null."""
    assert json.loads(json.dumps(CAUSE.to_dict())) == {
        "kind": "client_disconnect",
        "message": "the client left",
        "asked_by": None,
        "trace_id": None,
        "span_id": None,
    }


def test_cause_is_frozen() -> None:
    """A cause does not change after the fact."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        CAUSE.message = "other"  # type: ignore[misc]  # that it is refused is the test


def test_set_reaches_every_descendant_before_it_returns() -> None:
    """Rule 1: after set() the whole tree below is set, with the same cause."""
    top = CancelEvent()
    middle = [CancelEvent(top) for _ in range(3)]
    leaves = [CancelEvent(event) for event in middle for _ in range(3)]
    top.set(CAUSE)
    assert all(event.is_set() and event.cause is CAUSE for event in [top, *middle, *leaves])


def test_set_reaches_a_very_deep_descendant() -> None:
    """The walk down is a loop: ten thousand levels are no RecursionError."""
    events = [CancelEvent()]
    for _ in range(10_000):
        events.append(CancelEvent(events[-1]))
    events[0].set(CAUSE)
    assert events[-1].is_set()
    while events:
        # From the leaf up: each holds its parent, and a chain is freed recursively.
        events.pop()


def test_childs_set_reaches_neither_parent_nor_sibling() -> None:
    """Rule 2: cancellation goes down the tree only."""
    top = CancelEvent()
    first, second = CancelEvent(top), CancelEvent(top)
    first.set(CAUSE)
    assert not top.is_set()
    assert not second.is_set()


def test_child_of_a_set_parent_is_born_set() -> None:
    """Rule 3: a late child has its parent's cause from the start."""
    top = CancelEvent()
    top.set(CAUSE)
    child = CancelEvent(top)
    assert child.is_set()
    assert child.cause is CAUSE
    assert child.parent is top


def test_first_cause_stays() -> None:
    """Rule 4: a second set() changes nothing, neither here nor below."""
    top = CancelEvent()
    child = CancelEvent(top)
    child.set(CAUSE)
    top.set(CancelCause(CancelKind.SHUTDOWN))
    top.set(CancelCause(CancelKind.TIMEOUT))
    assert top.cause == CancelCause(CancelKind.SHUTDOWN)
    assert child.cause is CAUSE


def test_grandchild_below_a_set_child_is_reached_once() -> None:
    """A subtree that is set already is not walked again."""
    top = CancelEvent()
    child = CancelEvent(top)
    grandchild = CancelEvent(child)
    child.set(CAUSE)
    top.set(CancelCause(CancelKind.SHUTDOWN))
    assert grandchild.cause is CAUSE


def test_second_thread_waits_until_the_first_has_reached_all() -> None:
    """Rule 1, for both threads: a set() that finds the event set waits until the first is through."""
    event = CancelEvent()
    event.set(CAUSE)
    returned = threading.Event()

    def set_again() -> None:
        event.set()
        returned.set()

    second = threading.Thread(target=set_again)
    with TREE_LOCK:
        # As the first one does for as long as it goes down.
        second.start()
        assert not returned.wait(0.05)
    second.join(10)
    assert returned.is_set()
    assert event.cause is CAUSE


def test_set_without_a_cause_notes_an_explicit_one() -> None:
    """set() works as asyncio.Event's, without an argument."""
    event = CancelEvent()
    assert event.cause is None
    event.set()
    assert event.cause is not None
    assert event.cause.kind is CancelKind.EXPLICIT


def test_parent_does_not_hold_its_children() -> None:
    """Rule 5: a dropped child is freed at once, and its parent forgets it."""
    top = CancelEvent()
    child = weakref.ref(CancelEvent(top))
    assert child() is None
    assert not top._children
    top.set(CAUSE)


def test_child_holds_its_parent() -> None:
    """Rule 5: an event in the middle that everybody else dropped still passes the signal on."""
    top = CancelEvent()
    leaf = CancelEvent(CancelEvent(top))
    gc.collect()
    top.set(CAUSE)
    assert leaf.is_set()


def test_dropped_tree_leaves_nothing_behind() -> None:
    """Parent and children are freed together without a collection of cycles."""
    gc.disable()
    try:
        top = CancelEvent()
        child = CancelEvent(top)
        ends = [weakref.ref(top), weakref.ref(child)]
        del top, child
        assert [end() for end in ends] == [None, None]
    finally:
        gc.enable()


async def test_set_wakes_the_waiters_of_descendants() -> None:
    """A waiter of a descendant wakes within one turn of the loop."""
    top = CancelEvent()
    waiter = asyncio.create_task(CancelEvent(top).wait())
    await settle()
    top.set(CAUSE)
    await asyncio.sleep(0)
    assert waiter.done()
    assert waiter.result() is True


async def test_waiter_that_was_cancelled_is_passed_over() -> None:
    """A waiter that is just being cancelled does not disturb the others."""
    event = CancelEvent()
    gone, here = asyncio.create_task(event.wait()), asyncio.create_task(event.wait())
    await settle()
    gone.cancel()
    event.set(CAUSE)
    await asyncio.wait([gone, here])
    assert gone.cancelled()
    assert here.result() is True


async def test_wait_returns_at_once_when_set() -> None:
    """wait() on a set event does not suspend."""
    event = CancelEvent()
    event.set(CAUSE)
    assert await event.wait() is True


def test_clear_is_refused() -> None:
    """An event is one-way."""
    with pytest.raises(
        RuntimeError, match=r"^a CancelEvent is one-way: create a new one instead of clearing it$"
    ):
        CancelEvent().clear()


async def test_is_set_can_be_read_from_a_thread() -> None:
    """A thread may look whether it should stop."""
    event = CancelEvent()
    seen: list[bool] = []
    event.set(CAUSE)
    thread = threading.Thread(target=lambda: seen.append(event.is_set()))
    thread.start()
    thread.join()
    assert seen == [True]


@pytest.mark.parametrize("how", ["cancelled", "woken"])
async def test_delay_leaves_no_timer_and_no_waiter(how: str) -> None:
    """An interrupted delay leaves neither a timer in the loop nor a waiter at the event."""
    loop: Any = asyncio.get_running_loop()
    event = CancelEvent()
    task = asyncio.create_task(sleep_unless_set(500, event))
    await settle()
    if how == "woken":
        event.set()
    else:
        task.cancel()
    await asyncio.wait([task])
    assert not event._waiters
    assert [timer for timer in loop._scheduled if not timer.cancelled()] == []


async def test_delay_of_nothing_ends_in_the_next_turn() -> None:
    """Without a delay, the next attempt starts at once, and the event forgets the waiter."""
    event = CancelEvent()
    start = now()
    await sleep_unless_set(0, event)
    assert now() == start
    assert not event._waiters


def test_event_of_a_group_moves_with_its_manager() -> None:
    """A wait for it in the next loop works, also without a shutdown in between; so does a cancellation."""
    manager = TaskManager()
    group = manager.get_group("mail")
    event = group.cancel_event

    async def wait_for(seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return await current_cancel_event().wait()
        except TimeoutError:
            return False

    async def wait_twice() -> None:
        assert await group.create_task(wait_for(1.0)) is False
        assert await manager.create_task(wait_for(1.0)) is False

    async def cancel() -> None:
        waiting = asyncio.create_task(event.wait())
        await asyncio.sleep(1.0)
        group.cancel()
        assert await waiting

    for scenario in (wait_twice, wait_twice, cancel):
        run(scenario())
    assert group.cancel_event is not event
