"""A pytest plugin for the suites of other projects: puts TaskGroupMiddleware around every app that they run.

``PEERS_PLACE`` says where: ``outside`` (around the app), ``inside`` (as its innermost user middleware), or
``bare`` (nowhere).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import threading
import types
import warnings
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks.asgi import TaskGroupMiddleware

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    App = Callable[..., Any]

PLACE = os.environ.get("PEERS_PLACE", "bare")


class Wrapped(TaskGroupMiddleware):
    """The middleware, with the attributes of the app behind it, and a count of the connections served."""

    connections = 0

    def __getattr__(self, name: str) -> Any:
        """Give the app's attribute: a suite may look at its app through the client."""
        if name == "app":
            raise AttributeError(name)
        return getattr(self.app, name)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Count the connection and serve it."""
        Wrapped.connections += 1
        await super().__call__(scope, receive, send)


def uses() -> int:
    """How many connections the middleware has served."""
    return Wrapped.connections


def pytest_configure() -> None:
    """Patch what runs an app, before any test module is imported."""
    _provide_missing_modules()
    _import_all()
    if PLACE == "outside":
        _wrap_outside()
    elif PLACE == "inside":
        _wrap_inside()


@pytest.fixture(autouse=True)
def _fresh_sse_starlette() -> None:
    """Undo what a test leaves in sse-starlette's globals; its own fixture for it is not distributed."""
    module: Any = sys.modules.get("sse_starlette.sse")
    if module is not None:
        module.AppStatus.should_exit = False
        module.AppStatus.enable_automatic_graceful_drain = True
        module._thread_state = threading.local()


def _wrapped(app: App) -> App:
    return app if isinstance(app, Wrapped) else Wrapped(app)


def _import_all() -> None:
    """Import all that may be patched, in the bare run too: an import has effects, such as warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in (*_PATCHED, *_UVICORN_PROTOCOLS):
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(name)


_PATCHED = (
    "asgiref.testing",
    "fastapi",
    "httpx",
    "httpx2",
    "starlette.applications",
    "starlette.testclient",
)


# Outside: around what a server, a test client, or a transport is given.


def _wrap_outside() -> None:
    for name in ("httpx", "httpx2"):
        if module := _module(name):
            _wrap_argument(module.ASGITransport, "app")
    if module := _module("starlette.testclient"):
        _wrap_argument(module.TestClient, "app", as_asgi3=module)
    if module := _module("starlette.applications"):
        _wrap_calls(module.Starlette)
    if module := _module("asgiref.testing"):
        _wrap_argument(module.ApplicationCommunicator, "application")
    for name, protocol in _UVICORN_PROTOCOLS.items():
        if module := _module(name):
            _wrap_attribute(getattr(module, protocol), "app")


# Here and not in `Config.load()`: the suite compares what that has loaded with its app.
_UVICORN_PROTOCOLS = {
    "uvicorn.protocols.http.h11_impl": "H11Protocol",
    "uvicorn.protocols.http.httptools_impl": "HttpToolsProtocol",
    "uvicorn.protocols.websockets.websockets_impl": "WebSocketProtocol",
    "uvicorn.protocols.websockets.websockets_sansio_impl": "WebSocketsSansIOProtocol",
    "uvicorn.protocols.websockets.wsproto_impl": "WSProtocol",
}


def _module(name: str) -> Any:
    return sys.modules.get(name)


def _wrap_argument(owner: Any, parameter: str, *, as_asgi3: Any = None) -> None:
    """Make ``owner(app, ...)`` take the app wrapped."""
    original = owner.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        app = kwargs.pop(parameter) if parameter in kwargs else args[0]
        if as_asgi3 is not None and not as_asgi3._is_asgi3(app):
            app = as_asgi3._WrapASGI2(app)
        original(self, _wrapped(app), *args[1:], **kwargs)

    owner.__init__ = init


def _wrap_attribute(owner: Any, name: str) -> None:
    """Make a new ``owner`` run the app of its attribute wrapped."""
    original = owner.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        setattr(self, name, _wrapped(getattr(self, name)))

    owner.__init__ = init


def _wrap_calls(owner: Any) -> None:
    """Wrap the apps that a test calls itself; one middleware per app, as ``add_middleware`` makes."""
    original = owner.__call__

    @functools.wraps(original)
    async def call(self: Any, scope: Any, receive: Any, send: Any) -> None:
        middleware = vars(self).get("_peers_middleware")
        if middleware is None:
            middleware = vars(self)["_peers_middleware"] = Wrapped(functools.partial(original, self))
        await middleware(scope, receive, send)

    owner.__call__ = call


# Inside: behind the app's own middleware.


def _wrap_inside() -> None:
    for name, owner in (("starlette.applications", "Starlette"), ("fastapi", "FastAPI")):
        if module := _module(name):
            _add_innermost(getattr(module, owner))


def _add_innermost(owner: Any) -> None:
    original = owner.build_middleware_stack
    middleware = importlib.import_module("starlette.middleware").Middleware

    @functools.wraps(original)
    def build(self: Any) -> Any:
        own = self.user_middleware
        self.user_middleware = [*own, middleware(Wrapped)]
        try:
            return original(self)
        finally:
            # A suite may inspect the list.
            self.user_middleware = own

    owner.build_middleware_stack = build


def _provide_missing_modules() -> None:
    """Provide a helper that sse-starlette's tests import and its source distribution lacks."""
    compat = types.ModuleType("tests.anyio_compat")
    compat.collapse_excgroups = _collapse_exception_groups  # type: ignore[attr-defined]  # a module made here
    sys.modules["tests.anyio_compat"] = compat


@contextlib.contextmanager
def _collapse_exception_groups() -> Iterator[None]:
    """Raise the one exception of a group instead of the group."""
    try:
        yield
    except BaseException as error:
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from None
