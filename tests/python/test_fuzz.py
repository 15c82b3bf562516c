"""A few of the cases that `make fuzz` runs under the sanitizers."""

from __future__ import annotations

import fuzz_checkpoint
from fuzz import check
from ranks import Pools


def test_any_configuration_is_served_or_refused_by_the_name_of_its_field() -> None:
    seen = {check(number) for number in range(500)}
    assert seen == {"refused", "too large", "planned"}


def run_damaged(rank: int, world_size: int, cases: int) -> dict[str, int]:
    return fuzz_checkpoint.check_all(cases)


def test_any_checkpoint_is_loaded_or_refused_and_then_changes_nothing(pools: Pools) -> None:
    (counts,) = pools.of(1).run(run_damaged, 400)
    assert counts["refused"] > 300 and counts["loaded"] > 0
