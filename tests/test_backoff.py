"""The policies of retries and restarts: their fields, their delays, and which failures they name."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_tasks import RestartPolicy, RetryPolicy
from otel_tasks._core.backoff import Delays

SHARE = r"jitter is the random share of each delay, from 0 to 1, got "
ON = r"on must be a subclass of Exception, a tuple of them, or a function that takes the exception and "


async def judge(_: Exception) -> bool:
    """Judge an exception too late: a coroutine is true."""
    return False


def half(_: object = None) -> float:
    """A jitter function, as other libraries take one."""
    return 0.5


@pytest.mark.parametrize("policy", [RestartPolicy, RetryPolicy])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"delay": -1}, ValueError, "delay must be at least 0 and finite, got -1"),
        ({"delay": float("nan")}, ValueError, "delay must be at least 0 and finite, got nan"),
        ({"delay": "1"}, TypeError, "delay must be a number, got '1'"),
        ({"delay": True}, TypeError, "delay must be a number, got True"),
        ({"max_delay": float("inf")}, ValueError, "max_delay must be at least 0 and finite, got inf"),
        ({"delay": 1.0, "max_delay": 0.5}, ValueError, r"max_delay must be at least delay=1\.0, got 0\.5"),
        ({"factor": 0.9}, ValueError, r"factor must be at least 1 and finite, got 0\.9"),
        ({"jitter": 1.1}, ValueError, rf"{SHARE}1\.1"),
        ({"jitter": -0.1}, ValueError, r"jitter must be at least 0 and finite, got -0\.1"),
        ({"jitter": None}, TypeError, "jitter must be a number, got None"),
        ({"jitter": half}, TypeError, rf"{SHARE}<function half .*>"),
    ],
)
def test_bad_backoff_is_refused(
    policy: type[Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Both policies say which value of the backoff is wrong, and what it has to be."""
    with pytest.raises(error, match=f"^{message}$"):
        policy(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_attempts": 0}, ValueError, "max_attempts must be at least 1, or None for no bound, got 0"),
        (
            {"max_attempts": 2.5},
            ValueError,
            r"max_attempts must be at least 1, or None for no bound, got 2\.5",
        ),
        ({"attempt_timeout": 0}, ValueError, "attempt_timeout must be more than 0 seconds, or None.*, got 0"),
        ({"attempt_timeout": -1}, ValueError, "attempt_timeout must be at least 0 and finite, got -1"),
        ({"attempt_timeout": "1"}, TypeError, "attempt_timeout must be a number, got '1'"),
        ({"on": "OSError"}, TypeError, rf"{ON}returns True or False, got 'OSError'"),
        ({"on": ()}, TypeError, rf"{ON}returns True or False, got \(\)"),
        ({"on": (OSError, "x")}, TypeError, rf"{ON}returns True or False, got .*"),
        ({"on": int}, TypeError, rf"{ON}returns True or False, got <class 'int'>"),
        ({"on": asyncio.CancelledError}, TypeError, rf"{ON}.* <class 'asyncio.exceptions.CancelledError'>"),
        ({"on": (OSError, SystemExit)}, TypeError, rf"{ON}.*SystemExit.*"),
        ({"on": judge}, TypeError, "on must be a plain function, got the coroutine function .*"),
    ],
)
def test_bad_retry_policy_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """A policy says which value is wrong; it never names a cancellation or an exit of the process."""
    with pytest.raises(error, match=f"^{message}$"):
        RetryPolicy(**options)


def test_policies_share_their_vocabulary() -> None:
    """Both have the four fields of a backoff, by value, with defaults of their own."""
    assert RetryPolicy(delay=2) == RetryPolicy(delay=2.0, jitter=0.5)
    assert [RetryPolicy().delay, RestartPolicy().delay] == [0.5, 1.0]
    with pytest.raises(AttributeError):
        RetryPolicy().delay = 3.0  # type: ignore[misc]  # that is the test


def test_delays_grow_without_overflow() -> None:
    """After thousands of failures, the delay is still the longest."""
    delays = Delays(RetryPolicy(delay=1, factor=1e300, max_delay=60, jitter=0))
    assert [delays.next() for _ in range(3000)][-1] == 60


@pytest.mark.parametrize("jitter", [0.0, 0.25, 0.5, 1.0])
@given(chances=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=20))
def test_jitter_is_the_random_share_of_each_delay(jitter: float, chances: list[float]) -> None:
    """A delay lies between its full length and what jitter leaves of it."""
    drawn, whole = (Delays(RetryPolicy(delay=1, max_delay=8, jitter=share)) for share in (jitter, 0))
    chance = iter(chances)
    with pytest.MonkeyPatch.context() as patch:
        for _ in chances:
            longest = whole.next()
            patch.setattr(random, "random", lambda: next(chance))
            assert longest * (1 - jitter) <= drawn.next() <= longest
            patch.undo()


def test_two_pieces_of_work_do_not_wait_for_the_same_time() -> None:
    """Each delay is drawn for itself."""
    first, second = Delays(RetryPolicy()), Delays(RetryPolicy())
    assert [first.next() for _ in range(5)] != [second.next() for _ in range(5)]


@pytest.mark.parametrize(
    ("on", "error", "matches"),
    [
        (OSError, ConnectionError(), True),
        (OSError, ValueError(), False),
        ((KeyError, ValueError), ValueError(), True),
        (lambda error: str(error) == "busy", ValueError("busy"), True),
        (lambda error: str(error) == "busy", ValueError("no"), False),
        (OSError, ExceptionGroup("two", [OSError(), ConnectionError()]), True),
        (OSError, ExceptionGroup("two", [OSError(), ValueError()]), False),
        (OSError, ExceptionGroup("nested", [OSError(), ExceptionGroup("in", [OSError()])]), True),
        (ExceptionGroup, ExceptionGroup("as a whole", [ValueError()]), True),
        (lambda error: isinstance(error, OSError), ExceptionGroup("each", [OSError()]), True),
    ],
)
def test_exceptions_that_lead_to_another_attempt(on: Any, error: Exception, matches: bool) -> None:
    """The policy names an exception by its class or by a function, and a group by all that is in it."""
    assert RetryPolicy(on=on).matches(error) is matches
