"""Generates the text between ``<!-- generated: ... -->`` marks, the pictures, and llms.txt.

    python -m docs.generate    # writes them; a test fails when a file differs

The tables of spans and metrics are observed, not read from the source: ``docs.scenes`` runs an application
that produces every span, and the tables list what reached the SDK. The meaning of an attribute or an error is
written below; one without a meaning is a KeyError.
"""

from __future__ import annotations

import inspect
import re
import textwrap
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import otel_tasks
from docs import scenes, signatures
from docs.architecture import architecture_picture
from docs.picture import state_picture
from otel_tasks import asgi, exceptions, fastapi, fleet, instrumentation, live, logs, taskiq, testing
from otel_tasks._core.state import TRANSITIONS, CancelKind, Outcome, TaskPriority

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

DOCS = Path(__file__).parent
ROOT = DOCS.parent

# --- meanings ----------------------------------------------------------------------------------------------

ATTRIBUTES = {
    "otel_tasks.task.name": "The task's name without numbers and ids. Not on spans: it is the span's name.",
    "otel_tasks.task.id": "Its unique id: its name, or `group id/name` in a scoped group.",
    "otel_tasks.task.priority": "Its priority at creation.",
    "otel_tasks.task.state": "Whether a live task runs or waits for a place.",
    "otel_tasks.task.outcome": "How it ended.",
    "otel_tasks.task.attempt": "With `retry=`, the number of an attempt, from 1 on. Its span is below the "
    "task's span and has the same name.",
    "otel_tasks.task.queue.duration": "Seconds it waited for a place; absent if it did not.",
    "otel_tasks.group.name": "Its group, without numbers and ids; a request's is `METHOD /route/{template}`.",
    "otel_tasks.group.id": "The id of a scoped group, its name with a number (`load#7`). Absent for a "
    "labeled group: its id is its name.",
    "otel_tasks.manager.name": "Its manager's name. Absent for managers without a name of their own, such as "
    "`global_task_manager`.",
    "otel_tasks.cancel.reason": "Why it was cancelled: the kind of its cause.",
    "otel_tasks.cancel.message": "The message of the cancellation, if it has one.",
    "otel_tasks.cancel.duration": "Seconds from the cancel request to the end.",
    "otel_tasks.cancel.ignored": "It was cancelled and returned anyway. Absent otherwise.",
    "otel_tasks.cancel.origin.span_id": "The span that caused the cancellation, if it is the parent; a link "
    "(`cancelled_by`) names any other one.",
    "otel_tasks.cancel.origin.trace_id": "The trace of that span.",
    "otel_tasks.cancel.count": "The number of the request's tasks that were cancelled; with a 504, before "
    "it was sent.",
    "otel_tasks.request.outcome": "Why the request ended before its response was complete; `timeout` is its "
    "`request_timeout`, `closed` (1000, 1001) and `shutdown` (1012) are WebSockets. Absent otherwise.",
    "otel_tasks.request.handler": "What became of the handler when the client left: it was `cancelled`, it "
    "`ran_on`, or it noticed the disconnect itself and `finished`. With a 504, what it had done when the "
    "answer was sent: layers of telemetry end the span then.",
    "otel_tasks.request.close_code": "The close code of a WebSocket that the client or the server closed.",
    "otel_tasks.link": "The kind of link.",
    "code.function.name": "The coroutine function's qualified name.",
    "error.type": "The exception's class; `timeout` or `abandoned` for these outcomes.",
}

EVENTS = {
    "otel_tasks.cancel_requested": "The moment of the cancel request.",
    "otel_tasks.client_disconnect": "The moment the client left, on the request's span.",
    "otel_tasks.retry": "On the task's span: an attempt failed (`error.type`), and the next one starts after "
    "the delay, in seconds.",
    "otel_tasks.started": "The moment a queued task got its place.",
    "exception": "OpenTelemetry's own, with type, message, and stack; never for a cancellation.",
}

LINKS = {
    "cancelled_by": "The span that caused the cancellation: the request's, the failed sibling's, or the one "
    "that was current at the `cancel()` call. If it is the span's own parent, attributes name it "
    "(`otel_tasks.cancel.origin.span_id`): Jaeger shows no link to a parent.",
    "spawned_by": 'The span that was current where a service, or a task in a new trace (`trace="new"`), '
    "was created.",
    "restart_of": "The service's attempt before this one.",
    "previous_run": "The run of the periodic work before this one.",
    "failure_of": "The task of the item whose failure a consumer's `on_failure` gets.",
}

OUTCOMES = {
    Outcome.SUCCESS: ("UNSET", "It returned."),
    Outcome.ERROR: ("ERROR, with the exception's text", "It raised."),
    Outcome.TIMEOUT: ("ERROR", "Its own `timeout`, `queue_timeout`, or `attempt_timeout` expired."),
    Outcome.CANCELLED: ("UNSET", "It was cancelled, whatever the cause."),
    Outcome.ABANDONED: ("ERROR", "It did not stop at shutdown, so the shutdown ended its span."),
}

REASONS = {
    CancelKind.EXPLICIT: "Code called `cancel()`, `cancel_task()`, `cancel_group()`, or similar.",
    CancelKind.CLIENT_DISCONNECT: "The client left before the response was complete.",
    CancelKind.TIMEOUT: "A timeout expired: the task's, its group's, or one of asyncio or anyio around it.",
    CancelKind.SHUTDOWN: "The manager was shut down, or the server cancelled the request.",
    CancelKind.SIBLING_FAILED: "Another task of its scoped group, or of an `asyncio.TaskGroup`, raised.",
    CancelKind.SCOPE_ENDED: "Its request or its block ended, or the block raised.",
    CancelKind.REPLACED: "A task of the same name replaced it.",
    CancelKind.HOST_LOST: "The process that owned the work is gone, or another process runs it now.",
    CancelKind.FOREIGN: "It ended with a `CancelledError` that no cancel request caused.",
}

# How to fix each error.
FIXES = {
    "TaskNotFoundError": "Call `get_task_info(name)`, which returns None instead and knows ended tasks. To "
    "wait for the result of a task that may have ended, start it with `start_task`, which keeps results.",
    "TaskExistsError": 'Wait for the live one, choose another name, or pass `on_conflict="suffix"`, '
    '`"return"` or `"replace"`.',
    "GroupClosedError": "Work that outlives its request or block belongs in "
    "`manager.create_task(..., group=...)`. After a disconnect there is nothing to fix: no client waits for "
    "the work.",
    "ManagerClosedError": "Start work before `shutdown()`, or enter the manager again: `async with manager`.",
    "QueueFullError": "Answer 503 and let the client come back, wait with `await put_task(...)`, or raise "
    "`max_queue`.",
    "WrongLoopError": "Use one manager per event loop, or wait until the first loop's tasks have ended.",
    "WrongThreadError": "From another thread, call `create_task_threadsafe(...)`, which returns a "
    "`concurrent.futures.Future`.",
    "IllegalTransitionError": "This is a bug of the library: please report it.",
}

# The callable whose docstring has the options, another that has their defaults, and names to leave out.
SETTINGS: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None, set[str]]] = {
    "TaskGroupMiddleware": (asgi.TaskGroupMiddleware, None, {"app"}),
    "make_lifespan": (fastapi.make_lifespan, None, set()),
    "TaskManager": (otel_tasks.TaskManager, None, set()),
    "TaskGroup": (otel_tasks.TaskGroup, None, set()),
    "create_task": (otel_tasks.TaskManager.create_task, otel_tasks.TaskGroup._create, {"coro"}),
    "watch": (otel_tasks.TaskManager.watch, None, set()),
    "live_view": (live.live_view, None, set()),
    "Fleet": (fleet.Fleet, None, set()),
    "RetryPolicy": (otel_tasks.RetryPolicy, None, set()),
    "RestartPolicy": (otel_tasks.RestartPolicy, None, set()),
}

# --- tables ------------------------------------------------------------------------------------------------


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(heads), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def code(words: Iterable[object]) -> str:
    """Each word as code, separated by commas."""
    return ", ".join(f"`{word}`" for word in words)


def transitions() -> str:
    """The table of ``state``, row by row."""
    return table(
        ["from", "signal", "to"],
        ([f"`{s}`", str(signal), f"`{t}`"] for s, row in TRANSITIONS.items() for signal, t in row.items()),
    )


def span_attributes(seen: scenes.Seen) -> str:
    """Every attribute seen on a span, with its place and its meaning."""
    return table(
        ["attribute", "type", "on", "meaning"],
        (
            [f"`{name}`", types, places, f"{ATTRIBUTES[name]} {values_of(name)}".strip()]
            for name, types, places in seen.attributes()
        ),
    )


def values_of(name: str) -> str:
    """The values an attribute can have; empty if there is no list of them."""
    if name == "otel_tasks.task.priority":
        return ", ".join(f"`{priority.value}` {priority.name}" for priority in TaskPriority) + "."
    lists: dict[str, Iterable[object]] = {
        "otel_tasks.task.outcome": Outcome,
        "otel_tasks.cancel.reason": CancelKind,
        "otel_tasks.request.outcome": [
            CancelKind.CLIENT_DISCONNECT,
            CancelKind.TIMEOUT,
            "closed",
            CancelKind.SHUTDOWN,
        ],
        "otel_tasks.link": LINKS,
    }
    return f"{code(lists[name])}." if name in lists else ""


def span_events(seen: scenes.Seen) -> str:
    """Every event seen on a span."""
    return table(
        ["event", "attributes", "meaning"],
        (
            [f"`{name}`", code(k for k in keys if k.startswith("otel_tasks.")), EVENTS[name]]
            for name, keys in seen.events()
        ),
    )


def span_links(seen: scenes.Seen) -> str:
    """Every kind of link seen."""
    return table(["`otel_tasks.link`", "leads to"], ([f"`{kind}`", LINKS[kind]] for kind in seen.links()))


def outcomes(seen: scenes.Seen) -> str:
    """The meaning of each outcome, and the span status seen with it."""
    statuses = seen.statuses()
    for outcome, (status, _) in OUTCOMES.items():
        assert status.startswith(statuses[outcome]), (outcome, statuses)
    return table(
        ["`otel_tasks.task.outcome`", "span status", "when"],
        ([f"`{outcome}`", *OUTCOMES[outcome]] for outcome in Outcome),
    )


def reasons(_: scenes.Seen) -> str:
    """Every kind of cause."""
    return table(
        ["`otel_tasks.cancel.reason`", "when"], ([f"`{kind}`", REASONS[kind]] for kind in CancelKind)
    )


def metrics(seen: scenes.Seen) -> str:
    """Every instrument seen, as the SDK got it."""
    return table(
        ["metric", "instrument", "unit", "attributes", "meaning"],
        (
            [f"`{m.name}`", m.instrument, f"`{m.unit}`", code(m.attributes), m.description]
            for m in seen.metrics()
        ),
    )


def buckets(seen: scenes.Seen) -> str:
    """The boundaries of the histograms."""
    (boundaries,) = {m.buckets for m in seen.metrics() if m.buckets}
    return "Histograms have the buckets " + ", ".join(f"{b:g}" for b in boundaries) + " (seconds).\n"


def errors(messages: dict[str, str]) -> str:
    """Every exception of the package: its meaning, an example of its message, its fix, what raises it."""
    sections: list[str] = []
    raisers = raised_by()
    assert messages.keys() == FIXES.keys()
    for name, error in vars(exceptions).items():
        if not (inspect.isclass(error) and issubclass(error, exceptions.OtelTasksError)):
            continue
        bases = [base.__name__ for base in error.__bases__]
        lines = [f"### {name}", "", f"*{code(bases)}.* {docstring(error)}", ""]
        if name in messages:
            lines += ["```text", textwrap.fill(messages[name], 88, break_long_words=False), "```", ""]
        if name in FIXES:
            lines += [f"**Fix:** {FIXES[name]}", ""]
        if name in raisers:
            lines += [f"**Raised by** {code(raisers[name])}.", ""]
        sections.append("\n".join(lines))
    return "\n".join(sections)


def raised_by() -> dict[str, list[str]]:
    """For each error, the callables whose docstrings list it under ``Raises:``."""
    found: dict[str, list[str]] = {}
    for name, thing in public_callables():
        section = re.search(r"^Raises:\n((?: +.*\n?|\n)+)", inspect.getdoc(thing) or "", re.MULTILINE)
        for error in re.findall(r"^    (\w+):", section[1] if section else "", re.MULTILINE):
            found.setdefault(error, []).append(name)
    return found


def public_callables() -> Iterator[tuple[str, object]]:
    """The public functions, classes, and methods, by the names users write."""
    for module in (otel_tasks, asgi, fastapi):
        for name in module.__all__:
            thing = getattr(module, name)
            # Under the name of the module it comes from: the adapter re-exports some of asgi's.
            if not callable(thing) or (module is fastapi and thing.__module__ != fastapi.__name__):
                continue
            yield name, thing
            if inspect.isclass(thing):
                yield from (
                    (f"{name}.{key}", member)
                    for key, member in members(thing).items()
                    if callable(member) or isinstance(member, property)
                )


def members(thing: type) -> dict[str, object]:
    """The public members of a class, with those of its parts in other files."""
    return {
        key: member
        for cls in reversed(thing.__mro__)
        if cls is thing
        or (cls.__module__.startswith("otel_tasks._core.") and cls.__name__ not in otel_tasks.__all__)
        for key, member in vars(cls).items()
        if not key.startswith("_")
    }


def settings(name: str) -> str:
    """The options of one callable: name, default, and the text of its docstring."""
    documented, elsewhere, left_out = SETTINGS[name]
    parameters = {} if elsewhere is None else dict(inspect.signature(elsewhere).parameters)
    parameters |= inspect.signature(documented).parameters
    rows = [
        [f"`{option}`", shown(parameters[option].default), meaning]
        for option, meaning in arguments(inspect.getdoc(documented) or "").items()
        if option not in left_out
    ]
    return table(["option", "default", "meaning"], rows)


def shown(default: object) -> str:
    """A default as written in code; none for what has to be given."""
    if default is inspect.Parameter.empty:
        return "required"
    text = f"{type(default).__name__}.{default.name}" if isinstance(default, TaskPriority) else repr(default)
    return f"`{text}`"


def arguments(text: str) -> dict[str, str]:
    """The ``Args:`` of a docstring, in one line each."""
    section = re.search(r"^Args:\n((?:(?: {4}.*)?\n)+)", text + "\n", re.MULTILINE)
    assert section, text
    found: dict[str, str] = {}
    for name, words in re.findall(
        r"^ {4}(\*{0,2}\w+): ((?:.*\n)(?: {5,}.*\n|\n)*)", section[1], re.MULTILINE
    ):
        found[name.lstrip("*")] = markdown(" ".join(words.split()))
    return found


def docstring(thing: object) -> str:
    """The docstring as one paragraph of Markdown."""
    return markdown(" ".join((inspect.getdoc(thing) or "").split()))


def markdown(text: str) -> str:
    """Turn reStructuredText's double backticks into Markdown's single ones."""
    return text.replace("``", "`")


# --- pages -------------------------------------------------------------------------------------------------


def marks() -> dict[str, str]:
    """The text between the marks, by their names."""
    seen = scenes.watch()
    by_spans = (span_attributes, span_events, span_links, outcomes, reasons, metrics, buckets)
    return {
        "transitions": transitions(),
        "errors": errors(scenes.messages()),
        **{function.__name__.replace("_", "-"): function(seen) for function in by_spans},
        **{f"settings {name}": settings(name) for name in SETTINGS},
    }


def filled(text: str, contents: dict[str, str]) -> str:
    """A page with the text between its marks replaced."""

    def fill(mark: re.Match[str]) -> str:
        kind, _, name = mark[1].partition(" ")
        content = signatures.section(name) if kind == "api" else contents[mark[1]]
        return f"<!-- generated: {mark[1]} -->\n\n{content}\n<!-- end -->"

    return re.sub(r"<!-- generated: ([\w. -]+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def llms_txt(base: str = "", names: str = "") -> str:
    """The pages as https://llmstxt.org wants them: a title, a summary, lists of links."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    lines = [f"# {config['site_name']}", "", f"> {config['site_description']}", ""]
    lines += [
        "Python 3.11 or newer, asyncio, depends on opentelemetry-api alone. Start with the tutorial.",
        "",
        *([names, ""] if names else []),
    ]
    top = [entry for entry in config["nav"] if isinstance(next(iter(entry.values())), str)]
    for title, pages in [
        ("Start", top),
        *(pair for e in config["nav"] if e not in top for pair in e.items()),
    ]:
        # "Optional" is the convention's word for pages that a reader may skip.
        lines += [f"## {'Optional' if title == 'Background' else title}", ""]
        lines += [
            f"- [{name}]({base}{path}): {summary(path)}" for page in pages for name, path in page.items()
        ]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def installed_llms_txt() -> str:
    """The same for an installed package: with absolute links, and the module of each public name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    modules = (otel_tasks, fastapi, asgi, live, fleet, taskiq, logs, testing, instrumentation)
    names = [f"- `{module.__name__}`: {', '.join(sorted(module.__all__))}" for module in modules]
    return llms_txt(
        base=f"{project['urls']['Source']}/blob/main/docs/",
        names="\n".join(["SKILL.md, beside this file, shows how to use it.", "", "## Names", "", *names]),
    )


def summary(path: str) -> str:
    """The first sentence of a page, without its links."""
    text = (DOCS / path).read_text("utf-8")
    paragraph = re.search(r"^# .*\n\n((?:[^#\n][^\n]*\n)+)", text, re.MULTILINE)
    assert paragraph, f"{path} does not begin with a title and a paragraph"
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(paragraph[1].split()))
    return re.split(r"(?<=[.:])\s", words)[0].rstrip(":.") + "."


def files() -> dict[Path, str]:
    """Every generated file, whole or between marks, with its current text."""
    contents = marks()
    pages = {
        path: filled(path.read_text("utf-8"), contents)
        for path in sorted(DOCS.rglob("*.md"))
        if "<!-- generated:" in path.read_text("utf-8")
    }
    return pages | {
        DOCS / "images" / "architecture.svg": architecture_picture(),
        DOCS / "images" / "states.svg": state_picture(),
        DOCS / "llms.txt": llms_txt(),
        ROOT / "otel_tasks" / "llms.txt": installed_llms_txt(),
    }


def main() -> None:
    """Write the files that have changed."""
    for path, text in files().items():
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
