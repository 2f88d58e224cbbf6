"""otel-tasks as a person uses it: against a real server, in scripts, and in a terminal (tmux)."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.processes import free_port

from .servers import REPOSITORY, eventually
from .terminal_app import TOKEN

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

pytestmark = pytest.mark.e2e

HERE = Path(__file__).parent
COMMAND = [sys.executable, "-m", "otel_tasks_terminal"]
# A start of Textual, on a busy machine.
PATIENCE = 60.0
_numbers = itertools.count()


class Service:
    """The service, which can be stopped and started again at its port."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        # Where `top` keeps what is silenced.
        self._state = directory / "state"
        self._log = directory / "service.log"
        self._process: subprocess.Popen[bytes] | None = None

    def environment(self, view: str = "tasks", **more: str) -> dict[str, str]:
        """The environment of a client."""
        kept = {
            name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")
        }
        mine = {
            "OTEL_TASKS_URL": f"http://127.0.0.1:{self.port}/{view}",
            "OTEL_TASKS_TOKEN": TOKEN,
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONIOENCODING": "utf-8",
            "LC_ALL": "C.UTF-8",
            "XDG_STATE_HOME": str(self._state),
        }
        return kept | mine | more

    def start(self) -> None:
        """Start it, and wait until it listens."""
        command = [sys.executable, "-m", "uvicorn", "tests.e2e.terminal_app:app", "--port", str(self.port)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--no-access-log", "--timeout-graceful-shutdown", "1"],
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
            )
        eventually(self._listens, self._log.read_text, within=PATIENCE)

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        """Stop it as a deployment does; one that does not stop is killed."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(10)
            self._process = None


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service, running."""
    service = Service(tmp_path_factory.mktemp("service"))
    service.start()
    yield service
    service.stop()


@pytest.fixture
def own_service(tmp_path: Path) -> Iterator[Service]:
    """A service of this test alone, to be stopped."""
    service = Service(tmp_path)
    service.start()
    yield service
    service.stop()


def call(service: Service, *arguments: str, view: str = "tasks", **more: str) -> tuple[int, str, str]:
    """Run a command; return its exit code, and what it has printed."""
    return printed(arguments, service.environment(view, **more))


def printed(arguments: Sequence[str], environment: dict[str, str]) -> tuple[int, str, str]:
    """Run `otel-tasks`; return its exit code, and what it has printed."""
    result = subprocess.run(
        [*COMMAND, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )
    return result.returncode, result.stdout, result.stderr


# --- scripts ---------------------------------------------------------------------------------------


def test_tree_and_list_of_a_real_service(own_service: Service) -> None:
    """The stuck task, the queue, and their lines are in sight; nothing hostile is."""
    code, out, err = call(own_service, "tree")
    assert (code, err) == (0, "")
    assert re.search(r"◐ sync_mail HIGH .*cancelling [\d.]+ s · requested by Task-\d+: deploy", out)
    assert re.search(r"▸ import_user .30\s+30\s+28\s+2\s+0", out)

    code, out, err = call(own_service, "ls", "--status", "queued", "--json")
    assert (code, err, json.loads(out)["total"]) == (0, "", 28)
    code, out, _ = call(own_service, "ls", "img")
    assert code == 0
    assert "\x1b" not in out


def test_show_says_where_a_task_waits_and_why(service: Service) -> None:
    """Where it waits, and who asked it to stop."""
    code, out, _ = call(service, "show", "sync_mail")
    assert code == 0
    assert "terminal_app.py" in out
    assert re.search(r"requested by Task-\d+: deploy", out)
    assert "this task · not finished" in out
    assert call(service, "show", "nothing")[0] == 1


def test_cancel_with_its_exit_codes(service: Service) -> None:
    """Cancelled, still running, not allowed, read-only, and wrong token are told apart."""
    code, out, _ = call(service, "ls", "-q", "--status", "running", "import_user-0")
    uid = out.split()[0]
    assert code == 0
    assert call(service, "cancel", uid, "--yes", "--reason", "test") == (
        0,
        "import_user-0 was cancelled, and has ended\n",
        "",
    )
    code, out, _ = call(service, "cancel", uid, "--yes")
    assert (code, "had already ended: cancelled" in out) == (0, True)
    assert call(service, "cancel", "sync_mail", "--yes")[0] == 6
    code, _, err = call(service, "cancel", "render", "--yes")
    assert (code, "you may not cancel this task" in err) == (4, True)
    code, _, err = call(service, "cancel", "render", "--yes", view="read-only")
    assert (code, "read-only" in err) == (4, True)
    code, _, err = call(service, "ls", OTEL_TASKS_TOKEN="wrong-token")
    assert (code, "check OTEL_TASKS_TOKEN" in err, "wrong-token" in err) == (4, True, False)


def test_cancel_in_a_view_without_authentication(service: Service) -> None:
    """A view for this machine alone wants no token of the person."""
    code, out, err = call(service, "cancel", "import_user-5", "--yes", view="open", OTEL_TASKS_TOKEN="")
    assert (code, out, err) == (0, "import_user-5 was cancelled, and has ended\n", "")


def test_a_reader_that_leaves(service: Service) -> None:
    """`otel-tasks ls | head -1` ends without a traceback, and with the code of a closed pipe."""
    line = f"{shlex.join(COMMAND)} watch | head -1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(
        ["bash", "-c", line],
        env=service.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.stdout.splitlines()[-1] == "141"
    assert result.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(("redirected", "expected"), [("> /dev/full", 74), (">&-", 0), ("2>&-", 0)])
def test_output_that_cannot_be_written(service: Service, redirected: str, expected: int) -> None:
    """A full disk is named in one line; what goes to a closed stdout or stderr is dropped."""
    result = subprocess.run(
        ["bash", "-c", f"{shlex.join(COMMAND)} ls {redirected}"],
        env=service.environment(),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert result.returncode == expected
    assert "Traceback" not in result.stderr
    assert ("cannot write the output: No space left on device" in result.stderr) == (expected == 74)


def test_watch_ends_with_its_count(service: Service) -> None:
    """A real stream: three updates, one a second, then the end."""
    code, out, err = call(service, "watch", "--count", "3", "--json")
    assert (code, err) == (0, "")
    updates = [json.loads(line) for line in out.splitlines()]
    assert [update["kind"] for update in updates] == ["snapshot", "delta", "delta"]
    assert updates[2]["base"] == updates[1]["id"]


# --- a terminal ------------------------------------------------------------------------------------


class Terminal:
    """A tmux with one window."""

    def __init__(
        self, directory: Path, environment: dict[str, str], command: list[str], columns: int, lines: int
    ) -> None:
        self._socket = str(directory / f"tmux-{next(_numbers)}")
        self._environment = environment | {"TERM": "xterm-256color", "SHELL": "/bin/sh"}
        # What it printed last stays in sight, and the shell does not end with Ctrl-C either.
        shell = f"trap : INT; {shlex.join(command)}; echo exit=$?; exec sleep 600"
        self._tmux("-f", os.devnull, "new-session", "-d", "-x", str(columns), "-y", str(lines), shell)

    def _tmux(self, *arguments: str) -> str:
        result = subprocess.run(
            ["tmux", "-S", self._socket, *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=30,
            check=True,
        )
        return result.stdout

    def press(self, *keys: str) -> None:
        """Press keys, one after the other."""
        for key in keys:
            self._tmux("send-keys", key)
            # Esc and a key right after it are Alt and that key.
            time.sleep(0.4 if key == "Escape" else 0.05)

    def screen(self, *, colors: bool = False) -> str:
        """What is on the screen."""
        return self._tmux("capture-pane", "-p", *(["-e"] if colors else []))

    def wait_for(self, pattern: str) -> str:
        """Wait until something is on the screen."""
        eventually(
            lambda: re.search(pattern, self.screen()),
            lambda: f"no {pattern!r} in\n{self.screen()}",
            within=PATIENCE,
        )
        return self.screen()

    def resize(self, columns: int, lines: int) -> None:
        """Make the window another size."""
        self._tmux("resize-window", "-x", str(columns), "-y", str(lines))

    def close(self) -> None:
        """End it with all that runs in it."""
        self._tmux("kill-server")


@contextmanager
def terminal(
    service: Service, directory: Path, *arguments: str, columns: int = 120, lines: int = 40, **more: str
) -> Iterator[Terminal]:
    """A terminal that runs a command."""
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    # LC_ALL: tmux would take a terminal without UTF-8 otherwise.
    opened = Terminal(directory, service.environment(**more), [*COMMAND, *arguments], columns, lines)
    try:
        yield opened
    finally:
        opened.close()


def test_cancel_asks_on_a_terminal(service: Service, tmp_path: Path) -> None:
    """The question names the task, its id, and what else ends; anything but yes changes nothing."""
    with terminal(service, tmp_path, "cancel", "import_user-7") as tty:
        screen = tty.wait_for(r"\[y/N\]")
        assert "cancel import_user-7?" in screen
        assert "also ends  no other task" in screen
        tty.press("Enter")
        assert "nothing was cancelled" in tty.wait_for("exit=1")
    with terminal(service, tmp_path, "cancel", "import_user-7") as tty:
        tty.wait_for(r"\[y/N\]")
        tty.press("y", "Enter")
        assert "import_user-7 was cancelled, and has ended" in tty.wait_for("exit=0")


def test_colors_only_where_they_are_wanted(service: Service, tmp_path: Path) -> None:
    """A terminal gets colors, unless NO_COLOR is set."""
    for number, (value, colored) in enumerate([("", True), ("1", False)]):
        directory = tmp_path / str(number)
        directory.mkdir()
        with terminal(service, directory, "ls", "--limit", "3", NO_COLOR=value) as tty:
            tty.wait_for("exit=0")
            assert ("\x1b[38;5;" in tty.screen(colors=True)) is colored


def test_the_locale_c_gets_ascii(service: Service, tmp_path: Path) -> None:
    """Python writes UTF-8 there; the terminal need not understand it."""
    with terminal(service, tmp_path, "tree", LC_ALL="", LANG="C") as tty:
        screen = tty.wait_for("exit=0")
        assert "~ sync_mail HIGH" in screen
        assert screen.isascii()


def test_a_narrow_terminal_says_what_tasks_do(service: Service, tmp_path: Path) -> None:
    """At 80 columns, it follows the name of the task, and no column is cut to nothing."""
    with terminal(service, tmp_path, "tree", columns=80) as tty:
        screen = tty.wait_for("exit=0")
        assert re.search(r"◐ sync_mail HIGH  cancelling .* s · requested by Task-\d+: deploy", screen)
        assert re.search(r"^NAME +COUNT +AGE$", screen, re.MULTILINE)


def test_lines_fit_a_narrow_terminal(service: Service, tmp_path: Path) -> None:
    """No line wraps: each task has one line, on 40 columns too."""
    with terminal(service, tmp_path, "ls", "--limit", "5", columns=40) as tty:
        lines = tty.wait_for("exit=0").splitlines()
        (first,) = [number for number, line in enumerate(lines) if line.startswith("STATUS")]
        assert all(re.match("[○▶◐] ", line) for line in lines[first + 1 : first + 6])


def test_watch_follows_the_size_of_the_terminal(service: Service, tmp_path: Path) -> None:
    """What does not fit is counted."""
    with terminal(service, tmp_path, "watch", columns=100) as tty:
        tty.wait_for(r"◐ sync_mail HIGH .*cancelling")
        tty.resize(60, 9)
        tty.wait_for(r"… \d+ more lines")


def test_watch_survives_a_restart(own_service: Service, tmp_path: Path) -> None:
    """While the service is away, the screen says that it is old. Ctrl-C leaves a clean terminal."""
    with terminal(own_service, tmp_path, "watch", columns=100) as tty:
        tty.wait_for(r"◐ sync_mail HIGH .*cancelling")
        own_service.stop()
        tty.wait_for("! stale for .* reconnecting")
        own_service.start()
        tty.wait_for("can cancel")
        tty.press("C-c")
        assert "sync_mail" not in tty.wait_for("exit=130")


# --- top -------------------------------------------------------------------------------------------


def test_top_finds_and_cancels_a_task_with_the_keyboard(service: Service, tmp_path: Path) -> None:
    """From the first screen to the task, its panel, and its cancel: no mouse, no id typed."""
    with terminal(service, tmp_path, "top", columns=140) as tty:
        screen = tty.wait_for(r"◐ sync_mail HIGH +cancelling")
        assert "● live 1 s  can cancel" in screen
        assert re.search(r"import_user .\d+", screen)
        tty.press("/")
        tty.wait_for("filter by name")
        tty.press(*"user-9", "Enter")
        tty.wait_for(r"filter 'user-9' · 1 live ")
        tty.press("l")
        screen = tty.wait_for("waits for a slot")
        tty.wait_for(r"Task id +import_user-9")
        tty.press("x")
        screen = tty.wait_for("also ends  no other task")
        assert "Cancel import_user-9?" in screen
        tty.press("Enter")
        tty.wait_for("The task was cancelled and has ended")
        tty.press("Escape", "Escape", "Escape")
        tty.wait_for(r"▾ default")
        tty.press("q")
        tty.wait_for("exit=0")
    code, out, _ = call(service, "show", "import_user-9")
    assert (code, "requested by ada" in out) == (0, True)


def test_top_keys(service: Service, tmp_path: Path) -> None:
    """Each view has its key, and Esc leads back."""
    with terminal(service, tmp_path, "top", columns=130) as tty:
        tty.wait_for(r"◐ sync_mail HIGH")
        tty.press("?")
        tty.wait_for("tree, or flat list of the oldest")
        tty.press("Escape", "t")
        tty.wait_for("the 50 oldest tasks")
        tty.press("t", "n", "l")
        tty.wait_for(r"Why it is cancelled")
        tty.press("w")
        tty.wait_for(r"waiting at .*:\d+ · \d+ live")
        tty.press("Escape", "Escape", "e")
        tty.wait_for("ended, newest first")
        tty.press("Escape", "n", "g")
        tty.wait_for(r"timeline of mail · \d+ live")
        assert re.search(r"◐ sync_mail +.*╍▸", tty.screen())
        tty.press("g")
        tty.wait_for("sorted by status")
        tty.press("Escape", "s")
        tty.wait_for("sorted by age")
        tty.press("Space")
        tty.wait_for(r"paused · \d+ changes? waiting")
        tty.press("Space")
        tty.wait_for("● live 1 s")
        tty.press("C-c")
        tty.wait_for("exit=130")


def test_top_survives_a_restart(own_service: Service, tmp_path: Path) -> None:
    """While the service is away, the screen looks old, keeps its rows, and cancels nothing."""
    with terminal(own_service, tmp_path, "top", columns=130) as tty:
        tty.wait_for(r"◐ sync_mail HIGH")
        own_service.stop()
        assert "sync_mail" in tty.wait_for("! stale for .* reconnecting")
        tty.press("n", "x")
        tty.wait_for("The server does not answer")
        own_service.start()
        tty.wait_for("● live 1 s")
        tty.resize(60, 16)
        tty.wait_for(r"import_user .\d+")
        tty.press("q")
        tty.wait_for("exit=0")


def test_top_waits_for_a_service_that_does_not_run_yet(own_service: Service, tmp_path: Path) -> None:
    """It may be started first; one that refuses ends it with the reason."""
    own_service.stop()
    with terminal(own_service, tmp_path, "top") as tty:
        tty.wait_for("! no connection · cannot reach")
        own_service.start()
        tty.wait_for(r"◐ sync_mail HIGH")
    with terminal(own_service, tmp_path, "top", OTEL_TASKS_TOKEN="wrong-token") as tty:
        screen = tty.wait_for("exit=4")
        assert "does not accept the token" in screen
        assert "wrong-token" not in screen


def test_top_needs_a_terminal(service: Service) -> None:
    """In a pipe, it names the commands that work there."""
    code, _, err = call(service, "top")
    assert (code, "otel-tasks tree and watch work without" in err) == (2, True)
