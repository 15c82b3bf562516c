"""What DDP and autograd make of a graph: buckets, checkpoints, compilers, hooks and modes."""

from __future__ import annotations

import itertools
import warnings
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from device import DEVICE, copy_to
from model import Pick, random_gradients
from oracle_hook import FEW, Observed, check, gradients_of, noise
from ranks import Ranks, message_of, temporary
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import arc_topk

pytestmark = pytest.mark.device

SHAPES = [(20, 12), (7,), (9, 16), (12, 10), (1,), (33, 8)]
LAYOUTS = [torch.empty(shape, device="meta") for shape in SHAPES]


# --- buckets --------------------------------------------------------------------------------------


def pick(wrap: Any, rank: int, world_size: int, options: dict[str, Any], calls: Any) -> Observed:
    """Four steps; hook calls of each of them as asked for."""
    module = Pick([torch.zeros(shape, device=DEVICE) for shape in SHAPES])
    ddp = wrap(module, **options)
    seen: Observed = []
    before = 0
    for step, gradients in enumerate(random_gradients(LAYOUTS, world_size, 4, torch.float32)):
        ddp.zero_grad()
        ddp(copy_to(DEVICE, gradients[rank])).backward()
        seen += gradients_of(module)
        made, before = wrap.calls() - before, wrap.calls()
        assert made == calls[step], f"step {step}: {made} buckets"
    return seen


BUCKETS = {
    "a tensor a bucket": ({"bucket_cap_mb": 1e-6}, [1, 6, 6, 6]),
    "some": ({"bucket_cap_mb": 0.001}, [1, 3, 3, 3]),
    "one in all": ({"bucket_cap_mb": 25}, [1, 1, 1, 1]),
    "static graph, rebuilt before the third forward": (
        {"bucket_cap_mb": 0.001, "static_graph": True},
        [1, 1, 3, 3],
    ),
    "never rebuilt": (
        {"bucket_cap_mb": 0.001, "find_unused_parameters": True},
        [2, 2, 2, 2],
    ),
    "views": ({"bucket_cap_mb": 0.001, "gradient_as_bucket_view": True}, [1, 3, 3, 3]),
}


@pytest.mark.parametrize("case", BUCKETS)
def test_buckets_of_any_size_rebuilt_when_torch_likes(ranks: Ranks, case: str) -> None:
    check(ranks, pick, *BUCKETS[case])


# --- static graphs and checkpointing --------------------------------------------------------------


class Net(nn.Module):
    """Three layers; the middle one is computed again in the backward pass where that is asked for.

    ``unused`` is a layer that no output depends on.
    """

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.first = nn.Linear(10, 16)
        self.middle = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))
        self.last = nn.Linear(16, 9)
        self.unused = nn.Linear(9, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        if self.reentrant is None:
            x = self.middle(x)
        else:
            x = checkpoint(self.middle, x, use_reentrant=self.reentrant)
        out: Tensor = self.last(x)
        return out


def steps(ddp: Any, module: nn.Module, rank: int) -> Observed:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    seen: Observed = []
    for step in range(4):
        optimizer.zero_grad()
        ddp(noise(10 * step + rank, 5, 10)).square().mean().backward()
        seen += gradients_of(module)
        optimizer.step()
    return seen


def train(
    wrap: Any, rank: int, world_size: int, reentrant: bool | None, **options: Any
) -> Observed:
    module = Net(reentrant).to(DEVICE)
    if not options.get("static_graph") and not options.get("find_unused_parameters"):
        del module.unused
    return steps(wrap(module, bucket_cap_mb=0.001, **options), module, rank)


def train_static(wrap: Any, rank: int, world_size: int, reentrant: bool | None) -> Observed:
    return train(wrap, rank, world_size, reentrant, static_graph=True)


def train_finding(wrap: Any, rank: int, world_size: int, reentrant: bool | None) -> Observed:
    return train(wrap, rank, world_size, reentrant, find_unused_parameters=True)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_static_graph_with_and_without_checkpointing(ranks: Ranks, reentrant: bool | None) -> None:
    check(ranks, train_static, reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_in_a_graph_that_is_not_static(ranks: Ranks, reentrant: bool) -> None:
    check(ranks, train, reentrant)


def test_checkpointing_where_unused_parameters_are_looked_for(ranks: Ranks) -> None:
    # With reentrant checkpoints torch itself marks a parameter twice, and says so.
    check(ranks, train_finding, False)


# --- compilers ------------------------------------------------------------------------------------


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = (10, 24, 20, 28, 16, 9)
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def run_eager(wrap: Any, rank: int, world_size: int) -> Observed:
    module = Deep().to(DEVICE)
    return steps(wrap(module, bucket_cap_mb=0.002), module, rank)


def run_both(wrap: Any, rank: int, world_size: int, backend: str) -> Observed:
    """Compiled, then eager. DDPOptimizer cuts the graph where DDP's buckets should end."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend(backend)
    # torch's first bucket is of 1 MB, and DDPOptimizer wants no later one to be smaller.
    with mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 2000):
        module = Deep().to(DEVICE)
        ddp = wrap(module, bucket_cap_mb=0.002)
        compiled = steps(torch.compile(ddp, backend=graphs), module, rank)
        # One bucket in the first step, in the others as many as in an eager pass or more: gradients
        # come in another order, by which DDP rebuilds its buckets.
        calls = wrap.calls()
        eager = run_eager(wrap, rank, world_size)
    assert graphs.frame_count >= 3, f"{graphs.frame_count} graphs"
    assert calls >= wrap.calls() - calls >= 1 + 3 * 3, f"{calls} hook calls, then {wrap.calls()}"
    return compiled + eager


def check_compiled(ranks: Ranks, backend: str, settings: list[dict[str, Any]]) -> None:
    for trials in check(ranks, run_both, backend, settings=settings):
        for trial in trials:
            half = len(trial.got) // 2
            torch.testing.assert_close(trial.got[:half], trial.got[half:], rtol=1e-4, atol=1e-6)


def test_a_compiled_ddp_of_several_graphs_is_the_eager_one(ranks: Ranks) -> None:
    check_compiled(ranks, "aot_eager", FEW[1::2])


@pytest.mark.slow
def test_a_ddp_compiled_by_inductor_is_the_eager_one(ranks: Ranks) -> None:
    check_compiled(ranks, "inductor", FEW)


def run_compiled_autograd(rank: int, world_size: int) -> tuple[str, str]:
    """With DDP's own reducer, and with the one that torch made for it."""
    ddp = DistributedDataParallel(Deep().to(DEVICE))
    arc_topk.register(ddp)
    loss = ddp(noise(rank, 5, 10)).square().mean()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        own = message_of(loss.backward)
    with torch._dynamo.config.patch(optimize_ddp="python_reducer"):
        ddp = DistributedDataParallel(Deep().to(DEVICE))
        return own, message_of(lambda: arc_topk.register(ddp))


def test_compiled_autograd_is_refused_by_torch_and_by_us() -> None:
    with temporary(2, timedelta(seconds=60)) as pool:
        for own, python in pool.run(run_compiled_autograd):
            assert "Compiled autograd is not compatible with C++ DDP Reducer" in own
            assert "Python reducer" in python and "expected the default reducer" in python


# --- autograd's own hooks and modes ---------------------------------------------------------------


def turn_around(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(-1)


def run_with_hooks(wrap: Any, rank: int, world_size: int) -> Observed:
    """Every kind of hook that may change a gradient before DDP has it, on one rank of the two."""
    module = Deep().to(DEVICE)
    ddp = wrap(module, bucket_cap_mb=0.002)
    if rank == 1:
        module.layers[0].weight.register_hook(lambda g: 2 * g)
        module.layers[1].weight.register_post_accumulate_grad_hook(turn_around)
        module.layers[2].register_full_backward_hook(lambda m, inputs, outputs: (3 * inputs[0],))
    return steps(ddp, module, rank)


def test_hooks_that_change_gradients(ranks: Ranks) -> None:
    check(ranks, run_with_hooks)


def run_in_anomaly_mode(wrap: Any, rank: int, world_size: int) -> Observed:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow
        with torch.autograd.detect_anomaly():
            return run_eager(wrap, rank, world_size)


def test_anomaly_mode(ranks: Ranks) -> None:
    check(ranks, run_in_anomaly_mode)


def run_with_forwards_that_raise(wrap: Any, rank: int, world_size: int) -> Observed:
    """Both before and behind the layers, on one rank; the step is made again."""
    module = Deep().to(DEVICE)
    ddp = wrap(module, bucket_cap_mb=0.002)

    def fail(*_: Any) -> None:
        raise ForwardError

    def failing_first(x: Tensor) -> Tensor:
        if rank == 1:
            for register in (ddp.register_forward_pre_hook, module.layers[3].register_forward_hook):
                handle = register(fail)
                with pytest.raises(ForwardError):
                    ddp(x)
                handle.remove()
        out: Tensor = ddp(x)
        return out

    return steps(failing_first, module, rank)


class ForwardError(RuntimeError):
    pass


def test_forward_hooks_that_raise(ranks: Ranks) -> None:
    check(ranks, run_with_forwards_that_raise)
