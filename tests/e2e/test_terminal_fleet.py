"""otel-tasks --fleet as a person uses it: a real Redis, two workers without HTTP, scripts, and a terminal."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.redis_server import redis_in, running

from .servers import REPOSITORY, eventually
from .test_live_terminal import COMMAND, PATIENCE, Terminal, printed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tests.redis_server import Redis

pytestmark = pytest.mark.e2e

# A node that was killed leaves the roster 30 s after its last sign of life.
GONE = 60.0


class Worker:
    """One process of the fleet."""

    def __init__(self, url: str, namespace: str, name: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.fleet_node_app", name],
            cwd=REPOSITORY,
            env={**os.environ, "FLEET_URL": url, "FLEET_NAMESPACE": namespace, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.node = self.process.stdout.readline().strip()
        assert self.node

    @property
    def short(self) -> str:
        """Its host and its process."""
        return self.node.rpartition("/")[0]

    def close(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Shop:
    """A fleet of two workers, and how commands reach it."""

    def __init__(self, redis: Redis, directory: Path, workers: Sequence[str] = "ab") -> None:
        self.redis = redis
        self._directory = directory
        self.workers = [Worker(redis.url, "shop", name) for name in workers]

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of a command, which reports what it leaves behind."""
        dropped = ("NO_COLOR", "COLUMNS", "LINES", "OTEL_TASKS_URL", "OTEL_TASKS_TOKEN")
        return {name: value for name, value in os.environ.items() if name not in dropped} | {
            "OTEL_TASKS_FLEET": self.redis.url,
            "OTEL_TASKS_NAMESPACE": "shop",
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONIOENCODING": "utf-8",
            "PYTHONWARNINGS": "error",
            "LC_ALL": "C.UTF-8",
            "XDG_STATE_HOME": str(self._directory / "state"),
            **more,
        }

    def call(self, *arguments: str, **more: str) -> tuple[int, str, str]:
        """Run a command; return its exit code, and what it has printed."""
        return printed(arguments, self.environment(**more))

    def json(self, *arguments: str) -> Any:
        """The JSON that a command prints."""
        code, out, err = self.call(*arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    def keys(self) -> set[str]:
        """The names of the nodes that have left something on the server."""
        with self.redis.client(decode_responses=True) as client:
            inboxes = [str(key).rpartition(":inbox:")[2] for key in client.keys("{shop}:inbox:*")]
        return {*inboxes, *self.roster()}

    def roster(self) -> set[str]:
        """The names of the nodes."""
        with self.redis.client(decode_responses=True) as client:
            return set(map(str, client.hkeys("{shop}:nodes")))

    def terminal(self, *arguments: str, columns: int = 120) -> Terminal:
        """A terminal that runs a command."""
        return Terminal(self._directory, self.environment(), [*COMMAND, *arguments], columns, 40)

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers:
            worker.close()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """A fleet for tests that leave it as it is, the only one of its server."""
    directory = tmp_path_factory.mktemp("shop")
    with contextmanager(running)(redis_in(directory / "redis")) as redis:
        shop = Shop(redis, directory)
        yield shop
        shop.close()


@pytest.fixture
def own_shop(own_redis: Redis, tmp_path: Path) -> Iterator[Shop]:
    """A fleet, and a server, of this test alone."""
    shop = Shop(own_redis, tmp_path)
    yield shop
    shop.close()


# --- scripts ---------------------------------------------------------------------------------------


def test_commands_reach_all_processes(own_shop: Shop) -> None:
    """Lists, the tree, one task, and a cancellation with its report; nothing of the command is left."""
    a, b = own_shop.workers
    nodes = {a.node, b.node}
    listed = own_shop.json("ls", "import")
    assert (listed["total"], {row["node"] for row in listed["rows"]}) == (6, nodes)
    assert own_shop.json("ls", "--node", a.short)["total"] == 5
    code, out, err = own_shop.call("tree")
    assert (code, err) == (0, "")
    assert out.startswith("shop · 2 nodes  can cancel\n▶ 10 running ")
    assert {line.split()[1] for line in out.splitlines() if line.startswith("▾")} == {a.short, b.short}
    code, out, err = own_shop.call("tree", "--node", b.short)
    assert (code, err, "import" in out, a.short in out) == (0, "", True, False)
    code, out, _ = own_shop.call("show", "stuck-b")
    assert (code, f"Node       {b.node}" in out, "fleet_node_app.py" in out) == (0, True, True)

    code, out, err = own_shop.call("cancel", "import-b-0", "--yes", "--reason", "stuck since noon")
    assert (code, out, err) == (0, "import-b-0 was cancelled, and has ended\n", "")
    (ended,) = own_shop.json("ls", "--ended")["rows"]
    assert (ended["node"], ended["cause"]["message"]) == (b.node, "stuck since noon")
    assert re.fullmatch(r".+ at .+/\d+/[0-9a-f]{6}", ended["cause"]["asked_by"])
    assert own_shop.call("cancel", "stuck-a", "--yes")[0] == 6
    code, _, err = own_shop.call("cancel", "same", "--yes")
    assert (code, "2 live tasks have the name 'same', on " in err) == (1, True)
    assert (a.short in err, b.short in err, "choose a node" in err) == (True, True, True)
    code, out, _ = own_shop.call("cancel", "same", "--yes", "--node", b.short)
    assert (code, out) == (0, "same was cancelled, and has ended\n")
    (left,) = own_shop.json("ls", "same")["rows"]
    assert left["node"] == a.node
    assert own_shop.keys() == nodes


def test_watch_ends_with_its_count(shop: Shop) -> None:
    """A stream without a socket: a snapshot, and a delta each second."""
    code, out, err = shop.call("watch", "--count", "3", "--json")
    assert (code, err) == (0, "")
    updates = [json.loads(line) for line in out.splitlines()]
    assert [update["kind"] for update in updates] == ["snapshot", "delta", "delta"]
    assert updates[2]["base"] == updates[1]["id"]


def test_a_reader_that_leaves(shop: Shop) -> None:
    """`otel-tasks watch | head -1` ends without a traceback, and with the code of a closed pipe."""
    line = f"{shlex.join(COMMAND)} watch | head -1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(
        ["bash", "-c", line], env=shop.environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.stdout.splitlines()[-1], result.stderr) == ("141", "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_it_in_silence(number: signal.Signals, code: int, shop: Shop) -> None:
    """No traceback, no task that is left, and no node."""
    # In debug mode, asyncio takes longer for each call, and the signal comes in the middle of one.
    environment = shop.environment(PYTHONASYNCIODEBUG="1")
    watching = subprocess.Popen(
        [*COMMAND, "watch", "--json"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert watching.stdout is not None
    assert watching.stdout.readline()
    assert watching.stdout.readline()
    watching.send_signal(number)
    _, err = watching.communicate(timeout=PATIENCE)
    # It also reports what takes long, as everything does on a busy machine.
    said = [line for line in err.splitlines() if not line.startswith(b"Executing ")]
    assert (watching.returncode, said) == (code, [])
    assert shop.roster() == {worker.node for worker in shop.workers}


# --- what goes wrong -------------------------------------------------------------------------------


def test_wrong_names_say_which_there_are(shop: Shop) -> None:
    """Another namespace, another database, and no server at all; the only fleet needs no name."""
    code, _, err = shop.call("ls", "--namespace", "stor")
    assert (code, "fleet stor at redis://127.0.0.1" in err, "has no nodes" in err) == (3, True, True)
    assert err.endswith("; the fleets of this server are: shop\n")
    assert shop.call("ls", "-q", OTEL_TASKS_NAMESPACE="")[0] == 0
    code, _, err = shop.call("ls", "--fleet", shop.redis.url[:-1] + "9", OTEL_TASKS_NAMESPACE="")
    assert (code, "has no fleet: are the host and the database number right?" in err) == (3, True)
    code, _, err = shop.call("ls", "--fleet", "redis://127.0.0.1:1/0")
    assert (code, err.count("\n"), "is the server running?" in err) == (3, 1, True)


def test_a_password_is_used_and_never_shown(tmp_path: Path) -> None:
    """A wrong one is refused, and a user who may not list fleets is told to name one."""
    options = ["requirepass s3cret", "user fleet on >hush ~{shop}:* +@all -scan"]
    with ExitStack() as stack:
        server = stack.enter_context(contextmanager(running)(redis_in(tmp_path / "redis", options)))
        url = server.url.replace("redis://", "redis://:s3cret@")
        shop = Shop(server, tmp_path, workers=())
        stack.callback(Worker(url, "shop", "a").close)
        code, out, err = shop.call("ls", "-q", OTEL_TASKS_FLEET=url, OTEL_TASKS_NAMESPACE="")
        assert (code, len(out.splitlines()), err) == (0, 5, "")
        for wrong in (server.url, server.url.replace("redis://", "redis://:wr0ng@")):
            code, _, err = shop.call("ls", OTEL_TASKS_FLEET=wrong)
            assert (code, "check user, password, database, and certificates" in err) == (4, True)
            assert ("wr0ng" in err, err.count("\n")) == (False, 1)
        limited = server.url.replace("redis://", "redis://fleet:hush@")
        code, _, err = shop.call("ls", OTEL_TASKS_FLEET=limited, OTEL_TASKS_NAMESPACE="")
        assert (code, "may not list fleets: use --namespace" in err) == (2, True)
        assert shop.call("ls", "-q", OTEL_TASKS_FLEET=limited)[0] == 0


def test_a_paused_server_holds_no_command(own_shop: Shop) -> None:
    """A command ends within its timeout, and with the code for "try again later"."""
    own_shop.redis.pause()
    try:
        began = time.monotonic()
        code, _, err = own_shop.call("ls", "--timeout", "1")
        assert (code, "no answer within 1 s" in err) == (3, True)
        assert time.monotonic() - began < 20
        code, _, err = own_shop.call("cancel", "import-a-0", "--yes")
        assert (code, "does not answer" in err) == (3, True)
    finally:
        own_shop.redis.resume()
    eventually(lambda: own_shop.call("ls", "-q")[0] == 0, lambda: "the server is back", within=PATIENCE)


def test_a_killed_worker_is_named_and_then_gone(own_shop: Shop) -> None:
    """What it ran is not claimed to have ended, and nobody finds it unknown, as long as the roster has it."""
    b = own_shop.workers[1]
    b.process.kill()
    b.process.wait()
    code, out, err = own_shop.call("tree")
    assert (code, f"{b.short} · no answer yet" in out, f"no answer from {b.node}" in err) == (0, True, True)
    code, out, err = own_shop.call("ls", "-q")
    assert (code, len(out.splitlines()), f"no answer from {b.node}" in err) == (0, 5, True)
    code, _, err = own_shop.call("show", "stuck-b")
    assert (code, f"no answer from {b.node}" in err) == (3, True)
    code, _, err = own_shop.call("cancel", "same", "--yes")
    assert (code, "a live task of this name may be there: choose a node with --node" in err) == (3, True)
    assert own_shop.call("cancel", "same", "--yes", "--node", own_shop.workers[0].short)[0] == 0
    eventually(lambda: own_shop.call("ls", "-q")[2] == "", lambda: "it has left the roster", within=GONE)
    assert own_shop.call("show", "stuck-b")[0] == 1
    assert own_shop.call("tree")[1].startswith("shop · 1 node ")


# --- a terminal ------------------------------------------------------------------------------------


def test_top_shows_nodes_and_cancels_in_one(own_shop: Shop) -> None:
    """A column names the node, `m` shows one, `x` cancels, and a restarted server is found again."""
    pytest.importorskip("textual")
    a, b = own_shop.workers
    tty = own_shop.terminal("top")
    try:
        screen = tty.wait_for(r"● live")
        assert "shop · 2 nodes" in screen
        tty.wait_for(rf"▾ {re.escape(a.short)} default")
        tty.wait_for(rf"▾ {re.escape(b.short)} default")
        tty.press("t")
        assert "NODE" in tty.wait_for(rf"import-b-1 .* {re.escape(b.short)} ")
        tty.press("m", "t")
        screen = tty.wait_for("1 of 2 nodes")
        assert (a.short in screen, b.short in screen) in ((True, False), (False, True))
        tty.press("m", "m")
        tty.wait_for(r"shop · 2 nodes")
        tty.press("/")
        tty.press(*"import-b-1", "Enter")
        tty.wait_for("1 live")
        tty.press("x")
        assert "Cancel import-b-1?" in tty.wait_for("also ends")
        tty.press("Enter")
        tty.wait_for("was cancelled")
        tty.press("Escape", "Escape")

        own_shop.redis.stop()
        tty.wait_for("stale for")
        own_shop.redis.start()
        tty.wait_for("● live")
        tty.wait_for(re.escape(b.short))
        tty.press("q")
        assert "Traceback" not in tty.wait_for("exit=0")
    finally:
        tty.close()


def test_watch_goes_on_after_a_restart_of_the_server(own_shop: Shop) -> None:
    """It says that what is shown gets old, finds the workers again, and ends with Ctrl-C."""
    tty = own_shop.terminal("watch", columns=80)
    try:
        tty.wait_for("shop · 2 nodes")
        own_shop.redis.stop()
        tty.wait_for("stale for .*reconnecting")
        own_shop.redis.start()
        tty.wait_for("shop · 2 nodes  can cancel")
        tty.wait_for("10 running")
        tty.press("C-c")
        assert "Traceback" not in tty.wait_for("exit=130")
    finally:
        tty.close()
