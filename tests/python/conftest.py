"""Fixtures: ``pools`` for any world size, ``ranks`` for two ranks."""

from collections.abc import Iterator

import pytest
from ranks import Pools, Ranks


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture
def ranks(pools: Pools) -> Ranks:
    return pools.of(2)
