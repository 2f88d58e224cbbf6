"""Settings: the options of one middleware, and its sweeper in the running loop."""

from __future__ import annotations

from threading import get_ident
from typing import TYPE_CHECKING

from otel_tasks._asgi.rule import CancelHandler, OnExit, checked_rules
from otel_tasks._asgi.sweeper import Sweeper
from otel_tasks._asgi.timeout import RequestTimeoutOption, TimeoutRule
from otel_tasks._core.checks import check_flag, checked_finite_seconds
from otel_tasks._core.functions import global_task_manager
from otel_tasks._core.log import logger
from otel_tasks._core.manager import TaskManager

if TYPE_CHECKING:
    import asyncio

# The options that a request has only once, with their defaults: the outermost middleware decides them.
_OUTERMOST: dict[str, object] = {
    "manager": global_task_manager,
    "detect_after": 0.025,
    "buffer_limit": 262_144,
    "span": False,
    "request_timeout": None,
}


class Settings:
    """The options of one ``TaskGroupMiddleware``, which documents them.

    Attributes:
        timeout_rule: The seconds that a request may take.
        sweeper: The one of the loop that used this middleware last.
    """

    def __init__(
        self,
        manager: TaskManager | None,
        cancel_handler: CancelHandler,
        detect_after: float,
        buffer_limit: int,
        grace: float,
        on_exit: OnExit,
        span: bool,
        request_timeout: RequestTimeoutOption,
    ) -> None:
        self.manager = checked_manager(manager)
        self.detect_after = checked_detect_after(detect_after)
        self.buffer_limit = checked_buffer_limit(buffer_limit)
        self.rules = checked_rules(cancel_handler, grace, on_exit)
        check_flag("span", span)
        self.span = span
        self.timeout_rule = TimeoutRule(request_timeout)
        self.sweeper: Sweeper | None = None
        self._has_warned = False
        # Bounded: a request is named after its route's template, or after its method.
        self._spared_routes: set[str] = set()

    @property
    def request_timeout(self) -> RequestTimeoutOption:
        """The option; None means that requests have no bound."""
        return self.timeout_rule.option

    def find_sweeper(self, loop: asyncio.AbstractEventLoop) -> Sweeper:
        """Return the sweeper of the running loop; two loops that take turns make a new one at each turn."""
        sweeper = self.sweeper
        if sweeper is None or sweeper.loop is not loop or sweeper.thread != get_ident():
            self.sweeper = sweeper = Sweeper(loop, self.detect_after, self.buffer_limit)
        return sweeper

    def is_first_spared(self, route: str) -> bool:
        """Return True the first time that a handler of ``route`` runs on without its client."""
        is_first = route not in self._spared_routes
        self._spared_routes.add(route)
        return is_first

    def warn_if_ignored(self, outer: Settings) -> None:
        """Log once which of these options have no effect, because ``outer`` decides them."""
        if self._has_warned:
            return
        self._has_warned = True
        ignored = [
            f"{option}={getattr(self, option)!r}"
            for option, default in _OUTERMOST.items()
            if getattr(self, option) not in (default, getattr(outer, option))
        ]
        if ignored:
            logger.warning(
                "TaskGroupMiddleware is inside another one, so %s has no effect here: "
                "set it on the outer one",
                ", ".join(ignored),
            )


def checked_manager(manager: object) -> TaskManager:
    """Return a manager, the global one for None.

    Raises:
        TypeError: ``manager`` is something else.
    """
    if manager is None:
        return global_task_manager
    if not isinstance(manager, TaskManager):
        raise TypeError(f"manager must be a TaskManager, got {manager!r}")
    return manager


def checked_detect_after(seconds: object) -> float:
    """Return the seconds between two looks.

    Raises:
        TypeError: It is not a number.
        ValueError: It is not above 0, or not finite.
    """
    return checked_finite_seconds("detect_after", seconds, above_zero=True)


def checked_buffer_limit(value: object) -> int:
    """Return a number of bytes.

    Raises:
        TypeError: It is not a whole number.
        ValueError: It is less than 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"buffer_limit must be a number of bytes, got {value!r}")
    if value < 1:
        raise ValueError(
            f"buffer_limit must be at least 1 byte, got {value}: without it no disconnect is detected"
        )
    return value
