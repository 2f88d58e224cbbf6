"""A small service under each vendor's telemetry, in an environment of its own and without an account."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from examples.otlp_receiver import receiver

if TYPE_CHECKING:
    from collections.abc import Iterator

    from examples.otlp_receiver import Received

ROOT = Path(__file__).parents[2]
SHOP = Path(__file__).parent / "vendors"
PATIENCE = 30.0
LISTENING = re.compile(r"running on (http://[\w.:]+)")
TROUBLE = re.compile(r"error|warning|critical|traceback|exception", re.IGNORECASE)


@dataclass(frozen=True)
class Vendor:
    """How a vendor's telemetry is started, and what it shows.

    Args:
        name: As in `vendors/shop.py`.
        group: The dependency group with its package.
        command: Its documentation puts this before the server's command.
        environment: Its settings.
        shows: Where the spans can be seen: `otlp`, `kept` by the app, or None.
        sees_tasks: It provides a tracer, so that tasks have spans.
        says: What it is known to make the library log, each once.
        chatter: What it is known to log itself.
    """

    name: str
    group: str
    command: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    shows: str | None = "otlp"
    sees_tasks: bool = True
    says: tuple[str, ...] = ()
    chatter: str = "$^"


NEW_RELIC = {
    "NEW_RELIC_LICENSE_KEY": "0" * 40,
    "NEW_RELIC_APP_NAME": "shop",
    # Sends no reports.
    "NEW_RELIC_DEVELOPER_MODE": "true",
    "NEW_RELIC_LOG": "stderr",
    "NEW_RELIC_LOG_LEVEL": "warning",
}
VENDORS = [
    Vendor("distro", "vendor-distro", ("opentelemetry-instrument",)),
    Vendor("elastic-otel", "vendor-elastic-otel", ("opentelemetry-instrument",)),
    Vendor("logfire", "vendor-logfire"),
    Vendor(
        "datadog",
        "vendor-datadog",
        ("ddtrace-run",),
        {
            "DD_TRACE_OTEL_ENABLED": "true",
            "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false",
            "DD_REMOTE_CONFIGURATION_ENABLED": "false",
        },
        shows="kept",
    ),
    Vendor("newrelic", "vendor-newrelic", ("newrelic-admin", "run-program"), NEW_RELIC, shows=None),
    Vendor(
        "newrelic-otel",
        "vendor-newrelic",
        ("newrelic-admin", "run-program"),
        NEW_RELIC | {"NEW_RELIC_OPENTELEMETRY_ENABLED": "true"},
        shows=None,
    ),
    Vendor("elastic", "vendor-elastic", shows="kept", sees_tasks=False),
    Vendor(
        "elastic-bridge",
        "vendor-elastic",
        shows="kept",
        says=(
            "starting a span for task 'quote' raised; further ones are not logged",
            "OpenTelemetry raised while adding an event to a task's span; "
            "further errors of this kind are not logged",
        ),
        chatter="record_exception was set to False|Remote context included",
    ),
    Vendor("sentry", "vendor-sentry", shows="kept", sees_tasks=False),
    Vendor("sentry-otlp", "vendor-sentry"),
]


@dataclass
class Run:
    """What came of a service that was asked three times, was hung up on once, and has ended."""

    vendor: Vendor
    answer: dict[str, int]
    tasks: dict[str, str]
    spans: list[tuple[str, str, str | None]]
    log: str
    status: int
    in_transaction: dict[str, bool] | None

    def parents(self, name: str) -> list[str]:
        """The names of what is above the one span of that name, nearest first."""
        by_id = {span_id: (known, parent) for known, span_id, parent in self.spans}
        ((_, parent),) = [span for span in by_id.values() if span[0] == name]
        above = []
        while parent is not None and parent in by_id:
            known, parent = by_id[parent]
            above.append(known)
        return above


@pytest.fixture(scope="module", params=VENDORS, ids=lambda vendor: vendor.name)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The service under one vendor, asked and ended."""
    vendor: Vendor = request.param
    binaries = environment_of(vendor.group)
    log = tmp_path_factory.mktemp(vendor.name) / "log"
    with receiver() as received:
        with service(vendor, binaries, received.endpoint, log) as (url, process):
            answer = httpx.get(f"{url}/basket/lamp", timeout=PATIENCE).raise_for_status().json()
            with pytest.raises(httpx.ReadTimeout):
                httpx.get(f"{url}/slow/sofa", timeout=0.5)
            tasks = wait_for_the_end(url)
            seen = httpx.get(f"{url}/transaction") if "newrelic" in vendor.name else None
            kept = httpx.get(f"{url}/debug/spans").json()
        spans = [tuple(span) for span in kept] if vendor.shows == "kept" else exported(received)
    in_transaction = None if seen is None else seen.raise_for_status().json()
    return Run(vendor, answer, tasks, spans, log.read_text("utf-8"), process.returncode, in_transaction)


@contextlib.contextmanager
def service(
    vendor: Vendor, binaries: Path, endpoint: str, log: Path
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The service's address, until the block is left; then it is asked to end, and has ended."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "PYTHON"))}
    telemetry = {
        "OTEL_SERVICE_NAME": "shop",
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_LOGS_EXPORTER": "none",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    command = [
        *vendor.command,
        "uvicorn",
        "shop:app",
        "--app-dir",
        str(SHOP),
        "--port",
        "0",
        "--no-access-log",
    ]
    command = [str(binaries / part) if (binaries / part).exists() else part for part in command]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=clean | telemetry | vendor.environment | {"VENDOR": vendor.name},
            cwd=log.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield wait_for_url(process, log), process
        # For the last batch: uvicorn ends by the signal, and Python runs nothing at exit.
        time.sleep(1.0)
        process.terminate()
        process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()


def wait_for_url(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        if found := LISTENING.search(log.read_text("utf-8")):
            return found[1]
        time.sleep(0.05)
    raise AssertionError("the service did not start:\n" + log.read_text("utf-8"))


def wait_for_the_end(url: str) -> dict[str, str]:
    """What became of the tasks, once all have ended."""
    end = time.monotonic() + PATIENCE
    while True:
        tasks: dict[str, str] = httpx.get(f"{url}/debug/tasks").json()
        if not {"running", "cancelling"} & set(tasks.values()) or time.monotonic() > end:
            return tasks
        time.sleep(0.05)


def exported(received: Received) -> list[tuple[str, str, str | None]]:
    return [(span.name, span.span_id, span.parent_id) for span in received.spans()]


def environment_of(group: str) -> Path:
    """Where the programs of a dependency group's own environment are; it is rebuilt when pins change."""
    place = ROOT / f".venv-{group}"
    mark = place / ".ready"
    pins = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + sys.version.encode()).hexdigest()
    if not mark.exists() or mark.read_text() != pins:
        shutil.rmtree(place, ignore_errors=True)
        python = str(place / "bin" / "python")
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for command in (
            [sys.executable, "-m", "venv", str(place)],
            [*install, "--upgrade", "pip>=25.1"],
            [*install, "--group", group, "--editable", "."],
        ):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}{done.stderr}"
        mark.write_text(pins)
    return place / "bin"


# -- what holds under every vendor -------------------------------------------------------------------------


def test_service_starts_and_answers(run: Run) -> None:
    """The service answers, its tasks have ended, and it ends when it is asked to."""
    assert run.answer == {"lamp": 39}
    assert (run.tasks["price"], run.tasks["quote"]) == ("completed", "completed")
    assert run.status in (0, -15)


def test_hang_up_cancels_the_task(run: Run) -> None:
    """A client that leaves stops its request's task, and the task says why."""
    assert run.tasks["calculate"] == "cancelled: client_disconnect"


def test_nothing_goes_wrong(run: Run) -> None:
    """Neither the vendor nor the library logs an error or a warning, except what is known of the vendor."""
    log = run.log
    for known in run.vendor.says:
        assert log.count(known) == 1, log
        # With the traceback that belongs to it.
        log = re.sub(rf"{re.escape(known)}\nTraceback \(.*\n(?:  .*\n)*.*\n", "", log)
    lines = [line for line in log.splitlines() if not re.match(run.vendor.chatter, line)]
    assert [line for line in lines if TROUBLE.search(line)] == [], log


def test_spans_nest(run: Run) -> None:
    """Where the vendor lets one see its spans: task below task, below the request."""
    if run.vendor.shows is None:
        pytest.skip(f"{run.vendor.name} shows no spans without an account")
    requests = [span for span in run.spans if "/basket/{item}" in span[0]]
    assert requests, run.spans
    if not run.vendor.sees_tasks:
        return
    assert any("/basket/{item}" in name for name in run.parents("price")), run.spans
    assert any("/slow/{item}" in name for name in run.parents("calculate")), run.spans
    if run.vendor.name != "elastic-bridge":
        assert run.parents("quote")[:2] == ["price", run.parents("price")[0]], run.spans


def test_transaction_is_current_in_a_task(run: Run) -> None:
    """An agent that knows its transaction by the task it runs in finds it in a managed task."""
    if run.in_transaction is None:
        pytest.skip(f"{run.vendor.name} finds it by context variables")
    assert run.in_transaction["plain"]
    if not run.in_transaction["managed"]:
        pytest.xfail("its patch of the loop's create_task() is not asked for managed tasks")
