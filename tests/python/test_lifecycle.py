"""What becomes of a State that is used in another way than from one wrap to its end.

Every case ends well or with an error that says what to do: no crash, no hang, nothing left behind.
"""

import copy
import gc
import io
import os
import pickle
import threading
import time
import warnings
import weakref
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device import DEVICE, copy_to
from model import Gradients, backward, random_gradients, wrap
from ranks import Pools, Ranks, message_of, temporary
from test_engine import LAYOUTS, REMEMBERED, assert_same_bits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import arc_topk
from arc_topk.comm_group import comm_group

pytestmark = pytest.mark.device

SLOW = timedelta(seconds=120)  # a group's time-out that no test may have to wait for
SMALL_BUCKETS = {"bucket_cap_mb": 0.004}


def total(steps: list[list[Tensor | None]]) -> list[Tensor]:
    return [
        torch.stack([g.float() for g in of if g is not None]).sum(0)
        for of in zip(*steps, strict=True)
    ]


# --- the same State, another model ----------------------------------------------------------------

MATRIX = [torch.zeros(64, 32)]


def run_into_bfloat16(rank: int, world_size: int) -> tuple[Tensor, Tensor, int]:
    """One step in float32, then in bfloat16 with gradients of zero until the residual is sent."""
    gradient = random_gradients(MATRIX, world_size, 1, torch.float32)[0][rank]
    model = wrap(MATRIX, torch.float32)
    state = arc_topk.register(model, ratio=0.25)
    sent = [backward(model, gradient)]
    module = model.module.to(torch.bfloat16)
    model = DistributedDataParallel(module)
    model.register_comm_hook(state, arc_topk.arc_topk_hook)
    state.bind(model)
    tiny = [torch.full_like(t, 1e-30, dtype=torch.bfloat16) for t in MATRIX]
    sent += [backward(model, tiny) for _ in range(12)]
    return total(sent)[0], gradient[0], state.metrics()["steps"]


def test_a_residual_follows_its_parameter_into_another_dtype(ranks: Ranks) -> None:
    (sent, mine, steps), (_, others, _) = ranks.run(run_into_bfloat16)
    torch.testing.assert_close(sent, (mine + others) / 2, rtol=0.02, atol=0.02)
    assert steps == 13


def run_into_other_shapes(rank: int, world_size: int) -> tuple[str, str]:
    gradients = random_gradients(LAYOUTS, world_size, 2, torch.float32)
    model = wrap(LAYOUTS, torch.float32)
    state = arc_topk.register(model, ratio=0.25)
    backward(model, gradients[0][rank])
    module = model.module
    module.tensors[0].data = torch.zeros(3, 2, device=DEVICE)
    smaller = message_of(lambda: state.bind(DistributedDataParallel(module)))
    other = message_of(lambda: state.bind(DistributedDataParallel(nn.Linear(8, 8, device=DEVICE))))
    return smaller, other


def test_another_shape_or_model_is_an_error_that_names_the_parameter(ranks: Ranks) -> None:
    for smaller, other in ranks.run(run_into_other_shapes):
        assert "'tensors.0'" in smaller and "[3, 2]" in smaller and "[40, 24]" in smaller
        assert "'tensors." in other and "does not have" in other


def run_under_the_hook(rank: int, world_size: int) -> str:
    """A parameter gets smaller under a live DDP's feet: the bucket no longer fits."""
    gradients = random_gradients(MATRIX, world_size, 1, torch.float32)[0][rank]
    model = wrap(MATRIX, torch.float32)
    arc_topk.register(model, ratio=0.25)
    backward(model, gradients)
    model.zero_grad(set_to_none=True)
    loss = model(copy_to(DEVICE, gradients))
    model.module.tensors[0].data = torch.zeros(4, 4, device=DEVICE)
    return message_of(loss.backward)


def test_a_parameter_that_changes_under_a_live_ddp_never_reads_out_of_bounds(
    ranks: Ranks,
) -> None:
    for text in ranks.run(run_under_the_hook):
        assert text, "torch or the engine must refuse it"


# --- a bucket that comes twice --------------------------------------------------------------------


def run_twice(rank: int, world_size: int, gradients: Gradients) -> tuple[str, list[Tensor | None]]:
    model = wrap(LAYOUTS, torch.float32)
    state = arc_topk.State(ratio=0.2)
    texts: list[str] = []
    store = dist.group.WORLD.get_group_store()

    def hook(state: arc_topk.State, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        if rank == 1:
            store.wait(["rank 0 has tried"])  # so long rank 0's exchange is in the air
        future = arc_topk.arc_topk_hook(state, bucket)
        if rank == 0:
            texts.append(message_of(lambda: arc_topk.arc_topk_hook(state, bucket)))
            store.set("rank 0 has tried", "")
        return future

    model.register_comm_hook(state, hook)
    state.bind(model)
    output = backward(model, gradients[0][rank])
    return "\n".join(texts), output


def test_a_bucket_handed_over_twice_is_refused_and_the_first_goes_on(ranks: Ranks) -> None:
    gradients = random_gradients(LAYOUTS, 2, 1, torch.float32)
    (text, zero), (_, one) = ranks.run(run_twice, gradients)
    assert "still being exchanged" in text and "first parameter 'tensors." in text
    assert_same_bits(zero, one)


# --- a backward pass that fails half-way ----------------------------------------------------------


class HalfWayError(RuntimeError):
    pass


def fail_half_way(model: DistributedDataParallel, gradients: list[Tensor], at: int) -> None:
    def fail(gradient: Tensor) -> None:
        raise HalfWayError

    handle = model.module.tensors[at].register_hook(fail)
    with pytest.raises(HalfWayError):
        backward(model, gradients)
    handle.remove()


def run_on_after_a_failure(
    rank: int, world_size: int, gradients: Gradients, config: dict[str, Any]
) -> tuple[list[list[Tensor | None]], float, int]:
    model = wrap(LAYOUTS, torch.float32, **SMALL_BUCKETS)
    state = arc_topk.register(model, **config)
    for step in gradients[:2]:
        backward(model, step[rank])
    # Rank 1 fails before its first bucket, rank 0 behind it: rank 0 waits for what never comes.
    order = [1, 3, 5, 7, 0, 2, 4, 6][::-1]
    fail_half_way(model, gradients[2][rank], order[-1] if rank == 0 else order[0])
    module = model.module
    begun = time.monotonic()
    model = DistributedDataParallel(module, **SMALL_BUCKETS)
    model.register_comm_hook(state, arc_topk.arc_topk_hook)
    state.bind(model)
    took = time.monotonic() - begun
    outputs = [backward(model, step[rank]) for step in gradients[3:]]
    return outputs, took, state.metrics()["steps"]


@pytest.mark.parametrize(("compressor", "feedback"), REMEMBERED)
def test_a_state_goes_on_after_a_failed_backward(compressor: str, feedback: str) -> None:
    gradients = random_gradients(LAYOUTS, 2, 7, torch.float32)
    config = {"compressor": compressor, "feedback": feedback, "ratio": 0.2}
    with temporary(2, SLOW) as pool:
        zero, one = pool.run(run_on_after_a_failure, gradients, config)
    for a, b in zip(zero[0], one[0], strict=True):
        assert_same_bits(a, b)
        assert all(g is not None and g.isfinite().all() for g in a)
    assert zero[2] == one[2]
    assert max(zero[1], one[1]) < 60, "it waits for the time-out"


def run_beside_a_new_state(
    rank: int, world_size: int, gradients: Gradients, config: dict[str, Any]
) -> list[list[Tensor | None]]:
    """Rank 1 has lost its state, as a worker has that was started again."""
    model = wrap(LAYOUTS, torch.float32, **SMALL_BUCKETS)
    state = arc_topk.register(model, **config)
    for step in gradients[:3]:
        backward(model, step[rank])
    model = DistributedDataParallel(model.module, **SMALL_BUCKETS)
    if rank == 1:
        state = arc_topk.State(**config)
    model.register_comm_hook(state, arc_topk.arc_topk_hook)
    state.bind(model)
    return [backward(model, step[rank]) for step in gradients[3:]]


@pytest.mark.parametrize(("compressor", "feedback"), REMEMBERED)
def test_a_rank_without_state_joins_those_with_one(
    ranks: Ranks, compressor: str, feedback: str
) -> None:
    gradients = random_gradients(LAYOUTS, 2, 6, torch.float32)
    config = {"compressor": compressor, "feedback": feedback, "ratio": 0.2}
    zero, one = ranks.run(run_beside_a_new_state, gradients, config)
    for a, b in zip(zero, one, strict=True):
        assert_same_bits(a, b)


def run_and_let_go(rank: int, world_size: int, gradients: Gradients) -> float:
    model = wrap(LAYOUTS, torch.float32, **SMALL_BUCKETS)
    state = arc_topk.register(model, ratio=0.2)
    backward(model, gradients[0][rank])
    # Rank 1 fails before its first bucket and stays: rank 0 waits for what never comes.
    fail_half_way(model, gradients[1][rank], 1 if rank == 0 else 6)
    store = dist.group.WORLD.get_group_store()
    if rank == 1:
        store.wait(["rank 0 is through"])
        return 0
    begun = time.monotonic()
    del model, state
    gc.collect()
    took = time.monotonic() - begun
    store.set("rank 0 is through", "")
    return took


def test_letting_go_after_a_failed_backward_does_not_wait_for_the_time_out() -> None:
    gradients = random_gradients(LAYOUTS, 2, 2, torch.float32)
    with temporary(2, SLOW) as pool:
        assert max(pool.run(run_and_let_go, gradients)) < 60


# --- another process group ------------------------------------------------------------------------


def run_over_another_group(
    rank: int, world_size: int, feedback: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Pairs (0, 1), (2, 3), then (0, 2), (1, 3): ratio 1 averages over whichever it is."""
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3], [0, 2], [1, 3])]
    first, second = groups[rank // 2], groups[2 + rank % 2]
    gradient = [torch.full((8, 8), float(rank))]
    config = {"ratio": 1.0, "row_width": 4, "feedback": feedback}
    model = wrap(gradient, torch.float32, process_group=first)
    state = arc_topk.register(model, **config)
    before = backward(model, gradient)
    model = DistributedDataParallel(model.module, process_group=second)
    model.register_comm_hook(state, arc_topk.arc_topk_hook)
    state.bind(model)
    after = [backward(model, gradient) for _ in range(2)]
    return [g for g in before if g is not None], [g for g in after[-1] if g is not None]


@pytest.mark.parametrize("feedback", ["none", "ef14", "ef21", "ef21m"])
def test_a_state_moves_to_another_group(pools: Pools, feedback: str) -> None:
    results = pools.of(4).run(run_over_another_group, feedback)
    for rank, (before, after) in enumerate(results):
        pair, other = rank ^ 1, rank ^ 2
        torch.testing.assert_close(before[0], torch.full((8, 8), (rank + pair) / 2))
        torch.testing.assert_close(after[0], torch.full((8, 8), (rank + other) / 2))


def run_with_other_ranks(rank: int, world_size: int) -> str:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    state = arc_topk.register(wrap(MATRIX, torch.float32, process_group=pairs[rank // 2]))
    return message_of(lambda: state.bind(wrap(MATRIX, torch.float32)))


def test_another_number_of_ranks_is_refused(pools: Pools) -> None:
    for text in pools.of(4).run(run_with_other_ranks):
        assert "2 ranks" in text and "has 4" in text


# --- nothing is left ------------------------------------------------------------------------------


def resources() -> tuple[int, int, int]:
    return (
        len(os.listdir("/proc/self/task")),
        len(os.listdir("/proc/self/fd")),
        len(dist.distributed_c10d._world.pg_map),
    )


def run_wraps(rank: int, world_size: int, wraps: int, standard: bool) -> Any:
    gradients = random_gradients(LAYOUTS, world_size, 1, torch.float32)[0][rank]
    models = []

    def once() -> None:
        model = wrap(LAYOUTS, torch.float32)
        if standard:
            state = arc_topk.State(ratio=0.2)
            model.register_comm_hook(state, arc_topk.arc_topk_hook)
            state.bind(model)
        else:
            arc_topk.register(model, ratio=0.2)
        backward(model, gradients)
        models.append(weakref.ref(model.module))

    once()
    gc.collect()
    before = resources()
    for _ in range(wraps):
        once()
    gc.collect()
    deadline = time.monotonic() + 60  # threads end in their own time
    while resources() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    return before, resources(), sum(model() is not None for model in models)


@pytest.mark.parametrize("standard", [False, True])
def test_sixty_wraps_leave_no_thread_no_file_no_group_and_no_model(
    ranks: Ranks, standard: bool
) -> None:
    for before, after, alive in ranks.run(run_wraps, 60, standard):
        assert after == before
        assert alive == 0


def run_letting_go_at_once(rank: int, world_size: int, times: int) -> None:
    for i in range(times):
        comm_group(dist.group.WORLD, SLOW, f"group {i}")


def test_a_rank_may_let_go_while_another_is_still_connecting(pools: Pools) -> None:
    pools.of(4).run(run_letting_go_at_once, 150)


def run_keeping_the_state(rank: int, world_size: int) -> bool:
    gradients = random_gradients(LAYOUTS, world_size, 1, torch.float32)[0][rank]
    model = wrap(LAYOUTS, torch.float32)
    state = arc_topk.register(model, ratio=0.2)
    backward(model, gradients)
    left = [weakref.ref(model.module), *map(weakref.ref, model.module.parameters())]
    del model
    gc.collect()
    assert len(state.plan().rows) == len(LAYOUTS)
    return all(one() is None for one in left)


def test_a_state_keeps_no_model_alive(ranks: Ranks) -> None:
    assert ranks.run(run_keeping_the_state) == [True, True]


def run_last_reference_in_a_callback(rank: int, world_size: int) -> tuple[bool, bool, bool]:
    """The engine goes in a callback of its own future, on rank 0 surely on its own thread."""
    model = wrap(LAYOUTS, torch.float32)
    holder = [arc_topk.State(ratio=0.2)]
    gone = weakref.ref(holder[0])
    ended = threading.Event()
    threads = {}
    store = dist.group.WORLD.get_group_store()

    def hook(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        if rank == 1:
            store.wait(["rank 0 has its callback"])
        state = holder.pop()
        kept = [state]
        result = arc_topk.arc_topk_hook(state, bucket)
        del state
        threads["hook"] = threading.get_ident()

        def let_go(future: torch.futures.Future[Tensor]) -> Tensor:
            kept.clear()
            threads["callback"] = threading.get_ident()
            ended.set()
            return future.value()

        result = result.then(let_go)
        if rank == 0:
            store.set("rank 0 has its callback", "")
        return result

    model.register_comm_hook(None, hook)
    holder[0].bind(model)
    backward(model, random_gradients(LAYOUTS, world_size, 1, torch.float32)[0][rank])
    return ended.wait(60), gone() is None, threads["hook"] != threads["callback"]


def test_the_last_reference_may_go_in_a_callback(ranks: Ranks) -> None:
    zero, one = ranks.run(run_last_reference_in_a_callback)
    assert zero == (True, True, True) and one[:2] == (True, True)


def run_last_reference_in_the_air(rank: int, world_size: int) -> list[Tensor | None]:
    """The engine goes while its bucket's end, behind which Python waits, is still to come."""
    model = wrap(LAYOUTS, torch.float32)
    holder = [arc_topk.State(ratio=0.2)]
    store = dist.group.WORLD.get_group_store()

    def hook(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        if rank == 1:
            store.wait(["rank 0 lets go"])
        state = holder.pop()
        result = arc_topk.arc_topk_hook(state, bucket)
        if rank == 0:
            store.set("rank 0 lets go", "")
        del state  # waits for the thread that completes the future, which waits for the GIL
        return result

    model.register_comm_hook(None, hook)
    holder[0].bind(model)
    return backward(model, random_gradients(LAYOUTS, world_size, 1, torch.float32)[0][rank])


def test_the_last_reference_may_go_with_a_bucket_in_the_air() -> None:
    with temporary(2, timedelta(seconds=10)) as pool:
        zero, one = pool.run(run_last_reference_in_the_air)
    assert_same_bits(zero, one)


def run_copies(rank: int, world_size: int) -> list[str]:
    model = wrap(MATRIX, torch.float32)
    state = arc_topk.State(ratio=0.25)
    with warnings.catch_warnings(record=True) as unused:
        warnings.simplefilter("always")
        pickle.dumps(state)
    state = arc_topk.register(model, ratio=0.25)
    backward(model, random_gradients(MATRIX, world_size, 1, torch.float32)[0][rank])
    with warnings.catch_warnings(record=True) as used:
        warnings.simplefilter("always")
        again = pickle.loads(pickle.dumps(state))
        copy.deepcopy(state)
        torch.save({"state": state}, io.BytesIO())
    assert again.config == state.config and not unused
    return [str(warning.message) for warning in used]


def test_a_copy_of_a_used_state_warns_that_its_error_feedback_is_not_in_it(ranks: Ranks) -> None:
    for texts in ranks.run(run_copies):
        ours = [text for text in texts if "arc_topk" in text]
        assert len(ours) == 3
        assert all("of 1 steps is not in it" in text for text in ours)


# --- memory formats -------------------------------------------------------------------------------


def run_converted(rank: int, world_size: int, gradients: list[Tensor]) -> Tensor:
    """Converted between DDP() and the first backward; then zeros until the residual is sent."""
    module = nn.Conv2d(8, 16, (1, 3), bias=False, device=DEVICE)
    model = DistributedDataParallel(module, gradient_as_bucket_view=True)
    arc_topk.register(model, ratio=0.25)
    module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    outputs = []
    for step in range(12):
        model.zero_grad(set_to_none=True)
        x = torch.zeros(1, 8, 1, 3, device=DEVICE)
        loss = model(x).sum() * 0
        # The gradient of sum(w * g) is g.
        loss = loss + (module.weight * (gradients[rank].to(DEVICE) if step == 0 else 1e-30)).sum()
        loss.backward()
        assert module.weight.grad is not None
        outputs.append(module.weight.grad.cpu().clone())
    return torch.stack(outputs).sum(0)


def test_a_format_converted_behind_ddp_keeps_every_residual_in_its_place(ranks: Ranks) -> None:
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(16, 8, 1, 3, generator=generator) for _ in range(2)]
    for sent in ranks.run(run_converted, gradients):
        torch.testing.assert_close(sent, (gradients[0] + gradients[1]) / 2, rtol=1e-4, atol=1e-4)


# --- other threads --------------------------------------------------------------------------------


def run_logged(rank: int, world_size: int, gradients: Gradients) -> tuple[int, int]:
    model = wrap(LAYOUTS, torch.float32, **SMALL_BUCKETS)
    state = arc_topk.register(model, ratio=0.2)
    done = threading.Event()
    looks: list[int] = []

    def log() -> None:
        while not done.is_set():
            looks.append(state.metrics()["exchanges"])

    logger = threading.Thread(target=log)
    logger.start()
    for step in gradients:
        backward(model, step[rank])
    done.set()
    logger.join()
    assert looks == sorted(looks)
    return len(looks), state.metrics()["steps"]


def test_metrics_can_be_read_by_another_thread_during_backward(ranks: Ranks) -> None:
    gradients = random_gradients(LAYOUTS, 2, 8, torch.float32)
    for looks, steps in ranks.run(run_logged, gradients):
        assert looks > 0 and steps == 8
