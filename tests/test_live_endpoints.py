"""The endpoints of the live view: what they answer, whom they refuse, and how they cancel."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import re
import sys
import weakref
from typing import Annotated, Any
from urllib.parse import quote

import pytest
from fastapi import Depends, FastAPI, Header, HTTPException
from fastapi.middleware.cors import CORSMiddleware
from starlette.responses import Response

from otel_tasks import TaskGroup, TaskManager, global_task_manager
from otel_tasks.asgi import TaskGroupMiddleware
from otel_tasks.live import live_view
from otel_tasks.live.endpoints import user_name
from otel_tasks.live.guard import HEADERS
from tests.blocks import ROOT
from tests.helpers import fail, give, ignore_cancels, rest, settle
from tests.live_client import TOKEN, Client, client_of, leave

PATHS = ("", "/", "/page.js", "/page.css", "/v1/snapshot", "/v1/events?poll=1", "/v1/tasks", "/v1/tasks/x")


async def admin(token: Annotated[str | None, Header(alias="x-token")] = None) -> dict[str, str]:
    """An authentication."""
    if token != "admin":
        raise HTTPException(401, "who are you?", {"WWW-Authenticate": "Bearer"})
    return {"username": "ada"}


ADMIN = {"x-token": "admin"}


# -- rule 1: one dependency for everything ------------------------------------------------------------------


def test_view_without_authentication_is_refused() -> None:
    """It has to be asked for by name."""
    with pytest.raises(ValueError, match=r"auth=Depends\(\.\.\.\)"):
        live_view()
    live_view(insecure=True)


def test_wrong_options_are_refused() -> None:
    """Each message shows the value, or the fix."""
    with pytest.raises(TypeError, match=r"auth=Depends"):
        live_view(auth=admin)
    with pytest.raises(ValueError, match="'kill'"):
        live_view(insecure=True, actions={"kill"})
    with pytest.raises(TypeError, match=r"auth=Depends"):
        live_view(auth=Depends())
    for option in ("hosts", "actions", "metadata"):
        a_string: Any = {option: "cancel"}
        with pytest.raises(TypeError, match=rf"{option} must be a collection of strings.*\{{'cancel'\}}"):
            live_view(insecure=True, **a_string)
        for value in (None, 1, [1], b"cancel"):
            no_strings: Any = {option: value}
            with pytest.raises(TypeError, match=f"{option} must be a collection of strings, got"):
                live_view(insecure=True, **no_strings)
    for option in ("insecure", "errors"):
        a_word: Any = {option: "no"}
        with pytest.raises(TypeError, match=f"{option} must be True or False, got 'no'"):
            live_view(**{"auth": Depends(admin), **a_word})
    a_flag: Any = True
    with pytest.raises(TypeError, match="can must be a function, got True"):
        live_view(insecure=True, actions={"cancel"}, can=a_flag)
    with pytest.raises(TypeError, match="trace_url must be a string such as"):
        live_view(insecure=True, trace_url=a_flag)
    with pytest.raises(ValueError, match=r"trace_url must have \{trace_id\} in it"):
        live_view(insecure=True, trace_url="https://jaeger.example.com")
    with pytest.raises(ValueError, match="hosts must be names"):
        live_view(insecure=True, hosts={"https://tasks.internal"})
    not_a_manager: Any = "default"
    with pytest.raises(TypeError, match="TaskManager"):
        live_view(insecure=True, manager=not_a_manager)


async def test_everything_is_behind_the_dependency() -> None:
    """Page, script, style, JSON, stream, and actions are refused alike, and answered alike."""
    async with TaskManager() as manager:
        client = client_of(manager, auth=Depends(admin), actions={"cancel"})
        for path in PATHS:
            refused = await client.send(path)
            assert (refused.status, refused.headers["www-authenticate"]) == (401, "Bearer"), path
            assert json.loads(refused.body)["error"] == {"code": "unauthorized", "message": "who are you?"}
            assert (await client.send(path, headers=ADMIN)).status in (200, 307, 404)
        refused = await client.send("/v1/tasks/x/cancel", "POST", headers=TOKEN, body=b"{}")
        assert refused.status == 401
        await leave()


@pytest.mark.parametrize(("answer", "status"), [(False, 403), (Response(status_code=302), 302), (None, 200)])
async def test_authentication_may_return_its_refusal(answer: object, status: int) -> None:
    """False is a no, and a response is the answer: nobody gets in because a dependency did not raise."""
    async with TaskManager() as manager:
        client = client_of(manager, auth=Depends(lambda: answer), actions={"cancel"})
        for path in ("/", "/page.js", "/v1/snapshot", "/v1/tasks"):
            refused = await client.send(path)
            assert refused.status == status
            assert refused.headers["cache-control"] == "no-store"
        cancel = await client.send("/v1/tasks/x/cancel", "POST", headers=TOKEN, body=b"{}")
        assert cancel.status == (404 if status == 200 else status)
        await leave()


async def test_insecure_view_refuses_other_machines_everywhere() -> None:
    """Each path looks at the client's address and at the Host."""
    async with TaskManager() as manager:
        client = client_of(manager, hosts={"Tasks.Internal"})
        for path in PATHS:
            for headers, code in (
                ({"host": "evil.example"}, "forbidden_host"),
                ({"x-forwarded-for": "127.0.0.1"}, "forbidden_client"),
            ):
                refused = await client.send(path, headers=headers)
                assert (refused.status, json.loads(refused.body)["error"]["code"]) == (403, code)
            remote = client.connection(path)
            remote.scope["client"] = ("10.0.0.7", 5)
            await remote.run(client.app)
            assert remote.status == 403
        assert (await client.send("/", headers={"host": "tasks.internal"})).status == 200


# -- rules 3 and 4: other sites, and headers ----------------------------------------------------------------


async def test_every_answer_has_the_policy() -> None:
    """Answers and refusals have the headers of the policy, and none of CORS."""
    async with TaskManager() as manager:
        client = client_of(manager)
        connections = [await client.send(path) for path in PATHS]
        connections.append(await client.send("/v1/tasks?limit=0"))
        connections.append(await client.send("/v1/tasks/x/cancel", "POST"))
        async with client.stream() as stream:
            connections.append(stream)
        for connection in connections:
            for name, value in HEADERS.items():
                assert connection.headers[name.lower()] == value
            assert not [name for name in connection.headers if name.startswith("access-control")]
        policy = HEADERS["Content-Security-Policy"]
        assert "unsafe" not in policy
        assert policy.startswith("default-src 'none'; script-src 'self';")
        await leave()


async def test_application_that_allows_every_site_does_not_open_the_view() -> None:
    """Under a permissive CORS middleware, another site's requests are still refused."""
    async with TaskManager() as manager:
        app = FastAPI()
        app.include_router(live_view(manager=manager, insecure=True), prefix="/tasks")
        app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])
        client = Client(app)
        for path in PATHS[2:]:
            headers = {
                "sec-fetch-site": "cross-site",
                "sec-fetch-mode": "cors",
                "origin": "http://evil.example",
            }
            refused = await client.send(path, headers=headers)
            assert (refused.status, json.loads(refused.body)["error"]["code"]) == (403, "cross_site")
        opened = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
        assert (await client.send("/", headers=opened)).status == 200


async def test_page_loads_only_from_its_own_origin() -> None:
    """The page has no inline code and no style, and names its files relatively."""
    async with TaskManager() as manager:
        client = client_of(manager)
        page = await client.send("/")
        assert page.headers["content-type"].startswith("text/html")
        html = page.body.decode()
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=|https?://", html)
        for source in re.findall(r"""(?:src|href)=["']?([^"'> ]+)""", html):
            assert not source.startswith("/")
        assert (await client.send("/page.js")).headers["content-type"].startswith("text/javascript")
        assert (await client.send("/page.css")).headers["content-type"].startswith("text/css")


@pytest.mark.parametrize(
    ("path", "root_path", "location"),
    [
        ("/tasks", "", "./tasks/"),
        ("/tasks?a=1", "", "./tasks/?a=1"),
        ("/api/tasks", "/api", "./tasks/"),
    ],
)
async def test_missing_slash_is_added_relatively(path: str, root_path: str, location: str) -> None:
    """Whatever prefix a proxy has taken away, the browser keeps it."""
    async with TaskManager() as manager:
        client = client_of(manager)
        client.prefix = ""
        connection = client.connection(path)
        connection.scope["root_path"] = root_path
        await connection.run(client.app)
        assert (connection.status, connection.headers["location"]) == (307, location)


@pytest.mark.parametrize(
    "name", ["https:evil.example", "a\r\nSet-Cookie: b=1", "\u20ac?x", "javascript:alert(1)"]
)
async def test_missing_slash_leads_to_no_other_site(name: str) -> None:
    """A prefix may have a parameter, and its value is a client's: the answer stays below this place."""
    async with TaskManager() as manager:
        app = FastAPI()
        app.include_router(live_view(manager=manager, insecure=True), prefix="/{tenant}")
        connection = await Client(app, "").send(f"/{quote(name)}")
        assert (connection.status, connection.headers["location"]) == (307, f"./{quote(name)}/")


async def test_view_in_a_mounted_application() -> None:
    """A view below another application's prefix works, because it names no path of its own."""
    async with TaskManager() as manager:
        outer = FastAPI()
        outer.mount("/v2", client_of(manager).app)
        link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
        client = Client(outer, "/v2/tasks")
        assert (await client.get("/v1/snapshot"))["manager"] == "default"
        assert (await client.send("", headers=link)).headers["location"] == "./tasks/"
        await leave()


async def test_prefix_may_be_anything() -> None:
    """A link opens the page below `/v1/`, and still not the JSON."""
    async with TaskManager() as manager:
        app = FastAPI()
        app.include_router(live_view(manager=manager, insecure=True), prefix="/api/v1/tasks.js")
        client = Client(app, "/api/v1/tasks.js")
        link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
        assert (await client.send("/", headers=link)).status == 200
        assert (await client.send("/v1/tasks", headers=link)).status == 403


def test_view_is_not_in_the_schema() -> None:
    """It is no part of the application's interface."""
    app = FastAPI()
    app.include_router(live_view(insecure=True), prefix="/tasks")
    assert app.openapi()["paths"] == {}


async def test_global_manager_is_the_default() -> None:
    """Without a manager, the view shows the global one."""
    app = FastAPI()
    app.include_router(live_view(insecure=True), prefix="/tasks")
    async with global_task_manager:
        assert (await Client(app).get("/v1/snapshot"))["manager"] == global_task_manager.name
        await leave()


# -- what a client may send ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query",
    [
        "/v1/tasks?limit=0",
        "/v1/tasks?limit=1001",
        "/v1/tasks?limit=x",
        "/v1/tasks?limit=nan",
        "/v1/tasks?sort=size",
        "/v1/tasks?status=done",
        "/v1/tasks?state=all",
        "/v1/tasks?after=-1",
        "/v1/tasks?key=../etc",
        "/v1/tasks?nonsense=1",
        f"/v1/tasks?q={'x' * 201}",
        "/v1/tasks?state=ended&status=running",
        "/v1/events?viewer=a%20b",
        f"/v1/events?viewer={'x' * 65}",
        "/v1/events?expand=c1",
        "/v1/events?expand=c0123456789:0",
        "/v1/events?expand=c0123456789:1001",
        "/v1/events?expand=oldest:x",
        "/v1/events?" + "&".join(f"expand=c{number:010}:1" for number in range(21)),
        "/v1/events?" + "&".join(f"expand=c{number:010}:1000" for number in range(3)),
        "/v1/events?" + "&".join(f"task=t{number}" for number in range(11)),
        "/v1/events?task=" + "x" * 201,
        f"/v1/events?after={'x' * 3000}&viewer={'y' * 3000}",
        "/v1/snapshot?x=1",
        "/v1/tasks/x?x=1",
    ],
)
async def test_parameters_out_of_their_bounds_are_refused(query: str) -> None:
    """The answer says what is wrong; nothing is cut in silence."""
    async with TaskManager() as manager:
        client = client_of(manager)
        answer = await client.get(query, 400)
        assert answer["error"]["code"] == "bad_request"
        assert len(answer["error"]["message"]) < 200
        await leave()


# -- lists --------------------------------------------------------------------------------------------------


async def test_lists_are_searched_sorted_and_paged() -> None:
    """Words match names, ids, groups, and lines; pages follow one another; ties are in the order of ids."""

    async def acquire() -> None:
        await asyncio.sleep(3600)

    async with TaskManager(max_concurrency=6) as manager:
        client = client_of(manager)
        for name in ("beta", "alpha", "gamma"):
            manager.create_task(rest(), name=name, group="greek")
        locked = manager.create_task(acquire(), group="pool")
        stuck = manager.create_task(ignore_cancels(50), name="stuck")
        manager.create_task(rest(), name="queued-1")
        manager.create_task(rest(), name="queued-2")
        await settle()
        stuck.cancel()
        await settle()

        async def names(query: str) -> list[str]:
            return [row["name"] for row in (await client.get(f"/v1/tasks?{query}"))["rows"]]

        everything = await client.get("/v1/tasks")
        assert (everything["total"], everything["next"], everything["partial"]) == (7, None, False)
        assert await names("q=GREEK+lpha") == ["alpha"]
        assert await names("q=test_live_endpoints.py") == ["acquire"]
        assert await names("sort=name&limit=2") == ["acquire", "alpha"]
        assert await names("sort=name&limit=2&after=2") == ["beta", "gamma"]
        assert (await client.get("/v1/tasks?sort=name&limit=2"))["next"] == "2"
        assert (await names("sort=status"))[:2] == ["stuck", "queued-2"]
        assert await names("status=cancelling") == ["stuck"]
        assert await names("status=queued") == ["queued-2"]
        assert await names("status=pending") == []
        assert await names("status=running&q=greek") == ["alpha", "beta", "gamma"]
        assert await names("min_age=1") == []
        await asyncio.sleep(2)
        assert len(await names("min_age=1")) == 7
        assert await names("status=cancelling&min_age=30") == []
        assert (await names("sort=-age"))[-1] == (await names("sort=age"))[0]
        where = manager.describe([locked])[0].where
        assert where is not None
        assert await names(f"where=tests/test_live_endpoints.py:{where.line}") == ["acquire"]
        assert await names("group_id=greek") == ["alpha", "beta", "gamma"]
        key = manager.overview().keys_of(locked)[1]
        assert await names(f"key={key}") == ["acquire"]
        await manager.shutdown(grace=0.0, timeout=100)
        await leave()


async def test_group_with_a_long_id_is_found_by_what_rows_show_of_it() -> None:
    """Rows cut long ids, and their lists are asked for with what is left."""
    async with TaskManager() as manager:
        client = client_of(manager)
        name = "imports of " + "very " * 30
        task = manager.create_task(rest(), group=name.strip())
        other = manager.create_task(rest(), group="imports")
        await settle()
        shown = (await client.get(f"/v1/tasks/{task.uid}"))["task"]["group_id"]
        assert len(shown) == 121
        queries = [f"&group_id={quote(group_id)}" for group_id in (shown, task.group.id)]
        assert [(await client.get(f"/v1/tasks?state=live{query}"))["total"] for query in queries] == [1, 1]
        task.cancel()
        await settle()
        assert [(await client.get(f"/v1/tasks?state=ended{query}"))["total"] for query in queries] == [1, 1]
        assert not other.done()
        await manager.cancel_all_tasks()
        await leave()


async def test_search_by_line_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound, an answer says that it is partial."""
    monkeypatch.setattr("otel_tasks.live.search.MAX_LOOKS", 5)
    async with TaskManager() as manager:
        for _ in range(8):
            manager.create_task(rest())
        await settle()
        client = client_of(manager)
        assert (await client.get("/v1/tasks?q=helpers.py"))["partial"] is True
        assert (await client.get("/v1/tasks?q=rest"))["partial"] is False
        await manager.cancel_all_tasks()


async def test_ended_tasks_are_listed() -> None:
    """With `state=ended`, the list has what the manager remembers, newest first."""
    async with TaskManager(on_error=lambda info, error: None) as manager:
        client = client_of(manager)
        for name in ("first", "second"):
            await manager.create_task(give(1), name=name, group="mail")
        await asyncio.wait([manager.create_task(fail(KeyError("secret")), name="third")])
        answer = await client.get("/v1/tasks?state=ended")
        assert [(row["name"], row["status"]) for row in answer["rows"]] == [
            ("third", "failed"),
            ("second", "completed"),
            ("first", "completed"),
        ]
        assert answer["rows"][0]["error_type"] == "KeyError"
        assert "secret" not in json.dumps(answer)
        answer = await client.get("/v1/tasks?state=ended&q=mail&limit=1")
        assert ([row["name"] for row in answer["rows"]], answer["total"], answer["next"]) == (
            ["second"],
            2,
            "1",
        )
        assert (await client.get("/v1/tasks?state=ended&group_id=mail"))["total"] == 2


# -- one task -----------------------------------------------------------------------------------------------


async def test_details_of_a_live_task() -> None:
    """Path, chain of awaits, waiters, causes, siblings, metadata, and the actions that this client has."""

    async def wait_for(task: Any) -> None:
        await task

    async def block() -> None:
        async with TaskGroup("load") as group:
            group.create_task(give(1), name="done")
            slow = group.create_task(ignore_cancels(50), name="slow", metadata={"order": 7, "card": "4111"})
            group.create_task(wait_for(slow), name="waiter")
            await rest()

    async with TaskManager() as manager:
        client = client_of(manager, metadata={"order"}, actions={"cancel"}, can=lambda *_: False)
        host = manager.create_task(block())
        await settle()
        host.cancel("enough")
        await settle()
        (slow,) = [task for task in manager.overview().cancelling if task.name == "slow"]
        detail = await client.get(f"/v1/tasks/{slow.uid}")
        assert (detail["state"], detail["task"]["id"], detail["can"]) == ("live", slow.uid, [])
        assert detail["path"] == ["default", "load#1", "slow"]
        assert [frame["function"] for frame in detail["frames"]] == ["sleep", "ignore_cancels"]
        assert [frame["own"] for frame in detail["frames"]] == [False, True]
        assert [step["step"] for step in detail["cause_chain"]] == ["cause", "group", "task"]
        assert detail["cause_chain"][0]["message"] == "enough"
        assert detail["metadata"] == {"order": "7"}
        assert detail["siblings"]["ended"]["completed"] == 1
        assert (await client.get(f"/v1/tasks/{quote(slow.id, safe='')}"))["task"]["id"] == slow.uid
        assert (await client.get(f"/v1/tasks/{host.uid}"))["children"] >= 1
        await manager.shutdown(grace=0.0, timeout=100)


async def test_tasks_on_the_other_end_of_an_await_say_what_they_run() -> None:
    """A plain asyncio task has no id, but a coroutine and a line; a managed one can be opened, too."""

    async def ask(task: Any) -> None:
        await task

    async def middle() -> None:
        await plain

    async with TaskManager() as manager:
        client = client_of(manager)
        plain = asyncio.create_task(rest(), name="Task-18")
        task = manager.create_task(middle())
        asking = asyncio.create_task(ask(task), name="Task-19")
        await settle()
        detail = await client.get(f"/v1/tasks/{task.uid}")
        assert detail["task"]["awaits"] == "Task-18 (rest)"
        (waiter,), awaited = detail["waiters"], detail["awaited"]
        assert [awaited[key] for key in ("id", "task_id", "name", "function")] == [
            None,
            None,
            "Task-18",
            "rest",
        ]
        assert awaited["where"]["file"] == "tests/helpers.py"
        assert (waiter["name"], waiter["function"].rpartition(".")[2]) == ("Task-19", "ask")
        assert (waiter["where"]["file"], waiter["id"]) == ("tests/test_live_endpoints.py", None)
        outer = manager.create_task(ask(task), name="outer")
        await settle()
        detail = await client.get(f"/v1/tasks/{outer.uid}")
        assert [detail["awaited"][key] for key in ("id", "task_id", "name")] == [task.uid, task.id, "middle"]
        assert (await client.get(f"/v1/tasks/{task.uid}"))["waiters"][1]["id"] == outer.uid
        await manager.cancel_all_tasks()
        await asyncio.wait([asking, plain])


async def test_a_name_finds_the_only_task_that_has_it() -> None:
    """A person writes what the tree shows; of several tasks with one name, the answer names an id."""
    async with (
        TaskManager() as manager,
        TaskGroup("imports", manager=manager) as group,
        TaskGroup("exports", manager=manager) as other,
    ):
        client = client_of(manager)
        task = group.create_task(rest(), name="sync_mail")
        await settle()
        assert (await client.get("/v1/tasks/sync_mail"))["task"]["id"] == task.uid
        await asyncio.sleep(1)
        other.create_task(rest(), name="sync_mail")
        refused = await client.get("/v1/tasks/sync_mail", 404)
        assert refused["error"]["message"] == (
            f"2 live tasks have the name 'sync_mail': use the id of one, such as {task.uid!r}, the oldest"
        )
        group.cancel()
        other.cancel()
        await leave()


async def test_an_unknown_task_names_the_process_that_does_not_know_it() -> None:
    """With several workers, the page can tell a task that has ended from one of another process."""
    async with TaskManager() as manager:
        client = client_of(manager, actions={"cancel"})
        instance = (await client.get("/v1/snapshot"))["instance"]
        for method in ("GET", "POST"):
            path = "/v1/tasks/x" if method == "GET" else "/v1/tasks/x/cancel"
            refused = await client.send(path, method, headers=TOKEN, body=b"{}")
            assert (refused.status, refused.headers["otel-tasks-instance"]) == (404, instance)
        await leave()


async def test_sums_beyond_all_floats_are_json() -> None:
    """Two huge reports add up to infinity, which a browser cannot read."""
    async with TaskManager() as manager:
        client = client_of(manager)
        for name in "ab":
            task = manager.create_task(rest(), name=name)
            task.progress.update(done=1.5e308, total=1.5e308)
        await settle()
        body = (await client.send("/v1/snapshot")).body
        group = json.loads(body)["groups"][0]
        assert group["progress"] == {"done": sys.float_info.max, "total": sys.float_info.max, "reporting": 2}
        await leave()


async def test_client_that_leaves_within_its_body_raises_nothing() -> None:
    """The service's log has no traceback for a request that broke off."""
    async with TaskManager() as manager:
        client = client_of(manager, actions={"cancel"})
        task = manager.create_task(rest(), name="t")
        connection = client.connection(f"/v1/tasks/{task.uid}/cancel", "POST", headers=TOKEN)
        begun: dict[str, Any] = {"type": "http.request", "body": b"{", "more_body": True}
        messages = iter([begun, {"type": "http.disconnect"}])

        async def receive() -> dict[str, Any]:
            return next(messages)

        await client.app(connection.scope, receive, connection.send)
        assert connection.status == 400
        assert not task.cancelling()
        await leave()


async def test_details_of_an_ended_task() -> None:
    """A task that is remembered has its cause chain with the time of its end."""
    async with TaskManager() as manager:
        client = client_of(manager)
        task = manager.create_task(rest(), group="mail")
        await settle()
        uid = task.uid
        await manager.cancel_task(uid, "stuck")
        detail = await client.get(f"/v1/tasks/{uid}")
        assert (detail["state"], detail["task"]["status"], detail["can"]) == ("ended", "cancelled", [])
        assert detail["cause_chain"][-1]["ended"] is not None
        assert (await client.get("/v1/tasks/unknown", 404))["error"]["code"] == "not_found"


# -- rules 2 and 7: cancelling ------------------------------------------------------------------------------


async def test_view_is_read_only() -> None:
    """Without the action, nobody can cancel, whatever `can` would say."""
    async with TaskManager() as manager:
        client = client_of(manager, can=lambda *_: True)
        task = manager.create_task(rest())
        await settle()
        assert (await client.cancel(task.uid, status=403))["error"]["code"] == "read_only"
        assert (await client.get("/v1/snapshot"))["actions"] == []
        assert (await client.get(f"/v1/tasks/{task.uid}"))["can"] == []
        assert task.cause is None
        await manager.cancel_all_tasks()
        await leave()


async def test_cancellation_names_its_user(caplog: pytest.LogCaptureFixture) -> None:
    """The cause has the user and the reason, and so has the log."""
    async with TaskManager() as manager:
        client = client_of(manager, auth=Depends(admin), actions={"cancel"})
        task = manager.create_task(rest())
        await settle()
        with caplog.at_level(logging.WARNING):
            answer = await client.cancel(task.uid, {"reason": "stuck since noon"}, headers=ADMIN)
        assert (answer["result"], answer["state"], answer["task"]["status"]) == (
            "cancelled",
            "ended",
            "cancelled",
        )
        assert task.cause is not None
        assert (task.cause.asked_by, task.cause.message) == ("ada", "stuck since noon")
        assert [record.getMessage() for record in caplog.records] == [
            "ada cancels task 'rest' in the live view: stuck since noon"
        ]
        assert (await client.cancel(task.uid, headers=ADMIN))["result"] == "ended"


async def test_reason_forges_no_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Line breaks, escape sequences, and lone surrogates of a client reach neither the log nor the trace."""
    async with TaskManager() as manager:
        client = client_of(manager, auth=Depends(lambda: "ada\nroot"), actions={"cancel"})
        task = manager.create_task(rest(), name="t")
        await settle()
        with caplog.at_level(logging.WARNING, "otel_tasks"):
            answer = await client.cancel(task.uid, {"reason": "stuck\nERROR forged \x1b[2J\ud800"})
        assert "ada root cancels task 't' in the live view: stuck ERROR forged  [2J" in caplog.messages
        assert answer["task"]["cause"]["message"] == "stuck ERROR forged  [2J"
        assert answer["task"]["cause"]["asked_by"] == "ada root"
        await leave()


async def test_cancellation_is_answered_without_a_history() -> None:
    """A manager that remembers no ended task still says how the cancelled one ended."""
    async with TaskManager(history=0) as manager:
        client = client_of(manager, actions={"cancel"})
        task = manager.create_task(rest(), name="t")
        await settle()
        answer = await client.cancel(task.uid)
        assert (answer["result"], answer["state"], answer["task"]["id"]) == ("cancelled", "ended", task.uid)
        await leave()


async def test_metadata_that_cannot_show_itself_is_named() -> None:
    """An object whose text raises ends no feed."""

    class Broken:
        def __str__(self) -> str:
            raise RuntimeError("no")

    async with TaskManager() as manager:
        client = client_of(manager, metadata={"order"})
        task = manager.create_task(rest(), name="t", metadata={"order": Broken()})
        await settle()
        detail = await client.get(f"/v1/tasks/{task.uid}")
        assert detail["metadata"] == {"order": "<Broken without text: RuntimeError>"}
        await leave()


async def test_task_that_does_not_stop_is_reported() -> None:
    """After 2 s the answer is that the request was made; a task that returns anyway has ended."""
    async with TaskManager() as manager:
        client = client_of(manager, actions={"cancel"})
        slow = manager.create_task(ignore_cancels(10))
        quick = manager.create_task(ignore_cancels(1))
        await settle()
        answer = await client.cancel(slow.uid)
        assert (answer["result"], answer["state"], answer["task"]["status"]) == (
            "requested",
            "live",
            "cancelling",
        )
        assert (await client.cancel(quick.uid))["result"] == "ended"
        await manager.join()


async def test_target_is_fixed_by_its_uid() -> None:
    """A name, an id, or a later task of the same name is never cancelled by mistake."""
    async with TaskManager() as manager:
        client = client_of(manager, actions={"cancel"})
        old = manager.create_task(give(1), name="import")
        uid = old.uid
        await old
        new = manager.create_task(rest(), name="import")
        trap = manager.create_task(rest(), name="no-uid")
        await settle()
        assert (await client.cancel(uid))["result"] == "ended"
        assert (await client.cancel("import", status=404))["error"]["code"] == "not_found"
        assert (await client.cancel("no-uid", status=404))["error"]["code"] == "not_found"
        assert new.cause is trap.cause is None
        await manager.cancel_all_tasks()


@pytest.mark.parametrize("is_async", [False, True])
async def test_can_decides_on_the_server(is_async: bool) -> None:
    """It sees the request, the action, and the task; anything but True is a no."""
    asked: list[tuple[str, str]] = []

    def can(request: Any, action: str, task: Any) -> bool:
        asked.append((action, task.name))
        return bool(task.name == "mine")

    async def can_later(request: Any, action: str, task: Any) -> bool:
        return can(request, action, task)

    async with TaskManager() as manager:
        client = client_of(manager, actions={"cancel"}, can=can_later if is_async else can)
        mine = manager.create_task(rest(), name="mine")
        theirs = manager.create_task(rest(), name="theirs")
        await settle()
        assert (await client.cancel(theirs.uid, status=403))["error"]["code"] == "not_allowed"
        assert (await client.get(f"/v1/tasks/{mine.uid}"))["can"] == ["cancel"]
        assert (await client.cancel(mine.uid))["result"] == "cancelled"
        assert asked == [("cancel", "theirs"), ("cancel", "mine"), ("cancel", "mine")]
        assert theirs.cause is None
        await manager.cancel_all_tasks()


@pytest.mark.parametrize("is_async", [False, True])
async def test_can_may_not_answer_with_a_truthy_object(is_async: bool) -> None:
    """A coroutine that was forgotten, or a response, is no permission."""
    async with TaskManager() as manager:
        maybe: Any = lambda *_: give("yes") if is_async else "yes"  # noqa: E731 - it stands for a mistake
        client = client_of(manager, actions={"cancel"}, can=maybe)
        task = manager.create_task(rest())
        assert (await client.cancel(task.uid, status=403))["error"]["code"] == "not_allowed"
        await manager.cancel_all_tasks()


async def test_view_keeps_no_task_alive() -> None:
    """Neither a question nor a viewer that has left holds on to a task, its result, or its frames."""
    async with TaskManager() as manager:
        client = client_of(manager)
        for path in ("/v1/tasks", "/v1/snapshot", "/v1/events?poll=1&expand=oldest"):
            task = manager.create_task(rest(), name="only")
            await settle()
            await client.get(path)
            await leave()
            known = weakref.ref(task)
            task.cancel()
            await settle()
            del task
            gc.collect()
            assert known() is None, path


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"{}", {"content-type": "text/plain"}, 415, "not_json"),
        (b"reason=x", {"content-type": "application/x-www-form-urlencoded"}, 415, "not_json"),
        (b"{", {}, 400, "bad_request"),
        (b"[]", {}, 400, "bad_request"),
        (b'{"name": "x"}', {}, 400, "bad_request"),
        (b'{"reason": 5}', {}, 400, "bad_request"),
        (json.dumps({"reason": "x" * 501}).encode(), {}, 400, "bad_request"),
        (b'{"reason": "' + b"x" * 9000 + b'"}', {}, 400, "bad_request"),
        (b"[" * 8000, {}, 400, "bad_request"),
        (b"{}", {"authorization": ""}, 403, "cross_site"),
        (b"{}", {"sec-fetch-site": "cross-site"}, 403, "cross_site"),
    ],
)
async def test_only_json_cancels(body: bytes, headers: dict[str, str], status: int, code: str) -> None:
    """A form, another type, another site, and a body that is too long or wrong cancel nothing."""
    async with TaskManager() as manager:
        client = client_of(manager, actions={"cancel"})
        task = manager.create_task(rest())
        await settle()
        path = f"/v1/tasks/{task.uid}/cancel"
        refused = await client.send(path, "POST", headers={**TOKEN, **headers}, body=body)
        assert (refused.status, json.loads(refused.body)["error"]["code"]) == (status, code)
        assert task.cause is None
        await manager.cancel_all_tasks()


async def test_cancel_request_that_is_abandoned_is_done() -> None:
    """The client leaves, and the cancellation was requested."""
    async with TaskManager() as manager:
        app = FastAPI()
        view = live_view(manager=manager, insecure=True, actions={"cancel"})
        app.include_router(view, prefix="/tasks")
        app.add_middleware(TaskGroupMiddleware, manager=manager)
        client = Client(app)
        task = manager.create_task(ignore_cancels(1))
        await settle()
        path = f"/v1/tasks/{task.uid}/cancel"
        connection = client.connection(path, "POST", headers=TOKEN, body=b"{}")
        serving = asyncio.create_task(connection.run(app))
        await asyncio.sleep(0.1)
        connection.disconnect()
        await serving
        assert task.cause is not None
        assert task.cause.asked_by == "a client at 127.0.0.1"
        await manager.join()


class _User:
    email = "ada@example.com"
    id = 7


@pytest.mark.parametrize(
    ("user", "name"),
    [
        ("ada", "ada"),
        ({"sub": "42", "name": "Ada"}, "Ada"),
        (_User(), "ada@example.com"),
        ({"id": 7}, "7"),
        (None, None),
        ("", None),
        ({"name": True}, None),
        (object(), None),
        ("x" * 200, "x" * 120),
    ],
)
def test_name_of_a_user(user: Any, name: str | None) -> None:
    """It is read from what authentications usually return."""
    assert user_name(user) == name


# -- the contract -------------------------------------------------------------------------------------------


async def test_answers_have_the_fields_of_the_reference() -> None:
    """Each field of the JSON is in docs/reference/live.md."""

    def fields(data: Any) -> set[str]:
        if isinstance(data, dict):
            return set(data).union(*map(fields, data.values()))
        return set().union(*map(fields, data)) if isinstance(data, list) else set()

    page = (ROOT / "docs/reference/live.md").read_text("utf-8")
    async with TaskManager(on_error=lambda info, error: None) as manager:
        client = client_of(manager, actions={"cancel"}, errors=True)
        stuck = manager.create_task(ignore_cancels(60), group="mail")
        manager.create_task(fail(ValueError("x")))
        await settle()
        stuck.cancel("x")
        await asyncio.sleep(31)
        answers = [
            await client.get("/v1/snapshot"),
            await client.get("/v1/tasks"),
            await client.get("/v1/tasks?state=ended"),
            await client.get(f"/v1/tasks/{stuck.uid}"),
            await client.get("/v1/events?poll=1"),
            await client.cancel(stuck.uid),
            await client.get("/v1/tasks/x", 404),
        ]
        await asyncio.sleep(2)
        answers.append(await client.get(f"/v1/events?poll=1&after={answers[4]['id']}&expand=oldest"))
        missing = {name for name in fields(answers) if f'"{name}"' not in page and f"`{name}`" not in page}
        assert missing == set()
        await manager.shutdown(grace=0.0, timeout=100)
        await leave()
