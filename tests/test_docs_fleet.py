"""The pages about a fleet: their code runs, on a bus and a broker in memory."""

from __future__ import annotations

from textwrap import dedent, indent

import pytest

from tests.blocks import python_blocks, run_block
from tests.test_docs import CLIENT

PAGE = "docs/howto/many-processes.md"
ONE, SEVERAL, SEE, TASKS, APP = range(5)

# Replaces the parts that need a server. The demo of examples/fleet runs with real ones.
IN_MEMORY = {
    '"redis://127.0.0.1:6379/0", namespace': '"memory://", namespace',
    "from taskiq_aio_pika import AioPikaBroker": "from taskiq import InMemoryBroker",
    "from taskiq_redis import RedisAsyncResultBackend": "",
    'results = RedisAsyncResultBackend("redis://127.0.0.1:6379/0", result_ex_time=60)': "",
    'AioPikaBroker("amqp://guest:guest@127.0.0.1/").with_result_backend(results)': "InMemoryBroker()",
}


def in_memory(block: int) -> str:
    """A block of the page without servers."""
    code = python_blocks(PAGE)[block]
    for original, replacement in IN_MEMORY.items():
        code = code.replace(original, replacement)
    assert "redis://" not in code
    assert "amqp://" not in code
    return code


def visited(code: str, script: str) -> list[str]:
    """What a client of the block's application prints."""
    lines = "async with app.router.lifespan_context(app):\n" + indent(dedent(script), "    ")
    return run_block(code + CLIENT.format(script=indent(lines, "    "))).splitlines()


def test_one_process_cancels_its_job() -> None:
    """A DELETE ends the job that a POST has started; where no such job runs, it answers false."""
    script = """
    print((await visit("POST", "/jobs/import-17")).status)
    print((await visit("DELETE", "/jobs/import-17")).body)
    print((await visit("DELETE", "/jobs/import-17")).body)
    """
    assert visited(in_memory(ONE), script) == ["202", "b'true'", "b'false'"]


def test_fleet_cancels_the_job_of_a_process() -> None:
    """With a fleet, the answer says how many tasks were asked, how many ended, and who was silent."""
    script = """
    print((await visit("POST", "/jobs/import-17")).status)
    print((await visit("DELETE", "/jobs/import-17")).body)
    print((await visit("DELETE", "/jobs/import-17")).body)
    """
    assert visited(in_memory(SEVERAL), script) == [
        "202",
        """b'{"asked":1,"ended":1,"silent":[]}'""",
        """b'{"asked":0,"ended":0,"silent":[]}'""",
    ]


def test_fleet_lists_the_tasks() -> None:
    """The block about looking prints what it promises."""
    assert run_block(in_memory(SEE)).splitlines() == ["import-17 imports"]


def test_handler_uses_workers_and_a_hang_up_reaches_them() -> None:
    """A request gets its pages from the workers; one whose client leaves cancels them there."""
    module = dedent(
        f"""
        import sys, types
        tasks = sys.modules["tasks"] = types.ModuleType("tasks")
        exec({in_memory(TASKS)!r}, tasks.__dict__)
        """
    )
    script = """
    print((await visit("GET", "/book/7")).body[:20])
    print((await visit("GET", "/book/7", leaves=0.2)).status)
    await asyncio.sleep(1)
    cancelled = [info for info in global_task_manager.get_all_task_info().values() if info.cause]
    print(len(cancelled), {str(info.cause.kind) for info in cancelled}, {info.group for info in cancelled})
    """
    assert visited(module + in_memory(APP), script) == [
        """b'["page 0","page 1","'""",
        "499",
        "16 {'client_disconnect'} {'GET /book/{book}'}",
    ]


@pytest.mark.parametrize("block", [0, 1])
def test_priorities_of_a_broker(block: int) -> None:
    """Each block makes a managed broker; nothing connects before its startup."""
    code = python_blocks("docs/howto/which-broker.md")[block]
    code += "\nfrom otel_tasks.taskiq import remote\nprint(type(broker).__name__)"
    assert run_block(code).strip() in ("AioPikaBroker", "RedisStreamBroker")
