"""A live view with prepared answers: it can refuse, break off, and speak a later version."""

from __future__ import annotations

import json
import queue
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Row = dict[str, Any]

NOW = 81234.117
EPOCH = 1764380000.25
TOKEN = "s3cret"


@dataclass
class Asked:
    """A request that the server has got."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: Any = None


@dataclass
class Said:
    """An answer."""

    data: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict[str, str])


@dataclass
class View:
    """The prepared answers, by `GET tasks`; `streams` has the events of each stream."""

    answers: dict[str, Said] = field(default_factory=dict[str, Said])
    streams: list[list[tuple[str, Row]]] = field(default_factory=list[list[tuple[str, Row]]])
    asked: list[Asked] = field(default_factory=list[Asked])
    url: str = ""
    # With `push`, streams stay open, and each event goes to the one that is.
    stays_open: bool = False
    closing: threading.Event = field(default_factory=threading.Event)
    pushed: queue.Queue[tuple[str, Row]] = field(default_factory=queue.Queue)
    # Called with each request, before it is answered.
    on_request: Callable[[Asked], None] = lambda asked: None

    def push(self, name: str, data: Row) -> None:
        """Send an event."""
        self.pushed.put((name, data))

    def answer(self, asked: Asked) -> Said:
        """Answer a request that is not for a stream."""
        if found := self.answers.get(f"{asked.method} {asked.path}"):
            return found
        message = f"no task has the id {asked.path!r}"
        return Said({"v": 1, "error": {"code": "not_found", "message": message}}, 404)


@contextmanager
def serving(view: View) -> Iterator[View]:
    """Serve the view at a free port; its `url` is set."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(view))
    server.daemon_threads = True
    # A client that hangs up is part of some tests.
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # of this server alone
    view.url = f"http://127.0.0.1:{server.server_address[1]}/tasks"
    thread = threading.Thread(target=lambda: server.serve_forever(0.01))
    thread.start()
    try:
        yield view
    finally:
        view.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(view: View) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._serve()

        def do_POST(self) -> None:
            self._serve()

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing."""

        def _serve(self) -> None:
            parts = urlsplit(self.path)
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            headers = {name.lower(): value for name, value in self.headers.items()}
            path = unquote(parts.path.removeprefix("/tasks/v1/"))
            asked = Asked(self.command, path, parse_qs(parts.query), headers, body)
            view.asked.append(asked)
            view.on_request(asked)
            if path == "events" and view.streams:
                self._stream(view.streams.pop(0))
            else:
                self._answer(view.answer(asked))

        def _stream(self, events: list[tuple[str, Row]]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.send_header("Connection", "close")
            self.end_headers()
            for name, data in events:
                self._send(name, data)
            while view.stays_open and not view.closing.is_set():
                with suppress(queue.Empty):
                    self._send(*view.pushed.get(timeout=0.05))
            self.close_connection = True

        def _send(self, name: str, data: Row) -> None:
            self.wfile.write(f"event: {name}\ndata: {json.dumps(data)}\n\n".encode())

        def _answer(self, said: Said) -> None:
            body = said.data if isinstance(said.data, bytes) else json.dumps(said.data).encode()
            self.send_response(said.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            for name, value in said.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    return Handler


# --- what there is to see --------------------------------------------------------------------------


def task(name: str, age: float = 3.0, **more: Any) -> Row:
    """A live task."""
    return {
        "id": f"uid-{name}",
        "task_id": name,
        "name": name,
        "kind": "task",
        "group": "g1",
        "class": f"c-{name}",
        "group_id": "root",
        "priority": "NORMAL",
        "status": "running",
        "created": NOW - age,
        **more,
    }


SYNC_MAIL = task(
    "sync_mail",
    720.0,
    group="g2",
    group_id="GET /report/{id}#4711",
    task_id="GET /report/{id}#4711/sync_mail",
    priority="HIGH",
    status="cancelling",
    cancel_requested=NOW - 44.0,
    cause={"kind": "client_disconnect", "asked_by": "GET /report/{id}", "at": NOW - 44.0},
    where={"file": "shop/pool.py", "line": 88, "function": "Pool.acquire"},
)
PRICES = [
    task(f"fetch_prices-{n}", 21.0 - n, group="g2", group_id="GET /report/{id}#4711", **{"class": "c-prices"})
    for n in range(3)
]


def counted(key: str, name: str, count: int, **more: Any) -> Row:
    """A group or a class."""
    ages = {"p50": NOW - 3.0, "p90": NOW - 40.0, "oldest": NOW - 720.0}
    return {
        "key": key,
        "name": name,
        "count": count,
        "queued": 0,
        "cancelling": 0,
        "progress": None,
        **ages,
        **more,
    }


def snapshot(**more: Any) -> Row:
    """The overview: a request with a task that does not stop and three others, and imports that wait."""
    classes = [
        counted("c-sync_mail", "sync_mail", 1, group="g2", kind="task", cancelling=1, task=SYNC_MAIL),
        counted("c-prices", "fetch_prices", 3, group="g2", kind="task", task=None),
        counted("c-user", "import_user", 190, group="g3", kind="task", queued=140, task=None),
    ]
    groups = [
        counted("g1", "default", 194, parent=None, kind="root", instances=1, queued=140, cancelling=1),
        counted("g2", "GET /report/{id}", 4, parent="g1", kind="request", instances=1, cancelling=1),
        counted(
            "g3",
            "imports",
            190,
            parent="g1",
            kind="labeled",
            instances=1,
            queued=140,
            limit=50,
            progress={"done": 61.0, "total": 100.0, "reporting": 2},
        ),
    ]
    return {
        "v": 1,
        "kind": "snapshot",
        "id": "inst:1",
        "instance": "inst",
        "now": NOW,
        "epoch": EPOCH,
        "interval": 1.0,
        "service": "shop",
        "manager": "default",
        "host": "api-7f",
        "pid": 812,
        "actions": ["cancel"],
        "trace_url": None,
        "stats": {
            "live": 194,
            "running": 53,
            "queued": 140,
            "cancelling": 1,
            "completed": 109000,
            "failed": 37,
            "cancelled": 1000,
            "closed": False,
        },
        "samples": [],
        "groups": groups,
        "classes": classes,
        "cancelling": [SYNC_MAIL],
        "warnings": [
            {
                "key": "cancelling",
                "kind": "cancelling",
                "count": 1,
                "since": NOW - 44.0,
                "min_age": 30.0,
                "query": "status=cancelling&min_age=30",
            }
        ],
        "ended": [],
        "more": {"groups": 0, "classes": 0, "cancelling": 0},
        **more,
    }


def delta(number: int, **more: Any) -> Row:
    """The changes of a tick: nothing but the time, unless something else is given."""
    now = NOW + number - 1
    return {
        "v": 1,
        "kind": "delta",
        "base": f"inst:{number - 1}",
        "id": f"inst:{number}",
        "now": now,
        "epoch": EPOCH,
        "stats": snapshot()["stats"],
        "sample": [now, 53, 140, 1, 109000 + 88 * number, 37, 1000],
        "set": {"groups": [], "classes": [], "cancelling": []},
        "gone": {"groups": [], "classes": [], "cancelling": []},
        "more": {"groups": 0, "classes": 0, "cancelling": 0},
        "ended": [],
        "ended_more": 0,
        **more,
    }


def rows(*tasks: Row, **more: Any) -> Row:
    """A list of tasks."""
    return {
        "v": 1,
        "now": NOW,
        "epoch": EPOCH,
        "rows": list(tasks),
        "total": len(tasks),
        "next": None,
        "partial": False,
        **more,
    }


def details(**more: Any) -> Row:
    """Everything about the task that does not stop."""
    return {
        "v": 1,
        "now": NOW,
        "epoch": EPOCH,
        "state": "live",
        "task": SYNC_MAIL,
        "path": ["default", "GET /report/{id}#4711", "sync_mail"],
        "frames": [
            {"file": "shop/pool.py", "line": 88, "function": "Pool.acquire", "own": True},
            {"file": "shop/mail.py", "line": 17, "function": "sync_mail", "own": True},
        ],
        "waiters": [{"id": "Tn7", "name": "render_chart", "task_id": "GET /report/{id}#4711/render_chart"}],
        "cause_chain": [
            {
                "step": "cause",
                "kind": "client_disconnect",
                "name": "GET /report/{id}",
                "message": None,
                "at": NOW - 44.0,
            },
            {"step": "group", "name": "GET /report/{id}#4711", "at": NOW - 43.9999},
            {"step": "task", "name": "sync_mail", "at": NOW - 43.9998, "ended": None},
        ],
        "siblings": {
            "live": 3,
            "ended": {"completed": 1, "failed": 0, "cancelled": 3},
            "rows": PRICES,
            "ended_rows": [],
        },
        "children": 2,
        "metadata": {"user": "ada"},
        "trace_url": None,
        "can": ["cancel"],
        **more,
    }


def prepared() -> View:
    """A view with all of this."""
    return View(
        {
            "GET snapshot": Said(snapshot()),
            "GET tasks": Said(rows(SYNC_MAIL, *PRICES)),
            "GET tasks/sync_mail": Said(details()),
            "GET tasks/uid-sync_mail": Said(details()),
            "POST tasks/uid-sync_mail/cancel": Said(
                {
                    "v": 1,
                    "result": "cancelled",
                    "state": "ended",
                    "task": {**SYNC_MAIL, "status": "cancelled", "ended": NOW},
                }
            ),
        }
    )
