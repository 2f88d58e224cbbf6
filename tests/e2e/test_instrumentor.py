"""`opentelemetry-instrument`, in a separate process, on an unchanged application."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.processes import free_port

from .servers import DEADLINE, REPOSITORY, START_DEADLINE, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]

Span = dict[str, Any]

OPTION = "OTEL_PYTHON_OTEL_TASKS_FASTAPI_MIDDLEWARE"
# Of which the numbers differ from one run to the next.
VOLATILE = ("port", "duration", "trace_id")


class Shop:
    """The application in a server, and afterwards the spans that it has written."""

    def __init__(self, directory: Path, command: list[str], **environment: str) -> None:
        self.port = free_port()
        self._out = directory / "out"
        self._log = directory / "log"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
        path = [str(directory.parent), str(REPOSITORY), inherited.pop("PYTHONPATH", "")]
        server = ["--host", "127.0.0.1", "--port", str(self.port), "--no-access-log", "--no-use-colors"]
        with self._out.open("wb") as out, self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, *server],
                cwd=directory,
                env={
                    **inherited,
                    "PYTHONPATH": os.pathsep.join(part for part in path if part),
                    "OTEL_METRICS_EXPORTER": "none",
                    "OTEL_LOGS_EXPORTER": "none",
                    "OTEL_TRACES_EXPORTER": "console",
                    **environment,
                },
                stdout=out,
                stderr=log,
            )

    @property
    def log(self) -> str:
        return self._log.read_text("utf-8")

    def wait_until_up(self) -> None:
        """Wait until it answers."""

        def answers() -> bool:
            assert self._process.poll() is None, self.log
            try:
                return bool(self.get("/live") == [])
            except OSError:
                return False

        eventually(answers, lambda: self.log, within=START_DEADLINE)

    def wait_until_idle(self) -> None:
        """Wait until no task is live."""
        eventually(lambda: self.get("/live") == [], lambda: self.log)

    def get(self, path: str) -> Any:
        """The JSON of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)
        try:
            connection.request("GET", path)
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def post(self, path: str) -> int:
        """The status of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)
        try:
            connection.request("POST", path)
            return connection.getresponse().status
        finally:
            connection.close()

    def hang_up(self, path: str) -> None:
        """Ask, and leave when the task of the request runs."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE) as client:
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: shop\r\n\r\n".encode())
            eventually(lambda: self.get("/live") == ["slow"], lambda: self.log)

    def leave(self, path: str) -> None:
        """Post, and leave when the handler runs."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE) as client:
            client.sendall(f"POST {path} HTTP/1.1\r\nHost: shop\r\nContent-Length: 0\r\n\r\n".encode())
            eventually(lambda: path in self.get("/live"), lambda: self.log)

    def be_used(self) -> None:
        """One request of each kind; the last client leaves."""
        assert self.get("/basket") == {"total": 11, "group": "GET /basket"}
        self.wait_until_idle()
        assert self.get("/group") == {"outcome": "no price"}
        self.hang_up("/slow")
        self.wait_until_idle()

    def end(self) -> list[Span]:
        """End it as Ctrl+C does, and give the spans that it has written."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(DEADLINE)
        assert "Traceback" not in self.log, self.log
        return list(spans_in(self._out.read_text("utf-8")))

    def kill(self) -> None:
        """Whatever becomes of the test."""
        self._process.kill()
        self._process.wait(DEADLINE)


def spans_in(text: str) -> Iterator[Span]:
    """The JSON objects that the console exporter writes one behind the other."""
    decoder = json.JSONDecoder()
    place = text.find("{")
    while place >= 0:
        span, end = decoder.raw_decode(text, place)
        yield span
        place = text.find("{", end)


def story(spans: list[Span], port: int) -> list[Any]:
    """What is to be the same: all but ids, times and ports, without what the waiting itself has left."""
    names = {span["context"]["span_id"]: span["name"] for span in spans}
    waiting = {span["context"]["trace_id"] for span in spans if "/live" in span["name"]}
    own = [span for span in spans if span["context"]["trace_id"] not in waiting]
    facts = [
        [
            span["name"],
            names.get(span["parent_id"]),
            span["kind"],
            span["status"],
            {
                key: names.get(f"0x{value}", str(value).replace(str(port), "PORT"))
                for key, value in sorted(span["attributes"].items())
                if not any(word in key for word in VOLATILE)
            },
            [event["name"] for event in span["events"]],
            [[names.get(link["context"]["span_id"]), link["attributes"]] for link in span["links"]],
        ]
        for span in own
    ]
    return sorted(facts, key=repr)


def tasks_of(spans: list[Span]) -> dict[str, Span]:
    """The spans of tasks by their name."""
    return {span["name"]: span for span in spans if "otel_tasks.task.id" in span["attributes"]}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where the package is installed as pyproject.toml says it now, be the environment older."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    metadata = tmp_path / "otel_tasks-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: otel-tasks\nVersion: {project['version']}\n"
    )
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def start(directory: Path) -> Iterator[Any]:
    """Starts servers, each in a directory of its own, and ends them."""
    shops: list[Shop] = []
    bin_directory = Path(sys.executable).parent

    def start_shop(*, instrumented: bool, **environment: str) -> Shop:
        # opentelemetry-instrument looks its command up.
        environment["PATH"] = os.pathsep.join([str(bin_directory), os.environ["PATH"]])
        name = "shop" if instrumented else "shop_by_hand"
        command = [str(bin_directory / "uvicorn"), f"tests.e2e.{name}:app"]
        if instrumented:
            command = [str(bin_directory / "opentelemetry-instrument"), "uvicorn", *command[1:]]
        own = directory / str(len(shops))
        own.mkdir()
        shop = Shop(own, command, **environment)
        shops.append(shop)
        shop.wait_until_up()
        return shop

    yield start_shop
    for shop in shops:
        shop.kill()


@pytest.mark.parametrize("middleware", ["true", "false"])
@pytest.mark.parametrize("server_spans", ["native", "contrib"])
def test_same_spans_as_of_an_app_set_up_by_hand(start: Any, server_spans: str, middleware: str) -> None:
    """Names, parents, attributes, statuses, links: all is as if the app had been set up line by line."""
    stories = []
    disabled = "fastapi" if server_spans == "native" else ""
    for environment in (
        {"instrumented": False, "SERVER_SPANS": server_spans, "WITH_MIDDLEWARE": middleware},
        {"instrumented": True, OPTION: middleware, "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": disabled},
    ):
        shop = start(**environment)
        if middleware == "true":
            shop.be_used()
        else:
            shop.get("/basket")
            shop.wait_until_idle()
        spans = shop.end()
        stories.append(story(spans, shop.port))

    by_hand, instrumented = stories
    assert instrumented == by_hand
    tasks = tasks_of(spans)
    assert {"price-of-apples", "price-of-pears", "mail"} <= tasks.keys()
    group = tasks["price-of-apples"]["attributes"]["otel_tasks.group.name"]
    assert group == ("GET /basket" if middleware == "true" else "root")
    if middleware == "true":
        assert tasks["slow"]["attributes"]["otel_tasks.cancel.reason"] == "client_disconnect"
        assert tasks["patient"]["attributes"]["otel_tasks.cancel.reason"] == "sibling_failed"


def test_disabled_sdk_means_no_spans_and_the_same_behavior(start: Any) -> None:
    """With `OTEL_SDK_DISABLED=true` nothing is traced, and a disconnect still stops the work."""
    shop = start(instrumented=True, OTEL_SDK_DISABLED="true", **{OPTION: "true"})
    shop.be_used()

    assert shop.end() == []


def test_disabled_instrumentation_means_no_spans_of_tasks(start: Any) -> None:
    """Named in `OTEL_PYTHON_DISABLED_INSTRUMENTATIONS`: no spans but the server's, and no middleware."""
    shop = start(
        instrumented=True, OTEL_PYTHON_DISABLED_INSTRUMENTATIONS="httpx, otel_tasks", **{OPTION: "true"}
    )
    assert shop.get("/basket") == {"total": 11, "group": "root"}
    spans = shop.end()

    assert tasks_of(spans) == {}
    assert "GET /basket" in {span["name"] for span in spans}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FASTAPI_MIDDLEWARE", "yes"),
        ("CANCEL_HANDLER", "safe, POTS"),
        ("GRACE", "1s"),
        ("REQUEST_TIMEOUT", "0"),
    ],
)
def test_invalid_variable_stops_the_start(directory: Path, name: str, value: str) -> None:
    """`opentelemetry-instrument` ends with an error that names the variable; the application never starts."""
    variable = f"OTEL_PYTHON_OTEL_TASKS_{name}"
    bin_directory = Path(sys.executable).parent
    inherited = {key: text for key, text in os.environ.items() if not key.startswith("OTEL_")}
    done = subprocess.run(
        [str(bin_directory / "opentelemetry-instrument"), "python", "-c", "print('started')"],
        env={
            **inherited,
            "PATH": os.pathsep.join([str(bin_directory), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(directory), str(REPOSITORY)]),
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_LOGS_EXPORTER": "none",
            "OTEL_TRACES_EXPORTER": "none",
            OPTION: "true",
            variable: value,
        },
        capture_output=True,
        text=True,
        timeout=START_DEADLINE,
    )
    assert done.returncode != 0
    assert done.stdout == ""
    assert f"otel_tasks cannot start with {variable}={value!r}: " in done.stderr


@pytest.fixture
def start_plain(directory: Path) -> Iterator[Any]:
    """Starts an app of Starlette that was not changed, with the middleware, and ends it."""
    bin_directory = Path(sys.executable).parent
    shops: list[Shop] = []

    def start(**options: str) -> Shop:
        variables = {f"OTEL_PYTHON_OTEL_TASKS_{option}": value for option, value in options.items()}
        shop = Shop(
            directory,
            [str(bin_directory / "opentelemetry-instrument"), "uvicorn", "tests.e2e.plain_shop:app"],
            PATH=os.pathsep.join([str(bin_directory), os.environ["PATH"]]),
            **{OPTION: "true"},
            **variables,
        )
        shops.append(shop)
        shop.wait_until_up()
        return shop

    yield start
    for shop in shops:
        shop.kill()


def test_environment_decides_about_the_handlers_of_a_starlette_app(start_plain: Any) -> None:
    """An app of Starlette that was not changed stops the POST that the rule names, and finishes the other."""
    shop = start_plain(CANCEL_HANDLER="safe, POST /v1/*, !POST /v1/batches*")
    for path in ("/v1/chat", "/v1/batches", "/other"):
        shop.leave(path)
    eventually(lambda: len(shop.get("/ended")) == 3, lambda: shop.log)
    assert shop.get("/ended") == {"/v1/chat": "cancelled", "/v1/batches": "finished", "/other": "finished"}


def test_environment_bounds_the_time_of_a_request(start_plain: Any) -> None:
    """The client of a request that takes longer gets a 504, and its handler is cancelled, a POST too."""
    shop = start_plain(REQUEST_TIMEOUT="0.2")
    assert shop.post("/orders") == http.HTTPStatus.GATEWAY_TIMEOUT
    assert shop.get("/ended") == {"/orders": "cancelled"}
