"""How the ranks come to one model, and the bytes that each hands to the collectives for it.

Engine's bytes are its own count (`State.metrics`); those of torch's hooks and of local SGD are
counted where they call ``torch.distributed.all_reduce``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import arc_topk
from evidence.budget import fields_for, rank_for
from evidence.methods import Method
from evidence.trials import ONE_BUCKET_MB, ByMatrix

LOCAL_STEPS = 8  # H


class Averaging(Protocol):
    """What `train` needs of each way.

    Attributes:
        module: maps a batch to its loss; gradients are averaged in its backward pass, if at all.
        chosen: what followed from the budget, for the record.
    """

    module: nn.Module
    chosen: dict[str, Any]

    def after_step(self) -> None:
        """To be called behind each step of the optimizer."""

    def residual(self, batch: Any) -> float | None:
        """|mean e| / |mean g| of what error feedback holds back; None without. A collective."""

    def sent(self) -> tuple[float, float]:
        """Bytes of this rank so far: handed to the collectives; sent by ring algorithms."""


def attach(method: Method, model: nn.Module, budget: float | None, seed: int) -> Averaging:
    """Makes a method average ``model`` over the default group's ranks. A collective.

    Raises:
        OutOfReachError: the method's least bytes are above the budget.
    """
    ways: dict[str, Callable[..., Averaging]] = {
        "engine": Engine, "bf16_hook": Bf16Hook, "powersgd": PowerSGD, "local_sgd": LocalSGD,
        "by_matrix": by_matrix,
    }  # fmt: skip
    return ways[method.way](method, model, budget, seed)


class Engine:
    """arc_topk's hook."""

    def __init__(self, method: Method, model: nn.Module, budget: float | None, seed: int) -> None:
        fields = dict(method.config)
        if budget is not None:
            fields = fields_for(fields, list(model.parameters()), dist.get_world_size(), budget)
        self.chosen = {name: fields[name] for name in ("ratio", "sketch_dim") if name in fields}
        self.module = DistributedDataParallel(model)
        self.state = arc_topk.register(self.module, **fields, seed=seed)

    def after_step(self) -> None:
        """Nothing: gradients were averaged in the backward pass."""

    def residual(self, batch: Any) -> float | None:
        """|mean e| / |mean g| over ranks, of EF14's residuals and the gradients of ``batch``."""
        own = self.state.state_dict()["own"][f"rank_{dist.get_rank()}"]
        if self.state.config.feedback != "ef14" or not own:
            return None
        parameters = list(self.module.module.parameters())
        # Not into .grad: DDP's hooks see nothing of it.
        gradients = torch.autograd.grad(self.module.module(batch), parameters)
        return _norm_of_mean([parts["a"] for parts in own.values()]) / _norm_of_mean(gradients)

    def sent(self) -> tuple[float, float]:
        """The engine's own count."""
        metrics = self.state.metrics()
        return metrics["wire_bytes"], metrics["link_bytes"]


def _norm_of_mean(tensors: Sequence[Tensor]) -> float:
    """Of one long vector of every rank. A collective."""
    mean = torch.cat([tensor.flatten().float() for tensor in tensors])
    dist.all_reduce(mean)
    return mean.norm().item() / dist.get_world_size()


def by_matrix(method: Method, model: nn.Module, budget: float | None, seed: int) -> ByMatrix:
    """A trial: its choice beside the fields of `arc_topk.Config` that it begins with."""
    assert budget is not None
    fields = dict(method.config)
    choice = fields.pop("choice")
    fields = fields_for(fields, list(model.parameters()), dist.get_world_size(), budget)
    return ByMatrix(choice, model, fields, seed)


class Counted:
    """Counts the bytes of ``torch.distributed.all_reduce`` within ``counting()``'s reach."""

    def __init__(self) -> None:
        self.bytes = 0
        self._all_reduce = dist.all_reduce

    def residual(self, batch: Any) -> float | None:
        """Nobody asks for PowerSGD's."""
        return None

    def all_reduce(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``torch.distributed.all_reduce``, counted."""
        self.bytes += tensor.numel() * tensor.element_size()
        return self._all_reduce(tensor, *args, **kwargs)

    def sent(self) -> tuple[float, float]:
        """A ring all-reduce of B bytes sends 2 (N-1)/N B."""
        ranks = dist.get_world_size()
        return self.bytes, self.bytes * 2 * (ranks - 1) / ranks


class TorchHook(Counted):
    """A hook of torch's: its calls are counted while it runs, in its callbacks too.

    One bucket: PowerSGD makes collectives in callbacks, whose order over several buckets differs
    between ranks, and Gloo, which pairs collectives by order, then aborts.
    """

    def __init__(self, model: nn.Module, hook: Any, state: Any) -> None:
        super().__init__()
        self.module = DistributedDataParallel(model, bucket_cap_mb=ONE_BUCKET_MB)
        self.module.register_comm_hook(state, self._counting(hook))

    def _counting(self, hook: Any) -> Any:
        def counted(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            dist.all_reduce = self.all_reduce  # until `after_step`: PowerSGD goes on in callbacks
            future: torch.futures.Future[Tensor] = hook(state, bucket)
            return future

        counted.__annotations__ = {
            "bucket": dist.GradBucket,
            "return": torch.futures.Future[Tensor],
        }
        return counted

    def after_step(self) -> None:
        """What is all-reduced from here to the next backward pass is not the hook's."""
        dist.all_reduce = self._all_reduce


class Bf16Hook(TorchHook):
    """torch's bf16_compress_hook."""

    def __init__(self, method: Method, model: nn.Module, budget: float | None, seed: int) -> None:
        self.chosen: dict[str, Any] = {}
        super().__init__(model, bf16_compress_hook, dist.group.WORLD)


class PowerSGD(TorchHook):
    """torch's powerSGD_hook, with error feedback and warm start, from the third step on."""

    def __init__(self, method: Method, model: nn.Module, budget: float | None, seed: int) -> None:
        assert budget is not None
        rank = rank_for(list(model.parameters()), budget)
        self.chosen = {"rank": rank}
        state = PowerSGDState(
            dist.group.WORLD,
            matrix_approximation_rank=rank,
            start_powerSGD_iter=2,
            random_seed=seed,
        )
        super().__init__(model, powerSGD_hook, state)


class LocalSGD(Counted):
    """Every rank trains by itself; every H steps the parameters are averaged."""

    def __init__(self, method: Method, model: nn.Module, budget: float | None, seed: int) -> None:
        super().__init__()
        self.chosen: dict[str, Any] = {"H": LOCAL_STEPS}
        self.module = model
        self._steps = 0

    @torch.no_grad()
    def after_step(self) -> None:
        """Averages the parameters in every H-th step; the optimizer's moments stay each rank's."""
        self._steps += 1
        if self._steps % LOCAL_STEPS == 0:
            for parameter in self.module.parameters():
                self.all_reduce(parameter)
                parameter /= dist.get_world_size()
