"""The engine without DDP: for other wrappers, and for training loops that average by themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from typing_extensions import Unpack

from arc_topk import _C
from arc_topk.agreement import agree, describe_tensors
from arc_topk.checkpoint import ErrorFeedback
from arc_topk.checkpoint.holder import Holder
from arc_topk.config import Config, Fields, config_from
from arc_topk.groups import current, default_group, own_transport, timeout_of
from arc_topk.plan import Plan, make_plan
from arc_topk.servable import on_two_devices, unservable


class GradientExchange(ErrorFeedback):
    """Averages a fixed list of tensors over ranks, with compression and error feedback.

    A collective to make: every rank passes the same shapes and dtypes in the same order::

        exchange = arc_topk.GradientExchange(list(model.parameters()), ratio=0.1)
        ...
        exchange.all_reduce_([p.grad for p in model.parameters()])

    The error feedback of a tensor is known by its place in the list, and ``"tensor 3"`` is the name
    of the fourth one, for `Config.ratios`. Tensors of one dtype are
    exchanged as one bucket, on the calling thread.

    Args:
        tensors: whose shapes, strides, dtypes and device are those of the gradients to come; their
            values are not used.
        config: how they are averaged; or give its fields as keywords.
        process_group: whose ranks are averaged; None: the default group.
        **fields: fields of `Config`, instead of ``config``.

    Raises:
        TypeError, ValueError: from `Config`; a tensor that cannot be served; or, on every rank,
            ranks differ.
        RuntimeError: no process group; or not all ranks have come within the group's time-out.
    """

    def __init__(
        self,
        tensors: Iterable[torch.Tensor],
        config: Config | None = None,
        process_group: dist.ProcessGroup | None = None,
        **fields: Unpack[Fields],
    ) -> None:
        group = process_group if process_group is not None else default_group()
        error: Exception | None = None
        given: list[torch.Tensor] = []
        try:
            self.config = config_from(config, fields)
            if self.config.adaptive:
                raise ValueError(
                    "adaptive is True for a GradientExchange, which does not know what backward "
                    "hides; expected adaptive=False, or register(ddp)"
                )
            given = _servable(tensors)
            self._names = [f"tensor {i}" for i in range(len(given))]
            self.config.check_names(self._names)
        except Exception as found:  # whatever it is: the other ranks must learn of it
            error = found
        named = [(str(i), tensor) for i, tensor in enumerate(given)]
        device = given[0].device if given else torch.device("cpu")
        agree(
            None if error else self.config,
            describe_tensors(named),
            error,
            group,
            call="GradientExchange(...)",
            wait=timeout_of(group),
            device=device,
        )

        self._group = group
        self._device = device
        self._transport = own_transport(group, device)
        # Only what tells a tensor from another is kept: shape, strides, dtype, identity.
        self._keys = [
            torch.empty_like(t, device="meta", memory_format=torch.preserve_format) for t in given
        ]
        self._buckets = [
            _FlatBucket(self._keys, dtype, device) for dtype in {t.dtype: None for t in given}
        ]
        self._engine: _C.Exchange = _C.Exchange(self.config.native(), group)
        ratios = [self.config.ratio_of(name) for name in self._names]
        self._engine.bind(self._keys, self._names, may_be_unused=False, ratios=ratios)

    def all_reduce_(
        self, tensors: Iterable[torch.Tensor | None], *, none_as_zero: bool = False
    ) -> list[torch.Tensor]:
        """Replaces every tensor by its average over ranks, as compressed. A collective.

        What a rank refuses is refused on every rank, and changes neither tensors nor error
        feedback: no rank waits for one that has raised. (It counts as a step: V and Rand-K's draw
        go on.) Only NCCL's ranks, whose host must not wait, are not told: they get NaN in
        that step.

        Args:
            tensors: of the shapes, dtypes and device given when this was made, in the same order;
                strides may differ.
            none_as_zero: take None, the gradient of a parameter that this rank did not use, for
                zeros. It need not be the same on every rank.

        Returns:
            The tensors; in the place of None a new one, with the strides given at the start::

                grads = exchange.all_reduce_((p.grad for p in parameters), none_as_zero=True)
                for p, grad in zip(parameters, grads):
                    p.grad = grad

        Raises:
            ValueError: another number of tensors, shape, dtype or device, or None; names the place
                in the list and, on the other ranks, the rank.
            RuntimeError: a collective failed; names rank, bucket, phase and first tensor.
        """
        given: list[torch.Tensor] = []
        error: Exception | None = None
        try:
            given = self._checked(tensors, none_as_zero)
        except Exception as found:
            # Whatever it is, the other ranks are there: this one takes part with NaN, which changes
            # no state anywhere.
            error = found
        for bucket in self._buckets:
            mine = [given[i] for i in bucket.indices] if error is None else None
            bucket.load(mine)
            averaged = self._engine.run(bucket.buffer, bucket.keys)
            if not self._transport.queued and averaged[:1].isnan().any():
                self._raise_together(error)
            if mine is not None:
                bucket.store(averaged, mine)
        if error is not None:
            raise error
        return given

    def _raise_together(self, error: Exception | None) -> None:
        """Raises on every rank what any rank refused. A collective; averages are alike."""
        text = None if error is None else f"{type(error).__name__}: {error}"
        texts: list[str | None] = [None] * self._group.size()
        with current(self._device):
            dist.all_gather_object(texts, text, group=self._group)
        if error is not None:
            raise error
        for rank, theirs in enumerate(texts):
            if theirs is not None:
                raise ValueError(f"arc_topk: all_reduce_() failed on rank {rank}: {theirs}")

    def _holder(self) -> Holder:
        trained = [torch.empty_like(key, requires_grad=True) for key in self._keys]
        tensors = list(zip(self._names, trained, strict=True))
        return Holder("GradientExchange", self.config, self._group, self._device, tensors)

    def plan(self) -> Plan:
        """What is done with each tensor, and the bytes of a compressed step."""
        named = zip(self._names, self._keys, strict=True)
        return make_plan(self.config, named, self._group.size(), self._transport.name)

    def metrics(self) -> dict[str, Any]:
        """As `State.metrics`."""
        return {**self._engine.metrics(), "transport": self._transport.name}

    def reset_metrics(self) -> None:
        """As `State.reset_metrics`."""
        self._engine.reset_metrics()

    def _checked(
        self, tensors: Iterable[torch.Tensor | None], none_as_zero: bool
    ) -> list[torch.Tensor]:
        """``tensors`` as a list, with zeros for None where that is wanted."""
        given = list(tensors)
        if len(given) != len(self._keys):
            raise ValueError(f"tensors has {len(given)} tensors; expected {len(self._keys)}")
        return [self._checked_one(i, t, none_as_zero) for i, t in enumerate(given)]

    def _checked_one(self, i: int, tensor: torch.Tensor | None, none_as_zero: bool) -> torch.Tensor:
        key = self._keys[i]
        if tensor is None and none_as_zero:
            return torch.zeros_like(key, device=self._device)
        if tensor is None:
            raise ValueError(
                f"tensors[{i}] is None; expected a tensor: a parameter that this rank did not use "
                "has no gradient, none_as_zero=True counts it as zeros"
            )
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"tensors[{i}] is a {type(tensor).__name__}; expected a tensor")
        if tensor.layout != torch.strided:
            raise ValueError(f"tensors[{i}] is sparse ({tensor.layout}); expected a dense tensor")
        if tensor.shape != key.shape or tensor.dtype != key.dtype:
            raise ValueError(
                f"tensors[{i}] is {tensor.dtype} of shape {tuple(tensor.shape)}; expected "
                f"{key.dtype} of shape {tuple(key.shape)}"
            )
        if any(size > 1 and stride == 0 for size, stride in zip(*_layout(tensor), strict=True)):
            raise ValueError(
                f"tensors[{i}] is expanded: elements of it share memory, and cannot take an "
                "average each; expected a tensor.clone() of it"
            )
        if tensor.device != self._device:
            raise ValueError(
                f"tensors[{i}] is on device '{tensor.device}'; expected '{self._device}'"
            )
        return tensor


def _layout(tensor: torch.Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    return tensor.shape, tensor.stride()


def _servable(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """``tensors`` as a list, all of which can be served."""
    given = list(tensors)
    for i, tensor in enumerate(given):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"tensors[{i}] is a {type(tensor).__name__}; expected a tensor")
        if tensor.device != given[0].device:
            raise on_two_devices(f"tensors[{i}]", tensor, given[0])
        error = unservable(f"tensors[{i}]", tensor)
        if error is not None:
            raise error
    return given


class _FlatBucket:
    """The tensors of one dtype in one buffer, one after the other, each in its own memory order."""

    def __init__(
        self, keys: Sequence[torch.Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.indices = [i for i, key in enumerate(keys) if key.dtype == dtype]
        self.keys = [keys[i] for i in self.indices]
        numel = sum(key.numel() for key in self.keys)
        self.buffer = torch.zeros(numel, dtype=dtype, device=device)
        self._views = self._slice(self.buffer)

    def load(self, tensors: list[torch.Tensor] | None) -> None:
        """None: NaN."""
        if tensors is None:
            self.buffer.fill_(float("nan"))
            return
        torch._foreach_copy_(self._views, [t.detach() for t in tensors])

    def store(self, averaged: torch.Tensor, tensors: list[torch.Tensor]) -> None:
        views = self._views if averaged is self.buffer else self._slice(averaged)
        torch._foreach_copy_([t.detach() for t in tensors], views)

    def _slice(self, flat: torch.Tensor) -> list[torch.Tensor]:
        views = []
        offset = 0
        for key in self.keys:
            views.append(flat.as_strided(key.shape, key.stride(), offset))
            offset += key.numel()
        return views
