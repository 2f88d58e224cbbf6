"""Five things that one does with tasks: stop one by an event, stop a tree, keep track, watch, queue.

    python examples/task_management_demo.py                  # all five parts
    python examples/task_management_demo.py --only tracking  # one of them

Needs no server, no tracing and no network, and takes about two seconds. Each part ends with a look at the
event loop: a task that is still there would be a leak, and makes the demo fail.
"""

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from anywhere, with nothing installed

from otel_tasks import (
    CancelCause,
    CancelEvent,
    CancelKind,
    TaskManager,
    TaskPriority,
    TaskTracker,
    cleanup_lingering_tasks,
    current_task,
    propagate_cancellation,
    wait_with_cancellation,
)

# --- event: stop a task as soon as an event is set -----------------------------------------------------


async def download(pages: int, complete: asyncio.Event | None = None) -> str:
    """Fetch one page after the other; a cancellation is not caught, but cleaned up after."""
    fetched = 0
    try:
        for _ in range(pages):
            await asyncio.sleep(0.02)
            fetched += 1
        if complete is not None:
            # The caller has its result; the rest need not be waited for.
            complete.set()
            await asyncio.sleep(0.1)
        return f"{fetched} pages"
    finally:
        print(f"  download: closing the connection{'' if fetched == pages else ', before the last page'}")


async def event() -> None:
    """One wait, four ways to end it; nobody polls."""
    loop = asyncio.get_running_loop()

    print("it completes:")
    task = asyncio.create_task(download(2))
    outcome = await wait_with_cancellation(task, cancel_event=asyncio.Event(), timeout=5.0)
    print(f"  {outcome}, with {task.result()}")

    print("its cancel event is set, and says why:")
    async with TaskManager() as manager:
        managed, stop = manager.create_task(download(500)), CancelEvent()
        loop.call_later(0.1, stop.set, CancelCause.make(CancelKind.CLIENT_DISCONNECT, "the user has left"))
        outcome = await wait_with_cancellation(managed, cancel_event=stop, timeout=5.0)
        print(f"  {outcome}, because of {managed.cause}")

    print("its time is up:")
    outcome = await wait_with_cancellation(download(500), timeout=0.1)
    print(f"  {outcome}")

    print("its completion event is set, and it is left alone:")
    complete = asyncio.Event()
    task = asyncio.create_task(download(2, complete))
    outcome = await wait_with_cancellation(task, completion_event=complete, timeout=5.0)
    print(f"  {outcome}, and the task {'has ended' if task.done() else 'runs on'}")
    await task


# --- propagation: one event stops a tree of work -------------------------------------------------------


async def work_until(stop: asyncio.Event, name: str) -> None:
    """Some work that looks at its event between two steps and leaves in good order."""
    steps = 0
    while not stop.is_set():
        await asyncio.sleep(0.01)
        steps += 1
    print(f"  {name} has stopped{'' if steps else ' before it began'}")


async def propagation() -> None:
    """A service, its requests and their queries: what stops the one above stops all below."""
    print("as a tree of cancel events, three levels at once:")
    service = CancelEvent()
    requests = [CancelEvent(parent=service) for _ in range(2)]
    queries = [CancelEvent(parent=request) for request in requests]
    requests[0].set(CancelCause.make(CancelKind.CLIENT_DISCONNECT))
    print(f"  after one request: {[query.is_set() for query in queries]}, service: {service.is_set()}")
    service.set(CancelCause.make(CancelKind.SHUTDOWN, "new version"))
    print(f"  after the service: {[query.is_set() for query in queries]}")
    print(f"  the queries know why: {[str(query.cause) for query in queries]}")

    print("with plain asyncio events, linked:")
    top, middle, bottom = asyncio.Event(), asyncio.Event(), asyncio.Event()
    async with TaskTracker() as links:
        links.add(asyncio.create_task(propagate_cancellation(top, [middle])))
        links.add(asyncio.create_task(propagate_cancellation(middle, [bottom])))
        workers = [
            asyncio.create_task(work_until(stop, name))
            for stop, name in [(top, "service"), (middle, "request"), (bottom, "query")]
        ]
        await asyncio.sleep(0.05)
        top.set()
        await asyncio.gather(*workers)

    print("a link that is cancelled sets nothing:")
    link = asyncio.create_task(propagate_cancellation(parent := asyncio.Event(), [child := asyncio.Event()]))
    await asyncio.sleep(0)
    link.cancel()
    await asyncio.wait([link])
    print(f"  parent: {parent.is_set()}, child: {child.is_set()}")


# --- tracking: know what runs, and find what was forgotten ---------------------------------------------


async def stubborn() -> None:
    """Swallows its cancellation for a while: one should not, and somebody always does."""
    for _ in range(3):
        try:
            await asyncio.sleep(0.2)
        except asyncio.CancelledError:
            print("  stubborn: not yet")


async def tracking() -> None:
    """A tracker holds tasks while they run; what nobody tracked is found by looking at the loop."""
    print("tasks leave the tracker by themselves:")
    tracker = TaskTracker()
    short = tracker.add(asyncio.create_task(asyncio.sleep(0.02)))
    for number in range(3):
        tracker.add(asyncio.create_task(asyncio.sleep(60), name=f"worker-{number}"))
    before = tracker.get_count()
    await short
    print(f"  {before} tracked, then {tracker.get_count()}")

    print("all are cancelled at once, under one deadline:")
    tracker.add(asyncio.create_task(stubborn(), name="stubborn"))
    await asyncio.sleep(0.02)
    success_count, error_count = await tracker.cancel_all(timeout=0.1)
    print(f"  {success_count} cancelled, {error_count} not")
    assert tracker.last_report is not None
    for name, stack in tracker.last_report.still_running.items():
        # The first line is where it is itself, the ones below what it has called.
        print(f"  {name} is still at: {stack.splitlines()[1].strip()}")
    await tracker.wait()

    print("a task that was forgotten is found:")
    forgotten = asyncio.create_task(asyncio.sleep(60), name="forgotten")
    report = await cleanup_lingering_tasks(timeout=1.0)
    print(f"  {forgotten.get_name()}: {report}")


# --- progress: see how far a task is -------------------------------------------------------------------


async def load(pages: int) -> str:
    """Report as one goes; nobody has to be watching."""
    task = current_task()
    assert task is not None
    task.progress.update(total=pages, message="loading")
    for _ in range(pages):
        await asyncio.sleep(0.05)
        task.progress.advance()
    return "loaded"


async def progress() -> None:
    """A watcher gets the newest report each time it asks, and ends with the task."""
    async with TaskManager() as manager:
        task = manager.create_task(load(4))
        print("every report, by a quick watcher:")
        async for report in task.progress.watch():
            print(f"  {report.message}: {report.done:g} of {report.total:g}")
        print(f"  {await task}")

        print("the newest only, by a slow one:")
        task = manager.create_task(load(10))
        given = []
        async for report in task.progress.watch():
            given.append(report.done)
            await asyncio.sleep(0.2)
        print(f"  {len(given)} of 11 reports, from {given[0]:g} to {given[-1]:g}")


# --- priority: who goes first where places are few -----------------------------------------------------


async def serve(name: str, order: list[str]) -> None:
    """Take a place for a moment."""
    order.append(name)
    await asyncio.sleep(0.01)


async def priority() -> None:
    """Two places and more tasks than that: the most urgent one that waits gets the next place."""
    order: list[str] = []
    async with TaskManager(max_concurrency=2) as manager:
        for name, level in [
            ("report", TaskPriority.LOW),
            ("thumbnail", TaskPriority.LOW),
            ("newsletter", TaskPriority.LOW),
            ("invoice", TaskPriority.NORMAL),
            ("login", TaskPriority.HIGH),
            ("alarm", TaskPriority.CRITICAL),
        ]:
            manager.create_task(serve(name, order), name=name, priority=level)
        await manager.join()
    print("the first two find a free place, the others wait and are called by priority:")
    print(f"  {', '.join(order)}")


# --- the frame -----------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[], Awaitable[None]]] = {
    "event": event,
    "propagation": propagation,
    "tracking": tracking,
    "progress": progress,
    "priority": priority,
}


async def run_part(name: str) -> None:
    """Run one part to its end, and fail if it leaves a task behind."""
    print(f"== {name} ==")
    await PARTS[name]()
    left = [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    if left:
        raise SystemExit(f"leaked: {', '.join(left)}")
    print("no task is left\n")


def main() -> None:
    """Read the command line and run the parts, each in an event loop of its own."""
    parser = argparse.ArgumentParser(description="Five things that one does with tasks.")
    parser.add_argument("--only", choices=PARTS, help="run this part alone")
    only = parser.parse_args().only
    for name in PARTS if only is None else [only]:
        asyncio.run(run_part(name))


if __name__ == "__main__":
    main()
