"""The options that a group or a manager sets for its tasks."""

from __future__ import annotations

import asyncio
import gc
import math
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks import QueueFullError, RestartPolicy, TaskGroup, TaskManager
from tests.helpers import give, rest

if TYPE_CHECKING:
    from collections.abc import Callable

    from otel_tasks.testing import SpanRecorder


# -- labeled groups -------------------------------------------------------------------------


async def test_labeled_group_gets_its_options_where_it_is_first_named() -> None:
    """A limit, a queue, and a timeout for its tasks, in one call."""
    manager = TaskManager()
    mail = manager.get_group("mail", max_concurrency=1, max_queue=1, timeout=5.0)
    running = manager.create_task(rest(), group="mail")
    waiting = manager.create_task(rest(), group="mail")
    with pytest.raises(QueueFullError, match=r"max_concurrency=1, max_queue=1"):
        mail.create_task(rest())
    await asyncio.wait([running, waiting])
    assert isinstance(running.exception(), TimeoutError)
    assert isinstance(waiting.exception(), TimeoutError)


async def test_group_with_options_is_not_forgotten_while_it_is_empty() -> None:
    """Nobody holds it, and the label still has its limit afterwards."""
    manager = TaskManager()
    manager.get_group("mail", timeout=1.0)
    manager.get_group("plain")
    gc.collect()
    task = manager.create_task(rest(), group="mail")
    await asyncio.wait([task])
    assert isinstance(task.exception(), TimeoutError)


async def test_call_without_options_returns_the_group_as_it_is() -> None:
    """The options stay, and so does a limit that was changed at run time."""
    manager = TaskManager()
    mail = manager.get_group("mail", max_concurrency=4)
    mail.max_concurrency = 8
    assert manager.get_group("mail") is mail
    assert manager.get_group("mail", max_concurrency=4) is mail
    assert mail.max_concurrency == 8


async def test_other_options_for_a_group_are_refused() -> None:
    """The message shows both, and the first ones stay in force."""
    manager = TaskManager()
    mail = manager.get_group("mail", max_concurrency=4, timeout=30)
    with pytest.raises(
        ValueError,
        match=r"^group 'mail' has been given other options before: "
        r"get_group\('mail', max_concurrency=4, timeout=30\), "
        r"and now get_group\('mail', max_concurrency=2\); "
        r"set them once, and call get_group\('mail'\) elsewhere$",
    ):
        manager.get_group("mail", max_concurrency=2)
    assert mail.max_concurrency == 4


async def test_live_tasks_count_against_a_limit_that_comes_later() -> None:
    """A group that was used before may still get its options."""
    manager = TaskManager()
    first = manager.create_task(rest(), group="mail")
    mail = manager.get_group("mail", max_concurrency=1, max_queue=0)
    with pytest.raises(QueueFullError):
        mail.create_task(rest())
    first.cancel()
    await asyncio.wait([first])
    assert await mail.create_task(give(1)) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_concurrency": 0}, ValueError, "max_concurrency must be at least 1, or None"),
        ({"max_queue": 5}, ValueError, "max_queue=5 needs max_concurrency"),
        ({"timeout": -1}, ValueError, "timeout must"),
        ({"timeout": "1"}, TypeError, "timeout must"),
        ({"trace": "fresh"}, ValueError, "trace must be one of 'child', 'new', got 'fresh'"),
    ],
)
async def test_bad_option_is_refused_and_names_no_group(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """The label does not exist afterwards, so that a corrected call succeeds."""
    manager = TaskManager()
    with pytest.raises(error, match=message):
        manager.get_group("mail", **options)
    manager.get_group("mail", timeout=1.0)


async def test_root_group_takes_its_options_from_the_manager() -> None:
    """The message has the call to write."""
    with pytest.raises(ValueError, match=r"write TaskManager\(max_concurrency=2\)$"):
        TaskManager().get_group("root", max_concurrency=2)


async def test_task_overrides_the_timeout_of_its_group() -> None:
    """A longer one, and infinity for none."""
    manager = TaskManager()
    mail = manager.get_group("mail", timeout=1.0)
    longer = mail.create_task(asyncio.sleep(2.0, "late"), timeout=3.0)
    endless = mail.create_task(asyncio.sleep(9.0, "later"), timeout=math.inf)
    assert [await longer, await endless] == ["late", "later"]


async def test_options_do_not_apply_to_groups_below() -> None:
    """``mail.bulk`` is a group of its own."""
    manager = TaskManager()
    manager.get_group("mail", timeout=1.0)
    assert await manager.create_task(asyncio.sleep(2.0, "late"), group="mail.bulk") == "late"


async def test_service_has_no_timeout_from_its_group() -> None:
    """The default is meant for tasks that end."""
    manager = TaskManager()
    manager.get_group("feeds", timeout=1.0)
    service = await manager.start_service("feed", lambda: asyncio.sleep(5.0, "done"), group="feeds")
    assert await service == "done"


# -- traces ---------------------------------------------------------------------------------


async def test_group_can_give_each_task_a_trace_of_its_own(spans: SpanRecorder) -> None:
    """A labeled group and a block; a task may still be a child."""
    manager = TaskManager(tracer_provider=spans.provider)
    jobs = manager.get_group("jobs", trace="new")
    with spans.provider.get_tracer("test").start_as_current_span("creator"):
        await jobs.create_task(give(1), name="labeled")
        await jobs.create_task(give(1), name="child", trace="child")
        async with TaskGroup("block", trace="new", manager=manager) as block:
            block.create_task(give(1), name="in_block")
        async with (
            manager.group("second", trace="new") as second,
            second.group("third", trace="new") as third,
        ):
            second.create_task(give(1), name="in_second")
            third.create_task(give(1), name="in_third")
    assert [span.name for span in spans.children(spans.span("creator"))] == ["child"]
    creator = spans.span("creator").context
    for name in ("labeled", "in_block", "in_third"):
        assert spans.span(name).parent is None
        assert [link.context for link in spans.span(name).links] == [creator]


async def test_manager_can_give_each_task_a_trace_of_its_own(spans: SpanRecorder) -> None:
    """A group, and then a task, may decide otherwise; what a task starts has its own trace too."""
    manager = TaskManager(tracer_provider=spans.provider, trace="new")
    manager.get_group("reports", trace="child")

    async def outer() -> None:
        await manager.create_task(give(1), name="inner")
        await manager.create_task(give(1), name="part", trace="child")

    with spans.provider.get_tracer("test").start_as_current_span("creator"):
        await manager.create_task(give(1), name="report", group="reports")
        await manager.create_task(outer(), name="outer", group="jobs")
    assert [span.name for span in spans.children(spans.span("creator"))] == ["report"]
    assert [span.name for span in spans.children(spans.span("outer"))] == ["part"]
    assert spans.span("outer").parent is spans.span("inner").parent is None


async def test_eager_and_queued_tasks_follow_their_group(spans: SpanRecorder) -> None:
    """Their spans start on other paths."""
    manager = TaskManager(tracer_provider=spans.provider, eager_start=True)
    jobs = manager.get_group("jobs", trace="new", max_concurrency=1)
    with spans.provider.get_tracer("test").start_as_current_span("creator"):
        first = jobs.create_task(asyncio.sleep(1.0), name="first")
        second = jobs.create_task(give(1), name="second")
        await first
        await second
    assert spans.children(spans.span("creator")) == []


async def test_tasks_of_a_service_have_traces_of_their_own(spans: SpanRecorder) -> None:
    """Each links to the attempt that started it; what they start in turn is in their trace."""
    manager = TaskManager(tracer_provider=spans.provider)

    async def job() -> None:
        await manager.create_task(give(1), name="step")

    async def consume() -> None:
        async with manager.group("jobs") as jobs:
            jobs.create_task(job(), name="job")
        with spans.provider.get_tracer("test").start_as_current_span("poll"):
            await manager.create_task(job(), name="polled")
        await manager.create_task(give(1), name="part", trace="child")

    await (await manager.start_service("consume", consume))
    attempt = spans.span("consume")
    assert sorted(span.name for span in spans.children(attempt)) == ["part", "poll"]
    for name, creator in (("job", attempt), ("polled", spans.span("poll"))):
        root = spans.span(name)
        assert root.parent is None
        assert [link.context for link in root.links] == [creator.context]
        assert [span.name for span in spans.children(root)] == ["step"]


async def test_next_attempt_gives_its_tasks_own_traces_too(spans: SpanRecorder) -> None:
    """The rule belongs to the service, not to its first attempt."""
    manager = TaskManager(tracer_provider=spans.provider)
    attempts = 0

    async def work() -> None:
        nonlocal attempts
        attempts += 1
        await manager.create_task(give(attempts), name="job")
        if attempts == 1:
            raise OSError

    await (await manager.start_service("work", work, restart=RestartPolicy(delay=1.0)))
    assert [job.parent for job in spans.spans("job")] == [None, None]


async def test_block_with_a_span_keeps_the_tasks_of_a_service_together(spans: SpanRecorder) -> None:
    """Its span has an end, and was asked for."""
    manager = TaskManager(tracer_provider=spans.provider)

    async def work() -> None:
        async with manager.group("batch", span=True) as batch:
            batch.create_task(give(1), name="job")

    await (await manager.start_service("work", work))
    assert [span.name for span in spans.children(spans.span("batch"))] == ["job"]
    assert [span.name for span in spans.children(spans.span("work"))] == ["batch"]


async def test_part_of_a_service_keeps_its_parts_in_its_trace(spans: SpanRecorder) -> None:
    """``trace="child"`` counts for the whole task, not for its span alone."""
    manager = TaskManager(tracer_provider=spans.provider)

    async def part() -> None:
        await manager.create_task(give(1), name="detail")

    async def work() -> None:
        await manager.create_task(part(), name="part", trace="child")

    await (await manager.start_service("work", work))
    assert [span.name for span in spans.children(spans.span("part"))] == ["detail"]


@pytest.mark.parametrize("trace", ["none", True, 3])
async def test_unknown_trace_is_refused(trace: Any) -> None:
    """Everywhere, with the choices; the coroutine is closed."""
    manager = TaskManager()
    calls: list[Callable[[], object]] = [
        lambda: manager.create_task(give(1), trace=trace),
        lambda: TaskManager(trace=trace),
        lambda: TaskGroup("x", trace=trace),
        lambda: manager.group("x", trace=trace),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^trace must be one of 'child', 'new', got "):
            call()
    with pytest.raises(ValueError, match=r"^trace must be one of 'child', 'new', got "):
        await manager.start_task("x", lambda: give(1), trace=trace)
