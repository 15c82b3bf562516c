"""How a program ends: in whatever order things go, no rank hangs, and none crashes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ends import WAYS

# What hangs is ended by the program itself.
pytestmark = pytest.mark.timeout(1200)

PROGRAM = Path(__file__).with_name("ends.py")
CRASHES = ("terminate called", "Segmentation", "Fatal Python error", "pure virtual", "core dumped")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Each way, both ranks: how they ended and what they printed."""
    folder = tmp_path_factory.mktemp("ends")
    run = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    by_way: dict[str, list[dict[str, Any]]] = {}
    for line in run.stdout.splitlines():
        one = json.loads(line)
        one["output"] = (folder / f"{one['way']}.{one['rank']}").read_text()
        by_way.setdefault(one["way"], []).append(one)
    return by_way


@pytest.mark.parametrize("way", WAYS)
def test_every_end_is_an_end(ended: dict[str, list[dict[str, Any]]], way: str) -> None:
    expected = 1 if way == "an error that nobody catches" else 0
    for rank in ended[way]:
        assert rank["code"] == expected, f"rank {rank['rank']}: {rank['output']}"
        assert not any(words in rank["output"] for words in CRASHES), rank["output"]
        if expected == 1:
            assert "the user's own" in rank["output"]
