"""What each contestant's exchange costs, round after round, and the ratios within a round."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from contestants import Contestant
from floor import Stream, floor_bytes
from workload import Workload

import arc_topk

COMPUTE = ("prepare", "select", "pack", "apply")  # phases that are not collectives
# EF21's dense step, PowerSGD's two, and in the third everything is allocated.
WARM_UP = 3


def measure(
    args: argparse.Namespace,
    workload: Workload,
    contestants: list[Contestant],
    stream: Stream | None,
    advance: Callable[[], None],
) -> None:
    """Times all contestants in turn, ``args.repeat`` rounds after the warm-up."""
    for step in range(WARM_UP + args.repeat):
        for contestant in contestants:
            is_engine = isinstance(contestant.state, arc_topk.State)
            workload.refill(step)
            bandwidth = stream.bandwidth() if stream else None
            if is_engine:
                contestant.state.reset_metrics()
            dist.barrier()
            start = time.perf_counter()
            contestant.exchange(workload.buckets, in_flight=args.ranks > 1)
            seconds = slowest(time.perf_counter() - start)
            if step < WARM_UP:
                continue
            contestant.seconds.append(seconds)
            if bandwidth is not None:
                contestant.bandwidth.append(bandwidth)
            if is_engine and contestant.name != "dense":
                phases = contestant.state.metrics()["seconds"]
                contestant.phases.append(phases)
                contestant.compute.append(sum(phases[phase] for phase in COMPUTE))
        advance()


def slowest(seconds: float) -> float:
    """The longest time that any rank took."""
    if dist.get_world_size() == 1:
        return seconds
    value = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)


def spread(values: Sequence[float], scale: float = 1) -> dict[str, Any] | None:
    """Median, least and largest, and the values themselves; None of nothing."""
    if not values:
        return None
    scaled = [scale * v for v in values]
    middle = statistics.median(scaled)
    return {"median": middle, "min": min(scaled), "max": max(scaled), "rounds": scaled}


def results_of(
    contestants: list[Contestant], workload: Workload, setting: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row a contestant, as it goes into table and JSON."""
    by_name = {c.name: c for c in contestants}
    rows = []
    for c in contestants:
        row = {**setting, "hook": c.name, "ms": spread(c.seconds, 1e3)}
        row["compute_ms"] = spread(c.compute, 1e3)
        for phase in c.phases[0] if c.phases else ():
            row.setdefault("phases_ms", {})[phase] = 1e3 * statistics.median(
                phases[phase] for phases in c.phases
            )
        for name in ("python", "powersgd", "DDP"):
            if name in by_name and name != c.name:
                pairs = zip(by_name[name].seconds, c.seconds, strict=True)
                row[f"times_faster_than_{name}"] = spread([other / own for other, own in pairs])
        if isinstance(c.state, arc_topk.State):
            plan = c.state.plan()
            row["wire_bytes"], row["dense_bytes"] = plan.wire_bytes, plan.dense_bytes
            row["state_bytes"] = plan.state_bytes
            if c.compute and c.bandwidth:
                least = floor_bytes(plan, c.state.config)
                floors = [least / bandwidth for bandwidth in c.bandwidth]
                row["floor_bytes"], row["floor_ms"] = least, spread(floors, 1e3)
                pairs = zip(c.compute, floors, strict=True)
                row["over_floor"] = spread([compute / floor for compute, floor in pairs])
        rows.append(row)
    streams = [4 * 4 * workload.numel / b for c in contestants for b in c.bandwidth]
    if streams:
        rows.insert(0, {**setting, "hook": "stream", "ms": spread(streams, 1e3)})
    return rows
