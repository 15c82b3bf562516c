"""The oracle: all of it together, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from arc_topk.reference.compressors import Compressed, arc_topk, dense, rand_k, top_k
from arc_topk.reference.directions import Directions
from arc_topk.reference.feedback import FEEDBACKS
from arc_topk.reference.layout import flatten, unflatten
from arc_topk.reference.levels import Levels
from arc_topk.reference.low_rank import drawn, low_rank
from arc_topk.reference.plan import Types, plan_view
from arc_topk.reference.random_numbers import projection, rand_k_keys
from arc_topk.reference.spike_limit import SpikeLimit
from arc_topk.reference.wire import Wire, wire_type

# Rows (ARC-Top-K, Rand-K), element indices of each rank (Top-K), or the oracle's own choice.
Selection: TypeAlias = Any


@dataclass
class Result:
    """One tensor's result of one step.

    Attributes:
        output: what DDP gets on every rank: shape, strides and dtype of the gradient.
        kind: "dense", "compressed", "unused" (zero on every rank), "non-finite" (compressed tensors
            only; the result is NaN everywhere).
        compressed: the compressor's result where kind is "compressed".
    """

    output: Tensor
    kind: str
    compressed: Compressed | None = None


class Oracle:
    """The tensors of one bucket on all N ranks, over the steps.

    Args:
        layouts: of each tensor a shape, or a tensor whose shape and strides count.
        dtype: of the gradients.
        world_size: N.
        compressor: "dense", "arc_topk", "rand_k", "top_k", "low_rank".
        feedback: "none", "ef14", "ef21", "ef21m".
        ratio, rank, sketch_dim, row_width, eta, start_step, wire_dtype, sketch_dtype, state_dtype,
            seed, spike_limit, resync_every: as in the package's configuration; eta None means 0.1.
        may_be_unused: a gradient that is zero on every rank stands for none, as DDP makes it for
            parameters that nobody used: no state changes, and the result is zero.
        streams: of each tensor the number that tells its Rand-K keys, or the columns that low rank
            draws, apart; None: 0, 1, 2, ...

    Attributes:
        steps: exchanges so far; the coming step's V is the one of this number.
        started: False until the dense first step of EF21 and EF21M was made.
        views: how each tensor is seen.
        limits: each rank's spike limit of this bucket; empty: there is none.
        states: `states[i][t]` is the `Feedback` of tensor t on rank i, flat and in memory order. A
            dense tensor needs state only under EF21M, and only `h`.
        bases: low rank's W of each tensor, float32 [n, k]: the same on all ranks. Zero columns are
            drawn at the beginning of the next step, whatever becomes of it.
    """

    def __init__(
        self,
        layouts: Sequence[Tensor | Sequence[int]],
        dtype: torch.dtype,
        world_size: int,
        *,
        compressor: str = "arc_topk",
        feedback: str = "ef14",
        ratio: float = 0.1,
        rank: int | None = None,
        sketch_dim: int = 4,
        row_width: int | None = None,
        eta: float | None = None,
        start_step: int = 0,
        wire_dtype: torch.dtype | None = None,
        sketch_dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
        seed: int = 0,
        spike_limit: float | None = None,
        resync_every: int | None = None,
        may_be_unused: bool = False,
        streams: Sequence[int] | None = None,
    ) -> None:
        if eta is not None and feedback != "ef21m":
            raise ValueError(f"eta: expected None with feedback={feedback!r}, got {eta}")
        self.layouts = [
            t if isinstance(t, Tensor) else torch.empty(tuple(t), device="meta") for t in layouts
        ]
        self.world_size = world_size
        travels = None if wire_dtype is None else wire_type(wire_dtype, world_size)
        if dtype == torch.float64:  # keeps float64 sketches, as it keeps float64 state
            sketch_dtype = None
        if compressor == "low_rank" and wire_dtype == torch.uint8:  # both factors travel alike
            sketch_dtype = travels
        self.types = Types.of(dtype, travels, state_dtype, compressor, sketch_dtype)
        self.compressor, self.feedback = compressor, feedback
        self.sketch_dim, self.start_step, self.seed = sketch_dim, start_step, seed
        self.eta = 0.1 if eta is None else eta
        self.may_be_unused = may_be_unused
        self.streams = list(range(len(self.layouts))) if streams is None else list(streams)
        self.views = [
            plan_view(t, self.types, world_size, compressor, ratio, sketch_dim, row_width, rank)
            for t in self.layouts
        ]
        self.bases = [torch.zeros(v.n, v.k) for v in self.views]
        kind = FEEDBACKS[feedback]
        self.states = [
            [kind(v.numel, self.types.work, self.types.state, self.eta) for v in self.views]
            for _ in range(world_size)
        ]
        ranks = range(world_size if spike_limit is not None else 0)
        self.limits = [SpikeLimit(spike_limit or math.inf) for _ in ranks]
        self._sent: list[Compressed | None] = [None] * len(self.views)
        self._loss_scale = 1.0
        self.steps = 0
        self.started = not kind.dense_start
        drifts = kind.dense_start and compressor in ("arc_topk", "rand_k") and world_size > 1
        intervals = {
            torch.bfloat16: 32,
            torch.float16: 2048,
            torch.float32: 512,
            torch.uint8: 2048,
        }
        by_wire = intervals.get(self.types.wire, 0)
        self.resync_every = by_wire if resync_every is None else resync_every
        if not drifts:
            self.resync_every = 0

    # -- what the tests look at --------------------------------------------------------------------

    def state(self, name: str, rank: int, tensor: int) -> Tensor:
        """State "e", "t", "v", "h_i" or "h", in the shape and strides of the tensor."""
        return unflatten(getattr(self.states[rank][tensor], name), self.layouts[tensor])

    @property
    def dense_bytes(self) -> int:
        """Bytes a rank hands to the collective in a step of plain averaging."""
        return sum(v.numel for v in self.views) * self.types.gradient.itemsize

    @property
    def wire_bytes(self) -> int:
        """Bytes a rank hands to the collectives in a compressed step, flags included."""
        return sum(v.wire_bytes for v in self.views)

    # -- one step ----------------------------------------------------------------------------------

    def step(
        self,
        gradients: Sequence[Sequence[Tensor]],
        selected: Sequence[Selection] | None = None,
        rtol: float = 1e-5,
        loss_scale: float = 1.0,
    ) -> list[Result]:
        """One exchange of all tensors.

        Args:
            gradients: `gradients[i][t]`, the gradient of tensor t on rank i.
            selected: what another implementation selected, per tensor: rows (ARC-Top-K, Rand-K),
                element indices of each rank (Top-K), or None. It is checked, then used.
            rtol: rounding within which `selected` may differ.
            loss_scale: a GradScaler's, which gradients and results are multiplied with. One that is
                less than before tells that the step before was skipped.

        Returns:
            A `Result` a tensor.

        Raises:
            ValueError: `selected` is not a valid top K within rounding.
        """
        by_tensor = [
            [flatten(own[t], layout).to(self.types.work) for own in gradients]
            for t, layout in enumerate(self.layouts)
        ]
        if loss_scale < self._loss_scale:
            self._reclaim()
        self._loss_scale = loss_scale
        self._sent = [None] * len(self.views)
        step, self.steps = self.steps, self.steps + 1
        if step < self.start_step:
            return [self._result(t, self._plain_mean(g), "dense") for t, g in enumerate(by_tensor)]
        for i, limit in enumerate(self.limits):
            scale = limit.scale([g[i] for g in by_tensor])
            for g in by_tensor:
                g[i] = (g[i] * scale).to(self.types.gradient).to(self.types.work)
        if not self.started:
            return self._dense_start(by_tensor)
        if self.resync_every and (step + 1) % self.resync_every == 0:
            self._resync()
        all_dense = not any(v.compressed for v in self.views)
        in_place = all_dense and self.types.dense == self.types.gradient
        wire = Wire(self.types.dense, self.world_size, self.types.work, self._sums)
        results = []
        for t, g in enumerate(by_tensor):
            if self.views[t].compressed:
                choice = None if selected is None else selected[t]
                results.append(self._compressed_step(t, g, step, choice, rtol))
            else:
                mean = self._plain_mean(g) if in_place else dense(g, wire).mean
                results.append(self._dense_step(t, mean))
        return results

    @property
    def _sums(self) -> bool:
        """Whether values are summed on their way; Top-K's are gathered."""
        return self.compressor != "top_k"

    def _reclaim(self) -> None:
        """Each rank gets back the mean of what was sent; with Top-K, its own part."""
        for t, sent in enumerate(self._sent):
            if sent is None:
                continue
            for own, part in zip(self.states, sent.own, strict=True):
                own[t].reclaim(
                    self.views[t].flat(part if self.compressor == "top_k" else sent.mean)
                )

    def _plain_mean(self, g: list[Tensor]) -> Tensor:
        """What DDP itself would do: divide by N, then sum, in the gradient's type."""
        parts = [(gi / self.world_size).to(self.types.gradient) for gi in g]
        return torch.stack(parts).double().sum(dim=0).to(self.types.gradient).to(self.types.work)

    def _result(
        self, t: int, output: Tensor, kind: str, compressed: Compressed | None = None
    ) -> Result:
        flat = output.to(self.types.gradient)
        return Result(unflatten(flat, self.layouts[t]), kind, compressed)

    def _dense_start(self, by_tensor: list[list[Tensor]]) -> list[Result]:
        """v_i = h_i = g_i, h = mean g; put off to the next step where a mean is not finite."""
        means = [self._plain_mean(g) for g in by_tensor]
        self.started = all(bool(mean.isfinite().all()) for mean in means)
        if self.started:
            for i, own in enumerate(self.states):
                for state, g, mean in zip(own, by_tensor, means, strict=True):
                    state.start(g[i] / self._loss_scale, mean / self._loss_scale)
            means = [
                self._scaled(own.output, m) for own, m in zip(self.states[0], means, strict=True)
            ]
        return [self._result(t, mean, "dense") for t, mean in enumerate(means)]

    def _scaled(self, output: Callable[[Tensor], Tensor], mean: Tensor) -> Tensor:
        """An output of feedback, which knows nothing of the loss scale, for a mean that has it."""
        return output(mean / self._loss_scale) * self._loss_scale

    def _resync(self) -> None:
        """H = 1/N sum h_i, as the sums of wire values have rounded it away from there."""
        for t, view in enumerate(self.views):
            if view.compressed:
                own = [states[t].load("h_i").double() for states in self.states]
                mean = torch.stack(own).mean(dim=0).to(self.types.work)
                for states in self.states:
                    states[t].store("h", mean)

    def _dense_step(self, t: int, mean: Tensor) -> Result:
        """Mean g; under EF21M h = (1 - eta) h + eta mean g, its equations with C_i = X_i.

        The mean itself tells what a flag tells of a compressed tensor.
        """
        if self.feedback != "ef21m":
            return self._result(t, mean, "dense")
        shared = self.states[0][t]
        if self.may_be_unused and not mean.any():
            return self._result(t, torch.zeros_like(mean), "unused")
        h = shared.load("h") * (1 - self.eta) + mean / self._loss_scale * self.eta
        if not h.isfinite().all():
            return self._result(t, h, "non-finite")
        for own in self.states:
            own[t].store("h", h)
        return self._result(t, self._scaled(shared.output, mean), "dense")

    def _compressed_step(
        self,
        t: int,
        g: list[Tensor],
        step: int,
        selected: Selection,
        rtol: float,
    ) -> Result:
        states, view = [own[t] for own in self.states], self.views[t]
        if self.compressor == "low_rank":  # needed before anybody knows what becomes of the step
            self.bases[t] = drawn(self.bases[t], self.seed, step, self.streams[t])
        g = [gi / self._loss_scale for gi in g]
        x = [state.prepare(gi) for state, gi in zip(states, g, strict=True)]
        uses = [not self.may_be_unused or bool(gi.any()) for gi in g]
        used = any(uses)
        finite = all(bool(xi.isfinite().all()) for xi in x)
        if not used or not finite:
            for state, gi in zip(states, g, strict=True):
                state.undo(gi)
            zero = torch.zeros_like(g[0])
            output = zero if finite else torch.full_like(zero, math.nan)
            return self._result(t, output, "unused" if finite else "non-finite")

        result = self._compress(t, [view.matrix(xi) for xi in x], uses, step, selected, rtol)
        mean = view.flat(result.mean)
        for state, own in zip(states, result.own, strict=True):
            state.sent(view.flat(own))
            state.received(mean)
        self._sent[t] = result
        output = states[0].output(mean) * self._loss_scale
        return self._result(t, output, "compressed", result)

    def _compress(
        self,
        t: int,
        x: list[Tensor],
        uses: list[bool],
        step: int,
        selected: Selection,
        rtol: float,
    ) -> Compressed:
        view = self.views[t]
        types, ranks = self.types, self.world_size
        wire = Wire(types.wire, ranks, types.work, self._sums)
        levels = types.wire == torch.uint8
        if self.compressor == "arc_topk":
            rows = Levels(ranks, types.work, view.numel, types.sketch) if levels else wire
            v = projection(self.seed, step, view.n, self.sketch_dim)
            return arc_topk(x, v, view.k, rows, selected, rtol, types.sketch)
        if self.compressor == "rand_k":
            keys = rand_k_keys(self.seed, step, self.streams[t], view.m)
            return rand_k(x, keys, view.k, wire, selected)
        if self.compressor == "low_rank":
            columns = Directions(ranks, types.work) if levels else wire
            result, self.bases[t] = low_rank(x, self.bases[t], columns, types.sketch, uses)
            return result
        return top_k(x, view.k, wire, selected, rtol)
