"""Scoped groups: ``async with`` as asyncio.TaskGroup's, and what it adds (cancel, timeout, nesting)."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks import (
    CancelCause,
    CancelKind,
    GroupClosedError,
    ManagedTask,
    TaskGroup,
    TaskManager,
    TaskStatus,
    global_task_manager,
)
from otel_tasks.testing import SpanRecorder, run
from tests.helpers import fail, give, ignore_cancels, kind_of, now, rest, settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

# -- the block -------------------------------------------------------------------------------------


async def test_block_waits_for_its_tasks() -> None:
    """The end of the block is reached when all tasks have ended, later ones included."""
    start = now()
    async with TaskManager().group("load") as group:

        async def parent() -> None:
            await asyncio.sleep(2)
            group.create_task(asyncio.sleep(3))

        group.create_task(parent())
    assert now() - start == 5
    assert group.tasks == ()


async def test_block_waits_for_groups_nested_in_plain_tasks() -> None:
    """A block nested below, in a plain asyncio task, is waited for too."""
    start = now()

    async def nested(outer: TaskGroup) -> None:
        async with outer.group("inner") as inner:
            inner.create_task(asyncio.sleep(5))
            await asyncio.sleep(7)

    async with TaskManager().group("outer") as outer:
        plain = asyncio.create_task(nested(outer))
        await settle()
    assert now() - start == 7
    await plain


async def test_group_belongs_to_the_global_manager_by_default() -> None:
    """TaskGroup() needs no manager."""
    async with TaskGroup() as group:
        task = group.create_task(rest(), name="work")
        assert group.name == "group"
        assert global_task_manager.get_task(f"{group.id}/work") is task
        group.cancel()


async def test_group_leaves_nothing_behind() -> None:
    """After the block the manager does not know the group any more."""
    manager = TaskManager()
    async with manager.group("a") as a, a.group("b"), manager.group("c"):
        assert len(manager._ledger.scopes) == 3
    assert not manager._ledger.scopes
    assert not manager._ledger.hosts
    assert not manager._root._children


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Turn the collector off: objects in a reference cycle stay."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Interrupt(KeyboardInterrupt):
    """A KeyboardInterrupt to which there can be weak references."""


async def interrupted(group: TaskGroup) -> None:
    async with group:
        raise Interrupt


async def failing(group: TaskGroup) -> None:
    async with group:
        raise LookupError("no such row")


async def with_failing_task(group: TaskGroup) -> None:
    async with group:
        group.create_task(fail(LookupError("no such row")))


async def out_of_time(group: TaskGroup) -> None:
    async with asyncio.timeout(1), group:
        group.create_task(rest())


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("block", [interrupted, failing, with_failing_task, out_of_time])
async def test_group_keeps_neither_its_error_nor_its_host(block: Any) -> None:
    """A block's handled error and its task are freed while the group is still referenced."""
    manager = TaskManager()
    group = manager.group("load")
    caught: list[weakref.ref[BaseException]] = []

    async def host() -> None:
        try:
            await block(group)
        except BaseException as error:
            caught.append(weakref.ref(error.__cause__ or error))

    task = asyncio.create_task(host())
    await asyncio.wait([task])
    assert [error() for error in caught] == [None]
    freed = weakref.ref(task)
    del task
    await settle()
    assert freed() is None
    assert not manager._ledger.hosts


@pytest.mark.usefixtures("no_collector")
async def test_host_that_a_block_ended_is_freed() -> None:
    """A task that ends by the error of its block is freed with the error, while the group is still here."""
    group = TaskManager().group("load")
    task = asyncio.create_task(failing(group))
    await asyncio.wait([task])
    with pytest.raises(ExceptionGroup) as caught:
        task.result()
    freed = weakref.ref(task)
    del task, caught
    await settle()
    assert freed() is None


async def test_finished_group_takes_no_tasks() -> None:
    """A task for a group whose block is over is refused, its coroutine closed."""
    async with TaskManager().group("load") as group:
        pass
    with pytest.raises(
        GroupClosedError,
        match=rf"^cannot create task 'late': group '{group.id}' is finished; "
        r"work that outlives the block belongs in manager\.create_task\(\.\.\.\)$",
    ):
        group.create_task(rest(), name="late")
    gc.collect()


async def test_group_that_is_not_entered_takes_no_tasks() -> None:
    """The message says to enter the group."""
    with pytest.raises(
        GroupClosedError,
        match=r"^cannot create task 'rest': group 'load' has not been entered; "
        r"enter it first: async with group$",
    ):
        TaskManager().group("load").create_task(rest())


async def test_group_can_be_entered_once() -> None:
    """Each block needs a group of its own."""
    async with TaskManager().group("load") as group:
        pass
    with pytest.raises(
        RuntimeError,
        match=rf"^group '{group.id}' has already been entered: make a new one for each block$",
    ):
        async with group:
            raise AssertionError("unreachable")


async def test_group_cannot_be_left_before_it_is_entered() -> None:
    """__aexit__ by hand without __aenter__ is an error."""
    with pytest.raises(RuntimeError, match=r"^group 'load' has not been entered: use it with async with$"):
        await TaskGroup("load").__aexit__(None, None, None)


def test_group_cannot_be_entered_outside_of_a_task() -> None:
    """Without a task there is no body to cancel."""
    loop = asyncio.new_event_loop()
    errors: list[BaseException] = []

    def step() -> None:
        try:
            TaskGroup("load").__aenter__().send(None)
        except RuntimeError as error:
            errors.append(error)
        loop.stop()

    loop.call_soon(step)
    loop.run_forever()
    loop.close()
    assert str(errors[0]) == "group 'load' cannot determine the parent task: enter it in a task"


# -- errors ----------------------------------------------------------------------------------------


async def test_failing_task_cancels_its_siblings_and_the_body() -> None:
    """A failure ends the whole group with cause sibling_failed, and the block raises it in a group."""
    with pytest.raises(ExceptionGroup, match="unhandled errors in group 'load#1'") as caught:
        async with TaskManager().group("load") as group:
            sibling = group.create_task(rest())
            group.create_task(fail(ValueError("no")), name="bad")
            await rest()
    assert [repr(error) for error in caught.value.exceptions] == ["ValueError('no')"]
    assert sibling.cause is not None
    assert sibling.cause.kind is CancelKind.SIBLING_FAILED
    assert sibling.cause.message == "bad failed: ValueError('no')"
    assert sibling.cause.asked_by == "bad"


async def test_all_errors_are_raised_together() -> None:
    """The errors of several tasks and of the body are raised in one group."""

    async def break_on_cancel() -> None:
        try:
            await rest()
        finally:
            raise LookupError("clean-up")

    with pytest.raises(ExceptionGroup) as caught:
        async with TaskManager().group("load") as group:
            group.create_task(break_on_cancel())
            await settle()
            raise ValueError("body")
    assert {type(error) for error in caught.value.exceptions} == {LookupError, ValueError}


async def test_body_that_raises_cancels_the_tasks() -> None:
    """An error in the body ends the tasks, with cause scope_ended."""
    with pytest.raises(ExceptionGroup):
        async with TaskManager().group("load") as group:
            task = group.create_task(rest())
            raise ValueError("body")
    assert task.cause is not None
    assert task.cause.kind is CancelKind.SCOPE_ENDED
    assert task.cause.message == "the block raised ValueError('body')"


async def test_failure_raised_by_the_group_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """An error that the block raises is reported nowhere else, neither by us nor by asyncio."""
    with pytest.raises(ExceptionGroup):
        async with TaskManager(on_error=lambda info, error: pytest.fail("reported")).group("load") as group:
            group.create_task(fail(ValueError("no")))
    gc.collect()
    assert not caplog.messages


async def test_isolated_group_reports_failures_and_continues() -> None:
    """on_error="isolate": siblings and body continue, and the failure goes to on_error."""
    reported: list[str] = []
    manager = TaskManager(on_error=lambda info, error: reported.append(f"{info.name}: {error}"))
    async with manager.group("load", on_error="isolate") as group:
        sibling = group.create_task(asyncio.sleep(1, "fine"))
        group.create_task(fail(ValueError("no")), name="bad")
    assert sibling.result() == "fine"
    assert reported == ["bad: no"]


async def test_failure_without_a_repr_still_ends_the_group() -> None:
    """An exception whose __repr__ raises cancels the siblings, and is raised, as any other."""

    class Mute(Exception):
        def __repr__(self) -> str:
            raise ValueError("no repr")

    with pytest.raises(ExceptionGroup) as caught:
        async with TaskManager().group("load") as group:
            sibling = group.create_task(rest())
            group.create_task(fail(Mute()))
    assert isinstance(caught.value.exceptions[0], Mute)
    assert kind_of(sibling) is CancelKind.SIBLING_FAILED
    with pytest.raises(ExceptionGroup):
        async with TaskManager().group("load"):
            raise Mute


async def test_failure_in_a_block_that_was_never_left_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """If the host ends without leaving its block, nothing can raise the failure, so it is logged."""
    group = TaskManager().group("load")

    async def careless() -> None:
        await group.__aenter__()
        group.create_task(fail(ValueError("no")), name="bad")

    await asyncio.create_task(careless())
    await settle()
    assert caplog.messages == [f"task '{group.id}/bad' failed and nobody awaits it"]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
@pytest.mark.parametrize("on_error", ["cancel", "isolate"])
def test_system_exit_of_a_task_ends_the_group_bare(error: BaseException, on_error: Any) -> None:
    """SystemExit and KeyboardInterrupt of a task cancel the siblings and are not wrapped, isolated or not."""
    manager = TaskManager()
    raised: list[BaseException] = []

    async def main() -> None:
        try:
            async with manager.group("load", on_error=on_error) as group:
                group.create_task(rest(), name="sibling")
                group.create_task(fail(error))
        except BaseException as caught:
            raised.append(caught)
            raise

    with pytest.raises(type(error)):
        run(main())
    assert raised == [error]
    assert (manager.stats().failed, manager.stats().cancelled) == (1, 1)


async def test_second_system_exit_is_dropped_for_the_first() -> None:
    """Of two such exceptions, the block raises the first."""
    first, second = SystemExit(1), SystemExit(2)

    class Exit(TaskGroup):
        __slots__ = ()

    group = Exit("load", manager=TaskManager())
    with pytest.raises(SystemExit) as caught:
        async with group:
            assert group._scope is not None
            task = group.create_task(give(1))
            await task
            group._scope.child_failed(group, task, first)
            group._scope.child_failed(group, task, second)
            raise second
    assert caught.value is first


async def test_body_that_raises_system_exit_is_not_wrapped() -> None:
    """SystemExit in the body cancels the tasks and passes through."""
    with pytest.raises(SystemExit):
        async with TaskManager().group("load") as group:
            task = group.create_task(rest())
            raise SystemExit(3)
    assert kind_of(task) is CancelKind.SCOPE_ENDED


async def numbers(group: TaskGroup) -> AsyncIterator[int]:
    async with group:
        task = group.create_task(rest())
        yield 1
        await task


async def test_closing_a_generator_inside_a_block_raises_nothing() -> None:
    """aclose() ends the generator's block and its tasks; asyncio's TaskGroup does so from Python 3.15 on."""
    group = TaskManager().group("load")
    generator: Any = numbers(group)
    await anext(generator)
    (task,) = group.tasks
    await generator.aclose()
    assert task.cancelled()
    assert kind_of(task) is CancelKind.SCOPE_ENDED


async def test_closing_a_generator_hides_no_failure_of_its_block() -> None:
    """The tasks' errors are raised by aclose(), with the GeneratorExit beside them."""
    group = TaskManager().group("load")
    generator: Any = numbers(group)
    await anext(generator)
    failed = asyncio.Event()

    async def fails() -> None:
        failed.set()
        raise ValueError("no")

    group.create_task(fails())
    await failed.wait()
    with pytest.raises(BaseExceptionGroup) as caught:
        await generator.aclose()
    assert {type(error) for error in caught.value.exceptions} == {GeneratorExit, ValueError}


# -- cancel() --------------------------------------------------------------------------------------


async def test_cancel_in_the_body_leaves_the_block_silently() -> None:
    """cancel() ends body and tasks, and the code after the block continues."""
    async with TaskManager().group("load") as group:
        task = group.create_task(rest())
        group.cancel("no longer wanted")
        await rest()
    host = asyncio.current_task()
    assert host is not None
    assert host.cancelling() == 0
    assert task.cause is not None
    assert task.cause.message == "no longer wanted"
    await asyncio.sleep(1)


async def test_cancel_just_before_the_end_of_the_body_does_not_strike_later() -> None:
    """A cancel() that the body does not meet at an await has no effect behind the block."""
    async with TaskManager().group("load") as group:
        group.cancel()
    await asyncio.sleep(1)


async def test_cancel_from_outside_leaves_the_block_silently() -> None:
    """Another task may cancel the group; the block is left without an exception."""
    groups: list[TaskGroup] = []

    async def host() -> str:
        async with TaskManager().group("load") as group:
            groups.append(group)
            group.create_task(rest())
            await rest()
        return "went on"

    task = asyncio.create_task(host())
    await settle()
    groups[0].cancel()
    assert await task == "went on"
    assert task.cancelling() == 0


async def test_cancel_by_a_child_leaves_the_block_silently() -> None:
    """A task of the group that cancels it is cancelled too."""
    async with TaskManager().group("load") as group:

        async def child() -> None:
            group.cancel("found it")
            await rest()

        task = group.create_task(child())
        await rest()
    assert task.status is TaskStatus.CANCELLED
    assert task.cause is not None
    assert task.cause.message == "found it"


async def test_cancel_while_the_block_waits_for_its_tasks() -> None:
    """A group may be cancelled while its block waits at its end."""
    start = now()
    async with TaskManager().group("load") as group:
        asyncio.get_running_loop().call_later(2, group.cancel)
        group.create_task(rest())
    assert now() - start == 2


async def test_cancel_before_entering_strikes_at_the_first_await() -> None:
    """A group that was cancelled before its block refuses tasks and ends the body at its first await."""
    group = TaskManager().group("load")
    group.cancel("too late")
    reached: list[str] = []
    async with group:
        with pytest.raises(GroupClosedError, match=r"is closed \(explicit\)"):
            group.create_task(rest())
        reached.append("before the await")
        await asyncio.sleep(0)
        reached.append("behind it")
    assert reached == ["before the await"]


async def test_cancel_after_the_end_does_nothing() -> None:
    """A group that is over can be cancelled without effect."""
    async with TaskManager().group("load") as group:
        task = group.create_task(give(1))
    group.cancel()
    await asyncio.sleep(1)
    assert task.result() == 1


async def test_second_cancel_cancels_none_again() -> None:
    """Cleanup is not interrupted by a second cancel()."""
    async with TaskManager().group("load") as group:
        task = group.create_task(ignore_cancels(5))
        await settle()
        group.cancel("first")
        group.cancel("second")
        assert task.cancelling() == 1
    assert group.cancel_event.cause is not None
    assert group.cancel_event.cause.message == "first"


async def test_cancelled_group_takes_no_tasks() -> None:
    """Once cancelled a scoped group is closed, and says why."""
    async with TaskManager().group("load") as group:
        group.cancel()
        with pytest.raises(GroupClosedError, match=rf"group '{group.id}' is closed \(explicit\); work that"):
            group.create_task(rest())


async def test_errors_during_cancel_are_raised() -> None:
    """cancel() is silent about the cancellation, not about errors."""

    async def break_on_cancel() -> None:
        try:
            await rest()
        finally:
            raise ValueError("clean-up")

    with pytest.raises(ExceptionGroup) as caught:
        async with TaskManager().group("load") as group:
            group.create_task(break_on_cancel())
            await settle()
            group.cancel()
            await rest()
    assert [str(error) for error in caught.value.exceptions] == ["clean-up"]


async def test_body_that_swallows_the_cancel_continues() -> None:
    """A body that catches its cancellation by cancel() may end in peace; nothing is left over."""
    async with TaskManager().group("load") as group:
        group.cancel()
        try:
            await rest()
        except asyncio.CancelledError:
            await asyncio.sleep(3)
    await asyncio.sleep(1)


# -- cancelled from outside ------------------------------------------------------------------------


async def test_external_cancel_of_the_host_cancels_the_tasks_and_propagates() -> None:
    """Cancelling the task in the block cancels the group, waits for it, and propagates."""
    tasks: list[ManagedTask[None]] = []

    async def host() -> None:
        async with TaskManager().group("load") as group:
            tasks.append(group.create_task(rest()))
            await rest()

    task = asyncio.create_task(host())
    await settle()
    task.cancel("shutting down")
    with pytest.raises(asyncio.CancelledError, match="shutting down"):
        await task
    assert tasks[0].cause is not None
    assert tasks[0].cause.kind is CancelKind.EXPLICIT
    assert tasks[0].cause.message == "shutting down"


async def test_managed_host_passes_its_cause_on() -> None:
    """Tasks below a managed task are cancelled with that task's cause."""
    manager = TaskManager()
    tasks: list[ManagedTask[None]] = []

    async def host() -> None:
        async with manager.group("load") as group:
            tasks.append(group.create_task(rest()))

    task = manager.create_task(host())
    await settle()
    task.cancel("enough")
    await asyncio.wait([task])
    assert task.status is TaskStatus.CANCELLED
    assert tasks[0].cause is task.cause


async def test_host_cancelled_again_and_again_still_waits() -> None:
    """A host that is cancelled while it waits for its tasks waits on until they have ended."""
    tasks: list[ManagedTask[str]] = []

    async def host() -> None:
        async with TaskManager().group("load") as group:
            tasks.append(group.create_task(ignore_cancels(5)))

    task = asyncio.create_task(host())
    await settle()
    task.cancel()
    await settle()
    task.cancel()
    await settle()
    assert not task.done()
    await asyncio.wait([task])
    assert task.cancelled()
    assert tasks[0].result() == "ignored"
    assert tasks[0].cancelling() == 1


async def test_errors_go_before_an_external_cancel_which_arrives_later() -> None:
    """With errors in hand the block raises them; the host's cancellation strikes at its next await."""
    seen: list[BaseException] = []

    async def host() -> None:
        try:
            async with TaskManager().group("load") as group:
                group.create_task(fail(ValueError("no")))
                await settle()
        except ExceptionGroup as error:
            seen.append(error)
        try:
            await asyncio.sleep(1)
        except asyncio.CancelledError as error:
            seen.append(error)
            raise

    task = asyncio.create_task(host())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel("enough")
    await asyncio.wait([task])
    assert [type(error) for error in seen] == [ExceptionGroup, asyncio.CancelledError]
    assert task.cancelled()


async def test_own_cancel_and_external_cancel_together_propagate() -> None:
    """Only our own cancellation is withdrawn; any other one propagates."""
    groups: list[TaskGroup] = []

    async def host() -> None:
        async with TaskManager().group("load") as group:
            groups.append(group)
            await rest()

    task = asyncio.create_task(host())
    await settle()
    groups[0].cancel()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert task.cancelling() == 1


async def test_group_in_a_task_that_is_being_cancelled_already() -> None:
    """A block entered during cleanup compares with the count on entry: cancel() is silent there too."""
    reached: list[str] = []

    async def host() -> None:
        try:
            await rest()
        finally:
            async with TaskManager().group("tidy") as group:
                group.create_task(rest())
                await settle()
                group.cancel()
                await rest()
            await asyncio.sleep(1)
            reached.append("behind the block")

    task = asyncio.create_task(host())
    await settle()
    task.cancel()
    await asyncio.wait([task])
    assert reached == ["behind the block"]
    assert task.cancelling() == 1


async def test_awaiting_a_cancelled_task_of_the_group_is_forwarded() -> None:
    """A CancelledError that came from a single cancelled task is the body's own affair, as in asyncio."""
    with pytest.raises(asyncio.CancelledError):
        async with TaskManager().group("load") as group:
            task = group.create_task(rest())
            other = group.create_task(rest())
            await settle()
            task.cancel()
            await task
    assert kind_of(other) is CancelKind.SCOPE_ENDED


async def test_cancelled_task_does_not_disturb_its_siblings() -> None:
    """A task that ends cancelled is no failure of the group."""
    async with TaskManager().group("load") as group:
        task, other = group.create_task(rest()), group.create_task(asyncio.sleep(5, "fine"))
        await settle()
        task.cancel()
    assert other.result() == "fine"


# -- timeouts --------------------------------------------------------------------------------------


async def test_group_timeout_ends_body_and_tasks() -> None:
    """A group that runs into its timeout cancels all below it and raises TimeoutError."""
    start = now()
    group = TaskManager().group("load", timeout=2.5)
    with pytest.raises(TimeoutError, match=r"^group 'load#1' ran into its timeout of 2\.5 s$"):
        async with group:
            task = group.create_task(rest())
            await rest()
    assert now() - start == 2.5
    assert task.cause is not None
    assert (task.cause.kind, task.cause.message) == (CancelKind.TIMEOUT, "group timeout of 2.5 s")
    host = asyncio.current_task()
    assert host is not None
    assert host.cancelling() == 0


async def test_group_timeout_while_the_block_waits() -> None:
    """The timeout counts while the block waits for its tasks, too."""
    with pytest.raises(TimeoutError):
        async with TaskManager().group("load", timeout=1) as group:
            group.create_task(rest())


async def test_group_that_ends_in_time_leaves_no_timer() -> None:
    """A timeout that is not reached has no effect."""
    async with TaskManager().group("load", timeout=1) as group:
        group.create_task(give(1))
    await asyncio.sleep(2)


async def test_timeout_of_a_group_that_is_being_cancelled_is_silent() -> None:
    """A group that was cancelled before its timeout is left silently."""
    async with TaskManager().group("load", timeout=1) as group:
        group.create_task(ignore_cancels(3))
        await settle()
        group.cancel()


async def test_errors_go_before_the_timeout() -> None:
    """An error of the cleanup after the timeout is raised instead of the timeout."""

    async def break_on_cancel() -> None:
        try:
            await rest()
        finally:
            raise ValueError("clean-up")

    with pytest.raises(ExceptionGroup):
        async with TaskManager().group("load", timeout=1) as group:
            group.create_task(break_on_cancel())


async def test_external_cancel_goes_before_the_timeout() -> None:
    """A host that is cancelled while its group times out is cancelled."""

    async def host() -> None:
        async with TaskManager().group("load", timeout=1) as group:
            group.create_task(ignore_cancels(3))

    task = asyncio.create_task(host())
    await asyncio.sleep(2)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_asyncio_timeout_around_the_block() -> None:
    """asyncio.timeout around a block ends the group, and is a TimeoutError outside."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            async with TaskManager().group("load") as group:
                task = group.create_task(rest())
    assert task.cancelled()
    host = asyncio.current_task()
    assert host is not None
    assert host.cancelling() == 0


# -- nesting ---------------------------------------------------------------------------------------


async def test_block_inside_a_block_is_below_it() -> None:
    """`async with` inside `async with` nests, and the outer one is current again afterwards."""
    manager = TaskManager()
    async with manager.group("a") as a:
        async with manager.group("b") as b:
            assert b.parent is a
        async with manager.group("c") as c:
            assert c.parent is a
        async with manager.get_group("label").group("d") as d:
            assert d.parent is manager.get_group("label")
        async with manager.group("e") as e:
            assert e.parent is a


async def test_block_in_a_managed_task_is_below_its_group() -> None:
    """A block hangs below the group of the task that it is in."""
    manager = TaskManager()

    async def work() -> TaskGroup | None:
        async with manager.group("block") as group:
            return group.parent

    assert await manager.create_task(work(), group="ingest") is manager.get_group("ingest")


async def test_block_of_another_manager_is_below_that_managers_root() -> None:
    """Groups of two managers do not nest in each other."""
    one, other = TaskManager("one"), TaskManager("other")

    async def work() -> TaskGroup | None:
        async with other.group("block") as group:
            return group.parent

    assert await one.create_task(work(), group="ingest") is other.get_group("root")


async def test_cancelling_the_outer_group_cancels_the_inner_one() -> None:
    """A cancellation goes down through blocks in plain tasks; they end silently."""
    manager = TaskManager()
    tasks: list[ManagedTask[None]] = []

    async def nested(outer: TaskGroup) -> str:
        async with outer.group("inner") as inner:
            tasks.append(inner.create_task(rest()))
            await rest()
        return "went on"

    async with manager.group("outer") as outer:
        plain = asyncio.create_task(nested(outer))
        await settle()
        outer.cancel("enough")
        await rest()
    assert await plain == "went on"
    assert tasks[0].cause is not None
    assert tasks[0].cause.message == "enough"


async def test_block_below_that_is_hosted_by_a_task_of_another_group_is_cancelled() -> None:
    """A block nested below is reached although its host is a managed task from elsewhere."""
    manager = TaskManager()
    start = now()

    async def nested(outer: TaskGroup) -> str:
        async with outer.group("inner"):
            await rest()
        return "went on"

    async with manager.group("outer") as outer:
        elsewhere = manager.create_task(nested(outer))
        await asyncio.sleep(1)
        outer.cancel()
    assert now() - start == 1
    assert await elsewhere == "went on"


async def test_cancelling_the_inner_group_leaves_the_outer_alone() -> None:
    """A cancellation never goes up."""
    async with TaskManager().group("outer") as outer:
        task = outer.create_task(asyncio.sleep(2, "fine"))
        async with outer.group("inner") as inner:
            inner.create_task(rest())
            inner.cancel()
        assert not outer.cancel_event.is_set()
    assert task.result() == "fine"


async def test_both_blocks_of_one_task_are_left_by_the_outer_ones_cancel() -> None:
    """Cancelling the outer of two blocks in one task leaves both, silently."""
    manager = TaskManager()
    reached: list[str] = []
    async with manager.group("outer") as outer:
        async with manager.group("inner"):
            outer.cancel()
            await rest()
        reached.append("between the blocks")
        await asyncio.sleep(0)
        reached.append("not here")
    assert reached in ([], ["between the blocks"])
    await asyncio.sleep(1)


async def test_group_entered_below_a_cancelled_one_is_born_cancelled() -> None:
    """A block below a cancelled group takes no tasks; its body is up to the host."""
    async with TaskManager().group("outer") as outer:
        outer.cancel()
        try:
            await rest()
        except asyncio.CancelledError:
            async with outer.group("inner") as inner:
                assert inner.cancel_event.is_set()
                with pytest.raises(GroupClosedError, match="explicit"):
                    inner.create_task(rest())
                await asyncio.sleep(1)


async def test_failing_nested_block_fails_its_host() -> None:
    """An error in a nested block goes up through its host task, wrapped once per block."""
    manager = TaskManager()

    async def nested() -> None:
        async with manager.group("inner") as inner:
            inner.create_task(fail(ValueError("deep")))

    with pytest.raises(ExceptionGroup) as caught:
        async with manager.group("outer") as outer:
            outer.create_task(nested())
    [inner_group] = caught.value.exceptions
    assert isinstance(inner_group, ExceptionGroup)
    assert [str(error) for error in inner_group.exceptions] == ["deep"]


async def test_asyncio_task_group_inside_a_block() -> None:
    """asyncio's own TaskGroup in the body fails as it does anywhere, and ours takes its error."""
    with pytest.raises(ExceptionGroup) as caught:
        async with TaskManager().group("ours") as group:
            task = group.create_task(rest())
            async with asyncio.TaskGroup() as theirs:
                theirs.create_task(fail(ValueError("no")))
                await rest()
    assert isinstance(caught.value.exceptions[0], ExceptionGroup)
    assert kind_of(task) is CancelKind.SCOPE_ENDED


async def test_cancel_group_by_name_from_the_body_spares_the_body() -> None:
    """manager.cancel_group() called in a block waits for the tasks, and does not cancel its caller."""
    manager = TaskManager()
    async with manager.group("load") as group:
        group.create_task(rest())
        assert await manager.cancel_group("load") == 1
        assert group.tasks == ()


async def test_cancel_group_from_outside_ends_the_body() -> None:
    """manager.cancel_group() called elsewhere ends the block's body too."""
    manager = TaskManager()

    async def host() -> str:
        async with manager.group("load") as group:
            group.create_task(rest())
            await rest()
        return "went on"

    task = asyncio.create_task(host())
    await settle()
    assert await manager.cancel_group("load") == 1
    assert await task == "went on"


# -- span ------------------------------------------------------------------------------------------


async def test_block_with_a_span_is_the_parent_of_its_tasks(spans: SpanRecorder) -> None:
    """span=True: the group's span is the parent of its tasks' spans, and is not current in the body."""
    manager = TaskManager(tracer_provider=spans.provider)
    async with manager.group("load", span=True) as group:
        group.create_task(give(1), name="inside")
        await manager.create_task(give(1), name="beside")
    assert [span.name for span in spans.children(spans.span("load"))] == ["inside"]


async def test_block_with_a_span_needs_no_sdk() -> None:
    """span=True does nothing where no SDK is set up."""
    async with TaskManager().group("load", span=True) as group:
        assert await group.create_task(give(1)) == 1


async def test_block_whose_span_cannot_start_still_runs(caplog: pytest.LogCaptureFixture) -> None:
    """A raising tracer breaks no block; it is complained of once."""
    from opentelemetry.trace import TracerProvider

    class Broken(TracerProvider):
        def get_tracer(self, *args: Any, **kwargs: Any) -> Any:
            return self

        def start_span(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("broken")

    manager = TaskManager(tracer_provider=Broken())
    async with manager.group("load", span=True) as group:
        task = group.create_task(give(1))
    assert task.result() == 1
    assert not manager._ledger.hosts
    assert len(caplog.messages) == 1


async def test_cause_made_by_hand_closes_the_group() -> None:
    """The middleware's cause is the reason in the refusal of a task."""
    async with TaskManager().group("load") as group:
        group._signal_cancel(CancelCause(CancelKind.CLIENT_DISCONNECT))
        with pytest.raises(GroupClosedError, match="client_disconnect"):
            group.create_task(rest())
