"""The suites of other projects that run with the middleware around every app, and what may differ.

Those of Taskiq run with `managed()` applied to every broker.

Nothing of them is kept here: their tests come from their own source distributions, at the versions that the
dependency group `nightly` pins, or from a commit of their repository. Left out, because a source distribution
lacks the tests or what they need: Quart and Litestar (no tests), BlackSheep (no fixtures).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, eq=False)
class Suite:
    """One project's tests.

    Args:
        package: The name of the package, whose installed version is the one that is tested.
        through: The least number of tests that use this library, by place: in which the middleware serves a
            connection, or a managed task runs. A suite that no longer meets it must not pass. Its keys are
            the places to run.
        tests: The files and folders to run.
        left_out: Tests that are not run at all, and why; a prefix of their ids is enough.
        keyword: As pytest's `-k`.
        differences: The intended differences from the bare run: reasons by place and test id.
        plugin: The module that applies this library.
        servers: The servers that it needs, by the variable for their address.
        repository: Where the tests are, if the source distribution has none.
        commit: The commit there.
    """

    package: str
    through: dict[str, int]
    tests: tuple[str, ...] = ("tests",)
    left_out: dict[str, str] = field(default_factory=dict)
    keyword: str = ""
    differences: dict[str, dict[str, str]] = field(default_factory=dict)
    plugin: str = "wrapping"
    servers: dict[str, str] = field(default_factory=dict)
    repository: str = ""
    commit: str = ""


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
_MANAGED_SPAN = {
    f"tests/opentelemetry/{test}": "A managed task has a span, below that of Taskiq's instrumentation."
    for test in (
        "test_auto_instrumentation.py::TestTaskiqAutoInstrumentation::test_auto_instrument",
        "test_tasks.py::TestTaskiqInstrumentation::test_task",
        "test_tasks.py::TestTaskiqInstrumentation::test_task_not_instrumented_does_not_raise",
        "test_tasks.py::TestTaskiqInstrumentation::test_task_raises",
        "test_tasks.py::TestTaskiqInstrumentation::test_uninstrument",
    )
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
    Suite(
        "taskiq",
        through={"managed": 80},
        differences={"managed": _MANAGED_SPAN},
        plugin="managing",
    ),
    Suite(
        "taskiq-redis",
        through={"managed": 5},
        # Neither a cluster nor a Sentinel.
        keyword="not cluster and not sentinel",
        plugin="managing",
        servers={"TEST_REDIS_URL": "redis"},
        repository="taskiq-python/taskiq-redis",
        # 1.2.4 has no tag there.
        commit="374c789739b63f6cec765a09d71606193be26197",
    ),
    Suite(
        "taskiq-aio-pika",
        through={"managed": 12},
        left_out=dict.fromkeys(
            (
                "tests/test_delay_with_plugin.py",
                "tests/test_startup.py::TestStartup::test_when_delayed_message_exchange_plugin_enabled",
            ),
            "RabbitMQ needs a plugin that is not part of it.",
        ),
        plugin="managing",
        servers={"TEST_AMQP_URL": "rabbitmq"},
        repository="taskiq-python/taskiq-aio-pika",
        commit="cf893019f02c01a6a141f46f217be3f959a317f4",
    ),
)
