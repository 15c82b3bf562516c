"""`Config.warmup_steps`: the ratio falls to its own over the first steps, in a few stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from device import DEVICE, copy_to
from model import Gradients, backward, random_gradients, wrap
from ranks import Pools, Ranks
from test_engine import (
    FLOAT32,
    LAYOUTS,
    SELECTION,
    TOLERANCE,
    assert_same_bits,
    picks_of,
    run_native,
)
from torch import Tensor
from torch.amp import GradScaler

import arc_topk
from arc_topk import _C
from arc_topk.plan import make_plan
from arc_topk.reference import Oracle
from arc_topk.reference.oracle import Result
from arc_topk.reference.plan import View, plan_view

pytestmark = pytest.mark.device

RATIO, WARMUP, STEPS = 0.2, 10, 13
Outputs = list[list[list[Tensor | None]]]  # by rank, step and tensor
CONFIGS: list[dict[str, Any]] = [
    {"feedback": "ef14", **FLOAT32},
    {"feedback": "ef21m"},
    {"compressor": "low_rank", **FLOAT32},
    {"wire_dtype": torch.uint8},
    {"feedback": "ef21m", "wire_dtype": torch.uint8},
    {"compressor": "low_rank", "wire_dtype": torch.uint8},
    {"compressor": "rand_k"},
    {"compressor": "top_k", "feedback": "ef21m"},
]
MANY = {"bucket_cap_mb": 0.004}


def ratio_at(ratio: float, step: int, warmup_steps: int, form: str, start_step: int = 0) -> float:
    """As the documentation has it."""
    stages = min(8, warmup_steps)
    since = max(0, step - start_step)
    if since >= warmup_steps:
        return ratio
    share = (since * stages // warmup_steps + 1) / (stages + 1)
    return float(ratio**share) if form == "exponential" else 1 + (ratio - 1) * share


class Warming(Oracle):
    """The oracle, whose ratio is another in every stage."""

    def __init__(
        self,
        world_size: int,
        config: dict[str, Any],
        dtype: torch.dtype = torch.float32,
        **more: Any,
    ) -> None:
        fields = dict(config)
        self.warmup_steps: int = fields.pop("warmup_steps")
        self.form: str = fields.pop("warmup", "exponential")
        self.patterns = arc_topk.Config(ratio=config["ratio"], ratios=fields.pop("ratios", None))
        super().__init__(LAYOUTS, dtype, world_size, **fields, **more)
        self._see()

    def step(self, *args: Any, loss_scale: float = 1.0, **more: Any) -> list[Result]:
        if loss_scale < self._loss_scale:  # of what was sent in the stage before
            self._reclaim()
            self._loss_scale = loss_scale
        self._see()
        return super().step(*args, loss_scale=loss_scale, **more)

    def look_ahead(self) -> None:
        """Views as of the coming step, for who reads selections off its result."""
        self._see()

    def _see(self) -> None:
        for t, layout in enumerate(self.layouts):
            own = self.patterns.ratio_of(f"tensors.{t}")
            ratio = ratio_at(own, self.steps, self.warmup_steps, self.form, self.start_step)
            view = plan_view(
                layout, self.types, self.world_size, self.compressor, ratio, self.sketch_dim, None
            )
            if view != self.views[t]:
                self._become(t, view)

    def _become(self, t: int, view: View) -> None:
        before, self.views[t] = self.views[t], view
        basis = torch.zeros(view.n, view.k)
        columns = min(view.k, before.k)
        if before.n == view.n and before.compressed:
            basis[:, :columns] = self.bases[t][:, :columns]
        self.bases[t] = basis
        if before.compressed or not view.compressed or self.feedback in ("none", "ef14"):
            return
        if self.feedback == "ef21":
            self.started = False
            return
        for own in self.states:  # v_i = h_i = h
            own[t].store("h_i", own[t].load("h"))
            own[t].store("t", torch.zeros_like(own[t].load("h")))


def assert_as_the_oracle(
    outputs: Outputs,
    gradients: Gradients,
    oracle: Oracle,
    scales: list[float] | None = None,
    near: float = TOLERANCE[torch.float32],
) -> list[int]:
    """The bytes of each step, as the oracle counts them."""
    before: list[Tensor | None] = [None] * len(LAYOUTS)
    zeros = [torch.zeros(t.shape) for t in LAYOUTS]
    sent = []
    if oracle.compressor == "low_rank":  # a step's rounding goes into the next W, and so on
        near *= 20
    for number, step in enumerate(gradients):
        for other in outputs[1:]:
            assert_same_bits(other[number], outputs[0][number])
        got = outputs[0][number]
        scale = scales[number] if scales else 1.0
        given = [
            [(like if g is None else g) * scale for g, like in zip(own, zeros, strict=True)]
            for own in step
        ]
        if isinstance(oracle, Warming) and scales is None:
            oracle.look_ahead()
        selected = None if scales else picks_of(oracle, got, before)
        sent.append(oracle.wire_bytes if oracle.started and number >= oracle.start_step else 0)
        results = oracle.step(
            given, selected=selected, rtol=SELECTION[torch.float32], loss_scale=scale
        )
        for t, (out, result) in enumerate(zip(got, results, strict=True)):
            if out is None:
                continue
            torch.testing.assert_close(
                out.double(),
                result.output.double() / scale,
                rtol=near,
                atol=near,
                msg=lambda m, t=t, n=number: f"step {n}, tensor {t}: {m}",
            )
            before[t] = out
    return sent


# --- what can be chosen ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"warmup_steps": -1}, ValueError, ["warmup_steps", "-1", "from 0"]),
        ({"warmup_steps": 1.5}, TypeError, ["warmup_steps", "1.5", "integer"]),
        ({"warmup": "cosine"}, ValueError, ["warmup", "'cosine'", "'exponential'", "'linear'"]),
        (
            {"warmup_steps": 10, "compressor": "dense"},
            ValueError,
            ["warmup_steps", "10", "compressor='dense'", "expected 0"],
        ),
        (
            {"warmup_steps": 10, "compressor": "low_rank", "rank": 4},
            ValueError,
            ["warmup_steps", "10", "rank=4", "expected 0"],
        ),
    ],
)
def test_wrong_warmups(fields: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        arc_topk.Config(**fields)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("warmup_steps", [0, 1, 3, 8, 10, 64, 2**31 - 1])
@pytest.mark.parametrize("start_step", [0, 5])
@pytest.mark.parametrize("form", ["exponential", "linear"])
def test_the_ratio_falls_in_eight_stages(form: str, start_step: int, warmup_steps: int) -> None:
    config = arc_topk.Config(
        ratio=0.1, start_step=start_step, warmup_steps=warmup_steps, warmup=form
    ).native()
    last = start_step + warmup_steps
    steps = [*range(start_step + 70), last, max(0, last - 1)]
    for step in steps:
        for ratio in (0.1, 0.001, 1.0):
            assert _C.ratio_at(config, ratio, step) == pytest.approx(
                ratio_at(ratio, step, warmup_steps, form, start_step), rel=1e-12
            )
    assert _C.ratio_at(config, 0.1, start_step + warmup_steps) == 0.1
    short = range(min(warmup_steps, 64) + 1)
    seen = {_C.ratio_at(config, 0.1, start_step + step) for step in short}
    if warmup_steps <= 64:
        assert len(seen) == min(warmup_steps, 8) + 1


def test_the_plan_is_of_the_final_ratio_and_says_so() -> None:
    named = [("w", torch.empty(100, 64))]
    final = make_plan(arc_topk.Config(ratio=0.1), named, 2)
    plan = make_plan(arc_topk.Config(ratio=0.1, warmup_steps=40), named, 2)
    assert plan.rows == final.rows and final.notes == ()
    assert "the ratio falls to it over the first 40 steps" in str(plan)
    assert "behind step 7" in str(
        make_plan(arc_topk.Config(ratio=0.1, warmup_steps=40, start_step=7), named, 2)
    )


# --- the engine against the oracle ----------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_every_step_is_the_oracles_with_its_ratio(ranks: Ranks, config: dict[str, Any]) -> None:
    gradients = random_gradients(LAYOUTS, 2, STEPS, torch.float32)
    fields = {**config, "ratio": RATIO, "warmup_steps": WARMUP}
    runs = ranks.run(run_native, LAYOUTS, gradients, torch.float32, fields, MANY)
    oracle = Warming(2, fields)
    sent = assert_as_the_oracle([run.outputs for run in runs], gradients, oracle)
    assert sent[-1] == runs[0].wire_bytes  # the plan's
    if "feedback" not in config:
        assert runs[0].metrics["wire_bytes"] == sum(sent)
        assert len(set(sent)) > 2


def test_a_tensor_that_was_dense_is_among_them() -> None:
    """The 40 x 24: else the tests here would not see what they are to see."""
    for config in ({"feedback": "ef14"}, {"feedback": "ef21m"}, {"feedback": "ef21"}):
        oracle = Warming(2, {**config, "ratio": RATIO, "warmup_steps": WARMUP})
        assert not oracle.views[0].compressed and oracle.views[6].compressed
        oracle.steps = WARMUP
        oracle.look_ahead()
        assert oracle.views[0].compressed


@pytest.mark.parametrize(
    "more",
    [
        {"start_step": 3},
        {"warmup": "linear"},
        {"warmup_steps": 3},
        {"ratios": {"tensors.0": 0.05, "tensors.5": 1, "*.6": 0.4}},
        {"spike_limit": 2},
    ],
)
@pytest.mark.parametrize("feedback", ["ef14", "ef21", "ef21m"])
def test_with_the_other_fields(ranks: Ranks, feedback: str, more: dict[str, Any]) -> None:
    """One bucket: EF21 begins it again where a tensor of it is compressed at last."""
    gradients = random_gradients(LAYOUTS, 2, STEPS, torch.float32)
    if "spike_limit" in more:  # a spike in the first step of a stage, whose norm is of those before
        gradients[2][1] = [g * 20 for g in gradients[2][1] if g is not None]
    fields = {"feedback": feedback, "ratio": RATIO, "warmup_steps": WARMUP, **FLOAT32, **more}
    outputs = ranks.run(run_one_bucket, gradients, fields)
    assert_as_the_oracle(outputs, gradients, Warming(2, fields))


def run_one_bucket(
    rank: int, world_size: int, gradients: Gradients, fields: dict[str, Any]
) -> list[list[Tensor]]:
    patterns = fields.get("ratios") or {}
    ratios = {k.replace("tensors.", "tensor ").replace(".", ""): r for k, r in patterns.items()}
    like = copy_to(DEVICE, gradients[0][rank])
    exchange = arc_topk.GradientExchange(like, **{**fields, "ratios": ratios})
    return [copy_to("cpu", exchange.all_reduce_(copy_to(DEVICE, g[rank]))) for g in gradients]


def test_parameters_that_are_not_used(ranks: Ranks) -> None:
    gradients = random_gradients(LAYOUTS, 2, STEPS, torch.float32)
    for step, ranks_ in ((1, (0, 1)), (2, (1,)), (5, (0, 1)), (6, (0,))):
        for rank in ranks_:
            gradients[step][rank][0] = gradients[step][rank][6] = None
    for config in ({"feedback": "ef14"}, {"feedback": "ef21m"}, {"compressor": "low_rank"}):
        fields = {**config, "ratio": RATIO, "warmup_steps": WARMUP, **FLOAT32}
        unused = {"find_unused_parameters": True}
        runs = ranks.run(run_native, LAYOUTS, gradients, torch.float32, fields, unused)
        oracle = Warming(2, fields, may_be_unused=True)
        assert_as_the_oracle([run.outputs for run in runs], gradients, oracle)


def run_scaled(
    rank: int, world_size: int, gradients: Gradients, fields: dict[str, Any], scales: list[float]
) -> list[list[Tensor | None]]:
    """Results unscaled; a scale that has fallen tells that the step before was skipped."""
    model = wrap(LAYOUTS, torch.float32, **MANY)
    scaler = GradScaler(DEVICE, init_scale=scales[0])
    arc_topk.register(model, **fields, grad_scaler=scaler)
    outputs: list[list[Tensor | None]] = []
    for step, scale in zip(gradients, scales, strict=True):
        if outputs:
            scaler.update(scale)
        model.zero_grad(set_to_none=True)
        scaler.scale(model(copy_to(DEVICE, step[rank]))).backward()
        grads = copy_to("cpu", (p.grad for p in model.module.tensors))
        outputs.append([None if g is None else g / scale for g in grads])
    return outputs


@pytest.mark.parametrize("config", [{"feedback": "ef14"}, {"compressor": "low_rank"}])
def test_a_skipped_step_is_owed_again_across_a_stage(ranks: Ranks, config: dict[str, Any]) -> None:
    gradients = random_gradients(LAYOUTS, 2, 12, torch.float32)
    fields = {**config, "ratio": RATIO, "warmup_steps": 24, **FLOAT32}  # three steps a stage
    for skipped in (2, 3, 5):  # the last one of a stage, and another one
        scales = [64.0] * (skipped + 1) + [32.0] * (11 - skipped)
        outputs = ranks.run(run_scaled, gradients, fields, scales)
        assert_as_the_oracle(outputs, gradients, Warming(2, fields), scales)


# --- what must hold, by what is saved -------------------------------------------------------------


def run_and_look(
    rank: int,
    world_size: int,
    gradients: Gradients,
    fields: dict[str, Any],
    dtype: torch.dtype,
) -> list[tuple[list[Tensor | None], dict[str, Any]]]:
    model = wrap(LAYOUTS, dtype, **MANY)
    state = arc_topk.register(model, **fields)
    return [(backward(model, step[rank]), state.state_dict(gather=False)) for step in gradients]


@pytest.mark.parametrize("feedback", ["ef21", "ef21m"])
def test_h_stays_the_mean_of_the_h_i(ranks: Ranks, feedback: str) -> None:
    gradients = random_gradients(LAYOUTS, 2, STEPS, torch.float64)
    fields = {"feedback": feedback, "ratio": RATIO, "warmup_steps": WARMUP}
    runs = ranks.run(run_and_look, gradients, fields, torch.float64)
    key = "b" if feedback == "ef21m" else "a"
    for number in range(STEPS):
        saved = [run[number][1] for run in runs]
        own = [one["own"][f"rank_{rank}"] for rank, one in enumerate(saved)]
        assert {"tensors.0", "tensors.5", "tensors.6"} <= own[0].keys()
        for name in own[0]:
            mean = torch.stack([parts[name][key] for parts in own]).mean(dim=0)
            h = saved[0]["shared"][name]
            torch.testing.assert_close(mean, h, rtol=1e-12, atol=1e-12, msg=f"{number} {name}")


@pytest.mark.parametrize("compressor", ["arc_topk", "low_rank"])
def test_nothing_is_lost_at_a_stage(ranks: Ranks, compressor: str) -> None:
    """Applied so far + what is owed on average = the mean gradients so far."""
    gradients = random_gradients(LAYOUTS, 2, STEPS, torch.float64)
    fields = {"compressor": compressor, "ratio": RATIO, "warmup_steps": WARMUP}
    runs = ranks.run(run_and_look, gradients, fields, torch.float64)
    for t in (0, 5, 6):
        total = torch.zeros(LAYOUTS[t].shape, dtype=torch.float64)
        for number, step in enumerate(gradients):
            total += torch.stack([own[t] for own in step]).mean(dim=0)  # type: ignore[misc]
            total -= runs[0][number][0][t]  # type: ignore[operator]
            owed = [
                run[number][1]["own"][f"rank_{i}"][f"tensors.{t}"]["a"]
                for i, run in enumerate(runs)
            ]
            mean = torch.stack(owed).mean(dim=0)
            torch.testing.assert_close(mean, total, rtol=1e-12, atol=1e-12)


# --- stopped in the middle ------------------------------------------------------------------------


def run_with_a_stop(
    rank: int,
    world_size: int,
    gradients: Gradients,
    fields: dict[str, Any],
    stop: int,
    folder: Path,
) -> tuple[list[list[Tensor | None]], list[list[Tensor | None]]]:
    """In one go; and with two models more: one loads a checkpoint, one takes the State over."""
    # A dense step of EF21's is a bucket's, and a fresh DDP has other buckets at first.
    buckets = {} if fields.get("feedback") == "ef21" else MANY
    model = wrap(LAYOUTS, torch.float32, **buckets)
    arc_topk.register(model, **fields)
    straight = [backward(model, step[rank]) for step in gradients]

    model = wrap(LAYOUTS, torch.float32, **buckets)
    state = arc_topk.register(model, **fields)
    stopped = [backward(model, step[rank]) for step in gradients[:stop]]
    dcp.save({"arc_topk": state}, checkpoint_id=folder)
    model = wrap(LAYOUTS, torch.float32, **buckets)
    state = arc_topk.register(model, **fields)
    dcp.load({"arc_topk": state}, checkpoint_id=folder)
    stopped += [backward(model, step[rank]) for step in gradients[stop : stop + 2]]
    model = wrap(LAYOUTS, torch.float32, **buckets)
    model.register_comm_hook(state, arc_topk.arc_topk_hook)
    state.bind(model)
    stopped += [backward(model, step[rank]) for step in gradients[stop + 2 :]]
    return straight, stopped


@pytest.mark.parametrize("stop", [1, 2, 4, 11])
@pytest.mark.parametrize("config", [*CONFIGS[:6], {"feedback": "ef21"}])
def test_it_goes_on_from_the_middle_to_the_bit(
    ranks: Ranks, tmp_path: Path, config: dict[str, Any], stop: int
) -> None:
    gradients = random_gradients(LAYOUTS, 2, STEPS, torch.float32)
    fields = {**config, "ratio": RATIO, "warmup_steps": WARMUP}
    for straight, stopped in ranks.run(run_with_a_stop, gradients, fields, stop, tmp_path):
        for number, (a, b) in enumerate(zip(straight, stopped, strict=True)):
            try:
                assert_same_bits(a, b)
            except AssertionError as error:
                raise AssertionError(f"step {number}") from error


def load_at_a_lower_ratio(rank: int, world_size: int, gradients: Gradients) -> dict[str, Any]:
    model = wrap(LAYOUTS, torch.float64)
    state = arc_topk.register(model, feedback="ef21m", ratio=0.9)
    backward(model, gradients[0][rank])
    backward(model, gradients[1][rank])
    saved = state.state_dict(gather=False)
    assert "tensors.0" not in saved["own"][f"rank_{rank}"] and "tensors.0" in saved["shared"]
    model = wrap(LAYOUTS, torch.float64)
    state = arc_topk.register(model, feedback="ef21m", ratio=RATIO)
    state.load_state_dict(saved)
    backward(model, gradients[2][rank])
    return state.state_dict(gather=False)


def test_a_lower_ratio_at_loading_leaves_h_the_mean_too(ranks: Ranks) -> None:
    gradients = random_gradients(LAYOUTS, 2, 3, torch.float64)
    saved = ranks.run(load_at_a_lower_ratio, gradients)
    own = [one["own"][f"rank_{rank}"]["tensors.0"]["b"] for rank, one in enumerate(saved)]
    h = saved[0]["shared"]["tensors.0"]
    torch.testing.assert_close(torch.stack(own).mean(dim=0), h, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world_size", [3])
def test_with_three_ranks(pools: Pools, world_size: int) -> None:
    gradients = random_gradients(LAYOUTS, world_size, STEPS, torch.float32)
    fields = {"feedback": "ef21m", "ratio": RATIO, "warmup_steps": WARMUP}
    runs = pools.of(world_size).run(run_native, LAYOUTS, gradients, torch.float32, fields, MANY)
    assert_as_the_oracle([r.outputs for r in runs], gradients, Warming(world_size, fields))
