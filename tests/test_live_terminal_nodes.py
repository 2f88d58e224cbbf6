"""The terminal's view of a fleet: nodes, silent ones and those that are chosen, with prepared answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks_terminal import views
from otel_tasks_terminal.cli import main
from otel_tasks_terminal.errors import ExitCode
from otel_tasks_terminal.model import Model
from otel_tasks_terminal.pen import Pen
from otel_tasks_terminal.top.look import Look
from otel_tasks_terminal.top.timeline import Bars, Timeline
from tests.live_screen import screen
from tests.live_server import NOW, Said, View, counted, details, rows, serving, snapshot, task

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.real_clock

API, WORKER, NEW = "api-1/7/4be2c1", "worker-1/77/90f1d2", "worker-2/78/11aa22"
IMPORT = task("import", 60.0, node=API, group="a1", **{"class": "c-a"})
RENDER = task("render", 30.0, node=WORKER, group="w1", group_id="pages", **{"class": "c-w"})


def node(name: str, key: str | None, silent_since: float | None = None) -> dict[str, Any]:
    """A node."""
    host, pid, _ = name.split("/")
    return {"node": name, "key": key, "host": host, "pid": int(pid), "silent_since": silent_since}


def root(key: str, name: str, count: int) -> dict[str, Any]:
    """The root of a node."""
    return counted(key, "default", count, parent=None, kind="root", instances=1, node=name)


def fleet(**more: Any) -> dict[str, Any]:
    """The overview of a fleet as an observer has it: an API, a worker that is silent, and a new one."""
    return {
        **snapshot(),
        "service": None,
        "namespace": "shop",
        "node": None,
        "nodes": [node(API, "a1"), node(WORKER, "w1", NOW - 12.0), node(NEW, None)],
        "groups": [root("w1", WORKER, 1), root("a1", API, 1)],
        "classes": [
            counted("c-a", "import", 1, group="a1", kind="task", task=IMPORT, node=API),
            counted("c-w", "render", 1, group="w1", kind="task", task=RENDER, node=WORKER),
        ],
        "cancelling": [],
        "warnings": [
            {
                "key": "b",
                "kind": "blocked",
                "count": 1,
                "since": NOW,
                "min_age": None,
                "where": None,
                "seconds": 2.0,
                "query": None,
                "node": WORKER,
            }
        ],
        "ended": [{**task("old", 9.0, node=WORKER), "status": "failed", "ended": NOW - 1.0, "n": 1}],
        **more,
    }


@pytest.fixture
def view(monkeypatch: pytest.MonkeyPatch) -> Iterator[View]:
    """A live view of the fleet."""
    prepared = View({"GET snapshot": Said(fleet()), "GET tasks": Said(rows(IMPORT, RENDER))})
    with serving(prepared):
        monkeypatch.setenv("OTEL_TASKS_URL", prepared.url)
        yield prepared


# --- lines -------------------------------------------------------------------------------------------


def test_tree_marks_nodes_that_do_not_answer(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    """A silent one says since when, one that has sent nothing says that, and both are named on stderr."""
    assert main(["tree"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "shop · 3 nodes, 1 silent  can cancel"
    assert "! event loop blocked for 2.0 s · 0 s ago · worker-1/77" in lines
    heads = [line.strip() for line in lines if line.startswith(("▾", "▸"))]
    assert [head.split("  ")[0] for head in heads] == [
        "▾ api-1/7 default",
        "▾ worker-1/77 · silent for 12 s",
        "▸ worker-2/78 · no answer yet",
    ]
    assert f"no answer from {WORKER}, {NEW}\n" in err


def test_tree_shows_chosen_nodes_with_their_own_counters(
    view: View, capsys: pytest.CaptureFixture[str]
) -> None:
    """By host or process: rows, warnings, and counters are theirs, and no rate is claimed."""
    assert main(["tree", "--node", "api-1"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("shop · 1 of 3 nodes  can cancel\n▶ 1 running   ○ 0 waiting   ◐ 0 cancelling\n\n")
    assert ("import" in out, "render" in out, err) == (True, False, "")
    assert main(["tree", "--node", "worker-2/78"]) == 0
    out, err = capsys.readouterr()
    assert ("running" in out, "no answer yet" in out) == (False, True)
    assert main(["tree", "--node", "api"]) == 0
    assert (
        "no node is called 'api': the nodes are api-1/7, worker-1/77, worker-2/78" in capsys.readouterr().err
    )


def test_ls_says_when_a_fleet_has_more_than_its_pages(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    """A node, and not a line, is what narrows the list."""
    view.answers["GET tasks"] = Said(rows(IMPORT, RENDER, total=5000, silent=[]))
    assert main(["ls", "-q"]) == 0
    assert capsys.readouterr().err == "2 of 5,000 live tasks: --node, or a filter, shows others\n"


@pytest.mark.parametrize("command", ["tree", "watch"])
def test_nodes_are_chosen_of_a_fleet_alone(
    command: str, view: View, capsys: pytest.CaptureFixture[str]
) -> None:
    """A view of one process has none, and JSON is what was answered."""
    view.answers["GET snapshot"] = Said(snapshot())
    view.streams = [[("snapshot", snapshot())]]
    assert main([command, "--node", "api-1"]) == ExitCode.USAGE
    assert "this view shows one process" in capsys.readouterr().err
    assert main([command, "--node", "api-1", "--json"]) == ExitCode.USAGE
    assert "choose nodes by the field node" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["show"], ["cancel", "--yes"]])
def test_show_and_cancel_search_the_chosen_nodes(
    command: list[str], view: View, capsys: pytest.CaptureFixture[str]
) -> None:
    """The view gets the name; a task elsewhere is not found."""
    view.answers["GET tasks/import"] = Said(details(task=IMPORT))
    uid = IMPORT["id"]
    cancelled = {"v": 1, "result": "cancelled", "state": "ended", "task": IMPORT}
    view.answers[f"POST tasks/{uid}/cancel"] = Said(cancelled)
    assert main([*command, "import", "--node", "api-1"]) == 0
    asked = [each for each in view.asked if each.path == "tasks/import"]
    assert [each.query for each in asked] == [{"node": ["api-1"]}]
    assert "import" in capsys.readouterr().out


def test_cancel_wants_to_be_certain_that_no_other_node_has_the_name(
    view: View, capsys: pytest.CaptureFixture[str]
) -> None:
    """A silent node may have a task of that name; `show` only says so."""
    view.answers["GET tasks/import"] = Said(details(task=IMPORT, silent=[WORKER], not_asked=2))
    unheard = f"no answer from {WORKER}, 2 more nodes, which are too many to ask"
    assert main(["show", "import"]) == 0
    assert capsys.readouterr().err == f"{unheard}\n"
    assert main(["cancel", "import", "--yes"]) == ExitCode.UNREACHABLE
    error = capsys.readouterr().err
    assert f"{unheard}, and a live task of this name may be there: choose a node with --node" in error
    assert f"or give the id {IMPORT['id']}" in error
    ended = {**IMPORT, "status": "completed", "ended": NOW}
    view.answers["GET tasks/import"] = Said(details(task=ended, state="ended", silent=[WORKER]))
    assert main(["cancel", "import", "--yes"]) == ExitCode.UNREACHABLE
    assert capsys.readouterr().err.endswith("choose a node with --node\n")
    assert [asked.method for asked in view.asked] == ["GET", "GET", "GET"]


def test_ls_of_an_unknown_node_names_those_there_are(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty list alone would say that the node runs nothing."""
    view.answers["GET tasks"] = Said(rows(silent=[]))
    assert main(["ls", "--node", "api"]) == 0
    assert "no node is called 'api': the nodes are api-1/7, worker-1/77," in capsys.readouterr().err
    assert main(["ls", "--node", "api-1"]) == 0
    assert "no node is called" not in capsys.readouterr().err


def test_watch_names_the_node_of_what_ends(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    """And leaves out other nodes, if one is chosen."""
    ended = [
        {**task(f"{name}-job", 9.0, node=where), "status": "failed", "ended": NOW, "n": number}
        for number, (name, where) in enumerate((("api", API), ("worker", WORKER)))
    ]
    delta = {
        **fleet(),
        "kind": "delta",
        "base": "inst:1",
        "id": "inst:2",
        "set": {},
        "gone": {},
        "ended": ended,
    }
    delta["nodes"] = [node(API, "a1")]
    stream = [("snapshot", fleet()), ("delta", delta)]
    view.streams = [stream, stream]
    assert main(["watch", "--count", "2"]) == 0
    out = capsys.readouterr().out
    assert [line.rpartition("  ")[2] for line in out.splitlines() if "-job" in line] == [
        "worker-1/77",
        "api-1/7",
    ]
    assert main(["watch", "--count", "2", "--node", "worker-1"]) == 0
    out = capsys.readouterr().out
    assert ("worker-job" in out, "api-job" in out) == (True, False)


def test_show_and_the_question_before_a_cancel_name_the_node(
    view: View, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its full name: a process that starts again has another one."""
    view.answers["GET tasks/import"] = Said(details(task=IMPORT))
    assert main(["show", "import"]) == 0
    assert f"Node       {API}\n" in capsys.readouterr().out


def test_rows_of_a_silent_node_have_no_colors() -> None:
    """They may be old; a narrow terminal shows the same."""
    model = Model(lambda: NOW)
    model.apply("snapshot", fleet())
    silent = [entry.silent for entry in model.tree()]
    assert silent == [False, False, True, True, False]
    for columns in (70, 120):
        *_, worker, _render, new = views.tree(model.tree(), model, Pen(columns, color=True))
        assert "▾ worker-1/77 · silent for 12 s" in worker
        assert "▸ worker-2/78 · no answer yet" in new
        assert worker.startswith("\x1b[2m")


def test_nodes_come_and_go_with_deltas() -> None:
    """The list is complete if it is there."""
    model = Model(lambda: NOW)
    model.apply("snapshot", fleet())
    model.apply("delta", {"now": NOW, "set": {}, "gone": {}, "nodes": [node(API, "a1")]})
    assert model.unheard() == []
    model.apply("delta", {"now": NOW, "set": {}, "gone": {}})
    assert list(model.nodes) == [API]


def test_the_one_that_answers_is_named_if_it_is_a_node() -> None:
    """An observer is no part of what is shown."""
    model = Model(lambda: NOW)
    model.apply("snapshot", fleet(node=API, service="api"))
    assert views.identity(model) == "api · 3 nodes, 1 silent · api-7f · pid 812"


# --- the screen --------------------------------------------------------------------------------------


def shown(**more: Any) -> View:
    """A view whose stream shows the fleet."""
    answer = Said(rows(IMPORT, RENDER))
    return View({"GET tasks": answer}, streams=[[("snapshot", fleet(**more))]])


async def test_m_shows_one_node_after_another() -> None:
    """And all of them after the last one; lists ask for the one that is shown."""
    async with screen(shown(), (120, 30)) as top:
        assert "3 nodes, 1 silent" in top.text()
        await top.press("m")
        assert ("import" in top.text(), "render" in top.text()) == (True, False)
        assert "only api-1/7, m: next" in top.text()
        assert "109,000" not in top.text()
        await top.press("e")
        await top.until(lambda: any(asked.query.get("state") for asked in top.view.asked))
        (asked,) = [asked for asked in top.view.asked if asked.query.get("state")]
        assert asked.query["node"] == [API]
        await top.press("escape", "m", "m")
        assert "▸ worker-2/78 · no answer yet" in top.text()
        await top.press("m")
        assert "3 nodes, 1 silent" in top.text()


async def test_the_screen_starts_with_the_node_that_was_named() -> None:
    """By a host, too; one that no node has says so, and m shows all."""
    async with screen(shown(), node="worker-1") as top:
        assert ("import" in top.text(), "render" in top.text()) == (False, True)
        await top.press("m")
        assert "import" in top.text()
    async with screen(shown(), node="api", ready=lambda app: app.model.about) as top:
        assert "no node is called 'api', m: all" in top.text()


async def test_m_without_a_fleet_says_so() -> None:
    """There is one process."""
    async with screen() as top:
        await top.press("m")
        await top.until(lambda: "This view shows one process." in top.text())


@pytest.mark.parametrize("columns", [80, 120])
async def test_lists_name_the_node_of_each_task(columns: int) -> None:
    """In a column, or after the name where there is no room for one."""
    async with screen(shown(), (columns, 30)) as top:
        await top.press("e")
        await top.until(lambda: "render" in top.text())
        (line,) = [line for line in top.text().splitlines() if "render" in line]
        assert "worker-1/77" in line
        assert ("NODE" in top.text()) == (columns == 120)
        assert line.index("worker-1/77") > line.index("render")


async def test_a_task_of_a_silent_node_is_not_cancelled() -> None:
    """The dialog would wait for nothing."""
    async with screen(shown()) as top:
        await top.press("j", "j", "j")
        assert top.selected() == RENDER["id"]
        await top.press("x")
        await top.until(lambda: "node does not answer" in top.text())


async def test_the_timeline_of_a_node_that_has_sent_nothing_says_so() -> None:
    """It asks for the node by its name, and claims nothing about it without an answer."""
    view = shown()
    view.answers["GET tasks"] = Said(rows(silent=[NEW]))
    async with screen(view) as top:
        await top.press("end")
        assert top.selected() == f"node {NEW}"
        await top.press("g")
        await top.until(lambda: "what is there is not known" in top.text())
        assert "timeline of worker-2/78, no answer from worker-2/78" in top.text()
        assert {asked.query["node"][0] for asked in top.view.asked if asked.path == "tasks"} == {NEW}


def test_the_timeline_of_a_fleet_names_nodes() -> None:
    """Tasks of groups of the same name are those of their nodes; a task alone has its node beside it."""
    model = Model(lambda: NOW)
    model.apply("snapshot", fleet())
    pages = [
        task(f"page-{name}-{number}", 5.0, node=name, group_id="pages")
        for name in (API, WORKER)
        for number in (1, 2)
    ]
    timeline = Timeline(model)
    entries = timeline.entries([*pages, IMPORT])
    bands = [entry.row["name"] for entry in entries if entry.kind == "band"]
    assert bands == ["pages · api-1/7", "pages · worker-1/77"]
    painter = Bars(Look(Pen(), dark=True), timeline.span)
    lines = [painter.row(entry, NOW, 105).plain for entry in entries]
    assert [line[:22].rstrip() for line in lines if "import" in line] == [" ▶ import api-1/7"]
