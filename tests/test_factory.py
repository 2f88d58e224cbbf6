"""Task factories of others: what they wrap around a coroutine runs in the managed task."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import inspect
import re
import sys
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks import (
    ManagedTask,
    QueueFullError,
    RestartPolicy,
    TaskExistsError,
    TaskManager,
    TaskStatus,
    current_task,
    managed_task,
)
from otel_tasks.testing import SpanRecorder, VirtualClockLoop
from tests.helpers import fail, give, rest, settle

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator

    Factory = Callable[..., Any]
    Use = Callable[[Factory | None], None]
    Create = Callable[[TaskManager, Any], Awaitable[ManagedTask[Any]]]

needs_eager = pytest.mark.skipif(sys.version_info < (3, 12), reason="eager start came with Python 3.12")

_scope: ContextVar[dict[str, str] | None] = ContextVar("scope", default=None)


class Scopes:
    """A factory of the shape of Sentry's: a scope of its own around each task.

    Attributes:
        wrapped: The wrappers that it has made.
        entered: The names of the functions around which a scope was opened.
    """

    def __init__(self, previous: Factory | None = None) -> None:
        self.wrapped: list[Coroutine[Any, Any, Any]] = []
        self.entered: list[str] = []
        self._previous = previous

    def __call__(self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        async def wrapper() -> Any:
            self.entered.append(coro.__name__)
            _scope.set({})
            return await coro

        self.wrapped.append(wrapper())
        if self._previous is not None:
            task: asyncio.Task[Any] = self._previous(loop, self.wrapped[-1], **options)
        else:
            task = asyncio.Task(self.wrapped[-1], loop=loop, **options)
        task.set_name(f"{coro.__name__} (wrapped)")
        return task


@pytest.fixture
def use() -> Iterator[Callable[[Factory | None], None]]:
    """Set the task factory of the running loop; afterwards, no coroutine is left unawaited."""

    def set_factory(factory: Factory | None) -> None:
        asyncio.get_running_loop().set_task_factory(factory)

    yield set_factory
    gc.collect()


async def tag(name: str, seen: dict[str, str]) -> None:
    """Tag the current scope, let others run, and note what the tag is then."""
    scope = _scope.get()
    assert scope is not None
    scope["job"] = name
    await asyncio.sleep(1)
    seen[name] = scope["job"]


# -- what is wrapped around the coroutine ----------------------------------------------------------


async def create_plainly(manager: TaskManager, coro: Any) -> ManagedTask[Any]:
    """The fast path."""
    return manager.create_task(coro)


async def create_with_timeout(manager: TaskManager, coro: Any) -> ManagedTask[Any]:
    """With a wrapper of this package around it."""
    return manager.create_task(coro, timeout=60)


async def create_in_group(manager: TaskManager, coro: Any) -> ManagedTask[Any]:
    """In a labeled group, by name."""
    return manager.create_task(coro, name=f"job-{id(coro)}", group="a.b")


async def create_eagerly(manager: TaskManager, coro: Any) -> ManagedTask[Any]:
    """With its first step at once, where Python has that."""
    return manager.create_task(coro, eager_start=True)


async def start_by_name(manager: TaskManager, coro: Any) -> ManagedTask[Any]:
    """By name, with a result to keep."""
    return await manager.start_task(f"job-{id(coro)}", coro)


async def put(manager: TaskManager, coro: Any) -> ManagedTask[Any]:
    """As soon as there is room."""
    return await manager.put_task(coro)


every_way = pytest.mark.parametrize(
    "create",
    [create_plainly, create_with_timeout, create_in_group, create_eagerly, start_by_name, put],
)


@every_way
@pytest.mark.parametrize("queued", [False, True])
async def test_each_managed_task_has_the_scope_of_the_factory(create: Create, queued: bool, use: Use) -> None:
    """A tag of one task does not leak into another, however they are created; a queue changes nothing."""
    scopes = Scopes()
    use(scopes)
    manager = TaskManager(max_concurrency=2 if queued else None)
    blocker = manager.create_task(asyncio.sleep(1)) if queued else None
    seen: dict[str, str] = {}
    tasks = [await create(manager, tag(name, seen)) for name in "abc"]
    await asyncio.gather(*tasks)
    assert seen == {"a": "a", "b": "b", "c": "c"}
    assert scopes.entered.count("tag") == 3
    del blocker


async def test_factory_that_is_set_late_counts_and_one_that_is_removed_does_not(use: Use) -> None:
    """A manager that already has tasks calls the factory for the next one."""
    scopes = Scopes()
    manager = TaskManager()
    await manager.create_task(give(1))
    use(scopes)
    await manager.create_task(give(2))
    use(None)
    await manager.create_task(give(3))
    assert scopes.entered == ["give"]


async def test_factory_makes_no_second_task(use: Use) -> None:
    """The managed task itself runs what the factory made; asyncio sees no other."""
    use(Scopes())
    manager = TaskManager()
    before = asyncio.all_tasks()
    seen: list[object] = []

    async def work() -> None:
        seen.append(asyncio.current_task())
        seen.append(current_task())

    task = manager.create_task(work())
    assert asyncio.all_tasks() - before == {task}
    await task
    assert seen == [task, task]
    assert type(task) is ManagedTask


async def test_decorator_and_threads_have_the_scope(use: Use) -> None:
    """So have the decorator's tasks, functions in threads, and tasks that a thread hands over."""
    scopes = Scopes()
    use(scopes)
    manager = TaskManager()

    @managed_task(manager=manager)
    async def decorated() -> dict[str, str] | None:
        return _scope.get()

    async def handed_over() -> dict[str, str] | None:
        return _scope.get()

    assert await decorated() == {}
    assert await manager.run_in_thread(_scope.get) == {}
    future = await asyncio.to_thread(manager.create_task_threadsafe, handed_over())
    assert await asyncio.wrap_future(future) == {}


async def test_attempts_of_a_service_have_the_scope_and_its_supervisor_has_none(use: Use) -> None:
    """The supervisor is this package's own; a scope around it would never end."""
    scopes = Scopes()
    use(scopes)
    manager = TaskManager()

    async def attempt() -> None:
        assert _scope.get() == {}

    await manager.start_service("service", attempt, restart=RestartPolicy(on="failure"))
    await manager.join()
    assert scopes.entered == ["attempt"]


async def test_factory_gets_the_context_that_the_caller_has_given(use: Use) -> None:
    """As from asyncio: a context only where there is one."""
    given: list[dict[str, Any]] = []

    def factory(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        given.append(options)
        return asyncio.Task(coro, loop=loop, **options)

    use(factory)
    manager = TaskManager()
    await manager.create_task(give(1))
    given.clear()
    await manager.create_task(give(1))
    context = copy_context()
    await manager.create_task(give(1), context=context)
    assert [options.get("context") for options in given] == [None, context]


# -- eager factories -------------------------------------------------------------------------------


def eager_factories() -> list[Any]:
    """Factories that start their tasks eagerly; none before Python 3.12."""
    if sys.version_info < (3, 12):
        return []

    def construct(coro: Any, **options: Any) -> asyncio.Task[Any]:
        return asyncio.Task(coro, **options)

    return [
        asyncio.eager_task_factory,
        asyncio.create_eager_task_factory(construct),
        Scopes(asyncio.eager_task_factory),
    ]


@needs_eager
@pytest.mark.parametrize("factory", eager_factories())
@pytest.mark.parametrize(("by_call", "eager"), [(None, True), (True, True), (False, False)])
async def test_eager_factory_starts_managed_tasks_eagerly(
    factory: Factory, by_call: bool | None, eager: bool, use: Use
) -> None:
    """The first step runs at once, unless the call says otherwise."""
    use(factory)
    manager = TaskManager()
    steps: list[asyncio.Task[Any] | None] = []

    async def work() -> None:
        steps.append(asyncio.current_task())

    task = manager.create_task(work(), eager_start=by_call)
    assert steps == ([task] if eager else [])
    await task
    assert steps == [task]
    waiting = manager.create_task(rest(), eager_start=by_call)
    assert waiting.status is (TaskStatus.RUNNING if eager else TaskStatus.PENDING)
    waiting.cancel()
    await asyncio.wait([waiting])


# -- what a task shows of itself -------------------------------------------------------------------


@every_way
async def test_task_is_named_after_the_users_function(create: Create, use: Use, spans: SpanRecorder) -> None:
    """Neither its name nor its span shows the wrapper."""
    use(Scopes())
    manager = TaskManager(tracer_provider=spans.provider)
    task = await create(manager, give(1))
    assert "wrapped" not in task.name
    await task
    await settle()
    [span] = spans.finished
    assert (span.attributes or {})["code.function.name"] == "tests.helpers.give"
    assert span.name == ("give" if task.name.startswith("give") else "job")


@pytest.mark.parametrize("timeout", [None, 60])
async def test_task_runs_once_the_users_code_does(timeout: float | None, use: Use) -> None:
    """While the wrapper has not come to the user's code, the task is pending."""
    opened = asyncio.Event()

    def factory(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        async def wrapper() -> Any:
            await opened.wait()
            return await coro

        return asyncio.Task(wrapper(), loop=loop, **options)

    use(factory)
    manager = TaskManager()
    task = manager.create_task(rest(), timeout=timeout)
    assert task.status is TaskStatus.PENDING
    await settle()
    assert task.status is TaskStatus.PENDING
    assert "wrapper" in task.stack()
    opened.set()
    await settle()
    assert task.status is TaskStatus.RUNNING
    [first, *_] = re.findall(r"in (\w+)", task.stack())
    assert first == "rest"
    [node] = manager.tree().root.tasks
    assert node.where is not None
    assert node.where.function == "rest"
    task.cancel()
    await asyncio.wait([task])


# -- what never runs is closed ---------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"timeout": 60}, {"timeout": 60, "name": "a"}])
@pytest.mark.parametrize("queued", [False, True])
async def test_cancelled_before_its_first_step_nothing_is_left_unawaited(
    options: dict[str, Any], queued: bool, use: Use
) -> None:
    """The user's coroutine and the wrapper are closed."""
    scopes = Scopes()
    use(scopes)
    manager = TaskManager(max_concurrency=1 if queued else None)
    first = manager.create_task(rest()) if queued else None
    coro = rest()
    task = manager.create_task(coro, **options)
    if queued:
        await settle()
    task.cancel()
    await asyncio.wait([task])
    await settle()
    assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED
    assert inspect.getcoroutinestate(scopes.wrapped[-1]) == inspect.CORO_CLOSED
    assert (task.info().status, task.info().started_at) == (TaskStatus.CANCELLED, None)
    if first is not None:
        first.cancel()
        await asyncio.wait([first])


async def test_refused_task_is_closed(use: Use) -> None:
    """The factory is not called for a task that is refused."""
    scopes = Scopes()
    use(scopes)
    manager = TaskManager(max_concurrency=1, max_queue=0)
    task = manager.create_task(rest(), name="a")
    asked = len(scopes.wrapped)
    with pytest.raises(TaskExistsError):
        manager.create_task(give(1), name="a", on_conflict="error")
    with pytest.raises(QueueFullError):
        manager.create_task(give(1))
    assert len(scopes.wrapped) == asked
    task.cancel()
    await asyncio.wait([task])


def test_tasks_of_a_closed_loop_are_closed_with_their_wrappers() -> None:
    """A loop that was closed under a task leaves nothing unawaited."""
    manager = TaskManager()
    scopes = Scopes()
    coro = rest()

    async def leave_behind() -> None:
        asyncio.get_running_loop().set_task_factory(scopes)
        manager.create_task(coro, name="lost", timeout=60)

    loop = VirtualClockLoop()
    # Without a turn for the new task: its coroutines never start.
    loop.run_until_complete(leave_behind())
    loop.close()
    again = VirtualClockLoop()

    async def use_again() -> None:
        await manager.create_task(give(1))

    again.run_until_complete(use_again())
    again.close()
    assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED
    assert inspect.getcoroutinestate(scopes.wrapped[-1]) == inspect.CORO_CLOSED


# -- what cannot be kept ---------------------------------------------------------------------------


class Traced(asyncio.Task[Any]):
    """A task class for factories."""


def make_traced(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> Traced:
    """A factory of a class of its own."""
    return Traced(coro, loop=loop, **options)


async def test_class_of_the_factory_is_lost_with_one_warning(
    use: Use, caplog: pytest.LogCaptureFixture
) -> None:
    """Managed tasks are of their own class; the log says so once, for all managers."""

    def factory(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> Traced:
        return make_traced(loop, coro, **options)

    use(factory)
    for manager in (TaskManager(), TaskManager()):
        assert [await manager.create_task(give(n)) for n in range(2)] == [0, 1]
    [message] = caplog.messages
    assert message.startswith("managed tasks run what task factory <function ")
    assert message.endswith(" wraps around a coroutine, but they are not of its class Traced")


@dataclasses.dataclass
class Unhashable:
    """A factory that no weak table can have."""

    calls: int = 0

    def __call__(self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> Any:
        self.calls += 1
        return make_traced(loop, coro, **options)


async def test_factory_that_cannot_be_hashed_is_warned_of_once_too(
    use: Use, caplog: pytest.LogCaptureFixture
) -> None:
    """A dataclass with a call is a factory like any other."""
    factory = Unhashable()
    use(factory)
    manager = TaskManager()
    assert [await manager.create_task(give(n)) for n in range(3)] == [0, 1, 2]
    assert factory.calls == 4
    assert len(caplog.messages) == 1


async def test_factory_that_raises_breaks_no_task(use: Use, caplog: pytest.LogCaptureFixture) -> None:
    """It is not used again, and the log says so once."""
    calls: list[int] = []

    def factory(loop: object, coro: object, **options: object) -> Any:
        calls.append(1)
        raise LookupError("broken")

    use(factory)
    manager = TaskManager()
    assert [await manager.create_task(give(n)) for n in range(3)] == [0, 1, 2]
    # The loop uses it too, to shut down.
    use(None)
    [message] = caplog.messages
    assert message.startswith("managed tasks run without what task factory <function ")
    assert message.endswith(" adds to tasks: it raised LookupError('broken')")
    assert len(calls) == 1


async def test_factory_that_raises_for_one_coroutine_is_not_used_again(
    use: Use, caplog: pytest.LogCaptureFixture
) -> None:
    """A coroutine that it has not touched runs without it."""

    def factory(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> Any:
        if coro.__name__ == "give":
            raise LookupError("not this one")
        return asyncio.Task(coro, loop=loop, **options)

    use(factory)
    manager = TaskManager()
    assert [await manager.create_task(give(n)) for n in range(3)] == [0, 1, 2]
    [message] = caplog.messages
    assert "not this one" in message


async def test_factory_that_closes_the_coroutine_and_raises_is_heard(use: Use) -> None:
    """With nothing left to run, its error is the caller's, as from asyncio."""

    def factory(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> Any:
        if coro.__name__ == "give":
            coro.close()
            raise LookupError("refused")
        return asyncio.Task(coro, loop=loop, **options)

    use(factory)
    manager = TaskManager()
    with pytest.raises(LookupError, match="refused"):
        manager.create_task(give(1))
    assert manager.stats().created == 0


async def test_factory_that_makes_no_task_is_not_used(use: Use, caplog: pytest.LogCaptureFixture) -> None:
    """None, or anything without a coroutine, is no task."""
    use(lambda loop, coro, **options: coro.close())
    manager = TaskManager()
    assert await manager.create_task(give(1)) == 1
    use(None)
    [message] = caplog.messages
    assert message.endswith(" adds to tasks: it returned None, which is no task")


async def test_factory_that_makes_no_task_of_one_coroutine_is_an_error(use: Use) -> None:
    """The factory has taken the coroutine: the caller gets the error, and nothing is left unawaited."""
    use(lambda loop, coro, **options: None if coro.__name__ == "give" else make_traced(loop, coro, **options))
    manager = TaskManager()
    with pytest.raises(RuntimeError, match="returned None, which is no task"):
        manager.create_task(give(1))


async def test_factory_that_ignores_the_loop_is_not_used(use: Use, caplog: pytest.LogCaptureFixture) -> None:
    """Its task would run beside the managed one."""
    use(lambda loop, coro, **options: asyncio.Task(coro, **options))
    manager = TaskManager()
    assert await manager.create_task(give(1)) == 1
    await settle()
    use(None)
    [message] = caplog.messages
    assert message.endswith("makes its tasks on another loop than the one that it is given")


# -- tasks that a factory keeps --------------------------------------------------------------------


async def test_task_that_the_factory_keeps_ends_with_the_managed_one(
    use: Use, caplog: pytest.LogCaptureFixture
) -> None:
    """A registry lets go of it, and a callback that reports failures reports them, once."""
    kept: set[asyncio.Task[Any]] = set()
    reported: list[object] = []

    def report(task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            reported.append("cancelled")
        else:
            reported.append(task.exception() or task.result())

    def factory(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=loop, **options)
        kept.add(task)
        task.add_done_callback(kept.discard)
        task.add_done_callback(report)
        return task

    use(factory)
    error = ValueError("no")
    manager = TaskManager(on_error=lambda info, error: reported.append(f"on_error: {error}"))
    tasks = [manager.create_task(coro) for coro in (give(7), fail(error), rest())]
    assert len(kept) == 4
    await settle()
    tasks[2].cancel()
    await settle()
    assert kept == set()
    # The first is of the trial.
    assert sorted(map(str, reported)) == sorted(["None", "7", "no", "on_error: no", "cancelled"])
    gc.collect()
    [message] = caplog.messages
    assert message.endswith("the tasks that it sees only end with them, and cannot be awaited or cancelled")


async def test_task_that_the_factory_keeps_without_a_callback_ends_too(use: Use) -> None:
    """A factory's list of tasks shows which ones are done."""
    kept: list[asyncio.Task[Any]] = []

    def factory(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        kept.append(asyncio.Task(coro, loop=loop, **options))
        return kept[-1]

    use(factory)
    manager = TaskManager()
    task = manager.create_task(give(1))
    assert not kept[-1].done()
    await task
    await settle()
    assert kept[-1].result() == 1


async def test_failure_is_not_reported_a_second_time(use: Use, caplog: pytest.LogCaptureFixture) -> None:
    """asyncio does not say of a kept task that its exception was never retrieved."""
    kept: list[asyncio.Task[Any]] = []

    def factory(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        kept.append(asyncio.Task(coro, loop=loop, **options))
        return kept[-1]

    use(factory)
    manager = TaskManager()
    manager.create_task(fail(ValueError("no")), name="bad")
    await settle()
    kept.clear()
    gc.collect()
    assert caplog.messages[1:] == ["task 'bad' failed and nobody awaits it"]


async def test_factory_may_use_asyncios_task_in_python(use: Use) -> None:
    """A debugger's factory makes tasks of the class that is not in C."""
    python_task: Any = asyncio.tasks._PyTask  # type: ignore[attr-defined]  # as debuggers use it
    kept: list[Any] = []

    def factory(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> Any:
        kept.append(python_task(coro, loop=loop, **options))
        return kept[-1]

    use(factory)
    manager = TaskManager()
    assert await manager.create_task(give(1)) == 1
    await settle()
    assert kept[-1].result() == 1


# -- what a factory sees of the loop ---------------------------------------------------------------


async def test_factory_sees_the_loop(use: Use) -> None:
    """The factory's loop argument looks, compares, and schedules like the loop, even after the call."""
    loop = asyncio.get_running_loop()
    seen: list[Any] = []

    def factory(given: Any, coro: Any, **options: Any) -> asyncio.Task[Any]:
        given.call_soon(seen.append, "scheduled")
        given.mark = "set"
        seen.append((given == loop, hash(given) == hash(loop), isinstance(given, VirtualClockLoop)))
        seen.append((given.time() == loop.time(), {loop: 1}[given]))

        async def wrapper() -> Any:
            seen.append(given.is_running())
            return await coro

        return asyncio.Task(wrapper(), loop=given, **options)

    use(factory)
    manager = TaskManager()
    assert await manager.create_task(give(1)) == 1
    await settle()
    assert seen.count((True, True, True)) == seen.count((True, 1)) == seen.count("scheduled") == 2
    assert seen.count(True) == 1
    assert loop.mark == "set"  # type: ignore[attr-defined]  # the factory has set it


@pytest.mark.parametrize("own_loop", [False, True])
def test_loop_that_keeps_its_factory_to_itself(own_loop: bool) -> None:
    """uvloop's loop has no attribute for it; the loop is asked each time a task is created."""
    uvloop = pytest.importorskip("uvloop")
    scopes = Scopes()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        manager = TaskManager()
        await manager.create_task(give(1))
        loop.set_task_factory(scopes)
        seen: dict[str, str] = {}
        manager.create_task(tag("a", seen))
        manager.create_task(tag("b", seen))
        await settle()
        await manager.cancel_all_tasks()
        loop.set_task_factory(None)
        await manager.create_task(give(1))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop if own_loop else None) as runner:
        runner.run(main())
    assert scopes.entered == ["tag", "tag"]
