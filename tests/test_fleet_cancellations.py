"""Cancellations: what applies to a remote task that is about to start, or that runs."""

from __future__ import annotations

import asyncio
import gc
from itertools import permutations
from typing import Literal

import pytest

from otel_tasks import TaskManager
from otel_tasks.fleet import cancellations as module
from otel_tasks.fleet.bus import KEPT, Entry, position_of
from otel_tasks.fleet.cancellations import Cancellations, Sent
from otel_tasks.fleet.entries import CancelEntry, decode, encode
from tests.helpers import rest, settle


def cancelled(
    kept: Cancellations,
    target: Literal["task", "group", "message"],
    name: str,
    position: str = "5-0",
    age: float = 0.0,
    node: str = "a",
    post: int | None = None,
) -> CancelEntry:
    """Let a cancellation be read."""
    entry = CancelEntry(node=node, target=target, name=name, at=0.0, post=post)
    kept.record(entry, Entry(position, b"", False, age))
    return entry


def after(position: str) -> Sent:
    """A task whose sender had read the log up to a position."""
    return Sent(position_of(position))


async def test_nothing_is_cancelled_at_first() -> None:
    """A lookup in an empty memory finds nothing."""
    assert Cancellations().find("4711", "render", "paper", after("1-0")) is None


async def test_a_message_is_found_by_its_id() -> None:
    """Only its own, and whatever its name and group are."""
    kept = Cancellations()
    entry = cancelled(kept, "message", "4711")
    assert kept.find("4711") is entry
    assert kept.find("4711", "render", "paper", after("4-9")) is entry
    assert kept.find("4712", "4711", "4711", after("1-0")) is None


async def test_a_task_is_found_by_its_name() -> None:
    """A message without a name is not."""
    kept = Cancellations()
    entry = cancelled(kept, "task", "render")
    assert kept.find("4711", "render", None, after("1-0")) is entry
    assert kept.find("4711", None, "render", after("1-0")) is None


@pytest.mark.parametrize(
    ("group", "applies"),
    [
        ("tenant.acme", True),
        ("tenant.acme.mail", True),
        ("tenant.acme.mail.out", True),
        ("tenant", False),
        ("tenant.acmes", False),
        (None, False),
    ],
)
async def test_a_group_is_found_by_the_dots_in_its_label(group: str | None, applies: bool) -> None:
    """A cancellation reaches the group and those below it."""
    kept = Cancellations()
    cancelled(kept, "group", "tenant.acme")
    assert (kept.find("4711", None, group, after("1-0")) is not None) is applies


async def test_the_root_is_all() -> None:
    """A cancellation of the root reaches messages of every group, and of none."""
    kept = Cancellations()
    cancelled(kept, "group", "root")
    assert kept.find("4711", None, "tenant.acme", after("1-0")) is not None
    assert kept.find("4711", None, None, after("1-0")) is not None


async def test_what_is_sent_after_a_cancellation_runs() -> None:
    """Positions decide, not clocks; an unknown one is before all."""
    kept = Cancellations()
    entry = cancelled(kept, "task", "render", "1000-5")
    found = [
        kept.find("x", "render", None, after(at)) for at in ("999-0", "1000-4", "1000-5", "1001-0", "0-0")
    ]
    assert found == [entry, entry, None, None, entry]


async def test_the_newest_cancellation_of_a_name_counts() -> None:
    """It takes the place of the older one."""
    kept = Cancellations()
    cancelled(kept, "task", "render", "5-0")
    newer = cancelled(kept, "task", "render", "9-0")
    assert len(kept) == 1
    assert kept.find("x", "render", None, after("7-0")) is newer


async def test_numbers_order_what_one_node_sends_while_its_cancellations_wait() -> None:
    """What its sender had posted before it spares a task, and what comes later or from elsewhere does not."""
    kept = Cancellations()
    cancelled(kept, "task", "render", "9-0", node="a", post=7)
    found = [
        kept.find("x", "render", None, Sent((5, 0), sender, posted)) is None
        for sender, posted in (("a", 7), ("a", 8), ("a", 6), ("b", 7), (None, 0))
    ]
    assert found == [True, True, False, False, False]
    cancelled(kept, "task", "export", "9-1", node="a")
    assert kept.find("x", "export", None, Sent((5, 0), "a", 7)) is not None


@pytest.mark.parametrize("order", list(permutations(range(4))))
async def test_a_cancellation_that_spares_a_task_hides_no_other(order: tuple[int, ...]) -> None:
    """The newest one of another node counts, however the log gives them."""
    log = [("a", "6-0"), ("b", "7-0"), ("a", "8-0"), ("a", "9-0")]
    kept = Cancellations()
    for number in order:
        node, position = log[number]
        cancelled(kept, "task", "render", position, node=node, post=number)
    found = kept.find("x", "render", None, Sent((5, 0), "a", 9))
    assert found is not None
    assert found.node == "b"
    assert kept.find("x", "render", None, Sent((7, 0), "a", 9)) is None
    of_b = kept.find("x", "render", None, Sent((5, 0), "b", 9))
    assert of_b is not None
    assert of_b.post == 3
    assert len(kept) == 1


async def test_an_older_cancellation_that_comes_again_changes_nothing() -> None:
    """Its sender sends it again after the server has lost its data."""
    kept = Cancellations()
    newest = cancelled(kept, "task", "render", "9-0")
    cancelled(kept, "task", "render", "5-0", age=60.0)
    cancelled(kept, "task", "render", "1-0", age=KEPT)
    assert kept.find("x", "render", None, after("7-0")) is newest


@pytest.mark.parametrize("extra", ["", "x" * 5000])
async def test_a_cancellation_is_found_as_it_was_read(extra: str) -> None:
    """Its bytes are kept, unless they are long: then its fields are."""
    kept = Cancellations()
    sent = CancelEntry(
        node="a", target="task", name="render", at=1.0, message="stopped", asked_by="ana", post=7
    )
    payload = encode(sent, extra=extra)
    kept.record(decode_cancel(payload), Entry("5-0", payload, False, 0.0))
    assert kept.find("x", "render", None, after("1-0")) == sent


def decode_cancel(payload: bytes) -> CancelEntry:
    """Read a cancellation."""
    entry = decode(payload)
    assert isinstance(entry, CancelEntry)
    return entry


async def test_a_cancellation_is_forgotten_after_an_hour() -> None:
    """By the age that the bus gives, which counts on here."""
    kept = Cancellations()
    cancelled(kept, "message", "old", "1-0", age=KEPT - 10)
    cancelled(kept, "message", "new", "2-0", age=KEPT - 60)
    cancelled(kept, "message", "too old", "0-1", age=KEPT)
    assert [kept.find(name) is not None for name in ("old", "new", "too old")] == [True, True, False]
    await asyncio.sleep(20)
    assert [kept.find(name) is not None for name in ("old", "new")] == [False, True]
    await asyncio.sleep(60)
    cancelled(kept, "message", "next", "3-0")
    assert len(kept) == 1


async def test_there_is_a_limit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The oldest ones are forgotten, and one line says so."""
    monkeypatch.setattr(module, "LIMIT", 100)
    kept = Cancellations()
    for number in range(150):
        cancelled(kept, "message", str(number), f"{number}-0")
    assert len(kept) == 100
    assert kept.find("49") is None
    assert kept.find("50") is not None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "more than 100 cancellations per hour" in caplog.messages[0]


async def test_an_execution_is_found_while_it_runs() -> None:
    """By the id of its message; nothing has to be undone, and nothing is kept of it."""
    manager = TaskManager()
    kept = Cancellations()
    task = manager.create_task(rest())
    kept.track("4711", task, after("7-0"))
    assert kept.execution_of("4711") is task
    assert kept.sent(task) == after("7-0")
    task.cancel()
    await settle()
    assert kept.execution_of("4711") is None
    del task
    gc.collect()
    assert not kept._running
    assert not kept._sent


async def test_an_execution_of_unknown_position_has_none() -> None:
    """A task of this process has none either."""
    manager = TaskManager()
    kept = Cancellations()
    task = manager.create_task(rest())
    kept.track("4711", task)
    assert kept.sent(task) is None
    task.cancel()
    await settle()
