"""The suites of other projects that run with the middleware around every app, and what may differ.

Nothing of them is kept here: their tests come from their own source distributions, at the versions that the
dependency group `nightly` pins. Left out, because a source distribution lacks the tests or what they need:
Quart and Litestar (no tests), BlackSheep (no fixtures).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, eq=False)
class Suite:
    """One project's tests.

    Args:
        package: The name of the package, whose installed version is the one that is tested.
        through: The least number of tests in which the middleware serves a connection, by place:
            a suite that no longer meets the middleware must not pass. Its keys are the places to run.
        tests: The files and folders to run.
        left_out: Tests that are not run at all, and why.
        differences: The intended differences from the bare run: reasons by place and test id.
    """

    package: str
    through: dict[str, int]
    tests: tuple[str, ...] = ("tests",)
    left_out: dict[str, str] = field(default_factory=dict)
    differences: dict[str, dict[str, str]] = field(default_factory=dict)


_STACKED = "tests/middleware/test_base.py::test_multiple_middlewares_stacked_client_disconnected[asyncio]"
_AFTER_DISCONNECT = (
    "An app that answers after the disconnect answers 499 to the layers around the middleware."
)
_TRIO = {
    "tests/test_dependency_concurrency.py::test_app_can_be_reused_across_event_loops": "It runs on trio.",
}
_DISCONNECT_EVENT = {
    "tests/test_telemetry/test_websockets.py::test_client_disconnect[1006]": (
        "The server span has the event otel_tasks.client_disconnect, and the test expects none."
    ),
}

SUITES = (
    Suite(
        "starlette",
        through={"outside": 500, "inside": 180},
        differences={
            "outside": {
                _STACKED: _AFTER_DISCONNECT,
                "tests/middleware/test_base.py::"
                "test_background_task_runs_after_response_sent_with_middleware[asyncio]": (
                    "The client leaves during the response: a GET is cancelled, its background task too."
                ),
            },
            "inside": {_STACKED: _AFTER_DISCONNECT},
        },
    ),
    Suite(
        "fastapi",
        through={"outside": 4000, "inside": 4000},
        differences={"outside": _TRIO, "inside": _TRIO | _DISCONNECT_EVENT},
    ),
    Suite("sse-starlette", through={"outside": 8, "inside": 3}),
    Suite(
        "mcp",
        through={"outside": 600, "inside": 600},
        # The others test no app, or the tools with which the project makes its documentation.
        tests=tuple(
            f"tests/{name}" for name in ("client", "interaction", "issues", "server", "shared", "transports")
        ),
    ),
    Suite("httpx", through={"outside": 50}),
    Suite(
        "uvicorn",
        through={"outside": 400},
        differences={
            "outside": {
                f"tests/{test}[{parser}]": reason
                for parser in ("h11", "httptools")
                for test, reason in {
                    "protocols/test_http.py::test_value_returned": (
                        "The middleware returns None, so that uvicorn does not see what the app returns."
                    ),
                    "test_server.py::test_reset_contextvars_asyncio": (
                        "The middleware sets a context variable for the request, and the test expects none."
                    ),
                }.items()
            }
        },
    ),
    Suite("opentelemetry-instrumentation-asgi", through={"outside": 50}),
    Suite("opentelemetry-instrumentation-fastapi", through={"outside": 80, "inside": 80}),
)
