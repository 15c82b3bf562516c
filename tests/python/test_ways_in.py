"""What people pass to register(), bind() and GradientExchange, and when they call them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device import DEVICE, copy_to
from model import Gradients, Pick, backward, random_gradients, wrap
from ranks import TIMEOUT, Pools, Ranks, message_of, temporary
from test_engine import LAYOUTS, assert_same_bits, run_native
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import arc_topk
from arc_topk.checks import unservable_parameter

pytestmark = pytest.mark.device

STEPS = 3
CONFIG = {"ratio": 0.2}


def gradients_of(world_size: int = 2, steps: int = STEPS) -> Gradients:
    return random_gradients(LAYOUTS, world_size, steps, torch.float32)


class Wrapper(nn.Module):
    """As Lightning Fabric's: the DDP and the model within it are both submodules."""

    def __init__(self, ddp: DistributedDataParallel) -> None:
        super().__init__()
        self._forward_module = ddp
        self._original_module = ddp.module


def compiled(ddp: DistributedDataParallel) -> nn.Module:
    module = torch.compile(ddp, backend="eager")
    assert isinstance(module, nn.Module)
    return module


def run_wrapped(
    rank: int, world_size: int, wrapping: Callable[[DistributedDataParallel], nn.Module]
) -> list[list[Tensor | None]]:
    ddp = wrap(LAYOUTS, torch.float32)
    arc_topk.register(wrapping(ddp), **CONFIG)
    return [backward(ddp, g[rank]) for g in gradients_of(world_size)]


def bind_wrapped(
    rank: int, world_size: int, wrapping: Callable[[DistributedDataParallel], nn.Module]
) -> list[list[Tensor | None]]:
    ddp = wrap(LAYOUTS, torch.float32)
    state = arc_topk.State(**CONFIG)
    ddp.register_comm_hook(state, arc_topk.arc_topk_hook)
    state.bind(wrapping(ddp))
    return [backward(ddp, g[rank]) for g in gradients_of(world_size)]


@pytest.mark.parametrize("way", [run_wrapped, bind_wrapped])
@pytest.mark.parametrize("wrapping", [compiled, Wrapper, nn.Sequential])
def test_what_wraps_a_ddp_is_unwrapped(ranks: Ranks, way: Any, wrapping: Any) -> None:
    expected = ranks.run(run_native, LAYOUTS, gradients_of(), torch.float32, CONFIG, {})[0]
    for outputs in ranks.run(way, wrapping):
        for got, want in zip(outputs, expected.outputs, strict=True):
            assert_same_bits(got, want)


def run_compiled_training(rank: int, world_size: int) -> tuple[Tensor, dict[str, Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).to(DEVICE)
    ddp = compiled(DistributedDataParallel(model))
    state = arc_topk.register(ddp, ratio=0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(4):
        optimizer.zero_grad()
        ddp(torch.randn(8, 16, generator=generator).to(DEVICE)).square().mean().backward()
        optimizer.step()
    return model[0].weight.detach().cpu(), state.metrics()


def test_a_compiled_ddp_trains(ranks: Ranks) -> None:
    (zero, metrics), (one, _) = ranks.run(run_compiled_training)
    assert torch.equal(zero, one) and metrics["steps"] == 4


def pass_wrong_things(rank: int, world_size: int) -> list[str]:
    ddp = wrap(LAYOUTS, torch.float32)
    two = nn.ModuleDict({"a": ddp, "b": wrap(LAYOUTS, torch.float32)})
    wrong: list[Any] = [nn.Linear(2, 2), two, "ddp", None]
    return [message_of(lambda w=w: arc_topk.register(w)) for w in wrong]


def test_what_holds_no_ddp_is_told_what_to_pass(ranks: Ranks) -> None:
    for plain, two, text, none in ranks.run(pass_wrong_things):
        assert "Linear with no DDP instance" in plain and "DistributedDataParallel(model)" in plain
        assert "2 DDP instances in it ('a', 'b')" in two
        assert "is a str with no DDP" in text and "is a NoneType with no DDP" in none


def describe(rank: int, world_size: int) -> tuple[str, str, str]:
    ddp = wrap(LAYOUTS, torch.float32)
    state = arc_topk.register(ddp, **CONFIG)
    backward(ddp, gradients_of(world_size)[0][rank])
    exchange = arc_topk.GradientExchange([torch.zeros(3, 3, device=DEVICE)])
    return repr(state), str(state.plan()), str(exchange.plan())


def test_a_state_and_its_plan_say_what_they_travel_over(ranks: Ranks) -> None:
    over = "gloo" if DEVICE == "cpu" else "gloo, staged through the host"
    for text, plan, exchange in ranks.run(describe):
        assert text == (
            f"<arc_topk.State: arc_topk, ef14, ratio=0.2; 8 parameters, 2 ranks over {over}, "
            "1 steps>"
        )
        assert plan.endswith(f"\npayloads travel over {over}")
        assert exchange.endswith(f"\npayloads travel over {over}")


def test_a_module_on_two_gpus_is_refused() -> None:
    ddp = SimpleNamespace(module=nn.Module())
    named = [
        (
            name,
            SimpleNamespace(
                device=torch.device(device),
                dtype=torch.float32,
                layout=torch.strided,
                is_complex=lambda: False,
            ),
        )
        for name, device in (("a", "cpu"), ("b", "cuda:1"))
    ]
    error = unservable_parameter(ddp, named)  # type: ignore[arg-type]
    assert str(error) == (
        "parameter 'b' is on device 'cuda:1', the first on 'cpu'; expected all on one device"
    )


# --- when -----------------------------------------------------------------------------------------


def run_after_some_steps(rank: int, world_size: int) -> list[list[Tensor | None]]:
    ddp = wrap(LAYOUTS, torch.float32)
    gradients = gradients_of(world_size, 2 + STEPS)
    plain = [backward(ddp, g[rank]) for g in gradients[:2]]
    arc_topk.register(ddp, **CONFIG)
    return plain + [backward(ddp, g[rank]) for g in gradients[2:]]


def test_registered_after_some_steps_it_begins_there(ranks: Ranks) -> None:
    gradients = gradients_of(2, 2 + STEPS)
    expected = ranks.run(run_native, LAYOUTS, gradients[2:], torch.float32, CONFIG, {})[0].outputs
    for outputs in ranks.run(run_after_some_steps):
        for mean, step in zip(outputs[:2], gradients[:2], strict=True):
            for got, a, b in zip(mean, *step, strict=True):
                torch.testing.assert_close(got, (a + b) / 2)  # type: ignore[operator]
        for got, want in zip(outputs[2:], expected, strict=True):
            assert_same_bits(got, want)


def run_backward_twice(
    rank: int, world_size: int, forwards: int
) -> tuple[list[Tensor], list[Tensor], int]:
    """``.grad`` after two backwards, and what it should be.

    Behind a forward of its own, DDP hands over the first average with this rank's gradient added;
    through the same graph a second time it synchronises nothing.
    """
    ddp = wrap(LAYOUTS, torch.float32)
    state = arc_topk.register(ddp, **CONFIG)
    gradients = gradients_of(world_size, 1)[0][rank]
    loss = ddp(copy_to(DEVICE, gradients))
    loss.backward(retain_graph=True)
    if forwards == 2:
        loss = ddp(copy_to(DEVICE, gradients))
    loss.backward()
    other = wrap(LAYOUTS, torch.float32)
    arc_topk.register(other, **CONFIG)
    first = backward(other, gradients)
    sums = [a + b for a, b in zip(first, gradients, strict=True)]  # type: ignore[operator]
    expected = sums if forwards == 1 else backward(other, sums)
    got = copy_to("cpu", [p.grad for p in ddp.module.tensors])
    return got, expected, state.metrics()["steps"]


def run_plain_twice(rank: int, world_size: int, forwards: int) -> tuple[list[Tensor], list[Tensor]]:
    both = []
    for config in (None, {"compressor": "dense"}):
        ddp = wrap(LAYOUTS, torch.float32)
        if config is not None:
            arc_topk.register(ddp, **config)
        gradients = copy_to(DEVICE, gradients_of(world_size, 1)[0][rank])
        loss = ddp(gradients)
        loss.backward(retain_graph=True)
        (ddp(gradients) if forwards == 2 else loss).backward()
        both.append(copy_to("cpu", [p.grad for p in ddp.module.tensors]))
    plain, dense = both
    return plain, dense


@pytest.mark.parametrize("forwards", [1, 2])
def test_backward_twice_without_compression_is_plain_ddps(ranks: Ranks, forwards: int) -> None:
    for plain, dense in ranks.run(run_plain_twice, forwards):
        assert all(map(torch.equal, plain, dense))


@pytest.mark.parametrize("forwards", [1, 2])
def test_backward_twice_is_what_it_is_in_plain_ddp(ranks: Ranks, forwards: int) -> None:
    for got, expected, steps in ranks.run(run_backward_twice, forwards):
        assert steps == forwards
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def register_on_a_copy(rank: int, world_size: int) -> tuple[str, list[list[Tensor | None]]]:
    ddp = wrap(LAYOUTS, torch.float32)
    arc_topk.register(ddp, **CONFIG)
    backward(ddp, gradients_of(world_size)[0][rank])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the copy has no error feedback
        other = copy.deepcopy(ddp)
    arc_topk.register(other, **CONFIG)
    return message_of(lambda: arc_topk.register(other)), [
        backward(other, g[rank]) for g in gradients_of(world_size)
    ]


def test_a_deep_copy_has_no_hook_and_takes_one(ranks: Ranks) -> None:
    expected = ranks.run(run_native, LAYOUTS, gradients_of(), torch.float32, CONFIG, {})[0]
    for text, outputs in ranks.run(register_on_a_copy):
        assert "hook already" in text
        for got, want in zip(outputs, expected.outputs, strict=True):
            assert_same_bits(got, want)


# --- whose ranks ----------------------------------------------------------------------------------


def leave_unbound(rank: int, world_size: int) -> tuple[str, list[Tensor | None]]:
    """Each rank averages with itself; the first State does not know it."""
    for members in range(world_size):
        group = dist.new_group([members])
        mine = group if members == rank else None
        if mine is not None:
            ddp = wrap(LAYOUTS, torch.float32, process_group=mine)
            state = arc_topk.State(compressor="dense")
            ddp.register_comm_hook(state, arc_topk.arc_topk_hook)
            gradients = gradients_of(world_size)[0][rank]
            text = message_of(lambda ddp=ddp, g=gradients: backward(ddp, g))
            again = wrap(LAYOUTS, torch.float32, process_group=mine)
            told = arc_topk.State(compressor="dense", process_group=mine)
            again.register_comm_hook(told, arc_topk.arc_topk_hook)
            outputs = backward(again, gradients)
    return text, outputs


def test_beside_other_groups_an_unbound_state_wants_to_be_told() -> None:
    with temporary(2, TIMEOUT) as pool:
        results = pool.run(leave_unbound)
    for rank, (text, outputs) in enumerate(results):
        assert "not bound" in text and "process_group=" in text
        for got, want in zip(outputs, gradients_of()[0][rank], strict=True):
            assert torch.equal(got, want)  # type: ignore[arg-type]


def in_a_group_of_its_own(rank: int, world_size: int) -> tuple[str, str]:
    """Only rank 0 knows of another group; then of none, though torch remembers it on rank 1."""
    group = dist.new_group([0], use_local_synchronization=True) if rank == 0 else None
    ddp = wrap(LAYOUTS, torch.float32)
    ddp.register_comm_hook(arc_topk.State(), arc_topk.arc_topk_hook)
    gradients = gradients_of(world_size)[0][rank]
    alone = message_of(lambda: backward(ddp, gradients))
    if group is not None:
        dist.destroy_process_group(group)
    both = dist.new_group([0])
    if rank == 0:
        dist.destroy_process_group(both)
    ddp = wrap(LAYOUTS, torch.float32)
    ddp.register_comm_hook(arc_topk.State(), arc_topk.arc_topk_hook)
    return alone, message_of(lambda: backward(ddp, gradients))


def test_who_wants_to_be_told_tells_the_others() -> None:
    with temporary(2, TIMEOUT) as pool:
        (zero, again), (one, once_more) = pool.run(in_a_group_of_its_own)
    assert "not bound" in zero and "failed on rank 0" in one and "not bound" in one
    assert again == "" and once_more == ""


def bind_elsewhere(rank: int, world_size: int) -> str:
    mine = [dist.new_group([member]) for member in range(world_size)][rank]
    state = arc_topk.State(process_group=mine)
    return message_of(lambda: state.bind(wrap(LAYOUTS, torch.float32)))


def test_a_group_that_was_given_must_be_ddps() -> None:
    with temporary(2, TIMEOUT) as pool:
        for rank, text in enumerate(pool.run(bind_elsewhere)):
            assert f"process_group of the ranks ({rank},), ddp's has (0, 1)" in text


# --- settings of the optimizer --------------------------------------------------------------------


def register_beside(
    rank: int, world_size: int, fields: dict[str, Any], name: str, settings: dict[str, Any]
) -> list[str]:
    ddp = wrap(LAYOUTS, torch.float32)
    optimizer = getattr(torch.optim, name)(ddp.parameters(), lr=0.1, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        arc_topk.register(ddp, optimizer=optimizer, **fields)
    return [f"{w.filename}: {w.message}" for w in caught if "arc_topk" in str(w.message)]


@pytest.mark.parametrize(
    ("fields", "name", "settings", "words"),
    [
        ({"feedback": "ef21m"}, "AdamW", {}, "set feedback='ef14'"),
        ({"feedback": "ef21"}, "RMSprop", {}, "feedback='ef21'"),
        ({"feedback": "ef21m"}, "SGD", {"momentum": 0.9}, ""),
        ({"feedback": "ef21m", "compressor": "top_k"}, "AdamW", {}, ""),
        ({}, "Adam", {}, "set beta1 to 0.5"),
        ({}, "AdamW", {"betas": (0.5, 0.99)}, ""),
        ({"compressor": "low_rank"}, "AdamW", {}, ""),
        ({}, "SGD", {}, ""),
    ],
)
def test_settings_that_trials_found_harmful_are_told_once(
    ranks: Ranks, fields: dict[str, Any], name: str, settings: dict[str, Any], words: str
) -> None:
    for texts in ranks.run(register_beside, fields, name, settings):
        assert len(texts) == bool(words), texts
        if words:
            assert words in texts[0] and "docs/optimizers.md" in texts[0]
            assert texts[0].startswith(__file__)  # the line that registers


# --- several backwards an optimizer step ----------------------------------------------------------


def accumulate(
    rank: int, world_size: int, feedback: str, backwards: int, no_sync: bool
) -> list[str]:
    ddp = wrap(LAYOUTS, torch.float32)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    arc_topk.register(ddp, feedback=feedback, optimizer=optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for gradients in gradients_of(world_size):
            for i in range(backwards):
                ddp.require_backward_grad_sync = not no_sync or i == backwards - 1
                ddp(copy_to(DEVICE, gradients[rank])).backward()
            optimizer.step()
            optimizer.zero_grad()
    return [str(w.message) for w in caught if "arc_topk" in str(w.message)]


@pytest.mark.parametrize(
    ("feedback", "backwards", "no_sync", "warned"),
    [
        ("ef21", 2, False, 1),
        ("ef21m", 3, False, 1),
        ("ef21", 2, True, 0),
        ("ef21", 1, False, 0),
        ("ef14", 2, False, 0),
    ],
)
def test_what_ef21_cannot_add_up_is_warned_about_once(
    ranks: Ranks, feedback: str, backwards: int, no_sync: bool, warned: int
) -> None:
    for texts in ranks.run(accumulate, feedback, backwards, no_sync):
        assert len(texts) == warned
        if warned:
            assert f"{backwards} synchronised backward passes" in texts[0]
            assert f"feedback='{feedback}'" in texts[0] and "no_sync" in texts[0]


def use_one_optimizer_for_long(rank: int, world_size: int) -> list[str]:
    """Wrapped again and again, with other hooks behind ours: none may disturb a step."""
    ddp = wrap(LAYOUTS, torch.float32)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    gradients = copy_to(DEVICE, gradients_of(world_size)[0][rank])
    texts = []
    for _ in range(3):
        ddp = DistributedDataParallel(ddp.module)
        arc_topk.register(ddp, feedback="ef21", optimizer=optimizer)
        optimizer.register_step_post_hook(lambda *_: None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for backwards in (1, 2, 2):
                for _ in range(backwards):
                    ddp(gradients).backward()
                optimizer.step()
        texts.append(" ".join(str(w.message) for w in caught if "arc_topk" in str(w.message)))
    return texts


def test_watching_an_optimizer_never_disturbs_its_steps(ranks: Ranks) -> None:
    for texts in ranks.run(use_one_optimizer_for_long):
        assert all(text.count("2 synchronised") == 1 for text in texts)


# --- GradientExchange -----------------------------------------------------------------------------


def refuse_on_one(
    rank: int, world_size: int, refused_on: int | None, compressor: str, feedback: str
) -> tuple[list[str], list[list[Tensor]]]:
    """Step 2 is refused by one rank, or left out by all."""
    tensors = [torch.zeros(8, 6), torch.zeros(5, dtype=torch.float64), torch.zeros(3)]
    exchange = arc_topk.GradientExchange(
        copy_to(DEVICE, tensors), compressor=compressor, feedback=feedback, ratio=0.5
    )
    generator = torch.Generator().manual_seed(rank)
    texts, outputs = [], []
    for step in range(5):
        mine: list[Any] = [
            torch.randn(t.shape, generator=generator, dtype=t.dtype).to(DEVICE) for t in tensors
        ]
        if step == 2 and refused_on is None:
            continue
        given = list(mine)
        if step == 2 and rank == refused_on:
            given[2] = None
        before = [t.clone() for t in mine]
        texts.append(message_of(lambda given=given: exchange.all_reduce_(given)))
        if texts[-1]:
            assert all(map(torch.equal, before, mine))
        else:
            outputs.append(copy_to("cpu", mine))
    return texts, outputs


@pytest.mark.parametrize("compressor", ["arc_topk", "rand_k", "top_k", "dense"])
@pytest.mark.parametrize("feedback", ["none", "ef14", "ef21", "ef21m"])
def test_what_one_rank_refuses_is_refused_on_every_rank(
    pools: Pools, compressor: str, feedback: str
) -> None:
    results = pools.of(3).run(refuse_on_one, 1, compressor, feedback)
    for rank, (texts, outputs) in enumerate(results):
        assert [bool(text) for text in texts] == [False, False, True, False, False]
        assert "tensors[2] is None" in texts[2] and "none_as_zero" in texts[2]
        assert ("failed on rank 1" in texts[2]) == (rank != 1)
        for mine, first in zip(outputs, results[0][1], strict=True):
            for a, b in zip(mine, first, strict=True):
                assert torch.equal(a, b) and a.isfinite().all()
    if compressor in ("top_k", "dense"):  # the others draw by the step's number
        without = pools.of(3).run(refuse_on_one, None, compressor, feedback)[0][1]
        for mine, first in zip(results[0][1], without, strict=True):
            for a, b in zip(mine, first, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def refuse_everything(rank: int, world_size: int) -> list[str]:
    def given(**changed: Any) -> list[Any]:
        right: dict[str, Any] = {"a": torch.ones(3, 3, device=DEVICE), "b": torch.ones(4)}
        right["b"] = right["b"].to(DEVICE)
        return list({**right, **(changed if rank == 0 else {})}.values())

    def broken() -> Any:
        yield torch.ones(3, 3, device=DEVICE)
        if rank == 0:
            raise RuntimeError("the user's own")
        yield torch.ones(4, device=DEVICE)

    exchange = arc_topk.GradientExchange(given())
    wrong = [
        given(b=torch.ones(5, device=DEVICE)),
        given(b=torch.ones(4, device=DEVICE, dtype=torch.float64)),
        given(b=torch.ones(4, device="meta")),
        given(b=torch.ones(4).to_sparse()),
        given(b=[1.0] * 4),
        given(c=torch.ones(4, device=DEVICE)),
        given(b=torch.ones((), device=DEVICE).expand(4)),
        broken(),
    ]
    texts = [message_of(lambda w=w: exchange.all_reduce_(w)) for w in wrong]
    assert message_of(lambda: exchange.all_reduce_(given())) == ""
    return texts


def test_no_refusal_leaves_the_others_waiting(ranks: Ranks) -> None:
    zero, one = ranks.run(refuse_everything)
    words = [
        "(5,)",
        "float64",
        "device 'meta'",
        "sparse",
        "a list",
        "3 tensors",
        "expanded",
        "the user's own",
    ]
    for word, mine, theirs in zip(words, zero, one, strict=True):
        assert word in mine and word in theirs and "failed on rank 0" in theirs


def natural_nan(rank: int, world_size: int) -> list[Tensor]:
    exchange = arc_topk.GradientExchange([torch.zeros(4, device=DEVICE)])
    value = torch.full((4,), float("nan") if rank == 1 else 1.0, device=DEVICE)
    return copy_to("cpu", exchange.all_reduce_([value]))


def test_a_gradient_of_nan_is_handed_out_as_such(ranks: Ranks) -> None:
    for (value,) in ranks.run(natural_nan):
        assert value.isnan().all()


def use_some(rank: int, world_size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Iterators; gradients that only one rank has; None gets the mean as well."""
    model = Pick([torch.zeros_like(t, device=DEVICE) for t in LAYOUTS])
    exchange = arc_topk.GradientExchange(model.parameters(), compressor="dense")
    gradients = gradients_of(world_size, 1)[0]
    for i, p in enumerate(model.tensors):
        p.grad = None if i % 2 == rank else gradients[rank][i].clone().to(DEVICE)  # type: ignore[union-attr]
    averages = exchange.all_reduce_((p.grad for p in model.tensors), none_as_zero=True)
    assert all(p.grad is None or p.grad is a for p, a in zip(model.tensors, averages, strict=True))
    expected = [gradients[1 - i % 2][i] / 2 for i in range(len(LAYOUTS))]  # type: ignore[operator]
    return copy_to("cpu", averages), expected


def test_none_counts_as_zero_where_that_is_asked_for(ranks: Ranks) -> None:
    for averages, expected in ranks.run(use_some):
        for got, want, layout in zip(averages, expected, LAYOUTS, strict=True):
            assert torch.equal(got, want) and got.stride() == layout.stride()


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(3, dtype=torch.int64), "int64"),
        (torch.zeros(3, dtype=torch.complex64), "view_as_real"),
        (torch.zeros(3).to_sparse(), "sparse"),
        (None, "is a NoneType"),
    ],
)
def test_what_cannot_be_served_is_refused_when_it_is_made(
    ranks: Ranks, tensor: Any, words: str
) -> None:
    for rank, text in enumerate(ranks.run(make_with, tensor)):
        assert words in text and "tensors[1]" in text
        assert ("failed on rank 0" in text) == (rank != 0)


def make_with(rank: int, world_size: int, tensor: Any) -> str:
    second = tensor if rank == 0 else torch.zeros(3)
    return message_of(lambda: arc_topk.GradientExchange([torch.zeros(3), second]))


def announce_other_strides(rank: int, world_size: int) -> str:
    layout = torch.channels_last if rank == 1 else torch.contiguous_format
    return message_of(
        lambda: arc_topk.GradientExchange(
            [torch.zeros(2, 3, 2, 2, device=DEVICE).to(memory_format=layout)]
        )
    )


def test_strides_must_be_announced_alike(ranks: Ranks) -> None:
    for text in ranks.run(announce_other_strides):
        assert "the strides of tensor 0" in text and "(12, 4, 2, 1)" in text


def with_another_frozen_one(rank: int, world_size: int) -> str:
    ddp = wrap(LAYOUTS, torch.float32)
    if rank == 0:
        ddp.module.register_parameter("average", nn.Parameter(torch.zeros(2), requires_grad=False))
    return message_of(lambda: arc_topk.register(ddp, compressor="rand_k"))


def test_frozen_parameters_are_compared_too(ranks: Ranks) -> None:
    """Their places count: Rand-K's draw goes by them."""
    for text in ranks.run(with_another_frozen_one):
        assert "the number of tensors differs" in text


def register_beside_a_built_in_hook(rank: int, world_size: int) -> str:
    ddp = wrap(LAYOUTS, torch.float32)
    ddp._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    return message_of(lambda: arc_topk.register(ddp))


def test_a_built_in_hook_is_seen(ranks: Ranks) -> None:
    for text in ranks.run(register_beside_a_built_in_hook):
        assert "communication hook already" in text and "FP16_COMPRESS" in text


def other_strides(rank: int, world_size: int) -> list[list[Tensor]]:
    """The same values, however they lie: announced one way, given in every other."""
    announced = torch.zeros(6, 4, 3, 3, device=DEVICE).to(memory_format=torch.channels_last)
    results = []
    for lie in (
        lambda t: t,
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
        lambda t: torch.stack([t, t], dim=-1)[..., 0],
    ):
        exchange = arc_topk.GradientExchange([announced], ratio=0.25)
        generator = torch.Generator().manual_seed(rank)
        steps = [lie(torch.randn(6, 4, 3, 3, generator=generator).to(DEVICE)) for _ in range(3)]
        for value in steps:
            exchange.all_reduce_([value])
        results.append([value.cpu().contiguous() for value in steps])
    return results


def test_strides_may_be_others_than_announced(ranks: Ranks) -> None:
    for first, *others in ranks.run(other_strides):
        assert not torch.equal(first[0], torch.zeros(6, 4, 3, 3))
        for other in others:
            assert all(map(torch.equal, first, other))
