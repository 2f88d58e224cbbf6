"""The errors of this package, and wrong use: refused with a message that names the value and the fix."""

from __future__ import annotations

import asyncio
import gc
import inspect
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from otel_tasks import (
    GroupClosedError,
    IllegalTransitionError,
    ManagerClosedError,
    OtelTasksError,
    TaskExistsError,
    TaskGroup,
    TaskManager,
    TaskNotFoundError,
    WrongLoopError,
    WrongThreadError,
    managed_task,
)
from tests.helpers import give, rest

Use = Callable[[TaskManager], object]


@pytest.mark.parametrize(
    "error",
    [
        TaskNotFoundError,
        TaskExistsError,
        GroupClosedError,
        ManagerClosedError,
        WrongLoopError,
        WrongThreadError,
        IllegalTransitionError,
    ],
)
def test_every_error_has_one_base(error: type[Exception]) -> None:
    """Catching OtelTasksError catches them all."""
    assert issubclass(error, OtelTasksError)


def test_errors_derive_from_those_of_the_standard_library() -> None:
    """Code that catches KeyError or RuntimeError, as around asyncio's own, catches these too."""
    assert issubclass(TaskNotFoundError, KeyError)
    for error in (GroupClosedError, ManagerClosedError, WrongLoopError, WrongThreadError):
        assert issubclass(error, RuntimeError)


def test_not_found_reads_as_a_sentence() -> None:
    """KeyError would show its message with quotes around it."""
    assert str(TaskNotFoundError("no task is called 'a'")) == "no task is called 'a'"


async def coroutine_function() -> None:
    raise AssertionError("never runs")


def plain_function() -> int:
    return 1


def future() -> Any:
    return asyncio.get_running_loop().create_future()


CREATING: list[tuple[Use, type[Exception], str]] = [
    (
        lambda manager: manager.create_task(coroutine_function),  # type: ignore[call-overload]  # the mistake under test
        TypeError,
        "create_task() takes a coroutine, got the function coroutine_function: "
        "write create_task(coroutine_function(...))",
    ),
    (
        lambda manager: manager.create_task(future()),
        TypeError,
        "create_task() takes a coroutine, got a Future: "
        "await it inside a coroutine function, and pass that one's coroutine",
    ),
    (
        lambda manager: manager.create_task(5),  # type: ignore[call-overload]  # the mistake under test
        TypeError,
        "create_task() takes a coroutine, got 5: write create_task(work(...)) with `async def work(...)`",
    ),
    (
        lambda manager: manager.create_task(rest(), name=""),
        ValueError,
        "task name must not be empty: leave it out to have one made",
    ),
    (
        lambda manager: manager.create_task(rest(), name=["a"]),  # type: ignore[call-overload]  # the mistake under test
        TypeError,
        "task name must be a string, got ['a']",
    ),
    (
        lambda manager: manager.create_task(rest(), group=""),
        ValueError,
        'group name must not be empty: leave it out for the manager\'s root, which get_group("root") returns',
    ),
    (
        lambda manager: manager.create_task(rest(), group="a..b"),
        ValueError,
        "group name must not have empty parts between its dots, got 'a..b'",
    ),
    (
        lambda manager: manager.create_task(rest(), group=7),  # type: ignore[call-overload]  # the mistake under test
        TypeError,
        "group must be a name or a TaskGroup, got 7: "
        'write group="mail", or pass a group object, such as manager.get_group("mail")',
    ),
    (
        lambda manager: manager.create_task(rest(), group=TaskManager("other").get_group("g")),
        ValueError,
        "group 'g' belongs to manager 'other', not to this one, 'mine': "
        "call the group itself, as in group.create_task(...), or its manager",
    ),
    (
        lambda manager: manager.create_task(rest(), timeout=-1),
        ValueError,
        "timeout must be at least 0 seconds, got -1",
    ),
    (
        lambda manager: manager.create_task(rest(), timeout=float("nan")),
        ValueError,
        "timeout must be at least 0 seconds, got nan",
    ),
    (
        lambda manager: manager.create_task(rest(), timeout="5"),  # type: ignore[call-overload]  # the mistake under test
        TypeError,
        "timeout must be seconds as a number, or None for no bound, got '5'",
    ),
    (
        lambda manager: manager.create_task(rest(), timeout=True),
        TypeError,
        "timeout must be seconds as a number, or None for no bound, got True",
    ),
    (
        lambda manager: manager.create_task(rest(), priority="urgent"),  # type: ignore[call-overload]  # the mistake under test
        ValueError,
        "priority must be one of TaskPriority.LOW, TaskPriority.NORMAL, TaskPriority.HIGH, "
        "TaskPriority.CRITICAL, got 'urgent'",
    ),
    (
        lambda manager: manager.create_task(rest(), on_conflict="ignore"),  # type: ignore[call-overload]  # the mistake under test
        ValueError,
        "on_conflict must be one of 'error', 'suffix', 'return', 'replace', got 'ignore'",
    ),
    (
        lambda manager: manager.create_task(rest(), metadata=5),  # type: ignore[call-overload]  # the mistake under test
        TypeError,
        "metadata must be a mapping of names to values, got 5",
    ),
    (
        lambda manager: manager.group(""),
        ValueError,
        'group name must not be empty: name it after its work, such as "load"',
    ),
    (
        lambda manager: manager.group("load", span="no"),  # type: ignore[arg-type]  # the mistake under test
        TypeError,
        "span must be True or False, got 'no'",
    ),
    (
        lambda manager: manager.group("load", on_error="raise"),  # type: ignore[arg-type]  # the mistake under test
        ValueError,
        "on_error must be one of 'cancel', 'isolate', got 'raise'",
    ),
    (lambda manager: TaskGroup("load", timeout=-2), ValueError, "timeout must be at least 0 seconds, got -2"),
    (
        lambda manager: TaskManager(""),
        ValueError,
        'manager name must not be empty: leave it out for "default"',
    ),
    (
        lambda manager: TaskManager(history=-1),
        ValueError,
        "history must be a whole number of tasks, at least 0, got -1",
    ),
    (
        lambda manager: TaskManager(history=1.5),  # type: ignore[arg-type]  # the mistake under test
        ValueError,
        "history must be a whole number of tasks, at least 0, got 1.5",
    ),
    (
        lambda manager: TaskManager(history=True),
        ValueError,
        "history must be a whole number of tasks, at least 0, got True",
    ),
    (
        lambda manager: manager.cleanup_completed_tasks(-1),
        ValueError,
        "max_age must be at least 0 seconds, got -1",
    ),
    (
        lambda manager: managed_task(timeout=-1),
        ValueError,
        "timeout must be at least 0 seconds, got -1",
    ),
    (
        lambda manager: managed_task(name=""),
        ValueError,
        "task name must not be empty: leave it out to have one made",
    ),
]


@pytest.mark.parametrize(
    ("use", "error", "message"), CREATING, ids=lambda value: value if isinstance(value, str) else ""
)
async def test_wrong_use_names_the_call_the_value_and_the_fix(
    use: Use, error: type[Exception], message: str
) -> None:
    """A refusal names the value and the right form, changes nothing, and closes the coroutine."""
    manager = TaskManager("mine")
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        use(manager)
    assert manager.stats().created == 0
    gc.collect()


STARTING: list[tuple[Any, str]] = [
    (
        5,
        "start_task() takes a function that returns a coroutine, got 5: "
        "write start_task(name, lambda: work(1))",
    ),
    (
        plain_function,
        "start_task() takes a function that returns a coroutine, and plain_function() returned 1: "
        "declare it as `async def plain_function(...)`",
    ),
]


@pytest.mark.parametrize(("factory", "message"), STARTING, ids=["number", "function"])
async def test_start_task_with_no_coroutine_shows_the_right_line(factory: Any, message: str) -> None:
    """A function that makes no coroutine is refused, and the message shows the right line."""
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        await TaskManager().start_task("a", factory)


WAITING: list[tuple[Callable[[TaskManager], Coroutine[Any, Any, object]], str]] = [
    (
        lambda manager: manager.start_task("", rest),
        'task name must not be empty: name it after its work, as in start_task("import", work)',
    ),
    (
        lambda manager: manager.start_service("", rest),
        'service name must not be empty: name it after its work, as in start_service("prices", work)',
    ),
    (lambda manager: manager.wait_for_task("a", timeout=-1), "timeout must be at least 0 seconds, got -1"),
    (lambda manager: manager.cancel_task("a", timeout=-1), "timeout must be at least 0 seconds, got -1"),
    (lambda manager: manager.cancel_group("a", grace=-1), "grace must be at least 0 seconds, got -1"),
    (lambda manager: manager.cancel_group("a", timeout=-1), "timeout must be at least 0 seconds, got -1"),
    (lambda manager: manager.cancel_all_tasks(grace=-1), "grace must be at least 0 seconds, got -1"),
    (lambda manager: manager.shutdown(grace=-1), "grace must be at least 0 seconds, got -1"),
    (lambda manager: manager.shutdown(timeout=-1), "timeout must be at least 0 seconds, got -1"),
]


@pytest.mark.parametrize(("use", "message"), WAITING)
async def test_wrong_value_is_refused_before_anything_happens(
    use: Callable[[TaskManager], Coroutine[Any, Any, object]], message: str
) -> None:
    """A wrong duration or name neither cancels nor closes anything."""
    manager = TaskManager()
    task = manager.create_task(give(1), name="a", group="a")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        await use(manager)
    assert task.cancelling() == 0
    assert await manager.create_task(give(2)) == 2


async def test_group_of_another_manager_is_refused_when_cancelling() -> None:
    """cancel_group() takes groups of its own manager only."""
    other = TaskManager("other").get_group("g")
    with pytest.raises(ValueError, match=r"^group 'g' belongs to manager 'other', not to this one"):
        await TaskManager().cancel_group(other)


LOOKING: list[tuple[Callable[[TaskManager, Any], object], str]] = [
    (lambda manager, task: manager.get_task(task), "looked up by its name, id, or uid"),
    (lambda manager, task: manager.get_task_info(task), "looked up by its name, id, or uid"),
    (lambda manager, task: manager.wait_for_task(task), "looked up by its name, id, or uid"),
    (lambda manager, task: manager.cancel_task(task), "looked up by its name, id, or uid"),
    (lambda manager, task: manager.get_group_tasks(task), "group must be a name or a TaskGroup"),
    (lambda manager, task: manager.cancel_group(task), "group must be a name or a TaskGroup"),
    (lambda manager, task: manager.join(task), "group must be a name or a TaskGroup"),
]


@pytest.mark.parametrize(("look", "message"), LOOKING)
async def test_task_in_place_of_a_name_is_refused(
    look: Callable[[TaskManager, Any], object], message: str
) -> None:
    """A task in place of a name is an error and not an unknown name; nothing is cancelled."""
    manager = TaskManager()
    task = manager.create_task(give(1), name="a")
    with pytest.raises(TypeError, match=message):
        found = look(manager, task)
        assert asyncio.iscoroutine(found)
        await found
    assert await task == 1


async def test_group_that_is_not_known_has_nothing_live() -> None:
    """Waiting for a name that no group has returns at once, and cancelling it cancels nothing."""
    manager = TaskManager()
    task = manager.create_task(give(1), group="mail")
    await manager.join("mial")
    assert await manager.cancel_group("mial") == 0
    assert manager.get_group_tasks("mial") == {}
    assert await task == 1


async def test_refused_coroutine_function_is_not_called() -> None:
    """A refused start_task() closes the coroutine that it was given."""
    with pytest.raises(TypeError, match=r"^task name must be a string, got 7$"):
        await TaskManager().start_task(7, rest())  # type: ignore[arg-type]  # the mistake under test
    gc.collect()


async def test_callable_object_is_named_by_its_class() -> None:
    """A callable without a name is named after its type."""

    class Work:
        def __call__(self) -> None: ...

    with pytest.raises(TypeError, match=r"got the function Work: write create_task\(Work\(\.\.\.\)\)$"):
        TaskManager().create_task(Work())  # type: ignore[call-overload]  # the mistake under test


async def test_async_generator_is_no_coroutine() -> None:
    """Neither the function nor its result can be a task; the message says where to iterate."""

    async def lines() -> AsyncIterator[str]:
        yield ""

    message = (
        r"^create_task\(\) takes a coroutine, got the async generator lines: "
        "iterate over it in a coroutine function, and pass its coroutine$"
    )
    for wrong in (lines, lines()):
        with pytest.raises(TypeError, match=message):
            TaskManager().create_task(wrong)  # type: ignore[call-overload]  # the mistake under test


CALLED: list[tuple[Callable[[Any], Any], str]] = [
    (
        lambda manager: manager.put_task(coroutine_function),
        "put_task() takes a coroutine, got the function coroutine_function: "
        "write put_task(coroutine_function(...))",
    ),
    (
        lambda manager: manager.put_task(5),
        "put_task() takes a coroutine, got 5: write put_task(work(...)) with `async def work(...)`",
    ),
    (
        lambda manager: asyncio.wrap_future(manager.create_task_threadsafe(plain_function)),
        "create_task_threadsafe() takes a function that returns a coroutine, "
        "and plain_function() returned 1: declare it as `async def plain_function(...)`",
    ),
    (
        lambda manager: manager.put_task(rest(), color=1),
        "put_task() got an unexpected keyword argument 'color'",
    ),
    (
        lambda manager: manager.run_in_thread(plain_function, color=1),
        "run_in_thread() got an unexpected keyword argument 'color'",
    ),
    (
        lambda manager: manager.create_task_threadsafe(rest(), color=1),
        "create_task_threadsafe() got an unexpected keyword argument 'color'",
    ),
    (
        lambda manager: manager.create_task(rest(), color=1),
        "create_task() got an unexpected keyword argument 'color'",
    ),
]


@pytest.mark.parametrize("cls", [TaskManager, TaskGroup])
def test_methods_have_the_name_of_the_public_class(cls: type) -> None:
    """Python's own errors and warnings show it, and not the part of the class that a method is written in."""
    methods = {name: getattr(cls, name) for name in dir(cls) if not name.startswith("_")}
    shown = {name: method.__qualname__ for name, method in methods.items() if inspect.isfunction(method)}
    assert shown == {name: f"{cls.__name__}.{name}" for name in shown}
    assert "create_task" in shown


async def test_method_that_is_not_awaited_is_named_in_the_warning(recwarn: pytest.WarningsRecorder) -> None:
    """Forgetting `await` is the commonest mistake."""
    TaskManager().start_task("rest", rest)  # type: ignore[unused-coroutine]  # the mistake under test
    gc.collect()
    assert "'TaskManager.start_task' was never awaited" in str(recwarn.pop(RuntimeWarning).message)


@pytest.mark.parametrize(("use", "message"), CALLED)
async def test_message_names_the_function_that_was_called(use: Callable[[Any], Any], message: str) -> None:
    """A function that creates its task through `create_task` puts its own name into the message."""
    async with TaskManager() as manager:
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            await use(manager)
        assert manager.stats().created == 0
    gc.collect()
