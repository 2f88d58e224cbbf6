"""The end of a request: the application has returned or raised, and its group ends before the request does.

Rules, each with a test of its own:

1. A cancellation that the request made never leaves it. A cancellation that someone else made always does,
   after the group has ended with cause ``shutdown``.
2. No task of the group outlives the request, unless ``on_exit`` hands it over. A task that does not end is
   waited for, but not forever.
3. A response that had not started when the client left becomes a 499, for the layers outside. A request that
   is cut short does not end before its own answer has been sent.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from otel_tasks._asgi.answer import end_response, send_client_closed_request
from otel_tasks._asgi.departure import is_departure
from otel_tasks._asgi.rule import TextRule
from otel_tasks._core.causes import unwatch_cancels
from otel_tasks._core.clock import now
from otel_tasks._core.constructs import known_cause
from otel_tasks._core.log import log_fields_of_all, logger
from otel_tasks._core.request_group import REQUEST_ENDED
from otel_tasks._core.state import CancelKind
from otel_tasks._core.waiting import wait_until_done

if TYPE_CHECKING:
    from otel_tasks._asgi.request import Request
    from otel_tasks._asgi.rule import OnExit
    from otel_tasks._asgi.stop import Stop
    from otel_tasks._core.request_group import RequestGroup

# Seconds for cancelled tasks to end, as in cancel_group().
_END_TIMEOUT = 10.0


async def finish(request: Request, error: BaseException | None) -> bool:
    """End the group of a closed request, and answer for the application if the client has left.

    Args:
        request: The request.
        error: What the application raised.

    Returns:
        False if the caller must raise ``error``, or, where that is None, a CancelledError that someone else
        requested.

    Cancellation: cancels what is left of the group with cause ``shutdown``, waits for its end, and
    propagates. A second one ends the waiting.
    """
    if request.stop is not None:
        request.stop.streams.host_ended()
    if await _uncancel(request, error):
        await _shut_down(request)
        return False
    await _end_group(request, error)
    if not request.left or request.stop is None:
        if error is None and request.sweeper.server_stops and request.start and not request.complete:
            # sse-starlette leaves its streams without an end when uvicorn stops.
            await end_response(request)
        return error is None
    if request.stop.answer is None:
        request.annotate_span(request.stop, error)
    _log_if_spared(request, request.stop, error)
    is_failed = error is not None and not is_departure(error, request)
    if request.stop.is_forced:
        await _end_answer(request, request.stop)
    elif not is_failed:
        await send_client_closed_request(request)
    return not is_failed


async def _uncancel(request: Request, error: BaseException | None) -> bool:
    """Undo the request's own cancellation; return True if someone else has cancelled the handler too."""
    host = request.host
    if host is None:
        return False
    is_thrown = isinstance(error, asyncio.CancelledError)
    if request.stop is not None and request.stop.handler_cancelled:
        if not is_thrown:
            # The handler has swallowed it, or it has not been thrown yet: this is where it does no harm.
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                is_thrown = True
        host.uncancel()
    return is_thrown and host.cancelling() > request.cancels_before


async def _end_group(request: Request, error: BaseException | None) -> None:
    group = request.group
    if group is None:
        return
    # A failed handler's 500 is sent by a layer outside, which must not wait for tasks.
    failed = error is not None and not request.complete
    on_exit = "cancel" if failed or request.left else request.rules.on_exit
    is_plain = on_exit == "cancel" and not request.left and request.cleanup_group is None
    # Most requests: what they started has ended.
    if not is_plain or not group.close_if_unused():
        await _end_used_group(request, group, on_exit)
    if request.host is not None:
        unwatch_cancels(request.host)


async def _end_used_group(request: Request, group: RequestGroup, on_exit: OnExit) -> None:
    if on_exit == "cancel":
        _cancel_group(request, group)
    else:
        group.seal(REQUEST_ENDED, refuse=on_exit == "wait")
    try:
        if on_exit == "wait":
            await _join(request, group)
        elif on_exit == "cancel" and not group.is_empty:
            await _wait_for_end(request, [group])
        if request.cleanup_group is not None:
            await _wait_for_end(request, [request.cleanup_group])
            # Late tasks run on, and may create others; a shutdown of the manager reaches them.
            request.cleanup_group.seal(refuse=False)
    except asyncio.CancelledError:
        await _shut_down(request)
        raise


async def _join(request: Request, group: RequestGroup) -> None:
    # The stop of the server may cut the wait short.
    request.sweeper.keep(request)
    try:
        await group.join()
    finally:
        request.sweeper.forget(request)


def _cancel_group(request: Request, group: RequestGroup) -> None:
    cause = request.cause or request.make_cause(CancelKind.SCOPE_ENDED)
    if not request.left:
        group.signal_cancel(cause)
        if not group.is_empty:
            request.begin_stop(cause).cancel_work()
    group.seal(cause)
    if request.left and request.stop is not None and request.stop.is_due:
        # The tasks that had learned of the disconnect had time until now to end by themselves.
        request.stop.cancel_tasks()


async def _wait_for_end(request: Request, groups: list[RequestGroup]) -> None:
    """Wait for tasks to end, but not forever: a response may depend on it."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _END_TIMEOUT
    # In a loop: cleanup may start other tasks.
    while tasks := [task for group in groups for task in group.live_tasks()]:
        # A block of uncancellable() has no bound.
        timeout = None if request.is_sheltering else max(0.0, deadline - loop.time())
        await wait_until_done(tasks, timeout)
        live = [task for task in tasks if not task.done()]
        if live and loop.time() >= deadline and not request.is_sheltering:
            logger.warning(
                "request %r is over, and after %s s its tasks still run: %s",
                request.own_group().id,
                _END_TIMEOUT,
                ", ".join(repr(task.id) for task in live),
                extra=log_fields_of_all(live),
            )
            return


async def _shut_down(request: Request) -> None:
    if request.group is None:
        return
    cause = None if request.host is None else known_cause(request.host)
    if cause is None or cause is request.cause:
        cause = request.cause_of_shutdown()
    groups = [group for group in (request.group, request.cleanup_group) if group is not None]
    for group in groups:
        group.signal_cancel(cause)
        group.cancel_tasks(cause)
        group.seal(cause)
    try:
        await _wait_for_end(request, groups)
    finally:
        if request.host is not None:
            unwatch_cancels(request.host)


def _log_if_spared(request: Request, stop: Stop, error: BaseException | None) -> None:
    """Log once per route that its handler has run on without a client, unless someone has decided so."""
    if stop.cause.kind is not CancelKind.CLIENT_DISCONNECT or request.end_of_handler(stop, error) != "ran_on":
        return
    rule = None if stop.spared_by is None else stop.spared_by.cancel_handler
    # A decision of the request, False, a function, and an exception in a text are meant as they are.
    if request.cancel_handler is not None or not isinstance(rule, TextRule):
        return
    route, missing = request.name, rule.missing(request.scope)
    if missing is not None and request.settings.is_first_spared(route):
        _log_spared(request, stop, rule, route, missing)


def _log_spared(request: Request, stop: Stop, rule: TextRule, route: str, missing: str) -> None:
    left_at = now() if stop.cause.at is None else stop.cause.at
    logger.info(
        "the handler of %s ran on after its client had left (the request took %s s more), because its "
        "%s is not in cancel_handler=%r; to cancel it, add it there, as in cancel_handler=%r, "
        "or call set_cancel_handler(True) in it (FastAPI: Depends(cancel_handler_on_disconnect))",
        route,
        f"{now() - left_at:.1f}",
        missing,
        rule,
        rule.with_route(route, request.scope),
    )


async def _end_answer(request: Request, stop: Stop) -> None:
    if stop.answer is not None:
        await stop.answer
    elif stop.owes_end:
        await end_response(request)
    # After a timeout, a response that has started stays incomplete: its client must not take it for whole.
