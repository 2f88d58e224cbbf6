"""The tools of ``testing`` as fixtures; pytest loads this module if the library is installed.

No other module imports pytest, or this one. Loading it does not import the OpenTelemetry SDK; the fixture
``spans`` does, in the tests that use it. ``-p no:otel_tasks`` turns the plugin off.
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
    """Return ``otel_tasks.testing.run``, which runs a coroutine on a loop where sleeping costs no time.

    Returns:
        ``run(coro, *, timeout=3600.0)``, which returns the result of ``coro``.

    Example:
        >>> def test_report(virtual_clock):
        ...     assert virtual_clock(report()) == "3 offers"
    """
    return run


@pytest.fixture
def spans() -> Iterator[SpanRecorder]:
    """Return a ``SpanRecorder`` with providers to inject; without the SDK, the test is skipped.

    At the end of the test, every span must have ended once, and OpenTelemetry must have logged no warning.

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
