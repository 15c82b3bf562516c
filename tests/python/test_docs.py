"""What the documentation points to is there."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_test_that_a_table_names_is_there() -> None:
    text = (HERE.parents[1] / "docs" / "ddp.md").read_text()
    named = set(re.findall(r"`(test_\w+\.py)::(\w+)`", text))
    assert len(named) > 30
    for file, test in named:
        assert f"def {test}(" in (HERE / file).read_text(), f"docs/ddp.md: {file}::{test}"


def test_every_test_of_a_ddp_file_is_in_the_table() -> None:
    text = (HERE.parents[1] / "docs" / "ddp.md").read_text()
    for file in HERE.glob("test_ddp_*.py"):
        for test in re.findall(r"^def (test_\w+)\(", file.read_text(), re.MULTILINE):
            assert f"`{file.name}::{test}`" in text, f"docs/ddp.md does not have {test}"
