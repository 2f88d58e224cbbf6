"""Starts the worker: ``python -m examples.worker``. See README.md for its settings."""

import asyncio
import logging
import os
from pathlib import Path

from examples.worker.health import serve_health
from examples.worker.jobs import Worker
from examples.worker.spool import Spool
from examples.worker.telemetry import set_up_telemetry
from otel_tasks import TaskManager, run

# The grace period of the container covers these, and what run() adds: see docs/howto/kubernetes.md.
GRACE = 30.0
SHUTDOWN_TIMEOUT = 5.0

log = logging.getLogger("worker")


async def main(manager: TaskManager) -> None:
    """Start the work and the probes, and run until a signal."""
    worker = Worker(manager, Spool(Path(os.environ.get("WORKER_SPOOL", "spool"))))
    host, port = os.environ.get("WORKER_HOST", "127.0.0.1"), int(os.environ.get("WORKER_PORT", "8080"))
    # Before the work: a worker that waits long for its first rate is alive, but not ready.
    server = await serve_health({"/livez": lambda: "", "/readyz": worker.not_ready}, host, port)
    log.info("probes on http://%s:%d", *server.sockets[0].getsockname()[:2])
    try:
        await worker.start()
        # run() cancels this when all tasks have ended: the probes answer until then.
        await asyncio.Event().wait()
    finally:
        server.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    set_up_telemetry()
    manager = TaskManager("worker", grace=GRACE, shutdown_timeout=SHUTDOWN_TIMEOUT)
    run(main(manager), manager=manager)
