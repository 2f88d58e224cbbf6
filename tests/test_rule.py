"""Which handlers a disconnect cancels, as the text of a rule says."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Mount, Route

from otel_tasks import TaskManager
from otel_tasks._asgi.rule import GRAMMAR, checked_rules
from otel_tasks.asgi import TaskGroupMiddleware
from otel_tasks.testing import FakeConnection
from tests.hang_ups import LONG

if TYPE_CHECKING:
    from starlette.requests import Request

GATEWAY = "safe, POST /v1/*, !POST /v1/batches*"


def cancels(rule: Any, request: str, *, decision: bool | None = None, **scope: Any) -> bool:
    """Whether a disconnect cancels the handler of ``METHOD PATH``."""
    method, path = request.split()
    described = {"type": "http", "method": method, "path": path, **scope}
    return checked_rules(rule, 0.0, "cancel").cancels_handler(described, decision)


@pytest.mark.parametrize(
    ("rule", "request_line", "expected"),
    [
        (GATEWAY, "GET /anything", True),
        (GATEWAY, "POST /v1/chat/completions", True),
        (GATEWAY, "POST /v1/", True),
        (GATEWAY, "POST /v1", False),
        (GATEWAY, "POST /v1/batches", False),
        (GATEWAY, "POST /v1/batches/7/cancel", False),
        (GATEWAY, "GET /v1/batches", True),
        (GATEWAY, "PUT /v1/files", False),
        # The order does not matter.
        ("!POST /v1/batches*, POST /v1/*, safe", "POST /v1/batches", False),
        ("all", "DELETE /", True),
        ("none", "GET /", False),
        ("none, GET /a", "GET /a", True),
        ("all, !safe", "GET /", False),
        ("all, !safe", "POST /", True),
        ("POST|PUT /v1/*", "PUT /v1/a", True),
        ("POST|PUT /v1/*", "PATCH /v1/a", False),
        ("post|Put /v1/*", "PUT /v1/a", True),
        ("/v1/*", "PATCH /v1/a", True),
        ("/v1/*/items", "GET /v1/a/b/items", True),
        ("/v1/*/items", "GET /v1/a/b/items/3", False),
        ("/v1/*/items*", "GET /v1/a/b/items/3", True),
        ("POST *", "POST /", True),
        ("POST *:generate", "POST /models/m:generate", True),
        ("POST *:generate", "POST /models/m:generate/", False),
        # No other character is special.
        ("/a.c", "GET /abc", False),
        ("/a[bc]?", "GET /ab", False),
        ("/a[bc]?", "GET /a[bc]?", True),
    ],
)
def test_text_decides_by_method_and_path(rule: str, request_line: str, expected: bool) -> None:
    """A handler is cancelled if an entry matches the request, and no exception does."""
    assert cancels(rule, request_line) is expected


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("safe", False), ("all", True), ("/live", True), ("WS /live", True), ("GET *", False)],
)
def test_text_decides_about_websockets(rule: str, expected: bool) -> None:
    """A WebSocket has no method; in a rule it is WS."""
    scope = {"type": "websocket", "path": "/live"}
    assert checked_rules(rule, 0.0, "cancel").cancels_handler(scope, None) is expected


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ({"path": "/api/v1/chat", "root_path": "/api"}, True),
        ({"path": "/api/v1/chat", "root_path": "/api/"}, True),
        # A server that leaves it out of the path.
        ({"path": "/v1/chat", "root_path": "/api"}, True),
        ({"path": "/apis/v1/chat", "root_path": "/api"}, False),
        ({"path": "/api/v1/chat", "root_path": "/api/v1", "app_root_path": "/api"}, True),
        ({"path": "/v1/chat", "root_path": "/v1", "app_root_path": ""}, True),
    ],
)
def test_path_is_the_one_below_the_root(scope: dict[str, Any], expected: bool) -> None:
    """The root of the application does not count; the prefix of a mounted one does."""
    assert cancels("POST /v1/chat", "POST /", **scope) is expected


def test_path_of_the_root_itself_is_a_slash() -> None:
    """Behind a root path, the application's first page has the path /."""
    assert cancels("POST /", "POST /api", root_path="/api")


@pytest.mark.parametrize("rule", ["all", "none", True, False, lambda scope: True, lambda scope: False])
@pytest.mark.parametrize("decision", [True, False])
def test_decision_of_the_request_takes_precedence(rule: Any, decision: bool) -> None:
    """What a route has decided holds, whatever the rule."""
    assert cancels(rule, "POST /", decision=decision) is decision


@pytest.mark.parametrize(
    ("rule", "entry"),
    [
        ("", ""),
        ("safe,", ""),
        ("safe, POTS", "POTS"),
        ("safe, POST v1/*", "POST v1/*"),
        ("safe, POST,PUT /v1/*", "POST"),
        ("safe, POST| /v1", "POST| /v1"),
        ("safe, POST /v1/* /v2/*", "POST /v1/* /v2/*"),
        ("unsafe", "unsafe"),
        ("true", "true"),
        ("all, !none", "!none"),
        ("safe, !all", "!all"),
        ("!!safe", "!!safe"),
        ("safe; POST /v1/*", "safe; POST /v1/*"),
    ],
)
def test_bad_entry_is_an_error_that_shows_it_and_the_grammar(rule: str, entry: str) -> None:
    """The middleware is not made."""
    with pytest.raises(ValueError, match="bad entry") as caught:
        TaskGroupMiddleware(FakeConnection, cancel_handler=rule)  # type: ignore[arg-type]  # never served
    assert str(caught.value) == f"cancel_handler has a bad entry, {entry!r}: {GRAMMAR}"


@pytest.mark.parametrize(
    ("rule", "entry", "method"),
    [
        ("safe, pst /v1/*", "pst /v1/*", "POST"),
        ("all, !DELEET /users/*", "!DELEET /users/*", "DELETE"),
        ("GET|PTACH /x", "GET|PTACH /x", "PATCH"),
        ("WEBSOCKET /chat", "WEBSOCKET /chat", "WS"),
    ],
)
def test_misspelled_method_is_an_error_that_names_the_right_one(rule: str, entry: str, method: str) -> None:
    """Its entry would match no request."""
    with pytest.raises(ValueError, match="bad entry") as caught:
        checked_rules(rule, 0.0, "cancel")
    assert str(caught.value) == f"cancel_handler has a bad entry, {entry!r}: did you mean {method}?"


@pytest.mark.parametrize(
    "method", ["PURGE", "PROPFIND", "PROPPATCH", "REPORT", "SEARCH", "LOCK", "MKCOL", "UPDATE"]
)
def test_other_methods_are_allowed(method: str) -> None:
    """WebDAV's, caches', and an application's own."""
    checked_rules(f"{method} /x", 0.0, "cancel")


def test_rule_of_exceptions_alone_is_an_error() -> None:
    """It would cancel nothing."""
    with pytest.raises(ValueError, match="has only exceptions: a rule is entries"):
        checked_rules("!POST /v1/*", 0.0, "cancel")


def test_text_is_shown_as_it_was_written() -> None:
    """For messages that name the rule in force."""
    assert repr(checked_rules(GATEWAY, 0.0, "cancel").cancel_handler) == repr(GATEWAY)


@pytest.mark.real_clock
def test_long_path_is_matched_fast() -> None:
    """A client chooses the path: no pattern makes the time grow with a power of its length."""
    began = time.process_time()
    assert not cancels("/" + "a*" * 12 + "b", f"GET /{'a' * 5000}")
    assert time.process_time() - began < 1.0


@pytest.mark.parametrize(("rule", "cancelled"), [("POST /v1/chat", True), ("POST /chat", False)])
async def test_prefix_of_a_mounted_application_counts(rule: str, cancelled: bool) -> None:
    """The path is the same before routing and after it, although Starlette changes the scope."""
    ended = []

    async def chat(request: Request) -> Response:
        try:
            await asyncio.sleep(1)
        except asyncio.CancelledError:
            ended.append(True)
            raise
        return Response("done")

    inner = Starlette(routes=[Route("/chat", chat, methods=["POST"])])
    app = TaskGroupMiddleware(
        Starlette(routes=[Mount("/v1", inner)]), manager=TaskManager(), cancel_handler=rule
    )
    connection = FakeConnection(method="POST", path="/v1/chat")
    asyncio.get_running_loop().call_later(LONG, connection.disconnect)
    await connection.run(app)
    assert bool(ended) is cancelled
