"""Wrong uses of the public interface, each of which a checker must refuse.

A comment that ignores nothing is an error (mypy: warn_unused_ignores; pyright: below), so each of
them says that the line is refused. Read by mypy and pyright in `tests/test_typing.py`; never run.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=error

from __future__ import annotations

import asyncio

from otel_tasks import (
    CancelEvent,
    RetryPolicy,
    TaskGroup,
    TaskInfo,
    TaskManager,
    TaskStatus,
    create_task,
    managed_task,
)


async def count(first: int) -> int:
    """A coroutine function."""
    return first


def plain() -> int:
    """No coroutine function."""
    return 1


async def refused(manager: TaskManager, group: TaskGroup, info: TaskInfo, event: CancelEvent) -> None:
    """One mistake a line."""
    create_task(count)  # type: ignore[call-overload]  # the function, not its coroutine
    create_task(plain())  # type: ignore[call-overload]  # no coroutine
    create_task(count(1), "name")  # type: ignore[call-overload]  # options are keyword-only
    create_task(count(1), nmae="n")  # type: ignore[call-overload]  # misspelt
    create_task(count(1), priority="high")  # type: ignore[call-overload]  # a TaskPriority
    create_task(count(1), timeout="1s")  # type: ignore[call-overload]  # seconds
    create_task(count(1), on_conflict="ignore")  # type: ignore[call-overload]  # no such choice
    group.create_task(count)  # type: ignore[arg-type]  # the function, not its coroutine
    create_task(count(1), retry=RetryPolicy())  # type: ignore[call-overload]  # runs only once
    create_task(plain, retry=RetryPolicy())  # type: ignore[arg-type]  # makes no coroutine
    create_task(lambda: count(1), retry=3)  # type: ignore[call-overload]  # a policy
    RetryPolicy(on=int)  # type: ignore[arg-type]  # no exception
    RetryPolicy(jitter=plain)  # type: ignore[arg-type]  # a number
    group.run_in_thread(plain, 1)  # type: ignore[arg-type]  # it takes no argument
    group.create_task_threadsafe(plain)  # type: ignore[arg-type]  # makes no coroutine
    manager.create_task(count(1), group=17)  # type: ignore[call-overload]  # a name or a group
    await manager.start_task("n", plain)  # type: ignore[arg-type]  # makes no coroutine
    await manager.start_service("n", count(1))  # type: ignore[arg-type]  # can be run only once
    texts, numbers = asyncio.Queue[str](), asyncio.Queue[int]()
    await manager.start_consumer("n", texts, count)  # type: ignore[misc]  # it takes a number
    await manager.start_consumer("n", count, count)  # type: ignore[arg-type]  # a source takes no argument
    await manager.start_consumer("n", numbers, plain)  # type: ignore[arg-type]  # makes no coroutine
    await manager.start_consumer("n", numbers, count, drain="none")  # type: ignore[arg-type]  # no such choice
    await manager.start_task(lambda: count(1))  # type: ignore[call-arg, arg-type]  # the name comes first
    manager.group("load", on_error="raise")  # type: ignore[arg-type]  # no such choice
    managed_task(plain)  # type: ignore[arg-type]  # not a coroutine function
    info.status = TaskStatus.FAILED  # type: ignore[misc]  # a snapshot is frozen
    text: str = await create_task(count(1))  # type: ignore[arg-type]  # an int
    print(text, event.set("why"))  # type: ignore[arg-type, func-returns-value]  # a cause


@managed_task
async def work(first: int) -> int:
    """Decorated."""
    return first


async def refused_too() -> None:
    """The decorator keeps the parameters."""
    await work("1")  # type: ignore[arg-type]  # an int
    work.start()  # type: ignore[call-arg]  # an argument is missing
    work.start(1, second=2)  # type: ignore[call-arg]  # one too many
    number: str = work.start(1).result()  # type: ignore[assignment]  # an int
    print(number)
