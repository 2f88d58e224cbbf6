"""otel-tasks, the terminal of the live view: what it prints, its exit codes, and what it refuses to print."""

from __future__ import annotations

import ast
import base64
import json
import re
import socket
import subprocess
import sys
import threading
import tomllib
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks_terminal import phrases, text, views
from otel_tasks_terminal.cli import main
from otel_tasks_terminal.client import Address, Client
from otel_tasks_terminal.errors import CommandError, ExitCode
from otel_tasks_terminal.follow import Follower, Lost
from otel_tasks_terminal.model import Model
from otel_tasks_terminal.pen import Column, Pen, table
from tests import live_server, measures
from tests.blocks import ROOT
from tests.live_server import (
    NOW,
    SYNC_MAIL,
    Said,
    View,
    delta,
    details,
    prepared,
    rows,
    serving,
    snapshot,
    task,
)
from tests.test_structure import COMPLEXITY, LINES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HOSTILE = "\x1b[2J\x1b]0;owned\x07pay\u202eload\x9b31m\r\n\x00" + "x" * 10_000


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No address and no token but those of the test."""
    for name in ("OTEL_TASKS_URL", "OTEL_TASKS_TOKEN", "OTEL_TASKS_USER", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def view(monkeypatch: pytest.MonkeyPatch) -> Iterator[View]:
    """A view that answers, and to which the commands go."""
    with serving(prepared()) as view:
        monkeypatch.setenv("OTEL_TASKS_URL", view.url)
        yield view


# --- lists -----------------------------------------------------------------------------------------


def test_ls_prints_a_line_for_each_task(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    """A task's line has its status in a word, its age, its name, and what it does."""
    assert main(["ls"]) == 0

    heading, first, *others = capsys.readouterr().out.splitlines()
    assert heading.split() == ["STATUS", "AGE", "NAME", "GROUP", "DOING", "ID"]
    assert re.split(r"\s{2,}", first) == [
        "◐ cancelling",
        "12 m",
        "sync_mail HIGH",
        "GET /report/{id}#4711",
        "cancelling 44 s · client disconnected · at pool.py:88",
        "uid-sync_mail",
    ]
    assert len(others) == 3


def test_ls_sends_its_filters(view: View) -> None:
    """Each option is a parameter of the feed's list."""
    words = ["pool", "mail", "--status", "cancelling", "--min-age", "5m", "--where", "a/b.py:1"]
    assert main(["ls", *words, "--group", "imports", "--key", "c1", "--sort", "newest", "--limit", "7"]) == 0

    assert view.asked[0].query == {
        "q": ["pool mail"],
        "status": ["cancelling"],
        "min_age": ["300"],
        "where": ["a/b.py:1"],
        "group_id": ["imports"],
        "key": ["c1"],
        "sort": ["-age"],
        "limit": ["7"],
    }


def test_ls_names_the_nodes_of_a_fleet(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    """A column names each task's node, a filter is sent on, and silent nodes are named on stderr."""
    found = rows({**task("a"), "node": "api-1/7/4be2c1"}, {**task("b"), "node": "worker-1/8/90f1d2"})
    view.answers["GET tasks"] = Said({**found, "silent": ["api-2/9/aa01ff"]})

    assert main(["ls", "--node", "api-1"]) == 0

    out, err = capsys.readouterr()
    heading, *lines = out.splitlines()
    assert heading.split() == ["STATUS", "AGE", "NAME", "GROUP", "NODE", "DOING", "ID"]
    assert ["api-1/7" in lines[0], "worker-1/8" in lines[1]] == [True, True]
    assert "no answer from api-2/9/aa01ff" in err
    assert view.asked[0].query["node"] == ["api-1"]


def test_ls_follows_the_pages_and_lists_a_task_once(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    """A long list comes from several pages; a task that slipped into the next one is one line."""
    pages = [
        rows(task("a"), task("b"), next="2", total=3),
        rows(task("b"), task("c"), next=None, total=3),
    ]
    view.on_request = lambda asked: view.answers.update({"GET tasks": Said(pages[len(view.asked) - 1])})

    assert main(["ls", "-q"]) == 0
    assert capsys.readouterr().out.split() == ["uid-a", "uid-b", "uid-c"]
    assert view.asked[1].query["after"] == ["2"]


def test_ls_says_on_stderr_what_it_does_not_show(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    """A script reads rows alone: that there are more, or none, is said beside."""
    view.answers["GET tasks"] = Said(rows(task("a"), total=9800, next="1"))
    assert main(["ls", "--limit", "1"]) == 0
    assert capsys.readouterr().err == "1 of 9,800 live tasks: --limit, or a filter, shows others\n"

    view.answers["GET tasks"] = Said(rows())
    assert main(["ls", "nothing"]) == 0
    assert capsys.readouterr() == ("", "no live task matches\n")


def test_ls_shows_ended_tasks(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    """An ended task's line has its outcome; its id may be unknown."""
    ended = task(
        "send", 9.0, id=None, status="failed", ended=NOW - 2.0, error_type="OSError", error="no route"
    )
    view.answers["GET tasks"] = Said(rows(ended))

    assert main(["ls", "--ended"]) == 0
    assert re.split(r"\s{2,}", capsys.readouterr().out.splitlines()[1]) == [
        "✕ failed",
        "2 s",
        "7.0 s",
        "send",
        "root",
        "failed · OSError: no route · 2 s ago",
    ]
    assert view.asked[0].query["state"] == ["ended"]


def test_json_is_what_the_service_answers(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    """With --json, the answer is printed with all its fields; it may stand before or after the command."""
    for arguments in (["ls", "--json"], ["--json", "ls"]):
        assert main(arguments) == 0
        assert json.loads(capsys.readouterr().out) == rows(SYNC_MAIL, *live_server.PRICES)
    assert main(["tree", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == snapshot()
    assert main(["show", "sync_mail", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == details()


def test_tree_shows_groups_and_names(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    """Trouble comes first: the cancelling task is in sight, and warnings are above the tree."""
    assert main(["tree"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "shop · api-7f · pid 812  can cancel"
    assert lines[1].split("   ")[:3] == ["▶ 53 running", "○ 140 waiting", "◐ 1 cancelling"]
    assert lines[2] == "! 1 cancelling for more than 30 s · oldest 44 s"
    names = [re.split(r"\s{2,}", line.strip())[0] for line in lines[5:]]
    assert names == [
        "▾ default",
        "▾ GET /report/{id}",
        "◐ sync_mail HIGH",
        "▸ fetch_prices \N{MULTIPLICATION SIGN}3",
        "▾ imports limit 50",
        "▸ import_user \N{MULTIPLICATION SIGN}190",
    ]
    assert lines[9].rstrip().endswith("61 %")


def test_tree_tells_the_tasks_of_several_requests_apart(
    view: View, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where requests share a row, the number of each follows the name of its tasks."""
    data = snapshot()
    data["groups"][1]["instances"] = 2
    view.answers["GET snapshot"] = Said(data)

    assert main(["tree"]) == 0
    assert "◐ sync_mail #4711 HIGH " in capsys.readouterr().out


def test_tree_of_a_fleet_names_the_node_of_each_root(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    """Its host and its process stand before the name of its manager."""
    data = snapshot()
    data["groups"][0]["node"] = "api-1/7/4be2c1"
    view.answers["GET snapshot"] = Said(data)

    assert main(["tree"]) == 0
    assert "▾ api-1/7 default " in capsys.readouterr().out


def test_a_narrow_tree_says_what_tasks_do() -> None:
    """Below 96 columns, that follows the name, and the columns of counts leave their room to it."""
    model = Model(lambda: NOW)
    model.apply("snapshot", snapshot())
    lines = list(views.tree(model.tree(), model, Pen(70)))
    assert lines[0].split() == ["NAME", "COUNT", "AGE"]
    assert lines[3] == "    ◐ sync_mail HIGH  cancelling 44 s · client disconnected …     12 m"
    assert re.split(r"\s{2,}", lines[4].strip()) == ["▸ fetch_prices \N{MULTIPLICATION SIGN}3", "3", "12 m"]
    assert {text.width(line) for line in lines} == {70}


def test_tree_lists_the_tasks_of_each_name(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    """With --tasks, the oldest tasks of each name follow, and how many more there are."""
    view.answers["GET tasks"] = Said(rows(*live_server.PRICES, total=190))

    assert main(["tree", "--tasks"]) == 0
    out = capsys.readouterr().out
    assert out.count("fetch_prices-1 ") == 2
    assert "… 187 more" in out
    assert [asked.query["key"] for asked in view.asked[1:]] == [["c-prices"], ["c-user"]]


def test_show_tells_everything_about_a_task(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    """One page says what the task waits for, and who asked it to stop."""
    assert main(["show", "sync_mail"]) == 0

    out = capsys.readouterr().out
    for expected in (
        "default / GET /report/{id}#4711 / sync_mail",
        "cancelling 44 s · client disconnected",
        "Awaited by render_chart",
        "shop/pool.py:88 in Pool.acquire",
        "client disconnected · GET /report/{id}",
        "this task · not finished",
        "3 live, 4 ended (1 ✓, 3 ⊘)",
        "user: ada",
    ):
        assert expected in out
    # The steps stand below each other, also where the first has a date.
    steps = re.findall(r"^  (\S.*  )(?:client|group|this)", out, re.MULTILINE)
    assert len(steps) == 3
    assert len({len(step) for step in steps}) == 1


def test_show_says_what_plain_tasks_run(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    """asyncio names them Task-18: the coroutine and its line say which code that is."""
    where = {"file": "shop/app.py", "line": 31, "function": "get_report"}
    plain = {"id": None, "task_id": None, "name": "Task-18", "function": "Cycle.run_asgi", "where": where}
    task = {**SYNC_MAIL, "awaits": "Task-19 (fetch)"}
    awaited = {**plain, "name": "Task-19", "function": "fetch", "where": None}
    data = live_server.details(task=task, awaited=awaited, waiters=[plain])
    view.answers["GET tasks/sync_mail"] = Said(data)
    assert main(["show", "sync_mail"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Awaited by Task-18 (runs Cycle.run_asgi, at shop/app.py:31 in get_report)" in out
    assert "Waits for Task-19 (runs fetch)" in out


def test_an_id_is_one_part_of_the_path(view: View) -> None:
    """An id with slashes and spaces reaches the feed as one part."""
    main(["show", "GET /report/{id}#4711/sync mail"])
    assert view.asked[0].path == "tasks/GET /report/{id}#4711/sync mail"


# --- cancel ----------------------------------------------------------------------------------------


def test_cancel_by_name_sends_the_uid(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    """The task that was found is cancelled, whatever has its name meanwhile; the guard lets it pass."""
    view.answers["GET tasks"] = Said(rows(SYNC_MAIL))
    arguments = ["cancel", "sync_mail", "--yes", "--reason", "stuck since noon", "--token", "t0k"]
    assert main(arguments) == 0

    post = view.asked[-1]
    assert (post.method, post.path) == ("POST", "tasks/uid-sync_mail/cancel")
    assert post.body == {"reason": "stuck since noon"}
    assert post.headers["authorization"] == "Bearer t0k"
    assert post.headers["content-type"] == "application/json"
    assert "origin" not in post.headers
    assert capsys.readouterr().out == "sync_mail was cancelled, and has ended\n"


def test_cancel_without_a_token_passes_the_guard(view: View) -> None:
    """A view without authentication still wants what no form of another site can send."""
    assert main(["cancel", "uid-sync_mail", "--yes"]) == 0
    assert view.asked[0].headers.get("authorization") is None
    assert view.asked[-1].headers["authorization"].startswith("Bearer ")


def test_a_password_goes_with_the_origin(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view with HTTP Basic gets name and password, and for a cancel the origin that its guard wants."""
    monkeypatch.setenv("OTEL_TASKS_USER", "ann:s3cret:\N{SNOWMAN}")
    assert main(["cancel", "uid-sync_mail", "--yes"]) == 0
    get, post = view.asked
    scheme, _, encoded = get.headers["authorization"].partition(" ")
    assert (scheme, base64.b64decode(encoded).decode()) == ("Basic", "ann:s3cret:\N{SNOWMAN}")
    assert "origin" not in get.headers
    assert post.headers["origin"] == f"http://{post.headers['host']}"


def test_a_view_that_wants_a_password_says_so(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    """The message names the variable of the scheme that the view wants."""
    view.answers["GET tasks"] = Said(b"", 401, {"WWW-Authenticate": 'Basic realm="x"'})
    assert main(["ls"]) == ExitCode.REFUSED
    assert "set OTEL_TASKS_USER=name:password" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("result", "code", "says"),
    [
        ("requested", ExitCode.STILL_RUNS, "still runs: it cleans up, or ignores the request"),
        ("ended", ExitCode.OK, "had already ended: completed"),
    ],
)
def test_cancel_tells_what_became_of_the_task(
    view: View, capsys: pytest.CaptureFixture[str], result: str, code: ExitCode, says: str
) -> None:
    """A task that still runs is another exit code; one that has ended is not an error."""
    answer = {
        "v": 1,
        "result": result,
        "task": {**SYNC_MAIL, "status": "completed", "cause": None, "ended": NOW},
    }
    view.answers["POST tasks/uid-sync_mail/cancel"] = Said(answer)

    assert main(["cancel", "uid-sync_mail", "--yes"]) == code
    assert says in capsys.readouterr().out


def test_cancel_of_an_ended_task_sends_nothing(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    """What has ended needs no cancel: its outcome is printed."""
    ended = {**SYNC_MAIL, "status": "cancelled", "ended": NOW - 2.0}
    view.answers["GET tasks/uid-sync_mail"] = Said(details(state="ended", task=ended))

    assert main(["cancel", "uid-sync_mail", "--yes"]) == 0
    assert "had already ended: cancelled · client disconnected · 2 s ago" in capsys.readouterr().out
    assert [asked.method for asked in view.asked] == ["GET"]


def test_cancel_refuses_a_name_that_several_tasks_have(
    view: View, capsys: pytest.CaptureFixture[str]
) -> None:
    """The service would choose one of them: nothing is cancelled, and ids are named."""
    view.answers["GET tasks"] = Said(rows(SYNC_MAIL, {**SYNC_MAIL, "id": "uid-2"}))

    assert main(["cancel", "sync_mail", "--yes"]) == ExitCode.NOTHING_DONE
    assert "2 tasks have the name 'sync_mail'" in capsys.readouterr().err
    assert {asked.method for asked in view.asked} == {"GET"}


def test_cancel_asks_only_on_a_terminal(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    """A script has to say --yes; nothing is sent without."""
    assert main(["cancel", "sync_mail"]) == ExitCode.USAGE
    assert "add --yes" in capsys.readouterr().err
    assert view.asked == []


# --- errors ----------------------------------------------------------------------------------------


def error(code: str, message: str, status: int, **headers: str) -> Said:
    """An error of the feed."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Said({"v": 1, "error": {"code": code, "message": message}}, status, names)


REFUSALS = {
    "unauthorized": (error("unauthorized", "who are you?", 401), 4, "set OTEL_TASKS_TOKEN"),
    "forbidden": (Said({"detail": "Forbidden"}, 403), 4, "refused: not allowed (403)"),
    "read-only": (error("read_only", "this view is read-only: ...", 403), 4, "this view is read-only: ..."),
    "not found": (error("not_found", "no task has the id 'x'", 404), 1, "no task has the id 'x'"),
    "bad request": (error("bad_request", "key must be a key", 400), 2, "answers: key must be a key"),
    "too many": (error("too_many_viewers", "too many", 429, Retry_After="5"), 3, "try again in 5 s"),
    "stopping": (error("shutting_down", "the server stops", 503), 3, "try again later"),
    "proxy": (Said(b"<html>Bad Gateway</html>", 502), 3, "(502): try again later"),
    "failure": (Said(b"Internal Server Error", 500), 5, "look into the service's log"),
    "login": (Said(b"", 302, {"Location": "/login?next=/"}), 4, "redirects to /login?next=/"),
    "moved": (Said(b"", 308, {"Location": "https://x/t/v1/tasks"}), 5, "has moved: use --url https://x/t\n"),
    "no live view": (Said({"detail": "Not Found"}, 404), 5, "is not a live view (404)"),
    "a page": (Said(b"<html>"), 5, "is not a live view (200)"),
    "no object": (Said([1]), 5, "is not a live view (200)"),
    "deep": (Said(b"[" * 100_000), 5, "is not a live view (200)"),
    "later": (
        Said({"v": 2, "rows": []}),
        5,
        "speaks version 2 of the feed, and this otel-tasks version 1: pip",
    ),
    "later error": (Said({"v": 2, "error": {}}, 404), 5, "speaks version 2"),
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize(
    "command", [["ls"], ["cancel", "x", "--yes"], ["watch"]], ids=["ls", "cancel", "watch"]
)
def test_each_refusal_is_one_line_with_its_exit_code(
    case: str, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command that is refused prints one line, which says what to do, and ends with the documented code."""
    said, code, words = REFUSALS[case]
    view = View(dict.fromkeys(("GET tasks", "GET tasks/x", "GET events"), said))
    with serving(view):
        monkeypatch.setenv("OTEL_TASKS_URL", view.url)
        monkeypatch.setenv("OTEL_TASKS_TOKEN", "s3cret") if case != "unauthorized" else None
        assert main(command) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("otel-tasks: ")
    assert err.count("\n") == 1
    assert words in err
    assert "s3cret" not in err


def test_a_wrong_token_is_told_from_none(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    """One who has a token is told to check it."""
    view.answers["GET tasks"] = Said(b"", 401)
    assert main(["ls", "--token", "s3cret"]) == ExitCode.REFUSED
    assert "does not accept the token: check OTEL_TASKS_TOKEN" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ls", "--url", "ftp://x"], "is not an address: write --url http://127.0.0.1:8000/tasks"),
        (["ls", "--url", "http://"], "is not an address"),
        (["ls", "--url", "http://x:port/"], "is not an address"),
        (["ls", "--url", "http://x/\n"], "is not an address"),
        (["ls", "--url", "http://u:p@x/"], "must not have a user and a password"),
        (["ls", "--url", "http://x/?a=1"], "must not have a query"),
        (["ls", "--token", "a b"], "the token has spaces"),
        (["ls", "--ended", "--status", "running"], "are for live tasks"),
        (["ls", "--ended", "--sort", "name"], "are for live tasks"),
    ],
)
def test_wrong_arguments_name_the_right_ones(
    arguments: Sequence[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Arguments that cannot work are refused before anything is sent."""
    assert main(arguments) == ExitCode.USAGE
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "required: COMMAND"),
        (["ls", "--min-age", "soon"], "'soon' is not a duration: write 30, 5m, 2h, or 1d"),
        (["ls", "--limit", "0"], "'0' is not a number of 1 or more"),
        (["ls", "--timeout", "0"], "'0' is not a duration above 0: write 30, 5m, 2h, or 1d"),
        (["show"], "required: ID"),
    ],
)
def test_usage_errors_end_with_two(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the parser refuses ends with the same code, and in one line."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == ExitCode.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert line.endswith("--help")


def test_a_server_that_is_gone(capsys: pytest.CaptureFixture[str]) -> None:
    """A refused connection names the address, and how to give another one."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        assert (
            main(["ls", "--url", f"http://127.0.0.1:{held.getsockname()[1]}/tasks"]) == ExitCode.UNREACHABLE
        )
    assert (
        "connection refused; does the service run? Name another address with --url" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (None, "no answer within 0.2 s"),
        (b"", "it closed the connection (does it want https://?)"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "it closed the connection"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "it closed the connection"),
    ],
    ids=["silent", "closed", "no HTTP", "cut off"],
)
def test_a_server_that_does_not_answer(
    answer: bytes | None, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that is silent, breaks off, or speaks something else is unreachable, too."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                if answer is None:
                    connection.recv(65536)
                else:
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/tasks"
        assert main(["ls", "--url", url, "--timeout", "0.2"]) == ExitCode.UNREACHABLE
        thread.join()
    assert says in capsys.readouterr().err


def test_an_idle_connection_that_was_closed_is_opened_again(view: View) -> None:
    """A server may close a connection between two requests; a GET is simply sent again."""
    client = Client(Address.parse(view.url))
    view.answers["GET tasks"] = Said(rows(), headers={"Connection": "close"})
    for _ in range(2):
        assert client.get("tasks")["rows"] == []
    client.close()
    assert len(view.asked) == 2


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("127.0.0.1:8000/tasks", "http://127.0.0.1:8000/tasks"),
        ("http://x/tasks/", "http://x/tasks"),
        ("https://x/a b", None),
        ("http://[::1]:81/t", "http://[::1]:81/t"),
        ("http://x/tasks/v1", "http://x/tasks"),
        ("HTTP://X", "http://x"),
        ("http://x:80/t", "http://x/t"),
    ],
)
def test_addresses(url: str, shown: str | None) -> None:
    """A scheme, a slash at the end, and the version may be left out or given."""
    if shown is None:
        with pytest.raises(CommandError):
            Address.parse(url)
    else:
        assert str(Address.parse(url)) == shown


# --- text ------------------------------------------------------------------------------------------


def test_hostile_text_is_inert(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    """Escape sequences, marks that turn the text around, and 10 kB names do not reach the terminal."""
    row = {**SYNC_MAIL, "name": HOSTILE, "group_id": HOSTILE, "awaits": HOSTILE, "status": "running"}
    view.answers["GET tasks"] = Said(rows(row))
    view.answers["GET tasks/x"] = Said(details(task=row, path=[HOSTILE], metadata={HOSTILE: HOSTILE}))
    view.answers["GET snapshot"] = Said(snapshot(service=HOSTILE, host=HOSTILE))
    for command in (["ls"], ["show", "x"], ["tree"]):
        main(command)
        out = "".join(capsys.readouterr())
        assert re.findall(r"[^\n -~\u00a0-\u02ff\u2026\u00d7\u25a0-\u25ff\u2298\u2713\u2715]", out) == []
        assert "[2J" not in out
        assert max(map(len, out.splitlines())) < 1000
        assert "payload" in out


def test_json_escapes_what_a_terminal_acts_on(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    """The text is whole in JSON, and harmless on a terminal."""
    view.answers["GET tasks"] = Said(rows({**SYNC_MAIL, "name": HOSTILE}))
    assert main(["ls", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.strip().isprintable()
    assert json.loads(out)["rows"][0]["name"] == HOSTILE


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("plain", "plain"),
        ("a\tb\r\nc", "a b c"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]8;;http://x\x07link\x1b]8;;\x07", "link"),
        ("\x1bPq#0\x1b\\after", "after"),
        ("\x9b2Jx", "x"),
        ("a\u202eb\u2066c\u200fd", "abcd"),
        ("a\u200bb\ufeffc\U000e0041d", "abcd"),
        ("e" + "\u0301" * 50 + "x", "e\u0301\u0301x"),
        ("\ud800x", "x"),
        ("名前", "名前"),
        ("x" * 200, "x" * 119 + "…"),
    ],
)
def test_text_is_cleaned(given: str, expected: str) -> None:
    """What a terminal would act on, and what nobody sees, is removed."""
    assert text.clean(given) == expected


@pytest.mark.parametrize(
    ("given", "cells", "expected"),
    [
        ("abc", 5, "abc  "),
        ("abcdef", 4, "abc…"),
        ("名前が", 5, "名前…"),
        ("名前が", 4, "名… "),
        ("e\u0301x", 3, "e\u0301x "),
    ],
)
def test_text_fits_into_cells(given: str, cells: int, expected: str) -> None:
    """Wide characters take two cells, combining ones none."""
    assert text.fit(given, cells) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.04, "0 s"),
        (0.4, "0.4 s"),
        (44, "44 s"),
        (720, "12 m"),
        (18000, "5 h"),
        (273600, "3 d 4 h"),
    ],
)
def test_durations_take_few_characters(seconds: float, expected: str) -> None:
    """A duration has one unit, and days have their hours."""
    assert text.duration(seconds) == expected


def test_columns_give_way_in_their_order() -> None:
    """On a narrow terminal, the widest text is cut, then whole columns go."""
    columns = (Column("NAME", 8), Column("WHERE", 6, keep=2), Column("ID", 4, keep=1))
    cells = [[("a" * 20, None), ("b" * 10, None), ("c" * 4, None)]]
    assert list(table(Pen(), columns, cells))[1] == f"{'a' * 20}  {'b' * 10}  cccc"
    assert list(table(Pen(30), columns, cells))[1] == f"{'a' * 11}…  {'b' * 10}  cccc"
    assert list(table(Pen(16), columns, cells))[1] == "aaaaaaa…  bbbbb…"
    assert list(table(Pen(10), columns, cells))[1] == "aaaaaaaaa…"


def test_ascii_prints_ascii(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    """With --ascii, shapes have stand-ins, and names lose what is not ASCII."""
    view.answers["GET tasks"] = Said(rows({**SYNC_MAIL, "name": "名前"}, *live_server.PRICES))
    for command in (["ls"], ["tree"], ["show", "sync_mail"]):
        assert main([*command, "--ascii"]) == 0
        assert capsys.readouterr().out.isascii()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"status": "queued", "queue_position": 1}, "waits for a slot, next"),
        ({"status": "queued", "queue_position": 4}, "waits for a slot, 3 ahead"),
        ({"status": "queued"}, "waits for a slot"),
        ({"status": "pending"}, "not started yet"),
        ({"status": "running", "retry_at": 10.0, "attempt": 2}, "attempt 2 failed, next in 4 s"),
        ({"status": "running", "next_run": 66.0}, "next run in 60 s"),
        ({"status": "running", "awaits": "render"}, "waits for render"),
        ({"status": "running", "where": {"file": "a/b.py", "line": 3}, "calls": "get"}, "at b.py:3, in get"),
        ({"status": "running"}, ""),
        ({"status": "cancelling"}, "cancelling 0 s"),
    ],
)
def test_what_a_task_does_in_words(row: dict[str, Any], expected: str) -> None:
    """Each way to wait has its words."""
    assert phrases.doing(row, 6.0) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"kind": "waiting", "count": 41, "where": {"file": "shop/pool.py", "line": 88}},
            "41 waiting at pool.py:88",
        ),
        (
            {"kind": "waiting", "count": 41, "where": "shop/pool.py:88", "estimated": True},
            "about 41 waiting at pool.py:88",
        ),
        (
            {"kind": "blocked", "count": 1, "seconds": 1.4, "since": 4.0},
            "event loop blocked for 1.4 s · 2 s ago",
        ),
        (
            {"kind": "blocked", "count": 3, "seconds": 1.4, "since": 4.0},
            "event loop blocked 3 times, up to 1.4 s · 2 s ago",
        ),
        ({"kind": "new_kind", "count": 3}, "3 new kind"),
        ({"kind": "unstarted", "count": 2, "min_age": 10.0}, "2 not started after 10 s"),
    ],
)
def test_warnings_in_words(row: dict[str, Any], expected: str) -> None:
    """Each kind of warning has its words, and a later kind its own."""
    assert phrases.warning(row, 6.0) == expected


# --- following -------------------------------------------------------------------------------------


def follow(view: View, count: int, **options: Any) -> list[Any]:
    """The first updates of a view, and the seconds that were waited."""
    client = Client(Address.parse(view.url))
    pauses: list[float] = []
    updates = Follower(client, sleep=pauses.append, **options).updates()
    found = [next(updates) for _ in range(count)]
    updates.close()
    client.close()
    return [*found, pauses]


def bye(reason: str) -> tuple[str, dict[str, Any]]:
    """The end of a stream."""
    return ("bye", {"v": 1, "reason": reason})


def test_streams_are_continued(view: View) -> None:
    """A stream that ends by itself is opened again at once, after what has come."""
    view.streams = [
        [("snapshot", snapshot()), ("delta", delta(2)), bye("lifetime")],
        [("delta", delta(3))],
    ]
    *events, pauses = follow(view, 3)
    assert [event.data["id"] for event in events] == ["inst:1", "inst:2", "inst:3"]
    assert pauses == []
    first, second = view.asked
    assert "after" not in first.query
    assert second.query["after"] == ["inst:2"]
    assert first.query["viewer"] == second.query["viewer"]


def test_a_gap_leads_to_a_snapshot(view: View) -> None:
    """A delta on another base is dropped, and the next stream begins with everything."""
    view.streams = [[("snapshot", snapshot()), ("delta", delta(5))], [("snapshot", snapshot(id="inst:6"))]]
    *events, _ = follow(view, 2)
    assert [event.data["id"] for event in events] == ["inst:1", "inst:6"]
    assert "after" not in view.asked[1].query


def test_a_lost_connection_is_reported_and_retried(view: View) -> None:
    """While the server is away, the reader learns why; the pauses grow, and a restart brings a snapshot."""
    view.streams = [[("snapshot", snapshot()), bye("shutdown")]]
    view.answers["GET events"] = Said(b"", 502)
    client = Client(Address.parse(view.url))
    pauses: list[float] = []
    updates = Follower(client, sleep=pauses.append).updates()
    assert next(updates) != Lost
    lost = [next(updates) for _ in range(4)]
    assert all(isinstance(each, Lost) and "502" in each.message for each in lost)
    view.streams = [[("resync", {"v": 1, "reason": "restart"}), ("snapshot", snapshot(instance="other"))]]
    event = next(updates)
    assert not isinstance(event, Lost)
    assert event.data["instance"] == "other"
    updates.close()
    client.close()
    assert pauses[0] == 1.0
    assert pauses[1] < pauses[-1] <= 12.5


def test_another_wish_opens_another_stream(view: View) -> None:
    """A row that is expanded meanwhile is part of the next stream, which continues the first."""
    view.streams = [[("snapshot", snapshot()), ("delta", delta(2))], [("delta", delta(2))]]
    wishes = iter([[], [("expand", "c-prices")], [("expand", "c-prices")], [("expand", "c-prices")]])
    follow(view, 2, wanted=lambda: next(wishes))
    assert view.asked[1].query["expand"] == ["c-prices"]
    assert view.asked[1].query["after"] == ["inst:1"]


def test_watch_into_a_pipe_is_a_log(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    """Each update is a line of counters, after lines for new warnings and for tasks that failed."""
    failed = task("send", 9.0, status="failed", ended=NOW, error_type="OSError")
    done = task("other", 9.0, status="completed", ended=NOW)
    view.streams = [
        [("snapshot", snapshot()), ("delta", delta(2, ended=[done, failed])), ("delta", delta(3))]
    ]

    assert main(["watch", "--count", "3"]) == 0
    lines = [line[10:] for line in capsys.readouterr().out.splitlines() if re.match(r"\d\d\d\d-|\d\d:", line)]
    says = [line.split("  ", 1)[-1].strip() for line in lines]
    assert len(says) == 5
    assert says[0].startswith("! 1 cancelling for more than 30 s")
    assert "✕ send  failed · OSError" in says[2]
    assert "✓ 88/s completed" in says[4]


def test_watch_as_json_prints_each_update(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    """One line of JSON per update, as the feed sends it."""
    view.streams = [[("snapshot", snapshot()), ("delta", delta(2))]]
    assert main(["watch", "--json", "--count", "2"]) == 0
    kinds = [json.loads(line)["kind"] for line in capsys.readouterr().out.splitlines()]
    assert kinds == ["snapshot", "delta"]


# --- the model -------------------------------------------------------------------------------------


def test_values_are_absolute() -> None:
    """Applying a delta twice changes nothing the second time; gone rows are gone."""
    model = Model(lambda: 0.0)
    model.apply("snapshot", snapshot())
    change = delta(
        2,
        set={
            "groups": [],
            "classes": [live_server.counted("c-prices", "fetch_prices", 7, group="g2", task=None)],
        },
        gone={"groups": ["g3"], "classes": ["c-user"], "cancelling": ["uid-sync_mail"]},
        warnings=[],
    )
    model.apply("delta", change)
    once = model.tree()
    model.apply("delta", change)
    assert model.tree() == once
    assert [entry.key for entry in once] == ["g1", "g2", "uid-sync_mail", "c-prices"]
    assert model.warnings == []


def test_ages_go_on_between_updates() -> None:
    """The server's clock continues: an age grows although nothing is sent."""
    clock = [100.0]
    model = Model(lambda: clock[0])
    model.apply("snapshot", snapshot())
    clock[0] += 7.0
    assert model.now() == pytest.approx(NOW + 7.0)


def test_opened_rows_have_their_tasks() -> None:
    """The tasks of an opened class are listed from the oldest on, with how many more there are."""
    model = Model(lambda: 0.0)
    model.apply("snapshot", snapshot())
    model.opened["c-prices"] = True
    model.apply("rows", {"v": 1, "key": "c-prices", "full": True, "total": 5, "set": live_server.PRICES})
    keys = [entry.key for entry in model.tree() if entry.level == 3]
    assert keys == ["uid-fetch_prices-0", "uid-fetch_prices-1", "uid-fetch_prices-2", "more c-prices"]
    model.apply("rows", {"v": 1, "key": "c-prices", "total": 2, "set": [], "gone": ["uid-fetch_prices-0"]})
    assert [entry.key for entry in model.tree() if entry.level == 3] == [
        "uid-fetch_prices-1",
        "uid-fetch_prices-2",
    ]


# --- the command -----------------------------------------------------------------------------------


def test_the_command_starts_with_the_standard_library_alone() -> None:
    """Nothing heavy is imported before the first line: neither the package, nor a framework, nor Textual."""
    code = """
import sys
from otel_tasks_terminal.cli import main
try:
    main(["ls", "--url", "http://127.0.0.1:9/"])
finally:
    unwanted = {"otel_tasks", "opentelemetry", "fastapi", "starlette", "textual", "rich", "asyncio",
                "dataclasses", "inspect", "importlib.metadata", "shutil"}
    if sys.version_info[:2] == (3, 14):
        # Its argparse needs them, for the colors of the help.
        unwanted -= {"dataclasses", "inspect"}
    print(sorted(unwanted & sys.modules.keys()))
"""
    result = subprocess.run(
        # Without the site's own files: those of coverage and setuptools import some of these.
        [sys.executable, "-S", "-W", "error", "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.stdout == "[]\n", result.stderr


def test_modules_and_functions_are_small() -> None:
    """The bounds of the package's structure hold here, too."""
    for path in (ROOT / "otel_tasks_terminal").rglob("*.py"):
        source = path.read_text("utf-8")
        docstrings = [
            node.value
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ]
        prose = sum((text.end_lineno or text.lineno) - text.lineno + 1 for text in docstrings)
        lines = [line for line in source.splitlines() if line.strip() and not line.strip().startswith("#")]
        assert len(lines) - prose <= LINES, path.name
        functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, measures.Function)]
        complex_ones = [node.name for node in functions if measures.complexity(node) > COMPLEXITY]
        assert complex_ones == [], path.name


def test_the_script_is_installed() -> None:
    """`otel-tasks` is the script of the distribution."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["scripts"] == {"otel-tasks": "otel_tasks_terminal.cli:main"}
    assert project["optional-dependencies"]["top"] == ["textual>=8.2"]


def test_top_without_textual_says_how_to_get_it(
    view: View, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the extra, the message has the line to type, and what works without it."""
    for name in [name for name in sys.modules if name.startswith("otel_tasks_terminal.top")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "textual", None)
    monkeypatch.setitem(sys.modules, "textual.app", None)
    assert main(["top"]) == ExitCode.USAGE
    assert "pip install 'otel_tasks[top]'; otel-tasks watch works without it" in capsys.readouterr().err


def test_help_names_the_exit_codes_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """The page lists each exit code, as the help does."""
    page = (ROOT / "docs" / "howto" / "terminal.md").read_text("utf-8")
    listed = {int(code) for code in re.findall(r"^\| `(\d+)` \|", page, re.MULTILINE)}
    assert listed == set(ExitCode)
    with pytest.raises(SystemExit):
        main(["--help"])
    found = capsys.readouterr().out
    assert all(str(int(code)) in found for code in ExitCode)
