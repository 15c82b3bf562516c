"""Low rank in the engine, under real DDP: what is its own beside what every compressor does.

Its equations' identities are the oracle's (test_low_rank_reference.py), which the engine follows
step by step here; the kernels' bits are tests/cpp/test_low_rank.cpp's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model import Gradients, backward, random_gradients, wrap
from ranks import Pools, Ranks, message_of
from test_engine import (
    DTYPES,
    FLOAT32,
    LAYOUTS,
    STEPS,
    TOLERANCE,
    assert_same_bits,
    check_against_oracle,
    run_native,
)
from torch import Tensor

import arc_topk
from arc_topk.reference import Oracle

pytestmark = pytest.mark.device

SMALL_BUCKETS = {"bucket_cap_mb": 0.004}
MATRICES = [0, 5, 6]  # of LAYOUTS, those that are compressed at ratio 0.2 whatever the wire


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wire_types_feed_their_rounding_back(
    ranks: Ranks, dtype: torch.dtype, wire: torch.dtype
) -> None:
    for rank in (None, 2):
        config = {"compressor": "low_rank", "ratio": 0.2, "rank": rank, "wire_dtype": wire}
        gradients = random_gradients(LAYOUTS, 2, STEPS, dtype)
        runs = ranks.run(run_native, LAYOUTS, gradients, dtype, config, SMALL_BUCKETS)
        oracle = check_against_oracle(runs, LAYOUTS, gradients, dtype, config)
        assert runs[0].wire_bytes == oracle.wire_bytes
        assert runs[0].metrics["wire_bytes"] == STEPS * oracle.wire_bytes
        assert {t for t, v in enumerate(oracle.views) if v.compressed} >= set(MATRICES)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("feedback", ["none", "ef14"])
def test_bytes_agree_with_the_oracle(pools: Pools, feedback: str, world_size: int) -> None:
    """In float64 to its last digits, where no unit is rounded otherwise."""
    config = {"compressor": "low_rank", "rank": 2, "feedback": feedback, "wire_dtype": torch.uint8}
    gradients = random_gradients(LAYOUTS, world_size, STEPS, torch.float64)
    run = pools.of(world_size).run
    runs = run(run_native, LAYOUTS, gradients, torch.float64, config, SMALL_BUCKETS)
    oracle = check_against_oracle(runs, LAYOUTS, gradients, torch.float64, config)
    assert runs[0].wire_bytes == oracle.wire_bytes
    assert runs[0].metrics["wire_bytes"] == STEPS * oracle.wire_bytes


@pytest.mark.parametrize("feedback", ["none", "ef14"])
def test_ranks_that_have_not_used_a_tensor_do_not_say_where_to_look(
    pools: Pools, feedback: str
) -> None:
    """Matrices and a vector, used by some ranks or by none; what these owe is sent all the same."""
    gradients = random_gradients(LAYOUTS, 3, STEPS + 2, torch.float64)
    for t, step, unused_on in [
        (0, 1, (0,)), (0, 2, (0, 2)), (1, 2, (1,)), (1, 3, (0, 1, 2)), (6, 1, (0, 1, 2)),
        (6, 2, (1, 2)), (5, 0, (0,)),
    ]:  # fmt: skip
        for rank in unused_on:
            gradients[step][rank][t] = None
    config = {"compressor": "low_rank", "rank": 2, "feedback": feedback, "wire_dtype": torch.uint8}
    find = {"find_unused_parameters": True, **SMALL_BUCKETS}
    runs = pools.of(3).run(run_native, LAYOUTS, gradients, torch.float64, config, find)
    assert runs[0].outputs[1][6] is None and runs[0].outputs[2][6] is not None
    check_against_oracle(runs, LAYOUTS, gradients, torch.float64, {**config, "may_be_unused": True})


def test_nan_on_bytes_is_nan_on_all_and_for_that_tensor_alone(pools: Pools) -> None:
    gradients = random_gradients(LAYOUTS, 3, 5, torch.float64)
    for t, step, rank in [(0, 1, 0), (1, 2, 2), (6, 2, 1)]:
        spoilt = gradients[step][rank][t]
        assert spoilt is not None
        spoilt.view(-1)[-1] = torch.inf
    config = {"compressor": "low_rank", "rank": 2, "wire_dtype": torch.uint8}
    runs = pools.of(3).run(run_native, LAYOUTS, gradients, torch.float64, config, SMALL_BUCKETS)
    bad = {(1, 0), (2, 1), (2, 6)}
    for run in runs:
        for step, outputs in enumerate(run.outputs):
            for t, out in enumerate(outputs):
                assert out is not None
                assert bool(out.isfinite().all()) == ((step, t) not in bad), (step, t)
    oracle = Oracle(LAYOUTS, torch.float64, 3, **config)
    for step, given in enumerate(gradients):
        for t, result in enumerate(oracle.step(given)):  # type: ignore[arg-type]
            out = runs[0].outputs[step][t]
            if (step, t) not in bad:
                torch.testing.assert_close(out, result.output, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_lose_nothing_in_any_type(ranks: Ranks, dtype: torch.dtype) -> None:
    config = {"compressor": "low_rank", "rank": 2, "wire_dtype": torch.uint8}
    gradients = random_gradients(LAYOUTS, 2, 4, dtype)
    runs = ranks.run(saved_each_step, gradients, config, dtype)
    near = 1e-4 if dtype in (torch.float32, torch.float64) else TOLERANCE[dtype]
    for t, layout in enumerate(LAYOUTS):
        if layout.numel() == 0:
            continue
        given = torch.stack([own[t] for step in gradients for own in step]).double()  # type: ignore[misc]
        applied = torch.stack([out[t].double() for out, _ in runs[0]]).sum(dim=0)  # type: ignore[union-attr]
        owed = [
            run[-1][1]["own"][f"rank_{i}"][f"tensors.{t}"]["a"].double()
            for i, run in enumerate(runs)
        ]
        total = applied + torch.stack(owed).mean(dim=0)
        torch.testing.assert_close(total, given.sum(dim=0) / 2, rtol=near, atol=near)


def saved_each_step(
    rank: int,
    world_size: int,
    gradients: Gradients,
    config: dict[str, Any],
    dtype: torch.dtype = torch.float32,
) -> list[tuple[list[Tensor | None], dict[str, Any]]]:
    """Results, and the checkpoint behind every step."""
    model = wrap(LAYOUTS, dtype, **SMALL_BUCKETS)
    state = arc_topk.register(model, **config)
    return [(backward(model, step[rank]), state.state_dict(gather=False)) for step in gradients]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_residual_and_basis_are_the_oracles(pools: Pools, world_size: int) -> None:
    """So C_i + e_i = g_i + e_i(old), and its mean with C: nothing is lost, whoever sent it."""
    gradients = random_gradients(LAYOUTS, world_size, 4, torch.float32)
    config = {"compressor": "low_rank", "ratio": 0.2, "wire_dtype": torch.bfloat16}
    runs = pools.of(world_size).run(saved_each_step, gradients, config)
    config["wire_dtype"] = torch.float32
    runs_wide = pools.of(world_size).run(saved_each_step, gradients, config)
    oracle = Oracle(LAYOUTS, torch.float32, world_size, **config)
    applied = {t: torch.zeros(LAYOUTS[t].shape) for t in MATRICES}
    owed = {t: torch.zeros(LAYOUTS[t].shape) for t in MATRICES}
    for number, step in enumerate(gradients):
        oracle.step(step)  # type: ignore[arg-type]
        for t in MATRICES:
            name = f"tensors.{t}"
            means = []
            for rank in range(world_size):
                saved = runs_wide[rank][number][1]
                e = saved["own"][f"rank_{rank}"][name]["a"]
                torch.testing.assert_close(e, oracle.state("e", rank, t), rtol=1e-4, atol=1e-4)
                w = saved["basis"][name]
                assert_same_bits([w], [runs_wide[0][number][1]["basis"][name]])
                torch.testing.assert_close(w.T, oracle.bases[t], rtol=1e-3, atol=1e-4)
                means.append(runs[rank][number][1]["own"][f"rank_{rank}"][name]["a"])
            # On the narrow wire as well, but for what its sums round.
            out = runs[0][number][0][t]
            assert out is not None
            applied[t] += out
            owed[t] += torch.stack([own[t] for own in step]).mean(dim=0)  # type: ignore[misc]
            left = owed[t] - applied[t]
            near = 1e-4 if world_size == 1 else 0.05
            torch.testing.assert_close(torch.stack(means).mean(dim=0), left, rtol=near, atol=near)


def test_nothing_is_lost_to_the_last_digits_of_float64(ranks: Ranks) -> None:
    """Applied so far + what is owed on average = the mean gradients so far."""
    gradients = random_gradients(LAYOUTS, 2, 4, torch.float64)
    config = {"compressor": "low_rank", "ratio": 0.2, "wire_dtype": torch.float64}
    runs = ranks.run(saved_each_step, gradients, config, torch.float64)
    for t in MATRICES:
        total = torch.zeros(LAYOUTS[t].shape, dtype=torch.float64)
        for number, step in enumerate(gradients):
            total += torch.stack([own[t] for own in step]).mean(dim=0)  # type: ignore[misc]
            owed = [
                run[number][1]["own"][f"rank_{i}"][f"tensors.{t}"] for i, run in enumerate(runs)
            ]
            total -= runs[0][number][0][t]  # type: ignore[operator]
            e = torch.stack([parts["a"] for parts in owed]).mean(dim=0)
            assert e.dtype == torch.float64
            torch.testing.assert_close(e, total, rtol=1e-13, atol=1e-13)


def full_rank(rank: int, world_size: int, gradients: Gradients, layouts: list[Tensor]) -> list[Any]:
    """Compressed though it is no gain: k = min(m, n)."""
    config = arc_topk.Config(compressor="low_rank", rank=64, **FLOAT32).native()
    config.compress_without_gain = True
    exchange = arc_topk._C.Exchange(config, torch.distributed.group.WORLD)
    keys = [torch.empty(t.shape) for t in layouts]
    exchange.bind(keys, [str(i) for i in range(len(keys))], False)
    results = []
    for step in gradients:
        flat = torch.cat([g.flatten() for g in step[rank] if g is not None])
        results.append(exchange.run(flat, keys).clone())
    assert exchange.metrics()["compressed_steps"] == len(gradients)
    return results


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_full_rank_is_plain_averaging(pools: Pools, world_size: int) -> None:
    layouts = [torch.empty(size, device="meta") for size in [(60, 6), (5, 48), (1, 9), (9, 1)]]
    gradients = random_gradients(layouts, world_size, 3, torch.float32)
    runs = pools.of(world_size).run(full_rank, gradients, layouts)
    for number, step in enumerate(gradients):
        mean = [torch.stack(of).mean(dim=0).flatten() for of in zip(*step, strict=True)]  # type: ignore[type-var]
        for run in runs:
            torch.testing.assert_close(run[number], torch.cat(mean), rtol=1e-4, atol=1e-4)


SIZES = [(0, 4), (7, 0), (1, 1), (1, 7), (7, 1), (7, 7), (1, 300), (300, 1), (130, 3), (3, 130)]


def odd_sizes(rank: int, world_size: int, dtype: torch.dtype, wire: torch.dtype) -> list[Tensor]:
    tensors = [torch.zeros(size, dtype=dtype) for size in SIZES]
    config = {"compressor": "low_rank", "rank": 1, "wire_dtype": wire}
    exchange = arc_topk.GradientExchange(tensors, **config)
    outputs = []
    for scale in (1.0, 0.0, 1e30, 1e-30, 1.0):
        if dtype == torch.float16:
            scale = min(scale, 10.0)
        given = [torch.full_like(t, scale * (rank + 1)) for t in tensors]
        for t in given:  # of rank one, so that one step sends all of it
            if t.dim() == 2 and t.numel() > 0:
                t *= torch.arange(1.0, len(t) + 1).unsqueeze(1)
        outputs += [t.clone() for t in exchange.all_reduce_(given)]
    return outputs


@pytest.mark.parametrize("wire", [torch.float32, torch.uint8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_sizes_zero_huge_and_tiny_gradients(
    ranks: Ranks, dtype: torch.dtype, wire: torch.dtype
) -> None:
    zero, one = ranks.run(odd_sizes, dtype, wire)
    assert_same_bits(zero, one)
    for out in zero:
        assert out.isfinite().all()
    if wire == torch.uint8:  # what it rounds away is owed
        return
    near = 2e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-5
    for out, size in zip(zero, SIZES, strict=False):
        expected = torch.full(size, 1.5) * torch.arange(1.0, size[0] + 1).unsqueeze(1)
        torch.testing.assert_close(out.float(), expected, rtol=near, atol=near)


def one_nan(rank: int, world_size: int, gradients: Gradients) -> list[Any]:
    model = wrap(LAYOUTS, torch.float32, **SMALL_BUCKETS)
    state = arc_topk.register(model, compressor="low_rank", ratio=0.2)
    seen: list[Any] = []
    for number, step in enumerate(gradients):
        given = [None if g is None else g.clone() for g in step[rank]]
        if number == 2 and rank == 1:
            assert given[0] is not None
            given[0][3, 3] = torch.nan
        seen += [backward(model, given), state.state_dict(gather=False)]
    return seen


def test_nan_on_one_rank_is_nan_on_all_and_nothing_owed_is_lost(ranks: Ranks) -> None:
    gradients = random_gradients(LAYOUTS, 2, 4, torch.float32)
    runs = ranks.run(one_nan, gradients)
    for rank, seen in enumerate(runs):
        before, out, after, later = seen[3], seen[4], seen[5], seen[6]
        assert out[0].isnan().all()
        assert all(t.isfinite().all() for t in out[1:])
        assert all(t.isfinite().all() for t in later)
        assert torch.equal(after["basis"]["tensors.0"], before["basis"]["tensors.0"])
        was, now = (s["own"][f"rank_{rank}"]["tensors.0"]["a"] for s in (before, after))
        torch.testing.assert_close(now, was, rtol=1e-5, atol=1e-5)
        assert not torch.equal(after["basis"]["tensors.6"], before["basis"]["tensors.6"])


def save_and_go_on(rank: int, world_size: int, gradients: Gradients, folder: Path) -> None:
    model = wrap(LAYOUTS, torch.float32, **SMALL_BUCKETS)
    state = arc_topk.register(model, compressor="low_rank", ratio=0.2, **FLOAT32)
    for step in gradients:
        backward(model, step[rank])
    state.save(folder)


def load_with(
    rank: int, world_size: int, folder: Path, config: dict[str, Any], drop: bool
) -> dict[str, Any]:
    import warnings

    model = wrap(LAYOUTS, torch.float32, **SMALL_BUCKETS)
    state = arc_topk.register(model, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state.load(folder, drop_residuals=drop)
    loaded = state.state_dict(gather=False)
    zeros = [torch.zeros(t.shape) for t in LAYOUTS]
    backward(model, zeros)
    return {"loaded": loaded, "later": state.state_dict(gather=False)}


def test_another_number_of_ranks_owes_the_same_and_keeps_the_basis(
    pools: Pools, tmp_path: Path
) -> None:
    gradients = random_gradients(LAYOUTS, 2, 3, torch.float32)
    pools.of(2).run(save_and_go_on, gradients, tmp_path)
    same = pools.of(2).run(load_with, tmp_path, {"compressor": "low_rank", "ratio": 0.2}, False)
    other = pools.of(3).run(load_with, tmp_path, {"compressor": "low_rank", "ratio": 0.2}, False)
    for t in MATRICES:
        name = f"tensors.{t}"
        bases = [run["loaded"]["basis"][name] for run in same + other]
        for basis in bases:
            assert torch.equal(basis, bases[0]) and basis.any()
        owed = [
            torch.stack(
                [one["loaded"]["own"][f"rank_{i}"][name]["a"] for i, one in enumerate(runs)]
            )
            for runs in (same, other)
        ]
        torch.testing.assert_close(owed[0].mean(0), owed[1].mean(0), rtol=1e-5, atol=1e-6)


def test_another_rank_takes_the_columns_that_there_are(pools: Pools, tmp_path: Path) -> None:
    gradients = random_gradients(LAYOUTS, 2, 3, torch.float32)
    pools.of(2).run(save_and_go_on, gradients, tmp_path)
    for k in (1, 9):
        config = {"compressor": "low_rank", "rank": k, **FLOAT32}
        for run in pools.of(2).run(load_with, tmp_path, config, True):
            for t in MATRICES:
                later = run["later"]["basis"][f"tensors.{t}"]
                assert later.isfinite().all() and len(later) == min(k, 12, *LAYOUTS[t].shape[:1])
    # And the other way about: rows go on with the residuals, and know of no basis.
    for run in pools.of(2).run(load_with, tmp_path, {"ratio": 0.2, **FLOAT32}, False):
        assert "basis" not in run["later"]


def test_a_damaged_basis_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    gradients = random_gradients(LAYOUTS, 2, 1, torch.float32)
    for text in ranks.run(load_damaged, gradients):
        assert "the basis of parameter 'tensors.0'" in text[0]
        assert "'basis" in text[1]


def load_damaged(rank: int, world_size: int, gradients: Gradients) -> list[str]:
    model = wrap(LAYOUTS, torch.float32)
    state = arc_topk.register(model, compressor="low_rank", ratio=0.2)
    backward(model, gradients[0][rank])
    saved = state.state_dict(gather=False)
    texts = []
    for bad in (saved["basis"]["tensors.0"] * torch.inf, 7):
        damaged = {**saved, "basis": {**saved["basis"], "tensors.0": bad}}
        texts.append(message_of(lambda d=damaged: state.load_state_dict(d)))
    return texts


def many_buckets(rank: int, world_size: int, steps: int) -> list[Tensor]:
    layouts = [torch.empty(64, 32)] * 24
    model = wrap(layouts, torch.float32, bucket_cap_mb=0.008)
    state = arc_topk.register(model, compressor="low_rank", rank=2, check_every=2)
    gradients = random_gradients(layouts, world_size, steps, torch.float32)
    out: list[Any] = []
    for step in gradients:
        out = backward(model, step[rank])
    assert state.metrics()["exchanges"] > 10 * steps
    return out


def test_any_number_of_buckets_over_gloo(ranks: Ranks) -> None:
    """Where torch's hook aborts: its collectives are issued from callbacks, in any order."""
    zero, one = ranks.run(many_buckets, 6)
    assert_same_bits(zero, one)


def plan_of(rank: int, world_size: int, config: dict[str, Any]) -> Any:
    model = wrap(LAYOUTS, torch.float32)
    return arc_topk.register(model, **config).plan()


def test_the_plan_tells_columns_bytes_and_memory(ranks: Ranks) -> None:
    plan = ranks.run(plan_of, {"compressor": "low_rank", "rank": 2, **FLOAT32})[0]
    row = plan.rows[0]
    assert (row.view, row.kept, row.wire_bytes) == ((40, 24), 2, 4 * (2 * 64 + 1))
    assert row.state_bytes == 4 * (40 * 24 + 2 * (40 + 24) + 2 * 24)
    assert plan.rows[1].kept is None
    json.dumps(str(plan))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"compressor": "low_rank", "feedback": "ef21"}, ["feedback", "'ef21'", "'ef14'"]),
        ({"compressor": "low_rank", "feedback": "ef21m"}, ["feedback", "'ef21m'", "'none'"]),
        ({"compressor": "low_rank", "rank": 0}, ["rank is 0", "from 1"]),
        ({"compressor": "low_rank", "rank": 1.5}, ["rank is 1.5", "an integer"]),
        ({"rank": 4}, ["rank is 4", "compressor='low_rank'"]),
    ],
)
def test_what_low_rank_does_not_take(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        arc_topk.Config(**fields)
    for word in words:
        assert word in str(caught.value)
