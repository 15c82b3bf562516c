"""`Config.ratios`: parameters that have a ratio of their own, by their names."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import torch
from device import DEVICE, copy_to
from model import Gradients, backward, random_gradients, wrap
from ranks import Pools, Ranks, message_of
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

import arc_topk
from arc_topk.plan import make_plan
from arc_topk.reference import Oracle
from arc_topk.reference.plan import plan_view

pytestmark = pytest.mark.device

RATIO = 0.2
STEPS = 4
RATIOS = {"*.6": 0.07, "tensors.[05]": 0.55, "tensors.5": 0.01, "tensors.3": 1}
# Of each of LAYOUTS, written out: what the patterns come to.
RESOLVED = [0.55, RATIO, RATIO, 1.0, RATIO, 0.55, 0.07, RATIO]
CONFIGS: list[dict[str, Any]] = [
    {"feedback": "ef14", **FLOAT32},
    {"feedback": "ef21m"},
    {"compressor": "rand_k", "feedback": "ef21"},
    {"compressor": "low_rank", **FLOAT32},
    {"wire_dtype": torch.uint8},
    {"compressor": "low_rank", "wire_dtype": torch.uint8},
]


# --- the field ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"ratios": 0.3}, TypeError, ["ratios", "0.3", "float", "mapping", "None"]),
        ({"ratios": ["a"]}, TypeError, ["ratios", "['a']", "list", "mapping"]),
        ({"ratios": {3: 0.1}}, TypeError, ["ratios", "{3: 0.1}", "patterns"]),
        ({"ratios": (("a", 0.1, 2),)}, TypeError, ["ratios", "('a', 0.1, 2)", "mapping"]),
        ({"ratios": {"a.*": 0}}, ValueError, ["ratios['a.*']", "is 0;", "(0, 1]"]),
        ({"ratios": {"b": 0.1, "a.*": 1.5}}, ValueError, ["ratios['a.*']", "1.5", "(0, 1]"]),
        ({"ratios": {"a": float("nan")}}, ValueError, ["ratios['a']", "nan", "(0, 1]"]),
        ({"ratios": {"a": "1"}}, TypeError, ["ratios['a']", "'1'", "str"]),
        (
            {"ratios": {"a": 0.1}, "rank": 2, "compressor": "low_rank"},
            ValueError,
            ["rank", "2", "ratios", "'a'", "leave one of them out"],
        ),
    ],
)
def test_wrong_ratios(fields: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        arc_topk.Config(**fields)
    for word in words:
        assert word in str(raised.value)


def test_a_config_stays_a_value() -> None:
    given = {"*embed*": 0.02, "head.*": 1}
    config = arc_topk.Config(ratios=given)
    given["other"] = 0.5
    pairs = (("*embed*", 0.02), ("head.*", 1.0))
    assert config.ratios == pairs
    assert config == arc_topk.Config(ratios=pairs) and hash(config) == hash(
        arc_topk.Config(ratios=pairs)
    )
    assert config != arc_topk.Config(ratios=pairs[::-1])  # the first that matches counts
    assert arc_topk.Config(ratios={}) == arc_topk.Config()
    assert pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, ratio=0.5).ratios == pairs


def test_the_first_pattern_that_matches_counts() -> None:
    config = arc_topk.Config(ratio=RATIO, ratios=RATIOS)
    assert [config.ratio_of(f"tensors.{i}") for i in range(len(LAYOUTS))] == RESOLVED
    assert config.ratio_of("module.tensors.3") == RATIO
    assert arc_topk.Config(ratio=RATIO).ratio_of("anything") == RATIO


@pytest.mark.parametrize("config", CONFIGS)
def test_the_plan_is_the_oracles_with_each_ratio(config: dict[str, Any]) -> None:
    named = [(f"tensors.{i}", t) for i, t in enumerate(LAYOUTS)]
    plan = make_plan(arc_topk.Config(**config, ratio=RATIO, ratios=RATIOS), named, 2)
    for row, view in zip(plan.rows, oracle_of(config, 2).views, strict=True):
        assert (row.kept is not None) == view.compressed, row.name
        assert row.kept in (None, view.k) and row.wire_bytes == view.wire_bytes, row.name
    assert plan.rows[3].kept is None or plan.rows[3].view == (1, 96)  # at ratio 1


# --- the engine -----------------------------------------------------------------------------------


def oracle_of(config: dict[str, Any], world_size: int) -> Oracle:
    oracle = Oracle(LAYOUTS, torch.float32, world_size, ratio=RATIO, **config)
    oracle.views = [
        plan_view(t, oracle.types, world_size, oracle.compressor, ratio, oracle.sketch_dim, None)
        for t, ratio in zip(LAYOUTS, RESOLVED, strict=True)
    ]
    oracle.bases = [torch.zeros(v.n, v.k) for v in oracle.views]
    return oracle


def assert_as_the_oracle(
    outputs: list[list[list[Tensor | None]]], gradients: Gradients, config: dict[str, Any]
) -> None:
    """``outputs[rank][step]`` are what an oracle with those ratios gives."""
    oracle = oracle_of(config, len(outputs))
    near = TOLERANCE[torch.float32]
    before: list[Tensor | None] = [None] * len(LAYOUTS)
    for number, step in enumerate(gradients):
        for other in outputs[1:]:
            assert_same_bits(other[number], outputs[0][number])
        got = outputs[0][number]
        known = [[g for g in own if g is not None] for own in step]
        selected = picks_of(oracle, got, before)
        results = oracle.step(known, selected=selected, rtol=SELECTION[torch.float32])
        for t, (out, result) in enumerate(zip(got, results, strict=True)):
            assert out is not None
            torch.testing.assert_close(
                out, result.output, rtol=near, atol=near, msg=f"step {number}, tensor {t}"
            )
        before = list(got)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("config", CONFIGS)
def test_each_parameter_is_compressed_by_its_own_ratio(
    pools: Pools, config: dict[str, Any], world_size: int
) -> None:
    gradients = random_gradients(LAYOUTS, world_size, STEPS, torch.float32)
    fields = {**config, "ratio": RATIO, "ratios": RATIOS}
    many = {"bucket_cap_mb": 0.004}  # several buckets, and others after the rebuild
    runs = pools.of(world_size).run(run_native, LAYOUTS, gradients, torch.float32, fields, many)
    assert_as_the_oracle([run.outputs for run in runs], gradients, config)
    assert runs[0].wire_bytes == oracle_of(config, world_size).wire_bytes


def run_without_ddp(
    rank: int, world_size: int, gradients: Gradients
) -> tuple[list[list[Tensor | None]], int, str, str]:
    first = copy_to(DEVICE, gradients[0][rank])
    ratios = {name.replace("tensors.", "tensor "): r for name, r in RATIOS.items()}
    ratios = {name.replace("*.", "*"): r for name, r in ratios.items()}
    exchange = arc_topk.GradientExchange(first, ratio=RATIO, ratios=ratios, **FLOAT32)
    outputs = [copy_to("cpu", exchange.all_reduce_(copy_to(DEVICE, g[rank]))) for g in gradients]
    plan = exchange.plan()
    wrong = message_of(lambda: arc_topk.GradientExchange(first, ratios={"tensor 8": 0.1}))
    return outputs, plan.wire_bytes, plan.rows[3].name, wrong


def test_without_ddp_the_names_are_those_of_the_plan(ranks: Ranks) -> None:
    gradients = random_gradients(LAYOUTS, 2, STEPS, torch.float32)
    runs = ranks.run(run_without_ddp, gradients)
    assert_as_the_oracle([outputs for outputs, *_ in runs], gradients, {})
    for _, wire_bytes, name, wrong in runs:
        assert wire_bytes == oracle_of({}, 2).wire_bytes
        assert name == "tensor 3"
        assert "'tensor 8'" in wrong and "'tensor 0', 'tensor 1'" in wrong


# --- what is refused, on every rank, before anything changes --------------------------------------


def try_wrong_patterns(rank: int, world_size: int) -> list[str]:
    model = wrap(LAYOUTS, torch.float32)
    texts = [
        message_of(lambda: arc_topk.register(model, ratios={"*": 0.1, "head.*": 0.5})),
        message_of(lambda: arc_topk.register(model, ratios={"*": 0.1, "tensors.0": rank or 0.5})),
        message_of(lambda: arc_topk.register(model, ratios={f"tensors.{rank * 9}": 0.1})),
    ]
    assert not model._comm_hooks
    arc_topk.register(model, ratios={"tensors.0": 0.5})
    return texts


def test_a_pattern_without_a_parameter_is_named_on_every_rank(ranks: Ranks) -> None:
    for rank, (nobody, differs, one_rank) in enumerate(ranks.run(try_wrong_patterns)):
        assert "'head.*'" in nobody and "'tensors.0', 'tensors.1'" in nobody
        assert "matches no parameter" in nobody and "leave it out" in nobody
        assert "Config.ratios differs between ranks" in differs and "rank 1: " in differs
        assert "'tensors.9'" in one_rank and ("rank 1" in one_rank) == (rank == 0)


def run_unbound(rank: int, world_size: int, gradients: Gradients) -> tuple[str, str]:
    model = wrap(LAYOUTS, torch.float32)
    state = arc_topk.State(ratios={"tensors.0": 0.5})
    model.register_comm_hook(state, arc_topk.arc_topk_hook)
    text = message_of(lambda: backward(model, gradients[0][rank]))
    model = wrap(LAYOUTS, torch.float32)
    model.register_comm_hook(state, arc_topk.arc_topk_hook)
    state.bind(model)
    return text, message_of(lambda: backward(model, gradients[0][rank]))


def test_an_unbound_state_has_no_names_to_match(ranks: Ranks) -> None:
    gradients = random_gradients(LAYOUTS, 2, 1, torch.float32)
    for text, behind in ranks.run(run_unbound, gradients):
        assert "ratios" in text and "'tensors.0'" in text and "state.bind(ddp)" in text
        assert behind == ""


# --- checkpoints, and a state that is bound again -------------------------------------------------


def run_with_a_stop(
    rank: int, world_size: int, gradients: Gradients, config: dict[str, Any]
) -> tuple[list[list[Tensor | None]], list[list[Tensor | None]]]:
    """In one go; and stopped, saved, loaded, bound to another model, and on."""
    model = wrap(LAYOUTS, torch.float32)
    arc_topk.register(model, **config)
    straight = [backward(model, step[rank]) for step in gradients]

    model = wrap(LAYOUTS, torch.float32)
    state = arc_topk.register(model, **config)
    stopped = [backward(model, gradients[0][rank])]
    saved = state.state_dict(gather=False)
    assert "'tensors.[05]', 0.55" in saved["meta"]
    model = wrap(LAYOUTS, torch.float32)
    state = arc_topk.register(model, **config)
    state.load_state_dict(saved)
    stopped.append(backward(model, gradients[1][rank]))
    model = wrap(LAYOUTS, torch.float32)
    model.register_comm_hook(state, arc_topk.arc_topk_hook)
    state.bind(model)
    stopped += [backward(model, step[rank]) for step in gradients[2:]]
    return straight, stopped


@pytest.mark.parametrize("config", CONFIGS)
def test_it_goes_on_from_a_checkpoint_and_with_another_model(
    ranks: Ranks, config: dict[str, Any]
) -> None:
    gradients = random_gradients(LAYOUTS, 2, STEPS, torch.float32)
    fields = {**config, "ratio": RATIO, "ratios": RATIOS}
    for straight, stopped in ranks.run(run_with_a_stop, gradients, fields):
        for a, b in zip(straight, stopped, strict=True):
            assert_same_bits(a, b)


def load_with_other_ratios(rank: int, world_size: int, gradients: Gradients) -> tuple[str, str]:
    model = wrap(LAYOUTS, torch.float32)
    state = arc_topk.register(model, ratio=RATIO)
    backward(model, gradients[0][rank])
    saved = state.state_dict(gather=False)
    texts = []
    for ratios in ({"tensors.0": 0.6}, {"tensors.0": 1}):
        model = wrap(LAYOUTS, torch.float32)
        other = arc_topk.register(model, ratio=RATIO, ratios=ratios)
        texts.append(message_of(lambda other=other: other.load_state_dict(saved)))
        if not texts[-1]:
            backward(model, gradients[1][rank])
    return texts[0], texts[1]


def test_ratios_may_change_with_a_checkpoint_but_no_residual_gets_lost(ranks: Ranks) -> None:
    gradients = random_gradients(LAYOUTS, 2, 2, torch.float32)
    for kept, lost in ranks.run(load_with_other_ratios, gradients):
        assert kept == ""
        assert "'tensors.0' was compressed and stays dense now" in lost
