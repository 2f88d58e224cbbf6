"""Inspection of a fleet in slices: the event loop runs in between, and they end when nobody waits."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_tasks import TaskManager
from otel_tasks._core import slices
from otel_tasks._core.slices import COUNTS_PER_SLICE, NAMES_PER_SLICE, ROWS_PER_SLICE, at_once
from otel_tasks.fleet import BusUnavailableError, Fleet, inspection
from otel_tasks.fleet.entries import AnswerEntry
from otel_tasks.fleet.gathering import Question, parts_of
from otel_tasks.fleet.inspection import Inspector
from tests.helpers import now, rest, settle

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator

    Ask = Callable[[Fleet], Awaitable[Any]]

ASKS: list[Ask] = [
    lambda fleet: fleet.tasks(limit=2000),
    lambda fleet: fleet.tasks("import-1*"),
    lambda fleet: fleet.tree(limit=2000),
]
each_way_to_ask = pytest.mark.parametrize("ask", ASKS, ids=["tasks", "tasks by name", "tree"])


@asynccontextmanager
async def fleet_of(count: int, tasks: int = 0) -> AsyncGenerator[list[Fleet]]:
    """So many nodes, of which the last one has so many tasks."""
    async with AsyncExitStack() as stack:
        fleets: list[Fleet] = []
        for number in range(count):
            manager = TaskManager(f"manager-{number}", grace=0.0)
            fleet = Fleet("memory://", namespace="shop", manager=manager)
            await stack.enter_async_context(fleet)
            await stack.enter_async_context(manager)
            fleets.append(fleet)
        for number in range(tasks):
            fleets[-1].manager.create_task(rest(), name=f"import-{number}", group=f"group {number % 7}")
        await settle()
        yield fleets


def inspecting() -> int:
    """How many tasks of this loop answer an inspection."""
    return sum(task.get_name() == "otel_tasks.fleet.inspect" for task in asyncio.all_tasks())


@pytest.fixture
def slow_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second passes after each slice."""

    async def in_slow_slices(work: Generator[None, None, Any]) -> Any:
        return await slices.in_slices(work, lambda: asyncio.sleep(1.0))

    monkeypatch.setattr(inspection, "in_slices", in_slow_slices)


async def turns_during(asking: Awaitable[Any]) -> int:
    """How often the event loop runs while something is awaited."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await asking
    counting.cancel()
    return turns


@pytest.mark.parametrize("nodes", [1, 2])
async def test_the_event_loop_runs_between_two_slices(nodes: int) -> None:
    """An inspection takes more turns for more tasks, of this process and of another one."""
    turns: dict[int, list[int]] = {}
    for size in (0, 2000):
        async with fleet_of(nodes, size) as fleets:
            turns[size] = [await turns_during(ask(fleets[0])) for ask in ASKS]
    listed, by_name, tree = (many - few for many, few in zip(turns[2000], turns[0], strict=True))
    # Of rows, the snapshots and their data; of a tree, its nodes, their data, and their lines. Another node
    # encodes them too.
    rows_of_all, rows_of_half = [(1 + nodes) * count / COUNTS_PER_SLICE for count in (2000, 1000)]
    assert listed > 2000 / NAMES_PER_SLICE + rows_of_all
    assert by_name > 2000 / NAMES_PER_SLICE + rows_of_half
    assert tree > 0.9 * (2000 / ROWS_PER_SLICE + rows_of_all)


@each_way_to_ask
async def test_cancelled_caller_ends_its_slices(ask: Ask, slow_slices: None) -> None:
    """They end between two of them."""
    async with fleet_of(1, 500) as (fleet,):
        asking = asyncio.ensure_future(ask(fleet))
        await asyncio.sleep(0.5)
        assert inspecting() == 1
        asking.cancel()
        await asyncio.wait([asking])
        await settle()
        assert (asking.cancelled(), inspecting()) == (True, 0)


@each_way_to_ask
async def test_inspection_whose_time_is_up_ends_the_slices_of_all_nodes(ask: Ask, slow_slices: None) -> None:
    """The answering node stops, and is silent; the asking one too, if it takes too long itself."""
    async with fleet_of(2, 500) as (here, there):
        began = now()
        answer = await ask(here)
        await settle()
        assert 2.0 <= now() - began <= 4.0
        assert (answer.silent, inspecting()) == ((there.node,), 0)
        alone = await ask(there)
        assert there.node in alone.silent


@each_way_to_ask
async def test_fleet_that_stops_ends_its_slices(ask: Ask, slow_slices: None) -> None:
    """Those for another node, and the caller here gets an error."""
    async with fleet_of(2, 500) as (here, there):
        asking = asyncio.ensure_future(ask(here))
        await asyncio.sleep(0.5)
        before = inspecting()
        await there.stop()
        assert inspecting() == before - 1
        await here.stop()
        with pytest.raises(BusUnavailableError, match="the fleet has stopped"):
            await asking
        await settle()
        assert inspecting() == 0


async def test_a_node_answers_a_bounded_number_of_questions(
    slow_slices: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not answer what comes beyond that."""
    monkeypatch.setattr(inspection, "MAX_ANSWERING", 3)
    async with fleet_of(2, 500) as (here, _):
        asking = [asyncio.create_task(here.tasks()) for _ in range(5)]
        await asyncio.sleep(0.5)
        assert inspecting() == 3 + 5
        await asyncio.wait(asking)


async def test_a_node_works_on_one_answer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slices of many inspections together would hold the event loop."""
    working: list[Inspector] = []
    most = 0
    shown = Inspector._shown

    def counted(self: Inspector, entry: Any) -> Generator[None, None, Any]:
        nonlocal most
        working.append(self)
        most = max(most, working.count(self))
        answer = yield from shown(self, entry)
        working.remove(self)
        return answer

    monkeypatch.setattr(Inspector, "_shown", counted)
    async with fleet_of(2, 300) as (here, _):
        found = await asyncio.gather(*(here.tasks() for _ in range(20)))
    assert ({len(rows) for rows in found}, {rows.silent for rows in found}) == ({300}, {()})
    assert (most, working) == (1, [])


async def test_inspection_that_fails_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while this node shows itself reaches the caller."""

    def broken(*_: object) -> Generator[None, None, Any]:
        yield
        raise LookupError("broken")

    async with fleet_of(1) as (fleet,):
        monkeypatch.setattr(Inspector, "_shown", broken)
        with pytest.raises(LookupError, match="broken"):
            await fleet.tasks()


# -- the text of an answer --------------------------------------------------------------------------

texts = st.text(max_size=5)
leaves = st.none() | st.booleans() | st.integers(-5, 5) | texts
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
)
answers = st.dictionaries(st.sampled_from(["more", "rows", "tree", "x"]), values, max_size=4) | st.builds(
    lambda rows, rest: {"rows": rows, **rest},
    st.lists(st.dictionaries(texts, leaves, max_size=3) | leaves, max_size=60),
    st.dictionaries(st.sampled_from(["more", "x"]), values, max_size=2),
)


@given(answers)
def test_answer_in_slices_is_the_same_json(answer: dict[str, Any]) -> None:
    """It is encoded as in one step, and read as it was."""
    question = Question("q")
    text = ""
    for part in at_once(parts_of(answer, "b", "q")):
        assert isinstance(part, AnswerEntry)
        text += part.data["text"]
        question.take(part)
    assert text == json.dumps(answer, separators=(",", ":"))
    assert at_once(question.data()) == {"b": answer}
