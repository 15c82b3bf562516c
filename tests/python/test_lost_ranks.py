"""A rank that is killed, stopped, slow or cut off, at every place of a step.

Each case is a pool of its own: rank 1 comes to harm in its third step, at a collective that the
case names, and the others must end with an error that says how far they have come.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cut_off import NAMES, NOT_HERE, ip
from model import backward, random_gradients, wrap
from ranks import message_of, temporary
from test_engine import assert_same_bits
from torch import Tensor

import arc_topk
from arc_topk import state
from arc_topk.groups import COLLECTIVES

pytestmark = pytest.mark.device

# Three buckets of one matrix each, whatever DDP does: none has room for two.
LAYOUTS = [torch.empty(64, 32, device="meta")] * 3
BUCKETS = 3
STEP = 2  # whose collectives are counted: DDP has rebuilt its buckets by then
GENEROUS = timedelta(seconds=60)  # where nobody should have to wait for it
SHORT = timedelta(seconds=6)
# Every place of every bucket is for `make test-slow`: each case starts processes of its own.
SOME_BUCKETS = [1, *(pytest.param(bucket, marks=pytest.mark.slow) for bucket in (0, 2))]

BEFORE, BETWEEN, BEHIND = "before", "between", "behind"


@dataclass(frozen=True)
class Harm:
    """What becomes of rank 1, and where: `moment` says before, between or behind a bucket's two
    collectives."""

    what: str  # "killed", "stopped", "slow", "cut" (its network: cut_off.py)
    bucket: int
    moment: str


class Watched(dist.ProcessGroup):
    """One of the engine's two groups: the rank comes to harm at a collective of one of them."""

    def __init__(self, inner: dist.ProcessGroup, harm: Harm, name: str) -> None:
        super().__init__(inner.rank(), inner.size())
        self._inner, self._harm = inner, harm
        self._harmful = name == ("first" if harm.moment == BEFORE else "second")
        self.seen = -1  # collectives of the step: one a bucket; -1: it has not come yet

    def allreduce(self, tensors: list[Tensor], opts: Any) -> Any:
        harm = self._harm
        here = self._harmful and self.seen == harm.bucket
        if self.seen >= 0:
            self.seen += 1
        if here and harm.moment != BEHIND:
            self._strike()
        work = self._inner.allreduce(tensors, opts)
        if here and harm.moment == BEHIND:
            work.wait()
            self._strike()
        return work

    def _strike(self) -> None:
        if self._harm.what == "slow":
            time.sleep(1)
        elif self._harm.what == "cut":
            assert ip("link", "set", NAMES[1], "down")
        else:
            signals = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
            os.kill(os.getpid(), signals[self._harm.what])
            time.sleep(GENEROUS.total_seconds())  # a signal comes when it comes


def suffer(rank: int, world_size: int, harm: Harm) -> tuple[str, float, list[Any]]:
    """The error of the step in which rank 1 is harmed or of the one behind, seconds, averages."""
    model = wrap(LAYOUTS, torch.float32, bucket_cap_mb=0.001)
    watched: list[Watched] = []
    make = state.comm_groups_for

    def watch(*args: Any) -> Any:
        watched.extend(
            Watched(group, harm, name) for group, name in zip(make(*args), COLLECTIVES, strict=True)
        )
        return watched

    if rank == 1:
        state.comm_groups_for = watch
    try:
        arc_topk.register(model, ratio=0.25)
    finally:
        state.comm_groups_for = make
    gradients = random_gradients(LAYOUTS, world_size, STEP + 2, torch.float32)
    for step in gradients[:STEP]:
        backward(model, step[rank])
    for group in watched:
        group.seen = 0
    averages: list[Any] = []
    begin = time.monotonic()

    def rest() -> None:
        averages.extend(backward(model, step[rank]) for step in gradients[STEP:])

    text = message_of(rest)
    return text, time.monotonic() - begin, averages


def check_place(text: str, harm: Harm, by: int | None = None) -> None:
    """Where the survivor says it is: at a collective that rank 1 never came to, or just before.

    Second collectives follow those of the buckets before, and first ones run ahead of them. What
    rank 1 has sent just before its end may or may not arrive.
    """
    found = re.search(
        r"RuntimeError: .*?rank (\d), bucket (\d) \(first parameter 'tensors\.\d'\), phase (\w+)",
        text,
    )
    assert found is not None, text
    assert found[1] != "1" if by is None else found[1] == str(by)
    place = (found[3], int(found[2]))
    firsts, seconds = ([(f"{name}_collective", b) for b in range(BUCKETS)] for name in COLLECTIVES)
    bucket = harm.bucket
    places = {
        BEFORE: [*firsts[max(bucket - 1, 0) : bucket + 1], *seconds[:bucket]],
        BETWEEN: [*firsts[bucket:], *seconds[max(bucket - 1, 0) : bucket + 1]],
        BEHIND: [*firsts[bucket:], *seconds[bucket : bucket + 2]],
    }[harm.moment]
    if harm.moment == BEHIND and bucket == BUCKETS - 1:  # its step was whole
        places.append(firsts[0])
    assert place in places, text


@pytest.mark.parametrize("moment", [BEFORE, BETWEEN, BEHIND])
@pytest.mark.parametrize("bucket", SOME_BUCKETS)
def test_a_killed_rank_is_an_error_with_its_place(bucket: int, moment: str) -> None:
    harm = Harm("killed", bucket, moment)
    with temporary(3, GENEROUS) as pool:
        pool.start(suffer, harm)
        for survivor in (0, 2):
            ok, result = pool.result(survivor)
            assert ok, result
            text, seconds, _ = result
            check_place(text, harm)
            assert seconds < GENEROUS.total_seconds()


def test_a_stopped_rank_is_an_error_at_the_time_out() -> None:
    harms = [Harm("stopped", bucket, m) for bucket in range(BUCKETS) for m in (BEFORE, BETWEEN)]
    with contextlib.ExitStack() as stack:  # all at once: each takes the time-out
        pools = [stack.enter_context(temporary(2, SHORT)) for _ in harms]
        for pool, harm in zip(pools, harms, strict=True):
            pool.start(suffer, harm)
        for pool, harm in zip(pools, harms, strict=True):
            ok, result = pool.result(0)
            assert ok, result
            check_place(result[0], harm)


@pytest.mark.parametrize("moment", [BEFORE, BETWEEN, BEHIND])
def test_a_slow_rank_is_waited_for(moment: str) -> None:
    with temporary(2, GENEROUS) as pool:
        (one, seconds, a), (two, _, b) = pool.run(suffer, Harm("slow", 1, moment))
    assert one == "" and two == ""
    assert seconds >= 1
    for x, y in zip(a, b, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("moment", [BETWEEN, pytest.param(BEFORE, marks=pytest.mark.slow)])
def test_a_cut_network_is_an_error_on_both_sides_at_the_time_out(
    tmp_path: Path, moment: str
) -> None:
    runs = []
    script = str(Path(__file__).with_name("cut_off.py"))
    for bucket in range(BUCKETS):
        folder = tmp_path / str(bucket)
        folder.mkdir()
        command = ["unshare", "-Urn", sys.executable, script, str(bucket), moment, str(folder)]
        try:
            runs.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        except FileNotFoundError:
            pytest.skip("there is no unshare here")
    outputs = [run.communicate(timeout=300)[0] for run in runs]
    if NOT_HERE in [run.returncode for run in runs] or not any(outputs):
        pytest.skip("this machine allows no network namespaces")
    for bucket, output in enumerate(outputs):
        results = sorted(json.loads(line) for line in output.splitlines())
        assert [rank for rank, _, _ in results] == [0, 1], output
        for rank, text, _ in results:
            check_place(text, Harm("cut", bucket, moment), by=rank)
