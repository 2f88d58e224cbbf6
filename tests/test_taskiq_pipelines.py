"""taskiq-pipelines under managed(): what its callers learn of a step that ends without a result."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from taskiq import Context, TaskiqDepends, TaskiqMiddleware
from taskiq_pipelines import Pipeline, PipelineMiddleware

from otel_tasks.taskiq import RemoteCancelledError, labels
from tests.shared_queue import SharedQueue, working
from tests.test_taskiq import Node, started

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from taskiq import TaskiqMessage, TaskiqResult


class Step:
    """The functions of a pipeline, on one node: `slow` takes a while, `last` ends it."""

    def __init__(self, queue: SharedQueue) -> None:
        self.node = Node(queue)
        self.node.broker.add_middlewares(PipelineMiddleware())

        async def slow(seconds: float) -> float:
            self.node.log.append("slow")
            await asyncio.sleep(seconds)
            return seconds

        async def last(seconds: float, context: Context = TaskiqDepends()) -> str:  # noqa: B008 - Taskiq's way
            self.node.log.append("last")
            return f"slept {seconds:g} s, {context.message.labels['_pipe_current_step']}"

        self.slow = self.node.task(slow, **labels(name="slow"))
        self.last = self.node.task(last)

    async def send(self, seconds: float) -> Any:
        """Start the pipeline."""
        return await Pipeline(self.node.broker, self.slow).call_next(self.last).kiq(seconds)


@asynccontextmanager
async def pipeline(seconds: float) -> AsyncIterator[tuple[Step, Any]]:
    """A sender, whose pipeline is in the queue, and the pipeline's result to come."""
    sender = Step(SharedQueue())
    async with started(sender.node):
        yield sender, await sender.send(seconds)


async def test_cancelled_step_fails_the_pipeline_with_its_cause() -> None:
    """The caller learns why, as with a single task."""
    async with pipeline(600) as (sender, sent):
        worker = Step(sender.node.broker.queue)
        async with working(worker.node.broker):
            await asyncio.sleep(1)
            await sender.node.fleet.cancel_task("slow", "not needed", asked_by="ada")
            result = await sent.wait_result(timeout=5)
        assert isinstance(result.error, RemoteCancelledError)
        assert "not needed" in str(result.error)
        assert worker.node.log == ["slow"]


async def test_step_that_is_cancelled_in_the_queue_fails_the_pipeline_with_its_cause() -> None:
    """It never runs, and neither does the next one."""
    async with pipeline(600) as (sender, sent):
        await sender.node.fleet.cancel_group("taskiq", "maintenance", timeout=0)
        await sender.node.fleet.cancel_task("slow", "not needed", timeout=0)
        worker = Step(sender.node.broker.queue)
        async with working(worker.node.broker):
            result = await sent.wait_result(timeout=5)
        assert isinstance(result.error, RemoteCancelledError)
        assert worker.node.log == []


async def test_late_step_fails_the_pipeline_with_a_timeout() -> None:
    """As a single task that misses its deadline does."""
    sender = Step(SharedQueue())
    async with started(sender.node):
        kicker = sender.slow.kicker().with_labels(**labels(timeout=2))
        sent = await Pipeline(sender.node.broker, kicker).call_next(sender.last).kiq(600)
        async with working(Step(sender.node.broker.queue).node.broker):
            result = await sent.wait_result(timeout=5)
        assert isinstance(result.error, TimeoutError)


async def test_duplicate_of_a_step_does_not_fail_its_pipeline() -> None:
    """Redis Streams deliver a long step again while it runs: it runs once, and the pipeline goes on."""
    async with pipeline(20) as (sender, sent):
        one, two = (Step(sender.node.broker.queue) for _ in range(2))
        async with working(one.node.broker):
            await asyncio.sleep(1)
            async with working(two.node.broker):
                for _ in range(2):
                    sender.node.broker.queue.deliver_twice()
                    await asyncio.sleep(1)
                result = await sent.wait_result(timeout=30)
                await asyncio.sleep(5)
            assert result.return_value == "slept 20 s, 1"
            assert (await sent.get_result()).return_value == "slept 20 s, 1"
        assert sorted(one.node.log + two.node.log) == ["last", "slow"]


async def test_step_of_a_worker_that_stops_continues_on_another() -> None:
    """The pipeline has not failed: its caller waits for the other worker."""
    async with pipeline(5) as (sender, sent):
        one, two = (Step(sender.node.broker.queue) for _ in range(2))
        async with working(one.node.broker):
            await asyncio.sleep(1)
            await one.node.manager.shutdown(grace=0.0)
        assert not await sent.is_ready()
        async with working(two.node.broker):
            result = await sent.wait_result(timeout=10)
        assert result.return_value == "slept 5 s, 1"
        assert (one.node.log, two.node.log) == (["slow"], ["slow", "last"])


async def test_other_middlewares_see_the_end_as_before() -> None:
    """`post_execute` gets the labels of the step, and a `NoResultError`."""
    seen: list[Any] = []

    class Recorder(TaskiqMiddleware):
        def post_execute(self, message: TaskiqMessage, result: TaskiqResult[Any]) -> None:
            seen.append(("_pipe_current_step" in message.labels, type(result.error).__name__))

    async with pipeline(600) as (sender, sent):
        worker = Step(sender.node.broker.queue)
        worker.node.broker.add_middlewares(Recorder())
        async with working(worker.node.broker):
            await asyncio.sleep(1)
            await sender.node.fleet.cancel_task("slow")
            await sent.wait_result(timeout=5)
    assert seen == [(True, "ExecutionEndedError")]
