"""Error feedback in checkpoints: training goes on as if it had not stopped, or an error says why.

Loading gives every rank its own part back, or takes nothing at all: another rank's part, or none,
would bias the average for good.
"""

import copy
import io
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from device import DEVICE
from model import Gradients, backward, random_gradients, wrap
from ranks import Pools, Ranks, message_of
from test_engine import CHOICES, FEEDBACKS, LAYOUTS, LOW_RANK, assert_same_bits
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import arc_topk

pytestmark = pytest.mark.device

STEPS, HALF = 6, 3
SMALL_BUCKETS = {"bucket_cap_mb": 0.004}
Outputs = list[list[Tensor | None]]


def fresh(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    model = wrap(LAYOUTS, dtype, **SMALL_BUCKETS)
    return model, arc_topk.register(model, **config)


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two checkpoints hold the same, but for their id."""

    def flat(state_dict: dict[str, Any]) -> dict[str, Tensor]:
        tensors = {f"shared {name}": part for name, part in state_dict["shared"].items()}
        for rank, of in state_dict["own"].items():
            for name, parts in of.items():
                tensors |= {f"{rank} {name} {key}": part for key, part in parts.items()}
        return tensors

    metas = [{**json.loads(one["meta"]), "id": ""} for one in (a, b)]
    x, y = flat(a), flat(b)
    return metas[0] == metas[1] and x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


# --- ways of saving: each hands over a State to a fresh one ---------------------------------------


def by_files(state: arc_topk.State, folder: Path) -> Callable[[arc_topk.State], Any]:
    state.save(folder)
    return lambda other: other.load(folder)


def by_own_dict(state: arc_topk.State, folder: Path) -> Callable[[arc_topk.State], Any]:
    """Every rank saves its own."""
    buffer = io.BytesIO()
    torch.save(state.state_dict(gather=False), buffer)
    buffer.seek(0)
    return lambda other: other.load_state_dict(torch.load(buffer, weights_only=True))


def by_rank_0s_dict(state: arc_topk.State, folder: Path) -> Callable[[arc_topk.State], Any]:
    """As Accelerate and Lightning do: every rank is asked for its dict, rank 0's is kept."""
    saved = state.state_dict()
    if dist.get_rank() == 0:
        torch.save(saved, folder / "checkpoint.pt")
    dist.barrier()
    return lambda other: other.load_state_dict(
        torch.load(folder / "checkpoint.pt", weights_only=True)
    )


def by_dcp(state: arc_topk.State, folder: Path) -> Callable[[arc_topk.State], Any]:
    dcp.save({"arc_topk": state}, checkpoint_id=folder)
    return lambda other: dcp.load({"arc_topk": other}, checkpoint_id=folder)


def by_async_dcp(state: arc_topk.State, folder: Path) -> Callable[[arc_topk.State], Any]:
    saved = state.state_dict()
    writing = dcp.async_save({"arc_topk": saved}, checkpoint_id=folder)
    saved_before = copy.deepcopy(saved)
    writing.result()
    assert same_state(saved, saved_before)

    def load(other: arc_topk.State) -> None:
        template = other.state_dict()
        dcp.load({"arc_topk": template}, checkpoint_id=folder)
        other.load_state_dict(template)

    return load


WAYS = {way.__name__: way for way in (by_files, by_own_dict, by_rank_0s_dict, by_dcp, by_async_dcp)}


def run_with_a_stop(
    rank: int,
    world_size: int,
    gradients: Gradients,
    config: dict[str, Any],
    way: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
) -> tuple[Outputs, Outputs, dict[str, Any]]:
    """All steps in one go; and half of them, a checkpoint, a fresh model, the other half."""
    model, state = fresh(config, dtype)
    straight = [backward(model, step[rank]) for step in gradients]
    model, state = fresh(config, dtype)
    stopped = [backward(model, step[rank]) for step in gradients[:HALF]]
    load = WAYS[way](state, folder)
    for step in gradients[HALF:]:  # what is done behind it must not get into the checkpoint
        backward(model, step[rank])
    model, state = fresh(config, dtype)
    load(state)
    stopped += [backward(model, step[rank]) for step in gradients[HALF:]]
    return straight, stopped, state.metrics()


@pytest.mark.parametrize(
    ("compressor", "feedback", "wire"),
    [
        *((compressor, feedback, None) for compressor, feedback in CHOICES),
        *(("arc_topk", feedback, torch.uint8) for feedback in FEEDBACKS),
        *((compressor, feedback, torch.uint8) for compressor, feedback in LOW_RANK),
    ],
)
def test_training_goes_on_to_the_bit(
    ranks: Ranks, tmp_path: Path, compressor: str, wire: torch.dtype | None, feedback: str
) -> None:
    gradients = random_gradients(LAYOUTS, 2, STEPS, torch.float32)
    config = {"compressor": compressor, "feedback": feedback, "ratio": 0.2, "wire_dtype": wire}
    for straight, stopped, metrics in ranks.run(
        run_with_a_stop, gradients, config, "by_files", tmp_path
    ):
        for a, b in zip(straight, stopped, strict=True):
            assert_same_bits(a, b)
        assert metrics["steps"] == STEPS


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("feedback", ["none", "ef14", "ef21m"])
def test_every_way_of_saving_keeps_everything(
    ranks: Ranks, tmp_path: Path, way: str, feedback: str
) -> None:
    gradients = random_gradients(LAYOUTS, 2, STEPS, torch.float32)
    config = {"feedback": feedback, "ratio": 0.2}
    for straight, stopped, metrics in ranks.run(run_with_a_stop, gradients, config, way, tmp_path):
        for a, b in zip(straight, stopped, strict=True):
            assert_same_bits(a, b)
        dense_starts = 1 if feedback == "ef21m" else 0
        assert metrics["compressed_steps"] == STEPS - dense_starts


@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        (torch.float64, None),
        (torch.bfloat16, None),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
    ],
)
def test_every_type_keeps_its_bits(
    ranks: Ranks, tmp_path: Path, dtype: torch.dtype, state_dtype: torch.dtype | None
) -> None:
    gradients = random_gradients(LAYOUTS, 2, STEPS, dtype)
    for way in ("by_files", "by_rank_0s_dict", "by_dcp"):
        config = {"feedback": "ef21m", "ratio": 0.2, "state_dtype": state_dtype}
        folder = tmp_path / way
        folder.mkdir()
        outputs = ranks.run(run_with_a_stop, gradients, config, way, folder, dtype)
        for straight, stopped, _ in outputs:
            for a, b in zip(straight, stopped, strict=True):
                assert_same_bits(a, b)


def test_with_three_ranks_it_goes_on_as_plain_ddp_does(pools: Pools, tmp_path: Path) -> None:
    """Buckets that are not rebuilt yet are summed in another order: the last bit may differ."""
    gradients = random_gradients(LAYOUTS, 3, STEPS, torch.float32)
    config = {"feedback": "ef14", "ratio": 0.2, "wire_dtype": torch.float32}
    for straight, stopped, _ in pools.of(3).run(
        run_with_a_stop, gradients, config, "by_rank_0s_dict", tmp_path
    ):
        for a, b in zip(straight, stopped, strict=True):
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


# --- before anything has been done ----------------------------------------------------------------


def run_before_the_first_step(
    rank: int, world_size: int, gradients: Gradients, folder: Path
) -> list[bool]:
    unbound = arc_topk.State(ratio=0.2)
    nothing = unbound.state_dict()
    model, state = fresh({"ratio": 0.2})
    before = state.state_dict()
    state.load_state_dict(before)
    equal = [same_state(before, state.state_dict())]
    for step in gradients[:HALF]:
        backward(model, step[rank])
    saved = state.state_dict(gather=False)
    # Loaded before bind(), which then checks it; and seen through until then.
    model = wrap(LAYOUTS, torch.float32)
    unbound = arc_topk.State(ratio=0.2)
    unbound.load_state_dict(saved)
    unbound = pickle.loads(pickle.dumps(unbound))  # as spawned ranks get it
    equal.append(same_state(saved, unbound.state_dict(gather=False)))
    model.register_comm_hook(unbound, arc_topk.arc_topk_hook)
    unbound.bind(model)
    equal.append(same_state(saved, unbound.state_dict(gather=False)))
    # Bound anew before a bucket has taken it over.
    model = DistributedDataParallel(model.module)
    model.register_comm_hook(unbound, arc_topk.arc_topk_hook)
    unbound.bind(model)
    equal.append(same_state(saved, unbound.state_dict(gather=False)))
    equal.append(json.loads(nothing["meta"])["parameters"] == {})
    # And into a State that was used.
    for step in gradients[HALF:]:
        backward(model, step[rank])
    equal.append(not same_state(saved, unbound.state_dict(gather=False)))
    unbound.load_state_dict(saved)
    equal.append(same_state(saved, unbound.state_dict(gather=False)))
    return equal


def test_before_the_first_step_and_before_bind(ranks: Ranks, tmp_path: Path) -> None:
    gradients = random_gradients(LAYOUTS, 2, STEPS, torch.float32)
    for equal in ranks.run(run_before_the_first_step, gradients, tmp_path):
        assert equal == [True] * 7


def run_beside_frozen_integers(rank: int, world_size: int) -> bool:
    """As quantised weights are."""
    module = torch.nn.Linear(24, 40).to(DEVICE)
    integers = torch.zeros(5, dtype=torch.int8, device=DEVICE)
    module.register_parameter("integers", torch.nn.Parameter(integers, requires_grad=False))
    ddp = DistributedDataParallel(module)
    state = arc_topk.register(ddp, ratio=0.2)
    ddp(torch.ones(3, 24, device=DEVICE) * (rank + 1)).square().sum().backward()
    saved = state.state_dict(gather=False)
    state.load_state_dict(saved)
    return same_state(saved, state.state_dict(gather=False))


def test_frozen_integers_have_no_part_in_it(ranks: Ranks) -> None:
    assert ranks.run(run_beside_frozen_integers) == [True, True]


def run_into_other_strides(rank: int, world_size: int) -> bool:
    """Parts are of the parameter's shape, whatever its memory format."""
    like = torch.zeros(12, 6, 3, 3)
    model = wrap([like], torch.float32)
    state = arc_topk.register(model, ratio=0.2, wire_dtype=torch.float32)
    backward(model, random_gradients([like], world_size, 1, torch.float32)[0][rank])
    saved = state.state_dict(gather=False)
    model = wrap([like.to(memory_format=torch.channels_last)], torch.float32)
    state = arc_topk.register(model, ratio=0.2, wire_dtype=torch.float32)
    state.load_state_dict(saved)
    zeros = [torch.zeros_like(like)]
    sent = backward(model, zeros)  # a bucket takes it over, and sends its largest rows
    left = state.state_dict(gather=False)["own"][f"rank_{rank}"]["tensors.0"]["a"]
    was = saved["own"][f"rank_{rank}"]["tensors.0"]["a"]
    return bool(sent[0].any()) and torch.equal(left.where(left != 0, was), was)


def test_another_memory_format_keeps_every_element_in_its_place(ranks: Ranks) -> None:
    assert ranks.run(run_into_other_strides) == [True, True]


# --- another number of ranks ----------------------------------------------------------------------


def save_some_steps(
    rank: int, world_size: int, gradients: Gradients, feedback: str, folder: Path
) -> dict[str, Any]:
    model, state = fresh({"feedback": feedback, "ratio": 0.2})
    for step in gradients:
        backward(model, step[rank])
    state.save(folder)
    return state.state_dict(gather=False)


def go_on_with_others(
    rank: int, world_size: int, feedback: str, folder: Path, whole: dict[str, Any], drop: bool
) -> tuple[dict[str, Any], dict[str, Any], list[str], list[Tensor | None]]:
    model, state = fresh({"feedback": feedback, "ratio": 0.2})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state.load(folder, drop_residuals=drop)
    loaded = state.state_dict(gather=False)
    state.load_state_dict(whole, drop_residuals=drop)
    again = state.state_dict(gather=False)
    zeros = [torch.zeros(t.shape) for t in LAYOUTS]
    backward(model, zeros)
    return loaded, again, [str(w.message) for w in caught], backward(model, zeros)


def owed(states: list[dict[str, Any]], key: str) -> dict[str, Tensor]:
    """The mean over ranks of own parts."""
    owns = [parts for state in states for parts in state["own"].values()]
    return {name: torch.stack([o[name][key] for o in owns]).double().mean(0) for name in owns[0]}


@pytest.mark.parametrize(("old", "new"), [(4, 2), (2, 3), (3, 2)])
@pytest.mark.parametrize("feedback", ["ef14", "ef21", "ef21m"])
def test_another_number_of_ranks_goes_on(
    pools: Pools, tmp_path: Path, feedback: str, old: int, new: int
) -> None:
    gradients = random_gradients(LAYOUTS, old, 3, torch.float32)
    before = pools.of(old).run(save_some_steps, gradients, feedback, tmp_path)
    whole = {**before[0], "own": {k: v for one in before for k, v in one["own"].items()}}
    runs = pools.of(new).run(go_on_with_others, feedback, tmp_path, whole, False)
    after = [run[0] for run in runs]
    for loaded, again, said, output in runs:
        assert same_state(loaded, again)
        assert any(f"saved by {old} ranks, {new} go on" in text for text in said)
        assert_same_bits(output, runs[0][3])
        assert json.loads(loaded["meta"])["steps"] == 3
    if feedback == "ef14":
        was, now = owed(before, "a"), owed(after, "a")
        for name in was:
            torch.testing.assert_close(now[name], was[name], rtol=1e-6, atol=1e-6)
        assert sum(part.abs().sum() for part in now.values()) > 1
        return
    h_i = "a" if feedback == "ef21" else "b"
    for state in after:
        (own,) = state["own"].values()
        for name, parts in own.items():
            assert torch.equal(parts[h_i], before[0]["shared"][name])
            if feedback == "ef21m":
                assert not parts["a"].any()
        for name, part in state["shared"].items():
            assert torch.equal(part, before[0]["shared"][name])


def test_residuals_are_dropped_where_that_is_asked_for(pools: Pools, tmp_path: Path) -> None:
    gradients = random_gradients(LAYOUTS, 2, 3, torch.float32)
    before = pools.of(2).run(save_some_steps, gradients, "ef14", tmp_path)
    for loaded, again, said, _ in pools.of(3).run(
        go_on_with_others, "ef14", tmp_path, before[0], True
    ):
        assert same_state(loaded, again)
        assert any("own parts are dropped" in text for text in said)
        assert not any(p["a"].any() for own in loaded["own"].values() for p in own.values())


# --- what is refused: on every rank, and nothing is changed ---------------------------------------


def refuse(
    rank: int, world_size: int, gradients: Gradients, folder: Path
) -> tuple[dict[str, str], list[str]]:
    """What each kind of wrong checkpoint gives; and those of them that changed anything."""
    model, state = fresh({"ratio": 0.2})
    for step in gradients[:HALF]:
        backward(model, step[rank])
    whole, mine = state.state_dict(), state.state_dict(gather=False)
    state.save(folder / "good")
    for step in gradients[HALF:]:
        backward(model, step[rank])
    later = state.state_dict(gather=False)

    def meta(**changes: Any) -> dict[str, Any]:
        return {**mine, "meta": json.dumps({**json.loads(mine["meta"]), **changes})}

    parameters = json.loads(mine["meta"])["parameters"]
    name = next(iter(parameters))
    rank_0s = [dict(whole, own={"rank_0": whole["own"]["rank_0"]}) if rank == 0 else None]
    dist.broadcast_object_list(rank_0s, src=0)
    other_shape = {f"rank_{rank}": {name: {"a": torch.zeros(3)}}}
    cases: dict[str, Any] = {
        "rank 0's alone": rank_0s[0],
        "another rank's": {**mine, "own": {f"rank_{1 - rank}": mine["own"][f"rank_{rank}"]}},
        "nobody's": {**mine, "own": {}},
        "newer": meta(format=2),
        "other feedback": meta(config={**json.loads(mine["meta"])["config"], "feedback": "ef21"}),
        "more parameters": meta(parameters={**parameters, "new.weight": [2, 2]}),
        "fewer parameters": meta(parameters={k: v for k, v in parameters.items() if k != name}),
        "other shape": meta(parameters={**parameters, name: [3]}),
        "other part": {**mine, "own": other_shape},
        "no meta": {"own": {}, "shared": {}},
        "broken meta": {**mine, "meta": "{"},
        "no dict": [1, 2],
        "different steps": later if rank == 1 else mine,
        "on one rank alone": mine if rank == 0 else meta(format=7),
    }
    said = {case: message_of(lambda c=c: state.load_state_dict(c)) for case, c in cases.items()}
    changed = [case for case in cases if not same_state(later, state.state_dict(gather=False))]

    file = folder / "good" / f"arc_topk-rank-{rank}-of-2.pt"
    good = file.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    files: dict[str, Callable[[], Any]] = {
        "truncated": lambda: file.write_bytes(good[: len(good) // 2]),
        "flipped": lambda: file.write_bytes(flipped),
        "empty": lambda: file.write_bytes(b""),
        "missing": lambda: file.unlink(),
        "swapped": lambda: file.write_bytes(
            (file.with_name(f"arc_topk-rank-{1 - rank}-of-2.pt")).read_bytes()
        ),
    }
    for case, damage in files.items():
        dist.barrier()
        if rank == 1:
            damage()
        dist.barrier()
        said[case] = message_of(lambda: state.load(folder / "good"))
        if not same_state(later, state.state_dict(gather=False)):
            changed.append(case)
        dist.barrier()
        file.write_bytes(good)
    said["nowhere"] = message_of(lambda: state.load(folder / "nowhere"))
    state.load(folder / "good")
    if not same_state(mine, state.state_dict(gather=False)):
        changed.append("the good one is not loaded")
    return said, changed


EXPECTED = {
    "rank 0's alone": "holds own parts of the ranks [0] of 2",
    "another rank's": "would bias the average for good",
    "nobody's": "holds own parts of the ranks [] of 2",
    "newer": "is of format 2; expected 1",
    "other feedback": "of feedback='ef21', this State of feedback='ef14'",
    "more parameters": "has a parameter 'new.weight', the model has none",
    "fewer parameters": "has no parameter 'tensors.0'",
    "other shape": "parameter 'tensors.0' has shape [40, 24], in the checkpoint [3]",
    "other part": "the own a part of parameter 'tensors.0' is a tensor of torch.float32",
    "no meta": "expected 'meta', 'own' and 'shared'",
    "broken meta": "'meta' cannot be read",
    "no dict": "expected 'meta', 'own' and 'shared'",
    "different steps": "the checkpoint differs between ranks",
    "on one rank alone": "is of format 7; expected 1",
    "truncated": "is damaged",
    "flipped": "is damaged",
    "empty": "is damaged",
    "missing": "lacks the files of the ranks [1] of 2",
    "swapped": "files were renamed",
    "nowhere": "there is no checkpoint in",
}


def test_a_wrong_checkpoint_is_an_error_on_every_rank_and_changes_nothing(
    ranks: Ranks, tmp_path: Path
) -> None:
    gradients = random_gradients(LAYOUTS, 2, STEPS, torch.float32)
    for said, changed in ranks.run(refuse, gradients, tmp_path):
        assert changed == []
        assert said.keys() == EXPECTED.keys()
        for case, text in EXPECTED.items():
            assert text in said[case], f"{case}: {said[case]}"


def run_wrong_at_bind(rank: int, world_size: int, gradients: Gradients) -> tuple[str, bool]:
    model, state = fresh({"ratio": 0.2})
    backward(model, gradients[0][rank])
    saved = state.state_dict(gather=False)
    unbound = arc_topk.State(ratio=0.2)
    if rank == 0:
        unbound.load_state_dict(saved)
    model = wrap(LAYOUTS, torch.float32)
    model.register_comm_hook(unbound, arc_topk.arc_topk_hook)
    text = message_of(lambda: unbound.bind(model))
    unbound.load_state_dict(saved)
    unbound.bind(model)
    return text, same_state(saved, unbound.state_dict(gather=False))


def test_one_rank_that_has_loaded_nothing_is_found_at_bind(ranks: Ranks) -> None:
    gradients = random_gradients(LAYOUTS, 2, 1, torch.float32)
    for text, equal in ranks.run(run_wrong_at_bind, gradients):
        assert "the checkpoint differs between ranks" in text and "rank 1: none" in text
        assert equal


def run_with_a_full_disk(rank: int, world_size: int, gradients: Gradients, folder: Path) -> Any:
    model, state = fresh({"ratio": 0.2})
    backward(model, gradients[0][rank])
    state.save(folder)
    saved = state.state_dict(gather=False)
    backward(model, gradients[1][rank])
    blocked = folder / "arc_topk-rank-1-of-2.pt.partial"
    if rank == 1:
        blocked.mkdir()
    text = message_of(lambda: state.save(folder))
    state.load(folder)
    return text, same_state(saved, state.state_dict(gather=False))


def test_a_rank_that_cannot_write_leaves_the_checkpoint_before_whole(
    ranks: Ranks, tmp_path: Path
) -> None:
    gradients = random_gradients(LAYOUTS, 2, 2, torch.float32)
    for text, equal in ranks.run(run_with_a_full_disk, gradients, tmp_path):
        assert "IsADirectoryError" in text
        assert equal


def run_in_the_middle(rank: int, world_size: int, gradients: Gradients) -> list[str]:
    """Asked for from inside a backward pass, with buckets in the air."""
    model = wrap(LAYOUTS, torch.float32, **SMALL_BUCKETS)
    state = arc_topk.State(ratio=0.2)
    said: list[str] = []
    store = dist.group.WORLD.get_group_store()

    def hook(state: arc_topk.State, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        if rank == 1:
            store.wait(["rank 0 has asked"])
        future = arc_topk.arc_topk_hook(state, bucket)
        if rank == 0 and not said:
            said.append(message_of(lambda: state._engine.snapshot()))
            said.append(message_of(lambda: state._engine.restore([], 0, 0)))
            store.set("rank 0 has asked", "")
        return future

    model.register_comm_hook(state, hook)
    state.bind(model)
    backward(model, gradients[0][rank])
    return said


def test_in_the_middle_of_a_step_it_is_refused(ranks: Ranks) -> None:
    gradients = random_gradients(LAYOUTS, 2, 1, torch.float32)
    said, _ = ranks.run(run_in_the_middle, gradients)
    assert len(said) == 2
    assert all("is still being exchanged; expected error feedback" in text for text in said)


def run_with_another_ratio(rank: int, world_size: int, gradients: Gradients) -> tuple[str, str]:
    model, state = fresh({"ratio": 0.2, "wire_dtype": torch.float32})
    backward(model, gradients[0][rank])
    saved = state.state_dict(gather=False)
    model, state = fresh({"ratio": 0.5, "compressor": "rand_k", "seed": 3})
    state.load_state_dict(saved)
    backward(model, gradients[0][rank])
    model, state = fresh({"ratio": 1.0})
    return message_of(lambda: state.load_state_dict(saved)), message_of(
        lambda: state.load_state_dict(saved, drop_residuals=True)
    )


def test_a_residual_goes_with_another_compressor_but_never_gets_lost(ranks: Ranks) -> None:
    gradients = random_gradients(LAYOUTS, 2, 1, torch.float32)
    for lost, dropped in ranks.run(run_with_another_ratio, gradients):
        assert "was compressed and stays dense now" in lost
        assert dropped == ""


# --- other holders --------------------------------------------------------------------------------


def run_without_ddp(rank: int, world_size: int, gradients: Gradients, folder: Path) -> bool:
    like = [torch.empty_like(t, device=DEVICE) for t in LAYOUTS]
    exchange = arc_topk.GradientExchange(like, ratio=0.2, feedback="ef21m")

    def average(step: int) -> list[Tensor]:
        given = [g.to(DEVICE, copy=True) for g in gradients[step][rank] if g is not None]
        return [t.cpu() for t in exchange.all_reduce_(given)]

    for step in range(HALF):
        average(step)
    exchange.save(folder)
    straight = [average(step) for step in range(HALF, STEPS)]
    exchange = arc_topk.GradientExchange(like, ratio=0.2, feedback="ef21m")
    exchange.load(folder)
    resumed = [average(step) for step in range(HALF, STEPS)]
    for a, b in zip(straight, resumed, strict=True):
        assert_same_bits(a, b)
    return len(resumed) == STEPS - HALF


def test_gradient_exchange_is_saved_as_well(ranks: Ranks, tmp_path: Path) -> None:
    gradients = random_gradients(LAYOUTS, 2, STEPS, torch.float32)
    assert ranks.run(run_without_ddp, gradients, tmp_path) == [True, True]


def run_pickled(rank: int, world_size: int, gradients: Gradients) -> list[str]:
    model, state = fresh({"ratio": 0.2})
    backward(model, gradients[0][rank])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pickle.dumps(state)
    return [str(warning.message) for warning in caught]


def test_a_pickled_state_says_what_to_use(ranks: Ranks) -> None:
    gradients = random_gradients(LAYOUTS, 2, 1, torch.float32)
    for texts in ranks.run(run_pickled, gradients):
        assert any("state.state_dict()" in text and "state.save(" in text for text in texts)


def run_unbound(rank: int, world_size: int, gradients: Gradients) -> str:
    model = wrap(LAYOUTS, torch.float32)
    state = arc_topk.State(ratio=0.2)
    model.register_comm_hook(state, arc_topk.arc_topk_hook)
    backward(model, gradients[0][rank])
    return message_of(state.state_dict)


def test_a_used_state_without_names_wants_to_be_bound(ranks: Ranks) -> None:
    gradients = random_gradients(LAYOUTS, 2, 1, torch.float32)
    for text in ranks.run(run_unbound, gradients):
        assert "is not bound, its parameters have no names" in text
