"""What follows when a service gives up: a callback, a note for readiness checks, the end of the application.

A service gives up when its supervising task fails.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from otel_tasks._core.log import TaskLogger
from otel_tasks._core.native import add_done_callback, failure_of
from otel_tasks._core.options import FROM_MANAGER

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Generator

    from otel_tasks._core.info import TaskInfo
    from otel_tasks._core.task import ManagedTask

    OnGiveUp = Callable[[TaskInfo, BaseException], object]

# How to stop the application that runs in each loop: its run(), see `run`.
_stops: dict[asyncio.AbstractEventLoop, Callable[[str], object]] = {}
# A shutdown without run(): asyncio holds tasks only weakly.
_shutdowns: set[asyncio.Task[Any]] = set()


@contextmanager
def stopped_by(loop: asyncio.AbstractEventLoop, stop: Callable[[str], object]) -> Generator[None]:
    """Let a critical service that gives up in ``loop`` call ``stop`` with the reason."""
    _stops[loop] = stop
    try:
        yield
    finally:
        del _stops[loop]


def check_on_give_up(callback: object) -> None:
    """Raise a TypeError unless this is None or a plain function."""
    if inspect.iscoroutinefunction(callback) or (callback is not None and not callable(callback)):
        raise TypeError(
            f"on_give_up must be a plain function of a TaskInfo and an exception, got {callback!r}: "
            "write on_give_up=lambda info, error: ..."
        )


def watch_service(service: ManagedTask[Any], on_give_up: OnGiveUp | None, *, critical: bool) -> None:
    """Do what has to be done if ``service`` gives up."""
    service._group._ledger.ending.service_started(service.id)

    def ended(service: ManagedTask[Any]) -> None:
        error = None if service.cancelled() else failure_of(service)
        if error is not None:
            _gave_up(service, error, on_give_up, critical=critical)

    # Not the method of the task: a service that gives up is reported, as nothing waits for it.
    add_done_callback(service, ended, context=copy_context())


def _gave_up(
    service: ManagedTask[Any], error: BaseException, on_give_up: OnGiveUp | None, *, critical: bool
) -> None:
    info = service.info()
    service._group._ledger.ending.service_failed(info.id)
    if on_give_up is not None:
        try:
            on_give_up(info, error)
        except Exception:
            TaskLogger(service).exception("on_give_up of service %s raised", service)
    if critical:
        _end_application(service, info)


def _end_application(service: ManagedTask[Any], info: TaskInfo) -> None:
    loop = service.get_loop()
    manager = service._group._ledger.owner
    by = f"critical service {info.id!r}, which gave up"
    stop = _stops.get(loop)
    TaskLogger(service).critical(
        "critical service %s gave up (%s: %s): %s",
        service,
        info.error_type,
        info.error,
        f"manager {manager.name!r} shuts down" if stop is None else "the application ends with exit code 1",
    )
    if stop is not None:
        stop(by)
        return
    shutdown = loop.create_task(manager._shut_down(FROM_MANAGER, FROM_MANAGER, by))
    _shutdowns.add(shutdown)
    shutdown.add_done_callback(_shutdowns.discard)
