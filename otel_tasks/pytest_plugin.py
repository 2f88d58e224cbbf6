"""The tools of ``testing`` as fixtures; pytest loads this module by itself where the library is installed.

It is the only module that imports pytest, and is imported by none of the others. Loading it brings no
OpenTelemetry SDK; the fixture ``spans`` does, for the tests that ask for it. ``-p no:otel_tasks`` keeps the
plugin out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks.testing import SpanRecorder, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["spans", "virtual_clock"]


@pytest.fixture
def virtual_clock() -> Callable[..., Any]:
    """Give ``otel_tasks.testing.run``: it runs a coroutine on a loop where sleeping costs no time.

    Returns:
        ``run(coro, *, timeout=3600.0)``, which gives what ``coro`` returned.

    Example:
        >>> def test_report(virtual_clock):
        ...     assert virtual_clock(report()) == "3 offers"
    """
    return run


@pytest.fixture
def spans() -> Iterator[SpanRecorder]:
    """Give a ``SpanRecorder``, whose providers are to be injected; without the SDK the test is skipped.

    At the end of the test every span must have ended once, and OpenTelemetry must have complained of nothing.

    Example:
        >>> def test_report(virtual_clock, spans):
        ...     virtual_clock(report(TaskManager(tracer_provider=spans.provider)))
        ...     assert "prices" in spans.names
    """
    try:
        recorder = SpanRecorder()
    except ImportError as error:
        pytest.skip(str(error))
    with recorder:
        yield recorder
        recorder.check()
