"""An application with the middleware and nothing else: no lifespan, no manager of its own, no shutdown.

`app` is FastAPI's. `raw` supports no lifespan: it raises when a server asks it to start.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from otel_tasks import current_cancel_event, current_manager, current_task
from otel_tasks.asgi import TaskGroupMiddleware

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)


def _end_with_the_tests() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


threading.Thread(target=_end_with_the_tests, daemon=True).start()

_journal = os.open(os.environ["E2E_JOURNAL"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def note(what: str, **details: object) -> None:
    """Write one event to the journal."""
    os.write(_journal, (json.dumps({"key": "outbox", "what": what, **details}) + "\n").encode())


async def polite() -> None:
    """End in its own time when the manager's cancel event is set."""
    await current_cancel_event().wait()
    await asyncio.sleep(0.1)
    note("polite finished")


async def sleeper() -> None:
    """Need to be cancelled, and clean up."""
    try:
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0.1)
        task = current_task()
        note("sleeper cleaned up", cause=None if task is None or task.cause is None else str(task.cause.kind))


def fill() -> None:
    """Start the work of an application, which no request waits for."""
    manager = current_manager()
    manager.create_task(polite(), name="polite", group="outbox")
    manager.create_task(sleeper(), name="sleeper", group="outbox")
    note("filled")


app = FastAPI()
app.add_middleware(TaskGroupMiddleware)


@app.post("/fill")
async def filled() -> str:
    """Start work and answer."""
    fill()
    return "filled"


@app.get("/state")
async def state() -> dict[str, Any]:
    """The answer that the test expects of any application."""
    return {"pid": os.getpid(), "asyncio": []}


async def _raw(scope: Scope, receive: Receive, send: Send) -> None:
    assert scope["type"] == "http"
    if scope["path"] == "/fill":
        fill()
    body = json.dumps({"pid": os.getpid(), "asyncio": []}).encode()
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]}
    )
    await send({"type": "http.response.body", "body": body})


raw = TaskGroupMiddleware(_raw)
