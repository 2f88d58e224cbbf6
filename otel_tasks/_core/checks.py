"""Checks of arguments that several layers share, and the messages of their errors."""

from __future__ import annotations

import math
import re
from typing import Any, get_args

from otel_tasks._core.state import TaskPriority

LONGEST_NAME = 200
# Control characters are Unicode's category Cc: line ends and escape sequences, which forge lines of a log.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
is_plain_name = re.compile(rf"[^#\x00-\x1f\x7f-\x9f]{{1,{LONGEST_NAME}}}").fullmatch


class AttemptName(str):
    """The name of a service's attempt, ``prices#1``: the library's own, so it may have a ``#``."""

    __slots__ = ()


def checked_seconds(what: str, seconds: float | None) -> float | None:
    """Return a duration; infinity becomes None, which means no limit.

    Raises:
        TypeError: It is not a number.
        ValueError: It is negative or not a number at all (NaN).
    """
    if seconds is None or seconds == float("inf"):
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"{what} must be seconds as a number, or None for no bound, got {seconds!r}")
    if not seconds >= 0:
        raise ValueError(f"{what} must be at least 0 seconds, got {seconds!r}")
    return float(seconds)


def checked_finite_seconds(what: str, seconds: object, *, above_zero: bool = False) -> float:
    """Return a duration that is neither None nor infinite.

    Raises:
        TypeError: It is not a number.
        ValueError: It is negative, 0 where it must not be, infinite, or not a number at all (NaN).
    """
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"{what} must be a number of seconds, got {seconds!r}")
    if not math.isfinite(seconds) or seconds < 0 or (above_zero and not seconds):
        bound = "greater than 0" if above_zero else "at least 0"
        raise ValueError(f"{what} must be {bound} and finite, in seconds, got {seconds!r}")
    return seconds


def checked_name(what: str, name: object, hint: str = "leave it out to have one made") -> str:
    """Return a usable name; ``hint`` says what to write instead of an empty one.

    Raises:
        TypeError: It is not a string.
        ValueError: It is empty, longer than 200 characters, or contains ``#`` or a control character.
    """
    if type(name) is str and is_plain_name(name):
        return name
    if not isinstance(name, str):
        raise TypeError(f"{what} name must be a string, got {name!r}")
    is_checked = type(name) is AttemptName
    # Its characters alone: one that is an Enum too says something else when asyncio asks for its text.
    name = str.__str__(name)
    if is_checked:
        return name
    if not name:
        raise ValueError(f"{what} name must not be empty: {hint}")
    if len(name) > LONGEST_NAME:
        raise ValueError(
            f"{what} name must have at most {LONGEST_NAME} characters, "
            f"got {len(name)}, {_beginning(name)}: shorten it"
        )
    if "#" in name:
        raise ValueError(
            f"{what} name must not contain '#', got {_beginning(name)}: "
            f"ids have it, as in 'group#3/name'; write {_beginning(name.replace('#', '-'))}"
        )
    if _CONTROL.search(name):
        raise ValueError(
            f"{what} name must not contain control characters, got {_beginning(name)}: "
            f"write {_beginning(_CONTROL.sub(' ', name))}"
        )
    return name


def _beginning(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:60]}...")


def checked_priority(priority: object) -> TaskPriority:
    """Return the TaskPriority for one or its number.

    Raises:
        ValueError: There is no such priority.
    """
    try:
        return TaskPriority(priority)  # type: ignore[arg-type]  # anything may come in: that is what is checked
    except ValueError:
        names = ", ".join(f"TaskPriority.{level.name}" for level in TaskPriority)
        raise ValueError(f"priority must be one of {names}, got {priority!r}") from None


def check_count(what: str, count: object, least: int) -> None:
    """Raise a ValueError unless ``count`` is None or a whole number of at least ``least``."""
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < least):
        raise ValueError(f"{what} must be at least {least}, or None for no bound, got {count!r}")


def check_flag(what: str, value: object) -> None:
    """Raise a TypeError unless ``value`` is True or False: ``"no"`` is true."""
    if not isinstance(value, bool):
        raise TypeError(f"{what} must be True or False, got {value!r}")


def check_choice(what: str, value: object, choices: Any) -> None:
    """Raise a ValueError unless ``value`` is one of a ``Literal``'s."""
    if value not in get_args(choices):
        listed = ", ".join(repr(choice) for choice in get_args(choices))
        raise ValueError(f"{what} must be one of {listed}, got {value!r}")
