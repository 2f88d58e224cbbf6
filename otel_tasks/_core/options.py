"""The options of ``create_task``, defined once for all functions that accept them."""

from __future__ import annotations

import difflib
import inspect
from contextvars import Context
from dataclasses import dataclass, fields
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Literal, TypedDict, TypeVar

from otel_tasks._core.backoff import check_retry
from otel_tasks._core.checks import check_choice, checked_name, checked_priority, checked_seconds
from otel_tasks._core.state import TaskPriority

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from otel_tasks._core.backoff import RetryPolicy

C = TypeVar("C", bound=type)
F = TypeVar("F", bound="Callable[..., Any]")

OnConflict = Literal["error", "suffix", "return", "replace"]
Trace = Literal["child", "new"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOptions:
    """The options of a group, and the defaults of its tasks; None where it has none."""

    max_concurrency: int | None = None
    max_queue: int | None = None
    timeout: float | None = None
    trace: Trace | None = None
    retry: RetryPolicy | None = None

    def __post_init__(self) -> None:
        checked_seconds("timeout", self.timeout)
        starts_trace(self.trace)
        check_retry(self.retry)

    def __str__(self) -> str:
        """The options that are set, as they are written in a call."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return ", ".join(f"{name}={value!r}" for name, value in values.items() if value is not None)


class FromManager(Enum):
    """A marker for a duration that is the manager's own: None is taken, it means no limit."""

    FROM_MANAGER = "that of the manager"

    def __repr__(self) -> str:
        return self.name


FROM_MANAGER: Final = FromManager.FROM_MANAGER


# The one option that `_create` does not have, because it gets the coroutine of all attempts.
_RETRY = inspect.Parameter(
    "retry", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="RetryPolicy | None"
)


class TaskOptions(TypedDict, total=False):
    """The rarer options of ``create_task``; functions pass on one dictionary instead of each argument."""

    timeout: float | None
    queue_timeout: float | None
    metadata: Mapping[str, Any] | None
    on_conflict: OnConflict
    trace: Trace | None
    context: Context | None
    eager_start: bool | None


class NamedTaskOptions(TaskOptions, total=False):
    """All options of ``create_task`` with a coroutine, for functions that pass them on."""

    name: str | None
    priority: TaskPriority | int


class RetriedTaskOptions(TaskOptions, total=False):
    """The rarer options, and ``retry``, with which ``create_task`` takes a function."""

    retry: RetryPolicy | None


_ALL = NamedTaskOptions.__annotations__.keys() | RetriedTaskOptions.__annotations__.keys()


def named_as_one(cls: C) -> C:
    """Give the methods of the parts that a class is made of the name of the class.

    Python's own messages show it: `coroutine 'TaskManager.start_task' was never awaited`.
    """
    for part in cls.__mro__[1:-1]:
        for name, member in vars(part).items():
            if inspect.isfunction(member):
                member.__qualname__ = f"{cls.__qualname__}.{name}"
    return cls


def with_options_of(source: Callable[..., Any]) -> Callable[[F], F]:
    """Add the options that a function passes on to ``source`` to its signature, with their defaults.

    ``help()`` and ``inspect`` then show what an editor finds in the ``TypedDict``.

    Rejected: writing them out in each signature. Each task would then check seven defaults: 267 instructions
    instead of 253 for a task in a group (``benchmarks.cost``, Python 3.11).
    """
    known = dict(inspect.signature(source).parameters)
    known.setdefault("retry", _RETRY)

    def show(function: F) -> F:
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        taken = {each.name for each in own}
        passed_on = [
            each.replace(kind=each.KEYWORD_ONLY)
            for each in known.values()
            if each.name in _ALL and each.name not in taken
        ]
        vars(function)["__signature__"] = signature.replace(parameters=[*own, *passed_on])
        return function

    return show


def check_options(function: str, options: Mapping[str, Any]) -> None:
    """Raise the errors of ``create_task`` for these options, as far as they do not depend on a loop.

    Raises:
        TypeError: An option is unknown, or its value has the wrong type.
        ValueError: A value is out of range.
    """
    check_option_names(function, options)
    if options.get("name") is not None:
        checked_name("task", options.get("name"))
    checked_priority(options.get("priority", TaskPriority.NORMAL))
    checked_seconds("timeout", options.get("timeout"))
    checked_seconds("queue_timeout", options.get("queue_timeout"))
    check_choice("on_conflict", options.get("on_conflict", "suffix"), OnConflict)
    starts_trace(options.get("trace"))
    check_retry(options.get("retry"))


def starts_trace(trace: Trace | None) -> bool | None:
    """Return whether a task with this option starts a new trace; None leaves it to a wider default.

    Raises:
        ValueError: It is not one of the choices.
    """
    if trace is None:
        return None
    check_choice("trace", trace, Trace)
    return trace == "new"


def check_option_names(function: str, options: Mapping[str, Any]) -> None:
    """Raise a TypeError, as Python does, for a keyword argument that is not an option of ``create_task``.

    Args:
        function: The name of the function that the caller called.
        options: Its keyword arguments.
    """
    unknown = options.keys() - _ALL
    if unknown:
        name = min(unknown)
        meant = difflib.get_close_matches(name, sorted(_ALL), n=1)
        hint = f". Did you mean {meant[0]!r}?" if meant else ""
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")


def check_context(context: object) -> None:
    if not isinstance(context, Context):
        raise TypeError(
            f"context must be a contextvars.Context, got {context!r}: write contextvars.copy_context()"
        )
