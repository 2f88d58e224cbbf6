"""Where a task is: the innermost line of the user's code."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import types
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock

import pytest

from otel_tasks._core.frames import Location, Place, Stacks, place_of, suspended_frames
from tests.helpers import settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Generator
    from pathlib import Path

HERE = __file__


async def waits() -> None:
    await asyncio.Event().wait()


async def nested() -> None:
    await waits()


class Wrapped:
    def __await__(self) -> Generator[Any, Any, None]:
        return waits().__await__()


async def awaits_an_object() -> None:
    await Wrapped()


async def generates() -> AsyncIterator[int]:
    await asyncio.sleep(3600)
    yield 1


async def iterates() -> None:
    async for _ in generates():
        pass


async def asks_for_the_next() -> None:
    await anext(generates(), None)


@types.coroutine
def yields_from() -> Generator[Any, Any, None]:
    yield from waits().__await__()


async def awaits_a_generator() -> None:
    await yields_from()


async def awaits_a_future() -> None:
    await asyncio.get_running_loop().create_future()


async def has_a_block() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(waits())


@pytest.mark.parametrize(
    ("function", "where", "calls"),
    [
        (waits, "waits", "Event.wait"),
        (nested, "waits", "Event.wait"),
        (awaits_an_object, "waits", "Event.wait"),
        (iterates, "generates", "sleep"),
        (asks_for_the_next, "generates", "sleep"),
        (awaits_a_generator, "waits", "Event.wait"),
        (awaits_a_future, "awaits_a_future", None),
        (has_a_block, "has_a_block", "TaskGroup.__aexit__"),
    ],
)
async def test_place_of_a_waiting_task(
    function: Callable[[], Coroutine[Any, Any, None]], where: str, calls: str | None
) -> None:
    """The line is the innermost one of the user's code, through every await, with the call made there."""
    task = asyncio.create_task(function())
    await settle()

    place = place_of(Stacks().of_task(task, threading.get_ident()))

    assert place.at is not None
    assert (place.at.file, place.at.function, place.calls) == (HERE, where, calls)
    await end(task)


async def test_task_that_has_not_started_is_at_its_first_line() -> None:
    """Before its first step a task is where its function begins."""
    task = asyncio.create_task(waits())

    place = place_of(Stacks().of_task(task, threading.get_ident()))

    assert place == Place(Location(HERE, waits.__code__.co_firstlineno, "waits"))
    await end(task)


async def test_ended_task_is_nowhere() -> None:
    """A task that has ended has no place."""
    task = asyncio.create_task(asyncio.sleep(0))
    await task

    assert place_of(Stacks().of_task(task, threading.get_ident())) == Place()


async def test_place_of_the_running_task_is_in_what_it_calls() -> None:
    """For the running task, the plain functions it has called count too, but nothing around it."""

    def helper() -> list[types.FrameType]:
        task = asyncio.current_task()
        assert task is not None
        return Stacks().of_task(task, threading.get_ident())

    async def works() -> list[types.FrameType]:
        return helper()

    frames = await asyncio.create_task(works())

    assert [frame.f_code.co_name for frame in frames] == ["works", "helper"]
    assert place_of(frames).at == Location(HERE, helper.__code__.co_firstlineno + 3, helper.__qualname__)


def test_frames_are_taken_once() -> None:
    """One look at all threads serves all questions, and keeps none of the looking frames."""
    stacks = Stacks()

    first, second = stacks.of_thread(threading.get_ident()), stacks.of_thread(threading.get_ident())

    assert first == second
    assert first[-1].f_code is test_frames_are_taken_once.__code__


async def test_running_task_of_an_unknown_thread_is_nowhere() -> None:
    """If the thread of the loop is unknown, the running task has no line."""
    task = asyncio.current_task()
    assert task is not None

    assert Stacks().of_task(task, None) == []
    assert Stacks().of_thread(-1) == []


async def test_interrupted_frame_stands_for_its_thread() -> None:
    """In a signal handler the frames above the interrupted one are left out."""

    def handler(frame: types.FrameType) -> list[types.FrameType]:
        return Stacks(frame).of_thread(threading.get_ident())

    interrupted = sys._getframe()
    assert handler(interrupted)[-1] is interrupted


async def test_lines_of_libraries_count_for_the_user_only_where_there_are_none_of_theirs() -> None:
    """A library's line replaces the user's only if there is none; the innermost library's comes first."""
    inner = made(
        "/venv/lib/python3/site-packages/wire/io.py", "async def read():\n    await wait()", wait=event_wait
    )
    outer = made(
        "/venv/lib/python3/site-packages/web/app.py", "async def serve():\n    await read()", read=inner
    )

    async def mine() -> None:
        await outer()

    assert await seen(mine) == Place(
        Location(HERE, mine.__code__.co_firstlineno + 1, mine.__qualname__), "serve"
    )
    assert await seen(outer) == Place(
        Location("/venv/lib/python3/site-packages/wire/io.py", 2, "read"), "Event.wait"
    )


async def test_installed_application_is_at_home() -> None:
    """If a task's function is from an installed package, the lines of that package are the user's."""
    inner = made(
        "/venv/lib/python3/site-packages/wire/io.py", "async def read():\n    await wait()", wait=event_wait
    )
    outer = made(
        "/venv/lib/python3/site-packages/shop/jobs.py", "async def job():\n    await read()", read=inner
    )

    place = await seen(outer, home=True)

    assert place == Place(Location("/venv/lib/python3/site-packages/shop/jobs.py", 2, "job"), "read")
    assert str(place.at) == "job shop/jobs.py:2"


async def test_only_the_standard_library() -> None:
    """If there is nothing else, the innermost line of the standard library is shown."""
    place = await seen(lambda: asyncio.sleep(3600))

    assert place.at is not None
    assert (place.at.function, place.calls) == ("sleep", None)
    assert str(place.at).startswith(f"sleep asyncio{os.sep}tasks.py:")


class Odd:
    """Raises for each attribute."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class Endless:
    """Awaits itself."""

    cr_frame = None

    @property
    def cr_await(self) -> Endless:
        return self


@pytest.mark.parametrize("odd", [object, Odd, Endless, MagicMock])
def test_odd_awaitables_end_the_search(odd: type[object]) -> None:
    """An awaitable that has no frames, has wrong ones, raises, or leads nowhere is no error."""
    assert suspended_frames(odd()) == []


def test_odd_tasks_are_nowhere() -> None:
    """A task of another kind than asyncio's is no error either."""
    odd: Any = Odd()

    assert Stacks().of_task(odd, threading.get_ident()) == []


def test_path_below_the_working_directory_is_shortened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text shows a path relative to the working directory if the path is below it."""
    monkeypatch.chdir(tmp_path)
    location = Location(str(tmp_path / "shop" / "jobs.py"), 7, "job")

    assert str(location) == f"job {os.path.join('shop', 'jobs.py')}:7"
    assert location.to_dict() == {"file": str(tmp_path / "shop" / "jobs.py"), "line": 7, "function": "job"}

    def gone() -> str:
        raise FileNotFoundError

    monkeypatch.setattr(os, "getcwd", gone)
    assert str(location) == f"job {tmp_path / 'shop' / 'jobs.py'}:7"


def event_wait() -> Coroutine[Any, Any, Any]:
    """A call of a library into the standard library."""
    return asyncio.Event().wait()


def made(file: str, source: str, **names: Any) -> Callable[[], Coroutine[Any, Any, None]]:
    """A coroutine function that stands in a file of this name."""
    namespace: dict[str, Any] = dict(names)
    exec(compile(source, file, "exec"), namespace)  # noqa: S102 - the only way to have code with a given file name
    function: Callable[[], Coroutine[Any, Any, None]] = next(
        value for name, value in namespace.items() if name not in names and name != "__builtins__"
    )
    return function


async def seen(function: Callable[[], Coroutine[Any, Any, Any]], *, home: bool = False) -> Place:
    """The place where a task of this function waits."""
    task = asyncio.create_task(function())
    await settle()
    place = place_of(Stacks().of_task(task, threading.get_ident()), home=home)
    await end(task)
    return place


async def end(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for it."""
    task.cancel()
    await asyncio.wait([task])
