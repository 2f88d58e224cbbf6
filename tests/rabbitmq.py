"""A real RabbitMQ for tests of workers and brokers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from examples.rabbitmq_server import RabbitMQ, is_installed
from tests.processes import free_port

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Generator[RabbitMQ]:
    """A running server, the same for all tests of this process; leave it running.

    Give queues and exchanges names of their own.
    """
    yield from _running(rabbitmq_in(tmp_path_factory.mktemp("rabbitmq") / "node"))


@pytest.fixture
def own_rabbitmq(tmp_path: Path) -> Generator[RabbitMQ]:
    """A running server for one test, which may stop, kill, or pause it."""
    yield from _running(rabbitmq_in(tmp_path / "rabbitmq"))


def rabbitmq_in(directory: Path) -> RabbitMQ:
    """Make a server; the test is skipped where RabbitMQ is not installed."""
    if not is_installed():
        pytest.skip("RabbitMQ is not installed (Debian: rabbitmq-server)")
    directory.mkdir()
    return RabbitMQ(directory, (free_port(), free_port(), free_port()))


def _running(server: RabbitMQ) -> Generator[RabbitMQ]:
    try:
        server.start()
        yield server
    finally:
        server.close()
