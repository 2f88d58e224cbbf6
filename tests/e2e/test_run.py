"""`run` in a process of its own: signals, exit codes, PID 1, and a loop that is held."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.blocks import ROOT
from tests.processes import marked_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.e2e]

CUT = "WARNING the shutdown of manager 'worker' cancelled 1 task: 'job-2'\n"
IN_ORDER = f"job 1 done\njob 2 cancelled\n{CUT}closed\n"


@contextmanager
def worker(how: str, *before: str) -> Iterator[subprocess.Popen[bytes]]:
    """The worker, once it is ready; killed at the end if it still runs."""
    process = subprocess.Popen(
        [*before, sys.executable, "-m", "tests.e2e.worker_app", how],
        cwd=ROOT,
        env=marked_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Unbuffered: communicate() does not return what readline() has read ahead.
        bufsize=0,
        # A shell that runs the tests in the background ignores SIGINT, and the worker would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def rest_of(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    """The exit code of the worker, and what else it prints."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out.decode(), err.decode()


@pytest.mark.parametrize("how", ["asyncio", "uvloop"])
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_a_worker_in_order(how: str, signum: int, code: int) -> None:
    """Jobs get their grace, the rest is cancelled and named, main closes last; there is no traceback."""
    with worker(how) as process:
        process.send_signal(signum)
        assert rest_of(process) == (code, IN_ORDER, "")


def test_second_signal_does_not_wait() -> None:
    """All jobs are cancelled immediately."""
    with worker("asyncio") as process:
        process.send_signal(signal.SIGTERM)
        # Two signals of one kind that arrive before the first is handled are one.
        process.send_signal(signal.SIGINT)
        code, out, err = rest_of(process)
    assert code in (130, 143)
    assert sorted(out.splitlines()[:2]) == ["job 1 cancelled", "job 2 cancelled"]
    assert err == ""


def test_third_signal_ends_a_process_whose_loop_is_held() -> None:
    """A task that never awaits keeps the loop from seeing the first two signals."""
    with worker("held") as process:
        for _ in range(100):
            process.send_signal(signal.SIGTERM)
            try:
                code, *_ = process.wait(timeout=0.3), None
            except subprocess.TimeoutExpired:
                continue
            break
    assert process.returncode == 143
    assert code == 143


def test_main_that_returns_ends_with_its_value() -> None:
    """The exit code is 0, and run() returns the value."""
    with worker("return") as process:
        assert rest_of(process) == (0, f"{IN_ORDER}returned\n", "")


def test_critical_service_ends_the_process() -> None:
    """The exit code is 1, and one line says why."""
    with worker("critical") as process:
        code, out, err = rest_of(process)
    assert (code, err) == (1, "")
    reason = (
        "CRITICAL critical service 'db' gave up (OSError: no route): the application ends with exit code 1"
    )
    assert out.count(reason) == 1
    assert out.endswith(IN_ORDER)


def test_worker_as_pid_1_ends_by_sigterm() -> None:
    """As PID 1, where signals have no default action, it behaves the same, as under `docker stop`."""
    unshare = shutil.which("unshare")
    namespace = (unshare or "", "--pid", "--fork", "--kill-child", "--mount-proc")
    if unshare is None or subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("this machine makes no namespaces of processes")
    with worker("asyncio", *namespace) as process:
        # unshare is its parent, outside of the namespace; it passes no signals on.
        children = f"/proc/{process.pid}/task/{process.pid}/children"
        with open(children) as listed:
            (child,) = listed.read().split()
        os.kill(int(child), signal.SIGTERM)
        assert rest_of(process) == (143, IN_ORDER, "")
