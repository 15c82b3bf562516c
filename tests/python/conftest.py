"""Fixtures: ``pools`` for any world size, ``ranks`` for two ranks."""

from collections.abc import Iterator

import pytest
from device import why_unusable
from ranks import Pools, Ranks


@pytest.fixture(autouse=True)
def usable_device(request: pytest.FixtureRequest) -> None:
    """A device that was asked for and is not there is a failure, never a skip."""
    if request.node.get_closest_marker("device") and (reason := why_unusable()):
        pytest.fail(reason, pytrace=False)


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture
def ranks(pools: Pools) -> Ranks:
    return pools.of(2)
