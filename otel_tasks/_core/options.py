"""The options of ``create_task``, defined once for all functions that take them or pass them on."""

from __future__ import annotations

import inspect
from contextvars import Context
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

from otel_tasks._core.checks import check_choice, checked_name, checked_priority, checked_seconds
from otel_tasks._core.state import TaskPriority

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

F = TypeVar("F", bound="Callable[..., Any]")

OnConflict = Literal["error", "suffix", "return", "replace"]


class TaskOptions(TypedDict, total=False):
    """What few give to ``create_task``: one dictionary, or none, is passed on, not nine arguments."""

    timeout: float | None
    queue_timeout: float | None
    metadata: Mapping[str, Any] | None
    on_conflict: OnConflict
    detached: bool
    context: Context | None
    eager_start: bool | None


class NamedTaskOptions(TaskOptions, total=False):
    """The options of ``create_task``, for functions that pass them on."""

    name: str | None
    priority: TaskPriority | int


def with_options_of(source: Callable[..., Any]) -> Callable[[F], F]:
    """Show in the signature of a function the options that it passes on to ``source``, with their defaults.

    ``help()`` and ``inspect`` then show what an editor finds in the ``TypedDict``.

    Rejected: to write them out in each signature. Every task would then have its seven defaults looked at:
    267 instructions instead of 253 for a task in a group (``benchmarks.cost``, Python 3.11).
    """
    known = inspect.signature(source).parameters.values()

    def show(function: F) -> F:
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        taken = {each.name for each in own}
        passed_on = [
            each.replace(kind=each.KEYWORD_ONLY)
            for each in known
            if each.name in NamedTaskOptions.__annotations__ and each.name not in taken
        ]
        vars(function)["__signature__"] = signature.replace(parameters=[*own, *passed_on])
        return function

    return show


def check_options(who: str, options: Mapping[str, Any]) -> None:
    """Raise what ``create_task`` would raise for its options, as far as it can be told without a loop.

    Raises:
        TypeError: There is no such option, or it is of the wrong type.
        ValueError: One is out of its range.
    """
    check_option_names(who, options)
    if options.get("name") is not None:
        checked_name("task", options.get("name"))
    checked_priority(options.get("priority", TaskPriority.NORMAL))
    checked_seconds("timeout", options.get("timeout"))
    checked_seconds("queue_timeout", options.get("queue_timeout"))
    check_choice("on_conflict", options.get("on_conflict", "suffix"), OnConflict)


def check_option_names(who: str, options: Mapping[str, Any]) -> None:
    """Raise a TypeError, as Python does, for a keyword argument that is not an option of ``create_task``.

    Args:
        who: The name of the function that the caller called.
        options: Its keyword arguments.
    """
    unknown = options.keys() - NamedTaskOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"{who}() got an unexpected keyword argument {min(unknown)!r}")


def check_context(context: object) -> None:
    if not isinstance(context, Context):
        raise TypeError(
            f"context must be a contextvars.Context, got {context!r}: write contextvars.copy_context()"
        )
