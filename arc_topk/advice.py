"""What averaging costs here, and what compression would save: measured, and said in plain words."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from typing_extensions import Unpack

from arc_topk.agreement import agree, describe_tensors
from arc_topk.checks import check_hookable, ddp_in, unservable_parameter
from arc_topk.config import Config, Fields, config_from
from arc_topk.exchange import GradientExchange
from arc_topk.groups import current, timeout_of
from arc_topk.meeting import WAIT
from arc_topk.plan import make_plan

LARGE = 8 << 20  # bytes of the larger all-reduce that is timed: beyond what latency decides
SAMPLE = 16 << 20  # elements that the hook's own time is measured on
REPEATS = 5
WARM_UP = 2  # EF21's dense step; and what is allocated once
COMPUTE = ("prepare", "select", "pack", "apply")
WORTH_IT = 0.05  # of what averaging takes now: less is noise


@dataclass(frozen=True)
class Advice:
    """`advise`'s answer: ``print`` it, or read what it follows from. Times are seconds a step.

    Attributes:
        ranks: N.
        numel: trainable parameters.
        dense_bytes, wire_bytes: what a rank hands to the collectives, without and with compression.
        latency: an all-reduce of next to nothing.
        bandwidth: bytes a second of a large all-reduce, beyond its latency.
        dense: all of DDP's all-reduces one after the other.
        compute: the hook's own, on this machine as busy as it is.
        compressed: its collectives and its compute, one after the other.
        exposed: what dense averaging adds to a step, measured; None: no step was given.
        saves: what compression would take off a step; negative: put on.
        config: the one that was asked about.
    """

    ranks: int
    numel: int
    dense_bytes: int
    wire_bytes: int
    latency: float
    bandwidth: float
    dense: float
    compute: float
    compressed: float
    exposed: float | None
    saves: float
    config: Config

    @property
    def worth_it(self) -> bool:
        """Whether it saves more than one would see as noise."""
        now = self.dense if self.exposed is None else self.exposed
        return self.saves > WORTH_IT * now

    def __str__(self) -> str:
        lines = [
            f"{self.ranks} ranks, {self.numel / 1e6:.1f} M parameters. An all-reduce here takes "
            f"{_ms(self.latency)} and sums {self.bandwidth / 1e6:.0f} MB/s.",
            f"dense:      {_ms(self.dense)} a step for {self.dense_bytes / 1e6:.1f} MB"
            + ("" if self.exposed is None else f"; a step is {_ms(self.exposed)} longer for it"),
            f"compressed: {_ms(self.compressed)} a step for {self.wire_bytes / 1e6:.1f} MB, "
            f"{_ms(self.compute)} of it computing",
        ]
        where = "" if self.exposed is not None else ", where backward does not hide it"
        if self.worth_it:
            lines.append(f"Compression would save about {_ms(self.saves)} a step{where}.")
        else:
            lines.append("Leave compression off: it would save nothing here.")
        return "\n".join(lines)


def advise(
    ddp: torch.nn.Module,
    config: Config | None = None,
    *,
    step: Callable[[], Any] | None = None,
    **fields: Unpack[Fields],
) -> Advice:
    """Measures what averaging ``ddp``'s gradients costs, and what compression would save.

    A collective: call it on every rank, on a DDP without a hook, before training or between two
    steps. It takes some seconds, and memory for the error feedback of at most 16 M elements
    meanwhile. Neither parameters nor gradients are touched, but by ``step``::

        advice = arc_topk.advise(ddp, ratio=0.1, step=lambda: loss(ddp(batch)).backward())
        print(advice)

    Times come from a latency and a bandwidth that are measured on the group, the least of a few
    runs; the hook's own from as many elements, in proportion. Whatever else the machine does is in
    them.

    Args:
        ddp: as for `register`.
        config: how gradients would be averaged (``adaptive`` counts for nothing); or give its
            fields as keywords.
        step: a forward and backward pass through ``ddp``. It is called some times, with and without
            averaging; then gradients are set to None. What averaging adds to it, behind what
            backward hides, is then measured. None: nothing is taken for hidden.
        **fields: fields of `Config`, instead of ``config``.

    Returns:
        The same advice on every rank.

    Raises:
        TypeError, ValueError: as `register`, on every rank, whichever rank it happened on; for the
            compressor "dense", which saves nothing; where some ranks give a step and others do not.
        RuntimeError: a rank has not called it within a minute.
    """
    wrapped = ddp_in(ddp)
    named = [
        (name, parameter)
        for name, parameter in wrapped.module.named_parameters()
        if parameter.requires_grad and name not in wrapped.parameters_to_ignore
    ]
    error: Exception | None = None
    try:
        config = dataclasses.replace(config_from(config, fields), adaptive=False)
        check_hookable(wrapped)
        if config.compressor == "dense":
            raise ValueError("compressor is 'dense', which saves nothing; expected another one")
        config.check_names([name for name, _ in named])
        error = unservable_parameter(wrapped, named)
    except Exception as found:  # whatever it is: the other ranks must learn of it
        error = found
    group, device = wrapped.process_group, wrapped.device
    agree(
        None if error else config,
        describe_tensors(named),
        error,
        group,
        call="advise(ddp)",
        wait=min(timeout_of(group), WAIT),
        device=device,
        facts={"step (given or not)": "None" if step is None else "given"},
    )
    assert config is not None

    plan = make_plan(config, named, group.size())
    numel = sum(tensor.numel() for _, tensor in named)
    buckets = max(1, math.ceil(plan.dense_bytes / wrapped.bucket_bytes_cap))
    with current(device):
        link = _Link(*_slowest(_link(group, device), group, device))
        hook = _hook([tensor for _, tensor in named], config, group, link)
        exposed = None if step is None else _exposed(wrapped, step)
        compute, delta = _slowest([hook.seconds * numel, exposed or 0.0], group, device)
    exposed = None if exposed is None else delta
    dense = link.seconds(buckets, plan.dense_bytes)
    sent = plan.wire_bytes * hook.link_cost
    compressed = compute + link.seconds(hook.collectives * buckets, sent)
    # What backward hides of the one it hides of the other; the last bucket's share is never hidden.
    hidden = 0.0 if exposed is None else max(0.0, dense - exposed)
    left = max(compressed - hidden, compressed / buckets)
    saves = (dense if exposed is None else exposed) - left
    return Advice(
        group.size(), numel, plan.dense_bytes, plan.wire_bytes, link.latency, 1 / link.a_byte,
        dense, compute, compressed, exposed, saves, config,
    )  # fmt: skip


@dataclass(frozen=True)
class _Link:
    """Seconds of an all-reduce of next to nothing, and of each byte more."""

    latency: float
    a_byte: float

    def seconds(self, collectives: float, size: float) -> float:
        return collectives * self.latency + size * self.a_byte


@dataclass(frozen=True)
class _Hook:
    """Seconds of its own an element; collectives a bucket; link traffic of a byte.

    An all-reduce's is 1: compressors that gather send more than their bytes.
    """

    seconds: float
    collectives: float
    link_cost: float


def _sample(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients for as many of them as are needed, the first ones; the same on all ranks."""
    chosen: list[torch.Tensor] = []
    for tensor in tensors:
        if chosen and sum(t.numel() for t in chosen) + tensor.numel() > SAMPLE:
            continue
        chosen.append(torch.randn_like(tensor, requires_grad=False))
    return chosen


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _link(group: dist.ProcessGroup, device: torch.device) -> list[float]:
    """Latency of an all-reduce, and its seconds a byte beyond that."""
    small, large = (torch.zeros(n, device=device) for n in (1, LARGE // 4))
    times: dict[int, list[float]] = {1: [], LARGE: []}
    for number in range(REPEATS + 1):
        for size, tensor in ((1, small), (LARGE, large)):
            seconds = _timed(functools.partial(dist.all_reduce, tensor, group=group), device)
            if number:
                times[size].append(seconds)
    latency = min(times[1])
    return [latency, max(min(times[LARGE]) - latency, 1e-9) / LARGE]


def _hook(
    tensors: Sequence[torch.Tensor], config: Config, group: dist.ProcessGroup, link: _Link
) -> _Hook:
    """Of a sample of these tensors' gradients."""
    sample = _sample(tensors)
    device = sample[0].device
    # The steps for good; names, and with them ratios of their own, are the model's.
    settled = dataclasses.replace(config, ratios=None, warmup_steps=0, start_step=0)
    exchange = GradientExchange(sample, settled, group)
    metrics: dict[str, Any] = {}
    link_cost, found = 1.0, []
    for number in range(WARM_UP + REPEATS):
        gradients = [gradient.clone() for gradient in sample]
        exchange.reset_metrics()
        seconds = _timed(functools.partial(exchange.all_reduce_, gradients), device)
        if number < WARM_UP:
            continue
        metrics = exchange.metrics()
        if group.size() > 1:
            ring = 2 * (group.size() - 1) / group.size()
            link_cost = metrics["link_bytes"] / (ring * metrics["wire_bytes"])
        if device.type == "cpu":
            found.append(sum(metrics["seconds"][phase] for phase in COMPUTE))
        else:  # phases are those of the host, which only queues them
            waits = link.seconds(metrics["collectives"], metrics["wire_bytes"] * link_cost)
            found.append(max(0.0, seconds - waits))
    collectives = metrics["collectives"] / metrics["exchanges"]
    return _Hook(min(found) / sum(t.numel() for t in sample), collectives, link_cost)


def _exposed(ddp: Any, step: Callable[[], Any]) -> float:
    """What averaging adds to a step; the median of pairs, one after the other."""
    device = next(ddp.parameters()).device
    pairs = []
    for number in range(1 + REPEATS):
        with ddp.no_sync():
            alone = _timed(step, device)
        averaged = _timed(step, device)
        if number:
            pairs.append(averaged - alone)
    ddp.zero_grad(set_to_none=True)
    return max(0.0, statistics.median(pairs))


def _slowest(mine: list[float], group: dist.ProcessGroup, device: torch.device) -> list[float]:
    """The largest of all ranks', each: what follows from them is then the same on all."""
    values = torch.tensor(mine, dtype=torch.float64).to(device)
    dist.all_reduce(values, dist.ReduceOp.MAX, group=group)
    return values.tolist()


def _ms(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return f"{milliseconds:,.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"
