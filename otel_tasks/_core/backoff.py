"""When to try again after a failure: exponential backoff with jitter, and the two policies that use it.

A ``RetryPolicy`` repeats the work of one task, see `retry`; a ``RestartPolicy`` restarts a service, see
`service`. The terms are those of Celery, stamina, and AWS ("full jitter" is 1.0, "equal jitter" is 0.5):
https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.
"""

from __future__ import annotations

import inspect
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from otel_tasks._core.checks import check_choice, check_count

if TYPE_CHECKING:
    from collections.abc import Callable

RestartOn = Literal["failure", "always"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """The delays between attempts; each is ``factor`` times the previous one, up to ``max_delay``.

    Part of each delay is random, so that work that fails together is not repeated together.

    Args:
        delay: Seconds before the second attempt, at least 0.
        factor: The delay grows by this factor with each failure, at least 1.
        max_delay: The longest delay in seconds, at least ``delay``.
        jitter: The share of each delay that is random, from 0 (none) to 1 (all of it).
    """

    delay: float
    factor: float
    max_delay: float
    jitter: float

    def __post_init__(self) -> None:
        _check_number("delay", self.delay, 0)
        _check_number("max_delay", self.max_delay, 0)
        _check_number("factor", self.factor, 1)
        if self.max_delay < self.delay:
            raise ValueError(f"max_delay must be at least delay={self.delay!r}, got {self.max_delay!r}")
        if callable(self.jitter):
            raise TypeError(f"jitter is the random share of each delay, from 0 to 1, got {self.jitter!r}")
        _check_number("jitter", self.jitter, 0)
        if self.jitter > 1:
            raise ValueError(f"jitter is the random share of each delay, from 0 to 1, got {self.jitter!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy(Backoff):
    """Which failures of a task lead to another attempt, after which delay, and how many attempts it gets.

    Pass it as ``retry=``, with a function that makes the coroutine of each attempt.

    Args:
        max_attempts: How many attempts the task gets, the first one included, at least 1. None means no
            bound.
        delay: Seconds before the second attempt, at least 0.
        factor: The delay grows by this factor with each failure, at least 1.
        max_delay: The longest delay in seconds, at least ``delay``.
        jitter: The share of each delay that is random, from 0 (none) to 1 (all of it).
        on: The exceptions to retry: a class, a tuple of classes, or a function that takes the exception and
            returns True. An ``ExceptionGroup`` is also retried if ``on`` names all exceptions in it.
        attempt_timeout: Seconds for each attempt, above 0; then it fails with ``TimeoutError``, which ``on``
            may name. None means no limit. The task's ``timeout`` covers all attempts and the delays.

    Example:
        >>> RetryPolicy(max_attempts=5, on=(ConnectionError, TimeoutError), attempt_timeout=2.0)
    """

    max_attempts: int | None = 3
    delay: float = 0.5
    factor: float = 2.0
    max_delay: float = 30.0
    jitter: float = 0.5
    on: type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool] = (OSError, TimeoutError)
    attempt_timeout: float | None = None

    def __post_init__(self) -> None:
        # By its name: super() does not work in a dataclass with slots before Python 3.14.
        Backoff.__post_init__(self)
        check_count("max_attempts", self.max_attempts, 1)
        _check_on(self.on)
        if self.attempt_timeout is not None and self.attempt_timeout != math.inf:
            _check_number("attempt_timeout", self.attempt_timeout, 0)
        if self.attempt_timeout == 0:
            raise ValueError("attempt_timeout must be more than 0 seconds, or None for no bound, got 0")

    def matches(self, error: Exception) -> bool:
        """True if this failure leads to another attempt."""
        on = self.on
        if isinstance(error, on) if isinstance(on, type | tuple) else on(error):
            return True
        return isinstance(error, ExceptionGroup) and all(map(self.matches, error.exceptions))


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy(Backoff):
    """When a failed service restarts, after which delay, and when it gives up.

    Args:
        on: ``"failure"`` restarts only after a failure; with ``"always"``, returning is a failure too.
        delay: Seconds before the first restart, at least 0.
        factor: The delay grows by this factor with each failure, at least 1.
        max_delay: The longest delay in seconds, at least ``delay``.
        jitter: The share of each delay that is random, from 0 (none) to 1 (all of it).
        max_failures: The service gives up at this many failures ``within`` so many seconds, at least 1; with
            None, it never gives up.
        within: Seconds, above 0. After an attempt that ran this long, the delay starts over. Infinity counts
            every failure since the start.

    Example:
        >>> RestartPolicy(delay=0.5, max_failures=None)
    """

    on: RestartOn = "failure"
    delay: float = 1.0
    factor: float = 2.0
    max_delay: float = 60.0
    jitter: float = 0.5
    max_failures: int | None = 10
    within: float = 600.0

    def __post_init__(self) -> None:
        check_choice("on", self.on, RestartOn)
        # By its name: super() does not work in a dataclass with slots before Python 3.14.
        Backoff.__post_init__(self)
        check_count("max_failures", self.max_failures, 1)
        if self.within != math.inf:
            _check_number("within", self.within, 0)
        if self.within == 0:
            raise ValueError("within must be more than 0 seconds, got 0")


def check_retry(policy: object) -> None:
    """Raise a TypeError unless ``policy`` is None or a policy of retries."""
    if policy is not None and not isinstance(policy, RetryPolicy):
        raise TypeError(f"retry must be a RetryPolicy, got {policy!r}: write retry=RetryPolicy()")


class Delays:
    """The delays after the failures of one piece of work. It reads no clock, so tests of a policy need none.

    Args:
        backoff: Its policy.
    """

    def __init__(self, backoff: Backoff) -> None:
        self._backoff = backoff
        self._longest = float(backoff.delay)

    def next(self) -> float:
        """Return the seconds to wait after one more failure."""
        backoff = self._backoff
        longest = self._longest
        self._longest = min(longest * backoff.factor, backoff.max_delay)
        chance = random.random()  # noqa: S311 - it spreads load, and keeps no secret
        return longest * (1.0 - backoff.jitter * chance)

    def start_over(self) -> None:
        """Return to the first delay."""
        self._longest = float(self._backoff.delay)


def _check_on(on: object) -> None:
    """Raise a TypeError unless ``on`` names exceptions that a task can be retried for."""
    if isinstance(on, type) or not callable(on):
        kinds = on if isinstance(on, tuple) else (on,)
        if not kinds or not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds):
            raise TypeError(
                "on must be a subclass of Exception, a tuple of them, or a function that takes the exception "
                f"and returns True or False, got {on!r}"
            )
    elif inspect.iscoroutinefunction(on):
        raise TypeError(
            f"on must be a plain function, got the coroutine function {on!r}: declare it with def"
        )


def _check_number(what: str, value: object, least: int) -> None:
    """Raise unless ``value`` is a finite number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{what} must be a number, got {value!r}")
    if not least <= value < math.inf:
        raise ValueError(f"{what} must be at least {least} and finite, got {value!r}")
