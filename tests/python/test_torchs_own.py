"""torch's own tests of DDP on the CPU, out of its wheel, with our hook on every DDP they make.

Their bodies run on ranks that are there already, without the processes that they would start. Each
configuration averages exactly (the last ones up to rounding), so whatever they assert must hold.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from typing import Any
from unittest import SkipTest, mock

import pytest
import torch
from ranks import Ranks

import arc_topk
from arc_topk import _C

# Two more of `test_accumulate_gradients_no_sync*` register hooks of their own and cannot take ours.
TESTS = [
    "test_DistributedDataParallelCPU",
    "test_DistributedDataParallelCPU_grad_is_view",
    "test_DistributedDataParallel_requires_grad",
    "test_accumulate_gradients_no_sync",
    "test_accumulate_gradients_no_sync_grad_is_view",
    "test_ddp_create_graph",
    "test_ddp_logging_data_cpu",
    "test_grads_same_across_ranks_with_no_sync",
    "test_static_graph_api_cpu",
]
CONFIGS: dict[str, dict[str, Any]] = {
    "dense": {"compressor": "dense", "feedback": "none"},
    "dense ef14": {"compressor": "dense", "feedback": "ef14"},
    "dense ef21m": {"compressor": "dense", "feedback": "ef21m", "eta": 1.0},
    # Every row of every tensor, by way of sketch, select, pack and apply.
    "all rows": {"ratio": 1.0, "feedback": "none", "row_width": 4},
    "all rows ef14": {
        "ratio": 1.0,
        "feedback": "ef14",
        "row_width": 3,
        "wire_dtype": torch.float32,
    },
}

native = arc_topk.Config.native


def without_gain(config: arc_topk.Config) -> _C.Config:
    """The compressed path at ratio 1, too, where dense averaging would send less."""
    result = native(config)
    result.compress_without_gain = True
    return result


def run_torchs(rank: int, world_size: int, name: str, config: dict[str, Any]) -> tuple[Any, ...]:
    """Why it was skipped, if it was; DDPs with our hook, their steps, and how many collectives they
    made beyond plain averaging's."""
    from torch import distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    # They are read when the module is imported.
    with mock.patch.dict(os.environ, BACKEND="gloo", TEMP_DIR=tempfile.gettempdir()):
        from torch.testing._internal.distributed import distributed_test as theirs

    class Suite(theirs.TestDistBackend, theirs.DistributedTest._DistTestBase):  # type: ignore[misc]
        def _barrier(self, *args: Any, **kwargs: Any) -> None:
            dist.barrier()

    if not hasattr(Suite, name):
        return "this torch does not have it", 0, 0, 0
    states: list[arc_topk.State] = []
    make = DistributedDataParallel.__init__

    def make_hooked(ddp: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
        make(ddp, *args, **kwargs)
        states.append(arc_topk.register(ddp, **config))

    suite = Suite(name)
    suite.rank = rank
    level = dist.get_debug_level()
    try:
        with (
            mock.patch.object(DistributedDataParallel, "__init__", make_hooked),
            mock.patch.object(arc_topk.Config, "native", without_gain),
        ):
            getattr(suite, name)()
    except SkipTest as reason:
        return str(reason), 0, 0, 0
    finally:
        dist.set_debug_level(level)
    metrics = [state.metrics() for state in states]
    return (
        None,
        len(states),
        sum(m["steps"] for m in metrics),
        sum(m["collectives"] - m["exchanges"] for m in metrics),
    )


@pytest.mark.skipif(
    importlib.util.find_spec("expecttest") is None, reason="torch's own tests need expecttest"
)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", TESTS)
def test_torchs_own(ranks: Ranks, name: str, config: str) -> None:
    for skipped, hooked, steps, extra in ranks.run(run_torchs, name, CONFIGS[config]):
        if skipped:
            pytest.skip(skipped)
        if name.endswith("requires_grad"):  # a DDP of nothing, which is refused
            assert hooked == 0
            continue
        assert hooked > 0 and steps > 0
        if config.startswith("dense"):
            assert extra == 0
        else:
            assert extra > 0, "nothing was compressed"
