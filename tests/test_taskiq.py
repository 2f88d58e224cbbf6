"""Remote tasks: calls, results, cancellations, priorities, and deadlines, on brokers within the process."""

from __future__ import annotations

import asyncio
import functools
import gc
import json
from collections.abc import AsyncIterator  # noqa: TC003 - Taskiq reads the annotations of dependencies
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from taskiq import (
    Context,
    InMemoryBroker,
    SimpleRetryMiddleware,
    TaskiqDepends,
    TaskiqMessage,
    TaskiqMiddleware,
    async_shared_broker,
)
from taskiq.exceptions import NoResultError
from taskiq.result_backends.dummy import DummyResultBackend

from otel_tasks import (
    CancelKind,
    TaskManager,
    TaskPriority,
    TaskStatus,
    current_cancel_event,
    current_task,
)
from otel_tasks.exceptions import WrongLoopError
from otel_tasks.fleet import Fleet
from otel_tasks.fleet.entries import EndedEntry
from otel_tasks.fleet.memory_bus import memory_server
from otel_tasks.taskiq import (
    RemoteCancelledError,
    RemoteResultError,
    labels,
    managed,
    rabbitmq_priorities,
    remote,
    stream_priorities,
)
from otel_tasks.taskiq.labels import STAMP, read_stamp
from otel_tasks.taskiq.worker import Duplicates, Worker
from tests.shared_queue import QueueBroker, SharedQueue, working

if TYPE_CHECKING:
    from collections.abc import Callable

    from taskiq import AsyncTaskiqDecoratedTask

    from otel_tasks import ManagedTask
    from otel_tasks.testing import SpanRecorder


class Node:
    """One process of the tests' fleet: a manager, a fleet, and a broker with the same tasks as the others."""

    def __init__(self, queue: SharedQueue, spans: SpanRecorder | None = None, **options: Any) -> None:
        provider = None if spans is None else spans.provider
        self.manager = TaskManager("node", tracer_provider=provider, grace=options.pop("grace", 0.0))
        self.fleet = Fleet("memory://", namespace="shop", manager=self.manager)
        self.broker = managed(QueueBroker(queue), self.fleet, **options)
        self.log: list[Any] = []

    def task(self, function: Callable[..., Any], **options: Any) -> AsyncTaskiqDecoratedTask[..., Any]:
        """Declare a task."""
        # Taskiq renames a function that it decorates.
        name = function.__name__.partition("__")[0]
        return self.broker.task(task_name=f"tests:{name}", **options)(function)

    def live(self) -> list[str]:
        """The names of the live tasks."""
        return sorted(
            info.name for info in self.manager.get_all_task_info().values() if not info.status.is_final
        )


@asynccontextmanager
async def started(*nodes: Node) -> AsyncIterator[None]:
    """Start nodes that only send."""
    for node in nodes:
        await node.broker.startup()
    try:
        yield
    finally:
        for node in nodes:
            await node.broker.shutdown()


@asynccontextmanager
async def api_and_worker(**options: Any) -> AsyncIterator[tuple[Node, Node]]:
    """A node that sends, and one that works; the block declares the tasks on both, with `both`."""
    queue = SharedQueue()
    api, worker = Node(queue, **dict(options)), Node(queue, **dict(options))
    async with started(api), working(worker.broker):
        yield api, worker


async def forever(log: list[Any]) -> None:
    """Run until it is cancelled, and note why."""
    log.append("started")
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        task = current_task()
        log.append(None if task is None else str(task.cause))
        raise


# -- calls and results ----------------------------------------------------------------------------


async def test_result_of_the_worker_is_returned() -> None:
    """remote() returns what the function on the worker returns, which runs in the worker's manager."""
    async with api_and_worker() as (api, worker):

        async def add(a: int, b: int) -> list[Any]:
            task = current_task()
            assert task is not None
            return [a + b, task.name, task.group.name]

        worker.task(add)
        call = remote(api.task(add), 1, b=2)
        assert await api.manager.create_task(call) == [3, "add", "taskiq"]


async def test_call_takes_no_time_beyond_the_messages() -> None:
    """The end of a remote task is reported, not polled."""
    async with api_and_worker() as (api, worker):

        async def nothing() -> None: ...

        worker.task(nothing)
        before = asyncio.get_running_loop().time()
        await remote(api.task(nothing))
        assert asyncio.get_running_loop().time() - before < 0.01
        assert api.broker.queue.results.questions == 0


async def test_error_of_the_worker_is_raised_with_its_traceback() -> None:
    """An error on the worker is raised as the result has it, with the remote traceback as a note."""
    async with api_and_worker() as (api, worker):

        async def fail() -> None:
            raise LookupError("no such page")

        worker.task(fail)
        with pytest.raises(LookupError, match="no such page") as caught:
            await remote(api.task(fail))
        (note,) = caught.value.__notes__
        assert note.startswith("On the worker:")
        assert 'raise LookupError("no such page")' in note
        assert "receiver.py" not in note


async def test_local_task_hands_on_its_name_group_and_priority() -> None:
    """The task on the worker has the name, the label, and the priority of the local one."""
    async with api_and_worker() as (api, worker):

        async def describe() -> list[Any]:
            task = current_task()
            assert task is not None
            return [task.name, task.group.name, int(task.priority)]

        worker.task(describe)
        call = remote(api.task(describe))
        task = api.manager.create_task(
            call, name="import-17", group="ingest.fetch", priority=TaskPriority.HIGH
        )
        assert await task == ["import-17", "ingest.fetch", 2]


async def test_plain_message_takes_its_options_from_labels() -> None:
    """A task that kiq() sends has the name, group, and priority of its labels, and no host."""
    async with api_and_worker() as (api, worker):

        async def describe() -> list[Any]:
            task = current_task()
            assert task is not None
            return [task.name, task.group.name, int(task.priority)]

        worker.task(describe)
        task = api.task(describe, **labels(group="reports", priority=TaskPriority.LOW))
        sent = await task.kicker().with_labels(**labels(name="june")).kiq()
        result = await sent.wait_result()
        assert result.return_value == ["june", "reports", 0]


async def test_progress_of_the_worker_is_that_of_the_local_task() -> None:
    """Reports of the worker's task reach the task that consists of the call."""
    async with api_and_worker() as (api, worker):

        async def climb() -> None:
            task = current_task()
            assert task is not None
            task.progress.update(done=3, total=10, message="parsing")
            await asyncio.sleep(5)

        worker.task(climb)
        task = api.manager.create_task(remote(api.task(climb)))
        await asyncio.sleep(2)
        progress = task.info().progress
        assert progress is not None
        assert (progress.done, progress.total, progress.message) == (3, 10, "parsing")
        await task


async def test_lost_message_about_the_end_is_made_up_for() -> None:
    """If the worker's message about the end is lost, the result backend is asked, and not often."""
    async with api_and_worker() as (api, worker):

        async def nothing() -> str:
            return "done"

        worker.task(nothing)
        await asyncio.sleep(1)
        worker.fleet.link.post_to = lambda *_, **__: None  # type: ignore[method-assign]  # it is lost
        assert await remote(api.task(nothing)) == "done"
        assert api.broker.queue.results.questions < 3


async def test_result_that_could_not_be_saved_is_saved_again() -> None:
    """A result backend that is away for seconds costs no result."""
    async with api_and_worker() as (api, worker):

        async def nothing() -> str:
            return "done"

        worker.task(nothing)
        api.broker.queue.results.failures = 3
        assert await remote(api.task(nothing)) == "done"


async def test_result_that_cannot_be_saved_fails_the_call_at_once() -> None:
    """A value that the result backend cannot write fails the call, and holds no slot of the worker."""
    async with api_and_worker() as (api, worker):

        async def refuse(task_id: str, result: Any, save: Any = api.broker.queue.results.set_result) -> None:
            if not result.is_err:
                raise TypeError("cannot pickle '_thread.lock' object")
            await save(task_id, result)

        async def nothing() -> None: ...

        worker.task(nothing)
        vars(api.broker.queue.results)["set_result"] = refuse
        call = remote(api.task(nothing))
        async with asyncio.timeout(1):
            with pytest.raises(Exception, match=r"cannot be saved: TypeError: cannot pickle '_thread.lock'"):
                await call
        await asyncio.sleep(0.1)
        assert (api.broker.queue.acknowledged, worker.live()) == (1, [])


async def test_claim_ends_before_the_acknowledgment() -> None:
    """A worker that dies in between would leave a claim that a duplicate waits for, to run after it."""
    async with api_and_worker() as (api, worker):

        async def nothing() -> None: ...

        worker.task(nothing)
        await asyncio.sleep(0.1)
        bus, queue = worker.fleet.link.bus, api.broker.queue
        send, seen = bus.send, list[tuple[int, int]]()

        async def slow_send(inboxes: Any, **options: Any) -> None:
            seen.append((len(options["finished"]), queue.acknowledged))
            await asyncio.sleep(1.0)
            await send(inboxes, **options)

        with mock.patch.object(bus, "send", slow_send):
            await remote(api.task(nothing))
            await asyncio.sleep(0.5)
        assert (seen, queue.acknowledged) == ([(1, 0)], 1)


async def test_cancellation_wakes_only_what_it_reaches() -> None:
    """A thousand cancellations and a thousand waiting executions are a thousand wakes, not a million."""
    worker = Worker(Fleet("memory://", namespace="shop", manager=TaskManager()), "taskiq")
    names = ("message 1", "message 2", "message 3")
    waiting = [asyncio.create_task(worker.changes([name, "group root"], 60)) for name in names]
    await asyncio.sleep(0)

    async def woken() -> list[bool]:
        await asyncio.sleep(0.01)
        return [task.done() for task in waiting]

    worker.wake_reached("message 4")
    worker.wake_reached("message 2")
    assert await woken() == [False, True, False]
    waiting[0].cancel()
    worker.wake_reached("group root")
    assert await woken() == [True, True, True]
    assert not worker._changes


async def test_result_is_saved_again_without_acknowledgments() -> None:
    """A message that was acknowledged before its result was saved gets the result too."""
    for acknowledged in ("when_received", "when_executed"):
        async with api_and_worker() as (api, worker):

            async def nothing() -> str:
                return "done"

            worker.task(nothing)
            api.broker.queue.results.failures = 3
            kicker = api.task(nothing).kicker().with_labels(ack_type=acknowledged)
            async with asyncio.timeout(20):
                assert await remote(kicker) == "done"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"delivery": ""},
        {"sent_after": "yesterday"},
        {"sent_after": 7},
        {"sent_at": float("nan")},
        {"timeout": float("inf")},
        {"timeout": 10**400},
        {"priority": True},
        {"priority": 0.5},
        {"carrier": {"traceparent": 1}},
    ],
)
async def test_stamp_that_cannot_be_read_is_none(fields: dict[str, Any]) -> None:
    """A message with a malformed stamp is executed as one without, and never fails for it."""
    stamp = json.dumps({"delivery": "d1", **fields} if fields else [])
    assert read_stamp({STAMP: stamp}) is None
    async with api_and_worker() as (_, worker):

        async def nothing() -> None:
            worker.log.append("ran")

        worker.task(nothing)
        message = TaskiqMessage(
            task_id="t", task_name="tests:nothing", labels={STAMP: stamp}, args=[], kwargs={}
        )
        worker.broker.queue.put(worker.broker.formatter.dumps(message).message)
        await asyncio.sleep(1)
        assert worker.log == ["ran"]
        assert worker.broker.queue.acknowledged == 1


# -- cancellations --------------------------------------------------------------------------------


async def test_cancel_reaches_the_worker_with_its_cause() -> None:
    """Cancelling the local task cancels the worker's, with its cause; the message is acknowledged."""
    async with api_and_worker() as (api, worker):
        worker.task(forever_of(worker))
        task = api.manager.create_task(remote(api.task(forever_of(api))), name="import-17")
        await asyncio.sleep(1)
        task.cancel("stopped by the user")
        await asyncio.wait([task])
        await asyncio.sleep(1)
        assert worker.log == ["started", "explicit: stopped by the user"]
        assert api.broker.queue.acknowledged == 1
        assert task.cancelled()


def forever_of(node: Node) -> Callable[..., Any]:
    """Return a task function that logs to a node."""

    async def work() -> None:
        await forever(node.log)

    return work


async def test_caller_is_cancelled_without_waiting_for_the_worker() -> None:
    """The cancelled call ends at once, even if the worker takes its time or the bus is down."""
    async with api_and_worker() as (api, worker):
        worker.task(forever_of(worker))
        task = api.manager.create_task(remote(api.task(forever_of(api))))
        await asyncio.sleep(1)
        memory_server(namespace="shop").fail()
        before = asyncio.get_running_loop().time()
        task.cancel()
        await asyncio.wait([task])
        assert asyncio.get_running_loop().time() == before
        memory_server(namespace="shop").restore()
        await asyncio.sleep(10)
        assert worker.log == ["started", "explicit"]


async def test_cancel_before_any_worker_is_up_is_not_lost() -> None:
    """A message whose call was cancelled while it waited in the queue is acknowledged and does not run."""
    queue = SharedQueue()
    api, worker = Node(queue), Node(queue)
    worker.task(forever_of(worker))
    async with started(api):
        task = api.manager.create_task(remote(api.task(forever_of(api))))
        await asyncio.sleep(1)
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(60)
        async with working(worker.broker):
            await asyncio.sleep(10)
    assert worker.log == []
    assert queue.acknowledged == 1
    (info,) = worker.manager.get_all_task_info().values()
    assert info.status is TaskStatus.CANCELLED
    assert info.started_at is None


async def test_cancel_right_after_the_sending_is_not_lost() -> None:
    """Of many calls cancelled in the turn after their start, none runs to its end."""
    async with api_and_worker() as (api, worker):
        worker.task(forever_of(worker))
        function = api.task(forever_of(api))
        tasks = [api.manager.create_task(remote(function)) for _ in range(200)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await asyncio.sleep(30)
        assert worker.live() == []
        assert not api.broker.queue.delivered


async def test_cancel_that_the_client_of_the_broker_swallows_is_not_lost() -> None:
    """A call whose cancellation is swallowed while the message is sent ends cancelled, and its task too."""
    async with api_and_worker() as (api, worker):
        worker.task(forever_of(worker))
        kick = api.broker.kick

        async def swallow(message: Any) -> None:
            await kick(message)
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(10)

        vars(api.broker)["kick"] = swallow
        task = api.manager.create_task(remote(api.task(forever_of(api))))
        await asyncio.sleep(1)
        task.cancel("enough")
        await asyncio.wait([task], timeout=1)
        await asyncio.sleep(1)
        assert task.cancelled()
        assert worker.log == ["started", "explicit: enough"]


async def test_cancel_on_the_worker_ends_the_call_as_cancelled() -> None:
    """A task that consists of the call ends cancelled with the worker's task, and with its cause."""
    async with api_and_worker() as (api, worker):
        worker.task(forever_of(worker))
        task = api.manager.create_task(remote(api.task(forever_of(api))))
        await asyncio.sleep(1)
        await worker.manager.cancel_group("taskiq", "maintenance")
        await asyncio.wait([task])
        assert task.cancelled()
        assert task.cause is not None
        assert (task.cause.kind, task.cause.message) == (CancelKind.EXPLICIT, "maintenance")


async def test_cancel_on_the_worker_raises_in_a_larger_task() -> None:
    """A task that does more than the call gets RemoteCancelledError, and is not cancelled itself."""
    async with api_and_worker() as (api, worker):
        worker.task(forever_of(worker))

        async def whole() -> str:
            with pytest.raises(RemoteCancelledError, match="maintenance"):
                await remote(api.task(forever_of(api)))
            return "went on"

        task = api.manager.create_task(whole())
        await asyncio.sleep(1)
        await worker.manager.cancel_group("taskiq", "maintenance")
        assert await task == "went on"


async def test_cancelled_task_is_not_retried() -> None:
    """No retry middleware sends a cancelled task again."""
    async with api_and_worker() as (api, worker):
        worker.broker.add_middlewares(SimpleRetryMiddleware(default_retry_label=True))
        worker.task(forever_of(worker))
        task = api.manager.create_task(remote(api.task(forever_of(api))))
        await asyncio.sleep(1)
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(60)
        assert worker.log == ["started", "explicit"]


async def test_task_started_again_after_a_cancel_runs() -> None:
    """A cancellation by name ends what was sent before it, and nothing that is sent later."""
    async with api_and_worker() as (api, worker):

        async def quick() -> str:
            return "ran"

        worker.task(quick)
        await api.fleet.cancel_task("import-17", timeout=0.5)
        task = api.manager.create_task(remote(api.task(quick)), name="import-17")
        assert await task == "ran"


# -- deadlines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_down", [False, True])
async def test_task_sent_again_runs_while_its_cancellation_is_on_its_way(is_down: bool) -> None:
    """What this process sends after its own cancellation runs, also before the bus has that."""
    async with api_and_worker() as (api, worker):

        async def quick() -> str:
            return "ran"

        worker.task(quick)
        kicker = api.task(quick).kicker().with_labels(**labels(name="import"))
        server = memory_server(namespace="shop")
        await asyncio.sleep(1)
        if is_down:
            server.fail()
            await asyncio.sleep(1)
        before = await kicker.kiq()
        await api.fleet.cancel_task("import", timeout=0)
        after = await kicker.kiq()
        if is_down:
            await asyncio.sleep(60)
            server.restore()
        assert (await after.wait_result(timeout=20)).return_value == "ran"
        if is_down:
            assert (await before.wait_result(timeout=20)).is_err


async def test_task_of_another_process_is_cancelled_if_it_was_sent_before_the_bus_was_back() -> None:
    """Of what is started while a cancellation waits for the bus, it reaches another's remote task alone."""
    queue = SharedQueue()
    api, other, worker = Node(queue), Node(queue), Node(queue)

    async def quick() -> str:
        return "ran"

    worker.task(quick)
    kickers = {node: node.task(quick).kicker().with_labels(**labels(name="import")) for node in (api, other)}
    async with started(api, other), working(worker.broker):
        await asyncio.sleep(1)
        server = memory_server(namespace="shop")
        server.fail()
        await asyncio.sleep(1)
        await api.fleet.cancel_task("import", timeout=0)
        await asyncio.sleep(5)
        own = await kickers[api].kiq()
        others = await kickers[other].kiq()
        local = other.manager.create_task(asyncio.sleep(60, "ran"), name="import")
        await asyncio.sleep(5)
        server.restore()
        assert (await own.wait_result(timeout=20)).return_value == "ran"
        assert (await others.wait_result(timeout=20)).is_err
        # It has read the cancellation meanwhile.
        again = await kickers[other].kiq()
        assert (await again.wait_result(timeout=20)).return_value == "ran"
        assert await local == "ran"
    runs = [(info.status, info.started_at is not None) for info in worker.manager.recent()]
    assert sorted(runs) == [
        (TaskStatus.CANCELLED, False),
        (TaskStatus.COMPLETED, True),
        (TaskStatus.COMPLETED, True),
    ]


async def test_timeout_of_the_local_task_is_the_deadline_on_the_worker() -> None:
    """Both ends time out; the worker's task does not depend on a message for that."""
    async with api_and_worker() as (api, worker):
        worker.task(forever_of(worker))
        task = api.manager.create_task(remote(api.task(forever_of(api))), timeout=5)
        with pytest.raises(TimeoutError):
            await task
        await asyncio.sleep(1)
        (info,) = worker.manager.get_all_task_info().values()
        assert (info.status, info.error_type) == (TaskStatus.FAILED, "TimeoutError")


async def test_deadline_that_passes_in_the_queue_keeps_the_task_from_starting() -> None:
    """A message whose time is up when a worker gets it does not run, and its result is a TimeoutError."""
    queue = SharedQueue()
    api, worker = Node(queue), Node(queue)
    worker.task(forever_of(worker))
    async with started(api):
        sent = await api.task(forever_of(api), **labels(timeout=5)).kiq()
        await asyncio.sleep(10)
        async with working(worker.broker):
            result = await sent.wait_result()
    assert isinstance(result.error, TimeoutError)
    assert worker.log == []


# -- at most one execution ------------------------------------------------------------------------


async def test_duplicate_waits_for_the_first_and_does_not_run() -> None:
    """A message that is delivered twice runs once: the second delivery waits, and is then acknowledged."""
    async with called_slowly() as (api, one, two, task), working(two.broker):
        api.broker.queue.deliver_twice()
        assert await task == "done"
        await asyncio.sleep(5)
    assert (one.log, two.log) == (["started"], [])
    assert api.broker.queue.acknowledged == 2


@asynccontextmanager
async def called_slowly() -> AsyncIterator[tuple[Node, Node, Node, ManagedTask[str]]]:
    """A caller, a worker that runs its call, another one that has not started, and the call."""
    queue = SharedQueue()
    api, one, two = Node(queue), Node(queue), Node(queue)
    for node in (one, two):
        serve_slowly(node)
    async with started(api), working(one.broker):
        task = api.manager.create_task(remote(api.task(slowly)))
        await asyncio.sleep(1)
        yield api, one, two, task


def serve_slowly(worker: Node) -> None:
    """Let a worker run the function that `slowly` stands for, and log that it has started."""

    async def run() -> str:
        worker.log.append("started")
        await asyncio.sleep(20)
        return "done"

    worker.broker.task(task_name="tests:slowly")(run)


async def slowly() -> str:
    """Stand for the workers' function at the caller."""
    raise AssertionError("the workers have functions of their own")


async def test_all_duplicates_end_with_the_one_that_waits() -> None:
    """Further deliveries in one process take no slot, and are acknowledged: they do not come again later."""
    async with called_slowly() as (api, one, two, task):
        async with working(two.broker):
            for _ in range(2):
                api.broker.queue.deliver_twice()
                await asyncio.sleep(1)
            assert await task == "done"
            await asyncio.sleep(5)
            assert not api.broker.queue.delivered
        await asyncio.sleep(60)
    assert [*one.log, *two.log] == ["started"]
    assert api.broker.queue.acknowledged == 4


async def test_cancellations_do_not_make_waiting_executions_ask_for_their_claims() -> None:
    """A thousand cancellations of other tasks cost an execution that waits no call of the bus."""
    async with called_slowly() as (api, _, two, task), working(two.broker):
        api.broker.queue.deliver_twice()
        server = memory_server(namespace="shop")
        with mock.patch.object(server, "claim", side_effect=server.claim) as claim:
            for number in range(1000):
                await api.fleet.cancel_task(f"other-{number}", timeout=0)
                await asyncio.sleep(0.01)
        assert 8 < claim.call_count < 25
        task.cancel()
        await asyncio.sleep(0.1)
        assert len(api.broker.queue.delivered) == 0


async def test_duplicates_of_a_message_that_is_left_are_left_too() -> None:
    """A worker that stops acknowledges none of them, whenever they come."""
    queue = SharedQueue()
    queue.put(b"")
    duplicates = Duplicates()
    await duplicates.add(functools.partial(queue.acknowledge, (await queue.take(None))[0]))
    duplicates.leave()
    await duplicates.add(functools.partial(queue.acknowledge, 1))
    assert (queue.acknowledged, len(queue.delivered)) == (0, 1)


async def test_lost_claim_cancels_and_leaves_the_message() -> None:
    """A worker whose claim another one has taken cancels its execution, and does not acknowledge."""
    async with api_and_worker() as (api, worker):
        worker.task(forever_of(worker))
        sent = await api.task(forever_of(api)).kiq()
        await asyncio.sleep(3)
        server = memory_server(namespace="shop")
        server.release(sent.task_id, worker.fleet.node)
        server.claim(sent.task_id, "another", "x")
        await asyncio.sleep(5)
        assert worker.log == ["started", "host_lost: another worker executes this task now"]
        assert api.broker.queue.acknowledged == 0
        api.broker.queue.delivered.clear()


async def test_no_claim_is_taken_while_the_bus_is_down() -> None:
    """Messages wait while the bus is down, and run when it is back."""
    async with api_and_worker() as (api, worker):

        async def quick() -> str:
            return "ran"

        worker.task(quick)
        server = memory_server(namespace="shop")
        server.fail()
        await asyncio.sleep(1)
        sent = await api.task(quick).kiq()
        await asyncio.sleep(30)
        assert not await sent.is_ready()
        server.restore()
        result = await sent.wait_result(timeout=20)
        assert result.return_value == "ran"


async def test_work_of_a_lost_host_is_cancelled() -> None:
    """When the lease of the process that waits expires, its tasks end within 8 s, with host_lost."""
    async with api_and_worker() as (api, worker):
        worker.task(forever_of(worker))
        task = api.manager.create_task(remote(api.task(forever_of(api))))
        await asyncio.sleep(10)
        assert worker.log == ["started"]
        # The process is gone without a word.
        await api.fleet.keeper.stop()
        await asyncio.sleep(8)
        assert worker.log[1].startswith("host_lost")
        task.cancel()
        await asyncio.wait([task])


async def test_lease_ends_with_the_last_call() -> None:
    """A process without remote calls renews nothing."""
    async with api_and_worker() as (api, worker):

        async def quick() -> None: ...

        worker.task(quick)
        await remote(api.task(quick))
        server = memory_server(namespace="shop")
        assert server.leases({api.fleet.node})
        await asyncio.sleep(15)
        assert not server.leases({api.fleet.node})


async def test_calls_fail_when_the_broker_is_shut_down() -> None:
    """A call that still waits when its broker is shut down fails, and its task on the worker is cancelled."""
    queue = SharedQueue()
    api, worker = Node(queue), Node(queue)
    worker.task(forever_of(worker))
    async with working(worker.broker):
        await api.broker.startup()
        await api.broker.startup()
        call = asyncio.create_task(remote(api.task(forever_of(api))))
        await asyncio.sleep(1)
        await api.broker.shutdown()
        with pytest.raises(RemoteResultError, match="was shut down"):
            await call
        await asyncio.sleep(1)
        assert not api.fleet.is_started
        assert worker.log == ["started", "shutdown: the broker was shut down"]


async def test_broker_that_is_not_started_runs_functions_as_before() -> None:
    """Without startup(), as in many tests with InMemoryBroker, the functions of tasks run unmanaged."""
    broker = managed(InMemoryBroker(await_inplace=True), Fleet("memory://", namespace="shop"))

    @broker.task
    async def work() -> str | None:
        task = current_task()
        return None if task is None else task.name

    sent = await work.kiq()
    result = await sent.wait_result()
    assert (result.is_err, result.return_value) == (False, None)
    broker.executor.shutdown()


# -- the worker stops -----------------------------------------------------------------------------


async def test_shutdown_leaves_the_message_to_another_worker() -> None:
    """A task that a stopping worker cancels is not acknowledged, has no result, and runs on another one."""
    queue = SharedQueue()
    api, one, two = Node(queue), Node(queue), Node(queue)
    one.task(forever_of(one))

    async def work() -> str:
        return "finished by the other"

    two.task(work)
    async with started(api):
        async with working(one.broker) as stop:
            task = api.manager.create_task(remote(api.task(work)))
            await asyncio.sleep(1)
            stop.set()
            await one.manager.shutdown()
        assert one.log == ["started", "shutdown: manager 'node' is shutting down"]
        async with working(two.broker):
            assert await task == "finished by the other"


async def test_shutdown_of_the_host_is_final() -> None:
    """Tasks of a service that shuts down are cancelled, and their messages go to no other worker."""
    async with api_and_worker() as (api, worker):
        worker.task(forever_of(worker))
        task = api.manager.create_task(remote(api.task(forever_of(api))))
        waiting = api.broker.queue
        await asyncio.sleep(1)
        await api.manager.shutdown(grace=0.0)
        await asyncio.sleep(1)
        assert task.cancelled()
        assert worker.log == ["started", "shutdown: manager 'node' is shutting down"]
        assert (waiting.acknowledged, len(waiting.delivered)) == (1, 0)


async def test_task_outlives_the_stop_of_its_worker(caplog: pytest.LogCaptureFixture) -> None:
    """A task that ignores its cancellation for longer than the broker waits ends without an error."""
    async with api_and_worker() as (api, worker):

        async def stubborn() -> None:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)
            await asyncio.sleep(10)

        worker.task(stubborn)
        await api.task(stubborn).kiq()
        await asyncio.sleep(1)
        await worker.broker.shutdown()
        api.broker.queue.waiting.clear()
        await asyncio.sleep(20)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "ignored its cancellation" in caplog.text


async def test_broker_that_starts_again_listens_once() -> None:
    """A fleet that goes on between two starts calls each handler of the broker once."""
    api = Node(SharedQueue())
    async with api.fleet:
        counts = []
        for _ in range(2):
            async with started(api):
                handlers = api.fleet.link._inlet._handlers
                counts.append({kind: len(listed) for kind, listed in handlers.items()})
    assert counts[0] == counts[1]


async def test_in_memory_broker_has_no_other_worker() -> None:
    """Without acknowledgments a shutdown is final: the caller learns of it."""
    manager = TaskManager(grace=0.0)
    fleet = Fleet("memory://", namespace="shop", manager=manager)
    broker = managed(InMemoryBroker(), fleet)
    log: list[Any] = []

    @broker.task
    async def work() -> None:
        await forever(log)

    await broker.startup()
    call = asyncio.create_task(remote(work))
    await asyncio.sleep(1)
    await manager.shutdown()
    with pytest.raises(RemoteCancelledError, match="shutdown"):
        await call
    await broker.shutdown()


# -- Taskiq as its users have it ------------------------------------------------------------------


async def test_retries_go_on() -> None:
    """A retry middleware sends a failed task again, and remote() returns the result of the last attempt."""
    async with api_and_worker() as (api, worker):
        worker.broker.add_middlewares(SimpleRetryMiddleware(default_retry_label=True))

        async def work() -> int:
            worker.log.append("attempt")
            if len(worker.log) < 3:
                raise ConnectionError
            return len(worker.log)

        worker.task(work)
        before = asyncio.get_running_loop().time()
        assert await remote(api.task(work)) == 3
        assert asyncio.get_running_loop().time() - before < 1


async def test_requeued_message_runs_again() -> None:
    """context.requeue() sends the message again, and it is not taken for a duplicate."""
    async with api_and_worker() as (api, worker):

        async def work(context: Context = TaskiqDepends()) -> str:  # noqa: B008 - Taskiq's way
            worker.log.append("attempt")
            if len(worker.log) == 1:
                await context.requeue()
            return "done"

        worker.task(work)
        assert await remote(api.task(work)) == "done"
        assert worker.log == ["attempt", "attempt"]


async def test_dependencies_are_resolved_and_closed() -> None:
    """TaskiqDepends works, with generators that are closed after the task."""
    async with api_and_worker() as (api, worker):

        async def session() -> AsyncIterator[str]:
            worker.log.append("open")
            try:
                yield "session"
            finally:
                worker.log.append("close")

        async def work(page: int, db: Any = TaskiqDepends(session)) -> str:  # noqa: B008 - Taskiq's way
            worker.log.append("work")
            return f"{db} {page}"

        worker.task(work)
        assert await remote(api.task(work), 3) == "session 3"
        assert worker.log == ["open", "work", "close"]


async def test_middlewares_of_the_user_are_called() -> None:
    """The hooks of other middlewares run around a managed task as around any other."""
    calls: list[str] = []

    class Recorder(TaskiqMiddleware):
        def pre_execute(self, message: TaskiqMessage) -> TaskiqMessage:
            calls.append("pre_execute")
            return message

        def post_execute(self, message: TaskiqMessage, result: Any) -> None:
            calls.append("post_execute")

        def post_save(self, message: TaskiqMessage, result: Any) -> None:
            calls.append("post_save")

    async with api_and_worker() as (api, worker):
        worker.broker.add_middlewares(Recorder())

        async def work() -> None:
            calls.append("work")

        worker.task(work)
        await remote(api.task(work))
        assert calls == ["pre_execute", "work", "post_execute", "post_save"]


async def test_function_that_wants_no_result_has_none() -> None:
    """NoResultError keeps its meaning: no result, and the message is acknowledged."""
    async with api_and_worker() as (api, worker):

        async def work() -> None:
            raise NoResultError

        worker.task(work)
        sent = await api.task(work).kiq()
        await asyncio.sleep(5)
        assert not await sent.is_ready()
        assert api.broker.queue.acknowledged == 1


async def test_taskiqs_own_timeout_is_a_timeout() -> None:
    """The label `timeout` of Taskiq cancels the managed task, with the cause timeout; the error stays."""
    async with api_and_worker() as (api, worker):
        worker.task(forever_of(worker))
        sent = await api.task(forever_of(api), timeout=3).kiq()
        result = await sent.wait_result()
        assert isinstance(result.error, TimeoutError)
        assert worker.log[1].startswith("timeout")


@pytest.mark.real_clock
async def test_plain_function_runs_in_the_receivers_thread() -> None:
    """A sync function runs in the executor of the receiver, as a managed task whose event it can read."""
    manager = TaskManager()
    broker = managed(InMemoryBroker(), Fleet("memory://", namespace="shop", manager=manager))
    started_in: list[str] = []

    @broker.task
    def work() -> str:
        task = current_task()
        assert task is not None
        started_in.append(task.name)
        event = current_cancel_event()
        while not event.is_set():
            pass
        return str(event.cause)

    await broker.startup()
    task = manager.create_task(remote(work), name="spin")
    while not started_in:  # noqa: ASYNC110 - a thread writes it
        await asyncio.sleep(0.01)
    task.cancel("enough")
    await asyncio.wait([task])
    while any(not info.status.is_final for info in manager.get_all_task_info().values()):  # noqa: ASYNC110 - a thread ends it
        await asyncio.sleep(0.01)
    assert started_in == ["spin-2"]
    await broker.shutdown()


@pytest.mark.real_clock
async def test_plain_function_that_returns_a_coroutine_is_awaited() -> None:
    """A decorator that makes a plain function of a coroutine function does not change the result."""
    manager = TaskManager()
    broker = managed(InMemoryBroker(), Fleet("memory://", namespace="shop", manager=manager))

    async def work() -> str:
        task = current_task()
        assert task is not None
        return task.name

    @broker.task
    def decorated() -> Any:
        return work()

    await broker.startup()
    assert await remote(decorated) == "decorated"
    await broker.shutdown()


# -- traces ---------------------------------------------------------------------------------------


async def test_worker_span_is_a_child_of_the_local_task(spans: SpanRecorder) -> None:
    """One trace: the local task's span is the call, the worker's is below it, and both have the outcome."""
    async with api_and_worker(spans=spans) as (api, worker):

        async def work() -> None:
            await asyncio.sleep(1)

        worker.task(work)
        await api.manager.create_task(remote(api.task(work)), name="call")
    local, there = spans.spans("call")[::-1]
    assert (local.parent, local.kind.name) == (None, "INTERNAL")
    assert spans.children(local) == [there]
    assert there.attributes is not None
    assert there.attributes["otel_tasks.task.outcome"] == "success"
    assert str(there.attributes["code.function.name"]).endswith("<locals>.work")
    assert local.attributes is not None
    assert local.attributes["code.function.name"] == "tests.work"


async def test_cancelled_spans_have_the_cause_on_both_ends(spans: SpanRecorder) -> None:
    """Both spans have outcome and cause, and the worker's names the span that asked."""
    async with api_and_worker(spans=spans) as (api, worker):
        worker.task(forever_of(worker))

        async def canceller(task: asyncio.Task[Any]) -> None:
            task.cancel("enough")

        task = api.manager.create_task(remote(api.task(forever_of(api))), name="call")
        await asyncio.sleep(1)
        await api.manager.create_task(canceller(task))
        await asyncio.sleep(1)
    for span in spans.spans("call"):
        assert span.attributes is not None
        assert span.attributes["otel_tasks.task.outcome"] == "cancelled"
        assert span.attributes["otel_tasks.cancel.reason"] == "explicit"
        (link,) = span.links
        assert link.context == spans.span("canceller").context or link.context.span_id


async def test_plain_message_starts_a_trace_that_links_to_the_sender(spans: SpanRecorder) -> None:
    """The task of a message that nobody waits for is a root, linked to the span that sent it."""
    async with api_and_worker(spans=spans) as (api, worker):

        async def work() -> None: ...

        async def sender() -> None:
            await api.task(work).kiq()

        worker.task(work)
        await api.manager.create_task(sender())
        await asyncio.sleep(1)
    (link,) = spans.span("work").links
    assert spans.span("work").parent is None
    sender_context = spans.span("sender").context
    assert sender_context is not None
    assert link.context.trace_id == sender_context.trace_id


# -- priorities -----------------------------------------------------------------------------------


def test_priorities_of_rabbitmq_spread_over_the_levels_of_the_queue() -> None:
    """LOW is 0 and CRITICAL the highest level of the queue."""
    assert [chosen["priority"] for chosen in rabbitmq_priorities(9).values()] == [0, 3, 6, 9]


def test_levels_without_a_stream_take_the_next_lower_one() -> None:
    """stream_priorities() fills the gaps."""
    chosen = stream_priorities({TaskPriority.NORMAL: "normal", TaskPriority.HIGH: "urgent"})
    assert [each["queue_name"] for each in chosen.values()] == ["normal", "normal", "urgent", "urgent"]


async def test_priority_of_the_local_task_is_a_label_of_the_message() -> None:
    """The broker gets the label of the local task's priority."""
    queue = SharedQueue()
    api = Node(queue, priorities=rabbitmq_priorities(9))
    async with started(api):
        call = remote(api.task(forever_of(api)))
        task = api.manager.create_task(call, priority=TaskPriority.CRITICAL)
        await asyncio.sleep(1)
        assert json.loads(queue.waiting[0][1])["labels"]["priority"] == "9"
        task.cancel()
        await asyncio.wait([task])


# -- wrong use ------------------------------------------------------------------------------------


async def test_wrong_arguments_name_the_fix_at_the_call() -> None:
    """remote() raises when it is called, not when its coroutine is awaited."""
    queue = SharedQueue()
    node = Node(queue)

    async def work() -> None: ...

    with pytest.raises(TypeError, match=r"got the function work: decorate it with @broker.task"):
        _call(work)
    with pytest.raises(TypeError, match="got a coroutine: write remote"):
        _call(work())
    with pytest.raises(TypeError, match=r"got a coroutine: write remote\(double, \.\.\.\)"):
        _call(InMemoryBroker().task(double)())
    with pytest.raises(RuntimeError, match="needs a started broker"):
        _call(node.task(work))
    plain = InMemoryBroker()
    with pytest.raises(RuntimeError, match=r"managed\(broker, fleet\)"):
        _call(plain.task(work))
    without = managed(QueueBroker(queue).with_result_backend(DummyResultBackend[Any]()), node.fleet)
    with pytest.raises(RuntimeError, match="with_result_backend"):
        _call(without.task(work))


async def test_call_in_another_loop_names_the_fix() -> None:
    """A call in a loop in which the broker is not started fails, instead of waiting without end."""
    async with api_and_worker() as (api, _):
        task = api.task(forever_of(api))
        with pytest.raises(WrongLoopError, match="run_coroutine_threadsafe"):
            await asyncio.to_thread(lambda: asyncio.run(_awaited(remote(task))))


async def double(number: int = 21) -> int:
    return 2 * number


def test_a_broker_starts_again_after_its_loop_was_closed() -> None:
    """Each of many test functions has a loop of its own, and few shut their broker down."""
    fleet = Fleet("memory://", namespace="shop", manager=TaskManager())
    broker = managed(InMemoryBroker(), fleet)
    task = broker.task(double)

    async def use() -> int:
        await broker.startup()
        return await remote(task, 21)

    async def use_without_a_start() -> None:
        with pytest.raises(WrongLoopError, match=r"that is closed: write `await broker.startup\(\)`"):
            await remote(task, 21)

    async def shut_down_elsewhere() -> None:
        await broker.startup()
        with pytest.raises(WrongLoopError, match="another event loop: shut it down there"):
            await asyncio.to_thread(asyncio.run, broker.shutdown())
        assert await remote(task, 21) == 42

    async def shut_down_beside_a_fleet() -> None:
        async with fleet:
            await broker.shutdown()
            assert fleet.is_started

    assert asyncio.run(use()) == 42
    asyncio.run(use_without_a_start())
    assert asyncio.run(use()) == 42
    asyncio.run(shut_down_elsewhere())
    assert not fleet.is_started
    # Nothing is left to stop, and the fleet that another user has started meanwhile goes on.
    asyncio.run(shut_down_beside_a_fleet())
    assert asyncio.run(use()) == 42


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"grace": "5"}, TypeError, "grace must be seconds as a number"),
        ({"grace": -1}, ValueError, "grace must be at least 0 seconds"),
        ({"priorities": 9}, TypeError, r"as rabbitmq_priorities\(9\) returns them, got 9"),
        ({"priorities": {"high": {}}}, TypeError, "priorities must be the labels of each priority"),
        ({"group": ""}, ValueError, "group name must not be empty"),
    ],
)
def test_wrong_options_are_refused_where_they_are_written(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Otherwise the first message, or the signal that stops a worker, would meet them."""
    fleet = Fleet("memory://", namespace="shop", manager=TaskManager())
    with pytest.raises(error, match=message):
        managed(InMemoryBroker(), fleet, **options)


@pytest.mark.parametrize("streams", ["tasks", {"high": "tasks"}, {TaskPriority.HIGH: 1}])
def test_streams_without_priorities_are_refused(streams: Any) -> None:
    """A word that is no priority would send everything to one stream."""
    with pytest.raises(TypeError, match="takes the stream of each priority"):
        stream_priorities(streams)


@pytest.mark.parametrize("highest", [0, None, "9"])
def test_a_highest_priority_is_a_number(highest: Any) -> None:
    """None would be no priority at all."""
    with pytest.raises(ValueError, match="max_priority must be a whole number of at least 1"):
        rabbitmq_priorities(highest)


def test_labels_of_priorities_are_those_of_the_broker() -> None:
    """RabbitMQ has priorities of one byte, and labels and streams have names."""
    fleet = Fleet("memory://", namespace="shop")
    with pytest.raises(ValueError, match="max_priority must be at most 255, as in RabbitMQ, got 256"):
        rabbitmq_priorities(256)
    wrong: Any = 1
    with pytest.raises(TypeError, match="label must be the name of a label, as a string, got 1"):
        rabbitmq_priorities(9, label=wrong)
    with pytest.raises(ValueError, match="label must not be empty"):
        stream_priorities({TaskPriority.HIGH: "tasks"}, label="")
    with pytest.raises(ValueError, match="needs a stream"):
        stream_priorities({TaskPriority.HIGH: ""})
    not_labels: Any
    for not_labels in ({1: 2}, {"priority": None}, {"priority": True}):
        with pytest.raises(TypeError, match="priorities must be the labels of each priority"):
            managed(InMemoryBroker(), fleet, priorities={TaskPriority.HIGH: not_labels})
    with pytest.raises(ValueError, match=r"group name must not be empty: leave it out for 'taskiq'"):
        managed(InMemoryBroker(), fleet, group="")
    with pytest.raises(ValueError, match="priority must be one of "):
        labels(priority=True)


async def test_timeout_beyond_any_clock_is_none() -> None:
    """A worker could not read the stamp of the message, and would not know who waits for its result."""
    async with api_and_worker() as (api, worker):
        worker.task(double)
        call, began = remote(api.task(double), 4), asyncio.get_running_loop().time()
        assert await api.manager.create_task(call, timeout=1e300) == 8
        assert asyncio.get_running_loop().time() - began < 1.0


async def _awaited(call: Any) -> Any:
    return await call


async def test_two_calls_with_one_id_name_the_fix() -> None:
    """The second call fails, and the first one gets its result."""
    async with api_and_worker() as (api, worker):

        async def half() -> int:
            await asyncio.sleep(1)
            return 1

        worker.task(half)
        kicker = api.task(half).kicker().with_task_id("one")
        first = api.manager.create_task(remote(kicker))
        await asyncio.sleep(0.5)
        with pytest.raises(ValueError, match="give each call its own id"):
            await remote(kicker)
        assert await first == 1


async def test_id_that_is_used_again_gives_the_result_of_the_new_call() -> None:
    """Also if the call waits for so long that the result backend is asked, which has the old result."""
    async with api_and_worker() as (api, worker):

        async def number(value: int) -> int:
            await asyncio.sleep(20 * (value - 1))
            return value

        worker.task(number)
        kicker = api.task(number).kicker().with_task_id("report")
        assert [await remote(kicker, value) for value in (1, 2)] == [1, 2]
        # The end of an older execution is not that of this call.
        task = api.manager.create_task(remote(kicker, 3))
        await asyncio.sleep(1)
        ended = EndedEntry(node="old", task_id="report", outcome="success", call="another")
        worker.fleet.link.post_to(api.fleet.node, ended)
        assert await task == 3


async def test_result_that_is_lost_is_not_replaced_by_an_older_one() -> None:
    """A worker that could not save the result says so: the older one with the same id is not returned."""
    async with api_and_worker() as (api, worker):

        async def number(value: int) -> int:
            return value

        worker.task(number)
        kicker = api.task(number).kicker().with_task_id("report")
        assert await remote(kicker, 1) == 1
        api.broker.queue.results.failures = 10_000
        with pytest.raises(RemoteResultError, match="that of another call with this id"):
            await remote(kicker, 2)


async def test_result_of_a_retry_is_found_without_the_message_about_the_end() -> None:
    """The result of a copy is the one of the call."""
    async with api_and_worker() as (api, worker):
        worker.broker.add_middlewares(SimpleRetryMiddleware(default_retry_label=True))

        async def work() -> str:
            worker.log.append("attempt")
            if len(worker.log) < 3:
                raise ConnectionError
            return "done"

        worker.task(work)
        await asyncio.sleep(1)
        worker.fleet.link.post_to = lambda *_, **__: None  # type: ignore[method-assign]  # it is lost
        async with asyncio.timeout(10):
            assert await remote(api.task(work)) == "done"


async def test_id_that_is_too_long_is_refused_where_it_is_used() -> None:
    """A cancellation could not name it."""
    async with api_and_worker() as (api, worker):

        async def nothing() -> None: ...

        worker.task(nothing)
        with pytest.raises(ValueError, match="the id of a remote task has 1025 characters"):
            await remote(api.task(nothing).kicker().with_task_id("x" * 1025))
        assert not api.broker.queue.waiting


def _call(task: Any) -> None:
    """Call remote() with something wrong; nothing is awaited."""
    remote(task).close()


def test_managed_names_the_fix() -> None:
    """managed() refuses what is not a broker or a fleet, and a second call."""
    fleet = Fleet("memory://", namespace="shop")
    with pytest.raises(TypeError, match="takes a Taskiq broker"):
        managed("redis://", fleet)  # type: ignore[type-var]  # the mistake
    with pytest.raises(TypeError, match=r"default_broker\(managed\(broker, fleet\)\)"):
        managed(async_shared_broker, fleet)
    with pytest.raises(TypeError, match="takes a Fleet"):
        managed(InMemoryBroker(), "redis://")  # type: ignore[arg-type]  # the mistake
    broker = managed(InMemoryBroker(), fleet)
    with pytest.raises(ValueError, match="already managed"):
        managed(broker, fleet)


async def test_coroutine_that_is_never_awaited_sends_nothing() -> None:
    """A closed remote() leaves nothing behind."""
    queue = SharedQueue()
    api = Node(queue)
    async with started(api):
        call = remote(api.task(forever_of(api)))
        call.close()
        del call
        gc.collect()
        await asyncio.sleep(1)
        assert not queue.waiting


async def test_task_that_the_worker_does_not_have_is_an_error() -> None:
    """A call of a task that no worker has imported fails, instead of waiting without end."""
    async with api_and_worker() as (api, _):
        with pytest.raises(RemoteResultError, match="no task 'tests:forever': import its module"):
            await remote(api.broker.task(task_name="tests:forever")(forever_of(api)))
