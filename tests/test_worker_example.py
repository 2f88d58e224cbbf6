"""The parts of `examples/worker`: see `tests/e2e/test_worker.py` for the process."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from examples.worker.__main__ import GRACE, SHUTDOWN_TIMEOUT
from examples.worker.health import respond
from examples.worker.spool import Job, Spool
from otel_tasks._core.run import _FLUSH
from tests.blocks import ROOT

if TYPE_CHECKING:
    from pathlib import Path

CHECKS = {"/livez": lambda: "", "/readyz": lambda: "rates gave up"}


def answer(request: str) -> tuple[int, dict[str, str], str]:
    """The status, header, and body of the response; the text of a request has no carriage returns."""
    head = request.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n"
    lines, _, body = respond(head, CHECKS).decode().partition("\r\n\r\n")
    status_line, *fields = lines.split("\r\n")
    (status,) = re.findall(r"HTTP/1\.1 (\d{3}) [A-Z][\w ]+", status_line)
    return int(status), dict(field.split(": ", 1) for field in fields), body


@pytest.mark.parametrize(
    "request_line",
    [
        "GET /livez HTTP/1.1",
        "GET /livez?verbose=1 HTTP/1.1",
        "GET http://pod:8080/livez HTTP/1.1",
        "GET /livez HTTP/1.7",
    ],
)
def test_check_without_complaint_is_200(request_line: str) -> None:
    """A query, the form for proxies, and a later minor version change nothing."""
    status, header, body = answer(f"{request_line}\nHost: pod:8080\nUser-Agent: kube-probe/1.34")
    assert (status, body) == (200, "ok\n")
    assert header["Content-Length"] == "3"
    assert header["Connection"] == "close"
    assert header["Date"].endswith(" GMT")


def test_check_with_complaint_is_503_and_says_why() -> None:
    """The body is what `kubectl describe pod` shows."""
    status, header, body = answer("GET /readyz HTTP/1.1\nHost: pod")
    assert (status, body) == (503, "rates gave up\n")
    assert header["Content-Length"] == "14"


def test_head_gets_the_header_alone() -> None:
    """It has the length of the body that GET would get."""
    status, header, body = answer("HEAD /readyz HTTP/1.1\nHost: pod")
    assert (status, header["Content-Length"], body) == (503, "14", "")


def test_http_1_0_needs_no_host() -> None:
    """Older load balancers probe with it."""
    assert answer("GET /livez HTTP/1.0")[0] == 200


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        ("GET /metrics HTTP/1.1\nHost: pod", 404),
        ("GET http://[ HTTP/1.1\nHost: pod", 404),
        ("OPTIONS * HTTP/1.1\nHost: pod", 404),
        ("POST /livez HTTP/1.1\nHost: pod\nContent-Length: 5", 405),
        ("GET /livez HTTP/2.0\nHost: pod", 505),
        ("GET /livez HTTP/1.1", 400),
        ("GET /livez HTTP/1.1\nHost: pod\nHost: other", 400),
        ("GET /livez HTTP/1.0\nHost: pod\nHost: other", 400),
        ("GET /livez", 400),
        ("GET  /livez HTTP/1.1\nHost: pod", 400),
        ("GET /livez HTTP/1.1\nHost : pod", 400),
        ("GET /livez HTTP/1.1\nHost: pod\n folded: line", 400),
        ("\x16\x03\x01\x02", 400),
        ("", 400),
    ],
)
def test_bad_requests_are_refused(request_text: str, status: int) -> None:
    """Each gets the status that RFC 9110 and RFC 9112 name."""
    assert answer(request_text)[0] == status


def test_refused_method_names_those_that_are_allowed() -> None:
    """A 405 must have an Allow field."""
    assert answer("DELETE /livez HTTP/1.1\nHost: pod")[1]["Allow"] == "GET, HEAD"


# -- the queue of files ------------------------------------------------------------------------------------


async def test_spool_gives_jobs_in_their_order_and_takes_them_back(tmp_path: Path) -> None:
    """A job that is put back is the oldest again; a finished one is gone."""
    spool = Spool(tmp_path)
    ids = [spool.submit({"price": n}) for n in range(3)]
    first = await spool.get()
    assert first == Job(ids[0], {"price": 0})
    spool.finish(await spool.get())
    spool.put_nowait(first)
    assert spool.qsize() == 2
    assert [(await Spool(tmp_path).get()).id for _ in range(1)] == [ids[0]]
    assert spool.recover() == 1


async def test_spool_waits_for_a_job_of_another_process(tmp_path: Path) -> None:
    """It looks again every `poll` seconds, and skips a file that is gone since the last look."""
    spool, producer = Spool(tmp_path), Spool(tmp_path)
    producer.submit({})
    taken = producer.submit({})
    spool.finish(await spool.get())
    os.unlink(tmp_path / "new" / taken)
    late = producer.submit({"late": True})
    assert await spool.get() == Job(late, {"late": True})


@pytest.mark.parametrize("text", ["", "{", "[1]", "\N{SNOWMAN}"])
async def test_file_that_is_no_order_is_a_job_that_fails(tmp_path: Path, text: str) -> None:
    """It has no fields, so that its handler fails and buries it."""
    spool = Spool(tmp_path)
    (tmp_path / "new" / "1").write_text(text, "utf-8")
    assert await spool.get() == Job("1", {})


# -- the container -----------------------------------------------------------------------------------------


def test_grace_period_of_the_container_covers_all_bounds() -> None:
    """Kubernetes and Compose wait for what the worker may take, and for the SDK's exit hook."""
    blocks = re.findall(
        r"^```yaml\n(.*?)^```",
        (ROOT / "docs/howto/kubernetes.md").read_text("utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    # Not the worker of Taskiq.
    (worker,) = [text for text in blocks if "name: worker" in text and "taskiq" not in text]
    pod: dict[str, Any] = yaml.safe_load(worker)["spec"]["template"]["spec"]
    compose: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
    # run() waits five times for SHUTDOWN_TIMEOUT; the exporter's own limit is 10 s.
    most = GRACE + 5 * SHUTDOWN_TIMEOUT + _FLUSH + 10
    assert most < pod["terminationGracePeriodSeconds"] <= most + 15
    assert compose["services"]["worker"]["stop_grace_period"] == f"{pod['terminationGracePeriodSeconds']}s"


def test_image_copies_what_exists_and_runs_without_root() -> None:
    """Each source of a COPY is in the repository, the user is a number, and the command needs no shell."""
    lines = (ROOT / "examples/worker/Dockerfile").read_text("utf-8").splitlines()
    sources = [
        word
        for line in lines
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    ]
    assert sources
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert [line for line in lines if line.startswith("USER ")] == ["USER 65534:65534"]
    assert lines[-1] == 'CMD ["python", "-m", "examples.worker"]'
