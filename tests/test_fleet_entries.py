from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks import CancelCause, CancelKind
from otel_tasks.fleet.entries import (
    LIST_LIMIT,
    MAX_BYTES,
    NAME_LIMIT,
    TEXT_LIMIT,
    AnswerEntry,
    CancelAnswer,
    CancelEntry,
    EndedEntry,
    FleetEntry,
    InspectEntry,
    ProgressEntry,
    UnreadableEntryError,
    cause_fields,
    decode,
    encode,
    open_envelope,
)

if TYPE_CHECKING:
    from otel_tasks.testing import SpanRecorder

ENTRIES = [
    CancelEntry(node="a", target="task", name="import-17", at=1.5),
    CancelEntry(
        node="a",
        target="message",
        name="é\udce9\n",
        at=1.5,
        cause_kind="timeout",
        message="too late",
        asked_by="DELETE /jobs/{job}",
        trace_id="0af7651916cd43dd8448eb211c80319c",
        span_id="b7ad6b7169203331",
        request="r1",
        timeout=5.0,
    ),
    InspectEntry(node="a", request="r2", what="tasks", name="import-*", limit=100, timeout=2),
    AnswerEntry(node="a", request="r2", part=0, last=True, data={"rows": [{"name": "x", "n": None}]}),
    CancelAnswer(node="a", request="r1", asked=3, ended=1, still_running=("x", "y")),
    EndedEntry(node="a", task_id="m1", outcome="cancelled", cancelled=True, cause_kind="shutdown"),
    ProgressEntry(node="a", task_id="m1", done=1, total=2.5, message="half"),
]


def raw(**fields: object) -> bytes:
    """An entry as another program writes it; `...` leaves a field out."""
    content: dict[str, Any] = {"v": 1, "kind": "cancel", "node": "b", "target": "task", "name": "x", "at": 1}
    return json.dumps({k: v for k, v in (content | fields).items() if v is not ...}).encode()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: type(entry).__name__)
def test_entry_comes_back_as_it_was(entry: FleetEntry) -> None:
    """Each kind of entry is the same after a round trip, and is an object of version 1."""
    payload = encode(entry)

    assert decode(payload) == entry
    assert json.loads(payload)["v"] == 1


def test_sender_may_add_an_envelope() -> None:
    """The envelope comes back beside the entry; a cancellation has its number and its delay too."""
    entry, content = open_envelope(encode(ENTRIES[0], post=7, late=1.5, was=None))

    assert isinstance(entry, CancelEntry)
    assert (entry.post, entry.late) == (7, 1.5)
    assert replace(entry, post=None, late=0.0) == ENTRIES[0]
    assert content["post"] == 7
    assert "was" not in content


def test_space_around_an_entry_is_allowed() -> None:
    """JSON allows it, and another program may add a newline."""
    assert decode(b" \t" + encode(ENTRIES[0]) + b"\r\n") == ENTRIES[0]


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "it is not JSON"),
        (b"\xff\xfe", "it is not JSON"),
        (b"\x80\x04K\x01.", "it is not JSON"),
        (b"[" * 60_000, "it is not JSON"),
        (b"1" * 60_000, "it is not JSON"),
        (raw(at=1).replace(b"1}", b"NaN}"), "it is not JSON"),
        (raw(at=1) + b"{}", "it is not JSON"),
        (raw(at=1) + b"\xc2\xa0", "it is not JSON"),
        (b"[]", "it is not a JSON object"),
        (b"null", "it is not a JSON object"),
        (raw(note="x" * MAX_BYTES), "more than 65536"),
        (raw(v=2), "its version is 2, and this process reads version 1"),
        (raw(v="1"), "it has no version that exists"),
        (raw(v=...), "it has no version that exists"),
        (raw(kind="dance"), "its kind is unknown"),
        (raw(kind=["cancel"]), "its kind is unknown"),
        (raw(kind=...), "its kind is unknown"),
        (raw(node=...), "node is missing"),
        (raw(node=3), "node is not text"),
        (raw(name=None), "name is not text"),
        (raw(name="x" * (NAME_LIMIT + 1)), "name has 1025 characters, at most 1024 are allowed"),
        (raw(message="x" * (TEXT_LIMIT + 1)), "message has 2001 characters, at most 2000 are allowed"),
        (raw(target="planet"), "target is none of task, group, message"),
        (raw(target=[]), "target is none of task, group, message"),
        (raw(at="noon"), "at is not a number"),
        (raw(at=True), "at is not a number"),
        (raw(timeout=[]), "timeout is not a number"),
        (raw(at=10**400), "at is not a number"),
        (raw(kind="inspect", request="r", what="tasks", limit=1.5), "limit is not a whole number"),
        (
            raw(kind="ended", task_id="m", outcome="success", cancelled="no"),
            "cancelled is neither true nor false",
        ),
        (raw(kind="answer", request="r", part=0, last=True, data=[]), "data is not an object"),
        (
            raw(kind="cancelled", request="r", asked=1, ended=1, still_running="x"),
            "still_running is not a list of at most 100 names",
        ),
        (
            raw(kind="cancelled", request="r", asked=1, ended=1, still_running=[1]),
            "still_running is not text",
        ),
    ],
)
def test_bad_entry_is_refused(payload: bytes, reason: str) -> None:
    """Whatever the bytes are, the error is one and says what is wrong."""
    with pytest.raises(UnreadableEntryError, match=reason.replace("[", r"\[")):
        decode(payload)


def test_error_names_sender_and_kind() -> None:
    """The error says where the entry came from and what it is, as far as that can be read."""
    with pytest.raises(UnreadableEntryError) as caught:
        decode(raw(v=3))
    assert (caught.value.node, caught.value.kind) == ("b", "cancel")

    with pytest.raises(UnreadableEntryError) as caught:
        decode(raw(node={}, kind=1))
    assert (caught.value.node, caught.value.kind) == ("", "")


def test_unknown_field_is_ignored() -> None:
    """A field of a later release does not hinder this one, and a missing one has its default."""
    entry = decode(raw(color="red"))

    assert entry == CancelEntry(node="b", target="task", name="x", at=1)


def test_text_is_cut_and_names_are_not() -> None:
    """Text for people is cut to what a reader accepts; a name that is too long is the sender's error."""
    entry = CancelEntry(node="a", target="task", name="x", at=1.0, message="y" * 5000)
    long_name = CancelEntry(node="a", target="task", name="x" * 1025, at=1.0)

    sent = decode(encode(entry))
    assert isinstance(sent, CancelEntry)
    assert sent.message == "y" * TEXT_LIMIT
    with pytest.raises(ValueError, match="name has 1025 characters, at most 1024 are allowed"):
        encode(long_name)


def test_list_is_cut() -> None:
    """A list of names is cut to its limit."""
    names = tuple(str(n) for n in range(300))

    sent = decode(encode(CancelAnswer(node="a", request="r", asked=300, ended=0, still_running=names)))

    assert isinstance(sent, CancelAnswer)
    assert sent.still_running == names[:LIST_LIMIT]


def test_large_entry_is_the_senders_error() -> None:
    """An entry that a reader would refuse is not sent."""
    entry = AnswerEntry(node="a", request="r", part=0, last=True, data={"rows": ["x" * 100] * 1000})

    with pytest.raises(ValueError, match="the answer entry has 103087 bytes, at most 65536 are allowed"):
        encode(entry)


def test_cause_travels(spans: SpanRecorder) -> None:
    """A cause arrives with its kind, message, requester, and span; its time is that of the arrival."""
    with spans.provider.get_tracer("app").start_as_current_span("request"):
        cause = CancelCause.make(CancelKind.CLIENT_DISCONNECT, "gone")
    sent = CancelEntry.from_cause(cause, node="a", target="group", name="tenant.acme", request="r")

    entry = decode(encode(sent))
    assert isinstance(entry, CancelEntry)
    arrived = entry.to_cause()

    assert entry == sent
    assert arrived.to_dict() == cause.to_dict()
    assert arrived.at is not None
    assert arrived.origin is not None
    assert arrived.origin.is_remote


def test_cause_without_a_span_travels() -> None:
    """Without a span there is no origin; ids that are none are ignored."""
    fields = cause_fields(CancelCause(CancelKind.TIMEOUT))
    assert EndedEntry(node="a", task_id="m", outcome="timeout", **fields).to_cause().origin is None

    entry = decode(raw(trace_id="no hex", span_id="12"))
    assert isinstance(entry, CancelEntry)
    assert entry.to_cause().origin is None


def test_later_kind_of_cause_is_explicit() -> None:
    """A kind of cause that this release does not know still cancels."""
    entry = decode(raw(cause_kind="solar_flare", message="hot"))

    assert isinstance(entry, CancelEntry)
    assert str(entry.to_cause()) == "explicit: hot"
