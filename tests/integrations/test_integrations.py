"""The README's recipes, in the frameworks themselves: `make test-integrations`.

Each script trains a small model with the framework's own accumulation and clipping, plain, with
us, and with us and a stop, saved and resumed by the framework's own checkpoints.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).parent
README = (HERE.parents[1] / "README.md").read_text()
# (ranks, parts that each replica of the model is cut into)
SCRIPTS = {
    "with_lightning": (2, 1),
    "with_accelerate": (2, 1),
    "with_trainer": (2, 1),
    "with_fsdp2": (4, 2),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_stop_changes_nothing(tmp_path: Path, script: str) -> None:
    ranks, parts = SCRIPTS[script]
    launcher = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
    )
    done = subprocess.run(
        [sys.executable, *launcher, str(HERE / f"{script}.py"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ends = Counter(re.findall(r"as expected (\w{64})", done.stdout))
    assert list(ends.values()) == parts * [ranks // parts], "replicas differ"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_readme_shows_what_is_tested(script: str) -> None:
    text = (HERE / f"{script}.py").read_text()
    recipe = textwrap.dedent(text.split("# recipe\n")[1].split("# end\n")[0]).strip()
    assert recipe in README
