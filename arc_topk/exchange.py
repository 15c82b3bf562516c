"""The engine without DDP: for other wrappers, and for training loops that average by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from arc_topk import _C
from arc_topk.agreement import agree, describe_tensors
from arc_topk.config import Config, config_from
from arc_topk.device import unservable
from arc_topk.plan import Plan, make_plan


class GradientExchange:
    """Averages a fixed list of tensors over ranks, with compression and error feedback.

    A collective to make: every rank passes the same shapes and dtypes in the same order::

        exchange = arc_topk.GradientExchange(list(model.parameters()), ratio=0.1)
        ...
        exchange.all_reduce_([p.grad for p in model.parameters()])

    The error feedback of a tensor is known by its place in the list. Tensors of one dtype are
    exchanged as one bucket, on the calling thread.

    Args:
        tensors: whose shapes, strides, dtypes and device are those of the gradients to come; their
            values are not used.
        config: how they are averaged; or give its fields as keywords.
        process_group: whose ranks are averaged; None: the default group.
        **fields: fields of `Config`, instead of ``config``.

    Raises:
        TypeError, ValueError: from `Config`; a dtype that cannot be served; or, on every rank,
            ranks differ.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        config: Config | None = None,
        process_group: dist.ProcessGroup | None = None,
        **fields: Any,
    ) -> None:
        group = process_group if process_group is not None else dist.group.WORLD
        if group is None:
            raise RuntimeError("arc_topk: no process group; call init_process_group() first")
        error: Exception | None = None
        try:
            self.config = config_from(config, fields)
            _check_devices(tensors)
        except (TypeError, ValueError) as found:
            error = found
        named = [(str(i), tensor) for i, tensor in enumerate(tensors)]
        mine = None if error else self.config
        agree(mine, describe_tensors(named), error, group)

        self._group = group
        # Only what tells a tensor from another is kept: shape, strides, dtype, identity.
        self._keys = [
            torch.empty_like(t, device="meta", memory_format=torch.preserve_format) for t in tensors
        ]
        self._buckets = [
            _FlatBucket(self._keys, dtype, tensors[0].device)
            for dtype in {t.dtype: None for t in tensors}
        ]
        self._engine = _C.Exchange(self.config.native(), group)
        names = [f"tensor {i}" for i in range(len(self._keys))]
        self._engine.bind(self._keys, names, may_be_unused=False)

    def all_reduce_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replaces every tensor by its average over ranks, as compressed. A collective.

        Args:
            tensors: of the shapes and dtypes given when this was made, in the same order.

        Raises:
            ValueError: another number of tensors, shape or dtype; names the place in the list.
            RuntimeError: a collective failed; names rank, bucket, phase and first tensor.
        """
        self._check(tensors)
        for bucket in self._buckets:
            mine = [tensors[i] for i in bucket.indices]
            bucket.load(mine)
            averaged = self._engine.run(bucket.buffer, bucket.keys)
            bucket.store(averaged, mine)

    def plan(self) -> Plan:
        """What is done with each tensor, and the bytes of a compressed step."""
        named = [(str(i), key) for i, key in enumerate(self._keys)]
        return make_plan(self.config, named, dist.get_world_size(self._group))

    def metrics(self) -> dict[str, Any]:
        """As `State.metrics`."""
        metrics: dict[str, Any] = self._engine.metrics()
        return metrics

    def reset_metrics(self) -> None:
        """As `State.reset_metrics`."""
        self._engine.reset_metrics()

    def _check(self, tensors: Sequence[torch.Tensor]) -> None:
        if len(tensors) != len(self._keys):
            raise ValueError(f"tensors has {len(tensors)} tensors; expected {len(self._keys)}")
        for i, (tensor, key) in enumerate(zip(tensors, self._keys, strict=True)):
            if tensor.shape != key.shape or tensor.dtype != key.dtype:
                raise ValueError(
                    f"tensors[{i}] is {tensor.dtype} of shape {tuple(tensor.shape)}; expected "
                    f"{key.dtype} of shape {tuple(key.shape)}"
                )


def _check_devices(tensors: Sequence[torch.Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        error = unservable(f"tensors[{i}]", tensor.device)
        if error is not None:
            raise error
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"tensors[{i}] is on device '{tensor.device}', tensors[0] on "
                f"'{tensors[0].device}'; expected all tensors on one device"
            )


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

    def load(self, tensors: list[torch.Tensor]) -> None:
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
