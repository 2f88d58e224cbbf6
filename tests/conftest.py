"""Runs coroutine tests on the virtual clock, and checks that they leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import inspect
import signal
from typing import TYPE_CHECKING, Any

import pytest

# pyproject.toml keeps the plugin itself out, so that its import is measured.
from otel_tasks.pytest_plugin import spans as spans
from otel_tasks.pytest_plugin import virtual_clock as virtual_clock
from otel_tasks.testing import assert_no_tasks_left, run

if TYPE_CHECKING:
    from collections.abc import Coroutine


def pytest_configure() -> None:
    """Take SIGINT as in a terminal: the background jobs of a shell (`.ci/run` has some) inherit SIG_IGN."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Spare `gc.collect()`, which the tests call thousands of times, all that existed before them."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run an `async def` test: on the virtual clock, or on a real loop when marked `real_clock`."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    test = _leaving_no_task(pyfuncitem.obj(**arguments))
    if pyfuncitem.get_closest_marker("real_clock"):
        asyncio.run(test)
    else:
        run(test)
    return True


async def _leaving_no_task(test: Coroutine[Any, Any, None]) -> None:
    # Not in a `finally`: a test that has already failed is reported for its own reason.
    await test
    await assert_no_tasks_left()
