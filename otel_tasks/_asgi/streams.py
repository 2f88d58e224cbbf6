"""Streams: the generators that make a response's body end in the request when its client leaves.

A cancellation that is thrown into a generator ends it. One that meets its consumer leaves the generator open,
suspended at its ``yield``; asyncio would close it later, in a task of its own that nothing waits for.

Rules, each with a test of its own:

1. The task that a departure meets in ``send`` first closes the generators that it iterates, innermost first.
   It is the task that has run them, so that their scopes and timeouts end where they began.
2. A task that a departure meets elsewhere leaves its open generators to a task that closes them as soon as
   it is done, and for which the request waits.
3. anyio cancels the tasks of a task group again at each ``await``. A task that waits in a generator gets the
   cancellation of the disconnect once, so that the cleanup of the generator may await.
4. A generator that ran in threads, as Starlette runs a sync body, is closed in a thread.
5. Only what a frame of the application iterates is closed, never what it merely refers to. ``send`` leaves a
   loop alone that may go on after its exception: the application catches it, and drains its source.
6. No cleanup is waited for longer than the bound on the end of a request's tasks.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from contextvars import Context, copy_context
from types import GeneratorType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from otel_tasks._asgi.connection import Connection
from otel_tasks._core.binding import BoundRequest, current_binding
from otel_tasks._core.causes import covered
from otel_tasks._core.frames import suspended_chain
from otel_tasks._core.generators import ended_in, is_open, iterated_in, running_in
from otel_tasks._core.log import logger
from otel_tasks._core.suspension import (
    anyio_held_off,
    awaiters,
    context_of,
    interrupt,
    is_cancelled_by_own_scope,
    shield_from_anyio,
    tasks_in_scopes_of,
    waits_for,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from otel_tasks._core.binding import Binding
    from otel_tasks._core.generators import AsyncGenerator, Link

    _Closable: TypeAlias = AsyncGenerator | GeneratorType[Any, Any, Any]

# Seconds for the cleanup of a request's generators, as for the end of its tasks.
CLOSE_TIMEOUT = 10.0


class StreamedRequest(BoundRequest, Protocol):
    """The request as its streams see it."""

    @property
    def cleanup(self) -> Binding:
        """The binding of code that cleans up for it."""
        ...

    def ends_code(self, error: BaseException) -> bool:
        """Return True for an exception that says no more than that the request ends."""
        ...


async def close_iterated(request: StreamedRequest) -> None:
    """Close the generators that the calling task iterates; it is in ``send``, and about to raise.

    Cancellation: of the server's or the application's reaches the cleanup that runs, and propagates.
    """
    task = asyncio.current_task()
    if task is None:
        # A server that runs coroutines without a task: nothing leads from here to the frames that wait.
        return
    token = current_binding.set(request.cleanup)
    bound = asyncio.timeout(CLOSE_TIMEOUT)
    try:
        with anyio_held_off(task):
            async with bound:
                await _close_each(request, await _iterated_by_caller(request, task))
    except TimeoutError:
        if not bound.expired():
            raise
        logger.warning(
            "the cleanup of a generator that streamed the response of %r was cancelled, because it still ran "
            "%s s after the client had left",
            request.name,
            CLOSE_TIMEOUT,
        )
    finally:
        current_binding.reset(token)


class Streams:
    """The tasks of one request that may iterate generators, from its disconnect to their end.

    Args:
        request: The request. Its handler's task and the tasks that anyio's task groups started are followed.
    """

    __slots__ = ("_ended_send", "_followed", "_left_open", "_request", "_shields")

    def __init__(self, request: StreamedRequest) -> None:
        self._request = request
        # `cancelling()` of the handler's task when its `send` was interrupted; it is higher after a cancel().
        self._ended_send: int | None = None
        # Each followed task, with the stack that removes its cover.
        self._followed: dict[asyncio.Task[Any], ExitStack] = {}
        # The generators that each cancelled task will leave open, and the context for closing them, if any.
        self._left_open: dict[asyncio.Task[Any], tuple[list[_Closable], Context | None]] = {}
        # Each shielded task, with the function that removes its shield.
        self._shields: dict[asyncio.Task[Any], Callable[[], None]] = {}

    @property
    def is_pending(self) -> bool:
        """A followed task has not ended."""
        return bool(self._followed)

    def follow(self) -> None:
        """Prepare for the first cancellation of each task that anyio's task groups have started below."""
        host = self._request.host
        for task in () if host is None else tasks_in_scopes_of(host):
            if task not in self._followed and not task.done():
                self._followed[task] = cover = ExitStack()
                cover.enter_context(covered(task, self.note_cancel))
                task.add_done_callback(self._task_ended, context=Context())

    def note_cancel(self, task: asyncio.Task[Any], _message: object) -> bool:
        """Prepare a task for its first cancellation, in the call that makes it; return False: it goes on."""
        # Starlette's BaseHTTPMiddleware cancels a scope in each `receive()`: that ends a wait, and no task.
        if task in self._followed and task not in self._left_open and not is_cancelled_by_own_scope(task):
            links = self._note_open(task)
            if running_in(links):
                self._shield(task)
        return False

    def note_host_cancel(self) -> None:
        """Prepare the handler's task for its cancellation."""
        self.follow()
        host = self._request.host
        # The frames of a task that runs cannot be searched; it is suspended again before it ends.
        if host is not None and host is not asyncio.current_task():
            self._note_open(host)

    def end_send(self) -> None:
        """End the ``send`` of a body in which the handler's task waits, as if it came after the disconnect.

        gunicorn, and hypercorn with HTTP/2, never return from it once the client has left.
        """
        host = self._request.host
        waiter = None if host is None else waits_for(host)
        if host is None or waiter is None or not _is_in_send(self._request, host):
            return
        for awaiter in [each for each in awaiters(waiter) if each.task is host]:
            self._ended_send = host.cancelling()
            interrupt(awaiter, None)

    def has_ended_send(self) -> bool:
        """Return True, once, in the ``send`` that ``end_send`` has ended."""
        task, cancels = asyncio.current_task(), self._ended_send
        if cancels is None or task is None or task is not self._request.host:
            return False
        self._ended_send = None
        return task.cancelling() <= cancels

    def host_ended(self) -> None:
        """Close what the handler's task has left open; call it in that task."""
        host = self._request.host
        if host is not None:
            self._close_left_open(host)

    def unshield(self, task: asyncio.Task[Any] | None) -> None:
        """Let anyio cancel a task again: it has sent a chunk after its cancellation."""
        if task is not None and (unshield := self._shields.pop(task, None)) is not None:
            unshield()

    def end(self) -> None:
        """Drop the references to generators."""
        self._left_open.clear()

    def _note_open(self, task: asyncio.Task[Any]) -> list[Link]:
        links = _links_of(self._request, task)
        # A generator that works in threads is a link itself.
        closables = _closables([*iterated_in(links), *running_in(links)])
        context = (context_of(task) or copy_context()).copy() if closables else None
        self._left_open[task] = closables, context
        return links

    def _shield(self, task: asyncio.Task[Any]) -> None:
        unshield = shield_from_anyio(task)
        if unshield is not None:
            self._shields[task] = unshield
            timer = task.get_loop().call_later(CLOSE_TIMEOUT, self.unshield, task, context=Context())
            self._followed[task].callback(timer.cancel)

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        self._followed.pop(task).close()
        self._shields.pop(task, None)
        self._close_left_open(task)

    def _close_left_open(self, task: asyncio.Task[Any]) -> None:
        """Close them in a task for which the request waits."""
        closables, context = self._left_open.pop(task, ([], None))
        if context is not None and any(map(is_open, closables)):
            context.run(current_binding.set, self._request.cleanup)
            group = self._request.cleanup.task_group
            context.run(group.create_task, _close_each(self._request, closables), name="close_generators")


# Below: finding them.


async def _iterated_by_caller(request: StreamedRequest, task: asyncio.Task[Any]) -> list[_Closable]:
    """Return what the calling task iterates: it suspends for a turn, because only then its frames show it."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[list[_Closable]] = loop.create_future()

    def look() -> None:
        if not found.done():
            links = _links_of(request, task)
            found.set_result(_closables(ended_in(links[: _find_send(request, links)])))

    loop.call_soon(look, context=Context())
    return await found


def _links_of(request: StreamedRequest, task: asyncio.Task[Any]) -> list[Link]:
    """Return the suspended coroutines of a task, as far as they belong to the application."""
    links = list(suspended_chain(task.get_coro()))
    # From the inside: an application may call another one, or itself, in the same task.
    for number in range(len(links) - 1, -1, -1):
        if _serves(links[number][1], request):
            return links[number + 1 :]
    return [] if task is request.host else links


def _serves(frame: FrameType, request: StreamedRequest) -> bool:
    is_middleware = frame.f_globals.get("__name__") == "otel_tasks.asgi"
    return is_middleware and frame.f_locals.get("request") is request


def _is_in_send(request: StreamedRequest, task: asyncio.Task[Any]) -> bool:
    """Return True for a task that waits for the server to take a part of the body."""
    links = list(suspended_chain(task.get_coro()))
    number = _find_send(request, links)
    if number is None or links[number][1].f_locals.get("kind") != "http.response.body":
        return False
    # A send that has failed waits for the cleanup of generators.
    return all(frame.f_code is not close_iterated.__code__ for _, frame in links[number:])


def _find_send(request: StreamedRequest, links: list[Link]) -> int | None:
    """Return the number of the link that is the request's ``send``; None if the task is not in it."""
    code = Connection.send.__code__
    return next(
        (
            number
            for number, (_, frame) in enumerate(links)
            if frame.f_code is code and frame.f_locals["self"] is request
        ),
        None,
    )


def _closables(generators: list[AsyncGenerator]) -> list[_Closable]:
    """Return generators, each followed by the sync one that it runs in threads."""
    found: list[_Closable] = []
    for generator in generators:
        found.append(generator)
        found.extend(_run_in_threads(generator))
    return found


def _run_in_threads(generator: AsyncGenerator) -> list[GeneratorType[Any, Any, Any]]:
    """Return the sync generator behind Starlette's ``iterate_in_threadpool``."""
    frame = generator.ag_frame
    if frame is None or frame.f_code.co_name != "iterate_in_threadpool":
        return []
    if not str(frame.f_globals.get("__name__")).startswith("starlette."):
        return []
    return [value for value in frame.f_locals.values() if isinstance(value, GeneratorType)]


# Below: closing them.


async def _close_each(request: StreamedRequest, closables: list[_Closable]) -> None:
    for closable in closables:
        # It may have been closed meanwhile, or run again.
        if is_open(closable):
            await _close(request, closable)


async def _close(request: StreamedRequest, closable: _Closable) -> None:
    task = asyncio.current_task()
    cancels = 0 if task is None else task.cancelling()
    try:
        if isinstance(closable, GeneratorType):
            await asyncio.to_thread(closable.close)
        else:
            await closable.aclose()
    except (Exception, asyncio.CancelledError, BaseExceptionGroup) as error:
        # The cleanup itself is cancelled; otherwise it has awaited a task that the disconnect has cancelled.
        if task is not None and task.cancelling() > cancels:
            raise
        if _says_only_the_end(request, error):
            return
        if not isinstance(error, Exception):
            raise
        _report(closable, error)


def _says_only_the_end(request: StreamedRequest, error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        # anyio's task group makes one of the GeneratorExit that leaves it.
        parts = cast("tuple[BaseException, ...]", error.exceptions)
        return all(_says_only_the_end(request, part) for part in parts)
    return request.ends_code(error)


def _report(closable: _Closable, error: Exception) -> None:
    # As asyncio does for a generator that it closes.
    asyncio.get_running_loop().call_exception_handler(
        {
            "message": f"an error occurred during closing of generator {closable!r}",
            "exception": error,
            "asyncgen": closable,
        }
    )
