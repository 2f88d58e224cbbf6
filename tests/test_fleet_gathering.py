"""Gathering: who is waited for, for how long, and what answers may be."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks._core.slices import at_once
from otel_tasks.fleet import gathering as module
from otel_tasks.fleet.bus import BusUnavailableError
from otel_tasks.fleet.entries import MAX_BYTES, AnswerEntry, CancelAnswer, InspectEntry, encode
from otel_tasks.fleet.gathering import Gathering, Question, parts_of
from otel_tasks.fleet.link import HOLD_OFF, Link
from otel_tasks.fleet.memory_bus import MemoryBus, memory_server
from tests.helpers import now

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@contextlib.asynccontextmanager
async def asking() -> AsyncIterator[tuple[Gathering, Link]]:
    """A node that asks, in a fleet with a second one, ``b``, which answers what the test sends for it."""
    link = Link(MemoryBus("", "shop"), "a")
    gathering = Gathering(link)
    await link.start(5.0)
    server = memory_server(namespace="shop")
    server.announce("a", b"{}", 3600.0)
    server.announce("b", b"{}", 3600.0)
    try:
        yield gathering, link
    finally:
        await link.stop()


def post(link: Link, question: Question) -> asyncio.Future[str]:
    """Send a question."""
    return link.post(InspectEntry(node="a", request=question.request, what="tasks"))


def answer(request: str, node: str = "b", **data: Any) -> list[bytes]:
    """The entries of an answer."""
    return [encode(part) for part in at_once(parts_of(data, node, request))]


async def test_the_answer_of_each_node_is_waited_for() -> None:
    """It ends when the last one has come."""
    async with asking() as (gathering, link):
        with gathering.question() as question:
            loop = asyncio.get_running_loop()
            server = memory_server(namespace="shop")
            loop.call_later(2, server.deliver, {"a": answer(question.request, rows=[1])})
            began = now()
            await gathering.answers(question, post(link, question), 5.0)
        assert now() - began == 2
        assert (at_once(question.data()), question.silent) == ({"b": {"rows": [1]}}, ())


async def test_a_node_that_does_not_answer_is_named() -> None:
    """At the deadline, with what has come."""
    async with asking() as (gathering, link):
        memory_server(namespace="shop").announce("c", b"{}", 3600.0)
        with gathering.question() as question:
            memory_server(namespace="shop").deliver({"a": answer(question.request)})
            began = now()
            await gathering.answers(question, post(link, question), 5.0)
        assert now() - began == 5
        assert (at_once(question.data()), question.silent) == ({"b": {}}, ("c",))


async def test_a_node_that_is_not_in_the_roster_may_answer() -> None:
    """It is not waited for, but counts if it comes in time."""
    async with asking() as (gathering, link):
        with gathering.question() as question:
            server = memory_server(namespace="shop")
            server.deliver({"a": [*answer(question.request, "z"), *answer(question.request)]})
            await gathering.answers(question, post(link, question), 5.0)
        assert list(at_once(question.data())) == ["b", "z"]


async def test_late_nodes_are_waited_for_while_the_roster_may_be_incomplete() -> None:
    """For some seconds after the bus is back, a roster that is answered does not end the wait."""
    async with asking() as (gathering, link):
        server = memory_server(namespace="shop")
        server.fail()
        await asyncio.sleep(1)
        up = asyncio.Event()
        link.on_state(up.set)
        server.restore(lose_data=True)
        await up.wait()
        with gathering.question() as question:
            began = now()
            asyncio.get_running_loop().call_later(1, server.deliver, {"a": answer(question.request)})
            await gathering.answers(question, post(link, question), 60.0)
        assert list(at_once(question.data())) == ["b"]
        assert 0 < now() - began <= HOLD_OFF


async def test_answers_to_no_question_are_dropped() -> None:
    """An answer that comes too late, or twice, changes nothing."""
    async with asking() as (gathering, link):
        with gathering.question() as question:
            server = memory_server(namespace="shop")
            server.deliver({"a": answer("unknown") + answer(question.request) * 2})
            await gathering.answers(question, post(link, question), 5.0)
        server.deliver({"a": answer(question.request, late=True)})
        await asyncio.sleep(1)
        assert at_once(question.data()) == {"b": {}}


async def test_parts_are_put_together_in_their_order() -> None:
    """Each of them fits into an entry, whatever characters it has."""
    data = {"rows": ['"\\\x00é\U0001f680' * 9000]}
    parts = list(at_once(parts_of(data, "b", "q")))
    assert len(parts) > 3
    assert max(len(encode(part)) for part in parts) <= MAX_BYTES
    question = Question("q")
    for part in [*parts[1:], parts[0]]:
        assert isinstance(part, AnswerEntry)
        assert question.answered == set()
        question.take(part)
    assert question.answered == {"b"}
    assert at_once(question.data()) == {"b": data}


def test_rows_that_are_too_much_are_counted() -> None:
    """The sender leaves out half of them, until the rest fits."""
    data = {"rows": [{"name": "x" * 100}] * 100_000, "more": 7}
    parts = list(at_once(parts_of(data, "b", "q")))
    assert len(parts) <= module.MAX_PARTS
    texts = [part.data["text"] for part in parts if isinstance(part, AnswerEntry)]
    sent = json.loads("".join(texts))
    assert 0 < len(sent["rows"]) < 100_000
    assert len(sent["rows"]) + sent["more"] == 100_007


def part(number: int, text: object, *, last: bool = True) -> AnswerEntry:
    """A part of an answer that no node of this version sends."""
    return AnswerEntry(node="b", request="q", part=number, last=last, data={"text": text})


@pytest.mark.parametrize(
    "parts",
    [
        [part(0, "[1]")],
        [part(0, "{")],
        [part(0, 7)],
        [part(0, "[" * 30_000)],
    ],
)
async def test_an_answer_that_is_no_object_is_left_out(parts: list[AnswerEntry]) -> None:
    """The node has answered, and shows nothing."""
    question = Question("q")
    for each in parts:
        question.take(each)
    assert (question.answered, at_once(question.data())) == ({"b"}, {})


async def test_numbers_of_parts_are_bounded() -> None:
    """A part that no answer has is dropped."""
    question = Question("q")
    question.take(part(-1, "{}"))
    question.take(part(module.MAX_PARTS, "{}"))
    assert question.answered == set()


async def test_a_question_that_cannot_be_sent_fails_at_its_deadline() -> None:
    """The error names the server."""
    async with asking() as (gathering, link):
        memory_server(namespace="shop").fail()
        await asyncio.sleep(1)
        began = now()
        unsent = pytest.raises(BusUnavailableError, match="memory:// is not available")
        with gathering.question() as question, unsent:
            await gathering.answers(question, post(link, question), 5.0)
        assert now() - began == 5


async def test_a_question_whose_fleet_is_unknown_fails() -> None:
    """It was sent, and the bus failed before it gave the roster."""
    async with asking() as (gathering, link):
        with gathering.question() as question:
            posted = post(link, question)
            posted.add_done_callback(lambda _: memory_server(namespace="shop").fail())
            with pytest.raises(BusUnavailableError, match="memory:// is not available"):
                await gathering.answers(question, posted, 5.0)


async def test_a_stop_ends_the_wait() -> None:
    """The question fails at once."""
    async with asking() as (gathering, link):
        asyncio.get_running_loop().call_later(1, gathering.stop)
        began = now()
        stopped = pytest.raises(BusUnavailableError, match="the fleet has stopped")
        with gathering.question() as question, stopped:
            await gathering.answers(question, post(link, question), 5.0)
        assert now() - began == 1


async def test_the_answer_to_a_cancellation_is_one_entry() -> None:
    """It is complete at once."""
    question = Question("q")
    done = CancelAnswer(node="b", request="q", asked=1, ended=1)
    question.take(done)
    assert (question.answered, question.cancelled, at_once(question.data())) == ({"b"}, {"b": done}, {})
