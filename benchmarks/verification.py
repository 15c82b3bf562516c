"""Whether a hook computes what its equations say, before it is timed."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from contestants import Contestant, contestants_of, make_contestant
from torch import Tensor
from workload import Shapes, Workload, split

from arc_topk.plan import make_plan
from arc_topk.reference import Oracle

# Small enough for the oracle: matrices, a vector, a convolution.
SMALL: Shapes = [(48, 24), (24,), (30, 40), (8, 6, 3, 3)]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 4e-2, torch.float16: 1e-2}


class WrongResultError(RuntimeError):
    """A hook's averages are not what its equations say."""


def verify_against_oracle(contestant: Contestant, workload: Workload, steps: int = 4) -> None:
    """Compares a fresh hook of arc_topk with the package's plain torch oracle, on a small workload.

    Raises:
        WrongResultError: they differ; names contestant, step and tensor.
    """
    config = contestant.state.config
    parameters = [p for bucket in workload.buckets for p in bucket.parameters()]
    dtype, ranks = parameters[0].dtype, dist.get_world_size()
    oracle = Oracle(
        parameters,
        dtype,
        ranks,
        compressor=config.compressor,
        feedback=config.feedback,
        ratio=config.ratio,
        rank=config.rank,
        wire_dtype=config.wire,
        sketch_dtype=config.sketch,
    )
    # Sums of a narrow type depend on their order; those of integers do not.
    rough = config.wire if config.wire in TOLERANCE else dtype
    gradients = [workload.gradients(rank) for rank in range(ranks)]
    for step in range(steps):
        workload.refill(step)
        outputs = split_all(workload, contestant.exchange(workload.buckets, in_flight=False))
        now = [split_all(workload, own[step % len(own)]) for own in gradients]
        for t, (output, result) in enumerate(zip(outputs, oracle.step(now), strict=True)):
            place = f"step {step}, tensor {t} of shape {tuple(output.shape)}"
            size = sum((own[t].double().abs() for own in now), result.output.double().abs())
            require_close(contestant, place, output, result.output, size, rough)


def verify_kept_rows(
    contestant: Contestant, workload: Workload, feedback: str, ratio: float
) -> None:
    """Checks a fresh hook's first compressed step, at any size: K rows, and the right values.

    With h the result before (EF21, EF21M: the mean gradient; else 0), each row is either still h or
    h + eta (mean g - h), where eta is 1 but for EF21M; K rows are the latter.

    Raises:
        WrongResultError: a result is anything else; names contestant and tensor.
    """
    has_estimate = feedback in ("ef21", "ef21m")
    eta = 0.1 if feedback == "ef21m" else 1.0
    before = [torch.zeros_like(b.buffer()) for b in workload.buckets]
    if has_estimate:
        workload.refill(0)
        before = [t.clone() for t in contestant.exchange(workload.buckets, in_flight=False)]
        for flat, mean in zip(before, workload.mean_gradient(0), strict=True):
            require_close(contestant, "the dense first step", flat, mean)
    step = int(has_estimate)
    workload.refill(step)
    outputs = split_all(workload, contestant.exchange(workload.buckets, in_flight=False))
    olds = split_all(workload, before)
    means = split_all(workload, workload.mean_gradient(step))
    exact = outputs[0].dtype in (torch.float32, torch.float64)  # else a step may be rounded away
    for t, (out, old, g) in enumerate(zip(outputs, olds, means, strict=True)):
        place = f"tensor {t} of shape {tuple(out.shape)}"
        message = eta * (g.double() - old.double())
        sent, size = old.double() + message, old.double().abs() + message.abs()
        view = kept_of(contestant, out, ratio)
        if view is None:  # dense: the Python hook takes the mean as it is
            require_close(contestant, place, out, g if contestant.name == "python" else sent, size)
            continue
        m, k = view
        changed = (out != old).view(m, -1).any(dim=1)
        number = int(changed.sum())
        if number > k or (exact and number < k):
            raise WrongResultError(f"{contestant.name}, {place}: {number} rows were sent, not {k}")
        rows = [t.view(m, -1)[changed] for t in (out, sent, size)]
        require_close(contestant, place, *rows)


def kept_of(contestant: Contestant, tensor: Tensor, ratio: float) -> tuple[int, int] | None:
    """(m, K) of a tensor; None where it stays dense."""
    if contestant.name == "python":
        m = len(tensor)
        return (m, math.ceil(ratio * m * (1 - 1e-12))) if tensor.dim() > 1 else None
    config = contestant.state.config
    row = make_plan(config, [("", tensor)], dist.get_world_size()).rows[0]
    return None if row.view is None or row.kept is None else (row.view[0], row.kept)


def require_close(
    contestant: Contestant,
    place: str,
    got: Tensor,
    expected: Tensor,
    size: Tensor | None = None,
    rough: torch.dtype | None = None,
) -> None:
    """Raises WrongResultError where two tensors differ by more than rounding.

    Args:
        contestant: named in the error.
        place: named in the error.
        got: the hook's.
        expected: of the same shape.
        size: of the numbers that were rounded on the way; None: that of ``expected``.
        rough: the type that they were rounded to; None: that of ``got``.
    """
    wide = expected.double()
    allowed = TOLERANCE[rough or got.dtype] * (1 + (wide if size is None else size).abs())
    difference = (got.double() - wide).abs()
    wrong = ~(difference <= allowed)  # NaN is wrong too
    if wrong.any():
        raise WrongResultError(
            f"{contestant.name}, {place}: {int(wrong.sum())} of {got.numel()} elements are wrong, "
            f"by up to {float(difference[wrong].max()):.3g}"
        )


def split_all(workload: Workload, flats: Sequence[Tensor]) -> list[Tensor]:
    """Of all buckets' tensors the parameters' views."""
    pairs = zip(workload.buckets, flats, strict=True)
    return [view for bucket, flat in pairs for view in split(bucket, flat)]


def verify(args: argparse.Namespace, workload: Workload, small: Workload) -> None:
    """Verifies every hook that will be timed: against the oracle, and (one rank) at full size."""
    sized = workload if args.ranks == 1 else small
    for feedback in args.feedback:
        for ratio in args.ratios:
            for name in contestants_of(args, feedback, verified=True):
                fresh = make_contestant(name, small, feedback, ratio, args.columns, args.wire)
                if name != "python":
                    verify_against_oracle(fresh, small)
                # Top-K's ranks keep elements of their own, so that no K rows stand out; dense and
                # low rank send something of all.
                if name in ("dense", "low_rank") or (name == "top_k" and args.ranks > 1):
                    continue
                fresh = make_contestant(name, sized, feedback, ratio)
                verify_kept_rows(fresh, sized, feedback, ratio)
