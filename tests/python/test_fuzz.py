"""A few of the cases that `make fuzz` runs under the sanitizers."""

from __future__ import annotations

from fuzz import check


def test_any_configuration_is_served_or_refused_by_the_name_of_its_field() -> None:
    seen = {check(number) for number in range(500)}
    assert seen == {"refused", "too large", "planned"}
