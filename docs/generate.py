"""What stands on the pages between ``<!-- generated: ... -->`` marks, the state picture, and llms.txt.

    python -m docs.generate    # writes them; a test fails when they are not what this would write

The tables of spans and metrics are not read from the source but seen: ``docs.scenes`` lets a small
application do all that a span can tell of, and what arrived at the SDK is listed. What an attribute or an
error *means* is written by hand below, and an attribute or error without a meaning is a KeyError here.
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
from docs import scenes
from docs.picture import state_picture
from otel_tasks import _create, asgi, exceptions, fastapi, instrumentation, logs, testing
from otel_tasks._state import TRANSITIONS, CancelKind, Outcome, TaskPriority

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

DOCS = Path(__file__).parent
ROOT = DOCS.parent

# --- what only a person can say ----------------------------------------------------------------------------

ATTRIBUTES = {
    "otel_tasks.task.name": "The task's name without numbers and ids; the span's name is the same.",
    "otel_tasks.task.id": "What tells it from all others: its name, or `group id/name` in a scoped group.",
    "otel_tasks.task.priority": "Its priority at its creation.",
    "otel_tasks.task.state": "Whether a live task waits for a place.",
    "otel_tasks.task.outcome": "How it ended.",
    "otel_tasks.task.queue.duration": "Seconds that it waited for a place; absent if it did not.",
    "otel_tasks.group.name": "Its group, without numbers and ids; a request's is `METHOD /route/{template}`.",
    "otel_tasks.group.id": "The group's name, with a number behind it if it is a scoped one.",
    "otel_tasks.manager.name": "The name that its manager was given.",
    "otel_tasks.cancel.reason": "Why it was cancelled: the kind of its cause.",
    "otel_tasks.cancel.message": "The words that came with the cancellation, if any did.",
    "otel_tasks.cancel.duration": "Seconds from being asked to having ended.",
    "otel_tasks.cancel.ignored": "It was cancelled and returned all the same. Absent otherwise.",
    "otel_tasks.cancel.origin.span_id": "The span that caused the cancellation, where a started span takes "
    "no links.",
    "otel_tasks.cancel.origin.trace_id": "The trace of that span.",
    "otel_tasks.cancel.count": "How many tasks of the request were cancelled.",
    "otel_tasks.request.outcome": "How the client left before the response was complete. Absent otherwise.",
    "otel_tasks.request.handler": "What the handler did when the client left: it was `cancelled`, `ran_on`, "
    "or it had learned of the disconnect itself and `finished`.",
    "otel_tasks.request.close_code": "The close code of a WebSocket that was closed from outside.",
    "otel_tasks.link": "What the link is for.",
    "code.function.name": "The coroutine function's qualified name.",
    "error.type": "The exception's class; `timeout` or `abandoned` for these outcomes.",
}

EVENTS = {
    "otel_tasks.cancel_requested": "The moment at which the cancellation was asked for.",
    "otel_tasks.client_disconnect": "The moment at which the client left, on the request's span.",
    "otel_tasks.started": "The moment at which a task that had to wait got its place.",
    "exception": "OpenTelemetry's own, with type, message and stack; never for a cancellation.",
}

LINKS = {
    "cancelled_by": "The span that caused the cancellation: the request's, the failing sibling's, or the one "
    "that was current at the `cancel()`.",
    "spawned_by": "The span that was current where a `detached=True` task or a service was created.",
    "restart_of": "The attempt before this one, of a service.",
}

OUTCOMES = {
    Outcome.SUCCESS: ("UNSET", "It returned."),
    Outcome.ERROR: ("ERROR, with the exception's text", "It raised."),
    Outcome.TIMEOUT: ("ERROR", "Its own `timeout` or `queue_timeout` ran out."),
    Outcome.CANCELLED: ("UNSET", "It was cancelled, for whatever cause."),
    Outcome.ABANDONED: ("ERROR", "It would not stop in a shutdown, and its span was ended for it."),
}

REASONS = {
    CancelKind.EXPLICIT: "Somebody called `cancel()`, `cancel_task()`, `cancel_group()` or the like.",
    CancelKind.CLIENT_DISCONNECT: "The client left before the response was complete.",
    CancelKind.TIMEOUT: "A timeout expired: the task's, its group's, or one of asyncio or anyio around it.",
    CancelKind.SHUTDOWN: "The manager was shut down, or the server cancelled the request.",
    CancelKind.SIBLING_FAILED: "Another task of its scoped group, or of an `asyncio.TaskGroup`, raised.",
    CancelKind.SCOPE_ENDED: "Its request or its block was over, or the block raised.",
    CancelKind.REPLACED: "A task of the same name took its place.",
    CancelKind.FOREIGN: "It ended with a `CancelledError` that nobody here asked for.",
}

# What to do about each error.
MENDS = {
    "TaskNotFoundError": "Ask with `get_task_info(name)`, which gives None and knows ended tasks too. To "
    "wait for the result of a task that may have ended, start it with `start_task`, whose results are kept.",
    "TaskExistsError": 'Wait for the live one, choose another name, or pass `on_conflict="suffix"`, '
    '`"return"` or `"replace"`.',
    "GroupClosedError": "Work that outlives its request or block belongs in "
    "`manager.create_task(..., group=...)`. After a disconnect there is nothing to do: nobody waits for "
    "the work.",
    "ManagerClosedError": "Start work before `shutdown()`, or enter the manager again: `async with manager`.",
    "QueueFullError": "Answer 503 and let the client come back, wait with `await put_task(...)`, or raise "
    "`max_queue`.",
    "WrongLoopError": "Use one manager for each event loop, or wait until the first loop's tasks have ended.",
    "WrongThreadError": "From another thread call `create_task_threadsafe(...)`, which gives a "
    "`concurrent.futures.Future`.",
    "IllegalTransitionError": "It is a bug of this library: please report it.",
}

# Whose docstring has them, what else has their defaults, and what is left out because it is no setting.
SETTINGS: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None, set[str]]] = {
    "TaskGroupMiddleware": (asgi.TaskGroupMiddleware, None, {"app"}),
    "make_lifespan": (fastapi.make_lifespan, None, set()),
    "TaskManager": (otel_tasks.TaskManager, None, set()),
    "TaskGroup": (otel_tasks.TaskGroup, None, set()),
    "create_task": (otel_tasks.TaskManager.create_task, _create.create, {"coro"}),
    "watch": (otel_tasks.TaskManager.watch, None, set()),
    "RestartPolicy": (otel_tasks.RestartPolicy, None, {"jitter"}),
}

# --- tables ------------------------------------------------------------------------------------------------


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(heads), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def code(words: Iterable[object]) -> str:
    """Each word as code, with commas between."""
    return ", ".join(f"`{word}`" for word in words)


def transitions() -> str:
    """The table of ``_state``, row by row."""
    return table(
        ["from", "signal", "to"],
        ([f"`{s}`", str(signal), f"`{t}`"] for s, row in TRANSITIONS.items() for signal, t in row.items()),
    )


def span_attributes(seen: scenes.Seen) -> str:
    """Every attribute that was seen on a span, with where and what."""
    return table(
        ["attribute", "type", "stands on", "meaning"],
        (
            [f"`{name}`", types, places, f"{ATTRIBUTES[name]} {values_of(name)}".strip()]
            for name, types, places in seen.attributes()
        ),
    )


def values_of(name: str) -> str:
    """The words that an attribute may have; nothing where there is no list of them."""
    if name == "otel_tasks.task.priority":
        return ", ".join(f"`{priority.value}` {priority.name}" for priority in TaskPriority) + "."
    lists: dict[str, Iterable[object]] = {
        "otel_tasks.task.outcome": Outcome,
        "otel_tasks.cancel.reason": CancelKind,
        "otel_tasks.request.outcome": [CancelKind.CLIENT_DISCONNECT],
        "otel_tasks.link": LINKS,
    }
    return f"{code(lists[name])}." if name in lists else ""


def span_events(seen: scenes.Seen) -> str:
    """Every event that was seen on a span."""
    return table(
        ["event", "attributes", "meaning"],
        (
            [f"`{name}`", code(k for k in keys if k.startswith("otel_tasks.")), EVENTS[name]]
            for name, keys in seen.events()
        ),
    )


def span_links(seen: scenes.Seen) -> str:
    """Every kind of link that was seen."""
    return table(["`otel_tasks.link`", "leads to"], ([f"`{kind}`", LINKS[kind]] for kind in seen.links()))


def outcomes(seen: scenes.Seen) -> str:
    """What the outcomes mean, and the span status that was seen with each."""
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
    """Every instrument that was seen, as the SDK got it."""
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
    """Every exception of the package: what it is, who raises it, what it says, what to do."""
    sections: list[str] = []
    raisers = raised_by()
    assert messages.keys() == MENDS.keys()
    for name, error in vars(exceptions).items():
        if not (inspect.isclass(error) and issubclass(error, exceptions.OtelTasksError)):
            continue
        bases = [base.__name__ for base in error.__bases__]
        lines = [f"### {name}", "", f"*{code(bases)}.* {docstring(error)}", ""]
        if name in messages:
            lines += ["```text", textwrap.fill(messages[name], 88, break_long_words=False), "```", ""]
        if name in MENDS:
            lines += [f"**Mend:** {MENDS[name]}", ""]
        if name in raisers:
            lines += [f"**Raised by** {code(raisers[name])}.", ""]
        sections.append("\n".join(lines))
    return "\n".join(sections)


def raised_by() -> dict[str, list[str]]:
    """For each error, whose docstring has it under ``Raises:``."""
    found: dict[str, list[str]] = {}
    for name, thing in public_callables():
        section = re.search(r"^Raises:\n((?: +.*\n?|\n)+)", inspect.getdoc(thing) or "", re.MULTILINE)
        for error in re.findall(r"^    (\w+):", section[1] if section else "", re.MULTILINE):
            found.setdefault(error, []).append(name)
    return found


def public_callables() -> Iterator[tuple[str, object]]:
    """The public functions, classes and methods, by the names that users write."""
    for module in (otel_tasks, asgi, fastapi):
        for name in module.__all__:
            thing = getattr(module, name)
            # Under the name of the module that it comes from: the adapter hands some of asgi's on.
            if not callable(thing) or (module is fastapi and thing.__module__ != fastapi.__name__):
                continue
            yield name, thing
            if inspect.isclass(thing):
                yield from (
                    (f"{name}.{key}", member)
                    for key, member in vars(thing).items()
                    if not key.startswith("_") and (callable(member) or isinstance(member, property))
                )


def settings(name: str) -> str:
    """The options of one callable: name, default, and what its docstring says."""
    documented, elsewhere, left_out = SETTINGS[name]
    parameters = {} if elsewhere is None else dict(inspect.signature(elsewhere).parameters)
    parameters |= inspect.signature(documented).parameters
    rows = [
        [f"`{option}`", f"`{shown(parameters[option].default)}`", meaning]
        for option, meaning in arguments(inspect.getdoc(documented) or "").items()
        if option not in left_out
    ]
    return table(["option", "default", "meaning"], rows)


def shown(default: object) -> str:
    """A default as one would write it."""
    return f"{type(default).__name__}.{default.name}" if isinstance(default, TaskPriority) else repr(default)


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
    """Code in reStructuredText's two backticks, in Markdown's one."""
    return text.replace("``", "`")


# --- pages -------------------------------------------------------------------------------------------------


def marks() -> dict[str, str]:
    """What stands between the marks, by their names."""
    seen = scenes.watch()
    by_spans = (span_attributes, span_events, span_links, outcomes, reasons, metrics, buckets)
    return {
        "transitions": transitions(),
        "errors": errors(scenes.messages()),
        **{function.__name__.replace("_", "-"): function(seen) for function in by_spans},
        **{f"settings {name}": settings(name) for name in SETTINGS},
    }


def filled(text: str, contents: dict[str, str]) -> str:
    """A page with everything between its marks made anew."""

    def fill(mark: re.Match[str]) -> str:
        return f"<!-- generated: {mark[1]} -->\n\n{contents[mark[1]]}\n<!-- end -->"

    return re.sub(r"<!-- generated: ([\w -]+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


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
        # "Optional" is the convention's word for what may be left out.
        lines += [f"## {'Optional' if title == 'Background' else title}", ""]
        lines += [
            f"- [{name}]({base}{path}): {summary(path)}" for page in pages for name, path in page.items()
        ]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def installed_llms_txt() -> str:
    """The same for an installed package: with absolute links, and the module of each public name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    modules = (otel_tasks, fastapi, asgi, logs, testing, instrumentation)
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
    """Every file that is generated, wholly or between marks, with what it should be."""
    contents = marks()
    pages = {
        path: filled(path.read_text("utf-8"), contents)
        for path in sorted(DOCS.rglob("*.md"))
        if "<!-- generated:" in path.read_text("utf-8")
    }
    return pages | {
        DOCS / "images" / "states.svg": state_picture(),
        DOCS / "llms.txt": llms_txt(),
        ROOT / "otel_tasks" / "llms.txt": installed_llms_txt(),
    }


def main() -> None:
    """Write what has changed."""
    for path, text in files().items():
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
