"""The entries of the log and of the inboxes: JSON objects with a fixed, versioned schema.

Rules, each with its own test:

1. An entry carries only names and reasons, never arguments, results, or metadata. Nothing is unpickled.
2. A reader trusts nothing: it checks the size, the version, the kind, and the type and length of each field.
   It raises ``UnreadableEntryError`` for everything that it cannot read, whatever the bytes are.
3. A reader ignores unknown fields, and uses the default of a missing one. So a version can gain fields; every
   other change needs a new version.
4. Text for people is cut to ``TEXT_LIMIT``. A name is never cut, because it would then name something else: a
   name longer than ``NAME_LIMIT`` is an error of the sender.
"""

from __future__ import annotations

import json
import time
from dataclasses import MISSING, dataclass, fields
from types import NoneType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeAlias,
    get_args,
    get_origin,
    get_type_hints,
)

from otel_tasks._core.clock import now
from otel_tasks._core.events import CancelCause
from otel_tasks._core.state import CancelKind
from otel_tasks._core.telemetry import span_from_hex

if TYPE_CHECKING:
    from collections.abc import Callable

VERSION = 1
# The inspection that asks for the data of a live view.
VIEW = "view"
# Bytes of an encoded entry.
MAX_BYTES = 65536
# Characters.
NAME_LIMIT = 1024
TEXT_LIMIT = 2000
# The most names in a list; a count beside it has the total.
LIST_LIMIT = 100
# A number that every JSON reader keeps exactly.
LARGEST = 2**53

Name: TypeAlias = Annotated[str, "name"]
Text: TypeAlias = Annotated[str, "text"]
Names: TypeAlias = tuple[Name, ...]
Data: TypeAlias = dict[str, Any]


class UnreadableEntryError(ValueError):
    """Bytes that are no entry of this version.

    Attributes:
        node: The sender, ``""`` if unknown.
        kind: The kind of entry, ``""`` if unknown.
    """

    def __init__(self, reason: str, node: str = "", kind: str = "") -> None:
        super().__init__(reason)
        self.node = node
        self.kind = kind


@dataclass(slots=True, kw_only=True)
class FleetEntry:
    """An entry of any kind. Treat it as immutable: creating a frozen class would take six times as long.

    Attributes:
        node: The sender.
    """

    KIND: ClassVar[str] = ""

    node: Name


@dataclass(slots=True, kw_only=True)
class CausedEntry(FleetEntry):
    """An entry about a cancellation.

    Attributes:
        cause_kind: Why, as ``CancelKind`` writes it.
        message: The requester's message.
        asked_by: The requester.
        trace_id: The span of the request, in hex.
        span_id: The same.
    """

    cause_kind: Name = CancelKind.EXPLICIT.value
    message: Text | None = None
    asked_by: Text | None = None
    trace_id: Name | None = None
    span_id: Name | None = None

    def to_cause(self) -> CancelCause:
        """Return the cause; its time is now, because the sender's clock may be wrong."""
        origin = span_from_hex(self.trace_id, self.span_id)
        return CancelCause(_kind_of(self.cause_kind), self.message, self.asked_by, now(), origin)


@dataclass(slots=True, kw_only=True)
class CancelEntry(CausedEntry):
    """In the log: cancel a task, a group, or the execution of a message, wherever it is.

    Attributes:
        target: What ``name`` is: the name of a task or of a group, or the id of a broker's message.
        name: The name.
        at: The sender's wall clock, for display only, never for comparisons.
        request: The id that answers name; None if nobody waits for them.
        timeout: Seconds for which each node waits for the tasks before it answers.
        to: The only node to cancel in; None for all.
        post: From the envelope: the number that its sender gave it; None from another program.
        late: From the envelope: the seconds for which it waited for the bus.
    """

    KIND = "cancel"

    target: Literal["task", "group", "message"]
    name: Name
    at: float
    request: Name | None = None
    timeout: float | None = None
    to: Name | None = None
    post: int | None = None
    late: float = 0.0

    @classmethod
    def from_cause(
        cls,
        cause: CancelCause,
        *,
        node: str,
        target: Literal["task", "group", "message"],
        name: str,
        request: str | None = None,
        timeout: float | None = None,
        to: str | None = None,
    ) -> CancelEntry:
        """Create the entry that carries a cause to the other nodes."""
        return cls(
            node=node,
            target=target,
            name=name,
            at=time.time(),
            request=request,
            timeout=timeout,
            to=to,
            **cause_fields(cause),
        )


@dataclass(slots=True, kw_only=True)
class InspectEntry(FleetEntry):
    """In the log: every node answers. In an inbox: only that node answers.

    Attributes:
        request: The id that answers name.
        what: ``"tasks"``, ``"tree"``, or another list; ``"view"`` for the data of a live view.
        name: Only tasks whose names match; None for all.
        group: Only tasks of this group; None for all.
        status: Only tasks with this status; None for all.
        limit: The most rows per node; None for no limit.
        timeout: Seconds after which the requester no longer waits for an answer.
        data: The part of a view.
    """

    KIND = "inspect"

    request: Name
    what: Name
    name: Name | None = None
    group: Name | None = None
    status: Name | None = None
    limit: int | None = None
    timeout: float | None = None
    data: Data | None = None


@dataclass(slots=True, kw_only=True)
class AnswerEntry(FleetEntry):
    """In an inbox: a part of the answer to an inspection.

    Attributes:
        request: The id of the request.
        part: The number of this part, from 0.
        last: True if no part follows.
        data: The part.
    """

    KIND = "answer"

    request: Name
    part: int
    last: bool
    data: Data


@dataclass(slots=True, kw_only=True)
class CancelAnswer(FleetEntry):
    """In an inbox: the effect of a cancellation on one node.

    Attributes:
        request: The id of the request.
        asked: How many tasks were asked to stop.
        ended: How many of them have ended.
        running: How many of them still run.
        still_running: The names of the first ones of these.
    """

    KIND = "cancelled"

    request: Name
    asked: int
    ended: int
    running: int = 0
    still_running: Names = ()


@dataclass(slots=True, kw_only=True)
class EndedEntry(CausedEntry):
    """In an inbox: an execution for this node has ended; its result is in the broker's result backend.

    Attributes:
        task_id: The id of the broker's message.
        outcome: How it ended, as ``Outcome`` writes it.
        cancelled: True if the other fields say why it was cancelled.
        call: The name of the call; an older call may have had the same id.
    """

    KIND = "ended"

    task_id: Name
    outcome: Name
    cancelled: bool = False
    call: Name | None = None


@dataclass(slots=True, kw_only=True)
class ProgressEntry(FleetEntry):
    """In an inbox: the progress of an execution for this node.

    Attributes:
        task_id: The id of the broker's message.
        done: How much is done.
        total: Of how much; None if unknown.
        message: What it does now.
    """

    KIND = "progress"

    task_id: Name
    done: float
    total: float | None = None
    message: Text | None = None


KINDS: dict[str, type[FleetEntry]] = {
    kind.KIND: kind
    for kind in (CancelEntry, InspectEntry, AnswerEntry, CancelAnswer, EndedEntry, ProgressEntry)
}
_ENVELOPE = ("v", "kind")


def encode(entry: FleetEntry, **envelope: float | str | None) -> bytes:
    """Return an entry as bytes.

    Args:
        entry: The entry.
        envelope: What the sender adds for the reader's ``open_envelope``; None adds nothing.

    Raises:
        ValueError: A name is too long, or the whole entry is.
    """
    content: dict[str, Any] = {"v": VERSION, "kind": entry.KIND}
    content |= {key: value for key, value in envelope.items() if value is not None}
    for name, field in _SCHEMAS[type(entry)].fields.items():
        value = getattr(entry, name)
        if value != field.default:
            content[name] = field.to_json(name, value)
    payload = _encode_json(content).encode()
    if len(payload) > MAX_BYTES:
        raise ValueError(f"the {entry.KIND} entry has {len(payload)} bytes, at most {MAX_BYTES} are allowed")
    return payload


def decode(payload: bytes) -> FleetEntry:
    """Return the entry that was encoded.

    Raises:
        UnreadableEntryError: It is too large, malformed, or of a later version or an unknown kind.
    """
    return open_envelope(payload)[0]


def open_envelope(payload: bytes) -> tuple[FleetEntry, dict[str, Any]]:
    """Return the entry that was encoded, and the whole object, with what the sender added.

    Raises:
        UnreadableEntryError: As ``decode``.
    """
    content = _load(payload)
    try:
        return _read(content), content
    except ValueError as error:
        raise UnreadableEntryError(
            str(error), _word(content.get("node")), _word(content.get("kind"))
        ) from None


def _read(content: dict[str, Any]) -> FleetEntry:
    if content.get("v") != VERSION:
        raise ValueError(_version_reason(content.get("v")))
    kind = content.get("kind")
    entry_type = KINDS.get(kind) if isinstance(kind, str) else None
    if entry_type is None:
        raise ValueError("its kind is unknown")
    return entry_type(**_SCHEMAS[entry_type].read(content))


def cause_fields(cause: CancelCause) -> dict[str, Any]:
    """Return the fields of a ``CausedEntry`` for this cause."""
    data = cause.to_dict()
    return {"cause_kind": data.pop("kind"), **data}


def _kind_of(kind: str) -> CancelKind:
    """Return a kind; one that a later version has added is ``explicit``: no cancellation is lost for it."""
    try:
        return CancelKind(kind)
    except ValueError:
        return CancelKind.EXPLICIT


# -- bytes --------------------------------------------------------------------------------------


def _load(payload: bytes) -> dict[str, Any]:
    if len(payload) > MAX_BYTES:
        raise UnreadableEntryError(f"it has {len(payload)} bytes, more than {MAX_BYTES}")
    try:
        text = payload.decode().strip(_SPACE)
        content, end = _decode_json(text)
    except (ValueError, RecursionError):
        raise UnreadableEntryError("it is not JSON") from None
    if end != len(text):
        raise UnreadableEntryError("it is not JSON")
    if not isinstance(content, dict):
        raise UnreadableEntryError("it is not a JSON object")
    return content


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


# What JSON allows around a value.
_SPACE = " \t\n\r"
# json.loads() and json.dumps() would make a decoder and an encoder for each call, and decode() looks for
# space with two regular expressions.
_decode_json = json.JSONDecoder(parse_constant=_refuse_constant).raw_decode
_encode_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def _word(value: object) -> str:
    """Return a text from an unchecked entry, for a log line."""
    return value[:NAME_LIMIT] if isinstance(value, str) else ""


def _version_reason(version: object) -> str:
    if isinstance(version, int) and version > VERSION:
        return f"its version is {version}, and this process reads version {VERSION}"
    return "it has no version that exists"


# -- fields -------------------------------------------------------------------------------------

# Checks a value, and returns it.
_Reader: TypeAlias = "Callable[[Any], object]"


class _Field:
    """The type, the bounds, and the default of one field."""

    __slots__ = ("default", "is_optional", "is_text", "longest", "read")

    def __init__(self, name: str, hint: Any, default: object) -> None:
        self.default = default
        self.is_optional = NoneType in get_args(hint)
        if self.is_optional:
            (hint,) = (arg for arg in get_args(hint) if arg is not NoneType)
        self.is_text = hint == Text
        # A text of at most so many characters, the commonest value, needs no further look. -1 for no text.
        self.longest = -1
        if get_origin(hint) is Annotated:
            self.longest = TEXT_LIMIT if self.is_text else NAME_LIMIT
        self.read: _Reader = _READERS[get_origin(hint) or hint](name, hint)

    def to_json(self, name: str, value: Any) -> object:
        """Check and cut a value of this process's own."""
        if isinstance(value, str):
            return value[:TEXT_LIMIT] if self.is_text else _bounded(name, value, NAME_LIMIT)
        if isinstance(value, tuple):
            return [_bounded(name, item, NAME_LIMIT) for item in value[:LIST_LIMIT]]
        return value


class _Schema:
    """The fields of one kind of entry."""

    def __init__(self, entry_type: type[FleetEntry]) -> None:
        hints = get_type_hints(entry_type, include_extras=True)
        self.fields = {
            field.name: _Field(field.name, hints[field.name], field.default) for field in fields(entry_type)
        }
        self._required = [name for name, field in self.fields.items() if field.default is MISSING]

    def read(self, content: dict[str, Any]) -> dict[str, Any]:
        """Return the fields that an entry has.

        Raises:
            ValueError: A required one is missing, or one has another type or length.
        """
        values: dict[str, Any] = {}
        for name, value in content.items():
            field = self.fields.get(name)
            if field is None:
                continue
            if (type(value) is str and len(value) <= field.longest) or (value is None and field.is_optional):
                values[name] = value
            else:
                values[name] = field.read(value)
        for name in self._required:
            if name not in values:
                raise ValueError(f"{name} is missing")
        return values


def _bounded(name: str, value: str, limit: int) -> str:
    if len(value) > limit:
        raise ValueError(f"{name} has {len(value)} characters, at most {limit} are allowed")
    return value


def _reads_str(name: str, hint: Any) -> _Reader:
    limit = TEXT_LIMIT if hint == Text else NAME_LIMIT

    def read(value: Any) -> str:
        if type(value) is not str:
            raise ValueError(f"{name} is not text")
        return value if len(value) <= limit else _bounded(name, value, limit)

    return read


def _reads_int(name: str, hint: Any) -> _Reader:
    def read(value: Any) -> int:
        if type(value) is not int or abs(value) > LARGEST:
            raise ValueError(f"{name} is not a whole number")
        return value

    return read


def _reads_float(name: str, hint: Any) -> _Reader:
    def read(value: Any) -> float:
        # The comparison is False for NaN too.
        if type(value) not in (int, float) or not abs(value) <= LARGEST:
            raise ValueError(f"{name} is not a number")
        return float(value)

    return read


def _reads_bool(name: str, hint: Any) -> _Reader:
    def read(value: Any) -> bool:
        if type(value) is not bool:
            raise ValueError(f"{name} is neither true nor false")
        return value

    return read


def _reads_choice(name: str, hint: Any) -> _Reader:
    choices = get_args(hint)

    def read(value: Any) -> object:
        if value not in choices:
            raise ValueError(f"{name} is none of {', '.join(choices)}")
        return value

    return read


def _reads_names(name: str, hint: Any) -> _Reader:
    read_name = _reads_str(name, Name)

    def read(value: Any) -> tuple[object, ...]:
        if type(value) is not list or len(value) > LIST_LIMIT:
            raise ValueError(f"{name} is not a list of at most {LIST_LIMIT} names")
        return tuple(map(read_name, value))

    return read


def _reads_data(name: str, hint: Any) -> _Reader:
    def read(value: Any) -> Data:
        if type(value) is not dict:
            raise ValueError(f"{name} is not an object")
        return value

    return read


_READERS: dict[Any, Callable[[str, Any], _Reader]] = {
    Annotated: _reads_str,
    int: _reads_int,
    float: _reads_float,
    bool: _reads_bool,
    Literal: _reads_choice,
    tuple: _reads_names,
    dict: _reads_data,
}
_SCHEMAS = {entry_type: _Schema(entry_type) for entry_type in KINDS.values()}
