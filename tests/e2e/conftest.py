"""The servers that the end-to-end tests share, and the check that each of them ends up clean."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

# Fixtures are found by their names.
from tests.rabbitmq import own_rabbitmq, rabbitmq
from tests.redis_server import own_redis, redis_server

from .servers import KINDS, Case, Kind, Pool

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["own_rabbitmq", "own_redis", "rabbitmq", "redis_server"]

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """The servers of this session, which at its end have come to rest."""
    pool = Pool(tmp_path_factory.mktemp("servers"))
    try:
        yield pool
        pool.wait_until_quiet()
    finally:
        pool.close()


@pytest.fixture
def key() -> str:
    """A name for this test's request that no other has."""
    return f"k{next(_numbers)}"


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each kind of server in turn."""
    found: Kind = request.param
    return found


@pytest.fixture
def case(kind: Kind, pool: Pool, key: str) -> Iterator[Case]:
    """A scenario on a shared server, to which afterwards no error, no cancellation and no task is left."""
    case = Case(pool.shared(kind), key)
    yield case
    case.release()
    case.release_all()
    case.wait_until_settled()
    assert not case.has("app cancelled"), case.story()
    if not case.complaints_expected:
        assert case.server.complaints(case.log_start) == [], case.server.log(case.log_start)
