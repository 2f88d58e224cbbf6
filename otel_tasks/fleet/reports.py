"""The answers of a fleet: the report of a cancellation, the rows of tasks, and the trees of all nodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelReport:
    """The outcome of a cancellation in all processes of a fleet.

    Attributes:
        asked: How many live tasks were asked to stop. A task that was already being cancelled counts too.
        ended: How many of them have ended, except those that completed anyway.
        still_running: How many of them still run.
        silent: The nodes that did not answer in time. Each of them carries out the cancellation when it
            reads it, if it is alive.
        asked_on: How many tasks were asked to stop, by node.
        still_running_on: The ids of the first hundred tasks that still run, by node.

    Example:
        >>> report = await fleet.cancel_task("import-17")
        >>> report.ended, report.silent
    """

    asked: int = 0
    ended: int = 0
    still_running: int = 0
    silent: tuple[str, ...] = ()
    asked_on: Mapping[str, int] = field(default_factory=dict)
    still_running_on: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """True if every node has answered, and nothing still runs."""
        return not self.silent and not self.still_running

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data."""
        return {
            "asked": self.asked,
            "ended": self.ended,
            "still_running": self.still_running,
            "silent": list(self.silent),
            "asked_on": dict(self.asked_on),
            "still_running_on": {node: list(ids) for node, ids in self.still_running_on.items()},
        }


class TaskRows(list[dict[str, Any]]):
    """The tasks of all processes of a fleet, as a list of dictionaries.

    Args:
        rows: The rows.
        more: How many further tasks match.
        silent: The nodes that have not answered in time.

    Attributes:
        more: How many further tasks match.
        silent: The nodes that have not answered in time.

    Example:
        >>> rows = await fleet.tasks(name="import-*")
        >>> [(row["node"], row["name"], row["status"]) for row in rows]
    """

    def __init__(
        self, rows: Iterable[dict[str, Any]] = (), *, more: int = 0, silent: tuple[str, ...] = ()
    ) -> None:
        super().__init__(rows)
        self.more = more
        self.silent = silent


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetTree:
    """The task trees of all processes of a fleet; ``str(tree)`` draws them.

    Attributes:
        nodes: The tree of each node, as ``TaskTree.to_dict()``.
        drawings: The same as text.
        silent: The nodes that did not answer in time.

    Example:
        >>> print(await fleet.tree())
    """

    nodes: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    drawings: Mapping[str, str] = field(default_factory=dict)
    silent: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{node}\n{drawing}" for node, drawing in self.drawings.items()]
        return "\n\n".join(parts + [f"{node}\nno answer" for node in self.silent])

    def to_dict(self) -> dict[str, Any]:
        """Return the trees as JSON-ready data."""
        return {"nodes": dict(self.nodes), "silent": list(self.silent)}
