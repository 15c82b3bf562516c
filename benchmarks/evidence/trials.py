"""What was tried with the engine's own exchanges and is not a choice of `arc_topk.Config`.

Both trials begin as low rank on bytes. At a few steps they look at what an engine could only
estimate, the mean message X = g + e of every matrix, all-reduced for the trial alone and not
counted, and divide the very bytes of low rank anew. Residuals are carried over.

- "rows or low rank": each matrix, at its own bytes, travels in the form that leaves less of
  ||X||^2 behind: ARC-Top-K's rows, or low rank's columns.
- "one budget": the bytes of all matrices are one; columns go where they carry most energy a byte.
"""

import heapq
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import arc_topk
from arc_topk.plan import make_plan
from evidence.budget import OutOfReachError, fields_for

LOOK_AT = (20, 60, 150, 300)  # steps
ONE_BUCKET_MB = 100_000  # larger than any model here

Fields = dict[str, Any]


class ByMatrix:
    """An exchange a parameter, each with fields of its own; a Python hook over one bucket."""

    def __init__(self, choice: str, model: nn.Module, base: Fields, seed: int) -> None:
        self._choose = {"rows or low rank": rows_or_columns, "one budget": one_budget}[choice]
        self._base = {**base, "seed": seed}
        self._like = [torch.empty_like(p, requires_grad=False) for p in model.parameters()]
        self.chosen: dict[str, Any] = {"ratio": base["ratio"]}
        self.module = DistributedDataParallel(model, bucket_cap_mb=ONE_BUCKET_MB)
        self._places = {id(p): i for i, p in enumerate(self.module.module.parameters())}
        self._fields: list[Fields] = [self._base for _ in self._like]
        self._exchanges = [self._exchange(i) for i in range(len(self._like))]
        self._steps, self._bytes, self._link = 0, 0.0, 0.0
        self.module.register_comm_hook(None, self._hook)

    def after_step(self) -> None:
        """Nothing: gradients were averaged in the backward pass."""

    def residual(self, batch: Any) -> float | None:
        """Nobody asks for a trial's."""
        return None

    def sent(self) -> tuple[float, float]:
        """The exchanges' own count, those that were let go included."""
        self._count()
        return self._bytes, self._link

    def _exchange(self, i: int) -> arc_topk.GradientExchange:
        return arc_topk.GradientExchange([self._like[i]], **self._fields[i])

    def _count(self) -> None:
        for exchange in self._exchanges:
            metrics = exchange.metrics()
            self._bytes += metrics["wire_bytes"]
            self._link += metrics["link_bytes"]
            exchange.reset_metrics()

    def _hook(self, _: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        places = [self._places[id(p)] for p in bucket.parameters()]
        gradients = dict(zip(places, bucket.gradients(), strict=True))
        if self._steps in LOOK_AT:
            self._look([gradients[i] for i in range(len(self._like))])
        for i, exchange in enumerate(self._exchanges):  # in one order on all ranks
            exchange.all_reduce_([gradients[i]])
        self._steps += 1
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    def _look(self, gradients: Sequence[Tensor]) -> None:
        saved = [exchange.state_dict() for exchange in self._exchanges]
        messages = []
        for gradient, state in zip(gradients, saved, strict=True):
            (own,) = state["own"][f"rank_{dist.get_rank()}"].values()
            messages.append(gradient + own["a"].view_as(gradient))
            dist.all_reduce(messages[-1])
        before = self._fields
        self._fields = self._choose(messages, self._base)
        self._count()
        for i, state in enumerate(saved):
            if self._fields[i] != before[i]:
                self._exchanges[i] = self._exchange(i)
                self._exchanges[i].load_state_dict(state)
        by_rows = sum(fields["compressor"] == "arc_topk" for fields in self._fields)
        ranks = [fields.get("rank") for fields in self._fields]
        self.chosen[f"step {self._steps}"] = {"by_rows": by_rows, "ranks": ranks}


def rows_or_columns(messages: Sequence[Tensor], base: Fields) -> list[Fields]:
    """Each in the form that leaves less of it, at the bytes that low rank has for it."""
    return [_smaller(x, base) for x in messages]


def _smaller(x: Tensor, base: Fields) -> Fields:
    (row,) = _plan(x, base)
    if x.dim() < 2 or row.kept is None:
        return base
    matrix = x.reshape(row.view)
    rows: Fields = {**base, "compressor": "arc_topk", "sketch_dtype": torch.bfloat16}
    del rows["ratio"]
    try:
        rows = fields_for(rows, [x], dist.get_world_size(), row.wire_bytes / (4 * x.numel()))
    except OutOfReachError:
        return base
    (as_rows,) = _plan(x, rows)
    if as_rows.kept is None:
        return base
    energy_of_rows = matrix.square().sum(1).sort(descending=True).values[: as_rows.kept].sum()
    energy_of_columns = torch.linalg.svdvals(matrix).square()[: row.kept].sum()
    return rows if energy_of_rows > energy_of_columns else base


def one_budget(messages: Sequence[Tensor], base: Fields) -> list[Fields]:
    """Columns one after the other to the matrix whose next singular value is largest a byte.

    Every matrix has one column at least.
    """
    plans = [_plan(x, base)[0] for x in messages]
    matrices = [i for i, x in enumerate(messages) if x.dim() >= 2 and plans[i].view]
    energies, prices, ranks = {}, {}, {}
    left = float(sum(plans[i].wire_bytes for i in matrices))
    for i in matrices:
        energies[i] = torch.linalg.svdvals(messages[i].reshape(plans[i].view)).square().tolist()
        one, two = (_plan(messages[i], {**base, "rank": k})[0].wire_bytes for k in (1, 2))
        prices[i], ranks[i] = two - one, 1
        left -= one
    waiting = [(-energies[i][1] / prices[i], i) for i in matrices if len(energies[i]) > 1]
    heapq.heapify(waiting)
    while waiting:
        _, i = heapq.heappop(waiting)
        if prices[i] > left:
            continue  # a smaller one may still fit
        left -= prices[i]
        ranks[i] += 1
        if ranks[i] < len(energies[i]):
            heapq.heappush(waiting, (-energies[i][ranks[i]] / prices[i], i))
    return [{**base, "rank": ranks[i]} if i in ranks else base for i in range(len(messages))]


def _plan(x: Tensor, fields: Fields) -> Sequence[Any]:
    return make_plan(arc_topk.Config(**fields), [("x", x)], dist.get_world_size()).rows
