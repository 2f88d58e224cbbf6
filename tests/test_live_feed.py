"""The feed of the live view: snapshots, and deltas that build on one another."""

from __future__ import annotations

import asyncio
import json
import sys
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks import TaskGroup, TaskManager, current_task
from otel_tasks._core.slices import TASKS_PER_SLICE, at_once
from otel_tasks.asgi import TaskGroupMiddleware
from otel_tasks.live.feed import CANCELLING, ENDED, ENDED_PER_TICK, RING, Feed
from otel_tasks.live.rows import Shown, short_path, text, trace_link
from otel_tasks.testing import FakeConnection
from tests.helpers import fail, give, ignore_cancels, rest, settle

if TYPE_CHECKING:
    from otel_tasks import ManagedTask


def feed_of(manager: TaskManager, **shown: Any) -> Feed:
    """A feed that shows one manager."""
    return Feed(manager, Shown(**shown), ())


def tick(feed: Feed, **options: Any) -> None:
    """Tick in one step."""
    at_once(feed.slices(**options))


def snapshot(feed: Feed) -> dict[str, Any]:
    """The snapshot after one more tick."""
    tick(feed)
    data: dict[str, Any] = json.loads(feed.snapshot())
    return data


def last_delta(feed: Feed) -> dict[str, Any]:
    """The newest delta."""
    (update,) = feed.since(feed.number - 1) or []
    data: dict[str, Any] = json.loads(update.delta)
    return data


def applied(state: dict[str, Any], delta: dict[str, Any]) -> dict[str, Any]:
    """What a client has after a delta, as docs/reference/live.md says."""
    assert delta["base"] == state["id"]
    after = {**state, **{key: delta[key] for key in ("id", "now", "stats", "more")}}
    for name, key in (("groups", "key"), ("classes", "key"), ("cancelling", "id")):
        rows = {row[key]: row for row in state[name]} | {row[key]: row for row in delta["set"][name]}
        after[name] = [row for row in rows.values() if row[key] not in delta["gone"][name]]
    after["warnings"] = delta.get("warnings", state["warnings"])
    after["ended"] = (delta["ended"] + state["ended"])[:ENDED]
    after["samples"] = (state["samples"] + [delta["sample"]])[-60:]
    return after


def as_sets(state: dict[str, Any]) -> dict[str, Any]:
    """A state without the order of its lists, and without what a delta does not carry."""
    names = ("groups", "classes", "cancelling")
    return {
        **{key: state[key] for key in ("id", "stats", "samples", "ended", "warnings", "more")},
        **{name: sorted(state[name], key=json.dumps) for name in names},
    }


async def test_deltas_lead_from_one_snapshot_to_the_next() -> None:
    """A client that applies every delta has what the snapshot says, whatever happens in between."""
    async with TaskManager(on_error=lambda info, error: None, max_concurrency=5) as manager:
        feed = feed_of(manager)
        state = snapshot(feed)
        tasks: list[Any] = []
        for step in range(12):
            tasks += [manager.create_task(rest(), group=f"g{step % 3}", name="a", on_conflict="suffix")]
            if step % 2:
                tasks.pop(0).cancel()
            if step % 3 == 0:
                manager.create_task(fail(ValueError("x")))
                tasks.append(manager.create_task(ignore_cancels(3)))
                await settle()
                tasks[-1].cancel("step")
            await asyncio.sleep(1)
            tick(feed)
            state = applied(state, last_delta(feed))
            assert as_sets(state) == as_sets(json.loads(feed.snapshot()))
        await manager.shutdown(grace=0.0)


async def test_applying_a_delta_twice_is_harmless() -> None:
    """Values are absolute: rows that are set again stay the same."""
    async with TaskManager() as manager:
        feed = feed_of(manager)
        state = snapshot(feed)
        manager.create_task(rest())
        tick(feed)
        delta = last_delta(feed)
        once = applied(state, delta)
        again = applied({**once, "id": delta["base"]}, delta)
        assert [again[name] for name in ("groups", "classes")] == [
            once[name] for name in ("groups", "classes")
        ]
        await manager.cancel_all_tasks()


@pytest.mark.parametrize("seed", range(6))
async def test_what_happens_between_two_slices_is_in_the_next_tick(seed: int) -> None:
    """Each update is one moment: the tasks that it shows as live and as ended are all that were created."""
    random = Random(seed)

    async def work() -> None:
        if random.random() < 0.2:
            raise ValueError
        await rest()

    async with TaskManager(on_error=lambda info, error: None) as manager:
        feed = feed_of(manager)
        state = snapshot(feed)
        tasks: list[ManagedTask[Any]] = []
        ended: set[str] = set()

        async def change() -> None:
            for _ in range(random.randrange(4)):
                name = random.choice("abcdefgh")
                tasks.append(manager.create_task(work(), name=name, group=f"g{random.choice('xyz')}"))
                assert tasks[-1].uid
            for _ in range(random.randrange(4)):
                if tasks:
                    tasks.pop(random.randrange(len(tasks))).cancel()
            await settle()

        for _ in range(8):
            for _ in feed.slices():
                await change()
            delta = last_delta(feed)
            state = applied(state, delta)
            assert as_sets(state) == as_sets(json.loads(feed.snapshot()))
            stats = state["stats"]
            done = stats["completed"] + stats["failed"] + stats["cancelled"]
            assert stats["created"] == stats["live"] + done
            assert sum(row["count"] for row in state["classes"]) == stats["live"]
            # None is lost, and none comes back.
            ids = {row["id"] for row in delta["ended"]}
            assert len(ids) == len(delta["ended"]) == done - len(ended)
            assert ended.isdisjoint(ids)
            ended |= ids
            alone = {row["task"]["id"] for row in state["classes"] if row["task"] is not None}
            assert alone.isdisjoint(ended)
        await manager.cancel_all_tasks()


async def test_broken_off_tick_is_as_if_it_had_not_begun() -> None:
    """What had ended until then is in the next tick, and the last update stays what it was."""
    async with TaskManager() as manager:
        feed = feed_of(manager)
        before = snapshot(feed)
        await manager.create_task(give(1), name="once")
        slices = feed.slices()
        next(slices)
        next(slices)
        slices.close()
        assert json.loads(feed.snapshot()) == before
        tick(feed)
        assert last_delta(feed)["base"] == before["id"]
        assert [row["name"] for row in last_delta(feed)["ended"]] == ["once"]


async def test_a_feed_without_a_tick_has_a_snapshot() -> None:
    """It takes the first tick in one step."""
    async with TaskManager() as manager:
        feed = feed_of(manager)
        manager.create_task(rest())
        assert json.loads(feed.snapshot())["stats"]["live"] == 1
        assert feed.number == 1
        await manager.cancel_all_tasks()


async def test_what_only_ages_is_not_sent_again() -> None:
    """Between two ticks in which nothing happens, a delta has no rows."""
    async with TaskManager() as manager:
        feed = feed_of(manager)
        for _ in range(20):
            manager.create_task(rest(), group="mail")
        await settle()
        snapshot(feed)
        await asyncio.sleep(1)
        tick(feed)
        delta = last_delta(feed)
        assert delta["set"] == {"groups": [], "classes": [], "cancelling": []}
        assert delta["gone"] == {"groups": [], "classes": [], "cancelling": []}
        assert "warnings" not in delta
        assert len(json.dumps(delta)) < 1000
        await manager.cancel_all_tasks()


async def test_ring_keeps_256_updates() -> None:
    """Older ones lead nowhere, and neither do those of the future or of another instance."""
    async with TaskManager() as manager:
        feed = feed_of(manager)
        for _ in range(RING + 5):
            tick(feed)
        first = feed.number - RING
        assert len(feed.since(first) or ()) == RING
        assert feed.since(first - 1) is None
        assert feed.since(feed.number) == []
        assert feed.since(feed.number + 1) is None
        assert feed.parsed(feed.id) == feed.number
        assert feed.parsed("00000000:5") == "restart"
        assert feed_of(manager).parsed(feed.id) == "restart"
        assert [feed.parsed(f"{feed.instance}:{number}") for number in ("", "-1", "9" * 20, "٣٣")][:3] == [
            "old"
        ] * 3


async def test_pause_makes_old_ids_useless() -> None:
    """After a pause there are no updates in between, so that the client gets a snapshot."""
    async with TaskManager() as manager:
        feed = feed_of(manager)
        tick(feed)
        number = feed.number
        feed.pause()
        assert feed.since(number) is None
        tick(feed)
        assert feed.since(number) is None
        assert len(json.loads(feed.snapshot())["samples"]) == 1


async def test_a_lone_task_is_shown_itself() -> None:
    """A class of one has its task, with the line where it waits and its cause."""
    async with TaskManager() as manager:
        task = manager.create_task(ignore_cancels(60), name="sync_mail", priority=2)
        for _ in range(2):
            manager.create_task(rest())
        await settle()
        task.cancel("why")
        await settle()
        state = snapshot(feed_of(manager))
        alone, many = state["classes"]
        assert many["task"] is None
        row = alone["task"]
        assert (row["id"], row["status"], row["priority"]) == (task.uid, "cancelling", "HIGH")
        assert row["where"]["function"] == "ignore_cancels"
        assert row["where"]["file"] == "tests/helpers.py"
        assert (row["cause"]["kind"], row["cause"]["message"]) == ("explicit", "why")
        assert state["cancelling"] == [row]
        await manager.shutdown(grace=0.0, timeout=100)


async def test_cancelling_tasks_are_the_longest_ones() -> None:
    """At most 50 are listed, and the others are counted."""
    async with TaskManager() as manager:
        tasks = [manager.create_task(ignore_cancels(9)) for _ in range(CANCELLING + 3)]
        await settle()
        for task in reversed(tasks):
            await asyncio.sleep(0.01)
            task.cancel()
        state = snapshot(feed_of(manager))
        assert len(state["cancelling"]) == CANCELLING
        assert state["cancelling"][0]["id"] == tasks[-1].uid
        assert state["more"]["cancelling"] == 3
        await manager.join()


async def test_ended_tasks_are_listed_once() -> None:
    """The first tick has those from before, later ones what is new; of many, the failed ones are kept."""
    async with TaskManager(on_error=lambda info, error: None) as manager:
        await manager.create_task(give(1), name="before")
        feed = feed_of(manager)
        state = snapshot(feed)
        assert [row["name"] for row in state["ended"]] == ["before"]
        manager.create_task(fail(ValueError("secret")), name="broken")
        for _ in range(ENDED_PER_TICK + 10):
            manager.create_task(give(1))
        await manager.join()
        tick(feed)
        delta = last_delta(feed)
        assert len(delta["ended"]) == ENDED_PER_TICK
        assert delta["ended_more"] == 11
        (broken,) = [row for row in delta["ended"] if row["status"] == "failed"]
        assert (broken["error_type"], "error" in broken) == ("ValueError", False)
        numbers = [row["n"] for row in delta["ended"]]
        assert numbers == sorted(numbers, reverse=True)
        tick(feed)
        assert (last_delta(feed)["ended"], last_delta(feed)["ended_more"]) == ([], 0)
        assert len(json.loads(feed.snapshot())["ended"]) == ENDED_PER_TICK + 1


async def test_ended_ring_is_bounded() -> None:
    """The snapshot has the last 256 ended tasks at most."""
    async with TaskManager() as manager:
        feed = feed_of(manager)
        tick(feed)
        for _ in range(8):
            for _ in range(ENDED_PER_TICK):
                manager.create_task(give(1))
            await manager.join()
            tick(feed)
        assert len(json.loads(feed.snapshot())["ended"]) == ENDED


async def test_counters_and_samples() -> None:
    """The counts of the live tasks add up, and each tick leaves one sample."""
    async with TaskManager(max_concurrency=2) as manager:
        feed = feed_of(manager)
        for _ in range(5):
            manager.create_task(rest())
        await settle()
        state = snapshot(feed)
        stats = state["stats"]
        assert (stats["live"], stats["running"], stats["queued"], stats["cancelling"]) == (5, 2, 3, 0)
        assert stats["limit"] == 2
        assert state["samples"] == [[state["now"], 2, 3, 0, 0, 0, 0]]
        for _ in range(70):
            tick(feed)
        assert len(json.loads(feed.snapshot())["samples"]) == 60
        await manager.cancel_all_tasks()


# -- what is shown, and what never is -----------------------------------------------------------------------


async def test_secrets_are_not_shown() -> None:
    """Arguments, results, metadata, and the texts of errors are in no update, unless the options say so."""

    async def work(password: str) -> str:
        local = password
        await asyncio.sleep(0.5)
        raise ValueError(local)

    async def failing_group() -> None:
        async with TaskGroup() as group:
            group.create_task(work("hunter2"))
            group.create_task(ignore_cancels(2))

    async with TaskManager(on_error=lambda info, error: None) as manager:
        feed, open_feed = feed_of(manager), feed_of(manager, errors=True, metadata={"order"})
        manager.create_task(work("hunter2"), metadata={"card": "hunter2", "order": 7})
        manager.create_task(failing_group())
        await manager.start_task("result", lambda: give("hunter2"))
        for _ in range(4):
            await asyncio.sleep(0.3)
            tick(feed)
            tick(open_feed)
        seen = feed.snapshot() + "".join(update.delta for update in feed.since(0) or ())
        assert "hunter2" not in seen
        assert "hunter2" in open_feed.snapshot()
        await manager.join()


async def test_names_are_cut() -> None:
    """A name of 200 characters has 120 and an ellipsis, and hostile ones are data."""
    async with TaskManager() as manager:
        manager.create_task(rest(), name="x" * 200)
        manager.create_task(rest(), name="<img src=x onerror=alert(1)>")
        names = [row["name"] for row in snapshot(feed_of(manager))["classes"]]
        assert names == ["x" * 120 + "…", "<img src=x onerror=alert(1)>"]
        assert text("short") == "short"
        await manager.cancel_all_tasks()


async def test_json_is_ascii_on_one_line() -> None:
    """Whatever a message contains, an event stays one line, and a lone surrogate ends no stream."""

    async def report() -> None:
        task = current_task()
        assert task is not None
        task.progress.update(done=1, message="a\nb\r\u2028\ud800\x1b[31m‮")
        await rest()

    async with TaskManager() as manager:
        manager.create_task(report())
        await settle()
        feed = feed_of(manager)
        tick(feed)
        whole = feed.snapshot()
        assert whole.isascii()
        assert whole.isprintable()
        assert json.loads(whole)["classes"][0]["task"]["progress"]["message"].startswith("a\nb")
        await manager.cancel_all_tasks()


@pytest.mark.parametrize(
    ("path", "short"),
    [
        (asyncio.__file__, "asyncio/__init__.py"),
        (__file__, "tests/test_live_feed.py"),
        ("/opt/x/lib/python3.12/site-packages/httpx/_client.py", "httpx/_client.py"),
        ("/srv/secret-customer/shop/pool.py", "shop/pool.py"),
        ("<string>", "<string>"),
    ],
)
def test_paths_do_not_show_the_machine(path: str, short: str) -> None:
    """A line has the path below the working directory, or below the library, or its last folder."""
    assert short_path(path) == short


def test_path_without_a_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a directory that is gone, a line has its file alone."""

    def gone() -> str:
        raise FileNotFoundError

    monkeypatch.setattr("os.getcwd", gone)
    assert short_path("/srv/shop/pool.py") == "pool.py"


async def test_trace_links_mark_what_was_cancelled() -> None:
    """The link has the trace id, and for a cancelled task the kind of its cause."""
    shown = Shown(trace_url="http://j/trace/{trace_id}?x=1")
    async with TaskManager() as manager:
        task = manager.create_task(rest())
        await settle()
        assert trace_link("ab", None, shown) == "http://j/trace/ab?x=1"
        task.cancel()
        assert trace_link("ab", task.cause, shown) == "http://j/trace/ab?x=1&uiFind=explicit"
        assert trace_link(None, None, shown) is trace_link("ab", None, Shown()) is None


# -- warnings -----------------------------------------------------------------------------------------------


def warnings(feed: Feed, **options: Any) -> dict[str, dict[str, Any]]:
    """The warnings after one more tick, by kind."""
    tick(feed, **options)
    return {row["kind"]: row for row in json.loads(feed.snapshot())["warnings"]}


async def test_long_cancellations_are_a_warning() -> None:
    """After 30 s, and no earlier, they are counted, with the oldest request and the query for their list."""
    async with TaskManager() as manager:
        feed = feed_of(manager)
        tasks = [manager.create_task(ignore_cancels(100)) for _ in range(2)]
        await settle()
        for task in tasks:
            task.cancel()
        await asyncio.sleep(29)
        assert warnings(feed) == {}
        await asyncio.sleep(2)
        found = warnings(feed)["cancelling"]
        assert (found["count"], found["min_age"]) == (2, 30.0)
        assert tasks[0].cause is not None
        assert found["since"] == tasks[0].cause.at
        assert found["query"] == "status=cancelling&min_age=30"
        await manager.join()
        assert warnings(feed).keys() == {"ignored"}


async def test_many_tasks_at_one_line_are_a_warning() -> None:
    """Ten tasks that have waited there for 5 s are, and nine are not."""

    async def acquire(lock: asyncio.Lock) -> None:
        await lock.acquire()

    async with TaskManager() as manager:
        feed = feed_of(manager)
        lock = asyncio.Lock()
        await lock.acquire()
        for _ in range(9):
            manager.create_task(acquire(lock))
        await asyncio.sleep(6)
        tick(feed)
        assert warnings(feed) == {}
        manager.create_task(acquire(lock))
        await asyncio.sleep(6)
        tick(feed)
        found = warnings(feed)["waiting"]
        assert (found["count"], found["where"]["function"], found["estimated"]) == (
            10,
            "test_many_tasks_at_one_line_are_a_warning.<locals>.acquire",
            False,
        )
        assert found["key"] == f"waiting {found['where']['file']}:{found['where']['line']}"
        await manager.cancel_all_tasks()
        assert warnings(feed) == {}


@pytest.mark.skipif(sys.version_info < (3, 12), reason="a task does not show its context before")
async def test_search_for_plain_tasks_is_cut() -> None:
    """Ten thousand tasks are looked at in slices; those of another loop are not looked at."""
    async with TaskManager() as manager:
        for _ in range(2000):
            manager.create_task(rest())
        other = await asyncio.to_thread(asyncio.new_event_loop)
        foreign = other.create_task(rest())
        slices = manager.outliving_slices()
        steps = 0
        with pytest.raises(StopIteration) as end:
            while True:
                next(slices)
                steps += 1
        assert (end.value.value, steps >= 2000 / TASKS_PER_SLICE) == ([], True)
        foreign.cancel()
        await asyncio.to_thread(other.run_until_complete, asyncio.wait({foreign}, timeout=1))
        other.close()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="a task does not show its context before")
async def test_plain_tasks_that_outlive_their_requests_are_a_warning() -> None:
    """They are noticed within 5 ticks, and are a warning 10 s later."""
    plain: list[asyncio.Task[None]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        plain.append(asyncio.create_task(rest()))
        plain.append(asyncio.create_task(rest()))
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    async with TaskManager() as manager:
        feed = feed_of(manager)
        await FakeConnection().run(TaskGroupMiddleware(app, manager=manager))
        assert manager.outliving_tasks() == sorted(plain, key=manager.outliving_tasks().index)
        found: list[int] = []
        for _ in range(18):
            found.append(warnings(feed).get("outlived", {}).get("count", 0))
            await asyncio.sleep(1)
        assert (found[0], found[-1]) == (0, 2)
        for task in plain:
            task.cancel()
        await asyncio.wait(plain)
        assert warnings(feed) == {}


async def test_held_loop_is_a_warning_for_a_minute() -> None:
    """It is counted, with the longest time; what is short is not."""
    async with TaskManager() as manager:
        feed = feed_of(manager)
        assert warnings(feed, held=0.2) == {}
        assert warnings(feed, held=1.4)["blocked"]["seconds"] == 1.4
        await asyncio.sleep(30)
        assert warnings(feed, held=0.5)["blocked"]["count"] == 2
        await asyncio.sleep(61)
        assert warnings(feed) == {}


async def test_tasks_that_never_start_are_a_warning() -> None:
    """A task that waits for the one that it replaces has not started; a queued one is no trouble."""
    async with TaskManager(max_concurrency=2) as manager:
        feed = feed_of(manager)
        manager.create_task(ignore_cancels(30), name="a")
        await settle()
        manager.create_task(rest(), name="a", on_conflict="replace")
        for _ in range(3):
            manager.create_task(rest())
        await asyncio.sleep(11)
        tick(feed)
        found = warnings(feed)
        assert found.keys() == {"unstarted"}
        assert (found["unstarted"]["count"], found["unstarted"]["query"]) == (1, "status=pending&min_age=10")
        await manager.shutdown(grace=0.0, timeout=100)
