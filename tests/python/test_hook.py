"""The hook under DDP: its forms, its collectives, and what DDP does around it."""

from __future__ import annotations

import ctypes
import gc
import itertools
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device import DEVICE, copy_to
from model import Gradients, backward, random_gradients, wrap
from ranks import Ranks
from test_engine import (
    CHOICES,
    COMPRESSED,
    COMPRESSORS,
    FLOAT32,
    LAYOUTS,
    LOW_RANK,
    Run,
    assert_same_bits,
    check_against_oracle,
    run_native,
)
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import arc_topk
from arc_topk import _C
from arc_topk.reference import Oracle

pytestmark = pytest.mark.device

STEPS = 4
# Bytes in float64 alone: there no other order of summation rounds a unit otherwise.
TYPES = {"float32": torch.float32, "bytes": torch.float64}
WIRES = {"float32": FLOAT32, "bytes": {"wire_dtype": torch.uint8}}
ON_BYTES = [("arc_topk", "ef14", "bytes"), *([("low_rank", "ef14", "bytes")] if LOW_RANK else [])]
MANY_BUCKETS = {"bucket_cap_mb": 0.004}


def in_float32(choices: Sequence[tuple[str, str]]) -> list[tuple[str, str, str]]:
    return [(compressor, feedback, "float32") for compressor, feedback in choices]


def same_gradients(steps: int = STEPS, dtype: torch.dtype = torch.float32) -> Gradients:
    return random_gradients(LAYOUTS, 2, steps, dtype)


# --- forms ----------------------------------------------------------------------------------------


def run_standard(
    rank: int, world_size: int, gradients: Gradients, config: dict[str, Any], bind: bool
) -> list[list[Tensor | None]]:
    model = wrap(LAYOUTS, torch.float32, **MANY_BUCKETS)
    state = arc_topk.State(**config)
    model.register_comm_hook(state, arc_topk.arc_topk_hook)
    if bind:
        state.bind(model)
    return [backward(model, step[rank]) for step in gradients]


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_standard_form_gives_the_same_bits(ranks: Ranks, compressor: str) -> None:
    gradients = same_gradients()
    # Rand-K draws by a parameter's place in the model, which an unbound state does not know.
    for feedback, bind in (("ef14", True), ("ef21m", compressor == "rand_k")):
        config = {"compressor": compressor, "feedback": feedback, "ratio": 0.2}
        native = ranks.run(run_native, LAYOUTS, gradients, torch.float32, config, MANY_BUCKETS)
        standard = ranks.run(run_standard, gradients, config, bind)
        for step in range(STEPS):
            assert_same_bits(native[0].outputs[step], standard[0][step])


def run_exchange(
    rank: int, world_size: int, gradients: Gradients, config: dict[str, Any]
) -> tuple[list[list[Tensor]], dict[str, Any], int]:
    first = [torch.empty_like(t, device=DEVICE) for t in LAYOUTS]
    exchange = arc_topk.GradientExchange(first, **config)
    outputs = []
    for step in gradients:
        tensors = copy_to(DEVICE, step[rank])
        exchange.all_reduce_(tensors)
        outputs.append(copy_to("cpu", tensors))
    return outputs, exchange.metrics(), exchange.plan().wire_bytes


def run_reading_the_buffer(
    rank: int, world_size: int, gradients: Gradients, feedback: str
) -> list[bool]:
    """What a wrapper does that changes the future's value, or reads the bucket behind it."""
    model = wrap(LAYOUTS, torch.float32)
    state = arc_topk.State(feedback=feedback, ratio=0.2)
    in_buffer: list[bool] = []

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations
        def look(future: Any) -> Tensor:
            value: Tensor = future.value()
            in_buffer.append(value.data_ptr() == bucket.buffer().data_ptr())
            return value.div_(2).mul_(2)

        return arc_topk.arc_topk_hook(state, bucket).then(look)

    model.register_comm_hook(state, hook)
    state.bind(model)
    for step in gradients:
        backward(model, step[rank])
    return in_buffer


@pytest.mark.parametrize("feedback", ["none", "ef14", "ef21", "ef21m"])
def test_the_standard_form_leaves_its_result_in_the_buckets_buffer(
    ranks: Ranks, feedback: str
) -> None:
    for in_buffer in ranks.run(run_reading_the_buffer, same_gradients(), feedback):
        assert len(in_buffer) == STEPS and all(in_buffer)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_gradient_exchange_gives_the_same_bits(ranks: Ranks, compressor: str) -> None:
    gradients = same_gradients()
    config = {"compressor": compressor, "ratio": 0.2}
    native = ranks.run(run_native, LAYOUTS, gradients, torch.float32, config, {})
    for outputs, metrics, wire_bytes in ranks.run(run_exchange, gradients, config):
        assert metrics["wire_bytes"] == STEPS * wire_bytes
        for step in range(STEPS):
            assert_same_bits(native[0].outputs[step], outputs[step])


def test_gradient_exchange_agrees_with_the_oracle(ranks: Ranks) -> None:
    for compressor in COMPRESSORS:
        gradients = same_gradients()
        config = {"compressor": compressor, "ratio": 0.2, **FLOAT32}
        outputs, _, _ = ranks.run(run_exchange, gradients, config)[0]
        oracle = Oracle(LAYOUTS, torch.float32, 2, **config)
        for step, got in zip(gradients, outputs, strict=True):
            for out, result in zip(got, oracle.step(step), strict=True):
                torch.testing.assert_close(out, result.output, rtol=1e-4, atol=1e-4)


# --- what DDP does --------------------------------------------------------------------------------


def run_plain(rank: int, world_size: int, gradients: Gradients) -> list[list[Tensor | None]]:
    model = wrap(LAYOUTS, torch.float32, **MANY_BUCKETS)
    return [backward(model, step[rank]) for step in gradients]


def test_dense_and_the_steps_before_start_are_plain_ddp_to_the_bit(ranks: Ranks) -> None:
    gradients = same_gradients()
    plain = ranks.run(run_plain, gradients)
    for config in ({"compressor": "dense"}, {"start_step": STEPS}):
        runs = ranks.run(run_native, LAYOUTS, gradients, torch.float32, config, MANY_BUCKETS)
        for step in range(STEPS):
            assert_same_bits(plain[0][step], runs[0].outputs[step])


@pytest.mark.parametrize("compressor", ["arc_topk", "rand_k"])
def test_ratio_one_is_the_mean(ranks: Ranks, compressor: str) -> None:
    gradients = same_gradients()
    for feedback in ("none", "ef14"):
        config = {"compressor": compressor, "feedback": feedback, "ratio": 1.0, "row_width": 64,
                  **FLOAT32}  # fmt: skip
        for run in ranks.run(run_native, LAYOUTS, gradients, torch.float32, config, {}):
            for step, outputs in zip(gradients, run.outputs, strict=True):
                for t, out in enumerate(outputs):
                    a, b = step[0][t], step[1][t]
                    assert out is not None and a is not None and b is not None
                    torch.testing.assert_close(out, (a + b) / 2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{"gradient_as_bucket_view": True}, {"static_graph": True}])
def test_ddp_options_change_nothing(ranks: Ranks, options: dict[str, Any]) -> None:
    gradients = same_gradients()
    for feedback in ("ef14", "ef21m"):
        config = {"feedback": feedback, "ratio": 0.2, **FLOAT32}
        runs = ranks.run(
            run_native, LAYOUTS, gradients, torch.float32, config, {**MANY_BUCKETS, **options}
        )
        check_against_oracle(runs, LAYOUTS, gradients, torch.float32, config)


def run_accumulating(rank: int, world_size: int, gradients: Gradients) -> list[Tensor | None]:
    """Two backwards into one gradient, the first without synchronisation."""
    model = wrap(LAYOUTS, torch.float32)
    arc_topk.register(model, ratio=1.0, feedback="none")
    with model.no_sync():
        model(copy_to(DEVICE, gradients[0][rank])).backward()
    model(copy_to(DEVICE, gradients[1][rank])).backward()
    return copy_to("cpu", (p.grad for p in model.module.tensors))


def test_no_sync_accumulates(ranks: Ranks) -> None:
    gradients = same_gradients(2)
    out = ranks.run(run_accumulating, gradients)[0]
    for t, total in enumerate(out):
        parts = [g for step in gradients for own in step if (g := own[t]) is not None]
        torch.testing.assert_close(total, sum(parts) / 2, rtol=1e-5, atol=1e-5)


def run_uneven(
    rank: int, world_size: int, gradients: Gradients, config: dict[str, Any]
) -> list[Tensor]:
    """Rank 0 has more inputs: rank 1 shadows it, with zeros."""
    model = wrap(LAYOUTS, torch.float32)
    arc_topk.register(model, **config)
    mine = gradients if rank == 0 else gradients[:2]
    sums = [torch.zeros_like(t, device="cpu") for t in LAYOUTS]
    with model.join(divide_by_initial_world_size=True):
        for step in mine:
            for total, out in zip(sums, backward(model, step[rank]), strict=True):
                assert out is not None
                total += out
    return sums


@pytest.mark.parametrize(("config", "near"), [(FLOAT32, 1e-4), ({}, 1e-2)])
def test_uneven_inputs_under_join_lose_no_residual(
    ranks: Ranks, config: dict[str, Any], near: float
) -> None:
    """Rank 0 goes on with tiny gradients: what both owe when rank 1 has joined is paid."""
    gradients = same_gradients(30)
    for step in gradients[2:]:
        step[0] = [torch.full_like(t, 1e-30) for t in step[0] if t is not None]
    sums = ranks.run(run_uneven, gradients, {"ratio": 0.2, **config})[0]
    for t, total in enumerate(sums):
        parts = [g for step in gradients[:2] for own in step if (g := own[t]) is not None]
        torch.testing.assert_close(total, sum(parts) / 2, rtol=near, atol=near)


def run_two_models(rank: int, world_size: int, gradients: Gradients) -> list[Any]:
    """Two DDP instances in turn, each with an engine of its own."""
    models = [wrap(LAYOUTS, torch.float32) for _ in range(2)]
    for model in models:
        arc_topk.register(model, ratio=0.2)
    return [[backward(model, step[rank]) for model in models] for step in gradients]


def test_two_models_do_not_meet(ranks: Ranks) -> None:
    gradients = same_gradients()
    alone = ranks.run(run_native, LAYOUTS, gradients, torch.float32, {"ratio": 0.2}, {})
    for step, both in enumerate(ranks.run(run_two_models, gradients)[0]):
        for outputs in both:
            assert_same_bits(outputs, alone[0].outputs[step])


# --- flags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("compressor", "feedback", "wire"), in_float32(COMPRESSED) + ON_BYTES)
def test_unused_parameters_change_no_state(
    ranks: Ranks, compressor: str, feedback: str, wire: str
) -> None:
    dtype = TYPES[wire]
    gradients = same_gradients(6, dtype)
    for t, step, unused_on in (
        (0, 2, (0, 1)),
        (0, 3, (0, 1)),
        (6, 3, (1,)),
        (3, 2, (0, 1)),
        (5, 4, (0,)),
    ):
        for rank in unused_on:
            gradients[step][rank][t] = None
    config = {"compressor": compressor, "feedback": feedback, "ratio": 0.2, **WIRES[wire]}
    find = {"find_unused_parameters": True, **MANY_BUCKETS}
    runs = ranks.run(run_native, LAYOUTS, gradients, dtype, config, find)
    assert runs[0].outputs[2][0] is None and runs[0].outputs[2][3] is None
    assert runs[0].outputs[3][6] is not None
    check_against_oracle(runs, LAYOUTS, gradients, dtype, {**config, "may_be_unused": True})


def silence(gradients: Gradients, tensors: Sequence[int], steps: Sequence[int]) -> None:
    """Zero on every rank, though used."""
    for step in steps:
        for own in gradients[step]:
            for t in tensors:
                own[t] = torch.zeros_like(own[t])


@pytest.mark.parametrize(("compressor", "feedback", "wire"), in_float32(CHOICES) + ON_BYTES)
def test_zero_gradients_are_gradients_like_any_other(
    ranks: Ranks, compressor: str, feedback: str, wire: str
) -> None:
    dtype = TYPES[wire]
    gradients = same_gradients(8, dtype)
    silence(gradients, (0, 2, 5), (2, 3, 4, 5))
    config = {"compressor": compressor, "feedback": feedback, "ratio": 0.2, **WIRES[wire]}
    runs = ranks.run(run_native, LAYOUTS, gradients, dtype, config, MANY_BUCKETS)
    check_against_oracle(runs, LAYOUTS, gradients, dtype, config)


def check_unused(
    runs: Sequence[Run],
    gradients: Gradients,
    config: dict[str, Any],
    dtype: torch.dtype = torch.float32,
) -> None:
    """As if the silent steps had not been, for these tensors: what they get next is not stale."""
    for run, step, t in itertools.product(runs, (2, 3, 4, 5), (0, 2, 5)):
        out = run.outputs[step][t]
        assert out is None or not out.any()
    check_against_oracle(list(runs), LAYOUTS, gradients, dtype, {**config, "may_be_unused": True})


@pytest.mark.parametrize("option", ["find_unused_parameters", "static_graph"])
@pytest.mark.parametrize(("compressor", "feedback", "wire"), in_float32(CHOICES) + ON_BYTES)
def test_where_ddp_throws_results_away_zeros_change_no_state_and_give_zeros(
    ranks: Ranks, compressor: str, feedback: str, wire: str, option: str
) -> None:
    dtype = TYPES[wire]
    gradients = same_gradients(8, dtype)
    silence(gradients, (0, 2, 5), (2, 3, 4, 5))
    config = {"compressor": compressor, "feedback": feedback, "ratio": 0.2, **WIRES[wire]}
    ddp = {option: True, **MANY_BUCKETS}
    runs = ranks.run(run_native, LAYOUTS, gradients, dtype, config, ddp)
    check_unused(runs, gradients, config, dtype)


def run_never_bound(
    rank: int, world_size: int, gradients: Gradients, config: dict[str, Any]
) -> Run:
    """It cannot know what DDP does with its results."""
    model = wrap(LAYOUTS, torch.float32, **MANY_BUCKETS)
    state = arc_topk.State(**config)
    model.register_comm_hook(state, arc_topk.arc_topk_hook)
    outputs = [backward(model, step[rank]) for step in gradients]
    return Run(outputs, state.metrics(), 0)


@pytest.mark.parametrize("feedback", ["ef14", "ef21", "ef21m"])
def test_a_state_that_nobody_has_bound_takes_zeros_for_unused(ranks: Ranks, feedback: str) -> None:
    gradients = same_gradients(8)
    silence(gradients, (0, 2, 5), (2, 3, 4, 5))
    config = {"feedback": feedback, "ratio": 0.2, **FLOAT32}
    check_unused(ranks.run(run_never_bound, gradients, config), gradients, config)


def run_bound_again(
    rank: int, world_size: int, gradients: Gradients, config: dict[str, Any]
) -> list[list[Tensor | None]]:
    """The silent steps under find_unused_parameters, and then the same without it."""
    state = arc_topk.State(**config)
    outputs = []
    for options in ({"find_unused_parameters": True}, {}):
        model = wrap(LAYOUTS, torch.float32, **options)
        model.register_comm_hook(state, arc_topk.arc_topk_hook)
        state.bind(model)
        outputs += [backward(model, step[rank]) for step in gradients]
    return outputs


@pytest.mark.parametrize("feedback", ["ef21", "ef21m"])
def test_what_zeros_mean_is_bound_anew(ranks: Ranks, feedback: str) -> None:
    gradients = same_gradients(6)
    silence(gradients, (0,), (2, 3, 4, 5))
    for outputs in ranks.run(run_bound_again, gradients, {"feedback": feedback, "ratio": 0.2}):
        zero = [not out[0].any() for out in outputs]  # type: ignore[union-attr]
        assert zero == [False, False, True, True, True, True] + 6 * [False]


@pytest.mark.parametrize("feedback", ["ef21", "ef21m"])
def test_the_estimate_of_a_gradient_that_stays_zero_goes_to_zero(
    ranks: Ranks, feedback: str
) -> None:
    """A zero-gated expert, a masked loss: the estimate of the last real gradient must not stay."""
    gradients = same_gradients(60)
    silence(gradients, range(len(LAYOUTS)), range(2, 60))
    config = {"feedback": feedback, "ratio": 0.2}
    run = ranks.run(run_native, LAYOUTS, gradients, torch.float32, config, {})[0]
    for t, (first, last) in enumerate(zip(run.outputs[1], run.outputs[-1], strict=True)):
        assert first is not None and last is not None
        assert last.norm() <= 0.02 * first.norm(), f"tensor {t}"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("compressor", "feedback", "wire"), in_float32(COMPRESSED) + ON_BYTES)
def test_non_finite_values_reach_every_rank_and_no_state(
    ranks: Ranks, compressor: str, feedback: str, wire: str, bad: float
) -> None:
    dtype = TYPES[wire]
    gradients = same_gradients(6, dtype)
    struck = {(2, 0), (3, 6), (3, 1)}  # (step, tensor); tensor 1 is a dense vector
    for step, t in struck:
        tensor = gradients[step][1][t]
        assert tensor is not None
        tensor.view(-1)[-1] = bad
    config = {"compressor": compressor, "feedback": feedback, "ratio": 0.2, **WIRES[wire]}
    runs = ranks.run(run_native, LAYOUTS, gradients, dtype, config, {})
    for run in runs:
        for step, outputs in enumerate(run.outputs):
            for t, out in enumerate(outputs):
                assert out is not None
                if (step, t) not in struck:
                    assert out.isfinite().all(), (step, t)
                elif DEVICE == "cuda" and feedback in ("ef21", "ef21m"):
                    # Handed out is the shared estimate itself, which stays but for a NaN in front.
                    assert out.view(-1)[0].isnan()
                elif t == 1 and (compressor, wire) != ("low_rank", "bytes"):  # has nothing dense
                    assert not out.view(-1)[-1].isfinite()
                else:
                    assert out.isnan().all()
    # What follows is as if the struck tensors had not been exchanged in that step.
    finite = [[[None if (s, t) in struck else g for t, g in enumerate(own)] for own in step]
              for s, step in enumerate(gradients)]  # fmt: skip
    for run in runs:
        for step, t in struck:
            run.outputs[step][t] = None
    check_against_oracle(runs, LAYOUTS, finite, dtype, {**config, "may_be_unused": True})


def test_a_non_finite_dense_first_step_starts_nothing(ranks: Ranks) -> None:
    gradients = same_gradients(5)
    tensor = gradients[0][1][0]
    assert tensor is not None
    tensor[3, 3] = float("nan")
    for feedback in ("ef21", "ef21m"):
        config = {"feedback": feedback, "ratio": 0.2}
        runs = ranks.run(run_native, LAYOUTS, gradients, torch.float32, config, {})
        first = runs[0].outputs[0]
        assert first[0] is not None and first[0][3, 3].isnan()
        assert runs[0].metrics["compressed_steps"] == 3
        for run in runs:
            run.outputs[0][0] = None
        check_against_oracle(runs, LAYOUTS, gradients, torch.float32, config)


# --- collectives ----------------------------------------------------------------------------------


class CountingGroup(dist.ProcessGroup):
    """Hands everything on, and remembers what."""

    def __init__(self, inner: dist.ProcessGroup) -> None:
        super().__init__(inner.rank(), inner.size())
        self.inner = inner
        self.calls: list[tuple[str, int]] = []

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        self.calls.append(("all_reduce", sum(t.nbytes for t in tensors)))
        return self.inner.allreduce(tensors, opts or dist.AllreduceOptions())

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:
        self.calls.append(("all_gather", sum(t.nbytes for t in inputs)))
        return self.inner.allgather(outputs, inputs, opts or dist.AllgatherOptions())

    def getBackendName(self) -> str:  # noqa: N802
        return "counting"


def run_counted(
    rank: int, world_size: int, layouts: Sequence[Tensor], config: dict[str, Any]
) -> tuple[list[tuple[str, int]], int]:
    group = CountingGroup(dist.group.WORLD)
    native = arc_topk.Config(**config).native()
    engine = _C.Exchange(native, group, [group])
    keys = [torch.empty_like(t, device="cpu") for t in layouts]
    buffer = torch.randn(sum(t.numel() for t in layouts), device=DEVICE)
    for _ in range(2):  # the second is compressed whatever the feedback
        group.calls.clear()
        engine.run(buffer, keys)
    named = [(str(i), key) for i, key in enumerate(keys)]
    plan = arc_topk.plan.make_plan(arc_topk.Config(**config), named, world_size)
    return group.calls, plan.wire_bytes


@pytest.mark.parametrize("tensors", [1, 30, 300])
@pytest.mark.parametrize("feedback", ["none", "ef14", "ef21", "ef21m"])
def test_collectives_a_bucket(ranks: Ranks, tensors: int, feedback: str) -> None:
    mixed = [
        torch.empty(24 + i % 5, 16 + i % 7) if i % 3 < 2 else torch.empty(16)
        for i in range(tensors)
    ]
    vectors = [torch.empty(16) for _ in range(tensors)]
    expected = {"arc_topk": ["all_reduce"] * 2, "rand_k": ["all_reduce"], "top_k": ["all_gather"],
                "low_rank": ["all_reduce"] * 2, "dense": ["all_reduce"]}  # fmt: skip
    for compressor, collectives in expected.items():
        if (compressor, feedback) not in CHOICES:
            continue
        config = {"compressor": compressor, "feedback": feedback, "ratio": 0.2, **FLOAT32}
        for calls, wire_bytes in ranks.run(run_counted, mixed, config):
            assert [name for name, _ in calls] == collectives
            assert sum(n for _, n in calls) == wire_bytes
        for calls, wire_bytes in ranks.run(run_counted, vectors, config):
            assert calls == [("all_reduce", wire_bytes)]


# --- the GIL --------------------------------------------------------------------------------------


def run_while_the_gil_is_held(
    rank: int, world_size: int, gradients: Gradients
) -> tuple[int, bool, int]:
    model = wrap(LAYOUTS, torch.float32, **MANY_BUCKETS)
    state = arc_topk.register(model, ratio=0.2)
    for step in gradients[:2]:
        backward(model, step[rank])
    state.reset_metrics()
    buckets = len(list(model.reducer._get_zeros_like_grad_buckets()))
    loss = model(copy_to(DEVICE, gradients[2][rank]))
    sleep_with_gil = ctypes.PyDLL(None).usleep  # PyDLL does not let the GIL go
    seen: list[tuple[int, bool]] = []

    def hold() -> None:
        go.wait()
        exchanged = 0
        deadline = time.monotonic() + 60
        while exchanged < buckets and time.monotonic() < deadline:
            sleep_with_gil(5_000)
            exchanged = state.metrics()["exchanges"]
        seen.append((exchanged, backward_is_over.is_set()))

    ones = torch.ones_like(loss)
    run_backward = torch.autograd.Variable._execution_engine.run_backward
    go = threading.Event()
    backward_is_over = threading.Event()
    holder = threading.Thread(target=hold)
    holder.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    gc.collect()
    gc.disable()  # freeing an earlier test's engine would let the GIL go before the engine does
    try:
        # The holder gets the GIL when the autograd engine lets it go, and keeps it meanwhile.
        # Not by loss.backward(): it makes the ones itself, in a call that lets the GIL go too soon.
        # And with the graph kept: autograd takes the GIL to free tensors that Python made.
        go.set()
        run_backward((loss,), (ones,), True, False, (), True, accumulate_grad=True)
        backward_is_over.set()
        holder.join()
    finally:
        gc.enable()
        sys.setswitchinterval(interval)
    return *seen[0], buckets


def test_native_path_needs_no_gil(ranks: Ranks) -> None:
    results = ranks.run(run_while_the_gil_is_held, same_gradients(3))
    for exchanged, over, buckets in results:
        assert buckets > 1
        assert exchanged == buckets
        assert not over  # all of it while the holder had the GIL


# --- registration ---------------------------------------------------------------------------------


def sparse_model() -> DistributedDataParallel:
    embedding = torch.nn.Embedding(5, 3, sparse=True, device=DEVICE)
    return DistributedDataParallel(torch.nn.Sequential(embedding))


def run_registration(rank: int, world_size: int) -> None:
    model = wrap(LAYOUTS, torch.float32)
    state = arc_topk.register(model, ratio=0.2)
    assert "tensors.0" in str(state.plan())
    with pytest.raises(ValueError, match=r"hook already \(arc_topk_hook\)"):
        arc_topk.register(model)
    with pytest.raises(TypeError, match=r"Linear.*DistributedDataParallel"):
        arc_topk.register(torch.nn.Linear(2, 2))  # type: ignore[arg-type]

    sparse = sparse_model()
    with pytest.raises(ValueError, match=r"module '0'.*sparse=False"):
        arc_topk.register(sparse)
    complex_ = DistributedDataParallel(torch.nn.Linear(2, 2, dtype=torch.complex64, device=DEVICE))
    with pytest.raises(ValueError, match=r"parameter 'weight'.*complex64.*view_as_real"):
        arc_topk.register(complex_)
    mixed = wrap(LAYOUTS, torch.float32)
    mixed.mixed_precision = object()  # what DDP(mixed_precision=...) leaves; it itself wants a GPU
    with pytest.raises(ValueError, match="mixed_precision"):
        arc_topk.register(mixed)
    python = wrap(LAYOUTS, torch.float32)
    python._use_python_reducer = True
    with pytest.raises(ValueError, match="Python reducer"):
        arc_topk.register(python)


def test_what_cannot_be_served_is_refused(ranks: Ranks) -> None:
    ranks.run(run_registration)


def run_sparse_bucket(rank: int, world_size: int) -> str:
    model = sparse_model()
    model.register_comm_hook(arc_topk.State(), arc_topk.arc_topk_hook)
    try:
        model(torch.tensor([1, 2], device=DEVICE)).sum().backward()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def test_a_sparse_bucket_is_an_error(ranks: Ranks) -> None:
    for text in ranks.run(run_sparse_bucket):
        assert "sparse" in text


# --- profilers ------------------------------------------------------------------------------------


def run_profiled(rank: int, world_size: int, gradients: Gradients) -> dict[str, int]:
    """Thread by phase, of the first bucket."""
    model = wrap(LAYOUTS, torch.float32, **MANY_BUCKETS)
    arc_topk.register(model, ratio=0.2)
    for step in gradients[:-1]:
        backward(model, step[rank])
    # The host's threads alone: beside them a GPU's profiler shows the same names on its streams.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        backward(model, gradients[-1][rank])
    prefix, suffix = "arc_topk ", ", bucket 0"
    return {
        event.name[len(prefix) : -len(suffix)]: event.thread
        for event in profile.events() or []
        if event.name.startswith(prefix) and event.name.endswith(suffix)
    }


def test_profilers_show_every_phase_of_a_bucket(ranks: Ranks) -> None:
    threads = ranks.run(run_profiled, same_gradients())[0]
    first = ("first_collective", "select", "pack")
    assert set(threads) == {"prepare", *first, "second_collective", "apply"}
    assert len({threads[phase] for phase in first}) == 1
    lanes = {threads[phase] for phase in ("pack", "second_collective", "apply")}
    # With streams all of it is queued by one thread.
    assert len(lanes) == (3 if DEVICE == "cpu" else 1)
    assert threads["prepare"] != threads["apply"], "collectives have a thread of their own"
