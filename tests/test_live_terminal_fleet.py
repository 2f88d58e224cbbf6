"""otel-tasks --fleet on memory://: the nodes run in the loop of the command."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import threading
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks import TaskManager
from otel_tasks.fleet import Fleet
from otel_tasks.fleet.memory_bus import memory_server
from otel_tasks_terminal import fleet as terminal_fleet
from otel_tasks_terminal.cli import main
from otel_tasks_terminal.errors import CommandError, ExitCode
from otel_tasks_terminal.fleet import FleetSource, _LoopThread
from otel_tasks_terminal.follow import Follower, Lost
from otel_tasks_terminal.observer import Observer
from tests.helpers import give, rest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from otel_tasks.live.view import View

URL = "redis://127.0.0.1:6379/0"


async def ignore_one_cancel() -> None:
    """End with the second cancellation."""
    try:
        await rest()
    except asyncio.CancelledError:
        await rest()


class Hosting(Observer):
    """An observer whose loop runs the nodes, too.

    Args:
        namespace: The fleet that the command names.
        fleets: The namespaces of the nodes.
    """

    def __init__(self, namespace: str | None = "shop", fleets: Sequence[str] = ("shop", "shop")) -> None:
        super().__init__("memory://", namespace)
        self._fleets = fleets
        self._stack = AsyncExitStack()
        self._hosts = False

    async def _join(self) -> View:
        if not self._hosts:
            self._hosts = True
            for number, namespace in enumerate(self._fleets):
                await self._start(number, namespace)
        return await super()._join()

    async def _start(self, number: int, namespace: str) -> None:
        manager = TaskManager(f"manager-{number}", grace=0.0, shutdown_timeout=0.0)
        await self._stack.enter_async_context(Fleet("memory://", namespace=namespace, manager=manager))
        await self._stack.enter_async_context(manager)
        manager.create_task(rest(), name="same", group="jobs")
        manager.create_task(rest(), name=f"import-{number}", group="jobs")
        manager.create_task(ignore_one_cancel(), name=f"stuck-{number}", group="jobs")
        await manager.create_task(give(1), name=f"ended-{number}")
        await asyncio.sleep(0)

    async def leave(self) -> None:
        await super().leave()
        await self._stack.aclose()

    async def fail(self) -> None:
        """Take the bus away."""
        memory_server(namespace="shop").fail()
        await asyncio.sleep(0.05)

    async def restore(self) -> None:
        """Give it back."""
        memory_server(namespace="shop").restore()


@pytest.fixture
def nothing_is_left() -> Iterator[None]:
    """Every command ends its thread; that it says itself what the log would is for its process alone."""
    log = logging.getLogger("otel_tasks")
    level = log.level
    yield
    log.setLevel(level)
    assert [thread.name for thread in threading.enumerate() if thread.name == "otel-tasks fleet"] == []


pytestmark = pytest.mark.usefixtures("nothing_is_left")


@pytest.fixture
def hosted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let `otel-tasks` look at nodes in its own loop."""

    def host(**options: Any) -> None:
        def source(url: str, namespace: str | None, *, timeout: float) -> FleetSource:
            chosen: dict[str, Any] = {"namespace": namespace, **options}
            return FleetSource(_LoopThread(Hosting(**chosen)), timeout=timeout)

        monkeypatch.setattr(terminal_fleet, "fleet_source", source)

    monkeypatch.delenv("OTEL_TASKS_URL", raising=False)
    monkeypatch.setenv("OTEL_TASKS_FLEET", URL)
    host()
    return host


@pytest.fixture
def source() -> Iterator[FleetSource]:
    """A source whose loop runs the nodes."""
    made = FleetSource(_LoopThread(Hosting()), timeout=10)
    yield made
    made.close()


# --- commands ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hosted")
def test_commands_show_all_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    """Lists and the tree have the tasks of each node, as JSON too; no row is that of the command."""
    assert main(["ls", "import"]) == ExitCode.OK
    assert capsys.readouterr().out.count("import-") == 2
    assert main(["ls", "--json"]) == ExitCode.OK
    listed = json.loads(capsys.readouterr().out)
    assert (listed["total"], len({row["node"] for row in listed["rows"]})) == (6, 2)
    assert main(["ls", "--ended", "--json"]) == ExitCode.OK
    ended = json.loads(capsys.readouterr().out)["rows"]
    assert sorted(row["name"] for row in ended) == ["ended-0", "ended-1"]
    assert main(["tree", "--tasks"]) == ExitCode.OK
    tree = capsys.readouterr().out
    assert tree.startswith("shop · 2 nodes  can cancel\n")
    assert [line for line in tree.splitlines() if "manager-" in line]
    assert main(["watch", "--count", "2"]) == ExitCode.OK
    assert "6 running" in capsys.readouterr().out


@pytest.mark.usefixtures("hosted")
def test_show_and_cancel_find_a_task_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    """The report and the exit code are those of one service; a name of several tasks is refused."""
    assert main(["show", "import-1"]) == ExitCode.OK
    shown = capsys.readouterr().out
    assert "manager-1 / jobs / import-1" in shown
    assert "\nNode " in shown
    assert main(["cancel", "import-1", "--yes", "--reason", "stuck\nsince noon"]) == ExitCode.OK
    assert "import-1 was cancelled, and has ended" in capsys.readouterr().out
    assert main(["cancel", "stuck-0", "--yes"]) == ExitCode.STILL_RUNS
    assert main(["cancel", "ended-0", "--yes"]) == ExitCode.OK
    assert "had already ended" in capsys.readouterr().out
    assert main(["cancel", "same", "--yes"]) == ExitCode.NOTHING_DONE
    assert "2 live tasks have the name 'same', on " in capsys.readouterr().err
    assert main(["cancel", "unknown", "--yes"]) == ExitCode.NOTHING_DONE


def test_a_node_chooses_among_tasks_of_one_name(source: FleetSource) -> None:
    """Of two tasks of one name, the one on the other node keeps running."""
    node, other = (source.task(f"import-{number}")["task"]["node"] for number in (0, 1))
    for name, wrong, says in (
        ("import-0", other, "no task has the id or name 'import-0'"),
        ("same", "nowhere", "no node is called 'nowhere': the nodes are "),
    ):
        with pytest.raises(CommandError, match=says) as caught:
            source.task(name, wrong)
        assert caught.value.code is ExitCode.NOTHING_DONE
    chosen = source.task("same", node)["task"]
    assert source.cancel(chosen["id"], None)["result"] == "cancelled"
    assert source.task("same")["task"]["node"] == other


def test_the_cause_names_the_person(source: FleetSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the host, which the link adds; nobody has a name where the system knows none."""
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    answer = source.cancel(source.task("import-0")["task"]["id"], "stuck\nsince noon")
    cause = answer["task"]["cause"]
    assert (answer["result"], cause["message"]) == ("cancelled", "stuck since noon")
    assert cause["asked_by"].startswith("ada at ")

    def unknown() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr("getpass.getuser", unknown)
    answer = source.cancel(source.task("import-1")["task"]["id"], None)
    assert answer["task"]["cause"]["asked_by"].startswith("somebody at ")


def test_the_only_fleet_of_a_server_needs_no_name(
    hosted: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of several, one must be named; the variable does that, too."""
    assert main(["ls", "-q"]) == ExitCode.OK
    hosted(fleets=("shop", "billing"))
    assert main(["ls", "-q"]) == ExitCode.USAGE
    assert "has several fleets (billing, shop): choose with --namespace" in capsys.readouterr().err
    monkeypatch.setenv("OTEL_TASKS_NAMESPACE", "billing")
    assert main(["ls", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["total"] == 3


@pytest.mark.parametrize(
    ("fleets", "namespace", "says"),
    [
        (("shop",), "store", "fleet store at memory:// has no nodes; the fleets of this server are: shop\n"),
        ((), "shop", "fleet shop at memory:// has no nodes\n"),
        ((), None, "memory:// has no fleet: are the host and the database number right?"),
        ([f"f{n}" for n in range(7)], "shop", "are: f0, f1, f2, f3, f4, ...\n"),
    ],
)
def test_a_fleet_without_nodes_says_what_there_is(
    fleets: Sequence[str],
    namespace: str | None,
    says: str,
    hosted: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A wrong name, number, or server is what is most often wrong."""
    hosted(fleets=fleets, namespace=namespace)
    assert main(["tree"]) == ExitCode.UNREACHABLE
    assert says in capsys.readouterr().err


# --- arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--fleet", "memory://"], "memory:// joins the fleets of one process"),
        (
            ["--fleet", "https://u:s3cret@x/"],
            "takes the URL of a Redis server, such as redis://127.0.0.1:6379",
        ),
        (["--fleet", "redis"], "takes the URL of a Redis server"),
        (["--fleet", "redis://u:s3cret:x@h:port/0"], "the URL of the fleet is malformed"),
        (["--fleet", URL, "--namespace", "a b"], "namespace must be 1 to 100 letters"),
        (["--fleet", URL, "--url", "http://x"], "leave --url and --token out"),
        (["--fleet", URL, "--token", "x"], "leave --url and --token out"),
        (["--url", "http://127.0.0.1:9/", "--namespace", "shop"], "--namespace needs --fleet"),
    ],
)
def test_wrong_arguments_say_what_is_right(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, without a password, and before anything is asked."""
    assert main(["ls", *arguments]) == ExitCode.USAGE
    error = capsys.readouterr().err
    assert says in error
    assert (error.count("\n"), "s3cret" in error) == (1, False)


def test_of_two_variables_an_option_chooses(
    hosted: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An option wins over a variable, and two variables without one are an error."""
    monkeypatch.setenv("OTEL_TASKS_URL", "http://127.0.0.1:9/")
    assert main(["ls"]) == ExitCode.USAGE
    assert "choose with --url or --fleet" in capsys.readouterr().err
    assert main(["ls", "--fleet", URL]) == ExitCode.OK
    assert main(["ls", "--url", "http://127.0.0.1:9/"]) == ExitCode.UNREACHABLE
    assert "http://127.0.0.1:9" in capsys.readouterr().err


def test_without_the_client_of_redis_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message has the line to type."""
    monkeypatch.delitem(sys.modules, "otel_tasks.fleet.redis_bus", raising=False)
    monkeypatch.setitem(sys.modules, "redis", None)
    assert main(["ls", "--fleet", URL]) == ExitCode.USAGE
    assert "--fleet needs a Redis client: pip install 'otel-tasks[fleet]'" in capsys.readouterr().err


def test_the_fleet_needs_no_framework() -> None:
    """FastAPI is for those who serve a page."""
    code = """
import sys
sys.modules["fastapi"] = sys.modules["starlette"] = None
import otel_tasks_terminal.observer
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


# --- time, and the end -------------------------------------------------------------------------------


def test_a_call_ends_within_its_timeout(source: FleetSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not answer holds no command."""

    async def never(_: Observer) -> Any:
        await asyncio.sleep(3600)

    monkeypatch.setattr(Observer, "snapshot", never)
    with pytest.raises(CommandError, match=r"no answer within 0\.1 s") as caught:
        source.fresh(timeout=0.1).snapshot()
    assert caught.value.code is ExitCode.UNREACHABLE


def test_signal_before_a_call_is_scheduled_leaves_no_coroutine(source: FleetSource) -> None:
    """Coroutines are created in the loop's thread, which Ctrl-C does not interrupt."""
    created: list[threading.Thread] = []

    def ask(observer: Observer) -> Any:
        created.append(threading.current_thread())
        return observer.snapshot()

    source._thread.submit(ask).result()
    assert [thread.name for thread in created] == ["otel-tasks fleet"]


def test_without_the_bus_nothing_is_claimed(source: FleetSource) -> None:
    """A list would say that nothing runs."""
    source.tasks([])
    thread = source._thread
    thread.submit(Hosting.fail).result()  # type: ignore[arg-type]  # it is one
    for ask in (source.snapshot, lambda: source.tasks([]), lambda: source.task("import-0")):
        with pytest.raises(CommandError, match="it was taken away; is the server running") as caught:
            ask()
        assert caught.value.code is ExitCode.UNREACHABLE


def test_a_stream_goes_on_after_the_bus_is_back(source: FleetSource) -> None:
    """It says that what is shown gets old, and continues."""
    follower = Follower(source, sleep=lambda seconds: time.sleep(min(seconds, 0.1)))
    updates = follower.updates()
    assert next(updates).name == "snapshot"  # type: ignore[union-attr]  # an event
    thread = source._thread
    thread.submit(Hosting.fail).result()  # type: ignore[arg-type]  # it is one
    lost = next(update for update in updates if isinstance(update, Lost))
    assert "memory:// is not available" in lost.message or "taken away" in lost.message
    thread.submit(Hosting.restore).result()  # type: ignore[arg-type]  # it is one
    event = next(update for update in updates if not isinstance(update, Lost))
    assert event.name == "delta"
    updates.close()


def test_another_thread_ends_a_stream(source: FleetSource) -> None:
    """What the reader of a screen waits for fails at once."""
    reader = source.fresh(timeout=60)
    events = reader.events([])
    next(events)
    ended: list[CommandError] = []

    def read() -> None:
        try:
            list(events)
        except CommandError as error:
            ended.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    while reader._waiting is None or reader._waiting.done():
        time.sleep(0.001)
    reader.interrupt()
    thread.join(10)
    assert [error.code for error in ended] == [ExitCode.UNREACHABLE]


def test_a_closed_source_refuses_further_calls() -> None:
    """A thread of the screen that comes late gets an error, and no coroutine is left behind."""
    source = FleetSource(_LoopThread(Hosting()), timeout=10)
    late = source.fresh()
    source.snapshot()
    source.close()
    source.close()
    late.interrupt()
    late.close()
    with pytest.raises(CommandError, match="the command ends"):
        late.snapshot()
    never_used = FleetSource(_LoopThread(Hosting()), timeout=10)
    never_used.close()
    with pytest.raises(CommandError):
        never_used.snapshot()
