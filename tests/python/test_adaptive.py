"""Config.adaptive: all ranks choose the same form of each bucket, and lose nothing by it."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from ranks import Pools
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import arc_topk
from arc_topk.adaptive import notes_of

STEPS = 40  # two agreements, in steps 7 and 31


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 200), nn.Linear(200, 130, bias=False), nn.Linear(130, 7))


def train(rank: int, ranks: int, config: dict[str, Any], form: str, skips: bool) -> dict[str, Any]:
    """Averages, gradients and what is owed in the end; nothing is learned, so all add up."""
    ddp = DistributedDataParallel(model(), bucket_cap_mb=0.06, find_unused_parameters=skips)
    if form == "register":
        state = arc_topk.register(ddp, adaptive=True, **config)
    else:
        state = arc_topk.State(adaptive=True, **config).bind(ddp)
        ddp.register_comm_hook(state, arc_topk.arc_topk_hook)
    early = str(state.plan())
    torch.manual_seed(1 + rank)
    given = [torch.zeros_like(p, dtype=torch.float64) for p in ddp.parameters()]
    got = [torch.zeros_like(p, dtype=torch.float64) for p in ddp.parameters()]
    for _ in range(STEPS):
        x = torch.randn(8, 64)
        local = torch.autograd.grad(ddp.module(x).square().sum(), list(ddp.module.parameters()))
        ddp.zero_grad()
        ddp(x).square().sum().backward()
        for total, gradient in zip(given, local, strict=True):
            total += gradient
        for total, parameter in zip(got, ddp.parameters(), strict=True):
            assert parameter.grad is not None
            total += parameter.grad
    own = state.state_dict()["own"][f"rank_{rank}"]
    owed = [own[name]["a"] if name in own else None for name, _ in ddp.module.named_parameters()]
    return {
        "given": given, "got": got, "owed": owed, "early": early, "plan": str(state.plan()),
        "choice": state._engine.choice(), "metrics": state.metrics(),
    }  # fmt: skip


@pytest.mark.parametrize("form", ["register", "hook"])
@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {"ratio": 0.1},
        {"ratio": 0.1, "feedback": "ef14", "compressor": "low_rank", "wire_dtype": torch.uint8},
        {"ratio": 0.1, "compressor": "top_k"},
        {"ratio": 0.2, "wire_dtype": torch.bfloat16, "start_step": 3},
        {"ratio": 0.1, "warmup_steps": 16},
    ],
    ids=["arc", "low_rank", "top_k", "bf16", "warm_up"],
)
def test_ranks_choose_together_and_what_is_owed_is_kept(
    pools: Pools, config: dict[str, Any], skips: bool, form: str
) -> None:
    results = pools.of(2).run(train, config, form, skips)
    assert results[0]["choice"] == results[1]["choice"]
    step, forms, seconds = results[0]["choice"]
    # Since when there are the buckets that there are: in its second step DDP makes other ones.
    since = config.get("start_step", 0) or config.get("warmup_steps", 0) or (0 if skips else 1)
    assert step == since + (31 if since + 31 <= STEPS else 7)
    assert set(forms) <= {"dense", "bfloat16", "compressed"} and len(forms) > 1
    assert len(seconds) == 4 and all(0 < s < 10 for s in seconds)
    assert "nothing is chosen yet" in results[0]["early"]
    assert f"adaptive, chosen in step {step}: " in results[0]["plan"]
    assert " dense, " in results[0]["plan"] and " compressed" in results[0]["plan"]
    assert results[0]["metrics"]["compressed_steps"] >= 3

    # All that was given has come out, or is owed: of the mean, to what bfloat16 has rounded away.
    for i, got in enumerate(results[0]["got"]):
        assert torch.equal(got, results[1]["got"][i])
        given = sum(r["given"][i] for r in results) / 2
        owed = sum(r["owed"][i].double() for r in results if r["owed"][i] is not None) / 2
        error = (got + owed - given).norm() / given.norm()
        assert error < 2e-2, (i, error)


class TwoBranches(nn.Module):
    """The second is used where told so."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(64, 100, bias=False), nn.Linear(64, 100, bias=False)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        return self.one(x) + self.two(x) if both else self.one(x)


def some_unused(rank: int, ranks: int) -> dict[str, Tensor]:
    """All forms, the last of which compresses; then, bound again, all of them while rank 1 skips.

    What comes behind is chosen by times, for so small a model plain averaging as a rule.
    """
    ddp = DistributedDataParallel(TwoBranches(), find_unused_parameters=True)
    state = arc_topk.register(ddp, adaptive=True)
    torch.manual_seed(rank)
    given, got = torch.zeros(100, 64), torch.zeros(100, 64)

    def step(both: bool) -> None:
        x = torch.randn(4, 64)
        ddp.zero_grad()
        ddp(x, both).square().sum().backward()
        local = torch.autograd.grad(
            ddp.module(x, both).square().sum(), ddp.module.two.weight, allow_unused=True
        )[0]
        given.add_(local if local is not None else 0)
        got.add_(ddp.module.two.weight.grad if ddp.module.two.weight.grad is not None else 0)

    for _ in range(7):
        step(both=True)
    owed_before = state.state_dict()["own"][f"rank_{rank}"]["two.weight"]["a"].clone()
    state.bind(ddp)
    step(both=rank == 0)
    step(both=rank == 0)
    owed_by_one = state.state_dict()["own"][f"rank_{rank}"]["two.weight"]["a"].clone()
    step(both=False)  # on no rank
    for _ in range(12):
        step(both=rank == 0)
    for _ in range(24):  # to the next choice, whose trial may compress
        step(both=True)
    state.bind(ddp)
    step(both=True)
    owed = state.state_dict()["own"][f"rank_{rank}"]["two.weight"]["a"]
    return {"given": given, "got": got, "owed": owed, "before": owed_before, "one": owed_by_one}


def test_what_a_skipped_parameter_owes_waits_and_no_rank_goes_another_way(pools: Pools) -> None:
    one, two = pools.of(2).run(some_unused)
    assert one["before"].any() and two["before"].any()
    assert not one["one"].any() and torch.equal(two["one"], two["before"])
    assert not one["owed"].any() and not two["owed"].any()
    mean = (one["given"] + two["given"]) / 2
    assert torch.equal(one["got"], two["got"])
    assert (one["got"] - mean).norm() < 2e-2 * mean.norm()


def test_only_what_can_be_measured_and_kept() -> None:
    with pytest.raises(
        ValueError, match=r"adaptive is True with feedback='ef21m'.*'ef14' or 'none'"
    ):
        arc_topk.Config(adaptive=True, feedback="ef21m")
    with pytest.raises(ValueError, match=r"adaptive is True with compressor='dense'"):
        arc_topk.Config(adaptive=True, compressor="dense", feedback="none")
    with pytest.raises(TypeError, match=r"adaptive is 1 \(int\); expected True or False"):
        arc_topk.Config(adaptive=1)  # type: ignore[arg-type]
    config = arc_topk.Config(adaptive=True)
    assert pickle.loads(pickle.dumps(config)) == config


def refused(rank: int, ranks: int, what: str) -> str:
    ddp = DistributedDataParallel(model())
    try:
        if what == "scaler":
            scaler = torch.amp.GradScaler("cpu")
            arc_topk.register(ddp, adaptive=True, grad_scaler=scaler)
        elif what == "exchange":
            arc_topk.GradientExchange(list(ddp.parameters()), adaptive=True)
        elif what == "some":
            arc_topk.register(ddp, adaptive=rank == 0)
        else:
            ddp.register_comm_hook(arc_topk.State(adaptive=True), arc_topk.arc_topk_hook)
            ddp(torch.randn(8, 64)).sum().backward()
    except ValueError as error:
        return str(error)
    return "was not refused"


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("scaler", "adaptive is True with grad_scaler"),
        ("exchange", "adaptive is True for a GradientExchange"),
        ("some", "adaptive"),
        ("unbound", "adaptive is True for a State that is not bound"),
    ],
)
def test_what_it_cannot_serve_is_refused_on_every_rank(pools: Pools, what: str, text: str) -> None:
    for message in pools.of(2).run(refused, what):
        assert text in message


def test_the_choice_in_words() -> None:
    assert notes_of(None) == ()
    assert notes_of((0, [], []))[0].endswith("nothing is chosen yet")
    one, two = notes_of((31, ["compressed", "dense", "compressed"], [1.5, 0.8, 0.1, 0.12]))
    assert one == "adaptive, chosen in step 31: buckets 0, 2 compressed, 1 dense"
    assert two.startswith("from a step's first bucket to its last result: 1.5e+03 ms dense, 800 ms")
    same, _ = notes_of((7, ["dense", "dense"], [0.1] * 4))
    assert same == "adaptive, chosen in step 7: all 2 buckets dense"


def plain(rank: int, ranks: int) -> Tensor:
    """A new link is looked at anew: a state that is bound again tries each form first."""
    ddp = DistributedDataParallel(model())
    state = arc_topk.register(ddp, adaptive=True)
    for _ in range(10):
        ddp(torch.ones(2, 64)).sum().backward()
    assert state._engine is not None
    before = state._engine.choice()
    again = DistributedDataParallel(ddp.module)
    again.register_comm_hook(state, arc_topk.arc_topk_hook)
    state.bind(again)
    after = state._engine.choice()
    assert before is not None and before[0] > 0
    assert after is not None and after[0] == 0
    again(torch.ones(2, 64)).sum().backward()
    return torch.tensor([p.grad.sum() for p in again.parameters() if p.grad is not None])


def test_a_state_that_is_bound_again_tries_anew(pools: Pools) -> None:
    first, second = pools.of(2).run(plain)
    assert torch.equal(first, second)
