"""The name of a request: its method and its route's template, never the path that was requested."""

from __future__ import annotations

from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, Any

from otel_tasks._asgi.rule import SAFE_METHODS
from otel_tasks._core.telemetry.request import route_in

if TYPE_CHECKING:
    from collections.abc import Callable

    from otel_tasks._asgi.connection import Scope

# A client may send any word as a method; only these appear in names.
_KNOWN_METHODS = SAFE_METHODS | {"WS", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "TRACE"}

# The span of a request that is over is not asked for its route.
_WITHOUT_SPAN = Context()


def request_name(scope: Scope, context: Context) -> str:
    """Name a request after its route, or after its method alone until routing has matched.

    Args:
        scope: The ASGI scope, in which routing notes the route.
        context: The request's. Its span has the route where the framework does not note it in the scope.
    """
    # As in method_of(), whose call would be one more for each request with a task.
    method = "WS" if scope["type"] == "websocket" else scope["method"]
    method = method if method in _KNOWN_METHODS else "HTTP"
    template = _route_template(scope) or route_in(context)
    return f"{method} {template}" if template else method


def late_name(scope: Scope) -> Callable[[], str]:
    """Return a function that names a request, and that does not keep the rest of its scope in memory."""
    get = scope.get
    facts = {
        "type": scope["type"],
        "method": get("method"),
        "path_template": get("path_template"),
        "route": get("route"),
        "fastapi": get("fastapi"),
    }
    return partial(request_name, facts, _WITHOUT_SPAN)


def _route_template(scope: Scope) -> str | None:
    """Return the route's path with its parameters as written in the code."""
    # Litestar notes the template itself.
    template: object = scope.get("path_template")
    if isinstance(template, str):
        return template
    route = scope.get("route")
    # FastAPI (0.16x) notes an included router's original route; only its context knows the prefix.
    facts: dict[str, Any] = scope.get("fastapi") or {}
    effective = facts.get("effective_route_context")
    if route is not None and getattr(effective, "original_route", None) is route:
        route = effective
    template = getattr(route, "path_format", None) or getattr(route, "path", None)
    return template if isinstance(template, str) else None
