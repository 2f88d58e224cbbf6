"""Checks of arguments, shared by several layers, and the messages of their errors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, get_args

from otel_tasks._core.state import TaskPriority

LONGEST_NAME = 200
# Unicode's categories Cc, the control characters, and Cs, the surrogates: line ends and escape sequences can
# forge log lines, and a span with a surrogate in its name costs the OTLP exporter its whole batch.
_REFUSED = r"\x00-\x1f\x7f-\x9f\ud800-\udfff"
_CONTROL = re.compile(f"[{_REFUSED}]")
is_plain_name = re.compile(f"[^#{_REFUSED}]{{1,{LONGEST_NAME}}}").fullmatch


class AttemptName(str):
    """The name of a service's attempt, ``prices#1``: the library's own, so it may have a ``#``."""

    __slots__ = ()


def checked_seconds(what: str, seconds: float | None) -> float | None:
    """Return a duration; infinity becomes None, which means no limit.

    Raises:
        TypeError: It is not a number.
        ValueError: It is negative or NaN.
    """
    if seconds is None or seconds == float("inf"):
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"{what} must be seconds as a number, or None for no bound, got {seconds!r}")
    if not seconds >= 0:
        raise ValueError(f"{what} must be at least 0 seconds, got {seconds!r}")
    try:
        return float(seconds)
    except OverflowError:
        return None


def checked_finite_seconds(what: str, seconds: object, *, above_zero: bool = False) -> float:
    """Return a duration that is neither None nor infinite.

    Raises:
        TypeError: It is not a number.
        ValueError: It is negative, infinite, or NaN, or it is 0 and ``above_zero`` is set.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"{what} must be a number of seconds, got {seconds!r}")
    if not _is_finite(seconds) or seconds < 0 or (above_zero and not seconds):
        bound = "greater than 0" if above_zero else "at least 0"
        raise ValueError(f"{what} must be {bound} and finite, in seconds, got {seconds!r}")
    return seconds


def _is_finite(seconds: float) -> bool:
    try:
        return math.isfinite(seconds)
    except OverflowError:
        # An int that no float can hold.
        return False


def checked_name(what: str, name: object, hint: str = "leave it out to have one made") -> str:
    """Return a valid name, as a plain string.

    Args:
        what: The kind of thing that has the name, for the error messages: ``"task"``.
        name: The name to check.
        hint: What to write instead of an empty name.

    Raises:
        TypeError: It is not a string.
        ValueError: It is empty, longer than 200 characters, or contains ``#`` or a control character.
    """
    if type(name) is str and is_plain_name(name):
        return name
    if not isinstance(name, str):
        raise TypeError(f"{what} name must be a string, got {name!r}")
    # The plain characters: asyncio would take the text of a subclass, and an Enum member's differs.
    plain = str.__str__(name)
    if type(name) is not AttemptName:
        _check_characters(what, plain, hint)
    return plain


def _check_characters(what: str, name: str, hint: str) -> None:
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


def _beginning(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:60]}...")


def checked_priority(priority: object) -> TaskPriority:
    """Return the TaskPriority of a member or its number.

    Raises:
        ValueError: It is neither.
    """
    try:
        if isinstance(priority, bool):
            # True is equal to NORMAL.
            raise ValueError
        return TaskPriority(priority)  # type: ignore[arg-type]  # it is the argument under check
    except ValueError:
        names = ", ".join(f"TaskPriority.{level.name}" for level in TaskPriority)
        raise ValueError(f"priority must be one of {names}, got {priority!r}") from None


def check_count(what: str, count: object, least: int) -> None:
    """Raise a ValueError unless ``count`` is None or a whole number of at least ``least``."""
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < least):
        raise ValueError(f"{what} must be at least {least}, or None for no bound, got {count!r}")


def check_number(what: str, count: object, least: int) -> None:
    """Raise a ValueError unless ``count`` is a whole number of at least ``least``."""
    if not isinstance(count, int) or isinstance(count, bool) or count < least:
        raise ValueError(f"{what} must be a whole number of at least {least}, got {count!r}")


def check_manager_numbers(history: object, max_threads: object, ageing: object) -> None:
    """Raise a ValueError unless these options of ``TaskManager`` are in their ranges."""
    if not isinstance(history, int) or isinstance(history, bool) or history < 0:
        raise ValueError(f"history must be a whole number of tasks, at least 0, got {history!r}")
    check_count("max_threads", max_threads, 1)
    if not isinstance(ageing, int | float) or isinstance(ageing, bool) or not ageing > 0:
        raise ValueError(f"ageing must be more than 0 seconds, got {ageing!r}")


def checked_keys(what: str, keys: object) -> tuple[str, ...]:
    """Return keys of metadata, each once.

    Raises:
        TypeError: It is a string, or has a key that is none.
    """
    if isinstance(keys, str) or not isinstance(keys, Iterable):
        hint = f": write {what}=({keys!r},)" if isinstance(keys, str) else ""
        raise TypeError(f"{what} must be a collection of strings, got {keys!r}{hint}")
    found = tuple(keys)
    for key in found:
        if not isinstance(key, str):
            raise TypeError(f"{what} must contain only strings, got {key!r}: the keys of metadata=")
    return tuple(dict.fromkeys(found))


def check_flag(what: str, value: object) -> None:
    """Raise a TypeError unless ``value`` is True or False: ``"no"`` is true."""
    if not isinstance(value, bool):
        raise TypeError(f"{what} must be True or False, got {value!r}")


def check_choice(what: str, value: object, choices: Any) -> None:
    """Raise a ValueError unless ``value`` is one of the values of the ``Literal`` type ``choices``."""
    if value not in get_args(choices):
        listed = ", ".join(repr(choice) for choice in get_args(choices))
        raise ValueError(f"{what} must be one of {listed}, got {value!r}")
