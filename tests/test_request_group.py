"""RequestGroup: a request's group, which the middleware opens, cancels and seals."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from otel_tasks import CancelCause, CancelKind, GroupClosedError, TaskManager
from otel_tasks._core.request_group import RequestGroup
from tests.helpers import give, rest, settle

if TYPE_CHECKING:
    from otel_tasks.testing import SpanRecorder

DISCONNECT = CancelCause(CancelKind.CLIENT_DISCONNECT, "gone")


async def test_request_group_is_named_late_and_found_by_its_number() -> None:
    """A request's group gets its route's name later; it is found and removed anyway."""
    manager = TaskManager()
    name = ["GET"]
    group = RequestGroup.open(manager, lambda: name[0], binding=None, host=None, span=False)
    early = group.id
    name[0] = "GET /orders/{id}"
    task = group.create_task(rest(), name="work")
    assert group.id == f"GET /orders/{{id}}#{early.partition('#')[2]}"
    assert manager.get_task(f"{group.id}/work") is task
    group.cancel()
    await asyncio.wait([task])
    await settle()
    group.seal()
    assert not manager._ledger.scopes
    assert not manager._root._children


async def test_sealed_request_group_takes_no_more_and_leaves_when_empty() -> None:
    """A sealed group refuses new tasks and leaves the tree with its last one."""
    manager = TaskManager()
    group = RequestGroup.open(manager, "GET /orders", binding=None, host=None, span=False)
    task = group.create_task(rest())
    group.seal(DISCONNECT)
    with pytest.raises(GroupClosedError, match=rf"group '{group.id}' is closed \(client_disconnect\); "):
        group.create_task(rest(), name="send_mail")
    assert manager._ledger.scopes
    task.cancel()
    await asyncio.wait([task])
    await settle()
    assert not manager._ledger.scopes


async def test_sealed_group_without_a_cause_is_finished() -> None:
    """A group that was sealed because its request ended says so; sealing twice changes nothing."""
    group = RequestGroup.open(TaskManager(), "GET", binding=None, host=None, span=False)
    group.seal()
    group.seal(DISCONNECT)
    with pytest.raises(GroupClosedError, match="is finished; work that outlives the block belongs in"):
        group.create_task(rest())


async def test_request_group_has_a_span_on_request(spans: SpanRecorder) -> None:
    """span=True gives a request's group a span that its tasks are children of."""
    manager = TaskManager(tracer_provider=spans.provider)
    group = RequestGroup.open(manager, "GET /orders", binding=None, host=None, span=True)
    await group.create_task(give(1), name="work")
    await settle()
    group.seal()
    assert [span.name for span in spans.children(spans.span("GET /orders"))] == ["work"]


async def test_request_group_contains_the_tasks_of_the_groups_below_it() -> None:
    """A task belongs to a request's group if it was created in it or in a block inside of it."""
    manager = TaskManager()
    group = RequestGroup.open(manager, "GET", binding=None, host=None)
    inside = group.create_task(rest())
    outside = manager.create_task(rest())
    plain = asyncio.get_running_loop().create_task(rest())
    async with group.group("block") as block:
        below = block.create_task(rest())
        assert [group.contains(task) for task in (inside, below, outside, plain, None)] == [
            True,
            True,
            False,
            False,
            False,
        ]
        assert group.live_tasks() == [inside, below]
        block.cancel()
    inside.cancel()
    outside.cancel()
    plain.cancel()
    await asyncio.wait([inside, outside, plain])
