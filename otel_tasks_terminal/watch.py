"""``otel-tasks watch``: the overview, drawn again with each update; in a pipe, a line for each change."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from otel_tasks_terminal import phrases, views
from otel_tasks_terminal.errors import ExitCode
from otel_tasks_terminal.follow import Follower, Lost
from otel_tasks_terminal.model import Model
from otel_tasks_terminal.output import check_node_option, check_nodes, is_json, pen_of, print_json
from otel_tasks_terminal.pen import terminal_size
from otel_tasks_terminal.text import clean, clock, cut, duration

if TYPE_CHECKING:
    import argparse
    from collections.abc import Generator, Iterable, Iterator
    from types import FrameType

    from otel_tasks_terminal.pen import Pen
    from otel_tasks_terminal.source import Event, Source

Row = dict[str, Any]

# The alternate screen without a cursor, and back.
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _REST_OF_LINE, _REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


def watch(options: argparse.Namespace, client: Source) -> int:
    """Follow the feed until the reader has enough."""
    check_node_option(options)
    model = Model(only=options.node)
    updates = _counted(Follower(client).updates(), model, options.count)
    if is_json(options):
        _as_json(updates)
    elif sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        _on_screen(updates, model, options)
    else:
        _as_log(updates, model, pen_of(options))
    return ExitCode.OK


def _counted(updates: Iterable[Event | Lost], model: Model, count: int | None) -> Iterator[Event | Lost]:
    """Apply each update to the model, and end after so many."""
    is_checked = False
    for update in updates:
        if isinstance(update, Lost):
            yield update
            continue
        model.apply(update.name, update.data)
        if update.name == "snapshot" and not is_checked:
            is_checked = True
            check_nodes(model)
        yield update
        if count is not None:
            count -= 1
            if count == 0:
                return


def _as_json(updates: Iterable[Event | Lost]) -> None:
    for update in updates:
        if isinstance(update, Lost):
            print(f"otel-tasks: {update.message}", file=sys.stderr)
        else:
            print_json(update.data)
            sys.stdout.flush()


# --- on a terminal ---------------------------------------------------------------------------------


def _on_screen(updates: Iterable[Event | Lost], model: Model, options: argparse.Namespace) -> None:
    seen = time.monotonic()
    with _screen():
        for update in updates:
            state = ""
            if isinstance(update, Lost):
                state = f"! stale for {duration(time.monotonic() - seen)}, reconnecting · {update.message}"
            else:
                seen = time.monotonic()
            _draw(_frame(model, pen_of(options), options.sort, state), stale=bool(state))


@contextmanager
def _screen() -> Generator[None]:
    # SIGTERM must not leave a terminal without a cursor.
    before = signal.signal(signal.SIGTERM, _terminated)
    sys.stdout.write(_ENTER)
    try:
        yield
    finally:
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()
        signal.signal(signal.SIGTERM, before)


def _terminated(_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(ExitCode.TERMINATED)


def _frame(model: Model, pen: Pen, sort: str, state: str) -> list[str]:
    rows = terminal_size(sys.stdout)[1]
    lines = [*views.head(model, pen, state), "", *views.tree(model.tree(sort), model, pen)]
    if len(lines) > rows:
        # The heading says how much is missing.
        missing = len(lines) - rows + 1
        lines = [
            *lines[: rows - 1],
            pen.line((f"… {missing} more lines: make the terminal higher, or use otel-tasks top", "mute")),
        ]
    return lines


def _draw(lines: list[str], *, stale: bool) -> None:
    # In one write and without clearing first, so that nothing flickers.
    dim = "\x1b[2m" if stale else ""
    body = f"{_REST_OF_LINE}\r\n".join(dim + line for line in lines)
    sys.stdout.write(f"{_HOME}{body}\x1b[0m{_REST_OF_LINE}{_REST_OF_SCREEN}")
    sys.stdout.flush()


# --- into a file or a pipe -------------------------------------------------------------------------


def _as_log(updates: Iterable[Event | Lost], model: Model, pen: Pen) -> None:
    known: set[str] = set()
    lost = False
    for update in updates:
        if isinstance(update, Lost):
            if not lost:
                print(f"otel-tasks: {update.message}; reconnecting", file=sys.stderr, flush=True)
            lost = True
            continue
        if lost:
            print("otel-tasks: connected again", file=sys.stderr, flush=True)
            lost = False
        known = _log(update.data, model, pen, known)
        sys.stdout.flush()


def _log(data: Row, model: Model, pen: Pen, known: set[str]) -> set[str]:
    """Print what an update has brought; return the keys of the warnings."""
    now = model.now()
    at = clock(model.epoch + data.get("now", now))
    for warning in model.warnings:
        if warning.get("key") not in known:
            print(pen.line((f"{at}  ! {views.warned(warning, now)}", None)))
    if data.get("kind") == "delta":
        # From the oldest to the newest, as in any log; those that completed are only counted.
        for task in reversed(data.get("ended", ())):
            if not model.is_shown(task.get("node")):
                continue
            if task.get("status") != "completed" or task.get("cancel_ignored"):
                print(pen.line((f"{at}  {_ended(task, now)}", None)))
    print(pen.line((f"{at}  {views.counters(model)}", None)))
    return {str(warning.get("key")) for warning in model.warnings}


def _ended(task: Row, now: float) -> str:
    name, group = cut(clean(task.get("name", "?")), 60), clean(task.get("group_id", ""))
    node = f"  {views.node_name(task['node'])}" if task.get("node") else ""
    return f"{views.status(task)[:1]} {name}  {phrases.outcome(task, now)}  {group}{node}"
