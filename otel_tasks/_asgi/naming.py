"""The name of a request: its method and its route's template, never the path that was requested."""

from __future__ import annotations

from contextvars import Context
from typing import TYPE_CHECKING, Any, TypeAlias

from otel_tasks._asgi.rule import KNOWN_METHODS
from otel_tasks._core.telemetry.request import route_in

if TYPE_CHECKING:
    from otel_tasks._asgi.connection import Scope

# The span of a request that is over is not asked for its route.
_WITHOUT_SPAN = Context()

# The scope's type, method, and path template, the route, FastAPI's own facts, and the request's context.
NameFacts: TypeAlias = tuple[Any, Any, Any, Any, Any, Context]


def name_facts(scope: Scope, context: Context = _WITHOUT_SPAN) -> NameFacts:
    """Return what names a request, without the rest of its scope, which must not outlive it.

    Args:
        scope: The ASGI scope, in which routing notes the route.
        context: The request's. Its span has the route where the framework does not note it in the scope.
    """
    # Spelled out: a dictionary or a loop would cost each request 0.2 us more.
    get = scope.get
    return scope["type"], get("method"), get("path_template"), get("route"), get("fastapi"), context


def name_from(facts: NameFacts) -> str:
    """Name a request after its route, or after its method alone until routing has matched."""
    kind, method, template, route, fastapi, context = facts
    # A client may send any word as a method; only known ones appear in names.
    method = "WS" if kind == "websocket" else method if method in KNOWN_METHODS else "HTTP"
    template = _route_template(template, route, fastapi) or route_in(context)
    return f"{method} {template}" if template else method


def _route_template(template: object, route: object, fastapi: dict[str, Any] | None) -> str | None:
    """Return the route's path with its parameters as written in the code."""
    # Litestar notes the template itself.
    if isinstance(template, str):
        return template
    # FastAPI (0.16x) notes an included router's original route; only its context knows the prefix.
    effective = (fastapi or {}).get("effective_route_context")
    if route is not None and getattr(effective, "original_route", None) is route:
        route = effective
    template = getattr(route, "path_format", None) or getattr(route, "path", None)
    return template if isinstance(template, str) else None
