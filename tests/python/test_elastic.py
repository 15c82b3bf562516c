"""torchrun: a killed rank, a restarted job, and the end of a run that nobody has disturbed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("elastic.py")
NEVER = -1


def trained(folder: Path, kill_at: int) -> tuple[list[torch.Tensor], int]:
    """Parameters at the end, and how often the job was restarted."""
    folder.mkdir()
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    command = (sys.executable, *launcher, "--max-restarts=1", str(SCRIPT), str(folder))
    done = subprocess.run(
        [*command, str(kill_at)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    end: tuple[list[torch.Tensor], int] = torch.load(folder / "end.pt", weights_only=True)
    return end


@pytest.mark.parametrize("kill_at", [1, 5])
def test_a_killed_rank_changes_nothing(tmp_path: Path, kill_at: int) -> None:
    whole, never = trained(tmp_path / "whole", NEVER)
    restarted, once = trained(tmp_path / "restarted", kill_at)
    assert (never, once) == (0, 1)
    for a, b in zip(whole, restarted, strict=True):
        assert torch.equal(a, b)
