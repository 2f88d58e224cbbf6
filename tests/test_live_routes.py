"""The routes of the live view: what every answer below its prefix has in common, and its compressed files."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
from fastapi import Depends, FastAPI, HTTPException, Query, Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from otel_tasks import TaskManager
from otel_tasks.live import files, live_view
from otel_tasks.live.guard import HEADERS
from tests.live_client import HOST, TOKEN, Client, client_of, leave

UNKNOWN = (
    "/nothing",
    "/v1",
    "/v1/",
    "/v1/snapshot/",
    "/page.js/",
    "/page.py",
    "/v2/snapshot",
    "/../x",
    "//",
    "/a%0Ab",
)
READ = ("", "/", "/page.js", "/v1/snapshot", "/v1/tasks", "/v1/tasks/x")
METHODS = ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")


def has_policy(connection: Any) -> bool:
    """Whether an answer has all headers of the policy, once."""
    names = [name.decode("latin-1").lower() for name, _ in connection.sent[0]["headers"]]
    return all(
        connection.headers.get(name.lower()) == value and names.count(name.lower()) == 1
        for name, value in HEADERS.items()
    )


def code_of(connection: Any) -> str:
    """The code of a refusal, which has the form of the reference."""
    data = json.loads(connection.body)
    assert data["v"] == 1
    assert data["error"]["message"]
    return str(data["error"]["code"])


# -- unknown paths and methods ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", UNKNOWN)
async def test_unknown_path_is_answered_by_the_view(path: str) -> None:
    """Whatever the method, it is a 404 with the policy; a slash too many leads nowhere."""
    async with TaskManager() as manager:
        client = client_of(manager)
        for method in ("GET", *METHODS[:5]):
            answer = await client.send(path, method, headers=TOKEN)
            assert (answer.status, code_of(answer)) == (404, "not_found"), method
            assert has_policy(answer)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "path", ["", "/", "/page.js", "/v1/snapshot", "/v1/events", "/v1/tasks", "/v1/tasks/x"]
)
async def test_wrong_method_is_answered_by_the_view(path: str, method: str) -> None:
    """It is a 405 with the policy, and with the methods that are allowed."""
    async with TaskManager() as manager:
        answer = await client_of(manager).send(path, method, headers=TOKEN)
        assert (answer.status, code_of(answer)) == (405, "method_not_allowed")
        assert answer.headers["allow"] == "GET, HEAD"
        assert has_policy(answer)


async def test_cancel_is_for_post_alone() -> None:
    """Another method is refused, and a GET is a question for a task of this name."""
    async with TaskManager() as manager:
        client = client_of(manager, actions={"cancel"})
        answer = await client.send("/v1/tasks/x/cancel", "PUT", headers=TOKEN)
        assert (answer.status, answer.headers["allow"]) == (405, "POST")
        assert (await client.get("/v1/tasks/x/cancel", 404))["error"]["code"] == "not_found"
        await leave()


async def test_unknown_paths_and_methods_are_guarded_too() -> None:
    """A client that may see nothing learns nothing of which paths there are."""
    async with TaskManager() as manager:
        client = client_of(manager)
        for path, method in (("/nothing", "GET"), ("/page.js", "PUT"), ("/nothing", "PUT")):
            answer = await client.send(path, method, headers={**TOKEN, "host": "evil.example"})
            assert (answer.status, code_of(answer)) == (403, "forbidden_host")
            assert has_policy(answer)
        locked = client_of(manager, auth=Depends(lambda: False))
        assert (await locked.send("/nothing")).status == 403


async def test_application_keeps_its_own_paths_below_the_prefix() -> None:
    """A route that is added after the view is preferred to the answer for unknown paths."""
    async with TaskManager() as manager:
        client = client_of(manager)
        app: FastAPI = client.app

        @app.get("/tasks/of/{user}")
        async def of(user: str) -> str:
            return user

        @app.post("/tasks")
        async def create() -> str:
            return "created"

        assert await client.get("/of/ann") == "ann"
        assert (await client.send("", "POST")).body == b'"created"'
        assert (await client.send("/of", headers=HOST)).status == 404
        client.prefix = ""
        assert not has_policy(await client.send("/other"))


# -- HEAD ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["", "/", "/page.js", "/v1/snapshot", "/v1/tasks", "/v1/tasks/x", "/nothing"]
)
async def test_head_answers_as_get_without_a_body(path: str) -> None:
    """Status and headers are the same, the length included."""
    async with TaskManager() as manager:
        client = client_of(manager)
        head, get = await client.send(path, "HEAD"), await client.send(path)
        assert (head.status, head.body) == (get.status, b"")
        assert abs(int(head.headers["content-length"]) - len(get.body)) < 20  # The clock ticks.
        assert head.headers.keys() == get.headers.keys()
        assert has_policy(head)
        await leave()


async def test_head_opens_no_stream() -> None:
    """It ends at once, with the type of a stream."""
    async with TaskManager() as manager:
        client = client_of(manager)
        head = await client.send("/v1/events", "HEAD")
        assert (head.status, head.body, head.complete) == (200, b"", True)
        assert head.headers["content-type"].startswith("text/event-stream")
        assert "content-length" not in head.headers
        assert has_policy(head)
        await leave()


# -- answers that are not the view's ------------------------------------------------------------------------


class NotLoggedIn(Exception):
    """An authentication raises it, and the application answers with a redirect to its login."""


async def raises(kind: str = "") -> None:
    """An authentication that ends in different ways."""
    if kind == "http":
        raise HTTPException(418, "not you", {"X-Why": "teapot", "Cache-Control": "max-age=60"})
    if kind == "own":
        raise NotLoggedIn
    if kind == "bug":
        raise KeyError("secret")


def app_with(manager: TaskManager, **options: Any) -> Client:
    """A client of an application whose authentication fails as the query says."""
    app = FastAPI(**options)

    @app.exception_handler(NotLoggedIn)
    async def login(request: Request, error: Exception) -> Response:
        return RedirectResponse("/login", 302, {"Cache-Control": "public"})

    app.include_router(live_view(manager=manager, auth=Depends(raises)), prefix="/tasks")
    return Client(app)


async def test_answers_of_the_authentication_have_the_policy() -> None:
    """Those that it raises, those of the application's handlers, and those of the framework's checks."""
    async with TaskManager() as manager:
        client = app_with(manager)
        refused = await client.send("/?kind=http")
        assert (refused.status, refused.headers["x-why"], has_policy(refused)) == (418, "teapot", True)
        redirected = await client.send("/?kind=own")
        assert (redirected.status, redirected.headers["location"]) == (302, "/login")
        assert has_policy(redirected)

        async def needs(number: int = Query()) -> int:
            return number

        incomplete = await client_of(manager, auth=Depends(needs)).send("/?number=x")
        assert (incomplete.status, code_of(incomplete)) == (401, "unauthorized")
        assert has_policy(incomplete)


@pytest.mark.parametrize("debug", [False, True])
async def test_error_of_the_server_has_the_policy_and_is_raised(debug: bool) -> None:
    """The server logs it and the trace has it; the client learns nothing of it, even in debug mode."""
    async with TaskManager() as manager:
        client = app_with(manager, debug=debug)
        for path in ("/?kind=bug", "/v1/snapshot?kind=bug", "/nothing?kind=bug"):
            connection = client.connection(path, headers={"accept": "text/html"})
            with pytest.raises(KeyError, match="secret"):
                await connection.run(client.app)
            assert (connection.status, code_of(connection)) == (500, "internal_error")
            assert b"secret" not in connection.body
            assert has_policy(connection)
            assert len(connection.sent) == 2


async def test_handler_of_the_application_sees_an_error_of_the_server() -> None:
    """It runs for its effects; the answer is the view's."""
    async with TaskManager() as manager:
        client = app_with(manager)
        app: FastAPI = client.app
        seen: list[Exception] = []

        @app.exception_handler(Exception)
        async def note(request: Request, error: Exception) -> Response:
            seen.append(error)
            return PlainTextResponse(repr(error), 500)

        connection = client.connection("/?kind=bug")
        with pytest.raises(KeyError):
            await connection.run(client.app)
        assert [type(error) for error in seen] == [KeyError]
        assert code_of(connection) == "internal_error"


# -- files --------------------------------------------------------------------------------------------------


async def test_files_are_compressed_for_clients_that_allow_it() -> None:
    """Page, scripts, and style come with gzip, each the same as without; all of them stay small."""
    async with TaskManager() as manager:
        client = client_of(manager)
        sizes = [0, 0]
        for name in ("", *files.parts()):
            plain = await client.send(f"/{name}")
            small = await client.send(f"/{name}", headers={"accept-encoding": "gzip, deflate, br, zstd"})
            assert "content-encoding" not in plain.headers
            assert small.headers["content-encoding"] == "gzip"
            assert gzip.decompress(small.body) == plain.body
            assert int(small.headers["content-length"]) == len(small.body)
            assert small.headers["content-type"] == plain.headers["content-type"]
            for answer in (plain, small):
                assert answer.headers["vary"] == "Accept-Encoding"
                assert answer.headers["cache-control"] == "no-store"
            sizes[0] += len(plain.body)
            sizes[1] += len(small.body)
        assert sizes[0] < 106_000
        assert sizes[1] < 36_500


async def test_answers_about_tasks_are_not_compressed() -> None:
    """Their lengths would tell how much of a client's text is like a secret beside it (BREACH)."""
    async with TaskManager() as manager:
        client = client_of(manager)
        answer = await client.send("/v1/snapshot", headers={"accept-encoding": "gzip"})
        assert "content-encoding" not in answer.headers
        await leave()


@pytest.mark.parametrize(
    ("accepted", "expected"),
    [
        ("", False),
        ("gzip", True),
        ("GZIP;q=0.5, br", True),
        ("br;q=1.0, gzip;q=0.001", True),
        ("gzip;q=0", False),
        ("gzip; q=0.000, *", False),
        ("identity", False),
        ("*", True),
        ("*;q=0", False),
        ("x-gzip", False),
        ("deflate,,;", False),
    ],
)
def test_gzip_is_allowed(accepted: str, expected: bool) -> None:
    """Weights count, and so does the star."""
    assert files.accepts_gzip(accepted) is expected
