from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import logging
import os
import sys
import tomllib
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.metrics import NoOpMeterProvider
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from otel_tasks import TaskManager, create_task, current_group
from otel_tasks import instrumentation as instrumentation_module
from otel_tasks._asgi import environment
from otel_tasks._core.telemetry.providers import set_default_providers
from otel_tasks.asgi import TaskGroupMiddleware
from otel_tasks.instrumentation import OTEL_PYTHON_OTEL_TASKS_FASTAPI_MIDDLEWARE as OPTION
from otel_tasks.instrumentation import OtelTasksInstrumentor, OutermostTaskGroups, with_task_groups
from otel_tasks.testing import FakeConnection, SpanRecorder
from tests.blocks import ROOT, python_blocks, run_block
from tests.helpers import give, rest, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from otel_tasks._asgi.settings import Settings

DISABLED = "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS"
PREFIX = "OTEL_PYTHON_OTEL_TASKS_"


@pytest.fixture
def instrumentor(monkeypatch: pytest.MonkeyPatch) -> Iterator[OtelTasksInstrumentor]:
    """The instrumentor, and afterwards everything as it was."""
    monkeypatch.delenv(OPTION, raising=False)
    monkeypatch.delenv(DISABLED, raising=False)
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    before = (FastAPI.build_middleware_stack, Starlette.build_middleware_stack)
    found = OtelTasksInstrumentor()
    yield found
    if found.is_instrumented_by_opentelemetry:
        found.uninstrument()
    monkeypatch.delenv(DISABLED, raising=False)
    set_default_providers(None)
    assert (FastAPI.build_middleware_stack, Starlette.build_middleware_stack) == before


@pytest.fixture
def other() -> Iterator[SpanRecorder]:
    """A second place for spans and metrics to go."""
    with SpanRecorder() as recorder:
        yield recorder


# -- providers ----------------------------------------------------------------------------------


async def test_spans_go_to_the_given_provider_until_it_is_undone(
    instrumentor: OtelTasksInstrumentor, spans: SpanRecorder
) -> None:
    """Managers from before and after report to the given provider, and no more when that is undone."""
    async with TaskManager("before") as before:
        instrumentor.instrument(tracer_provider=spans.provider)
        async with TaskManager("after") as after:
            await before.create_task(give(1), name="first")
            await after.create_task(give(1), name="second")
            instrumentor.uninstrument()
            untraced = [
                await_me.trace_id for await_me in (before.create_task(give(1)), after.create_task(give(1)))
            ]
            await settle()

    assert spans.names == ["first", "second"]
    assert untraced == [None, None]


async def test_own_providers_are_kept(
    instrumentor: OtelTasksInstrumentor, spans: SpanRecorder, other: SpanRecorder
) -> None:
    """A manager that was given providers of its own reports to those."""
    instrumentor.instrument(tracer_provider=other.provider, meter_provider=other.meter_provider)
    async with TaskManager(tracer_provider=spans.provider, meter_provider=spans.meter_provider) as manager:
        await manager.create_task(give(1), name="mine")

    assert spans.names == ["mine"]
    assert "otel_tasks.task.duration" in spans.metrics()
    assert other.names == []
    assert "otel_tasks.task.duration" not in other.metrics()


async def test_task_that_lives_meanwhile_ends_its_span_where_it_began(
    instrumentor: OtelTasksInstrumentor, spans: SpanRecorder, other: SpanRecorder
) -> None:
    """A change of providers loses no span, and ends none elsewhere."""
    instrumentor.instrument(tracer_provider=spans.provider)
    async with TaskManager() as manager:
        task = manager.create_task(asyncio.sleep(1), name="long")
        await settle()
        instrumentor.uninstrument()
        instrumentor.instrument(tracer_provider=other.provider)
        await task

    assert (spans.names, other.names) == (["long"], [])


def cancellations(recorder: SpanRecorder) -> int:
    """The counter of cancellations."""
    return sum(point.value for point in recorder.metrics().get("otel_tasks.task.cancellations", []))


def active(recorder: SpanRecorder) -> int:
    """How many tasks are live, by what the metrics say."""
    return sum(point.value for point in recorder.metrics().get("otel_tasks.task.active", []))


async def cancel_one(manager: TaskManager) -> None:
    """Let one task be cancelled."""
    task = manager.create_task(rest())
    await settle()
    await manager.cancel_task(task.name)


async def test_metrics_go_to_the_given_provider_and_are_counted_once(
    instrumentor: OtelTasksInstrumentor, spans: SpanRecorder, other: SpanRecorder
) -> None:
    """Each provider counts what happened while it was the one; its counter never goes back."""
    async with TaskManager() as manager:
        await cancel_one(manager)
        instrumentor.instrument(meter_provider=spans.meter_provider)
        await cancel_one(manager)
        manager.create_task(asyncio.sleep(1), name="live")
        assert (cancellations(spans), active(spans)) == (1, 1)

        instrumentor.uninstrument()
        await cancel_one(manager)
        assert (cancellations(spans), active(spans)) == (1, 0)

        instrumentor.instrument(meter_provider=other.meter_provider)
        await cancel_one(manager)
        await cancel_one(manager)
        instrumentor.uninstrument()
        instrumentor.instrument(meter_provider=spans.meter_provider)
        await cancel_one(manager)
        assert (cancellations(spans), cancellations(other)) == (2, 2)
    del manager

    assert (cancellations(spans), cancellations(other)) == (2, 2)


async def test_manager_that_is_gone_is_no_hindrance(
    instrumentor: OtelTasksInstrumentor, spans: SpanRecorder
) -> None:
    """A manager that has been freed is not looked for."""
    manager = TaskManager()
    await manager.create_task(give(1))
    telemetry = manager._ledger.telemetry
    await settle()
    assert telemetry._source is not None
    assert telemetry._source() is not None
    del manager
    gc.collect()
    assert telemetry._source() is None
    instrumentor.instrument(meter_provider=spans.meter_provider)

    assert telemetry._metrics is None


@pytest.mark.parametrize(("words", "traced"), [("otel_tasks", 0), ("requests , otel_tasks", 0), ("*", 1)])
async def test_disabled_instrumentation_traces_nothing_on_its_own(
    instrumentor: OtelTasksInstrumentor,
    spans: SpanRecorder,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    traced: int,
) -> None:
    """Named in the environment nothing is reported to the global provider; `*` is about instrumentations."""
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", spans.provider)
    instrumentor.instrument()
    monkeypatch.setenv(DISABLED, words)
    instrumentor.uninstrument()
    async with TaskManager() as manager, TaskManager(tracer_provider=spans.provider) as own:
        await manager.create_task(give(1), name="global")
        await own.create_task(give(1), name="own")
        disabled = isinstance(manager._ledger.telemetry._meter_provider, NoOpMeterProvider)

    assert disabled is (traced == 0)
    assert spans.names == [*["global"] * traced, "own"]


async def test_called_by_hand_it_starts_though_it_is_named_there(
    instrumentor: OtelTasksInstrumentor, spans: SpanRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An explicit call wins, as with every instrumentation."""
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", spans.provider)
    monkeypatch.setenv(DISABLED, "otel_tasks")
    instrumentor.instrument()
    async with TaskManager() as manager:
        await manager.create_task(give(1), name="traced")

    assert spans.names == ["traced"]


def test_disabled_sdk_is_no_sdk() -> None:
    """With `OTEL_SDK_DISABLED=true` a task has no trace id, as without an SDK."""
    run_block("""
import asyncio, os
os.environ["OTEL_SDK_DISABLED"] = "true"
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from otel_tasks import TaskManager
from otel_tasks.instrumentation import OtelTasksInstrumentor

async def work():
    return 1

async def main():
    OtelTasksInstrumentor().instrument()
    trace.set_tracer_provider(TracerProvider())
    async with TaskManager() as manager, TaskManager(tracer_provider=TracerProvider()) as own:
        assert [m.create_task(work()).trace_id for m in (manager, own)] == [None, None]

asyncio.run(main())
""")


def test_sdk_may_be_set_up_after_the_first_manager_and_without_any_of_this() -> None:
    """Spans come as soon as there is an SDK, with the instrumentor and without it."""
    run_block("""
import asyncio
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from otel_tasks import TaskManager
from otel_tasks.instrumentation import OtelTasksInstrumentor

async def work():
    return 1

async def main():
    async with TaskManager() as manager:
        assert manager.create_task(work()).trace_id is None
        trace.set_tracer_provider(TracerProvider())
        assert manager.create_task(work()).trace_id is not None
        OtelTasksInstrumentor().instrument()
        assert manager.create_task(work()).trace_id is not None
        OtelTasksInstrumentor().uninstrument()
        assert manager.create_task(work()).trace_id is not None

asyncio.run(main())
""")


# -- the middleware -----------------------------------------------------------------------------


def shop(**options: Any) -> FastAPI:
    """An application that says which group it works in."""
    app = FastAPI(telemetry={"tracing": False}, **options)

    @app.get("/")
    async def index() -> str:
        return current_group().id.partition("#")[0]

    return app


def plain_shop(**options: Any) -> Starlette:
    """The same application without FastAPI."""

    async def index(request: object) -> PlainTextResponse:
        return PlainTextResponse(current_group().id.partition("#")[0])

    return Starlette(routes=[Route("/", index)], **options)


async def answer_of(app: FastAPI | Starlette) -> str:
    """The group that a request of the application has."""
    connection = FakeConnection()
    await connection.run(app)
    return connection.body.decode().strip('"')


@pytest.mark.parametrize("made", ["before", "after"])
async def test_every_application_gets_the_middleware(instrumentor: OtelTasksInstrumentor, made: str) -> None:
    """Each request has a group, in applications made before and after; undone, none has, even in those."""
    app = shop() if made == "before" else None
    instrumentor.instrument(fastapi_middleware=True)
    app = app or shop()

    assert await answer_of(app) == "GET /"
    assert app.user_middleware == []
    instrumentor.uninstrument()
    assert await answer_of(app) == "root"
    assert await answer_of(shop()) == "root"


async def test_starlette_applications_get_the_middleware(instrumentor: OtelTasksInstrumentor) -> None:
    """Each request has a group, in an application that was made before; undone, none has."""
    app = plain_shop()
    instrumentor.instrument(fastapi_middleware=True)

    assert await answer_of(app) == "GET /"
    assert app.user_middleware == []
    instrumentor.uninstrument()
    assert await answer_of(app) == "root"


def settings_in(app: Any) -> Settings:
    """The settings of the middleware that an application has."""
    layer: Any = app.build_middleware_stack()
    while not isinstance(layer, TaskGroupMiddleware):
        layer = layer.app
    settings: Settings = layer.settings
    return settings


@pytest.mark.parametrize("make", [shop, plain_shop])
def test_environment_sets_every_option(
    instrumentor: OtelTasksInstrumentor,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], FastAPI | Starlette],
) -> None:
    """Each option of the middleware has a variable; an empty one counts as unset."""
    monkeypatch.setenv(OPTION, "true")
    values = {
        "CANCEL_HANDLER": "safe, POST /v1/*",
        "DETECT_AFTER": "0.5",
        "BUFFER_LIMIT": "1000",
        "GRACE": "2",
        "ON_EXIT": "wait",
        "SPAN": "True",
        "REQUEST_TIMEOUT": "2.5",
    }
    for name, value in values.items():
        monkeypatch.setenv(PREFIX + name, value)
    instrumentor.instrument()
    settings = settings_in(make())
    rules = settings.rules
    assert (settings.detect_after, settings.buffer_limit, settings.span) == (0.5, 1000, True)
    assert settings.request_timeout == 2.5
    assert (repr(rules.cancel_handler), rules.grace, rules.on_exit) == ("'safe, POST /v1/*'", 2.0, "wait")

    instrumentor.uninstrument()
    for name in values:
        monkeypatch.setenv(PREFIX + name, "")
    instrumentor.instrument()
    settings = settings_in(make())
    assert (settings.detect_after, settings.buffer_limit, settings.span) == (0.025, 262_144, False)
    assert settings.request_timeout is None
    assert repr(settings.rules.cancel_handler) == "'safe'"


def test_every_option_has_a_variable() -> None:
    """All options of the middleware but the manager, which no text can name."""
    options = inspect.signature(TaskGroupMiddleware).parameters.keys() - {"app", "manager"}
    assert environment._OPTIONS.keys() == options
    page = (ROOT / "docs/howto/zero-code.md").read_text("utf-8")
    assert [option for option in options if f"`{environment.variable(option)}`" not in page] == []


@pytest.mark.parametrize("outer", [True, False])
async def test_mounted_application_is_ruled_by_the_outer_one(
    instrumentor: OtelTasksInstrumentor, monkeypatch: pytest.MonkeyPatch, outer: bool
) -> None:
    """The options of the environment do not override those of an application that adds the middleware."""
    monkeypatch.setenv(f"{PREFIX}CANCEL_HANDLER", "none" if outer else "all")
    instrumentor.instrument(fastapi_middleware=True)
    ended: list[str] = []

    async def index(request: object) -> PlainTextResponse:
        try:
            await asyncio.sleep(60)
            ended.append("finished")
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return PlainTextResponse("done")

    app = Starlette(routes=[Mount("/v1", Starlette(routes=[Route("/", index, methods=["POST"])]))])
    app.add_middleware(TaskGroupMiddleware, cancel_handler=outer)
    connection = FakeConnection(method="POST", path="/v1/")
    asyncio.get_running_loop().call_later(1.0, connection.disconnect)
    await connection.run(app)

    assert ended == ["cancelled" if outer else "finished"]


async def test_application_that_serves_already_is_left_alone(instrumentor: OtelTasksInstrumentor) -> None:
    """Its middleware is built; what came too late changes nothing."""
    app = shop()
    assert await answer_of(app) == "root"
    instrumentor.instrument(fastapi_middleware=True)

    assert await answer_of(app) == "root"


async def test_work_stops_when_the_client_leaves(instrumentor: OtelTasksInstrumentor) -> None:
    """An application that was not changed stops its work."""
    instrumentor.instrument(fastapi_middleware=True)
    app = FastAPI(telemetry={"tracing": False})
    causes: list[str] = []

    @app.get("/")
    async def index() -> None:
        task = create_task(rest())
        try:
            await task
        finally:
            causes.append(str(task.cause))

    connection = FakeConnection()
    asyncio.get_running_loop().call_later(1.0, connection.disconnect)
    await connection.run(app)

    assert causes == ["client_disconnect"]


def places(app: FastAPI) -> list[str]:
    """The classes of the middleware that was built, outermost first."""
    found = []
    layer: Any = app.build_middleware_stack()
    while layer is not None:
        found.append(type(layer).__name__)
        layer = getattr(layer, "app", None)
    shown = {
        "OpenTelemetryMiddleware": "OpenTelemetryMiddleware",
        "GZipMiddleware": "GZipMiddleware",
        "OutermostTaskGroups": "TaskGroupMiddleware",
    }
    return [shown[name] for name in found if name in shown]


def test_it_stands_outside_of_all_but_telemetry(instrumentor: OtelTasksInstrumentor) -> None:
    """Tasks that other middleware starts belong to the request too, below the server's span."""
    instrumentor.instrument(fastapi_middleware=True)
    app = shop()
    app.add_middleware(GZipMiddleware)
    assert places(app) == ["TaskGroupMiddleware", "GZipMiddleware"]

    app.add_middleware(OpenTelemetryMiddleware)
    assert places(app) == ["OpenTelemetryMiddleware", "TaskGroupMiddleware", "GZipMiddleware"]

    app.add_middleware(GZipMiddleware)
    assert places(app) == [
        "GZipMiddleware",
        "OpenTelemetryMiddleware",
        "TaskGroupMiddleware",
        "GZipMiddleware",
    ]


def test_it_stands_inside_of_the_contrib_instrumentation(instrumentor: OtelTasksInstrumentor) -> None:
    """The server's span of the FastAPI instrumentation is around it."""
    instrumentor.instrument(fastapi_middleware=True)
    app = shop()
    FastAPIInstrumentor.instrument_app(app)
    try:
        assert places(app) == ["OpenTelemetryMiddleware", "TaskGroupMiddleware"]
    finally:
        FastAPIInstrumentor.uninstrument_app(app)


@pytest.mark.parametrize(
    "add",
    [
        lambda app: app.add_middleware(TaskGroupMiddleware, on_exit="wait"),
        lambda app: app.add_middleware(type("Own", (TaskGroupMiddleware,), {}), on_exit="wait"),
        lambda app: app.add_middleware(functools.partial(TaskGroupMiddleware, on_exit="wait")),
    ],
    ids=["itself", "subclass", "partial"],
)
def test_application_with_the_middleware_keeps_its_own(
    instrumentor: OtelTasksInstrumentor, add: Callable[[FastAPI], None]
) -> None:
    """It is not added a second time, and the application's options hold."""
    app = shop()
    add(app)
    before = list(app.user_middleware)
    instrumentor.instrument(fastapi_middleware=True)

    assert with_task_groups(before, {}) == before
    stack: Any = app.build_middleware_stack()
    found = []
    while stack is not None:
        found += [stack.settings.rules.on_exit] if isinstance(stack, TaskGroupMiddleware) else []
        stack = getattr(stack, "app", None)
    assert found == ["wait"]


def test_middleware_made_by_a_plain_function_is_left_where_it_is() -> None:
    """Middleware that is no class is not inspected."""
    made = Middleware(lambda app: app)

    assert [entry.cls for entry in with_task_groups([made], {})] == [OutermostTaskGroups, made.cls]


async def test_failing_build_leaves_the_application_as_it_was(instrumentor: OtelTasksInstrumentor) -> None:
    """A middleware that cannot be made raises as before, and the list is the application's own."""
    instrumentor.instrument(fastapi_middleware=True)
    app = shop()
    app.add_middleware(GZipMiddleware, no_such_option=1)  # type: ignore[call-arg]  # that is what is wrong
    own = app.user_middleware

    with pytest.raises(TypeError, match="no_such_option"):
        app.build_middleware_stack()
    assert app.user_middleware is own


async def test_class_that_was_patched_since_is_kept(
    instrumentor: OtelTasksInstrumentor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patches may be undone in any order: the other one stays, and ours has no effect."""
    before = FastAPI.build_middleware_stack
    instrumentor.instrument(fastapi_middleware=True)
    ours = FastAPI.build_middleware_stack

    def theirs(app: FastAPI) -> Any:
        return ours(app)

    monkeypatch.setattr(FastAPI, "build_middleware_stack", theirs)
    instrumentor.uninstrument()

    assert FastAPI.build_middleware_stack is theirs
    assert await answer_of(shop()) == "root"
    monkeypatch.setattr(FastAPI, "build_middleware_stack", before)


@pytest.mark.parametrize(
    ("word", "expected"), [("true", "GET /"), (" True ", "GET /"), ("false", "root"), ("", "root")]
)
async def test_environment_asks_for_the_middleware(
    instrumentor: OtelTasksInstrumentor, monkeypatch: pytest.MonkeyPatch, word: str, expected: str
) -> None:
    """The variable says whether, in any case; an argument goes before it."""
    monkeypatch.setenv(OPTION, word)
    instrumentor.instrument()
    assert await answer_of(shop()) == expected

    instrumentor.uninstrument()
    instrumentor.instrument(fastapi_middleware=expected == "root")
    assert await answer_of(shop()) != expected


# -- what is wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("FASTAPI_MIDDLEWARE", "yes", "must be true or false"),
        ("CANCEL_HANDLER", "safe, POTS", "cancel_handler has a bad entry, 'POTS': a rule is entries"),
        ("CANCEL_HANDLER", "true", "cancel_handler has a bad entry, 'true': a rule is entries"),
        ("DETECT_AFTER", "25ms", "must be a number of seconds"),
        ("DETECT_AFTER", "0", "detect_after must be greater than 0"),
        ("BUFFER_LIMIT", "1MB", "must be a number of bytes"),
        ("BUFFER_LIMIT", "0", "buffer_limit must be at least 1 byte"),
        ("GRACE", "soon", "must be a number of seconds"),
        ("GRACE", "-1", "grace must be at least 0"),
        ("GRACE", "nan", "grace must be at least 0"),
        ("REQUEST_TIMEOUT", "5s", "must be a number of seconds"),
        ("REQUEST_TIMEOUT", "0", "request_timeout must be greater than 0 and finite, in seconds, got 0.0"),
        ("REQUEST_TIMEOUT", "inf", "request_timeout must be greater than 0 and finite, in seconds, got inf"),
        ("ON_EXIT", "stop", "on_exit must be one of 'cancel', 'wait', 'detach'"),
        ("SPAN", "1", "must be true or false"),
    ],
)
@pytest.mark.parametrize("wanted", [True, False])
def test_invalid_variable_ends_the_process(
    instrumentor: OtelTasksInstrumentor,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
    problem: str,
    wanted: bool,
) -> None:
    """The message has the variable's name and value; nothing has been changed."""
    monkeypatch.setenv(OPTION, str(wanted))
    monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(SystemExit) as caught:
        instrumentor.instrument()
    assert str(caught.value).startswith(f"otel_tasks cannot start with {PREFIX}{name}={value!r}: {problem}")
    assert not instrumentor.is_instrumented_by_opentelemetry


def test_options_without_the_middleware_are_warned_of(
    instrumentor: OtelTasksInstrumentor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A variable that nothing reads is named, with what is missing."""
    monkeypatch.setenv(f"{PREFIX}GRACE", "1")
    monkeypatch.setenv(f"{PREFIX}CANCEL_HANDLER", "all")
    instrumentor.instrument()

    assert caplog.messages == [
        f"{PREFIX}CANCEL_HANDLER, {PREFIX}GRACE has no effect: "
        f"the middleware is not requested, set {OPTION}=true"
    ]


def test_wrong_argument_is_named(instrumentor: OtelTasksInstrumentor) -> None:
    """An argument that is no bool is an error, and nothing has been changed."""
    with pytest.raises(TypeError, match="fastapi_middleware must be True or False, got 'false'"):
        instrumentor.instrument(fastapi_middleware="false")
    assert not instrumentor.is_instrumented_by_opentelemetry


def test_unknown_argument_is_named(
    instrumentor: OtelTasksInstrumentor, caplog: pytest.LogCaptureFixture
) -> None:
    """A misspelt option is warned of; what distributions pass to everybody is not."""
    instrumentor.instrument(fastapi_midleware=True, logger_provider=None)

    assert caplog.messages == [
        "instrument() does not know ['fastapi_midleware']; "
        "it takes tracer_provider, meter_provider, fastapi_middleware"
    ]


async def test_starlette_is_enough(
    instrumentor: OtelTasksInstrumentor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without FastAPI, the applications of Starlette get the middleware."""
    monkeypatch.setitem(sys.modules, "fastapi", None)
    instrumentor.instrument(fastapi_middleware=True)

    assert await answer_of(plain_shop()) == "GET /"
    instrumentor.uninstrument()
    assert await answer_of(plain_shop()) == "root"


def test_missing_starlette_is_named(
    instrumentor: OtelTasksInstrumentor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Starlette, the error says what to install, and it is one that is shown."""
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    with pytest.raises(ImportError, match=r"install otel-tasks\[fastapi\]") as caught:
        instrumentor.instrument(fastapi_middleware=True)
    assert type(caught.value) is ImportError
    instrumentor.instrument()


def test_second_start_changes_nothing(
    instrumentor: OtelTasksInstrumentor, caplog: pytest.LogCaptureFixture
) -> None:
    """As with every instrumentation, a second `instrument()` is warned of; the first can still be undone."""
    before = FastAPI.build_middleware_stack
    instrumentor.instrument(fastapi_middleware=True)
    instrumentor.instrument(fastapi_middleware=True)
    instrumentor.uninstrument()

    assert FastAPI.build_middleware_stack is before
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_entry_point_leads_to_the_instrumentor() -> None:
    """`opentelemetry-instrument` finds the class by what pyproject.toml says, under the package's name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    [(name, target)] = project["entry-points"]["opentelemetry_instrumentor"].items()

    module, _, cls = target.partition(":")
    assert name == "otel_tasks"
    assert module == instrumentation_module.__name__
    assert getattr(instrumentation_module, cls) is OtelTasksInstrumentor
    assert list(OtelTasksInstrumentor().instrumentation_dependencies()) == []
    assert any(
        need.startswith("opentelemetry-instrumentation>=")
        for need in project["optional-dependencies"]["instrument"]
    )


@pytest.mark.parametrize("code", python_blocks("docs/howto/zero-code.md"))
def test_blocks_of_the_page_run(code: str) -> None:
    """The page's Python blocks run, without a warning or a word on stderr."""
    assert run_block(code) == ""


def test_page_names_the_variable() -> None:
    """The page spells the environment variable as the code does."""
    assert f"{OPTION}=true" in (ROOT / "docs/howto/zero-code.md").read_text("utf-8")
