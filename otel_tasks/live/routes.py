"""The routes of the live view: they check each request, and give every answer the policy and the form.

Rules, each with a test of its own:

1. Every answer below the prefix has the headers of the guard: those of the endpoints, refusals of ``auth``,
   answers of the application's exception handlers, unknown paths and methods, and errors of the server.
2. No answer to HEAD has a body.
3. The view takes no path from the application: a route of its own below the prefix is preferred to the
   answer for unknown paths, even if it is added later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.convertors import Convertor, register_url_convertor
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from otel_tasks.live import guard
from otel_tasks.live.feed import VERSION, encoded
from otel_tasks.live.guard import Caller, Refused
from otel_tasks.live.params import BadRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine

    from starlette.types import Message, Receive, Scope, Send


class _Rest(Convertor[str]):
    """Whatever is left of a path: Starlette's own ``path`` stops at a line break."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("otel_tasks_rest", _Rest())
REST: Final = "/{path:otel_tasks_rest}"


def guarded_routes(
    *, insecure: bool, hosts: Collection[str], pages: Collection[Any], fallbacks: Collection[Any]
) -> type[APIRoute]:
    """Make a class of routes.

    Args:
        insecure: The view has no authentication.
        hosts: Names beside the local ones that Host may have, if it is insecure.
        pages: The endpoints that a link may open.
        fallbacks: The endpoints that answer what no other route does.
    """

    class GuardedRoute(APIRoute):
        def matches(self, scope: Scope) -> tuple[Match, Scope]:
            match, child_scope = super().matches(scope)
            if self.endpoint in fallbacks and match is Match.FULL:
                match = Match.PARTIAL
            return match, child_scope

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            return _with_refusals(super().get_route_handler())

        async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
            answer = _Answer(scope, send)
            try:
                # Pages are not known by their path: an application's prefix may contain anything.
                guard.check(_caller(scope, self.endpoint in pages), insecure=insecure, hosts=hosts)
                _check_method(scope["method"], self.methods or ())
                await super().handle(scope, receive, answer)
            except Refused as refusal:
                await _refusal(refusal)(scope, receive, answer)
            except Exception:
                if not answer.started:
                    await _error(500, "internal_error", "the server failed, and its log says why")(
                        scope, receive, answer
                    )
                # For the log and the trace. Starlette sends no second answer.
                raise

    return GuardedRoute


class _Answer:
    """Sends an answer with the headers of the guard."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.started = False
        self._is_head = scope["method"] == "HEAD"
        self._send = send

    async def __call__(self, message: Message) -> None:
        """Send one message of it.

        Cancellation: as for the server's own ``send()``.
        """
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(raw=list(message.get("headers", ())))
            headers.update(guard.HEADERS)
            message = {**message, "headers": headers.raw}
        elif message["type"] == "http.response.body" and self._is_head:
            message = {**message, "body": b""}
        await self._send(message)


def _with_refusals(
    handle: Callable[[Request], Coroutine[Any, Any, Response]],
) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    """A handler whose refusals have the form of the reference, and not the application's."""

    async def handler(request: Request) -> Response:
        try:
            return await handle(request)
        except Refused as refusal:
            return _refusal(refusal)
        except BadRequest as error:
            return _error(400, "bad_request", str(error))
        except RequestValidationError:
            # Of the dependency: the page sends what it wants.
            return _error(401, "unauthorized", "the authentication is incomplete")
        except HTTPException as error:
            return _error(error.status_code, "unauthorized", str(error.detail), error.headers)

    return handler


def _caller(scope: Scope, is_page: bool) -> Caller:
    request = Request(scope)
    client = None if request.client is None else request.client.host
    return Caller(request.method, request.headers, client, is_page, scope.get("http_version", "1.1"))


def _check_method(method: str, allowed: Collection[str]) -> None:
    if method not in allowed:
        headers = {"Allow": ", ".join(sorted(allowed))}
        raise Refused(405, "method_not_allowed", f"{method[:20]} is not allowed here", headers)


def _refusal(refusal: Refused) -> Response:
    return _error(refusal.status, refusal.code, refusal.message, refusal.headers)


def _error(status: int, code: str, message: str, headers: Any = None) -> Response:
    data = {"v": VERSION, "error": {"code": code, "message": message}}
    return Response(encoded(data), status, headers, "application/json")
