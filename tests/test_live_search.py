"""Searches of the live view: they sort in batches, and give the loop back after each."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from otel_tasks import TaskManager
from otel_tasks.live import search
from tests.helpers import ignore_cancels, rest, settle
from tests.live_client import client_of, leave


@pytest.mark.parametrize("sort", ["age", "-age", "name", "status"])
async def test_pages_of_any_size_have_one_order(sort: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the batches fall, pages put together are the whole list, with ties by id."""
    async with TaskManager() as manager:
        tasks: list[Any] = []
        for number in range(60):
            work = ignore_cancels(9) if number % 7 == 0 else rest()
            tasks.append(manager.create_task(work, name="dcba"[number % 4], group=f"g{number % 3}"))
            if number % 5 == 0:
                await asyncio.sleep(0.1)
        await settle()
        for task in tasks[::7]:
            task.cancel()
        await settle()
        client = client_of(manager)
        whole = await client.get(f"/v1/tasks?sort={sort}&limit=1000")
        monkeypatch.setattr(search, "NAMES_PER_STEP", 4)
        rows: list[Any] = []
        after: str | None = ""
        while after is not None:
            page = await client.get(f"/v1/tasks?sort={sort}&limit=13&after={after}")
            rows += page["rows"]
            after = page["next"]
        assert [row["id"] for row in rows] == [row["id"] for row in whole["rows"]]
        assert len(rows) == whole["total"] == 60
        created = [row["created"] for row in rows]
        names = [row["name"] for row in rows]
        expected = {
            "age": created == sorted(created),
            "-age": created == sorted(created, reverse=True),
            "name": names == sorted(names),
            "status": rows[0]["status"] == "cancelling",
        }
        assert expected[sort]
        await manager.shutdown(grace=0.0, timeout=100)
        await leave()


async def test_search_by_line_looks_at_the_oldest_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of too many tasks to look at, it takes the oldest, in whichever groups they are, and says so."""
    monkeypatch.setattr(search, "MAX_LOOKS", 3)
    async with TaskManager() as manager:
        tasks = []
        for number in range(6):
            tasks.append(manager.create_task(rest(), group=f"g{5 - number}"))
            await asyncio.sleep(1)
        client = client_of(manager)
        answer = await client.get("/v1/tasks?q=helpers.py")
        assert [row["id"] for row in answer["rows"]] == [task.uid for task in tasks[:3]]
        assert answer["partial"] is True
        await manager.cancel_all_tasks()


async def test_loop_runs_between_the_steps_of_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search over more tasks gives the loop back more often."""
    turns: dict[int, int] = {}
    async with TaskManager() as manager:
        client = client_of(manager)
        for size in (500, 1500):
            for _ in range(1000 if turns else 500):
                manager.create_task(rest())
            searching = asyncio.create_task(client.get("/v1/tasks?q=zzz"))
            count = 0
            while not searching.done():
                count += 1
                await asyncio.sleep(0)
            turns[size] = count
        assert turns[1500] > 2 * turns[500] > 20
        await manager.cancel_all_tasks()
