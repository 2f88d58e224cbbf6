"""The pages below docs/: what is generated is up to date, and their code runs."""

from __future__ import annotations

import inspect
import json
import re
import tomllib
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any

import pytest
import yaml

import otel_tasks
from benchmarks import chart, report
from benchmarks.measure import Table
from docs import generate, hooks, scenes
from docs.picture import state_picture
from otel_tasks import TaskStatus, asgi, fastapi, fleet, instrumentation, live, logs, taskiq, testing
from otel_tasks._core.state import TRANSITIONS
from otel_tasks._core.telemetry import conventions
from tests.blocks import ROOT, promised_output, python_blocks, run_block

if TYPE_CHECKING:
    from pathlib import Path

DOCS = ROOT / "docs"
SKILL = "otel_tasks/SKILL.md"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md"))
# These have tests of their own.
ELSEWHERE = {
    "docs/practices.md",
    "docs/testing.md",
    "docs/tutorial.md",
    "docs/logs.md",
    "docs/howto/zero-code.md",
    "docs/howto/many-processes.md",
    "docs/howto/which-broker.md",
}

# Appended to a block that makes an `app`: a client that hangs up after `leaves` (virtual) seconds, or stays.
CLIENT = """
import asyncio
from otel_tasks import global_task_manager
from otel_tasks.testing import FakeConnection, run


async def visit(method, path, leaves=None, socket=None):
    if socket is None:
        connection = FakeConnection(method=method, path=path)
    else:
        connection = FakeConnection.websocket(path)
        connection.feed(socket)
    serving = asyncio.create_task(connection.run(app))
    if leaves is not None:
        await asyncio.sleep(leaves)
        connection.disconnect()
    await serving
    return connection


def endings(manager=global_task_manager):
    return [
        f"{{info.name}} {{info.status}} {{info.cause and info.cause.kind}}"
        for info in manager.get_all_task_info().values()
    ]


async def client():
{script}


run(client())
"""

# For a block of a page, found by words in it: what a client does, and what is printed then.
VISITS = {
    ("docs/index.md", "async def report"): (
        """
        print((await visit("GET", "/report/7")).body)
        """,
        ['b\'["prices","stock"]\''],
    ),
    ("docs/howto/fastapi.md", "fetch_with_mirror"): (
        """
        print((await visit("GET", "/pages/a")).body)
        print((await visit("GET", "/pages/a", leaves=0.1)).status)
        print(sorted(endings())[:3])
        """,
        [
            'b\'["a","a?mirror"]\'',
            "499",
            "['first cancelled client_disconnect', 'first completed None', 'mirror cancelled "
            "client_disconnect']",
        ],
    ),
    ("docs/howto/fastapi.md", "OpenTelemetryMiddleware)"): (
        """
        print((await visit("GET", "/openapi.json")).status)
        """,
        ["200"],
    ),
    ("docs/comparison.md", "unless_disconnected"): (
        """
        headers = {"Content-Type": "application/json"}
        connection = FakeConnection(method="POST", path="/reports", headers=headers, body=b'{"pages": 1}')
        await connection.run(app)
        print(connection.body)
        """,
        ["b'{\"pages\":1}'"],
    ),
    ("docs/howto/fastapi.md", "cancel_handler_on_disconnect"): (
        """
        await visit("POST", "/preview", leaves=0.1)
        await visit("GET", "/export", leaves=0.1)
        print(ended)
        """,
        ["['preview', 'export, after a minute']"],
    ),
    ("docs/howto/fastapi.md", "request_timeout=30.0"): (
        """
        for method, path in (("GET", "/search"), ("GET", "/export"), ("POST", "/v1/chat/small")):
            print((await visit(method, path)).status)
        """,
        ["504", "200", "504"],
    ),
    ("docs/howto/fastapi.md", "def pages(tasks"): (
        """
        print((await visit("GET", "/pages")).body)
        steps, sleep = [], time.sleep
        time.sleep = lambda seconds: steps.append(seconds) or sleep(seconds)
        print((await visit("GET", "/pages", leaves=0.1)).status, 0 < len(steps) < 20)
        """,
        ["b'20'", "499 True"],
    ),
    ("docs/howto/fastapi.md", "open_database"): (
        """
        async with app.router.lifespan_context(app):
            print("serving")
        """,
        ["database open", "serving", "database closed"],
    ),
    ("docs/howto/llm-gateways.md", "usage_records"): (
        """
        print((await visit("POST", "/v1/chat/completions")).body)
        print((await visit("POST", "/v1/chat/completions", leaves=1.2)).status)
        print(usage_records[0], 20 < usage_records[1] < 30)
        """,
        ["b'\"done\"'", "499", "100 True"],
    ),
    ("docs/howto/streaming.md", "next_departure"): (
        """
        connection = await visit("GET", "/departures/Oslo", leaves=0.35)
        print(connection.body.count(b"Oslo"), closed)
        print(endings()[0])
        """,
        ["3 ['Oslo']", "next_departure cancelled client_disconnect"],
    ),
    ("docs/howto/streaming.md", "watch_export"): (
        """
        print((await visit("POST", "/exports/july")).status)
        await visit("GET", "/exports/july/events", leaves=0.35)
        print(global_task_manager.get_task("july").status)
        body = (await visit("GET", "/exports/july/events")).body.decode()
        print("event: progress" in body, "event: ended" in body)
        late = await visit("GET", "/exports/july/events")
        print(late.status, b"event: ended" in late.body)
        print((await visit("GET", "/exports/august/events")).status)
        """,
        ["202", "running", "True True", "200 True", "404"],
    ),
    ("docs/howto/streaming.md", "watch_prices"): (
        """
        connection = await visit("GET", "/alerts", leaves=0.5, socket="Oslo")
        print(sum("Oslo" in message.get("text", "") for message in connection.sent))
        print(endings())
        """,
        ["3", "['watch_prices cancelled scope_ended']"],
    ),
    ("docs/howto/clients.md", "place_order"): (
        """
        await visit("POST", "/orders/7", leaves=0.1)
        print(journal)
        """,
        ["['7: commit sent', '7: committed', '7: published']"],
    ),
    ("docs/howto/finish.md", "write_bill"): (
        """
        await visit("POST", "/completions", leaves=0.5)
        await asyncio.sleep(1)    # below ASGI 2.4 it would have been joined
        print(len(bills), endings())
        """,
        ["1 ['write_bill completed None']"],
    ),
    ("docs/howto/finish.md", "while pages"): (
        """
        print((await visit("GET", "/report")).body)
        """,
        ["b'1000'"],
    ),
    ("docs/howto/finish.md", "place_order"): (
        """
        print((await visit("POST", "/orders/7", leaves=0.1)).status, orders)
        await asyncio.sleep(1)
        print(orders)
        print(sorted(endings()))
        """,
        [
            "499 {'7': 'paid'}",
            "{'7': 'confirmed'}",
            "['charge completed None', 'draw_map cancelled client_disconnect', 'send_confirmation "
            "completed None']",
        ],
    ),
    ("docs/howto/proxy.md", "/debug/slow"): (
        """
        await visit("GET", "/debug/slow", leaves=1)
        await visit("GET", "/debug/slow")
        """,
        ["slow cancelled client_disconnect", "slow completed None"],
    ),
    ("docs/howto/debugging.md", "live_view"): (
        """
        print((await visit("GET", "/tasks/v1/snapshot")).status)
        connection = FakeConnection(path="/tasks/v1/snapshot", headers={"x-token": "letmein"})
        await connection.run(app)
        print(connection.status, b'"kind":"snapshot"' in connection.body)
        """,
        ["401", "200 True"],
    ),
    ("docs/howto/fleet.md", "def stop_job"): (
        """
        async with app.router.lifespan_context(app):
            print((await visit("POST", "/jobs/import-17")).status)
            print(b'"import-17"' in (await visit("GET", "/jobs")).body)
            print((await visit("DELETE", "/jobs/import-17")).body.decode()[:45])
            print((await visit("DELETE", "/jobs/import-17")).body.decode()[:10])
        print(endings())
        """,
        [
            "202",
            "True",
            '{"asked":1,"ended":1,"still_running":0,"silen',
            '{"asked":0',
            "['import-17 cancelled explicit']",
        ],
    ),
    ("docs/reference/taskiq.md", "def book"): (
        """
        async with app.router.lifespan_context(app):
            print((await visit("GET", "/book/7")).body.decode()[:28])
        """,
        ['["page 0","page 1","page 2",'],
    ),
    ("docs/howto/debugging.md", "debug_tasks"): (
        """
        task = global_task_manager.create_task(asyncio.sleep(60), name="mail")
        await asyncio.sleep(1)
        print(b'"mail"' in (await visit("GET", "/debug/tasks")).body)
        task.cancel()
        """,
        ["True"],
    ),
    ("docs/reference/taskiq.md", "RequestTasks"): (
        """
        async with app.router.lifespan_context(app):
            print((await visit("GET", "/book/7")).body[:8])
        """,
        ["b'[\"page 0'"],
    ),
    (SKILL, "async def offers"): (
        """
        print((await visit("GET", "/offers")).body)
        print((await visit("GET", "/offers", leaves=0.055)).status)
        print((await visit("POST", "/orders/7", leaves=0.055)).status)
        await asyncio.sleep(1)
        print(sorted(endings()))
        """,
        [
            'b\'["rail","air"]\'',
            "499",
            "499",
            "['fetch cancelled client_disconnect', 'fetch completed None', 'fetch-2 cancelled "
            "client_disconnect', 'fetch-2 completed None', 'send_receipt completed None']",
        ],
    ),
    ("docs/howto/worker.md", "readyz"): (
        """
        print((await visit("GET", "/readyz")).status)
        """,
        ["200"],
    ),
    ("docs/howto/kubernetes.md", "healthz"): (
        """
        print((await visit("GET", "/healthz")).status)
        print((await visit("GET", "/slow")).status)
        """,
        ["200", "200"],
    ),
}

BLOCKS = [(page, code) for page in [*PAGES, SKILL] if page not in ELSEWHERE for code in python_blocks(page)]
# These need packages and servers of `make nightly`: see tests/nightly/test_workers.py.
NIGHTLY = ["from aio_pika", "from cronsim", "from redis"]
ALONE = [
    (page, code)
    for page, code in BLOCKS
    if not any(page == where and words in code for where, words in VISITS)
    and not any(words in code for words in NIGHTLY)
]


def test_every_python_block_is_found() -> None:
    """No block hides behind an unusual fence, but for those of the tutorial, which name their files."""
    for page in PAGES:
        fences = len(re.findall(r"^```python\n", (ROOT / page).read_text("utf-8"), re.MULTILINE))
        titled = len(re.findall(r"^ *```(?:python|py)\b.", (ROOT / page).read_text("utf-8"), re.MULTILINE))
        assert fences == len(python_blocks(page))
        assert titled == 0 or page == "docs/tutorial.md"


@pytest.mark.parametrize(("page", "code"), ALONE, ids=lambda value: value if value.startswith("docs") else "")
def test_every_block_runs_and_prints_its_comments(page: str, code: str) -> None:
    """Each block runs by itself, without a warning, and prints the output in its comments."""
    wanted = promised_output(code)
    printed = run_block(code).splitlines()
    if wanted:
        assert printed == wanted


@pytest.mark.parametrize(("page", "words"), VISITS, ids=lambda value: value.rpartition("/")[2])
def test_every_application_behaves_as_the_page_says(page: str, words: str) -> None:
    """A client of the block's application, patient or not, gets what the prose says."""
    (code,) = [code for code in python_blocks(page) if words in code]
    script, wanted = VISITS[page, words]
    assert run_block(code + CLIENT.format(script=script)).splitlines() == wanted


@pytest.mark.parametrize("page", ["docs/howto/worker.md"])
def test_output_below_a_block_is_what_it_prints(page: str) -> None:
    """A `text` block that follows a Python block without a word between them is its output."""
    pairs = re.findall(
        r"^```python\n(.*?)^```\n\n```text\n(.*?)^```",
        (ROOT / page).read_text("utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    assert pairs
    # A pair may start at an earlier block: the code is what stands behind the last opening fence.
    for code, output in pairs:
        assert run_block(code.rpartition("```python\n")[2]) == output


def test_every_application_is_visited() -> None:
    """No block that makes an `app` with a route is left without a client."""
    assert [page for page, code in ALONE if "@app." in code] == []


def test_the_tree_on_the_page_is_the_one_that_is_printed() -> None:
    """The page about what runs now shows what its block prints, but for the file's name."""
    (code, *_) = python_blocks("docs/howto/debugging.md")
    (shown, *_) = re.findall(
        r"^```text\n(.*?)^```", (DOCS / "howto/debugging.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    assert re.sub(r"\d+ms", "100ms", run_block(code)).replace("<string>", "app.py") == shown


def test_generated_text_is_up_to_date() -> None:
    """Tables, the state picture and llms.txt are what `python -m docs.generate` writes."""
    stale = [path for path, text in generate.files().items() if path.read_text("utf-8") != text]
    assert stale == [], "run: python -m docs.generate"


def test_figures_are_those_of_the_last_run(tmp_path: Path) -> None:
    """Goals, tables and chart are what `python -m benchmarks --render` makes of benchmarks/results.json."""
    results = json.loads((ROOT / "benchmarks" / "results.json").read_text("utf-8"))
    tables = [Table.from_dict(table) for table in results["tables"]]
    pages = ("docs/performance.md", "docs/figures.md", "docs/reference/fleet.md")
    (tmp_path / "docs" / "reference").mkdir(parents=True)
    for page in pages:
        (tmp_path / page).write_text((ROOT / page).read_text("utf-8"), "utf-8")
    report.write(tmp_path, tables, results["machine"])
    stale = [
        page for page in pages if (tmp_path / page).read_text("utf-8") != (ROOT / page).read_text("utf-8")
    ]
    assert stale == [], "run: python -m benchmarks --render"
    assert chart.draw(tables) == (DOCS / "images" / "benchmarks.svg").read_text("utf-8")


def test_page_about_performance_is_short() -> None:
    """It has at most 1,500 words, tables included; the figures are on a page of their own."""
    assert len((DOCS / "performance.md").read_text("utf-8").split()) <= 1500


def test_every_attribute_of_the_code_is_documented() -> None:
    """The scenes have shown each name of `telemetry.conventions`: none is missing in the tables."""
    seen = scenes.watch()
    shown = {name for name, _, _ in seen.attributes()} | {name for name, _ in seen.events()}
    shown |= {name for _, names in seen.events() for name in names}
    shown |= {name for metric in seen.metrics() for name in [metric.name, *metric.attributes]}
    known = {
        value
        for name, value in vars(conventions).items()
        if re.fullmatch("[A-Z][A-Z_]*", name)
        and isinstance(value, str)
        and "." in value
        and name != "VERSION"
    }
    assert known
    assert known - shown == set()
    assert set(generate.LINKS) == set(seen.links())


def test_every_public_name_is_on_the_api_page() -> None:
    """The reference shows each name once, and none that is not public."""
    page = (DOCS / "reference/api.md").read_text("utf-8")
    shown = re.findall(r"^<!-- generated: api (\S+) -->$", page, re.MULTILINE)
    wanted = {f"otel_tasks.{name}" for name in otel_tasks.__all__ if name != "__version__"}
    wanted |= {f"otel_tasks.asgi.{name}" for name in asgi.__all__}
    # A name that the adapter re-exports is listed with its own module.
    wanted |= {f"otel_tasks.fastapi.{name}" for name in fastapi.__all__ if name not in asgi.__all__}
    for module in (testing, live, fleet, taskiq, logs, instrumentation):
        wanted |= {f"{module.__name__}.{name}" for name in module.__all__}
    assert sorted(shown) == sorted(set(shown))
    assert set(shown) == wanted


def test_every_public_coroutine_function_says_what_a_cancellation_does() -> None:
    """The docstring of each public `async def` has a paragraph about the cancellation of its caller."""
    public = {name: getattr(otel_tasks, name) for name in otel_tasks.__all__}
    for name, value in list(public.items()):
        if inspect.isclass(value):
            public |= {f"{name}.{part}": member for part, member in generate.members(value).items()}
    # Those that look at their caller return a coroutine; Python 3.11 has no mark for them.
    coroutines = {
        name
        for name, value in public.items()
        if inspect.iscoroutinefunction(value)
        or str(getattr(value, "__annotations__", {}).get("return")).startswith("Coroutine[")
    }
    assert {"start_task", "TaskManager.shutdown", "TaskManager.start_task", "TaskGroup.join"} <= coroutines
    says = re.compile(r"^Cancellation: ", re.MULTILINE)
    assert [name for name in coroutines if not says.search(inspect.getdoc(public[name]) or "")] == []


def test_api_page_is_readable_without_the_site() -> None:
    """In a clone the page has a signature and a first line for each name, members and options included."""
    page = (DOCS / "reference/api.md").read_text("utf-8")
    sections = re.findall(r"^### (\w+)\n\n```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(sections) == len(re.findall(r"^<!-- generated: api ", page, re.MULTILINE))
    stubs = dict(sections)
    assert "async def cancel_all_tasks(" in stubs["TaskManager"]
    assert "on_conflict: OnConflict" in stubs["create_task"]
    # From the files that a class is made of; they are no bases for users.
    assert "def create_task(" in stubs["TaskManager"]
    assert "def create_task(" in stubs["TaskGroup"]
    assert stubs["TaskGroup"].startswith("class TaskGroup:\n")
    assert 'CLIENT_DISCONNECT = "client_disconnect"' in stubs["CancelKind"]
    bare = [name for name, stub in sections if '"""' not in stub]
    assert bare == []
    assert [line for stub in stubs.values() for line in stub.splitlines() if len(line) > 115] == []


def test_site_shows_docstrings_in_place_of_signatures() -> None:
    """The build puts mkdocstrings' directive where the page has a stub, and changes nothing else."""
    page = (DOCS / "reference/api.md").read_text("utf-8")
    built = hooks.put_docstrings(page)
    assert "```py" not in built
    assert re.findall(r"^::: (\S+)$", built, re.MULTILINE) == re.findall(
        r"^<!-- generated: api (\S+) -->$", page, re.MULTILINE
    )
    assert [line for line in built.splitlines() if line.startswith("#")] == [
        line for line in page.splitlines() if re.match("##? ", line)
    ]


def test_state_picture_shows_every_status_and_way() -> None:
    """The SVG is well formed and has each status and each signal of the table, in both color schemes."""
    picture = state_picture()
    root = ET.fromstring(picture)  # noqa: S314 - our own picture, made two lines above
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    signals = [str(signal) for row in TRANSITIONS.values() for signal in row]
    assert sorted(map(str, texts)) == sorted([*map(str, TaskStatus), *signals])
    assert "prefers-color-scheme: dark" in picture


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Every relative link of a page leads to a file in the repository, inside or outside docs/."""
    targets = re.findall(r"\]\((?!http)([^)#\s]+)", (ROOT / page).read_text("utf-8"))
    assert [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()] == []


def test_durations_of_the_kubernetes_page_fit_into_each_other() -> None:
    """The steps that run one after another end before the pod is killed."""
    text = (DOCS / "howto/kubernetes.md").read_text("utf-8")
    block, *_ = yaml_blocks(text)
    pod = block["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    lifespan = re.search(r"make_lifespan\(request_grace=([\d.]+), grace=([\d.]+), timeout=([\d.]+)\)", text)
    assert lifespan is not None
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    total = before + sum(map(float, lifespan.groups()))
    assert total == 35
    assert total + 10 == pod["terminationGracePeriodSeconds"]


def test_durations_of_a_worker_of_a_fleet_fit_into_each_other() -> None:
    """What its table adds up ends before the pod is killed."""
    text = (DOCS / "howto/kubernetes.md").read_text("utf-8")
    pod = yaml_blocks(text)[-1]["spec"]["template"]["spec"]
    *steps, kill = map(
        int, re.findall(r"^\| (\d+) s \|", text.partition("## A worker of a fleet")[2], re.MULTILINE)
    )
    assert sum(steps) == 40
    assert kill == pod["terminationGracePeriodSeconds"] == 50
    assert "--shutdown-timeout 10" in " ".join(pod["containers"][0]["command"])


def test_collector_configuration_names_existing_attributes() -> None:
    """Each policy names an attribute of the library and values that it can have; the pipeline is complete."""
    (config,) = yaml_blocks((DOCS / "howto/sampling.md").read_text("utf-8"))
    seen = {name: types for name, types, _ in scenes.watch().attributes()}
    types = {"string_attribute": "str", "boolean_attribute": "bool", "numeric_attribute": "int"}
    policies = config["processors"]["tail_sampling"]["policies"]
    for policy in policies:
        kind = policy["type"]
        assert kind in policy
        if kind in types:
            assert seen[policy[kind]["key"]] == types[kind]
            for value in policy[kind].get("values", []):
                assert f"`{value}`" in generate.values_of(policy[kind]["key"])
    pipeline = config["service"]["pipelines"]["traces"]
    for part, names in pipeline.items():
        assert set(names) == set(config[part])


def yaml_blocks(text: str) -> list[dict[str, Any]]:
    """The YAML blocks of a page, parsed."""
    return [
        yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]


def test_every_page_is_listed_for_machines() -> None:
    """llms.txt has a title, a summary, and a link to every page."""
    text = (DOCS / "llms.txt").read_text("utf-8")
    assert text.startswith("# otel_tasks\n\n> ")
    listed = re.findall(r"^- \[[^\]]+\]\(([^)]+)\): .+", text, re.MULTILINE)
    assert sorted(listed) == sorted(page.removeprefix("docs/") for page in PAGES)


def test_skill_has_a_name_and_a_description() -> None:
    """The page for coding assistants starts with the name and the description by which they choose it."""
    head = re.match(r"---\n(.*?)\n---\n", (ROOT / SKILL).read_text("utf-8"), re.DOTALL)
    assert head is not None
    front = yaml.safe_load(head[1])
    assert set(front) == {"name", "description"}
    assert re.fullmatch("[a-z-]{1,64}", front["name"])
    assert 0 < len(front["description"]) <= 1024


def test_installed_list_for_machines_leads_to_the_pages() -> None:
    """The llms.txt of the package has absolute links to pages that exist, and fits on a page."""
    text = (ROOT / "otel_tasks" / "llms.txt").read_text("utf-8")
    assert text.startswith("# otel_tasks\n\n> ")
    links = re.findall(
        r"^- \[[^\]]+\]\(https://github\.com/[\w-]+/[\w-]+/blob/main/([^)]+)\): .+", text, re.MULTILINE
    )
    assert sorted(links) == sorted(PAGES)
    assert len(text.split()) < 1000


def test_page_about_clients_names_the_versions_of_the_nightly_test() -> None:
    """Each version in the table of docs/howto/clients.md is the one that `make nightly` installs."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["dependency-groups"]
    pins = [name for name in groups["nightly"] + groups["example"] if isinstance(name, str)]
    installed = {re.sub(r"\[.*?\]", "", name) for name in pins}
    page = (DOCS / "howto/clients.md").read_text("utf-8").replace("redis-py", "redis")
    named = {
        f"{client.lower()}=={version}"
        for row in re.findall(r"^\| [^|]*", page, re.MULTILINE)
        for client, version in re.findall(r"([\w-]+) (\d+\.\d+\.\d+)", row)
    }

    assert len(named) >= 11
    assert named - installed == set()
