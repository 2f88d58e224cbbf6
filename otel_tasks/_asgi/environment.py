"""The environment: the options of the middleware, where no code passes them.

A variable that is empty counts as unset. A value that is not valid ends the process: OpenTelemetry's loader
logs an exception of an instrumentation and starts the application without it, and without the middleware
work would run on that was to stop.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from otel_tasks._asgi.rule import OnExit, checked_cancel_handler
from otel_tasks._asgi.settings import checked_buffer_limit, checked_detect_after
from otel_tasks._core.checks import check_choice, checked_finite_seconds

if TYPE_CHECKING:
    from collections.abc import Callable

_PREFIX = "OTEL_PYTHON_OTEL_TASKS_"

Value = TypeVar("Value")


def is_true(name: str) -> bool:
    """Return True if a variable is set to true.

    Raises:
        SystemExit: It is neither true nor false.
    """
    return _read(name, _flag, default=False)


def middleware_options() -> dict[str, Any]:
    """Return the options that the environment sets, by their names.

    Raises:
        SystemExit: A value is not valid; the message has the variable's name.
    """
    missing = object()
    values = {option: _read(variable(option), read, default=missing) for option, read in _OPTIONS.items()}
    return {option: value for option, value in values.items() if value is not missing}


def variable(option: str) -> str:
    """Return the name of the variable that sets an option of the middleware."""
    return f"{_PREFIX}{option.upper()}"


def _read(name: str, read: Callable[[str], Value], *, default: Value) -> Value:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    try:
        return read(text)
    except (TypeError, ValueError) as error:
        _refuse(name, text, error)


def _refuse(name: str, text: str, error: Exception) -> NoReturn:
    # The loader catches every Exception.
    raise SystemExit(f"otel_tasks cannot start with {name}={text!r}: {error}") from None


def _flag(text: str) -> bool:
    word = text.lower()
    if word not in ("true", "false"):
        raise ValueError("must be true or false")
    return word == "true"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("must be a number of seconds") from None


def _detect_after(text: str) -> float:
    return checked_detect_after(_number(text))


def _buffer_limit(text: str) -> int:
    try:
        limit = int(text)
    except ValueError:
        raise ValueError("must be a number of bytes") from None
    return checked_buffer_limit(limit)


def _grace(text: str) -> float:
    return checked_finite_seconds("grace", _number(text))


def _request_timeout(text: str) -> float:
    return checked_finite_seconds("request_timeout", _number(text), above_zero=True)


def _on_exit(text: str) -> str:
    check_choice("on_exit", text, OnExit)
    return text


_OPTIONS: dict[str, Callable[[str], object]] = {
    "cancel_handler": checked_cancel_handler,
    "detect_after": _detect_after,
    "buffer_limit": _buffer_limit,
    "grace": _grace,
    "on_exit": _on_exit,
    "span": _flag,
    "request_timeout": _request_timeout,
}
