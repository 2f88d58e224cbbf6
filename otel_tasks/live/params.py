"""Parameters: reads and bounds what a client sends."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

MAX_QUERY_STRING = 4000
MAX_TEXT = 200
MAX_NAME = 500
MAX_EXPAND = 20
MAX_PANELS = 10
MAX_ROWS = 1000
MAX_ROWS_OF_STREAM = 2000
DEFAULT_ROWS = 200
DEFAULT_OLDEST = 50
MAX_REASON = 500

_VIEWER = re.compile(r"[A-Za-z0-9_-]{1,64}")
# That of another node of a fleet has a mark.
_KEY = re.compile(r"(?:[0-9a-f]{8}~)?[gc][0-9a-f]{10}")
SORTS = ("age", "-age", "name", "status")
STATUSES = ("pending", "queued", "running", "cancelling")


class BadRequest(ValueError):
    """A parameter is unknown, too long, or out of its range."""


@dataclass(frozen=True, slots=True)
class Watched:
    """What a viewer wants besides the overview.

    Attributes:
        viewer: The name of the browser; None if it gives none.
        after: The id of its last update.
        expand: How many tasks of which rows.
        names: What it calls some of these rows.
        panels: The tasks that its panels show, one for each of its tabs.
        poll: It wants the events until now, and no stream.
    """

    viewer: str | None
    after: str | None
    expand: dict[str, int]
    names: dict[str, str]
    panels: tuple[str, ...]
    poll: bool


@dataclass(frozen=True, slots=True)
class Query:
    """Which tasks a client wants, and in which order."""

    words: tuple[str, ...]
    key: str | None
    group_id: str | None
    status: str | None
    min_age: float
    where: str | None
    ended: bool
    sort: str
    limit: int
    after: str | None


class Params:
    """The parameters of one request.

    Args:
        pairs: Names and values, in their order.
        known: The names that may occur.

    Raises:
        BadRequest: Another name occurs, or the values are too long.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]], known: Collection[str]) -> None:
        self._pairs = list(pairs)
        unknown = sorted({name for name, _ in self._pairs} - set(known))
        if unknown:
            raise BadRequest(
                f"unknown parameter {unknown[0][:40]!r}: {', '.join(known) or 'none'} may be given"
            )
        if sum(len(value) for _, value in self._pairs) > MAX_QUERY_STRING:
            raise BadRequest(f"the query has more than {MAX_QUERY_STRING} characters")

    def every(self, name: str) -> list[str]:
        """All values of a parameter."""
        return [value for other, value in self._pairs if other == name]

    def text(self, name: str, limit: int = MAX_TEXT) -> str | None:
        """The last value of a parameter; None if it is missing or empty."""
        value = (self.every(name) or [""])[-1]
        if len(value) > limit:
            raise BadRequest(f"{name} has more than {limit} characters")
        return value or None

    def choice(self, name: str, values: Collection[str]) -> str | None:
        """One of these values; None if it is missing."""
        value = self.text(name)
        if value is not None and value not in values:
            raise BadRequest(f"{name} must be one of {', '.join(values)}")
        return value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """A number in this range."""
        value = self.text(name)
        try:
            number = default if value is None else float(value)
        except ValueError:
            raise BadRequest(f"{name} must be a number") from None
        if not least <= number <= most:
            raise BadRequest(f"{name} must be from {least:g} to {most:g}")
        return number


WATCHED = ("after", "expand", "task", "viewer", "poll")
QUERIED = ("q", "key", "group_id", "status", "min_age", "where", "state", "sort", "limit", "after")


def watched(params: Params, last_event_id: str | None, root_key: str) -> Watched:
    """Read the parameters of the stream."""
    viewer = params.text("viewer")
    if viewer is not None and not _VIEWER.fullmatch(viewer):
        raise BadRequest("viewer must be up to 64 of the characters A-Z a-z 0-9 _ -")
    expand: dict[str, int] = {}
    names: dict[str, str] = {}
    wanted = params.every("expand")
    if len(wanted) > MAX_EXPAND:
        raise BadRequest(f"expand may be given at most {MAX_EXPAND} times")
    for value in wanted:
        name, limit = _expanded(value)
        key = root_key if name == "oldest" else name
        if key != name:
            names[key] = name
        expand[key] = limit
    if sum(expand.values()) > MAX_ROWS_OF_STREAM:
        raise BadRequest(f"expand may ask for at most {MAX_ROWS_OF_STREAM} tasks in all")
    panels = tuple(dict.fromkeys(filter(None, params.every("task"))))
    if len(panels) > MAX_PANELS:
        raise BadRequest(f"task may be given at most {MAX_PANELS} times")
    if any(len(uid) > MAX_TEXT for uid in panels):
        raise BadRequest(f"task has more than {MAX_TEXT} characters")
    after = params.text("after") or (last_event_id or "")[:MAX_TEXT] or None
    poll = params.choice("poll", ("0", "1")) == "1"
    return Watched(viewer, after, expand, names, panels, poll)


def _expanded(value: str) -> tuple[str, int]:
    name, _, number = value.partition(":")
    default = DEFAULT_OLDEST if name == "oldest" else DEFAULT_ROWS
    if name != "oldest" and not _KEY.fullmatch(name):
        raise BadRequest("expand must be the key of a group or a class, or 'oldest'")
    if number and not (number.isdecimal() and 1 <= int(number[:5]) <= MAX_ROWS):
        raise BadRequest(f"expand may ask for 1 to {MAX_ROWS} tasks of a row")
    return name, int(number[:5]) if number else default


def query(params: Params) -> Query:
    """Read the parameters of a list."""
    key = params.text("key")
    if key is not None and not _KEY.fullmatch(key):
        raise BadRequest("key must be the key of a group or a class")
    return Query(
        words=tuple((params.text("q") or "").casefold().split()),
        key=key,
        group_id=params.text("group_id", MAX_NAME),
        status=params.choice("status", STATUSES),
        min_age=params.number("min_age", 0.0, 0.0, 1e9),
        where=params.text("where", MAX_NAME),
        ended=params.choice("state", ("live", "ended")) == "ended",
        sort=params.choice("sort", SORTS) or "age",
        limit=int(params.number("limit", DEFAULT_ROWS, 1, MAX_ROWS)),
        after=params.text("after"),
    )


def printable(value: str) -> str:
    """A client's text on one line, without what logs, terminals, and exporters of traces choke on."""
    return "".join(char if char.isprintable() else " " for char in value)


def reason_of(body: Any) -> str | None:
    """The reason in the body of a cancel request."""
    if not isinstance(body, dict) or set(body) - {"reason"}:
        raise BadRequest('the body must be an object with at most a "reason"')
    reason = body.get("reason")
    if reason is None:
        return None
    if not isinstance(reason, str) or len(reason) > MAX_REASON:
        raise BadRequest(f"reason must be a text of at most {MAX_REASON} characters")
    # It goes into the log: a line break in it could forge a line.
    return printable(reason).strip() or None
