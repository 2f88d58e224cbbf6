"""The commands: each asks the feed, and prints the answer."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from otel_tasks_terminal import details, phrases, views
from otel_tasks_terminal.errors import CommandError, ExitCode, usage
from otel_tasks_terminal.output import (
    check_node_option,
    check_nodes,
    is_json,
    pen_of,
    print_json,
    print_lines,
)
from otel_tasks_terminal.text import clean, counted, number

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from otel_tasks_terminal.model import Model
    from otel_tasks_terminal.source import Pairs, Source

    Connect = Callable[[], Source]

Row = dict[str, Any]

# An argument that begins with a dash would be taken for an option.
_SORTS = {"newest": "-age"}
# The tasks that `tree --tasks` shows below one name.
TASKS_PER_CLASS = 200


def ls(options: argparse.Namespace, connect: Connect) -> int:
    """List tasks."""
    pairs = _filters(options)
    source = connect()
    answer = source.listed(pairs, options.limit)
    rows = answer["rows"]
    if is_json(options):
        print_json(answer)
    elif options.quiet:
        print_lines(clean(row["id"]) for row in rows if row.get("id"))
    elif rows:
        print_lines((views.ended_list if options.ended else views.live_list)(answer, pen_of(options)))
    if options.node and not rows:
        _check_node(options.node, source)
    if not is_json(options):
        _note_rest(answer, ended=options.ended, filtered=bool(pairs))
    return ExitCode.OK


def _check_node(name: str, source: Source) -> None:
    """Say which nodes there are, if none has this name."""
    from otel_tasks_terminal.model import Model  # the other lists start without

    model = Model(only=name)
    model.apply("snapshot", source.snapshot())
    check_nodes(model)


def _filters(options: argparse.Namespace) -> Pairs:
    if options.ended and (options.status or options.where or options.min_age or options.sort):
        raise usage("--status, --where, --min-age, and --sort are for live tasks, not for --ended")
    values = {
        "q": " ".join(options.words),
        "status": options.status,
        "min_age": None if options.min_age is None else f"{options.min_age:g}",
        "where": options.where,
        "group_id": options.group,
        "node": options.node,
        "key": options.key,
        "state": "ended" if options.ended else None,
        "sort": _SORTS.get(options.sort, options.sort),
    }
    return [(name, value) for name, value in values.items() if value]


def _note_rest(answer: Row, *, ended: bool, filtered: bool) -> None:
    """Say on stderr what the list does not: nothing found, or more than this."""
    shown, total = len(answer["rows"]), answer.get("total") or 0
    # All pages of a fleet together have 1,000 rows.
    is_cut = "silent" in answer and 0 < shown < total and not answer.get("next")
    kind = "ended task" if ended else "live task"
    if not shown:
        print(f"no {kind}{' matches' if filtered else ''}", file=sys.stderr)
    elif answer.get("next"):
        print(
            f"{number(shown)} of {counted(total, kind)}: --limit, or a filter, shows others", file=sys.stderr
        )
    elif is_cut:
        print(
            f"{number(shown)} of {counted(total, kind)}: --node, or a filter, shows others", file=sys.stderr
        )
    if answer.get("silent"):
        print(f"no answer from {', '.join(map(clean, answer['silent']))}", file=sys.stderr)
    if answer.get("partial"):
        print("not all tasks were searched by their line: add a word or --group", file=sys.stderr)


def tree(options: argparse.Namespace, connect: Connect) -> int:
    """Show groups, and the tasks in them by name."""
    from otel_tasks_terminal.model import Model  # the other commands start without

    check_node_option(options)
    client = connect()
    snapshot = client.snapshot()
    if is_json(options):
        print_json(snapshot)
        return ExitCode.OK
    model, pen = Model(only=options.node), pen_of(options)
    model.apply("snapshot", snapshot)
    check_nodes(model)
    model.open_all()
    if options.tasks:
        _open_classes(model, client)
    print_lines(views.head(model, pen))
    print()
    print_lines(views.tree(model.tree(options.sort), model, pen))
    _note_more(model)
    return ExitCode.OK


def _open_classes(model: Model, client: Source) -> None:
    for entry in model.tree():
        if entry.kind == "class":
            answer = client.listed([("key", entry.key)], TASKS_PER_CLASS)
            model.take(entry.key, answer["rows"], (), answer.get("total") or 0, full=True)
            model.opened[entry.key] = True


def _note_more(model: Model) -> None:
    if unheard := model.unheard():
        print(f"no answer from {', '.join(map(clean, unheard))}", file=sys.stderr)
    for name, singular in (("groups", "group"), ("classes", "name of tasks")):
        if count := model.more.get(name):
            print(f"{counted(count, 'more ' + singular)} not shown", file=sys.stderr)


def show(options: argparse.Namespace, connect: Connect) -> int:
    """Show everything about one task."""
    answer = connect().task(options.id, options.node)
    if is_json(options):
        print_json(answer)
    else:
        print_lines(details.lines(answer, pen_of(options)))
        if unheard := _unheard(answer):
            print(unheard, file=sys.stderr)
    return ExitCode.OK


def _unheard(answer: Row) -> str:
    """The nodes that may have a task of this name, too; empty if all have answered."""
    silent, more = answer.get("silent") or (), answer.get("not_asked") or 0
    rest = [f"{counted(more, 'more node')}, which are too many to ask"] if more else []
    return f"no answer from {', '.join([*map(clean, silent), *rest])}" if silent or rest else ""


# --- cancel ----------------------------------------------------------------------------------------


def cancel(options: argparse.Namespace, connect: Connect) -> int:
    """Cancel one task, once someone has confirmed it."""
    if not options.yes and not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise usage("cancel asks before it acts, and there is no terminal to ask: add --yes")
    client = connect()
    found = client.task(options.id, options.node)
    task = found["task"]
    _check_unique(client, options.id, found)
    if found.get("state") == "ended":
        return _report(
            options, {"v": 1, "result": "ended", "state": "ended", "task": task}, found.get("now", 0.0)
        )
    if not options.yes and not _confirmed(found):
        print("nothing was cancelled", file=sys.stderr)
        return ExitCode.NOTHING_DONE
    # By its uid: another task may have the name by the time the answer is typed.
    return _report(options, client.cancel(task["id"], options.reason), found.get("now", 0.0))


def _check_unique(client: Source, wanted: str, found: Row) -> None:
    """Refuse a name that several live tasks have, or may have: the service would choose one of them."""
    task = found["task"]
    if task.get("node"):
        # The view of a fleet has asked the nodes itself.
        _check_heard(found)
        return
    if wanted in (task.get("id"), task.get("task_id")):
        return
    same = [
        row
        for row in client.listed([("q", wanted[:200])], 1000)["rows"]
        if row.get("name") == task.get("name")
    ]
    if len(same) > 1:
        ids = ", ".join(clean(row.get("id")) for row in same[:3])
        more = ", ..." if len(same) > 3 else ""
        raise CommandError(
            ExitCode.NOTHING_DONE,
            f"{counted(len(same), 'task')} have the name {clean(wanted)!r}: give the id of one ({ids}{more})",
        )


def _check_heard(found: Row) -> None:
    unheard = _unheard(found)
    if unheard:
        fix = "choose a node with --node"
        if found.get("state") == "live":
            fix += f", or give the id {clean(found['task'].get('id'), 200)}"
        raise CommandError(
            ExitCode.UNREACHABLE, f"{unheard}, and a live task of this name may be there: {fix}"
        )


def _confirmed(found: Row) -> bool:
    task = found["task"]
    says = phrases.doing(task, found.get("now", 0.0))
    print(f"cancel {clean(task.get('name'))}?", file=sys.stderr)
    print(f"  id         {clean(task.get('task_id'), 200)}", file=sys.stderr)
    if task.get("node"):
        print(f"  node       {clean(task['node'], 200)}", file=sys.stderr)
    if says:
        print(f"  now        {says}", file=sys.stderr)
    print(f"  also ends  {phrases.also_ended(found.get('children') or 0)}", file=sys.stderr)
    print("[y/N] ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not answer:
        # Ctrl-D: the line of the question is not ended yet.
        print(file=sys.stderr)
    return answer.strip().casefold() in ("y", "yes")


def _report(options: argparse.Namespace, answer: Row, now: float) -> int:
    result, task = answer.get("result"), answer.get("task") or {}
    name = clean(task.get("name", options.id))
    if is_json(options):
        print_json(answer)
    elif result == "cancelled":
        print(f"{name} was cancelled, and has ended")
    elif result == "requested":
        print(f"{name} still runs: it cleans up, or ignores the request")
    else:
        print(f"{name} had already ended: {phrases.outcome(task, now)}")
    return ExitCode.STILL_RUNS if result == "requested" else ExitCode.OK


# --- other modules ---------------------------------------------------------------------------------


def watch(options: argparse.Namespace, connect: Connect) -> int:
    """Show the overview, and keep it up to date."""
    from otel_tasks_terminal.watch import watch

    return watch(options, connect())


def top(options: argparse.Namespace, connect: Connect) -> int:
    """Run the screen; needs Textual, which only this command imports."""
    try:
        from otel_tasks_terminal.top import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("textual", "rich"):
            raise
        raise usage(
            "top needs Textual: pip install 'otel_tasks[top]'; otel-tasks watch works without it"
        ) from None
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise usage("top needs a terminal: otel-tasks tree and watch work without")
    return run(connect(), ascii_only=pen_of(options).ascii, node=options.node)
