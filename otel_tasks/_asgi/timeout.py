"""The option ``request_timeout``: how long a request may take before it is cut short."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeAlias

from otel_tasks._asgi.rule import check_plain_function
from otel_tasks._core.checks import checked_finite_seconds
from otel_tasks._core.log import logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from otel_tasks._asgi.connection import Scope

RequestTimeoutOption: TypeAlias = "float | Callable[[Scope], float | None] | None"


class TimeoutRule:
    """The seconds that each request may take: a number for HTTP, or a function of any scope.

    Args:
        option: Seconds; a function that returns them, or None for no bound; or None.

    Attributes:
        option: The same.

    Raises:
        TypeError: It has the wrong type, or is a coroutine function.
        ValueError: It is not above 0, or not finite.
    """

    __slots__ = ("_has_failed", "option")

    def __init__(self, option: RequestTimeoutOption) -> None:
        self.option = option if callable(option) else checked_timeout("request_timeout", option)
        if callable(option):
            check_plain_function("request_timeout", option)
        self._has_failed = False

    def seconds(self, scope: Scope) -> float | None:
        """Return the seconds that a request may take; None for no bound."""
        if callable(self.option):
            return self._apply(self.option, scope)
        return self.option if scope["type"] == "http" else None

    def _apply(self, function: Callable[[Scope], float | None], scope: Scope) -> float | None:
        try:
            seconds = function(scope)
            if asyncio.iscoroutine(seconds):
                seconds.close()
                raise TypeError("it returned a coroutine, and nothing can be awaited here")
            return checked_timeout("its result", seconds)
        except Exception:
            # Once: every request that lives through a tick would log it.
            if not self._has_failed:
                self._has_failed = True
                logger.exception("request_timeout=%r raised; the request has no time limit", function)
            return None


def checked_timeout(what: str, seconds: object) -> float | None:
    """Return the seconds that one request may take; None for no bound.

    Raises:
        TypeError: It is not a number.
        ValueError: It is not above 0, or not finite.
    """
    if seconds is None:
        return None
    try:
        return checked_finite_seconds(what, seconds, above_zero=True)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}; None means no bound") from None
