"""Zero-code instrumentation: ``opentelemetry-instrument`` calls this in an app that uses the library.

It needs the extra ``instrument``. Rules, each with a test of its own:

1. Task spans need no instrumentation: they start with an SDK, set up by ``opentelemetry-instrument`` or by
   hand, before the first manager or after it. This changes where they go, and nothing about them.
2. The middleware is added only on request, because it stops work: never because of the telemetry alone, and
   even if ``OTEL_SDK_DISABLED`` turns telemetry off.
3. A variable with a value that is not valid stops the start; nothing falls back to a default.
4. ``uninstrument()`` reverts everything, and applications build their middleware again.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from opentelemetry.instrumentation.instrumentor import (  # type: ignore[attr-defined]  # mypy is told to skip it
    BaseInstrumentor,
)

from otel_tasks._asgi.environment import is_true, middleware_options, variable
from otel_tasks._core.log import logger
from otel_tasks._core.telemetry.providers import Providers, set_default_providers
from otel_tasks.asgi import TaskGroupMiddleware

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.types import ASGIApp

    from otel_tasks._asgi.connection import Receive, Scope, Send

__all__ = ["OTEL_PYTHON_OTEL_TASKS_FASTAPI_MIDDLEWARE", "OtelTasksInstrumentor"]

OTEL_PYTHON_OTEL_TASKS_FASTAPI_MIDDLEWARE = "OTEL_PYTHON_OTEL_TASKS_FASTAPI_MIDDLEWARE"
"""The environment variable that adds the middleware to every FastAPI and Starlette application: ``true`` or
``false``."""

_OPTIONS = ("tracer_provider", "meter_provider", "fastapi_middleware")
# Distributions give these to every instrumentation, whether it logs or not.
_NOT_OURS = frozenset({"logger_provider", "event_logger_provider"})


class OtelTasksInstrumentor(BaseInstrumentor):  # type: ignore[misc]  # as above
    """Turns on the spans and metrics of tasks, and optionally the middleware.

    ``instrument()`` takes these options:

    - ``tracer_provider``, ``meter_provider``: the providers of all managers without their own, even of
      managers that already exist. The default is the global provider.
    - ``fastapi_middleware``: True adds ``TaskGroupMiddleware`` to each FastAPI or Starlette application that
      has none, as its outermost middleware, inside the layer that records the server's span. None reads the
      environment variable ``OTEL_PYTHON_OTEL_TASKS_FASTAPI_MIDDLEWARE``. An application that already serves
      stays as it is.

    The options of the middleware come from the environment: ``OTEL_PYTHON_OTEL_TASKS_CANCEL_HANDLER``,
    ``_DETECT_AFTER``, ``_BUFFER_LIMIT``, ``_GRACE``, ``_ON_EXIT``, ``_SPAN``. A variable with a value that is
    not valid ends the process with a message that names it (``SystemExit``), because
    ``opentelemetry-instrument`` would log any other exception and start the application without all this.

    If ``OTEL_PYTHON_DISABLED_INSTRUMENTATIONS`` names it, it does not start, and tasks have no spans and no
    metrics. If you call it yourself, it starts anyway.

    Example:
        >>> OtelTasksInstrumentor().instrument(fastapi_middleware=True)
    """

    _unbind: Callable[[], None] | None = None

    def instrumentation_dependencies(self) -> Collection[str]:
        """Return nothing: it instruments its own package."""
        return ()

    def _instrument(self, **kwargs: Any) -> None:
        unknown = sorted(kwargs.keys() - {*_OPTIONS} - _NOT_OURS)
        if unknown:
            logger.warning("instrument() does not know %s; it takes %s", unknown, ", ".join(_OPTIONS))
        # All of them are read, even without the middleware, so that a wrong one never waits to be found.
        options = middleware_options()
        if _wants_middleware(kwargs.get("fastapi_middleware")):
            self._unbind = _bind_requests(options)
        elif options:
            logger.warning(
                "%s has no effect: the middleware is not requested, set %s=true",
                ", ".join(map(variable, options)),
                OTEL_PYTHON_OTEL_TASKS_FASTAPI_MIDDLEWARE,
            )
        set_default_providers(Providers(kwargs.get("tracer_provider"), kwargs.get("meter_provider")))

    def _uninstrument(self, **kwargs: Any) -> None:
        set_default_providers(None)
        if self._unbind is not None:
            self._unbind()
            self._unbind = None


def _wants_middleware(option: object) -> bool:
    if option is None:
        return is_true(OTEL_PYTHON_OTEL_TASKS_FASTAPI_MIDDLEWARE)
    if not isinstance(option, bool):
        raise TypeError(f"fastapi_middleware must be True or False, got {option!r}")
    return option


class OutermostTaskGroups(TaskGroupMiddleware):
    """The middleware that applications get here: inside of another one, that one's settings hold."""

    async def _serve_part(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


def _bind_requests(options: Mapping[str, Any]) -> Callable[[], None]:
    """Let every application build its middleware with ours; call the result to undo it.

    Raises:
        ImportError: Starlette is not installed, and so neither is FastAPI.
    """
    undos = [_bind_requests_of(kind, options) for kind in _application_classes()]

    def undo() -> None:
        for undo_one in undos:
            undo_one()

    return undo


def _application_classes() -> list[type[Starlette]]:
    """Return the classes that build middleware: FastAPI's does not call Starlette's."""
    try:
        from starlette.applications import Starlette
    except ModuleNotFoundError as error:
        # Of another class: opentelemetry-instrument ignores a ModuleNotFoundError without a message.
        raise ImportError(
            "the middleware is requested, and neither FastAPI nor Starlette is installed: "
            f"install otel-tasks[fastapi], or unset {OTEL_PYTHON_OTEL_TASKS_FASTAPI_MIDDLEWARE}"
        ) from error
    try:
        from fastapi import FastAPI
    except ModuleNotFoundError:
        return [Starlette]
    return [Starlette, FastAPI]


def _bind_requests_of(kind: type[Starlette], options: Mapping[str, Any]) -> Callable[[], None]:
    original = kind.build_middleware_stack
    built: WeakSet[Starlette] = WeakSet()
    active = True

    # Called when an application starts to serve and all its middleware is known. It is replaced in the class;
    # a subclass in place of the class would miss modules that have imported the class before.
    @functools.wraps(original)
    def build_middleware_stack(app: Starlette) -> ASGIApp:
        if not active:
            return original(app)
        own = app.user_middleware
        app.user_middleware = with_task_groups(own, options)
        try:
            stack = original(app)
        finally:
            app.user_middleware = own
        built.add(app)
        return stack

    def undo() -> None:
        nonlocal active
        active = False
        if kind.build_middleware_stack is build_middleware_stack:
            kind.build_middleware_stack = original  # type: ignore[method-assign]  # the purpose of this function
        for app in built:
            # The next request builds the stack again; open requests keep theirs.
            app.middleware_stack = None

    kind.build_middleware_stack = build_middleware_stack  # type: ignore[assignment, method-assign]  # the same
    return undo


def with_task_groups(middleware: Sequence[Middleware], options: Mapping[str, Any]) -> list[Middleware]:
    """Add ``TaskGroupMiddleware`` to an application's middleware, outermost first, unless it is there.

    It goes outside of the others, so that the tasks they start belong to the request too, but inside of
    OpenTelemetry's, because the server's span must be current around it. The spans that FastAPI and its
    instrumentation record themselves are outside of all of these anyway.
    """
    from starlette.middleware import Middleware

    classes = [_class_of(entry.cls) for entry in middleware]
    if any(isinstance(cls, type) and issubclass(cls, TaskGroupMiddleware) for cls in classes):
        return list(middleware)
    telemetry = [
        place
        for place, cls in enumerate(classes, 1)
        if getattr(cls, "__module__", "").startswith("opentelemetry.")
    ]
    place = max(telemetry, default=0)
    return [*middleware[:place], Middleware(OutermostTaskGroups, **options), *middleware[place:]]


def _class_of(factory: object) -> object:
    while isinstance(factory, functools.partial):
        factory = factory.func
    return factory
