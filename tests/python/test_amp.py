"""Loss scaling: the scale changes nothing, and a step that the scaler skips loses nothing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from device import DEVICE, copy_to
from model import Gradients, random_gradients, wrap
from ranks import Ranks, message_of
from test_engine import CHOICES, COMPRESSORS, FEEDBACKS, LOW_RANK, assert_same_bits
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

import arc_topk
from arc_topk.reference import Oracle

pytestmark = pytest.mark.device

# Odd sizes; the vector stays dense, and the others are a bucket each.
LAYOUTS = [
    torch.empty(23, 17, device="meta"),
    torch.empty(9, device="meta"),
    torch.empty(40, 33, device="meta"),
    torch.empty(12, 5, 3, 3, device="meta").to(memory_format=torch.channels_last),
]
MATRICES = (0, 2, 3)
INTEGERS = "arc_topk on an uint8 wire"
SMALL_BUCKETS = {"bucket_cap_mb": 0.002}


LOW_RANK_INTEGERS = "low_rank on an uint8 wire"


def chosen(compressor: str) -> dict[str, Any]:
    """A compressor by its name, or with bytes on its wire."""
    wire = torch.uint8 if compressor in (INTEGERS, LOW_RANK_INTEGERS) else torch.float32
    return {"compressor": compressor.split()[0], "wire_dtype": wire}


def owing_of(compressor: str) -> Sequence[int]:
    """The tensors that owe something: low rank on bytes has no dense ones."""
    return range(len(LAYOUTS)) if compressor == LOW_RANK_INTEGERS else MATRICES


def spoil(gradient: Tensor) -> None:
    gradient[(0,) * gradient.dim()] = float("inf")


class Applied:
    """An optimizer of what it was given in sum: GradScaler steps it, or skips the step."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.optimizer = torch.optim.SGD(self.parameters, lr=1.0)

    def totals(self) -> list[Tensor]:
        """Of the gradients, unscaled: parameters begin at zero, at a learning rate of 1."""
        return copy_to("cpu", (-p for p in self.parameters))


def train(
    rank: int,
    world_size: int,
    gradients: Gradients,
    dtype: torch.dtype,
    config: dict[str, Any],
    scales: Sequence[float],
    ddp: dict[str, Any],
) -> list[list[Tensor | None]]:
    """Of each step the unscaled result; the scale of step s is ``scales[s]``, 0: no scaler."""
    model = wrap(LAYOUTS, dtype, **ddp)
    scaled = bool(scales[0])
    scaler = GradScaler(DEVICE, init_scale=scales[0] or 1.0, enabled=scaled)
    arc_topk.register(model, **config, grad_scaler=scaler)
    outputs: list[list[Tensor | None]] = []
    for step, scale in zip(gradients, scales, strict=True):
        if scaled and outputs:
            scaler.update(float(scale))
        model.zero_grad(set_to_none=True)
        loss = model(copy_to(DEVICE, step[rank]))
        scaler.scale(loss).backward()
        grads = copy_to("cpu", (p.grad for p in model.module.tensors))
        outputs.append([None if g is None else g.float() / (scale or 1.0) for g in grads])
    return outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compressor", [*COMPRESSORS, INTEGERS])
def test_a_growing_scale_changes_no_bit(ranks: Ranks, compressor: str, dtype: torch.dtype) -> None:
    gradients = random_gradients(LAYOUTS, 2, 5, dtype)
    scales = [0.5, 0.5, 2.0, 4.0, 64.0]
    for feedback, buckets in itertools.product(FEEDBACKS, ({}, SMALL_BUCKETS)):
        config = {**chosen(compressor), "feedback": feedback, "ratio": 0.2}
        plain = ranks.run(train, gradients, dtype, config, [0.0] * 5, buckets)
        scaled = ranks.run(train, gradients, dtype, config, scales, buckets)
        for rank in range(2):
            for a, b in zip(plain[rank], scaled[rank], strict=True):
                assert_same_bits(a, b)


# --- steps that are skipped
# ---------------------------------------------------------------------------


def scaled_run(
    rank: int,
    world_size: int,
    gradients: Gradients,
    config: dict[str, Any],
    overflows: dict[int, tuple[int, int]],
    ddp: dict[str, Any],
    native: bool,
    accumulate: bool,
) -> dict[str, Any]:
    """Runs with a scaler. ``overflows``: in this step that tensor's gradient is inf on that rank.

    ``accumulate``: every other backward is under no_sync, and its gradients part of the next's.
    """
    model = wrap(LAYOUTS, torch.float32, **ddp)
    scaler = GradScaler(DEVICE, init_scale=1024.0, growth_interval=3)
    if native:
        arc_topk.register(model, **config, grad_scaler=scaler)
    else:
        state = arc_topk.State(**config)
        model.register_comm_hook(state, arc_topk.arc_topk_hook)
        state.bind(model, grad_scaler=scaler)
    applied = Applied(list(model.module.tensors))
    skipped, scales, outputs = [], [], []
    for number, step in enumerate(gradients):
        own = [g.clone() for g in step[rank] if g is not None]
        t, bad_rank = overflows.get(number, (0, -1))
        if rank == bad_rank:
            spoil(own[t])
        model.zero_grad(set_to_none=True)
        if accumulate:
            with model.no_sync():
                scaler.scale(model(copy_to(DEVICE, [g / 2 for g in own]))).backward()
            own = [g / 2 for g in own]
        scales.append(scaler.get_scale())
        scaler.scale(model(copy_to(DEVICE, own))).backward()
        outputs.append(copy_to("cpu", (p.grad for p in model.module.tensors)))
        before = applied.totals()
        scaler.step(applied.optimizer)
        scaler.update()
        skipped.append(scaler.get_scale() < scales[-1])
        if skipped[-1]:
            assert_same_bits(before, applied.totals())
    return {
        "skipped": skipped,
        "scales": scales,
        "outputs": outputs,
        "applied": applied.totals(),
    }


FIRST, MIDDLE, LAST = 3, 2, 0  # of DDP's buckets, which begin with the last parameters
SENT = ["arc_topk", "rand_k", "top_k", *dict(LOW_RANK), INTEGERS]
SENT += [LOW_RANK_INTEGERS] if LOW_RANK else []
OVERFLOWS: dict[str, dict[int, tuple[int, int]]] = {
    "in the first step": {0: (MIDDLE, 1)},
    "in the first bucket": {2: (FIRST, 1)},
    "in the middle bucket": {2: (MIDDLE, 0)},
    "in the last bucket": {2: (LAST, 1)},
    "in a dense tensor": {3: (1, 0)},
    "four times": {2: (LAST, 1), 3: (FIRST, 0), 4: (MIDDLE, 1), 5: (LAST, 0)},
}


@pytest.mark.parametrize("where", OVERFLOWS)
@pytest.mark.parametrize("compressor", SENT)
def test_a_skipped_step_loses_nothing(ranks: Ranks, compressor: str, where: str) -> None:
    """EF14: applied + mean residual = the sum of the mean gradients that count.

    Those that do not: of a tensor in whose step its own gradient was infinite, and of dense tensors
    in any skipped step, as without compression. (Low rank on bytes has no dense ones.) At the end
    zeros are sent until nothing is owed.
    """
    overflows = OVERFLOWS[where]
    gradients = random_gradients(LAYOUTS, 2, 8, torch.float32)
    config = {**chosen(compressor), "feedback": "ef14", "ratio": 0.2}
    paying = 60 if compressor == "rand_k" else 25
    owing = owing_of(compressor)
    zeros = [[torch.zeros_like(t, device="cpu") for t in LAYOUTS] for _ in range(2)]
    for native, accumulate in ((True, False), (False, True)):
        runs = ranks.run(
            scaled_run,
            gradients + [zeros] * paying,
            config,
            overflows,
            SMALL_BUCKETS,
            native,
            accumulate,
        )
        for run in runs:
            assert [n for n, skip in enumerate(run["skipped"]) if skip] == sorted(overflows)
        for a, b in zip(runs[0]["outputs"], runs[1]["outputs"], strict=True):
            assert_same_bits(a, b)
        for t in range(len(LAYOUTS)):
            expected = torch.zeros(LAYOUTS[t].shape)
            for number, step in enumerate(gradients):
                counts = number not in overflows or (t in owing and overflows[number][0] != t)
                if counts:
                    expected += (step[0][t] + step[1][t]) / 2
            # Bytes pay it ever more slowly: what the ranks owe cancels, and sets the unit. A step
            # that was lost is of size 1.
            near = 0.1 if compressor == LOW_RANK_INTEGERS else 1e-4
            torch.testing.assert_close(
                runs[0]["applied"][t],
                expected,
                rtol=near,
                atol=near,
                msg=lambda m, t=t: f"{t}: {m}",
            )


@pytest.mark.parametrize(("compressor", "feedback"), CHOICES)
def test_skipped_steps_agree_with_the_oracle(ranks: Ranks, compressor: str, feedback: str) -> None:
    """EF21 and EF21M among them: their estimates hold whether the optimizer steps or not."""
    gradients = random_gradients(LAYOUTS, 2, 9, torch.float32)
    overflows = {2: (LAST, 1), 4: (FIRST, 0), 5: (MIDDLE, 1)}
    config = {**chosen(compressor), "feedback": feedback, "ratio": 0.2}
    runs = ranks.run(scaled_run, gradients, config, overflows, SMALL_BUCKETS, True, False)
    oracle = Oracle(LAYOUTS, torch.float32, 2, **config)
    for number, step in enumerate(gradients):
        scale = runs[0]["scales"][number]
        scaled = [[g * scale for g in own if g is not None] for own in step]
        if number in overflows:
            t, rank = overflows[number]
            spoil(scaled[rank][t])
        results = oracle.step(scaled, loss_scale=scale)
        for t, (out, result) in enumerate(zip(runs[0]["outputs"][number], results, strict=True)):
            if number in overflows and overflows[number][0] == t:
                assert not out.isfinite().all() and not result.output.isfinite().all()
                continue
            torch.testing.assert_close(
                out, result.output, rtol=1e-4, atol=1e-4 * scale, msg=f"step {number}, tensor {t}"
            )


# --- what is refused
# ----------------------------------------------------------------------------------


def step_two_optimizers(rank: int, world_size: int, gradients: Gradients, apart: bool) -> list[str]:
    model = wrap(LAYOUTS, torch.float32)
    scaler = GradScaler(DEVICE, init_scale=16.0)
    arc_topk.register(model, ratio=0.2, grad_scaler=scaler)
    parameters = list(model.module.tensors)
    optimizers = [torch.optim.SGD(half, lr=0.1) for half in (parameters[:2], parameters[2:])]
    texts = []
    for step in gradients:
        model.zero_grad(set_to_none=True)
        scaler.scale(model(copy_to(DEVICE, step[rank]))).backward()
        for optimizer in optimizers:
            texts.append(message_of(lambda o=optimizer: scaler.step(o)))
            if apart:
                scaler.update()
        if not apart:
            scaler.update()
    return texts


@pytest.mark.parametrize("apart", [False, True])
def test_a_second_optimizer_is_refused(ranks: Ranks, apart: bool) -> None:
    gradients = random_gradients(LAYOUTS, 2, 2, torch.float32)
    for texts in ranks.run(step_two_optimizers, gradients, apart):
        assert texts[0] == ""
        assert "second optimizer, a SGD" in texts[1] and "bind() again" in texts[1]


def register_with(rank: int, world_size: int, scalers: list[Any]) -> str:
    given = scalers[rank]
    scaler = GradScaler(DEVICE, init_scale=given) if isinstance(given, float) else given
    return message_of(lambda: arc_topk.register(wrap(LAYOUTS, torch.float32), grad_scaler=scaler))


def test_scalers_that_differ(ranks: Ranks) -> None:
    for text in ranks.run(register_with, [2.0, 4.0]):
        assert "grad_scaler differs" in text and "rank 0: scale 2, rank 1: scale 4" in text
    for text in ranks.run(register_with, [2.0, None]):
        assert "rank 0: scale 2, rank 1: None" in text
    zero, one = ranks.run(register_with, [2.0, "amp"])
    assert one == "TypeError: grad_scaler is a str; expected a torch.amp.GradScaler or None"
    assert "rank 1" in zero and "grad_scaler is a str" in zero
    assert ranks.run(register_with, [2.0, 2.0]) == ["", ""]


# --- without a scaler that the engine knows
# -----------------------------------------------------------


def rescaled_run(
    rank: int, world_size: int, gradients: Gradients, config: dict[str, Any], factors: list[float]
) -> list[list[Tensor | None]]:
    """Of each step the unscaled result, where gradients grow by ``factors[s]`` before step s."""
    model = wrap(LAYOUTS, torch.float32, **SMALL_BUCKETS)
    state = arc_topk.register(model, **config)
    scale = 1.0
    outputs = []
    for step, factor in zip(gradients, factors, strict=True):
        if factor != 1.0:
            state.rescale_(factor)
            scale *= factor
        model.zero_grad(set_to_none=True)
        (model(copy_to(DEVICE, step[rank])) * scale).backward()
        outputs.append([g / scale for g in copy_to("cpu", (p.grad for p in model.module.tensors))])
    return outputs


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_rescale_follows_the_loss(ranks: Ranks, feedback: str) -> None:
    gradients = random_gradients(LAYOUTS, 2, 5, torch.float32)
    config = {"feedback": feedback, "ratio": 0.2}
    plain = ranks.run(rescaled_run, gradients, config, [1.0] * 5)
    scaled = ranks.run(rescaled_run, gradients, config, [1.0, 4.0, 1.0, 0.5, 0.125])
    for rank in range(2):
        for a, b in zip(plain[rank], scaled[rank], strict=True):
            assert_same_bits(a, b)


def rescale_wrongly(rank: int, world_size: int, gradients: Gradients) -> list[str]:
    texts = [message_of(lambda: arc_topk.State(ratio=0.2).rescale_(2.0))]
    model = wrap(LAYOUTS, torch.float32)
    state = arc_topk.register(model, ratio=0.2)
    texts.append(message_of(lambda: state.rescale_(2.0 + rank)))
    texts.append(message_of(lambda: state.rescale_(0.0 if rank == 0 else 2.0)))
    scaled = wrap(LAYOUTS, torch.float32)
    state = arc_topk.register(scaled, ratio=0.2, grad_scaler=GradScaler(DEVICE))
    texts.append(message_of(lambda: state.rescale_(2.0)))
    return texts


def test_what_rescale_refuses(ranks: Ranks) -> None:
    zero, one = ranks.run(rescale_wrongly, random_gradients(LAYOUTS, 2, 1, torch.float32))
    for texts in (zero, one):
        assert "bind(ddp) or run a step first" in texts[0]
        assert "factor differs between ranks (rank 0: 2.0, rank 1: 3.0)" in texts[1]
        assert "bound with grad_scaler" in texts[3]
    assert zero[2] == "ValueError: factor is 0.0; expected a positive finite number"
    assert "rank 0" in one[2] and "factor is 0.0" in one[2]


# --- checkpoints ----------------------------------------------------------------------------------


def saved_behind_a_skip(
    rank: int, world_size: int, gradients: Gradients, compressor: str
) -> list[list[Tensor]]:
    """Owed behind a skipped step, by a checkpoint and by the step that takes it back: both e_i."""
    model = wrap(LAYOUTS, torch.float32, **SMALL_BUCKETS)
    applied = Applied(model.module.tensors)
    scaler = GradScaler(DEVICE, init_scale=64.0)
    config = {**chosen(compressor), "ratio": 0.2}
    state = arc_topk.register(model, grad_scaler=scaler, **config)
    for number, step in enumerate(gradients):
        given = copy_to("cpu", step[rank])
        if number == len(gradients) - 1 and rank == 1:
            spoil(given[0])
        model.zero_grad(set_to_none=True)
        scaler.scale(model(copy_to(DEVICE, given))).backward()
        scaler.step(applied.optimizer)
        scaler.update()
    owed = []
    for part in (state.state_dict(gather=False), state.state_dict(gather=False)):
        (own,) = part["own"].values()
        owed.append([parts["a"] for parts in own.values()])
    # And before a bucket has come for what was loaded.
    state.load_state_dict(part)
    plain = wrap(LAYOUTS, torch.float32)
    other = arc_topk.register(plain, **config)
    other.load_state_dict(part)
    other.rescale_(4.0)
    (own,) = other.state_dict(gather=False)["own"].values()
    owed.append([parts["a"] / 4 for parts in own.values()])
    return owed


@pytest.mark.parametrize("compressor", SENT)
def test_a_checkpoint_behind_a_skipped_step_holds_what_it_gave_back(
    ranks: Ranks, compressor: str
) -> None:
    """In the tensors that were finite the mean of the e_i is that of g_i + e_i again: the sum."""
    gradients = random_gradients(LAYOUTS, 2, 1, torch.float32)
    zero, one = ranks.run(saved_behind_a_skip, gradients, compressor)
    for owed in (zero, one):
        assert_same_bits(owed[0], owed[1])
        assert_same_bits(owed[0], owed[2])
    for t, a, b in list(zip(owing_of(compressor), zero[0], one[0], strict=True))[1:]:
        mean = (gradients[0][0][t] + gradients[0][1][t]) / 2
        torch.testing.assert_close((a + b) / 2, mean, rtol=1e-5, atol=1e-5)
