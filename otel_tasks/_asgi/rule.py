"""Rules: which handlers a disconnect cancels, and what happens to a request's tasks at its end."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from otel_tasks._core.checks import check_choice, checked_finite_seconds
from otel_tasks._core.log import logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from otel_tasks._asgi.connection import Scope

CancelHandler: TypeAlias = "Literal['safe'] | bool | Callable[[Scope], bool]"
OnExit = Literal["cancel", "wait", "detach"]

# Methods without side effects (RFC 9110, 9.2.1, and the QUERY draft): a cancelled handler leaves nothing half
# done.
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "QUERY"})


class Rules(NamedTuple):
    """The options that a middleware inside of another one decides for its part of the application."""

    cancel_handler: CancelHandler
    grace: float
    on_exit: OnExit

    def cancels_handler(self, scope: Scope) -> bool:
        """Return True if a disconnect cancels the handler of the request with this scope."""
        rule = self.cancel_handler
        if isinstance(rule, bool):
            return rule
        return _apply(rule, scope) if callable(rule) else scope.get("method") in SAFE_METHODS


def checked_rules(cancel_handler: CancelHandler, grace: float, on_exit: OnExit) -> Rules:
    """Check the options of a ``TaskGroupMiddleware`` that make up its rules.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of its range.
    """
    check_choice("on_exit", on_exit, OnExit)
    return Rules(_checked_cancel_handler(cancel_handler), checked_finite_seconds("grace", grace), on_exit)


def _checked_cancel_handler(rule: CancelHandler) -> CancelHandler:
    if inspect.iscoroutinefunction(rule) or inspect.iscoroutinefunction(type(rule).__call__):
        raise TypeError(
            f"cancel_handler must be a plain function of the scope, got the coroutine function {rule!r}: "
            "it is called where nothing can be awaited, write it with def"
        )
    if rule == "safe" or isinstance(rule, bool) or callable(rule):
        return rule
    # A string has the right type and a wrong value.
    error = ValueError if isinstance(rule, str) else TypeError
    raise error(f'cancel_handler must be "safe", True, False or a function of the scope, got {rule!r}')


def _apply(rule: Callable[[Scope], bool], scope: Scope) -> bool:
    try:
        cancel = rule(scope)
        if asyncio.iscoroutine(cancel):
            cancel.close()
            raise TypeError("it returned a coroutine, and nothing can be awaited here")
        return bool(cancel)
    except Exception:
        logger.exception("cancel_handler=%r raised; the handler is not cancelled", rule)
        return False
