"""The real asyncio integration of Sentry: managed tasks run in scopes of their own, as plain tasks do."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks import TaskManager

if TYPE_CHECKING:
    from otel_tasks.testing import SpanRecorder

sentry_sdk = pytest.importorskip("sentry_sdk", reason="sentry-sdk is not installed")


async def tag(name: str, seen: dict[str, str]) -> None:
    """Tag Sentry's scope, let others run, and note what the tag is then."""
    sentry_sdk.set_tag("job", name)
    await asyncio.sleep(0.01)
    seen[name] = sentry_sdk.get_isolation_scope()._tags["job"]


def set_up(events: list[Any]) -> None:
    """Start Sentry in the running loop; what it would send is collected."""
    from sentry_sdk.integrations.asyncio import AsyncioIntegration

    sentry_sdk.init(
        dsn="http://key@localhost/1",
        integrations=[AsyncioIntegration()],
        before_send=lambda event, hint: events.append(event),
        default_integrations=False,
    )
    # init() patches the first loop of a process alone.
    AsyncioIntegration.setup_once()


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("how", ["plain", "managed", "with a timeout", "queued"])
def test_tags_stay_in_their_task(how: str, before: bool) -> None:
    """Whether Sentry starts before or after the first managed task."""
    seen: dict[str, str] = {}

    async def main() -> None:
        manager = TaskManager(max_concurrency=1 if how == "queued" else None)
        if before:
            await manager.create_task(asyncio.sleep(0))
        set_up([])

        def create(name: str) -> asyncio.Task[None]:
            if how == "plain":
                return asyncio.create_task(tag(name, seen))
            return manager.create_task(tag(name, seen), timeout=60 if how == "with a timeout" else None)

        await asyncio.gather(create("a"), create("b"))

    asyncio.run(main())
    assert seen == {"a": "a", "b": "b"}


def test_failure_reaches_sentry_once_with_the_tags_of_its_task(spans: SpanRecorder) -> None:
    """The event has the tags of the task that failed, and the span is named after the user's function."""
    events: list[Any] = []

    async def work() -> None:
        sentry_sdk.set_tag("job", "a")
        raise ValueError("no")

    async def main() -> None:
        set_up(events)
        manager = TaskManager(tracer_provider=spans.provider)
        await asyncio.wait([manager.create_task(work())])
        await asyncio.sleep(0)

    asyncio.run(main())
    [event] = events
    assert event["tags"]["job"] == "a"
    assert event["exception"]["values"][-1]["value"] == "no"
    assert str((spans.span("work").attributes or {})["code.function.name"]).endswith("work")


def test_eager_factory_below_sentrys_is_eager() -> None:
    """Sentry hands its wrapper on to the factory that was set before."""
    eager_task_factory = getattr(asyncio, "eager_task_factory", None)
    if eager_task_factory is None:
        pytest.skip("eager start came with Python 3.12")
    steps: list[int] = []

    async def work() -> None:
        steps.append(1)

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(eager_task_factory)
        set_up([])
        task = TaskManager().create_task(work())
        assert steps == [1]
        await task

    asyncio.run(main())
