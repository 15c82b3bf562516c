"""DDP's newer options: each changes when or how DDP fills and frees a bucket, and nothing else."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from device import DEVICE, copy_to
from model import Gradients, Pick, random_gradients
from ranks import Ranks
from test_engine import FLOAT32, LAYOUTS, Run, assert_same_bits, check_against_oracle
from torch.nn.parallel import DistributedDataParallel

import arc_topk

pytestmark = pytest.mark.device

STEPS = 5  # the buckets of the first two are not yet the rebuilt ones
MANUAL = "require_manual_backward_finalization"  # not an argument but an attribute
NEVER_USED = (0, 3, 7)
SMALL = {"bucket_cap_mb": 0.004}
OPTIONS: dict[str, dict[str, Any]] = {
    "batched_grad_copy": {"batched_grad_copy": True, **SMALL},
    "lazy_bucket_allocation": {"lazy_bucket_allocation": True, **SMALL},
    "forward_sync_buffers": {"forward_sync_buffers": True, **SMALL},
    "bucket_cap_mb_list": {"bucket_cap_mb_list": [0.002, 0.008, 0.004]},
    "skip_all_reduce_unused_params": {
        "skip_all_reduce_unused_params": True,
        "find_unused_parameters": True,
        **SMALL,
    },
    MANUAL: SMALL,
    "several": {"batched_grad_copy": True, "lazy_bucket_allocation": True, **SMALL},
}


def missing(name: str) -> str | None:
    """Which option this torch does not have, if any."""
    known = [*inspect.signature(DistributedDataParallel).parameters]
    known += [MANUAL] if hasattr(DistributedDataParallel, MANUAL) else []
    return next((o for o in [*OPTIONS[name], name] if o not in [*known, "several"]), None)


def run_with_options(
    rank: int, world_size: int, name: str, view: bool, gradients: Gradients, config: dict[str, Any]
) -> Run:
    """Plain DDP where the configuration is empty."""
    module = Pick([torch.zeros_like(t, dtype=torch.float32, device=DEVICE) for t in LAYOUTS])
    module.register_buffer("from_rank", torch.full((3,), -1.0, device=DEVICE))
    model = DistributedDataParallel(module, gradient_as_bucket_view=view, **OPTIONS[name])
    if name == MANUAL:
        model.require_manual_backward_finalization = True
    state = arc_topk.register(model, **config) if config else None
    outputs = []
    for step in gradients:
        module.from_rank.fill_(rank)
        model.zero_grad(set_to_none=True)
        model(copy_to(DEVICE, step[rank])).backward()
        if name == MANUAL:
            model.finalize_backward()
        if name == "forward_sync_buffers":
            assert module.from_rank.tolist() == [0, 0, 0]
        outputs.append(copy_to("cpu", (p.grad for p in module.tensors)))
    return Run(outputs, state.metrics() if state else {}, 0)


def gradients_for(name: str) -> Gradients:
    gradients = random_gradients(LAYOUTS, 2, STEPS, torch.float32)
    if name == "skip_all_reduce_unused_params":
        for step in gradients:
            for own in step:
                for t in NEVER_USED:
                    own[t] = None
    return gradients


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_newer_options_change_nothing(ranks: Ranks, name: str, view: bool) -> None:
    if (option := missing(name)) is not None:
        pytest.skip(f"DDP of torch {torch.__version__} has no {option}")
    gradients = gradients_for(name)
    plain = ranks.run(run_with_options, name, view, gradients, {})
    dense = ranks.run(run_with_options, name, view, gradients, {"compressor": "dense"})
    for step in range(STEPS):
        assert_same_bits(plain[0].outputs[step], dense[0].outputs[step])
    for compressor, feedback in (("arc_topk", "ef14"), ("arc_topk", "ef21m"), ("top_k", "ef21")):
        config = {"compressor": compressor, "feedback": feedback, "ratio": 0.2, **FLOAT32}
        runs = ranks.run(run_with_options, name, view, gradients, config)
        for run in runs:
            assert run.metrics["steps"] == STEPS
            assert run.metrics["exchanges"] > STEPS, "more buckets than one"
            if name == "skip_all_reduce_unused_params":
                assert all(out[t] is None for out in run.outputs for t in NEVER_USED)
        check_against_oracle(runs, LAYOUTS, gradients, torch.float32, config)
